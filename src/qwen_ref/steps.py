"""What the generation loops do alike: check what is asked, choose tokens, end on all ranks at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from qwen_ref.config import LARGEST_LENGTH, InputError, whole, whole_numbers
from qwen_ref.launch import RankLost

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qwen_ref.model import Qwen
    from qwen_ref.parallel import Group

T = TypeVar("T")


class Step(NamedTuple):
    """One generated token and its log-probability under the model, before any sampling parameter acts."""

    token: int
    logprob: float


def check_settings(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int | None = None,
) -> None:
    """Raises ValueError where a setting of the loop is out of range."""
    from qwen_ref.sampling import check_parameters

    check_parameters(temperature, top_k, top_p, repetition_penalty)
    whole("max_new_tokens", max_new_tokens, most=LARGEST_LENGTH)
    if seed is not None:
        whole("seed", seed, least=0, most=2**63 - 1)


def checked_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    """The ids of a prompt, which may be any integers; ValueError for none, and outside the vocabulary."""
    ids = whole_numbers("a prompt", prompt)
    if not ids:
        raise InputError(
            "a prompt has no tokens; there is nothing to continue (<|endoftext|> alone starts a new text)"
        )
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise InputError(f"token id {outside[0]} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def checked_stop_ids(stop_ids: Iterable[int]) -> frozenset[int]:
    """The ids that end a text, from any collection or iterator; InputError for anything else."""
    return frozenset(whole_numbers("stop_ids", stop_ids))


def choose(
    model: Qwen,
    logits: Tensor | None,
    previous_ids: Tensor,
    live: Sequence[int],
    sampling: tuple[float, int, float, float],
    generators: Sequence[torch.Generator],
) -> list[Step]:
    """The next step of each live row: rank 0 draws it from its logits (B, V), every rank hears of it.

    previous_ids: (B, N), on the CPU. sampling: temperature, top_k, top_p and repetition_penalty.
    generators: one a row, none where the temperature is 0.
    All that the host learns of a step comes over in one transfer, which the device has to finish first.
    """
    import torch

    from qwen_ref.sampling import check_finite, overflow

    group, weight, problem = model.group, model.embed.weight, None
    wide = torch.promote_types(weight.dtype, torch.float32)
    drawn = torch.full((2, len(live)), torch.nan, dtype=wide, device=weight.device)
    if group.rank == 0:
        try:
            drawn = _draw(logits, previous_ids, live, sampling, generators)
        except Exception as error:  # lack of memory, say
            problem = error
    tokens, logprobs = group.from_rank_0(drawn).tolist()
    if any(map(math.isnan, logprobs)):
        with group.together():
            if problem is not None:
                raise problem
            if group.rank == 0:
                row = live[[*map(math.isnan, logprobs)].index(True)]
                check_finite(logits[row], f"row {row}: " if len(logits) > 1 else "")
                raise overflow(sampling[0], sampling[3])
    return list(map(Step, map(int, tokens), logprobs))


def _draw(
    logits: Tensor,
    previous_ids: Tensor,
    live: Sequence[int],
    sampling: tuple[float, int, float, float],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Tokens and their log-probabilities, (2, rows), of the live rows of logits (B, V); NaN: not finite.

    As floating-point numbers, in which every id up to 2^24 is exact. Nothing here waits for the device.
    """
    import torch

    from qwen_ref.sampling import distribution, scaled

    temperature, top_k, top_p, penalty = sampling
    if len(live) < len(logits):
        logits, previous_ids = logits[live], previous_ids[live]
    ready = scaled(logits, previous_ids.to(logits.device), temperature, penalty)
    finite = ready.isfinite().all(dim=-1)  # then the logits were, too
    probs = distribution(ready, temperature, top_k, top_p)
    if temperature == 0:
        tokens = probs.argmax(dim=-1)
    else:
        # A race: i is the first at an exponentially distributed time / p[i] with probability p[i]. This is
        # torch.multinomial's way, too, which waits for the device to check what it is given.
        times = torch.empty_like(probs)
        for row, time in zip(live, times, strict=True):
            time.exponential_(generator=generators[row])
        tokens = (probs / times.clamp_(min=torch.finfo(times.dtype).tiny)).argmax(dim=-1)
    logits = logits.to(probs.dtype)
    chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.stack((tokens.to(chosen.dtype), chosen.where(finite, torch.nan)))


def in_step(group: Group, steps: Iterator[tuple[T, bool]]) -> Generator[T]:
    """The steps of a loop that all ranks run alike; each comes with whether it is the last.

    Before each, the ranks agree to go on. When one rank's caller wants no more, its iterator is closed, at
    whatever step or before the first one, and all end.
    """

    def together() -> Generator[T | None]:
        last = False
        try:
            yield None  # see begun
            while not last and not group.any(False):
                step, last = next(steps)
                yield step
        except GeneratorExit:
            if not last:
                # ValueError: where the whole process ends, its process group may have ended before.
                with contextlib.suppress(RankLost, ValueError):
                    group.any(True)
            raise

    return begun(together())


def begun(generator: Generator[T | None]) -> Generator[T]:
    """A generator that stands in its body, at a first `yield` which is for that alone.

    Python never enters a generator that is closed before its first step: what its body has to do at the end
    would not be done.
    """
    next(generator)
    return generator
