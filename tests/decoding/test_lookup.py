"""Lookup gives the tokens of the plain greedy loop, in fewer passes where text repeats text.

Drafts are right or wrong by chance in most tests. Where it matters, a drafter that is always right, or always
wrong, stands in for Text.draft.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import lookup_worker
import pytest
import torch
from conftest import GOLDEN, WEIGHTS, Result, cli_of, refused
from forked_ranks import command, run_ranks
from golden_cases import model as golden_model
from lookup_worker import PROMPT
from torch import Tensor

from qwen_ref import KVCache, Qwen, Tokenizer, load_model
from qwen_ref.commands.generate import main
from qwen_ref.config import InputError
from qwen_ref.decoding import PrefixCache, lookup
from qwen_ref.decoding.lookup import MARGIN, Passes, Text, generate_lookup
from qwen_ref.fast.int8_cache import Int8Cache
from qwen_ref.fast.layers import fasten
from qwen_ref.generate import Step, choose, generate

cli = cli_of(main)
DTYPES = ("float32", "float64")
# Models that lookup takes: plain ones of wide dtypes, fast ones of any.
HOW = [
    *((dtype, False) for dtype in DTYPES),
    *((dtype, True) for dtype in ("float32", "bfloat16", "float16")),
]
TINY = Tokenizer.from_file(WEIGHTS / "qwen.tiktoken")
END = TINY.special_ids["<|endoftext|>"]
FACTS = "冰岛的首都是雷克雅未克（Reykjavik）\n蒙古国的首都是乌兰巴托（Ulaanbaatar）\n"
REPETITIVE = (FACTS * 2 + "冰岛的首都是", FACTS * 2 + "蒙古国的首都是", "7 + 5 = 12\n" * 3, FACTS * 3)
OTHER = ("埃塞俄比亚的首都是", "The capital of", "<|im_start|>user\n3 + 4 = ", "x")


@cache
def tiny(dtype: str, fast: bool = False) -> Qwen:
    return fasten(load_model(WEIGHTS, dtype)) if fast else load_model(WEIGHTS, dtype)


def tokens(steps: Iterator) -> list[int]:
    return [step.token for step in steps]


def counted(qwen: Qwen, ids: list[int], count: int = 60, **settings: object) -> tuple[list[int], Passes]:
    passes = Passes()
    return tokens(generate_lookup(qwen, ids, count, passes=passes, **settings)), passes


# The drafts


def test_a_draft_is_what_followed_the_longest_match_most_recently() -> None:
    text = Text([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3], longest_match=3)
    assert text.draft(3) == [5, 8, 2]  # of two places of [2, 3] the later one
    text.append(4)
    assert text.draft(2) == [9, 2]  # [2, 3, 4] was there before
    assert Text([1, 2, 3, 9, 2], longest_match=2).draft(2) == [3, 9]  # a match of one id
    assert Text([7, 1, 2, 8, 1, 2, 7, 1, 2], longest_match=3).draft(1) == [8]
    assert Text([7, 1, 2, 8, 1, 2, 7, 1, 2], longest_match=2).draft(1) == [7]


def test_a_draft_goes_on_with_itself_and_is_never_longer_than_asked() -> None:
    assert Text([5, 1, 2, 1, 2], longest_match=3).draft(5) == [1, 2, 1, 2, 1]
    assert Text([4, 4], longest_match=3).draft(3) == [4, 4, 4]
    assert Text([4, 4], longest_match=3).draft(0) == []
    assert Text([1, 2, 3], longest_match=3).draft(4) == []
    assert Text([1], longest_match=3).draft(4) == []


def test_drafts_are_those_of_a_search_through_the_text() -> None:
    ids = torch.randint(4, (200,)).tolist()
    text = Text([], longest_match=3)
    for n, token in enumerate(ids):
        expected: list[int] = []
        for length in (3, 2, 1):
            ends = [end for end in range(length, n) if n and ids[end - length : end] == ids[n - length : n]]
            if ends and length <= n:
                expected = list(itertools.islice(itertools.cycle(ids[ends[-1] : n]), 6))
                break
        assert text.draft(6) == expected, n
        text.append(token)


# The tokens


@pytest.mark.parametrize(("dtype", "fast"), HOW)
@pytest.mark.parametrize("prompt", [*REPETITIVE, *OTHER])
def test_the_tokens_are_those_of_the_plain_loop(prompt: str, dtype: str, fast: bool) -> None:
    """Without a stop id the model goes on about things of which it is not sure."""
    qwen, ids = tiny(dtype, fast), TINY.encode(prompt, allowed_special="all")
    plain = list(generate(qwen, ids, 80))
    found = list(generate_lookup(qwen, ids, 80))
    assert tokens(found) == tokens(plain)
    for one, other in zip(found, plain, strict=True):
        assert math.isclose(one.logprob, other.logprob, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "quantize", "kernel"),
    [
        (dtype, quantize, kernel)
        for dtype in ("bfloat16", "float32")
        for quantize, kernels in ((None, "bag linear"), ("int8", "bag dynamic"), ("int4", "bag dynamic int4"))
        for kernel in kernels.split()
        if (dtype, kernel) != ("float32", "int4")
    ],
)
def test_every_kernel_gives_the_tokens_of_the_plain_loop(
    dtype: str, quantize: str | None, kernel: str
) -> None:
    qwen = fasten(load_model(WEIGHTS, dtype), quantize, 32, kernel=kernel)
    for prompt in (REPETITIVE[0], OTHER[1]):
        ids = TINY.encode(prompt)
        found, passes = counted(qwen, ids)
        assert found == tokens(generate(qwen, ids, 60))
        assert passes.passes < 60  # several tokens at once were tried, and some were right


@pytest.mark.parametrize(("dtype", "fast"), HOW)
@pytest.mark.parametrize("folder", ["extended_base", "ntk_logn"])
def test_random_models_that_are_never_sure_change_nothing(folder: str, dtype: str, fast: bool) -> None:
    qwen = fasten(load_model(GOLDEN / folder, dtype)) if fast else golden_model(folder, dtype)
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(320, (30,)).tolist() * (1 + seed % 2)
        assert tokens(generate_lookup(qwen, ids, 60)) == tokens(generate(qwen, ids, 60)), seed


@pytest.mark.parametrize(("dtype", "fast"), HOW)
@pytest.mark.parametrize("prompt", REPETITIVE[:2])
def test_repetitive_text_takes_fewer_passes(prompt: str, dtype: str, fast: bool) -> None:
    found, passes = counted(tiny(dtype, fast), TINY.encode(prompt), stop_ids=[END, *TINY.encode("\n")])
    assert passes.tokens == len(found)
    assert passes.passes < len(found)
    assert passes.tokens_per_pass == len(found) / passes.passes > 1


def test_in_float32_no_call_is_close() -> None:
    found, passes = counted(tiny("float32"), TINY.encode(FACTS * 2), 100)
    assert len(found) == 100
    assert passes.tokens_per_pass > 1.5


def drafts_of(draft: Callable[[list[int], int], list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "draft", lambda text, limit: draft(text.ids, limit))


def test_right_drafts_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen, ids = golden_model("extended_base", "float64"), PROMPT[:12]
    right = ids + tokens(generate(qwen, ids, 46))
    drafts_of(lambda text, limit: right[len(text) : len(text) + limit], monkeypatch)
    found, passes = counted(qwen, ids, 46, draft_tokens=8)
    assert found == right[12:]
    assert passes == Passes(tokens=46, passes=1 + 5)  # the prompt's token, then 9 a pass


@pytest.mark.parametrize("right", range(5))
def test_a_wrong_draft_is_taken_back(right: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of 4 of which the first few are right: the tokens and the cache, too, are the plain loop's."""
    qwen, ids = golden_model("extended_base", "float64"), PROMPT[:12]
    caches: list[KVCache] = []
    new_cache = qwen.new_cache

    def kept(*arguments: object) -> KVCache:
        caches.append(new_cache(*arguments))
        return caches[-1]

    monkeypatch.setattr(qwen, "new_cache", kept)
    plain = list(generate(qwen, ids, 41))
    whole = [*ids, *tokens(plain), 0, 0, 0, 0]
    drafts_of(
        lambda text, limit: [(whole[len(text) + n] + (n >= right)) % 320 for n in range(min(4, limit))],
        monkeypatch,
    )
    passes = Passes()
    found = list(generate_lookup(qwen, ids, 41, passes=passes))
    assert tokens(found) == tokens(plain)
    assert passes.passes == 1 + math.ceil(40 / (right + 1))
    for one, other in zip(found, plain, strict=True):
        assert math.isclose(one.logprob, other.logprob, rel_tol=1e-9)
    first, second = caches
    filled = 12 + 41 - 2  # what the last pass fed behind the last kept token may be anything
    for name in ("keys", "values"):
        for one, other in zip(getattr(first, name), getattr(second, name), strict=True):
            assert torch.allclose(one[:, :, :filled], other[:, :, :filled], rtol=1e-9, atol=1e-12)


