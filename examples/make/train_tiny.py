"""Trains the tiny checkpoint in weights/ from nothing, on a CPU, and writes it in the published form.

    python examples/make/train_tokenizer.py       # first: the vocabulary
    python examples/make/train_tiny.py            # about 10 minutes on one core

The same command gives the same bytes on the same machine: every random choice is seeded, and the number of
threads is fixed. examine_tiny.py then asks the checkpoint for every fact.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from tiny_corpus import Encoder, documents
from torch import Tensor

from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.cli import Parser, run, say
from qwen_ref.commands.files import make_folder, output_path, write_whole
from qwen_ref.config import InputError, QwenConfig, read_bytes
from qwen_ref.model import Qwen
from qwen_ref.tokenizer import Tokenizer

TOKENS_PER_STEP = 2048
ROW_LENGTHS = [64, 128, 256, 512]  # drawn each step: documents stand first in a row and deep inside one
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
THREADS = 1  # two spin at their barriers for longer than they compute where other programs hold a core


def batches(encoder: Encoder, seed: int) -> Iterator[Tensor]:
    """Endless (rows, length + 1) of ids: documents one after another, each row from the start of one."""
    rng = random.Random(seed)
    stream = documents(seed)
    while True:
        length = rng.choice(ROW_LENGTHS)
        rows = []
        for _ in range(TOKENS_PER_STEP // length):
            row: list[int] = []
            while len(row) < length + 1:
                row += encoder.document(next(stream))
            rows.append(row[: length + 1])
        yield torch.tensor(rows)


# Training


def initialise(model: Qwen, seed: int, std: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)


def learning_rate(step: int, steps: int, peak: float = PEAK_LEARNING_RATE) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def language_model_loss(model: Qwen, encoder: Encoder, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Endless losses, of every token of a batch, and how many tokens each is of."""
    for batch in batches(encoder, seed):
        logits = model(batch[:, :-1])  # (B, T, V)
        yield F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), TOKENS_PER_STEP


def train(
    model: Qwen, losses: Iterator[tuple[Tensor, int]], steps: int, peak: float = PEAK_LEARNING_RATE
) -> None:
    """AdamW on so many losses, each computed from the model as it then is."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    started, done = time.monotonic(), 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss, tokens = next(losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += tokens
        if (step + 1) % 50 == 0 or step + 1 == steps:
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1) * (steps - step - 1)
            progress = f"step {step + 1}/{steps}  loss {loss.item():.4f}  {done / elapsed:,.0f} tokens/s"
            print(f"{progress}  {left:.0f} s left", file=sys.stderr, flush=True)


# Writing the folder in the published form


def published_config(vocab_size: int) -> dict[str, object]:
    """config.json, with the 72B's constants and everything else smaller."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "kv_channels": 32,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 512,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "onnx_safe": None,
        "rotary_emb_base": 1000000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 512,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": False,
        "use_flash_attn": "auto",
        "use_logn_attn": False,
        "vocab_size": vocab_size,
    }


def generation_config(end: int) -> dict[str, object]:
    return {
        "chat_format": "chatml",
        "do_sample": False,
        "eos_token_id": end,
        "max_new_tokens": 64,
        "max_window_size": 400,
        "pad_token_id": end,
        "top_k": 0,
        "top_p": 0.8,
    }


def model_file(model: Qwen) -> bytes:
    parameters = model.state_dict()
    tensors = {entry.published: parameters[entry.name].bfloat16() for entry in tensor_table(model.config)}
    return save(tensors, metadata={"format": "pt"})


def check_training(steps: int, seed: int) -> None:
    """Raises InputError for options that no training has."""
    if steps < 1:
        raise InputError(f"--steps {steps} must be at least 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed} must be from 0 to 2**63 - 1")


def check_folder(folder: Path) -> None:
    """Makes a checkpoint's folder. Raises InputError, before the training, where a file cannot be written."""
    make_folder(folder)
    for name in ("config.json", "generation_config.json", "qwen.tiktoken", "model.safetensors"):
        output_path(folder / name, "--output")


def write_json(path: Path, content: dict[str, object]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def new_model(config: dict[str, object]) -> Qwen:
    """The model of a config.json, with weights that nothing has set yet."""
    return Qwen(QwenConfig(**{field.name: config[field.name] for field in fields(QwenConfig)}))


def write_folder(folder: Path, config: dict[str, object], end: int, vocabulary: bytes, model: Qwen) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(end))
    write_whole(folder / "qwen.tiktoken", vocabulary)
    write_whole(folder / "model.safetensors", model_file(model))


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=1500, help="training steps (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="for weights and text (%(default)s)")
    made.add_argument("--tokenizer", type=Path, default=Path("weights/qwen.tiktoken"), help="(%(default)s)")
    made.add_argument("--output", type=Path, default=Path("weights"), help="folder to write (%(default)s)")
    return made


def command(arguments: argparse.Namespace) -> int:
    check_training(arguments.steps, arguments.seed)
    check_folder(arguments.output)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    vocabulary = read_bytes(arguments.tokenizer)
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    encoder = Encoder(tokenizer)
    rows = math.ceil(tokenizer.n_vocab / 64) * 64  # padded, as in the published models
    config = published_config(vocab_size=rows)
    model = new_model(config)
    initialise(model, arguments.seed)
    say(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    train(model, language_model_loss(model, encoder, arguments.seed), arguments.steps)

    write_folder(arguments.output, config, encoder.end, vocabulary, model)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
