"""Questions that the tiny checkpoint can answer, as data sets for lm-evaluation-harness.

    python examples/make/tiny_tasks.py

It writes examples/measure/tasks/*.jsonl, the files that the .yaml files there name. Each data set has a
few examples for the few-shot split and forty questions.
"""

import argparse
import json
import random
from pathlib import Path

from tiny_corpus import COUNTRIES, SUMS

from qwen_ref.commands.files import write_whole

FOLDER = Path(__file__).resolve().parents[1] / "measure" / "tasks"
EXAMPLES, QUESTIONS = 5, 40

Document = dict[str, object]


def capitals() -> list[Document]:
    """In MMLU's form: a question, a list of choices, the index of the right one."""
    rng = random.Random(0)
    found = []
    for fact in rng.sample(COUNTRIES, EXAMPLES + QUESTIONS):
        others = [other["capital"] for other in rng.sample(COUNTRIES, 8)]
        choices = [name for name in dict.fromkeys(others) if name != fact["capital"]][:3]
        answer = rng.randrange(4)
        choices.insert(answer, fact["capital"])
        question = f"The capital of {fact['english']} is"
        found.append({"question": question, "choices": choices, "answer": answer})
    return found


def chinese_capitals() -> list[Document]:
    """In C-Eval's form: a question, the choices A to D in columns, the letter of the right one."""
    rng = random.Random(1)
    found = []
    for fact in rng.sample(COUNTRIES, EXAMPLES + QUESTIONS):
        right = fact["chinese_capital"]
        others = [other["chinese_capital"] for other in rng.sample(COUNTRIES, 8)]
        choices = [name for name in dict.fromkeys(others) if name != right][:3]
        answer = rng.randrange(4)
        choices.insert(answer, right)
        columns = dict(zip("ABCD", choices, strict=True))
        found.append({"question": f"{fact['chinese']}的首都是哪里？", **columns, "answer": "ABCD"[answer]})
    return found


def sums() -> list[Document]:
    """In GSM8K's form: a question, and the answer to be generated."""
    chosen = random.Random(2).sample(SUMS, EXAMPLES + QUESTIONS)
    return [{"question": f"{fact['a']}+{fact['b']}=", "answer": fact["sum"]} for fact in chosen]


def files() -> dict[str, str]:
    """The content of each file, by its name."""
    found = {}
    sets = {"capitals": capitals(), "chinese_capitals": chinese_capitals(), "sums": sums()}
    for name, documents in sets.items():
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        found[f"{name}_dev.jsonl"] = "".join(lines[:EXAMPLES])
        found[f"{name}.jsonl"] = "".join(lines[EXAMPLES:])
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, content in files().items():
        write_whole(FOLDER / name, content)


if __name__ == "__main__":
    main()
