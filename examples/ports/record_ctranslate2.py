"""Records CTranslate2, an engine in C++.

Its converters know Qwen2. A checkpoint's weights are laid out here as Qwen2's would be.

    pip install ctranslate2
    python examples/ports/record_ctranslate2.py --model DIR --ids FILE --out BUNDLE --form int8
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy
import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref import Qwen, load_model


def specification(model: Qwen) -> Any:
    """What CTranslate2's converters make of a checkpoint: here of a model of ours."""
    from ctranslate2.specs import TransformerDecoderModelSpec
    from ctranslate2.specs.common_spec import Activation

    config = model.config
    spec = TransformerDecoderModelSpec.from_config(
        config.num_hidden_layers,
        config.num_attention_heads,
        activation=Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,  # all of a head
        rotary_interleave=False,
        rotary_base=config.rotary_emb_base,
        num_heads_kv=config.num_attention_heads,
    )
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.register_vocabulary([str(number) for number in range(config.vocab_size)])
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = model.embed.weight
    decoder.layer_norm.gamma = model.norm.weight
    decoder.projection.weight = model.lm_head.weight
    for theirs, ours in zip(decoder.layer, model.blocks, strict=True):
        attention, mlp = theirs.self_attention, theirs.ffn
        attention.layer_norm.gamma = ours.attn_norm.weight
        attention.linear[0].weight, attention.linear[0].bias = ours.attn.qkv.weight, ours.attn.qkv.bias
        attention.linear[1].weight = ours.attn.out.weight
        mlp.layer_norm.gamma = ours.mlp_norm.weight
        mlp.linear_0.weight = ours.mlp.gate.weight
        mlp.linear_0_noact.weight = ours.mlp.up.weight
        mlp.linear_1.weight = ours.mlp.down.weight
    return spec


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        spec = specification(load_model(args.model, "float32"))
        spec.validate()
        spec.optimize(quantization=args.form)
        spec.save(folder)
        engine = ctranslate2.Generator(folder, compute_type=args.form, intra_threads=1)
        logits = engine.forward_batch(ids.tolist())
        return torch.from_numpy(numpy.array(logits))


if __name__ == "__main__":
    made = parser(__doc__, ["float32"])
    made.add_argument("--form", choices=["float32", "int8"], default="float32", help="of its matrices")
    main(made, ["ctranslate2"], record)
