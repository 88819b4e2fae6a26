"""The bundle's format: what any writer may put into it is read, and what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref import QwenConfig, parity
from qwen_ref.loading.loader import open_checkpoint
from qwen_ref.parity.bundle import (
    LAYER_STAGES,
    BundleWriter,
    read_bundle,
    read_ids,
    stage_widths,
    write_bundle,
)

CONFIG = QwenConfig.from_json(GOLDEN / "ntk_logn" / "config.json")
IDS = torch.arange(12).view(2, 6)
META = {"format_version": "1", "dtype": "float32"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file as a stranger would, with safetensors alone."""

    def call(tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> Path:
        path = tmp_path / "theirs.safetensors"
        found = {"input_ids": IDS, "logits": torch.randn(2, 6, 320)} if tensors is None else tensors
        merged = {key: value for key, value in {**META, **metadata}.items() if value is not None}
        save_file(found, path, metadata=merged or None)
        return path

    return call


# What is read


def test_a_bundle_gives_back_what_was_written(tmp_path: Path) -> None:
    stages = {name: torch.randn(2, 6, width) for name, width in stage_widths(CONFIG).items()}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    more = {"attention_mask": mask, "prefill_length": 4, "config": CONFIG, "weights_sha256": "ab" * 32}
    write_bundle(tmp_path / "b", IDS, stages, dtype="bfloat16", **more)
    bundle = read_bundle(tmp_path / "b")
    assert bundle.stages == list(stages)  # in the order in which data flows
    for name, value in stages.items():
        assert torch.equal(bundle.stage(name), value)
    assert torch.equal(bundle.input_ids, IDS)
    assert torch.equal(bundle.attention_mask, mask)
    assert (bundle.dtype, bundle.prefill_length, bundle.weights_sha256) == ("bfloat16", 4, "ab" * 32)
    assert bundle.config == vars(CONFIG)
    bundle.check_model(CONFIG)
    assert os.listdir(tmp_path) == ["b"]


def test_a_stage_comes_before_what_is_made_of_it() -> None:
    names = list(stage_widths(CONFIG))
    assert len(names) == 1 + 16 * CONFIG.num_hidden_layers + 2
    assert names.index("blocks.0.residual") < names.index("blocks.1.attn_norm") < names.index("norm")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tensors_may_have_another_dtype_and_shape(write: Callable, dtype: torch.dtype) -> None:
    heads = torch.randn(2, 6, 4, 16).to(dtype)
    bundle = read_bundle(write({"input_ids": IDS.int(), "blocks.0.attn.q": heads}))
    assert torch.equal(bundle.stage("blocks.0.attn.q"), heads.flatten(2))
    assert bundle.stored_dtype("blocks.0.attn.q") == dtype
    assert bundle.input_ids.dtype == torch.int64
    assert bundle.prefill_length == 6


def test_one_sequence_needs_no_batch_dimension(write: Callable) -> None:
    logits = torch.randn(6, 320)
    bundle = read_bundle(write({"input_ids": IDS[0].clone(), "logits": logits}))
    assert torch.equal(bundle.stage("logits"), logits[None])
    assert bundle.input_ids.shape == (1, 6)


def test_the_published_module_names_are_understood(write: Callable) -> None:
    theirs = {
        "transformer.wte": ("embed", 64),
        "transformer.h.2.ln_1": ("blocks.2.attn_norm", 64),
        "transformer.h.2.attn.rotary_q": ("blocks.2.attn.q_rotated", 64),
        "transformer.h.2.attn.rotary_k": ("blocks.2.attn.k_rotated", 64),
        "transformer.h.2.attn.c_proj": ("blocks.2.attn.out", 64),
        "transformer.h.2.ln_2": ("blocks.2.mlp_norm", 64),
        "transformer.h.2.mlp.w1": ("blocks.2.mlp.up", 160),
        "transformer.h.2.mlp.w2": ("blocks.2.mlp.gate", 160),
        "transformer.h.2.mlp.c_proj": ("blocks.2.mlp.down", 64),
        "transformer.h.2": ("blocks.2.residual", 64),
        "transformer.ln_f": ("norm", 64),
        "lm_head": ("logits", 320),
    }
    values = {name: torch.randn(2, 6, width) for name, (_, width) in theirs.items()}
    qkv = torch.randn(2, 6, 192)
    values["transformer.h.2.attn.c_attn"] = qkv
    values["transformer.h.2.mlp"] = values["transformer.h.2.mlp.c_proj"].clone()  # another name of it
    bundle = read_bundle(write({"input_ids": IDS, **values}))
    for name, (stage, _) in theirs.items():
        assert torch.equal(bundle.stage(stage), values[name])
    for part, third in zip("qkv", qkv.chunk(3, dim=-1), strict=True):
        assert torch.equal(bundle.stage(f"blocks.2.attn.{part}"), third)
    bundle.check_model(CONFIG)


def test_a_mask_of_ones_is_no_mask(write: Callable) -> None:
    path = write({"input_ids": IDS, "attention_mask": torch.ones(2, 6).bool(), "norm": torch.randn(2, 6, 64)})
    assert read_bundle(path).attention_mask is None


def test_numbers_at_padding_are_not_looked_at(write: Callable) -> None:
    logits = torch.randn(2, 6, 320)
    logits[0, :2] = torch.nan
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    bundle = read_bundle(write({"input_ids": IDS, "attention_mask": mask, "logits": logits}))
    bundle.require_finite()
    assert bundle.first_not_finite() is None


def test_the_first_stage_with_nan_is_named(write: Callable) -> None:
    values = {name: torch.randn(2, 6, width) for name, width in stage_widths(CONFIG).items()}
    values["blocks.1.mlp.gate"][1, 4, 7] = torch.inf
    values["logits"][:] = torch.nan
    values["blocks.1.attn.out"] = values["blocks.1.attn.out"].to(torch.bfloat16)
    bundle = read_bundle(write({"input_ids": IDS, **values}))
    assert bundle.first_not_finite() == ("blocks.1.mlp.gate", 1, 4)
    with pytest.raises(
        ValueError, match=r"1 of 160 .* first at blocks\.1\.mlp\.gate, row 1, position 4: .* gate"
    ):
        bundle.require_finite()


def test_the_checksum_is_as_the_readme_says_and_knows_no_shards() -> None:
    _, stored = open_checkpoint(GOLDEN / "extended_base")
    digest = hashlib.sha256()
    for name in sorted(stored):
        tensor = stored[name].read()
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name} BF16 {shape}\n".encode())
        digest.update(tensor.contiguous().view(torch.int16).numpy().tobytes())
    assert parity.weights_checksum(stored) == digest.hexdigest()


