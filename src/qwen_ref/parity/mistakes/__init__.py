"""Every mistake that the kit tries; grammar.py says what a mistake is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

from qwen_ref.config import QwenConfig
from qwen_ref.parity.mistakes.attention import of_attention
from qwen_ref.parity.mistakes.choices import precisions
from qwen_ref.parity.mistakes.grammar import Mistake, Slip
from qwen_ref.parity.mistakes.matrices import of_matrices, of_quantising
from qwen_ref.parity.mistakes.mlp import anywhere, of_mlp, of_residual
from qwen_ref.parity.mistakes.norms import of_norms
from qwen_ref.parity.mistakes.outside import inputs, outside
from qwen_ref.parity.mistakes.rotation import of_logn, of_ntk, of_rotation


def mistakes(config: QwenConfig) -> list[Mistake]:
    """Every mistake and choice that is the same in all layers, or outside of them."""
    layered = [each.in_all() for each in slips(config)]
    found = [*layered, *outside(config), *inputs(config), *precisions(config)]
    needs = {"LogN": config.use_logn_attn, "NTK": config.use_dynamic_ntk}
    return [
        mistake
        for mistake in found
        if all(used or name not in mistake.text or "though" in mistake.text for name, used in needs.items())
    ]


def in_single_layers(config: QwenConfig, layers: Iterable[int]) -> Iterator[Mistake]:
    """Every slip in each of these layers alone."""
    needs = {"LogN": config.use_logn_attn, "NTK": config.use_dynamic_ntk}
    for each in slips(config):
        if each.alone and all(used for name, used in needs.items() if name in each.text):
            for layer in layers:
                yield each.in_layer(layer)


@functools.lru_cache(maxsize=4)
def slips(config: QwenConfig) -> tuple[Slip, ...]:
    """Every slip within a layer: the common ones, then by turns one of each part of the model."""
    parts = [of_rotation, of_logn, of_ntk, of_norms, of_matrices, of_attention, of_mlp, of_residual]
    groups = [list(part(config)) for part in parts]
    common = [slip for group in groups for slip in group if slip.common]
    turns = itertools.zip_longest(*([slip for slip in group if not slip.common] for group in groups))
    rare = [slip for turn in turns for slip in turn if slip is not None]
    return (*common, *rare, *anywhere(), *of_quantising(config))
