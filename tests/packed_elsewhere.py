"""AutoGPTQ v1 checkpoints made in NumPy alone, by code that shares nothing with the loader under test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch_file  # NumPy has no bfloat16

QUANTISED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
COMPANIONS = ("qwen.tiktoken", "generation_config.json", "tokenizer_config.json")
WORD = 32  # bits


def pack(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Pack unsigned values of so many bits along an axis into int32 words, the first in the lowest bits."""
    per_word = WORD // bits
    last = np.moveaxis(np.asarray(values), axis, -1)
    if last.shape[-1] % per_word:
        raise ValueError(f"{last.shape[-1]} values of {bits} bits do not fill whole words")
    if last.min() < 0 or last.max() >= 2**bits:
        raise ValueError(f"a value does not fit in {bits} bits")
    fields = last.astype(np.uint32).reshape(*last.shape[:-1], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(fields << shifts, axis=-1).view(np.int32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def quantise(
    weight: np.ndarray, bits: int, group_size: int, sym: bool, act_order_seed: int | None
) -> dict[str, np.ndarray]:
    """Round an (out, in) weight to the nearest levels: q (in, out), zero and scale (groups, out), g_idx (in).

    A group size of -1 is one group over all inputs. Inputs left over make a last, short group.
    With a seed, the inputs are dealt to the groups at random, as act-order leaves them.
    """
    columns = np.asarray(weight, np.float32).T  # (in, out)
    inputs = len(columns)
    size = inputs if group_size == -1 else group_size
    g_idx = np.arange(inputs) // size
    if act_order_seed is not None:
        g_idx = np.random.default_rng(act_order_seed).permutation(g_idx)

    top = 2**bits - 1
    grouped = columns[np.argsort(g_idx, kind="stable")]
    starts = np.arange(0, inputs, size)
    low = np.minimum(np.minimum.reduceat(grouped, starts, axis=0), 0)
    high = np.maximum(np.maximum.reduceat(grouped, starts, axis=0), 0)
    span = 2 * np.maximum(-low, high) if sym else high - low
    scale = (span / top).astype(np.float16)
    scale[scale == 0] = 1  # a group of zeros
    if sym:
        zero = np.full(scale.shape, 2 ** (bits - 1))
    else:
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top).astype(np.int64)

    levels = np.rint(columns / scale.astype(np.float32)[g_idx]).astype(np.int64) + zero[g_idx]
    return {"q": np.clip(levels, 0, top), "zero": zero, "scale": scale, "g_idx": g_idx}


def tensors_of(
    module: str, quantised: dict[str, np.ndarray], bits: int, zero_offset: int = 1
) -> dict[str, np.ndarray]:
    """The four packed tensors of a module, under their published names.

    qzeros holds zero - zero_offset in every place, subtracted from the whole word: a zero of 0 borrows.
    """
    offsets = np.uint32(sum(zero_offset << place for place in range(0, WORD, bits)))
    return {
        f"{module}.qweight": pack(quantised["q"], bits, axis=0),
        f"{module}.qzeros": (pack(quantised["zero"], bits, axis=1).view(np.uint32) - offsets).view(np.int32),
        f"{module}.scales": quantised["scale"],
        f"{module}.g_idx": quantised["g_idx"].astype(np.int32),
    }


def dequantised(quantised: dict[str, np.ndarray]) -> np.ndarray:
    """The (out, in) float32 weight the levels stand for, from before packing; every product is exact."""
    g_idx = quantised["g_idx"]
    steps = (quantised["q"] - quantised["zero"][g_idx]).astype(np.float32)
    return np.ascontiguousarray((quantised["scale"].astype(np.float32)[g_idx] * steps).T)


def make_packed(
    source: Path,
    packed: Path,
    plain: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    act_order: bool = False,
    zero_biases: bool = False,
    settings_file: Literal["config.json", "quantize_config.json"] = "config.json",
    shards: int = 1,
    zero_offset: int = 1,
) -> None:
    """Write a plain checkpoint twice: packed as AutoGPTQ does it, and dequantised in float32.

    Both folders stand for the same numbers: what is not quantised is rounded to float16 in both.
    zero_biases gives every quantised module a bias, zero where the source has none, as AutoGPTQ wrote it.
    zero_offset 1 is v1, which stores zero - 1; 0 stores the zero itself, as a v2 file does.
    """
    packed_tensors: dict[str, np.ndarray] = {}
    plain_tensors: dict[str, np.ndarray] = {}
    for position, (name, tensor) in enumerate(sorted(_read(source).items())):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(QUANTISED):
            quantised = quantise(tensor, bits, group_size, sym, position if act_order else None)
            packed_tensors |= tensors_of(module, quantised, bits, zero_offset)
            plain_tensors[name] = dequantised(quantised)
            if zero_biases:  # a bias of the source sorts before the weight
                packed_tensors.setdefault(f"{module}.bias", np.zeros(len(tensor), np.float16))
        else:
            packed_tensors[name] = tensor.astype(np.float16)
            plain_tensors[name] = packed_tensors[name].astype(np.float32)

    settings = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": sym,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "quant_method": "gptq",
    }
    for folder in (packed, plain):
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", *COMPANIONS):
            if (source / file).exists():
                shutil.copyfile(source / file, folder / file)
    if settings_file == "config.json":
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        _write_json(packed / "config.json", config | {"quantization_config": settings})
    else:
        _write_json(packed / settings_file, settings)
    _write(packed, packed_tensors, shards)
    _write(plain, plain_tensors, 1)


def _read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint folder, in float32."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {
        name: tensor.float().numpy()
        for file in files
        for name, tensor in load_torch_file(folder / file).items()
    }


def _write(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Write the tensors as one file, or as several of about equally many tensors with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
