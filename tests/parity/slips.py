"""First-generation Qwen in NumPy with mistakes to plant, for the parity kit to name: run(…, mistake="…").

Nothing here is shared with the package. A mistake is a row of the table at its place, or an `if`. A row named
"" is right. Most mistakes can sit in one layer only (`layer`). slip_cases.py lists all, and where each shows.

One pass over all positions serves for prefill, chunks and decode steps. What a mistake in a cache changes is
which keys a query sees, at which positions, and with which α.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Table = dict[str, Callable[..., Any]]


# The numbers, each table with the right one first


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))  # no overflow


def silu(x: Array) -> Array:
    return x * sigmoid(x)


ACTIVATIONS: Table = {
    "GELU": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "tanh GELU": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick GELU": lambda x: x * sigmoid(1.702 * x),
    "ReLU": lambda x: np.maximum(x, 0),
    "squared ReLU": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hard swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "identity": lambda x: x,
}
PRODUCTS: Table = {  # of gate and up
    "": lambda g, u: u * silu(g),
    **{f"{name} for silu": lambda g, u, f=f: u * f(g) for name, f in ACTIVATIONS.items()},
    "silu twice": lambda g, u: u * silu(silu(g)),
    "silu on up, not on gate": lambda g, u: g * silu(u),
    "silu after the product": lambda g, u: silu(g * u),
    "up not multiplied": lambda g, u: silu(g),
    "silu(gate) + up": lambda g, u: silu(g) + u,
    "gate + up": lambda g, u: g + u,
    "half of the MLP's channels": lambda g, u: u * silu(g) * (np.arange(g.shape[-1]) < g.shape[-1] // 2),
}


def mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt(mean(x * x) + eps)


def layer_norm(x: Array, eps: float) -> Array:
    return (x - mean(x)) / np.sqrt(mean((x - mean(x)) ** 2) + eps)


NORMS: Table = {  # of x, eps and the size of a head; before the weight
    "": lambda x, eps, K: rms(x, eps),
    "LayerNorm": lambda x, eps, K: layer_norm(x, eps),
    "eps 1e-5": lambda x, eps, K: rms(x, 1e-5),
    "eps 1e-3": lambda x, eps, K: rms(x, 1e-3),
    "eps outside the root": lambda x, eps, K: x / (np.sqrt(mean(x * x)) + eps),
    "sum for mean in the norm": lambda x, eps, K: x / np.sqrt((x * x).sum(-1, keepdims=True) + eps),
    "mean of absolute values in the norm": lambda x, eps, K: x / (mean(abs(x)) + eps),
    "norm per head": lambda x, eps, K: rms(x.reshape(*x.shape[:-1], -1, K), eps).reshape(x.shape),
}
NORM_WEIGHTS: Table = {
    "": lambda w: w,
    "norm without weight": lambda w: np.ones_like(w),
    "norm with 1 + weight": lambda w: 1 + w,
}

SCALES: Table = {
    "": lambda K, D: K**-0.5,
    "no 1/√K": lambda K, D: 1.0,
    "1/K for 1/√K": lambda K, D: 1 / K,
    "1/√D for 1/√K": lambda K, D: D**-0.5,
    "1/√K twice": lambda K, D: (K**-0.5) ** 2,
}


def softmax(s: Array, axis: int = -1, exp: Callable[[Array], Array] = np.exp, extra: float = 0) -> Array:
    top = s.max(axis, keepdims=True)
    p = exp(s - top)
    return p / (p.sum(axis, keepdims=True) + (extra * exp(-top) if extra else 0))


SOFTMAX: Table = {
    "": softmax,
    "softmax over queries": lambda s: softmax(s, axis=-2),
    "softmax with base 2": lambda s: softmax(s, exp=np.exp2),
    "softmax with one more in the denominator": lambda s: softmax(s, extra=1),
    "sigmoid for softmax": sigmoid,
}

CHUNKS = (8, 16)
SEEN: Table = {  # whether the query in column t sees the key in column j; P: columns of the first pass
    "": lambda j, t, P: j <= t,
    "one future key seen": lambda j, t, P: j <= t + 1,
    "own key not seen": lambda j, t, P: (j < t) | ((j == 0) & (t == 0)),
    "not causal": lambda j, t, P: (j >= 0) & (t >= 0),
    "sliding window of 8": lambda j, t, P: (j <= t) & (j > t - 8),
}
DECODE_SEEN: Table = {  # the same for t ≥ P
    "decode: newest key not seen": lambda j, t, P: j < t,
    "decode: key before the newest not seen": lambda j, t, P: (j <= t) & (j != t - 1),
    "decode: keys one slot too low": lambda j, t, P: (j <= t) & (j != P - 1),
    "decode: keys one slot too low, empty slot seen": lambda j, t, P: (j <= t) & (j != P - 1),
    "decode: all keys in the prompt's last slot": lambda j, t, P: (j < P - 1) | (j == t),
    "decode: all keys in the slot after the prompt": lambda j, t, P: (j < P) | (j == t),
    "decode: only the prompt's keys seen": lambda j, t, P: j < P,
    "decode: prompt forgotten": lambda j, t, P: (j >= P) & (j <= t),
    "decode: only the newest key seen": lambda j, t, P: j == t,
    "decode: mask aligned at the top left": lambda j, t, P: j == 0,
}
CHUNK_SEEN: Table = {  # the same in chunks of n; t - t % n is the first of the chunk
    "all of the chunk seen": lambda j, t, n: j < t - t % n + n,
    "all of a later chunk seen": lambda j, t, n: (j <= t) | (j < t - t % n + n) & (t >= n),
    "cache forgotten": lambda j, t, n: (j >= t - t % n) & (j <= t),
    "mask aligned at the top left": lambda j, t, n: j <= t % n,
}
SEEN |= {name: lambda j, t, P, f=f: np.where(t >= P, f(j, t, P), j <= t) for name, f in DECODE_SEEN.items()}
IN_CHUNKS: Table = {
    f"chunks of {n}: {name}": lambda j, t, P, f=f, n=n: f(j, t, n)
    for n in CHUNKS
    for name, f in CHUNK_SEEN.items()
}
SEEN |= IN_CHUNKS

POSITIONS: Table = {  # for RoPE; t: the true position, P: positions of the first pass, T: of all
    "": lambda t, P, T: t,
    "positions from 1": lambda t, P, T: t + 1,
    "positions doubled": lambda t, P, T: 2 * t,
    "positions halved": lambda t, P, T: t / 2,
    "positions reversed": lambda t, P, T: T - 1 - t,
}
DECODE_POSITIONS: Table = {  # the same for t ≥ P
    "decode: positions + 1": lambda t, P, T: t + 1,
    "decode: positions - 1": lambda t, P, T: t - 1,
    "decode: positions all 0": lambda t, P, T: 0 * t,
    "decode: positions from 0 again": lambda t, P, T: t - P,
    "decode: positions from 1 again": lambda t, P, T: t - P + 1,
    "decode: positions + an earlier prompt's 5": lambda t, P, T: t + 5,
    "decode: positions + the prompt's length": lambda t, P, T: t + P,
    "decode: position of the prompt's end repeated": lambda t, P, T: 0 * t + P - 1,
    "decode: position after the prompt repeated": lambda t, P, T: 0 * t + P,
}
POSITIONS |= {
    name: lambda t, P, T, f=f: np.where(t >= P, f(t, P, T), t) for name, f in DECODE_POSITIONS.items()
}
POSITIONS |= {f"chunks of {n}: positions from 0 again": lambda t, P, T, n=n: t % n for n in CHUNKS}

EXPONENTS: Table = {  # of the i-th frequency, base^-exponent
    "": lambda i, K, D: 2 * i / K,
    "RoPE exponent i/K": lambda i, K, D: i / K,
    "RoPE exponent 2i/D": lambda i, K, D: 2 * i / D,
    "RoPE on half of the dimensions": lambda i, K, D: 2 * i / (K // 2),
    "RoPE on a quarter of the dimensions": lambda i, K, D: 2 * i / (K // 4),
}
TURNED = {  # one part in … of a head's dimensions is rotated
    "RoPE on half of the dimensions": 2,
    "RoPE on half of the dimensions, frequencies of all": 2,
    "RoPE on a quarter of the dimensions": 4,
    "RoPE on a quarter of the dimensions, frequencies of all": 4,
}
BASES = {"": lambda base: base, "RoPE base 1e4": lambda base: 1e4, "RoPE base 5e5": lambda base: 5e5}

ALPHAS: Table = {  # of a first pass of L tokens; x = log2(L / seq_length)
    "": lambda x: 2 ** np.ceil(x + 1) - 1,
    "NTK off": lambda x: 0 * x,
    "NTK: floor for ceil": lambda x: 2 ** np.floor(x + 1) - 1,
    "NTK: without + 1": lambda x: 2 ** np.ceil(x) - 1,
    "NTK: without - 1": lambda x: 2 ** np.ceil(x + 1),
}
LENGTHS: Table = {  # which length makes α; L: the first pass, t: the position, T: all
    "": lambda L, t, T: L,
    "NTK: α of the final length": lambda L, t, T: T,
    "NTK: α anew at each decode step": lambda L, t, T: np.maximum(L, t + 1),
}
NTK = [*ALPHAS, *LENGTHS, "NTK: exponent 1", "NTK: α divides positions"]


def bfloat16(x: Array) -> Array:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def logn(n: Array, s: int, T: int = 0) -> Array:
    return np.where(n > s, np.log(np.maximum(n, 1)) / math.log(s), 1)


LOGN: Table = {  # the factor at length n = position + 1; s: seq_length, T: all positions
    "": logn,
    "no LogN": lambda n, s, T: np.ones(n.shape),
    "LogN: log2 over ln": lambda n, s, T: np.where(n > s, np.log2(n) / math.log(s), 1),
    "LogN: log10 over ln": lambda n, s, T: np.where(n > s, np.log10(n) / math.log(s), 1),
    "LogN: square root for log": lambda n, s, T: np.where(n > s, np.sqrt(n / s), 1),
    "LogN: by the total length": lambda n, s, T: logn(0 * n + T, s),
    "LogN: below the trained length, too": lambda n, s, T: np.log(n) / math.log(s),
    "LogN: twice": lambda n, s, T: logn(n, s) ** 2,
    "LogN: table in float16": lambda n, s, T: logn(n, s).astype(np.float16),
    "LogN: table in bfloat16": lambda n, s, T: bfloat16(logn(n, s)),
    "LogN: one position early": lambda n, s, T: logn(n + 1, s),
    "LogN: one position late": lambda n, s, T: logn(n - 1, s),
}
LOGN_ON = {"LogN: on keys": "k", "LogN: on keys and queries": "qk", "LogN: on values": "v"}

# What a block adds, times …; attention and MLP

STREAM_1 = {"": 1, "attention's residual not added": 0, "attention's residual halved": 0.5}
STREAM_2 = {"": 1, "MLP's residual not added": 0, "MLP's residual halved": 0.5}
ADDED_1 = {"": 1, "attention left out": 0, "attention added twice": 2}
ADDED_2 = {"": 1, "MLP left out": 0, "MLP added twice": 2}

# What leaves the model


def shifted(x: Array, by: int, edge: bool) -> Array:
    """(B, T, V) by one position; at the edge the same again, or zeros."""
    out = np.roll(x, by, 1)
    at = 0 if by > 0 else -1
    out[:, at] = x[:, at] if edge else 0
    return out


def top_k(x: Array, floor: float) -> Array:
    return np.where(x >= np.sort(x, -1)[..., -20, None], x, floor)


def top_p(x: Array, floor: float) -> Array:
    order = np.argsort(-x, -1)
    p = np.take_along_axis(softmax(x), order, -1)
    before = np.empty(x.shape)
    np.put_along_axis(before, order, p.cumsum(-1) - p, -1)
    return np.where(before < 0.8, x, floor)


def counts(x: Array, ids: Array) -> Array:
    """(B, T, V): how often each id was there, up to the position."""
    return (ids[..., None] == np.arange(x.shape[-1])).cumsum(1)


LEAVING: Table = {
    "": lambda x, ids: x,
    "logits one position early": lambda x, ids: shifted(x, -1, True),
    "logits one position late": lambda x, ids: shifted(x, 1, True),
    "logits one position early, zeros last": lambda x, ids: shifted(x, -1, False),
    "logits one position late, zeros first": lambda x, ids: shifted(x, 1, False),
    "log-softmax": lambda x, ids: np.log(softmax(x)),
    "softmax": lambda x, ids: softmax(x),
    "logits / 0.7": lambda x, ids: x / 0.7,
    "logits × 2": lambda x, ids: x * 2,
    "logits capped at 30": lambda x, ids: 30 * np.tanh(x / 30),
    "logits capped at 5": lambda x, ids: 5 * np.tanh(x / 5),
    "logits clamped to ±3": lambda x, ids: np.clip(x, -3, 3),
    "top-k 20, -1e9": lambda x, ids: top_k(x, -1e9),
    "top-k 20, -inf": lambda x, ids: top_k(x, -np.inf),
    "top-p 0.8, -1e9": lambda x, ids: top_p(x, -1e9),
    "top-p 0.8, -inf": lambda x, ids: top_p(x, -np.inf),
    "repetition penalty 1.1": lambda x, ids: np.where(
        counts(x, ids) > 0, np.where(x > 0, x / 1.1, x * 1.1), x
    ),
    "presence penalty 0.5": lambda x, ids: x - 0.5 * (counts(x, ids) > 0),
    "frequency penalty 0.5": lambda x, ids: x - 0.5 * counts(x, ids),
    "logits in float16": lambda x, ids: x.astype(np.float16),
    "logits negative": lambda x, ids: -x,
    "logits' columns rolled by one": lambda x, ids: np.roll(x, 1, -1),
    "logits minus the maximum": lambda x, ids: x - x.max(-1, keepdims=True),
}
FINAL = ["final norm missing", "final norm twice", "final norm is LayerNorm", "final norm without weight"]
FINAL += ["head tied to the embedding", "head's rows shifted by one", "head in float16"]

# What enters it

ENTERING: Table = {
    "": lambda ids, V: ids,
    "embedding of id + 1": lambda ids, V: (ids + 1) % V,
    "embedding of id - 1": lambda ids, V: (ids - 1) % V,
    "ids reversed": lambda ids, V: ids[:, ::-1],
    "first token dropped, last repeated": lambda ids, V: np.append(ids[:, 1:], ids[:, -1:], 1),
}
BEFORE = {f"token {n} before, {end} T": (n, end) for n in (0, 1, -1, 7) for end in ("last", "first")}
EMBEDDING: Table = {
    "": lambda x: x,
    "embedding × √D": lambda x: x * math.sqrt(x.shape[-1]),
    "embedding normalised": lambda x: rms(x, 1e-6),
}

# Which layers run, and their weights

PLANS: Table = {  # n layers, the mistake at i
    "": lambda n, i: [*range(n)],
    "a layer and the next swapped": lambda n, i: [*range(i), i + 1, i, *range(i + 2, n)],
    "layers in reverse order": lambda n, i: [*range(n)][::-1],
    "layer 0 loaded as layer 1, too": lambda n, i: [0, 0, *range(2, n)],
    "a layer left out": lambda n, i: [*range(i), *range(i + 1, n)],
    "a layer run twice": lambda n, i: [*range(i + 1), *range(i, n)],
}
NAMES = {  # of a layer's tensors
    "ln_1.weight": "ln_1",
    "attn.c_attn.weight": "qkv",
    "attn.c_attn.bias": "bias",
    "attn.c_proj.weight": "out",
    "ln_2.weight": "ln_2",
    "mlp.w1.weight": "up",
    "mlp.w2.weight": "gate",
    "mlp.c_proj.weight": "down",
}
MATRICES = ("qkv", "q", "k", "v", "out", "up", "gate", "down")


def four_bits(w: Array, off: int) -> Array:
    """(out, in) rounded to 4 bits in groups of 32 inputs, unpacked with the zero point 8 + off."""
    groups = w.reshape(len(w), -1, 32)
    scale = abs(groups).max(-1, keepdims=True) / 7
    codes = np.round(groups / scale) + 8  # 1 to 15
    return (scale * (codes - (8 + off))).reshape(w.shape)


CHANGED: Table = {  # a matrix (out, in)
    "zero": lambda w: 0 * w,
    "doubled": lambda w: 2 * w,
    "rows rolled by one": lambda w: np.roll(w, 1, 0),
    "in 4 bits, zero point one too high": lambda w: four_bits(w, 1),
    "in 4 bits, zero point one too low": lambda w: four_bits(w, -1),
    "transposed": lambda w: w.T,
}
BIASES = {  # q's, k's and v's, times …
    "bias missing": (0, 0, 0),
    "bias added twice": (2, 2, 2),
    "bias on q only": (1, 0, 0),
    "bias of q missing": (0, 1, 1),
    "bias of k missing": (1, 0, 1),
    "bias of v missing": (1, 1, 0),
}
SWAPPED = {
    "gate and up swapped": ("gate", "up"),
    "q and k swapped": ("q", "k"),
    "q and v swapped": ("q", "v"),
    "k and v swapped": ("k", "v"),
}


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """The bfloat16 tensors of a safetensors file, in float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", name
            first, last = entry["data_offsets"]
            words = np.frombuffer(data[start + first : start + last], "<u2").astype("<u4")
            yield name, (words << 16).view("<f4").reshape(entry["shape"]).copy()


