"""Measures GPTQ against round-to-nearest, on the tiny checkpoint.

    python examples/measure/gptq_accuracy.py

Both are written and loaded as checkpoints, and compute in bfloat16: dequantised, and in their own bits.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from fast_accuracy import HEADER, Judge

from qwen_ref import Tokenizer, load_model
from qwen_ref.commands.files import bundled_checkpoint
from qwen_ref.fast.layers import fasten

sys.path.append(str(Path(__file__).resolve().parents[1] / "make"))
from examine_tiny import examine, examples_by_form
from quantize_gptq import command, parser
from tiny_corpus import Encoder

WEIGHTS = bundled_checkpoint()
SETTINGS = {
    "int4, groups of 32": ["--bits", "4", "--group-size", "32"],
    "int4, groups of 128": ["--bits", "4", "--group-size", "128"],
    "int4, groups of 128, act-order": ["--bits", "4", "--group-size", "128", "--act-order"],
    "int8, groups of 128": ["--bits", "8", "--group-size", "128"],
}
METHODS = {"to nearest": ["--round-to-nearest"], "GPTQ": []}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    judge = Judge("tiny", WEIGHTS)
    encoder = Encoder(Tokenizer.from_file(WEIGHTS / "qwen.tiktoken"))
    questions = [e for form in examples_by_form(encoder, seed=1).values() for e in form]
    for line, more in zip(HEADER.splitlines(), (" right answers |", "---|"), strict=True):
        print(line + more)
    print(f"{judge.truth_row()} |")
    with tempfile.TemporaryDirectory() as folder:
        for setting, options in SETTINGS.items():
            for method, more in METHODS.items():
                if "--act-order" in options and more:
                    continue  # rounding to the nearest knows no order
                output = Path(folder) / f"{setting}, {method}"
                with contextlib.redirect_stdout(sys.stderr):
                    command(parser().parse_args([str(WEIGHTS), str(output), *options, *more]))
                for how, model in (
                    ("dequantised", load_model(output, "bfloat16")),
                    ("in its bits", fasten(load_model(output, "bfloat16", packed=True))),
                ):
                    right, _ = examine(model, questions)
                    row = judge.row(f"{setting}, {method}, {how}", model)
                    print(f"{row} {right} of {len(questions)} |", flush=True)


if __name__ == "__main__":
    main()
