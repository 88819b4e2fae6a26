"""Forms of a weight and the choice among them: bits, errors, what is tried, memory in large pages."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WEIGHTS
from torch import Tensor, nn

from qwen_ref import load_model
from qwen_ref.bench.measure import resident_memory
from qwen_ref.commands.sizes import resident_bytes
from qwen_ref.fast import kernels
from qwen_ref.fast.kernels import Choice, forms
from qwen_ref.fast.layers import FastLinear, FastNorm, fasten, kernels_in_words, kernels_of
from qwen_ref.fast.matrices import (
    FEW_ROWS,
    DynamicInt8,
    Int4Matrix,
    Int8Table,
    Matrix,
    Rows,
    Table,
    block_width,
    large_pages,
)
from qwen_ref.model import RMSNorm
from qwen_ref.parallel import ONE_RANK, Group
from qwen_ref.quantize.rounding import FewBits, dequantize_int4, rounded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shuffled(few_bits: FewBits) -> FewBits:
    """The weight of a GPTQ checkpoint whose inputs were grouped in another order."""
    return few_bits._replace(order=torch.randperm(few_bits.shape[1]))


FORMS: dict[str, Callable[[Tensor, bool], Matrix]] = {
    "table": Table,
    "rows": Rows,
    "int8": lambda weight, wide: Int8Table(rounded(weight, "int8", 0), weight.dtype, wide),
    "groups": lambda weight, wide: Int8Table(rounded(weight, "int4", 32), weight.dtype, wide),
    "order": lambda weight, wide: Int8Table(shuffled(rounded(weight, "int4", 32)), weight.dtype, wide),
    "dynamic": lambda weight, wide: DynamicInt8(rounded(weight, "int8", 0), weight.dtype, wide),
    "int4": lambda weight, _: Int4Matrix(rounded(weight, "int4", 32, torch.bfloat16)),
    "int4 order": lambda weight, _: Int4Matrix(shuffled(rounded(weight, "int4", 32, torch.bfloat16))),
}
CASES = [
    (name, dtype, wide)
    for name in FORMS
    for dtype in DTYPES
    for wide in (False, True)
    if not name.startswith("int4") or (dtype == torch.bfloat16 and not wide)
]


# The bits of a row


@pytest.mark.parametrize(("name", "dtype", "wide"), CASES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_the_others(name: str, dtype: torch.dtype, wide: bool) -> None:
    """Of up to nine rows: lookup.py promises the tokens of the plain loop.

    The weights fill several blocks of a table, several stretches of rows, and a part of the last.
    """
    weight = torch.randn(*((2100, 1024) if name == "rows" else (1001, 352))).to(dtype)
    matrix = FORMS[name](weight, wide)
    x = torch.randn(FEW_ROWS, weight.shape[1]).to(dtype)
    x[1] *= 100  # a scale of its own
    single = torch.cat([matrix(row) for row in x.split(1)])
    assert single.dtype == (torch.float32 if wide else single.dtype)
    for rows in range(1, FEW_ROWS + 1):
        assert torch.equal(matrix(x[None, :rows])[0], single[:rows]), rows


# 8-bit weights and x as two integers


def meant(few_bits: FewBits) -> Tensor:
    """The weight that q, scale and offset stand for, in float64."""
    q, scale, offset = few_bits.rows(slice(0, few_bits.shape[0]))
    groups = q.double().unflatten(1, (scale.shape[1], -1)) - (1 << (few_bits.bits - 1))
    return (groups * scale.double()[..., None] + offset.double()[..., None]).flatten(1)


def rounding_of_x(x: Tensor, weight: Tensor) -> Tensor:
    """The most that a product may be off: each x by half a step, its row's largest / 7,938 / 2.

    Added to that: x / s, up to 63, is computed in float32, off by 2 · eps · 63, 0.4% of half a step. The sums
    are exact, but what they give is rounded to float32 four times, eps / 2 · Σ |w x| each: 0.4% again.
    """
    largest = x.double().abs().amax(1, keepdim=True)
    return 1.01 / 2 / 7938 * largest * weight.abs().sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "rows"), [(96, 352, 1), (1001, 1024, 5), (33, 41, 100)])
def test_x_in_two_integers_is_off_by_half_a_step(
    dtype: torch.dtype, outputs: int, inputs: int, rows: int
) -> None:
    few_bits, x = rounded(torch.randn(outputs, inputs), "int8", 0), torch.randn(rows, inputs).to(dtype)
    found, weight = DynamicInt8(few_bits, dtype, False)(x), meant(few_bits)
    off = (found - x.double() @ weight.T).abs()
    assert (off <= rounding_of_x(x, weight)).all()
    # Errors of many x that are as likely anywhere within a step: its length / √12, added as squares are.
    step = x.double().abs().amax(1, keepdim=True) / 7938
    expected = (step * weight.square().sum(1).sqrt() / 12**0.5).square().mean().sqrt()
    assert off.square().mean().sqrt() < 1.2 * expected + 1e-6 * found.double().square().mean().sqrt()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_have_room(sign: int) -> None:
    """Every x and every weight as large as they get: without AVX-512 pairs are added up in 16 bits."""
    weight = torch.cat((torch.ones(1, 1024), -torch.ones(1, 1024), torch.ones(1, 1024)))
    weight[2, ::2] = -1
    matrix = DynamicInt8(rounded(weight, "int8", 0), torch.float32, False)
    found = matrix(torch.full((2, 1024), 3.0 * sign))
    assert torch.allclose(found, sign * torch.tensor([3072.0, -3072.0, 0.0]), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_no_use_leave_the_others_alone(dtype: torch.dtype) -> None:
    few_bits = rounded(torch.randn(200, 352), "int8", 0)
    matrix, x = DynamicInt8(few_bits, dtype, False), torch.randn(8, 352).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    x[1], x[2, 7], x[3, 7], x[4, 7], x[5] = 0, torch.nan, torch.inf, -torch.inf, x[5].sign() * tiny
    x[6, 7] = torch.finfo(dtype).max / 1000  # beside it the others are nothing
    found = matrix(x)
    for row in (0, 6, 7):
        assert torch.equal(found[row], matrix(x[row : row + 1])[0]), row
    assert (found[1] == 0).all()
    assert not found[2:5].isfinite().any()
    weight = meant(few_bits)
    most = rounding_of_x(x, weight)
    most[5] += 1e-36 * weight.abs().sum(1)  # so small a row has no scale in float32
    good = [0, 1, 5, 6, 7]
    assert ((found - x.double() @ weight.T).abs() <= most)[good].all()


def test_a_scale_of_its_own_for_each_row() -> None:
    few_bits, x = rounded(torch.randn(200, 352), "int8", 0), torch.randn(1, 352)
    matrix = DynamicInt8(few_bits, torch.float32, False)
    assert torch.equal(
        matrix(torch.cat((x, x * 2**20, x / 2**20))), matrix(x) * 2.0 ** torch.tensor([[0], [20], [-20]])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int4_in_bytes_is_rounded_again(dtype: torch.dtype) -> None:
    """What int4 gives is off by half a step of its output's largest / 127."""
    few_bits = rounded(torch.randn(200, 352), "int4", 32, dtype)
    values = dequantize_int4(*(part.double() for part in few_bits.rows(slice(0, 200))))
    matrix = forms(few_bits, dtype, False, exact=False)["dynamic"](200)
    assert isinstance(matrix, DynamicInt8)
    x = torch.randn(3, 352).to(dtype)
    half = values.abs().amax(1) / 127 / 2 * 1.0001  # scales and values are float32
    again = (values.abs() + half[:, None]).float()
    found, truth = matrix(x), x.double() @ values.T
    assert (
        (found - truth).abs() <= half * x.double().abs().sum(1, keepdim=True) + rounding_of_x(x, again)
    ).all()
    expected = (2 / 12**0.5 * half * x.double().square().sum(1, keepdim=True).sqrt()).square().mean().sqrt()
    assert (found - truth).square().mean().sqrt() < 1.2 * expected


