"""Writes sizes.md: what the four published sizes weigh, compute and read.

    python examples/measure/sizes_page.py > examples/measure/sizes.md

Everything is computed from the table of tensors and the configurations; no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator

import torch

from qwen_ref import QwenConfig
from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.sizes import cache_bytes, int4_group, quantized_bytes
from qwen_ref.config import InputError
from qwen_ref.quantize.config import INT4_GROUP

SIZES = ("1.8b", "7b", "14b", "72b")
RANKS = (1, 2, 4, 8)
FORMS = ("bf16", "int8", "int4")
PROMPT = 2048
POSITIONS = (8192, 32768)
WIDTH = 118  # of a line of prose

Cell = Callable[[QwenConfig], str]

PARTS = {  # of the model: the tensors that make it up, in a layer without their `blocks.N.`, and the formula
    "embed": (("embed.weight",), "V · D"),
    "attn_norm, mlp_norm": (("attn_norm.weight", "mlp_norm.weight"), "L · 2 · D"),
    "attn.qkv, weight": (("attn.qkv.weight",), "L · 3D · D"),
    "attn.qkv, bias": (("attn.qkv.bias",), "L · 3D"),
    "attn.out": (("attn.out.weight",), "L · D · D"),
    "mlp.gate, mlp.up": (("mlp.gate.weight", "mlp.up.weight"), "L · 2 · F · D"),
    "mlp.down": (("mlp.down.weight",), "L · D · F"),
    "norm": (("norm.weight",), "D"),
    "lm_head": (("lm_head.weight",), "V · D"),
}


# What is counted


def parameters(config: QwenConfig) -> dict[str, int]:
    """The numbers in each part of PARTS; together, all that a checkpoint has."""
    part_of = {name: part for part, (names, _) in PARTS.items() for name in names}
    found = dict.fromkeys(PARTS, 0)
    for spec in tensor_table(config):
        found[part_of[re.sub(r"^blocks\.\d+\.", "", spec.name)]] += math.prod(spec.shape)
    return found


def product_flops(config: QwenConfig) -> tuple[int, int]:
    """FLOPs of a token's products with the layers' matrices, and with lm_head: a multiplication and an
    addition for each weight. The embedding is looked up.
    """
    sizes = {spec.name: math.prod(spec.shape) for spec in tensor_table(config) if len(spec.shape) == 2}
    head = sizes.pop("lm_head.weight")
    del sizes["embed.weight"]
    return 2 * sum(sizes.values()), 2 * head


def attention_flops(config: QwenConfig, positions: int) -> int:
    """FLOPs of one query of every head and layer with so many positions: 2 · D each for q kᵀ and for v."""
    return 4 * config.hidden_size * positions * config.num_hidden_layers


def prefill_flops(config: QwenConfig, tokens: int) -> tuple[int, int]:
    """FLOPs of a prompt of so many tokens: products, attention. lm_head is for its last position alone."""
    layers, head = product_flops(config)
    pairs = tokens * (tokens + 1) // 2  # a query sees its own position and those before it
    return layers * tokens + head, attention_flops(config, 1) * pairs


def decode_flops(config: QwenConfig, position: int) -> tuple[int, int]:
    """FLOPs of the token at a position, counted from 0, so that it sees position + 1: products, attention."""
    return sum(product_flops(config)), attention_flops(config, position + 1)


def weight_bytes(config: QwenConfig, form: str, ranks: int = 1) -> int:
    """Bytes of the weights of each of so many ranks: "bf16", or "int8" or "int4" as `--quantize` holds them
    with one thread a rank. Raises ValueError where int4's groups do not divide a rank's inputs.
    """
    group = int4_group(config, ranks)
    if form == "int4" and group is None:
        raise InputError(f"no group of int4 divides the inputs of {ranks} ranks; use int8 or fewer ranks")
    table = tensor_table(config)
    if form == "bf16":
        return sum(math.prod(spec.shape_of_rank(ranks)) for spec in table) * torch.bfloat16.itemsize
    return sum(quantized_bytes(spec, form, ranks, group) for spec in table)


def int8_cache_bytes(config: QwenConfig, context: int) -> int:
    """Bytes of an Int8Cache: a byte a number, and a float32 for each head's key and value."""
    heads = 2 * config.num_hidden_layers * config.num_attention_heads
    return heads * (config.kv_channels + torch.float32.itemsize) * context


def read_for_token(config: QwenConfig, form: str, position: int) -> tuple[int, int]:
    """Bytes that decoding the token at a position reads on one rank: of weights, all but the embedding, of
    which it is one row; and of bfloat16 keys and values.
    """
    D, V = config.hidden_size, config.vocab_size
    weights = weight_bytes(config, form) - (V - 1) * D * torch.bfloat16.itemsize
    return weights, cache_bytes(config, position, torch.bfloat16)


