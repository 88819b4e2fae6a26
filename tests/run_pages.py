"""Runs the commands of all pages as they stand there, with the tiny checkpoint for the published ones.

    python tests/run_pages.py [--list] [WORD …]  # make readme; with words: commands that have one

Each page runs in a temporary folder of its own. There the names of published folders are links to weights/,
the Int4 folder is weights/ packed by the GPTQ writer, and the texts that the pages name exist. A command is a
line of a block marked sh, or a line behind a $ in a block marked console. The output that a page shows is not
compared. A command that cannot run here (SKIPPED) is printed with the reason. A block whose first line is a
comment with a file's name, as `# convert.py`, is that file, and lies there when the page's commands run.
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

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {
    "10.0.0.1": "takes several machines",
    "--synthetic": "make bench runs it",
    "--download": "downloads",
    "pip install": "installs",
    "make ": "a target of make",
    "/train_": "trains for minutes",
    "/bench_": "measures for minutes",
    "/record_": "needs an engine",
    "/all_ports.py": "make ports runs it",
    "/long_prompt.py": "takes 11 GB of memory",
    "git checkout": "undoes changes",
}
CODES = {
    "exercises/check.py": (0, 1),  # a hole may be filled
    "mine.safetensors": (1,),  # the port of TEN_MINUTES.md has a mistake
}
PLAIN = ("Qwen-1_8B", "Qwen-7B", "Qwen-14B", "Qwen-72B")


def pages() -> list[Path]:
    """The pages of the project: every .md file outside of hidden folders and of what a build makes."""
    found = []
    for folder, inside, names in os.walk(ROOT):
        inside[:] = sorted(name for name in inside if name not in ("build", "dist") and name[0] != ".")
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".md")]
    return found


class Block(NamedTuple):
    """A fenced block: the word behind its fence, its lines, and the line of the page that it starts on."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], page.count("\n", 0, match.start()) + 2) for match in found]


def saved_as(block: Block) -> str | None:
    """The name of the file that a block is; None for an example.

    >>> saved_as(Block("python", "# convert.py\\nimport numpy\\n", 1))
    'convert.py'
    """
    found = re.match(r"(?:#|//) (\w+\.(?:py|cpp|rs))\n", block.text)
    return found[1] if found else None


def commands(page: str) -> list[str]:
    """The commands of a page in order; a command of several lines is one.

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
            raise ValueError(f"line {block.line}: a command without its end: {begun}")
    return found


def whole(command: str) -> bool:
    """Whether the command ends here: its quotes are closed, and it has no backslash at its end."""
    return not command.endswith("\\") and command.count('"') % 2 == 0 and command.count("'") % 2 == 0


def link_checkpoints(folder: Path) -> None:
    """weights/, under its own name and under the published ones."""
    (folder / "weights").symlink_to(ROOT / "weights")
    (folder / "Qwen").mkdir()
    for name in PLAIN:
        for kind in ("", "-Chat"):
            for place in (folder, folder / "Qwen"):  # a name of the hub, too, is a folder here
                (place / f"{name}{kind}").symlink_to(ROOT / "weights")


def pack_checkpoint(folder: Path) -> None:
    """An Int4 release: weights/, packed by the GPTQ writer."""
    writer = [ROOT / "examples" / "make" / "quantize_gptq.py", ROOT / "weights", "Qwen-72B-Chat-Int4"]
    subprocess.run([sys.executable, *writer, "--bits", "4"], cwd=folder, check=True, capture_output=True)


def prepare(folder: Path) -> None:
    """Puts into the folder what the commands need: the project, checkpoints, texts, a bundle."""
    for name in ("tests", ".venv", ".vocab"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "examples", folder / "examples")  # some commands write into it
    link_checkpoints(folder)
    pack_checkpoint(folder)
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
    recorder = ["-m", "qwen_ref.parity", "record", "--prompt", "冰岛的首都是", "--decode", "8"]
    port = [sys.executable, *recorder, "--out", "port.safetensors"]
    subprocess.run(port, cwd=folder, check=True, capture_output=True)


def why_skipped(command: str) -> str | None:
    return next((reason for part, reason in SKIPPED.items() if part in command), None)


def wanted_codes(command: str) -> tuple[int, ...]:
    """The exit codes of a command that does what its page says."""
    return next((codes for part, codes in CODES.items() if part in command), (0,))


def run(command: str, folder: Path) -> bool:
    """Runs one command in the folder and prints how that went; False if it failed."""
    shown = command.replace("\n", "\n    ")
    if reason := why_skipped(command):
        print(f"skipped, {reason}: {shown}", flush=True)
        return True
    here = command if torch.cuda.is_available() else command.replace("--device cuda", "--device cpu")
    here = here.replace("--nproc-per-node 4", "--nproc-per-node 2")  # the tiny checkpoint has 4 heads
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", here],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(places)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    ran = done.returncode in wanted_codes(command)
    print(
        f"{'ran' if ran else f'FAILED ({done.returncode})'} in {time.monotonic() - start:.1f} s: {shown}",
        flush=True,
    )
    if not ran:
        print(done.stdout[-1000:] + done.stderr[-2000:], flush=True)
    return ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only the commands that have one of these")
    parser.add_argument("--list", action="store_true", help="only print what would run")
    args = parser.parse_args()
    chosen = {}
    for page in pages():
        found = commands(page.read_text(encoding="utf-8"))
        found = [each for each in found if not args.words or any(word in each for word in args.words)]
        if found:
            chosen[page.relative_to(ROOT)] = found
    if not chosen:
        parser.error("no command has one of these words")
    if args.list:
        for page, found in chosen.items():
            print(f"{page}:", *found, sep="\n")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as made:
        ready = Path(made, "ready")
        ready.mkdir()
        prepare(ready)
        for number, (page, found) in enumerate(chosen.items()):
            print(f"\n{page}", flush=True)
            folder = shutil.copytree(ready, Path(made, str(number)), symlinks=True)
            for block in blocks((ROOT / page).read_text(encoding="utf-8")):
                if name := saved_as(block):
                    (folder / name).write_text(block.text, encoding="utf-8")
            failed += sum(not run(command, folder) for command in found)
    print(f"\n{sum(map(len, chosen.values()))} commands on {len(chosen)} pages, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
