"""Command lines of every command: good, borderline and absurd values, on files that are none."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ref.bench import __main__ as bench
from qwen_ref.chat import __main__ as chat
from qwen_ref.commands import generate
from qwen_ref.commands import inspect as checkpoint
from qwen_ref.commands.figures import pyplot
from qwen_ref.evaluate import __main__ as evaluate
from qwen_ref.parity import __main__ as parity
from qwen_ref.perplexity import __main__ as perplexity
from qwen_ref.trace import __main__ as trace

from . import folders
from .harness import Case, Kind, capture
from .values import HUGE, NOT_NUMBERS, NOT_WHOLE, a_text, words

# What stands in a case's folder, beside its model.
_SPECIAL = ("dir", "fifo", "dangling", "loop", "endless", "full", "linked")
_PATHS = (
    *_SPECIAL,
    *words(
        "text none no/such sparse empty bytes model model/config.json text/x . .. / - -- -x x.png ~ ~nouser/x"
    ),
    *words("/dev/null /dev/full /dev/zero /dev/fd/0 /dev/stdin a\0b \udcff \ud800 冰岛 \x1b[2J"),
    *("", " ", "a\nb", "x" * 250, "x" * 300, "x/" * 3000),
)
_WRONG = ("", HUGE, "float32 ", *words("x FLOAT32 int8 \ud800 \x1b[31m meta mps cuda cuda:99 cpu:7"))

# OPTION=KIND:GOOD,GOOD, or OPTION alone for a flag, or =KIND for an argument.
# KIND+ is a list with commas, KIND* several values.
_MODEL = " --model=path:model,packed"
_DTYPE = " --dtype=one:auto,float32,bfloat16,float16,float64"
_SPEED = " --fast --quantize=one:int8,int4 --group-size=one:32,64,128,256 --packed --kv-cache=one:int8"
_LOAD = f"{_MODEL}{_DTYPE}{_SPEED} --device=one:cpu --timeout=number:60,1"
_SAMPLING = (
    " --max-new-tokens=whole:1,2,3 --temperature=number --top-k=whole --top-p=number:0.1,0.5,1 --seed=whole"
    " --repetition-penalty=number:1,1.1,0.9,1e-45,1e38"
)
_SHOWN = " --json --full"

# Of each command: how often, its main, the words that come first, what it asks for, all else that it takes.
_COMMANDS: dict[str, tuple[int, Callable[[list[str]], int], str, str, str]] = {
    "generate": (
        *(8, generate.main, "", "=text"),
        f"{_LOAD}{_SAMPLING} --file=path:text --stop=text --lookup=whole:1,8 --allow-special --logprobs"
        " --json --echo --top-logprobs=whole",
    ),
    "chat": (
        *(5, chat.main, "", "--once=text"),
        f"{_LOAD}{_SAMPLING} --system=text --history=path:saved --lookup=whole:1,8 --save=path:saved,new"
        " --chat-format=one:chatml",
    ),
    "perplexity": (
        *(4, perplexity.main, "", "--text=path*:text,text,bytes --lengths=whole+:2,4,8"),
        f"{_LOAD} --stride=whole:1,2 --windows=whole:1,2 --batch-size=whole:1,2 --no-ntk --no-logn --json"
        " --state=path:state,new --plot=path:new.png",
    ),
    "trace": (
        *(3, trace.main, "", "=text"),
        f"{_MODEL}{_DTYPE} --file=path:text --layers=layers+ --lens --top=whole --allow-special --json",
    ),
    "inspect": (
        *(3, checkpoint.main, "inspect", "=path:model,packed,1.8b,7B,model/config.json"),
        " --tp=whole:1,2 --context=whole:1,100 --revision=text",
    ),
    "record": (
        *(3, parity.main, "record", "--prompt=text --out=path:new,bundle"),
        f"{_MODEL}{_DTYPE} --ids=path:ids --allow-special --stages=one:all,logits --decode=whole"
        " --rounding=one+:float32,bfloat16,none",
    ),
    "check": (
        *(3, parity.main, "check", "--golden=path:bundle"),
        f"{_MODEL}{_DTYPE}{_SHOWN} --plot=path:new.png",
    ),
    "diff": (
        *(3, parity.main, "diff", "=path:bundle =path:bundle,other"),
        f"{_MODEL}{_SHOWN} --plot=path:new.png",
    ),
    "diagnose": (1, parity.main, "diagnose", "--bundle=path:other,bundle", f"{_MODEL}{_SHOWN}"),
    "make": (
        *(1, parity.main, "make", "--like=one:1.8b,72b --out=path:new"),
        " --layers=whole:1,2 --hidden=whole:64,128 --heads=whole:1,2 --intermediate=whole:64,128"
        " --seq-length=whole:2,8 --vocab=whole:300,1024 --seed=whole --dtype=one:bfloat16,float16,float32"
        " --gptq=one:4,8 --vocabulary=path:text",
    ),
    "bench": (
        *(2, bench.main, "--lengths 2 --tokens 1 --repeats 1", ""),
        f"{_MODEL}{_DTYPE}{_SPEED} --lengths=whole*:1,2,4 --tokens=whole:1,2 --repeats=one:1,0,-1,{HUGE}"
        f" --json --device=one:cpu --batch=whole:1,2 --tp=one:1,0,-1,3,{HUGE}"
        " --against=one*:plain,plain:float32 --layers=whole --gptq=one:4,8 --timeout=number:60",
    ),
}
_DRAWN = [name for name, (often, *_) in _COMMANDS.items() for _ in range(often)]
_EVALUATE = (
    f"{_LOAD} --include-path=path:dir --num-fewshot=whole:0,1 --limit=number:1,2,0.5 --apply-chat-template"
    " --system=text --batch-size=whole:1,2 --max-length=whole:64,99 --gen-kwargs=settings+ --seed=whole"
    " --output=path:new --json"
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


_GOOD = {
    "whole": words("0 1 2 3"),
    "number": words("0 1 0.5 0.9 1e-5 2"),
    "layers": words("0 1 -1 0-1 -2--1"),
}
_BAD = {
    **{"whole": NOT_WHOLE, "number": NOT_NUMBERS, "path": _PATHS, "one": _WRONG},
    "layers": ("", HUGE, *words("1-0 99 -99 x 0- 1,,0")),
}


def _value(rng: random.Random, kind: str, good: str, wrong: bool) -> str:
    if kind == "text":
        return a_text(rng)
    if kind == "settings":
        return f"{rng.choice(('top_k', 'until', 'x', ''))}={rng.choice(NOT_NUMBERS)}"
    return rng.choice(_BAD[kind] if wrong else good.split(",") if good else _GOOD[kind])


def _option(rng: random.Random, spec: str, wrong: bool) -> list[str]:
    """An option of the tables above, with its values."""
    option, _, value = spec.partition("=")
    if not value:
        return [option]
    kind, _, good = value.partition(":")
    count = rng.randrange(0 if wrong else 1, 4) if kind[-1] in "+*" else 1
    values = [_value(rng, kind.rstrip("+*"), good, wrong) for _ in range(count)]
    if kind.endswith("+"):
        values = [",".join(values)]
    if option and len(values) == 1 and rng.random() < 0.5:
        return [f"{option}={values[0]}"]
    return [option] * bool(option) + values


def _arguments(rng: random.Random, first: str, asked: str, others: str) -> list[str]:
    """Options in any order, most often one of them with a wrong value; now and then one is left out."""
    chosen = [spec for spec in asked.split() if rng.random() < 0.95]
    chosen += rng.sample(others.split(), k=min(rng.choice((0, 1, 1, 2, 2, 3, 4)), len(others.split())))
    wrong = rng.sample(chosen, k=min(rng.choice((0, 0, 1, 1, 1, 1, 2)), len(chosen)))
    if "--model" in others and rng.random() < 0.9:
        chosen.insert(0, "--model=path:model")  # the bundled one is slower
    if rng.random() < 0.05:
        chosen.append(rng.choice(("--help", "--x", "-h", "--", "---", "-\ud800", "\x1b[2J")))
    rng.shuffle(chosen)
    return first.split() + [each for spec in chosen for each in _option(rng, spec, spec in wrong)]


def _files(case: Case, name: str) -> None:
    """What options may name, in the case's folder."""
    rng, bases = case.rng, folders.bases()
    folders.write(
        bases["one layer" if name == "diagnose" else rng.choice(("plain", "sharded"))], Path("model")
    )
    folders.write(bases[rng.choice(("gptq4", "gptq8", "act_order"))], Path("packed"))
    Path("dir").mkdir()
    os.mkfifo("fifo")
    links = words("dangling nowhere loop loop endless /dev/zero full /dev/full linked text")
    for link, target in zip(links[::2], links[1::2], strict=True):
        Path(link).symlink_to(target)
    Path("text").write_text("冰岛的首都是雷克雅未克. Some text, of 60 tokens or so.\n" * 2)
    Path("bytes").write_bytes(rng.randbytes(60))
    for path, size in (("empty", 0), ("sparse", 1 << 30)):
        Path(path).touch()
        os.truncate(path, size)
    Path("ids").write_text(rng.choice(("1 2 3", "[[1, 2], [3]]", "[]", "1,,2", "-1", "9" * 400, "[[[1]]]")))
    turns = [["a", "b"]] if rng.random() < 0.7 else [["a"], 1, "x"]
    Path("saved").write_text(json.dumps({"format": "qwen_ref.chat", "system": "s", "history": turns}))
    Path("state").write_text(
        rng.choice(("", "{}\n", '{"format": 1}\n[]\n', "x", '{"format": "qwen_ref.perplexity"}\n'))
    )
    for path in ("bundle", "other"):
        shutil.copyfile(case.shared / path, path)
    case.named |= {*_PATHS, os.path.abspath(".."), str(Path.home())}


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class _Interrupted(io.TextIOWrapper):
    """Ctrl-C comes while the first text is written."""

    interrupted = False

    def write(self, text: str) -> int:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return super().write(text)


