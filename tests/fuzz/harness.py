"""A case, what may come of it, and the processes that run cases.

Cases run in forked processes: a hang or a crash costs one case. A case may write in a folder of its own only.
It may read there, and what Python and this project are made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import qwen_ref
from qwen_ref.cli import bundled_checkpoint
from qwen_ref.config import InputError

T = TypeVar("T")

LIMIT = 10.0  # seconds that a case may take
MEMORY = 3 << 30  # bytes that a case may map; it may touch a quarter of them
PACKAGE = Path(qwen_ref.__file__).resolve().parent
ERROR = "qwen_ref: error: "
_LONGEST_ERROR = 12_000  # characters

# What may be opened for reading outside of a case's folder: Python, libraries, the system's own files.
_READABLE = (
    *{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())},
    *(str(path) for path in (PACKAGE, bundled_checkpoint(), Path(__file__).resolve().parents[2])),
    *("/proc", "/sys", "/etc", "/usr", "/lib", "/dev/null", "/dev/random", "/dev/urandom"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.chmod",
    "os.link",
    "os.symlink",
}
_STARTS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
}


class Hang(BaseException):
    """The time limit; no `except Exception` of the code under test may swallow it."""


class Finding(NamedTuple):
    """sign: what is the same for every case that shows this fault."""

    sign: str
    detail: str


class Outcome(NamedTuple):
    """What came of a case, as its process reports it."""

    number: int
    kind: str
    ends: list[str]  # of each command its exit code, of each library call "returned" or "refused"
    seconds: float
    described: list[str]
    findings: list[Finding]


class Kind(NamedTuple):
    """prepare: makes what all cases share, in a folder, once. run: does one case."""

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Case], None]


class Result(NamedTuple):
    code: int | None
    out: str
    err: str


@dataclass
class Case:
    """What a case draws from, where it may write, and what was found."""

    rng: random.Random
    place: Path
    shared: Path  # what all cases of a run share: caches of libraries
    described: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    named: set[str] = field(default_factory=set)  # paths outside that the command line itself names

    def describe(self, text: str) -> None:
        self.described.append(text)
        print(f"case: {text}", file=sys.__stderr__, flush=True)  # all that is left of a case that dies

    def found(self, sign: str, detail: str = "") -> None:
        if all(sign != finding.sign for finding in self.findings):
            self.findings.append(Finding(sign, detail[-2000:]))

    def library(self, call: Callable[[], T]) -> T | None:
        """What a call returns; None where it refused its input."""
        try:
            with _watching(self):
                value = call()
        except InputError:
            self.ends.append("refused")
            return None
        except (Exception, Hang) as error:
            self._escaped(error)
            return None
        self.ends.append("returned")
        return value

    def command(
        self,
        main: Callable[[list[str]], int],
        arguments: Sequence[str],
        stdin: bytes = b"",
        *,
        may_differ: bool = False,
        streams: tuple[Any, Any] | None = None,
        chatty: bool = False,
    ) -> Result:
        """Runs a command. may_differ: exit code 1 is documented. chatty: others may write to stderr, too.

        streams: what it finds as stdout and stderr, if not what is read here.
        """
        self.describe(f"{main.__module__} {shown(list(arguments))}" + (f" < {shown(stdin)}" if stdin else ""))
        out, err = streams or (capture(), capture())
        before = [(stream, getattr(stream, "errors", None)) for stream in (out, err)]
        saved, code = (sys.stdin, sys.stdout, sys.stderr), None
        sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin)), out, err
        try:
            with _watching(self):
                code = main(list(arguments))
        except SystemExit as error:  # --help
            code = error.code
        except (Exception, Hang) as error:
            self._escaped(error)
        finally:
            left = [(stream, getattr(stream, "errors", None)) for stream in (sys.stdout, sys.stderr)]
            sys.stdin, sys.stdout, sys.stderr = saved
        self.ends.append("escaped" if code is None else str(code))
        result = Result(code, written(out), written(err))
        if left != before and out is not None and err is not None:
            self.found("cli.run: sys.stdout or sys.stderr is not left as it was", f"{before} → {left}")
        if code is not None:
            self._judge(result, main.__module__, may_differ, chatty, err is not None and streams is None)
            if code == 0 and "--json" in arguments and streams is None:
                self._judge_json(result.out, main.__module__)
        return result

    def _judge(self, result: Result, command: str, may_differ: bool, chatty: bool, readable: bool) -> None:
        code, _, err = result
        allowed = (0, 2, 130, 141, *([1] if may_differ else []))
        if code not in allowed:
            self.found(f"{command}: exit code {code}", err)
        if not readable:
            return
        lines = err.splitlines()
        errors = [line for line in lines if ERROR in line]
        if "Traceback" in err:
            self.found(f"{command}: a traceback on stderr: {lines[-1][:100]}", err)
        elif code == 2 and len(errors) != 1:
            self.found(f"{command}: exit code 2 with {len(errors)} lines of error", err)
        elif code != 2 and errors:
            self.found(f"{command}: exit code {code} with a line of error", err)
        elif not chatty and (odd := [line for line in lines if not line.startswith("qwen_ref: ")]):
            self.found(f"{command}: a stray line on stderr: {_without_numbers(odd[0])[:100]}", err)
        if errors and len(errors[0]) > _LONGEST_ERROR:
            self.found(f"{command}: an error of {len(errors[0])} characters", errors[0][:300])

    def _judge_json(self, out: str, command: str) -> None:
        def refuse(constant: str) -> None:
            raise ValueError(constant)

        try:
            json.loads(out, parse_constant=refuse)
        except ValueError as error:
            self.found(f"{command}: --json prints no JSON: {error}"[:120], out[-500:])

    def _escaped(self, error: BaseException) -> None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "(no frame of ours)"
        what = type(error).__name__
        line = str(error).splitlines()[0] if str(error) else ""
        lines = traceback.format_exception(error)
        self.found(f"{where}: {what}: {_without_numbers(line)[:80]}", "".join(lines)[-2000:])


def _is_ours(file: str) -> bool:
    return file.startswith(str(PACKAGE))


def _without_numbers(text: str) -> str:
    """So that two cases of one fault look alike."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text)
    return re.sub(r"/\S+", "PATH", re.sub(r"-?\d[\d.,e+]*", "N", text))


