"""What every command does alike: exit codes, the streams of its caller, the files that it writes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import locale
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, WEIGHTS, Run, refused
from conftest import command as main_of

from qwen_ref import checkpoint, parity
from qwen_ref.bench import __main__ as bench
from qwen_ref.bench import measure
from qwen_ref.chat import Conversation, build_context, reply, terminal
from qwen_ref.commands import cli, figures, generate
from qwen_ref.commands.cli import FAULT_LINE, Parser, out_of_memory, run
from qwen_ref.commands.files import new_file, output_path, write_whole
from qwen_ref.config import InputError
from qwen_ref.decoding import TextStream
from qwen_ref.generate import Step
from qwen_ref.parallel import RankLost
from qwen_ref.parity import recording
from qwen_ref.parity.__main__ import main as parity_main
from qwen_ref.perplexity import score
from qwen_ref.tokenizer import Tokenizer
from qwen_ref.trace import trace

PROMPT, ANSWER = "冰岛的首都是", "雷克雅未克"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a bundle for the commands that read them."""
    made = tmp_path_factory.mktemp("inputs")
    (made / "text.txt").write_text("冰岛的首都是雷克雅未克（Reykjavik）\n" * 8, encoding="utf-8")
    parity.record(WEIGHTS, torch.tensor([[1, 2, 3]]), made / "bundle", dtype="float32", stages="logits")
    return made


COMMANDS = {
    "generate": ["generate", PROMPT],
    "generate --logprobs": ["generate", PROMPT, "--logprobs"],
    "generate --json": ["generate", PROMPT, "--json"],
    "chat": ["chat", "--once", "3+4=?"],
    "trace": ["trace", "hi", "--lens"],
    "trace --json": ["trace", "hi", "--json"],
    "perplexity": ["perplexity", "--text", "text.txt", "--lengths", "8", "--windows", "2"],
    "bench": ["bench", "--lengths", "4", "--tokens", "1", "--repeats", "1"],
    "checkpoint": ["checkpoint", "inspect", "7b"],
    "parity check": ["parity", "check", "--golden", "bundle", "--dtype", "float32"],
    "parity diff": ["parity", "diff", "bundle", "bundle"],
    "generate --help": ["generate", "--help"],
}


@pytest.fixture(params=COMMANDS, ids=str)
def command(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """Each command, in this process; its code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**16)
    name, *arguments = COMMANDS[request.param]

    def call() -> int:
        try:
            return main_of(name)(arguments)
        except SystemExit as end:  # --help's
            return end.code

    return call


class Plain:
    """Such a stream as a notebook may have: it takes text, and knows no more."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_stream_that_only_takes_text_is_enough(command: Callable[[], int], monkeypatch: pytest.MonkeyPatch):
    out, err = Plain(), Plain()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert command() == 0, err.text
    assert out.text
    assert (sys.stdout, sys.stderr) == (out, err)


def test_redirected_output_is_all_there(command: Callable[[], int]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert command() == 0, err.getvalue()
        assert sys.stdout is out
    assert out.getvalue().endswith("\n")


class Full(io.RawIOBase):
    """A disk that is full, or a pipe that nobody reads."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 141),
    ],
    ids=["full", "closed", "reset"],
)
def test_a_stdout_that_takes_nothing(
    command: Callable[[], int],
    error: OSError,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    raw = Full(error)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii"))
    found, err = command(), capsys.readouterr().err
    assert found == code
    assert "Traceback" not in err
    assert ("No space left" in err) == (code == 2)
    raw.error = None  # what it holds still is of no use to anyone
    raw.write = len


def test_a_full_stderr_costs_no_result(
    command: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raw = Full(OSError(errno.ENOSPC, "full"))
    err = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)
    monkeypatch.setattr(sys, "stderr", err)
    assert command() == 0
    assert sys.stderr is err
    assert capsys.readouterr().out
    raw.write = len


@pytest.mark.parametrize("end", ["", "fails"])
def test_codings_are_as_they_were(end: str, monkeypatch: pytest.MonkeyPatch, run_command: Run) -> None:
    """Also where a stream was closed before the start."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    assert generate.main([PROMPT, *(["--temperature", "-7"] if end else [])]) == (2 if end else 0)
    assert (out.encoding, out.errors, sys.stderr) == ("latin-1", "strict", None)
    assert out.buffer.getvalue().decode().startswith("" if end else f"{ANSWER}（Reykjavik）\n")


def test_stdin_may_be_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert generate.main([]) == 0
    assert capsys.readouterr().out.startswith(ANSWER)
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4=?\r\n/history\n"))
    assert main_of("chat")([]) == 0
    assert capsys.readouterr().out == "7\n> 3+4=?\n7\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ud800"))
    assert generate.main([]) == 2
    assert "stdin is not UTF-8 (byte 0xed at offset 0)" in capsys.readouterr().err


