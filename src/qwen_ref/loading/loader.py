"""The loader that checks a checkpoint folder first and reports everything that is wrong with it at once.

checkpoint.py's load_model checks only that the right tensors are there. Before any weight is read, this one
finds damaged, doubled and misplaced files, pickles, Git LFS pointers and packed weights with impossible
values. With several ranks it checks that all load the same checkpoint, and gives each its own device.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from qwen_ref import checkpoint
from qwen_ref.checkpoint import (
    IGNORED_SUFFIXES,
    STORED_DTYPES,
    Stored,
    StoredTensor,
    compute_dtype,
    dtype_name,
    packing,
    read_headers,
    tensor_table,
)
from qwen_ref.config import InputError, QwenConfig, file_problem, some
from qwen_ref.loading.files import WeightFiles, weight_files
from qwen_ref.loading.folder import require_folder
from qwen_ref.loading.hub import find_model
from qwen_ref.loading.launch import launched
from qwen_ref.model import Qwen
from qwen_ref.parallel import ONE_RANK, Group, group_size, join
from qwen_ref.quantize import gptq as packed_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_logger = logging.getLogger(__name__)
# The dtypes of each kind of tensor. A GPTQ checkpoint has packed tensors and scales, too.
KINDS = {"weights": tuple(STORED_DTYPES), **packed_tensors.KINDS}


def load_model(
    folder: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    group: str | ProcessGroup | None = None,
    *,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
) -> Qwen:
    """The model of a published checkpoint folder, in eval mode, without gradients.

    folder: a folder, or a name such as "Qwen/Qwen-1_8B". A name is looked up in the caches of Hugging Face
    and ModelScope. Nothing is downloaded. revision: the branch, the tag or the commit of a name.
    dtype: "bfloat16", "float16", "float32", "float64", or "auto": the one that the matrices are stored in.
    device: "cpu", "cuda", …; with several ranks "cuda" gives each rank the device with its number.
    group: the ranks that share the model. Each reads only its own part. None is this process alone; "world"
    is torch.distributed's default process group, started from torchrun's variables if need be (with a timeout
    of 60 s); or any ProcessGroup. All ranks then make the same calls.
    packed: a GPTQ checkpoint's weights stay in their 4 or 8 bits, and are dequantised again in every pass:
    this takes less memory and more time. Otherwise they are dequantised here, exactly, and rounded to dtype.
    progress: called with the bytes done and the bytes in all of this rank, first before anything is read.

    On the CPU, weights that have the wanted dtype stay in the mapped file: a page is read when it is needed,
    the operating system may drop it again, and a checkpoint larger than memory still runs. Only the parts of
    a rank that are cut by columns are copied, and its bias of q, k and v.
    Files and tensors of the folder that are not read are logged as warnings.
    Raises ValueError with everything that is wrong with the folder, on all ranks if it is on one; with heads,
    MLP or vocabulary that cannot be cut for so many ranks, before any rank is waited for. Raises RankLost, a
    ConnectionError, where a rank is gone.
    """
    size = group_size(group)
    if size != 1 and group == "world" and not dist.is_initialized():
        launched()  # a wrong variable would otherwise be waited for
    check_cut(folder, size, revision)
    ranks = join(group, device)
    with ranks.together():
        target = _device(own_device(device, size))
        folder = find_model(folder, revision).folder
        config, stored, notes = opened(folder)
        wanted = compute_dtype(dtype, stored)
        if packed and not any(tensor.packed for tensor in stored.values()):
            raise InputError(f"{folder}: not a GPTQ checkpoint; only those can be kept packed")
        marks = fingerprint(config, wanted, stored) if size > 1 else {}
    ranks.require_same(str(folder), marks)
    check_values(folder, stored, ranks)
    if ranks.rank == 0:
        say_notes((*notes, *(_rounded(stored, wanted) if dtype == "auto" else ())))
    there = (config, stored)
    return checkpoint.load_model(folder, dtype, target, group, packed=packed, progress=progress, opened=there)


def say_notes(notes: Iterable[str]) -> None:
    """Logs what is to be said of a folder. A command prints it on stderr."""
    for note in notes:
        _logger.warning("%s", note)


def _rounded(stored: Mapping[str, Stored], dtype: torch.dtype) -> Iterator[str]:
    """What to say of tensors that have more bits than the dtype that the matrices are stored in."""
    wide = [name for name, tensor in stored.items() if STORED_DTYPES[tensor.dtype].itemsize > dtype.itemsize]
    if wide:
        kinds = sorted({dtype_name(STORED_DTYPES[stored[name].dtype]) for name in wide})
        found = f"{len(wide)} of {len(stored)} tensors are stored in {' and '.join(kinds)}"
        yield f"{found} and rounded to {dtype_name(dtype)}, as the matrices are: {some(wide, most=3)}"


def check_cut(folder: str | Path, ranks: int, revision: str | None = None) -> None:
    """Raises ValueError where the folder's model cannot be cut for so many ranks.

    A folder without a readable configuration passes: all ranks shall hear of that, once they have met.
    """
    try:
        folder = find_model(folder, revision).folder
        config, gptq = QwenConfig.from_json(Path(folder) / "config.json"), packing(folder)
    except ValueError:
        return
    config.check_ranks(ranks)
    if gptq is not None:
        gptq.check_ranks(config, ranks)


def check_values(folder: str | Path, stored: Mapping[str, Stored], ranks: Group = ONE_RANK) -> None:
    """Raises ValueError with all that is wrong with a GPTQ checkpoint's scales, zero points and groups.

    They are a twentieth of the checkpoint. Each rank reads some of them, and all hear of everything.
    """
    packed = [whole for tensor in stored.values() if (whole := tensor.packed) is not None]
    with ranks.together():
        own = "\n".join(line for tensor in packed[ranks.rank :: ranks.size] for line in tensor.problems())
    if problems := [line for text in ranks.texts(own) for line in text.splitlines()]:
        raise _refusal(folder, problems)


def fingerprint(config: QwenConfig, dtype: torch.dtype, stored: Mapping[str, Stored]) -> dict[str, object]:
    """What models differ in: the configuration, the dtype, and a hash of each tensor's first row.

    Two fine-tunings of one model differ only in the weights that were trained.
    """
    marks: dict[str, object] = {**vars(config), "dtype": dtype}
    for name, tensor in stored.items():
        whole = tensor.read() if tensor.packed is None else tensor.packed.parts[0].read()
        start = whole[:1] if whole.ndim > 1 else whole
        content = start.contiguous().view(torch.uint8).numpy().tobytes()
        marks[f"the start of {name}"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return marks


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # an assertion: torch built without CUDA
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from None
    if device.type == "meta":
        raise InputError("device 'meta' cannot be used: it holds no values")
    return device


def own_device(device: str, size: int) -> str:
    """The device of this rank: "cuda" is the one with the number of its place on this machine."""
    if size == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise InputError(f"device {device!r} is one for all ranks; give cuda: each rank then takes its own")
    count = torch.cuda.device_count()
    launch = launched()
    index = torch.cuda.current_device() if launch is None else launch.local_rank
    # SLURM and others show each process one device, its own. torchrun by itself shows all to all.
    if count == 1 and ("LOCAL_WORLD_SIZE" not in os.environ or "CUDA_VISIBLE_DEVICES" in os.environ):
        index = 0
    if index >= count:
        raise InputError(
            f"this is rank {index} on its machine, which has {count} CUDA devices; start at most as many "
            "ranks there"
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


class Opened(NamedTuple):
    """A checkpoint folder without any fault."""

    config: QwenConfig
    stored: dict[str, Stored]
    notes: list[str]  # what is there and not read


def open_checkpoint(folder: str | Path) -> tuple[QwenConfig, dict[str, Stored]]:
    """As checkpoint.open_checkpoint; its ValueError names everything that is wrong with the folder."""
    return opened(folder)[:2]


def opened(folder: str | Path) -> Opened:
    """open_checkpoint, and what is to be said of the folder though nothing is wrong with it."""
    require_folder(folder)
    folder = Path(folder)
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder}: Permission denied; reading it takes the right to list and to enter it")
    problems: list[str] = []
    config = gptq = None
    try:
        config, gptq = QwenConfig.from_json(folder / "config.json"), packing(folder)
    except ValueError as error:
        problems.append(str(error))
    files = WeightFiles([], {}, "", [])
    try:
        files = weight_files(folder)
    except ValueError as error:
        problems.append(str(error))
    found, complete = _read_headers(files, problems)
    if config is None:
        raise _refusal(folder, problems)
    table = tensor_table(config)
    optional: Collection[str] = ()
    expected = {spec.published: (spec.shape, "weights") for spec in table}
    if gptq is not None:
        expected, optional = packed_tensors.expected(table, gptq)
    _leave_out(found, expected, files)
    if gptq is not None:
        contradiction = packed_tensors.contradiction(table, gptq, found)
        if contradiction is not None:
            problems.append(contradiction)
        elif files.paths:
            problems += _compare(expected, optional, found, complete)
        if problems:  # all that can be known is said at once
            raise _refusal(folder, problems + packed_tensors.known_problems(table, gptq, found))
        return Opened(config, packed_tensors.with_packed(table, gptq, found), files.notes)
    if packed := [name for name in expected if f"{name.removesuffix('weight')}qweight" in found]:
        problems.append(
            f"{some(packed)}: packed weights, but neither config.json's quantization_config nor "
            "quantize_config.json says how"
        )
    elif files.paths:
        problems += _compare(expected, optional, found, complete)
    if problems:
        raise _refusal(folder, problems)
    return Opened(config, dict(found), files.notes)


def _refusal(folder: str | Path, problems: list[str]) -> InputError:
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return InputError(f"{folder}: {count}{some(problems, '; ', longest=4000)}")


def _read_headers(files: WeightFiles, problems: list[str]) -> tuple[dict[str, StoredTensor], bool]:
    """Every tensor by its published name, and whether all files could be read.

    Where a tensor is in two files, the index decides.
    """
    places: dict[str, dict[str, StoredTensor]] = {}  # tensor → file → header
    unread = set()
    for path in files.paths:
        try:
            if problem := file_problem(path):
                raise InputError(f"{path.name}: {problem}" + ("" if os.path.exists(path) else "; fetch it"))
            for name, header in read_headers(path).items():
                places.setdefault(name, {})[path.name] = header
        except ValueError as error:
            problems.append(str(error))
            unread.add(path.name)
    several = {name: place for name, place in places.items() if len(place) > 1}
    decided = [name for name, place in several.items() if files.weight_map.get(name) in place]
    if twice := [f"{name} ({' and '.join(several[name])})" for name in several if name not in decided]:
        problems.append(f"tensors stored twice: {some(twice)}")
    if decided:
        said = some(f"{name} from {files.weight_map[name]}" for name in decided)
        files.notes.append(f"tensors stored twice, of which {files.index_name} decides: {said}")
    misplaced = [
        f"{name} (not in {file})"
        for name, file in files.weight_map.items()
        if file not in unread and file not in places.get(name, ()) and not name.endswith(IGNORED_SUFFIXES)
    ]
    if misplaced:
        problems.append(f"{files.index_name} and the files disagree: {some(misplaced)}")
    found = {
        name: place.get(files.weight_map.get(name, ""), next(iter(place.values())))
        for name, place in places.items()
    }
    return found, not unread


def _leave_out(found: dict[str, StoredTensor], expected: Mapping[str, object], files: WeightFiles) -> None:
    """Drops what the index does not name and the configuration has no place for."""
    if stale := sorted(found.keys() - expected.keys() - files.weight_map.keys() if files.weight_map else ()):
        for name in stale:
            del found[name]
        files.notes.append(f"{some(stale)}: not read, since {files.index_name} does not name it")


def _compare(
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    optional: Collection[str],
    found: Mapping[str, StoredTensor],
    complete: bool,
) -> Iterator[str]:
    """What the headers contradict; expected: shape and kind by name. complete: all files were read."""
    missing = [name for name in expected if name not in found and name not in optional]
    extra = sorted(found.keys() - expected.keys())
    there = [(name, found[name], *wanted) for name, wanted in expected.items() if name in found]
    shaped = [
        f"{name} is {list(tensor.shape)}, should be {list(shape)}"
        for name, tensor, shape, _ in there
        if tensor.shape != shape
    ]
    problems = {
        "missing tensors": missing if complete else [],
        "tensors that the configuration has no place for": extra,
        "shapes that contradict config.json": shaped,
    }
    for kind, dtypes in KINDS.items():
        problems[f"{kind} must be {', '.join(dtypes)}"] = [
            f"{name} is {tensor.dtype}"
            for name, tensor, _, its_kind in there
            if its_kind == kind and tensor.dtype not in dtypes
        ]
    return (f"{problem}: {some(names)}" for problem, names in problems.items() if names)
