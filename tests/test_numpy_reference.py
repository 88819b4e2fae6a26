"""A second implementation, NumPy from the published formulas alone, agrees with float64 to 1e-12.

NumPy and torch add in orders of their own, which depend on the processor: some 1e-15 of it was measured.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from golden_cases import cases, golden, model, truth
from numpy_reference import forward, read_weights

from qwen_ref import Qwen, QwenConfig
from qwen_ref.checkpoint import tensor_table

# float64 rounds at 1.1e-16; three layers of sums of up to 320 terms reach some 1e-15 (measured: 3e-15 at
# most), and angles at 3,000 positions 1e-13. 1e-12 leaves room for another processor, and none for a formula.
TOLERANCE = 1e-12

CASES = [(folder, case) for folder in ("extended_base", "ntk_logn", "long") for case in cases(folder)]


@pytest.mark.parametrize(("folder", "case"), [pair for pair in CASES if pair[1] != "batch"])
def test_logits_agree(folder: str, case: str) -> None:
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    ids = golden(folder)[f"{case}.input_ids"][0].tolist()
    prompt_length = int(case.split("_")[1])
    theirs = forward(config, read_weights(GOLDEN / folder), ids, prompt_length)["logits"]
    ours = truth(folder, case)[0].numpy()
    assert np.linalg.norm(ours - theirs[-len(ours) :]) <= TOLERANCE * np.linalg.norm(theirs[-len(ours) :])


def test_every_row_of_a_padded_batch_agrees_with_the_row_alone() -> None:
    folder = "extended_base"
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    weights = read_weights(GOLDEN / folder)
    ids, mask = golden(folder)["batch.input_ids"], golden(folder)["batch.attention_mask"]
    with torch.inference_mode():
        ours = model(folder, "float64")(ids, attention_mask=mask).numpy()
    for row, real in enumerate(mask.bool()):
        theirs = forward(config, weights, ids[row][real].tolist())["logits"]
        assert np.linalg.norm(ours[row][real] - theirs) <= TOLERANCE * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("heads", "head_size", "width", "base", "eps", "seq_length", "ntk", "logn", "length"),
    [
        (1, 128, 48, 1e6, 1e-6, 64, False, False, 70),
        (3, 10, 7, 1e4, 1e-5, 16, True, False, 50),
        (2, 64, 33, 5e5, 1e-3, 16, False, True, 40),
        (5, 6, 20, 1e4, 1e-6, 8, True, True, 33),
        (2, 32, 16, 10.0, 1e-8, 1000, True, True, 5),
    ],
)
def test_other_shapes_and_constants_agree(
    heads: int,
    head_size: int,
    width: int,
    base: float,
    eps: float,
    seq_length: int,
    ntk: bool,
    logn: bool,
    length: int,
) -> None:
    config = QwenConfig(
        hidden_size=heads * head_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        kv_channels=head_size,
        intermediate_size=2 * width,
        vocab_size=97,
        seq_length=seq_length,
        rotary_emb_base=base,
        layer_norm_epsilon=eps,
        use_dynamic_ntk=ntk,
        use_logn_attn=logn,
    )
    qwen = Qwen(config).double()
    state = qwen.state_dict()
    weights = {spec.published: state[spec.name].numpy() for spec in tensor_table(config)}
    ids = torch.randint(97, (1, length))
    with torch.inference_mode():
        ours = qwen(ids)[0].numpy()
    theirs = forward(dataclasses.asdict(config), weights, ids[0].tolist())["logits"]
    assert np.linalg.norm(ours - theirs) <= TOLERANCE * np.linalg.norm(theirs)
