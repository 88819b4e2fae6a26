"""Texts, ids, conversations and sampling parameters, given to the library's own calls."""

from __future__ import annotations

import math
import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ref import StreamDecoder, Tokenizer, load_model, sampling
from qwen_ref.chat.context import build_context
from qwen_ref.chat.conversation import Conversation
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.generate import generate, generate_batch, generate_uncached

from . import folders
from .harness import Case, Kind
from .values import MARKS, a_text, words

_VOCABULARY = Path(__file__).resolve().parents[2] / ".vocab" / "qwen.tiktoken"
_LONGEST_RUN = 2000  # combining marks: CPython's own NFC, which is quadratic in them, is the judge up to here

_made: dict[str, Any] = {}
_tokenizers: dict[str, Tokenizer] = {}


def prepare(shared: Path) -> None:
    folders.prepare(shared)
    _made["model"] = load_model(shared / "plain")
    some = "a的é冰 01\n\u0301岛b"
    pairs = [first.encode() + second.encode()[:1] for first, second in pairwise(some)]
    tokens = [*(bytes([value]) for value in range(256)), *pairs, "冰岛".encode(), b"  ", b"\xb0\xe5"]
    tokens = list(dict.fromkeys(tokens))
    _tokenizers["bytes"], _tokenizers["pairs"] = Tokenizer(tokens[:256]), Tokenizer(tokens)
    _tokenizers["tiktoken"] = Tokenizer(tokens, engine="tiktoken")
    if _VOCABULARY.exists():
        _tokenizers["published"] = Tokenizer.from_file(_VOCABULARY)


def _text(rng: random.Random) -> str:
    """Most are short: a run of 100,000 characters takes a second."""
    if rng.random() < 0.9:
        return a_text(rng, rng.choice((10, 40, 300)))
    count, run = rng.choice((1000, 20_000, 100_000)), rng.random()
    if run < 0.2:
        return f"a{MARKS[2] * count}{MARKS[1] * count}"
    if run < 0.4:
        return f"a{''.join(rng.choices(MARKS, k=count))}"
    if run < 0.5:
        return a_text(rng, 100) * (count // 100)
    return rng.choice(("\n", *words(" a é 的 👩 1 \0 <|endoftext|> \ud800 \u1100"))) * count


def _check_encode(case: Case) -> None:
    name, text = case.rng.choice(list(_tokenizers)), _text(case.rng)
    tokenizer = _tokenizers[name]
    special = case.rng.choice(
        ((), (), "all", {"<|im_end|>"}, ["<|endoftext|>"], {"x"}, "x", {"<|extra_204|>"})
    )
    case.describe(f"encode by {name}, allowed_special={special!r}: {text[:100]!a} ({len(text)} characters)")
    if (ids := case.library(lambda: tokenizer.encode(text, special))) is None:
        return
    decoded = case.library(lambda: tokenizer.decode(ids))
    if not re.search(f"[{MARKS}]{{{_LONGEST_RUN},}}", text):
        whole = unicodedata.normalize("NFC", text)
        whole = whole.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if decoded != whole:
            case.found("decode(encode(text)) is not NFC(text)", f"{whole[:200]!a} {decoded!a}")
    if name == "pairs" and len(text) < 5000 and ids != _tokenizers["tiktoken"].encode(text, special):
        case.found("tiktoken encodes otherwise")
    stream = StreamDecoder(tokenizer)
    if "".join([*map(stream.push, ids), stream.flush()]) != decoded:
        case.found("StreamDecoder and decode differ")


def _check_decode(case: Case) -> None:
    rng, tokenizer = case.rng, _tokenizers["bytes"]
    ids = [rng.randrange(tokenizer.n_vocab) for _ in range(rng.randrange(30))]
    if wrong := rng.random() < 0.4:
        ids.append(rng.choice((-1, tokenizer.n_vocab, 2**63, 10**400)))
    case.describe(f"decode {ids}"[:400])
    text = case.library(lambda: tokenizer.decode(ids, skip_special_tokens=rng.random() < 0.5))
    if (text is None) != wrong:
        case.found("decode takes ids outside of the vocabulary, or refuses others")


def _setting(rng: random.Random, good: tuple, wrong: tuple) -> Any:
    return rng.choice(good if rng.random() < 0.75 else wrong)


_WHOLES = (0, -1, 10**6, 2**63 - 1, 2**63, 2**64, 10**400, -(10**400))
_NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 1e-46, 5e-324, 1e308, 10**400, -0.0, 0, 1e-5, 1e-6, 3e38)


def _settings(rng: random.Random) -> dict[str, Any]:
    found = {
        "temperature": _setting(rng, (0.0, 1.0, 0.5, 3.0), _NUMBERS),
        "top_k": _setting(rng, (0, 1, 2, 40), _WHOLES),
        "top_p": _setting(rng, (1.0, 0.5, 0.1, 1e-9), _NUMBERS),
        "repetition_penalty": _setting(rng, (1.0, 1.1, 0.5, 1e-45, 1e38), _NUMBERS),
    }
    return {key: value for key, value in found.items() if rng.random() < 0.6}


