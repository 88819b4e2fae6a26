"""GPTQ checkpoints: recorded layers, whole ones packed by other code, their own bits, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gptq_worker
import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, change_json, change_tensors, cli_of, refused, relative_rms
from forked_ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwen_ref
from qwen_ref import KVCache, Qwen, QwenConfig, load_model, parity
from qwen_ref.chat.__main__ import main
from qwen_ref.checkpoint import load_model as plain_load_model
from qwen_ref.commands import inspect as checkpoint
from qwen_ref.commands.sizes import resident_bytes
from qwen_ref.fast import kernels
from qwen_ref.fast.layers import fasten, kernels_of
from qwen_ref.fast.matrices import FEW_ROWS, Int4Matrix, Int8Table
from qwen_ref.loading.loader import check_cut
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import PackedWeight
from qwen_ref.quantize.rounding import dequantize_gptq, unpack, zero_points

cli = cli_of(main)
CASES = json.loads((GOLDEN / "gptq" / "gptq_v1.json").read_text())
IDS = torch.arange(3, 73)[None]
MODULES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a packed checkpoint and the plain one that it stands for, once for each setting: do not change
    them.
    """
    folder, known = tmp_path_factory.mktemp("gptq"), {}

    def make(source: Path = WEIGHTS, **settings: Any) -> tuple[Path, Path]:
        key = (source, *sorted(settings.items()))
        if key not in known:
            number = len(known)
            known[key] = folder / f"{number}-packed", folder / f"{number}-plain"
            packed_elsewhere.make_packed(source, *known[key], **settings)
        return known[key]

    return make


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A packed checkpoint to spoil."""
    packed_elsewhere.make_packed(WEIGHTS, tmp_path / "packed", tmp_path / "plain")
    return tmp_path / "packed"


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    change_json(folder / "config.json", quantization_config=settings)


# A layer


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_recorded_layers(case: dict) -> None:
    layer = {
        name.partition(".")[2]: tensor
        for name, tensor in load_file(GOLDEN / "gptq" / "gptq_v1.safetensors").items()
        if name.startswith(f"{case['case']}.")
    }
    names = ("qweight", "qzeros", "scales", "g_idx")
    weight = qwen_ref.quantize.dequantize_gptq(*(layer[name] for name in names), case["bits"])
    assert weight.dtype == torch.float32
    assert weight.shape == (case["out_features"], case["in_features"])
    y = layer["x"] @ weight.t() + (layer["bias"].float() if case["bias"] else 0)
    # Sums of up to 160 products in float32: 6e-8 to 1.1e-7 measured. A zero point off by one gives 0.1.
    assert relative_rms(y, layer["y"]) < 5e-7
    assert (layer["g_idx"].diff() >= 0).all()


def test_every_value_of_every_place_in_a_word() -> None:
    for bits in (4, 8):
        values = torch.arange(2**bits).repeat(32 // bits).view(-1, 1).repeat(1, 2)
        words = torch.from_numpy(packed_elsewhere.pack(values.numpy(), bits, 0))
        assert torch.equal(unpack(words, bits, dim=0), values.int())
        words = torch.from_numpy(packed_elsewhere.pack(values.t().numpy(), bits, 1))
        assert torch.equal(unpack(words, bits, dim=1), values.t().int())


def layer_of(bits: int = 4, inputs: int = 64, outputs: int = 32, groups: int = 2) -> list[Any]:
    return [
        torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32),
        torch.zeros(groups, outputs * bits // 32, dtype=torch.int32),
        torch.ones(groups, outputs, dtype=torch.float16),
        (torch.arange(inputs) // (inputs // groups)).int(),
        bits,
    ]


def test_the_largest_scale_and_difference_are_exact() -> None:
    layer = layer_of(8)
    layer[0].fill_(-1)  # q is 255 everywhere, the zero point 1
    layer[2].fill_(65504)
    assert torch.equal(dequantize_gptq(*layer), torch.full((32, 64), 65504.0 * 254))
    layer[1].fill_(0xFEFEFEFF - 2**32)  # 0x00000000 - 0x01010101: every zero point is 0
    assert torch.equal(dequantize_gptq(*layer), torch.full((32, 64), 65504.0 * 255))


def test_a_zero_point_of_0_borrows_from_its_neighbour() -> None:
    layer = layer_of(inputs=8, outputs=8, groups=1)
    layer[0].fill_(0x33333333)
    layer[1].fill_(0x7777776F)
    layer[2].fill_(1)
    rows = dequantize_gptq(*layer)
    assert torch.equal(rows, torch.tensor([3.0, *[-5.0] * 7])[:, None].expand(8, 8))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_what_a_writer_had(bits: int) -> None:
    """All zero points of 0, none, and any; 2^32 - 1 and 0 are words like others."""
    per_word, ones = 32 // bits, 0x11111111 if bits == 4 else 0x01010101
    zeros = torch.randint(2**bits, (40, 5 * per_word)) * torch.randint(2, (40, 5 * per_word))
    zeros[0], zeros[1], zeros[2] = 0, 1, 2**bits - 1
    stored = packed_elsewhere.pack(zeros.numpy(), bits, 1).astype("int64") - ones
    words = torch.from_numpy((stored % 2**32).astype("uint32").view("int32"))
    assert (words[1] == 0).all()
    assert torch.equal(zero_points(words, bits).long(), zeros)
    all_ones = zero_points(torch.full((1, 1), -1, dtype=torch.int32), bits)
    assert all_ones.tolist() == [[0] + [1] * (per_word - 1)]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            0,
            torch.zeros(16, 32, dtype=torch.int32),
            r"qweight is \(16, 32\), should be \(8, 32\) for 64 inputs",
        ),
        (1, torch.zeros(2, 8, dtype=torch.int32), r"qzeros is \(2, 8\), should be \(2, 4\)"),
        (2, torch.ones(2, 31), r"scales is \(2, 31\), should be \(2, 32\)"),
        (3, torch.full((64,), 2), "g_idx names group 2; there are 2, from 0 on"),
        (3, torch.full((64,), -1), "g_idx names group -1; there are 2, from 0 on"),
        (4, 3, "bits=3 is not supported: GPTQ weights are read in 4 and in 8 bits"),
        (4, True, "bits=True is not supported"),
        (0, torch.zeros(8, 32), r"qweight must be int32 of 2 dimensions, not torch\.float32 \(8, 32\)"),
        (0, torch.zeros(8, 32, dtype=torch.uint8), r"qweight must be int32 .* not torch\.uint8"),
        (1, torch.zeros(2, 4, dtype=torch.int64), r"qzeros must be int32 .* not torch\.int64"),
        (3, torch.zeros(64, dtype=torch.bool), r"g_idx must be integers .* not torch\.bool"),
        (2, torch.ones(2, 32).int(), "scales must be floating-point numbers of 2 dimensions"),
        (3, torch.zeros(2, 32, dtype=torch.int32), "g_idx must be integers of 1 dimensions"),
        (3, torch.zeros(0, dtype=torch.int32), "g_idx must be integers"),
        (3, torch.zeros(12, dtype=torch.int32), "12 inputs and 32 outputs must both be multiples of 8"),
    ],
)
def test_a_layer_whose_parts_do_not_belong_together_is_refused(place: int, value: object, message: str):
    layer = layer_of()
    layer[place] = value
    with pytest.raises(ValueError, match=message):
        dequantize_gptq(*layer)


# A whole checkpoint


SETTINGS = [
    {"bits": bits, "group_size": size, "sym": sym, "act_order": act_order}
    for bits, size, sym, act_order in product((4, 8), (32, 128, -1), (True, False), (False, True))
    if size != -1 or not act_order
]


def name_of(settings: dict) -> str:
    words = [f"{settings['bits']} bits", f"{settings['group_size']}"]
    return "-".join(words + ["asym"] * (not settings["sym"]) + ["order"] * settings["act_order"])


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_a_packed_checkpoint_is_the_plain_one_to_the_bit(made: Callable, settings: dict) -> None:
    packed, plain = made(**settings)
    want = load_model(plain, "float32")
    for found in (load_model(packed, "float32"), load_model(packed, "float32", packed=True)):
        for layer in ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.down"):
            weights = [model.blocks[1].get_submodule(layer).weight for model in (found, want)]
            assert torch.equal(*weights), layer
        assert torch.equal(found(IDS), want(IDS))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_all_positive_have_zero_points_of_0(bits: int, folder: Path, tmp_path: Path) -> None:
    def make_positive(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("mlp.w1.weight", "c_attn.weight")):
                tensor[::3] = tensor[::3].abs()

    change_tensors(folder, make_positive)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed_elsewhere.make_packed(folder, packed, plain, bits=bits, sym=False)
    zeros = load_file(packed / "model.safetensors")["transformer.h.1.mlp.w1.qzeros"]
    assert (zero_points(zeros, bits) == 0).any()
    want = load_model(plain)(IDS)
    assert torch.equal(load_model(packed)(IDS), want)
    fast = fasten(load_model(packed, packed=True))
    assert relative_rms(fast(IDS), want) < 1e-5
    assert relative_rms(decoded(fast, [1] * 70), want) < 1e-5


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dequantised_weights_are_rounded_once(made: Callable, dtype: str) -> None:
    packed, plain = made()
    want = load_model(plain, dtype)(IDS)
    assert torch.equal(load_model(packed, dtype)(IDS), want)
    assert torch.equal(load_model(packed, dtype, packed=True)(IDS), want)


@pytest.mark.parametrize(
    "settings",
    [
        {"settings_file": "quantize_config.json"},
        {"zero_biases": True},
        {"shards": 2},
        {"source": GOLDEN / "extended_base", "bits": 8},
    ],
    ids=["settings in quantize_config.json", "biases of zero", "two files", "from several files"],
)
def test_however_it_was_written(made: Callable, settings: dict) -> None:
    packed, plain = made(**settings)
    assert torch.equal(load_model(packed)(IDS), load_model(plain)(IDS))
    assert load_model(packed, "auto").embed.weight.dtype == torch.float16


def test_a_setting_that_is_null_means_what_a_missing_one_does(spoiled: Path) -> None:
    change_settings(spoiled, checkpoint_format=None, quant_method=None, is_marlin_format=False)
    assert GPTQConfig.from_json(spoiled / "config.json") == GPTQConfig(4, 32, desc_act=False, sym=True)


def test_the_file_may_have_autogptqs_name(spoiled: Path) -> None:
    (spoiled / "model.safetensors").rename(spoiled / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(load_model(spoiled)(IDS), load_model(spoiled.with_name("plain"))(IDS))


def test_kept_packed_it_takes_no_more_than_its_file(made: Callable) -> None:
    packed, _ = made(group_size=128)
    model = load_model(packed, "auto", packed=True)
    tensors = load_file(packed / "model.safetensors")
    assert resident_bytes(model) == sum(tensor.nbytes for tensor in tensors.values())
    with pytest.raises(ValueError, match="not a GPTQ checkpoint; only those can be kept packed"):
        load_model(WEIGHTS, packed=True)


def test_a_cast_of_a_packed_model_is_one_of_its_weights(made: Callable) -> None:
    packed, _ = made()
    model, want = load_model(packed, "float32", packed=True), load_model(packed, "bfloat16")
    assert torch.equal(model.bfloat16().blocks[0].mlp.up.weight, want.blocks[0].mlp.up.weight)
    again = load_model(packed, "float32")
    assert torch.equal(model.float().blocks[0].mlp.up.weight, again.blocks[0].mlp.up.weight)


def test_the_parity_kit_takes_a_packed_checkpoint(made: Callable, tmp_path: Path) -> None:
    packed, plain = made()
    bundles = [parity.record(path, IDS[:, :12], out=tmp_path / path.name) for path in (packed, plain)]
    assert torch.equal(*(bundle.stage("logits") for bundle in bundles))
    assert bundles[0].weights_sha256 != bundles[1].weights_sha256
    assert parity.check(packed, tmp_path / packed.name, dtype="float32").within


def test_inspect_counts_every_byte(made: Callable, capsys: pytest.CaptureFixture) -> None:
    packed, _ = made(group_size=64)
    tensors = load_file(packed / "model.safetensors")
    assert checkpoint.main(["inspect", str(packed), "--tp", "2"]) == 0
    printed = capsys.readouterr().out
    own = 0
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        by_inputs = module.endswith("c_proj")
        whole = module.split(".")[-1].startswith("ln") or (part == "g_idx" and not by_inputs)
        own += tensor.nbytes // (1 if whole else 2)
    total = sum(tensor.nbytes for tensor in tensors.values())
    line = next(line for line in printed.splitlines() if line.startswith("weights, 1,755,776 parameters"))
    assert f": {total:,} bytes" in line
    assert f"each of 2 ranks: {own:,} bytes" in line
    row = next(line for line in printed.splitlines() if line.startswith("transformer.h.*.mlp.w1.weight"))
    assert "int4, groups of 64" in row


# In its own bits


def decoded(model: Qwen, sizes: list[int]) -> Tensor:
    cache = model.new_cache(1, IDS.shape[1])
    with torch.inference_mode():
        return torch.cat([model(part, cache=cache) for part in IDS.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(settings, dtype) for dtype in ("float32", "bfloat16") for settings in SETTINGS]
    + [(settings, "float16") for settings in SETTINGS[::7]],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value,
)
def test_its_own_bits_compute_what_dequantised_weights_do(made: Callable, settings: dict, dtype: str) -> None:
    packed, plain = made(**settings)
    truth = load_model(plain, "float64")(IDS)
    one = relative_rms(load_model(plain, dtype)(IDS), truth)
    model = fasten(load_model(packed, dtype, packed=True))
    singly = decoded(model, [1] * 70)
    # In bfloat16 and 4 bits scales are rounded to bfloat16 too. In float32 a bag is one sum of n products,
    # whose rounding grows as √n. A product of matrices has several sums, as many as the processor's kernel
    # likes: with 8 or 16 lanes its rounding is up to √8 or √16 times less, and other rounding is alike.
    # Measured with torch's AVX-512, AVX2 and oldest kernels: at most 1.34 in bfloat16, 1.93 in float32.
    limit = 3 * one if dtype == "float32" else 2 * one
    assert relative_rms(singly, truth) < limit
    assert relative_rms(model(IDS), truth) < limit
    if dtype == "float32":
        assert torch.equal(decoded(model, [1, *[FEW_ROWS] * 7, 6]), singly)


def test_four_bits_stay_four_where_torch_multiplies_by_them_fast(made: Callable) -> None:
    packed, _ = made(group_size=128)
    for dtype, kind in (("bfloat16", Int4Matrix), ("float16", Int8Table), ("float32", Int8Table)):
        model = fasten(load_model(packed, dtype, packed=True))
        assert isinstance(model.blocks[0].mlp.down.matrix, kind)
        matrices = 4 * 16 * 128**2  # layers · (qkv and out 4, gate, up and down 12) · D²
        in_bits = resident_bytes(model) - 2 * 2752 * 128 * model.embed.weight.element_size()
        assert in_bits < matrices * (0.55 if dtype == "bfloat16" else 1.2)
    model = fasten(load_model(made(bits=8)[0], "bfloat16", packed=True))
    assert isinstance(model.blocks[0].attn.qkv.matrix, Int8Table)


@pytest.mark.parametrize("settings", [{"bits": 8, "group_size": -1}, {"bits": 4, "group_size": 32}], ids=str)
@pytest.mark.parametrize("place", [0, -1])
def test_the_bits_stay_whatever_is_fastest(
    made: Callable, settings: dict, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits in one group look like what --quantize int8 makes, but have zero points."""
    monkeypatch.setattr(kernels, "_NOT_TRIED", 0)
    monkeypatch.setattr(kernels, "_fastest", lambda forms, *_: list(forms)[place])
    packed, plain = made(sym=False, **settings)
    truth = load_model(plain, "float64")(IDS)
    one = relative_rms(load_model(plain, "float32")(IDS), truth)
    found = decoded(fasten(load_model(packed, "float32", packed=True)), [1] * 70)
    assert relative_rms(found, truth) < 3 * one  # as above


