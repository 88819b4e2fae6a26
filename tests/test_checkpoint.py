"""Checkpoint folders: the tensor table, and loading that copies nothing.

Bits are those of weights, which are copied or cast, and of logits of one model computed twice: no processor's
kernels make them differ.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, change_json, golden_copy, python
from golden_folders import INDEX, SHARDS, SINGLE, change, change_map, stored_tensors
from safetensors.torch import save_file

from qwen_ref import Qwen, QwenConfig, load_model
from qwen_ref.checkpoint import tensor_table

DTYPES = ["bfloat16", "float16", "float32", "float64"]

# A layer's tensors: published name → the model's name, shape, cut for tensor parallelism.
LAYER = {
    "ln_1.weight": ("attn_norm.weight", "D", None),
    "attn.c_attn.weight": ("attn.qkv.weight", "3D D", "heads"),
    "attn.c_attn.bias": ("attn.qkv.bias", "3D", "heads"),
    "attn.c_proj.weight": ("attn.out.weight", "D D", "columns"),
    "ln_2.weight": ("mlp_norm.weight", "D", None),
    "mlp.w1.weight": ("mlp.up.weight", "F D", "rows"),
    "mlp.w2.weight": ("mlp.gate.weight", "F D", "rows"),
    "mlp.c_proj.weight": ("mlp.down.weight", "D F", "columns"),
}
ENDS = {
    "transformer.wte.weight": ("embed.weight", "V D", "rows"),
    "transformer.ln_f.weight": ("norm.weight", "D", None),
    "lm_head.weight": ("lm_head.weight", "V D", "rows"),
}
# What the published indices say of themselves: parameters, total_size in bfloat16, tensors.
PUBLISHED = {
    "1.8b": (1_836_828_672, 3_673_657_344, 195),
    "7b": (7_721_324_544, 15_442_649_088, 259),
    "14b": (14_167_290_880, 28_334_581_760, 323),
    "72b": (72_287_920_128, 144_575_840_256, 643),
}


def ours(published: str) -> str:
    """The model's name of a published tensor, by the table above."""
    if published in ENDS:
        return ENDS[published][0]
    _, _, layer, name = published.split(".", 3)
    return f"blocks.{layer}.{LAYER[name][0]}"


def assert_loads(folder: Path, like: Path) -> None:
    """The folder gives every value of another."""
    model, expected = load_model(folder, "auto"), stored_tensors(like)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, {ours(key): tensor for key, tensor in expected.items()}[name]), name


# The tensor table


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_adds_up_to_the_published_index(size: str):
    table = tensor_table(QwenConfig.preset(size))
    parameters = sum(math.prod(spec.shape) for spec in table)
    assert (parameters, parameters * torch.bfloat16.itemsize, len(table)) == PUBLISHED[size]


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_has_the_published_names_shapes_and_cuts(size: str):
    config = QwenConfig.preset(size)
    sizes = {"D": config.hidden_size, "F": config.intermediate_size // 2, "V": config.vocab_size}
    sizes["3D"] = 3 * sizes["D"]
    expected = dict(ENDS)
    for layer in range(config.num_hidden_layers):
        for name, (local, shape, cut) in LAYER.items():
            expected[f"transformer.h.{layer}.{name}"] = (f"blocks.{layer}.{local}", shape, cut)
    assert {spec.published: (spec.name, spec.shape, spec.cut) for spec in tensor_table(config)} == {
        published: (local, tuple(sizes[letter] for letter in shape.split()), cut)
        for published, (local, shape, cut) in expected.items()
    }


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_table_is_the_models_state_dict(size: str):
    config = QwenConfig.preset(size)
    with torch.device("meta"):
        state = Qwen(config).state_dict()
    assert {spec.name: spec.shape for spec in tensor_table(config)} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }


# Good folders


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("golden", ["extended_base", "ntk_logn"])
def test_every_value_arrives_under_its_meaning_in_every_dtype(golden: str, dtype: str):
    model, stored = load_model(GOLDEN / golden, dtype=dtype), stored_tensors(GOLDEN / golden)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {ours(name) for name in stored}
    for name, tensor in stored.items():
        assert torch.equal(parameters[ours(name)], tensor.to(getattr(torch, dtype))), name
        assert parameters[ours(name)].dtype == getattr(torch, dtype)


