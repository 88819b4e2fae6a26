"""Test checkpoints: random weights in the published form, small, with the float64 truth beside them.

They are for a porter who has no published weights at hand. The weights are scaled so that every stage matters
and every known mistake shows in the logits; trained weights are not needed for that.

- The residual stream begins small, at 0.01 to 0.03, so that layer_norm_epsilon counts; each branch adds as
  much again.
- q, k and v are half bias, half projection. Scores have a standard deviation of 2: no softmax is uniform.
- Norm weights lie between 0.5 and 1.5. Gates lie on both sides of 0, where silu is no straight line.
- Logits have a standard deviation of 3. Nothing comes near the largest float16.

All draws are uniform: no logarithm or cosine is computed, so a seed gives the same bytes on every processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from qwen_ref.checkpoint import DTYPES, INDEX_NAME, TensorSpec, tensor_table
from qwen_ref.commands.files import make_folder, write_whole
from qwen_ref.config import LARGEST_VOCABULARY, InputError, QwenConfig, either, read_bytes, shown, whole
from qwen_ref.parity.bundle import Bundle, stage_widths
from qwen_ref.parity.recording import Progress, record
from qwen_ref.quantize.config import GPTQConfig, check_bits
from qwen_ref.quantize.gptq import is_packed, module_of, unpackable
from qwen_ref.quantize.rounding import gptq_steps, pack_gptq
from qwen_ref.tokenizer import Tokenizer

TRUTH, PADDED = "truth.safetensors", "padded.safetensors"
VOCABULARY_ROWS = 1024  # without a vocabulary
DECODED = 8  # tokens
STORED = ("bfloat16", "float16", "float32")

_SHARDS = 2
_LARGEST = 2**32  # bytes of a folder. Models of published size are made by qwen_ref.bench --synthetic
_GROUP = 128  # inputs that share a scale in the GPTQ releases

# RMS of what a matrix is applied to, as it turns out with the scales below.
_NORMED = math.sqrt(1 + 1 / 12)  # of a norm's output: of its weights, which are uniform from 0.5 to 1.5
_MIXED = 1.15  # the mean of the values that a query sees: their bias, and what is left of the rest; × _NARROW
_PRODUCT = 1.3  # up · silu(gate); × _NARROW
_NARROW = 1 / 8  # of values and up, so that the matrices behind them have weights as large as the others
_BRANCH = 0.03  # wanted of what attention or the MLP adds to the stream
_GATE = 2.0  # wanted of the gates
_LOGITS = 3.0  # wanted of the logits

_SIZES = ("1.8b", "7b", "14b", "72b")
# Keys of the published config.json that QwenConfig does not read, before and behind those that it does.
_FIXED: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "model_type": "qwen",
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_flash_attn": "auto",
}
_LONGEST = {"72b": 32768}  # max_position_embeddings; 8192 at the other sizes


def make(
    out: str | Path,
    like: str,
    *,
    layers: int = 2,
    hidden: int = 256,
    heads: int = 2,
    intermediate: int | None = None,
    seq_length: int = 16,
    vocab: int | None = None,
    vocabulary: str | Path | None = None,
    dtype: str | None = None,
    seed: int = 0,
    gptq: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Makes a folder `out` with a small random checkpoint in the published form; returns its truth, opened.

    like: the published size whose other settings it has: "72b", "14b", "7b" or "1.8b".
    intermediate: as in config.json, twice the width of the MLP; by default in proportion.
    seq_length: the trained length. The truth has 4 · seq_length + 4 positions, the last 8 of them decoded.
    vocab: rows of the embedding. vocabulary: a qwen.tiktoken to copy; with it vocab is as published, without
    it 1,024: a port is checked by ids, and the published rows would be most of the folder.
    dtype: of the weights: "bfloat16" (the default), "float16" or "float32". gptq: 4 or 8: as a GPTQ release
    in so many bits, in float16. progress: called with the percent done, and 100.

    truth.safetensors has every stage for one row; padded.safetensors the logits of a batch with a padded row.
    Raises ValueError for sizes that do not go together, and for a folder that holds something.
    """
    if like not in _SIZES:
        raise InputError(f"no size {shown(like)}; use {either(_SIZES)}")
    rows, ids = _vocabulary_rows(like, vocab, vocabulary)
    config = _config(like, layers, hidden, heads, intermediate, seq_length, rows)
    packing = None if gptq is None else _packing(gptq, config)
    stored = _stored(dtype, packing)
    seed = whole("seed", seed, 0, 2**63 - 1)
    _check_size(config, stored)
    generator = torch.Generator("cpu").manual_seed(seed)
    with _filled(Path(out)) as folder:
        if vocabulary is not None:
            write_whole(folder / "qwen.tiktoken", read_bytes(vocabulary, LARGEST_VOCABULARY))
        end = rows - 1 if vocabulary is None else ids - 208  # <|endoftext|>, the first of 208 special tokens
        _write_json(folder / "generation_config.json", _generation_config(end))
        _write_json(folder / "config.json", _published(config, like, packing))
        _write_weights(folder, config, stored, packing, generator)
        return _record(folder, config, ids, generator, progress)


