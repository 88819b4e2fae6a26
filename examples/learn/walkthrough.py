# %% [markdown]
# # Qwen, step by step
#
# By the end of this page you can say what Qwen-72B computes, tensor by tensor, and you have run every step
# of it. You need Python, and to know what a matrix is.
#
# The numbers come from a small model that is part of the project. It is called the *tiny model* below. It has
# the 72B's architecture and file formats, but 1,755,776 parameters instead of 72,287,920,128. It has learned
# the capitals of the world. If a statement depends on the size of the model, it is computed from the
# configurations of the published sizes.
#
# Every section has the same parts: why the step exists; its equation and the source of the equation; the
# project's own code, called on real tensors; its output; what to look at. Every number in the text is checked
# by an `assert` in the code: if a number is wrong, the page stops there.
#
# A *tensor* is a table of numbers with any number of dimensions. A matrix is a tensor with two. Each
# dimension has one letter, here and in model.py:
#
# | letter | dimension | tiny | 72B |
# |---|---|---|---|
# | B | texts computed together | 1 | 1 |
# | T | tokens in the text | 13 | up to 32,768 |
# | D | numbers per token (hidden size) | 128 | 8,192 |
# | H | attention heads | 4 | 64 |
# | K | numbers per head, D / H | 32 | 128 |
# | F | channels of the MLP | 512 | 24,576 |
# | V | entries of the vocabulary | 2,752 | 152,064 |
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
# What Qwen computes, in five sentences:
#
# - A text comes in; the tokenizer cuts it into tokens and gives each token a number, its *id*.
# - The model replaces each id by a vector of D numbers, which it reads from a table, the *embedding*.
# - The vectors pass through the layers, one layer after another.
# - In each layer, *attention* adds to every vector information from earlier tokens; then the *MLP* adds to
#   every vector something that it computes from that vector alone.
# - What comes out is one number for each of the V vocabulary entries, its *logit*: the larger the logit, the
#   likelier that entry is the next token.
#
# The vectors of all tokens, as they pass through the layers, are called the *residual stream*. To write a
# longer text, the next token is appended and the model runs again.
#
# The picture shows the real shapes of the 72B. It is drawn from the 72B's configuration. Keep it open: most
# sections below explain one box of it.

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
# **Why.** The model reads numbers, so text is cut into tokens from a fixed list. Unicode can write the same
# letter in two ways: é is one character, or e followed by an accent. The two look alike, but they would
# become different tokens. So the text is first brought into one form, NFC.
#
# Then a pattern cuts the text into *pieces*. A piece is about one word, with the space before it. A token
# never crosses the border between two pieces.
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
# **What to look at.** A space belongs to the word that follows it. A space before a digit is a piece by
# itself. `'s` is a piece, too. In `2024` every digit is a piece; a section below says why.
#
# In the figure, a piece and its tokens have the same colour. ␣ stands for a space. é is two bytes in UTF-8.
# The tiny vocabulary has no token for these two bytes together, so they are two tokens, shown as `0xc3` and
# `0xa9`.

# %%
ids_of = [tokenizer.encode(piece) for piece in pieces]
tokens_of = [[tokenizer.decode_bytes([token]) for token in ids] for ids in ids_of]
assert [token for ids in ids_of for token in ids] == tokenizer.encode(text)  # pieces are encoded one by one
album.show("pieces", figures.pieces_and_tokens(pieces, tokens_of, ids_of))

# %% [markdown]
# ## Merges, one by one
#
# **Why.** A vocabulary of whole words would never be complete. A vocabulary of single bytes would make texts
# very long. Byte-pair encoding lies between the two. It starts with single bytes. Then it merges the adjacent
# pair with the lowest rank, again and again, until no adjacent pair is a token. The ranks come from the
# training of the tokenizer: the pair that was most frequent in its training text has the lowest rank. Any
# text can be encoded, because every single byte is a token.
#
# ```equation
# repeat: merge the adjacent pair whose joined bytes have the lowest rank
# ```
#
# *Source: Sennrich, Haddow and Birch 2016, section 3.2; on bytes: Radford et al. 2019, section 2.2.*
#
# `merge_pairs` does all merges at once. To see them one by one, we call it with only a part of the
# vocabulary, the ranks up to a limit, and raise the limit.

# %%
from qwen_ref.tokenizer import merge_pairs, read_ranks

ranks = {token: rank for rank, token in enumerate(read_ranks(folder / "qwen.tiktoken"))}


