"""The README says what is there: links, files, targets, options, and examples that run."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, WEIGHTS
from conftest import command as main_of

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("run_readme")
    finally:
        sys.path.remove(str(ROOT / "examples"))


def anchors(page: str) -> set[str]:
    """What a heading is linked by: lower case, no punctuation, hyphens for spaces."""
    outside = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGE)
    assert len(links) > 15
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors(PAGE), link
        elif "://" not in link:
            assert (ROOT / link.partition("#")[0]).exists(), link


def test_the_tree_has_every_module() -> None:
    (tree,) = re.findall(r"^    src/qwen_ref/\n(.*?)^    weights/", PAGE, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"^      ([\w/.]+) {2,}", tree, re.MULTILINE))
    package = ROOT / "src" / "qwen_ref"
    there = {path.name for path in package.glob("*.py") if not path.name.startswith("__")} | {"parity/"}
    assert named == there


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", PAGE))
    assert {"run", "test", "bench", "readme"} <= named <= targets


def test_commands_are_found_whole(runner: ModuleType) -> None:
    page = "```sh\necho 'a\nb' \\\n c\nls\n```\n```text\n$ no\n```\n```console\n$ echo 1\n1\n$ echo 2\n```\n"
    assert runner.commands(page) == ["echo 'a\nb' \\\n c", "ls", "echo 1", "echo 2"]
    with pytest.raises(ValueError, match="line 2: a command without its end"):
        runner.commands("```sh\necho 'a\n```\n")


def test_commands_name_what_exists(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """`make readme` runs them; here their programs and options are looked up."""
    prose = "".join(PAGE.split("```")[::2])
    inline = re.findall(r"`((?:\.venv/bin/)?python (?:-m qwen_ref|examples/|tests/)[^`]*)`", prose)
    found = [*runner.commands(PAGE), *inline]
    assert len(found) > 40
    for command in found:
        words = shlex.split(command, comments=True)
        for number, word in enumerate(words):
            if word == "-m" and words[number + 1].startswith("qwen_ref"):
                options = [each for each in words[number + 2 :] if re.fullmatch(r"--[a-z-]+", each)]
                sub = words[number + 2 : number + 3] if words[number + 1] in SUBCOMMANDS else []
                with pytest.raises(SystemExit, match="0"):
                    main_of(words[number + 1].removeprefix("qwen_ref."))([*sub, "--help"])
                known = capsys.readouterr().out
                assert [each for each in options if each not in known] == [], command
            elif word.startswith(("examples/", "tests/")) and word.endswith(".py"):
                assert (ROOT / word).is_file(), command


SUBCOMMANDS = ("qwen_ref.parity", "qwen_ref.checkpoint")


def test_python_examples_run(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader would, on the tiny checkpoint under the names of the published ones."""
    for name in runner.PLAIN:
        (tmp_path / name).symlink_to(WEIGHTS)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = [block for block in runner.blocks(PAGE) if block.kind == "python"]
    assert len(examples) >= 6
    for block in examples:
        text = block.text.replace('device="cuda"', 'device="cpu"').replace(', group="world"', "")
        exec(compile(text, f"README.md, line {block.line}", "exec"), names)