def shown(value: object, longest: int = 300) -> str:
    text = ascii(value)
    return text if len(text) <= longest else f"{text[: longest - 40]}…({len(text)} characters)…{text[-20:]}"


def capture(encoding: str = "utf-8", errors: str = "backslashreplace") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(stream: Any) -> str:
    """What a stream of `capture` holds."""
    if not isinstance(getattr(stream, "buffer", None), io.BytesIO):
        return stream.getvalue() if isinstance(stream, io.StringIO) else ""
    with contextlib.suppress(Exception):
        stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "backslashreplace")


# Reads and writes outside of a case's folder

_watched: Case | None = None


@contextlib.contextmanager
def _watching(case: Case) -> Iterator[None]:
    global _watched
    _watched = case
    try:
        yield
    finally:
        _watched = None


def _audit(event: str, args: tuple) -> None:
    """Notes what a case opens outside of its folder; what it would change there is refused."""
    case = _watched
    if case is None:
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, str | bytes):
            if flags & _WRITES:
                _check_change(case, event, path)
            else:
                _check_read(case, os.path.abspath(os.fsdecode(path)))
    elif event in _CHANGES:
        for path in args:
            if isinstance(path, str | bytes):
                _check_change(case, event, path)
    elif event == "pickle.find_class":
        case.found(f"unpickles {args[0]}.{args[1]}")
    elif event in _STARTS and not str(args[:1]).endswith("'uname',)"):  # platform.processor() asks it
        case.found(f"{event}: {_without_numbers(shown(args[0]))}", shown(args))


def _check_read(case: Case, path: str) -> None:
    inside = (str(case.place / "case"), str(case.shared), *_READABLE)
    if path not in case.named and not _is_within(path, inside) and os.path.exists(path):
        case.found(f"reads {path.removeprefix(str(case.place))} outside of the folder", _stack())


def _check_change(case: Case, event: str, path: str | bytes) -> None:
    real = os.path.realpath(os.fsdecode(path))
    if real != "/dev/null" and not _is_within(real, (str(case.place / "case"), str(case.shared))):
        known = re.sub(r"\d+", "N", real.removeprefix(str(case.place)))
        case.found(f"{event} outside of the folder: {known}", _stack())
        raise OSError(30, "Read-only file system", real)


