"""Scores are those of whole sequences in float64; the command's windows, sums, files and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, Run, change_json, change_tensors, cli_of, python, refused
from forked_ranks import TORCHRUN
from golden_cases import model
from torch import Tensor

import qwen_ref
from qwen_ref import Qwen, load_model
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.perplexity import scoring
from qwen_ref.perplexity.__main__ import main
from qwen_ref.perplexity.scoring import score
from qwen_ref.perplexity.windows import bucket_edges, windows
from qwen_ref.tokenizer import Tokenizer

cli = cli_of(main)
FOLDERS = ("extended_base", "ntk_logn", "long")


def truth(qwen: Qwen, ids: list[int]) -> Tensor:
    """Of all tokens but the first, from one pass over the whole text and all its logits."""
    with torch.inference_mode():
        every = qwen(torch.tensor([ids]))[0].log_softmax(dim=-1)  # (T, V)
    return torch.stack([every[position, token] for position, token in enumerate(ids[1:])])


def texts(qwen: Qwen, *lengths: int) -> list[list[int]]:
    return [torch.randint(0, qwen.config.vocab_size, (length,)).tolist() for length in lengths]


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert [len(each) for each in found] == [len(each) for each in wanted]
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if len(a))


# Scores

TOLERANCE = 1e-12  # float64 sums in another order; measured: 6e-15


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_text_has_the_scores_of_one_pass(folder: str) -> None:
    qwen = model(folder, "float64")
    (ids,) = texts(qwen, 1500)  # two chunks
    found = score(qwen, ids)
    assert found.dtype == torch.float64
    assert furthest([found], [truth(qwen, ids)]) < TOLERANCE


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("folder", FOLDERS)
def test_texts_score_together_as_alone(folder: str, batch_size: int) -> None:
    qwen = model(folder, "float64")
    several = texts(qwen, 33, 2, 64, 100, 7, 65, 40)  # with NTK at 32: α of 1, 3 and 7
    found = score(qwen, several, batch_size=batch_size)
    assert furthest(found, [truth(qwen, ids) for ids in several]) < TOLERANCE


def test_a_tensor_scores_as_a_tensor() -> None:
    qwen = model("extended_base", "float32")
    ids = torch.randint(0, qwen.config.vocab_size, (2, 20))
    found = score(qwen, ids)
    assert (found.shape, found.dtype) == ((2, 19), torch.float32)
    # The same calls of the same kernels: equal on every processor.
    assert torch.equal(found[1], score(qwen, ids.tolist())[1])
    assert score(qwen, ids[0]).shape == (19,)
    assert qwen_ref.perplexity.score is score


def test_one_token_has_no_score() -> None:
    qwen = model("extended_base", "float32")
    assert score(qwen, [5]).shape == (0,)
    assert [len(each) for each in score(qwen, [[5], [5, 6]])] == [0, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("folder", FOLDERS)
def test_continuations_score_as_whole_texts(folder: str, batch_size: int) -> None:
    """Their lengths cross NTK's steps at 32 and 64 tokens, so one prompt has two α."""
    qwen = model(folder, "float64")
    prompt, *continuations = texts(qwen, 30, 1, 2, 3, 40, 1, 9)
    found = score(qwen, prompt, continuations, batch_size)
    wanted = [truth(qwen, prompt + each)[len(prompt) - 1 :] for each in continuations]
    assert furthest(found, wanted) < TOLERANCE
    assert score(qwen, prompt, [[]])[0].shape == (0,)
    assert score(qwen, prompt, []) == []


@pytest.mark.parametrize("kind", ["fast", "int8 cache"])
def test_continuations_behind_every_kind_of_cache(kind: str) -> None:
    qwen = load_model(GOLDEN / "long", "float32")
    if kind == "fast":
        fasten(qwen)
    else:
        qwen.cache_type = Int8Cache
    prompt, *continuations = texts(qwen, 200, 5, 7, 1, 12)
    found = score(qwen, prompt, continuations)
    wanted = [score(qwen, prompt + each)[len(prompt) - 1 :] for each in continuations]
    # float32's rounding of logits up to 10; in 8 bits, numbers next to a half may be rounded to either side.
    assert furthest(found, wanted) < (1e-5 if kind == "fast" else 2e-3)


