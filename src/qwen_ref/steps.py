"""What the generation loops do alike: check what is asked, choose tokens, end on all ranks at once."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from qwen_ref.config import InputError
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
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} must be from 0 to 2**63 - 1")


def checked_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    """The ids of a prompt, which may be any integers; ValueError for none, and outside the vocabulary."""
    try:
        ids = [operator.index(token) for token in prompt]
    except TypeError as error:
        raise InputError(f"a prompt must be a list of token ids: {error}") from None
    if not ids:
        raise InputError(
            "a prompt has no tokens; there is nothing to continue (<|endoftext|> alone starts a new text)"
        )
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise InputError(f"token id {outside[0]} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def choose(
    model: Qwen,
    logits: Tensor | None,
    previous_ids: Tensor,
    sampling: tuple[float, int, float, float],
    generators: list[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Tokens (B) and their log-probabilities (B): rank 0 draws them from its logits, every rank has them."""
    import torch

    B, group, problem = len(previous_ids), model.group, None
    tokens = previous_ids.new_full((B,), -1)
    logprobs = torch.zeros(B, dtype=torch.promote_types(model.embed.weight.dtype, torch.float32))
    logprobs = logprobs.to(previous_ids.device)
    if group.rank == 0:
        try:
            tokens, logprobs = _draw(logits, previous_ids, sampling, generators)
        except Exception as error:  # logits that are not finite, say
            problem = error
    tokens = group.from_rank_0(tokens)
    if tokens[0] < 0:
        with group.together():
            if problem is not None:
                raise problem
    return tokens, group.from_rank_0(logprobs)


def _draw(
    logits: Tensor,
    previous_ids: Tensor,
    sampling: tuple[float, int, float, float],
    generators: list[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Tokens (B) drawn from logits (B, V), a generator a row, and their log-probabilities (B).

    sampling: temperature, top_k, top_p and repetition_penalty.
    """
    import torch

    from qwen_ref.sampling import probabilities

    probs = probabilities(logits, previous_ids, *sampling)
    if sampling[0] == 0:
        tokens = probs.argmax(dim=-1)
    else:
        draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(probs, generators, strict=True)]
        tokens = torch.cat(draws)
    wide = logits.to(probs.dtype)
    chosen = wide.gather(1, tokens[:, None])[:, 0]
    return tokens, chosen - wide.logsumexp(dim=-1)


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
