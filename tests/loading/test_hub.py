"""A model is found by its name in the caches, as their own tools leave them; a download is asked for."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forked_ranks
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, Result, Run, command, python, refused
from golden_folders import INDEX, SHARDS

from qwen_ref import InputError, Tokenizer, load_model, parity
from qwen_ref.loading.hub import (
    CONFIG,
    FILES,
    TEXT,
    fetch_model,
    find_model,
    hugging_face_cache,
    model_name,
    repository,
)
from qwen_ref.trace import trace

NAME, CHAT = "Qwen/Qwen-1_8B", "Qwen/Qwen-1_8B-Chat"
COMMITS = ("fa6e214ccbbc6a55235c26ef406355b6bfdf5eed", "fa6e0000cbbc6a55235c26ef406355b6bfdf5eed", "0" * 40)
SHARDED = GOLDEN / "extended_base"
QUESTION, ANSWER = "冰岛的首都是", "雷克雅未克（Reykjavik）"
ONE_LINE = ("--stop", "\n")
FETCH = (
    f"hf download {NAME} config.json generation_config.json qwen.tiktoken quantize_config.json "
    '"*.safetensors" "*.safetensors.index.json"'
)
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "MODELSCOPE_CACHE")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without anything, and the current folder in it: no test sees the caches of this machine."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """To import huggingface_hub fails: nothing but a download may. A test of one puts a stand-in there."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.fixture
def cache(home: Path) -> Path:
    return home / ".cache" / "huggingface" / "hub"


