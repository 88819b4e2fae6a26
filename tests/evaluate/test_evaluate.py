"""lm-evaluation-harness on the tiny checkpoint: figures are those of whole passes, refusals one line."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import ROOT, WEIGHTS, Result, Run, cli_of, python, refused
from forked_ranks import TORCHRUN

from qwen_ref import Qwen, Tokenizer, load_model
from qwen_ref.chat.context import build_context
from qwen_ref.config import InputError
from qwen_ref.evaluate.__main__ import main
from qwen_ref.generate import generate
from qwen_ref.perplexity import scoring

cli = cli_of(main)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

if not os.environ.get("CI"):  # there it must be installed
    pytest.importorskip("lm_eval", reason="an extra: `make eval` installs it")

# The harness's own libraries, as they are imported and run.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASKS = ROOT / "examples" / "measure" / "tasks"


@pytest.fixture(autouse=True)
def own_caches(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, index: TaskManager
) -> None:
    """What data sets write goes away with the test; the example tasks name files from the project's root."""
    import lm_eval.tasks

    found = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path: (
            index if include_path is None else found(include_path=include_path, include_defaults=False)
        ),
    )
    folder = tmp_path_factory.mktemp("data_sets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ALLOW_CODE_EVAL"):
        monkeypatch.setenv(name, "")  # the command sets them for good
        monkeypatch.delenv(name)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.builder.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def index() -> TaskManager:
    """The harness's own tasks: it takes seconds to find them."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture(scope="module")
def tiny() -> Qwen:
    return load_model(WEIGHTS, "float64")


def harness(qwen: Qwen, own: Tokenizer, **options: object):
    from qwen_ref.evaluate.harness import HarnessModel

    return HarnessModel(qwen, own, **options)


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def oracle(qwen: Qwen, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From one pass over both: log p, and whether each token is the likeliest."""
    with torch.inference_mode():
        logits = qwen(torch.tensor([context + continuation]))[0, len(context) - 1 : -1]
    chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(continuation)[:, None])
    return float(chosen.sum()), logits.argmax(dim=-1).tolist() == continuation


def agree(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]
    for (ours, _), (theirs, _) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-11)  # float64 sums in another order


# Log-likelihoods


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_log_likelihoods_are_those_of_whole_passes(tiny: Qwen, own: Tokenizer, batch_size: int) -> None:
    """Shared contexts, contexts that begin alike, contexts alone, an empty one, equal requests."""
    shots = "The capital of Zambia is Lusaka.\nThe capital of Croatia is"
    pairs = [(shots, f" {city}") for city in ("Zagreb", "Buenos Aires", "Moroni", "Malabo")]
    pairs += [(shots + " Zagreb.\nThe capital of Norway is", f" {city}") for city in ("Oslo", "Suva")]
    pairs += [
        ("7+8=", "15"),
        ("冰岛的首都是", "雷克雅未克"),
        ("", "The capital"),
        ("7+8=", "15"),
        ("1, 2, 3", ", 4"),
    ]
    found = harness(tiny, own, batch_size=batch_size).loglikelihood(requests("loglikelihood", *pairs))
    end = own.special_ids["<|endoftext|>"]
    wanted = []
    for context, continuation in pairs:
        whole = own.encode(context + continuation)
        before = len(own.encode(context)) if context else 0
        both = (whole[:before], whole[before:]) if context else ([end], whole)
        wanted.append(oracle(tiny, *both))
    agree(found, wanted)
    assert {likeliest for _, likeliest in found} == {True, False}


def test_a_space_goes_to_the_continuation(tiny: Qwen, own: Tokenizer) -> None:
    """As the harness has it for all models: a context's last spaces begin the continuation's first token."""
    (found,) = harness(tiny, own).loglikelihood(
        requests("loglikelihood", ("The capital of Norway is ", "Oslo"))
    )
    agree([found], [oracle(tiny, own.encode("The capital of Norway is"), own.encode(" Oslo"))])


