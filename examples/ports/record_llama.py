"""Records llama.cpp.

A checkpoint's weights are written to a GGUF for it. It has neither dynamic NTK nor LogN.

    pip install 'qwen_ref[llama]'
    python examples/ports/record_llama.py --model DIR --ids FILE --out BUNDLE --dtype bfloat16
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench.llama import FORMS, Gguf, LlamaModel, nearest_form, require_llama
from qwen_ref.config import InputError


def logits(file: Path, config: QwenConfig, rows: list[list[int]], cache: str, flash: bool) -> Tensor:
    """In the process of llama.cpp, where torch computes nothing: LlamaProcess says why."""
    with closing(LlamaModel(file, config, len(rows[0]), 1, cache, flash)) as model:
        return torch.stack([model.logits(row) for row in rows])


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    require_llama()
    form = args.form or nearest_form(getattr(torch, args.dtype), None)
    ours = load_model(args.model, FORMS[form] or "float32")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        Gguf(ours, form).write(file)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
            try:
                given = (file, ours.config, ids.tolist(), args.cache, not args.no_flash)
                return own.submit(logits, *given).result()
            except BrokenProcessPool:
                raise InputError("llama.cpp has crashed; see the README.md of bench/") from None


if __name__ == "__main__":
    made = parser(__doc__, ["float32", "bfloat16", "float16"])
    made.add_argument("--form", choices=FORMS, help="of the matrices; without it the one of --dtype")
    made.add_argument("--cache", choices=FORMS, default="f16", help="of keys and values; its default is f16")
    made.add_argument("--no-flash", action="store_true", help="no flash attention, which rounds them to f16")
    main(made, ["llama-cpp-python", "gguf"], record)