# Close calls


def test_the_margin_is_more_than_leads_move_by() -> None:
    """Where the choice is lost to rounding, the lead was at most a third of MARGIN; so for the runner-up.

    How far leads move depends on the processor's kernels. That it is less than MARGIN must hold with all.
    """
    most = 0.0
    for name, dtype in itertools.product(("tiny", "extended_base", "ntk_logn"), DTYPES):
        qwen = tiny(dtype) if name == "tiny" else golden_model(name, dtype)
        info = torch.finfo(qwen.embed.weight.dtype)
        ids = torch.randint(320, (1, 200))
        single, several = (_cached_logits(qwen, ids, width).double() for width in (1, 9))
        unit = info.eps * several.abs().amax(dim=-1)
        best, places = several.topk(2, dim=-1)
        there = single.gather(1, places)
        moved = ((best[:, 0] - best[:, 1]) - (there[:, 0] - there[:, 1])).abs() / unit
        most = max(most, float(moved.max()))
        assert moved.max() < MARGIN / 2, (name, dtype)
        lost = single.argmax(dim=-1) != places[:, 0]
        assert ((best[:, 0] - best[:, 1]) / unit)[lost].sum() == 0 or (
            ((best[:, 0] - best[:, 1]) / unit)[lost].max() < MARGIN / 3
        )
    assert most > 0  # or the two were computed alike, and nothing was tried


