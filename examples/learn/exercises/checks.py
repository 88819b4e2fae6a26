"""The ten checks: each holds a learner's functions to qwen_ref's own, on small cases and on real tensors.

Beside what is right stand the answers that are usually wrong, each with the hint that its finder needs.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import regex
import torch
import torch.nn.functional as F
from attempt import Attempt, NotRight, hold, raised
from torch import Tensor, nn

import qwen_ref.model
import qwen_ref.tokenizer
from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.files import bundled_checkpoint
from qwen_ref.config import QwenConfig
from qwen_ref.generate import generate
from qwen_ref.loading.loader import load_model, open_checkpoint
from qwen_ref.model import MLP, Qwen, RMSNorm, rotary_frequencies, rotation_tables
from qwen_ref.sampling import probabilities
from qwen_ref.tokenizer import Tokenizer

PROMPT = "冰岛的首都是"  # "The capital of Iceland is"
LONGER_PROMPT = f"蒙古国的首都是乌兰巴托（Ulaanbaatar）\n{PROMPT}"

Known = list[tuple[object, str]]  # wrong answers and their hints


@dataclass(frozen=True)
class Exercise:
    """An exercise: the name of its file, what it is about, its check, and where the project does the same."""

    name: str
    about: str
    check: Callable[[Attempt], str]  # what was found right, in a line; raises NotRight
    hint: str  # where to begin, and where to look when an attempt fails in a way that nobody foresaw
    source: str


# The tiny checkpoint, and a learner's piece in it


@cache
def _model(dtype: str) -> Qwen:
    return load_model(bundled_checkpoint(), dtype)


def _fresh_tokenizer() -> Tokenizer:
    """One that remembers no piece yet."""
    return Tokenizer.from_file(bundled_checkpoint() / "qwen.tiktoken")


_tokenizer = cache(_fresh_tokenizer)


def _published(name: str) -> Tensor:
    """A tensor of the tiny checkpoint by its published name, in float32."""
    _, stored = open_checkpoint(bundled_checkpoint())
    return stored[name].read().float()


def _ids(text: str) -> Tensor:
    return torch.tensor([_tokenizer().encode(text)])


def _read_by(module: nn.Module, model: Qwen) -> Tensor:
    """What a module of the model is given when the model reads the longer prompt."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(_ids(LONGER_PROMPT))
    handle.remove()
    return seen[0]


def _says(model: Qwen) -> str:
    steps = generate(model, _ids(PROMPT)[0].tolist(), max_new_tokens=7)
    return _tokenizer().decode(step.token for step in steps).strip()


