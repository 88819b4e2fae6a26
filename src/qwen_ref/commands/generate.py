"""`python -m qwen_ref.generate`: a prompt and a checkpoint folder in, text out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.commands.cli import Parser, Progress, integer, on_stdout, run, say, utf8
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.files import read_prompt
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import (
    add_model_option,
    add_options,
    add_prompt_options,
    chosen_settings,
    describe,
    encoded_prompt,
    length_note,
)
from qwen_ref.config import InputError, shown, whole
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.decoding.lookup import Passes
    from qwen_ref.decoding.streaming import TextStream
    from qwen_ref.generate import Step
    from qwen_ref.model import Qwen


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.generate",
        description="Continue a prompt with a first-generation Qwen checkpoint. "
        "The text goes to stdout, everything else to stderr.",
        epilog="Defaults come from the folder's generation_config.json; without one, decoding is greedy.",
    )
    add = parser.add_argument
    add_prompt_options(parser, "the text to continue")
    add_model_option(parser)
    add_options(parser)
    add(
        "--stop",
        type=utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add(
        "--lookup",
        nargs="?",
        type=_draft_tokens,
        const=True,
        metavar="N",
        help="guess up to N tokens (default: 8) from the text so far and check all of them in one pass: the "
        "same greedy text in fewer passes, if it repeats itself. It takes float32, --fast or --quantize. The "
        "option stands after the prompt",
    )
    add("--logprobs", action="store_true", help="print a line per token: log-probability, id, text as JSON")
    add("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _draft_tokens(argument: str) -> int:
    try:
        return integer(argument)
    except ValueError:
        message = f"{shown(argument)} is no number of tokens; a prompt goes before --lookup"
        raise argparse.ArgumentTypeError(message) from None


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """Every rank but 0: it only computes. Rank 0 reads the prompt, samples and prints."""
    from qwen_ref.decoding.lookup import Passes

    request = json.loads(ranks.share(None))
    model = load(args, folder, ranks)
    for _ in _loop(model, request, Passes(), None):
        pass
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    prompt = read_prompt(args.prompt, args.file)
    config, tokenizer = open_folder(folder)
    prompt_ids = encoded_prompt(tokenizer, prompt, args.allow_special)
    defaults = read_defaults(folder, tokenizer)
    settings = chosen_settings(args, defaults)
    stop_texts = (*defaults.stop_texts, *args.stop)
    if "" in stop_texts:
        raise InputError("--stop is empty: it would end every text at once")
    request = {"prompt_ids": prompt_ids, **settings, "stop_ids": sorted(defaults.stop_ids)}
    if args.lookup is not None:
        _check_lookup(args, folder, settings)
        request["lookup"] = args.lookup
    ranks.share(json.dumps(request))
    model = load(args, folder, ranks)
    say(describe(settings, defaults.stop_ids, stop_texts))
    if note := length_note(config, len(prompt_ids) + settings["max_new_tokens"]):
        say(note)

    from qwen_ref.checkpoint import dtype_name
    from qwen_ref.decoding.lookup import Passes
    from qwen_ref.decoding.streaming import TextStream

    clock, passes = Clock(), Passes()
    # The loop is closed in any case: the other ranks wait for its next step.
    with (
        Progress("prompt", unit="tokens") as progress,
        contextlib.closing(_loop(model, request, passes, progress.update)) as steps,
    ):
        watched = clock.watch(ranks.until_interrupted(steps))
        stream = TextStream(watched, tokenizer, defaults.stop_ids, stop_texts)
        text, code = _print_stream(stream, args, tokenizer)
    if args.json:
        report: dict[str, Any] = {
            "prompt": prompt,
            "text": text,
            "finish_reason": stream.finish_reason or "interrupted",
            "tokens": [_token_report(step, tokenizer) for step in stream.steps],
            "settings": {
                "dtype": dtype_name(model.embed.weight.dtype),
                "device": args.device,
                **settings,
                "stop": list(stop_texts),
            },
            "prompt_tokens": len(prompt_ids),
            "prefill_tokens_per_second": clock.prefill_rate(len(prompt_ids)),
            "decode_tokens_per_second": clock.decode_rate(),
        }
        if args.lookup is not None:
            more = {"tokens_per_pass": passes.tokens_per_pass, "draft_tokens": args.lookup}
            report["lookup"] = {**dataclasses.asdict(passes), **more}
        print(on_stdout(json.dumps(report, ensure_ascii=False)), flush=True)
    speed = clock.report(len(prompt_ids))
    if args.lookup is not None:
        each = f"{passes.tokens_per_pass:.1f} tokens per pass"
        speed += f"; lookup: {passes.tokens} tokens in {passes.passes} passes, {each}"
    say(speed)
    return code


def _loop(
    model: Qwen, request: dict[str, Any], passes: Passes, progress: Callable[[int, int], None] | None
) -> Generator[Step]:
    """The loop that every rank runs: rank 0's command has shared the request."""
    from qwen_ref.decoding.lookup import generate_lookup
    from qwen_ref.generate import generate

    if "lookup" not in request:
        return generate(model, **request, progress=progress)
    settings = {name: request[name] for name in ("prompt_ids", "max_new_tokens", "stop_ids")}
    draft_tokens = request["lookup"]
    return generate_lookup(model, **settings, draft_tokens=draft_tokens, passes=passes, progress=progress)


