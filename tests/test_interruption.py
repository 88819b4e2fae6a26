"""The stop button of a notebook, Ctrl-C: whatever was running, the same model then gives the same tokens.

KeyboardInterrupt may come between any two lines. So each piece of work here is run again and again, and is
interrupted at another line of the package each time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import GOLDEN, WEIGHTS

import qwen_ref
from qwen_ref import Qwen, Tokenizer, load_model
from qwen_ref.chat import Conversation, reply
from qwen_ref.config import InputError
from qwen_ref.decoding.lookup import generate_lookup
from qwen_ref.decoding.prefix import PrefixCache
from qwen_ref.fast import Int8Cache, fasten
from qwen_ref.generate import generate, generate_batch
from qwen_ref.model import KVCache
from qwen_ref.trace import trace

PACKAGE = str(Path(qwen_ref.__file__).parent)
FOLDER = GOLDEN / "ntk_logn"
POINTS = 25  # at which a piece of work is interrupted
IDS = [7, 3, 250, 7, 3, 250, 7, 3, 11, 12, 13, 14]


class Interruption:
    """A trace function that raises KeyboardInterrupt at a line of the package, counted as they are run."""

    def __init__(self, at: int, inside: str | None) -> None:
        self.at, self.inside, self.lines = at, inside, 0

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or self.inside not in (None, code.co_name):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def run(work: Callable[[], object], at: int, inside: str | None) -> int:
    """Runs the work, interrupts it at a line, and returns how many lines it had come to."""
    interruption, before = Interruption(at, inside), sys.gettrace()
    sys.settrace(interruption)
    try:
        work()
    except KeyboardInterrupt:
        assert interruption.lines == at
    finally:
        sys.settrace(before)
    return interruption.lines


def interrupted(work: Callable[[], object], inside: str | None = None) -> Iterator[None]:
    """Yields after each interruption: at POINTS lines, or at every line of the function `inside`."""
    before = settings()
    total = run(work, 0, inside)
    assert total > 3
    step = 1 if inside is not None else max(1, total // POINTS)
    for at in range(1, total + 1, step):
        run(work, at, inside)
        assert settings() == before
        yield


def settings() -> tuple[object, ...]:
    """What is torch's and must be as it was."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
    )


def plain() -> Qwen:
    return load_model(FOLDER)


def with_int8_cache() -> Qwen:
    model = load_model(FOLDER)
    model.cache_type = Int8Cache
    return model


def fast() -> Qwen:
    return fasten(load_model(FOLDER, "bfloat16"), kernel="bag")


MODELS = pytest.mark.parametrize("make", [plain, with_int8_cache, fast])


@MODELS
def test_the_model_gives_the_same_tokens_again(make: Callable[[], Qwen]) -> None:
    model = make()
    wanted = list(generate(model, IDS, max_new_tokens=4))
    for _ in interrupted(lambda: list(generate(model, IDS, max_new_tokens=4))):
        assert list(generate(model, IDS, max_new_tokens=4)) == wanted


@MODELS
def test_a_caller_goes_on_with_the_same_cache(make: Callable[[], Qwen]) -> None:
    """From what the interrupted loop has put into it, which the cache's length tells."""
    model = make()
    tokens = [step.token for step in generate(model, IDS, max_new_tokens=6)]
    text, cache = IDS + tokens, model.new_cache(1, 40)

    def work() -> None:
        cache.length = 0
        list(generate(model, IDS, max_new_tokens=5, cache=cache))

    for _ in interrupted(work):
        start = max(cache.length + 1, len(IDS))
        rest = generate(model, text[:start], max_new_tokens=len(text) - start, cache=cache)
        assert [step.token for step in rest] == text[start:]


@MODELS
def test_an_interrupted_pass_leaves_the_length_of_its_cache(make: Callable[[], Qwen]) -> None:
    """The next pass overwrites what it has put behind that."""
    model = make()
    passes = [torch.tensor([ids]) for ids in (IDS, IDS[:3], IDS[:1])]
    lengths = {0, 12, 15, 16}

    def go_on(cache: KVCache) -> torch.Tensor:
        with torch.inference_mode():
            for ids, end in zip(passes, (12, 15, 16), strict=True):
                if cache.length < end:
                    last = model(ids, cache=cache)
        return last

    wanted, cache = go_on(model.new_cache(1, 40)), model.new_cache(1, 40)

    def work() -> None:
        cache.length = 0
        go_on(cache)

    for _ in interrupted(work):
        assert cache.length in lengths
        if cache.length < 16:
            assert go_on(cache).equal(wanted)


