"""This machine's memory: how fast it is read, whether a model fits, the least time of a decode step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from qwen_ref.checkpoint import STORED_DTYPES, dtype_name
from qwen_ref.commands.sizes import (
    Kind,
    cache_bytes,
    int4_group,
    packed_bytes,
    quantized_bytes,
    weight_bytes,
)
from qwen_ref.config import QwenConfig
from qwen_ref.fast.kernels import memory_left
from qwen_ref.quantize.config import INT4_GROUP, QUANTIZATIONS, GPTQConfig

_BUFFER = 2**28  # bytes, to measure memory bandwidth with
_PASSES = 0.15  # seconds of reading
_SMALL = 2**26  # bytes that a processor's caches may hold


class ReadRate:
    """Bytes per second at which this process's threads read memory: torch's sum of a buffer.

    The buffer must be larger than the processor's caches.
    """

    def __init__(self, size: int, device: str = "cpu") -> None:
        self._sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self._buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
        self.measure()

    def measure(self) -> float:
        self._sync()
        start = time.perf_counter()
        self._buffer.sum()
        self._sync()
        return self._buffer.nbytes / (time.perf_counter() - start)


class Measured(NamedTuple):
    """A rate in bytes per second, and how long its measurement took."""

    rate: float
    seconds: float


def read_rate() -> Measured | None:
    """The best rate of a few passes; None where there is no memory for the buffer."""
    start = time.perf_counter()
    if memory_left() < 2 * _BUFFER:
        return None
    rate = ReadRate(_BUFFER)
    end = time.perf_counter() + _PASSES
    best = rate.measure()
    while time.perf_counter() < end:
        best = max(best, rate.measure())
    return Measured(best, time.perf_counter() - start)


class Form(NamedTuple):
    """A way to hold the weights: bytes on each rank, and how many of them a decode step reads."""

    name: str
    held: int
    read: int


def forms(
    config: QwenConfig, rows: Sequence[Kind], ranks: int, gptq: GPTQConfig | None
) -> tuple[Form, list[Form]]:
    """The weights without an option, and with options for fewer bits."""
    dtype = STORED_DTYPES[rows[0].stored.dtype]

    def form(name: str, bytes_of: Callable[[Kind], int]) -> Form:
        of_all = {row: bytes_of(row) for row in rows}
        (embed,) = (row for row in rows if row.spec.name == "embed.weight")
        row_of_embed = of_all[embed] // embed.spec.shape_of_rank(ranks)[0]  # a step reads one of them
        held = sum(of_all.values())
        return Form(name, held, held - of_all[embed] + row_of_embed)

    if gptq is not None:

        def dequantised(row: Kind) -> int:
            return row.number * math.prod(row.spec.shape_of_rank(ranks)) * dtype.itemsize

        option = "--fast --dtype bfloat16" if gptq.bits == 4 else "--fast"
        packed = form(option, lambda row: row.number * packed_bytes(row.spec, gptq, ranks))
        return form(f"weights, dequantised to {dtype_name(dtype)},", dequantised), [packed]
    stored = " and ".join(dict.fromkeys(row.form for row in rows if len(row.spec.shape) > 1))
    plain = form(f"weights in {stored}", lambda row: weight_bytes(row, ranks))
    also = "" if dtype == torch.bfloat16 else " --dtype bfloat16"
    group = int4_group(config, ranks)
    fewer = []
    for bits in QUANTIZATIONS if group is not None else ("int8",):
        grouping = f" --group-size {group}" if bits == "int4" and group != INT4_GROUP else ""

        def quantised(row: Kind, bits: str = bits) -> int:
            return row.number * quantized_bytes(row.spec, bits, ranks, group)

        fewer.append(form(f"--quantize {bits}{grouping}{also}", quantised))
    return plain, fewer


def estimate(
    config: QwenConfig, rows: Sequence[Kind], ranks: int, context: int, gptq: GPTQConfig | None
) -> Iterator[str]:
    """Lines: whether the model fits into this machine's memory, what a decode step takes, other forms.

    A time is the least that the memory bandwidth allows. It leaves out that products do not use all of the
    bandwidth, all that a processor computes meanwhile, the prompt, what ranks exchange, and the memory of
    activations, of Python and of the layout while `--fast` makes it.
    """
    plain, fewer = forms(config, rows, ranks, gptq)
    cache, left = cache_bytes(config, context, STORED_DTYPES[rows[0].stored.dtype], ranks), memory_left()
    fitting = [form for form in (plain, *fewer) if ranks * (form.held + cache) <= left]
    what = f"{_size(plain.held)} of {plain.name} and {_size(cache)} for {context:,} positions"
    if ranks > 1:
        what = f"each of {ranks} ranks takes {what}"
    if left == math.inf:
        yield f"{what}; this system does not tell how much memory is free"
    elif plain in fitting:
        yield f"fits: {what}; {_size(left)} of memory are free"
    else:
        remedy = ""
        if fitting:
            remedy = f"; {fitting[0].name} fits"
        elif ranks > 1 and (enough := int(left // (plain.held + cache))) > 0:
            remedy = f", enough for {enough} of them"
        elif (shorter := int((left / ranks - plain.held) // (cache // context))) > 0:
            remedy = f"; --context {shorter} fits"
        yield f"does not fit: {what}; {_size(left)} of memory are free{remedy}"

    reads = f"a decode step reads {_size(plain.read)}{' on each rank' if ranks > 1 else ''}"
    if plain.read < _SMALL:
        yield f"{reads}: the processor's caches may hold that, and its memory bandwidth does not decide"
        return
    measured = read_rate() if fitting else None
    reads += f", {_size(plain.read + cache)} at position {context:,}"
    if plain in fitting and measured is not None:
        steps = [ranks * read / measured.rate for read in (plain.read, plain.read + cache)]
        times, rates = (" to ".join(map(_short, each)) for each in (steps, [1 / step for step in steps]))
        whose = "that the ranks of one machine share" if ranks > 1 else "of this machine"
        yield (
            f"{reads}: at least {times} s, {rates} tokens/s, at the memory bandwidth {whose}, "
            f"{measured.rate / 1e9:.1f} GB/s (measured just now, {measured.seconds:.1f} s)"
        )
    elif plain in fitting:
        yield f"{reads}; memory bandwidth was not measured: it takes {_size(2 * _BUFFER)} of free memory"
    elif ranks * cache > left:
        yield f"{reads}; keys and values must fit into memory; --context takes a shorter text"
    elif gptq is not None:
        yield f"{reads}; dequantised weights are copies, which must fit into memory"
    else:
        again = min(ranks * plain.held - (left - ranks * cache), ranks * plain.read)
        yield (
            f"{reads}; the weights stay in the mapped file, and at least {_size(again)} are read from disk "
            f"again for each token: {_short(again / 1e9)} s at 1 GB/s"
        )
    yield "; ".join(f"{form.name}: {_in_words(form, ranks, form in fitting, measured)}" for form in fewer)


def _in_words(form: Form, ranks: int, fits: bool, measured: Measured | None) -> str:
    time = f", at least {_short(ranks * form.read / measured.rate)} s" if fits and measured else ""
    return f"{_size(form.held)} of weights{time if fits else ', does not fit'}"


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
