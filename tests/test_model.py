"""The model's own promises: one shot = chunks = single tokens; rows and sequences are independent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import GOLDEN, relative_rms
from golden_cases import golden, model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_ref import KVCache, Qwen, QwenConfig, load_model
from qwen_ref.commands.sizes import cache_bytes, held_bytes
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.generate import generate
from qwen_ref.model import causal_mask, logn_scale, ntk_alpha, rotary_frequencies

# Equal computations in another order. float64: some 1e-15 measured, 1e-12 allowed. The others: what a forward
# pass loses to rounding (tests/README.md), which two orders lose independently: √2 of it; 3 allowed.
# The order, and with it the last bits, is the processor's kernels'; the size of the rounding is the dtype's.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 4e-2, "float16": 4e-3}

# An int8 cache: a number that lies between two steps may go to the other one in a pass that rounds otherwise.
# 2e-15 in float64, where none does; in logits up to 3e-4 in float32, 1.1e-2 in bfloat16, 4e-3 in float16.
TOLERANCE_INT8 = {"float64": 1e-12, "float32": 6e-4, "bfloat16": 4e-2, "float16": 8e-3}

FOLDERS = ("extended_base", "ntk_logn")


def text(folder: str, length: int, rows: int = 1) -> Tensor:
    return torch.randint(model(folder, "float64").config.vocab_size, (rows, length))


def in_chunks(qwen: Qwen, ids: Tensor, sizes: Iterable[int], cache: KVCache) -> Tensor:
    with torch.inference_mode():
        return torch.cat([qwen(chunk, cache=cache) for chunk in ids.split(list(sizes), dim=1)], dim=1)


@pytest.fixture(params=[KVCache, Int8Cache])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Has all models make one kind of cache, then another; what passes in another order may differ by."""
    for folder, dtype in product(FOLDERS, TOLERANCE):
        monkeypatch.setattr(model(folder, dtype), "cache_type", request.param)
    return TOLERANCE if request.param is KVCache else TOLERANCE_INT8


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("sizes", [[70], [1] * 70, [33, 37], [1, 2, 3, 30, 34]])
def test_one_shot_chunks_and_single_tokens_agree(
    folder: str, dtype: str, sizes: list[int], tolerance: dict[str, float]
) -> None:
    qwen, ids = model(folder, dtype), text(folder, 70)
    with torch.inference_mode():
        whole = qwen(ids) if qwen.cache_type is KVCache else qwen(ids, cache=qwen.new_cache(1, 70))
    cached = in_chunks(qwen, ids, sizes, qwen.new_cache(1, 70, prompt_length=70))
    assert relative_rms(cached, whole) <= tolerance[dtype]


def test_a_chunk_that_sees_its_own_future_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen, ids = model("extended_base", "float64"), text("extended_base", 70)
    with torch.inference_mode():
        whole = qwen(ids)
    monkeypatch.setattr(
        "qwen_ref.model.causal_mask", lambda *_: None
    )  # as published: not offset by the cache
    cached = in_chunks(qwen, ids, [33, 37], qwen.new_cache(1, 70, prompt_length=70))
    assert relative_rms(cached, whole) > 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_padded_row_gives_what_it_gives_alone_also_when_decoding(
    folder: str, dtype: str, tolerance: dict[str, float]
) -> None:
    # Beyond seq_length 32 LogN depends on the position, and α on the row's own length: 40 → 3, 70 → 7, 5 → 1.
    qwen, lengths, total = model(folder, dtype), (40, 70, 5), 70
    rows = [text(folder, length)[0] for length in lengths]
    more = text(folder, 6, rows=3)
    ids = torch.stack([torch.cat((torch.zeros(total - len(row), dtype=torch.int64), row)) for row in rows])
    mask = torch.stack([(torch.arange(total) >= total - length).long() for length in lengths])
    cache = qwen.new_cache(3, total + 6)
    with torch.inference_mode():
        batch = torch.cat(
            (
                qwen(ids, attention_mask=mask, cache=cache),
                qwen(more[:, :1], cache=cache),
                qwen(more[:, 1:], cache=cache),
            ),
            dim=1,
        )
        for row, length in enumerate(lengths):
            own = qwen.new_cache(1, length + 6)
            alone = torch.cat((qwen(rows[row][None], cache=own), qwen(more[row : row + 1], cache=own)), dim=1)
            assert relative_rms(batch[row, total - length :], alone[0]) <= tolerance[dtype]


