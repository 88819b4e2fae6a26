"""`python -m qwen_ref.parity`: record is the model itself, check and diff find what differs and only that."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, WEIGHTS, cli_of, python, refused
from golden_cases import golden, model
from safetensors import safe_open
from torch import Tensor

import qwen_ref.model
from qwen_ref import QwenConfig, Tokenizer, parity
from qwen_ref.generate import generate
from qwen_ref.parity.__main__ import main
from qwen_ref.parity.bundle import stage_widths
from qwen_ref.parity.compare import FACTOR, Comparison, Measure, Tolerances
from qwen_ref.parity.forward import Change, Forward, Weights
from qwen_ref.parity.stages import Checkpoint

cli = cli_of(main)
NTK = GOLDEN / "ntk_logn"


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """A recorded truth of the LogN and NTK model: beyond the trained length, a padded row, decoded steps."""
    ids = torch.randint(0, 320, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    parity.record(NTK, ids, tmp_path / "truth.safetensors", mask=mask, decode=3)
    return tmp_path / "truth.safetensors"


def changed(bundle: Path, out: Path, change: Callable[[str, Tensor], Tensor], dtype: str = "float64") -> Path:
    """A bundle with other numbers: what a port would have written."""
    found = parity.read_bundle(bundle)
    parity.write_bundle(
        out,
        found.input_ids,
        {name: change(name, found.stage(name)) for name in found.stages},
        dtype=dtype,
        attention_mask=found.attention_mask,
        prefill_length=found.prefill_length,
    )
    return out


# record


def test_a_record_needs_no_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on PYTHONPATH is enough: then no installed version can be asked for."""

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    parity.record(NTK, torch.tensor([[1, 2]]), tmp_path / "b", stages="logits", rounding=())
    metadata = safe_open(tmp_path / "b", framework="pt").metadata()
    assert metadata["tool"] == f"qwen_ref {qwen_ref.__version__}"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("folder", ["extended_base", "ntk_logn"])
def test_what_is_recorded_is_what_the_model_computes(tmp_path: Path, folder: str, dtype: str) -> None:
    ids = torch.randint(0, 320, (2, 37))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    bundle = parity.record(GOLDEN / folder, ids, tmp_path / "b", mask=mask, dtype=dtype, rounding=())
    with torch.inference_mode():
        logits = model(folder, dtype)(ids, attention_mask=mask)
    assert torch.equal(bundle.stage("logits"), logits)
    assert bundle.stages == list(stage_widths(model(folder, dtype).config))
    assert bundle.rounding == {}
    assert torch.equal(bundle.attention_mask, mask)
    assert os.listdir(tmp_path) == ["b"]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order in which a matrix kernel adds, which strides and alignment decide."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_stages_are_what_their_names_say(tmp_path: Path) -> None:
    ids = torch.randint(0, 320, (1, 45))
    bundle = parity.record(NTK, ids, tmp_path / "b", rounding=())
    qwen = model("ntk_logn", "float64")
    config, block = qwen.config, qwen.blocks[1]
    at = {name.removeprefix("blocks.1."): bundle.stage(name) for name in bundle.stages if ".1." in name}
    with torch.inference_mode():
        x = bundle.stage("blocks.0.residual")
        assert close(at["attn_norm"], block.attn_norm(x))
        qkv = torch.cat([at[f"attn.{part}"] for part in "qkv"], dim=-1)
        assert close(qkv, block.attn.qkv(at["attn_norm"]))
        positions = qwen._positions(bundle.stage("embed"), None, None)
        heads = (1, 45, config.num_attention_heads, config.kv_channels)
        for part in "qk":
            turned = qwen_ref.model.rotate(at[f"attn.{part}"].view(heads), positions.cos, positions.sin)
            assert close(at[f"attn.{part}_rotated"], turned.flatten(2))
        scaled = at["attn.q_rotated"].view(heads) * positions.query_scale
        assert close(at["attn.q_scaled"], scaled.flatten(2))
        assert not close(at["attn.q_scaled"], at["attn.q_rotated"])
        q, k, v = (
            at[name].view(heads).transpose(1, 2) for name in ("attn.q_scaled", "attn.k_rotated", "attn.v")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        assert close(at["attn.mixed"], mixed)
        assert close(at["attn.out"], block.attn.out(at["attn.mixed"]))
        assert close(at["attn_residual"], x + at["attn.out"])
        assert close(at["mlp_norm"], block.mlp_norm(at["attn_residual"]))
        assert close(at["mlp.gate"], block.mlp.gate(at["mlp_norm"]))
        assert close(at["mlp.up"], block.mlp.up(at["mlp_norm"]))
        assert close(at["mlp.product"], at["mlp.up"] * F.silu(at["mlp.gate"]))
        assert close(at["mlp.down"], block.mlp.down(at["mlp.product"]))
        assert close(at["residual"], at["attn_residual"] + at["mlp.down"])
        assert close(bundle.stage("norm"), qwen.norm(bundle.stage("blocks.2.residual")))
        assert close(bundle.stage("embed"), qwen.embed(ids))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ids": torch.ones(1, 2, 3).long()}, "input_ids is"),
        ({"ids": torch.ones(2, 0).long()}, "at least one token"),
        ({"ids": torch.ones(2, 3)}, "should be integers"),
        ({"ids": [[1, 2]]}, "should be a tensor"),
        ({"ids": torch.tensor([[5, 320]])}, "token id 320 is outside the vocabulary, 0 to 319: row 0"),
        ({"mask": torch.ones(1, 2)}, "attention_mask must have"),
        ({"mask": torch.tensor([[1, 1, 0]])}, "attention_mask must have"),
        ({"stages": "foo"}, "stages='foo' is unknown"),
        ({"decode": 1.5}, "decode=1.5 must be"),
        ({"decode": 10**9}, "must be a whole number from 0 to"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"rounding": ("float64",)}, "rounding="),
    ],
)
def test_wrong_arguments_are_value_errors_and_leave_nothing(tmp_path: Path, wrong: dict, said: str) -> None:
    arguments = {"ids": torch.tensor([[1, 2, 3]]), **wrong}
    with pytest.raises(ValueError, match=re.escape(said)):
        parity.record(NTK, arguments.pop("ids"), tmp_path / "b", **arguments)
    assert os.listdir(tmp_path) == []


