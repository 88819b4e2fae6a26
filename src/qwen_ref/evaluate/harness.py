"""A model behind the interface of lm-evaluation-harness, the field's standard: all its tasks run.

    import lm_eval
    lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=["mmlu"], num_fewshot=5)

The harness itself (TemplateLM) makes ids of a context and a continuation, so that figures can be compared.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwen_ref.chat.context import DEFAULT_SYSTEM, STOP_TOKENS
from qwen_ref.commands.cli import Progress, say
from qwen_ref.config import InputError, shown, whole
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.decoding.streaming import TextStream
from qwen_ref.generate import checked_stop_ids, generate_batch
from qwen_ref.model import Qwen
from qwen_ref.perplexity.scoring import Scores, score_continuations, score_texts
from qwen_ref.tokenizer import Tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
# Stands before each special token of a chat, so that "<|im_end|>" in a message is no special token. It is a
# code point that no text has (Unicode calls it a noncharacter).
MARK = "\ufdd0"
_MARKUP = re.compile(MARK + r"(?:<\|im_start\|>(\w+)(\n?)|<\|im_end\|>)")

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the continuation


class HarnessModel(TemplateLM):
    """What the harness asks of a model: log-likelihoods and generated text.

    With several ranks, each runs the harness. All get the same requests, and each computes its part.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        max_length: int | None = None,
        stop_ids: Collection[int] | None = None,
        seed: int = 0,
    ) -> None:
        """max_length: tokens of a context and what follows, by default the length that the model was trained
        on. Longer contexts lose their beginning. The harness's own models do not count the last token, which
        is only predicted, and therefore cut one token later. Here it counts, as it does for dynamic NTK.
        stop_ids: what ends a generated text besides the task's own stops; by default <|endoftext|>.
        seed: for tasks that sample.
        """
        super().__init__()
        self.model, self.qwen_tokenizer = model, tokenizer
        self.batch_size = whole("batch_size", batch_size)
        max_length = model.config.seq_length if max_length is None else max_length
        self.max_length = whole("max_length", max_length, least=2)
        self.stop_ids = checked_stop_ids([self.eot_token_id] if stop_ids is None else stop_ids)
        self.seed = seed
        self.truncated = 0  # requests whose context lost its beginning
        self.apart = 0  # requests whose context and continuation were encoded separately
        self._prefix = PrefixCache(model)

    # Text and ids

    @property
    def eot_token_id(self) -> int:
        return self.qwen_tokenizer.special_ids["<|endoftext|>"]

    @property
    def tokenizer_name(self) -> str:
        return "qwen_ref-chatml"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "chatml" if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The ChatML text of messages; without add_generation_prompt the last one has no <|im_end|>."""
        if not chat_history or chat_history[0]["role"] != "system":
            chat_history = [{"role": "system", "content": DEFAULT_SYSTEM}, *chat_history]
        messages = []
        for message in chat_history:
            content = message["content"].replace(MARK, "")
            messages.append(f"{MARK}<|im_start|>{message['role']}\n{content}{MARK}<|im_end|>\n")
        if add_generation_prompt:
            return "".join(messages) + f"{MARK}<|im_start|>assistant\n"
        return "".join(messages).removesuffix(f"{MARK}<|im_end|>\n")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of plain text, without special tokens; of a chat, the ids of chat.build_context."""
        ids: list[int] = []
        special, end, plain = self.qwen_tokenizer.special_ids, 0, self.qwen_tokenizer.encode
        for found in _MARKUP.finditer(string):
            ids += plain(string[end : found.start()])
            role, newline = found.groups()
            if role is None:
                ids.append(special["<|im_end|>"])
            else:
                ids += [special["<|im_start|>"], *plain(role), *plain(newline)]
            end = found.end()
        return ids + plain(string[end:])

    # Log-likelihoods

    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of each request.

        Continuations of the same context use it together. Contexts that begin alike (the same examples before
        different questions) use their beginning together. Contexts with one continuation and little in common
        share passes, as batches.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        pairs = []
        for (text, following), context, continuation in requests:
            if not context or not continuation:  # a token reaches across the border, or one is only spaces
                context = self.tok_encode(text) or [self.prefix_token_id]
                continuation = self.tok_encode(following)
                self.apart += 1
            if not continuation:
                raise InputError(f"an empty continuation behind {text[-40:]!r}: there is nothing to score")
            if len(continuation) >= self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens leaves no room for a context in "
                    f"max_length={self.max_length}"
                )
            pairs.append((tuple(self._fitted(context, len(continuation))), continuation))
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, pair in enumerate(pairs):
            groups.setdefault(pair[0], []).append(number)
        alone = []
        before: tuple[int, ...] = ()
        with Progress("scoring", unit="requests") as progress:
            done = 0
            for ids in sorted(groups):
                numbers = groups[ids]
                if len(numbers) == 1 and 2 * _common(ids, before) < len(ids):
                    alone += numbers
                else:
                    continuations = [pairs[number][1] for number in numbers]
                    scores = score_continuations(
                        self.model, ids, continuations, self.batch_size, self._prefix
                    )
                    for number, score in zip(numbers, scores, strict=True):
                        found[number] = _summed(score)
                    done += len(numbers)
                    progress.update(done, len(requests))
                before = ids
            alone.sort(key=lambda number: sum(map(len, pairs[number])))  # batches of similar lengths
            for first in range(0, len(alone), self.batch_size):
                numbers = alone[first : first + self.batch_size]
                batch = [pairs[number] for number in numbers]
                texts = [[*context, *continuation] for context, continuation in batch]
                starts = [len(context) for context, _ in batch]
                scores = score_texts(self.model, texts, starts, self.batch_size)
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = _summed(score)
                done += len(numbers)
                progress.update(done, len(requests))
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text behind <|endoftext|>, in windows of at most max_length."""
        found = []
        with Progress("scoring", unit="texts") as progress:
            for done, (text,) in enumerate(request.args for request in requests):
                # A window has max_length tokens. That includes the first, which is not predicted.
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length - 1, context_len=1
                )
                pairs = [make_disjoint_window(window) for window in windows]
                scores = score_texts(
                    self.model,
                    [context + predicted for context, predicted in pairs],
                    [len(context) for context, _ in pairs],
                    self.batch_size,
                )
                found.append(float(sum(score.logprobs.double().sum() for score in scores)))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
                progress.update(done + 1, len(requests))
        return found

    def _fitted(self, context: list[int], following: int) -> list[int]:
        """The end of a context that leaves room for what follows."""
        room = self.max_length - following
        if len(context) > room:
            self.truncated += 1
        return context[-room:]

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to a stop of the task, the end of text or max_gen_toks."""
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        with Progress("generating", unit="texts") as progress:
            for numbers in groups.values():
                settings, until = self._settings(requests[numbers[0]].args[1])
                numbers.sort(key=lambda number: len(contexts[number]))
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    prompts = [self._fitted(contexts[n], settings["max_new_tokens"]) for n in batch]
                    texts = self._continued(prompts, until, {**settings, "seed": self.seed + len(found)})
                    for number, text in zip(batch, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    progress.update(len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    def _settings(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A task's generation settings as this project's, and its stop texts."""
        given = dict(normalize_gen_kwargs(asked))
        until, tokens, do_sample = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        settings = {name: given.pop(name) for name in _SAMPLING if name in given}
        for name, value in settings.items():
            if not isinstance(value, int | float):
                raise InputError(f"{name}={shown(value)} in a task's generation settings must be a number")
        settings["temperature"] = float(settings.get("temperature", 1.0)) if do_sample else 0.0
        if given:
            say(f"note: left out of a task's generation settings: {', '.join(sorted(given))}")
        if not 1 <= tokens < self.max_length:
            raise InputError(
                f"max_gen_toks={tokens} must be from 1 to {self.max_length - 1}, below max_length; give "
                "--gen-kwargs max_gen_toks=N or --max-length N"
            )
        return {"max_new_tokens": tokens, **settings}, [text for text in until if text]

    def _continued(self, prompts: list[list[int]], until: list[str], settings: dict[str, Any]) -> list[str]:
        texts = [""] * len(prompts)
        stops = self.stop_ids | {
            self.qwen_tokenizer.special_ids[name] for name in until if name in STOP_TOKENS
        }
        streams = [TextStream((), self.qwen_tokenizer, stops, until) for _ in prompts]
        with contextlib.closing(generate_batch(self.model, prompts, **settings, stop_ids=stops)) as steps:
            for row_steps in steps:
                for row, (step, stream) in enumerate(zip(row_steps, streams, strict=True)):
                    if step is not None and stream.finish_reason is None:
                        texts[row] += stream.push(step)
                if all(stream.finish_reason is not None for stream in streams):
                    break
        return [
            text if stream.finish_reason is not None else text + stream.flush()
            for text, stream in zip(texts, streams, strict=True)
        ]


def _summed(scores: Scores) -> tuple[float, bool]:
    """What the harness wants of a continuation: log p of all of it, and whether it is the greedy one."""
    return float(scores.logprobs.double().sum()), bool(scores.likeliest.all())


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(some), len(others)))
