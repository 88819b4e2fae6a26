"""Golden bundles: what a model computed for some ids, stage by stage, in one safetensors file.

Any language that writes safetensors can write a bundle; README.md here has the format. A stage has the name
of its place in model.py, as `blocks.3.attn.q_rotated`, or the name of the published code's module. Its shape
is (B, T, numbers of the stage); the last dimension may also be split into heads.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_ref import __version__
from qwen_ref.checkpoint import DTYPES, STORED_DTYPES, Stored
from qwen_ref.commands.files import new_file, read_stream
from qwen_ref.config import InputError, QwenConfig, file_problem, parse_json, shown

FORMAT_VERSION = 1

# What a layer computes, in data-flow order.
LAYER_STAGES = {
    "attn_norm": "the norm before attention",
    "attn.q": "the query third of the fused projection, before rotation",
    "attn.k": "the key third of the fused projection, before rotation",
    "attn.v": "the value third of the fused projection",
    "attn.q_rotated": "the rotation of queries",
    "attn.k_rotated": "the rotation of keys",
    "attn.q_scaled": "LogN's scaling of queries",
    "attn.mixed": "scores, mask, softmax and the sum of values",
    "attn.out": "attention's output projection",
    "attn_residual": "the residual sum after attention",
    "mlp_norm": "the norm before the MLP",
    "mlp.gate": "the gate projection",
    "mlp.up": "the up projection",
    "mlp.product": "up times silu(gate)",
    "mlp.down": "the down projection",
    "residual": "the residual sum after the MLP",
}
OUTER_STAGES = {"embed": "the embedding", "norm": "the final norm", "logits": "the output head"}

# The published code's module names. c_attn holds q, k and v, one after another.
_ALIASES = {
    "transformer.wte": "embed",
    "transformer.h.N.ln_1": "blocks.N.attn_norm",
    "transformer.h.N.attn.rotary_q": "blocks.N.attn.q_rotated",
    "transformer.h.N.attn.rotary_k": "blocks.N.attn.k_rotated",
    "transformer.h.N.attn.c_proj": "blocks.N.attn.out",
    "transformer.h.N.ln_2": "blocks.N.mlp_norm",
    "transformer.h.N.mlp.w1": "blocks.N.mlp.up",
    "transformer.h.N.mlp.w2": "blocks.N.mlp.gate",
    "transformer.h.N.mlp.c_proj": "blocks.N.mlp.down",
    "transformer.h.N.mlp": "blocks.N.mlp.down",
    "transformer.h.N": "blocks.N.residual",
    "transformer.ln_f": "norm",
    "lm_head": "logits",
}
_FUSED = "transformer.h.N.attn.c_attn"

# A bundle with other sizes is of another model; other fields that differ may be a port's mistake.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "vocab_size")

# Logits may lack this share of the vocabulary: the published sizes have 85 or 213 rows of padding.
PADDING_SHARE = 10

_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
_LAYER = re.compile(rf"blocks\.({_NUMBER.pattern})\.(.+)")
_PUBLISHED_LAYER = re.compile(rf"transformer\.h\.({_NUMBER.pattern})((?:\..+)?)")
_ORDER = {stage: i for i, stage in enumerate(LAYER_STAGES)}

_STORED_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()} | {torch.int64: "I64"}


def stage_widths(config: QwenConfig) -> dict[str, int]:
    """Every stage of a model, in data-flow order → how many numbers a position has there."""
    D, F = config.hidden_size, config.mlp_width
    widths = {stage: F if stage in ("mlp.gate", "mlp.up", "mlp.product") else D for stage in LAYER_STAGES}
    layers = {
        f"blocks.{layer}.{stage}": width
        for layer in range(config.num_hidden_layers)
        for stage, width in widths.items()
    }
    return {"embed": D, **layers, "norm": D, "logits": config.vocab_size}


def meaning(stage: str) -> str:
    """What the stage computes, in words."""
    layer = _LAYER.fullmatch(stage)
    return f"{LAYER_STAGES[layer[2]]} in layer {layer[1]}" if layer else OUTER_STAGES[stage]


def layer_of(stage: str) -> int | None:
    """The layer of a stage; None for embed, norm and logits."""
    layer = _LAYER.fullmatch(stage)
    return int(layer[1]) if layer else None


def flow(stage: str) -> tuple[int, int, int]:
    """The key that sorts stages of any model into data-flow order."""
    match = _LAYER.fullmatch(stage)
    if match:
        return 1, int(match[1]), _ORDER[match[2]]
    return {"embed": 0, "norm": 2, "logits": 3}[stage], 0, 0


@dataclass
class Bundle:
    """An opened bundle; its tensors are read when asked for.

    >>> truth = read_bundle("truth.safetensors")
    >>> truth.stage("blocks.0.attn_norm").shape  # (B, T, D)
    """

    path: str
    dtype: str  # that of the computation; the tensors may be stored in another
    # Where they differ: the dtype of the weights, and of everything else.
    weights_dtype: str | None
    activations_dtype: str | None
    input_ids: Tensor  # (B, T), int64
    attention_mask: Tensor | None  # (B, T), 1 for a token; padding is on the left
    prefill_length: int  # positions computed in one pass; each later one was a decode step
    config: dict[str, Any]  # QwenConfig's fields; empty if the writer gave none
    weights_sha256: str | None  # as weights_checksum makes it
    # dtype → stage → the reference's own rounding error, measured against this bundle: see Rounding
    rounding: dict[str, dict[str, tuple[float, float]]]
    _file: safe_open
    _places: dict[str, tuple[str, int | None]]  # stage → (tensor's name, which third of it; None: all)
    fill: float | None = (
        None  # logits with this value are no scores: they were filtered out, and are read as 0
    )

    @property
    def computed_in(self) -> str:
        """The dtype of the activations."""
        return self.activations_dtype or self.dtype

    @property
    def coarsest(self) -> str:
        """Of the dtypes that it declares, the one that rounds most."""
        declared = {self.dtype, self.weights_dtype or self.dtype, self.computed_in}
        return max(declared, key=lambda dtype: torch.finfo(DTYPES[dtype]).eps)

    @property
    def stages(self) -> list[str]:
        """Its stages by our names, in data-flow order."""
        return sorted(self._places, key=flow)

    @property
    def real(self) -> Tensor:
        """(B, T), True for tokens, False for padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask != 0

    def stage(self, name: str) -> Tensor:
        """(B, T, numbers of the stage), as stored."""
        found = _tensor(self._file, self._places[name], self.input_ids)
        return found if name != "logits" or self.fill is None else found.masked_fill(found == self.fill, 0)

    def width(self, name: str) -> int:
        """How many numbers a position has at a stage."""
        tensor_name, third = self._places[name]
        size = math.prod(self._file.get_slice(tensor_name).get_shape()) // self.input_ids.numel()
        return size if third is None else size // 3

    def stored_dtype(self, name: str) -> torch.dtype:
        return STORED_DTYPES[self._file.get_slice(self._places[name][0]).get_dtype()]

    def check_model(self, config: QwenConfig) -> None:
        """Raises ValueError where ids or shapes do not fit a model."""
        low, high = int(self.input_ids.min()), int(self.input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"{self.path}: token id {low if low < 0 else high} is outside the model's vocabulary, "
                f"0 to {config.vocab_size - 1}"
            )
        for name, value in self.config.items():
            ours = getattr(config, name)
            if name in _SIZES and value != ours:
                raise InputError(f"{self.path}: is of a model with {name}={value}, this one has {ours}")
        widths = stage_widths(config)
        wrong = []
        for stage in self.stages:
            name, third = self._places[stage]
            if stage not in widths:
                wrong.append(f"{name} is there, the model has {config.num_hidden_layers} layers")
            elif not self._fits(stage, widths[stage]):
                shape = list(self._file.get_slice(name).get_shape())
                wanted = [*self.input_ids.shape, widths[stage] * (1 if third is None else 3)]
                wrong.append(f"{name} is {shape}, should be {wanted}")
        if wrong:
            raise InputError(f"{self.path}: does not fit the model: {'; '.join(wrong[:4])}")

    def _fits(self, stage: str, width: int) -> bool:
        """Logits may be cut to the ids that the tokenizer has: the vocabulary ends with padding."""
        least = width - width // PADDING_SHARE if stage == "logits" else width
        return least <= self.width(stage) <= width

    def first_not_finite(self) -> tuple[str, int, int] | None:
        """The first stage with a NaN or an infinity at a token, with the row and the position."""
        for stage in self.stages:
            bad = (~self.stage(stage).isfinite()).any(dim=-1) & self.real
            if bad.any():
                row, position = bad.nonzero()[0].tolist()
                return stage, row, position
        return None

    def require_finite(self) -> None:
        """Raises ValueError, with the stage, for a NaN or an infinity at a token."""
        found = self.first_not_finite()
        if found is not None:
            stage, row, position = found
            values = self.stage(stage)[row, position]
            count = int((~values.isfinite()).sum())
            raise InputError(
                f"{self.path}: {count} of {values.numel()} numbers are NaN or infinite first at {stage}, "
                f"row {row}, position {position}: look at {meaning(stage)}"
            )


