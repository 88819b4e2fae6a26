"""`python -m qwen_ref.checkpoint inspect FOLDER`: does it fit, how fast can it be; tensors and their bytes.

For any number of ranks. memory.py says what the estimates leave out.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qwen_ref.checkpoint import INDEX_NAME, STORED_DTYPES, dtype_name, tensor_table
from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.files import checkpoint_folder
from qwen_ref.commands.memory import estimate
from qwen_ref.commands.settings import add_hub_options
from qwen_ref.commands.sizes import Kind, bias_bytes, cache_bytes, expected, kinds, weight_bytes
from qwen_ref.commands.tables import aligned
from qwen_ref.config import LARGEST_LENGTH, InputError, QwenConfig
from qwen_ref.loading.files import PICKLE_SUFFIXES
from qwen_ref.loading.folder import require_folder
from qwen_ref.loading.hub import CONFIG, instead, repository
from qwen_ref.loading.loader import opened, say_notes
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import unpackable


def report(
    config: QwenConfig, rows: Sequence[Kind], ranks: int, context: int, dtype: torch.dtype
) -> Iterator[str]:
    """The lines of `inspect`: a table of the tensors, then what a rank must hold."""
    yield (
        f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads of {config.kv_channels}, "
        f"hidden size {config.hidden_size}, MLP {config.mlp_width}, vocabulary {config.vocab_size}"
    )
    yield ""
    table = [["tensor", "count", "form", "cut", "shape", "bytes", "shape of a rank", "bytes of a rank"]]
    for row in rows:
        table.append(
            [
                row.name,
                str(row.number),
                row.form,
                row.spec.cut or "whole",
                " × ".join(map(str, row.spec.shape)),
                f"{weight_bytes(row):,}",
                " × ".join(map(str, row.spec.shape_of_rank(ranks))),
                f"{weight_bytes(row, ranks):,}",
            ]
        )
    sides = "<><<<><>"
    if ranks == 1:  # without the cut and the columns of a rank
        table, sides = [line[:3] + line[4:6] for line in table], "<><<>"
    yield from aligned(table, sides)
    yield ""
    stored, own = (sum(weight_bytes(row, n) for row in rows) for n in (1, ranks))
    packed = [row for row in rows if row.stored.packed is not None]
    copied = sum(weight_bytes(row, ranks) for row in packed or rows if packed or row.spec.cut == "columns")
    cache, own_cache = (cache_bytes(config, context, dtype, n) for n in (1, ranks))
    count = sum(row.number * math.prod(row.spec.shape) for row in rows)
    yield _total(f"weights, {count:,} parameters", stored, own, ranks)
    yield _total(f"keys and values of {context:,} positions, {dtype_name(dtype)}", cache, own_cache, ranks)
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
    path = Path(args.model)
    stored = None
    there = os.path.exists(args.model)  # False, too, for what no path can be
    if not there and repository(args.model) is None:
        try:
            config = QwenConfig.preset(args.model.lower())
        except InputError as error:
            meant = instead(args.model)
            also = "" if meant is None else f"; {meant}"
            raise InputError(f"{args.model or repr('')}: no such folder, and {error}{also}") from None
        _refuse_hub_options(args, "a size")
    elif there and not path.is_dir():
        if path.suffix != ".json" or path.name == INDEX_NAME:
            require_folder(path)
        _refuse_hub_options(args, "a file")
        config = QwenConfig.from_json(path)
    elif not _has_weights(path := checkpoint_folder(args, CONFIG)):
        config = QwenConfig.from_json(path / "config.json")
    else:
        config, stored, notes = opened(path)
        say_notes(notes)
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
    print("\n".join(estimate(config, rows, args.tp, context, gptq)), end="\n\n")
    if stored is None:
        forms = " and ".join(sorted({row.form for row in rows}))
        print(f"from the configuration alone: weights as they should be, in {forms}")
    dtype = STORED_DTYPES[rows[0].stored.dtype]
    print("\n".join(report(config, rows, args.tp, context, dtype)))
    if biases := sum(map(bias_bytes, rows)):
        whose = "that such files often have" if stored is None else "of the files"
        print(f"not counted: {biases:,} bytes of zero biases {whose}; none is kept in memory")
    sys.stdout.flush()
    return 0


def _refuse_hub_options(args: argparse.Namespace, what: str) -> None:
    """Raises InputError where --revision or --download is given with a model that is in no hub."""
    for option in ("revision", "download"):
        if getattr(args, option):
            raise InputError(f"--{option} goes with a name as Qwen/Qwen-1_8B; {args.model} is {what}")


def _has_weights(folder: Path) -> bool:
    suffixes = (".safetensors", *PICKLE_SUFFIXES)
    return any(path.suffix in suffixes for path in folder.iterdir())


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.checkpoint", description="Look at a checkpoint without loading it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="does it fit, how fast can it be; tensors, shapes, dtypes, and the bytes of each rank",
        description="Print whether the model fits into this machine's memory and the least time of a decode "
        "step, then every kind of tensor, its cut, and what a rank must hold. No weight is read.",
    )
    inspect.add_argument(
        "model",
        metavar="FOLDER",
        help="a checkpoint folder, a folder that has only config.json, a name as Qwen/Qwen-1_8B, or one of "
        "1.8b, 7b, 14b, 72b",
    )
    add_hub_options(inspect)
    inspect.add_argument("--tp", type=int, default=1, metavar="N", help="for N ranks (default: 1)")
    inspect.add_argument(
        "--context", type=int, metavar="T", help="with a cache of T positions (default: the trained length)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m qwen_ref.checkpoint`; returns its exit code (see cli.run)."""
    return run(_parser(), inspect, arguments)
