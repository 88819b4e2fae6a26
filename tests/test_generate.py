"""The loop: cached equals uncached, a batch equals its rows, seeds repeat, stops cut where they should."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GOLDEN
from golden_cases import model

from qwen_ref import Tokenizer, load_model
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.decoding.streaming import TextStream
from qwen_ref.generate import Step, generate, generate_batch, generate_uncached
from qwen_ref.perplexity import scoring as perplexity
from qwen_ref.tokenizer import SPECIAL_TOKENS

FOLDERS = ("extended_base", "ntk_logn")
SAMPLED = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 11}


def prompt(length: int) -> list[int]:
    return torch.randint(320, (length,)).tolist()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("parameters", [{}, {"repetition_penalty": 1.3}, SAMPLED], ids=str)
def test_the_cached_loop_gives_what_the_obvious_one_gives(folder: str, parameters: dict) -> None:
    qwen, ids = model(folder, "float64"), prompt(40)
    cached = list(generate(qwen, ids, max_new_tokens=30, **parameters))
    obvious = list(generate_uncached(qwen, ids, max_new_tokens=30, **parameters))
    assert [step.token for step in cached] == [step.token for step in obvious]
    for one, other in zip(cached, obvious, strict=True):
        assert math.isclose(one.logprob, other.logprob, rel_tol=1e-11)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("parameters", [{}, SAMPLED], ids=str)
def test_a_row_of_a_batch_is_what_its_prompt_gives_alone(folder: str, parameters: dict) -> None:
    qwen, prompts = model(folder, "float64"), [prompt(length) for length in (3, 40, 70)]
    seed = parameters.get("seed")
    alone = [
        list(
            generate(qwen, ids, max_new_tokens=12, **{**parameters, **({"seed": seed + row} if seed else {})})
        )
        for row, ids in enumerate(prompts)
    ]
    together = list(zip(*generate_batch(qwen, prompts, max_new_tokens=12, **parameters), strict=True))
    for row, steps in enumerate(together):
        assert [step.token for step in steps] == [step.token for step in alone[row]]
        for one, other in zip(steps, alone[row], strict=True):
            assert math.isclose(one.logprob, other.logprob, rel_tol=1e-11)


def test_rows_of_a_batch_end_by_themselves() -> None:
    qwen, prompts = model("extended_base", "float32"), [prompt(5), prompt(9)]
    free = list(zip(*generate_batch(qwen, prompts, max_new_tokens=12), strict=True))
    stop = free[0][3].token
    ends = [next((n for n, step in enumerate(row) if step.token == stop), 11) for row in free]
    rows = list(generate_batch(qwen, prompts, max_new_tokens=12, stop_ids=[stop]))
    assert len(rows) == max(ends) + 1
    for row, end in enumerate(ends):
        assert [steps[row] for steps in rows] == [*free[row][: end + 1], *[None] * (len(rows) - end - 1)]


def test_the_same_seed_repeats_and_another_does_not() -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)

    def sampled(seed: int | None) -> list[Step]:
        return list(generate(qwen, ids, max_new_tokens=20, temperature=2.0, seed=seed))

    assert sampled(5) == sampled(5)  # also the log-probabilities: the same calls of the same kernels
    assert sampled(5) != sampled(6)
    assert sampled(None) != sampled(None)


def test_draws_follow_the_probabilities() -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)
    with torch.inference_mode():
        expected = qwen(torch.tensor([ids]))[0, -1].softmax(dim=-1)
    first = [next(generate(qwen, ids, 1, temperature=1.0, seed=seed)).token for seed in range(2000)]
    counts = torch.bincount(torch.tensor(first), minlength=320) / 2000
    # The total variation distance of 2,000 draws from their own distribution of 320 values is about 0.14
    # (measured for torch.multinomial itself); a greedy or a uniform draw has more than 0.3.
    assert (counts - expected).abs().sum() / 2 < 0.2


def test_log_probabilities_are_the_models_own_whatever_is_sampled() -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)
    step = next(generate(qwen, ids, 1, **SAMPLED))
    with torch.inference_mode():
        expected = qwen(torch.tensor([ids]))[0, -1].log_softmax(dim=-1)[step.token]
    assert math.isclose(step.logprob, float(expected), rel_tol=1e-5)


def test_logits_are_only_computed_where_a_token_is_drawn() -> None:
    qwen, seen = model("extended_base", "float32"), []
    hook = qwen.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    list(generate(qwen, prompt(50), max_new_tokens=3))
    hook.remove()
    assert seen == [(1, 320)] * 3


def test_a_stop_id_is_the_last_token() -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)
    free = [step.token for step in generate(qwen, ids, max_new_tokens=20)]
    stop = free[5]
    stopped = [step.token for step in generate(qwen, ids, max_new_tokens=20, stop_ids={stop})]
    assert stopped == free[: free.index(stop) + 1]


@pytest.mark.parametrize(
    ("ids", "parameters", "message"),
    [
        ([], {}, "no tokens"),
        ([1, 320], {}, "token id 320 is outside the vocabulary, 0 to 319"),
        ([-1], {}, "token id -1"),
        ([1.0], {}, "a prompt must be a list of token ids, whole numbers"),
        ("1", {}, "a prompt must be a list of token ids, whole numbers"),
        (None, {}, "a prompt must be a list of token ids"),
        ([True, False], {}, "a prompt must be a list of token ids"),
        (torch.tensor([True, True]), {}, "a prompt must be a list of token ids"),
        (b"ab", {}, "a prompt must be a list of token ids"),
        ({1: 2}, {}, "a prompt must be a list of token ids"),
        ([1], {"temperature": "1"}, "temperature='1' must be a number"),
        ([1], {"top_p": None}, "top_p=None must be a number"),
        ([1], {"top_k": True}, "top_k=True must be a whole number"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([1], {"max_new_tokens": 2**30}, "a cache of 1 × 1073741824 positions takes"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_p": 2.0}, "top_p=2.0"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 2**63}, "seed="),
        ([1], {"seed": 1.0}, "seed=1.0 must be a whole number"),
        ([1], {"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number"),
        ([1], {"max_new_tokens": 10**300}, "max_new_tokens=1000.*0 must be at most"),
        ([1], {"top_k": 10**300}, "top_k=1000.*0 must be at most"),
    ],
)
def test_bad_input_is_refused_at_once(ids: object, parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model("extended_base", "float32"), ids, **parameters)  # before the first step is asked for
    if "positions" not in message:
        with pytest.raises(ValueError, match=message):
            next(generate_uncached(model("extended_base", "float32"), ids, **parameters))


def test_ids_may_come_as_any_integers_and_stops_as_any_collection() -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)
    plain = list(generate(qwen, ids, max_new_tokens=4))
    for same in (tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy(), iter(ids)):
        assert list(generate(qwen, same, max_new_tokens=4)) == plain
    assert list(generate(qwen, ids, max_new_tokens=4, stop_ids=iter([plain[1].token]))) == plain[:2]


@pytest.mark.parametrize("wrong", ["12", 12, [1.5], ["a"], None])
@pytest.mark.parametrize("loop", [generate, generate_uncached, generate_lookup])
def test_stops_that_are_no_collection_of_ids_are_refused(loop, wrong: object) -> None:
    with pytest.raises(ValueError, match="stop_ids must be a list of token ids"):
        next(loop(model("extended_base", "float32"), [1, 2], stop_ids=wrong))


@pytest.mark.parametrize("loop", [generate, generate_uncached, generate_lookup])
def test_an_iterator_of_stops_is_read_once(loop) -> None:
    qwen, ids = model("extended_base", "float32"), prompt(9)
    plain = list(generate(qwen, ids, max_new_tokens=6))
    third = next(n for n, step in enumerate(plain) if n >= 2 and step not in plain[:n])
    found = list(loop(qwen, ids, max_new_tokens=6, stop_ids=iter([plain[third].token])))
    assert [step.token for step in found] == [step.token for step in plain[: third + 1]]


def test_a_cache_with_padding_is_gone_on_with_where_it_fits_the_prompts() -> None:
    qwen, prompts = model("ntk_logn", "float64"), [prompt(3), prompt(5)]
    cache = qwen.new_cache(2, 40)
    steps = list(zip(*generate_batch(qwen, prompts, max_new_tokens=4, cache=cache), strict=True))
    longer = [[*ids, *(step.token for step in row), 7, 8] for ids, row in zip(prompts, steps, strict=True)]
    found = list(zip(*generate_batch(qwen, longer, max_new_tokens=6, cache=cache), strict=True))
    for row, ids in zip(found, longer, strict=True):
        alone = list(generate(qwen, ids, max_new_tokens=6))
        assert [step.token for step in row] == [step.token for step in alone]
        assert [step.logprob for step in row] == pytest.approx([step.logprob for step in alone], rel=1e-10)


@pytest.mark.parametrize("lengths", [(10, 10), (12, 10), (10, 11)])
def test_a_cache_with_other_padding_is_refused(lengths: tuple[int, int]) -> None:
    qwen = model("extended_base", "float32")
    cache = qwen.new_cache(2, 40)
    list(generate_batch(qwen, [prompt(3), prompt(5)], max_new_tokens=1, cache=cache))
    with pytest.raises(ValueError, match=r"the cache begin with padding of \[2, 0\] positions"):
        generate_batch(qwen, [prompt(length) for length in lengths], 4, cache=cache)


def test_a_cache_without_padding_refuses_prompts_of_other_lengths() -> None:
    qwen = model("extended_base", "float32")
    cache = qwen.new_cache(2, 40)
    list(generate_batch(qwen, [prompt(5), prompt(5)], max_new_tokens=1, cache=cache))
    with pytest.raises(ValueError, match=r"padding of \[0, 0\] positions, these prompts would need \[1, 0\]"):
        generate_batch(qwen, [prompt(9), prompt(10)], 4, cache=cache)
    with pytest.raises(ValueError, match="the longest prompt has 5 tokens"):
        generate_batch(qwen, [prompt(5), prompt(5)], 4, cache=cache)


@pytest.mark.parametrize(("rows", "room"), [(1, 20), (2, 7)])
def test_a_cache_of_another_size_is_refused_by_both_sizes(rows: int, room: int) -> None:
    qwen = model("extended_base", "float32")
    said = rf"2 × 8 positions are needed, the cache has {rows} × {room}; make it with a larger max_length or"
    with pytest.raises(ValueError, match=f"{said} the right batch_size"):
        generate_batch(qwen, [prompt(3), prompt(5)], 4, cache=qwen.new_cache(rows, room))


def test_a_cache_whose_row_ended_earlier_is_gone_on_with_from_there_alone() -> None:
    """What stands behind a row's end is none of its text."""
    qwen, prompts = model("ntk_logn", "float64"), [[5, 6, 7], [9, 8, 7, 4, 5]]
    stop = next(generate(qwen, prompts[0])).token
    cache = qwen.new_cache(2, 40)
    rows = list(generate_batch(qwen, prompts, 6, stop_ids=[stop], cache=cache))
    assert rows[1][0] is None
    texts = [[*prompts[0], stop], [*prompts[1], rows[0][1].token]]
    longer = [[*text, 11, 12, 13, 14, 15, 16] for text in texts]
    with pytest.raises(
        ValueError, match="a row of this cache ended after 6 positions, and the cache holds 10"
    ):
        generate_batch(qwen, longer, 3, cache=cache)
    cache.length = 6
    found = list(zip(*generate_batch(qwen, longer, 3, cache=cache), strict=True))
    for row, ids in zip(found, longer, strict=True):
        alone = list(generate(qwen, ids, max_new_tokens=3))
        assert [step.token for step in row] == [step.token for step in alone]
        assert [step.logprob for step in row] == pytest.approx([step.logprob for step in alone], rel=1e-10)