PRINTS = """
import sys
from qwen_ref.commands.cli import Parser, run, say
def command(_):
    say("hi")
    print("x" * int(sys.argv[1]))
    return 0
sys.exit(run(Parser(), command, sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("shell", "code"),
    [(">/dev/full", 2), ("2>/dev/full", 0), (">&-", 0), ("2>&-", 0), ("--help >/dev/full", 2)],
)
@pytest.mark.parametrize("length", ["1", "100000"])
def test_a_process_ends_with_the_same_codes(shell: str, code: int, length: str) -> None:
    """Python flushes once more when it ends, with an exit code of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, "-c", PRINTS, length]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert "Exception" not in done.stderr
    assert ("No space left" in done.stderr) == (code == 2)


# Errors


def ends(error: BaseException, **options: int) -> int:
    def fail(_: object) -> int:
        raise error

    return run(Parser(), fail, [], **options)


def test_a_fault_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture) -> None:
    def faulty(_: object) -> int:
        return len(list(zip([1], [], strict=True)))

    assert run(Parser(), faulty, []) == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in faulty" in err
    assert err.endswith(f"shorter than argument 1\nqwen_ref: {FAULT_LINE}\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "x"),
        TypeError("x"),
        RuntimeError("CUDA error: device-side assert triggered"),
        io.UnsupportedOperation("fileno"),
        RecursionError(),
    ],
)
def test_what_is_no_mistake_of_the_user_is_a_fault(error: Exception, capsys: pytest.CaptureFixture) -> None:
    assert ends(error) == 70
    assert FAULT_LINE in capsys.readouterr().err


def test_a_fault_does_not_command_the_terminal(capsys: pytest.CaptureFixture) -> None:
    assert ends(ValueError("\x1b[2J")) == 70
    assert "\\x1b[2J" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (OSError(errno.EIO, "Input/output error"), 2),
        (RankLost("rank 1 is gone"), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (MemoryError(), 2),
    ],
)
def test_an_error_is_one_line_at_most(error: BaseException, code: int, capsys: pytest.CaptureFixture) -> None:
    assert ends(error) == code
    assert len(capsys.readouterr().err.splitlines()) == (code != 141)


CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which …"


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError(CPU), "8,000,000,000 bytes (8.000 GB)"),
        (RuntimeError("x DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."), "5 bytes"),
        (torch.OutOfMemoryError(CUDA), "21,474,836,480 bytes (21.475 GB)"),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 3 MB on"),
            "3,145,728",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "more memory was asked for"),
        (RuntimeError("unable to mmap 7 bytes from file </x>: Cannot allocate memory (12)"), "7 bytes"),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), "more memory"),
        (MemoryError("Unable to allocate 7.00 KiB for an array with shape (1,)"), "7,168 bytes"),
        (MemoryError(), "more memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "more memory"),
        (RuntimeError("std::bad_alloc"), "more memory"),
        (RuntimeError("can't start new thread"), "a limit on processes"),
    ],
)
def test_lack_of_memory_says_what_was_asked_for(error: Exception, asked: str) -> None:
    assert asked in out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("empty(): argument 'size' must be tuple of ints, but found element of type float at pos 2"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("unable to mmap 7 bytes from file </x>: Permission denied (13)"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("unable to open file </DefaultCPUAllocator> in read-only mode"),
        OSError(errno.ENOSPC, "No space left on device"),
        InputError(CPU),
    ],
)
def test_nothing_else_is_lack_of_memory(error: Exception) -> None:
    assert out_of_memory(error) is None


