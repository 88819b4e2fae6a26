"""Exercise 1, solved. qwen_ref/tokenizer.py: Tokenizer.encode normalises, split takes apart."""

import unicodedata

import regex

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
THE_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_text(text: str) -> list[str]:
    # No "+" behind \p{N}: that alone makes every number character a piece. [0-9] would lose the ½.
    return regex.findall(rf"{WORDS}|\p{{N}}|{THE_REST}", unicodedata.normalize("NFC", text))
