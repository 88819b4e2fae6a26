"""A comparison or a diagnosis as text, and the plot of error by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwen_ref.commands.figures import pyplot, save
from qwen_ref.commands.tables import aligned
from qwen_ref.parity.bundle import layer_of, meaning
from qwen_ref.parity.compare import FACTOR, Comparison, LogitsResult, StageResult
from qwen_ref.parity.diagnosis import Diagnosis

Decode = Callable[[int], str]  # a token's text, for people

_MOST_ROWS = 60  # a table with more is shown in part

_HEAD = ("stage", "max |Δ|", "rel. RMS", "tolerance", "worst position", "tolerance", "cosine")


def comparison_lines(comparison: Comparison, decode: Decode | None, full: bool = False) -> Iterator[str]:
    """The table, the first stage beyond its tolerance, and what the logits say."""
    yield f"truth:  {comparison.truth} ({comparison.truth_dtype})"
    yield f"judged: {comparison.judged} ({comparison.judged_dtype})"
    yield f"tolerances: {comparison.tolerances}"
    for note in comparison.notes:
        yield f"note: {note}"
    yield ""
    first = comparison.first_beyond
    shown = list(comparison.stages) if full else _in_part(comparison.stages, first)
    yield from aligned([_HEAD, *(_row(stage, stage is first) for stage in shown)], "<>>>>><")
    if len(shown) < len(comparison.stages):
        yield f"({len(comparison.stages) - len(shown)} more stages are not shown; --full shows all)"
    yield ""
    if first is None:
        largest = max(comparison.stages, key=lambda stage: stage.excess)
        yield (
            f"within tolerance at all {len(comparison.stages)} stages; "
            f"nearest to it at {largest.stage}, {largest.excess:.2f} of it"
        )
    else:
        far = (
            f"{_times(first.excess)} as far as that"
            if math.isfinite(first.excess)
            else "infinitely far from it"
        )
        yield f"first stage beyond its tolerance: {first.stage}, {far}{_since(first)}"
        yield f"look at {meaning(first.stage)}"
    if comparison.logits is not None:
        yield ""
        yield from _logits_lines(comparison.logits, decode)


def _since(stage: StageResult) -> str:
    return f", from position {stage.first_position} on" if stage.first_position else ""


def _in_part(stages: Sequence[StageResult], first: StageResult | None) -> list[StageResult]:
    """A long table in part: each layer's residual, and all stages of the layer that `first` is in."""
    if len(stages) <= _MOST_ROWS:
        return list(stages)
    layer = layer_of(first.stage) if first is not None else None
    return [
        stage
        for stage in stages
        if stage.stage.endswith(".residual")
        or layer_of(stage.stage) is None
        or layer_of(stage.stage) == layer
    ]


def _row(stage: StageResult, first: bool) -> tuple[str, ...]:
    mark = "" if stage.within else "  <- first beyond" if first else "  beyond"
    return (
        stage.stage,
        _number(stage.max_abs),
        _number(stage.relative_rms),
        _number(stage.tolerance),
        f"{_number(stage.worst)} at {stage.worst_position:>4}",
        _number(stage.worst_tolerance),
        f"{stage.cosine:.9f}{mark}",
    )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def _times(value: float) -> str:
    return f"{value:,.1f} times" if math.isfinite(value) else "infinitely many times"


def _logits_lines(logits: LogitsResult, decode: Decode | None) -> Iterator[str]:
    def token(number: int) -> str:
        return f"{number} {decode(number)}" if decode else str(number)

    yield (
        f"KL divergence: mean {_number(logits.kl_mean)}, 99th percentile {_number(logits.kl_p99)}, "
        f"largest {_number(logits.kl_max)} nats"
    )
    yield f"first choice agrees at {logits.top1:.1%} of {logits.positions} positions"
    if logits.clear_top1 is not None:
        yield (
            f"  where it leads by more than the noise, {_number(logits.noise)}: "
            f"at {logits.clear_top1:.1%} of {logits.clear} positions"
        )
    yield f"first five choices: {logits.top5:.1%} are the same"
    worst = logits.worst
    yield (
        f"worst position: {worst.position} of row {worst.row}, after token {token(worst.input_id)}, "
        f"{_number(worst.kl)} nats"
    )
    says = [(worst.truth_id, "both say", worst.truth_probabilities)]
    if worst.judged_id != worst.truth_id:
        says = [
            (worst.truth_id, "the truth says", worst.truth_probabilities),
            (worst.judged_id, "what is judged says", worst.judged_probabilities),
        ]
    for number, who, (truth, judged) in says:
        yield f"  {who} {token(number)}: probability {truth:.4f} in the truth, {judged:.4f} in what is judged"


