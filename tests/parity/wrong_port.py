"""An independent port of first-generation Qwen to NumPy, with porters' classic mistakes to switch on.

It shares no code with the package: what recognises these mistakes recognises somebody else's.

    B rows, T columns, D hidden, H heads, K head size, F MLP width, V vocabulary
"""

import json
import math
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

ROPE_BASES = {"rope_base_1e4": 1e4, "rope_base_1e6": 1e6, "rope_base_500000": 5e5}
QKV_ORDERS = ("kqv", "vkq", "qvk", "kvq", "vqk")

MISTAKES = (
    # Rotary positions
    *(
        "interleaved_rope",
        *ROPE_BASES,
        "positions_from_1",
        "decode_position_plus_1",
        "decode_position_minus_1",
    ),
    *("query_position_plus_1", "rope_bfloat16_angles", "rope_bfloat16_frequencies", "rope_bfloat16_tables"),
    # Weights and their layout
    *("gate_up_swapped", "no_qkv_bias", *(f"qkv_order_{order}" for order in QKV_ORDERS), "qkv_by_head"),
    *("head_tied", "embed_tied", "c_attn_transposed", "c_attn_conv1d", "c_proj_transposed", "norms_swapped"),
    *("last_layer_dropped", "first_layer_dropped"),
    # Norms and activation
    *("eps_1e-5", "eps_1e-3", "norm_weight_before_cast", "no_final_norm", "gelu", "gelu_tanh", "relu"),
    # Long context
    *("no_logn", "logn_on_keys", "logn_on_keys_too", "logn_log10", "logn_p", "logn_p_plus_2"),
    *("ntk_off", "ntk_floor", "alpha_every_step", "alpha_every_step_uncached"),
    # Attention and padding
    *("no_score_scale", "score_scale_hidden", "non_causal"),
    *("pads_not_masked", "mask_ignored", "padded_positions"),
    # Not in anybody's list of mistakes
    *("value_rotated", "down_scaled", "post_norm"),
    "float16_overflow",
)


