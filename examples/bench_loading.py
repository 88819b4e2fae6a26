"""What loading a 1.8B-shaped bfloat16 checkpoint of 3.7 GB costs on the CPU: seconds and anonymous memory.

The checkpoint is made in a temporary folder first (noise, repeated: only its size matters) and removed again.
"""

from __future__ import annotations

import time

from qwen_ref import load_model
from qwen_ref.bench import Memory, synthetic


def main() -> None:
    with synthetic("1.8b") as folder, Memory() as memory:
        start = time.perf_counter()
        model = load_model(folder, "auto")
        elapsed = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(
        f"loaded {size / 1e9:.2f} GB of bfloat16 in {elapsed:.2f} s, {memory.anonymous / 1e6:.1f} MB of it "
        "anonymous"
    )


if __name__ == "__main__":
    main()
