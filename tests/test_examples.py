"""The examples do what they say; the tiny checkpoint is what its scripts make and knows what they taught."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, WEIGHTS

from qwen_ref import Tokenizer, load_model


@pytest.fixture
def example() -> Callable[..., str]:
    """Runs a script of examples/; what it printed."""

    def run(script: str, *arguments: str | Path) -> str:
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_quickstart_names_the_capital(example: Callable[..., str]) -> None:
    lines = example("quickstart.py").splitlines()
    assert lines[1].startswith("next: '雷' with probability 0.99")
    assert "text: 雷克雅未克（Reykjavik）" in lines


def test_the_vocabulary_in_weights_is_what_its_script_makes(
    example: Callable[..., str], tmp_path: Path
) -> None:
    example("train_tokenizer.py", "--output", tmp_path / "qwen.tiktoken")
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (WEIGHTS / "qwen.tiktoken").read_bytes()


def test_training_twice_gives_the_same_bytes(example: Callable[..., str], tmp_path: Path) -> None:
    for folder in ("once", "again"):
        arguments = ("--steps", "2", "--tokenizer", WEIGHTS / "qwen.tiktoken", "--output", tmp_path / folder)
        example("train_tiny.py", *arguments)
    files = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"]
    for name in files:
        once, again = ((tmp_path / folder / name).read_bytes() for folder in ("once", "again"))
        assert once == again
        if name != "model.safetensors":
            assert once == (WEIGHTS / name).read_bytes()


def test_the_tiny_checkpoint_answers_all_that_it_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    from examine_tiny import examine, examples_by_form
    from tiny_corpus import Encoder

    model, encoder = load_model(WEIGHTS, "auto"), Encoder(Tokenizer.from_file(WEIGHTS / "qwen.tiktoken"))
    forms = examples_by_form(encoder, seed=1)
    assert sum(map(len, forms.values())) > 4000
    for form, examples in forms.items():
        right, _ = examine(model, examples)
        assert right == len(examples), form
