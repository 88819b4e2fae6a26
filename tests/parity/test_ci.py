"""`--junit` and `--github`: what a CI system reads of check, diff and diagnose is what the report says."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import GOLDEN, cli_of, refused
from torch import Tensor

from qwen_ref import parity
from qwen_ref.parity import diagnosis as diagnosis_module
from qwen_ref.parity.__main__ import main
from qwen_ref.parity.ci import github_lines, write_junit
from qwen_ref.parity.forward import Change, Forward, Weights
from qwen_ref.parity.stages import Checkpoint

cli = cli_of(main)
NTK = GOLDEN / "ntk_logn"
IDS = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(11))
ANNOTATION = re.compile(r"::(error|warning|notice) title=([^:,\r\n]*)::([^\r\n]*)")


NO_ROPE = [Change(step, lambda run, right, x, cos, sin: x) for step in ("rotate_q", "rotate_k")]


def written(out: Path, changes: Sequence[Change] = (), only: list[str] | None = None) -> Path:
    """The bundle of a port in float32, with a mistake or none."""
    kept: dict[str, Tensor] = {}
    run = Forward(Weights(Checkpoint(NTK), torch.float32), IDS, changes=changes)
    run.run(lambda stage, value, start: kept.update({stage: value}), only)
    parity.write_bundle(out, IDS, kept, dtype="float32")
    return out


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    parity.record(NTK, IDS, tmp_path / "truth.safetensors", rounding=["float32"])
    return tmp_path / "truth.safetensors"


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    return written(tmp_path / "wrong.safetensors", NO_ROPE)


def unescaped(text: str) -> str:
    """As GitHub does it: the percent sign comes last, or %250A would become a line end."""
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(code, character)
    return text


def annotations(output: str) -> list[tuple[str, str, str]]:
    """Level, title and message of each annotation; they stand before the report."""
    lines = output.splitlines()
    found = []
    while lines and lines[0].startswith("::"):
        match = ANNOTATION.fullmatch(lines.pop(0))
        assert match is not None
        found.append((match[1], unescaped(match[2]), unescaped(match[3])))
    assert not any(line.startswith("::") for line in lines)
    assert lines  # the report
    return found


def cases(file: Path) -> list[ElementTree.Element]:
    """The testcases of a JUnit file, whose counts are theirs."""
    root = ElementTree.fromstring(file.read_bytes())
    (suite,) = root
    found = suite.findall("testcase")
    failed = [case for case in found if case.find("failure") is not None]
    assert root.tag == "testsuites"
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures")) == (str(len(found)), str(len(failed)))
        assert (element.get("errors"), element.get("skipped")) == ("0", "0")
    return found


# JUnit


def test_each_stage_is_a_testcase(cli: Callable, tmp_path: Path, truth: Path) -> None:
    port = written(tmp_path / "port.safetensors")
    result = cli("diff", truth, port, "--junit", tmp_path / "out.xml")
    assert result.code == 0
    assert result.out == cli("diff", truth, port).out  # the report is the same
    found = cases(tmp_path / "out.xml")
    assert [case.get("name") for case in found] == parity.read_bundle(truth).stages
    places = {case.get("name"): case.get("classname") for case in found}
    assert places["embed"] == places["norm"] == places["logits"] == "port"
    assert places["blocks.1.attn.q"] == "port.blocks.1"
    assert [case for case in found if len(case)] == []


def test_a_stage_beyond_tolerance_is_a_failure(cli: Callable, tmp_path: Path, truth: Path, wrong: Path):
    result = cli("diff", truth, wrong, "--junit", tmp_path / "out.xml")
    assert result.code == 1
    failures = {case.get("name"): case.find("failure") for case in cases(tmp_path / "out.xml")}
    compared = parity.diff(truth, wrong)
    assert [stage for stage, failure in failures.items() if failure is not None] == [
        stage.stage for stage in compared.stages if not stage.within
    ]
    first = compared.first_beyond
    assert first.stage == "blocks.0.attn.q_rotated"
    failure = failures[first.stage]
    assert failure.get("message") == (
        f"relative RMS {first.relative_rms:.2e}, tolerance {first.tolerance:.2e}; "
        f"worst position {first.worst_position} of row 0: {first.worst:.2e}, "
        f"tolerance {first.worst_tolerance:.2e}"
    )
    assert failure.get("type") == "beyond tolerance"
    assert "look at the rotation of queries in layer 0" in failure.text


def test_check_writes_it_as_well(cli: Callable, tmp_path: Path, wrong: Path) -> None:
    result = cli("check", "--model", NTK, "--golden", wrong, "--junit", tmp_path / "out.xml", "--github")
    assert result.code == 1
    found = cases(tmp_path / "out.xml")
    assert found[0].get("classname") == "wrong"
    assert found[0].find("failure") is None
    assert annotations(result.out)[0][:2] == (
        "error",
        "parity check: first stage beyond tolerance: blocks.0.attn.q_rotated",
    )


def test_a_diagnosis_is_one_testcase(cli: Callable, tmp_path: Path) -> None:
    port = written(tmp_path / "port.safetensors", NO_ROPE, ["logits"])
    result = cli("diagnose", "--model", NTK, "--bundle", port, "--junit", tmp_path / "out.xml", "--github")
    assert result.code == 1
    (case,) = cases(tmp_path / "out.xml")
    assert (case.get("classname"), case.get("name")) == ("port", "diagnose")
    failure = case.find("failure")
    assert (failure.get("type"), failure.get("message")) == ("mistake", "mistake: no RoPE")
    assert "second best" in failure.text
    (level, title, message), (warning, _, note) = annotations(result.out)
    assert (level, title) == ("error", "parity diagnose: mistake: no RoPE")
    assert message.splitlines() == failure.text.splitlines()
    assert (warning, "no weights_sha256" in note) == ("warning", True)


def test_a_right_port_passes(cli: Callable, tmp_path: Path, truth: Path) -> None:
    result = cli("diagnose", "--model", NTK, "--bundle", truth, "--junit", tmp_path / "out.xml", "--github")
    assert result.code == 0
    (case,) = cases(tmp_path / "out.xml")
    assert len(case) == 0
    (annotation,) = annotations(result.out)
    assert annotation[:2] == ("notice", "parity diagnose: rounding only")


@pytest.mark.parametrize(
    ("verdict", "code", "level"), [("choice", 0, "notice"), ("none of these", 1, "error")]
)
def test_other_verdicts(
    cli: Callable,
    tmp_path: Path,
    truth: Path,
    monkeypatch: pytest.MonkeyPatch,
    verdict: str,
    code: int,
    level: str,
) -> None:
    """A choice is a deliberate rounding: it is found, and it is no failure."""
    real = parity.diagnose(NTK, truth)
    found = ("int8 KV cache",) if verdict == "choice" else ()
    given = replace(real, verdict=verdict, found=found, first_divergence="blocks.1.attn.q")
    monkeypatch.setattr(diagnosis_module, "diagnose", lambda *_: given)
    result = cli("diagnose", "--model", NTK, "--bundle", truth, "--junit", tmp_path / "out.xml", "--github")
    assert result.code == code
    (case,) = cases(tmp_path / "out.xml")
    assert len(case) == code
    title = annotations(result.out)[0][1].removeprefix("parity diagnose: ")
    wanted = {
        "choice": "choice: int8 KV cache",
        "none of these": "none of these; first divergence at blocks.1.attn.q",
    }
    assert title == wanted[verdict]
    assert annotations(result.out)[0][0] == level


def test_what_xml_cannot_hold_is_left_out(tmp_path: Path, truth: Path, wrong: Path) -> None:
    """A bundle's name may hold control characters, bytes that are no characters, and markup."""
    ugly = '<a> & "b" \x00\x1b[31m\ud800\udcff\ufffe ]]>冰'
    compared = replace(parity.diff(truth, wrong), judged=ugly, notes=[ugly])
    write_junit(tmp_path / "out.xml", compared, "diff", Path(f"{ugly}.safetensors"))
    found = cases(tmp_path / "out.xml")
    shown = '<a> & "b" \\x00\\x1b[31m\\ud800\\udcff\\ufffe ]]>冰'
    assert found[0].get("classname") == shown
    values = {p.get("name"): p.get("value") for p in ElementTree.parse(tmp_path / "out.xml").iter("property")}
    assert (values["judged"], values["note"]) == (f"{shown} (float32)", shown)


