"""Plots: matplotlib, if it is installed, and PNG files that are complete or not there."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qwen_ref.commands.cli import printable
from qwen_ref.commands.files import new_file, output_path
from qwen_ref.config import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """matplotlib's pyplot, without a screen; ValueError if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plot takes matplotlib; pip install 'qwen_ref[plot]' brings it") from None
    except ValueError as error:  # of the environment's MPLBACKEND
        raise InputError(f"--plot takes matplotlib, which does not start: {error}") from None
    return pyplot


def check_plot(args: argparse.Namespace) -> None:
    """Before any work: raises ValueError where --plot cannot be drawn or written."""
    if args.plot is not None:
        output_path(args.plot, "--plot", args)
        pyplot()


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG file, complete or not at all, and closes the figure."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # a file's name may hold bytes that are no characters
        text.set_text(printable(text.get_text(), kept="\n"))
    try:
        with new_file(path) as file:
            figure.savefig(file, dpi=110, format="png", facecolor="white")
    finally:
        pyplot().close(figure)