def test_every_query_sees_a_key_also_at_padding() -> None:
    # torch's kernels differ in what the softmax over no key gives: NaN would spread from there to every row.
    assert causal_mask(4, 6, torch.tensor([0, 3, 5]), torch.device("cpu")).any(dim=-1).all()


def test_without_padding_a_mask_of_ones_changes_no_bit() -> None:
    qwen, ids = model("ntk_logn", "float32"), text("ntk_logn", 40, rows=2)
    with torch.inference_mode():
        # The same calls of the same kernels: equal on every processor.
        assert torch.equal(qwen(ids), qwen(ids, attention_mask=torch.ones_like(ids)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_was_decoded_scores_the_same_in_one_prefill(
    folder: str, dtype: str, tolerance: dict[str, float]
) -> None:
    qwen, prompt = model(folder, dtype), text(folder, 35)[0].tolist()
    steps = list(generate(qwen, prompt, max_new_tokens=40, temperature=1.0, seed=7))
    ids = torch.tensor([prompt + [step.token for step in steps]])
    with torch.inference_mode():
        # The prompt alone fixed α when the steps were decoded.
        logits = qwen(ids, cache=qwen.new_cache(1, ids.shape[1], prompt_length=len(prompt)))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))[0, len(prompt) - 1 : -1].log_softmax(
        dim=-1
    )
    rescored = wide.gather(1, ids[0, len(prompt) :, None])[:, 0]
    decoded = torch.tensor([step.logprob for step in steps], dtype=torch.float64)
    # Log-probabilities of -5 to -8, from logits of size 1 to 4: the absolute error is that of the logits.
    assert (rescored.double() - decoded).abs().max() <= 10 * tolerance[dtype]


@pytest.mark.usefixtures("tolerance")
def test_interleaved_generations_with_different_alpha_do_not_disturb_each_other() -> None:
    qwen = model("ntk_logn", "float32")
    prompts = [text("ntk_logn", length)[0].tolist() for length in (20, 40, 70)]  # α = 1, 3, 7
    alone = [list(generate(qwen, prompt, max_new_tokens=12)) for prompt in prompts]
    together = list(zip(*(generate(qwen, prompt, max_new_tokens=12) for prompt in prompts), strict=True))
    # The same calls of the same kernels: equal on every processor.
    assert [list(steps) for steps in zip(*together, strict=True)] == alone


# The cache in 8 bits


def cached(kind: type[KVCache], dtype: torch.dtype, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KVCache]:
    cache = kind(1, (*k.shape[:2], 8, k.shape[3]), None, like=torch.empty(0, dtype=dtype))
    return *cache.append(0, k, v), cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_keys_and_values_are_off_by_half_a_step_of_their_own_token_and_head(dtype: torch.dtype) -> None:
    size = torch.logspace(-3, 3, 2 * 3 * 5).view(2, 3, 5, 1)  # every token and head its own
    k, v = ((torch.randn(2, 3, 5, 16) * size).to(dtype) for _ in range(2))
    v[0, 1, 2] = 0
    for found, x in zip(cached(Int8Cache, dtype, k, v), (k, v), strict=False):
        assert found.dtype == dtype
        step = x.double().abs().amax(dim=3, keepdim=True) / 127
        # The product is rounded to dtype: 127 steps by up to half an eps.
        slack = 0.5 + 127 * 0.5 * torch.finfo(dtype).eps + 1e-4
        assert ((found.double() - x.double()).abs() <= slack * step).all()
        assert len((found[0, 0, 0] / step[0, 0, 0]).round().unique()) > 10
    assert (v[0, 1, 2] == 0).all()


