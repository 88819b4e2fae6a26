"""Several tokens in one pass, without a second model: what once followed the last tokens is guessed again.

In decoding, a pass of the model waits for its weights, which it reads once however many tokens it computes.
So n tokens are guessed, and one pass over 1 + n tokens checks them all: position t scores the token after t,
and a guess is right if it is what the position before it chooses. The right guesses are kept, then the
model's own next token; the cache goes back to before the first wrong one. This is speculative decoding
(Leviathan et al. 2023, section 2) in its greedy form. The guesses come from the text itself: prompt lookup
decoding (Saxena 2023). That pays where text repeats text: summaries, corrections, code, and a model that
repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_ref.checkpoint import dtype_name
from qwen_ref.config import InputError, whole
from qwen_ref.fast.attention import FastCache
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.matrices import FEW_ROWS
from qwen_ref.generate import (
    Sampling,
    Step,
    check_settings,
    checked_ids,
    checked_stop_ids,
    choose,
    in_chunks,
    in_step,
)
from qwen_ref.model import KVCache, Qwen

LONGEST_MATCH, DRAFT_TOKENS = 3, 8

# How far the best logit must lead for a plain pass over several tokens to be believed: in units of
# eps · the largest |logit| of the position.
#
# Such a pass adds in another order than passes over one token. Measured with 2 to 17 tokens a pass, all
# behind a prompt of 10, over 300 positions, on the tiny checkpoint and the golden models, in float32 and
# float64: a logit moves by up to 36 units, the lead over the runner-up by up to 14. 100 is 7 times that.
MARGIN = 100.0


@dataclass
class Passes:
    """What a generation took: its tokens so far, and its passes through the model, the prompt's among them.

    The plain loop takes one pass for each token.
    """

    tokens: int = 0
    passes: int = 0

    def __str__(self) -> str:
        each = f"{self.tokens_per_pass:.1f} tokens per pass"
        return f"lookup: {self.tokens} tokens in {self.passes} passes, {each}"

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(self.passes, 1)


def generate_lookup(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    stop_ids: Collection[int] = (),
    *,
    longest_match: int = LONGEST_MATCH,
    draft_tokens: int = DRAFT_TOKENS,
    passes: Passes | None = None,
    cache: KVCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Step]:
    """Yields the tokens of greedy `generate`, one by one, in fewer passes through the model.

    longest_match: how many of the last ids are looked up, then fewer, down to one.
    draft_tokens: how many tokens are guessed at most.
    passes: counts while the iteration runs.
    cache, progress: as `generate`'s.

    Two kinds of models are taken, and each gives the tokens of `generate` for its own reason.

    Fast models (see qwen_ref.fast), in any dtype: a pass over up to nine tokens has the bits of passes over
    one token. So a longer draft is cut to eight.

    Plain models in float32 and float64: a pass over several tokens rounds differently. The choice is the same
    where the best logit leads by more than MARGIN. A smaller lead, a close call, is rare. Then everything
    since the last pass that had the plain loop's bits is computed again, token by token, and the choice is
    the plain loop's. MARGIN is measured on the CPU, not proven.

    Log-probabilities are those of the pass that decided. In plain models they differ from `generate`'s by
    rounding.

    Raises what `generate` raises, and ValueError for all other models (see check_model). Several ranks call
    it alike, as they do `generate`.
    """
    group = model.group
    with group.together():
        check_settings(max_new_tokens, Sampling())
        check_model(model.embed.weight.dtype, model.cache_type)
        whole("longest_match", longest_match)
        whole("draft_tokens", draft_tokens)
        prompt_ids = checked_ids(prompt_ids, model.config.vocab_size)
        stop_ids = checked_stop_ids(stop_ids)
        needed = len(prompt_ids) + max_new_tokens - 1  # the last token is never fed back
        if cache is not None and not (cache.batch_size == 1 and cache.length < len(prompt_ids)):
            raise InputError("the cache must be of one row and hold fewer tokens than the prompt")
        if cache is not None and cache.max_length < needed:
            raise InputError(f"{needed} positions are needed, the cache has {cache.max_length}")
    if group.size > 1:
        how, end = f"{longest_match=}, {draft_tokens=}", (max_new_tokens, sorted(stop_ids))
        asked = {"the prompt": prompt_ids, "lookup": how, "the end": end}
        group.require_same("this generation", {**asked, "what the cache holds": cache and cache.length})
    if cache is None:
        with group.together():
            cache = model.new_cache(1, needed)
    text, count, start = Text(prompt_ids, longest_match), Passes() if passes is None else passes, cache.length
    cache.text_end = None
    full = needed + 1
    exact = 0  # the first `exact` positions of the cache have the plain loop's bits; 0: before the first pass
    fast = isinstance(cache, FastCache)
    if fast:
        draft_tokens = min(draft_tokens, FEW_ROWS - 1)

    def states_of(ids: Sequence[int]) -> Tensor:
        """(1, T, D); of a long prompt its last chunk."""
        count.passes += 1
        told = None if exact else progress
        *_, states = in_chunks(model, torch.tensor([ids], device="cpu"), cache, progress=told)
        return states

    def plain() -> list[Step]:
        """The next token, from passes with the plain loop's bits; what is not exact yet is computed again."""
        nonlocal exact
        cache.length = max(exact, start)
        for ids in [[token] for token in text.ids[exact:]] if exact else [text.ids[start:]]:
            last = states_of(ids)[:, -1]
        exact = cache.length
        logits = model.lm_head(last, only_rank_0=True)
        # The penalty of 1 asks for no earlier ids.
        return choose(model, logits, torch.tensor([ids], device="cpu"), [0], Sampling(), [])

    def judged(draft: list[int]) -> list[Step]:
        """The right guesses and the model's next token, up to the first close choice."""
        nonlocal exact
        logits = model.lm_head(states_of([text.ids[-1], *draft])[0], only_rank_0=True)  # (1 + n, V)
        steps = _sure_steps(model, logits, 1 + len(draft), fast)
        right = 0
        while right < len(draft) and steps[right].token == draft[right]:
            right += 1
        taken = right + (steps[right].token >= 0)
        cache.length -= 1 + len(draft) - taken  # what is not taken is overwritten by the next pass
        if fast:
            exact = cache.length
        return steps[:taken]

    def steps() -> Iterator[tuple[Step, bool]]:
        while True:
            # No further than one short of the end, as the pass adds a token: so it fits the cache, too.
            draft = text.draft(min(draft_tokens, full - 1 - len(text.ids))) if exact else []
            with torch.inference_mode():
                found = [] if not exact or (not draft and exact == len(text.ids) - 1) else judged(draft)
                found = found or plain()  # the prompt goes first, plainly
            for step in found:
                text.append(step.token)
                count.tokens += 1
                last = step.token in stop_ids or len(text.ids) == full
                yield step, last
                if last:
                    return

    return in_step(group, steps())