class Passes:
    """The tokens of each pass through a model, rows times columns."""

    def __init__(self, qwen: Qwen) -> None:
        self.shapes: list[tuple[int, int]] = []
        qwen.embed.register_forward_hook(lambda _, ids, __: self.shapes.append(tuple(ids[0].shape)))


def test_a_prompt_is_computed_once() -> None:
    qwen = load_model(GOLDEN / "long", "float32")
    passes = Passes(qwen)
    prompt, *continuations = texts(qwen, 50, 1, 1, 4, 5, 6)
    score(qwen, prompt, continuations[:2])
    assert passes.shapes == [(1, 50)]  # the first tokens' scores are the prompt's last logits
    passes.shapes.clear()
    score(qwen, prompt, continuations)
    assert passes.shapes == [(1, 50), (3, 5)]
    # What the copies of the prompt take is bounded by the weights: then fewer rows at a time.
    passes.shapes.clear()
    long, *continuations = texts(qwen, 900, 4, 5, 6)
    score(qwen, long, continuations)
    assert [shape for shape in passes.shapes if shape[0] > 1] == []


def test_prompts_that_begin_alike_share_their_beginning() -> None:
    qwen = load_model(GOLDEN / "ntk_logn", "float64")
    passes, prefix = Passes(qwen), PrefixCache(qwen)
    shared, one, other, answer, longer = texts(qwen, 40, 5, 6, 3, 30)
    wanted = [truth(qwen, shared + each + answer)[-3:] for each in (one, other)]
    passes.shapes.clear()
    for question, expected in zip((one, other), wanted, strict=True):
        (found,) = scoring.score_continuations(qwen, shared + question, [answer], prefix=prefix)
        assert furthest([found.logprobs], [expected]) < TOLERANCE
    assert passes.shapes == [(1, 45), (1, 2), (1, 6), (1, 2)]
    # Beyond 64 tokens α is another, and nothing can be kept.
    wanted = truth(qwen, shared + longer + answer)[-3:]
    (found,) = scoring.score_continuations(qwen, shared + longer, [answer], prefix=prefix)
    assert furthest([found.logprobs], [wanted]) < TOLERANCE


def test_likeliest_tokens_are_known() -> None:
    qwen = model("extended_base", "float64")
    (ids,) = texts(qwen, 20)
    with torch.inference_mode():
        best = qwen(torch.tensor([ids])).argmax(dim=-1)[0].tolist()
    (found,) = scoring.score_continuations(qwen, ids, [[best[-1]]])
    assert found.likeliest.tolist() == [True]
    changed = [*ids[:9], best[8], *ids[10:]]
    (found,) = scoring.score_texts(qwen, [changed], [8])
    assert found.likeliest.tolist()[:2] == [ids[8] == best[7], True]


def test_few_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen, sizes = load_model(GOLDEN / "extended_base", "float64"), []
    qwen.lm_head.register_forward_hook(lambda _, states, __: sizes.append(len(states[0])))
    monkeypatch.setattr(scoring, "_LOGITS", 10 * qwen.config.vocab_size)
    (ids,) = texts(qwen, 64)
    found = score(qwen, ids)
    assert sizes == [10, 10, 10, 10, 10, 10, 3]
    assert furthest([found], [truth(qwen, ids)]) < TOLERANCE
    sizes.clear()
    scoring.score_texts(qwen, [ids], [60])  # nor more than are asked for
    assert sizes == [4]


