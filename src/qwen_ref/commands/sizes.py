"""What a model weighs, for every rank that shares it: `python -m qwen_ref.checkpoint inspect FOLDER`.

Everything comes from the table of tensors and the files' headers; no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qwen_ref.checkpoint import STORED_DTYPES, Stored, StoredTensor, TensorSpec, dtype_name
from qwen_ref.config import QwenConfig
from qwen_ref.model import KVCache, Qwen
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import StoredPacked, with_packed
from qwen_ref.quantize.gptq import expected as gptq_tensors


class Kind(NamedTuple):
    """The tensors of all layers that are alike: `*` stands for the layer in their name."""

    name: str
    count: int
    spec: TensorSpec
    form: str  # the dtype, or how it is packed
    stored: Stored  # the last of them


def expected(table: Sequence[TensorSpec], gptq: GPTQConfig | None) -> dict[str, Stored]:
    """What the files of a configuration should hold: bfloat16; in a GPTQ release float16 and packed weights.

    It has the zero biases that AutoGPTQ wrote.
    """
    if gptq is None:
        return {spec.published: StoredTensor(None, spec.published, spec.shape, "BF16") for spec in table}
    shapes, _ = gptq_tensors(table, gptq)
    dtypes = {"weights": "F16", "scales": "F16", "packed tensors": "I32"}
    found = {name: StoredTensor(None, name, shape, dtypes[kind]) for name, (shape, kind) in shapes.items()}
    return with_packed(table, gptq, found)


def kinds(table: Sequence[TensorSpec], stored: dict[str, Stored]) -> list[Kind]:
    """The table with one row a kind."""
    found: dict[tuple, Kind] = {}
    for spec in table:
        tensor = stored[spec.published]
        form = tensor.form if tensor.packed else dtype_name(STORED_DTYPES[tensor.dtype])
        name = re.sub(r"\.\d+\.", ".*.", spec.published)
        count = found[name, form].count if (name, form) in found else 0
        found[name, form] = Kind(name, count + 1, spec, form, tensor)
    return list(found.values())


def weight_bytes(kind: Kind, ranks: int = 1) -> int:
    """Bytes of all tensors of a kind, of each of so many ranks."""
    return kind.count * kind.stored.bytes_of_rank(kind.spec, ranks)


def packed_kinds(rows: Sequence[Kind]) -> list[Kind]:
    return [row for row in rows if isinstance(row.stored, StoredPacked)]


def resident_bytes(model: Qwen) -> int:
    """Bytes of a loaded model's weights, plain or fast, on this rank."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def held_bytes(cache: KVCache) -> int:
    """Bytes of a cache of any kind: its keys and values, and scales where it has them."""
    lists = [held for held in vars(cache).values() if isinstance(held, list)]
    return sum(each.nbytes for held in lists for each in held if isinstance(each, torch.Tensor))


def cache_bytes(config: QwenConfig, context: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of the keys and values of one sequence of so many positions, of each rank.

    >>> cache_bytes(QwenConfig.preset("72b"), 1, torch.bfloat16)  # 2.6 MB a token
    2621440
    """
    heads = config.num_attention_heads // ranks
    return 2 * config.num_hidden_layers * heads * config.kv_channels * context * dtype.itemsize
