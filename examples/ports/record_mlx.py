"""Records mlx-lm's own first-generation Qwen.

It reads the published folder itself.

    pip install mlx-lm 'mlx[cpu]'
    python examples/ports/record_mlx.py --model DIR --ids FILE --out BUNDLE --dtype bfloat16
"""

from __future__ import annotations

import argparse

import numpy
import torch
from recorder import main, parser
from torch import Tensor


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(args.model)  # without its tokenizer, which would need code of the folder
    model.set_dtype(getattr(mx, args.dtype))
    logits = model(mx.array(ids.tolist()))
    # NumPy has no bfloat16. float32 holds each of its numbers.
    exact = torch.from_numpy(numpy.array(logits.astype(mx.float32)))
    return exact.to(getattr(torch, str(logits.dtype).removeprefix("mlx.core.")))


if __name__ == "__main__":
    main(parser(__doc__, ["float32", "bfloat16", "float16"]), ["mlx-lm", "mlx"], record)
