"""How well a model predicts a text, by length: log-probabilities, and `python -m qwen_ref.perplexity`.

The model card gives the perplexity of long texts at 8,192, 16,384 and 32,768 tokens. The command makes that
table for any text: exp of the mean of −log p(token | those before it in its window), over windows of each
length. torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.cli import (
    Parser,
    Progress,
    as_json,
    integer,
    on_stdout,
    output_path,
    read_text,
    run,
    say,
    speed_options,
    write_whole,
)
from qwen_ref.config import (
    LARGEST_TEXT,
    InputError,
    QwenConfig,
    parse_json,
    read_bytes,
    require_folder,
    shown,
)
from qwen_ref.figures import pyplot, save
from qwen_ref.launch import Ranks
from qwen_ref.settings import (
    add_load_options,
    add_model_option,
    dtype_name,
    length_note,
    load,
    on_every_rank,
    open_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_ref.model import Qwen

CARD_LENGTHS = (8192, 16384, 32768)
_STATE = "qwen_ref.perplexity 1"


def score(
    model: Qwen,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    continuations: Sequence[Sequence[int]] | None = None,
    batch_size: int = 8,
) -> Tensor | list[Tensor]:
    """Log-probabilities of the tokens of a text, of several texts, or of continuations of one prompt.

    ids: a text of T tokens → (T − 1): of each token but the first, given all before it. Several texts, of any
    lengths → a list of such; a tensor (B, T) → (B, T − 1).
    continuations: of the prompt ids, which goes through the model once → a list, of each continuation's
    tokens, given the prompt and the tokens before them.
    batch_size: so many texts or continuations share a pass; the numbers change by rounding alone.
    float32, or float64 in a float64 model. Dynamic NTK's α is that of each whole text, prompt and
    continuation together. Several ranks call it alike, and all get the result.
    Raises ValueError for no text, ids outside the vocabulary, and logits that are not finite.

    >>> score(model, tokenizer.encode("冰岛的首都是雷克雅未克")).sum()  # log p, given the first token
    >>> yes, no = score(model, prompt, [tokenizer.encode(" yes"), tokenizer.encode(" no")])
    >>> yes.sum() > no.sum()
    """
    import torch

    from qwen_ref.scoring import score_continuations, score_texts

    dimensions = 1 + any(map(_is_list, ids)) if isinstance(ids, Sequence) else getattr(ids, "ndim", 0)
    right = dimensions in (1, 2) and len(ids) > 0 and not isinstance(ids, str | bytes)
    if not right or (dimensions == 2 and not all(map(_is_list, ids))):
        raise InputError(f"ids must be the tokens of a text, or of several; they are {shown(ids)}")
    texts = [list(text) for text in ids] if dimensions == 2 else [list(ids)]
    if continuations is not None:
        if dimensions == 2:
            raise InputError("continuations are those of one prompt: ids must be a single list of token ids")
        several = isinstance(continuations, Iterable) and not isinstance(continuations, str | bytes)
        continuations = list(continuations) if several else [continuations]
        if not all(map(_is_list, continuations)):
            raise InputError(f"continuations must be lists of token ids; they are {shown(continuations)}")
        # A copy is what gradients can flow through; what was made in inference mode is not.
        scores = score_continuations(model, texts[0], continuations, batch_size)
        return [each.logprobs.clone() for each in scores]
    found = [each.logprobs.clone() for each in score_texts(model, texts, batch_size=batch_size)]
    if dimensions == 1:
        return found[0]
    return torch.stack(found) if isinstance(ids, torch.Tensor) else found


def _is_list(ids: object) -> bool:
    text = isinstance(ids, str | bytes)
    return (isinstance(ids, Sequence) and not text) or getattr(ids, "ndim", 0) > 0


# Windows


class Window(NamedTuple):
    """Tokens start to end of a text, of which those from scored on are scored, given the others."""

    text: int  # its number
    start: int
    end: int
    scored: int


def windows(lengths_of_texts: Sequence[int], length: int, stride: int | None = None) -> list[Window]:
    """The windows of so many tokens of each text; none crosses from one text to the next.

    Without stride they stand side by side: each scores all its tokens but the first, and what is left at a
    text's end, shorter than a window, is left out. With stride each begins that many tokens after the last
    and scores what that one did not: every token but the first is scored once, up to the text's end.

    >>> windows([10], 4)
    [Window(text=0, start=0, end=4, scored=1), Window(text=0, start=4, end=8, scored=5)]
    >>> [tuple(window) for window in windows([9], 4, stride=3)]
    [(0, 0, 4, 1), (0, 3, 7, 4), (0, 6, 9, 7)]
    """
    if stride is not None and not 1 <= stride < length:
        raise InputError(f"{stride=} must be from 1 to below the length of a window, {length}")
    found = []
    for text, tokens in enumerate(lengths_of_texts):
        if tokens < length:
            continue
        if stride is None:
            starts = range(0, tokens - length + 1, length)
            found += [Window(text, start, start + length, start + 1) for start in starts]
            continue
        start = scored = 0
        while scored < tokens:
            end = min(start + length, tokens)
            found.append(Window(text, start, end, max(scored, 1)))
            start, scored = start + stride, end
    return found


def bucket_edges(length: int) -> list[int]:
    """Where buckets of positions in a window begin, and the end: doubling, eight of them at most.

    >>> bucket_edges(8192)
    [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    """
    return [1, *(length >> n for n in range(7, -1, -1) if length >> n > 1)]


class Sums(NamedTuple):
    """−log p of the tokens of a window, summed by bucket, and how many they are."""

    losses: list[float]
    tokens: list[int]


def window_sums(logprobs: Tensor, window: Window, length: int) -> Sums:
    """Sorts a window's scores into the buckets of its length."""
    import torch

    edges = bucket_edges(length)
    positions = torch.arange(window.scored - window.start, window.end - window.start, device="cpu")
    bucket = torch.bucketize(positions, torch.tensor(edges[1:], device="cpu"), right=True)
    losses = torch.zeros(len(edges) - 1, dtype=torch.float64, device="cpu")
    losses.index_add_(0, bucket, -logprobs.double().cpu())
    return Sums(losses.tolist(), torch.bincount(bucket, minlength=len(edges) - 1).tolist())


# What is done stays done: a file of results, a line a window


class State:
    """The windows done so far, in a file if one is given: what is interrupted goes on where it was."""

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        """run: what the results depend on. Raises ValueError where the file is of another run or kind."""
        self.path = path
        self.done: dict[tuple[int, Window], Sums] = {}
        if path is None:
            return
        header = {"format": _STATE, **run}
        if not os.path.lexists(path):
            write_whole(path, json.dumps(header) + "\n")
            return
        whole = read_bytes(path, LARGEST_TEXT)
        end = whole.rfind(b"\n") + 1  # the last line may have been cut off
        try:
            first, *rest = map(parse_json, whole[:end].splitlines())
            differ = [key for key, value in header.items() if first.get(key) != value]
            if "format" in differ:
                raise ValueError
            for line in rest:
                length, window, sums = (
                    line["length"],
                    Window(*line["window"]),
                    Sums(line["losses"], line["tokens"]),
                )
                buckets = len(bucket_edges(length)) - 1
                finite = all(math.isfinite(each) for each in sums.losses)
                scored = window.end - window.scored
                if not (
                    finite and len(sums.losses) == len(sums.tokens) == buckets and sum(sums.tokens) == scored
                ):
                    raise ValueError
                self.done[length, window] = sums
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise InputError(f"{path} is no file of this command's --state; give another name") from None
        if differ:
            key = differ[0]
            raise InputError(
                f"{path} is of another run: there {key} is {shown(first.get(key))}, here "
                f"{shown(header[key])}; give another --state, or the options of that run"
            )
        os.truncate(path, end)

    def add(self, length: int, window: Window, sums: Sums) -> None:
        self.done[length, window] = sums
        if self.path is not None:
            line = {"length": length, "window": window, "losses": sums.losses, "tokens": sums.tokens}
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")


# The command


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
        required=True,
        metavar="FILE",
        help="texts in UTF-8; none is joined to another",
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
        help="begin a window every N tokens, and score in each what is new (default: side by side)",
    )
    add("--windows", type=int, metavar="N", help="the first N windows of each length alone")
    add("--no-ntk", action="store_true", help="without dynamic NTK, to see what it buys")
    add("--no-logn", action="store_true", help="without LogN, to see what it buys")
    add("--batch-size", type=int, default=1, metavar="N", help="windows at a time (default: %(default)s)")
    add("--state", type=Path, metavar="FILE", help="keep what is done in this file, and go on from there")
    add("--plot", type=Path, metavar="FILE.png", help="draw the loss by position (takes matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
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
    """A rank that only computes: rank 0 has the texts, and says what is next."""
    from qwen_ref.scoring import score_texts

    ranks.meet(args.device)
    model = load(args, folder, ranks)
    model.config = _switched(model.config, args)
    while request := json.loads(model.group.texts("")[0]):
        score_texts(model, **request)
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    require_folder(folder)
    for name in ("stride", "windows", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.plot is not None:
        pyplot()
        output_path(args.plot, "--plot", args)
    if args.state is not None:
        output_path(args.state, "--state")
    config, tokenizer = open_folder(folder)
    texts = [tokenizer.encode(read_text(path)) for path in args.text]
    asked = _windows(args, texts)
    state = State(args.state, _run(args, folder, texts))
    _say_notes(args, config, asked)
    ranks.meet(args.device)
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
    if args.json:
        report = {
            "model": str(folder),
            "texts": [
                {"file": str(path), "tokens": len(text)} for path, text in zip(args.text, texts, strict=True)
            ],
            "dtype": dtype_name(model),
            "stride": args.stride,
            "use_dynamic_ntk": model.config.use_dynamic_ntk,
            "use_logn_attn": model.config.use_logn_attn,
            "results": results,
        }
        print(on_stdout(as_json(report)), flush=True)
    else:
        print("\n".join(_table(results)), flush=True)
    if args.plot is not None:
        _draw(results, f"{folder.resolve().name}, {dtype_name(model)}", args.plot)
    return 0


def _windows(args: argparse.Namespace, texts: list[list[int]]) -> dict[int, list[Window]]:
    """The windows of each length; ValueError where there is none."""
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
    """What the results depend on, but for lengths and stride, which each of them states.

    Devices and ranks are left out: they change rounding alone, and a run may go on with others.
    """
    from qwen_ref.checkpoint import compute_dtype, fingerprint, open_checkpoint

    config, stored = open_checkpoint(folder)
    model = fingerprint(config, compute_dtype(args.dtype, stored), stored)
    return {
        "--dtype": args.dtype,  # first: the model's digest depends on it, and says less
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
    """What every window of each length comes to, a batch at a time, on all ranks."""
    from qwen_ref.scoring import score_texts

    total = sum(window.end - window.start - 1 for found in to_do.values() for window in found)
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress.update(min(done, total), total)

    for length, found in to_do.items():
        for first in range(0, len(found), batch_size):
            batch = found[first : first + batch_size]
            request = {
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
