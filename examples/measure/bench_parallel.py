"""Measures a model of 72B widths on 1, 2 and 4 ranks: bytes read, memory, seconds and bytes sent per rank.

    python examples/measure/bench_parallel.py [--layers 2] [--tokens 12] [--ranks 1 2 4]

The checkpoint has the 72B's widths and vocabulary and 2 of its 80 layers: 8.5 GB in bfloat16. It is written
to a temporary folder and removed afterwards. It has random bytes, repeated, because only its size matters.
torchrun starts this file again for each number of ranks, and rank 0 prints a row of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench.measure import Memory
from qwen_ref.bench.synthetic import write_checkpoint
from qwen_ref.checkpoint import tensor_table

PROMPT = 16


def sent_over_loopback() -> float:
    """Bytes that crossed the loopback device since the machine started, headers included; NaN where the
    system does not tell, as only Linux does.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "lo":
                return int(numbers.split()[8])
    return math.nan


def payload(config: QwenConfig, ranks: int) -> int:
    """Bytes that all ranks together must send for a token, headers aside.

    An all-reduce of n bytes costs each rank 2 (ranks - 1) / ranks · n, in a ring; two a layer of D float32,
    and one of D bfloat16 for the embedding. Each rank but rank 0 sends its share of V bfloat16 logits.
    """
    D, V = config.hidden_size, config.vocab_size
    reduced = 2 * config.num_hidden_layers * D * 4 + D * 2
    return 2 * (ranks - 1) * reduced + (ranks - 1) * V // ranks * 2


def measure(folder: Path, tokens: int) -> None:
    """What one rank does; rank 0 prints."""
    ranks = int(os.environ["WORLD_SIZE"])
    group = "world" if ranks > 1 else None
    read = 0

    def progress(_: int, total: int) -> None:
        nonlocal read
        read = total

    load_model(folder.parent / "small", "auto", group=group)  # imports, connections, pools
    with Memory() as memory:
        start = time.perf_counter()
        model = load_model(folder, "auto", group=group, progress=progress)
        seconds = time.perf_counter() - start
    table = tensor_table(model.config)
    parts = [spec.shape_of_rank(ranks) for spec in table if spec.cut == "columns" and ranks > 1]
    columns = sum(2 * math.prod(shape) for shape in parts)
    cache, ids = model.new_cache(1, PROMPT + tokens), torch.arange(PROMPT)[None]
    times, sent = [], []
    with torch.inference_mode():
        model.hidden_states(ids, cache=cache)
        for token in range(tokens):
            model.group.any(False)  # together
            before, start = sent_over_loopback(), time.perf_counter()
            states = model.hidden_states(torch.tensor([[token]]), cache=cache)
            model.lm_head(states[:, -1], only_rank_0=True)
            times.append(time.perf_counter() - start)
            sent.append(sent_over_loopback() - before)
    anonymous = math.nan if memory.anonymous is None else memory.anonymous / 1e6
    own = f"{read / 1e9:.2f} | {anonymous:,.0f} | {columns / 1e6:,.0f} | {seconds:.2f}"
    rows = model.group.texts(own)
    if model.group.rank == 0:
        worst = max(rows, key=lambda row: float(row.split("|")[1].replace(",", "")))
        row = (
            f"| {ranks} | {worst} | {median(times[2:]) * 1e3:,.0f} | {payload(model.config, ranks):,} "
            f"| {median(sent[2:]):,.0f} |"
        )
        print(row.replace("nan", "unknown"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        return measure(args.folder, args.tokens)
    parent = Path(tempfile.mkdtemp())
    try:
        config = dataclasses.replace(QwenConfig.preset("72b"), num_hidden_layers=args.layers)
        small = dataclasses.replace(
            config, hidden_size=512, num_attention_heads=4, intermediate_size=1024, vocab_size=512
        )
        for name, kind in (("small", small), ("large", config)):
            (parent / name).mkdir()
            write_checkpoint(parent / name, kind)
        print(
            "| ranks | GB read | MB anonymous | MB cut by columns | load, s | a token, ms "
            "| bytes sent, by the formula | seen |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for ranks in args.ranks:
            torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
            command = [__file__, "--tokens", str(args.tokens), "--folder", str(parent / "large")]
            subprocess.run([sys.executable, *torchrun, *command], check=True, stderr=subprocess.DEVNULL)
    finally:
        shutil.rmtree(parent)


if __name__ == "__main__":
    main()