def test_decoded_steps_are_those_of_the_cache(tmp_path: Path) -> None:
    ids = torch.randint(0, 320, (1, 30))
    bundle = parity.record(NTK, ids, tmp_path / "b", decode=9, rounding=())
    qwen = model("ntk_logn", "float64")
    steps = generate(qwen, ids[0].tolist(), max_new_tokens=9)
    assert bundle.input_ids[0].tolist() == ids[0].tolist() + [step.token for step in steps]
    assert (bundle.prefill_length, bundle.input_ids.shape) == (30, (1, 39))
    cache = qwen.new_cache(1, 39)
    calls = [bundle.input_ids[:, :30], *bundle.input_ids[:, 30:].split(1, dim=1)]
    with torch.inference_mode():
        logits = torch.cat([qwen(call, cache=cache) for call in calls], dim=1)
        whole = qwen(bundle.input_ids)
    # The same calls of the same kernels: equal on every processor.
    assert torch.equal(bundle.stage("logits"), logits)
    # α was fixed by 30 tokens; one pass over 39 would have another.
    assert not torch.allclose(bundle.stage("logits"), whole)
    assert bundle.stage("blocks.0.attn.k_rotated").shape == (1, 39, 64)


def test_logits_alone_take_no_other_stage(tmp_path: Path) -> None:
    ids = torch.randint(0, 320, (1, 5))
    bundle = parity.record(NTK, ids, tmp_path / "b", stages="logits")
    assert bundle.stages == ["logits"]
    assert set(bundle.rounding) == {"float32", "bfloat16", "float16"}
    assert set(bundle.rounding["float32"]) == {"logits"}


def test_the_rounding_kept_with_the_truth_is_that_of_the_model(truth: Path) -> None:
    bundle = parity.read_bundle(truth)
    for dtype in ("float32", "bfloat16", "float16"):
        qwen = model("ntk_logn", dtype)
        cache = qwen.new_cache(2, 43)
        calls = [bundle.input_ids[:, :40], *bundle.input_ids[:, 40:].split(1, dim=1)]
        with torch.inference_mode():
            first = qwen(calls[0], attention_mask=bundle.attention_mask[:, :40], cache=cache)
            logits = torch.cat([first, *(qwen(call, cache=cache) for call in calls[1:])], dim=1)
        delta = (logits.double() - bundle.stage("logits"))[bundle.real]
        exact = bundle.stage("logits")[bundle.real]
        relative = (delta.square().sum() / exact.square().sum()).sqrt()
        worst = (delta.square().sum(-1) / exact.square().sum(-1)).sqrt().max()
        # The same calls of the same kernels, so equal on every processor; kept in three digits.
        assert bundle.rounding[dtype]["logits"] == pytest.approx((relative.item(), worst.item()), rel=5e-3)


