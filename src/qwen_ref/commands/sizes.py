"""Bytes: of the tensors of a checkpoint and of a cache on each rank, and of a model and a cache in memory.

The first two come from the table of tensors and from the files' headers; no weight is read. So do the bytes
of the forms that qwen_ref.fast gives the weights. Those are with one thread a rank: more threads have other
blocks, which differ by up to 0.4 %.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qwen_ref.checkpoint import STORED_DTYPES, Stored, StoredTensor, TensorSpec, dtype_name
from qwen_ref.config import QwenConfig
from qwen_ref.fast.matrices import block_width, kernel_group
from qwen_ref.model import KVCache, Qwen
from qwen_ref.quantize.config import INT4_GROUP, INT4_GROUPS, GPTQConfig
from qwen_ref.quantize.gptq import StoredPacked, is_packed, with_packed
from qwen_ref.quantize.gptq import expected as gptq_tensors


class Kind(NamedTuple):
    """The tensors that are alike in all layers: `*` stands for the layer in their name."""

    name: str
    number: int  # of such tensors
    spec: TensorSpec
    form: str  # the dtype, or how it is packed
    stored: Stored  # the last of them


def expected(table: Sequence[TensorSpec], gptq: GPTQConfig | None) -> dict[str, Stored]:
    """What the files of a configuration should hold: bfloat16; in a GPTQ release float16 and packed weights.

    That of GPTQ includes the zero biases that AutoGPTQ wrote.
    """
    if gptq is None:
        return {spec.published: StoredTensor(None, spec.published, spec.shape, "BF16") for spec in table}
    shapes, _ = gptq_tensors(table, gptq)
    dtypes = {"weights": "F16", "scales": "F16", "packed tensors": "I32"}
    found = {name: StoredTensor(None, name, shape, dtypes[kind]) for name, (shape, kind) in shapes.items()}
    return with_packed(table, gptq, found)


def kinds(table: Sequence[TensorSpec], stored: dict[str, Stored]) -> list[Kind]:
    """The table with one row for each kind."""
    found: dict[tuple, Kind] = {}
    for spec in table:
        tensor = stored[spec.published]
        form = tensor.packed.form if tensor.packed is not None else dtype_name(STORED_DTYPES[tensor.dtype])
        name = re.sub(r"\.\d+\.", ".*.", spec.published)
        number = found[name, form].number if (name, form) in found else 0
        found[name, form] = Kind(name, number + 1, spec, form, tensor)
    return list(found.values())


def weight_bytes(kind: Kind, ranks: int = 1) -> int:
    """Bytes of all tensors of a kind, on each rank."""
    return kind.number * kind.stored.bytes_of_rank(kind.spec, ranks)


def bias_bytes(kind: Kind) -> int:
    """Bytes of the zero biases that AutoGPTQ wrote, of all tensors of a kind."""
    if not isinstance(kind.stored, StoredPacked) or kind.stored.zero_bias is None:
        return 0
    return kind.number * kind.stored.zero_bias.nbytes


def int4_group(config: QwenConfig, ranks: int) -> int | None:
    """Inputs that share a scale: 64, or 32 where a rank's inputs are no multiple of 64; None: nor of 32."""
    inputs = (config.hidden_size, config.hidden_size // ranks, config.mlp_width // ranks)
    groups = [size for size in INT4_GROUPS if size <= INT4_GROUP and all(n % size == 0 for n in inputs)]
    return max(groups, default=None)


def quantized_bytes(spec: TensorSpec, form: str, ranks: int, group: int | None) -> int:
    """What `--quantize` keeps of a tensor on a rank in bfloat16; form: "int8" or "int4", in such groups."""
    shape = spec.shape_of_rank(ranks)
    if len(shape) == 1 or spec.name == "embed.weight":
        return math.prod(shape) * torch.bfloat16.itemsize
    outputs, inputs = shape
    if form == "int8" or spec.name == "lm_head.weight":
        return _in_bytes(outputs, inputs, groups=1, numbers=1)
    assert group is not None
    if _added_up(spec, ranks):
        return _in_bytes(outputs, inputs, inputs // group, numbers=2)
    return _in_4_bits(outputs, inputs, group)


def packed_bytes(spec: TensorSpec, gptq: GPTQConfig, ranks: int) -> int:
    """What `--fast` keeps of a GPTQ checkpoint's tensor on a rank in bfloat16."""
    shape = spec.shape_of_rank(ranks)
    if not is_packed(spec):
        return math.prod(shape) * torch.bfloat16.itemsize
    outputs, inputs = shape
    group = inputs if gptq.group_size == -1 else gptq.group_size
    if gptq.bits == 4 and kernel_group(group) is not None and not _added_up(spec, ranks):
        return _in_4_bits(outputs, inputs, group)
    return _in_bytes(outputs, inputs, inputs // group, numbers=1 if gptq.sym else 2)


def _added_up(spec: TensorSpec, ranks: int) -> bool:
    """Whether results of ranks are: in float32, which torch's product of 4 bits does not give."""
    return ranks > 1 and spec.cut == "columns"


def _in_4_bits(outputs: int, inputs: int, group: int) -> int:
    """Of an Int4Matrix."""
    outputs = -(-outputs // 64) * 64  # torch packs so many at a time
    groups = inputs // (kernel_group(group) or group)
    return outputs * inputs // 2 + outputs * groups * 2 * torch.bfloat16.itemsize


def _in_bytes(outputs: int, inputs: int, groups: int, numbers: int) -> int:
    """Of an Int8Table; numbers: 1 for a scale, 2 for a scale and an offset, of an output and a group."""
    width = block_width(outputs, threads=1)
    blocks = -(-outputs // width)
    return blocks * (inputs * (width + 8) + width * groups * numbers * torch.float32.itemsize)


def resident_bytes(model: Qwen) -> int:
    """Bytes of a loaded model's weights, plain or fast, on this rank."""
    tensors = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return tensors + sum(getattr(module, "packed_bytes", 0) for module in model.modules())


def held_bytes(cache: KVCache) -> int:
    """Bytes of a cache of any kind: its keys and values, and scales where it has them."""
    lists = [held for held in vars(cache).values() if isinstance(held, list)]
    return sum(each.nbytes for held in lists for each in held if isinstance(each, torch.Tensor))


def cache_bytes(config: QwenConfig, context: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of the keys and values of one sequence with `context` positions, on each rank.

    >>> cache_bytes(QwenConfig.preset("72b"), 1, torch.bfloat16)  # 2.6 MB a token
    2621440
    """
    heads = config.num_attention_heads // ranks
    return 2 * config.num_hidden_layers * heads * config.kv_channels * context * dtype.itemsize
