"""Quantises a checkpoint to 4 or 8 bits with GPTQ, in plain PyTorch, and writes it as AutoGPTQ does (v1).

    python examples/make/quantize_gptq.py weights tiny-int4 --bits 4 --group-size 32
    python -m qwen_ref.chat --model tiny-int4 --fast

GPTQ (Frantar et al. 2022, section 3.3) rounds the columns of a weight W (out, in) one after another. Rounding
a column changes the outputs on calibration text. The columns that are not rounded yet are adjusted to correct
this. With H = Σ x xᵀ over the inputs x of that text, and U the upper Cholesky factor of H⁻¹ = Uᵀ U:

    e = (w_i - round(w_i)) / U_ii        W[:, j] -= e · U_ij   for all later columns j

The inputs x of a layer come from the layers before it, which are quantised already. With --round-to-nearest H
is the identity, so nothing is adjusted.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tiny_corpus import Encoder, documents
from torch import Tensor, nn

from qwen_ref import Qwen, Tokenizer, load_model
from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.cli import Parser, Progress, on_stdout, run
from qwen_ref.commands.files import read_prompt, unfinished_name
from qwen_ref.commands.settings import given_model
from qwen_ref.config import InputError, QwenConfig, read_json_object
from qwen_ref.loading.hub import find_model
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import is_packed, module_of
from qwen_ref.quantize.rounding import gptq_steps, pack_gptq

# In the order in which data flows: those of a row read the same x.
STAGES = (("attn.qkv",), ("attn.out",), ("mlp.gate", "mlp.up"), ("mlp.down",))
DAMPING = 0.01  # of the mean of H's diagonal, added to it: directions that the text hardly has
SEED = 7  # of the calibration documents: neither that of the training nor that of the measurements


class Quantised(NamedTuple):
    """A weight in few bits: W[o, i] ≈ (q[i, o] - zeros[g, o]) · scales[g, o], g = g_idx[i]."""

    q: Tensor  # (in, out)
    zeros: Tensor  # (groups, out)
    scales: Tensor  # (groups, out), float16
    g_idx: Tensor  # (in)

    def weight(self) -> Tensor:
        """(out, in)"""
        g = self.g_idx.long()
        return ((self.q - self.zeros[g]) * self.scales.double()[g]).t()


def gptq(weight: Tensor, hessian: Tensor, config: GPTQConfig) -> Quantised:
    """A weight (out, in) rounded so that its outputs change little where x xᵀ adds up to hessian (in, in)."""
    outputs, inputs = weight.shape
    W, H = weight.double().clone(), hessian.double().clone()
    unused = H.diagonal() == 0  # inputs that are always 0: any value will do
    H.diagonal()[unused] = 1
    H.diagonal().add_(DAMPING * H.diagonal().mean())
    # Act-order: what matters most is rounded first, when most others can still make up for it.
    order = H.diagonal().argsort(descending=True, stable=True) if config.desc_act else torch.arange(inputs)
    W, H = W[:, order], H[order][:, order]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)

    size = inputs if config.group_size == -1 else config.group_size
    groups = config.groups(inputs)
    q = torch.empty(inputs, outputs, dtype=torch.int32)
    zeros = torch.empty(groups, outputs, dtype=torch.int32)
    scales = torch.empty(groups, outputs, dtype=torch.float16)
    for i in range(inputs):
        group = i // size
        if i % size == 0:
            scales[group], zeros[group] = gptq_steps(W[:, i : i + size], config)
        scale, zero = scales[group].double(), zeros[group]
        q[i] = (W[:, i] / scale + zero).round().clamp(0, 2**config.bits - 1)
        error = (W[:, i] - (q[i] - zero) * scale) / U[i, i]
        W[:, i:] -= error[:, None] * U[i, i:]
    back = order.argsort()
    return Quantised(q[back], zeros, scales, (back // size).int())


@torch.inference_mode()
def quantise(
    model: Qwen, ids: Tensor, config: GPTQConfig, to_nearest: bool = False
) -> Iterator[tuple[str, Quantised]]:
    """The quantised matrices of all layers by their names; the model, in float32, then has their values."""
    x, at = first_input(model, ids)
    for layer, block in enumerate(model.blocks):
        for names in STAGES:
            linears = [block.get_submodule(name) for name in names]
            hessian = torch.eye(linears[0].in_features)
            if not to_nearest:
                hessian = second_moments(linears[0], block, (x, at, None, layer))
            for name, linear in zip(names, linears, strict=True):
                name = f"blocks.{layer}.{name}.weight"
                try:
                    if not (torch.isfinite(linear.weight).all() and torch.isfinite(hessian).all()):
                        raise InputError("it, or what it is applied to, is NaN or infinite")
                    quantised = gptq(linear.weight, hessian, config)
                except InputError as error:
                    raise InputError(f"{name}: {error}; check the checkpoint") from None
                linear.weight.copy_(quantised.weight())
                yield name, quantised
        x = block(x, at, None, layer)


def first_input(model: Qwen, ids: Tensor) -> tuple[Tensor, object]:
    """What the first layer is called with: the embedded ids, and where they stand."""
    seen: list[tuple] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model.hidden_states(ids)
    hook.remove()
    return seen[0][0], seen[0][1]


def second_moments(linear: nn.Linear, block: nn.Module, arguments: tuple) -> Tensor:
    """Σ x xᵀ over the inputs x that a linear layer of a block has when the block is called, (in, in)."""
    found = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)

    def add(_: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].flatten(0, -2).double()
        found.add_(x.t() @ x)

    hook = linear.register_forward_pre_hook(add)
    block(*arguments)
    hook.remove()
    return found


# Files


def write(
    source: Path, output: Path, matrices: dict[str, Quantised], model: Qwen, config: GPTQConfig
) -> None:
    """Fills a folder with a GPTQ checkpoint."""
    tensors = {}
    plain = model.state_dict()
    for spec in tensor_table(model.config):
        if not is_packed(spec):
            tensors[spec.published] = plain[spec.name].to(torch.float16)
            if not torch.isfinite(tensors[spec.published]).all():
                raise InputError(f"{spec.name} has values that float16 has not; GPTQ releases are float16")
            continue
        matrix, module = matrices[spec.name], module_of(spec)
        parts = pack_gptq(matrix.q, matrix.zeros, matrix.scales, matrix.g_idx, config.bits)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    settings = {**vars(config), "damp_percent": DAMPING, "quant_method": "gptq"}
    published = read_json_object(source / "config.json")
    text = json.dumps({**published, "quantization_config": settings}, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    for name in ("qwen.tiktoken", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A folder to fill, which is called output once that is done, and removed if it cannot be."""
    part = unfinished_name(output)
    try:
        part.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: cannot be made: {getattr(error, 'strerror', error)}") from None
    try:
        yield part
        os.replace(part, output)
    except BaseException:
        shutil.rmtree(part)
        raise


