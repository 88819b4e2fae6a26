"""Writes a small random checkpoint whose heads have 128 numbers, as those of all published Qwen models.

Some engines take that size for granted, and the golden models have heads of 16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES = {"hidden_size": 256, "num_attention_heads": 2, "kv_channels": 128, "intermediate_size": 512}
LAYERS = 2


def write_wide_heads(folder: Path, like: Path) -> None:
    """In everything but SIZES and LAYERS the configuration is that of another checkpoint."""
    config = json.loads((like / "config.json").read_text()) | SIZES | {"num_hidden_layers": LAYERS}
    seeded = torch.Generator().manual_seed(0)
    D, F, V = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]

    def random(*shape: int, scale: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=seeded) * scale + mean).bfloat16()

    tensors = {
        "transformer.wte.weight": random(V, D, scale=1),
        "transformer.ln_f.weight": random(D, scale=0.1, mean=1),
        "lm_head.weight": random(V, D, scale=0.1),
    }
    for number in range(LAYERS):
        layer = f"transformer.h.{number}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{layer}.{norm}.weight"] = random(D, scale=0.1, mean=1)
        tensors[f"{layer}.attn.c_attn.weight"] = random(3 * D, D, scale=0.08)
        tensors[f"{layer}.attn.c_attn.bias"] = random(3 * D, scale=0.3)
        tensors[f"{layer}.attn.c_proj.weight"] = random(D, D, scale=0.06)
        for part in ("w1", "w2"):
            tensors[f"{layer}.mlp.{part}.weight"] = random(F, D, scale=0.06)
        tensors[f"{layer}.mlp.c_proj.weight"] = random(D, F, scale=0.06)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors")
