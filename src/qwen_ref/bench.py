"""`python -m qwen_ref.bench`: how fast a model is on this machine, beside what the machine can do.

To decode a token, every weight is read once, and the keys and values of every position. So the rate at which
memory can be read is the limit, and it is measured in the same run, in turns with the model and with whatever
the model is compared to: machines that are shared change their speed from second to second.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.cli import (
    FAULT_LINE,
    Parser,
    Progress,
    add_speed_options,
    bundled_checkpoint,
    on_stdout,
    run,
    speed_options,
    to_stderr,
)
from qwen_ref.config import GPTQConfig, InputError, QwenConfig, check_cut, require_folder
from qwen_ref.launch import TIMEOUT, Ranks, launched
from qwen_ref.settings import load_as_asked

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.model import Qwen

_MOST = 10_000_000  # of anything that is counted: more is a mistake
_SIZES = ("1.8b", "7b", "14b", "72b")
_READ_BYTES = 2**29  # of the buffer that the memory's rate is measured with


# The memory of this process, and its rate


def resident_memory() -> tuple[int, int] | None:
    """Bytes of this process in memory: anonymous ones, which no file backs, and pages of mapped files.

    None where the system does not tell, as only Linux does.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return tuple(int(status.split(name)[1].split()[0]) * 1024 for name in ("RssAnon:", "RssFile:"))
    except (OSError, IndexError, ValueError):
        return None


class Memory(threading.Thread):
    """The most memory of this process while the block runs, looked at every 5 ms, above that at its start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident_memory()
        self.over = threading.Event()

    def look(self) -> None:
        if self.peak is not None:
            self.peak = tuple(map(max, self.peak, resident_memory() or self.peak))

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.look()

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()
        self.look()

    @property
    def anonymous(self) -> int | None:
        """Bytes; None where they cannot be known."""
        return None if self.peak is None else self.peak[0] - self.start_bytes[0]

    @property
    def mapped(self) -> int | None:
        return None if self.peak is None else self.peak[1] - self.start_bytes[1]


class ReadRate:
    """Bytes per second at which this process's threads read memory: torch's sum of half a gigabyte."""

    def __init__(self, device: str) -> None:
        import torch

        self._sync = _sync(device)
        self._buffer = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=device)
        self.measure()

    def measure(self) -> float:
        with _Timer(self._sync) as timer:
            self._buffer.sum()
        return self._buffer.nbytes / timer.seconds


class _Timer:
    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync

    def __enter__(self) -> _Timer:
        self._sync()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self.seconds = time.perf_counter() - self._start


def _sync(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was asked for; a CPU has, when the call returns."""
    import torch

    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


# What is timed


class Subject:
    """A model that prefills prompts and decodes tokens; both return the ids (B, 1) that come next."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    def prefill(self, ids: Tensor, more: int) -> Tensor:
        """Puts a prompt (B, T) into a new cache, which has room for `more` tokens."""
        self.cache = self.model.new_cache(ids.shape[0], ids.shape[1] + more)
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        states = self.model.hidden_states(ids, cache=self.cache)
        logits = self.model.lm_head(states[:, -1], only_rank_0=True)
        token = ids.new_zeros(len(ids)) if logits is None else logits.argmax(dim=-1)
        return self.model.group.from_rank_0(token)[:, None]


class TransformersSubject(Subject):
    """transformers' Qwen2, with the cache that its generate uses."""

    def prefill(self, ids: Tensor, more: int) -> Tensor:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        done = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return done.logits[:, -1].argmax(dim=-1, keepdim=True)


class Timing(NamedTuple):
    """Of one subject at one length, a number for each repeat."""

    prefill: list[float]  # tokens per second
    first_token: list[float]  # seconds
    decode: list[float]  # tokens per second
    read_rate: list[float]  # of the memory, in turns with the decoded tokens, bytes per second


