"""A trace as text: the tokens, the table of stages and the lens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from qwen_ref.commands.tables import aligned
from qwen_ref.tokenizer import Tokenizer
from qwen_ref.trace.tracing import Lens, Stage, Trace

COLUMNS = 100  # of a terminal
_TOKENS_SHOWN = 24  # of a longer prompt the first and the last of these
_TOKEN_CELLS = 12  # five predictions stand on a line


def spelled(token: int, tokenizer: Tokenizer) -> str:
    r"""A token's text, with its controls and the parts of characters that it cuts through escaped.

    >>> spelled(51461, tokenizer)  # of the published vocabulary
    ' \\xe6\\xa0'
    """
    if token >= tokenizer.n_vocab:
        return f"<row {token}: no token>"
    # Parts of a character decode to surrogates, U+DC80 to U+DCFF, one a byte.
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="surrogateescape")
    return "".join(map(_readable, text))


def _readable(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() and character != "\\" else repr(character)[1:-1]


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide character, as Chinese ones are."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def trace_lines(found: Trace, tokenizer: Tokenizer) -> Iterator[str]:
    """The prompt's tokens, the legend, the table, and the lens."""
    yield from _wrapped("positions: ", _tokens(found.ids, tokenizer))
    yield ""
    yield from _legend(found)
    yield ""
    yield from _stage_table(found.stages)
    wrong = [stage for stage in found.stages if stage.nan or stage.infinite]
    if wrong:
        yield ""
        yield f"not finite: values of {len(wrong)} of {len(found.stages)} stages, the first {wrong[0].name};"
        yield "their mean, spread and largest are of the values that are finite"
    if found.lens is not None:
        yield ""
        yield from _lens_lines(found, found.lens, tokenizer)


def _tokens(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    left_out = len(ids) - _TOKENS_SHOWN
    for position, token in enumerate(ids):
        if left_out <= 0 or not _TOKENS_SHOWN // 2 <= position < _TOKENS_SHOWN // 2 + left_out:
            yield f"{position} '{spelled(token, tokenizer)}'"
        elif position == _TOKENS_SHOWN // 2:
            yield f"({left_out} more)"


def axis_sizes(found: Trace) -> dict[str, int]:
    config = found.config
    return {
        "B": 1,
        "T": len(found.ids),
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.kv_channels,
        "F": config.mlp_width,
        "V": config.vocab_size,
    }


_AXES = {
    "B": "batch",
    "T": "positions",
    "D": "hidden size",
    "H": "heads",
    "K": "size of a head",
    "F": "MLP width",
    "V": "vocabulary",
}


def _legend(found: Trace) -> Iterator[str]:
    yield from _wrapped(
        "axes: ", (f"{axis} = {size} {_AXES[axis]}" for axis, size in axis_sizes(found).items())
    )
    yield "spread: the standard deviation; largest: the value furthest from 0; where: its index after B"


_HEAD = ("layer", "stage", "axes", "shape", "dtype", "mean", "spread", "largest", "where", "")
_SIDES = "><<<<>>><<"


def _stage_table(stages: Sequence[Stage]) -> Iterator[str]:
    head, *lines = aligned([_HEAD, *map(_row, stages)], _SIDES)
    yield head
    layer = stages[0].layer
    for line, stage in zip(lines, stages, strict=True):
        if stage.layer != layer:
            yield ""
            layer = stage.layer
        yield line


def _row(stage: Stage) -> tuple[str, ...]:
    return (
        "" if stage.layer is None else str(stage.layer),
        stage.short_name,
        stage.axes,
        "×".join(map(str, stage.shape)),
        stage.dtype,
        *("–" if number is None else f"{number:.3g}" for number in (stage.mean, stage.spread, stage.largest)),
        "–" if stage.where is None else ", ".join(map(str, stage.where[1:])),
        _not_finite(stage),
    )


def _not_finite(stage: Stage) -> str:
    counts = ((stage.nan, "NaN"), (stage.infinite, "infinite"))
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _lens_lines(found: Trace, lens: Sequence[Lens], tokenizer: Tokenizer) -> Iterator[str]:
    yield (
        f"lens: what would follow position {len(found.ids) - 1} if the final norm and the head came right "
        "after the layer"
    )
    rows = [
        ["its logits are not finite"]
        if each.predictions is None
        else [f"{_probability(p)} '{_cut(spelled(token, tokenizer))}'" for token, p in each.predictions]
        for each in lens
    ]
    widths = [max(map(cells, column)) for column in zip_longest(*rows, fillvalue="")]
    for each, row in zip(lens, rows, strict=True):
        label = "embed" if each.layer is None else str(each.layer)
        padded = (cell + " " * (width - cells(cell)) for cell, width in zip(row, widths, strict=False))
        yield from _wrapped(f"{label:>5}  ", padded)
    if (since := _leads_since(found, lens)) is not None:
        choice, layers = since
        yield f"the model's own choice, '{spelled(choice, tokenizer)}', is the first {layers}"


def _cut(text: str) -> str:
    """A long token's beginning, so that predictions stay in columns."""
    if cells(text) <= _TOKEN_CELLS:
        return text
    ends = (end for end in range(len(text), 0, -1) if cells(text[:end]) < _TOKEN_CELLS)
    return text[: next(ends)] + "…"


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _leads_since(found: Trace, lens: Sequence[Lens]) -> tuple[int, str] | None:
    """The model's own choice, and from which layer on it is the lens's; None: not all layers were traced."""
    first = [None if each.predictions is None else each.predictions[0].token for each in lens]
    if len(found.layers) < found.config.num_hidden_layers or first[-1] is None:
        return None
    start = len(first)
    while start > 0 and first[start - 1] == first[-1]:
        start -= 1
    layer = lens[start].layer
    return first[-1], "from the embedding on" if layer is None else f"from layer {layer} on"


def _wrapped(start: str, words: Iterable[str]) -> Iterator[str]:
    """Words on lines of at most COLUMNS: the first begins with start, the others are indented by it."""
    line, empty = start, True
    for word in words:
        if not empty and cells(line) + 2 + cells(word.rstrip()) > COLUMNS:
            yield line.rstrip()
            line, empty = " " * cells(start), True
        line += word if empty else f"  {word}"
        empty = False
    yield line.rstrip()