def test_long_contexts_lose_their_beginning(tiny: Qwen, own: Tokenizer) -> None:
    context = "7+8=15\n" * 30 + "The capital of Norway is"
    adapter = harness(tiny, own, max_length=50)
    found = adapter.loglikelihood(requests("loglikelihood", (context, " Oslo"), ("7+8=", "15")))
    answer = own.encode(" Oslo")
    wanted = oracle(tiny, own.encode(context)[len(answer) - 50 :], answer)
    agree(found, [wanted, oracle(tiny, own.encode("7+8="), own.encode("15"))])
    assert adapter.truncated == 1
    with pytest.raises(ValueError, match="a continuation of 60 tokens leaves no room"):
        adapter.loglikelihood(requests("loglikelihood", ("7", "5" * 60)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rolling_windows(tiny: Qwen, own: Tokenizer, batch_size: int) -> None:
    """The first begins with <|endoftext|>, the others with the token before; each token counts once."""
    texts = ["The capital of Norway is Oslo.\n" * 9, "7+8=15\n", "x"]
    adapter = harness(tiny, own, max_length=20, batch_size=batch_size)
    found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for ours, text in zip(found, texts, strict=True):
        ids = [own.special_ids["<|endoftext|>"], *own.encode(text)]
        total, done = 0.0, 1
        while done < len(ids):
            end = min(done + 19, len(ids))
            start = max(end - 20, 0)  # the last window is filled up from the left
            total += oracle(tiny, ids[start:done], ids[done:end])[0]
            done = end
        assert ours == pytest.approx(total, abs=1e-10)


def test_a_token_across_the_border_is_encoded_in_two_parts(tiny: Qwen, own: Tokenizer) -> None:
    """冰岛的首 and 都 end in one token together, and a continuation of none would be certain."""
    (joined,) = own.encode("的首都是")
    assert joined
    adapter = harness(tiny, own)
    pairs = [("冰岛的首", "都是"), ("冰岛的首", "府"), ("  ", "x")]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs))
    agree(found, [oracle(tiny, own.encode(before), own.encode(after)) for before, after in pairs])
    assert adapter.apart >= 2
    with pytest.raises(ValueError, match="an empty continuation behind '7\\+8='"):
        adapter.loglikelihood(requests("loglikelihood", ("7+8=", "")))


