"""The needle test: texts are what they should be, the tiny checkpoint finds its facts, NTK and LogN do what
the README says.
"""

from __future__ import annotations

import importlib
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, Result, Run, example_of, refused
from trained_twice import check_training

from qwen_ref import Tokenizer, load_model
from qwen_ref.model import ntk_alpha

NEEDLE = ROOT / "examples" / "measure" / "needle"
needle = example_of("measure/needle")
corpus, training = example_of("make/needle_corpus"), example_of("make/train_needle")


@pytest.fixture
def run_needle(needle: ModuleType, run_command: Run) -> Run:
    return lambda *arguments: run_command(needle.main, *arguments)


# The texts


@pytest.mark.parametrize("depth", [0, 10, 33.3, 50, 99, 100])
@pytest.mark.parametrize("length", [11, 12, 64, 129, 1000])
def test_length_and_depth_are_what_was_asked(needle: ModuleType, length: int, depth: float) -> None:
    fact, question, answer = [900, 901, 902, 903], [910, 911, 912], [920, 921]
    rng = random.Random(length)
    hay = [rng.randrange(100) for _ in range(length + 256)]
    text = needle.hide(needle.Needle(fact, question, answer), hay, lambda token: token < 10, length, depth)
    assert len(text) == length
    room = length - 9
    at = round(room * depth / 100)
    assert text[at : at + 4] == fact
    assert text[-5:] == question + answer
    before, after = text[:at], text[at + 4 : -5]
    assert before == [] or before[-1] < 10  # a sentence ended
    joined = before + after  # what stands around the fact is one stretch of the hay
    assert any(hay[start : start + room] == joined for start in range(len(hay) - room + 1))


def test_hay_without_sentences_is_cut_where_the_depth_says(needle: ModuleType) -> None:
    text = needle.hide(needle.Needle([9], [8], [7]), [1] * 60, lambda token: False, 43, 25)
    assert text == [1] * 10 + [9] + [1] * 30 + [8, 7]


def test_a_length_without_room_is_refused(needle: ModuleType) -> None:
    hidden = needle.Needle([1, 2], [3], [4])
    assert needle.hide(hidden, [0] * 300, bool, 4, 50) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="a length of 3 is too short: fact, question and answer take 4"):
        needle.hide(hidden, [0] * 300, bool, 3, 50)


def test_a_fact_is_told_once_and_never_in_the_training(
    needle: ModuleType, corpus: ModuleType, training: ModuleType
) -> None:
    tokenizer = Tokenizer.from_file(NEEDLE / "qwen.tiktoken")
    args = needle.parser().parse_args([])
    draw = needle.drawer(args, tokenizer)
    texts, starts = needle.texts_of(draw, tokenizer, 512, [0, 50, 100], 5, seed=3)
    asked = set()
    for text, start in zip(texts, starts, strict=True):
        name, surname = text[start - 1], text[start]
        assert start == 511
        assert text.count(name) == 2  # in the fact and in the question
        assert text[text.index(name) + 1] == surname
        fact = corpus.Fact(*(tokenizer.decode([token]).strip() for token in (name, surname)))
        assert corpus.is_held_out(fact)
        asked.add(fact)
    assert len(asked) > 10

    rows = training.Rows(tokenizer, seed=0)
    told = {tokenizer.encode(f" {name}")[0]: name for name in corpus.NAMES}
    for length in training.ROW_LENGTHS:
        for make in (rows.pairs, rows.questions):
            for _ in range(30):
                ids, answers = make(length)
                assert len(ids) == length
                assert answers
                for at in answers:  # what the loss asks for was said before
                    assert ids[at - 1 : at + 1] in (ids[i : i + 2] for i in range(at - 1))
                for name, surname in itertools.pairwise(ids):
                    word = tokenizer.decode([surname]).strip()
                    if name in told and word in corpus.SURNAMES:
                        assert not corpus.is_held_out(corpus.Fact(told[name], word))


