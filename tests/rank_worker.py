"""What every rank of a cut model computes, for tests/test_parallel.py.

Each rank writes its results into FOLDER: tensors to N.safetensors, and texts to N.json.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import GOLDEN, WEIGHTS
from golden_cases import FOLDERS, cases, logits, recorded_dtypes
from safetensors.torch import save_file
from torch import Tensor

from qwen_ref import Qwen, Tokenizer, load_model
from qwen_ref.chat.conversation import Conversation
from qwen_ref.checkpoint import StoredTensor, TensorSpec
from qwen_ref.config import InputError
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.generate import generate, generate_batch, generate_uncached
from qwen_ref.loading.launch import launched
from qwen_ref.parallel import Group

SAMPLED = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}
ERRORS: dict[str, Callable[[], Exception]] = {
    "a mistake": lambda: InputError("wrong \ud800"),
    "a disk": lambda: OSError("Input/output error"),
    "memory": lambda: MemoryError(),
    "memory of torch": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    "memory of a device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes"),
    "memory on Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: 8 bytes"),
    "a fault": lambda: ValueError("zip() argument 2 is shorter than argument 1"),
    "a shape": lambda: RuntimeError("shape mismatch"),
}
PROMPTS = [list(range(3, 20)), list(range(100, 105))]


def folders(ranks: int) -> tuple[str, ...]:
    """The golden models that so many ranks run: four, which share two cores, one of them."""
    return FOLDERS if ranks == 2 else ("ntk_logn",)


def cut_as_one_block(spec: TensorSpec, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """q, k and v as if they were one matrix: the first ranks get queries only."""
    if spec.cut == "heads":
        return whole.chunk(ranks)[rank].unflatten(0, (3, -1))
    return right_part(spec, whole, rank, ranks)


def cut_bias_as_one_block(spec: TensorSpec, whole: Tensor, rank: int, ranks: int) -> Tensor:
    return (cut_as_one_block if whole.ndim == 1 else right_part)(spec, whole, rank, ranks)


def leave_bias_whole(spec: TensorSpec, whole: Tensor, rank: int, ranks: int) -> Tensor:
    return whole if spec.cut == "heads" and whole.ndim == 1 else right_part(spec, whole, rank, ranks)


def cut_gate_in_reverse(spec: TensorSpec, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """gate and up cut differently: each channel's gate is another channel's."""
    return right_part(spec, whole, ranks - 1 - rank if ".gate." in spec.name else rank, ranks)


MISTAKES = {
    "qkv as one block": cut_as_one_block,
    "bias as one block": cut_bias_as_one_block,
    "bias not cut": leave_bias_whole,
    "gate unlike up": cut_gate_in_reverse,
}
right_part = TensorSpec.part


@contextmanager
def mistaken(part: Callable) -> Iterator[None]:
    TensorSpec.part = part
    try:
        yield
    finally:
        TensorSpec.part = right_part


@contextmanager
def disk_that_fails(fails: bool) -> Iterator[None]:
    """A tensor of the second layer can be read once, to be compared, and then no more."""
    read, times = StoredTensor.read, 0

    def once(tensor: StoredTensor) -> Tensor:
        nonlocal times
        times += tensor.published == "transformer.h.1.mlp.w1.weight"
        if fails and times == 2:
            raise OSError("Input/output error")
        return read(tensor)

    StoredTensor.read = once
    try:
        yield
    finally:
        StoredTensor.read = read


def padded_batch(qwen: Qwen) -> Tensor:
    """Two rows of unequal length: their prefill and four cached steps, of the tokens that are there."""
    rows = torch.tensor([[5, 17, 80, 3, 9, 200, 31, 7, 11, 12, 13], [0, 0, 0, 0, 42, 1, 255, 99, 14, 15, 16]])
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.inference_mode():
        cache = qwen.new_cache(2, 11)
        found = [qwen(rows[:, :7], attention_mask=mask, cache=cache)]
        found += [qwen(rows[:, t : t + 1], cache=cache) for t in range(7, 11)]
    return torch.cat(found, dim=1)[torch.cat((mask, torch.ones(2, 4)), dim=1).bool()]


def steps_of(loop: Callable, qwen: Qwen, **settings: object) -> list:
    return [[step.token, step.logprob] for step in loop(qwen, PROMPTS[0], max_new_tokens=12, **settings)]


def message(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def failure(group: Group, error: Exception | None) -> dict[str, object]:
    """What together raises where one rank has an error."""
    try:
        with group.together():
            if error is not None:
                raise error
    except Exception as raised:
        kinds = {"for the user": isinstance(raised, InputError), "its own": raised is error}
        traced = traceback.extract_tb(raised.__traceback__)[-1].line
        return {**kinds, "type": type(raised).__name__, "text": str(raised), "raised at": traced}
    return {}


def closed_at_once(qwen: Qwen, rank: int, leaver: int) -> dict[str, int]:
    """How many steps each kind of iterator yields where one rank closes its own before the first."""
    kept = PrefixCache(qwen)
    tokenizer = Tokenizer.from_file(WEIGHTS / "qwen.tiktoken")
    talk = Conversation(qwen, tokenizer, stop_ids=(), max_new_tokens=5)
    makers: dict[str, Callable[[], Iterator]] = {
        "generate": lambda: generate(qwen, PROMPTS[0], max_new_tokens=5),
        "generate_batch": lambda: generate_batch(qwen, PROMPTS, max_new_tokens=5),
        "generate_uncached": lambda: generate_uncached(qwen, PROMPTS[0], max_new_tokens=5),
        "generate_lookup": lambda: generate_lookup(qwen, PROMPTS[0], max_new_tokens=5),
        "prefix": lambda: kept.generate(PROMPTS[0], max_new_tokens=5),
        "conversation": lambda: talk.ask("?"),
    }
    found = {}
    for name, make in makers.items():
        steps = make()
        if rank == leaver:
            steps.close()  # and is kept
        found[name] = len(list(steps))
        if name.startswith("generate"):  # the others keep their iterators themselves
            found[f"{name}, dropped"] = 0 if rank == leaver and make() else len(list(make()))
    return found


def main(out: Path) -> None:
    tensors: dict[str, Tensor] = {}
    texts: dict[str, object] = {}

    def load(folder: str, dtype: str) -> Qwen:
        return load_model(GOLDEN / folder, dtype, group="world")

    for folder in folders(launched().size):
        for dtype in ("float64", *recorded_dtypes(folder)):
            qwen = load(folder, dtype)
            for case in cases(folder):
                tensors[f"{folder}.{dtype}.{case}"] = logits(qwen, folder, case)
            if folder != "long":
                tensors[f"{folder}.{dtype}.padded"] = padded_batch(qwen)
    rank, size = qwen.group.rank, qwen.group.size
    for name, part in MISTAKES.items():
        try:
            with mistaken(part):
                tensors[f"mistake.{name}"] = logits(
                    load("extended_base", "float32"), "extended_base", "prefill_17"
                )
        except (ValueError, RuntimeError) as error:
            texts[f"mistake.{name}"] = str(error)

    qwen = load("ntk_logn", "bfloat16")
    texts["parameters"] = {name: list(value.shape) for name, value in qwen.named_parameters()}
    texts["greedy"] = steps_of(generate, qwen)
    texts["seeded"] = steps_of(generate, qwen, seed=7, **SAMPLED)
    texts["unseeded"] = steps_of(generate, qwen, **SAMPLED)
    texts["uncached"] = steps_of(generate_uncached, qwen, seed=7, **SAMPLED)
    rows = generate_batch(qwen, PROMPTS, max_new_tokens=6, seed=7, **SAMPLED)
    texts["batch"] = [[step.token for step in row] for row in rows]
    for leaver in (0, size - 1):
        steps = []
        for step in generate(qwen, PROMPTS[0], max_new_tokens=12):
            steps.append([step.token, step.logprob])
            if rank == leaver and len(steps) == 4:
                break
        texts[f"rank {leaver} leaves"] = steps

    talker = load_model(WEIGHTS, "float32", group="world")
    for leaver in (0, size - 1):
        texts[f"rank {leaver} closes at once"] = closed_at_once(talker, rank, leaver)

    own = f"rank {rank}: \ud800 é \udcff\U0001f600" * (rank + 1)  # no characters, a name that is no UTF-8
    texts["every str"] = [text.encode("utf-8", "surrogatepass").hex() for text in qwen.group.texts(own)]
    texts["failures"] = {
        error: failure(qwen.group, make() if rank == 1 else None) for error, make in ERRORS.items()
    }
    both = ValueError("ours") if rank == 1 else InputError("the user's")
    texts["failures"]["one of ours among others"] = failure(qwen.group, both)

    texts["seeds differ"] = message(lambda: generate(qwen, PROMPTS[0], seed=rank // (size - 1), **SAMPLED))
    prompt = PROMPTS[rank > 0]
    texts["prompts differ"] = message(lambda: generate(qwen, prompt))
    late = [*range(100), rank // (size - 1)]  # too late to be shown
    texts["prompts differ late"] = message(lambda: generate(qwen, late))
    other = "long" if rank == 1 else "ntk_logn"
    texts["folders differ"] = message(lambda: load(other, "float32"))
    changed = out / "changed"
    texts["weights differ"] = message(
        lambda: load_model(changed if rank == 1 else GOLDEN / "ntk_logn", "float32", group="world")
    )
    texts["dtypes differ"] = message(lambda: load("ntk_logn", "float32" if rank else "bfloat16"))
    texts["folder missing"] = message(lambda: load("nowhere" if rank == 1 else "ntk_logn", "float32"))
    with disk_that_fails(rank == 1):
        texts["disk fails"] = message(lambda: load("ntk_logn", "float32"))
    world = load_model(GOLDEN / "ntk_logn", group=dist.group.WORLD)
    texts["world held"] = world.group.process_group is not None
    broken = load("ntk_logn", "float32")
    if rank == 1:
        broken.lm_head.weight[5] = torch.nan
    texts["not finite"] = message(lambda: steps_of(generate, broken))
    subgroup = dist.new_group([0, 1])
    if rank < 2:
        pair = load_model(GOLDEN / "ntk_logn", "float64", group=subgroup)
        tensors["subgroup"] = logits(pair, "ntk_logn", cases("ntk_logn")[0])

    save_file({name: value.contiguous() for name, value in tensors.items()}, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps(texts))
