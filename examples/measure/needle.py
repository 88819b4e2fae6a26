"""Hides a fact at each depth of a long context and asks for it: the needle test, by length and depth.

    python examples/measure/needle.py --plot examples/figures/needle.png

A length counts all tokens of a text, the answer included. A depth says where the fact begins: 0 is the start
of the text, 100 is right before the question. A fact counts as retrieved if every token of the answer is the
likeliest token at its place. Each length is tested with and without dynamic NTK and LogN, on the same texts.

Without --needle, the facts and the haystack come from needle_corpus.py. The checkpoint in needle/ was trained
on such texts. For any other model, give a fact and a text of your own:

    python examples/measure/needle.py --model Qwen-1_8B --lengths 4096,8192 --samples 2 \\
        --haystack essays.txt --needle " The best thing to do in Bern is to swim in the Aare." \\
        --question " The best thing to do in Bern is to" --answer " swim in the Aare"
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwen_ref.checkpoint import dtype_name
from qwen_ref.commands.cli import Parser, Progress, as_json, on_stdout, run, utf8
from qwen_ref.commands.figures import pyplot, save
from qwen_ref.commands.files import checkpoint_folder, output_path, read_text
from qwen_ref.commands.loading import open_folder
from qwen_ref.commands.settings import add_model_option, add_tokenizer_option
from qwen_ref.config import InputError
from qwen_ref.loading.hub import TEXT, model_name
from qwen_ref.loading.loader import load_model
from qwen_ref.model import Qwen, ntk_alpha
from qwen_ref.perplexity.scoring import score_texts
from qwen_ref.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "make"))
from needle_corpus import draw_needle, haystack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINT = Path(__file__).resolve().parent / "needle"
LENGTHS = (64, 128, 256, 512, 1024)
VARIANTS = {  # use_dynamic_ntk, use_logn_attn
    "both": (True, True),
    "ntk": (True, False),
    "logn": (False, True),
    "none": (False, False),
}
TITLES = {"both": "NTK and LogN", "ntk": "NTK alone", "logn": "LogN alone", "none": "neither"}
SENTENCE_ENDS = tuple(end.encode() for end in (".", "!", "?", "\n", "。", "！", "？"))
SEARCHED = 256  # tokens of a haystack in which a sentence ends

Draw = Callable[[random.Random, int], tuple[list[int], "Needle"]]


class Needle(NamedTuple):
    """Token ids."""

    fact: list[int]
    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self))


class Cell(NamedTuple):
    """What became of the needles at one depth of one length."""

    variant: str
    length: int
    depth: float
    alpha: int
    samples: int
    retrieved: int
    mean_logprob: float  # of a whole answer

    @property
    def percent(self) -> float:
        return 100 * self.retrieved / self.samples


# The texts


def hide(
    needle: Needle, hay: Sequence[int], ends: Callable[[int], bool], length: int, depth: float
) -> list[int]:
    """A text of so many tokens: hay, the fact at its depth, hay, the question, the answer.

    The hay is cut at its own two ends so that the fact follows the end of a sentence, where there is one;
    ends says of a token whether it is one. ValueError where the length leaves no room.
    """
    room = length - needle.tokens
    if room < 0:
        raise InputError(
            f"a length of {length} is too short: fact, question and answer take {needle.tokens} tokens"
        )
    before = round(room * depth / 100)
    found = (at for at in range(before, len(hay) - (room - before) + 1) if at == 0 or ends(hay[at - 1]))
    cut = next(found, before)
    return [
        *hay[cut - before : cut],
        *needle.fact,
        *hay[cut : cut + room - before],
        *needle.question,
        *needle.answer,
    ]


def drawer(args: argparse.Namespace, tokenizer: Tokenizer) -> Draw:
    """How a haystack of at least so many tokens and its needle are drawn."""
    encode = functools.cache(tokenizer.encode)
    given = None
    if args.needle is not None:
        given = Needle(*map(encode, (args.needle, args.question, args.answer)))
    text: list[int] = []
    if args.haystack is not None:
        text = encode(read_text(args.haystack))
        if not text:
            raise InputError(f"{args.haystack} is empty; a haystack needs text")

    def draw(rng: random.Random, tokens: int) -> tuple[list[int], Needle]:
        fact = draw_needle(rng)
        needle = given or Needle(*map(encode, (fact.statement, fact.question, fact.answer)))
        if not text:
            return haystack(rng, encode, tokens, without=fact.name)[0], needle
        start = rng.randrange(len(text))  # another part of the text in each sample, around its end
        return [text[(start + n) % len(text)] for n in range(tokens)], needle

    return draw


def texts_of(
    draw: Draw, tokenizer: Tokenizer, length: int, depths: Sequence[float], samples: int, seed: int
) -> tuple[list[list[int]], list[int]]:
    """The texts of a length, depth by depth, and where in each the answer starts."""
    rng = random.Random(f"{seed} {length}")  # whatever other lengths are asked

    @functools.cache
    def ends(token: int) -> bool:
        return tokenizer.decode_bytes([token]).endswith(SENTENCE_ENDS)

    texts, starts = [], []
    for depth in depths:
        for _ in range(samples):
            hay, needle = draw(rng, length + SEARCHED)
            texts.append(hide(needle, hay, ends, length, depth))
            starts.append(length - len(needle.answer))
    return texts, starts


# The test


def measure(
    model: Qwen,
    texts: dict[int, tuple[list[list[int]], list[int]]],
    depths: Sequence[float],
    variants: Sequence[str],
    batch_size: int,
) -> list[Cell]:
    """A cell for every variant, length and depth. The model's own configuration is put back at the end."""
    own, cells, done = model.config, [], 0
    total = len(variants) * sum(sum(len(text) - 1 for text in found) for found, _ in texts.values())
    with Progress("looking for needles", unit="tokens") as progress:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress.update(done, total)

        try:
            for variant in variants:
                ntk, logn = VARIANTS[variant]
                model.config = dataclasses.replace(own, use_dynamic_ntk=ntk, use_logn_attn=logn)
                for length, (found, starts) in texts.items():
                    scores = score_texts(model, found, starts, batch_size, advance)
                    samples = len(found) // len(depths)
                    alpha = ntk_alpha(length, own.seq_length) if ntk else 1
                    for number, depth in enumerate(depths):
                        these = scores[number * samples : (number + 1) * samples]
                        retrieved = sum(bool(each.likeliest.all()) for each in these)
                        mean = math.fsum(float(each.logprobs.sum()) for each in these) / samples
                        cells.append(Cell(variant, length, depth, alpha, samples, retrieved, mean))
        finally:
            model.config = own
    return cells