def test_what_torch_packed_is_counted() -> None:
    model = fasten(load_model(WEIGHTS, "bfloat16"), "int8", kernel="dynamic")
    tensors = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    layers = [layer for layer in model.modules() if isinstance(layer, FastLinear)]
    bytes_ = sum(layer.matrix.packed_bytes for layer in layers)
    assert bytes_ >= sum(layer.matrix.outputs * (layer.matrix.inputs + 8) for layer in layers)
    assert len(layers) == 4 * 5 + 1
    assert resident_bytes(model) == tensors + bytes_
    # What is not packed are the embedding, norms and biases.
    assert tensors == 2 * (2752 * 128 + 9 * 128 + 4 * 384)


@pytest.mark.skipif(resident_memory() is None, reason="only Linux tells how much memory is used")
def test_the_memory_is_what_is_counted() -> None:
    """Of 34 MB in bytes, which malloc gives back when it is freed. The rest is 10% for torch's own padding,
    where it has others than the 512 that are counted: 9% measured.
    """

    def zeros(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        rows = part.stop - part.start
        return torch.full((rows, 1024), 128, dtype=torch.uint8), torch.ones(rows, 1), torch.zeros(rows, 1)

    def used() -> int:
        found = resident_memory()
        assert found is not None
        return found.anonymous

    DynamicInt8(FewBits((64, 1024), 8, 1024, zeros), torch.float32, False)
    before = used()
    matrix = DynamicInt8(FewBits((32_768, 1024), 8, 1024, zeros), torch.float32, False)
    assert 0.99 < (used() - before) / matrix.packed_bytes < 1.1


# What there is to choose among


def weight_of(kind: str) -> Tensor | FewBits:
    weight = torch.randn(64, 256)
    one_group = rounded(weight, "int8", 0)
    return {
        "plain": weight,
        "int8": one_group,
        "int4": rounded(weight, "int4", 64),
        "8 bits, groups": one_group._replace(group_size=64),
        "odd groups": rounded(weight, "int4", 64)._replace(group_size=16),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "dtype", "wide", "exact", "expected"),
    [
        *(("plain", dtype, wide, True, "bag linear") for dtype in DTYPES for wide in (False, True)),
        *(("int8", dtype, wide, False, "bag dynamic") for dtype in DTYPES for wide in (False, True)),
        ("int4", torch.bfloat16, False, False, "int4 bag dynamic"),
        ("int4", torch.bfloat16, True, False, "bag dynamic"),
        ("int4", torch.float16, False, False, "bag dynamic"),
        ("int4", torch.float32, False, False, "bag dynamic"),
        # GPTQ's weights keep their bits, and zero points, which torch's dynamic product does not have here.
        ("int4", torch.bfloat16, False, True, "int4 bag"),
        ("int4", torch.float32, False, True, "bag"),
        ("odd groups", torch.bfloat16, False, True, "bag"),
        ("int8", torch.bfloat16, False, True, "bag"),
        ("8 bits, groups", torch.bfloat16, False, True, "bag"),
    ],
    ids=str,
)
def test_what_there_is_to_choose_among(
    kind: str, dtype: torch.dtype, wide: bool, exact: bool, expected: str
) -> None:
    assert list(forms(weight_of(kind), dtype, wide, exact)) == expected.split()


