"""What several tests share: the golden data, the real vocabulary, the measure of error."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

# Tests run side by side, on models so small that a second thread costs more than it computes: it would wait
# for the processor that another test has. Before torch and NumPy are there, and for tests' processes, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from qwen_ref import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
WEIGHTS = ROOT / "weights"
VOCABULARY = ROOT / ".vocab" / "qwen.tiktoken"


def read_golden(folder: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / folder / "golden.safetensors")


def read_jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


# Files whose numbers come from torch's kernels: `make kernels` runs them on its older ones as well.
KERNELS = {
    *(
        "test_model",
        "test_parity",
        "test_parity_kit",
        "test_numpy_reference",
        "test_diagnose",
        "test_forward",
        "test_right_ports",
        "test_make",
        "test_quantize",
    ),
    *(
        "test_fast",
        "test_forms",
        "test_gptq",
        "test_generate",
        "test_lookup",
        "test_prefill",
        "test_sampling",
    ),
    *("test_perplexity", "test_trace", "test_parallel", "test_kernels"),
}


def command(name: str) -> Callable[[list[str]], int]:
    """The main of `python -m qwen_ref.NAME`, to be called in this process."""
    module = {"generate": "commands.generate", "checkpoint": "commands.inspect"}.get(name, f"{name}.__main__")
    return importlib.import_module(f"qwen_ref.{module}").main


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def refused(result: Result) -> str:
    """The one line that says what was wrong."""
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("qwen_ref: error: ")
    return line


def python(*arguments: str | Path, stdin: str = "", **environment: str) -> Result:
    """What `python arguments` does in a process of its own, with the package of this checkout."""
    environment = {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=stdin,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        cwd=ROOT,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where tests run side by side (pytest-xdist): one that is marked alone waits for the others, and they
    for it. Its ranks have seconds to answer, and need the processor for that.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import fcntl

    shared = tmp_path_factory.getbasetemp().parent  # by all workers
    with (shared / "queue.lock").open("w") as queue, (shared / "turn.lock").open("w") as turn:
        fcntl.flock(queue, fcntl.LOCK_EX)  # who waits for all others lets none pass
        alone = request.node.get_closest_marker("alone") is not None
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


@pytest.fixture
def never_hangs() -> Iterator[None]:
    """What waits for a pipe would wait for ever: fail after 30 s instead."""

    def expire(*_: object) -> None:
        raise AssertionError("still waiting after 30 s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# What is no regular file, and how it is named.
SPECIAL_FILES = {"pipe": "a pipe", "device": "a device", "socket": "a socket", "folder": "a folder"}


@pytest.fixture(params=SPECIAL_FILES)
def special(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, never_hangs: None
) -> Iterator[tuple[Path, str]]:
    """A file that never ends or never begins, and what it is."""
    path = tmp_path_factory.mktemp("special") / "it"
    with socket.socket(socket.AF_UNIX) as bound:
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path = Path("/dev/zero")
        elif request.param == "socket":
            bound.bind(str(path))
        else:
            path.mkdir()
        yield path, SPECIAL_FILES[request.param]


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command's main in this process; its code and output. stdin: the bytes to find there."""

    def call(main: Callable[[list[str]], int], *arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(params=["tiktoken", "python"])
def engine_options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What asks a tool for one engine of the tokenizer, while the other fails; nothing asks for tiktoken."""
    if request.param == "python":
        monkeypatch.setattr("tiktoken.Encoding", None)
        return ["--tokenizer-engine", "python"]
    monkeypatch.setattr("qwen_ref.loading.tokenizer.FastTokenizer._encode_ordinary", None)
    return []


def cli_of(main: Callable[[list[str]], int]) -> Callable[..., Run]:
    """A fixture for a file whose tests run one command: run_command with its main."""
    return pytest.fixture(lambda run_command: partial(run_command, main))


def example_of(path: str) -> Callable[..., ModuleType]:
    """A fixture for a file that tests a module of examples/: the module, with its folder on the path."""
    room, name = path.split("/")

    def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "examples" / room)
        return importlib.import_module(name)

    return pytest.fixture(module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to change."""
    return shutil.copytree(WEIGHTS, tmp_path / "checkpoint")


def golden_copy(golden: str, folder: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    folder.mkdir()
    for file in (GOLDEN / golden).iterdir():
        if file.name != "golden.safetensors":
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return golden_copy("ntk_logn", tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return golden_copy("extended_base", tmp_path / "sharded")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes a folder's tensors; in memory: mapped ones would change with the file."""
    tensors = load((folder / "model.safetensors").read_bytes())
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def relative_rms(values: Tensor, truth: Tensor) -> float:
    """√(Σ (values − truth)² / Σ truth²), in float64."""
    values, truth = values.double(), truth.double()
    return float(((values - truth).square().sum() / truth.square().sum()).sqrt())


@pytest.fixture(scope="session")
def vocabulary_file() -> Path:
    """The published qwen.tiktoken. It is too large for git: `make vocab` fetches it."""
    if not VOCABULARY.exists():
        message = "the real vocabulary is not here; `make vocab` fetches it (needs network)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return VOCABULARY


@pytest.fixture(scope="session")
def own() -> Tokenizer:
    """The tokenizer of the tiny checkpoint."""
    return Tokenizer.from_file(WEIGHTS / "qwen.tiktoken")


@pytest.fixture(scope="session")
def tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.from_file(vocabulary_file)


@pytest.fixture(scope="session")
def tiktoken_tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.from_file(vocabulary_file, engine="tiktoken")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in KERNELS:
            item.add_marker(pytest.mark.kernels)
        if hasattr(item, "callspec") and item.callspec.params.get("ranks") == 4:  # they share two cores
            item.add_marker(pytest.mark.slow)


def pytest_configure() -> None:
    torch.set_num_threads(1)  # whatever the environment says
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # as a shell leaves it to what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else tests' processes would ignore it, too


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
