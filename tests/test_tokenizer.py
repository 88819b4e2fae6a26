"""The tokenizer against the recorded output, a slow obvious one, tiktoken itself, and bad input."""

from __future__ import annotations

import base64
import os
import random
import signal
import string
import time
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise, product, takewhile
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import read_jsonl

from qwen_ref import Tokenizer
from qwen_ref import tokenizer as plain
from qwen_ref.config import InputError
from qwen_ref.loading.tokenizer import _LONG_RUN_SAMPLED, nfc
from qwen_ref.tokenizer import StreamDecoder, merge_pairs, read_ranks

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
END_OF_TEXT, IM_END = 151643, 151645
ENGINES = ("fast", "plain", "tiktoken")
BYTES = [bytes([value]) for value in range(256)]
CASES, DECODE = "tokenizer/cases.jsonl", "tokenizer/decode.jsonl"


@pytest.fixture(params=["tokenizer", "plain_tokenizer", "tiktoken_tokenizer"], ids=ENGINES)
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def plain_tokenizer(vocabulary_file: Path) -> plain.Tokenizer:
    return plain.Tokenizer.from_file(vocabulary_file)


def made(tokens: list[bytes], engine: str) -> plain.Tokenizer:
    if engine == "plain":
        return plain.Tokenizer(tokens)
    return Tokenizer(tokens, "python" if engine == "fast" else engine)


@pytest.fixture(scope="module")
def ranks(vocabulary_file: Path) -> dict[bytes, int]:
    lines = vocabulary_file.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@pytest.fixture(scope="module")
def tokens(ranks: dict[bytes, int]) -> list[bytes]:
    return sorted(ranks, key=ranks.__getitem__)


Encode = Callable[..., list[int]]


def tiktoken_encode(ranks: dict[bytes, int]) -> Encode:
    """What the published tokenizer does: NFC, then tiktoken."""
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(text: str, allowed_special: str | set[str] = frozenset()) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        return encoding.encode(text, allowed_special=allowed_special, disallowed_special=())

    return encode


@pytest.fixture(scope="module")
def published(ranks: dict[bytes, int]) -> Encode:
    return tiktoken_encode(ranks)


@pytest.fixture(scope="module")
def splits() -> tuple[Tokenizer, Encode]:
    """A vocabulary of bytes and pairs of bytes, ours and tiktoken's. It shows where pieces end, which the
    real one often hides: two bytes that are a token stay single only where a piece ends between them."""
    # Of the pairs that join two characters beyond ASCII a few are enough: each costs our encoder time.
    joined = list(product(range(0x80, 0xC0), (0xC2, 0xE3, 0xE4, 0xF0)))
    pairs = [pair for pair in product(range(256), repeat=2) if pair[0] < 0x80 or pair[1] < 0xC0]
    tokens = BYTES + [bytes(pair) for pair in pairs + joined]
    random.Random(14).shuffle(tokens)
    return Tokenizer(tokens), tiktoken_encode({token: rank for rank, token in enumerate(tokens)})


@pytest.fixture
def deadline() -> Iterator[None]:
    """Quadratic time on a long piece would be hours: fail after a minute of processor time instead."""

    def expire(*_: object) -> None:
        raise AssertionError("still running after 60 s")

    previous = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, previous)