def test_values_of_an_interrupted_pass_are_not_taken_for_zeros() -> None:
    """FastCache counts on zeros behind its length: 0 · NaN is NaN."""
    model = fast()
    ones = torch.ones((1, 4, 1, 16), dtype=torch.bfloat16)
    five = ones.expand(1, 4, 5, 16)
    made: list[Any] = []

    def work() -> None:
        made.append(model.new_cache(1, 300))
        made[-1].write(0, ones, ones)
        made[-1].length = 1
        made[-1].write(0, five, five * torch.nan)

    for _ in interrupted(work, inside="write"):
        cache = made[-1]
        cache.write(0, ones, ones)
        assert cache.attend(0, ones, None, cache.length).isfinite().all()


def test_the_other_loops_give_the_same_again() -> None:
    model = plain()
    loops: list[Callable[[], list]] = [
        lambda: list(generate_batch(model, [IDS, IDS[:5]], max_new_tokens=3)),
        lambda: list(generate_lookup(model, IDS, max_new_tokens=5)),
    ]
    for loop in loops:
        wanted = loop()
        for _ in interrupted(loop):
            assert loop() == wanted


def test_a_conversation_goes_on_with_the_next_question(own: Tokenizer) -> None:
    """What had been answered until then is in its history."""
    model, talks = load_model(WEIGHTS), []
    first, second, third = "7+8=", "冰岛的首都是哪里？", "挪威的首都是哪里？"

    def work() -> None:
        talks.append(Conversation(model, own, max_new_tokens=6))
        for question in (first, second):
            "".join(talks[-1].ask(question))

    for _ in interrupted(work):
        if not talks:
            continue
        talk = talks[-1]
        history = list(talk.history)
        assert [asked for asked, _ in history] in ([], [first], [second], [first, second])
        answer, _ = reply(model, own, third, history, max_new_tokens=6)
        assert "".join(talk.ask(third)) == answer
        assert talk.history == [*history, (third, answer)]


def test_a_cache_of_beginnings_agrees_with_its_text() -> None:
    """Interrupted between two texts, it does not take the keys of one for those of the other."""
    model = plain()
    other = [9, 8, 7, *IDS]
    wanted = [list(generate(model, text, max_new_tokens=3)) for text in (IDS, other)]
    made: list[PrefixCache] = []

    def work() -> None:
        made.append(PrefixCache(model))
        for text in (IDS, other):
            list(made[-1].generate(text, max_new_tokens=3))

    for _ in interrupted(work, inside="rewind"):
        for text, steps in zip((other, IDS), reversed(wanted), strict=True):
            found = made[-1].generate(text, max_new_tokens=3)
            assert [step.token for step in found] == [step.token for step in steps]


def test_an_unfinished_layout_refuses_to_compute() -> None:
    """Some layers would be rounded and others not."""
    model = load_model(FOLDER, "bfloat16")
    before = list(generate(model, IDS, max_new_tokens=3))
    fasten(model, "int8", kernel="bag")
    after = list(generate(model, IDS, max_new_tokens=3))
    models, loaded = [], iter([load_model(FOLDER, "bfloat16") for _ in range(2 * POINTS + 2)])

    def work() -> None:
        models.append(next(loaded))
        fasten(models[-1], "int8", kernel="bag")

    refusals = 0
    for _ in interrupted(work):
        try:
            found = list(generate(models[-1], IDS, max_new_tokens=3))
        except InputError:
            refusals += 1
            with pytest.raises(InputError, match="fasten did not finish with this model"):
                fasten(models[-1])
        else:
            assert found in (before, after)
    assert refusals > POINTS / 2


@pytest.mark.parametrize("work", [lambda: load_model(FOLDER), lambda: trace(FOLDER, IDS, top=1)])
def test_what_makes_its_own_model_leaves_nothing_set(work: Callable[[], object]) -> None:
    wanted = list(generate(plain(), IDS, max_new_tokens=2))
    for _ in interrupted(work):
        pass
    assert list(generate(plain(), IDS, max_new_tokens=2)) == wanted
