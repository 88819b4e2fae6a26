"""llama.cpp, as the bench times it, has the weights of our model and computes what it computes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from conftest import WEIGHTS, Run, cli_of, refused, relative_rms
from torch import Tensor

from qwen_ref import Qwen, QwenConfig, load_model
from qwen_ref.bench import measure as bench
from qwen_ref.bench.__main__ import main
from qwen_ref.bench.llama import (
    FORMS,
    Gguf,
    LlamaModel,
    LlamaProcess,
    LlamaSubject,
    llama_subject,
    nearest_form,
)
from qwen_ref.bench.measure import Subject
from qwen_ref.config import InputError

cli = cli_of(main)
QUICK = ("--lengths", "3", "5", "--tokens", "2", "--repeats", "1")
# Half a step of a form, relative to the largest weight of a block of 32; its scale is float16.
HALF_STEP = {"bf16": 2**-8, "f16": 2**-11, "f32": 0.0, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_READ_BYTES", 2**20)


@pytest.fixture(scope="module")
def ours() -> Qwen:
    return load_model(WEIGHTS, "float32")


# The file


def named(model: Qwen) -> dict[str, Tensor]:
    """The weights by their names in a GGUF, from the published names."""
    names = {"transformer.wte": "token_embd", "transformer.ln_f": "output_norm", "lm_head": "output"}
    inside = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    inside |= {"ln_2": "ffn_norm", "mlp.w2": "ffn_gate", "mlp.w1": "ffn_up", "mlp.c_proj": "ffn_down"}
    for layer in range(model.config.num_hidden_layers):
        names |= {f"transformer.h.{layer}.{a}": f"blk.{layer}.{b}" for a, b in inside.items()}
    from safetensors.torch import load_file

    found = load_file(WEIGHTS / "model.safetensors")
    ends = [name.rpartition(".") for name in found]
    return {f"{names[start]}.{end}": found[f"{start}.{end}"].float() for start, _, end in ends}


@pytest.mark.parametrize("form", FORMS)
def test_the_file_has_every_weight(form: str, ours: Qwen, tmp_path: Path) -> None:
    file, seen = Gguf(ours, form), []
    file.write(tmp_path / "it.gguf", lambda done, total: seen.append((done, total)))
    read, truth = gguf.GGUFReader(tmp_path / "it.gguf"), named(ours)
    assert {tensor.name for tensor in read.tensors} == set(truth)
    for tensor in read.tensors:
        expected = truth[tensor.name]
        assert tensor.tensor_type.name == (form.upper() if expected.ndim == 2 else "F32")
        assert tuple(tensor.shape) == tuple(reversed(expected.shape))  # the fastest dimension first
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        blocks = expected.unflatten(-1, (-1, 32))
        limit = blocks.abs().amax(dim=-1, keepdim=True) * (HALF_STEP[form] if expected.ndim == 2 else 0)
        assert ((values.view_as(blocks) - blocks).abs() <= limit + 1e-7 * (form[0] == "q")).all(), tensor.name
    assert seen[-1] == (sum(file.sizes), sum(file.sizes))
    assert sum(file.sizes) == sum(tensor.n_bytes for tensor in read.tensors)


def test_the_file_has_the_configuration(ours: Qwen, tmp_path: Path) -> None:
    Gguf(ours, "bf16").write(tmp_path / "it.gguf")
    fields = gguf.GGUFReader(tmp_path / "it.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    published = json.loads((WEIGHTS / "config.json").read_text())
    assert found == {
        "general.architecture": "qwen",
        "tokenizer.ggml.model": "none",
        "qwen.vocab_size": published["vocab_size"],
        "qwen.context_length": published["seq_length"],
        "qwen.embedding_length": published["hidden_size"],
        "qwen.block_count": published["num_hidden_layers"],
        "qwen.feed_forward_length": published["intermediate_size"],
        "qwen.attention.head_count": published["num_attention_heads"],
        "qwen.attention.head_count_kv": published["num_attention_heads"],
        "qwen.attention.layer_norm_rms_epsilon": pytest.approx(published["layer_norm_epsilon"]),
        "qwen.rope.freq_base": published["rotary_emb_base"],
        "qwen.rope.dimension_count": published["kv_channels"],
    }


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    config = dataclasses.replace(
        QwenConfig.from_json(WEIGHTS / "config.json"), hidden_size=48, num_attention_heads=2, kv_channels=24
    )
    Gguf(Qwen(config), "f16")
    with pytest.raises(InputError, match="q8_0 needs rows of a multiple of 32 numbers; those of token_embd"):
        Gguf(Qwen(config), "q8_0")


def test_too_large_for_the_disk_is_said_before(
    ours: Qwen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with (
        pytest.raises(InputError, match=r"a GGUF in f32 takes 0.0 GB .* TMPDIR names another folder"),
        llama_subject(ours, "f32", 16),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_nearest_form() -> None:
    assert nearest_form(torch.bfloat16, None) == "bf16"
    assert nearest_form(torch.float16, None) == "f16"
    assert nearest_form(torch.float32, None) == nearest_form(torch.float64, None) == "f32"
    assert (nearest_form(torch.bfloat16, 8), nearest_form(torch.float32, 4)) == ("q8_0", "q4_0")


# What is timed


@pytest.fixture
def installed() -> None:
    pytest.importorskip("llama_cpp", reason="an extra: `make .venv/llama` compiles it")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where temporary files go. None may be left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


IDS = torch.arange(300, 360)[None]
PROMPT = 20  # of them; the others are decoded one at a time


def logits(file: Path, config: QwenConfig, **options: Any) -> numpy.ndarray:
    """llama.cpp's at the end of the prompt and at every later position (positions, V)."""
    theirs = LlamaModel(file, config, IDS.shape[1], threads=1, **options)
    try:
        theirs.append([5, 6, 7])  # of a sequence before, which clear forgets
        theirs.clear()
        found = [theirs.append(IDS[0, :PROMPT].tolist()).clone()]
        found += [theirs.append([token]).clone() for token in IDS[0, PROMPT:].tolist()]
        return torch.stack(found).numpy()
    finally:
        theirs.close()


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process in which torch does not use AMX (see LlamaProcess)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