@contextlib.contextmanager
def _streams(rng: random.Random) -> Iterator[tuple[Any, Any] | None]:
    """What a command finds as stdout and stderr; None: files that are read afterwards."""
    kind, broken = rng.random(), None
    if kind < 0.8:
        yield None
    elif kind < 0.84:
        yield io.StringIO(), io.StringIO()
    elif kind < 0.88:
        yield capture("ascii", "strict"), capture("latin-1", "replace")
    elif kind < 0.9:
        yield _Interrupted(io.BytesIO(), encoding="utf-8", errors="backslashreplace"), capture()
    elif kind < 0.93:
        yield _Terminal(io.BytesIO(), encoding="utf-8"), _Terminal(io.BytesIO(), encoding="utf-8")
    else:
        if kind < 0.95:  # nobody reads
            reading, writing = os.pipe()
            os.close(reading)
            broken = os.fdopen(writing, "w")
        elif kind < 0.98:
            broken = open("/dev/full", "w")  # noqa: SIM115
        yield rng.choice(((broken, capture()), (capture(), broken)))
        with contextlib.suppress(OSError, AttributeError):  # it cannot be flushed; None: it was closed
            broken.close()


def _typed(rng: random.Random) -> bytes:
    """What is piped into the chat."""
    lines = []
    for _ in range(rng.randrange(4)):
        commands = words('/help /history /reset /retry /system /quit /save /nothing //a / """ a"""')
        line = rng.choice(commands) if rng.random() < 0.6 else a_text(rng, 8)
        if line in ("/save", "/system", "/retry") and rng.random() < 0.7:
            line += f" {rng.choice((*_PATHS, 'saved', 'new'))}"
        lines.append(line.encode("utf-8", "surrogatepass"))
    return rng.choice((b"\n", b"\n", b"\r\n")).join(lines) + rng.choice((b"", b"\n", b"\xff", b"\xe5\x86"))


