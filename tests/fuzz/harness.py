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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import qwen_ref
from qwen_ref.commands.files import bundled_checkpoint
from qwen_ref.config import InputError

T = TypeVar("T")

LIMIT = 10.0  # seconds that a case may wait, or use the processor
_PATIENCE = 3  # times as long it may last where others use the processor
_MEMORY = 2 << 30  # bytes that a case may map; it may touch three eighths of them
_PACKAGE = str(Path(qwen_ref.__file__).resolve().parent)
_ERROR = "qwen_ref: error: "
_LONGEST_ERROR = 12_000  # characters

# What may be opened for reading outside of a case's folder: Python, libraries, the system's own files.
_READABLE = (
    *{os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())},
    *(_PACKAGE, str(bundled_checkpoint()), str(Path(__file__).resolve().parents[2])),
    *("/proc", "/sys", "/etc", "/usr", "/lib", "/dev/null", "/dev/random", "/dev/urandom"),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = re.compile(r"os\.(remove|rename|rmdir|mkdir|truncate|chmod|link|symlink)")
_STARTS = re.compile(r"os\.(system|exec|fork|posix_spawn)|subprocess\.Popen|socket\.(connect|bind)")


class Hang(BaseException):
    """The time limit; no `except Exception` of the code under test may swallow it."""


class Finding(NamedTuple):
    """sign: what is the same for every case that shows this fault."""

    sign: str
    detail: str


class Outcome(NamedTuple):
    """What came of a case. ends: exit codes of commands; of library calls "returned" or "refused"."""

    number: int
    kind: str
    ends: list[str]
    seconds: float
    described: list[str]
    findings: list[Finding]


class Kind(NamedTuple):
    """prepare: makes what all cases share, in a folder, once. run: does one case."""

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Case], object]


@dataclass
class Case:
    """What a case draws from, where it may write, and what was found."""

    rng: random.Random
    place: Path  # its own folder is place / "case", where it runs; no other may be written
    shared: Path  # what `prepare` made
    described: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    starts: bool = (
        False  # whether a library may start programs; platform.processor() starts uname in any case
    )
    named: set[str] = field(default_factory=set)  # paths elsewhere that the command line itself names

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
            self.escaped(error)
            return None
        self.ends.append("returned")
        return value

    def command(
        self,
        main: Callable[[list[str]], int],
        arguments: Sequence[str],
        stdin: bytes = b"",
        allows: Collection[str] = (),
        streams: tuple[Any, Any] | None = None,
    ) -> None:
        """Runs a command. allows: of "code 1", "several errors" and "other lines" on stderr what it may do.

        streams: what it finds as stdout and stderr, if they cannot be judged.
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
            self.escaped(error)
        finally:
            left = [(stream, getattr(stream, "errors", None)) for stream in (sys.stdout, sys.stderr)]
            sys.stdin, sys.stdout, sys.stderr = saved
        self.ends.append("escaped" if code is None else str(code))
        if left != before and None not in (out, err):
            self.found("sys.stdout or sys.stderr is not left as it was", f"{before} → {left}")
        if code is None:
            return
        if code not in (0, 2, 130, 141) and not (code == 1 and "code 1" in allows):
            self.found(f"{main.__module__}: exit code {code}")
        if streams is None:
            said, printed = (stream.buffer.getvalue().decode() for stream in _flushed(err, out))
            self.describe(f"ends with {code}, prints {shown(printed)}, says {shown(said[-300:])}")
            self._judge_errors(code, said, main.__module__, allows)
            if code == 0 and "--json" in arguments and not {"-h", "--help"} & {*arguments}:
                self._judge_json(printed, main.__module__)

    def _judge_errors(self, code: int, said: str, command: str, allows: Collection[str]) -> None:
        lines = said.splitlines()
        errors = [line for line in lines if _ERROR in line]
        odd = [line for line in lines if not line.startswith("qwen_ref: ")]
        if "Traceback" in said:
            self.found(f"{command}: a traceback on stderr: {lines[-1][:100]}", said)
        elif code == 2 and not (len(errors) == 1 or (errors and "several errors" in allows)):
            self.found(f"{command}: exit code 2 with {len(errors)} lines of error", said)
        elif code != 2 and errors:
            self.found(f"{command}: exit code {code} with a line of error", said)
        elif odd and "other lines" not in allows:
            self.found(f"{command}: a stray line on stderr: {_without_values(odd[0])[:100]}", said)
        if errors and len(errors[0]) > _LONGEST_ERROR:
            self.found(f"{command}: an error of more than {_LONGEST_ERROR} characters", errors[0][:300])

    def _judge_json(self, printed: str, command: str) -> None:
        def refuse(constant: str) -> None:
            raise ValueError(constant)

        try:
            json.loads(printed, parse_constant=refuse)
        except ValueError as error:
            self.found(f"{command}: --json prints no JSON: {error}"[:120], printed[-500:])

    def escaped(self, error: BaseException) -> None:
        """Notes an exception that is no InputError, by the innermost place of this project."""
        frames = [
            each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(_PACKAGE)
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "(no frame of ours)"
        line = _without_values(str(error).partition("\n")[0])[:80]
        self.found(f"{where}: {type(error).__name__}: {line}", "".join(traceback.format_exception(error)))


def _without_values(text: str) -> str:
    """So that two cases of one fault look alike."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text)
    return re.sub(r"/\S+", "PATH", re.sub(r"-?\d[\d.,e+]*", "N", text))


