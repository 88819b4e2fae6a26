"""Which mistake a port has made: the reference is run with each mistake of the grammar and compared with it.

The run with the port's own mistake agrees with the port to rounding, and no other run does. Logits alone are
enough. With more stages the diagnosis also says at which stage the port first differs, and in which layers.

A mistake is named only if the port differs by more than rounding, or by bits that no right port has. Ports
may round otherwise than this implementation: these are choices, and named as such.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_ref.checkpoint import DTYPES
from qwen_ref.commands.cli import finite
from qwen_ref.loading.files import weight_files
from qwen_ref.parity.bundle import LAYER_STAGES, Bundle, layer_of, meaning, stage_widths
from qwen_ref.parity.compare import (
    FACTOR,
    Comparison,
    Measure,
    StageResult,
    Tolerances,
    measure_bundles,
    same_columns,
)
from qwen_ref.parity.forward import Change
from qwen_ref.parity.guesses import inputs_before, leaving, sizes
from qwen_ref.parity.mistakes import in_single_layers, mistakes
from qwen_ref.parity.mistakes.choices import CLAMPED, SINGLE_TABLES, choices, products_in
from qwen_ref.parity.mistakes.grammar import NONE, Mistake, made
from qwen_ref.parity.mistakes.mlp import SCALED_STEPS, scaled_at
from qwen_ref.parity.mistakes.norms import norm_epsilon
from qwen_ref.parity.mistakes.outside import layer_lists
from qwen_ref.parity.mistakes.rotation import rope_base
from qwen_ref.parity.recording import (
    ROUNDING_DTYPES,
    Progress,
    Work,
    held_against,
    judged_by,
    open_both,
    temporary_record,
)
from qwen_ref.parity.stages import Checkpoint
from qwen_ref.parity.trials import Trials

# A mistake is named only if the port is this many times nearer to the run with it than to the reference.
MARGIN = 3.0

# A choice accuses nobody. Rounding to few bits turns over where two runs differ by their last bit, so a run
# with the port's own choice need not agree with it to float32's rounding. It must be this much nearer.
# One that makes the difference mere rounding explains it if it is nearer by the second factor.
_MARGIN_OF_CHOICES = 10.0
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
# Of the squared error: of right ports that round a part, factors explained 3 to 37 %, of a norm by D − 1 and
# of a norm times 1.003 more than 99 %.
_NO_ROUNDING = 0.6
_NUDGE = 1 / 64
_COLUMNS = 4096  # of the logits, which this is judged by
_LEAST_OF_GRID = 1 / 16  # the share of a dtype's rounding that the output head alone may have

_SURE = 0.4  # tolerances: rounding takes a quarter of its own tolerance, this is a little more
_NOISE = 0.5  # the largest relative error that is still called rounding

# The share of numbers that must be finite in both, or in neither: the reference in float16 and the port.
_OVERFLOW_AGREES = 0.9

_SAMPLE = 64  # positions at which numbers are tested for their dtype
_AFTER = 8  # positions behind the first wrong one that a screening looks at
_LARGE = 5e8  # bytes: of a larger model everything is tried a little less
_AFTER_OF_LARGE = 2
_FINALISTS_OF_LARGE = 3
_FINALISTS = 12  # the best of a screening, which are run in full
_MOST_FINALISTS = 48  # if many more agree with the port so far
_BETTER = 4  # the nearest, of which each is tried together with other mistakes and choices
_FITS = 150  # runs for a base and an epsilon
_FITTED_LENGTH = 256  # positions to which a base or epsilon is fitted

# Seconds that the parts of a search may take, by what a run without mistakes takes. A small model takes far
# less; one of 1.8 billion parameters is kept within ten minutes.
_BUDGETS = {
    "choices": 30.0,
    "mistakes": 120.0,
    "single layers": 150.0,
    "fits": 40.0,
    "pairs": 60.0,
    "within": 150.0,
}
_SIDE_BY_SIDE = 32  # so many times sooner layers run for a mistake if it shares them with others
_COSTLY = 10  # so many times as long a layer takes in which a matrix is quantised


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
    """What `diagnose` finds. verdict: "rounding only", "choice", "mistake" or "none of these"."""

    bundle: str
    dtype: str
    verdict: str
    found: tuple[str, ...]  # the mistakes; the choices, if there is no mistake
    alike: list[tuple[str, ...]]  # others that give the same numbers for these ids
    ranking: list[Hypothesis]  # best first
    comparison: Comparison | None  # the port against the reference; None where it holds NaN
    first_divergence: str | None  # the first stage beyond rounding
    invisible: list[str]  # mistakes that change nothing for these ids
    tried: int
    seconds: float
    choices: tuple[str, ...] = ()  # roundings that are no mistake
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        comparison = self.comparison and self.comparison.to_json()
        ranking = [asdict(hypothesis) for hypothesis in self.ranking]
        return finite({**vars(self), "ranking": ranking, "comparison": comparison})


def diagnose(folder: str | Path, path: str | Path, progress: Progress | None = None) -> Diagnosis:
    """Names the mistake, or the two mistakes, that explain a port's bundle.

    progress: called with the work that is done, and the most that may have to be done: in bytes of weights.
    Raises ValueError for a file that is no bundle, a bundle of another checkpoint, and NaN that float16
    overflow does not explain.
    """
    start = time.monotonic()
    work = Work(progress)
    checkpoint, theirs = open_both(folder, path, work)
    theirs.fill = filling(theirs)
    if theirs.first_not_finite() is not None:
        return _overflow(checkpoint, theirs, work)
    base: tuple[Change, ...] = ()
    if theirs.weights_dtype is not None and _eps(theirs.weights_dtype) > _eps(theirs.computed_in):
        base = made(products_in(DTYPES[theirs.weights_dtype]))
    trials = Trials(checkpoint, theirs, base, work)
    exact = trials.run(NONE, "float64")
    with temporary_record(exact, theirs, torch.float64, checkpoint.config) as truth:
        found = _Search(trials, truth).diagnosis()
    return replace(found, seconds=time.monotonic() - start)


def filling(theirs: Bundle) -> float | None:
    """The value that stands in logits for tokens that were filtered out; None if there is none."""
    if "logits" not in theirs.stages:
        return None
    logits = theirs.stage("logits")[theirs.real]
    least = float(logits.min())
    many = (logits == least).double().mean()
    return least if least < -1e4 and many > 0.05 else None


class _Search:
    """One diagnosis under way."""

    def __init__(self, trials: Trials, truth: Bundle) -> None:
        """truth: this implementation in float64, on the port's input."""
        self.trials, self.truth, self.theirs, self.work = trials, truth, trials.theirs, trials.work
        self.checkpoint, self.config, self.dtype = trials.checkpoint, trials.config, self.theirs.computed_in
        theirs = self.theirs
        self.large = self.checkpoint.bytes > _LARGE
        self.known: dict[str, Mistake] = {}  # all that was tried, by its text
        self.left = dict(_BUDGETS)  # seconds
        self.in_window: dict[str, float] = {}  # residuals of the screening
        self.notes: list[str] = []
        # This implementation's own error at each stage, dtype by dtype: in the port's as it declares.
        known = {} if trials.base else theirs.rounding
        every = set(theirs.stages)
        self.measured = {dtype: dict(found) for dtype, found in known.items() if every <= set(found)}
        self._need("float32" if self.dtype == "float64" else self.dtype)
        self.tolerances = Tolerances(self.measured, self.dtype, self.dtype)
        self.stored = {stage: (theirs.stored_dtype(stage),) for stage in theirs.stages}
        self.comparison = Comparison.of(
            measure_bundles(truth, theirs, theirs.stages),
            Tolerances(self.measured, "float64", self.dtype),
            names=(f"{self.checkpoint.folder} in float64", theirs.path),
            stored={stage: (torch.float64, *kinds) for stage, kinds in self.stored.items()},
            notes=self._notes(),
        )

    def _need(self, *dtypes: str) -> None:
        """Measures the rounding of these dtypes, if that was not done."""
        for dtype in dtypes:
            if dtype not in self.measured:
                run = self.trials.run(NONE, dtype, plain=dtype != self.dtype)
                self.measured[dtype] = dict(held_against(run, self.truth, text=False).all_rounding())

    def _notes(self) -> list[str]:
        theirs, notes = self.theirs, []
        if theirs.weights_sha256 is None:
            notes.append(
                f"{theirs.path} has no weights_sha256: whether its weights are the same was not checked"
            )
        for name, value in theirs.config.items():
            ours = getattr(self.config, name)
            if ours != value:
                notes.append(f"{name} is {value} in {theirs.path}, {ours} in {self.checkpoint.folder}")
        V = self.config.vocab_size
        if "logits" in theirs.stages and theirs.width("logits") < V:
            notes.append(f"it has logits of {theirs.width('logits'):,} of {V:,} rows: these were compared")
        return notes

    # The search

    def diagnosis(self) -> Diagnosis:
        none = self._hypothesis((NONE,))  # the first one reads the weights
        self.seconds = self.seconds_of_window = self._least(lambda: self._hypothesis((NONE,)))
        if self.comparison.within:
            return self._within(none)
        self.window = self._window()
        if "logits" in self.theirs.stages:
            self.seconds_of_window = self._least(lambda: self.trials.screen([NONE], self.window))
        self.places = self._wrong_steps()
        if self.places:
            shown = ", ".join(self.places[:4]) + (
                f" and {len(self.places) - 4} more" if len(self.places) > 4 else ""
            )
            self.notes.append(
                f"computed from the port's own numbers before them, wrong are: {shown}{self._in_a_file()}"
            )
        ranking = self._chosen(none)
        fitting = self._fitting(ranking, none) or self._with_single_tables(ranking)
        if not fitting:
            ranking, fitting = self._singles(none)
        if not fitting:
            sized = self._computed_in(())
            fitting = [h for h in sized if self._numbers_of(h.dtype)]
            if not fitting:
                fits = self._fits(none)
                ranking = sorted([*ranking, *fits], key=_rank)
                fitting = self._fitting(fits, none)
            fitting = fitting or self._with_choices(self._better(ranking, none)) or sized
        if not fitting:
            better = self._better(ranking, none)
            fitting = sorted((h for b in better for h in self._computed_in(b.mistakes)), key=_rank)
        if not fitting:
            pairs = self._pairs(ranking)
            fitting = self._fitting(pairs, none)
            ranking = sorted([*ranking, *pairs], key=_rank)
            if not fitting:
                singles = min((h.excess for h in ranking if len(h.mistakes) == 1), default=math.inf)
                better = [h for h in self._better(pairs, none) if h.excess * MARGIN < singles][:2]
                fitting = self._with_choices(better)
                fitting = fitting or [h for b in better for h in self._computed_in(b.mistakes)]
        if fitting and fitting[0].dtype:
            self._explain(fitting[0])
        return self._found(fitting, ranking, none)

    def _least(self, run: Callable[[], object]) -> float:
        """The seconds that a run takes: of a small model the least of three, as others may hold it up."""
        found = []
        for _ in range(1 if self.large else 3):
            start = time.monotonic()
            run()
            found.append(time.monotonic() - start)
        return min(found)

    def _found(
        self,
        fitting: list[Hypothesis],
        ranking: Sequence[Hypothesis],
        none: Hypothesis,
        invisible: Sequence[str] = (),
    ) -> Diagnosis:
        verdict = "none of these"
        found: tuple[str, ...] = ()
        chosen: tuple[str, ...] = ()
        if fitting:
            texts = fitting[0].mistakes
            chosen = tuple(text for text in texts if self.known[text].choice)
            found = tuple(text for text in texts if text not in chosen) or chosen
            verdict = "choice" if found == chosen else "mistake"
        elif self.comparison.within:
            verdict = "rounding only"
        named = {h.mistakes for h in fitting}
        ranking = sorted((h for h in ranking if h.mistakes not in named), key=_rank)
        ranking = [none, *ranking] if verdict == "rounding only" else sorted([none, *ranking], key=_rank)
        first = self.comparison.first_beyond
        return Diagnosis(
            bundle=self.theirs.path,
            dtype=self.theirs.dtype,
            verdict=verdict,
            found=found,
            alike=[h.mistakes for h in fitting[1:] if h.excess <= _alike(fitting[0])],
            ranking=fitting + ranking,
            comparison=self.comparison,
            first_divergence=first.stage if first else None,
            invisible=list(invisible),
            tried=self.trials.count,
            seconds=0.0,
            choices=chosen,
            notes=self.comparison.notes + self.notes,
        )

    def _within(self, none: Hypothesis) -> Diagnosis:
        """Nothing may be wrong; but what difference there is may be a mistake's."""
        if self._finer():
            return self._found([], [], none)
        tried = [m for m in mistakes(self.config) if m.common and self._may_be(m)]
        tried = self._affordable(tried, "within")
        ranking = sorted((self._hypothesis((mistake,)) for mistake in tried), key=_rank)
        same = [h for h in ranking if h.residuals == none.residuals]
        nearer = [h for h in ranking if self._nearer_than_rounding(h, none)]
        chosen = [h for h in nearer if self.known[h.mistakes[0]].choice]
        if chosen and (not nearer or nearer[0] in chosen):
            self.notes.append(f"its bits are nearest to a choice, no mistake: {chosen[0].text}")
            nearer = []
        nearer = [h for h in nearer if h not in chosen]
        return self._found(nearer, [h for h in ranking if h not in same], none, [h.text for h in same])

    def _nearer_than_rounding(self, hypothesis: Hypothesis, none: Hypothesis) -> bool:
        half = self.dtype in _HALVES
        known = [self.known[text] for text in hypothesis.mistakes]
        if any(mistake.dtype or (half and mistake.usual_in_half) for mistake in known):
            return False
        return none.excess > _LEAST and hypothesis.excess * MARGIN < none.excess

    def _may_be(self, mistake: Mistake) -> bool:
        """A finer dtype than the declared one is no mistake; without overflow, clamping changes nothing."""
        if mistake.text == CLAMPED:
            self._need("float16")
            return not all(math.isfinite(self.measured["float16"][s][0]) for s in self.theirs.stages)
        return mistake.dtype is None or _eps(mistake.dtype) > _eps(self.dtype)

    def _window(self) -> int:
        """How many positions a screening looks at: a little more than up to the first wrong one."""
        T = self.theirs.input_ids.shape[1]
        if "logits" not in self.theirs.stages:
            return T
        (logits,) = (stage for stage in self.comparison.stages if stage.stage == "logits")
        first = T if logits.first_position is None else logits.first_position
        pads = int((~self.theirs.real).sum(dim=-1).max())
        return min(T, max(first, pads) + (_AFTER_OF_LARGE if self.large else _AFTER))

    def _chosen(self, none: Hypothesis) -> list[Hypothesis]:
        """The best choices. They come first: a port that rounds otherwise needs no other explanation."""
        decoded = self.theirs.prefill_length < self.theirs.input_ids.shape[1]
        tried = [m for m in choices() if decoded or "decode steps" not in m.text]
        if not self.trials.has_room_for_scores():
            tried = [m for m in tried if not any(change.step == "attend" for change in m.changes)]
        return self._confirmed(self._screened(self._affordable(tried, "choices")), none)

    def _with_single_tables(self, ranking: Sequence[Hypothesis]) -> list[Hypothesis]:
        """A float64 port whose RoPE is float32, as published. Powers and cosines of another library differ in
        their last bit, so no run can agree with it: the error is judged by its size.
        """
        found = [h for h in ranking if h.mistakes == (SINGLE_TABLES,)]
        if self.dtype != "float64" or not found:
            return []
        cost = held_against(self.trials.run(self.known[SINGLE_TABLES]), self.truth, text=False)
        errors = measure_bundles(self.truth, self.theirs, self.theirs.stages)
        for stage in self.theirs.stages:
            pairs = zip(errors.rounding(stage), cost.rounding(stage), strict=True)
            if any(error > FACTOR * usual + _eps("float64") for error, usual in pairs):
                return []
        return found

    def _singles(self, none: Hypothesis) -> tuple[list[Hypothesis], list[Hypothesis]]:
        """The best of all single mistakes, and those that fit. Cheap and common ones come first."""
        T, prompt = self.theirs.input_ids.shape[1], self.theirs.prefill_length
        ranking: list[Hypothesis] = []

        def searched(tried: Iterable[Mistake], part: str) -> list[Hypothesis]:
            nonlocal ranking
            worth = [m for m in tried if self._may_be(m) and (prompt < T or "decode" not in m.text)]
            worth = [m for m in worth if m.longer_than < T]
            if self.theirs.stages == ["embed"]:
                worth = [m for m in worth if any(change.step in ("ids", "embed") for change in m.changes)]
            if not self.trials.has_room_for_scores():
                count = len(worth)
                worth = [m for m in worth if not any(change.step == "attend" for change in m.changes)]
                if count > len(worth):
                    self.notes.append(
                        f"{count - len(worth):,} mistakes in attention were not tried: with {T:,} positions "
                        "they take more memory than is left; try a shorter prompt"
                    )
            found = self._confirmed(self._screened(self._affordable(worth, part)), none)
            ranking = sorted([*ranking, *found], key=_rank)
            return self._fitting(ranking, none)

        outgoing = list(leaving(self.trials)) if "logits" in self.theirs.stages else []
        tried = sorted([*outgoing, *mistakes(self.config)], key=lambda m: (not m.common, m.costly))
        fitting = searched(tried, "mistakes")
        if not fitting:
            more = [*layer_lists(self.config), *inputs_before(self.trials), *sizes(self.trials)]
            fitting = searched(more, "mistakes")
        if not fitting:
            # Those for which all positions must be computed take the longest, and come last.
            single = in_single_layers(self.config, self._suspects())
            fitting = searched(sorted(single, key=lambda m: (m.whole, m.costly)), "single layers")
        return ranking, fitting

    def _suspects(self) -> list[int]:
        """The layers in which a single mistake may be; the last first."""
        layers = range(self.config.num_hidden_layers)[::-1]
        wrong = {layer for stage in self.places if (layer := layer_of(stage)) is not None}
        return [layer for layer in layers if not self.places or layer in wrong]

    def _wrong_steps(self) -> list[str]:
        """With all stages of a layer there: those that are wrong although what they are computed from is the
        port's own.
        """
        if len(self.theirs.stages) < len(LAYER_STAGES):
            return []
        results = self._results(self.trials.measure_steps(), self.tolerances)
        return [result.stage for result in results if not result.within]

    def _in_a_file(self) -> str:
        """Where the weights of all wrong steps are, if that is one file of several."""
        names = {_WEIGHTS.get(re.sub(r"^blocks\.\d+\.", "", stage), "") for stage in self.places}
        files = {
            self.checkpoint.file_of(re.sub(r"^(blocks\.\d+\.)?.*", rf"\g<1>{weight}", stage, count=1))
            for stage in self.places
            if (weight := _WEIGHTS.get(re.sub(r"^blocks\.\d+\.", "", stage)))
        }
        alone = "" in names or len(files) != 1 or len(weight_files(self.checkpoint.folder).paths) == 1
        return "" if alone else f"; the weights of all of them are in {files.pop()}"

    def _screened(self, tried: Sequence[Mistake]) -> dict[str, float]:
        self.known |= {mistake.text: mistake for mistake in tried}
        if "logits" in self.theirs.stages:
            return self.trials.screen(tried, self.window)
        return {mistake.text: self._hypothesis((mistake,)).residual for mistake in tried}

    def _confirmed(self, residuals: dict[str, float], none: Hypothesis) -> list[Hypothesis]:
        """Those that come nearest in a screening, run in full."""
        self.in_window |= residuals
        order = sorted(residuals, key=lambda text: residuals[text])
        agree = 2 * self.tolerances.of(self.theirs.stages[-1]).all
        count = sum(residual <= agree for residual in residuals.values())
        most, least = (_FINALISTS, _FINALISTS_OF_LARGE) if self.large else (_MOST_FINALISTS, _FINALISTS)
        chosen = order[: max(min(count, most), least)]
        common = [text for text in residuals if self.known[text].common and residuals[text] < math.inf]
        if not self.large:
            chosen += [text for text in common if text not in chosen and residuals[text] <= agree]
        return sorted((self._hypothesis((self.known[text],)) for text in chosen), key=_rank)

    def _hypothesis(self, tried: tuple[Mistake, ...]) -> Hypothesis:
        texts = tuple(mistake.text for mistake in tried if mistake is not NONE)
        self.known |= {mistake.text: mistake for mistake in tried}
        self.work.expect(self.checkpoint.bytes)
        measure = self.trials.measure(together(tried))
        for index, stage in enumerate(self.theirs.stages):
            if stage not in measure.stages:  # they have a layer that this port lacks
                return Hypothesis(texts, math.inf, stage, math.inf, (), index)
        return Hypothesis.of(texts, self._results(measure, self.tolerances))

    def _results(self, measure: Measure, tolerances: Tolerances) -> list[StageResult]:
        """Of the port's stages that were measured, in the order in which data flows."""
        stages = [stage for stage in self.theirs.stages if stage in measure.stages]
        return [measure.result(stage, tolerances.of(stage, self.stored[stage])) for stage in stages]

    def _better(self, ranking: Sequence[Hypothesis], none: Hypothesis) -> list[Hypothesis]:
        """The best mistakes that are clearly nearer than no mistake. A dtype is not judged by that."""
        judged = [h for h in ranking if not any(self.known[text].sized for text in h.mistakes)]
        judged = [h for h in judged if not all(self.known[text].choice for text in h.mistakes)]
        return [h for h in judged[:_BETTER] if h.excess * MARGIN < none.excess]

    def _fitting(self, ranking: Sequence[Hypothesis], none: Hypothesis) -> list[Hypothesis]:
        """Those with which the port agrees to rounding, their own or the reference's; the likeliest first."""
        fitting: list[Hypothesis] = []
        ranking = sorted(ranking, key=_rank)[:_MOST_FINALISTS]
        doubtful = ranking[: 1 if self.large else _MOST_FINALISTS]
        for h in ranking:
            kinds = [self.known[text] for text in h.mistakes]
            chosen = all(kind.choice for kind in kinds)
            margin = _MARGIN_WITHIN if chosen else MARGIN
            if any(kind.sized for kind in kinds) or not h.excess * margin < none.excess:
                continue
            if (
                h.excess <= 1
                or (chosen and h.excess * _MARGIN_OF_CHOICES < none.excess)
                or (len(fitting) < _BETTER and h in doubtful and self._within_its_own_rounding(h))
            ):
                fitting.append(h)
        if not fitting:
            return []
        # Of those that fit alike, the commonest: what all layers have before what one has.
        order = {text: number for number, text in enumerate(self.known)}
        near = [h for h in fitting if h.excess <= _alike(fitting[0])]
        near.sort(
            key=lambda h: (
                any(not self.known[text].common for text in h.mistakes),
                sum(" only" in text for text in h.mistakes),
                sum(text.count(" + ") for text in h.mistakes if self.known[text].choice),
                # Two common ones that compute the same may still round otherwise.
                h.excess if all(self.known[text].common for text in h.mistakes) else 0,
                sum(order[text] for text in h.mistakes),
            )
        )
        return near + [h for h in fitting if h not in near]

    def _with_choices(self, better: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Mistakes in a port that also rounds otherwise."""
        found = []
        for h in better:
            known = tuple(self.known[text] for text in h.mistakes)
            for choice in self._affordable(list(choices()), "choices"):
                both = self._hypothesis((*known, choice))
                if both.excess * MARGIN < h.excess and (
                    both.excess <= 1
                    or both.excess * _MARGIN_OF_CHOICES < h.excess
                    or self._within_its_own_rounding(both)
                ):
                    found.append(both)
        return sorted(found, key=_rank)

    def _finer(self) -> bool:
        """Whether the port is clearly nearer to float64 than its dtype's rounding, which is no mistake."""
        stage = self.comparison.stages[-1]
        if self.dtype == "float64":
            return False
        least = _FINER if self.dtype in _HALVES else 1 / FACTOR  # float32's error varies more with the order
        if not stage.relative_rms < least * self.tolerances.rounding(self.dtype, stage.stage).all:
            return False
        if stage.relative_rms == 0:  # the embedding: rows of a weight, which no dtype here rounds
            self.notes.append(f"{stage.stage} is what float64 gives, to the last bit")
            return True
        self._need(*ROUNDING_DTYPES)
        costs = {name: self.tolerances.rounding(name, stage.stage).all for name in DTYPES}
        note = f"nearer to float64 than this implementation in {self.dtype}"
        note += f", {costs[self.dtype] / stage.relative_rms:,.2g} times at {stage.stage}"
        nearest = min(costs, key=lambda name: abs(math.log(stage.relative_rms / costs[name])))
        if nearest != self.dtype:
            note += f", and about as near as it is in {nearest}"
        elif self.dtype in _HALVES:
            note += f": as if only what enters a product were {self.dtype}, and the rest float32"
        self.notes.append(f"{note}: more precision than declared is no mistake")
        return True

    def _computed_in(self, texts: tuple[str, ...]) -> list[Hypothesis]:
        """With these mistakes, the dtype whose rounding the port's error is as large as, if there is one.

        It is a mistake if the port's numbers are that dtype's, or those of the run in it. A port of which
        only a part is computed in it has made a choice.
        """
        stages, last = self.theirs.stages, self.theirs.stages[-1]
        known = tuple(self.known[text] for text in texts)
        wider = [dtype for dtype in ("bfloat16", "float16", "float32") if _eps(dtype) > _eps(self.dtype)]
        wider = [dtype for dtype in wider if not self._has_finer_numbers(dtype)]
        run = self.trials.run(together(known), "float64")
        with temporary_record(run, self.theirs, torch.float64, self.config) as truth:
            if truth.stages != stages:
                return []  # a layer is missing
            theirs = measure_bundles(truth, self.theirs, stages)
            ours = {d: held_against(self.trials.run(together(known), d), truth, text=False) for d in wider}
        error = theirs.rounding(last).all
        costs = {dtype: measure.rounding(last).all for dtype, measure in ours.items()}
        ratios = {dtype: error / cost for dtype, cost in costs.items() if error > 0 and 0 < cost < math.inf}
        if not ratios:
            return []
        dtype = min(ratios, key=lambda dtype: abs(math.log(ratios[dtype])))
        tolerances = Tolerances({dtype: ours[dtype].all_rounding()}, "float64", dtype)
        results = self._results(theirs, tolerances)
        worst = max(results, key=lambda result: result.excess)
        everywhere = theirs.positions(last) >= _FAINT * ours[dtype].positions(last)
        least = _LEAST_OF_GRID if self._numbers_of(dtype) else 1 / FACTOR
        if not worst.within or worst.tolerance > _NOISE or ratios[dtype] < least or not everywhere.all():
            return []
        text = f"computed in {dtype}"
        run = self.trials.run(together((*known, Mistake(text, dtype=dtype))))
        own = judged_by(run, self.theirs, text=False).rounding(last).all
        its = self._numbers_of(dtype) or self._sample.dtype == DTYPES[dtype]
        part = ratios[dtype] < _FINER or (not its and own > error / 2)
        if part:
            share = self._explained_by_scale(known)
            if share > _NO_ROUNDING:
                self.notes.append(
                    f"the error is as large as {dtype} rounds, but no rounding: {share:.0%} of it is what a "
                    "constant factor at one step or another would make"
                )
                return []
            text = f"a part computed in {dtype}"
        self.known.setdefault(text, Mistake(text, dtype=dtype, sized=True, choice=part))
        named = {f"computed in {dtype}": ratio for dtype, ratio in ratios.items()}
        return [Hypothesis.of((*texts, text), results, dtype=dtype, ratios=named)]

    def _explained_by_scale(self, known: tuple[Mistake, ...]) -> float:
        """The share of the port's squared error that factors near 1 at the steps explain. Of rounding it is
        next to nothing; of a norm with another constant, or a wrong factor, it is most.
        """
        last = self.theirs.stages[-1]
        real, theirs = self.theirs.real, self.theirs.stage(last)
        columns = slice(None, None, max(theirs.shape[-1] // _COLUMNS, 1))

        def numbers(changes: tuple[Change, ...]) -> Tensor:
            kept: list[Tensor] = []
            run = self.trials.run(together([*known, Mistake("scaled", changes)]))
            run.run(lambda stage, value, start: kept.append(value), [last])
            return kept[0][..., : theirs.shape[-1]][real][:, columns].double().flatten()

        right = numbers(())
        scaled = [numbers(made(scaled_at(step, 1 + _NUDGE))) - right for step in SCALED_STEPS]
        error = theirs[real][:, columns].double().flatten() - right
        basis = torch.stack([each for each in (*scaled, right) if bool(each.any())], dim=1)
        left = error - basis @ torch.linalg.lstsq(basis, error[:, None]).solution[:, 0]
        return 1 - float(left.square().sum() / error.square().sum())

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
        known = together([self.known[text] for text in hypothesis.mistakes])
        dtype = known.dtype or self.dtype
        run = self.trials.run(known, "float64")
        with temporary_record(run, self.theirs, torch.float64, self.config) as truth:
            measured = {dtype: held_against(self.trials.run(known), truth, text=False).all_rounding()}
            judged = measure_bundles(truth, self.theirs, truth.stages)
        tolerances = Tolerances(measured, "float64", dtype)
        # A model that is nothing but noise would fit everything.
        results = self._results(judged, tolerances)
        return all(result.within and result.tolerance < _NOISE for result in results)

    # Numbers that nobody lists

    def _fits(self, none: Hypothesis) -> list[Hypothesis]:
        if not self._affordable([NONE] * _FITS, "fits")[_FITS - 1 :]:
            self.notes.append("no RoPE base and no epsilon was fitted, to save time: try a shorter prompt")
            return []
        fits = [self._fitted_base(), self._fitted_epsilon()]
        return [h for h in fits if h.excess * MARGIN < none.excess]

    def _fitted_base(self) -> Hypothesis:
        """The RoPE base that comes nearest. A few positions turn little: they lead to the many."""
        T = min(self.theirs.input_ids.shape[1], _FITTED_LENGTH)
        lengths = [2**power for power in range(2, T.bit_length()) if 2**power < T]
        found, step = self._nearest(rope_base, 5.5, 3.5 / 28, 57, lengths[0] if lengths else T)
        for length in [*lengths[1:], T]:
            found, step = self._nearest(rope_base, found, step / 2, 9, length)
        for _ in range(8):  # to one part in a million, and further
            found, step = self._nearest(rope_base, found, step / 4, 9, T)
        right = self.config.rotary_emb_base
        return self._rounded(rope_base, "RoPE base {} for {:g}", right, found)

    def _fitted_epsilon(self) -> Hypothesis:
        T = min(self.theirs.input_ids.shape[1], _FITTED_LENGTH)
        found, step = self._nearest(norm_epsilon, -6.5, 0.5, 27, T)
        for _ in range(3):
            found, step = self._nearest(norm_epsilon, found, step / 4, 9, T)
        eps = self.config.layer_norm_epsilon
        return self._rounded(norm_epsilon, "layer_norm_epsilon {} for {:g}", eps, found)

    def _nearest(
        self, change: Callable[[float], Any], middle: float, step: float, points: int, length: int
    ) -> tuple[float, float]:
        """Of so many powers of ten, so far apart, the one that is nearest over the first positions."""
        low, high = _EXPONENTS[change]
        exponents = [min(max(middle + (i - points // 2) * step, low), high) for i in range(points)]
        tried = {f"{x:.17g}": Mistake(f"{x:.17g}", made(change(10**x))) for x in exponents}
        if "logits" in self.theirs.stages:
            pads = int((~self.theirs.real).sum(dim=-1).max())
            errors = self.trials.screen(tried.values(), min(length + pads, self.theirs.input_ids.shape[1]))
        else:
            errors = {text: self._hypothesis((mistake,)).residual for text, mistake in tried.items()}
        return float(min(errors, key=lambda text: errors[text])), step

    def _rounded(
        self, change: Callable[[float], Any], text: str, right: float, exponent: float
    ) -> Hypothesis:
        """The number found, with no more digits than the port's numbers ask for."""
        hypotheses: list[Hypothesis] = []
        for digits in (1, 2, 3, 5, 9):
            number = float(f"{10**exponent:.{digits}g}")
            name = text.format(f"{number:.9g}", right)
            mistake = self.known.setdefault(name, Mistake(name, made(change(number))))
            hypotheses.append(self._hypothesis((mistake,)))
        enough = 1.25 * min(h.excess for h in hypotheses)
        return next(h for h in hypotheses if h.excess <= enough)

    # Two mistakes

    def _pairs(self, singles: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Pairs of the common mistakes, and of what came nearest with them."""
        rank = {h.mistakes[0]: number for number, h in enumerate(singles) if len(h.mistakes) == 1}
        if self.theirs.stages == ["embed"]:
            return []
        common = [m for m in mistakes(self.config) if m.common and not m.choice and self._may_be(m)]
        near = [self.known[text] for text in rank if not self.known[text].common]
        near = [m for m in near if not m.choice and not m.sized][:_BETTER]
        tried = sorted([*common, *near], key=lambda mistake: rank.get(mistake.text, len(rank)))
        # What explains the first positions best has one of the mistakes; later positions show the other.
        found: list[Hypothesis] = []
        for one in sorted(tried, key=lambda mistake: self.in_window.get(mistake.text, math.inf))[:_BETTER]:
            both = [(one, other) for other in tried if other is not one]
            found += self._screened_pairs(self._worth(both), self.theirs.input_ids.shape[1])
            if min((pair.excess for pair in found), default=math.inf) < _SURE:
                return sorted(found, key=_rank)
        pairs = sorted(itertools.combinations(range(len(tried)), 2), key=sum)
        both = [(tried[i], tried[j]) for i, j in pairs]
        worth = self._worth(both)
        if len(worth) < len(both):
            self.notes.append(
                f"{len(both) - len(worth):,} of {len(both):,} pairs of mistakes were not tried, "
                "to save time: a shorter prompt has room for all"
            )
        return sorted([*found, *self._screened_pairs(worth, self.window)], key=_rank)

    def _worth(self, pairs: list[tuple[Mistake, Mistake]]) -> list[tuple[Mistake, Mistake]]:
        return pairs[: len(self._affordable([together(pair) for pair in pairs], "pairs"))]

    def _screened_pairs(self, pairs: list[tuple[Mistake, Mistake]], window: int) -> list[Hypothesis]:
        """The best of these pairs, in full."""
        named = {together(pair).text: pair for pair in pairs}
        for pair in pairs:
            self.known |= {mistake.text: mistake for mistake in pair}
        if "logits" not in self.theirs.stages:
            return [self._hypothesis(pair) for pair in pairs]
        residuals = self.trials.screen(map(together, pairs), window)
        nearest = sorted(residuals, key=lambda text: residuals[text])[:_FINALISTS]
        return sorted((self._hypothesis(named[text]) for text in nearest), key=_rank)

    def _affordable(self, tried: Sequence[Mistake], part: str) -> list[Mistake]:
        """As many as the part's budget has room for, by what a run without mistakes takes here."""
        L = self.config.num_hidden_layers
        kept, total = [], 0.0
        for mistake in tried:
            first, last = mistake.span(L)
            share = (L - max(first, 0)) / L if mistake.changes else 1.0
            if first == last and 0 <= first < L:  # its layer alone; the layers behind it run for many at once
                share = 1 / L + (share if mistake.whole else share / _SIDE_BY_SIDE)
            share += (min(last, L - 1) - max(first, 0) + 1) / L * _COSTLY if mistake.costly else 0
            cost = share * (self.seconds if mistake.whole or part == "within" else self.seconds_of_window)
            if total + cost <= self.left[part]:
                total += cost
                kept.append(mistake)
        self.left[part] -= total
        if len(kept) < len(tried) and part != "pairs":
            left = len(tried) - len(kept)
            self.notes.append(f"{left:,} of {len(tried):,} hypotheses ({part}) were not tried, to save time")
        self.work.expect(self.checkpoint.bytes * len(kept))
        return kept


def together(tried: Iterable[Mistake]) -> Mistake:
    """All of them in one run."""
    tried = [mistake for mistake in tried if mistake is not NONE]
    if len(tried) == 1:
        return tried[0]
    return Mistake(
        " + ".join(mistake.text for mistake in tried),
        tuple(change for mistake in tried for change in mistake.changes),
        dtype=next((m.dtype for m in tried if m.dtype), None),
        whole=any(m.whole for m in tried),
        uncached=any(m.uncached for m in tried),
        put_before=next((m.put_before for m in tried if m.put_before is not None), None),
        shown_first=any(m.shown_first for m in tried),
    )


def _alike(best: Hypothesis) -> float:
    """Up to which excess another hypothesis explains the port as well as the best."""
    return max(2 * best.excess, 0.02)


# The weight that a stage is computed with.
_WEIGHTS = {
    "embed": "embed.weight",
    "attn_norm": "attn_norm.weight",
    **{f"attn.{part}": "attn.qkv.weight" for part in "qkv"},
    "attn.out": "attn.out.weight",
    "mlp_norm": "mlp_norm.weight",
    **{f"mlp.{part}": f"mlp.{part}.weight" for part in ("gate", "up", "down")},
    "norm": "norm.weight",
    "logits": "lm_head.weight",
}

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
    trials = Trials(checkpoint, theirs, (), work)
    trials.run(NONE, "float64").run(keep_beyond, order)
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
        ours, judged = same_columns(value, theirs.stage(name))
        real = theirs.real[:, start : start + ours.shape[1]]
        agreeing += int((ours.isfinite() == judged.isfinite())[real].sum())
        count += ours[real].numel()
        both = ours.isfinite() & judged.isfinite()
        measure.add(name, ours.where(both, math.nan), judged.where(both, math.nan), start)

    trials.run(NONE, "float16").run(keep_finite, theirs.stages)
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
        seconds=0.0,
        notes=[
            f"NaN or infinite first at {stage}, row {row}, position {position}",
            f"{first} reaches {beyond[first]:,.0f} in float64, and float16 ends at {limit:,.0f}: "
            f"{meaning(first)} needs bfloat16 or float32",
            f"the reference in float16 agrees on {agreeing / count:.1%} of the numbers whether they are "
            "finite; the residual below is that of those that are",
        ],
    )