def measure(
    subjects: Sequence[Subject],
    lengths: Sequence[int],
    *,
    tokens: int,
    batch: int,
    repeats: int,
    device: str = "cpu",
    warm_up: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, int], Timing]:
    """Every subject's timings at every length, by (name, length).

    Subjects take turns within each repeat. A repeat prefills `length` tokens of every row and decodes
    `tokens` more, and after each of them the memory's rate is measured. Rates count the tokens of all rows.
    warm_up: a repeat before the others, which makes what is made once, is not counted.
    """
    import torch

    sync, rate = _sync(device), ReadRate(device)
    generator = torch.Generator().manual_seed(0)
    found = {(s.name, length): Timing([], [], [], []) for s in subjects for length in lengths}
    turns = itertools.product(range(-warm_up, repeats), lengths, subjects)
    for done, (repeat, length, subject) in enumerate(turns):
        progress(done, (repeats + warm_up) * len(lengths) * len(subjects))
        vocab_size = subject.model.config.vocab_size
        ids = torch.randint(vocab_size, (batch, length), generator=generator).to(device)
        with torch.inference_mode():
            with _Timer(sync) as first:
                token = subject.prefill(ids, tokens)
            times, rates = [], []
            for _ in range(tokens):
                with _Timer(sync) as timer:
                    token = subject.decode(token)
                times.append(timer.seconds)
                rates.append(rate.measure())
        subject.cache = None
        if repeat >= 0:
            timing = found[subject.name, length]
            timing.first_token.append(first.seconds)
            timing.prefill.append(batch * length / first.seconds)
            timing.decode.append(batch / median(times))
            timing.read_rate.append(median(rates))
    return found


def bytes_per_token(model: Qwen, length: int, batch: int = 1) -> int:
    """What must be read to decode a token of every row behind `length` cached ones, on this rank: every
    weight but the embedding, of which a row is read for each token, and all keys and values.
    """
    every = itertools.chain(model.named_parameters(), model.named_buffers())
    weights = sum(tensor.nbytes for name, tensor in every if name != "embed.weight")
    from qwen_ref.int8_cache import Int8Cache

    config, size = model.config, model.embed.weight.element_size()
    head = config.kv_channels + 4 if model.cache_type is Int8Cache else config.kv_channels * size
    position = 2 * config.num_hidden_layers * config.num_attention_heads // model.group.size * head
    return weights + batch * (config.hidden_size * size + length * position)


# A model of a published size, without its weights


