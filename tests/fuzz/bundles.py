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
from .values import Raw, Safetensors, a_json, changed_bytes, changed_safetensors, json_text

_good: list[bytes] = []


def prepare(shared: Path) -> None:
    """Bundles of every sort of a small folder: whole, padded and decoded, in another dtype, logits alone."""
    model = ["record", "--model", str(folders.write(folders.bases()["plain"], shared / "of_bundles"))]
    ids = shared / "ids"
    ids.write_text("[[1, 2, 3], [4]]")
    made = shared / "made"
    for options in (
        ["--prompt", "abc"],
        ["--ids", str(ids), "--decode", "2"],
        ["--prompt", "ab", "--dtype", "bfloat16"],
        ["--prompt", "abcd", "--stages", "logits", "--rounding", "none"],
    ):
        if parity.main([*model, *options, "--out", str(made)]):
            raise RuntimeError("a good folder cannot be recorded")
        _good.append(made.read_bytes())


def _changed(rng: random.Random) -> tuple[bytes, str]:
    content, said = rng.choice(_good), "as recorded"
    action = rng.random()
    if action < 0.4:
        content, said = changed_safetensors(rng, content)
    elif action < 0.85:
        file = Safetensors(content)
        said = _change_parts(rng, file)
        content = file.content()
    return content, said


def _change_parts(rng: random.Random, file: Safetensors) -> str:
    """Wrong metadata, and stages by other names."""
    metadata = file.header["__metadata__"]
    if rng.random() < 0.6:
        key = rng.choice((*metadata, "weights_sha256", "rounding", "config", "prefill_length", "dtype"))
        whole = ("0", "-1", "1", "2", "99", "1.0", "٣", "9" * 5000, "", "x", "\0", "NaN")
        value = rng.choice((*whole, json_text(a_json(rng)), "[" * 100_000, "float64", "int8", 1, None))
        if key in ("config", "rounding") and rng.random() < 0.7 and key in metadata:
            inside = json.loads(metadata[key])
            part = inside if key == "config" or not inside else rng.choice(list(inside.values()))
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
                {},
                a_json(rng),
            )
            part[rng.choice((*part, "logits", "none"))] = rng.choice(numbers)
            value = json_text(inside)
        metadata[key] = value
        return f"metadata {key}={ascii(value)[:60]}"
    stages = [name for name in file.names() if name not in ("input_ids", "attention_mask")]
    old = rng.choice(stages)
    new = rng.choice(
        (
            "transformer.wte",
            "lm_head",
            "transformer.h.0.attn.c_attn",
            "transformer.h.1",
            "blocks.00.attn.q",
            "norm.x",
        )
        + (
            "blocks.٣.residual",
            "blocks.999999999.residual",
            "blocks.7.residual",
            "\n",
            "\ud800",
            "embed",
            "norm",
            "logits",
        )
    )
    entry = file.header[old]
    if rng.random() < 0.5:
        file.rewritten({new: (entry["dtype"], entry["shape"], file.tensor(old))})
        return f"{old} also as {ascii(new)}"
    if rng.random() < 0.5:
        *leading, width = entry["shape"]
        size = len(file.tensor(old)) // max(1, width)
        file.rewritten({old: None, new: (entry["dtype"], [*leading, 3 * width], file.tensor(old) * 3)})
        return f"{old} as {ascii(new)}, three times as wide ({size})"
    ids = rng.choice(([2**63 - 1], [-1], [0, 0], [10**6], [1] * 7))
    if any(len(ids) != length for length in file.header["input_ids"]["shape"][-1:]):
        shape = [1, len(ids)]
    else:
        shape = file.header["input_ids"]["shape"]
    file.rewritten(
        {"input_ids": ("I64", shape, b"".join(each.to_bytes(8, "little", signed=True) for each in ids))}
    )
    return f"input_ids {ids}"


