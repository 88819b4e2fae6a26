"""Slips in the rotation of queries and keys, in LogN and in dynamic NTK."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen_ref import model
from qwen_ref.config import QwenConfig
from qwen_ref.parity.forward import Forward, How, copies
from qwen_ref.parity.mistakes.grammar import Slip, known, slip

# Rotation


def _turned(tables: Callable[[Forward], tuple[Tensor, Tensor]]) -> How:
    """Rotation with other cosines and sines. They are made once a run."""

    def how(run: Forward, right: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if tables not in run.made:
            run.made[tables] = tables(run)
        return right(x, *(copies(table, len(x)) for table in run.made[tables]))

    return how


def moved(move: Callable[[Forward], Tensor]) -> How:
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


def decoded(run: Forward, positions: Tensor) -> Tensor:
    """True where a position (1 or B, T) was a decode step."""
    return (torch.arange(positions.shape[1]) >= run.prefill_length)[None]


def decoded_moved(by: Callable[[Forward, Tensor], Tensor]) -> How:
    """Decode steps are rotated by other positions."""
    return moved(lambda run: torch.where(decoded(run, run.positions), by(run, run.positions), run.positions))


def _scaled(factor: float) -> How:
    return _turned(lambda run: run.tables(run.positions * factor))


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
            cos, sin = run.tables(
                run.positions, _frequencies(run, exponents=lambda i, K: i[: size // 2] / size)
            )
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


def _single_angles(run: Forward) -> tuple[Tensor, Tensor]:
    frequencies = model.rotary_frequencies(run.config, run.lengths, torch.float32)
    cos, sin = run.tables(run.positions, frequencies)
    return cos.to(run.wide), sin.to(run.wide)


single_tables = _turned(_single_angles)  # in a float64 model: the published code's


def _narrow_angles(run: Forward) -> tuple[Tensor, Tensor]:
    # Both in bfloat16, so that their product and its cosines and sines are bfloat16, too.
    cos, sin = run.tables(run.positions.bfloat16(), run.frequencies.bfloat16())
    return cos.to(run.wide), sin.to(run.wide)


def _narrow_tables(dtype: torch.dtype) -> How:
    return lambda run, right, x, cos, sin: right(x, cos.to(dtype).to(cos.dtype), sin.to(dtype).to(sin.dtype))


def of_rotation(config: QwenConfig) -> Iterator[Slip]:
    both = "rotate_q rotate_k"
    unturned: How = lambda run, right, x, cos, sin: x
    yield known("interleaved RoPE: neighbours (2i, 2i + 1) turned together, not halves", both, _interleaved)
    for base in (1e4, 1e5, 5e5, 1e6, 1e7):
        if base != config.rotary_emb_base:
            yield Slip(f"RoPE base {base:g} for {config.rotary_emb_base:g}", rope_base(base), common=True)
    # Nobody can see it but for its rounding: only differences of positions count.
    yield known("RoPE positions counted from 1", both, moved(lambda run: run.positions + 1), choice=True)
    shifts: dict[str, Callable[[Forward, Tensor], Tensor]] = {
        "one too high": lambda run, at: at + 1,
        "one too low": lambda run, at: at - 1,
        "all 0": lambda run, at: torch.zeros_like(at),
    }
    for text, by in shifts.items():
        yield known(f"RoPE positions of decoded tokens {text}", both, decoded_moved(by))
    others: dict[str, Callable[[Forward, Tensor], Tensor]] = {
        "begin again at 0": lambda run, at: at - run.prefill_length,
        "begin again at 1": lambda run, at: at - run.prefill_length + 1,
        "stay at the first one's": lambda run, at: torch.full_like(at, run.prefill_length),
        "stay at the prompt's last": lambda run, at: torch.full_like(at, run.prefill_length - 1),
        "two too high": lambda run, at: at + 2,
    }
    for text, by in others.items():
        yield slip(f"RoPE positions of decoded tokens {text}", both, decoded_moved(by))
    ahead = moved(lambda run: run.positions + 1)
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
    yield slip(
        "RoPE in float16: the inverse frequencies",
        both,
        _turned(lambda run: run.tables(run.positions, run.frequencies.half().to(run.wide))),
    )
    yield known("no RoPE", both, unturned)
    yield slip("RoPE on keys only: queries not rotated", "rotate_q", unturned)
    yield slip("RoPE on queries only: keys not rotated", "rotate_k", unturned)
    yield slip(
        "RoPE on v as well",
        "values",
        lambda run, right, v: model.rotate(v, copies(run.cos, len(v)), copies(run.sin, len(v))),
    )
    yield slip("RoPE done twice", both, lambda run, right, x, cos, sin: right(right(x, cos, sin), cos, sin))
    turned_back: How = lambda run, right, x, cos, sin: right(x, cos, -sin)
    yield slip("RoPE with the angle's sign turned", both, turned_back)
    yield slip("RoPE with the angle's sign turned, in queries only", "rotate_q", turned_back)
    yield slip("RoPE with the angle's sign turned, in keys only", "rotate_k", turned_back)
    yield slip("RoPE with cosine and sine swapped", both, lambda run, right, x, cos, sin: right(x, sin, cos))
    yield slip("RoPE without the minus: x₁ cos + x₂ sin", both, _unsigned)
    for share, name in ((0.5, "half"), (0.25, "a quarter"), (0.75, "three quarters")):
        yield slip(
            f"RoPE on {name} of the head's dimensions, with its frequencies", both, _of_head(share, True)
        )
        yield slip(f"RoPE on {name} of the head's dimensions, with the head's", both, _of_head(share, False))
    yield slip("RoPE on the last half of the head's dimensions", both, _of_head(0.5, True, last=True))
    yield slip("RoPE on the first half of the heads only", both, _of_heads(True))
    yield slip("RoPE on the last half of the heads only", both, _of_heads(False))
    scaled = {"doubled": 2.0, "halved": 0.5, "quartered": 0.25, "divided by 8": 0.125, "times 4": 4.0}
    for text, factor in scaled.items():
        how = _scaled(factor)
        yield slip(f"RoPE positions {text}", both, how)
    yield slip(
        "RoPE positions counted from the end",
        both,
        moved(lambda run: run.positions.max() - run.positions),
        whole=True,
    )
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
    yield slip(
        "RoPE frequencies times 2π",
        both,
        _turned(lambda run: run.tables(run.positions, run.frequencies * 2 * math.pi)),
    )


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


def _table(run: Forward) -> Tensor:
    assert run.factors is not None  # these are tried with LogN only
    return run.factors


def _keys_scaled(run: Forward, right: Callable, x: Tensor) -> Tensor:
    return x if run.factors is None else x * copies(run.factors, len(x))[..., None, None]


def _always(length: int) -> Callable[[int], int]:
    return lambda _: length


def moved_alike(by: int) -> tuple[tuple[str, How], ...]:
    """All positions are so many further on, in RoPE and in LogN."""
    ahead = moved(lambda run: run.positions + by)
    return (
        ("rotate_q", ahead),
        ("rotate_k", ahead),
        ("scale_q", _factors(lambda run: run.logn(run.positions + by))),
    )


def of_logn(config: QwenConfig) -> Iterator[Slip]:
    unscaled: How = lambda run, right, q, factors: q
    yield known("no LogN", "scale_q", unscaled)
    yield Slip(
        "LogN on keys instead of queries", (("scale_q", unscaled), ("keys", _keys_scaled)), common=True
    )
    yield known("LogN on keys and queries", "keys", _keys_scaled)
    ratios: dict[str, tuple[Callable[[Tensor, int], Tensor], bool]] = {
        "log10 of the position over the natural logarithm of the length": (
            lambda n, s: _log_ratio(n, s) * _LOG10,
            True,
        ),
        "natural logarithm of the position over log10 of the length": (
            lambda n, s: _log_ratio(n, s) / _LOG10,
            True,
        ),
        "log2 of the position over the natural logarithm of the length": (
            lambda n, s: _log_ratio(n, s) * _LOG2,
            False,
        ),
        "natural logarithm of the position over log2 of the length": (
            lambda n, s: _log_ratio(n, s) / _LOG2,
            False,
        ),
        "the square root of the position over the length": (lambda n, s: (n / s).sqrt(), False),
        "the root of the ratio of logarithms": (lambda n, s: _log_ratio(n, s).sqrt(), False),
        "the ratio itself, without logarithms": (lambda n, s: n / s, False),
        "1 + the logarithm of position over length": (lambda n, s: 1 + (n / s).log(), False),
        "the ratio of logarithms turned round": (lambda n, s: 1 / _log_ratio(n, s), False),
        "done twice": (lambda n, s: _log_ratio(n, s) ** 2, False),
        "logarithms of 1 + n": (lambda n, s: n.log1p() / math.log1p(s), False),
    }
    for text, (ratio, common) in ratios.items():
        how = _factors(functools.partial(_logn_table, factor=ratio))
        yield slip(f"LogN: {text}", "scale_q", how, common=common)
    yield known("LogN off by one: log(p) for 0-based positions p", "scale_q", _log_shifted(-1))
    yield known("LogN off by one: log(p + 2) for 0-based positions p", "scale_q", _log_shifted(1))
    ahead = moved(lambda run: run.positions + 1)
    yield Slip(
        "positions counted from 1, in RoPE and in LogN",
        (("rotate_q", ahead), ("rotate_k", ahead), ("scale_q", _factors(_positions_from_1))),
        common=True,
    )
    yield slip(
        "LogN within the trained length as well",
        "scale_q",
        _factors(functools.partial(_logn_table, factor=_log_ratio, clamp=False)),
    )
    yield slip(
        "LogN of the prompt's length for every position",
        "scale_q",
        _factors(lambda run: run.logn(torch.full_like(run.positions, run.prompt_length - 1))),
    )
    yield slip(
        "LogN of the whole length for every position",
        "scale_q",
        _factors(lambda run: run.logn(torch.full_like(run.positions, run.T - 1))),
        whole=True,
    )
    yield slip("LogN on v as well", "values", _keys_scaled)
    yield Slip("LogN on v instead of queries", (("scale_q", unscaled), ("values", _keys_scaled)))
    yield slip(
        "LogN: the table in bfloat16", "scale_q", _factors(lambda run: _table(run).bfloat16().to(run.dtype))
    )
    yield slip(
        "LogN: the table in float16", "scale_q", _factors(lambda run: _table(run).half().to(run.dtype))
    )
    yield slip(
        "LogN in decode steps only",
        "scale_q",
        _factors(lambda run: torch.where(decoded(run, run.positions), _table(run), 1.0).to(run.dtype)),
    )
    yield slip(
        "LogN in the prompt only",
        "scale_q",
        _factors(lambda run: torch.where(decoded(run, run.positions), 1.0, _table(run)).to(run.dtype)),
    )
    lengths = {2 * config.seq_length, config.seq_length // 2, 2048, 8192, 32768} - {config.seq_length}
    for length in sorted(length for length in lengths if length > 1):
        text = f"LogN with seq_length {length} for {config.seq_length}"
        table = functools.partial(_logn_table, factor=_log_ratio, seq_length=_always(length))
        least = length if length > config.seq_length else 0  # up to there it is as if LogN were off
        yield slip(text, "scale_q", _factors(table), longer_than=least)
        if config.use_dynamic_ntk:
            turned = with_frequencies(alpha=lambda n, _, s=length: model.ntk_alpha(n, s))
            hows = ("scale_q", _factors(table)), ("rotate_q", turned), ("rotate_k", turned)
            text = f"seq_length {length} for {config.seq_length}, in LogN and in NTK"
            yield Slip(text, hows, longer_than=least)
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


def of_ntk(config: QwenConfig) -> Iterator[Slip]:
    both, s = "rotate_q rotate_k", config.seq_length
    if not config.use_dynamic_ntk:
        how = _turned(
            lambda run: run.tables(
                run.positions,
                model.rotary_frequencies(replace(run.config, use_dynamic_ntk=True), run.lengths, run.wide),
            )
        )
        yield slip("NTK though use_dynamic_ntk is false", both, how, alone=False)
        return
    yield known("NTK off: α stays 1", both, with_frequencies(alpha=lambda n, s: 1))
    yield known("NTK with floor for ceil", both, with_frequencies(alpha=_floor_alpha))
    yield known("NTK's α recomputed at every decode step, older keys as they were", both, _turned(_each_step))
    log = lambda n, s: math.log2(n / s)
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
    yield slip(
        "NTK: α of the whole length, decoded tokens too",
        both,
        _turned(
            lambda run: run.tables(
                run.positions,
                _frequencies(run, lengths=[n + run.T - run.prefill_length for n in run.lengths]),
            )
        ),
        whole=True,
    )
    yield slip(
        "NTK: positions divided by α instead of a greater base",
        both,
        _turned(
            lambda run: run.tables(
                run.positions / model.ntk_alpha(run.lengths[0], s), _frequencies(run, alpha=lambda n, s: 1)
            )
        ),
    )
    yield slip(
        "NTK: positions divided by length / seq_length instead of a greater base",
        both,
        _turned(
            lambda run: run.tables(
                run.positions / max(run.lengths[0] / s, 1), _frequencies(run, alpha=lambda n, s: 1)
            )
        ),
    )
    padded = _turned(lambda run: run.tables(run.positions, _frequencies(run, lengths=[run.prompt_length])))
    yield known("padding counted in NTK's α", both, padded, alone=False)
    counted = _turned(
        lambda run: run.tables(torch.arange(run.T)[None], _frequencies(run, lengths=[run.prompt_length]))
    )
    yield Slip(
        "padding counted in positions and in NTK's α",
        (("rotate_q", counted), ("rotate_k", counted), ("scale_q", counted_logn)),
        common=True,
        alone=False,
    )


def counted_logn(run: Forward, right: Callable, q: Tensor, factors: Tensor | None) -> Tensor:
    return right(q, None if factors is None else run.logn(torch.arange(run.T)[None]))