def write_checkpoint(
    folder: Path,
    config: QwenConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    gptq: GPTQConfig | None = None,
) -> None:
    """A folder in the published form, a file for each layer, bfloat16: noise, repeated; only sizes matter.

    gptq: as such a release, in float16 and packed.
    """
    import dataclasses

    import torch
    from safetensors.torch import save_file

    from qwen_ref.checkpoint import tensor_table
    from qwen_ref.gptq import is_packed, packed_shapes

    published = {"model_type": "qwen", **dataclasses.asdict(config)}
    if gptq is not None:
        published["quantization_config"] = dataclasses.asdict(gptq)
    (folder / "config.json").write_text(json.dumps(published))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.02
    noise = noise.to(torch.bfloat16 if gptq is None else torch.float16)

    def packed(part: str, shape: tuple[int, ...]) -> torch.Tensor:
        if part == "scales":
            return torch.full(shape, 0.1 / 2**gptq.bits, dtype=torch.float16)
        if part == "g_idx":
            return (torch.arange(*shape) // gptq.group_size).int()
        if part == "qzeros":  # the middle, less 1, in every place of a word
            return torch.full(shape, {4: 0x77777777, 8: 0x7F7F7F7F}[gptq.bits], dtype=torch.int32)
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)

    table = tensor_table(config)
    total, done, weight_map = 2 * sum(math.prod(spec.shape) for spec in table), 0, {}
    for part, specs in itertools.groupby(table, key=lambda spec: spec.name.split(".")[:2]):
        file, tensors = f"{'-'.join(part)}.safetensors", {}
        for spec in specs:
            count = math.prod(spec.shape)
            if gptq is not None and is_packed(spec):
                for name, shape in packed_shapes(spec, gptq).items():
                    tensors[name] = packed(name.rpartition(".")[2], shape)
            else:
                tensors[spec.published] = noise.repeat(-(-count // len(noise)))[:count].view(spec.shape)
            done += 2 * count
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        progress(done, total)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextlib.contextmanager
def synthetic(size: str, layers: int | None = None, gptq: GPTQConfig | None = None) -> Iterator[Path]:
    """A folder with a checkpoint of a published size, removed at the end."""
    import dataclasses

    config = QwenConfig.preset(size)
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers)
    folder = Path(tempfile.mkdtemp(prefix="qwen_ref-"))
    try:
        free = shutil.disk_usage(folder).free
        from qwen_ref.checkpoint import tensor_table
        from qwen_ref.sizes import expected, kinds, weight_bytes

        table = tensor_table(config)
        needed = sum(weight_bytes(row) for row in kinds(table, expected(table, gptq)))
        if needed > free:
            raise InputError(
                f"the {size} takes {needed / 1e9:.1f} GB in {folder.parent}, which has {free / 1e9:.1f} GB "
                "left; --layers N makes fewer of its layers, TMPDIR names another folder"
            )
        with Progress("writing") as progress:
            write_checkpoint(folder, config, progress.update, gptq)
        yield folder
    finally:
        shutil.rmtree(folder)


# The command


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.bench",
        description="Time a model on this machine, beside the rate at which the machine reads memory.",
        epilog="The table goes to stdout, everything else to stderr.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="checkpoint folder (default: the tiny trained one that comes with the project)",
    )
    source.add_argument(
        "--synthetic",
        choices=_SIZES,
        metavar="SIZE",
        help=f"noise in the shape of a published model ({', '.join(_SIZES)}), written to a temporary folder",
    )
    add("--layers", type=int, metavar="N", help="with --synthetic: so many of its layers")
    add(
        "--gptq",
        type=int,
        choices=[4, 8],
        metavar="BITS",
        help="with --synthetic: as a GPTQ release, in groups of 128, of 4 or 8 bits",
    )
    add("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32 or float64")
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
        help="time these as well, in turns: hf is transformers' Qwen2 with the same weights and dtype, "
        "hf:float32 in another dtype, plain this implementation without --fast and --quantize",
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
    if args.gptq is not None and args.synthetic is None:
        raise InputError("--gptq needs --synthetic: a checkpoint says itself how it is packed")
    speed_options(args)
    launch = launched()
    if launch is not None and args.tp > 1:
        raise InputError("--tp starts ranks of its own; leave it out under torchrun")
    if args.compile and (launch is not None or args.tp > 1):
        raise InputError("--compile is for a model in one process; leave it or --tp out")
    if args.against and (launch is not None or args.tp > 1):
        raise InputError("--against needs one process: leave --tp out")
    if launch is None and args.tp > 1:
        with _folder(args) as folder:
            check_cut(folder, args.tp)
            return _launch(args, folder)
    if launch is not None and args.synthetic is not None:
        raise InputError("under torchrun every rank would write a model of its own; use --tp instead")
    peers = [_peer(peer, args) for peer in args.against]
    if len(set(args.against)) < len(args.against):
        raise InputError(f"--against names one of these twice: {', '.join(args.against)}")
    with _folder(args) as folder, Ranks(launch, args.timeout) as ranks:
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
        gptq = None if args.gptq is None else GPTQConfig(args.gptq, 128, desc_act=False, sym=True)
        return synthetic(args.synthetic, args.layers, gptq)
    folder = args.model or bundled_checkpoint()
    require_folder(folder)
    return contextlib.nullcontext(folder)


def _peer(peer: str, args: argparse.Namespace) -> tuple[str, str]:
    """(which, dtype) of an --against."""
    which, _, dtype = peer.partition(":")
    if which not in ("hf", "plain"):
        raise InputError(f"--against {peer}: use hf or plain, or one of them in a dtype, as hf:float32")
    if dtype:
        _check_dtype(f"--against {which} in", dtype)
    if which == "hf":
        from qwen_ref.peers import require_transformers

        require_transformers()
    return which, dtype or args.dtype


