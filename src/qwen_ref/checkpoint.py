"""From a published checkpoint folder to a model: the table of its tensors, their checks, the mapped weights.

A folder holds config.json and either one model.safetensors or several files and
model.safetensors.index.json. Everything that can be wrong with the folder is found before a weight is read,
and reported at once.
`python -m qwen_ref.checkpoint inspect` prints what a folder holds.
"""

from __future__ import annotations

if __name__ == "__main__":  # python -m qwen_ref.checkpoint
    from qwen_ref.commands.inspect import main

    raise SystemExit(main())

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen_ref.config import (
    InputError,
    QwenConfig,
    file_problem,
    read_json_object,
    require_folder,
    shown,
    some,
)
from qwen_ref.model import Qwen
from qwen_ref.parallel import ONE_RANK, Group, group_size, join, own_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from qwen_ref.quantize.config import GPTQConfig
    from qwen_ref.quantize.gptq import StoredPacked

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# safetensors' names of the dtypes that weights may have.
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# The dtypes of each kind of tensor. A GPTQ checkpoint has packed tensors and scales, too.
KINDS = {"weights": tuple(STORED_DTYPES), "packed tensors": ("I32",), "scales": ("BF16", "F16", "F32")}
# Buffers that old exports wrote beside the weights. They follow from the configuration.
_IGNORED_SUFFIXES = (".attn.masked_bias", ".rotary_emb.inv_freq")


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" and the like."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in STORED_DTYPES.values()}


