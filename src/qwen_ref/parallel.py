"""Tensor parallelism by hand: the ranks, the two collectives between them, and the layers cut among them.

A rank is a process that shares a model with other processes; its number is also called its rank. Ranks
exchange tensors in collectives, which every rank must call. All-reduce: each rank gives a tensor, and all get
the sum. Gather: each rank gives a tensor, and one rank, or all, get them side by side. torch.distributed does
this for a process group: by gloo between CPUs, by nccl between GPUs.

A layer's weight W has shape (out, in), and y = x Wᵀ. There are two ways to cut it (Shoeybi et al. 2019,
section 3). Their names are those of the paper, which writes y = x A: a column of A is a row of our W.

    column-parallel  cuts the rows of W: each rank computes some of the outputs, from all of x
    row-parallel     cuts the columns of W: each rank reads some of the inputs; an all-reduce adds up

The output of a column-parallel layer is exactly the input that a row-parallel layer needs on the same rank.
So attention needs one all-reduce, and so does the MLP.

    embed                 rows of W: each rank knows some tokens → one all-reduce
    qkv → out             heads: rows of W in each third of qkv; columns of W in out → one all-reduce
    gate, up → down       channels: rows of W in gate and up; columns of W in down → one all-reduce
    lm_head               rows of W: each rank scores some tokens → one gather

With one rank every layer is a plain linear layer or look-up, and nothing is exchanged.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ref.config import InputError, lacks_memory, shown

_ANY_TEXT = ("utf-8", "surrogatepass")  # codes every str
# What gloo and the store say of a lost connection, where their errors have no class of their own.
_CONNECTION = re.compile(r"connection|timed? ?out|broken pipe|by peer", re.IGNORECASE)


class RankLost(ConnectionError):
    """Another rank is gone, or did not answer in time."""


class RankFailed(RuntimeError):
    """Another rank had an error that is not the user's; that rank raises the error itself."""


class Group:
    """The ranks that share one model: which of them this is, how many there are, and what they can do.

    Every rank must call the same methods in the same order. RankLost: another is gone, or comes too late.
    """

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size = rank, size
        # None: torch's default group. A reference to it keeps gloo's threads alive: the process would abort.
        self.process_group = process_group

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce: the sum of every rank's x, the same bits on all. x may be overwritten with it."""
        if self.size > 1:
            x = x.contiguous()
            with lost_ranks_named():
                dist.all_reduce(x, group=self.process_group)
        return x

    def share(self, rows: int) -> range:
        """Which of so many rows this rank has. Where they do not divide, the last rank has fewer."""
        each = -(-rows // self.size)
        return range(self.rank * each, min((self.rank + 1) * each, rows))

    def gather(self, x: Tensor, only_rank_0: bool = False, width: int | None = None) -> Tensor | None:
        """Every rank's x, side by side in the last dimension. only_rank_0: the other ranks get None.

        width: the size of the last dimension then, if the last rank's x may be narrower (see share).
        """
        if self.size == 1:
            return x
        if width is not None:  # a collective takes equal parts
            x = F.pad(x, (0, -(-width // self.size) - x.shape[-1]))
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size if self.rank == 0 or not only_rank_0 else 0)]
        with lost_ranks_named():
            if only_rank_0:  # torch asks for the number that rank 0 has in the default group
                first = 0 if self.process_group is None else dist.get_global_rank(self.process_group, 0)
                dist.gather(x, parts or None, first, self.process_group)
            else:
                dist.all_gather(parts, x, group=self.process_group)
        return torch.cat(parts, dim=-1)[..., :width] if parts else None

    def from_rank_0(self, x: Tensor) -> Tensor:
        """Returns rank 0's x on every rank. The other ranks pass a tensor of the same shape and dtype."""
        return self.sum(x if self.rank == 0 else torch.zeros_like(x))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag), device=self._device())) > 0)

    def texts(self, text: str) -> list[str]:
        """Every rank's text, in the order of the ranks."""
        if self.size == 1:
            return [text]
        ours = text.encode(*_ANY_TEXT)
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device())
        sizes[self.rank] = len(ours)
        longest = int(self.sum(sizes).max())
        rows = torch.zeros(self.size, max(longest, 1), dtype=torch.uint8, device=self._device())
        rows[self.rank, : len(ours)] = torch.tensor(list(ours), dtype=torch.uint8)
        every = zip(self.sum(rows).tolist() if longest else rows.tolist(), sizes.tolist(), strict=True)
        return [bytes(row[:size]).decode(*_ANY_TEXT) for row, size in every]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks run the `with` block. If it fails on one of them, all raise an error.

        If the user can do something about it (an InputError, an OSError, too little memory), all raise an
        InputError. Otherwise the rank that failed raises its own error, and the others raise RankFailed.
        """
        if self.size == 1:
            yield
            return
        cause, problem, users = None, "", True
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            users, text = isinstance(error, InputError | OSError) or lacks_memory(error), type(error).__name__
            text = f"{'' if users else text + ': '}{str(error) or text}"
            cause, problem = error, json.dumps((users, text))
        found = [(*json.loads(each), rank) for rank, each in enumerate(self.texts(problem)) if each]
        if not found:
            return
        its_users, text, rank = min(found, key=lambda each: each[0])  # False first: not the user's
        if its_users:
            raise InputError(f"rank {rank}: {text}") from cause
        if cause is not None and not users:
            raise cause
        raise RankFailed(f"rank {rank} failed: {text}") from cause

    def require_same(self, who: str, values: dict[str, Any]) -> None:
        """Raises ValueError on every rank if a value differs between ranks. who: names this rank's input."""
        if self.size == 1:
            return
        facts = [(f"{name} is {shown(value)}", _digest(value)) for name, value in values.items()]
        (first, wanted), *others = map(json.loads, self.texts(json.dumps((who, facts))))
        for rank, (other, given) in enumerate(others, start=1):
            for theirs, ours in zip(given, wanted, strict=False):
                if theirs[1] != ours[1]:
                    found = f"on rank {rank} {theirs[0]}, on rank 0 {ours[0]}; give every rank the same"
                    raise InputError(f"rank {rank} ({other}) and rank 0 ({first}) differ: {found}")

    def _device(self) -> str:
        """Where small messages travel: through the CPU if the process group has a way there."""
        return "cpu" if "cpu" in dist.get_backend_config(self.process_group) else "cuda"