# What comes out


def table(cells: Sequence[Cell], variant: str) -> list[str]:
    """Markdown: a row for each depth, a column for each length."""
    own = [cell for cell in cells if cell.variant == variant]
    lengths = list(dict.fromkeys(cell.length for cell in own))
    lines = [
        f"| depth; {TITLES[variant]} | {' | '.join(f'{length:,} tokens' for length in lengths)} |",
        f"|{'---|' * (len(lengths) + 1)}",
    ]
    for depth in dict.fromkeys(cell.depth for cell in own):
        row = [f"{cell.percent:.0f} % ({rounded(cell.mean_logprob)})" for cell in own if cell.depth == depth]
        lines.append(f"| {depth:.3g} % | {' | '.join(row)} |")
    return lines


def rounded(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # −0.0 + 0.0 is 0.0


def heat_map(cells: Sequence[Cell], trained_length: int, title: str) -> Figure:
    """A panel for each variant, all on one scale; a line where the trained length ends."""
    variants, lengths, depths = (
        list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("variant", "length", "depth")
    )
    columns = min(len(variants), 2)
    rows = math.ceil(len(variants) / columns)
    width, height = 1.2 + 0.75 * len(lengths), 1.3 + 0.42 * len(depths)
    figure, grid = pyplot().subplots(
        rows,
        columns,
        figsize=(max(columns * width, 5) + 0.8, rows * height + 0.6),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    within = sum(length <= trained_length for length in lengths)
    for number, axes in enumerate(grid.flat):
        if number >= len(variants):
            axes.set_visible(False)
            continue
        own = [cell for cell in cells if cell.variant == variants[number]]
        percents = [[cell.percent for cell in own if cell.depth == depth] for depth in depths]
        image = axes.imshow(percents, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for row, values in enumerate(percents):
            for column, value in enumerate(values):
                colour = "black" if value > 50 else "white"  # the map is dark where little is retrieved
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=9)
        if 0 < within < len(lengths):
            axes.axvline(within - 0.5, color="#d7191c", linewidth=2.5)
        axes.set_title(TITLES[variants[number]], fontsize="medium")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    line = f" (red line: trained up to {trained_length:,})" if 0 < within < len(lengths) else ""
    figure.supxlabel(f"tokens of the text{line}", fontsize="medium")
    figure.supylabel("depth of the fact, %", fontsize="medium")
    figure.colorbar(image, ax=grid, label="retrieved, %")
    figure.suptitle(title, fontsize="small", parse_math=False)
    return figure


# The command


def parser() -> Parser:
    parser = Parser(
        prog="python examples/measure/needle.py",
        description="Hides a fact at each depth of a long context and asks for it. "
        "The tables go to stdout, everything else to stderr.",
    )
    add = parser.add_argument
    add_model_option(parser, default=" (default: the one trained for it)")
    parser.set_defaults(model=CHECKPOINT)
    add(
        "--lengths",
        type=_lengths,
        default=LENGTHS,
        metavar="N,N,…",
        help=f"tokens of a text, with question and answer (default: {','.join(map(str, LENGTHS))})",
    )
    add(
        "--depths",
        type=_depths,
        default=_depths("5"),
        metavar="P,P,…",
        help="where the fact begins, in %% of the haystack; or one number: so many depths, evenly from 0 "
        "to 100 (default: 5)",
    )
    add("--samples", type=int, default=50, metavar="N", help="texts for each length and depth (%(default)s)")
    add(
        "--variants",
        type=_variants,
        default=tuple(VARIANTS),
        metavar="V,V,…",
        help=f"with dynamic NTK and LogN: {', '.join(VARIANTS)} (default: all)",
    )
    add("--needle", type=utf8, metavar="TEXT", help="the fact to hide (default: a new one for each text)")
    add("--question", type=utf8, metavar="TEXT", help="what stands at the end of the text")
    add("--answer", type=utf8, metavar="TEXT", help="what is to follow it, with the space it begins with")
    add("--haystack", type=Path, metavar="FILE", help="text in UTF-8; repeated where it is too short")
    add("--seed", type=int, default=0, help="for facts and haystacks (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="texts at a time (%(default)s)")
    add_tokenizer_option(parser)
    add("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32 or float64")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--plot", type=Path, metavar="FILE.png", help="draw the heat map (takes matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _lengths(argument: str) -> tuple[int, ...]:
    try:
        found = tuple(map(int, argument.split(",")))
    except ValueError:
        message = f"{argument!r} are no lengths: numbers of tokens with commas between them"
        raise argparse.ArgumentTypeError(message) from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"a length of {min(found)} tokens is not positive")
    return tuple(sorted(set(found)))


def _depths(argument: str) -> tuple[float, ...]:
    parts = argument.split(",")
    try:
        if len(parts) == 1:
            count = int(argument)
            if not 2 <= count <= 101:
                raise argparse.ArgumentTypeError(f"a count of depths must be from 2 to 101, not {count}")
            return tuple(100 * n / (count - 1) for n in range(count))
        found = tuple(map(float, parts))
    except ValueError:
        message = f"{argument!r} are no depths: percents with commas between them, or how many"
        raise argparse.ArgumentTypeError(message) from None
    for depth in found:
        if not 0 <= depth <= 100:
            raise argparse.ArgumentTypeError(f"a depth of {depth:g} is not from 0 to 100 %")
    return tuple(sorted(set(found)))


def _variants(argument: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(argument.split(",")))
    for name in found:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(VARIANTS)}")
    return found


def command(args: argparse.Namespace) -> int:
    for name in ("samples", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    own = {"--needle": args.needle, "--question": args.question, "--answer": args.answer}
    if any(text is not None for text in own.values()):
        for name, text in own.items():
            if not text:
                state = "missing" if text is None else "empty"
                raise InputError(f"{name} is {state}; --needle, --question and --answer go together")
    if args.plot is not None:
        pyplot()
        output_path(args.plot, "--plot", args)
    folder = checkpoint_folder(args, TEXT)
    _, tokenizer = open_folder(folder, args.tokenizer_engine)
    draw = drawer(args, tokenizer)
    texts = {
        length: texts_of(draw, tokenizer, length, args.depths, args.samples, args.seed)
        for length in args.lengths
    }
    model = load_model(folder, args.dtype, args.device)
    cells = measure(model, texts, args.depths, args.variants, args.batch_size)
    trained, dtype = model.config.seq_length, dtype_name(model.embed.weight.dtype)
    if args.json:
        report = {
            "model": str(folder),
            "dtype": dtype,
            "seq_length": trained,
            "seed": args.seed,
            "cells": [cell._asdict() for cell in cells],
        }
        print(on_stdout(as_json(report)), flush=True)
    else:
        print("\n\n".join("\n".join(table(cells, variant)) for variant in args.variants), flush=True)
    if args.plot is not None:
        what = f"{model_name(folder)}, {dtype}, {args.samples} texts a cell"
        save(heat_map(cells, trained, f"Facts retrieved: {what}"), args.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(parser(), command, arguments)


if __name__ == "__main__":
    sys.exit(main())
