"""Which mistake a port has made: the reference is run with each known mistake and compared with the port.

The run with the port's own mistake agrees with the port to rounding, and no other run does. Logits alone are
enough. With more stages the diagnosis also says at which stage the port first differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ref.checkpoint import DTYPES, dtype_name
from qwen_ref.commands.cli import finite
from qwen_ref.parity.bundle import Bundle, meaning, stage_widths
from qwen_ref.parity.compare import (
    FACTOR,
    Comparison,
    Measure,
    StageResult,
    Tolerances,
    compare_bundles,
    measure_bundles,
)
from qwen_ref.parity.mistakes import CLAMPED, Make, Mistake, mistakes, norm_epsilon, rope_base
from qwen_ref.parity.recording import (
    ROUNDING_DTYPES,
    Progress,
    Work,
    held_against,
    measured_rounding,
    open_both,
    reference,
    temporary_record,
)
from qwen_ref.parity.stages import Checkpoint, Port

# A mistake is named only if the port is this many times nearer to the run with it than to the reference.
MARGIN = 3.0

# Within rounding, a mistake whose effect is as large as the rounding brings the run with it nearer by this
# factor. For right ports no mistake brought a run nearer by more than a tenth.
_MARGIN_WITHIN = 1.5
_LEAST = 0.1  # tolerances: a difference below that is less than rounding usually makes

# "Computed in float16" is judged by size. Six ways of adding (one pass, steps, NumPy, blocks of 16, partial
# sums rounded, logits in float32), three models, float16 and bfloat16: the error over all positions of a
# stage was 0.8 to 1.8 times this implementation's own in that dtype. Where only what enters a product is
# rounded it was 0.4 to 0.6 at the logits. FACTOR, 4, either way holds all of them. bfloat16's rounding is 7
# to 8 times float16's: what lies between the two is given to the nearer one.
# All of them have errors at every position: the most exact of 400 positions had 1/14 of this implementation's
# error. A wrong position, angle or mask leaves the first position right, with 1/2,000 of float16's error.
_FAINT = 1 / 64

# A port with less than this share of its dtype's rounding computes a part in a finer dtype: the figures above
# are 0.8 and more if all is in one dtype, and 0.4 to 0.6 if only the products are.
_FINER = 0.7
_HALVES = ("bfloat16", "float16")

_SURE = 0.4  # tolerances: rounding takes a quarter of its own tolerance, this is a little more
_NOISE = 0.5  # the largest relative error that is still called rounding

# The share of numbers that must be finite in both, or in neither: the reference in float16 and the port.
_OVERFLOW_AGREES = 0.9

_SAMPLE = 64  # positions at which numbers are tested for their dtype
_FINALISTS = 4  # hypotheses whose own rounding is measured
_FITTED_LENGTH = 256  # positions to which a base or epsilon is fitted
_LIKELY = 3  # mistakes that are always tried in pairs with every other
_PAIR_CALLS = 1300  # all pairs are tried if they cost no more than so many calls of a small model
_CALL_OPERATIONS = 2.5e8  # operations in such a call; 1300 calls take some 10 s on two cores


@dataclass(frozen=True)
class Hypothesis:
    """The reference with no, one or two mistakes, and how far the port is from it."""

    mistakes: tuple[str, ...]
    residual: float  # relative RMS at the stage where it is worst
    stage: str  # that stage
    excess: float  # the error there in tolerances: up to 1 is rounding
    residuals: tuple[float, ...]  # of every stage, in the order in which data flows
    agrees: int  # stages before the first that is beyond tolerance
    # If it was judged by a dtype's rounding: this dtype, to which residual and excess then belong, and the
    # port's error in units of each dtype's rounding.
    dtype: str = ""
    ratios: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, mistakes: tuple[str, ...], results: Sequence[StageResult], **more: Any) -> Hypothesis:
        """By the results of every stage."""
        worst = max(results, key=lambda result: result.excess)
        agrees = next((i for i, result in enumerate(results) if not result.within), len(results))
        residuals = tuple(result.relative_rms for result in results)
        return cls(mistakes, worst.relative_rms, worst.stage, worst.excess, residuals, agrees, **more)

    @property
    def text(self) -> str:
        return " + ".join(self.mistakes) if self.mistakes else "no mistake"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds. verdict: "rounding only", "mistake" or "none of these"."""

    bundle: str
    dtype: str
    verdict: str
    found: tuple[str, ...]  # the mistakes
    alike: list[tuple[str, ...]]  # others that give the same numbers for these ids
    ranking: list[Hypothesis]  # best first
    comparison: Comparison | None  # the port against the reference; None where it holds NaN
    first_divergence: str | None  # the first stage beyond rounding
    invisible: list[str]  # mistakes that change nothing for these ids
    tried: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        comparison = self.comparison and self.comparison.to_json()
        ranking = [asdict(hypothesis) for hypothesis in self.ranking]
        return finite({**vars(self), "ranking": ranking, "comparison": comparison})