def _check_lookup(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where another setting rules --lookup out, with its origin and the remedy."""
    from qwen_ref.checkpoint import compute_dtype
    from qwen_ref.decoding.lookup import DRAFT_TOKENS, check_model
    from qwen_ref.fast.attention import FastCache
    from qwen_ref.fast.int8_cache import Int8Cache
    from qwen_ref.loading.loader import open_checkpoint
    from qwen_ref.model import KVCache

    if args.lookup is True:
        args.lookup = DRAFT_TOKENS
    whole("draft_tokens", args.lookup)
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    wrong = [name for name, value in greedy.items() if settings[name] != value]
    if wrong:
        config = folder / "generation_config.json"
        there = [
            f"{name}={settings[name]:g}" + ("" if getattr(args, name) is not None else f" (from {config})")
            for name in wrong
        ]
        remedy = [f"--{name.replace('_', '-')} {greedy[name]:g}" for name in wrong]
        raise InputError(f"--lookup is greedy only, without {' and '.join(there)}; add {' '.join(remedy)}")
    fast = args.fast or args.quantize is not None
    cache_type = Int8Cache if args.kv_cache is not None else FastCache if fast else KVCache
    check_model(compute_dtype(args.dtype, open_checkpoint(folder)[1]), cache_type)


def _print_stream(stream: TextStream, args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, int]:
    """Prints the stream as the options ask; returns the whole text and the exit code."""
    text, code = "", 0
    characters = steps = 0  # how many are printed

    def show() -> None:
        nonlocal characters, steps
        # Text counts as printed before it is printed: Ctrl-C in between must not print it twice.
        new_text, characters = text[characters:], len(text)
        new_steps, steps = stream.steps[steps:], len(stream.steps)
        if args.json:
            return
        if not args.logprobs:
            print(on_stdout(new_text), end="", flush=True)
            return
        for step in new_steps:
            token = _token_report(step, tokenizer)
            quoted = json.dumps(token["text"], ensure_ascii=False)
            print(on_stdout(f"{token['logprob']:.6f}\t{token['id']}\t{quoted}"), flush=True)

    try:
        for piece in stream:
            text += piece
            show()
    except KeyboardInterrupt:
        text, code = text + stream.flush(), 130
    show()
    if not args.json and not args.logprobs:
        print(flush=True)
    return text, code


def _token_report(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([step.token]) if step.token < tokenizer.n_vocab else "\ufffd"
    return {"id": step.token, "text": text, "logprob": step.logprob}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)
