"""tokenizer_compression.py counts what there is to count; its sample is what it is said to be."""

from __future__ import annotations

import base64
import json
import os
import runpy
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import regex
import tiktoken
import tiktoken.load
import tiktoken.registry
from conftest import ROOT, WEIGHTS, Result, Run, example_of, refused

from qwen_ref.tokenizer import PATTERN

module = example_of("measure/tokenizer_compression")
SAMPLE = ROOT / "examples" / "measure" / "languages"
# The script that nearly all letters of a text are of.
LATIN = "czech dutch english finnish french german indonesian italian polish portuguese python spanish"
SCRIPTS = dict.fromkeys([*LATIN.split(), "swedish", "turkish", "vietnamese"], "Latin") | {
    **{"arabic": "Arabic", "chinese": "Han", "greek": "Greek", "hebrew": "Hebrew", "hindi": "Devanagari"},
    **{"japanese": r"Han}\p{Hiragana}\p{Katakana", "korean": "Hangul", "persian": "Arabic"},
    **{"russian": "Cyrillic", "thai": "Thai", "ukrainian": "Cyrillic"},
}


def vocabulary(path: Path, more: Iterable[bytes] = ()) -> Path:
    """A file of the single bytes, and more tokens after them."""
    tokens = [bytes([value]) for value in range(256)] + list(more)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def measure(module: ModuleType, run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in tmp_path, where small.tiktoken has the tokens ab and abc beside the bytes."""
    monkeypatch.chdir(tmp_path)
    vocabulary(tmp_path / "small.tiktoken", [b"ab", b"abc"])
    (tmp_path / "b.txt").write_bytes("abc é".encode())
    (tmp_path / "a.txt").write_bytes(b"abab\nabcab!")

    def call(*arguments: str | Path) -> Result:
        return run_command(module.main, *arguments)

    return call


TEXTS = ("--vocabulary", "small.tiktoken", "--text", "second=b.txt", "first=a.txt")


def parsed(result: Result) -> dict:
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


# Numbers


def test_the_table_has_what_a_hand_counts(measure: Run) -> None:
    """ab·ab·\\n·abc·ab·! are 6 tokens of 11 bytes; abc·␣·é (two bytes) are 4 of 6 bytes, 5 characters."""
    result = measure(*TEXTS)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "| text | bytes | characters | small.tiktoken: tokens | bytes/token | tokens/char |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| first | 11 | 11 | 6 | 1.83 | 0.545 |",
        "| second | 6 | 5 | 4 | 1.50 | 0.800 |",
        "| **all** | 17 | 16 | 10 | 1.70 | 0.625 |",
    ]


def test_either_engine_of_the_tokenizer_counts_the_same(
    measure: Run, tmp_path: Path, engine_options: list[str]
) -> None:
    vocabulary(tmp_path / "other.tiktoken", [b"ab"])
    found = parsed(measure(*TEXTS, "--against", "other.tiktoken", "--json", *engine_options))
    assert [each["tokens"] for each in found["all"]["by_vocabulary"]] == [10, 12]


def test_ratios_are_to_the_first_that_it_is_held_against(measure: Run, tmp_path: Path) -> None:
    vocabulary(tmp_path / "other.tiktoken", [b"ab"])
    result = measure(*TEXTS, "--against", "bytes", "--against", "other.tiktoken")
    assert result.out.splitlines() == [
        "| text | bytes | characters | small.tiktoken: tokens | bytes/token | tokens/char | ÷ bytes "
        "| bytes: tokens | bytes/token | tokens/char "
        "| other.tiktoken: tokens | bytes/token | tokens/char | ÷ bytes |",
        "| --- |" + " ---: |" * 13,
        "| first | 11 | 11 | 6 | 1.83 | 0.545 | 0.545 | 11 | 1.00 | 1.000 | 7 | 1.57 | 0.636 | 0.636 |",
        "| second | 6 | 5 | 4 | 1.50 | 0.800 | 0.667 | 6 | 1.00 | 1.200 | 5 | 1.20 | 1.000 | 0.833 |",
        "| **all** | 17 | 16 | 10 | 1.70 | 0.625 | 0.588 | 17 | 1.00 | 1.062 | 12 | 1.42 | 0.750 | 0.706 |",
    ]


def test_json_says_the_same_in_full(measure: Run) -> None:
    found = parsed(measure(*TEXTS, "--against", "bytes", "--json"))
    first, second = found["texts"]
    assert (first["text"], first["bytes"], first["characters"]) == ("first", 11, 11)
    assert second["by_vocabulary"] == [
        {
            "vocabulary": "small.tiktoken",
            "tokens": 4,
            "bytes_per_token": 6 / 4,
            "tokens_per_character": 4 / 5,
            "ratio": 4 / 6,
        },
        {"vocabulary": "bytes", "tokens": 6, "bytes_per_token": 1, "tokens_per_character": 6 / 5, "ratio": 1},
    ]
    assert found["all"]["by_vocabulary"][0] == {
        "vocabulary": "small.tiktoken",
        "tokens": 10,
        "bytes_per_token": 17 / 10,
        "tokens_per_character": 10 / 16,
        "ratio": 10 / 17,
    }
    alone = parsed(measure(*TEXTS, "--json"))
    assert "ratio" not in alone["all"]["by_vocabulary"][0]


def test_bytes_and_characters_are_those_after_nfc(measure: Run, tmp_path: Path) -> None:
    (tmp_path / "apart.txt").write_bytes("e\u0301".encode())  # three bytes, two characters
    found = parsed(measure("--vocabulary", "small.tiktoken", "--text", "é=apart.txt", "--json"))
    (text,) = found["texts"]
    assert (text["text"], text["bytes"], text["characters"]) == ("é", 2, 1)
    assert text["by_vocabulary"][0]["tokens"] == 2


def test_the_sample_in_the_published_vocabulary_is_what_tiktoken_makes_of_it(
    module: ModuleType, measure: Run, vocabulary_file: Path
) -> None:
    ranks = tiktoken.load.load_tiktoken_bpe(str(vocabulary_file))
    theirs = tiktoken.Encoding("theirs", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = module.from_tiktoken_file("ours", vocabulary_file, "python")
    found = parsed(measure("--json", "--tokenizer-engine", "python"))
    assert [text["text"].lower() for text in found["texts"]] == sorted(SCRIPTS)
    for text in found["texts"]:
        (path,) = SAMPLE.glob(f"{text['text'].lower()}.*")
        content = path.read_bytes()
        ids = theirs.encode_ordinary(content.decode())
        assert ours.encode(content.decode()) == ids
        assert (text["bytes"], text["characters"]) == (len(content), len(content.decode()))
        (qwen,) = text["by_vocabulary"]
        assert (qwen["vocabulary"], qwen["tokens"]) == ("Qwen", len(ids))
    tokens = sum(text["by_vocabulary"][0]["tokens"] for text in found["texts"])
    assert found["all"]["by_vocabulary"][0]["tokens"] == tokens


def test_without_the_published_vocabulary_it_is_the_tiny_checkpoints(
    module: ModuleType, measure: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "PUBLISHED", tmp_path / "none")
    result = measure("--text", "a=a.txt", "--json")
    assert result.err == (
        "qwen_ref: note: the tiny checkpoint's vocabulary; `make vocab` fetches the published one\n"
    )
    (tiny,) = json.loads(result.out)["all"]["by_vocabulary"]
    expected = module.from_tiktoken_file("", WEIGHTS / "qwen.tiktoken").encode("abab\nabcab!")
    assert (tiny["vocabulary"], tiny["tokens"]) == ("tiny", len(expected))


def test_files_of_one_name_go_by_their_paths(measure: Run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    vocabulary(tmp_path / "there" / "small.tiktoken")
    found = parsed(measure(*TEXTS, "--against", "there/small.tiktoken", "bytes", "--json"))
    names = [each["vocabulary"] for each in found["all"]["by_vocabulary"]]
    assert names == ["small.tiktoken", "there/small.tiktoken", "bytes"]


def test_a_name_cannot_break_the_table(measure: Run) -> None:
    result = measure("--vocabulary", "small.tiktoken", "--text", "a|b\n=a.txt", "c=d\\=b.txt")
    assert refused(result).endswith("d\\=b.txt: cannot be read: No such file or directory")
    result = measure("--vocabulary", "small.tiktoken", "--text", "a|\x1b\n\\b=a.txt", "a|\x1b \\b=a.txt")
    numbers = "| 11 | 11 | 6 | 1.83 | 0.545 |"
    assert result.out.splitlines()[2:4] == [rf"| a\|\\x1b \\b {numbers}"] * 2


# The sample


def test_the_sample_is_valid_nfc_and_small() -> None:
    texts = {path.stem: path for path in SAMPLE.iterdir() if path.name != "README.md"}
    assert texts.keys() == SCRIPTS.keys()
    assert len(texts.keys() - {"python"}) >= 18
    assert sum(path.stat().st_size for path in texts.values()) < 100_000
    for name, path in texts.items():
        text = path.read_bytes().decode("utf-8")
        assert text == unicodedata.normalize("NFC", text), name
        assert text.endswith("\n"), name
        assert not regex.search(r"[^\S\n ]| \n|�", text), name
        letters = regex.findall(r"\p{L}", text)
        own = regex.findall(rf"[\p{{L}}&&[\p{{{SCRIPTS[name]}}}ー]]", text, flags=regex.V1)
        assert len(own) > 0.97 * len(letters), name
        if name != "python":
            assert len(text.split("\n\n")) == 4, name
            numbers = regex.findall(r"\p{Nd}+", text)
            assert sorted(map(int, numbers)) == [3, 70, 71, 1854], name


def test_the_code_of_the_sample_runs() -> None:
    space = runpy.run_path(str(SAMPLE / "python.py"))
    tank = space["Tank"](capacity=100)
    assert space["simulate"](tank, [0.0] * 89 + [5.0, 0.0, 0.0]) == {
        "missing": 20.0,
        "overflow": 100.0,
        "left": 0.0,
    }


# What it is held against


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An encoding of tiktoken's that lies on a server; the addresses that were fetched."""
    fetched = []

    def constructor() -> dict:
        ranks = tiktoken.load.load_tiktoken_bpe("https://example.invalid/toy.tiktoken")
        special_tokens = {"<|toy|>": 1000}
        return {
            "name": "toy",
            "pat_str": r"(?s:.)",
            "mergeable_ranks": ranks,
            "special_tokens": special_tokens,
        }

    def read_file(path: str) -> bytes:
        fetched.append(path)
        return vocabulary(tmp_path / "served", [b"ab", "é".encode()]).read_bytes()

    tiktoken.list_encoding_names()  # fills the table of constructors
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "toy", constructor)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return fetched


