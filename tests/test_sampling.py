"""Probabilities are those of the published sampling chain; what is not finite is never sampled."""

from __future__ import annotations

import json
import random

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from qwen_ref.sampling import distribution, probabilities

CASES = json.loads((GOLDEN / "sampling" / "sampling.json").read_text())
TENSORS = load_file(GOLDEN / "sampling" / "sampling.safetensors")
NOTHING_BEFORE = torch.zeros((1, 0), dtype=torch.int64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
def test_golden_probabilities(case: dict) -> None:
    number, parameters = case["case"], {name: case[name] for name in case if name != "case"}
    found = probabilities(TENSORS[f"{number}.logits"], TENSORS[f"{number}.input_ids"], **parameters)
    expected = TENSORS[f"{number}.probs"]
    # Exponentials differ in the last bit from one processor to another; what is cut away does not.
    assert torch.equal(found > 0, expected > 0)
    # A softmax of 64 float32 values: a few units in the last place of 1.
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_parameters_act_in_the_published_order() -> None:
    logits = torch.tensor([[3.0, 2.9, 1.0]])
    # The penalty comes before top-k: it takes token 0 from the first place.
    penalised = probabilities(logits, torch.tensor([[0]]), top_k=1, repetition_penalty=2.0)
    assert penalised.tolist() == [[0.0, 1.0, 0.0]]
    # Temperature comes before top-p: at 10, no token alone reaches one half.
    assert (probabilities(logits, NOTHING_BEFORE, temperature=10.0, top_p=0.5) > 0).sum() == 2
    assert (probabilities(logits, NOTHING_BEFORE, temperature=0.01, top_p=0.5) > 0).sum() == 1


def test_temperature_0_puts_everything_on_the_largest_logit() -> None:
    assert probabilities(torch.tensor([[1.0, 5.0, 4.9]]), NOTHING_BEFORE, temperature=0.0).tolist() == [
        [0, 1, 0]
    ]


def test_negative_logits_are_multiplied_and_repeats_count_once() -> None:
    logits = torch.tensor([[-1.0, 2.0, 0.5]])
    found = probabilities(logits, torch.tensor([[0, 0, 1, 1, 1]]), repetition_penalty=2.0)
    assert torch.allclose(found, torch.tensor([[-2.0, 1.0, 0.5]]).softmax(dim=-1))


def test_ids_of_minus_one_stand_for_nothing() -> None:
    logits = torch.randn(2, 9)
    previous = torch.tensor([[-1, -1, 3], [4, 8, 8]])
    found = probabilities(logits, previous, repetition_penalty=1.7)
    alone = probabilities(logits[:1], torch.tensor([[3]]), repetition_penalty=1.7)
    # A row's softmax does not look at other rows, whatever the kernels.
    assert torch.equal(found[:1], alone)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in [
        (0.01, 1),
        (0.49, 1),
        (0.51, 2),
        (0.79, 2),
        (0.81, 3),
        (0.94, 3),
        (0.96, 4),
        (1.0, 4),
    ]:
        assert (probabilities(logits, NOTHING_BEFORE, top_p=top_p) > 0).sum() == kept, top_p


def sorted_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The obvious way: sort the ids with their logits, stably; add up from the least likely; put back."""
    ascending, order = (x.flip(-1) for x in logits.sort(dim=-1, descending=True, stable=True))
    cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    cut[:, -1] = False
    return logits.masked_fill(cut.scatter(1, order, cut), -torch.inf).softmax(dim=-1)


TOP_PS = (1e-12, 1e-4, 0.25, 0.5, 0.8, 0.95, 1 - 1e-6, 1 - 2**-53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0, 2.0, 0.125], ids=["distinct", "many equal", "some equal"])
def test_top_p_keeps_what_a_stable_sort_of_the_tokens_keeps(dtype: torch.dtype, step: float) -> None:
    """The same numbers are added in the same order: so the same bits, on every processor."""
    rng, generator = random.Random(step), torch.Generator().manual_seed(7)
    cases: list[tuple[int, int, float]] = [
        (rng.randint(1, 4), rng.randint(1, 300), 4 * rng.random()) for _ in range(150)
    ]
    for B, V, spread in [*cases, (2, 151936, 2.0)]:
        scales = spread * torch.rand(B, 1, generator=generator, dtype=dtype)  # rows keep different numbers
        logits = scales * torch.randn(B, V, generator=generator, dtype=dtype)
        logits = (logits / step).round() * step if step else logits
        for top_k in (0, 2, 40):
            left = logits
            if 0 < top_k < V:
                kth = logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
                left = logits.masked_fill(logits < kth, -torch.inf)
            for top_p in TOP_PS:
                expected = sorted_top_p(left, top_p)
                assert torch.equal(distribution(logits, 1.0, top_k, top_p), expected), (B, V, top_k, top_p)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(1, 5)
    # The same softmax of the same numbers: equal on every processor. So below.
    assert torch.equal(probabilities(logits, NOTHING_BEFORE, top_k=99), logits.softmax(dim=-1))


def test_of_equal_logits_a_limit_to_one_token_keeps_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"top_k": 3, "top_p": 1e-6}, {"temperature": 0.0}):
        assert probabilities(logits, NOTHING_BEFORE, **one).tolist() == [[0, 1, 0, 0]]
    assert probabilities(logits, NOTHING_BEFORE, top_p=0.5)[0].tolist() == [0, 0.5, 0.5, 0]


def test_a_top_k_beyond_1_keeps_what_equals_the_kth_as_published() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    assert probabilities(logits, NOTHING_BEFORE, top_k=2)[0].tolist() == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sampling_works_in_float32_and_in_float64_for_float64(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 50)
    narrow = probabilities(logits.to(dtype), NOTHING_BEFORE)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, logits.to(dtype).float().softmax(dim=-1))
    assert probabilities(logits.double(), NOTHING_BEFORE).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named_and_never_sampled(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0]], dtype=torch.float16)
    count = "1 NaN and 0 infinite" if bad != bad else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=f"{count} among 3 logits .torch.float16.: nothing was sampled"):
        probabilities(logits, NOTHING_BEFORE, temperature=temperature)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e-46, "temperature": 0.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 10**400},
        {"temperature": 10**400},
        {"temperature": 10**4000},
        {"top_p": 10**400},
        {"top_k": 1.0},
        {"repetition_penalty": float("inf")},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused_by_name(parameters: dict) -> None:
    name = next(iter(parameters))
    with pytest.raises(ValueError, match=f"{name}="):
        probabilities(torch.zeros(1, 3), NOTHING_BEFORE, **parameters)


@pytest.mark.parametrize(
    ("logits", "parameters"),
    [
        (1e38, {"repetition_penalty": 1e-5}),
        (1e38, {"repetition_penalty": 1e-5, "temperature": 0.0}),
        (-1e30, {"repetition_penalty": 1e10, "temperature": 0.0}),
        (-1e30, {"repetition_penalty": 1e10}),
        (3e38, {"temperature": 0.5}),
        (4e33, {"temperature": 1e-5}),
    ],
    ids=str,
)
def test_parameters_that_make_logits_overflow_are_refused(logits: float, parameters: dict) -> None:
    with pytest.raises(ValueError, match="logits overflow with repetition_penalty="):
        probabilities(torch.full((1, 3), logits), torch.tensor([[1]]), **parameters)


@pytest.mark.parametrize(
    ("logits", "ids"), [((3,), (1, 0)), ((1, 2, 3), (1, 0)), ((2, 3), (1, 4)), ((1, 3), (4,))]
)
def test_shapes_that_do_not_belong_together_are_refused(logits: tuple, ids: tuple) -> None:
    with pytest.raises(ValueError, match=r"logits must be \(B, V\) and previous_ids \(B, N\), not"):
        probabilities(torch.zeros(logits), torch.zeros(ids, dtype=torch.int64))


@pytest.mark.parametrize("ids", [[[3]], [[-2]], [[0.0]]])
def test_previous_ids_that_no_token_has_are_refused(ids: list) -> None:
    with pytest.raises(ValueError, match="previous_ids must be int64 ids from 0 to 2, or -1"):
        probabilities(torch.zeros(1, 3), torch.tensor(ids))