# Sizes


def _vocabulary_rows(like: str, vocab: int | None, vocabulary: str | Path | None) -> tuple[int, int]:
    """Rows of the embedding, and how many of them are tokens' ids."""
    if vocabulary is None:
        rows = VOCABULARY_ROWS if vocab is None else whole("vocab", vocab, 16, 2**20)
        return rows, rows
    ids = Tokenizer.from_file(vocabulary).n_vocab
    rows = QwenConfig.preset(like).vocab_size if vocab is None else whole("vocab", vocab, 16, 2**20)
    if rows < ids:
        raise InputError(f"vocab={rows} is less than the {ids} ids of {vocabulary}")
    return rows, ids


def _config(
    like: str, layers: int, hidden: int, heads: int, intermediate: int | None, seq_length: int, rows: int
) -> QwenConfig:
    published = QwenConfig.preset(like)
    hidden, heads = whole("hidden", hidden, 2, 2**16), whole("heads", heads, 1, 2**12)
    if hidden % heads:
        raise InputError(f"hidden={hidden} cannot be divided among heads={heads}")
    if intermediate is None:  # in proportion; the width, half of it, in whole groups of GPTQ
        groups = round(hidden * published.mlp_width / published.hidden_size / _GROUP)
        intermediate = 2 * _GROUP * max(groups, 1)
    return dataclasses.replace(
        published,
        num_hidden_layers=whole("layers", layers, 1, 1000),
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=hidden // heads,
        intermediate_size=whole("intermediate", intermediate, 2, 2**20),
        seq_length=whole("seq_length", seq_length, 8, 2048),
        vocab_size=rows,
    )


def _packing(bits: int, config: QwenConfig) -> GPTQConfig:
    check_bits(bits)
    packing = GPTQConfig(bits, _GROUP, desc_act=False, sym=True)
    if problem := unpackable(tensor_table(config), packing):
        raise InputError(problem)
    return packing


def _stored(dtype: str | None, packing: GPTQConfig | None) -> torch.dtype:
    if dtype is None:
        dtype = "bfloat16" if packing is None else "float16"
    if dtype not in STORED:
        raise InputError(f"dtype={shown(dtype)} is unknown; use {either(STORED)}")
    if packing is not None and dtype != "float16":
        raise InputError(f"dtype={dtype} does not go with gptq={packing.bits}: those releases are float16")
    return DTYPES[dtype]


def _check_size(config: QwenConfig, stored: torch.dtype) -> None:
    weights = sum(math.prod(spec.shape) for spec in tensor_table(config)) * stored.itemsize
    positions = 4 * config.seq_length - 4 + DECODED
    # Of the truth every stage, of the padded batch, which has two rows, the logits: all in float64.
    bundles = 8 * positions * (sum(stage_widths(config).values()) + 2 * config.vocab_size)
    if weights + bundles > _LARGEST:
        raise InputError(
            f"these sizes make {weights / 1e9:.1f} GB of weights and {bundles / 1e9:.1f} GB of truth, and "
            f"{_LARGEST / 1e9:.1f} GB is the most for both; use fewer layers or smaller ones, a shorter "
            "seq_length or a smaller vocab"
        )