def merged(piece: bytes, limit: int) -> list[bytes]:
    """The parts of a piece after all merges up to this rank."""
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
# **What to look at.** Five merges lead from seven bytes to two tokens. Pairs with low ranks are merged first:
# `or` was frequent in the training text, `orway` was rarer. No token is the whole of `␣Norway`, so the model
# gets two tokens.
#
# Chinese works the same way. A character is three bytes of UTF-8, and a frequent word is one token:

# %%
chinese = "冰岛的首都是"  # "the capital of Iceland is"
print("as bytes: ", chinese.encode().hex(" "))
print("as tokens:", [tokenizer.decode([token]) for token in tokenizer.encode(chinese)])
assert len(chinese.encode()) == 18
assert len(tokenizer.encode(chinese)) == 2

# %% [markdown]
# ## Digits, one by one
#
# **Why.** If digits could merge, 2024 might be one token, 2025 two tokens and 31 one token, each with its own
# vector. The model would have to memorise the value of each. Qwen never merges digits: every number is
# written with the same ten tokens, and the place of a digit gives its value. The cost is that numbers take
# more tokens.
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
# right country. We run the model once and keep every intermediate tensor. The parity kit (`qwen_ref.parity`,
# which checks other implementations) does this for us. It calls these tensors *stages* and gives them the
# names of the layers in model.py.

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
# **Why.** An id is a name, not a quantity: token 742 is not more than token 741. So each id is replaced by a
# vector. The vectors are the V rows of a table, and training has set their numbers.
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
assert torch.equal(one_hot @ W, x)  # a look-up is a product; each row of one_hot has one 1, else 0

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
# **What to look at.** Nobody told the model that 6 and 8 are the neighbours of 7. It learned sums and
# counting, and that made the vectors of these digits point in similar directions.
#
# V is larger than the number of tokens, which is 151,851 in the published models: the table was padded to a
# rounder size. In the 72B this adds 213 rows that no id ever selects. The output head is padded in the same
# way.

# %% [markdown]
# ## RMSNorm
#
# **Why.** Every layer adds to the residual stream, so its vectors grow, and their lengths differ. A layer
# should see directions, not lengths. RMSNorm divides each token's vector by its root mean square. Then it
# multiplies each of the D numbers by a learned weight. ε prevents a division by 0 if all numbers are 0.
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
# **What to look at.** After the division every root mean square is 1. One detail is easy to miss. The
# published weights are in bfloat16, which has 8 significant bits; float32 has 24. In a bfloat16 model the
# division is done in float32, then its result is rounded to bfloat16, and only then it is multiplied by the
# weight.

# %% [markdown]
# ## Queries, keys and values
#
# **Why.** In attention, every token looks for information in itself and in earlier tokens. For this, each
# token's normalised vector is turned into three vectors. The *query* says what the token looks for. The *key*
# says what the token can be found by. The *value* is the information that it passes on. One matrix computes
# all three; its rows are stacked [q; k; v]. This is the only product in the model with a bias. Query, key and
# value are then each cut into H heads of K numbers. Each head can look for something else.
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
# **Why.** So far the order of the tokens has no effect. The rotary position embedding (RoPE) adds it: it
# turns each query and each key by angles that grow with the position. Numbers i and i + K/2 of a head form a
# pair. A pair is a point in a plane, and a point can be turned. Each of the K/2 pairs turns at its own speed:
# pair 0 turns by one radian per position, the last pair turns very slowly.
#
# ```equation
# f_i = base^(−2i/K)                         radians per position, i = 0 … K/2 − 1
# a' = a cos(p f_i) − b sin(p f_i)           a = x[i], b = x[i + K/2], at position p
# b' = b cos(p f_i) + a sin(p f_i)
# ```
#
# *Source: Su et al. 2021, section 3.2.2. The paper pairs neighbours; Qwen pairs the two halves of a head.*
#
# If two vectors are turned by different angles, their dot product depends only on the difference of the two
# angles. So q · k depends on how far apart the two tokens are, not on where in the text they are.

# %%
from qwen_ref.model import rotary_frequencies, rotate, rotation_tables

positions = torch.arange(T)[None]  # (1, T)
cos, sin = rotation_tables(positions, rotary_frequencies(tiny, [T], torch.float32))
q_turned, k_turned = rotate(q, cos, sin), rotate(k, cos, sin)
assert torch.allclose(q_turned, stages["blocks.2.attn.q_rotated"], atol=1e-5)
assert torch.allclose(q_turned.norm(dim=-1), q.norm(dim=-1), atol=1e-4)  # turning keeps the length

