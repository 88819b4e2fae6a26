"""Runs the forward pass with one mistake after another, and measures how far each leaves a port.

Most mistakes are soon ruled out. So a screening comes first: only the logits, and only the positions up to
the first that the port has wrong. A mistake in layer N is run from layer N on, from the reference's own
residual stream; what follows behind its last changed layer is done for many mistakes as one batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qwen_ref.checkpoint import DTYPES
from qwen_ref.fast.kernels import memory_left
from qwen_ref.model import ntk_alpha
from qwen_ref.parity.bundle import Bundle
from qwen_ref.parity.compare import Measure, same_columns
from qwen_ref.parity.forward import Change, Forward, Given, Weights
from qwen_ref.parity.mistakes.grammar import NONE, Mistake
from qwen_ref.parity.recording import Keep, Work, held_against
from qwen_ref.parity.stages import Checkpoint

_BATCH = 2**23  # numbers of the residual stream of all mistakes that run side by side
_WIDENED = 2**24  # numbers of logits that are compared at once


class Trials:
    """Everything that the runs on one bundle's input share."""

    def __init__(self, checkpoint: Checkpoint, theirs: Bundle, base: Sequence[Change], work: Work) -> None:
        """base: changes that every run has: the rounding that the bundle declares."""
        self.checkpoint, self.theirs, self.base, self.work = checkpoint, theirs, tuple(base), work
        self.config = checkpoint.config
        self.ids = theirs.input_ids
        self.padding = (~theirs.real).sum(dim=-1)
        self._weights: dict[torch.dtype, Weights] = {}
        self.room = memory_left() / 2
        self.count = 0

    def weights(self, dtype: torch.dtype) -> Weights:
        """The checkpoint in a dtype, kept if it takes less than half of the memory that is left."""
        if dtype not in self._weights:
            sizes = self.checkpoint.stored.values()
            size = sum(math.prod(each.shape) for each in sizes) * dtype.itemsize
            kept = size < self.room
            self.room -= size if kept else 0
            self._weights[dtype] = Weights(self.checkpoint, dtype, kept)
        return self._weights[dtype]

    def run(
        self, mistake: Mistake, dtype: str | None = None, length: int | None = None, plain: bool = False
    ) -> Run:
        """A run with a mistake. dtype: if not the mistake's or the port's. length: of positions, if not all.
        plain: without the rounding that the bundle declares.
        """
        dtype = dtype or mistake.dtype or self.theirs.computed_in
        base = () if plain or dtype == "float64" else self.base
        return Run(self, mistake, DTYPES[dtype], base, length)

    def measure(self, mistake: Mistake) -> Measure:
        """Of every stage of the port, over all positions."""
        self.count += 1
        self.work.did(self.checkpoint.bytes)
        return held_against(self.run(mistake), self.theirs, text=False)

    def measure_steps(self) -> Measure:
        """Of each stage that the port has: what the step makes of the port's own numbers before it."""
        measure = Measure(self.theirs.input_ids, self.theirs.real, text=False)
        stages = set(self.theirs.stages)

        def keep(stage: str, value: Tensor, start: int) -> None:
            measure.add(stage, *same_columns(self.theirs.stage(stage), value), start)

        given = lambda stage: self.theirs.stage(stage) if stage in stages - {"logits"} else None  # noqa: E731
        self.run(NONE).run(keep, self.theirs.stages, given)
        return measure

    # Screening

    def screen(self, mistakes: Iterable[Mistake], length: int) -> dict[str, float]:
        """Each mistake's residual at the logits, over the first positions: a relative RMS error."""
        found: dict[str, float] = {}
        groups: dict[tuple[int, torch.dtype], list[Mistake]] = {}
        for mistake in mistakes:
            dtype = DTYPES[mistake.dtype or self.theirs.computed_in]
            to = self.ids.shape[1] if mistake.whole else length
            if mistake.put_before is not None or mistake.uncached or mistake.sized:
                found[mistake.text] = self._alone(mistake, length)
            else:
                groups.setdefault((to, dtype), []).append(mistake)
        for (to, dtype), group in groups.items():
            for part in self._parts(group, to):
                found |= self._side_by_side(part, to, length, dtype)
        self.count += len(found)
        return found

    def _parts(self, mistakes: list[Mistake], length: int) -> Iterator[list[Mistake]]:
        """As many as fit side by side; those that end in the same layer together."""
        size = max(_BATCH // (len(self.ids) * length * self.config.hidden_size), 1)
        mistakes = sorted(mistakes, key=lambda mistake: mistake.span(self.config.num_hidden_layers)[1])
        for start in range(0, len(mistakes), size):
            yield mistakes[start : start + size]

    def _alone(self, mistake: Mistake, length: int) -> float:
        kept: list[Tensor] = []
        self.run(mistake, length=length).run(lambda stage, value, start: kept.append(value), ["logits"])
        return self._residuals(torch.cat(kept, dim=1)[None], length)[0]

    def _side_by_side(
        self, mistakes: list[Mistake], to: int, length: int, dtype: torch.dtype
    ) -> dict[str, float]:
        """Each mistake's own layers are run for it alone, those behind them for all at once."""
        L, found = self.config.num_hidden_layers, {}
        with torch.inference_mode():
            plain = self._forward(dtype, to, self.base)
            plain.keeps = self._numbers(to) * dtype.itemsize < self.room / 4
            streams = [plain.start()]
            for layer in range(L):
                streams.append(plain.block(streams[-1], layer))
            plain.keeps = False
            waiting: dict[int, list[tuple[str, Tensor]]] = {}  # layer → what goes on there without changes
            for mistake in mistakes:
                self.work.did(self.checkpoint.bytes)
                first, last = mistake.span(L)
                first = min(first, L - 1)  # what follows the layers may need the last one's steps
                changes = (*self.base, *mistake.changes)
                run = self._forward(dtype, to, changes) if mistake.at_start else plain.changed(changes)
                x = streams[first] if first > 0 else run.start()
                for layer in run.layers if mistake.at_start else range(max(first, 0), min(last + 1, L)):
                    x = run.block(x, layer)
                if last == L:
                    found[mistake.text] = self._residuals(run.finish(x)[None], length)[0]
                else:
                    waiting.setdefault(last + 1, []).append((mistake.text, x))
            return found | self._together(plain, waiting, length)

    def _together(
        self, plain: Forward, waiting: dict[int, list[tuple[str, Tensor]]], length: int
    ) -> dict[str, float]:
        L, B = self.config.num_hidden_layers, len(self.ids)
        texts: list[str] = []
        parts: list[Tensor] = []
        for layer in range(L + 1):
            texts += [text for text, _ in waiting.get(layer, [])]
            parts += [x for _, x in waiting.get(layer, [])]
            if layer < L and parts:
                parts = [plain.block(torch.cat(parts), layer)]
        found: dict[str, float] = {}
        if parts:
            x = torch.cat(parts)[:, :length]
            size = max(_WIDENED // (B * length * self.config.vocab_size), 1)
            for start in range(0, len(texts), size):
                logits = plain.finish(x[start * B : (start + size) * B]).unflatten(0, (-1, B))
                names = texts[start : start + size]
                found |= dict(zip(names, self._residuals(logits, length), strict=True))
        return found

    def _numbers(self, length: int) -> int:
        """That all steps of a run give."""
        D, F = self.config.hidden_size, self.config.mlp_width
        return self.ids[:, :length].numel() * self.config.num_hidden_layers * (14 * D + 4 * F)

    def has_room_for_scores(self) -> bool:
        """Whether the scores of all heads fit into memory: another mask or softmax writes them out."""
        B, T = self.ids.shape
        return 4 * B * self.config.num_attention_heads * T * T * 4 < self.room

    def _forward(self, dtype: torch.dtype, length: int, changes: Iterable[Change]) -> Forward:
        prefill = self.theirs.prefill_length
        return Forward(
            self.weights(dtype), self.ids[:, :length], self.padding, min(prefill, length), prefill, changes
        )

    def _residuals(self, logits: Tensor, length: int) -> list[float]:
        """Of logits (n, B, T, V): each one's relative RMS error against the port's."""
        theirs = self.theirs.stage("logits")[:, :length]
        ours = logits[:, :, :length, : theirs.shape[-1]]
        real = self.theirs.real[:, :length]
        ours, theirs = ours[:, real], theirs[real]  # (n, tokens, V)
        if math.prod(ours.shape) > 2**22:  # float32 is exact enough, and takes half the memory
            ours, theirs = ours.float(), theirs.float()
        else:
            ours, theirs = ours.double(), theirs.double()
        scale = ours.square().mean(dim=(1, 2)).sqrt()
        found = (ours - theirs).square().mean(dim=(1, 2)).sqrt() / scale
        return found.nan_to_num(math.inf).tolist()


@dataclasses.dataclass
class Run:
    """One run with a mistake, that hands over stages as a Port does."""

    trials: Trials
    mistake: Mistake
    dtype: torch.dtype
    base: tuple[Change, ...]
    length: int | None = None

    def run(self, keep: Keep, only: Sequence[str] | None = None, given: Given | None = None) -> None:
        mistake, trials = self.mistake, self.trials
        ids = trials.ids[:, : self.length]
        changes = (*self.base, *mistake.changes)
        prompt = trials.theirs.prefill_length
        prefill = min(prompt, ids.shape[1])
        weights = trials.weights(self.dtype)
        if mistake.put_before is not None:
            token = torch.full_like(ids[:, :1], mistake.put_before)
            run = Forward(weights, torch.cat((token, ids), dim=1), None, prefill + 1, prompt + 1, changes)
            shown = slice(0, -1) if mistake.shown_first else slice(1, None)
            run.run(lambda stage, value, start: keep(stage, value[:, shown], start), only)
            return
        if not mistake.uncached:
            Forward(weights, ids, trials.padding, prefill, prompt, changes).run(keep, only, given)
            return
        # Every decode step was a prefill: its α holds for all that it computes.
        ends = [prompt, *range(prompt + 1, ids.shape[1] + 1)]
        kept: dict[str, list[Tensor]] = {}
        start = 0
        for number, end in enumerate(ends):
            following = ends[number + 1] if number + 1 < len(ends) else None
            if following is not None and self._alphas(end) == self._alphas(following):
                continue
            here = min(end, ids.shape[1])
            run = Forward(weights, ids[:, :here], trials.padding, min(prefill, here), end, changes)
            run.run(functools.partial(_append, kept, start), only)
            start = here
        for stage, parts in kept.items():
            keep(stage, torch.cat(parts, dim=1), 0)

    def _alphas(self, length: int) -> list[int]:
        seq_length = self.trials.config.seq_length
        return [ntk_alpha(max(length - pad, 1), seq_length) for pad in self.trials.padding.tolist()]


def _append(kept: dict[str, list[Tensor]], first: int, stage: str, value: Tensor, start: int) -> None:
    kept.setdefault(stage, []).append(value[:, first:])
