"""Several ranks of a command, and the watch over them: if one is lost, all end, and say which one it was.

torchrun starts a process for each rank. Environment variables tell each process its rank and where the ranks
meet: a small key-value store over TCP, which torchrun or rank 0 keeps. The collectives connect through the
store. Here it also carries a heartbeat of each rank, because a collective alone would wait for a dead rank.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from qwen_ref.commands.cli import out_of_memory, say
from qwen_ref.commands.ranks import TIMEOUT, Ranks
from qwen_ref.config import InputError, lacks_memory
from qwen_ref.loading.launch import Launch
from qwen_ref.parallel import (
    RankLost,
    is_lost,
    lost_ranks_named,
    require_distributed,
    start_process_group,
)

_RUNS = itertools.count()  # of Ranks in this process; all ranks count alike


class WatchedRanks(Ranks):
    """The ranks of a command, for as long as it runs.

    Threads of each rank write its heartbeats into the store and read those of the others. If a rank falls
    silent or has written why it failed, every other rank ends with exit code 1 and a line that says so,
    whatever its main thread is waiting for. The exit code is 2 if that rank had too little memory.

    A process may do this several times, one after another, if all ranks do. Each time leaves nothing behind.
    """

    def __init__(self, launch: Launch, timeout: float = TIMEOUT) -> None:
        self.launch, self.timeout = launch, timeout
        self.rank, self.size = launch.rank, launch.size
        self._started_group = False

    def __enter__(self) -> WatchedRanks:
        if threading.current_thread() is not threading.main_thread():
            raise InputError("several ranks must run in the main thread of their processes, for signals")
        self._excepthook = sys.excepthook  # a process group replaces it
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self.rank > 0:  # Ctrl-C reaches every process of a terminal; rank 0 decides what it means
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._watch = _Watch(self.launch, self.timeout)
        self._watch.start()
        try:
            self._store, self._for_group = self._watch.connect()
        except BaseException:
            self._stop_watching()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, RankLost):
            try:
                if error is not None and lacks_memory(error):
                    with _store_errors_named():
                        self._store.set("too little memory", "")
                self._leave(
                    None if error is None else out_of_memory(error) or str(error) or type(error).__name__
                )
            except RankLost as lost:
                error = lost
        if isinstance(error, RankLost):
            self._watch.suspect(str(error))
            self._watch.join()  # it names the rank that is gone, and ends the process
        self._stop_watching()

    def share(self, text: str | None) -> str:
        with _store_errors_named():
            if self.rank == 0:
                encoded = (text or "").encode("utf-8", "surrogatepass")
                self._store.set("shared", encoded)  # type: ignore[arg-type]  # it takes bytes, too
                return text or ""
            _until(lambda: self._store.check(["shared"]))
            return self._store.get("shared").decode("utf-8", "surrogatepass")

    def meet(self, device: str) -> None:
        """Starts the default process group. One that the caller has started is used as it is.

        A collective may wait for days, for example for the reader of `| less`: the watch finds lost ranks.
        """
        if not dist.is_initialized():
            days = 10 * 24 * 3600
            start_process_group(device, days, store=self._for_group, rank=self.rank, world_size=self.size)
            self._started_group = True

    def until_interrupted(self, steps: Iterator[Any]) -> Iterator[Any]:
        interrupted = threading.Event()
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        try:
            for step in steps:
                yield step
                if interrupted.is_set():
                    raise KeyboardInterrupt
        finally:
            signal.signal(signal.SIGINT, before)

    def _leave(self, problem: str | None) -> None:
        """Waits until all ranks leave. A rank that has failed waits only briefly, and writes why it failed.

        Rank 0 leaves last, because it may keep the store.
        """
        store, pause = self._store, 2 * self._watch.interval

        def all_leave() -> bool:
            return store.add("leaving", 0) == self.size if self.rank == 0 else store.check(["over"])

        with _store_errors_named():
            store.add("leaving", 1)
            orderly = _until(all_leave, math.inf if problem is None else pause)
            self._watch.leaving = True
            if not orderly:
                store.set("fault", _plain(f"rank {self.rank} failed: {problem}"))
                time.sleep(pause)  # for the others to read it
            elif self.rank == 0:
                store.set("over", "")
                _until(lambda: store.add("left", 0) == self.size - 1, pause)
            else:
                store.add("left", 1)
                if not _kept_by_torchrun():  # the next run must not meet at a store that rank 0 is closing
                    with contextlib.suppress(RuntimeError):
                        _until(lambda: store.check(["never"]), pause)

    def _stop_watching(self) -> None:
        self._watch.stop()
        if self._started_group:
            dist.destroy_process_group()
        vars(self).pop("_store", None)  # this and the next one close connections, if the ranks have met
        vars(self).pop("_for_group", None)
        sys.excepthook = self._excepthook
        for number, handler in self._handlers.items():
            if handler is not None:  # None: not Python's, which cannot put it back
                signal.signal(number, handler)


def _until(condition: Callable[[], bool], patience: float = math.inf) -> bool:
    """Waits for the condition; whether it came true within `patience` seconds."""
    end = time.monotonic() + patience
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return true


def _store_errors_named() -> contextlib.AbstractContextManager[None]:
    return lost_ranks_named(f"{_keeper()} is gone")


def _kept_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _keeper() -> str:
    return f"{'torchrun' if _kept_by_torchrun() else 'rank 0'}, which keeps the store of the ranks,"


def _plain(text: str) -> str:
    """The text in UTF-8. Bytes of a file's name that are no UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


