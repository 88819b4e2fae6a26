"""From a published checkpoint folder to a model: the table of its tensors, their checks, the mapped weights.

A folder holds config.json and either one model.safetensors or several shards with
model.safetensors.index.json. Everything that can be wrong with it is found before a weight is read, and
reported at once: from the files' headers, and in a GPTQ checkpoint from what belongs to the packed weights.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen_ref.cli import Parser, run
from qwen_ref.config import (
    GPTQConfig,
    InputError,
    QwenConfig,
    check_cut,
    file_problem,
    read_json_object,
    require_folder,
    shown,
)
from qwen_ref.gptq import (
    PackedWeight,
    StoredPacked,
    is_packed,
    keep_packed,
    module_of,
    packed_shapes,
    unpackable,
)
from qwen_ref.model import Qwen
from qwen_ref.parallel import ONE_RANK, Group, group_size, join, own_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors' names of the dtypes that weights may have.
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_DTYPES.values()}

PACKED_DTYPES = ("I32",)  # of a GPTQ checkpoint's packed tensors
SCALE_DTYPES = ("BF16", "F16", "F32")

# Buffers that old exports wrote beside the weights. They follow from the configuration.
_IGNORED_SUFFIXES = (".attn.masked_bias", ".rotary_emb.inv_freq")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_NAMED = 20  # tensors named per kind of problem; the rest are counted


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
        """A rank's part of the tensor, as a view.

        That of "heads" is (3, rows, …): its rows stand in three places, one in each third.
        """
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
    device: "cpu", "cuda", …; with several ranks, "cuda" is for each the one with its number on its machine.
    group: the ranks that share the model, each of which reads only its own part. None is this process alone;
    "world" is torch.distributed's default process group, started from torchrun's variables if need be (with
    a timeout of 60 s); or any ProcessGroup. The ranks then call the model alike.
    packed: a GPTQ checkpoint's weights stay in their 4 or 8 bits, and are dequantised anew in every pass:
    it takes less memory, and time. Otherwise they are dequantised here, exactly, and rounded to dtype.
    progress is called with the bytes done and the bytes in all of this rank, first before anything is read.

    On the CPU, weights that have the wanted dtype are used where they lie in the mapped file: nothing is read
    until it is needed, the system may drop the pages again, and a checkpoint larger than memory still runs.
    Only what is cut by columns is copied, a short stretch of each row, and the bias of q, k and v.
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
        if packed and not any(isinstance(tensor, StoredPacked) for tensor in stored.values()):
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
                part = stored[spec.published].part(spec, ranks.rank, size)
                owner, _, name = spec.name.rpartition(".")
                if isinstance(part, PackedWeight) and not packed:
                    part = part.to(target).dequantized()
                if isinstance(part, PackedWeight):
                    keep_packed(model.get_submodule(owner), part.to(target), wanted)
                else:
                    part = part.to(device=target, dtype=wanted)
                    if spec.cut == "columns":
                        part = part.contiguous()
                    elif spec.cut == "heads" and (part.is_contiguous() or spec.name.endswith("bias")):
                        part = part.reshape(spec.shape_of_rank(size))  # one matrix, unless it is a view
                    setattr(model.get_submodule(owner), name, nn.Parameter(part, requires_grad=False))
                done += stored[spec.published].bytes_of_rank(spec, size)
                if progress is not None:
                    progress(done, total)
    return model.eval()


def fingerprint(config: QwenConfig, dtype: torch.dtype, stored: dict[str, Stored]) -> dict[str, object]:
    """What tells models apart: the configuration, the dtype, and each tensor's first row, as a hash.

    Two fine-tunings of one model differ in nothing but their weights, and there in all that was trained.
    """
    marks: dict[str, object] = {**vars(config), "dtype": dtype}
    for name, tensor in stored.items():
        content = tensor.start().contiguous().view(torch.uint8).numpy().tobytes()
        marks[f"the start of {name}"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return marks


class NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are: nn.Embedding's normal_ on the meta device imports half of torch."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint by its file's header: nothing of its data is read before `read`."""

    file: safe_open | None  # None: no file is there, only what it should hold
    published: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    @property
    def form(self) -> str:
        return str(STORED_DTYPES[self.dtype]).removeprefix("torch.")

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self,)

    @property
    def nbytes(self) -> int:
        size = 4 if self.dtype in PACKED_DTYPES else STORED_DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * size

    def bytes_of_rank(self, spec: TensorSpec, ranks: int) -> int:
        return math.prod(spec.shape_of_rank(ranks)) * STORED_DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """The tensor, a view of the mapped file."""
        return self.file.get_tensor(self.published)

    def part(self, spec: TensorSpec, rank: int, ranks: int) -> Tensor:
        """A rank's part, a view."""
        return spec.part(self.read(), rank, ranks)

    def start(self) -> Tensor:
        """What tells it from other checkpoints' tensors of the name: its first row."""
        return self.read()[:1] if len(self.shape) > 1 else self.read()


