"""Measures the speed of the hand-written tokenizer beside tiktoken, on one thread.

    python examples/measure/bench_tokenizer.py [FILE ...]

"Cold" is a tokenizer that has seen no text before; "warm" has seen this text. Without files the text is
Python's own source, and Chinese drawn from the vocabulary, common tokens more often. The Chinese clauses
hardly recur, which is the hardest case for a tokenizer that remembers pieces. Each figure is the best of five
runs, in which the two tokenizers take turns.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from qwen_ref import Tokenizer
from qwen_ref.commands.cli import Parser, on_stdout, run
from qwen_ref.commands.files import decoded
from qwen_ref.config import read_bytes

VOCABULARY = Path(__file__).resolve().parents[2] / ".vocab" / "qwen.tiktoken"
RUNS = 5


def python_source(size: int) -> str:
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py")))
    return text[:size]


def chinese(tokenizer: Tokenizer, size: int) -> str:
    rng = random.Random(0)
    tokens = (tokenizer.decode([token]) for token in range(tokenizer.n_vocab))
    words = [token for token in tokens if all("一" <= character <= "鿿" for character in token)]
    weights = [1 / (rank + 20) for rank in range(len(words))]
    text, length = [], 0
    while length < size:
        clause = "".join(rng.choices(words, weights, k=rng.randint(2, 6))) + rng.choice("，。、\n")
        text.append(clause)
        length += len(clause)
    return "".join(text)


def seconds(encode: Callable[[str], list[int]], text: str) -> float:
    start = time.perf_counter()
    encode(text)
    return time.perf_counter() - start


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("files", nargs="*", type=Path)
    return made


def command(args: argparse.Namespace) -> int:
    tokenizer = Tokenizer.from_file(VOCABULARY)
    theirs = Tokenizer.from_file(VOCABULARY, engine="tiktoken")
    source, clauses = python_source(3_000_000), chinese(tokenizer, 300_000)
    texts = {path.name: decoded(str(path), read_bytes(path)) for path in args.files} or {
        "Python source": source,
        "Chinese": clauses,
        "mixed, 1 byte in 10 Chinese": source + clauses[: len(source) // 27],
    }
    print("| text | MB | cold, MB/s | warm, MB/s | tiktoken, MB/s | cold / tiktoken |")
    print("|---|---|---|---|---|---|")
    for name, text in texts.items():
        cold, warm, reference = [], [], []
        for _ in range(RUNS):
            ours = Tokenizer.from_file(VOCABULARY)
            cold.append(seconds(ours.encode, text))
            warm.append(seconds(ours.encode, text))
            reference.append(seconds(theirs.encode, text))
        assert tokenizer.encode(text) == theirs.encode(text)
        size = len(text.encode()) / 1e6
        rates = [size / min(times) for times in (cold, warm, reference)]
        row = " | ".join(f"{r:.1f}" for r in rates)
        print(on_stdout(f"| {name} | {size:.1f} | {row} | {rates[0] / rates[2]:.2f} |"))
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
