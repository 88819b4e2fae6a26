"""Hugging Face transformers' Qwen2, not written here, is rounding only; with another base it is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT, WEIGHTS

pytest.importorskip("transformers", reason="an extra: `make parity` installs it")


@pytest.mark.slow  # transformers is imported, and diagnosed twice
@pytest.mark.parametrize(
    ("folder", "base"),
    [(WEIGHTS, "RoPE base 10000 for 1e+06"), (GOLDEN / "ntk_logn", "RoPE base 1e+06 for 10000")],
)
def test_transformers_is_right_and_a_wrong_base_is_named(folder: str, base: str) -> None:
    script = ROOT / "examples" / "ports" / "parity_transformers.py"
    command = [sys.executable, str(script), "--model", str(folder)]
    if folder != WEIGHTS:  # without a vocabulary; not beyond the 32 positions that Qwen2 can
        command += ["--ids", *map(str, range(3, 300, 10))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rounding only") == 2
    assert done.stdout.count(f"the mistake: {base}\n") == 2
