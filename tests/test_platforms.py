"""macOS and Windows, from Linux: the commands run without what Python and the system have on Linux alone.

No such machine was at hand. These tests hold only that nothing there is asked for unconditionally.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, WEIGHTS, Result, python

import qwen_ref
from qwen_ref.fast import fasten
from qwen_ref.fast.matrices import int4_layout
from qwen_ref.generate import generate

# The process loses what a platform lacks, once torch is imported, whose own build for it needs none of that.
ELSEWHERE = """
import importlib, json, mmap, os, pathlib, signal, sys
import torch
platform, lacks, command = json.loads(sys.argv[1])
for name in lacks:
    module, _, attribute = name.partition(".")
    if attribute:
        vars(importlib.import_module(module)).pop(attribute, None)
    else:
        sys.modules[module] = None
read_text = pathlib.Path.read_text
def read(path, *args, **kwargs):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return read_text(path, *args, **kwargs)
pathlib.Path.read_text = read
sys.platform = platform
main = importlib.import_module(command[0]).main
sys.exit(main(command[1:]))
"""
LINUX_ALONE = ["os.sched_getaffinity"]
WINDOWS = [
    *("os.set_blocking", "os.O_NONBLOCK", "os.fork", "os.mkfifo", "os.getuid", "os.geteuid", "os.killpg"),
    *("signal.SIGPIPE", "signal.SIGALRM", "signal.SIGHUP", "signal.SIGKILL", "signal.pthread_kill"),
    *("resource", "fcntl", "readline", "termios", "pwd"),
]
LACKS = {"darwin": LINUX_ALONE, "win32": LINUX_ALONE + WINDOWS}
ASKED = "冰岛的首都是"
GENERATE = ["qwen_ref.commands.generate", "--temperature", "0", "--max-new-tokens", "7"]


def run_on(platform: str, *command: str, stdin: str = "", **environment: str) -> Result:
    return python(
        "-c", ELSEWHERE, json.dumps([platform, LACKS[platform], command]), stdin=stdin, **environment
    )


@pytest.mark.parametrize("platform", LACKS)
@pytest.mark.parametrize("form", [[], ["--fast"]], ids=str)
def test_generate_runs(platform: str, form: list[str]) -> None:
    """In a console of code page 1252, too: the text is UTF-8 whatever Python takes for it."""
    done = run_on(platform, *GENERATE, ASKED, *form, PYTHONIOENCODING="cp1252")
    assert (done.code, done.out) == (0, "雷克雅未克（Reykjavik）\n\n"), done.err


@pytest.mark.parametrize("platform", LACKS)
def test_a_prompt_comes_from_a_file(platform: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"{ASKED}\r\n".encode())
    done = run_on(platform, *GENERATE, "--file", str(path))
    assert (done.code, done.out) == (0, "雷克雅未克（Reykjavik）\n\n"), done.err


@pytest.mark.parametrize("platform", LACKS)
def test_a_chat_answers(platform: str) -> None:
    done = run_on(platform, "qwen_ref.chat.__main__", "--temperature", "0", stdin="7+8=\n")
    assert done.code == 0, done.err
    assert "15" in done.out


@pytest.mark.parametrize("platform", LACKS)
def test_inspect_has_no_verdict_without_a_figure_of_free_memory(platform: str) -> None:
    done = run_on(platform, "qwen_ref.commands.inspect", "inspect", str(WEIGHTS))
    assert done.code == 0, done.err
    assert done.out.startswith(
        "3.5 MB of weights in bfloat16 and 1.0 MB for 512 positions; this system does "
    )


def test_no_module_takes_more_than_every_platform_has() -> None:
    """At import; a module that only ranks use is among them."""
    package = Path(qwen_ref.__file__).parent
    optional = {"evaluate", "bench"}  # what they import may not be installed
    names = [
        "qwen_ref." + ".".join(path.relative_to(package).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
        if path.stem not in ("__init__", "__main__") and not optional & set(path.parts)
    ]
    code = ELSEWHERE.partition("main =")[0] + "for name in command: importlib.import_module(name)\n"
    done = python("-c", code, json.dumps(["win32", LACKS["win32"], names]))
    assert done.code == 0, done.err


def test_faster_layers_take_the_last_torch_for_intel_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.2 has neither a fused norm nor a product of 4 bits: the plain norm has the same bits."""

    def tokens(**how: str) -> list:
        model = qwen_ref.load_model(GOLDEN / "ntk_logn", "bfloat16")
        return list(generate(fasten(model, kernel="bag", **how), [7, 3, 250], max_new_tokens=4))

    wanted = tokens(), tokens(quantize="int4", group_size=32)
    monkeypatch.delattr(F, "rms_norm")
    monkeypatch.delattr(torch, "_convert_weight_to_int4pack_for_cpu")
    assert int4_layout.__wrapped__() is None
    assert (tokens(), tokens(quantize="int4", group_size=32)) == wanted