class Port:
    def __init__(
        self, folder: str | Path, mistake: str = "", dtype: str = "float32", layer: int | None = None
    ) -> None:
        self.mistake, self.layer, self.dtype = mistake, layer, np.dtype(dtype)
        self.wide = np.promote_types(self.dtype, np.float32)  # of norms and angles
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.D, self.K = self.config["hidden_size"], self.config["kv_channels"]
        self.H, self.n = self.config["num_attention_heads"], self.config["num_hidden_layers"]
        self.seq = self.config["seq_length"] * (2 if mistake == "seq_length doubled" else 1)
        weights = {}
        for shard, path in enumerate(sorted(Path(folder).glob("model*.safetensors")), 1):
            noise = np.random.default_rng(shard)
            for name, value in tensors(path):
                if mistake == f"shard {shard} with 5 % noise":
                    value *= 1 + 0.05 * noise.standard_normal(value.shape)
                weights[name.removeprefix("transformer.")] = value.astype(self.dtype)
        self.embed, self.ln_f = weights["wte.weight"], weights["ln_f.weight"]
        self.head = weights["lm_head.weight"]
        self.layers = [{our: weights[f"h.{i}.{name}"] for name, our in NAMES.items()} for i in range(self.n)]
        for i in range(self.n):
            self.spoil(i)

    def wrong(self, mistake: str, layer: int | None = None) -> bool:
        """Whether the mistake is made here. In the final norm, layer n, it is if no layer was chosen."""
        return self.mistake == mistake and (layer is None or self.layer in (None, layer))

    def pick(self, table: dict[str, Any], layer: int | None = None) -> Any:
        return table[self.mistake if self.mistake in table and self.wrong(self.mistake, layer) else ""]

    def matrix(self, i: int, name: str) -> Array:
        """A layer's matrix, or a third of c_attn: a view, to be changed."""
        third = "qkv".find(name) if len(name) == 1 else -1
        return self.layers[i][name] if third < 0 else self.layers[i]["qkv"].reshape(3, self.D, -1)[third]

    def spoil(self, i: int) -> None:
        name, _, change = self.mistake.partition(" ")
        if not self.wrong(self.mistake, i):
            return
        if change in CHANGED and name in MATRICES:
            matrix = self.matrix(i, name)
            matrix[:] = CHANGED[change](matrix.copy())
        if change == "of the next layer":
            self.matrix(i, name)[:] = self.matrix(i + 1, name)
        bias = self.layers[i]["bias"].reshape(3, -1)
        if self.mistake in BIASES:
            bias *= np.array(BIASES[self.mistake]).astype(self.dtype)[:, None]
        if self.mistake in SWAPPED:
            a, b = SWAPPED[self.mistake]
            one, other = self.matrix(i, a), self.matrix(i, b)
            one[:], other[:] = other.copy(), one.copy()
            if len(a) == 1:
                bias[["qkv".index(a), "qkv".index(b)]] = bias[["qkv".index(b), "qkv".index(a)]]

    def norm(self, x: Array, weight: Array, layer: int) -> Array:
        x = self.pick(NORMS, layer)(x.astype(self.wide), self.config["layer_norm_epsilon"], self.K)
        return x.astype(self.dtype) * self.pick(NORM_WEIGHTS, layer)(weight)

    def angles(self, layer: int) -> Array:
        """(B, T, width / 2)"""
        width = self.K // (TURNED.get(self.mistake, 1) if self.wrong(self.mistake, layer) else 1)
        base = self.pick(BASES, layer)(self.config["rotary_emb_base"])
        positions = self.pick(POSITIONS, layer)(self.t, self.P, self.t.max() + 1).astype(self.wide)
        alpha = self.alpha[..., None]
        if self.wrong("NTK: α divides positions"):
            positions, alpha = positions / self.alpha, 1
        power = 1 if self.wrong("NTK: exponent 1") else self.K / (self.K - 2)
        exponents = self.pick(EXPONENTS, layer)(np.arange(width // 2), self.K, self.D)
        frequencies = ((base * alpha**power) ** -exponents).astype(self.wide)
        return positions[..., None].astype(self.wide) * frequencies

    def rotate(self, x: Array, angles: Array, layer: int) -> Array:
        """RoPE on x (B, T, H, K): halves of a head are turned together."""
        cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        if self.wrong("angles' sign turned", layer):
            sin = -sin
        if self.wrong("cos and sin swapped", layer):
            cos, sin = sin, cos
        half = angles.shape[-1]
        one, other = slice(0, half), slice(half, 2 * half)
        if self.wrong("interleaved RoPE", layer):
            one, other = slice(0, None, 2), slice(1, None, 2)
        out = x.astype(self.wide)
        a, b = x[..., one], x[..., other]
        out[..., one], out[..., other] = a * cos - b * sin, b * cos + a * sin
        if self.wrong("RoPE on half of the heads", layer):
            out[:, :, self.H // 2 :] = x[:, :, self.H // 2 :]
        return out.astype(self.dtype)

    def sight(self, layer: int) -> Array:
        """(B, 1, T, T): which keys a query sees."""
        t = np.arange(self.t.shape[1])
        seen = self.pick(SEEN, layer)(t, t[:, None], self.first)
        if not (self.wrong("padding seen") or self.wrong("attention_mask ignored")):
            seen = seen & self.real[:, None]
        return np.broadcast_to(seen, (len(self.t), *seen.shape[-2:]))[:, None]

    def attention(self, x: Array, i: int, stage: Callable[[str, Array], None]) -> Array:
        B, T, D = x.shape
        qkv = x @ self.layers[i]["qkv"].T + self.layers[i]["bias"]
        q, k, v = (part.reshape(B, T, self.H, self.K) for part in np.split(qkv, 3, -1))
        stage("attn.q", q), stage("attn.k", k), stage("attn.v", v)
        angles = self.angles(i)
        q = q if self.wrong("q not rotated", i) else self.rotate(q, angles, i)
        k = k if self.wrong("k not rotated", i) else self.rotate(k, angles, i)
        v = self.rotate(v, angles, i) if self.wrong("v rotated, too", i) else v
        stage("attn.q_rotated", q), stage("attn.k_rotated", k)
        if self.config["use_logn_attn"]:
            factor = self.pick(LOGN, i)(self.t + 1, self.seq, T).astype(self.dtype)[..., None, None]
            on = LOGN_ON.get(self.mistake, "q")
            q, k, v = (x * factor if name in on else x for name, x in zip("qkv", (q, k, v), strict=True))
        stage("attn.q_scaled", q)

        seen = self.sight(i)
        if self.wrong("decode: keys one slot too low, empty slot seen"):
            k, v = (np.append(x, np.zeros_like(x[:, :1]), 1) for x in (k, v))
            empty = np.broadcast_to((np.arange(T) >= self.first)[:, None], (B, 1, T, 1))
            seen = np.append(seen, empty, -1)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, H, T, K)
        scores = q @ k.swapaxes(2, 3) * self.pick(SCALES, i)(self.K, D)
        scores = np.where(seen, scores, np.finfo(self.dtype).min)  # finite: padding sees nothing
        mixed = (self.pick(SOFTMAX, i)(scores) @ v).swapaxes(1, 2)  # (B, T, H, K)
        if self.wrong("heads in reverse order before out", i):
            mixed = mixed[:, :, ::-1]
        mixed = mixed.reshape(B, T, D)
        stage("attn.mixed", mixed)
        return mixed if self.wrong("attention not projected", i) else mixed @ self.layers[i]["out"].T

    def mlp(self, x: Array, i: int, stage: Callable[[str, Array], None]) -> Array:
        gate, up = x @ self.layers[i]["gate"].T, x @ self.layers[i]["up"].T
        product = self.pick(PRODUCTS, i)(gate, up).astype(self.dtype)
        stage("mlp.gate", gate), stage("mlp.up", up), stage("mlp.product", product)
        return product @ self.layers[i]["down"].T

    def block(self, x: Array, i: int, stage: Callable[[str, Array], None]) -> Array:
        def wrong(mistake: str) -> bool:
            return self.wrong(mistake, i)

        ln_1, ln_2 = self.layers[i]["ln_1"], self.layers[i]["ln_2"]
        before, after = x, wrong("norm after attention and MLP")
        h = x if after or wrong("attention's norm left out") else self.norm(x, ln_1, i)
        stage("attn_norm", h)
        a = self.attention(h, i, stage)
        stage("attn.out", a)
        if after:
            a = self.norm(a, ln_1, i)
        if wrong("normed stream as the residual"):
            x = h
        x = self.pick(STREAM_1, i) * x + self.pick(ADDED_1, i) * a
        stage("attn_residual", x)

        if wrong("ln_1's weight for ln_2"):
            ln_2 = ln_1
        h = before if wrong("attention and MLP parallel") else x
        if not (after or wrong("MLP's norm left out")):
            h = self.norm(h, ln_2, i)
        stage("mlp_norm", h)
        m = self.mlp(h, i, stage)
        stage("mlp.down", m)
        if after:
            m = self.norm(m, ln_2, i)
        if wrong("normed stream as the residual"):
            x = h
        if wrong("MLP's residual from before attention"):
            x = before
        x = self.pick(STREAM_2, i) * x + self.pick(ADDED_2, i) * m
        if wrong("MLP done twice"):
            x = x + self.mlp(self.norm(x, ln_2, i), i, lambda *_: None)
        stage("residual", x)
        return x

    def output(self, x: Array, stage: Callable[[str, Array], None]) -> Array:
        weight = np.ones_like(self.ln_f) if self.wrong("final norm without weight") else self.ln_f
        if self.wrong("final norm is LayerNorm"):
            x = layer_norm(x, self.config["layer_norm_epsilon"]) * weight
        elif not self.wrong("final norm missing"):
            x = self.norm(x, weight, self.n)
        if self.wrong("final norm twice"):
            x = self.norm(x, weight, self.n)
        stage("norm", x)
        head = self.embed if self.wrong("head tied to the embedding") else self.head
        if self.wrong("head's rows shifted by one"):
            head = np.append(head[1:], 0 * head[:1], 0)
        if self.wrong("head in float16"):
            x, head = x.astype(np.float16), head.astype(np.float16)
        return x @ head.T

    def forward(self, ids: Array, first: int, mask: Array | None) -> dict[str, Array]:
        kept: dict[str, Array] = {}
        token, end = BEFORE.get(self.mistake, (0, ""))
        if end:
            ids, first = np.insert(ids, 0, token % len(self.head), 1), first + 1
        self.first, self.real = first, np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        counted = self.wrong("padding counted in positions") or self.wrong("attention_mask ignored")
        padding = (~self.real).sum(-1, keepdims=True) * (not counted)
        self.t = np.maximum(np.arange(ids.shape[1]) - padding, 0)  # (B, T)
        self.P = first - padding  # (B, 1)
        self.alpha = np.ones(ids.shape)
        if self.config["use_dynamic_ntk"]:
            prompt = first if self.wrong("NTK: α of the padded length") else self.P
            length = self.pick(LENGTHS)(prompt, self.t, ids.shape[1])
            self.alpha *= np.maximum(self.pick(ALPHAS)(np.log2(length / self.seq)), 1)

        entered = self.pick(ENTERING)(ids, len(self.head))
        x = self.pick(EMBEDDING)(self.embed[entered]).astype(self.dtype)
        kept["embed"] = x
        for at, i in enumerate(self.pick(PLANS)(self.n, self.layer or 0)):
            x = self.block(x, i, lambda name, value, at=at: kept.update({f"blocks.{at}.{name}": value}))
        logits = self.output(x, lambda name, value: kept.update({name: value}))
        kept["logits"] = self.pick(LEAVING)(logits, ids).astype(self.dtype)
        if end:
            kept = {name: x[:, 1:] if end == "last" else x[:, :-1] for name, x in kept.items()}
        return kept


def stages(
    folder: str | Path, ids: Array, prefill_length: int | None = None, mask: Array | None = None, **wrong: Any
) -> dict[str, Array]:
    """All stages of ids (B, T) by a bundle's names. The first prefill_length positions are the prompt.

    wrong: mistake="", layer=None for all of them, dtype="float32"
    """
    return Port(folder, **wrong).forward(ids, prefill_length or ids.shape[1], mask)


def run(folder: str | Path, ids: Array, *options: Any, **wrong: Any) -> Array:
    """The logits (B, T, V) of ids (B, T); options as in `stages`."""
    return stages(folder, ids, *options, **wrong)["logits"]
