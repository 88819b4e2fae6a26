"""What real engines computed is diagnosed as it should be, without the engines: their recordings are kept.

recorded/README.md says with which versions and by which command they were made.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import GOLDEN

from qwen_ref import parity

RECORDED = Path(__file__).parent / "recorded"
IGNORES_THE_BASE = ("RoPE base 10000 for 1e+06",)
NEITHER_NTK_NOR_LOGN = ("NTK off", "no LogN")
# The file → what its mistakes are called; none: the engine is right. The trained lengths are 64 and 32.
EXPECTED: dict[str, tuple[str, ...]] = {
    "transformers-bfloat16-extended_base-24": (),
    "transformers-bfloat16-ntk_logn-100": NEITHER_NTK_NOR_LOGN,
    "mlx-float32-extended_base-24": IGNORES_THE_BASE,
    "mlx-bfloat16-extended_base-24": IGNORES_THE_BASE,
    "mlx-bfloat16-extended_base-100": IGNORES_THE_BASE,
    "mlx-float32-ntk_logn-24": (),
    "mlx-bfloat16-ntk_logn-100": NEITHER_NTK_NOR_LOGN,
    "llama-float32-cache-f32-no-flash-ntk_logn-24": (),
    "llama-float32-cache-f32-no-flash-ntk_logn-100": NEITHER_NTK_NOR_LOGN,
    "llama-float32-extended_base-24": (),  # with its defaults: flash attention, a cache in float16
    "llama-float32-ntk_logn-100": NEITHER_NTK_NOR_LOGN,
    "llama-float32-form-q8_0-extended_base-24": (),
    "llama-bfloat16-extended_base-24": (),
    "llama-bfloat16-extended_base-100": (),
    "llama-bfloat16-ntk_logn-24": (),
    "llama-float16-extended_base-24": (),
    "llama-float16-ntk_logn-24": (),
    "paddle-float32-extended_base-24": (),
    "paddle-float32-ntk_logn-100": (),
    "ctranslate2-float32-extended_base-24": (),
    "ctranslate2-float32-form-int8-extended_base-24": (),
    "litgpt-bfloat16-extended_base-24": (),
}
CHOICES = ("llama-float32-extended_base-24", "llama-float32-form", "ctranslate2-float32-form")


def folder_of(name: str) -> Path:
    return GOLDEN / name.rsplit("-", 2)[1]


def slow(name: str) -> bool:
    """Pairs of mistakes are searched."""
    return len(EXPECTED[name]) > 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if slow(name) else ()) for name in EXPECTED]
)
def test_an_engine_is_diagnosed_from_its_recording(name: str) -> None:
    found = parity.diagnose(folder_of(name), RECORDED / f"{name}.safetensors")
    if EXPECTED[name]:
        assert found.verdict == "mistake"
        assert len(found.found) == len(EXPECTED[name]), found.found
        for expected in EXPECTED[name]:
            assert any(said.startswith(expected) for said in found.found), found.found
    else:
        assert found.verdict == ("choice" if name.startswith(CHOICES) else "rounding only"), found.found


def test_every_recording_is_small_and_has_an_expected_verdict() -> None:
    files = list(RECORDED.glob("*.safetensors"))
    assert {file.stem for file in files} == set(EXPECTED)
    assert max(file.stat().st_size for file in files) <= 500_000
    assert sum(file.stat().st_size for file in files) <= 1_500_000
