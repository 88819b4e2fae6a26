"""Values that programs trip over: numbers, texts, JSON, files, the parts of a safetensors file."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

HUGE = "9" * 300
WHOLE = ("0", "1", "2", "3", "5", "8")
NOT_WHOLE = (
    *(
        "-1",
        "-0",
        "+1",
        " 1",
        "1.0",
        "1_0",
        "１",
        "٣",
        "0x10",
        "1e3",
        "",
        " ",
        "nan",
        "inf",
        "None",
        "--",
        "-",
    ),
    *(str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(-(2**63) - 1), HUGE, f"-{HUGE}", "9" * 5000),
)
NUMBERS = ("0", "1", "0.5", "0.9", "1e-5", "2", "1.3")
NOT_NUMBERS = (
    *("nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e-46", "1e-320", "5e-324", "1e38", "1e308", "-0.0"),
    *("1,5", ".5", "1/2", "", "x", "١", "1e", "0x1p3", "1e-999999", HUGE, f"0.{HUGE}"),
)
CHARACTERS = (
    *(
        "a",
        "Z",
        " ",
        "\n",
        "\r\n",
        "\t",
        "0",
        "7",
        "'s",
        "'LL",
        ".",
        "冰岛",
        "的",
        "ß",
        "ﬃ",
        "İ",
        "é",
        "e\u0301",
    ),
    *(
        "\u0345",
        "\u0323",
        "\u0301",
        "\u1100\u1161\u11a8",
        "각",
        "\u200d",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "𝔘",
        "\U0010ffff",
        "\ufdfa",
    ),
    *("\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffd", "\ufffe", "\x1c", "\u3000", "\xa0"),
    *("\ud800", "\udfff", "\udc80", "\ud83d\ude00", "٣", "①", "Ⅷ", "ａ", "ŉ", "Ω", "\u212b", "\u0958", "🇮🇸"),
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|extra_204|>",
        "<|extra_205|>",
        "<|im_",
        "|>",
        "\U0001d15e",
    ),
)
MARKS = "\u0301\u0323\u0345\u0307\u0327\u05b0\u064b\u3099\U0001d165\u0f71\u1dce"


def a_text(rng: random.Random, longest: int = 40) -> str:
    """Random Unicode, of a few characters or of long runs."""
    kind = rng.random()
    if kind < 0.05:
        return ""
    if kind < 0.15:
        return rng.choice(CHARACTERS) * rng.choice((1, 2, 63, 64, 65, longest))
    if kind < 0.25:
        return rng.choice("aé\u1100") + "".join(rng.choices(MARKS, k=rng.randrange(longest)))
    if kind < 0.35:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(longest)))
    return "".join(rng.choices(CHARACTERS, k=rng.randrange(1, max(2, longest))))


def a_whole(rng: random.Random, good: tuple[str, ...] = WHOLE) -> str:
    return rng.choice(good if rng.random() < 0.7 else NOT_WHOLE)


def a_number(rng: random.Random, good: tuple[str, ...] = NUMBERS) -> str:
    return rng.choice(good if rng.random() < 0.7 else NOT_NUMBERS)


class Raw(str):
    """JSON text that json.dumps could not write."""


_RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "0.1e-400",
    HUGE,
    "9" * 5000,
    "-1.5e3",
    "1" + "0" * 400 + ".0",
)


def a_json(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value, most often a wrong one."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice((None, True, False, "", "1", "x", [], {}, "\ud800", "\x1b[2J\n", "é" * 300))
    if kind < 0.6:
        numbers = (0, -1, 1, 2, 3, 7, 32, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**70))
        return rng.choice((*numbers, 10**300, 0.5, -0.5, 1.0, 16.0, 1e-300, 1e300))
    if kind < 0.75:
        return Raw(rng.choice(_RAW))
    if depth and kind < 0.95:
        inside = [a_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        return (
            inside if rng.random() < 0.5 else {rng.choice(("a", "", "weight_map", "bits")): v for v in inside}
        )
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


def changed_object(rng: random.Random, content: dict[str, Any], keys: tuple[str, ...]) -> tuple[bytes, str]:
    """An object with a few values wrong, missing or given twice, as JSON; and what was done to it."""
    content, said, twice = dict(content), [], ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice((*content, *keys))
        action = rng.random()
        if action < 0.15 and key in content:
            del content[key]
            said.append(f"without {key}")
        elif action < 0.2:
            twice += f"{json.dumps(key)}: {json_text(a_json(rng))}, "
            said.append(f"{key} twice")
        elif action < 0.4 and type(content.get(key)) is int:
            content[key] = rng.choice((content[key] * 2, content[key] + 1, content[key] // 2, -content[key]))
            said.append(f"{key}={content[key]}")
        else:
            content[key] = a_json(rng)
            said.append(f"{key}={ascii(content[key])[:60]}")
    text = json_text(content)
    return f"{{{twice}{text[1:]}".encode("utf-8", "surrogatepass"), ", ".join(said)


def changed_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A file's content as no program wrote it; and what was done to it."""
    at = rng.randrange(len(content) + 1)
    other = rng.randbytes(rng.choice((1, 2, 8, 100)))
    ways: dict[str, bytes] = {
        "empty": b"",
        f"cut at {at}": content[:at],
        f"a byte changed at {at}": content[:at] + other[:1] + content[at + 1 :],
        f"bytes put in at {at}": content[:at] + other + content[at:],
        f"bytes missing at {at}": content[:at] + content[at + len(other) :],
        "twice": content * 2,
        "random": rng.randbytes(rng.choice((1, 7, 8, 9, 300))),
        "zeros": bytes(rng.choice((1, 8, 4096))),
        "a BOM": b"\xef\xbb\xbf" + content,
        "UTF-16": content.decode("latin-1").encode("utf-16"),
        "UTF-32": content.decode("latin-1").encode("utf-32"),
        "CRLF": content.replace(b"\n", b"\r\n"),
        "CR": content.replace(b"\n", b"\r"),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "another JSON": json_text(a_json(rng)).encode("utf-8", "surrogatepass"),
        "spaces": b" " * rng.choice((1, 5000)),
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    }
    way = rng.choice(list(ways))
    return ways[way], way


