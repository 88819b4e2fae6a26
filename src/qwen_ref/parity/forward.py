"""model.py's forward pass as a sequence of named steps, any of which can be changed from outside.

The parity kit asks what a port would compute if one step were another. So the pass is written once more,
flat, with a name for each step. Without changes it gives model.py's numbers, to the bit. It adds two things
that model.py has no use for: it can begin at any layer, and run many variants of a layer's output as one
batch.

The steps, in the order in which data flows, with their inputs (B rows, T positions, S = T keys):

    ids           ids (B, T)                        layers        the numbers of the layers, in their order
    positions     positions (B, T)                  frequencies   lengths of the prompts → (1 or B, K/2)
    embed         ids, W (V, D)
    source        a layer's number → the number of the layer whose weights it has
    attn_norm     x (B, T, D), w (D)
    qkv           h, W (3D, D), b (3D)
    q  k  v       (B, T, H, K) each: what they are before rotation
    rotate_q  rotate_k      (B, T, H, K), cos, sin
    scale_q       q (B, T, H, K), LogN's factors (1 or B, T) or None
    keys  values  (B, T, H, K): as the cache keeps them
    attend        q, k, v (B, H, T, K), which keys a query sees (T, S) or (B, 1, T, S), or None: causal
    out           h (B, T, D), W (D, D)
    attn_add      x, what attention adds
    mlp_norm      x, w
    gate  up      h, W (F, D)
    act           gate (B, T, F)
    product       up, act
    down          h (B, T, F), W (D, F)
    mlp_add       x, what the MLP adds
    norm          x, w
    logits        h, W (V, D)
    output        logits (B, T, V): what leaves the model
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_ref import model
from qwen_ref.parallel import linear
from qwen_ref.parity.stages import Checkpoint, Keep, head

# How a step is done instead: (the run, the step as it was, its inputs) → its value.
How = Callable[..., Any]
Hand = Callable[[str, Tensor], Tensor]  # (stage within a layer, its value) → the value to go on with
Given = Callable[[str], "Tensor | None"]


class Change(NamedTuple):
    """Another way to do a step, in some layers or in all."""

    step: str
    how: How
    layers: frozenset[int] | None = None  # None: in all


class Weights:
    """A checkpoint's weights in one dtype. They are kept if there is room, else read anew each time."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, keep: bool = True) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._kept: dict[str, Tensor] | None = {} if keep else None

    def __call__(self, name: str) -> Tensor:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        stored = self.checkpoint.weight(name)
        # Of the embedding only the rows in use are widened, of a head that is not kept some rows at a time.
        as_stored = name == "embed.weight" or (name == "lm_head.weight" and self._kept is None)
        weight = stored if as_stored else stored.to(self.dtype)
        if self._kept is not None:
            self._kept[name] = weight
        return weight


