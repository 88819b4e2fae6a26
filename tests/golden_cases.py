"""The recorded outputs of the published code, and how far they and this implementation are from the truth.

The truth is our float64 model of the same weights. `python tests/golden_cases.py` prints the table of
tests/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from conftest import GOLDEN, read_golden
from torch import Tensor

from qwen_ref import Qwen, load_model

FOLDERS = ("extended_base", "ntk_logn", "long")
DTYPES = ("float32", "bfloat16", "float16")


class Error(NamedTuple):
    """The squares of a case's errors against float64, summed, and of the truth; and how many bits agree."""

    ours: float
    recorded: float
    truth: float
    equal: int
    count: int

    def __add__(self, other: Error) -> Error:  # type: ignore[override]
        return Error(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def ours_rms(self) -> float:
        return math.sqrt(self.ours / self.truth)

    @property
    def recorded_rms(self) -> float:
        return math.sqrt(self.recorded / self.truth)

    @property
    def ratio(self) -> float:
        """Our error over the recording's; 1 where both are exact, infinite where only the recording is."""
        if self.recorded == 0:
            return 1.0 if self.ours == 0 else math.inf
        return math.sqrt(self.ours / self.recorded)


def error(ours: Tensor, recorded: Tensor, truth: Tensor) -> Error:
    def squares(x: Tensor) -> float:
        return float(x.double().square().sum())

    assert ours.shape == recorded.shape == truth.shape
    assert ours.dtype == recorded.dtype
    return Error(
        ours=squares(ours.double() - truth),
        recorded=squares(recorded.double() - truth),
        truth=squares(truth),
        equal=int((ours == recorded).sum()),
        count=ours.numel(),
    )


@cache
def model(folder: str, dtype: str) -> Qwen:
    """A model of the golden folder, shared by all tests: do not change it, load your own for that."""
    return load_model(GOLDEN / folder, dtype)


@cache
def golden(folder: str) -> dict[str, Tensor]:
    return read_golden(folder)


def cases(folder: str) -> list[str]:
    return sorted({name.split(".")[0] for name in golden(folder) if ".logits." in name})


def logits(qwen: Qwen, folder: str, case: str) -> Tensor:
    """What was recorded, computed by a model: one pass, a pass and then token by token, or a padded batch."""
    ids = golden(folder)[f"{case}.input_ids"]
    kind, *numbers = case.split("_")
    with torch.inference_mode():
        if kind == "batch":
            mask = golden(folder)["batch.attention_mask"]
            return qwen(ids, attention_mask=mask)[mask.bool()]
        if kind == "prefill":
            found = qwen(ids)
        else:
            first, total = map(int, numbers)
            cache = qwen.new_cache(1, total)
            calls = [ids[:, :first], *ids[:, first:].split(1, dim=1)]
            found = torch.cat([qwen(call, cache=cache) for call in calls], dim=1)
    return found[:, -24:] if folder == "long" else found


def recorded(folder: str, case: str, dtype: str) -> Tensor:
    found = golden(folder)[f"{case}.logits.{dtype}"]
    return found[golden(folder)["batch.attention_mask"].bool()] if case == "batch" else found


@cache
def truth(folder: str, case: str) -> Tensor:
    return logits(model(folder, "float64"), folder, case)


def measure(qwen: Qwen, folder: str, case: str, dtype: str) -> Error:
    return error(logits(qwen, folder, case), recorded(folder, case, dtype), truth(folder, case))


def recorded_dtypes(folder: str) -> list[str]:
    return [dtype for dtype in DTYPES if any(name.endswith(f".logits.{dtype}") for name in golden(folder))]


def parity_table() -> Iterator[str]:
    yield "| golden model | dtype | logits | our error | recorded error | ratio | one case | bit-equal |"
    yield "|---|---|---|---|---|---|---|---|"
    for folder in FOLDERS:
        for dtype in recorded_dtypes(folder):
            errors = [measure(model(folder, dtype), folder, case, dtype) for case in cases(folder)]
            total = sum(errors[1:], errors[0])
            ratios = [found.ratio for found in errors]
            yield (
                f"| {folder} | {dtype} | {total.count:,} | {total.ours_rms:.2e} | {total.recorded_rms:.2e} "
                f"| {total.ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} "
                f"| {total.equal / total.count:.1%} |"
            )


if __name__ == "__main__":
    print("\n".join(parity_table()))
