"""The chat in a terminal or a pipe: messages read from stdin, commands such as /save, answers printed.

Answers go to stdout as they come, everything else to stderr. Ctrl-C stops an answer, not the program.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import json
import locale
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.chat.context import Turn, check_texts
from qwen_ref.chat.conversation import Conversation, dropped_note
from qwen_ref.commands.cli import Progress, is_terminal, on_stdout, say, to_stderr
from qwen_ref.commands.clock import Clock
from qwen_ref.commands.files import (
    LARGEST_TEXT,
    decoded,
    from_stdin,
    output_path,
    without_mark,
    write_whole,
)
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.settings import length_note
from qwen_ref.config import InputError, read_json_object, shown
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.generate import begun

if TYPE_CHECKING:
    from qwen_ref.generate import Step
    from qwen_ref.model import Qwen

SAVED_AS = "qwen_ref.chat"  # the mark of a file that /save wrote

HELP = '''/help           these lines
/history        the turns so far
/system [TEXT]  the system message, or TEXT from now on
/retry          the last query once more
/reset          forget all turns
/save FILE      write system message and turns to FILE; `--history FILE` goes on from there
/quit           end, as Ctrl-D does
Ctrl-C stops an answer. Pasted lines are one message. To type a message of several lines, put """ before the
first line and after the last. To begin a message with /, write //.'''


class Chat:
    """A conversation with the commands of the terminal."""

    def __init__(self, conversation: Conversation, clock: Clock) -> None:
        """clock: what times the steps of each answer."""
        self.conversation = conversation
        self.clock = clock
        self.failed = False  # whether a message ended in an error
        self.query: str | None = None  # the last one
        self._noted = False

    def message(self, text: str) -> bool:
        """Answers a message or runs its command; False ends the chat. Errors are printed, not raised."""
        try:
            if text.startswith("/") and not text.startswith("//") and "\n" not in text:
                return self._command(*text.split(maxsplit=1))
            self.answer(text.removeprefix("/") if text.startswith("//") else text)
        except InputError as error:
            say(f"error: {error}")
            self.failed = True
        except KeyboardInterrupt:  # between answers
            say("stopped")
        return True

    def answer(self, query: str, otherwise: str = "there is no answer yet; /retry asks again") -> int:
        """Prints the answer while it comes; returns 130 if Ctrl-C stopped it, else 0.

        otherwise: what to say if Ctrl-C stopped it before any text came.
        """
        talk, turns = self.conversation, len(self.conversation.history)
        self.query = query
        try:
            with contextlib.closing(talk.ask(query)) as pieces:
                tokens, kept = len(talk.context.ids), talk.prefix.kept
                self._note(tokens)
                try:
                    for piece in pieces:
                        print(on_stdout(piece), end="", flush=True)
                finally:
                    print(flush=True)
        except KeyboardInterrupt:
            said = "what there is of the answer is kept" if len(talk.history) > turns else otherwise
            say(f"stopped; {said}")
            return 130
        if talk.finish_reason == "length":
            limit = talk.settings["max_new_tokens"]
            say(f"the answer was cut at {limit} tokens; --max-new-tokens allows more")
        before = f"{kept} tokens of {tokens} known from before; " if kept else ""
        speed = before + self.clock.report(tokens - kept)
        say(f"{speed}; {talk.prefix.passes}" if talk.prefix.draft_tokens else speed)
        return 0

    def _note(self, tokens: int) -> None:
        """Says which turns were left out, and that a text is too long for the model."""
        talk = self.conversation
        if talk.context.dropped:
            say(f"note: {dropped_note(talk)}")
        note = length_note(talk.prefix.model.config, tokens + talk.settings["max_new_tokens"])
        if note and not self._noted:
            say(note)
            self._noted = True

    def _command(self, name: str, argument: str = "") -> bool:
        talk = self.conversation
        if argument and name in ("/quit", "/help", "/history", "/reset", "/retry"):
            raise InputError(f"{name} takes no argument; a message that begins with / is written with //")
        if name == "/quit":
            return False
        if name == "/help":
            print(HELP, flush=True)
        elif name == "/history":
            for asked, answered in talk.history:
                print(on_stdout(f"> {asked}\n{answered}"), flush=True)
        elif name == "/system" and argument:
            talk.system = argument
            say("the system message is changed; the turns stay, /reset forgets them")
        elif name == "/system":
            print(on_stdout(talk.system), flush=True)
        elif name == "/reset":
            talk.history.clear()
            self.query = None
            say("all turns are forgotten")
        elif name == "/retry":
            self._retry()
        elif name == "/save" and argument:
            self.save(_at_home(argument.strip()))
        elif name == "/save":
            raise InputError("/save needs the name of a file")
        else:
            raise InputError(f"{shown(name)} is no command; /help lists them, and // begins a message with /")
        return True

    def save(self, path: Path) -> None:
        """Writes system message and turns to a file, as /save does."""
        save(path, self.conversation.system, self.conversation.history)
        turns = len(self.conversation.history)
        say(f"{path}: {turns} turn{'s' * (turns != 1)}")

    def _retry(self) -> None:
        history = self.conversation.history
        query = history[-1][0] if self.query is None and history else self.query
        if query is None:
            raise InputError("there is no query to repeat yet")
        if not history or history[-1][0] != query:  # it had no answer
            self.answer(query)
            return
        last, turns = history.pop(), len(history)
        try:
            self.answer(query, otherwise="the answer before stays")
        finally:
            if len(history) == turns:  # nothing came
                history.append(last)


