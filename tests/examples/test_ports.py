"""The recorders of ports: what they refuse, what they write, and the table of what the kit finds."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, python
from safetensors.torch import load_file

from qwen_ref import load_model, parity

PORTS = ROOT / "examples" / "ports"
MODEL = GOLDEN / "extended_base"
SOURCES = str(ROOT / "src") + os.pathsep


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    (tmp_path / "ids").write_text("5 6 7 300")
    return tmp_path / "ids"


def recorded_by(script: str, *options: str, ids: Path, model: Path = MODEL) -> tuple[int, str, Path]:
    """Exit code, all output, and where the bundle is."""
    out = ids.parent / "out.safetensors"
    given = ("--model", str(model), "--ids", str(ids), "--out", str(out), *options)
    done = python(script, *given, PYTHONPATH=SOURCES + str(PORTS))
    return done.code, done.out + done.err, out


STAND_IN = """
from recorder import main, parser
from qwen_ref import load_model

def record(args, ids):
    return load_model(args.model, args.dtype)(ids)

main(parser("A stand-in.", ["float32", "bfloat16"]), {packages}, record)
"""


def stand_in(folder: Path, *packages: str) -> Path:
    (folder / "record_it.py").write_text(STAND_IN.format(packages=list(packages)))
    return folder / "record_it.py"


def test_a_recorder_writes_a_bundle_of_this_checkpoint(tmp_path: Path, ids: Path) -> None:
    code, said, out = recorded_by(stand_in(tmp_path, "torch"), "--dtype", "bfloat16", ids=ids)
    assert (code, said.strip()) == (0, f"torch {importlib.metadata.version('torch')}")
    bundle = parity.read_bundle(out)
    assert bundle.dtype == "bfloat16"
    assert bundle.input_ids.tolist() == [[5, 6, 7, 300]]
    assert torch.equal(load_file(out)["logits"], load_model(MODEL, "bfloat16")(bundle.input_ids))
    assert bundle.weights_sha256
    assert parity.diagnose(MODEL, out).verdict == "rounding only"


def test_an_engine_that_is_not_there_is_named(tmp_path: Path, ids: Path) -> None:
    code, said, out = recorded_by(stand_in(tmp_path, "torch", "no-such-engine"), ids=ids)
    assert code == 2
    assert said.strip().endswith("error: no-such-engine is not installed; pip install no-such-engine")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "why"), [("5 320", "token id 320 is outside"), ("[[1], [2, 3]]", "rows of unequal length")]
)
def test_ids_that_no_engine_can_take(text: str, why: str, tmp_path: Path, ids: Path) -> None:
    ids.write_text(text)
    code, said, _ = recorded_by(stand_in(tmp_path, "torch"), ids=ids)
    assert code == 2
    assert why in said


PUBLISHED = PORTS / "record_published.py"
TRANSFORMERS = """
__version__ = "{version}"

class AutoModelForCausalLM:
    @staticmethod
    def from_pretrained(folder, *, trust_remote_code, local_files_only, torch_dtype, **flags):
        assert trust_remote_code and local_files_only and flags.pop("use_flash_attn") is False
        assert flags == {{"fp32": False, "bf16": True, "fp16": False}}
        import runpy
        return runpy.run_path(str(folder / "modeling_qwen.py"))["Model"](folder, torch_dtype)
"""
THE_CODE = """
from types import SimpleNamespace
from qwen_ref import load_model

class Model:
    def __init__(self, folder, dtype):
        self.model = load_model(folder, str(dtype).removeprefix("torch."))
    def eval(self):
        return self
    def __call__(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.model(input_ids))
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with code; it is a stand-in for the published one."""
    folder = tmp_path / "published"
    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "modeling_qwen.py").write_text(THE_CODE)
    return folder


def transformers_of(version: str, site: Path) -> None:
    """A stand-in for another version of transformers."""
    (site / "transformers.py").write_text(TRANSFORMERS.format(version=version))
    about = site / f"transformers-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")


def run_published(published: Path, ids: Path, *options: str) -> tuple[int, str, Path]:
    out = ids.parent / "out.safetensors"
    given = ("--model", str(published), "--ids", str(ids), "--out", str(out), "--dtype", "bfloat16", *options)
    done = python(PUBLISHED, *given, PYTHONPATH=SOURCES + str(ids.parent))
    return done.code, done.out + done.err, out


def test_the_folders_code_is_executed_when_that_is_said(published: Path, ids: Path) -> None:
    transformers_of("4.37.2", ids.parent)
    code, said, out = run_published(published, ids)
    assert code == 2
    assert "its Python code would be executed; read it, then give --run-the-folders-code" in said
    assert not out.exists()
    code, said, out = run_published(published, ids, "--run-the-folders-code")
    assert code == 0, said
    assert "transformers 4.37.2" in said
    assert parity.diagnose(MODEL, out).verdict == "rounding only"


@pytest.mark.parametrize("version", ["4.31.0", "4.38.0", "5.3.0"])
def test_the_folders_code_needs_a_transformers_of_its_time(version: str, published: Path, ids: Path) -> None:
    (published / "modeling_qwen.py").write_text("raise SystemExit('executed')")
    transformers_of(version, ids.parent)
    code, said, _ = run_published(published, ids, "--run-the-folders-code")
    assert code == 2
    assert f"the published code needs transformers 4.32 to 4.37, not {version}" in said


def test_a_folder_without_code_is_refused(published: Path, ids: Path) -> None:
    (published / "modeling_qwen.py").unlink()
    transformers_of("4.37.2", ids.parent)
    code, said, _ = run_published(published, ids, "--run-the-folders-code")
    assert code == 2
    assert "has no Python code; a published folder has modeling_qwen.py" in said


def test_kept_recordings_are_diagnosed_again(tmp_path: Path, ids: Path) -> None:
    _, versions, out = recorded_by(stand_in(tmp_path, "torch"), ids=ids)
    row = {"engine": "llama.cpp", "options": "--dtype float32 --cache f32", "length": 4}
    row |= {"checkpoint": "tests/golden/extended_base", "file": out.name, "versions": versions.strip()}
    there = [row, row | {"engine": "mlx-lm's Qwen", "problem": "not installed", "versions": ""}]
    (tmp_path / "recordings.json").write_text(json.dumps(there))
    done = python(PORTS / "all_ports.py", "--only-diagnose", str(tmp_path))
    assert done.code == 0, done.err
    first, second = done.out.splitlines()[2:]
    assert first.startswith(
        f"| llama.cpp | {versions.strip()} | float32, cache f32 | extended_base | 4 | rounding only | "
    )
    assert second == "| mlx-lm's Qwen |  | float32, cache f32 | extended_base | 4 | not installed |  |"
