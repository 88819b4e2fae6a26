"""What a rank computes with a checkpoint whose vocabulary does not divide by the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_ref import load_model
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate

IDS = torch.tensor([[5, 17, 80, 3, 9, 319, 318, 7]])


def main(folder: Path, out: Path) -> None:
    plain = load_model(folder, "float64", group="world")
    rank = plain.group.rank
    found = {"plain": plain(IDS)}
    for quantize in (None, "int8", "int4"):
        fast = fasten(load_model(folder, "float32", group="world"), quantize, 32)
        found[f"fast {quantize}"] = fast(IDS)
    steps = [[step.token, step.logprob] for step in generate(plain, IDS[0].tolist(), max_new_tokens=8)]
    rows = [len(plain.embed.weight), len(plain.lm_head.weight)]
    save_file({name: value.contiguous() for name, value in found.items()}, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps({"steps": steps, "rows": rows}))
