"""Weights in 8 and 4 bits: every one within half a step, and what cannot be rounded is refused."""

from __future__ import annotations

import pytest
import torch

from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.quantize.config import INT4_GROUPS
from qwen_ref.quantize.rounding import dequantize_int4, quantize_int4, quantize_int8


def weight(outputs: int = 48, inputs: int = 256) -> torch.Tensor:
    """Rows of very different size, one of them zero."""
    rows = torch.randn(outputs, inputs) * torch.logspace(-6, 3, outputs)[:, None]
    rows[5] = 0
    return rows


def test_int8_is_off_by_half_a_step_at_most() -> None:
    w = weight()
    q, scale = quantize_int8(w)
    assert q.dtype == torch.int8
    # Quotients and rounding are IEEE's, element by element: equal on every processor.
    assert torch.equal(q.abs().amax(dim=1), torch.where(w.abs().amax(dim=1) > 0, 127, 0).to(torch.int8))
    # 1e-5: scale and quotient are float32.
    assert ((q * scale - w).abs() <= 0.5 * scale * (1 + 1e-5) + 1e-30).all()


def test_so_does_a_head_in_an_int8_cache() -> None:
    """190 / 127 of the smallest float32 rounds to 1 of them: 190 steps, of which int8 has 127."""
    x = torch.tensor([190.0, -190.0, 1.0, 0.0]).view(1, 1, 1, 4) * 2.0**-149
    cache = Int8Cache(1, (1, 1, 2, 4), None, like=x)
    keys, _ = cache.append(0, x, x)
    assert torch.equal(cache.keys[0][0, 0, 0], torch.tensor([127, -127, 1, 0], dtype=torch.int8))
    assert torch.equal(keys.sign(), x.sign())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_in_an_int8_cache(value: float) -> None:
    x = torch.tensor([1.0, value, -2.0, 0.0]).view(1, 1, 1, 4)
    keys, _ = Int8Cache(1, (1, 1, 2, 4), None, like=x).append(0, x, x)
    assert not keys.isfinite().any()


@pytest.mark.parametrize("group_size", INT4_GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int4_is_off_by_half_a_step_at_most(group_size: int, dtype: torch.dtype) -> None:
    w = weight(inputs=512).clamp(-1000, 1000)
    if dtype == torch.float16:
        w = w[30:]  # float16 has no scales for the smallest rows
    q, scale, zero = quantize_int4(w, group_size, dtype)
    assert q.max() <= 15
    assert scale.dtype == zero.dtype == dtype
    off = (dequantize_int4(q, scale.float(), zero.float()) - w).abs().unflatten(1, (-1, group_size))
    # Half a step; and since scale and zero are rounded to dtype, the 16 steps may begin or end inside the
    # group, by as much as zero (up to 8 steps and the group's offset) and 8 scales are rounded by.
    rounding = torch.finfo(dtype).eps * (zero.float().abs() + 8 * scale.float())
    assert (off <= (0.5 * scale.float() * (1 + 1e-5) + rounding + 1e-30)[..., None]).all()


def test_a_row_so_small_that_its_scale_is_subnormal_keeps_its_signs() -> None:
    q, _ = quantize_int8(torch.tensor([[190.0, -190.0, 1.0]]) * 2.0**-149)
    assert q[0, 0] == 127
    assert q[0, 1] == -127


def test_int4_uses_all_steps_and_keeps_a_group_of_equal_weights() -> None:
    q, scale, zero = quantize_int4(torch.stack((torch.arange(32.0), torch.full((32,), 7.0))), 32)
    assert q[0].unique().tolist() == list(range(16))
    assert torch.equal(dequantize_int4(q, scale, zero)[1], torch.full((32,), 7.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    w = weight()
    w[3, 4] = value
    for quantize in (quantize_int8, lambda w: quantize_int4(w, 32)):
        with pytest.raises(ValueError, match=r"NaN or infinite.*check the checkpoint"):
            quantize(w)


def test_weights_that_have_no_finite_scale_are_refused() -> None:
    """Their sum or difference is infinite though they are not."""
    far = torch.tensor([[3e38, -3e38] * 16])
    with pytest.raises(ValueError, match=r"from -3e\+38 to 3e\+38 are too far apart for scales in .*float32"):
        quantize_int4(far, 32)
    with pytest.raises(ValueError, match="too far apart for scales in torch"):
        quantize_int4(far * 1e-32, 32, torch.float16)
    q, scale = quantize_int8(far)
    assert torch.allclose(q * scale, far)
    for quantize in (quantize_int8, lambda w: quantize_int4(w, 32)):
        with pytest.raises(ValueError, match="infinite"):
            quantize(far.double() * 10)


@pytest.mark.parametrize(
    ("inputs", "group_size", "remedy"),
    [(96, 64, "use 32"), (256, 48, "use 32, 64, 128 or 256"), (100, 32, "no size does; use int8")],
)
def test_a_group_that_does_not_divide_is_refused(inputs: int, group_size: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"groups of {group_size} .* {inputs} inputs: .*{remedy}"):
        quantize_int4(torch.ones(4, inputs), group_size)