def _is_within(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _stack() -> str:
    return "".join(traceback.format_stack(limit=12)[:-3])


class Opened:
    """Whether anything in a folder is opened, by whatever language: Linux's inotify. Elsewhere never."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = -1
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            self.descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            libc.inotify_add_watch(self.descriptor, os.fsencode(folder), 0x20)  # IN_OPEN

    def any(self) -> bool:
        try:
            return self.descriptor >= 0 and bool(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


# A process of cases


def _do(kind: Kind, seed: int, number: int, work: Path, shared: Path, limit: float) -> Outcome:
    """One case, in this process."""
    place = work / f"{number}"
    (place / "case").mkdir(parents=True)
    (place / "outside").mkdir()
    case = Case(random.Random(f"{seed}:{number}"), place, shared)
    os.chdir(place / "case")
    tempfile.tempdir = str(place / "case")
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    environment = dict(os.environ)

    def end(*_: object) -> None:
        raise Hang(f"longer than {limit:g} s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + 1, file=sys.__stderr__)
    try:
        kind.run(case)
    except (Exception, Hang) as error:  # outside of the calls under test, or a fault of the fuzz itself
        case._escaped(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if grown > MEMORY // 4:
        case.found("takes more than 0.75 GB of memory", f"{grown / 1e9:.2f} GB")
    if torch.get_default_dtype() != torch.float32:
        case.found("changes torch's default dtype", str(torch.get_default_dtype()))
        torch.set_default_dtype(torch.float32)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(work)
    shutil.rmtree(place, ignore_errors=True)
    return Outcome(number, kind.name, case.ends, seconds, case.described, case.findings)


def _child(
    kinds: Callable[[int], Kind],
    seed: int,
    numbers: Sequence[int],
    work: Path,
    shared: Path,
    limit: float,
    out: int,
) -> None:
    """Does the cases, and writes a line before and after each."""
    log = os.open(work / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    sys.__stderr__ = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.__stderr__)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_audit)
    for number in numbers:
        os.write(out, b"%d\n" % number)
        outcome = _do(kinds(number), seed, number, work, shared, limit)
        line = json.dumps(outcome)
        os.write(out, line.encode() + b"\n")


def outcomes(
    kinds: Callable[[int], Kind],
    seed: int,
    numbers: Iterator[int],
    limit: float = LIMIT,
    batch: int = 20,
) -> Iterator[Outcome]:
    """Does the cases in forked processes, a batch in each, and yields what came of them in their order.

    kinds: the kind of each number. A process that dies or hangs is a finding; the rest of its batch goes on
    in another. Closing the iterator ends the process and removes every file.
    """
    with tempfile.TemporaryDirectory(prefix="qwen_ref-fuzz-") as name:
        work, shared = Path(name).resolve() / "cases", Path(name).resolve() / "shared"
        work.mkdir()
        shared.mkdir()
        waiting: list[int] = []
        prepared: set[str] = set()
        while True:
            while len(waiting) < batch and (number := next(numbers, None)) is not None:
                waiting.append(number)
                if (kind := kinds(number)).name not in prepared:
                    kind.prepare(shared)
                    prepared.add(kind.name)
            if not waiting:
                return
            for outcome in _batch(kinds, seed, waiting, work, shared, limit):
                waiting.remove(outcome.number)
                yield outcome


def _batch(
    kinds: Callable[[int], Kind], seed: int, numbers: Sequence[int], work: Path, shared: Path, limit: float
) -> Iterator[Outcome]:
    """The outcomes of a process until it ends."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of threads that a fork does not copy: none holds a lock that is used
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            _child(kinds, seed, numbers, work, shared, limit, writing)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(writing)
    ended = False
    running, begun, rest = None, time.monotonic(), b""
    try:
        while not ended:
            ready, _, _ = select.select([reading], [], [], limit + 5)
            piece = os.read(reading, 1 << 16) if ready else b""
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                found = json.loads(line)
                if isinstance(found, int):
                    running, begun = found, time.monotonic()
                else:
                    *fields, findings = found
                    yield Outcome(*fields, [Finding(*each) for each in findings])
                    running = None
            if not piece:
                break
        if not ready:
            os.kill(child, signal.SIGKILL)
    except BaseException:  # closed, or Ctrl-C
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if running is not None:
        log = (work / "stderr").read_text(errors="replace")
        ours = re.findall(rf'File "{re.escape(str(PACKAGE))}/(\S+)", line \d+ in (\S+)', log)
        where = f"{ours[0][0]}:{ours[0][1]}" if ours else "(no frame of ours)"
        what = "does not return from C" if not ready else f"ends the process with code {code}"
        seconds = time.monotonic() - begun
        finding = Finding(f"{where}: {what}", log[-2000:])
        yield Outcome(running, kinds(running).name, ["died"], seconds, ["(replay it)"], [finding])
    elif code != 0:
        raise RuntimeError(f"a process of the fuzz failed: {(work / 'stderr').read_text()[-2000:]}")
