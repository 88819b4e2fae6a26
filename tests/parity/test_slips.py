"""The mistakes of slips.py, whose author had not seen the kit. From float32 logits, diagnose names each."""

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
REFUSED = ["top-k 20, -inf", "top-p 0.8, -inf"]  # no bundle may have an infinity

# What the kit's text must contain.
NAMES = {
    # leaving the model
    "logits one position early": "one position",
    "logits one position late": "one position",
    "logits one position early, zeros last": "one position",
    "logits one position late, zeros first": "one position",
    "log-softmax": "log-softmax",
    "softmax": "softmax",
    "logits / 0.7": "temperature 0.7",
    "logits × 2": "logits times 2",
    "logits capped at 30": "capped at 30",
    "logits capped at 5": "capped at 5",
    "logits clamped to ±3": "clamped to ±3",
    "top-k 20, -1e9": "top-k",
    "top-p 0.8, -1e9": "top-p",
    "repetition penalty 1.1": "repetition penalty",
    "presence penalty 0.5": "presence penalty",
    "frequency penalty 0.5": "frequency penalty",
    "logits in float16": "float16",
    "logits negative": "negative",
    "logits' columns rolled by one": "columns",
    "logits minus the maximum": "maximum",
    "final norm missing": "final norm left out",
    "final norm twice": "final norm twice",
    "final norm is LayerNorm": "LayerNorm",
    "final norm without weight": "final norm without its weight",
    "head tied to the embedding": "tied",
    "head's rows shifted by one": "lm_head",
    "head in float16": "float16",
    # entering it
    "embedding of id + 1": "one row",
    "embedding of id - 1": "one row",
    "ids reversed": "reversed",
    "first token dropped, last repeated": "first token",
    **dict.fromkeys(slips.BEFORE, "token"),
    "embedding × √D": "√D",
    "embedding normalised": "embedding",
    # layers and weights
    "a layer and the next swapped": "swapped",
    "layers in reverse order": "reverse",
    "layer 0 loaded as layer 1, too": "layer 0",
    "a layer left out": "left out",
    "a layer run twice": "twice",
    "bias of the next layer": "c_attn.bias",
    "ln_1 of the next layer": "ln_1",
    "ln_2 of the next layer": "ln_2",
    **{f"{name} of the next layer": "layer" for name in slips.MATRICES},
    **{f"shard {n} with 5 % noise": f"model-0000{n}-of-00003" for n in (1, 2, 3)},
    **{f"{name} zero": "zero" for name in slips.MATRICES},
    **{f"{name} doubled": "times 2" for name in slips.MATRICES},
    **{f"{name} rows rolled by one": "rows" for name in slips.MATRICES},
    **{f"{name} in 4 bits, zero point one too high": "zero point" for name in slips.MATRICES},
    **{f"{name} in 4 bits, zero point one too low": "zero point" for name in slips.MATRICES},
    **{f"{name} transposed": "transposed" for name in ("out", "q", "k", "v")},
    "bias missing": "bias",
    "bias added twice": "bias",
    "bias on q only": "bias",
    "bias of q missing": "bias",
    "bias of k missing": "bias",
    "bias of v missing": "bias",
    "gate and up swapped": "gate and up",
    "q and k swapped": "q and k",
    "q and v swapped": "q and v",
    "k and v swapped": "k and v",
    "heads in reverse order before out": "heads",
    # norms
    "LayerNorm": "LayerNorm",
    "eps 1e-5": "layer_norm_epsilon 1e-05",
    "eps 1e-3": "layer_norm_epsilon 0.001",
    "eps outside the root": "outside",
    "sum for mean in the norm": "sum",
    "mean of absolute values in the norm": "absolute",
    "norm per head": "per head",
    "norm without weight": "weight",
    "norm with 1 + weight": "1 + weight",
    "ln_1's weight for ln_2": "ln_1",
    "norm after attention and MLP": "norm after",
    "attention's norm left out": "ln_1 left out",
    "MLP's norm left out": "ln_2 left out",
    "normed stream as the residual": "residual",
    # attention
    "no 1/√K": "√K",
    "1/K for 1/√K": "1/K",
    "1/√D for 1/√K": "√D",
    "1/√K twice": "1/K",
    "softmax over queries": "queries",
    "softmax with base 2": "base 2",
    "softmax with one more in the denominator": "denominator",
    "sigmoid for softmax": "sigmoid",
    "one future key seen": "future",
    "own key not seen": "own key",
    "not causal": "not causal",
    "sliding window of 8": "window",
    "attention not projected": "projection",
    "attention and MLP parallel": "parallel",
    "attention's residual not added": "residual",
    "attention's residual halved": "residual",
    "attention left out": "attention left out",
    "attention added twice": "attention added twice",
    # RoPE
    "positions doubled": "positions",
    "positions halved": "positions",
    "positions reversed": "positions",
    "RoPE exponent i/K": "i/K",
    "RoPE exponent 2i/D": "2i/D",
    "RoPE on half of the dimensions": "half",
    "RoPE on a quarter of the dimensions": "quarter",
    "RoPE on half of the dimensions, frequencies of all": "half",
    "RoPE on a quarter of the dimensions, frequencies of all": "quarter",
    "RoPE base 1e4": "RoPE base 10000",
    "RoPE base 5e5": "RoPE base 500000",
    "q not rotated": "queries not rotated",
    "k not rotated": "keys not rotated",
    "v rotated, too": "values rotated",
    "interleaved RoPE": "interleaved RoPE",
    "angles' sign turned": "sign",
    "cos and sin swapped": "cos",
    "RoPE on half of the heads": "heads",
    # the MLP
    "MLP's residual from before attention": "residual",
    "MLP done twice": "MLP",
    "MLP's residual not added": "residual",
    "MLP's residual halved": "residual",
    "MLP left out": "MLP left out",
    "MLP added twice": "MLP added twice",
    "GELU for silu": "GELU",
    "tanh GELU for silu": "GELU",
    "quick GELU for silu": "1.702",
    "ReLU for silu": "ReLU",
    "squared ReLU for silu": "ReLU",
    "sigmoid for silu": "sigmoid",
    "tanh for silu": "tanh",
    "mish for silu": "mish",
    "hard swish for silu": "hard swish",
    "ELU for silu": "ELU",
    "identity for silu": "identity",
    "silu twice": "silu twice",
    "silu on up, not on gate": "gate and up",  # the same as swapped
    "silu after the product": "product",
    "up not multiplied": "up",
    "silu(gate) + up": "added",
    "gate + up": "added",
    "half of the MLP's channels": "half",
    # LogN and NTK
    "no LogN": "LogN",
    "LogN: log2 over ln": "log2",
    "LogN: log10 over ln": "log10",
    "LogN: square root for log": "square root",
    "LogN: by the total length": "total length",
    "LogN: below the trained length, too": "below",
    "LogN: twice": "twice",
    "LogN: table in float16": "float16",
    "LogN: table in bfloat16": "bfloat16",
    "LogN: one position early": "LogN",
    "LogN: one position late": "LogN",
    "LogN: on keys": "keys",
    "LogN: on keys and queries": "keys",
    "LogN: on values": "values",
    "NTK off": "NTK",
    "NTK: floor for ceil": "floor",
    "NTK: without + 1": "α",
    "NTK: without - 1": "α",
    "NTK: exponent 1": "exponent",
    "NTK: α divides positions": "α",
    "NTK: α of the final length": "α",
    "NTK: α anew at each decode step": "α",
    "NTK: α of the padded length": "α",
    "seq_length doubled": "seq_length",
    # decode steps
    "decode: newest key not seen": "newest key",
    "decode: key before the newest not seen": "key before",
    "decode: keys one slot too low": "overwrite",
    "decode: keys one slot too low, empty slot seen": "overwrite",
    "decode: all keys in the prompt's last slot": "overwrite",
    "decode: all keys in the slot after the prompt": "overwrite",
    "decode: only the prompt's keys seen": "prompt's keys",
    "decode: prompt forgotten": "prompt",
    "decode: only the newest key seen": "newest key",
    "decode: mask aligned at the top left": "top left",
    "decode: positions + 1": "RoPE positions of decoded tokens one too high",
    "decode: positions - 1": "RoPE positions of decoded tokens one too low",
    "decode: positions all 0": "positions",
    "decode: positions from 0 again": "positions",
    "decode: positions from 1 again": "positions",
    "decode: positions + an earlier prompt's 5": "positions",
    "decode: positions + the prompt's length": "positions",
    "decode: position of the prompt's end repeated": "positions",
    "decode: position after the prompt repeated": "positions",
    # prefill in chunks
    **{f"chunks of {n}: all of the chunk seen": f"chunks of {n}" for n in slips.CHUNKS},
    **{f"chunks of {n}: all of a later chunk seen": f"chunks of {n}" for n in slips.CHUNKS},
    **{f"chunks of {n}: cache forgotten": f"chunks of {n}" for n in slips.CHUNKS},
    **{f"chunks of {n}: mask aligned at the top left": f"chunks of {n}" for n in slips.CHUNKS},
    **{f"chunks of {n}: positions from 0 again": f"chunks of {n}" for n in slips.CHUNKS},
    # padding
    "padding seen": "padding not masked",
    "padding counted in positions": "padding",
    "attention_mask ignored": "padding",
}