class TensorSpec(NamedTuple):
    """One tensor: its name in the checkpoint and in the model, its shape, its cut for tensor parallelism.

    cut: "rows", "columns", "heads" (rows of q, of k and of v, each by heads), or None: whole on every rank.
    """

    published: str
    name: str
    shape: tuple[int, ...]
    cut: str | None

    def shape_of_rank(self, ranks: int) -> tuple[int, ...]:
        """The shape of each rank's part."""
        if self.cut is None:
            return self.shape
        if self.cut == "columns":
            return (self.shape[0], self.shape[1] // ranks)
        return (self.shape[0] // ranks, *self.shape[1:])

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of the tensor, as a view. That of "heads" is (3, rows, …): some of each third."""
        if self.cut is None or ranks == 1:
            return whole
        if self.cut == "heads":
            return whole.unflatten(0, (3, -1)).chunk(ranks, dim=1)[rank]
        return whole.chunk(ranks, dim=1 if self.cut == "columns" else 0)[rank]


def tensor_table(config: QwenConfig) -> list[TensorSpec]:
    """Every tensor of a checkpoint with this configuration, in the order in which data flows.

    >>> sum(math.prod(spec.shape) for spec in tensor_table(QwenConfig.preset("72b")))
    72287920128
    """
    D, F, V = config.hidden_size, config.mlp_width, config.vocab_size
    table = [TensorSpec("transformer.wte.weight", "embed.weight", (V, D), "rows")]
    for i in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        table += [
            TensorSpec(f"{theirs}.ln_1.weight", f"{ours}.attn_norm.weight", (D,), None),
            TensorSpec(f"{theirs}.attn.c_attn.weight", f"{ours}.attn.qkv.weight", (3 * D, D), "heads"),
            TensorSpec(f"{theirs}.attn.c_attn.bias", f"{ours}.attn.qkv.bias", (3 * D,), "heads"),
            TensorSpec(f"{theirs}.attn.c_proj.weight", f"{ours}.attn.out.weight", (D, D), "columns"),
            TensorSpec(f"{theirs}.ln_2.weight", f"{ours}.mlp_norm.weight", (D,), None),
            # w1 is up and w2 is gate: the reverse of Llama's w1.
            TensorSpec(f"{theirs}.mlp.w2.weight", f"{ours}.mlp.gate.weight", (F, D), "rows"),
            TensorSpec(f"{theirs}.mlp.w1.weight", f"{ours}.mlp.up.weight", (F, D), "rows"),
            TensorSpec(f"{theirs}.mlp.c_proj.weight", f"{ours}.mlp.down.weight", (D, F), "columns"),
        ]
    table.append(TensorSpec("transformer.ln_f.weight", "norm.weight", (D,), None))
    table.append(TensorSpec("lm_head.weight", "lm_head.weight", (V, D), "rows"))
    return table


def load_model(
    folder: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    group: str | ProcessGroup | None = None,
    *,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Qwen:
    """The model of a published checkpoint folder, in eval mode, without gradients.

    dtype: "bfloat16", "float16", "float32", "float64", or "auto": the one that the weights are stored in.
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
    Raises ValueError with everything that is wrong with the folder, on all ranks if it is on one; with heads,
    MLP or vocabulary that cannot be cut for so many ranks, before any rank is waited for. Raises RankLost, a
    ConnectionError, where a rank is gone.
    """
    size = group_size(group)
    check_cut(folder, size)
    ranks = join(group, device)
    with ranks.together():
        target = _device(own_device(device, size))
        config, stored = open_checkpoint(folder)
        wanted = compute_dtype(dtype, stored)
        if packed and not any(tensor.packed for tensor in stored.values()):
            raise InputError(f"{folder}: not a GPTQ checkpoint; only those can be kept packed")
        marks = fingerprint(config, wanted, stored) if size > 1 else {}
    ranks.require_same(str(folder), marks)
    check_packed(folder, stored, ranks)

    table = tensor_table(config)
    total, done = sum(stored[spec.published].bytes_of_rank(spec, size) for spec in table), 0
    if progress is not None:
        progress(done, total)
    with torch.device("meta"), NoInitialisation():  # names and shapes, no memory: the weights fill them
        model = Qwen(config, ranks)
    for _, specs in itertools.groupby(table, key=lambda spec: spec.name.split(".")[:2]):  # layer by layer
        with ranks.together():  # a rank that is slow or fails is so by one layer at most
            for spec in specs:
                tensor = stored[spec.published]
                owner, _, name = spec.name.rpartition(".")
                layer = model.get_submodule(owner)
                if packed and tensor.packed:
                    tensor.keep_in(layer, spec, ranks.rank, size, target, wanted)
                else:
                    part = tensor.part(spec, ranks.rank, size, target).to(device=target, dtype=wanted)
                    if spec.cut == "columns":
                        part = part.contiguous()
                    elif spec.cut == "heads" and (part.is_contiguous() or name == "bias"):
                        part = part.reshape(spec.shape_of_rank(size))  # one matrix, unless it is a view
                    setattr(layer, name, nn.Parameter(part, requires_grad=False))
                done += tensor.bytes_of_rank(spec, size)
                if progress is not None:
                    progress(done, total)
    return model.eval()


class NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are: nn.Embedding's normal_ on the meta device imports half of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def check_cut(folder: str | Path, ranks: int) -> None:
    """Raises ValueError where the folder's model cannot be cut for so many ranks.

    A folder without a readable configuration passes: all ranks shall hear of that, once they have met.
    """
    try:
        config, gptq = QwenConfig.from_json(Path(folder) / "config.json"), packing(folder)
    except ValueError:
        return
    config.check_ranks(ranks)
    if gptq is not None:
        gptq.check_ranks(config, ranks)


def fingerprint(config: QwenConfig, dtype: torch.dtype, stored: Mapping[str, Stored]) -> dict[str, object]:
    """What tells models apart: the configuration, the dtype, and each tensor's first row, as a hash.

    Two fine-tunings of one model differ in nothing but their weights, and there in all that was trained.
    """
    marks: dict[str, object] = {**vars(config), "dtype": dtype}
    for name, tensor in stored.items():
        content = tensor.start().contiguous().view(torch.uint8).numpy().tobytes()
        marks[f"the start of {name}"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return marks


def compute_dtype(name: str, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype of a name, "auto" being that of the stored tensors; ValueError where there is none."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    kinds = sorted({tensor.dtype for tensor in stored.values()})
    if len(kinds) > 1:
        raise InputError(
            f"the weights are stored in {' and '.join(kinds)}; name the dtype to compute in, not auto"
        )
    return STORED_DTYPES[kinds[0]]


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


# A folder, opened and checked. A GPTQ release packs its matrices: quantize/gptq.py knows what it has instead.


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint by its file's header: nothing of its data is read before it is asked for."""

    file: safe_open | None  # None: no file is there, only what it should hold
    published: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    @property
    def packed(self) -> bool:
        return False

    @property
    def form(self) -> str:
        return dtype_name(STORED_DTYPES[self.dtype])

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self,)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "I32" else STORED_DTYPES[self.dtype].itemsize)

    def bytes_of_rank(self, spec: TensorSpec, ranks: int) -> int:
        return math.prod(spec.shape_of_rank(ranks)) * STORED_DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """The tensor, a view of the mapped file."""
        assert self.file is not None
        return self.file.get_tensor(self.published)

    def part(self, spec: TensorSpec, rank: int, ranks: int, device: torch.device | None = None) -> Tensor:
        """A rank's part, a view. device: where a weight that is packed would be dequantised."""
        return spec.part(self.read(), rank, ranks)

    def start(self) -> Tensor:
        """What tells it from other checkpoints' tensors of the name: its first row."""
        return self.read()[:1] if len(self.shape) > 1 else self.read()


