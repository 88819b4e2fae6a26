"""`python -m qwen_ref.chat`: piped, in a terminal, and what it saves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import GOLDEN, change_json, cli_of, refused
from forked_ranks import command, run_ranks

from qwen_ref.chat import terminal
from qwen_ref.chat.__main__ import main
from qwen_ref.commands.clock import Clock
from qwen_ref.config import InputError
from qwen_ref.tokenizer import Tokenizer

cli = cli_of(main)
QUESTION, ANSWER = "冰岛的首都是哪里？", "雷克雅未克（Reykjavik）"
COMMAND = [sys.executable, "-m", "qwen_ref.chat"]


def lines(*messages: str) -> bytes:
    return "".join(message + "\n" for message in messages).encode()


# Piped


def test_once_answers_and_ends(cli: Callable) -> None:
    result = cli("--once", QUESTION)
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert "greedy; at most 64 new tokens; stop at 2500, 2501, 2502" in result.err
    assert result.err.splitlines()[-1].startswith("qwen_ref: prefill 24 tokens")


@pytest.mark.parametrize("arguments", [["--once"], ["--once", "-"]])
def test_once_reads_a_pipe(cli: Callable, arguments: list[str]) -> None:
    assert cli(*arguments, stdin=lines(QUESTION))[:2] == (0, ANSWER + "\n")


def test_a_piped_conversation_is_answered_line_by_line(cli: Callable) -> None:
    result = cli(stdin=lines(QUESTION, "", "What is the capital of Norway?"))
    assert (result.code, result.out) == (0, f"{ANSWER}\nOslo.\n")
    assert "31 tokens of 49 known from before; prefill 18 tokens" in result.err


def test_a_byte_order_mark_before_a_piped_line_is_dropped(cli: Callable) -> None:
    marked = b"\xef\xbb\xbf" + lines(QUESTION, "/history")
    result = cli(stdin=marked.replace(b"\n", b"\r\n"))  # as Windows writes it
    assert (result.code, result.out) == (0, f"{ANSWER}\n> {QUESTION}\n{ANSWER}\n")
    assert "note: a line begins with a byte order mark (U+FEFF), which is dropped" in result.err
    assert "note: stdin begins with a byte order mark" in cli("--once", stdin=marked).err


def test_the_system_message_is_what_was_given(cli: Callable) -> None:
    assert (
        cli("--system", "请简短回答。", stdin=lines("/system", QUESTION)).out == f"请简短回答。\n{ANSWER}\n"
    )


def test_a_message_of_several_lines_stands_between_quotes(cli: Callable) -> None:
    result = cli(stdin=lines('"""3+4=?', "", 'x"""', '"""', "3+4=?", '"""', "/history"))
    assert [line for line in result.out.splitlines() if line.startswith(">")] == ["> 3+4=?", "> 3+4=?"]
    assert "> 3+4=?\n\nx\n" in result.out


def test_a_message_may_begin_with_a_slash(cli: Callable) -> None:
    result = cli(stdin=lines("//etc", "/history"))
    assert "> /etc\n" in result.out


def test_the_commands_do_what_help_says(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    script = ["/help", QUESTION, "/retry", "/history", "/system 你好", "/system", f"/save {file}", "/reset"]
    result = cli(stdin=lines(*script, "/history", "/retry", "/nonsense", "/save", "/reset all", "/quit", "x"))
    assert result.code == 2  # four lines were refused, and nobody at a terminal has seen it
    out = result.out.splitlines()
    help_text = [line for line in out if line.startswith("/")]
    for name in ("/reset", "/system", "/history", "/retry", "/save", "/help", "/quit"):
        assert any(line.startswith(name) for line in help_text)
    assert out[-5:] == [ANSWER, ANSWER, f"> {QUESTION}", ANSWER, "你好"]
    assert json.loads(file.read_text(encoding="utf-8"))["history"] == [[QUESTION, ANSWER]]
    for said in (
        "23 tokens of 24 known from before",
        f"{file}: 1 turn",
        "all turns are forgotten",
        "error: there is no query to repeat yet",
        "error: /reset takes no argument",
        "error: '/nonsense' is no command; /help lists them",
        "error: /save needs the name of a file",
    ):
        assert said in result.err


def test_dropped_turns_and_cut_answers_are_reported(cli: Callable, folder: Path) -> None:
    change_json(folder / "generation_config.json", max_window_size=0)
    line = refused(cli("--model", folder, stdin=lines(QUESTION)))
    assert "generation_config.json: max_window_size=0 must be from 1 to" in line
    change_json(folder / "generation_config.json", max_window_size=40)
    result = cli("--model", folder, "--max-new-tokens", "3", stdin=lines(*[QUESTION] * 3))
    assert result.err.count("the answer was cut at 3 tokens; --max-new-tokens allows more") == 3
    assert "note: the oldest turn is left out: the window holds 40 tokens" in result.err


def test_a_text_beyond_the_trained_length_is_said_to_be_worse(cli: Callable) -> None:
    result = cli("--once", "x " * 300, "--max-new-tokens", "1")
    assert "exceed the 512 that this model was trained on" in result.err


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(cli: Callable, monkeypatch: pytest.MonkeyPatch):
    watch, counts = Clock.watch, iter([0, 3])

    def interrupted(clock: Clock, steps: Iterator) -> Iterator:
        stop = next(counts, None)
        for n, step in enumerate(watch(clock, steps)):
            if n == stop:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(Clock, "watch", interrupted)
    result = cli(stdin=lines(QUESTION, QUESTION, "/history", "/retry", "/history"))
    assert result.code == 0
    assert "stopped; there is no answer yet; /retry asks again" in result.err
    assert "stopped; what there is of the answer is kept" in result.err
    started = result.out.splitlines()[1]
    assert ANSWER.startswith(started)
    assert 0 < len(started) < len(ANSWER)
    assert result.out == f"\n{started}\n> {QUESTION}\n{started}\n{ANSWER}\n> {QUESTION}\n{ANSWER}\n"


def test_ctrl_c_before_the_answer_ends_no_conversation(cli: Callable, monkeypatch: pytest.MonkeyPatch):
    encode, counts = Tokenizer.encode, iter([True, True])

    def interrupted(tokenizer: Tokenizer, text: str, *rest: object) -> list[int]:
        if "3+4" in text and next(counts, False):
            raise KeyboardInterrupt
        return encode(tokenizer, text, *rest)

    monkeypatch.setattr(Tokenizer, "encode", interrupted)
    result = cli(stdin=lines(QUESTION, "3+4=?", "/retry", "/retry", "/history"))
    assert result.code == 0
    assert result.err.count("stopped; there is no answer yet; /retry asks again") == 2
    assert result.out == f"{ANSWER}\n7\n> {QUESTION}\n{ANSWER}\n> 3+4=?\n7\n"


def test_ctrl_c_during_a_command_ends_no_conversation(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "save", interrupted)
    result = cli(stdin=lines(f"/save {tmp_path / 'saved.json'}", "3+4=?"))
    assert (result.code, result.out) == (0, "7\n")
    assert "stopped" in result.err


def test_a_retry_without_an_answer_leaves_the_old_one(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, counts = Clock.watch, iter([False, True])

    def interrupted(clock: Clock, steps: Iterator) -> Iterator:
        if next(counts):
            raise KeyboardInterrupt
        yield from watch(clock, steps)

    monkeypatch.setattr(Clock, "watch", interrupted)
    result = cli(stdin=lines("3+4=?", "/retry", "/history"))
    assert "stopped; the answer before stays" in result.err
    assert result.out == "7\n\n> 3+4=?\n7\n"


def test_output_that_fails_ends_it(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(COMMAND, input=lines("3+4=?", "3+4=?"), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.count(b"error: [Errno 28]") == 1


def test_ctrl_c_ends_once_with_130(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(clock: Clock, steps: Iterator) -> Iterator:
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "watch", interrupted)
    assert cli("--once", QUESTION).code == 130


def test_a_model_that_gives_nan_ends_no_conversation(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_ref import generate as steps

    monkeypatch.setattr(steps, "_draw", lambda *_: (_ for _ in ()).throw(InputError("3 NaN")))
    result = cli(stdin=lines(QUESTION, "/history"))
    assert (result.code, result.out) == (2, "\n")
    assert "error: 3 NaN" in result.err


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    script = lines(QUESTION, "/retry", "What is the capital of Norway?", "/quit")
    out, err = run_ranks(2, tmp_path, command, "qwen_ref.chat", stdin=script)
    assert out == f"{ANSWER}\n{ANSWER}\nOslo.\n"
    assert "23 tokens of 24 known from before" in err


# Lookup

COUNTING = "Count: " + ", ".join(["1", "2", "3", "4"] * 6)


@pytest.mark.parametrize(
    "form",
    [["--dtype", "float32"], ["--fast"], ["--quantize", "int8"], ["--fast", "--dtype", "float32"]],
    ids=str,
)
def test_lookup_gives_the_same_answers_in_fewer_passes(cli: Callable, form: list[str]) -> None:
    """From turn to turn, with the cache of the turns before, also those of which guesses were left."""
    script = lines(QUESTION, COUNTING, QUESTION, "/retry", COUNTING, "/reset", COUNTING, QUESTION)
    plain, found = cli(*form, stdin=script), cli(*form, "--lookup", stdin=script)
    assert (found.code, found.out) == (0, plain.out)
    assert " known from before; " in found.err
    assert found.err.count(" tokens per pass\n") == 7
    assert "tokens per pass" not in plain.err
    made = [line.split("; lookup: ")[1].split() for line in found.err.splitlines() if "; lookup: " in line]
    assert sum(int(passes) for _, _, _, passes, *_ in made) < sum(int(tokens) for tokens, *_ in made)
    assert cli(*form, "--lookup", "3", stdin=script).out == plain.out


def test_lookup_on_two_ranks(cli: Callable, tmp_path: Path) -> None:
    script = lines(QUESTION, COUNTING, "/retry", "What is the capital of Norway?")
    form = ("--dtype", "float32", "--lookup")
    out, err = run_ranks(2, tmp_path, command, "qwen_ref.chat", *form, stdin=script)
    assert out == cli(*form[:2], stdin=script).out
    assert err.count("; lookup: ") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast", "--temperature", "0.7"], "--lookup is greedy only, without temperature=0.7; add"),
        ([], "lookup in plain bfloat16 would take more passes than it saves"),
        (["--fast", "--kv-cache", "int8"], "lookup does not go with an int8 cache"),
        (["--fast", "--lookup", "0"], "draft_tokens=0 must be at least 1"),
    ],
)
def test_lookup_is_refused_as_in_generate(cli: Callable, arguments: list[str], message: str) -> None:
    assert message in refused(cli("--once", "x", "--lookup", *arguments))


# Bad input


@pytest.mark.parametrize(
    ("content", "lack"),
    [
        (None, "FOLDER has no generation_config.json, which would say that it is a chat model"),
        ({}, "FOLDER/generation_config.json has no chat_format, which is 'chatml' in a chat release"),
        ({"chat_format": None}, "FOLDER/generation_config.json has no chat_format"),
        ({"chat_format": "raw"}, "FOLDER/generation_config.json: chat_format is 'raw': a base model"),
        ({"chat_format": "chatglm"}, "chat_format is 'chatglm', and this command knows 'chatml' only"),
    ],
)
def test_what_is_no_chat_model_by_its_folder_is_refused_with_the_remedy(
    cli: Callable, content: dict | None, lack: str, folder: Path
) -> None:
    """And answers if the user says that it is one: a merged fine-tune keeps the file of its base."""
    file = folder / "generation_config.json"
    file.unlink()
    if content is not None:
        file.write_text(json.dumps(content))
    line = refused(cli("--model", folder, "--once", QUESTION))
    assert lack.replace("FOLDER", str(folder)) in line
    assert "; use a -Chat release, or python -m qwen_ref.generate; " in line
    assert line.endswith("if the model was trained on ChatML, add --chat-format chatml")
    result = cli("--model", folder, "--once", QUESTION, "--chat-format", "chatml")
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert "stop at 2500, 2501, 2502" in result.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (
            ["--once"],
            "caf\u00e9".encode()[:-1],
            "stdin is not UTF-8 (byte 0xc3 at offset 3); it ends within a character: send all of it",
        ),
        (["--once"], b"caf\xe9 noir", "stdin is not UTF-8 (byte 0xe9 at offset 3); convert it first"),
        (["--once"], b"\n", "the query is empty; give it behind --once or on stdin"),
        (["--once", "x", "--history", "/nowhere"], b"", "/nowhere: cannot be read"),
        (["--once", "x", "--temperature", "-1"], b"", "temperature=-1.0 must be 0"),
        (["--model", GOLDEN / "nowhere", "--once", "x"], b"", "nowhere: not a folder"),
    ],
)
def test_bad_input_is_one_line_and_code_2(cli: Callable, arguments: list, stdin: bytes, message: str) -> None:
    assert message in refused(cli(*arguments, stdin=stdin))


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("冰".encode()[:2], "error: a line is not UTF-8 (byte 0xe5 at offset 0); it ends within a character"),
        ("\ufeff冰岛\n".encode("utf-16-le"), "error: a line is UTF-16 (it begins with the bytes ff fe)"),
        (b'"""\nabc\n', 'error: the end of the input came before the """ that ends a message'),
    ],
)
def test_a_piped_conversation_that_is_cut_short_is_refused(cli: Callable, stdin: bytes, message: str) -> None:
    result = cli(stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


# What /save writes


def test_a_saved_chat_goes_on_where_it_was(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    cli("--system", "You know geography.", stdin=lines(QUESTION, f"/save {file}"))
    result = cli("--history", file, stdin=lines("/system", "/history", "3+4=?", f"/save {file}"))
    assert result.out == f"You know geography.\n> {QUESTION}\n{ANSWER}\n7\n"
    assert cli("--history", file, "--system", "", stdin=lines("/system", "/history")).out.endswith(
        "> 3+4=?\n7\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{}", '"format" is None, not "qwen_ref.chat"; --history reads what /save wrote'),
        (
            '{"format": "qwen_ref.chat", "system": "", "history": [["x"]]}',
            "history[0] must be a pair of texts",
        ),
        ('{"format": "qwen_ref.chat", "system": "", "history": null}', "history must be a list of pairs"),
        ('{"format": "qwen_ref.chat", "history": []}', "system must be text, not None"),
        ('{"format": "qwen_ref.chat", "system": "\\ud800", "history": []}', "holds '\\ud800', which is no"),
    ],
)
def test_a_history_file_that_save_did_not_write_is_refused(
    cli: Callable, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(content)
    line = refused(cli("--history", tmp_path / "file", "--once", "x"))
    assert f"{tmp_path / 'file'}: " in line
    assert message in line


def test_a_history_is_a_regular_file(cli: Callable, special: tuple[Path, str]) -> None:
    path, kind = special
    line = refused(cli("--once", "x", "--history", path))
    assert f"{path}: cannot be read: it is {kind}, not a file" in line


@pytest.mark.parametrize("depth", range(300, 1000, 50))
def test_what_a_history_holds_beside_may_be_nested_deeply(depth: int, tmp_path: Path) -> None:
    saved = '{"format": "qwen_ref.chat", "system": "s", "history": [["a", "b"]], "more": MORE}'
    (tmp_path / "chat.json").write_text(saved.replace("MORE", "[" * depth + "]" * depth))
    with contextlib.suppress(InputError):  # where Python's own limit is
        assert terminal.read_saved(tmp_path / "chat.json") == ("s", [("a", "b")])


def test_an_endless_message_is_not_read_into_memory(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LARGEST_TEXT", 2**20)
    for endless in (bytes(2**20 + 1), b'"""\n' + b"\n" * (2**20 + 2)):
        result = cli(stdin=endless)
        assert (result.code, result.out) == (2, "")
        assert "has more than 1 MiB" in result.err.splitlines()[-1]


