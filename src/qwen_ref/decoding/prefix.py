"""One cache for texts that begin alike, generated or scored: only what differs from the last is computed.

A chat's next context is its last one, the answer and a new question. The cache is rewound to the first
position where both texts differ: its length is moved back, and what stands behind is overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_ref.config import whole
from qwen_ref.decoding.lookup import Passes, generate_lookup
from qwen_ref.generate import Step, begun, checked_ids, generate
from qwen_ref.model import KVCache, Qwen, ntk_alpha


class PrefixCache:
    """`generate`, called again and again; each call reuses the keys and values of the text before.

    The tokens are those of `generate` without it, except for rounding: positions computed in other passes
    round differently. Dynamic NTK chooses its base by the length of the whole prompt: if a longer prompt has
    another base, nothing is kept. Memory grows with the texts. Several ranks use theirs alike.
    """

    def __init__(self, model: Qwen, draft_tokens: int = 0) -> None:
        """draft_tokens: above 0 the loop is generate_lookup, which guesses so many tokens at most."""
        self.model = model
        self.draft_tokens = draft_tokens
        self.passes = Passes()  # what the last text took, if it was generate_lookup's
        self.kept = 0  # positions of the last prompt that were in the cache before
        self._cache: KVCache | None = None
        self._room = 0  # positions that its tensors take
        self._ids: list[int] = []  # the first cache.length of them are in the cache
        self._steps: Generator[Step] | None = None

    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int = 64, **settings: Any
    ) -> Generator[Step]:
        """Takes the arguments of qwen_ref.generate.generate, except `cache`; or those of generate_lookup.

        There is one text at a time: an iterator that is still running ends with the next call.
        """
        prompt_ids = checked_ids(prompt_ids, self.model.config.vocab_size)
        cache = self.rewind(prompt_ids, len(prompt_ids) + whole("max_new_tokens", max_new_tokens) - 1)
        self.passes = Passes()
        if self.draft_tokens > 0:
            settings |= {"draft_tokens": self.draft_tokens, "passes": self.passes}
            steps = generate_lookup(self.model, prompt_ids, max_new_tokens, **settings, cache=cache)
        else:
            steps = generate(self.model, prompt_ids, max_new_tokens, **settings, cache=cache)

        def watched() -> Generator[Step | None]:
            try:
                with contextlib.closing(steps):
                    yield None  # see begun
                    for step in steps:
                        self._ids.append(step.token)
                        yield step
                        self.make_room(min(cache.length + 1 + self.draft_tokens, cache.max_length))
            except ValueError:  # logits that are not finite; the keys and values may not be finite either
                self._cache = None
                raise

        self._steps = begun(watched())
        return self._steps

    def rewind(self, prompt_ids: list[int], length: int, prompt_length: int | None = None) -> KVCache:
        """A cache for up to `length` positions that already holds the common beginning of the prompt.

        The caller appends the rest of the prompt, at least its last token. prompt_length: the length that
        fixes dynamic NTK's base, if it is not the prompt's.
        """
        if self._steps is not None:
            self._steps.close()  # it would continue on the changed cache
        prompt_length = prompt_length or len(prompt_ids)
        self.kept, cache = 0, self._cache
        if cache is None or not self._same_base(cache.prompt_length, prompt_length):
            cache = self._cache = None  # its memory is needed for the next one
            with self.model.group.together():
                cache = self.model.new_cache(1, len(prompt_ids))
            cache.prompt_length = prompt_length
            self._room = _allocated(cache, len(prompt_ids))
            self._cache = cache
        else:
            # The last token's logits are wanted. The cache may hold guesses that nobody has taken, and the
            # last token, which it would not hold without guesses: then the same positions are computed again.
            held = min(cache.length, len(self._ids) - (self.draft_tokens > 0), len(prompt_ids) - 1)
            while self.kept < held and self._ids[self.kept] == prompt_ids[self.kept]:
                self.kept += 1
            cache.length = self.kept  # before _ids: an interruption in between must leave them in agreement
        self._ids = list(prompt_ids)
        cache.max_length, cache.prompt_length = length, prompt_length
        self.make_room(len(prompt_ids))
        return cache

    @torch.inference_mode(False)  # what is made in inference mode cannot be written to outside of it
    def make_room(self, positions: int) -> None:
        """Widens the cache for so many positions, to twice what it took before, or to all that it will need.

        So a long chat copies each position a few times only, and a short one takes little memory.
        """
        cache = self._cache
        if cache is None or positions <= self._room:
            return
        self._cache = None  # if memory does not suffice, some layers are widened, others not: it is dropped
        room = max(positions, min(2 * self._room, cache.max_length))
        before, self._room = self._room, _allocated(cache, room)
        for held in vars(cache).values():
            if isinstance(held, list) and isinstance(held[0], Tensor):  # of each layer (B, H, positions, …)
                for layer, x in enumerate(held):
                    more = x.shape[2] * self._room // before - x.shape[2]
                    held[layer] = torch.cat((x, x.new_empty(*x.shape[:2], more, *x.shape[3:])), dim=2)
        self._cache = cache

    def _same_base(self, before: int | None, now: int) -> bool:
        config = self.model.config
        if not config.use_dynamic_ntk:
            return True
        assert before is not None
        return ntk_alpha(before, config.seq_length) == ntk_alpha(now, config.seq_length)


def _allocated(cache: KVCache, positions: int) -> int:
    """The positions that a cache's tensors have if it was made for so many: a FastCache has whole blocks."""
    block = getattr(cache, "BLOCK", 1)
    return -(-positions // block) * block