# One query and one key, placed at every position in turn: the dot products of all combinations.
everywhere = [
    rotate(x[:, -1:].expand(-1, T, -1, -1), cos, sin)[0, :, 2] for x in (q, k)
]  # head 2, (T, K) each
products = everywhere[0] @ everywhere[1].T  # (T, T)
for distance in (0, 1, 5):
    along = torch.diagonal(products, -distance)
    spread = along.max() - along.min()
    print(f"q · k at distance {distance}: {along.mean():.4f}, all equal within {spread:.0e}")
    assert spread < 1e-3
album.show("distances", figures.distances(products))

# %% [markdown]
# **What to look at.** Every diagonal has one colour: the same distance gives the same product.
#
# ### What a window of 32,768 tokens needs
#
# A pair that turns fast distinguishes near positions, but after a full turn its values repeat. Only a pair
# that makes less than one turn within a text has a different value at every position. With base 10,000 and
# heads of 128, only 4 of 64 pairs make less than one turn in 32,768 positions. With the 72B's base,
# 1,000,000, 24 pairs do. This is called the *extended base*. The smaller Qwens have base 10,000.

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
# **What to look at.** Left: pair 1 of the tiny model makes one turn in 15 positions. Middle: the two lines
# start at the same point, because pair 0 turns at the same speed with any base. Pairs above the dashed line
# make less than one turn within the window. Right: with base 10,000, pair 45 makes eight turns within the
# window, so its cosine has the same value at many positions. With base 1,000,000 it makes a third of a turn,
# and its cosine is different at every position.

# %% [markdown]
# ## Scores, the causal mask, softmax
#
# **Why.** A query is compared with every key by a dot product. The product is large if the two point in the
# same direction. A sum of K products grows like √K, so it is divided by √K. In training, a token must not see
# later tokens, because it would copy the answer from them. So the scores of later tokens are replaced by −∞.
# Softmax turns each row of scores into weights, which are not negative and sum to 1. The result is the sum of
# the values, each multiplied by its weight.
#
# ```equation
# attention(q, k, v) = softmax(q kᵀ / √K + mask) v      (H, T, K)
#                      └──────── weights ────────┘      (H, T, T)     mask = 0 where key ≤ query, else −∞
# ```
#
# *Source: Vaswani et al. 2017, equation 1 and section 3.2.3.*
#
# model.py calls torch's `scaled_dot_product_attention`, which computes this equation without storing the
# weights. To look at the weights we compute them here, and check that they give the model's own output.

# %%
from qwen_ref.model import causal_mask

mask = causal_mask(T, T, None, ids.device)  # (1, 1, T, T)


def attention_weights(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and weights (H, T, T) of a layer. Checks that they give the layer's own output."""
    q, k, v = (
        stages[f"blocks.{layer}.attn.{name}"].transpose(1, 2) for name in ("q_scaled", "k_rotated", "v")
    )
    # softmax(q kᵀ / √K + mask) v
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
# **What to look at.** The mask removes the upper right triangle (grey), nearly half of all scores. The first
# token can only look at itself. With 32,768 tokens, each head of the 72B has a billion scores: too many to
# store.

# %% [markdown]
# ## Attention maps: looking up a capital
#
# **Why.** The last token is `␣is`. To predict the next token, the model must know which country the question
# names. Attention is the only step that moves information from one token to another. The figure shows the
# weights of all heads of all four layers.
#
# ```equation
# output of a head at token t = Σ over tokens j ≤ t of weights[t, j] · v_j          a map shows weights[t, j]
# ```
#
# *Source: Vaswani et al. 2017, section 3.2.1; that weights do not explain a prediction: Jain and Wallace
# 2019.*

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
# **What to look at.** In three of the sixteen heads, the last token has more than half of its weight on
# `␣Japan` and almost none on Norway. The first line of the text also has a token `␣is`. There, two of these
# three heads look at `orway`.
#
# ### Which of these heads matter?
#
# A weight says where a head looks. It does not say what the model does with that. So we make an experiment:
# in one head or in several, the last token may not see `␣Japan`; everything else stays the same. Each
# layer's attention has a method `mix`. We replace it by our own, with a mask that also hides `␣Japan`.


# %%
def probability_without(heads: list[tuple[int, int]]) -> float:
    """The probability of ' Tokyo' if the last token may not see ' Japan' in these (layer, head)."""

    def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: None, cache: None, layer: int):
        allowed = mask.repeat(1, tiny.num_attention_heads, 1, 1)  # (1, H, T, T)
        for blind, head in heads:
            if blind == layer:
                allowed[0, head, -1, country] = False
        # softmax(q kᵀ / √K + mask) v
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    for block in model.blocks:
        block.attn.mix = mix
    logits = model(ids)
    for block in model.blocks:
        del block.attn.mix
    return float(logits[0, -1].softmax(dim=-1)[tokenizer.encode(" Tokyo")[0]])


