"""How far one run of a model is from another: at each stage, and for the logits what it means for the text.

Two right implementations differ by rounding. Each difference is therefore judged by the rounding error at its
stage: the error of this implementation in the same dtype, measured against float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_ref.checkpoint import DTYPES
from qwen_ref.commands.cli import finite
from qwen_ref.config import InputError
from qwen_ref.parity.bundle import PADDING_SHARE, Bundle, flow, layer_of

# Tolerance over measured rounding. Another order of adding gives another rounding error of similar size: with
# eight orders the error of a single float32 position went from 2.1e-7 to 7.0e-7. In bfloat16 transformers'
# Qwen2 was at most 1.3 times as far from float64 as this implementation over all positions of a stage, and
# 1.7 times at the worst position; a NumPy port 1.1 and 1.3 times.
FACTOR = 4.0

_CHUNK = 2**22  # numbers that are widened to float64 at once


class Rounding(NamedTuple):
    """Relative RMS error of a stage, √(Σ Δ² / Σ truth²): over all positions, and the largest of one."""

    all: float
    worst: float


Measured = Mapping[str, Mapping[str, tuple[float, float]]]  # dtype → stage → Rounding


def _relative_rms(delta: float, truth: float) -> float:
    """Of sums of squares."""
    return 0.0 if delta == 0 else math.sqrt(delta / truth) if truth > 0 else math.inf


class Measure:
    """Adds up the differences between the truth and what is judged, position by position."""

    def __init__(self, ids: Tensor, real: Tensor, text: bool = True) -> None:
        """ids, real: (B, T). Numbers at padding mean nothing and are left out.

        text: whether to measure what different logits mean for the text; `logits_result` needs it.
        """
        self.ids, self.real, self.text = ids, real, text
        self._sums: dict[str, Tensor] = {}  # (5, B, T): Δ², truth², value², truth · value, largest |Δ|
        self._widths: dict[str, int] = {}
        self._logits: dict[str, Tensor] = {}  # (B, T) each

    def add(self, stage: str, truth: Tensor, value: Tensor, start: int = 0) -> None:
        """truth, value: (B, t, …) of the t positions from `start` on."""
        truth, value = truth.flatten(2), value.flatten(2)
        step = max(_CHUNK // max(truth[:, 0].numel(), 1), 1)
        sums = self._sums.setdefault(stage, self.ids.new_zeros((5, *self.ids.shape), dtype=torch.float64))
        self._widths[stage] = truth.shape[-1]
        for first in range(0, truth.shape[1], step):
            at = slice(start + first, min(start + first + step, start + truth.shape[1]))
            part, other = (x[:, first : first + step].double() for x in (truth, value))
            delta = other - part
            if not bool(delta.isfinite().all()):
                # If both are infinite or NaN, they agree. If one is, the difference is infinite.
                ours, theirs = part.isfinite(), other.isfinite()
                delta = torch.where(ours & theirs, delta, torch.where(ours == theirs, 0.0, math.inf))
                part, other = part.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
            sums[:, :, at] = torch.stack(
                (
                    delta.square().sum(-1),
                    part.square().sum(-1),
                    other.square().sum(-1),
                    (part * other).sum(-1),
                    delta.abs().amax(-1),
                )
            )
            if stage == "logits" and self.text:
                self._add_logits(part, other, at)

    def _add_logits(self, truth: Tensor, value: Tensor, at: slice) -> None:
        log_p, log_q = truth.log_softmax(-1), value.log_softmax(-1)
        count = min(5, truth.shape[-1])
        best, other_best = truth.topk(count, dim=-1), value.topk(count, dim=-1)
        shared = (best.indices[..., :, None] == other_best.indices[..., None, :]).any(-1)
        first, other_first = best.indices[..., :1], other_best.indices[..., :1]
        margin = best.values[..., 0] - best.values[..., 1] if count > 1 else truth.new_zeros(truth.shape[:2])
        found = {
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0),
            "top5": shared.double().mean(-1),
            "margin": margin,
            "token": first[..., 0],
            "other": other_first[..., 0],
            "p_token": log_p.gather(-1, first)[..., 0].exp(),
            "p_other": log_p.gather(-1, other_first)[..., 0].exp(),
            "q_token": log_q.gather(-1, first)[..., 0].exp(),
            "q_other": log_q.gather(-1, other_first)[..., 0].exp(),
        }
        for name, values in found.items():
            kept = self._logits.setdefault(name, self.ids.new_zeros(self.ids.shape, dtype=values.dtype))
            kept[:, at] = values

    @property
    def stages(self) -> list[str]:
        return list(self._sums)

    def positions(self, stage: str) -> Tensor:
        """Relative error of each position (B, T); 0 at padding."""
        delta, truth = self._sums[stage][:2]
        error = torch.where(delta == 0, 0.0, (delta / truth).sqrt())
        return torch.where(self.real, error, 0.0)

    def rounding(self, stage: str) -> Rounding:
        delta, truth = (float(x[self.real].sum()) for x in self._sums[stage][:2])
        return Rounding(_relative_rms(delta, truth), float(self.positions(stage).max()))

    def all_rounding(self) -> dict[str, Rounding]:
        return {stage: self.rounding(stage) for stage in self.stages}

    def result(self, stage: str, tolerance: Rounding) -> StageResult:
        delta, truth, value, product = self._sums[stage][:4, self.real].sum(dim=-1).tolist()
        positions = self.positions(stage)
        row, position = divmod(int(positions.argmax()), positions.shape[1])
        beyond = (positions > tolerance.worst).any(dim=0).nonzero()
        both = math.sqrt(truth * value)
        return StageResult(
            stage=stage,
            max_abs=float(self._sums[stage][4, self.real].max()),
            relative_rms=_relative_rms(delta, truth),
            cosine=product / both if both > 0 else 1.0 if truth == value else 0.0,
            worst=float(positions[row, position]),
            worst_row=row,
            worst_position=position,
            first_position=int(beyond[0]) if len(beyond) else None,
            tolerance=tolerance.all,
            worst_tolerance=tolerance.worst,
        )

    def logits_result(self, tolerance: Rounding) -> LogitsResult:
        kept = {name: values[self.real] for name, values in self._logits.items()}
        scale = math.sqrt(float(self._sums["logits"][1][self.real].mean()) / self._widths["logits"])
        noise = tolerance.all * scale
        agree = kept["token"] == kept["other"]
        clear = kept["margin"] > noise
        kl = torch.where(self.real, self._logits["kl"], -1.0)
        row, position = divmod(int(kl.argmax()), kl.shape[1])
        worst = {name: values[row, position].item() for name, values in self._logits.items()}
        return LogitsResult(
            positions=len(agree),
            kl_mean=float(kept["kl"].mean()),
            kl_p99=float(kept["kl"].quantile(0.99)),
            kl_max=float(kept["kl"].max()),
            top1=float(agree.double().mean()),
            top5=float(kept["top5"].mean()),
            noise=noise,
            clear=int(clear.sum()),
            clear_top1=float(agree[clear].double().mean()) if clear.any() else None,
            worst=WorstPosition(
                row=row,
                position=position,
                input_id=int(self.ids[row, position]),
                kl=worst["kl"],
                truth_id=int(worst["token"]),
                truth_probabilities=(worst["p_token"], worst["q_token"]),
                judged_id=int(worst["other"]),
                judged_probabilities=(worst["p_other"], worst["q_other"]),
            ),
        )


@dataclass(frozen=True)
class StageResult:
    """One stage: the error, and the tolerance for it."""

    stage: str
    max_abs: float  # largest |Δ|
    relative_rms: float  # √(Σ Δ² / Σ truth²)
    cosine: float
    worst: float  # the relative RMS of the position where it is largest
    worst_row: int
    worst_position: int
    first_position: int | None  # the first, in any row, that is beyond worst_tolerance
    tolerance: float  # for relative_rms
    worst_tolerance: float  # for worst

    @property
    def excess(self) -> float:
        """The error in units of the tolerance: up to 1 it is rounding."""
        return max(_ratio(self.relative_rms, self.tolerance), _ratio(self.worst, self.worst_tolerance))

    @property
    def within(self) -> bool:
        return self.excess <= 1


def _ratio(error: float, tolerance: float) -> float:
    return 0.0 if error == 0 else math.inf if tolerance == 0 or math.isnan(error) else error / tolerance


@dataclass(frozen=True)
class WorstPosition:
    """The position where the distributions differ most: its token, and what each side would say next."""

    row: int
    position: int
    input_id: int
    kl: float
    truth_id: int  # the truth's first choice, its probability in the truth and in what is judged
    truth_probabilities: tuple[float, float]
    judged_id: int  # the first choice of what is judged, likewise
    judged_probabilities: tuple[float, float]


@dataclass(frozen=True)
class LogitsResult:
    """What the difference means for the text. KL divergences are KL(truth ‖ judged), in nats."""

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float  # the share of positions with the same first choice
    top5: float  # the share of the truth's first five that are among the other's first five
    noise: float  # the tolerance in units of the logits
    clear: int  # positions whose first choice leads by more than the noise
    clear_top1: float | None  # the share of these with the same first choice
    worst: WorstPosition


@dataclass(frozen=True)
class Comparison:
    """The result of `check` and `diff`."""

    truth: str
    truth_dtype: str
    judged: str
    judged_dtype: str
    stages: list[StageResult]  # in the order in which data flows
    logits: LogitsResult | None
    tolerances: str  # where they come from
    notes: list[str] = field(default_factory=list)
    # dtype → stage → relative RMS of the reference's own rounding, where it was measured
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        measure: Measure,
        tolerances: Tolerances,
        names: tuple[str, str],
        stored: Mapping[str, tuple[torch.dtype, ...]],
        notes: list[str],
    ) -> Comparison:
        """names: of the truth and of what is judged. stored: the dtypes in which each stage was stored."""
        stages = sorted(measure.stages, key=flow)
        results = [measure.result(stage, tolerances.of(stage, stored[stage])) for stage in stages]
        logits = None
        if "logits" in stages and not math.isfinite(measure.rounding("logits").all):
            notes = [*notes, "logits that are not finite say nothing of the text"]
        elif "logits" in stages:
            logits = measure.logits_result(tolerances.of("logits", stored["logits"]))
        rounding = {
            dtype: {stage: pair[0] for stage, pair in found.items()}
            for dtype, found in tolerances.measured.items()
        }
        (truth, judged), (truth_dtype, judged_dtype) = names, tolerances.dtypes
        source = tolerances.source
        return cls(truth, truth_dtype, judged, judged_dtype, results, logits, source, notes, rounding)

    @property
    def first_beyond(self) -> StageResult | None:
        """The first stage that is beyond its tolerance."""
        return next((stage for stage in self.stages if not stage.within), None)

    @property
    def within(self) -> bool:
        return self.first_beyond is None

    def to_json(self) -> dict[str, Any]:
        first = self.first_beyond
        found = {**asdict(self), "within": self.within, "first_beyond": first and first.stage}
        found["factor"] = FACTOR
        for stage, row in zip(self.stages, found["stages"], strict=True):
            row["within"] = stage.within
        return finite(found)


class Tolerances:
    """How much two sides may differ at a stage, from the rounding of their two dtypes.

    Rounding that was not measured is estimated roughly, from the dtype alone. `source` then says so.
    """

    def __init__(self, measured: Measured, first: str, second: str) -> None:
        """first, second: the dtypes of the two sides."""
        self.measured = measured
        self.dtypes = (first, second)
        self.estimated = sorted({dtype for dtype in self.dtypes if not self._known(dtype)})

    def _known(self, dtype: str) -> bool:
        return bool(self.measured.get("float32" if dtype == "float64" else dtype))

    @property
    def source(self) -> str:
        dtypes = " and ".join(sorted({*self.dtypes} - {"float64"})) or "float64"
        how = f"{FACTOR:g} × this implementation's own error in {dtypes}, measured against float64"
        if self.estimated:
            how += (
                f"; {' and '.join(self.estimated)} was not measured but estimated (--model DIR measures it)"
            )
        return how

    def rounding(self, dtype: str, stage: str) -> Rounding:
        """The rounding error of a dtype at a stage."""
        eps = torch.finfo(DTYPES[dtype]).eps
        known = self.measured.get(dtype, {}).get(stage)
        if known is not None and not all(map(math.isfinite, known)):
            known = None  # float16 overflows here
        if known is None and dtype == "float64":
            single = self.measured.get("float32", {}).get(stage)
            if single is not None:  # the same operations, 29 bits further down
                known = single[0] * 2**-29, single[1] * 2**-29
        if known is None:
            known = estimated_rounding(dtype, stage)
        # At least a single rounding: of what is stored, or of a stage that happened to be exact here.
        return Rounding(max(known[0], eps / 4), max(known[1], eps / 4))

    def of(self, stage: str, stored: tuple[torch.dtype, ...] = ()) -> Rounding:
        """The tolerance at a stage. stored: the dtypes of its stored tensors; each adds a rounding."""
        costs = [self.rounding(dtype, stage) for dtype in self.dtypes]
        costs += [Rounding(*2 * [torch.finfo(dtype).eps / 4]) for dtype in stored]
        return Rounding(
            FACTOR * math.hypot(*(cost.all for cost in costs)),
            FACTOR * math.hypot(*(cost.worst for cost in costs)),
        )


def estimated_rounding(dtype: str, stage: str) -> Rounding:
    """A rough estimate of the rounding error after so many layers, from figures of the golden models.

    There the error after 3 layers was 1.7 eps in bfloat16 and float16, and 6 eps in float32; because of its
    angles it was 55 eps at 3,000 positions. A single position may have three times the error of all.
    """
    layer = layer_of(stage)
    depth = {"embed": 0, "norm": 40, "logits": 40}[stage] if layer is None else layer + 1
    eps = torch.finfo(DTYPES[dtype]).eps
    cost = eps * math.sqrt(1 + depth) * (1 if eps > 1e-4 else 8)
    return Rounding(cost, 3 * cost)


def compare_bundles(truth: Bundle, judged: Bundle, measured: Measured, name: str | None = None) -> Comparison:
    """Compares every stage that both have; ValueError where they are not of the same input.

    name: what the truth is called in the result, if not by its path.
    """
    require_same_input(truth, judged)
    theirs = set(judged.stages)
    common = [stage for stage in truth.stages if stage in theirs]
    if not common:
        raise InputError(f"{truth.path} and {judged.path} have no stage in common")
    for stage in common:
        if truth.width(stage) != judged.width(stage) and not _cut(truth, judged, stage):
            raise InputError(
                f"{stage} has {truth.width(stage)} numbers a position in {truth.path}, "
                f"{judged.width(stage)} in {judged.path}"
            )
    truth.require_finite()
    judged.require_finite()
    return Comparison.of(
        measure_bundles(truth, judged, common),
        Tolerances(measured, truth.coarsest, judged.coarsest),
        names=(name or truth.path, judged.path),
        stored={stage: (truth.stored_dtype(stage), judged.stored_dtype(stage)) for stage in common},
        notes=list(_notes(truth, judged, named=name is None)),
    )


def measure_bundles(truth: Bundle, judged: Bundle, stages: Iterable[str]) -> Measure:
    measure = Measure(truth.input_ids, truth.real)
    for stage in stages:
        measure.add(stage, *same_columns(truth.stage(stage), judged.stage(stage)))
    return measure


def same_columns(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two stages (B, T, …), the wider one cut: logits may lack the vocabulary's padding."""
    first, second = first.flatten(2), second.flatten(2)
    width = min(first.shape[-1], second.shape[-1])
    return first[..., :width], second[..., :width]