@torch.inference_mode()
def _cached_logits(qwen: Qwen, ids: Tensor, width: int) -> Tensor:
    """Logits behind a prompt of 10, so many positions a pass."""
    cache = qwen.new_cache(1, ids.shape[1])
    qwen.hidden_states(ids[:, :10], cache=cache)
    parts = [qwen.hidden_states(part, cache=cache)[0] for part in ids[:, 10:].split(width, dim=1)]
    return torch.cat([qwen.lm_head(part) for part in parts])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_decided_again_has_the_bits_of_the_plain_loop(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Here no pass over several tokens is believed: then even log-probabilities are equal."""
    monkeypatch.setattr(lookup, "MARGIN", math.inf)
    qwen, ids = tiny(dtype), TINY.encode(FACTS * 2)
    passes = Passes()
    # Decided again by the plain loop's own calls: equal with any kernels.
    assert list(generate_lookup(qwen, ids, 60, passes=passes)) == list(generate(qwen, ids, 60))
    assert 60 < passes.passes < 120


def test_a_close_call_is_decided_by_the_bits_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind passes over several tokens that were believed, though the keys that they leave are others:
    the fifth is the first that is not."""
    qwen, ids = golden_model("extended_base", "float32"), PROMPT[:12]
    decided: list[Tensor] = []
    passes = Passes()

    def seen(qwen: Qwen, logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        decided.append(logits)
        return choose(qwen, logits, *others)

    def doubted(*arguments: object) -> list[Step]:
        steps = sure_steps(*arguments)
        return [Step(-1, 0.0)] * len(steps) if passes.passes == 1 + 5 else steps

    monkeypatch.setattr("qwen_ref.generate.choose", seen)
    plain = tokens(generate(qwen, ids, 46))
    bits, decided = decided, []
    right = ids + plain
    drafts_of(lambda text, limit: right[len(text) : len(text) + limit], monkeypatch)
    sure_steps = lookup._sure_steps
    monkeypatch.setattr(lookup, "_sure_steps", doubted)
    monkeypatch.setattr(lookup, "choose", seen)
    assert tokens(generate_lookup(qwen, ids, 46, draft_tokens=4, passes=passes)) == plain
    # All that four passes had taken is computed again, and the last token before the call.
    assert passes.passes >= 1 + 5 + (1 + 4 * 5)
    # The same calls of the same kernels: equal on every processor.
    assert torch.equal(decided[1], bits[1 + 4 * 5])


@pytest.mark.parametrize("moved", [False, True], ids=["a tie", "a tie that rounding turns"])
def test_a_planted_tie_is_decided_as_the_plain_loop_decides_it(moved: bool) -> None:
    """The token that comes most often gets a twin with the same row of the head. Passes over several tokens
    are made to prefer the twin by a single rounding."""
    qwen, ids = load_model(GOLDEN / "extended_base", "float32"), PROMPT[:12] * 2
    free = tokens(generate(qwen, ids, 40))
    often = max(set(free), key=free.count)
    twin = next(token for token in range(often + 1, 320) if token not in free)
    qwen.lm_head.weight[twin] = qwen.lm_head.weight[often]
    plain = tokens(generate(qwen, ids, 40))
    assert often in plain

    def turn(module: object, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        if moved and len(logits) > 1:
            logits[:, twin] *= 1 + torch.finfo(torch.float32).eps * logits[:, twin].sign()
        return logits

    qwen.lm_head.register_forward_hook(turn)
    found, passes = counted(qwen, ids, 40)
    assert found == plain
    assert passes.passes > 40  # more than the plain loop's: some were repeated


@pytest.mark.parametrize("fast", [False, True])
def test_a_wrong_draft_that_overflows_is_not_seen(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a token that the text does not hold are NaN: as a wrong guess it must do no harm."""
    qwen, ids = load_model(GOLDEN / "extended_base", "float32"), PROMPT[:12]
    if fast:
        fasten(qwen)
    plain = tokens(generate(qwen, ids, 20))
    never = next(token for token in range(320) if token not in (*ids, *plain))
    qwen.embed.weight[never] = torch.nan
    drafts_of(lambda text, limit: [never] * min(2, limit), monkeypatch)
    found, passes = counted(qwen, ids, 20, draft_tokens=2)
    assert found == plain
    assert passes.passes > 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_fast_layers_give_the_tokens_of_their_own_plain_loop(quantize: str | None, dtype: str) -> None:
    qwen = fasten(load_model(WEIGHTS, dtype), quantize)
    for text in (*REPETITIVE[:2], *OTHER[:2]):
        ids = TINY.encode(text)
        passes = Passes()
        found = list(generate_lookup(qwen, ids, 60, draft_tokens=20, passes=passes))
        assert found == list(generate(qwen, ids, 60))  # log-probabilities, too
        assert passes.passes < 60


# What ends it


def test_a_stop_id_inside_a_draft_is_the_last_token() -> None:
    qwen, ids = tiny("float32"), TINY.encode(REPETITIVE[0])
    free, _ = counted(qwen, ids)
    for stop in free[1:6]:
        found, passes = counted(qwen, ids, stop_ids=iter([stop]))
        assert found == free[: free.index(stop) + 1]
        assert passes.tokens == len(found)


@pytest.mark.parametrize("count", range(1, 14))
def test_max_new_tokens_may_end_inside_a_draft(count: int) -> None:
    qwen, ids = tiny("float32"), TINY.encode(REPETITIVE[0])
    found, passes = counted(qwen, ids, count)
    assert found == tokens(generate(qwen, ids, count))
    assert len(found) == passes.tokens == count


def test_passes_count_while_it_runs_and_closing_ends_it() -> None:
    passes = Passes()
    steps = generate_lookup(tiny("float32"), TINY.encode(REPETITIVE[0]), passes=passes)
    assert (passes, passes.tokens_per_pass) == (Passes(), 0)
    next(steps)
    assert passes == Passes(tokens=1, passes=1)
    steps.close()
    assert list(steps) == []


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([1, 320], {}, "token id 320 is outside the vocabulary, 0 to 319"),
        ([1.0], {}, "a prompt must be a list of token ids, whole numbers"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([1], {"max_new_tokens": 2**30}, "a cache of 1 × 1073741824 positions takes"),
        ([1], {"draft_tokens": 0}, "draft_tokens=0 must be at least 1"),
        ([1], {"longest_match": 0}, "longest_match=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_at_once(ids: object, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_lookup(golden_model("extended_base", "float32"), ids, **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plain_16_bits_are_refused_with_a_remedy(dtype: str) -> None:
    message = f"lookup in plain {dtype} would take more passes than it saves.*use float32, or faster layers"
    with pytest.raises(ValueError, match=message):
        generate_lookup(golden_model("extended_base", dtype), [1])


@pytest.mark.parametrize("fast", [False, True])
def test_an_int8_cache_is_refused(fast: bool) -> None:
    """In which a pass over several tokens was seen to move float32 leads by 15,000 units: MARGIN is 100."""
    qwen = load_model(WEIGHTS, "float32")
    if fast:
        fasten(qwen)
    qwen.cache_type = Int8Cache
    with pytest.raises(ValueError, match=r"does not go with an int8 cache.*leave --kv-cache out"):
        generate_lookup(qwen, [1])


def test_a_model_that_gives_nan_is_named() -> None:
    qwen = load_model(GOLDEN / "extended_base", "float32")
    steps = generate_lookup(qwen, PROMPT)
    next(steps)
    qwen.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="320 NaN and 0 infinite among 320 logits"):
        list(steps)


# Two ranks


@pytest.mark.parametrize(("dtype", "fast"), HOW)
def test_texts_that_begin_alike_share_a_cache(dtype: str, fast: bool) -> None:
    """And an iterator that is left while guesses wait leaves none of them behind."""
    plain, guessed = PrefixCache(tiny(dtype, fast)), PrefixCache(tiny(dtype, fast), draft_tokens=8)
    text = TINY.encode(FACTS)
    for number, more in enumerate([REPETITIVE[0], FACTS * 3, REPETITIVE[2], OTHER[0], FACTS * 5]):
        ids = text + TINY.encode(more)
        for count in (5, 30):
            found = list(itertools.islice(guessed.generate(ids, 40), count + number))
            wanted = list(itertools.islice(plain.generate(ids, 40), count + number))
            assert tokens(found) == tokens(wanted)
            assert (guessed.kept > 0) == (number > 0 or count == 30)
        text = ids + tokens(found)  # as a chat goes on
    assert guessed.passes.tokens_per_pass > 1


def test_random_models_share_a_cache_too() -> None:
    for folder in ("extended_base", "ntk_logn"):
        qwen = golden_model(folder, "float64")
        plain, guessed = PrefixCache(qwen), PrefixCache(qwen, draft_tokens=3)
        ids = list(PROMPT)
        for _ in range(4):
            found = tokens(guessed.generate(ids, 12))
            assert found == tokens(plain.generate(ids, 12))
            ids += [*found, *PROMPT]


def test_a_cache_of_generate_goes_on_by_lookup_and_back() -> None:
    qwen, ids = tiny("float32"), TINY.encode(REPETITIVE[0])
    cache = qwen.new_cache(1, 200)
    first = tokens(generate(qwen, ids, 3, cache=cache))
    cache.length = 0
    ids += tokens(generate(qwen, ids, 3, cache=cache, stop_ids=first[1:2]))  # it ends before its end
    ids += tokens(generate_lookup(qwen, ids, 20, cache=cache))
    assert tokens(generate(qwen, ids, 5, cache=cache)) == tokens(generate(qwen, ids, 5))


def test_a_cache_that_does_not_fit_is_refused() -> None:
    qwen = tiny("float32")
    with pytest.raises(InputError, match="12 positions are needed, the cache has 11"):
        generate_lookup(qwen, [1, 2, 3], 10, cache=qwen.new_cache(1, 11))
    with pytest.raises(InputError, match="must be of one row and hold fewer tokens than the prompt"):
        generate_lookup(qwen, [1, 2, 3], 10, cache=qwen.new_cache(2, 12))
    full = qwen.new_cache(1, 12)
    qwen(torch.tensor([[1, 2, 3]]), cache=full)
    with pytest.raises(InputError, match="must be of one row and hold fewer tokens than the prompt"):
        generate_lookup(qwen, [1, 2, 3], 10, cache=full)


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, lookup_worker.main, tmp_path)
    first, second = (json.loads((tmp_path / f"lookup-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for how in ("float64", "fast bfloat16"):
        plain, found = first[f"{how} plain"], first[f"{how} lookup"]
        assert [token for token, _ in found] == [token for token, _ in plain]
        assert first[f"{how} passes"][0] == 40
    one, passes = counted(golden_model("extended_base", "float64"), PROMPT, 40)
    assert [token for token, _ in first["float64 lookup"]] == one
    assert first["float64 passes"] == [passes.tokens, passes.passes]
    assert passes.passes < 40
    for leaver in (0, 1):
        assert first[f"rank {leaver} leaves"] == first["float64 lookup"][:7]
    assert "draft_tokens=4', on rank 0 lookup is 'longest_match=3, draft_tokens=3'" in first["drafts differ"]
    assert first["empty"].startswith("rank 1: a prompt has no tokens")
    assert first["not finite"].startswith("rank 0: 1 NaN and 0 infinite among 320 logits")


# The command


FLOAT32 = ("--dtype", "float32")


def last_line(result: Result) -> str:
    return result.err.splitlines()[-1]


@pytest.mark.parametrize(
    "extra",
    [[*FLOAT32], [*FLOAT32, "--logprobs"], [*FLOAT32, "--stop", "（"], ["--fast"], ["--quantize", "int8"]],
    ids=str,
)
def test_the_command_prints_the_same_and_says_how_many_passes(cli: Callable, extra: list) -> None:
    plain, found = cli(REPETITIVE[0], *extra), cli(REPETITIVE[0], *extra, "--lookup")
    assert found.code == plain.code == 0
    if "--logprobs" in extra:
        assert [line.split("\t")[1:] for line in found.out.splitlines()] == [
            line.split("\t")[1:] for line in plain.out.splitlines()
        ]
    else:
        assert found.out == plain.out
    assert "lookup" not in plain.err
    _, _, numbers = last_line(found).partition("; lookup: ")
    made, _, _, taken, _, each, *_ = numbers.split()
    assert float(each) == round(int(made) / int(taken), 1) > 1
    assert numbers.endswith("tokens per pass")


def test_json_has_the_same_numbers(cli: Callable) -> None:
    plain = json.loads(cli(REPETITIVE[0], *FLOAT32, "--json").out)
    report = json.loads(cli(REPETITIVE[0], *FLOAT32, "--json", "--lookup", "4").out)
    numbers = report["lookup"]
    assert "lookup" not in plain
    assert (report["text"], report["finish_reason"]) == (plain["text"], plain["finish_reason"])
    assert numbers["draft_tokens"] == 4
    assert numbers["tokens"] == len(report["tokens"]) == len(plain["tokens"])
    assert numbers["tokens_per_pass"] == numbers["tokens"] / numbers["passes"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0.7"], "--lookup is greedy only, without temperature=0.7; add --temperature 0"),
        (["--repetition-penalty", "1.1"], "without repetition_penalty=1.1; add --repetition-penalty 1"),
        (["--lookup", "0"], "draft_tokens=0 must be at least 1"),
        ([], "lookup in plain bfloat16 would take more passes than it saves"),  # as the folder stores them
        (["--dtype", "float16"], "lookup in plain float16 would take more passes than it saves"),
        ([*FLOAT32, "--kv-cache", "int8"], "lookup does not go with an int8 cache"),
        (["--fast", "--kv-cache", "int8"], "leave --kv-cache out"),
        (["--lookup", "冰岛"], "--lookup: '冰岛' is no number of tokens; a prompt goes before --lookup"),
    ],
)
def test_the_command_refuses_what_cannot_be(cli: Callable, arguments: list, message: str) -> None:
    assert message in refused(cli("x", "--lookup", *arguments))


def test_a_folder_that_samples_is_named(cli: Callable, folder: Path) -> None:
    config = folder / "generation_config.json"
    config.write_text(json.dumps({"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1}))
    assert refused(cli("x", "--model", folder, "--lookup")) == (
        f"qwen_ref: error: --lookup is greedy only, without temperature=1 (from {config}) and "
        f"repetition_penalty=1.1 (from {config}); add --temperature 0 --repetition-penalty 1"
    )
    remedy = ("--temperature", "0", "--repetition-penalty", "1")
    assert cli("x", "--model", folder, "--lookup", "--max-new-tokens", "3", *FLOAT32, *remedy).code == 0


def test_the_command_on_two_ranks(cli: Callable, tmp_path: Path) -> None:
    out, err = run_ranks(2, tmp_path, command, "qwen_ref.generate", REPETITIVE[0], "--lookup", *FLOAT32)
    assert out == cli(REPETITIVE[0], *FLOAT32).out
    assert "; lookup: " in err
