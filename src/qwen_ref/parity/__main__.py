"""`python -m qwen_ref.parity`: record the truth, compare an implementation with it, name its mistake."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ref.commands.cli import Parser, Progress, on_stdout, run, say, utf8
from qwen_ref.commands.figures import check_plot
from qwen_ref.commands.files import checkpoint_folder, output_path, read_prompt
from qwen_ref.commands.settings import add_model_option, encoded_prompt
from qwen_ref.config import InputError
from qwen_ref.loading.hub import TEXT, WEIGHTS

if TYPE_CHECKING:
    import torch

    from qwen_ref.parity.compare import Comparison
    from qwen_ref.parity.diagnosis import Diagnosis

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.parity",
        description="Where another implementation of Qwen differs from this one, and why.",
        epilog="Exit code: 0 within tolerance, 1 beyond it, 2 for bad input.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    record = commands.add_parser(
        "record",
        help="write what a checkpoint computes, stage by stage, to a bundle",
        description="Record what a checkpoint computes for a prompt: by default the truth, in float64.",
    )
    add_model_option(record)
    source = record.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=utf8, metavar="TEXT", help='the prompt; "-" reads stdin')
    source.add_argument(
        "--ids", type=Path, metavar="FILE", help="token ids: numbers, or a JSON list, of lists for a batch"
    )
    record.add_argument(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in --prompt"
    )
    record.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bundle to write")
    record.add_argument(
        "--stages",
        choices=("all", "logits"),
        default="all",
        help="all stages or the logits only (default: all)",
    )
    _dtype(record, "float64", "float64")
    record.add_argument(
        "--decode", type=int, default=0, metavar="N", help="then N greedy tokens, one by one with the cache"
    )
    record.add_argument(
        "--rounding",
        default=",".join(_DTYPES[1:]),
        metavar="DTYPES",
        help="dtypes whose rounding is measured, in one pass each, and kept with a float64 record "
        "(default: %(default)s; or none)",
    )
    record.set_defaults(run=_record)

    check = commands.add_parser(
        "check",
        help="compare this implementation with a bundle",
        description="Run this implementation on a bundle's ids and compare every stage that it holds.",
    )
    add_model_option(check)
    check.add_argument("--golden", type=Path, required=True, metavar="FILE", help="the bundle")
    _dtype(check, "auto", "auto, as the weights are stored")
    _shown(check)
    _plotted(check)
    check.set_defaults(run=_check)

    diff = commands.add_parser(
        "diff", help="compare one bundle with another", description="Compare two bundles, stage by stage."
    )
    diff.add_argument("truth", type=Path, metavar="A", help="the bundle that is taken as the truth")
    diff.add_argument("judged", type=Path, metavar="B", help="the bundle that is compared with it")
    use = "the checkpoint of both, to measure rounding that neither bundle holds"
    add_model_option(diff, what=use, default="")
    _shown(diff)
    _plotted(diff)
    diff.set_defaults(run=_diff)

    diagnose = commands.add_parser(
        "diagnose",
        help="find which mistake a port has made",
        description="Run the reference with each known mistake and name the one that gives a port's numbers.",
    )
    add_model_option(diagnose)
    diagnose.add_argument("--bundle", type=Path, required=True, metavar="FILE", help="what the port computed")
    _shown(diagnose)
    diagnose.set_defaults(run=_diagnose)

    make = commands.add_parser(
        "make",
        help="make a small random checkpoint in the published form, with its truth",
        description="Make a small random checkpoint in the published form, with bundles of the truth in it: "
        "to check a port without published weights.",
    )
    make.add_argument(
        "--like", choices=("72b", "14b", "7b", "1.8b"), required=True, help="whose RoPE, NTK and LogN it has"
    )
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    for name, default, text in (
        ("layers", 2, "the number of layers"),
        ("hidden", 256, "the hidden size"),
        ("heads", 2, "the number of heads; 128 numbers each, as published, if hidden is 128 times it"),
        ("intermediate", None, "twice the width of the MLP, as in config.json (default: in proportion)"),
        ("seq-length", 16, "the trained length; the truth is 4 times as long"),
        ("vocab", None, "rows of the embedding (default: 1024; with --vocabulary: as published)"),
        ("seed", 0, "the same seed gives the same weights"),
    ):
        shown = "" if default is None else " (default: %(default)s)"
        make.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + shown)
    make.add_argument("--vocabulary", type=Path, metavar="FILE", help="a qwen.tiktoken to copy into it")
    make.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="the dtype of the weights (default: bfloat16; with --gptq float16)",
    )
    make.add_argument("--gptq", type=int, choices=(4, 8), help="as a GPTQ release, in so many bits")
    make.set_defaults(run=_make)
    return parser


def _dtype(parser: argparse.ArgumentParser, default: str, named: str) -> None:
    text = f"the dtype to compute in (default: {named})"
    parser.add_argument("--dtype", choices=("auto", *_DTYPES), default=default, help=text)


def _shown(parser: argparse.ArgumentParser) -> None:
    printed = parser.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print everything as JSON instead")
    printed.add_argument(
        "--github", action="store_true", help="first print annotations for GitHub's workflows"
    )
    parser.add_argument("--full", action="store_true", help="print every row of a long table")
    parser.add_argument(
        "--junit", type=Path, metavar="FILE.xml", help="also write the result as a JUnit file"
    )


def _plotted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw error by depth (takes matplotlib)"
    )


def _record(args: argparse.Namespace) -> int:
    from qwen_ref.parity.bundle import read_ids
    from qwen_ref.parity.recording import record

    output_path(args.out, "--out", args)
    folder = checkpoint_folder(args, TEXT if args.ids is None else WEIGHTS)
    rounding = [] if args.rounding == "none" else args.rounding.split(",")
    for name in rounding:
        if name not in _DTYPES[1:]:
            raise InputError(f"--rounding {name!r} is unknown; use none or some of {', '.join(_DTYPES[1:])}")
    ids, mask = read_ids(args.ids) if args.ids is not None else (_encoded(args, folder), None)
    with Progress("recording") as progress:
        bundle = record(
            folder,
            ids,
            args.out,
            mask=mask,
            dtype=args.dtype,
            stages=args.stages,
            decode=args.decode,
            rounding=rounding,
            progress=progress.update,
        )
    rows, T = bundle.input_ids.shape
    measured = f", with the rounding of {', '.join(bundle.rounding)}" if bundle.rounding else ""
    say(
        f"{args.out}: {len(bundle.stages)} stages of {rows} × {T} positions in {bundle.dtype}, "
        f"{args.out.stat().st_size / 1e6:,.1f} MB{measured}"
    )
    return 0


def _encoded(args: argparse.Namespace, folder: Path) -> torch.Tensor:
    import torch

    from qwen_ref.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")
    prompt = read_prompt(args.prompt, None)
    ids = encoded_prompt(tokenizer, prompt, args.allow_special, "give it with --prompt or on stdin")
    return torch.tensor([ids], device="cpu")


def _make(args: argparse.Namespace) -> int:
    from qwen_ref.parity.making import PADDED, TRUTH, make

    with Progress("making", unit="%") as progress:
        truth = make(
            args.out,
            args.like,
            layers=args.layers,
            hidden=args.hidden,
            heads=args.heads,
            intermediate=args.intermediate,
            seq_length=args.seq_length,
            vocab=args.vocab,
            vocabulary=args.vocabulary,
            dtype=args.dtype,
            seed=args.seed,
            gptq=args.gptq,
            progress=progress.update,
        )
    layers = "1 layer" if args.layers == 1 else f"{args.layers} layers"
    form = f"GPTQ in {args.gptq} bits" if args.gptq else args.dtype or "bfloat16"
    size = sum(file.stat().st_size for file in args.out.iterdir())
    T, first = truth.input_ids.shape[1], truth.prefill_length
    say(
        f"{args.out}: {layers} like the {args.like.upper()}'s, {form}, {size / 1e6:,.1f} MB; {TRUTH} has {T} "
        f"positions, the last {T - first} decoded, {PADDED} a padded batch; next: run your port on their "
        f"input_ids, write a bundle, and give it to python -m qwen_ref.parity diagnose --model {args.out} "
        "--bundle FILE"
    )
    return 0


def _check(args: argparse.Namespace) -> int:
    from qwen_ref.parity.ci import check_junit
    from qwen_ref.parity.recording import check

    check_plot(args)
    check_junit(args)
    folder = checkpoint_folder(args)
    with Progress("checking") as progress:
        comparison = check(folder, args.golden, args.dtype, progress.update)
    return _show_comparison(comparison, args, folder, args.golden)


def _diff(args: argparse.Namespace) -> int:
    from qwen_ref.parity.ci import check_junit
    from qwen_ref.parity.recording import diff

    check_plot(args)
    check_junit(args)
    given = args.model is not None or args.revision is not None or args.download
    folder = checkpoint_folder(args) if given else None
    with Progress("measuring rounding") as progress:
        comparison = diff(args.truth, args.judged, folder, progress.update)
    return _show_comparison(comparison, args, folder, args.judged)


def _show_comparison(
    comparison: Comparison, args: argparse.Namespace, folder: Path | None, bundle: Path
) -> int:
    from qwen_ref.parity.report import comparison_lines, plot

    if args.plot is not None:
        plot(comparison, args.plot)
    return _print(args, comparison, lambda: comparison_lines(comparison, _decoder(folder), args.full), bundle)


def _diagnose(args: argparse.Namespace) -> int:
    from qwen_ref.parity.ci import check_junit
    from qwen_ref.parity.diagnosis import diagnose
    from qwen_ref.parity.report import diagnosis_lines

    check_junit(args)
    folder = checkpoint_folder(args)
    with Progress("trying mistakes") as progress:
        diagnosis = diagnose(folder, args.bundle, progress.update)
    return _print(args, diagnosis, lambda: diagnosis_lines(diagnosis, args.full), args.bundle)


def _print(
    args: argparse.Namespace,
    result: Comparison | Diagnosis,
    lines: Callable[[], Iterator[str]],
    bundle: Path,
) -> int:
    """Prints a result, and writes it where --junit says. Returns the exit code: 1 if a port is wrong."""
    from qwen_ref.parity.ci import github_lines, passed, write_junit

    if args.junit is not None:
        write_junit(args.junit, result, args.command, bundle)
    if args.github:
        print(*github_lines(result, args.command), sep="\n")
    text = json.dumps(result.to_json(), ensure_ascii=False) if args.json else "\n".join(lines())
    print(on_stdout(text), flush=True)
    return 0 if passed(result) else 1


def _decoder(folder: Path | None) -> Callable[[int], str] | None:
    """What gives a token's text; None if the folder has no vocabulary."""
    if folder is None or not (folder / "qwen.tiktoken").is_file():
        return None
    from qwen_ref.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")
    return lambda number: repr(tokenizer.decode([number])) if number < tokenizer.n_vocab else "(padding)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 is "beyond tolerance" and nothing else, the others cli.run's."""
    parser = _parser()
    return run(parser, lambda args: args.run(args), arguments, lost=2)


if __name__ == "__main__":
    sys.exit(main())
