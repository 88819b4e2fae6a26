"""The generation loop, and `python -m qwen_ref.generate`: a prompt and a checkpoint folder in, text out.

Prefill puts the whole prompt through the model in one pass and keeps its keys and values; then every token
costs one pass over a single position. torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.cli import (
    Parser,
    Progress,
    add_speed_options,
    bundled_checkpoint,
    read_prompt,
    run,
    say,
    speed_options,
    speed_up,
    utf8,
)
from qwen_ref.config import QwenConfig, check_cut, read_json_object, require_folder, shown
from qwen_ref.launch import TIMEOUT, Ranks, launched
from qwen_ref.lookup import DRAFT_TOKENS, GREEDY, LONGEST_MATCH, Passes, check_lookup, generate_lookup
from qwen_ref.steps import Step, check_settings, checked_ids, choose, in_step
from qwen_ref.streaming import TextStream
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Generator

    from qwen_ref.model import Qwen


def generate(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[Step]:
    """Yields the tokens that continue prompt_ids, one by one; a stop id is the last one yielded.

    temperature 0 is greedy; qwen_ref.sampling explains the others. The same seed gives the same tokens.
    Raises ValueError for an empty prompt, ids or parameters out of range, and a cache that does not fit.

    >>> ids = tokenizer.encode("冰岛的首都是")
    >>> tokenizer.decode(step.token for step in generate(model, ids, max_new_tokens=5))
    '雷克雅未克（R'
    """
    sampling = (temperature, top_k, top_p, repetition_penalty)
    rows = generate_batch(model, [prompt_ids], max_new_tokens, *sampling, seed, stop_ids)
    return (step for (step,) in rows if step is not None)


def generate_batch(
    model: Qwen,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[list[Step | None]]:
    """Continues prompts of any lengths together; yields a step for every row, None for rows that have ended.

    Row i is what `generate` yields for its prompt alone with seed + i: the batch changes its numbers by no
    more than rounding. Raises what `generate` raises.

    Several ranks call it alike and iterate alike. When one stops early, its iterator is closed and all end;
    an iterator that is kept must be closed before the model is used again.
    """
    import torch

    group = model.group
    with group.together():
        check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
        prompts = [checked_ids(prompt, model.config.vocab_size) for prompt in prompts]
        if not prompts:
            raise ValueError("there is no prompt to continue")
    stop_ids = frozenset(stop_ids)
    sampling = (temperature, top_k, top_p, repetition_penalty)
    B, longest = len(prompts), max(map(len, prompts))
    if group.size > 1:
        how = f"{temperature=}, {top_k=}, {top_p=}, {repetition_penalty=}, {seed=}"
        asked = {"the prompt": prompts, "sampling": how, "the end": (max_new_tokens, sorted(stop_ids))}
        group.require_same("this generation", asked)
    with group.together():
        cache = model.new_cache(B, longest + max_new_tokens - 1)  # the last token is never fed back
    device = model.embed.weight.device
    ids = torch.full((B, longest + max_new_tokens), -1, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt, dtype=torch.int64)
    mask = (ids[:, :longest] >= 0).long()
    generators = [_generator(device, None if seed is None else seed + row) for row in range(B)]
    ids, mask = ids.to(device), mask.to(device)

    def steps() -> Iterator[tuple[list[Step | None], bool]]:
        ended = [False] * B
        for n in range(longest, longest + max_new_tokens):
            with torch.inference_mode():
                if n == longest:
                    states = model.hidden_states(ids[:, :n].clamp(min=0), attention_mask=mask, cache=cache)
                else:
                    states = model.hidden_states(ids[:, n - 1 : n], cache=cache)
                # (B, V): of all positions only the last one's, of all ranks only rank 0
                logits = model.lm_head(states[:, -1], only_rank_0=True)
                tokens, logprobs = choose(model, logits, ids[:, :n], sampling, generators)
                ids[:, n] = tokens
            rows: list[Step | None] = []
            for row, step in enumerate(map(Step, tokens.tolist(), logprobs.tolist())):
                rows.append(None if ended[row] else step)
                ended[row] = ended[row] or step.token in stop_ids
            last = all(ended) or n + 1 == longest + max_new_tokens
            yield rows, last
            if last:
                return

    return in_step(group, steps())


def generate_uncached(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[Step]:
    """What `generate` yields, the obvious way: for every token, the whole text goes through the model again.

    It is the oracle of the cached loop, and what to read first. The cache that it makes anew each time only
    states the prompt's length, which fixes dynamic NTK's base for the whole text.
    """
    import torch

    check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    prompt_ids = checked_ids(prompt_ids, model.config.vocab_size)
    ids = torch.tensor([prompt_ids], device=model.embed.weight.device)
    generators, sampling = [_generator(ids.device, seed)], (temperature, top_k, top_p, repetition_penalty)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            cache = model.new_cache(1, ids.shape[1], prompt_length=len(prompt_ids))
            logits = model(ids, cache=cache)[:, -1]
            tokens, logprobs = choose(model, logits, ids, sampling, generators)
            ids = torch.cat((ids, tokens[:, None]), dim=1)
        yield Step(int(tokens), float(logprobs))
        if int(tokens) in stop_ids:
            return


def _generator(device: Any, seed: int | None) -> Generator:
    import torch

    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


# The command


class Defaults(NamedTuple):
    """What a folder's generation_config.json says; what it leaves out has the value that changes nothing."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]


