"""Exercise 1: text → pieces. Why "2024" is four tokens to Qwen."""

import unicodedata

import regex  # like re, but it knows \p{L}, the letters of all scripts, and \p{N}, the numbers

# A pattern of alternatives finds the pieces: at each place of the text, the first alternative that fits wins.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"  # the 's of it's; words
THE_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation; line ends; spaces


def split_text(text: str) -> list[str]:
    r"""The pieces of a text. Exercise 2 merges byte pairs inside each piece. Joined, the pieces are the text.

    Two steps, in this order:
    1. Bring the text into Unicode's form NFC, which has one spelling for what looks the same. "é" may be one
       character or two, "e" and an accent; in NFC it is one.
    2. Take the text apart by three alternatives: WORDS, then one for numbers, then THE_REST. You write the
       one for numbers: in Qwen every number character is a piece by itself.

    Source: Bai et al. 2023 (the Qwen report), section 2.2; Unicode Standard Annex 15 for NFC.
    In Python: unicodedata.normalize, regex.findall; alternatives are joined by "|".

    >>> split_text("It's 2024")
    ['It', "'s", ' ', '2', '0', '2', '4']
    >>> split_text("half: ½")
    ['half', ':', ' ', '½']
    """
    raise NotImplementedError  # replace this line by your code
