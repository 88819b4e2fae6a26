"""What ports of Qwen get wrong: each mistake is a change to a Port, and none is in model.py.

Each function takes a right Port and makes a mistake in it. The mistakes are independent, so that two can be
made in one port.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.checkpoint import DTYPES
from qwen_ref.config import QwenConfig
from qwen_ref.parity.stages import Port

Make = Callable[[Port], None]
P = ParamSpec("P")

CLAMPED = "float16 overflow, clamped to 65504"


@dataclass(frozen=True)
class Mistake:
    """One mistake: what it is, in words, and how it is made in a right port."""

    text: str
    make: Make
    # Ports that compute in half precision usually do this: there it is rounding and no mistake.
    usual_in_half: bool = False
    # The mistake is only the rounding of this dtype: `diagnose` judges it by the size of the error.
    dtype: str | None = None


def mistakes(config: QwenConfig) -> list[Mistake]:
    """Every known mistake that can be made with a model."""
    bases = [base for base in (1e4, 1e5, 5e5, 1e6, 1e7) if base != config.rotary_emb_base]
    epsilons = [eps for eps in (1e-5, 1e-6, 1e-8, 1e-3) if eps != config.layer_norm_epsilon]
    known = [
        Mistake("interleaved RoPE: neighbours (2i, 2i + 1) turned together, not halves", _interleaved),
        *(Mistake(f"RoPE base {base:g} for {config.rotary_emb_base:g}", rope_base(base)) for base in bases),
        Mistake("RoPE positions counted from 1", _positions_from_1(logn=False)),
        Mistake("RoPE positions of decoded tokens one too high", _decoded_position(1)),
        Mistake("RoPE positions of decoded tokens one too low", _decoded_position(-1)),
        Mistake("RoPE positions of decoded tokens all 0", _decoded_at_0),
        Mistake("queries rotated one position ahead of keys", _rotated_ahead(0)),
        Mistake("keys rotated one position ahead of queries", _rotated_ahead(1)),
        Mistake("RoPE in bfloat16: positions, frequencies and angles", _bfloat16_angles),
        Mistake("RoPE in bfloat16: the inverse frequencies", _bfloat16_frequencies),
        Mistake("RoPE in bfloat16: cosines and sines", _narrow_tables(torch.bfloat16), usual_in_half=True),
        Mistake("RoPE in float16: cosines and sines", _narrow_tables(torch.float16), usual_in_half=True),
        Mistake("no RoPE", _with(rotate=lambda x, cos, sin: x)),
        Mistake("gate and up swapped", _renamed({"gate": "up", "up": "gate"})),
        Mistake("bias of q, k and v missing", _no_bias),
        *(
            Mistake("q, k and v taken from c_attn's {}, {} and {} third".format(*order), _qkv_order(order))
            for order in ("kqv", "vkq", "qvk", "kvq", "vqk")
        ),
        Mistake("rows of c_attn read head by head: q, k and v of head 0, then of head 1, …", _qkv_by_head),
        Mistake("rows of c_attn stored head by head, but read as [q; k; v]", _qkv_to_heads),
        *(
            Mistake(f"layer_norm_epsilon {eps:g} for {config.layer_norm_epsilon:g}", norm_epsilon(eps))
            for eps in epsilons
        ),
        Mistake(
            "norm weight applied before the cast to the model's dtype", _with(normalise=_weight_before_cast)
        ),
        Mistake("norm computed in the model's dtype", _with(normalise=_narrow_norm)),
        Mistake("no final norm", _no_final_norm),
        Mistake("ln_1 and ln_2 swapped", _renamed({"attn_norm": "mlp_norm", "mlp_norm": "attn_norm"})),
        Mistake("no LogN", _configured(use_logn_attn=False)),
        Mistake("LogN on keys instead of queries", _logn_on_keys(queries=False)),
        Mistake("LogN on keys and queries", _logn_on_keys(queries=True)),
        Mistake("LogN: log10 of the position over the natural logarithm of the length", _logn_ratio(_LOG10)),
        Mistake("LogN: natural logarithm of the position over log10 of the length", _logn_ratio(1 / _LOG10)),
        Mistake("LogN off by one: log(p) for 0-based positions p", _logn_shifted(-1)),
        Mistake("LogN off by one: log(p + 2) for 0-based positions p", _logn_shifted(1)),
        Mistake("positions counted from 1, in RoPE and in LogN", _positions_from_1(logn=True)),
        Mistake("NTK off: α stays 1", _configured(use_dynamic_ntk=False)),
        Mistake("NTK with floor for ceil", _with(ntk_alpha=_floor_alpha)),
        Mistake("NTK's α recomputed at every decode step, older keys as they were", _alpha_every_step),
        Mistake("NTK's α recomputed at every decode step, all keys with it", _uncached),
        Mistake("no 1/√K in the scores", _score_scale(lambda config: 1.0)),
        Mistake("scores scaled by 1/√D, not 1/√K", _score_scale(lambda config: config.hidden_size**-0.5)),
        Mistake("attention not causal", _not_causal),
        Mistake("padding not masked", _padding_seen),
        Mistake("attention_mask ignored: padding seen and counted", _with(mask=None)),
        Mistake("padding counted in positions", _padding_counted(positions=True, ntk=False)),
        Mistake("padding counted in NTK's α", _padding_counted(positions=False, ntk=True)),
        Mistake("padding counted in positions and in NTK's α", _padding_counted(positions=True, ntk=True)),
        Mistake("head tied: logits with the embedding's matrix", _renamed({"lm_head": "embed"})),
        Mistake("embedding tied: ids looked up in the head's matrix", _renamed({"embed": "lm_head"})),
        Mistake("c_attn transposed: each of its three squares", _transposed("qkv", 3)),
        Mistake("c_attn transposed: its buffer read as (D, 3D)", _conv1d),
        Mistake("attention's c_proj transposed", _transposed("out", 1)),
        Mistake("GELU for SiLU", _with(silu=F.gelu)),
        Mistake("GELU (tanh) for SiLU", _with(silu=lambda x: F.gelu(x, approximate="tanh"))),
        Mistake("ReLU for SiLU", _with(silu=F.relu)),
        Mistake("last layer dropped", _layer_dropped(last=True)),
        Mistake("first layer dropped", _layer_dropped(last=False)),
        *(
            Mistake(f"computed in {dtype}", _with(dtype=DTYPES[dtype]), dtype=dtype)
            for dtype in ("bfloat16", "float16", "float32")
        ),
        Mistake(CLAMPED, _with(dtype=torch.float16, saturates=True)),
    ]
    needs = {"LogN": config.use_logn_attn, "NTK": config.use_dynamic_ntk}
    return [mistake for mistake in known if all(used for name, used in needs.items() if name in mistake.text)]


def _with_settings(change: Callable[Concatenate[Port, P], None]) -> Callable[P, Make]:
    """A change that needs more than the port: called with the rest, it gives the mistake."""

    def given(*settings: P.args, **named: P.kwargs) -> Make:
        return lambda port: change(port, *settings, **named)

    return given


@_with_settings
def _with(port: Port, **values: Any) -> None:
    """The port with other functions or settings of its own."""
    for name, value in values.items():
        setattr(port, name, value)


@_with_settings
def _configured(port: Port, **values: Any) -> None:
    """The port with other values in its configuration."""
    port.config = replace(port.config, **values)


# Rotation


def _interleaved(port: Port) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
        wide = x.to(cos.dtype)
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
        return (wide * cos + turned * sin).to(x.dtype)

    port.rotate = rotate


def rope_base(base: float) -> Make:
    """The mistake of another rotary_emb_base."""
    return _configured(rotary_emb_base=base)


def _moved(port: Port, move: Callable[[Tensor], Tensor], logn: bool = True) -> None:
    """Changes positions by `move`, in the rotation and in LogN."""
    tables, scale = port.rotation_tables, port.logn_scale
    port.rotation_tables = lambda positions, frequencies: tables(move(positions), frequencies)
    if logn:
        port.logn_scale = lambda positions, *args: scale(move(positions), *args)


@_with_settings
def _positions_from_1(port: Port, logn: bool) -> None:
    _moved(port, lambda positions: positions + 1, logn)


@_with_settings
def _decoded_position(port: Port, by: int) -> None:
    port.stepwise = True  # a call that does not begin at the first token is a step
    _moved(port, lambda positions: positions + by * (positions[:, :1] > 0), logn=False)


def _decoded_at_0(port: Port) -> None:
    port.stepwise = True
    _moved(port, lambda positions: positions - positions[:, :1], logn=False)


@_with_settings
def _rotated_ahead(port: Port, which: int) -> None:
    """Rotates queries (0) or keys (1) as if they were one position later."""
    tables, rotate = port.rotation_tables, port.rotate
    ahead: Sequence[Tensor] = ()
    calls = 0

    def both(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal ahead, calls
        ahead, calls = tuple(tables(positions + 1, frequencies)), 0
        return tables(positions, frequencies)

    def rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        nonlocal calls
        calls += 1  # of each layer the query comes first, then the key
        return rotate(x, *(ahead if (calls - 1) % 2 == which else (cos, sin)))

    port.rotation_tables, port.rotate = both, rotate_one


def _bfloat16_angles(port: Port) -> None:
    tables = port.rotation_tables

    def narrow(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        # Both in bfloat16, so that their product and its cosines and sines are bfloat16, too.
        cos, sin = tables(positions.bfloat16(), frequencies.bfloat16())
        return cos.to(frequencies.dtype), sin.to(frequencies.dtype)

    port.rotation_tables = narrow


def _bfloat16_frequencies(port: Port) -> None:
    tables = port.rotation_tables
    port.rotation_tables = lambda positions, frequencies: tables(
        positions, frequencies.bfloat16().to(frequencies.dtype)
    )


@_with_settings
def _narrow_tables(port: Port, dtype: torch.dtype) -> None:
    tables = port.rotation_tables

    def narrow(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = tables(positions, frequencies)
        return cos.to(dtype).to(cos.dtype), sin.to(dtype).to(sin.dtype)

    port.rotation_tables = narrow


# Weights


@_with_settings
def _renamed(port: Port, names: dict[str, str]) -> None:
    """Reads a weight in place of another. names: part of a name → the part that replaces it."""
    weight = port.weight

    def read(name: str) -> Tensor:
        return weight(".".join(names.get(part, part) for part in name.split(".")))

    port.weight = read


def _changed(port: Port, ending: str | tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    """Changes the weights whose names have this ending, or one of these."""
    weight = port.weight
    port.weight = lambda name: change(weight(name)) if name.endswith(ending) else weight(name)


def _no_bias(port: Port) -> None:
    _changed(port, "qkv.bias", torch.zeros_like)


@_with_settings
def _qkv_order(port: Port, order: str) -> None:
    def reorder(weight: Tensor) -> Tensor:
        thirds = dict(zip("qkv", weight.chunk(3), strict=True))
        return torch.cat([thirds[part] for part in order])

    _changed(port, ("qkv.weight", "qkv.bias"), reorder)


def _rows_regrouped(port: Port, shape: Sequence[int]) -> None:
    def regroup(weight: Tensor) -> Tensor:
        return weight.unflatten(0, shape).transpose(0, 1).reshape(weight.shape)

    _changed(port, ("qkv.weight", "qkv.bias"), regroup)


def _qkv_by_head(port: Port) -> None:
    _rows_regrouped(port, (port.config.num_attention_heads, 3, port.config.kv_channels))


def _qkv_to_heads(port: Port) -> None:
    _rows_regrouped(port, (3, port.config.num_attention_heads, port.config.kv_channels))


@_with_settings
def _transposed(port: Port, matrix: str, squares: int) -> None:
    def transpose(weight: Tensor) -> Tensor:
        return torch.cat([square.t() for square in weight.chunk(squares)])

    _changed(port, f"{matrix}.weight", transpose)


def _conv1d(port: Port) -> None:
    _changed(port, "qkv.weight", lambda weight: weight.reshape(weight.shape[1], -1).t())


@_with_settings
def _layer_dropped(port: Port, last: bool) -> None:
    layers = port.config.num_hidden_layers
    if layers == 1:
        return
    port.config = replace(port.config, num_hidden_layers=layers - 1)
    weight = port.weight

    def read(name: str) -> Tensor:
        head, _, rest = name.partition(".")
        if head == "blocks" and not last:
            number, _, rest = rest.partition(".")
            name = f"blocks.{int(number) + 1}.{rest}"
        return weight(name)

    port.weight = read


# Norms


def norm_epsilon(eps: float) -> Make:
    """The mistake of another layer_norm_epsilon."""
    return _configured(layer_norm_epsilon=eps)


def _weight_before_cast(norm: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (normed * norm.weight.to(wide.dtype)).to(x.dtype)


def _narrow_norm(norm: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def _no_final_norm(port: Port) -> None:
    normalise = port.normalise

    def all_but_last(norm: nn.Module, x: Tensor) -> Tensor:
        return x if norm.qualified_name == "norm" else normalise(norm, x)

    port.normalise = all_but_last


# LogN and NTK

_LOG10 = 1 / math.log(10)


@_with_settings
def _logn_on_keys(port: Port, queries: bool) -> None:
    scale, attend = port.logn_scale, port.scaled_dot_product_attention

    def attend_scaled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if port.config.use_logn_attn:
            positions = (torch.arange(k.shape[2]) - port.padding[:, None]).clamp(min=0)  # (B, S)
            k = k * scale(positions, port.config.seq_length, k.dtype)[:, None, :, None]
        return attend(q, k, v, **options)

    port.scaled_dot_product_attention = attend_scaled
    if not queries:
        port.logn_scale = lambda positions, seq_length, dtype: torch.ones_like(positions, dtype=dtype)


@_with_settings
def _logn_ratio(port: Port, factor: float) -> None:
    """Two kinds of logarithm in one ratio: LogN's factor is wrong by the ratio of the two."""
    scale = port.logn_scale

    def mixed(positions: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
        right = scale(positions, seq_length, torch.float64)
        return torch.where(positions + 1 > seq_length, right * factor, 1.0).to(dtype)

    port.logn_scale = mixed


@_with_settings
def _logn_shifted(port: Port, by: int) -> None:
    scale = port.logn_scale
    port.logn_scale = lambda positions, *args: scale(positions + by, *args)


def _floor_alpha(length: int, seq_length: int) -> int:
    return max(2 ** math.floor(math.log2(length / seq_length) + 1) - 1, 1)


def _alpha_every_step(port: Port) -> None:
    if not port.config.use_dynamic_ntk:
        return
    port.stepwise = True
    tables, frequencies_of = port.rotation_tables, port.rotary_frequencies

    def recomputed(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        lengths = (positions[:, -1] + 1).tolist()
        return tables(positions, frequencies_of(port.config, lengths, frequencies.dtype))

    port.rotation_tables = recomputed


def _uncached(port: Port) -> None:
    if port.config.use_dynamic_ntk:  # without it, the same numbers at a greater cost
        port.cached = False


# Attention, activation


def _attended(port: Port, **changed: Any) -> None:
    """Calls scaled_dot_product_attention with other options."""
    attend = port.scaled_dot_product_attention
    port.scaled_dot_product_attention = lambda *args, **options: attend(*args, **options | changed)


@_with_settings
def _score_scale(port: Port, scale: Callable[[QwenConfig], float]) -> None:
    _attended(port, scale=scale(port.config))


def _not_causal(port: Port) -> None:
    port.stepwise = True  # in a step the new token sees all keys anyway
    _attended(port, is_causal=False)

    def all_seen(T: int, S: int, padding: Tensor | None, device: torch.device) -> Tensor:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool)
        return mask if padding is None else mask & (torch.arange(S) >= padding[:, None, None, None])

    port.causal_mask = all_seen


def _padding_seen(port: Port) -> None:
    mask = port.causal_mask
    port.causal_mask = lambda T, S, padding, device: mask(T, S, None, device)


@_with_settings
def _padding_counted(port: Port, positions: bool, ntk: bool) -> None:
    """Counts padding in positions, as batches of the published code do, or in the prompt's length: in α."""
    padding = port.padding
    if not padding.any():
        return
    if positions:
        _moved(port, lambda found: found + padding[:, None])
    if ntk:
        port.fix_alpha(port.prefill_length)
