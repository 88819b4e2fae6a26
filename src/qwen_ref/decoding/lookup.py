"""Several tokens a pass without a second model: what followed the last tokens before may follow them again.

A pass of the model over 1 + n tokens reads the weights once, as a pass over one does, and reading them is
what decoding waits for. So n tokens are guessed, and one pass judges them all: position t scores the token
after t, so a guess is right where it is what the position before it chooses. The right ones are kept, then
the model's own next token; the cache goes back to before the first wrong one. This is speculative decoding
(Leviathan et al. 2023, section 2) in its greedy form. The guesses come from the text itself: prompt lookup
decoding (Saxena 2023). That pays where text repeats text: summaries, corrections, code, and a model that
goes round in circles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_ref.config import InputError, whole
from qwen_ref.generate import Sampling, Step, check_settings, checked_ids, checked_stop_ids, choose, in_step

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.model import Qwen

LONGEST_MATCH, DRAFT_TOKENS = 3, 8
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}  # what lookup needs of the sampling parameters

# How far ahead the best logit must be for a pass over several tokens to be believed: by dtype's bits, in
# units of eps · the largest |logit| of the position.
#
# Such a pass adds in another order than passes over one token, and so do the keys and values that it leaves
# in the cache; the choice stays where the best logit's lead over every other is more than what that lead
# moves by. Measured with 2 to 17 tokens a pass, all behind a prompt of 10, over 300 positions, on the tiny
# checkpoint and the golden models: a logit moves by up to 36 units in float32 and float64, 4.1 in float16
# and 2.7 in bfloat16; the lead over the runner-up by up to 14 in float32 and 2.7 in float16 and bfloat16,
# by 0.5 in the root mean square. There depth counts, since each layer's sums are rounded to 16 bits: with
# random weights, 64 layers and bfloat16 it moved by up to 3.7 (over other close logits 4.4), by 1.0 in the
# root mean square, and the largest lead that was lost was 1.8. Hence 6 in 16 bits. In the wide dtypes a
# margin costs nothing: 100 is 7 times what was measured.
MARGIN = {16: 6.0, 32: 100.0, 64: 100.0}


@dataclass
class Passes:
    """What a generation took: its tokens so far, and its passes through the model, the prompt's among them.

    The plain loop takes a pass a token. `repeated` passes, counted in `passes`, were for tokens that a pass
    over several had seen already: see generate_lookup.
    """

    tokens: int = 0
    passes: int = 0
    repeated: int = 0

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
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    passes: Passes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Yields the tokens of greedy `generate`, one by one, mostly in fewer passes through the model.

    longest_match: how many of the last ids are looked up, then fewer, down to one.
    draft_tokens: how many are guessed at most.
    passes: counts while the iteration runs.
    progress: as `generate`'s.

    The tokens are those of `generate` as long as rounding moves no lead by more than MARGIN, which is
    measured, not proven, and on the CPU alone. Where a lead is smaller, all since the last such place is
    computed once more, token by token: then what decides, the cache included, has the bits of the plain
    loop. (A single pass on the cache as it is would not do: its logits were measured to be off by half as
    much as those of a pass over several tokens, or more.) So a close call costs all that was gained since
    the last one. float32 has next to none. In bfloat16, where the margin is 5 % of the largest logit, they
    are frequent in text of which the model is not sure: then the guessing pauses, for longer each time, lest
    the whole take many more passes than the plain loop.
    None of this concerns fast layers, in which a pass over up to nine tokens has the bits of passes over one:
    what is guessed right is gained in any dtype.
    Log-probabilities are those of the pass that decided: they differ from `generate`'s by rounding.

    Raises what `generate` raises, and ValueError for a temperature or a repetition_penalty (it would change
    with every guess), which are here for that alone. Several ranks call it alike, as they do `generate`.
    """
    import torch

    from qwen_ref.fast.attention import FastCache
    from qwen_ref.fast.matrices import FEW_ROWS
    from qwen_ref.generate import in_chunks

    group = model.group
    with group.together():
        check_settings(max_new_tokens, Sampling(temperature, repetition_penalty=repetition_penalty))
        if (temperature, repetition_penalty) != tuple(GREEDY.values()):
            raise InputError(
                f"lookup is greedy only: {temperature=} must be 0 and {repetition_penalty=} must be 1"
            )
        check_lookup(longest_match, draft_tokens)
        prompt_ids = checked_ids(prompt_ids, model.config.vocab_size)
        stop_ids = checked_stop_ids(stop_ids)
    if group.size > 1:
        how, end = f"{longest_match=}, {draft_tokens=}", (max_new_tokens, sorted(stop_ids))
        group.require_same("this generation", {"the prompt": prompt_ids, "lookup": how, "the end": end})
    full = len(prompt_ids) + max_new_tokens
    with group.together():
        cache = model.new_cache(1, full - 1)  # as the plain loop's: the last token is never fed back
    text, count = Text(prompt_ids, longest_match), Passes() if passes is None else passes
    exact = 0  # so many positions of the cache have the bits of the plain loop's
    if alike := isinstance(cache, FastCache):  # so have passes over several tokens
        draft_tokens = min(draft_tokens, FEW_ROWS - 1)

    def states_of(ids: Sequence[int]) -> Tensor:
        count.passes += 1
        told = progress if cache.length == 0 else None
        for chunk in in_chunks(model, torch.tensor([ids], device="cpu"), cache, progress=told):
            states = chunk
        return states  # (1, T, D); of a long prompt its last chunk

    def plain() -> list[Step]:
        """The next token, decided as the plain loop decides it; what is not exact yet is computed again."""
        nonlocal exact
        cache.length = exact
        parts = [[token] for token in text.ids[exact:]] if exact else [text.ids]
        for ids in parts:
            last = states_of(ids)[:, -1]
        exact = cache.length
        logits = model.lm_head(last, only_rank_0=True)
        # The penalty of 1 asks for no earlier ids.
        return choose(model, logits, torch.tensor([ids], device="cpu"), [0], Sampling(), [])

    def judged(draft: list[int]) -> tuple[list[Step], bool]:
        """The right ones of draft and the model's next token; False where a close call ends them sooner."""
        nonlocal exact
        logits = model.lm_head(states_of([text.ids[-1], *draft])[0], only_rank_0=True)  # (1 + n, V)
        steps = _sure_steps(model, logits, 1 + len(draft), alike)
        right = 0
        while right < len(draft) and steps[right].token == draft[right]:
            right += 1
        cache.length -= len(draft) - right  # the wrong ones' keys and values are overwritten next
        sure = steps[right].token >= 0
        if alike:
            exact = cache.length if sure else cache.length - 1  # NaN of a wrong guess reaches the others
        return steps[: right + sure], sure

    def steps() -> Iterator[tuple[Step, bool]]:
        sure = False  # the prompt goes first, plainly
        pause, resume = draft_tokens, 0
        while True:
            draft = []
            if sure and len(text.ids) >= resume:
                # No further than one short of the end, as the pass adds a token: so it fits the cache, too.
                draft = text.draft(min(draft_tokens, full - 1 - len(text.ids)))
            with torch.inference_mode():
                if not sure and exact:  # a close call
                    count.repeated += len(text.ids) - exact
                    pause, resume = 2 * pause, len(text.ids) + pause
                if not sure or (not draft and exact == len(text.ids) - 1):
                    found, sure = plain(), True
                else:
                    found, sure = judged(draft)
            for step in found:
                text.append(step.token)
                count.tokens += 1
                last = step.token in stop_ids or len(text.ids) == full
                yield step, last
                if last:
                    return

    return in_step(group, steps())


