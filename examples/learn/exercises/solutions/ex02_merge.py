"""Exercise 2, solved. qwen_ref/tokenizer.py, merge_pairs, does all steps, with a heap for long pieces."""

from itertools import pairwise


def merge_once(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    pairs = [left + right for left, right in pairwise(parts)]
    # Each entry begins with the rank and then the place, so that min takes the leftmost of equals.
    found = [(ranks[pair], i) for i, pair in enumerate(pairs) if pair in ranks]
    if not found:
        return parts
    _, i = min(found)
    return [*parts[:i], pairs[i], *parts[i + 2 :]]
