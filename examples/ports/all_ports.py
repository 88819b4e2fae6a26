"""Records every engine that is installed, diagnoses each recording and prints a table: what the kit finds.

Each recorder runs in a process of its own, on the tiny checkpoint and two of the golden ones, with prompts on
both sides of the trained length. An engine that is not installed is a row of the table, too. Recording and
diagnosing are two steps: a kept recording can be diagnosed again without the engines.

    python examples/ports/all_ports.py --recordings DIR
    python examples/ports/all_ports.py --only-diagnose DIR
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from wide_heads import write_wide_heads

from qwen_ref import QwenConfig, parity
from qwen_ref.commands.cli import Parser, run, say
from qwen_ref.config import InputError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INDEX = "recordings.json"

ENGINES: dict[str, tuple[str, list[str]]] = {  # recorder → the engine, and the options of each recording
    "transformers": ("transformers' Qwen2", ["--dtype float32", "--dtype bfloat16"]),
    "mlx": ("mlx-lm's Qwen", ["--dtype float32", "--dtype bfloat16"]),
    "llama": (
        "llama.cpp",
        [
            "--dtype float32 --cache f32 --no-flash",
            "--dtype float32",
            "--dtype bfloat16",
            "--dtype float16",
            "--dtype float32 --form q8_0",
        ],
    ),
    "paddle": ("PaddleNLP's QWen", ["--dtype float32"]),
    "ctranslate2": ("CTranslate2", ["--dtype float32", "--dtype float32 --form int8"]),
    "litgpt": ("LitGPT's Qwen2.5", ["--dtype float32", "--dtype bfloat16"]),
    "fastllm": ("FastLLM's Qwen", ["--dtype float32", "--dtype float16"]),
}

CHECKPOINTS = {  # folder → lengths of the prompts, within the trained length and mostly beyond it
    "weights": (40, 600),
    "tests/golden/extended_base": (24, 100),
    "tests/golden/ntk_logn": (24, 100),
}
WIDE = {
    "wide-extended_base": (24,),
    "wide-ntk_logn": (24, 48),
}  # the same with heads of 128, for FastLLM alone


@dataclass
class Recording:
    """A row of the table."""

    engine: str
    options: str
    checkpoint: str  # from the project's root, or from the folder of the recordings
    length: int
    file: str
    versions: str = ""
    problem: str = ""  # why there is no bundle

    @property
    def computes_in(self) -> str:
        return self.options.removeprefix("--dtype ").replace(" --", ", ")


def folder_of(checkpoint: str, recordings: Path) -> Path:
    return recordings / checkpoint if checkpoint in WIDE else ROOT / checkpoint


def record(folder: Path, names: list[str], pythons: dict[str, str]) -> Iterator[Recording]:
    """Runs the recorders; their bundles lie in the folder."""
    # Sources of variation: one thread each, and so one order of adding.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if "fastllm" in names:
        for checkpoint in WIDE:
            write_wide_heads(
                folder / checkpoint, ROOT / "tests" / "golden" / checkpoint.removeprefix("wide-")
            )
    for checkpoint, lengths in (CHECKPOINTS | WIDE).items():
        place = folder_of(checkpoint, folder)
        config = QwenConfig.from_json(place / "config.json")
        for length in lengths:
            seeded = torch.Generator().manual_seed(length)
            ids = torch.randint(config.vocab_size, (length,), generator=seeded)
            prompt = folder / f"{Path(checkpoint).name}-{length}.ids"
            prompt.write_text(" ".join(map(str, ids.tolist())) + "\n")
            for name in names:
                if (checkpoint in WIDE) != (name == "fastllm"):
                    continue
                engine, forms = ENGINES[name]
                for options in forms:
                    words = [name, *options.replace("--", "").split(), prompt.stem]
                    file = "-".join(word for word in words if word != "dtype") + ".safetensors"
                    row = Recording(engine, options, checkpoint, length, file)
                    command = [pythons.get(name, sys.executable), str(HERE / f"record_{name}.py")]
                    command += ["--model", str(place), "--ids", str(prompt)]
                    command += ["--out", str(folder / file), *options.split()]
                    (folder / file).unlink(missing_ok=True)
                    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
                    if (folder / file).exists():  # an engine may end the process with exit code 0
                        row.versions = done.stdout.strip().splitlines()[-1]
                    else:
                        row.problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
                        if done.returncode == 2 and "is not installed" in row.problem:
                            row.problem = "not installed"
                    say(f"{engine}, {row.computes_in}, {prompt.stem}: {row.problem or row.versions}")
                    yield row
                    if row.problem == "not installed":
                        break


def table(folder: Path, recordings: list[Recording]) -> Iterator[str]:
    """Diagnoses the recordings: the lines of a Markdown table."""
    yield "| engine | versions | computes in | checkpoint | positions | verdict | residual |"
    yield "|---|---|---|---|---|---|---|"
    for row in recordings:
        verdict, residual = row.problem.replace("|", "/"), ""
        if not row.problem:
            found = parity.diagnose(folder_of(row.checkpoint, folder), folder / row.file)
            best = found.ranking[0] if found.ranking else None
            verdict = found.verdict + (": " if found.found else "") + " + ".join(found.found)
            if found.verdict == "none of these" and best:
                verdict += f"; nearest: {best.text}"
            residual = f"{best.residual:.2e}" if best else ""
        place = f"{Path(row.checkpoint).name} | {row.length}"
        yield f"| {row.engine} | {row.versions} | {row.computes_in} | {place} | {verdict} | {residual} |"


def named_python(argument: str) -> tuple[str, str]:
    name, _, path = argument.partition("=")
    if name not in ENGINES or not path:
        raise argparse.ArgumentTypeError(f"{argument!r} is not ENGINE=PATH; engines: {', '.join(ENGINES)}")
    return name, path


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    where = made.add_mutually_exclusive_group()
    where.add_argument("--recordings", type=Path, metavar="DIR", help="keep the bundles here")
    where.add_argument("--only-diagnose", type=Path, metavar="DIR", help="diagnose kept bundles again")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    made.add_argument(
        "--python",
        type=named_python,
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="an interpreter that has this engine, where it cannot be installed beside the others",
    )
    return made


def command(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.only_diagnose or args.recordings or Path(temporary)
        index = folder / INDEX
        engines = {ENGINES[name][0] for name in args.engines}
        if args.only_diagnose:
            if not index.is_file():
                raise InputError(f"{index} is not there; --recordings DIR makes it")
            recordings = [Recording(**row) for row in json.loads(index.read_text())]
            recordings = [row for row in recordings if row.engine in engines]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            recordings = list(record(folder, args.engines, dict(args.python)))
            if index.is_file():  # of other engines, recorded before
                there = [Recording(**row) for row in json.loads(index.read_text())]
                recordings = [row for row in there if row.engine not in engines] + recordings
            index.write_text(json.dumps([asdict(row) for row in recordings], indent=1) + "\n")
        for line in table(folder, recordings):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