def test_the_golden_folder_really_has_a_layer_in_two_files():
    places: dict[str, set[str]] = {}
    for name, file in json.loads((GOLDEN / "extended_base" / INDEX).read_text())["weight_map"].items():
        places.setdefault(".".join(name.split(".")[:3]), set()).add(file)
    assert max(len(files) for files in places.values()) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_stored_dtype(dtype: str, single: Path):
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored_tensors(single).items()}
    save_file(stored, single / SINGLE)
    model = load_model(single, "auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])


def test_the_model_is_in_eval_mode_without_gradients():
    model = load_model(GOLDEN / "extended_base", "auto")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("golden", ["extended_base", "ntk_logn"])
def test_progress_ends_at_the_total(golden: str):
    calls: list[tuple[int, int]] = []
    load_model(GOLDEN / golden, dtype="float32", progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in stored_tensors(GOLDEN / golden).values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert {call[1] for call in calls} == {total}


def test_buffers_of_old_exports_are_ignored_listed_or_not(sharded: Path):
    buffers = {
        "transformer__h__0__attn__masked_bias": torch.tensor(-1e4, dtype=torch.float32),
        "transformer__h__1__attn__rotary_emb__inv_freq": torch.ones(8, dtype=torch.float32),
        "transformer__rotary_emb__inv_freq": torch.ones(8, dtype=torch.int64),
    }
    change(sharded / SHARDS[0], **buffers)
    change(sharded / SHARDS[1], transformer__rotary_emb__inv_freq=torch.ones(8))  # twice, even
    change_map(sharded, transformer__h__0__attn__masked_bias=SHARDS[0])
    change_map(sharded, transformer__h__2__attn__masked_bias=SHARDS[2])  # which does not have it
    assert_loads(sharded, like=GOLDEN / "extended_base")
    calls: list[tuple[int, int]] = []
    load_model(sharded, "auto", progress=lambda *call: calls.append(call))
    assert calls[-1] == (366_592, 366_592)  # the index's total_size: weights only


def test_links_are_followed_as_the_hub_cache_makes_them(sharded: Path, tmp_path: Path):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))  # a blob has no suffix
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "model").symlink_to(snapshot, target_is_directory=True)
    assert_loads(snapshot, like=GOLDEN / "extended_base")
    assert_loads(tmp_path / "model", like=GOLDEN / "extended_base")


def test_whatever_else_is_in_the_folder_is_no_problem(sharded: Path):
    for name in ("README.md", "LICENSE", "tokenizer_config.json", "qwen.tiktoken", "pytorch_model.bin"):
        (sharded / name).write_bytes(b"\xff not what it says")
    (sharded / "modeling_qwen.py").write_text("raise SystemExit")
    (sharded / "other.safetensors").write_bytes(b"in no weight_map")
    (sharded / ".cache" / "huggingface").mkdir(parents=True)
    change_json(sharded / "config.json", auto_map={"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"})
    assert_loads(sharded, like=GOLDEN / "extended_base")


def test_a_tensor_that_the_index_forgot_is_taken_from_its_file(sharded: Path):
    change_map(sharded, lm_head__weight=...)
    assert_loads(sharded, like=GOLDEN / "extended_base")


def test_a_folder_may_be_a_string_and_its_files_read_only(single: Path):
    for file in single.iterdir():
        file.chmod(0o444)
    assert torch.equal(load_model(str(single), "auto").norm.weight, load_model(single, "auto").norm.weight)


@pytest.mark.parametrize("spaces", [1, 2, 7])
def test_tensors_at_any_alignment_are_read_right(spaces: int, single: Path):
    raw = (single / SINGLE).read_bytes()
    header = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
    (single / SINGLE).write_bytes(
        struct.pack("<Q", len(header) + spaces) + header + b" " * spaces + raw[8 + len(header) :]
    )
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(single, "auto")(ids), load_model(GOLDEN / "ntk_logn", "auto")(ids))


# Weights lie in the mapped file

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def mapped_ranges(folder: Path) -> list[range]:
    """The addresses at which files of a folder are mapped into this process."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    starts_and_ends = [line[0].split("-") for line in lines if line[-1].startswith(f"{folder.resolve()}/")]
    return [range(int(start, 16), int(end, 16)) for start, end in starts_and_ends]


@linux_only
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_stored_dtype_on_the_cpu_is_a_view_of_the_mapped_file(layout: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(layout)
    model = load_model(folder, dtype="bfloat16")
    ranges = mapped_ranges(folder)
    for name, parameter in model.named_parameters():
        last = parameter.data_ptr() + parameter.nbytes - 1
        assert any(parameter.data_ptr() in addresses and last in addresses for addresses in ranges), name


@linux_only
def test_a_converted_model_keeps_no_file_mapped(single: Path):
    model = load_model(single, dtype="float32")
    assert model.lm_head.weight.dtype == torch.float32
    assert mapped_ranges(single) == []


def test_writing_to_a_mapped_weight_never_reaches_the_file(single: Path):
    before = (single / SINGLE).read_bytes()
    model = load_model(single, "auto")
    for parameter in model.parameters():
        parameter.zero_()
    assert not model.lm_head.weight.any()
    assert (single / SINGLE).read_bytes() == before


MEASURE = """
import sys
from pathlib import Path
from qwen_ref import load_model

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

small, large = sys.argv[1:]
load_model(small, "auto"), load_model(small, "float32")  # imports and pools that come with the first use
for dtype in ("bfloat16", "float32"):
    before = anonymous()
    model = load_model(large, dtype)
    print(anonymous() - before)
    del model
"""


@linux_only
def test_loading_in_the_stored_dtype_takes_no_memory(single: Path, tmp_path: Path):
    config = QwenConfig.from_json(single / "config.json")
    folder = golden_copy("ntk_logn", tmp_path / "large")
    change_json(folder / "config.json", vocab_size=250_000)
    table = tensor_table(QwenConfig.from_json(folder / "config.json"))
    weights = {spec.published: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in table}
    save_file(weights, folder / SINGLE)
    size = (folder / SINGLE).stat().st_size
    assert size > 64e6 > 100 * (single / SINGLE).stat().st_size
    assert config.vocab_size < 1000

    done = python("-c", MEASURE, single, folder)
    assert done.code == 0, done.err
    mapped, converted = map(int, done.out.split())
    assert mapped < 8e6
    assert converted > 2 * size * 0.9  # the measure sees a copy where there is one