Stored: TypeAlias = "StoredTensor | StoredPacked"


def packing(folder: str | Path) -> GPTQConfig | None:
    """How a GPTQ release packs its weights; None for every other checkpoint."""
    config = Path(folder) / "config.json"
    beside = os.path.lexists(config.with_name("quantize_config.json"))
    if not beside and read_json_object(config).get("quantization_config") is None:
        return None
    from qwen_ref.quantize.config import GPTQConfig

    return GPTQConfig.from_json(config)


def open_checkpoint(folder: str | Path) -> tuple[QwenConfig, dict[str, Stored]]:
    """The configuration and, by published name, every tensor of the table; ValueError with all faults."""
    require_folder(folder)
    folder = Path(folder)
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder}: Permission denied; reading it takes the right to list and to enter it")
    problems: list[str] = []
    config = gptq = None
    try:
        config = QwenConfig.from_json(folder / "config.json")
        gptq = packing(folder)
    except ValueError as error:
        problems.append(str(error))
        config = None
    weight_map, files = _weight_files(folder, problems)
    found, unread = _read_headers(folder, files, weight_map, problems)
    if config is None:
        raise _refusal(folder, problems)
    table, optional, contradiction = tensor_table(config), set(), None
    if gptq is None:
        expected = {spec.published: (spec.shape, "weights") for spec in table}
        packed = [name for name in expected if f"{name.removesuffix('.weight')}.qweight" in found]
        if packed:
            contradiction = (
                f"{some(packed)}: packed weights, but neither config.json's quantization_config nor "
                "quantize_config.json says how"
            )
    else:
        from qwen_ref.quantize import gptq as packed_tensors

        expected, optional = packed_tensors.expected(table, gptq)
        contradiction = packed_tensors.contradiction(table, gptq, found)
    if contradiction is not None:
        problems.append(contradiction)
    elif files:
        problems += _compare(expected, optional, found, complete=not unread)
    if problems and gptq is not None:  # all that can be known is said at once
        problems += packed_tensors.known_problems(table, gptq, found)
    if problems:
        raise _refusal(folder, problems)
    return config, dict(found) if gptq is None else packed_tensors.with_packed(table, gptq, found)


def check_packed(folder: str | Path, stored: Mapping[str, Stored], ranks: Group = ONE_RANK) -> None:
    """Raises ValueError with all that is wrong with a GPTQ checkpoint's scales, zero points and groups.

    They are a twentieth of the checkpoint. Each rank reads some of them, and all hear of everything.
    """
    packed = [tensor for tensor in stored.values() if tensor.packed]
    with ranks.together():
        own = "\n".join(line for tensor in packed[ranks.rank :: ranks.size] for line in tensor.problems())
    problems = [line for text in ranks.texts(own) for line in text.splitlines()]
    if problems:
        raise _refusal(folder, problems)


def _refusal(folder: str | Path, problems: list[str]) -> InputError:
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return InputError(f"{folder}: {count}{some(problems, '; ', longest=4000)}")