def test_save_overwrites_nothing_but_a_saved_chat(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    result = cli(stdin=lines(f"/save {file}", f"/save {tmp_path}", f"/save {tmp_path / 'no' / 'where'}"))
    assert f"error: {file} is there already and is no saved chat; give another name" in result.err
    assert f"error: {tmp_path}: cannot be written: it is a folder" in result.err
    assert "where: cannot be written: there is no folder" in result.err
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    os.mkfifo(tmp_path / "pipe")  # which would never end if it were read
    assert "it is a FIFO; give the name" in cli(stdin=lines(f"/save {tmp_path / 'pipe'}")).err
    assert "cannot be written" in cli(stdin=lines(f"/save {tmp_path / ('x' * 300)}")).err


def test_saving_again_keeps_a_link_and_who_may_read(cli: Callable, tmp_path: Path) -> None:
    file, link = tmp_path / "saved.json", tmp_path / "link"
    cli(stdin=lines(f"/save {file} "))
    file.chmod(0o600)
    link.symlink_to(file)
    assert "1 turn" in cli(stdin=lines("3+4=?", f"/save {link}")).err
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cli("--history", file, stdin=lines("/history")).out == "> 3+4=?\n7\n"


def test_save_writes_the_chat_at_its_end(cli: Callable, tmp_path: Path) -> None:
    """With the turns of --history, which may be the same file."""
    file = tmp_path / "saved.json"
    result = cli("--once", QUESTION, "--save", file, "--system", "You know geography.")
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert result.err.splitlines()[-1] == f"qwen_ref: {file}: 1 turn"
    cli("--history", file, "--save", file, stdin=lines("3+4=?", "/quit", "x"))
    other = tmp_path / "other.json"
    cli("--history", file, "--save", other, stdin=lines("/reset", "3+4=?"))
    saved = {"format": "qwen_ref.chat", "system": "You know geography."}
    assert json.loads(file.read_text("utf-8")) == {**saved, "history": [[QUESTION, ANSWER], ["3+4=?", "7"]]}
    assert json.loads(other.read_text("utf-8")) == {**saved, "history": [["3+4=?", "7"]]}


def test_what_there_is_of_a_chat_is_saved_however_it_ends(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "saved.json"
    result = cli("--save", file, stdin=lines("3+4=?") + b"caf\xe9\n")
    assert result.code == 2
    assert json.loads(file.read_text("utf-8"))["history"] == [["3+4=?", "7"]]

    def interrupted(clock: Clock, steps: Iterator) -> Iterator:
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "watch", interrupted)
    assert cli("--once", QUESTION, "--save", file).code == 130
    ((_, answer),) = json.loads(file.read_text("utf-8"))["history"]
    assert ANSWER.startswith(answer)
    file.unlink()
    monkeypatch.setattr(Clock, "watch", lambda *_: (_ for _ in ()).throw(InputError("3 NaN")))
    assert cli("--once", QUESTION, "--save", file).code == 2
    assert not file.exists()  # nothing was said


@pytest.mark.parametrize("name", ["notes.txt", "folder", "no/where", "generation_config.json"])
def test_where_a_chat_cannot_be_saved_is_said_before_it_begins(
    cli: Callable, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "folder").mkdir()
    monkeypatch.setattr("qwen_ref.chat.__main__.load", None)
    before = {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    path = folder / name
    line = refused(cli("--model", folder, "--once", "x", "--save", path))
    if path.is_file():
        assert f"--save {path} is there already and is no saved chat; give another name" in line
    else:
        assert f"--save {path}: cannot be written: " in line
    assert {path: path.is_file() and path.read_bytes() for path in folder.iterdir()} == before


def test_paths_in_the_home_folder(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cli("--save=~/a.json", stdin=lines("3+4=?", "/save ~/b.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert cli("--history=~/a.json", stdin=lines("/history")).out == "> 3+4=?\n7\n"


# In a terminal


# The terminal becomes that of the command, for which Ctrl-C is a signal.
TAKE = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """The command with a terminal for stdin, stdout and stderr."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text: str) -> str:
        """What is shown up to a text, which must come; what comes behind it is for the next call."""
        end = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            self.shown += os.read(self.terminal, 65536).decode("utf-8", "replace")
        found, _, self.shown = self.shown.partition(text)
        return found

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def answer(self, keys: str) -> None:
        self.until("> ")
        self.type(keys)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.terminal)


SLOW = """
import sys, time
from qwen_ref.chat.__main__ import main
from qwen_ref.commands.clock import Clock

watch = Clock.watch

def slow(clock, steps):
    for step in watch(clock, steps):
        yield step
        time.sleep(0.3)

Clock.watch = slow
sys.exit(main())
"""


def test_a_chat_in_a_terminal() -> None:
    terminal = Terminal([sys.executable, "-c", SLOW])
    terminal.until("/help lists the commands")
    terminal.answer(QUESTION + "\n")
    terminal.until("雷克")
    terminal.type("\x03")  # Ctrl-C
    terminal.until("stopped; what there is of the answer is kept")
    terminal.answer("half a line")
    terminal.until("half a line")
    time.sleep(0.5)  # Python's readline hears a signal only while it waits for a key
    terminal.type("\x03")
    terminal.until("/quit or Ctrl-D ends the chat")
    terminal.until("> ")
    terminal.type("\x1b[200~3+4=?\n\n/quit\x1b[201~")  # a paste: its line ends do not send it
    terminal.until("/quit")
    terminal.type("\n")
    terminal.until("prefill")
    terminal.answer("/history\n")
    history = terminal.until("> ") + terminal.until("> ") + terminal.until("> ")
    assert f"{QUESTION}\r\n雷克" in history
    assert ANSWER not in history
    assert "3+4=?\r\n\r\n/quit\r\n" in history
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x7f\x7f\n")  # recalled, and two characters taken back
    terminal.until("prefill")
    terminal.answer("/save /dev/null\n")
    terminal.until("it is a device")
    terminal.until("> ")  # while nobody reads, the terminal itself takes Ctrl-D
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end() == 0


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_locale_without_chinese_can_be_typed_in(locale: str, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(
        json.dumps({"format": "qwen_ref.chat", "system": "", "history": [["\x1b[2J", "\x1b]0;x\x07"]]})
    )
    command = [*COMMAND, "--history", str(tmp_path / "saved.json"), "--system", ""]
    terminal = Terminal(command, LC_ALL=locale)
    terminal.answer("冰岛错了\x7f\x7f的首都是哪里？\x1b*\t\n")
    terminal.until("prefill")
    terminal.answer("/history\n")
    terminal.until("\n")
    # What is saved is shown, not obeyed; two characters were taken back, and no names of files came in.
    shown = terminal.until(ANSWER).replace("\r", "").removeprefix("\x1b[?2004l")  # that ends a paste
    assert shown == f"> \\x1b[2J\n\\x1b]0;x\\x07\n> {QUESTION}\t\n"
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_the_prompt_does_not_get_into_a_file(tmp_path: Path) -> None:
    command = " ".join([*COMMAND, ">", str(tmp_path / "out")])
    terminal = Terminal(["/bin/sh", "-c", command])
    terminal.answer(QUESTION + "\n")
    terminal.until("prefill")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == ANSWER + "\n"