Stored = StoredTensor | StoredPacked


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
        gptq = GPTQConfig.from_folder(folder)
    except ValueError as error:
        problems.append(str(error))
        config = None
    weight_map, files = _weight_files(folder, problems)
    found, unread = _read_headers(folder, files, weight_map, problems)
    if config is not None and files:
        _compare(tensor_table(config), gptq, found, problems, complete=not unread)
    if problems or config is None:
        if config is not None and gptq is not None:  # all that can be known is said at once
            sound = [
                spec for spec in tensor_table(config) if is_packed(spec) and _is_sound(spec, gptq, found)
            ]
            packed = with_packed(sound, gptq, found).values()
            problems += [line for tensor in packed for line in tensor.problems()]
        raise _refusal(folder, problems)
    return config, found if gptq is None else with_packed(tensor_table(config), gptq, found)


def check_packed(folder: str | Path, stored: dict[str, Stored], ranks: Group = ONE_RANK) -> None:
    """Raises ValueError with all that is wrong with scales, zero points, groups and zero biases.

    They are a twentieth of a GPTQ checkpoint. Each rank reads a part of them, and all hear of everything.
    """
    packed = [tensor for tensor in stored.values() if isinstance(tensor, StoredPacked)]
    with ranks.together():
        own = "\n".join(line for tensor in packed[ranks.rank :: ranks.size] for line in tensor.problems())
    problems = [line for text in ranks.texts(own) for line in text.splitlines()]
    if problems:
        raise _refusal(folder, problems)


def _refusal(folder: str | Path, problems: list[str]) -> InputError:
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return InputError(f"{folder}: {count}{_some(problems, '; ', longest=4000)}")


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
        files = sorted({file for file in weight_map.values() if isinstance(file, str)})
        refused = [file for file in weight_map.values() if not isinstance(file, str)]
        refused += [file for file in files if not _is_plain_safetensors_name(file)]
        if refused:
            problems.append(
                f"{INDEX_NAME}: weight_map may name only .safetensors files in the folder itself, "
                f"not {_some(map(shown, refused))}"
            )
            return {}, []
        return weight_map, files
    if single:
        return {}, [SINGLE_NAME]
    by_autogptq = [path.name for path in folder.glob("gptq_model-*.safetensors")]  # as it names its file
    if len(by_autogptq) == 1:
        return {}, by_autogptq
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        problems.append(
            f"{_some(pickles)}: pickled checkpoints are not read, since unpickling runs code from the file; "
            "use the safetensors release"
        )
    else:
        problems.append(f"neither {SINGLE_NAME} nor {INDEX_NAME} is in the folder")
    return {}, []


def _is_plain_safetensors_name(file: str) -> bool:
    return file.endswith(".safetensors") and file.isprintable() and not set(file) & set("/\\:")


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
        problems.append(f"tensors stored twice: {_some(duplicates)}")
    misplaced = [
        f"{name} (not in {file})"
        for name, file in weight_map.items()
        if file not in unread and place.get(name) != file and not name.endswith(_IGNORED_SUFFIXES)
    ]
    if misplaced:
        problems.append(f"{INDEX_NAME} and the files disagree: {_some(misplaced)}")
    return found, unread


