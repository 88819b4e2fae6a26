"""`python -m qwen_ref.trace`: its options, and the trace as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from qwen_ref.commands.cli import Parser, Progress, as_json, on_stdout, run, say
from qwen_ref.commands.files import checkpoint_folder, read_prompt
from qwen_ref.commands.loading import open_folder
from qwen_ref.commands.settings import (
    add_dtype_option,
    add_model_option,
    add_prompt_options,
    encoded_prompt,
    length_note,
)
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.loading.hub import TEXT
from qwen_ref.tokenizer import Tokenizer
from qwen_ref.trace.report import axis_sizes, spelled, trace_lines
from qwen_ref.trace.tracing import TOP, Trace, layer_number, trace

_MANY_LAYERS = 8  # a table of more layers comes with a note


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.trace",
        description="What a prompt goes through in a first-generation Qwen: shape, dtype, mean, spread and "
        "largest value of every tensor from the embedding to the logits, layer by layer. "
        "The table goes to stdout, everything else to stderr.",
        epilog="The model runs on the CPU, one matrix in memory at a time: it may be larger than memory.",
    )
    add = parser.add_argument
    add_prompt_options(parser, "the text to trace")
    add_model_option(parser)
    add_dtype_option(parser)
    add(
        "--layers",
        type=_layers,
        metavar="N,N-N,…",
        help="the layers to show: 0,3,-1 or 0-3; 0 is the first, -1 the last. A list that begins with a "
        "minus needs an equals sign: --layers=-2,-1 (default: all, which are 80 in the 72B)",
    )
    add(
        "--lens",
        action="store_true",
        help="what the last position would predict after each layer, by the final norm and the head",
    )
    add("--top", type=int, metavar="N", help=f"the N likeliest tokens of each with --lens (default: {TOP})")
    add("--json", action="store_true", help="print everything as one JSON object instead")
    return parser


_LAYERS = re.compile(r"(-?\d{1,6})(?:-(-?\d{1,6}))?", re.ASCII)


def _layers(argument: str) -> list[tuple[int, int]]:
    """The first and the last of each range."""
    found = []
    for part in argument.split(","):
        match = _LAYERS.fullmatch(part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{argument!r} are no layers; write 0,3,-1 or 0-3")
        found.append((int(match[1]), int(match[2] or match[1])))
    return found


def _chosen(config: QwenConfig, ranges: Sequence[tuple[int, int]] | None) -> list[int]:
    """The layers of ranges; the ends of a range may be negative, which counts from the last layer."""
    if ranges is None:
        return list(range(config.num_hidden_layers))
    chosen: list[int] = []
    for ends in ranges:
        first, last = (layer_number(config, end) for end in ends)
        if last < first:
            raise InputError(f"--layers {ends[0]}-{ends[1]} is empty: it goes from {first} to {last}")
        chosen += range(first, last + 1)
    return chosen


def _command(args: argparse.Namespace) -> int:
    if args.top is not None and not args.lens:
        raise InputError("--top is for --lens")
    folder = checkpoint_folder(args, TEXT)
    prompt = read_prompt(args.prompt, args.file)
    config, tokenizer = open_folder(folder)
    ids = encoded_prompt(tokenizer, prompt, args.allow_special)
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
        "axes": axis_sizes(found),
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
