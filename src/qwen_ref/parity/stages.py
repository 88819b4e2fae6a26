"""Runs the model and hands over every stage, by hooks and wrappers that are there only while it runs.

A Port is an implementation of Qwen. It is this one until a mistake is made in it (mistakes.py). Each matrix
is read from the checkpoint when it is needed, and dropped after use. So a model larger than the memory can
run, in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qwen_ref.model
from qwen_ref.checkpoint import DTYPES, NoInitialisation, compute_dtype, dtype_name, tensor_table
from qwen_ref.commands.cli import out_of_memory
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.loading.loader import check_values, open_checkpoint
from qwen_ref.model import Block, KVCache, Qwen, RMSNorm
from qwen_ref.parallel import linear

Keep = Callable[[str, Tensor, int], None]  # (stage, its value (B, t, …), the first of its t positions)

# The most bytes of the output head that are widened at once: that of the 72B takes 10 GB in float64.
_HEAD_BYTES = 2**30


# The functions of model.py that a mistake may change.
_FUNCTIONS = ("rotate", "rotation_tables", "rotary_frequencies", "ntk_alpha", "logn_scale", "causal_mask")


class Checkpoint:
    """An opened checkpoint folder: its configuration, and its weights by our names, as they are stored."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config, self.stored = open_checkpoint(folder)
        check_values(folder, self.stored)
        self._published = {spec.name: spec.published for spec in tensor_table(self.config)}
        self.bytes = sum(stored.nbytes for stored in self.stored.values())

    def weight(self, name: str) -> Tensor:
        """A weight: a view of the mapped file, or dequantised."""
        return self.stored[self._published[name]].read()

    def dtype(self, name: str) -> str:
        """The name of the dtype to compute in, also for "auto"; ValueError for an unknown one."""
        return dtype_name(compute_dtype(name, self.stored))