RECORD_IN_LITTLE_MEMORY = """
import sys, torch
from pathlib import Path
from qwen_ref import QwenConfig, parity
from qwen_ref.bench.measure import resident_memory
from qwen_ref.bench.synthetic import write_checkpoint
from qwen_ref.parity.stages import Checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = QwenConfig(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, kv_channels=64, intermediate_size=4096,
    vocab_size=16384, seq_length=64, rotary_emb_base=1e4, layer_norm_epsilon=1e-6, use_dynamic_ntk=False,
    use_logn_attn=False,
)
write_checkpoint(folder, config)
size = Checkpoint(folder).bytes * 4  # in float64
ids = torch.arange(8)[None]
parity.record(folder, ids, folder / "warm", stages="logits", rounding=())
peak, before = 0, resident_memory()[0]
def watch(done, total):
    global peak
    peak = max(peak, resident_memory()[0])
parity.record(folder, ids, folder / "out", stages="logits", rounding=(), progress=watch)
print(size, peak - before)
"""


def test_recording_takes_a_matrix_at_a_time(tmp_path: Path) -> None:
    done = python("-c", RECORD_IN_LITTLE_MEMORY, tmp_path, MALLOC_TRIM_THRESHOLD_="0")
    assert done.code == 0, done.err
    size, peak = map(int, done.out.split())
    # 0.5 GB in float64; its largest matrices, the embedding (not widened) and the head, are 67 MB each.
    assert size > 450e6
    assert peak < 0.25 * size


# check


@pytest.mark.parametrize("dtype", ["auto", "float64", "float32", "float16"])
def test_this_implementation_is_within_tolerance_of_its_own_truth(truth: Path, dtype: str) -> None:
    comparison = parity.check(NTK, truth, dtype)
    assert comparison.within
    assert comparison.judged_dtype == ("bfloat16" if dtype == "auto" else dtype)
    assert len(comparison.stages) == len(stage_widths(model("ntk_logn", "float32").config))
    if dtype != "float64":
        # Measured as the recorded rounding was, by the same kernels; the tolerance is FACTOR times it.
        excess = {stage.stage: stage.excess for stage in comparison.stages}
        assert excess["logits"] == pytest.approx(1 / FACTOR, rel=0.02)
        assert max(excess.values()) < 1.05 / FACTOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("folder", "case"), [("extended_base", "stages_17"), ("ntk_logn", "stages_40")])
def test_the_published_code_is_within_tolerance(tmp_path: Path, folder: str, case: str, dtype: str) -> None:
    stages = {
        name.removeprefix(f"{case}.").removesuffix(f".{dtype}"): value
        for name, value in golden(folder).items()
        if name.startswith(f"{case}.") and name.endswith(f".{dtype}")
    }
    parity.write_bundle(tmp_path / "b", golden(folder)[f"{case}.input_ids"], stages, dtype=dtype)
    for ours in ("float64", dtype):
        comparison = parity.check(GOLDEN / folder, tmp_path / "b", ours)
        assert comparison.within, comparison.first_beyond
        assert "measured" in comparison.tolerances
        assert "estimated" not in comparison.tolerances
    assert parity.diagnose(GOLDEN / folder, tmp_path / "b").verdict == "rounding only"


@pytest.mark.parametrize(
    ("name", "wrong", "first"),
    [
        ("rotate", lambda x, cos, sin: x, "blocks.0.attn.q_rotated"),
        ("logn_scale", lambda p, n, dtype: torch.ones_like(p, dtype=dtype), "blocks.0.attn.q_scaled"),
        ("ntk_alpha", lambda length, seq_length: 1, "blocks.0.attn.q_rotated"),
    ],
)
def test_check_sees_a_mistake_in_model_py(
    truth: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable, first: str
) -> None:
    monkeypatch.setattr(qwen_ref.model, name, wrong)
    comparison = parity.check(NTK, truth, "float32")
    assert comparison.first_beyond.stage == first
    assert not comparison.within


