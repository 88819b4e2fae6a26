"""The pages say what is there: links, files, targets, options, examples that run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from conftest import command as main_of
from run_pages import blocks, commands, link_checkpoints, pack_checkpoint, pages, saved_as

from qwen_ref.__main__ import COMMANDS

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
README = PAGES["README.md"]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES)
SUBCOMMANDS = ("qwen_ref.parity", "qwen_ref.checkpoint")
EXTRAS = ("lm_eval", "transformers", "matplotlib", "llama_cpp", "gguf")
DOCUMENTED = (
    *(
        "load_model",
        "Tokenizer",
        "generate",
        "generate_lookup",
        "fasten",
        "Int8Cache",
        "score",
        "HarnessModel",
    ),
    *("Conversation", "reply", "trace", "write_bundle", "record", "check", "diff", "diagnose", "RankLost"),
    "parity.make",
)
SEVEN = {"config", "tokenizer", "model", "parallel", "checkpoint", "sampling", "generate"}


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What a heading is linked by: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_links_lead_somewhere(page: str) -> None:
    """From the folder of the page; an anchor to a heading of the page that it leads to."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])) if "://" not in link]
    assert [link for link in links if not leads_somewhere(link, ROOT / page)] == []


def leads_somewhere(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))


def test_readme_links_to_every_page_of_the_package() -> None:
    for page in PAGES:
        assert not page.startswith("src/") or f"({page})" in README, page


def folders(of: Path) -> set[str]:
    """The folders in a folder that hold anything but what Python caches."""
    inside = [path for path in of.iterdir() if path.is_dir() and path.name[0] not in "._"]
    return {path.name for path in inside if any(file.suffix != ".pyc" for file in path.rglob("*.*"))}


def test_the_map_has_every_folder_and_the_seven() -> None:
    (block,) = re.findall(r"^## Map\n+((?:    .*\n)+)", README, re.MULTILINE)
    rooms: dict[str, set[str]] = {}
    for indent, name in re.findall(r"^    ( *)([\w/.]+)", block, re.MULTILINE):
        if not indent:
            inside = rooms.setdefault(name.rstrip("/"), set())
        else:
            inside.add(name.rstrip("/"))
    assert rooms["src/qwen_ref"] == {f"{name}.py" for name in SEVEN} | folders(ROOT / "src" / "qwen_ref")
    assert rooms["examples"] == folders(ROOT / "examples")
    assert set(rooms) - {"src/qwen_ref"} == folders(ROOT) - {"src", "build", "dist", "shared"}


@EVERY_PAGE
def test_targets_of_make_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", PAGES[page])) <= targets


def test_every_command_is_documented() -> None:
    for name in COMMANDS:
        assert any(f"python -m qwen_ref.{name}" in page for page in PAGES.values()), name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_documented(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page) for page in PAGES.values())


def test_commands_are_found_whole() -> None:
    page = "```sh\necho 'a\nb' \\\n c\nls\n```\n```text\n$ no\n```\n```console\n$ echo 1\n1\n$ echo 2\n```\n"
    assert commands(page) == ["echo 'a\nb' \\\n c", "ls", "echo 1", "echo 2"]
    with pytest.raises(ValueError, match="line 2: a command without its end"):
        commands("```sh\necho 'a\n```\n")


@EVERY_PAGE
def test_commands_name_what_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`make readme` runs them; here their programs and options are looked up."""
    programs = r"`((?:\.venv/bin/)?(?:python|torchrun) [^`]*(?:-m qwen_ref|examples/|tests/)[^`]*)`"
    inline = re.findall(programs, prose(PAGES[page]))
    for command in [*commands(PAGES[page]), *inline]:
        words = shlex.split(command, comments=True)
        for number, word in enumerate(words):
            if word == "-m" and words[number + 1].startswith("qwen_ref."):
                options = [each for each in words[number + 2 :] if re.fullmatch(r"--[a-z-]+", each)]
                sub = words[number + 2 : number + 3] if words[number + 1] in SUBCOMMANDS else []
                with pytest.raises(SystemExit, match="0"):
                    main_of(words[number + 1].removeprefix("qwen_ref."))([*sub, "--help"])
                known = capsys.readouterr().out
                assert [each for each in options if each not in known] == [], command
            elif word.startswith(("examples/", "tests/")) and word.endswith(".py"):
                assert (ROOT / word).is_file(), command


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader would, on the tiny checkpoint under the names of the published ones."""
    link_checkpoints(tmp_path)
    if any("-Int4" in block.text for block in blocks(PAGES[page]) if block.kind == "python"):
        pack_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(PAGES[page]):
        if block.kind != "python" or saved_as(block):
            continue
        for extra in EXTRAS:
            if extra in block.text:
                pytest.importorskip(extra)
        text = block.text.replace('device="cuda"', 'device="cpu"').replace(', group="world"', "")
        exec(compile(text, f"{page}, line {block.line}", "exec"), names)
