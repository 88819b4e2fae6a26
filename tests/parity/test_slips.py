"""The mistakes of slips.py, whose author had not seen the kit. From float32 logits, diagnose names each.

`make test` has time for those in QUICK. `make slow` has the others that are made in all layers, and a few
that are made in one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import slips
import torch
from conftest import GOLDEN, read_golden, relative_rms
from slip_cases import CASES, SLIPS

from qwen_ref import parity

INVISIBLE = ["positions from 1"]  # RoPE is relative: nothing changes
CHOICES = ["logits in float16", "head in float16"]  # no mistakes
UNNAMED = [f"shard {n} with 5 % noise" for n in (1, 2, 3)]  # from logits alone

# What the kit calls a matrix.
LARGE = {"out": "attention's c_proj", "up": "w1 (up)", "gate": "w2 (gate)", "down": "the MLP's c_proj"}
MATRICES = {**LARGE, "qkv": "c_attn", **{x: f"the {x} third of c_attn" for x in "qkv"}}
ACTIVATIONS = {
    "GELU": "GELU",
    "tanh GELU": "GELU (tanh)",
    "quick GELU": "quick GELU, x · σ(1.702 x),",
    "ReLU": "ReLU",
    "squared ReLU": "ReLU²",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "mish": "mish",
    "hard swish": "hard swish",
    "ELU": "ELU",
    "identity": "nothing",
}
SEVENTHS = "symmetric, the largest n/2 − 1"  # steps of a seventh of the largest number

# What the kit's text must contain. A full stop is where it begins or ends.
NAMES = {
    # leaving the model
    "logits one position early": "position one later",
    "logits one position late": "position one earlier",
    "logits one position early, zeros last": "position one later",
    "logits one position late, zeros first": "position one earlier",
    "log-softmax": "log-softmax handed over",
    "softmax": "softmax handed over as logits: prob",
    "logits / 0.7": "temperature of 0.7.",
    "logits × 2": "logits times 2",
    "logits capped at 30": "logits capped: 30 · tanh",
    "logits capped at 5": "logits capped: 5 · tanh",
    "logits clamped to ±3": "logits cut at ±3",
    "top-k 20, -1e9": "top-k, k = 20), the others are -1e+09",
    "top-k 20, -inf": "top-k, k = 20), the others are -inf",
    "top-p 0.8, -1e9": "top-p or the like: 79 to 120 are left), the others are -1e+09",
    "top-p 0.8, -inf": "top-p or the like: 79 to 120 are left), the others are -inf",
    "repetition penalty 1.1": "repetition penalty 1.1.",
    "presence penalty 0.5": "presence penalty 0.5.",
    "frequency penalty 0.5": "frequency penalty 0.5.",
    "logits in float16": "logits rounded to float16",
    "logits negative": "logits with their sign turned",
    "logits' columns rolled by one": "logits rolled: each id has that of the one before",
    "logits minus the maximum": "logits less the largest one",
    "final norm missing": "no final norm",
    "final norm twice": "final norm: done twice.",
    "final norm is LayerNorm": "final norm: LayerNorm for RMSNorm.",
    "final norm without weight": "final norm: without its weight",
    "head tied to the embedding": "head tied",
    "head's rows shifted by one": "row one further on, the last one a row of zeros",
    "head in float16": "a part computed in float16",
    # entering it
    "embedding of id + 1": "each id has the row one further on",
    "embedding of id - 1": "each id has the row one before",
    "ids reversed": "ids in reverse order",
    "first token dropped, last repeated": "first id dropped, the last one repeated",
    **{
        f"token {n} before, {end} T": f"token {n % 320} put before the ids, logits of the {end} positions"
        for n, end in slips.BEFORE.values()
    },
    "embedding × √D": "embedding times √D",
    "embedding normalised": "embedding normalised.",
    # layers and weights
    "layers in reverse order": "layers in reverse order.",
    "layer 0 loaded as layer 1, too": "layer 0 loaded in place of layer 1",
    "bias of the next layer": "bias of the next layer's c_attn",
    "ln_1 of the next layer": "ln_1 with the next layer's weight",
    "ln_2 of the next layer": "ln_2 with the next layer's weight",
    "qkv of the next layer": "c_attn of the next layer, with its own bias.",
    **{f"{name} of the next layer": f"{kit} of the next layer." for name, kit in LARGE.items()},
    **{
        f"{x} of the next layer": f"the {x} third of the next layer's c_attn, with its own bias."
        for x in "qkv"
    },
    **{f"{name} zero": f"{kit} zero: never loaded." for name, kit in MATRICES.items()},
    **{f"{name} doubled": f"{kit} doubled." for name, kit in MATRICES.items()},
    **{f"{name} rows rolled by one": f"{kit}: rows rolled by one." for name, kit in MATRICES.items()},
    **{
        f"{name} in 4 bits, {off}": f".{kit} quantised to 4 bits, groups of 32, {SEVENTHS}: {off}."
        for name, kit in MATRICES.items()
        for off in ("zero point one too high", "zero point one too low")
    },
    **{f"{name} transposed": f"{MATRICES[name]} transposed." for name in ("out", "q", "k", "v")},
    "bias missing": "bias of q, k and v missing",
    "bias added twice": "bias of q, k and v added twice",
    "bias on q only": "bias of k and v missing",
    "bias of q missing": "bias of q missing.",
    "bias of k missing": "bias of k missing.",
    "bias of v missing": "bias of v missing.",
    "gate and up swapped": "gate and up swapped.",
    "q and k swapped": "c_attn's k, q and v third",
    "q and v swapped": "c_attn's v, k and q third",
    "k and v swapped": "c_attn's q, v and k third",
    "heads in reverse order before out": "heads in reverse order before c_proj",
    # norms
    "LayerNorm": "norms: LayerNorm for RMSNorm.",
    "eps 1e-5": "layer_norm_epsilon 1e-05",
    "eps 1e-3": "layer_norm_epsilon 0.001",
    "eps outside the root": "norms: epsilon outside the root",
    "sum for mean in the norm": "norms: the sum of squares",
    "mean of absolute values in the norm": "norms: the mean of absolute values",
    "norm per head": "norms: head by head",
    "norm without weight": "norms: without its weight",
    "norm with 1 + weight": "norms: 1 + weight",
    "ln_1's weight for ln_2": "ln_2 with the other norm's weight",
    "norm after attention and MLP": "both results normalised before they are added",
    "attention's norm left out": "ln_1: left out.",
    "MLP's norm left out": "ln_2: left out.",
    "normed stream as the residual": "added to their norms' outputs",
    # attention
    "no 1/√K": "no 1/√K",
    "1/K for 1/√K": "scaled by 1/K",
    "1/√D for 1/√K": "scaled by 1/√D",
    "1/√K twice": "scaled by 1/K",
    "softmax over queries": "softmax over the queries",
    "softmax with base 2": "base 2",
    "softmax with one more in the denominator": "one more in the denominator",
    "sigmoid for softmax": "sigmoid for softmax",
    "one future key seen": "the next position is seen",
    "own key not seen": "its own key is not seen",
    "not causal": "attention not causal.",
    "sliding window of 8": "window of the last 8 keys",
    "attention not projected": "attention's c_proj left out.",
    "attention and MLP parallel": "both read the layer's input",
    "attention's residual not added": "attention without the residual",
    "attention's residual halved": "attention with the residual halved",
    "attention left out": "attention left out.",
    "attention added twice": "attention added twice",
    # RoPE
    "positions doubled": "RoPE positions doubled",
    "positions halved": "RoPE positions halved",
    "positions reversed": "RoPE positions counted from the end",
    "RoPE exponent i/K": "exponent i/K",
    "RoPE exponent 2i/D": "exponent 2i/D",
    "RoPE on half of the dimensions": "on half of the head's dimensions, with its",
    "RoPE on a quarter of the dimensions": "on a quarter of the head's dimensions, with its",
    "RoPE on half of the dimensions, frequencies of all": "on half of the head's dimensions, with the",
    "RoPE on a quarter of the dimensions, frequencies of all": "a quarter of the head's dimensions, with the",
    "RoPE base 1e4": "RoPE base 10000",
    "RoPE base 5e5": "RoPE base 500000",
    "q not rotated": "queries not rotated",
    "k not rotated": "keys not rotated",
    "v rotated, too": "RoPE on v as well",
    "interleaved RoPE": "interleaved RoPE",
    "angles' sign turned": "RoPE with the angle's sign turned",
    "cos and sin swapped": "cosine and sine swapped",
    "RoPE on half of the heads": "RoPE on the first half of the heads",
    # the MLP
    "MLP's residual from before attention": "the MLP added to the stream before attention",
    "MLP done twice": "the MLP done twice",
    "MLP's residual not added": "the MLP without the residual",
    "MLP's residual halved": "the MLP with the residual halved",
    "MLP left out": "the MLP left out.",
    "MLP added twice": "the MLP added twice",
    **{f"{name} for silu": f".{kit} for SiLU." for name, kit in ACTIVATIONS.items()},
    "silu twice": ".SiLU done twice for SiLU.",
    "silu on up, not on gate": "gate and up swapped.",  # the same
    "silu after the product": "the activation after the product",
    "up not multiplied": "up left out: silu(gate) alone.",
    "silu(gate) + up": "gate and up added, not multiplied",
    "gate + up": "gate and up added, without SiLU",
    "half of the MLP's channels": "the second half of the MLP's channels missing",
    # LogN and NTK
    "no LogN": "no LogN.",
    "LogN: log2 over ln": "log2 of the position over the natural",
    "LogN: log10 over ln": "log10 of the position over the natural",
    "LogN: square root for log": "the square root of the position",
    "LogN: by the total length": "LogN of the whole length for every position",
    "LogN: below the trained length, too": "LogN within the trained length as well",
    "LogN: twice": "LogN: done twice.",
    "LogN: table in float16": "LogN: the table in float16",
    "LogN: table in bfloat16": "LogN: the table in bfloat16",
    "LogN: one position early": "LogN off by one: log(p + 2)",
    "LogN: one position late": "LogN off by one: log(p)",
    "LogN: on keys": "LogN on keys instead of queries",
    "LogN: on keys and queries": "LogN on keys and queries",
    "LogN: on values": "LogN on v instead of queries",
    "NTK off": "NTK off",
    "NTK: floor for ceil": "NTK with floor for ceil",
    "NTK: without + 1": "without + 1",
    "NTK: without - 1": "without − 1",
    "NTK: exponent 1": "NTK: exponent 1 for",
    "NTK: α divides positions": "positions divided by α",
    "NTK: α of the final length": "α of the whole length",
    "NTK: α anew at each decode step": "recomputed at every decode step, older keys as they were",
    "NTK: α of the padded length": "padding counted in NTK's α",
    "seq_length doubled": "seq_length 64 for 32, in LogN and in NTK",
    # decode steps
    "decode: newest key not seen": "in decode steps the newest key is not seen",
    "decode: key before the newest not seen": "the key before the newest is not seen",
    "decode: keys one slot too low": "steps the newest key overwrites the prompt's last.",
    "decode: keys one slot too low, empty slot seen": "the prompt's last, and an empty slot is seen",
    "decode: all keys in the prompt's last slot": "each new key overwrites the prompt's last",
    "decode: all keys in the slot after the prompt": "each new key overwrites the last decoded one",
    "decode: only the prompt's keys seen": "only the prompt's keys are seen",
    "decode: prompt forgotten": "the prompt is forgotten",
    "decode: only the newest key seen": "in decode steps only its own key is seen.",
    "decode: mask aligned at the top left": "aligned at the top left",
    "decode: positions + 1": "RoPE positions of decoded tokens one too high.",
    "decode: positions - 1": "RoPE positions of decoded tokens one too low.",
    "decode: positions all 0": "decoded tokens all 0",
    "decode: positions from 0 again": "decoded tokens begin again at 0",
    "decode: positions from 1 again": "decoded tokens begin again at 1",
    "decode: positions + an earlier prompt's 5": "decoded tokens 5 too high",
    "decode: positions + the prompt's length": "decoded tokens 32 too high",
    "decode: position of the prompt's end repeated": "stay at the prompt's last",
    "decode: position after the prompt repeated": "stay at the first one's",
    # prefill in chunks
    **{
        f"chunks of {n}: {name}": f"chunks of {n}: {text}."
        for n in slips.CHUNKS
        for name, text in {
            "all of the chunk seen": "a chunk sees all of itself",
            "all of a later chunk seen": "every chunk but the first sees all of itself",
            "cache forgotten": "the cache is forgotten between chunks",
            "mask aligned at the top left": "causal mask aligned at the top left of a chunk",
            "positions from 0 again": "positions restart in every chunk",
        }.items()
    },
    # padding
    "padding seen": "padding not masked",
    "padding counted in positions": "padding counted in positions",
    "attention_mask ignored": "attention_mask ignored",
}
# The same where a layer is part of what was done, for layer 0, 1 and 2.
LISTED = {
    "a layer and the next swapped": ("layers 0 and 1 swapped.", "layers 1 and 2 swapped."),
    "a layer left out": ("first layer dropped.", "layer 1 dropped.", "last layer dropped."),
    "a layer run twice": ("layer 0 run twice.", "layer 1 run twice.", "layer 2 run twice."),
}

QUICK = [
    ("logits one position late", None),
    ("logits / 0.7", None),
    ("top-p 0.8, -inf", None),
    ("repetition penalty 1.1", None),
    ("final norm without weight", None),
    ("embedding of id + 1", None),
    ("token 7 before, last T", None),
    ("a layer left out", 1),
    ("k of the next layer", 1),
    ("gate zero", 0),
    ("v in 4 bits, zero point one too low", None),
    ("q transposed", None),
    ("q and v swapped", None),
    ("norm per head", None),
    ("normed stream as the residual", None),
    ("softmax with one more in the denominator", None),
    ("sliding window of 8", 2),
    ("attention not projected", None),
    ("RoPE exponent 2i/D", None),
    ("interleaved RoPE", None),
    ("MLP done twice", None),
    ("mish for silu", None),
    ("LogN: on values", None),
    ("NTK: α of the final length", None),
    ("seq_length doubled", None),
    ("decode: keys one slot too low, empty slot seen", None),
    ("decode: positions + an earlier prompt's 5", None),
    ("chunks of 16: all of a later chunk seen", None),
    ("padding seen", None),
]
NAMED = [(mistake, layer) for mistake, layer in CASES if mistake in NAMES or mistake in LISTED]
LAYERS = [case for case in NAMED if case[1] is not None]
SLOW = [case for case in NAMED if (case[1] is None or case in LAYERS[::40]) and case not in QUICK]


def stages(mistake: str, layer: int | None = None) -> dict[str, torch.Tensor]:
    slip = SLIPS[mistake]
    ids, mask = slip.inputs()
    found = slips.stages(slip.path, ids, slip.prefill, mask, mistake=mistake, layer=layer)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def diagnosed(
    folder: Path, mistake: str, layer: int | None = None, logits_alone: bool = True
) -> parity.Diagnosis:
    """What the kit says of a port that has made it."""
    slip = SLIPS[mistake]
    ids, mask = slip.inputs()
    found = stages(mistake, layer)
    parity.write_bundle(
        folder / "port.safetensors",
        torch.from_numpy(ids),
        {"logits": found["logits"]} if logits_alone else found,
        dtype="float32",
        attention_mask=None if mask is None else torch.from_numpy(mask),
        prefill_length=slip.prefill,
    )
    return parity.diagnose(slip.path, folder / "port.safetensors")


@pytest.mark.parametrize("folder", ["extended_base", "ntk_logn"])
def test_without_a_mistake_it_is_what_was_published(folder: str) -> None:
    golden = read_golden(folder)
    for key in (key for key in golden if key.endswith(".logits.float32")):
        name = key.split(".")[0]
        mask = golden["batch.attention_mask"] if name == "batch" else None
        prefill = int(name.split("_")[1]) if name.startswith("decode") else None
        ids = golden[f"{name}.input_ids"]
        logits = torch.from_numpy(
            slips.run(GOLDEN / folder, ids.numpy(), prefill, None if mask is None else mask.numpy())
        )
        real = torch.ones_like(ids) if mask is None else mask
        # Either is up to 8e-7 from float64.
        assert relative_rms(logits[real.bool()], golden[key][real.bool()]) < 1.6e-6, name


def test_all_are_listed() -> None:
    assert {*NAMES, *LISTED, *INVISIBLE, *UNNAMED} == SLIPS.keys()
    assert {*QUICK} <= {*NAMED}


@pytest.mark.parametrize("mistake", SLIPS)
def test_each_shows_and_each_layer_differs(mistake: str) -> None:
    slip = SLIPS[mistake]
    ids, mask = slip.inputs()
    real = torch.ones(ids.shape).bool() if mask is None else torch.from_numpy(mask).bool()
    right = torch.from_numpy(slips.run(slip.path, ids, slip.prefill, mask))[real]
    wrong = [stages(mistake, layer)["logits"][real].nan_to_num() for layer in slip.layers]
    if mistake in INVISIBLE:
        assert all(relative_rms(logits, right) < 1.6e-6 for logits in wrong)
    else:  # at least 4 times what rounding in float32 is
        others = [right, *wrong]
        for i, logits in enumerate(wrong, 1):
            assert min(relative_rms(logits, other) for other in others[:i]) > 3.2e-6


@pytest.mark.parametrize("mistake", INVISIBLE)
def test_what_changes_nothing_is_rounding(tmp_path: Path, mistake: str) -> None:
    assert diagnosed(tmp_path, mistake).verdict == "rounding only"


@pytest.mark.parametrize(
    ("mistake", "layer"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_the_mistake_is_named(tmp_path: Path, mistake: str, layer: int | None) -> None:
    """By what the kit found, or by what it says to be the same."""
    found = diagnosed(tmp_path, mistake, layer)
    assert found.verdict == ("choice" if mistake in CHOICES else "mistake")
    name, where = NAMES.get(mistake, ""), "" if layer is None else f", in layer {layer} only"
    if layer is not None and mistake in LISTED:
        name, where = LISTED[mistake][layer], ""
    texts = [text for together in (found.found, *found.alike) for text in together]
    assert any(text.endswith(where) and name in f".{text.removesuffix(where)}." for text in texts), texts


@pytest.mark.slow
def test_noise_in_a_file_shows_in_the_stages_alone(tmp_path: Path) -> None:
    _, mistake, _ = UNNAMED
    assert diagnosed(tmp_path, mistake).verdict == "none of these"
    found = diagnosed(tmp_path, mistake, logits_alone=False)
    assert "model-00002-of-00003" in " ".join(found.notes)
