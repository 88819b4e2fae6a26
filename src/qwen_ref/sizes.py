"""What a model weighs, for every rank that shares it: `python -m qwen_ref.checkpoint inspect FOLDER`.

Everything comes from the table of tensors and the files' headers; no weight is read.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from qwen_ref.checkpoint import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    STORED_DTYPES,
    Stored,
    StoredTensor,
    TensorSpec,
    open_checkpoint,
    tensor_table,
    with_packed,
)
from qwen_ref.config import LARGEST_LENGTH, GPTQConfig, InputError, QwenConfig, require_folder
from qwen_ref.gptq import StoredPacked, is_packed, module_of, packed_shapes, unpackable
from qwen_ref.model import KVCache, Qwen


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
    found = {}
    for spec in table:
        if gptq is None or not is_packed(spec):
            dtype = "BF16" if gptq is None else "F16"
            found[spec.published] = StoredTensor(None, spec.published, spec.shape, dtype)
            continue
        for name, shape in packed_shapes(spec, gptq).items():
            found[name] = StoredTensor(None, name, shape, "F16" if name.endswith(".scales") else "I32")
        bias = f"{module_of(spec)}.bias"  # that of the heads comes later, and is in the table
        found[bias] = StoredTensor(None, bias, spec.shape[:1], "F16")
    return found if gptq is None else with_packed(table, gptq, found)


def kinds(table: Sequence[TensorSpec], stored: dict[str, Stored]) -> list[Kind]:
    """The table with one row a kind."""
    found: dict[tuple, Kind] = {}
    for spec in table:
        tensor = stored[spec.published]
        form = tensor.form
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


def report(
    config: QwenConfig, rows: Sequence[Kind], ranks: int, context: int, dtype: torch.dtype
) -> Iterator[str]:
    """The lines of `inspect`: a table of the tensors, then what a rank must hold."""
    yield (
        f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads of {config.kv_channels}, "
        f"hidden size {config.hidden_size}, MLP {config.mlp_width}, vocabulary {config.vocab_size}"
    )
    yield ""
    cells = [("tensor", "count", "form", "cut", "shape", "bytes", "shape of a rank", "bytes of a rank")]
    for row in rows:
        cells.append(
            (
                row.name,
                str(row.count),
                row.form,
                row.spec.cut or "whole",
                " × ".join(map(str, row.spec.shape)),
                f"{weight_bytes(row):,}",
                " × ".join(map(str, row.spec.shape_of_rank(ranks))),
                f"{weight_bytes(row, ranks):,}",
            )
        )
    if ranks == 1:  # without the cut and what it gives
        cells = [line[:3] + line[4:6] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(
            cell.rjust(width) if title.startswith(("count", "bytes")) else cell.ljust(width)
            for title, cell, width in zip(cells[0], line, widths, strict=True)
        ).rstrip()
    yield ""
    stored, own = (sum(weight_bytes(row, n) for row in rows) for n in (1, ranks))
    packed = packed_kinds(rows)
    copied = sum(weight_bytes(row, ranks) for row in packed or rows if packed or row.spec.cut == "columns")
    cache, own_cache = (cache_bytes(config, context, dtype, n) for n in (1, ranks))
    count = sum(row.count * math.prod(row.spec.shape) for row in rows)
    name = str(dtype).removeprefix("torch.")
    yield _total(f"weights, {count:,} parameters", stored, own, ranks)
    yield _total(f"keys and values of {context:,} positions, {name}", cache, own_cache, ranks)
    yield _total("together", stored + cache, own + own_cache, ranks)
    if ranks > 1:
        yield (
            f"on the CPU each rank copies {_bytes(copied)}, its part of "
            f"{'the packed weights' if packed else 'what is cut by columns'}; "
            "all other large weights stay in the mapped files"
        )


def _total(what: str, whole: int, each: int, ranks: int) -> str:
    return f"{what}: {_bytes(whole)}" + (f"; each of {ranks} ranks: {_bytes(each)}" if ranks > 1 else "")


def _bytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e9:.3f} GB)"


def inspect(args: argparse.Namespace) -> int:
    """The command."""
    path = Path(args.folder)
    stored = None
    if not os.path.exists(args.folder):  # False, too, for what no path can be
        try:
            config = QwenConfig.preset(args.folder.lower())
        except InputError as error:
            raise InputError(f"{args.folder or repr('')}: no such folder, and {error}") from None
    elif not path.is_dir():
        if path.suffix != ".json" or path.name == INDEX_NAME:
            require_folder(path)
        config = QwenConfig.from_json(path)
    elif path.is_dir() and not _has_weights(path):
        config = QwenConfig.from_json(path / "config.json")
    else:
        config, stored = open_checkpoint(path)
    config.check_ranks(args.tp)
    gptq = None
    if path.exists():
        gptq = GPTQConfig.from_json(path if path.is_file() else path / "config.json")
    if gptq is not None:
        gptq.check_ranks(config, args.tp)
    context = config.seq_length if args.context is None else args.context
    if not 1 <= context <= LARGEST_LENGTH:
        raise InputError(f"--context {context} must be from 1 to {LARGEST_LENGTH}")
    table = tensor_table(config)
    if gptq is not None and (problem := unpackable(table, gptq)) is not None:
        raise InputError(f"{path}: {problem}")
    rows = kinds(table, expected(table, gptq) if stored is None else stored)
    if stored is None:
        forms = " and ".join(sorted({row.form for row in rows}))
        print(f"from the configuration alone: weights as they should be, in {forms}")
    dtype = STORED_DTYPES[rows[0].stored.dtype]
    print("\n".join(report(config, rows, args.tp, context, dtype)))
    biases = sum(
        row.count * row.stored.zero_bias.nbytes for row in packed_kinds(rows) if row.stored.zero_bias
    )
    if biases:
        whose = "that such files often have" if stored is None else "of the files"
        print(f"not counted: {biases:,} bytes of zero biases {whose}; none is kept in memory")
    sys.stdout.flush()
    return 0


def _has_weights(folder: Path) -> bool:
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    return any(path.name == INDEX_NAME or path.suffix in suffixes for path in folder.iterdir())
