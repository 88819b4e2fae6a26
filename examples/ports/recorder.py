"""What the recorders share: their options, and the bundle that they write.

A recorder runs an engine as it is installed and keeps the logits of all positions of one pass over given
token ids. `python -m qwen_ref.parity diagnose` then says how they differ from Qwen's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from qwen_ref import parity
from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.files import checkpoint_folder
from qwen_ref.commands.settings import add_model_option
from qwen_ref.config import InputError
from qwen_ref.parity.bundle import read_ids
from qwen_ref.parity.stages import Checkpoint

Record = Callable[[argparse.Namespace, Tensor], Tensor]
"""The options and ids (B, T) → logits (B, T, V) in the dtype in which the engine gives them."""


def versions(*packages: str) -> list[str]:
    """`name version` of each; ValueError where one is not installed."""
    try:
        return [f"{package} {version(package)}" for package in packages]
    except PackageNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install {error.name}") from None


def parser(doc: str, dtypes: Sequence[str]) -> Parser:
    made = Parser(description=doc.splitlines()[0])
    add_model_option(made)
    made.add_argument("--ids", type=Path, required=True, metavar="FILE", help="token ids, as for `record`")
    made.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    made.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="what the engine computes in")
    return made


def main(made: Parser, packages: Sequence[str], record: Record) -> None:
    """Records one bundle, and prints the packages' versions."""

    def command(args: argparse.Namespace) -> int:
        said = versions(*packages)
        ids, mask = read_ids(args.ids)
        if mask is not None:
            raise InputError(f"{args.ids} has rows of unequal length; a recorder takes rows of one length")
        args.model = checkpoint_folder(args)
        checkpoint = Checkpoint(args.model)
        if int(ids.max()) >= checkpoint.config.vocab_size:
            raise InputError(f"{args.ids}: token id {int(ids.max())} is outside the vocabulary")
        torch.set_num_threads(1)
        with torch.inference_mode():
            logits = record(args, ids)
        parity.write_bundle(
            args.out,
            ids,
            {"logits": logits},
            dtype=args.dtype,
            config=checkpoint.config,
            weights_sha256=parity.weights_checksum(checkpoint.stored),
        )
        print(", ".join(said))
        return 0

    sys.exit(run(made, command))
