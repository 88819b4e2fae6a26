"""Exercise 2: bytes → tokens. One step of byte-pair encoding."""


def merge_once(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """One merge. Look at all adjacent pairs that together are a token; merge the pair with the lowest rank.

    parts: a piece of text (exercise 1), cut into parts. At first each part is a single byte.
    ranks: maps the bytes of each token to its rank, which is also its id. Training found low ranks first.

    If several pairs have the lowest rank, merge only the leftmost. If no pair is a token, return the parts
    unchanged: the piece is finished, and the ranks of its parts are its ids.

    Source: Sennrich et al. 2016, section 3.2, there on characters; Qwen does it on the bytes of UTF-8.

    >>> ranks = {b"l": 0, b"o": 1, b"w": 2, b"ow": 3, b"lo": 4, b"low": 5}
    >>> merge_once([b"l", b"o", b"w"], ranks)  # "lo" is a token, too, but "ow" has the lower rank
    [b'l', b'ow']
    >>> merge_once([b"l", b"ow"], ranks)
    [b'low']
    >>> merge_once([b"low"], ranks)
    [b'low']
    """
    raise NotImplementedError  # replace this line by your code
