"""The generation loop: token ids of a prompt in, one token after another out.

`generate_uncached` is the loop in its plainest form, and the one to read first: the whole text goes through
the model for every new token. `generate` gives the same tokens faster, with a cache of the keys and values of
all positions. Greedy, and without checks, padding, stop ids and ranks, it is:

    new = prompt  # (1, T)
    for _ in range(max_new_tokens):
        logits = model.lm_head(prefill(model, new, cache))  # (1, V); computes only the positions in new
        new = logits.argmax(dim=-1, keepdim=True)  # (1, 1)

`generate_batch` does the same for several prompts at once; `generate` is a batch of one.
"""

from __future__ import annotations

if __name__ == "__main__":  # python -m qwen_ref.generate
    from qwen_ref.commands.generate import main

    raise SystemExit(main())

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qwen_ref.config import LARGEST_LENGTH, InputError, shown, whole, whole_numbers
from qwen_ref.model import KVCache, Qwen
from qwen_ref.parallel import Group, RankLost
from qwen_ref.sampling import check_finite, check_parameters, distribution, overflow, scaled

CHUNK = 1024  # tokens in one pass: products of matrices have their full speed, activations stay small
Progress = Callable[[int, int], None]
Generators = Sequence[torch.Generator]
Item = TypeVar("Item")


class Step(NamedTuple):
    """One generated token and its log-probability: log-softmax of the logits, without sampling settings."""

    token: int
    logprob: float


class Sampling(NamedTuple):
    """How a token is chosen from its logits: see sampling.py. Temperature 0 is greedy and draws nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: a new one each time


def generate_uncached(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    stop_ids: Iterable[int] = (),
    **sampling: Any,
) -> Generator[Step]:
    """Yields what `generate` yields, in the obvious way. The cached loop is tested against it.

    Nothing is kept from one pass to the next. Each pass has a new cache, only because a cache tells the model
    the length of the prompt, by which dynamic NTK chooses its base.
    """
    how = Sampling(**sampling)
    (prompt,), ends = _checked(model, [prompt_ids], max_new_tokens, how, stop_ids)
    generators = _generators(model, 1, how)

    def steps() -> Iterator[tuple[Step, bool]]:
        ids = torch.tensor([prompt], device="cpu")  # (1, T)
        for n in range(1, max_new_tokens + 1):
            with torch.inference_mode():
                cache = model.new_cache(1, ids.shape[1], prompt_length=len(prompt))
                logits = model(ids, cache=cache)[:, -1]  # (1, V): of the token that follows the text
                (step,) = choose(model, logits, ids, [0], how, generators)
                ids = torch.cat((ids, torch.tensor([[step.token]], device="cpu")), dim=1)  # (1, T + 1)
            yield step, step.token in ends or n == max_new_tokens

    return in_step(model.group, steps())


def generate(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Iterable[int] = (),
    cache: KVCache | None = None,
    progress: Progress | None = None,
) -> Generator[Step]:
    """Yields the tokens that continue prompt_ids, one by one. It ends after a stop id, which is yielded, too.

    temperature 0 is greedy; qwen_ref.sampling explains the others. The same seed gives the same tokens.
    cache: empty, or with the first tokens of prompt_ids, not all of them; with room for the rest and the new
    tokens. Only the rest is computed. At the end the cache holds all but the last token yielded. Dynamic
    NTK's α stays that of the cache's first prompt (decoding.PrefixCache starts again if α changes).
    progress: called after each chunk of the rest of the prompt: tokens computed, tokens to compute in all.
    Raises ValueError for an empty prompt, ids or parameters out of range, and a cache that does not fit.

    >>> ids = tokenizer.encode("冰岛的首都是")
    >>> tokenizer.decode(step.token for step in generate(model, ids, max_new_tokens=5))
    '雷克雅未克（R'
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)._asdict()
    rows = generate_batch(model, [prompt_ids], max_new_tokens, stop_ids, cache, progress, **sampling)

    def single() -> Generator[Step | None]:
        with contextlib.closing(rows):
            yield None  # see begun
            for (step,) in rows:
                yield step

    return begun(single())


