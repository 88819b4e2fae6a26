"""Command lines of every command: good, borderline and absurd values, on files that are none."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_ref import bench, chat, checkpoint, evaluate, generate, perplexity, trace
from qwen_ref.figures import pyplot
from qwen_ref.parity import __main__ as parity

from . import folders
from .harness import Case, Kind, capture
from .values import HUGE, a_number, a_text, a_whole

Draw = Callable[[random.Random], list[str]]
Options = dict[str, Draw]

# What stands in a case's folder, beside its model.
_SPECIAL = ("dir", "fifo", "dangling", "loop", "endless", "full", "linked")
_PATHS = (
    *(
        *_SPECIAL,
        "text",
        "none",
        "no/such",
        "sparse",
        "empty",
        "bytes",
        "model",
        "model/config.json",
        "text/x",
        ".",
    ),
    *(
        "",
        "..",
        "/",
        "/dev/null",
        "/dev/full",
        "/dev/zero",
        "/dev/fd/0",
        "/dev/stdin",
        "~nosuchuser/x",
        "~",
        "-",
        "--",
    ),
    *(
        "x" * 250,
        "x" * 300,
        "x/" * 3000,
        "a\0b",
        "\udcff",
        "\ud800",
        "冰岛",
        "\x1b[2J",
        "a\nb",
        "-x",
        "x.png",
        " ",
    ),
)
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_WRONG = (
    "",
    "x",
    "FLOAT32",
    "float32 ",
    "int8",
    HUGE,
    "\ud800",
    "\x1b[31m",
    "meta",
    "mps",
    "cuda",
    "cuda:99",
    "cpu:7",
)


def _flag(_: random.Random) -> list[str]:
    return []


def _whole(*good: str) -> Draw:
    return lambda rng: [a_whole(rng, good or ("1", "2", "3", "0"))]


def _number(*good: str) -> Draw:
    return lambda rng: [a_number(rng, good) if good else a_number(rng)]


def _text(rng: random.Random) -> list[str]:
    return [a_text(rng)]


def _one(*good: str) -> Draw:
    return lambda rng: [rng.choice(good if rng.random() < 0.8 else _WRONG)]


def _path(*good: str) -> Draw:
    return lambda rng: [rng.choice(good if rng.random() < 0.6 else _PATHS)]


def _some(draw: Draw, most: int = 3) -> Draw:
    return lambda rng: [value for _ in range(rng.randrange(most + 1)) for value in draw(rng)]


def _listed(draw: Draw, separator: str = ",") -> Draw:
    return lambda rng: [separator.join(value for _ in range(rng.randrange(1, 4)) for value in draw(rng))]


_MODEL: Options = {"--model": _path("model", "model", "model", "packed")}
_SPEED: Options = {
    "--fast": _flag,
    "--quantize": _one("int8", "int4"),
    "--group-size": _one("32", "64", "128", "256"),
    "--packed": _flag,
    "--kv-cache": _one("int8"),
}
_LOAD: Options = {
    "--dtype": _one(*_DTYPES),
    "--device": _one("cpu"),
    "--timeout": _number("60", "1"),
    **_SPEED,
}
_SAMPLING: Options = {
    "--max-new-tokens": _whole("1", "2", "3"),
    "--temperature": _number(),
    "--top-k": _whole(),
    "--top-p": _number("0.1", "0.5", "1"),
    "--repetition-penalty": _number("1", "1.1", "0.9", "1e-45", "1e38"),
    "--seed": _whole(),
}
_LAYERS = _listed(
    lambda rng: [rng.choice(("0", "1", "-1", "0-1", "-2--1", "1-0", "99", "-99", "", "x", "0-", HUGE))]
)

# Of each command: its main, words that stand first, what is asked of it, all else that may be.
_COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str], Options, Options]] = {
    "generate": (
        generate.main,
        [],
        {"": _text},
        _MODEL
        | _LOAD
        | _SAMPLING
        | {"--file": _path("text"), "--stop": _text, "--lookup": _whole("1", "8"), "--allow-special": _flag}
        | {"--logprobs": _flag, "--json": _flag},
    ),
    "chat": (
        chat.main,
        [],
        {"--once": _text},
        _MODEL | _LOAD | _SAMPLING | {"--system": _text, "--history": _path("saved")},
    ),
    "perplexity": (
        perplexity.main,
        [],
        {"--text": _some(_path("text", "text", "bytes"), 2), "--lengths": _listed(_whole("2", "4", "8"))},
        _MODEL
        | _LOAD
        | {"--stride": _whole("1", "2"), "--windows": _whole("1", "2"), "--batch-size": _whole("1", "2")}
        | {
            "--no-ntk": _flag,
            "--no-logn": _flag,
            "--state": _path("state", "new"),
            "--plot": _path("new.png"),
        }
        | {"--json": _flag},
    ),
    "trace": (
        trace.main,
        [],
        {"": _text},
        _MODEL
        | {"--dtype": _one(*_DTYPES), "--file": _path("text"), "--layers": _LAYERS, "--lens": _flag}
        | {"--top": _whole(), "--allow-special": _flag, "--json": _flag},
    ),
    "inspect": (
        checkpoint.main,
        ["inspect"],
        {"": _path("model", "packed", "1.8b", "7B", "model/config.json")},
        {"--tp": _whole("1", "2"), "--context": _whole("1", "100")},
    ),
    "record": (
        parity.main,
        ["record"],
        {"--prompt": _text, "--out": _path("new", "bundle")},
        _MODEL
        | {"--ids": _path("ids"), "--allow-special": _flag, "--stages": _one("all", "logits")}
        | {
            "--dtype": _one(*_DTYPES),
            "--decode": _whole(),
            "--rounding": _listed(_one(*_DTYPES[1:4], "none")),
        },
    ),
    "check": (
        parity.main,
        ["check"],
        {"--golden": _path("bundle")},
        _MODEL | {"--dtype": _one(*_DTYPES), "--json": _flag, "--full": _flag, "--plot": _path("new.png")},
    ),
    "diff": (
        parity.main,
        ["diff"],
        {"": _path("bundle"), " ": _path("bundle", "other")},
        _MODEL | {"--json": _flag, "--full": _flag, "--plot": _path("new.png")},
    ),
    "diagnose": (
        parity.main,
        ["diagnose"],
        {"--bundle": _path("other", "bundle")},
        _MODEL | {"--json": _flag, "--full": _flag},
    ),
    "bench": (
        bench.main,
        [],
        {
            "--lengths": _some(_whole("1", "2", "4")),
            "--tokens": _whole("1", "2"),
            "--repeats": _one("1", "0", "-1", HUGE),
        },
        _MODEL
        | _SPEED
        | {"--dtype": _one(*_DTYPES), "--device": _one("cpu"), "--batch": _whole("1", "2"), "--json": _flag}
        | {"--tp": _one("1", "0", "-1", "3", HUGE), "--against": _some(_one("plain", "plain:float32"), 2)}
        | {"--layers": _whole(), "--gptq": _one("4", "8"), "--timeout": _number("60")},
    ),
}
_WEIGHTS = {"diagnose": 1, "bench": 2, "generate": 8, "chat": 5}  # the others 3
_DRAWN = [name for name in _COMMANDS for _ in range(_WEIGHTS.get(name, 3))]

_EVALUATE: Options = (
    _MODEL
    | _LOAD
    | {"--include-path": _path("dir"), "--num-fewshot": _whole("0", "1"), "--limit": _number("1", "2", "0.5")}
    | {
        "--apply-chat-template": _flag,
        "--system": _text,
        "--batch-size": _whole("1", "2"),
        "--max-length": _whole("8", "64"),
    }
    | {"--gen-kwargs": _listed(lambda rng: [f"{rng.choice(('top_k', 'until', 'x', ''))}={a_number(rng)}"])}
    | {"--seed": _whole(), "--output": _path("new"), "--json": _flag}
)
_TASK = """task: fuzz_task
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""


