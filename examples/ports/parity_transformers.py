"""Checks Hugging Face transformers' Qwen2 with the parity kit, as a port that was not written here.

Up to the trained length, first-generation Qwen is Qwen2 with as many key heads as query heads. Beyond that
length they differ, because Qwen2 has neither dynamic NTK nor LogN. The script puts a checkpoint's weights
into a Qwen2 model and records every stage with forward hooks. The kit must find nothing wrong, in float32 and
in bfloat16. Then the script changes rope_theta and gives only the logits to the kit, which must name the
change.

    pip install 'qwen_ref[transformers]'
    python examples/ports/parity_transformers.py [--model DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qwen_ref import QwenConfig, Tokenizer, load_model, parity
from qwen_ref.bench.peers import qwen2
from qwen_ref.commands.cli import Parser, run, utf8
from qwen_ref.commands.files import checkpoint_folder
from qwen_ref.commands.settings import add_model_option
from qwen_ref.loading.hub import TEXT, WEIGHTS
from qwen_ref.parity.__main__ import main as parity_command

PROMPT = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"

MODULES = {  # what a Qwen2 module gives → the stage, N a layer
    "model.embed_tokens": "embed",
    "model.layers.N.input_layernorm": "blocks.N.attn_norm",
    "model.layers.N.self_attn.q_proj": "blocks.N.attn.q",
    "model.layers.N.self_attn.k_proj": "blocks.N.attn.k",
    "model.layers.N.self_attn.v_proj": "blocks.N.attn.v",
    "model.layers.N.self_attn.o_proj": "blocks.N.attn.out",
    "model.layers.N.post_attention_layernorm": "blocks.N.mlp_norm",
    "model.layers.N.mlp.gate_proj": "blocks.N.mlp.gate",
    "model.layers.N.mlp.up_proj": "blocks.N.mlp.up",
    "model.layers.N.mlp.down_proj": "blocks.N.mlp.down",
    "model.layers.N": "blocks.N.residual",
    "model.norm": "norm",
    "lm_head": "logits",
}
INPUTS = {  # what a module reads → the stage
    "model.layers.N.self_attn.o_proj": "blocks.N.attn.mixed",
    "model.layers.N.post_attention_layernorm": "blocks.N.attn_residual",
    "model.layers.N.mlp.down_proj": "blocks.N.mlp.product",
}


def record(model: torch.nn.Module, ids: Tensor, layers: int) -> dict[str, Tensor]:
    """Every stage that Qwen2 has, by the kit's names."""
    from transformers.models.qwen2 import modeling_qwen2

    stages: dict[str, Tensor] = {}

    def keep(stage: str, value: Tensor | tuple) -> None:
        stages[stage] = value[0] if isinstance(value, tuple) else value

    hooks = []
    modules = dict(model.named_modules())
    for layer in range(layers):
        for name, stage in MODULES.items():
            module, stage = modules[name.replace("N", str(layer))], stage.replace("N", str(layer))
            if stage not in stages:
                hooks.append(
                    module.register_forward_hook(lambda m, i, output, stage=stage: keep(stage, output))
                )
        for name, stage in INPUTS.items():
            module, stage = modules[name.replace("N", str(layer))], stage.replace("N", str(layer))
            hooks.append(module.register_forward_pre_hook(lambda m, inputs, stage=stage: keep(stage, inputs)))
    rotate, rotated = modeling_qwen2.apply_rotary_pos_emb, []

    def keep_rotated(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        rotated.append(rotate(*args, **options))  # q and k of a layer, (B, H, T, K) each
        return rotated[-1]

    modeling_qwen2.apply_rotary_pos_emb = keep_rotated
    try:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
    finally:
        modeling_qwen2.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()
    for layer, (q, k) in enumerate(rotated):
        stages[f"blocks.{layer}.attn.q_rotated"] = q.transpose(1, 2)
        stages[f"blocks.{layer}.attn.k_rotated"] = k.transpose(1, 2)
    return stages


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    add_model_option(made)
    made.add_argument("--prompt", type=utf8, default=PROMPT)
    made.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids instead of a prompt")
    return made


def command(args: argparse.Namespace) -> int:
    args.model = checkpoint_folder(args, WEIGHTS if args.ids else TEXT)
    config = QwenConfig.from_json(args.model / "config.json")
    ids = torch.tensor([args.ids or Tokenizer.from_file(args.model / "qwen.tiktoken").encode(args.prompt)])
    other = 1e4 if config.rotary_emb_base != 1e4 else 1e6
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype, theta in (("float32", None), ("bfloat16", None), ("float32", other), ("bfloat16", other)):
            stages = record(qwen2(load_model(args.model, dtype), theta), ids, config.num_hidden_layers)
            if theta is not None:
                stages = {"logits": stages["logits"]}
            bundle = Path(folder) / "qwen2.safetensors"
            parity.write_bundle(bundle, ids, stages, dtype=dtype)
            what = f"rope_theta {theta:g}, logits alone" if theta else f"{len(stages)} stages"
            print(f"\n== transformers' Qwen2 in {dtype}, {what}", flush=True)
            codes.append(parity_command(["diagnose", "--model", str(args.model), "--bundle", str(bundle)]))
    return 0 if codes == [0, 0, 1, 1] else 1


if __name__ == "__main__":
    sys.exit(run(parser(), command))
