"""How prefill and decoding get slower with length, and what a batch buys: the README's figure.

    python examples/cost_curves.py [--synthetic 1.8b] [--out examples/figures/cost_curves.png]

Noise in the shape of a published model, bfloat16, in every form: plain, fast, int8, int4. Every length is
prefilled once and eight tokens are decoded behind it; then batches of prompts of 256 tokens. The numbers go
to stdout as Markdown tables, the curves into the figure, which takes matplotlib (the extra "plot").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from qwen_ref import load_model
from qwen_ref.bench import Subject, Timing, machine, measure, synthetic
from qwen_ref.cli import Progress
from qwen_ref.fast import fasten

FORMS = {"plain": "#777777", "fast": "#0072b2", "int8": "#009e73", "int4": "#d55e00"}
OUT = Path(__file__).resolve().parent / "figures" / "cost_curves.png"
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


def draw(axes: Axes, rows: dict[int, Timings], key: str, at: int | None = None) -> None:
    for name, colour in FORMS.items():
        values = [getattr(timings[name, at or number], key)[0] for number, timings in rows.items()]
        axes.plot(list(rows), values, "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), [f"{number:,}" for number in rows], rotation=45)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", default="1.8b", metavar="SIZE")
    parser.add_argument("--layers", type=int, metavar="N", help="so many of its layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    table("prefill of, tokens/s", by_length, "prefill")
    table("decode at, tokens/s", by_length, "decode")
    table(f"decode at {BATCH_LENGTH}, batch of, tokens/s of all rows", by_batch, "decode", BATCH_LENGTH)

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    draw(axes[0], by_length, "prefill")
    axes[0].set(title="Prefill", xlabel="tokens of the prompt", ylabel="tokens/s")
    draw(axes[1], by_length, "decode")
    axes[1].set(title="Decoding", xlabel="tokens in the cache", ylabel="tokens/s")
    draw(axes[2], by_batch, "decode", BATCH_LENGTH)
    axes[2].set(title=f"Decoding at {BATCH_LENGTH}", xlabel="sequences", ylabel="tokens/s of all")
    axes[2].legend()
    figure.suptitle(what)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(args.out)


if __name__ == "__main__":
    main()
