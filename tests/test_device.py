"""On a second device: torch's `meta` stands in for an accelerator, and every operation is watched.

meta tensors have a shape and no numbers. So this shows where tensors are and what is waited for, not what is
computed: device_check.py does that, where there is a GPU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qwen_ref import Qwen, QwenConfig, load_model, parity
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.fast import matrices as fast
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate_batch, generate_uncached
from qwen_ref.perplexity.scoring import score

COPIES = ("aten::to", "aten::_to_copy", "aten::copy_")  # these may go from one device to another
ITEMS = ("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense")  # these wait for the device
CPU = torch.device("cpu")
FOLDERS = ("extended_base", "ntk_logn")


class Watch(TorchDispatchMode):
    """Notes each operation that mixes devices or makes float64, and counts what comes to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.float64: list[str] = []
        self.to_host = 0
        self.largest = 0  # bytes of the largest tensor made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        devices = {tensor.device.type for tensor in given}
        name = func._schema.name
        if name in COPIES and devices == {"meta"} and CPU in (*args, *kwargs.values()):
            self.to_host += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ITEMS and devices == {"meta"}:
            self.to_host += 1
            return True  # for the question whether all logits are finite
        if len(devices) > 1 and name not in COPIES:
            self.mixed.append(str(func))
        made = func(*args, **kwargs)
        for part in tree_flatten(made)[0]:
            if isinstance(part, Tensor) and part.device.type == "meta":
                self.largest = max(self.largest, part.untyped_storage().nbytes())
                if part.dtype == torch.float64:
                    self.float64.append(str(func))
        return made


def model(folder: str, dtype: torch.dtype = torch.float32) -> Qwen:
    config = QwenConfig.from_json(GOLDEN / folder / "config.json")
    with torch.device("meta"):
        return Qwen(config).to(dtype).eval()


@pytest.fixture
def no_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling on `meta` has no generator, since there is nothing to draw."""
    monkeypatch.setattr("qwen_ref.generate._generators", lambda model, rows, *_: [None] * rows)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ids_on", ["cpu", "meta"])
def test_the_plain_path_stays_on_its_device(folder: str, dtype: torch.dtype, padded: bool, ids_on: str):
    qwen = model(folder, dtype)
    ids = torch.zeros(2, 40, dtype=torch.int64)  # longer than the trained length of ntk_logn
    mask = torch.stack([(torch.arange(40) >= padding).long() for padding in (7 * padded, 0)])
    if ids_on == "meta":  # they come over once, to be checked
        ids = ids.to("meta")
    with Watch() as watch, torch.inference_mode():
        cache = qwen.new_cache(2, 60)
        for logits in (
            qwen(ids),
            qwen(ids, attention_mask=mask),
            qwen(ids, attention_mask=mask, cache=cache),
            qwen(ids[:, :3], cache=cache),
            qwen(ids[:, :1], cache=cache),
        ):
            assert logits.device.type == "meta"
            assert logits.dtype == dtype
    assert watch.mixed == []
    assert watch.float64 == []
    assert watch.to_host == (5 if ids_on == "meta" else 0)


def test_a_float64_model_is_float64_there_too() -> None:
    with Watch() as watch, torch.inference_mode():
        model("ntk_logn", torch.float64)(torch.zeros(1, 40, dtype=torch.int64))
    assert watch.mixed == []
    assert watch.float64


SAMPLED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.2}, SAMPLED, {"top_k": 1, "temperature": 1.0}]
)
@pytest.mark.parametrize("lengths", [(40,), (3, 40)])
@pytest.mark.usefixtures("no_generators")
def test_a_step_of_the_loop_has_one_transfer_to_the_host(folder: str, settings: dict, lengths: tuple) -> None:
    qwen, prompts = model(folder), [[0] * length for length in lengths]
    with Watch() as watch:
        steps = generate_batch(qwen, prompts, max_new_tokens=4, **settings)
        assert watch.to_host == 0
        for n, _ in enumerate(steps, start=1):
            assert watch.to_host == n
    assert n == 4
    assert watch.mixed == []
    assert watch.float64 == []


def test_so_has_a_step_of_the_other_loops() -> None:
    qwen = model("ntk_logn")
    with Watch() as watch:
        for n, _ in enumerate(generate_uncached(qwen, [0] * 40, max_new_tokens=3), start=1):
            assert watch.to_host == n
    assert watch.mixed == watch.float64 == []
    with Watch() as watch:  # a pass of several tokens has one, too
        assert len(list(generate_lookup(qwen, [0] * 40, max_new_tokens=9))) == 9
    assert watch.mixed == watch.float64 == []
    assert watch.to_host < 9


def test_scores_and_an_int8_cache_stay_on_the_device() -> None:
    qwen = model("ntk_logn")
    with Watch() as watch:
        score(qwen, [0] * 40)
        qwen.cache_type = Int8Cache
        list(generate_batch(qwen, [[0] * 40], max_new_tokens=2))
    assert watch.mixed == watch.float64 == []


def test_the_watch_sees_what_it_should() -> None:
    x = torch.zeros(3, device="meta")
    with Watch() as watch:
        x.double().tolist()
        with contextlib.suppress(RuntimeError):
            torch.where(x > 0, x, torch.zeros(3))
    assert watch.to_host == 1
    assert watch.float64
    assert watch.mixed


# Memory


@pytest.mark.parametrize("lengths", [(1, 1), (0.001, 1)])
def test_the_largest_tensor_of_a_batch_grows_no_faster_than_its_texts(lengths: tuple[float, float]) -> None:
    """A mask of all positions against all would grow with the square: 4 times here."""
    qwen, largest = model("extended_base"), []
    for longest in (4096, 8192):
        with Watch() as watch:
            prompts = [[0] * max(int(part * longest), 3) for part in lengths]
            next(generate_batch(qwen, prompts, max_new_tokens=2))
        largest.append(watch.largest)
    assert largest[1] <= 2 * largest[0]


@pytest.mark.parametrize("how", ["plain", "fast", "int8", "int4"])
def test_a_default_device_of_the_callers_changes_nothing(how: str) -> None:
    """torch.set_default_device, or a `with torch.device(…)` around the call."""
    prompts = [[5, 6, 7], list(range(40))]
    settings = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}

    def results() -> tuple:
        qwen = load_model(GOLDEN / "ntk_logn", "bfloat16")
        if how != "plain":
            fasten(qwen, None if how == "fast" else how, 32)
        scores = score(qwen, [5, 9, 200, 31, 7, 300, 12], [[3, 4], [5, 6]])
        return list(generate_batch(qwen, prompts, **settings)), [each.tolist() for each in scores]

    expected = results()
    fast.int4_layout.cache_clear()
    fast._bags_of_one_row.cache_clear()
    with torch.device("meta"):
        assert results() == expected
    assert results() == expected  # nothing of that device was kept


def test_a_default_device_changes_nothing_in_the_parity_kit(tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.device("meta"):
        bundle = parity.record(GOLDEN / "ntk_logn", ids, tmp_path / "there", rounding=())
    other = parity.record(GOLDEN / "ntk_logn", ids, tmp_path / "here", rounding=())
    assert torch.equal(bundle.stage("logits"), other.stage("logits"))
