"""`python -m qwen_ref.trace`."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.commands.cli import Parser, Progress, as_json, on_stdout, run, say, utf8
from qwen_ref.commands.files import bundled_checkpoint, read_prompt
from qwen_ref.commands.settings import add_model_option, length_note, open_folder
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.loading.folder import require_folder
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    pass
from qwen_ref.trace.report import _sizes, spelled, trace_lines
from qwen_ref.trace.tracing import TOP, Trace, _from_start, trace

_MANY_LAYERS = 8  # a table of more is announced


# The command


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.trace",
        description="What a prompt goes through in a first-generation Qwen: shape, dtype, mean, spread and "
        "largest value of every tensor from the embedding to the logits, layer by layer. "
        "The table goes to stdout, everything else to stderr.",
        epilog="The model runs on the CPU, one matrix in memory at a time, so that it may exceed the memory.",
    )
    add = parser.add_argument
    add(
        "prompt",
        type=utf8,
        nargs="?",
        help="the text to look at; - or nothing reads stdin (one newline at its end is dropped)",
    )
    add("--file", type=Path, help="read the prompt from this file (one newline at its end is dropped)")
    add_model_option(parser)
    add("--dtype", default="auto", help="auto (as stored), bfloat16, float16, float32 or float64")
    add(
        "--layers",
        type=_layers,
        metavar="N,N-N,…",
        help="the layers to show, from 0 on, -1 the last: 0,3,-1 or 0-3; an equals sign before a list that "
        "begins with a minus: --layers=-2,-1 (default: all, 80 of the 72B)",
    )
    add(
        "--lens",
        action="store_true",
        help="what the last position would predict after each layer, through the final norm and the head",
    )
    add("--top", type=int, metavar="N", help=f"the N likeliest tokens of each with --lens (default: {TOP})")
    add(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in the prompt"
    )
    add("--json", action="store_true", help="print everything as one JSON object instead")
    return parser


_LAYERS = re.compile(r"(-?\d{1,6})(?:-(-?\d{1,6}))?", re.ASCII)


def _layers(argument: str) -> list[tuple[int, int]]:
    """The first and the last of each range."""
    found = [_LAYERS.fullmatch(part.strip()) for part in argument.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{argument!r} are no layers; write 0,3,-1 or 0-3")
    return [(int(match[1]), int(match[2] or match[1])) for match in found]


def _chosen(config: QwenConfig, ranges: Sequence[tuple[int, int]] | None) -> list[int]:
    """The layers of ranges, whose ends may be counted from the last layer."""
    if ranges is None:
        return list(range(config.num_hidden_layers))
    chosen: list[int] = []
    for ends in ranges:
        first, last = (_from_start(config, end) for end in ends)
        if last < first:
            raise InputError(f"--layers {ends[0]}-{ends[1]} is empty: it goes from {first} to {last}")
        chosen += range(first, last + 1)
    return chosen


def _command(args: argparse.Namespace) -> int:
    if args.top is not None and not args.lens:
        raise InputError("--top is for --lens")
    folder = args.model or bundled_checkpoint()
    require_folder(folder)
    prompt = read_prompt(args.prompt, args.file)
    config, tokenizer = open_folder(folder)
    ids = tokenizer.encode(prompt, allowed_special="all" if args.allow_special else ())
    if not ids:
        raise InputError("the prompt is empty; give it as an argument, with --file or on stdin")
    top = (TOP if args.top is None else args.top) if args.lens else None
    layers = _chosen(config, args.layers)
    with Progress("tracing") as progress:
        found = trace(folder, ids, args.dtype, layers, top, progress.update)
    name = args.model or "the tiny checkpoint that comes with the project"
    say(
        f"{name}: {len(found.layers)} of {config.num_hidden_layers} layers, {len(found.stages)} stages of "
        f"{len(ids)} position{'s' if len(ids) > 1 else ''} in {found.dtype}"
    )
    if note := length_note(config, len(ids)):
        say(note)
    if args.layers is None and len(layers) > _MANY_LAYERS and not args.json:
        say(f"note: all {len(layers)} layers are shown; --layers 0,{len(layers) // 2},-1 shows three of them")
    if args.json:
        print(on_stdout(as_json(_report(found, prompt, str(folder), tokenizer))), flush=True)
    else:
        print("\n".join(trace_lines(found, tokenizer)), flush=True)
    return 0


def _report(found: Trace, prompt: str, folder: str, tokenizer: Tokenizer) -> dict[str, Any]:
    from qwen_ref.parity.bundle import meaning

    return {
        "model": folder,
        "prompt": prompt,
        "dtype": found.dtype,
        "axes": _sizes(found),
        "tokens": [{"id": token, "text": spelled(token, tokenizer)} for token in found.ids],
        "layers": found.layers,
        "stages": [{**dataclasses.asdict(stage), "meaning": meaning(stage.name)} for stage in found.stages],
        "lens": None
        if found.lens is None
        else [
            {
                "layer": each.layer,
                "predictions": each.predictions
                and [
                    {"id": token, "text": spelled(token, tokenizer), "probability": probability}
                    for token, probability in each.predictions
                ],
            }
            for each in found.lens
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), _command, arguments)


if __name__ == "__main__":
    sys.exit(main())
