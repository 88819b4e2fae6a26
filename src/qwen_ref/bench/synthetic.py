"""A model of a published size, without its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.cli import Progress
from qwen_ref.commands.sizes import expected, kinds, weight_bytes
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import is_packed, packed_shapes


def write_checkpoint(
    folder: Path,
    config: QwenConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    gptq: GPTQConfig | None = None,
) -> None:
    """Writes a folder in the published form, in bfloat16, a file for each layer. The weights are noise.

    gptq: as a GPTQ release, in float16 and packed.
    """
    published = {"model_type": "qwen", **dataclasses.asdict(config)}
    if gptq is not None:
        published["quantization_config"] = dataclasses.asdict(gptq)
    (folder / "config.json").write_text(json.dumps(published))
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.02
    noise = noise.to(torch.bfloat16 if gptq is None else torch.float16)
    table = tensor_table(config)
    total, done, weight_map = 2 * sum(math.prod(spec.shape) for spec in table), 0, {}
    for part, specs in itertools.groupby(table, key=lambda spec: spec.name.split(".")[:2]):
        file, tensors = f"{'-'.join(part)}.safetensors", {}
        for spec in specs:
            count = math.prod(spec.shape)
            if gptq is not None and is_packed(spec):
                for name, shape in packed_shapes(spec, gptq).items():
                    tensors[name] = _packed(name.rpartition(".")[2], shape, gptq)
            else:
                tensors[spec.published] = noise.repeat(-(-count // len(noise)))[:count].view(spec.shape)
            done += 2 * count
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        progress(done, total)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _packed(part: str, shape: tuple[int, ...], gptq: GPTQConfig) -> Tensor:
    if part == "scales":
        return torch.full(shape, 0.1 / 2**gptq.bits, dtype=torch.float16)
    if part == "g_idx":
        return (torch.arange(*shape) // gptq.group_size).int()
    if part == "qzeros":  # the middle, less 1, in every place of a word
        return torch.full(shape, {4: 0x77777777, 8: 0x7F7F7F7F}[gptq.bits], dtype=torch.int32)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


@contextlib.contextmanager
def temporary_folder(needed: int, what: str, remedy: str) -> Iterator[Path]:
    """A folder that is removed at the end. InputError, with the remedy, where `needed` bytes have no room."""
    folder = Path(tempfile.mkdtemp(prefix="qwen_ref-"))
    try:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{what} takes {needed / 1e9:.1f} GB in {folder.parent}, which has {free / 1e9:.1f} GB left; "
                + remedy
            )
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def synthetic(size: str, layers: int | None = None, gptq: GPTQConfig | None = None) -> Iterator[Path]:
    """A folder with a checkpoint of a published size, removed at the end."""
    config = QwenConfig.preset(size)
    if layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=layers)
    table = tensor_table(config)
    needed = sum(weight_bytes(row) for row in kinds(table, expected(table, gptq)))
    remedy = "--layers N makes fewer of its layers, TMPDIR names another folder"
    with temporary_folder(needed, f"the {size}", remedy) as folder:
        with Progress("writing") as progress:
            write_checkpoint(folder, config, progress.update, gptq)
        yield folder
