"""`python -m qwen_ref.checkpoint inspect`: its bytes are those of the files, of the published index and of
models in memory; what it says of this machine follows from its memory and its bandwidth.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, Run, cli_of, refused
from golden_folders import change
from safetensors.torch import load_file

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench.measure import bytes_per_token
from qwen_ref.checkpoint import INDEX_NAME, open_checkpoint, packing, tensor_table
from qwen_ref.commands import memory
from qwen_ref.commands.inspect import main
from qwen_ref.commands.sizes import cache_bytes, kinds, resident_bytes
from qwen_ref.fast.layers import fasten

cli = cli_of(main)
PUBLISHED_BYTES = {"1.8b": 3_673_657_344, "7b": 15_442_649_088, "14b": 28_334_581_760, "72b": 144_575_840_256}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 24 GB of free memory, read at 20 GB/s, whatever this one has."""
    monkeypatch.setattr(memory, "memory_left", lambda: 24 * 10**9)
    monkeypatch.setattr(memory, "read_rate", lambda: memory.Measured(20e9, 0.3))


@pytest.fixture
def inspect(cli: Run) -> Callable[..., str]:
    """What the command prints."""

    def call(*arguments: str | Path) -> str:
        done = cli("inspect", *arguments)
        assert (done.code, done.err) == (0, "")
        return done.out

    return call


def bytes_of(line_start: str, text: str) -> list[int]:
    (line,) = [line for line in text.splitlines() if line.startswith(line_start)]
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", line)]


@pytest.mark.parametrize("size", PUBLISHED_BYTES)
def test_the_published_sizes_need_no_checkpoint(inspect: Callable, size: str) -> None:
    assert bytes_of("weights", inspect(size)) == [PUBLISHED_BYTES[size]]
    assert inspect(size.upper()) == inspect(size)


