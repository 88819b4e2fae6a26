"""A few cases of each kind of the fuzz, and faults planted for it to find."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from . import commands
from .__main__ import KINDS, kind_of
from .harness import Case, Kind, Opened, Outcome, outcomes

CASES = 25  # of each kind
SEED = 16


@pytest.mark.parametrize("kind", ["folders", "commands", "bundles", "prompts"])
def test_cases_end_in_nothing_but_one_line(kind: str) -> None:
    numbers = (number for number in itertools.count() if kind_of(number) is KINDS[kind])
    for outcome in outcomes(kind_of, SEED, itertools.islice(numbers, CASES)):
        assert not outcome.findings, f"--replay {SEED}:{outcome.number}: {outcome.findings}"


def found(run: Callable[[Case], object], limit: float = 5.0) -> str:
    """What is found in a case that does this."""
    planted = Kind("planted", lambda _: None, run)
    (outcome,) = outcomes(lambda _: planted, 0, iter([0]), limit)
    return "; ".join(finding.sign for finding in outcome.findings)


def command(code: int | str, err: str = "", out: str = "") -> Callable[[Case], object]:
    def main(arguments: list[str]) -> int:
        sys.stderr.write(err)
        sys.stdout.write(out)
        return code

    return lambda case: case.command(main, ["--json"])


def fails(case: Case) -> None:
    case.library(lambda: {}["a"])


def refuses_as_a_fault_of_ours(case: Case) -> None:
    case.library(lambda: int("x"))


def waits(case: Case) -> None:
    case.library(lambda: time.sleep(60))


def computes(case: Case) -> None:
    def forever() -> None:
        while True:
            pass

    case.library(forever)


def waits_where_no_signal_comes(case: Case) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    case.library(lambda: time.sleep(60))


def crashes(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def reads_outside(case: Case) -> None:
    (case.place / "outside").mkdir()
    secret = case.place / "outside" / "secret"
    secret.write_text("secret")
    case.library(Path("../outside/secret").read_text)


def writes_outside(case: Case) -> None:
    Path("link").symlink_to("../outside/new")
    case.library(lambda: Path("link").write_text("x"))


def replaces_a_device(case: Case) -> None:
    Path("part").touch()
    case.library(lambda: os.replace("part", "/dev/full"))


def unpickles(case: Case) -> None:
    case.library(lambda: pickle.loads(b"cos\nsystem\n."))


def takes_memory(case: Case) -> None:
    case.library(lambda: bytes([1]) * (1 << 30))


@pytest.mark.parametrize(
    ("run", "sign"),
    [
        (fails, "(no frame of ours): KeyError"),
        (refuses_as_a_fault_of_ours, "ValueError: invalid literal"),
        (crashes, "ends the process with code -11"),
        (reads_outside, "reads /outside/secret outside of the folder"),
        (writes_outside, "open outside of the folder: /outside/new"),
        (replaces_a_device, "os.rename outside of the folder: /dev/full"),
        (unpickles, "unpickles "),
        (takes_memory, "takes more than 0.75 GiB"),
        (command(1), "exit code 1"),
        (command(2), "exit code 2 with 0 lines of error"),
        (command(2, "qwen_ref: error: a\nqwen_ref: error: b\n"), "exit code 2 with 2 lines of error"),
        (command(0, "qwen_ref: error: a\n"), "exit code 0 with a line of error"),
        (command(0, "a warning\n", "{}"), "a stray line on stderr: a warning"),
        (
            command(2, "Traceback (most recent call last):\nKeyError: 1\n"),
            "a traceback on stderr: KeyError: 1",
        ),
        (command(0, out='{"loss": NaN}'), "--json prints no JSON"),
        (command(2, f"qwen_ref: error: {'9' * 20_000}\n"), "an error of more than"),
    ],
)
def test_a_planted_fault_is_found(run: Callable[[Case], None], sign: str) -> None:
    assert sign in found(run)


@pytest.mark.parametrize("run", [waits, computes])
def test_a_planted_hang_is_found(run: Callable[[Case], None]) -> None:
    assert "Hang: longer than" in found(run, limit=0.3)


def test_a_hang_that_no_signal_ends_is_found_and_the_other_cases_go_on() -> None:
    def kinds(number: int) -> Kind:
        run = waits_where_no_signal_comes if number == 1 else lambda case: case.library(lambda: 1)
        return Kind("planted", lambda _: None, run)

    found: list[Outcome] = list(outcomes(kinds, 0, iter(range(4)), limit=0.3))
    assert [outcome.ends for outcome in found] == [["returned"], ["died"], ["returned"], ["returned"]]
    assert "does not return from C" in found[1].findings[0].sign


def test_a_file_that_another_language_opens_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    assert not Opened(tmp_path).any()
    opened = Opened(tmp_path)
    with pytest.raises(Exception, match="header"):
        safe_open(tmp_path / "x", framework="pt")
    assert opened.any()


def test_a_fifo_that_is_replaced_by_a_file_is_found() -> None:
    def replace(case: Case) -> None:
        os.mkfifo("fifo")
        before = {"fifo": os.lstat("fifo")}
        Path("new.part").touch()
        os.replace("new.part", "fifo")
        Path("other.part").touch()
        commands.check_left(case, before)

    assert found(replace) == "fifo is replaced by a file; leaves a partial file behind"


def test_a_case_follows_from_seed_and_number() -> None:
    def described() -> list[list[str]]:
        return [outcome.described for outcome in outcomes(kind_of, 1, iter((3, 11, 19)))]

    assert described() == described()
