"""Bad checkpoint folders, and what every command and call makes of them."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import random
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ref import Tokenizer, load_model
from qwen_ref.bench import __main__ as bench
from qwen_ref.chat import __main__ as chat
from qwen_ref.checkpoint import INDEX_NAME, SINGLE_NAME, tensor_table
from qwen_ref.commands import inspect as checkpoint
from qwen_ref.commands.defaults import read_defaults
from qwen_ref.commands.generate import main as generate_command
from qwen_ref.config import QwenConfig
from qwen_ref.generate import generate
from qwen_ref.parity import __main__ as parity
from qwen_ref.perplexity import __main__ as perplexity
from qwen_ref.quantize.config import GPTQConfig
from qwen_ref.quantize.gptq import is_packed, packed_shapes
from qwen_ref.tokenizer import SPECIAL_TOKENS
from qwen_ref.trace import __main__ as trace

from .harness import Case, Kind, Opened, capture
from .values import Safetensors, a_json, changed_bytes, changed_object, changed_safetensors, json_text, words

CONFIG = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_channels": 16},
    **{"intermediate_size": 64, "vocab_size": 256 + len(SPECIAL_TOKENS) + 8, "seq_length": 32},
    **{"rotary_emb_base": 1e4, "layer_norm_epsilon": 1e-6, "use_dynamic_ntk": True, "use_logn_attn": True},
}
GENERATION = {
    **{"chat_format": "chatml", "do_sample": True, "max_new_tokens": 2, "max_window_size": 200},
    **{"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 256},
}
GPTQ = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True}
# Keys that a file may have, and those above lack.
_KEYS = {
    "config.json": words("model_type n_embd n_head padded_vocab_size quantization_config rope_scaling"),
    "generation_config.json": words("temperature stop_words_ids num_beams seed"),
    "quantize_config.json": words("checkpoint_format is_marlin_format quant_method"),
}

Files = dict[str, bytes]
Tensors = dict[str, tuple[str, list[int], bytes]]  # name → dtype, shape, content


def vocabulary() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(bytes([value])), value) for value in range(256))


def checkpoint_files(gptq: dict[str, Any] | None = None, shards: int = 1, layers: int = 2) -> Files:
    """A small folder that every command takes."""
    rng, config = random.Random(0), CONFIG | {"num_hidden_layers": layers}
    tensors: Tensors = {}
    for spec in tensor_table(QwenConfig(**config)):
        if gptq is not None and is_packed(spec):
            for name, shape in packed_shapes(spec, GPTQConfig(**gptq)).items():
                tensors[name] = _packed(rng, name.rpartition(".")[2], shape, gptq)
        else:
            numbers = [rng.gauss(0, 0.2) for _ in range(math.prod(spec.shape))]
            tensors[spec.published] = ("F16", list(spec.shape), struct.pack(f"<{len(numbers)}e", *numbers))
    packing = {} if gptq is None else {"quantization_config": gptq}
    files = {
        "config.json": json.dumps(config | packing).encode(),
        "generation_config.json": json.dumps(GENERATION, indent=2).encode(),
        "qwen.tiktoken": vocabulary(),
    }
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        file = SINGLE_NAME if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        whole = Safetensors()
        whole.rewritten({name: tensors[name] for name in part})
        files[file] = whole.content()
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        files[INDEX_NAME] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return files


def _packed(
    rng: random.Random, part: str, shape: tuple[int, ...], gptq: dict[str, Any]
) -> tuple[str, list[int], bytes]:
    """One of the four tensors of a packed weight."""
    count = math.prod(shape)
    if part == "scales":
        scales = (0.01 + 0.01 * rng.random() for _ in range(count))
        return "F16", list(shape), struct.pack(f"<{count}e", *scales)
    if part == "g_idx":
        return "I32", list(shape), struct.pack(f"<{count}i", *(n // gptq["group_size"] for n in range(count)))
    middle = b"\x77" if gptq["bits"] == 4 else b"\x7f"
    return "I32", list(shape), rng.randbytes(4 * count) if part == "qweight" else middle * (4 * count)


_bases: dict[str, Files] = {}


def bases() -> dict[str, Files]:
    """The folders to begin with; made once, before the processes fork."""
    if not _bases:
        act_order = GPTQ | {"desc_act": True}
        own = {"quantize_config.json": json.dumps(act_order).encode()}
        _bases["plain"], _bases["one layer"] = checkpoint_files(), checkpoint_files(layers=1)
        _bases["sharded"], _bases["gptq4"] = checkpoint_files(shards=2), checkpoint_files(GPTQ)
        _bases["gptq8"] = checkpoint_files(GPTQ | {"bits": 8})
        _bases["act_order"] = checkpoint_files(act_order) | own
    return _bases


def write(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def record(folder: Path, out: Path, *options: str) -> bytes:
    """A bundle of a good folder."""
    with contextlib.redirect_stderr(capture()):
        failed = parity.main(["record", "--model", str(folder), "--out", str(out), *options])
    if failed:
        raise RuntimeError("a good folder cannot be recorded")
    return out.read_bytes()


# What is done to a folder: each says what it did


def _change_settings(rng: random.Random, files: Files, name: str) -> str:
    if rng.random() < 0.25:
        files[name], said = changed_bytes(rng, files[name])
    else:
        files[name], said = changed_object(rng, json.loads(files[name]), _KEYS[name])
    return f"{name}: {said}"


def _change_index(rng: random.Random, files: Files) -> str:
    if INDEX_NAME not in files:
        files[INDEX_NAME] = json_text({"weight_map": a_json(rng)}).encode("utf-8", "surrogatepass")
        if rng.random() < 0.5:
            files["x.safetensors"] = files.pop(SINGLE_NAME)
        return "an index beside or in place of the one file"
    if rng.random() < 0.2:
        files[INDEX_NAME], said = changed_bytes(rng, files[INDEX_NAME])
        return f"the index: {said}"
    index = json.loads(files[INDEX_NAME])
    weight_map, names = index["weight_map"], list(index["weight_map"])
    shard = weight_map[names[0]]
    outside = f"../../outside/{shard}"
    places = (
        *(outside, f"./{outside}", f"sub/../{outside}", outside.replace("/", "\\")),
        *(f"{outside}\0.safetensors", f"./{shard}", shard.upper(), f"{shard} ", a_json(rng), 7, None),
        *([shard], weight_map[names[-1]], "", "a\nb.safetensors", f"{'x' * 300}.safetensors"),
        *words(". .. /dev/zero /etc/passwd config.json"),
        *words("C:\\x.safetensors \ud800.safetensors \x1b[2J.safetensors .safetensors none.safetensors"),
    )
    place = rng.choice(places)
    for name in names if rng.random() < 0.3 else [rng.choice(names)]:
        if weight_map[name] == shard or rng.random() < 0.3:
            weight_map[name] = place
    if rng.random() < 0.2:
        weight_map[rng.choice(("", "x", "\ud800"))] = shard
    files[INDEX_NAME] = json_text(index).encode("utf-8", "surrogatepass")
    return f"the index names {ascii(place)[:60]}"


def _change_weights(rng: random.Random, files: Files) -> str:
    if not (names := [name for name in files if name.endswith(".safetensors")]):
        return "nothing"
    name = rng.choice(names)
    files[name], said = changed_safetensors(rng, files[name])
    return f"{name}: {said}"


def _change_packed(rng: random.Random, files: Files) -> str:
    """What GPTQ's own tensors may hold."""
    file = Safetensors(files[SINGLE_NAME])
    module = rng.choice([name.removesuffix(".g_idx") for name in file.names() if name.endswith(".g_idx")])
    part = rng.choice(("qweight", "qzeros", "scales", "g_idx", "bias"))
    tensor, everywhere = f"{module}.{part}", rng.random() < 0.5
    if part == "bias":
        value, outputs = rng.choice((0.0, 1.0, math.nan)), file.header[f"{module}.scales"]["shape"][1]
        file.rewritten({tensor: ("F16", [outputs], struct.pack("<e", value) * outputs)})
    elif part == "g_idx" and everywhere:
        groups = list(struct.iter_unpack("<i", file.tensor(tensor)))
        rng.shuffle(groups)
        value = "shuffled"
        file.put(tensor, b"".join(struct.pack("<i", *group) for group in groups))
    else:
        wholes = (0, -1, 1, 2, 5, 2**31 - 1, -(2**31), -0x77777778, 0x77777776, -0x7F7F7F80)
        value = rng.choice((math.nan, math.inf, 0.0, -1.0, 65504.0, 6e-8) if part == "scales" else wholes)
        new, old = struct.pack("<e" if part == "scales" else "<i", value), file.tensor(tensor)
        file.put(tensor, new * (len(old) // len(new)) if everywhere else new + old[len(new) :])
    files[SINGLE_NAME] = file.content()
    return f"{tensor} {value} {'everywhere' if everywhere else 'once'}"


def _change_vocabulary(rng: random.Random, files: Files) -> str:
    if rng.random() < 0.25:
        files["qwen.tiktoken"], said = changed_bytes(rng, files["qwen.tiktoken"])
        return f"qwen.tiktoken: {said}"
    lines = files["qwen.tiktoken"].splitlines()
    at = rng.randrange(len(lines))
    encoded, rank = lines[at].split()
    action = rng.randrange(6)
    if action == 0:
        wrong = (b"", "é".encode(), b"\xff", b"\0", b"Y" * 100_000, *b"!! = YQ YQ==YQ== YWE=".split())
        lines[at] = rng.choice(wrong) + b" " + rank
    elif action == 1:
        others = b"-1 256 1e3 99999 0x1 +5 0_1 1.0".split()
        wrong = (b"", b"9" * 5000, "٣".encode(), b"1 2", rank + b"0", *others)
        lines[at] = encoded + b" " + rng.choice(wrong)
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
    """After the folder was written: a file that is none, or that is a link."""
    path = folder / rng.choice((*sorted(path.name for path in folder.iterdir()), "quantize_config.json"))
    content = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    links = {"dangling": "nowhere", "loop": path.name, "to its folder": ".", "endless": "/dev/zero"}
    links |= {"linked": "../blob", "linked to a fifo": "../pipe"}  # the Hugging Face cache links its files
    kind = rng.choice(("gone", "folder", "fifo", "socket", "sparse", *links))
    if kind in links:
        (folder.parent / "blob").write_bytes(content)
        os.mkfifo(folder.parent / "pipe")
        path.symlink_to(links[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(str(path))
    elif kind == "sparse":
        path.write_bytes(content)
        os.truncate(path, 1 << 30)
    return f"{path.name} is {kind}"


# What is done with it


def _library(case: Case, folder: Path) -> None:
    rng = case.rng
    what = rng.choice(("load_model", "load_model", "Tokenizer", "QwenConfig", "GPTQConfig", "read_defaults"))
    case.describe(what)
    if what == "load_model":
        dtype = rng.choice(("auto", "float32", "bfloat16", "float64", "float16"))
        model = case.library(partial(load_model, folder, dtype, packed=rng.random() < 0.2))
        if model is not None:
            case.library(lambda: list(generate(model, [1, 2, 3], max_new_tokens=2)))
    elif what == "Tokenizer":
        tokenizer = case.library(lambda: Tokenizer.from_file(folder / "qwen.tiktoken"))
        if tokenizer is not None:
            case.library(lambda: tokenizer.decode(tokenizer.encode("a冰 b")))
    elif what == "QwenConfig":
        case.library(lambda: QwenConfig.from_json(folder / "config.json"))
    elif what == "GPTQConfig":
        case.library(lambda: GPTQConfig.from_json(folder / "config.json"))
    else:
        case.library(lambda: read_defaults(folder, Tokenizer([bytes([value]) for value in range(256)])))


_COMMANDS = (
    (generate_command, "--model model a --max-new-tokens 2"),
    (generate_command, "--model model a --json --dtype float32 --fast"),
    (generate_command, "--model model a --packed --logprobs"),
    (generate_command, "--model model a --quantize int8 --kv-cache int8"),
    (checkpoint.main, "inspect model"),
    (checkpoint.main, "inspect model --tp 2"),
    (checkpoint.main, "inspect model/config.json"),
    (checkpoint.main, f"inspect model/{SINGLE_NAME}"),
    (chat.main, "--model model --once a"),
    (perplexity.main, "--model model --text text --lengths 4 --windows 2 --json"),
    (perplexity.main, "--model model --text text --lengths 4 --windows 1 --state state"),
    (trace.main, "--model model ab --json --lens"),
    (parity.main, "record --model model --prompt a --out bundle --rounding none"),
    (parity.main, "record --model model --ids ids --out bundle --stages logits"),
    (parity.main, "check --model model --golden golden"),
    (bench.main, "--model model --lengths 2 --tokens 1 --repeats 1"),
)


def prepare(shared: Path) -> None:
    """A good folder of each kind does what is asked: else a case would prove nothing."""
    for name, files in bases().items():
        if not (shared / name).exists():
            list(generate(load_model(write(files, shared / name)), [1, 2, 3], max_new_tokens=2))
    record(shared / "plain", shared / "golden", "--prompt", "ab")


def run(case: Case) -> None:
    rng = case.rng
    base = rng.choice(list(bases()))
    files, said = dict(bases()[base]), [base]
    changes: list[Callable[[random.Random, Files], str]] = [_change_weights, _change_vocabulary]
    changes += [partial(_change_settings, name=name) for name in _KEYS if name in files]
    changes += [_change_packed, _change_packed] if "gptq" in base or base == "act_order" else [_change_index]
    rng.shuffle(changes)
    # The weights last: the others read what they change.
    chosen = sorted(
        changes[: rng.choice((0, 1, 1, 1, 1, 1, 2, 2))], key=lambda change: change is _change_weights
    )
    said += [change(rng, files) for change in chosen]
    folder = write(files, Path("model"))
    write(bases()["sharded"], case.place / "outside")
    if not chosen or rng.random() < 0.05:
        said.append(_change_kind(rng, folder))
    case.describe("; ".join(said))
    Path("text").write_text("some text of a few tokens\n" * 3)
    Path("ids").write_text("[[1, 2, 3], [4, 5]]")
    Path("golden").write_bytes((case.shared / "golden").read_bytes())
    opened = Opened(case.place / "outside")
    if rng.random() < 0.35:
        _library(case, folder)
    else:
        main, arguments = rng.choice(_COMMANDS)
        case.command(main, arguments.split(), allows=["code 1"] if "check" in arguments else ())
    if opened.any():
        case.found("opens a file outside of the folder")


KIND = Kind("folders", prepare, run)
