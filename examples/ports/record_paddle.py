"""Records PaddleNLP's own first-generation Qwen.

It has dynamic NTK and LogN. On a CPU it computes in float32 alone: paddle has no `where` in bfloat16 there.

    pip install paddlepaddle paddlenlp 'aistudio-sdk<0.3'
    pip install 'numpy>=2'  # one of its packages asks for less and does not need it
    python examples/ports/record_paddle.py --model DIR --ids FILE --out BUNDLE
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref.config import InputError
from qwen_ref.parity.stages import Checkpoint


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    import paddle
    from paddlenlp.transformers import QWenConfig
    from paddlenlp.transformers.qwen.modeling import QWenForCausalLM

    checkpoint = Checkpoint(args.model)
    paddle.set_default_dtype(args.dtype)
    model = QWenForCausalLM(QWenConfig(**asdict(checkpoint.config)))
    model.eval()
    weights = {}
    for stored in checkpoint.stored.values():
        tensor = stored.read().float()
        name = stored.published.replace("transformer.", "qwen.")
        # Its layers multiply x by W, of shape (in, out). The embedding has the published shape.
        turned = tensor.T if tensor.ndim == 2 and "wte" not in name else tensor
        weights[name] = paddle.to_tensor(turned.contiguous().numpy()).astype(args.dtype)
    missing, unexpected = model.set_state_dict(weights)
    if missing or unexpected:
        raise InputError(f"PaddleNLP takes other tensors: {', '.join([*missing, *unexpected][:4])}")
    with paddle.no_grad():
        given = model(input_ids=paddle.to_tensor(ids.numpy()))
    logits = given[0] if isinstance(given, tuple) else given
    exact = torch.from_numpy(logits.astype("float32").numpy())
    return exact.to(getattr(torch, str(logits.dtype).removeprefix("paddle.")))


if __name__ == "__main__":
    main(parser(__doc__, ["float32"]), ["paddlenlp", "paddlepaddle"], record)