def _cut(truth: Bundle, judged: Bundle, stage: str) -> bool:
    """Whether one of the two lacks the vocabulary's padding in its logits."""
    less, more = sorted((truth.width(stage), judged.width(stage)))
    return stage == "logits" and less >= more - more // PADDING_SHARE


def require_same_input(truth: Bundle, judged: Bundle) -> None:
    """Raises ValueError where two bundles are not of the same ids, padding, prefill and weights."""
    if truth.input_ids.shape != judged.input_ids.shape:
        raise InputError(
            f"{truth.path} has input_ids {list(truth.input_ids.shape)}, {judged.path} "
            f"{list(judged.input_ids.shape)}"
        )
    if not torch.equal(truth.input_ids[truth.real], judged.input_ids[truth.real]):
        differs = (truth.input_ids != judged.input_ids) & truth.real
        row, position = differs.nonzero()[0].tolist()
        raise InputError(
            f"{truth.path} and {judged.path} are of different ids: row {row}, position {position} is "
            f"{truth.input_ids[row, position]} there, {judged.input_ids[row, position]} here"
        )
    if not torch.equal(truth.real, judged.real):
        raise InputError(f"{truth.path} and {judged.path} have different attention masks")
    if truth.prefill_length != judged.prefill_length:
        raise InputError(
            f"{truth.path} has prefill_length {truth.prefill_length}, {judged.path} {judged.prefill_length}"
        )
    require_same_weights(truth.path, truth.weights_sha256, judged)