def shown(value: object, longest: int = 300) -> str:
    text = ascii(value)
    return text if len(text) <= longest else f"{text[: longest - 40]}…({len(text)} characters)…{text[-20:]}"


def capture(encoding: str = "utf-8", errors: str = "backslashreplace") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def _flushed(*streams: Any) -> Iterator[Any]:
    for stream in streams:
        stream.flush()
        yield stream


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
    if event == "open" and isinstance(args[0], str | bytes):
        if args[2] & _WRITES:
            _check_change(case, event, args[0])
        else:
            _check_read(case, os.path.abspath(os.fsdecode(args[0])))
    elif _CHANGES.fullmatch(event):
        for path in args:
            if isinstance(path, str | bytes):
                _check_change(case, event, path)
    elif event == "pickle.find_class":
        case.found(f"unpickles {args[0]}.{args[1]}")
    elif _STARTS.fullmatch(event) and not (
        event == "subprocess.Popen" and (case.starts or args[0] == "uname")
    ):
        case.found(f"{event}: {_without_values(shown(args[0]))}", shown(args))


def _check_read(case: Case, path: str) -> None:
    inside = (str(case.place / "case"), str(case.shared), *_READABLE)
    if path not in case.named and not _is_within(path, inside) and os.path.exists(path):
        case.found(f"reads {path.removeprefix(str(case.place))} outside of the folder", _stack())


def _check_change(case: Case, event: str, path: str | bytes) -> None:
    real = os.path.realpath(os.fsdecode(path))
    if real != os.devnull and not _is_within(real, (str(case.place / "case"), str(case.shared))):
        known = re.sub(r"\d+", "N", real.removeprefix(str(case.place)))
        case.found(f"{event} outside of the folder: {known}", _stack())
        raise OSError(30, "Read-only file system", real)


def _is_within(path: str, folders: Collection[str]) -> bool:
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
        """Asked once, at the end."""
        if self.descriptor < 0:
            return False
        with open(self.descriptor, "rb", buffering=0) as events:
            return bool(events.read(4096))


# A process of cases


class Run(NamedTuple):
    """kinds: the kind of each number. work: where the cases are done. limit: seconds of each."""

    kinds: Callable[[int], Kind]
    seed: int
    work: Path
    shared: Path
    limit: float


