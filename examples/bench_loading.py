"""What loading a 1.8B-shaped bfloat16 checkpoint of 3.7 GB costs on the CPU: seconds and anonymous memory.

The checkpoint is made in a temporary folder first (noise, repeated: only its size matters) and removed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
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
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def write_checkpoint(folder: Path, config: QwenConfig) -> None:
    """A folder in the published form, a file for each layer."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", **dataclasses.asdict(config)}))
    noise = torch.randn(1 << 20).bfloat16() * 0.02
    weight_map = {}
    for part, specs in itertools.groupby(tensor_table(config), key=lambda spec: spec.name.split(".")[:2]):
        file, tensors = f"{'-'.join(part)}.safetensors", {}
        for spec in specs:
            count = math.prod(spec.shape)
            tensors[spec.published] = noise.repeat(-(-count // len(noise)))[:count].view(spec.shape)
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
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
