"""`python -m qwen_ref.generate`: only text on stdout, clear errors with exit code 2, clean endings."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, WEIGHTS, change_json, change_tensors, cli_of, refused
from conftest import command as main_of

from qwen_ref.commands import cli as shared
from qwen_ref.commands import files
from qwen_ref.commands.generate import main

cli = cli_of(main)
QUICKSTART = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"
ANSWER = "亚的斯亚贝巴（Addis Ababa）"
COMMAND = [sys.executable, "-m", "qwen_ref.generate"]


# What it prints


def test_the_quickstart_prompt_is_completed(cli: Callable) -> None:
    result = cli(QUICKSTART)
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert "parameters, 0.004 GB of bfloat16 on cpu" in result.err
    assert "greedy; at most" in result.err
    assert "tokens/s" in result.err


def test_the_prompt_is_encoded_by_hand(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiktoken.Encoding", None)
    assert cli(QUICKSTART).out == ANSWER + "\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_it_answers_in_every_dtype(cli: Callable, dtype: str) -> None:
    result = cli(QUICKSTART, "--dtype", dtype)
    assert result.out == ANSWER + "\n"
    assert f"GB of {dtype} on cpu" in result.err


def test_the_prompt_comes_from_stdin_or_a_file_too(cli: Callable, tmp_path: Path) -> None:
    assert cli(stdin=QUICKSTART.encode() + b"\n").out == ANSWER + "\n"
    assert cli("-", stdin=QUICKSTART.encode()).out == ANSWER + "\n"
    (tmp_path / "prompt.txt").write_text(QUICKSTART + "\n", encoding="utf-8")
    assert cli("--file", tmp_path / "prompt.txt").out == ANSWER + "\n"


def test_json_is_one_object_with_everything(cli: Callable) -> None:
    result = cli(
        QUICKSTART, "--json", "--temperature", "0.5", "--top-k", "3", "--seed", "4", "--top-p", "0.9"
    )
    report = json.loads(result.out)
    assert report["prompt"] == QUICKSTART
    assert report["text"] == ANSWER
    assert report["finish_reason"] == "stop"
    assert "".join(token["text"] for token in report["tokens"]) == ANSWER + "<|endoftext|>"
    assert all(token["logprob"] <= 0 for token in report["tokens"])
    chosen = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4, "repetition_penalty": 1.0}
    assert chosen.items() <= report["settings"].items()


def test_logprobs_are_a_line_a_token(cli: Callable) -> None:
    lines = [line.split("\t") for line in cli(QUICKSTART, "--logprobs").out.splitlines()]
    assert "".join(json.loads(text) for _, _, text in lines) == ANSWER + "<|endoftext|>"
    assert all(float(logprob) <= 0 and int(token) >= 0 for logprob, token, _ in lines)


def test_max_new_tokens_and_stop_texts_end_the_text(cli: Callable) -> None:
    assert cli(QUICKSTART, "--stop", "（").out == "亚的斯亚贝巴\n"
    assert cli(QUICKSTART, "--stop", "Ababa", "--stop", "Addis").out == "亚的斯亚贝巴（\n"
    report = json.loads(cli(QUICKSTART, "--max-new-tokens", "2", "--json").out)
    assert (len(report["tokens"]), report["finish_reason"]) == (2, "length")


def test_special_tokens_are_parsed_only_when_asked(cli: Callable) -> None:
    chat = "<|im_start|>user\n冰岛的首都是哪里？<|im_end|>\n<|im_start|>assistant\n"
    plain, parsed = (json.loads(cli(chat, "--json", *extra).out) for extra in ([], ["--allow-special"]))
    assert parsed["text"] == "雷克雅未克（Reykjavik）"
    assert parsed["prompt_tokens"] < plain["prompt_tokens"]


def test_the_folders_generation_config_gives_the_defaults(cli: Callable, folder: Path) -> None:
    change_json(folder / "generation_config.json", do_sample=True, top_p=0.25, max_new_tokens=3)
    change_json(folder / "generation_config.json", repetition_penalty=1.1, stop_words_ids=[[1], [40, 41]])
    result = cli(QUICKSTART, "--model", folder, "--seed", "1")
    assert (
        "temperature 1, top-k 0, top-p 0.25, seed 1; at most 3 new tokens; repetition penalty 1.1"
        in result.err
    )
    assert "stop at 1, " in result.err
    assert "'()'" in result.err  # 40 and 41: single bytes come first in the vocabulary, in their order
    (folder / "generation_config.json").unlink()
    assert "greedy; at most 64 new tokens; stop at 2" in cli(QUICKSTART, "--model", folder).err


def test_a_new_seed_is_printed_so_that_the_text_can_be_had_again(cli: Callable) -> None:
    result = cli("冰岛", "--temperature", "3", "--max-new-tokens", "12")
    seed = result.err.split("seed ")[1].split(";")[0]
    again = cli("冰岛", "--temperature", "3", "--max-new-tokens", "12", "--seed", seed)
    assert again.out == result.out


def test_a_text_longer_than_the_trained_length_is_noted(cli: Callable) -> None:
    assert (
        "exceed the 512 that this model was trained on" in cli("冰岛的首都是", "--max-new-tokens", "600").err
    )


def test_a_locale_without_chinese_changes_nothing() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(COMMAND, input=QUICKSTART.encode(), capture_output=True, env=environment)
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER + "\n")


# How it ends


@pytest.fixture
def endless(folder: Path) -> Path:
    """A checkpoint that never stops by itself."""
    change_json(folder / "generation_config.json", eos_token_id=0, chat_format="raw", max_new_tokens=100_000)
    return folder


def test_ctrl_c_ends_it_with_what_was_generated(endless: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "冰岛的首都是", "--model", str(endless)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        first = process.stdout.read(12)  # four tokens or so: decoding is under way
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).decode().startswith("雷")
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b"decode" in err


def test_a_closed_stdout_ends_it_quietly(endless: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "冰岛的首都是", "--model", str(endless)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(3)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_an_interrupt_while_loading_is_no_traceback(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_ref.checkpoint.load_model", interrupted)
    assert cli(QUICKSTART) == (130, "", "qwen_ref: interrupted\n")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["x", "--file", "y"], "given twice"),
        (["--file", "missing.txt"], "No such file"),
        (["x", "--model", "missing"], "missing: not a folder"),
        (["x", "--model", str(GOLDEN / "long")], "qwen.tiktoken: cannot be read: No such file"),
        (["x", "--dtype", "int8"], "dtype 'int8' is unknown; use auto, bfloat16, float16, float32, float64"),
        (["x", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["x", "--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["x", "--temperature", "nan"], "temperature=nan must be 0"),
        (["x", "--temperature", "1", "--top-k", "-2"], "top_k=-2 must be at least 0"),
        (["x", "--temperature", "1", "--top-p", "1.5"], "top_p=1.5 must be above 0"),
        (["x", "--temperature", "1", "--top-p", "0"], "top_p=0.0 must be above 0 and at most 1"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty=0.0 must be from 1e-5"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["x", "--seed=--"], "argument --seed: -- is no value"),
        (["x", "--stop=--"], "argument --stop: -- is no value"),
        (["x", "--seed", "-2"], "seed=-2 must be at least 0"),
        (["x", "--seed", str(2**63)], "--seed: '9223372036854775808' must be a whole number of 64 bits"),
        (["x", "--top-k", "9" * 300], "999' must be a whole number of 64 bits"),
        (["x", "--lookup", "9" * 5000], "999' must be a whole number of 64 bits"),
        (["x", "--max-new-tokens", "-" + "9" * 5000], "999' must be a whole number of 64 bits"),
        (["x", "--max-new-tokens", str(2**30 + 1)], "max_new_tokens=1073741825 must be at most 1073741824"),
        (["x", "--model", ""], "--model: the path is empty"),
        (["--file", ""], "--file: the path is empty"),
        (["x", "--stop", ""], "--stop is empty"),
        (["x", "--stop", "caf\udce9"], "--stop: it is not UTF-8 (byte 0xe9 at offset 3)"),
        (["caf\udce9"], "prompt: it is not UTF-8 (byte 0xe9 at offset 3)"),
        (["x", "y"], "unrecognized arguments: y; --help lists the options"),
        (["x", "--top-k", "1.5"], "--top-k: invalid int value: '1.5'"),
        (["x", "--frequency"], "unrecognized arguments: --frequency"),
        (["x", "--model", "a\x1b[31m\udcff"], "a\\x1b[31m\\udcff: not a folder"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(cli: Callable, arguments: list[str], message: str) -> None:
    assert message in refused(cli(*arguments))


@pytest.mark.parametrize("count", [2**30])
def test_more_tokens_than_memory_are_refused(cli: Callable, count: int) -> None:
    result = cli("x", "--max-new-tokens", count)
    assert (result.code, result.out) == (2, "")
    assert "GB, more than cpu has left; ask for fewer" in result.err.splitlines()[-1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "2>/dev/full"])
def test_a_closed_stream_is_no_traceback(closed: str) -> None:
    arguments = "-" if closed == "<&-" else "冰岛的首都是"
    command = f'"{sys.executable}" -m qwen_ref.generate {arguments} {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, encoding="utf-8", timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if closed == "<&-" else 0)
    assert done.stdout.startswith("雷克雅未克") == closed.startswith("2")
    if closed == "<&-":
        assert "stdin is closed" in done.stderr


def test_an_ascii_locale_reads_arguments_as_the_bytes_they_are() -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src")}
    for arguments in (["冰岛的首都是", "--stop", "（"], ["--help"], ["x", "--model", "冰岛"]):
        command = [*COMMAND, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)
        assert "Traceback" not in done.stderr
        assert done.returncode == (2 if "冰岛" in arguments else 0)
        assert "冰岛的首都是" not in arguments or done.stdout == "雷克雅未克\n"


def test_a_prompt_that_is_not_utf8_is_refused_with_its_place(cli: Callable, tmp_path: Path) -> None:
    assert "stdin is not UTF-8 (byte 0xff at offset 2)" in refused(cli(stdin=b"ab\xff"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt is not UTF-8 (byte 0xe9 at offset 3)" in refused(cli("--file", tmp_path / "latin.txt"))


def test_a_vocabulary_larger_than_the_model_is_refused(cli: Callable, folder: Path) -> None:
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
    more = [b"%s %d" % (base64.b64encode(b"word%d" % n), len(lines) + n) for n in range(999)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines + more))
    assert "qwen.tiktoken has" in refused(cli("x", "--model", folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": "many", "do_sample": True}, "top_k='many' must be int"),
        ({"top_p": True, "do_sample": True}, "top_p=True must be int or float"),
        ({"eos_token_id": "<|endoftext|>"}, "eos_token_id='<|endoftext|>' must be int or list"),
        ({"stop_words_ids": [1643]}, "stop_words_ids must hold ids from 0 to 2707, not 1643"),
        ({"stop_words_ids": [[1, 999_999]]}, "must hold ids from 0 to 2707, not [1, 999999]"),
        ({"stop_words_ids": [[0xE5, 0xA4]]}, "stop_words_ids: [229, 164] are no whole characters"),
        ({"eos_token_id": -1}, "must hold ids from 0 to 2707, not [-1]"),
        ({"do_sample": 1}, "do_sample=1 must be bool"),
        ({"top_p": 1.5, "do_sample": True}, "top_p=1.5 must be above 0"),
        ({"top_p": 0, "do_sample": True}, "top_p=0 must be above 0"),
        ({"top_k": -2, "do_sample": True}, "top_k=-2 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 10**300}, "max_new_tokens=1000"),
        ({"max_window_size": -(10**300)}, "max_window_size=-1000"),
        ({"top_k": 2**63, "do_sample": True}, "top_k=9223372036854775808 must be below 2**63"),
        ({"eos_token_id": 10**300}, "eos_token_id=1000"),
        ({"stop_words_ids": [[10**300]]}, "stop_words_ids must hold ids from 0 to 2707, not [1000"),
        ({"temperature": 10**309, "do_sample": True}, "temperature=inf must be 0"),
        ({"repetition_penalty": 10**400}, "repetition_penalty=inf must be from 1e-5"),
        ({"chat_format": "x" * 10**5, "top_k": "x" * 10**5, "do_sample": True}, "top_k='xxx"),
    ],
)
def test_a_wrong_generation_config_is_named(cli: Callable, folder: Path, changes: dict, message: str) -> None:
    change_json(folder / "generation_config.json", **changes)
    line = refused(cli("x", "--model", folder))
    assert message in line
    assert "generation_config.json: " in line
    assert len(line) < 500


@pytest.mark.parametrize("name", ["generation_config.json", "qwen.tiktoken"])
def test_only_regular_files_of_a_folder_are_read(
    cli: Callable, folder: Path, special: tuple[Path, str], name: str
) -> None:
    path, kind = special
    (folder / name).unlink()
    (folder / name).symlink_to(path)
    assert f"{name}: cannot be read: it is {kind}, not a file" in refused(cli("x", "--model", folder))


@pytest.mark.parametrize(
    "command", ["generate", "trace", "chat", "perplexity", "evaluate", "bench", "parity"]
)
def test_a_file_in_the_place_of_a_folder_is_said_with_the_folder(run_command: Callable, command: str) -> None:
    arguments = {
        "generate": ["x"],
        "trace": ["x"],
        "perplexity": ["--text", __file__],
        "evaluate": ["--tasks", "x"],
        "parity": ["check", "--golden", "x"],
    }
    file = WEIGHTS / "model.safetensors"
    line = refused(run_command(main_of(command), *arguments.get(command, []), "--model", file))
    assert f"{file}: not a folder; give the folder that it is in, {WEIGHTS}" in line


# A prompt may be a stream: the user asks for it.


@pytest.mark.usefixtures("never_hangs")
def test_a_prompt_from_a_pipe_is_read_to_its_end(cli: Callable, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()  # as <(command) gives one
    with os.fdopen(read_end), os.fdopen(write_end, "wb") as writer:
        writer.write(QUICKSTART.encode() + b"\n")
        writer.close()
        assert cli("--file", f"/dev/fd/{read_end}").out == ANSWER + "\n"

    os.mkfifo(tmp_path / "named")

    def write_slowly() -> None:
        with (tmp_path / "named").open("wb", buffering=0) as pipe:
            started.set()
            for half in (QUICKSTART.encode()[:10], QUICKSTART.encode()[10:]):
                time.sleep(0.05)
                pipe.write(half)

    started = threading.Event()
    ours = os.open(tmp_path / "named", os.O_RDONLY | os.O_NONBLOCK)  # so that the writer can open it
    writer = threading.Thread(target=write_slowly)
    writer.start()
    started.wait()
    try:
        assert files.read_prompt(None, tmp_path / "named") == QUICKSTART
    finally:
        writer.join()
        os.close(ours)


@pytest.mark.usefixtures("never_hangs")
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(cli: Callable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent")
    assert "silent: cannot be read: it is a pipe, and nothing writes to it" in refused(
        cli("--file", tmp_path / "silent")
    )


@pytest.mark.usefixtures("never_hangs")
@pytest.mark.parametrize("name", ["no\0file", "no \ud800 file", "x" * 5000], ids=["NUL", "surrogate", "long"])
def test_a_name_that_no_file_can_have_is_refused(cli: Callable, name: str) -> None:
    assert ": cannot be read: " in refused(cli("--file", name))


def test_a_text_is_read_up_to_a_bound(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/dev/zero: larger than 256 MiB" in refused(cli("--file", "/dev/zero"))
    monkeypatch.setattr(files, "LARGEST_TEXT", 2**20)
    assert "stdin has more than 1 MiB" in refused(cli(stdin=bytes(2**20 + 1)))
    monkeypatch.setattr(files, "LARGEST_TEXT", len(QUICKSTART.encode()))
    assert cli(stdin=QUICKSTART.encode()).out == ANSWER + "\n"
    assert "the prompt is empty" in refused(cli("--file", "/dev/null"))


@pytest.mark.parametrize("special", ["socket", "folder"], indirect=True)
def test_a_prompt_is_in_no_socket_and_in_no_folder(cli: Callable, special: tuple[Path, str]) -> None:
    path, kind = special
    assert f"{path}: cannot be read: it is {kind}, not a file" in refused(cli("--file", path))


def test_a_generation_config_that_is_a_broken_link_is_named(cli: Callable, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("gone")
    assert "generation_config.json: cannot be read" in refused(cli("x", "--model", folder))


def test_rows_beyond_the_tokenizer_are_shown_as_what_they_are_not(cli: Callable) -> None:
    arguments = ("hi", "--temperature", 1000, "--top-p", 1, "--max-new-tokens", 400, "--seed", 1, "--json")
    result = cli(*arguments)
    assert result.code == 0
    report = json.loads(result.out)
    beyond = [token for token in report["tokens"] if token["id"] > 2707]
    assert beyond
    assert {token["text"] for token in beyond} == {"\ufffd"}
    assert report["text"].count("\ufffd") >= len(beyond)


def test_a_spoiled_folder_is_one_line_with_all_its_problems(cli: Callable, folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["transformer.ln_f.weight"]
        tensors["transformer.h.0.mlp.w1.weight"] = tensors["transformer.h.0.mlp.w1.weight"][:-1]

    change_tensors(folder, spoil)
    line = refused(cli("x", "--model", folder))
    assert "missing tensors: transformer.ln_f.weight" in line
    assert "transformer.h.0.mlp.w1.weight is" in line


def test_nan_weights_are_named_and_nothing_is_printed(cli: Callable, folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["transformer.ln_f.weight"].fill_(torch.nan))
    result = cli("x", "--model", folder)
    assert (result.code, result.out) == (2, "")
    assert "NaN" in result.err.splitlines()[-1]


# Prompts as files are


MARK = "\ufeff"


def test_a_byte_order_mark_is_no_part_of_a_prompt(cli: Callable, tmp_path: Path) -> None:
    marked = (MARK + QUICKSTART).encode()
    (tmp_path / "prompt.txt").write_bytes(marked)
    ways = {
        "stdin": cli(stdin=marked),
        str(tmp_path / "prompt.txt"): cli("--file", tmp_path / "prompt.txt"),
        "the prompt": cli(MARK + QUICKSTART),  # as "$(cat prompt.txt)" gives it
    }
    for source, result in ways.items():
        assert (result.code, result.out) == (0, ANSWER + "\n")
        assert f"note: {source} begins with a byte order mark (U+FEFF), which is dropped" in result.err
    assert "byte order mark" not in cli(QUICKSTART + MARK).err  # elsewhere it is a character
    assert "the prompt is empty" in cli(stdin=MARK.encode()).err


@pytest.mark.parametrize(("encoding", "begins"), [("utf-16-le", "ff fe"), ("utf-16-be", "fe ff")])
def test_utf_16_is_named_with_what_converts_it(
    cli: Callable, encoding: str, begins: str, tmp_path: Path
) -> None:
    content = (MARK + QUICKSTART).encode(encoding)
    (tmp_path / "prompt.txt").write_bytes(content)
    remedy = f"is UTF-16 (it begins with the bytes {begins}); convert it first: iconv -f UTF-16 -t UTF-8"
    assert f"stdin {remedy}" in refused(cli(stdin=content))
    assert f"prompt.txt {remedy}" in refused(cli("--file", tmp_path / "prompt.txt"))


def test_windows_line_ends_change_the_answer_and_are_noted(cli: Callable, tmp_path: Path) -> None:
    windows = QUICKSTART.replace("\n", "\r\n")
    (tmp_path / "prompt.txt").write_bytes(windows.encode() + b"\r\n")
    for result in (cli("--file", tmp_path / "prompt.txt"), cli(windows)):
        assert result.code == 0
        assert result.out != ANSWER + "\n"
        assert "note: in the prompt 2 lines end in CRLF" in result.err
        assert "tr -d '\\r' <FILE converts it" in result.err
    assert "in the prompt a line ends in CRLF" in cli("冰岛\r\n").err
    assert "CRLF" not in cli(stdin=QUICKSTART.encode() + b"\r\n").err  # the last line end is dropped


def test_the_file_may_be_stdin(cli: Callable, run_command: Callable) -> None:
    assert cli("--file", "-", stdin=QUICKSTART.encode() + b"\n").out == ANSWER + "\n"
    assert "7+8" in run_command(main_of("trace"), "--file", "-", "--json", stdin=b"7+8").out


@pytest.mark.parametrize("typed", ["\\n", "\\nUser:", "a\\t", "\\r\\n"])
def test_a_line_end_that_the_shell_left_as_it_was_typed_is_noted(cli: Callable, typed: str) -> None:
    result = cli(QUICKSTART, "--stop", typed)
    assert result.out == ANSWER + "\n"
    note = (
        f"note: --stop '{typed}' is taken as it is typed, backslash and letter; in bash and zsh $'\\n' is a"
    )
    assert f"{note} line end and $'\\t' a tab" in result.err
    for stop in ("\n", "\\", "\\x"):
        assert "as it is typed" not in cli("7+8=", "--stop", stop, "--max-new-tokens", "1").err


def test_a_path_may_begin_with_the_home_folder(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In quotes and behind = a shell does not expand it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text(QUICKSTART, encoding="utf-8")
    (tmp_path / "~").mkdir()
    assert cli("--file=~/prompt.txt").out == ANSWER + "\n"
    assert cli("--file", "~/prompt.txt").out == ANSWER + "\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~" / "prompt.txt").write_text("7+8=")
    assert cli("--file", "~/prompt.txt").out.startswith("15\n")  # it is there
    assert "~nosuchuser/x: cannot be read" in refused(cli("--file", "~nosuchuser/x"))
    assert "cannot be read" in refused(cli("--file", "~\0/x"))


# Settings as published


@pytest.mark.parametrize(
    "junk",
    [
        {"top_p": 0, "temperature": 0, "top_k": None},
        {"top_p": "", "temperature": "cold", "top_k": -1},
        {"top_p": -1, "temperature": -1.5, "top_k": 2**63},
        {"do_sample": True, "temperature": 0, "top_p": 0},
    ],
)
def test_what_a_greedy_folder_says_of_sampling_is_passed_over(
    cli: Callable, folder: Path, junk: dict
) -> None:
    change_json(folder / "generation_config.json", **junk)
    result = cli(QUICKSTART, "--model", folder)
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert "greedy; at most" in result.err
    assert "temperature 1, top-k 0, top-p 1, seed" in cli("x", "--model", folder, "--temperature", "1").err
    for name, value in {"repetition_penalty": 0, "max_new_tokens": 0}.items():  # which greedy decoding reads
        change_json(folder / "generation_config.json", **{name: value})
        assert f"{name}=0" in refused(cli("x", "--model", folder))
        change_json(folder / "generation_config.json", **{name: None})


def test_who_samples_gets_the_top_p_of_a_greedy_folder(cli: Callable) -> None:
    assert "temperature 1, top-k 0, top-p 0.8" in cli("x", "--temperature", "1", "--max-new-tokens", "1").err


def test_options_that_greedy_decoding_does_not_read_are_noted(cli: Callable) -> None:
    result = cli(QUICKSTART, "--temperature", "0", "--top-p", "0", "--top-k", "-5")
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert "note: --top-p is not read: temperature 0 is greedy" in result.err
    assert "note: --top-k is not read: temperature 0 is greedy" in result.err
    assert "is not read" not in cli(QUICKSTART).err


def test_minus_1_is_no_limit_and_a_new_seed(cli: Callable, folder: Path) -> None:
    sampled = ("冰岛", "--temperature", "3", "--max-new-tokens", "12", "--model", folder)
    assert "top-k 0," in cli(*sampled, "--top-k", "-1").err
    change_json(folder / "generation_config.json", do_sample=True, top_k=-1)
    assert "top-k 0," in cli(*sampled).err
    seeds = {cli(*sampled, "--seed", "-1").err.split("seed ")[1].split(";")[0] for _ in range(3)}
    assert len(seeds) == 3
    assert "-1" not in seeds


# Progress


class OutStream(io.StringIO):
    """A notebook's stderr, as ipykernel has it: no terminal, and no file with a number."""

    encoding = "UTF-8"

    def isatty(self) -> bool:
        return False


