"""`python -m qwen_ref.perplexity`: the perplexity of texts by length, as a table, JSON or a plot."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.commands.cli import Parser, Progress, as_json, integer, on_stdout, run, say
from qwen_ref.commands.figures import check_plot, pyplot, save
from qwen_ref.commands.files import output_path, read_text
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import (
    add_load_options,
    add_model_option,
    add_tokenizer_option,
    length_note,
    speed_options,
)
from qwen_ref.config import InputError, QwenConfig, shown
from qwen_ref.loading.hub import model_name
from qwen_ref.perplexity.state import State
from qwen_ref.perplexity.windows import Sums, Window, bucket_edges, window_sums, windows

if TYPE_CHECKING:
    from qwen_ref.model import Qwen

CARD_LENGTHS = (8192, 16384, 32768)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.perplexity",
        description="The perplexity of texts by length, as the model card gives it. "
        "The table goes to stdout, everything else to stderr.",
    )
    add = parser.add_argument
    add_model_option(parser)
    add(
        "--text",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="texts in UTF-8, - for stdin; each is scored by itself",
    )
    add(
        "--lengths",
        type=_lengths,
        default=CARD_LENGTHS,
        metavar="N,N,…",
        help=f"tokens of a window (default: the card's, {','.join(map(str, CARD_LENGTHS))})",
    )
    add(
        "--stride",
        type=int,
        metavar="N",
        help="begin a window every N tokens, and score only its new tokens (default: side by side)",
    )
    add("--windows", type=int, metavar="N", help="only the first N windows of each length")
    add("--no-ntk", action="store_true", help="without dynamic NTK, to see what it is worth")
    add("--no-logn", action="store_true", help="without LogN, to see what it is worth")
    add("--batch-size", type=int, default=1, metavar="N", help="windows at a time (default: %(default)s)")
    add("--state", type=Path, metavar="FILE", help="keep the windows done in this file, and continue from it")
    add("--plot", type=Path, metavar="FILE.png", help="draw the loss by position (takes matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
    add_tokenizer_option(parser)
    add_load_options(parser)
    return parser


def _lengths(argument: str) -> tuple[int, ...]:
    try:
        found = tuple(integer(part) for part in argument.split(","))
    except ValueError:
        message = f"{shown(argument)} are no lengths: numbers of tokens with commas between them"
        raise argparse.ArgumentTypeError(message) from None
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"a window of {min(found)} tokens scores nothing; the least is 2")
    return tuple(dict.fromkeys(found))


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """Every rank but 0: it only computes. Rank 0 has the texts, and sends each batch."""
    from qwen_ref.perplexity.scoring import score_texts

    model = load(args, folder, ranks)
    model.config = _switched(model.config, args)
    while request := json.loads(model.group.texts("")[0]):
        score_texts(model, **request)
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    from qwen_ref.checkpoint import dtype_name

    for name in ("stride", "windows", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    check_plot(args)
    if args.state is not None:
        output_path(args.state, "--state")
    config, tokenizer = open_folder(folder, args.tokenizer_engine)
    texts = [tokenizer.encode(read_text(path)) for path in args.text]
    asked = _windows(args, texts)
    state = State(args.state, _run(args, folder, texts))
    _say_notes(args, config, asked)
    model = load(args, folder, ranks)
    model.config = _switched(model.config, args)
    to_do = {
        length: [window for window in found if (length, window) not in state.done]
        for length, found in asked.items()
    }
    with Progress("scoring", unit="tokens") as progress:
        scored = _scored(model, texts, to_do, args.batch_size, progress)
        for length, window, sums in ranks.until_interrupted(scored):
            state.add(length, window, sums)
    results = [_result(model.config, length, found, state) for length, found in asked.items()]
    dtype = dtype_name(model.embed.weight.dtype)
    if args.json:
        report = {
            "model": str(folder),
            "texts": [
                {"file": str(path), "tokens": len(text)} for path, text in zip(args.text, texts, strict=True)
            ],
            "dtype": dtype,
            "stride": args.stride,
            "use_dynamic_ntk": model.config.use_dynamic_ntk,
            "use_logn_attn": model.config.use_logn_attn,
            "results": results,
        }
        print(on_stdout(as_json(report)), flush=True)
    else:
        print("\n".join(_table(results)), flush=True)
    if args.plot is not None:
        _draw(results, f"{model_name(folder)}, {dtype}", args.plot)
    return 0


def _windows(args: argparse.Namespace, texts: list[list[int]]) -> dict[int, list[Window]]:
    """The windows of each length; ValueError for a length without any."""
    sizes = [len(text) for text in texts]
    found = {}
    for length in args.lengths:
        if args.stride is not None and args.stride >= length:
            raise InputError(
                f"--stride {args.stride} must be below the length of a window, {length}; without it windows "
                "stand side by side"
            )
        found[length] = windows(sizes, length, args.stride)[: args.windows]
        if not found[length]:
            remedy = f" or --lengths of at most {max(sizes)}" if max(sizes) > 1 else ""
            raise InputError(
                f"no text fills a window of {length} tokens: the longest has {max(sizes)}; give more text"
                + remedy
            )
        short = [f"{path} ({size})" for path, size in zip(args.text, sizes, strict=True) if size < length]
        if short:
            say(f"note: left out, shorter than a window of {length} tokens: {', '.join(short)}")
    return found


def _run(args: argparse.Namespace, folder: Path, texts: list[list[int]]) -> dict[str, Any]:
    """What the results depend on, for --state. Each result itself says its length and stride.

    Device and number of ranks are left out: they change rounding alone, and a run may continue with others.
    """
    from qwen_ref.checkpoint import compute_dtype
    from qwen_ref.loading.loader import fingerprint, open_checkpoint

    config, stored = open_checkpoint(folder)
    model = fingerprint(config, compute_dtype(args.dtype, stored), stored)
    return {
        "--dtype": args.dtype,  # compared first: the model's digest changes with it, but names no cause
        "the model": _digest(model),
        "the text": [_digest(text) for text in texts],
        "options": speed_options(args),
        "--no-ntk": args.no_ntk,
        "--no-logn": args.no_logn,
    }


def _digest(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _say_notes(args: argparse.Namespace, config: QwenConfig, lengths: Iterable[int]) -> None:
    for option, used, name in (
        (args.no_ntk, config.use_dynamic_ntk, "dynamic NTK"),
        (args.no_logn, config.use_logn_attn, "LogN"),
    ):
        if option and not used:
            say(f"note: this model has no {name} that could be switched off")
    for length in lengths:
        if note := length_note(_switched(config, args), length):
            say(note)


def _switched(config: QwenConfig, args: argparse.Namespace) -> QwenConfig:
    return dataclasses.replace(
        config,
        use_dynamic_ntk=config.use_dynamic_ntk and not args.no_ntk,
        use_logn_attn=config.use_logn_attn and not args.no_logn,
    )


def _scored(
    model: Qwen, texts: list[list[int]], to_do: dict[int, list[Window]], batch_size: int, progress: Progress
) -> Iterator[tuple[int, Window, Sums]]:
    """The sums of every window of each length, a batch at a time, on all ranks."""
    from qwen_ref.perplexity.scoring import score_texts

    total = sum(window.end - window.start - 1 for found in to_do.values() for window in found)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress.update(min(done, total), total)

    for length, found in to_do.items():
        for first in range(0, len(found), batch_size):
            batch = found[first : first + batch_size]
            request: dict[str, Any] = {
                "texts": [texts[window.text][window.start : window.end] for window in batch],
                "starts": [window.scored - window.start for window in batch],
                "batch_size": batch_size,
            }
            model.group.texts(json.dumps(request))
            scores = score_texts(model, **request, advance=advance)
            for window, each in zip(batch, scores, strict=True):
                yield length, window, window_sums(each.logprobs, window, length)
    model.group.texts("null")


# What comes out


def _result(config: QwenConfig, length: int, found: list[Window], state: State) -> dict[str, Any]:
    from qwen_ref.model import ntk_alpha

    sums = [state.done[length, window] for window in found]
    losses = [math.fsum(column) for column in zip(*(each.losses for each in sums), strict=True)]
    tokens = [sum(column) for column in zip(*(each.tokens for each in sums), strict=True)]
    loss = math.fsum(losses) / sum(tokens)
    edges = bucket_edges(length)
    buckets = zip(edges, edges[1:], losses, tokens, strict=False)
    return {
        "length": length,
        "alpha": ntk_alpha(length, config.seq_length) if config.use_dynamic_ntk else 1,
        "windows": len(found),
        "tokens": sum(tokens),
        "loss": loss,
        "perplexity": _exp(loss),
        "by_position": [
            {"from": start, "to": end - 1, "tokens": count, "loss": each / count if count else None}
            for start, end, each, count in buckets
        ],
    }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| length | α | windows | tokens scored | loss | perplexity |"
    yield "|---|---|---|---|---|---|"
    for each in results:
        yield (
            f"| {each['length']:,} | {each['alpha']} | {each['windows']:,} | {each['tokens']:,} "
            f"| {each['loss']:.5f} | {each['perplexity']:.4f} |"
        )
    for each in results:
        yield ""
        yield f"| position in {each['length']:,} | tokens scored | loss | perplexity |"
        yield "|---|---|---|---|"
        for part in each["by_position"]:
            if part["tokens"]:
                span = f"{part['from']:,} to {part['to']:,}"
                yield f"| {span} | {part['tokens']:,} | {part['loss']:.5f} | {_exp(part['loss']):.4f} |"


def _draw(results: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for each in results:
        parts = [part for part in each["by_position"] if part["tokens"]]
        middles = [math.sqrt(part["from"] * (part["to"] + 1)) for part in parts]
        axes.plot(middles, [part["loss"] for part in parts], "o-", label=f"{each['length']:,} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    axes.set(xlabel="position in the window", ylabel="mean −log p of a token")
    axes.set_title(title, parse_math=False)  # the folder's name may hold a $
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)


if __name__ == "__main__":
    sys.exit(main())
