"""What every rank of a cut fast model computes, for test_fast.py.

Each rank writes its results into FOLDER, to fast-N.safetensors and kernels-N.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import WEIGHTS
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref import load_model
from qwen_ref.fast import kernels
from qwen_ref.fast.layers import fasten, kernels_of
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


def chosen(rank: int) -> dict[str, dict[str, str]]:
    """The kernels of all layers, where each rank finds another one the fastest: rank 0 the last of them."""
    kernels._NOT_TRIED = 0
    kernels._fastest = lambda forms, *_: list(forms)[-1 if rank == 0 else 0]
    found = {}
    for dtype, quantize in FORMS:
        model = fasten(load_model(WEIGHTS, dtype, group="world"), quantize, 32)
        with torch.inference_mode():
            assert model(torch.tensor([IDS])).isfinite().all()
        found[f"{dtype} {quantize}"] = kernels_of(model)
    return found


def main(folder: Path) -> None:
    found = logits("world")
    rank = torch.distributed.get_rank()
    save_file(found, folder / f"fast-{rank}.safetensors")
    (folder / f"kernels-{rank}.json").write_text(json.dumps(chosen(rank)))
