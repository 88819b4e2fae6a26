"""The figures of walkthrough.py. They are here so that its cells have only what Qwen computes.

Each function takes numbers that a cell has computed and returns a figure; `Album` saves figures as files.
Every figure has a white background, so it is readable on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.files import make_folder, new_file, write_whole

OUT = Path("build/walkthrough")
MAKE = Path(__file__).resolve().parents[1] / "make"
FOLDER = Path(__file__).resolve().parents[1] / "figures"  # the figures that pages show
README_FIGURES = ("rope", "logn_ntk", "attention")

# Told apart by those who do not see all colours, too (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"
GREY, FUTURE = "#777777", "#dddddd"
TINTS = ["#cfe6f5", "#ffe3b0", "#c6ecdd", "#f9d5c2", "#f1d9e6", "#e6e6e6"]


class Album:
    """Saves figures in a folder, and shows them if the walkthrough runs as a notebook.

    It prints the line "figure: NAME" where a figure belongs; render_walkthrough.py puts the figure there.
    """

    def __init__(self, folder: Path, also_for_readme: bool = False) -> None:
        self.folder, self.also_for_readme = folder, also_for_readme

    @classmethod
    def from_command_line(cls, description: str) -> Album:
        """Wrong options end the process with one line and exit code 2. A notebook has no options."""
        if "ipykernel" in sys.modules:  # the command line and stdout are the kernel's
            make_folder(OUT)
            return cls(OUT)
        parser = Parser(prog="walkthrough.py", description=description)
        parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures (%(default)s)")
        parser.add_argument(
            "--readme",
            action="store_true",
            help=f"write {', '.join(README_FIGURES)} to examples/figures, too",
        )
        made = []

        def command(args: argparse.Namespace) -> int:
            make_folder(args.out)
            made.append(cls(args.out, args.readme))
            return 0

        code = run(parser, command)
        if code:
            sys.exit(code)
        sys.excepthook = _as_commands_end
        return made[0]

    def show(self, name: str, picture: Figure | str) -> None:
        """Saves a figure as NAME.png, or the text of an SVG as NAME.svg."""
        suffix = "svg" if isinstance(picture, str) else "png"
        path = self.folder / f"{name}.{suffix}"
        save(picture, path)
        if self.also_for_readme and name in README_FIGURES:
            save(picture, FOLDER / path.name)
        print(f"figure: {path.name}", flush=True)  # where nobody reads on, this is where it ends
        if "ipykernel" in sys.modules:
            from IPython.display import SVG, Image, display

            display(SVG(picture) if suffix == "svg" else Image(filename=path))


def _as_commands_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C, a full disk and a closed stdout end the walkthrough as they end the commands of the project."""
    if not issubclass(kind, (OSError, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
        return

    try:
        sys.stdout.flush()
    except OSError:  # what is left to be printed has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def fail(_: object) -> int:
        raise error

    os._exit(run(Parser(), fail, []))


def save(picture: Figure | str, path: Path) -> None:
    """Writes the whole file or none."""
    if isinstance(picture, str):
        write_whole(path, picture)
    else:
        with new_file(path) as file:
            picture.savefig(file, dpi=140, format="png", facecolor="white")


def new(width: float, height: float, columns: int = 1, rows: int = 1, **options: object) -> tuple:
    """A figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def labelled(tokens: Sequence[str]) -> list[str]:
    """Tokens as a figure shows them: a space that belongs to one is a mark, a line's end an arrow."""
    return [token.replace(" ", "␣").replace("\n", "↵") for token in tokens]


def _token_ticks(axis_setter: Callable, tokens: Sequence[str], **options: object) -> None:
    axis_setter(range(len(tokens)), labelled(tokens), **options)


def pieces_and_tokens(
    pieces: Sequence[str], tokens: Sequence[Sequence[bytes]], ids: Sequence[list[int]]
) -> Figure:
    """A text in its pieces and, below each and in its colour, the tokens it became, with their ids."""
    figure = Figure(figsize=(10, 1.9))
    axes = figure.add_axes((0.07, 0, 0.92, 1))
    axes.axis("off")

    def words(piece_tokens: Sequence[bytes]) -> list[str]:
        try:
            return [token.decode() for token in piece_tokens]
        except UnicodeDecodeError:  # bytes of half a character
            return [token.decode() if token.isascii() else f"0x{token.hex()}" for token in piece_tokens]

    x = 0.0
    for n, (piece, of_piece, numbers) in enumerate(zip(pieces, tokens, ids, strict=True)):
        shown = labelled(words(of_piece))
        widths = [max(len(text), len(str(number))) + 0.8 for text, number in zip(shown, numbers, strict=True)]
        tint = TINTS[n % len(TINTS)]

        def box(left: float, width: float, bottom: float, text: str, tint: str = tint) -> None:
            axes.barh(bottom, width - 0.15, left=left, height=0.72, color=tint, edgecolor=GREY, linewidth=0.6)
            middle = left + (width - 0.15) / 2
            axes.text(middle, bottom, text, ha="center", va="center", family="monospace", fontsize=9)

        box(x, sum(widths), 2, labelled([piece])[0])
        for text, number, width in zip(shown, numbers, widths, strict=True):
            box(x, width, 1, text)
            axes.text(x + (width - 0.15) / 2, 0.3, str(number), ha="center", va="center", fontsize=8)
            x += width
    for height, name in ((2, "pieces"), (1, "tokens"), (0.3, "ids")):
        axes.text(-0.6, height, name, ha="right", va="center", fontsize=9)
    axes.set_xlim(0, x)
    axes.set_ylim(0, 2.5)
    return figure


def norm_before_and_after(tokens: Sequence[str], before: Tensor, after: Tensor) -> Figure:
    """Root mean squares (T) of a residual stream and of its norm without weight, a bar a token."""
    figure, axes = new(8, 3)
    where = np.arange(len(tokens))
    axes.bar(where - 0.2, before.numpy(), 0.38, color=ORANGE, label="before")
    axes.bar(where + 0.2, after.numpy(), 0.38, color=BLUE, label="after x / √(mean(x²) + ε)")
    _token_ticks(axes.set_xticks, tokens, rotation=40, ha="right")
    axes.set(ylabel="root mean square")
    axes.set_title("RMSNorm makes every token's vector equally long", fontsize=10)
    axes.legend()
    return figure


def rotation_and_wavelengths(turned: Tensor, wavelengths: Mapping[float, Tensor], window: int) -> Figure:
    """turned: a pair of dimensions at positions 0, 1, …, (positions, 2). wavelengths: by base, (K/2)."""
    figure, (left, middle, right) = new(10, 3.7, 3, width_ratios=(1, 1.35, 1.35))
    left.axhline(0, color="#cccccc", linewidth=0.8)
    left.axvline(0, color="#cccccc", linewidth=0.8)
    for position, (x, y) in enumerate(turned.tolist()):
        left.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "alpha": 0.8})
        left.text(1.17 * x, 1.17 * y, str(position), ha="center", va="center", fontsize=9)
    left.set(
        xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xlabel="dimension i", ylabel="dimension i + K/2"
    )
    left.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    left.set_title(f"One pair of a head,\nat positions 0 to {len(turned) - 1}", fontsize=10)

    names = {base: f"base {base:,.0f}" for base in wavelengths}
    colours = dict(zip(wavelengths, (ORANGE, BLUE), strict=True))
    for base, lengths in wavelengths.items():
        slow = int((lengths > window).sum())
        middle.plot(lengths.numpy(), color=colours[base], label=f"{names[base]}: {slow} pairs above")
    middle.axhline(window, color="black", linestyle="--", linewidth=1)
    middle.text(0, window * 1.25, f"{window:,} positions", fontsize=8)
    middle.set(yscale="log", xlabel="pair i", ylabel="positions for a whole turn")
    middle.set_title("Wavelength of every pair", fontsize=10)
    middle.legend(fontsize=8, loc="upper left")
    middle.set_ylim(top=1e8)
    middle.grid(alpha=0.3)

    positions, pair = np.arange(0, window, 16), 45
    for base, lengths in wavelengths.items():
        turns = window / float(lengths[pair])
        curve = np.cos(2 * np.pi * turns * positions / window)
        right.plot(positions, curve, color=colours[base], label=f"{names[base]}: {turns:.1f} turns")
    right.set(xlabel="position", ylabel="cosine of its angle", ylim=(-1.1, 1.5))
    right.set_title(f"Pair {pair} through a window of {window:,}", fontsize=10)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.set_xticks(range(0, window + 1, 8192))
    right.legend(fontsize=8, loc="upper right")
    right.grid(alpha=0.3)
    return figure