def _ids(rng: random.Random) -> tuple[bytes, str]:
    texts = (
        "1 2 3",
        "[1, 2]",
        "[[1, 2], [3]]",
        "1,2\n3",
        "[]",
        "[[]]",
        "[[1], []]",
        "1 -2",
        "1.5",
        "[true]",
        "[1e3]",
    )
    texts += (
        "[NaN]",
        "9" * 5000,
        f"[{'9' * 5000}]",
        "[" * 100_000,
        '{"a": 1}',
        "٣",
        "471",
        "472",
        "2147483648",
        "",
    )
    text = rng.choice(texts)
    if rng.random() < 0.3:
        return changed_bytes(rng, text.encode())
    if rng.random() < 0.2:
        text = json_text([a_json(rng) for _ in range(3)])
    return text.encode("utf-8", "surrogatepass"), ascii(text)[:60]


def _written(case: Case) -> None:
    """write_bundle, given what a port could give it."""
    rng = case.rng
    shape = rng.choice(((1, 2), (2,), (2, 3), (0,), (), (1, 0), (1, 2, 3)))
    ids = torch.full(
        shape, rng.choice((1, 0, -1, 10**6)), dtype=rng.choice((torch.int64, torch.int32, torch.float32))
    )
    width = rng.choice((32, 1, 0, 472))
    value = torch.full(
        (*rng.choice((shape, shape, (1, 2))), width), rng.choice((0.5, float("nan"), float("inf")))
    )
    if rng.random() < 0.2:
        value = rng.choice(
            (value.to(torch.int8), value.to_sparse() if value.ndim else value, value.to("meta"), value.t().T)
        )
    name = rng.choice(
        ("logits", "embed", "blocks.0.attn.q", "x", "", "transformer.h.0.attn.c_attn", "blocks.1.residual")
    )
    options = {
        "dtype": rng.choice(("float32", "float32", "bfloat16", "x", "")),
        "prefill_length": rng.choice((None, None, 1, 2, 0, -1, 10**400)),
        "weights_sha256": rng.choice((None, None, "0" * 64, "x")),
    }
    case.describe(f"write_bundle of ids {shape}, {name!r} {list(value.shape)}, {options}")
    path = rng.choice(("new", "new", "no/such", ".", "", "a\0b", "x" * 250))
    case.library(lambda: write_bundle(path, ids, {name: value}, **options))


def run(case: Case) -> None:
    rng = case.rng
    what = rng.choice(
        ("read_bundle", "check", "check", "diff", "diff", "diagnose", "record", "read_ids", "write_bundle")
    )
    if what == "write_bundle":
        _written(case)
        return
    content, said = _ids(rng) if what in ("record", "read_ids") else _changed(rng)
    Path("file").write_bytes(content)
    folders.write(folders.bases()["plain"], Path("model"))
    case.describe(said)
    model, shown = ["--model", "model"], rng.sample(("--json", "--full"), k=rng.randrange(3))
    if what == "read_bundle":
        bundle = case.library(partial(read_bundle, "file"))
        if bundle is not None:
            case.library(
                lambda: (
                    bundle.first_not_finite(),
                    [bundle.width(stage) for stage in bundle.stages],
                    bundle.real,
                )
            )
    elif what == "read_ids":
        case.library(partial(read_ids, "file"))
    elif what == "record":
        case.command(
            parity.main,
            ["record", *model, "--ids", "file", "--out", "new", "--stages", "logits", "--rounding", "none"],
        )
    elif what == "check":
        case.command(parity.main, ["check", *model, "--golden", "file", *shown], may_differ=True)
    elif what == "diagnose":
        case.command(parity.main, ["diagnose", *model, "--bundle", "file", *shown], may_differ=True)
    else:
        Path("other").write_bytes(rng.choice(_good))
        pair = ["file", "other"] if rng.random() < 0.5 else ["other", "file"]
        case.command(parity.main, ["diff", *pair, *rng.choice(([], model)), *shown], may_differ=True)


KIND = Kind("bundles", prepare, run)