def _arguments(rng: random.Random, asked: Options, others: Options) -> list[str]:
    """Options in any order, each with a value; some given twice, one left out now and then."""
    chosen = [pair for pair in asked.items() if rng.random() < 0.95]
    chosen += rng.sample(list(others.items()), k=rng.choice((0, 0, 1, 1, 2, 3, 4)))
    if "--model" in others and rng.random() < 0.9:
        chosen.append(("--model", lambda _: ["model"]))  # the bundled one is slower
    if rng.random() < 0.05:
        chosen.append((rng.choice(("--help", "--x", "-h", "--", "---", "-\ud800", "\x1b[2J")), _flag))
    rng.shuffle(chosen)
    arguments = []
    for option, draw in chosen:
        values = draw(rng)
        if option.strip() and len(values) == 1 and rng.random() < 0.5:
            arguments.append(f"{option}={values[0]}")
        else:
            arguments += [option] * bool(option.strip()) + values
    return arguments


def _files(case: Case) -> None:
    """What options may name, in the case's folder."""
    rng, bases = case.rng, folders.bases()
    folders.write(bases[rng.choice(("plain", "plain", "sharded"))], Path("model"))
    folders.write(bases[rng.choice(("gptq4", "gptq8", "act_order"))], Path("packed"))
    Path("dir").mkdir()
    os.mkfifo("fifo")
    for name, target in {
        "dangling": "nowhere",
        "loop": "loop",
        "endless": "/dev/zero",
        "full": "/dev/full",
    }.items():
        Path(name).symlink_to(target)
    Path("linked").symlink_to("text")
    Path("text").write_text("冰岛的首都是雷克雅未克. Some text, of 60 tokens or so.\n" * 2)
    Path("bytes").write_bytes(rng.randbytes(60))
    Path("empty").touch()
    Path("sparse").touch()
    os.truncate("sparse", 1 << 36)
    Path("ids").write_text(
        rng.choice(("1 2 3", "[[1, 2], [3]]", "[]", "1,,2", "-1", "9" * 400, "[[[1]]]", "[" * 9999))
    )
    turns = [["a", "b"]] if rng.random() < 0.7 else [["a"], 1, "x"]
    Path("saved").write_text(json.dumps({"format": "qwen_ref.chat", "system": "s", "history": turns}))
    Path("state").write_text(
        rng.choice(("", "{}\n", '{"format": 1}\n[]\n', "x", '{"format": "qwen_ref.perplexity"}\n'))
    )
    for name in ("bundle", "other"):
        shutil.copyfile(case.shared / name, name)
    case.named |= {
        "/dev/zero",
        "/dev/full",
        "/dev/fd/0",
        "/dev/stdin",
        "/",
        os.path.abspath(".."),
        str(Path.home()),
    }


