"""What a model weighs, for every rank that shares it: `python -m qwen_ref.checkpoint inspect FOLDER`.

Everything comes from the table of tensors and the files' headers; no weight is read.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from qwen_ref.checkpoint import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    STORED_DTYPES,
    Stored,
    TensorSpec,
    open_checkpoint,
    tensor_table,
)
from qwen_ref.config import LARGEST_LENGTH, GPTQConfig, InputError, QwenConfig, require_folder
from qwen_ref.model import KVCache, Qwen


class Kind(NamedTuple):
    """The tensors of all layers that are alike: `*` stands for the layer in their name."""

    name: str
    count: int
    spec: TensorSpec
    form: str  # the dtype, or how it is packed
    stored: Stored | None  # the last of them; None: not there, as it would be in bfloat16


def kinds(table: Sequence[TensorSpec], stored: dict[str, Stored] | None) -> list[Kind]:
    """The table with one row a kind; without stored tensors, in bfloat16."""
    found: dict[tuple, Kind] = {}
    for spec in table:
        tensor = None if stored is None else stored[spec.published]
        form = "bfloat16" if tensor is None else tensor.form
        name = re.sub(r"\.\d+\.", ".*.", spec.published)
        count = found[name, form].count if (name, form) in found else 0
        found[name, form] = Kind(name, count + 1, spec, form, tensor)
    return list(found.values())


def weight_bytes(kind: Kind, ranks: int = 1) -> int:
    """Bytes of all tensors of a kind, of each of so many ranks."""
    if kind.stored is None:
        return kind.count * math.prod(kind.spec.shape_of_rank(ranks)) * torch.bfloat16.itemsize
    return kind.count * kind.stored.bytes_of_rank(kind.spec, ranks)


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
    columns = sum(weight_bytes(row, ranks) for row in rows if row.spec.cut == "columns")
    cache, own_cache = (cache_bytes(config, context, dtype, n) for n in (1, ranks))
    count = sum(row.count * math.prod(row.spec.shape) for row in rows)
    name = str(dtype).removeprefix("torch.")
    yield _total(f"weights, {count:,} parameters", stored, own, ranks)
    yield _total(f"keys and values of {context:,} positions, {name}", cache, own_cache, ranks)
    yield _total("together", stored + cache, own + own_cache, ranks)
    if ranks > 1:
        yield (
            f"on the CPU each rank copies {_bytes(columns)}, its part of what is cut by columns; "
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
    if path.is_dir() and (gptq := GPTQConfig.from_folder(path)) is not None:
        gptq.check_ranks(config, args.tp)
    context = config.seq_length if args.context is None else args.context
    if not 1 <= context <= LARGEST_LENGTH:
        raise InputError(f"--context {context} must be from 1 to {LARGEST_LENGTH}")
    rows = kinds(tensor_table(config), stored)
    if stored is None:
        print("from the configuration alone: weights as they should be, in bfloat16")
    dtype = torch.bfloat16 if stored is None else STORED_DTYPES[rows[0].stored.dtype]
    print("\n".join(report(config, rows, args.tp, context, dtype)), flush=True)
    return 0


def _has_weights(folder: Path) -> bool:
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    return any(path.name == INDEX_NAME or path.suffix in suffixes for path in folder.iterdir())
