"""Several ranks as processes: what rank 0 says for all, and what the others say when one of them is gone."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS, Result, change_json, python
from forked_ranks import TORCHRUN, Forked, command, free_port, run_ranks, variables

from qwen_ref import load_model
from qwen_ref.commands.generate import main
from qwen_ref.commands.ranks import Ranks
from qwen_ref.commands.watch import WatchedRanks, _Watch
from qwen_ref.loading.launch import Launch, launched

QUESTION, ANSWER = "冰岛的首都是", "雷克雅未克（Reykjavik）"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def generate_command(*arguments: str) -> int:
    return command("qwen_ref.generate", *arguments)


def late(*arguments: str) -> int:
    """The rank that LATE names does not come in time."""
    if os.environ["RANK"] == os.environ["LATE"]:
        time.sleep(60)
    return main(arguments)


class Processes:
    """Ranks started without torchrun, which would end them all by itself when one dies."""

    def __init__(
        self,
        folder: Path,
        function: Callable[..., int],
        ranks: Sequence[list],
        environment: dict[str, str],
        leader_stdout: int | None,
        leader_stdin: int | None,
    ) -> None:
        self.port = free_port()
        self.files = [(folder / f"out{rank}", folder / f"err{rank}") for rank in range(len(ranks))]
        self.ranks = []
        for rank, (arguments, (out, err)) in enumerate(zip(ranks, self.files, strict=True)):
            with out.open("wb") as stdout, err.open("wb") as stderr:
                process = Forked(
                    function,
                    [str(argument) for argument in arguments],
                    variables(rank, len(ranks), self.port) | environment,
                    None if rank else leader_stdin,
                    stdout.fileno() if rank or leader_stdout is None else leader_stdout,
                    stderr.fileno(),
                )
            self.ranks.append(process)

    def results(self, timeout: float = 60) -> list[Result]:
        end = time.monotonic() + timeout
        codes = [process.wait(timeout=max(end - time.monotonic(), 0.1)) for process in self.ranks]
        return [
            Result(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
            for code, (out, err) in zip(codes, self.files, strict=True)
        ]

    def wait_until_met(self) -> None:
        """Returns when every rank has its three connections to the store."""
        met = 0
        while met < 3 * len(self.ranks):
            assert all(process.poll() is None for process in self.ranks)
            time.sleep(0.02)
            tables = [Path(f"/proc/net/{kind}").read_text() for kind in ("tcp", "tcp6")]
            lines = [line.split() for line in "".join(tables).splitlines()]
            met = sum(line[2].endswith(f":{self.port:04X}") and line[3] == "01" for line in lines)
        time.sleep(0.3)  # the watch begins

    def wait_for_text(self) -> None:
        """Returns when rank 0 has printed something: it decodes now."""
        while not self.files[0][0].stat().st_size:
            assert self.ranks[0].poll() is None, self.files[0][1].read_text()
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    """Starts a rank for every list of arguments given."""
    started: list[Processes] = []

    def call(
        *ranks: list,
        function: Callable[..., int] = generate_command,
        stdout: int | None = None,
        stdin: int | None = None,
        **environment: str,
    ) -> Processes:
        started.append(Processes(tmp_path, function, ranks, environment, stdout, stdin))
        return started[-1]

    yield call
    for processes in started:
        for process in processes.ranks:
            process.kill()
            process.wait()


@pytest.fixture
def silence() -> Iterator[int]:
    """A stdin that says nothing and does not end."""
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


@pytest.fixture
def endless(folder: Path) -> list[str | Path]:
    """Arguments for a generation that does not end by itself."""
    change_json(folder / "generation_config.json", eos_token_id=0, chat_format="raw")
    return ["--model", folder, QUESTION, "--max-new-tokens", "100000", "--temperature", "1", "--seed", "1"]


TWICE = f"""
from qwen_ref.commands.generate import main
arguments = [{QUESTION!r}, "--stop", "\\n", "--dtype", "float32"]
assert [main(arguments), main(arguments)] == [0, 0]
"""


def test_under_torchrun_main_prints_one_answer_as_often_as_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE, encoding="utf-8")
    done = python(*TORCHRUN, "2", tmp_path / "twice.py")
    assert done.code == 0, done.err
    assert done.out == f"{ANSWER}\n" * 2
    said = [line for line in done.err.splitlines() if line.startswith("qwen_ref")]
    assert said[0] == said[4] == "qwen_ref: each of 2 ranks reads 0.002 GB of the checkpoint"
    assert len(said) == 8


def held() -> dict[str, object]:
    """What a process has that a run may have left to it."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "wakeup": wakeup,
        "files": len(os.listdir("/proc/self/fd")),
        "excepthook": sys.excepthook,
        "process group": torch.distributed.is_initialized(),
    }