def check_lookup(longest_match: int, draft_tokens: int) -> None:
    """Raises ValueError where a setting of the lookup is out of range."""
    whole("longest_match", longest_match)
    whole("draft_tokens", draft_tokens)


def _sure_steps(model: Qwen, logits: Tensor | None, T: int, alike: bool) -> list[Step]:
    """What each of T positions chooses, by rank 0's logits (T, V), on every rank; token −1 where it is close.

    alike: the logits have the bits of the plain loop's, and nothing that is finite is close.

    Logits that are not finite lead by nothing, so the plain pass decides, and says what is wrong: they may be
    due to a wrong guess, which the plain loop never sees.
    """
    import torch

    like = model.embed.weight
    found = torch.zeros(2, T, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if logits is not None:
        wide = logits.to(found.dtype)
        best, ids = wide.topk(2, dim=-1)  # (T, 2)
        info = torch.finfo(like.dtype)
        margin = MARGIN[info.bits] * info.eps * wide.abs().amax(dim=-1)
        tokens = ids[:, 0].where(best[:, 0] - best[:, 1] > margin, -1)
        if alike:
            first = torch.cat([row.argmax(dim=-1) for row in wide.split(1)])  # as the loop does, ties too
            tokens = first.where(wide.isfinite().all(dim=-1), -1)
        found = torch.stack((tokens.to(wide.dtype), best[:, 0] - wide.logsumexp(dim=-1)))
    tokens, logprobs = model.group.from_rank_0(found).tolist()
    return list(map(Step, map(int, tokens), logprobs))


class Text:
    """Ids so far, and where each run of 1 to longest_match of them was last followed by another.

    An id costs longest_match entries of a dict, and a draft as many look-ups, however long the text is.

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
        """Up to limit ids that may come next; none where even the last id is new.

        The longest match says most about what follows. Of several the most recent is taken: it is nearer in
        what the text is about, such as the current version of a line that is written again and again. It may
        overlap what it predicts, and is then continued with itself, as in LZ77 (Ziv and Lempel 1977).
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