def test_a_failed_request_does_no_harm(tiny: Qwen, own: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = harness(tiny, own)
    asked = requests(
        "loglikelihood", ("The capital of Norway is", " Oslo"), ("The capital of Norway is", " Buenos Aires")
    )
    judged, calls = scoring._judged, []

    def fails(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return judged(*arguments)

    monkeypatch.setattr(scoring, "_judged", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        adapter.loglikelihood(asked)
    longer = [("The capital of Norway is Oslo", "."), ("The capital of Norway is Oslo", ".\n")]
    found = adapter.loglikelihood(requests("loglikelihood", *longer))
    agree(found, [oracle(tiny, own.encode(a), own.encode(b)) for a, b in longer])


# Generation


def test_texts_are_those_of_greedy_generation(tiny: Qwen, own: Tokenizer) -> None:
    contexts = ["7+8=", "冰岛的首都是", "The capital of Norway is", "3+3=6\n4+4="]
    settings = {"until": ["\n"], "max_gen_toks": 12}
    adapter = harness(tiny, own, batch_size=3)
    found = adapter.generate_until(requests("generate_until", *((text, settings) for text in contexts)))
    end = own.special_ids["<|endoftext|>"]
    for ours, context in zip(found, contexts, strict=True):
        steps = generate(tiny, own.encode(context), max_new_tokens=12, stop_ids=[end])
        wanted = own.decode([step.token for step in steps if step.token != end]).split("\n")[0]
        assert ours == wanted
    assert found[0] == "15"


def test_every_request_has_its_own_settings(tiny: Qwen, own: Tokenizer, capsys: pytest.CaptureFixture):
    adapter = harness(tiny, own)
    found = adapter.generate_until(
        requests(
            "generate_until",
            ("7+8=", {"until": ["5"]}),
            ("7+8=", {"until": "\n", "max_gen_toks": 1}),
            ("", {"until": [""], "max_gen_toks": 2, "num_beams": 1}),
            ("1, 2, 3, 4,", {"until": ["9, 10"], "max_gen_toks": 60}),
        )
    )
    assert found[:2] == ["1", "1"]
    assert found[2]
    assert found[3] == " 5, 6, 7, 8, "
    assert "note: left out of a task's generation settings: num_beams" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 8])
def test_sampling_is_seeded(tiny: Qwen, own: Tokenizer, batch_size: int) -> None:
    settings = {"until": ["\n"], "do_sample": True, "temperature": 3.0, "max_gen_toks": 20}
    asked = [("The", settings), ("The", settings)]
    found = [
        harness(tiny, own, batch_size=batch_size, seed=seed).generate_until(
            requests("generate_until", *asked)
        )
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_too_many_tokens_are_refused(tiny: Qwen, own: Tokenizer) -> None:
    for tokens in (0, 512):
        asked = requests("generate_until", ("7+8=", {"until": ["\n"], "max_gen_toks": tokens}))
        with pytest.raises(ValueError, match=f"max_gen_toks={tokens} must be from 1 to 511"):
            harness(tiny, own).generate_until(asked)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": "many"}, "top_k='many' in a task's"),
        ({"until": [7]}, "stop_texts must be a list of texts; 7"),
    ],
)
def test_settings_of_another_kind_are_refused(
    tiny: Qwen, own: Tokenizer, settings: dict[str, object], said: str
) -> None:
    asked = requests("generate_until", ("7+8=", {"until": ["5"], "max_gen_toks": 2, **settings}))
    with pytest.raises(InputError, match=said):
        harness(tiny, own).generate_until(asked)


# Chat


@pytest.mark.parametrize(
    ("system", "history", "query"),
    [
        ("You are a helpful assistant.", [], "hi"),
        ("Be short.\n", [("7+8=", "15"), ("", " ")], "冰岛的首都是哪里？"),
        ("<|im_start|>system", [("<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>")], "<|im_end|>"),
        ("x", [], "<|im_start|>\ufdd1 e\u0301 \n\n"),
    ],
)
def test_chats_have_the_ids_of_build_context(
    tiny: Qwen, own: Tokenizer, system: str, history: list[tuple[str, str]], query: str
) -> None:
    adapter = harness(tiny, own)
    messages = [{"role": "system", "content": system}]
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": query})
    wanted = build_context(own, query, history, system, max_window_size=10**6)
    assert adapter.tok_encode(adapter.apply_chat_template(messages)) == wanted
    if system == "You are a helpful assistant.":  # which stands there when nobody says another
        assert adapter.tok_encode(adapter.apply_chat_template(messages[1:])) == wanted


def test_an_answer_begun_is_gone_on_with(tiny: Qwen, own: Tokenizer) -> None:
    adapter = harness(tiny, own)
    messages = [{"role": "user", "content": "7+8="}, {"role": "assistant", "content": "1"}]
    text = adapter.apply_chat_template(messages, add_generation_prompt=False)
    assert adapter.tok_encode(text) == build_context(own, "7+8=") + own.encode("1")


def test_without_chat_no_special_token_is_read(tiny: Qwen, own: Tokenizer) -> None:
    adapter = harness(tiny, own)
    adapter.apply_chat_template([{"role": "user", "content": "hi"}])  # a chat before changes nothing
    assert adapter.tok_encode("<|im_end|>") == own.encode("<|im_end|>")
    assert max(adapter.tok_encode("<|im_start|>user\n<|endoftext|>")) < min(own.special_ids.values())


# The command, with the project's own tasks


def results(done: Result) -> dict[str, dict]:
    assert done.code == 0, done.err
    return json.loads(done.out)["results"]


