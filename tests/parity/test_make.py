"""`python -m qwen_ref.parity make`: the published form, a true truth, and weights that hide no mistake."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, cli_of, refused
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import qwen_ref
import qwen_ref.model
from qwen_ref import QwenConfig, Tokenizer, parity
from qwen_ref.checkpoint import tensor_table
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.parity.__main__ import main
from qwen_ref.parity.mistakes import mistakes
from qwen_ref.parity.mistakes.grammar import NONE
from qwen_ref.parity.recording import Work, held_against
from qwen_ref.parity.stages import Checkpoint
from qwen_ref.parity.trials import Trials
from qwen_ref.quantize.rounding import pack, unpack

cli = cli_of(main)
TINY = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "seq_length": 8, "vocab": 32}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=["7b", "72b"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test checkpoint with the default sizes."""
    folder = tmp_path_factory.mktemp("made") / request.param
    parity.make(folder, request.param)
    return folder


@pytest.fixture(scope="module", params=[4, 8])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One in GPTQ's form."""
    folder = tmp_path_factory.mktemp("packed") / "made"
    parity.make(folder, "1.8b", gptq=request.param, seq_length=8)
    return folder, request.param


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# The form


def test_the_files_are_those_of_a_release(made: Path) -> None:
    own = ["config.json", "generation_config.json", INDEX, *SHARDS, "padded.safetensors", "truth.safetensors"]
    assert sorted(os.listdir(made)) == sorted(own)
    assert sum(file.stat().st_size for file in made.iterdir()) < 15e6


def test_the_index_has_every_tensor_under_its_published_name(made: Path) -> None:
    config = QwenConfig.from_json(made / "config.json")
    index = json_of(made / INDEX)
    tensors = {file: load_file(made / file) for file in SHARDS}
    assert index["weight_map"] == {name: file for file in SHARDS for name in tensors[file]}
    whole = {name: tensor for file in SHARDS for name, tensor in tensors[file].items()}
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == {
        spec.published: spec.shape for spec in tensor_table(config)
    }
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(safe_open(made / file, framework="pt").metadata() == {"format": "pt"} for file in SHARDS)
    shards_of_layer_1 = {file for name, file in index["weight_map"].items() if ".h.1." in name}
    assert shards_of_layer_1 == set(SHARDS)


def test_the_configuration_is_that_of_the_size(made: Path) -> None:
    config, published = QwenConfig.from_json(made / "config.json"), QwenConfig.preset(made.name)
    for name in ("rotary_emb_base", "layer_norm_epsilon", "use_dynamic_ntk", "use_logn_attn", "kv_channels"):
        assert getattr(config, name) == getattr(published, name)
    assert config.num_hidden_layers == 2
    assert config.mlp_width / config.hidden_size == pytest.approx(
        published.mlp_width / published.hidden_size, abs=0.5
    )
    raw, recorded = json_of(made / "config.json"), json_of(GOLDEN / "ntk_logn" / "config.json")
    assert set(recorded) - {"tokenizer_type"} <= set(raw)  # the keys that the published code wrote
    for name in ("architectures", "bf16", "fp16", "fp32", "no_bias", "rotary_pct", "use_flash_attn"):
        assert raw[name] == recorded[name]
    assert isinstance(raw["rotary_emb_base"], int)
    assert json_of(made / "generation_config.json")["top_p"] == 0.8


def test_a_vocabulary_is_copied(tmp_path: Path) -> None:
    """The rows beyond its ids are padding, and no id of the truth's prompt is one."""
    vocabulary = WEIGHTS / "qwen.tiktoken"
    truth = parity.make(tmp_path / "made", "7b", **{**TINY, "vocab": 8000}, vocabulary=vocabulary)
    assert (tmp_path / "made" / "qwen.tiktoken").read_bytes() == vocabulary.read_bytes()
    tokenizer = Tokenizer.from_file(vocabulary)
    stop_ids = read_defaults(tmp_path / "made", tokenizer).stop_ids
    assert stop_ids == {tokenizer.special_ids["<|endoftext|>"]}
    assert truth.input_ids[:, : truth.prefill_length].max() < tokenizer.n_vocab
    assert truth.stage("logits").shape[-1] == 8000


