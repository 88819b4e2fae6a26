"""Records FastLLM, an engine in C++ with a first-generation Qwen of its own, on the CPU.

It takes heads of 128 numbers for granted. Its Python layer gives the logits behind a prompt alone, so each
position is a prompt of its own. It wants CUDA's libraries at installation and does without them here.

    pip install --no-deps ftllm
    python examples/ports/record_fastllm.py --model DIR --ids FILE --out BUNDLE --dtype float16
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref import QwenConfig
from qwen_ref.config import InputError


@contextmanager
def quiet():
    """It reports on stdout, where the versions go."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def with_a_tokenizer(model: Path, folder: Path, vocabulary: int) -> None:
    """The checkpoint's files and a vocabulary of nonsense: it opens no folder without one."""
    for file in model.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    tokens = {f"t{number}": number for number in range(vocabulary)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": tokens, "merges": []},
    }
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in (("tokenizer", tokenizer), ("tokenizer_config", kind), ("generation_config", {})):
        if not (folder / f"{name}.json").exists():
            (folder / f"{name}.json").write_text(json.dumps(content))


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    config = QwenConfig.from_json(args.model / "config.json")
    if config.kv_channels != 128:
        raise InputError(
            f"FastLLM needs heads of 128 numbers, those of {args.model} have {config.kv_channels}"
        )
    logits = torch.empty(*ids.shape, config.vocab_size)
    with tempfile.TemporaryDirectory() as folder, quiet():
        from ftllm import llm

        with_a_tokenizer(args.model, Path(folder), config.vocab_size)
        llm.set_cpu_threads(1)
        library, model = llm.fastllm_lib, llm.model(folder, dtype=args.dtype)
        nothing = (ctypes.c_int * 0)()
        for row, tokens in enumerate(ids.tolist()):
            for end in range(1, len(tokens) + 1):
                prompt = ctypes.cast((ctypes.c_int * end)(*tokens[:end]), ctypes.c_void_p)
                # One token at most, greedy, with its logits.
                handle = library.launch_response_llm_model(
                    model.model, end, prompt, 1, 0, False, 1.0, 1, 1.0, 1.0, True, 0, nothing
                )
                found = (ctypes.c_float * config.vocab_size)()
                library.fetch_response_logits_llm_model(model.model, handle, found)
                library.fetch_response_llm_model(model.model, handle)  # its end: else it waits at some prompt
                logits[row, end - 1] = torch.tensor(list(found))
    return logits


if __name__ == "__main__":
    main(parser(__doc__, ["float32", "float16"]), ["ftllm"], record)