@pytest.mark.parametrize(
    ("bits", "dtype", "kernel", "use"),
    [
        (4, "bfloat16", "dynamic", "bag or int4"),
        (4, "bfloat16", "linear", "bag or int4"),
        (4, "float32", "int4", "bag"),
        (8, "bfloat16", "dynamic", "bag"),
        (8, "bfloat16", "linear", "bag"),
        (8, "bfloat16", "int4", "bag"),
    ],
)
def test_kernels_that_round_again_or_are_for_other_weights_are_refused(
    made: Callable, bits: int, dtype: str, kernel: str, use: str, cli: Callable
) -> None:
    packed, _ = made(bits=bits)
    message = f"kernel {kernel} is for .*; use {use} here, or none for the fastest$"
    model = load_model(packed, dtype, packed=True)
    with pytest.raises(ValueError, match=message):
        fasten(model, kernel=kernel)
    assert model.cache_type is KVCache
    options = ("--model", packed, "--fast", "--dtype", dtype, "--kernel", kernel)
    assert re.search(message, refused(cli(*options)))


@pytest.mark.parametrize(("bits", "kernel"), [(4, "bag"), (4, "int4"), (8, "bag")])
def test_a_kernel_that_is_named_is_used(made: Callable, bits: int, kernel: str) -> None:
    packed, plain = made(bits=bits)
    truth = load_model(plain, "float64")(IDS)
    one = relative_rms(load_model(plain, "bfloat16")(IDS), truth)
    model = fasten(load_model(packed, "bfloat16", packed=True), kernel=kernel)
    assert set(kernels_of(model).values()) == {kernel, "bag"}
    for found in (decoded(model, [1] * 70), model(IDS)):
        assert relative_rms(found, truth) < 2 * one  # as above