def _check_generation(case: Case) -> None:
    rng, model = case.rng, _made["model"]
    V = model.config.vocab_size

    def prompt() -> list[int]:
        ids = [rng.randrange(V) for _ in range(_setting(rng, (1, 2, 5, 33, 70), (0,)))]
        return [*ids, rng.choice((-1, V, 2**63, 10**400))] if rng.random() < 0.1 else ids

    loop = rng.choice((generate, generate_uncached, generate_batch, generate_lookup))
    prompts = [prompt() for _ in range(rng.choice((1, 2, 3)))] if loop is generate_batch else prompt()
    settings = {"stop_ids": rng.choice(([], [], [1], range(V), {-1}, (10**300,)))}
    # The loop without a cache computes as long as it was asked to.
    many = (0, -1) if loop is generate_uncached else (0, -1, 2**40, 2**63, 10**300)
    settings["max_new_tokens"] = _setting(rng, (1, 2, 3), many)
    if loop is generate_lookup:
        settings["draft_tokens"] = _setting(rng, (1, 8), _WHOLES)
    else:
        settings |= _settings(rng) | {"seed": _setting(rng, (None, 0, 1, 2**32), _WHOLES)}
    case.describe(f"{loop.__name__}, {ascii(settings)[:300]}: {ascii(prompts)[:200]}")
    for step in case.library(lambda: list(loop(model, prompts, **settings))) or ():
        for each in step if isinstance(step, list) else [step]:
            if each is not None and not (0 <= each.token < V and -math.inf < each.logprob <= 0):
                case.found("a step with a token or a log-probability out of range", str(each))


def _check_probabilities(case: Case) -> None:
    rng = case.rng
    B, V, N = rng.choice((1, 2)), rng.choice((1, 2, 9)), rng.choice((0, 1, 4))
    odd = (0.0, 1.0, -1.0, 1e30, -1e30, 3e38, 1e-40, 88.0)
    numbers = [rng.gauss(0, 5) if rng.random() < 0.6 else rng.choice(odd) for _ in range(B * V)]
    if rng.random() < 0.3:
        numbers = [float(rng.randrange(3)) for _ in numbers]  # ties
    elif rng.random() < 0.1:
        numbers[-1] = rng.choice((math.nan, math.inf, -math.inf))
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    logits = torch.tensor(numbers, dtype=torch.float64).to(dtype).view(B, V)
    previous = torch.tensor([rng.randrange(-1, V) for _ in range(B * N)], dtype=torch.int64).view(B, N)
    settings = _settings(rng)
    case.describe(
        f"probabilities of {logits.tolist()} ({dtype}), {previous.tolist()}, {ascii(settings)[:300]}"
    )
    found = case.library(lambda: sampling.probabilities(logits, previous, **settings))
    if found is None:
        return
    if not (found.isfinite().all() and (found >= 0).all() and ((found.sum(-1) - 1).abs() < 1e-5).all()):
        case.found("probabilities that do not add up to 1", str(found))
    if settings.get("top_k") == 1 and int((found > 0).sum()) != B:
        case.found("top_k=1 leaves more than one token", str(found))
    if settings.get("temperature") == 0 and N <= 1:
        _check_greedy(case, logits, previous, float(settings.get("repetition_penalty", 1)), found)


def _check_greedy(case: Case, logits: Tensor, previous: Tensor, penalty: float, found: Tensor) -> None:
    """With the penalty applied in float64."""
    logits = logits.double()
    for row, ids in enumerate(previous.tolist()):
        for token in ids:
            if token >= 0:
                logits[row, token] *= penalty if logits[row, token] < 0 else 1 / penalty
    chosen = logits.gather(1, found.argmax(dim=-1, keepdim=True))
    largest = logits.max(dim=-1, keepdim=True).values
    if (largest.abs() < 3e38).all() and not (chosen >= largest - 1e-6 * largest.abs()).all():
        case.found("greedy does not take the likeliest token", str(logits))


def _check_chat(case: Case) -> None:
    rng, tokenizer = case.rng, _tokenizers["bytes"]

    def text() -> Any:
        return a_text(rng, 12) if rng.random() < 0.95 else rng.choice((None, 1, b"a", ["a"]))

    history: Any = [(text(), text()) for _ in range(rng.randrange(3))]
    history = _setting(rng, (history,), ("ab", [("a",)], ["ab"], None, 7, [("a", "b", "c")], {}))
    query, system, window = text(), text(), _setting(rng, (1, 40, 400), (0, -1, 2**63, 10**300))
    case.describe(f"a conversation: {ascii((query, history, system, window))[:400]}")
    if rng.random() < 0.5:
        ids = case.library(lambda: build_context(tokenizer, query, history, system, window))
        if ids is not None and ids.count(tokenizer.special_ids["<|im_start|>"]) % 2 == 0:
            case.found("a context whose turns are not whole")  # system, pairs, and two of the query
        return
    stops = rng.choice(((), ("a",), ("", "b"), ("é",), [text()], "User:"))
    settings = _settings(rng) | {"max_new_tokens": _setting(rng, (1, 3), (0, -1, 10**300))}
    case.describe(f"stop_texts={stops!a}, {ascii(settings)[:300]}")
    arguments = (_made["model"], tokenizer, system, history, window, stops)
    talk = case.library(lambda: Conversation(*arguments, **settings))
    if talk is not None:
        case.library(lambda: "".join(talk.ask(query)))


_CHECKS = (_check_encode, _check_encode, _check_generation, _check_probabilities, _check_chat, _check_decode)


def run(case: Case) -> None:
    case.rng.choice(_CHECKS)(case)


KIND = Kind("prompts", prepare, run)