def diagnose(folder: str | Path, path: str | Path, progress: Progress | None = None) -> Diagnosis:
    """Names the mistake, or the two mistakes, that explain a port's bundle.

    progress: called with the bytes of weights that are read, and the most that may have to be read.
    Raises ValueError for a file that is no bundle, a bundle of another checkpoint, and NaN that float16
    overflow does not explain.
    """
    work = Work(progress)
    checkpoint, theirs = open_both(folder, path, work)
    if theirs.first_not_finite() is not None:
        return _overflow(checkpoint, theirs, work)
    return _Search(checkpoint, theirs, work).diagnosis()


class _Search:
    """One diagnosis under way."""

    def __init__(self, checkpoint: Checkpoint, theirs: Bundle, work: Work) -> None:
        self.checkpoint, self.theirs, self.work = checkpoint, theirs, work
        self.measured = measured_rounding(checkpoint, theirs, [theirs.dtype, *ROUNDING_DTYPES], work)
        self.known = {
            mistake.text: mistake for mistake in mistakes(checkpoint.config) if self._may_be(mistake)
        }
        work.expect(checkpoint.bytes * (len(self.known) + 2 + 2 * _FINALISTS))
        self.tolerances = Tolerances(self.measured, theirs.dtype, theirs.dtype)
        self.stored = {stage: (theirs.stored_dtype(stage),) for stage in theirs.stages}
        self.tried = 0
        self.notes: list[str] = []

    def _may_be(self, mistake: Mistake) -> bool:
        """A finer dtype than the declared one is no mistake; without overflow, clamping changes nothing."""
        if mistake.text == CLAMPED:
            return not self._finite("float16")
        return mistake.dtype is None or _eps(mistake.dtype) > _eps(self.theirs.dtype)

    def _finite(self, dtype: str) -> bool:
        return all(math.isfinite(self.measured[dtype][stage][0]) for stage in self.theirs.stages)

    def diagnosis(self) -> Diagnosis:
        comparison = self._comparison()
        right = [self._hypothesis((), stepwise=stepwise) for stepwise in (False, True)]
        none = min(right, key=_rank)
        singles = [self._hypothesis((text,)) for text in self.known]
        same = [h for h in singles if any(h.residuals == r.residuals for r in right) and h.excess < math.inf]
        ranking = sorted((h for h in singles if h not in same), key=_rank)
        if comparison.within and self._finer(comparison):
            fitting = []
        elif comparison.within:
            # Nothing may be wrong; but what difference there is may be a mistake's.
            fitting = [h for h in ranking if self._named_for_its_rounding(h, none)]
        else:
            fitting = self._fitting(ranking, none)
            sized = [] if fitting else self._computed_in(())
            if sized and self._numbers_of(sized[0].dtype):
                fitting = sized
            if not fitting:
                fitted = [self._fitted_base(), self._fitted_epsilon()]
                ranking = sorted(
                    [*ranking, *(h for h in fitted if h.excess * MARGIN < none.excess)], key=_rank
                )
                fitting = self._fitting(ranking, none) or sized
            if not fitting:
                better = self._better(ranking, none)
                fitting = sorted((h for b in better for h in self._computed_in(b.mistakes)), key=_rank)
            if not fitting:
                pairs = self._pairs(ranking)
                fitting = self._fitting(sorted(pairs, key=_rank), none)
                ranking += pairs
            if fitting and fitting[0].dtype:
                self._explain(fitting[0])
        verdict = "mistake" if fitting else "rounding only" if comparison.within else "none of these"
        named = {h.mistakes for h in fitting}
        ranking = sorted((h for h in ranking if h.mistakes not in named), key=_rank)
        ranking = [none, *ranking] if verdict == "rounding only" else sorted([none, *ranking], key=_rank)
        first = comparison.first_beyond
        return Diagnosis(
            bundle=self.theirs.path,
            dtype=self.theirs.dtype,
            verdict=verdict,
            found=fitting[0].mistakes if fitting else (),
            alike=[h.mistakes for h in fitting[1:] if h.excess <= max(2 * fitting[0].excess, 0.02)],
            ranking=fitting + ranking,
            comparison=comparison,
            first_divergence=first.stage if first else None,
            invisible=[h.text for h in same],
            tried=self.tried,
            notes=comparison.notes + self.notes,
        )

    def _comparison(self) -> Comparison:
        with temporary_record(self._port((), "float64"), self.theirs.stages, self.work) as truth:
            return compare_bundles(
                truth, self.theirs, self.measured, name=f"{self.checkpoint.folder} in float64"
            )

    def _port(self, texts: Sequence[str], dtype: str | None = None) -> Port:
        """The reference with these mistakes; dtype: other than theirs."""
        port = reference(self.checkpoint, self.theirs.dtype, self.theirs, self.work)
        port.stepwise = False  # one pass computes the same as the steps do, sooner
        for text in texts:
            self.known[text].make(port)
        if dtype is not None:
            port.dtype = DTYPES[dtype]
        return port

    def _hypothesis(self, texts: tuple[str, ...], stepwise: bool = False) -> Hypothesis:
        self.tried += 1
        port = self._port(texts)
        port.stepwise |= stepwise
        measure = held_against(port, self.theirs, text=False)
        for index, stage in enumerate(self.theirs.stages):
            if stage not in measure.stages:  # they have a layer that this port lacks
                return Hypothesis(texts, math.inf, stage, math.inf, (), index)
        return Hypothesis.of(texts, self._results(measure, self.tolerances))

    def _results(self, measure: Measure, tolerances: Tolerances) -> list[StageResult]:
        """Of the port's stages that were measured, in the order in which data flows."""
        stages = [stage for stage in self.theirs.stages if stage in measure.stages]
        return [measure.result(stage, tolerances.of(stage, self.stored[stage])) for stage in stages]

    def _named_for_its_rounding(self, hypothesis: Hypothesis, none: Hypothesis) -> bool:
        half = self.theirs.dtype in _HALVES
        known = [self.known[text] for text in hypothesis.mistakes]
        if any(mistake.dtype or (half and mistake.usual_in_half) for mistake in known):
            return False
        return none.excess > _LEAST and hypothesis.excess * _MARGIN_WITHIN < none.excess

    def _better(self, ranking: Sequence[Hypothesis], none: Hypothesis) -> list[Hypothesis]:
        """The best that are clearly nearer than no mistake. A dtype is not judged by that."""
        judged = [h for h in ranking if not any(self.known[text].dtype for text in h.mistakes)]
        return [h for h in judged[:_FINALISTS] if h.excess * MARGIN < none.excess]

    def _fitting(self, ranking: Sequence[Hypothesis], none: Hypothesis) -> list[Hypothesis]:
        """Of the best, those with which the port agrees to rounding, their own or the reference's."""
        better = self._better(ranking, none)
        return [h for h in better if h.excess <= 1 or self._within_its_own_rounding(h)]

    def _finer(self, comparison: Comparison) -> bool:
        """Whether the port is clearly nearer to float64 than its dtype's rounding, which is no mistake."""
        stage, dtype = comparison.stages[-1], self.theirs.dtype
        if dtype == "float64":
            return False
        least = _FINER if dtype in _HALVES else 1 / FACTOR  # float32's error varies more with the order
        costs = {name: self.tolerances.rounding(name, stage.stage).all for name in DTYPES}
        if not stage.relative_rms < least * costs[dtype]:
            return False
        note = f"nearer to float64 than this implementation in {dtype}"
        if stage.relative_rms > 0:
            note += f", {costs[dtype] / stage.relative_rms:,.2g} times at {stage.stage}"
            nearest = min(costs, key=lambda name: abs(math.log(stage.relative_rms / costs[name])))
            if nearest != dtype:
                note += f", and about as near as it is in {nearest}"
        self.notes.append(f"{note}: more precision than declared is no mistake")
        return True

    def _computed_in(self, texts: tuple[str, ...]) -> list[Hypothesis]:
        """With these mistakes, the dtype whose rounding the port's error is as large as, if there is one.

        Bits say nothing here: two runs in one dtype that add in another order are as far from each other as
        from the truth.
        """
        stages, last = self.theirs.stages, self.theirs.stages[-1]
        wider = {mistake.text: mistake.dtype for mistake in self.known.values() if mistake.dtype}
        with temporary_record(self._port(texts, "float64"), stages, self.work) as truth:
            if truth.stages != stages:
                return []  # a layer is missing
            theirs = measure_bundles(truth, self.theirs, stages)
            ours = {t: held_against(self._port(texts, d), truth, text=False) for t, d in wider.items()}
        error = theirs.rounding(last).all
        costs = {text: measure.rounding(last).all for text, measure in ours.items()}
        costs = {text: cost for text, cost in costs.items() if not self._has_finer_numbers(wider[text])}
        ratios = {t: error / cost for t, cost in costs.items() if error > 0 and 0 < cost < math.inf}
        if not ratios:
            return []
        text = min(ratios, key=lambda text: abs(math.log(ratios[text])))
        tolerances = Tolerances({wider[text]: ours[text].all_rounding()}, "float64", wider[text])
        results = self._results(theirs, tolerances)
        worst = max(results, key=lambda result: result.excess)
        everywhere = theirs.positions(last) >= _FAINT * ours[text].positions(last)
        if not worst.within or worst.tolerance > _NOISE or ratios[text] < 1 / FACTOR or not everywhere.all():
            return []
        return [Hypothesis.of((*texts, text), results, dtype=wider[text], ratios=ratios)]

    def _numbers_of(self, dtype: str) -> bool:
        """Whether the last stage, kept in a finer dtype, has this dtype's numbers only."""
        return torch.finfo(self._sample.dtype).eps < _eps(dtype) and self._on_grid(dtype)

    def _has_finer_numbers(self, dtype: str) -> bool:
        """Whether the last stage was rounded to the other half-precision dtype, whose numbers it has."""
        return dtype in _HALVES and not self._on_grid(dtype) and any(map(self._on_grid, _HALVES))

    @property
    def _sample(self) -> Tensor:
        return self.theirs.stage(self.theirs.stages[-1])[:, :_SAMPLE]

    def _on_grid(self, dtype: str) -> bool:
        return torch.equal(self._sample.to(DTYPES[dtype]).to(self._sample.dtype), self._sample)

    def _explain(self, found: Hypothesis) -> None:
        stage = self.theirs.stages[-1]
        sizes = [f"{r:.2g} of that {t.removeprefix('computed ')}" for t, r in found.ratios.items()]
        self.notes.append(f"the error at {stage} over this implementation's own: {' and '.join(sizes)}")
        if not self._numbers_of(found.dtype):
            self.notes.append(
                f"its {stage} are no {found.dtype} numbers: a part may be computed in {found.dtype} (or in a "
                "GPU's TensorFloat-32, which has float16's precision), or weights may be quantised"
            )

    def _within_its_own_rounding(self, hypothesis: Hypothesis) -> bool:
        """A mistake may make a model that rounds more, as attention without 1/√K does."""
        port = self._port(hypothesis.mistakes)
        dtype = dtype_name(port.dtype)
        with temporary_record(
            self._port(hypothesis.mistakes, "float64"), self.theirs.stages, self.work
        ) as truth:
            measure = held_against(port, truth, text=False)
            measured = {dtype: measure.all_rounding()}
            judged = measure_bundles(truth, self.theirs, truth.stages)
        tolerances = Tolerances(measured, "float64", dtype)
        # A model that is nothing but noise would fit everything.
        results = self._results(judged, tolerances)
        return all(result.within and result.tolerance < _NOISE for result in results)

    def _fitted_base(self) -> Hypothesis:
        """The RoPE base that comes nearest. A few positions turn little: they lead to the many."""
        T = min(self.theirs.input_ids.shape[1], _FITTED_LENGTH)
        lengths = [2**power for power in range(2, T.bit_length()) if 2**power < T]
        found, step = self._nearest(rope_base, 5.5, 3.5 / 28, 57, lengths[0] if lengths else T)
        for length in [*lengths[1:], T]:
            found, step = self._nearest(rope_base, found, step / 2, 9, length)
        for _ in range(8):  # to one part in a million, and further
            found, step = self._nearest(rope_base, found, step / 4, 9, T)
        right = self.checkpoint.config.rotary_emb_base
        return self._rounded(rope_base, "RoPE base {} for {:g}", right, found)

    def _fitted_epsilon(self) -> Hypothesis:
        T = min(self.theirs.input_ids.shape[1], _FITTED_LENGTH)
        found, step = self._nearest(norm_epsilon, -6.5, 0.5, 27, T)
        for _ in range(3):
            found, step = self._nearest(norm_epsilon, found, step / 4, 9, T)
        eps = self.checkpoint.config.layer_norm_epsilon
        return self._rounded(norm_epsilon, "layer_norm_epsilon {} for {:g}", eps, found)

    def _nearest(
        self, mistake: Callable[[float], Make], middle: float, step: float, points: int, length: int
    ) -> tuple[float, float]:
        """Of so many powers of ten, so far apart, the one that is nearest over the first positions."""
        low, high = _EXPONENTS[mistake]
        exponents = [min(max(middle + (i - points // 2) * step, low), high) for i in range(points)]
        return min(exponents, key=lambda x: self._error(mistake(10**x), length)), step

    def _error(self, make: Make, length: int) -> float:
        """How far a mistake leaves the port at the last stage, over the first tokens of the longest rows."""
        stage, padding = self.theirs.stages[-1], (~self.theirs.real).sum(dim=-1)
        least = int(padding.min())
        rows, columns = padding == least, slice(least, least + length)
        prompt = self.theirs.prefill_length - least
        port = Port(
            self.checkpoint,
            self.theirs.dtype,
            self.theirs.input_ids[rows, columns],
            prefill_length=min(prompt, self.theirs.input_ids[0, columns].numel()),
        )
        port.stepwise, port.progress = False, self.work.did
        self.work.expect(self.checkpoint.bytes)
        port.fix_alpha(prompt)  # the whole one's
        make(port)
        theirs = self.theirs.stage(stage)[rows, columns]
        measure = Measure(port.ids, torch.ones_like(port.ids, dtype=torch.bool), text=False)
        port.run(lambda name, value, start: measure.add(name, theirs, value), [stage])
        return measure.rounding(stage).all

    def _rounded(
        self, mistake: Callable[[float], Make], text: str, right: float, exponent: float
    ) -> Hypothesis:
        """The number found, with no more digits than the port's numbers ask for."""
        hypotheses: list[Hypothesis] = []
        for digits in (1, 2, 3, 5, 9):
            number = float(f"{10**exponent:.{digits}g}")
            name = text.format(f"{number:.9g}", right)
            self.known.setdefault(name, Mistake(name, mistake(number)))
            hypotheses.append(self._hypothesis((name,)))
        enough = 1.25 * min(h.excess for h in hypotheses)
        return next(h for h in hypotheses if h.excess <= enough)

    def _pairs(self, singles: Sequence[Hypothesis]) -> list[Hypothesis]:
        """All pairs, or as many as are worth it: the likeliest first, until one fits."""
        visible = [h.mistakes[0] for h in singles if not self.known[h.mistakes[0]].dtype]
        pairs = sorted(itertools.combinations(range(len(visible)), 2), key=sum)
        likely = [pair for pair in pairs if pair[0] < _LIKELY]
        chosen = likely + [pair for pair in pairs if pair[0] >= _LIKELY]
        costs = [self._cost((visible[i], visible[j])) for i, j in chosen]
        totals = itertools.accumulate(costs)
        count = max(len(likely), sum(total <= _PAIR_CALLS for total in totals))
        self.work.expect(self.checkpoint.bytes * count)
        found: list[Hypothesis] = []
        for i, j in chosen[:count]:
            found.append(self._hypothesis((visible[i], visible[j])))
            if found[-1].excess < _SURE:
                break
        else:
            if count < len(chosen):
                self.notes.append(
                    f"{len(chosen) - count:,} of {len(chosen):,} pairs of mistakes were not tried, "
                    "to save time: a shorter prompt has room for all"
                )
        return found

    def _cost(self, texts: tuple[str, ...]) -> float:
        """Of a run, in calls of a small model."""
        port, config = self._port(texts), self.checkpoint.config
        B, T = self.theirs.input_ids.shape
        steps = 1 if port.cached and not port.stepwise else 1 + T - port.prefill_length
        attended = 4 * config.num_hidden_layers * config.hidden_size * B * T * T
        operations = self.checkpoint.bytes * B * T + attended  # 2 for each weight, which has 2 bytes
        calls = max(steps, operations / _CALL_OPERATIONS * (1 if port.cached else steps))
        return calls * (1 + len(self.theirs.stages) / 25)  # comparing takes its time, too


_EXPONENTS = {rope_base: (0.01, 12.0), norm_epsilon: (-30.0, 0.0)}  # of ten, as a configuration allows them


def _eps(dtype: str) -> float:
    return torch.finfo(DTYPES[dtype]).eps


def _rank(hypothesis: Hypothesis) -> tuple[int, float, float]:
    return -hypothesis.agrees, hypothesis.excess, hypothesis.residual


def _overflow(checkpoint: Checkpoint, theirs: Bundle, work: Work) -> Diagnosis:
    """For a bundle with NaN or infinities: float16 overflow, or ValueError where that cannot be it."""
    order = list(stage_widths(checkpoint.config))
    limit = torch.finfo(torch.float16).max
    beyond: dict[str, float] = {}  # stage → the largest number there, where float16 ends before it

    def keep_beyond(stage: str, value: Tensor, start: int) -> None:
        largest = float(value[theirs.real[:, start : start + value.shape[1]]].abs().max())
        if largest > limit:
            beyond[stage] = max(largest, beyond.get(stage, 0.0))

    work.expect(2 * checkpoint.bytes)
    port = reference(checkpoint, "float64", theirs, work)
    port.stepwise = False
    port.run(keep_beyond, order)
    not_finite = theirs.first_not_finite()
    assert not_finite is not None
    stage, row, position = not_finite
    first = min(beyond, key=order.index, default=None)
    if first is None or order.index(stage) < order.index(first):
        theirs.require_finite()
    assert first is not None  # else it was not finite, and this raised

    measure = Measure(theirs.input_ids, theirs.real, text=False)
    agreeing = count = 0

    def keep_finite(name: str, value: Tensor, start: int) -> None:
        nonlocal agreeing, count
        ours = value.flatten(2)
        judged = theirs.stage(name)[:, start : start + ours.shape[1]]
        real = theirs.real[:, start : start + ours.shape[1]]
        agreeing += int((ours.isfinite() == judged.isfinite())[real].sum())
        count += ours[real].numel()
        both = ours.isfinite() & judged.isfinite()
        measure.add(name, ours.where(both, math.nan), judged.where(both, math.nan), start)

    port = reference(checkpoint, "float16", theirs, work)
    port.stepwise = False
    port.run(keep_finite, theirs.stages)
    if agreeing < _OVERFLOW_AGREES * count:
        theirs.require_finite()
    tolerances = Tolerances({}, "float16", "float16")
    results = [measure.result(s, tolerances.of(s)) for s in measure.stages]
    overflow = replace(Hypothesis.of(("float16 overflow",), results), residuals=(), agrees=0)
    return Diagnosis(
        bundle=theirs.path,
        dtype=theirs.dtype,
        verdict="mistake",
        found=overflow.mistakes,
        alike=[],
        ranking=[overflow, Hypothesis((), math.inf, stage, math.inf, (), 0)],
        comparison=None,
        first_divergence=stage,
        invisible=[],
        tried=2,
        notes=[
            f"NaN or infinite first at {stage}, row {row}, position {position}",
            f"{first} reaches {beyond[first]:,.0f} in float64, and float16 ends at {limit:,.0f}: "
            f"{meaning(first)} needs bfloat16 or float32",
            f"the reference in float16 agrees on {agreeing / count:.1%} of the numbers whether they are "
            "finite; the residual below is that of those that are",
        ],
    )
