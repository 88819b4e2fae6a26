"""`make kernels` computes with the kernels that it says: a switch that did nothing would test nothing."""

from __future__ import annotations

import os

import torch


def test_torch_has_the_kernels_that_the_environment_asks_for() -> None:
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    found = torch.backends.cpu.get_cpu_capability().lower()
    assert asked is None or found == asked