def require_same_weights(name: str, checksum: str | None, judged: Bundle) -> None:
    if checksum and judged.weights_sha256 and checksum != judged.weights_sha256:
        raise InputError(
            f"{judged.path} is of another checkpoint: weights_sha256 is {judged.weights_sha256}, that of "
            f"{name} is {checksum}"
        )


def _notes(truth: Bundle, judged: Bundle, named: bool) -> Iterator[str]:
    if "logits" in truth.stages and "logits" in judged.stages:
        less, more = sorted((truth.width("logits"), judged.width("logits")))
        if less < more:
            yield f"logits of {less:,} of the vocabulary's {more:,} rows are there: only these were compared"
    for bundle in (truth, judged) if named else (judged,):
        if bundle.weights_sha256 is None:
            yield f"{bundle.path} has no weights_sha256: whether its weights are the same was not checked"
    for key in sorted(truth.config.keys() & judged.config.keys()):
        if truth.config[key] != judged.config[key]:
            yield f"{key} is {truth.config[key]} in the truth, {judged.config[key]} in {judged.path}"
    for bundle, other in ((truth, judged), (judged, truth)):
        others = set(other.stages)
        only = [stage for stage in bundle.stages if stage not in others]
        if only:
            rest = f" and {len(only) - 3} more" if len(only) > 3 else ""
            yield f"only {bundle.path} has {', '.join(only[:3])}{rest}: not compared"