def check_left(case: Case, before: dict[str, os.stat_result]) -> None:
    """What is no regular file is never replaced by one, and nothing half-written stays."""
    for path, old in before.items():
        new = os.lstat(path) if os.path.lexists(path) else None
        if new is None or (stat.S_IFMT(new.st_mode), new.st_ino) != (stat.S_IFMT(old.st_mode), old.st_ino):
            case.found(f"{path} is replaced by a file")
    if left := sorted(str(path) for path in Path().rglob("*") if ".part" in path.name):
        case.found("leaves a partial file behind", ", ".join(left))


def run(case: Case) -> None:
    rng, name = case.rng, case.rng.choice(_DRAWN)
    _, main, first, asked, others = _COMMANDS[name]
    _files(case, name)
    before = {path: os.lstat(path) for path in _SPECIAL}
    stdin = rng.choice((b"", b"a", rng.randbytes(9), a_text(rng).encode("utf-8", "surrogatepass")))
    if name == "chat" and rng.random() < 0.6:
        asked, stdin = "", _typed(rng)
    allows = {"chat": ["several errors"], "check": ["code 1"], "diff": ["code 1"], "diagnose": ["code 1"]}
    if rng.random() < 0.03:  # as torchrun starts a rank, or as something else has left it
        os.environ.update(WORLD_SIZE="1", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")
        os.environ[rng.choice(words("WORLD_SIZE MASTER_PORT LOCAL_RANK"))] = rng.choice(("", "0", "-1", "x"))
    with _streams(rng) as streams:
        arguments = _arguments(rng, first, asked, others)
        case.command(main, arguments, stdin, allows.get(name, ()), streams)
    check_left(case, before)


def prepare(shared: Path) -> None:
    folders.prepare(shared)
    pyplot()
    for name, dtype in (("bundle", "float64"), ("other", "bfloat16")):
        folders.record(shared / "one layer", shared / name, "--prompt", "ab", "--dtype", dtype)


KIND = Kind("commands", prepare, run)


def _run_evaluate(case: Case) -> None:
    rng = case.rng
    _files(case, "evaluate")
    case.starts = True  # lm_eval reports git's commit and pip's list
    Path("task.yaml").write_text(_TASK if rng.random() < 0.8 else _TASK[: rng.randrange(len(_TASK))])
    text, choice = (a_text(rng, 9).encode("utf-8", "replace").decode() for _ in range(2))
    answer = rng.choice((0, 0, 0, 1, 2, -1, None))
    question = json.dumps({"question": text, "choices": ["a", choice], "answer": answer})
    Path("questions.jsonl").write_text(f"{question}\n" * 2)
    before = {path: os.lstat(path) for path in _SPECIAL}
    tasks = rng.choice(("task.yaml", "task.yaml", "task.yaml,task.yaml,model,*,none"))
    arguments = _arguments(rng, "", f"--tasks=path+:{tasks}", _EVALUATE)
    case.command(evaluate.main, arguments, allows=["other lines"])
    check_left(case, before)


def _prepare_evaluate(shared: Path) -> None:
    os.environ["HF_HOME"] = str(shared / "hf")  # read when the harness is imported
    prepare(shared)
    tasks = importlib.import_module("lm_eval.tasks")
    # Without the index of the harness's own tasks, which takes seconds of each case.
    tasks.TaskManager = partial(tasks.TaskManager, include_defaults=False)


EVALUATE = Kind("evaluate", _prepare_evaluate, _run_evaluate) if importlib.util.find_spec("lm_eval") else None
