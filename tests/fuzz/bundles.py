"""Bad bundles of the parity kit, and files of ids."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import torch

from qwen_ref.parity import __main__ as parity
from qwen_ref.parity.bundle import read_bundle, read_ids, write_bundle

from . import folders
from .harness import Case, Kind
from .values import Raw, Safetensors, a_json, changed_bytes, changed_safetensors, json_text, words

_good: list[bytes] = []


def prepare(shared: Path) -> None:
    """Bundles of every sort of a small folder: whole, padded and decoded, in another dtype, logits alone."""
    folders.prepare(shared)
    ids = shared / "ids"
    ids.write_text("[[1, 2, 3], [4]]")
    for options in (
        "--prompt abc",
        f"--ids {ids} --decode 2",
        "--prompt ab --dtype bfloat16",
        "--prompt abcd --stages logits --rounding none",
    ):
        _good.append(folders.record(shared / "one layer", shared / "made", *options.split()))


def _changed(rng: random.Random) -> tuple[bytes, str]:
    content, action = rng.choice(_good), rng.random()
    if action < 0.4:
        return changed_safetensors(rng, content)
    if action > 0.85:
        return content, "as recorded"
    file = Safetensors(content)
    said = _change_metadata(rng, file) if rng.random() < 0.6 else _change_stages(rng, file)
    return file.content(), said


def _change_metadata(rng: random.Random, file: Safetensors) -> str:
    metadata = file.header["__metadata__"]
    key = rng.choice((*metadata, "weights_sha256", "rounding", "config", "prefill_length", "dtype"))
    wholes = ("", "\0", "9" * 5000, "[" * 100_000, *words("0 -1 1 2 99 1.0 ٣ x NaN float64 int8"))
    metadata[key] = rng.choice((*wholes, json_text(a_json(rng)), 1, None))
    old = Safetensors(_good[0]).header["__metadata__"]
    if key in ("config", "rounding") and rng.random() < 0.7:
        inside = json.loads(old[key])
        part = inside if key == "config" else rng.choice(list(inside.values()))
        numbers = (
            Raw("NaN"),
            Raw("1e999"),
            -1,
            0,
            1,
            10**300,
            True,
            None,
            "x",
            [0.5],
            [-1, 2],
            [0.1, 0.2],
            {},
        )
        part[rng.choice((*part, "logits", "none"))] = rng.choice((*numbers, a_json(rng)))
        metadata[key] = json_text(inside)
    return f"metadata {key}={ascii(metadata[key])[:60]}"


def _change_stages(rng: random.Random, file: Safetensors) -> str:
    old = rng.choice([name for name in file.names() if name not in ("input_ids", "attention_mask")])
    names = "transformer.wte lm_head transformer.h.0.attn.c_attn transformer.h.1 blocks.00.attn.q norm.x norm"
    names += " blocks.٣.residual blocks.999999999.residual blocks.7.residual logits embed \ud800 \x1b[2J"
    new, entry, kind = rng.choice(words(names)), file.header[old], rng.random()
    if kind < 0.4:
        file.rewritten({new: (entry["dtype"], entry["shape"], file.tensor(old))})
        return f"{old} also as {new!a}"
    if kind < 0.7:
        shape = [*entry["shape"][:-1], 3 * entry["shape"][-1]]
        file.rewritten({old: None, new: (entry["dtype"], shape, file.tensor(old) * 3)})
        return f"{old} as {new!a}, three times as wide"
    ids, shape = rng.choice((2**63 - 1, -1, 0, 10**6)), file.header["input_ids"]["shape"]
    count = len(file.tensor("input_ids")) // 8
    file.rewritten({"input_ids": ("I64", shape, ids.to_bytes(8, "little", signed=True) * count)})
    return f"input_ids of {ids}"


def _ids(rng: random.Random) -> tuple[bytes, str]:
    texts = words("[] [[]] [[1],[]] 1.5 [true] [1e3] [NaN] ٣ 471 472 2147483648 1,2 [1,2] [[1,2],[3]]")
    text = rng.choice(
        (*texts, "", "1 2\n3", "1 -2", "9" * 5000, f"[{'9' * 5000}]", "[" * 100_000, '{"a": 1}')
    )
    if rng.random() < 0.3:
        return changed_bytes(rng, text.encode())
    if rng.random() < 0.2:
        text = json_text([a_json(rng) for _ in range(3)])
    return text.encode("utf-8", "surrogatepass"), ascii(text)[:60]


def _write(case: Case) -> None:
    """write_bundle, given what a port could give it."""
    rng = case.rng
    shape = rng.choice(((1, 2), (2,), (2, 3), (0,), (), (1, 0), (1, 2, 3)))
    dtype = rng.choice((torch.int64, torch.int64, torch.int32, torch.float32))
    ids = torch.full(shape, rng.choice((1, 0, -1, 10**6)), dtype=dtype)
    width, number = rng.choice((32, 1, 0, 472)), rng.choice((0.5, float("nan"), float("inf")))
    value = torch.full((*rng.choice((shape, shape, (1, 2))), width), number)
    if rng.random() < 0.2:
        value = rng.choice((value.to(torch.int8), value.to_sparse(), value.to("meta"), value[..., :0]))
    name = rng.choice(("logits", "embed", "blocks.0.attn.q", "x", "", "transformer.h.0.attn.c_attn"))
    options = {
        "dtype": rng.choice(("float32", "float32", "bfloat16", "x", "")),
        "prefill_length": rng.choice((None, None, 1, 2, 0, -1, 10**400)),
        "weights_sha256": rng.choice((None, None, "0" * 64, "x")),
    }
    path = rng.choice(("new", "new", "no/such", ".", "", "a\0b", "x" * 250))
    case.describe(
        f"write_bundle({path[:9]!a}), ids {shape}, {name!r} {list(value.shape)}, {ascii(options)[:200]}"
    )
    case.library(lambda: write_bundle(path, ids, {name: value}, **options))


def run(case: Case) -> None:
    rng = case.rng
    calls = words("read_bundle check check check diff diff diff record read_ids write_bundle write_bundle")
    what = rng.choice([*calls * 2, "diagnose"])
    if what == "write_bundle":
        return _write(case)
    content, said = _ids(rng) if what in ("record", "read_ids") else _changed(rng)
    case.describe(said)
    Path("file").write_bytes(content)
    Path("other").write_bytes(rng.choice(_good))
    model = ["--model", str(case.shared / "one layer")]
    pair = rng.choice((["file", "other"], ["other", "file"]))
    arguments = {
        "record": [*model, "--ids", "file", "--out", "new", "--stages", "logits", "--rounding", "none"],
        "check": [*model, "--golden", "file"],
        "diff": [*pair, *rng.choice(([], model))],
        "diagnose": [*model, "--bundle", "file"],
    }
    if what in arguments:
        shown = [] if what == "record" else rng.sample(("--json", "--full"), k=rng.randrange(3))
        case.command(
            parity.main, [what, *arguments[what], *shown], allows=() if what == "record" else ["code 1"]
        )
    elif what == "read_ids":
        case.library(partial(read_ids, "file"))
    elif (bundle := case.library(partial(read_bundle, "file"))) is not None:
        case.library(lambda: [*map(bundle.width, bundle.stages), bundle.first_not_finite(), bundle.real])


KIND = Kind("bundles", prepare, run)
