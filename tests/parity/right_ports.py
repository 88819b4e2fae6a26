"""Ports of first-generation Qwen in NumPy that are all right: they differ in precision and order alone.

Written from a description of the model, not from this project's code. Values of half precision are carried in
float32 arrays and rounded where a port rounds them, so that every rounding point can be chosen by itself.
Dimensions: B batch, T new positions, S positions attended to, D hidden, H heads, K head size, F MLP width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rounded(x: Array, dtype: str | None) -> Array:
    """x with the values that dtype has, in float32 (float64 for float64); None: as it is."""
    if dtype is None:
        return x
    if dtype == "bfloat16":  # the upper half of a float32, to nearest, ties to even
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        bits = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    return x.astype(dtype)


def sigmoid(x: Array, form: str) -> Array:
    if form == "tanh":
        return 0.5 * (1 + np.tanh(0.5 * x))
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1, small) / (1 + small)


@dataclass(frozen=True)
class Port:
    """What one right port chooses. A dtype of None is that of the activations, unless said otherwise."""

    activations: str = "float32"  # what every stage is rounded to
    weights: str = "float32"
    operand: str | None = None  # what enters a product with a weight is rounded to this; None: it is not
    residual: str | None = None  # the residual stream
    norm_out: str | None = None  # what a norm gives
    logits: str | None = None

    block: int = 0  # products are summed in blocks of so many; 0: as BLAS does
    reverse: bool = False  # from the last to the first
    sums: str = "float32"  # or float64
    round_partials: bool = False  # each block's sum is rounded to the activations' dtype
    ranks: int = 1  # tensor parallel: attn.out and mlp.down are sums over the ranks
    round_ranks: bool = False  # each rank's sum, and each sum of two, is rounded to the activations' dtype
    bias_after: bool = False  # the bias of c_attn is added to the rounded product

    norm: str = "published"  # weight after the cast; or fused: one rounding
    mean: str = "pairwise"  # or sequential, dot, float64
    rope: str = "float32"  # the tables; or float64
    round_tables: bool = False  # cos and sin in the activations' dtype
    round_rotation: bool = False  # every product and the sum of the rotation, too

    flash: int = 0  # running softmax over so many keys at a time; 0: one softmax over all
    scale: str = "scores"  # or q (rounded before the product), or both (√ on q and on k, rounded)
    query: str | None = None  # q for the product with k; None: as it is
    scores: str | None = None  # None: float32
    probabilities: str | None = None  # None: float32

    cache: str | None = None  # float16, bfloat16, int8 a token and head, int8 a token; None: as it is
    raw_prefill: bool = False  # the first call attends to unrounded k and v
    chunk: int = 0  # the prompt in chunks of so many; 0: at once

    swiglu: str = "twice"  # silu rounded, then the product; or fused: rounded once
    sigmoid: str = "exp"  # or tanh

    def exact(self) -> Port:
        """The same order of everything, in float64 throughout."""
        kept: dict[str, Any] = {
            name: getattr(self, name) for name in ("block", "reverse", "ranks", "bias_after")
        }
        kept |= {
            name: getattr(self, name) for name in ("norm", "flash", "scale", "chunk", "swiglu", "sigmoid")
        }
        return Port("float64", "float64", sums="float64", mean="float64", rope="float64", **kept)

    def coarsest(self) -> str:
        """The dtype that rounds most: float64, float32, float16, bfloat16 or int8."""
        order = ("float64", "float32", "float16", "bfloat16", "int8")
        used = [self.activations, self.operand, self.residual, self.norm_out, self.query, self.scores]
        used += [self.probabilities, self.cache and self.cache.split()[0], self.rope, self.weights]
        return max((dtype for dtype in used if dtype), key=order.index)

    def out(self, x: Array, dtype: str | None = None) -> Array:
        return rounded(x, dtype or self.activations)

    def product(self, x: Array, weight: Array, row_parallel: bool = False) -> Array:
        """x (…, I) times weight (O, I), not rounded yet but in its partial sums."""
        x = rounded(x, self.operand)
        if self.sums == "float64":
            x, weight = x.astype(np.float64), weight.astype(np.float64)
        ranks = self.ranks if row_parallel else 1
        share = x.shape[-1] // ranks
        total = None
        for first in range(0, x.shape[-1], share):
            part = self.partial_sum(x[..., first : first + share], weight[:, first : first + share])
            if not self.round_ranks or ranks == 1:
                total = part if total is None else total + part
            else:  # as an all-reduce in the activations' dtype
                total = self.out(part) if total is None else self.out(total + self.out(part))
        assert total is not None
        return total

    def partial_sum(self, x: Array, weight: Array) -> Array:
        if self.reverse and not self.block:
            return np.ascontiguousarray(x[..., ::-1]) @ np.ascontiguousarray(weight[:, ::-1]).T
        if not self.block:
            return x @ weight.T
        starts = list(range(0, x.shape[-1], self.block))
        total = np.zeros((*x.shape[:-1], weight.shape[0]), x.dtype)
        for start in reversed(starts) if self.reverse else starts:
            part = x[..., start : start + self.block] @ weight[:, start : start + self.block].T
            total = total + (self.out(part) if self.round_partials else part)
        return total

    def rms_norm(self, x: Array, weight: Array, epsilon: float) -> Array:
        if self.mean == "float64":
            x, weight = x.astype(np.float64), weight.astype(np.float64)
        if self.mean == "sequential":
            mean = np.cumsum(x * x, axis=-1)[..., -1:] / x.shape[-1]
        elif self.mean == "dot":
            mean = np.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1]
        else:
            mean = np.mean(x * x, axis=-1, keepdims=True)
        x = x * (1 / np.sqrt(mean + epsilon))
        if self.norm == "published":
            x = self.out(x, self.norm_out)
        return self.out(x * weight, self.norm_out)

    def rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        """x (B, T, H, K): each number of the first half turned with its partner in the second."""
        first, second = np.split(x, 2, axis=-1)
        cos, sin = cos[:, None], sin[:, None]  # (T, 1, K/2)

        def inner(y: Array) -> Array:
            return self.out(y) if self.round_rotation else y

        turned = [inner(first * cos) - inner(second * sin), inner(second * cos) + inner(first * sin)]
        return self.out(np.concatenate(turned, axis=-1))

    def tables(self, positions: Array, size: int, base: float) -> tuple[Array, Array]:
        """cos and sin, (T, K/2)."""
        exponents = np.arange(0, size, 2).astype(self.rope) / size
        frequencies = 1 / np.asarray(base, self.rope) ** exponents
        angles = positions.astype(self.rope)[:, None] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        if self.round_tables:
            return self.out(cos), self.out(sin)
        carried = "float64" if self.activations == "float64" else "float32"
        return cos.astype(carried), sin.astype(carried)

    def stored(self, x: Array) -> Array:
        """Keys or values (B, T, H, K) as the cache gives them back."""
        if self.cache is None or not self.cache.startswith("int8"):
            return rounded(x, self.cache)
        axes = (-1,) if self.cache == "int8 a token and head" else (-2, -1)
        step = np.maximum(np.abs(x).max(axis=axes, keepdims=True), 1e-20) / 127
        return np.rint(x / step) * step

    def attend(self, q: Array, k: Array, v: Array, start: int) -> Array:
        """q (B, H, T, K) from position `start` on, k and v (B, H, S, K) → (B, H, T, K)."""
        factor = 1 / math.sqrt(q.shape[-1])
        if self.scale == "q":
            q = self.out(q * factor)
        elif self.scale == "both":
            q, k = self.out(q * math.sqrt(factor)), self.out(k * math.sqrt(factor))
        scores = rounded(rounded(q, self.query) @ k.swapaxes(-1, -2), self.scores)
        if self.scale == "scores":
            scores = rounded(scores * factor, self.scores)
        T, S = scores.shape[-2:]
        scores = np.where(np.arange(S) > start + np.arange(T)[:, None], -np.inf, scores).astype(scores.dtype)
        if not self.flash:
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights = weights / weights.sum(axis=-1, keepdims=True)
            return self.out(rounded(weights, self.probabilities) @ v)
        highest = np.full((*scores.shape[:-1], 1), -np.inf, scores.dtype)
        total, mixed = np.zeros_like(highest), np.zeros_like(q)
        for first in range(0, S, self.flash):  # key 0 is seen by every query, so `highest` is soon finite
            part = scores[..., first : first + self.flash]
            higher = np.maximum(highest, part.max(axis=-1, keepdims=True))
            weights, keep = np.exp(part - higher), np.exp(highest - higher)
            total = total * keep + weights.sum(axis=-1, keepdims=True)
            mixed = (
                mixed * keep + rounded(weights, self.probabilities) @ v[..., first : first + self.flash, :]
            )
            highest = higher
        return self.out(mixed / total)

    def gated(self, up: Array, gate: Array) -> Array:
        silu = gate * sigmoid(gate, self.sigmoid)
        return self.out(up * (silu if self.swiglu == "fused" else self.out(silu)))


@cache
def checkpoint(folder: Path, weights: str, vectors: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json and the tensors, matrices and vectors rounded to their dtypes; the files have bfloat16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        data = file.read_bytes()
        header = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + header]).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16"
                first, last = (8 + header + offset for offset in entry["data_offsets"])
                bits = np.frombuffer(data[first:last], "<u2").astype(np.uint32) << 16
                value = bits.view(np.float32).reshape(entry["shape"])
                tensors[name] = rounded(value, weights if value.ndim == 2 else vectors)
    return config, tensors


def calls(length: int, prefill: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First and last position of each call: the prompt, at once or in chunks, then one position a call."""
    chunk = chunk or prefill
    for start in range(0, prefill, chunk):
        yield start, min(start + chunk, prefill)
    for start in range(prefill, length):
        yield start, start + 1


