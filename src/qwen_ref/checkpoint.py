"""From a published checkpoint folder to a model: the table of its tensors, and the mapped weights.

A folder holds config.json and one model.safetensors, or several files and model.safetensors.index.json.
qwen_ref.load_model, in loading/, also knows other file names. It looks for everything that can be wrong with
a folder, and then calls load_model here. `python -m qwen_ref.checkpoint inspect` prints what a folder holds.
"""

from __future__ import annotations

if __name__ == "__main__":  # python -m qwen_ref.checkpoint
    from qwen_ref.commands.inspect import main

    raise SystemExit(main())

import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen_ref.config import InputError, QwenConfig, read_json_object, shown, some
from qwen_ref.model import Qwen
from qwen_ref.parallel import join

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from qwen_ref.quantize.config import GPTQConfig
    from qwen_ref.quantize.gptq import StoredPacked

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# safetensors' names of the dtypes that weights may have.
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Buffers that old exports wrote beside the weights. They follow from the configuration.
IGNORED_SUFFIXES = (".attn.masked_bias", ".rotary_emb.inv_freq")


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
        """The shape of each rank's part. The last rank's part of embedding and head may have fewer rows."""
        if self.cut is None:
            return self.shape
        if self.cut == "columns":
            return (self.shape[0], self.shape[1] // ranks)
        return (-(-self.shape[0] // ranks), *self.shape[1:])

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part of the tensor, as a view. For "heads" it is (3, rows, …): rows of q, k and v."""
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
    device: str | torch.device = "cpu",
    group: str | ProcessGroup | None = None,
    *,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
    opened: tuple[QwenConfig, Mapping[str, Stored]] | None = None,
) -> Qwen:
    """The model of a published checkpoint folder, in eval mode, without gradients.

    The arguments are those of qwen_ref.load_model (loading/loader.py), which checks the folder first. But
    here, `device` is the device of this rank alone: "cuda" does not give each rank its own.
    opened: what open_checkpoint has given, or would give if the files had their published names.
    Raises ValueError if the folder is not in the published form, and RankLost if a rank is gone.
    """
    ranks, target = join(group, str(device)), torch.device(device)
    config, stored = opened or open_checkpoint(folder)
    table, wanted, size = tensor_table(config), compute_dtype(dtype, stored), ranks.size
    total, done = sum(stored[spec.published].bytes_of_rank(spec, size) for spec in table), 0
    if progress is not None:
        progress(done, total)
    with torch.device("meta"), NoInitialisation():  # names and shapes, no memory: the weights fill them
        model = Qwen(config, ranks)
    for _, specs in itertools.groupby(table, key=lambda spec: spec.name.split(".")[:2]):  # layer by layer
        with ranks.together():  # the ranks wait for each other after every layer, and learn of errors
            for spec in specs:
                tensor = stored[spec.published]
                owner, _, name = spec.name.rpartition(".")
                layer = model.get_submodule(owner)
                if packed and tensor.packed is not None:
                    tensor.packed.keep_in(layer, spec, ranks.rank, size, target, wanted)
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
    """Skips torch.nn.init. On the meta device it fills nothing, and normal_ there imports half of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if getattr(func, "__module__", None) == "torch.nn.init" else func(*args, **(kwargs or {}))


def compute_dtype(name: str, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype of this name; "auto": that of the matrices. ValueError if unknown, or auto and several."""
    kinds = sorted({t.dtype for t in stored.values() if len(t.shape) > 1 and t.packed is None})
    if name == "auto" and len(kinds) > 1:
        raise InputError(f"matrices are stored in {' and '.join(kinds)}; name the dtype (--dtype), not auto")
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    return STORED_DTYPES[kinds[0]] if name == "auto" else DTYPES[name]


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it. Its data is read only when it is asked for."""

    file: safe_open | None  # None: no file is there, only what it should hold
    published: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    packed: None = None  # not GPTQ; a StoredPacked (quantize/gptq.py) gives itself here

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
        """A rank's part, a view. device: where a packed weight would be dequantised."""
        return spec.part(self.read(), rank, ranks)


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
    """The configuration and, by published name, every tensor of the table.

    Raises ValueError for files that cannot be read, and tensors that are not those of the table.
    """
    config, gptq = QwenConfig.from_json(Path(folder) / "config.json"), packing(folder)
    found: dict[str, Stored] = {}
    weight_map = read_index(index) if os.path.lexists(index := Path(folder) / INDEX_NAME) else {}
    for file in sorted(set(weight_map.values())) or [SINGLE_NAME]:
        there = read_headers(Path(folder) / file)
        found |= {name: tensor for name, tensor in there.items() if weight_map.get(name, file) == file}
    table = tensor_table(config)
    if gptq is not None:
        from qwen_ref.quantize.gptq import with_packed

        found = with_packed(table, gptq, found)
    shapes = {name: tensor.dtype in STORED_DTYPES and tensor.shape for name, tensor in found.items()}
    wrong = [spec.published for spec in table if shapes.pop(spec.published, ()) != spec.shape]
    if wrong := wrong + sorted(shapes):
        raise InputError(f"{folder}: tensors are missing, or not those of config.json: {some(wrong)}")
    return config, found


def read_index(path: Path) -> dict[str, str]:
    """An index's weight_map: tensor → file. Raises ValueError where it names anything outside the folder."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f'{path.name}: "weight_map" must be an object of tensor names and file names')
    named = [file for file in weight_map.values() if isinstance(file, str) and file.endswith(".safetensors")]
    plain = [file for file in named if file.isprintable() and not set(file) & set("/\\:")]
    if len(plain) < len(weight_map):
        refused = dict.fromkeys(shown(file) for file in weight_map.values() if file not in plain)
        only = "weight_map may name only .safetensors files in the folder itself"
        raise InputError(f"{path.name}: {only}, not {some(refused)}")
    return weight_map


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name."""
    found = {}
    try:
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            if not name.endswith(IGNORED_SUFFIXES):
                header = file.get_slice(name)
                found[name] = StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name}: not a complete safetensors file ({error}); fetch it again") from None
    return found
