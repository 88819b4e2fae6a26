"""Golden checkpoints to change: what tests of checkpoint.py and of loading/ do to them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory: mapped ones would change with the file."""
    return load(file.read_bytes())


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    files = [file for file in folder.glob("*.safetensors") if file.name != "golden.safetensors"]
    return {name: tensor for file in files for name, tensor in tensors_of(file).items()}


def change(file: Path, **tensors: Tensor | None) -> None:
    """Replaces tensors of a file, adds new ones, removes those that are None. In a name, __ is a dot."""
    content = tensors_of(file)
    for name, tensor in tensors.items():
        content.pop(name.replace("__", "."), None)
        if tensor is not None:
            content[name.replace("__", ".")] = tensor
    save_file(content, file)


def change_map(folder: Path, **entries: object) -> None:
    """Replaces entries of the index's weight_map, adds new ones, removes those that are ...."""
    index = json.loads((folder / INDEX).read_text())
    for name, file in entries.items():
        index["weight_map"].pop(name.replace("__", "."), None)
        if file is not ...:
            index["weight_map"][name.replace("__", ".")] = file
    (folder / INDEX).write_text(json.dumps(index))