def calibration(source: Path, text: Path | None, rows: int, length: int) -> Tensor:
    """(rows, length) ids of a text, or of documents like those of the tiny checkpoint's training."""
    tokenizer = Tokenizer.from_file(source / "qwen.tiktoken", engine="tiktoken")  # the text may be a book
    if text is None:
        ids = itertools.chain.from_iterable(map(Encoder(tokenizer).document, documents(SEED)))
        return torch.tensor(list(itertools.islice(ids, rows * length))).view(rows, length)
    found = tokenizer.encode(read_prompt(None, text))
    rows = min(rows, len(found) // length)
    if rows == 0:
        raise InputError(f"{text}: {len(found)} tokens are less than a row of {length}")
    return torch.tensor(found[: rows * length]).view(rows, length)


def parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=given_model, help="a checkpoint folder, or a name as Qwen/Qwen-1_8B")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--bits", type=int, default=4, help="4 or 8 (%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="inputs a scale; -1: all (%(default)s)")
    parser.add_argument("--asymmetric", action="store_true", help="zero points of their own")
    parser.add_argument("--act-order", action="store_true", help="the inputs that matter most first")
    parser.add_argument("--round-to-nearest", action="store_true", help="without calibration, to compare")
    parser.add_argument("--text", type=Path, help="calibration text (default: the tiny checkpoint's facts)")
    parser.add_argument("--rows", type=int, default=32, help="of calibration text (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (%(default)s)")
    return parser


def command(args: argparse.Namespace) -> int:
    if os.path.lexists(args.output):
        raise InputError(f"{args.output} is there already")
    args.source = find_model(args.source).folder
    seq_length = QwenConfig.from_json(args.source / "config.json").seq_length
    for name, most in (("rows", 4096), ("length", seq_length)):
        if not 1 <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)} must be from 1 to {most}")
    if args.act_order and args.round_to_nearest:
        raise InputError("--act-order is the order of GPTQ: --round-to-nearest has none")
    if GPTQConfig.from_json(args.source / "config.json") is not None:
        raise InputError(f"{args.source} is quantised already; quantise the release that it was made of")
    config = GPTQConfig(args.bits, args.group_size, desc_act=args.act_order, sym=not args.asymmetric)
    model = load_model(args.source, "float32")
    ids = calibration(args.source, args.text, args.rows, args.length)
    matrices: dict[str, Quantised] = {}
    total = sum(map(len, STAGES)) * len(model.blocks)
    with unfinished(args.output) as part:  # at once: better refused now than in the end
        with Progress("quantising", unit="matrices") as progress:
            for name, matrix in quantise(model, ids, config, args.round_to_nearest):
                matrices[name] = matrix
                progress.update(len(matrices), total)
        write(args.source, part, matrices, model, config)
    print(on_stdout(f"{args.output}: {args.bits} bits in {config.grouping}"))
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
