"""A person's first hour with a real Qwen, command by command, and every message on the way.

    python tests/first_hour.py

In an empty folder, with nothing but a Hugging Face cache that holds one chat release and one base model. The
tiny checkpoint stands for both. Each step is what the pages tell to type; what it must say stands beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights"
CHAT, BASE = "Qwen/Qwen-1_8B-Chat", "Qwen/Qwen-1_8B"
COMMIT = "fa6e214ccbbc6a55235c26ef406355b6bfdf5eed"
QUESTION = "冰岛的首都是"
LOADED = r"{model}: 1,755,776 parameters, 0\.00\d GB of {form} on cpu in \d+\.\d\d s"
SPEED = r"prefill \d+ tokens, [\d,.]+ tokens/s(; decode \d+ tokens, [\d,.]+ tokens/s)?"
GREEDY = r"greedy; at most {n} new tokens; stop at 2500, 2501, 2502"
KERNELS = r"kernels: .+"

# A right port and one that rotates with another base, as a porter's own script writes them.
PORT = """
import dataclasses, sys, torch, qwen_ref
from qwen_ref import parity
model = qwen_ref.load_model("{model}", "float32")
ids = parity.read_bundle("truth.safetensors").input_ids
parity.write_bundle("right.safetensors", ids, {{"logits": model(ids)}}, dtype="float32")
model.config = dataclasses.replace(model.config, rotary_emb_base=1e4)
parity.write_bundle("wrong.safetensors", ids, {{"logits": model(ids)}}, dtype="float32")
"""


def cached(home: Path, name: str, chat_format: str) -> Path:
    """A repository in Hugging Face's cache; returns its snapshot."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in ("model.safetensors", "config.json", "qwen.tiktoken"):
        shutil.copy(WEIGHTS / file, snapshot)
    settings = json.loads((WEIGHTS / "generation_config.json").read_text())
    (snapshot / "generation_config.json").write_text(json.dumps({**settings, "chat_format": chat_format}))
    return snapshot


