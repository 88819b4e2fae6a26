"""What a prompt goes through, tensor by tensor: `python -m qwen_ref.trace "prompt"`.

A row for every tensor between the token ids and the logits: the parity kit's stages, under its names
(parity/bundle.py says what each is). The lens reads the residual stream after a layer as if it were the last
one, through the final norm and the output head: nostalgebraist 2020, "interpreting GPT: the logit lens".
torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.cli import Parser, Progress, as_json, bundled_checkpoint, on_stdout, read_prompt, run, say, utf8
from qwen_ref.config import InputError, QwenConfig, require_folder, shown
from qwen_ref.settings import add_model_option, length_note, open_folder
from qwen_ref.steps import checked_ids
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.parity.stages import Port

TOP = 5  # predictions of the lens
COLUMNS = 100  # of a terminal

# All positions of a stage are in memory at once, of the logits V numbers each.
_MOST_TOKENS = 2**14
_MOST_LOGITS_BYTES = 2**32
_SLICE = 2**20  # numbers widened to float64 at a time
_MANY_LAYERS = 8  # a table of more is announced
_TOKENS_SHOWN = 24  # of a longer prompt the first and the last of these
_TOKEN_CELLS = 12  # five predictions stand on a line


@dataclasses.dataclass(frozen=True)
class Stage:
    """One tensor of the forward pass in numbers: float64, over those of its values that are finite."""

    name: str  # the parity kit's
    layer: int | None
    axes: str  # model.py's letter for each dimension
    shape: tuple[int, ...]
    dtype: str
    mean: float | None  # None, as the next three: no value is finite
    spread: float | None  # the standard deviation
    largest: float | None  # the value furthest from 0, with its sign
    where: tuple[int, ...] | None  # its index, the first of equals
    nan: int  # how many values are NaN
    infinite: int

    @property
    def short_name(self) -> str:
        """Without the layer."""
        return self.name.removeprefix(f"blocks.{self.layer}.")


class Prediction(NamedTuple):
    """A next token, and how probable it is."""

    token: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Lens:
    """What the last position would predict if the model ended here."""

    layer: int | None  # None: at the embedding, before any layer
    predictions: list[Prediction] | None  # the likeliest first; None: its logits are not finite


@dataclasses.dataclass(frozen=True)
class Trace:
    """A forward pass, looked at."""

    config: QwenConfig
    ids: list[int]
    dtype: str  # computed in
    layers: list[int]
    stages: list[Stage]  # in the order in which data flows: embed, those of the layers, norm, logits
    lens: list[Lens] | None  # at embed and after each of the layers


def trace(
    folder: str | Path,
    ids: Sequence[int],
    dtype: str = "auto",
    layers: Iterable[int] | None = None,
    top: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Runs a checkpoint on a prompt's T ids and describes every stage of some layers, by default of all.

    top: so many predictions of the lens; None: without it. The lens of the last layer is the model's own
    prediction, to the bit. progress: called with the bytes of weights read, and to be read.

    Memory is that of one matrix and the stages of one layer, or the logits. Raises ValueError for a folder
    that is no checkpoint, no ids, ids or layers that the model does not have, and too many tokens.

    >>> found = trace("weights", tokenizer.encode("冰岛的首都是"), top=1)
    >>> [(stage.name, stage.shape) for stage in found.stages][:2]
    [('embed', (1, 2, 128)), ('blocks.0.attn_norm', (1, 2, 128))]
    """
    import torch

    from qwen_ref.checkpoint import DTYPES
    from qwen_ref.parity.bundle import flow, layer_of, stage_widths
    from qwen_ref.parity.recording import Work
    from qwen_ref.parity.stages import Checkpoint, Port

    checkpoint = Checkpoint(folder)
    config, dtype = checkpoint.config, checkpoint.dtype(dtype)
    ids = checked_ids(ids, config.vocab_size)
    most = min(_MOST_TOKENS, _MOST_LOGITS_BYTES // (config.vocab_size * DTYPES[dtype].itemsize))
    if len(ids) > most:
        raise InputError(
            f"the prompt has {len(ids):,} tokens; a trace of this model in {dtype} takes at most {most:,}, "
            "since it holds all positions of a stage at once; give a shorter prompt"
        )
    asked = range(config.num_hidden_layers) if layers is None else layers
    try:
        layers = sorted({_from_start(config, operator.index(layer)) for layer in asked})
    except TypeError:
        raise InputError(f"layers must be a list of the layers' numbers, not {shown(layers)}") from None
    if top is not None and not (isinstance(top, int) and 1 <= top <= config.vocab_size):
        raise InputError(f"top={shown(top)} must be from 1 to the model's vocab_size={config.vocab_size}")

    port = Port(checkpoint, dtype, torch.tensor([ids], device="cpu"))
    work = Work(progress)
    work.expect(checkpoint.bytes + (0 if top is None else checkpoint.weight("lm_head.weight").nbytes))
    port.progress = work.did
    stages: list[Stage] = []
    last_logits: list[Tensor] = []  # (V)
    last: dict[int | None, Tensor] = {}  # the last position of the residual stream (D) at each layer's end

    def keep(name: str, value: Tensor, _: int) -> None:
        stages.append(describe(name, value))
        if top is not None and (name == "embed" or name.endswith(".residual")):
            last[layer_of(name)] = value[0, -1].clone()
        if name == "logits":
            last_logits.append(value[0, -1].clone())

    port.run(keep, [name for name in stage_widths(config) if layer_of(name) in (None, *layers)])
    stages.sort(key=lambda stage: flow(stage.name))
    lens = None if top is None else _lens(port, last, last_logits[0], top)
    return Trace(config, ids, dtype, layers, stages, lens)


def _from_start(config: QwenConfig, layer: int) -> int:
    """A layer's number, where it may be counted from the end as -1, -2, …; ValueError where there is none."""
    count = config.num_hidden_layers
    if not -count <= layer < count:
        raise InputError(
            f"there is no layer {layer}: this model has {count}, 0 to {count - 1}; -1 is the last one"
        )
    return layer % count


def _lens(port: Port, last: dict[int | None, Tensor], logits: Tensor, top: int) -> list[Lens]:
    import torch

    # All in one product. One row alone is rounded in another order, so the last layer's, which are the
    # model's logits, are taken from there.
    read = port.read_out(torch.stack(list(last.values())))  # (layers, V)
    final = port.config.num_hidden_layers - 1
    return [
        Lens(layer, _predictions(logits if layer == final else row, top))
        for layer, row in zip(last, read, strict=True)
    ]


def _predictions(logits: Tensor, top: int) -> list[Prediction] | None:
    """The likeliest of logits (V)."""
    if not logits.isfinite().all():
        return None
    probabilities, tokens = logits.double().softmax(dim=-1).topk(top)
    return [*map(Prediction, tokens.tolist(), probabilities.tolist())]


def describe(name: str, value: Tensor) -> Stage:
    """A stage's value (B, T, …) in numbers."""
    import torch

    from qwen_ref.parity.bundle import layer_of

    count, total, largest, at = 0, 0.0, None, 0
    infinite = nan = 0
    flat = value.flatten()
    slices = flat.split(_SLICE)
    for number, part in enumerate(slices):
        finite = part.isfinite()
        inside = part[finite].double()
        nan += int(part.isnan().sum())
        infinite += int(part.isinf().sum())
        if not len(inside):
            continue
        count += len(inside)
        total += float(inside.sum())
        furthest = int(part.double().abs().masked_fill(~finite, -1).argmax())
        if largest is None or abs(float(part[furthest])) > abs(largest):
            largest, at = float(part[furthest]), number * _SLICE + furthest
    mean = total / count if count else None
    spread = None
    if mean is not None:  # from the mean, not from the squares: these would cancel
        squares = sum(float((part[part.isfinite()].double() - mean).square().sum()) for part in slices)
        spread = math.sqrt(squares / count)
    where = torch.unravel_index(torch.tensor(at, device="cpu"), value.shape)
    return Stage(
        name=name,
        layer=layer_of(name),
        axes=_axes(name, value),
        shape=tuple(value.shape),
        dtype=str(value.dtype).removeprefix("torch."),
        mean=mean,
        spread=spread,
        largest=largest,
        where=None if largest is None else tuple(map(int, where)),
        nan=nan,
        infinite=infinite,
    )


def _axes(name: str, value: Tensor) -> str:
    if value.ndim == 4:
        return "BTHK"
    if name.endswith(("mlp.gate", "mlp.up", "mlp.product")):
        return "BTF"
    return "BTV" if name == "logits" else "BTD"


# What a person reads


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


def _sizes(found: Trace) -> dict[str, int]:
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
    yield from _wrapped("axes: ", (f"{axis} = {size} {_AXES[axis]}" for axis, size in _sizes(found).items()))
    yield "spread: the standard deviation; largest: the value furthest from 0; where: its index after B"


_HEAD = ("layer", "stage", "axes", "shape", "dtype", "mean", "spread", "largest", "where")
_LEFT = ("stage", "axes", "shape", "dtype", "where")


def _stage_table(stages: Sequence[Stage]) -> Iterator[str]:
    rows = [_HEAD, *map(_row, stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layer = stages[0].layer
    for row, stage in zip(rows, (None, *stages), strict=True):
        if stage is not None and stage.layer != layer:
            yield ""
            layer = stage.layer
        line = "  ".join(
            cell.ljust(width) if title in _LEFT else cell.rjust(width)
            for title, cell, width in zip(_HEAD, row, widths, strict=True)
        )
        wrong = _not_finite(stage) if stage is not None else ""
        yield f"{line}  {wrong}".rstrip()


def _row(stage: Stage) -> tuple[str, ...]:
    return (
        "" if stage.layer is None else str(stage.layer),
        stage.short_name,
        stage.axes,
        "×".join(map(str, stage.shape)),
        stage.dtype,
        *("–" if number is None else f"{number:.3g}" for number in (stage.mean, stage.spread, stage.largest)),
        "–" if stage.where is None else ", ".join(map(str, stage.where[1:])),
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
        choice = spelled(lens[-1].predictions[0].token, tokenizer)
        yield f"the model's own choice, '{choice}', is the first {since}"


def _cut(text: str) -> str:
    """A long token's beginning, so that predictions stay in columns."""
    if cells(text) <= _TOKEN_CELLS:
        return text
    ends = (end for end in range(len(text), 0, -1) if cells(text[:end]) < _TOKEN_CELLS)
    return text[: next(ends)] + "…"


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _leads_since(found: Trace, lens: Sequence[Lens]) -> str | None:
    """From which layer on the lens's first choice is the model's own; None: not all layers were looked at."""
    first = [None if each.predictions is None else each.predictions[0].token for each in lens]
    if len(found.layers) < found.config.num_hidden_layers or first[-1] is None:
        return None
    start = len(first)
    while start > 0 and first[start - 1] == first[-1]:
        start -= 1
    layer = lens[start].layer
    return "from the embedding on" if layer is None else f"from layer {layer} on"


def _wrapped(start: str, words: Iterable[str]) -> Iterator[str]:
    """Words on lines of COLUMNS, behind start, and below it on the lines after the first."""
    line, empty = start, True
    for word in words:
        if not empty and cells(line) + 2 + cells(word.rstrip()) > COLUMNS:
            yield line.rstrip()
            line, empty = " " * cells(start), True
        line += word if empty else f"  {word}"
        empty = False
    yield line.rstrip()


# The command


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.trace",
        description="What a prompt goes through in a first-generation Qwen: shape, dtype, mean, spread and "
        "largest value of every tensor from the embedding to the logits, layer by layer. "
        "The table goes to stdout, everything else to stderr.",
        epilog="The model runs on the CPU, one matrix in memory at a time, so that it may exceed the memory.",
    )
    add = parser.add_argument
    add(
        "prompt",
        type=utf8,
        nargs="?",
        help="the text to look at; - or nothing reads stdin (one newline at its end is dropped)",
    )
    add("--file", type=Path, help="read the prompt from this file (one newline at its end is dropped)")
    add_model_option(parser)
    add("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32 or float64")
    add(
        "--layers",
        type=_layers,
        metavar="N,N-N,…",
        help="the layers to show, from 0 on, -1 the last: 0,3,-1 or 0-3; an equals sign before a list that "
        "begins with a minus: --layers=-2,-1 (default: all, 80 of the 72B)",
    )
    add(
        "--lens",
        action="store_true",
        help="what the last position would predict after each layer, through the final norm and the head",
    )
    add("--top", type=int, metavar="N", help=f"the N likeliest tokens of each with --lens (default: {TOP})")
    add(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in the prompt"
    )
    add("--json", action="store_true", help="print everything as one JSON object instead")
    return parser


_LAYERS = re.compile(r"(-?\d{1,6})(?:-(-?\d{1,6}))?", re.ASCII)


def _layers(argument: str) -> list[tuple[int, int]]:
    """The first and the last of each range."""
    found = [_LAYERS.fullmatch(part.strip()) for part in argument.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{argument!r} are no layers; write 0,3,-1 or 0-3")
    return [(int(match[1]), int(match[2] or match[1])) for match in found]


def _chosen(config: QwenConfig, ranges: Sequence[tuple[int, int]] | None) -> list[int]:
    """The layers of ranges, whose ends may be counted from the last layer."""
    if ranges is None:
        return list(range(config.num_hidden_layers))
    chosen: list[int] = []
    for ends in ranges:
        first, last = (_from_start(config, end) for end in ends)
        if last < first:
            raise InputError(f"--layers {ends[0]}-{ends[1]} is empty: it goes from {first} to {last}")
        chosen += range(first, last + 1)
    return chosen


def _command(args: argparse.Namespace) -> int:
    if args.top is not None and not args.lens:
        raise InputError("--top is for --lens")
    folder = args.model or bundled_checkpoint()
    require_folder(folder)
    prompt = read_prompt(args.prompt, args.file)
    config, tokenizer = open_folder(folder)
    ids = tokenizer.encode(prompt, allowed_special="all" if args.allow_special else ())
    if not ids:
        raise InputError("the prompt is empty; give it as an argument, with --file or on stdin")
    top = (TOP if args.top is None else args.top) if args.lens else None
    layers = _chosen(config, args.layers)
    with Progress("tracing") as progress:
        found = trace(folder, ids, args.dtype, layers, top, progress.update)
    name = args.model or "the tiny checkpoint that comes with the project"
    say(
        f"{name}: {len(found.layers)} of {config.num_hidden_layers} layers, {len(found.stages)} stages of "
        f"{len(ids)} position{'s' if len(ids) > 1 else ''} in {found.dtype}"
    )
    if note := length_note(config, len(ids)):
        say(note)
    if args.layers is None and len(layers) > _MANY_LAYERS and not args.json:
        say(f"note: all {len(layers)} layers are shown; --layers 0,{len(layers) // 2},-1 shows three of them")
    if args.json:
        print(on_stdout(as_json(_report(found, prompt, str(folder), tokenizer))), flush=True)
    else:
        print("\n".join(trace_lines(found, tokenizer)), flush=True)
    return 0


def _report(found: Trace, prompt: str, folder: str, tokenizer: Tokenizer) -> dict[str, Any]:
    from qwen_ref.parity.bundle import meaning

    return {
        "model": folder,
        "prompt": prompt,
        "dtype": found.dtype,
        "axes": _sizes(found),
        "tokens": [{"id": token, "text": spelled(token, tokenizer)} for token in found.ids],
        "layers": found.layers,
        "stages": [{**dataclasses.asdict(stage), "meaning": meaning(stage.name)} for stage in found.stages],
        "lens": None
        if found.lens is None
        else [
            {
                "layer": each.layer,
                "predictions": each.predictions
                and [
                    {"id": token, "text": spelled(token, tokenizer), "probability": probability}
                    for token, probability in each.predictions
                ],
            }
            for each in found.lens
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), _command, arguments)


if __name__ == "__main__":
    sys.exit(main())
