"""What a person sees who tries things in a notebook: short reprs, and words for the usual slips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GOLDEN, WEIGHTS

import qwen_ref
from qwen_ref import InputError, Qwen, QwenConfig, Tokenizer, load_model
from qwen_ref.chat import Conversation
from qwen_ref.checkpoint import tensor_table
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import generate


@pytest.fixture(scope="module")
def model() -> Qwen:
    return load_model(GOLDEN / "ntk_logn")


def test_reprs_are_short_and_tell_sizes(model: Qwen) -> None:
    config = "QwenConfig(3 layers of 4 × 16, MLP 160, V 320, length 32)"
    assert repr(model.config) == config
    assert (
        repr(QwenConfig.preset("72b"))
        == "QwenConfig(80 layers of 64 × 128, MLP 24576, V 152064, length 32768)"
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(torch.Size(spec.shape).numel() for spec in tensor_table(model.config))
    assert repr(model) == f"Qwen({count:,} parameters, torch.float32 on cpu, {config})"
    cache = model.new_cache(2, 40)
    assert repr(cache) == "KVCache(0 of 40 positions, batch of 2, 3 layers, torch.float32)"
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache=cache)
    assert repr(cache) == "KVCache(3 of 40 positions, batch of 2, 3 layers, torch.float32)"
    tokenizer = Tokenizer.from_file(WEIGHTS / "qwen.tiktoken")
    assert repr(tokenizer) == "FastTokenizer(2,500 tokens, 208 special ones)"
    talk = Conversation(model, tokenizer, history=[("a", "b")])
    assert repr(talk) == f"Conversation(1 answered, {model!r})"


def test_a_fast_model_has_the_same_number_of_parameters(model: Qwen) -> None:
    fast = fasten(load_model(GOLDEN / "ntk_logn"), "int8")
    assert repr(fast) == repr(model)
    assert repr(fast.new_cache(1, 40)) == "FastCache(0 of 40 positions, batch of 1, 3 layers, torch.float32)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m([1, 2, 3]),
            r"must be a tensor, such as torch\.tensor\(\[ids\]\), not \[1, 2, 3\]",
        ),
        (lambda m: m([[1, 2]]), r"input_ids must be a tensor"),
        (lambda m: m([torch.tensor([1, 2])]), r"input_ids must be a tensor"),
        (lambda m: m("text"), r"input_ids must be a tensor, such as torch\.tensor\(\[ids\]\), not 'text'"),
        (lambda m: m(None), r"input_ids must be a tensor"),
        (
            lambda m: m(torch.tensor([1, 2])),
            r"\(batch, at least one token\), not torch\.int64 \(2,\)",
        ),
        (lambda m: m(torch.tensor([[1, 2]]), attention_mask=[[1, 1]]), r"attention_mask must be a tensor"),
        (lambda m: list(generate(m, "text")), "a prompt must be a list of token ids"),
        (lambda m: list(generate(m, [[1, 2]])), "a prompt must be a list of token ids"),
        (lambda m: list(generate(m, [1], top_k=-1)), r"top_k=-1 must be at least 0 \(0: no limit\)"),
        (
            lambda m: list(generate(m, [1], seed=-1)),
            r"seed=-1 must be at least 0 \(None: a new one each time\)",
        ),
    ],
)
def test_the_usual_slips_are_told_in_words(call: Callable[[Qwen], Any], message: str, model: Qwen) -> None:
    with pytest.raises(InputError, match=message):
        call(model)


def test_probabilities_say_what_no_limit_is() -> None:
    with pytest.raises(InputError, match=r"top_k=-1 must be at least 0 \(0: no limit\)"):
        qwen_ref.sampling.probabilities(torch.zeros(1, 3), torch.zeros(1, 0, dtype=torch.int64), top_k=-1)