def compute(folder: Path, ids: Array, prefill: int, port: Port) -> dict[str, Array]:
    """Every stage that the port computes for ids (B, T), by the bundle's names."""
    # Engines that round only what enters a product keep the vectors (norms, biases) in float32.
    vectors = port.weights if port.operand is None else "float32"
    config, tensors = checkpoint(folder, port.weights, vectors)
    B, length = ids.shape
    H, K = config["num_attention_heads"], config["kv_channels"]
    limit, epsilon = config["seq_length"], config["layer_norm_epsilon"]
    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"]:  # α belongs to the prompt, and stays while decoding
        alpha = max(2 ** math.ceil(math.log2(prefill / limit) + 1) - 1, 1)
        base *= alpha ** (K / (K - 2))
    cached: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(config["num_hidden_layers"])]
    seen: dict[str, list[Array]] = {}

    def keep(name: str, value: Array) -> Array:
        seen.setdefault(name, []).append(value)
        return value

    for start, end in calls(length, prefill, port.chunk):
        positions = np.arange(start, end)
        cos, sin = port.tables(positions, K, base)
        factors = np.ones(len(positions))
        if config["use_logn_attn"]:
            factors = np.where(positions + 1 > limit, np.log(positions + 1) / math.log(limit), factors)
        x = keep("embed", port.out(tensors["transformer.wte.weight"][ids[:, start:end]], port.residual))
        for layer, (keys, values) in enumerate(cached):
            block, here = f"transformer.h.{layer}", f"blocks.{layer}"

            normed = keep(f"{here}.attn_norm", port.rms_norm(x, tensors[f"{block}.ln_1.weight"], epsilon))
            qkv = port.product(normed, tensors[f"{block}.attn.c_attn.weight"])
            qkv = port.out(qkv) if port.bias_after else qkv
            qkv = port.out(qkv + tensors[f"{block}.attn.c_attn.bias"])
            q, k, v = (part.reshape(B, end - start, H, K) for part in np.split(qkv, 3, axis=-1))
            for name, value in (("q", q), ("k", k), ("v", v)):
                keep(f"{here}.attn.{name}", value)
            q = keep(f"{here}.attn.q_rotated", port.rotate(q, cos, sin))
            k = keep(f"{here}.attn.k_rotated", port.rotate(k, cos, sin))
            if config["use_logn_attn"]:
                q = port.out(q * port.out(factors)[:, None, None])
            keep(f"{here}.attn.q_scaled", q)
            keys.append(port.stored(k))
            values.append(port.stored(v))
            if not (port.raw_prefill and start == 0):
                k, v = np.concatenate(keys, axis=1), np.concatenate(values, axis=1)
            mixed = port.attend(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), start)
            mixed = keep(f"{here}.attn.mixed", mixed.swapaxes(1, 2).reshape(B, end - start, H * K))
            out = port.out(port.product(mixed, tensors[f"{block}.attn.c_proj.weight"], row_parallel=True))
            x = port.out(x + keep(f"{here}.attn.out", out), port.residual)
            keep(f"{here}.attn_residual", x)

            normed = keep(f"{here}.mlp_norm", port.rms_norm(x, tensors[f"{block}.ln_2.weight"], epsilon))
            up = keep(f"{here}.mlp.up", port.out(port.product(normed, tensors[f"{block}.mlp.w1.weight"])))
            gate = keep(f"{here}.mlp.gate", port.out(port.product(normed, tensors[f"{block}.mlp.w2.weight"])))
            inner = keep(f"{here}.mlp.product", port.gated(up, gate))
            down = port.out(port.product(inner, tensors[f"{block}.mlp.c_proj.weight"], row_parallel=True))
            x = port.out(x + keep(f"{here}.mlp.down", down), port.residual)
            keep(f"{here}.residual", x)
        x = keep("norm", port.rms_norm(x, tensors["transformer.ln_f.weight"], epsilon))
        keep("logits", port.out(port.product(x, tensors["lm_head.weight"]), port.logits))
    return {name: np.concatenate(parts, axis=1) for name, parts in seen.items()}