# What is refused


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as caught:
        read_bundle(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format_version": None}, 'not a bundle: its metadata has no "format_version"'),
        ({"format_version": None, "dtype": None}, "not a bundle"),
        ({"format_version": "2"}, "format_version is 2, and this qwen_ref reads up to 1; use a newer one"),
        ({"format_version": "0"}, "should be 1"),
        ({"format_version": "1.0"}, "should be 1"),
        ({"dtype": None}, "dtype is None, should be the one that was computed in: bfloat16"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"prefill_length": "0"}, "prefill_length is '0', should be a whole number from 1 to 6"),
        ({"prefill_length": "7"}, "prefill_length is '7'"),
        ({"prefill_length": "-1"}, "prefill_length is '-1'"),
        ({"config": "{"}, "config is no JSON"),
        ({"config": "[1]"}, "config must be a JSON object"),
        ({"format_version": "٢"}, "should be 1"),
        ({"prefill_length": "٣"}, "should be a whole number"),
        ({"config": '{"hidden_size": "wide"}'}, "hidden_size is 'wide', should be a number"),
        ({"weights_sha256": ""}, "should be 64 hexadecimal digits"),
        ({"rounding": '{"float32": {"norm": [true, false]}}'}, "not two numbers"),
        ({"rounding": '{"float32": {"norm": [1e308, 1e308]}}'}, "not two numbers from 0 to below 1"),
        ({"rounding": '{"float32": 3}'}, "rounding must be"),
        ({"rounding": '{"float32": {"norm": [1]}}'}, "rounding of 'norm' is [1], not two numbers"),
        ({"rounding": '{"float32": {"norm": [1, NaN]}}'}, "not two numbers"),
        ({"rounding": '{"float32": {"norm": [1, -1]}}'}, "not two numbers"),
    ],
)
def test_wrong_metadata_is_named(write: Callable, metadata: dict[str, str | None], said: str) -> None:
    assert said in refused(write(None, **metadata))


