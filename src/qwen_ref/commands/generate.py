"""`python -m qwen_ref.generate`: a prompt and a checkpoint folder in, text out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.commands.cli import Parser, Progress, on_stdout, run, say, utf8
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.completion import MOST_ALTERNATIVES, choice, top_logprobs, usage
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.files import read_prompt
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.lookup import add_lookup_option, checked_lookup
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
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.decoding.alternatives import Alternatives, Scored
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
    add_lookup_option(parser, ". The option stands after the prompt")
    add("--echo", action="store_true", help="print the prompt before the text")
    add(
        "--logprobs",
        action="store_true",
        help="print a line per token: log-probability, id, text as JSON; with --json they are in choices",
    )
    add(
        "--top-logprobs",
        type=int,
        metavar="N",
        help="with --logprobs or --json: the N likeliest tokens in each token's place as well",
    )
    add("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """Every rank but 0: it only computes. Rank 0 reads the prompt, samples and prints."""
    from qwen_ref.decoding.alternatives import Alternatives
    from qwen_ref.decoding.lookup import Passes

    request, scored_ids = json.loads(ranks.share(None))
    model = load(args, folder, ranks)
    with Alternatives(model, 0, scored_ids):
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
    for stop in args.stop:
        if re.search(r"\\[nrt]", stop):
            say(
                f"note: --stop '{stop}' is taken as it is typed, backslash and letter; in bash and zsh "
                "$'\\n' is a line end and $'\\t' a tab"
            )
    top = _checked_top(args, config)
    request = {"prompt_ids": prompt_ids, **settings, "stop_ids": sorted(defaults.stop_ids)}
    if draft_tokens := checked_lookup(args, folder, settings):
        request["lookup"] = draft_tokens
    scores = args.logprobs or args.top_logprobs is not None
    scored_ids = prompt_ids if args.echo and scores else []
    ranks.share(json.dumps((request, scored_ids)))
    model = load(args, folder, ranks)
    say(describe(settings, defaults.stop_ids, stop_texts))
    if note := length_note(config, len(prompt_ids) + settings["max_new_tokens"]):
        say(note)

    from qwen_ref.checkpoint import dtype_name
    from qwen_ref.decoding.alternatives import Alternatives
    from qwen_ref.decoding.lookup import Passes
    from qwen_ref.decoding.streaming import TextStream

    clock, passes = Clock(), Passes()
    # The loop is closed in any case: the other ranks wait for its next step.
    with (
        Progress("prompt", unit="tokens") as progress,
        Alternatives(model, top, scored_ids) as alternatives,
        contextlib.closing(_loop(model, request, passes, progress.update)) as steps,
    ):
        watched = clock.watch(alternatives.watch(ranks.until_interrupted(steps)))
        stream = TextStream(watched, tokenizer, defaults.stop_ids, stop_texts)
        # As the tokenizer gives the prompt to the model: in NFC.
        echoed = tokenizer.decode(prompt_ids) if args.echo else ""
        text, code = _print_stream(stream, args, tokenizer, echoed, alternatives)
    if args.json:
        tokens = [*alternatives.prompt, *alternatives.steps[: len(stream.steps)]] if scores else None
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
            "object": "text_completion",
            "model": str(args.model or folder),
            "choices": [choice(echoed + text, stream.finish_reason, tokens, tokenizer)],
            "usage": usage(len(prompt_ids), len(stream.steps)),
        }
        if draft_tokens:
            more = {"tokens_per_pass": passes.tokens_per_pass, "draft_tokens": draft_tokens}
            report["lookup"] = {**dataclasses.asdict(passes), **more}
        print(on_stdout(json.dumps(report, ensure_ascii=False)), flush=True)
    speed = clock.report(len(prompt_ids))
    say(f"{speed}; {passes}" if draft_tokens else speed)
    return code


def _checked_top(args: argparse.Namespace, config: QwenConfig) -> int:
    """How many likeliest tokens to give, 0 without --top-logprobs."""
    top, most = args.top_logprobs, min(MOST_ALTERNATIVES, config.vocab_size)
    if top is None:
        return 0
    if not 0 <= top <= most:
        limit = f"{most}, and the vocabulary has {config.vocab_size} tokens"
        raise InputError(f"--top-logprobs {top} must be from 0 to {limit}")
    if not (args.logprobs or args.json):
        raise InputError("--top-logprobs goes with --logprobs (a line per token) or --json")
    return top


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


def _print_stream(
    stream: TextStream,
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    echoed: str,
    alternatives: Alternatives,
) -> tuple[str, int]:
    """Prints what is echoed and the stream, as the options ask; returns the stream's text and the code."""
    text, code = "", 0
    characters = lines = 0  # how many are printed

    def show() -> None:
        nonlocal characters, lines
        # Text counts as printed before it is printed: Ctrl-C in between must not print it twice.
        new_text, characters = (echoed + text)[characters:], len(echoed + text)
        scored = [*alternatives.prompt, *alternatives.steps[: len(stream.steps)]]
        new_scored, lines = scored[lines:], len(scored)
        if args.json:
            return
        if not args.logprobs:
            print(on_stdout(new_text), end="", flush=True)
            return
        for each in new_scored:
            print(on_stdout(_line(each, args, tokenizer)), flush=True)

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


def _line(scored: Scored, args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """The line of a token for --logprobs: null is the log-probability of a text's first token."""
    logprob = "null" if scored.logprob is None else f"{scored.logprob:.6f}"
    columns = [logprob, str(scored.token), json.dumps(_text(scored.token, tokenizer), ensure_ascii=False)]
    if args.top_logprobs is not None:
        columns.append(json.dumps(top_logprobs(scored, tokenizer), ensure_ascii=False))
    return "\t".join(columns)


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token]) if token < tokenizer.n_vocab else "\ufffd"


def _token_report(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"id": step.token, "text": _text(step.token, tokenizer), "logprob": step.logprob}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)
