"""What else a model might have said: the likeliest tokens of each step, and the scores of the prompt.

The loops yield tokens and drop the logits. Here hooks of the model look at its logits while they exist. So a
text costs no second pass, and it has the same bits as without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_ref.generate import Step
from qwen_ref.model import Qwen
from qwen_ref.sampling import check_finite

_LOGITS = 2**24  # of the prompt, at a time: 64 MB in float32


class Scored(NamedTuple):
    """A token of a text: its log-probability given those before it, and the likeliest tokens in its place.

    The first token of a text has neither.
    """

    token: int
    logprob: float | None
    likeliest: list[tuple[int, float]]  # ids and log-probabilities, the likeliest first


class Alternatives:
    """Scores what a model is given and what it generates, while it is in a `with` block.

    It is for one text at a time. Several ranks use theirs alike; rank 0 has the results.

    >>> with Alternatives(model, top=5, prompt_ids=ids) as alternatives:
    ...     steps = list(alternatives.watch(generate(model, ids)))
    >>> alternatives.prompt, alternatives.steps
    """

    def __init__(self, model: Qwen, top: int, prompt_ids: Sequence[int] = ()) -> None:
        """top: how many likeliest tokens. prompt_ids: the prompt, if its tokens are to be scored."""
        self.prompt = [Scored(token, None, []) for token in prompt_ids[:1]]
        self.steps: list[Scored] = []
        self._model, self._top = model, top
        self._unseen = list(prompt_ids[1:])  # tokens of the prompt that are not scored yet
        self._rows: Iterator[list[tuple[int, float]]] = iter(())  # of the steps that come next

    def __enter__(self) -> Alternatives:
        model = self._model
        self._hooks = [
            model.norm.register_forward_hook(self._see_states),
            model.lm_head.register_forward_hook(self._see_logits),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Passes the steps of a loop on and scores them."""
        for step in steps:
            self.steps.append(Scored(*step, next(self._rows) if self._top > 0 else []))
            yield step

    def _see_logits(self, _module: Any, _inputs: Any, logits: Tensor | None) -> None:
        # A pass that checks guesses (lookup.py) has several rows: the first ones are those of the next steps.
        if logits is not None and self._top > 0:
            self._rows = iter(self._likeliest(logits))

    def _see_states(self, _module: Any, _inputs: Any, states: Tensor) -> None:
        """The states of a pass (1, T, D): the first passes are the prompt's, and position t scores t + 1."""
        group = self._model.group
        targets, self._unseen = self._unseen[: states.shape[1]], self._unseen[states.shape[1] :]
        at = max(_LOGITS // self._model.config.vocab_size, 1)
        for some in states[0, : len(targets)].split(at) if targets else ():
            tokens, targets = targets[:at], targets[at:]
            logits = self._model.lm_head.forward(some, only_rank_0=True)  # past the hook; (n, V)
            with group.together():
                if logits is not None:
                    check_finite(logits)
                    wide = _wide(logits)
                    chosen = wide.gather(1, torch.tensor(tokens, device=wide.device)[:, None])[:, 0]
                    logprobs = (chosen - wide.logsumexp(dim=-1)).tolist()
                    self.prompt += map(Scored, tokens, logprobs, self._likeliest(logits))

    def _likeliest(self, logits: Tensor) -> list[list[tuple[int, float]]]:
        """The likeliest tokens of each row of logits (n, V)."""
        wide = _wide(logits)
        values, ids = wide.topk(self._top, dim=-1)
        logprobs = values - wide.logsumexp(dim=-1, keepdim=True)
        return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
