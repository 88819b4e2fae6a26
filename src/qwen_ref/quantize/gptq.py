"""GPTQ checkpoints (AutoGPTQ v1, as Qwen's Int4 and Int8 releases are): packed weights, found, cut and used.

In every layer five modules have, for their weight (out, in), four tensors (see rounding.py for what they
mean). All else, embedding, norms, bias and head, is as in any other checkpoint.

    qweight (in · bits / 32, out)   qzeros (groups, out · bits / 32)   scales (groups, out)   g_idx (in)

load_model dequantises them, to plain layers; or keeps them packed, which takes a quarter or a half of the
memory: then a layer's weight is dequantised anew whenever it is used. That works anywhere, and is slow.
qwen_ref.fast makes faster layers of packed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qwen_ref.config import InputError, some
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.rounding import FewBits, check_groups, dequantize_gptq, unpack, zero_points

PARTS = ("qweight", "qzeros", "scales", "g_idx")
KINDS = {"packed tensors": ("I32",), "scales": ("BF16", "F16", "F32")}  # with the dtypes of each


class TensorSpec(Protocol):
    """A row of the table of tensors: checkpoint.py has it, and imports this file."""

    @property
    def published(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def cut(self) -> str | None: ...


class StoredTensor(Protocol):
    """A tensor by its file's header: checkpoint.py's."""

    @property
    def published(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> Tensor: ...


def is_packed(spec: TensorSpec) -> bool:
    """Whether a GPTQ checkpoint has this tensor packed: the matrices of the layers."""
    return spec.published.startswith("transformer.h.") and len(spec.shape) == 2


def module_of(spec: TensorSpec) -> str:
    """The published name of the module that a weight belongs to."""
    return spec.published.removesuffix(".weight")


def packed_shapes(spec: TensorSpec, gptq: GPTQConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the four tensors that stand for a weight, by their published names."""
    outputs, inputs = spec.shape
    groups = gptq.groups(inputs)
    shapes = (
        (inputs * gptq.bits // 32, outputs),
        (groups, outputs * gptq.bits // 32),
        (groups, outputs),
        (inputs,),
    )
    return {f"{module_of(spec)}.{part}": shape for part, shape in zip(PARTS, shapes, strict=True)}


def unpackable(table: Iterable[TensorSpec], gptq: GPTQConfig) -> str | None:
    """What is wrong where a weight's inputs or outputs do not fill words."""
    word = 32 // gptq.bits
    uneven = sorted({size for spec in table if is_packed(spec) for size in spec.shape if size % word})
    if not uneven:
        return None
    return (
        f"{', '.join(map(str, uneven))} inputs or outputs do not fill words of {word} weights: they cannot "
        f"be packed in {gptq.bits} bits"
    )


def expected(
    table: Iterable[TensorSpec], gptq: GPTQConfig
) -> tuple[dict[str, tuple[tuple[int, ...], str]], set[str]]:
    """Shape and kind of every tensor of a GPTQ checkpoint, by published name; those that may be missing."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    optional = set()
    for spec in table:
        if not is_packed(spec):
            found[spec.published] = spec.shape, "weights"
            continue
        for name, shape in packed_shapes(spec, gptq).items():
            found[name] = shape, "scales" if name.endswith(".scales") else "packed tensors"
        if spec.cut != "heads":  # AutoGPTQ wrote a bias of zeros for every module
            bias = f"{module_of(spec)}.bias"
            found[bias] = spec.shape[:1], "weights"
            optional.add(bias)
    return found, optional


def contradiction(
    table: Iterable[TensorSpec], gptq: GPTQConfig, found: Mapping[str, StoredTensor]
) -> str | None:
    """What contradicts GPTQ as a whole: matrices that are not packed, sizes that cannot be packed."""
    matrices = [spec for spec in table if is_packed(spec)]
    plain = [spec.published for spec in matrices if spec.published in found]
    packed = [spec for spec in matrices if f"{module_of(spec)}.qweight" in found]
    if plain:
        mixed = f" and {len(packed)} that are" if packed else ""
        return (
            f"the configuration says GPTQ, {gptq.bits} bits, where every matrix of the layers is packed; "
            f"here are {len(plain)} that are not{mixed}: {some(plain)}"
        )
    return unpackable(matrices, gptq)


def with_packed(table: Iterable[TensorSpec], gptq: GPTQConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by the table's names. Four packed ones, if their headers are right, stand for a weight."""
    stored = {}
    for spec in table:
        if not is_packed(spec):
            if spec.published in found:
                stored[spec.published] = found[spec.published]
            continue
        wanted, _ = expected([spec], gptq)
        parts = tuple(
            found[name]
            for name, shape in packed_shapes(spec, gptq).items()
            if name in found and found[name].shape == shape and found[name].dtype in KINDS[wanted[name][1]]
        )
        if len(parts) == len(PARTS):
            bias = None if spec.cut == "heads" else found.get(f"{module_of(spec)}.bias")
            stored[spec.published] = StoredPacked(parts, bias, gptq)
    return stored


def known_problems(
    table: Iterable[TensorSpec], gptq: GPTQConfig, found: Mapping[str, StoredTensor]
) -> list[str]:
    """What is wrong with the values of those weights whose headers are right, where other headers are not."""
    matrices = [spec for spec in table if is_packed(spec)]
    return [line for packed in with_packed(matrices, gptq, found).values() for line in packed.problems()]


class PackedWeight(NamedTuple):
    """A weight (out, in), or a rank's part of it, as it is packed."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        return dequantize_gptq(*self)

    def to(self, device: torch.device) -> PackedWeight:
        qweight, qzeros, scales, g_idx = (tensor.to(device) for tensor in self[:4])
        return PackedWeight(qweight, qzeros, scales, g_idx, self.bits)

    def part(self, cut: str | None, rank: int, ranks: int) -> PackedWeight:
        """A rank's part, cut as TensorSpec.part cuts the weight."""
        if ranks == 1:
            return self
        if cut == "columns":
            g_idx = self.g_idx.chunk(ranks)[rank]
            used, g_idx = g_idx.unique(return_inverse=True)
            rows = self.qweight.chunk(ranks)[rank].contiguous()
            return PackedWeight(rows, self.qzeros[used], self.scales[used], g_idx.int(), self.bits)

        def outputs(x: Tensor) -> Tensor:
            thirds = x.unflatten(1, (3 if cut == "heads" else 1, -1))
            return thirds.chunk(ranks, dim=2)[rank].flatten(1)

        qweight, qzeros, scales = map(outputs, (self.qweight, self.qzeros, self.scales))
        return PackedWeight(qweight, qzeros, scales, self.g_idx, self.bits)

    def check_even(self) -> None:
        """Raises ValueError where groups are of different sizes."""
        groups = len(self.scales)
        counts = self.g_idx.long().bincount(minlength=groups)
        if not (counts == len(self.g_idx) // groups).all():
            raise InputError(
                f"its groups, here, are of {int(counts.min())} to {int(counts.max())} inputs, and faster "
                "layers take groups of one size; use --packed instead of --fast, which takes all"
            )

    def few_bits(self) -> FewBits:
        """The same weight for the layers of qwen_ref.fast; raises what check_even does."""
        self.check_even()
        groups, inputs = len(self.scales), len(self.g_idx)
        in_order = bool((self.g_idx.diff() >= 0).all())
        order = None if in_order else self.g_idx.long().argsort(stable=True)
        scale = self.scales.t().float()  # (out, groups)
        middle = 1 << (self.bits - 1)
        offset = (middle - zero_points(self.qzeros, self.bits).t()) * scale

        def rows(outputs: slice) -> tuple[Tensor, Tensor, Tensor]:
            q = unpack(self.qweight[:, outputs], self.bits, dim=0).to(torch.uint8).t()
            return (q if order is None else q[:, order]), scale[outputs], offset[outputs]

        return FewBits((self.qweight.shape[1], inputs), self.bits, inputs // groups, rows, order)


class StoredPacked(NamedTuple):
    """A packed weight of a checkpoint by its files' headers; it has a StoredTensor's methods."""

    parts: tuple[StoredTensor, ...]  # in the order of PARTS
    zero_bias: StoredTensor | None  # AutoGPTQ wrote one for every module
    gptq: GPTQConfig

    @property
    def packed(self) -> StoredPacked:
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        words, outputs = self.parts[0].shape
        return (outputs, words * 32 // self.gptq.bits)

    @property
    def module(self) -> str:
        return self.parts[0].published.removesuffix(".qweight")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.parts if self.zero_bias is None else (*self.parts, self.zero_bias)

    @property
    def dtype(self) -> str:
        """That of the scales, as safetensors names it: what the other weights have, too."""
        return self.parts[2].dtype

    @property
    def form(self) -> str:
        return f"int{self.gptq.bits}, {self.gptq.grouping}"

    def bytes_of_rank(self, spec: TensorSpec, ranks: int) -> int:
        """Where inputs are cut, by what the settings say of the groups: g_idx is not read for it."""
        qweight, qzeros, scales, g_idx = (part.nbytes for part in self.parts)
        if spec.cut != "columns":
            return (qweight + qzeros + scales) // ranks + g_idx
        own = (qzeros + scales) // (1 if self.gptq.anywhere else ranks)
        return (qweight + g_idx) // ranks + own

    def read(self) -> Tensor:
        """The weight, (out, in) float32."""
        return self._packed().dequantized()

    def part(self, spec: TensorSpec, rank: int, ranks: int, device: torch.device | None = None) -> Tensor:
        """A rank's part, dequantised on the device."""
        part = self._packed().part(spec.cut, rank, ranks)
        return (part if device is None else part.to(device)).dequantized()

    def keep_in(
        self,
        layer: nn.Module,
        spec: TensorSpec,
        rank: int,
        ranks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Gives a layer a rank's part as it is packed (see keep_packed)."""
        assert isinstance(layer, nn.Linear)
        keep_packed(layer, self._packed().part(spec.cut, rank, ranks).to(device), dtype)

    def _packed(self) -> PackedWeight:
        qweight, qzeros, scales, g_idx = (part.read() for part in self.parts)
        return PackedWeight(qweight, qzeros, scales, g_idx, self.gptq.bits)

    def problems(self) -> list[str]:
        """What is wrong with scales, zero points, groups and bias. qweight is not read: any bits will do."""
        qzeros, scales, g_idx = (part.read() for part in self.parts[1:])
        found = [
            _group_problem(g_idx, self.gptq),
            None if torch.isfinite(scales).all() else "scales are NaN or infinite; fetch the file again",
            _zero_problem(qzeros, self.gptq.bits) if self.gptq.sym else None,
        ]
        problems = [f"{self.module}: {problem}" for problem in found if problem is not None]
        if self.zero_bias is not None and self.zero_bias.read().any():
            problems.append(f"{self.module}.bias is not zero: only the q, k, v projection may have a bias")
        return problems


def _group_problem(g_idx: Tensor, gptq: GPTQConfig) -> str | None:
    """In any order of the inputs, each group must have group_size of them, and the last one the rest."""
    inputs, groups = len(g_idx), gptq.groups(len(g_idx))
    try:
        check_groups(g_idx, groups)
    except ValueError as error:
        return str(error)
    size = inputs if gptq.group_size == -1 else gptq.group_size
    for group, count in enumerate(g_idx.long().bincount(minlength=groups).tolist()):
        wanted = min(size, inputs - group * size)
        if count != wanted:
            return (
                f"g_idx puts {count} of {inputs} inputs into group {group}, should be {wanted} for "
                f"{gptq.grouping}; the file is damaged, or group_size is wrong"
            )
    return None


def _zero_problem(qzeros: Tensor, bits: int) -> str | None:
    """With sym, every zero point must be the middle of the range.

    A v2 file read as v1 would put every weight off by its scale: such models say "!!!!". Without sym, zero
    points cannot tell the formats apart; only checkpoint_format in the settings can.
    """
    middle = 1 << (bits - 1)
    zeros = zero_points(qzeros, bits)
    low, high = int(zeros.min()), int(zeros.max())
    if low == high == middle:
        return None
    if low == high == middle + 1:
        return (
            f"zero points are stored as {middle}: this is GPTQ v2, in which they are not stored less 1; only "
            "v1 is read; export it again with checkpoint_format gptq"
        )
    return (
        f"zero points are {low} to {high}, but where sym is true they are all {middle}; the file is damaged, "
        "or sym is wrong"
    )


# Layers whose weight stays packed


class _Dequantized(nn.Module):
    """What torch's parametrize calls for the weight whenever it is asked for."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        for name in PARTS:
            self.register_buffer(name, getattr(packed, name))
        self.bits = packed.bits

    def _apply(self, fn: Callable, recurse: bool = True) -> _Dequantized:
        """What .to(), .half() and the like do: a cast changes the weight's dtype, not that of the scales."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def packed(self) -> PackedWeight:
        return PackedWeight(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits)

    def forward(self, nothing: Tensor) -> Tensor:
        return self.packed().dequantized().to(nothing.dtype)


def keep_packed(layer: nn.Linear, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Gives a layer a weight that is dequantised to dtype whenever it is used."""
    nothing = torch.empty(0, dtype=dtype, device=packed.qweight.device)
    layer.weight = nn.Parameter(nothing, requires_grad=False)
    parametrize.register_parametrization(layer, "weight", _Dequantized(packed), unsafe=True)


def packed_weight(layer: nn.Module) -> tuple[PackedWeight, torch.dtype] | None:
    """What keep_packed gave a layer, if it did."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    weight = cast(nn.ModuleDict, layer.parametrizations)["weight"]
    assert isinstance(weight, parametrize.ParametrizationList)
    return cast(_Dequantized, weight[0]).packed(), cast(Tensor, weight.original).dtype
