"""Trains a byte-level BPE vocabulary on the text of tiny_corpus.py and writes it as a `qwen.tiktoken` file.

    python examples/make/train_tokenizer.py --vocabulary-size 2500 --output weights/qwen.tiktoken

Byte-pair encoding starts from the 256 single bytes and merges, again and again, the pair of neighbours seen
most often (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2).
"""

import argparse
import base64
import heapq
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex
from tiny_corpus import vocabulary_text

from qwen_ref.commands.cli import Parser, on_stdout, run, say
from qwen_ref.commands.files import make_folder, output_path, write_whole
from qwen_ref.config import InputError
from qwen_ref.tokenizer import PATTERN


def train(text: str, vocabulary_size: int) -> list[bytes]:
    """The tokens in order of rank: the 256 bytes, then the merges. Fewer than asked if no pair is seen twice.

    A pair is known by the bytes it makes, not by its two halves: the encoder too joins any two neighbours
    whose bytes together are a token, so ("ab", "c") and ("a", "bc") are one candidate.
    """
    pieces = Counter(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
    weights = list(pieces.values())
    words = [[bytes([byte]) for byte in piece.encode("utf-8")] for piece in pieces]

    count: Counter[bytes] = Counter()
    where: defaultdict[bytes, set[int]] = defaultdict(set)  # the words that hold, or once held, the pair
    for index, word in enumerate(words):
        for pair in neighbours(word):
            count[pair] += weights[index]
            where[pair].add(index)

    # The heap is never cleaned: an entry whose count is out of date is dropped when it comes up, since every
    # change pushes a new one. Ties go to the shorter pair, then to the smaller bytes: no run can differ.
    heap = [(-seen, len(pair), pair) for pair, seen in count.items()]
    heapq.heapify(heap)
    tokens = {bytes([byte]): None for byte in range(256)}
    while heap and len(tokens) < vocabulary_size:
        seen, _, merged = heapq.heappop(heap)
        if -seen != count[merged]:
            continue
        if -seen < 2:
            break
        tokens[merged] = None
        changed = set()
        for index in where.pop(merged):
            before = neighbours(words[index])
            words[index] = merge(words[index], merged)
            after = neighbours(words[index])
            for pair in before:
                count[pair] -= weights[index]
            for pair in after:
                count[pair] += weights[index]
                where[pair].add(index)
            changed.update(before, after)
        for pair in changed:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], len(pair), pair))
    return list(tokens)


def neighbours(word: list[bytes]) -> list[bytes]:
    pairs = [left + right for left, right in pairwise(word)]
    return [pair for pair in pairs if whole_characters_or_part_of_one(pair)]


def whole_characters_or_part_of_one(token: bytes) -> bool:
    # A token of one and a half characters would tie the end of a prompt to the first byte of what follows.
    if all(byte & 0b1100_0000 == 0b1000_0000 for byte in token[1:]):
        return True
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def merge(word: list[bytes], merged: bytes) -> list[bytes]:
    """merge([b"a", b"n", b"a", b"n"], b"an") -> [b"an", b"an"]"""
    result = []
    position = 0
    while position < len(word):
        if b"".join(word[position : position + 2]) == merged:
            result.append(merged)
            position += 2
        else:
            result.append(word[position])
            position += 1
    return result


def save(tokens: list[bytes], path: Path) -> None:
    """One token a line: base64 of its bytes, a space, its rank."""
    lines = [f"{base64.b64encode(token).decode('ascii')} {rank}\n" for rank, token in enumerate(tokens)]
    write_whole(path, "".join(lines))


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--vocabulary-size", type=int, default=2500, help="regular tokens (%(default)s)")
    made.add_argument("--output", type=Path, default=Path("weights/qwen.tiktoken"), help="(%(default)s)")
    return made


def command(arguments: argparse.Namespace) -> int:
    if arguments.vocabulary_size < 256:
        raise InputError(f"--vocabulary-size {arguments.vocabulary_size}: the single bytes alone are 256")
    make_folder(arguments.output.parent)
    output_path(arguments.output, "--output")
    tokens = train(vocabulary_text(), arguments.vocabulary_size)
    save(tokens, arguments.output)
    if len(tokens) < arguments.vocabulary_size:
        say("stopped early: no pair is left that occurs twice")
    print(on_stdout(f"{arguments.output}: {len(tokens)} tokens"))
    return 0


if __name__ == "__main__":
    sys.exit(run(parser(), command))
