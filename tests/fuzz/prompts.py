"""Texts, ids, conversations and sampling parameters, given to the library's own calls."""

from __future__ import annotations

import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qwen_ref import StreamDecoder, Tokenizer, load_model, sampling
from qwen_ref.chat import Conversation, build_context
from qwen_ref.generate import generate, generate_batch, generate_uncached
from qwen_ref.lookup import generate_lookup

from . import folders
from .harness import Case, Kind
from .values import MARKS, a_text

_VOCABULARY = Path(__file__).resolve().parents[2] / ".vocab" / "qwen.tiktoken"
_LONGEST_RUN = 2000  # combining marks: CPython's own NFC, which is quadratic in them, is the judge up to here

_made: dict[str, Any] = {}


def prepare(shared: Path) -> None:
    folder = folders.write(folders.bases()["plain"], shared / "of_prompts")
    _made["model"] = load_model(folder)
    _made["bytes"] = Tokenizer.from_file(folder / "qwen.tiktoken")
    pairs = [first.encode() + second.encode()[:1] for first, second in pairwise("a的é冰 01\n\u0301岛b")]
    tokens = list(
        dict.fromkeys(
            [*(bytes([value]) for value in range(256)), *pairs, "冰岛".encode(), b"  ", b"\xb0\xe5"]
        )
    )
    _made["pairs"], _made["tiktoken"] = Tokenizer(tokens), Tokenizer(tokens, engine="tiktoken")
    if _VOCABULARY.exists():
        _made["published"] = Tokenizer.from_file(_VOCABULARY)
    _made["pairs"].encode("的é冰 𝔘")


def _text(case: Case) -> str:
    rng = case.rng
    if rng.random() < 0.9:
        return a_text(rng, rng.choice((10, 40, 300)))
    count = rng.choice((1000, 20_000, 100_000))
    return rng.choice(
        (
            "a" + "".join(rng.choices(MARKS, k=count)),
            "a" + MARKS[2] * count + MARKS[1] * count,
            rng.choice(("a", " ", "\n", "é", "的", "👩", "1", "\0", "<|endoftext|>", "\ud800", "\u1100"))
            * count,
            a_text(rng, 100) * (count // 100),
        )
    )


def _check_tokenizer(case: Case) -> None:
    name = case.rng.choice([name for name in ("bytes", "pairs", "tiktoken", "published") if name in _made])
    tokenizer, text = _made[name], _text(case)
    special = case.rng.choice(
        ((), (), "all", {"<|im_end|>"}, ["<|endoftext|>"], {"x"}, "x", {"<|extra_204|>", ""})
    )
    case.describe(
        f"encode by {name}, allowed_special={special!r}: {ascii(text)[:300]} ({len(text)} characters)"
    )
    ids = case.library(lambda: tokenizer.encode(text, special))
    if ids is None:
        return
    if not all(0 <= token < tokenizer.n_vocab for token in ids):
        case.found("encode: ids outside of the vocabulary")
    decoded = case.library(lambda: tokenizer.decode(ids))
    if not re.search(f"[{MARKS}]{{{_LONGEST_RUN},}}", text):
        whole = (
            unicodedata.normalize("NFC", text)
            .encode("utf-16-le", "surrogatepass")
            .decode("utf-16-le", "replace")
        )
        if decoded != whole:
            case.found(
                "decode(encode(text)) is not NFC(text)", f"{ascii(whole)[:200]} {ascii(decoded)[:200]}"
            )
    if name == "pairs" and len(text) < 5000 and ids != _made["tiktoken"].encode(text, special):
        case.found("tiktoken encodes otherwise")
    stream = StreamDecoder(tokenizer)
    if "".join([*map(stream.push, ids), stream.flush()]) != decoded:
        case.found("StreamDecoder and decode differ")


def _check_decode(case: Case) -> None:
    rng, tokenizer = case.rng, _made["bytes"]
    wrong = (-1, tokenizer.n_vocab, 2**63, 10**400)
    ids = [
        rng.randrange(tokenizer.n_vocab) if rng.random() < 0.97 else rng.choice(wrong)
        for _ in range(rng.randrange(30))
    ]
    case.describe(f"decode {ids}"[:400])
    text = case.library(lambda: tokenizer.decode(ids, skip_special_tokens=rng.random() < 0.5))
    if (text is None) != any(not 0 <= token < tokenizer.n_vocab for token in ids):
        case.found("decode: ids outside of the vocabulary, or inside")


def _setting(rng: random.Random, good: tuple, wrong: tuple) -> Any:
    return rng.choice(good if rng.random() < 0.85 else wrong)


_NO_NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1.0,
    1e-46,
    5e-324,
    1e308,
    10**400,
    -0.0,
    0,
    1e-5,
    1e-6,
    3e38,
)