def test_an_int8_cache_takes_half_the_memory() -> None:
    config = QwenConfig.preset("72b")
    shape = (1, config.num_attention_heads, 100, config.kv_channels)
    plain, small = (kind(2, shape, None, like=torch.empty(0).bfloat16()) for kind in (KVCache, Int8Cache))
    assert held_bytes(plain) == 100 * cache_bytes(config, 1, torch.bfloat16) * 2 // config.num_hidden_layers
    assert held_bytes(small) / held_bytes(plain) == (128 + 4) / (2 * 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_keys_and_values_at_the_ends_of_the_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[65504.0, -65504, 1], [1e-5, 5e-6, 0], [6e-8, 0, 0]]).to(dtype)[None, None]
    found, _, _ = cached(Int8Cache, dtype, x, x)
    assert torch.isfinite(found).all()
    # Half a step of the first row, 258, and of the second; half of float16's least number, 6e-8.
    off = (found.double() - x.double()).abs().amax(dim=3)[0, 0]
    assert (off <= torch.tensor([258.0 + 32, 4e-8 + 3e-8, 1e-12], dtype=torch.float64)).all()


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_int8_cache_changes_logits_by_its_rounding_and_no_more(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen, ids = model(folder, "float64"), text(folder, 70)
    monkeypatch.setattr(qwen, "cache_type", Int8Cache)
    with torch.inference_mode():
        off = relative_rms(qwen(ids, cache=qwen.new_cache(1, 70)), qwen(ids))
    # A step is 1/127 of the largest of 32 numbers, about 1/50 of their RMS: as noise 1/50/√12 = 6e-3 in each
    # key and value. In the logits 7e-3 to 1.2e-2 over 30 texts.
    assert 5e-3 < off < 1.5e-2


# The formulas at their corners


def test_alpha_steps_where_the_prompt_passes_a_doubling_of_the_trained_length() -> None:
    lengths = [1, 8191, 8192, 8193, 16384, 16385, 32768, 32769]
    assert [ntk_alpha(length, 8192) for length in lengths] == [1, 1, 1, 3, 3, 7, 7, 15]


def test_alpha_stretches_the_slowest_wavelength_by_alpha_and_leaves_the_fastest() -> None:
    config = QwenConfig.preset("7b")
    short, long = rotary_frequencies(config, [100, 20_000], torch.float64)
    assert short[0] == long[0] == 1
    assert math.isclose(short[-1] / long[-1], ntk_alpha(20_000, 8192), rel_tol=1e-12)


def test_the_72b_has_its_extended_base_at_any_length() -> None:
    frequencies = rotary_frequencies(QwenConfig.preset("72b"), [100_000], torch.float64)[0]
    expected = torch.tensor([1e6 ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
    assert torch.allclose(frequencies, expected, rtol=1e-14, atol=0)


def test_more_dimensions_turn_less_than_once_in_32k_with_the_extended_base() -> None:
    def slow(base: float) -> int:
        config = replace(QwenConfig.preset("72b"), rotary_emb_base=base)
        return int((rotary_frequencies(config, [1], torch.float64) * 32768 < 2 * math.pi).sum())

    assert (slow(1e6), slow(1e4)) == (24, 4)  # as model.py's header says


def test_logn_begins_beyond_the_trained_length_and_in_bfloat16_steps_where_published() -> None:
    positions = torch.arange(32768)
    exact = logn_scale(positions, 8192, torch.float64)
    assert (exact[:8192] == 1).all()
    assert math.isclose(exact[8192], math.log(8193) / math.log(8192), rel_tol=1e-15)
    coarse = logn_scale(positions, 8192, torch.bfloat16)
    assert int((coarse > 1).nonzero()[0]) + 1 == 8486  # the 8,486th token


class Float64Only(TorchDispatchMode):
    """Fails where any operation gives a floating-point tensor narrower than float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                assert tensor.dtype == torch.float64, func
        return result


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_in_a_float64_model_drops_below_float64(folder: str) -> None:
    with torch.inference_mode(), Float64Only():
        qwen = model(folder, "float64")
        cache = qwen.new_cache(1, 41)
        qwen(text(folder, 40), cache=cache)
        qwen(text(folder, 1), cache=cache)
    with torch.inference_mode(), pytest.raises(AssertionError), Float64Only():
        model(folder, "float32")(text(folder, 40))


def test_the_plain_forward_pass_can_be_trained() -> None:
    qwen = Qwen(model("extended_base", "float32").config)
    loss = qwen(text("extended_base", 10)).square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in qwen.parameters())


# Bad input


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 320]]), "token id 320 is outside the vocabulary, 0 to 319"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside the vocabulary"),
        (torch.tensor([1, 2]), "int64 of shape"),
        (torch.tensor([[1.0]]), "torch.float32"),
        (torch.zeros((1, 0), dtype=torch.int64), "at least one token"),
    ],
)
def test_unusable_ids_are_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model("extended_base", "float32")(ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0], [1, 1, 1]], "padding on the left"),
        ([[1, 0, 1], [1, 1, 1]], "padding on the left"),
        ([[0, 2, 1], [1, 1, 1]], "padding on the left"),
        ([[1.0, 0.3, 1.0], [1.0, 1.0, 1.0]], "padding on the left"),
        ([[0, 0, 0], [1, 1, 1]], "at least one token"),
        ([[1, 1, 1]], "must have the shape of input_ids"),
    ],
)
def test_masks_other_than_left_padding_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model("extended_base", "float32")(text("extended_base", 3, rows=2), attention_mask=torch.tensor(mask))


@pytest.mark.usefixtures("tolerance")
def test_a_cache_refuses_what_it_has_no_place_for() -> None:
    qwen = model("extended_base", "float32")
    cache = qwen.new_cache(1, 8)
    with torch.inference_mode():
        qwen(text("extended_base", 6), cache=cache)
        with pytest.raises(ValueError, match="3 tokens do not fit behind the 6 cached: the cache holds 8"):
            qwen(text("extended_base", 3), cache=cache)
        with pytest.raises(ValueError, match="2 rows, the cache was made for 1"):
            qwen(text("extended_base", 1, rows=2), cache=cache)
        with pytest.raises(ValueError, match="padding can only come first"):
            qwen(text("extended_base", 2), cache=cache, attention_mask=torch.tensor([[0, 1]]))
        qwen(text("extended_base", 2), cache=cache, attention_mask=torch.tensor([[1, 1]]))
    assert cache.length == 8


def test_a_prompt_no_longer_than_its_padding_is_refused() -> None:
    qwen = model("ntk_logn", "float32")
    cache = qwen.new_cache(1, 8, prompt_length=2)
    with pytest.raises(ValueError, match="prompt_length=2 must be longer than every row's padding"):
        qwen(text("ntk_logn", 4), attention_mask=torch.tensor([[0, 0, 1, 1]]), cache=cache)


@pytest.mark.parametrize("cache_type", [KVCache, Int8Cache])
def test_a_cache_whose_max_length_was_raised_fails_where_its_tensors_end(cache_type: type[KVCache]) -> None:
    """One new token is a slice of size 1, which an empty slice would take without a word."""
    model = load_model(GOLDEN / "ntk_logn")
    model.cache_type = cache_type
    cache = model.new_cache(1, 4)
    model(torch.tensor([[5, 6, 7, 8]]), cache=cache)
    cache.max_length = 9
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        model(torch.tensor([[9]]), cache=cache)


@pytest.mark.usefixtures("tolerance")
@pytest.mark.parametrize(
    "sizes", [(0, 8), (1, 0), (-1, 8), (1, 8, 0), (1, 8, 9), (1, 8, 10**400), (10**400, 1), (1, 10**400)]
)
def test_a_cache_of_impossible_sizes_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be at (least 1|most (8|1099511627776))"):
        model("extended_base", "float32").new_cache(*sizes)


@pytest.mark.parametrize("sizes", [(1, 10.0), (1.5, 8), ("1", 8), (1, None), (1, 8, 4.0)], ids=str)
def test_a_cache_of_no_whole_sizes_is_refused_and_not_for_lack_of_memory(sizes: tuple) -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        model("extended_base", "float32").new_cache(*sizes)


def test_a_fault_while_a_cache_is_made_is_not_lack_of_memory() -> None:
    def broken(*_: object, **__: object) -> KVCache:
        raise RuntimeError("CUDA error: device-side assert triggered")

    qwen = load_model(GOLDEN / "extended_base", "float32")
    qwen.cache_type = broken
    with pytest.raises(RuntimeError, match="device-side assert"):
        qwen.new_cache(1, 8)


@pytest.mark.usefixtures("tolerance")
def test_a_cache_larger_than_the_machine_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"takes up to [\d,.]+ GB, more than cpu has left"):
        model("extended_base", "float32").new_cache(1, 10**12)


def test_two_models_of_one_folder_are_the_same_to_the_bit() -> None:
    ids = golden("extended_base")["prefill_100.input_ids"]
    with torch.inference_mode():  # the same calls of the same kernels: equal on every processor
        assert torch.equal(
            load_model(GOLDEN / "extended_base", "float32")(ids), model("extended_base", "float32")(ids)
        )
