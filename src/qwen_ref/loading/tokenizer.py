"""A faster tokenizer, with the ids of tokenizer.py. Five things make it faster.

A vocabulary file in the usual form is read in half the time. The ids of a piece are remembered. Pieces are
found by the standard library's regular expressions, which take half the time. Long pieces of Chinese are cut
where no merge can cross, into parts that recur. Runs of combining marks, which Python normalises in quadratic
time, take linear time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import operator
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import regex

from qwen_ref.config import LARGEST_VOCABULARY, InputError, read_bytes
from qwen_ref.loading.hub import VOCABULARY, at_home, find_model, repository
from qwen_ref.tokenizer import PATTERN, SINGLE_BYTES, Tokenizer, merge_pairs, split

_REMEMBERED = 2**17  # entries of a memo: a few MB of mixed text hold about 70,000 distinct pieces
_LONGEST_REMEMBERED = 64  # characters; longer pieces hardly recur and would make the memory unbounded
# Characters that may be combining marks: \p{Cn} is what regex's Unicode does not know and Python's may.
# Every 16th character is looked at first: a run of 128 marks holds 8 of them.
_LONG_RUN, _LONG_RUN_SAMPLED = regex.compile(r"[\p{M}\p{Cn}]{128,}"), regex.compile(r"[\p{M}\p{Cn}]{8}")

_ESCAPED_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # what errors="surrogateescape" decodes to


class FastTokenizer(Tokenizer):
    """Tokenizer, with the same ids and the same methods.

    engine: "python", or "tiktoken" for that library's encoder, which is faster.
    """

    def __init__(self, tokens: Iterable[bytes], engine: str = "python") -> None:
        if engine not in ("python", "tiktoken"):
            raise InputError(f'engine {engine!r} is unknown; use "python" or "tiktoken"')
        super().__init__(tokens)
        self._tiktoken = None
        if engine == "tiktoken":
            import tiktoken

            self._tiktoken = tiktoken.Encoding(
                "qwen", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=self.special_ids
            )
        self._pieces = Memo(self._encode_piece)
        self._parts = Memo(self._merge)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._n_regular:,} tokens, {len(self.special_ids)} special ones)"

    @classmethod
    def from_file(
        cls, path: str | Path, engine: str = "python", *, revision: str | None = None
    ) -> FastTokenizer:
        """path: a qwen.tiktoken, the folder that it is in, or a name as "Qwen/Qwen-1_8B" (loading/hub.py).

        A name may also be followed by the file's: "Qwen/Qwen-1_8B/qwen.tiktoken". revision: the branch, the
        tag or the commit of a name. The ValueError for a file that is wrong names the line.
        """
        path = _vocabulary_file(path, revision)
        return cls(_tokens_if_canonical(path) or read_ranks(path), engine)

    def _nfc(self, text: str) -> str:
        return nfc(text)

    def _encode(self, text: str, allowed: set[str]) -> list[int]:
        if self._tiktoken is not None:
            # A ValueError: its regex engine gives up on a run of a million spaces. Ours does not.
            with contextlib.suppress(ValueError):
                return self._tiktoken.encode(text, allowed_special=allowed, disallowed_special=())
        return super()._encode(text, allowed)

    def _encode_ordinary(self, text: str) -> list[int]:
        # Characters beyond U+FFFF are two units of UTF-16. Asking so takes a tenth of a search for them.
        beyond_bmp = len(text.encode("utf-16-le", "surrogatepass")) > 2 * len(text)
        pieces = split(text) if beyond_bmp else _bmp_pattern().findall(text)
        return list(chain.from_iterable(map(self._pieces.__getitem__, pieces)))

    def _encode_piece(self, piece: str) -> list[int]:
        rank = self._ranks.get(piece.encode())
        if rank is not None:
            return [rank]
        if piece.isascii():
            return self._merge(piece)
        # Chinese is written without spaces: its pieces are clauses, which hardly recur, but their parts do.
        # A part is never looked up as a token at once: only a whole piece is.
        return list(chain.from_iterable(map(self._parts.__getitem__, self._seams.cut(piece))))

    def _merge(self, part: str) -> list[int]:
        return merge_pairs(part.encode(), self._ranks)

    @cached_property
    def _seams(self) -> _Seams:  # made when the first text needs it: it takes a look at every token
        return _Seams(self._ranks)


def read_ranks(path: str | Path) -> list[bytes]:
    """The tokens of a qwen.tiktoken file in the order of their ranks; a ValueError names the line"""
    tokens: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, LARGEST_VOCABULARY).splitlines(), 1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
            if not digits.isdigit():  # int() also accepts 1_0
                raise ValueError
        except ValueError:
            raise InputError(f"{at}: not a token in base64, a space and its rank: {line[:60]!r}") from None
        if rank in tokens:
            raise InputError(f"{at}: rank {rank} is given twice")
        if token in line_of:
            raise InputError(f"{at}: the token of line {line_of[token]} again, {token!r}")
        if not token:
            raise InputError(f"{at}: a token of no bytes")
        tokens[rank], line_of[token] = token, number
    if gaps := set(range(len(tokens))) - tokens.keys():
        ranks = f"{len(tokens)} tokens need the ranks 0 to {len(tokens) - 1}"
        raise InputError(f"{path}: no token has rank {min(gaps)}; {ranks}")
    if missing := [value for value, byte in enumerate(SINGLE_BYTES) if byte not in line_of]:
        named = ", ".join(f"0x{value:02x}" for value in missing[:8])
        problem = f"{len(missing)} of the 256 single bytes are no token: {named} …; is it cut short?"
        raise InputError(f"{path}: {problem}")
    return [tokens[rank] for rank in range(len(tokens))]


def _vocabulary_file(path: str | Path, revision: str | None) -> str | Path:
    """The file that is meant; the path itself where there is none, so that the message names it."""
    path = at_home(path)
    if (model := _model_of(path)) is not None:
        inside = find_model(model, revision, need=VOCABULARY).folder / VOCABULARY
        return inside if os.path.lexists(inside) else path
    if revision is not None:
        raise InputError(f"{path}: not the name of a model; leave the revision {revision} out")
    return path


def _model_of(path: str | Path) -> str | Path | None:
    """The folder or the repository that a path names, the latter alone or followed by the file's name."""
    if os.path.exists(path):
        return path if os.path.isdir(path) else None
    text = path.as_posix() if isinstance(path, Path) else path
    above, _, last = text.rpartition("/")
    model = above if last == VOCABULARY else text
    return None if model.endswith(".tiktoken") or repository(model) is None else model


