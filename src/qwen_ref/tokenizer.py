"""Qwen's tokenizer by hand: text → NFC → pieces, every digit its own → UTF-8 bytes, merged in pairs → ids.

    >>> tokenizer = Tokenizer.from_file("qwen.tiktoken")
    >>> tokenizer.encode("It's 2024")
    [2132, 594, 220, 17, 15, 17, 19]

The pieces here are `It`, `'s`, ` `, `2`, `0`, `2`, `4`. A piece that is a token is taken whole. Any other is
cut into single bytes; then the adjacent pair with the lowest rank is merged, until no adjacent pair is a
token. qwen_ref.Tokenizer is FastTokenizer of loading/tokenizer.py: it gives the same ids, faster.
"""

from __future__ import annotations

import base64
import codecs
import unicodedata
from collections.abc import Collection, Iterable
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex  # the standard library's re knows neither \p{L} nor Unicode's \s

from qwen_ref.config import LARGEST_VOCABULARY, InputError, read_bytes, shown, some, whole_numbers

# The published split pattern. \p{N} without a "+" is what makes every digit a piece of its own.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
SINGLE_BYTES = [bytes([value]) for value in range(256)]


class Tokenizer:
    """Text to ids and back, with the vocabulary of one qwen.tiktoken file.

    The special tokens' ids follow those of the file: in the published models <|endoftext|> is 151643.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        """tokens: the regular ones in the order of their ranks, distinct, every single byte among them."""
        tokens = list(tokens)
        self.special_ids = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.n_vocab = len(tokens) + len(SPECIAL_TOKENS)
        self._n_regular = len(tokens)
        self._bytes = tokens + [token.encode() for token in SPECIAL_TOKENS]
        self._ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(self._ranks) < len(tokens) or not self._ranks.keys() >= set(SINGLE_BYTES):
            raise InputError("tokens must be distinct and hold each of the 256 single bytes")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a qwen.tiktoken file: per line a token's bytes in base64, a space, its rank.

        Raises ValueError for bad base64, for gaps and duplicates, for missing single bytes.
        """
        return cls(read_ranks(path))

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of text. allowed_special: the special tokens that text may contain, or "all".

        Each of them becomes its one id. Any other is plain text: by default `<|endoftext|>` becomes ordinary
        tokens, so no input can forge one. Unpaired surrogates, which UTF-8 cannot hold, become U+FFFD as
        published. Raises ValueError for a name in allowed_special that is not a special token.
        """
        if not isinstance(text, str):
            raise InputError(f"text must be a str, not {shown(text)}")
        text = self._nfc(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text, self._allowed(allowed_special))

    def _encode(self, text: str, allowed: set[str]) -> list[int]:
        if not allowed:
            return self._encode_ordinary(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        separator = regex.compile("|".join(map(regex.escape, longest_first)))
        ids, start = [], 0
        for match in separator.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self.special_ids[match.group()])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids: their bytes joined, then decoded; bytes that are not valid UTF-8 become U+FFFD.

        Raises ValueError for ids without a token. The model has logits for such ids, as padding of V.
        """
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The exact bytes of ids."""
        ids = whole_numbers("ids", ids)
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise InputError(f"no token has id {shown(token)}; ids go from 0 to {self.n_vocab - 1}")
        end = self._n_regular if skip_special_tokens else self.n_vocab
        return b"".join(self._bytes[token] for token in ids if token < end)

    def _allowed(self, allowed_special: Collection[str]) -> set[str]:
        if isinstance(allowed_special, str) and allowed_special == "all":
            return set(SPECIAL_TOKENS)
        try:
            if isinstance(allowed_special, str | bytes):
                raise TypeError
            allowed = set(allowed_special)
        except TypeError:
            wanted = '"all" or a collection of tokens'
            raise InputError(f"allowed_special must be {wanted}, not {shown(allowed_special)}") from None
        if unknown := allowed - self.special_ids.keys():
            names = "<|endoftext|>, <|im_start|>, <|im_end|> and <|extra_0|> to <|extra_204|>"
            unknown_names = some(sorted(map(shown, unknown)), most=8)
            raise InputError(f"no special token is named {unknown_names}; there are {names}")
        return allowed

    def _encode_ordinary(self, text: str) -> list[int]:
        return [token for piece in split(text) for token in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        rank = self._ranks.get(piece.encode())
        return merge_pairs(piece.encode(), self._ranks) if rank is None else [rank]

    def _nfc(self, text: str) -> str:
        return unicodedata.normalize("NFC", text)


def split(text: str) -> list[str]:
    """The pieces of PATTERN.

    >>> split("It's 2024")
    ['It', "'s", ' ', '2', '0', '2', '4']
    """
    return regex.findall(PATTERN, text)


def merge_pairs(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding of one piece: merge the adjacent pair whose bytes have the lowest rank (the leftmost
    of equal ones), and repeat until no adjacent pair is a token. O(n log n): the pairs are in a heap.

    A part is identified by its start. After a merge, the heap still has entries for pairs that no longer
    exist. So an entry (rank, start, stop) counts only if two parts still cover exactly start to stop.
    """
    n = len(piece)
    end = list(range(1, n + 1))  # end[i]: of the part that starts at i; 0: no part starts at i any more
    before = list(range(-1, n - 1))  # before[i]: the start of the part to the left of the part at i
    heap = [(rank, i, i + 2) for i in range(n - 1) if (rank := ranks.get(piece[i : i + 2])) is not None]
    heapify(heap)
    while heap:
        _, left, stop = heappop(heap)
        right = end[left]
        if right == 0 or right == n or end[right] != stop:
            continue
        end[left], end[right] = stop, 0
        if stop < n:
            before[stop] = left
            if (rank := ranks.get(piece[left : end[stop]])) is not None:
                heappush(heap, (rank, left, end[stop]))
        if left > 0:
            start = before[left]
            if (rank := ranks.get(piece[start:stop])) is not None:
                heappush(heap, (rank, start, stop))
    ids, start = [], 0
    while start < n:
        ids.append(ranks[piece[start : end[start]]])
        start = end[start]
    return ids


class StreamDecoder:
    """Decodes token by token. Bytes wait until they form a whole character or are known to be invalid.

    All returned texts together are exactly `decode` of all ids. If the text itself has a U+FFFD, it is
    returned at once, like any other character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is complete after this token: often the token's text, sometimes still nothing."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token], self._skip))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for half a character, or nothing."""
        return self._utf8.decode(b"", final=True)


def read_ranks(path: str | Path) -> list[bytes]:
    """The tokens of a qwen.tiktoken file in the order of their ranks, which must be 0, 1, 2, …"""
    lines = [line.split() for line in read_bytes(path, LARGEST_VOCABULARY).splitlines() if line.strip()]
    try:
        tokens = {int(rank): base64.b64decode(encoded, validate=True) for encoded, rank in lines}
    except ValueError as error:
        raise InputError(f"{path}: a line is not a token in base64, a space and its rank: {error}") from None
    if tokens.keys() != set(range(len(lines))):
        raise InputError(f"{path}: {len(lines)} tokens need the ranks 0 to {len(lines) - 1}, each once")
    return [tokens[rank] for rank in range(len(lines))]