def port(
    folder: str | Path,
    ids: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    prefill_length: int | None = None,
    mistakes: Collection[str] = (),
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Logits and intermediates, (B, T, ...) by name, of the checkpoint in `folder` for `ids` (B, T).

    The first `prefill_length` columns are one forward pass, every later one is a cached decode step.
    """
    unknown = set(mistakes) - set(MISTAKES)
    if unknown:
        raise ValueError(f"no such mistake: {', '.join(sorted(unknown))}")
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None or "mask_ignored" in mistakes else np.asarray(mask)
    prefill = ids.shape[1] if prefill_length is None else prefill_length
    model = Port(Path(folder), mistakes, dtype)
    # exp and float16 overflow to infinity on purpose, and infinity becomes NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        if "alpha_every_step_uncached" not in mistakes:
            # With alpha and the calls' borders known, the cached computation is one pass.
            return model.forward(ids, mask, prefill, prefill)
        steps = [model.forward(ids[:, :prefill], mask[:, :prefill], prefill, prefill)]
        for n in range(prefill + 1, ids.shape[1] + 1):
            stages = model.forward(ids[:, :n], mask[:, :n], n, prefill)
            steps.append({name: array[:, -1:] for name, array in stages.items()})
        return {name: np.concatenate([step[name] for step in steps], axis=1) for name in steps[0]}


class Port:
    def __init__(self, folder: Path, mistakes: Collection[str], dtype: str) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.mistakes = frozenset(mistakes)
        self.dtype = "float16" if "float16_overflow" in mistakes else dtype
        # The halves live in float32 arrays that hold rounded values only.
        self.work = np.dtype("float64" if self.dtype == "float64" else "float32")
        self.weights = {n: self.round(w.astype(self.work)) for n, w in read_weights(folder).items()}

    def round(self, x: np.ndarray) -> np.ndarray:
        """To the model's dtype."""
        if self.dtype == "bfloat16":
            return round_to_bfloat16(x)
        return x.astype(np.float16).astype(np.float32) if self.dtype == "float16" else x

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        return self.round(x @ weight.T + bias)

    def forward(self, ids: np.ndarray, mask: np.ndarray, prefill: int, decoded: int) -> dict[str, np.ndarray]:
        """One pass over all columns: `prefill` were one call, those from `decoded` on were generated.

        The two differ only where there is no cache and every step is a prefill.
        """
        config, mistakes, weights = self.config, self.mistakes, self.weights
        B, T = ids.shape
        H, K = config["num_attention_heads"], config["kv_channels"]
        embed, head = weights["transformer.wte.weight"], weights["lm_head.weight"]
        if "embed_tied" in mistakes:
            embed = weights["lm_head.weight"]
        if "head_tied" in mistakes:
            head = weights["transformer.wte.weight"]

        if "padded_positions" in mistakes:
            counts = np.broadcast_to(np.arange(1, T + 1), (B, T))
        else:
            counts = mask.cumsum(axis=1)  # tokens so far, this one included (B, T)
        positions = np.maximum(counts - 1, 0) + ("positions_from_1" in mistakes)
        query_tables, key_tables = self.rope_tables(positions, counts, prefill, decoded)
        logn = self.logn_factors(positions)[:, :, None, None]
        visible = self.visible(mask, prefill)

        stages: dict[str, np.ndarray] = {}
        x = stages["embed"] = embed[ids]  # (B, T, D)

        layers = list(range(config["num_hidden_layers"]))
        if "last_layer_dropped" in mistakes:
            layers = layers[:-1]
        if "first_layer_dropped" in mistakes:
            layers = layers[1:]
        for n, layer in enumerate(layers):
            block, published = f"blocks.{n}", f"transformer.h.{layer}"
            ln_1, ln_2 = weights[f"{published}.ln_1.weight"], weights[f"{published}.ln_2.weight"]
            if "norms_swapped" in mistakes:
                ln_1, ln_2 = ln_2, ln_1

            h = stages[f"{block}.attn_norm"] = self.rms_norm(x, ln_1)
            q, k, v = self.qkv(h, published)  # (B, T, H, K) each
            stages |= {f"{block}.attn.q": q, f"{block}.attn.k": k, f"{block}.attn.v": v}
            q = stages[f"{block}.attn.q_rotated"] = self.rotate(q, query_tables)
            k = stages[f"{block}.attn.k_rotated"] = self.rotate(k, key_tables)
            if "value_rotated" in mistakes:
                v = self.rotate(v, key_tables)
            if mistakes & {"logn_on_keys", "logn_on_keys_too"}:
                k = self.round(k * logn)
            if "logn_on_keys" not in mistakes:
                q = self.round(q * logn)
            stages[f"{block}.attn.q_scaled"] = q
            h = stages[f"{block}.attn.mixed"] = self.attention(q, k, v, visible).reshape(B, T, H * K)
            c_proj = weights[f"{published}.attn.c_proj.weight"]
            if "c_proj_transposed" in mistakes:
                c_proj = c_proj.T
            h = stages[f"{block}.attn.out"] = self.linear(h, c_proj)
            if "post_norm" in mistakes:
                h = self.rms_norm(h, ln_2)
            x = stages[f"{block}.attn_residual"] = self.round(x + h)

            h = stages[f"{block}.mlp_norm"] = self.rms_norm(x, ln_2)
            w1, w2 = weights[f"{published}.mlp.w1.weight"], weights[f"{published}.mlp.w2.weight"]
            if "gate_up_swapped" in mistakes:
                w1, w2 = w2, w1
            up = stages[f"{block}.mlp.up"] = self.linear(h, w1)  # (B, T, F)
            gate = stages[f"{block}.mlp.gate"] = self.linear(h, w2)  # (B, T, F)
            h = stages[f"{block}.mlp.product"] = self.round(up * self.round(self.activation(gate)))
            h = self.linear(h, weights[f"{published}.mlp.c_proj.weight"])
            if "down_scaled" in mistakes:
                h = self.round(h * 0.9)
            stages[f"{block}.mlp.down"] = h
            x = stages[f"{block}.residual"] = self.round(x + h)

        if "no_final_norm" not in mistakes:
            x = self.rms_norm(x, weights["transformer.ln_f.weight"])
        stages["norm"] = x
        stages["logits"] = self.linear(x, head)  # (B, T, V)
        return stages

    def rms_norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        epsilon = self.config["layer_norm_epsilon"]
        if "eps_1e-5" in self.mistakes:
            epsilon = 1e-5
        if "eps_1e-3" in self.mistakes:
            epsilon = 1e-3
        normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
        if "norm_weight_before_cast" not in self.mistakes:
            normed = self.round(normed)
        return self.round(normed * weight)

    def qkv(self, x: np.ndarray, published: str) -> list[np.ndarray]:
        """Queries, keys and values (B, T, H, K) from the fused projection."""
        B, T, D = x.shape
        H, K = self.config["num_attention_heads"], self.config["kv_channels"]
        weight = self.weights[f"{published}.attn.c_attn.weight"]  # (3D, D)
        bias = self.weights[f"{published}.attn.c_attn.bias"]
        if "c_attn_transposed" in self.mistakes:
            weight = weight.reshape(3, D, D).transpose(0, 2, 1).reshape(3 * D, D)
        if "c_attn_conv1d" in self.mistakes:
            weight = weight.reshape(D, 3 * D).T
        y = self.linear(x, weight, 0.0 if "no_qkv_bias" in self.mistakes else bias)
        if "qkv_by_head" in self.mistakes:
            y = y.reshape(B, T, H, 3, K).swapaxes(2, 3)
        thirds = list(y.reshape(B, T, 3, H, K).transpose(2, 0, 1, 3, 4))
        for order in QKV_ORDERS:
            if f"qkv_order_{order}" in self.mistakes:
                thirds = [thirds["qkv".index(letter)] for letter in order]
        return thirds

    def rope_tables(
        self, positions: np.ndarray, counts: np.ndarray, prefill: int, decoded: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Cosine and sine (B, T, 1, K/2) for the queries, and for the keys."""
        K, base = self.config["kv_channels"], float(self.config["rotary_emb_base"])
        for name, wrong_base in ROPE_BASES.items():
            if name in self.mistakes:
                base = wrong_base
        fixed = prefill if "alpha_every_step" in self.mistakes else counts.shape[1]
        lengths = counts.copy()  # what alpha is computed from, for every token (B, T)
        lengths[:, :fixed] = counts[:, prefill - 1 : prefill]
        bases = base * self.alpha(lengths) ** (K / (K - 2))  # (B, T)
        exponents = np.arange(0, K, 2).astype(self.work) / K  # (K/2)
        frequencies = 1 / bases.astype(self.work)[:, :, None] ** exponents  # (B, T, K/2)

        keys = positions.copy()
        keys[:, decoded:] += "decode_position_plus_1" in self.mistakes
        keys[:, decoded:] -= "decode_position_minus_1" in self.mistakes
        queries = keys + ("query_position_plus_1" in self.mistakes)
        return self.cos_sin(queries, frequencies), self.cos_sin(keys, frequencies)

    def alpha(self, lengths: np.ndarray) -> np.ndarray:
        if not self.config["use_dynamic_ntk"] or "ntk_off" in self.mistakes:
            return np.ones(lengths.shape)
        whole = np.floor if "ntk_floor" in self.mistakes else np.ceil
        # A row may have nothing but padding in its prefill.
        power = whole(np.log2(np.maximum(lengths, 1) / self.config["seq_length"]) + 1)
        return np.maximum(2.0**power - 1, 1.0)

    def cos_sin(self, positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = positions.astype(self.work)[:, :, None]  # (B, T, 1)
        if self.mistakes & {"rope_bfloat16_angles", "rope_bfloat16_frequencies"}:
            frequencies = round_to_bfloat16(frequencies)
        if "rope_bfloat16_angles" in self.mistakes:
            angles = round_to_bfloat16(round_to_bfloat16(places) * frequencies)
        else:
            angles = places * frequencies
        cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        if self.mistakes & {"rope_bfloat16_angles", "rope_bfloat16_tables"}:
            cos, sin = round_to_bfloat16(cos), round_to_bfloat16(sin)
        return cos, sin

    def rotate(self, x: np.ndarray, tables: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        cos, sin = tables
        half = x.shape[-1] // 2
        if "interleaved_rope" in self.mistakes:
            first, second = np.s_[..., 0::2], np.s_[..., 1::2]
        else:
            first, second = np.s_[..., :half], np.s_[..., half:]
        out = np.empty_like(x)
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[second] * cos + x[first] * sin
        return self.round(out)

    def logn_factors(self, positions: np.ndarray) -> np.ndarray:
        """(B, T), all one without LogN."""
        if not self.config["use_logn_attn"] or "no_logn" in self.mistakes:
            return np.ones(positions.shape, self.work)
        length = self.config["seq_length"]
        numbers = positions + 1
        numbers -= "logn_p" in self.mistakes
        numbers += "logn_p_plus_2" in self.mistakes
        numbers = np.maximum(numbers, 1)  # log(0) would warn, though it is not used
        log = np.log10 if "logn_log10" in self.mistakes else np.log
        factors = np.where(numbers > length, log(numbers) / math.log(length), 1.0)
        return self.round(factors.astype(self.work))

    def visible(self, mask: np.ndarray, prefill: int) -> np.ndarray:
        """(B, T, T): row = query, column = key."""
        T = mask.shape[1]
        columns = np.arange(T)
        last = np.maximum(columns, prefill - 1) if "non_causal" in self.mistakes else columns
        visible = np.broadcast_to(columns <= last[:, None], (len(mask), T, T))
        if "pads_not_masked" not in self.mistakes:
            # A pad sees itself, or its softmax would be over nothing.
            visible = visible & (mask[:, None, :] == 1) | np.eye(T, dtype=bool)
        return visible

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
        scale = 1 / math.sqrt(q.shape[-1])
        if "score_scale_hidden" in self.mistakes:
            scale = 1 / math.sqrt(self.config["hidden_size"])
        if "no_score_scale" in self.mistakes:
            scale = 1.0
        out = np.empty_like(v)
        for head in range(q.shape[2]):  # one by one, so that a long case fits in memory
            scores = q[:, :, head] @ k[:, :, head].swapaxes(1, 2) * scale  # (B, T, T)
            scores = np.where(visible, scores, self.work.type(-np.inf))
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, :, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, :, head]
        return self.round(out)

    def activation(self, x: np.ndarray) -> np.ndarray:
        if "relu" in self.mistakes:
            return np.maximum(x, 0)
        if "gelu" in self.mistakes:
            erf = np.vectorize(math.erf, otypes=[self.work])
            return x * (1 + erf(x / math.sqrt(2))) / 2
        if "gelu_tanh" in self.mistakes:
            return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        return x / (1 + np.exp(-x))


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even: a bfloat16 is the upper half of a float32."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF)) & np.uint32(0xFFFF0000)
    # The carry could turn a NaN into a number.
    return np.where(np.isnan(x), x, bits.view(np.float32)).astype(x.dtype)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, widened to float32."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    weights: dict[str, np.ndarray] = {}
    for file in sorted(files):
        content = (folder / file).read_bytes()
        (header_length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + header_length])
        header.pop("__metadata__", None)
        data = content[8 + header_length :]
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}; only published checkpoints in BF16 are read")
            start, end = entry["data_offsets"]
            upper = np.frombuffer(data[start:end], "<u2").astype(np.uint32)
            weights[name] = (upper << 16).view(np.float32).reshape(entry["shape"])
    return weights
