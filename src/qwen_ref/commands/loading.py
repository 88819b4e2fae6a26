"""The ranks of a command, and the model of a folder, loaded as the options ask.

torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ref.commands.cli import Progress, say
from qwen_ref.commands.files import bundled_checkpoint, checkpoint_folder
from qwen_ref.commands.ranks import Ranks, started_by_torchrun
from qwen_ref.commands.settings import speed_options
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.loading.hub import TEXT
from qwen_ref.loading.tokenizer import FastTokenizer
from qwen_ref.quantize.config import INT4_GROUP
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.model import Qwen


def on_every_rank(
    args: argparse.Namespace,
    lead: Callable[[argparse.Namespace, Path, Ranks], int],
    follow: Callable[[argparse.Namespace, Path, Ranks], int],
    has_data: bool = False,
) -> int:
    """Runs a command with the checkpoint's folder and the ranks: lead on rank 0, follow on all others.

    has_data: see checkpoint_folder.
    """
    speed_options(args)
    with ranks_of_command(args.timeout, args.model or bundled_checkpoint(), args.revision) as ranks:
        try:
            folder = checkpoint_folder(args, TEXT, has_data)
        except InputError:
            if ranks.rank == 0 or args.download:
                raise
            folder = args.model  # load_model will say it on all ranks, once they have met
        return (lead if ranks.rank == 0 else follow)(args, folder, ranks)


def ranks_of_command(timeout: float, model: str | Path | None = None, revision: str | None = None) -> Ranks:
    """The ranks of this command, by torchrun's variables. torch is imported only if torchrun has started it.

    Raises InputError where the model is there and cannot be cut for so many ranks.
    """
    if not 0 < timeout < 1e6:
        raise InputError(f"{timeout=} must be a number of seconds above 0 and below 1,000,000")
    if not started_by_torchrun():
        return Ranks()
    # torch reads this variable when it is imported. By default it reports a lost connection with C++ stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from qwen_ref.commands.watch import WatchedRanks
    from qwen_ref.loading.launch import launched
    from qwen_ref.loading.loader import check_cut

    launch = launched()
    if launch is None or launch.size == 1:
        return Ranks()
    if model is not None:
        check_cut(model, launch.size, revision)
    return WatchedRanks(launch, timeout)


def open_folder(folder: Path, engine: str = "python") -> tuple[QwenConfig, Tokenizer]:
    """A checkpoint's configuration and its tokenizer; ValueError where they do not belong together.

    engine: the tokenizer's. "python" loads in less time, "tiktoken" encodes megabytes in less time.
    """
    config = QwenConfig.from_json(folder / "config.json")
    tokenizer = FastTokenizer.from_file(folder / "qwen.tiktoken", engine)
    if tokenizer.n_vocab > config.vocab_size:
        raise InputError(
            f"{folder}: qwen.tiktoken has {tokenizer.n_vocab} ids, the model vocab_size={config.vocab_size}; "
            "put the model's own qwen.tiktoken there"
        )
    return config, tokenizer


def load(args: argparse.Namespace, folder: Path, ranks: Ranks) -> Qwen:
    """The model, or this rank's part of it, as the options ask, once the ranks have met.

    Rank 0 prints a line about it.
    """
    from qwen_ref.checkpoint import dtype_name, packing, tensor_table
    from qwen_ref.commands.sizes import resident_bytes

    ranks.meet(args.device)
    start = time.perf_counter()
    model = load_as_asked(args, folder, ranks)
    if ranks.rank == 0:
        name = args.model or "the tiny checkpoint that comes with the project"
        count = sum(math.prod(spec.shape) for spec in tensor_table(model.config))
        gptq = packing(folder)
        dtype = dtype_name(model.embed.weight.dtype)
        form = args.quantize or dtype
        if gptq is not None:
            kept = "GPTQ," if args.packed or args.fast else "dequantised from"
            form = f"{form}, {kept} {gptq.bits} bits in {gptq.grouping},"
        each = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
        say(
            f"{name}: {count:,} parameters, {resident_bytes(model) / 1e9:.3f} GB of {form}{each} on "
            f"{args.device} in {time.perf_counter() - start:.2f} s"
        )
        if args.fast or args.quantize is not None:
            from qwen_ref.fast.layers import kernels_in_words, kernels_of

            say(f"kernels: {kernels_in_words(model)}")
            in_4_bits = args.quantize == "int4" or (gptq is not None and gptq.bits == 4)
            if in_4_bits and "int4" not in kernels_of(model).values():
                remedy = "--kernel int4" if dtype == "bfloat16" else "--dtype bfloat16 --kernel int4"
                say(f"note: each 4-bit weight takes a byte with these kernels; {remedy} keeps 4 bits")
    return model


def load_as_asked(args: argparse.Namespace, folder: Path, ranks: Ranks) -> Qwen:
    """load_model with the options of add_load_options, and with the layouts that they ask for."""
    from qwen_ref.checkpoint import packing
    from qwen_ref.loading.loader import load_model

    gptq = None
    with contextlib.suppress(InputError):  # load_model reports it, with all else that is wrong
        gptq = packing(folder)
    if gptq is not None and args.quantize is not None:
        raise InputError(
            f"{folder} is quantised already, to {gptq.bits} bits; --fast, without --quantize, uses those"
        )
    with Progress("loading") as progress:

        def update(done: int, total: int) -> None:
            if done == 0 and ranks.size > 1 and ranks.rank == 0:
                say(f"each of {ranks.size} ranks reads {total / 1e9:.3f} GB of the checkpoint")
            progress.update(done, total)

        group = "world" if ranks.size > 1 else None
        packed = args.packed or (args.fast and gptq is not None)
        revision = args.revision if folder == args.model else None  # else the folder is that revision's
        model = load_model(
            folder, args.dtype, args.device, group, packed=packed, progress=update, revision=revision
        )
    if args.fast or args.quantize is not None:
        from qwen_ref.fast.layers import fasten

        with Progress("laying out") as progress:
            group_size = args.group_size or INT4_GROUP
            fasten(model, args.quantize, group_size, kernel=args.kernel, progress=progress.update)
    if args.kv_cache is not None:
        from qwen_ref.fast.int8_cache import Int8Cache

        model.cache_type = Int8Cache
    return model