def slow_merge(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def slow_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    ids = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        piece = piece.encode()
        ids += [ranks[piece]] if piece in ranks else slow_merge(piece, ranks)
    return ids


# Text to draw from. Unicode 3.2 is known to every later table: Python's, regex's and tiktoken's.

EVERY_CHARACTER = [
    c for c in map(chr, range(0x110000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")
]
SPACES = [c for c in EVERY_CHARACTER if c.isspace() or c in "\u200b\u180e\ufeff\u2060"]
POOLS = {
    "ascii": list(string.printable),
    "control": [chr(c) for c in (*range(32), *range(0x7F, 0xA0))],
    "code": ["def ", "self.", "    ", "\n\t", "):\n", " == ", "0x1F", "//", "*/\r\n", "();", '"""', "_x"],
    "words": ["the", " of", "Hello", " World", "don't", "IT'S", " naïve", "ing", "ＦＵＬＬ", " ß"],
    "space": [*SPACES, *SPACES, *" \n\r\t" * 3, "a", ".", "1"],
    "digits": list("0123456789²³¹₀⁴½¾↉٠٣۴३৪๕１２Ⅷ①㊿〇零𝟘𐌢"),
    "letters": list("àéßñŁЖяΩµאבعربकษภาไǅŉﬁªºʰᾳ𝒜𐐀"),
    "marks": [*"\u0301\u0300\u0323\u0338\u3099\u094d\u093f\u0e34\u20dd\u0345ae", "e\u0301", "q\u0323\u0307"],
    "cjk": [*"中文字的一丁㐀𠀀豈、。「」（がカ한\u2f00", "\u30ab\u3099", "\u1112\u1161\u11ab"],
    "emoji": ["👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👍🏽", "🇨🇳", "❤\ufe0f", *"😀\u200d\ufe0f🏽 "],
    "quotes": [*"''’xsſ", "'s", "'S", "'ſ", "'K", "'re", "'vE", "'ll", "'LL", "'m", "'d", "'T", "'İ", "'ﬆ"],
    "surrogates": [*"\ud800\udbff\udc00\udfffa \u0301", "\ud83d\ude00", "\ud834\udd5e"],
    "private": [*"\ue000\uf8ff\ufffe\uffff\ufffd\U000f0000\U0010fffd\U0001ffff"],
    "special": [*SPECIAL[:4], SPECIAL[-1], "<|extra_205|>", "<|im_end|>\u0338", "<|", "|>", *"<|>\n", "im_"],
    "any": EVERY_CHARACTER,
}


def random_texts(count: int, seed: int, without: tuple[str, ...] = ()) -> Iterator[str]:
    generator = random.Random(seed)
    names = [name for name in POOLS if name not in without]
    for _ in range(count):
        pools = [POOLS[name] for name in generator.sample(names, generator.randint(1, 4))]
        length = generator.choice((1, 2, 3, 5, 8, 13, 40))
        yield "".join(generator.choice(generator.choice(pools)) for _ in range(length))


def random_ids(count: int, seed: int, tokens: list[bytes]) -> Iterator[list[int]]:
    """Whole tokens, parts of characters, single bytes and special tokens, each alone and mixed."""
    generator = random.Random(seed)
    broken = [i for i, token in enumerate(tokens) if "\ufffd" in token.decode("utf-8", "replace")]
    pools = [range(len(tokens)), broken, range(256), range(END_OF_TEXT, END_OF_TEXT + 208)]
    for _ in range(count):
        weights = generator.choice([(1, 0, 0, 0), (1, 3, 3, 1), (0, 1, 1, 0), (0, 0, 1, 0)])
        length = generator.randint(0, 15)
        yield [generator.choice(pool) for pool in generator.choices(pools, weights, k=length)]


# The recorded output of the published tokenizer


@pytest.mark.parametrize(
    ("recorded", "found"),
    [
        ("ids", lambda either, row: either.encode(row["text"])),
        ("ids_special", lambda either, row: either.encode(row["text"], "all")),
        ("decoded", lambda either, row: either.decode(row["ids_special"])),
    ],
)
def test_recorded_texts_have_their_ids_and_back(either: Tokenizer, recorded: str, found: Callable) -> None:
    rows = read_jsonl(CASES)
    assert len(rows) == 322
    assert [row for row in rows if found(either, row) != row[recorded]] == []


def test_recorded_arbitrary_ids_decode_to_the_recorded_text(either: Tokenizer) -> None:
    rows = read_jsonl(DECODE)
    assert len(rows) == 60
    for row in rows:
        assert either.decode(row["ids"]) == row["text"]
        assert either.decode(row["ids"], skip_special_tokens=True) == row["text_skip_special"]


# The slow obvious byte-pair encoding


def test_texts_encode_as_the_slow_obvious_encoding(either: Tokenizer, ranks: dict[bytes, int]) -> None:
    texts = list(random_texts(2000, seed=1, without=("surrogates",)))
    assert [text for text in texts if either.encode(text) != slow_encode(text, ranks)] == []


def test_random_bytes_merge_as_the_slow_obvious_merge(ranks: dict[bytes, int], tokens: list[bytes]) -> None:
    generator = random.Random(13)
    for _ in range(1500):
        piece = generator.randbytes(generator.randint(1, 20))
        piece += b"".join(generator.choices(tokens, k=generator.randint(0, 6)))
        assert merge_pairs(piece, ranks) == slow_merge(piece, ranks), piece


@pytest.mark.parametrize("engine", ENGINES)
def test_made_up_vocabularies_encode_as_the_slow_obvious_encoding(engine: str) -> None:
    generator = random.Random(2)
    for _ in range(40):
        merged = {"".join(generator.choices("ab", k=generator.randint(2, 7))).encode() for _ in range(40)}
        tokens = BYTES + sorted(merged)
        generator.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        tokenizer = made(tokens, engine)
        for _ in range(30):
            text = "".join(generator.choices("ab", k=generator.randint(1, 60)))
            assert tokenizer.encode(text) == slow_encode(text, ranks), (tokens, text)


def test_tokens_that_cut_through_characters_encode_as_the_slow_obvious_encoding() -> None:
    generator = random.Random(16)
    for _ in range(150):
        letters = generator.choice(("éñ", "é中a", "中丮文", "aéя中😀", "中文國"))
        merged = set()
        for _ in range(generator.choice((5, 20, 60))):
            text = "".join(generator.choices(letters, k=4)).encode()
            start = generator.randrange(len(text) - 1)
            merged.add(text[start : start + generator.randint(2, 6)])
        tokens = BYTES + sorted(merged - set(BYTES))
        generator.shuffle(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        tokenizer = Tokenizer(tokens)
        for _ in range(40):
            text = "".join(generator.choices(letters, k=generator.randint(1, 15)))
            assert tokenizer.encode(text) == slow_encode(text, ranks), (merged, text)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_lowest_rank_merges_first_even_if_it_appears_late(engine: str) -> None:
    # abcd (256) comes into reach only by ab (258) and cd (259), and then goes before the pair xy (257).
    tokens = [*BYTES, b"abcd", b"xy", b"ab", b"cd", b"bc", b"dx", b"abcdx"]
    assert made(tokens, engine).encode("abcdxyz") == [256, 257, ord("z")]
    assert made(tokens, engine).encode("zbcdx") == [ord("z"), ord("b"), 259, ord("x")]


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_ranks_merge_from_the_left(engine: str) -> None:
    assert made([*BYTES, b"aa"], engine).encode("aaaaa") == [256, 256, ord("a")]
    assert made([*BYTES, b"aba", b"ab", b"ba"], engine).encode("bababa") == [ord("b"), 256, 258]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_piece_that_is_a_token_is_taken_whole_though_no_merge_reaches_it(engine: str) -> None:
    tokenizer = made([*BYTES, b"abc", "é中".encode()], engine)
    assert tokenizer.encode("abc") == [256]
    assert tokenizer.encode("é中") == [257]
    assert tokenizer.encode("abcd") == list(b"abcd")


# tiktoken itself


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_of_mixed_scripts_encode_as_tiktoken_does(
    seed: int, tokenizer: Tokenizer, published: Encode
) -> None:
    texts = list(random_texts(8000, seed=100 + seed))
    assert [text for text in texts if tokenizer.encode(text) != published(text)] == []


def test_random_texts_encode_as_tiktoken_does_with_every_special_token(either: Tokenizer, published: Encode):
    texts = [text for text in random_texts(15000, seed=3) if "<" in text or "|" in text]
    assert len(texts) > 1500
    assert [text for text in texts if either.encode(text, "all") != published(text, "all")] == []


def test_texts_glued_from_random_tokens_encode_as_tiktoken_does(
    tokenizer: Tokenizer, published: Encode, tokens: list[bytes]
) -> None:
    generator = random.Random(17)
    foreign = [token for token in tokens if not token.isascii()]
    broken = [token for token in foreign if "\ufffd" in token.decode("utf-8", "replace")]
    for _ in range(6000):
        pools = generator.choices((foreign, broken, tokens), weights=(6, 2, 1), k=generator.randint(2, 12))
        text = b"".join(map(generator.choice, pools)).decode("utf-8", "ignore")
        assert tokenizer.encode(text) == published(text), text


def test_every_code_point_assigned_or_not_is_a_letter_where_it_is_one_for_tiktoken(
    tokenizer: Tokenizer, published: Encode
) -> None:
    # Behind a letter or a number 's is a piece; behind anything else the apostrophe belongs to it.
    planes = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE1000))]
    for start in range(0, len(planes), 4096):
        text = "".join(f"{c}'s\n" for c in planes[start : start + 4096])
        assert tokenizer.encode(text) == published(text), hex(ord(planes[start]))


def test_both_engines_agree_on_random_texts(tokenizer: Tokenizer, tiktoken_tokenizer: Tokenizer) -> None:
    texts = list(random_texts(4000, seed=4))
    assert [text for text in texts if tokenizer.encode(text) != tiktoken_tokenizer.encode(text)] == []


def every_character() -> list[str]:
    # Thousands of ideographs and syllables are all one class: one in 50 of them is enough.
    many = regex.compile(r"[\p{Han}\p{Hangul}\p{Co}]")
    characters = [c for c in EVERY_CHARACTER if not many.match(c) or ord(c) % 50 == 0]
    assert len(characters) > 10000
    return [f"{c}a {c}1'{c}s{c}.\n{c}\n" for c in characters]


def random_ascii() -> Iterator[str]:
    generator = random.Random(5)
    everything = [chr(c) for c in range(128)]
    awkward = [*" \t\n\r\v\f\x1c\x1d\x1e\x1f\x00\x7f", "'", "'s", "'Ll", "a", "Z", "_", "1", ".", "  "]
    for _ in range(10000):
        pool = generator.choice((everything, awkward))
        yield "".join(generator.choices(pool, k=generator.randint(1, 30)))


AWKWARD = [*" \t\n\r\v\x1c'sa1.", "ll"]
FRAMES = ("{}", "a{}a", "1{}1", " {}a", ".{}.", "\n{}\n", "  {} ", "'{}s", "a {}{}b", "a{}'s", "a'{}{}")
SPLIT = {
    "random texts": lambda: random_texts(6000, seed=15),
    "every assigned character beside others": every_character,
    "random ASCII": random_ascii,
    "every short text of awkward ASCII": lambda: (
        "".join(letters) for length in range(5) for letters in product(AWKWARD, repeat=length)
    ),
    "every ASCII character between others": lambda: (
        frame.replace("{}", chr(c)) for c in range(128) for frame in FRAMES
    ),
}


@pytest.mark.parametrize("texts", SPLIT)
def test_texts_split_as_tiktoken_splits(splits: tuple[Tokenizer, Encode], texts: str) -> None:
    tokenizer, expected = splits
    assert [text for text in SPLIT[texts]() if tokenizer.encode(text) != expected(text)] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_contraction_folds_case_up_to_the_long_s(engine: str) -> None:
    tokenizer = made([*BYTES, b"sa", b"Sa", "ſ".encode(), "ſa".encode()], engine)
    apostrophe, s, big_s, a = b"'sSa"
    assert tokenizer.encode("x'sa")[1:] == [apostrophe, s, a]
    assert tokenizer.encode("x'Sa")[1:] == [apostrophe, big_s, a]
    assert tokenizer.encode("x'ſa")[1:] == [apostrophe, 258, a]
    assert tokenizer.encode(".ſa")[1:] == [259]


def test_a_lone_surrogate_encodes_as_the_replacement_character(either: Tokenizer) -> None:
    for lone in "\ud800\udbff\udc00\udfff":
        for frame in ("{}", "a{}b", " {}", "{}{}", "{}\n", "中{}1", "\ufeff{}"):
            assert either.encode(frame.replace("{}", lone)) == either.encode(frame.replace("{}", "\ufffd"))


def test_a_surrogate_pair_encodes_as_the_character_it_spells(either: Tokenizer) -> None:
    assert either.encode("\ud83d\ude00") == either.encode("😀")
    assert either.encode("x\ud83d\ud83d\ude00\ude00") == either.encode("x\ufffd😀\ufffd")


# The normal form

# Marks of many classes, those that decompose and those of class 0 that decompose to marks; what composes
# with them; starters that compose with starters; Hangul by parts.
MARKS = [
    *"\u0300\u0301\u0308\u0323\u0345\u0315\u05b0\u064b\u093c\u094d\u3099\u302a\u1dfc\U0001d165\U0001e94a"
]
DECOMPOSED = [*"\u0340\u0341\u0343\u0344\u0f73\u0f75\u0f81\u0f71\u0f72\u0f74\u0f80"]
STARTERS = [
    *"aeàǖ\u1fc2\u0903\u09c7\u09be\u09d7\u0dd9\u0dcf\u0dca\u1025\u102e\u1100\u1161\u11a8가中\u034f\u0378 <"
]


@pytest.mark.parametrize("seed", range(4))
def test_the_normal_form_is_pythons(seed: int) -> None:
    generator = random.Random(20 + seed)
    changed = 0
    for _ in range(700):
        parts = []
        for _ in range(generator.randint(1, 4)):
            alphabet = generator.sample(MARKS + DECOMPOSED, generator.randint(1, 8))
            parts += generator.choices(STARTERS, k=generator.randint(0, 3))
            parts += generator.choices(alphabet, k=generator.choice((0, 3, 40, 127, 128, 129, 200, 400)))
            parts += generator.choices([*STARTERS, *alphabet], k=generator.choice((0, 5, 150)))
        text = "".join(parts)
        changed += _LONG_RUN_SAMPLED.search(text[::16]) is not None
        assert nfc(text) == unicodedata.normalize("NFC", text), ascii(text)
    assert changed > 200


def test_the_normal_form_of_recorded_and_of_random_texts_is_pythons() -> None:
    texts = [row["text"] for row in read_jsonl(CASES)] + list(random_texts(3000, seed=19))
    # Longer, so that the marks in them are many in a row.
    texts += ["".join(texts[n : n + 30]) for n in range(0, len(texts), 30)]
    texts += [mark * 300 for mark in map(chr, range(0x110000)) if unicodedata.category(mark)[0] == "M"]
    assert [text for text in texts if nfc(text) != unicodedata.normalize("NFC", text)] == []


@pytest.mark.parametrize(
    "marks",
    [
        "\u0345" * 40000 + "\u0323" * 40000,
        "\u0f73" * 40000,
        "\u0345\u0323" * 40000,
        "".join(random.Random(21).choices(MARKS + DECOMPOSED, k=80000)),
    ],
    ids=["two", "class 0", "in turns", "random"],
)
def test_a_long_run_of_marks_takes_linear_time(tokenizer: Tokenizer, marks: str) -> None:
    """Python's own normalize takes 6 to 14 s of processor time here, this some 0.1 s."""
    start = time.process_time()
    found = nfc(f"a{marks}b")
    assert time.process_time() - start < 1.5
    assert sorted(map(unicodedata.combining, found[1:-1])) == list(map(unicodedata.combining, found[1:-1]))
    assert tokenizer.encode(found) == tokenizer.encode(f"a{marks}b")


@pytest.mark.parametrize("wrong", [None, b"text", 5, ["text"], Path("text")], ids=repr)
def test_only_text_is_encoded(either: Tokenizer, wrong: object) -> None:
    with pytest.raises(InputError, match="text must be a str, not "):
        either.encode(wrong)


# Special tokens


def test_special_tokens_follow_the_regular_ones_in_order(either: Tokenizer) -> None:
    ids = [either.encode(name, allowed_special="all") for name in SPECIAL]
    assert ids == [[151643 + i] for i in range(208)]
    assert either.special_ids == {name: 151643 + i for i, name in enumerate(SPECIAL)}
    assert either.n_vocab == 151851
    assert either.decode(range(151643, 151851)) == "".join(SPECIAL)


def test_no_special_token_is_parsed_by_default(either: Tokenizer) -> None:
    assert either.encode("<|endoftext|>") == [27, 91, 8691, 723, 427, 91, 29]
    assert either.encode('print("<|endoftext|>")') == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert max(i for name in SPECIAL for i in either.encode(f"a{name}b")) < END_OF_TEXT


@pytest.mark.parametrize("collection", [set, frozenset, list, tuple, dict.fromkeys, iter, np.array])
def test_only_the_allowed_special_tokens_are_parsed(either: Tokenizer, collection: Callable) -> None:
    text = "<|im_start|>a<|im_end|><|im_end|>"
    plain = either.encode("<|im_start|>a")
    assert either.encode(text, allowed_special=collection(["<|im_end|>"])) == [*plain, IM_END, IM_END]


def test_random_subsets_of_special_tokens_are_parsed_as_tiktoken_does(either: Tokenizer, published: Encode):
    generator = random.Random(6)
    for _ in range(300):
        allowed = set(generator.sample(SPECIAL, generator.randint(0, 5)))
        parts = [*generator.choices(sorted(allowed), k=3)] if allowed else []
        parts += generator.choices([*SPECIAL, *POOLS["special"], "中", "e\u0301", " ", "\n"], k=8)
        generator.shuffle(parts)
        text = "".join(parts)
        assert either.encode(text, allowed_special=allowed) == published(text, allowed), (text, allowed)


def test_special_tokens_are_found_after_normalisation(either: Tokenizer) -> None:
    text = "<|im_end|>\u0338"
    assert either.encode(text, allowed_special="all") == either.encode(text)
    assert either.encode("e<|im_end|>\u0301", allowed_special="all")[1] == IM_END


@pytest.mark.parametrize("name", ["<|extra_205|>", "<|im_end|", "", "<|IM_END|>", "hello"])
def test_an_unknown_special_token_is_refused_by_name(either: Tokenizer, name: str) -> None:
    with pytest.raises(ValueError, match=regex.escape(repr(name))):
        either.encode("text", allowed_special={"<|im_end|>", name})


@pytest.mark.parametrize("wrong", ["<|im_end|>", "none", "ALL", "", b"all", None, 5, [["<|im_end|>"]]])
def test_what_is_neither_all_nor_a_collection_of_tokens_is_refused(either: Tokenizer, wrong: object) -> None:
    with pytest.raises(InputError, match=f"allowed_special must be .* not {regex.escape(repr(wrong))}"):
        either.encode("text", allowed_special=wrong)


# Decoding


def test_every_token_decodes_to_exactly_its_bytes(either: Tokenizer, tokens: list[bytes]) -> None:
    everything = tokens + [name.encode() for name in SPECIAL]
    assert [either.decode_bytes([i]) for i in range(len(everything))] == everything
    assert either.decode_bytes(range(len(everything))) == b"".join(everything)


def test_encoding_then_decoding_gives_the_text_in_normal_form(either: Tokenizer) -> None:
    for text in random_texts(1500, seed=7, without=("surrogates",)):
        expected = unicodedata.normalize("NFC", text)
        assert either.decode(either.encode(text)) == expected
        assert either.decode(either.encode(text, allowed_special="all")) == expected


def test_half_a_character_decodes_to_the_replacement_character(either: Tokenizer) -> None:
    assert either.decode_bytes([51461]) == " 栗".encode()[:3]
    assert either.decode([51461]) == " \ufffd"
    assert either.decode([]) == ""


def test_a_character_cut_across_tokens_decodes_whole(either: Tokenizer, tokens: list[bytes]) -> None:
    ids = [tokens.index(bytes([byte])) for byte in "中😀".encode()]
    assert len(ids) == 7
    assert either.decode(ids) == "中😀"
    assert either.decode([*ids[:2], IM_END, *ids[2:]], skip_special_tokens=True) == "中😀"


def test_random_ids_decode_as_their_bytes_joined(either: Tokenizer, tokens: list[bytes]) -> None:
    everything = tokens + [name.encode() for name in SPECIAL]
    for ids in random_ids(2000, seed=8, tokens=tokens):
        assert either.decode(ids) == b"".join(everything[i] for i in ids).decode("utf-8", "replace")
        regular = b"".join(tokens[i] for i in ids if i < END_OF_TEXT)
        assert either.decode_bytes(ids, skip_special_tokens=True) == regular
        assert either.decode(ids, skip_special_tokens=True) == regular.decode("utf-8", "replace")


@pytest.mark.parametrize("wrong", [-1, -151851, 151851, 151935, 152063, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_by_value(either: Tokenizer, wrong: int) -> None:
    for decode in (either.decode, either.decode_bytes, StreamDecoder(either).push):
        with pytest.raises(ValueError, match=rf"(?<![\d-]){wrong}(?!\d)"):
            decode(wrong if decode.__name__ == "push" else [1, wrong, 2])
    with pytest.raises(ValueError, match=str(wrong)):
        either.decode([wrong], skip_special_tokens=True)


def test_numpy_and_torch_integers_decode_like_python_ones(either: Tokenizer) -> None:
    ids = [14990, 1879, IM_END]
    expected = "hello world<|im_end|>"
    assert either.decode(np.array(ids)) == expected
    assert either.decode(np.array(ids, dtype=np.uint32)) == expected
    assert either.decode([np.int64(i) for i in ids]) == expected
    assert either.decode(torch.tensor(ids)) == expected
    assert either.decode(iter(torch.tensor(ids, dtype=torch.int32))) == expected
    assert either.decode(torch.tensor(ids), skip_special_tokens=True) == "hello world"
    decoder = StreamDecoder(either)
    assert decoder.push(np.int64(14990)) + decoder.push(torch.tensor(1879)) == "hello world"


NO_IDS = [None, 5, np.int64(5), torch.tensor(5), "12", "", b"\x01", [1.0], [True], ["1"], [None], [[1]]]
NO_IDS += [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1]]), np.array([1.5]), np.array([True])]


