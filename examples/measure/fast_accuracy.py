"""Measures what faster layers and quantised weights change in the model's predictions.

    python examples/measure/fast_accuracy.py [FOLDER ...]

Each form computes in bfloat16 and is compared with float64 of the same weights: the KL divergence of the
next-token distributions, how often the first choice is the same, and the perplexity. The models are the tiny
checkpoint and the golden models of the tests. The tiny checkpoint reads 4,096 tokens of new lines and chats
of the kind that it was trained on. A golden model has random weights; it reads tokens that it samples itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

from qwen_ref import Qwen, Tokenizer, load_model
from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.files import bundled_checkpoint
from qwen_ref.commands.sizes import resident_bytes
from qwen_ref.config import InputError
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate

sys.path.append(str(Path(__file__).resolve().parents[1] / "make"))
from tiny_corpus import Encoder, documents

TINY = bundled_checkpoint()
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def with_int8_cache(model: Qwen) -> Qwen:
    model.cache_type = Int8Cache
    return model


FORMS = {
    "plain": lambda model: model,
    "keys and values in int8": with_int8_cache,
    "fast": fasten,
    "int8": lambda model: fasten(model, "int8"),
    "int4, groups of 32": lambda model: fasten(model, "int4", 32),
    "int4, groups of 64": lambda model: fasten(model, "int4", 64),
    "int4, groups of 128": lambda model: fasten(model, "int4", 128),
}
SEED = 2024  # of the documents: not the one of the training


def sequences(folder: Path, truth: Qwen) -> Tensor:
    """(8, 512) ids that a model of this folder has something to say about."""
    if (folder / "qwen.tiktoken").exists():
        encoder = Encoder(Tokenizer.from_file(folder / "qwen.tiktoken"))
        ids = itertools.chain.from_iterable(map(encoder.document, documents(SEED)))
        return torch.tensor(list(itertools.islice(ids, 8 * 512))).view(8, 512)
    length = min(512, truth.config.seq_length)
    rows = [
        [row, *(s.token for s in generate(truth, [row], length - 1, temperature=1.0, seed=row))]
        for row in range(8)
    ]
    return torch.tensor(rows)


HEADER = """| model | form | bytes of the weights | KL, nats | largest | first choice agrees | perplexity |
|---|---|---|---|---|---|---|"""


class Judge:
    """What a model's float64 truth says of a text; `row` holds other forms of the model against it."""

    @torch.inference_mode()
    def __init__(self, title: str, folder: Path) -> None:
        truth = load_model(folder, "float64")
        self.title, self.ids = title, sequences(folder, truth)
        self.want = truth(self.ids).log_softmax(dim=-1)

    def perplexity(self, logprobs: Tensor) -> float:
        return float((-logprobs[:, :-1].gather(2, self.ids[:, 1:, None])).mean().exp())

    def truth_row(self) -> str:
        return f"| {self.title} | float64, the truth | | | | | {self.perplexity(self.want):.4f} |"

    @torch.inference_mode()
    def row(self, name: str, model: Qwen) -> str:
        cache = model.new_cache(*self.ids.shape)  # what is cached may be rounded, too
        found = model(self.ids, cache=cache).double().log_softmax(dim=-1)
        kl = (self.want.exp() * (self.want - found)).sum(dim=-1)
        agree = (self.want.argmax(dim=-1) == found.argmax(dim=-1)).double().mean()
        return (
            f"| {self.title} | {name} | {resident_bytes(model):,} | {kl.mean():.1e} | {kl.max():.1e} "
            f"| {agree:.2%} | {self.perplexity(found):.4f} |"
        )


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    return made


def command(args: argparse.Namespace) -> int:
    print(HEADER)
    for folder in args.folders or [TINY, GOLDEN / "extended_base", GOLDEN / "ntk_logn"]:
        judge = Judge("tiny" if folder == TINY else folder.name, folder)
        print(judge.truth_row())
        for name, form in FORMS.items():
            try:
                model = form(load_model(folder, "bfloat16"))
            except InputError as error:  # groups that the widths do not allow
                print(f"{judge.title}, {name}: {error}", file=sys.stderr)
                continue
            print(judge.row(name, model), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
