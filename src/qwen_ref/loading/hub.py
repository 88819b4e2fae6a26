"""Where a model is: a folder, or a name that is looked up in the caches of Hugging Face and ModelScope.

find_model only reads the disk. fetch_model downloads what it does not find: the files that are read, and
neither code nor pickles. Nothing here needs torch, and huggingface_hub is imported for a download only.

This is a repository in Hugging Face's cache. ModelScope's cache has plain folders (see _of_modelscope).

    models--Qwen--Qwen-1_8B/
      refs/main                        the commit hash that the branch had
      snapshots/HASH/config.json       a link to ../../blobs/…; where there are no links, the file itself
      blobs/                           the files' contents; what is not complete ends in .incomplete
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from qwen_ref.config import InputError, QwenConfig, lacks_memory, read_json_object, shown, some
from qwen_ref.loading.folder import require_folder

# What is read of a published folder, as patterns of file names; and what is fetched of it where only the
# configuration is asked for.
FILES = (
    *("config.json", "generation_config.json", "qwen.tiktoken", "quantize_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
)
CONFIG_FILES = ("config.json", "quantize_config.json", "*.safetensors.index.json")
# What a caller needs of a folder. CONFIG and VOCABULARY are one file; WEIGHTS is all that a model needs, TEXT
# all that a command needs which reads or writes text.
TEXT, WEIGHTS, CONFIG, VOCABULARY = "text", "weights", "config.json", "qwen.tiktoken"
_GENERATION = "generation_config.json"

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"https?:/+[^/]+/(?:models/)?([^/]+/[^/]+)(?:/tree/(?:main|master))?/*", re.IGNORECASE)
# The published repositories, by what tells their names apart however they are written.
_PUBLISHED = {
    f"qwen-{size}{kind}".lower().replace("_", "."): f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
}
_SIZE = re.compile(r"Qwen/Qwen-(1_8B|7B|14B|72B)(?:-Chat)?")
_CHOOSE = "choose one with --revision (in Python: revision=…)"
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")
_CAUSES = {
    "LocalEntryNotFoundError": "the hub is out of reach: is there a network, or is HF_HUB_OFFLINE set?",
    "RepositoryNotFoundError": "the hub has no such repository, or shows it only to who is logged in",
    "GatedRepoError": "the repository asks for a login: hf auth login",
    "RevisionNotFoundError": "the repository has no such revision",
}


class Found(NamedTuple):
    """A model's folder; note: where it was found, if it is not the path that was given."""

    folder: Path
    note: str | None = None


def repository(model: str | Path) -> str | None:
    """The name of a hub's repository, owner/name; None for what cannot be one.

    A published one is known without its owner, in any case, with a dot and by its page's address.

    >>> repository("mine/Qwen-7B"), repository("qwen-1.8b-chat/"), repository("./Qwen/Qwen-7B")
    ('mine/Qwen-7B', 'Qwen/Qwen-1_8B-Chat', None)
    """
    text = model.as_posix() if isinstance(model, Path) else model
    address = _ADDRESS.fullmatch(text)
    text = address[1] if address else text.rstrip("/")
    owner, _, name = text.rpartition("/")
    if owner.lower() in ("", "qwen") and _key(name) in _PUBLISHED:
        return _PUBLISHED[_key(name)]
    plain = _NAME.fullmatch(text) is not None and "--" not in text and ".." not in text and len(text) <= 96
    return text if plain else None


def _key(name: str) -> str:
    return name.lower().replace("_", ".")