@pytest.mark.parametrize("shots", [0, 5])
def test_the_tiny_checkpoint_answers_its_tasks(cli: Run, shots: int) -> None:
    done = cli("--tasks", TASKS, "--num-fewshot", shots, "--json")
    found = results(done)
    assert found["tiny_capitals"]["acc,none"] == found["tiny_capitals"]["acc_norm,none"] == 1.0
    assert found["tiny_sums"]["exact_match,strict-match"] == 1.0
    assert json.loads(done.out)["n-shot"] == dict.fromkeys(found, shots)


def test_chat_questions_are_asked_in_chatml(cli: Run) -> None:
    options = ("--tasks", TASKS / "tiny_chinese_capitals.yaml", "--limit", "20", "--json")
    plain = results(cli(*options))["tiny_chinese_capitals"]["acc,none"]
    assert results(cli(*options, "--apply-chat-template"))["tiny_chinese_capitals"]["acc,none"] == 1.0
    assert plain < 1.0  # learnt as chat alone


LETTERS = """\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
    dev: {folder}/examples.jsonl
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
description: "Choose.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\nC. {{{{C}}}}\\nD. {{{{D}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Tasks in the letters of MMLU and C-Eval, beyond what the tiny checkpoint knows."""
    rows = [json.loads(line) for line in (TASKS / "chinese_capitals.jsonl").read_text("utf-8").splitlines()]
    for name, part in (("examples", rows[:3]), ("questions", rows[3:13])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = tmp_path / "letters.yaml"
    path.write_text(LETTERS.format(folder=tmp_path), encoding="utf-8")
    return path


@pytest.mark.parametrize("shots", [0, 3])
def test_letters_are_scored_behind_the_prompt_as_written(
    cli: Run, letters: Path, tiny: Qwen, own: Tokenizer, shots: int
) -> None:
    output = letters.parent / "results.json"
    done = cli("--tasks", letters, "--num-fewshot", shots, "--dtype", "float64", "--json", "--output", output)
    accuracy = results(done)["letters"]["acc,none"]
    rows = {
        name: [
            json.loads(line) for line in (letters.parent / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        for name in ("examples", "questions")
    }

    def asked(row: dict[str, str]) -> str:
        choices = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
        return f"{row['question']}\n{choices}Answer:"

    before = "Choose.\n\n" + "".join(f"{asked(row)} {row['answer']}\n\n" for row in rows["examples"][:shots])
    right = 0
    samples = json.loads(output.read_text("utf-8"))["samples"]["letters"]
    for row, sample in zip(rows["questions"], samples, strict=True):
        context = own.encode(before + asked(row))
        scores = [oracle(tiny, context, own.encode(f" {letter}"))[0] for letter in "ABCD"]
        assert [logprob for logprob, _ in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-10)
        right += "ABCD"[scores.index(max(scores))] == row["answer"]
    assert accuracy == pytest.approx(right / 10)
    assert not list(letters.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("zip() argument 2 is longer"), 70, "this is a fault of qwen_ref"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
            2,
            "error: too little memory: 1,0",
        ),
        (InputError("not so"), 2, "error: running "),
    ],
)
def test_whose_error_it_is(
    cli: Run, letters: Path, error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(scoring, "whole_numbers", fail)  # called by the model, which the harness calls
    done = cli("--tasks", letters, "--limit", "1")
    assert done.code == code
    assert said in done.err.splitlines()[-1]


def test_an_error_of_the_harness_is_the_tasks(cli: Run, letters: Path) -> None:
    letters.write_text(letters.read_text("utf-8").replace("index(answer)", "index(nosuch)"), "utf-8")
    done = cli("--tasks", letters, "--limit", "1")
    assert (done.code, "Traceback" in done.err) == (2, False)


def test_word_perplexity_of_a_text(cli: Run, tmp_path: Path, tiny: Qwen, own: Tokenizer) -> None:
    text = "The capital of Norway is Oslo.\n7+8=15\n"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "rolling.yaml").write_text(
        "task: rolling\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/text.jsonl}}}}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    done = cli("--tasks", tmp_path / "rolling.yaml", "--dtype", "float64", "--json")
    total, _ = oracle(tiny, [own.special_ids["<|endoftext|>"]], own.encode(text))
    wanted = math.exp(-total / len(text.encode()))
    assert results(done)["rolling"]["byte_perplexity,none"] == pytest.approx(wanted, rel=1e-10)


def test_tasks_by_name_and_by_folder(cli: Run, letters: Path) -> None:
    by_name = cli("--tasks", "let*", "--include-path", letters.parent, "--limit", "2", "--json")
    by_folder = cli("--tasks", letters.parent, "--limit", "2", "--json")
    assert results(by_name) == results(by_folder)
    assert results(by_name)["letters"]["sample_len"] == 2


@pytest.fixture
def beside(letters: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is called like a task, in the working directory; another task is in it."""
    folder = letters.parent / "work" / "letters"
    folder.mkdir(parents=True)
    task = letters.read_text("utf-8").replace("task: letters", "task: of_the_folder")
    (folder / "it.yaml").write_text(task, encoding="utf-8")
    monkeypatch.chdir(folder.parent)
    return folder


def test_a_task_wins_over_the_folder_of_its_name(cli: Run, letters: Path, beside: Path) -> None:
    done = cli("--tasks", "letters", "--include-path", letters.parent, "--limit", "1", "--json")
    assert set(results(done)) == {"letters"}
    said = "qwen_ref: note: letters is a task of the harness; --tasks ./letters takes the folder of this name"
    assert said in done.err.splitlines()


@pytest.mark.parametrize("name", ["./letters", "letters/"])
def test_a_slash_means_the_folder(cli: Run, letters: Path, beside: Path, name: str) -> None:
    done = cli("--tasks", name, "--include-path", letters.parent, "--limit", "1", "--json")
    assert set(results(done)) == {"of_the_folder"}


def test_a_folder_whose_name_is_no_task_needs_no_slash(cli: Run, letters: Path, beside: Path) -> None:
    """Also where it holds a group, whose parts the harness has to find."""
    folder = beside.rename(beside.with_name("no_task"))
    done = cli("--tasks", "no_task", "--limit", "1", "--json")
    assert set(results(done)) == {"of_the_folder"}
    group = GROUP.replace("[letters, letters_too]", "[of_the_folder]")
    (folder / "group.yaml").write_text(group, encoding="utf-8")
    assert set(results(cli("--tasks", "no_task", "--limit", "1", "--json"))) == {
        "two_letters",
        "of_the_folder",
    }


GROUP = """\
group: two_letters
task: [letters, letters_too]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def test_groups_by_file_and_by_folder(cli: Run, letters: Path) -> None:
    too = letters.read_text("utf-8").replace("task: letters", "task: letters_too")
    letters.with_name("letters_too.yaml").write_text(too, encoding="utf-8")
    letters.with_name("alone.yaml").write_text(too.replace("letters_too", "alone"), encoding="utf-8")
    group = letters.with_name("group.yaml")
    group.write_text(GROUP, encoding="utf-8")
    by_file = cli("--tasks", group, "--limit", "3", "--json")
    assert set(results(by_file)) == {"two_letters", "letters", "letters_too"}
    by_folder = cli("--tasks", letters.parent, "--limit", "3", "--json")
    assert set(results(by_folder)) == {"two_letters", "letters", "letters_too", "alone"}
    assert results(by_folder)["two_letters"] == results(by_file)["two_letters"]


def test_what_is_no_number_is_null(cli: Run, letters: Path) -> None:
    (letters.parent / "none.py").write_text("def none(items):\n    return float('nan')\n", encoding="utf-8")
    task = letters.read_text("utf-8").replace("aggregation: mean", "aggregation: !function none.none")
    letters.write_text(task, encoding="utf-8")
    done = cli("--tasks", letters, "--limit", "2", "--json")
    assert results(done)["letters"]["acc,none"] is None
    assert "NaN" not in done.out


def test_either_engine_of_the_tokenizer_answers_alike(cli: Run, engine_options: list[str]) -> None:
    done = cli("--tasks", TASKS / "tiny_sums.yaml", "--limit", "4", "--json", *engine_options)
    assert results(done)["tiny_sums"]["exact_match,strict-match"] == 1.0


def test_the_table_alone_goes_to_stdout(cli: Run) -> None:
    done = cli("--tasks", TASKS / "tiny_sums.yaml", "--limit", "4")
    first, _, row, *rest = done.out.splitlines()
    assert first.startswith("|  Tasks  |Version|")
    assert row.startswith("|tiny_sums|")
    assert rest == []


def test_what_a_task_prints_is_no_result(cli: Run, letters: Path) -> None:
    (letters.parent / "noisy.py").write_text(
        "def answer(doc):\n    print('noise')\n    return 'ABCD'.index(doc['answer'])\n", encoding="utf-8"
    )
    lines = [
        "doc_to_target: !function noisy.answer" if line.startswith("doc_to_target") else line
        for line in letters.read_text("utf-8").splitlines()
    ]
    letters.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = cli("--tasks", letters, "--limit", "2", "--json")
    assert results(done)["letters"]["sample_len"] == 2
    assert "noise" in done.err


def test_the_system_message_and_the_settings_are_passed_on(cli: Run, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    cli("--tasks", TASKS / "tiny_sums.yaml", "--limit", "2", "--system", "Add.", "--gen-kwargs",
        "max_gen_toks=1", "--apply-chat-template", "--output", output,
    )  # fmt: skip
    for sample in json.loads(output.read_text("utf-8"))["samples"]["tiny_sums"]:
        assert "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n" in json.dumps(sample).replace(
            "\\n", "\n"
        )
        assert len(sample["resps"][0][0]) == 1


def test_the_tasks_are_what_their_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "make")
    import tiny_tasks

    for name, content in tiny_tasks.files().items():
        assert (TASKS / name).read_text(encoding="utf-8") == content


@pytest.mark.slow  # three processes that import the harness
def test_two_ranks_find_what_one_does(cli: Run) -> None:
    options = ["--tasks", str(TASKS), "--limit", "6", "--json"]
    found = results(python(*TORCHRUN, "2", "-m", "qwen_ref.evaluate", *options))
    assert found == results(cli(*options))


# The table of evaluate/README.md


def test_the_tasks_of_the_page_are_known_to_the_harness(index: TaskManager) -> None:
    page = (ROOT / "src" / "qwen_ref" / "evaluate" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\d)-shot \| `--tasks (\S+) --num-fewshot (\d)", page, re.MULTILINE)
    assert len(rows) == 9
    for _, shots, tasks, given in rows:
        assert shots == given
        assert all(index.match_tasks([task]) == [task] for task in tasks.split(","))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "tiny_nothing"], "the harness knows no task 'tiny_nothing'"),
        (["--tasks", "mmlu_anatmy"], "near: mmlu_anatomy"),
        (["--tasks", ","], "',' names no task"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml: no such task file"),
        (["--tasks", "./nowhere"], "error: ./nowhere: no such folder or task file"),
        (["--tasks", "tiny_sums,~/nowhere"], "error: ~/nowhere: no such folder or task file"),
        (["--tasks", "./weights"], "error: ./weights has no .yaml file with a task or a group"),
        (
            ["--tasks", "weights"],
            "the harness knows no task 'weights', and the folder weights has no .yaml file with a task",
        ),
        (["--tasks", "README.md"], "README.md: the name of a task file must end in .yaml"),
        (
            ["--tasks", "gsm8k", "--output", "nowhere/x.json"],
            "--output nowhere/x.json: cannot be written: there is no folder",
        ),
        (["--tasks", "gsm8k", "--output", "weights"], "--output weights: cannot be written: it is a folder"),
        (["--tasks", "gsm8k", "--limit", "inf"], "--limit inf must be a number above 0"),
        (["--tasks", "gsm8k", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
        (["--tasks", "gsm8k", "--num-fewshot", "-1"], "--num-fewshot -1 must be at least 0"),
        (["--tasks", "gsm8k", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--tasks", "gsm8k", "--max-length", "1"], "--max-length 1 must be at least 2"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit 0 must be a number above 0"),
        (["--tasks", "gsm8k", "--limit", "nan"], "--limit nan must be a number above 0"),
        (["--tasks", "gsm8k", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_line(cli: Run, options: list[str], message: str) -> None:
    assert message in refused(cli(*options))


def last_line(done: Result) -> str:
    """Behind the progress of the harness."""
    assert (done.code, done.out) == (2, "")
    line = done.err.splitlines()[-1]
    assert line.startswith("qwen_ref: error: ")
    assert "Traceback" not in done.err
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("questions.jsonl", "nowhere.jsonl"), "loading {path}: FileNotFoundError"),
        (("test_split: test", "test_split: other"), "loading {path}: KeyError: 'other'"),
        (("question.strip", "query.strip"), "loading {path}: UndefinedError: 'query' is undefined"),
        (("multiple_choice", "essay"), "Got invalid output_type 'essay'"),
        (("metric: acc", "metric: ["), "loading {path}: ParserError"),
    ],
)
def test_task_files_that_do_not_work_say_why(cli: Run, letters: Path, change: tuple[str, str], message: str):
    letters.write_text(letters.read_text("utf-8").replace(*change), encoding="utf-8")
    assert message.format(path=letters) in last_line(cli("--tasks", letters))


def test_data_that_is_no_json_says_so(cli: Run, letters: Path) -> None:
    (letters.parent / "questions.jsonl").write_text('{"question": ')
    assert "JSON parse error" in last_line(cli("--tasks", letters))


@pytest.mark.slow  # the harness reads all its tasks
def test_nothing_is_downloaded_unasked(tmp_path: Path) -> None:
    line = last_line(python("-m", "qwen_ref.evaluate", "--tasks", "gsm8k", HF_HOME=str(tmp_path)))
    assert "OfflineModeIsEnabled" in line
    assert line.endswith("fetch the data set first, or give --download")


def test_code_is_not_run_unasked(cli: Run, letters: Path) -> None:
    letters.write_text(letters.read_text("utf-8") + "unsafe_code: true\n", encoding="utf-8")
    assert "unsafe" in last_line(cli("--tasks", letters, "--limit", "1"))
    done = cli("--tasks", letters, "--limit", "1", "--run-unsafe-code", "--json")
    assert results(done)["letters"]["sample_len"] == 1


def test_a_missing_harness_names_what_brings_it(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused(cli("--tasks", "gsm8k"))
    assert "pip install 'qwen_ref[eval]'" in line


# What lies in the working directory


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another working directory, with programs that are called like metrics of the `evaluate` library."""
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])  # the library adds its folder of modules
    folder = tmp_path / "work"
    for name in ("code_eval", "bleu", "exact_match"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.py").write_text("open('was_run', 'w')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "asked", ["humaneval", "humaneval*", "mbpp", "longproc", "./group.yaml", "./code.yaml"]
)
def test_tasks_that_run_code_are_refused_before_any_load(cli: Run, work: Path, asked: str) -> None:
    """By name, wildcard, tag and group, and those of the user's."""
    (work / "group.yaml").write_text("group: a_group\ntask: [a_task]\n", encoding="utf-8")
    (work / "code.yaml").write_text("task: a_task\ndataset_path: x\nunsafe_code: true\n", encoding="utf-8")
    line = refused(cli("--tasks", asked))
    said = r"error: the task \S+( \(and \d+ more\))? runs programs that the model writes; --run-unsafe-code"
    assert re.search(said, line)
    assert not (work / "was_run").exists()


METRICS = {
    "hf_evaluate": ("metric: acc", "metric: exact_match\n    hf_evaluate: true"),
    "unknown to the harness": ("metric: acc", "metric: code_eval"),
    "load": ("metric: acc", "metric: !function loads.metric"),
}


@pytest.mark.parametrize("how", METRICS)
def test_no_metric_is_run_unasked(cli: Run, letters: Path, work: Path, how: str) -> None:
    letters.with_name("loads.py").write_text(
        "import evaluate\ntry:\n    metric = evaluate.load('bleu')\nexcept Exception:\n    metric = max\n",
        encoding="utf-8",
    )
    letters.write_text(letters.read_text("utf-8").replace(*METRICS[how]), encoding="utf-8")
    said = last_line(cli("--tasks", letters, "--limit", "1"))
    assert "is a program of the evaluate library" in said
    assert "--run-unsafe-code allows it" in said
    said = last_line(cli("--tasks", letters, "--limit", "1", "--run-unsafe-code"))
    assert "of the working directory would be run as a metric" in said
    assert not (work / "was_run").exists()


def test_a_metric_by_its_path_is_run_when_asked(cli: Run, letters: Path, work: Path) -> None:
    metric = ("metric: acc", "metric: ./bleu\n    hf_evaluate: true")
    letters.write_text(letters.read_text("utf-8").replace(*metric), encoding="utf-8")
    cli("--tasks", letters, "--limit", "1", "--run-unsafe-code")
    assert (work / "was_run").exists()


def test_a_metric_that_is_not_here_says_so(cli: Run, letters: Path, work: Path) -> None:
    (work / "bleu" / "bleu.py").unlink()
    metric = ("metric: acc", "metric: bleu\n    hf_evaluate: true")
    letters.write_text(letters.read_text("utf-8").replace(*metric), encoding="utf-8")
    said = last_line(cli("--tasks", letters, "--run-unsafe-code"))
    assert "the metric 'bleu' of the evaluate library is not on this machine" in said
    assert said.endswith("or give --download")


@pytest.mark.parametrize("task", ["hellaswag", "gsm8k", "graphwalks_128k"])
def test_no_folder_is_read_in_place_of_a_data_set(cli: Run, work: Path, task: str) -> None:
    """Also where a function of the task reads the data set."""
    for name in ("Rowan/hellaswag", "openai/gsm8k", "openai/graphwalks"):
        (work / name).mkdir(parents=True)
        (work / name / "validation.jsonl").write_text('{"question": "7+8=", "answer": "15"}\n')
    said = refused(cli("--tasks", task, "--limit", "1"))
    assert re.search(r"the folder \S+ of the working directory would be read in place of the data set", said)


@pytest.mark.parametrize("folder", ["questions", "./questions"])
def test_a_task_file_may_read_a_folder(cli: Run, letters: Path, work: Path, folder: str) -> None:
    (work / "questions").mkdir()
    for name, split in (("questions", "test"), ("examples", "validation")):
        (letters.parent / f"{name}.jsonl").rename(work / "questions" / f"{split}.jsonl")
    task = re.sub(
        r"dataset_path: json\n.*?\ntest_split",
        f"dataset_path: {folder}\ntest_split",
        letters.read_text("utf-8").replace("split: dev", "split: validation"),
        flags=re.DOTALL,
    )
    letters.write_text(task, encoding="utf-8")
    assert results(cli("--tasks", letters, "--limit", "1", "--json"))["letters"]["sample_len"] == 1


def test_the_projects_tasks_work_from_elsewhere(cli: Run, work: Path) -> None:
    found = results(cli("--tasks", TASKS, "--limit", "2", "--json"))
    assert set(found) == {"tiny_capitals", "tiny_chinese_capitals", "tiny_sums"}


def test_data_files_are_looked_for_here_first_and_then_beside_the_task(
    cli: Run, letters: Path, work: Path
) -> None:
    letters.write_text(letters.read_text("utf-8").replace(f"{letters.parent}/", ""), encoding="utf-8")
    beside = results(cli("--tasks", letters, "--json"))["letters"]["sample_len"]
    one = (letters.parent / "questions.jsonl").read_text("utf-8").splitlines()[0]
    (work / "questions.jsonl").write_text(one + "\n", encoding="utf-8")
    here = results(cli("--tasks", letters, "--json"))["letters"]["sample_len"]
    assert (beside, here) == (10, 1)