def check_model(dtype: torch.dtype, cache_type: type[KVCache]) -> None:
    """Raises ValueError for a model in which passes over several tokens round too differently.

    In plain bfloat16 close calls are frequent: computing them again made 100 tokens of the tiny checkpoint
    take 108 to 118 passes (five prompts). An int8 cache rounds keys and values again: if one of them falls to
    another step, logits move by far more than MARGIN.
    """
    if issubclass(cache_type, FastCache):
        return
    if issubclass(cache_type, Int8Cache):
        raise InputError(
            "lookup does not go with an int8 cache, which rounds a pass over several tokens differently; "
            "leave --kv-cache out"
        )
    if dtype.itemsize < 4:
        raise InputError(
            f"lookup in plain {dtype_name(dtype)} would take more passes than it saves: a pass over several "
            "tokens rounds differently there, and too many choices would be computed again; use float32, or "
            "faster layers (--fast or --quantize), which round alike"
        )


def _sure_steps(model: Qwen, logits: Tensor | None, T: int, fast: bool) -> list[Step]:
    """The choice at each of T positions, from rank 0's logits (T, V), on every rank; token −1 if it is close.

    fast: the logits have the bits of the plain loop's, and only those that are not finite count as close.

    Logits that are not finite may be due to a wrong guess, which the plain loop never sees. The plain pass
    decides there, and says what is wrong if it is not finite either.
    """
    like = model.embed.weight
    found = torch.zeros(2, T, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if logits is not None:
        wide = logits.to(found.dtype)
        best = wide.topk(2, dim=-1).values  # (T, 2)
        lead, sure = best[:, 0] - best[:, 1], wide.isfinite().all(dim=-1)
        if not fast:
            sure &= lead > MARGIN * torch.finfo(like.dtype).eps * wide.abs().amax(dim=-1)
        tokens = torch.cat([row.argmax(dim=-1) for row in wide.split(1)])  # as the loop does, ties too
        found = torch.stack((tokens.where(sure, -1).to(wide.dtype), best[:, 0] - wide.logsumexp(dim=-1)))
    tokens, logprobs = model.group.from_rank_0(found).tolist()
    return list(map(Step, map(int, tokens), logprobs))


class Text:
    """Ids so far, and where each run of 1 to longest_match of them was last followed by another.

    Each id takes longest_match entries of a dict, and each draft as many look-ups, however long the text is.

    >>> Text([1, 2, 3, 7, 1, 2], longest_match=3).draft(3)
    [3, 7, 1]
    """

    def __init__(self, ids: Iterable[int], longest_match: int) -> None:
        self.ids: list[int] = []
        self._longest_match = longest_match
        self._followed: dict[tuple[int, ...], int] = {}  # a run → the position after its last occurrence
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        # Runs are entered only now that something follows them: the last ids never find themselves.
        for run in self._last_runs():
            self._followed[run] = len(self.ids)
        self.ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to limit ids that may come next; none if even the last id is new.

        The longest match says most about what follows. Of equally long ones the most recent is taken: it is
        most likely what the text is still about, such as the current version of a line that is written again
        and again. The match may overlap what it predicts: then it repeats, as in LZ77 (Ziv and Lempel 1977).
        """
        for run in self._last_runs():
            start = self._followed.get(run)
            if start is not None:
                period = len(self.ids) - start
                return [self.ids[start + n % period] for n in range(limit)]
        return []

    def _last_runs(self) -> Iterator[tuple[int, ...]]:
        """The last ids, the longest run first."""
        for length in range(min(self._longest_match, len(self.ids)), 0, -1):
            yield tuple(self.ids[-length:])
