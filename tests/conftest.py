"""What several tests share: the golden data, the real vocabulary, the measure of error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwen_ref import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
WEIGHTS = ROOT / "weights"
VOCABULARY = ROOT / ".vocab" / "qwen.tiktoken"


def read_golden(folder: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / folder / "golden.safetensors")


def read_jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def relative_rms(values: Tensor, truth: Tensor) -> float:
    """√(Σ (values − truth)² / Σ truth²), in float64."""
    values, truth = values.double(), truth.double()
    return float(((values - truth).square().sum() / truth.square().sum()).sqrt())


@pytest.fixture(scope="session")
def vocabulary_file() -> Path:
    """The published qwen.tiktoken. It is too large for git: `make vocab` fetches it."""
    if not VOCABULARY.exists():
        message = "the real vocabulary is not here; `make vocab` fetches it (needs network)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return VOCABULARY


@pytest.fixture(scope="session")
def tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.from_file(vocabulary_file)


@pytest.fixture(scope="session")
def tiktoken_tokenizer(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer.from_file(vocabulary_file, engine="tiktoken")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