def test_a_file_that_is_there_is_replaced_as_a_whole(cli: Callable, tmp_path: Path, truth: Path) -> None:
    out = tmp_path / "out.xml"
    out.write_text("<old/>" * 10_000)
    assert cli("diff", truth, truth, "--junit", out).code == 0
    assert len(cases(out)) == len(parity.read_bundle(truth).stages)
    assert sorted(os.listdir(tmp_path)) == ["out.xml", "truth.safetensors"]


# GitHub


def test_the_first_stage_beyond_tolerance_is_an_error(cli: Callable, truth: Path, wrong: Path) -> None:
    result = cli("diff", truth, wrong, "--github")
    assert result.code == 1
    error, warning = annotations(result.out)
    compared = parity.diff(truth, wrong)
    assert error[:2] == ("error", "parity diff: first stage beyond tolerance: blocks.0.attn.q_rotated")
    lines = error[2].splitlines()
    assert lines[0].startswith(f"relative RMS {compared.first_beyond.relative_rms:.2e}, tolerance ")
    beyond = sum(not stage.within for stage in compared.stages)
    assert lines[-1] == f"{beyond} of {len(compared.stages)} stages are beyond tolerance"
    assert warning[0] == "warning"
    assert result.out.endswith(cli("diff", truth, wrong).out)  # the ordinary report follows