@pytest.mark.parametrize("wrong", NO_IDS, ids=repr)
def test_what_is_no_list_of_ids_is_refused_in_words(either: Tokenizer, wrong: object) -> None:
    with pytest.raises(InputError, match="ids must be a list of token ids, whole numbers, not "):
        either.decode(wrong)


@pytest.mark.parametrize("wrong", [None, "1", 1.0, True, [1]], ids=repr)
def test_what_is_no_id_is_refused_by_the_stream(either: Tokenizer, wrong: object) -> None:
    with pytest.raises(InputError, match="ids must be a list of token ids, whole numbers, not "):
        StreamDecoder(either).push(wrong)


def test_an_id_of_5000_digits_is_refused(either: Tokenizer) -> None:
    with pytest.raises(InputError, match="no token has id "):
        either.decode([10**5000])


# Streaming


def settled(data: bytes) -> str:
    """The part of the text that no continuation can change."""
    # CPython's decoder refuses the two bytes that begin a surrogate only when the third has come.
    data = regex.sub(rb"\xed[\xa0-\xbf]\Z", b"\xed", data)
    tails = (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\xbf", b"\xbf\xbf", b"\xbf\xbf\xbf")
    texts = [(data + tail).decode("utf-8", "replace") for tail in tails]
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in same)


