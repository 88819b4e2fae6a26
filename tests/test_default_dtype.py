"""No result depends on torch.set_default_dtype, which is the caller's: the bits are those of float32.

The same kernels run twice on the same numbers, so bits may be compared on every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import packed_elsewhere
import pytest
import torch
from conftest import GOLDEN, WEIGHTS
from safetensors.torch import load_file

from qwen_ref import Qwen, load_model, parity, sampling
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.fast.attention import FastCache
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate, generate_batch, in_chunks
from qwen_ref.perplexity import scoring as perplexity
from qwen_ref.perplexity.scoring import score_continuations
from qwen_ref.quantize.rounding import dequantize_gptq, quantize_int4, quantize_int8
from qwen_ref.trace.tracing import trace

LOADED = {
    "plain": lambda packed, dtype: load_model(WEIGHTS, dtype),
    "NTK and LogN": lambda packed, dtype: load_model(GOLDEN / "ntk_logn", dtype),
    "GPTQ": lambda packed, dtype: load_model(packed, dtype),
    "kept packed": lambda packed, dtype: load_model(packed, dtype, packed=True),
    "fast": lambda packed, dtype: fasten(load_model(WEIGHTS, dtype)),
    "int8": lambda packed, dtype: fasten(load_model(WEIGHTS, dtype), "int8"),
    "int4": lambda packed, dtype: fasten(load_model(WEIGHTS, dtype), "int4", 32),
    "fast GPTQ": lambda packed, dtype: fasten(load_model(packed, dtype, packed=True)),
}
PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
# 40 ids are beyond the 32 that ntk_logn was trained on: NTK and LogN act.
IDS = torch.arange(3, 43)[None]
MASK = torch.tensor([[1] * 40, [0] * 5 + [1] * 35])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default-dtype")
    packed_elsewhere.make_packed(WEIGHTS, folder / "packed", folder / "plain", sym=False)
    return folder / "packed"


@pytest.fixture
def same() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Computes something under all four default dtypes and asserts that it is the same."""

    def check(compute: Callable[[], object]) -> None:
        want = compute()
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            found = compute()
            torch.set_default_dtype(torch.float32)
            assert_same(found, want)

    yield check
    torch.set_default_dtype(torch.float32)


def assert_same(found: object, want: object) -> None:
    assert type(found) is type(want)
    if isinstance(want, torch.Tensor):
        assert found.dtype == want.dtype
        assert torch.equal(found, want)
    elif isinstance(want, list | tuple):
        assert len(found) == len(want)
        for pair in zip(found, want, strict=True):
            assert_same(*pair)
    else:
        assert found == want


def passes(model: Qwen) -> list:
    """One shot, padded rows, a prompt in chunks and in single tokens with the cache."""
    rows = IDS.repeat(2, 1)
    found = [model(IDS), model(rows, MASK)[MASK == 1]]
    for kind in (model.cache_type, Int8Cache):
        model.cache_type = kind
        cache = model.new_cache(1, 40, prompt_length=36)
        found += [model(IDS[:, :30], cache=cache), model(IDS[:, 30:36], cache=cache)]
        found += [model(IDS[:, t : t + 1], cache=cache) for t in range(36, 40)]
        cache = model.new_cache(2, 40)
        found += [model(rows[:, :38], MASK[:, :38], cache=cache)[:, 5:], model(rows[:, 38:], cache=cache)]
        found += [states.clone() for states in in_chunks(model, IDS, model.new_cache(1, 40), chunk=16)]
    return found


def texts(model: Qwen) -> list:
    sampled = {"max_new_tokens": 6, "temperature": 1.1, "top_k": 50, "top_p": 0.9, "seed": 4}
    rows = generate_batch(model, [PROMPT, PROMPT[:4]], repetition_penalty=1.2, **sampled)
    return [
        list(generate(model, PROMPT, max_new_tokens=6)),
        list(generate(model, PROMPT, **sampled)),
        [list(row) for row in rows],
        list(generate_lookup(model, PROMPT, max_new_tokens=10)) if model.cache_type is FastCache else [],
        perplexity.score(model, [PROMPT, PROMPT[3:]]),
        score_continuations(model, PROMPT, [[4], [9, 3]]),
    ]


@pytest.mark.parametrize("name", LOADED)
def test_models_in_bfloat16(name: str, packed: Path, same: Callable) -> None:
    def compute() -> list:
        model = LOADED[name](packed, "bfloat16")
        with torch.inference_mode():
            weights = [*model.parameters(), *model.buffers()]
            return [[weight.data for weight in weights], passes(model), texts(model)]

    same(compute)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_models_in_other_dtypes(dtype: str, packed: Path, same: Callable) -> None:
    names = ["GPTQ", "NTK and LogN"] + ["int8", "int4"] * (dtype != "float64")

    def compute() -> list:
        with torch.inference_mode():
            return [passes(LOADED[name](packed, dtype)) for name in names]

    same(compute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_that_is_constructed_has_the_default_dtype_and_computes_in_it(
    dtype: torch.dtype, same: Callable
) -> None:
    loaded = load_model(GOLDEN / "ntk_logn", str(dtype).removeprefix("torch."))
    torch.set_default_dtype(dtype)  # which `same` sets back
    model = Qwen(loaded.config).requires_grad_(False)
    model.load_state_dict(loaded.state_dict())
    assert model.lm_head.weight.dtype == dtype
    assert_same(model(IDS), loaded(IDS))


def test_weights_in_few_bits(same: Callable, packed: Path) -> None:
    name = "transformer.h.1.mlp.w1"
    tensors = load_file(packed / "model.safetensors")
    parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    weight = torch.randn(8, 64)
    same(lambda: dequantize_gptq(*parts, 4))
    same(lambda: [quantize_int8(weight), quantize_int4(weight, 32, torch.bfloat16)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_probabilities(dtype: torch.dtype, same: Callable) -> None:
    logits, seen = torch.randn(3, 50).to(dtype), torch.randint(-1, 50, (3, 6))
    settings = [(0, 0, 1.0, 1.0), (1.0, 0, 1.0, 1.3), (0.7, 5, 0.8, 0.9)]
    same(lambda: [sampling.probabilities(logits, seen, *each) for each in settings])


def test_parity_and_traces(same: Callable, packed: Path, tmp_path: Path) -> None:
    def compute() -> list:
        found = []
        for folder in (GOLDEN / "ntk_logn", packed):
            out = tmp_path / "bundle.safetensors"
            parity.record(folder, IDS.repeat(2, 1), out, mask=MASK, decode=2)
            found.append(out.read_bytes())
            found += [parity.check(folder, out, dtype).to_json() for dtype in ("bfloat16", "float32")]
            found.append(repr(trace(folder, IDS[0].tolist(), top=2)))
        return found

    same(compute)