def test_a_configuration_that_differs_is_noted(tmp_path: Path, truth: Path) -> None:
    found = parity.read_bundle(truth)
    config = replace(QwenConfig.from_json(NTK / "config.json"), rotary_emb_base=5e5)
    stages = {"logits": found.stage("logits")}
    parity.write_bundle(
        tmp_path / "b",
        found.input_ids,
        stages,
        dtype="float64",
        config=config,
        attention_mask=found.attention_mask,
        prefill_length=40,
    )
    comparison = parity.check(NTK, tmp_path / "b", "float32")
    assert any("rotary_emb_base is 500000.0" in note for note in comparison.notes)
    assert any("no weights_sha256" in note for note in comparison.notes)


# diff


def test_the_same_bundle_twice_differs_nowhere(truth: Path) -> None:
    comparison = parity.diff(truth, truth)
    assert comparison.within
    assert {(stage.max_abs, stage.relative_rms, stage.worst) for stage in comparison.stages} == {
        (0.0, 0.0, 0.0)
    }
    assert all(stage.cosine == pytest.approx(1, abs=1e-14) for stage in comparison.stages)
    assert (comparison.logits.kl_max, comparison.logits.top1, comparison.logits.top5) == (0, 1, 1)


def test_one_wrong_position_is_found(tmp_path: Path, truth: Path) -> None:
    def change(name: str, value: Tensor) -> Tensor:
        if name == "blocks.1.mlp.up":
            value = value.clone()
            value[1, 17] *= 1.01
        return value

    comparison = parity.diff(truth, changed(truth, tmp_path / "port", change, "float32"))
    first = comparison.first_beyond
    assert first.stage == "blocks.1.mlp.up"
    assert (first.worst_row, first.worst_position, first.first_position) == (1, 17, 17)
    assert first.worst == pytest.approx(0.01)
    assert [stage.stage for stage in comparison.stages if not stage.within] == ["blocks.1.mlp.up"]