def test_what_the_72b_needs_on_four_devices_at_32k(inspect: Callable) -> None:
    text = inspect("72b", "--tp", "4", "--context", "32768")
    whole_norms = (2 * 80 + 1) * 8192 * 2
    assert bytes_of("weights", text) == [144_575_840_256, (144_575_840_256 - whole_norms) // 4 + whole_norms]
    cache = 2 * 80 * 8192 * 2 * 32768
    assert bytes_of("keys and values of 32,768", text) == [cache, cache // 4]
    assert bytes_of("on the CPU each rank copies", text) == [80 * (8192**2 + 8192 * 24576) * 2 // 4]
    row = next(line for line in text.splitlines() if line.startswith("transformer.h.*.attn.c_attn.weight"))
    assert row.split()[1:4] == ["80", "bfloat16", "heads"]
    assert "24576 × 8192" in row
    assert "6144 × 8192" in row


def test_a_real_folder_is_counted_to_the_byte(inspect: Callable) -> None:
    model = load_model(WEIGHTS, "auto")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = model.new_cache(1, 100)
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    text = inspect(WEIGHTS, "--context", "100")
    assert bytes_of("weights", text) == [weights]
    assert bytes_of("keys and values", text) == [held] == [cache_bytes(model.config, 100, torch.bfloat16)]
    assert bytes_of("together", text) == [weights + held]


def test_a_configuration_alone_is_enough(inspect: Callable, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "long" / "config.json", tmp_path)
    texts = {inspect(place, "--tp", "2") for place in (tmp_path, tmp_path / "config.json")}
    assert len(texts) == 1
    stored = inspect(GOLDEN / "long", "--tp", "2")
    here, _, table = stored.partition("\n\n")
    alone = "from the configuration alone: weights as they should be, in bfloat16"
    assert texts == {f"{here}\n\n{alone}\n{table}"}


@pytest.mark.parametrize(
    ("size", "gptq", "wanted", "biases"),
    [
        ("7b", {"bits": 4, "group_size": 128}, 5_858_631_680, 1_933_312),  # as published
        ("7b", {"bits": 8, "group_size": 128}, 9_121_931_264, 1_933_312),
        ("1.8b", {"bits": 4, "group_size": -1, "desc_act": True}, 1_854_870_528, 724_992),
    ],
    ids=str,
)
def test_a_gptq_configuration_alone_is_counted_packed(
    inspect: Callable, tmp_path: Path, size: str, gptq: dict, wanted: int, biases: int
) -> None:
    config = {"model_type": "qwen", **vars(QwenConfig.preset(size)), "quantization_config": gptq}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = inspect(tmp_path)
    assert inspect(tmp_path / "config.json") == text
    form = f"int{gptq['bits']}, {'one group' if gptq['group_size'] == -1 else 'groups of 128'}"
    first = f"from the configuration alone: weights as they should be, in float16 and {form}"
    assert first in text.splitlines()
    assert bytes_of("weights", text) == [wanted]
    assert bytes_of("not counted", text) == [biases]


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("zero_biases", [False, True])
@pytest.mark.parametrize(
    "gptq",
    [{}, {"bits": 8, "group_size": 64}, {"group_size": 64, "act_order": True}, {"group_size": -1}],
    ids=str,
)
def test_a_gptq_folder_and_its_configuration_alone_agree(
    inspect: Callable, tmp_path: Path, gptq: dict, ranks: str, zero_biases: bool
) -> None:
    stored, alone = tmp_path / "stored", tmp_path / "alone"
    packed_elsewhere.make_packed(WEIGHTS, stored, tmp_path / "plain", zero_biases=zero_biases, **gptq)
    alone.mkdir()
    shutil.copy(stored / "config.json", alone)
    of_alone, of_stored = (inspect(folder, "--tp", ranks).splitlines() for folder in (alone, stored))
    (said,) = [line for line in of_alone if line.startswith("from the configuration alone")]
    of_alone.remove(said)
    assert of_alone[:-1] == (of_stored[:-1] if zero_biases else of_stored)
    total = sum(tensor.nbytes for tensor in load_file(stored / "model.safetensors").values())
    biases = bytes_of("not counted", of_alone[-1])[0]
    assert bytes_of("weights", "\n".join(of_stored))[0] == total - (biases if zero_biases else 0)


def test_a_gptq_configuration_that_cannot_be_packed_is_refused(cli: Run, tmp_path: Path) -> None:
    config = vars(QwenConfig.preset("1.8b")) | {"intermediate_size": 2 * 5500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    for place in (tmp_path, tmp_path / "config.json"):
        line = refused(cli("inspect", place))
        assert "5500 inputs or outputs do not fill words of 8 weights" in line


def test_dtypes_are_those_of_the_file(inspect: Callable, single: Path) -> None:
    change(single / "model.safetensors", transformer__h__1__ln_1__weight=torch.ones(64))
    rows = [line.split()[:3] for line in inspect(single).splitlines() if "ln_1" in line]
    assert rows == [
        ["transformer.h.*.ln_1.weight", "2", "bfloat16"],
        ["transformer.h.*.ln_1.weight", "1", "float32"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["72b", "--tp", "6"],
            "num_attention_heads=64 cannot be split over 6 ranks; use 1, 2, 4, 8, 16, 32 or 64",
        ),
        (["72b", "--tp", "-1"], "cannot be split over -1 ranks"),
        (["72b", "--context", "0"], "--context 0 must be from 1 to 1073741824"),
        (["73b"], "73b: no such folder, and no preset '73b'; use one of 1.8b, 7b, 14b, 72b"),
        ([], "required: FOLDER"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(arguments: list[str], message: str, cli: Run) -> None:
    assert message in refused(cli("inspect", *arguments))


def test_a_damaged_folder_is_named_and_not_taken_for_a_configuration_alone(cli: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "ntk_logn", tmp_path / "renamed")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "neither model.safetensors nor" in refused(cli("inspect", folder))

    index_alone = tmp_path / "index"
    index_alone.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(GOLDEN / "extended_base" / name, index_alone)
    assert "from the configuration alone" in cli("inspect", index_alone).out


@pytest.mark.parametrize(
    "name", ["model.safetensors", "qwen.tiktoken", "pytorch_model.bin", "model.gguf", INDEX_NAME]
)
def test_a_file_in_the_place_of_its_folder_is_said_at_once(name: str, cli: Run, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**36)
    expected = f"{tmp_path / name}: not a folder; give the folder that it is in, {tmp_path}"
    assert expected in refused(cli("inspect", tmp_path / name))


@pytest.mark.parametrize(
    "path", ["", "a\0b", "a" * 5000, "\ud800"], ids=["empty", "NUL", "long", "surrogate"]
)
def test_a_path_that_no_folder_can_have_is_one_line(path: str, cli: Run) -> None:
    assert "no such folder" in refused(cli("inspect", path))


# This machine


def test_what_fits_is_said_first(inspect: Callable) -> None:
    assert inspect("1.8b").splitlines()[:4] == [
        "fits: 3.7 GB of weights in bfloat16 and 1.6 GB for 8,192 positions; 24.0 GB of memory are free",
        "a decode step reads 3.1 GB, 4.7 GB at position 8,192: at least 0.15 to 0.23 s, 6.6 to 4.3 tokens/s, "
        "at the memory bandwidth of this machine, 20.0 GB/s (measured just now, 0.3 s)",
        "--quantize int8: 2.2 GB of weights, at least 0.078 s; "
        "--quantize int4: 1.6 GB of weights, at least 0.05 s",
        "",
    ]


@pytest.mark.parametrize(
    ("arguments", "verdict", "step", "fewer"),
    [
        (
            "14b",
            "does not fit: 28.3 GB of weights in bfloat16 and 1.7 GB for 2,048 positions; "
            "24.0 GB of memory are free; --quantize int8 fits",
            "the weights stay in the mapped file, and at least 6.0 GB are read from disk again for each "
            "token: 6 s at 1 GB/s",
            "--quantize int8: 15.3 GB of weights, at least 0.69 s",
        ),
        (
            "72b --context 1024",
            "24.0 GB of memory are free",
            "at least 123.3 GB are read from disk again for each token: 123 s at 1 GB/s",
            "--quantize int4: 43.0 GB of weights, does not fit",
        ),
        (
            "1.8b --context 200000",
            "; --context 103385 fits",
            "keys and values must fit into memory; --context takes a shorter text",
            "--quantize int4: 1.6 GB of weights, does not fit",
        ),
        (
            "1.8b --tp 2",
            "fits: each of 2 ranks takes 1.8 GB of weights in bfloat16 and 0.8 GB for 8,192 positions; "
            "24.0 GB of memory are free",
            "1.5 GB on each rank, 2.3 GB at position 8,192: at least 0.15 to 0.23 s, 6.6 to 4.3 tokens/s, at "
            "the memory bandwidth that the ranks of one machine share, 20.0 GB/s (measured just now, 0.3 s)",
            "--quantize int8: 1.1 GB of weights, at least 0.079 s",
        ),
        (
            "7b --tp 4 --context 32768",
            "; --quantize int4 fits",
            "at least 8.6 GB are read from disk again for each token: 8.6 s at 1 GB/s",
            "--quantize int8: 2.1 GB of weights, does not fit; --quantize int4: 1.7 GB of weights, at least ",
        ),
        (
            "72b --tp 16 --context 1024",
            "24.0 GB of memory are free, enough for 2 of them",
            "at least 123.3 GB are read from disk again for each token: 123 s at 1 GB/s",
            "",
        ),
        ("14b --tp 4", "--quantize int8 fits", "", "--quantize int4 --group-size 32: 3.2 GB of weights"),
    ],
)
def test_what_does_not_fit_has_a_remedy_or_runs_from_disk(
    inspect: Callable, arguments: str, verdict: str, step: str, fewer: str
) -> None:
    """On this machine: its ranks share its memory."""
    first, second, third, *_ = inspect(*arguments.split()).splitlines()
    assert verdict in first
    assert step in second
    assert fewer in third


def test_a_gptq_release_is_estimated_dequantised_and_packed(inspect: Callable, tmp_path: Path) -> None:
    gptq = {"bits": 4, "group_size": 128}
    config = {"model_type": "qwen", **vars(QwenConfig.preset("7b")), "quantization_config": gptq}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = inspect(tmp_path).splitlines()
    assert lines[0] == (
        "fits: 15.4 GB of weights, dequantised to float16, and 4.3 GB for 8,192 positions; 24.0 GB of memory "
        "are free"
    )
    assert lines[2] == "--fast --dtype bfloat16: 5.9 GB of weights, at least 0.23 s"
    dequantised = inspect(tmp_path, "--context", "20000").splitlines()
    assert dequantised[0].endswith("free; --fast --dtype bfloat16 fits")
    assert dequantised[1].endswith("; dequantised weights are copies, which must fit into memory")


def test_a_machine_that_does_not_tell_gets_no_verdict(
    inspect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_left", lambda: math.inf)
    first, second, *_ = inspect("1.8b").splitlines()
    unknown = "this system does not tell how much memory is free"
    assert first == f"3.7 GB of weights in bfloat16 and 1.6 GB for 8,192 positions; {unknown}"
    assert "at least 0.15 to 0.23 s" in second


def test_a_model_that_caches_may_hold_is_not_timed(
    inspect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "read_rate", None)
    assert inspect(WEIGHTS).splitlines()[:3] == [
        "fits: 3.5 MB of weights in bfloat16 and 1.0 MB for 512 positions; 24.0 GB of memory are free",
        "a decode step reads 2.8 MB: the processor's caches may hold that, and its memory bandwidth does "
        "not decide",
        "",
    ]


def test_without_room_for_a_buffer_nothing_is_measured(
    inspect: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the machine above
    monkeypatch.setattr(memory, "memory_left", lambda: 2 * memory._BUFFER - 1)
    assert memory.read_rate() is None
    monkeypatch.setattr(memory, "read_rate", lambda: None)
    monkeypatch.setattr(memory, "_SMALL", 0)
    second = inspect(WEIGHTS).splitlines()[1]
    assert second.endswith("; memory bandwidth was not measured: it takes 0.5 GB of free memory")


def test_bandwidth_is_measured_in_less_than_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_BUFFER", 2**24)
    monkeypatch.setattr(memory, "_PASSES", 0.02)
    measured = memory.read_rate()
    assert measured is not None
    assert 1e8 < measured.rate < 1e13
    assert 0.02 <= measured.seconds < 1


@pytest.mark.parametrize("gptq", [None, {}, {"bits": 8, "group_size": 64}, {"group_size": -1}], ids=str)
def test_estimates_are_what_models_hold_and_read(gptq: dict | None, tmp_path: Path) -> None:
    """The tiny checkpoint; a token at position 0 reads what the bench says."""
    folder = WEIGHTS
    if gptq is not None:
        folder = tmp_path / "packed"
        packed_elsewhere.make_packed(WEIGHTS, folder, tmp_path / "plain", **gptq)
    config, stored = open_checkpoint(folder)
    rows = kinds(tensor_table(config), stored)
    plain, fewer = memory.forms(config, rows, 1, packing(folder))
    models = [load_model(folder, "auto")]
    if gptq is None:
        kernels = {"int8": "bag", "int4": "int4"}
        models += [
            fasten(load_model(folder, "bfloat16"), form, kernel=kernel) for form, kernel in kernels.items()
        ]
    else:
        kernel = "bag" if gptq.get("bits") == 8 else "int4"
        models.append(fasten(load_model(folder, "bfloat16", packed=True), kernel=kernel))
    for form, model in zip((plain, *fewer), models, strict=True):
        assert form.held == pytest.approx(resident_bytes(model), rel=0.005), form.name
        assert form.read == pytest.approx(bytes_per_token(model, 0), rel=0.005), form.name
