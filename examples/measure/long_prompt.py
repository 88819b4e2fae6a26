"""Measures a prompt of 32,768 tokens: how much memory it takes, and the time a token by its position.

    python examples/measure/long_prompt.py [--synthetic 72b] [--layers 2] [--length 32768]

The weights are noise in the shape of a published model, in bfloat16. The prompt goes through the model in
chunks, as every long prompt does. The figure takes matplotlib (the extra "plot").
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench.measure import Memory, machine
from qwen_ref.bench.synthetic import synthetic
from qwen_ref.commands.cli import Parser, Progress, run
from qwen_ref.commands.figures import pyplot, save
from qwen_ref.commands.files import make_folder, output_path
from qwen_ref.commands.sizes import cache_bytes, resident_bytes
from qwen_ref.config import InputError
from qwen_ref.generate import CHUNK, prefill

OUT = Path(__file__).resolve().parents[1] / "figures"


def chunk_bytes(config: QwenConfig, length: int, dtype: torch.dtype) -> int:
    """What the layers hold at once for one chunk, at the most: in the MLP, the residual stream and its norm,
    and up, gate and silu(gate); or, in attention, the mask over all positions, as bits and as numbers.
    """
    activations = CHUNK * (2 * config.hidden_size + 3 * config.mlp_width) * dtype.itemsize
    return activations + CHUNK * length * (1 + dtype.itemsize)


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--synthetic", default="72b", metavar="SIZE")
    made.add_argument("--layers", type=int, default=2, metavar="N", help="so many of its layers")
    made.add_argument("--length", type=int, default=32768, metavar="TOKENS")
    made.add_argument("--out", type=Path, default=OUT)
    return made


def command(args: argparse.Namespace) -> int:
    pyplot()  # better refused now than in the end
    make_folder(args.out)
    out = output_path(args.out / "long_prompt.png", "--out")
    if args.length < 1:
        raise InputError(f"--length {args.length} must be at least 1")
    ends, seconds = [], []
    with synthetic(args.synthetic, args.layers) as folder, Memory() as memory, torch.inference_mode():
        model = load_model(folder, "bfloat16")
        ids = torch.randint(0, 151643, (1, args.length), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache(1, args.length)
        with Progress("prompt", unit="tokens") as progress:
            start = time.perf_counter()

            def done(tokens: int, total: int) -> None:
                ends.append(tokens)
                seconds.append(time.perf_counter() - start)
                progress.update(tokens, total)

            model.lm_head(prefill(model, ids, cache, progress=done))  # (1, V): the next token's
    config, dtype = model.config, torch.bfloat16
    weights, cached = resident_bytes(model), cache_bytes(config, args.length, dtype)
    chunk = chunk_bytes(config, args.length, dtype)
    expected = weights + cached + chunk
    peak = None if memory.anonymous is None else memory.anonymous + memory.mapped
    here = machine("cpu")
    what = (
        f"{args.synthetic} widths, {args.layers} layers, bfloat16, chunks of {CHUNK:,}; "
        f"{here['cores']}-core {here['processor']}, torch {here['torch']}"
    )
    print(what)
    print("\n| | GB |\n|---|---|")
    rows = {
        "weights": weights,
        f"keys and values of {args.length:,} positions": cached,
        "one chunk, by its formula": chunk,
        "sum": expected,
        "peak, seen": peak,
        "of it pages of the mapped file": memory.mapped,
        "of it anonymous": memory.anonymous,
    }
    known = {name: "unknown" if count is None else f"{count / 1e9:.2f}" for name, count in rows.items()}
    print("\n".join(f"| {name} | {count} |" for name, count in known.items()))
    ratio = "unknown" if peak is None else f"{peak / expected:.3f}"
    print(f"\npeak / sum = {ratio}; all of it took {seconds[-1]:,.0f} s")
    each = [
        1e3 * (after - before) / (end - begin)
        for (begin, end), (before, after) in zip(
            itertools.pairwise([0, *ends]), itertools.pairwise([0.0, *seconds]), strict=True
        )
    ]
    print("\n| tokens up to | ms a token |\n|---|---|")
    marks = [n for n in range(len(ends)) if (n + 1) & n == 0 or n == len(ends) - 1]  # doubling
    print("\n".join(f"| {ends[n]:,} | {each[n]:.1f} |" for n in marks))
    figure, axes = pyplot().subplots(figsize=(7, 3.8), layout="constrained")
    axes.plot(ends, each, "o-", color="#0072b2", markersize=3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    axes.set(title="Prefill", xlabel="position", ylabel="ms a token")
    axes.grid(alpha=0.3)
    figure.suptitle(what, fontsize="small")
    save(figure, out)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