@pytest.mark.parametrize("skip", [False, True])
def test_streaming_emits_what_is_settled_as_soon_as_it_is(either: Tokenizer, tokens: list[bytes], skip: bool):
    for ids in random_ids(2000, seed=9, tokens=tokens):
        decoder = StreamDecoder(either, skip_special_tokens=skip)
        emitted = ""
        for n, token in enumerate(ids, start=1):
            emitted += decoder.push(token)
            assert emitted == settled(either.decode_bytes(ids[:n], skip_special_tokens=skip)), ids[:n]
        assert emitted + decoder.flush() == either.decode(ids, skip_special_tokens=skip)


def test_streaming_real_text_joins_to_the_text_and_never_shows_half_a_character(either: Tokenizer) -> None:
    text = "鰰 𠮷野家 👨‍👩‍👧 नमस्ते — ᚠᛇᚻ 한국어 \U0001fae8"
    decoder = StreamDecoder(either)
    shown = [decoder.push(token) for token in either.encode(text)]
    assert "" in shown
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown) + decoder.flush() == text


def test_streaming_emits_a_real_replacement_character_at_once(either: Tokenizer) -> None:
    decoder = StreamDecoder(either)
    ids = either.encode("\ufffd")
    assert [decoder.push(token) for token in ids] == [*[""] * (len(ids) - 1), "\ufffd"]
    assert decoder.flush() == ""