class Hour:
    """The folder, and what has been typed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder.parent / "cache"
        self.chat, self.base = cached(home, CHAT, "chatml"), cached(home, BASE, "raw")
        own = ("HF_", "HUGGING", "XDG_CACHE", "MODELSCOPE", "COLUMNS")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.environment = {**kept, "HF_HOME": str(home), "MODELSCOPE_CACHE": str(home / "none")}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def type(
        self, *words: str, says: tuple[str, ...] = (), code: int = 0, stdin: bytes = b"", script: str = ""
    ) -> str:
        """Runs a command; returns stdout. says: the lines on stderr, each as a pattern."""
        command = [sys.executable, *(("-c", script) if script else words)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, timeout=300
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        typed = " ".join(words)
        assert done.returncode == code, f"{typed}: code {done.returncode}\n{err}"
        lines = [line.removeprefix("qwen_ref: ") for line in err.splitlines()]
        lines = [line for line in lines if not line.endswith(" s left")]  # progress, on a slow machine
        assert len(lines) == len(says), f"{typed}: {lines}"
        for line, pattern in zip(lines, says, strict=True):
            assert re.fullmatch(pattern, line), f"{typed}: {line!r} is not {pattern!r}"
        return out


def steps(hour: Hour) -> Iterator[str]:
    """Every step, by what it shows. A step is done before its name is given."""
    from_chat = rf"note: {CHAT}: revision main \(fa6e214\), {re.escape(str(hour.chat))}"
    from_base = rf"note: {BASE}: revision main \(fa6e214\), {re.escape(str(hour.base))}"
    loaded = LOADED.format(model=CHAT, form="bfloat16")
    generate, chat = ("-m", "qwen_ref.generate"), ("-m", "qwen_ref.chat")

    out = hour.type("-m", "qwen_ref")
    assert "python -m qwen_ref.generate" in out
    yield "the commands are listed"

    missing = (
        r"error: Qwen/Qwen-7B: not a folder, and neither in Hugging Face's cache, .+, nor in ModelScope's, "
        r".+; the option --download of generate, chat, … fetches it, or: "
        r"hf download Qwen/Qwen-7B config\.json .+"
    )
    hour.type(*generate, "x", "--model", "Qwen/Qwen-7B", says=(missing,), code=2)
    yield "a model that is not there: one line with the command that fetches it"

    out = hour.type("-m", "qwen_ref.checkpoint", "inspect", CHAT, says=(from_chat,))
    first, second = out.splitlines()[:2]
    assert first.startswith("fits: 3.5 MB of weights in bfloat16 and 1.0 MB for 512 positions; "), first
    assert second.startswith("a decode step reads 2.8 MB: the processor's caches may hold that"), second
    assert "4 layers of 4 heads of 32" in out
    yield "whether it fits, and what a token takes"

    how = (GREEDY.format(n=9), SPEED)
    out = hour.type(
        *generate, QUESTION, "--model", CHAT, "--max-new-tokens", "9", says=(from_chat, loaded, *how)
    )
    assert out.startswith("雷克雅未克（Reykjavik）")
    yield "a completion"

    prompt = f"\ufeff挪威的首都是奥斯陆（Oslo）\r\n{QUESTION}".encode()
    (hour.folder / "prompt.txt").write_bytes(prompt)
    mark = r"note: {} begins with a byte order mark \(U\+FEFF\), which is dropped"
    ends = r"note: in the prompt a line ends in CRLF, as on Windows; .+ tr -d '\\r' <FILE converts it"
    for words, name, stdin in (
        (("--file", "prompt.txt"), r"prompt\.txt", b""),
        (("--file", "-"), "stdin", prompt),
    ):
        says = (from_chat, mark.format(name), ends, loaded, *how)
        hour.type(*generate, *words, "--model", CHAT, "--max-new-tokens", "9", says=says, stdin=stdin)
    stop = r"note: --stop '\\n' is taken as it is typed, backslash and letter; in bash and zsh .+"
    short = (GREEDY.format(n=2) + r", '\\\\n'", SPEED)
    hour.type(
        *(*generate, QUESTION, "--model", CHAT, "--stop", r"\n", "--max-new-tokens", "2"),
        says=(from_chat, stop, loaded, *short),
    )
    yield "a prompt as editors of Windows leave it, and a stop text as a shell passes it on"

    out = hour.type(
        *(*generate, QUESTION, "--model", CHAT, "--json", "--echo", "--top-logprobs", "2"),
        *("--max-new-tokens", "2", "--top-k", "-1", "--seed", "-1", "--temperature", "0.5"),
        says=(from_chat, loaded, r"temperature 0\.5, top-k 0, top-p 0\.8, seed \d+; at most 2 .+", SPEED),
    )
    (choice,) = json.loads(out)["choices"]
    assert choice["text"].startswith(QUESTION)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert [len(each) for each in choice["logprobs"]["top_logprobs"][1:]] == [2, 2, 2]
    yield "log-probabilities of the prompt and of the text"

    how = (GREEDY.format(n=64), SPEED)
    once = (*chat, "--model", CHAT, "--once")
    saved = (*("--history", "talk.json"), *("--save", "talk.json"))
    says = (from_chat, loaded, *how)
    assert hour.type(*once, "冰岛的首都是哪里？", *saved[2:], says=(*says, r"talk\.json: 1 turn")).startswith(
        "雷"
    )
    out = hour.type(*once, "What is the capital of Norway?", *saved, says=(*says, r"talk\.json: 2 turns"))
    assert out == "Oslo.\n"
    refusal = (
        rf"error: {re.escape(str(hour.base))}.generation_config\.json: chat_format is 'raw': a base model, "
        r"which continues text; use a -Chat release, .+; if the model was trained on ChatML, "
        r"add --chat-format chatml"
    )
    merged = (*chat, "--model", BASE, "--once", "冰岛的首都是哪里？")
    hour.type(*merged, says=(from_base, refusal), code=2)
    says = (from_base, LOADED.format(model=BASE, form="bfloat16"), *how)
    assert hour.type(*merged, "--chat-format", "chatml", says=says).startswith("雷克雅未克")
    yield "a chat of two calls, and a fine-tune whose folder says that it is a base model"

    text = "".join(f"{QUESTION}雷克雅未克（Reykjavik）\n" for _ in range(40))
    (hour.folder / "calibration.txt").write_text(text, encoding="utf-8")
    script = str(ROOT / "examples/make/quantize_gptq.py")
    how4 = ("--bits", "4", "--group-size", "32", "--text", "calibration.txt")
    hour.type(script, CHAT, "Int4", *how4)
    form = r"bfloat16, GPTQ, 4 bits in groups of 32,"
    says = (LOADED.format(model="Int4", form=form), KERNELS, GREEDY.format(n=9), SPEED)
    fast = ("--fast", "--dtype", "bfloat16", "--kernel", "int4")
    out = hour.type(*generate, QUESTION, "--model", "Int4", *fast, "--max-new-tokens", "9", says=says)
    assert out.startswith("雷克雅未克（Reykjavik）")
    says = (from_chat, LOADED.format(model=CHAT, form="int4"), KERNELS, *how)
    rounded = ("--quantize", "int4", "--kernel", "int4")
    assert hour.type(*generate, QUESTION, "--model", CHAT, *rounded, says=says).startswith("雷克雅未克")
    yield "Int4: a release of one's own, and rounding at loading"

    score = ("-m", "qwen_ref.perplexity", "--model", CHAT, "--lengths", "64", "--text", "-")
    out = hour.type(*score, says=(from_chat, loaded), stdin=text.encode())
    assert re.search(r"^\| 64 \| 1 \| 5 \| 315 \|", out, re.MULTILINE), out
    yield "the perplexity of a text from stdin"

    record = ("-m", "qwen_ref.parity", "record", "--model", CHAT, "--prompt", text[:120])
    hour.type(*record, "--out", "truth.safetensors", says=(from_chat, r"truth\.safetensors: .+"))
    hour.type("port.py", script=PORT.format(model=CHAT))
    kit = ("-m", "qwen_ref.parity", "diagnose", "--model", CHAT, "--bundle")
    assert "\nrounding only: " in hour.type(*kit, "right.safetensors", says=(from_chat,))
    out = hour.type(*kit, "wrong.safetensors", says=(from_chat,), code=1)
    assert "\nthe mistake: RoPE base 10000 for 1e+06\n" in out, out
    yield "a right port, and one whose mistake is named"


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hour"
        folder.mkdir()
        for step in steps(Hour(folder)):
            print(f"ok  {step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
