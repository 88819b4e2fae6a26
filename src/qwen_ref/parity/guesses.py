"""Mistakes with a number in them: what a port's logits tell of it.

The size of a window, a chunk, a temperature, a penalty, a limit, a token that was put before the ids: each is
read off the port's logits, or tried in a range, and becomes a mistake like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen_ref.checkpoint import DTYPES
from qwen_ref.parity.forward import Change, Forward
from qwen_ref.parity.mistakes.attention import chunked, windowed
from qwen_ref.parity.mistakes.grammar import NONE, Mistake, Slip, made
from qwen_ref.parity.mistakes.rotation import decoded_moved, moved_alike, with_frequencies
from qwen_ref.parity.trials import Trials

_FEW = 160  # positions: up to here every size of a chunk or a window is tried
_SHIFTS = 160  # positions by which decode steps may be off
_FITTED = 2**25  # logits that a number is fitted to
_TOKENS = 4096  # a vocabulary in which every token is tried before the ids


def _further(by: int) -> Callable[[Forward, Tensor], Tensor]:
    return lambda run, at: at + by


def sizes(trials: Trials) -> Iterator[Mistake]:
    """Windows and chunks of every size that fits, and what an earlier prompt may have left behind."""
    T, prompt = trials.ids.shape[1], trials.theirs.prefill_length
    powers = [2**power for power in range(1, 15)]
    every = sorted({*range(2, min(T, _FEW)), *(size for size in powers if size < T)})
    windows = [Slip(f"attention sees a window of the last {size} keys", windowed(size)) for size in every]
    yield from (window.in_all() for window in windows)
    for size in every:
        if size >= prompt:
            break
        for text, hows in chunked(size).items():
            whole = text == "a chunk sees all of itself"
            yield Mistake(f"prefill in chunks of {size}: {text}", made(hows), whole=whole)
    if prompt < T:
        for by in range(-min(prompt, _SHIFTS), _SHIFTS + 1):
            if abs(by) > 2:
                way = "high" if by > 0 else "low"
                text = f"RoPE positions of decoded tokens {abs(by)} too {way}: those of an earlier prompt?"
                how = decoded_moved(_further(by))
                yield Mistake(text, made((("rotate_q", how), ("rotate_k", how))))
    if trials.config.use_logn_attn:
        for by in range(2, _SHIFTS + 1):
            text = f"positions counted from {by}, in RoPE and in LogN: those of an earlier prompt?"
            yield Mistake(text, made(moved_alike(by)))
    if trials.config.use_dynamic_ntk:
        for power in range(2, 8):
            alpha = 2**power - 1
            how = with_frequencies(alpha=lambda n, s, alpha=alpha: alpha)
            yield Mistake(
                f"NTK's α is {alpha}: that of another prompt?", made((("rotate_q", how), ("rotate_k", how)))
            )
    for layer in range(trials.config.num_hidden_layers):
        yield from (window.in_layer(layer) for window in windows)


# What is done to logits


Logits = Callable[[Tensor], Tensor]  # logits (B, T, V) in float64 → other ones


def _output(text: str, change: Logits, **options: Any) -> Mistake:
    def how(run: Forward, right: Callable, logits: Tensor) -> Tensor:
        return change(logits.double()).to(logits.dtype)

    return Mistake(text, (Change("output", how),), **options)


def _rolled(by: int) -> Logits:
    return lambda x: x.roll(-by, -1)


def _rounded(dtype: torch.dtype) -> Logits:
    return lambda x: x.to(dtype).double()


def _repetition(penalty: float, seen: Tensor) -> Logits:
    """seen: (1, T, V), True for the ids that came before."""
    return lambda x: torch.where(seen[:, : x.shape[1]], torch.where(x > 0, x / penalty, x * penalty), x)


def _lowered(by: Tensor) -> Logits:
    return lambda x: x - by[:, : x.shape[1]]


def leaving(trials: Trials) -> Iterator[Mistake]:
    """What is done to logits before they are handed over."""
    kept: list[Tensor] = []
    trials.run(NONE).run(lambda stage, value, start: kept.append(value), ["logits"])
    ours, theirs = kept[0], trials.theirs.stage("logits")
    V = theirs.shape[-1]
    fill, real = trials.theirs.fill, trials.theirs.real
    yield _output("log-softmax handed over as logits", lambda x: x.log_softmax(-1), common=True)
    yield _output("softmax handed over as logits: probabilities", lambda x: x.softmax(-1), common=True)
    yield _output("logits with their sign turned", lambda x: -x)
    yield _output("logits less the largest one", lambda x: x - x.amax(-1, keepdim=True))
    yield _output("logits less their mean", lambda x: x - x.mean(-1, keepdim=True))
    yield _output("sigmoid handed over as logits", torch.sigmoid)
    yield _output("exponentials handed over as logits", torch.exp)
    yield _output("logits divided by √D", lambda x: x / math.sqrt(trials.config.hidden_size))
    yield _output("logits normalised to unit length", lambda x: x / x.norm(dim=-1, keepdim=True))
    yield _output("logits of positions in reverse order", lambda x: x.flip(1), whole=True)
    yield _output("logits of the last position everywhere", lambda x: x[:, -1:].expand_as(x), whole=True)
    for by, whose in ((1, "one later"), (-1, "one earlier"), (2, "two later"), (-2, "two earlier")):
        if int(real.sum(dim=-1).min()) > 4 * abs(by):  # the ends fit anything
            yield _shifted(theirs, by, whose)
    for by, way in ((1, "one further on"), (-1, "one before")):
        yield _output(f"logits rolled: each id has that of the {way}", _rolled(by))
    for dtype in ("bfloat16", "float16"):
        yield _output(f"logits rounded to {dtype}", _rounded(DTYPES[dtype]), choice=True)

    # Some positions are enough to read a number off them.
    some = real.clone()
    some[:, max(_FITTED // (len(real) * V), 1) :] = False
    if not bool(some.any()):
        return
    o, t = ours[some][:, :V].double(), theirs[some].double()  # (tokens, V)
    if fill is not None:
        yield _filtered(theirs, fill)
        kept_ids = t != 0
    else:
        kept_ids = torch.ones_like(t, dtype=torch.bool)
    a, b = o[kept_ids], t[kept_ids]
    factor = float((a * b).sum() / a.square().sum())
    if factor > 0 and abs(factor - 1) > 1e-3:
        temperature = _short(1 / factor)
        yield _output(f"logits divided by a temperature of {temperature:g}", lambda x: x / temperature)
        shape = _short(factor)
        yield _output(f"logits times {shape:g}", lambda x: x * shape)
    if fill is not None:
        return
    yield from _limited(o, t)
    yield from _penalised(trials, o, t)


def _short(number: float) -> float:
    """A number with as few digits as it takes to be right to one part in a thousand."""
    if number == 0 or not math.isfinite(number):
        return number
    return next(
        short for digits in range(1, 8) if abs((short := float(f"{number:.{digits}g}")) / number - 1) < 1e-3
    )


def _shifted(theirs: Tensor, by: int, whose: str) -> Mistake:
    """Each position has another one's logits. What the positions at the end have cannot be known."""

    def how(run: Forward, right: Callable, logits: Tensor) -> Tensor:
        moved = logits.roll(-by, 1)
        ends = slice(logits.shape[1] - by, None) if by > 0 else slice(0, -by)
        at = theirs[:, : logits.shape[1]].to(logits.dtype)[:, ends]
        moved = moved.clone()
        moved[:, ends, : at.shape[-1]] = at
        return moved

    text = f"logits shifted: each position has those of the position {whose}"
    return Mistake(text, (Change("output", how),), common=True, whole=by > 0)


