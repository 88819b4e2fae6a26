"""Processes for tests of several ranks, forked from a server that has imported torch.

A process of its own takes 3 s of processor time for that import, a fork a tenth. What only a process of its
own shows (torchrun, the end of the interpreter, what is imported) is tested with one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_IMPORTED = (
    "torch",
    "torch.distributed.rendezvous",
    "pytest",
    "qwen_ref.generate",
    "qwen_ref.perplexity.scoring",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_SERVER = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # what it reads when it imports


class Forked:
    """A process that runs a function; what subprocess.Popen offers, as far as the tests use it."""

    def __init__(
        self,
        function: Callable[..., int | None],
        arguments: Sequence[Any],
        environment: dict[str, str],
        stdin: int | None,
        stdout: int,
        stderr: int,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTED))
        before = dict(os.environ)
        os.environ.update(_SERVER)
        try:
            # What is not picklable: the numbers of open files.
            streams = _Streams((stdin, stdout, stderr))
            self.process = context.Process(
                target=_run, args=(function, arguments, environment, streams), daemon=True
            )
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


class _Streams:
    def __init__(self, files: tuple[int | None, int, int]) -> None:
        self.files = files

    def __getstate__(self) -> list[Any]:
        return [None if file is None else DupFd(file) for file in self.files]

    def __setstate__(self, files: list[Any]) -> None:
        self.files = tuple(None if file is None else file.detach() for file in files)


def _run(
    function: Callable[..., int | None],
    arguments: Sequence[Any],
    environment: dict[str, str],
    streams: _Streams,
) -> None:
    os.environ.update(environment)
    for number, file in enumerate(streams.files):
        file = os.open(os.devnull, os.O_RDONLY) if file is None else file
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    try:
        code = function(*arguments)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


def command(module: str, *arguments: str) -> int:
    """What `python -m module arguments` does."""
    from conftest import command as main_of

    sys.argv = [module, *arguments]
    return main_of(module.removeprefix("qwen_ref."))(list(arguments))


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    found = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(
    ranks: int,
    folder: Path,
    function: Callable[..., int | None],
    *arguments: Any,
    stdin: bytes = b"",
    timeout: float = 120,
) -> tuple[str, str]:
    """Calls function(*arguments) on so many ranks; stdout and stderr of rank 0, which reads stdin."""
    port, started = free_port(), []
    files = [(folder / f"stdout-{rank}", folder / f"stderr-{rank}") for rank in range(ranks)]
    (folder / "stdin").write_bytes(stdin)
    try:
        for rank, (out, err) in enumerate(files):
            with (folder / "stdin").open() as file, out.open("wb") as stdout, err.open("wb") as stderr:
                streams = (None if rank else file.fileno(), stdout.fileno(), stderr.fileno())
                started.append(Forked(function, arguments, variables(rank, ranks, port), *streams))
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            if any(process.poll() for process in started):  # the others would wait for it
                break
            time.sleep(0.01)
        codes = [process.poll() for process in started]
        assert codes == [0] * ranks, (codes, [err.read_text(encoding="utf-8") for _, err in files])
    finally:
        for process in started:
            process.kill()
            process.wait()
    out, err = files[0]
    return out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
