"""What loading a 1.8B-shaped bfloat16 checkpoint of 3.7 GB costs on the CPU: seconds and anonymous memory.

The checkpoint is made in a temporary folder first (zeros: only its size matters) and removed again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_ref import QwenConfig, load_model
from qwen_ref.checkpoint import tensor_table


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def write_checkpoint(folder: Path, config: QwenConfig, layers_per_shard: int = 6) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", **dataclasses.asdict(config)}))
    table = tensor_table(config)
    shards, weight_map = len(table) // (8 * layers_per_shard), {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        specs = table[shard * len(table) // shards : (shard + 1) * len(table) // shards]
        tensors = {spec.published: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in specs}
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def main() -> None:
    config = QwenConfig.preset("1.8b")
    folder = Path(tempfile.mkdtemp())
    try:
        write_checkpoint(folder, config)
        before, start = anonymous_memory(), time.perf_counter()
        model = load_model(folder, "auto")
        elapsed, added = time.perf_counter() - start, anonymous_memory() - before
        size = sum(parameter.nbytes for parameter in model.parameters())
        print(
            f"loaded {size / 1e9:.2f} GB of bfloat16 in {elapsed:.2f} s, {added / 1e6:.1f} MB of it anonymous"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
