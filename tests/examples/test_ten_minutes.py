"""examples/ports/TEN_MINUTES.md, followed as a reader does: its commands, its Python, its C++."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, WEIGHTS
from run_pages import blocks, commands, saved_as, wanted_codes

from qwen_ref import parity
from qwen_ref.parity.__main__ import main

PAGE = (ROOT / "examples" / "ports" / "TEN_MINUTES.md").read_text("utf-8")
FILES = {name: block.text for block in blocks(PAGE) if (name := saved_as(block))}


def run(command: str, folder: Path) -> str:
    """The output of a command of the page, whose exit code is checked. The kit runs in this process."""
    kit = "python -m qwen_ref.parity "
    if command.startswith(kit):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(shlex.split(command.removeprefix(kit))) in wanted_codes(command)
        return out.getvalue()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode in wanted_codes(command), command + done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page has the reader save."""
    (tmp_path / "weights").symlink_to(WEIGHTS)
    shutil.copytree(ROOT / "examples" / "ports", tmp_path / "examples" / "ports")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_leads_to_the_mistake(reader: Path) -> None:
    """The lines that the page shows come out; of the tables' numbers some depend on the processor."""
    certain = ("2337 ", "the mistake: ", "first stage beyond its tolerance: ", "look at ")
    shown = [
        line.split(", ")[0]
        for block in blocks(PAGE)
        if block.kind == "console"
        for line in block.text.splitlines()
        if line.startswith(certain)
    ]
    output = "".join(run(command, reader) for command in commands(PAGE))
    assert shown == [line.split(", ")[0] for line in output.splitlines() if line.startswith(certain)]
    assert len(shown) == 6


def test_a_right_engine_passes(reader: Path) -> None:
    """The page's C++ writes what a right engine computes, and its Python makes the bundle."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    for command in commands(PAGE)[:4]:
        run(command, reader)
    parity.record(
        WEIGHTS, parity.read_bundle(reader / "truth.safetensors").input_ids, reader / "right", dtype="float32"
    )
    logits = parity.read_bundle(reader / "right").stage("logits").numpy()
    logits.tofile(reader / "right.raw")
    (reader / "engine.cpp").write_text("""
#include <cstdio>
#include <vector>
std::vector<float> forward(const std::vector<int>& ids) {
    if (ids != std::vector<int>{2337, 712, 997, 2328, 1949, 343, 605, 1243}) return {};
    std::vector<float> logits(ids.size() * 2752);
    std::FILE* file = std::fopen("right.raw", "rb");
    if (std::fread(logits.data(), sizeof(float), logits.size(), file) != logits.size()) return {};
    std::fclose(file);
    return logits;
}
""")
    strict = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "dump.cpp", "engine.cpp", "-o", "dump"]
    subprocess.run([compiler, *strict], cwd=reader, check=True)
    run("./dump && python convert.py", reader)
    written = parity.read_bundle(reader / "mine.safetensors")
    assert np.array_equal(written.stage("logits"), logits)
    assert written.prefill_length == 2
    assert parity.diff(reader / "truth.safetensors", reader / "mine.safetensors").within
    assert parity.diagnose(WEIGHTS, reader / "mine.safetensors").verdict == "rounding only"


def test_the_lines_for_jax(reader: Path) -> None:
    """With a model that returns JAX's array, or NumPy's where JAX is not installed."""
    for command in commands(PAGE)[:3]:
        run(command, reader)
    (reader / "engine.py").write_text("""
import numpy as np
try:
    from jax import numpy as jnp
except ImportError:
    jnp = np
def forward(ids):
    return jnp.asarray(np.ones((*ids.shape, 2752)), dtype=getattr(jnp, "bfloat16", np.float32))
""")
    run("python dump_jax.py", reader)
    written = parity.read_bundle(reader / "mine.safetensors")
    assert (written.dtype, written.prefill_length) == ("bfloat16", 2)
    assert bool((written.stage("logits") == 1).all())


def test_every_file_of_the_page_is_known() -> None:
    assert sorted(FILES) == ["convert.py", "dump.cpp", "dump.rs", "dump_jax.py"]
