"""`python -m tests.fuzz`: a seed, some seconds of cases, and every fault by its first case."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch

from . import bundles, commands, folders, prompts
from .harness import LIMIT, Finding, Kind, Outcome, outcomes, shown

# A case's kind follows from its number.
KINDS = {kind.name: kind for kind in (folders.KIND, commands.KIND, bundles.KIND, prompts.KIND)}
if commands.EVALUATE is not None:
    KINDS["evaluate"] = commands.EVALUATE
_TURNS = ("folders", "commands", "folders", "prompts", "folders", "commands", "bundles", "folders")


def kind_of(number: int) -> Kind:
    turn, place = divmod(number, len(_TURNS))
    return KINDS["evaluate" if turn % 16 == 5 and place == 1 and "evaluate" in KINDS else _TURNS[place]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case after these (default: 60)")
    parser.add_argument("--cases", type=int, help="so many cases, in place of --seconds")
    parser.add_argument("--seed", type=int, help="(default: a new one, printed)")
    parser.add_argument("--only", choices=list(KINDS), help="cases of one kind")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of one case (default: 10)")
    parser.add_argument("--replay", metavar="SEED:CASE", help="one case again, with all that is known of it")
    args = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    torch.set_num_threads(1)  # a process with threads of its own cannot fork safely
    if args.replay is not None:
        seed, number = map(int, args.replay.split(":"))
        for outcome in outcomes(kind_of, seed, iter([number]), args.limit, batch=1):
            print(f"case {seed}:{number}, {outcome.kind}, {outcome.seconds:.2f} s: {', '.join(outcome.ends)}")
            print(*outcome.described, sep="\n")
            for finding in outcome.findings:
                print(f"\nFOUND: {finding.sign}\n{finding.detail}")
        return 1 if outcome.findings else 0
    print(f"seed {seed}", flush=True)
    return _report(seed, *_done(seed, args))


def _done(seed: int, args: argparse.Namespace) -> tuple[list[Outcome], float]:
    """What came of the cases, and the seconds that they took."""
    start = shown_at = time.monotonic()
    numbers = (n for n in itertools.count() if args.only in (None, kind_of(n).name))
    if args.cases is not None:
        numbers = itertools.islice(numbers, args.cases)
    else:
        numbers = itertools.takewhile(lambda _: time.monotonic() - start < args.seconds, numbers)
    done = []
    for outcome in outcomes(kind_of, seed, numbers, args.limit):
        done.append(outcome)
        if time.monotonic() - shown_at > 10:
            shown_at = time.monotonic()
            found = len({finding.sign for each in done for finding in each.findings})
            print(f"{len(done)} cases, {found} faults", file=sys.stderr, flush=True)
    return done, time.monotonic() - start


def _report(seed: int, done: Sequence[Outcome], seconds: float) -> int:
    first: dict[str, tuple[Outcome, Finding]] = {}
    often: Counter[str] = Counter()
    for outcome in done:
        for finding in outcome.findings:
            often[finding.sign] += 1
            known = first.get(finding.sign)
            if known is None or len(str(outcome.described)) < len(str(known[0].described)):
                first[finding.sign] = outcome, finding
    for sign, (outcome, finding) in sorted(first.items()):
        print(f"\nFOUND {often[sign]} times: {sign}\n  --replay {seed}:{outcome.number} ({outcome.kind})")
        for text in outcome.described:
            print(f"  {shown(text, 600)}")
        for line in finding.detail.splitlines()[-4:]:
            print(f"    {shown(line, 200)}")
    kinds = Counter(outcome.kind for outcome in done)
    ends = Counter(end for outcome in done for end in outcome.ends)
    print(f"\n{len(done)} cases in {seconds:.0f} s with seed {seed}, {len(first)} faults")
    print("cases: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    print("ends: " + ", ".join(f"{end} {count} times" for end, count in ends.most_common()))
    if done:
        slowest = max(done, key=lambda outcome: outcome.seconds)
        print(f"slowest: {slowest.seconds:.2f} s, --replay {seed}:{slowest.number}")
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(main())