def _tokens_if_canonical(path: str | Path) -> list[bytes] | None:
    """The tokens of a file without fault: it holds what they would be written as, in their order."""
    content = read_bytes(path, LARGEST_VOCABULARY)
    try:
        tokens = list(map(binascii.a2b_base64, content.split()[::2]))
    except ValueError:
        return None
    lines = (
        b"%s %d\n" % (binascii.b2a_base64(token, newline=False), rank) for rank, token in enumerate(tokens)
    )
    distinct = set(tokens)
    complete = len(distinct) == len(tokens) and b"" not in distinct and distinct >= set(SINGLE_BYTES)
    return tokens if complete and b"".join(lines) == content else None


class Memo(dict[str, Any]):
    """function(text), remembered; what is known costs one lookup. When it is full, it starts again."""

    def __init__(self, function: Callable[[str], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, text: str) -> Any:
        result = self._function(text)
        if len(text) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[text] = result
        return result


def nfc(text: str) -> str:
    """unicodedata.normalize("NFC", text), in linear time.

    Python sorts the combining marks behind a character by insertion: a run of them takes quadratic time
    unless it is in order already. Long runs are decomposed and sorted first, which does not change the
    normal form: neighbours of nonzero combining class by that class, equal ones in the order they have.
    """

    def in_canonical_order(marks: str) -> str:
        decomposed = "".join(unicodedata.normalize("NFD", mark) for mark in marks)
        runs = groupby(decomposed, lambda mark: unicodedata.combining(mark) > 0)
        return "".join(chain.from_iterable(sorted(run, key=unicodedata.combining) for _, run in runs))

    if _LONG_RUN_SAMPLED.search(text[::16]):
        text = _LONG_RUN.sub(lambda run: in_canonical_order(run.group()), text)
    return unicodedata.normalize("NFC", text)


@cache
def _bmp_pattern() -> re.Pattern[str]:
    """PATTERN for the standard library's re, which finds the same pieces in half the time that regex takes.

    re knows neither \\p{L} nor \\p{N}, and its \\s has four characters more. They are spelled out as regex
    has them, up to U+FFFF: re is slow with sets that go beyond.
    """
    plane = "".join(map(chr, range(0x10000)))

    def members(of: str) -> str:
        return "".join(
            f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in regex.findall(f"{of}+", plane)
        )

    L, N, S = members(r"\p{L}"), members(r"\p{N}"), members(r"\s")
    return re.compile(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{L}{N}]?[{L}]+|[{N}]| ?[^{S}{L}{N}]+[\r\n]*"
        rf"|[{S}]*[\r\n]+|[{S}]+(?![^{S}])|[{S}]+"
    )


class _Seams:
    """Where no merge can ever cross: between two characters of which no token holds any bytes together.

    What lies between two seams is encoded by itself with the same result: no merge in it touches another.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        ascii_characters = [chr(value) for value in range(128)]
        self._pairs = {left + right for left in ascii_characters for right in ascii_characters}
        self._lefts: set[str] = set()  # a token holds this character and the beginning of some next one
        self._rights: set[str] = set()  # a token holds this character and the end of some previous one
        ragged: list[bytes] = []  # tokens of the end of one character and the beginning of the next
        for token in tokens:
            if token.isascii():
                continue
            # Parts of characters decode to surrogates, one a byte; they only stand at a token's two ends.
            text = token.decode("utf-8", errors="surrogateescape")
            whole = text.strip(_ESCAPED_BYTES)
            self._pairs.update(map(operator.add, whole, whole[1:]))
            if whole and not text.startswith(whole):
                self._rights.add(whole[0])
            if whole and not text.endswith(whole):
                self._lefts.add(whole[-1])
            if not whole and any(byte >= 0xC0 for byte in token[1:]):
                ragged.append(token)
        self._ragged = re.compile(b"|".join(map(re.escape, ragged))) if ragged else None

    def cut(self, piece: str) -> Iterator[str]:
        """The parts of a piece."""
        if self._ragged and self._ragged.search(piece.encode()):
            yield piece
            return
        lefts, rights = self._lefts, self._rights
        start = 0
        inside_a_token = map(self._pairs.__contains__, map(operator.add, piece, piece[1:]))
        for position, inside in enumerate(inside_a_token, 1):
            if not inside and piece[position - 1] not in lefts and piece[position] not in rights:
                yield piece[start:position]
                start = position
        yield piece[start:]
