"""Exercise 2: bytes → tokens. One step of byte-pair encoding."""


def merge_once(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """One merge: of all adjacent pairs that together are a token, the one with the lowest rank becomes one.

    parts: a piece of text (exercise 1), cut somehow: at first into its single bytes.
    ranks: every token's bytes and its rank, which is its id. In training low ranks were found first.

    Of pairs with the same rank the leftmost is merged, and only that one. Where no pair is a token, the parts
    come back as they were: the piece is finished, and the ranks of its parts are its ids.

    Source: Sennrich et al. 2016, section 3.2, there on characters; Qwen does it on the bytes of UTF-8.

    >>> ranks = {b"l": 0, b"o": 1, b"w": 2, b"ow": 3, b"lo": 4, b"low": 5}
    >>> merge_once([b"l", b"o", b"w"], ranks)  # "lo" is a token, too, but "ow" has the lower rank
    [b'l', b'ow']
    >>> merge_once([b"l", b"ow"], ranks)
    [b'low']
    >>> merge_once([b"low"], ranks)
    [b'low']
    """
    raise NotImplementedError  # your code in the place of this line
