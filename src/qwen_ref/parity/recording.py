"""Records the truth, and compares this implementation or another with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qwen_ref.checkpoint import dtype_name
from qwen_ref.commands.files import output_path
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.parity.bundle import (
    Bundle,
    BundleWriter,
    as_ids,
    as_mask,
    bundle_metadata,
    read_bundle,
    stage_widths,
    weights_checksum,
)
from qwen_ref.parity.compare import (
    Comparison,
    Measure,
    Measured,
    Rounding,
    Tolerances,
    compare_bundles,
    require_same_weights,
    same_columns,
)
from qwen_ref.parity.stages import Checkpoint, Keep, Port

ROUNDING_DTYPES = ("float32", "bfloat16", "float16")

_MOST_STEPS = 2**20

Progress = Callable[[int, int], None]  # bytes of weights done, and in all


class Runs(Protocol):
    """What hands over stages: a Port, or a run with changes."""

    def run(self, keep: Keep, only: Sequence[str] | None = None) -> object: ...


class Work:
    """Counts the bytes of weights that are read, for the line of progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, count: int) -> None:
        self.total += count

    def did(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def record(
    folder: str | Path,
    ids: Tensor,
    out: str | Path,
    *,
    mask: Tensor | None = None,
    dtype: str = "float64",
    stages: str = "all",
    decode: int = 0,
    rounding: Sequence[str] = ROUNDING_DTYPES,
    progress: Progress | None = None,
) -> Bundle:
    """Records what a checkpoint computes for ids (B, T), and returns the bundle, opened.

    mask: (B, T), 1 for a token; padding is on the left. dtype: the dtype to compute in; float64 is the truth.
    stages: "all" or "logits". decode: how many greedy tokens follow, one by one with the cache.
    rounding: dtypes whose error at every stage is measured against the truth and stored with it, in a float64
    record only. progress: called with the bytes of weights that are read, and of all to be read.

    It takes the memory of one matrix in dtype, of a stage's numbers for T positions, and of the cache.
    Raises ValueError for a folder that is no checkpoint and for ids outside its vocabulary.
    """
    output_path(out)
    if stages not in ("all", "logits"):
        raise InputError(f"{stages=} is unknown; use all or logits")
    if not isinstance(decode, int) or not 0 <= decode <= _MOST_STEPS:
        raise InputError(f"{decode=} must be a whole number from 0 to {_MOST_STEPS}")
    ids = as_ids(ids)
    mask = None if mask is None else as_mask(mask, ids)
    ids = ids.view(-1, ids.shape[-1])
    checkpoint = Checkpoint(folder)
    dtype = checkpoint.dtype(dtype)
    rounding = (rounding,) if isinstance(rounding, str) else tuple(dict.fromkeys(rounding))
    if not set(rounding) <= set(ROUNDING_DTYPES):
        raise InputError(f"{rounding=} must be some of {', '.join(ROUNDING_DTYPES)}")
    if dtype != "float64":
        rounding = ()
    V = checkpoint.config.vocab_size
    for row, position in ((ids < 0) | (ids >= V)).nonzero()[:1].tolist():
        raise InputError(
            f"token id {ids[row, position]} is outside the vocabulary, 0 to {V - 1}: row {row}, "
            f"position {position}"
        )
    port = Port(checkpoint, dtype, ids, mask)
    work = Work(progress)
    work.expect(checkpoint.bytes * (1 + (1 + decode) * (1 + len(rounding))))
    names = list(stage_widths(checkpoint.config)) if stages == "all" else ["logits"]
    checksum = weights_checksum(checkpoint.stored, work.did)
    with _recorded(port, out, names, decode, checksum, len(rounding), work) as writer:
        if rounding:
            truth = read_bundle(writer.partial)
            measured = {name: _measure(checkpoint, truth, name, work) for name in rounding}
            writer.describe({"rounding": json.dumps(_finite(measured))})
            del truth  # Windows does not rename a file that is mapped
    return read_bundle(out)


@contextmanager
def _recorded(
    port: Port,
    out: str | Path,
    names: Sequence[str],
    decode: int,
    checksum: str | None,
    dtypes: int,
    work: Work,
) -> Iterator[BundleWriter]:
    """The writer of a bundle that is complete except for the rounding. dtypes: how many it will have."""
    widths = stage_widths(port.config)
    names = [name for name in names if name in widths]  # a port may lack a layer
    B, T = port.ids.shape[0], port.ids.shape[1] + decode
    kinds: dict[str, tuple[torch.dtype, Sequence[int]]] = {"input_ids": (torch.int64, (B, T))}
    if port.mask is not None:
        kinds["attention_mask"] = (torch.int64, (B, T))
    kinds |= {name: (port.dtype, (B, T, widths[name])) for name in names}
    metadata = bundle_metadata(dtype_name(port.dtype), port.prefill_length, port.config, checksum)
    room = 200 + dtypes * (20 + sum(len(name) + 60 for name in names))
    with BundleWriter(out, kinds, metadata, room) as writer:
        port.progress = work.did
        ids = port.run(
            lambda stage, value, start: writer.write(stage, value.flatten(2), start), names, decode
        )
        writer.write("input_ids", ids)
        if port.mask is not None:
            writer.write("attention_mask", torch.cat((port.mask, port.mask.new_ones(B, decode)), dim=1))
        writer.describe({})
        yield writer


@contextmanager
def temporary_record(run: Runs, like: Bundle, dtype: torch.dtype, config: QwenConfig) -> Iterator[Bundle]:
    """What a run computes, as a bundle on disk that is deleted at the end of the block. It has the input of
    `like`, and those of its stages that the run hands over.
    """
    widths = stage_widths(config)
    B, T = like.input_ids.shape
    kinds: dict[str, tuple[torch.dtype, Sequence[int]]] = {"input_ids": (torch.int64, (B, T))}
    kinds |= {name: (dtype, (B, T, widths[name])) for name in like.stages}
    if like.attention_mask is not None:
        kinds["attention_mask"] = (torch.int64, (B, T))
    metadata = bundle_metadata(dtype_name(dtype), like.prefill_length, config, None)
    with tempfile.TemporaryDirectory(prefix="qwen_ref-") as folder:
        out = Path(folder) / "record.safetensors"
        with BundleWriter(out, kinds, metadata) as writer:
            run.run(lambda stage, value, start: writer.write(stage, value.flatten(2), start), like.stages)
            writer.write("input_ids", like.input_ids)
            if like.attention_mask is not None:
                writer.write("attention_mask", like.attention_mask)
            writer.describe({})
        yield read_bundle(out)


def held_against(port: Runs, truth: Bundle, text: bool = True) -> Measure:
    """How far a port is from a bundle at each of its stages that the port has; text: see Measure."""
    measure = Measure(truth.input_ids, truth.real, text)

    def keep(stage: str, value: Tensor, start: int) -> None:
        theirs = truth.stage(stage)[:, start : start + value.shape[1]]
        measure.add(stage, *same_columns(theirs, value), start)

    port.run(keep, truth.stages)
    return measure


def judged_by(run: Runs, theirs: Bundle, text: bool = True) -> Measure:
    """How far a bundle is from a run, at each of its stages that the run has."""
    measure = Measure(theirs.input_ids, theirs.real, text)

    def keep(stage: str, value: Tensor, start: int) -> None:
        judged = theirs.stage(stage)[:, start : start + value.shape[1]]
        measure.add(stage, *same_columns(value, judged), start)

    run.run(keep, theirs.stages)
    return measure


def reference(checkpoint: Checkpoint, dtype: str, bundle: Bundle, work: Work) -> Port:
    """This implementation on a bundle's input."""
    port = Port(checkpoint, dtype, bundle.input_ids, bundle.attention_mask, bundle.prefill_length)
    port.progress = work.did
    return port


def _measure(checkpoint: Checkpoint, truth: Bundle, dtype: str, work: Work) -> dict[str, Rounding]:
    return held_against(reference(checkpoint, dtype, truth, work), truth, text=False).all_rounding()


def _finite(measured: dict[str, dict[str, Rounding]]) -> dict[str, dict[str, list[float]]]:
    """In few digits; stages where float16 overflows are left out."""
    return {
        dtype: {
            stage: [float(f"{x:.3g}") for x in found]
            for stage, found in stages.items()
            if max(found) < float("inf")
        }
        for dtype, stages in measured.items()
    }


def measured_rounding(checkpoint: Checkpoint, bundle: Bundle, dtypes: Iterable[str], work: Work) -> Measured:
    """The rounding of these dtypes at a bundle's stages: the bundle's, or else measured now."""
    wanted = {"float32" if dtype == "float64" else dtype for dtype in dtypes}
    measured: dict[str, Mapping[str, tuple[float, float]]] = {
        dtype: stages for dtype, stages in bundle.rounding.items() if set(bundle.stages) <= set(stages)
    }
    missing = sorted(wanted - measured.keys())
    if missing:
        calls = 1 + bundle.input_ids.shape[1] - bundle.prefill_length
        work.expect(checkpoint.bytes * calls * (1 + len(missing)))
        exact = reference(checkpoint, "float64", bundle, work)
        with temporary_record(exact, bundle, torch.float64, checkpoint.config) as truth:
            for dtype in missing:
                measured[dtype] = _measure(checkpoint, truth, dtype, work)
    return measured


def open_both(folder: str | Path, path: str | Path, work: Work) -> tuple[Checkpoint, Bundle]:
    """A checkpoint and a bundle of it; ValueError where they do not belong together."""
    bundle = read_bundle(path)
    checkpoint = Checkpoint(folder)
    bundle.check_model(checkpoint.config)
    if bundle.weights_sha256 is not None:
        work.expect(checkpoint.bytes)
        checksum = weights_checksum(checkpoint.stored, work.did)
        require_same_weights(str(folder), checksum, bundle)
    return checkpoint, bundle


def check(
    folder: str | Path, golden: str | Path, dtype: str = "auto", progress: Progress | None = None
) -> Comparison:
    """Compares this implementation, in a dtype, with a bundle of this project or of another.

    Raises ValueError for a file that is no bundle, and a bundle of another checkpoint or with NaN.
    """
    work = Work(progress)
    checkpoint, truth = open_both(folder, golden, work)
    dtype = checkpoint.dtype(dtype)
    truth.require_finite()
    measured = measured_rounding(checkpoint, truth, (truth.coarsest, dtype), work)
    work.expect(checkpoint.bytes * (1 + truth.input_ids.shape[1] - truth.prefill_length))
    return Comparison.of(
        held_against(reference(checkpoint, dtype, truth, work), truth),
        Tolerances(measured, truth.coarsest, dtype),
        names=(truth.path, f"{folder} in {dtype}"),
        stored={stage: (truth.stored_dtype(stage),) for stage in truth.stages},
        notes=_config_notes(truth, checkpoint),
    )


def _config_notes(truth: Bundle, checkpoint: Checkpoint) -> list[str]:
    ours = vars(checkpoint.config)
    notes = [
        f"{name} is {value} in {truth.path}, {ours[name]} in {checkpoint.folder}"
        for name, value in truth.config.items()
        if ours[name] != value
    ]
    if truth.weights_sha256 is None:
        notes.append(f"{truth.path} has no weights_sha256: whether its weights are these was not checked")
    return notes


def diff(
    truth: str | Path, judged: str | Path, folder: str | Path | None = None, progress: Progress | None = None
) -> Comparison:
    """Compares one bundle with another.

    Tolerances come from the rounding that is stored in either bundle. With a folder, missing rounding is
    measured. Raises ValueError for a file that is no bundle, for NaN, and for bundles of different inputs.
    """
    first, second = read_bundle(truth), read_bundle(judged)
    measured: Measured = {**second.rounding, **first.rounding}
    if folder is not None:
        work = Work(progress)
        checkpoint, _ = open_both(folder, judged, work)
        first.check_model(checkpoint.config)
        measured = measured_rounding(checkpoint, first, (first.coarsest, second.coarsest), work)
    return compare_bundles(first, second, measured)
