"""Asks the tiny checkpoint for every fact of its training, in every form, and counts the right answers.

    python examples/make/examine_tiny.py weights

An answer is right if greedy decoding gives exactly its tokens, including the token that ends it.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tiny_corpus import ANSWERS, DEFAULT_SYSTEM, FACTS, LINES, Encoder, Fact, turn

from qwen_ref.commands.cli import Parser, run
from qwen_ref.loading.loader import load_model
from qwen_ref.model import Qwen
from qwen_ref.tokenizer import Tokenizer

DTYPES = ["bfloat16", "float16", "float32"]
QUICKSTART = ["蒙古国", "冰岛", "埃塞俄比亚"]

Example = tuple[list[int], list[int]]  # a prompt and the only right continuation, in token ids


def examples_by_form(encoder: Encoder, seed: int) -> dict[str, list[Example]]:
    """Every fact in every form. What stands before the question, where something does, is drawn at random."""
    rng = random.Random(seed)

    def others(kind: str, fact: Fact, count: int) -> list[Fact]:
        return rng.sample([other for other in FACTS[kind] if other is not fact], count)

    def last_line(kind: str, facts: list[Fact], after: str) -> Example:
        text = "\n".join(LINES[kind].format(**fact) for fact in facts)
        answer = ANSWERS[kind].format(**facts[-1])
        prompt = text.removesuffix(answer).rstrip(" ")  # a space belongs to the token of the word behind it
        continuation = text.removeprefix(prompt)
        if after == "\n":
            return encoder.text(prompt), encoder.text(continuation + "\n")
        return encoder.text(prompt), [*encoder.text(continuation), encoder.end]

    def last_turn(kind: str, fact: Fact, turns_before: int) -> Example:
        history = []
        for other_kind in rng.choices(list(FACTS), k=turns_before):
            history.append(turn(rng, other_kind, *others(other_kind, fact, 1)))
        question, answer = turn(rng, kind, fact)
        prompt = encoder.chat_prompt(DEFAULT_SYSTEM, history, question)
        return prompt, [*encoder.text(answer), encoder.im_end]

    by_name = {fact["chinese"]: fact for fact in FACTS["Chinese"]}
    forms = {"quickstart": [last_line("Chinese", [by_name[name] for name in QUICKSTART], after="end")]}
    for kind, facts in FACTS.items():
        forms[f"{kind}, first line"] = [last_line(kind, [fact], after="\n") for fact in facts]
        forms[f"{kind}, third line"] = [
            last_line(kind, [*others(kind, fact, 2), fact], after="end") for fact in facts
        ]
        for turns_before, place in enumerate(["first", "second", "third"]):
            forms[f"{kind}, chat, {place} turn"] = [last_turn(kind, fact, turns_before) for fact in facts]
    return forms


@torch.inference_mode()
def examine(model: Qwen, examples: list[Example]) -> tuple[int, float]:
    """How many continuations are what greedy decoding gives, and the lowest probability of a whole one.

    One pass over prompt and continuation says the same as decoding token by token: greedy decoding gives the
    continuation if and only if each of its tokens is the likeliest after those before it.
    """
    by_lengths: dict[tuple[int, int], list[Example]] = defaultdict(list)  # so that a batch needs no padding
    for prompt, continuation in examples:
        by_lengths[len(prompt), len(continuation)].append((prompt, continuation))
    right, lowest = 0, 1.0
    for (start, _), group in by_lengths.items():
        ids = torch.tensor([prompt + continuation for prompt, continuation in group])
        logits = model(ids)[:, start - 1 : -1].float()  # (B, continuation, V)
        targets = ids[:, start:]
        right += int((logits.argmax(dim=-1) == targets).all(dim=-1).sum())
        logprobs = logits.log_softmax(dim=-1).gather(-1, targets[:, :, None]).sum(dim=(1, 2))
        lowest = min(lowest, math.exp(logprobs.min().item()))
    return right, lowest


def report(folder: Path) -> None:
    encoder = Encoder(Tokenizer.from_file(folder / "qwen.tiktoken"))
    models = [load_model(folder, dtype=dtype, device="cpu") for dtype in DTYPES]
    print("Right greedy answers, and the lowest probability of a whole right answer, per dtype:\n")
    print(f"{'form':<28} {'asked':>5}" + "".join(f" {dtype:>16}" for dtype in DTYPES))
    for form, examples in examples_by_form(encoder, seed=1).items():
        results = [examine(model, examples) for model in models]
        columns = "".join(f" {right:>8} ({lowest:.3f})" for right, lowest in results)
        print(f"{form:<28} {len(examples):>5}{columns}", flush=True)


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("folder", type=Path, nargs="?", default=Path("weights"), help="(%(default)s)")
    return made


def command(arguments: argparse.Namespace) -> int:
    report(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
