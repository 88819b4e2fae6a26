"""What every rank of a cut GPTQ model computes, for test_gptq.py.

A folder holds packed checkpoints, `*-packed`; each rank writes its results beside them, to
gptq-N.safetensors, and what it is told of the damaged one, `spoiled`, to gptq-N.txt.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref import InputError, load_model
from qwen_ref.fast.layers import fasten

IDS = torch.arange(3, 43)[None]


def logits(folder: Path, group: str | None) -> dict[str, Tensor]:
    """Of every checkpoint, dequantised, packed and in its bits (what cannot be is left out)."""
    found = {}
    for packed in sorted(folder.glob("*-packed")):
        found[f"{packed.name} dequantised"] = load_model(packed, "float64", group=group)(IDS)
        found[f"{packed.name} kept"] = load_model(packed, "float64", group=group, packed=True)(IDS)
        try:
            fast = fasten(load_model(packed, "bfloat16", group=group, packed=True))
        except ValueError:  # groups that a cut divided unevenly
            continue
        found[f"{packed.name} fast"] = fast(IDS)
    return found


def main(folder: Path) -> None:
    found = logits(folder, "world")
    name = f"gptq-{torch.distributed.get_rank()}"
    save_file(found, folder / f"{name}.safetensors")
    try:
        load_model(folder / "spoiled", group="world")
    except InputError as error:
        (folder / f"{name}.txt").write_text(str(error))
