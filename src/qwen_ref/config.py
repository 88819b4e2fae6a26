"""The published config.json of first-generation Qwen, read and checked: what the architecture needs.

The functions at the end check values from outside and word messages about them. All files use them.
"""

from __future__ import annotations

import errno
import json
import math
import operator
import os
import re
import reprlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """An input cannot be used. The message says what and where it is, its value, the limit and the remedy.

    Every ValueError that this project raises on purpose is an InputError. Any other ValueError is a bug.
    """


# Spellings of the early 7B revisions. padded_vocab_size is not here: those files carry it beside vocab_size.
_EARLY_SPELLINGS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
_EARLY_SPELLINGS |= {"n_head": "num_attention_heads", "ffn_hidden_size": "intermediate_size"}

# Keys that change the computation, each with its only supported value. A missing key means that value.
_SUPPORTED_VALUES: dict[str, tuple[Any, str]] = {
    "model_type": ("qwen", "only first-generation Qwen is implemented"),
    "no_bias": (True, "only the q, k, v projection may have a bias"),
    "tie_word_embeddings": (False, "every first-generation Qwen has its own output head"),
    "rotary_pct": (1.0, "every dimension of a head is rotated"),
    "scale_attn_weights": (True, "scores are always divided by the square root of the head size"),
    "apply_residual_connection_post_layernorm": (False, "residuals are taken before the norm"),
    "activation": ("swiglu", "the MLP is SwiGLU"),
    "hidden_act": ("silu", "the MLP is SwiGLU"),
    "pos_emb": ("rotary", "positions enter by rotation only"),
    "rope_scaling": (None, "the base is changed by rotary_emb_base and use_dynamic_ntk alone"),
    "sliding_window": (None, "attention reaches every earlier position"),
}

LARGEST_LENGTH = 2**30  # of a text, in tokens
# Limits far above every Qwen. A larger number is a mistake, and computing with it would exhaust the memory.
# float32, in which ids travel between devices, holds no more than 2^24 of them.
_LARGEST = {"hidden_size": 2**20, "num_hidden_layers": 10_000, "num_attention_heads": 2**16}
_LARGEST |= {"kv_channels": 2**16, "intermediate_size": 2**24, "vocab_size": 2**24, "seq_length": 2**30}


