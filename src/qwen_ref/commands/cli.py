"""What every command does: options parsed, messages and progress on stderr, JSON, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from qwen_ref.config import InputError, lacks_memory, shown

FAULT = 70  # the exit code of a fault of qwen_ref: EX_SOFTWARE of BSD's sysexits.h
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

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        options = args[: args.index("--")] if "--" in args else args
        for option in options:  # argparse would make an empty list of it, whatever the option's type
            if option.startswith("-") and option.endswith("=--"):
                self.error(f"argument {option.removesuffix('=--')}: -- is no value")
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        # argparse's own ignores errors of writing.
        print(self.format_help(), end="", file=sys.stdout if file is None else file, flush=True)


def integer(argument: str) -> int:
    """type=int: a whole number of 64 bits, so that nothing overflows later. (int() takes 4,300 digits.)"""
    number = int(argument) if len(argument) <= 20 else 2**63
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{shown(argument)} must be a whole number of 64 bits")
    return number


def given_path(argument: str) -> Path:
    """type=Path, without the empty path: an unset variable of the shell would mean the current folder.

    ~ is the home folder, as a shell reads it. A shell does not see it in quotes and behind `--option=`.
    """
    if not argument:
        raise argparse.ArgumentTypeError("the path is empty")
    if argument.startswith("~") and not os.path.lexists(argument):
        with contextlib.suppress(ValueError):  # a name that no user can have
            argument = os.path.expanduser(argument)
    return Path(argument)


def utf8(argument: str) -> str:
    """The text of a command line's argument, whatever encoding the locale has."""
    try:
        encoded = os.fsencode(argument)
    except UnicodeEncodeError:  # an argument that a caller gave to main, with characters outside the locale
        encoded = argument.encode("utf-8", "surrogatepass")
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(not_utf8("it", error)) from None


def not_utf8(source: str, error: UnicodeDecodeError) -> str:
    """The message for text of some source that is no UTF-8: where, and what to do."""
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
    """Runs a command and returns its exit code. An error is printed in one line, and its code is

    - 2: wrong input (InputError), too little memory, or an error of the system (OSError), such as a full disk
    - 130: Ctrl-C
    - 141: stdout was closed, as `| head` does
    - lost: another rank is gone; a command that uses 1 itself gives another code here
    - 70: any other error is a fault of qwen_ref, and its traceback is printed
    """
    with _streams(), _notes_said():
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
def _notes_said() -> Iterator[None]:
    """The library's warnings, such as one on files of a folder that are not read, as notes on stderr."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"note: {record.getMessage()}")

    notes, logger = Notes(), logging.getLogger("qwen_ref")
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """stdout and stderr in UTF-8, whatever the locale; at the end they are as they were.

    A caller may have replaced them, as notebooks do. The streams of a notebook may have no encoding.
    """
    before = [(name, getattr(sys, name)) for name in ("stdin", "stdout", "stderr")]
    codings = [(s, s.encoding, s.errors) for _, s in before if hasattr(s, "reconfigure")]
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
        for stream, encoding, errors in codings:
            with contextlib.suppress(OSError, ValueError):
                if (stream.encoding, stream.errors) != (encoding, errors):
                    stream.reconfigure(encoding=encoding, errors=errors)


def _drop_pending(stream: TextIO) -> None:
    """Drops text that a full disk or a closed pipe does not take. With it Python would fail again at its end,
    with an exit code of its own.
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
    """The message for an error that is lack of memory, on any device; None for every other error."""
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
    """A message on stderr, in one line, without the control characters that a file's name may hold."""
    rank = os.environ.get("RANK", "0")  # torchrun's: one of several processes says which it is
    who = "qwen_ref" if rank == "0" else f"qwen_ref, rank {rank}"
    to_stderr(f"{who}: {printable(line)}")


def to_stderr(text: str, end: str = "\n") -> None:
    """Text as it is. `say` is for messages."""
    try:
        sys.stderr.write(text + end)  # in one call: two ranks may write at the same time
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a full disk behind it must not cost the result on stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal. A notebook's stream may not have isatty."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # ValueError: it is closed
        return False


def on_stdout(text: str) -> str:
    """Text for stdout. A terminal gets no control characters from a model or a file; a pipe gets all text."""
    return printable(text, kept="\n\t") if is_terminal(sys.stdout) else text


def printable(text: str, kept: str = "") -> str:
    """Text without the control characters that a terminal acts on, except those in `kept`."""
    return "".join(
        c if c.isprintable() or c in kept else " " if c.isspace() else ascii(c)[1:-1] for c in text
    )


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON, with null for NaN and infinity."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, default=default)


class Progress:
    """One line on stderr: what is done and the time left. It is redrawn, as a bar, in a terminal and in a
    notebook; elsewhere there is a line every 10 s.

        model = load_model("Qwen-7B", "auto", progress=Progress("loading").update)
    """

    def __init__(self, what: str, unit: str = "GB") -> None:
        self.what, self.unit = what, unit
        self.redrawn = is_terminal(sys.stderr) or _is_notebook(sys.stderr)
        self.interval = 0.1 if self.redrawn else 10.0
        self.start = self.shown = time.monotonic()
        self.columns = 0  # of the longest line so far

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()

    def _end_line(self) -> None:
        if self.shown > self.start and self.redrawn:
            to_stderr("")
        self.shown = self.start

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total:
            if self.shown > self.start and self.redrawn:
                self._redraw(done, total, f"in {now - self.start:.0f} s")
            return self._end_line()
        if now - self.shown < self.interval or os.environ.get("RANK", "0") != "0":  # rank 0 speaks for all
            return
        self.shown = now
        left = f"{(now - self.start) * (total - done) / max(done, 1):.0f} s left"
        if self.redrawn:
            self._redraw(done, total, left)
        else:
            to_stderr(f"qwen_ref: {self.what} {self._count(done, total)}, {left}")

    def _redraw(self, done: int, total: int, time: str) -> None:
        begin = f"qwen_ref: {self.what} "
        end = f" {100 * done // total} % {self._count(done, total)}, {time}"
        cells = max(0, min(_BAR, _COLUMNS - len(begin) - len(end)))
        line = f"{begin}{_bar(cells * done // total, cells)}{end}"
        self.columns = max(self.columns, len(line))
        to_stderr(f"\r{line.ljust(self.columns)}", end="")

    def _count(self, done: int, total: int) -> str:
        count = f"{done / 1e9:.2f} of {total / 1e9:.2f}" if self.unit == "GB" else f"{done} of {total}"
        return f"{count} {self.unit}"


_BAR, _COLUMNS = 20, 79  # of the bar, and of a line with one, at most


def _bar(full: int, cells: int) -> str:
    bar = "█" * full + "─" * (cells - full)
    try:
        bar.encode(getattr(sys.stderr, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#" * full + "-" * (cells - full)
    return bar


def _is_notebook(stream: TextIO) -> bool:
    """Whether a stream is a Jupyter notebook's. It is no terminal, but a carriage return redraws the line."""
    return any(kind.__module__ == "ipykernel.iostream" for kind in type(stream).__mro__)