# Off from ours in float32, relative RMS. llama.cpp's cache and flash attention are float16, 2^-11 an element.
# In bf16 what enters a product is bfloat16. In q8_0 and q4_0 the weights differ, too.
# Measured: 4e-4, 4e-4, 3e-3, 2e-2, 0.14.
TOLERANCE = {"f32": 1e-3, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.06, "q4_0": 0.3}


@pytest.mark.parametrize("form", FORMS)
def test_its_logits_are_ours(
    form: str, ours: Qwen, tmp_path: Path, installed: None, apart: ProcessPoolExecutor
) -> None:
    expected = ours(IDS)[0, PROMPT - 1 :]
    Gguf(ours, form).write(tmp_path / "it.gguf")
    found = torch.from_numpy(apart.submit(logits, tmp_path / "it.gguf", ours.config).result())
    assert relative_rms(found, expected) < TOLERANCE[form]
    if not form.startswith("q"):
        assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def test_in_float32_throughout_its_logits_are_ours_but_for_rounding(
    ours: Qwen, tmp_path: Path, installed: None
) -> None:
    """Measured: 5e-7. Ours are as far from float64's."""
    Gguf(ours, "f32").write(tmp_path / "it.gguf")
    exact = {"cache": "f32", "flash": False}
    found = torch.from_numpy(logits(tmp_path / "it.gguf", ours.config, **exact))
    assert relative_rms(found, ours(IDS)[0, PROMPT - 1 :]) < 5e-6
    theirs = LlamaModel(tmp_path / "it.gguf", ours.config, IDS.shape[1], 1, **exact)
    try:
        theirs.append([5, 6, 7])  # of a sequence before, which `logits` forgets
        assert relative_rms(theirs.logits(IDS[0].tolist()), ours(IDS)[0]) < 5e-6
    finally:
        theirs.close()


def test_flash_attention_rounds_a_float32_cache(ours: Qwen, tmp_path: Path, installed: None) -> None:
    """Measured: 4e-4, as with a float16 cache."""
    Gguf(ours, "f32").write(tmp_path / "it.gguf")
    found = torch.from_numpy(logits(tmp_path / "it.gguf", ours.config, cache="f32"))
    assert relative_rms(found, ours(IDS)[0, PROMPT - 1 :]) > 1e-5


