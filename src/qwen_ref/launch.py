"""One process a rank: torchrun's variables, the process group, and the watch over the other ranks.

torchrun starts the processes and tells each by environment variables which rank it is and where the ranks
meet: a small key-value store over TCP, which torchrun or rank 0 keeps. The collectives find each other by it;
here it also carries the ranks' heartbeats, because a collective alone would wait for a dead rank.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref import cli

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT = 60.0  # seconds; torch's own is half an hour


class Launch(NamedTuple):
    """What torchrun tells a process: its rank of how many, its place on its machine, where the ranks meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launched() -> Launch | None:
    """torchrun's variables; None where the process was started alone. ValueError where some are missing."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        there = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        raise ValueError(
            f"{there or 'RANK and WORLD_SIZE'} in the environment without {', '.join(missing)}: start the "
            "ranks with torchrun, which sets them all, or unset WORLD_SIZE and RANK to run alone"
        )
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local_rank = _number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else rank
    if not (0 <= rank < size and local_rank >= 0 and 0 < port < 2**16):
        raise ValueError(
            f"{rank=}, {size=}, {local_rank=} and {port=} in the environment cannot be: RANK and LOCAL_RANK "
            "count from 0 to WORLD_SIZE - 1, MASTER_PORT is at most 65535"
        )
    return Launch(rank, size, local_rank, os.environ["MASTER_ADDR"], port)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name}={os.environ[name]!r} in the environment must be a whole number") from None


class RankLost(ConnectionError):
    """Another rank is gone, or did not answer in time."""


class Ranks:
    """The ranks of a command, for as long as it runs: `with Ranks(launched(), timeout) as ranks`.

    A thread of each rank writes heartbeats into the store and reads the others'. Where a rank falls silent,
    or has left word why it failed, every other one ends with exit code 1 and a line that says so, whatever
    its main thread is waiting for. With one rank, all of this is nothing.
    """

    def __init__(self, launch: Launch | None, timeout: float = TIMEOUT) -> None:
        if not 0 < timeout < 1e6:
            raise ValueError(f"{timeout=} must be a number of seconds above 0 and below 1,000,000")
        self.rank, self.size = (0, 1) if launch is None else (launch.rank, launch.size)
        self.timeout = timeout

    def __enter__(self) -> Ranks:
        if self.size > 1:
            if self.rank > 0:  # Ctrl-C reaches every process of a terminal; rank 0 decides what it means
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._store = _connect(self.timeout)
            self._watch = _Watch(self.rank, self.size, _connect(self.timeout), self.timeout)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if isinstance(error, RankLost):
            self._watch.suspect(str(error))
            # It names the rank that is gone, and ends the process, unless it waits for the store itself.
            self._watch.join(8 * self._watch.interval)
            self._watch.end(f"{_keeper_of_the_store()} is gone: it does not answer")
        parted = self._part(patience=math.inf if error is None else 2 * self._watch.interval)
        self._watch.finish()
        if not parted:
            with contextlib.suppress(RuntimeError):
                self._store.set("fault", f"rank {self.rank} failed: {error or kind.__name__}")
                time.sleep(2 * self._watch.interval)  # rank 0 may keep the store: let the others read it

    def from_rank_0(self, text: str | None) -> str:
        """Rank 0's text on every rank, however long rank 0 needs to have it."""
        if self.rank == 0:
            if self.size > 1:
                self._store.set("request", text)
            return text
        while not self._store.check(["request"]):
            time.sleep(_POLL)
        return self._store.get("request").decode()

    def start_process_group(self, device: str) -> None:
        """The default process group, whose collectives wait as long for a rank as the watch does."""
        if self.size > 1:
            from qwen_ref.parallel import start_process_group

            start_process_group(device, self.timeout / 2)

    def until_interrupted(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Passes steps on. Ctrl-C waits for the end of a step: within it, the other ranks need this one."""
        if self.size == 1:
            yield from steps
            return
        interrupted = threading.Event()
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        try:
            for step in steps:
                yield step
                if interrupted.is_set():
                    raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

    def _part(self, patience: float) -> bool:
        """Waits for all ranks to part; False where they do not."""
        start = time.monotonic()
        self._watch.parting = True
        try:
            self._store.add("parted", 1)
            while self._store.add("parted", 0) < self.size:
                if time.monotonic() - start > patience:
                    return False
                time.sleep(_POLL)
        except RuntimeError:
            pass  # whoever keeps the store has seen all part, and gone
        return True


_POLL = 0.02  # seconds


def _connect(timeout: float) -> Store:
    """A connection of its own to the store: a wait on one holds up whoever else uses it."""
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except RuntimeError as error:
        raise RankLost(f"the ranks did not meet within {timeout:g} s: {first_line(error)}") from error
    return dist.PrefixStore("qwen_ref", store)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Watch(threading.Thread):
    """One rank's ear for the others."""

    def __init__(self, rank: int, size: int, store: Store, timeout: float) -> None:
        super().__init__(daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(0.5, timeout / 20)
        self.parting = False
        self._store = store
        self._heard = {other: (0, time.monotonic()) for other in range(size) if other != rank}
        self._suspicion: tuple[str, float] | None = None
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        # torchrun ends the other ranks by SIGTERM as soon as one has died. The bell is rung at once, while a
        # handler in Python would wait for the main thread, which waits for the dead rank.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)

    def suspect(self, sign: str) -> None:
        """Something is wrong: who is silent now is taken for gone sooner; if nobody is, sign is told."""
        self._suspicion = self._suspicion or (sign, time.monotonic())

    def finish(self) -> None:
        signal.set_wakeup_fd(-1)
        os.write(self._bell, b"\0")
        self.join()
        os.close(self._ear)
        os.close(self._bell)

    def run(self) -> None:
        while True:
            try:
                self._listen()
            except RuntimeError as error:
                if not self.parting:
                    self.end(f"{_keeper_of_the_store()} is gone: {first_line(error)}")
            if select.select([self._ear], [], [], self.interval)[0]:
                rung = os.read(self._ear, 64)
                if 0 in rung:
                    return
                if signal.SIGTERM in rung:
                    self.suspect("ended by SIGTERM")

    def _listen(self) -> None:
        self._store.add(f"heartbeats of {self.rank}", 1)
        if self._store.check(["fault"]):
            self.end(self._store.get("fault").decode())
        for other, (beats, _) in self._heard.items():
            if (now_beats := self._store.add(f"heartbeats of {other}", 0)) != beats:
                self._heard[other] = now_beats, time.monotonic()
        now = time.monotonic()
        silent, other = max((now - since, other) for other, (_, since) in self._heard.items())
        # A rank that has not been heard yet may be starting.
        patience = self.timeout / 2 if self._heard[other][0] else self.timeout - 2 * self.interval
        if silent > (patience if self._suspicion is None else 3 * self.interval):
            message = (
                f"rank {other} is gone: nothing was heard of it for {silent:.1f} s. It was killed, perhaps "
                "for lack of memory, or has crashed, or its machine is out of reach"
            )
            self._store.set("fault", message)
            self.end(message)
        if self._suspicion is not None and now - self._suspicion[1] > 6 * self.interval:
            self.end(self._suspicion[0])

    def end(self, message: str) -> None:
        cli.say(f"error: {message}")
        if self.rank == 0:  # it may keep the store: let the others read it
            time.sleep(2 * self.interval)
        os._exit(1)


def _keeper_of_the_store() -> str:
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{'torchrun' if by_torchrun else 'rank 0'}, which keeps the store of the ranks,"