class Safetensors:
    """A safetensors file in its parts, each of which can be wrong."""

    def __init__(self, content: bytes) -> None:
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
        self.data = self.data[:start] + data[: end - start].ljust(end - start, b"\0") + self.data[end:]

    def rewritten(self, change: dict[str, tuple[str, list[int], bytes] | None]) -> None:
        """Lays all tensors out anew, some of them changed; None: left out."""
        old = {
            name: (*(self.header[name][key] for key in ("dtype", "shape")), self.tensor(name))
            for name in self.names()
        }
        self.header = {key: value for key, value in self.header.items() if key == "__metadata__"}
        self.data = b""
        for name, entry in {**old, **change}.items():
            if entry is not None:
                self.add(name, *entry)

    def content(self, size: int | None = None, more: str = "") -> bytes:
        """size: what the file says of its header's length. more: entries before the others, perhaps twice."""
        text = "{" + more + json_text(self.header)[1:]
        header = text.encode("utf-8", "surrogatepass")
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header) if size is None else size) + header + self.data


DTYPES = (
    "F16",
    "BF16",
    "F32",
    "F64",
    "I8",
    "U8",
    "I16",
    "I32",
    "I64",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "x",
    "",
)
SIZES = {
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "I32": 4,
    "I64": 8,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "I16": 2,
    "U64": 8,
}
NUMBERS_16 = {
    "NaN": 0x7FC0,
    "infinite": 0x7F80,
    "huge": 0x7F00,
    "zero": 0,
    "tiny": 1,
    "negative": 0xBF80,
}  # bfloat16


def changed_safetensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A safetensors file with a wrong header, wrong tensors or wrong numbers; and what was done to it."""
    file, action = Safetensors(content), rng.randrange(13)
    name = rng.choice(file.names())
    entry = file.header[name]
    if action == 0:
        size = rng.choice(
            (0, 1, 7, 10**6, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(content), len(content) - 8)
        )
        return file.content(size), f"a header of {size} bytes"
    if action == 1:
        entry["dtype"] = rng.choice((*DTYPES, a_json(rng)))
        return file.content(), f"{name} dtype {ascii(entry['dtype'])[:40]}"
    if action == 2:
        shapes = ([], [0], [-1], [2**62, 4], [2**64], entry["shape"][::-1], [*entry["shape"], 1], a_json(rng))
        entry["shape"] = rng.choice(shapes)
        return file.content(), f"{name} shape {ascii(entry['shape'])[:40]}"
    if action == 3:
        start, end = entry["data_offsets"]
        moved = (
            [start + 1, end + 1],
            [end, start],
            [start, end + 1],
            [0, end - start],
            [-1, end],
            [start, 2**63],
        )
        entry["data_offsets"] = rng.choice((*moved, a_json(rng)))
        return file.content(), f"{name} offsets {ascii(entry['data_offsets'])[:40]}"
    if action == 4:
        del file.header[name]
        return file.content(), f"{name} missing from the header, not from the data"
    if action == 5:
        file.rewritten({name: None})
        return file.content(), f"{name} missing"
    if action == 6:
        new = rng.choice(
            ("transformer.h.0.attn.masked_bias", f"{name}.x", "", "\ud800", "\x1b[2J", "é" * 400)
        )
        file.rewritten({new: ("F32", [1], bytes(4))})
        return file.content(), f"also {ascii(new)[:40]}"
    if action == 7:
        return file.content(more=f"{json.dumps(name)}: {json.dumps(entry)}, "), f"{name} twice"
    if action == 8:
        dtype = rng.choice(list(SIZES))
        count = 1
        for length in entry["shape"]:
            count *= length
        file.rewritten({name: (dtype, entry["shape"], bytes(count * SIZES[dtype]))})
        return file.content(), f"{name} stored as {dtype}"
    if action == 9:
        shape = rng.choice(
            ([0], [], [1], [*entry["shape"][1:], entry["shape"][0]], [1, *entry["shape"]], [3, 5])
        )
        count = 1
        for length in shape:
            count *= length
        size = SIZES.get(entry["dtype"], 4)
        file.rewritten({name: (entry["dtype"], shape, bytes(count * size))})
        return file.content(), f"{name} of the shape {shape}"
    if action == 10:
        what, value = rng.choice(list(NUMBERS_16.items()))
        old = file.tensor(name)
        at = 2 * rng.randrange(max(1, len(old) // 2))
        every = rng.random() < 0.3
        new = (
            struct.pack("<H", value) * (len(old) // 2)
            if every
            else old[:at] + struct.pack("<H", value) + old[at + 2 :]
        )
        file.put(name, new)
        return file.content(), f"{name}: {what} {'everywhere' if every else f'at byte {at}'}"
    if action == 11:
        file.header["__metadata__"] = rng.choice(
            ({"a": "b"}, {}, {"a": 1}, {"a": None}, {"": ""}, a_json(rng))
        )
        return file.content(), f"metadata {ascii(file.header['__metadata__'])[:40]}"
    return changed_bytes(rng, content)
