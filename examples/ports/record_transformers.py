"""Records Hugging Face transformers' Qwen2.

It is first-generation Qwen up to the trained length: it has neither dynamic NTK nor LogN.

    pip install 'qwen_ref[transformers]'
    python examples/ports/record_transformers.py --model DIR --ids FILE --out BUNDLE --dtype bfloat16
"""

from __future__ import annotations

import argparse

from recorder import main, parser
from torch import Tensor

from qwen_ref import load_model
from qwen_ref.bench.peers import qwen2


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    return qwen2(load_model(args.model, args.dtype))(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    main(parser(__doc__, ["float32", "bfloat16", "float16"]), ["transformers", "torch"], record)