def cached(
    cache: Path, source: Path = WEIGHTS, commit: str = COMMITS[0], ref: str | None = "main", name: str = NAME
) -> Path:
    """A snapshot as huggingface_hub leaves it: links to blobs, which are named by their hashes."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in source.iterdir():
        if any(file.match(pattern) for pattern in FILES) and file.name != "golden.safetensors":
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            if not blob.exists():
                shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    if ref is not None:
        reference = root / "refs" / ref
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return snapshot


def refusal(model: str | Path, revision: str | None = None, **how: str) -> str:
    with pytest.raises(InputError) as caught:
        find_model(model, revision, **how)
    (line,) = str(caught.value).splitlines()
    return line


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(
            (each, NAME)
            for each in (NAME + "/", "Qwen-1_8B/", "qwen/qwen-1_8b", "Qwen-1.8B", "Qwen/Qwen-1.8B")
        ),
        *(("qwen-7b", "Qwen/Qwen-7B"), ("Qwen-72B-Chat-int4", "Qwen/Qwen-72B-Chat-Int4")),
        *((f"https://hub/{each}", NAME) for each in (NAME, NAME + "/", NAME + "/tree/main")),
        *((f"https://hub/{each}", None) for each in (NAME + "/tree/v1", "Qwen", "")),
        ("https://hub/models/mine/x", "mine/x"),
        *((NAME, NAME), ("a.b/c-d_e.f", "a.b/c-d_e.f"), ("Qwen-72B-Chat-Int4", "Qwen/Qwen-72B-Chat-Int4")),
        *(
            (each, None)
            for each in ("missing", "Qwen-9B", "Qwen-1_8B-mine", "./a/b", "/a/b", "../b", "a/b/c")
        ),
        *((each, None) for each in ("", "a/", "a/.b", "a--b/c", "a/b..c", "a/b\0", "冰/岛", "x/" + "y" * 96)),
    ],
)
def test_a_name_is_told_from_a_path(text: str, name: str | None) -> None:
    assert repository(text) == name


def test_a_path_object_may_hold_a_name() -> None:
    assert repository(Path(NAME)) == NAME


# Hugging Face's cache


@pytest.mark.parametrize("model", [NAME, Path(NAME), "Qwen-1_8B", "qwen/Qwen-1_8B"])
def test_the_snapshot_of_main_is_taken_and_named(model: str | Path, cache: Path) -> None:
    cached(cache, commit=COMMITS[1], ref="other")
    snapshot = cached(cache)
    found = find_model(model)
    assert found.folder == snapshot
    name = "" if model in (NAME, Path(NAME)) else f"as {NAME} "
    assert found.note == f"{model}: {name}revision main (fa6e214), {snapshot}"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HUB_CACHE": "a", "HUGGINGFACE_HUB_CACHE": "b", "HF_HOME": "c"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "b", "HF_HOME": "c", "XDG_CACHE_HOME": "d"}, "b"),
        ({"HF_HOME": "c", "XDG_CACHE_HOME": "d"}, "c/hub"),
        ({"XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
        ({"HF_HOME": ""}, ".cache/huggingface/hub"),
        ({"HF_HOME": "~/e"}, "e/hub"),
        ({"HF_HOME": "$HOME/e"}, "e/hub"),
    ],
)
def test_the_variables_of_hugging_face_say_where_the_cache_is(
    variables: dict[str, str], place: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached(home / place)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert find_model(NAME).folder.resolve() == snapshot


def test_a_folder_of_that_name_comes_first(cache: Path, home: Path) -> None:
    cached(cache)
    for name in (NAME, "Qwen-1_8B"):
        shutil.copytree(WEIGHTS, home / name)
        assert find_model(name) == (Path(name), None)


def test_a_file_of_that_name_is_no_model(cache: Path, home: Path) -> None:
    cached(cache)
    (home / "Qwen").mkdir()
    (home / NAME).touch()
    assert refusal(NAME) == f"{NAME}: not a folder; give the folder that it is in, Qwen"


@pytest.mark.parametrize(
    ("ref", "revision"),
    [
        ("v1.0", "v1.0"),
        *(("refs/pr/1", each) for each in ("refs/pr/1", "pr/1")),
        *(("pr/1", each) for each in ("refs/pr/1", "pr/1")),
    ],
)
def test_a_revision_is_a_branch_or_a_tag(ref: str, revision: str, cache: Path) -> None:
    cached(cache)
    snapshot = cached(cache, commit=COMMITS[2], ref=ref)
    assert find_model(NAME, revision).folder == snapshot


@pytest.mark.parametrize("length", [40, 7, 5])
def test_a_revision_is_a_commit_also_cut_short(length: int, cache: Path) -> None:
    snapshots = [cached(cache, commit=commit, ref=None) for commit in COMMITS]
    for snapshot, commit in zip(snapshots, COMMITS, strict=True):
        found = find_model(NAME, commit[:length].upper())
        assert found == (snapshot, f"{NAME}: revision ({commit[:7]}), {snapshot}")


def test_a_revision_that_is_short_for_several_is_refused(cache: Path) -> None:
    for commit in COMMITS:
        cached(cache, commit=commit, ref=None)
    line = refusal(NAME, "fa6e")
    assert f"several revisions that begin with fa6e: {COMMITS[1]}, {COMMITS[0]}; give more of it" in line


def test_a_revision_that_is_not_there_is_named_with_those_that_are(cache: Path) -> None:
    cached(cache)
    line = refusal(NAME, "v2")
    assert f"has no revision v2, only main, {COMMITS[0]}; " in line
    assert line.endswith(f"{FETCH} --revision v2")


@pytest.mark.parametrize(
    "revision", ["", "../x", "/etc", "a\nb", "-x", "a//b", "snapshots/../x", "x" * 999 + "\0"]
)
def test_what_no_revision_can_be_is_refused(revision: str, cache: Path) -> None:
    cached(cache)
    assert "is neither a branch, a tag nor a commit hash" in refusal(NAME, revision)


def test_a_reference_cannot_lead_out_of_the_snapshots(cache: Path) -> None:
    snapshot = cached(cache)
    shutil.copytree(snapshot, cache / "elsewhere")
    (cache / "models--Qwen--Qwen-1_8B/refs/main").write_text("../../elsewhere")
    assert find_model(NAME).folder == snapshot  # the only one there


def test_without_main_the_only_revision_is_taken_and_said(cache: Path) -> None:
    snapshot = cached(cache, ref=None)
    note = f"{NAME}: the only revision there, without a refs/main (fa6e214), {snapshot}"
    assert find_model(NAME) == (snapshot, note)


def test_without_main_several_revisions_are_named(cache: Path) -> None:
    for commit in COMMITS[:2]:
        cached(cache, commit=commit, ref=None)
    line = refusal(NAME)
    assert (
        f"no refs/main, but several revisions: {COMMITS[1]}, {COMMITS[0]}; "
        "choose one with --revision (in Python: revision=…)" in line
    )


def test_the_folder_of_a_repository_in_the_cache_is_understood(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, main = cached(cache, commit=COMMITS[1], ref="old"), cached(cache)
    root = main.parent.parent
    assert find_model(root).folder == main
    assert find_model(root, "old").folder == other
    assert find_model(root, "fa6e0").folder == other
    monkeypatch.chdir(root)
    assert find_model(".").folder.resolve() == main


def test_the_snapshots_of_a_repository_are_understood_and_their_lack(cache: Path) -> None:
    main = cached(cache)
    assert find_model(main.parent).folder == main
    shutil.rmtree(main.parent)
    (main.parent.parent / "refs/main").unlink()
    line = refusal(main.parent.parent)
    assert f"{main.parent.parent} has no revision main; the option --download" in line
    assert line.endswith(FETCH)


def test_a_folder_that_holds_models_says_which(cache: Path, home: Path) -> None:
    root = cached(cache).parent.parent
    for folder in (cache, cache.parent):
        assert refusal(folder) == f"{folder}: has no config.json, but holds {NAME}; give {root}"
    chat = cached(cache, name=CHAT).parent.parent
    names = f"{NAME}, {CHAT}; give one of them, as {root}"
    assert refusal(cache) == f"{cache}: has no config.json, but holds {names}"
    assert find_model(chat).note is not None
    made = home / "made"
    shutil.copytree(WEIGHTS, made / NAME)
    for folder, name in ((made, NAME), (made / "Qwen", "Qwen-1_8B")):
        assert refusal(folder) == f"{folder}: has no config.json, but holds {name}; give {made / NAME}"
        with pytest.raises(InputError, match=f"has no qwen.tiktoken, but holds {name}; "):
            Tokenizer.from_file(folder)
    (home / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_model(home / "empty")


def test_a_folder_has_no_revisions(cache: Path) -> None:
    for folder in (WEIGHTS, cached(cache)):
        assert refusal(folder, "main") == (
            f"{folder}: a folder, which has no revisions; leave the revision main out"
        )


# ModelScope's cache


@pytest.mark.parametrize("owner", ["Qwen", "qwen"])
@pytest.mark.parametrize("above", ["hub", "hub/models", "models", "."])
def test_every_layout_of_modelscope_is_found(
    above: str, owner: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope" / above / owner / "Qwen-1_8B")
    name = "" if owner == "Qwen" else "as qwen/Qwen-1_8B "
    note = f"{NAME}: {name}in ModelScope's cache, {folder}"
    assert find_model(NAME) == (folder, note)
    assert find_model("Qwen-1_8B").folder == folder
    shutil.move(home / ".cache/modelscope", home / "elsewhere")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(home / "elsewhere"))
    assert find_model(NAME).folder == home / "elsewhere" / above / owner / "Qwen-1_8B"


def test_a_dot_in_a_name_is_written_as_modelscope_writes_it(home: Path) -> None:
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope/hub/mine/Qwen-1___8B")
    assert find_model("mine/Qwen-1.8B").folder == folder


def test_the_revisions_of_modelscopes_newest_layout_are_found(home: Path) -> None:
    snapshots = home / ".cache/modelscope/models/Qwen--Qwen-1_8B/snapshots"
    for revision in ("master", "v1.0.1"):
        shutil.copytree(WEIGHTS, snapshots / revision)
    assert find_model(NAME).folder == snapshots / "master"
    assert find_model(NAME, "v1.0.1").folder == snapshots / "v1.0.1"
    assert "not a folder" in refusal(NAME, "v2")


def test_a_plain_folder_of_modelscope_has_no_revision_to_ask_for(home: Path) -> None:
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope/hub/Qwen/Qwen-1_8B")
    assert "not a folder" in refusal(NAME, "v1")
    assert find_model(NAME, "master").folder == folder  # their main


def test_hugging_faces_cache_comes_first_unless_it_is_not_complete(cache: Path, home: Path) -> None:
    snapshot = cached(cache)
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope/hub/Qwen/Qwen-1_8B")
    assert find_model(NAME).folder == snapshot
    (snapshot / "model.safetensors").unlink()
    assert find_model(NAME).folder == folder


# A model that is not there


@pytest.mark.parametrize("model", [NAME, "Qwen-1_8B"])
def test_a_missing_model_is_one_line_with_the_caches_and_the_command(
    model: str, home: Path, cache: Path
) -> None:
    name = "" if model == NAME else f"as {NAME} "
    assert refusal(model) == (
        f"{model}: not a folder, and {name}neither in Hugging Face's cache, {cache}, nor in "
        f"ModelScope's, {home / '.cache/modelscope'}; "
        "the option --download of generate, chat, … fetches it, or: "
        f"{FETCH}"
    )


@pytest.mark.parametrize("model", ["missing", "./a/b", "x/y/z", "/x/y"])
def test_a_missing_folder_that_is_no_name_is_named_as_ever(model: str) -> None:
    assert refusal(model) == f"{model}: not a folder; a checkpoint is a folder with config.json in it"


@pytest.mark.parametrize(
    ("model", "instead"),
    [
        ("Qwen-9B", "not a folder; did you mean Qwen/Qwen-7B?"),
        ("qwen1.8b-chat", "not a folder; did you mean Qwen/Qwen-1_8B-Chat?"),
        ("Qwen/Qwen-1_8B-Cha", "no repository of this name is known; did you mean Qwen/Qwen-1_8B-Chat?"),
        ("Qwen/Qwen-7B-Int4", "no repository of this name is known; did you mean Qwen/Qwen-7B-Chat-Int4?"),
        ("Qwen/Other", "no repository of this name is known; there are Qwen-1_8B, -7B, -14B and -72B, each"),
        ("https://hub/x/y/tree/v1", "not a folder; of an address the part owner/name is needed"),
    ],
)
def test_a_name_that_no_model_has_is_answered_with_one_that_may_be_meant(
    model: str, instead: str, library: SimpleNamespace
) -> None:
    line = refusal(model)
    assert instead in line
    assert "hf download" not in line
    with pytest.raises(InputError, match=re.escape(instead)):
        fetch_model(model)
    assert library.calls == []


def test_inspect_says_which_name_may_be_meant(run_command: Run) -> None:
    line = refused(run_command(command("checkpoint"), "inspect", "Qwen-9B"))
    assert line.endswith("; use one of 1.8b, 7b, 14b, 72b; did you mean Qwen/Qwen-7B?")


def test_a_name_in_another_case_is_found_and_said(cache: Path, home: Path, library: SimpleNamespace) -> None:
    typed = cached(cache, name="Mine/fine-Tuned")
    found = find_model("mine/Fine-tuned")
    assert found.folder == typed
    assert found.note == f"mine/Fine-tuned: as Mine/fine-Tuned revision main (fa6e214), {typed}"
    exact = cached(cache, name="mine/Fine-tuned")
    assert find_model("mine/Fine-tuned").folder == exact
    lower = cached(cache, name=NAME.lower())
    assert find_model(NAME).folder == lower
    (lower / "model.safetensors").unlink()
    assert fetch_model(NAME).folder == lower  # completed under the name that it has
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope/hub/models/QWEN/qwen-7b")
    assert find_model("Qwen-7B").folder == folder


# A download that is not complete


def test_a_broken_link_to_a_blob_is_an_incomplete_download(cache: Path) -> None:
    snapshot = cached(cache)
    (snapshot / "model.safetensors").resolve().unlink()
    assert refusal(NAME) == (
        f"{NAME}: the download is not complete: {snapshot} lacks model.safetensors; the option --download "
        f"of generate, chat, … completes it, or: {FETCH}"
    )
    assert refusal(snapshot).startswith(f"{snapshot}: the download is not complete")


def test_missing_shards_are_an_incomplete_download(cache: Path) -> None:
    snapshot = cached(cache, SHARDED)
    for shard in SHARDS[1:]:
        (snapshot / shard).unlink()
    assert f"lacks {SHARDS[1]}, {SHARDS[2]}; " in refusal(NAME)
    (snapshot / INDEX).unlink()
    assert f"lacks {INDEX}; " in refusal(NAME)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_incomplete_download(file: str, cache: Path) -> None:
    (cached(cache) / file).unlink()
    assert f"lacks {file if file == 'config.json' else '*.safetensors'}; " in refusal(NAME)


@pytest.mark.parametrize("file", ["qwen.tiktoken", "generation_config.json"])
def test_unfinished_blobs_count_where_a_published_file_is_missing(file: str, cache: Path) -> None:
    snapshot = cached(cache)
    blobs = snapshot.parent.parent / "blobs"
    (blobs / "0123.incomplete").touch()
    assert find_model(NAME).folder == snapshot  # of a file that is not read
    (snapshot / file).unlink()
    assert f"lacks {file}, and {blobs} has 1 unfinished files; " in refusal(NAME)
    (blobs / "0123.incomplete").unlink()
    assert find_model(NAME).folder == snapshot  # the repository may have none


def test_a_snapshot_without_a_tokenizer_is_whole_for_the_library_and_not_for_text(
    cache: Path, library: SimpleNamespace, run_command: Run
) -> None:
    snapshot = cached(cache)
    (snapshot / "qwen.tiktoken").unlink()
    assert find_model(NAME).folder == snapshot
    load_model(NAME)
    for name in ("generate", "trace", "parity record", "chat", "perplexity"):
        module, *sub = name.split()
        line = refused(run_command(command(module), *sub, *COMMANDS[name], "--model", NAME))
        assert f"{snapshot} lacks qwen.tiktoken; " in line
    assert library.calls == []
    found = run_command(command("generate"), QUESTION, "--model", NAME, "--download", *ONE_LINE)
    assert (found.code, found.out) == (0, f"{ANSWER}\n")


def test_a_published_chat_model_without_its_settings_is_an_incomplete_download(
    cache: Path, library: SimpleNamespace
) -> None:
    for name in (CHAT, "me/Qwen-1_8B-Chat"):
        (cached(cache, name=name) / "generation_config.json").unlink()
    assert "lacks generation_config.json; " in refusal(CHAT, need=TEXT)
    find_model("me/Qwen-1_8B-Chat", need=TEXT)
    find_model(CHAT)
    fetch_model(CHAT, need=TEXT)
    find_model(CHAT, need=TEXT)


def test_a_snapshot_that_is_only_promised_is_an_incomplete_download(cache: Path) -> None:
    snapshot = cached(cache)
    shutil.rmtree(snapshot)
    assert (
        f"not complete: {snapshot.parent.parent} has no snapshot {COMMITS[0]}, its revision main"
        in refusal(NAME)
    )


def test_what_completes_a_download_has_its_revision_and_its_cache(cache: Path, home: Path) -> None:
    snapshot = cached(home / "my cache", commit=COMMITS[2], ref="old")
    (snapshot / "config.json").unlink()
    line = refusal(snapshot.parent.parent, "old")
    assert line.endswith(f"{FETCH} --revision old --cache-dir '{home / 'my cache'}'")


def test_an_incomplete_folder_of_modelscope_is_completed_by_its_tool(home: Path) -> None:
    folder = shutil.copytree(WEIGHTS, home / ".cache/modelscope/hub/qwen/Qwen-1_8B")
    (folder / "model.safetensors").unlink()
    assert refusal(NAME).endswith("or: modelscope download --model qwen/Qwen-1_8B")


def test_a_damaged_index_and_pickles_are_for_the_loader_to_refuse(cache: Path) -> None:
    snapshot = cached(cache, SHARDED)
    (snapshot / INDEX).resolve().write_text("{")
    assert find_model(NAME).folder == snapshot
    for file in (INDEX, *SHARDS):
        (snapshot / file).unlink()
    (snapshot / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="pickled checkpoints are not read"):
        load_model(NAME)


# The library


def test_load_model_takes_a_name_and_a_revision(cache: Path) -> None:
    cached(cache, SHARDED, COMMITS[1], "old", CHAT)
    cached(cache, name=CHAT)
    assert load_model(CHAT).config != load_model(CHAT, revision="old").config
    assert load_model(CHAT, revision=COMMITS[1][:9]).config == load_model(SHARDED).config
    with pytest.raises(InputError, match="not a folder"):
        load_model("Qwen/Qwen-7B")
    with pytest.raises(InputError, match="has no revisions"):
        load_model(WEIGHTS, revision="main")


def test_a_tokenizer_is_found_by_name_in_a_folder_and_by_file(cache: Path) -> None:
    snapshot = cached(cache)
    (snapshot / "model.safetensors").unlink()  # it needs only its own file
    ids = Tokenizer.from_file(WEIGHTS / "qwen.tiktoken").encode(QUESTION)
    for path in (NAME, "Qwen-1_8B", snapshot, snapshot.parent.parent, WEIGHTS, str(WEIGHTS)):
        assert Tokenizer.from_file(path).encode(QUESTION) == ids
    with pytest.raises(InputError, match=r"weights/qwen\.tiktoken: cannot be read: No such file"):
        Tokenizer.from_file("weights/qwen.tiktoken")
    with pytest.raises(InputError, match="Qwen-7B: not a folder"):
        Tokenizer.from_file("Qwen-7B")
    (snapshot / "qwen.tiktoken").unlink()
    with pytest.raises(InputError, match=r"not complete: .* lacks qwen\.tiktoken"):
        Tokenizer.from_file(NAME)


def test_a_tokenizer_takes_a_revision_and_a_name_followed_by_its_file(cache: Path, home: Path) -> None:
    old = cached(cache, commit=COMMITS[1], ref="old")
    main = cached(cache)
    (main / "qwen.tiktoken").unlink()
    ids = Tokenizer.from_file(WEIGHTS).encode(QUESTION)
    for path in (NAME, f"{NAME}/qwen.tiktoken", Path("Qwen-1_8B/qwen.tiktoken"), old.parent.parent):
        assert Tokenizer.from_file(path, revision="old").encode(QUESTION) == ids
        with pytest.raises(InputError, match=r"lacks qwen\.tiktoken"):
            Tokenizer.from_file(path)
    with pytest.raises(InputError, match="has no revisions"):
        Tokenizer.from_file(WEIGHTS, revision="old")
    for path in (WEIGHTS / "qwen.tiktoken", "./Qwen-1_8B/qwen.tiktoken"):
        with pytest.raises(InputError, match="not the name of a model; leave the revision old out"):
            Tokenizer.from_file(path, revision="old")
    with pytest.raises(InputError, match="Qwen-7B: not a folder, and as Qwen/Qwen-7B neither in"):
        Tokenizer.from_file("Qwen-7B/qwen.tiktoken")
    (home / NAME).mkdir(parents=True)  # a folder of that name comes first
    with pytest.raises(InputError, match=r"Qwen-1_8B/qwen\.tiktoken: cannot be read: No such file"):
        Tokenizer.from_file(f"{NAME}/qwen.tiktoken")


def test_a_figure_names_the_model_not_the_hash(cache: Path) -> None:
    assert model_name(cached(cache)) == "Qwen-1_8B"
    assert model_name(WEIGHTS) == "weights"


def test_nothing_is_imported_to_find_a_model() -> None:
    code = "import sys, qwen_ref.loading.hub; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    assert python("-c", code).out == "set()\n"


# Every command


@pytest.fixture
def text(home: Path) -> Path:
    (home / "text").write_text(QUESTION * 20, encoding="utf-8")
    return home / "text"


@pytest.fixture
def bundle(home: Path, run_command: Run) -> Path:
    made = run_command(command("parity"), *("record", "--prompt", QUESTION, "--out", home / "bundle"))
    assert made.code == 0
    return home / "bundle"


COMMANDS = {
    "generate": (QUESTION,),
    "chat": ("--once", "冰岛的首都是哪里？"),
    "perplexity": ("--text", "text", "--lengths", "8"),
    "trace": (QUESTION,),
    "bench": ("--lengths", "2", "--tokens", "1", "--repeats", "1"),
    "parity record": ("--prompt", QUESTION, "--out", "made", "--rounding", "none"),
    "parity check": ("--golden", "bundle"),
    "parity diagnose": ("--bundle", "bundle"),
    "parity diff": ("bundle", "bundle"),
    "checkpoint inspect": (),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_name_a_revision_and_the_download(
    name: str, cache: Path, text: Path, bundle: Path, run_command: Run
) -> None:
    cached(cache, SHARDED)
    snapshot = cached(cache, commit=COMMITS[1], ref="tiny")
    module, *sub = name.split()
    main, arguments = command(module), [*sub, *COMMANDS[name]]

    def run_with(*model: str) -> Result:
        return run_command(main, *arguments, *(model[1:] if sub == ["inspect"] else model))

    found = run_with("--model", NAME, "--revision", "tiny")
    assert found.code == 0, found.err
    note = f"qwen_ref: note: {NAME}: revision tiny (fa6e000), {snapshot}"
    assert found.err.splitlines().count(note) == 1
    assert "revision" not in run_with("--model", str(WEIGHTS)).err
    assert f"{CHAT}: not a folder" in refused(run_with("--model", CHAT))
    assert "--download takes huggingface_hub" in refused(run_with("--model", CHAT, "--download"))
    if sub != ["inspect"]:
        assert "--revision goes with --model" in refused(run_command(main, *arguments, "--revision", "x"))
        assert "--download goes with --model" in refused(run_command(main, *arguments, "--download"))


@pytest.mark.parametrize("option", [("--revision", "x"), ("--download",)])
def test_a_size_and_a_file_refuse_the_options_of_a_name(option: tuple[str, ...], run_command: Run) -> None:
    for model, what in (("1.8b", "a size"), (WEIGHTS / "config.json", "a file")):
        line = refused(run_command(command("checkpoint"), "inspect", model, *option))
        assert line.endswith(f"{option[0]} goes with a name as Qwen/Qwen-1_8B; {model} is {what}")
    made = ("--synthetic", "1.8b", *COMMANDS["bench"])
    assert f"{option[0]} goes with --model" in refused(run_command(command("bench"), *made, *option))


def test_the_download_of_evaluate_is_for_its_data_also(run_command: Run) -> None:
    line = refused(run_command(command("evaluate"), "--tasks", "x", "--download"))
    assert "goes with" not in line


def test_evaluate_takes_a_name_and_a_revision(cache: Path, run_command: Run) -> None:
    main = command("evaluate")
    snapshot = cached(cache, SHARDED, ref="old")  # without a tokenizer
    line = refused(run_command(main, "--tasks", "x", "--model", snapshot))
    assert "lacks qwen.tiktoken" in line
    found = run_command(main, "--tasks", "x", "--model", NAME, "--revision", "old")
    assert f"{NAME}: the download is not complete: {snapshot} lacks qwen.tiktoken" in refused(found)
    assert "not a folder" in refused(run_command(main, "--tasks", "x", "--model", CHAT))


def test_the_examples_take_a_name(
    cache: Path, home: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("measure", "make", "ports"):
        monkeypatch.syspath_prepend(GOLDEN.parents[1] / "examples" / room)
    snapshot = cached(cache)
    needle, writer = (importlib.import_module(name) for name in ("needle", "quantize_gptq"))
    options = ("--lengths", "64", "--depths", "2", "--samples", "1", "--variants", "both", "--json")
    found = run_command(needle.main, "--model", NAME, *options)
    assert json.loads(found.out)["model"] == str(snapshot)
    args = writer.parser().parse_args([NAME, "made", "--round-to-nearest"])
    assert writer.command(args) == 0
    recorder = importlib.import_module("recorder")
    args = recorder.parser("x", ["float32"]).parse_args(["--model", NAME, "--ids", "i", "--out", "o"])
    assert (args.model, args.revision, args.download) == (NAME, None, False)


def test_a_snapshot_with_its_configuration_alone_can_be_inspected(cache: Path, run_command: Run) -> None:
    snapshot = cached(cache)
    (snapshot / "model.safetensors").unlink()
    found = run_command(command("checkpoint"), "inspect", NAME)
    assert found.code == 0
    assert "from the configuration alone" in found.out
    snapshot = cached(cache, SHARDED, name=CHAT)
    (snapshot / SHARDS[0]).unlink()
    assert "not complete" in refused(run_command(command("checkpoint"), "inspect", CHAT))


def test_an_index_without_weights_is_inspected_from_the_configuration(
    cache: Path, home: Path, run_command: Run
) -> None:
    snapshot = cached(cache, SHARDED)
    folder = home / "folder"
    folder.mkdir()
    for file in ("config.json", INDEX):
        shutil.copyfile(snapshot / file, folder / file)
    for shard in SHARDS:
        (snapshot / shard).unlink()
    for model in (NAME, str(snapshot), str(folder)):
        found = run_command(command("checkpoint"), "inspect", model)
        assert found.code == 0, found.err
        assert "from the configuration alone" in found.out


def test_inspect_says_what_needs_no_file_and_fetches_no_weights(
    cache: Path, library: SimpleNamespace, run_command: Run
) -> None:
    inspect = command("checkpoint")
    line = refused(run_command(inspect, "inspect", "Qwen/Qwen-72B-Chat"))
    assert line.endswith(
        "; inspect 72b needs no file; "
        "the option --download of inspect fetches its configuration, or: hf download "
        'Qwen/Qwen-72B-Chat config.json quantize_config.json "*.safetensors.index.json"'
    )
    assert "needs no file" not in refused(run_command(inspect, "inspect", "Qwen/Qwen-72B-Chat-Int4"))
    library.source = SHARDED
    found = run_command(inspect, "inspect", NAME, "--download")
    assert found.code == 0, found.err
    assert "from the configuration alone" in found.out
    there = sorted(path.name for path in find_model(NAME, need=CONFIG).folder.iterdir())
    assert there == ["config.json", INDEX]
    assert f"lacks {', '.join(SHARDS)}; " in refusal(NAME)


def test_inspect_does_not_complete_weights_and_says_what_does(
    cache: Path, home: Path, library: SimpleNamespace, run_command: Run
) -> None:
    (cached(cache, SHARDED) / SHARDS[0]).unlink()
    for download in ((), ("--download",)):
        line = refused(run_command(command("checkpoint"), "inspect", NAME, *download))
        assert line.endswith(
            f"lacks {SHARDS[0]}; the option --download of generate, chat, … completes it, or: {FETCH}"
        )
    assert list(FILES) not in [options["allow_patterns"] for _, options in library.calls]
    folder = shutil.copytree(SHARDED, home / ".cache/modelscope/hub/Qwen/Qwen-7B")
    (folder / SHARDS[0]).unlink()
    line = refused(run_command(command("checkpoint"), "inspect", "Qwen-7B"))
    assert (
        f"lacks {SHARDS[0]}; the option --download of generate, chat, … completes it, or: modelscope" in line
    )


@pytest.mark.parametrize("need", ["weights", TEXT, CONFIG])
def test_of_another_model_only_the_configuration_is_fetched(
    need: str, home: Path, library: SimpleNamespace
) -> None:
    library.source = shutil.copytree(WEIGHTS, home / "other")
    (library.source / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match=r"nothing but its configuration was fetched: .*qwen2"):
        fetch_model("mine/Qwen2", need=need)
    assert [options["allow_patterns"] for _, options in library.calls] == [["config.json"]]


def test_a_repository_without_a_configuration_is_said_to_be_so(home: Path, library: SimpleNamespace) -> None:
    library.source = home / "bare"
    library.source.mkdir()
    with pytest.raises(InputError, match=r"which lacks config\.json: the repository does not have it"):
        fetch_model(NAME)


def test_a_path_with_a_point_is_no_name(cache: Path, run_command: Run) -> None:
    cached(cache)
    line = refused(run_command(command("generate"), QUESTION, "--model", f"./{NAME}"))
    assert line.endswith(f"{NAME}: not a folder; a checkpoint is a folder with config.json in it")


def generate_in(cache: Path, *arguments: str) -> int:
    """What a rank does; ranks have not the environment of a test."""
    os.environ["HF_HUB_CACHE"] = str(cache)
    return forked_ranks.command("qwen_ref.generate", *arguments)


def test_every_rank_finds_the_model_and_rank_0_says_where(
    cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # what starts the ranks keeps its environment for later tests
    cached(cache, SHARDED)
    snapshot = cached(cache, commit=COMMITS[1], ref="tiny")
    arguments = (QUESTION, "--model", NAME, "--revision", "tiny", "--dtype", "float32", *ONE_LINE)
    out, err = forked_ranks.run_ranks(2, home, generate_in, cache, *arguments)
    assert out == f"{ANSWER}\n"
    assert err.count(str(snapshot)) == 1
    assert (home / "stderr-1").read_text() == ""


# The download


@pytest.fixture
def library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for huggingface_hub: its hub is a folder, and it notes what it is asked for."""
    state = SimpleNamespace(calls=[], source=WEIGHTS, error=None)

    def snapshot_download(name: str, **options: Any) -> str:
        state.calls.append((name, options))
        if state.error is not None:
            raise state.error
        root = Path(str(options["cache_dir"])) / f"models--{name.replace('/', '--')}"
        revision = str(options["revision"] or "main")
        commit = revision if revision in COMMITS else COMMITS[0]
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in state.source.iterdir():
            if file.name != "golden.safetensors" and any(map(file.match, options["allow_patterns"])):
                (snapshot / file.name).unlink(missing_ok=True)
                shutil.copyfile(file, snapshot / file.name)
        if revision != commit:
            reference = root / "refs" / revision
            reference.parent.mkdir(exist_ok=True)
            reference.write_text(commit)
        return str(snapshot)

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return state