class _Watch(threading.Thread):
    """Ends the process when another rank is gone.

    Three threads wait for different things, so that one of them can always act:
    - the main thread waits for a collective, a file, or the reader of stdout.
    - `_listen` waits for the store. Every half second it writes a heartbeat, a number one higher than before.
      It reads the heartbeats of the other ranks, and "fault", in which a failed rank writes why it failed.
    - `run` waits for half a second or a signal, nothing else. It sees when the store does not answer.

    The process ends
    - when a rank or the store has been silent for half the timeout;
    - when something is suspicious (an error of a collective, SIGTERM) and a rank has been silent for three
      heartbeats; if no rank is silent, after five heartbeats (six, if the store does not answer), with what
      was suspicious as the reason;
    - when the ranks have not met after nine tenths of the timeout.
    """

    def __init__(self, launch: Launch, timeout: float) -> None:
        super().__init__(daemon=True)
        self.launch, self.timeout = launch, timeout
        self.interval = min(0.5, timeout / 20)
        self.leaving = False
        self._answered = time.monotonic()  # when the store last answered
        self._connected = False
        self._suspicion: tuple[str, float] | None = None
        self._ended = threading.Lock()
        # torchrun ends the other ranks by SIGTERM as soon as one has died. A handler in Python would run in
        # the main thread, which waits for the dead rank. Through these sockets the signal's number comes at
        # once. (Windows cannot wait for a pipe.)
        self._wakeup, self._written = socket.socketpair()
        self._written.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._listener: threading.Thread | None = None
        self._over = threading.Event()

    def connect(self) -> tuple[dist.Store, dist.Store]:
        """Meets the other ranks and starts to listen. Returns two connections to the store: one for the main
        thread, one for the process group.
        """
        require_distributed()
        run = next(_RUNS)  # the store may still hold what an earlier one left
        patience = timedelta(seconds=self.timeout)
        with lost_ranks_named(f"the ranks could not meet at {self.launch.address}:{self.launch.port}"):
            # A connection for each thread: one that waits blocks all others on its connection.
            stores = [next(dist.rendezvous("env://", timeout=patience))[0] for _ in range(3)]
        for_listening, for_main, for_group = (dist.PrefixStore(f"qwen_ref/{run}", store) for store in stores)
        self._answered, self._connected = time.monotonic(), True
        self._listener = threading.Thread(target=self._listen, args=(for_listening,), daemon=True)
        self._listener.start()
        return for_main, for_group

    def suspect(self, sign: str) -> None:
        """A silent rank is now taken for lost sooner. If no rank is silent, sign is given as the reason."""
        self._suspicion = self._suspicion or (sign, time.monotonic())

    def stop(self) -> None:
        self.leaving = True
        self._over.set()
        signal.set_wakeup_fd(self._wakeup_before)
        self._written.send(b"\0")
        self.join()
        if self._listener is not None:
            self._listener.join()
        self._wakeup.close()
        self._written.close()

    def run(self) -> None:
        while True:
            if select.select([self._wakeup], [], [], self.interval)[0]:
                numbers = self._wakeup.recv(64)
                if 0 in numbers:
                    return
                if signal.SIGTERM in numbers:
                    self.suspect(f"rank {self.launch.rank} was ended by SIGTERM")
            waited = time.monotonic() - self._answered
            if not self._connected and waited > 0.9 * self.timeout:
                where = f"{self.launch.address}:{self.launch.port}"
                self._end(f"not all of {self.launch.size} ranks came to {where} within {self.timeout:g} s")
            if self._connected and waited > self.timeout / 2 and not self.leaving:
                self._end(f"{_keeper()} is gone: it did not answer for {waited:.1f} s")
            if self._suspicion is not None and time.monotonic() - self._suspicion[1] > 6 * self.interval:
                self._end(self._suspicion[0])

    def _listen(self, store: dist.Store) -> None:
        """Writes this rank's heartbeats and reads those of the others, until the ranks leave."""
        me, ranks = self.launch.rank, range(self.launch.size)
        heard = {rank: (0, time.monotonic()) for rank in ranks if rank != me}
        while not self.leaving:
            try:
                store.add(f"heartbeats of {me}", 1)
                if store.check(["fault"]):
                    code = 2 if store.check(["too little memory"]) else 1
                    self._end(store.get("fault").decode(), code)
                for rank, (beats, _) in heard.items():
                    if (now_beats := store.add(f"heartbeats of {rank}", 0)) != beats:
                        heard[rank] = now_beats, time.monotonic()
                self._answered = now = time.monotonic()
                silent, rank = max((now - since, rank) for rank, (_, since) in heard.items())
                # A rank without any heartbeat yet may still be starting.
                patience = self.timeout / 2 if heard[rank][0] else 0.9 * self.timeout
                if silent > (patience if self._suspicion is None else 3 * self.interval):
                    message = (
                        f"rank {rank} is gone: nothing was heard of it for {silent:.1f} s. It was killed, "
                        "perhaps for lack of memory, or has crashed, or its machine is out of reach"
                    )
                    store.set("fault", message)
                    self._end(message)
                if self._suspicion is not None and now - self._suspicion[1] > 5 * self.interval:
                    store.set("fault", _plain(self._suspicion[0]))
                    self._end(self._suspicion[0])
            except RuntimeError as error:
                if not self.leaving:
                    fault = f"{_keeper()} is gone" if is_lost(error) else "the watch over the ranks failed"
                    self._end(f"{fault}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
            self._over.wait(self.interval)

    def _end(self, message: str, code: int = 1) -> None:
        """Says why, and ends the process: nothing else reaches a main thread that waits for a lost rank."""
        self._ended.acquire()  # never released: two threads may come here
        speaker = threading.Thread(target=say, args=(f"error: {message}",), daemon=True)
        speaker.start()
        speaker.join(1)  # stderr may be a pipe that nobody reads
        if self.launch.rank == 0:  # it may keep the store: the others need time to read what is written there
            time.sleep(2 * self.interval)
        os._exit(code)