def test_a_file_is_a_haystack_and_a_fact_may_be_any(needle: ModuleType, run_needle: Run, tmp_path: Path):
    file = tmp_path / "hay.txt"
    file.write_text(" The sea is calm. The road was long.", encoding="utf-8")
    own = ["--needle", " Ada Baker came.", "--question", " Who? Ada", "--answer", " Baker"]
    tokenizer = Tokenizer.from_file(NEEDLE / "qwen.tiktoken")
    draw = needle.drawer(needle.parser().parse_args([*own, "--haystack", str(file)]), tokenizer)
    (text,), _ = needle.texts_of(draw, tokenizer, 38, [50], 1, seed=0)
    decoded = tokenizer.decode(text)
    assert len(text) == 38
    assert decoded.endswith(" Who? Ada Baker")
    assert ". Ada Baker came. The " in decoded
    options = ["--haystack", file, "--lengths", "64", "--samples", "4", "--variants", "none"]
    result = run_needle(*own, *options)
    assert (result.code, result.out.count("| 100 % (")) == (0, 5), result


def test_either_engine_of_the_tokenizer_encodes(run_needle: Run, engine_options: list[str]) -> None:
    result = run_needle("--lengths", "64", "--samples", "4", "--variants", "none", *engine_options)
    assert (result.code, result.out.count("| 100 % (")) == (0, 5), result


# The checkpoint


def test_training_makes_this_folder(training: ModuleType, tmp_path: Path) -> None:
    """Two runs of two steps agree to the byte, and in all but the weights with the checkpoint."""
    check_training(training, tmp_path, NEEDLE, "--steps", "2", "--output")


def cells(result: Result) -> dict[tuple[str, int, float], dict]:
    assert result.code == 0, result.err
    found = json.loads(result.out)["cells"]
    return {(cell["variant"], cell["length"], cell["depth"]): cell for cell in found}


def test_within_the_trained_length_every_depth_is_retrieved(run_needle: Run) -> None:
    found = cells(run_needle("--lengths", "32,64,128", "--samples", "40", "--seed", "7", "--json"))
    assert len(found) == 4 * 3 * 5
    for (_, length, depth), cell in found.items():
        assert cell["retrieved"] >= 0.95 * cell["samples"], cell
        own = {"alpha": 1, "variant": "none"}
        assert cell | own == found["none", length, depth]  # neither acts there: the very same numbers


@pytest.mark.parametrize(
    ("length", "least", "gap"), [(512, 85, 12), pytest.param(1024, 65, 35, marks=pytest.mark.slow)]
)
def test_beyond_it_dynamic_ntk_keeps_what_is_lost_without(length: int, least: int, gap: int, run_needle: Run):
    """Of the README's 500 texts with NTK 94 and 92 % at 512 tokens, without 72 and 70; at 1,024 tokens 88 and
    80, without 39 and 33. A hundred texts may be off by 5.
    """
    found = cells(run_needle("--lengths", str(length), "--samples", "20", "--seed", "5", "--json"))
    percent = dict.fromkeys(("both", "ntk", "logn", "none"), 0)
    for (variant, _, _), cell in found.items():
        percent[variant] += cell["retrieved"]  # 20 texts at each of five depths
        assert cell["samples"] == 20
        assert cell["alpha"] == (ntk_alpha(length, 128) if variant in ("both", "ntk") else 1)
    assert min(percent["both"], percent["ntk"]) >= least
    assert min(percent["both"], percent["ntk"]) - max(percent["logn"], percent["none"]) >= gap
    if length == 1024:  # LogN is worth little beside it, and only where the text is long
        assert percent["both"] > percent["ntk"]
        assert percent["logn"] > percent["none"]


# What comes out


def test_the_table_has_a_row_a_depth_and_a_column_a_length(run_needle: Run) -> None:
    options = ["--lengths", "64,32", "--depths", "0,25,100", "--samples", "3", "--variants", "logn,both"]
    result = run_needle(*options)
    first, second = result.out.split("\n\n")
    assert first.splitlines()[:2] == ["| depth; LogN alone | 32 tokens | 64 tokens |", "|---|---|---|"]
    assert second.startswith("| depth; NTK and LogN | 32 tokens | 64 tokens |")
    rows = [line.split(" | ")[0] for line in first.splitlines()[2:]]
    assert rows == ["| 0 %", "| 25 %", "| 100 %"]
    found = cells(run_needle(*options, "--json"))
    assert list(found)[:3] == [("logn", 32, 0), ("logn", 32, 25), ("logn", 32, 100)]
    for depth, line in zip((0, 25, 100), first.splitlines()[2:], strict=True):
        for length, text in zip((32, 64), line.strip("| ").split(" | ")[1:], strict=True):
            cell = found["logn", length, depth]
            assert text == f"{100 * cell['retrieved'] / 3:.0f} % ({cell['mean_logprob']:.2f})"


