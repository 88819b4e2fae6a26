"""Folders as tools leave them: other names of files, stale tensors, mixed dtypes, and the notes on them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, Run, change_json, refused
from golden_folders import INDEX, SHARDS, SINGLE, change, stored_tensors, tensors_of
from safetensors.torch import save_file

from qwen_ref import QwenConfig, checkpoint, load_model
from qwen_ref.commands.generate import main as generate
from qwen_ref.commands.inspect import main as inspect
from qwen_ref.config import InputError

IDS = torch.arange(3, 73)[None]


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def loads_as_golden(folder: Path, golden: str) -> None:
    want = load_model(GOLDEN / golden, "auto")(IDS)
    assert torch.equal(load_model(folder, "auto")(IDS), want)


def reason(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(folder), "")) < 4000
    return message


# Names of files


def test_an_index_that_names_only_the_single_file(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight_map = dict.fromkeys(stored_tensors(single), SINGLE)
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loads_as_golden(single, "ntk_logn")
    assert notes(caplog) == []


def test_one_numbered_file_without_an_index(single: Path) -> None:
    (single / SINGLE).rename(single / "model-00001-of-00001.safetensors")
    loads_as_golden(single, "ntk_logn")


def test_numbered_files_without_their_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    loads_as_golden(sharded, "extended_base")


def test_numbered_files_without_their_index_must_all_be_there(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / SHARDS[1]).unlink()
    message = reason(sharded)
    assert f"neither {SINGLE} nor {INDEX} is in the folder" in message
    assert f"{SHARDS[0]} (without {SHARDS[1]}: fetch all of the set)" in message


def test_tensors_twice_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    change(sharded / SHARDS[0], lm_head__weight=tensors_of(sharded / SHARDS[2])["lm_head.weight"])
    assert f"tensors stored twice: lm_head.weight ({SHARDS[0]} and {SHARDS[2]})" in reason(sharded)


# A GPTQ release


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    packed_elsewhere.make_packed(WEIGHTS, folder / "packed", folder / "plain")
    return folder / "packed"


@pytest.fixture
def gptq(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "packed")


def split(folder: Path, name: str) -> list[str]:
    """Puts the tensors of model.safetensors into two numbered files with this name."""
    tensors = tensors_of(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = [f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({key: tensors[key] for key in sorted(tensors)[i::2]}, folder / file)
    weight_map = {key: files[i % 2] for i, key in enumerate(sorted(tensors))}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def settings_with(folder: Path, **more: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change_json(folder / "config.json", quantization_config={**raw["quantization_config"], **more})


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_the_name_that_model_file_base_name_gives(file: str, suffix: str, gptq: Path, packed: Path) -> None:
    settings = json.loads((gptq / "config.json").read_text())["quantization_config"]
    named = {**settings, "model_file_base_name": f"weights-4bit.v1{suffix}"}
    if file == "config.json":
        change_json(gptq / file, quantization_config=named)
    else:
        (gptq / file).write_text(json.dumps(named))
    (gptq / SINGLE).rename(gptq / "weights-4bit.v1.safetensors")
    assert torch.equal(load_model(gptq)(IDS), load_model(packed)(IDS))


def test_the_name_that_is_given_comes_before_the_usual_one(
    gptq: Path, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(gptq / SINGLE, gptq / "mine.safetensors")
    zeros = torch.zeros_like(tensors_of(gptq / SINGLE)["lm_head.weight"])
    change(gptq / SINGLE, lm_head__weight=zeros)
    settings_with(gptq, model_file_base_name="mine")
    assert torch.equal(load_model(gptq)(IDS), load_model(packed)(IDS))
    said = f"{SINGLE} is not read, though it has tensors of the model; the weights are in mine.safetensors"
    assert notes(caplog) == [said]


@pytest.mark.parametrize("name", ["../other/model", "a/b", "", 5, ["model"]])
def test_the_name_that_is_given_stays_in_the_folder(name: object, gptq: Path) -> None:
    settings_with(gptq, model_file_base_name=name)
    assert "must be the name of a file in the folder" in reason(gptq)


@pytest.mark.parametrize("indexed", [True, False])
def test_files_numbered_by_autogptq(indexed: bool, gptq: Path, packed: Path) -> None:
    split(gptq, "gptq_model-4bit-32g")
    if not indexed:
        (gptq / "gptq_model-4bit-32g.safetensors.index.json").unlink()
    assert torch.equal(load_model(gptq)(IDS), load_model(packed)(IDS))


def test_several_of_autogptqs_names_need_the_one_that_is_meant(gptq: Path, packed: Path) -> None:
    (gptq / SINGLE).rename(gptq / "gptq_model-4bit-32g.safetensors")
    shutil.copy(gptq / "gptq_model-4bit-32g.safetensors", gptq / "gptq_model-8bit-32g.safetensors")
    message = reason(gptq)
    assert "gptq_model-8bit-32g.safetensors (one of several; quantize_config.json's" in message
    settings_with(gptq, model_file_base_name="gptq_model-4bit-32g")
    assert torch.equal(load_model(gptq)(IDS), load_model(packed)(IDS))


def test_a_method_in_capitals(gptq: Path, packed: Path) -> None:
    settings_with(gptq, quant_method="GPTQ")
    assert torch.equal(load_model(gptq)(IDS), load_model(packed)(IDS))


# The index decides


def test_of_a_tensor_in_two_files_the_index_takes_one(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale = torch.zeros(320, 64, dtype=torch.bfloat16)
    for shard in SHARDS[:2]:
        change(sharded / shard, lm_head__weight=stale)
    for shard in SHARDS[1:]:  # neither the first nor the last file is always the right one
        change(sharded / shard, transformer__wte__weight=stale)
    loads_as_golden(sharded, "extended_base")
    (said,) = notes(caplog)
    assert said.startswith(f"tensors stored twice, of which {INDEX} decides: ")
    assert f"lm_head.weight from {SHARDS[2]}" in said
    assert f"transformer.wte.weight from {SHARDS[0]}" in said
    want = load_model(GOLDEN / "extended_base", "auto")(IDS)
    assert torch.equal(checkpoint.load_model(sharded, "auto")(IDS), want)  # that of the seven files as well


def test_what_the_index_does_not_name_and_nothing_needs_is_not_read(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(sharded / SHARDS[0], transformer__h__7__ln_1__weight=torch.zeros(64))
    loads_as_golden(sharded, "extended_base")
    said = f"transformer.h.7.ln_1.weight: not read, since {INDEX} does not name it"
    assert notes(caplog) == [said]


@pytest.mark.parametrize("name", ["old.safetensors", SINGLE])
def test_a_stale_file_beside_the_index(name: str, sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"lm_head.weight": torch.zeros(320, 64)}, sharded / name)
    loads_as_golden(sharded, "extended_base")
    said = f"{name} is not read, though it has tensors of the model; the weights are in {', '.join(SHARDS)}"
    assert notes(caplog) == [said]


def test_an_adapter_is_not_silently_left_out(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"base_model.model.lora_A.weight": torch.zeros(4)}, single / "adapter_model.safetensors")
    load_model(single)
    (said,) = notes(caplog)
    assert said.startswith("adapter_model.safetensors is not applied: it is a LoRA adapter; merge it")


# Dtypes


def test_norms_in_float32_beside_bfloat16(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    norms = {n: t for n, t in tensors_of(single / SINGLE).items() if t.ndim == 1 and "ln_" in n}
    for name, tensor in norms.items():
        change(single / SINGLE, **{name: tensor.float()})
    loads_as_golden(single, "ntk_logn")
    (said,) = notes(caplog)
    assert said.startswith(
        f"{len(norms)} of 27 tensors are stored in float32 and rounded to bfloat16, as the"
    )
    caplog.clear()
    want = load_model(GOLDEN / "ntk_logn", "float32")(IDS)
    assert torch.equal(load_model(single, "float32")(IDS), want)
    assert notes(caplog) == []


# A folder without weights


@pytest.mark.parametrize(
    ("name", "tensors", "why"),
    [
        ("pytorch_model.safetensors", None, f"its name is not one of a checkpoint's: rename it to {SINGLE}"),
        ("model.fp16.safetensors", None, f"its name is not one of a checkpoint's: rename it to {SINGLE}"),
        ("adapter_model.safetensors", {"x": torch.ones(1)}, "a LoRA adapter, not a model: merge it into its"),
        (
            "logits.safetensors",
            {"logits": torch.ones(1)},
            "none of its tensors is this model's; it has ",
        ),
        ("part.safetensors", {"transformer.h.0.ln_1.weight": torch.ones(1)}, "a part of a model"),
        ("qwen2.safetensors", {"model.norm.weight": torch.ones(1)}, "none of its tensors is this model's"),
    ],
)
def test_each_file_that_is_not_taken_has_its_reason(
    name: str, tensors: dict | None, why: str, single: Path
) -> None:
    content = tensors_of(single / SINGLE)
    (single / SINGLE).unlink()
    save_file(content if tensors is None else tensors, single / name)
    assert f"not taken: {name} ({why}" in reason(single)


def test_a_damaged_file_of_another_name_has_its_reason(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / "a.safetensors").write_bytes(b"x")
    (single / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = reason(single)
    assert "a.safetensors (not a complete safetensors file: fetch it again)" in message
    assert "b.safetensors (a Git LFS pointer" in message


# Other models


@pytest.mark.parametrize("key", ["visual", "audio"])
def test_a_model_with_an_encoder_is_named(key: str, single: Path, run_command: Run) -> None:
    change_json(single / "config.json", **{key: {"heads": 16, "layers": 48}})
    asked = ((inspect, "inspect", single), (generate, "x", "--model", single))
    for line in (refused(run_command(*command)) for command in asked):
        assert f'"{key}": Qwen-VL or Qwen-Audio, with an encoder; only text models are read' in line


# A config.json that newer transformers saved again. The last is what its save_pretrained wrote of this one.

RESAVED: dict[str, Callable[[dict], dict]] = {
    "transformers 4.3x": lambda raw: {
        **raw,
        "_name_or_path": "Qwen/Qwen-1_8B",
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "Qwen/Qwen-1_8B--configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "Qwen/Qwen-1_8B--modeling_qwen.QWenLMHeadModel",
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_flash_attn": "auto",
        "softmax_in_fp32": False,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
    },
    "transformers 4.5x and 5": lambda raw: {
        **{key: value for key, value in raw.items() if key != "torch_dtype"},
        "_attn_implementation_autoset": True,
        "dtype": "bfloat16",
        "transformers_version": "5.3.0",
        "pad_token_id": None,
        "rope_scaling": None,
        "sliding_window": None,
        "num_key_value_heads": raw["num_attention_heads"],
    },
    "transformers 5.3.0": lambda raw: {
        **{key: value for key, value in raw.items() if key != "use_cache"},
        "auto_map": {"AutoConfig": "Qwen/Qwen-7B--configuration_qwen.QWenConfig"},
        "dtype": "bfloat16",
        "transformers_version": "5.3.0",
    },
}


@pytest.mark.parametrize("saved", RESAVED)
def test_a_configuration_that_was_saved_again(saved: str, single: Path) -> None:
    raw = RESAVED[saved](json.loads((single / "config.json").read_text()))
    (single / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    assert QwenConfig.from_json(single / "config.json") == QwenConfig.from_json(
        GOLDEN / "ntk_logn" / "config.json"
    )
    loads_as_golden(single, "ntk_logn")


def test_a_command_says_each_note_once(sharded: Path, run_command: Run) -> None:
    shutil.copy(WEIGHTS / "qwen.tiktoken", sharded)
    change(sharded / SHARDS[0], transformer__h__7__ln_1__weight=torch.zeros(64))
    lines = run_command(inspect, "inspect", sharded).err.splitlines()
    assert [line for line in lines if "does not name it" in line] == [
        f"qwen_ref: note: transformer.h.7.ln_1.weight: not read, since {INDEX} does not name it"
    ]


def test_an_adapters_folder_is_named(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lora_A.weight": torch.zeros(4)}, tmp_path / "adapter_model.safetensors")
    want = f"{tmp_path}: a LoRA adapter, not a model; merge it into its base model first"
    assert reason(tmp_path) == want
    assert want in refused(run_command(generate, "x", "--model", tmp_path))


def test_the_dtype_of_a_gptq_checkpoint_is_that_of_its_plain_matrices(gptq: Path) -> None:
    for name, tensor in tensors_of(gptq / SINGLE).items():
        if name.endswith(".scales"):
            change(gptq / SINGLE, **{name: tensor.float()})
    assert load_model(gptq, "auto").embed.weight.dtype == torch.float16


def test_inspect_names_every_dtype_of_the_matrices(single: Path, run_command: Run) -> None:
    head = tensors_of(single / SINGLE)["lm_head.weight"]
    change(single / SINGLE, lm_head__weight=head.float())
    assert "of weights in bfloat16 and float32 and" in run_command(inspect, "inspect", single).out


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, "yarn", ["x"]])
def test_rope_parameters_that_change_the_model_are_refused(rope: object, single: Path) -> None:
    change_json(single / "config.json", rope_parameters=rope)
    assert "rope_parameters=" in reason(single)
    same = {"rope_type": "default", "rope_theta": 10000.0}
    change_json(single / "config.json", rope_parameters=same)
    loads_as_golden(single, "ntk_logn")


def test_a_vocabulary_that_was_cut_at_a_line_is_noted(tmp_path: Path, run_command: Run) -> None:
    """Its control tokens have other ids than in training: the text would be wrong in silence."""
    folder = shutil.copytree(WEIGHTS, tmp_path / "cut")
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines[:2400]))
    said = run_command(generate, "x", "--model", folder, "--max-new-tokens", "1").err
    assert (
        "note: a text ends at 2500, which is '<|extra_97|>' by qwen.tiktoken, while <|endoftext|> is 2400"
        in said
    )
    assert "cut short?" not in run_command(generate, "x", "--max-new-tokens", "1").err