def test_nothing_is_downloaded_unasked(measure: Run, toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read_file = tiktoken.load.read_file
    assert refused(measure(*TEXTS, "--against", "toy")).endswith(
        "error: toy is not in tiktoken's cache; --download lets tiktoken fetch it, or give its file"
    )
    assert toy == []
    found = parsed(measure(*TEXTS, "--against", "toy", "--download", "--json"))
    assert toy == ["https://example.invalid/toy.tiktoken"]
    # Its own pattern makes every character a piece, so that ab is never merged, but é is.
    tokens = [text["by_vocabulary"][1]["tokens"] for text in found["texts"]]
    assert tokens == [11, 5]
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert parsed(measure(*TEXTS, "--against", "toy", "--json")) == found  # from the cache
    assert len(toy) == 1
    assert tiktoken.load.read_file is read_file


def test_a_download_that_fails_is_one_line(measure: Run, toy: list[str], monkeypatch: pytest.MonkeyPatch):
    def unreachable(path: str) -> bytes:
        raise ConnectionError(f"{path}: no route")

    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    assert refused(measure(*TEXTS, "--against", "toy", "--download")).endswith(
        "toy cannot be had: https://example.invalid/toy.tiktoken: no route"
    )


@pytest.mark.parametrize("name", ["cl100k_base", "gpt2", "o200k_base"])
def test_real_encodings_are_refused_where_the_cache_is_empty(name: str, measure: Run, toy: list[str]) -> None:
    assert f"{name} is not in tiktoken's cache" in refused(measure(*TEXTS, "--against", name))
    assert toy == []


def test_what_spells_a_special_token_is_text(measure: Run, toy: list[str], tmp_path: Path) -> None:
    (tmp_path / "special.txt").write_bytes(b"<|toy|>")
    arguments = ("--vocabulary", "small.tiktoken", "--text", "x=special.txt")
    found = parsed(measure(*arguments, "--against", "toy", "--download", "--json"))
    assert found["all"]["by_vocabulary"][1]["tokens"] == 7


def test_an_encoding_that_loses_text_is_refused(
    measure: Run, toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiktoken.registry.ENCODING_CONSTRUCTORS["toy"]
    lossy = {"pat_str": r"[^!]+"}
    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "toy", lambda: {**whole(), **lossy})
    assert refused(measure(*TEXTS, "--against", "toy", "--download")).endswith(
        "error: toy loses text: first does not decode to what was encoded"
    )


def tokenizer_json(path: Path, lower: bool = False) -> Path:
    """One of the tokenizers library: single bytes, and ab; if lower, it forgets capitals."""
    tokenizers = pytest.importorskip("tokenizers", reason="it comes with `make parity` or `make eval`")
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: n for n, token in enumerate([*characters, "ab"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [("a", "b")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.enable_truncation(3)
    made.enable_padding(length=50)
    if lower:
        made.normalizer = tokenizers.normalizers.Lowercase()
    made.save(str(path))
    return path


def test_a_tokenizer_json_counts_text_alone(measure: Run, tmp_path: Path) -> None:
    """Without the token it begins texts with, what it cuts off and what it fills up with."""
    tokenizer_json(tmp_path / "tokenizer.json")
    (tmp_path / "special.txt").write_bytes(b"<s>")
    found = parsed(measure(*TEXTS, "special=special.txt", "--against", "tokenizer.json", "--json"))
    tokens = [text["by_vocabulary"][1]["tokens"] for text in found["texts"]]
    assert tokens == [7, 5, 3]


def test_a_tokenizer_json_that_loses_text_is_refused(measure: Run, tmp_path: Path) -> None:
    tokenizer_json(tmp_path / "lower.json", lower=True)
    assert parsed(measure(*TEXTS, "--against", "lower.json", "--json"))
    (tmp_path / "b.txt").write_bytes(b"Abc")
    assert refused(measure(*TEXTS, "--against", "lower.json")).endswith(
        "error: lower.json loses text: second does not decode to what was encoded"
    )


def test_a_file_that_is_no_tokenizer_json(
    module: ModuleType, measure: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = "x.json takes the package tokenizers; pip install tokenizers brings it"
    assert refused(measure(*TEXTS, "--against", "x.json")).endswith(message)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tokenizers", reason="it comes with `make parity` or `make eval`")
    assert "x.json is no tokenizer.json: " in refused(measure(*TEXTS, "--against", "x.json"))


# The plot


def test_the_plot_is_a_sorted_picture(
    module: ModuleType, measure: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    before = set(os.listdir(tmp_path))
    result = measure(*TEXTS, "$x$=b.txt", "--against", "bytes", "--plot", "made.png")
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) == 6
    assert set(os.listdir(tmp_path)) == before | {"made.png"}
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[-1] == "first"  # on top, of the most bytes per token
    assert sorted(labels[:-1]) == ["$x$", "second"]
    marks = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert marks == {
        "small.tiktoken": pytest.approx([6 / 4, 6 / 4, 11 / 6]),
        "bytes": pytest.approx([1, 1, 1]),
    }
    assert axes.get_xlim()[0] == 0
    assert (pyplot.imread(tmp_path / "made.png")[0, 0, :3] == 1).all()  # white
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(marks)


def test_a_plot_says_what_its_font_lacks(measure: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ("--vocabulary", "small.tiktoken", "--text", "中=a.txt", "--plot", tmp_path / "made.png")
    result = measure(*arguments)
    assert result.err == "qwen_ref: note: the plot's font lacks characters of a name; boxes stand for them\n"
    assert result.code == 0


def test_a_plot_takes_matplotlib(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    # It is said before anything is read.
    assert "--plot takes matplotlib" in refused(measure("--text", "x=none.txt", "--plot", "made.png"))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x=none.txt"], "none.txt: cannot be read: No such file or directory"),
        (["--text", "x=."], ".: cannot be read: it is a folder, not a file"),
        (["--text", "x=latin1.txt"], "latin1.txt is not UTF-8 (byte 0xe9 at offset 1); convert it first"),
        (["--text", "x=empty.txt"], "empty.txt is empty"),
        (["--text", "a.txt"], "'a.txt' is not NAME=FILE, as in Welsh=welsh.txt; --help lists the options"),
        (["--text", "=a.txt"], "'=a.txt' is not NAME=FILE, as in Welsh=welsh.txt; --help lists the options"),
        (
            ["--text", " =a.txt"],
            "' =a.txt' is not NAME=FILE, as in Welsh=welsh.txt; --help lists the options",
        ),
        (["--text", "x="], "'x=' is not NAME=FILE, as in Welsh=welsh.txt; --help lists the options"),
        (["--text", "x=a.txt", "--text", "x=b.txt"], "two texts are called x"),
        (["--text"], "expected at least one argument; --help lists the options"),
        (["--vocabulary", "none"], "none: cannot be read: No such file or directory"),
        (["--vocabulary", "a.txt"], "not a token in base64, a space and its rank: b'abab'"),
        (["--vocabulary", "empty.txt"], "of the 256 single bytes are no token"),
        (["--vocabulary", "bytes"], "bytes: cannot be read: No such file or directory"),
        (["--against", "a.txt"], "not a token in base64, a space and its rank: b'abab'"),
        (["--against", "none"], "--against none: neither a file nor a known name: bytes, gpt2"),
        (["--against", "."], ".: cannot be read: it is a folder, not a file"),
        (["--against", "bytes", "bytes"], "the vocabulary bytes is given twice"),
        (["--against", "small.tiktoken"], "the vocabulary small.tiktoken is given twice"),
        (["--plot", "none/made.png"], "made.png: cannot be written: there is no folder"),
        (["--plot", "."], "--plot .: cannot be written: it is a folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, measure: Run, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("péché".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    before = sorted(os.listdir(tmp_path))
    assert message in refused(measure("--vocabulary", "small.tiktoken", *arguments))
    assert sorted(os.listdir(tmp_path)) == before
