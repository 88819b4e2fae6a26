"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """The lines of a table, with two spaces between columns. sides: "<" or ">" for each column, as in format.

    >>> list(aligned([("layer", "mean"), ("embed", "0.1")], "<>"))
    ['layer  mean', 'embed   0.1']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, sides, widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()
