"""Logits at positions around 32,768, computed once by the NumPy reference: golden/very_long.safetensors.

    python tests/very_long.py        # some minutes; the tests only read the file

The published code has no such outputs for models with LogN: its table ends at position 32,766, and it crashes
on the next. Here LogN's formula goes on, so the second case crosses that place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy_reference import forward, read_weights
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
FILE = GOLDEN / "very_long.safetensors"


class Case(NamedTuple):
    folder: str  # the golden model
    length: int
    first: int  # the first position whose logits are kept


CASES = [
    Case("extended_base", length=32768, first=32768 - 16),
    Case("long", length=32768 + 256, first=32768 - 16),
]


def logits(case: Case, ids: np.ndarray) -> np.ndarray:
    """(length − first, V), in float64."""
    config = json.loads((GOLDEN / case.folder / "config.json").read_text(encoding="utf-8"))
    return forward(config, read_weights(GOLDEN / case.folder), ids.tolist())["logits"][case.first :]


def main() -> None:
    tensors = {}
    for number, case in enumerate(CASES):
        ids = np.random.default_rng(number).integers(0, 320, case.length)
        tensors[f"{case.folder}.ids"] = ids.astype(np.int16)
        tensors[f"{case.folder}.logits"] = np.ascontiguousarray(logits(case, ids))
    unfinished = FILE.with_name(FILE.name + ".unfinished")
    save_file(tensors, unfinished)
    unfinished.replace(FILE)


if __name__ == "__main__":
    main()
