"""A training script of examples/make run twice."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from conftest import python

from qwen_ref.commands.cli import run


def check_training(script: ModuleType, folder: Path, made: Path, *arguments: str) -> None:
    """Two runs agree to the byte, and in all but the weights with the checkpoint that was made."""
    done = python(script.__file__, *arguments, folder / "once")
    assert done.code == 0, done.err
    # The other run is here, where strings have other hashes.
    try:
        assert run(script.parser(), script.command, [*arguments, str(folder / "again")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    files = sorted(path.name for path in (folder / "once").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"]
    for name in files:
        once, again = ((folder / run / name).read_bytes() for run in ("once", "again"))
        assert once == again
        if name != "model.safetensors":
            assert once == (made / name).read_bytes()
