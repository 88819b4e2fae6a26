"""Log-probabilities in the shape of the Completions API: what generate --json has in `choices`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS, change_tensors, cli_of, refused
from forked_ranks import command, run_ranks
from golden_cases import model as golden_model

from qwen_ref import Tokenizer, load_model
from qwen_ref.commands import generate as command_generate
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.completion import name
from qwen_ref.commands.generate import main
from qwen_ref.config import InputError
from qwen_ref.decoding import alternatives
from qwen_ref.decoding.alternatives import Alternatives
from qwen_ref.generate import generate
from qwen_ref.perplexity import score

cli = cli_of(main)
PROMPT, ANSWER = "冰岛的首都是", "雷克雅未克（Reykjavik）"
END = "<|endoftext|>"
FLOAT64 = ("--dtype", "float64")


def completed(cli: Callable, *arguments: str, prompt: str = PROMPT) -> dict:
    result = cli(prompt, "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_json_serves_both_kinds_of_readers(cli: Callable) -> None:
    report = completed(cli)
    assert report["object"] == "text_completion"
    assert report["model"] == str(WEIGHTS)
    assert report["choices"] == [
        {"index": 0, "text": report["text"], "logprobs": None, "finish_reason": "stop"}
    ]
    made = len(report["tokens"])
    prompt = report["prompt_tokens"]
    assert report["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
    }
    assert completed(cli, "--max-new-tokens", "2")["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("extra", [[], ["--lookup"]], ids=str)
def test_every_number_is_that_of_one_pass_over_the_whole_text(
    cli: Callable, extra: list[str], own: Tokenizer
) -> None:
    report = completed(cli, "--echo", "--top-logprobs", "3", *FLOAT64, *extra)
    (choice,) = report["choices"]
    ids = own.encode(PROMPT) + [token["id"] for token in report["tokens"]]
    with torch.inference_mode():
        truth = load_model(WEIGHTS, "float64")(torch.tensor([ids]))[0].log_softmax(dim=-1)
    found = choice["logprobs"]
    assert found["tokens"] == [name(token, own) for token in ids]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for position, token in enumerate(ids[1:]):
        own_number = found["token_logprobs"][position + 1]
        assert own_number == pytest.approx(float(truth[position, token]), abs=1e-11)
        top = found["top_logprobs"][position + 1]
        assert top[name(token, own)] == own_number
        values, best = truth[position].topk(3)
        wanted = {name(i, own): v for i, v in zip(best.tolist(), values.tolist(), strict=True)}
        assert {each: top[each] for each in wanted} == pytest.approx(wanted, abs=1e-11)
        assert set(top) == set(wanted) | {name(token, own)}
    assert choice["text"] == PROMPT + report["text"]
    steps = [token["logprob"] for token in report["tokens"]]
    assert found["token_logprobs"][-len(steps) :] == steps


def test_offsets_cut_the_text_into_its_tokens(cli: Callable, own: Tokenizer) -> None:
    """A token of part of a character adds nothing; its last part adds the character."""
    prompt = "x鼎龘y"  # in the tiny vocabulary bytes: 3 tokens a character
    report = completed(cli, "--echo", "--logprobs", "--max-new-tokens", "5", prompt=prompt)
    text, found = report["choices"][0]["text"], report["choices"][0]["logprobs"]
    starts = [*found["text_offset"], len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(starts)]
    assert "".join(parts) == text
    cut = found["tokens"].index("bytes:\\xe9")
    assert (found["tokens"][cut + 1], found["tokens"][cut + 2]) == ("bytes:\\xbc", "bytes:\\x8e")
    assert parts[cut : cut + 3] == ["", "", "鼎"]
    whole = [(n, p) for n, p in zip(found["tokens"], parts, strict=True) if not n.startswith("bytes:")]
    assert all(named == part for named, part in whole)


def test_what_a_stop_text_cuts_off_has_no_offset_of_its_own(cli: Callable) -> None:
    (choice,) = completed(cli, "--logprobs", "--stop", "克")["choices"]
    assert choice["text"] == "雷"
    assert choice["logprobs"]["tokens"] == ["雷", "克雅"]
    assert choice["logprobs"]["text_offset"] == [0, 1]
    (choice,) = completed(cli, "--logprobs", "--stop", "雷克")["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


def test_parts_of_characters_and_rows_beyond_the_vocabulary_have_names_of_their_own(own: Tokenizer) -> None:
    names = [name(token, own) for token in range(own.n_vocab + 9)]
    assert len(set(names)) == len(names)
    assert names[0xE5] == "bytes:\\xe5"
    assert names[own.encode("冰岛")[0]] == "冰岛"
    assert names[own.n_vocab] == f"<row {own.n_vocab}: no token>"


def test_top_0_gives_each_token_alone(cli: Callable) -> None:
    found = completed(cli, "--top-logprobs", "0")["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [
        {token: logprob} for token, logprob in zip(found["tokens"], found["token_logprobs"], strict=True)
    ]


def test_a_sampled_token_is_there_also_if_it_was_not_likely(cli: Callable) -> None:
    report = completed(cli, "--top-logprobs", "1", "--temperature", "5", "--top-p", "1", "--seed", "3")
    found = report["choices"][0]["logprobs"]
    assert any(len(top) == 2 for top in found["top_logprobs"])
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == min(top.values())


@pytest.mark.parametrize("form", [[], ["--fast"], ["--quantize", "int8", "--lookup"]], ids=str)
def test_to_look_changes_no_bit(cli: Callable, form: list[str]) -> None:
    plain = completed(cli, *form)
    seen = completed(cli, *form, "--echo", "--top-logprobs", "5")
    assert seen["tokens"] == plain["tokens"]
    assert seen["text"] == plain["text"]


def test_lines_have_the_prompt_and_the_alternatives_as_asked(cli: Callable, own: Tokenizer) -> None:
    plain = cli(PROMPT, "--logprobs").out.splitlines()
    more = [line.split("\t") for line in cli(PROMPT, "--logprobs", "--top-logprobs", "2").out.splitlines()]
    assert ["\t".join(line[:3]) for line in more] == plain
    assert all(len(json.loads(top)) == 2 for *_, top in more)
    echoed = cli(PROMPT, "--logprobs", "--echo").out.splitlines()
    ids = own.encode(PROMPT)
    assert echoed[len(ids) :] == plain
    assert echoed[0] == f'null\t{ids[0]}\t"冰岛"'
    assert [int(line.split("\t")[1]) for line in echoed[: len(ids)]] == ids
    first, *_ = cli(PROMPT, "--logprobs", "--echo", "--top-logprobs", "2").out.splitlines()
    assert first == echoed[0] + "\tnull"


def test_echo_prints_the_prompt_before_the_text(cli: Callable) -> None:
    text = cli(PROMPT).out
    assert cli(PROMPT, "--echo").out == PROMPT + text
    report = completed(cli, "--echo", prompt="e\u0301" + PROMPT)
    assert report["choices"][0]["text"].startswith("é" + PROMPT)  # as the model reads it
    assert report["prompt"] == "e\u0301" + PROMPT
    assert report["choices"][0]["logprobs"] is None


def test_ctrl_c_leaves_what_there_is(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Clock.watch

    def interrupted(clock: Clock, steps: Iterator) -> Iterator:
        for n, step in enumerate(watch(clock, steps)):
            if n == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Clock, "watch", interrupted)
    result = cli(PROMPT, "--json", "--echo", "--top-logprobs", "1")
    assert result.code == 130
    report = json.loads(result.out)
    assert report["finish_reason"] == "interrupted"
    assert report["choices"][0]["finish_reason"] is None
    assert len(report["choices"][0]["logprobs"]["tokens"]) == 2 + len(report["tokens"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-logprobs", "3"], "--top-logprobs goes with --logprobs (a line per token) or --json"),
        (
            ["--json", "--top-logprobs", "-1"],
            "--top-logprobs -1 must be from 0 to 1000, and the vocabulary has 2752",
        ),
        (["--json", "--top-logprobs", "1001"], "--top-logprobs 1001 must be from 0 to 1000"),
    ],
)
def test_what_cannot_be_is_one_line(cli: Callable, arguments: list[str], message: str) -> None:
    assert message in refused(cli(PROMPT, *arguments))


def test_the_vocabulary_is_the_hard_limit(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of its tokens share a name."""
    monkeypatch.setattr(command_generate, "MOST_ALTERNATIVES", 10_000)
    line = refused(cli(PROMPT, "--json", "--top-logprobs", "2753"))
    assert "must be from 0 to 2752, and the vocabulary has 2752 tokens" in line
    (choice,) = completed(cli, "--top-logprobs", "2752", "--max-new-tokens", "2")["choices"]
    for top in choice["logprobs"]["top_logprobs"]:
        assert len(top) == 2752
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_logits_that_are_not_finite_are_refused_also_in_the_prompt(cli: Callable, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["transformer.ln_f.weight"].fill_(torch.nan))
    result = cli(PROMPT, "--model", folder, "--json", "--echo", "--logprobs")
    assert (result.code, result.out) == (2, "")
    assert "NaN" in result.err.splitlines()[-1]


