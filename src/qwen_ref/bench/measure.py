"""The measurements: memory of this process, memory bandwidth, and the speed of models in turns."""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_ref.commands.memory import ReadRate
from qwen_ref.commands.sizes import resident_bytes
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.model import Qwen

_READ_BYTES = 2**29  # of the buffer that memory bandwidth is measured with


# The memory of this process


class Resident(NamedTuple):
    """Bytes of a process in memory."""

    anonymous: int  # that no file backs
    mapped: int  # pages of mapped files


def resident_memory() -> Resident | None:
    """Of this process; None where the system does not tell: only Linux does."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return Resident(*(int(status.split(name)[1].split()[0]) * 1024 for name in ("RssAnon:", "RssFile:")))
    except (OSError, IndexError, ValueError):
        return None


class Memory(threading.Thread):
    """How far the memory of this process rises while the block runs; looked at every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident_memory()
        self.over = threading.Event()
        self.anonymous: int | None = None  # bytes, when the block has ended; None where they cannot be known
        self.mapped: int | None = None

    def look(self) -> None:
        now = resident_memory()
        if self.peak is not None and now is not None:
            self.peak = Resident(*map(max, self.peak, now))

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
        if self.peak is not None and self.before is not None:
            self.anonymous, self.mapped = map(operator.sub, self.peak, self.before)


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
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


# What is timed


class Subject:
    """A model that prefills prompts and decodes tokens; both return the ids (B, 1) that come next."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model

    def settle(self) -> None:
        """Called before each timing."""

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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, int], Timing]:
    """Every subject's timings at every length, by (name, length).

    Subjects take turns within each repeat. A repeat prefills `length` tokens of every row and decodes
    `tokens` more, and after each of them the memory's rate is measured. Rates count the tokens of all rows.
    One more repeat comes before the others and does not count: it allocates what is allocated once.
    """
    sync, rate = _sync(device), ReadRate(_READ_BYTES, device)
    generator = torch.Generator().manual_seed(0)
    found = {(s.name, length): Timing([], [], [], []) for s in subjects for length in lengths}
    turns = itertools.product(range(-1, repeats), lengths, subjects)
    for done, (repeat, length, subject) in enumerate(turns):
        progress(done, (repeats + 1) * len(lengths) * len(subjects))
        vocab_size = subject.model.config.vocab_size
        ids = torch.randint(vocab_size, (batch, length), generator=generator).to(device)
        with torch.inference_mode():
            subject.settle()
            with _Timer(sync) as first:
                token = subject.prefill(ids, tokens)
            times, rates = [], []
            for _ in range(tokens):
                subject.settle()
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
    weights = resident_bytes(model) - model.embed.weight.nbytes
    config, size = model.config, model.embed.weight.element_size()
    head = config.kv_channels + 4 if model.cache_type is Int8Cache else config.kv_channels * size
    position = 2 * config.num_hidden_layers * config.num_attention_heads // model.group.size * head
    return weights + batch * (config.hidden_size * size + length * position)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str) -> dict[str, Any]:
    """What a figure must name."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    found: dict[str, Any] = {"processor": processor, "cores": cores(), "threads": torch.get_num_threads()}
    found["instructions"], found["torch"] = torch.backends.cpu.get_cpu_capability(), torch.__version__
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
