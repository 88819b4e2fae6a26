"""The bench's result as a person reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from qwen_ref.commands.tables import aligned


def table(result: dict[str, Any]) -> str:
    """Medians, with the smallest and largest of the repeats."""
    m, subjects = result["machine"], result["subjects"]
    ours, *others = subjects
    lengths = list(subjects[ours])
    memory = result["peak_memory"]
    lines = [
        f"{m.get('gpu', m['processor'])}, {m['cores']} cores, {m['threads']} threads, {m['instructions']}, "
        f"torch {m['torch']}",
        *_head(result),
        f"{result['model']}, {result['layers']} layers; batch {result['batch']}, {result['tokens']} tokens "
        f"decoded, {result['repeats']} repeats: median (smallest to largest)"
        + (f"; {result['ranks']} ranks, figures of rank 0" if result["ranks"] > 1 else ""),
        "",
        f"loaded in {result['load_seconds']:.2f} s; weights {_gb(result['resident_weights'])}, cache for "
        f"{max(lengths)} + {result['tokens']} tokens {_gb(memory['cache'])}",
    ]
    for when in ("while loading", "while running"):
        peak = memory[when]
        lines.append(
            f"peak memory {when}: {_gb(peak['anonymous'])} anonymous and {_gb(peak['mapped'])} mapped more "
            "than before"
        )
    lines.append("")
    rows = [["", ours]]
    for other in others:
        rows[0] += [other, "ratio"]
    for length in lengths:
        for key, what, digits in (
            ("prefill", f"prefill of {length}, tokens/s", 1),
            ("first_token", "  first token after, s", 3),
            ("decode", f"decode at {length}, tokens/s", 2),
        ):
            row = [what, _spread(subjects[ours][length][key], 1, digits)]
            for other in others:
                theirs = subjects[other][length][key]
                ratio = median(subjects[ours][length][key]) / median(theirs)
                row += [_spread(theirs, 1, digits), "" if key == "first_token" else f"{ratio:.2f}"]
            rows.append(row)
        read = result["bytes_per_token"][length]
        rate = subjects[ours][length]["read_rate"]
        achieved = [read * speed / result["batch"] for speed in subjects[ours][length]["decode"]]
        shares = [one / other for one, other in zip(achieved, rate, strict=True)]
        rows.append([f"  read for {_tokens(result['batch'])}, GB", f"{read / 1e9:.3f}"])
        rows.append(["  read, GB/s", _spread(achieved, 1e9)])
        rows.append(["  memory can be read at, GB/s", _spread(rate, 1e9)])
        rows.append(["  share of that", _spread(shares, 1, 2)])
    columns = max(map(len, rows))
    rows = [row + [""] * (columns - len(row)) for row in rows]
    return "\n".join([*lines, *aligned(rows, "<" * columns)])


def _head(result: dict[str, Any]) -> list[str]:
    """Which instructions a peer was compiled for, and which kernels compute ours."""
    lines = [f"kernels: {result['kernels']}"] if result.get("kernels") else []
    if found := result["machine"].get("llama.cpp"):
        built_with = re.findall(r"(\w+) = 1", found["built_with"])
        lines.insert(0, f"llama-cpp-python {found['version']}, built with {' '.join(built_with)}")
    return lines


def _tokens(batch: int) -> str:
    return "a token" if batch == 1 else f"{batch} tokens"


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"


def _spread(values: Sequence[float], unit: float, digits: int = 1) -> str:
    low, high = (f"{pick(values) / unit:,.{digits}f}" for pick in (min, max))
    return f"{median(values) / unit:,.{digits}f} ({low} to {high})"
