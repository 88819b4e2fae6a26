"""What every rank of a cut model generates by lookup, for test_lookup.py.

Each rank writes its results into FOLDER, to lookup-N.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from conftest import GOLDEN

from qwen_ref import load_model
from qwen_ref.decoding.lookup import Passes, generate_lookup
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import Step, generate

PROMPT = list(range(3, 15)) * 4


def main(folder: Path) -> None:
    found: dict[str, object] = {}
    for how in ("float64", "fast bfloat16"):
        qwen = load_model(GOLDEN / "extended_base", how.split()[-1], group="world")
        if "fast" in how:
            fasten(qwen)
        rank, passes = qwen.group.rank, Passes()
        found[f"{how} plain"] = list(generate(qwen, PROMPT, 40))
        found[f"{how} lookup"] = list(generate_lookup(qwen, PROMPT, 40, passes=passes))
        found[f"{how} passes"] = [passes.tokens, passes.passes]
    qwen = load_model(GOLDEN / "extended_base", "float64", group="world")
    for leaver in (0, 1):
        steps: list[Step] = []
        for step in generate_lookup(qwen, PROMPT, 40):
            steps.append(step)
            if rank == leaver and len(steps) == 7:
                break
        found[f"rank {leaver} leaves"] = steps

    def message(call: Callable[[], Iterator[Step]]) -> str:
        try:
            list(call())
        except ValueError as error:
            return str(error)
        return "no error"

    found["drafts differ"] = message(lambda: generate_lookup(qwen, PROMPT, draft_tokens=3 + rank))
    found["empty"] = message(lambda: generate_lookup(qwen, PROMPT if rank == 0 else []))
    if rank == 1:
        qwen.lm_head.weight[5] = torch.nan
    found["not finite"] = message(lambda: generate_lookup(qwen, PROMPT))
    (folder / f"lookup-{rank}.json").write_text(json.dumps(found))
