"""The page of sizes agrees with the published totals, with models that are really loaded, cut and quantised,
and with torch's own count of operations.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import GOLDEN, ROOT, WEIGHTS, example_of
from forked_ranks import run_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen_ref import QwenConfig, load_model
from qwen_ref.bench.measure import bytes_per_token
from qwen_ref.commands.cli import Parser, run
from qwen_ref.commands.sizes import cache_bytes, held_bytes, resident_bytes
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.fast.matrices import block_width

PUBLISHED = {  # parameters; total_size of the index, in bytes; D, layers, F, V
    "1.8b": (1_836_828_672, 3_673_657_344, 2048, 24, 5504, 151_936),
    "7b": (7_721_324_544, 15_442_649_088, 4096, 32, 11_008, 151_936),
    "14b": (14_167_290_880, 28_334_581_760, 5120, 40, 13_696, 152_064),
    "72b": (72_287_920_128, 144_575_840_256, 8192, 80, 24_576, 152_064),
}
sizes = example_of("measure/sizes_page")
TINY = QwenConfig.from_json(WEIGHTS / "config.json")


# The published sizes


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_add_up_to_the_published_totals(sizes: ModuleType, size: str) -> None:
    count, published_bytes, D, L, F, V = PUBLISHED[size]
    config = QwenConfig.preset(size)
    parts = sizes.parameters(config)
    assert sum(parts.values()) == count == L * (4 * D * D + 3 * F * D + 5 * D) + 2 * V * D + D
    assert parts == {
        "embed": V * D,
        "attn_norm, mlp_norm": 2 * L * D,
        "attn.qkv, weight": 3 * L * D * D,
        "attn.qkv, bias": 3 * L * D,
        "attn.out": L * D * D,
        "mlp.gate, mlp.up": 2 * L * F * D,
        "mlp.down": L * D * F,
        "norm": D,
        "lm_head": V * D,
    }
    assert sizes.weight_bytes(config, "bf16") == published_bytes


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_all_but_the_norms(sizes: ModuleType, size: str, ranks: int) -> None:
    _, whole, D, L, _, _ = PUBLISHED[size]
    norms = 2 * (2 * L + 1) * D
    assert sizes.weight_bytes(QwenConfig.preset(size), "bf16", ranks) == (whole - norms) // ranks + norms


@pytest.mark.parametrize("size", PUBLISHED)
def test_work_and_cache_of_the_published_sizes(sizes: ModuleType, size: str) -> None:
    count, whole, D, L, _, V = PUBLISHED[size]
    config = QwenConfig.preset(size)
    layers = count - 2 * V * D - D - 5 * L * D  # without embedding, head, norms and biases
    assert sizes.product_flops(config) == (2 * layers, 2 * V * D)
    assert sizes.prefill_flops(config, 3) == (6 * layers + 2 * V * D, 4 * D * L * (1 + 2 + 3))
    assert sizes.decode_flops(config, 0) == (2 * layers + 2 * V * D, 4 * D * L)
    assert sizes.read_for_token(config, "bf16", 10) == (whole - 2 * (V - 1) * D, 10 * 4 * D * L)
    assert sizes.int8_cache_bytes(config, 10) == 10 * 2 * L * (D + 4 * D // 128)
    flops, read = (
        sum(found)
        for found in (sizes.decode_flops(config, 8192), (*sizes.read_for_token(config, "bf16", 8192),))
    )
    assert flops / read == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize(
    ("size", "groups"),
    [("1.8b", [64, 64, 32, None]), ("7b", [64, 64, 64, 32]), ("14b", [64, 64, 32, None]), ("72b", [64] * 4)],
)
def test_groups_of_four_bits(sizes: ModuleType, size: str, groups: list[int | None]) -> None:
    config = QwenConfig.preset(size)
    assert [sizes.int4_group(config, n) for n in sizes.RANKS] == groups
    if None in groups:
        with pytest.raises(ValueError, match="the inputs of 8 ranks; use int8"):
            sizes.weight_bytes(config, "int4", 8)


# Models that are really there


@pytest.mark.parametrize(
    "folder", [WEIGHTS, GOLDEN / "extended_base", GOLDEN / "ntk_logn"], ids=lambda f: f.name
)
def test_a_model_holds_what_is_said(sizes: ModuleType, folder: Path) -> None:
    plain = load_model(folder, "bfloat16")
    assert resident_bytes(plain) == sizes.weight_bytes(plain.config, "bf16")
    for form in ("int8", "int4"):
        model = load_model(folder, "bfloat16")
        fasten(model, form, sizes.int4_group(model.config, 1))
        assert resident_bytes(model) == sizes.weight_bytes(model.config, form), form


def write_held(group: int, folder: Path) -> None:
    """What this rank holds in each form."""
    held = {}
    for form in ("bf16", "int8", "int4"):
        model = load_model(WEIGHTS, "bfloat16", group="world")
        if form != "bf16":
            fasten(model, form, group)
        held[form] = resident_bytes(model)
    (folder / f"{model.group.rank}.json").write_text(json.dumps(held))


@pytest.mark.parametrize(("ranks", "group"), [(2, 64), (4, 32)])
def test_every_rank_of_a_cut_model_holds_what_is_said(
    sizes: ModuleType, ranks: int, group: int, tmp_path: Path
) -> None:
    assert sizes.int4_group(TINY, ranks) == group
    run_ranks(ranks, tmp_path, write_held, group, tmp_path)
    for rank in range(ranks):
        held = json.loads((tmp_path / f"{rank}.json").read_text())
        assert held == {form: sizes.weight_bytes(TINY, form, ranks) for form in sizes.FORMS}


def test_eight_threads_hold_about_the_same(sizes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(QwenConfig.preset(size), form) for size in sizes.SIZES for form in ("int8", "int4")]
    of_one = [sizes.weight_bytes(*case) for case in cases]
    monkeypatch.setattr(
        "qwen_ref.commands.sizes.block_width", lambda outputs, threads: block_width(outputs, 8)
    )
    off = [abs(sizes.weight_bytes(*case) / one - 1) for case, one in zip(cases, of_one, strict=True)]
    assert f"{max(off):.1%}" == "0.4%"


def test_caches_hold_what_is_said(sizes: ModuleType) -> None:
    model = load_model(WEIGHTS, "bfloat16")
    assert held_bytes(model.new_cache(1, 50)) == cache_bytes(TINY, 50, torch.bfloat16)
    model.cache_type = Int8Cache
    assert held_bytes(model.new_cache(1, 50)) == sizes.int8_cache_bytes(TINY, 50)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
def test_a_token_reads_what_the_bench_says(sizes: ModuleType, form: str) -> None:
    model = load_model(WEIGHTS, "bfloat16")
    if form != "bf16":
        fasten(model, form)
    assert sum(sizes.read_for_token(TINY, form, 100)) == bytes_per_token(model, 100)


def counted(work: Callable[[], object]) -> int:
    """FLOPs as torch counts them; attention as two products: its fused one for the CPU is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        work()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts(sizes: ModuleType) -> None:
    model = load_model(WEIGHTS, "bfloat16")
    T, ids = 24, torch.arange(24)[None]
    cache = model.new_cache(1, T + 1)

    def prefill() -> None:
        model.lm_head(model.hidden_states(ids, cache=cache)[:, -1])

    # All T² pairs are multiplied there, also those that the mask then hides.
    products, attention = sizes.prefill_flops(TINY, T)
    hidden = sizes.attention_flops(TINY, 1) * T * (T - 1) // 2
    assert counted(prefill) == products + attention + hidden
    assert counted(lambda: model(ids[:, :1], cache=cache)) == sum(sizes.decode_flops(TINY, T))


# The page


def test_the_page_names_the_published_totals(sizes: ModuleType) -> None:
    page = sizes.page()
    for count, published_bytes, *_ in PUBLISHED.values():
        assert f"| **{count:,}** |" in page
        assert f"| {published_bytes:,} |" in page
    assert "| in GB | 10⁹ bytes | 3.7 | 15.4 | 28.3 | 144.6 |" in page


def test_tables_are_whole(sizes: ModuleType) -> None:
    lines = sizes.page().splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("|---")]
    assert len(starts) == 5
    for n in starts:
        assert lines[n - 2] == ""
        table = lines[n - 1 : n - 1 + next(k for k, line in enumerate([*lines[n:], ""]) if not line) + 1]
        assert len({line.count("|") for line in table}) == 1, table
    assert not any(a == b == "" for a, b in itertools.pairwise(lines))
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120


def test_the_page_in_git_is_what_the_script_prints(sizes: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert run(Parser(), sizes.command, []) == 0
    written = (ROOT / "examples" / "measure" / "sizes.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written, (
        "python examples/measure/sizes_page.py > examples/measure/sizes.md brings it up to date"
    )