OutStream.__module__ = "ipykernel.iostream"


class AsciiStream(OutStream):
    encoding = "ascii"


class NoIsatty(OutStream):
    """As older ones."""

    @property
    def isatty(self) -> None:
        raise AttributeError("isatty")


def terminal() -> io.StringIO:
    stream = io.StringIO()
    stream.isatty = lambda: True
    return stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    monkeypatch.setattr(shared.time, "monotonic", lambda: 0.0)
    return lambda now: monkeypatch.setattr(shared.time, "monotonic", lambda: now)


@pytest.mark.parametrize("stream", [terminal, OutStream, AsciiStream, NoIsatty])
def test_progress_is_a_bar_that_is_redrawn(
    stream: Callable, clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal and in a notebook, in ASCII where the stream has no other characters."""
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = shared.Progress("loading").update  # as `progress=` takes it
    for now in (0.05, 11.0, 22.0, 44.0):
        clock(now)
        progress(done=int(now * 1e8), total=4_400_000_000)
    lines = [
        "qwen_ref: loading █████─────────────── 25 % 1.10 of 4.40 GB, 33 s left",
        "qwen_ref: loading ██████████────────── 50 % 2.20 of 4.40 GB, 22 s left",
        "qwen_ref: loading ████████████████████ 100 % 4.40 of 4.40 GB, in 44 s ",
    ]
    wanted = "".join(f"\r{line}" for line in lines) + "\n"
    if stream is AsciiStream:
        wanted = wanted.replace("█", "#").replace("─", "-")
    assert stderr.getvalue() == wanted


def test_progress_elsewhere_is_a_line_every_ten_seconds(
    clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with shared.Progress("loading") as progress:
        for now in (9.0, 11.0, 12.0, 22.0, 44.0):
            clock(now)
            progress.update(done=int(now * 1e8), total=4_400_000_000)
    first = "qwen_ref: loading 1.10 of 4.40 GB, 33 s left"
    second = "qwen_ref: loading 2.20 of 4.40 GB, 22 s left"
    assert sys.stderr.getvalue() == f"{first}\n{second}\n"


def test_a_line_of_progress_covers_the_one_before_and_fits(
    clock: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal())
    with shared.Progress("looking for needles", "tokens") as progress:
        for now in (1.0, 5.0):
            clock(now)
            progress.update(done=int(200_000 * now), total=1_000_000_000 if now == 1 else 2_000_000)
    first, second = sys.stderr.getvalue().strip("\r\n").split("\r")
    assert len(first) == 79
    assert first == ("qwen_ref: looking for needles ──── 0 % 200000 of 1000000000 tokens, 4999 s left")
    assert second == f"{'qwen_ref: looking for needles ████──── 50 % 1000000 of 2000000 tokens, 5 s left':79}"


def test_progress_that_ends_early_ends_its_line(clock: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal())
    with shared.Progress("scoring", "tokens") as progress:
        clock(1.0)
        progress.update(done=1, total=2)
    shown = sys.stderr.getvalue()
    assert shown == "\rqwen_ref: scoring ██████████────────── 50 % 1 of 2 tokens, 1 s left\n"
    with shared.Progress("scoring", "tokens") as progress:
        progress.update(done=2, total=2)
    assert sys.stderr.getvalue() == shown  # what is done at once shows nothing


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_asked_for_the_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "stdin", Terminal(io.BytesIO("冰岛\n".encode())))
    assert files.read_prompt(None, None) == "冰岛"
    assert capsys.readouterr().err == "qwen_ref: reading the prompt from the terminal; end it with Ctrl-D\n"
