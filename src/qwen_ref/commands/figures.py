"""What the tools that draw do alike: matplotlib where it is installed, and files that are whole."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qwen_ref.commands.cli import printable
from qwen_ref.commands.files import new_file
from qwen_ref.config import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib without a screen; ValueError where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plot takes matplotlib; pip install 'qwen_ref[plot]' brings it") from None
    except ValueError as error:  # of the environment's MPLBACKEND
        raise InputError(f"--plot takes matplotlib, which does not start: {error}") from None
    return pyplot


def save(figure: Figure, path: Path) -> None:
    """A PNG file, whole or not at all. Closes the figure."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a file's name may hold bytes that are no characters
        text.set_text(printable(text.get_text(), kept="\n"))
    try:
        with new_file(path) as file:
            figure.savefig(file, dpi=110, format="png", facecolor="white")
    finally:
        pyplot().close(figure)