def find_model(model: str | Path, revision: str | None = None, *, need: str = WEIGHTS) -> Found:
    """The folder of a model, without network. model: a folder (~ is the home folder), or a repository's name.

    A folder of that name comes first, then Hugging Face's cache, then ModelScope's. revision: a branch, a tag
    or a commit hash, which may be cut short; by default main. Raises ValueError with the command that fetches
    or completes the model where it is not there, or not whole.
    """
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"a model must be a folder or a name such as Qwen/Qwen-1_8B, not {shown(model)}")
    _check_revision(revision)
    model = at_home(model)
    name = repository(model)
    there = os.path.exists(model)
    if name is None and not there and (meant := instead(str(model))) is not None:
        raise InputError(f"{model}: not a folder; {meant}")
    if name is None or there:
        require_folder(model)
        return _of_path(Path(model), revision, need)
    problems = []
    for root in _roots(name):
        try:
            return _of_repository(root, str(model), _name_of(root), revision, need)
        except InputError as error:
            problems.append(error)
    for owner, folder in _of_modelscope(name, revision):
        if not (lacking := missing_files(folder, need, owner)):
            return Found(folder, f"{model}: {_as(model, owner)}in ModelScope's cache, {folder}")
        command = f"modelscope download --model {owner}"
        problems.append(_incomplete(model, f"{folder} lacks {lacking}", command, _lacked(folder, need)))
    if problems:
        raise problems[0]
    nowhere = (
        f"{model}: not a folder, and {_as(model, name)}neither in Hugging Face's cache, "
        f"{hugging_face_cache()}, nor in ModelScope's, {modelscope_cache()}; "
    )
    if _is_unknown(name):
        raise InputError(f"{nowhere}no repository of this name is known; {instead(name)}")
    raise InputError(
        f"{nowhere}{_without_files(name, need)}"
        f"{_remedy(_command(name, revision, need=need), 'fetches', need)}"
    )


def at_home(path: str | Path) -> str | Path:
    """The path with ~ as the home folder: in Python no shell has read it."""
    return os.path.expanduser(path) if str(path).startswith("~") and not os.path.lexists(path) else path


def fetch_model(model: str | Path, revision: str | None = None, *, need: str = WEIGHTS) -> Found:
    """As find_model, but what is not there, or not whole, is downloaded into Hugging Face's cache first.

    The configuration comes first. If it is another model's, nothing else is downloaded.
    """
    _check_revision(revision)
    try:
        return find_model(model, revision, need=need)
    except InputError:
        if (source := _source(model, revision)) is None:
            raise
    name, wanted, cache = source
    folder = _download(name, wanted, cache, [CONFIG])
    if os.path.exists(folder / CONFIG):
        try:
            QwenConfig.from_json(folder / CONFIG)
        except InputError as error:
            raise InputError(f"{model}: nothing but its configuration was fetched: {error}") from None
        _download(name, folder.name, cache, CONFIG_FILES if need == CONFIG else FILES)  # of that commit
        lacking = "" if need == CONFIG else missing_files(folder, need, name)
    else:
        lacking = CONFIG
    if lacking:
        raise InputError(
            f"{model}: fetched to {folder}, which lacks {lacking}: the repository does not have it, or the "
            "network was lost"
        )
    return find_model(model, revision, need=need)


def model_name(folder: Path) -> str:
    """What a figure calls the model in a folder: a snapshot's folder has only a hash for its name."""
    folder = folder.resolve()
    cached = _in_cache(folder)
    return folder.name if cached is None else _name_of(cached.root).partition("/")[2]


def _check_revision(revision: str | None) -> None:
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InputError(f"revision {shown(revision)} is neither a branch, a tag nor a commit hash")


# The caches


