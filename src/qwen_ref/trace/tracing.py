"""Every stage of a forward pass in numbers, and the lens: what each layer would predict next.

The stages and the model that streams its weights are the parity kit's (parity/stages.py).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwen_ref.config import InputError, QwenConfig, shown

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.parity.stages import Port

TOP = 5  # predictions of the lens

# All positions of a stage are in memory at once, of the logits V numbers each.
_MOST_TOKENS = 2**14
_MOST_LOGITS_BYTES = 2**32
_SLICE = 2**20  # numbers widened to float64 at a time


@dataclasses.dataclass(frozen=True)
class Stage:
    """One tensor of the forward pass in numbers: float64, over those of its values that are finite."""

    name: str  # the parity kit's
    layer: int | None  # None: embed, norm and logits
    axes: str  # model.py's letter for each dimension
    shape: tuple[int, ...]
    dtype: str
    mean: float | None  # this and the next three are None where no value is finite
    spread: float | None  # the standard deviation
    largest: float | None  # the value furthest from 0, with its sign
    where: tuple[int, ...] | None  # the index of largest, the first one among equals
    nan: int  # how many values are NaN
    infinite: int

    @property
    def short_name(self) -> str:
        """Without the layer."""
        return self.name.removeprefix(f"blocks.{self.layer}.")


class Prediction(NamedTuple):
    """A next token, and how probable it is."""

    token: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Lens:
    """What the last position would predict if the model ended here."""

    layer: int | None  # None: at the embedding, before any layer
    predictions: list[Prediction] | None  # the likeliest first; None: its logits are not finite


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass in numbers."""

    config: QwenConfig
    ids: list[int]
    dtype: str  # computed in
    layers: list[int]
    stages: list[Stage]  # in the order in which data flows: embed, those of the layers, norm, logits
    lens: list[Lens] | None  # at embed and after each of the layers


