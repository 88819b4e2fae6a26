"""Which form of a matrix is fastest on this processor: measured, or as the caller says.

torch has several products for one row of x, and no order of theirs holds on all processors. So the forms that
hold a weight as it is asked for are tried on a part of it, in turns, before the weights are laid out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from qwen_ref.config import lacks_memory
from qwen_ref.fast.matrices import (
    DynamicInt8,
    Int4Matrix,
    Int8Table,
    Matrix,
    Rows,
    Table,
    int4_layout,
    kernel_group,
    large_pages,
)
from qwen_ref.parallel import Group
from qwen_ref.quantize.rounding import FewBits, quantize_int8

_TRIED = 2**22  # weights of the part that is tried
_NOT_TRIED = 2**20  # weights of a matrix so small that the small operations around it decide
_LEAST, _MOST = 2**26, 2**28  # bytes that are read to drive the weights out of the processor's caches
_SOONER = 0.95  # of the first form's time, at most, another one must take: noise must not choose
_ROWS = 64  # of x, when the product of many rows is tried
_TURNS = 4  # and one before them, which does not count

Forms = dict[str, Callable[[int], Matrix]]  # by kernel: so many of the first outputs in that form


def forms(weight: Tensor | FewBits, dtype: torch.dtype, wide: bool, exact: bool = True) -> Forms:
    """The forms of a weight, first the one that is taken unmeasured. exact: none that rounds it again."""
    if isinstance(weight, Tensor):
        return {
            "bag": lambda outputs: Table(weight[:outputs], wide),
            "linear": lambda outputs: Rows(weight[:outputs], wide),
        }

    def first(outputs: int) -> FewBits:
        return weight._replace(
            shape=(outputs, weight.shape[1]),
            rows=lambda part: weight.rows(slice(part.start, min(part.stop, outputs))),
        )

    found: Forms = {}
    fits = weight.bits == 4 and kernel_group(weight.group_size) is not None
    if fits and dtype == torch.bfloat16 and not wide and int4_layout() is not None:
        found["int4"] = lambda outputs: Int4Matrix(first(outputs))
    found["bag"] = lambda outputs: Int8Table(first(outputs), dtype, wide)
    if not exact and has_dynamic():
        found["dynamic"] = lambda outputs: DynamicInt8(_in_bytes(first(outputs)), dtype, wide)
    return found


def has_dynamic() -> bool:
    """Whether this torch has the product for DynamicInt8."""
    return bool({"x86", "fbgemm", "onednn"} & {torch.backends.quantized.engine})


def _in_bytes(few_bits: FewBits) -> FewBits:
    """The same weight with a byte for each number and a scale for each output, rounded again if need be."""
    outputs, inputs = few_bits.shape
    if few_bits.bits == 8:
        return few_bits

    def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        q, scale, offset = few_bits.rows(part)
        groups = q.float().unflatten(1, (scale.shape[1], -1)) - 8
        again, scale = quantize_int8((groups * scale[..., None] + offset[..., None]).flatten(1))
        return (again.short() + 128).to(torch.uint8), scale, torch.zeros_like(scale)

    return FewBits((outputs, inputs), 8, inputs, rows)


class Choice:
    """Chooses a kernel for each kind of matrix, once; all ranks take what rank 0 has chosen.

    weights: how many will be laid out. If a byte for each is more than half of the memory that is left,
    4-bit weights stay in 4 bits.
    """

    def __init__(self, asked: str | None, group: Group, weights: int = 0) -> None:
        self.asked, self.group = asked, group
        self.in_bytes = not group.any(weights * group.size > memory_left() / 2)
        self._found: dict[tuple, str] = {}

    def close(self) -> None:
        """Gives back the memory that the measurement took."""
        _buffer.cache_clear()

    def among(self, forms: Forms, outputs: int, inputs: int, dtype: torch.dtype, wide: bool) -> str:
        """The kernel that was asked for if it is among the forms of a matrix, else the fastest.

        All ranks call it alike. A form that one of them lacks is not taken.
        """
        everywhere = [text.split() for text in self.group.texts(" ".join(forms))]
        able = {name: form for name, form in forms.items() if all(name in names for names in everywhere)}
        if self.asked in able:
            return self.asked
        first = next(iter(able))
        stays = first == "int4" and not self.in_bytes
        if self.asked is not None or len(able) == 1 or stays or outputs * inputs < _NOT_TRIED:
            return first
        tried = min(outputs, max(1, _TRIED // inputs))
        key = (*able, tried, inputs, dtype, wide)
        if key not in self._found:
            with self.group.together():
                ours = self._measured(able, tried, inputs, dtype)
            self._found[key] = self.group.texts(ours)[0]
        return self._found[key]

    def _measured(self, forms: Forms, outputs: int, inputs: int, dtype: torch.dtype) -> str:
        """The fastest, on rank 0."""
        if self.group.rank > 0:
            return ""
        try:
            return _fastest(forms, outputs, inputs, dtype)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            return next(iter(forms))  # no room to try any


def memory_left() -> float:
    """Bytes, within the limits of a container; infinite where the system does not tell: only Linux does."""
    left = _left_in_groups()
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8", errors="replace")
        left = min(left, int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    return left


def _left_in_groups() -> float:
    """What the control groups of this process may still take. Pages of files that they hold count as free."""
    left, own = math.inf, ""
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    for line in own.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":  # version 2
            root, limit, used, before = "", "memory.max", "memory.current", ""
        elif controllers == "memory":
            root, limit, used, before = "/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = Path(f"/sys/fs/cgroup{root}{path}")
        for folder in (group, *group.parents):  # a container may see its own group as the root
            with contextlib.suppress(OSError, ValueError):  # no such file; no limit, which is "max"
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                room += sum(int(stat.get(f"{before}{kind}_file", 0)) for kind in ("active", "inactive"))
                left = min(left, room)
    return left


@functools.lru_cache(maxsize=1)
def _buffer() -> Tensor:
    """As much memory as the processor's largest cache, as far as Linux tells that, and a quarter more."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    size = min(max(_LEAST, max(sizes) * 5 // 4), _MOST)
    return large_pages((size // 4,), torch.float32).fill_(1)


def _fastest(forms: Forms, outputs: int, inputs: int, dtype: torch.dtype) -> str:
    """By the time for a prompt of 128 tokens and 128 decode steps."""
    matrices = {name: form(outputs) for name, form in forms.items()}
    few, many = (torch.linspace(-1, 1, rows * inputs, device="cpu").to(dtype) for rows in (1, _ROWS))
    few, many = few.view(1, -1), many.view(_ROWS, -1)
    buffer = _buffer()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in forms}
    with torch.inference_mode():
        for turn in range(_TURNS + 1):
            for name, matrix in matrices.items():
                for rows, found in zip((few, many), times[name], strict=True):
                    if rows is many and turn > 1:
                        continue
                    if rows is few:
                        buffer.sum()  # in a decode step all weights come from memory
                    start = time.perf_counter()
                    matrix(rows)
                    if turn > 0:  # the first allocates
                        found.append(time.perf_counter() - start)
    cost = {name: 128 * median(one) + 128 / _ROWS * median(many) for name, (one, many) in times.items()}
    first, best = next(iter(cost)), min(cost, key=cost.__getitem__)
    return best if cost[best] < _SOONER * cost[first] else first