def read_defaults(folder: Path, tokenizer: Tokenizer) -> Defaults:
    """The generation_config.json of a folder, which may lack one; ValueError, naming it, for wrong values."""
    path = folder / "generation_config.json"
    raw = read_json_object(path) if os.path.lexists(path) else {}
    try:
        return _defaults(raw, tokenizer)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def _defaults(raw: dict[str, Any], tokenizer: Tokenizer) -> Defaults:
    def value(name: str, default: Any, *kinds: type) -> Any:
        found = raw.get(name)
        if found is None:
            return default
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}={shown(found)} must be {wanted}")
        return found

    eos = value("eos_token_id", tokenizer.special_ids["<|endoftext|>"], int, list)
    words = [[token] for token in (eos if isinstance(eos, list) else [eos])]
    words += value("stop_words_ids", [], list)
    if value("chat_format", "raw", str) == "chatml":
        words += [[tokenizer.special_ids["<|im_start|>"]], [tokenizer.special_ids["<|im_end|>"]]]
    for word in words:
        ids = isinstance(word, list) and word and all(type(token) is int for token in word)
        if not ids or min(word) < 0 or max(word) >= tokenizer.n_vocab:
            allowed = f"ids from 0 to {tokenizer.n_vocab - 1}"
            raise ValueError(f"eos_token_id and stop_words_ids must hold {allowed}, not {shown(word)}")
    defaults = Defaults(
        max_new_tokens=value("max_new_tokens", 64, int),
        temperature=float(value("temperature", 1.0, int, float)) if value("do_sample", False, bool) else 0.0,
        top_k=value("top_k", 0, int),
        top_p=float(value("top_p", 1.0, int, float)),
        repetition_penalty=float(value("repetition_penalty", 1.0, int, float)),
        stop_ids=frozenset(word[0] for word in words if len(word) == 1),
        # A stop word of several ids is text that can also be spelled with other ids: it is matched as text.
        stop_texts=tuple(tokenizer.decode_bytes(word).decode("utf-8") for word in words if len(word) > 1),
    )
    check_settings(*defaults[:5])
    return defaults


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.generate",
        description="Continue a prompt with a first-generation Qwen checkpoint. "
        "The text goes to stdout, everything else to stderr.",
        epilog="Defaults come from the folder's generation_config.json; without one, decoding is greedy.",
    )
    add = parser.add_argument
    add(
        "prompt",
        type=utf8,
        nargs="?",
        help="the text to continue; - or nothing reads stdin (one newline at its end is dropped)",
    )
    add("--file", type=Path, help="read the prompt from this file (one newline at its end is dropped)")
    add(
        "--model",
        type=Path,
        help="checkpoint folder (default: the tiny trained one that comes with the project)",
    )
    add("--max-new-tokens", type=int, metavar="N", help="stop after N tokens")
    add("--temperature", type=float, metavar="T", help="0 is greedy; 1 samples the model's own distribution")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens; 0 is no limit")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach probability P")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens seen before less likely")
    add("--seed", type=int, help="the same seed gives the same text (default: a new one, printed)")
    add("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32 or float64")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …; under torchrun cuda: one for each rank")
    add_speed_options(parser)
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="under torchrun: when another rank is lost, end within S seconds; silence for half of that is "
        "loss (default: %(default)g)",
    )
    add(
        "--stop",
        type=utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add(
        "--lookup",
        nargs="?",
        type=_draft_tokens,
        const=DRAFT_TOKENS,
        metavar="N",
        help="after the prompt: guess up to N tokens a pass (default: %(const)s) from the text so far; "
        "the same greedy text in fewer passes where it repeats itself",
    )
    add(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in the prompt"
    )
    add("--logprobs", action="store_true", help="print a line per token: log-probability, id, text as JSON")
    add("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _draft_tokens(argument: str) -> int:
    try:
        return int(argument)
    except ValueError:
        message = f"{argument!r} is no number of tokens; a prompt goes before --lookup"
        raise argparse.ArgumentTypeError(message) from None


def _generate(args: argparse.Namespace) -> int:
    speed_options(args)
    folder = args.model or bundled_checkpoint()
    launch = launched()
    if launch is not None:
        check_cut(folder, launch.size)
    with Ranks(launch, args.timeout) as ranks:
        return _lead(args, folder, ranks) if ranks.rank == 0 else _follow(args, folder, ranks)


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """A rank that only computes: rank 0 reads the prompt, samples and prints."""
    request = json.loads(ranks.share(None))
    ranks.meet(args.device)

    from qwen_ref.checkpoint import load_model

    model = speed_up(load_model(folder, args.dtype, args.device, group="world"), args)
    for _ in _loop(model, request, Passes()):
        pass
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    require_folder(folder)
    prompt = read_prompt(args.prompt, args.file)
    config = QwenConfig.from_json(folder / "config.json")
    tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(
            f"{folder}: qwen.tiktoken has {tokenizer.n_vocab} ids, the model vocab_size={config.vocab_size}"
        )
    prompt_ids = tokenizer.encode(prompt, allowed_special="all" if args.allow_special else ())
    if not prompt_ids:
        raise ValueError("the prompt is empty; give it as an argument, with --file or on stdin")
    defaults = read_defaults(folder, tokenizer)
    settings = {
        name: getattr(defaults, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    }
    settings["seed"] = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    check_settings(**settings)
    stop_texts = (*defaults.stop_texts, *args.stop)
    if "" in stop_texts:
        raise ValueError("--stop is empty: it would end every text at once")
    request = {"prompt_ids": prompt_ids, **settings, "stop_ids": sorted(defaults.stop_ids)}
    if args.lookup is not None:
        _check_lookup(args, folder, settings)
        request["lookup"] = args.lookup
    ranks.share(json.dumps(request))
    ranks.meet(args.device)
    model = _load(args, folder, config, ranks)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    say(_describe(settings, sorted(defaults.stop_ids), stop_texts))
    length = len(prompt_ids) + settings["max_new_tokens"]
    if length > config.seq_length and not config.use_dynamic_ntk:
        say(
            f"note: {length} tokens exceed the {config.seq_length} that this model was trained on; "
            "the text beyond them will be worse"
        )

    clock, passes = _Clock(), Passes()
    # Closed by its end in any case: the other ranks are waiting for its next step.
    with contextlib.closing(_loop(model, request, passes)) as steps:
        watched = clock.watch(ranks.until_interrupted(steps))
        stream = TextStream(watched, tokenizer, defaults.stop_ids, stop_texts)
        text, code = _print_stream(stream, args, tokenizer)
    if args.json:
        report = {
            "prompt": prompt,
            "text": text,
            "finish_reason": stream.finish_reason or "interrupted",
            "tokens": [_token_report(step, tokenizer) for step in stream.steps],
            "settings": {"dtype": dtype, "device": args.device, **settings, "stop": list(stop_texts)},
            "prompt_tokens": len(prompt_ids),
            "prefill_tokens_per_second": clock.prefill_rate(len(prompt_ids)),
            "decode_tokens_per_second": clock.decode_rate(),
        }
        if args.lookup is not None:
            each = {"tokens_per_pass": passes.tokens_per_pass, "draft_tokens": args.lookup}
            report["lookup"] = {**dataclasses.asdict(passes), **each}
        print(json.dumps(report, ensure_ascii=False), flush=True)
    say(clock.report(len(prompt_ids)) + ("" if args.lookup is None else f"; {_passes_report(passes)}"))
    return code


def _loop(model: Qwen, request: dict[str, Any], passes: Passes) -> Iterator[Step]:
    """The loop that rank 0's command asks every rank for."""
    if "lookup" not in request:
        return generate(model, **request)
    names = ("prompt_ids", "max_new_tokens", "stop_ids", *GREEDY)
    settings = {name: request[name] for name in names}
    return generate_lookup(model, **settings, draft_tokens=request["lookup"], passes=passes)


def _check_lookup(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where --lookup cannot be, with where the other settings come from and the remedy."""
    check_lookup(LONGEST_MATCH, args.lookup)
    wrong = [name for name, greedy in GREEDY.items() if settings[name] != greedy]
    if wrong:
        config = folder / "generation_config.json"
        there = [
            f"{name}={settings[name]:g}" + ("" if getattr(args, name) is not None else f" (from {config})")
            for name in wrong
        ]
        remedy = [f"--{name.replace('_', '-')} {GREEDY[name]:g}" for name in wrong]
        raise ValueError(f"--lookup is greedy only, without {' and '.join(there)}; add {' '.join(remedy)}")


def _passes_report(passes: Passes) -> str:
    repeated = f" ({passes.repeated} of them repeated for close calls)" if passes.repeated else ""
    each = f"{passes.tokens_per_pass:.1f} tokens per pass"
    return f"lookup: {passes.tokens} tokens in {passes.passes} passes{repeated}, {each}"


def _load(args: argparse.Namespace, folder: Path, config: QwenConfig, ranks: Ranks) -> Qwen:
    """The model, or rank 0's part of it, with word of what is read and what came of it."""
    from qwen_ref.checkpoint import load_model, tensor_table
    from qwen_ref.sizes import resident_bytes

    start = time.perf_counter()
    with Progress("loading") as progress:

        def update(done: int, total: int) -> None:
            if done == 0 and ranks.size > 1:
                say(f"each of {ranks.size} ranks reads {total / 1e9:.3f} GB of the checkpoint")
            progress.update(done, total)

        group = "world" if ranks.size > 1 else None
        model = load_model(folder, args.dtype, args.device, group, progress=update)
    speed_up(model, args)
    seconds = time.perf_counter() - start
    name = args.model or "the tiny checkpoint that comes with the project"
    count = sum(math.prod(spec.shape) for spec in tensor_table(config))
    size = resident_bytes(model)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    each = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
    form = args.quantize or dtype
    say(
        f"{name}: {count:,} parameters, {size / 1e9:.3f} GB of {form}{each} on {args.device} "
        f"in {seconds:.2f} s"
    )
    return model


def _print_stream(stream: TextStream, args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, int]:
    """Prints as the options ask while the stream runs; the whole text and the exit code."""
    text, code = "", 0
    characters = steps = 0  # printed

    def show() -> None:
        nonlocal characters, steps
        # What is to be printed counts as printed before it is: Ctrl-C in between must not print it twice.
        new_text, characters = text[characters:], len(text)
        new_steps, steps = stream.steps[steps:], len(stream.steps)
        if args.json:
            return
        if not args.logprobs:
            print(new_text, end="", flush=True)
            return
        for step in new_steps:
            token = _token_report(step, tokenizer)
            quoted = json.dumps(token["text"], ensure_ascii=False)
            print(f"{token['logprob']:.6f}\t{token['id']}\t{quoted}", flush=True)

    try:
        for piece in stream:
            text += piece
            show()
    except KeyboardInterrupt:
        text, code = text + stream.flush(), 130
    show()
    if not args.json and not args.logprobs:
        print(flush=True)
    return text, code


def _token_report(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([step.token]) if step.token < tokenizer.n_vocab else "\ufffd"
    return {"id": step.token, "text": text, "logprob": step.logprob}


def _describe(settings: dict[str, Any], stop_ids: list[int], stop_texts: Sequence[str]) -> str:
    s = settings
    how = (
        "greedy"
        if s["temperature"] == 0
        else "temperature {temperature:g}, top-k {top_k}, top-p {top_p:g}, seed {seed}"
    )
    parts = [how.format(**s), f"at most {s['max_new_tokens']} new tokens"]
    if s["repetition_penalty"] != 1:
        parts.append(f"repetition penalty {s['repetition_penalty']:g}")
    stops = [*map(str, stop_ids), *map(repr, stop_texts)]
    parts.append(
        f"stop at {', '.join(stops[:8])}" + (f" and {len(stops) - 8} more" if len(stops) > 8 else "")
    )
    return "; ".join(parts)


class _Clock:
    """Times the steps of a generation: the first is the prefill, each later one a decoded token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        self.times = [time.perf_counter()]
        for step in steps:
            self.times.append(time.perf_counter())
            yield step

    def prefill_rate(self, prompt_tokens: int) -> float | None:
        return prompt_tokens / (self.times[1] - self.times[0]) if len(self.times) > 1 else None

    def decode_rate(self) -> float | None:
        return (len(self.times) - 2) / (self.times[-1] - self.times[1]) if len(self.times) > 2 else None

    def report(self, prompt_tokens: int) -> str:
        prefill, decode = self.prefill_rate(prompt_tokens), self.decode_rate()
        parts = [
            f"prefill {prompt_tokens} tokens"
            + (f", {prefill:,.1f} tokens/s" if prefill else ", not finished")
        ]
        if decode:
            parts.append(f"decode {len(self.times) - 1} tokens, {decode:,.1f} tokens/s")
        return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), _generate, arguments)


if __name__ == "__main__":
    sys.exit(main())