def test_the_logits_of_every_position_of_the_prompt_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = golden_model("extended_base", "float64")
    forward = qwen.lm_head.forward
    nan_before_the_last = lambda x, **o: forward(x, **o) * (torch.nan if len(x) > 1 else 1.0)  # noqa: E731
    monkeypatch.setattr(qwen.lm_head, "forward", nan_before_the_last)
    assert len(list(generate(qwen, [1, 2, 3], 2))) == 2
    with Alternatives(qwen, 1, [1, 2, 3]), pytest.raises(InputError, match="640 NaN"):
        list(generate(qwen, [1, 2, 3], 2))


def test_long_prompts_are_scored_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the chunks in which they are computed, of 1024 positions."""
    qwen, sizes = golden_model("extended_base", "float64"), []
    ids = torch.randint(0, qwen.config.vocab_size, (1030,)).tolist()
    monkeypatch.setattr(alternatives, "_LOGITS", 300 * qwen.config.vocab_size)
    forward = qwen.lm_head.forward
    monkeypatch.setattr(qwen.lm_head, "forward", lambda x, **o: sizes.append(len(x)) or forward(x, **o))
    with Alternatives(qwen, 2, ids) as seen:
        steps = list(seen.watch(generate(qwen, ids, 3)))
    assert sizes[:5] == [300, 300, 300, 124, 5]
    assert [each.token for each in seen.prompt] == ids
    found = torch.tensor([each.logprob for each in seen.prompt[1:]], dtype=torch.float64)
    assert (found - score(qwen, ids)).abs().max() < 1e-11
    assert [(each.token, each.logprob) for each in seen.steps] == steps
    assert not qwen.lm_head._forward_hooks
    assert not qwen.norm._forward_hooks


def test_two_ranks_give_the_numbers_of_one(cli: Callable, tmp_path: Path) -> None:
    arguments = ("--json", "--echo", "--top-logprobs", "3", *FLOAT64)
    out, _ = run_ranks(2, tmp_path, command, "qwen_ref.generate", PROMPT, *arguments)
    one, two = (report["choices"][0] for report in (completed(cli, *arguments[1:]), json.loads(out)))
    assert two["text"] == one["text"]
    found, wanted = two["logprobs"], one["logprobs"]
    assert (found["tokens"], found["text_offset"]) == (wanted["tokens"], wanted["text_offset"])
    assert found["token_logprobs"][1:] == pytest.approx(wanted["token_logprobs"][1:], abs=1e-6)
    for a, b in zip(found["top_logprobs"][1:], wanted["top_logprobs"][1:], strict=True):
        assert a == pytest.approx(b, abs=1e-6)