NORM = torch.zeros(2, 6, 64)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"input_ids": None, "logits": NORM}, "no tensor input_ids"),
        ({}, "no stage in it"),
        ({"input_ids": IDS.float(), "norm": NORM}, "input_ids is torch.float32, should be integers"),
        ({"input_ids": IDS.view(1, 2, 6).clone(), "norm": NORM}, "input_ids is [1, 2, 6]"),
        ({"input_ids": IDS[:, :0].clone(), "norm": NORM}, "input_ids is [2, 0]"),
        ({"norm": NORM.long()}, "norm is I64, should be"),
        ({"norm": NORM[:, :5].clone()}, "norm is [2, 5, 64], should begin with input_ids' [2, 6]"),
        ({"norm": NORM[:, :, 0].clone()}, "norm is [2, 6], should begin with"),
        ({"norms": NORM}, "'norms': no stage of this format"),
        ({"blocks.x.attn.q": NORM}, "'blocks.x.attn.q': no stage"),
        ({"blocks.-1.residual": NORM}, "'blocks.-1.residual': no stage"),
        ({"blocks.01.residual": NORM}, "'blocks.01.residual': no stage"),
        ({"transformer.h.N.ln_1": NORM}, "'transformer.h.N.ln_1': no stage"),
        ({"input_ids": IDS.bool(), "norm": NORM}, "input_ids is torch.bool, should be integers"),
        ({"attention_mask": torch.ones(3, 3).long()}, "attention_mask must have"),
        ({"attention_mask": torch.full((2, 6), 7)}, "attention_mask must have"),
        ({"transformer.h.0.attn.c_attn": NORM}, "no three equal parts for q, k and v"),
        ({"norm": NORM, "transformer.ln_f": NORM + 1}, "norm and transformer.ln_f are both norm, and differ"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])}, "attention_mask must have"),
        ({"attention_mask": torch.zeros(2, 6, dtype=torch.int64)}, "at least one token"),
        ({"attention_mask": torch.ones(1, 6).long()}, "attention_mask must have"),
    ],
)
def test_tensors_that_do_not_fit_are_named(write: Callable, tensors: dict[str, Tensor], said: str) -> None:
    found = {"input_ids": IDS, **({"norm": NORM} if "attention_mask" in tensors else {}), **tensors}
    assert said in refused(write({name: value for name, value in found.items() if value is not None}))


def test_a_prefill_that_ends_in_padding_is_refused(write: Callable) -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    path = write({"input_ids": IDS, "norm": NORM, "attention_mask": mask}, prefill_length="3")
    assert "prefill_length is '3', should be a whole number from 4 to 6" in refused(path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 60, 400, -1])
def test_a_file_that_was_cut_is_refused(write: Callable, keep: int) -> None:
    path = write()
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    assert "not a complete safetensors file" in refused(path)