def generate_batch(
    model: Qwen,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int = 64,
    stop_ids: Iterable[int] = (),
    cache: KVCache | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> Generator[list[Step | None]]:
    """Continues prompts of any lengths together; yields a step for every row, None for rows that have ended.

    Up to rounding, row i gets the steps that `generate` yields for its prompt alone with seed + i. If the
    cache is not empty, it holds the first tokens of each prompt, with the padding that these prompts need.
    Raises what `generate` raises.

    With several ranks, every rank makes the same calls and takes the same steps. When one rank closes its
    iterator, the iterators of all ranks end. Close an iterator that you keep before you use the model again.
    """
    how = Sampling(**sampling)
    rows, ends = _checked(model, prompts, max_new_tokens, how, stop_ids, cache)
    B, longest = len(rows), max(map(len, rows))
    end = longest + max_new_tokens
    if cache is None:
        with model.group.together():
            cache = model.new_cache(B, end - 1)  # the last token is never fed back
    ids = torch.full((B, end), -1, device="cpu")  # -1: no token
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt, device="cpu")
    mask = (ids[:, :longest] >= 0).long()
    # Fills padding and places after a row's end: the row's own first token, so that no other can spoil it.
    fillers = torch.tensor([prompt[:1] for prompt in rows], device="cpu")  # (B, 1)
    generators = _generators(model, B, how)
    cache.text_end, start = None, cache.length

    def steps() -> Iterator[tuple[list[Step | None], bool]]:
        live, held = list(range(B)), start
        for n in range(longest, end):
            if cache.length != held:
                raise InputError("the cache was used elsewhere meanwhile; it serves one generation at a time")
            with torch.inference_mode():
                new = ids[:, held:n]  # at first the prompt, then the last token
                new = new.where(new >= 0, fillers)
                told = progress if n == longest else None
                last = prefill(model, new, cache, mask if held == 0 else None, progress=told)  # (B, D)
                logits = model.lm_head(last, only_rank_0=True)  # (B, V) on rank 0, which samples; else None
                found = choose(model, logits, ids[:, :n], live, how, generators)
            chosen = dict(zip(live, found, strict=True))
            for row, step in chosen.items():
                ids[row, n] = step.token
            live, held = [row for row, step in chosen.items() if step.token not in ends], n
            if len(live) < B and cache.text_end is None:
                cache.text_end = n + 1  # a row's last token is at n; what comes after it is filler
            yield [chosen.get(row) for row in range(B)], not live or n + 1 == end

    return in_step(model.group, steps())


