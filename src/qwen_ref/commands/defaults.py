"""A folder's generation_config.json: the settings of the loop that its model was published with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from qwen_ref.commands.cli import say
from qwen_ref.config import InputError, read_json_object, shown
from qwen_ref.tokenizer import Tokenizer

_LARGEST_WINDOW = 2**24  # no Qwen comes near


class Defaults(NamedTuple):
    """What a folder's generation_config.json says; what it leaves out has the value that changes nothing.

    A folder that is greedy may hold anything for top_k and top_p: a wrong value counts as left out there.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    max_window_size: int | None


def read_defaults(folder: Path, tokenizer: Tokenizer) -> Defaults:
    """The generation_config.json of a folder, which may lack one; ValueError, naming it, for wrong values."""
    path = folder / "generation_config.json"
    raw = read_json_object(path) if os.path.lexists(path) else {}
    try:
        return _defaults(raw, tokenizer)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _defaults(raw: dict[str, Any], tokenizer: Tokenizer) -> Defaults:
    from qwen_ref.generate import Sampling, check_settings

    def value(name: str, default: Any, *kinds: type) -> Any:
        found = raw.get(name)
        if found is None:
            return default
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{name}={shown(found)} must be {wanted}")
        if float not in kinds and isinstance(found, int) and abs(found) >= 2**63:
            raise InputError(f"{name}={shown(found)} must be below 2**63")
        return found

    def of_sampling(name: str, default: float, *kinds: type) -> Any:
        """A value that greedy decoding does not read."""
        try:
            found = value(name, default, *kinds)
            if name == "top_k" and found == -1:  # so vLLM and others write "off"
                found = 0
            check_settings(1, Sampling(**{name: found}))
        except ValueError:
            if temperature != 0:
                raise
            return default
        return found

    def stop_text(word: list[int]) -> str:
        try:
            return tokenizer.decode_bytes(word).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"stop_words_ids: {shown(word)} are no whole characters") from None

    eos = value("eos_token_id", tokenizer.special_ids["<|endoftext|>"], int, list)
    words = [[token] for token in (eos if isinstance(eos, list) else [eos])]
    words += value("stop_words_ids", [], list)
    if value("chat_format", "raw", str) == "chatml":
        words += [[tokenizer.special_ids["<|im_start|>"]], [tokenizer.special_ids["<|im_end|>"]]]
    for word in words:
        ids = isinstance(word, list) and word and all(type(token) is int for token in word)
        if not ids or min(word) < 0 or max(word) >= tokenizer.n_vocab:
            allowed = f"ids from 0 to {tokenizer.n_vocab - 1}"
            raise InputError(f"eos_token_id and stop_words_ids must hold {allowed}, not {shown(word)}")
    _note_other_tokens([word[0] for word in words if len(word) == 1], tokenizer)
    temperature = 0.0
    if value("do_sample", False, bool):
        temperature = float(value("temperature", 1.0, int, float))
    defaults = Defaults(
        max_new_tokens=value("max_new_tokens", 64, int),
        temperature=temperature,
        top_k=of_sampling("top_k", 0, int),
        top_p=float(of_sampling("top_p", 1.0, int, float)),
        repetition_penalty=float(value("repetition_penalty", 1.0, int, float)),
        stop_ids=frozenset(word[0] for word in words if len(word) == 1),
        # A stop word of several ids is text that can also be spelled with other ids: it is matched as text.
        stop_texts=tuple(stop_text(word) for word in words if len(word) > 1),
        max_window_size=value("max_window_size", None, int),
    )
    check_settings(defaults.max_new_tokens, Sampling(*defaults[1:5]))
    window = defaults.max_window_size
    if window is not None and not 1 <= window <= _LARGEST_WINDOW:
        raise InputError(f"max_window_size={window} must be from 1 to {_LARGEST_WINDOW} tokens")
    return defaults


def _note_other_tokens(ends: list[int], tokenizer: Tokenizer) -> None:
    """Says so where no token that ends a text is a control token: the vocabulary may be another one's."""
    controls = {tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    other = [token for token in ends if token not in controls]
    if other:
        end = tokenizer.special_ids["<|endoftext|>"]
        say(
            f"note: a text ends at {other[0]}, which is {tokenizer.decode(other[:1])!r} by qwen.tiktoken, "
            f"while <|endoftext|> is {end}: is qwen.tiktoken another model's, or cut short?"
        )