def port(mistake: str, layer: int | None = None) -> torch.Tensor:
    slip = SLIPS[mistake] if mistake in SLIPS else SLIPS["interleaved RoPE"]
    ids, mask = slip.inputs()
    logits = slips.run(slip.path, ids, slip.prefill, mask, mistake=mistake, layer=layer)
    return torch.from_numpy(np.ascontiguousarray(logits))


def bundle(path: Path, mistake: str, layer: int | None) -> Path:
    ids, mask = SLIPS[mistake].inputs()
    parity.write_bundle(
        path,
        torch.from_numpy(ids),
        {"logits": port(mistake, layer)},
        dtype="float32",
        attention_mask=None if mask is None else torch.from_numpy(mask),
        prefill_length=SLIPS[mistake].prefill,
    )
    return path


def named(tmp_path: Path, mistake: str, layer: int | None) -> str:
    """What the kit says of a mistake: what it found, and what gives the same numbers."""
    diagnosis = parity.diagnose(SLIPS[mistake].path, bundle(tmp_path / "port.safetensors", mistake, layer))
    assert diagnosis.verdict in ("mistake", "choice")
    return "; ".join(name for names in (diagnosis.found, *diagnosis.alike) for name in names)


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
    assert {*NAMES, *INVISIBLE, *REFUSED} == SLIPS.keys()


