# %% [markdown]
# # Qwen, step by step
#
# By the end of this page you can say what Qwen-72B computes, tensor by tensor, and you have run every step
# of it. You need Python, and to know what a matrix is.
#
# The numbers come from the small model that comes with the project. It has the 72B's architecture and file
# formats, 1,755,776 parameters instead of 72,287,920,128, and knows the capitals of the world. It is called
# the *tiny model* below. Where size matters, the published sizes are computed from their configurations.
#
# Every section has the same parts: why the step is there; its equation, and where that comes from; the
# project's own code, called on real tensors; what came out; what to look at. Each `assert` holds a number
# of the text to what was computed: one that is no longer right stops the page.
#
# A *tensor* is a table of numbers with any number of dimensions: a matrix has two. One letter a dimension, as
# in model.py:
#
# | letter | dimension | tiny | 72B |
# |---|---|---|---|
# | B | texts computed together | 1 | 1 |
# | T | tokens of the text | 13 | up to 32,768 |
# | D | numbers a token (hidden size) | 128 | 8,192 |
# | H | attention heads | 4 | 64 |
# | K | numbers a head, D / H | 32 | 128 |
# | F | channels of the MLP | 512 | 24,576 |
# | V | vocabulary | 2,752 | 152,064 |
#
# Run it with `python examples/learn/walkthrough.py`, or open it as a notebook with jupytext. `make
# walkthrough` writes one page with all figures, build/walkthrough.html.

# %%
import dataclasses
import math
import sys
import unicodedata

import draw_architecture
import torch
import walkthrough_figures as figures

from qwen_ref import QwenConfig, Tokenizer, load_model
from qwen_ref.commands.files import bundled_checkpoint

album = figures.Album.from_command_line("Runs through what Qwen computes, and prints what comes out.")

folder = bundled_checkpoint()
tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")
model = load_model(folder, "float32")
tiny, large = model.config, QwenConfig.preset("72b")
shapes = []
for config in (tiny, large):
    D, H, K = config.hidden_size, config.num_attention_heads, config.kv_channels
    F, V = config.mlp_width, config.vocab_size
    print(f"{config.num_hidden_layers} layers, {D=} {H=} {K=} {F=} {V=}")
    shapes.append((D, H, K, F, V))
assert shapes == [(128, 4, 32, 512, 2752), (8192, 64, 128, 24576, 152064)]

# %% [markdown]
# ## The whole machine
#
# Text becomes token ids. Each id becomes a vector of D numbers, a row of the embedding. The vectors of all
# tokens run down through the layers; that stream of vectors is called the *residual stream*. Each layer
# reads it twice and adds to it twice: attention lets tokens look at earlier tokens, the MLP works on every
# token by itself. At the end the output head gives every vocabulary entry a score, the *logit*, for being
# the next token.
#
# The picture has the real shapes of the 72B, and is drawn from its configuration. Keep it open: most
# sections below are boxes of it.

# %%
from qwen_ref.checkpoint import tensor_table

album.show("architecture", draw_architecture.architecture(large))

sizes = {"tiny": tiny} | {size: QwenConfig.preset(size) for size in ("1.8b", "7b", "14b", "72b")}
parameters = {}
for name, config in sizes.items():
    table = tensor_table(config)
    parameters[name] = sum(math.prod(spec.shape) for spec in table)
    print(f"{name:>5}: {parameters[name]:>14,} parameters in {len(table)} tensors")
assert parameters["72b"] == 72_287_920_128
assert parameters["tiny"] == 1_755_776
in_layers = sum(math.prod(spec.shape) for spec in tensor_table(large) if "blocks" in spec.name)
print(
    f"of the 72B's parameters {in_layers / parameters['72b']:.1%} are in its {large.num_hidden_layers} layers"
)

# %% [markdown]
# ## Text to pieces
#
# **Why.** The model reads numbers, so text is cut into tokens from a fixed list. The same letter can be
# written in two ways in Unicode: é is one character, or e followed by an accent. They look alike and would
# become different tokens. So the text is first brought into one form, NFC.
#
# Then a pattern cuts the text into *pieces*: about a word each, with the space before it. No token ever
# reaches across the border of two pieces.
#
# ```equation
# text → NFC(text) → pieces → tokens → ids
# ```
#
# *Source: NFC is Unicode Standard Annex #15; the pattern is `PATTERN` in tokenizer.py, as published with
# Qwen.*

# %%
from qwen_ref.tokenizer import split

accent_apart = "cafe\u0301"
print("characters before NFC:", len(accent_apart), " after:", len(unicodedata.normalize("NFC", accent_apart)))
assert tokenizer.encode(accent_apart) == tokenizer.encode("café")
assert split(accent_apart) != split("café")  # what NFC is for

text = "It's 2024: the café of Oslo, Norway"
pieces = split(unicodedata.normalize("NFC", text))
print(pieces)
assert "".join(pieces) == text

# %% [markdown]
# **What to look at.** The space belongs to the word that follows it; before a digit it is a piece by itself.
# `'s` is a piece of its own. In `2024` every digit is a piece; more on that below.
#
# In the figure a piece and the tokens it becomes share a colour. ␣ stands for a space. é is two bytes in
# UTF-8, and the tiny vocabulary has no token for the two, so they stay apart, shown as `0xc3` and `0xa9`.

# %%
ids_of = [tokenizer.encode(piece) for piece in pieces]
tokens_of = [[tokenizer.decode_bytes([token]) for token in ids] for ids in ids_of]
assert [token for ids in ids_of for token in ids] == tokenizer.encode(text)  # pieces are encoded one by one
album.show("pieces", figures.pieces_and_tokens(pieces, tokens_of, ids_of))

# %% [markdown]
# ## Merges, one by one
#
# **Why.** A vocabulary of whole words would never be complete; one of single bytes would make texts very
# long. Byte-pair encoding is between the two. It starts with bytes and merges the adjacent pair with the
# lowest rank, again and again, until no pair is a token. The ranks were learned: the first merge is the
# pair that was most frequent in the training text, and so on. Any text can be encoded, since every byte is
# a token.
#
# ```equation
# repeat: merge the adjacent pair whose joined bytes have the lowest rank
# ```
#
# *Source: Sennrich, Haddow and Birch 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2.*
#
# `merge_pairs` does all merges at once. To see them one by one, we let the vocabulary grow: with ranks only
# up to some limit, it stops there.