def diagnosis_lines(diagnosis: Diagnosis, full: bool = False) -> Iterator[str]:
    """The ranking, then the verdict."""
    tried = f"{diagnosis.tried:,} hypotheses in {diagnosis.seconds:.1f} s"
    yield f"{diagnosis.bundle} ({diagnosis.dtype}): {tried}"
    for note in diagnosis.notes:
        yield f"note: {note}"
    if diagnosis.invisible:
        names = diagnosis.invisible if full else diagnosis.invisible[:2]
        rest = len(diagnosis.invisible) - len(names)
        yield f"these ids cannot show: {'; '.join(names)}" + (f"; and {rest} more (--full)" if rest else "")
    yield ""
    rows = diagnosis.ranking if full else diagnosis.ranking[:5]
    head = ("residual", "in tolerances", "at", "with")
    cells = [(_number(h.residual), _short(h.excess), h.stage, h.text) for h in rows]
    yield from aligned([head, *cells], "<>><")
    yield ""
    comparison = diagnosis.comparison
    if diagnosis.first_divergence and comparison and comparison.first_beyond:
        first = comparison.first_beyond
        yield (
            f"from float64 it first differs by more than rounding at {first.stage}: relative RMS "
            f"{_number(first.relative_rms)}, tolerance {_number(first.tolerance)}{_since(first)}"
        )
    yield from _verdict(diagnosis)


_NEARER = 1.5  # times as near as no mistake: less than that explains nothing
_MOST_ALIKE = 4  # explanations that give the same numbers


def _short(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:,.2f}" if value < 1e9 else f"{value:.2e}"


def _verdict(diagnosis: Diagnosis) -> Iterator[str]:
    best, *others = diagnosis.ranking
    alike = {" + ".join(names) for names in diagnosis.alike}
    if diagnosis.verdict == "rounding only":
        yield "rounding only: nothing is wrong that this dtype could show"
        return
    if diagnosis.verdict == "choice":
        yield f"a choice, no mistake: {best.text}"
        yield "  it rounds more than the dtype that is declared, and explains all the difference"
        return
    if diagnosis.verdict == "none of these":
        assert diagnosis.first_divergence is not None
        yield f"none of these; first divergence at {diagnosis.first_divergence}"
        look = f"look at {meaning(diagnosis.first_divergence)}"
        plain = next((h for h in diagnosis.ranking if not h.mistakes), None)
        if plain is None or best.excess * _NEARER < plain.excess:
            yield f"{look}; nearest was: {best.text}"
        else:
            yield f"{look}; nothing that was tried comes nearer than no mistake at all"
        if diagnosis.comparison and (first := diagnosis.comparison.first_beyond):
            yield f"the error is largest at position {first.worst_position} of row {first.worst_row}"
        if diagnosis.comparison and [stage.stage for stage in diagnosis.comparison.stages] == ["logits"]:
            yield (
                "logits alone do not tell which weights differ (compare weights_sha256), or a mistake that "
                "nobody listed: a bundle with more stages says where it begins"
            )
        return
    found = " + ".join(diagnosis.found)
    yield f"the mistake: {found}" if len(diagnosis.found) == 1 else f"the mistakes: {found}"
    if diagnosis.choices:
        yield f"  and a choice, which is no mistake: {' + '.join(diagnosis.choices)}"
    if diagnosis.first_divergence is None:
        yield "  (what it changes is no more than this dtype rounds; the rounding itself gave it away)"
    shown = [" + ".join(names) for names in diagnosis.alike][:_MOST_ALIKE]
    for name in shown:
        yield f"  or, with the same numbers for these ids: {name}"
    if len(alike) > len(shown):
        yield f"  or {len(alike) - len(shown)} more (--json)"
    second = next((h for h in others if h.text not in alike), None)
    if second is not None:
        far = second.excess / best.excess if best.excess else math.inf
        yield (
            f"  residual {_number(best.residual)}; second best {_number(second.residual)} with {second.text}"
            + (f", {_times(far)} as far" if math.isfinite(far) else "")
        )


def plot(comparison: Comparison, out: str | Path) -> None:
    """Error by depth: of what is judged, and the measured rounding of each dtype, a line each.

    Raises ValueError where matplotlib is not installed.
    """
    names = [stage.stage for stage in comparison.stages]
    figure, axes = pyplot().subplots(figsize=(10, 5), layout="constrained")
    for dtype, rounding in sorted(comparison.rounding.items()):
        values = [rounding.get(name) or math.nan for name in names]
        axes.plot(values, linewidth=1, label=f"rounding of {dtype}, measured")
    values = [stage.relative_rms or math.nan for stage in comparison.stages]
    axes.plot(values, "k.", label=f"judged ({comparison.judged_dtype})")
    axes.plot([stage.tolerance for stage in comparison.stages], "k:", label=f"tolerance, {FACTOR:g} ×")
    axes.set_yscale("log")
    axes.set_ylabel("relative RMS error")
    axes.set_xlabel("stage, in the order in which data flows (a tick where a layer begins)")
    starts: dict[int, int] = {}  # layer → its first stage
    for i, name in enumerate(names):
        if (layer := layer_of(name)) is not None:
            starts.setdefault(layer, i)
    step = -(-len(starts) // 20)
    chosen = [layer for layer in sorted(starts) if layer % max(step, 1) == 0]
    axes.set_xticks([starts[layer] for layer in chosen], [f"layer {layer}" for layer in chosen])
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, out)
