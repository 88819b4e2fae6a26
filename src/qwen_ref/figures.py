"""What the tools that draw do alike: matplotlib where it is installed, and files that are whole."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib without a screen; ValueError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot takes matplotlib; pip install 'qwen_ref[plot]' brings it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_path(path: Path) -> None:
    """ValueError where no file can be written: better now than after the work is done."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"--plot {path}: no file can be there")


def save(figure: Figure, path: Path) -> None:
    """A PNG file, under a temporary name until it is complete. Closes the figure."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, dpi=110, format="png", facecolor="white")
        os.replace(part, path)
    finally:
        pyplot().close(figure)
        part.unlink(missing_ok=True)