# %%
from qwen_ref.tokenizer import merge_pairs, read_ranks

ranks = {token: rank for rank, token in enumerate(read_ranks(folder / "qwen.tiktoken"))}


def merged(piece: bytes, limit: int) -> list[bytes]:
    """The parts of a piece once all merges up to this rank are done."""
    known = {token: rank for token, rank in ranks.items() if rank <= limit}
    return [tokenizer.decode_bytes([part]) for part in merge_pairs(piece, known)]


piece = b" Norway"
inside = sorted(rank for token, rank in ranks.items() if len(token) > 1 and token in piece)
states = [merged(piece, limit) for limit in (255, *inside)]
merges = 0
for limit, before, after in zip(inside, states, states[1:], strict=False):
    if after != before:
        merges += 1
        print(f"rank {limit:>4}: ", " | ".join(figures.labelled([part.decode() for part in after])))
assert merges == 5
assert states[0] == [bytes([byte]) for byte in piece]
assert [ranks[part] for part in states[-1]] == tokenizer.encode(" Norway") == [326, 1561]

# %% [markdown]
# **What to look at.** Five merges lead from seven bytes to two tokens. A low rank is merged early: `or` was
# frequent in the training text, `orway` much less. There is no token for all of `␣Norway`, so the model
# gets two.
#
# Chinese goes the same way. A character is three bytes of UTF-8, and frequent words are one token:

# %%
chinese = "冰岛的首都是"  # "the capital of Iceland is"
print("as bytes: ", chinese.encode().hex(" "))
print("as tokens:", [tokenizer.decode([token]) for token in tokenizer.encode(chinese)])
assert len(chinese.encode()) == 18
assert len(tokenizer.encode(chinese)) == 2

# %% [markdown]
# ## Digits, one by one
#
# **Why.** With merges, 2024 might be one token, 2025 two and 31 another one, each with a vector of its own.
# The model would have to learn the value of each by heart. As single digits, every number is spelled with
# the same ten tokens, and a digit's place says what it counts. The price is longer sequences for numbers.
#
# ```equation
# 2024 → 2 | 0 | 2 | 4          never 20 | 24 or 202 | 4
# ```
#
# *Source: the `\p{N}` without a `+` in `PATTERN`; Bai et al. 2023 (the Qwen technical report), section
# 2.2.*

# %%
from qwen_ref.generate import generate

for number in ("7", "2024", "3.14"):
    print(f"{number!r:>7} → {split(number)}")
assert split("2024") == ["2", "0", "2", "4"]

question = tokenizer.encode("12+7=")
answer = tokenizer.decode(step.token for step in generate(model, question, max_new_tokens=2))
print("12+7 =", answer)
assert answer == "19"

# %% [markdown]
# ## The text of this evening
#
# From here on we follow one text. It names one capital and asks for another, so the model must look at the
# right country. We run it once and keep every intermediate tensor: the parity kit (`qwen_ref.parity`, which
# checks other implementations) calls them *stages*, and names them as the layers of model.py.

# %%
from qwen_ref.parity.stages import Checkpoint, Port

prompt = "The capital of Norway is Oslo.\nThe capital of Japan is"
ids = torch.tensor([tokenizer.encode(prompt)])  # (B, T)
tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
B, T = ids.shape
print(f"{T} tokens:", tokens)
assert T == 13

stages = {}
Port(Checkpoint(folder), "float32", ids).run(lambda stage, value, start: stages.update({stage: value}))
for stage in ("embed", "blocks.0.attn.q", "blocks.0.mlp.up", "blocks.0.residual", "logits"):
    print(f"{stage:<18} {tuple(stages[stage].shape)}")
assert torch.allclose(stages["logits"], model(ids), atol=1e-4)

# %% [markdown]
# ## Embedding
#
# **Why.** An id is a name, not a quantity: token 742 is not more than token 741. So each id gets a vector
# that training has chosen. It is a row of a table of V rows.
#
# ```equation
# x_t = W[id_t]            W: (V, D) → x: (T, D)
# ```
#
# *Source: Vaswani et al. 2017, section 3.4; Qwen does not scale the rows.*

# %%
W = model.embed.weight
x = model.embed(ids)
print("table:", tuple(W.shape), " of this text:", tuple(x.shape))
assert torch.equal(x, stages["embed"])
one_hot = torch.nn.functional.one_hot(ids, tiny.vocab_size).float()
assert torch.equal(one_hot @ W, x)  # a look-up is a product with rows of one 1 and many 0

directions = W / W.norm(dim=1, keepdim=True)
(seven,) = tokenizer.encode("7")
cosines, nearest = (directions @ directions[seven]).topk(3)
for cosine, token in zip(cosines.tolist(), nearest.tolist(), strict=True):
    print(f"cosine to '7': {cosine:.2f}  {tokenizer.decode([token])!r}")
assert [tokenizer.decode([token]) for token in nearest.tolist()] == ["7", "6", "8"]
without_token = large.vocab_size - 151_851
print(f"in the 72B: {large.vocab_size * large.hidden_size:,} numbers, {without_token} rows without a token")
assert large.vocab_size - 151_851 == 213

# %% [markdown]
# **What to look at.** Nobody told the model that 6 and 8 are the neighbours of 7. Learning sums and
# counting was enough for their vectors to point in similar directions.
#
# V is larger than the number of tokens (151,851 in the published models): the table was padded to a rounder
# size. The 213 rows of the 72B beyond them are never looked up. The output head has as many.

# %% [markdown]
# ## RMSNorm
#
# **Why.** Layers add to the residual stream, so its vectors grow and differ in length. A layer should see
# directions, not lengths. RMSNorm divides each token's vector by its root mean square, then multiplies each
# of the D numbers by a learned weight. ε keeps a vector of zeros from being divided by 0.
#
# ```equation
# y = x / √(mean(x²) + ε) · w          x, y: (T, D)   w: (D)   ε = 10⁻⁶
# ```
#
# *Source: Zhang and Sennrich 2019, equation 4. LayerNorm, as in GPT-2, would subtract the mean as well.*