@pytest.mark.parametrize("model", [NAME, "Qwen-1_8B", "qwen/Qwen-1_8B"])
def test_a_download_fetches_what_is_read_and_nothing_else(
    model: str, cache: Path, library: SimpleNamespace, run_command: Run
) -> None:
    found = run_command(command("generate"), QUESTION, "--model", model, "--download", *ONE_LINE)
    assert (found.code, found.out) == (0, f"{ANSWER}\n")
    first = {"revision": None, "cache_dir": cache, "allow_patterns": ["config.json"]}
    then = {"revision": COMMITS[0], "cache_dir": cache, "allow_patterns": list(FILES)}
    assert library.calls == [(NAME, first), (NAME, then)]
    assert f"note: {model}: " in found.err
    assert not any(Path("modeling_qwen.py").match(each) or Path("x.bin").match(each) for each in FILES)


def test_what_is_there_is_not_fetched(cache: Path, library: SimpleNamespace) -> None:
    cached(cache)
    fetch_model(NAME)
    fetch_model(WEIGHTS)
    assert library.calls == []


def test_what_is_not_complete_is_fetched_into_its_cache(home: Path, library: SimpleNamespace) -> None:
    snapshot = cached(home / "mine")
    for model, revision in ((snapshot, COMMITS[0]), (snapshot.parent.parent, None)):
        (snapshot / "model.safetensors").unlink()
        library.calls.clear()
        assert fetch_model(model).folder == snapshot
        name, options = library.calls[0]
        assert (name, options["revision"], options["cache_dir"]) == (NAME, revision, home / "mine")


