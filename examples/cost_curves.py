"""How prefill and decoding get slower with length, and what a batch buys: the README's figure.

    python examples/cost_curves.py [--synthetic 1.8b] [--out examples/figures]

Noise in the shape of a published model, bfloat16, in every form: plain, fast, int8, int4. Every length is
prefilled once and eight tokens are decoded behind it; then batches of prompts of 256 tokens. The numbers go
to stdout as Markdown tables, the curves into two figures, which take matplotlib (the extra "plot"). Single
runs: on a machine that is shared, a point may be off by a quarter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_ref import load_model
from qwen_ref.bench.measure import Subject, Timing, machine, measure
from qwen_ref.bench.synthetic import synthetic
from qwen_ref.commands.cli import Parser, Progress, run
from qwen_ref.commands.figures import pyplot, save
from qwen_ref.commands.files import make_folder, output_path
from qwen_ref.config import InputError
from qwen_ref.fast.layers import fasten

FORMS = {"plain": "#777777", "fast": "#0072b2", "int8": "#009e73", "int4": "#d55e00"}
OUT = Path(__file__).resolve().parent / "figures"
BATCH_LENGTH = 256

Timings = dict[tuple[str, int], Timing]


def subjects(folder: Path) -> list[Subject]:
    found = []
    for name in FORMS:
        model = load_model(folder, "auto")
        if name != "plain":
            fasten(model, None if name == "fast" else name)
        found.append(Subject(name, model))
    return found


def time_all(models: list[Subject], lengths: list[int], batch: int, what: str) -> Timings:
    with Progress(what, unit="turns") as progress:
        return measure(
            models, lengths, tokens=8, batch=batch, repeats=1, warm_up=False, progress=progress.update
        )


def table(title: str, rows: dict[int, Timings], key: str, at: int | None = None) -> None:
    """A row for each number (a length, or a batch at length `at`), a column for each form."""
    print(f"\n| {title} | {' | '.join(FORMS)} |\n|{'---|' * (len(FORMS) + 1)}")
    for number, timings in rows.items():
        values = [getattr(timings[name, at or number], key)[0] for name in FORMS]
        print(f"| {number:,} | {' | '.join(f'{value:.1f}' for value in values)} |", flush=True)


def draw(axes: Axes, rows: dict[int, Timings], key: str, at: int | None = None, **labels: str) -> None:
    for name, colour in FORMS.items():
        values = [getattr(timings[name, at or number], key)[0] for number, timings in rows.items()]
        axes.plot(list(rows), values, "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), [f"{number:,}" for number in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set(**labels)


def draw_lengths(rows: dict[int, Timings], title: str, out: Path) -> None:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    draw(left, rows, "prefill", title="Prefill", xlabel="tokens of the prompt", ylabel="tokens/s")
    draw(right, rows, "decode", title="Decoding", xlabel="tokens in the cache", ylabel="tokens/s")
    left.legend(loc="lower left")
    save_titled(figure, title, out)


def draw_batches(rows: dict[int, Timings], title: str, out: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(5, 3.8), layout="constrained")
    labels = {"title": f"Decoding behind {BATCH_LENGTH} tokens", "xlabel": "sequences at a time"}
    draw(axes, rows, "decode", BATCH_LENGTH, **labels, ylabel="tokens/s of all")
    axes.legend(loc="upper left")
    save_titled(figure, title, out)


def save_titled(figure: Figure, title: str, out: Path) -> None:
    figure.suptitle(title, fontsize="small")
    save(figure, out)


def check_figures(out: Path, *names: str) -> None:
    """Before the work is done: that there can be these figures."""
    pyplot()
    make_folder(out)
    for name in names:
        output_path(out / name, "--out")


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--synthetic", default="1.8b", metavar="SIZE")
    made.add_argument("--layers", type=int, metavar="N", help="so many of its layers")
    made.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    made.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    made.add_argument("--out", type=Path, default=OUT)
    return made


def command(args: argparse.Namespace) -> int:
    check_figures(args.out, "cost_by_length.png", "cost_by_batch.png")
    if min([1, *args.lengths, *args.batches]) < 1:
        raise InputError("--lengths and --batches must be at least 1")
    with synthetic(args.synthetic, args.layers) as folder:
        models = subjects(folder)
        time_all(models, [16], 1, "warming up")
        by_length = {length: time_all(models, [length], 1, f"{length:,} tokens,") for length in args.lengths}
        by_batch = {
            batch: time_all(models, [BATCH_LENGTH], batch, f"batch of {batch},") for batch in args.batches
        }
    layers = models[0].model.config.num_hidden_layers
    here = machine("cpu")
    what = f"{args.synthetic} widths, {layers} layers, bfloat16; {here['cores']}-core {here['processor']}"
    print(f"{what}, torch {here['torch']}")
    if by_length:
        table("prefill of, tokens/s", by_length, "prefill")
        table("decode at, tokens/s", by_length, "decode")
        draw_lengths(by_length, what, args.out / "cost_by_length.png")
    if by_batch:
        table(f"decode at {BATCH_LENGTH}, batch of, tokens/s of all", by_batch, "decode", BATCH_LENGTH)
        draw_batches(by_batch, what, args.out / "cost_by_batch.png")
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