others = [(n, head) for n in range(tiny.num_hidden_layers) for head in range(4) if (n, head) != (0, 0)]
forbidden = {
    "nothing": [],
    "layer 0, head 0": [(0, 0)],
    "layer 2, heads 1 and 2": [(2, 1), (2, 2)],
    "all but layer 0, head 0": others,
}
tokyo = {name: probability_without(heads) for name, heads in forbidden.items()}
for name, probability in tokyo.items():
    print(f"forbidden: {name:<27} ' Tokyo' {probability:.4f}")
assert tokyo["layer 0, head 0"] < 0.001
assert min(tokyo["nothing"], tokyo["layer 2, heads 1 and 2"]) > 0.99
assert tokyo["all but layer 0, head 0"] > 0.99
assert len(others) == 15

# %% [markdown]
# **What to look at.** All three heads have a dark spot in the maps, but only one of them matters. If the head
# of layer 0 may not see `␣Japan`, the probability of `␣Tokyo` falls below 0.001. If the two heads of layer 2
# may not see it, the probability stays above 0.99. It also stays above 0.99 if only the head of layer 0 may
# see it and the 15 other heads may not. So the country reaches the last token in layer 0, and the model does
# not need the later heads for this question. The maps alone do not show this; the experiment does.
#
# The experiment has a limit. The weights of a head always sum to 1. If `␣Japan` is hidden, its weight goes to
# other tokens, so the experiment changes more than one weight.
#
# If the country changes, the capital changes, too:

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
# **Why.** The 1.8B, 7B and 14B were trained on shorter texts than the 72B. In longer texts, their slow pairs
# reach angles that never occurred in training. These models therefore use two corrections, dynamic NTK and
# LogN. The 72B and the tiny model use neither.
#
# *Dynamic NTK* raises the base if the prompt is longer than the trained length L. The slow pairs then turn
# more slowly, as if the text were shorter. The fast pairs, which distinguish near positions, hardly change.
#
# ```equation
# α = max(2^⌈log₂(n / L) + 1⌉ − 1, 1)          n: number of tokens of the prompt
# base' = base · α^(K / (K − 2))
# ```
#
# *LogN* corrects another effect: the more keys a query is compared with, the flatter its softmax becomes. If
# the query's numbers are larger, so are the scores, and the softmax is sharper again. So the query at
# position p, counted from 0, is multiplied by a factor:
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
# **What to look at.** α jumps from 1 to 3 at the first token beyond 8,192, then stays at 3 until 16,384. The
# length of the prompt fixes α. α does not change while the answer is generated, because the keys in the cache
# were turned with it. With α, the slowest pair takes exactly α times as many positions for a turn. LogN's
# factor is small: 1.154 at four times the trained length.

# %% [markdown]
# ## SwiGLU: the MLP
#
# **Why.** Attention moves information between tokens. The MLP works on each token alone, and it has most of a
# layer's parameters. Two matrices, *gate* and *up*, each turn the vector of D numbers into F channels. The
# gate's channels go through the function silu and are multiplied with those of up: the gate decides how much
# of each channel passes. A third matrix, *down*, brings the F channels back to D numbers.
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
print(f"the smallest value of silu is {float(silu.min()):.2f}")
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
# **What to look at.** For strongly negative z, silu is nearly 0, which closes the channel. For large z, silu
# is nearly z. In this layer, on this text, all gates are between −3 and 3, where the curve bends. In the
# 72B's `config.json`, `intermediate_size` is 49,152. That counts gate and up together; F is half of it.

