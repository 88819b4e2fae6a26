"""A port's mistake is named from what it computed: here a port that was written without sight of the kit.

wrong_port.py is NumPy and shares no code with the package. What it computes goes into a bundle, mostly the
logits alone, and `diagnose` must name the mistake, with every other explanation far behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import wrong_port
from conftest import GOLDEN, change_tensors

from qwen_ref import parity
from qwen_ref.checkpoint import DTYPES
from qwen_ref.parity import diagnosis
from qwen_ref.parity.diagnosis import Diagnosis, Hypothesis, _rank
from qwen_ref.parity.forward import Forward, Weights
from qwen_ref.parity.mistakes import mistakes
from qwen_ref.parity.mistakes.choices import CLAMPED
from qwen_ref.parity.mistakes.grammar import Mistake
from qwen_ref.parity.report import diagnosis_lines
from qwen_ref.parity.stages import Checkpoint

# The port's name of a mistake → what the kit must say.
SAID = {
    "interleaved_rope": "interleaved RoPE",
    "rope_base_1e4": "RoPE base 10000 for 1e+06",
    "rope_base_1e6": "RoPE base 1e+06 for 10000",
    "rope_base_500000": "RoPE base 500000 for 1e+06",
    "positions_from_1": "positions counted from 1, in RoPE and in LogN",
    "decode_position_plus_1": "RoPE positions of decoded tokens one too high",
    "decode_position_minus_1": "RoPE positions of decoded tokens one too low",
    "query_position_plus_1": "queries rotated one position ahead",
    "rope_bfloat16_angles": "RoPE in bfloat16: positions, frequencies and angles",
    "rope_bfloat16_frequencies": "RoPE in bfloat16: the inverse frequencies",
    "rope_bfloat16_tables": "RoPE in bfloat16: cosines and sines",
    "gate_up_swapped": "gate and up swapped",
    "no_qkv_bias": "bias of q, k and v missing",
    **{
        f"qkv_order_{order}": "c_attn's {}, {} and {} third".format(*order)
        for order in ("kqv", "vkq", "qvk", "kvq", "vqk")
    },
    "qkv_by_head": "read head by head",
    "eps_1e-5": "layer_norm_epsilon 1e-05 for 1e-06",
    "eps_1e-3": "layer_norm_epsilon 0.001 for 1e-06",
    "no_final_norm": "no final norm",
    "norms_swapped": "ln_1 and ln_2 swapped",
    "no_logn": "no LogN",
    "logn_on_keys": "LogN on keys instead",
    "logn_on_keys_too": "LogN on keys and queries",
    "logn_log10": "LogN: log10 of the position",
    "logn_p": "log(p) for 0-based",
    "logn_p_plus_2": "log(p + 2) for 0-based",
    "ntk_off": "NTK off",
    "ntk_floor": "NTK with floor",
    "alpha_every_step": "recomputed at every decode step, older keys as they were",
    "alpha_every_step_uncached": "recomputed at every decode step, all keys",
    "no_score_scale": "no 1/√K",
    "score_scale_hidden": "1/√D",
    "non_causal": "not causal",
    "pads_not_masked": "padding not masked",
    "mask_ignored": "attention_mask ignored",
    "padded_positions": "padding counted in positions and in NTK's α",
    "head_tied": "head tied",
    "embed_tied": "embedding tied",
    "c_attn_transposed": "c_attn transposed: each",
    "c_attn_conv1d": "c_attn transposed: its buffer",
    "c_proj_transposed": "c_proj transposed",
    "gelu": "GELU for SiLU",
    "gelu_tanh": "GELU (tanh)",
    "relu": "ReLU",
    "last_layer_dropped": "last layer dropped",
    "first_layer_dropped": "first layer dropped",
}
PADDED = ("pads_not_masked", "mask_ignored", "padded_positions")
DECODED = (
    "decode_position_plus_1",
    "decode_position_minus_1",
    "alpha_every_step",
    "alpha_every_step_uncached",
)
LONG = ("no_logn", "logn_", "ntk_", "rope_base_1e6", "positions_from_1")  # show in ntk_logn only

# Right ports and their mistakes differ by five orders of magnitude in float32; the smallest effect here, an
# epsilon of 1e-5, is 17 times the rounding. NumPy adds in an order of its own: no ratio here is that of bits.
WIDE = 10


def diagnosed(folder: Path, path: Path, ids: torch.Tensor, found: Mapping, **declared: object) -> Diagnosis:
    """What the kit says of these stages in a bundle."""
    stages = {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in found.items()}
    parity.write_bundle(path, ids, stages, **declared)
    return parity.diagnose(folder, path)


def chosen(found: Mapping, stages: str) -> Mapping:
    """All stages, or the one of this name."""
    return found if stages == "all" else {stages: found[stages]}


def planted(
    tmp_path: Path,
    names: tuple[str, ...],
    dtype: str = "float32",
    stages: str = "logits",
    folder: str | None = None,
    length: int = 70,
    prefill: int | None = None,
) -> Diagnosis:
    """What the kit says of the NumPy port with these mistakes, on an input where they show."""
    padded, decoded = (any(name in kind for name in names) for kind in (PADDED, DECODED))
    long = any(name.startswith(LONG) for name in names)
    folder = folder or ("ntk_logn" if padded or decoded or long else "extended_base")
    ids = torch.randint(0, 320, (2 if padded else 1, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    prefill = prefill or (30 if decoded else length)
    found = wrong_port.port(
        GOLDEN / folder, ids.numpy(), mask=mask.numpy(), prefill_length=prefill, mistakes=names, dtype=dtype
    )
    declared = {"dtype": dtype, "attention_mask": mask, "prefill_length": prefill}
    return diagnosed(GOLDEN / folder, tmp_path / "port", ids, chosen(found, stages), **declared)


def check_named(diagnosis: Diagnosis, said: list[str], wide: float = WIDE) -> None:
    assert diagnosis.verdict == "mistake"
    assert len(diagnosis.found) == len(said)
    for text in said:
        assert any(text in found for found in diagnosis.found), f"{text!r} not in {diagnosis.found}"
    best, *others = diagnosis.ranking
    assert best.mistakes == diagnosis.found
    second = next(h for h in others if h.mistakes not in diagnosis.alike)
    assert second.excess >= wide * best.excess, f"{second} is near {best}"


def test_every_mistake_of_the_port_is_listed_here() -> None:
    others = {"norm_weight_before_cast", "float16_overflow", "value_rotated", "down_scaled", "post_norm"}
    assert set(wrong_port.MISTAKES) == set(SAID) | others


@pytest.mark.parametrize("name", SAID)
def test_a_mistake_is_named_from_the_logits_alone(tmp_path: Path, name: str) -> None:
    diagnosis = planted(tmp_path, (name,))
    check_named(diagnosis, [SAID[name]])
    # With LogN, a table that is read one further on is the same as positions that are.
    same = name in ("positions_from_1", "logn_p_plus_2")
    common = {mistake.text for mistake in mistakes(Checkpoint(GOLDEN / "ntk_logn").config) if mistake.common}
    assert len([names for names in diagnosis.alike if set(names) <= common]) == same
    assert diagnosis.first_divergence == "logits"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("interleaved_rope", "blocks.0.attn.q_rotated"),
        ("positions_from_1", "blocks.0.attn.q_rotated"),
        ("gate_up_swapped", "blocks.0.mlp.gate"),
        ("no_qkv_bias", "blocks.0.attn.q"),
        ("no_logn", "blocks.0.attn.q_scaled"),
        ("no_score_scale", "blocks.0.attn.mixed"),
        ("c_proj_transposed", "blocks.0.attn.out"),
        ("gelu", "blocks.0.mlp.product"),
        ("norms_swapped", "blocks.0.attn_norm"),
        ("head_tied", "logits"),
    ],
)
def test_stages_say_where_it_begins(tmp_path: Path, name: str, first: str) -> None:
    diagnosis = planted(tmp_path, (name,), stages="all")
    check_named(diagnosis, [SAID[name]])
    assert diagnosis.first_divergence == first


# What a mistake changes by more than bfloat16 rounds: the margin is that of the rounding, no more.
@pytest.mark.parametrize(
    "name",
    [
        *(
            "interleaved_rope",
            "rope_base_1e4",
            "rope_base_1e6",
            "gate_up_swapped",
            "no_qkv_bias",
            "qkv_order_qvk",
        ),
        *("qkv_by_head", "norms_swapped", "no_logn", "logn_on_keys", "ntk_floor", "alpha_every_step"),
        *("no_score_scale", "non_causal", "pads_not_masked", "head_tied", "c_attn_transposed", "relu"),
    ],
)
def test_a_mistake_in_bfloat16_is_named_from_the_logits_alone(tmp_path: Path, name: str) -> None:
    check_named(planted(tmp_path, (name,), dtype="bfloat16"), [SAID[name]], wide=5)


@pytest.mark.parametrize("stages", ["logits", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("folder", ["extended_base", "ntk_logn"])
def test_a_right_port_is_rounding_only(tmp_path: Path, folder: str, dtype: str, stages: str) -> None:
    diagnosis = planted(tmp_path, (), dtype, stages, folder)
    assert (diagnosis.verdict, diagnosis.found, diagnosis.first_divergence) == ("rounding only", (), None)
    assert diagnosis.ranking[0].mistakes == ()


@pytest.mark.parametrize(
    ("names", "folder"),
    [(("interleaved_rope", "gelu"), "extended_base"), (("ntk_off", "head_tied"), "ntk_logn")],
)
def test_two_mistakes_are_named_by_their_stages(tmp_path: Path, names: tuple[str, ...], folder: str) -> None:
    check_named(planted(tmp_path, names, stages="all", folder=folder), [SAID[name] for name in names])


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (("interleaved_rope", "gate_up_swapped"), "extended_base"),
        (("no_logn", "ntk_off"), "ntk_logn"),
        (("eps_1e-5", "no_qkv_bias"), "extended_base"),
        (("head_tied", "last_layer_dropped"), "extended_base"),
        (("no_score_scale", "non_causal"), "extended_base"),  # rounds more than the reference does
        (("alpha_every_step", "gelu"), "ntk_logn"),
    ],
)
def test_two_mistakes_at_once_are_named(tmp_path: Path, names: tuple[str, ...], folder: str) -> None:
    length = 24 if folder == "extended_base" else 70  # longer than the trained length where that matters
    # The epsilon is 2.9 to 3.9 tolerances away. What is left is rounding against rounding, which depends on
    # the kernels: 0.18 to 0.27 tolerances with AVX-512 and AVX2, 0.36 with the oldest, over four texts.
    wide = 6 if "eps_1e-5" in names else WIDE
    check_named(planted(tmp_path, names, folder=folder, length=length), [SAID[name] for name in names], wide)


def test_a_port_that_rounds_more_by_its_mistake_is_judged_by_that_rounding(tmp_path: Path) -> None:
    """Without 1/√K the softmax is sharp: float32 is then further off than the reference's tolerance."""
    names = ("no_score_scale", "non_causal")
    diagnosis = planted(tmp_path, names, folder="ntk_logn", prefill=40)
    check_named(diagnosis, [SAID[name] for name in names])
    assert diagnosis.ranking[0].excess > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_nobody_lists_is_found(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(wrong_port.ROPE_BASES, "rope_base_23400", 23400.0)
    monkeypatch.setattr(wrong_port, "MISTAKES", (*wrong_port.MISTAKES, "rope_base_23400"))
    diagnosis = planted(tmp_path, ("rope_base_23400",), dtype)
    (found,) = diagnosis.found
    base = float(found.removeprefix("RoPE base ").removesuffix(" for 1e+06"))
    assert base == pytest.approx(23400, rel=0 if dtype == "float32" else 0.01)


@pytest.mark.parametrize(
    ("name", "stages", "first"),
    [("down_scaled", "all", "blocks.0.mlp.down"), ("down_scaled", "logits", "logits")],
)
def test_a_mistake_that_is_not_known_is_said_to_be_none(tmp_path: Path, name: str, stages: str, first: str):
    diagnosis = planted(tmp_path, (name,), stages=stages, length=24)
    assert (diagnosis.verdict, diagnosis.found) == ("none of these", ())
    assert diagnosis.first_divergence == first


# The dtype that was computed in, whatever the order of adding


class InBlocks(wrong_port.Port):
    """Products are summed in blocks of 16, the last one first."""

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        total = np.zeros(1, self.work)
        for start in range(x.shape[-1] - 16, -1, -16):
            total = total + x[..., start : start + 16] @ weight.T[start : start + 16]
        return self.round(total + bias)


class PartialSumsRounded(wrong_port.Port):
    """Products are summed in blocks of 32, and every partial sum is rounded."""

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        total = np.zeros(1, self.work)
        for start in range(0, x.shape[-1], 32):
            part = x[..., start : start + 32] @ weight.T[start : start + 32]
            total = self.round(total + self.round(part))
        return self.round(total + bias)


class AddedInHalf(wrong_port.Port):
    """The sum of a product is rounded after each term: its error is as near to bfloat16's as to float16's."""

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        total = np.zeros((*x.shape[:-1], len(weight)), x.dtype)
        for i in range(x.shape[-1]):
            total = self.round(total + self.round(x[..., i : i + 1] * weight[:, i]))
        return self.round(total + bias)


class WideLogits(wrong_port.Port):
    """The output head's products are left in float32."""

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        y = x @ weight.T + bias
        return y if len(weight) == self.config["vocab_size"] else self.round(y)


class ProductsOnly(wrong_port.Port):
    """What enters a product is rounded; residual stream, norms, attention and activations are float32."""

    def round(self, x: np.ndarray) -> np.ndarray:
        return x

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        return super().round(x) @ super().round(weight).T + bias


class Clamped(wrong_port.Port):
    """Numbers beyond float16 become its largest."""

    def round(self, x: np.ndarray) -> np.ndarray:
        return super().round(np.clip(x, -65504, 65504))

    def activation(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # exp(−x) may be infinite
            return super().activation(x)


def computed(
    tmp_path: Path,
    port: type[wrong_port.Port],
    dtype: str,
    declared: str,
    *,
    folder: Path = GOLDEN / "extended_base",
    stages: str = "logits",
    mistakes: tuple[str, ...] = (),
    length: int = 40,
) -> Diagnosis:
    """What the kit says of a port that computes in one dtype and declares another."""
    ids = torch.randint(0, 320, (1, length))
    found = port(folder, mistakes, dtype).forward(ids.numpy(), np.ones((1, length), int), length, length)
    return diagnosed(folder, tmp_path / "port", ids, chosen(found, stages), dtype=declared)


ORDERS = [InBlocks, PartialSumsRounded, WideLogits]
# Computed in, declared: each rounds more than what was declared.
WIDER = [
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("bfloat16", "float16"),
    ("float16", "float64"),
    ("float32", "float64"),
]


@pytest.mark.parametrize(
    ("port", "dtype", "declared"),
    [*((port, *WIDER[0]) for port in ORDERS[:2]), *((wrong_port.Port, *pair) for pair in WIDER[1:])],
)
def test_the_dtype_is_named_by_the_size_of_the_error(
    tmp_path: Path, port: type[wrong_port.Port], dtype: str, declared: str
) -> None:
    found = computed(tmp_path, port, dtype, declared)
    assert (found.verdict, found.found, found.alike) == ("mistake", (f"computed in {dtype}",), [])
    assert found.ranking[0].excess < 0.6  # of FACTOR, 4: at most twice this implementation's rounding


@pytest.mark.parametrize(
    ("declared", "length", "verdicts", "named"),
    [
        ("float32", 5, ("mistake",), ("computed in float16",)),
        # Over 40 positions it rounds about 4 times as much as is usual, more or less by the processor.
        ("float16", 40, ("none of these", "rounding only"), ()),
    ],
)
def test_what_has_float16_numbers_is_not_called_bfloat16(
    tmp_path: Path, declared: str, length: int, verdicts: tuple[str, ...], named: tuple[str, ...]
) -> None:
    found = computed(tmp_path, AddedInHalf, "float16", declared, length=length)
    assert found.verdict in verdicts
    assert found.found == named


@pytest.mark.parametrize(("dtype", "declared"), WIDER[:3])
def test_the_dtype_is_named_from_all_stages(tmp_path: Path, dtype: str, declared: str) -> None:
    found = computed(tmp_path, InBlocks, dtype, declared, folder=GOLDEN / "ntk_logn", stages="all")
    assert (found.verdict, found.found) == ("mistake", (f"computed in {dtype}",))


def test_half_precision_whose_logits_are_wide_may_be_a_choice(tmp_path: Path) -> None:
    """Engines round a part of what they compute: only numbers of the dtype tell that all of it is."""
    found = computed(tmp_path, WideLogits, "float16", "float32")
    assert (found.verdict, found.found) == ("choice", ("a part computed in float16",))


@pytest.mark.parametrize(("scale", "share"), [(1.003, 90), (1.01, 90)])
def test_a_factor_as_large_as_rounding_is_no_choice(tmp_path: Path, scale: float, share: int) -> None:
    """Its size alone would acquit it: but it is the same everywhere, and rounding is not."""

    class Scaled(wrong_port.Port):
        def rms_norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return super().rms_norm(x, weight) * np.float32(scale)

    found = computed(tmp_path, Scaled, "float32", "float32")
    assert (found.verdict, found.found) == ("none of these", ())
    (note,) = {note for note in found.notes if "no rounding" in note}
    assert int(note.split("%")[0].rsplit(" ", 1)[1]) > share


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_in_half_are_a_choice(tmp_path: Path, dtype: str) -> None:
    found, said = computed(tmp_path, ProductsOnly, dtype, "float32"), (f"{dtype} products",)
    assert (found.verdict, found.found, found.choices) == ("choice", said, said)


@pytest.mark.parametrize("port", [*ORDERS, ProductsOnly])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_right_port_in_another_order_is_rounding_only(
    tmp_path: Path, port: type[wrong_port.Port], dtype: str
) -> None:
    found = computed(tmp_path, port, dtype, dtype)
    assert (found.verdict, found.found) == ("rounding only", ())
    finer = port is ProductsOnly and dtype != "float32"
    assert any("more precision than declared is no mistake" in note for note in found.notes) == finer


@pytest.mark.parametrize(
    ("dtype", "declared"), [("float32", "float16"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
@pytest.mark.parametrize("stages", ["logits", "all"])
def test_more_precision_than_declared_is_no_mistake(tmp_path: Path, dtype: str, declared: str, stages: str):
    found = computed(tmp_path, wrong_port.Port, dtype, declared, stages=stages)
    assert (found.verdict, found.found) == ("rounding only", ())
    (note,) = [note for note in found.notes if "more precision" in note]
    assert f"about as near as it is in {dtype}:" in note


def test_a_mistake_in_another_dtype_than_declared_is_both(tmp_path: Path) -> None:
    found = computed(tmp_path, InBlocks, "float16", "float32", mistakes=("relu",), length=12)
    assert sorted(found.found) == ["ReLU for SiLU", "computed in float16"]
    assert found.alike == []


@pytest.mark.parametrize(
    ("name", "folder"),
    [("rope_bfloat16_frequencies", "ntk_logn"), ("logn_p", "ntk_logn"), ("eps_1e-3", "ntk_logn")],
)
def test_a_mistake_as_large_as_a_dtypes_rounding_is_not_called_that(
    tmp_path: Path, name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are 0.8 to 1.5 times float16's rounding or bfloat16's. Here nobody knows them."""
    known = mistakes
    said = [SAID[name], "layer_norm_epsilon"]
    monkeypatch.setattr(
        diagnosis,
        "mistakes",
        lambda config: [m for m in known(config) if not any(text in m.text for text in said)],
    )
    monkeypatch.setattr(diagnosis, "in_single_layers", lambda config, layers: [])
    monkeypatch.setattr(diagnosis._Search, "_pairs", lambda self, ranking: [])
    if name == "eps_1e-3":  # all positions are wrong alike: the number is found
        assert planted(tmp_path, (name,), length=150).found == ("layer_norm_epsilon 0.001 for 1e-06",)
    else:
        assert planted(tmp_path, (name,), folder=folder, length=150).verdict == "none of these"


@pytest.mark.parametrize("declared", ["float16", "float32", "bfloat16"])
def test_clamped_overflow_is_named_in_another_order(tmp_path: Path, overflowing: Path, declared: str) -> None:
    found = computed(tmp_path, Clamped, "float16", declared, folder=overflowing, length=20)
    assert (found.verdict, found.found) == ("mistake", ("float16 overflow, clamped to 65504",))


# The kit's own mistakes, where the NumPy port has none like it


def run_here(
    folder: Path, mistake: Mistake, dtype: str, ids: torch.Tensor, stages: list[str], **more: object
) -> dict[str, torch.Tensor]:
    """What the kit's own forward pass computes with a mistake."""
    found: dict[str, torch.Tensor] = {}
    weights = Weights(Checkpoint(folder), DTYPES[mistake.dtype or dtype])
    run = Forward(weights, ids, changes=mistake.changes, **more)
    run.run(lambda stage, value, start: found.update({stage: value}), stages)
    return found


def planted_here(tmp_path: Path, folder: Path, text: str, dtype: str, stages: list[str]) -> Diagnosis:
    """What the kit says of its own mistake, on a padded batch with cached steps."""
    ids = torch.randint(0, 320, (2, 72))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # 64 tokens of 70: with and without padding, α differs
    config = Checkpoint(folder).config
    mistake = next(mistake for mistake in mistakes(config) if mistake.text.startswith(text))
    padding = torch.tensor([0, 6])
    values = run_here(folder, mistake, dtype, ids, stages, padding=padding, prefill_length=70)
    parity.write_bundle(tmp_path / "port", ids, values, dtype=dtype, attention_mask=mask, prefill_length=70)
    return parity.diagnose(folder, tmp_path / "port")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "no RoPE",
            "RoPE positions of decoded tokens all 0",
            "keys rotated one",
            "RoPE base 100000 ",
            "RoPE base 1e+07 ",
            "RoPE in float16",
            "rows of c_attn stored",
        ),
        *("padding counted in positions", "padding counted in NTK's α"),
        *(
            "LogN: natural logarithm",
            "layer_norm_epsilon 1e-08",
            "computed in float16",
            "computed in bfloat16",
        ),
    ],
)
def test_the_other_mistakes_are_named_as_well(tmp_path: Path, text: str) -> None:
    diagnosis = planted_here(tmp_path, GOLDEN / "ntk_logn", text, "float32", ["logits"])
    assert diagnosis.verdict == "mistake"
    names = [diagnosis.found, *diagnosis.alike]
    assert any(found[0].startswith(text) for found in names), names


def test_a_layer_that_the_port_has_was_not_dropped(tmp_path: Path) -> None:
    """Two layers swapped: what lacks the last one must neither fit nor fail."""
    found = planted(tmp_path, ("down_scaled",), stages="all", length=12)
    assert found.verdict == "none of these"
    assert all(h.excess == np.inf for h in found.ranking if "last layer dropped" in h.mistakes)


def test_a_fused_norm_is_a_choice(tmp_path: Path) -> None:
    text = "norm weight applied before"
    diagnosis = planted_here(tmp_path, GOLDEN / "extended_base", text, "bfloat16", ["logits"])
    assert (diagnosis.verdict, diagnosis.found) == ("rounding only", ())
    assert any(f"a choice, no mistake: {text}" in note for note in diagnosis.notes)


def test_what_only_half_precision_shows_is_named_by_its_bits(tmp_path: Path) -> None:
    text = "norm computed in the model's dtype"
    diagnosis = planted_here(tmp_path, GOLDEN / "extended_base", text, "bfloat16", ["logits"])
    # Only bits can show it. They are equal because one machine's kernels computed both; the port of another
    # machine would be rounding only.
    assert diagnosis.verdict == "mistake"
    assert diagnosis.found[0].startswith(text)
    assert diagnosis.comparison.within  # it is rounding, but not the published code's


def test_cosines_in_bfloat16_are_usual_in_bfloat16_and_a_mistake_in_float32(tmp_path: Path) -> None:
    text = "RoPE in bfloat16: cosines"
    half = planted_here(tmp_path, GOLDEN / "extended_base", text, "bfloat16", ["logits"])
    assert half.verdict == "rounding only"
    single = planted_here(tmp_path, GOLDEN / "extended_base", text, "float32", ["logits"])
    assert single.found[0].startswith(text)


# float16 overflow


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A golden model whose up times gate leaves float16's range in one layer, and nothing after."""
    folder = shutil.copytree(GOLDEN / "ntk_logn", tmp_path / "overflowing")
    factors = {"w1": 600, "w2": 600, "c_proj": 1 / 360_000}

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name, factor in factors.items():
            tensors[f"transformer.h.1.mlp.{name}.weight"] *= factor

    change_tensors(folder, enlarge)
    return folder


@pytest.mark.parametrize("stages", ["logits", "all"])
def test_nan_from_float16_overflow_is_named(tmp_path: Path, overflowing: Path, stages: str) -> None:
    ids = torch.randint(0, 320, (1, 20))
    found = wrong_port.port(overflowing, ids.numpy(), mistakes=("float16_overflow",))
    diagnosis = diagnosed(overflowing, tmp_path / "port", ids, chosen(found, stages), dtype="float16")
    assert (diagnosis.verdict, diagnosis.found) == ("mistake", ("float16 overflow",))
    assert any("blocks.1.mlp.product reaches" in note for note in diagnosis.notes)
    assert diagnosis.first_divergence == ("logits" if stages == "logits" else "blocks.1.mlp.product")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_overflow_that_was_clamped_is_named(tmp_path: Path, overflowing: Path, dtype: str) -> None:
    ids = torch.randint(0, 320, (1, 20))
    config = Checkpoint(overflowing).config
    clamped = next(mistake for mistake in mistakes(config) if mistake.text == CLAMPED)
    kept = run_here(overflowing, clamped, "float16", ids, ["logits"])
    diagnosis = diagnosed(overflowing, tmp_path / "port", ids, kept, dtype=dtype)
    assert diagnosis.found == ("float16 overflow, clamped to 65504",)


def test_nan_that_no_overflow_explains_is_bad_input(tmp_path: Path) -> None:
    ids = torch.randint(0, 320, (1, 20))
    found = wrong_port.port(GOLDEN / "extended_base", ids.numpy())
    found["blocks.1.attn.mixed"][0, 3, 5] = np.nan
    found["logits"][0, 3:] = np.nan
    with pytest.raises(ValueError, match=r"first at blocks\.1\.attn\.mixed, row 0, position 3"):
        diagnosed(GOLDEN / "extended_base", tmp_path / "port", ids, found, dtype="float32")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_single_nan_is_no_overflow(tmp_path: Path, overflowing: Path, dtype: str) -> None:
    ids = torch.randint(0, 320, (1, 20))
    logits = wrong_port.port(overflowing, ids.numpy())["logits"]
    logits[0, 2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 320 numbers are NaN or infinite first at logits"):
        diagnosed(overflowing, tmp_path / "port", ids, {"logits": logits}, dtype=dtype)


def test_a_batch_in_which_every_row_is_padded_is_diagnosed(tmp_path: Path) -> None:
    padding = (2, 5)
    ids = torch.randint(0, 320, (len(padding), 12))
    mask = torch.stack([torch.arange(12) >= pad for pad in padding]).long()
    logits, declared = torch.randn(len(padding), 12, 320), {"dtype": "float32", "attention_mask": mask}
    found = diagnosed(GOLDEN / "ntk_logn", tmp_path / "port", ids, {"logits": logits}, **declared)
    assert found.verdict == "none of these"


def test_nan_before_the_first_overflow_is_no_overflow(tmp_path: Path, overflowing: Path) -> None:
    ids = torch.randint(0, 320, (1, 20))
    found = wrong_port.port(overflowing, ids.numpy())
    found["blocks.0.attn.mixed"][0, 3, 5] = np.nan
    with pytest.raises(ValueError, match=r"first at blocks\.0\.attn\.mixed"):
        diagnosed(overflowing, tmp_path / "port", ids, found, dtype="float32")


def test_what_agrees_further_is_likelier_however_far_it_is_then() -> None:
    further = Hypothesis(("a",), 1.0, "logits", 1e6, (), agrees=9)
    nearer = Hypothesis(("b",), 0.1, "blocks.0.attn.q", 2.0, (), agrees=2)
    assert sorted([nearer, further], key=_rank) == [further, nearer]


# What is left in place


def test_nothing_of_a_mistake_stays_in_the_model(tmp_path: Path) -> None:
    import qwen_ref.model

    before = {name: value for name, value in vars(qwen_ref.model).items() if not name.startswith("__")}
    forward = qwen_ref.model.RMSNorm.forward
    planted(tmp_path, ("down_scaled",), length=8)
    assert {name: vars(qwen_ref.model)[name] for name in before} == before
    assert qwen_ref.model.RMSNorm.forward is forward


def test_an_exact_embedding_alone_claims_no_more_precision(tmp_path: Path) -> None:
    """The embedding is rows of a weight: a port that has it in bfloat16 has it exactly."""
    ids = torch.arange(3, 43)[None]
    weight = Checkpoint(GOLDEN / "ntk_logn").weight("embed.weight")
    parity.write_bundle(tmp_path / "port", ids, {"embed": weight[ids]}, dtype="bfloat16")
    found = parity.diagnose(GOLDEN / "ntk_logn", tmp_path / "port")
    assert found.verdict == "rounding only"
    assert "embed is what float64 gives, to the last bit" in found.notes
    assert not any("more precision" in note for note in found.notes)


@pytest.mark.slow
def test_what_explains_nothing_is_not_called_nearest(tmp_path: Path) -> None:
    """One position is wrong at random. A mistake that comes a hundredth nearer would lead astray."""
    ids = torch.arange(3, 43)[None]
    path = tmp_path / "port"
    down = parity.record(GOLDEN / "ntk_logn", ids, path, dtype="float32").stage("blocks.2.mlp.down").clone()
    down[:, 0] += torch.randn(64)
    parity.write_bundle(path, ids, {"blocks.2.mlp.down": down}, dtype="float32")
    found = parity.diagnose(GOLDEN / "ntk_logn", path)
    assert found.verdict == "none of these"
    said = "\n".join(diagnosis_lines(found))
    assert "nothing that was tried comes nearer than no mistake at all" in said
    assert "nearest was" not in said
    assert "the error is largest at position 0 of row 0" in said
