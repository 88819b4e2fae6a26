"""Runs the model and hands over every stage, by hooks on one model that no other thread sees.

Each matrix is read from the checkpoint when it is needed, and dropped after use. So a model larger than the
memory can run, in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qwen_ref import model
from qwen_ref.checkpoint import (
    DTYPES,
    NoInitialisation,
    compute_dtype,
    dtype_name,
    read_headers,
    tensor_table,
)
from qwen_ref.commands.cli import out_of_memory
from qwen_ref.config import InputError
from qwen_ref.loading.files import weight_files
from qwen_ref.loading.hub import find_model
from qwen_ref.loading.loader import check_values, opened, say_notes
from qwen_ref.model import Attention, Block, KVCache, Positions, Qwen, RMSNorm
from qwen_ref.parallel import linear

Keep = Callable[[str, Tensor, int], None]  # (stage, its value (B, t, …), the first of its t positions)

# The most bytes of the output head that are widened at once: that of the 72B takes 10 GB in float64.
_HEAD_BYTES = 2**30


class Checkpoint:
    """An opened checkpoint: its configuration, and its weights by our names, as they are stored.

    folder: or a name as "Qwen/Qwen-1_8B" (loading/hub.py).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = find_model(folder).folder
        self.config, self.stored, notes = opened(folder)
        say_notes(notes)
        check_values(folder, self.stored)
        self._published = {spec.name: spec.published for spec in tensor_table(self.config)}
        self.bytes = sum(stored.nbytes for stored in self.stored.values())

    def weight(self, name: str) -> Tensor:
        """A weight: a view of the mapped file, or dequantised."""
        return self.stored[self._published[name]].read()

    def steps(self, name: str) -> Tensor | None:
        """Of a packed weight: the step between neighbouring values of each number. None for others."""
        packed = self.stored[self._published[name]].packed
        if packed is None:
            return None
        *_, scales, groups = (part.read() for part in packed.parts)
        return scales[groups.long()].t().float()  # (in, out) → (out, in)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a weight, or the first of its parts."""
        published = self._published[name]
        for path in weight_files(self.folder).paths:
            if any(tensor.startswith(published.removesuffix("weight")) for tensor in read_headers(path)):
                return path.name
        raise KeyError(name)

    def dtype(self, name: str) -> str:
        """The name of the dtype to compute in, also for "auto"; ValueError for an unknown one."""
        return dtype_name(compute_dtype(name, self.stored))


class Port:
    """This implementation and one input: what another implementation is held against.

    The model has no weights of its own: each module reads its weights before it runs and drops them after.
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
        self.config, self.checkpoint = checkpoint.config, checkpoint
        self.dtype = DTYPES[dtype]
        self.ids, self.mask = ids, mask
        self.prefill_length = prefill_length or ids.shape[1]
        self.stepwise = True  # False: one pass over all positions, which computes the same
        self.progress: Callable[[int], None] | None = None  # called with the bytes just read

    def read(self, name: str) -> Tensor:
        """A weight; progress hears of it."""
        weight = self.checkpoint.weight(name)
        if self.progress is not None:
            self.progress(weight.nbytes)
        return weight

    def run(self, keep: Keep, only: Sequence[str] | None = None, greedy: int = 0) -> Tensor:
        """Computes all positions, then `greedy` more tokens; returns the ids (B, T).

        keep: called with each stage when it is computed. only: the stages that are wanted, by default all.
        """
        B, T = self.ids.shape
        with torch.inference_mode(), torch.device("cpu"):
            model = self._model()
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
        with torch.inference_mode():
            return _Head(self)(norm(residual))

    def _model(self) -> Qwen:
        with torch.device("meta"), NoInitialisation():
            model = Qwen(self.config).to(self.dtype).eval()
            model.add_module("lm_head", _Head(self))
        for name, module in model.named_modules():
            parameters = {key: value for key, value in module._parameters.items() if value is not None}
            if parameters:
                self._stream(model, module, name, parameters)
        return model

    def _stream(self, model: Qwen, module: nn.Module, name: str, parameters: dict[str, nn.Parameter]) -> None:
        """Hooks that give a module its weights before it runs, and take them away after."""

        def fetch(module: nn.Module, inputs: tuple) -> None:
            for key in parameters:
                weight = self.read(f"{name}.{key}")
                if module is not model.embed:  # of the embedding only the rows in use are widened
                    weight = weight.to(self.dtype)
                setattr(module, key, nn.Parameter(weight, requires_grad=False))

        def drop(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            for key, parameter in parameters.items():
                setattr(module, key, parameter)
            return output.to(self.dtype)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)


class _Head(nn.Module):
    """The output head. It is used in slices if it must be widened."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self.port = port

    def forward(self, x: Tensor) -> Tensor:
        return head(x, self.port.read("lm_head.weight"))


def head(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of x (…, D) by a weight (V, D) of any dtype, of which some rows are widened at a time."""
    rows = len(weight)
    if weight.dtype != x.dtype:
        rows = max(_HEAD_BYTES // (weight.shape[1] * x.dtype.itemsize), 1)
    return torch.cat([linear(x, part.to(x.dtype), None) for part in weight.split(rows)], dim=-1)


@contextmanager
def _captured(model: Qwen, keep: Keep, only: Sequence[str] | None, start: int) -> Iterator[None]:
    """Inside the block, every stage that the model computes is handed to keep."""
    wanted = None if only is None else set(only)

    def hand(stage: str, value: Tensor) -> None:
        if wanted is None or stage in wanted:
            keep(stage, value, start)

    def reads(stage: str) -> Callable:
        return lambda module, inputs: hand(stage, inputs[0])

    def gives(stage: str) -> Callable:
        return lambda module, inputs, output: hand(stage, output)

    hooks = [
        model.embed.register_forward_hook(gives("embed")),
        model.norm.register_forward_hook(gives("norm")),
        model.lm_head.register_forward_hook(gives("logits")),
    ]
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        ours = f"blocks.{number}"
        hooks += [
            block.attn_norm.register_forward_hook(gives(f"{ours}.attn_norm")),
            *_inside_attention(block, ours, hand),
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
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for block in model.blocks:
            vars(block.attn).pop("mix", None)


def _inside_attention(block: Block, ours: str, hand: Callable[[str, Tensor], None]) -> list:
    """Hooks for q, k and v before and after rotation: the last come from this layer's own `mix`."""
    attention, K = block.attn, block.attn.head_size
    at: Positions
    queries: Tensor

    def enter(module: nn.Module, inputs: tuple) -> None:
        nonlocal at
        at = inputs[1]

    def project(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal queries
        thirds = output.unflatten(-1, (3, -1, K)).unbind(dim=2)  # (B, t, H, K) each
        queries = thirds[0]
        for part, third in zip("qkv", thirds, strict=True):
            hand(f"{ours}.attn.{part}", third)

    def mix(q: Tensor, k: Tensor, *rest: object) -> Tensor:
        scaled = q.transpose(1, 2)
        hand(
            f"{ours}.attn.q_rotated",
            scaled if at.query_scale is None else model.rotate(queries, at.cos, at.sin),
        )
        hand(f"{ours}.attn.k_rotated", k.transpose(1, 2))
        hand(f"{ours}.attn.q_scaled", scaled)
        return Attention.mix(attention, q, k, *cast(tuple, rest))

    vars(attention)["mix"] = mix
    return [attention.register_forward_pre_hook(enter), attention.qkv.register_forward_hook(project)]