def test_groups_of_unequal_size_are_not_for_faster_layers(made: Callable) -> None:
    packed, plain = made(group_size=96)
    assert torch.equal(load_model(packed, packed=True)(IDS), load_model(plain)(IDS))
    model = load_model(packed, packed=True)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.attn\.qkv: its groups, here, are of 32 to 96 inputs.*--packed"
    ):
        fasten(model)
    assert torch.equal(model(IDS), load_model(plain)(IDS))  # nothing was changed
    with pytest.raises(ValueError, match="the weights are quantised already"):
        fasten(load_model(made()[0], packed=True), "int8")


# Ranks

SPOILED = (
    "transformer.h.0.mlp.w1: scales are NaN or infinite; fetch the file again",
    "transformer.h.1.attn.c_proj: g_idx names group 9; there are 4, from 0 on",
    "transformer.h.1.attn.c_proj.bias is not zero: only the q, k, v projection may have a bias",
    "transformer.h.3.mlp.c_proj: zero points are 1 to 1, but where sym is true they are all 8; the file is "
    "damaged, or sym is wrong",
)


def spoil_three(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.h.0.mlp.w1.scales"][0, 0] = torch.nan
    tensors["transformer.h.1.attn.c_proj.g_idx"][5] = 9
    tensors["transformer.h.1.attn.c_proj.bias"] = torch.ones(128).half()
    tensors["transformer.h.3.mlp.c_proj.qzeros"].zero_()


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    for number, settings in enumerate(
        [{"group_size": 64}, {"bits": 8, "act_order": True}, {"group_size": -1}]
    ):
        packed_elsewhere.make_packed(
            WEIGHTS, tmp_path / f"{number}-packed", tmp_path / f"{number}-plain", sym=False, **settings
        )
    packed_elsewhere.make_packed(WEIGHTS, tmp_path / "spoiled", tmp_path / "plain")
    change_tensors(tmp_path / "spoiled", spoil_three)
    run_ranks(2, tmp_path, gptq_worker.main, tmp_path)
    said, same = ((tmp_path / f"gptq-{rank}.txt").read_text() for rank in (0, 1))
    assert said == same
    # Each rank checks every other module: between them, all is found.
    assert "spoiled: 4 problems: " in said
    assert all(problem in said for problem in SPOILED)
    first, second = (load_file(tmp_path / f"gptq-{rank}.safetensors") for rank in (0, 1))
    alone = gptq_worker.logits(tmp_path, None)
    assert alone.keys() - first.keys() == {"1-packed fast"}  # act-order: a cut leaves unequal groups
    for name, values in first.items():
        assert torch.equal(values, second[name])
        truth = alone[name.replace("fast", "dequantised")]
        if "fast" in name:
            assert relative_rms(values, truth) < 1.5 * relative_rms(alone[name], truth)
        else:
            assert relative_rms(values, truth) < 1e-12, name


@pytest.mark.parametrize(
    ("size", "works"), [("1.8b", "1"), ("7b", "1 or 2"), ("14b", "1"), ("72b", "1, 2, 4, 8, 16, 32 or 64")]
)
def test_cuts_fall_on_borders_of_groups(size: str, works: str) -> None:
    config, gptq = QwenConfig.preset(size), GPTQConfig(4, 128, desc_act=False, sym=True)
    for ranks in (1, 2, 4, 8):
        if str(ranks) in works.replace(",", "").split():
            gptq.check_ranks(config, ranks)
            continue
        with pytest.raises(
            ValueError,
            match=rf"cannot be split over {ranks} ranks at the borders of groups of 128; use {works}$",
        ):
            gptq.check_ranks(config, ranks)


def test_a_cut_inside_a_group_is_refused_before_anything_is_read(made: Callable) -> None:
    packed, _ = made(group_size=128)
    with pytest.raises(
        ValueError,
        match=r"hidden_size 128 cannot be split over 2 ranks at the borders of groups of 128; use 1",
    ):
        check_cut(packed, 2)
    assert checkpoint.main(["inspect", str(packed), "--tp", "2"]) == 2


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "config.json: quantisation: bits=3 is not supported"),
        ({"bits": "4"}, "bits='4' is not supported"),
        ({"bits": ...}, "missing bits"),
        ({"group_size": 0}, "group_size=0 must be -1 or a number of inputs"),
        ({"group_size": 2.5}, "group_size=2.5 must be"),
        ({"desc_act": "no"}, "desc_act='no' must be true or false"),
        ({"sym": None}, "sym=None must be true or false"),
        ({"quant_method": "awq"}, "quant_method='awq' is not supported, only \"gptq\""),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2' is not supported"),
        ({"bits": 8}, "model.safetensors"),
        ({"group_size": 64}, "shapes that contradict config.json"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(spoiled: Path, changes: dict, message: str) -> None:
    change_settings(spoiled, **changes)
    with pytest.raises(ValueError, match="packed: ") as caught:
        load_model(spoiled)
    if changes == {"bits": 8}:
        message = "qweight is [16, 384], should be [32, 384]"
    assert message in str(caught.value)


@pytest.mark.parametrize("settings", [[], "gptq", {"bits": 8, "group_size": 32}])
def test_two_settings_that_disagree_are_refused(spoiled: Path, settings: object) -> None:
    (spoiled / "quantize_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"quantize_config\.json"):
        load_model(spoiled)


W1 = "transformer.h.2.mlp.w1"


def without(part: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.pop(f"{W1}.{part}")


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict], object]:
    name = f"{W1}.{part}"
    return lambda tensors: tensors.update({name: change(tensors[name])})


def plain_module(tensors: dict[str, Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{W1}.{part}"]
    tensors[f"{W1}.weight"] = torch.zeros(512, 128, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("scales"), "missing tensors: transformer.h.2.mlp.w1.scales"),
        (without("g_idx"), "missing tensors: transformer.h.2.mlp.w1.g_idx"),
        (replaced("qweight", lambda t: t[:8]), "w1.qweight is [8, 512], should be [16, 512]"),
        (replaced("qzeros", lambda t: t[:, :32]), "w1.qzeros is [4, 32], should be [4, 64]"),
        (replaced("scales", lambda t: t[:1]), "w1.scales is [1, 512], should be [4, 512]"),
        (replaced("qweight", lambda t: t.float()), f"packed tensors must be I32: {W1}.qweight is F32"),
        (replaced("scales", lambda t: t.int()), f"scales must be BF16, F16, F32: {W1}.scales is I32"),
        (replaced("scales", lambda t: t * torch.nan), "mlp.w1: scales are NaN or infinite"),
        (replaced("scales", lambda t: t / 0), "mlp.w1: scales are NaN or infinite"),
        (replaced("g_idx", lambda t: t + 1), "mlp.w1: g_idx names group 4; there are 4"),
        (replaced("g_idx", lambda t: t - 1), "mlp.w1: g_idx names group -1; there are 4"),
        (replaced("g_idx", lambda t: t * 0), "mlp.w1: g_idx puts 128 of 128 inputs into group 0"),
        (replaced("g_idx", lambda t: t.long()), f"packed tensors must be I32: {W1}.g_idx is I64"),
        (
            replaced("qzeros", lambda t: t + 1),
            "w1: zero points are 8 to 9, but where sym is true they are all 8",
        ),
        (
            lambda tensors: tensors.update({"transformer.h.1.mlp.w2.bias": torch.ones(512).half()}),
            "transformer.h.1.mlp.w2.bias is not zero",
        ),
        (plain_module, "here are 1 that are not and 19 that are: transformer.h.2.mlp.w1.weight"),
    ],
)
def test_spoiled_files_are_named(spoiled: Path, change: Callable, message: str) -> None:
    change_tensors(spoiled, change)
    with pytest.raises(ValueError, match="transformer") as caught:
        load_model(spoiled)
    assert message in str(caught.value)


def test_all_that_is_wrong_with_packed_weights_is_said_at_once_before_one_is_used(
    spoiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change_tensors(spoiled, spoil_three)
    monkeypatch.setattr(PackedWeight, "dequantized", lambda self: pytest.fail("a weight was used"))
    wanted = f"{spoiled}: 4 problems: " + "; ".join(SPOILED)
    for use in (
        lambda: load_model(spoiled),
        lambda: load_model(spoiled, packed=True),
        lambda: parity.record(spoiled, IDS, out=tmp_path / "bundle.safetensors"),
    ):
        with pytest.raises(ValueError, match="4 problems") as caught:
            use()
        assert str(caught.value) == wanted
    assert checkpoint.main(["inspect", str(spoiled)]) == 0  # reads nothing but headers


def test_what_the_headers_say_and_what_the_numbers_say_is_said_together(spoiled: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        spoil_three(tensors)
        tensors["transformer.h.2.mlp.w2.scales"] = tensors["transformer.h.2.mlp.w2.scales"][:1]
        del tensors["transformer.h.2.mlp.w1.qzeros"]

    change_tensors(spoiled, spoil)
    with pytest.raises(ValueError, match="6 problems: missing tensors") as caught:
        load_model(spoiled)
    for problem in ("transformer.h.2.mlp.w1.qzeros", "transformer.h.2.mlp.w2.scales is [1, ", *SPOILED):
        assert problem in str(caught.value)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_v2_file_is_recognised_by_its_zero_points(made: Callable, bits: int) -> None:
    packed, _ = made(bits=bits, zero_offset=0)
    with pytest.raises(
        ValueError, match=rf"c_attn: zero points are stored as {2 ** (bits - 1)}: this is GPTQ v2"
    ):
        load_model(packed)


def test_sizes_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    config = json.loads((WEIGHTS / "config.json").read_text())
    config |= {"hidden_size": 20, "kv_channels": 20, "num_attention_heads": 1, "intermediate_size": 64}
    config["quantization_config"] = {"bits": 4, "group_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"transformer.ln_f.weight": torch.ones(20).half()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="20, 60 inputs or outputs do not fill words of 8 weights"):
        load_model(tmp_path)


def test_settings_and_tensors_that_do_not_belong_together_are_refused(spoiled: Path) -> None:
    packed_config = (spoiled / "config.json").read_text()
    plain_config = (spoiled.with_name("plain") / "config.json").read_text()
    (spoiled / "config.json").write_text(plain_config)
    with pytest.raises(
        ValueError, match=r"packed weights, but neither config\.json's quantization_config nor"
    ):
        load_model(spoiled)
    (spoiled.with_name("plain") / "config.json").write_text(packed_config)
    with pytest.raises(ValueError, match="here are 20 that are not: transformer"):
        load_model(spoiled.with_name("plain"))


# The commands


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "0.004 GB of float16, dequantised from 4 bits in groups of 32, on cpu"),
        (["--packed"], "0.002 GB of float16, GPTQ, 4 bits in groups of 32, on cpu"),
        (["--fast", "--dtype", "bfloat16"], "0.002 GB of bfloat16, GPTQ, 4 bits in groups of 32, on cpu"),
    ],
)
def test_the_command_answers_from_a_packed_checkpoint(
    cli: Callable, made: Callable, options: list[str], said: str
) -> None:
    result = cli("--once", "冰岛的首都是哪里？", "--model", made()[0], *options)
    assert (result.code, result.out) == (0, "雷克雅未克（Reykjavik）\n")
    assert said in result.err


def test_options_that_do_not_fit_are_refused(cli: Callable, made: Callable) -> None:
    line = refused(cli("--once", "x", "--model", made()[0], "--quantize", "int8"))
    assert "is quantised already, to 4 bits; --fast, without --quantize, uses those" in line
    assert "not a GPTQ checkpoint; only those can be kept packed" in refused(cli("--once", "x", "--packed"))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize(
    "change", [lambda x: x.double(), lambda x: x[:-1], lambda x: x.flatten()[:1].clone()]
)
def test_the_plain_loader_refuses_wrong_headers(
    made: Callable[..., tuple[Path, Path]], part: str, change: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    packed, _ = made()
    spoiled = shutil.copytree(packed, tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    name = f"transformer.h.0.mlp.w1.{part}"
    save_file(tensors | {name: change(tensors[name])}, spoiled / "model.safetensors")
    for dtype in ("auto", "float32"):
        with pytest.raises(qwen_ref.InputError, match=r"transformer\.h\.0\.mlp\.w1\.weight$"):
            plain_load_model(spoiled, dtype)


def test_two_files_as_autogptq_names_them_are_not_chosen_from(
    made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    packed, _ = made()
    spoiled = shutil.copytree(packed, tmp_path / "spoiled")
    (spoiled / "model.safetensors").rename(spoiled / "gptq_model-4bit-32g.safetensors")
    shutil.copy(spoiled / "gptq_model-4bit-32g.safetensors", spoiled / "gptq_model-8bit-32g.safetensors")
    with pytest.raises(qwen_ref.InputError, match=r"neither model\.safetensors nor .* is in the folder"):
        load_model(spoiled)