def test_a_revision_is_fetched(cache: Path, library: SimpleNamespace) -> None:
    cached(cache)
    fetch_model(NAME, "v1")
    assert [options["revision"] for _, options in library.calls] == ["v1", COMMITS[0]]


@pytest.mark.parametrize(
    ("model", "revision"),
    [("missing", None), (WEIGHTS, "main"), (NAME, "../x"), ("a/b/c", None), ("a snapshot", "main")],
)
def test_what_no_download_can_mend_reaches_no_network(
    model: str | Path, revision: str | None, cache: Path, library: SimpleNamespace
) -> None:
    with pytest.raises(InputError, match=r"not a folder|no revisions|neither a branch"):
        fetch_model(cached(cache) if model == "a snapshot" else model, revision)
    assert library.calls == []


def test_a_repository_without_safetensors_is_said_to_be_so(library: SimpleNamespace, home: Path) -> None:
    library.source = shutil.copytree(WEIGHTS, home / "bare")
    (home / "bare/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"which lacks \*\.safetensors: the repository does not have it"):
        fetch_model(NAME)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RepositoryNotFoundError", "the hub has no such repository"),
        ("GatedRepoError", "asks for a login: hf auth login"),
        ("RevisionNotFoundError", "has no such revision"),
        ("LocalEntryNotFoundError", "the hub is out of reach"),
        ("ConnectError", "ConnectError: one two"),
    ],
)
def test_a_download_that_fails_is_one_line(
    kind: str, said: str, library: SimpleNamespace, run_command: Run
) -> None:
    library.error = type(kind, (OSError,), {})("one\n\ntwo")
    line = refused(run_command(command("generate"), QUESTION, "--model", NAME, "--download"))
    assert f"{NAME} could not be fetched: " in line
    assert said in line