def in_chunks(
    model: Qwen,
    input_ids: Tensor,
    cache: KVCache,
    attention_mask: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Computes T tokens (B, T) after those in the cache; yields the hidden states of each chunk, (B, t, D).

    A pass holds the activations of all its tokens at once: half a megabyte per token at the 72B's widths. So
    long prompts are cut into chunks. The result is the same up to rounding: queries see all that is cached,
    and dynamic NTK's α is that of the whole text.
    attention_mask: (B, T), only if the cache is empty and rows begin with padding.
    chunk: tokens per pass, of all rows together; each row gets at least one.
    progress: called after each chunk with the number of positions done, and with T.
    """
    (B, T), done = input_ids.shape, 0
    if attention_mask is None and cache.length == 0:
        attention_mask = torch.ones_like(input_ids)  # it also says how long the whole text is, which fixes α
    while done < T:
        end = min(done + max(chunk // B, 1), T)
        states = model.hidden_states(input_ids[:, done:end], attention_mask, cache)
        attention_mask, done = None, end
        if progress is not None:
            progress(done, T)
        yield states


def prefill(
    model: Qwen, ids: Tensor, cache: KVCache, mask: Tensor | None = None, progress: Progress | None = None
) -> Tensor:
    """Puts tokens (B, T) into the cache, in chunks; returns the hidden states of the last position, (B, D).

    >>> last = prefill(model, ids, model.new_cache(1, 32768))
    >>> model.lm_head(last)  # (B, V): the logits of the next token
    """
    for states in in_chunks(model, ids, cache, mask, progress=progress):
        last = states[:, -1]
    return last


def choose(
    model: Qwen, logits: Tensor | None, ids: Tensor, live: list[int], how: Sampling, generators: Generators
) -> list[Step]:
    """The next step of each live row: rank 0 draws it from its logits (B, V), then every rank is told.

    ids: all so far (B, N), on the CPU. generators: one a row, none where the temperature is 0.
    Tokens and log-probabilities come to the CPU in one transfer, which waits for the device.
    """
    group, weight, problem = model.group, model.embed.weight, None
    wide = torch.promote_types(weight.dtype, torch.float32)
    drawn = torch.full((2, len(live)), torch.nan, dtype=wide, device=weight.device)
    logits = logits if group.rank == 0 else None
    if logits is not None:
        try:
            drawn = _draw(logits, ids, live, how, generators)
        except Exception as error:  # lack of memory, say
            problem = error
    tokens, logprobs = group.from_rank_0(drawn).tolist()
    if not_finite := [row for row, logprob in zip(live, logprobs, strict=True) if math.isnan(logprob)]:
        with group.together():
            if problem is not None:
                raise problem
            if logits is not None:
                check_finite(logits[not_finite[0]], f"row {not_finite[0]}: " if len(logits) > 1 else "")
                raise overflow(how.temperature, how.repetition_penalty)
    return list(map(Step, map(int, tokens), logprobs))


def _draw(logits: Tensor, ids: Tensor, live: list[int], how: Sampling, generators: Generators) -> Tensor:
    """For the live rows of logits (B, V): tokens and log-probabilities, (2, rows). NaN: logits not finite.

    Tokens are floating-point numbers here: float32 holds every id up to 2^24. Nothing waits for the device.
    """
    if len(live) < len(logits):
        logits, ids = logits[live], ids[live]
    ready = scaled(logits, ids.to(logits.device), how.temperature, how.repetition_penalty)
    finite = ready.isfinite().all(dim=-1)  # True only if the logits are finite, too
    probs = distribution(ready, how.temperature, how.top_k, how.top_p)
    if how.temperature == 0:
        tokens = probs.argmax(dim=-1)
    else:
        # Each token gets a random exponential time. With probability p[i], token i has the smallest time / p,
        # so the largest p / time. torch.multinomial does the same, but waits for the device to check p.
        times = torch.empty_like(probs)
        for row, time in zip(live, times, strict=True):
            time.exponential_(generator=generators[row])
        tokens = (probs / times.clamp_(min=torch.finfo(times.dtype).tiny)).argmax(dim=-1)
    logits = logits.to(probs.dtype)
    chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.stack((tokens.to(chosen.dtype), chosen.where(finite, torch.nan)))


def _generators(model: Qwen, rows: int, how: Sampling) -> list[torch.Generator]:
    """One generator for each row, so that a row draws the same as it would alone; none if greedy."""
    made = [torch.Generator(model.embed.weight.device) for _ in range(rows if how.temperature > 0 else 0)]
    for row, generator in enumerate(made):
        generator.manual_seed(generator.seed() if how.seed is None else (how.seed + row) % 2**63)
    return made


def _checked(
    model: Qwen,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    how: Sampling,
    stop_ids: Iterable[int],
    cache: KVCache | None = None,
) -> tuple[list[list[int]], frozenset[int]]:
    """The prompts and the stop ids. ValueError where something is out of range, or differs between ranks."""
    with model.group.together():
        check_settings(max_new_tokens, how)
        rows = [checked_ids(prompt, model.config.vocab_size) for prompt in prompts]
        if not rows:
            raise InputError("there is no prompt to continue")
        if cache is not None:
            _check_room(cache, [len(prompt) for prompt in rows], max_new_tokens)
        ends = checked_stop_ids(stop_ids)
    asked: dict[str, Any] = {"the prompt": rows, "sampling": how, "the end": (max_new_tokens, sorted(ends))}
    asked["what the cache holds"] = None if cache is None else cache.length
    model.group.require_same("this generation", asked)
    return rows, ends


def check_settings(max_new_tokens: int, how: Sampling) -> None:
    """Raises ValueError where a setting of the loop is out of range."""
    check_parameters(*how[:4])
    whole("max_new_tokens", max_new_tokens, most=LARGEST_LENGTH)
    if how.seed is not None:
        whole("seed", how.seed, least=0, most=2**63 - 1, hint=" (None: a new one each time)")


def checked_ids(prompt: Iterable[int], vocab_size: int) -> list[int]:
    """The ids of a prompt as Python ints. ValueError if it is empty or an id is outside the vocabulary."""
    ids = whole_numbers("a prompt", prompt)
    if not ids:
        raise InputError("a prompt has no tokens to continue (<|endoftext|> alone starts a new text)")
    if outside := [token for token in ids if not 0 <= token < vocab_size]:
        raise InputError(f"token id {outside[0]} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def checked_stop_ids(stop_ids: Iterable[int]) -> frozenset[int]:
    """The ids that end a text, from any collection or iterator; ValueError for anything else."""
    return frozenset(whole_numbers("stop_ids", stop_ids))


def _check_room(cache: KVCache, lengths: list[int], max_new_tokens: int) -> None:
    """Raises ValueError where a caller's cache cannot take prompts of these lengths."""
    B, held, longest = len(lengths), cache.length, max(lengths)
    needed, wanted = longest + max_new_tokens - 1, [longest - length for length in lengths]
    padding = [0] * B if cache.padding is None else cache.padding.tolist()
    if needed > cache.max_length or cache.batch_size != B:
        has = f"{B} × {needed} positions are needed, the cache has {cache.batch_size} × {cache.max_length}"
        raise InputError(f"{has}; make it with a larger max_length or the right batch_size")
    if held >= longest:
        more = f"the longest prompt has {longest} tokens: a prompt must begin with these and go on"
        raise InputError(f"the cache holds {held} positions, {more}")
    if cache.text_end is not None and held > cache.text_end:
        ended = f"a row of this cache ended after {cache.text_end} positions, and the cache holds {held}"
        raise InputError(f"{ended}: set its length to {cache.text_end} or less, or use a new cache")
    if held > 0 and padding != wanted:
        begin = f"the rows of the cache begin with padding of {shown(padding)} positions, these prompts"
        raise InputError(f"{begin} would need {shown(wanted)}: continue all alike, or use a new cache")


def in_step(group: Group, steps: Iterator[tuple[Item, bool]]) -> Generator[Item]:
    """Yields the steps of a loop that every rank runs; `steps` gives (step, True if it is the last one).

    Before each step the ranks agree to go on. If one rank's iterator is closed, all of them end.
    """

    def together() -> Generator[Item | None]:
        last = False
        try:
            yield None  # see begun
            while not last and not group.any(False):
                step, last = next(steps)
                yield step
        except GeneratorExit:
            if not last and group.size > 1:
                # ValueError: when the whole process ends, its process group may be gone already.
                with contextlib.suppress(RankLost, ValueError):
                    group.any(True)
            raise

    return begun(together())


def begun(generator: Generator[Item | None]) -> Generator[Item]:
    """Runs a generator up to its first `yield None`, which is there only for this.

    If a generator is closed before its first step, Python never enters it: no `with` or `except` in it acts.
    """
    next(generator)
    return generator  # type: ignore[return-value]  # the one None has been taken