# The page


def page() -> str:
    configs = {size: QwenConfig.preset(size) for size in SIZES}
    parts = (_parameters_section, _memory_section, _work_section)
    return "\n".join(itertools.chain(["# Sizes"], *(part(configs) for part in parts))).rstrip()


def _parameters_section(configs: dict[str, QwenConfig]) -> Iterator[str]:
    yield from _prose(
        "`python examples/measure/sizes_page.py` computes this page from the [table of",
        "tensors](../../src/qwen_ref/checkpoint.py). The letters: D is the hidden size, F the width of the",
        "MLP, V the rows of the vocabulary, L the number of layers, H the number of heads, K = 128 the size",
        "of a head.",
    )
    yield from _table(
        configs,
        "",
        [
            ("D = H · K", lambda c: f"{c.hidden_size:,}"),
            ("H", lambda c: f"{c.num_attention_heads}"),
            ("L", lambda c: f"{c.num_hidden_layers}"),
            ("F", lambda c: f"{c.mlp_width:,}"),
            ("V", lambda c: f"{c.vocab_size:,}"),
        ],
    )
    yield from _prose("Parameters by part, over all layers:")
    counts = {config: parameters(config) for config in configs.values()}

    def share(*parts: str) -> Cell:
        return lambda c: f"{sum(counts[c][part] for part in parts) / sum(counts[c].values()):.1%}"

    rows: list[tuple[str, Cell]] = [
        (f"{part} | {formula}", lambda c, part=part: f"{counts[c][part]:,}")
        for part, (_, formula) in PARTS.items()
    ]
    rows += [
        ("**all** | L · (4D² + 3FD + 5D) + 2VD + D", lambda c: f"**{sum(counts[c].values()):,}**"),
        ("bytes in bfloat16 | the published index's `total_size`", lambda c: f"{weight_bytes(c, 'bf16'):,}"),
        ("in GB | 10⁹ bytes", lambda c: f"{weight_bytes(c, 'bf16') / 1e9:.1f}"),
        ("attention's share | qkv and out", share("attn.qkv, weight", "attn.qkv, bias", "attn.out")),
        ("the MLPs' share | gate, up and down", share("mlp.gate, mlp.up", "mlp.down")),
        ("the vocabulary's share | embed and lm_head", share("embed", "lm_head")),
    ]
    yield from _table(configs, "part | formula", rows)


def _memory_section(configs: dict[str, QwenConfig]) -> Iterator[str]:
    yield from _prose(
        "**Weights, GB on each rank.** bf16 is the published form. int8 and int4 are the forms of",
        "`--quantize`, with one thread per rank; with 8 threads on one rank they differ by at most 0.4%.",
        "Embedding, norms and biases stay in bf16.",
    )
    yield from (
        "- int8: one byte per weight, and one float32 scale per output. The outputs are stored in blocks of",
        "  up to 352, and the last block is padded. Each block takes 8 more bytes per input.",
        "- int4: half a byte per weight. Each group of 64 inputs of an output has a scale and an offset in",
        "  bf16. `lm_head` is int8. With several ranks, the results of `out` and `down` are added up",
        "  unrounded; then these two take one byte per weight, with scale and offset in float32.",
        "",
        f"| | form | {' | '.join('1 rank' if n == 1 else f'{n} ranks' for n in RANKS)} |",
        f"|---|---|{'---:|' * len(RANKS)}",
    )
    for size, config in configs.items():
        for form in FORMS:
            cells = " | ".join(_memory_cell(config, form, n) for n in RANKS)
            yield f"| {size} | {form} | {cells} |"
    yield from _prose(
        "\\* in groups of 32 (`--group-size 32`), because 64 does not divide a rank's part of F. –: 32 does",
        "not divide it, either.",
    )
    yield from _prose(
        "**Keys and values** are 2 · L · H · K numbers per position. An int8 cache (`--kv-cache int8`) has",
        "one byte per number and one float32 for every K numbers: 132 bytes instead of the 256 of bf16.",
        "Each of n ranks holds one n-th of the cache.",
        before=False,
    )
    rows: list[tuple[str, Cell]] = [
        ("bytes per token, bf16", lambda c: f"{cache_bytes(c, 1, torch.bfloat16):,}"),
        ("bytes per token, int8", lambda c: f"{int8_cache_bytes(c, 1):,}"),
    ]
    for n in POSITIONS:
        rows.append((f"GB for {n:,} tokens, bf16", lambda c, n=n: _gb(cache_bytes(c, n, torch.bfloat16))))
        rows.append((f"GB for {n:,} tokens, int8", lambda c, n=n: _gb(int8_cache_bytes(c, n))))
    yield from _table(configs, "", rows)