def _compare(
    table: list[TensorSpec],
    gptq: GPTQConfig | None,
    found: dict[str, StoredTensor],
    problems: list[str],
    *,
    complete: bool,
) -> None:
    """Adds what the table and the headers disagree on; complete: every file was read, so a gap is a gap."""
    matrices = [spec for spec in table if is_packed(spec)]
    plain = [spec.published for spec in matrices if spec.published in found]
    packed = [name for spec in matrices if (name := f"{module_of(spec)}.qweight") in found]
    if packed and gptq is None:
        problems.append(
            f"{_some(packed)}: packed weights, but neither config.json's quantization_config nor "
            "quantize_config.json says how"
        )
        return
    if plain and gptq is not None:
        mixed = f" and {len(packed)} that are" if packed else ""
        problems.append(
            f"the configuration says GPTQ, {gptq.bits} bits, where every matrix of the layers is packed; "
            f"here are {len(plain)} that are not{mixed}: {_some(plain)}"
        )
        return
    if gptq is not None and (problem := unpackable(table, gptq)) is not None:
        problems.append(problem)
        return
    expected: dict[str, tuple[tuple[int, ...], Collection[str]]] = {}
    optional = set()
    for spec in table:
        if gptq is None or not is_packed(spec):
            expected[spec.published] = spec.shape, STORED_DTYPES
            continue
        for name, shape in packed_shapes(spec, gptq).items():
            expected[name] = shape, SCALE_DTYPES if name.endswith(".scales") else PACKED_DTYPES
        if (bias := f"{module_of(spec)}.bias") not in expected and spec.cut != "heads":
            expected[bias] = spec.shape[:1], STORED_DTYPES
            optional.add(bias)
    missing = [name for name in expected if name not in found and name not in optional]
    if missing and complete:
        problems.append(f"missing tensors: {_some(missing)}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        problems.append(f"tensors that the configuration has no place for: {_some(extra)}")
    shaped = [
        f"{name} is {list(found[name].shape)}, should be {list(shape)}"
        for name, (shape, _) in expected.items()
        if name in found and found[name].shape != shape
    ]
    if shaped:
        problems.append(f"shapes that contradict config.json: {_some(shaped)}")
    kinds = (("weights", STORED_DTYPES), ("packed tensors", PACKED_DTYPES), ("scales", SCALE_DTYPES))
    for what, names in kinds:
        typed = [
            f"{name} is {found[name].dtype}"
            for name, (_, dtypes) in expected.items()
            if dtypes is names and name in found and found[name].dtype not in dtypes
        ]
        if typed:
            problems.append(f"{what} must be {', '.join(names)}: {_some(typed)}")


def with_packed(
    table: list[TensorSpec], gptq: GPTQConfig, found: dict[str, StoredTensor]
) -> dict[str, Stored]:
    """The tensors by the table's names: four packed ones stand for a weight."""
    stored: dict[str, Stored] = {}
    for spec in table:
        if is_packed(spec):
            parts = tuple(found[name] for name in packed_shapes(spec, gptq))
            bias = None if spec.cut == "heads" else found.get(f"{module_of(spec)}.bias")
            stored[spec.published] = StoredPacked(parts, bias, gptq)
        else:
            stored[spec.published] = found[spec.published]
    return stored


def _is_sound(spec: TensorSpec, gptq: GPTQConfig, found: dict[str, StoredTensor]) -> bool:
    """Whether a packed weight's tensors are there as they should be, by the headers."""
    kinds = {True: SCALE_DTYPES, False: PACKED_DTYPES}
    return all(
        name in found and found[name].shape == shape and found[name].dtype in kinds[name.endswith(".scales")]
        for name, shape in packed_shapes(spec, gptq).items()
    )


def _some(items: Iterable[str], separator: str = ", ", longest: int = 200) -> str:
    """The first items, none of them endless, and how many more there are."""
    items = [item if len(item) <= longest else f"{item[:longest]}…" for item in items]
    rest = len(items) - _MOST_NAMED
    return separator.join(items[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def compute_dtype(name: str, stored: dict[str, Stored]) -> torch.dtype:
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


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.checkpoint", description="Look at a checkpoint without loading it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="tensors, shapes, dtypes, and the bytes of each rank",
        description="Print every kind of tensor, its cut, and what a rank must hold. No weight is read.",
    )
    inspect.add_argument(
        "folder",
        metavar="FOLDER",
        help="a checkpoint folder, a folder with config.json alone, or one of 1.8b, 7b, 14b, 72b",
    )
    inspect.add_argument("--tp", type=int, default=1, metavar="N", help="for N ranks (default: 1)")
    inspect.add_argument(
        "--context", type=int, metavar="T", help="with a cache of T positions (default: the trained length)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m qwen_ref.checkpoint`; returns its exit code (see cli.run)."""
    from qwen_ref.sizes import inspect

    return run(_parser(), inspect, arguments)


if __name__ == "__main__":
    sys.exit(main())
