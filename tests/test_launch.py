"""Several ranks as processes: what rank 0 says for all, and what the others say when one of them is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import WEIGHTS

COMMAND = [sys.executable, "-m", "qwen_ref.generate"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
QUESTION, ANSWER = "冰岛的首都是", "雷克雅未克（Reykjavik）"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Processes:
    """Ranks started without torchrun, which would end them all by itself when one dies."""

    def __init__(
        self, folder: Path, commands: Sequence[list], environment: dict[str, str], leader_stdout: int | None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.files = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(len(commands))]
        self.ranks = []
        for rank, (command, (out, err)) in enumerate(zip(commands, self.files, strict=True)):
            variables = {"RANK": rank, "WORLD_SIZE": len(commands), "LOCAL_RANK": rank, "MASTER_PORT": port}
            variables |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1, **environment}
            with out.open("wb") as stdout, err.open("wb") as stderr:
                process = subprocess.Popen(
                    [*COMMAND, *map(str, command)],
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout if rank or leader_stdout is None else leader_stdout,
                    stderr=stderr,
                )
            self.ranks.append(process)

    def results(self, timeout: float = 60) -> list[Result]:
        end = time.monotonic() + timeout
        codes = [process.wait(timeout=max(end - time.monotonic(), 0.1)) for process in self.ranks]
        return [
            Result(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
            for code, (out, err) in zip(codes, self.files, strict=True)
        ]

    def wait_for_text(self) -> None:
        """Returns when rank 0 has printed something: it decodes now."""
        while not self.files[0][0].stat().st_size:
            assert self.ranks[0].poll() is None, self.files[0][1].read_text()
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    """Starts a rank for every list of arguments given."""
    started: list[Processes] = []

    def call(*commands: list, stdout: int | None = None, **environment: str) -> Processes:
        started.append(Processes(tmp_path, commands, environment, stdout))
        return started[-1]

    yield call
    for processes in started:
        for process in processes.ranks:
            process.kill()
            process.wait()


@pytest.fixture
def endless(tmp_path: Path) -> list[str | Path]:
    """Arguments for a generation that does not end by itself."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "endless")
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"eos_token_id": 0, "chat_format": "raw"}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return ["--model", folder, QUESTION, "--max-new-tokens", "100000", "--temperature", "1", "--seed", "1"]


def test_torchrun_prints_one_answer() -> None:
    command = [*TORCHRUN, "2", "-m", "qwen_ref.generate", QUESTION, "--stop", "\n", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == ANSWER + "\n"
    said = [line for line in done.stderr.decode().splitlines() if line.startswith("qwen_ref")]
    assert said[0] == "qwen_ref: each of 2 ranks reads 0.002 GB of the checkpoint"
    assert len(said) == 4


def test_other_ranks_are_silent_and_end_when_rank_0_has_its_stop_text(start: Callable) -> None:
    first, *others = start(*[[QUESTION, "--stop", "\n", "--json"]] * 2).results()
    assert json.loads(first.out)["text"] == ANSWER
    assert first.code == 0
    assert others == [Result(0, "", "")]


@pytest.mark.parametrize("to_all", [False, True])
def test_ctrl_c_ends_all_with_what_was_generated(start: Callable, endless: list, to_all: bool) -> None:
    processes = start(endless, endless)
    processes.wait_for_text()
    for process in processes.ranks[: 2 if to_all else 1]:
        process.send_signal(signal.SIGINT)
    leader, follower = processes.results(timeout=10)
    assert leader.code == 130
    assert "decode" in leader.err.splitlines()[-1]
    assert leader.out.endswith("\n")
    assert follower == Result(0, "", "")


def test_a_closed_stdout_ends_all_quietly(start: Callable, endless: list) -> None:
    read, write = os.pipe()
    os.close(read)
    processes = start(endless, endless, stdout=write)
    os.close(write)
    leader, follower = processes.results(timeout=30)
    assert leader.code == 141
    assert "Traceback" not in leader.err
    assert follower == Result(0, "", "")


# A rank that is gone


def check_that_the_others_name(victim: int, results: list[Result]) -> None:
    for rank, result in enumerate(results):
        if rank != victim:
            assert result.code == 1, result
            assert "Traceback" not in result.err
            last = result.err.splitlines()[-1]
            assert f"rank {victim}" in last, last
            assert " is gone" in last, last


@pytest.mark.parametrize(
    ("how", "victim"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGSTOP, 0), (signal.SIGSTOP, 2)],
)
def test_a_rank_lost_while_decoding_is_named_by_all_others(
    start: Callable, endless: list, victim: int, how: signal.Signals
) -> None:
    processes = start(*[[*endless, "--timeout", "6"]] * 4)
    processes.wait_for_text()
    processes.ranks[victim].send_signal(how)
    lost = time.monotonic()
    others = [process for rank, process in enumerate(processes.ranks) if rank != victim]
    for process in others:
        process.wait(timeout=30)
    assert time.monotonic() - lost < 6
    processes.ranks[victim].kill()
    check_that_the_others_name(victim, processes.results())