def read_bundle(path: str | Path) -> Bundle:
    """Opens a bundle; ValueError for a file that is no bundle, incomplete, newer, or contradictory."""
    problem = file_problem(path)
    if problem is not None:
        raise InputError(f"{str(path) or repr('')}: {problem}")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a complete safetensors file ({error})") from None
    try:
        return _read(str(path), file)
    except (ValueError, RuntimeError, SafetensorError) as error:  # also of shapes that nothing can hold
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None


def _read(path: str, file: safe_open) -> Bundle:
    metadata = file.metadata() or {}
    _check_version(metadata)
    names = set(file.keys())
    if "input_ids" not in names:
        raise InputError("no tensor input_ids: a bundle says for which ids it was computed")
    input_ids = as_ids(file.get_tensor("input_ids"))
    leading = tuple(input_ids.shape)
    mask = None
    if "attention_mask" in names:
        mask = as_mask(file.get_tensor("attention_mask"), input_ids)
    input_ids = input_ids.view(-1, leading[-1])  # one sequence may be given without its batch dimension
    places: dict[str, tuple[str, int | None]] = {}
    unknown = []
    for name in sorted(names - {"input_ids", "attention_mask"}):
        stages = _stages_of(name)
        if not stages:
            unknown.append(shown(name))
            continue
        header = file.get_slice(name)
        shape = tuple(header.get_shape())
        if header.get_dtype() not in STORED_DTYPES:
            raise InputError(f"{name} is {header.get_dtype()}, should be {', '.join(STORED_DTYPES)}")
        if shape[: len(leading)] != leading or len(shape) == len(leading) or 0 in shape:
            raise InputError(f"{name} is {list(shape)}, should begin with input_ids' {list(leading)}")
        if len(stages) == 3 and (math.prod(shape) // input_ids.numel()) % 3:
            raise InputError(f"{name} is {list(shape)}, which has no three equal parts for q, k and v")
        for third, stage in enumerate(stages):
            place = name, third if len(stages) == 3 else None
            if stage in places:
                first, second = (_tensor(file, found, input_ids) for found in (places[stage], place))
                if first.shape != second.shape or not torch.equal(first.nan_to_num(), second.nan_to_num()):
                    other = places[stage][0]
                    raise InputError(f"{other} and {name} are both {stage}, and differ; leave one out")
            places[stage] = place
    if unknown:
        raise InputError(
            f"{', '.join(unknown[:4])}: no stage of this format; parity/README.md lists them, "
            "for example embed, blocks.0.attn.q, logits"
        )
    if not places:
        raise InputError("no stage in it; logits alone would do")
    return Bundle(
        path=path,
        dtype=_metadata_dtype(metadata, "dtype"),
        weights_dtype=_metadata_dtype(metadata, "weights_dtype") if "weights_dtype" in metadata else None,
        activations_dtype=(
            _metadata_dtype(metadata, "activations_dtype") if "activations_dtype" in metadata else None
        ),
        input_ids=input_ids,
        attention_mask=mask,
        prefill_length=_prefill_length(metadata, input_ids, mask),
        config=_metadata_config(metadata),
        weights_sha256=_metadata_checksum(metadata),
        rounding=_metadata_rounding(metadata),
        _file=file,
        _places=places,
    )


def _tensor(file: safe_open, place: tuple[str, int | None], input_ids: Tensor) -> Tensor:
    """(B, T, numbers of the stage), as stored."""
    name, third = place
    found = file.get_tensor(name).reshape(*input_ids.shape, -1)
    return found if third is None else found.chunk(3, dim=-1)[third]


def as_ids(ids: Tensor) -> Tensor:
    """Ids (B, T) or (T,) in int64; ValueError for anything else."""
    if not isinstance(ids, Tensor) or ids.is_meta or ids.is_sparse:
        raise InputError(f"input_ids is {shown(ids)}, should be a tensor of integers")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise InputError(f"input_ids is {ids.dtype}, should be integers")
    if ids.ndim not in (1, 2) or ids.numel() == 0:
        raise InputError(f"input_ids is {list(ids.shape)}, should be (batch, at least one token)")
    return ids.long()


def as_mask(mask: Tensor, ids: Tensor) -> Tensor | None:
    """A mask (B, T) of 0 and 1 in int64, or None if there is no padding; ValueError for anything else."""
    right = isinstance(mask, Tensor) and not mask.is_meta and mask.shape == ids.shape
    if right:
        tokens = mask != 0
        start = torch.arange(ids.shape[-1], device="cpu") >= (~tokens).sum(dim=-1, keepdim=True)
        right = torch.equal(tokens, start) and bool(tokens.any(dim=-1).all() and (mask[tokens] == 1).all())
    if not right:
        raise InputError(
            "attention_mask must have input_ids' shape and be 0 … 0 1 … 1 in every row: padding on the left, "
            "at least one token"
        )
    return None if bool(tokens.all()) else mask.long().view(-1, ids.shape[-1])


def _check_version(metadata: dict[str, str]) -> None:
    found = metadata.get("format_version")
    if found is None:
        raise InputError(
            'not a bundle: its metadata has no "format_version"; a writer puts {"format_version": "1", '
            '"dtype": "float32"} there; parity/README.md has the rest'
        )
    if not _NUMBER.fullmatch(found) or found == "0":
        raise InputError(f"format_version is {shown(found)}, should be {FORMAT_VERSION}")
    if int(found) > FORMAT_VERSION:
        raise InputError(
            f"format_version is {found}, and this qwen_ref reads up to {FORMAT_VERSION}; use a newer one"
        )


def _stages_of(name: str) -> list[str]:
    """The stages that a tensor holds, by our names: none, one, or the three of the fused projection."""
    published = _PUBLISHED_LAYER.fullmatch(name)
    if published:
        layer, rest = published.groups()
        if f"transformer.h.N{rest}" == _FUSED:
            return [f"blocks.{layer}.attn.{part}" for part in "qkv"]
        stage = _ALIASES.get(f"transformer.h.N{rest}")
        return [stage.replace("N", layer)] if stage else []
    if name in _ALIASES and "N" not in name:
        return [_ALIASES[name]]
    ours = _LAYER.fullmatch(name)
    known = ours[2] in LAYER_STAGES if ours else name in OUTER_STAGES
    return [name] if known else []


def _metadata_dtype(metadata: dict[str, str], key: str) -> str:
    found = metadata.get(key)
    if found not in DTYPES:
        raise InputError(
            f"metadata's {key} is {shown(found)}, should be the one that was computed in: {', '.join(DTYPES)}"
        )
    return found


def _prefill_length(metadata: dict[str, str], input_ids: Tensor, mask: Tensor | None) -> int:
    T = input_ids.shape[1]
    found = metadata.get("prefill_length", str(T))
    least = 1 if mask is None else int((mask == 0).sum(dim=-1).max()) + 1  # behind all padding
    if not _NUMBER.fullmatch(found) or not least <= int(found) <= T:
        raise InputError(
            f"metadata's prefill_length is {shown(found)}, should be a whole number from {least} to {T}: "
            "the positions that were computed in the first pass"
        )
    return int(found)


def _metadata_config(metadata: dict[str, str]) -> dict[str, Any]:
    found = _metadata_json(metadata, "config")
    known = {field.name for field in fields(QwenConfig)}
    config = {name: value for name, value in found.items() if name in known}
    for name, value in config.items():
        if not isinstance(value, int | float) or not abs(value) < 1e15:
            raise InputError(f"metadata's config: {name} is {shown(value)}, should be a number")
    return config


def _metadata_checksum(metadata: dict[str, str]) -> str | None:
    found = metadata.get("weights_sha256")
    if found is not None and not re.fullmatch("[0-9a-f]{64}", found):
        raise InputError(f"metadata's weights_sha256 is {shown(found)}, should be 64 hexadecimal digits")
    return found


def _metadata_rounding(metadata: dict[str, str]) -> dict[str, dict[str, tuple[float, float]]]:
    rounding: dict[str, dict[str, tuple[float, float]]] = {}
    for dtype, stages in _metadata_json(metadata, "rounding").items():
        if dtype not in DTYPES or not isinstance(stages, dict):
            raise InputError("metadata's rounding must be {dtype: {stage: [all, worst position]}}")
        rounding[dtype] = {}
        for stage, pair in stages.items():
            numbers = isinstance(pair, list) and len(pair) == 2 and not any(isinstance(x, bool) for x in pair)
            if not numbers or not all(isinstance(x, int | float) and 0 <= x < 1 for x in pair):
                raise InputError(
                    f"metadata's rounding of {shown(stage)} is {shown(pair)}, not two "
                    "numbers from 0 to below 1"
                )
            rounding[dtype][stage] = (float(pair[0]), float(pair[1]))
    return rounding


def _metadata_json(metadata: dict[str, str], key: str) -> dict[str, Any]:
    try:
        found = parse_json(metadata.get(key, "{}"))
    except ValueError as error:
        raise InputError(f"metadata's {key} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"metadata's {key} must be a JSON object")
    return found


# Writing


def write_bundle(
    path: str | Path,
    input_ids: Tensor,
    stages: Mapping[str, Tensor],
    *,
    dtype: str,
    attention_mask: Tensor | None = None,
    prefill_length: int | None = None,
    config: QwenConfig | None = None,
    weights_sha256: str | None = None,
    weights_dtype: str | None = None,
    activations_dtype: str | None = None,
) -> None:
    """Writes what an implementation computed, for `check`, `diff` and `diagnose` to read.

    stages: by name, ours or the published code's, each (B, T, …). dtype: the dtype of the computation.
    weights_dtype, activations_dtype: where the two differ, as in an engine whose weights are bfloat16 and
    whose residual stream is float32.
    Raises ValueError for everything that `read_bundle` refuses; then nothing is written.
    """
    ids = as_ids(input_ids)
    tensors = {"input_ids": ids}
    if attention_mask is not None:
        as_mask(attention_mask, ids)
        tensors["attention_mask"] = attention_mask.long()
    for name, tensor in stages.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_sparse or not _stages_of(str(name)):
            raise InputError(f"stages: {shown(name)} is no tensor or no stage of this format")
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"{name} is {tensor.dtype}, should be {', '.join(DTYPES)}")
        tensors[name] = tensor
    length = ids.shape[-1] if prefill_length is None else prefill_length
    metadata = bundle_metadata(dtype, length, config, weights_sha256)
    metadata |= {
        key: value
        for key, value in (("weights_dtype", weights_dtype), ("activations_dtype", activations_dtype))
        if value is not None
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with BundleWriter(path, kinds, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.describe({})
        try:
            read_bundle(writer.partial)
        except InputError as error:
            raise InputError(str(error).replace(str(writer.partial), str(path))) from None


def bundle_metadata(
    dtype: str, prefill_length: int, config: QwenConfig | None, weights_sha256: str | None
) -> dict[str, str]:
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "dtype": dtype,
        "prefill_length": str(prefill_length),
        "tool": f"qwen_ref {__version__}",
        "torch": torch.__version__,
    }
    if config is not None:
        metadata["config"] = json.dumps(asdict(config))
    if weights_sha256 is not None:
        metadata["weights_sha256"] = weights_sha256
    return metadata


class BundleWriter:
    """A safetensors file written piece by piece: a layer at a time, and position by position when decoding.

    The library's own writer needs every tensor in memory. The file gets its name when it is complete.
    """

    def __init__(
        self,
        path: str | Path,
        kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: dict[str, str],
        room: int = 0,
    ) -> None:
        """kinds: dtype and shape of every tensor. room: bytes for what `describe` adds to the metadata."""
        self._whole = new_file(path)
        self.metadata, end = metadata, 0
        self.entries: dict[str, dict[str, Any]] = {}
        for name, (dtype, shape) in kinds.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self.entries[name] = {
                "dtype": _STORED_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        self.header_size = -(-(len(self._header()) + room) // 8) * 8

    def __enter__(self) -> BundleWriter:
        self.file = self._whole.__enter__()
        self.partial = Path(self.file.name)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._whole.__exit__(kind, error, trace)

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Writes value (B, t, …) as positions start to start + t of the tensor; or a whole tensor."""
        entry = self.entries[name]
        shape = entry["shape"]
        content = value.detach().cpu().contiguous().view(torch.uint8)
        rows = content.reshape(1, -1)
        if value.numel() != math.prod(shape):
            rows = content.reshape(shape[0], -1)
        row_bytes = (entry["data_offsets"][1] - entry["data_offsets"][0]) // len(rows)
        first = start * (row_bytes // shape[1]) if len(shape) > 1 else 0
        for row, piece in enumerate(rows):
            self.file.seek(8 + self.header_size + entry["data_offsets"][0] + row * row_bytes + first)
            self.file.write(piece.numpy())

    def describe(self, more: dict[str, str]) -> None:
        """Adds to the metadata. After that the partial file can be read."""
        self.metadata = {**self.metadata, **more}
        header = self._header()
        if len(header) > self.header_size:
            raise InputError(f"the metadata takes {len(header)} bytes, {self.header_size} were kept for it")
        self.file.seek(0)
        self.file.write(self.header_size.to_bytes(8, "little") + header.ljust(self.header_size))
        self.file.flush()

    def _header(self) -> bytes:
        return json.dumps({"__metadata__": self.metadata, **self.entries}).encode()


def weights_checksum(stored: Mapping[str, Stored], progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 over all tensors by sorted published name: for each `name dtype shape\\n` and then its bytes.

    The shape is written as 24576,8192 and the dtype as safetensors names it, BF16. How a checkpoint is split
    into files does not change the checksum. progress: called with the bytes of each tensor that is done.
    """
    digest = hashlib.sha256()
    tensors: list[Any] = []
    for each in stored.values():
        tensors += [each] if each.packed is None else each.packed.tensors
    for tensor in sorted(tensors, key=lambda tensor: tensor.published):
        digest.update(f"{tensor.published} {tensor.dtype} {','.join(map(str, tensor.shape))}\n".encode())
        content = tensor.read().contiguous().view(-1).view(torch.uint8)
        digest.update(content.numpy().data)
        if progress is not None:
            progress(content.numel())
    return digest.hexdigest()


_MOST_IDS = 2**26


def read_ids(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T) and mask from a file of numbers between spaces, commas or lines, or a JSON list (of lists).

    Lists of unequal length are rows of a batch, padded on the left with 0.
    """
    text = read_stream(Path(path)).decode("utf-8-sig", errors="replace").strip()
    try:
        found: list[Any] = parse_json(text) if text.startswith("[") else _plain_ids(text)
    except ValueError as error:
        raise InputError(f"{path}: no token ids: {str(error)[:200]}") from None
    rows: list[Any] = found if found and all(isinstance(row, list) for row in found) else [found]
    if len(rows) * max(map(len, rows)) > _MOST_IDS:
        raise InputError(f"{path}: {len(rows)} rows of up to {max(map(len, rows))} token ids are too many")
    if not all(rows) or not all(type(x) is int and 0 <= x < 2**31 for row in rows for x in row):
        raise InputError(
            f"{path}: should hold token ids, whole numbers from 0 on, apart by spaces or lines; or a JSON "
            "list of them, or of such lists for a batch"
        )
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device="cpu")
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device="cpu")
    return ids, None if bool(mask.all()) else mask


def _plain_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not _NUMBER.fullmatch(word)), None)
    if wrong is not None:
        raise InputError(f"{shown(wrong)} is none")
    return [int(word) for word in words]