@pytest.mark.parametrize("where", ["qwen_ref.checkpoint.load_model", "qwen_ref.generate.generate"])
def test_lack_of_memory_in_generate(where: str, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(CPU)

    monkeypatch.setattr(where, fail)
    done = run_command(generate.main, PROMPT)
    assert (done.code, done.out) == (2, "")
    assert "error: too little memory: 8,000,000,000 bytes" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError(CUDA), 2),
        (RankLost("gone"), 2),
        (BrokenPipeError(), 141),
        (KeyboardInterrupt(), 130),
        (ValueError("ours"), 70),
    ],
)
def test_in_parity_1_is_beyond_tolerance_and_nothing_else(
    error: BaseException, code: int, folder: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qwen_ref.parity.recording.check", fail)
    assert run_command(parity_main, "check", "--golden", folder / "bundle").code == code


# What a command writes


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """A folder with what is no file."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "stdout").symlink_to("/dev/stdout")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        yield tmp_path


NO_FILES = {
    "folder": "it is a folder",
    "fifo": "it is a FIFO; give the name of a regular file",
    "link": "it is a FIFO",
    "loop": "symbolic links",
    "socket": "it is a socket",
    "/dev/null": "it is a device",
    "/dev/new": "it is one of the system's files",
    "/proc/self/new": "it is one of the system's files",
    "none/file": "there is no folder",
    "x" * 256: "File name too long",
    "nul\0": "null byte",
    ".": "it is a folder",
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_not_replaced(name: str, places: Path) -> None:
    before = {path.name: path.lstat().st_mode for path in places.iterdir()}
    for write in (lambda: output_path(places / name, "--plot"), lambda: write_whole(places / name, "")):
        with pytest.raises(InputError, match="cannot be written: ") as refused:
            write()
        assert NO_FILES[name] in str(refused.value)
    assert {path.name: path.lstat().st_mode for path in places.iterdir()} == before


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "stdout", "out"])
def test_stdout_is_no_file_to_replace_even_where_it_is_one(name: str, places: Path) -> None:
    code = "import sys; from qwen_ref.commands.files import write_whole; write_whole(sys.argv[1], 'replaced')"
    with (places / "out").open("w") as out:
        command = [sys.executable, "-c", code, str(places / name)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
        assert os.path.samestat(os.fstat(out.fileno()), (places / "out").stat())
    assert "InputError" in done.stderr
    assert (places / "stdout").is_symlink()


def example(name: str) -> Callable[[list[str]], int]:
    def main(arguments: list[str]) -> int:
        module = importlib.import_module(name)
        return run(module.parser(), module.command, arguments)

    return main


OUTPUTS = {
    "perplexity --plot": ("qwen_ref.perplexity.__main__", ["--text", "text.txt", "--lengths", "8", "--plot"]),
    "perplexity --state": (
        "qwen_ref.perplexity.__main__",
        ["--text", "text.txt", "--lengths", "8", "--state"],
    ),
    "evaluate --output": ("qwen_ref.evaluate.__main__", ["--tasks", "arc_easy", "--output"]),
    "parity record": ("qwen_ref.parity.__main__", ["record", "--prompt", "hi", "--out"]),
    "parity check": ("qwen_ref.parity.__main__", ["check", "--golden", "bundle", "--plot"]),
    "parity diff": ("qwen_ref.parity.__main__", ["diff", "bundle", "bundle", "--plot"]),
    "needle": ("needle", ["--plot"]),
    "tokenizer_compression": ("tokenizer_compression", ["--plot"]),
    "render_walkthrough": ("render_walkthrough", ["--out"]),
    "train_tokenizer": ("train_tokenizer", ["--output"]),
}


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/null", "x" * 256])
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_is_refused_before_any_work(
    output: str, kind: str, places: Path, folder: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("learn", "make", "measure"):
        monkeypatch.syspath_prepend(ROOT / "examples" / room)
    monkeypatch.chdir(folder)
    name, arguments = OUTPUTS[output]
    module = importlib.import_module(name)
    main = getattr(module, "main", None) or example(name)
    works = {"from_file", "load_model", "open_checkpoint", "train", "check", "diff", "record"}
    for place in (Tokenizer, module, checkpoint, recording):
        for work in works & set(vars(place)):
            monkeypatch.setattr(place, work, lambda *_, **__: pytest.fail("it works already"))
    done = run_command(main, *arguments, places / kind)
    assert done.code == 2, done.err
    assert "cannot be written: " in done.err
    assert len(done.err.splitlines()) == 1
    assert not (places / "fifo").is_file()


@pytest.mark.parametrize("script", ["train_tiny", "train_needle"])
def test_a_checkpoint_is_refused_before_the_training(
    script: str, tmp_path: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "make")
    monkeypatch.setattr(importlib.import_module(script), "train", lambda *_: pytest.fail("it trains already"))
    os.mkfifo(tmp_path / "model.safetensors")
    done = run_command(example(script), "--output", tmp_path)
    assert done.code == 2
    assert "model.safetensors: cannot be written: it is a FIFO" in done.err


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)

    def half() -> None:
        with new_file(link) as file:
            file.write(b"aft")
            assert Path(file.name).stat().st_mode & 0o777 == 0o640  # no one else reads it meanwhile
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="link: cannot be written: No space left on device"):
        half()
    assert target.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    write_whole(link, "after\n\ud800")
    assert target.read_bytes() == b"after\n\\ud800"
    assert (link.is_symlink(), target.stat().st_mode & 0o777) == (True, 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize(
    "error",
    [RankLost("gone"), OSError(errno.ENOENT, "No such file", "other"), OSError(errno.ENOMEM, "no memory")],
)
def test_an_error_of_something_else_is_not_one_of_writing(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, new_file(tmp_path / "x"):
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_has_the_mode_of_new_files_and_a_long_name(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / ("x" * 250), "new")
    finally:
        os.umask(before)
    assert (tmp_path / ("x" * 250)).stat().st_mode & 0o777 == 0o640


def test_a_temporary_name_is_no_link_that_waits_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = iter(["aa", "bb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(names))
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".qwen_ref-aa.part").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="File exists"):
        write_whole(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_windows_holds_open_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", denied)
    (tmp_path / "x").write_text("before")
    with pytest.raises(
        InputError, match="x: cannot be replaced: Access is denied; where another program has"
    ):
        write_whole(tmp_path / "x", "after")
    assert os.listdir(tmp_path) == ["x"]


def test_a_state_with_windows_line_ends_goes_on(folder: Path, tmp_path: Path, run_command: Run) -> None:
    state = tmp_path / "state"
    arguments = [
        "--text",
        folder / "text.txt",
        "--lengths",
        "8",
        "--windows",
        "3",
        "--json",
        "--state",
        state,
    ]
    first = run_command(main_of("perplexity"), *arguments)
    assert b"\r" not in state.read_bytes()
    state.write_bytes(state.read_bytes().replace(b"\n", b"\r\n") + b'{"len')
    whole = state.read_bytes().removesuffix(b'{"len')
    assert run_command(main_of("perplexity"), *arguments).out == first.out
    assert state.read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"length": 8, "window": [0, 0, 8, 1], "losses": [1' + "0" * 400]
)
def test_a_state_of_another_kind_is_refused(line: str, folder: Path, tmp_path: Path, run_command: Run):
    arguments = ["--text", folder / "text.txt", "--lengths", "8", "--windows", "1", "--state", tmp_path / "s"]
    assert run_command(main_of("perplexity"), *arguments).code == 0
    with (tmp_path / "s").open("a") as state:
        state.write(line + (',0,0,0], "tokens": [7,0,0,0]}' if line.startswith("{") else "") + "\n")
    done = run_command(main_of("perplexity"), *arguments)
    assert done.code == 2
    assert "is no file of this command's --state" in done.err


def test_a_name_that_is_no_text_can_be_drawn(tmp_path: Path) -> None:
    figure, axes = figures.pyplot().subplots()
    axes.set_title(os.fsdecode(b"odd\xff\x1b"), parse_math=False)
    figures.save(figure, tmp_path / "x.png")
    assert axes.get_title() == "odd\\udcff\\x1b"


def test_a_backend_that_matplotlib_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> None:
            raise ValueError("Key backend: 'none' is not a valid value")

    import matplotlib

    monkeypatch.setattr(matplotlib, "use", Wrong().__getattr__)
    with pytest.raises(InputError, match="which does not start: Key backend"):
        figures.pyplot()


# What a terminal shows


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def spelling(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the model say a text, a token for each of its bytes."""

    def say(text: str) -> None:
        steps = [Step(byte, -1.0) for byte in text.encode()]
        monkeypatch.setattr("qwen_ref.generate.generate", lambda *_, **__: (step for step in steps))
        # Single bytes come first in the tiny vocabulary, in their order.

    return say


ESCAPES = "a\x1b[31mb\x9b2J\u202e\n\tc"


@pytest.mark.parametrize("option", [None, "--logprobs", "--json"])
def test_a_model_does_not_command_the_terminal(
    option: str | None, spelling: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spelling(ESCAPES)
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert generate.main(["x", *([option] if option else [])]) == 0
    shown = screen.getvalue()
    assert all(c.isprintable() or c in "\n\t" for c in shown)
    if option is None:
        assert shown == "a\\x1b[31mb\\x9b2J\\u202e\n\tc\n"


def test_a_pipe_gets_the_text_as_it_is(spelling: Callable[[str], None], run_command: Run) -> None:
    spelling(ESCAPES)
    assert run_command(generate.main, "x").out == ESCAPES + "\n"


def test_names_do_not_command_the_terminal(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = tmp_path / "\x1b[2J\x9b"
    odd.mkdir()
    for name in ("bundle", "text.txt"):
        shutil.copy(folder / name, odd / name)
    (odd / "m").symlink_to(WEIGHTS)
    monkeypatch.setattr(measure, "_READ_BYTES", 2**16)
    quick = ["--lengths", "8", "--model", str(odd / "m")]
    for main, arguments in (
        (parity_main, ["diff", str(odd / "bundle"), str(odd / "bundle")]),
        (parity_main, ["diff", str(odd / "bundle"), str(odd / "bundle"), "--json"]),
        (main_of("perplexity"), [*quick, "--text", str(odd / "text.txt"), "--windows", "1", "--json"]),
        (bench.main, [*quick, "--tokens", "1", "--repeats", "1"]),
        (main_of("trace"), ["\x9b", "--model", str(odd / "m"), "--json"]),
    ):
        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        assert main(arguments) == 0
        assert screen.getvalue()
        assert not {"\x1b", "\x9b"} & set(screen.getvalue())


# Other systems


def test_memory_that_cannot_be_measured_is_unknown(monkeypatch: pytest.MonkeyPatch, run_command: Run) -> None:
    monkeypatch.setattr(measure, "_READ_BYTES", 2**16)
    monkeypatch.setattr(measure, "resident_memory", lambda: None)
    options = ["--lengths", "4", "--tokens", "1", "--repeats", "1"]
    out = run_command(bench.main, *options).out
    assert "peak memory while loading: unknown anonymous and unknown mapped" in out
    found = json.loads(run_command(bench.main, *options, "--json").out)
    assert found["peak_memory"]["while running"] == {"anonymous": None, "mapped": None}


@pytest.mark.parametrize("content", [None, "Name: x\n", "RssAnon: many kB\nRssFile: 1 kB\n"])
def test_a_system_without_linuxs_figures_has_none(content: str | None, monkeypatch: pytest.MonkeyPatch):
    def read(*_: object, **__: object) -> str:
        if content is None:
            raise FileNotFoundError
        return content

    monkeypatch.setattr(Path, "read_text", read)
    assert measure.resident_memory() is None


def test_a_fault_in_a_rank_of_bench_keeps_its_traceback() -> None:
    noise = ["W1128 torch/distributed/run.py\n", "Traceback (most recent call last):\n", "  torchrun's own\n"]
    fault = ["Traceback (most recent call last):\n", "ValueError: x\n", f"qwen_ref: {FAULT_LINE}\n"]
    lines = ["qwen_ref: loading\n", *noise, *fault, *noise]
    assert list(bench._of_ranks(lines)) == [lines[0], *fault]


def test_a_system_without_readline_or_langinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    monkeypatch.delattr(locale, "nl_langinfo")
    assert terminal._coding() == "unknown"
    assert locale.setlocale(locale.LC_CTYPE) == before
    monkeypatch.setenv("LC_ALL", "as it was")
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    terminal._edit_lines()
    assert os.environ["LC_ALL"] == "as it was"


def test_a_user_that_is_not_there_is_named(run_command: Run) -> None:
    done = run_command(main_of("chat"), stdin=b"/save ~nosuchuser/x\n")
    assert done.code == 2
    assert "error: ~nosuchuser/x: there is no such user" in done.err


def test_an_argument_that_the_locale_does_not_know_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert cli.utf8("冰岛") == "冰岛"


def test_a_fault_in_a_chat_is_one(monkeypatch: pytest.MonkeyPatch, run_command: Run) -> None:
    def faulty(*_: object) -> None:
        raise ValueError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(Conversation, "ask", faulty)
    done = run_command(main_of("chat"), stdin=b"hi\nhi\n")
    assert done.code == 70
    assert done.err.count("Traceback") == 1


# Lists that are none


@pytest.mark.parametrize("stops", ["User:", 7, [7], [b"x"], [None], [""]])
def test_stop_texts_are_a_list_of_texts(stops: object, own: Tokenizer) -> None:
    message = "stop_texts must be a list of texts" if stops != [""] else "a stop text is empty"
    with pytest.raises(InputError, match=message):
        TextStream((), own, stop_texts=stops)
    with pytest.raises(InputError, match=message):
        Conversation(None, own, stop_texts=stops)
    with pytest.raises(InputError, match=message):
        reply(None, own, "hi", stop_texts=stops)


@pytest.mark.parametrize("stops", ["12", 7, ["1"], b"\x01", [None], 1.5])
def test_stop_ids_are_a_list_of_ids(stops: object, own: Tokenizer) -> None:
    with pytest.raises(InputError, match="stop_ids must be a list of token ids"):
        TextStream((), own, stops)
    with pytest.raises(InputError, match="stop_ids must be a list of token ids"):
        reply(None, own, "hi", stop_ids=stops)


def test_stops_may_come_from_an_iterator(own: Tokenizer) -> None:
    ids = [own.encode(each)[0] for each in ("a", "b", "c")]
    for stops in (iter(["b"]), {"b"}, ("b" for _ in range(1))):
        assert "".join(TextStream(map(Step, ids, ids), own, stop_texts=stops)) == "a"
    steps = list(map(Step, ids, ids))
    stream = TextStream(steps, own, stop_ids=iter(ids[1:2]))
    assert "".join(stream) == "a"
    talk = Conversation(SimpleNamespace(), own, stop_texts=iter(["b"]), stop_ids=iter(ids))
    assert (talk.stop_texts, talk.stop_ids) == (("b",), frozenset(ids))


@pytest.mark.parametrize("ids", ["abc", b"abc", iter([1, 2]), {1, 2}, [[1], 2], 7, None, ["ab"]])
def test_ids_to_score_are_a_list(ids: object) -> None:
    model = SimpleNamespace(
        group=SimpleNamespace(together=contextlib.nullcontext), config=SimpleNamespace(vocab_size=9)
    )
    with pytest.raises(InputError, match=r"tokens of a text|must be a list of token ids"):
        score(model, ids)


@pytest.mark.parametrize("continuations", ["abc", 7, [7], ["ab"], b"ab"])
def test_continuations_are_lists(continuations: object) -> None:
    with pytest.raises(InputError, match="continuations must be lists of token ids"):
        score(None, [1, 2], continuations)


@pytest.mark.parametrize("layers", ["0,1", 3, [0.5], [None]])
def test_layers_to_trace_are_a_list(layers: object) -> None:
    with pytest.raises(InputError, match="layers must be a list of the layers' numbers"):
        trace(WEIGHTS, [1, 2], layers=layers)


@pytest.mark.parametrize("window", ["6144", 1.5, None, 0])
def test_a_window_is_a_number_of_tokens(window: object, own: Tokenizer) -> None:
    for ask in (build_context, lambda *given, **named: reply(None, *given, **named)):
        with pytest.raises(InputError, match=r"max_window_size=.* must be at least 1 token"):
            ask(own, "hi", max_window_size=window)


@pytest.mark.parametrize("option", ["--plot", "--ids", "--model"])
def test_an_output_that_the_command_reads_is_refused_and_stays(option: str, run_command: Run, tmp_path: Path):
    """What another option names, or a file of a checkpoint's folder, would be lost."""
    shutil.copytree(WEIGHTS, tmp_path / "model")
    (tmp_path / "ids").write_text("1 2 3")
    record = [
        "record",
        "--rounding",
        "none",
        "--model",
        tmp_path / "model",
        "--ids",
        tmp_path / "ids",
        "--out",
    ]
    for _ in range(2):  # what it wrote itself may be written anew
        assert run_command(parity_main, *record, tmp_path / "model" / "bundle.safetensors").code == 0
    assert run_command(parity_main, *record, tmp_path / "bundle").code == 0
    file, arguments = {
        "--plot": (tmp_path / "bundle", ["check", "--golden", tmp_path / "bundle", "--plot"]),
        "--ids": (tmp_path / "ids", record),
        "--model": (tmp_path / "model" / "model.safetensors", record),
    }[option]
    before = file.read_bytes()
    assert "which would be lost; give another name" in refused(run_command(parity_main, *arguments, file))
    assert file.read_bytes() == before


def test_a_package_that_is_not_installed_is_named(run_command: Run) -> None:
    def command(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    line = refused(run_command(lambda arguments: run(Parser(), command, arguments)))
    assert line == "qwen_ref: error: torch is not installed: pip install torch"


@pytest.mark.parametrize("folder", ["chat", "decoding", "fast", "parity", "perplexity", "quantize", "trace"])
def test_public_names_are_there_and_seen(folder: str) -> None:
    package = importlib.import_module(f"qwen_ref.{folder}")
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module 'qwen_ref.{folder}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018
