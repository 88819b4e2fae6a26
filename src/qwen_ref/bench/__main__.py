"""`python -m qwen_ref.bench`: how fast a model is on this machine, beside what the machine can do.

A decode step reads every weight once, and the keys and values of every position. So memory bandwidth is the
limit. It is measured in the same run, in turns with the model and with its peers, because a machine that is
shared changes its speed from second to second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.bench.report import table
from qwen_ref.commands.cli import FAULT_LINE, Parser, Progress, on_stdout, run, to_stderr
from qwen_ref.commands.files import checkpoint_folder
from qwen_ref.commands.loading import load_as_asked, ranks_of_command
from qwen_ref.commands.ranks import TIMEOUT, Ranks, started_by_torchrun
from qwen_ref.commands.settings import add_dtype_option, add_model_option, add_speed_options, speed_options
from qwen_ref.config import InputError
from qwen_ref.quantize.config import GPTQConfig

if TYPE_CHECKING:
    from qwen_ref.bench.measure import Subject
    from qwen_ref.model import Qwen

_MOST = 10_000_000  # of anything that is counted: more is a mistake
_SIZES = ("1.8b", "7b", "14b", "72b")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.bench",
        description="Time a model on this machine, beside the rate at which the machine reads memory.",
        epilog="The table goes to stdout, everything else to stderr.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--synthetic",
        choices=_SIZES,
        metavar="SIZE",
        help=f"noise in the shape of a published model ({', '.join(_SIZES)}), written to a temporary folder",
    )
    add_model_option(parser, source)
    add("--layers", type=int, metavar="N", help="with --synthetic: so many of its layers")
    add(
        "--gptq",
        type=int,
        choices=[4, 8],
        metavar="BITS",
        help="with --synthetic: as a GPTQ release, in groups of 128, of 4 or 8 bits",
    )
    add_dtype_option(parser)
    add("--device", default="cpu", help="cpu, cuda, …")
    add_speed_options(parser)
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[16, 512],
        metavar="T",
        help="tokens of the prompts (default: 16 512); decoding is timed behind each",
    )
    add("--tokens", type=int, default=16, metavar="N", help="tokens decoded (default: %(default)s)")
    add("--batch", type=int, default=1, metavar="B", help="sequences at a time (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="R", help="(default: %(default)s)")
    add("--tp", type=int, default=1, metavar="N", help="cut the model among N ranks, started by torchrun")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help=argparse.SUPPRESS)
    add("--name", help=argparse.SUPPRESS)  # of the model, where --tp's ranks are given a temporary folder
    add(
        "--against",
        nargs="+",
        default=[],
        metavar="PEER",
        help="time these as well, in turns, with the same weights: hf is transformers' Qwen2 in the same "
        "dtype, hf:float32 in another one; plain is this implementation without --fast and --quantize; "
        "llama.cpp is in the form nearest to the model's, llama.cpp:q8_0 in another one of bf16, f16, f32, "
        "q8_0 and q4_0",
    )
    add("--json", action="store_true", help="print one JSON object, with every repeat")
    return parser


def _bench(args: argparse.Namespace) -> int:
    for name in ("tokens", "batch", "repeats", "tp", "layers"):
        _check_count(name, getattr(args, name))
    args.lengths = list(dict.fromkeys(args.lengths))
    for length in args.lengths:
        _check_count("lengths", length)
    if not args.device.startswith(("cpu", "cuda")):
        raise InputError(f"--device {args.device}: only cpu and cuda can be timed")
    if args.dtype != "auto":
        _check_dtype("--dtype", args.dtype)
    if args.layers is not None and args.synthetic is None:
        raise InputError("--layers needs --synthetic: a checkpoint has the layers that it has")
    if args.revision is not None and args.synthetic is not None:
        raise InputError("--revision goes with --model: noise has no revisions")
    if args.download and args.synthetic is not None:
        raise InputError("--download goes with --model: noise is made here")
    if args.gptq is not None and args.synthetic is None:
        raise InputError("--gptq needs --synthetic: a checkpoint says itself how it is packed")
    speed_options(args)
    launch = started_by_torchrun()
    if launch and args.tp > 1:
        raise InputError("--tp starts ranks of its own; leave it out under torchrun")
    if args.against and (launch or args.tp > 1):
        raise InputError("--against needs one process: leave --tp out")
    if not launch and args.tp > 1:
        from qwen_ref.loading.loader import check_cut

        with _folder(args) as folder:
            check_cut(folder, args.tp)
            return _launch(args, folder)
    if launch and args.synthetic is not None:
        raise InputError("under torchrun every rank would write a model of its own; use --tp instead")
    peers = [_peer(peer, args) for peer in args.against]
    if len(set(args.against)) < len(args.against):
        raise InputError(f"--against names one of these twice: {', '.join(args.against)}")
    with _folder(args) as folder, ranks_of_command(args.timeout) as ranks:
        ranks.meet(args.device)
        result = _measure(args, folder, ranks, peers)
        if ranks.rank == 0:
            text = json.dumps(result, ensure_ascii=False) if args.json else table(result)
            print(on_stdout(text), flush=True)
    return 0


def _name(args: argparse.Namespace) -> str:
    """Of the model, as a figure must name it."""
    return args.name or (f"{args.synthetic}, synthetic" if args.synthetic else str(args.model or "tiny"))


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= _MOST:
        raise InputError(f"--{name} {value} must be from 1 to {_MOST:,}")


def _check_dtype(option: str, dtype: str) -> None:
    from qwen_ref.checkpoint import DTYPES

    if dtype not in DTYPES:
        raise InputError(f"{option} {dtype}: use {', '.join(DTYPES)}")


def _folder(args: argparse.Namespace) -> contextlib.AbstractContextManager[Path]:
    if args.synthetic is not None:
        from qwen_ref.bench.synthetic import synthetic

        gptq = None if args.gptq is None else GPTQConfig(args.gptq, 128, desc_act=False, sym=True)
        return synthetic(args.synthetic, args.layers, gptq)
    return contextlib.nullcontext(checkpoint_folder(args))


def _peer(peer: str, args: argparse.Namespace) -> tuple[str, str]:
    """(which, dtype) of an --against; of llama.cpp, the form that is asked for or ""."""
    which, _, dtype = peer.partition(":")
    if which not in ("hf", "plain", "llama.cpp"):
        raise InputError(
            f"--against {peer}: use hf, plain or llama.cpp, or one of them in a dtype, as hf:float32"
        )
    if which == "llama.cpp":
        from qwen_ref.bench.llama import FORMS, require_llama

        if dtype and dtype not in FORMS:
            raise InputError(f"--against {which} in {dtype}: use {', '.join(FORMS)}")
        if args.batch > 1:
            raise InputError("--against llama.cpp times one sequence at a time: leave --batch out")
        if args.device != "cpu":
            raise InputError("--against llama.cpp is timed on the CPU: leave --device out")
        require_llama()
        return which, dtype
    if dtype:
        _check_dtype(f"--against {which} in", dtype)
    if which == "hf":
        from qwen_ref.bench.peers import require_transformers

        require_transformers()
    return which, dtype or args.dtype


def _launch(args: argparse.Namespace, folder: Path) -> int:
    """Starts the ranks by torchrun with the same options.

    torchrun reports a rank that failed by a traceback of no use. It is left out: the rank has said why.
    """
    from qwen_ref.bench.measure import cores

    options = ["--model", str(folder), "--name", _name(args), "--dtype", args.dtype, "--device", args.device]
    options += [f"--{name}={getattr(args, name)}" for name in ("tokens", "batch", "repeats", "timeout")]
    options += ["--lengths", *map(str, args.lengths), *speed_options(args)]
    options += ["--json"] * args.json
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.tp)]
    threads = max(1, cores() // args.tp)
    environment = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
    command = [sys.executable, *launcher, "-m", "qwen_ref.bench", *options]
    with (
        tempfile.TemporaryFile() as out,  # stdout may be a caller's own, which only this process has
        subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
        ) as process,
    ):
        try:
            assert process.stderr is not None  # it is a pipe
            for line in _of_ranks(process.stderr):
                to_stderr(line, end="")
            code = process.wait()
        except KeyboardInterrupt:  # torchrun, which has it as well, first ends the ranks
            process.wait()
            raise
        out.seek(0)
        print(on_stdout(out.read().decode("utf-8")), end="", flush=True)
    return 0 if code == 0 else 2


def _of_ranks(lines: Iterable[str]) -> Iterator[str]:
    """What the ranks say: our lines, and before the one that calls an error a fault of ours its traceback."""
    others: list[str] = []
    for line in lines:
        if not line.startswith("qwen_ref"):
            others.append(line)
            continue
        if FAULT_LINE in line:
            starts = [n for n, other in enumerate(others) if other.startswith("Traceback")]
            yield from others[max(starts, default=0) :]
        yield line
        others.clear()


def _measure(
    args: argparse.Namespace, folder: Path, ranks: Ranks, peers: list[tuple[str, str]]
) -> dict[str, Any]:
    import torch

    from qwen_ref.bench.measure import Memory, Subject, bytes_per_token, machine, measure
    from qwen_ref.checkpoint import dtype_name
    from qwen_ref.commands.sizes import held_bytes, resident_bytes
    from qwen_ref.fast.layers import kernels_in_words

    with Memory() as loading:
        start = time.perf_counter()
        model = load_as_asked(args, folder, ranks)
        seconds = time.perf_counter() - start
    dtype = dtype_name(model.embed.weight.dtype)
    ours = Subject(" ".join(["qwen_ref", dtype, *speed_options(args)]).replace("--", ""), model)
    with Memory() as running, torch.inference_mode():  # before others are loaded
        model.new_cache(args.batch, max(args.lengths) + args.tokens)  # says so where it does not fit
        ids = torch.zeros(args.batch, max(args.lengths), dtype=torch.int64, device=args.device)
        token = ours.prefill(ids, args.tokens)
        for _ in range(min(args.tokens, 4)):
            token = ours.decode(token)
        cache = held_bytes(ours.cache)
        ours.cache = None
    with contextlib.ExitStack() as files:
        subjects = [ours, *(_subject(*peer, args, folder, model, files) for peer in peers)]
        names = [subject.name for subject in subjects]
        if len(set(names)) < len(names):
            raise InputError(f"--against names one of these twice: {', '.join(names)}")
        with Progress("timing", unit="turns") as progress:
            timings = measure(
                subjects,
                args.lengths,
                tokens=args.tokens,
                batch=args.batch,
                repeats=args.repeats,
                device=args.device,
                progress=progress.update,
            )
    total_read = {length: bytes_per_token(model, length, args.batch) for length in args.lengths}
    of_llama = {}
    if any(which == "llama.cpp" for which, _ in peers):
        from qwen_ref.bench.llama import about_llama

        of_llama = {"llama.cpp": about_llama()}
    return {
        "machine": machine(args.device) | of_llama,
        "kernels": kernels_in_words(model),
        "model": _name(args),
        "layers": model.config.num_hidden_layers,
        "ranks": ranks.size,
        "batch": args.batch,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "load_seconds": seconds,
        "peak_memory": {
            "while loading": {"anonymous": loading.anonymous, "mapped": loading.mapped},
            "while running": {"anonymous": running.anonymous, "mapped": running.mapped},
            "cache": cache,
        },
        "resident_weights": resident_bytes(model),
        "bytes_per_token": total_read,
        "subjects": {
            subject.name: {length: timings[subject.name, length]._asdict() for length in args.lengths}
            for subject in subjects
        },
    }


def _subject(
    which: str, dtype: str, args: argparse.Namespace, folder: Path, ours: Qwen, files: contextlib.ExitStack
) -> Subject:
    """A peer, with the folder's weights. files: closed when all is timed."""
    from qwen_ref.bench.measure import Subject, TransformersSubject
    from qwen_ref.checkpoint import dtype_name, packing
    from qwen_ref.loading.loader import load_model

    if which == "llama.cpp":
        from qwen_ref.bench.llama import FORMS, llama_subject, nearest_form

        bits = {"int8": 8, "int4": 4}.get(args.quantize)
        gptq = packing(folder)
        if gptq is not None and (args.fast or args.packed):
            bits = gptq.bits
        form = dtype or nearest_form(ours.embed.weight.dtype, bits)
        positions = max(args.lengths) + args.tokens
        return files.enter_context(
            llama_subject(load_model(folder, FORMS[form] or args.dtype), form, positions)
        )
    plain = load_model(folder, dtype, args.device)
    name = dtype_name(plain.embed.weight.dtype)
    if which == "plain":
        return Subject(f"plain {name}", plain)
    from qwen_ref.bench.peers import qwen2

    return TransformersSubject(f"transformers {name}", qwen2(plain))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), _bench, arguments)


if __name__ == "__main__":
    sys.exit(main())
