"""What every rank of a cut fast model computes, for test_fast.py.

Each rank writes its results into FOLDER, to fast-N.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import WEIGHTS
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref import load_model
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate

IDS = list(range(3, 73))
FORMS = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4"))


def logits(group: str | None) -> dict[str, Tensor]:
    """Of a prompt and of tokens one by one, for every form."""
    found = {}
    for dtype, quantize in FORMS:
        model = fasten(load_model(WEIGHTS, dtype, group=group), quantize, 32)
        with torch.inference_mode():
            cache, ids = model.new_cache(1, 80), torch.tensor([IDS])
            parts = [model(ids[:, :66], cache=cache)]
            parts += [model(ids[:, t : t + 1], cache=cache) for t in range(66, 70)]
        found[f"{dtype} {quantize}"] = torch.cat(parts, dim=1)
        tokens = [step.token for step in generate(model, IDS, max_new_tokens=8)]
        found[f"{dtype} {quantize} tokens"] = torch.tensor(tokens)
    return found


def main(folder: Path) -> None:
    found = logits("world")
    save_file(found, folder / f"fast-{torch.distributed.get_rank()}.safetensors")