def test_flushing_half_a_character_gives_the_replacement_character_once(either: Tokenizer) -> None:
    decoder = StreamDecoder(either)
    assert (decoder.push(51461), decoder.flush(), decoder.flush()) == (" ", "\ufffd", "")
    assert decoder.push(9707) == "Hello"


def test_a_refused_id_leaves_the_stream_as_it_was(either: Tokenizer) -> None:
    first, *rest = either.encode("鰰")
    assert rest
    decoder = StreamDecoder(either)
    shown = decoder.push(first)
    with pytest.raises(ValueError, match="151851"):
        decoder.push(151851)
    assert shown + "".join(map(decoder.push, rest)) + decoder.flush() == "鰰"


# Vocabulary files


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:b2b1\nsize 2561218\n"


def vocabulary_lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def from_content(path: Path, content: bytes) -> Tokenizer:
    path.write_bytes(content)
    return Tokenizer.from_file(path)


def damaged(line: bytes, number: int = 101) -> bytes:
    lines = vocabulary_lines([*BYTES, b"ab", b"abc"])
    lines[number - 1] = line
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("line", [b"YR== 97", b"YX== 97"])
def test_base64_whose_unused_bits_are_set_is_read(line: bytes, tmp_path: Path) -> None:
    """Decoders ignore those bits, the standard library's as well."""
    path = tmp_path / "unused.tiktoken"
    path.write_bytes(damaged(line, 98))
    assert Tokenizer.from_file(path).encode("a") == [97]


