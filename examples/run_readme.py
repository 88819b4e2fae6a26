"""Runs the README's commands as they stand there, with the tiny checkpoint in place of the published ones.

    python examples/run_readme.py [--list] [WORD …]  # make readme; with words: commands that have one

In a folder of its own, which goes away: the names of published folders are links to weights/, the Int4 one
is weights/ packed by the GPTQ writer, and the texts that are named are there. A command is a line of a block
marked sh, or one behind a $ in a block marked console; what the README says came out is not compared. What
cannot run here (SKIPPED) is named with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from qwen_ref.config import InputError

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {
    "10.0.0.1": "takes several machines",
    "--synthetic": "make bench runs it",
    "--download": "downloads",
}
CODES = {"exercises/check.py": (0, 1)}  # a hole may be filled
PLAIN = ("Qwen-1_8B", "Qwen-7B", "Qwen-14B", "Qwen-72B")


class Block(NamedTuple):
    """A fenced block: the word behind its fence, its lines, and the line of the page that it starts on."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], page.count("\n", 0, match.start()) + 2) for match in found]


def commands(page: str) -> list[str]:
    """In the order in which they stand there, a command of several lines as one.

    >>> commands("```sh\\necho 1\\n```\\n```console\\n$ echo 2 \\\\\\n    3\\n2 3\\n```\\n")
    ['echo 1', 'echo 2 \\\\\\n    3']
    """
    found = []
    for block in blocks(page):
        if block.kind not in ("sh", "console"):
            continue
        begun = ""
        for line in block.text.splitlines():
            if not begun and block.kind == "console" and not line.startswith("$ "):
                continue
            begun += ("\n" if begun else "") + (line if begun or block.kind == "sh" else line[2:])
            if whole(begun):
                found.append(begun)
                begun = ""
        if begun:
            raise InputError(f"line {block.line}: a command without its end: {begun}")
    return found


def whole(command: str) -> bool:
    """Whether no line follows: quotes are closed, and no backslash ends it."""
    return not command.endswith("\\") and command.count('"') % 2 == 0 and command.count("'") % 2 == 0


def prepare(folder: Path) -> None:
    """What the commands find where they run: the project, checkpoints, texts."""
    for name in ("weights", ".venv"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", folder / "examples")  # some commands write into it
    for name in PLAIN:
        for kind in ("", "-Chat"):
            (folder / f"{name}{kind}").symlink_to(ROOT / "weights")
    (folder / "papers").mkdir()
    numbers = ", ".join(map(str, range(1, 7_000)))  # 41,000 tokens
    for name in ("prompt.txt", "calibration.txt"):
        (folder / name).write_text("冰岛的首都是雷克雅未克（Reykjavik）\n" * 40, encoding="utf-8")
    for name in ("book.txt", "papers/one.txt", "papers/two.txt", "welsh.txt", "irish.txt", "essays.txt"):
        (folder / name).write_text(numbers, encoding="utf-8")
    (folder / "poem.txt").write_text("7+8=\n", encoding="utf-8")
    for step in (["init"], ["add", "poem.txt"]):
        subprocess.run(["git", *step], cwd=folder, check=True, capture_output=True)
    (folder / "poem.txt").write_text("7+8=15\n", encoding="utf-8")  # something for git diff
    writer = [sys.executable, ROOT / "examples" / "quantize_gptq.py", "weights", "Qwen-72B-Chat-Int4"]
    subprocess.run([*writer, "--bits", "4"], cwd=folder, check=True, capture_output=True)
    bundle = [sys.executable, "-m", "qwen_ref.parity", "record", "--prompt", "冰岛的首都是"]
    subprocess.run([*bundle, "--decode", "8", "--out", "port.safetensors"], cwd=folder, check=True)


def why_skipped(command: str) -> str | None:
    return next((reason for part, reason in SKIPPED.items() if part in command), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the commands that have one of these")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    args = parser.parse_args()
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    chosen = [
        command for command in commands(page) if not args.words or any(word in command for word in args.words)
    ]
    if not chosen:
        parser.error("no command has one of these words")
    if args.list:
        print("\n".join(chosen))
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        places = [str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {**os.environ, "PATH": os.pathsep.join(places)}
        for command in chosen:
            shown = command.replace("\n", "\n    ")
            if reason := why_skipped(command):
                print(f"skipped, {reason}: {shown}", flush=True)
                continue
            here = command if torch.cuda.is_available() else command.replace("--device cuda", "--device cpu")
            here = here.replace("--nproc-per-node 4", "--nproc-per-node 2")  # the tiny checkpoint has 4 heads
            start = time.monotonic()
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", here],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            wanted = next((codes for part, codes in CODES.items() if part in command), (0,))
            verdict = "ran" if done.returncode in wanted else f"FAILED ({done.returncode})"
            print(f"{verdict} in {time.monotonic() - start:.1f} s: {shown}", flush=True)
            if done.returncode not in wanted:
                failed += 1
                print(done.stdout[-1000:] + done.stderr[-2000:], flush=True)
    print(f"{len(chosen)} commands, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