def outcomes(
    kinds: Callable[[int], Kind], seed: int, numbers: Iterator[int], limit: float = LIMIT, batch: int = 20
) -> Iterator[Outcome]:
    """Does the cases of these numbers, a batch in a process, and yields what came of them in their order.

    A process that dies or hangs is a finding; the rest of its batch goes on in another. Closing the iterator
    ends the process and removes every file.
    """
    with tempfile.TemporaryDirectory(prefix="qwen_ref-fuzz-") as name:
        run = Run(kinds, seed, Path(name).resolve() / "cases", Path(name).resolve() / "shared", limit)
        run.work.mkdir()
        run.shared.mkdir()
        waiting: list[int] = []
        prepared: set[str] = set()
        while True:
            while len(waiting) < batch and (number := next(numbers, None)) is not None:
                waiting.append(number)
                if (kind := kinds(number)).name not in prepared:
                    kind.prepare(run.shared)
                    prepared.add(kind.name)
            if not waiting:
                return
            for outcome in _batch(run, waiting):
                waiting.remove(outcome.number)
                yield outcome


def _batch(run: Run, numbers: Sequence[int]) -> Iterator[Outcome]:
    """The outcomes of a process until it ends."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # of threads that a fork does not copy: none holds a lock that is used
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            _do_all(run, numbers, writing)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(writing)
    running, begun, rest = None, time.monotonic(), b""
    try:
        while ready := select.select([reading], [], [], (_PATIENCE + 1) * run.limit)[0]:
            if not (piece := os.read(reading, 1 << 16)):
                break
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                found = json.loads(line)
                if isinstance(found, int):
                    running, begun = found, time.monotonic()
                else:
                    running = None
                    yield Outcome(*found[:-1], [Finding(*each) for each in found[-1]])
        if not ready:
            os.kill(child, signal.SIGKILL)
    except BaseException:  # closed, or Ctrl-C
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = (run.work / "stderr").read_text(errors="replace")
    if running is not None:
        ours = re.findall(rf'File "{re.escape(_PACKAGE)}/(\S+)", line \d+ in (\S+)', log)
        where = ":".join(ours[0]) if ours else "(no frame of ours)"
        what = "does not return from C" if not ready else f"ends the process with code {code}"
        described = re.findall("^case: (.*)", log, re.MULTILINE)
        finding = Finding(f"{where}: {what}", log[:2000])
        yield Outcome(
            running, run.kinds(running).name, ["died"], time.monotonic() - begun, described, [finding]
        )
    elif code != 0:
        raise RuntimeError(f"a process of the fuzz failed: {log[-2000:]}")


def _do_all(run: Run, numbers: Sequence[int], out: int) -> None:
    """In a process of its own: does the cases, and writes a line before and after each."""
    log = os.open(run.work / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    sys.__stderr__ = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.__stderr__)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True  # of a module that is first imported in a case
    sys.addaudithook(_audit)
    for number in numbers:
        os.write(out, b"%d\n" % number)
        os.truncate(log, 0)
        line = json.dumps(_do(run, number)).encode()
        os.write(out, line + b"\n")


def _do(run: Run, number: int) -> Outcome:
    """One case, in this process, which is left as it was."""
    kind, place = run.kinds(number), run.work / str(number)
    (place / "case").mkdir(parents=True)
    os.chdir(place / "case")
    tempfile.tempdir = str(place / "case")
    environment = dict(os.environ)
    case = Case(random.Random(f"{run.seed}:{number}"), place, run.shared)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, begun = time.perf_counter(), time.process_time()

    def end(*_: object) -> None:
        used, passed = time.process_time() - begun, time.perf_counter() - start
        if used < run.limit / 50 or used > run.limit or passed > _PATIENCE * run.limit:
            raise Hang(f"longer than {run.limit:g} s")
        signal.setitimer(signal.ITIMER_REAL, run.limit - used + 0.1)  # others have the processor

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, run.limit)
    faulthandler.dump_traceback_later((_PATIENCE + 0.5) * run.limit, file=sys.__stderr__)
    try:
        kind.run(case)
    except (Exception, Hang) as error:  # outside of the calls under test, or a fault of the fuzz itself
        case.escaped(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    if grown > _MEMORY * 3 // 8:
        case.found("takes more than 0.75 GiB of memory", f"{grown / 1e9:.2f} GB")
    if torch.get_default_dtype() != torch.float32:
        case.found("changes torch's default dtype", str(torch.get_default_dtype()))
        torch.set_default_dtype(torch.float32)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(run.work)
    shutil.rmtree(place, ignore_errors=True)
    return Outcome(number, kind.name, case.ends, seconds, case.described, case.findings)
