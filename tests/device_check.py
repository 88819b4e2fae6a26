"""What an accelerator computes, and how fast: `python tests/device_check.py` on a machine with a CUDA device.

Golden parity, greedy ids, GPTQ, how often a decode step waits for the device, ranks over nccl (with two
devices or more), rates. It takes minutes and is no part of the suite, which runs on the CPU; `--device cpu`
tries the script itself. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from conftest import GOLDEN, WEIGHTS
from golden_cases import FOLDERS, cases, error, golden, logits, model, recorded, recorded_dtypes, truth
from packed_elsewhere import make_packed
from safetensors.torch import load_file

from qwen_ref import load_model
from qwen_ref.bench import __main__ as bench
from qwen_ref.generate import generate
from qwen_ref.quantize.rounding import dequantize_gptq

# Error over that of the recording, both against float64. On the CPU 1.1 is asked for and 1.007 measured. A
# device adds in an order of its own; what is wrong costs a factor of 100 and more.
MOST = 1.5

failed: list[str] = []


def check(name: str, right: bool, found: str = "") -> None:
    print(f"{'ok    ' if right else 'FAILED'}  {name}{': ' if found else ''}{found}", flush=True)
    if not right:
        failed.append(name)


def parity(device: str) -> None:
    for folder in FOLDERS:
        for dtype in recorded_dtypes(folder):
            qwen = load_model(GOLDEN / folder, dtype, device)
            found = [
                error(logits(qwen, folder, case).cpu(), recorded(folder, case, dtype), truth(folder, case))
                for case in cases(folder)
            ]
            total = sum(found[1:], found[0])
            check(
                f"parity of {folder} in {dtype}", total.ratio <= MOST, f"{total.ratio:.3f} × the recording's"
            )


def greedy(device: str) -> None:
    for folder, case in (("extended_base", "greedy_9"), ("ntk_logn", "greedy_30")):
        prompt = golden(folder)[f"{case}.input_ids"][0].tolist()
        expected = golden(folder)[f"{case}.output_ids.repetition_penalty_1.3"][0].tolist()
        qwen = load_model(GOLDEN / folder, "float32", device)
        end = qwen.config.vocab_size - 1
        steps = generate(qwen, prompt, max_new_tokens=24, repetition_penalty=1.3, stop_ids=[end])
        check(f"greedy ids of {folder}", prompt + [step.token for step in steps] == expected)
        sampled = [list(generate(qwen, prompt, 8, temperature=1.0, top_p=0.9, seed=5)) for _ in range(2)]
        check(f"a seed repeats on {folder}", sampled[0] == sampled[1])


def gptq(device: str) -> None:
    settings = json.loads((GOLDEN / "gptq" / "gptq_v1.json").read_text())
    layers = load_file(GOLDEN / "gptq" / "gptq_v1.safetensors")
    for setting in settings:
        parts = [layers[f"{setting['case']}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
        here = dequantize_gptq(*parts, setting["bits"])
        there = dequantize_gptq(*(part.to(device) for part in parts), setting["bits"])
        check(f"GPTQ layer {setting['case']}", torch.equal(here, there.cpu()))
    with tempfile.TemporaryDirectory() as folder:
        packed, plain = Path(folder, "packed"), Path(folder, "plain")
        make_packed(WEIGHTS, packed, plain)
        ids = torch.arange(3, 73)[None]
        with torch.inference_mode():
            found = [
                load_model(packed, "float32", device, packed=True)(ids),
                load_model(packed, "float32", device)(ids),
                load_model(plain, "float32", device)(ids),
            ]
        check("GPTQ logits, packed and dequantised", all(torch.equal(each, found[2]) for each in found))


def waits(device: str) -> None:
    """torch counts what waits for the device. A copy to the device waits, too, if briefly: one of ids, one of
    positions, one of LogN's factor.
    """
    qwen = load_model(GOLDEN / "ntk_logn", "bfloat16", device)
    steps = generate(qwen, [1] * 40, max_new_tokens=12)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = len(list(steps))
    torch.cuda.set_sync_debug_mode("default")
    check("waits of a decode step", len(caught) <= 4 * count, f"{len(caught) / count:g}")


def ranks(count: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__, "--rank"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    check(f"{count} ranks over nccl", done.returncode == 0, done.stdout.strip() or done.stderr[-2000:])


def one_rank() -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32", "cuda", group="world")
    ids = golden("extended_base")["prefill_100.input_ids"]
    with torch.inference_mode():
        found = qwen(ids).cpu()
    exact = model("extended_base", "float64")(ids)
    # √2 of what one rank loses in float32; 2e-6 is the suite's limit for two orders of addition.
    distance = float((found - exact).norm() / exact.norm())
    if distance > 2e-6:
        raise SystemExit(f"rank {qwen.group.rank} is off by {distance:.1e}")
    if qwen.group.rank == 0:
        print(f"off by {distance:.1e}")


def rates(device: str, layers: int) -> None:
    arguments = ["--synthetic", "1.8b", "--layers", str(layers), "--dtype", "bfloat16", "--device", device]
    code = bench.main([*arguments, "--lengths", "512", "2048", "--tokens", "32", "--repeats", "3"])
    check("rates", code == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24, help="of the synthetic 1.8B (default: %(default)s)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        one_rank()
        return 0
    if args.device.startswith("cuda"):
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    parity(args.device)
    greedy(args.device)
    gptq(args.device)
    if args.device.startswith("cuda"):
        waits(args.device)
        count = torch.cuda.device_count()
        if count > 1:
            ranks(2)
        else:
            print("one device: ranks over nccl were not checked")
    rates(args.device, args.layers)
    print(f"{len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