@contextmanager
def _inside(piece: str, place: object, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A learner's piece in the place of the project's own. What fails then, fails by what the piece gave."""
    try:
        with mock.patch.object(place, name, function):
            yield
    except NotRight:
        raise
    except Exception as error:
        raise NotRight(f"with your {piece} inside, qwen_ref stopped: {raised(error)}") from None


def _says_with(piece: str, place: object, name: str, function: Callable[..., Any]) -> str:
    """Puts a learner's piece into the model while the tiny checkpoint speaks; it must say the same."""
    model = _model("bfloat16")
    right = _says(model)
    with _inside(piece, place, name, function):
        found = _says(model)
    hold(f"what the tiny checkpoint says with your {piece}", found, right)
    return f"with your {piece} inside, the tiny checkpoint continues {PROMPT} with {found}"


# 1


def check_split(attempt: Attempt) -> str:
    split_text = attempt.function("split_text")
    words, rest = qwen_ref.tokenizer.PATTERN.split(r"|\p{N}|")

    def with_numbers(numbers: str, text: str) -> list[str]:
        return regex.findall(f"{words}|{numbers}|{rest}", text)

    gpt_2 = "Digits stay together, as in GPT-2. How many characters may your alternative take?"
    gpt_4 = "Up to three digits come at once, as in GPT-4. How many characters may your alternative take?"
    space = "A digit takes the space before it, as words do. In Qwen that space is a piece by itself."
    digits = (
        "What no alternative takes is lost, and yours takes decimal digits only. Unicode knows more numbers, "
        "such as ² and ½; look at which class of them WORDS leaves out."
    )
    accent = (
        "Here é came as an e and an accent, and an accent is no letter. Which form has one character for "
        "both, and when must the text be in it?"
    )
    for text in ("In 2024", "x² or ½, ⅷ or ٣", "cafe\u0301 no 5", "It's  1,000\n\tfor 2nd  \n 冰岛 3 "):
        nfc, nfd = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        known: Known = [
            (with_numbers(r"\p{N}+", nfc), gpt_2),
            (with_numbers(r" ?\p{N}+", nfc), gpt_2),
            (with_numbers(r"\p{N}{1,3}", nfc), gpt_4),
            (with_numbers(r" ?\p{N}", nfc), space),
            (with_numbers(r"[0-9]", nfc), digits),
            (with_numbers(r"\d", nfc), digits),
            (with_numbers(r"\p{N}", text), accent),
            (with_numbers(r"\p{N}", nfd), accent),
            (with_numbers(r"\p{N}", unicodedata.normalize("NFKC", text)), "NFKC writes ½ as 1⁄2: too much."),
        ]
        otherwise = "Joined, the pieces must be the text; the first alternative that fits takes its piece."
        hold(f"the pieces of {text!r}", split_text(text), qwen_ref.tokenizer.split(nfc), known, otherwise)

    text = "12 + 7 = 19"
    with _inside("split_text", qwen_ref.tokenizer, "split", split_text):
        ids = _fresh_tokenizer().encode(text)
    hold(f"the ids of {text!r}", ids, _tokenizer().encode(text))
    return f"with your split_text inside, the tokenizer encodes {text!r} as {ids}"


# 2


def check_merge(attempt: Attempt) -> str:
    merge_once = attempt.function("merge_once")
    ranks = {bytes([letter]): rank for rank, letter in enumerate(b"abcdx")}

    def parts(text: str) -> list[bytes]:
        return [part.encode() for part in text.split()]

    first = "You took the leftmost pair that is a token. Which pair must be merged first?"
    highest = "You took the highest rank. Which tokens did training find first: those of low or of high rank?"
    once = "You went on merging. One call is one merge: the next one may be of another pair."
    every = "You merged the pair everywhere. One call is one merge, of the leftmost."
    pairs = {b"ab": 11, b"bc": 10, b"cd": 12, b"bcd": 13}
    known: Known = [
        (parts("ab c d"), first),
        (parts("a b cd"), highest),
        (parts("a bcd"), once),
        (parts("ab cd"), once),
    ]
    found = merge_once(parts("a b c d"), ranks | pairs)
    hold("a b c d, with the tokens bc: 10, ab: 11, cd: 12", found, parts("a bc d"), known)

    right_end = "Both pairs have the same rank, and you took the right one."
    known = [(parts("ab x ab"), every), (parts("a b x ab"), right_end)]
    found = merge_once(parts("a b x a b"), ranks | {b"ab": 11})
    hold("a b x a b, with the token ab", found, parts("ab x a b"), known)
    found = merge_once(parts("a a a"), ranks | {b"aa": 11})
    hold("a a a, with the token aa", found, parts("aa a"), [(parts("a aa"), right_end)])

    nothing = "No pair is a token: then the piece is finished, and its parts are the answer."
    hold("a x, with no token of two letters", merge_once(parts("a x"), ranks), parts("a x"), (), nothing)
    hold("a alone", merge_once(parts("a"), ranks), parts("a"), (), nothing)

    def all_merges(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
        now = [bytes([byte]) for byte in piece]
        for _ in piece:
            now = merge_once(now, ranks)
        return [ranks[part] for part in now]

    text = f"{LONGER_PROMPT} Reykjavik, Ulaanbaatar; aaaaaaa"
    with _inside("merge_once", qwen_ref.tokenizer, "merge_pairs", all_merges):
        ids = _fresh_tokenizer().encode(text)
    hold(f"the ids of {text!r}", ids, _tokenizer().encode(text))
    return f"with your merge_once inside, the tokenizer makes {len(ids)} tokens of {len(text.encode())} bytes"


# 3


def check_rms_norm(attempt: Attempt) -> str:
    rms_norm = attempt.function("rms_norm")
    random = torch.Generator().manual_seed(3)

    def project(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = RMSNorm(len(weight), eps)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        return norm(x)

    # So small that eps is half of what is under the root.
    eps = 1e-6
    x, weight = 1e-3 * torch.randn(3, 64, generator=random) + 5e-4, torch.rand(64, generator=random) + 0.5
    square = x.square().mean(-1, keepdim=True)
    centred = x - x.mean(-1, keepdim=True)
    known: Known = [
        (x / (square.sqrt() + eps) * weight, "eps is outside the root. In the formula it is inside."),
        (x / square.sqrt() * weight, "Where is eps? The numbers here are so small that it matters."),
        (x / (square + eps).sqrt(), "Where is weight?"),
        (
            x / (square + eps) * weight,
            "You divide by the mean of the squares itself: a root is missing.",
        ),
        (
            x * (square + eps).sqrt() * weight,
            "You multiply by the root. Rows of any size must become equally large.",
        ),
        (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight,
            "That is LayerNorm: it subtracts the mean of x. RMSNorm subtracts nothing.",
        ),
        (
            x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * weight,
            "You divide by the length of the row. Is it the sum of the squares that stands under the root?",
        ),
        (
            x / (x.square().mean() + eps).sqrt() * weight,
            "One number divides all rows. Each row, the last dimension of x, has its own mean.",
        ),
    ]
    otherwise = "The mean is one of squares, over the last dimension, and stays a column: keepdim=True."
    hold("small rows in float32", rms_norm(x, weight, eps), project(x, weight, eps), known, otherwise)

    model = _model("bfloat16")
    norm = model.blocks[2].mlp_norm
    x, weight, eps = _read_by(norm, model), norm.weight, norm.eps
    wide = x.float()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    narrow = "The squares and their mean were rounded to 8 bits. In which dtype does step 1 compute?"
    late = "You rounded after the weight. Steps 2 and 3 have the other order; in bfloat16 it matters."
    known = [
        (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight, narrow),
        (x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight, narrow),
        ((normed * weight.float()).to(x.dtype), late),
        (normed * weight, "It came out in float32: bfloat16 times float32 is float32. Where is step 2?"),
    ]
    otherwise = "In float32 you are right. Look at where bfloat16 becomes float32, and where it is restored."
    found = rms_norm(x, weight, eps)
    hold("the residual stream of layer 2 in bfloat16", found, norm(x), known, otherwise)
    return _says_with("rms_norm", RMSNorm, "forward", lambda self, x: rms_norm(x, self.weight, self.eps))


# 4


def check_ntk(attempt: Attempt) -> str:
    ntk_alpha, frequencies = attempt.function("ntk_alpha"), attempt.function("frequencies")
    no_steps = "Nothing was rounded up. α goes in steps: prompts of similar lengths share one α."
    floor = "You rounded log2(…) + 1 down. A prompt one token too long must already have the next α."
    one_outside = "The exponent is log2(…) + 1, and ⌈ ⌉ is around all of it."
    small = "A short prompt has a negative exponent, and α makes the base negative. How small may α be?"
    trained = 8192
    # In this order each mistake is met first at a length where no other gives the same α.
    for length in (2 * trained, 100 * trained, 10000, 2 * trained + 1, trained + 1, trained, 100):
        ratio = length / trained
        steps = math.log2(ratio) + 1
        known: Known = [
            (2**steps - 1, no_steps),
            (max(2**steps - 1, 1), no_steps),
            (max(2 ** round(steps) - 1, 1), "It was rounded to the nearest, down as well as up."),
            (2 ** math.floor(steps) - 1, floor),
            (max(2 ** math.floor(steps) - 1, 1), floor),
            (2 ** math.ceil(steps), "Where is the − 1 at the end of the formula?"),
            (2 ** math.ceil(steps - 1) - 1, one_outside),
            (max(2 ** math.ceil(steps - 1) - 1, 1), one_outside),
            (2 ** math.ceil(math.log(ratio) + 1) - 1, "The logarithm is the one to base 2."),
            (2 ** math.ceil(steps) - 1, small),
        ]
        right = qwen_ref.model.ntk_alpha(length, trained)
        hold(f"α for {length} tokens, {trained} trained", ntk_alpha(length, trained), right, known)

    config = QwenConfig.preset("7b")
    base, K = config.rotary_emb_base, config.kv_channels
    steps_of_two = torch.arange(0, K, 2, dtype=torch.float32) / K
    for length in (2000, 10000):
        alpha = qwen_ref.model.ntk_alpha(length, config.seq_length)
        stretched = base * alpha ** (K / (K - 2))
        twice = torch.arange(0, K // 2, dtype=torch.float32) / K
        interpolated = base**-steps_of_two / alpha
        inside = "All pairs became slower by α, as if positions were squeezed. Pair 0 must stay as it is."
        known = [
            (stretched**-twice, "The exponent is −2i/K; where is the 2?"),
            (stretched**steps_of_two, "These grow. What is the sign of the exponent?"),
            (
                1 / (base * alpha) ** steps_of_two,
                "The base was multiplied by α itself. α has an exponent, too.",
            ),
            (1 / base**steps_of_two, "α changes nothing in these. Where does the formula have it?"),
            (1 / (base * alpha ** ((K - 2) / K)) ** steps_of_two, "The exponent of α is upside down."),
            (interpolated, inside),
            ((1 / stretched**steps_of_two).repeat(2), "There are K numbers, but each pair needs only one."),
        ]
        right = rotary_frequencies(config, [length], torch.float32)[0]
        hold(f"the 7B's frequencies, α = {alpha}", frequencies(base, alpha, K), right, known)
    slowest = [round(2 * math.pi / float(frequencies(base, alpha, K)[-1])) for alpha in (1, 3)]
    return (
        f"behind {trained} tokens α is {ntk_alpha(trained + 1, trained)}, and the 7B's slowest pair takes "
        f"{slowest[1]:,} positions for a turn, not {slowest[0]:,}"
    )


# 5


def _interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def check_rotate(attempt: Attempt) -> str:
    rotate_half, rotate = attempt.function("rotate_half"), attempt.function("rotate")
    neighbours = (
        "You paired neighbours, as the paper does: 1 with 2. In Qwen 1 goes with 5. Which places are those?"
    )
    direction = "You turned the other way, by −90°: (a, b) became (b, −a)."
    x = torch.arange(1.0, 9.0)
    first, second = x.chunk(2)
    known: Known = [
        (_interleaved(x), neighbours),
        (-_interleaved(x), neighbours),
        (torch.cat((second, -first)), direction),
        (torch.cat((second, first)), "You swapped the halves but changed no sign."),
        (torch.cat((-first, second)), "You changed a sign, but you must also swap the halves."),
        (-x.flip(0), "You reversed the order. Cut x into halves, and keep the order in each."),
        (x.flip(0), "You reversed the order. Cut x into halves, and keep the order in each."),
    ]
    quarter = qwen_ref.model.rotate(x, torch.zeros(4), torch.ones(4))
    hold("rotate_half of 1 2 3 4 5 6 7 8", rotate_half(x), quarter, known)

    for dtype in ("float32", "bfloat16"):
        model = _model(dtype)
        attn = model.blocks[1].attn
        qkv = attn.qkv(_read_by(attn, model))
        q = qkv.unflatten(-1, (3, -1, attn.head_size))[:, :, 0]  # (B, T, H, K)
        T = q.shape[1]
        tables = rotation_tables(
            torch.arange(T)[None], rotary_frequencies(model.config, [T], torch.float32)
        )  # (1, T, 1, K/2) each
        cos, sin = (torch.cat((table, table), dim=-1) for table in tables)  # (1, T, 1, K): for both halves
        wide = q.float()
        half = torch.cat((-wide[..., attn.head_size // 2 :], wide[..., : attn.head_size // 2]), dim=-1)
        narrow_cos, narrow_sin = cos.to(q.dtype), sin.to(q.dtype)
        known = [
            (wide * sin + half * cos, "You swapped cos and sin."),
            (wide * cos - half * sin, "It turns backwards: look at the sign before sin."),
            (wide * cos + _interleaved(wide) * sin, neighbours),
            (wide, "Nothing turns here."),
        ]
        known = [(wrong.to(q.dtype), hint) for wrong, hint in known]
        if dtype == "bfloat16":
            early = "You rounded too early. Which dtype do cos and sin have, and when is it left?"
            known += [
                (q * narrow_cos + half.to(q.dtype) * narrow_sin, early),
                ((wide * cos).to(q.dtype) + (half * sin).to(q.dtype), early),
                (wide * cos + half * sin, "It came out in float32. The result has the dtype of x."),
            ]
        otherwise = "Turned by t, (a, b) becomes (a cos t − b sin t, b cos t + a sin t)."
        right, found = qwen_ref.model.rotate(q, *tables), rotate(q, cos, sin)
        hold(f"the queries of layer 1 in {dtype}", found, right, known, otherwise)

    def with_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, *(torch.cat((table, table), dim=-1) for table in (cos, sin)))

    return _says_with("rotate", qwen_ref.model, "rotate", with_halves)


# 6


def check_logn(attempt: Attempt) -> str:
    logn_scale = attempt.function("logn_scale")
    trained, positions = 8, torch.arange(16)
    p, log_trained = positions.float(), math.log(trained)
    count = "A position counted from 0 has that many tokens before it. How many does its query see?"
    unlimited = "Within the trained length your factor is below 1. What must it be there?"
    bases = "The two logarithms have different bases. Any base is right if both have the same."
    known: Known = [
        ((p + 1).log() / log_trained, unlimited),
        (p.log() / log_trained, unlimited),
        ((p.log() / log_trained).clamp(min=1), count),
        (
            ((p + 2).log() / log_trained).clamp(min=1),
            "You counted one token too many. Which query sees n tokens?",
        ),
        (((p + 1).log10() / log_trained).clamp(min=1), bases),
        (((p + 1).log() / math.log10(trained)).clamp(min=1), bases),
        (
            ((p + 1).log() / log_trained).clamp(max=1),
            "Your factor is 1 where it must grow, and smaller where it must be 1.",
        ),
        (((p + 1) / trained).clamp(min=1), "That grows with n itself. Where are the logarithms?"),
        ((p + 1).log().clamp(min=1), "By what is log(n) divided?"),
    ]
    right = qwen_ref.model.logn_scale(positions, trained, torch.float32)
    found = logn_scale(positions, trained, torch.float32)
    hold(f"positions 0 to 15, {trained} trained", found, right, known, within=1e-6)

    positions = torch.arange(32768).view(2, -1)
    right = qwen_ref.model.logn_scale(positions, 8192, torch.bfloat16)
    narrow = positions.bfloat16()
    early = "Something was rounded to bfloat16 before the end: positions, or their logarithms."
    known = [
        (((narrow + 1).log() / math.log(8192)).clamp(min=1), early),
        (((positions + 1).bfloat16().log() / math.log(8192)).clamp(min=1), early),
        (((positions + 1).log().bfloat16() / math.log(8192)).clamp(min=1), early),
        (right.float(), "The result must have the dtype that the argument names."),
        (
            ((positions + 1).log() / math.log(8192)).clamp(min=1),
            "The result must have the dtype that the argument names.",
        ),
    ]
    found = logn_scale(positions, 8192, torch.bfloat16)
    hold("positions up to 32,767 in two rows, 8192 trained, in bfloat16", found, right, known, early)
    start = int(positions.flatten()[(found > 1).flatten()].min())
    return f"at all of {found.numel():,} positions; in bfloat16 the factor is 1 up to position {start - 1:,}"


# 7


def check_mask(attempt: Attempt) -> str:
    causal_mask = attempt.function("causal_mask")
    for T, S in ((3, 3), (3, 5), (1, 6), (4, 64)):
        right = qwen_ref.model.causal_mask(T, S, None, torch.device("cpu"))[0, 0]
        keys, first, queries = torch.arange(S), torch.arange(T)[:, None], torch.arange(S - T, S)[:, None]
        additive = torch.zeros(T, S).masked_fill(~right, -torch.inf)
        wants_bool = "The numbers are right, but they are not bool. True means that the query sees the key."
        offset = "Row 0 is the first new query. How many keys came before it out of the cache?"
        known: Known = [
            (keys < queries, "In your mask a query does not see its own key. It must see it."),
            (keys < first, "In your mask a query does not see its own key. It must see it."),
            (keys > queries, "It is inverted: True means that the query sees the key."),
            (keys >= queries, "Queries see what comes after them. Which of the two are the rows?"),
            (keys <= first, offset),
            (keys <= queries + 1, "A query sees one key that comes after it: its own answer."),
            (
                torch.ones(T, S, dtype=torch.bool),
                "Every query sees every key, those after it as well.",
            ),
            (
                torch.ones(S, S, dtype=torch.bool).tril(),
                "There are S rows, but there are only T queries.",
            ),
            (
                torch.ones(T, T, dtype=torch.bool).tril(),
                "There are T columns: the cached keys are missing.",
            ),
            (right.float(), wants_bool),
            (right.long(), wants_bool),
            (
                additive,
                "That mask can be added to scores. Here bool is wanted: True if the query sees the key.",
            ),
        ]
        otherwise = "Write down the position of the query in row t, and compare it with that of the key, s."
        hold(f"{T} new of {S} positions", causal_mask(T, S), right, known, otherwise)

    def with_padding(T: int, S: int, padding: Tensor | None, device: torch.device) -> Tensor:
        return causal_mask(T, S)[None, None]

    model, ids = _model("float32"), _ids(LONGER_PROMPT)
    cache = model.new_cache(1, ids.shape[1])
    with _inside("mask", qwen_ref.model, "causal_mask", with_padding):
        logits = torch.cat([model(chunk, cache=cache) for chunk in ids.split(4, dim=1)], dim=1)
    hold("the logits of a prompt fed in chunks of 4", logits, model(ids), within=1e-4)
    return (
        f"with your mask inside, {ids.shape[1]} tokens in chunks of 4 have the logits of one pass; "
        f"the likeliest next token is {_tokenizer().decode([int(logits[0, -1].argmax())])}"
    )


# 8


def check_swiglu(attempt: Attempt) -> str:
    mlp = attempt.function("mlp")
    model = _model("float32")
    x = _read_by(model.blocks[1].mlp, model)
    w1, w2, c_proj = (_published(f"transformer.h.1.mlp.{name}.weight") for name in ("w1", "w2", "c_proj"))
    one, two = F.linear(x, w1), F.linear(x, w2)
    middles = [
        (F.silu(one) * two, "The SiLU is on w1, as in Llama. Which of the two is the gate in Qwen?"),
        (F.silu(one * two), "The SiLU is on the product. It must act on only one of the factors."),
        (F.silu(one) * F.silu(two), "The SiLU is on both. It must act on only one of the factors."),
        (one * torch.sigmoid(two), "The gate went only through a sigmoid. silu(z) has one more factor."),
        (one * F.gelu(two), "That is GELU, which gives almost the same numbers. Qwen has SiLU."),
        (one * F.relu(two), "That is ReLU. Qwen has SiLU."),
        (one * two, "No function acts on the gate: where is the SiLU?"),
        (F.silu(two), "The gate is alone. What does it let through?"),
        (one + F.silu(two), "The two are added. A gate multiplies."),
    ]
    known: Known = [(F.linear(middle, c_proj), hint) for middle, hint in middles]
    known.append((one * F.silu(two), "That is the middle, of F channels. What takes them back to D?"))
    found = mlp(x, w1, w2, c_proj)
    hold("the MLP of layer 1 in float32", found, model.blocks[1].mlp(x), known)
    return _says_with(
        "mlp", MLP, "forward", lambda self, x: mlp(x, self.up.weight, self.gate.weight, self.down.weight)
    )


# 9


def _wrong_top_p(given: Tensor, p: float) -> Known:
    values, order = given.sort(descending=True)
    reached = values.cumsum(dim=-1)

    def kept(which: Tensor) -> Tensor:
        return torch.zeros_like(given).scatter(0, order, values.where(which, 0.0))

    needed, beyond = reached - values < p, reached - values <= p
    dropped = "You dropped the token with which the sum reaches p. Without it the set does not reach p."
    threshold = "You compared each token with p. The sum of the tokens must reach p."
    short, exact = kept(reached <= p), kept(reached < p)
    return [
        (short / short.sum(), dropped),
        (short, dropped),
        (exact / exact.sum(), dropped),
        (kept(needed), "The right tokens are there, but they do not sum to 1 any more."),
        (
            values.where(needed, 0.0) / values[needed].sum(),
            "The tokens are sorted. Each token must stay in its place.",
        ),
        (
            values[needed] / values[needed].sum(),
            "You returned only the kept tokens. Others keep a place, with 0.",
        ),
        (
            kept(beyond) / values[beyond].sum(),
            "You kept one token too many: the sum reached exactly p before it.",
        ),
        (given.where(given >= p, 0.0), threshold),
        (given.where(given >= p, 0.0) / given[given >= p].sum(), threshold),
        (given.where(given >= 1 - p, 0.0) / given[given >= 1 - p].sum(), threshold),
        (given, "All tokens are still there."),
    ]


def check_top_p(attempt: Attempt) -> str:
    top_p = attempt.function("top_p")
    none = torch.zeros(1, 0, dtype=torch.int64)
    few = torch.tensor([0.0625, 0.5, 0.1875, 0.25])
    otherwise = "Sort, add up from the likeliest, and ask for each token: do those before it reach p already?"
    for p in (0.7, 0.3, 0.75, 1.0):
        right = probabilities(few.log()[None], none, top_p=p)[0]
        hold(f"p = {p} of {few.tolist()}", top_p(few, p), right, _wrong_top_p(few, p), otherwise)

    temperature = 2.5  # so hot that there are many to keep
    logits = _model("float32")(_ids(LONGER_PROMPT))[0]
    counts = []
    for position, row in enumerate(logits):
        given = probabilities(row[None], none, temperature)[0]
        right = probabilities(row[None], none, temperature, top_p=0.8)[0]
        found = top_p(given, 0.8)
        what = f"p = 0.8 of the tiny checkpoint's {len(row)} tokens at position {position}"
        hold(what, found, right, _wrong_top_p(given, 0.8), otherwise)
        counts.append(int((found > 0).sum()))
    return (
        f"at temperature {temperature} from {min(counts)} to {max(counts)} of {logits.shape[1]} tokens stay"
    )


# 10


def check_qkv_cut(attempt: Attempt) -> str:
    qkv_part = attempt.function("qkv_part")
    even = "An even cut: rank 0 has q and half of k, and no v. A head needs rows of all three."
    strided = "Every second row: that cuts through the heads. A rank's heads stand one after another."
    thirds = "A third for each rank: all of q, or of k. A head needs rows of all three."
    stacked = "The right rows, but as a stack of three. One matrix is wanted, [q; k; v]."
    rows = torch.arange(12)
    for rank in (0, 1):
        cut = rows.view(3, 2, 2)[:, rank]
        known: Known = [
            (rows.chunk(2)[rank], even),
            (rows[rank::2], strided),
            (rows.chunk(3)[rank], thirds),
            (cut, stacked),
            (cut[0], "Only q. What does a head need besides?"),
            (cut.t().flatten(), "The rows of q, k and v take turns. All of q come first, then k, then v."),
            (rows.view(3, 2, 2)[:, 1 - rank].flatten(), "Those are the rows of the other rank."),
        ]
        hold(f"rank {rank} of 2, rows 0 to 11", qkv_part(rows, rank, 2), cut.flatten(), known)

    specs = [spec for spec in tensor_table(_model("float32").config) if spec.cut == "heads"]
    for spec in specs:
        whole = _published(spec.published)
        for ranks in (2, 4):
            for rank in range(ranks):
                right = spec.part(whole, rank, ranks).reshape(spec.shape_of_rank(ranks))
                known = [(whole.chunk(ranks)[rank], even), (whole[rank::ranks], strided)]
                found = qkv_part(whole, rank, ranks)
                hold(f"{spec.published}, rank {rank} of {ranks}", found, right, known)
    return f"weights and biases of {len(specs) // 2} layers are cut for 2 and 4 ranks as the loader does it"


EXERCISES = [
    Exercise(
        "ex01_split",
        "text → pieces: digits one by one",
        check_split,
        "Normalise first. Then use one pattern of three alternatives, and findall. \\p{N} is any number.",
        "src/qwen_ref/tokenizer.py, PATTERN and split",
    ),
    Exercise(
        "ex02_merge",
        "one merge of byte pairs",
        check_merge,
        "Begin with all places i where parts[i] + parts[i + 1] is in ranks. There may be none.",
        "src/qwen_ref/tokenizer.py, merge_pairs",
    ),
    Exercise(
        "ex03_rms_norm",
        "RMSNorm, and where it rounds",
        check_rms_norm,
        "Begin in float32: the mean of x² over the last dimension, as a column; eps; the root. Then dtypes.",
        "src/qwen_ref/model.py, RMSNorm",
    ),
    Exercise(
        "ex04_ntk",
        "dynamic NTK's α and the frequencies",
        check_ntk,
        "Put 10000 and 8192 into the formula by hand, from the inside out; then a prompt that is short.",
        "src/qwen_ref/model.py, ntk_alpha and rotary_frequencies",
    ),
    Exercise(
        "ex05_rotate",
        "rotary positions: halves, not neighbours",
        check_rotate,
        "Cut x into halves along the last dimension: in the first are the a's of all pairs, then the b's.",
        "src/qwen_ref/model.py, rotate",
    ),
    Exercise(
        "ex06_logn",
        "LogN, beyond the trained length",
        check_logn,
        "What is n at position 0? torch.log takes tensors, math.log numbers.",
        "src/qwen_ref/model.py, logn_scale",
    ),
    Exercise(
        "ex07_mask",
        "the causal mask behind a cache",
        check_mask,
        "Draw the case T = 2, S = 5 on paper: at which positions do the two queries stand?",
        "src/qwen_ref/model.py, causal_mask",
    ),
    Exercise(
        "ex08_swiglu",
        "the MLP, with the right gate",
        check_swiglu,
        "Follow the shapes: x (…, D) times a weight (F, D) is F.linear(x, weight), (…, F).",
        "src/qwen_ref/model.py, MLP; the names in checkpoint.py, tensor_table",
    ),
    Exercise(
        "ex09_top_p",
        "top-p",
        check_top_p,
        "Sort with descending=True and keep the indices: they say where each value has to go back to.",
        "src/qwen_ref/sampling.py, probabilities",
    ),
    Exercise(
        "ex10_qkv_cut",
        "q, k and v cut for several ranks",
        check_qkv_cut,
        "Take q, k and v apart before you cut anything.",
        "src/qwen_ref/checkpoint.py, TensorSpec.part; parallel.py, HeadParallelLinear",
    ),
]
