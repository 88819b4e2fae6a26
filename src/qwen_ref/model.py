"""What first-generation Qwen computes, exactly: a decoder-only transformer. Parts first, class Qwen last.

A text comes in as token ids. An embedding turns each id into a vector of D numbers, the residual stream.
Every layer changes this stream twice: attention adds what a position reads from itself and earlier positions,
then the MLP adds what it computes from each position alone. After the last layer the output head turns the
stream into logits: a score for every token of the vocabulary. The logits at a position tell which token
comes next.

The same as Llama 2: residual blocks with the norm in front (pre-norm), RMSNorm, rotary positions, SwiGLU, an
untied output head. What differs:
- q, k and v come from one fused projection, with the only bias in the model; its rows are stacked [q; k; v].
- Every query head has its own keys and values at every size; Llama 2 70B groups them.
- Dimensions i and i + K/2 of a head turn together. Meta's code pairs neighbours; Hugging Face's does as here.
- The 72B's rotary embedding has base 1e6 ("extended base"): 24 of a head's 64 pairs of dimensions turn less
  than once within 32k positions. With base 1e4, only 4 pairs do.
- The smaller models have base 1e4. Dynamic NTK raises it for prompts longer than the trained length, and LogN
  multiplies queries at positions beyond it by a logarithm of their position.
- The embedding and the output head have more rows than the tokenizer has ids.

One letter a dimension, here and in every shape comment:
    B  batch         T  new positions      S  positions attended to: those cached and the T new ones
    D  hidden size   H  heads (of a rank)  K  size of one head
    F  MLP width     V  vocabulary

Weights, activations and the cache have the model's dtype. RMSNorm and the rotation compute in float32, then
round to it. A float64 model is float64 throughout; every other dtype is judged against it.

Several ranks (processes) may share a model. Each has some of the heads, MLP channels and vocabulary rows. The
comment beside a layer says which part of its weight W (out, in) a rank has; parallel.py has the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.config import InputError, QwenConfig, lacks_memory, shown, whole
from qwen_ref.parallel import (  # with one rank they are nn.Linear and nn.Embedding
    ONE_RANK,
    ColumnParallelLinear,
    Group,
    HeadParallelLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight  # rounded before the weight is applied, as published


class Positions(NamedTuple):
    """What attention needs to know of the T new positions. Rows of a batch share it unless one is padded."""

    cos: Tensor  # (1 or B, T, 1, K/2)
    sin: Tensor  # (1 or B, T, 1, K/2)
    query_scale: Tensor | None  # (1 or B, T, 1, 1): LogN, in the models that use it
    mask: Tensor | None  # (1 or B, 1, T, S), True: the query sees the key; None: plainly causal


def ntk_alpha(prompt_length: int, seq_length: int) -> int:
    """Dynamic NTK's α: 1 up to the trained length, then 2^ceil(log2(prompt_length / seq_length) + 1) − 1.

    >>> [ntk_alpha(length, 8192) for length in (100, 8192, 8193, 16384, 16385)]
    [1, 1, 3, 3, 7]
    """
    return max(2 ** math.ceil(math.log2(prompt_length / seq_length) + 1) - 1, 1)


def rotary_frequencies(config: QwenConfig, prompt_lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Radians per position for each pair i < K/2 of dimensions: base^(−2i/K) → (prompts, K/2).

    Su et al. 2021, section 3.2.2. Dynamic NTK first multiplies the base by α^(K/(K−2)); each prompt's length
    gives its α. The slowest pair takes α times as many positions for a turn, the fastest as many as before.
    """
    K = config.kv_channels
    exponents = torch.arange(0, K, 2, dtype=dtype, device="cpu") / K
    rows = []
    for length in prompt_lengths:
        base = config.rotary_emb_base
        if config.use_dynamic_ntk:
            base *= ntk_alpha(length, config.seq_length) ** (K / (K - 2))
        rows.append(1.0 / base**exponents)
    return torch.stack(rows)