def _digest(value: object) -> str:  # it tells values apart that are too long to be shown
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


ONE_RANK = Group(0, 1)


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this dtype faster than those of float32."""
    if dtype.itemsize > 2 or platform.machine() not in ("x86_64", "AMD64"):
        return True
    bfloat16 = any(getattr(torch.cpu, f"_is_{n}_supported", bool)() for n in ("avx512_bf16", "amx_tile"))
    found = torch.ops.mkldnn._is_mkldnn_fp16_supported() if dtype == torch.float16 else bfloat16
    return found and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias. Where the CPU has no products of the dtype, 32 rows and more are multiplied in float32."""
    trained = x.requires_grad or weight.requires_grad  # a buffer that is used again keeps nothing for them
    if x.device.type != "cpu" or x.numel() < 32 * x.shape[-1] or has_products(x.dtype) or trained:
        return F.linear(x, weight, bias)
    y = unrounded_linear(x, weight)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def unrounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in float32, also if x and W are narrower; in float64 if they are float64.

    torch has this product for CUDA only. Elsewhere some rows of W at a time are widened, into a buffer that
    stays in the processor's cache: W is still read from memory once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide:
        return F.linear(x, weight)
    if x.is_cuda:
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=wide).unflatten(0, x.shape[:-1])
    # 2 MB are the cache of a core. With many rows of x the products take longer, and fewer are faster.
    numbers = 2**19 if x.numel() < 32 * x.shape[-1] else 2**22
    rows, x = max(1, numbers // weight.shape[1]), x.to(wide)
    buffer = weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=wide)
    products = [F.linear(x, buffer[: len(part)].copy_(part)) for part in weight.split(rows)]
    return torch.cat(products, dim=-1)


class Linear(nn.Linear):
    """torch's linear layer, by the product above."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(Linear):
    """y = x Wᵀ for this rank's share of the outputs: W is (out / ranks, in), cut by rows."""

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features, out_features // group.size, bias=False)


class HeadParallelLinear(Linear):
    """The fused q, k, v of this rank's heads: x (…, D) → (…, 3 · H · K), [q, k, v] one after another.

    W has rows from each third of the published weight. If the whole were cut evenly, the first ranks would
    have queries only. With several ranks on the CPU, W is a view (3, H · K, D) of the mapped file.
    """

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features, out_features // group.size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight  # read once: each reading of a packed weight dequantises it
        if weight.ndim == 2:
            return linear(x, weight, self.bias)
        thirds = zip(weight, self.bias.chunk(3), strict=True)
        return torch.cat([linear(x, third, bias) for third, bias in thirds], dim=-1)