class WatchedCache(PrefixCache):
    """A PrefixCache that tells the other ranks what to generate, and times the steps."""

    def __init__(self, model: Qwen, ranks: Ranks, clock: Clock, draft_tokens: int = 0) -> None:
        super().__init__(model, draft_tokens)
        self.ranks, self.clock = ranks, clock

    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int = 64, **settings: Any
    ) -> Generator[Step]:
        settings = {"max_new_tokens": max_new_tokens, **settings, "stop_ids": sorted(settings["stop_ids"])}
        request: dict[str, Any] = {"prompt_ids": list(prompt_ids), **settings}
        self.model.group.texts(json.dumps(request))
        progress = Progress("prompt", unit="tokens")
        steps = super().generate(**request, progress=progress.update)

        def watched() -> Generator[Step | None]:
            with progress, contextlib.closing(steps):
                yield None  # see begun
                yield from self.clock.watch(self.ranks.until_interrupted(steps))

        return begun(watched())


# A conversation in a file


def save(path: Path, system: str, history: Sequence[Turn]) -> None:
    """Writes a conversation as JSON, whole or not at all; ValueError if a file of another kind is there."""
    content = {"format": SAVED_AS, "system": system, "history": history}
    check_saving(path)
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def check_saving(path: Path, option: str = "") -> None:
    """ValueError where no chat can be saved: only a saved chat is overwritten. option: the path's option."""
    target = output_path(path, option)
    if target.exists():
        try:
            read_saved(target)
        except InputError:
            problem = f"{option} {path} is there already and is no saved chat; give another name"
            raise InputError(problem.strip()) from None


def _at_home(argument: str) -> Path:
    """The path as a shell reads it, with ~ as the home folder."""
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise InputError(f"{argument}: there is no such user; ./{argument} is a file of this name") from None


def read_saved(path: Path) -> tuple[str, list[Turn]]:
    """The system message and turns in a file that /save wrote; ValueError, with its name, for other files."""
    raw = read_json_object(path)
    remedy = "--history reads what /save wrote"
    if raw.get("format") != SAVED_AS:
        raise InputError(f'{path}: "format" is {shown(raw.get("format"))}, not "{SAVED_AS}"; {remedy}')
    try:
        check_texts("", raw.get("history"), raw.get("system"))
        for text in (raw["system"], *chain.from_iterable(raw["history"])):
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}: holds {error.object[error.start]!r}, which is no character; {remedy}"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}; {remedy}") from None
    return raw["system"], [(asked, answered) for asked, answered in raw["history"]]


# What is typed


def messages() -> Iterator[str]:
    """What is typed or piped in, message by message, to the end of stdin; Ctrl-C drops what is being typed.

    A message that is not UTF-8 raises ValueError. If it comes from a terminal, the error is printed.
    """
    typed = is_terminal(sys.stdin)
    line_of = _typed_line if typed and is_terminal(sys.stdout) else _piped_line
    if line_of is _typed_line:
        _edit_lines()
    while True:
        try:
            text = _message(line_of)
        except KeyboardInterrupt:
            to_stderr("")
            say("/quit or Ctrl-D ends the chat")
        except InputError as error:
            if not typed:
                raise
            say(f"error: {error}")
        else:
            if text is None:
                return
            if text.strip():
                yield text


def _message(line_of: Callable[[str], str | None]) -> str | None:
    text = line_of("> ")
    if text is None or not text.startswith('"""'):
        return text
    lines, size = [text.removeprefix('"""')], 0
    while not lines[-1].endswith('"""'):
        line = line_of("… ")
        if line is None:
            raise InputError('the end of the input came before the """ that ends a message')
        lines.append(line)
        size += len(line) + 1
        if size > LARGEST_TEXT:
            raise InputError(f'a message has more than {LARGEST_TEXT >> 20} MiB, and no """ that ends it')
    return "\n".join(lines).removesuffix('"""').strip("\n")


def _edit_lines() -> None:
    """Line editing and recall of earlier lines by readline, which Python does not have on Windows."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if importlib.util.find_spec("readline") is None:
        return
    if _coding() != "utf-8":
        # In any other locale readline takes the bytes of a Chinese character for editing commands.
        os.environ["LC_ALL"] = "C.UTF-8"
    import readline

    # The terminal marks pasted text, so that line ends in it do not send it. The default since readline 8.1.
    readline.parse_and_bind("set enable-bracketed-paste on")
    # Completion would put file names into a message.
    readline.parse_and_bind("set disable-completion on")
    for key in "*?=/":
        readline.parse_and_bind(f'"\\e{key}": ""')


def _coding() -> str:
    """The encoding of the environment's locale."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "")
        return codecs.lookup(locale.nl_langinfo(locale.CODESET)).name
    except (locale.Error, LookupError, AttributeError):  # it is not installed; Windows has no nl_langinfo
        return "unknown"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def _typed_line(prompt: str) -> str | None:
    try:
        line = input(prompt)
    except EOFError:
        print(flush=True)
        return None
    encoded = line.encode("utf-8", "surrogateescape")
    return decoded("a line", encoded).rstrip("\n")  # a paste may end with line ends


def _piped_line(prompt: str) -> str | None:
    if is_terminal(sys.stdin):  # stdout is a pipe or a file: it must not get the "> "
        to_stderr(prompt, end="")
    line = from_stdin(LARGEST_TEXT + 1, line=True)
    if len(line) > LARGEST_TEXT:
        raise InputError(f"a line has more than {LARGEST_TEXT >> 20} MiB, the most that is read of a text")
    text = decoded("a line", line.removesuffix(b"\n").removesuffix(b"\r"))
    return without_mark("a line", text) if line else None