def rotation_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency: (B, T), (B, K/2) → (B, T, 1, K/2) each."""
    angles = (positions[:, :, None] * frequencies[:, None])[:, :, None]  # (B, T, 1, K/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of dimensions (i, i + K/2) of x (B, T, H, K) by its angle."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # (B, T, H, K/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def logn_scale(positions: Tensor, seq_length: int, dtype: torch.dtype) -> Tensor:
    """log(p + 1) / log(seq_length) for 0-based positions p beyond the trained length, 1 within it."""
    scale = torch.log(positions.double() + 1) / math.log(seq_length)  # on the CPU: Apple's GPUs lack float64
    return scale.clamp(min=1.0).to(dtype)


def causal_mask(T: int, S: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, 1, T, S): a query sees its own key and those before it, but no padding of its row."""
    queries = torch.arange(S - T, S, device=device)[:, None]
    keys = torch.arange(S, device=device)
    mask = (keys <= queries)[None, None]
    if padding is not None:
        # A query at a padding position sees its own key. With no key at all, its softmax would give NaN.
        mask = (mask & (keys >= padding.to(device)[:, None, None, None])) | (keys == queries)
    return mask


class KVCache:
    """The keys and values of every position so far, allocated for max_length, owned by the caller.

    It also keeps what depends on its sequences: their padding on the left, and the rotary frequencies, which
    the prompt's length fixes. The model keeps neither, so two caches of one model do not disturb each other.
    """

    def __init__(
        self, layers: int, shape: tuple[int, int, int, int], prompt_length: int | None, like: Tensor
    ) -> None:
        self.keys = [like.new_empty(shape) for _ in range(layers)]  # (B, H, max_length, K) each
        self.values = [like.new_empty(shape) for _ in range(layers)]
        self.batch_size, _, self.max_length, _ = shape
        self.length = 0  # positions filled
        self.prompt_length = prompt_length  # None: that of the first call
        self.padding: Tensor | None = None  # (B,), on the CPU, or None if no row is padded
        self.text_end: int | None = None  # from here on a row holds filler, not text (generate_batch)
        self.frequencies: Tensor | None = None  # (1 or B, K/2), from the first call on

    def __repr__(self) -> str:
        held = f"{self.length} of {self.max_length} positions, batch of {self.batch_size}"
        return f"{type(self).__name__}({held}, {len(self.keys)} layers, {self.keys[0].dtype})"

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's T new positions (B, H, T, K); returns all S. hidden_states advances `length`."""
        T, end = k.shape[2], self.length + k.shape[2]
        self.keys[layer].narrow(2, self.length, T).copy_(k)  # fails if there is no room; a slice does not
        self.values[layer].narrow(2, self.length, T).copy_(v)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """softmax(q kᵀ / √K) v for every head, causal (Vaswani et al. 2017, section 3.2.1)."""

    def __init__(self, config: QwenConfig, group: Group) -> None:
        super().__init__()
        D = config.hidden_size
        self.head_size = config.kv_channels
        self.qkv = HeadParallelLinear(D, 3 * D, group)  # D → 3 · H · K: in each third, its heads' rows of W
        self.out = RowParallelLinear(D, D, group)  # H · K → D: its heads' columns of W

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, -1, self.head_size)  # (B, T, 3, H, K)
        q, k, v = qkv.unbind(dim=2)  # (B, T, H, K) each
        q = rotate(q, at.cos, at.sin)
        k = rotate(k, at.cos, at.sin)
        if at.query_scale is not None:
            q = q * at.query_scale
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
        mixed = self.mix(q, k, v, at.mask, cache, layer)  # (B, H, T, K)
        return self.out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, H·K) → (B, T, D)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """For each query (B, H, T, K): the mean of the values that it sees, weighted by the softmax."""
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, K)
        # torch computes softmax(q kᵀ / √K + mask) v. The scores are (B, H, T, S); the mask is 0 where a query
        # sees a key and −∞ elsewhere. is_causal=True means a causal mask in which query i sees keys 0 to i.
        # That is right only if T = S. A single new token sees every key and needs no mask.
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class MLP(nn.Module):
    """down(up(x) · silu(gate(x))): SwiGLU (Shazeer 2020, equation 6)."""

    def __init__(self, config: QwenConfig, group: Group) -> None:
        super().__init__()
        D, width = config.hidden_size, config.mlp_width
        self.gate = ColumnParallelLinear(D, width, group)  # D → F: its channels' rows of W; up as well
        self.up = ColumnParallelLinear(D, width, group)
        self.down = RowParallelLinear(width, D, group)  # F → D: its channels' columns of W

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