def test_two_iterators_on_one_cache_are_refused() -> None:
    qwen = model("extended_base", "float32")
    cache = qwen.new_cache(1, 60)
    first, second = (generate(qwen, prompt(9), 8, cache=cache) for _ in range(2))
    next(first)
    with pytest.raises(ValueError, match="the cache was used elsewhere meanwhile"):
        next(second)
    other = generate(qwen, [*prompt(20)], 8, cache=cache)
    next(other)
    with pytest.raises(ValueError, match="the cache was used elsewhere meanwhile"):
        next(first)


def test_no_other_token_s_embedding_spoils_a_padded_row() -> None:
    qwen = load_model(GOLDEN / "ntk_logn", "float64")
    prompts = [[1, 2, 3], [4, 5, 8, 9]]
    alone = [list(generate(qwen, ids, 3)) for ids in prompts]
    qwen.embed.weight[0] = torch.inf
    for row, steps in enumerate(zip(*generate_batch(qwen, prompts, 3), strict=True)):
        assert [step.token for step in steps] == [step.token for step in alone[row]]
    assert perplexity.score(qwen, prompts)[0].isfinite().all()


def test_a_row_that_has_ended_is_neither_drawn_nor_checked() -> None:
    qwen, prompts = load_model(GOLDEN / "extended_base", "float32"), [prompt(5), prompt(9)]
    free = list(zip(*generate_batch(qwen, prompts, max_new_tokens=12), strict=True))
    stop = next(step.token for step in free[0][:4] if step.token not in {other.token for other in free[1]})
    end = [step.token for step in free[0]].index(stop)
    calls = 0

    def spoil(module: object, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > end + 1:
            logits[0] = torch.nan
        return logits

    qwen.lm_head.register_forward_hook(spoil)
    rows = list(zip(*generate_batch(qwen, prompts, max_new_tokens=12, stop_ids=[stop]), strict=True))
    assert list(rows[1]) == list(free[1])
    assert list(rows[0]) == [*free[0][: end + 1], *[None] * (11 - end)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_row_whose_logits_are_not_finite_is_named(temperature: float) -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32")

    def spoil(module: object, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        logits[1, 3] = torch.inf
        return logits

    qwen.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="row 1: 0 NaN and 1 infinite among 320 logits"):
        next(generate_batch(qwen, [prompt(5), prompt(9)], temperature=temperature))


def test_a_penalty_that_overflows_is_named_in_greedy_decoding_too() -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32")
    qwen.lm_head.weight *= 1e36
    with pytest.raises(
        ValueError, match=r"logits overflow with repetition_penalty=1e-05 and temperature=0\.0"
    ):
        next(generate(qwen, prompt(5), repetition_penalty=1e-5))


def test_draws_are_those_of_multinomial_with_the_same_generator() -> None:
    """Its way of drawing is this project's: a seed gives the same text as before."""
    qwen, ids = model("extended_base", "float32"), prompt(9)
    with torch.inference_mode():
        probs = qwen(torch.tensor([ids]))[0, -1].softmax(dim=-1)
    for seed in range(50):
        expected = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(seed))
        assert next(generate(qwen, ids, 1, temperature=1.0, seed=seed)).token == expected


def test_a_model_that_gives_nan_is_named_not_sampled() -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32")
    qwen.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="320 NaN and 0 infinite among 320 logits"):
        next(generate(qwen, [1, 2, 3]))


