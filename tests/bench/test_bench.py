"""The bench counts what it says it counts, in the order that it says, and refuses what it cannot time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import WEIGHTS, Run, cli_of, refused

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench import measure as bench
from qwen_ref.bench.__main__ import main
from qwen_ref.bench.measure import Memory, Subject, bytes_per_token, measure
from qwen_ref.bench.report import table
from qwen_ref.bench.synthetic import synthetic
from qwen_ref.fast.layers import fasten

cli = cli_of(main)
QUICK = ("--lengths", "3", "5", "--tokens", "2", "--repeats", "2")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_READ_BYTES", 2**20)


def test_the_table_has_a_row_for_everything_asked(cli: Run) -> None:
    done = cli(*QUICK, "--fast", "--against", "plain", "plain:float32")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert re.search(r"\d+ cores, \d+ threads, .*, torch \d", lines[0])
    assert lines[1].startswith("kernels: bag for qkv, out, gate, up, down, lm_head")
    assert "4 layers; batch 1, 2 tokens decoded, 2 repeats: median (smallest to largest)" in lines[2]
    heads = next(line for line in lines if "ratio" in line).split("  ")
    assert [head.strip() for head in heads if head.strip()] == [
        "qwen_ref bfloat16 fast",
        "plain bfloat16",
        "ratio",
        "plain float32",
        "ratio",
    ]
    for length in (3, 5):
        at = next(n for n, line in enumerate(lines) if line.startswith(f"prefill of {length}, tokens/s"))
        names = [line.split("  ")[0] or line.split("  ")[1] for line in lines[at : at + 7]]
        assert names == [
            f"prefill of {length}, tokens/s",
            "first token after, s",
            f"decode at {length}, tokens/s",
            "read for a token, GB",
            "read, GB/s",
            "memory can be read at, GB/s",
            "share of that",
        ]


def test_json_has_every_repeat(cli: Run) -> None:
    done = cli(*QUICK, "--quantize", "int8", "--against", "plain", "--json")
    found = json.loads(done.out)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert set(found["subjects"]) == {"qwen_ref bfloat16 quantize=int8", "plain bfloat16"}
    for lengths in found["subjects"].values():
        assert set(lengths) == {"3", "5"}
        for length, timing in lengths.items():
            assert all(len(values) == 2 and min(values) > 0 for values in timing.values())
            for speed, first in zip(timing["prefill"], timing["first_token"], strict=True):
                assert math.isclose(speed * first, int(length), rel_tol=1e-9)
    assert found["peak_memory"].keys() == {"while loading", "while running", "cache"}


def test_ranks_are_started(capfd: pytest.CaptureFixture) -> None:
    assert main(["--tp", "2", *QUICK, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["ranks"], found["model"]) == (2, "tiny")
    # Half of every matrix; the norms whole.
    half = sum(p.nbytes for p in load_model(WEIGHTS, "auto").parameters()) / 2
    assert half < found["resident_weights"] < 1.01 * half


def test_what_ranks_find_wrong_is_passed_on(capfd: pytest.CaptureFixture) -> None:
    assert main(["--tp", "2", *QUICK, "--fast", "--dtype", "float64"]) == 2
    done = capfd.readouterr()
    assert done.out == ""
    assert all(line.startswith("qwen_ref") for line in done.err.splitlines())
    assert "qwen_ref: error: rank 0: float64 has no faster layers" in done.err


def test_the_table_counts_all_rows_and_compares_medians() -> None:
    ours = {
        "prefill": [10.0, 20, 30],
        "first_token": [1.0] * 3,
        "decode": [6.0, 4, 5],
        "read_rate": [2e9] * 3,
    }
    theirs = {**ours, "prefill": [5.0, 4, 3], "decode": [2.5, 2.5, 1]}
    result = {
        "machine": {"processor": "a", "cores": 2, "threads": 2, "instructions": "b", "torch": "c"},
        "model": "m",
        "layers": 1,
        "ranks": 1,
        "batch": 2,
        "tokens": 3,
        "repeats": 3,
        "load_seconds": 1.0,
        "peak_memory": {when: {"anonymous": 0, "mapped": 0} for when in ("while loading", "while running")}
        | {"cache": 0},
        "resident_weights": 0,
        "bytes_per_token": {16: 600_000_000},
        "subjects": {"ours": {16: ours}, "theirs": {16: theirs}},
    }
    cells = {
        re.split(r"  +", line.strip())[0]: re.split(r"  +", line.strip())
        for line in table(result).splitlines()
    }
    assert cells["prefill of 16, tokens/s"][1:] == ["20.0 (10.0 to 30.0)", "4.0 (3.0 to 5.0)", "5.00"]
    assert cells["decode at 16, tokens/s"][1:] == ["5.00 (4.00 to 6.00)", "2.50 (1.00 to 2.50)", "2.00"]
    # Two tokens of a batch share what is read: 5 tokens/s are 2.5 passes of 0.6 GB.
    assert cells["read for 2 tokens, GB"][1:] == ["0.600"]
    assert cells["read, GB/s"][1:] == ["1.5 (1.2 to 1.8)"]
    assert cells["share of that"][1:] == ["0.75 (0.60 to 0.90)"]
    # What else a figure must name, where it is known.
    result["machine"]["llama.cpp"] = {
        "version": "0.3",
        "built_with": "CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 | ",
    }
    result["kernels"] = "bag for lm_head"
    head = ["llama-cpp-python 0.3, built with AVX2 FMA", "kernels: bag for lm_head"]
    assert table(result).splitlines()[1:3] == head


def test_an_interrupted_bench_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = QwenConfig.from_json(WEIGHTS / "config.json")
    monkeypatch.setattr(QwenConfig, "preset", lambda size: config)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupted() -> None:
        with synthetic("7b") as folder:
            assert (folder / "config.json").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_published_size_is_made_and_removed(
    cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: str
) -> None:
    config = dataclasses.replace(QwenConfig.from_json(WEIGHTS / "config.json"), num_hidden_layers=7)
    monkeypatch.setattr(QwenConfig, "preset", lambda size: config)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = cli("--synthetic", "7b", "--layers", "2", *QUICK, "--json")
    assert json.loads(done.out)["layers"] == 2
    assert json.loads(done.out)["model"] == "7b, synthetic"
    plain = json.loads(done.out)["resident_weights"]
    done = cli("--synthetic", "7b", "--layers", "2", "--gptq", bits, "--packed", *QUICK, "--json")
    matrices = 2 * 16 * 128**2
    saved = plain - json.loads(done.out)["resident_weights"]
    assert saved == pytest.approx(matrices * (2 - int(bits) / 8), rel=0.05)  # but for scales and g_idx
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_disk_is_said_before(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9}))
    line = refused(cli("--synthetic", "72b"))
    assert "the 72b takes 144.6 GB in" in line
    assert "1.0 GB left; --layers N makes fewer" in line
    assert not list(tmp_path.iterdir())


class Slow:
    config = QwenConfig.from_json(WEIGHTS / "config.json")


class SlowSubject(Subject):
    """Takes a known time, 20 ms a call and 1 ms a token of the prompt, and counts its calls."""

    calls: list[tuple[str, str, tuple]] = []  # noqa: RUF012
    clock = [0.0]  # noqa: RUF012

    def prefill(self, ids: torch.Tensor, more: int) -> torch.Tensor:
        self.calls.append((self.name, "prefill", tuple(ids.shape)))
        self.clock[0] += 0.02 + 0.001 * ids.shape[1]
        return ids[:, :1]

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, "decode", tuple(ids.shape)))
        self.clock[0] += 0.02
        return ids


def test_rates_are_tokens_by_seconds_and_subjects_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    SlowSubject.calls.clear()
    monkeypatch.setattr(bench.ReadRate, "measure", lambda self: 7e9)
    monkeypatch.setattr(time, "perf_counter", lambda: SlowSubject.clock[0])
    found = measure([SlowSubject("a", Slow), SlowSubject("b", Slow)], [30], tokens=3, batch=2, repeats=2)
    for name in "ab":
        timing = found[name, 30]
        assert all(len(values) == 2 for values in timing)
        assert timing.first_token == pytest.approx([0.05] * 2)
        assert timing.prefill == pytest.approx([2 * 30 / 0.05] * 2)
        assert timing.decode == pytest.approx([2 / 0.02] * 2)
        assert timing.read_rate == [7e9] * 2
    prefills = [name for name, what, _ in SlowSubject.calls if what == "prefill"]
    assert prefills == list("ababab")  # the first two are not counted
    assert {shape for _, what, shape in SlowSubject.calls if what == "decode"} == {(2, 1)}
    assert len(SlowSubject.calls) == 6 * 4


def test_what_is_read_for_a_token_is_all_but_the_embedding_and_the_cache() -> None:
    model = load_model(WEIGHTS, "bfloat16")
    config = model.config
    D, F, V, layers = config.hidden_size, config.mlp_width, config.vocab_size, config.num_hidden_layers
    matrices = layers * (4 * D * D + 3 * D * F) + V * D
    small = layers * (2 * D + 3 * D) + D
    assert bytes_per_token(model, 0) == 2 * (matrices + small) + 2 * D
    cached = bytes_per_token(model, 100, batch=3) - bytes_per_token(model, 0, batch=3)
    assert cached == 3 * 100 * 2 * layers * D * 2
    # Quantised: a byte a weight and a scale for each output, 8 bytes a row of a block.
    read = bytes_per_token(fasten(model, "int8"), 0)
    assert matrices < read < 1.2 * matrices


def test_memory_is_the_most_there_was() -> None:
    with Memory() as memory:
        block = torch.ones(30_000_000)
        time.sleep(0.05)
        del block
    assert 100e6 < memory.anonymous < 200e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "--repeats 0 must be from 1 to 10,000,000"),
        (["--lengths", "5", "0"], "--lengths 0 must be from 1 to"),
        (
            ["--lengths", "9000000", "--batch", "9000000"],
            "a cache of 9000000 × 9000016 positions takes up to",
        ),
        (["--dtype", "float8"], "--dtype float8: use bfloat16, float16, float32, float64"),
        (["--device", "mps"], "--device mps: only cpu and cuda can be timed"),
        (["--layers", "2"], "--layers needs --synthetic"),
        (["--gptq", "4"], "--gptq needs --synthetic"),
        (["--synthetic", "3b"], "invalid choice: '3b'"),
        (["--against", "vllm"], "--against vllm: use hf, plain or llama.cpp"),
        (["--against", "plain:int3"], "--against plain in int3: use bfloat16"),
        (["--against", "plain", "plain"], "--against names one of these twice: plain, plain"),
        (["--against", "plain", "plain:bfloat16", *QUICK], "--against names one of these twice"),
        (["--against", "plain", "--tp", "2"], "--against needs one process"),
        (["--tp", "3"], "cannot be split over 3 ranks"),
        (["--quantize", "int4", "--dtype", "float64", *QUICK], "float64 has no faster layers"),
        (["--group-size", "32"], "--group-size is for --quantize int4"),
        (["--model", "nowhere"], "nowhere"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(options: list[str], message: str, cli: Run) -> None:
    assert message in refused(cli(*options))


@pytest.mark.parametrize(("peer", "extra"), [("hf", "transformers"), ("llama.cpp", "llama")])
def test_a_missing_extra_is_named(cli: Run, monkeypatch: pytest.MonkeyPatch, peer: str, extra: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(cli("--against", peer))
    assert f"pip install 'qwen_ref[{extra}]'" in line


def test_transformers_takes_part(cli: Run) -> None:
    pytest.importorskip("transformers", reason="an extra: `make parity` installs it")
    done = cli(*QUICK, "--against", "hf", "hf:float32", "--json")
    assert {"transformers bfloat16", "transformers float32"} < set(json.loads(done.out)["subjects"])


def test_transformers_decodes_the_same_tokens() -> None:
    pytest.importorskip("transformers", reason="an extra: `make parity` installs it")
    from qwen_ref.bench.peers import qwen2

    ours = load_model(WEIGHTS, "float32")
    subjects = Subject("ours", ours), bench.TransformersSubject("theirs", qwen2(ours))
    ids = torch.arange(300, 320)[None]
    found = []
    with torch.inference_mode():
        for subject in subjects:
            tokens = [subject.prefill(ids, 10)]
            for _ in range(9):
                tokens.append(subject.decode(tokens[-1]))
            found.append(torch.cat(tokens, dim=1))
    # Logits differ in the last bits, by kernels and order; the first choice leads by far more.
    assert torch.equal(*found)