class Port:
    """One implementation and one input, with everything that a mistake may change.

    Its functions have their names in model.py, or in torch.nn.functional: silu, scaled_dot_product_attention.
    `normalise` is RMSNorm's forward.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        ids: Tensor,
        mask: Tensor | None = None,
        prefill_length: int | None = None,
    ) -> None:
        """ids, mask: (B, T). prefill_length: positions of the first pass; each later one is a decode step."""
        self.config = checkpoint.config
        self.weight: Callable[[str], Tensor] = checkpoint.weight
        self.dtype = DTYPES[dtype]
        self.ids, self.mask = ids, mask
        self.prefill_length = prefill_length or ids.shape[1]
        self.stepwise = True  # False: one pass over all positions, which computes the same
        self.saturates = False  # True: numbers beyond float16's range become its largest, in any dtype
        self.cached = True  # False: every step computes all positions again
        self.progress: Callable[[int], None] | None = None  # called with the bytes just read

        model = qwen_ref.model
        self.rotate: Callable[..., Tensor] = model.rotate
        self.rotation_tables: Callable[..., tuple[Tensor, Tensor]] = model.rotation_tables
        self.rotary_frequencies: Callable[..., Tensor] = model.rotary_frequencies
        self.ntk_alpha: Callable[..., int] = model.ntk_alpha
        self.logn_scale: Callable[..., Tensor] = model.logn_scale
        self.causal_mask: Callable[..., Tensor] = model.causal_mask
        self.normalise: Callable[..., Tensor] = RMSNorm.forward
        self.silu: Callable[..., Tensor] = F.silu
        self.scaled_dot_product_attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    @property
    def padding(self) -> Tensor:
        """How many columns of each row are padding → (B,)."""
        return self.ids.new_zeros(len(self.ids)) if self.mask is None else (self.mask == 0).sum(dim=-1)

    def fix_alpha(self, length: int) -> None:
        """Dynamic NTK's α is that of a prompt of this length, for every row."""
        frequencies = self.rotary_frequencies
        self.rotary_frequencies = lambda config, lengths, dtype: frequencies(
            config, [length] * len(lengths), dtype
        )

    def read(self, name: str) -> Tensor:
        """A weight; progress hears of it."""
        weight = self.weight(name)
        if self.progress is not None:
            self.progress(weight.nbytes)
        return weight

    def saturated(self, x: Tensor) -> Tensor:
        if not self.saturates or not x.is_floating_point():
            return x
        limit = torch.finfo(torch.float16).max
        return x.clamp(-limit, limit)

    def run(self, keep: Keep, only: Sequence[str] | None = None, greedy: int = 0) -> Tensor:
        """Computes all positions, then `greedy` more tokens; returns the ids (B, T).

        keep: called with each stage when it is computed. only: the stages that are wanted, by default all.
        While it runs, functions of qwen_ref.model are replaced in the whole process: no other port and no
        other model may run beside it.
        """
        model, head = _empty_model(self.config, self.dtype)
        head.port = self
        B, T = self.ids.shape
        with self._in_place(), torch.inference_mode(), torch.device("cpu"):
            if not self.cached:
                return self._uncached(model, keep, only)
            first = self.prefill_length if self.stepwise else T
            cache = None
            if self.prefill_length < T + greedy:
                shape = (B, self.config.num_attention_heads, T + greedy, self.config.kv_channels)
                like = torch.empty(0, dtype=self.dtype, device="cpu")
                try:
                    cache = KVCache(self.config.num_hidden_layers, shape, self.prefill_length, like)
                except RuntimeError as error:
                    if out_of_memory(error) is None:
                        raise
                    problem = f"a cache of {B} × {T + greedy} positions does not fit into memory"
                    raise InputError(problem) from None
            calls = [self.ids[:, :first], *(self.ids[:, i : i + 1] for i in range(first, T))]
            start = 0
            for step in range(len(calls) + greedy):
                call = calls[step]
                mask = None if self.mask is None or step > 0 else self.mask[:, : call.shape[1]]
                with _captured(model, keep, only, start):
                    logits = model(call, mask, cache)
                start += call.shape[1]
                if start >= T:
                    calls.append(logits[:, -1:].argmax(dim=-1))
        return torch.cat(calls[:-1], dim=1)

    def read_out(self, residual: Tensor) -> Tensor:
        """The final norm and the output head on any layer's residual stream: (…, D) → (…, V)."""
        norm = RMSNorm(self.config.hidden_size, self.config.layer_norm_epsilon)
        norm.weight = nn.Parameter(self.read("norm.weight").to(self.dtype), requires_grad=False)
        head = _Head()
        head.port = self
        with torch.inference_mode():
            return head(self.normalise(norm, residual))

    def _uncached(self, model: Qwen, keep: Keep, only: Sequence[str] | None) -> Tensor:
        for end in range(self.prefill_length, self.ids.shape[1] + 1):
            first = 0 if end == self.prefill_length else end - 1  # the position that is new

            def keep_new(stage: str, value: Tensor, _: int, first: int = first) -> None:
                keep(stage, value[:, first:], first)

            with _captured(model, keep_new, only, 0):
                model(self.ids[:, :end], None if self.mask is None else self.mask[:, :end])
        return self.ids

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Puts this port's functions into model.py while it runs."""
        functions = {name: getattr(self, name) for name in _FUNCTIONS}
        functions["F"] = _functional(self.silu, self.scaled_dot_product_attention)
        with _replaced(qwen_ref.model, functions), _replaced(RMSNorm, {"forward": self.normalise}):
            yield


def _functional(silu: Callable, scaled_dot_product_attention: Callable) -> SimpleNamespace:
    """What model.py calls of torch.nn.functional."""
    return SimpleNamespace(silu=silu, scaled_dot_product_attention=scaled_dot_product_attention)


