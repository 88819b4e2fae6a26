"""First-generation Qwen in float64 NumPy: a second opinion, from the published formulas alone.

Whoever wrote it had not seen model.py.

One sequence, all positions at once, no cache, no batch: a line is a formula, and nothing drops below float64.

    T positions, D hidden, H heads, K head size, F MLP width, V vocabulary
"""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def forward(
    config: dict, weights: dict[str, np.ndarray], ids: Sequence[int], prompt_length: int | None = None
) -> dict[str, np.ndarray]:
    """Logits (T, V) under "logits", and every intermediate under its published module name.

    `config` is the parsed config.json in its current spelling (hidden_size, not n_embd). Dynamic NTK fixes
    its base by the first prefill: for what P tokens in one pass and the rest one by one give, pass
    prompt_length=P.
    `attn.rotary_q` is the query after rotation and before LogN scaling.
    """
    narrow = [name for name, array in weights.items() if array.dtype != np.float64]
    if narrow:
        raise ValueError(f"the reference needs float64 weights; {narrow[0]} is {weights[narrow[0]].dtype}")

    T = len(ids)
    H, K = config["num_attention_heads"], config["kv_channels"]
    epsilon = config["layer_norm_epsilon"]
    cos, sin = rotary_table(config, T, T if prompt_length is None else prompt_length)  # (T, K/2) each
    logn = logn_factors(config, T)  # (T)
    stages: dict[str, np.ndarray] = {}

    x = stages["transformer.wte"] = weights["transformer.wte.weight"][list(ids)]  # (T, D)

    for i in range(config["num_hidden_layers"]):
        block = f"transformer.h.{i}"

        h = stages[f"{block}.ln_1"] = rms_norm(x, weights[f"{block}.ln_1.weight"], epsilon)
        qkv = h @ weights[f"{block}.attn.c_attn.weight"].T + weights[f"{block}.attn.c_attn.bias"]
        stages[f"{block}.attn.c_attn"] = qkv  # (T, 3D)
        q, k, v = (part.reshape(T, H, K) for part in np.split(qkv, 3, axis=-1))  # (T, H, K) each
        q = stages[f"{block}.attn.rotary_q"] = rotate(q, cos, sin)
        k = stages[f"{block}.attn.rotary_k"] = rotate(k, cos, sin)
        h = causal_attention(q * logn[:, None, None], k, v).reshape(T, H * K)  # (T, D)
        h = stages[f"{block}.attn.c_proj"] = h @ weights[f"{block}.attn.c_proj.weight"].T
        # Not x += h: the array that x names is already kept as a stage.
        x = x + h

        h = stages[f"{block}.ln_2"] = rms_norm(x, weights[f"{block}.ln_2.weight"], epsilon)
        up = stages[f"{block}.mlp.w1"] = h @ weights[f"{block}.mlp.w1.weight"].T  # (T, F)
        gate = stages[f"{block}.mlp.w2"] = h @ weights[f"{block}.mlp.w2.weight"].T  # (T, F)
        h = up * silu(gate)  # (T, F)
        h = stages[f"{block}.mlp.c_proj"] = h @ weights[f"{block}.mlp.c_proj.weight"].T  # (T, D)
        x = stages[block] = x + h

    x = stages["transformer.ln_f"] = rms_norm(x, weights["transformer.ln_f.weight"], epsilon)
    stages["lm_head"] = stages["logits"] = x @ weights["lm_head.weight"].T  # (T, V)
    return stages


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotary_table(config: dict, length: int, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle position / base^(2j/K), for positions 0..length-1 and j in 0..K/2-1.

    With dynamic NTK the base grows by alpha^(K/(K-2)). At seq_length 8192, a prompt of 8192 tokens has
    alpha 1, 8193 and 16384 have 3, 16385 has 7.
    """
    K = config["kv_channels"]
    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"]:
        alpha = max(2.0 ** math.ceil(math.log2(prompt_length / config["seq_length"]) + 1) - 1, 1.0)
        base *= alpha ** (K / (K - 2))
    frequencies = base ** (-np.arange(0, K, 2, dtype=np.float64) / K)  # (K/2)
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies)  # (T, K/2)
    return np.cos(angles), np.sin(angles)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turns each pair (x[j], x[j + K/2]) by its angle: halves are paired, not neighbours."""
    first, second = np.split(x, 2, axis=-1)  # (T, H, K/2) each
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, K/2): every head turns alike
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)  # (T, H, K)


def logn_factors(config: dict, length: int) -> np.ndarray:
    """What scales each query (T): log(n) / log(seq_length) for token number n > seq_length, else 1."""
    factors = np.ones(length)
    if config["use_logn_attn"]:
        for position in range(config["seq_length"], length):
            factors[position] = math.log(position + 1) / math.log(config["seq_length"])
    return factors


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) v (T, H, K), head by head; a position sees itself and those before it.

    A thousand queries at a time: the scores of 32,768 would be 9 GB.
    """
    T, H, K = q.shape
    out = np.empty_like(v)
    for start in range(0, T, 1000):
        end = min(start + 1000, T)
        future = np.arange(end) > np.arange(start, end)[:, None]
        for head in range(H):
            scores = q[start:end, head] @ k[:end, head].T / math.sqrt(K)  # row = query, column = key
            scores[future] = -np.inf
            # The softmax does not change when a row is shifted; the shift keeps exp from overflowing.
            likelihood = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[start:end, head] = likelihood / likelihood.sum(axis=-1, keepdims=True) @ v[:end, head]
    return out


def read_weights(folder: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of every *.safetensors file in `folder`, widened (exactly) to float64.

    Parsed here, not by the safetensors library, to stay independent of the project's loader: eight bytes of
    little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors' bytes.
    """
    # Recorded outputs lie beside the weights they came from, in a golden.safetensors.
    paths = sorted(path for path in Path(folder).glob("*.safetensors") if path.name != "golden.safetensors")
    if not paths:
        raise FileNotFoundError(f"no *.safetensors file in {folder}")
    weights: dict[str, np.ndarray] = {}
    for path in paths:
        content = path.read_bytes()
        (header_length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + header_length])
        header.pop("__metadata__", None)
        data = memoryview(content)[8 + header_length :]
        for name, entry in header.items():
            if name in weights:
                raise ValueError(f"{name} is stored twice, the second time in {path}")
            start, end = entry["data_offsets"]
            weights[name] = widen(data[start:end], entry["dtype"]).reshape(entry["shape"])
    return weights


def widen(data: memoryview, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        # NumPy has no bfloat16, but one is the upper half of a float32: put zeros below it.
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype in ("F16", "F32", "F64"):
        return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)
    raise ValueError(f"tensor type {dtype} is not read here; use BF16, F16, F32 or F64")
