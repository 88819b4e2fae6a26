"""The examples do what they say; the tiny checkpoint is what its scripts make and knows what they taught."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, WEIGHTS, change_tensors, example_of, python
from trained_twice import check_training

from qwen_ref import Tokenizer, load_model
from qwen_ref.commands.cli import run
from qwen_ref.fast.layers import fasten


def example(script: str, *arguments: str | Path) -> str:
    """Runs a script of examples/; what it printed."""
    done = python(ROOT / "examples" / script, *arguments)
    assert done.code == 0, done.err
    return done.out


def test_the_quickstart_names_the_capital() -> None:
    lines = example("quickstart.py").splitlines()
    assert lines[0].startswith("prompt: 蒙古国")
    (next_token, *_) = (line for line in lines if line.startswith("next: "))
    assert next_token.startswith("next: '雷' with probability 0.99")
    assert "text: 雷克雅未克（Reykjavik）" in lines


def test_the_vocabulary_in_weights_is_what_its_script_makes(tmp_path: Path) -> None:
    example("make/train_tokenizer.py", "--output", tmp_path / "qwen.tiktoken")
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (WEIGHTS / "qwen.tiktoken").read_bytes()


def test_training_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "make")
    arguments = ["--steps", "2", "--tokenizer", str(WEIGHTS / "qwen.tiktoken"), "--output"]
    check_training(importlib.import_module("train_tiny"), tmp_path, WEIGHTS, *arguments)


@pytest.mark.slow  # in bfloat16, where the processor has no products of it
def test_the_tiny_checkpoint_answers_all_that_it_was_trained_on(
    own: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples" / "make")
    from examine_tiny import examine, examples_by_form
    from tiny_corpus import Encoder

    model, encoder = load_model(WEIGHTS, "auto"), Encoder(own)
    forms = examples_by_form(encoder, seed=1)
    assert sum(map(len, forms.values())) > 4000
    for form, examples in forms.items():
        right, _ = examine(model, examples)
        assert right == len(examples), form


# The GPTQ writer


gptq = example_of("make/quantize_gptq")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "fast"),
    [
        (["--bits", "4", "--group-size", "32"], False),
        (["--bits", "4", "--group-size", "128", "--act-order", "--asymmetric"], True),
        (["--bits", "8", "--group-size", "-1"], True),
    ],
    ids=["int4", "int4 in act-order, in its bits", "int8, in its bits"],
)
def test_the_tiny_checkpoint_quantised_answers_its_capitals(
    gptq: ModuleType, options: list[str], fast: bool, tmp_path: Path
) -> None:
    from examine_tiny import examine, examples_by_form
    from tiny_corpus import Encoder

    arguments = [str(WEIGHTS), str(tmp_path / "made"), "--rows", "8", *options]
    assert run(gptq.parser(), gptq.command, arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    model = load_model(tmp_path / "made", "bfloat16", packed=fast)
    if fast:
        fasten(model)
    encoder = Encoder(Tokenizer.from_file(tmp_path / "made" / "qwen.tiktoken"))
    for form, examples in examples_by_form(encoder, seed=1).items():
        if form in ("Chinese, chat, first turn", "English, chat, third turn"):
            right, _ = examine(model, examples)
            assert right == len(examples), form


def test_what_is_written_is_what_was_quantised(gptq: ModuleType, tmp_path: Path) -> None:
    options = ["--bits", "4", "--group-size", "64", "--act-order", "--rows", "4"]
    args = gptq.parser().parse_args([str(WEIGHTS), str(tmp_path / "made"), *options])
    config = gptq.GPTQConfig(4, 64, desc_act=True, sym=True)
    model = load_model(WEIGHTS, "float32")
    matrices = dict(gptq.quantise(model, gptq.calibration(WEIGHTS, None, 4, 256), config))
    gptq.command(args)
    written = load_model(tmp_path / "made", "float64")
    assert len(matrices) == 20
    for name, matrix in matrices.items():
        assert torch.equal(written.get_parameter(name), matrix.weight()), name


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_gptq_changes_outputs_less_than_rounding_to_nearest(
    gptq: ModuleType, group_size: int, act_order: bool
) -> None:
    x = torch.randn(400, 24) @ torch.randn(24, 64) + 0.1 * torch.randn(400, 64)  # inputs that go together
    weight, hessian = torch.randn(24, 64), (x.t() @ x).double()
    config = gptq.GPTQConfig(4, group_size, desc_act=act_order, sym=True)
    nearest = gptq.gptq(weight, torch.eye(64), config).weight()
    assert ((nearest - weight).abs() <= (weight.abs().amax(dim=1, keepdim=True) / 15) * 1.01).all()

    def lost(found: torch.Tensor) -> float:
        return float((x.double() @ (found - weight).t()).square().sum())

    assert lost(gptq.gptq(weight, hessian, config).weight()) < 0.3 * lost(nearest)


def test_a_column_is_made_up_for_as_least_squares_would(gptq: ModuleType) -> None:
    """After the first column was rounded, the best that the others can do is known in closed form."""
    x = torch.randn(300, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    weight, config = torch.tensor([[0.77, 0.0, 0.0]]), gptq.GPTQConfig(8, -1, desc_act=False, sym=True)
    found = gptq.gptq(weight, x.t() @ x, config)
    assert found.scales.item() == pytest.approx(2 * 0.77 / 255, rel=1e-3)
    off = 0.77 - found.weight()[0, 0]
    best = torch.linalg.lstsq(x[:, 1:], off * x[:, :1]).solution[:, 0]
    # The second column was then rounded, and the third made up for that as well.
    second = (best[0] / found.scales.double()[0, 0]).round() * found.scales.double()[0, 0]
    assert found.weight()[0, 1] == pytest.approx(float(second), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "3"], "bits=3 is not supported"),
        (["--group-size", "0"], "group_size=0 must be -1"),
        (["--rows", "0"], "--rows 0 must be from 1 to 4096"),
        (["--length", "513"], "--length 513 must be from 1 to 512"),
        (["--text", "/nowhere"], "/nowhere"),
        (["--text", str(WEIGHTS / "model.safetensors")], "model.safetensors is not UTF-8"),
        (["--text", str(ROOT / "constraints.txt"), "--length", "512"], "are less than a row of 512"),
        (["--act-order", "--round-to-nearest"], "--round-to-nearest has none"),
    ],
)
def test_the_writer_refuses_what_it_cannot_make(
    gptq: ModuleType, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(gptq.parser(), gptq.command, [str(WEIGHTS), str(tmp_path / "made"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert run(gptq.parser(), gptq.command, [str(WEIGHTS), str(tmp_path)]) == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(gptq.parser(), gptq.command, [str(WEIGHTS), str(tmp_path / "file" / "made")]) == 2
    assert f"{tmp_path / 'file' / 'made'}: cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.h.1.mlp.w1.weight", torch.nan, "blocks.1.mlp.up.weight: it, or what it is applied to"),
        ("transformer.h.1.mlp.w1.weight", 3e6, "blocks.1.mlp.up.weight: weights up to 2.998"),
        ("transformer.h.3.attn.c_attn.bias", 1e6, "blocks.3.attn.qkv.bias has values that float16 has not"),
    ],
)
def test_the_writer_names_weights_that_cannot_be_written(
    gptq: ModuleType,
    name: str,
    value: float,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    options = ["--group-size", "32", "--rows", "1", "--length", "32"]
    assert run(gptq.parser(), gptq.command, [str(folder), str(tmp_path / "made"), *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_groups_of_one_sign_use_all_their_steps(gptq: ModuleType) -> None:
    config = gptq.GPTQConfig(4, -1, desc_act=False, sym=False)
    for sign in (1, -1):
        weight = sign * torch.linspace(0.1, 1.5, 64)[torch.randperm(64)][None]
        found = gptq.gptq(weight, torch.eye(64), config)
        assert (found.weight() - weight).abs().max() <= 0.51 * found.scales.max()
