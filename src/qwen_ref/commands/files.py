"""Files that commands read and write: prompts and texts, and outputs, which are complete or not there."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qwen_ref.commands.cli import is_terminal, not_utf8, out_of_memory, say
from qwen_ref.config import InputError, read_bytes
from qwen_ref.loading.hub import WEIGHTS, fetch_model, find_model

LARGEST_TEXT = 2**28  # 256 MiB. A prompt as long as the longest context, 32,768 tokens, has 0.2 MB
STDIN = Path("-")
_MARK = "\ufeff"


def bundled_checkpoint() -> Path:
    """The trained tiny checkpoint that comes with the project: in the package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "weights"
    return installed if installed.is_dir() else package.parents[1] / "weights"


def checkpoint_folder(args: argparse.Namespace, need: str = WEIGHTS, has_data: bool = False) -> Path:
    """The folder that --model, --revision and --download name, by default the bundled one.

    A note says where a model was found that was not given by its path. need: see loading/hub.py. has_data:
    --download fetches data as well, also for the bundled checkpoint.
    Raises ValueError where there is no such model.
    """
    if args.model is None and args.revision is not None:
        raise InputError("--revision goes with --model")
    if args.model is None and args.download and not has_data:
        raise InputError("--download goes with --model: the checkpoint that comes with the project is here")
    find = fetch_model if args.download else find_model
    found = find(bundled_checkpoint() if args.model is None else args.model, args.revision, need=need)
    if found.note is not None and os.environ.get("RANK", "0") == "0":  # rank 0 speaks for all
        say(f"note: {found.note}")
    return found.folder


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt: a command's argument (see utf8), or the text of a file or of stdin (see read_text).

    stdin is read for the argument "-" or None. One line end at the end of a file or of stdin is dropped:
    `echo` and editors add it.
    """
    if file is not None and argument is not None:
        raise InputError("the prompt is given twice: as an argument and with --file")
    if argument is not None and argument != "-":
        text = without_mark("the prompt", argument)
    else:
        text = _unmarked_text(STDIN if file is None else file, "the prompt")
        text = text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")
    _note_line_ends("the prompt", text)
    return text


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or of stdin for "-"; a pipe, as `<(command)`, and a device will do.

    A byte order mark at its start is dropped, with a note. Line ends are kept; a note says if they are CRLF.
    Raises ValueError for what is not UTF-8.
    """
    text = _unmarked_text(path, "the text")
    _note_line_ends("stdin" if path == STDIN else str(path), text)
    return text


def _unmarked_text(path: Path, what: str) -> str:
    """The text of a file or of stdin without its byte order mark."""
    if path != STDIN:
        return without_mark(str(path), decoded(str(path), read_stream(path)))
    if sys.stdin is None:
        raise InputError(
            f"stdin is closed, and {what} was to come from there; give it otherwise (see --help)"
        )
    if is_terminal(sys.stdin):
        say(f"reading {what} from the terminal; end it with Ctrl-D")
    encoded = from_stdin(LARGEST_TEXT + 1)
    if len(encoded) > LARGEST_TEXT:
        raise InputError(f"stdin has more than {LARGEST_TEXT >> 20} MiB, the most that is read of a text")
    return without_mark("stdin", decoded("stdin", encoded))


def without_mark(source: str, text: str) -> str:
    """A text without the byte order mark that some editors put before it; a note says so."""
    if text.startswith(_MARK):
        say(f"note: {source} begins with a byte order mark (U+FEFF), which is dropped")
    return text.removeprefix(_MARK)


def _note_line_ends(source: str, text: str) -> None:
    if count := text.count("\r\n"):
        lines = "a line ends" if count == 1 else f"{count} lines end"
        say(
            f"note: in {source} {lines} in CRLF, as on Windows; for a model it is other text than LF and may "
            "change the answer; tr -d '\\r' <FILE converts it"
        )


def read_stream(path: Path) -> bytes:
    """The bytes of a text's file. It may be a pipe, as `<(command)` is, or a device."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode) if os.path.exists(path) else 0  # 0: read_bytes says why
        if kind not in (stat.S_IFIFO, stat.S_IFCHR):
            return read_bytes(path, LARGEST_TEXT)
        no_wait = getattr(os, "O_NONBLOCK", 0)  # otherwise to open a pipe waits for one who writes
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait)) as file:
            if no_wait:
                os.set_blocking(file.fileno(), True)
            content = file.read(LARGEST_TEXT + 1)
        if not content and kind == stat.S_IFIFO:
            raise OSError(errno.EPIPE, "it is a pipe, and nothing writes to it")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_TEXT:
        raise InputError(f"{path}: larger than {LARGEST_TEXT >> 20} MiB, the most that is read of a text")
    return content


def from_stdin(most: int, line: bool = False) -> bytes:
    """The next line of stdin, or the rest of it, at most `most` bytes. stdin may be a StringIO."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    found = stream.readline(most) if line else stream.read(most)
    return found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found


def decoded(source: str, encoded: bytes) -> str:
    """The exact text of UTF-8 bytes; ValueError, with the source, for anything else."""
    if encoded.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        begins = f"it begins with the bytes {encoded[:2].hex(' ')}"
        raise InputError(f"{source} is UTF-16 ({begins}); convert it first: iconv -f UTF-16 -t UTF-8")
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(source, error)) from None


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
    """Where a file is to be written, links followed. option: the option that names it. args: the command's.

    To be called before any work. It raises InputError
    - where no file can be written;
    - where something is there that is no regular file: a complete file could not replace it;
    - where the file is there and another option names it, or names the checkpoint that it belongs to: the
      command would overwrite what it reads.
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
    """Why an existing file must not be overwritten: another option names it or its checkpoint."""
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
    """Why a file cannot be written. folder: of the file, or of the link to it. there: what is there now."""
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
    """Whether a file is open under this file descriptor."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(number), there)
    return False


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; InputError where that cannot be."""
    if os.path.isdir(path):
        return
    try:
        if os.path.exists(path):
            raise FileExistsError
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path} is no folder, or lies in a file; give another folder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be made: {getattr(error, 'strerror', error)}") from None


def unfinished_name(target: Path) -> Path:
    """A short name beside target that nobody can guess, for a file that is not complete yet."""
    return target.with_name(f".qwen_ref-{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which gets the name `path` when the block ends. An error leaves nothing of it.

    A link stays a link. A file that is replaced keeps its mode. Raises InputError where it cannot be written.
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
        of_this = error.filename in (None, str(part))  # an error of write() has no file name
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
    """Writes a file, complete or not at all (see new_file). Text is in UTF-8, its line ends as they are."""
    with new_file(path) as file:  # the text may hold a file name that is no UTF-8
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
