"""Exercise 1: text → pieces. Why "2024" is four tokens to Qwen."""

import unicodedata

import regex  # like re, but it knows \p{L}, the letters of all scripts, and \p{N}, the numbers

# The pieces are found by alternatives: at each place of the text the first one that fits takes its piece.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"  # the 's of it's; words
THE_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation; line ends; spaces


def split_text(text: str) -> list[str]:
    r"""The pieces of text, inside which byte pairs are merged (exercise 2); joined they are the text again.

    Two things happen, in this order:
    1. The text gets Unicode's form NFC: one spelling for what looks the same. "é" may be one character or
       two, "e" and an accent; NFC is the one.
    2. It is taken apart by three alternatives: WORDS, then one for numbers, then THE_REST. The one for
       numbers is yours: in Qwen every number character is a piece of its own.

    Source: Bai et al. 2023 (the Qwen report), section 2.2; Unicode Standard Annex 15 for NFC.
    In Python: unicodedata.normalize, regex.findall; alternatives are joined by "|".

    >>> split_text("It's 2024")
    ['It', "'s", ' ', '2', '0', '2', '4']
    >>> split_text("half: ½")
    ['half', ':', ' ', '½']
    """
    raise NotImplementedError  # your code in the place of this line
