"""What every command of the project does alike: messages and progress on stderr, prompts, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from qwen_ref.config import (
    INT4_GROUP,
    INT4_GROUPS,
    LARGEST_TEXT,
    QUANTIZATIONS,
    InputError,
    lacks_memory,
    read_bytes,
    shown,
)

FAULT = 70  # the exit code of an error that is ours: EX_SOFTWARE of BSD's sysexits.h
_NEEDED = ("torch", "numpy", "safetensors", "tiktoken", "regex")
FAULT_LINE = "this is a fault of qwen_ref, not of its input; please report it, with the lines above"


class Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other mistake is reported: in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, integer)
        self.register("type", Path, given_path)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        for option in options:  # of this one argparse makes an empty list, whatever the type
            if option.startswith("-") and option.endswith("=--"):
                self.error(f"argument {option.removesuffix('=--')}: -- is no value")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: TextIO | None = None) -> None:
        # argparse would pass over an error of writing.
        print(self.format_help(), end="", file=sys.stdout if file is None else file, flush=True)


def integer(argument: str) -> int:
    """What type=int means here: of 64 bits, so that nothing later overflows. (int() takes 4,300 digits.)"""
    number = int(argument) if len(argument) <= 20 else 2**63
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{shown(argument)} must be a whole number of 64 bits")
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
        encoded = os.fsencode(argument)
    except UnicodeEncodeError:  # from a caller of main, with characters that the locale does not have
        encoded = argument.encode("utf-8", "surrogatepass")
    try:
        return encoded.decode("utf-8")
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
    lost: int = 1,
) -> int:
    """Runs a command; its exit code, or one of these after an error, which is said in one line.

    2: a mistake of the user's (InputError), too little memory, or an error of the system (OSError), such as a
    full disk. 130: Ctrl-C. 141: stdout was closed, as by `| head`. lost: another rank is gone; a command that
    uses 1 itself gives another code. 70: anything else is a fault of ours and keeps its traceback.
    """
    with _streams():
        try:
            code = command(parser.parse_args(arguments))
            sys.stdout.flush()
            return code
        except (BrokenPipeError, ConnectionResetError):  # the reader has gone
            return 141
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except Exception as error:
            if message := out_of_memory(error):
                say(f"error: {message}")
                return 2
            if isinstance(error, InputError | OSError) and not isinstance(error, io.UnsupportedOperation):
                say(f"error: {error}")
                return lost if isinstance(error, ConnectionError) else 2
            if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
                say(f"error: {error.name} is not installed: pip install {error.name}")
                return 2
            to_stderr(printable(traceback.format_exc(), kept="\n"), end="")
            say(FAULT_LINE)
            return FAULT


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """stdout and stderr that take text in any script, whatever the locale says; in the end as they were.

    A caller may have put others in their place, as notebooks do: these may know of no encoding.
    """
    before = [(name, getattr(sys, name)) for name in ("stdin", "stdout", "stderr")]
    codings = [
        (stream, {"encoding": stream.encoding, "errors": stream.errors})
        for _, stream in before
        if hasattr(stream, "reconfigure")
    ]
    for name, stream in before[1:]:
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        yield
    finally:
        for name, stream in before:
            if getattr(getattr(sys, name), "name", None) == os.devnull:  # a stand-in
                getattr(sys, name).close()
            setattr(sys, name, stream)
        for _, stream in before[1:]:
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError, AttributeError):
                _drop_pending(stream)
        for stream, coding in codings:
            with contextlib.suppress(OSError, ValueError):
                if (stream.encoding, stream.errors) != tuple(coding.values()):
                    stream.reconfigure(**coding)


def _drop_pending(stream: TextIO) -> None:
    """Text that a full disk or a closed pipe does not take: Python would fail once more when it ends, with an
    exit code of its own.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        kept, null = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, number)
            stream.flush()
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(null)


_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|[KMGTPE]i?B)")


def out_of_memory(error: BaseException) -> str | None:
    """What to say of an error that is lack of memory, on any device; None for every other error."""
    text = str(error)
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return "no thread can be started: too little memory, or a limit on processes (ulimit -u)"
    if not lacks_memory(error):
        return None
    asked = "more memory was asked for than there is"
    if found := _ASKED.search(text):
        size = round(float(found[1]) * 1024 ** "bKMGTPE".index(found[2][0]))
        asked = f"{size:,} bytes ({size / 1e9:,.3f} GB) more were asked for than there are"
    remedy = "take a --dtype of fewer bits, a shorter text, fewer texts at a time, or more memory"
    return f"too little memory: {asked}; {remedy}"


def say(line: str) -> None:
    """One line on stderr, without the controls that a file's names may hold; stdout carries only results."""
    rank = os.environ.get("RANK", "0")  # torchrun's: one of several processes says which it is
    who = "qwen_ref" if rank == "0" else f"qwen_ref, rank {rank}"
    to_stderr(f"{who}: {printable(line)}")


def to_stderr(text: str, end: str = "\n") -> None:
    """Text as it is; for a line of ours there is say."""
    try:
        sys.stderr.write(text + end)  # at once: two ranks may speak at a time
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a full disk behind it must not cost the result on stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is at the other end of a stream. One of a notebook may not know."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # ValueError: it is closed
        return False


