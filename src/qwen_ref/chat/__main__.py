"""`python -m qwen_ref.chat`: its options, and what each rank does."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_ref.chat.context import DEFAULT_SYSTEM, MAX_WINDOW_SIZE, chat_stop_ids
from qwen_ref.commands.cli import Parser, is_terminal, run, say, utf8
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.files import read_prompt
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import add_model_option, add_options, chosen_settings, describe
from qwen_ref.config import InputError, read_json_object, shown


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.chat",
        description="Chat with a first-generation Qwen chat checkpoint. "
        "Answers go to stdout, everything else to stderr.",
        epilog="Defaults come from the folder's generation_config.json. "
        "/help, typed in the chat, lists its commands.",
    )
    add_model_option(parser)
    add = parser.add_argument
    add("--system", type=utf8, metavar="TEXT", help=f"the system message (default: {DEFAULT_SYSTEM})")
    add(
        "--once",
        type=utf8,
        nargs="?",
        const="-",
        metavar="TEXT",
        help="answer TEXT and end; - or nothing reads it from stdin (one newline at its end is dropped)",
    )
    add("--history", type=Path, metavar="FILE", help="continue a conversation that /save wrote")
    add_options(parser)
    return parser


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """Every rank but 0: it only computes. Rank 0 reads what is typed, samples and prints."""
    from qwen_ref.decoding.prefix import PrefixCache

    ranks.share(None)  # rank 0 is ready
    model = load(args, folder, ranks)
    prefix = PrefixCache(model)
    while request := model.group.texts("")[0]:
        with contextlib.suppress(InputError):  # rank 0 raises the same error and prints it
            for _ in prefix.generate(**json.loads(request)):
                pass
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    from qwen_ref.chat.conversation import Conversation
    from qwen_ref.chat.terminal import Chat, WatchedCache, messages, read_saved

    _require_chat(folder)
    system, history = (DEFAULT_SYSTEM, []) if args.history is None else read_saved(args.history)
    _, tokenizer = open_folder(folder)
    defaults = read_defaults(folder, tokenizer)
    stop_ids = defaults.stop_ids | chat_stop_ids(tokenizer)
    settings = chosen_settings(args, defaults)
    if args.once is None and sys.stdin is None:
        raise InputError("stdin is closed; --once TEXT asks without it")
    query = None if args.once is None else read_prompt(args.once, None)
    if query is not None and not query.strip():
        raise InputError("the query is empty; give it behind --once or on stdin")
    ranks.share("")
    model = load(args, folder, ranks)
    say(describe(settings, stop_ids, defaults.stop_texts))
    conversation = Conversation(
        model,
        tokenizer,
        system if args.system is None else args.system,
        history,
        defaults.max_window_size or MAX_WINDOW_SIZE,
        defaults.stop_texts,
        stop_ids,
        **settings,
    )
    chat = Chat(conversation, Clock())
    conversation.prefix = WatchedCache(model, ranks, chat.clock)
    try:
        if query is not None:
            return chat.answer(query)
        if is_terminal(sys.stdin):
            say("/help lists the commands, /quit or Ctrl-D ends")
        for text in messages():
            if not chat.message(text):
                break
        return 2 if chat.failed and not is_terminal(sys.stdin) else 0
    finally:
        model.group.texts("")  # the others end


def _require_chat(folder: Path) -> None:
    """Raises ValueError for a checkpoint that is no chat model."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        raise InputError(f"{folder}: a chat release has a generation_config.json, with chat_format 'chatml'")
    found = read_json_object(path).get("chat_format", "raw")
    if found != "chatml":
        raise InputError(
            f"{path}: chat_format is {shown(found)}: a base model, which continues text and was not taught "
            "to answer, as 'chatml' is; use its -Chat release, or python -m qwen_ref.generate"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)


if __name__ == "__main__":
    sys.exit(main())