def _weight_files(folder: Path, problems: list[str]) -> tuple[dict[str, str], list[str]]:
    """The index's map from tensor to file (empty without an index) and the files to open."""
    indexed, single = (os.path.lexists(folder / name) for name in (INDEX_NAME, SINGLE_NAME))
    if indexed and single:
        problems.append(f"both {SINGLE_NAME} and {INDEX_NAME} are there; remove the one that is not meant")
        return {}, []
    if indexed:
        try:
            weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
        except ValueError as error:
            problems.append(str(error))
            return {}, []
        if not isinstance(weight_map, dict) or not weight_map:
            problems.append(f'{INDEX_NAME}: "weight_map" must be an object of tensor names and file names')
            return {}, []
        refused = [file for file in weight_map.values() if not _is_plain_safetensors_name(file)]
        if refused:
            problems.append(
                f"{INDEX_NAME}: weight_map may name only .safetensors files in the folder itself, "
                f"not {some(dict.fromkeys(map(shown, refused)))}"
            )
            return {}, []
        return weight_map, sorted(set(weight_map.values()))
    if single:
        return {}, [SINGLE_NAME]
    by_autogptq = [path.name for path in folder.glob("gptq_model-*.safetensors")]  # as it names its file
    if len(by_autogptq) == 1:
        return {}, by_autogptq
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    problems.append(
        f"{some(pickles)}: pickled checkpoints are not read, since unpickling runs code from the file; use "
        "the safetensors release"
        if pickles
        else f"neither {SINGLE_NAME} nor {INDEX_NAME} is in the folder"
    )
    return {}, []


def _is_plain_safetensors_name(file: object) -> bool:
    named = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable()
    return named and not set(str(file)) & set("/\\:")


def _read_headers(
    folder: Path, files: list[str], weight_map: dict[str, str], problems: list[str]
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Every tensor by its published name, and the files that could not be read."""
    found: dict[str, StoredTensor] = {}
    place: dict[str, str] = {}
    duplicates = []
    unread = set()
    for file in files:
        problem = file_problem(folder / file)
        if problem is None:
            try:
                handle = safe_open(folder / file, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (safe_open is no dict)
                    if name.endswith(_IGNORED_SUFFIXES):
                        continue
                    if name in place:
                        duplicates.append(f"{name} ({place[name]} and {file})")
                        continue
                    header = handle.get_slice(name)
                    found[name] = StoredTensor(handle, name, tuple(header.get_shape()), header.get_dtype())
                    place[name] = file
            except (SafetensorError, OSError) as error:
                problem = f"not a complete safetensors file ({error}); fetch it again"
        if problem is not None:
            problems.append(f"{file}: {problem}")
            unread.add(file)
    if duplicates:
        problems.append(f"tensors stored twice: {some(duplicates)}")
    misplaced = [
        f"{name} (not in {file})"
        for name, file in weight_map.items()
        if file not in unread and place.get(name) != file and not name.endswith(_IGNORED_SUFFIXES)
    ]
    if misplaced:
        problems.append(f"{INDEX_NAME} and the files disagree: {some(misplaced)}")
    return found, unread


def _compare(
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    optional: Collection[str],
    found: Mapping[str, StoredTensor],
    complete: bool,
) -> Iterator[str]:
    """What the headers contradict; expected: shape and kind by name. complete: all files were read."""
    missing = [name for name in expected if name not in found and name not in optional]
    if missing and complete:
        yield f"missing tensors: {some(missing)}"
    if extra := sorted(found.keys() - expected.keys()):
        yield f"tensors that the configuration has no place for: {some(extra)}"
    there = {name: (found[name], *wanted) for name, wanted in expected.items() if name in found}
    shaped = [
        f"{name} is {list(tensor.shape)}, should be {list(shape)}"
        for name, (tensor, shape, _) in there.items()
        if tensor.shape != shape
    ]
    if shaped:
        yield f"shapes that contradict config.json: {some(shaped)}"
    for kind, dtypes in KINDS.items():
        typed = [
            f"{name} is {tensor.dtype}"
            for name, (tensor, _, its_kind) in there.items()
            if its_kind == kind and tensor.dtype not in dtypes
        ]
        if typed:
            yield f"{kind} must be {', '.join(dtypes)}: {some(typed)}"