def test_a_good_small_vocabulary_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "good.tiktoken"
    path.write_bytes(b"\n".join(vocabulary_lines([*BYTES, b"ab", b"abc"])) + b"\n")
    assert Tokenizer.from_file(path).encode("abcd") == [257, ord("d")]
    assert Tokenizer.from_file(str(path)).encode("<|endoftext|>", allowed_special="all") == [258]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(damaged(b"Z!A== 100"), r"\b101\b", id="a character outside base64"),
        pytest.param(damaged(b"ZA 100"), r"\b101\b", id="base64 without its padding"),
        pytest.param(damaged(b"ZA=="), r"\b101\b", id="no rank"),
        pytest.param(damaged(b"ZA== "), r"\b101\b", id="an empty rank"),
        pytest.param(damaged(b"ZA== ten"), r"\b101\b", id="a word for a rank"),
        pytest.param(damaged(b"ZA== 100.0"), r"\b101\b", id="a fraction for a rank"),
        pytest.param(damaged(b"ZA== 1_00"), r"\b101\b", id="a rank with an underscore"),
        pytest.param(damaged(b"ZA== " + b"9" * 300), r"\b100\b", id="a rank of 300 digits"),
        pytest.param(damaged(b"ZA== " + b"9" * 5000), r"\b101\b", id="a rank of 5000 digits"),
        pytest.param(damaged(b"\xef\xbb\xbfIQ== 0", 1), r"line 1:", id="a byte order mark"),
        pytest.param(damaged(b"ZA== -100"), r"\b100\b", id="a negative rank"),
        pytest.param(damaged(b"ZA== 100 7"), r"\b101\b", id="a third field"),
        pytest.param(damaged(b" 100"), r"\b101\b", id="no token"),
        pytest.param(damaged(b"\xff\xfe 100"), r"\b101\b", id="bytes that are no text"),
        pytest.param(damaged(b"ZA== 99"), r"\b99\b", id="a rank twice"),
        pytest.param(damaged(b"ZA== 300"), r"\b(100|300)\b", id="a rank left out"),
        pytest.param(damaged(b"YQ== 100"), r"\b101\b", id="a token twice"),
        pytest.param(damaged(b"YWJk 100"), r"(?i)byte.*\b(100|0x64|64)\b|b'd'", id="one byte left out"),
        pytest.param(b"\n".join(vocabulary_lines(BYTES[:100])), r"(?i)byte", id="cut short"),
        pytest.param(b"", r"(?i)empty|no token|byte", id="empty"),
        pytest.param(LFS_POINTER, r"(?i)lfs", id="a Git LFS pointer"),
    ],
)
def test_a_damaged_vocabulary_file_is_refused_by_file_and_reason(tmp_path: Path, content: bytes, reason: str):
    with pytest.raises(ValueError, match=r"damaged\.tiktoken") as caught:
        from_content(tmp_path / "damaged.tiktoken", content)
    message = str(caught.value).replace(str(tmp_path), "")
    assert regex.search(reason, message), message
    if b"1_00" not in content:  # the plain tokenizer reads it as 100, and has the right vocabulary then
        with pytest.raises(InputError):
            plain.Tokenizer.from_file(tmp_path / "damaged.tiktoken")