def _filtered(theirs: Tensor, fill: float) -> Mistake:
    """Only the largest logits of each position were left; the others are read as 0 (Bundle.fill)."""
    counts = (theirs != 0).sum(-1)  # (B, T)
    low, high = int(counts.min()), int(counts.max())

    def how(run: Forward, right: Callable, logits: Tensor) -> Tensor:
        cut = logits[..., : theirs.shape[-1]]
        ranks = cut.argsort(-1, descending=True).argsort(-1)
        left = ranks < counts[:, : logits.shape[1], None]
        return torch.cat((cut * left, logits[..., theirs.shape[-1] :]), dim=-1)

    what = f"top-k, k = {low}" if low == high else f"top-p or the like: {low} to {high} are left"
    return Mistake(f"logits filtered ({what}), the others are {fill:g}", (Change("output", how),))


def _limited(o: Tensor, t: Tensor) -> Iterator[Mistake]:
    largest = float(t.abs().max())
    if float((t.abs() == largest).double().mean()) > 2 / t.numel() and largest < float(o.abs().max()):
        yield _output(f"logits cut at ±{_short(largest):g}", lambda x: x.clamp(-largest, largest))

    def error(exponent: float) -> float:
        cap = math.exp(exponent)
        return float((cap * (o / cap).tanh() - t).square().mean())

    grid = [x / 4 for x in range(-4, 30)]
    best = min(grid, key=error)
    low, high = best - 0.25, best + 0.25
    for _ in range(40):  # golden section
        first, second = low + 0.382 * (high - low), low + 0.618 * (high - low)
        low, high = (low, second) if error(first) < error(second) else (first, high)
    cap = _short(math.exp((low + high) / 2))
    yield _output(f"logits capped: {cap:g} · tanh(logit / {cap:g})", lambda x: cap * (x / cap).tanh())


