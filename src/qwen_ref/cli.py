"""What every command of the project does alike: messages and progress on stderr, prompts, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qwen_ref.config import (
    INT4_GROUP,
    INT4_GROUPS,
    LARGEST_TEXT,
    QUANTIZATIONS,
    InputError,
    read_bytes,
    shown,
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other mistake is reported: in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, integer)
        self.register("type", Path, given_path)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def integer(argument: str) -> int:
    """What type=int means here: of 64 bits, so that nothing later overflows. (int() takes 4,300 digits.)"""
    number = int(argument) if len(argument) <= 20 else 2**63
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{shown(argument)} must be a whole number below 2**63")
    return number


def given_path(argument: str) -> Path:
    """What type=Path means here. An empty one, such as an unset variable of the shell, would be the current
    folder.
    """
    if not argument:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(argument)


def utf8(argument: str) -> str:
    """The text of a command line's argument, whatever the locale made of its bytes."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(not_utf8("it", error)) from None


def not_utf8(source: str, error: UnicodeDecodeError) -> str:
    """Where text of some source is no UTF-8, and what to do."""
    where = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
    remedy = "convert it first"
    if error.reason == "unexpected end of data":
        remedy = f"it ends within a character: send all of it, or {remedy}"
    return f"{source} is not UTF-8 ({where}); {remedy}"


def run(
    parser: Parser,
    command: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command; its exit code, or 1 where another rank is gone, 2 for bad input, 130 after Ctrl-C, 141
    when stdout was closed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # Whatever the locale says, text may be in any script; a path may even be in none.
        getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return command(parser.parse_args(arguments))
    except BrokenPipeError:
        _give_up_stdout()  # the reader has gone, as `| head` does
        return 141
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, say
            _give_up_stdout()
        return 1 if isinstance(error, ConnectionError) else 2


def _give_up_stdout() -> None:
    """Python would fail once more when it flushes stdout at exit, with an exit code of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """One line on stderr, without the controls that a file's names may hold; stdout carries only results."""
    rank = os.environ.get("RANK", "0")  # torchrun's: one of several processes says which it is
    who = "qwen_ref" if rank == "0" else f"qwen_ref, rank {rank}"
    try:
        print(f"{who}: {printable(line)}", file=sys.stderr, flush=True)
    except OSError:  # a full disk behind stderr must not cost the result on stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def printable(text: str, kept: str = "") -> str:
    """Text without the controls that a terminal would obey, all but those kept."""
    return "".join(
        c if c.isprintable() or c in kept else " " if c.isspace() else ascii(c)[1:-1] for c in text
    )


def bundled_checkpoint() -> Path:
    """The trained tiny checkpoint that comes with the project: in the package, or in the checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "weights"
    return installed if installed.is_dir() else here.parents[1] / "weights"


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt from a command's argument (see utf8), from a file, or from stdin for "-" or neither.

    One line end of a file or of stdin is dropped at its end: `echo` and editors add it.
    Raises ValueError for what is not UTF-8.
    """
    if file is not None:
        if argument is not None:
            raise InputError("the prompt is given twice: as an argument and with --file")
        text = read_text(file)
    elif argument is None or argument == "-":
        if sys.stdin is None:
            raise InputError("stdin is closed; give the prompt as an argument or with --file")
        if sys.stdin.isatty():
            say("reading the prompt from the terminal; end it with Ctrl-D")
        encoded = sys.stdin.buffer.read(LARGEST_TEXT + 1)
        if len(encoded) > LARGEST_TEXT:
            raise InputError(f"stdin has more than {LARGEST_TEXT >> 20} MiB, the most that is read of a text")
        text = decoded("stdin", encoded)
    else:
        return argument
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, exactly; a pipe, as `<(command)`, and a device will do."""
    return decoded(str(path), read_bytes(path, LARGEST_TEXT, streams=True))


def decoded(source: str, encoded: bytes) -> str:
    """The text of UTF-8 bytes, exactly; ValueError, which names the source, for anything else."""
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(source, error)) from None


def as_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON, in which there is no NaN and no infinity: null stands for them."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(each) for key, each in part.items()}
        if isinstance(part, list | tuple):
            return [finite(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=default)


def check_path(path: Path, option: str) -> None:
    """ValueError where an option names what cannot be a new file: better now than after the work is done."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir() or not path.name:
        raise InputError(f"{option} {path} is a folder; give the name of a file")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written to {path.parent}")


def make_folder(path: Path) -> None:
    """A folder and those around it; ValueError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} is no folder, or lies in a file; give another --out") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file under a temporary name until it is complete; a link stays one, and who may read it the same."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        write(part)
        if target.is_file():
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def add_speed_options(parser: argparse._ActionsContainer) -> None:
    """What costs less time or less memory than the plain model."""
    add = parser.add_argument
    add(
        "--fast",
        action="store_true",
        help="lay the weights out for decoding on the CPU, as a copy",
    )
    add("--quantize", choices=QUANTIZATIONS, help="--fast, with the weights rounded to 8 or 4 bits")
    add(
        "--group-size",
        type=int,
        choices=INT4_GROUPS,
        metavar="G",
        help=f"with --quantize int4: inputs that share a scale, {', '.join(map(str, INT4_GROUPS))} "
        f"(default: {INT4_GROUP})",
    )
    add(
        "--packed",
        action="store_true",
        help="keep a GPTQ checkpoint's 4 or 8 bits, and dequantise a layer at a time in each pass: the least "
        "memory, on any device; slow. With --fast they are kept and used as they are",
    )
    add(
        "--kv-cache",
        choices=["int8"],
        help="keep keys and values in 8 bits: half the memory of the cache, slower",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile norms and MLPs; it takes up to a minute, and on a CPU gains nothing",
    )


def speed_options(args: argparse.Namespace) -> list[str]:
    """Those of add_speed_options that were given; ValueError where they do not go together."""
    if args.group_size is not None and args.quantize != "int4":
        raise InputError("--group-size is for --quantize int4")
    given = [f"--{name}" for name in ("fast", "packed", "compile") if getattr(args, name)]
    for name in ("quantize", "group_size", "kv_cache"):
        if getattr(args, name) is not None:
            given.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    if args.compile and given != ["--compile"]:
        raise InputError(
            "--compile is for the plain layers; leave it out, or --fast, --quantize and --packed"
        )
    return given


class Progress:
    """One line on stderr with what is done and the time left, redrawn in a terminal, else every 10 s."""

    def __init__(self, what: str, unit: str = "GB") -> None:
        self.what, self.unit, self.stream = what, unit, sys.stderr
        self.interval = 0.1 if self.stream.isatty() else 10.0
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def _end_line(self) -> None:
        if self.shown > self.start and self.stream.isatty():
            print(file=self.stream, flush=True)
            self.shown = self.start

    def update(self, done: int, total: int) -> None:
        if done == total:
            return self._end_line()
        now = time.monotonic()
        if now - self.shown < self.interval or os.environ.get("RANK", "0") != "0":  # one rank speaks for all
            return
        self.shown = now
        left = (now - self.start) * (total - done) / max(done, 1)
        count = f"{done / 1e9:.2f} of {total / 1e9:.2f}" if self.unit == "GB" else f"{done} of {total}"
        line = f"qwen_ref: {self.what} {count} {self.unit}, {left:.0f} s left"
        if self.stream.isatty():
            print(f"\r{line}", end="    ", file=self.stream, flush=True)
        else:
            print(line, file=self.stream, flush=True)