def test_within_tolerance_is_a_notice(cli: Callable, truth: Path) -> None:
    result = cli("diff", truth, truth, "--github")
    assert result.code == 0
    (found,) = annotations(result.out)
    assert found[:2] == ("notice", "parity diff: within tolerance")


def test_logits_alone_are_no_warning(cli: Callable, tmp_path: Path, truth: Path) -> None:
    """Each run of a port that writes no other stage would have it."""
    parity.record(NTK, IDS, tmp_path / "port", dtype="float32", stages="logits", rounding=[])
    ((level, _, message),) = annotations(cli("diff", truth, tmp_path / "port", "--github").out)
    assert level == "notice"
    assert "only " in message.splitlines()[1]
    assert "truth.safetensors has embed, " in message


def test_estimated_tolerances_are_a_warning(cli: Callable, tmp_path: Path) -> None:
    parity.record(NTK, IDS, tmp_path / "bare", rounding=[])
    notice, warning = annotations(cli("diff", tmp_path / "bare", tmp_path / "bare", "--github").out)
    assert (notice[0], warning[0]) == ("notice", "warning")
    assert "was not measured but estimated" in warning[2]


def test_a_workflow_command_stays_one_line(truth: Path, wrong: Path) -> None:
    """Nothing in a name or a note ends the command, or begins another."""
    note = "100%: a\r\n::error::b %0A, c\x1b"
    compared = replace(parity.diff(truth, wrong), notes=[note])
    lines = list(github_lines(compared, "diff"))
    assert lines[1] == "::warning title=parity diff%3A note::100%25: a%0D%0A::error::b %250A, c\\x1b"
    assert unescaped(lines[1].rpartition("note::")[2]).startswith("100%: a\r\n::error::b")
    found = parity.diagnose(NTK, wrong)
    (error, *_) = github_lines(replace(found, found=("50%: a, b\r\nc",)), "diagnose")
    assert error.startswith("::error title=parity diagnose%3A mistake%3A 50%25%3A a%2C b  c::")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("diff", "TRUTH", "TRUTH", "--junit", "none/out.xml"), "--junit none/out.xml: cannot be written"),
        (("check", "--model", str(NTK), "--golden", "TRUTH", "--junit", "."), "it is a folder"),
        (("diagnose", "--model", str(NTK), "--bundle", "TRUTH", "--junit", ""), "the path is empty"),
        (("diff", "TRUTH", "TRUTH", "--junit", "TRUTH"), "which would be lost"),
        (("diff", "TRUTH", "TRUTH", "--junit", "a", "--plot", "./a"), "both name a; give two names"),
        (("diff", "TRUTH", "TRUTH", "--github", "--json"), "not allowed with argument"),
        (("diff", "TRUTH", "none", "--junit", "out.xml", "--github"), "none: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cli: Callable, tmp_path: Path, truth: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = truth.read_bytes()
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert said in refused(cli(*(truth if argument == "TRUTH" else argument for argument in arguments)))
    assert os.listdir(tmp_path) == ["truth.safetensors"]
    assert truth.read_bytes() == before