class Block(nn.Module):
    """One layer: each half reads the normalised residual stream and adds to it."""

    def __init__(self, config: QwenConfig, group: Group) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, group)
        self.mlp_norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config, group)

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.attn(self.attn_norm(x), at, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Qwen(nn.Module):
    """The whole model: token ids (B, T) → logits (B, T, V), position t scoring the token that follows t."""

    def __init__(self, config: QwenConfig, group: Group = ONE_RANK) -> None:
        super().__init__()
        config.check_ranks(group.size)
        self.config = config
        self.group = group
        self.embed = VocabularyParallelEmbedding(config.vocab_size, config.hidden_size, group)
        self.blocks = nn.ModuleList(Block(config, group) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = VocabularyParallelHead(config.hidden_size, config.vocab_size, group)
        self.cache_type = KVCache  # the class for new_cache; --fast and --kv-cache int8 set another one

    def __repr__(self) -> str:  # in place of torch's tree of modules, which blocks[0] still shows
        D, F, V = self.config.hidden_size, self.config.mlp_width, self.config.vocab_size
        block = 3 * D * D + 3 * D + D * D + 3 * D * F + 2 * D  # qkv with its bias, out, the MLP, two norms
        count, weight = V * D + len(self.blocks) * block + D + V * D, self.embed.weight
        return f"Qwen({count:,} parameters, {weight.dtype} on {weight.device}, {self.config})"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits (B, T, V), in the model's dtype; those at position t score the token at t + 1.

        input_ids: (B, T), int64, on the CPU or on the model's device.
        attention_mask: (B, T), 1 for a token, 0 for padding, on the left only. Padding does not change the
        logits of a row's tokens. The logits at padding mean nothing.
        cache: the T new positions are appended to those in it. The result is the same for a text in one call,
        in chunks or token by token. cache=None: one full forward pass. The cache keeps the padding of the
        first call's mask. That mask may cover the whole prompt, more than the T tokens of the first call.
        Raises ValueError for ids outside the vocabulary, wrong shapes, other padding and a full cache.
        With several ranks, all make the same calls and get all logits.
        """
        return self.lm_head(self.hidden_states(input_ids, attention_mask, cache))

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """The input of lm_head, (B, T, D). After prefill, give lm_head the last position only: V is large."""
        check_inputs(self.config.vocab_size, input_ids, attention_mask, cache)
        x = self.embed(input_ids)  # (B, T, D)
        at = self._positions(x, attention_mask, cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, at, cache, layer)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

    def new_cache(
        self, batch_size: int = 1, max_length: int = 2048, prompt_length: int | None = None
    ) -> KVCache:
        """An empty cache for batch_size rows of up to max_length positions.

        prompt_length: of the whole prompt, if it comes in several calls: dynamic NTK chooses its base by it.
        None means the first call's length. Raises ValueError if there is not enough memory for
        2 · layers · B · max_length · H · K numbers. A CPU's memory is taken only when positions are written.
        """
        batch_size, max_length = whole("batch_size", batch_size), whole("max_length", max_length)
        if prompt_length is not None:
            prompt_length = whole("prompt_length", prompt_length, most=max_length)
        heads = self.config.num_attention_heads // self.group.size
        shape = (batch_size, heads, max_length, self.config.kv_channels)
        size = 2 * len(self.blocks) * math.prod(shape) * self.embed.weight.element_size()
        try:
            if size < 2**63:
                return self.cache_type(len(self.blocks), shape, prompt_length, like=self.embed.weight)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
        limit = f"more than {self.embed.weight.device} has left; ask for fewer positions or rows"
        takes = f"a cache of {batch_size} × {max_length} positions takes up to {size / 1e9:,.3f} GB"
        raise InputError(f"{takes}, {limit}")

    def _positions(self, x: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Positions:
        T, past = x.shape[1], cache.length if cache is not None else 0
        if cache is not None and past > 0:
            padding, frequencies = cache.padding, cache.frequencies
            assert frequencies is not None  # the call that filled the first position has set it
        else:
            padding = None if attention_mask is None else left_padding(attention_mask.cpu())
            length = T if attention_mask is None else attention_mask.shape[1]
            if cache is not None and cache.prompt_length is not None:
                length = cache.prompt_length
            lengths = [length] if padding is None else [length - pad for pad in padding.tolist()]
            if min(lengths) < 1:
                raise InputError(f"prompt_length={length} must be longer than every row's padding")
            inner = torch.promote_types(x.dtype, torch.float32)
            frequencies = rotary_frequencies(self.config, lengths, inner).to(x.device)
            if cache is not None:
                cache.padding, cache.frequencies = padding, frequencies

        positions = torch.arange(past, past + T, device="cpu")[None]  # (1, T)
        if padding is not None:  # every row counts from its first token
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        cos, sin = rotation_tables(positions.to(x.device), frequencies)
        query_scale = mask = None
        if self.config.use_logn_attn:
            scale = logn_scale(positions, self.config.seq_length, x.dtype).to(x.device)
            query_scale = scale[:, :, None, None]
        if padding is not None or (past > 0 and T > 1):
            mask = causal_mask(T, past + T, padding, x.device)
        return Positions(cos, sin, query_scale, mask)


def check_inputs(V: int, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> None:
    """Raises ValueError for ids, a mask or a cache that do not fit each other or the vocabulary of V rows."""
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(given, Tensor) and (given is not None or name == "input_ids"):
            raise InputError(f"{name} must be a tensor, such as torch.tensor([ids]), not {shown(given)}")
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or 0 in input_ids.shape:
        what = f"{input_ids.dtype} {tuple(input_ids.shape)}"
        raise InputError(f"input_ids must be int64 of shape (batch, at least one token), not {what}")
    # The loops of generate.py keep their ids on the CPU, so that this check does not wait for another device.
    low, high = torch.stack(torch.aminmax(input_ids)).tolist()
    if low < 0 or high >= V:
        raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {V - 1}")
    (B, T), begun = input_ids.shape, cache is not None and cache.length > 0
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        longer = cache is not None and not begun and shape[:-1] == (B,) and shape[-1] > T
        if shape != (B, T) and not longer:
            wanted = f"the shape of input_ids {(B, T)}; positions already cached are not repeated in it"
            raise InputError(f"attention_mask {shape} must have {wanted}")
        if begun and not (attention_mask == 1).all():
            raise InputError("padding can only come first: the cache remembers the first attention_mask")
    if cache is not None and cache.batch_size != B:
        raise InputError(f"input_ids has {B} rows, the cache was made for {cache.batch_size}")
    if cache is not None and cache.length + T > cache.max_length:
        limit = f"the cache holds {cache.max_length}; make it with a larger max_length"
        raise InputError(f"{T} tokens do not fit behind the {cache.length} cached: {limit}")


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """Positions of padding at the start of each row of the mask (B, T) → (B,); None if no row has any."""
    T = attention_mask.shape[1]
    padding = (attention_mask == 0).sum(dim=1)
    real = torch.arange(T, device="cpu") >= padding[:, None]  # (B, T)
    if not (attention_mask == real).all() or (padding == T).any():
        raise InputError("attention_mask rows must be 0 … 0 1 … 1: padding on the left, at least one token")
    return padding if padding.any() else None