@pytest.mark.parametrize("mistake", SLIPS)
def test_each_shows_and_each_layer_differs(mistake: str) -> None:
    slip = SLIPS[mistake]
    ids, mask = slip.inputs()
    real = torch.ones(ids.shape).bool() if mask is None else torch.from_numpy(mask).bool()
    right = torch.from_numpy(slips.run(slip.path, ids, slip.prefill, mask))[real]
    wrong = [port(mistake, layer)[real] for layer in slip.layers]
    if mistake in INVISIBLE:
        assert all(relative_rms(logits, right) < 1.6e-6 for logits in wrong)
    elif mistake in REFUSED:
        assert wrong[0].isinf().any()
    else:  # at least 4 times what rounding in float32 is
        others = [right, *wrong]
        for i, logits in enumerate(wrong, 1):
            assert min(relative_rms(logits, other) for other in others[:i]) > 3.2e-6


@pytest.mark.parametrize("mistake", REFUSED)
def test_infinite_logits_are_refused(tmp_path: Path, mistake: str) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        named(tmp_path, mistake, None)


@pytest.mark.parametrize("mistake", INVISIBLE)
def test_what_changes_nothing_is_rounding(tmp_path: Path, mistake: str) -> None:
    path = bundle(tmp_path / "port.safetensors", mistake, None)
    assert parity.diagnose(SLIPS[mistake].path, path).verdict == "rounding only"


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "layer"), [case for case in CASES if case[0] in NAMES], ids=str)
def test_the_mistake_is_named(tmp_path: Path, mistake: str, layer: int | None) -> None:
    text = named(tmp_path, mistake, layer)
    assert NAMES[mistake] in text
    if layer is not None:
        assert f"layer {layer}" in text