def test_what_stands_at_padding_is_not_compared(tmp_path: Path, truth: Path) -> None:
    def change(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        value[1, :3] = torch.nan
        return value

    assert parity.diff(truth, changed(truth, tmp_path / "port", change)).within


def test_the_measures_are_their_formulas(tmp_path: Path, truth: Path) -> None:
    noise = torch.randn(2, 43, 320, dtype=torch.float64) * 0.3
    port = changed(truth, tmp_path / "port", lambda name, x: x + noise if name == "logits" else x, "bfloat16")
    comparison = parity.diff(truth, port)
    real = parity.read_bundle(truth).real
    a, b = parity.read_bundle(truth).stage("logits")[real], parity.read_bundle(port).stage("logits")[real]
    found = comparison.stages[-1]
    assert found.max_abs == pytest.approx((a - b).abs().max().item())
    assert found.relative_rms == pytest.approx(((a - b).norm() / a.norm()).item())
    assert found.cosine == pytest.approx(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
    assert found.worst == pytest.approx(((a - b).norm(dim=-1) / a.norm(dim=-1)).max().item())
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    logits = comparison.logits
    assert logits.kl_mean == pytest.approx(kl.mean().item())
    assert logits.kl_max == pytest.approx(kl.max().item())
    assert logits.kl_p99 == pytest.approx(kl.quantile(0.99).item())
    agree = a.argmax(-1) == b.argmax(-1)
    assert logits.top1 == pytest.approx(agree.double().mean().item())
    shared = [len({*x.tolist()} & {*y.tolist()}) for x, y in zip(a.topk(5)[1], b.topk(5)[1], strict=True)]
    assert logits.top5 == pytest.approx(sum(shared) / 5 / len(shared))
    top = a.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > logits.noise
    assert logits.noise == pytest.approx(found.tolerance * a.square().mean().sqrt().item())
    assert (logits.clear, logits.clear_top1) == (
        int(clear.sum()),
        pytest.approx(agree[clear].double().mean().item()),
    )
    assert 0 < logits.top1 < 1
    assert logits.worst.kl == pytest.approx(kl.max().item())
    row, position = logits.worst.row, logits.worst.position
    assert logits.worst.input_id == parity.read_bundle(truth).input_ids[row, position]
    exact = parity.read_bundle(truth).stage("logits")[row, position].softmax(-1)
    assert logits.worst.truth_id == exact.argmax()
    assert logits.worst.truth_probabilities[0] == pytest.approx(exact.max().item())


def test_without_measured_rounding_it_is_estimated_and_said_so(tmp_path: Path, truth: Path) -> None:
    first, second = (
        changed(truth, tmp_path / name, lambda name, x: x.float(), "float32") for name in ("first", "second")
    )
    comparison = parity.diff(first, second)
    assert "estimated" in comparison.tolerances
    assert "measured" in parity.diff(first, second, NTK).tolerances
    for stage, exact in zip(comparison.stages, parity.diff(first, second, NTK).stages, strict=True):
        assert exact.tolerance / 30 < stage.tolerance < exact.tolerance * 60


def test_rounding_to_the_stored_dtype_is_allowed_for(tmp_path: Path, truth: Path) -> None:
    """A float32 port whose writer stored bfloat16 is within tolerance, and one that is 4 % off is not."""
    stored = changed(truth, tmp_path / "stored", lambda name, x: x.bfloat16(), "float32")
    assert parity.diff(truth, stored).within
    off = changed(truth, tmp_path / "off", lambda name, x: (x * 1.04).bfloat16(), "float32")
    assert parity.diff(truth, off).first_beyond.stage == "embed"


def test_numbers_that_are_not_finite_on_both_sides_agree_and_on_one_do_not() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    measure = Measure(ids, torch.ones(1, 3, dtype=torch.bool))
    truth = torch.tensor([[[1.0, torch.inf], [1, 2], [3, 4]]])
    measure.add("norm", truth, truth.where(truth.isfinite(), torch.nan))
    assert measure.rounding("norm") == (0, 0)
    measure.add("logits", torch.ones(1, 3, 2), torch.tensor([[[1.0, 1], [1, torch.nan], [1, 1]]]))
    assert measure.positions("logits").tolist() == [[0, torch.inf, 0]]


def test_a_tolerance_is_four_times_the_rounding_of_both_sides() -> None:
    measured = {"float32": {"norm": (3e-6, 5e-6)}, "bfloat16": {"norm": (4e-3, 1e-2)}}
    one = Tolerances(measured, "float64", "bfloat16").of("norm")
    assert (one.all, one.worst) == (pytest.approx(1.6e-2), pytest.approx(4e-2))
    both = Tolerances(measured, "float32", "float32").of("norm")
    assert (both.all, both.worst) == (pytest.approx(2**0.5 * 1.2e-5), pytest.approx(2**0.5 * 2e-5))
    exact = Tolerances(measured, "float64", "float64").of("norm")  # 29 bits below float32
    assert exact.all == pytest.approx(2**0.5 * 1.2e-5 / 2**29)


def test_float16_that_overflows_has_no_measured_tolerance() -> None:
    tolerances = Tolerances({"float16": {"norm": (torch.inf, torch.inf)}}, "float64", "float16")
    assert tolerances.of("norm").all < 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.ones(2, 43).long()}, "different ids: row 0, position 0"),
        ({"input_ids": torch.ones(2, 42).long()}, "input_ids"),
        ({"attention_mask": None}, "different attention masks"),
        ({"prefill_length": 41}, "prefill_length 40, .* 41"),
        ({"stages": {"norm": torch.zeros(2, 43, 63)}}, "norm has 64 numbers a position .* 63"),
        ({"stages": {"blocks.9.residual": torch.zeros(2, 43, 64)}}, "no stage in common"),
        ({"weights_sha256": "ab" * 32}, "of another checkpoint: weights_sha256 is abab"),
    ],
)
def test_bundles_that_cannot_be_compared_are_refused(tmp_path: Path, truth: Path, change: dict, said: str):
    found = parity.read_bundle(truth)
    arguments = {
        "input_ids": found.input_ids,
        "attention_mask": found.attention_mask,
        "prefill_length": 40,
        "stages": {},
        **change,
    }
    T = arguments["input_ids"].shape[1]
    arguments["stages"] = arguments["stages"] or {"norm": torch.zeros(2, T, 64)}
    if T != 43:
        arguments["attention_mask"] = None
    parity.write_bundle(tmp_path / "port", dtype="float32", **arguments)
    with pytest.raises(ValueError, match=said):
        parity.diff(truth, tmp_path / "port")