def test_the_published_file_cut_inside_a_line_is_refused(tmp_path: Path, vocabulary_file: Path) -> None:
    with pytest.raises(ValueError, match=r"half\.tiktoken"):
        from_content(tmp_path / "half.tiktoken", vocabulary_file.read_bytes()[: 1 << 20])


def test_a_vocabulary_file_cut_anywhere_inside_a_line_is_refused(tmp_path: Path) -> None:
    content = b"\n".join(vocabulary_lines([*BYTES, b"ab", b"abc", b"abcd"]))
    ends = {i for i, byte in enumerate(content) if byte == ord("\n") and content[:i].count(b"\n") >= 255}
    for length in (*range(0, len(content) - 40, 17), *range(len(content) - 40, len(content))):
        if length not in ends and length - 1 not in ends:
            with pytest.raises(ValueError, match=r"cut\.tiktoken"):
                from_content(tmp_path / "cut.tiktoken", content[:length])


def test_line_ends_of_windows_and_blank_lines_at_the_end_are_harmless(tmp_path: Path) -> None:
    content = b"\r\n".join(vocabulary_lines([*BYTES, b"ab"])) + b"\r\n\r\n"
    assert from_content(tmp_path / "windows", content).encode("abc") == [256, ord("c")]


def test_a_file_that_is_written_otherwise_but_right_holds_the_same_tokens(tmp_path: Path) -> None:
    tokens = [*BYTES, b"ab", "é中".encode()]
    lines, path = vocabulary_lines(tokens), tmp_path / "otherwise.tiktoken"
    for content in (
        b"\n".join(lines) + b"\n",
        b"\n".join(lines),
        b"\n".join(reversed(lines)),
        b"\n\n".join(lines) + b"\n",
        b"\n".join(line.replace(b" ", b"\t  0") for line in lines),
    ):
        path.write_bytes(content)
        assert read_ranks(path) == tokens


def test_only_a_file_that_is_written_otherwise_is_read_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        "qwen_ref.loading.tokenizer.read_ranks", lambda path: read.append(path) or read_ranks(path)
    )
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(BYTES)]
    usual, other = tmp_path / "usual.tiktoken", tmp_path / "other.tiktoken"
    usual.write_bytes(b"".join(lines))
    other.write_bytes(b"".join(reversed(lines)))
    assert Tokenizer.from_file(usual)._ranks == Tokenizer.from_file(other)._ranks
    assert read == [other]


def test_a_missing_vocabulary_file_or_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.tiktoken"):
        Tokenizer.from_file(tmp_path / "nothing.tiktoken")
    with pytest.raises(ValueError, match=regex.escape(str(tmp_path))):
        Tokenizer.from_file(tmp_path)


def test_only_a_regular_vocabulary_file_is_read(special: tuple[Path, str]) -> None:
    path, kind = special
    with pytest.raises(InputError, match=f"{path}: cannot be read: it is {kind}, not a file"):
        Tokenizer.from_file(path)