def run_after_run() -> None:
    """Commands one after another in this process, and what is left by each."""
    listen = _Watch._listen

    def slow(watch: _Watch, store: torch.distributed.Store) -> None:
        listen(watch, store)
        time.sleep(0.3)

    select_as_it_is, kinds = select.select, set()

    def recorded(readers: list, *others: object) -> tuple:
        kinds.update(map(type, readers))
        return select_as_it_is(readers, *others)

    select.select = recorded
    _Watch._listen = slow  # a thread that nobody waits for is seen
    with WatchedRanks(launched(), 5):
        pass
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, handler)
    before = held()  # torch keeps two files of the first store that a process serves
    plain = [QUESTION, "--stop", "\n"]
    for arguments in (plain, [*plain, "--lookup", "--fast"], plain):
        assert main(arguments) == 0
        assert held() == before
    with WatchedRanks(launched(), 5) as ranks:
        assert ranks.share(TEXT if ranks.rank == 0 else None) == TEXT
    assert held() == before
    assert kinds == {socket.socket}  # Windows can wait for nothing else
    torch.distributed.init_process_group("gloo")  # the caller's own stays
    assert main(plain) == 0
    assert torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    os.close(read)
    os.close(write)


TEXT = "a name that is no UTF-8 \udcff, and no characters \ud800"


def handler(*_: object) -> None:
    pass


def test_nothing_is_left_of_a_run_and_another_may_follow(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, run_after_run)[0] == f"{ANSWER}\n" * 4


def test_several_ranks_need_the_main_thread() -> None:
    def enter() -> None:
        try:
            with WatchedRanks(Launch(0, 2, 0, "127.0.0.1", 1)):
                pass
        except ValueError as error:
            found.append(str(error))

    found: list[str] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "must run in the main thread" in found[0]
    with Ranks():
        pass


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
            (line,) = [line for line in result.err.splitlines() if "error: " in line]
            assert f"rank {victim}" in line, line
            assert " is gone" in line, line


@pytest.mark.alone
@pytest.mark.parametrize(
    ("how", "victim"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGKILL, 3), (signal.SIGSTOP, 0), (signal.SIGSTOP, 2)],
)
def test_a_rank_lost_while_decoding_is_named_by_all_others(
    start: Callable, endless: list, victim: int, how: signal.Signals
) -> None:
    processes = start(*[[*endless, "--timeout", "4"]] * 4)
    processes.wait_for_text()
    processes.ranks[victim].send_signal(how)
    lost = time.monotonic()
    others = [process for rank, process in enumerate(processes.ranks) if rank != victim]
    for process in others:
        process.wait(timeout=30)
    assert time.monotonic() - lost < 4
    processes.ranks[victim].kill()
    check_that_the_others_name(victim, processes.results())


@pytest.mark.alone
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_rank_0_lost_while_it_waits_for_the_prompt_is_named(
    start: Callable, how: signal.Signals, silence: int
) -> None:
    processes = start(*[["--timeout", "3"]] * 2, stdin=silence)
    processes.wait_until_met()
    time.sleep(1.6)  # longer than half the timeout, which is no reason to give up
    assert all(process.poll() is None for process in processes.ranks)
    processes.ranks[0].send_signal(how)
    processes.ranks[1].wait(timeout=3)
    processes.ranks[0].kill()
    check_that_the_others_name(0, processes.results())


