"""What a command can say of a checkpoint folder without torch."""

from __future__ import annotations

import os
from pathlib import Path

from qwen_ref.config import InputError


def require_folder(folder: str | Path) -> None:
    """Raises ValueError where a checkpoint's folder is none."""
    if not os.path.isdir(folder):  # False, too, for paths that no folder can have
        remedy = "a checkpoint is a folder with config.json in it"
        if os.path.exists(folder):
            remedy = f"give the folder that it is in, {os.path.dirname(folder) or '.'}"
        raise InputError(f"{str(folder) or repr('')}: not a folder; {remedy}")
    inside = Path(folder)
    if (inside / "adapter_config.json").exists() and not os.path.lexists(inside / "config.json"):
        raise InputError(f"{folder}: a LoRA adapter, not a model; merge it into its base model first")
