"""transformers' Qwen2 with the weights of a model of ours: a peer for the bench and for the parity kit.

First-generation Qwen is Qwen2 with as many key heads as query heads, up to the trained length. Beyond it
Qwen2 has neither dynamic NTK nor LogN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from qwen_ref.checkpoint import NoInitialisation
from qwen_ref.config import InputError
from qwen_ref.model import Block, Qwen


def require_transformers() -> None:
    """Raises ValueError where the extra is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is not installed; pip install 'qwen_ref[transformers]' installs it")


def qwen2(ours: Qwen, rope_theta: float | None = None) -> nn.Module:
    """transformers' Qwen2, sharing the weights of ours; rope_theta: another RoPE base than ours."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = ours.config
    theta = rope_theta or config.rotary_emb_base
    with NoInitialisation():  # the weights come below
        # Made in its dtype, as from_pretrained does: .to(dtype) would round the rotary frequencies, too.
        theirs = AutoModelForCausalLM.from_config(
            Qwen2Config(
                hidden_size=config.hidden_size,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_attention_heads,
                vocab_size=config.vocab_size,
                rms_norm_eps=config.layer_norm_epsilon,
                rope_parameters={"rope_type": "default", "rope_theta": theta},
                max_position_embeddings=config.seq_length,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            ),
            dtype=ours.embed.weight.dtype,
        )
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.lm_head.weight,
    }
    for number, block in enumerate(cast(Iterable[Block], ours.blocks)):
        layer = f"model.layers.{number}"
        weights |= {
            f"{layer}.input_layernorm.weight": block.attn_norm.weight,
            f"{layer}.self_attn.o_proj.weight": block.attn.out.weight,
            f"{layer}.post_attention_layernorm.weight": block.mlp_norm.weight,
            f"{layer}.mlp.gate_proj.weight": block.mlp.gate.weight,
            f"{layer}.mlp.up_proj.weight": block.mlp.up.weight,
            f"{layer}.mlp.down_proj.weight": block.mlp.down.weight,
        }
        thirds = zip("qkv", block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for part, weight, bias in thirds:
            weights[f"{layer}.self_attn.{part}_proj.weight"] = weight
            weights[f"{layer}.self_attn.{part}_proj.bias"] = bias
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval().requires_grad_(False)
