"""Values that programs trip over: numbers, texts, JSON, files, the parts of a safetensors file."""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

HUGE = "9" * 300


def words(text: str) -> list[str]:
    return text.split(" ")


NOT_WHOLE = (
    *("", " ", " 1", "9" * 5000, HUGE, HUGE, HUGE, f"-{HUGE}", str(2**31), str(2**63 - 1), str(2**63)),
    *words("-1 -0 +1 1.0 1_0 １ ٣ 0x10 1e3 nan inf None -- - -9223372036854775809"),
)
NOT_NUMBERS = (
    *("", HUGE, f"0.{HUGE}", *words("nan -nan inf -inf 1e400 -1e400 1e-46 1e-320 5e-324 1e38 1e308 -0.0")),
    *words("1,5 .5 1/2 x ١ 1e 0x1p3 1e-999999"),
)
MARKS = "\u0301\u0323\u0345\u0307\u0327\u05b0\u064b\u3099\U0001d165\u0f71\u1dce"
_CHARACTERS = (
    *("\n", "\r\n", "\t", "\x85", "\u2028", "\x1c", "\u3000", "\xa0", " ", "e\u0301", *MARKS),
    *words("a Z 0 7 's 'LL . 冰岛 的 ß ﬃ İ é 각 \u1100\u1161\u11a8 👩‍👩‍👧 🏳️‍🌈 🇮🇸 𝔘 ٣ ① Ⅷ ａ ŉ Ω"),
    *words("\u200d \ufdfa \0 \x1b[31m \x7f \ufeff \ufffd \ufffe \u212b \u0958 \U0001d15e \U0010ffff"),
    *words("<|endoftext|> <|im_start|> <|im_end|> <|extra_204|> <|extra_205|> <|im_ |>"),
)
_SURROGATES = words("\ud800 \udfff \udc80 \ud83d\ude00")


def a_text(rng: random.Random, longest: int = 40) -> str:
    """Random Unicode, of a few characters or of long runs."""
    kind = rng.random()
    if kind < 0.05:
        return ""
    if kind < 0.15:
        return rng.choice(_CHARACTERS) * rng.choice((1, 2, 63, 64, 65, longest))
    if kind < 0.25:
        return rng.choice("aé\u1100") + "".join(rng.choices(MARKS, k=rng.randrange(longest)))
    if kind < 0.35:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(longest)))
    some = _CHARACTERS if kind < 0.9 else [*_CHARACTERS, *_SURROGATES]
    return "".join(rng.choices(some, k=rng.randrange(1, max(2, longest))))


class Raw(str):
    """JSON text that json.dumps could not write."""