def test_only_regular_files_are_bundles(special: tuple[Path, str]) -> None:
    path, kind = special
    assert f"{path}: cannot be read: it is {kind}, not a file" in refused(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "not a bundle" in refused(GOLDEN / "ntk_logn" / "model.safetensors")
    assert "cannot be read: No such file" in refused(tmp_path / "none")
    assert "not a file" in refused(tmp_path)
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refused(tmp_path / "pointer")
    (tmp_path / "text").write_text("hello, I am no safetensors file at all")
    assert "not a complete safetensors file" in refused(tmp_path / "text")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"logits": torch.zeros(2, 6, 321)}, r"logits is \[2, 6, 321\], should be \[2, 6, 320\]"),
        ({"blocks.3.residual": NORM}, "blocks.3.residual is there, the model has 3 layers"),
        ({"transformer.h.0.attn.c_attn": torch.zeros(2, 6, 96)}, r"should be \[2, 6, 192\]"),
    ],
)
def test_a_bundle_of_another_model_is_refused(write: Callable, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_bundle(write({"input_ids": IDS, **tensors})).check_model(CONFIG)


@pytest.mark.parametrize("wrong", [-1, 320])
def test_ids_outside_the_vocabulary_are_refused(write: Callable, wrong: int) -> None:
    ids = IDS.clone()
    ids[1, 2] = wrong
    with pytest.raises(ValueError, match=f"token id {wrong} is outside the model's vocabulary, 0 to 319"):
        read_bundle(write({"input_ids": ids, "norm": NORM})).check_model(CONFIG)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_ids": IDS.double()}, "input_ids is torch.float64"),
        ({"input_ids": [[1, 2]]}, "should be a tensor"),
        ({"stages": {}}, "no stage in it"),
        ({"stages": {"foo": NORM}}, "'foo' is no tensor or no stage"),
        ({"stages": {"norm": NORM.long()}}, "norm is torch.int64"),
        ({"stages": {"norm": NORM.numpy()}}, "'norm' is no tensor"),
        ({"stages": {"norm": NORM[:1]}}, "should begin with input_ids' [2, 6]"),
        ({"dtype": "auto"}, "dtype is 'auto'"),
        ({"prefill_length": 0}, "prefill_length is '0'"),
        ({"prefill_length": 99}, "prefill_length is '99'"),
        ({"attention_mask": IDS}, "attention_mask must have"),
        ({"weights_sha256": "x"}, "64 hexadecimal digits"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, wrong: dict, said: str) -> None:
    arguments = {"input_ids": IDS, "stages": {"norm": NORM}, "dtype": "float32", **wrong}
    with pytest.raises(ValueError, match=re.escape(said)):
        write_bundle(tmp_path / "b", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_bundle_of_another_size_is_refused_though_its_stages_fit(tmp_path: Path) -> None:
    other = replace(CONFIG, num_hidden_layers=4)
    write_bundle(tmp_path / "b", IDS, {"norm": NORM}, dtype="float32", config=other)
    with pytest.raises(ValueError, match="of a model with num_hidden_layers=4, this one has 3"):
        read_bundle(tmp_path / "b").check_model(CONFIG)


def test_a_stage_twice_is_fine_if_it_is_the_same(write: Callable) -> None:
    qkv = torch.randn(2, 6, 192)
    q = qkv[..., :64].unflatten(-1, (4, 16)).contiguous()
    path = write({"input_ids": IDS, "transformer.h.0.attn.c_attn": qkv, "blocks.0.attn.q": q})
    assert torch.equal(read_bundle(path).stage("blocks.0.attn.q"), q.flatten(2))
    refused(write({"input_ids": IDS, "transformer.h.0.attn.c_attn": qkv, "blocks.0.attn.q": q + 1}))


def test_a_thousand_stages_take_no_time(write: Callable) -> None:
    stages = {
        f"blocks.{layer}.{stage}": torch.zeros(2, 6, 1) for layer in range(100) for stage in LAYER_STAGES
    }
    bundle = read_bundle(write({"input_ids": IDS, **stages}))
    assert bundle.stages == list(stages)
    assert parity.diff(bundle.path, bundle.path).within


# Writing piece by piece


@pytest.mark.parametrize("name", ["folder", "device", "none/b", ""])
def test_only_a_file_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "device")
    with pytest.raises(ValueError, match="cannot be written"):
        write_bundle(tmp_path / name if name else "", IDS, {"norm": NORM}, dtype="float32")
    assert sorted(os.listdir(tmp_path)) == ["device", "folder"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch\n"
        "from qwen_ref.parity import write_bundle\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "stages = {'norm': torch.ones(2, 6, 64)}\n"
        "write_bundle(sys.argv[1], torch.ones(2, 6).long(), stages, dtype='float32')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "b")]
    # Without coverage, whose own file would not fit either.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert f"InputError: {tmp_path / 'b'}: cannot be written: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_bundle(tmp_path / "link", IDS, {"norm": NORM}, dtype="float32")
    assert (tmp_path / "link").is_symlink()
    assert read_bundle(tmp_path / "target").stages == ["norm"]


def test_a_writer_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_text("before")
    kinds = {"norm": (torch.float32, (1, 2, 4))}

    def fail() -> None:
        with BundleWriter(path, kinds, META) as writer:
            writer.write("norm", torch.zeros(1, 2, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["b"]


def test_pieces_land_at_their_positions(tmp_path: Path) -> None:
    whole = torch.randn(3, 5, 2, 4).bfloat16()
    kinds = {"ids": (torch.int64, (3, 5)), "norm": (torch.bfloat16, (3, 5, 2, 4))}
    with BundleWriter(tmp_path / "b", kinds, META, room=100) as writer:
        for start, end in ((3, 5), (0, 1), (1, 3)):
            writer.write("norm", whole[:, start:end], start)
        writer.write("ids", torch.arange(15).view(3, 5))
        writer.describe({"rounding": json.dumps({"float32": {}})})
    with safe_open(tmp_path / "b", framework="pt") as file:
        assert torch.equal(file.get_tensor("norm"), whole)
        assert torch.equal(file.get_tensor("ids"), torch.arange(15).view(3, 5))
        assert file.metadata()["rounding"] == '{"float32": {}}'


# Files of ids


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("1 2 3", [[1, 2, 3]]),
        ("1,2,\n3\n", [[1, 2, 3]]),
        ("[1, 2, 3]", [[1, 2, 3]]),
        ("\ufeff1 2 3", [[1, 2, 3]]),
        ("[[1, 2, 3], [4]]", [[1, 2, 3], [0, 0, 4]]),
    ],
)
def test_ids_are_read_from_a_file(tmp_path: Path, text: str, rows: list[list[int]]) -> None:
    (tmp_path / "ids").write_text(text, encoding="utf-8")
    ids, mask = read_ids(tmp_path / "ids")
    assert ids.tolist() == rows
    assert (mask is None) == (len(rows) == 1)
    if mask is not None:
        assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "text",
    ["", "a b", "1.5", "[1.5]", "[]", "[[]]", "[[1], 2]", "[true]", "-1", "[1", "9" * 5000, "1_0", "+5", "٣"],
)
def test_what_are_no_ids_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(ValueError, match="ids"):
        read_ids(tmp_path / "ids")
