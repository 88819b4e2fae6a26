"""Fetches the published vocabulary, qwen.tiktoken, from a pinned wheel into .vocab/ and checks its hash.

    python examples/make/fetch_vocabulary.py          # or: make vocab

The wheel is Alibaba's own dashscope SDK. It is downloaded without its dependencies, and never installed or
run.
"""

import argparse
import hashlib
import secrets
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / ".vocab" / "qwen.tiktoken"
MEMBER = "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if TARGET.exists() and hashlib.sha256(TARGET.read_bytes()).hexdigest() == SHA256:
        print(f"{TARGET.relative_to(ROOT)} is there")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        fetched = subprocess.run(
            [*pip, "--constraint", ROOT / "constraints.txt", "--dest", folder, "dashscope"]
        )
        if fetched.returncode != 0:
            print("the vocabulary could not be downloaded: is there a network?", file=sys.stderr)
            return 1
        (wheel,) = Path(folder).glob("dashscope-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        print(
            f"{MEMBER} in {wheel.name} has SHA-256 {found}, not {SHA256}: not the vocabulary", file=sys.stderr
        )
        return 1
    TARGET.parent.mkdir(exist_ok=True)
    partial = TARGET.with_name(f".{secrets.token_hex(8)}.part")
    with partial.open("xb") as file:
        file.write(content)
    partial.replace(TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {len(content):,} bytes, SHA-256 as published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
