"""examples/ports/bundle_numpy.py reads what the kit writes, and writes what the kit reads, without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, WEIGHTS, example_of
from safetensors.numpy import save_file
from torch import Tensor

from qwen_ref import parity
from qwen_ref.checkpoint import DTYPES
from qwen_ref.loading.loader import open_checkpoint
from qwen_ref.parity.forward import Change, Forward, Weights
from qwen_ref.parity.stages import Checkpoint

bundles = example_of("ports/bundle_numpy")
NTK = GOLDEN / "ntk_logn"
SOURCE = ROOT / "examples" / "ports" / "bundle_numpy.py"
IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@EVERY_DTYPE
def test_it_reads_what_the_kit_writes(bundles: ModuleType, tmp_path: Path, dtype: str) -> None:
    stages = {"blocks.0.attn.q": numbers(2, 6, 4, 16), "logits": numbers(2, 6, 320)}
    stages = {name: value.to(DTYPES[dtype]) for name, value in stages.items()}
    more = {"attention_mask": MASK, "prefill_length": 4, "weights_sha256": "ab" * 32}
    parity.write_bundle(tmp_path / "b", IDS, stages, dtype=dtype, **more)
    metadata, tensors = bundles.read(tmp_path / "b")
    assert {
        key: metadata[key] for key in ("format_version", "dtype", "prefill_length", "weights_sha256")
    } == {
        "format_version": "1",
        "dtype": dtype,
        "prefill_length": "4",
        "weights_sha256": "ab" * 32,
    }
    assert set(tensors) == {"input_ids", "attention_mask", *stages}
    assert tensors["input_ids"].dtype == np.int64
    assert np.array_equal(tensors["input_ids"], IDS)
    assert np.array_equal(tensors["attention_mask"], MASK)
    for name, value in stages.items():
        assert tensors[name].dtype == ("float32" if dtype == "bfloat16" else dtype)
        assert np.array_equal(tensors[name], value.to(DTYPES[str(tensors[name].dtype)]))


@EVERY_DTYPE
@pytest.mark.parametrize("stored", [None, *DTYPES])
def test_the_kit_reads_what_it_writes(
    bundles: ModuleType, tmp_path: Path, dtype: str, stored: str | None
) -> None:
    value = numbers(2, 6, 320)
    given = value.numpy().astype("float32")
    more = {"attention_mask": MASK.numpy(), "prefill_length": 4, "weights_sha256": "cd" * 32}
    bundles.write(tmp_path / "b", IDS.numpy(), {"logits": given}, dtype=dtype, stored=stored, **more)
    found = parity.read_bundle(tmp_path / "b")
    assert torch.equal(found.input_ids, IDS)
    assert torch.equal(found.attention_mask, MASK)
    assert (found.dtype, found.prefill_length, found.weights_sha256) == (dtype, 4, "cd" * 32)
    assert found.stored_dtype("logits") == DTYPES[stored or "float32"]
    assert torch.equal(found.stage("logits"), value.float().to(DTYPES[stored or "float32"]))


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_arrays_stay_as_they_are(bundles: ModuleType, tmp_path: Path, dtype: str) -> None:
    value = numbers(1, 3, 5).numpy().astype(dtype)
    transposed = np.asfortranarray(value)
    bundles.write(tmp_path / "b", [[1, 2, 3]], {"embed": transposed}, dtype="float32", stored=dtype)
    found = parity.read_bundle(tmp_path / "b")
    assert found.stored_dtype("embed") == DTYPES[dtype]
    assert np.array_equal(found.stage("embed"), value)


def test_bfloat16_rounds_as_torch_does(bundles: ModuleType, tmp_path: Path) -> None:
    """To the nearest, ties to even; also at the ends of the range, for subnormal numbers and NaN."""
    edges = [0.0, -0.0, 1e-45, 1e-39, math.pi, 3.4e38, 3.3961775e38, math.inf, -math.inf, math.nan]
    ties = (np.arange(64, dtype=np.uint32) << 14 | 0x3F800000).view(np.float32)  # every fourth is a tie
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    value = np.concatenate([np.array(edges, np.float32), ties, nan])[None, None]
    bundles.write(tmp_path / "b", [[0]], {"logits": value}, dtype="bfloat16", stored="bfloat16")
    ours = parity.read_bundle(tmp_path / "b").stage("logits")
    theirs = torch.from_numpy(value).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0).view(torch.int16), theirs.nan_to_num(0).view(torch.int16))
    again = bundles.read(tmp_path / "b")[1]["logits"]
    assert np.array_equal(again, theirs.float(), equal_nan=True)


def test_bfloat16_of_jax_keeps_its_bits(bundles: ModuleType, tmp_path: Path) -> None:
    """JAX's arrays become NumPy's, with the bfloat16 of the package ml_dtypes."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    value = numbers(1, 2, 9).to(torch.bfloat16)
    bundles.write(
        tmp_path / "b", [[1, 2]], {"norm": value.float().numpy().astype(ml_dtypes.bfloat16)}, dtype="bfloat16"
    )
    found = parity.read_bundle(tmp_path / "b")
    assert found.stored_dtype("norm") == torch.bfloat16
    assert torch.equal(found.stage("norm"), value)


def test_the_dtypes_of_weights_and_activations_are_metadata(bundles: ModuleType, tmp_path: Path) -> None:
    more = {"weights_dtype": "bfloat16", "activations_dtype": "float32"}
    bundles.write(tmp_path / "b", [[1]], {"norm": np.ones((1, 1, 4))}, dtype="float32", **more)
    metadata, _ = bundles.read(tmp_path / "b")
    assert {key: metadata[key] for key in more} == more
    assert "prefill_length" not in metadata  # by default all positions
    assert parity.read_bundle(tmp_path / "b").prefill_length == 1