def _launch(args: argparse.Namespace, folder: Path) -> int:
    """Starts the ranks by torchrun with the same options.

    torchrun's own report of a rank that failed is a traceback of no use: the ranks have said why.
    """
    options = ["--model", str(folder), "--name", _name(args), "--dtype", args.dtype, "--device", args.device]
    options += [f"--{name}={getattr(args, name)}" for name in ("tokens", "batch", "repeats", "timeout")]
    options += ["--lengths", *map(str, args.lengths), *speed_options(args)]
    options += ["--json"] * args.json
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.tp)]
    threads = max(1, _cores() // args.tp)
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


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure(
    args: argparse.Namespace, folder: Path, ranks: Ranks, peers: list[tuple[str, str]]
) -> dict[str, Any]:
    import torch

    from qwen_ref.checkpoint import load_model
    from qwen_ref.sizes import held_bytes, resident_bytes

    with Memory() as loading:
        start = time.perf_counter()
        model = load_as_asked(args, folder, ranks)
        seconds = time.perf_counter() - start
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    ours = Subject(" ".join(["qwen_ref", dtype, *speed_options(args)]).replace("--", ""), model)
    with Memory() as running, torch.inference_mode():  # before others are loaded
        model.new_cache(args.batch, max(args.lengths) + args.tokens)  # says so where it does not fit
        ids = torch.zeros(args.batch, max(args.lengths), dtype=torch.int64, device=args.device)
        token = ours.prefill(ids, args.tokens)
        for _ in range(min(args.tokens, 4)):
            token = ours.decode(token)
        cache = held_bytes(ours.cache)
        ours.cache = None
    subjects = [ours]
    for which, peer_dtype in peers:
        plain = load_model(folder, peer_dtype, args.device)
        name = str(plain.embed.weight.dtype).removeprefix("torch.")
        if which == "plain":
            subjects.append(Subject(f"plain {name}", plain))
        else:
            from qwen_ref.peers import qwen2

            subjects.append(TransformersSubject(f"transformers {name}", qwen2(plain)))
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
    return {
        "machine": machine(args.device),
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


def machine(device: str) -> dict[str, Any]:
    """What a figure must name."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    found = {"processor": processor, "cores": _cores(), "threads": torch.get_num_threads()}
    found["instructions"], found["torch"] = torch.backends.cpu.get_cpu_capability(), torch.__version__
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as a person reads it: medians, with the smallest and largest of the repeats."""
    m, subjects = result["machine"], result["subjects"]
    ours, *others = subjects
    lengths = list(subjects[ours])
    memory = result["peak_memory"]
    lines = [
        f"{m.get('gpu', m['processor'])}, {m['cores']} cores, {m['threads']} threads, {m['instructions']}, "
        f"torch {m['torch']}",
        f"{result['model']}, {result['layers']} layers; batch {result['batch']}, {result['tokens']} tokens "
        f"decoded, {result['repeats']} repeats: median (smallest to largest)"
        + (f"; {result['ranks']} ranks, figures of rank 0" if result["ranks"] > 1 else ""),
        "",
        f"loaded in {result['load_seconds']:.2f} s; weights {_gb(result['resident_weights'])}, cache for "
        f"{max(lengths)} + {result['tokens']} tokens {_gb(memory['cache'])}",
    ]
    for when in ("while loading", "while running"):
        peak = memory[when]
        lines.append(
            f"peak memory {when}: {_gb(peak['anonymous'])} anonymous and {_gb(peak['mapped'])} mapped more "
            "than before"
        )
    lines.append("")
    rows = [["", ours]]
    for other in others:
        rows[0] += [other, "ratio"]
    for length in lengths:
        for key, what, digits in (
            ("prefill", f"prefill of {length}, tokens/s", 1),
            ("first_token", "  first token after, s", 3),
            ("decode", f"decode at {length}, tokens/s", 2),
        ):
            row = [what, _spread(subjects[ours][length][key], 1, digits)]
            for other in others:
                theirs = subjects[other][length][key]
                ratio = median(subjects[ours][length][key]) / median(theirs)
                row += [_spread(theirs, 1, digits), "" if key == "first_token" else f"{ratio:.2f}"]
            rows.append(row)
        read = result["bytes_per_token"][length]
        rate = subjects[ours][length]["read_rate"]
        achieved = [read * speed / result["batch"] for speed in subjects[ours][length]["decode"]]
        shares = [one / other for one, other in zip(achieved, rate, strict=True)]
        rows.append([f"  read for {_tokens(result['batch'])}, GB", f"{read / 1e9:.3f}"])
        rows.append(["  read, GB/s", _spread(achieved, 1e9)])
        rows.append(["  memory can be read at, GB/s", _spread(rate, 1e9)])
        rows.append(["  share of that", _spread(shares, 1, 2)])
    columns = max(map(len, rows))
    rows = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _tokens(batch: int) -> str:
    return "a token" if batch == 1 else f"{batch} tokens"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"


def _spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    low, high = (f"{pick(values) / unit:,.{digits}f}" for pick in (min, max))
    return f"{median(values) / unit:,.{digits}f} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), _bench, arguments)


if __name__ == "__main__":
    sys.exit(main())