class _Stream(io.TextIOWrapper):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def _streams(rng: random.Random) -> Iterator[tuple[Any, Any] | None]:
    """What a command finds as stdout and stderr; None: files that are read afterwards."""
    kind = rng.random()
    if kind < 0.8:
        yield None
    elif kind < 0.84:
        yield io.StringIO(), io.StringIO()
    elif kind < 0.88:
        yield capture("ascii", "strict"), capture("latin-1", "replace")
    elif kind < 0.92:
        yield _Stream(io.BytesIO(), encoding="utf-8"), _Stream(io.BytesIO(), encoding="utf-8")
    elif kind < 0.94:
        reading, writing = os.pipe()
        os.close(reading)
        with _given_up(os.fdopen(writing, "w")) as closed:
            yield closed, capture()
    elif kind < 0.98:
        with _given_up(open("/dev/full", "w")) as full:  # noqa: SIM115
            yield (full, capture()) if rng.random() < 0.5 else (capture(), full)
    else:
        yield (None, capture()) if rng.random() < 0.5 else (capture(), None)


@contextlib.contextmanager
def _given_up(stream: Any) -> Iterator[Any]:
    """A stream that cannot be flushed when it is closed."""
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _typed(rng: random.Random) -> bytes:
    """What is piped into the chat."""
    commands = (
        "/help",
        "/history",
        "/reset",
        "/retry",
        "/system",
        "/quit",
        "/save",
        "/nothing",
        "//a",
        "/",
        '"""',
        'a"""',
    )
    lines = []
    for _ in range(rng.randrange(4)):
        line = rng.choice(commands) if rng.random() < 0.6 else a_text(rng, 8)
        if line in ("/save", "/system", "/retry") and rng.random() < 0.7:
            line += f" {rng.choice((*_PATHS, 'saved', 'new'))}"
        lines.append(line.encode("utf-8", "surrogatepass"))
    return rng.choice((b"\n", b"\n", b"\r\n")).join(lines) + rng.choice((b"", b"\n", b"\xff", b"\xe5\x86"))