@pytest.mark.parametrize(
    ("ids", "continuations", "message"),
    [
        ([], None, "ids must be the tokens of a text, or of several; they are \\[\\]"),
        (torch.zeros(0, 5, dtype=torch.int64), None, "ids must be"),
        (torch.zeros(1, 5, 1, dtype=torch.int64), None, "ids must be"),
        ([[1, 2], []], None, "no tokens"),
        ([1, 2], [3, 4], "continuations must be lists of token ids; they are \\[3, 4\\]"),
        ([1, 400], None, "token id 400 is outside the vocabulary, 0 to 319"),
        ([1, 2], [[3], [-1]], "token id -1 is outside"),
        ([[1, 2], [3, 4]], [[3]], "continuations are those of one prompt"),
        (["a"], None, "list of token ids"),
    ],
)
def test_wrong_ids_are_refused(ids: object, continuations: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(model("extended_base", "float32"), ids, continuations)


def test_ids_may_be_arrays_and_scores_may_meet_gradients() -> None:
    qwen = model("extended_base", "float64")
    (ids,) = texts(qwen, 12)
    wanted = score(qwen, ids)
    for form in (np.array(ids), torch.tensor(ids), tuple(ids)):
        # The same calls of the same kernels: equal on every processor.
        assert torch.equal(score(qwen, form), wanted)
    for several in (np.array([ids, ids]), [np.array(ids), np.array(ids)], torch.tensor([ids, ids])):
        assert furthest(list(score(qwen, several)), [wanted, wanted]) < TOLERANCE
    (continuation,) = score(qwen, np.array(ids[:8]), [np.array(ids[8:])])
    assert furthest([continuation], [wanted[7:]]) < TOLERANCE
    weight = torch.ones(11, dtype=torch.float64, requires_grad=True)
    (weight * wanted).sum().backward()
    assert torch.equal(weight.grad, wanted)  # times 1: no rounding


def test_wrong_numbers_are_refused() -> None:
    qwen = model("extended_base", "float32")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        score(qwen, [1, 2], batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        score(qwen, [1, 2], [[3]], batch_size=0)
    for starts in ([0], [3], [1, 1]):
        with pytest.raises(ValueError, match="index from 1 to the text's length"):
            scoring.score_texts(qwen, [[1, 2]], starts)


def test_logits_that_are_not_finite_are_refused() -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32")
    with torch.no_grad():
        qwen.norm.weight[3] = torch.nan
    for continuations in (None, [[3]]):
        with pytest.raises(ValueError, match="NaN"):
            score(qwen, [1, 2, 3], continuations)


# Windows


def test_windows_side_by_side_leave_out_what_fills_none() -> None:
    found = windows([10, 3, 8], 4)
    assert [tuple(each) for each in found] == [(0, 0, 4, 1), (0, 4, 8, 5), (2, 0, 4, 1), (2, 4, 8, 5)]


@pytest.mark.parametrize(("tokens", "length", "stride"), [(10, 4, 1), (11, 4, 3), (64, 16, 8), (4, 4, 2)])
def test_strided_windows_score_every_token_once(tokens: int, length: int, stride: int) -> None:
    found = windows([tokens], length, stride)
    scored = [position for each in found for position in range(each.scored, each.end)]
    assert scored == list(range(1, tokens))
    assert all(each.end - each.start <= length and each.start < each.scored for each in found)
    assert [each.start for each in found] == list(range(0, stride * len(found), stride))
    assert found[-1].end == tokens


def test_buckets_double() -> None:
    assert bucket_edges(8192) == [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert bucket_edges(100) == [1, 3, 6, 12, 25, 50, 100]
    assert bucket_edges(2) == [1, 2]


# The command


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    """The tiny checkpoint as a model with NTK and LogN, trained on 64 tokens."""
    trained = {"seq_length": 64, "rotary_emb_base": 10000}
    change_json(folder / "config.json", use_dynamic_ntk=True, use_logn_attn=True, **trained)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "冰岛的首都是雷克雅未克（Reykjavik）\n7+8=15\nThe capital of Norway is Oslo.\n" * 25, encoding="utf-8"
    )
    return path


def expected(folder: Path, path: Path, length: int, stride: int | None = None, **changes: bool) -> float:
    """The perplexity by the definition: whole windows in float64, one at a time."""
    qwen = load_model(folder, "float64")
    qwen.config = dataclasses.replace(qwen.config, **changes)
    ids = Tokenizer.from_file(folder / "qwen.tiktoken").encode(path.read_text(encoding="utf-8"))
    losses: list[float] = []
    done = 1
    for start in range(0, len(ids), stride or length):
        window = ids[start : start + length]
        if stride is None and len(window) < length:
            break
        scores = truth(qwen, window).tolist()  # of positions start + 1 and on
        losses += scores if stride is None else scores[done - start - 1 :]
        done = start + len(window)
        if stride is not None and done == len(ids):
            break
    return math.exp(-math.fsum(losses) / len(losses))


@pytest.mark.parametrize("stride", [None, 24])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dynamic_ntk": False},
        {"use_logn_attn": False},
        {"use_dynamic_ntk": False, "use_logn_attn": False},
    ],
)
def test_the_table_is_that_of_whole_windows(
    cli: Run, checkpoint: Path, text: Path, stride: int | None, changes: dict[str, bool]
) -> None:
    options = [{"use_dynamic_ntk": "--no-ntk", "use_logn_attn": "--no-logn"}[name] for name in changes]
    if stride is not None:
        options += ["--stride", str(stride)]
    done = cli("--model", checkpoint, "--text", text, "--lengths", "50,100", "--dtype", "float64", "--json",
        *options, "--batch-size", "3",
    )  # fmt: skip
    report = json.loads(done.out)
    assert report["use_dynamic_ntk"] is changes.get("use_dynamic_ntk", True)
    for result in report["results"]:
        wanted = expected(checkpoint, text, result["length"], stride, **changes)
        assert result["perplexity"] == pytest.approx(wanted, rel=1e-12)
        by_position = result["by_position"]
        assert sum(part["tokens"] for part in by_position) == result["tokens"]
        losses = [part["loss"] * part["tokens"] for part in by_position if part["tokens"]]
        assert sum(losses) / result["tokens"] == pytest.approx(result["loss"], rel=1e-12)
    assert [result["alpha"] for result in report["results"]] == (
        [1, 1] if "use_dynamic_ntk" in changes else [1, 3]
    )