# Text

BYTES = Tokenizer([bytes([value]) for value in range(256)])
END = BYTES.special_ids[SPECIAL_TOKENS[0]]


def stream(text: str | bytes, *stops: str, end: bool = False) -> tuple[list[str], str | None, int]:
    """The pieces, the reason and the number of steps taken, for a text that comes byte by byte."""
    encoded = text.encode() if isinstance(text, str) else text
    steps = [Step(value, -1.0) for value in encoded] + [Step(END, -1.0)] * end
    texts = TextStream(steps, BYTES, stop_ids={END}, stop_texts=stops)
    return list(texts), texts.finish_reason, len(texts.steps)


def test_an_id_that_no_token_has_is_shown_as_no_character() -> None:
    half, *_ = "é".encode()
    steps = [Step(token, -1.0) for token in (65, half, BYTES.n_vocab, 66)]
    assert "".join(TextStream(steps, BYTES)) == "A\ufffd\ufffdB"


def test_text_streams_by_whole_characters() -> None:
    assert stream("aé中😀") == (["a", "é", "中", "😀"], "length", 10)


def test_half_a_character_at_the_end_and_a_real_replacement_character_are_shown() -> None:
    assert stream("a\ufffd".encode() + "中".encode()[:2]) == (["a", "\ufffd", "\ufffd"], "length", 6)