def distances(products: Tensor) -> Figure:
    """products: q · k (positions of q, positions of k), of one q and one k placed everywhere."""
    figure, axes = new(4.6, 3.8)
    limit = float(products.abs().max())
    image = axes.imshow(products.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    ticks = range(0, len(products), 2)
    axes.set(xlabel="position of the key", ylabel="position of the query", xticks=ticks, yticks=ticks)
    axes.set_title("The same q and k, moved about:\nonly the distance counts", fontsize=10)
    figure.colorbar(image, label="q · k")
    return figure


def _seen(of_head: Tensor) -> np.ndarray:
    """A map without what the causal mask forbids, which is then left as the grey ground."""
    future = torch.ones_like(of_head, dtype=torch.bool).triu(diagonal=1)
    return of_head.masked_fill(future, torch.nan).numpy()


def scores_to_weights(tokens: Sequence[str], scores: Tensor, weights: Tensor) -> Figure:
    """scores and weights (T, T) of one head: before the mask, and after mask and softmax."""
    figure, (left, middle, right) = new(10, 3.7, 3)
    limit = float(scores.abs().max())
    for axes, values, title, options in (
        (left, scores.numpy(), "q · k / √K", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        (middle, _seen(scores), "what the mask leaves", {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}),
        (right, _seen(weights), "softmax of every row: the weights", {"cmap": "Blues", "vmin": 0, "vmax": 1}),
    ):
        image = axes.imshow(values, **options)
        axes.set_facecolor(FUTURE)
        axes.set_title(title, fontsize=10)
        _token_ticks(axes.set_xticks, tokens, rotation=60, ha="right", fontsize=8)
        _token_ticks(axes.set_yticks, tokens, fontsize=8)
        axes.set_xlabel("key: the token looked at", fontsize=8)
        figure.colorbar(image, shrink=0.7)
    left.set_ylabel("query: the token that looks", fontsize=8)
    return figure


def attention_maps(tokens: Sequence[str], weights: Sequence[Tensor]) -> Figure:
    """weights: of each layer (H, T, T): every head's map."""
    layers, heads = len(weights), len(weights[0])
    figure, grid = new(11, 2.7 * layers + 0.6, heads, layers, sharex=True, sharey=True)
    for layer, of_layer in enumerate(weights):
        for head, of_head in enumerate(of_layer):
            axes = grid[layer][head]
            image = axes.imshow(_seen(of_head), cmap="Blues", vmin=0, vmax=1)
            axes.set_facecolor(FUTURE)
            axes.set_title(f"layer {layer}, head {head}", fontsize=9)
            _token_ticks(axes.set_xticks, tokens, rotation=60, ha="right", fontsize=8)
            _token_ticks(axes.set_yticks, tokens, fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.4, label="attention weight")
    figure.supxlabel("key: the token looked at", fontsize=9)
    figure.supylabel("query: the token that looks", fontsize=9)
    return figure


def chosen_heads(
    tokens: Sequence[str], maps: Mapping[str, Tensor], last_rows: Mapping[str, Tensor]
) -> Figure:
    """Some maps (T, T), large; and for the last token, where those heads look (T)."""
    figure, axes = new(10, 3.8, len(maps) + 1)
    for one, (name, of_head) in zip(axes, maps.items(), strict=False):
        image = one.imshow(_seen(of_head), cmap="Blues", vmin=0, vmax=1)
        one.set_facecolor(FUTURE)
        one.set_title(name, fontsize=10)
        _token_ticks(one.set_xticks, tokens, rotation=60, ha="right", fontsize=8)
        _token_ticks(one.set_yticks, tokens, fontsize=8)
        one.set_xlabel("key: the token looked at", fontsize=8)
    axes[0].set_ylabel("query: the token that looks", fontsize=8)
    figure.colorbar(image, ax=axes[len(maps) - 1], shrink=0.7, label="attention weight")
    where, bars = np.arange(len(tokens)), len(last_rows)
    for n, ((name, row), colour) in enumerate(zip(last_rows.items(), (BLUE, ORANGE, GREEN), strict=False)):
        axes[-1].barh(
            where + 0.8 * ((n + 0.5) / bars - 0.5), row.numpy(), 0.8 / bars, color=colour, label=name
        )
    _token_ticks(axes[-1].set_yticks, tokens, fontsize=8)
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="attention weight", xlim=(0, 1))
    axes[-1].set_title(f"Where the last token, {labelled(tokens[-1:])[0]}, looks", fontsize=10)
    axes[-1].legend(fontsize=8, loc="center right")
    return figure


def beyond_the_trained_length(
    alphas: Mapping[int, int],
    wavelengths: Mapping[int, Tensor],
    logn: Mapping[int, Tensor],
    trained: int,
) -> Figure:
    """alphas: by prompt length. wavelengths: by α, (K/2). logn: by trained length, (positions)."""
    figure, (left, middle, right) = new(10, 3.5, 3)
    left.step(list(alphas), list(alphas.values()), where="post", color=BLUE)
    left.axvline(trained, color="black", linestyle="--", linewidth=1)
    left.text(trained * 1.08, 14.3, f"trained length,\n{trained:,}", fontsize=8, va="top")
    left.set_xscale("log", base=2)
    ticks = [2048 * 2**n for n in range(6)]
    left.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    left.set_yticks(sorted(set(alphas.values())))
    left.set(xlabel="tokens of the prompt", ylabel="α", ylim=(0, 16))
    left.set_title("NTK: α goes up in steps", fontsize=10)
    for (alpha, lengths), colour in zip(wavelengths.items(), (ORANGE, SKY, BLUE, GREEN), strict=False):
        middle.plot(lengths.numpy(), color=colour, label=f"α = {alpha}")
    middle.set(yscale="log", xlabel="pair i", ylabel="positions for a whole turn")
    middle.set_title("NTK: slow pairs get slower", fontsize=10)
    middle.legend(fontsize=8)
    for (length, factors), colour in zip(logn.items(), (BLUE, ORANGE), strict=False):
        right.plot(factors.numpy(), color=colour, label=f"trained length {length:,}")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    right.set_xticks(range(0, 32769, 8192))
    right.set(xlabel="position of the query", ylabel="factor of the query")
    right.set_title("LogN: later queries are longer", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def gate(z: Tensor, silu: Tensor, gates: Tensor) -> Figure:
    """silu over z; and how often a channel's gate has which value."""
    figure, (left, right) = new(9, 3.4, 2)
    left.plot(z.numpy(), z.clamp(min=0).numpy(), color=GREY, linestyle="--", label="relu(z)")
    left.plot(z.numpy(), silu.numpy(), color=BLUE, label="silu(z) = z · sigmoid(z)")
    left.set(xlabel="z")
    left.set_title("The gate's curve", fontsize=10)
    left.legend()
    right.hist(gates.flatten().numpy(), bins=60, color=BLUE)
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="gate(x), before silu", ylabel="channels × tokens")
    right.set_title("Where the trained model uses it", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def through_the_layers(stages: Sequence[str], tokens: Sequence[str], norms: Tensor) -> Figure:
    """norms (stages, T): how long each token's residual stream is after each half of a layer."""
    figure, axes = new(8.5, 3.8)
    for t, token in enumerate(labelled(tokens)):
        last = t == len(tokens) - 1
        axes.plot(
            norms[:, t].numpy(),
            "o-" if last else "-",
            color=BLUE if last else GREY,
            alpha=1 if last else 0.45,
        )
        if last:
            axes.text(len(stages) - 0.85, float(norms[-1, t]), f"last {token}", va="center", color=BLUE)
    axes.set_xticks(range(len(stages)), stages, rotation=25, ha="right", fontsize=8)
    axes.set(ylabel="length of the vector, √(Σ x²)", yscale="log")
    axes.set_title("The residual stream, a line a token", fontsize=10)
    axes.set_xlim(right=len(stages) + 0.4)
    axes.grid(alpha=0.3)
    return figure


def lens(stages: Sequence[str], probabilities: Mapping[str, Sequence[float]]) -> Figure:
    """What the head would say after each stage: the probabilities of some tokens."""
    figure, axes = new(8.5, 3.8)
    for (token, values), colour in zip(probabilities.items(), (BLUE, ORANGE, GREEN, PINK), strict=False):
        axes.plot(values, "o-", color=colour, label=labelled([token])[0])
    axes.set_xticks(range(len(stages)), stages, rotation=25, ha="right", fontsize=8)
    axes.set(ylabel="probability", ylim=(-0.03, 1.03))
    axes.set_title("The logit lens, at the last token", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def sampling(names: Sequence[str], plain: Tensor, settings: Mapping[str, Tensor]) -> Figure:
    """The probabilities of some tokens as the model gives them, and as each setting leaves them."""
    figure, grid = new(12, 5.4, 2, 2, sharex=True, sharey=True)
    where, plain = np.arange(len(names)), plain.numpy()
    for axes, (title, probabilities) in zip(grid.flat, settings.items(), strict=True):
        left = probabilities.numpy()
        cut = left == 0
        axes.bar(where, left, color=SKY, label="what is drawn from")
        axes.bar(where[cut], plain[cut], fill=False, edgecolor=RED, linewidth=1.2, label="cut away")
        axes.hlines(
            plain, where - 0.4, where + 0.4, color="black", linewidth=1.5, label="what the model gave"
        )
        axes.set_title(title, fontsize=10)
        axes.set_xticks(where, labelled(names), rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("probability", fontsize=8)
    grid[1][1].legend(fontsize=8, loc="upper right")
    return figure


def rounding(errors: Mapping[str, Tensor]) -> Figure:
    """Of a weight rounded in several ways, how far its numbers moved."""
    figure, axes = new(9, 3.2, len(errors), sharey=False)
    for one, (name, moved), colour in zip(axes, errors.items(), (BLUE, RED), strict=False):
        one.hist(moved.flatten().numpy(), bins=81, color=colour)
        one.locator_params(axis="x", nbins=5)
        one.set(xlabel="rounded − weight")
        one.set_title(name, fontsize=10)
        one.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes[0].set_ylabel("weights")
    return figure
