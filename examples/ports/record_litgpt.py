"""Records LitGPT.

Its configuration of Qwen2.5 gets a checkpoint's sizes and weights.

    pip install litgpt
    python examples/ports/record_litgpt.py --model DIR --ids FILE --out BUNDLE --dtype bfloat16
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from recorder import main, parser
from torch import Tensor

from qwen_ref import Qwen, load_model


def weights(model: Qwen) -> dict[str, Tensor]:
    """LitGPT keeps q, k and v in one matrix, in that order, as Qwen does."""
    found = {
        "transformer.wte.weight": model.embed.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for number, block in enumerate(model.blocks):
        layer = f"transformer.h.{number}"
        found |= {
            f"{layer}.norm_1.weight": block.attn_norm.weight,
            f"{layer}.attn.qkv.weight": block.attn.qkv.weight,
            f"{layer}.attn.qkv.bias": block.attn.qkv.bias,
            f"{layer}.attn.proj.weight": block.attn.out.weight,
            f"{layer}.norm_2.weight": block.mlp_norm.weight,
            f"{layer}.mlp.fc_1.weight": block.mlp.gate.weight,
            f"{layer}.mlp.fc_2.weight": block.mlp.up.weight,
            f"{layer}.mlp.proj.weight": block.mlp.down.weight,
        }
    return found


def record(args: argparse.Namespace, ids: Tensor) -> Tensor:
    from litgpt import GPT, Config

    ours = load_model(args.model, args.dtype)
    config = replace(
        Config.from_name("Qwen2.5-7B"),
        block_size=max(ours.config.seq_length, ids.shape[1]),  # it refuses more positions than this
        n_layer=ours.config.num_hidden_layers,
        n_embd=ours.config.hidden_size,
        n_head=ours.config.num_attention_heads,
        n_query_groups=ours.config.num_attention_heads,
        head_size=ours.config.kv_channels,
        vocab_size=ours.config.vocab_size,
        padded_vocab_size=ours.config.vocab_size,
        intermediate_size=ours.config.mlp_width,
        norm_eps=ours.config.layer_norm_epsilon,
        rope_base=ours.config.rotary_emb_base,
    )
    theirs = GPT(config)
    theirs.load_state_dict(weights(ours))
    return theirs.to(getattr(torch, args.dtype))(ids)


if __name__ == "__main__":
    main(parser(__doc__, ["float32", "bfloat16", "float16"]), ["litgpt", "torch"], record)