# The command


def test_a_prompt_is_recorded_checked_and_judged(cli: Callable, tmp_path: Path, own: Tokenizer) -> None:
    out = tmp_path / "truth.safetensors"
    result = cli("record", "--prompt", "冰岛的首都是", "--decode", "6", "--out", out)
    assert (result.code, result.out) == (0, "")
    assert "67 stages of 1 × 8 positions in float64" in result.err
    assert "rounding of float32, bfloat16, float16" in result.err
    assert own.decode(parity.read_bundle(out).input_ids[0].tolist()) == "冰岛的首都是雷克雅未克（Reykjavik"

    result = cli("check", "--golden", out)
    assert result.code == 0
    assert "within tolerance at all 67 stages" in result.out
    assert "60 more stages are not shown" in result.out
    assert "first choice agrees at 100.0% of 8 positions" in result.out
    assert "after token" in result.out
    full = cli("check", "--golden", out, "--full").out
    assert sum(line.startswith("blocks.") for line in full.splitlines()) == 64

    port = changed(out, tmp_path / "port", lambda name, x: x * 1.3 if name == "blocks.2.mlp.gate" else x)
    result = cli("diff", out, port)
    assert result.code == 1
    assert "first stage beyond its tolerance: blocks.2.mlp.gate" in result.out
    assert "look at the gate projection in layer 2" in result.out
    assert "blocks.2.attn.q " in result.out  # all of the layer where it happened


def test_worse_logits_are_described_with_their_tokens(cli: Callable, tmp_path: Path) -> None:
    out = tmp_path / "truth.safetensors"
    cli("record", "--prompt", "冰岛的首都是", "--out", out, "--stages", "logits", "--rounding", "bfloat16")
    port = changed(out, tmp_path / "port", lambda name, x: x.flip(-1), "bfloat16")
    text = cli("diff", out, port, "--model", WEIGHTS).out
    assert "the truth says" in text
    assert "what is judged says" in text
    assert "the largest" not in text
    assert "'" in text.split("worst position:")[1]  # tokens with their text


def test_a_mistake_is_printed_with_its_margin(cli: Callable, tmp_path: Path) -> None:
    ids = torch.randint(0, 320, (1, 30))
    unturned = [Change(step, lambda run, right, x, cos, sin: x) for step in ("rotate_q", "rotate_k")]
    kept: dict[str, Tensor] = {}
    run = Forward(Weights(Checkpoint(NTK), torch.float32), ids, changes=unturned)
    run.run(lambda stage, value, start: kept.update({stage: value}), ["logits"])
    parity.write_bundle(tmp_path / "port", ids, kept, dtype="float32")
    result = cli("diagnose", "--model", NTK, "--bundle", tmp_path / "port")
    assert result.code == 1
    assert "the mistake: no RoPE\n" in result.out
    assert "second best" in result.out
    found = json.loads(cli("diagnose", "--model", NTK, "--bundle", tmp_path / "port", "--json").out)
    assert (found["verdict"], found["found"]) == ("mistake", ["no RoPE"])
    assert found["ranking"][0]["mistakes"] == ["no RoPE"]
    assert found["comparison"]["first_beyond"] == "logits"


def test_nothing_wrong_is_exit_code_0(cli: Callable, tmp_path: Path, truth: Path) -> None:
    result = cli("diagnose", "--model", NTK, "--bundle", truth)
    assert result.code == 0
    assert parity.diagnose(NTK, truth).ranking[0].residual < 1e-15
    assert result.out.splitlines()[-1] == "rounding only: nothing is wrong that this dtype could show"