def test_only_what_torch_has_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_dynamic", lambda: False)
    monkeypatch.setattr(kernels, "int4_layout", lambda: None)
    assert list(forms(weight_of("int4"), torch.bfloat16, False, exact=False)) == ["bag"]


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_a_form_of_the_first_outputs(kind: str) -> None:
    """What is tried is a part of the weight, and gives the first of the results."""
    weight, x = weight_of(kind), torch.randn(1, 256).bfloat16()
    weight = weight.bfloat16() if isinstance(weight, Tensor) else weight
    for name, form in forms(weight, torch.bfloat16, False, exact=False).items():
        part, whole = form(40)(x), form(64)(x)
        assert part.shape == (1, 40)
        assert torch.allclose(part.float(), whole[:, :40].float(), rtol=0.01, atol=0.01), name


# The choice

LARGE = (2048, 1024)  # so large that it is measured


def nothing(*_: object) -> str:
    raise AssertionError("measured")


def test_what_was_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_fastest", nothing)
    found = dict.fromkeys(("int4", "bag", "dynamic"), nothing)
    for asked in found:
        assert Choice(asked, ONE_RANK).among(found, *LARGE, torch.bfloat16, False) == asked
    assert Choice("linear", ONE_RANK).among(found, *LARGE, torch.bfloat16, False) == "int4"
    assert Choice(None, ONE_RANK).among({"bag": nothing}, *LARGE, torch.bfloat16, False) == "bag"
    assert Choice(None, ONE_RANK).among(found, 1023, 1024, torch.bfloat16, False) == "int4"


def test_each_kind_of_matrix_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def fastest(found: kernels.Forms, outputs: int, inputs: int, dtype: torch.dtype) -> str:
        asked.append((outputs, inputs, dtype))
        return "dynamic"

    monkeypatch.setattr(kernels, "_fastest", fastest)
    choice, found = Choice(None, ONE_RANK), dict.fromkeys(("bag", "dynamic"), nothing)
    for _ in range(3):
        assert choice.among(found, *LARGE, torch.bfloat16, False) == "dynamic"
    assert asked == [(2048, 1024, torch.bfloat16)]
    choice.among(found, *LARGE, torch.bfloat16, True)
    choice.among(found, *LARGE, torch.float32, False)
    choice.among(dict.fromkeys(("int4", "bag", "dynamic"), nothing), *LARGE, torch.bfloat16, False)
    choice.among(found, 151_936, 2048, torch.bfloat16, False)
    assert len(asked) == 5
    assert asked[-1] == (2048, 2048, torch.bfloat16)  # 2^22 weights are tried