@pytest.mark.parametrize("folder", [WEIGHTS, NTK])
def test_the_checksum_is_that_of_the_kit(bundles: ModuleType, folder: Path) -> None:
    assert bundles.weights_checksum(folder) == parity.weights_checksum(open_checkpoint(folder)[1])


def test_the_checksum_of_several_files(bundles: ModuleType, tmp_path: Path) -> None:
    """How tensors are split does not matter; buffers and files that the index does not name are left out."""
    _, tensors = bundles.read(NTK / "model.safetensors")
    parts = [{}, {"transformer.h.0.attn.masked_bias": np.ones(1, np.float32)}]
    for number, (name, value) in enumerate(tensors.items()):
        parts[number % 2][name] = value
    places = {}
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors")
        places |= dict.fromkeys(part, f"{number}.safetensors")
    save_file({"x": np.ones(1)}, tmp_path / "truth.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(tensors, tmp_path / "model.safetensors")
    whole = bundles.weights_checksum(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert bundles.weights_checksum(tmp_path) == whole


def written(
    bundles: ModuleType, out: Path, ids: Tensor, mask: Tensor, changes: list[Change] | None = None
) -> Path:
    """What the reference computes in float32 with a mistake or none, written with NumPy."""
    weights = Weights(Checkpoint(NTK), torch.float32)
    kept: dict[str, np.ndarray] = {}
    run = Forward(weights, ids, (mask == 0).sum(dim=-1), changes=changes or ())
    run.run(lambda stage, value, start: kept.update({stage: value.numpy()}))
    bundles.write(out, ids.numpy(), kept, dtype="float32", attention_mask=mask.numpy())
    return out


no_rope = [Change(step, lambda run, right, x, cos, sin: x) for step in ("rotate_q", "rotate_k")]
relu = [Change("act", lambda run, right, gate: torch.relu(gate))]


@pytest.mark.parametrize(
    ("change", "first_stage"),
    [(None, None), (no_rope, "blocks.0.attn.q_rotated"), (relu, "blocks.0.mlp.product")],
)
def test_the_first_difference_is_that_of_the_kit(
    bundles: ModuleType, tmp_path: Path, change: list[Change] | None, first_stage: str | None
) -> None:
    ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    truth = tmp_path / "truth"
    parity.record(NTK, ids, truth, mask=mask, rounding=["float32"])
    found = bundles.first_difference(truth, written(bundles, tmp_path / "port", ids, mask, change))
    first = parity.diff(truth, tmp_path / "port").first_beyond
    if change is None:
        assert found is first is None
        return
    stage, error, tolerance = found
    assert stage == first.stage == first_stage
    assert error == pytest.approx(first.relative_rms, rel=1e-6)
    assert tolerance < first.tolerance < 1.1 * tolerance  # the kit adds what storing costs


def test_one_wrong_position_and_nan_are_differences(bundles: ModuleType, tmp_path: Path) -> None:
    ids = torch.arange(200).view(1, -1)
    truth = tmp_path / "truth"
    parity.record(NTK, ids, truth, rounding=["bfloat16"])
    _, tensors = bundles.read(truth)
    for factor in (1.3, np.nan):
        norm = tensors["norm"].copy()
        norm[0, 7] *= factor
        bundles.write(tmp_path / "port", ids, {"norm": norm}, dtype="bfloat16")
        stage, error, tolerance = bundles.first_difference(truth, tmp_path / "port")
        assert stage == "norm"
        assert not error <= tolerance
        if factor == 1.3:  # far less than the rounding of all positions together
            assert error == pytest.approx(0.3)
            assert 4 * parity.read_bundle(truth).rounding["bfloat16"]["norm"][0] > 0.3 / math.sqrt(200)


def test_what_cannot_be_compared_is_refused(bundles: ModuleType, tmp_path: Path) -> None:
    for name, ids, dtype in (("a", [[1, 2]], "float32"), ("b", [[1, 3]], "float32")):
        bundles.write(tmp_path / name, ids, {"norm": np.ones((1, 2, 4))}, dtype=dtype)
    with pytest.raises(ValueError, match="are of different ids"):
        bundles.first_difference(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="has no rounding of float32; record it in float64"):
        bundles.first_difference(tmp_path / "a", tmp_path / "a")


def test_numpy_is_all_it_takes(tmp_path: Path) -> None:
    """Copied to another place, in a process where nothing else can be imported."""
    (tmp_path / "bundle_numpy.py").write_text(SOURCE.read_text("utf-8"), "utf-8")
    parity.record(NTK, torch.arange(9).view(1, -1), tmp_path / "truth", rounding=["bfloat16"])
    program = """
import sys
for name in ("torch", "safetensors", "qwen_ref", "ml_dtypes", "jax"):
    sys.modules[name] = None
from bundle_numpy import first_difference, read, weights_checksum, write
metadata, tensors = read("truth")
stages = {name: value for name, value in tensors.items() if name != "input_ids"}
write("port", tensors["input_ids"], stages, dtype="bfloat16", stored="bfloat16")
print(first_difference("truth", "port"), metadata["weights_sha256"] == weights_checksum(sys.argv[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, NTK], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "None True\n", "")
    assert parity.diff(tmp_path / "truth", tmp_path / "port").within


def test_it_is_small() -> None:
    assert len(SOURCE.read_text("utf-8").splitlines()) <= 130