@dataclass(frozen=True)
class QwenConfig:
    """The sizes and constants of one model, under their published names.

    Raises ValueError, naming every field, where values are of the wrong type, out of range or contradictory.

    >>> QwenConfig.preset("72b").mlp_width
    24576
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_channels: int  # the size of one head
    intermediate_size: int  # as published: twice the width of the MLP, gate and up counted together
    vocab_size: int  # rows of the embedding and of the head: the tokenizer's ids and some padding
    seq_length: int  # the length trained on; dynamic NTK and LogN act beyond it
    rotary_emb_base: float
    layer_norm_epsilon: float
    use_dynamic_ntk: bool
    use_logn_attn: bool

    @property
    def mlp_width(self) -> int:
        """The real width F of the SwiGLU MLP."""
        return self.intermediate_size // 2

    def __repr__(self) -> str:  # short, for a notebook; vars() has all of it
        sizes = f"{self.num_hidden_layers} layers of {self.num_attention_heads} × {self.kv_channels}"
        return f"QwenConfig({sizes}, MLP {self.mlp_width}, V {self.vocab_size}, length {self.seq_length})"

    @classmethod
    def from_json(cls, path: str | Path) -> QwenConfig:
        """Reads a published config.json. Nothing that it names (`auto_map`) is ever imported or executed.

        Raises ValueError, with the names of the keys, for missing keys and for values that are not supported.
        """
        raw = read_json_object(path)
        try:
            values, problems = _architecture(raw)
            if problems := problems + _value_problems(values):
                raise InputError("; ".join(problems))
            return cls(**values)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, size: str) -> QwenConfig:
        """The published configuration of "1.8b", "7b", "14b" or "72b"."""
        if size not in _PRESETS:
            raise InputError(f"no preset {shown(size)}; use one of {', '.join(_PRESETS)}")
        return _PRESETS[size]

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError where heads or MLP cannot be cut evenly, or a rank would have no vocabulary.

        >>> QwenConfig.preset("72b").check_ranks(6)
        Traceback (most recent call last):
        InputError: num_attention_heads=64 cannot be split over 6 ranks; use 1, 2, 4, 8, 16, 32 or 64
        """
        if ranks not in (usable := self.usable_ranks()):
            sizes = {"num_attention_heads": self.num_attention_heads, "the MLP's width": self.mlp_width}
            uneven = [f"{name}={size}" for name, size in sizes.items() if ranks < 1 or size % ranks]
            what = " and ".join(uneven or [f"vocab_size={self.vocab_size}"])
            raise InputError(f"{what} cannot be split over {ranks} ranks; use {either(usable)}")

    def usable_ranks(self) -> list[int]:
        """The numbers of ranks that this model can be cut for."""
        common, V = math.gcd(self.num_attention_heads, self.mlp_width), self.vocab_size
        return [n for n in range(1, common + 1) if common % n == 0 and (n - 1) * -(-V // n) < V]

    def __post_init__(self) -> None:
        problems = _value_problems(vars(self))
        if not problems:
            D, H, K = self.hidden_size, self.num_attention_heads, self.kv_channels
            width, length = self.intermediate_size, self.seq_length
            wrong = (
                (H * K != D, f"num_attention_heads={H} times kv_channels={K} must be hidden_size={D}"),
                (K % 2, f"kv_channels={K} must be even: rotation pairs the halves of a head"),
                (self.use_dynamic_ntk and K == 2, f"kv_channels={K} is too small for use_dynamic_ntk"),
                (width % 2, f"intermediate_size={width} must be even: it counts gate and up together"),
                (self.use_logn_attn and length < 2, f"seq_length={length} is too small for use_logn_attn"),
            )
            problems = [problem for there, problem in wrong if there]
        if problems:
            raise InputError("; ".join(problems))


def _value_problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with each value by itself, for any of QwenConfig's fields."""
    problems = []
    for name, kind in ((field.name, field.type) for field in fields(QwenConfig) if field.name in values):
        value, low, high = values[name], 1.0, 1e12
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "bool":
            right, wanted = isinstance(value, bool), "true or false"
        elif kind == "int":
            right = number and isinstance(value, int) and 1 <= value <= _LARGEST[name]
            wanted = f"a whole number from 1 to {_LARGEST[name]}"
        else:
            low, high = (0.0, 1.0) if name == "layer_norm_epsilon" else (low, high)
            right, wanted = number and low < value <= high, f"a number above {low:g} and at most {high:g}"
        if not right:
            problems.append(f"{name}={shown(value)} must be {wanted}")
    return problems


def _architecture(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """QwenConfig's fields from a parsed config.json, early spellings resolved, and what is not supported."""
    if (model_type := raw.get("model_type", "qwen")) != "qwen":
        raise InputError(f'model_type is {shown(model_type)}; only first-generation Qwen, "qwen", is known')
    if encoders := [f'"{name}"' for name in ("visual", "audio") if raw.get(name) is not None]:
        raise InputError(f"{encoders[0]}: Qwen-VL or Qwen-Audio, with an encoder; only text models are read")
    problems = [
        f"{key}={shown(raw[key])} is not supported, only {json.dumps(value)}: {reason}"
        for key, (value, reason) in _SUPPORTED_VALUES.items()
        if key in raw and (raw[key] != value or isinstance(raw[key], bool) != isinstance(value, bool))
    ]
    rope = raw.get("rope_parameters") or {}  # what newer transformers write for rope_scaling and the base
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        problems.append(f"rope_parameters={shown(rope)}: {_SUPPORTED_VALUES['rope_scaling'][1]}")
    kv_heads, heads = raw.get("num_key_value_heads"), raw.get("num_attention_heads", raw.get("n_head"))
    if kv_heads is not None and kv_heads != heads:
        problems.append(f"num_key_value_heads={shown(kv_heads)} is not supported: each head has its own keys")
    values = {field.name: raw[field.name] for field in fields(QwenConfig) if field.name in raw}
    for early, name in _EARLY_SPELLINGS.items():
        if early in raw and values.setdefault(name, raw[early]) != raw[early]:
            both = f"{name}={shown(values[name])} and its early spelling {early}={shown(raw[early])}"
            problems.append(f"{both} disagree")
    if "padded_vocab_size" in raw:  # the rows that the tensors really have
        values["vocab_size"] = raw["padded_vocab_size"]
    if missing := [field.name for field in fields(QwenConfig) if field.name not in values]:
        problems.append(f"missing {', '.join(missing)}")
    return values, problems


_PRESETS = {  # D, layers, H, K, 2 · F, V, trained length, RoPE base, epsilon, NTK, LogN: QwenConfig's order
    "1.8b": QwenConfig(2048, 24, 16, 128, 11008, 151936, 8192, 1e4, 1e-6, True, True),
    "7b": QwenConfig(4096, 32, 32, 128, 22016, 151936, 8192, 1e4, 1e-6, True, True),
    "14b": QwenConfig(5120, 40, 40, 128, 27392, 152064, 2048, 1e4, 1e-6, True, True),
    "72b": QwenConfig(8192, 80, 64, 128, 49152, 152064, 32768, 1e6, 1e-6, False, False),
}


def whole(name: str, value: Any, least: int = 1, most: int = 2**40, hint: str = "") -> int:
    """A whole number of any type, as an int; InputError, with its name, for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name}={shown(value)} must be a whole number") from None
    if not least <= number <= most:
        limit = f"at least {least}" if number < least else f"at most {most}"
        raise InputError(f"{name}={shown(value)} must be {limit}{hint}")
    return number


def whole_numbers(name: str, ids: Any) -> list[int]:
    """A list of Python's ints, from integers of any library; InputError if they are not integers."""
    try:
        # tolist, because the elements of a tensor are tensors: operator.index turns a tensor of True into 1.
        found = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        if isinstance(ids, str | bytes | dict) or bool in map(type, found):
            raise TypeError
        return list(map(operator.index, found))
    except TypeError:
        raise InputError(f"{name} must be a list of token ids, whole numbers, not {shown(ids)}") from None


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def shown(value: object) -> str:
    """repr(value) in one line, cut short and shallow: a message must stay readable whatever a file holds."""
    try:
        return _short.repr(value).replace("\n", " ")
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"<{type(value).__name__}, too long to be shown>"


def some(items: Iterable[str], separator: str = ", ", longest: int = 200, most: int = 20) -> str:
    """The first items, long ones cut short, and how many more there are."""
    named = [item if len(item) <= longest else f"{item[:longest]}…" for item in items]
    rest = len(named) - most
    return separator.join(named[:most]) + (f" and {rest} more" if rest > 0 else "")


def either(values: Iterable[object]) -> str:
    """ "1, 2 or 4"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


# Lack of memory, as torch and other libraries say it where they have no class for it.
_LACK = re.compile(
    r"DefaultCPUAllocator: |alloc_cpu\(\) seems to have been called with negative number"
    r"|^Storage size calculation overflowed|^unable to mmap .*Cannot allocate memory"
    r"|^MPS backend out of memory|^(?:CUDA|HIP) error: (?:out of memory|CUBLAS_STATUS_ALLOC_FAILED)"
    r"|Cuda failure .*'out of memory'|^std::bad_alloc$|failed to map segment from shared object",
    re.DOTALL,
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception is lack of memory, on any device, and nothing else."""
    said = isinstance(error, RuntimeError | ImportError) and _LACK.search(str(error)) is not None
    by_number = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return said or by_number or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


# Files above these sizes are not read, so that a wrong file does not fill the memory. Releases are far below.
LARGEST_JSON = 2**24  # bytes. A published config.json has 1 KB, the largest index 0.2 MB
LARGEST_VOCABULARY = 2**26  # bytes. The published qwen.tiktoken has 2.6 MB
_GIT_LFS = b"version https://git-lfs"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def file_problem(path: str | Path, largest: float = math.inf) -> str | None:
    """Why a file cannot be read as any kind of input: a folder, a pipe, too large, …; None if it can."""
    try:
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):  # it may never end or never begin
            kind = _KINDS.get(stat.S_IFMT(there.st_mode), "a device")
            return f"cannot be read: it is {kind}, not a file"
        with open(path, "rb") as file:
            if file.read(len(_GIT_LFS)) == _GIT_LFS:
                return "a Git LFS pointer, not the file itself; run `git lfs pull` in the folder"
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        return f"cannot be read: {getattr(error, 'strerror', error)}"
    if there.st_size > largest:
        return f"larger than {int(largest) >> 20} MiB, the most that is read of such a file"
    return None


def read_bytes(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """The content of a file. ValueError, with its path, if it cannot be read or is larger than `largest`."""
    if problem := file_problem(path, largest):
        raise InputError(f"{str(path) or repr('')}: {problem}")
    return Path(path).read_bytes()


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON or gives a key two different values."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if twice := [name for name, value in pairs if found[name] is not value and found[name] != value]:
            raise InputError(f"{shown(twice[0])} is given twice, with different values")
        return found

    def number(digits: str) -> float:  # an integer too large for a float becomes an infinity, as 1e999 does
        return int(digits) if len(digits) < 309 else float(digits)

    try:
        return json.loads(content, parse_int=number, object_pairs_hook=unique)
    except RecursionError:
        raise InputError("it is nested too deeply") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, where there is none."""
    content = read_bytes(path)
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: holds a JSON {type(parsed).__name__}, not an object")
    return parsed
