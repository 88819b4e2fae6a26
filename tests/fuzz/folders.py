"""Bad checkpoint folders, and what every command and call makes of them."""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ref import Tokenizer, bench, chat, checkpoint, generate, load_model, perplexity, trace
from qwen_ref.checkpoint import INDEX_NAME, SINGLE_NAME, tensor_table
from qwen_ref.config import GPTQConfig, QwenConfig
from qwen_ref.gptq import is_packed, packed_shapes
from qwen_ref.parity import __main__ as parity
from qwen_ref.settings import read_defaults
from qwen_ref.tokenizer import SPECIAL_TOKENS

from .harness import Case, Kind, Opened
from .values import Safetensors, a_json, changed_bytes, changed_object, changed_safetensors, json_text

CONFIG = {
    "model_type": "qwen",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "intermediate_size": 64,
    "vocab_size": 256 + len(SPECIAL_TOKENS) + 8,
    "seq_length": 32,
    "rotary_emb_base": 10000.0,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
}
GENERATION = {
    "chat_format": "chatml",
    "do_sample": True,
    "max_new_tokens": 2,
    "max_window_size": 200,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "eos_token_id": 256,
}
GPTQ = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True, "quant_method": "gptq"}
_CONFIG_KEYS = (
    "n_embd",
    "n_head",
    "padded_vocab_size",
    "quantization_config",
    "rope_scaling",
    "auto_map",
    "hidden_act",
)
_GENERATION_KEYS = ("temperature", "stop_words_ids", "eos_token_id", "num_beams", "seed")
_GPTQ_KEYS = ("checkpoint_format", "is_marlin_format", "true_sequential")

Files = dict[str, bytes]