# %%
from qwen_ref.model import RMSNorm

x = stages["blocks.1.attn_residual"]  # what the second layer's MLP norm reads
norm = model.blocks[1].mlp_norm
y = norm(x)
of_ones = RMSNorm(tiny.hidden_size, tiny.layer_norm_epsilon).requires_grad_(False)
without_weight = of_ones(x)
assert torch.allclose(y, x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight, atol=1e-5)
assert torch.equal(y, stages["blocks.1.mlp_norm"])


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1).sqrt()


print("root mean square before:", [round(value, 2) for value in rms(x)[0].tolist()])
print("              and after:", [round(value, 2) for value in rms(without_weight)[0].tolist()])
assert torch.allclose(rms(without_weight), torch.ones(B, T), atol=1e-3)
assert torch.allclose(norm(10 * x), y, atol=1e-4)  # ten times as long: the same result
album.show("rmsnorm", figures.norm_before_and_after(tokens, rms(x)[0], rms(without_weight)[0]))

# %% [markdown]
# **What to look at.** Every root mean square is 1 afterwards. A detail that is easy to miss: in bfloat16
# (the form of the published weights: 16 bits, 8 of them significant; float32 has 24) the division happens in
# float32, the result is rounded, and only then the weight is applied.

# %% [markdown]
# ## Queries, keys and values
#
# **Why.** In attention every token asks a question and every earlier token may answer. From its normalised
# vector a token makes three: the *query* is what it looks for, the *key* what it can be found by, the
# *value* what it hands over. All three come from one matrix, with the only bias of the model; its rows are
# stacked [q; k; v]. Each is then cut into H heads of K numbers, which look for different things.
#
# ```equation
# [q, k, v] = x W_qkvᵀ + b            x: (T, D)   W_qkv: (3 D, D)   q, k, v: (T, H, K)
# ```
#
# *Source: Vaswani et al. 2017, section 3.2.2; the bias: Bai et al. 2023, part 2.*

# %%
attention = model.blocks[2].attn
qkv = attention.qkv(stages["blocks.2.attn_norm"]).view(B, T, 3, tiny.num_attention_heads, tiny.kv_channels)
q, k, v = qkv.unbind(dim=2)
print("q, k and v:", tuple(q.shape), " W_qkv:", tuple(attention.qkv.weight.shape))
assert torch.allclose(q, stages["blocks.2.attn.q"], atol=1e-5)
assert torch.allclose(v, stages["blocks.2.attn.v"], atol=1e-5)

# %% [markdown]
# ## RoPE: where a token stands
#
# **Why.** So far the order of tokens plays no role. The rotary embedding puts it in: query and key are
# turned by an angle that grows with the position. Numbers i and i + K/2 of a head form a pair, a point in a
# plane, and each of the K/2 pairs turns at a speed of its own: pair 0 by one radian a position, the last
# one hardly at all.
#
# ```equation
# f_i = base^(−2i/K)                         radians a position, i = 0 … K/2 − 1
# a' = a cos(p f_i) − b sin(p f_i)           a = x[i], b = x[i + K/2], at position p
# b' = b cos(p f_i) + a sin(p f_i)
# ```
#
# *Source: Su et al. 2021, section 3.2.2. The paper pairs neighbours, Qwen the halves of a head.*
#
# A product of two vectors that are turned by different angles depends on the difference of the angles only.
# So q · k depends on how far apart the two tokens are, not on where in the text they stand.

# %%
from qwen_ref.model import rotary_frequencies, rotate, rotation_tables

positions = torch.arange(T)[None]  # (1, T)
cos, sin = rotation_tables(positions, rotary_frequencies(tiny, [T], torch.float32))
q_turned, k_turned = rotate(q, cos, sin), rotate(k, cos, sin)
assert torch.allclose(q_turned, stages["blocks.2.attn.q_rotated"], atol=1e-5)
assert torch.allclose(q_turned.norm(dim=-1), q.norm(dim=-1), atol=1e-4)  # turning keeps the length

# One query and one key, as if they stood at every position: all products of the two.
everywhere = [
    rotate(x[:, -1:].expand(-1, T, -1, -1), cos, sin)[0, :, 2] for x in (q, k)
]  # head 2, (T, K) each
products = everywhere[0] @ everywhere[1].T  # (T, T)
for distance in (0, 1, 5):
    along = torch.diagonal(products, -distance)
    print(f"q · k at distance {distance}: {along.mean():.4f}, all alike to {along.max() - along.min():.0e}")
    assert along.max() - along.min() < 1e-3
album.show("distances", figures.distances(products))

# %% [markdown]
# **What to look at.** Every diagonal has one colour: the same distance, the same product.
#
# ### What a window of 32,768 tokens asks for
#
# A pair that turns fast tells near positions apart, but after a whole turn it starts again. Only a pair
# that turns less than once within a text can by itself tell near from far without doubt. With base 10,000
# and heads of 128, only 4 of 64 pairs turn less than once in 32,768 positions. With base 1,000,000, the
# 72B's, it is 24. That is its *extended base*. The smaller Qwens have 10,000.

# %%
window = large.seq_length
wavelengths = {}
for base in (1e4, 1e6):
    with_base = dataclasses.replace(large, rotary_emb_base=base)
    wavelengths[base] = 2 * math.pi / rotary_frequencies(with_base, [1], torch.float64)[0]  # (K/2)
    slow = int((wavelengths[base] > window).sum())
    print(
        f"base {base:>9,.0f}: a turn takes {wavelengths[base][0]:.1f} to "
        f"{wavelengths[base][-1]:,.0f} positions"
    )
    print(f"    {slow} of {len(wavelengths[base])} pairs turn less than once in {window:,}")
assert [int((lengths > 32_768).sum()) for lengths in wavelengths.values()] == [4, 24]