def hugging_face_cache() -> Path:
    """Hugging Face's cache, by the variables that huggingface_hub reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable])
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")) / "hub"


def modelscope_cache() -> Path:
    return _expanded(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope")


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def _roots(name: str) -> list[Path]:
    """A repository's folders in Hugging Face's cache."""
    return _in_any_case(hugging_face_cache(), f"models--{name.replace('/', '--')}")


def _in_any_case(above: Path, path: str) -> list[Path]:
    """The folder of this path, then those whose paths differ from it only in case.

    A cache has a name as it was typed: the hub takes every case. Qwen's owner at ModelScope was qwen first.
    """
    found = [above]
    for part in path.lower().split("/"):
        found = [entry for each in found for entry in _entries(each) if entry.name.lower() == part]
    return sorted(filter(os.path.isdir, found), key=lambda each: (each != above / path, each))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _of_modelscope(name: str, revision: str | None) -> Iterator[tuple[str, Path]]:
    """The folders of a repository in ModelScope's cache, which has had several layouts.

    Only the newest layout keeps revisions. The others write a dot in a name as ___.
    """
    cache = modelscope_cache()
    for above in (cache, cache / "hub"):
        for root in _in_any_case(above, f"models/{name.replace('/', '--')}"):
            if os.path.isdir(folder := root / "snapshots" / (revision or "master")):
                yield root.name.replace("--", "/", 1), folder
    if revision in (None, "master"):  # their main
        for above in (cache / "hub/models", cache / "hub", cache / "models", cache):
            for spelled in dict.fromkeys((name, name.replace(".", "___"))):
                for folder in _in_any_case(above, spelled):
                    yield f"{folder.parent.name}/{folder.name.replace('___', '.')}", folder


# A repository in Hugging Face's cache


def _of_path(folder: Path, revision: str | None, need: str) -> Found:
    """A folder that the user gave. It may be a repository's in the cache, its snapshots, or one of them."""
    cached = _in_cache(folder)
    if cached is not None and cached.snapshot is None:
        return _of_repository(cached.root, str(folder), _name_of(cached.root), revision, need)
    if cached is None:
        _require_file(folder, need)
    if revision is not None:
        raise InputError(f"{folder}: a folder, which has no revisions; leave the revision {revision} out")
    if cached is not None:
        _require_complete(folder, str(folder), cached.root, _name_of(cached.root), cached.snapshot, need)
    return Found(folder)


def _require_file(folder: Path, need: str) -> None:
    """Raises InputError for a folder that only holds models: a cache, or what a download made around one.

    A folder with nothing to give instead is for the loader to refuse.
    """
    file = VOCABULARY if need == VOCABULARY else CONFIG
    if os.path.lexists(folder / file):
        return
    held: dict[str, Path] = {}
    with contextlib.suppress(OSError):
        for pattern in ("models--*", "hub/models--*"):
            held |= {_name_of(root): root for root in sorted(folder.glob(pattern))}
        for pattern in (f"*/{file}", f"*/*/{file}"):
            if not held:
                inside = sorted(path.parent for path in folder.glob(pattern))
                held = {path.relative_to(folder).as_posix(): path for path in inside}
    if held:
        one = next(iter(held.values()))
        raise InputError(
            f"{folder}: has no {file}, but holds {some(list(held), most=8)}; give "
            + (f"{one}" if len(held) == 1 else f"one of them, as {one}")
        )


class _Cached(NamedTuple):
    """A repository's folder in a cache, and the name of one of its snapshots if that is meant."""

    root: Path
    snapshot: str | None


def _in_cache(folder: Path) -> _Cached | None:
    """What a folder is in Hugging Face's cache, by its path; None for every other folder."""
    whole = Path(os.path.abspath(folder))
    root = whole.parent if whole.name == "snapshots" else whole
    if root.name.startswith("models--") and not os.path.lexists(whole / CONFIG):
        return _Cached(root, None)
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):
        return _Cached(whole.parent.parent, whole.name)
    return None


def _name_of(root: Path) -> str:
    return root.name.removeprefix("models--").replace("--", "/", 1)


def _of_repository(root: Path, model: str, name: str, revision: str | None, need: str) -> Found:
    """The snapshot of a revision. model: as the user named it; name: of the repository."""
    commit, how = _chosen(root, model, name, revision, need)
    folder = root / "snapshots" / commit
    if not os.path.isdir(folder):
        command = _command(name, revision, root.parent, need)
        raise _incomplete(model, f"{root} has no snapshot {commit}, its {how}", command, need)
    _require_complete(folder, model, root, name, revision, need)
    return Found(folder, f"{model}: {_as(model, name)}{how} ({commit[:7]}), {folder}")


