"""The product of parallel.py's linear layers: in the dtype, or in float32 where the CPU has none of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import WEIGHTS, relative_rms
from torch import Tensor

from qwen_ref import load_model, parallel
from qwen_ref.parallel import has_products, linear, unrounded_linear

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A CPU without products in half precision; the rows of each product that float32 gets instead."""
    rows: list[int] = []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return unrounded_linear(x, weight)

    monkeypatch.setattr(parallel, "has_products", lambda dtype: dtype.itemsize > 2)
    monkeypatch.setattr(parallel, "unrounded_linear", counted)
    return rows


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [
        ((32, 128), 96),
        ((2, 16, 100), 7),
        ((1, 200, 352), 1001),
        ((40, 3000), 1399),  # blocks of 1,398 outputs: one is left over
        ((33, 1024), 8500),  # three blocks
    ],
    ids=str,
)
def test_products_in_float32_are_rounded_once(
    in_float32: list[int], shape: tuple[int, ...], outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    """Off by half of eps, and by float32's own rounding: n products in any order, at most n · eps of float32
    of the sum of their sizes, mostly √n, here taken as 2 √n.
    """
    weight, x = torch.randn(outputs, shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    added = torch.randn(outputs).to(dtype) * 30 if bias else None
    found = linear(x, weight, added)
    assert in_float32 == [x.numel() // shape[-1]]
    assert found.dtype == dtype
    assert found.shape == (*shape[:-1], outputs)
    truth = F.linear(x.double(), weight.double(), None if added is None else added.double())
    sizes = F.linear(x.double().square(), weight.double().square()).sqrt()
    if added is not None:
        sizes += added.double().abs()
    wide = 2 * shape[-1] ** 0.5 * torch.finfo(torch.float32).eps * sizes
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    limit = torch.finfo(dtype).eps / 2 * truth.abs() + wide + subnormal
    assert ((found.double() - truth).abs() <= limit).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_bias_is_added_before_rounding(in_float32: list[int], dtype: torch.dtype) -> None:
    """1 + a quarter of eps is rounded to 1; less 1, a quarter of eps is left."""
    small = torch.finfo(dtype).eps / 4
    x, weight = torch.tensor([[1.0, small]], dtype=dtype).repeat(32, 1), torch.ones(3, 2, dtype=dtype)
    found = linear(x, weight, torch.tensor([-1.0, 0.0, 1.0], dtype=dtype))
    assert in_float32 == [32]
    assert found[0].tolist() == [small, 1.0, 2.0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (31, 96), (1, 31, 96), (3, 10, 96)], ids=str)
def test_few_rows_are_torchs_product(
    in_float32: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in (shape, (200, 96), (200,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    assert not in_float32


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_with_products_it_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "has_products", lambda _: True)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 40, 96), (200, 96), (200,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_dtypes_are_torchs(in_float32: list[int], dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 40, 96), (200, 96), (200,)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not in_float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_is_as_near_the_truth(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways round each product once. Sums in another order round to another number now and then, and the
    errors differ by chance: 1.3 is what test_parity.py gives a single case.
    """
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        truth, model = load_model(WEIGHTS, "float64")(ids), load_model(WEIGHTS, dtype)
        found = []
        for has in (True, False):
            monkeypatch.setattr(parallel, "has_products", lambda _, has=has: has)
            found.append(model(ids))
    plain, other = (relative_rms(each, truth) for each in found)
    assert other < 1.3 * plain


@pytest.mark.parametrize(
    ("capability", "avx512_bf16", "amx", "fp16", "expected"),
    [
        ("AVX512", True, True, True, (True, True)),
        ("AVX512", True, False, False, (True, False)),
        ("AVX512", False, True, False, (True, False)),
        ("AVX512", False, False, False, (False, False)),
        ("AVX2", False, False, False, (False, False)),
        ("AVX2", True, True, True, (False, False)),  # as ATEN_CPU_CAPABILITY asks for it
    ],
)
def test_which_processors_have_products(
    capability: str,
    avx512_bf16: bool,
    amx: bool,
    fp16: bool,
    expected: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked = has_products.__wrapped__
    assert (asked(torch.bfloat16), asked(torch.float16)) == expected
    assert asked(torch.float32)
    assert asked(torch.float64)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert asked(torch.bfloat16)