# %% [markdown]
# ## The residual stream
#
# **Why.** Attention and MLP add to the stream; they overwrite nothing. So the embedding remains a part of the
# sum up to the end, and a layer only has to learn what to change.
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
# **What to look at.** In the tiny model, the first MLP makes the last token's vector more than ten times as
# long: the vector that it adds is 11 times as long as the vector before. After that the length hardly
# changes, but the vector does: the last MLP adds a vector of 0.85 times the length, and this vector points
# against the stream (cosine −0.57). The lengths differ from model to model. In every model the stream is a
# sum.

# %% [markdown]
# ## The logit lens: when is the capital there?
#
# **Why.** At the end, the last norm and the output head turn the stream into logits. The stream has D numbers
# per token after every layer. So we can apply norm and head after *any* layer and see what the model would
# predict if it ended there.
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
# **What to look at.** After the embedding, the stream holds only the last token itself, `␣is`; nothing in it
# depends on the country yet. Later, tokens that many capitals begin with become likely: `␣T` and `␣M`. The
# attention of layer 2 makes `␣Tokyo` more than four times as likely. After the MLP of layer 2 it is the
# likeliest token, and at the end it is almost certain. `␣Oslo` never reaches 0.05, although it is in the
# text.
#
# The probabilities do not rise steadily, and they do not have to: in training, the output head read only the
# output of the last layer. The lens shows what the output head *would* read in an earlier layer; that layer
# was not trained to say it. The lens shows when a token becomes likely, but not what caused it: the attention
# head that matters is in layer 0, but `␣Tokyo` is the likeliest token only from layer 2 on.

# %% [markdown]
# ## The loop: one token after another
#
# **Why.** The model predicts one token. To generate a text, the token is appended and the model runs again on
# the longer text. This is the whole loop, in its simplest form:
#
# ```equation
# next = argmax over the vocabulary of logits[last position]
# ids ← [ids, next]                                              repeat
# ```
#
# *Source: Radford et al. 2019, section 2, equation 1: a text's probability is the product of its tokens'
# probabilities, each given the tokens before. Taking the argmax at each step is called greedy decoding.*

# %%
import torch

from qwen_ref import Tokenizer, load_model

model = load_model(folder, "float32")
tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")

text_ids = torch.tensor([tokenizer.encode("The capital of Iceland is")])  # (1, T)
for _ in range(6):
    logits = model(text_ids)[:, -1]  # (1, V): of the token that follows the last one
    next_id = logits.argmax(dim=-1, keepdim=True)  # (1, 1): the likeliest token
    text_ids = torch.cat([text_ids, next_id], dim=1)  # (1, T + 1)
    print(repr(tokenizer.decode(text_ids[0].tolist())))
assert tokenizer.decode(text_ids[0].tolist()).startswith("The capital of Iceland is Reykjavik.")

# %% [markdown]
# **What to look at.** Every line is one pass through the model and has one more token. After the answer the
# loop goes on, because nothing stops it. The loop is correct, and generation needs no more than this. The
# project refines it in five ways; each has its place in the code:
#
# - **Sampling** draws the next token at random, by its probability, instead of taking the argmax:
#   sampling.py. `generate_uncached` in generate.py is the loop above with sampling.
# - **Stop ids** end the loop when the model predicts one of them, such as the end of the text:
#   `generate_uncached` has them, too.
# - **The cache** keeps the keys and values of all earlier positions, so that a pass computes one position
#   only: `KVCache` in model.py, and `generate` in generate.py.
# - **Prefill** fills the cache with the prompt, in chunks, before the first token: `prefill` in generate.py.
# - **A batch** continues several prompts in one pass. Shorter prompts are padded on the left:
#   `generate_batch` in generate.py.

# %% [markdown]
# ## The cache
#
# **Why.** The loop above computes all positions again for every new token. That is not necessary: the keys
# and values of earlier tokens never change, because no token looks at later ones. So they are kept in a
# *cache*. A new token computes only its own query, key and value, and reads the others from the cache.
#
# ```equation
# bytes per token = 2 · layers · H · K · bytes per number        2: a key and a value
# ```
#
# *Source: it follows from the shapes; `cache_bytes` computes it.*

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
# **What to look at.** Keys are stored after RoPE has turned them, so no key is turned twice. The cache of the
# 72B takes 2.6 MB per token, and 85.9 GB for a full window. In later models, several heads share keys and
# values, which makes the cache smaller. In first-generation Qwen every head has its own.

