"""The mistakes of slips.py, and where each shows: on which checkpoint, over which ids, in which layers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import slips as s
from slips import Array

ROOT = Path(__file__).resolve().parents[2]


class Slip(NamedTuple):
    folder: str = "tests/golden/extended_base"  # three layers, no NTK, no LogN
    layers: tuple[int | None, ...] = (None,)  # None: all
    positions: int = 48
    prefill: int | None = None  # then decode steps
    padded: bool = False

    @property
    def path(self) -> Path:
        return ROOT / self.folder

    def inputs(self) -> tuple[Array, Array | None]:
        """Seeded ids (B, T) that every vocabulary has, and with padding the mask."""
        ids = np.random.default_rng(7).integers(0, 320, (3 if self.padded else 1, self.positions))
        mask = np.arange(self.positions) >= np.array([[0], [5], [11]])
        return ids, mask.astype(np.int64) if self.padded else None


SLIPS: dict[str, Slip] = {}
once, every, single = Slip(), Slip(layers=(None, 0, 1, 2)), Slip(layers=(0, 1, 2))
pair, decode, long = Slip(layers=(0, 1)), Slip(prefill=32), Slip("tests/golden/ntk_logn", positions=70)
NEXT = (*s.MATRICES, "bias", "ln_1", "ln_2")
for names, slip in (
    ([*s.LEAVING, *s.FINAL, *s.ENTERING, *s.BEFORE, *s.EMBEDDING], once),
    ([*s.PLANS], single),
    (["layers in reverse order", "layer 0 loaded as layer 1, too"], once),
    (["a layer and the next swapped", *(f"{name} of the next layer" for name in NEXT)], pair),
    ([f"shard {n} with 5 % noise" for n in (1, 2, 3)], once),
    ([f"{name} {how}" for name in s.MATRICES for how in s.CHANGED if how != "transposed"], every),
    ([f"{name} zero" for name in s.MATRICES], single),
    ([f"{name} transposed" for name in ("out", "q", "k", "v")], every),
    ([*s.BIASES, *s.SWAPPED, "heads in reverse order before out"], every),
    ([*s.NORMS, *s.NORM_WEIGHTS, "ln_1's weight for ln_2", "norm after attention and MLP"], every),
    (["attention's norm left out", "MLP's norm left out", "normed stream as the residual"], every),
    (["eps 1e-5", "eps 1e-3"], Slip("weights", layers=(None, 0, 1, 3))),  # where the stream is small
    (["eps outside the root"], Slip("weights", layers=(None, 0, 1))),
    ([*s.SCALES, *s.SOFTMAX, *s.SEEN, *s.POSITIONS, *s.EXPONENTS, *s.TURNED, *s.BASES], every),
    (["q not rotated", "k not rotated", "v rotated, too", "interleaved RoPE"], every),
    (["angles' sign turned", "cos and sin swapped", "RoPE on half of the heads"], every),
    (["attention not projected", "attention and MLP parallel", *s.STREAM_1, *s.ADDED_1], every),
    (["MLP's residual from before attention", "MLP done twice", *s.STREAM_2, *s.ADDED_2, *s.PRODUCTS], every),
    ([*s.LOGN, *s.LOGN_ON, *s.NTK, "seq_length doubled"], long),
    ([*s.LENGTHS], long._replace(prefill=30)),
    ([*s.DECODE_SEEN, *s.DECODE_POSITIONS], decode),
    ([name for name in (*s.SEEN, *s.POSITIONS) if name.startswith("chunks")], once),
    (["padding seen", "padding counted in positions", "attention_mask ignored"], long._replace(padded=True)),
    (["NTK: α of the padded length"], long._replace(padded=True)),
):
    SLIPS |= dict.fromkeys(names, slip)
del SLIPS[""]
CASES = [(mistake, layer) for mistake, slip in SLIPS.items() for layer in slip.layers]