frequencies = rotary_frequencies(tiny, [15], torch.float32)  # (1, K/2)
print(f"pair 1 of the tiny model turns once in {2 * math.pi / frequencies[0, 1]:.1f} positions")
assert round(2 * math.pi / float(frequencies[0, 1])) == 15
one_pair = torch.zeros(1, 15, 1, tiny.kv_channels)
one_pair[..., 1] = 1.0  # a = 1, b = 0
turned = rotate(one_pair, *rotation_tables(torch.arange(15)[None], frequencies))[0, :, 0]  # (15, K)
turned = turned[:, [1, 1 + tiny.kv_channels // 2]]  # (15, 2): a and b
assert [round(window / float(lengths[45]), 1) for lengths in wavelengths.values()] == [8.0, 0.3]
assert (QwenConfig.preset("7b").rotary_emb_base, large.rotary_emb_base) == (10_000, 1_000_000)
album.show("rope", figures.rotation_and_wavelengths(turned, wavelengths, window))

# %% [markdown]
# **What to look at.** Left: pair 1 of the tiny model goes round once in 15 positions. Middle: the lines
# start together, since pair 0 turns at the same speed with any base, and part from there; a pair above the
# dashed line turns less than once. Right: with base 10,000, pair 45 turns eight times within the window.
# Its cosine has the same value at many positions. With 1,000,000 it is a third of one turn, and every
# position has a value of its own.

# %% [markdown]
# ## Scores, the causal mask, softmax
#
# **Why.** A query is compared with every key by a dot product: large if they point the same way. The sum of
# K products grows like √K, so it is divided by √K. A token must not see what comes after it, or it would
# learn to copy the answer: those scores are replaced by −∞. Softmax turns each row into weights: positive,
# with the sum 1. With them the values are mixed.
#
# ```equation
# weights = softmax(q kᵀ / √K + mask)       (H, T, T)      mask = 0 where key ≤ query, else −∞
# mixed = weights v                         (H, T, K)
# ```
#
# *Source: Vaswani et al. 2017, equation 1 and section 3.2.3.*
#
# model.py calls torch's `scaled_dot_product_attention`, which does this without writing the weights down.
# To look at them we compute them once, and check that they give the output that the model computed.

# %%
from qwen_ref.model import causal_mask

mask = causal_mask(T, T, None, ids.device)  # (1, 1, T, T)


def attention_weights(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and weights (H, T, T) of a layer, from its stages; they must give the layer's own output."""
    q, k, v = (
        stages[f"blocks.{layer}.attn.{name}"].transpose(1, 2) for name in ("q_scaled", "k_rotated", "v")
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(tiny.kv_channels)  # (B, H, T, T)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, T, H · K)
    assert torch.allclose(mixed, stages[f"blocks.{layer}.attn.mixed"], atol=1e-5)
    return scores[0], weights[0]


scores, weights = attention_weights(2)
print("scores and weights:", tuple(scores.shape))
print("last token, head 2:", [round(weight, 2) for weight in weights[2, -1].tolist()])
assert torch.allclose(weights.sum(dim=-1), torch.ones(4, T), atol=1e-5)
assert float(weights.triu(diagonal=1).max()) == 0.0  # nothing from the future
assert 1e9 < window**2 < 1.1e9  # scores of a head of the 72B
album.show("scores", figures.scores_to_weights(tokens, scores[2], weights[2]))

# %% [markdown]
# **What to look at.** The mask takes away the upper right triangle (grey), nearly half of all scores. The
# first token can only look at itself. In the 72B with 32,768 tokens a head has a billion scores: too many
# to write down.

# %% [markdown]
# ## Attention maps: looking up a capital
#
# **Why.** The last token is `␣is`. To know what follows, it must find out which country was asked about.
# Attention is the only way for it to get at other tokens. Here are all heads of all four layers.
#
# ```equation
# what a head reads at token t = Σ over tokens j ≤ t of weights[t, j] · v_j          a map shows weights[t, j]
# ```
#
# *Source: Vaswani et al. 2017, section 3.2.1; that weights are not yet reasons: Jain and Wallace 2019.*

# %%
maps = [attention_weights(layer)[1] for layer in range(tiny.num_hidden_layers)]
album.show("attention_all", figures.attention_maps(tokens, maps))

country, other = tokens.index(" Japan"), tokens.index("orway")
for layer, of_layer in enumerate(maps):
    for head in range(len(of_layer)):
        to_country, to_other = of_layer[head, -1, country], of_layer[head, -1, other]
        if to_country > 0.5:
            print(f"layer {layer}, head {head}: {to_country:.2f} on ' Japan', {to_other:.2f} on 'orway'")
looking = [
    (n, head) for n, of_layer in enumerate(maps) for head in range(4) if of_layer[head, -1, country] > 0.5
]
assert looking == [(0, 0), (2, 1), (2, 2)]
assert all(maps[layer][head, -1, other] < 0.05 for layer, head in looking)
first_is = tokens.index(" is")  # of the line about Norway
assert all(maps[layer][head, first_is, other] > 0.9 for layer, head in [(0, 0), (2, 2)])
album.show(
    "attention",
    figures.chosen_heads(
        tokens,
        {
            f"layer {layer}, head {head}": maps[layer][head]
            for layer, head in looking
            if (layer, head) != (2, 1)
        },
        {f"layer {layer}, head {head}": maps[layer][head, -1] for layer, head in looking},
    ),
)

# %% [markdown]
# **What to look at.** Three heads of sixteen put more than half of the last token's weight on `␣Japan`, and
# next to nothing on Norway. The first line has its own `␣is`, and there two of the three look at `orway`.
#
# ### Which look counts?
#
# A weight says where a head looks, not what the model makes of it. To find that out we forbid looks: the
# last token may not see `␣Japan`, in one head or in several, and all else stays. The parity kit's `Port`
# lets us put our own attention in place of torch's, here with a mask that has those holes.


# %%
def probability_without(looks: list[tuple[int, int]]) -> float:
    """What ' Tokyo' gets when the last token may not see ' Japan' in these heads, (layer, head) each."""
    layers_done, seen = [], {}

    def with_holes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        holes = mask.repeat(1, tiny.num_attention_heads, 1, 1)  # (1, H, T, T)
        for layer, head in looks:
            if layer == len(layers_done):
                holes[0, head, -1, country] = False
        layers_done.append(True)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=holes)

    port = Port(Checkpoint(folder), "float32", ids)
    port.scaled_dot_product_attention = with_holes
    port.run(lambda stage, value, start: seen.update({stage: value}), only=["logits"])
    return float(seen["logits"][0, -1].softmax(dim=-1)[tokenizer.encode(" Tokyo")[0]])


others = [(n, head) for n in range(tiny.num_hidden_layers) for head in range(4) if (n, head) != (0, 0)]
forbidden = {
    "nothing": [],
    "layer 0, head 0": [(0, 0)],
    "layer 2, heads 1 and 2": [(2, 1), (2, 2)],
    "all but layer 0, head 0": others,
}
tokyo = {name: probability_without(looks) for name, looks in forbidden.items()}
for name, probability in tokyo.items():
    print(f"forbidden: {name:<27} ' Tokyo' {probability:.4f}")
assert tokyo["layer 0, head 0"] < 0.001
assert min(tokyo["nothing"], tokyo["layer 2, heads 1 and 2"]) > 0.99
assert tokyo["all but layer 0, head 0"] > 0.99
assert len(others) == 15

# %% [markdown]
# **What to look at.** All three looks are dark in the maps, and only one of them counts. Without that of
# layer 0 `␣Tokyo` falls below 0.001, whatever the later layers look at. Without the two of layer 2 it stays
# above 0.99. With that of layer 0 alone, and the 15 others forbidden, it stays there, too: the country
# reached the last token in layer 0, and the later looks could have been left out. A map alone does not tell
# you this; the experiment does. (It has a limit of its own: what a head may not give to `␣Japan` it gives
# to other tokens, so a forbidden look changes more than it takes away.)
#
# And when the country changes, so does the capital:

# %%
for country_name, right in (("Japan", "Tokyo"), ("Kenya", "Nairobi"), ("Peru", "Lima")):
    question = tokenizer.encode(f"The capital of Norway is Oslo.\nThe capital of {country_name} is")
    said = tokenizer.decode(step.token for step in generate(model, question, max_new_tokens=6))
    capital = said.split(".")[0].strip()
    print(f"{country_name:>6} → {capital}")
    assert capital == right

# %% [markdown]
# ## Beyond the trained length: NTK and LogN
#
# **Why.** The 1.8B, 7B and 14B were trained on shorter texts than the 72B. At later positions slow pairs
# reach angles that training has never shown. They get two remedies; the 72B and the tiny model need
# neither.
#
# *Dynamic NTK* raises the base when the prompt is longer than the trained length L, so that slow pairs turn
# more slowly, as if the text were shorter. The fast ones hardly change, which tell neighbours apart.
#
# ```equation
# α = max(2^⌈log₂(n / L) + 1⌉ − 1, 1)          n: tokens of the prompt
# base' = base · α^(K / (K − 2))
# ```
#
# *LogN*: the more keys a query is compared with, the flatter its softmax becomes. So the query at position
# p (counted from 0) is made longer:
#
# ```equation
# q_p ← q_p · max(log(p + 1) / log(L), 1)
# ```
#
# *Source: Bai et al. 2023, part 2 (context length extension); NTK: a post by "bloc97", 2023; LogN: Chiang
# and Cholak 2022.*

# %%
from qwen_ref.model import logn_scale, ntk_alpha

seven_b = QwenConfig.preset("7b")
L = seven_b.seq_length
alphas = {length: ntk_alpha(length, L) for length in range(2048, 65537, 64)}
for length in (L, L + 1, 2 * L, 2 * L + 1, 4 * L + 1):
    print(f"prompt of {length:>6,} tokens: α = {ntk_alpha(length, L)}")
assert [ntk_alpha(length, L) for length in (8192, 8193, 16384, 16385)] == [1, 3, 3, 7]

by_alpha = {}
for length in (L, 2 * L, 4 * L):
    by_alpha[ntk_alpha(length, L)] = 2 * math.pi / rotary_frequencies(seven_b, [length], torch.float64)[0]
for alpha, lengths in by_alpha.items():
    print(
        f"α = {alpha}: the fastest pair turns in {lengths[0]:.2f} positions, "
        f"the slowest in {lengths[-1]:,.0f}"
    )
    assert torch.allclose(lengths[-1], alpha * by_alpha[1][-1])  # stretched by α
    assert torch.equal(lengths[0], by_alpha[1][0])  # as it was

logn = {length: logn_scale(torch.arange(32768), length, torch.float64) for length in (8192, 2048)}
print(
    f"LogN at position 32,767, trained on 8,192: {logn[8192][-1]:.3f}; trained on 2,048: {logn[2048][-1]:.3f}"
)
assert round(float(logn[8192][-1]), 3) == 1.154
assert logn[8192][8191] == 1.0 < logn[8192][8192]
for config in (tiny, large):
    assert (config.use_dynamic_ntk, config.use_logn_attn) == (False, False)
album.show("logn_ntk", figures.beyond_the_trained_length(alphas, by_alpha, logn, L))

# %% [markdown]
# **What to look at.** α jumps from 1 to 3 with the first token beyond 8,192, then stays until 16,384. It is
# fixed by the prompt and kept while the answer grows: keys in the cache were turned with it. The slowest
# pair is stretched by exactly α. LogN is gentle: 1.154 at four times the trained length.

# %% [markdown]
# ## SwiGLU: the MLP
#
# **Why.** Attention moves information between tokens; the MLP works on each token alone, and has most of
# a layer's parameters. Two matrices widen the vector from D to F channels. One of them, the *gate*, goes
# through a curve and decides how much of the other passes. A third matrix brings the F channels back to D.
#
# ```equation
# y = (silu(x W_gateᵀ) · (x W_upᵀ)) W_downᵀ         silu(z) = z · sigmoid(z)
# ```
#
# *Source: Shazeer 2020, equation 6. In the published files `w1` is up and `w2` the gate.*

# %%
mlp, read = model.blocks[2].mlp, stages["blocks.2.mlp_norm"]
gate, up = mlp.gate(read), mlp.up(read)  # (B, T, F) each
product = up * torch.nn.functional.silu(gate)
print("x:", tuple(read.shape), "→ gate and up:", tuple(gate.shape), "→ down:", tuple(mlp.down(product).shape))
assert torch.allclose(product, stages["blocks.2.mlp.product"], atol=1e-5)
assert torch.allclose(mlp.down(product), mlp(read), atol=1e-5)

z = torch.linspace(-8, 8, 400)
silu = torch.nn.functional.silu(z)
assert torch.allclose(silu, z * torch.sigmoid(z))
below = float((gate < 0).float().mean())
print(f"gates from {float(gate.min()):.1f} to {float(gate.max()):.1f}, {below:.0%} of them below 0")
print(f"the least that silu can give is {float(silu.min()):.2f}")
assert gate.min() > -3
assert gate.max() < 3
assert round(float(silu.min()), 2) == -0.28
album.show("swiglu", figures.gate(z, silu, gate))

D, F = large.hidden_size, large.mlp_width
share = 3 * D * F / (3 * D * F + 4 * D * D)
print(f"of the weights of a 72B layer the MLP has {share:.0%}: 3 matrices of {F:,} × {D:,}")
assert round(100 * share) == 69
assert large.intermediate_size == 2 * F == 49_152

# %% [markdown]
# **What to look at.** silu is nearly 0 for strongly negative z, which closes a channel, and nearly z for
# large z. In this layer, on this text, all gates are between −3 and 3, where the curve bends. In
# `config.json` the 72B's `intermediate_size` is 49,152: gate and up counted together, twice the real F.

# %% [markdown]
# ## The residual stream
#
# **Why.** Each half of a layer adds to the stream and overwrites nothing. So what the embedding said is a
# part of the sum to the end, and a layer only has to learn what to change.
#
# ```equation
# x ← x + attention(norm(x))
# x ← x + mlp(norm(x))
# ```
#
# *Source: He et al. 2016, section 3.2, equation 1; the norm inside the branch: Xiong et al. 2020.*

# %%
layers = range(tiny.num_hidden_layers)
halves = ["embed"] + [f"blocks.{n}.{half}" for n in layers for half in ("attn_residual", "residual")]
names = ["embed"] + [f"layer {n}, after {half}" for n in layers for half in ("attention", "MLP")]
norms = torch.stack([stages[half][0].norm(dim=-1) for half in halves])  # (stages, T)
additions = []
for n in layers:
    before = stages["embed" if n == 0 else f"blocks.{n - 1}.residual"]
    after = before + stages[f"blocks.{n}.attn.out"] + stages[f"blocks.{n}.mlp.down"]
    assert torch.allclose(after, stages[f"blocks.{n}.residual"], atol=1e-4)
    read_by_mlp, added = stages[f"blocks.{n}.attn_residual"][0, -1], stages[f"blocks.{n}.mlp.down"][0, -1]
    longer = float(added.norm() / read_by_mlp.norm())
    cosine = float(torch.nn.functional.cosine_similarity(added, read_by_mlp, dim=0))
    print(
        f"layer {n}: the MLP adds a vector of {longer:5.2f} times the length; cosine of the two {cosine:5.2f}"
    )
    additions.append((longer, cosine))
for name, length in zip(names, norms[:, -1].tolist(), strict=True):
    print(f"{name:<25} {length:6.2f}")
assert norms[2, -1] > 10 * norms[1, -1]
assert round(additions[0][0]) == 11
assert [round(value, 2) for value in additions[-1]] == [0.85, -0.57]
album.show("residual", figures.through_the_layers(names, tokens, norms))

# %% [markdown]
# **What to look at.** In the tiny model the first MLP makes the last token's vector more than ten times as
# long. What it adds is 11 times as long as what was there. From then on the length hardly changes, but that
# does not mean that little happens: the last MLP adds a vector of 0.85 times the length, which points
# against the stream (cosine −0.57). How the lengths go differs from model to model; that the stream is a
# sum does not.

# %% [markdown]
# ## The logit lens: when is the capital there?
#
# **Why.** At the end, the last norm and the output head turn the stream into logits. But the stream has D
# numbers after every layer. So we can put norm and head behind *any* layer, and read what the model would
# say if it ended there.
#
# ```equation
# p_layer = softmax(head(norm(x_layer)))       (V)
# ```
#
# *Source: "nostalgebraist" 2020, "interpreting GPT: the logit lens".*

# %%
(right_answer,) = tokenizer.encode(" Tokyo")
watched = [" Tokyo", " T", " M", " Oslo"]
paths = {token: [] for token in watched}
first_choice = []
for half, name in zip(halves, names, strict=True):
    p = model.lm_head(model.norm(stages[half][:, -1]))[0].softmax(dim=-1)  # (V)
    best = p.topk(3)
    first_choice.append(int(best.indices[0]))
    for token in watched:
        paths[token].append(float(p[tokenizer.encode(token)[0]]))
    said = ", ".join(
        f"{tokenizer.decode([token])!r} {value:.2f}"
        for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    print(f"{name:<25} ' Tokyo' {float(p[right_answer]):.3f}   first three: {said}")
assert names[first_choice.index(right_answer)] == "layer 2, after MLP"
assert paths[" Tokyo"][5] > 4 * paths[" Tokyo"][4]  # layer 2, after attention
assert paths[" Tokyo"][-1] > 0.99
assert max(paths[" Oslo"]) < 0.05
album.show("lens", figures.lens(names, paths))

# %% [markdown]
# **What to look at.** Behind the embedding the stream holds only the last token itself, `␣is`; the country
# cannot be known yet. Then come tokens that many capitals begin with, `␣T` and `␣M`. `␣Tokyo` becomes more
# than four times as likely in the attention of layer 2, is first after that layer's MLP, and all but
# certain at the end. `␣Oslo` never gets 0.05, although it stands in the text.
#
# The path is not straight, and it need not be: only the last layer was trained to be read by the head. What
# the lens says earlier is a reading, not an answer. It also says when a token shows, not what put it there:
# the look that decides was in layer 0, and `␣Tokyo` is first only in layer 2.

# %% [markdown]
# ## Token by token, and the cache
#
# **Why.** The model gives one token at a time; it is appended to the text, and all begins again. Keys and
# values of earlier tokens never change, because nothing looks ahead. So they are kept: a new token computes
# its own query, key and value, and reads the others from the cache. Without it, every new token would cost
# all positions again.
#
# ```equation
# bytes a token = 2 · layers · H · K · bytes a number        2: a key and a value
# ```
#
# *Source: it follows from the shapes; `sizes.cache_bytes`.*

# %%
from qwen_ref.commands.sizes import cache_bytes, held_bytes

cache = model.new_cache(max_length=T + 1)
model(ids, cache=cache)  # prefill: the whole prompt in one pass
print(
    f"kept for {cache.length} tokens: {len(cache.keys)} layers × keys and values {tuple(cache.keys[0].shape)}"
)
assert torch.allclose(cache.keys[2][:, :, :T], stages["blocks.2.attn.k_rotated"].transpose(1, 2), atol=1e-5)
assert held_bytes(cache) == cache_bytes(tiny, T + 1, torch.float32)

next_id = torch.tensor([[right_answer]])
step = model(next_id, cache=cache)  # (1, 1, V): one position computed
again = model(torch.cat([ids, next_id], dim=1))  # all 14 of them
print(f"with the cache and from scratch: at most {(step[0, -1] - again[0, -1]).abs().max():.0e} apart")
assert torch.allclose(step[0, -1], again[0, -1], atol=1e-3)

a_token = {
    size: cache_bytes(QwenConfig.preset(size), 1, torch.bfloat16) for size in ("1.8b", "7b", "14b", "72b")
}
for size, count in a_token.items():
    print(
        f"{size:>5}: {count:>9,} bytes a token, {count * 32768 / 1e9:6.1f} GB for 32,768 tokens, in bfloat16"
    )
assert a_token["72b"] == 2 * 80 * 64 * 128 * 2 == 2_621_440
assert round(a_token["72b"] / 1e6, 1) == 2.6
assert round(a_token["72b"] * window / 1e9, 1) == 85.9

# %% [markdown]
# **What to look at.** Keys are kept after they were turned, so nothing is turned twice. The 72B keeps 2.6
# MB for every token, 85.9 GB for a full window. Later models share keys and values among heads to save on
# this; first-generation Qwen does not.

# %% [markdown]
# ## Sampling
#
# **Why.** The model gives a probability to each token, and something must choose. The likeliest one is safe
# and dull; drawing from all of them sooner or later hits one of the thousands that make no sense. Three
# settings lie between.
#
# ```equation
# temperature   p ∝ exp(logit / temperature)       below 1: sharper, above 1: flatter
# top-k         keep the k likeliest, drop the others, scale to the sum 1
# top-p         keep the likeliest until their sum reaches p, drop the others, scale to the sum 1
# ```
#
# *Source: top-k: Fan et al. 2018; top-p: Holtzman et al. 2020, section 3.1. The published order is
# repetition penalty, temperature, top-k, top-p.*
#
# After "The capital of the" the tiny model has real choices: it has learned the capitals of 16 states whose
# English names begin with "the". Three of them go on with `␣United`, so 14 tokens are right.

# %%
from qwen_ref.sampling import probabilities

sys.path.append(str(figures.MAKE))  # the text that the tiny model has learned is made there
from tiny_corpus import COUNTRIES

unfinished = torch.tensor([tokenizer.encode("The capital of the")])
logits = model(unfinished)[:, -1]  # (1, V)
plain = probabilities(logits, unfinished)[0]
shown = plain.topk(20).indices
settings = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top-k 5": {"top_k": 5},
    "top-p 0.8": {"top_p": 0.8},
}
left = {name: probabilities(logits, unfinished, **setting)[0] for name, setting in settings.items()}
for name, p in {"as it is": plain, **left}.items():
    likeliest, beyond = float(p.max()), float(p.sum() - p[shown[:14]].sum())
    print(
        f"{name:<16} {int((p > 0).sum()):>5} tokens left, "
        f"the likeliest {likeliest:.2f}, beyond the 14th {beyond:.4f}"
    )
assert int((left["top-k 5"] > 0).sum()) == 5
assert int((left["top-p 0.8"] > 0).sum()) == 11
assert round(float(plain[shown[:14]].sum()), 2) == 0.99
begun = tokenizer.encode("The capital of the")
states = [fact["english"] for fact in COUNTRIES if fact["english"].startswith("the ")]
right_tokens = {tokenizer.encode(f"The capital of {state}")[len(begun)] for state in states}
assert (len(states), len(right_tokens)) == (16, 14)
assert set(shown[:14].tolist()) == right_tokens
assert tiny.vocab_size - 14 == 2738
assert left["temperature 0.5"].max() > plain.max() > left["temperature 2"].max()
assert round(1 - float(left["temperature 2"][shown[:14]].sum()), 1) == 0.4
assert int((probabilities(model(ids)[:, -1], ids, top_p=0.8) > 0).sum()) == 1  # after "… Japan is"
names_shown = [tokenizer.decode([token]) for token in shown.tolist()]
album.show(
    "sampling", figures.sampling(names_shown, plain[shown], {name: p[shown] for name, p in left.items()})
)

# %% [markdown]
# **What to look at.** The 14 right tokens are the 14 likeliest and have 0.99 of the probability; the other
# 2,738 share the rest. Temperature cuts nothing away: it moves probability to the front, or to the back. At
# 2 the 2,738 wrong ones get 0.4 of it together: each is unlikely, but they are many. Top-k cuts at a fixed
# number, here in the middle of right answers. Top-p keeps as many as it takes: 11 here, and one behind "The
# capital of Japan is", where the model is sure.

# %% [markdown]
# ## Tensor parallelism: one model on two devices
#
# **Why.** The 72B's weights take 144.6 GB in bfloat16, more than most devices have. So every large matrix
# is cut, and each rank (a process with a device) holds one part. The cuts are chosen in pairs: what the
# first matrix leaves on a rank is what the second one needs there, so the ranks talk only once after each
# pair.
#
# ```equation
# Y = (silu(X Gᵀ) · (X Uᵀ)) Wᵀ  =  Σ over ranks r of  (silu(X G_rᵀ) · (X U_rᵀ)) W_rᵀ
# G_r, U_r: some rows                 W_r: the same columns
# ```
#
# *Source: Shoeybi et al. 2019, section 3.*

# %%
album.show("tensor_parallel", draw_architecture.tensor_parallel(large))

specs = {spec.name: spec for spec in tensor_table(tiny)}


def part(name: str, rank: int) -> torch.Tensor:
    """What this of two ranks holds of a weight of layer 2."""
    name = f"blocks.2.{name}.weight"
    return specs[name].part(model.get_parameter(name), rank, 2)


partial = []
for rank in range(2):
    closed = torch.nn.functional.silu(read @ part("mlp.gate", rank).T) * (read @ part("mlp.up", rank).T)
    partial.append(closed @ part("mlp.down", rank).T)
    shapes = [tuple(part(name, rank).shape) for name in ("mlp.gate", "mlp.up", "mlp.down")]
    print(f"rank {rank}: gate, up and down are {shapes}; its part of the sum is {tuple(partial[rank].shape)}")
print(f"the sum is off by {(partial[0] + partial[1] - mlp(read)).abs().max():.0e}")
assert torch.allclose(partial[0] + partial[1], mlp(read), atol=1e-4)

by_rank = {
    ranks: sum(math.prod(spec.shape_of_rank(ranks)) for spec in tensor_table(large)) * 2 / 1e9
    for ranks in (1, 2, 8)
}
print("the 72B's weights, GB a rank:", {ranks: round(size, 1) for ranks, size in by_rank.items()})
assert round(by_rank[1], 1) == 144.6
assert round(by_rank[2], 1) == 72.3

# %% [markdown]
# **What to look at.** qkv, gate and up are cut by rows: each rank has some heads, some channels. out and
# down are cut by columns. One sum follows each pair, an *all-reduce*; at the end a *gather* puts the logits
# side by side. qkv has a trap: its rows are [q; k; v], so each third is cut by itself. One cut through the
# middle would give rank 0 all of q and half of k.

# %% [markdown]
# ## Quantisation: fewer bits a weight
#
# **Why.** To make one token every weight of the matrices is read, so fewer bits are more speed, and less
# memory. A weight is replaced by a whole number q of steps; the size of a step, the *scale*, is kept for
# each row (int8) or for each group of 64 weights in a row (int4). In int4 a group has a *zero* besides, the
# value that q = 8 stands for, as its weights need not lie evenly about 0. What rounding moves is at most
# half a step.
#
# ```equation
# int8   W[o, i] ≈ q · scale[o]                                    q from −127 to 127
# int4   W[o, i] ≈ (q − 8) · scale[o, i // 64] + zero[o, i // 64]      q from 0 to 15
# ```
#
# *Source: Jacob et al. 2018, equation 1, for the idea; the formulas are those of quantize.py.*

# %%
from qwen_ref.quantize.rounding import dequantize_int4, quantize_int4, quantize_int8

weight = model.blocks[2].mlp.down.weight  # (D, F)
steps8, scale8 = quantize_int8(weight)
steps4, scale4, zero4 = quantize_int4(weight, 64)
rounded = {"int8": steps8 * scale8, "int4, groups of 64": dequantize_int4(steps4, scale4, zero4)}
half_a_step = {
    "int8": scale8.expand_as(weight) / 2,
    "int4, groups of 64": scale4.repeat_interleave(64, 1) / 2,
}
clean = stages["blocks.2.mlp.product"] @ weight.T
errors = {}
for name, instead in rounded.items():
    moved = instead - weight
    assert (moved.abs() <= half_a_step[name] * 1.001 + 1e-7).all()
    off = stages["blocks.2.mlp.product"] @ instead.T - clean
    errors[name] = (float(moved.norm() / weight.norm()), float(off.norm() / clean.norm()))
    print(f"{name:<18}: weights off by {errors[name][0]:.2%}, what the layer gives by {errors[name][1]:.2%}")
times = {}
for group in (32, 64, 128, 256):
    moved = dequantize_int4(*quantize_int4(weight, group)) - weight
    times[group] = float(moved.norm() / weight.norm()) / errors["int8"][0]
    print(f"int4 in groups of {group:>3}: {times[group]:.1f} times the error of int8")
assert {group: round(value) for group, value in times.items()} == {32: 10, 64: 12, 128: 13, 256: 14}
in_groups = weight.unflatten(1, (-1, 64))
moved = rounded["int4, groups of 64"].unflatten(1, (-1, 64)) - in_groups
for ends in (in_groups.argmin(dim=2, keepdim=True), in_groups.argmax(dim=2, keepdim=True)):
    assert moved.gather(2, ends).abs().max() < 1e-6
assert len(steps4.unique()) == 16
assert len(steps8.unique()) <= 255
assert all(of_layer < of_weights for of_weights, of_layer in errors.values())
album.show("quantisation", figures.rounding({name: instead - weight for name, instead in rounded.items()}))

# %% [markdown]
# **What to look at.** Rounding moves weights evenly to both sides. The peak at 0 on the right: in int4 the
# smallest and the largest weight of a group are hit by its steps. int4 has 16 steps where int8 has 255;
# with groups of 64 its error is 12 times as large, with groups of 32 it is 10 times, with groups of 256 it
# is 14 times. On this text what the layer gives is off by less than its weights are. What rounding costs in
# the model's answers is measured in the README.

# %% [markdown]
# ## The whole of it, once more
#
# The 13 ids became vectors; four layers let them look at each other and worked on each; the head gave 2,752
# logits; the largest is `␣Tokyo`. Then the same with 14 ids, from the cache. That is all that Qwen-72B
# does, with 80 layers and wider matrices.

# %%
text = tokenizer.decode(step.token for step in generate(model, ids[0].tolist(), max_new_tokens=2))
print(prompt + text)
assert text.strip("\n") == " Tokyo."

# %% [markdown]
# Where to go from here: open model.py again, and find each section in it. It is shorter than this page.
