"""`python -m qwen_ref.chat`: its options, and what each rank does."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ref.chat.context import DEFAULT_SYSTEM, MAX_WINDOW_SIZE, chat_stop_ids
from qwen_ref.commands.cli import Parser, is_terminal, run, say, utf8
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.files import read_prompt
from qwen_ref.commands.loading import load, on_every_rank, open_folder
from qwen_ref.commands.lookup import add_lookup_option, checked_lookup
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import add_model_option, add_options, chosen_settings, describe
from qwen_ref.config import InputError, read_json_object, shown

if TYPE_CHECKING:
    from qwen_ref.chat.terminal import Chat


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
    add("--history", type=Path, metavar="FILE", help="continue a conversation that /save or --save wrote")
    add(
        "--save", type=Path, metavar="FILE", help="write the conversation to FILE when it ends, as /save does"
    )
    add(
        "--chat-format",
        choices=["chatml"],
        help="the model was trained to answer in this format, even if the folder does not say so",
    )
    add_options(parser)
    add_lookup_option(parser)
    return parser


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """Every rank but 0: it only computes. Rank 0 reads what is typed, samples and prints."""
    from qwen_ref.decoding.prefix import PrefixCache

    draft_tokens = json.loads(ranks.share(None))  # rank 0 is ready
    model = load(args, folder, ranks)
    prefix = PrefixCache(model, draft_tokens)
    while request := model.group.texts("")[0]:
        with contextlib.suppress(InputError):  # rank 0 raises the same error and prints it
            for _ in prefix.generate(**json.loads(request)):
                pass
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    from qwen_ref.chat.conversation import Conversation
    from qwen_ref.chat.terminal import Chat, WatchedCache, check_saving, read_saved

    if args.chat_format is None:
        _require_chat(folder)
    if args.save is not None:
        check_saving(args.save, "--save")
    system, history = (DEFAULT_SYSTEM, []) if args.history is None else read_saved(args.history)
    _, tokenizer = open_folder(folder)
    defaults = read_defaults(folder, tokenizer)
    stop_ids = defaults.stop_ids | chat_stop_ids(tokenizer)
    settings = chosen_settings(args, defaults)
    draft_tokens = checked_lookup(args, folder, settings)
    if args.once is None and sys.stdin is None:
        raise InputError("stdin is closed; --once TEXT asks without it")
    query = None if args.once is None else read_prompt(args.once, None)
    if query is not None and not query.strip():
        raise InputError("the query is empty; give it behind --once or on stdin")
    ranks.share(json.dumps(draft_tokens))
    model = load(args, folder, ranks)
    say(describe(settings, stop_ids, defaults.stop_texts))
    if draft_tokens:  # it is greedy and takes nothing else
        settings = {"max_new_tokens": settings["max_new_tokens"]}
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
    conversation.prefix = WatchedCache(model, ranks, chat.clock, draft_tokens)
    try:
        return _talk(chat, query)
    finally:
        model.group.texts("")  # the others end
        if args.save is not None and conversation.history:
            chat.save(args.save)


def _talk(chat: Chat, query: str | None) -> int:
    """Answers the query of --once, or all that is typed or piped in; returns the exit code."""
    from qwen_ref.chat.terminal import messages

    if query is not None:
        return chat.answer(query)
    if is_terminal(sys.stdin):
        say("/help lists the commands, /quit or Ctrl-D ends")
    for text in messages():
        if not chat.message(text):
            break
    return 2 if chat.failed and not is_terminal(sys.stdin) else 0


def _require_chat(folder: Path) -> None:
    """Raises ValueError for a checkpoint that does not say that it is a chat model."""
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        problem = f"{folder} has no generation_config.json, which would say that it is a chat model"
    else:
        found = read_json_object(path).get("chat_format")
        if found == "chatml":
            return
        if found is None:
            problem = f"{path} has no chat_format, which is 'chatml' in a chat release"
        elif found == "raw":
            problem = f"{path}: chat_format is 'raw': a base model, which continues text"
        else:
            problem = f"{path}: chat_format is {shown(found)}, and this command knows 'chatml' only"
    raise InputError(
        f"{problem}; use a -Chat release, or python -m qwen_ref.generate; if the model was trained on "
        "ChatML, add --chat-format chatml"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)


if __name__ == "__main__":
    sys.exit(main())