def test_a_cell_counts_whole_answers(needle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two depths of two texts whose answers have two tokens: one is right, one half, two are wrong."""
    model = load_model(NEEDLE, "float32")
    own = model.config
    answers = [[True, True], [True, False], [False, False], [False, True]]
    seen = []

    def scored(model: object, texts: list, starts: list, batch_size: int, advance: Callable) -> list:
        seen.append((model.config.use_dynamic_ntk, model.config.use_logn_attn))
        scores = importlib.import_module("qwen_ref.perplexity.scoring").Scores
        return [scores(torch.tensor([-1.0, -2.0 - n]), torch.tensor(each)) for n, each in enumerate(answers)]

    monkeypatch.setattr(needle, "score_texts", scored)
    texts = {300: ([[1] * 300] * 4, [298] * 4)}
    found = needle.measure(model, texts, [0, 100], ["none", "ntk"], 8)
    assert seen == [(False, False), (True, False)]
    assert found[:2] == [
        needle.Cell("none", 300, 0, 1, 2, 1, -3.5),
        needle.Cell("none", 300, 100, 1, 2, 0, -5.5),
    ]
    assert [cell.alpha for cell in found[2:]] == [7, 7]
    assert model.config is own


def test_the_heat_map(needle: ModuleType, run_needle: Run, tmp_path: Path) -> None:
    plot = tmp_path / "map.png"
    options = ["--lengths", "64,256", "--depths", "0,50,100", "--samples", "2"]
    assert run_needle(*options, "--plot", plot).code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    made = [
        needle.Cell(variant, length, depth, 1, 4, retrieved, -1.0)
        for variant in ("none", "both")
        for length in (64, 128, 256)
        for depth, retrieved in ((0, 1), (100, 3))
    ]
    figure = needle.heat_map(made, 128, "title")
    left, right, *_ = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["neither", "NTK and LogN"]
    assert left.images[0].get_array().tolist() == [[25, 25, 25], [75, 75, 75]]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 100)
    assert [text.get_text() for text in left.texts] == ["25"] * 3 + ["75"] * 3
    assert [list(line.get_xdata()) for line in left.lines] == [[1.5, 1.5]]  # between 128 and 256
    assert needle.heat_map(made, 256, "title").axes[0].lines[:] == []  # nothing lies beyond
    importlib.import_module("matplotlib.pyplot").close("all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "6"], "a length of 6 is too short: fact, question and answer take 8 tokens"),
        (["--lengths", "64,0"], "a length of 0 tokens is not positive"),
        (["--lengths", "-5"], "a length of -5 tokens is not positive"),
        (["--lengths", "64,x"], "'64,x' are no lengths"),
        (["--depths", "0,101"], "a depth of 101 is not from 0 to 100 %"),
        (["--depths=-1,50"], "a depth of -1 is not from 0 to 100 %"),
        (["--depths", "nan,50"], "a depth of nan is not from 0 to 100 %"),
        (["--depths", "1"], "a count of depths must be from 2 to 101, not 1"),
        (["--depths", "deep"], "'deep' are no depths"),
        (["--variants", "both,yarn"], "'yarn' is none of both, ntk, logn, none"),
        (["--haystack", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        (["--haystack", "empty.txt"], "empty.txt is empty; a haystack needs text"),
        (["--haystack", "latin1.txt"], "latin1.txt is not UTF-8"),
        (["--needle", "a", "--question", "b", "--answer", ""], "--answer is empty"),
        (["--needle", "a", "--question", "b"], "--answer is missing; --needle, --question and --answer go"),
        (["--answer", "a"], "--needle is missing"),
        (["--samples", "0"], "--samples 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--model", "nowhere"], "nowhere"),
        (["--plot", "nowhere/map.png"], "map.png: cannot be written: there is no folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, run_needle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    assert message in refused(run_needle(*arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "latin1.txt"]
