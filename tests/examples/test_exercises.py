"""The exercises: solutions are right, holes are holes, and what is usually wrong gets its own hint."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from conftest import ROOT, Result, Run, python, refused

import qwen_ref.model
import qwen_ref.tokenizer
from qwen_ref.commands.cli import run

EXERCISES = ROOT / "examples" / "learn" / "exercises"
NAMES = sorted(path.stem for path in EXERCISES.glob("ex*.py"))
NUMBERS = range(1, 11)

NEIGHBOURS = "torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)"
MIDDLE = "F.linear(x, w1) * F.silu(F.linear(x, w2))"
# Lines that several of the following change.
MERGED = "return [*parts[:i], pairs[i], *parts[i + 2 :]]"
TURNED = "wide * cos + rotate_half(wide) * sin"
HALVES = "torch.cat((-second, first), dim=-1)"
SCALE = "torch.log(positions.double() + 1) / math.log(seq_length)"
SEEN = "return keys <= queries"
KEPT = "kept[order] = values.where(before < p, 0.0)"
POWER = "stretched ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)"
ROOT_OF_MEAN = "torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)"

# In a solution, the line that a learner may write otherwise, how, and some of the hint that this must get.
MISTAKES = {
    "ex01_split": [
        (r"|\p{{N}}|", r"|\p{{N}}+|", "as in GPT-2"),
        (r"|\p{{N}}|", r"| ?\p{{N}}+|", "as in GPT-2"),
        (r"|\p{{N}}|", r"|\p{{N}}{{1,3}}|", "as in GPT-4"),
        (r"|\p{{N}}|", r"| ?\p{{N}}|", "that space is a piece by itself"),
        (r"|\p{{N}}|", "|[0-9]|", "decimal digits only"),
        (r"|\p{{N}}|", r"|\d|", "decimal digits only"),
        ('unicodedata.normalize("NFC", text)', "text", "an accent is no letter"),
        ('"NFC"', '"NFD"', "an accent is no letter"),
        ('"NFC"', '"NFKC"', "too much"),
        (r"{WORDS}|\p{{N}}|{THE_REST}", r"{WORDS}|\p{{N}}|\s+|{THE_REST}", "the first alternative"),
    ],
    "ex02_merge": [
        ("min(found)", "found[0]", "leftmost pair that is a token"),
        ("min(found)", "max(found)", "took the highest rank"),
        ("min(found)", "min(found, key=lambda pair: (pair[0], -pair[1]))", "you took the right one"),
        (MERGED, "return merge_once([*parts[:i], pairs[i], *parts[i + 2 :]], ranks)", "You went on merging"),
        (
            MERGED,
            "return b' '.join(parts).replace(parts[i] + b' ' + parts[i + 1], pairs[i]).split()",
            "You merged the pair everywhere",
        ),
        ("return parts", "return []", "the piece is finished"),
        ("    if not found:\n        return parts\n", "", "There may be none"),
    ],
    "ex03_rms_norm": [
        ("wide = x.to(torch.float32)", "wide = x", "In which dtype does step 1 compute?"),
        ("normed.to(x.dtype) * weight", "(normed * weight).to(x.dtype)", "after the weight"),
        ("normed.to(x.dtype) * weight", "normed * weight", "It came out in float32"),
        ("normed.to(x.dtype)", "normed.to(x.dtype).float()", "In float32 you are right"),
        ("(x.dtype) * weight", "(x.dtype) * weight**2", "The mean is one of squares"),
        (" * weight", "", "Where is weight?"),
        (ROOT_OF_MEAN, "(wide.square().mean(-1, keepdim=True).sqrt() + eps)", "eps is outside the root"),
        (" + eps", "", "Where is eps?"),
        ("wide / torch.sqrt(", "wide / (", "a root is missing"),
        ("wide / torch.sqrt(", "wide * torch.sqrt(", "You multiply by the root"),
        (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)", "the length of the row"),
        (".mean(-1, keepdim=True)", ".mean()", "Each row"),
        ("torch.float32)", "torch.float32) - x.float().mean(-1, keepdim=True)", "LayerNorm"),
        (".mean(-1, keepdim=True)", ".mean(-1)", "as a column"),
    ],
    "ex04_ntk": [
        ("math.ceil(", "(", "Nothing was rounded up"),
        ("math.ceil", "math.floor", "rounded log2(…) + 1 down"),
        ("math.ceil", "round", "to the nearest"),
        (" - 1, 1)", ", 1)", "Where is the − 1"),
        (" + 1)", ")", "⌈ ⌉ is around all of it"),
        ("math.log2", "math.log", "to base 2"),
        (" - 1, 1)", " - 1, -2)", "How small may α be?"),
        ("base * alpha ** (K / (K - 2))", "base * alpha", "an exponent, too"),
        ("base * alpha ** (K / (K - 2))", "base", "α changes nothing"),
        ("K / (K - 2)", "(K - 2) / K", "upside down"),
        ("(-torch", "(torch", "These grow"),
        ("torch.arange(0, K, 2, ", "torch.arange(0, K // 2, ", "where is the 2?"),
        ("stretched **", "1 / alpha * base **", "Pair 0 must stay"),
        ("dtype=torch.float32) / K)", "dtype=torch.float32).repeat(2) / K)", "each pair needs only one"),
    ],
    "ex05_rotate": [
        (HALVES, NEIGHBOURS, "You paired neighbours"),
        ("(-second, first)", "(second, -first)", "the other way"),
        ("(-second, first)", "(second, first)", "changed no sign"),
        ("(-second, first)", "(-first, second)", "also swap the halves"),
        (HALVES, "-x.flip(-1)", "reversed the order"),
        ("(-second, first)", "(-second, -first)", "Cut x into halves"),
        (TURNED, "wide * sin + rotate_half(wide) * cos", "swapped cos and sin"),
        ("wide * cos + rotate", "wide * cos - rotate", "turns backwards"),
        (
            "wide = x.to(cos.dtype)",
            "wide, cos, sin = x, cos.to(x.dtype), sin.to(x.dtype)",
            "rounded too early",
        ),
        ("* sin).to(x.dtype)", "* sin)", "It came out in float32"),
        (TURNED, "wide", "Nothing turns"),
        ("wide * cos + rotate_half(wide)", "(wide + rotate_half(wide))", "Turned by t"),
    ],
    "ex06_logn": [
        ("positions.double() + 1", "positions.double()", "How many does its query see?"),
        ("positions.double() + 1", "positions.double() + 2", "one token too many"),
        (".clamp(min=1.0)", "", "Within the trained length"),
        ("clamp(min", "clamp(max", "1 where it must grow"),
        ("torch.log(", "torch.log10(", "different bases"),
        ("math.log(", "math.log10(", "different bases"),
        (" / math.log(seq_length)", "", "By what is log(n) divided?"),
        (SCALE, "(positions + 1) / seq_length", "Where are the logarithms?"),
        ("positions.double()", "positions.to(dtype)", "rounded to bfloat16 before the end"),
        (".to(dtype)", ".float()", "the dtype that the argument names"),
    ],
    "ex07_mask": [
        ("torch.arange(S - T, S)", "torch.arange(T)", "How many keys came before it"),
        ("keys <= queries", "keys < queries", "its own key"),
        ("keys <= queries", "keys != queries", "the position of the query in row t"),
        ("keys <= queries", "keys > queries", "is inverted"),
        ("keys <= queries", "keys >= queries", "Which of the two are the rows?"),
        ("keys <= queries", "keys <= queries + 1", "its own answer"),
        (SEEN, "return torch.ones(T, S, dtype=torch.bool)", "Every query sees every key"),
        (SEEN, "return torch.ones(S, S, dtype=torch.bool).tril()", "There are S rows"),
        (SEEN, "return torch.ones(T, T, dtype=torch.bool).tril()", "There are T columns"),
        (SEEN, "return torch.ones(T, S).tril(S - T)", "they are not bool"),
        (SEEN, "return torch.full((T, S), -torch.inf).triu(S - T + 1)", "Here bool is wanted"),
    ],
    "ex08_swiglu": [
        (MIDDLE, "F.silu(F.linear(x, w1)) * F.linear(x, w2)", "as in Llama"),
        ("F.silu(", "F.gelu(", "That is GELU"),
        ("F.silu(", "F.relu(", "That is ReLU"),
        ("F.silu(", "F.sigmoid(", "one more factor"),
        ("F.silu(", "(", "where is the SiLU?"),
        ("F.linear(x, w1) * ", "", "What does it let through?"),
        ("w1) * F", "w1) + F", "A gate multiplies"),
        (MIDDLE, "F.silu(F.linear(x, w1) * F.linear(x, w2))", "on the product"),
        ("F.linear(x, w1) *", "F.silu(F.linear(x, w1)) *", "on both"),
        (f"F.linear({MIDDLE}, c_proj)", MIDDLE, "What takes them back"),
        ("F.linear(x, w1)", "x @ w1", "Follow the shapes"),
    ],
    "ex09_top_p": [
        ("before < p", "before + values <= p", "dropped the token"),
        ("before < p", "before + values < p", "dropped the token"),
        ("before < p", "before <= p", "exactly p before it"),
        ("before < p", "before > p", "do those before it reach p already?"),
        ("before < p", "values >= p", "compared each token with p"),
        ("kept / kept.sum()", "kept", "do not sum to 1"),
        (KEPT, "kept = values.where(before < p, 0.0)", "are sorted"),
        (KEPT, "kept = values[before < p]", "Others keep a place"),
        ("before < p", "before < 2", "All tokens are still there"),
    ],
    "ex10_qkv_cut": [
        ("return torch.cat(", "return qkv.chunk(ranks)[rank]; torch.cat(", "An even cut"),
        ("third.chunk(ranks, dim=0)[rank]", "third[rank::ranks]", "cuts through the heads"),
        ("torch.cat", "torch.stack", "as a stack of three"),
        ("(q, k, v)])", "(q,)])", "Only q"),
        (
            "return torch.cat([third.chunk(ranks, dim=0)[rank] for third in (q, k, v)])",
            "return torch.stack([third.chunk(ranks)[rank] for third in (q, k, v)], dim=1).flatten(0, 1)",
            "take turns",
        ),
        ("[rank]", "[ranks - 1 - rank]", "of the other rank"),
        ("return torch.cat(", "return (q, k, v)[rank]; torch.cat(", "A third for each rank"),
    ],
}

# Right answers that are written otherwise: from where the solution stands, to what else may stand there.
OTHERWISE = {
    "ex01_split": [
        ("regex.findall(", "(lambda *given: [found.group() for found in regex.finditer(*given)])(")
    ],
    "ex02_merge": [(MERGED, "parts[i : i + 2] = [pairs[i]]; return parts")],
    "ex03_rms_norm": [
        ("wide / torch.sqrt(", "wide * torch.rsqrt("),
        ("torch.float32", "torch.float64"),
        (
            "return normed",
            "normed = torch.nn.functional.rms_norm(wide, x.shape[-1:], None, eps)\n    return normed",
        ),
    ],
    "ex04_ntk": [
        (
            "math.ceil(math.log2(prompt_length / seq_length) + 1)",
            "(1 - math.log2(seq_length / prompt_length) // 1)",
        ),
        (POWER, "torch.tensor([stretched ** (-2 * i / K) for i in range(K // 2)])"),
        (POWER, "1.0 / stretched ** (torch.arange(0, K, 2) / K)"),
    ],
    "ex05_rotate": [
        (HALVES, "torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)"),
        (
            HALVES,
            "x.roll(x.shape[-1] // 2, -1) * torch.tensor([-1.0, 1.0]).repeat_interleave(x.shape[-1] // 2)",
        ),
    ],
    "ex06_logn": [
        (SCALE, "torch.log2(positions + 1) / math.log2(seq_length)"),
        ("scale.clamp(min=1.0)", "torch.where(positions + 1 > seq_length, scale, 1.0)"),
    ],
    "ex07_mask": [
        (SEEN, "return torch.ones(T, S, dtype=torch.bool).tril(S - T)"),
        (SEEN, "return ~torch.ones(T, S, dtype=torch.bool).triu(diagonal=S - T + 1)"),
    ],
    "ex08_swiglu": [
        ("F.linear(x, w1) *", "(x @ w1.T) *"),
        ("F.silu(F.linear(x, w2))", "F.linear(x, w2) * F.sigmoid(F.linear(x, w2))"),
    ],
    "ex09_top_p": [
        (KEPT, "kept = kept.scatter(0, order, values * (before < p))"),
        (KEPT, "count = int((values.cumsum(0) < p).sum()) + 1\n    kept[order[:count]] = values[:count]"),
    ],
    "ex10_qkv_cut": [
        (
            "return torch.cat(",
            "return qkv.unflatten(0, (3, ranks, -1))[:, rank].flatten(0, 1)\n    torch.cat(",
        ),
        (
            "return torch.cat(",
            "n = len(q) // ranks; return torch.cat([x[rank * n :][:n] for x in (q, k, v)])\n    torch.cat(",
        ),
    ],
}


def flat(rows: dict[str, list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    return [(name, *row) for name, found in rows.items() for row in found]


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXERCISES)


@pytest.fixture
def judge() -> Callable:
    return importlib.import_module("check").judge


@pytest.fixture
def asked() -> list:
    return importlib.import_module("checks").EXERCISES


def loaded(path: Path) -> ModuleType:
    module = ModuleType(path.stem)
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def functions(module: ModuleType) -> dict[str, FunctionType]:
    found = vars(module).values()
    return {
        f.__name__: f
        for f in found
        if isinstance(f, FunctionType) and f.__code__.co_filename.endswith(f"{module.__name__}.py")
    }


def attempt(folder: Path, name: str, changes: Sequence[tuple[str, str]] = ()) -> Path:
    """A folder with the solution of one exercise, changed."""
    source = (EXERCISES / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def test_ten_exercises_each_with_a_hole_a_solution_and_a_check(asked: list) -> None:
    assert len(NAMES) == 10
    assert [exercise.name for exercise in asked] == NAMES
    assert sorted(path.stem for path in (EXERCISES / "solutions").glob("*.py")) == NAMES
    assert MISTAKES.keys() == set(NAMES)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_right(judge: Callable, number: int) -> None:
    outcome = judge(number, EXERCISES / "solutions")
    assert outcome.right, outcome
    assert outcome.text


@pytest.mark.parametrize("number", NUMBERS)
def test_a_hole_says_so_with_a_hint(judge: Callable, asked: list, number: int) -> None:
    outcome = judge(number, EXERCISES)
    if outcome.done:  # a learner's tests shall not fail for what was learnt
        assert not os.environ.get("CI"), f"{NAMES[number - 1]}.py is filled in"
        pytest.skip(f"{NAMES[number - 1]}.py is filled in")
    assert not outcome.right
    assert (
        outcome.text
        == f"not done yet: {next(iter(functions(loaded(EXERCISES / f'{NAMES[number - 1]}.py'))))}"
    )
    assert outcome.hint == asked[number - 1].hint


@pytest.mark.parametrize(
    ("name", "old", "new", "hint"), [pytest.param(*m, id=f"{m[0][:4]}-{m[3][:20]}") for m in flat(MISTAKES)]
)
def test_a_mistake_gets_its_hint(judge: Callable, name: str, old: str, new: str, hint: str, tmp_path: Path):
    outcome = judge(NAMES.index(name) + 1, attempt(tmp_path, name, [(old, new)]))
    assert not outcome.right
    assert outcome.done
    assert hint in outcome.hint, outcome


@pytest.mark.parametrize(("name", "old", "new"), flat(OTHERWISE))
def test_what_is_right_may_be_written_otherwise(
    judge: Callable, name: str, old: str, new: str, tmp_path: Path
) -> None:
    outcome = judge(NAMES.index(name) + 1, attempt(tmp_path, name, [(old, new)]))
    assert outcome.right, outcome


def untouched(name: str) -> Path:
    """The file with its hole; a learner who has filled it skips what is about the hole."""
    path = EXERCISES / f"{name}.py"
    if "raise NotImplementedError" not in path.read_text(encoding="utf-8"):
        assert not os.environ.get("CI"), f"{path.name} is filled in"
        pytest.skip(f"{path.name} is filled in")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_holes_and_solutions_have_the_same_signatures(name: str) -> None:
    hole, solution = (
        functions(loaded(path)) for path in (untouched(name), EXERCISES / "solutions" / f"{name}.py")
    )
    assert hole.keys() == solution.keys()
    for function in hole:
        assert inspect.signature(hole[function]) == inspect.signature(solution[function])
        assert inspect.signature(hole[function]).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", NAMES)
def test_the_worked_examples_are_what_the_solutions_give(name: str) -> None:
    solution = loaded(EXERCISES / "solutions" / f"{name}.py")
    for function, hole in functions(loaded(untouched(name))).items():
        examples = doctest.DocTestParser().get_doctest(
            hole.__doc__, vars(solution).copy(), function, None, None
        )
        assert examples.examples
        said: list[str] = []
        doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
        assert not said, "".join(said)


# What else an attempt may do


@pytest.mark.parametrize(
    ("change", "text", "hint"),
    [
        (
            ("wide = x", "wide = = x"),
            "Python cannot read ex03_rms_norm.py, line 8: invalid syntax",
            "Begin in",
        ),
        (
            ("import torch\n", "import torch_\n"),
            "ex03_rms_norm.py cannot be run: ModuleNotFoundError",
            "Begin in",
        ),
        (("def rms_norm", "def norm"), "ex03_rms_norm.py has no function rms_norm any more", "Begin in"),
        (("return normed", "normed"), "rms_norm returned None", "after `return`"),
        (("keepdim=True", "keepdim=false"), "raised NameError: name 'false' is not defined", "Begin in"),
        (("* weight", "* weight[:5]"), "at line 10", "Begin in"),
        (("* weight", "@ weight"), "yours has the shape (3,), Qwen's (3, 64)", "keepdim"),
        (
            ("normed.to(x.dtype) * weight", "(normed * weight).tolist()"),
            "a tensor is wanted, not [[",
            "keepdim",
        ),
        (("* weight", "* weight.double()"), "yours is float64, Qwen's float32", "keepdim"),
        (("* weight", "* weight * torch.nan"), "192 of 192 numbers differ", "keepdim"),
        (
            ("wide = x", "raise NotImplementedError('\"rsqrt\" for Long'); wide = x"),
            'Error: "rsqrt" for',
            "Begin in",
        ),
        (("return normed", "x.zero_(); return normed"), "", ""),
    ],
)
def test_what_python_says_is_a_line(
    judge: Callable, change: tuple[str, str], text: str, hint: str, tmp_path: Path
) -> None:
    outcome = judge(3, attempt(tmp_path, "ex03_rms_norm", [change]))
    assert outcome.right == (not text)
    assert "\n" not in outcome.text
    assert text in outcome.text
    assert hint in outcome.hint


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        (
            "ex01_split",
            ("def split", "import numpy\n\n\n@lambda f: lambda text: numpy.array(f(text))\ndef split"),
            "a plain list is wanted, not ",
        ),
        (
            "ex02_merge",
            (MERGED, "return (*parts[:i], pairs[i], *parts[i + 2 :])"),
            "a list is wanted, not a tuple",
        ),
        ("ex05_rotate", ("return torch.cat", "raise SystemExit; return torch.cat"), "raised SystemExit"),
    ],
)
def test_what_is_no_answer_at_all_is_said(
    judge: Callable, name: str, change: tuple[str, str], text: str, tmp_path: Path
) -> None:
    folder = attempt(tmp_path, name, [change])
    outcome = judge(NAMES.index(name) + 1, folder)
    assert not outcome.right
    assert text in outcome.text
    path = folder / f"{name}.py"
    path.write_text("exit()\n" + path.read_text("utf-8"), encoding="utf-8")
    assert "cannot be run: SystemExit" in judge(NAMES.index(name) + 1, folder).text


def test_the_second_hole_of_a_file_is_named_when_the_first_is_filled(judge: Callable, tmp_path: Path) -> None:
    folder = attempt(tmp_path, "ex04_ntk", [("stretched = ", "raise NotImplementedError; stretched = ")])
    outcome = judge(4, folder)
    assert (outcome.done, outcome.text) == (False, "not done yet: frequencies")


def test_what_fails_only_inside_the_model_is_said(judge: Callable, tmp_path: Path) -> None:
    """Right for all that is tried by itself, and for chunks of four; the last chunk has two tokens."""
    folder = attempt(
        tmp_path, "ex07_mask", [("return keys", "return keys[:3] <= queries if T == 2 else keys")]
    )
    outcome = judge(7, folder)
    assert outcome.text.startswith("with your mask inside, qwen_ref stopped: RuntimeError: ")
    folder = attempt(tmp_path, "ex07_mask", [("keys <= queries", "keys < queries + (T != 2)")])
    assert "the logits of a prompt fed in chunks of 4" in judge(7, folder).text
    folder = attempt(tmp_path, "ex03_rms_norm", [("wide = x", "1 / (x.shape[1] - 1); wide = x")])
    assert "raised ZeroDivisionError: division by zero, at line 8" in judge(3, folder).text


def test_an_attempt_leaves_the_project_and_the_folder_as_they_were(judge: Callable, tmp_path: Path) -> None:
    before = [vars(module).copy() for module in (qwen_ref.model, qwen_ref.tokenizer)]
    norm = qwen_ref.model.RMSNorm.forward
    for name in NAMES:
        attempt(tmp_path, name, [("return ", "1 / 0; return ")] if name == "ex07_mask" else [])
    for number in NUMBERS:
        judge(number, tmp_path)
    assert [vars(module) for module in (qwen_ref.model, qwen_ref.tokenizer)] == before
    assert qwen_ref.model.RMSNorm.forward is norm
    assert sorted(path.stem for path in tmp_path.iterdir()) == NAMES
    assert torch.is_grad_enabled()


# The command


@pytest.fixture
def checked(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """check.py on a folder of attempts."""
    check = importlib.import_module("check")

    def call(folder: Path, *arguments: str) -> Result:
        monkeypatch.setattr(check, "HOLES", folder)
        return run_command(lambda given: run(check.parser(), check.command, given), *arguments)

    return call


def test_the_command_says_right_and_not_yet(checked: Run, tmp_path: Path) -> None:
    done = checked(EXERCISES / "solutions", "10")
    assert done.code == 0
    assert done.out.startswith(
        "ex10_qkv_cut.py (q, k and v cut for several ranks): right\n  weights and biases"
    )
    assert done.out.endswith(
        "own: src/qwen_ref/checkpoint.py, TensorSpec.part; parallel.py, HeadParallelLinear\n"
    )
    done = checked(attempt(tmp_path, "ex07_mask", [("S - T, S", "T")]), "7")
    assert (done.code, done.err) == (1, "")
    first, second, third = done.out.splitlines()
    assert first == "ex07_mask.py (the causal mask behind a cache): not yet"
    assert second.startswith(
        "  3 new of 5 positions: yours is [[True, False, False, False, False], [True, True, "
    )
    assert third == "  hint: Row 0 is the first new query. How many keys came before it out of the cache?"


def test_the_command_without_a_number_says_how_all_stand(checked: Run, tmp_path: Path) -> None:
    done = checked(EXERCISES / "solutions")
    assert done.code == 0
    assert done.out.endswith("\n10 of 10 are right\n")
    for name in NAMES:
        attempt(tmp_path, name)
    attempt(tmp_path, "ex04_ntk", [("math.ceil", "math.floor")])
    attempt(tmp_path, "ex09_top_p", [("    values", "    raise NotImplementedError\n    values")])
    done = checked(tmp_path)
    lines = done.out.splitlines()
    assert done.code == 1
    assert lines[3] == " 4  ex04_ntk.py         not right yet  dynamic NTK's α and the frequencies"
    assert lines[8] == " 9  ex09_top_p.py       not done yet   top-p"
    assert lines[10] == "8 of 10 are right"


def test_the_command_refuses_in_a_line(checked: Run, tmp_path: Path) -> None:
    assert "invalid choice: 11" in refused(checked(EXERCISES, "11"))
    assert "invalid int value: 'ex03'" in refused(checked(EXERCISES, "ex03"))
    assert "ex03_rms_norm.py: cannot be read: No such file" in refused(checked(tmp_path, "3"))


def test_it_runs_as_the_readme_says() -> None:
    """A bare call, from the root of the checkout; with what a learner has, torch and not pytest."""
    done = python("examples/learn/exercises/check.py", "9", PYTHONPATH="src")
    assert (done.code in (0, 1), done.err) == (True, "")
    assert done.out.startswith("ex09_top_p.py (top-p): ")


def test_the_suite_does_not_collect_the_exercises(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
    patterns = pytestconfig.getini("python_files")
    assert not any(path.match(pattern) for path in EXERCISES.rglob("*") for pattern in patterns)


# What is said about them


def test_where_the_source_is_said_to_be_it_is(asked: list) -> None:
    for exercise in asked:
        for place in exercise.source.split("; "):
            file, names = place.removeprefix("the names in ").split(", ", 1)
            text = (ROOT / "src" / "qwen_ref" / Path(file).name).read_text(encoding="utf-8")
            for name in names.split(" and "):
                assert name.rpartition(".")[2] in text, (exercise.name, name)


def test_the_readme_has_every_exercise_and_what_the_command_prints(checked: Run, tmp_path: Path) -> None:
    text = (EXERCISES / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"[{name}.py]({name}.py)" in text
    hole = [("first, second", "raise NotImplementedError; first, second")]
    neighbours = [(HALVES, NEIGHBOURS)]
    for changes in (hole, neighbours, []):
        done = checked(attempt(tmp_path, "ex05_rotate", changes), "5")
        assert f"```\n{done.out}```\n" in text