def a_json(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value, most often a wrong one."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice((None, True, False, "", "1", "x", [], {}, "\ud800", "\x1b[2J\n", "é" * 300))
    if kind < 0.6:
        wholes = (0, -1, 1, 2, 3, 7, 32, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**70), 10**300)
        return rng.choice((*wholes, 0.5, -0.5, 1.0, 16.0, 1e-300, 1e300))
    if kind < 0.75:
        wrong = words("NaN Infinity -Infinity 1e999 -0 0.1e-400 -1.5e3")
        return Raw(rng.choice((*wrong, HUGE, "9" * 5000, f"1{'0' * 400}.0")))
    if depth and kind < 0.95:
        inside = [a_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        return inside if rng.random() < 0.5 else {rng.choice(("a", "", "bits")): each for each in inside}
    return Raw(rng.choice(("[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 5000 + "1" + "}" * 5000)))


def json_text(value: Any) -> str:
    """json.dumps, with what Raw texts say."""
    raw: list[str] = []

    def kept(part: Any) -> Any:
        if isinstance(part, Raw):
            raw.append(part)
            return f"\0raw{len(raw) - 1}\0"
        if isinstance(part, dict):
            return {kept(key): kept(each) for key, each in part.items()}
        return [kept(each) for each in part] if isinstance(part, list) else part

    text = json.dumps(kept(value))
    for number, part in enumerate(raw):
        text = text.replace(f'"\\u0000raw{number}\\u0000"', part)
    return text


def changed_object(rng: random.Random, content: dict[str, Any], keys: list[str]) -> tuple[bytes, str]:
    """An object with a few values wrong, missing or given twice, as JSON; and what was done to it."""
    content, said, twice = dict(content), [], ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key, action = rng.choice((*content, *keys)), rng.random()
        if action < 0.15 and key in content:
            del content[key]
            said.append(f"without {key}")
        elif action < 0.2:
            twice += f"{json.dumps(key)}: {json_text(a_json(rng))}, "
            said.append(f"{key} twice")
        else:
            old = content.get(key)
            near = [old * 2, old + 1, old // 2, -old] if type(old) is int and rng.random() < 0.3 else []
            content[key] = rng.choice(near) if near else a_json(rng)
            said.append(f"{key}={ascii(content[key])[:60]}")
    return f"{{{twice}{json_text(content)[1:]}".encode("utf-8", "surrogatepass"), ", ".join(said)


def changed_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A file's content as no program wrote it; and what was done to it."""
    at, other = rng.randrange(len(content) + 1), rng.randbytes(rng.choice((1, 2, 8, 100)))
    ways: dict[str, bytes] = {
        f"cut at {at}": content[:at],
        f"a byte changed at {at}": content[:at] + other[:1] + content[at + 1 :],
        f"bytes put in at {at}": content[:at] + other + content[at:],
        f"bytes missing at {at}": content[:at] + content[at + len(other) :],
        "empty": b"",
        "twice": content * 2,
        "random": rng.randbytes(rng.choice((1, 7, 8, 9, 300))),
        "zeros": bytes(rng.choice((1, 8, 4096))),
        "spaces": b" " * rng.choice((1, 5000)),
        "a BOM": b"\xef\xbb\xbf" + content,
        "UTF-16": content.decode("latin-1").encode("utf-16"),
        "UTF-32": content.decode("latin-1").encode("utf-32"),
        "CRLF": content.replace(b"\n", b"\r\n"),
        "CR": content.replace(b"\n", b"\r"),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "another JSON": json_text(a_json(rng)).encode("utf-8", "surrogatepass"),
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    way = rng.choice(list(ways))
    return ways[way], way


class Safetensors:
    """A safetensors file in its parts, each of which can be wrong."""

    def __init__(self, content: bytes = struct.pack("<Q", 2) + b"{}") -> None:
        size = struct.unpack("<Q", content[:8])[0]
        self.header: dict[str, Any] = json.loads(content[8 : 8 + size])
        self.data = content[8 + size :]

    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def add(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        start = len(self.data)
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
        self.data += data

    def tensor(self, name: str) -> bytes:
        start, end = self.header[name]["data_offsets"]
        return self.data[start:end]

    def put(self, name: str, data: bytes) -> None:
        """Other bytes of the same length."""
        start, end = self.header[name]["data_offsets"]
        self.data = self.data[:start] + data + self.data[end:]

    def rewritten(self, changes: dict[str, tuple[str, list[int], bytes] | None]) -> None:
        """Lays all tensors out anew, some of them changed; None: left out."""
        old = {
            name: (self.header[name]["dtype"], self.header[name]["shape"], self.tensor(name))
            for name in self.names()
        }
        self.header = {key: value for key, value in self.header.items() if key == "__metadata__"}
        self.data = b""
        for name, entry in (old | changes).items():
            if entry is not None:
                self.add(name, *entry)

    def content(self, size: int | None = None, more: str = "") -> bytes:
        """size: what the file says of its header's length. more: entries before the others, perhaps twice."""
        header = f"{{{more}{json_text(self.header)[1:]}".encode("utf-8", "surrogatepass")
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header) if size is None else size) + header + self.data


_SIZES = {
    **{"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8},
    **{"U8": 1, "I8": 1, "BOOL": 1, "I16": 2, "U64": 8},
}
_OTHER_DTYPES = ("F8_E4M3", "F4", "C64", "x", "")
_FLOAT16 = {"NaN": 0x7E00, "infinite": 0x7C00, "huge": 0x7BFF, "zero": 0, "tiny": 1, "-1": 0xBC00}


def changed_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A safetensors file with a wrong header, wrong tensors or wrong numbers; and what was done to it."""
    file = Safetensors(content)
    name = rng.choice(file.names())
    entry, said = file.header[name], name
    start, end = entry["data_offsets"]
    match rng.randrange(13):
        case 0:
            sizes = (0, 1, 7, 10**6, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
            size = rng.choice((*sizes, len(content), len(content) - 8))
            return file.content(size), f"a header of {size} bytes"
        case 1:
            entry["dtype"] = rng.choice((*_SIZES, *_OTHER_DTYPES, a_json(rng)))
            said = f"{name} says dtype {ascii(entry['dtype'])[:40]}"
        case 2:
            shape = entry["shape"]
            shapes = ([], [0], [-1], [2**62, 4], [2**64], shape[::-1], [*shape, 1], a_json(rng))
            entry["shape"] = rng.choice(shapes)
            said = f"{name} says shape {ascii(entry['shape'])[:40]}"
        case 3:
            moved = ([start + 1, end + 1], [end, start], [start, end + 1], [0, end - start], [-1, end])
            entry["data_offsets"] = rng.choice((*moved, [0, 2**63], a_json(rng)))
            said = f"{name} says offsets {ascii(entry['data_offsets'])[:40]}"
        case 4:
            del file.header[name]
            said = f"{name} is missing from the header, not from the data"
        case 5:
            file.rewritten({name: None})
            said = f"{name} is missing"
        case 6:
            names = ("transformer.h.0.attn.masked_bias", f"{name}.x", "", "\ud800", "\x1b[2J", "é" * 400)
            new = rng.choice(names)
            file.rewritten({new: ("F32", [1], bytes(4))})
            said = f"also {ascii(new)[:40]}"
        case 7:
            return file.content(more=f"{json.dumps(name)}: {json.dumps(entry)}, "), f"{name} twice"
        case 8:
            dtype = rng.choice(list(_SIZES))
            file.rewritten({name: (dtype, entry["shape"], bytes(math.prod(entry["shape"]) * _SIZES[dtype]))})
            said = f"{name} is stored as {dtype}"
        case 9:
            shape = rng.choice(([0], [], [1], entry["shape"][::-1], [1, *entry["shape"]], [3, 5]))
            file.rewritten({name: (entry["dtype"], shape, bytes(math.prod(shape) * _SIZES[entry["dtype"]]))})
            said = f"{name} is stored as {shape}"
        case 10:
            what, bits = rng.choice(list(_FLOAT16.items()))
            number, at = struct.pack("<H", bits), 2 * rng.randrange(max(1, (end - start) // 2))
            everywhere, old = rng.random() < 0.3, file.tensor(name)
            file.put(name, number * ((end - start) // 2) if everywhere else old[:at] + number + old[at + 2 :])
            said = f"{name} is {what} {'everywhere' if everywhere else f'at byte {at}'}"
        case 11:
            file.header["__metadata__"] = rng.choice(
                ({"a": "b"}, {}, {"a": 1}, {"a": None}, {"": ""}, a_json(rng))
            )
            said = f"metadata {ascii(file.header['__metadata__'])[:40]}"
        case _:
            return changed_bytes(rng, content)
    return file.content(), said