def test_a_stop_id_ends_the_text_and_is_not_shown() -> None:
    assert stream("ab", end=True) == (["a", "b"], "stop", 3)


def test_a_stop_text_is_cut_and_what_came_before_is_kept() -> None:
    pieces, reason, steps = stream("Answer: 42\nQuestion: next", "\nQuestion")
    assert ("".join(pieces), reason, steps) == ("Answer: 42", "stop", len("Answer: 42\nQuestion"))


def test_what_only_began_like_a_stop_text_is_shown_after_all() -> None:
    assert "".join(stream("a\n\nb\n\n\n", "\n\n\nQ")[0]) == "a\n\nb\n\n\n"
    assert "".join(stream("aaab", "aab")[0]) == "a"


def test_the_first_of_several_stop_texts_counts() -> None:
    assert "".join(stream("one two three", "three", "two")[0]) == "one "


def test_a_stop_text_inside_one_token_keeps_the_beginning_of_that_token() -> None:
    words = Tokenizer([*(bytes([value]) for value in range(256)), b"end. New"])
    texts = TextStream([Step(256, -1.0), Step(65, -1.0)], words, stop_texts=[" New"])
    assert list(texts) == ["end."]
    assert (texts.finish_reason, len(texts.steps)) == ("stop", 1)


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop text is empty"):
        stream("abc", "")