# %% [markdown]
# ## Sampling
#
# **Why.** The model gives every token a probability, and the loop must choose one. If it always takes the
# likeliest token, texts become repetitive. If it draws from all tokens, it sooner or later draws one of the
# thousands that make no sense. Three settings lie between the two.
#
# ```equation
# temperature   p ∝ exp(logit / temperature)       below 1: sharper, above 1: flatter
# top-k         keep the k likeliest tokens, drop the others, scale to the sum 1
# top-p         keep the likeliest tokens until their sum reaches p, drop the others, scale to the sum 1
# ```
#
# *Source: top-k: Fan et al. 2018; top-p: Holtzman et al. 2020, section 3.1. Published Qwen applies them in
# this order: repetition penalty, temperature, top-k, top-p.*
#
# After "The capital of the", several tokens are right: the tiny model has learned the capitals of 16 states
# whose English names begin with "the". Three of these names continue with `␣United`, so 14 tokens are right.

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
# **What to look at.** The 14 right tokens are the 14 likeliest, and together they have 0.99 of the
# probability. The other 2,738 tokens share the rest. Temperature removes no token: it moves probability
# towards the likeliest tokens, or towards the unlikely ones. At temperature 2 the 2,738 wrong tokens have 0.4
# together: each is unlikely, but they are many. Top-k keeps a fixed number of tokens, and here it drops right
# answers. Top-p keeps as many tokens as it needs to reach p: 11 here, but only one after "The capital of
# Japan is", where the model is sure.

# %% [markdown]
# ## Tensor parallelism: one model on two devices
#
# **Why.** The 72B's weights take 144.6 GB in bfloat16. Most devices have less memory. So every large matrix
# is cut into parts, one for each *rank*. A rank is a process with its own device. The cuts are chosen in
# pairs: the output of a rank's part of the first matrix is exactly the input of its part of the second
# matrix. So the ranks exchange data only once, after the second matrix of a pair.
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
    """The part of a weight of layer 2 that this rank holds, of two ranks."""
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
# **What to look at.** qkv, gate and up are cut by rows: each rank holds some of the heads and some of the
# channels. out and down are cut by columns. After each pair the partial results of the ranks are summed; this
# is called an *all-reduce*. At the end, a *gather* puts the ranks' parts of the logits side by side. Be
# careful with qkv: its rows are [q; k; v], so each third is cut separately. One cut through the middle would
# give rank 0 all of q and half of k.

# %% [markdown]
# ## Quantisation: fewer bits a weight
#
# **Why.** A decode step reads every weight of the matrices once. With fewer bits per weight it is faster and
# needs less memory. Each weight is replaced by a whole number q, which counts steps. The size of a step is
# the *scale*. int8 has one scale for each row. int4 has one scale for each group of 64 weights in a row, and
# also a *zero* for each group: the value that q = 8 stands for. The zero is needed because the weights of a
# group do not have to be centred at 0. Rounding changes a weight by at most half a step.
#
# ```equation
# int8   W[o, i] ≈ q · scale[o]                                    q from −127 to 127
# int4   W[o, i] ≈ (q − 8) · scale[o, i // 64] + zero[o, i // 64]      q from 0 to 15
# ```
#
# *Source: Jacob et al. 2018, equation 1, for the idea; the formulas are those of quantize/rounding.py.*

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
    print(f"{name:<18}: weights off by {errors[name][0]:.2%}, the layer's output by {errors[name][1]:.2%}")
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
# **What to look at.** Rounding moves weights up as often as down. The peak at 0 on the right has a reason: in
# int4, the smallest and the largest weight of each group are exactly on a step. int4 has 16 steps, int8 has
# 255. The error of int4 is 12 times that of int8 with groups of 64, 10 times with groups of 32 and 14 times
# with groups of 256. On this text, the error of the layer's output is smaller than the error of its weights.
# `python examples/measure/fast_accuracy.py` measures what rounding changes in the model's predictions.

# %% [markdown]
# ## The whole of it, once more
#
# The 13 ids became vectors. In each of four layers, attention moved information between the vectors, and the
# MLP worked on each. The head gave 2,752 logits, and the largest is that of `␣Tokyo`. Then the same happens
# with 14 ids, with the help of the cache. Qwen-72B does nothing else; it has 80 layers and larger matrices.

# %%
text = tokenizer.decode(step.token for step in generate(model, ids[0].tolist(), max_new_tokens=2))
print(prompt + text)
assert text.strip("\n") == " Tokyo."

# %% [markdown]
# Where to go from here: open model.py and find each section of this page in it. model.py is shorter. Then
# read generate.py; its first function is the loop.