def _settings(rng: random.Random) -> dict[str, Any]:
    found = {
        "temperature": _setting(rng, (0.0, 1.0, 0.5, 3.0), _NO_NUMBERS),
        "top_k": _setting(rng, (0, 1, 2, 40), (-1, 10**6, 2**63, 2**64, 10**400, -(10**400))),
        "top_p": _setting(rng, (1.0, 0.5, 0.1, 1e-9), _NO_NUMBERS),
        "repetition_penalty": _setting(rng, (1.0, 1.1, 0.5, 1e-45, 1e38), _NO_NUMBERS),
    }
    return {key: value for key, value in found.items() if rng.random() < 0.6}


def _check_generation(case: Case) -> None:
    rng, model = case.rng, _made["model"]
    V = model.config.vocab_size

    def prompt() -> list[int]:
        ids = [rng.randrange(V) for _ in range(rng.choice((1, 2, 5, 33, 70)))]
        if rng.random() < 0.1:
            ids[rng.randrange(len(ids))] = rng.choice((-1, V, 2**63, 10**400))
        return [] if rng.random() < 0.05 else ids

    settings = _settings(rng) | {"max_new_tokens": _setting(rng, (1, 2, 3), (0, -1, 2**40, 2**63, 10**300))}
    if rng.random() < 0.7:
        settings["seed"] = _setting(rng, (0, 1, 2**32), (-1, 2**63 - 1, 2**63, 10**300))
    if rng.random() < 0.3:
        settings["stop_ids"] = rng.choice(([], [1], range(V), {-1}, (10**300,)))
    loop = rng.choice((generate, generate_uncached, generate_batch, generate_lookup))
    prompts = [prompt() for _ in range(rng.choice((1, 2, 3)))] if loop is generate_batch else prompt()
    if loop is generate_uncached and settings["max_new_tokens"] > 3:
        settings["max_new_tokens"] = 2  # it computes until it is stopped, as it was asked
    if loop is generate_lookup:
        settings = {key: value for key, value in settings.items() if key in ("max_new_tokens", "stop_ids")}
        settings["draft_tokens"] = _setting(rng, (1, 8), (0, -1, 10**300))
    case.describe(
        f"{loop.__name__}, prompts of {[len(each) for each in prompts] if loop is generate_batch else len(prompts)}"
        f" tokens, {ascii(settings)[:300]}: {ascii(prompts)[:100]}"
    )
    steps = case.library(lambda: list(loop(model, prompts, **settings)))
    for step in steps or ():
        for each in step if isinstance(step, list) else [step]:
            if each is not None and not (0 <= each.token < V and -float("inf") < each.logprob <= 0):
                case.found("a step with a token or a log-probability out of range", str(each))


def _check_probabilities(case: Case) -> None:
    rng = case.rng
    B, V, N = rng.choice((1, 2)), rng.choice((1, 2, 9)), rng.choice((0, 1, 4))
    kinds = (0.0, 1.0, -1.0, 1e30, -1e30, 3e38, 1e-40, 88.0)
    numbers = [rng.gauss(0, 5) if rng.random() < 0.6 else rng.choice(kinds) for _ in range(B * V)]
    if rng.random() < 0.1:
        numbers[-1] = rng.choice((float("nan"), float("inf"), -float("inf")))
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
    if (
        not torch.isfinite(found).all()
        or found.min() < 0
        or not torch.allclose(found.sum(-1).double(), torch.ones(B).double())
    ):
        case.found("probabilities that do not add up to 1", str(found))
    top_k = settings.get("top_k", 0)
    if top_k == 1 and (found > 0).sum() != B:
        case.found("top_k=1 leaves more than one token", str(found))


def _check_chat(case: Case) -> None:
    rng = case.rng

    def text() -> Any:
        return a_text(rng, 12) if rng.random() < 0.95 else rng.choice((None, 1, b"a", ["a"]))

    history: Any = [(text(), text()) for _ in range(rng.randrange(3))]
    if rng.random() < 0.1:
        history = rng.choice(("ab", [("a",)], ["ab"], None, 7, [("a", "b", "c")], {}))
    query, system = text(), text()
    window = _setting(rng, (1, 40, 400), (0, -1, 2**63, 10**300))
    case.describe(f"a conversation: {ascii((query, history, system, window))[:400]}")
    if rng.random() < 0.5:
        ids = case.library(lambda: build_context(_made["bytes"], query, history, system, window))
        if ids is not None and ids.count(_made["bytes"].special_ids["<|im_start|>"]) % 2:
            case.found("a context whose turns are not whole")  # system, pairs, and two of the query
        return
    stops = rng.choice(((), ("a",), ("", "b"), ("é",), [text()], "User:"))
    settings = _settings(rng) | {"max_new_tokens": rng.choice((1, 3))}
    case.describe(f"stop_texts={stops!r}, {settings}")
    talk = case.library(
        lambda: Conversation(_made["model"], _made["bytes"], system, history, window, stops, **settings)
    )
    if talk is not None:
        case.library(lambda: "".join(talk.ask(query)))


_CHECKS = (
    _check_tokenizer,
    _check_tokenizer,
    _check_generation,
    _check_probabilities,
    _check_chat,
    _check_decode,
)


def run(case: Case) -> None:
    case.rng.choice(_CHECKS)(case)


KIND = Kind("prompts", prepare, run)