def _penalised(trials: Trials, o: Tensor, t: Tensor) -> Iterator[Mistake]:
    """Logits of ids that came before were lowered, as sampling does it."""
    T, V = trials.ids.shape[1], trials.config.vocab_size
    if len(trials.ids) > 1 or not bool(trials.theirs.real.all()) or T * V > 2 * _FITTED:
        return
    counts = torch.nn.functional.one_hot(trials.ids, V).double().cumsum(1)  # (1, T, V), own id counted
    for text, times in (
        ("", counts),
        (", its own not counted", counts.roll(1, 1).index_fill(1, torch.tensor([0]), 0)),
    ):
        number = times[0, : len(t), : t.shape[-1]]
        seen = number > 0
        if not bool(seen.any()):
            continue
        before, after, number = o[seen], t[seen], number[seen]
        both = (before > 0) & (after > 0)
        if bool(both.any()):
            penalty = _short(float((before[both] / after[both]).median()))
            if 0 < penalty < math.inf:
                yield _output(f"repetition penalty {penalty:g}{text}", _repetition(penalty, times > 0))
        for kind, weights in (("presence", (number > 0).double()), ("frequency", number)):
            penalty = float(((before - after) * weights).sum() / weights.square().sum())
            if abs(penalty) > 1e-6:
                penalty = _short(penalty)
                yield _output(
                    f"{kind} penalty {penalty:g}{text}",
                    _lowered(penalty * (times if kind == "frequency" else (times > 0).double())),
                )


# What stands before the ids


def inputs_before(trials: Trials) -> list[Mistake]:
    """The tokens that may stand before the ids: those that explain the logits of the first position best."""
    theirs = trials.theirs
    if "logits" not in theirs.stages or not bool(theirs.real.all()):
        return []
    V = trials.config.vocab_size
    special = [0, 1, 2, 3, V - 1, 151643, 151644, 151645, 151646]
    tokens = range(V) if V <= _TOKENS else [token for token in special if token < V]
    token = torch.tensor(list(tokens))
    weights = trials.weights(DTYPES[theirs.computed_in])
    judged = theirs.stage("logits")[0, 0].double()
    errors: dict[bool, list[Tensor]] = {False: [], True: []}
    with torch.inference_mode():
        for part in token.split(512):
            ids = torch.stack((part, trials.ids[0, :1].expand(len(part))), dim=1)
            run = Forward(weights, ids, None, 2, theirs.prefill_length + 1)
            x = run.start()
            for layer in range(trials.config.num_hidden_layers):
                x = run.block(x, layer)
            logits = run.finish(x)[..., : len(judged)].double()  # (tokens, 2, V)
            for first in errors:
                errors[first].append((logits[:, 0 if first else 1] - judged).square().sum(-1))
    found = []
    for first, each in errors.items():
        for number in token[torch.cat(each).argsort()[:3]].tolist():
            where = "first" if first else "last"
            text = f"token {number} put before the ids, logits of the {where} positions"
            found.append(Mistake(text, put_before=number, shown_first=first))
    return found
