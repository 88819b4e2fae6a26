"""Measures what faster layers and quantised weights change in the model's predictions.

    python examples/measure/fast_accuracy.py [FOLDER ...]

Each form computes in bfloat16 and is compared with float64 of the same weights: the KL divergence of the
next-token distributions, how often the first choice is the same, and the perplexity. A form has one product
for the many rows of a prompt and one for a few rows, so the text goes through it twice: as 8 prompts of 512
tokens (prefill), and as 8 sequences that grow by a token each (decode). The other columns are of the second.

The models are the tiny checkpoint and the golden models of the tests. The tiny checkpoint reads 4,096 tokens
of new lines and chats of the kind that it was trained on. A golden model has random weights; it reads tokens
that it samples itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
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
from qwen_ref.quantize.config import INT4_GROUP

sys.path.append(str(Path(__file__).resolve().parents[1] / "make"))
from tiny_corpus import Encoder, documents

TINY = bundled_checkpoint()
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def with_int8_cache(model: Qwen) -> Qwen:
    model.cache_type = Int8Cache
    return model


def as_fast(quantize: str | None, kernel: str, group_size: int = INT4_GROUP) -> Callable[[Qwen], Qwen]:
    return lambda model: fasten(model, quantize, group_size, kernel=kernel)


FORMS: dict[str, Callable[[Qwen], Qwen]] = {
    "plain": lambda model: model,
    "keys and values in int8": with_int8_cache,
    "fast, kernel bag": as_fast(None, "bag"),
    "fast, kernel linear": as_fast(None, "linear"),
    "int8, kernel bag": as_fast("int8", "bag"),
    "int8, kernel dynamic": as_fast("int8", "dynamic"),
    "int4 in groups of 32, kernel int4": as_fast("int4", "int4", 32),
    "int4 in groups of 64, kernel int4": as_fast("int4", "int4"),
    "int4 in groups of 64, kernel bag": as_fast("int4", "bag"),
    "int4 in groups of 64, kernel dynamic": as_fast("int4", "dynamic"),
    "int4 in groups of 128, kernel int4": as_fast("int4", "int4", 128),
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


HEADER = """| model | form | bytes of weights | KL of prefill | KL of decode | largest | agrees | perplexity |
|---|---|---|---|---|---|---|---|"""


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
        return f"| {self.title} | float64, the truth | | | | | | {self.perplexity(self.want):.4f} |"

    @torch.inference_mode()
    def row(self, name: str, model: Qwen) -> str:
        T = self.ids.shape[1]
        # A cache, because what is cached may be rounded, too.
        prefilled = self.kl(model(self.ids, cache=model.new_cache(len(self.ids), T)))
        cache = model.new_cache(len(self.ids), T, prompt_length=T)
        steps = [model(token, cache=cache) for token in self.ids.split(1, dim=1)]
        found = torch.cat(steps, dim=1).double().log_softmax(dim=-1)
        kl = self.kl(found)
        agree = (self.want.argmax(dim=-1) == found.argmax(dim=-1)).double().mean()
        return (
            f"| {self.title} | {name} | {resident_bytes(model):,} | {prefilled.mean():.1e} | {kl.mean():.1e} "
            f"| {kl.max():.1e} | {agree:.2%} | {self.perplexity(found):.4f} |"
        )

    def kl(self, logits: Tensor) -> Tensor:
        """The divergence at each position, (8, T)."""
        found = logits.double().log_softmax(dim=-1)
        return (self.want.exp() * (self.want - found)).sum(dim=-1)


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    return made


def command(args: argparse.Namespace) -> int:
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"with torch's kernels for {capability}", file=sys.stderr)
    print(HEADER)
    for folder in args.folders or [TINY, GOLDEN / "extended_base", GOLDEN / "ntk_logn"]:
        judge = Judge("tiny" if folder == TINY else folder.name, folder)
        print(judge.truth_row())
        for name, form in FORMS.items():
            try:
                model = form(load_model(folder, "bfloat16"))
            except InputError as error:  # groups that the widths do not allow, kernels that torch lacks
                print(f"{judge.title}, {name}: {error}", file=sys.stderr)
                continue
            print(judge.row(name, model), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