# Files


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A folder, new or empty, to fill. An error leaves it as it was."""
    new = not os.path.lexists(folder)
    make_folder(folder)
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    try:
        yield folder
    except BaseException:
        for file in folder.iterdir():  # it was empty: all of it was made here
            file.unlink()
        if new:
            folder.rmdir()
        raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _published(config: QwenConfig, like: str, packing: GPTQConfig | None) -> dict[str, Any]:
    values = {**_FIXED, **dataclasses.asdict(config), "rotary_emb_base": int(config.rotary_emb_base)}
    values["max_position_embeddings"] = _LONGEST.get(like, 8192)
    if packing is not None:
        values["quantization_config"] = {
            **dataclasses.asdict(packing),
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        }
    return dict(sorted(values.items()))


def _generation_config(end: int) -> dict[str, Any]:
    return {
        "chat_format": "raw",
        "eos_token_id": end,
        "pad_token_id": end,
        "stop_words_ids": [[end]],
        "max_new_tokens": 512,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "transformers_version": "4.32.0",
    }


def _write_weights(
    folder: Path,
    config: QwenConfig,
    dtype: torch.dtype,
    packing: GPTQConfig | None,
    generator: torch.Generator,
) -> None:
    """Two shards: the cut goes through the middle layer, between attention and MLP, as published cuts may."""
    table = tensor_table(config)
    cut = f"transformer.h.{config.num_hidden_layers // 2}.ln_2.weight"
    middle = next(i for i, spec in enumerate(table) if spec.published == cut)
    weight_map, size = {}, 0
    for number, specs in enumerate((table[:middle], table[middle:]), start=1):
        tensors: dict[str, Tensor] = {}
        for spec in specs:
            weight = _draw(spec, config, generator)
            if packing is not None and is_packed(spec):
                tensors |= _packed(spec, weight, packing)
            else:
                tensors[spec.published] = weight.to(dtype)
        file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        write_whole(folder / file, save(tensors, metadata={"format": "pt"}))
        weight_map.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)


# Weights


def _draw(spec: TensorSpec, config: QwenConfig, generator: torch.Generator) -> Tensor:
    """A weight, float32."""
    part = ".".join(spec.name.split(".")[-3:])  # without the number of a layer: attn.qkv.weight
    x = torch.rand(spec.shape, generator=generator, dtype=torch.float32, device="cpu")
    if part.endswith("norm.weight"):
        return x + 0.5
    x = (2 * x - 1) * math.sqrt(3)  # RMS 1
    if part == "embed.weight":  # rows of different size: an epsilon counts more in some
        rows = torch.rand(spec.shape[0], 1, generator=generator, dtype=torch.float32, device="cpu")
        return x * (0.01 + 0.02 * rows)
    if part.startswith("attn.qkv"):
        x[2 * len(x) // 3 :] *= _NARROW
    if part.endswith(".bias"):
        return x
    inputs = spec.shape[1]
    from_to = {
        "attn.qkv.weight": (_NORMED, 1.0),
        "attn.out.weight": (_MIXED * _NARROW, _BRANCH),
        "mlp.gate.weight": (_NORMED, _GATE),
        "mlp.up.weight": (_NORMED, _NARROW),
        "mlp.down.weight": (_PRODUCT * _NARROW, _BRANCH),
        "lm_head.weight": (_NORMED, _LOGITS),
    }
    read, wanted = from_to[part]
    return x * (wanted / (read * math.sqrt(inputs)))


def _packed(spec: TensorSpec, weight: Tensor, packing: GPTQConfig) -> dict[str, Tensor]:
    """A weight (out, in), rounded to the nearest step, as the tensors of a GPTQ release."""
    outputs, inputs = weight.shape
    g_idx = (torch.arange(inputs, device="cpu") // packing.group_size).int()
    steps = [gptq_steps(group, packing) for group in weight.split(packing.group_size, dim=1)]
    scales, zeros = (torch.stack(each) for each in zip(*steps, strict=True))  # (groups, out) each
    g = g_idx.long()
    q = (weight.t() / scales.float()[g] + zeros[g]).round().clamp(0, 2**packing.bits - 1)
    parts = pack_gptq(q, zeros, scales, g_idx, packing.bits)
    if spec.cut != "heads":  # AutoGPTQ wrote a bias of zeros for every module that has none
        parts["bias"] = torch.zeros(outputs, dtype=torch.float16, device="cpu")
    return {f"{module_of(spec)}.{part}": tensor for part, tensor in parts.items()}


# Truth


def _record(
    folder: Path, config: QwenConfig, ids: int, generator: torch.Generator, progress: Progress | None
) -> Bundle:
    """A prompt that ends 4 tokens before 4 times the trained length, and 8 decode steps.

    So NTK's α is 7; with floor for ceil it would be 3, without NTK 1, and 15 if the last steps computed it
    again. The second bundle has a padded row, whose text begins within the trained length and ends beyond it.
    """
    s = config.seq_length
    prompt = torch.randint(ids, (2, 4 * s - 4), generator=generator, device="cpu")
    mask = torch.ones_like(prompt)
    mask[1, : 3 * s] = 0
    share = 0.0

    def told(done: int, total: int) -> None:
        if progress is not None and total:
            progress(int(share + 50 * done / total), 100)

    truth = record(folder, prompt[:1], folder / TRUTH, decode=DECODED, progress=told)
    share = 50.0
    record(folder, prompt, folder / PADDED, mask=mask, stages="logits", decode=DECODED, progress=told)
    return truth
