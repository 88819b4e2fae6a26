"""Bundles of the parity kit with NumPy alone: copy this file into your project.

    metadata, tensors = read("truth.safetensors")
    ids = tensors["input_ids"]                                # (B, T)
    write("port.safetensors", ids, {"logits": logits}, dtype="bfloat16")
    first_difference("truth.safetensors", "port.safetensors")  # None, or the first stage that is wrong

A bundle is a safetensors file: 8 bytes that say how long the header is, the header in JSON, the numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

# safetensors' name → NumPy's dtype. NumPy has no bfloat16: its 16 bits are the upper half of a float32.
KINDS = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}
STORED = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _open(path: str | Path) -> tuple[dict, dict, np.memmap]:
    """Metadata, {name: its entry in the header}, the bytes behind the header."""
    content = np.memmap(path, np.uint8, mode="r")
    start = 8 + int(content[:8].view("<u8")[0])
    header = json.loads(content[8:start].tobytes())
    return header.pop("__metadata__", {}), header, content[start:]


def read(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors; bfloat16 becomes float32."""
    metadata, entries, content = _open(path)
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        value = np.array(content[start:end]).view(KINDS[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = _widened(value) if entry["dtype"] == "BF16" else value
    return metadata, tensors


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(value: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to bfloat16, to the nearest, ties to even."""
    bits = np.array(value, np.float32, order="C").view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FC0, rounded).astype(np.uint16)  # NaN stays NaN


def write(
    path: str | Path, ids: np.ndarray, stages: dict[str, np.ndarray], *, dtype: str,
    stored: str | None = None, prefill_length: int | None = None, attention_mask: np.ndarray | None = None,
    weights_sha256: str | None = None, weights_dtype: str | None = None, activations_dtype: str | None = None,
) -> None:  # fmt: skip
    """dtype: the one that was computed in. stored: the one to store stages in, by default as they are.

    ids: (B, T). stages: {"logits": (B, T, V), …}, with the names of the parity kit's README.
    """
    given = {"prefill_length": prefill_length, "weights_sha256": weights_sha256}
    given |= {"weights_dtype": weights_dtype, "activations_dtype": activations_dtype}
    metadata = {"format_version": "1", "dtype": dtype, "tool": "bundle_numpy.py"}
    metadata |= {key: str(value) for key, value in given.items() if value is not None}
    tensors = {"input_ids": ("I64", np.asarray(ids, np.int64))}
    if attention_mask is not None:
        tensors["attention_mask"] = "I64", np.asarray(attention_mask, np.int64)
    for name, value in stages.items():
        value = np.asarray(value)
        kind = STORED[stored or value.dtype.name]
        as_stored = _bfloat16 if kind == "BF16" else KINDS[kind]
        tensors[name] = kind, as_stored(value)
    header, end = {"__metadata__": metadata}, 0
    for name, (kind, value) in tensors.items():
        start, end = end, end + value.nbytes
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in tensors.values():
            file.write(value.tobytes())


def weights_checksum(folder: str | Path) -> str:
    """weights_sha256 of a checkpoint that is not quantised: over all tensors, sorted by name."""
    index, files = Path(folder, "model.safetensors.index.json"), {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    found = {}
    for _, entries, content in (_open(Path(folder, file)) for file in files):
        found |= {name: (entry, content) for name, entry in entries.items()}
    digest = hashlib.sha256()
    for name, (entry, content) in sorted(found.items()):
        if not name.endswith((".attn.masked_bias", ".rotary_emb.inv_freq")):  # buffers, not weights
            digest.update(f"{name} {entry['dtype']} {','.join(map(str, entry['shape']))}\n".encode())
            digest.update(content[slice(*entry["data_offsets"])])
    return digest.hexdigest()


def first_difference(truth: str | Path, port: str | Path) -> tuple[str, float, float] | None:
    """The first stage that is more than 4 times as far from the truth as its rounding: with that error
    (relative RMS, or that of the worst position) and its tolerance. Both files must use the truth's names.
    """
    (metadata, ours), (about, theirs) = read(truth), read(port)
    mask = ours.get("attention_mask", np.ones_like(ours["input_ids"])) != 0
    if not np.array_equal(ours["input_ids"][mask], theirs["input_ids"].reshape(mask.shape)[mask]):
        raise ValueError("the two bundles are of different ids")
    dtype = about["dtype"]
    measured = json.loads(metadata.get("rounding", "{}")).get(dtype)
    if measured is None:
        raise ValueError(f"{truth} has no rounding of {dtype}; record it in float64, with --rounding")
    for stage in [each for each in measured if each in ours and each in theirs]:  # as they were computed
        right, value = (x[stage].astype(np.float64).reshape(*mask.shape, -1)[mask] for x in (ours, theirs))
        squares, all_of = ((x**2).sum(-1) for x in (value - right, right))
        each = squares / np.maximum(all_of, 1e-300)  # of each position
        errors = np.sqrt([squares.sum() / all_of.sum(), each.max()])
        for error, cost in zip(errors, measured[stage], strict=True):
            tolerance = 4 * max(cost, EPS[dtype] / 4)
            if not error <= tolerance:  # NaN is no smaller
                return stage, float(error), tolerance
    return None