def run(case: Case) -> None:
    rng, name = case.rng, case.rng.choice(_DRAWN)
    main, words, asked, others = _COMMANDS[name]
    _files(case)
    before = {path: os.lstat(path) for path in _SPECIAL}
    stdin = rng.choice((b"", b"a", rng.randbytes(9), a_text(rng).encode("utf-8", "surrogatepass")))
    if name == "chat" and rng.random() < 0.6:
        asked, stdin = {}, _typed(rng)
    arguments = [*words, *_arguments(rng, asked, others)]
    with _streams(rng) as streams:
        may_differ = name in ("check", "diff", "diagnose")
        case.command(main, arguments, stdin, may_differ=may_differ, streams=streams)
    _check_left(case, before)


def _check_left(case: Case, before: dict[str, os.stat_result]) -> None:
    """What is no regular file is never replaced by one, and nothing half-written stays."""
    for path, old in before.items():
        new = os.lstat(path) if os.path.lexists(path) else None
        if new is None or (stat.S_IFMT(new.st_mode), new.st_ino) != (stat.S_IFMT(old.st_mode), old.st_ino):
            case.found(f"{path} is replaced by a file", " ".join(case.described))
    left = sorted(str(path) for path in Path().rglob("*") if ".part" in path.name)
    if left:
        case.found("leaves a partial file behind", ", ".join(left))


def prepare(shared: Path) -> None:
    folders.prepare(shared)
    pyplot()
    model = ["--model", str(shared / "plain")]
    for name, dtype in (("bundle", "float64"), ("other", "bfloat16")):
        if parity.main(["record", *model, "--prompt", "ab", "--dtype", dtype, "--out", str(shared / name)]):
            raise RuntimeError("a good folder cannot be recorded")


KIND = Kind("commands", prepare, run)


def _run_evaluate(case: Case) -> None:
    rng = case.rng
    _files(case)
    Path("task.yaml").write_text(_TASK if rng.random() < 0.8 else _TASK[: rng.randrange(len(_TASK))])
    question = json.dumps(
        {"question": a_text(rng), "choices": ["a", a_text(rng)], "answer": rng.choice((0, 0, 1, 2, -1, None))}
    )
    Path("questions.jsonl").write_text("\n".join([question] * 2))
    before = {path: os.lstat(path) for path in _SPECIAL}
    asked: Options = {"--tasks": _path("task.yaml", "task.yaml", "model,task.yaml", "no_such_task", "*")}
    case.command(evaluate.main, _arguments(rng, asked, _EVALUATE), chatty=True)
    _check_left(case, before)


def _prepare_evaluate(shared: Path) -> None:
    os.environ["HF_HOME"] = str(shared / "hf")  # read when the harness is imported
    prepare(shared)
    importlib.import_module("lm_eval.tasks")


EVALUATE = Kind("evaluate", _prepare_evaluate, _run_evaluate) if importlib.util.find_spec("lm_eval") else None