@contextmanager
def _replaced(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@lru_cache(maxsize=4)
def _empty_model(config: QwenConfig, dtype: torch.dtype) -> tuple[Qwen, _Head]:
    """A model without weights, and its head: each module reads its own weights before it runs and drops them
    after. They are reused: only one port runs at a time, and building the modules takes as
    long as running a small model.
    """
    with torch.device("meta"), NoInitialisation():
        model, head = Qwen(config).to(dtype).eval(), _Head()
        model.add_module("lm_head", head)
    for name, module in model.named_modules():
        parameters = {key: value for key, value in module._parameters.items() if value is not None}
        if not parameters:
            continue

        module.qualified_name = name

        def fetch(module: nn.Module, inputs: tuple, keys: Sequence[str] = tuple(parameters)) -> tuple:
            for key in keys:
                weight = head.port.read(f"{module.qualified_name}.{key}")
                if module is not model.embed:  # of the embedding only the rows in use are widened
                    weight = weight.to(dtype)
                setattr(module, key, nn.Parameter(weight, requires_grad=False))
            return tuple(map(head.port.saturated, inputs))

        def drop(module: nn.Module, _: tuple, output: Tensor, empty: dict = parameters) -> Tensor:
            for key, parameter in empty.items():
                setattr(module, key, parameter)
            return head.port.saturated(output.to(dtype))

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    return model, head


class _Head(nn.Module):
    """The output head. It is used in slices if it must be widened."""

    port: Port

    def forward(self, x: Tensor) -> Tensor:
        weight = self.port.read("lm_head.weight")
        rows = len(weight)
        if weight.dtype != x.dtype:
            rows = max(_HEAD_BYTES // (weight.shape[1] * x.dtype.itemsize), 1)
        return torch.cat([linear(x, part.to(x.dtype), None) for part in weight.split(rows)], dim=-1)


@contextmanager
def _captured(model: Qwen, keep: Keep, only: Sequence[str] | None, start: int) -> Iterator[None]:
    """Inside the block, every stage that the model computes is handed to keep."""
    K = model.config.kv_channels
    layer, rotated = 0, 0  # rotate is called for a layer's queries, then for its keys
    wanted = None if only is None else set(only)

    def hand(stage: str, value: Tensor) -> None:
        if wanted is None or stage in wanted:
            keep(stage, value, start)

    def reads(stage: str) -> Callable:
        return lambda module, inputs: hand(stage, inputs[0])

    def gives(stage: str) -> Callable:
        return lambda module, inputs, output: hand(stage, output)

    def projected(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        thirds = output.unflatten(-1, (3, -1, K)).unbind(dim=2)  # (B, t, H, K) each
        for part, third in zip("qkv", thirds, strict=True):
            hand(f"blocks.{layer}.attn.{part}", third)

    def entered(number: int) -> Callable:
        def note(module: nn.Module, inputs: tuple) -> None:
            nonlocal layer, rotated
            layer, rotated = number, 0

        return note

    rotate, functional = qwen_ref.model.rotate, qwen_ref.model.F

    def keep_rotated(*args: Tensor) -> Tensor:
        nonlocal rotated
        turned = rotate(*args)
        hand(f"blocks.{layer}.attn.{'qk'[rotated]}_rotated", turned)
        rotated += 1
        return turned

    def keep_query(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hand(f"blocks.{layer}.attn.q_scaled", q.transpose(1, 2))
        return functional.scaled_dot_product_attention(q, *args, **kwargs)

    hooks = [
        model.embed.register_forward_hook(gives("embed")),
        model.norm.register_forward_hook(gives("norm")),
        model.lm_head.register_forward_hook(gives("logits")),
    ]
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        ours = f"blocks.{number}"
        hooks += [
            block.register_forward_pre_hook(entered(number)),
            block.attn_norm.register_forward_hook(gives(f"{ours}.attn_norm")),
            block.attn.qkv.register_forward_hook(projected),
            block.attn.out.register_forward_pre_hook(reads(f"{ours}.attn.mixed")),
            block.attn.out.register_forward_hook(gives(f"{ours}.attn.out")),
            block.mlp_norm.register_forward_pre_hook(reads(f"{ours}.attn_residual")),
            block.mlp_norm.register_forward_hook(gives(f"{ours}.mlp_norm")),
            block.mlp.gate.register_forward_hook(gives(f"{ours}.mlp.gate")),
            block.mlp.up.register_forward_hook(gives(f"{ours}.mlp.up")),
            block.mlp.down.register_forward_pre_hook(reads(f"{ours}.mlp.product")),
            block.mlp.down.register_forward_hook(gives(f"{ours}.mlp.down")),
            block.register_forward_hook(gives(f"{ours}.residual")),
        ]
    watched = _functional(functional.silu, keep_query)
    try:
        with _replaced(qwen_ref.model, {"rotate": keep_rotated, "F": watched}):
            yield
    finally:
        for hook in hooks:
            hook.remove()