def test_json_holds_all_numbers(cli: Callable, truth: Path, tmp_path: Path) -> None:
    found = json.loads(cli("check", "--model", NTK, "--golden", truth, "--json").out)
    comparison = parity.check(NTK, truth)
    assert found["within"] is True
    assert found["first_beyond"] is None
    assert found["factor"] == FACTOR
    assert [row["stage"] for row in found["stages"]] == [stage.stage for stage in comparison.stages]
    assert found["stages"][-1]["tolerance"] == pytest.approx(comparison.stages[-1].tolerance)
    assert found["logits"]["kl_mean"] == pytest.approx(comparison.logits.kl_mean)
    port = changed(truth, tmp_path / "port", lambda name, x: x * 0 if name == "norm" else x)
    result = cli("diff", port, truth, "--json")  # a truth of nothing but 0: infinitely far
    assert result.code == 1
    json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_ids_come_from_a_file(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("[[5, 6, 7], [8]]")
    arguments = ("--model", NTK, "--ids", tmp_path / "ids", "--out", tmp_path / "b", "--rounding", "none")
    assert cli("record", *arguments).code == 0
    bundle = parity.read_bundle(tmp_path / "b")
    assert bundle.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert bundle.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert bundle.rounding == {}


def test_the_prompt_may_come_from_stdin_and_have_special_tokens(
    cli: Callable, tmp_path: Path, own: Tokenizer
) -> None:
    arguments = ("record", "--prompt", "-", "--out", tmp_path / "b", "--stages", "logits", "--dtype", "auto")
    assert cli(*arguments, "--allow-special", stdin=b"<|endoftext|>\n").code == 0
    bundle = parity.read_bundle(tmp_path / "b")
    assert bundle.input_ids.tolist() == [own.encode("<|endoftext|>", allowed_special="all")]
    assert bundle.dtype == "bfloat16"


def test_the_plot_has_a_line_a_dtype(cli: Callable, truth: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli("check", "--model", NTK, "--golden", truth, "--plot", tmp_path / "error.png").code == 0
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["error.png", "truth.safetensors"]


def test_a_plot_without_matplotlib_says_what_to_install(
    cli: Callable, truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(cli("check", "--model", NTK, "--golden", truth, "--plot", tmp_path / "error.png"))
    assert "pip install" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: command"),
        (("record", "--out", "OUT"), "--prompt --ids is required"),
        (("record", "--prompt", "", "--out", "OUT"), "the prompt is empty"),
        (("record", "--prompt", "x", "--out", "none/OUT"), "cannot be written: there is no folder"),
        (
            ("record", "--prompt", "x", "--out", "OUT", "--decode", "-1"),
            "decode=-1 must be a whole number from 0 to",
        ),
        (("record", "--prompt", "x", "--out", "OUT", "--rounding", "int8"), "--rounding 'int8' is unknown"),
        (("record", "--prompt", "x", "--out", "OUT", "--model", "none"), "none: not a folder"),
        (("record", "--ids", "IDS", "--out", "OUT"), "token id 99999 is outside the vocabulary, 0 to 2751"),
        (("check", "--golden", "none"), "none: cannot be read"),
        (("check", "--golden", "IDS"), "not a complete safetensors file"),
        (("diff", "TRUTH", "IDS"), "not a complete safetensors file"),
        (("diagnose", "--bundle", "TRUTH"), "is of a model with hidden_size=64, this one has 128"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    cli: Callable, tmp_path: Path, truth: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IDS").write_text("99999")
    named = {"TRUTH": truth, "IDS": tmp_path / "IDS"}
    line = refused(cli(*(named.get(argument, argument) for argument in arguments)))
    assert said in line
    assert sorted(os.listdir(tmp_path)) == ["IDS", "truth.safetensors"]


def test_a_bundle_of_other_weights_is_refused_by_checksum(cli: Callable, tmp_path: Path, truth: Path) -> None:
    folder = shutil.copytree(NTK, tmp_path / "other")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1  # one bit of the last weight
    (folder / "model.safetensors").write_bytes(content)
    for arguments in (("check", "--golden"), ("diagnose", "--bundle")):
        line = refused(cli(arguments[0], "--model", folder, arguments[1], truth))
        assert "of another checkpoint: weights_sha256 is" in line


def test_nan_in_a_port_is_named_with_its_stage(cli: Callable, tmp_path: Path, truth: Path) -> None:
    def change(name: str, value: Tensor) -> Tensor:
        return value * torch.nan if name in ("blocks.2.attn.v", "logits") else value

    line = refused(cli("diff", truth, changed(truth, tmp_path / "port", change)))
    assert "first at blocks.2.attn.v, row 0, position 0: look at the value third" in line


def test_a_comparison_of_float16_that_overflows_says_so(tmp_path: Path, cli: Callable, truth: Path) -> None:
    comparison: Comparison = parity.check(NTK, truth, "float16")
    assert comparison.within
    port = changed(truth, tmp_path / "port", lambda name, x: x, "float16")
    assert cli("diff", truth, port).code == 0
