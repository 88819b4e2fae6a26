"""Checks the exercises and gives hints.

    python examples/learn/exercises/check.py 3       # checks one exercise
    python examples/learn/exercises/check.py         # checks all ten and prints one line for each

The exit code is 0 if they are right, else 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from qwen_ref.commands.cli import Parser, printable, run

HOLES = Path(__file__).resolve().parent


class Outcome(NamedTuple):
    """How an attempt did: what was found right, or what is wrong and a hint."""

    right: bool
    done: bool  # False: the hole is still one
    text: str
    hint: str


def judge(number: int, folder: Path) -> Outcome:
    """Checks exercise 1 to 10 as it stands in a folder. Raises ValueError where there is no such file."""
    # Only here, since torch takes a second to import: a wrong number is answered at once.
    import torch
    from attempt import Attempt, NotDone, NotRight
    from checks import EXERCISES

    exercise = EXERCISES[number - 1]
    try:
        with torch.no_grad():
            right = exercise.check(Attempt(folder / f"{exercise.name}.py"))
    except NotRight as wrong:
        return Outcome(False, not isinstance(wrong, NotDone), str(wrong), wrong.hint or exercise.hint)
    return Outcome(True, True, right, "")


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument(
        "exercise",
        type=int,
        nargs="?",
        choices=range(1, 11),
        metavar="NUMBER",
        help="1 to 10 (default: all)",
    )
    return made


def command(args: argparse.Namespace) -> int:
    return _one(args.exercise) if args.exercise is not None else _all()


def _one(number: int) -> int:
    from checks import EXERCISES

    outcome, exercise = judge(number, HOLES), EXERCISES[number - 1]
    print(f"{exercise.name}.py ({exercise.about}): {'right' if outcome.right else 'not yet'}")
    print(f"  {printable(outcome.text)}")
    if outcome.right:
        print(f"  now read the project's own: {exercise.source}")
        return 0
    print(f"  hint: {printable(outcome.hint)}")
    return 1


def _all() -> int:
    from checks import EXERCISES

    right = 0
    for number, exercise in enumerate(EXERCISES, 1):
        outcome = judge(number, HOLES)
        right += outcome.right
        state = "right" if outcome.right else "not right yet" if outcome.done else "not done yet"
        print(f"{number:>2}  {exercise.name + '.py':<18}  {state:<13}  {exercise.about}")
    print(f"{right} of {len(EXERCISES)} are right")
    return 0 if right == len(EXERCISES) else 1


if __name__ == "__main__":
    sys.exit(run(parser(), command))
