"""Records the published modeling code, which a published checkpoint's folder holds.

With --run-the-folders-code, Python code of the folder is executed with your rights: read it before. It needs
a transformers of its time, 4.32 to 4.37, in an environment of its own.

    pip install 'transformers>=4.32,<4.38' einops transformers_stream_generator
    python examples/ports/record_published.py --run-the-folders-code --model DIR --ids FILE --out BUNDLE
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref.config import InputError

FIRST, LAST = (4, 32), (4, 37)
FLAGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # the code casts itself to what these say


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    if not args.run_the_folders_code:
        raise InputError(
            f"{args.model}: its Python code would be executed; read it, then give --run-the-folders-code"
        )
    there = version("transformers")
    if not FIRST <= tuple(map(int, there.split(".")[:2])) <= LAST:
        raise InputError(f"the published code needs transformers 4.32 to 4.37, not {there}; install 4.37.2")
    if not list(args.model.glob("*.py")):
        raise InputError(f"{args.model} has no Python code; a published folder has modeling_qwen.py")
    from transformers import AutoModelForCausalLM

    flags = {flag: dtype == args.dtype for dtype, flag in FLAGS.items()}
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        trust_remote_code=True,
        local_files_only=True,
        torch_dtype=getattr(torch, args.dtype),
        use_flash_attn=False,
        **flags,
    ).eval()
    return model(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    made = parser(__doc__, list(FLAGS))
    made.add_argument(
        "--run-the-folders-code", action="store_true", help="execute the Python code that DIR holds"
    )
    main(made, ["transformers", "torch"], record)