class RowParallelLinear(Linear):
    """y = Σ over the ranks of x Wᵀ for their shares of the inputs: W is (out, in / ranks), cut by columns.

    The ranks' parts are added in float32 and rounded once, so that more ranks do not round more. Qwen has no
    bias here; it would have to be added after the sum, or every rank would add it.
    """

    def __init__(self, in_features: int, out_features: int, group: Group) -> None:
        super().__init__(in_features // group.size, out_features, bias=False)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if self.group.size == 1:
            return super().forward(x)
        return self.group.sum(unrounded_linear(x, self.weight)).to(x.dtype)


class VocabularyParallelEmbedding(nn.Embedding):
    """A look-up of rows. This rank has (V / ranks, D) of them and gives 0 for the other ranks' tokens."""

    def __init__(self, vocab_size: int, size: int, group: Group) -> None:
        self.rows = group.share(vocab_size)
        super().__init__(len(self.rows), size)
        self.group = group

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.weight.device)
        if self.group.size == 1:
            return super().forward(ids)
        ours = ids - self.rows.start
        others = (ours < 0) | (ours >= self.num_embeddings)
        rows = super().forward(ours.masked_fill(others, 0)).masked_fill(others[..., None], 0)
        return self.group.sum(rows)  # exact in any dtype: all but one of the ranks add 0


class VocabularyParallelHead(Linear):
    """Logits x Wᵀ of this rank's share of the vocabulary, gathered: x (…, D) → (…, V)."""

    def __init__(self, size: int, vocab_size: int, group: Group) -> None:
        super().__init__(size, len(group.share(vocab_size)), bias=False)
        self.group, self.vocab_size = group, vocab_size

    def forward(self, x: Tensor, only_rank_0: bool = False) -> Any:
        """A Tensor. only_rank_0: for sampling, which rank 0 does; the other ranks get None."""
        return self.group.gather(super().forward(x), only_rank_0, self.vocab_size)


def group_size(group: str | dist.ProcessGroup | None) -> int:
    """How many ranks load_model's `group` means, without starting or asking any of them."""
    if group is None:
        return 1
    require_distributed()
    if group == "world" and not dist.is_initialized():
        if not os.environ.get("WORLD_SIZE", "").isdecimal():
            raise InputError('group="world" needs several processes: start them with torchrun')
        return int(os.environ["WORLD_SIZE"])
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError("this rank is not in the process group that it was given")
    if group == "world" or isinstance(group, dist.ProcessGroup):
        return dist.get_world_size(None if isinstance(group, str) else group)
    raise InputError(f'group must be None, "world" or a torch.distributed.ProcessGroup, not {group!r}')


def join(group: str | dist.ProcessGroup | None, device: str) -> Group:
    """The ranks that load_model's `group` means; the default process group is started where there is none."""
    if group_size(group) == 1:
        return ONE_RANK
    if group == "world" and not dist.is_initialized():
        start_process_group(device)
    ours = None if isinstance(group, str) or group is dist.group.WORLD else group
    atexit.unregister(_destroy_process_groups)  # once is enough
    atexit.register(_destroy_process_groups)
    return Group(dist.get_rank(ours), dist.get_world_size(ours), ours)


def start_process_group(device: str, timeout: float = 60.0, **where: Any) -> None:
    """torch's default process group: gloo for CPU tensors, nccl for CUDA's. A rank waits for timeout seconds.

    where: store, rank and world_size. By default torchrun's variables in the environment say where to meet.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} cannot be used: torch finds no CUDA device")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        with lost_ranks_named("the process group did not come about"):
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **where)
    except ValueError as error:
        raise InputError(f"{error}: start the ranks with torchrun, which sets all that they need") from None


def _destroy_process_groups() -> None:
    if dist.is_initialized():  # gloo's threads abort a process that ends without this
        dist.destroy_process_group()


def require_distributed() -> None:
    """Raises InputError where this torch was built without torch.distributed."""
    if not dist.is_available():
        raise InputError("several ranks need torch.distributed, which this build of torch does not have")


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed is a lost connection. Others, such as wrong shapes, are bugs."""
    return isinstance(error, dist.DistError) or _CONNECTION.search(str(error)) is not None


@contextlib.contextmanager
def lost_ranks_named(message: str = "another rank is gone or did not answer in time") -> Iterator[None]:
    """Turns the error of a lost connection into RankLost with the message; other errors pass unchanged."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLost(f"{message}: {(str(error).strip() or 'no reason given').splitlines()[0]}") from error