def vocabulary(pairs: int = 0) -> bytes:
    """The 256 bytes, and some of their pairs."""
    tokens = [bytes([value]) for value in range(256)] + [bytes([97, 97 + n]) for n in range(pairs)]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def checkpoint_files(gptq: dict[str, Any] | None = None, shards: int = 1) -> Files:
    """A small folder that every command takes."""
    rng = random.Random(0)
    config = QwenConfig(
        **{key: value for key, value in CONFIG.items() if key not in ("model_type", "no_bias")}
    )
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for spec in tensor_table(config):
        packing = (
            None
            if gptq is None
            else GPTQConfig(gptq["bits"], gptq["group_size"], gptq["desc_act"], gptq["sym"])
        )
        if packing is not None and is_packed(spec):
            _, inputs = spec.shape
            for name, shape in packed_shapes(spec, packing).items():
                count = shape[0] * (shape[1] if len(shape) > 1 else 1)
                part = name.rpartition(".")[2]
                if part == "qweight":
                    entry = ("I32", rng.randbytes(4 * count))
                elif part == "qzeros":
                    entry = (
                        "I32",
                        struct.pack("<I", 0x77777777 if packing.bits == 4 else 0x7F7F7F7F) * count,
                    )
                elif part == "scales":
                    entry = (
                        "F16",
                        b"".join(struct.pack("<e", 0.01 + 0.01 * rng.random()) for _ in range(count)),
                    )
                else:
                    groups = [n // packing.group_size for n in range(inputs)]
                    entry = ("I32", struct.pack(f"<{inputs}i", *groups))
                tensors[name] = (entry[0], list(shape), entry[1])
            continue
        count = 1
        for length in spec.shape:
            count *= length
        # bfloat16: the upper half of a float32
        numbers = [struct.pack("<f", rng.gauss(0, 0.2))[2:] for _ in range(count)]
        dtype = "BF16"
        if gptq is not None:
            dtype, numbers = (
                "F16",
                [struct.pack("<e", struct.unpack("<f", b"\0\0" + each)[0]) for each in numbers],
            )
        tensors[spec.published] = (dtype, list(spec.shape), b"".join(numbers))
    content = CONFIG if gptq is None else {**CONFIG, "quantization_config": gptq}
    files = {
        "config.json": json.dumps(content, indent=2).encode(),
        "generation_config.json": json.dumps(GENERATION, indent=2).encode(),
        "qwen.tiktoken": vocabulary(),
    }
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = Safetensors(struct.pack("<Q", 2) + b"{}")
        name = SINGLE_NAME if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        for tensor in names[len(names) * shard // shards : len(names) * (shard + 1) // shards]:
            file.add(tensor, *tensors[tensor])
            weight_map[tensor] = name
        files[name] = file.content()
    if shards > 1:
        files[INDEX_NAME] = json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=1
        ).encode()
    return files


_bases: dict[str, Files] = {}


def bases() -> dict[str, Files]:
    """The folders to begin with; made once, before the processes fork."""
    if not _bases:
        _bases["plain"] = checkpoint_files()
        _bases["sharded"] = checkpoint_files(shards=2)
        _bases["gptq4"] = checkpoint_files(GPTQ)
        _bases["gptq8"] = checkpoint_files({**GPTQ, "bits": 8})
        own = checkpoint_files({**GPTQ, "desc_act": True})
        own["quantize_config.json"] = json.dumps({**GPTQ, "desc_act": True}).encode()
        _bases["act_order"] = own
    return _bases


def write(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# What is done to a folder


def _change_config(rng: random.Random, files: Files, name: str = "config.json") -> str:
    if rng.random() < 0.25:
        files[name], said = changed_bytes(rng, files[name])
    else:
        keys = {"config.json": _CONFIG_KEYS, "generation_config.json": _GENERATION_KEYS}.get(name, _GPTQ_KEYS)
        files[name], said = changed_object(rng, json.loads(files[name]), keys)
    return f"{name}: {said}"


def _change_index(rng: random.Random, files: Files) -> str:
    if INDEX_NAME not in files:
        files[INDEX_NAME] = json_text({"weight_map": a_json(rng)}).encode("utf-8", "surrogatepass")
        if rng.random() < 0.5:
            files[f"{rng.choice(('x', 'model-1', '../case/x'))}.safetensors".replace("../case/", "")] = (
                files.pop(SINGLE_NAME)
            )
        return "an index beside or in place of the one file"
    if rng.random() < 0.2:
        files[INDEX_NAME], said = changed_bytes(rng, files[INDEX_NAME])
        return f"the index: {said}"
    index = json.loads(files[INDEX_NAME])
    weight_map = index["weight_map"]
    names = list(weight_map)
    shard = weight_map[names[0]]
    outside = f"../../outside/{shard}"
    places = (
        *(
            outside,
            f"./{outside}",
            f"sub/../{outside}",
            outside.replace("/", "\\"),
            f"{outside}\0.safetensors",
        ),
        *(
            "",
            ".",
            "..",
            "a\0b.safetensors",
            "C:\\x.safetensors",
            "/dev/zero",
            "/etc/passwd",
            "x" * 300 + ".safetensors",
        ),
        *(
            "\ud800.safetensors",
            "\x1b[2J.safetensors",
            "a\nb.safetensors",
            ".safetensors",
            "config.json",
            "none.safetensors",
        ),
        *(f"./{shard}", shard.upper(), f"{shard} ", a_json(rng), 7, None, [shard], weight_map[names[-1]]),
    )
    place = rng.choice(places)
    for name in names if rng.random() < 0.3 else [rng.choice(names)]:
        if weight_map[name] == shard or rng.random() < 0.3:
            weight_map[name] = place
    if rng.random() < 0.2:
        weight_map[rng.choice(("", "x", "\ud800"))] = shard
    if rng.random() < 0.1:
        del weight_map[names[0]]
    files[INDEX_NAME] = json_text(index).encode("utf-8", "surrogatepass")
    return f"the index names {ascii(place)[:60]}"


def _change_weights(rng: random.Random, files: Files) -> str:
    name = rng.choice([name for name in files if name.endswith(".safetensors")] or [INDEX_NAME])
    if name == INDEX_NAME:
        return "nothing"
    files[name], said = changed_safetensors(rng, files[name])
    return f"{name}: {said}"


def _change_packed(rng: random.Random, files: Files) -> str:
    """What GPTQ's own tensors may hold."""
    name = SINGLE_NAME
    if "config.json" not in files or name not in files:
        return "nothing"
    file = Safetensors(files[name])
    modules = [tensor.removesuffix(".g_idx") for tensor in file.names() if tensor.endswith(".g_idx")]
    if not modules:
        return _change_weights(rng, files)
    module = rng.choice(modules)
    part = rng.choice(("qweight", "qzeros", "scales", "g_idx", "bias"))
    tensor = f"{module}.{part}"
    if part == "bias":
        outputs = file.header[f"{module}.scales"]["shape"][1]
        value = rng.choice((0.0, 1.0, float("nan")))
        file.rewritten({tensor: ("F16", [outputs], struct.pack("<e", value) * outputs)})
        said = f"bias of {value}"
    elif part == "g_idx":
        count = file.header[tensor]["shape"][0]
        value = rng.choice((-1, 1, 2, 5, 2**31 - 1, -(2**31)))
        groups = list(struct.unpack(f"<{count}i", file.tensor(tensor)))
        if rng.random() < 0.5:
            groups[rng.randrange(count)] = value
            said = f"g_idx with {value}"
        else:
            rng.shuffle(groups)
            said = "g_idx shuffled"
        file.put(tensor, struct.pack(f"<{count}i", *groups))
    elif part == "scales":
        value = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 65504.0, 6e-8))
        old = file.tensor(tensor)
        new = struct.pack("<e", value)
        file.put(tensor, new * (len(old) // 2) if rng.random() < 0.5 else new + old[2:])
        said = f"scales of {value}"
    else:
        old = file.tensor(tensor)
        word = rng.choice((0, 0xFFFFFFFF, 0x88888888, 0x7776_7777, 0x80808080, 0x7FFFFFFF))
        new = struct.pack("<I", word)
        file.put(tensor, new * (len(old) // 4) if rng.random() < 0.5 else new + old[4:])
        said = f"{part} with {word:#x}"
    files[name] = file.content()
    return f"{module}: {said}"


def _change_vocabulary(rng: random.Random, files: Files) -> str:
    if rng.random() < 0.25:
        files["qwen.tiktoken"], said = changed_bytes(rng, files["qwen.tiktoken"])
        return f"qwen.tiktoken: {said}"
    lines = files["qwen.tiktoken"].splitlines()
    at = rng.randrange(len(lines))
    encoded, _, rank = lines[at].partition(b" ")
    other = (b"!!", b"=", b"YQ", b"YQ==YQ==", b"YWE=", b"", "é".encode(), b"\xff", b"\0", b"Y" * 100_000)
    ranks = (
        b"-1",
        b"256",
        b"1e3",
        b"99999",
        b"9" * 5000,
        b"",
        "٣".encode(),
        b"0x1",
        b"1 2",
        b"+5",
        b"0_1",
        b"1.0",
        rank + b"0",
    )
    action = rng.randrange(6)
    if action == 0:
        lines[at] = rng.choice(other) + b" " + rank
    elif action == 1:
        lines[at] = encoded + b" " + rng.choice(ranks)
    elif action == 2:
        del lines[at : at + rng.choice((1, 5, 100))]
    elif action == 3:
        lines.insert(at, rng.choice((lines[0], b"", b"   ", b"\x0b", b"# comment", b"x" * 10**6)))
    elif action == 4:
        lines += [
            b"%s %d" % (base64.b64encode(b"zz%d" % n), 256 + n) for n in range(rng.choice((1, 8, 9, 300)))
        ]
    else:
        rng.shuffle(lines)
    files["qwen.tiktoken"] = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)
    return f"qwen.tiktoken: change {action} at line {at + 1}: {lines[min(at, len(lines) - 1)][:60]!r}"


def _change_kind(rng: random.Random, folder: Path) -> str:
    """A file that is none: after the folder was written."""
    names = sorted(path.name for path in folder.iterdir())
    path = folder / rng.choice((*names, "quantize_config.json"))
    content = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    kind = rng.choice(
        (
            "gone",
            "folder",
            "fifo",
            "dangling",
            "loop",
            "linked",
            "linked fifo",
            "endless",
            "socket",
            "sparse",
            "folder link",
        )
    )
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "linked":  # as the Hugging Face cache keeps its files: it must work
        (folder.parent / "blob").write_bytes(content)
        path.symlink_to("../blob")
    elif kind == "linked fifo":
        os.mkfifo(folder.parent / "pipe")
        path.symlink_to("../pipe")
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(str(path))
    elif kind == "sparse":
        path.write_bytes(content)
        os.truncate(path, 1 << 36)
    elif kind == "folder link":
        path.symlink_to(".")
    return f"{path.name} is {kind}"


# What is done with it


def _library(case: Case, folder: Path) -> None:
    rng = case.rng
    what = rng.choice(("load_model", "Tokenizer", "QwenConfig", "GPTQConfig", "read_defaults"))
    case.describe(what)
    if what == "load_model":
        dtype = rng.choice(("auto", "float32", "bfloat16", "float64", "float16"))
        model = case.library(partial(load_model, folder, dtype, packed=rng.random() < 0.2))
        if model is not None:
            case.library(lambda: list(generate.generate(model, [1, 2, 3], max_new_tokens=2)))
    elif what == "Tokenizer":
        tokenizer = case.library(lambda: Tokenizer.from_file(folder / "qwen.tiktoken"))
        if tokenizer is not None:
            case.library(lambda: tokenizer.decode(tokenizer.encode("a冰 b")))
    elif what == "QwenConfig":
        case.library(lambda: QwenConfig.from_json(folder / "config.json"))
    elif what == "GPTQConfig":
        case.library(lambda: GPTQConfig.from_folder(folder))
    else:
        tokenizer = Tokenizer([bytes([value]) for value in range(256)])
        case.library(lambda: read_defaults(folder, tokenizer))


def _commands(folder: str) -> list[tuple[Callable[[list[str]], int], list[str], bool]]:
    """(main, arguments, whether it may end with code 1)."""
    model, few = ["--model", folder], ["--max-new-tokens", "2"]
    return [
        (generate.main, [*model, "a", *few], False),
        (generate.main, [*model, "a", "--json", "--dtype", "float32", "--fast"], False),
        (generate.main, [*model, "a", *few, "--packed", "--logprobs"], False),
        (generate.main, [*model, "a", *few, "--quantize", "int8", "--kv-cache", "int8"], False),
        (checkpoint.main, ["inspect", folder], False),
        (checkpoint.main, ["inspect", folder, "--tp", "2"], False),
        (checkpoint.main, ["inspect", f"{folder}/config.json"], False),
        (checkpoint.main, ["inspect", f"{folder}/{SINGLE_NAME}"], False),
        (chat.main, [*model, "--once", "a", *few], False),
        (perplexity.main, [*model, "--text", "text", "--lengths", "4", "--windows", "2", "--json"], False),
        (
            perplexity.main,
            [*model, "--text", "text", "--lengths", "4", "--windows", "1", "--state", "state"],
            False,
        ),
        (trace.main, [*model, "ab", "--json", "--lens"], False),
        (parity.main, ["record", *model, "--prompt", "a", "--out", "bundle", "--rounding", "none"], False),
        (parity.main, ["record", *model, "--ids", "ids", "--out", "bundle", "--stages", "logits"], False),
        (parity.main, ["check", *model, "--golden", "golden"], True),
        (bench.main, [*model, "--lengths", "2", "--tokens", "1", "--repeats", "1"], False),
    ]


_golden: list[bytes] = []


def prepare(shared: Path) -> None:
    """A good folder of each kind does what is asked: else a case would prove nothing."""
    for name, files in bases().items():
        folder = write(files, shared / name)
        model = load_model(folder)
        list(generate.generate(model, [1, 2, 3], max_new_tokens=2))
    made = shared / "golden"
    arguments = ["record", "--model", str(shared / "plain"), "--prompt", "ab", "--out", str(made)]
    if parity.main(arguments):
        raise RuntimeError("a good folder cannot be recorded")
    _golden[:] = [made.read_bytes()]


def run(case: Case) -> None:
    rng, place = case.rng, case.place
    base = rng.choice(list(bases()))
    files, said = dict(bases()[base]), [base]
    changes: list[Callable[[random.Random, Files], str]] = [
        _change_config,
        _change_weights,
        _change_vocabulary,
    ]
    changes.append(partial(_change_config, name="generation_config.json"))
    changes += [_change_index] if base in ("plain", "sharded") else [_change_packed, _change_packed]
    if "quantize_config.json" in files:
        changes.append(partial(_change_config, name="quantize_config.json"))
    for change in rng.sample(changes, k=rng.choice((0, 1, 1, 1, 2))):
        said.append(change(rng, files))
    folder = write(files, Path("model"))
    for name, content in bases()["sharded"].items():
        (place / "outside" / name).write_bytes(content)
    if len(said) == 1 or rng.random() < 0.1:
        said.append(_change_kind(rng, folder))
    case.describe("; ".join(said))
    Path("text").write_text("some text of a few tokens\n" * 3)
    Path("ids").write_text("[[1, 2, 3], [4, 5]]")
    Path("golden").write_bytes(_golden[0])
    opened = Opened(place / "outside")
    if rng.random() < 0.35:
        _library(case, folder)
    else:
        main, arguments, may_differ = rng.choice(_commands("model"))
        case.command(main, arguments, may_differ=may_differ)
    if opened.any():
        case.found("opens a file outside of the folder")
    opened.close()
    left = sorted(str(path) for path in Path().iterdir() if ".part" in path.name)
    if left:
        case.found("leaves a partial file behind", ", ".join(left))


KIND = Kind("folders", prepare, run)
