"""Trains the tiny checkpoint of the needle test from nothing, on a CPU, and writes it in the published form.

    python examples/make/train_needle.py            # about 3 minutes on one core

The model learns to look up which last name followed a first name (induction heads, Olsson et al. 2022). The
first rows are only pairs of names, where every second mention is a question. Then come the texts of
needle_corpus.py, in growing lengths up to the trained length. Only answers count in the loss. As in the
smaller published models, the base is 10,000, and dynamic NTK and LogN act beyond the trained length. The
model was not trained there.

The same command gives the same bytes on the same machine: every random choice is seeded, and the number of
threads is fixed.
"""

import argparse
import functools
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import train_tokenizer
from needle_corpus import Fact, draw_facts, haystack, vocabulary_text
from torch import Tensor
from train_tiny import (
    THREADS,
    check_folder,
    check_training,
    initialise,
    new_model,
    published_config,
    train,
    write_folder,
)

from qwen_ref.commands.cli import Parser, run, say
from qwen_ref.model import Qwen
from qwen_ref.tokenizer import Tokenizer

TRAINED_LENGTH = 128
ROW_LENGTHS = [32, 64, 128]
QUESTIONS_SHARE = 0.45  # of a row's tokens: the more questions, the more a row teaches
TOKENS_PER_STEP = 2048
TOKENS_PER_STEP_OF_PAIRS = 1024
PEAK_LEARNING_RATE = 2e-3  # at twice this, pairs are not learned before the rate falls
WEIGHTS_STD = 0.05

Row = tuple[list[int], list[int]]  # ids, and where the answers stand in them


class Rows:
    """The text of the training: rows of ids in which some tokens are answers."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.encode = functools.cache(tokenizer.encode)
        self.rng = random.Random(seed)

    def pairs(self, length: int) -> Row:
        """A few pairs of names, again and again in random order: the second half asks for the last names."""
        facts = draw_facts(self.rng)[: self.rng.randint(3, length // 4)]
        told: list[Fact] = []
        while 2 * len(told) < length:
            told += self.rng.sample(facts, len(facts))
        ids: list[int] = []
        for fact in told[: length // 2]:
            ids += self.encode(f" {fact.name}") + self.encode(f" {fact.surname}")
        return ids, list(range(length // 2 + 1, length, 2))  # in the first half all facts were told

    def questions(self, length: int) -> Row:
        """A haystack, then questions about facts in it, each with its answer."""
        asked = int(QUESTIONS_SHARE * length / 5)  # "Who? Ada Baker.": five tokens
        room = length - 5 * asked
        told: list[Fact] = []
        while not told:
            ids, told = haystack(self.rng, self.encode, room, share=self.rng.uniform(0.3, 1.0))
        ids = ids[:room]
        facts = [*told] * math.ceil(asked / len(told))
        answers = []
        for fact in self.rng.sample(facts, asked):
            ids += self.encode(fact.question)
            answers.append(len(ids))
            ids += self.encode(fact.answer) + self.encode(".")
        return ids, answers

    def batch(self, done: float) -> tuple[Tensor, Tensor]:
        """Rows (B, T) and where their answers stand (B, answers), when so much of the training is done."""
        if done < 0.3:
            length = ROW_LENGTHS[0]
            rows = [self.pairs(length) for _ in range(TOKENS_PER_STEP_OF_PAIRS // length)]
        else:
            lengths = ROW_LENGTHS[:1] if done < 0.35 else ROW_LENGTHS[:2] if done < 0.45 else ROW_LENGTHS
            length = self.rng.choice([*lengths, lengths[-1]])  # the longest is the hardest
            rows = [self.questions(length) for _ in range(TOKENS_PER_STEP // length)]
        ids, answers = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(answers)


def answer_loss(model: Qwen, rows: Rows, steps: int) -> Iterator[tuple[Tensor, int]]:
    """Losses of the answers alone, and how many tokens went through the model for each."""
    for step in range(steps):
        ids, answers = rows.batch(step / steps)
        row = torch.arange(len(ids))[:, None]
        states = model.hidden_states(ids)[row, answers - 1]  # (B, answers, D)
        logits = model.lm_head(states)
        yield F.cross_entropy(logits.flatten(0, 1), ids[row, answers].flatten()), ids.numel()


def needle_config(vocab_size: int) -> dict[str, object]:
    """config.json, with the constants of the smaller published models."""
    return published_config(vocab_size) | {
        "hidden_size": 64,
        "intermediate_size": 256,
        "max_position_embeddings": 8 * TRAINED_LENGTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "seq_length": TRAINED_LENGTH,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=3000, help="training steps (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="for weights and text (%(default)s)")
    made.add_argument("--output", type=Path, default=Path("examples/measure/needle"), help="(%(default)s)")
    return made


def command(arguments: argparse.Namespace) -> int:
    check_training(arguments.steps, arguments.seed)
    check_folder(arguments.output)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    vocabulary = arguments.output / "qwen.tiktoken"
    # More than there are merges: it stops where every word is a token.
    train_tokenizer.save(train_tokenizer.train(vocabulary_text(), vocabulary_size=2**16), vocabulary)
    tokenizer = Tokenizer.from_file(vocabulary)
    config = needle_config(vocab_size=math.ceil(tokenizer.n_vocab / 64) * 64)
    model = new_model(config)
    initialise(model, arguments.seed, WEIGHTS_STD)
    with torch.no_grad():  # a copied token's own row is then the likeliest from the start
        model.lm_head.weight.copy_(model.embed.weight)
    say(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    rows = Rows(tokenizer, arguments.seed)
    train(model, answer_loss(model, rows, arguments.steps), arguments.steps, PEAK_LEARNING_RATE)
    end = tokenizer.special_ids["<|endoftext|>"]
    write_folder(arguments.output, config, end, vocabulary.read_bytes(), model)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