class Forward:
    """One run over one input, with changes."""

    def __init__(
        self,
        weights: Weights,
        ids: Tensor,
        padding: Tensor | None = None,
        prefill_length: int | None = None,
        prompt_length: int | None = None,
        changes: Iterable[Change] = (),
    ) -> None:
        """ids: (B, T). padding: (B,), on the left. prefill_length: positions of the first pass, all decoded
        after it. prompt_length: what NTK's α is computed from, with padding, if ids are the start of a text.
        """
        self.weights, self.dtype, self.config = weights, weights.dtype, weights.checkpoint.config
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.prefill_length = prefill_length or ids.shape[1]
        self.prompt_length = prompt_length or self.prefill_length
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self._changes = _by_step(changes)
        # What was computed while it was kept: a changed run takes it from here, up to its first change.
        self.keeps, self._same_so_far = False, False
        self._before: dict[tuple[int, str], Any] = {}
        self.layer = 0
        self.scale: float | None = None  # of the scores; None: 1/√K
        self.given: dict[str, tuple] = {}  # step → its inputs, where it was last done: a change may need them
        self.made: dict[object, Any] = {}  # what a change makes once for all layers
        self.ids = self.step("ids", _same, ids)
        self.T = self.ids.shape[1]
        positions = torch.arange(self.T)[None]  # (1, T)
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp(min=0)  # (B, T)
        self.positions = self.step("positions", _same, positions)
        self.frequencies = self.step("frequencies", self.right_frequencies, self.lengths)
        self.cos, self.sin = self.tables(self.positions)
        self.factors = self.logn(self.positions) if self.config.use_logn_attn else None
        self.sees: Tensor | None = None  # (B, 1, T, T); None: plainly causal
        if self.padding is not None:
            self.sees = model.causal_mask(self.T, self.T, self.padding, ids.device)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each row's prompt."""
        rows = [0] if self.padding is None else self.padding.tolist()
        return [max(self.prompt_length - pad, 1) for pad in rows]

    def right_frequencies(self, lengths: Sequence[int]) -> Tensor:
        return model.rotary_frequencies(self.config, lengths, self.wide)

    def tables(self, positions: Tensor, frequencies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin (1 or B, T, 1, K/2) for positions (1 or B, T)."""
        return model.rotation_tables(positions, self.frequencies if frequencies is None else frequencies)

    def logn(self, positions: Tensor) -> Tensor:
        return model.logn_scale(positions, self.config.seq_length, self.dtype)

    def own(self, name: str, layer: int | None = None) -> Tensor:
        """A weight of a layer, by default of the one under way."""
        return self.weights(f"blocks.{self.source if layer is None else layer}.{name}")

    def changed(self, changes: Iterable[Change]) -> Forward:
        """This run with changes to its layers, or to what comes after them."""
        run = copy.copy(self)
        run._changes = _by_step(changes)
        run.given, run.made = {}, {}
        run.keeps, run._same_so_far = False, True
        return run

    def step(self, name: str, right: Callable, *inputs: Any) -> Any:
        self.given[name] = inputs
        at = self.layer, name
        for layers, how in self._changes.get(name, ()):
            if layers is None or self.layer in layers:
                right, self._same_so_far = functools.partial(how, self, right), False
        if self._same_so_far and at in self._before:
            return self._before[at]
        value = right(*inputs)
        if self.keeps:
            self._before[at] = value
        return value

    # The parts

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(self.wide)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon)
        return normed.to(x.dtype) * weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    def start(self) -> Tensor:
        """The residual stream before the first layer (B, T, D)."""
        return self.step("embed", self.look_up, self.ids, self.weights("embed.weight"))

    def look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight).to(self.dtype)

    def block(self, x: Tensor, layer: int, hand: Hand | None = None) -> Tensor:
        """A layer: x (n·B, T, D) → (n·B, T, D), n variants side by side."""
        hand = hand or _go_on
        self.layer = layer
        self.source = source = self.step("source", _same, layer)
        self.x = x  # what the layer reads: a change may need it
        K, step, own = self.config.kv_channels, self.step, functools.partial(self.own, layer=source)
        tables = (self.cos, self.sin, self.factors, self.sees)
        cos, sin, factors, mask = (table if table is None else copies(table, len(x)) for table in tables)

        h = hand("attn_norm", step("attn_norm", self.norm, x, own("attn_norm.weight")))
        qkv = step("qkv", self.linear, h, own("attn.qkv.weight"), own("attn.qkv.bias"))
        q, k, v = qkv.unflatten(-1, (3, -1, K)).unbind(dim=2)  # (B, T, H, K) each
        q, k, v = (hand(f"attn.{part}", step(part, _same, x)) for part, x in (("q", q), ("k", k), ("v", v)))
        q = hand("attn.q_rotated", step("rotate_q", model.rotate, q, cos, sin))
        k = hand("attn.k_rotated", step("rotate_k", model.rotate, k, cos, sin))
        q = hand("attn.q_scaled", step("scale_q", _scale, q, factors))
        k, v = step("keys", _same, k), step("values", _same, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
        mixed = step("attend", self.attend, q, k, v, mask)  # (B, H, T, K)
        mixed = hand("attn.mixed", mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        out = hand("attn.out", step("out", self.linear, mixed, own("attn.out.weight")))
        x = hand("attn_residual", step("attn_add", torch.add, x, out))

        h = hand("mlp_norm", step("mlp_norm", self.norm, x, own("mlp_norm.weight")))
        gate = hand("mlp.gate", step("gate", self.linear, h, own("mlp.gate.weight")))
        up = hand("mlp.up", step("up", self.linear, h, own("mlp.up.weight")))
        product = hand("mlp.product", step("product", torch.mul, up, step("act", F.silu, gate)))
        down = hand("mlp.down", step("down", self.linear, product, own("mlp.down.weight")))
        return hand("residual", step("mlp_add", torch.add, x, down))

    def finish(self, x: Tensor, hand: Hand | None = None) -> Tensor:
        """The final norm and the output head: x (n·B, T, D) → logits (n·B, T, V)."""
        hand = hand or _go_on
        self.layer = self.config.num_hidden_layers
        h = hand("norm", self.step("norm", self.norm, x, self.weights("norm.weight")))
        logits = self.step("logits", head, h, self.weights("lm_head.weight"))
        return hand("logits", self.step("output", _same, logits))

    @property
    def layers(self) -> list[int]:
        return self.step("layers", list, range(self.config.num_hidden_layers))

    def run(self, keep: Keep, only: Sequence[str] | None = None, given: Given | None = None) -> None:
        """All of it; keep is called with each stage that is wanted, as Port.run does.

        given: a stage's name → its value, or None. Where there is one, the run goes on from it: what is kept
        is then what each step makes of another implementation's numbers.
        """
        wanted = None if only is None else set(only)

        def hand(stage: str, value: Tensor) -> Tensor:
            if wanted is None or stage in wanted:
                keep(stage, value.flatten(2), 0)
            instead = None if given is None else given(stage)
            return value if instead is None else instead.to(self.dtype).view_as(value)

        with torch.inference_mode():
            x = hand("embed", self.start())
            for number, layer in enumerate(self.layers):
                x = self.block(x, layer, _in_layer(number, hand))
            self.finish(x, hand)


def _in_layer(number: int, hand: Hand) -> Hand:
    return lambda stage, value: hand(f"blocks.{number}.{stage}", value)


def _by_step(changes: Iterable[Change]) -> dict[str, list[tuple[frozenset[int] | None, How]]]:
    found: dict[str, list[tuple[frozenset[int] | None, How]]] = {}
    for change in changes:
        found.setdefault(change.step, []).append((change.layers, change.how))
    return found


def copies(table: Tensor, rows: int) -> Tensor:
    """A table (1 or B, …) for as many rows as all variants that run side by side have."""
    return table if len(table) in (1, rows) else table.repeat(rows // len(table), *[1] * (table.ndim - 1))


def _same(value: Any) -> Any:
    return value


def _go_on(stage: str, value: Tensor) -> Tensor:
    return value


def _scale(q: Tensor, factors: Tensor | None) -> Tensor:
    """LogN: each query by the factor of its position."""
    return q if factors is None else q * factors[..., None, None]