def test_positions_fall_into_their_buckets(cli: Run, text: Path, own: Tokenizer) -> None:
    done = cli("--text", text, "--lengths", "40", "--windows", "2", "--dtype", "float64", "--json")
    (result,) = json.loads(done.out)["results"]
    ids = own.encode(text.read_text(encoding="utf-8"))
    qwen = load_model(WEIGHTS, "float64")
    scores = torch.stack([truth(qwen, ids[:40]), truth(qwen, ids[40:80])])  # positions 1 to 39
    for part in result["by_position"]:
        these = scores[:, part["from"] - 1 : part["to"]]
        assert part["tokens"] == these.numel()
        assert part["loss"] == pytest.approx(-float(these.mean()), rel=1e-12)
    assert [part["from"] for part in result["by_position"]] == bucket_edges(40)[:-1]


def test_the_table_is_printed(cli: Run, text: Path) -> None:
    done = cli("--text", text, "--lengths", "32,64", "--dtype", "float64")
    lines = done.out.splitlines()
    assert lines[0] == "| length | α | windows | tokens scored | loss | perplexity |"
    assert lines[2].endswith(f"| {expected(WEIGHTS, text, 32):.4f} |")
    assert lines[3].endswith(f"| {expected(WEIGHTS, text, 64):.4f} |")
    assert "| position in 64 | tokens scored | loss | perplexity |" in lines


def test_windows_do_not_cross_files(cli: Run, text: Path, tmp_path: Path) -> None:
    short, other = tmp_path / "short.txt", tmp_path / "other.txt"
    short.write_text("7+8=15\n")
    other.write_bytes(text.read_bytes()[:600])
    done = cli("--text", text, short, other, "--lengths", "64", "--dtype", "float64", "--json")
    again = cli("--text", text, "--text", short, other, "--lengths", "64", "--dtype", "float64", "--json")
    assert again.out == done.out
    assert f"note: left out, shorter than a window of 64 tokens: {short} (7)" in done.err
    (result,) = json.loads(done.out)["results"]
    parts = [
        json.loads(cli("--text", path, "--lengths", "64", "--dtype", "float64", "--json").out)
        for path in (text, other)
    ]
    tokens = [part["results"][0]["tokens"] for part in parts]
    assert result["tokens"] == sum(tokens)
    losses = [part["results"][0]["loss"] for part in parts]
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    assert result["loss"] == pytest.approx(mean, rel=1e-12)


def test_a_text_is_taken_as_it_is(cli: Run, tmp_path: Path) -> None:
    """Its last newline is a token as any other."""
    path = tmp_path / "text.txt"
    path.write_text("7+8=15\n")
    report = json.loads(cli("--text", path, "--lengths", "7", "--json").out)
    assert report["texts"] == [{"file": str(path), "tokens": 7}]


