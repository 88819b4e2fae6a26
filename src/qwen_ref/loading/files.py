"""Which files of a folder hold the weights: in the published form, and as tools leave a folder.

Tools write the same files under other names. AutoGPTQ takes a name of its own, which its settings give. Some
number the files and leave out the index. Where an index is there, it decides.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qwen_ref.checkpoint import INDEX_NAME, SINGLE_NAME, read_headers, read_index
from qwen_ref.config import InputError, file_problem, read_json_object, shown, some

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SUFFIX = ".safetensors"
_FIRST = "transformer.wte.weight"  # a file with this tensor holds weights of this model
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_BY_AUTOGPTQ = re.compile(r"(gptq_model-.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class WeightFiles(NamedTuple):
    """The files that hold the weights."""

    paths: list[Path]
    weight_map: dict[str, str]  # tensor → file, by the index; empty without one
    index_name: str  # of the index
    notes: list[str]  # on files that are there and are not read


def weight_files(folder: Path) -> WeightFiles:
    """The files of a folder. Raises ValueError where there are none, or several sets of them.

    For each name (model, or AutoGPTQ's) an index comes first, then one file, then numbered files without an
    index, if all of them are there.
    """
    there = sorted(path.name for path in folder.iterdir())
    for name in _names(folder, there):
        index, single = f"{name}{_SUFFIX}.index.json", f"{name}{_SUFFIX}"
        if index in there:
            weight_map = read_index(folder / index)
            files = sorted(set(weight_map.values()))
            if single in there and single not in files and _holds(folder / single, weight_map):
                raise InputError(f"both {single} and {index} are there; remove the one that is not meant")
        else:
            weight_map = {}
            files = [single] if single in there else _all_numbered(name, there)
        if files:
            notes = list(_notes(folder, files, weight_map, [file for file in there if file not in files]))
            return WeightFiles([folder / file for file in files], weight_map, index, notes)
    raise InputError(_none(folder, there))


def _names(folder: Path, there: list[str]) -> Iterator[str]:
    """The names that weights may have in this folder, without a suffix: the likeliest first."""
    given = _name_by_settings(folder)
    if given is not None:
        yield given
    yield SINGLE_NAME.removesuffix(_SUFFIX)
    by_autogptq = {match[1] for file in there if (match := _BY_AUTOGPTQ.fullmatch(file))}
    if len(by_autogptq) == 1:
        yield from by_autogptq


def _name_by_settings(folder: Path) -> str | None:
    """model_file_base_name of a GPTQ release's settings."""
    settings: list[Any] = []
    with contextlib.suppress(InputError):  # whoever reads these files says what is wrong with them
        settings.append(read_json_object(folder / "config.json").get("quantization_config"))
    with contextlib.suppress(InputError):
        settings.append(read_json_object(folder / "quantize_config.json"))
    names = [found.get("model_file_base_name") for found in settings if isinstance(found, dict)]
    for name in names:
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name)):
            raise InputError(f"model_file_base_name={shown(name)} must be the name of a file in the folder")
    return next((name.removesuffix(_SUFFIX) for name in names if name is not None), None)


def _all_numbered(name: str, there: list[str]) -> list[str]:
    """The files NAME-00001-of-0000N.safetensors and so on; none where not all N are there."""
    numbered = [file for file in there if (match := _NUMBERED.fullmatch(file)) and match[1] == name]
    return [] if any(_missing_beside(file, there) for file in numbered) else numbered


def _missing_beside(file: str, there: list[str]) -> list[str]:
    """The files of the same set as a numbered one that are not there."""
    match = _NUMBERED.fullmatch(file)
    assert match is not None
    count = min(int(match[3]), 10_000)
    return [
        other
        for number in range(1, count + 1)
        if (other := f"{match[1]}-{number:05}-of-{match[3]}{_SUFFIX}") not in there
    ]


def _tensors(path: Path) -> set[str] | None:
    """The names of a file's tensors; None where it cannot be read."""
    with contextlib.suppress(InputError):
        if file_problem(path) is None:
            return set(read_headers(path))
    return None


def _holds(path: Path, names: dict[str, str]) -> bool:
    """Whether a file holds all that an index names: then nobody can know which of the two is meant."""
    tensors = _tensors(path)
    return tensors is None or names.keys() <= tensors


def _notes(folder: Path, files: list[str], weight_map: dict[str, str], others: list[str]) -> Iterator[str]:
    """What to say of files that are not read: those with tensors of the model, and adapters."""
    for file in (file for file in others if file.endswith(_SUFFIX)):
        if _is_adapter(file):
            yield f"{file} is not applied: it is a LoRA adapter; merge it into the weights to use it"
        elif (tensors := _tensors(folder / file)) and tensors & (weight_map.keys() or {_FIRST}):
            yield f"{file} is not read, though it has tensors of the model; the weights are in {some(files)}"


def _is_adapter(file: str) -> bool:
    return file.startswith("adapter_model")


def _none(folder: Path, there: list[str]) -> str:
    """The message for a folder without weights: what is there, and why it was not taken."""
    pickles = [file for file in there if file.endswith(PICKLE_SUFFIXES)]
    found = [f"{file} ({_reason(folder, file, there)})" for file in there if file.endswith(_SUFFIX)]
    if pickles:
        message = (
            f"{some(pickles)}: pickled checkpoints are not read, since unpickling runs code from the file; "
            "use the safetensors release"
        )
    else:
        message = f"neither {SINGLE_NAME} nor {INDEX_NAME} is in the folder: fetch the weights"
    return f"{message}; not taken: {some(found, longest=400)}" if found else message


def _reason(folder: Path, file: str, there: list[str]) -> str:
    """Why a safetensors file was not taken for the weights."""
    if problem := file_problem(folder / file):
        return problem
    if _is_adapter(file):
        return "a LoRA adapter, not a model: merge it into its base model first"
    if _NUMBERED.fullmatch(file) and (missing := _missing_beside(file, there)):
        return f"without {some(missing, most=3)}: fetch all of the set"
    try:
        tensors = read_headers(folder / file)
    except InputError:
        return "not a complete safetensors file: fetch it again"
    if _BY_AUTOGPTQ.fullmatch(file):
        return "one of several; quantize_config.json's model_file_base_name says which is meant"
    if _FIRST in tensors:
        return f"its name is not one of a checkpoint's: rename it to {SINGLE_NAME}"
    if any(name.startswith("transformer.") for name in tensors):
        return "a part of a model: without its index the others are unknown"
    return (
        f"none of its tensors is this model's; it has {some(sorted(tensors), longest=60, most=2) or 'none'}"
    )