def _chosen(root: Path, model: str, name: str, revision: str | None, need: str) -> tuple[str, str]:
    """The commit of a revision, and how it was found. InputError where it is not clear which one is meant."""
    if (commit := _commit(root, revision or "main")) is not None:
        return commit, f"revision {revision or 'main'}"
    snapshots = sorted(path.name for path in (root / "snapshots").glob("*") if os.path.isdir(path))
    begun = [snapshot for snapshot in snapshots if snapshot.startswith((revision or "").lower())]
    if len(begun) == 1:
        return begun[0], "the only revision there, without a refs/main" if revision is None else "revision"
    if len(begun) > 1 and revision is None:
        problem = f"no refs/main, but several revisions: {some(begun)}; {_CHOOSE}"
    elif len(begun) > 1:
        problem = f"several revisions that begin with {revision}: {some(begun)}; give more of it"
    else:
        there = [*_references(root), *snapshots]
        problem = f"no revision {revision or 'main'}" + (f", only {some(there)}" if there else "")
        problem += f"; {_remedy(_command(name, revision, root.parent, need), 'fetches', need)}"
    raise InputError(f"{model}: {root} has {problem}")


def _commit(root: Path, revision: str) -> str | None:
    """The commit of a branch or a tag. The hub's own refs/pr/1 lies in refs/refs/pr/1."""
    for reference in (root / "refs" / revision, root / "refs/refs" / revision, root / revision):
        if os.path.isfile(reference) and (root / "refs") in reference.parents:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                commit = reference.read_text(encoding="utf-8").strip()
                if re.fullmatch(r"\w+", commit, re.ASCII):
                    return commit
    return None


def _references(root: Path) -> list[str]:
    refs = root / "refs"
    return sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if os.path.isfile(path))


def _require_complete(
    folder: Path, model: str, root: Path, name: str, revision: str | None, need: str
) -> None:
    unfinished = len(list((root / "blobs").glob("*.incomplete")))
    if lacking := missing_files(folder, need, name, begun=unfinished > 0):
        also = f", and {root / 'blobs'} has {unfinished} unfinished files" if unfinished else ""
        need = _lacked(folder, need)
        command = _command(name, revision, root.parent, need)
        raise _incomplete(model, f"{folder} lacks {lacking}{also}", command, need)