@pytest.mark.parametrize("size", ["1.8b", "7b", "14b", "72b"])
def test_a_vocabulary_has_the_published_rows(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what is written: those rows take hundreds of megabytes."""
    seen = []
    monkeypatch.setattr("qwen_ref.parity.making._write_weights", lambda _, config, *rest: seen.append(config))
    monkeypatch.setattr("qwen_ref.parity.making._record", lambda *_: None)
    parity.make(tmp_path / "made", size, vocabulary=WEIGHTS / "qwen.tiktoken")
    assert seen[0].vocab_size == QwenConfig.preset(size).vocab_size


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_in_another_dtype(dtype: str, tmp_path: Path) -> None:
    parity.make(tmp_path / "made", "7b", **TINY, dtype=dtype)
    model = qwen_ref.load_model(tmp_path / "made", "auto")
    assert model.embed.weight.dtype == getattr(torch, dtype)


# The numbers


def logits_of(folder: Path, bundle: parity.Bundle, dtype: str) -> Tensor:
    """By the model itself: a prefill, then decode steps with the cache."""
    model, ids, first = qwen_ref.load_model(folder, dtype), bundle.input_ids, bundle.prefill_length
    cache = model.new_cache(ids.shape[0], ids.shape[1])
    mask = None if bundle.attention_mask is None else bundle.attention_mask[:, :first]
    with torch.inference_mode():
        found = [model(ids[:, :first], attention_mask=mask, cache=cache)]
        found += [model(ids[:, i : i + 1], cache=cache) for i in range(first, ids.shape[1])]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["truth", "padded"])
def test_the_truth_is_what_the_model_computes(made: Path, name: str) -> None:
    bundle = parity.read_bundle(made / f"{name}.safetensors")
    real = torch.ones_like(bundle.input_ids) if bundle.attention_mask is None else bundle.attention_mask
    logits = logits_of(made, bundle, "float64")
    # 1e-12: the same sums in float64, in another order where the kit takes the head in slices.
    assert torch.allclose(logits[real == 1], bundle.stage("logits")[real == 1], rtol=1e-12, atol=1e-12)


def test_every_dtype_loads_and_rounds_as_recorded(made: Path) -> None:
    """Nothing overflows; and float16 is nearer to the truth than bfloat16, float32 nearer than both."""
    truth = parity.read_bundle(made / "truth.safetensors")
    rounding = {dtype: stages["logits"][0] for dtype, stages in truth.rounding.items()}
    assert sorted(rounding) == ["bfloat16", "float16", "float32"]
    assert rounding["float32"] < rounding["float16"] / 100 < rounding["bfloat16"] / 500
    for dtype, expected in rounding.items():
        logits, right = logits_of(made, truth, dtype).double(), truth.stage("logits")
        assert float((logits - right).norm() / right.norm()) == pytest.approx(expected, rel=0.05)


def test_the_ids_cross_the_trained_length(made: Path) -> None:
    truth = parity.read_bundle(made / "truth.safetensors")
    padded = parity.read_bundle(made / "padded.safetensors")
    s, T = QwenConfig.from_json(made / "config.json").seq_length, truth.input_ids.shape[1]
    assert truth.prefill_length == padded.prefill_length == 4 * s - 4 == T - 8
    # α of the prompt, with a floor, without NTK, and of the last steps: no two are equal.
    alphas = [qwen_ref.model.ntk_alpha(truth.prefill_length, s), 3, 1, qwen_ref.model.ntk_alpha(T, s)]
    assert alphas == [7, 3, 1, 15]
    real = padded.attention_mask.sum(dim=1).tolist()
    assert real[0] == T
    assert s - 4 == real[1] - 8 < s < real[1]


def test_stages_have_the_sizes_that_were_meant(made: Path) -> None:
    truth = parity.read_bundle(made / "truth.safetensors")
    rms = {stage: truth.stage(stage).square().mean().sqrt().item() for stage in truth.stages}
    assert 0.01 < rms["embed"] < 0.03
    assert 2 < rms["logits"] < 4
    for layer in ("blocks.0", "blocks.1"):
        for branch, stream in (("attn.out", "residual"), ("mlp.down", "attn_residual")):
            assert 0.4 < rms[f"{layer}.{branch}"] / rms[f"{layer}.{stream}"] < 2
        q, k = (
            truth.stage(f"{layer}.attn.{name}").unflatten(-1, (-1, 128)) for name in ("q_scaled", "k_rotated")
        )
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(128)
        assert 1 < scores.std(dim=-1).mean() < 3
        gate = truth.stage(f"{layer}.mlp.gate")
        assert 1 < gate.std() < 3
        assert 0.4 < (gate > 0).double().mean() < 0.6


# In float32 they compute the same: the first by the formula, since only differences of positions count, and
# the others because there is no narrower dtype.
SAME = {
    "RoPE positions counted from 1",
    "norm weight applied before the cast to the model's dtype",
    "norm computed in the model's dtype",
    "computed in float32",
}
VISIBLE = 50  # times the rounding of float32


def test_every_known_mistake_shows_in_the_logits(made: Path) -> None:
    """But for those that compute the same. The least of the others: rounded cosines, 100 to 200 times."""
    checkpoint = Checkpoint(made)
    bundles = [parity.read_bundle(made / name) for name in ("truth.safetensors", "padded.safetensors")]
    all_trials = [Trials(checkpoint, bundle, (), Work(None)) for bundle in bundles]
    effects = {}
    for mistake in mistakes(checkpoint.config):
        if not (mistake.common or mistake.sized):
            continue
        found = []
        for trials in all_trials:
            dtype = mistake.dtype or "float32"
            measure = held_against(trials.run(mistake, dtype), trials.theirs, text=False)
            usual = trials.theirs.rounding["float32"]["logits"][0]
            found.append(measure.all_rounding()["logits"][0] / usual)
        effects[mistake.text] = max(found)
    same = SAME if checkpoint.config.use_logn_attn else {*SAME, "padding counted in positions"}
    assert {text for text, effect in effects.items() if effect < VISIBLE} == same
    assert all(effects[text] < 2 for text in same)


@pytest.mark.parametrize("text", sorted(SAME - {"computed in float32", "RoPE positions counted from 1"}))
def test_mistakes_of_rounding_show_in_bfloat16(made: Path, text: str) -> None:
    checkpoint, bundle = Checkpoint(made), parity.read_bundle(made / "truth.safetensors")
    (mistake,) = (each for each in mistakes(checkpoint.config) if each.text == text)
    logits = []
    trials = Trials(checkpoint, bundle, (), Work(None))
    for each in (NONE, mistake):
        run = trials.run(each, "bfloat16")
        run.run(lambda stage, value, start: logits.append(value.double()), ["logits"])
    right, wrong = logits
    assert (wrong - right).norm() / right.norm() > bundle.rounding["bfloat16"]["logits"][0] / 4


def test_a_wrong_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = parity.make(tmp_path / "made", "7b", **{**TINY, "vocab": 256})
    monkeypatch.setattr(
        qwen_ref.model, "ntk_alpha", lambda n, s: max(2 ** math.floor(math.log2(n / s) + 1) - 1, 1)
    )
    logits = logits_of(tmp_path / "made", truth, "float32")
    monkeypatch.undo()
    port = tmp_path / "port.safetensors"
    parity.write_bundle(
        port, truth.input_ids, {"logits": logits}, dtype="float32", prefill_length=truth.prefill_length
    )
    found = parity.diagnose(tmp_path / "made", port)
    assert (found.verdict, found.found) == ("mistake", ("NTK with floor for ceil",))


# GPTQ


def test_gptq_weights_have_the_published_form(packed: tuple[Path, int]) -> None:
    folder, bits = packed
    settings = json_of(folder / "config.json")["quantization_config"]
    wanted = {"bits": bits, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq"}
    assert wanted.items() <= settings.items()
    tensors = {name: tensor for file in SHARDS for name, tensor in load_file(folder / file).items()}
    modules = [f"transformer.h.{i}.{name}" for i in (0, 1) for name in packed_elsewhere.QUANTISED]
    for module in modules:
        zeros = tensors[f"{module}.qzeros"]
        assert (zeros == {4: 0x77777777, 8: 0x7F7F7F7F}[bits]).all()
        assert f"{module}.weight" not in tensors
        assert tensors[f"{module}.bias"].any().item() == module.endswith("c_attn")
    parts = ("qweight", "qzeros", "g_idx")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.int32 if name.endswith(parts) else torch.float16), name


def test_gptq_weights_are_the_same_rounded(packed: tuple[Path, int], tmp_path: Path) -> None:
    """To half a step of a symmetric group, and what 2^(bits - 1) steps are off when a scale is rounded."""
    folder, bits = packed
    parity.make(tmp_path / "plain", "1.8b", seq_length=8, dtype="float32")
    rounded, plain = (qwen_ref.load_model(path, "float32") for path in (folder, tmp_path / "plain"))
    for name in ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.down"):
        a, b = (model.blocks[1].get_submodule(name).weight for model in (rounded, plain))
        groups = b.unflatten(1, (-1, 128))
        step = 2 * groups.abs().amax(dim=-1, keepdim=True) / (2**bits - 1)
        off = (a.unflatten(1, (-1, 128)) - groups).abs()
        assert step.min() > 2**-14  # float16 holds it in full: no subnormal scales, as in the releases
        assert (off <= (0.5 + 2 ** (bits - 1) * 2**-11 + 1e-3) * step).all()
        assert off.mean() > 0.2 * step.mean()  # they are rounded


def test_gptq_passes_the_check(packed: tuple[Path, int], cli) -> None:
    folder, _ = packed
    done = cli("check", "--model", folder, "--golden", folder / "truth.safetensors")
    assert done.code == 0, done.out
    assert "judged: weights" not in done.out
    assert "in float16" in done.out
    truth = parity.read_bundle(folder / "truth.safetensors")
    packed_model = qwen_ref.load_model(folder, "float64", packed=True)
    with torch.inference_mode():
        logits = packed_model(truth.input_ids[:, : truth.prefill_length])
    right = truth.stage("logits")[:, : truth.prefill_length]
    assert torch.allclose(logits, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_pack_is_as_written_elsewhere(bits: int, dim: int) -> None:
    values = torch.randint(2**bits, (32, 64))
    words = pack(values, bits, dim)
    assert words.dtype == torch.int32
    assert torch.equal(words, torch.from_numpy(packed_elsewhere.pack(values.numpy(), bits, dim)))
    assert torch.equal(unpack(words, bits, dim).long(), values)


# Seeds, errors, the command


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_seed_gives_the_same_folder(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        parity.make(tmp_path / name, "14b", **TINY, seed=seed)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[file] != c[file] for file in [*SHARDS, "truth.safetensors"])
    assert a["config.json"] == c["config.json"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"like": "3b"}, "no size '3b'; use 1.8b, 7b, 14b or 72b"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"hidden": 33}, "hidden=33 cannot be divided among heads=2"),
        ({"hidden": 6}, "kv_channels=3 must be even"),
        ({"intermediate": 63}, "intermediate_size=63 must be even"),
        ({"seq_length": 4}, "seq_length=4 must be at least 8"),
        ({"seq_length": 8192}, "seq_length=8192 must be at most 2048"),
        ({"vocab": 3}, "vocab=3 must be at least 16"),
        ({"vocab": 1.5}, "vocab=1.5 must be a whole number"),
        ({"vocab": 64, "vocabulary": WEIGHTS / "qwen.tiktoken"}, "vocab=64 is less than the 2708 ids of"),
        ({"vocabulary": WEIGHTS / "none"}, "none: cannot be read"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use bfloat16, float16 or float32"),
        ({"gptq": 3}, "bits=3 is not supported"),
        ({"gptq": 4, "dtype": "bfloat16"}, "dtype=bfloat16 does not go with gptq=4"),
        ({"gptq": 4, "hidden": 36}, "do not fill words of 8 weights"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"hidden": 8192, "layers": 80, "heads": 64}, "GB is the most for both; use fewer layers"),
    ],
)
def test_wrong_sizes_are_value_errors_and_leave_nothing(tmp_path: Path, wrong: dict, said: str) -> None:
    arguments = {"like": "7b", **TINY, **wrong}
    with pytest.raises(qwen_ref.InputError, match=re.escape(said)) as error:
        parity.make(tmp_path / "made", **arguments)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [False, True])
def test_an_error_while_writing_leaves_the_folder_as_it_was(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if there:
        (tmp_path / "made").mkdir()
    monkeypatch.setattr("qwen_ref.parity.making.record", full)
    with pytest.raises(OSError, match="No space left"):
        parity.make(tmp_path / "made", "7b", **TINY)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made"] * there


def test_the_command_says_what_is_next(tmp_path: Path, cli) -> None:
    (tmp_path / "made").mkdir()  # an empty folder will do
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = cli("make", "--like", "72b", *sizes, "--dtype", "float16", "--out", tmp_path / "made")
    assert (done.code, done.out) == (0, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"qwen_ref: {tmp_path / 'made'}: 1 layer like the 72B's, float16, ")
    assert "truth.safetensors has 36 positions, the last 8 decoded" in line
    assert f"diagnose --model {tmp_path / 'made'} --bundle" in line
    again = refused(cli("make", "--like", "72b", *sizes, "--out", tmp_path / "made"))
    assert "is not empty; give a new folder" in again
    file = tmp_path / "file"
    file.touch()
    assert "is no folder" in refused(cli("make", "--like", "72b", "--out", file))
    assert "--like" in refused(cli("make", "--out", tmp_path / "new"))
    assert "layers=0 must be" in refused(
        cli("make", "--like", "7b", "--layers", 0, "--out", tmp_path / "new")
    )
    assert sorted(os.listdir(tmp_path)) == ["file", "made"]
