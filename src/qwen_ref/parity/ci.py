"""The result of `check`, `diff` or `diagnose` for a CI system: a JUnit file, GitHub's annotations."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from qwen_ref.commands.cli import printable
from qwen_ref.commands.files import output_path, write_whole
from qwen_ref.config import InputError
from qwen_ref.parity.bundle import layer_of, meaning
from qwen_ref.parity.compare import Comparison, StageResult
from qwen_ref.parity.diagnosis import Diagnosis
from qwen_ref.parity.report import diagnosis_lines

# Verdicts of `diagnose` with which a port is right. A choice is a deliberate rounding, as an int8 KV cache.
RIGHT = ("rounding only", "choice")


def passed(result: Comparison | Diagnosis) -> bool:
    """Whether the command's exit code is 0."""
    return result.within if isinstance(result, Comparison) else result.verdict in RIGHT


def check_junit(args: argparse.Namespace) -> None:
    """Before any work: raises ValueError where --junit cannot be written."""
    if args.junit is None:
        return
    target = output_path(args.junit, "--junit", args)
    plot = getattr(args, "plot", None)
    if plot is not None and Path(os.path.realpath(plot)) == target:
        raise InputError(f"--junit and --plot both name {args.junit}; give two names")


def write_junit(path: Path, result: Comparison | Diagnosis, command: str, bundle: Path) -> None:
    """Writes a JUnit file, complete or not at all: a testcase for each stage, or one for a diagnosis.

    bundle: the file that gives the testcases their class name.
    """
    failed = 0
    suite = ElementTree.Element("testsuite", name=f"qwen_ref.parity {command}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(result):
        ElementTree.SubElement(properties, "property", name=name, value=_text(value))
    for classname, name, failure in _testcases(result, command, bundle):
        # time: some readers need it, but one run measures all stages together.
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name, time="0")
        if failure is not None:
            failed += 1
            kind, message, text = failure
            found = ElementTree.SubElement(case, "failure", type=kind, message=_text(message))
            found.text = _text(text)
    tests = str(len(suite.findall("testcase")))
    counts = {"tests": tests, "failures": str(failed), "errors": "0", "skipped": "0", "time": "0"}
    suite.attrib.update(counts)
    root = ElementTree.Element("testsuites", {"name": "qwen_ref.parity", **counts})
    root.append(suite)
    ElementTree.indent(root)
    write_whole(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _properties(result: Comparison | Diagnosis) -> Iterator[tuple[str, str]]:
    if isinstance(result, Comparison):
        yield "truth", f"{result.truth} ({result.truth_dtype})"
        yield "judged", f"{result.judged} ({result.judged_dtype})"
        yield "tolerances", result.tolerances
    else:
        yield "bundle", f"{result.bundle} ({result.dtype})"
        yield "verdict", result.verdict
    for note in result.notes:
        yield "note", note


Failure = tuple[str, str, str]  # type, message, text


def _testcases(
    result: Comparison | Diagnosis, command: str, bundle: Path
) -> Iterator[tuple[str, str, Failure | None]]:
    """Class name, name, and what failed."""
    stem = _text(bundle.stem)
    if isinstance(result, Diagnosis):
        lines = _conclusion(result)
        failure = None if passed(result) else (result.verdict, _verdict(result), "\n".join(lines))
        yield stem, command, failure
        return
    for stage in result.stages:
        layer = layer_of(stage.stage)
        classname = stem if layer is None else f"{stem}.blocks.{layer}"
        failure = None
        if not stage.within:
            failure = ("beyond tolerance", _error(stage), "\n".join(_details(stage)))
        yield classname, stage.stage, failure


def _error(stage: StageResult) -> str:
    """Relative RMS, worst position, and their tolerances."""
    return (
        f"relative RMS {stage.relative_rms:.2e}, tolerance {stage.tolerance:.2e}; worst position "
        f"{stage.worst_position} of row {stage.worst_row}: {stage.worst:.2e}, "
        f"tolerance {stage.worst_tolerance:.2e}"
    )


def _details(stage: StageResult) -> Iterator[str]:
    yield _error(stage)
    if stage.first_position is not None:
        yield f"the first position beyond its tolerance: {stage.first_position}"
    yield f"largest difference of one number: {stage.max_abs:.2e}; cosine {stage.cosine:.9f}"
    yield f"look at {meaning(stage.stage)}"


def _verdict(diagnosis: Diagnosis) -> str:
    """In one line."""
    if diagnosis.found:
        return f"{diagnosis.verdict}: {' + '.join(diagnosis.found)}"
    if diagnosis.verdict == "none of these":
        return f"none of these; first divergence at {diagnosis.first_divergence}"
    return diagnosis.verdict


def _conclusion(diagnosis: Diagnosis) -> list[str]:
    """The report's lines below the ranking."""
    lines = list(diagnosis_lines(diagnosis))
    return lines[len(lines) - lines[::-1].index("") :]


def github_lines(result: Comparison | Diagnosis, command: str) -> Iterator[str]:
    """GitHub's workflow commands: the verdict as an error or a notice, then a warning of what weakens it."""
    of = f"parity {command}"
    comparison = result.comparison if isinstance(result, Diagnosis) else result
    weak = _weak(comparison)
    more = [note for note in result.notes if note not in weak]
    if isinstance(result, Diagnosis):
        level = "notice" if passed(result) else "error"
        yield _annotation(level, f"{of}: {_verdict(result)}", [*_conclusion(result), *more])
    elif (first := result.first_beyond) is not None:
        beyond = sum(not stage.within for stage in result.stages)
        count = f"{beyond} of {len(result.stages)} stages are beyond tolerance"
        title = f"{of}: first stage beyond tolerance: {first.stage}"
        yield _annotation("error", title, [*_details(first), count, *more])
    else:
        nearest = max(result.stages, key=lambda stage: stage.excess)
        yield _annotation(
            "notice",
            f"{of}: within tolerance",
            [f"all {len(result.stages)} stages; nearest to it at {nearest.stage}: {_error(nearest)}", *more],
        )
    if weak:
        yield _annotation("warning", f"{of}: note", weak)


def _weak(comparison: Comparison | None) -> list[str]:
    """What was not checked, or only roughly. Stages that a port leaves out are its own choice."""
    if comparison is None:
        return []
    estimated = "estimated" in comparison.tolerances
    notes = [note for note in comparison.notes if not note.endswith(": not compared")]
    return [*notes, *([f"tolerances: {comparison.tolerances}"] if estimated else [])]


def _annotation(level: str, title: str, lines: list[str]) -> str:
    """A workflow command: % and line ends are escaped, in the title also the signs that end a property."""
    escaped = _escaped(printable(title)).replace(":", "%3A").replace(",", "%2C")
    message = _escaped("\n".join(lines))
    return f"::{level} title={escaped}::{message}"


def _escaped(text: str) -> str:
    kept = printable(text, kept="\r\n")
    return kept.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _text(text: str) -> str:
    """Text that XML can hold: no control characters, no halves of a surrogate pair."""
    return printable(text, kept="\n")