@pytest.mark.alone
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_before_all_have_met_is_given_up_in_time(start: Callable, victim: int) -> None:
    processes = start(*[[QUESTION, "--timeout", "1.5"]] * 2, function=late, LATE=str(victim))
    time.sleep(0.3)
    processes.ranks[victim].kill()
    result = processes.results(timeout=3)[1 - victim]
    assert result.code == 1
    assert "not all of 2 ranks came to 127.0.0.1" in result.err
    assert "Traceback" not in result.err


def waiting(pipe: int) -> int:
    """Bytes in a pipe that nobody has read."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


@pytest.mark.alone
def test_a_reader_that_takes_its_time_does_no_harm(start: Callable, endless: list) -> None:
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    processes = start(*[[*endless, "--logprobs", "--timeout", "3"]] * 2, stdout=write)
    os.close(write)
    while waiting(read) < size - 100:  # no line is as long as that
        assert processes.ranks[0].poll() is None
        time.sleep(0.02)
    time.sleep(3.5)  # nobody reads for longer than the timeout
    assert all(process.poll() is None for process in processes.ranks)
    processes.ranks[0].send_signal(signal.SIGINT)
    with os.fdopen(read, "rb") as pipe:
        assert len(pipe.read()) > size - 100
    leader, follower = processes.results()
    assert leader.code == 130
    assert follower == Result(0, "", "")


@pytest.mark.alone
def test_rank_0_killed_before_it_could_print_is_not_taken_for_an_end(start: Callable, endless: list) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    shorter = [*endless, "--json", "--timeout", "4"]
    shorter[shorter.index("100000")] = "100"
    processes = start(shorter, shorter, stdout=write)
    os.close(write)
    while not waiting(read):  # all of it does not fit: rank 0 waits
        assert processes.ranks[0].poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    processes.ranks[0].kill()
    check_that_the_others_name(0, processes.results(timeout=4))
    os.close(read)


def slow_reader(*arguments: str) -> int:
    from qwen_ref.checkpoint import StoredTensor

    read = StoredTensor.read

    def slow(tensor: StoredTensor) -> torch.Tensor:
        print("it reads", file=sys.stderr, flush=True)
        time.sleep(float(os.environ["SECONDS"]))
        return read(tensor)

    StoredTensor.read = slow
    return main(arguments)


@pytest.mark.alone
@pytest.mark.parametrize("seconds", [0.1, 100], ids=["between two layers", "whatever the others are doing"])
def test_a_rank_killed_while_loading_is_named_by_all_others(start: Callable, seconds: float) -> None:
    processes = start(*[[QUESTION, "--timeout", "4"]] * 2, function=slow_reader, SECONDS=str(seconds))
    while not all("it reads" in err.read_text() for _, err in processes.files):
        assert processes.ranks[0].poll() is None
        time.sleep(0.02)
    processes.ranks[1].kill()
    check_that_the_others_name(1, processes.results(timeout=4))


def starved(*arguments: str) -> int:
    """Rank 1 finds too little memory in the third pass, while rank 0 waits for it in a collective."""
    from qwen_ref import Qwen

    compute, passes = Qwen.hidden_states, []

    def hidden_states(model: Qwen, *inputs: torch.Tensor) -> torch.Tensor:
        passes.append(inputs)
        if model.group.rank == 1 and len(passes) == 3:
            torch.empty(2**60, dtype=torch.uint8)
        return compute(model, *inputs)

    Qwen.hidden_states = hidden_states
    return main(arguments)


def test_too_little_memory_for_one_rank_ends_the_others_with_code_2(start: Callable, endless: list) -> None:
    leader, _ = start(endless, endless, function=starved).results()
    assert leader.code == 2
    (line,) = [line for line in leader.err.splitlines() if "error: " in line]
    assert "rank 1 failed: " in line
    assert f"too little memory: {2**60:,} bytes" in line


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.alone
@pytest.mark.parametrize("killed", ["a rank", "torchrun"])
def test_under_torchrun_no_process_is_left(endless: list, killed: str, tmp_path: Path) -> None:
    command = [*TORCHRUN, "2", "-m", "qwen_ref.generate", *map(str, endless), "--timeout", "10"]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        torchrun = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err)
    try:
        while not (tmp_path / "out").stat().st_size:
            assert torchrun.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.02)
        ranks = sorted(children(torchrun.pid))
        assert len(ranks) == 2
        os.kill(ranks[1] if killed == "a rank" else torchrun.pid, signal.SIGKILL)
        assert torchrun.wait(timeout=10) != 0
        end = time.monotonic() + 10
        while not all(map(gone, ranks)):
            assert time.monotonic() < end
            time.sleep(0.05)
        said = (tmp_path / "err").read_text()
        gone_is = "rank 1 is gone" if killed == "a rank" else "torchrun, which keeps"
        assert f"qwen_ref: error: {gone_is}" in said
    finally:
        for process in [*children(torchrun.pid), torchrun.pid]:
            if not gone(process):
                os.kill(process, signal.SIGKILL)


# Bad input


def test_one_rank_that_cannot_load_stops_all_with_its_message(start: Callable, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"{}")
    for result in start([QUESTION, "--model", WEIGHTS], [QUESTION, "--model", folder]).results():
        assert result.code == 2
        assert f"error: rank 1: {folder}: model.safetensors: not a complete safetensors file" in result.err
        assert result.out == ""


def test_ranks_with_different_folders_are_refused_with_both(start: Callable, folder: Path) -> None:
    change_json(folder / "config.json", rotary_emb_base=10000)
    for result in start([QUESTION, "--model", WEIGHTS], [QUESTION, "--model", folder]).results():
        assert result.code == 2
        assert f"rank 1 ({folder}) and rank 0 ({WEIGHTS}) differ" in result.err
        assert "rotary_emb_base is 10000" in result.err


def test_a_folder_that_one_machine_lacks_is_named_by_all(start: Callable) -> None:
    for result in start([QUESTION], [QUESTION, "--model", "/nowhere"]).results():
        assert result.code == 2
        assert "error: rank 1: /nowhere: not a folder" in result.err


def test_ctrl_c_before_the_prompt_ends_all(start: Callable, silence: int) -> None:
    processes = start([], [], stdin=silence)
    processes.wait_until_met()
    processes.ranks[0].send_signal(signal.SIGINT)
    leader, follower = processes.results(timeout=10)
    assert (leader.code, leader.err) == (130, "qwen_ref: interrupted\n")
    assert (follower.code, follower.err) == (1, "qwen_ref, rank 1: error: rank 0 failed: KeyboardInterrupt\n")


def test_a_prompt_that_is_wrong_ends_all(start: Callable) -> None:
    leader, follower = start(["", "--model", WEIGHTS], ["", "--model", WEIGHTS]).results(timeout=20)
    assert leader == Result(
        2, "", "qwen_ref: error: the prompt is empty; give it as an argument, with --file or on stdin\n"
    )
    assert follower.code == 1
    assert "rank 0 failed: the prompt is empty" in follower.err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 in the environment without RANK, MASTER_ADDR, MASTER_PORT: start",
        ),
        ({"RANK": "0"}, "RANK=0 in the environment without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here"}, "without MASTER_PORT"),
        ({"WORLD_SIZE": ""}, "without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "rank=2, size=2"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "rank=-1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "port=65536"),
        (
            {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "over 3 ranks; use 1, 2 or 4",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_named_at_once(
    variables: dict, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([QUESTION]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(timeout: str, capsys: pytest.CaptureFixture) -> None:
    assert main([QUESTION, f"--timeout={timeout}"]) == 2
    assert "must be a number of seconds" in capsys.readouterr().err


@pytest.mark.alone
def test_ranks_that_never_come_are_given_up(start: Callable) -> None:
    (result,) = start([QUESTION, "--timeout", "1"], WORLD_SIZE="2").results(timeout=20)
    assert result.code == 1
    assert "not all of 2 ranks came to 127.0.0.1:" in result.err
    assert "Traceback" not in result.err


def test_a_port_that_something_else_holds_is_named(start: Callable) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        (result,) = start([QUESTION], WORLD_SIZE="2", MASTER_PORT=port).results(timeout=20)
    assert result.code == 1
    assert f"error: the ranks could not meet at 127.0.0.1:{port}: " in result.err
    assert "Traceback" not in result.err


def test_a_single_rank_of_torchrun_needs_no_process_group(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert main([QUESTION, "--stop", "\n"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert load_model(WEIGHTS, group="world").group.size == 1