def _work_section(configs: dict[str, QwenConfig]) -> Iterator[str]:
    yield from _prose(
        "**Work.** A matrix product takes 2 FLOPs per weight and token: a multiplication and an addition.",
        "Attention takes 4 · D FLOPs per layer, query and position that the query sees: 2 · D for q kᵀ and",
        "2 · D for the sum of values. Norms, rotation, softmax, silu, biases and residuals are not counted:",
        "their work grows with D, F or H · positions, but that of the products grows with D², D · F and",
        "D · positions. The embedding is a look-up and takes no FLOPs. With P weights in the layers'",
        "matrices:",
    )
    yield from (
        "    a prompt of T tokens, logits of its last     2·P·T + 2·V·D + 4·D·L·T·(T + 1)/2",
        "    the token at position p, from 0 on           2·P + 2·V·D + 4·D·L·(p + 1)",
    )
    yield from _prose(
        "A decode step on one rank reads every weight once, but only one row of the embedding. It also reads",
        "the keys and values of the p earlier positions, here in bf16. If the weights are in bf16 too, that",
        "is one byte per FLOP: a weight has two bytes and takes two FLOPs, and so does a cached number. A",
        "prompt reads the same weights only once for all of its tokens. A processor that can do more than",
        "one FLOP while it reads one byte waits for memory during decode steps: fewer bits per weight make",
        "it faster, fewer FLOPs would not.",
    )
    rows: list[tuple[str, Cell]] = [
        ("GFLOP of products per token", lambda c: f"{sum(product_flops(c)) / 1e9:,.2f}"),
        ("of which lm_head", lambda c: f"{product_flops(c)[1] / 1e9:,.2f}"),
        (f"prefill of {PROMPT:,} tokens: TFLOP", lambda c: f"{sum(prefill_flops(c, PROMPT)) / 1e12:,.2f}"),
        ("GFLOP per token", lambda c: f"{sum(prefill_flops(c, PROMPT)) / PROMPT / 1e9:,.2f}"),
        ("attention's share", lambda c: _share(*prefill_flops(c, PROMPT))),
        (
            "FLOPs per byte of bf16 weights read",
            lambda c: f"{sum(prefill_flops(c, PROMPT)) / read_for_token(c, 'bf16', 0)[0]:,.0f}",
        ),
    ]
    for p in POSITIONS:
        rows.append((f"decode step at {p:,}: GFLOP", lambda c, p=p: f"{sum(decode_flops(c, p)) / 1e9:,.2f}"))
        rows.append(("attention's share", lambda c, p=p: _share(*decode_flops(c, p))))
        for form in FORMS:
            rows.append(
                (f"GB read, {form} weights", lambda c, p=p, form=form: _gb(sum(read_for_token(c, form, p))))
            )
        rows.append(("of which keys and values", lambda c, p=p: _gb(read_for_token(c, "bf16", p)[1])))
    yield from _table(configs, "", rows)
    yield from _prose(
        "The trained length is 8,192 tokens for the 1.8B and the 7B, and 2,048 for the 14B. Beyond it these",
        "models use dynamic NTK and LogN.",
    )


def _prose(*words: str, before: bool = True) -> Iterator[str]:
    """A paragraph between empty lines."""
    if before:
        yield ""
    yield from textwrap.wrap(" ".join(words), WIDTH, break_long_words=False, break_on_hyphens=False)
    yield ""


def _table(configs: dict[str, QwenConfig], head: str, rows: list[tuple[str, Cell]]) -> Iterator[str]:
    """A column for each size; head and the rows' names may be two cells."""
    yield f"| {head} | {' | '.join(configs)} |"
    yield f"|{'---|' * (1 + head.count('|'))}{'---:|' * len(configs)}"
    for name, cell in rows:
        yield f"| {name} | {' | '.join(map(cell, configs.values()))} |"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"


def _memory_cell(config: QwenConfig, form: str, ranks: int) -> str:
    group = int4_group(config, ranks)
    if form == "int4" and group is None:
        return "–"
    return _gb(weight_bytes(config, form, ranks)) + ("\\*" if form == "int4" and group != INT4_GROUP else "")


def _share(products: int, attention: int) -> str:
    return f"{attention / (products + attention):.1%}"


def command(_: argparse.Namespace) -> int:
    print(page(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(Parser(description=__doc__.splitlines()[0]), command))