def on_stdout(text: str) -> str:
    """Text for stdout: a terminal does not get to obey what a model or a file says. A pipe gets all of it."""
    return printable(text, kept="\n\t") if is_terminal(sys.stdout) else text


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
        if is_terminal(sys.stdin):
            say("reading the prompt from the terminal; end it with Ctrl-D")
        encoded = from_stdin(LARGEST_TEXT + 1)
        if len(encoded) > LARGEST_TEXT:
            raise InputError(f"stdin has more than {LARGEST_TEXT >> 20} MiB, the most that is read of a text")
        text = decoded("stdin", encoded)
    else:
        return argument
    return text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, exactly; a pipe, as `<(command)`, and a device will do."""
    return decoded(str(path), read_bytes(path, LARGEST_TEXT, streams=True))


def from_stdin(most: int = -1, line: bool = False) -> bytes:
    """The next line of stdin, or all that is left, up to so many bytes. A StringIO there has only text."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    found = stream.readline(most) if line else stream.read(most)
    return found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found


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


# Files that a command writes

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_CHECKPOINT_FILE = re.compile(r"(gptq_)?model.*\.(safetensors|json)|.*config\.json|qwen\.tiktoken")
_SYSTEM = (("/", "proc"), ("/", "sys"))
_REGULAR = "give the name of a regular file; what is printed goes to stdout by itself"


def output_path(path: str | Path, option: str = "", args: argparse.Namespace | None = None) -> Path:
    """Where a file is to be written, links followed. option: what names it. args: the command's.

    To be called before any work: it raises InputError where no file can be written, where what is there is no
    regular file, which a whole file cannot be written to, only put in the place of, and where it is what
    another option names, or a file of a folder that one names: it would be lost.
    """
    itself, path, there = path, Path(path), None
    try:
        folder = Path(os.path.realpath(path.parent))
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            there = os.stat(path)
        problem = _output_problem(folder, target, there)
        if problem is None and there is not None and args is not None:
            problem = _read_elsewhere(itself, target, args)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        problem = str(getattr(error, "strerror", error))
    if problem is not None:
        raise InputError(f"{option} {path}: cannot be written: {problem}".strip())
    return target


def _read_elsewhere(itself: str | Path, target: Path, args: argparse.Namespace) -> str | None:
    """Why an existing file must stay: another option names it, or the checkpoint that it belongs to."""
    given = [
        other for value in vars(args).values() for other in (value if isinstance(value, list) else [value])
    ]
    for other in given:
        if not isinstance(other, Path) or other is itself or not os.path.exists(other):
            continue
        inside = other.is_dir() and _CHECKPOINT_FILE.fullmatch(target.name) is not None
        if os.path.samefile(target.parent if inside else target, other):
            return f"it is there, and the command reads {other}, which would be lost; give another name"
    return None


def _output_problem(folder: Path, target: Path, there: os.stat_result | None) -> str | None:
    """Why a file cannot be written. folder: where it, or the link to it, stands; there: what is there now."""
    if there is not None and stat.S_ISDIR(there.st_mode):
        return "it is a folder; give the name of a file"
    if there is not None and not stat.S_ISREG(there.st_mode):
        return f"it is {_KINDS.get(stat.S_IFMT(there.st_mode), 'no regular file')}; {_REGULAR}"
    if folder == Path("/dev") or folder.parts[:2] in _SYSTEM:  # /dev/stdout may be a regular file
        return f"it is one of the system's files; {_REGULAR}"
    if there is not None and any(_is_open_as(number, there) for number in (1, 2)):
        return "it is where stdout or stderr goes; give the name of another file"
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    if not os.access(target.parent, os.W_OK):
        return f"nothing can be written to {target.parent}"
    return None


def _is_open_as(number: int, there: os.stat_result) -> bool:
    """Whether a file is the one that is open under a number."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(number), there)
    return False


def make_folder(path: Path) -> None:
    """A folder and those around it; InputError where there cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} is no folder, or lies in a file; give another folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be made: {getattr(error, 'strerror', error)}") from None


def unfinished_name(target: Path) -> Path:
    """A name beside target for what is not complete yet: no one can guess it, and it is short."""
    return target.with_name(f".qwen_ref-{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which is called path once the block is done. After an error nothing is left of it.

    A link stays a link; a file that is replaced keeps its mode. Raises InputError where it cannot be written.
    """
    target = output_path(path)
    part = unfinished_name(target)
    try:
        with part.open("x+b") as file:  # "x": it is neither there nor a link
            if target.exists():
                shutil.copymode(target, part)
            yield file
        _replace(part, target)
    except OSError as error:
        of_this = error.filename in (None, str(part))  # an error of write() names no file
        if not of_this or isinstance(error, ConnectionError) or out_of_memory(error):
            raise
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _replace(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except PermissionError as error:
        raise InputError(
            f"{target}: cannot be replaced: {error.strerror or error}; where another program has it open, as "
            "on Windows, close that, or give another name"
        ) from None


def write_whole(path: str | Path, content: str | bytes) -> None:
    """A file, whole or not at all (see new_file); text in UTF-8, with its line ends as they are."""
    with new_file(path) as file:  # a name of the system's that is no UTF-8 may be in the text
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


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
        self.what, self.unit = what, unit
        self.interval = 0.1 if is_terminal(sys.stderr) else 10.0
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def _end_line(self) -> None:
        if self.shown > self.start and is_terminal(sys.stderr):
            to_stderr("")
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
        if is_terminal(sys.stderr):
            to_stderr(f"\r{line}", end="    ")
        else:
            to_stderr(line)