def trace(
    folder: str | Path,
    ids: Sequence[int],
    dtype: str = "auto",
    layers: Iterable[int] | None = None,
    top: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Runs a checkpoint on a prompt's T ids and describes every stage of some layers, by default of all.

    top: how many predictions of the lens; None: no lens. The lens of the last layer is the model's own
    prediction, to the bit. progress: called with the bytes of weights that are read, and of all to be read.

    It takes the memory of one matrix and the stages of one layer, or of the logits. Raises ValueError for a
    folder that is no checkpoint, for no ids, for ids or layers that the model does not have, and for too many
    tokens.

    >>> found = trace("weights", tokenizer.encode("冰岛的首都是"), top=1)
    >>> [(stage.name, stage.shape) for stage in found.stages][:2]
    [('embed', (1, 2, 128)), ('blocks.0.attn_norm', (1, 2, 128))]
    """
    import torch

    from qwen_ref.checkpoint import DTYPES
    from qwen_ref.generate import checked_ids
    from qwen_ref.parity.bundle import flow, layer_of, stage_widths
    from qwen_ref.parity.recording import Work
    from qwen_ref.parity.stages import Checkpoint, Port

    checkpoint = Checkpoint(folder)
    config, dtype = checkpoint.config, checkpoint.dtype(dtype)
    ids = checked_ids(ids, config.vocab_size)
    most = min(_MOST_TOKENS, _MOST_LOGITS_BYTES // (config.vocab_size * DTYPES[dtype].itemsize))
    if len(ids) > most:
        raise InputError(
            f"the prompt has {len(ids):,} tokens; a trace of this model in {dtype} takes at most {most:,}, "
            "since it holds all positions of a stage at once; give a shorter prompt"
        )
    asked = range(config.num_hidden_layers) if layers is None else layers
    try:
        layers = sorted({layer_number(config, operator.index(layer)) for layer in asked})
    except TypeError:
        raise InputError(f"layers must be a list of the layers' numbers, not {shown(layers)}") from None
    if top is not None and not (isinstance(top, int) and 1 <= top <= config.vocab_size):
        raise InputError(f"top={shown(top)} must be from 1 to the model's vocab_size={config.vocab_size}")

    port = Port(checkpoint, dtype, torch.tensor([ids], device="cpu"))
    work = Work(progress)
    work.expect(checkpoint.bytes + (0 if top is None else checkpoint.weight("lm_head.weight").nbytes))
    port.progress = work.did
    stages: list[Stage] = []
    last_logits: list[Tensor] = []  # (V)
    last: dict[int | None, Tensor] = {}  # the last position of the residual stream (D) at each layer's end

    def keep(name: str, value: Tensor, _: int) -> None:
        stages.append(describe(name, value))
        if top is not None and (name == "embed" or name.endswith(".residual")):
            last[layer_of(name)] = value[0, -1].clone()
        if name == "logits":
            last_logits.append(value[0, -1].clone())

    port.run(keep, [name for name in stage_widths(config) if layer_of(name) in (None, *layers)])
    stages.sort(key=lambda stage: flow(stage.name))
    lens = None if top is None else _lens(port, last, last_logits[0], top)
    return Trace(config, ids, dtype, layers, stages, lens)


def layer_number(config: QwenConfig, layer: int) -> int:
    """A layer's number from 0 on; -1, -2, … count from the end. ValueError if there is no such layer."""
    count = config.num_hidden_layers
    if not -count <= layer < count:
        raise InputError(
            f"there is no layer {layer}: this model has {count}, 0 to {count - 1}; -1 is the last one"
        )
    return layer % count


def _lens(port: Port, last: dict[int | None, Tensor], logits: Tensor, top: int) -> list[Lens]:
    import torch

    # All rows in one product. A product of one row rounds in another order, so the last layer's logits are
    # taken from the model itself.
    read = port.read_out(torch.stack(list(last.values())))  # (layers, V)
    final = port.config.num_hidden_layers - 1
    return [
        Lens(layer, _predictions(logits if layer == final else row, top))
        for layer, row in zip(last, read, strict=True)
    ]


def _predictions(logits: Tensor, top: int) -> list[Prediction] | None:
    """The likeliest of logits (V)."""
    if not logits.isfinite().all():
        return None
    probabilities, tokens = logits.double().softmax(dim=-1).topk(top)
    return [*map(Prediction, tokens.tolist(), probabilities.tolist())]


def describe(name: str, value: Tensor) -> Stage:
    """A stage's value (B, T, …) in numbers."""
    import torch

    from qwen_ref.checkpoint import dtype_name
    from qwen_ref.parity.bundle import layer_of

    count, total, largest, at = 0, 0.0, None, 0
    infinite = nan = 0
    flat = value.flatten()
    slices = flat.split(_SLICE)
    for number, part in enumerate(slices):
        finite = part.isfinite()
        inside = part[finite].double()
        nan += int(part.isnan().sum())
        infinite += int(part.isinf().sum())
        if not len(inside):
            continue
        count += len(inside)
        total += float(inside.sum())
        furthest = int(part.double().abs().masked_fill(~finite, -1).argmax())
        if largest is None or abs(float(part[furthest])) > abs(largest):
            largest, at = float(part[furthest]), number * _SLICE + furthest
    mean = total / count if count else None
    spread = None
    if mean is not None:  # from the mean, not from the squares: these would cancel
        squares = sum(float((part[part.isfinite()].double() - mean).square().sum()) for part in slices)
        spread = math.sqrt(squares / count)
    where = torch.unravel_index(torch.tensor(at, device="cpu"), value.shape)
    return Stage(
        name=name,
        layer=layer_of(name),
        axes=_axes(name, value),
        shape=tuple(value.shape),
        dtype=dtype_name(value.dtype),
        mean=mean,
        spread=spread,
        largest=largest,
        where=None if largest is None else tuple(map(int, where)),
        nan=nan,
        infinite=infinite,
    )


def _axes(name: str, value: Tensor) -> str:
    if value.ndim == 4:
        return "BTHK"
    if name.endswith(("mlp.gate", "mlp.up", "mlp.product")):
        return "BTF"
    return "BTV" if name == "logits" else "BTD"