def test_ctrl_c_ends_a_download(library: SimpleNamespace, run_command: Run) -> None:
    library.error = KeyboardInterrupt()
    assert run_command(command("generate"), QUESTION, "--model", NAME, "--download").code == 130


def test_only_one_rank_of_a_machine_shows_progress(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for rank, quiet in (("0", None), ("1", "1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        shutil.rmtree(hugging_face_cache(), ignore_errors=True)
        fetch_model(NAME)
        assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == quiet


def test_the_patterns_are_what_the_real_library_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own filter, on the names of a published repository."""
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    pytest.importorskip("huggingface_hub", reason="an extra: pip install 'qwen_ref[hub]'")
    from huggingface_hub.utils import filter_repo_objects

    read = ["config.json", "generation_config.json", "qwen.tiktoken", "model.safetensors.index.json"]
    read += ["model-00001-of-00002.safetensors", "quantize_config.json"]
    other = ["modeling_qwen.py", "pytorch_model.bin", "tokenizer_config.json", "README.md", "assets/logo.jpg"]
    assert list(filter_repo_objects(read + other, allow_patterns=list(FILES))) == read


def test_json_names_the_folder(cache: Path, run_command: Run) -> None:
    snapshot = cached(cache)
    found = run_command(command("trace"), QUESTION, "--model", NAME, "--json")
    assert json.loads(found.out)["model"] == str(snapshot)


def test_numbered_files_that_are_all_there_need_no_index(cache: Path) -> None:
    snapshot = cached(cache, SHARDED)
    (snapshot / INDEX).unlink()
    assert find_model(NAME).folder == snapshot
    (snapshot / SHARDS[1]).unlink()
    assert f"{snapshot} lacks {INDEX}" in refusal(NAME)


def test_the_kit_and_the_trace_take_names_as_well(cache: Path, home: Path) -> None:
    cached(cache)
    ids = torch.tensor([[1, 2, 3]])
    parity.record(NAME, ids, home / "truth.safetensors")
    assert parity.check(NAME, home / "truth.safetensors", dtype="bfloat16").within
    assert trace(NAME, [1, 2, 3]) is not None


def test_a_completion_names_the_model_as_it_was_typed(cache: Path, run_command: Run) -> None:
    cached(cache)
    found = run_command(command("generate"), QUESTION, "--model", NAME, "--json", *ONE_LINE)
    assert json.loads(found.out)["model"] == NAME


def test_the_home_folder_is_known_where_no_shell_has_read_it(home: Path) -> None:
    shutil.copytree(WEIGHTS, home / "mine")
    assert repr(load_model("~/mine")) == repr(load_model(WEIGHTS))
    for path in ("~/mine", "~/mine/qwen.tiktoken"):
        assert Tokenizer.from_file(path).encode("a") == Tokenizer.from_file(WEIGHTS).encode("a")


@pytest.mark.parametrize("model", [None, 5, ["weights"]])
def test_what_is_no_path_is_told_in_words(model: object) -> None:
    with pytest.raises(InputError, match=r"a model must be a folder or a name such as Qwen/Qwen-1_8B, not "):
        load_model(model)