def swapped(model: Qwen) -> None:
    for block in model.blocks:
        block.mlp.gate, block.mlp.up = block.mlp.up, block.mlp.gate


def unbiased(model: Qwen) -> None:
    for block in model.blocks:
        block.attn.qkv.bias.data.zero_()


def other_base(model: Qwen) -> None:
    model.config = dataclasses.replace(model.config, rotary_emb_base=1e4)


@pytest.mark.parametrize("mistake", [swapped, unbiased, other_base])
def test_a_wrong_file_has_other_logits(mistake, ours: Qwen, tmp_path: Path, installed: None) -> None:
    """So the tolerance above is one that a mistake in the file does not pass."""
    wrong = load_model(WEIGHTS, "float32")
    mistake(wrong)
    Gguf(wrong, "f32").write(tmp_path / "it.gguf")
    found = torch.from_numpy(logits(tmp_path / "it.gguf", wrong.config))
    assert relative_rms(found, ours(IDS)[0, PROMPT - 1 :]) > 10 * TOLERANCE["bf16"]


def test_it_decodes_the_same_tokens(ours: Qwen, temporary: Path, installed: None) -> None:
    found = []
    with torch.inference_mode(), llama_subject(ours, "f32", 64) as theirs:
        for subject in (Subject("ours", ours), theirs, theirs):  # again, after another sequence
            tokens = [subject.prefill(IDS[:, :PROMPT], 10)]
            for _ in range(9):
                tokens.append(subject.decode(tokens[-1]))
            found.append(torch.cat(tokens, dim=1))
    assert isinstance(theirs, LlamaSubject)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_it_takes_part(temporary: Path, installed: None, capfd: pytest.CaptureFixture) -> None:
    """And tells nothing of its own on stderr, as it does when it loads a file: capfd sees that, too."""
    peers = ("--against", "llama.cpp", "llama.cpp:f32")
    assert main([*QUICK, "--quantize", "int8", *peers, "--json"]) == 0
    done = capfd.readouterr()
    found = json.loads(done.out)
    assert list(found["subjects"])[1:] == ["llama.cpp q8_0", "llama.cpp f32"]
    assert found["machine"]["llama.cpp"]["version"]
    assert "CPU" in found["machine"]["llama.cpp"]["built_with"]
    assert done.err == ""
    assert main([*QUICK, *peers[:2]]) == 0
    done = capfd.readouterr()
    assert "llama.cpp bf16" in done.out
    assert done.out.splitlines()[1].startswith("llama-cpp-python ")
    assert done.err == ""


def test_a_file_that_cannot_be_loaded_is_one_line(ours: Qwen, tmp_path: Path, installed: None) -> None:
    (tmp_path / "it.gguf").write_bytes(b"no GGUF")
    with pytest.raises(InputError, match=r"llama.cpp cannot use its GGUF: .+"):
        LlamaProcess(tmp_path / "it.gguf", ours.config, 16)


def test_a_crash_is_one_line(ours: Qwen, temporary: Path, installed: None) -> None:
    with llama_subject(ours, "f32", 16) as theirs:
        os.kill(theirs.model._process.pid, signal.SIGSEGV)
        with pytest.raises(InputError, match=r"llama.cpp has crashed: its process ended with -11; .* README"):
            theirs.decode(IDS[:, :1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "llama.cpp:q5_0"], "llama.cpp in q5_0: use bf16, f16, f32, q8_0, q4_0"),
        (["--against", "llama.cpp", "--batch", "2"], "one sequence at a time: leave --batch out"),
        (["--against", "llama.cpp", "--device", "cuda"], "on the CPU: leave --device out"),
        (["--against", "llama.cpp", "llama.cpp"], "names one of these twice: llama.cpp, llama.cpp"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, cli: Run, monkeypatch) -> None:
    monkeypatch.setattr("qwen_ref.bench.llama.require_llama", lambda: None)
    assert message in refused(cli(*options))