def missing_files(folder: Path, need: str, whose: str, begun: bool = False) -> str:
    """What an interrupted download has left out, in words; "" if the folder is complete.

    A link to a blob that is not there counts as missing. whose: the repository, since every published chat
    model has a generation_config.json. begun: some files are unfinished; then files that a folder can do
    without count as well. Pickled weights are for the loader to refuse.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:  # the loader says why
        return ""
    there = [name for name in names if os.path.exists(folder / name)]
    if need == VOCABULARY:
        return "" if need in there else need
    lacking = [CONFIG]
    if begun or need == TEXT:
        lacking.append(VOCABULARY)
    if begun or (need == TEXT and "-chat" in whose.lower() and repository(whose) in _PUBLISHED.values()):
        lacking.append(_GENERATION)
    lacking += [name for name in names if any(fnmatchcase(name, pattern) for pattern in FILES)]
    weights = _matching(names, "*.safetensors")
    for index in _matching(there, "*.safetensors.index.json") if weights or need != CONFIG else []:
        with contextlib.suppress(InputError):  # the loader says what is wrong with it
            lacking += _shards(read_json_object(folder / index))
    if not _matching(names, "*.safetensors.index.json"):
        sets = Counter(shard.groups() for shard in map(_SHARD.fullmatch, weights) if shard)
        for (stem, count), number in sets.items():
            if number < int(count):  # all of them need no index
                lacking.append(f"{stem}.safetensors.index.json")
        if need != CONFIG and not weights and not _matching(names, "*.bin"):
            lacking.append("*.safetensors")
    return some([name for name in dict.fromkeys(lacking) if name not in there], most=4)


def _matching(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _shards(index: dict[str, Any]) -> list[str]:
    shards = index.get("weight_map")
    if not isinstance(shards, dict):
        return []
    named = {name for name in shards.values() if isinstance(name, str) and "/" not in name}
    return _matching(sorted(named), "*.safetensors")


# What to do


def _is_unknown(name: str) -> bool:
    """Whether Qwen has no such repository of this generation."""
    return name.lower().startswith("qwen/") and name not in _PUBLISHED.values()


def instead(model: str) -> str | None:
    """What to give instead of what is neither a folder nor the name of a model, if that can be told."""
    if re.match("https?:/", model, re.IGNORECASE):
        return "of an address the part owner/name is needed, as Qwen/Qwen-1_8B"
    owner, _, name = model.rstrip("/").rpartition("/")
    if owner.lower() in ("", "qwen") and (near := get_close_matches(_key(name), _PUBLISHED, 1, cutoff=0.7)):
        return f"did you mean {_PUBLISHED[near[0]]}?"
    if owner.lower() == "qwen":
        return "there are Qwen-1_8B, -7B, -14B and -72B, each also with -Chat, -Chat-Int4 and -Chat-Int8"
    return None


def _as(model: str | Path, name: str) -> str:
    """The name under which a model was looked for, if it is not the one that was given."""
    return "" if str(model) == name else f"as {name} "


def _lacked(folder: Path, need: str) -> str:
    """What is to be fetched. inspect does not fetch weights: beside a configuration another command must."""
    return WEIGHTS if os.path.exists(folder / CONFIG) else need


def _incomplete(model: str | Path, what: str, command: str, need: str) -> InputError:
    return InputError(f"{model}: the download is not complete: {what}; {_remedy(command, 'completes', need)}")


def _remedy(command: str, does: str, need: str) -> str:
    """In a command and in Python. Only inspect needs no more than the configuration."""
    whose, what = (" of inspect", "its configuration") if need == CONFIG else (" of generate, chat, …", "it")
    return f"the option --download{whose} {does} {what}, or: {command}"


def _without_files(name: str, need: str) -> str:
    """What inspect says of a published size without any file."""
    size = _SIZE.fullmatch(name)
    return (
        ""
        if size is None or need != CONFIG
        else f"inspect {size[1].replace('_', '.').lower()} needs no file; "
    )


def _command(name: str, revision: str | None = None, cache: Path | None = None, need: str = WEIGHTS) -> str:
    """What fetches the files that are read with Hugging Face's own command."""
    files = CONFIG_FILES if need == CONFIG else FILES
    words = ["hf download", name, *(f'"{each}"' if "*" in each else each for each in files)]
    if revision is not None:
        words += ["--revision", revision]
    if cache is not None and cache != hugging_face_cache():
        words += ["--cache-dir", shlex.quote(str(cache))]
    return " ".join(words)


def _source(model: str | Path, revision: str | None) -> tuple[str, str | None, Path] | None:
    """Repository, revision and cache of what is to be fetched; None for a path outside of a cache."""
    if not os.path.exists(model):
        name = repository(model)
        if name is not None and (roots := _roots(name)):
            name = _name_of(roots[0])
        elif name is None or _is_unknown(name):
            return None
        return name, revision, hugging_face_cache()
    cached = _in_cache(Path(model))
    if cached is None or (cached.snapshot is not None and revision is not None):
        return None
    return _name_of(cached.root), cached.snapshot or revision, cached.root.parent


def _download(name: str, revision: str | None, cache: Path, patterns: Iterable[str]) -> Path:
    """Downloads into a cache; returns the snapshot's folder. Its progress goes to stderr."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the ranks of a machine wait for each other at a lock
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError("--download takes huggingface_hub: pip install 'qwen_ref[hub]' brings it") from None
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=list(patterns))
        )
    except Exception as error:  # of huggingface_hub, of what it fetches with, or of the disk
        if lacks_memory(error):
            raise
        kind = type(error).__name__
        said = textwrap.shorten(_CAUSES.get(kind) or f"{kind}: {error}", 300, placeholder=" …")
        raise InputError(f"{name} could not be fetched: {said}; HF_ENDPOINT names another server") from None
