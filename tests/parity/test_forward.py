"""The kit's forward pass is model.py's to the bit, and the kit touches no model but its own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import wrong_port
from conftest import GOLDEN, WEIGHTS

from qwen_ref import load_model, parity
from qwen_ref.checkpoint import DTYPES
from qwen_ref.parity.forward import Change, Forward, Weights
from qwen_ref.parity.mistakes import in_single_layers, mistakes
from qwen_ref.parity.mistakes.choices import choices
from qwen_ref.parity.mistakes.grammar import NONE
from qwen_ref.parity.mistakes.outside import layer_lists
from qwen_ref.parity.recording import Work
from qwen_ref.parity.stages import Checkpoint, Port
from qwen_ref.parity.trials import Trials
from qwen_ref.trace import trace

FOLDERS = [WEIGHTS, GOLDEN / "extended_base", GOLDEN / "ntk_logn"]


def forward(folder: Path, dtype: str, ids: torch.Tensor, **more: object) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    weights = Weights(Checkpoint(folder), DTYPES[dtype])
    Forward(weights, ids, **more).run(lambda stage, value, start: found.update({stage: value}))
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_stage_is_that_of_the_model_to_the_bit(folder: Path, dtype: str, padded: bool) -> None:
    ids = torch.randint(0, 320, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, : 5 * padded] = 0
    theirs: dict[str, torch.Tensor] = {}
    port = Port(Checkpoint(folder), dtype, ids, mask if padded else None)
    port.run(lambda stage, value, start: theirs.update({stage: value.flatten(2)}))
    ours = forward(folder, dtype, ids, padding=torch.tensor([0, 5 * padded]))
    assert ours.keys() == theirs.keys()
    assert [stage for stage in ours if not torch.equal(ours[stage][mask > 0], theirs[stage][mask > 0])] == []


def test_what_follows_a_layer_is_the_same_side_by_side() -> None:
    """A screening gives each mistake the residual of its own run."""
    folder, ids = GOLDEN / "ntk_logn", torch.randint(0, 320, (1, 40))
    checkpoint = Checkpoint(folder)
    tried = [*in_single_layers(checkpoint.config, [1]), *mistakes(checkpoint.config)]
    tried = [mistake for mistake in tried if not mistake.sized and mistake.dtype is None][::29]
    assert len(tried) > 40
    bundle = port_bundle(ids)
    trials = Trials(checkpoint, bundle, (), Work(None))
    together = trials.screen(tried, 40)
    for mistake in tried:
        (alone,) = trials.screen([mistake], 40).values()
        # What changes nothing leaves the rounding of float32, 6e-7, which goes by the shapes of the products.
        assert together[mistake.text] == pytest.approx(alone, rel=1e-4, abs=1e-7), mistake.text


def port_bundle(ids: torch.Tensor, name: str = "bundle.safetensors") -> parity.Bundle:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        logits = torch.from_numpy(wrong_port.port(GOLDEN / "ntk_logn", ids.numpy())["logits"])
        parity.write_bundle(path, ids, {"logits": logits}, dtype="float32")
        return parity.read_bundle(path)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_two_mistakes_have_one_name(folder: Path) -> None:
    config = Checkpoint(folder).config
    layers = range(config.num_hidden_layers)
    tried = [*mistakes(config), *layer_lists(config), *choices(), *in_single_layers(config, layers)]
    texts = [mistake.text for mistake in tried]
    assert len(texts) == len(set(texts))


def test_a_mistake_in_one_layer_leaves_the_others() -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 12))
    right = forward(folder, "float32", ids)
    for mistake in list(in_single_layers(Checkpoint(folder).config, [1]))[::25]:
        wrong = forward(folder, "float32", ids, changes=mistake.changes)
        before = [stage for stage in right if stage == "embed" or stage.startswith("blocks.0.")]
        assert all(torch.equal(right[stage], wrong[stage]) for stage in before), mistake.text


def test_a_run_goes_on_from_numbers_that_are_given() -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 12))
    right = forward(folder, "float32", ids)
    weights = Weights(Checkpoint(folder), torch.float32)
    doubled = Change("gate", lambda run, right, h, w: 2 * right(h, w), frozenset([0]))
    found: dict[str, torch.Tensor] = {}
    run = Forward(weights, ids, changes=[doubled])
    run.run(lambda stage, value, start: found.update({stage: value}), given=lambda stage: right[stage])
    assert [stage for stage in right if not torch.equal(found[stage], right[stage])] == ["blocks.0.mlp.gate"]


def test_a_model_in_another_thread_is_not_touched(tmp_path: Path) -> None:
    """The kit once replaced model.py's functions while it ran: another thread's model failed."""
    folder, ids = GOLDEN / "ntk_logn", torch.randint(0, 320, (1, 40))
    model = load_model(folder)
    with torch.inference_mode():
        expected = model(ids)
    over, wrong = threading.Event(), []

    def run() -> None:
        with torch.inference_mode():
            while not over.is_set():
                try:
                    if not torch.equal(model(ids), expected):
                        wrong.append("other numbers")
                except Exception as error:
                    wrong.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        logits = torch.from_numpy(wrong_port.port(folder, ids.numpy(), mistakes=("gelu",))["logits"])
        parity.write_bundle(tmp_path / "port", ids, {"logits": logits}, dtype="float32")
        assert parity.diagnose(folder, tmp_path / "port").found == ("GELU for SiLU",)
        parity.record(folder, ids, tmp_path / "truth", decode=2)
        parity.check(folder, tmp_path / "truth", "float32")
        trace(folder, ids[0].tolist())
    finally:
        over.set()
        thread.join()
    assert wrong == []


def test_two_diagnoses_run_side_by_side(tmp_path: Path) -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 20))
    names = {"relu": "ReLU for SiLU", "no_qkv_bias": "bias of q, k and v missing"}
    for name in names:
        logits = torch.from_numpy(wrong_port.port(folder, ids.numpy(), mistakes=(name,))["logits"])
        parity.write_bundle(tmp_path / name, ids, {"logits": logits}, dtype="float32")
    found: dict[str, tuple[str, ...]] = {}
    threads = [
        threading.Thread(
            target=lambda name=name: found.update({name: parity.diagnose(folder, tmp_path / name).found})
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: (text,) for name, text in names.items()}


# What a bundle may declare


@pytest.mark.parametrize("declared", ["bfloat16", "float32"])
def test_weights_and_activations_of_two_dtypes(tmp_path: Path, declared: str) -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 40))
    checkpoint = Checkpoint(folder)
    (choice,) = (mistake for mistake in choices() if mistake.text == "bfloat16 products")
    logits = forward(folder, "float32", ids, changes=choice.changes)["logits"]
    more = {"weights_dtype": "bfloat16", "activations_dtype": "float32"}
    parity.write_bundle(tmp_path / "port", ids, {"logits": logits}, dtype=declared, **more)
    bundle = parity.read_bundle(tmp_path / "port")
    assert (bundle.weights_dtype, bundle.computed_in, bundle.coarsest) == ("bfloat16", "float32", "bfloat16")
    found = parity.diagnose(checkpoint.folder, tmp_path / "port")
    assert (found.verdict, found.found, found.ranking[0].residual) == ("rounding only", (), 0)
    parity.record(folder, ids, tmp_path / "truth", rounding=["bfloat16"])
    assert parity.diff(tmp_path / "truth", tmp_path / "port").within


def test_a_dtype_of_weights_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata's weights_dtype is 'int8', should be"):
        parity.write_bundle(
            tmp_path / "port",
            torch.zeros(1, 2, dtype=torch.long),
            {"logits": torch.zeros(1, 2, 320)},
            dtype="float32",
            weights_dtype="int8",
        )


@pytest.mark.parametrize(
    ("columns", "fits"), [(320, True), (300, True), (288, True), (287, False), (160, False)]
)
def test_logits_may_lack_the_padding_of_the_vocabulary(tmp_path: Path, columns: int, fits: bool) -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 280, (1, 20))
    logits = torch.from_numpy(wrong_port.port(folder, ids.numpy(), mistakes=("relu",))["logits"])
    parity.write_bundle(tmp_path / "port", ids, {"logits": logits[..., :columns]}, dtype="float32")
    if not fits:
        with pytest.raises(ValueError, match=rf"logits is \[1, 20, {columns}\], should be \[1, 20, 320\]"):
            parity.diagnose(folder, tmp_path / "port")
        return
    found = parity.diagnose(folder, tmp_path / "port")
    assert found.found == ("ReLU for SiLU",)
    assert any(f"{columns} of 320 rows" in note for note in found.notes) == (columns < 320)


def test_a_port_without_logits_is_searched_as_well(tmp_path: Path) -> None:
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 10))
    found = wrong_port.port(folder, ids.numpy(), mistakes=("interleaved_rope",))
    stage = {"blocks.2.residual": torch.from_numpy(found["blocks.2.residual"])}
    parity.write_bundle(tmp_path / "port", ids, stage, dtype="float32")
    assert "interleaved RoPE" in parity.diagnose(folder, tmp_path / "port").found[0]


def test_the_file_of_wrong_weights_is_named(tmp_path: Path) -> None:
    """With all stages, each step is also computed from the port's own numbers before it."""
    folder, ids = GOLDEN / "extended_base", torch.randint(0, 320, (1, 10))

    def noisy(run: Forward, right: object, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return right(h, w * (1 + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))))

    changes = [Change("down", noisy, frozenset([2])), Change("up", noisy, frozenset([2]))]
    stages = forward(folder, "float32", ids, changes=changes)
    parity.write_bundle(tmp_path / "port", ids, stages, dtype="float32")
    found = parity.diagnose(folder, tmp_path / "port")
    assert (found.verdict, found.first_divergence) == ("none of these", "blocks.2.mlp.up")
    (note,) = [note for note in found.notes if "before them" in note]
    assert (
        "blocks.2.mlp.up, blocks.2.mlp.down; the weights of all of them are in model-00003-of-00003" in note
    )


def test_no_mistake_is_no_change() -> None:
    assert NONE.changes == ()
    assert NONE.span(3) == (0, 2)
