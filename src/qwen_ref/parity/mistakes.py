"""What ports of Qwen get wrong: a grammar of changes to the steps of the forward pass (forward.py).

People make the same few slips at every place: a step left out, done twice, done before its neighbour, with
another one's weight, transposed, with its sign turned, off by one, by half, with the wrong constant, or with
one of its relatives. A Slip is such a change to some steps. A slip may be made in all layers or in one, so
each becomes many mistakes. Mistakes are independent: two can be made in one run.

A choice is no mistake: a rounding that a port may decide to do, such as a KV cache in 8 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_ref import model
from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Change, Forward, How, copies

ALL = ("qkv", "out", "gate", "up", "down")  # a layer's matrices
_BEFORE = ("ids", "positions", "frequencies", "layers", "source")
_AFTER = ("norm", "logits", "output")


@dataclass(frozen=True)
class Mistake:
    """One mistake, or one choice: what it is, in words, and the steps that it changes."""

    text: str
    changes: tuple[Change, ...] = ()
    # Ports that compute in half precision usually do this: there it is rounding and no mistake.
    usual_in_half: bool = False
    choice: bool = False  # a rounding that is nobody's mistake
    sized: bool = False  # nothing but the rounding of `dtype`: it is judged by the size of the error
    dtype: str | None = None  # the dtype to compute in, if it is another
    common: bool = False  # tried in all layers at once, and in pairs
    whole: bool = False  # what it does to a position depends on later ones
    uncached: bool = False  # every decode step computes all positions again
    put_before: int | None = None  # a token before the ids; logits of the last T positions
    shown_first: bool = False  # with such a token: those of the first T

    def span(self, layers: int) -> tuple[int, int]:
        """The first and the last layer that it changes; -1 before them, `layers` after them."""
        first, last = layers, -1
        for step, _, where in self.changes:
            if step in _BEFORE:
                return 0, layers - 1
            if step == "embed":
                first = -1
            elif step in _AFTER:
                last = layers
            elif where is None:
                first, last = min(first, 0), max(last, layers - 1)
            else:
                first, last = min(first, *where), max(last, *where)
        if self.dtype or self.uncached or self.put_before is not None:
            return 0, layers - 1
        return (first, max(first, last)) if self.changes else (0, layers - 1)


@dataclass(frozen=True)
class Slip:
    """A change that can be made in all layers or in one."""

    text: str
    hows: tuple[tuple[str, How], ...]
    common: bool = False
    usual_in_half: bool = False
    choice: bool = False
    whole: bool = False
    alone: bool = True  # also tried in single layers

    def in_all(self) -> Mistake:
        return self._in(None, self.text)

    def in_layer(self, layer: int) -> Mistake:
        return replace(self._in(frozenset((layer,)), f"{self.text}, in layer {layer} only"), common=False)

    def _in(self, layers: frozenset[int] | None, text: str) -> Mistake:
        changes = tuple(Change(step, how, layers) for step, how in self.hows)
        return Mistake(text, changes, self.usual_in_half, self.choice, common=self.common, whole=self.whole)


def slip(text: str, steps: str, how: How, **options: Any) -> Slip:
    """One change to several steps, separated by blanks."""
    return Slip(text, tuple((step, how) for step in steps.split()), **options)


known = functools.partial(slip, common=True)


def mistakes(config: QwenConfig) -> list[Mistake]:
    """Every mistake and choice that is the same in all layers, or outside of them."""
    layered = [each.in_all() for each in slips(config)]
    found = [*layered, *_outside(config), *_inputs(config), *_precisions(config)]
    needs = {"LogN": config.use_logn_attn, "NTK": config.use_dynamic_ntk}
    return [
        mistake
        for mistake in found
        if all(used or name not in mistake.text or "though" in mistake.text for name, used in needs.items())
    ]


def in_single_layers(config: QwenConfig, layers: Iterable[int]) -> Iterator[Mistake]:
    """Every slip in each of these layers alone."""
    needs = {"LogN": config.use_logn_attn, "NTK": config.use_dynamic_ntk}
    for each in slips(config):
        if each.alone and all(used for name, used in needs.items() if name in each.text):
            for layer in layers:
                yield each.in_layer(layer)


@functools.lru_cache(maxsize=4)
def slips(config: QwenConfig) -> tuple[Slip, ...]:
    """Every slip within a layer, the commonest first."""
    return (*_rotation(config), *_logn(config), *_ntk(config), *_norms(config), *_matrices(config),
            *_attention(config), *_mlp(config), *_residual(config), *_anywhere())  # fmt: skip


# Rotation


def _turned(tables: Callable[[Forward], tuple[Tensor, Tensor]]) -> How:
    """Rotation with other cosines and sines. They are made once a run."""

    def how(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if tables not in run.made:
            run.made[tables] = tables(run)
        return right(x, *(copies(table, len(x)) for table in run.made[tables]))

    return how


def _moved(move: Callable[[Forward], Tensor]) -> How:
    return _turned(lambda run: run.tables(move(run)))


def _frequencies(
    run: Forward,
    base: float | None = None,
    alpha: Callable[[int, int], float] = model.ntk_alpha,
    exponents: Callable[[Tensor, int], Tensor] = lambda i, K: i / K,
    power: Callable[[int], float] = lambda K: K / (K - 2),
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """rotary_frequencies with other parts: i are 0, 2, 4, …"""
    config, K = run.config, run.config.kv_channels
    powers = exponents(torch.arange(0, K, 2, dtype=run.wide), K)
    rows = []
    for length in run.lengths if lengths is None else lengths:
        this = config.rotary_emb_base if base is None else base
        if config.use_dynamic_ntk:
            this *= alpha(length, config.seq_length) ** power(K)
        rows.append(1.0 / this**powers)
    return torch.stack(rows)


def with_frequencies(**parts: Any) -> How:
    return _turned(lambda run: run.tables(run.positions, _frequencies(run, **parts)))


def rope_base(base: float) -> tuple[tuple[str, How], ...]:
    """The change to another rotary_emb_base."""
    how = with_frequencies(base=base)
    return ("rotate_q", how), ("rotate_k", how)


def _decoded(run: Forward, positions: Tensor) -> Tensor:
    """True where a position (1 or B, T) was a decode step."""
    return (torch.arange(positions.shape[1]) >= run.prefill_length)[None]


def decoded_moved(by: Callable[[Forward, Tensor], Tensor]) -> How:
    """Decode steps are rotated by other positions."""
    return _moved(lambda run: torch.where(_decoded(run, run.positions), by(run, run.positions), run.positions))


def _interleaved(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _unsigned(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _of_head(share: float, own: bool, last: bool = False) -> How:
    """Rotates a share of the head's dimensions. own: with frequencies of a head of that size."""

    def how(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        K = x.shape[-1]
        size = max(int(K * share) // 2 * 2, 2)
        if own:
            cos, sin = run.tables(run.positions, _frequencies(run, exponents=lambda i, K: i[: size // 2] / size))
        else:
            cos, sin = cos[..., : size // 2], sin[..., : size // 2]
        cos, sin = copies(cos, len(x)), copies(sin, len(x))
        if last:
            return torch.cat((x[..., :-size], right(x[..., -size:], cos, sin)), dim=-1)
        return torch.cat((right(x[..., :size], cos, sin), x[..., size:]), dim=-1)

    return how


def _of_heads(first: bool) -> How:
    def how(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, half = right(x, cos, sin), x.shape[2] // 2
        parts = (turned, x) if first else (x, turned)
        return torch.cat((parts[0][:, :, :half], parts[1][:, :, half:]), dim=2)

    return how


def _narrow_angles(run: Forward) -> tuple[Tensor, Tensor]:
    # Both in bfloat16, so that their product and its cosines and sines are bfloat16, too.
    cos, sin = run.tables(run.positions.bfloat16(), run.frequencies.bfloat16())
    return cos.to(run.wide), sin.to(run.wide)


def _narrow_tables(dtype: torch.dtype) -> How:
    return lambda run, right, x, cos, sin: right(x, cos.to(dtype).to(cos.dtype), sin.to(dtype).to(sin.dtype))


def _rotation(config: QwenConfig) -> Iterator[Slip]:
    both = "rotate_q rotate_k"
    unturned: How = lambda run, right, x, cos, sin: x
    yield known("interleaved RoPE: neighbours (2i, 2i + 1) turned together, not halves", both, _interleaved)
    for base in (1e4, 1e5, 5e5, 1e6, 1e7):
        if base != config.rotary_emb_base:
            yield Slip(f"RoPE base {base:g} for {config.rotary_emb_base:g}", rope_base(base), common=True)
    # Nobody can see it but for its rounding: only differences of positions count.
    yield known("RoPE positions counted from 1", both, _moved(lambda run: run.positions + 1), choice=True)
    moved: dict[str, Callable[[Forward, Tensor], Tensor]] = {
        "one too high": lambda run, at: at + 1,
        "one too low": lambda run, at: at - 1,
        "all 0": lambda run, at: torch.zeros_like(at),
    }
    for text, by in moved.items():
        yield known(f"RoPE positions of decoded tokens {text}", both, decoded_moved(by))
    decoded: dict[str, Callable[[Forward, Tensor], Tensor]] = {
        "begin again at 0": lambda run, at: at - run.prefill_length,
        "begin again at 1": lambda run, at: at - run.prefill_length + 1,
        "stay at the first one's": lambda run, at: torch.full_like(at, run.prefill_length),
        "stay at the prompt's last": lambda run, at: torch.full_like(at, run.prefill_length - 1),
        "two too high": lambda run, at: at + 2,
    }
    for text, by in decoded.items():
        yield slip(f"RoPE positions of decoded tokens {text}", both, decoded_moved(by))
    ahead = _moved(lambda run: run.positions + 1)
    yield known("queries rotated one position ahead of keys", "rotate_q", ahead)
    yield known("keys rotated one position ahead of queries", "rotate_k", ahead)
    yield known("RoPE in bfloat16: positions, frequencies and angles", both, _turned(_narrow_angles))
    yield known(
        "RoPE in bfloat16: the inverse frequencies",
        both,
        _turned(lambda run: run.tables(run.positions, run.frequencies.bfloat16().to(run.wide))),
    )
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        text = f"RoPE in {name}: cosines and sines"
        yield known(text, both, _narrow_tables(dtype), usual_in_half=True)
    yield slip("RoPE in float16: the inverse frequencies", both,
               _turned(lambda run: run.tables(run.positions, run.frequencies.half().to(run.wide))))  # fmt: skip
    yield known("no RoPE", both, unturned)
    yield slip("RoPE on keys only: queries not rotated", "rotate_q", unturned)
    yield slip("RoPE on queries only: keys not rotated", "rotate_k", unturned)
    yield slip("RoPE on v as well", "v", lambda run, right, v: model.rotate(
        v, copies(run.cos, len(v)), copies(run.sin, len(v))))  # fmt: skip
    yield slip("RoPE done twice", both, lambda run, right, x, cos, sin: right(right(x, cos, sin), cos, sin))
    turned_back: How = lambda run, right, x, cos, sin: right(x, cos, -sin)
    yield slip("RoPE with the angle's sign turned", both, turned_back)
    yield slip("RoPE with the angle's sign turned, in queries only", "rotate_q", turned_back)
    yield slip("RoPE with the angle's sign turned, in keys only", "rotate_k", turned_back)
    yield slip("RoPE with cosine and sine swapped", both, lambda run, right, x, cos, sin: right(x, sin, cos))
    yield slip("RoPE without the minus: x₁ cos + x₂ sin", both, _unsigned)
    for share, name in ((0.5, "half"), (0.25, "a quarter"), (0.75, "three quarters")):
        yield slip(f"RoPE on {name} of the head's dimensions, with its frequencies", both, _of_head(share, True))
        yield slip(f"RoPE on {name} of the head's dimensions, with the head's", both, _of_head(share, False))
    yield slip("RoPE on the last half of the head's dimensions", both, _of_head(0.5, True, last=True))
    yield slip("RoPE on the first half of the heads only", both, _of_heads(True))
    yield slip("RoPE on the last half of the heads only", both, _of_heads(False))
    scaled = {"doubled": 2.0, "halved": 0.5, "quartered": 0.25, "divided by 8": 0.125, "times 4": 4.0}
    for text, factor in scaled.items():
        how = _turned(lambda run, factor=factor: run.tables(run.positions * factor))
        yield slip(f"RoPE positions {text}", both, how)
    yield slip("RoPE positions counted from the end", both,
               _moved(lambda run: run.positions.max() - run.positions), whole=True)  # fmt: skip
    exponents: dict[str, Callable[[Tensor, int], Tensor]] = {
        "i/K for 2i/K": lambda i, K: i / 2 / K,
        "4i/K for 2i/K": lambda i, K: 2 * i / K,
        "2i/D for 2i/K": lambda i, K: i / config.hidden_size,
        "2i/(K − 2) for 2i/K": lambda i, K: i / (K - 2),
        "(2i + 2)/K for 2i/K": lambda i, K: (i + 2) / K,
        "(2i + 1)/K for 2i/K": lambda i, K: (i + 1) / K,
        "in reverse order": lambda i, K: i.flip(0) / K,
        "2i/K with its sign turned": lambda i, K: -i / K,
    }
    for text, powers in exponents.items():
        yield slip(f"RoPE frequencies with exponent {text}", both, with_frequencies(exponents=powers))
    yield slip("RoPE frequencies times 2π", both,
               _turned(lambda run: run.tables(run.positions, run.frequencies * 2 * math.pi)))  # fmt: skip


# LogN and NTK

_LOG2, _LOG10 = 1 / math.log(2), 1 / math.log(10)


def _factors(table: Callable[[Forward], Tensor]) -> How:
    """Queries times other factors (1 or B, T)."""
    return lambda run, right, q, factors: right(q, copies(table(run), len(q)))


def _logn_table(
    run: Forward,
    factor: Callable[[Tensor, int], Tensor],
    clamp: bool = True,
    seq_length: Callable[[int], int] = lambda n: n,
) -> Tensor:
    """factor: of the number of positions (1 or B, T), float64, and of the trained length."""
    length, count = seq_length(run.config.seq_length), run.positions.double() + 1
    found = factor(count, length)
    return (torch.where(count > length, found, 1.0) if clamp else found).to(run.dtype)


def _log_ratio(count: Tensor, length: int) -> Tensor:
    return count.log() / math.log(length)


def _positions_from_1(run: Forward) -> Tensor:
    return run.logn(run.positions + 1)


def _log_shifted(by: int) -> How:
    return _factors(lambda run: run.logn(run.positions + by))


def _keys_scaled(run: Forward, right: Callable, x: Tensor) -> Tensor:
    return x if run.factors is None else x * copies(run.factors, len(x))[..., None, None]


def moved_alike(by: int) -> tuple[tuple[str, How], ...]:
    """All positions are so many further on, in RoPE and in LogN."""
    ahead = _moved(lambda run: run.positions + by)
    return ("rotate_q", ahead), ("rotate_k", ahead), ("scale_q", _factors(lambda run: run.logn(run.positions + by)))


def _logn(config: QwenConfig) -> Iterator[Slip]:
    unscaled: How = lambda run, right, q, factors: q
    yield known("no LogN", "scale_q", unscaled)
    yield Slip(
        "LogN on keys instead of queries", (("scale_q", unscaled), ("keys", _keys_scaled)), common=True
    )
    yield known("LogN on keys and queries", "keys", _keys_scaled)
    ratios: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
        "log10 of the position over the natural logarithm of the length": (
            lambda n, s: _log_ratio(n, s) * _LOG10, True),
        "natural logarithm of the position over log10 of the length": (
            lambda n, s: _log_ratio(n, s) / _LOG10, True),
        "log2 of the position over the natural logarithm of the length": (
            lambda n, s: _log_ratio(n, s) * _LOG2, False),
        "natural logarithm of the position over log2 of the length": (
            lambda n, s: _log_ratio(n, s) / _LOG2, False),
        "the square root of the position over the length": (lambda n, s: (n / s).sqrt(), False),
        "the root of the ratio of logarithms": (lambda n, s: _log_ratio(n, s).sqrt(), False),
        "the ratio itself, without logarithms": (lambda n, s: n / s, False),
        "1 + the logarithm of position over length": (lambda n, s: 1 + (n / s).log(), False),
        "the ratio of logarithms turned round": (lambda n, s: 1 / _log_ratio(n, s), False),
        "done twice": (lambda n, s: _log_ratio(n, s) ** 2, False),
        "logarithms of 1 + n": (lambda n, s: n.log1p() / math.log1p(s), False),
    }  # fmt: skip
    for text, (ratio, common) in ratios.items():
        how = _factors(functools.partial(_logn_table, factor=ratio))
        yield slip(f"LogN: {text}", "scale_q", how, common=common)
    yield known("LogN off by one: log(p) for 0-based positions p", "scale_q", _log_shifted(-1))
    yield known("LogN off by one: log(p + 2) for 0-based positions p", "scale_q", _log_shifted(1))
    ahead = _moved(lambda run: run.positions + 1)
    yield Slip(
        "positions counted from 1, in RoPE and in LogN",
        (("rotate_q", ahead), ("rotate_k", ahead), ("scale_q", _factors(_positions_from_1))),
        common=True,
    )
    yield slip("LogN within the trained length as well", "scale_q",
               _factors(functools.partial(_logn_table, factor=_log_ratio, clamp=False)))  # fmt: skip
    yield slip("LogN of the prompt's length for every position", "scale_q",
               _factors(lambda run: run.logn(torch.full_like(run.positions, run.prompt_length - 1))))  # fmt: skip
    yield slip("LogN of the whole length for every position", "scale_q", _factors(
        lambda run: run.logn(torch.full_like(run.positions, run.T - 1))), whole=True)  # fmt: skip
    yield slip("LogN on v as well", "values", _keys_scaled)
    yield slip("LogN: the table in bfloat16", "scale_q", _factors(lambda run: run.factors.bfloat16().to(run.dtype)))
    yield slip("LogN: the table in float16", "scale_q", _factors(lambda run: run.factors.half().to(run.dtype)))
    yield slip("LogN in decode steps only", "scale_q", _factors(
        lambda run: torch.where(_decoded(run, run.positions), run.factors, 1.0).to(run.dtype)))  # fmt: skip
    yield slip("LogN in the prompt only", "scale_q", _factors(
        lambda run: torch.where(_decoded(run, run.positions), 1.0, run.factors).to(run.dtype)))  # fmt: skip
    lengths = {2 * config.seq_length, config.seq_length // 2, 2048, 8192, 32768} - {config.seq_length}
    for length in sorted(length for length in lengths if length > 1):
        text = f"LogN with seq_length {length} for {config.seq_length}"
        table = functools.partial(_logn_table, factor=_log_ratio, seq_length=lambda _, n=length: n)
        yield slip(text, "scale_q", _factors(table))
    if not config.use_logn_attn:
        table = functools.partial(_logn_table, factor=_log_ratio)
        yield slip("LogN though use_logn_attn is false", "scale_q", _factors(table), alone=False)


def _floor_alpha(length: int, seq_length: int) -> int:
    return max(2 ** math.floor(math.log2(length / seq_length) + 1) - 1, 1)


def _each_step(run: Forward) -> tuple[Tensor, Tensor]:
    """Each decode step's own α, in its query and its key."""
    rows = len(run.lengths)
    prompt = run.frequencies[:, None].expand(rows, run.prefill_length, -1)
    pads = [0] * rows if run.padding is None else run.padding.tolist()
    steps = range(run.prefill_length, run.T)
    later = [_frequencies(run, lengths=[end + 1 - pad for end in steps]) for pad in pads if steps]
    frequencies = torch.cat((prompt, torch.stack(later)), dim=1) if steps else prompt  # (B, T, K/2)
    angles = (run.positions[:, :, None] * frequencies)[:, :, None]
    return angles.cos(), angles.sin()


def _ntk(config: QwenConfig) -> Iterator[Slip]:
    both, s = "rotate_q rotate_k", config.seq_length
    if not config.use_dynamic_ntk:
        how = _turned(lambda run: run.tables(run.positions, model.rotary_frequencies(
            replace(run.config, use_dynamic_ntk=True), run.lengths, run.wide)))  # fmt: skip
        yield slip("NTK though use_dynamic_ntk is false", both, how, alone=False)
        return
    yield known("NTK off: α stays 1", both, with_frequencies(alpha=lambda n, s: 1))
    yield known("NTK with floor for ceil", both, with_frequencies(alpha=_floor_alpha))
    yield known(
        "NTK's α recomputed at every decode step, older keys as they were", both, _turned(_each_step)
    )
    log = lambda n, s: math.log2(n / s)  # noqa: E731
    alphas: dict[str, Callable[[int, int], float]] = {
        "round for ceil": lambda n, s: max(2 ** round(log(n, s) + 1) - 1, 1),
        "no rounding up": lambda n, s: max(2 ** (log(n, s) + 1) - 1, 1),
        "2^ceil(…) without − 1": lambda n, s: max(2 ** math.ceil(log(n, s) + 1), 1),
        "ceil(log2(…)) without + 1": lambda n, s: max(2 ** math.ceil(log(n, s)) - 1, 1),
        "2^ceil(log2(…)), without + 1 and − 1": lambda n, s: max(2 ** math.ceil(log(n, s)), 1),
        "natural logarithm for log2": lambda n, s: max(2 ** math.ceil(math.log(n / s) + 1) - 1, 1),
        "log10 for log2": lambda n, s: max(2 ** math.ceil(math.log10(n / s) + 1) - 1, 1),
        "α = length / seq_length": lambda n, s: max(n / s, 1),
        "α = 2 · length / seq_length − 1, not rounded up": lambda n, s: max(2 * n / s - 1, 1),
        "α of the next power": lambda n, s: max(2 ** math.ceil(log(n, s) + 2) - 1, 1),
        "α of one token more": lambda n, s: model.ntk_alpha(n + 1, s),
        "α of one token less": lambda n, s: model.ntk_alpha(max(n - 1, 1), s),
        "α of seq_length doubled": lambda n, s: model.ntk_alpha(n, 2 * s),
        "α of seq_length halved": lambda n, s: model.ntk_alpha(n, max(s // 2, 1)),
        "α of seq_length 2048": lambda n, s: model.ntk_alpha(n, 2048),
        "α of seq_length 8192": lambda n, s: model.ntk_alpha(n, 8192),
        "α of seq_length 32768": lambda n, s: model.ntk_alpha(n, 32768),
    }
    for text, alpha in alphas.items():
        yield slip(f"NTK: {text}", both, with_frequencies(alpha=alpha))
    for text, power in {
        "exponent 1 for K/(K − 2)": 1.0,
        "exponent (K − 2)/K for K/(K − 2)": (config.kv_channels - 2) / config.kv_channels,
        "exponent 2 for K/(K − 2)": 2.0,
    }.items():
        yield slip(f"NTK: {text}", both, with_frequencies(power=lambda K, power=power: power))
    yield slip("NTK: α of the whole length, decoded tokens too", both, _turned(lambda run: run.tables(
        run.positions, _frequencies(run, lengths=[n + run.T - run.prefill_length for n in run.lengths]))),
        whole=True)  # fmt: skip
    yield slip("NTK: positions divided by α instead of a greater base", both, _turned(lambda run: run.tables(
        run.positions / model.ntk_alpha(run.lengths[0], s), _frequencies(run, alpha=lambda n, s: 1))))  # fmt: skip
    yield slip("NTK: positions divided by length / seq_length instead of a greater base", both,
               _turned(lambda run: run.tables(run.positions / max(run.lengths[0] / s, 1),
                                              _frequencies(run, alpha=lambda n, s: 1))))  # fmt: skip
    padded = _turned(lambda run: run.tables(run.positions, _frequencies(run, lengths=[run.prompt_length])))
    yield known("padding counted in NTK's α", both, padded, alone=False)
    counted = _turned(lambda run: run.tables(
        torch.arange(run.T)[None], _frequencies(run, lengths=[run.prompt_length])))  # fmt: skip
    yield Slip(
        "padding counted in positions and in NTK's α",
        (("rotate_q", counted), ("rotate_k", counted), ("scale_q", _counted_logn)),
        common=True,
        alone=False,
    )


def _counted_logn(run: Forward, right: Callable, q: Tensor, factors: Tensor | None) -> Tensor:
    return right(q, None if factors is None else run.logn(torch.arange(run.T)[None]))


# Norms


def norm_epsilon(eps: float) -> tuple[tuple[str, How], ...]:
    """The change to another layer_norm_epsilon."""
    how = _normed(lambda x, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    return ("attn_norm", how), ("mlp_norm", how), ("norm", how)


def _normed(
    normalise: Callable[[Tensor, float], Tensor],
    weighted: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x * w,
) -> How:
    """RMSNorm with another function, in float32, or another use of the weight."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
        return weighted(normalise(x.to(run.wide), run.config.layer_norm_epsilon).to(x.dtype), weight)

    return how


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def weight_before_cast(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return (_rms(x.to(run.wide), run.config.layer_norm_epsilon) * weight.to(run.wide)).to(x.dtype)


def _narrow_norm(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return _rms(x, run.config.layer_norm_epsilon) * weight


def _per_head(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    heads = x.to(run.wide).unflatten(-1, (-1, run.config.kv_channels))
    return _rms(heads, run.config.layer_norm_epsilon).flatten(-2).to(x.dtype) * weight


_NORMS: dict[str, How] = {
    "LayerNorm for RMSNorm": _normed(
        lambda x, eps: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    ),
    "mean subtracted before RMSNorm's root of the whole": _normed(
        lambda x, eps: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    ),
    "divided by the standard deviation, mean not subtracted": _normed(
        lambda x, eps: x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    ),
    "without its weight": _normed(_rms, lambda x, w: x),
    "1 + weight for weight": _normed(_rms, lambda x, w: x * (1 + w)),
    "weight applied twice": _normed(_rms, lambda x, w: x * w * w),
    "epsilon outside the root": _normed(lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)),
    "no epsilon": _normed(lambda x, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "the sum of squares for their mean": _normed(
        lambda x, eps: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps)
    ),
    "the mean of absolute values for the root of the mean square": _normed(
        lambda x, eps: x / (x.abs().mean(-1, keepdim=True) + eps)
    ),
    "no root: divided by the mean square": _normed(lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps)),
    "divided by the largest value": _normed(lambda x, eps: x / x.abs().amax(-1, keepdim=True)),
    "left out": lambda run, right, x, w: x,
    "left out, its weight applied": lambda run, right, x, w: x * w,
    "done twice": lambda run, right, x, w: right(right(x, w), w),
    "head by head": _per_head,
}
_PLACES = {"attn_norm": "ln_1", "mlp_norm": "ln_2"}


def _norms(config: QwenConfig) -> Iterator[Slip]:
    every = ("attn_norm", "mlp_norm", "norm")
    for eps in (1e-5, 1e-6, 1e-8, 1e-3):
        if eps != config.layer_norm_epsilon:
            text = f"layer_norm_epsilon {eps:g} for {config.layer_norm_epsilon:g}"
            yield Slip(text, norm_epsilon(eps), common=True, alone=False)
    yield Slip(
        "norm weight applied before the cast to the model's dtype",
        tuple((step, weight_before_cast) for step in every),
        common=True, choice=True, alone=False,
    )  # fmt: skip
    yield Slip(
        "norm computed in the model's dtype",
        tuple((step, _narrow_norm) for step in every), common=True, alone=False,
    )  # fmt: skip
    other = {
        "attn_norm": lambda run, right, x, w: right(x, run.own("mlp_norm.weight")),
        "mlp_norm": lambda run, right, x, w: right(x, run.own("attn_norm.weight")),
    }
    yield Slip("ln_1 and ln_2 swapped", tuple(other.items()), common=True)
    for text, how in _NORMS.items():
        yield Slip(f"norms: {text}", tuple((step, how) for step in every), alone=False)
        for step, place in _PLACES.items():
            yield slip(f"{place}: {text}", step, how)
    for step, place in _PLACES.items():
        yield slip(f"{place} with the other norm's weight", step, other[step])
        for by, whose in ((1, "next"), (-1, "previous")):
            yield slip(f"{place} with the {whose} layer's weight", step, _neighbours(f"{step}.weight", by))
    final: How = lambda run, right, x, w: right(x, run.weights("norm.weight"))
    yield slip("ln_1 with the final norm's weight", "attn_norm", final)


def _neighbours(name: str, by: int) -> How:
    """A step with another layer's weight; beyond the first or the last layer, round the other end."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        layer = (run.source + by) % run.config.num_hidden_layers
        more = [run.own("attn.qkv.bias", layer)] if bias else []
        return right(x, run.own(name, layer), *more)

    return how


# Matrices

_NAMES = {"qkv": "c_attn", "out": "attention's c_proj", "gate": "w2 (gate)", "up": "w1 (up)", "down": "the MLP's c_proj"}
_OURS = {"qkv": "attn.qkv", "out": "attn.out", "gate": "mlp.gate", "up": "mlp.up", "down": "mlp.down"}


def weighed(change: Callable[[Tensor], Tensor], bias: bool = False) -> How:
    """A product with a changed weight; bias: changed likewise."""

    def how(run: Forward, right: Callable, x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        return right(x, change(weight), *(change(b) if bias else b for b in biases))

    return how


def _biased(change: Callable[[Tensor], Tensor]) -> How:
    """c_attn with a changed bias."""
    return lambda run, right, x, weight, bias: right(x, weight, change(bias))


def _third_of_bias(kept: str) -> Callable[[Tensor], Tensor]:
    def change(bias: Tensor) -> Tensor:
        thirds = zip("qkv", bias.chunk(3), strict=True)
        return torch.cat([third if part in kept else torch.zeros_like(third) for part, third in thirds])

    return change


def _reordered(order: str) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        thirds = dict(zip("qkv", weight.chunk(3), strict=True))
        return torch.cat([thirds[part] for part in order])

    return change


def _regrouped(shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.unflatten(0, shape).transpose(0, 1).reshape(weight.shape)


def _squares(weight: Tensor) -> Tensor:
    """Each square of a weight (n·D, D) or (D, n·D) transposed."""
    along = 0 if weight.shape[0] >= weight.shape[1] else 1
    side = weight.shape[1 - along]
    return torch.cat([square.t() for square in weight.split(side, dim=along)], dim=along)


def _third(change: Callable[[Tensor], Tensor], part: str) -> Callable[[Tensor], Tensor]:
    def how(weight: Tensor) -> Tensor:
        thirds = zip("qkv", weight.chunk(3), strict=True)
        return torch.cat([change(third) if name == part else third for name, third in thirds])

    return how


def _quantised(bits: int, size: int, by: float, whole: bool = False) -> Callable[[Tensor], Tensor]:
    """Rounded to so many bits in groups of inputs, symmetric or between the extremes, its zero point off."""

    def change(weight: Tensor) -> Tensor:
        groups = weight.float().unflatten(1, (-1, size if weight.shape[1] % size == 0 else weight.shape[1]))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if whole:  # symmetric: the zero point is in the middle
            scale = torch.maximum(high, -low) * 2 / (2**bits - 1)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            scale = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
            zero = (-low.clamp(max=0) / scale.clamp(min=1e-30)).round()
        q = (groups / scale.clamp(min=1e-30)).round().add(zero).clamp(0, 2**bits - 1)
        return ((q - zero - by) * scale).flatten(1).to(weight.dtype)

    return change


def _half(dim: int, last: bool = False) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        size = weight.shape[dim]
        kept = torch.arange(size) >= size - size // 2 if last else torch.arange(size) < size // 2
        return weight * (kept[:, None] if dim == 0 else kept)

    return change


_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero: never loaded": torch.zeros_like,
    "with its sign turned": lambda w: -w,
    "doubled": lambda w: 2 * w,
    "halved": lambda w: w / 2,
    "rows rolled by one": lambda w: w.roll(1, 0),
    "rows rolled by one, the other way": lambda w: w.roll(-1, 0),
    "columns rolled by one": lambda w: w.roll(1, 1),
    "columns rolled by one, the other way": lambda w: w.roll(-1, 1),
    "rows in reverse order": lambda w: w.flip(0),
    "columns in reverse order": lambda w: w.flip(1),
    "the second half of its rows missing": _half(0),
    "the second half of its columns missing": _half(1),
    "the first half of its rows missing": _half(0, last=True),
    "the first half of its columns missing": _half(1, last=True),
    "halves of its rows swapped": lambda w: torch.cat(w.chunk(2)[::-1]),
    "halves of its columns swapped": lambda w: torch.cat(w.chunk(2, dim=1)[::-1], dim=1),
    "its buffer read as if it were transposed": lambda w: w.t().reshape(w.shape),
    "its buffer read in columns": lambda w: w.reshape(w.shape[1], w.shape[0]).t(),
    "even rows before odd ones": lambda w: torch.cat((w[0::2], w[1::2])),
    "even columns before odd ones": lambda w: torch.cat((w[:, 0::2], w[:, 1::2]), dim=1),
}


def _matrices(config: QwenConfig) -> Iterator[Slip]:
    H, K = config.num_attention_heads, config.kv_channels
    swapped = (
        ("gate", lambda run, right, h, w: right(h, run.own("mlp.up.weight"))),
        ("up", lambda run, right, h, w: right(h, run.own("mlp.gate.weight"))),
    )
    yield Slip("gate and up swapped", swapped, common=True)
    yield known("bias of q, k and v missing", "qkv", _biased(torch.zeros_like))
    for order in ("kqv", "vkq", "qvk", "kvq", "vqk"):
        text = "q, k and v taken from c_attn's {}, {} and {} third".format(*order)
        yield known(text, "qkv", weighed(_reordered(order), bias=True))
    by_head, to_heads = _regrouped((H, 3, K)), _regrouped((3, H, K))
    yield known("rows of c_attn read head by head: q, k and v of head 0, then of head 1, …", "qkv",
                weighed(by_head, bias=True))  # fmt: skip
    yield known("rows of c_attn stored head by head, but read as [q; k; v]", "qkv", weighed(to_heads, bias=True))
    yield known("c_attn transposed: each of its three squares", "qkv", weighed(_squares))
    yield known("c_attn transposed: its buffer read as (D, 3D)", "qkv",
                weighed(lambda w: w.reshape(w.shape[1], -1).t()))  # fmt: skip
    yield known("attention's c_proj transposed", "out", weighed(torch.t))
    for step in ("gate", "up", "down"):
        if config.mlp_width % config.hidden_size == 0:
            yield slip(f"{_NAMES[step]}: each of its squares transposed", step, weighed(_squares))
    for part in "qkv":
        yield slip(f"the {part} third of c_attn transposed", "qkv", weighed(_third(torch.t, part)))
        yield slip(f"the {part} third of c_attn zero: never loaded", "qkv", weighed(_third(torch.zeros_like, part)))
        rest = "".join(letter for letter in "qkv" if letter != part)
        yield slip(f"bias of {part} missing", "qkv", _biased(_third_of_bias(rest)))
        yield slip(f"bias of {rest[0]} and {rest[1]} missing", "qkv", _biased(_third_of_bias(part)))
    yield slip("bias of q, k and v added twice", "qkv", _biased(lambda b: 2 * b))
    yield slip("bias of q, k and v with its sign turned", "qkv", _biased(torch.neg))
    yield slip("bias of q, k and v rolled by one", "qkv", _biased(lambda b: b.roll(1)))
    yield slip("bias of q, k and v read head by head", "qkv", _biased(by_head))
    yield slip("rows of c_attn read head by head, its bias as it is", "qkv", weighed(by_head))
    yield slip("bias of the next layer's c_attn", "qkv", lambda run, right, h, w, b: right(
        h, w, run.own("attn.qkv.bias", (run.source + 1) % config.num_hidden_layers)))  # fmt: skip
    for step, name in _NAMES.items():
        for by, whose in ((1, "next"), (-1, "previous")):
            yield slip(f"{name} of the {whose} layer", step, _neighbours(f"{_OURS[step]}.weight", by))
        for text, change in _WEIGHTS.items():
            yield slip(f"{name} {text}" if text[:3] in ("wit", "dou", "hal", "zer") else f"{name}: {text}",
                       step, weighed(change))  # fmt: skip
        yield slip(f"{name} done twice", step, _twice) if step == "out" else slip(
            f"{name}: its input with its sign turned", step, lambda run, right, x, *rest: right(-x, *rest)
        )
        for size in (32, 64, 128):
            if size > config.hidden_size:
                continue
            for middle in (True, False):
                kind = "symmetric" if middle else "from the smallest to the largest"
                for by, off in ((1, "one too high"), (-1, "one too low")):
                    text = f"{name} quantised to 4 bits, groups of {size}, {kind}: its zero point {off}"
                    yield slip(text, step, weighed(_quantised(4, size, by, middle)))
    for by, off in ((1, "one too high"), (-1, "one too low")):
        for size in (32, 64, 128):
            for middle in (True, False):
                if size <= config.hidden_size:
                    kind = "symmetric" if middle else "from the smallest to the largest"
                    text = f"all matrices quantised to 4 bits, groups of {size}, {kind}: zero points {off}"
                    yield slip(text, " ".join(ALL), weighed(_quantised(4, size, by, middle)), alone=False)
    yield slip("keys before queries: q and k swapped after rotation", "attend",
               lambda run, right, q, k, v, mask: right(k, q, v, mask))  # fmt: skip
    head_order: dict[str, Callable[[Tensor], Tensor]] = {
        "heads in reverse order before c_proj": lambda x: x.flip(1),
        "heads rolled by one before c_proj": lambda x: x.roll(1, 1),
        "halves of the heads swapped before c_proj": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    }
    for text, change in head_order.items():
        yield slip(text, "attend", lambda run, right, *args, change=change: change(right(*args)))
    yield slip("heads and head size exchanged before c_proj", "out", lambda run, right, h, w: right(
        h.unflatten(-1, (-1, K)).transpose(-1, -2).flatten(-2), w))  # fmt: skip
    yield slip("heads not moved back before c_proj: (B, H, T, K) read as (B, T, H · K)", "attend",
               _not_moved_back, whole=True)  # fmt: skip


def _twice(run: Forward, right: Callable, x: Tensor, weight: Tensor) -> Tensor:
    return right(right(x, weight), weight)


def _not_moved_back(run: Forward, right: Callable, *inputs: Any) -> Tensor:
    mixed = right(*inputs)  # (B, H, T, K)
    B, H, T, K = mixed.shape
    return mixed.reshape(B, T, H, K).transpose(1, 2)


# Attention


def seen(visible: Callable[[Forward, Tensor, Tensor], Tensor], padded: bool = True) -> How:
    """Attention in which query i sees key j where visible(run, i (T, 1), j (1, T)) is true.

    A query that sees nothing gives 0. padded: keys at padding stay unseen.
    """

    def how(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        at = torch.arange(run.T)
        sees = visible(run, at[:, None], at[None])[None, None]
        if padded and run.padding is not None:
            real = at >= run.padding[:, None, None, None]
            sees = copies((sees & real) | (sees & torch.eye(run.T, dtype=torch.bool)), len(q))
        none = ~sees.any(-1, keepdim=True)
        mixed = right(q, k, v, sees | none)
        return mixed.masked_fill(none, 0) if bool(none.any()) else mixed

    return how


def _first(run: Forward) -> int:
    return run.prefill_length


def _seen_in_decode(visible: Callable[[int, Tensor, Tensor], Tensor]) -> How:
    """Decode steps see other keys; visible: (the prompt's length P, i, j)."""
    return seen(
        lambda run, i, j: torch.where(i >= _first(run), visible(_first(run), i, j) & (j <= i), j <= i)
    )


def chunked(size: int) -> dict[str, tuple[tuple[str, How], ...]]:
    """The slips of a prefill in chunks of a size."""
    start = lambda i: i // size * size  # noqa: E731
    restart = _moved(lambda run: torch.where(_decoded(run, run.positions), run.positions, run.positions % size))

    def within(run: Forward, i: Tensor, chunk: Tensor) -> Tensor:
        return torch.where(i >= run.prefill_length, True, chunk)

    whole = seen(lambda run, i, j: (j <= i) | ((j < (start(i) + size).clamp(max=_first(run))) & (i < _first(run))))
    forgotten = seen(lambda run, i, j: (j <= i) & within(run, i, j >= start(i)))
    top_left = seen(lambda run, i, j: torch.where(i >= _first(run), j <= i, j <= i - start(i)))
    return {
        "a chunk sees all of itself": (("attend", whole),),
        "positions restart in every chunk": (("rotate_q", restart), ("rotate_k", restart)),
        "the cache is forgotten between chunks": (("attend", forgotten),),
        "causal mask aligned at the top left of a chunk": (("attend", top_left),),
        "positions restart and the cache is forgotten": (
            ("rotate_q", restart), ("rotate_k", restart), ("attend", forgotten)),
    }  # fmt: skip


def windowed(size: int) -> tuple[tuple[str, How], ...]:
    """Each query sees the last `size` keys, its own counted."""
    return (("attend", seen(lambda run, i, j: (j <= i) & (j > i - size))),)


def attention(
    weigh: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    score: Callable[[Forward, Tensor], Tensor] = lambda run, s: s,
    round_q: torch.dtype | None = None,
    round_p: torch.dtype | None = None,
) -> How:
    """Attention written out: scores (B, H, T, T) in float32, −∞ where a key is not seen, then `weigh`."""

    def how(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if round_q is not None:
            q = q.to(round_q).to(q.dtype)
        scores = q.to(run.wide) @ k.to(run.wide).transpose(-1, -2) * (run.scale or q.shape[-1] ** -0.5)
        if mask is None:
            mask = torch.ones(run.T, run.T, dtype=torch.bool).tril()
        weights = weigh(score(run, scores).masked_fill(~mask, -math.inf))
        if round_p is not None:
            weights = weights.to(round_p)
        return (weights.to(run.wide) @ v.to(run.wide)).to(v.dtype)

    return how


def _scaled(scale: Callable[[QwenConfig], float]) -> How:
    def how(run: Forward, right: Callable, *inputs: Any) -> Tensor:
        before, run.scale = run.scale, scale(run.config)
        mixed = right(*inputs)
        run.scale = before
        return mixed

    return how


def _over_queries(scores: Tensor) -> Tensor:
    weights = scores.softmax(-2)
    return weights.nan_to_num(0)


def _alibi(run: Forward, scores: Tensor) -> Tensor:
    H = run.config.num_attention_heads
    slopes = 2.0 ** (-8 / H * torch.arange(1, H + 1, dtype=scores.dtype))
    at = torch.arange(run.T)
    return scores + slopes[:, None, None] * (at[None] - at[:, None])


def _normed_heads(run: Forward, right: Callable, x: Tensor) -> Tensor:
    return _rms(x.to(run.wide), run.config.layer_norm_epsilon).to(x.dtype)


def _attention(config: QwenConfig) -> Iterator[Slip]:
    yield known("no 1/√K in the scores", "attend", _scaled(lambda c: 1.0))
    yield known("scores scaled by 1/√D, not 1/√K", "attend", _scaled(lambda c: c.hidden_size**-0.5))
    scales: dict[str, Callable[[QwenConfig], float]] = {
        "1/K, not 1/√K": lambda c: 1 / c.kv_channels,
        "√K, not 1/√K": lambda c: math.sqrt(c.kv_channels),
        "1/√(K/2), not 1/√K": lambda c: math.sqrt(2 / c.kv_channels),
        "1/√(2K), not 1/√K": lambda c: math.sqrt(0.5 / c.kv_channels),
        "1/√H, not 1/√K": lambda c: c.num_attention_heads**-0.5,
        "1/√K and its sign turned": lambda c: -(c.kv_channels**-0.5),
        "K^(−1/4), not 1/√K": lambda c: c.kv_channels**-0.25,
    }
    for text, scale in scales.items():
        yield slip(f"scores scaled by {text}", "attend", _scaled(scale))
    not_causal = seen(lambda run, i, j: j < torch.where(i < _first(run), _first(run), i + 1))
    yield known("attention not causal", "attend", not_causal, whole=True)
    yield known("padding not masked", "attend", seen(lambda run, i, j: j <= i, padded=False), alone=False)
    masks: dict[str, Callable[[Forward, Tensor, Tensor], Tensor]] = {
        "one key too many: the next position is seen": lambda run, i, j: j <= i + 1,
        "one key too few: its own key is not seen": lambda run, i, j: (j < i) | ((i == 0) & (j == 0)),
        "its own key is not seen, the first position gives 0": lambda run, i, j: j < i,
        "two keys too few": lambda run, i, j: (j < i - 1) | ((i <= 1) & (j == 0)),
        "the first key is not seen": lambda run, i, j: (j <= i) & ((j > 0) | (i == 0)),
        "only its own key is seen": lambda run, i, j: j == i,
        "the mask turned round: later keys are seen, not earlier ones": lambda run, i, j: j >= i,
        "the first key is always the only one": lambda run, i, j: j == 0,
    }
    for text, visible in masks.items():
        future = text.startswith(("one key too many", "the mask"))
        yield slip(f"attention mask: {text}", "attend", seen(visible), whole=future)
    decoded: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
        "the newest key is not seen": lambda P, i, j: j < i,
        "the key before the newest is not seen": lambda P, i, j: j != i - 1,
        "the newest key overwrites the one before": lambda P, i, j: j != torch.where(i >= P, i - 1, -1),
        "the newest key overwrites the prompt's last": lambda P, i, j: j != P - 1,
        "each new key overwrites the prompt's last": lambda P, i, j: (j < P - 1) | (j == i),
        "each new key overwrites the last decoded one": lambda P, i, j: (j < P) | (j == i),
        "the first key is overwritten": lambda P, i, j: j != 0,
        "only the prompt's keys are seen": lambda P, i, j: j < P,
        "only the prompt's keys and its own are seen": lambda P, i, j: (j < P) | (j == i),
        "the prompt is forgotten": lambda P, i, j: j >= P,
        "only its own key is seen": lambda P, i, j: j == i,
        "only the first key is seen: causal mask aligned at the top left": lambda P, i, j: j == 0,
        "the prompt's last key is not seen": lambda P, i, j: j != P - 1,
        "the first decoded key is not seen": lambda P, i, j: (j != P) | (i == P),
        "the newest two keys are not seen": lambda P, i, j: j < i - 1,
    }
    for text, in_decode in decoded.items():
        if text != "the newest key overwrites the one before":
            yield slip(f"in decode steps {text}", "attend", _seen_in_decode(in_decode))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax with base 2": lambda s: (s * math.log(2)).softmax(-1),
        "softmax with one more in the denominator": lambda s: (
            s - torch.logaddexp(s.logsumexp(-1, keepdim=True), s.new_zeros(()))).exp(),
        "sigmoid for softmax": lambda s: s.sigmoid(),
        "exp without the softmax's denominator": lambda s: s.exp(),
        "no softmax": lambda s: s.masked_fill(s == -math.inf, 0),
        "ReLU for softmax": lambda s: s.relu(),
        "softmax of the scores' absolute values": lambda s: s.abs().masked_fill(s == -math.inf, -math.inf).softmax(-1),
        "softmax done twice": lambda s: s.softmax(-1).masked_fill(s == -math.inf, -math.inf).softmax(-1),
        "log-softmax for softmax": lambda s: s.log_softmax(-1).masked_fill(s == -math.inf, 0),
        "the mean of the values: no scores": lambda s: (s * 0).nan_to_num(nan=-math.inf).softmax(-1),
        "only the key with the highest score": lambda s: F.one_hot(s.argmax(-1), s.shape[-1]).to(s.dtype),
        "masked scores 0, not −∞": lambda s: s.masked_fill(s == -math.inf, 0).softmax(-1),
    }
    for text, weigh in functions.items():
        yield slip(f"attention: {text}", "attend", attention(weigh), whole=text.startswith("masked"))
    yield slip("attention: softmax over the queries", "attend", attention(_over_queries), whole=True)
    yield slip("attention: ALiBi as well", "attend", attention(score=_alibi))
    for cap in (30, 50):
        yield slip(f"attention: scores capped, {cap} · tanh(score / {cap})", "attend",
                   attention(score=lambda run, s, cap=cap: cap * (s / cap).tanh()))  # fmt: skip
    yield slip("q and k normalised before rotation", "q k", _normed_heads)
    yield slip("q and k normalised after rotation", "rotate_q rotate_k", lambda run, right, *args: _normed_heads(
        run, right, right(*args)))  # fmt: skip
    if config.num_attention_heads % 2 == 0:
        grouped: How = lambda run, right, x: x[:, :, 0::2].repeat_interleave(2, dim=2)
        yield slip("keys and values grouped: two heads share those of the first", "keys values", grouped)
        yield slip("keys and values grouped: the first half of the heads, repeated", "keys values",
                   lambda run, right, x: x[:, :, : x.shape[2] // 2].repeat(1, 1, 2, 1))  # fmt: skip
    yield slip("keys of the next head", "keys", lambda run, right, k: k.roll(-1, 2))
    yield slip("values of the next head", "values", lambda run, right, v: v.roll(-1, 2))
    yield slip("values in place of keys", "keys", lambda run, right, k: run.given["v"][0])
    yield slip("keys in place of values", "values", lambda run, right, v: run.given["k"][0])
    yield slip("rotated keys in place of values", "values", lambda run, right, v: run.given["keys"][0])
    yield slip("values one position late", "values", lambda run, right, v: v.roll(1, 1))
    columns: How = lambda run, right, x, cos, sin: right(x, *run.tables(torch.arange(run.T)[None]))
    yield Slip("padding counted in positions",
               (("rotate_q", columns), ("rotate_k", columns), ("scale_q", _counted_logn)),
               common=True, alone=False)  # fmt: skip


# MLP

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "GELU": (F.gelu, True),
    "GELU (tanh)": (lambda x: F.gelu(x, approximate="tanh"), True),
    "ReLU": (F.relu, True),
    "quick GELU, x · σ(1.702 x),": (lambda x: x * torch.sigmoid(1.702 * x), False),
    "ReLU²": (lambda x: F.relu(x).square(), False),
    "sigmoid": (torch.sigmoid, False),
    "tanh": (torch.tanh, False),
    "mish": (F.mish, False),
    "hard swish": (F.hardswish, False),
    "ELU": (F.elu, False),
    "SELU": (F.selu, False),
    "softplus": (F.softplus, False),
    "leaky ReLU": (F.leaky_relu, False),
    "nothing": (lambda x: x, False),
    "SiLU done twice": (lambda x: F.silu(F.silu(x)), False),
    "SiLU of −x": (lambda x: F.silu(-x), False),
    "−SiLU": (lambda x: -F.silu(x), False),
    "x · σ(2x)": (lambda x: x * torch.sigmoid(2 * x), False),
    "x · tanh(x)": (lambda x: x * torch.tanh(x), False),
    "softsign": (F.softsign, False),
    "hard sigmoid": (F.hardsigmoid, False),
    "SiLU cut at 7": (lambda x: F.silu(x.clamp(max=7)), False),
}


def _mlp(config: QwenConfig) -> Iterator[Slip]:
    for name, (function, common) in _ACTIVATIONS.items():
        how: How = lambda run, right, gate, function=function: function(gate)
        yield slip(f"{name} for SiLU", "act", how, common=common)
    products: dict[str, How] = {
        "gate and up added, not multiplied": lambda run, right, up, act: up + act,
        "the activation after the product, silu(gate · up)": lambda run, right, up, act: F.silu(
            up * run.given["act"][0]),
        "up left out: silu(gate) alone": lambda run, right, up, act: act,
        "gate left out: up alone": lambda run, right, up, act: up,
        "gate twice: gate · silu(gate)": lambda run, right, up, act: run.given["act"][0] * act,
        "up activated as well: silu(up) · silu(gate)": lambda run, right, up, act: F.silu(up) * act,
        "up added after the product, (up + 1) · silu(gate)": lambda run, right, up, act: (up + 1) * act,
        "the second half of the MLP's channels missing": lambda run, right, up, act: right(
            up, act) * (torch.arange(up.shape[-1]) < up.shape[-1] // 2),
        "halves of the MLP's channels swapped": lambda run, right, up, act: torch.cat(
            right(up, act).chunk(2, dim=-1)[::-1], dim=-1),
        "channels of up in reverse order": lambda run, right, up, act: right(up.flip(-1), act),
        "channels of up rolled by one": lambda run, right, up, act: right(up.roll(1, -1), act),
        "squared": lambda run, right, up, act: right(up, act).square(),
    }  # fmt: skip
    for text, how in products.items():
        yield slip(f"MLP: {text}", "product", how)
    both: How = lambda run, right, h, w: right(h, run.own("mlp.gate.weight"))
    yield slip("MLP: up with gate's matrix", "up", both)
    yield slip("MLP: gate with up's matrix", "gate", lambda run, right, h, w: right(h, run.own("mlp.up.weight")))
    stream: How = lambda run, right, h, w: right(run.given["mlp_norm"][0], w)
    yield slip("MLP: it reads the residual stream, not ln_2's output", "gate up", stream)
    yield slip("MLP: gate reads the residual stream, not ln_2's output", "gate", stream)
    yield slip("MLP: up reads the residual stream, not ln_2's output", "up", stream)
    yield slip("MLP: it reads ln_1's output, not ln_2's", "gate up", lambda run, right, h, w: right(
        run.given["qkv"][0], w))  # fmt: skip


# Residual stream


def _renormed(weight: str) -> How:
    """Adds the normalised result."""
    return lambda run, right, x, y: right(x, run.norm(y, run.own(weight)))


def _residual(config: QwenConfig) -> Iterator[Slip]:
    for step, place, norm, first in (
        ("attn_add", "attention", "attn_norm", "qkv"), ("mlp_add", "the MLP", "mlp_norm", "gate"),
    ):  # fmt: skip
        adds: dict[str, How] = {
            "left out": lambda run, right, x, y: x,
            "added twice": lambda run, right, x, y: right(right(x, y), y),
            "added with its sign turned": lambda run, right, x, y: x - y,
            "halved": lambda run, right, x, y: right(x, y / 2),
            "without the residual": lambda run, right, x, y: y,
            "with the residual doubled": lambda run, right, x, y: right(x + x, y),
            "with the residual halved": lambda run, right, x, y: right(x / 2, y),
            "with the sum halved": lambda run, right, x, y: right(x, y) / 2,
            "with the sum divided by √2": lambda run, right, x, y: right(x, y) / math.sqrt(2),
            "added to the norm's output, not to its input":
                lambda run, right, x, y, first=first: right(run.given[first][0], y),
            "divided by √(2 · layers)":
                lambda run, right, x, y: right(x, y / math.sqrt(2 * config.num_hidden_layers)),
            "divided by the layer's number":
                lambda run, right, x, y: right(x, y / (run.layer + 1)),
            "multiplied, not added": lambda run, right, x, y: x * y,
        }  # fmt: skip
        for text, how in adds.items():
            yield slip(f"{place} {text}", step, how)
        yield slip(f"{place}: its result normalised before it is added", step, _renormed(f"{norm}.weight"))
        # Post-norm: the norm after, not before.
        yield Slip(f"{place}: its norm after it, not before",
                   ((norm, lambda run, right, x, w: x), (step, _renormed(f"{norm}.weight"))))  # fmt: skip
        yield Slip(f"{place}: its norm after the residual sum, not before",
                   ((norm, lambda run, right, x, w: x),
                    (step, lambda run, right, x, y, norm=norm: run.norm(right(x, y), run.own(f"{norm}.weight")))))  # fmt: skip
    yield slip("attention: its result normalised by ln_2 before it is added", "attn_add", _renormed("mlp_norm.weight"))
    yield slip("attention and MLP side by side: both read the layer's input", "mlp_norm",
               lambda run, right, x, w: right(run.x, w))  # fmt: skip
    yield slip("attention and MLP side by side, with ln_1 for both", "mlp_norm",
               lambda run, right, x, w: right(run.x, run.own("attn_norm.weight")))  # fmt: skip
    yield slip("the MLP added to the stream before attention: attention's part is lost", "mlp_add",
               lambda run, right, x, y: right(run.x, y))  # fmt: skip
    yield slip("the layer's input added once more at its end", "mlp_add",
               lambda run, right, x, y: right(x, y) + run.x)  # fmt: skip
    yield Slip("both norms after, not before: post-norm", (
        ("attn_norm", lambda run, right, x, w: x), ("mlp_norm", lambda run, right, x, w: x),
        ("attn_add", lambda run, right, x, y: run.norm(right(x, y), run.own("attn_norm.weight"))),
        ("mlp_add", lambda run, right, x, y: run.norm(right(x, y), run.own("mlp_norm.weight")))))  # fmt: skip
    yield Slip("both results normalised before they are added", (
        ("attn_norm", lambda run, right, x, w: x), ("mlp_norm", lambda run, right, x, w: x),
        ("attn_add", _renormed("attn_norm.weight")), ("mlp_add", _renormed("mlp_norm.weight"))))  # fmt: skip


# The same few slips at every step

_ANYWHERE = {
    "attn_norm": "ln_1's output", "q": "q", "k": "k", "v": "v", "rotate_q": "q after rotation",
    "rotate_k": "k after rotation", "attend": "attention's mixed values", "out": "attention's output",
    "mlp_norm": "ln_2's output", "gate": "gate", "up": "up", "act": "the activated gate",
    "product": "up · silu(gate)", "down": "the MLP's output",
}  # fmt: skip
_GENERIC: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "doubled": lambda x: 2 * x,
    "halved": lambda x: x / 2,
    "with its sign turned": lambda x: -x,
    "with channels rolled by one": lambda x: x.roll(1, -1),
    "with channels rolled by one, the other way": lambda x: x.roll(-1, -1),
    "with channels in reverse order": lambda x: x.flip(-1),
}


def _anywhere() -> Iterator[Slip]:
    for step, name in _ANYWHERE.items():
        for text, change in _GENERIC.items():
            yield slip(f"{name} {text}", step, lambda run, right, *args, change=change: change(right(*args)))
        along = 2 if step == "attend" else 1
        for by, way in ((1, "late"), (-1, "early")):
            how: How = lambda run, right, *args, by=by, along=along: _late(right(*args), by, along)
            yield slip(f"{name} one position {way}", step, how, whole=by < 0)


def _late(x: Tensor, by: int, along: int) -> Tensor:
    """Each position has the one before's, or the one after's; at the end its own."""
    at = (torch.arange(x.shape[along]) - by).clamp(0, x.shape[along] - 1)
    return x.index_select(along, at)


# Outside the layers


def _change(text: str, step: str, how: How, **options: Any) -> Mistake:
    return Mistake(text, (Change(step, how),), **options)


def _outside(config: QwenConfig) -> Iterator[Mistake]:
    D, L = config.hidden_size, config.num_hidden_layers
    if L > 1:
        for text, kept in (("last layer dropped", range(L - 1)), ("first layer dropped", range(1, L))):
            yield _change(text, "layers", lambda run, right, layers, kept=kept: list(kept), common=True)
    yield _change("head tied: logits with the embedding's matrix", "logits",
                  lambda run, right, h, w: right(h, run.weights("embed.weight")), common=True)  # fmt: skip
    yield _change("embedding tied: ids looked up in the head's matrix", "embed",
                  lambda run, right, ids, w: right(ids, run.weights("lm_head.weight")), common=True)  # fmt: skip
    yield _change("no final norm", "norm", lambda run, right, x, w: x, common=True)
    for text, how in _NORMS.items():
        if text != "left out":
            yield _change(f"final norm: {text}", "norm", how)
    for name in ("attn_norm", "mlp_norm"):
        for layer in (0, config.num_hidden_layers - 1):
            yield _change(f"final norm with the weight of layer {layer}'s {_PLACES[name]}", "norm",
                          lambda run, right, x, w, name=name, layer=layer: right(
                              x, run.own(f"{name}.weight", layer)))  # fmt: skip
    V = config.vocab_size
    for text, factor in {"√D": D**0.5, "1/√D": D**-0.5, "2": 2.0, "½": 0.5, "√2": 2**0.5, "−1": -1.0}.items():
        yield _change(f"embedding times {text}", "embed", lambda run, right, ids, w, factor=factor: (
            right(ids, w) * torch.tensor(factor, dtype=run.dtype)))  # fmt: skip
    for by, text in ((1, "one further on"), (-1, "one before"), (2, "two further on")):
        yield _change(f"embedding rows shifted: each id has the row {text}", "embed",
                      lambda run, right, ids, w, by=by: right((ids + by) % V, w))  # fmt: skip
        yield _change(f"head rows shifted: each logit has the row {text}", "logits",
                      lambda run, right, h, w, by=by: right(h, w).roll(-by, -1))  # fmt: skip
    for end, fill in (("a row of zeros", torch.zeros_like), ("the last row again", lambda row: row)):
        yield _change(f"head rows shifted: each logit has the row one further on, the last one {end}", "logits",
                      lambda run, right, h, w, fill=fill: right(h, torch.cat((w[1:], fill(w[-1:])))))  # fmt: skip
        first = end.replace("last", "first")
        yield _change(f"head rows shifted: each logit has the row one before, the first one {first}", "logits",
                      lambda run, right, h, w, fill=fill: right(h, torch.cat((fill(w[:1]), w[:-1]))))  # fmt: skip
    for by, text in ((1, "one further on"), (-1, "one before")):
        yield _change(f"embedding rows shifted: each id has the row {text}, at the end its own", "embed",
                      lambda run, right, ids, w, by=by: right((ids + by).clamp(0, V - 1), w))  # fmt: skip
    yield _change("embedding normalised", "embed", lambda run, right, ids, w: _rms(
        right(ids, w).to(run.wide), config.layer_norm_epsilon).to(run.dtype))  # fmt: skip
    yield _change("embedding normalised, with layer 0's ln_1", "embed", lambda run, right, ids, w: run.norm(
        right(ids, w), run.own("attn_norm.weight", 0)))  # fmt: skip
    yield _change("embedding: columns rolled by one", "embed", lambda run, right, ids, w: right(ids, w).roll(1, -1))
    yield _change("embedding: sine and cosine of the position added", "embed", lambda run, right, ids, w: (
        right(ids, w) + _sinusoids(run, D)))  # fmt: skip
    yield _change("head: columns rolled by one", "logits", lambda run, right, h, w: right(h.roll(-1, -1), w))
    yield _change("head: input with channels in reverse order", "logits", lambda run, right, h, w: right(h.flip(-1), w))
    yield _change("head: the second half of its columns missing", "logits", lambda run, right, h, w: right(
        h * (torch.arange(h.shape[-1]) < h.shape[-1] // 2), w))  # fmt: skip
    yield _change("head reads the last layer's ln_2 output, not the final norm's", "norm",
                  lambda run, right, x, w: run.given["mlp_norm"][0])  # fmt: skip


def _sinusoids(run: Forward, D: int) -> Tensor:
    angles = run.positions[..., None] / 1e4 ** (torch.arange(0, D, 2, dtype=run.wide) / D)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(run.dtype)


def layer_lists(config: QwenConfig) -> Iterator[Mistake]:
    """Layers left out, run twice, in another order, one in place of another."""
    L = config.num_hidden_layers
    if L == 1:
        return

    def listed(text: str, order: list[int], **options: Any) -> Mistake:
        return _change(text, "layers", lambda run, right, layers: order, **options)

    right = list(range(L))
    yield listed("layers in reverse order", right[::-1])
    yield listed("layers rolled by one", right[1:] + right[:1])
    yield listed("all layers run twice", right * 2)
    for i in right[1:-1]:
        yield listed(f"layer {i} dropped", right[:i] + right[i + 1 :])
    for i in right:
        yield listed(f"layer {i} run twice", right[: i + 1] + right[i:])
    for i in right:
        for j in right:
            if i < j:
                order = right.copy()
                order[i], order[j] = j, i
                yield listed(f"layers {i} and {j} swapped", order)
            if i != j and (L <= 12 or abs(i - j) == 1 or i == 0):
                order = right.copy()
                order[j] = i
                yield listed(f"layer {i} loaded in place of layer {j}", order)
    for i in range(2, L - 1):
        yield listed(f"layers from {i} on missing", right[:i])
    if L % 2 == 0 and L > 2:
        yield listed("halves of the layers swapped", right[L // 2 :] + right[: L // 2])
        yield listed("even layers before odd ones", right[0::2] + right[1::2])


def _inputs(config: QwenConfig) -> Iterator[Mistake]:
    orders: dict[str, Callable[[Tensor], Tensor]] = {
        "ids in reverse order": lambda ids: ids.flip(1),
        "first id dropped, the last one repeated": lambda ids: torch.cat((ids[:, 1:], ids[:, -1:]), dim=1),
        "first id dropped, the rest moved up round the end": lambda ids: ids.roll(-1, 1),
        "last id dropped, the first one repeated": lambda ids: torch.cat((ids[:, :1], ids[:, :-1]), dim=1),
        "ids rolled by one": lambda ids: ids.roll(1, 1),
    }
    for text, order in orders.items():
        yield _change(text, "ids", lambda run, right, ids, order=order: order(ids), whole=True)
    yield Mistake("attention_mask ignored: padding seen and counted", common=True, changes=(
        Change("rotate_q", _ignored), Change("rotate_k", _ignored),
        Change("scale_q", _counted_logn), Change("attend", seen(lambda run, i, j: j <= i, padded=False)),
    ))  # fmt: skip
    if config.use_dynamic_ntk:
        text = "NTK's α recomputed at every decode step, all keys with it"
        yield Mistake(text, uncached=True, common=True)


def _ignored(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    frequencies = model.rotary_frequencies(run.config, [run.prompt_length], run.wide)
    return right(x, *run.tables(torch.arange(run.T)[None], frequencies))


# Precision: choices, and dtypes other than the declared one


def rounded_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def _int8(over: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """To 8 bits with one scale for these dimensions together: the largest is ±127 steps."""

    def change(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.abs().amax(over, keepdim=True) / 127
        return ((wide / scale.clamp(min=1e-30)).round() * scale).to(x.dtype)

    return change


def _cached(change: Callable[[Tensor], Tensor], decoded: bool = False) -> tuple[tuple[str, How], ...]:
    """Keys and values as a cache keeps them. decoded: the prompt itself is computed with exact ones."""
    if not decoded:
        how: How = lambda run, right, x: change(x)
        return ("keys", how), ("values", how)

    def attend(run: Forward, right: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        exact, P = right(q, k, v, mask), run.prefill_length
        if run.T <= P:
            return exact
        # Heads are the second dimension here, the third for `change`. A step sees its own key exactly.
        k2, v2 = (change(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
        return torch.cat((exact[:, :, :P], right(q, k2, v2, mask)[:, :, P:]), dim=2)

    return (("attend", attend),)


def products_in(dtype: torch.dtype) -> tuple[tuple[str, How], ...]:
    """Only what enters a product with a weight is rounded."""
    narrow = rounded_to(dtype)
    how: How = lambda run, right, x, w, *bias: right(narrow(x), narrow(w), *bias)
    return tuple((step, how) for step in (*ALL, "logits"))


def made(*hows: tuple[tuple[str, How], ...]) -> tuple[Change, ...]:
    return tuple(Change(step, how) for each in hows for step, how in each)


NONE = Mistake("no mistake")
CLAMPED = "float16 overflow, clamped to 65504"


def _saturated(run: Forward, right: Callable, *inputs: Any) -> Tensor:
    limit = torch.finfo(torch.float16).max
    x, *rest = inputs
    return right(x.clamp(-limit, limit), *rest).clamp(-limit, limit)


def _precisions(config: QwenConfig) -> Iterator[Mistake]:
    for name in ("bfloat16", "float16", "float32"):
        yield Mistake(f"computed in {name}", dtype=name, sized=True)
    steps = (*ALL, "logits", "norm", "attn_norm", "mlp_norm")
    clamped = tuple(Change(step, _saturated) for step in steps)
    yield Mistake(CLAMPED, (*clamped, Change("embed", lambda run, right, *a: right(*a).clamp(-65504, 65504))),
                  dtype="float16")  # fmt: skip


@functools.cache
def choices() -> tuple[Mistake, ...]:
    """Roundings that a right port may do, one by one and together. Each belongs to the activations' dtype,
    which may be finer than the declared one.
    """
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    caches: dict[str, tuple[tuple[str, How], ...]] = {"": ()}
    for name, dtype in half.items():
        caches[f"keys and values rounded to {name}"] = _cached(rounded_to(dtype))
        caches[f"keys and values rounded to {name}, read in decode steps only"] = _cached(rounded_to(dtype), True)
    for over, scale in {(-1,): "a scale a token and head", (-2, -1): "a scale a token"}.items():
        text = f"keys and values rounded to int8, {scale}"
        caches[text] = _cached(_int8(over))
        caches[f"{text}, read in decode steps only"] = _cached(_int8(over), True)
    products = {"": ()} | {f"{name} products": products_in(dtype) for name, dtype in half.items()}
    mixing: dict[str, tuple[tuple[str, How], ...]] = {"": ()}
    for name, dtype in half.items():
        mixing[f"attention probabilities rounded to {name}"] = (("attend", attention(round_p=dtype)),)
    mixing["queries rounded to float16"] = (("attend", attention(round_q=torch.float16)),)
    found = []
    for product, a in products.items():
        for cache, b in caches.items():
            for mix, c in mixing.items():
                text = " + ".join(part for part in (product, cache, mix) if part)
                if text:
                    found.append(Mistake(text, made(a, b, c), choice=True))
    narrow = {name: rounded_to(dtype) for name, dtype in half.items()}
    for name, change in narrow.items():
        stream = tuple(
            (step, lambda run, right, *args, change=change: change(right(*args)))
            for step in ("attn_norm", *ALL, "mlp_norm", "act", "product", "attend", "norm", "rotate_q", "rotate_k")
        )
        found.append(Mistake(f"{name} activations, the residual stream in float32",
                             made(stream, products_in(half[name])), choice=True))  # fmt: skip
    return tuple(found)