def test_a_text_may_come_from_stdin(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("7+8=15\n")
    read, piped = (
        json.loads(cli("--text", file, "--lengths", "7", "--json", stdin=path.read_bytes()).out)
        for file in (path, "-")
    )
    assert piped["texts"] == [{"file": "-", "tokens": 7}]
    assert piped["results"] == read["results"]


def test_a_mark_is_dropped_and_windows_line_ends_stay(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf7+8=15\r\n7+8=15\r\n")
    result = cli("--text", path, "--lengths", "7", "--json")
    assert f"note: {path} begins with a byte order mark (U+FEFF), which is dropped" in result.err
    assert f"note: in {path} 2 lines end in CRLF" in result.err
    (text,) = json.loads(result.out)["texts"]
    assert text["tokens"] > 14
    path.write_text("7+8=15\n", encoding="utf-16")
    assert "is UTF-16" in refused(cli("--text", path, "--lengths", "7"))


def test_either_engine_of_the_tokenizer_gives_the_same_table(
    cli: Run, text: Path, engine_options: list[str]
) -> None:
    done = cli("--text", text, "--lengths", "50", "--dtype", "float64", "--json", *engine_options)
    report = json.loads(done.out)
    assert report["results"][0]["perplexity"] == pytest.approx(expected(WEIGHTS, text, 50), rel=1e-12)


# Resuming


def test_an_interrupted_run_goes_on(cli: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state, options = tmp_path / "state.jsonl", ("--text", text, "--lengths", "32,64", "--json")
    whole = cli(*options)
    calls = 0
    original = scoring.score_texts

    def interrupted(*args: object, **kwargs: object) -> list[scoring.Scores]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(scoring, "score_texts", interrupted)
    stopped = cli(*options, "--state", state)
    assert (stopped.code, stopped.out) == (130, "")
    assert len(state.read_text().splitlines()) == 5  # the header and four windows
    with state.open("a") as file:
        file.write('{"length": 32, "win')  # as a machine that is switched off leaves it
    calls = 6
    again = cli(*options, "--state", state)
    assert again.out == whole.out
    done = calls
    assert cli(*options, "--state", state).out == whole.out
    assert calls == done  # nothing was computed again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.jsonl", "text.txt"]


def test_another_run_s_state_is_refused(cli: Run, text: Path, tmp_path: Path, checkpoint: Path) -> None:
    state = tmp_path / "state.jsonl"
    first = ("--model", checkpoint, "--text", text, "--lengths", "32", "--state", state)
    assert cli(*first).code == 0
    before = state.read_bytes()
    for change in (["--no-ntk"], ["--no-logn"], ["--dtype", "float32"], ["--kv-cache", "int8"]):
        line = refused(cli(*first, *change))
        assert f"{state} is of another run: there {change[0]} is " in line or change[0] == "--kv-cache"
        assert f"{state} is of another run: there " in line
    change_json(checkpoint / "config.json", seq_length=63)
    assert "another run" in refused(cli(*first))
    assert state.read_bytes() == before
    text.write_text("7+8=15\n" * 40)
    assert "another run" in refused(cli(*first))
    header, line = before.splitlines()[:2]
    wrong = [
        line.replace(b'"losses": [', b'"losses": ' + each) for each in (b"null, [", b"[NaN, ", b'["a", ')
    ]
    wrong.append(line.replace(b'"tokens": [1', b'"tokens": [0'))
    assert line not in wrong
    for each in wrong:
        state.write_bytes(header + b"\n" + each + b"\n")
        assert f"{state} is no file of this command's" in refused(cli(*first))
    for content in (b"", b"\xff\n", b"[]\n", b'{"a": 1}\n{"length": 3}\n', b"words\n"):
        state.write_bytes(content)
        assert f"{state} is " in refused(cli(*first))
        assert state.read_bytes() == content


def test_other_weights_of_the_same_size_are_another_run(
    cli: Run, text: Path, tmp_path: Path, checkpoint: Path
) -> None:
    state = tmp_path / "state.jsonl"
    options = ("--model", checkpoint, "--text", text, "--lengths", "32", "--state", state)
    assert cli(*options).code == 0
    change_tensors(checkpoint, lambda tensors: tensors["transformer.h.1.mlp.w1.weight"].mul_(2))
    assert "another run" in refused(cli(*options))


# The plot


def test_the_plot_is_written_whole(cli: Run, text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    done = cli("--text", text, "--lengths", "32,64", "--plot", plot)
    assert done.code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "text.txt"]


def test_a_name_with_a_dollar_is_no_formula(cli: Run, text: Path, tmp_path: Path) -> None:
    (tmp_path / "m$x_^$").symlink_to(WEIGHTS)
    options = ("--model", tmp_path / "m$x_^$", "--text", text, "--lengths", "32")
    assert cli(*options, "--plot", tmp_path / "loss.png").code == 0


def test_a_plot_without_matplotlib_says_what_brings_it(
    cli: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(cli("--text", text, "--lengths", "32", "--plot", tmp_path / "loss.png"))
    assert "pip install 'qwen_ref[plot]'" in line


# Bad input, and what is only said


def test_lengths_beyond_the_configuration_are_allowed_with_a_word(cli: Run, text: Path, checkpoint: Path):
    done = cli("--text", text, "--lengths", "600")
    assert done.code == 0
    assert "note: 600 tokens exceed the 512 that this model was trained on" in done.err
    done = cli("--model", checkpoint, "--text", text, "--lengths", "100", "--no-ntk")
    assert "note: 100 tokens exceed the 64" in done.err
    assert "note" not in cli("--model", checkpoint, "--text", text, "--lengths", "100").err


def test_a_switch_that_does_nothing_is_said(cli: Run, text: Path) -> None:
    done = cli("--text", text, "--lengths", "32", "--no-ntk", "--no-logn")
    assert "this model has no dynamic NTK that could be switched off" in done.err
    assert "this model has no LogN that could be switched off" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "100000"], "no text fills a window of 100000 tokens: the longest has "),
        (["--lengths", "32,x"], "'32,x' are no lengths"),
        (["--lengths", ""], "'' are no lengths"),
        (["--lengths", "1"], "a window of 1 tokens scores nothing"),
        (["--lengths", "32", "--stride", "32"], "--stride 32 must be below the length of a window, 32"),
        (["--lengths", "32", "--stride", "0"], "--stride 0 must be at least 1"),
        (["--lengths", "32", "--windows", "0"], "--windows 0 must be at least 1"),
        (["--lengths", "32", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--lengths", "32", "--model", "nowhere"], "nowhere"),
        (
            ["--lengths", "32", "--state", "nowhere/state"],
            "--state nowhere/state: cannot be written: there is no folder",
        ),
        (["--lengths", "32", "--plot", "nowhere/x.png"], "x.png: cannot be written: there is no folder"),
        (["--lengths", "32", "--state", ""], "--state: the path is empty"),
        (["--lengths", "32", "--dtype", "int7"], "int7"),
    ],
)
def test_bad_options_are_one_line(cli: Run, text: Path, options: list[str], message: str) -> None:
    assert message in refused(cli("--text", text, *options))


def test_a_state_is_a_regular_file(cli: Run, text: Path, special: tuple[Path, str]) -> None:
    path, _ = special
    assert str(path) in refused(cli("--text", text, "--lengths", "16", "--state", path))


def test_bad_texts_are_one_line(cli: Run, tmp_path: Path) -> None:
    missing, binary, empty = tmp_path / "missing", tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"a\xffb")
    empty.write_bytes(b"")
    assert str(missing) in refused(cli("--text", missing))
    assert f"{binary} is not UTF-8 (byte 0xff at offset 1)" in refused(cli("--text", binary))
    assert refused(cli("--text", empty)).endswith("the longest has 0; give more text")
    assert "the longest has 0" in refused(cli("--text", empty))
    assert "--text" in refused(cli())


# Several ranks


def test_two_ranks_print_what_one_does(cli: Run, text: Path) -> None:
    options = ["--text", str(text), "--lengths", "40,80", "--dtype", "float64", "--json"]
    done = python(*TORCHRUN, "2", "-m", "qwen_ref.perplexity", *options)
    assert done.code == 0, done.err
    reports = [json.loads(cli(*options).out), json.loads(done.out)]
    for one, two in zip(reports[0]["results"], reports[1]["results"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert two["tokens"] == one["tokens"]