def test_a_vocabulary_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "large.tiktoken"
    path.write_bytes(b"\n".join(vocabulary_lines(BYTES)) + b"\n")
    os.truncate(path, 2**36)
    with pytest.raises(InputError, match=r"large\.tiktoken: larger than 64 MiB"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("tokens", [[], BYTES[1:], [*BYTES, b"a"], [*BYTES[:-1], b"ab"], "abc"], ids=range(5))
def test_tokens_that_cannot_spell_every_text_are_refused(tokens: list[bytes]) -> None:
    with pytest.raises(InputError, match="tokens must be distinct and hold each of the 256 single bytes"):
        Tokenizer(tokens)


def test_tokens_may_be_any_iterable() -> None:
    assert Tokenizer(iter([*BYTES, b"ab"])).encode("abc") == [256, ord("c")]


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'sentencepiece'.*python.*tiktoken"):
        Tokenizer(BYTES, engine="sentencepiece")


# Long pieces


class CountedRanks(dict):
    """Ranks that count how often they are asked for one."""

    count = 0

    def counted(ask: Callable) -> Callable:
        def call(self: CountedRanks, *key: object) -> object:
            self.count += 1
            return ask(self, *key)

        return call

    get, __getitem__, __contains__ = map(counted, (dict.get, dict.__getitem__, dict.__contains__))


@pytest.mark.parametrize("alphabet", ["a", " ", "etaoins", string.ascii_letters])
def test_four_times_the_length_takes_less_than_eight_times_the_lookups(
    ranks: dict[bytes, int], alphabet: str
) -> None:
    generator = random.Random(10)
    piece = "".join(generator.choices(alphabet, k=40000)).encode()
    short, long = CountedRanks(ranks), CountedRanks(ranks)
    merge_pairs(piece[:10000], short)
    merge_pairs(piece, long)
    assert 10000 < long.count < 8 * short.count


LONG = {
    "a million characters": lambda: ["a" * 10**6],
    "half a million pairs": lambda: ["ab" * (5 * 10**5)],
    **{f"100,000 of {unit!r}": lambda unit=unit: [unit * 10**5] for unit in "中!\n"},
    "words of random letters": lambda: (
        "".join(generator.choices(letters, k=10**5))
        for generator in [random.Random(11)]
        for letters in (string.ascii_letters, "éяab中")
    ),
    "spaces between letters": lambda: ("x" + " " * 10**5 + "y", "é" + "\u3000 " * 50000 + "é"),
}


@pytest.mark.parametrize("texts", LONG)
@pytest.mark.usefixtures("deadline")
def test_a_long_piece_encodes_as_tiktoken_does(tokenizer: Tokenizer, published: Encode, texts: str) -> None:
    for text in LONG[texts]():
        assert tokenizer.encode(text) == published(text)


@pytest.mark.usefixtures("deadline")
def test_a_million_spaces_encode_though_tiktoken_gives_up(
    tiktoken_tokenizer: Tokenizer, ranks: dict[bytes, int]
) -> None:
    ids = tiktoken_tokenizer.encode("<|im_end|>" + " " * 10**6, allowed_special={"<|im_end|>"})
    assert 10**6 == 7812 * 128 + 64
    assert ids == [IM_END, *[ranks[b" " * 128]] * 7812, ranks[b" " * 64]]


# The pieces that are remembered


def test_the_remembered_pieces_stay_bounded_and_change_no_result(
    tokens: list[bytes], published: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_ref.loading.tokenizer._REMEMBERED", 7)
    tokenizer = Tokenizer(tokens)
    for text in random_texts(2000, seed=12):
        assert tokenizer.encode(text) == published(text)
        assert max(len(tokenizer._pieces), len(tokenizer._parts)) <= 7


def test_more_distinct_pieces_than_are_remembered_do_not_all_stay_in_memory() -> None:
    tokenizer = Tokenizer([*BYTES, b"ab", b"cd", b"abcd"])
    words = [" " + "".join(letters) for letters in product("abcdefghijk", repeat=5)]
    assert len(words) > 2**17
    first = tokenizer.encode("".join(words))
    assert len(tokenizer._pieces) <= 2**17
    assert tokenizer.encode("".join(words)) == first
    for word in words[::100]:
        assert tokenizer.encode(word) == slow_merge(word.encode(), tokenizer._ranks)


def test_a_long_piece_is_not_remembered(tokens: list[bytes]) -> None:
    tokenizer = Tokenizer(tokens)
    tokenizer.encode("q" * 10**4 + "1" + "й" * 10**4)
    assert sum(map(len, (*tokenizer._pieces, *tokenizer._parts))) < 100


def test_changing_the_returned_ids_changes_no_later_result(either: Tokenizer) -> None:
    ids = either.encode("antidisestablishmentarianism")
    expected = list(ids)
    ids.append(0)
    assert either.encode("antidisestablishmentarianism") == expected


def test_a_token_given_twice_in_a_file_that_is_otherwise_as_published_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 257: the token of line 98 again"):
        from_content(tmp_path / "v", b"\n".join(vocabulary_lines([*BYTES, b"a"])) + b"\n")