class Timed(nn.Module):
    """A matrix whose products take so many seconds of a clock that nothing else moves."""

    def __init__(self, clock: list[float], few: float, many: float) -> None:
        super().__init__()
        self.clock, self.few, self.many = clock, few, many

    def forward(self, x: Tensor) -> None:
        self.clock[0] += self.few if len(x) == 1 else self.many


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"bag": (1.0, 9.0), "linear": (0.9, 9.0)}, "linear"),
        ({"bag": (0.9, 9.0), "linear": (1.0, 9.0)}, "bag"),
        ({"bag": (1.0, 1.0), "linear": (0.97, 1.0)}, "bag"),  # noise must not choose
        ({"bag": (1.0, 60.0), "linear": (1.1, 10.0)}, "linear"),  # 128 + 120, 141 + 20: a prompt counts
        ({"bag": (1.0, 10.0), "linear": (0.9, 60.0)}, "bag"),
        ({"int4": (1.0, 1.0), "bag": (0.8, 1.0), "dynamic": (0.7, 1.0)}, "dynamic"),
    ],
    ids=str,
)
def test_the_fastest_is_that_of_a_prompt_and_its_answer(
    times: dict, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(kernels, "_buffer", lambda: torch.ones(16))
    found: Any = {name: lambda _, each=each: Timed(clock, *each) for name, each in times.items()}
    assert kernels._fastest(found, 4, 8, torch.float32) == expected


def test_what_is_measured_is_one_of_them() -> None:
    for kind in ("plain", "int8", "int4"):
        weight = weight_of(kind)
        found = forms(
            weight.bfloat16() if isinstance(weight, Tensor) else weight, torch.bfloat16, False, False
        )
        assert kernels._fastest(found, 64, 256, torch.bfloat16) in found


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_what_rank_0_has_chosen(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group, said = Group(rank, 2), []
    monkeypatch.setattr(group, "any", lambda flag: flag)
    monkeypatch.setattr(group, "together", contextlib.nullcontext)

    def texts(text: str) -> list[str]:
        said.append(text)
        return ["bag dynamic", "bag dynamic"] if "bag" in text else ["dynamic", ""]

    monkeypatch.setattr(group, "texts", texts)
    monkeypatch.setattr(kernels, "_fastest", nothing if rank else lambda *_: "dynamic")
    choice, found = Choice(None, group), dict.fromkeys(("bag", "dynamic"), nothing)
    for _ in range(2):
        assert choice.among(found, *LARGE, torch.bfloat16, False) == "dynamic"
    assert said == ["bag dynamic", "" if rank else "dynamic", "bag dynamic"]  # measured once


@pytest.mark.parametrize(("left", "expected"), [(2**21, "bag"), (2**21 - 1, "int4")])
def test_weights_stay_in_4_bits_where_memory_is_short(
    left: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte for each of 2^20 weights may take half of what is left."""
    monkeypatch.setattr(kernels, "memory_left", lambda: left)
    monkeypatch.setattr(kernels, "_fastest", lambda *_: "bag")
    choice, found = Choice(None, ONE_RANK, 2**20), dict.fromkeys(("int4", "bag"), nothing)
    assert choice.among(found, *LARGE, torch.bfloat16, False) == expected
    assert Choice("bag", ONE_RANK, 2**20).among(found, *LARGE, torch.bfloat16, False) == "bag"


GROUPS = {  # /proc/self/cgroup, and the files of a group with a limit of 1,000 bytes
    "version 2": ("0::/a/b\n", "a", "memory.max", "memory.current", ""),
    "version 2, a container": ("0::/\n", "", "memory.max", "memory.current", ""),
    "version 1": (
        "3:cpu:/a\n4:memory:/a/b\n",
        "memory/a/b",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}


@pytest.mark.parametrize("version", GROUPS)
def test_memory_that_is_left_ends_at_a_containers_limit(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, group, limit, used, before = GROUPS[version]
    files = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\n", "proc/self/cgroup": own}
    folder = f"sys/fs/cgroup/{group}"
    files |= {f"{folder}/{limit}": "1000\n", f"{folder}/{used}": "700\n"}
    files |= {f"{folder}/memory.stat": f"anon 600\n{before}active_file 40\n{before}inactive_file 2\n"}
    files |= {"sys/fs/cgroup/a/b/memory.max": "max\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(kernels, "Path", lambda path: Path(f"{tmp_path}{path}"))
    assert kernels.memory_left() == 1000 - 700 + 42
    (tmp_path / folder / limit).unlink()
    assert kernels.memory_left() == 5 * 1024


def test_memory_that_cannot_be_had_ends_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise MemoryError

    monkeypatch.setattr(kernels, "_fastest", fails)
    found = dict.fromkeys(("bag", "linear"), nothing)
    assert Choice(None, ONE_RANK).among(found, *LARGE, torch.bfloat16, False) == "bag"


def test_a_choice_changes_no_random_numbers() -> None:
    layer = torch.randn(1024, 1024)
    torch.manual_seed(5)
    Choice(None, ONE_RANK).among(kernels.forms(layer, torch.float32, False), 1024, 1024, torch.float32, False)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_layers_are_named_by_their_kernels() -> None:
    model = fasten(load_model(WEIGHTS, "bfloat16"), "int4", kernel="int4")
    assert kernels_in_words(model) == "int4 for qkv, out, gate, up, down; bag for lm_head"
    assert kernels_of(model)["blocks.3.mlp.down"] == "int4"
    assert kernels_of(load_model(WEIGHTS)) == {}


# The norm


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (1, 9, 352), (2, 70, 1000), (3, 2048)], ids=str)
def test_the_norm_has_the_bits_of_the_plain_one(shape: tuple, dtype: torch.dtype) -> None:
    norm = RMSNorm(shape[-1], 1e-6).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(shape[-1]))
    fast = FastNorm(norm)
    x = torch.randn(*shape) * torch.logspace(-4, 2, shape[-2])[:, None]
    x[..., 3] *= 50
    for each in (x.to(dtype), torch.zeros(shape, dtype=dtype), x.to(dtype).transpose(-1, -2).contiguous().mT):
        assert fast(each).dtype == dtype
        assert torch.equal(fast(each), norm(each))


# The width of a block


@pytest.mark.parametrize(("capability", "most"), [("AVX512", 352), ("AVX2", 96), ("DEFAULT", 96)])
def test_a_row_of_a_block_fits_into_registers(
    capability: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for threads in (1, 2, 3, 16, 128):
        for outputs in (1, 8, 96, 97, 2048, 5504, 6144, 151_936):
            width = block_width(outputs, threads)
            assert width % 8 == 0
            assert 8 <= width <= most
            if outputs >= most * threads:  # threads have as many blocks, all but what rounding to 8 takes
                assert width > most / 2
    weight, x = torch.randn(1001, 64), torch.randn(1, 64)
    assert torch.allclose(Table(weight, wide=False)(x), x @ weight.T, atol=1e-4)


# Large pages

MEGABYTE = 2**20


@pytest.fixture
def no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr(mmap, "mmap", fail)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("megabytes", [1, 2, 5])
def test_large_pages_are_zeros(dtype: torch.dtype, megabytes: int) -> None:
    shape = (megabytes, 4, MEGABYTE // 4 // dtype.itemsize)
    with torch.device("meta"):  # a default of the caller's
        found = large_pages(shape, dtype)
    assert (found.shape, found.dtype, found.device.type) == (shape, dtype, "cpu")
    assert found.is_contiguous()
    assert not found.any()
    found[:, 1:3] = 1
    assert int(found.sum(dtype=torch.int64)) == found.numel() // 2


def test_little_memory_is_an_ordinary_tensor(no_mapping: None) -> None:
    assert not large_pages((MEGABYTE - 1,), torch.bfloat16).any()


def test_without_large_pages_memory_is_ordinary(no_mapping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not large_pages((3 * MEGABYTE,), torch.bfloat16).any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has large pages")
@pytest.mark.parametrize("what", ["mmap", "madvise"])
def test_where_large_pages_fail_memory_is_ordinary(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Failing(mmap.mmap):
        def __new__(cls, *arguments: Any) -> Failing:
            asked.append(what)
            if what == "mmap":
                raise OSError(12, "Cannot allocate memory")
            return super().__new__(cls, *arguments)

        def madvise(self, *_: object) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Failing)
    found = large_pages((3, MEGABYTE), torch.float32)
    assert asked == [what]
    assert found.shape == (3, MEGABYTE)
    assert not found.any()


@pytest.mark.skipif(resident_memory() is None, reason="only Linux tells how much memory is used")
def test_large_pages_are_given_back() -> None:
    def used() -> int:
        found = resident_memory()
        assert found is not None
        return found.anonymous

    before = used()
    memory = large_pages((64, MEGABYTE), torch.uint8).fill_(1)
    part = memory[40:]
    assert used() - before > 60 * MEGABYTE
    del memory
    assert int(part.sum(dtype=torch.int64)) == 24 * MEGABYTE  # a view keeps it
    del part
    assert used() - before < 4 * MEGABYTE
