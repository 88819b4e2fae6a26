"""The rules of the house: seven files that stand alone, folders around them, imports one way, a short README.

Imports are read from the source by ast: those inside functions and those under TYPE_CHECKING count as well.
What stands under `if __name__ == "__main__"` does not: no import of the module reaches it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import GOLDEN, KERNELS, ROOT, WEIGHTS, python

import qwen_ref

PACKAGE = ROOT / "src" / "qwen_ref"
SEVEN = ("config", "tokenizer", "model", "parallel", "checkpoint", "sampling", "generate")
PACKAGES = {"torch", "numpy", "regex", "safetensors", "tiktoken"}
COMMANDS = sorted(["generate", "checkpoint", *(path.parent.name for path in PACKAGE.glob("*/__main__.py"))])
FOLDERS = ("src", "tests", "examples", "weights")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


# Imports


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(source: str, package: str = "") -> Iterator[tuple[str, bool]]:
    """All that is imported, by full names, and whether later: inside a function, or for a type checker.

    package: where a relative import starts.
    """
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while pending:
        node, later = pending.pop()
        if is_main_block(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", later) for alias in node.names)
        later = later or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        later = later or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        pending += ((child, later) for child in ast.iter_child_nodes(node))


def module_of(name: str) -> str:
    """The module of the package that an imported name is, or that holds it."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


@cache
def graph() -> dict[str, set[str]]:
    """Each module of the package → those that it imports."""
    found = {}
    for module, path in modules().items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        names = [name for name, _ in imports(path.read_text(encoding="utf-8"), package)]
        found[module] = {module_of(name) for name in names if name.split(".")[0] == "qwen_ref"}
    return found


def room(module: str) -> str:
    """The folder of a module; the seven are one, and what else is at the top is a room of its own."""
    first = module.split(".")[1] if "." in module else ""
    return "the seven" if first in SEVEN else first


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that lead to each other."""

    @cache
    def reached(start: str) -> frozenset[str]:
        found, pending = set(), [start]
        while pending:
            new = edges.get(pending.pop(), set()) - found
            found |= new
            pending += new
        return frozenset(found)

    groups = {tuple(sorted(n for n in reached(node) if node in reached(n))) for node in edges}
    return sorted(list(group) for group in groups if group)


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b, c
from d import e as f
if TYPE_CHECKING:
    from g import h
def function():
    import i
class Body:
    def method(self):
        from . import j
        from ..k import l
if __name__ == "__main__":
    from m import n
"""
    assert sorted(imports(source, "p.q")) == [
        *(("a.b", False), ("c", False), ("d.e", False), ("g.h", True), ("i", True)),
        *(("p.k.l", True), ("p.q.j", True)),
    ]


def test_circles_are_found() -> None:
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": {"e"}}) == [["b", "c", "d"], ["e"]]


# 1. The seven stand alone


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_import_each_other_and_five_packages(name: str) -> None:
    """And checkpoint.py, where it meets a GPTQ checkpoint, the package's quantize."""
    for imported, later in imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8"), "qwen_ref"):
        first, _, rest = imported.partition(".")
        rest = rest.partition(".")[0]
        if first == "qwen_ref":
            packed = name == "checkpoint" and later and rest == "quantize"
            assert rest in SEVEN or packed, f"{name}.py imports {imported}"
        else:
            assert first in PACKAGES | sys.stdlib_module_names, f"{name}.py imports {imported}"


ANSWER = "亚的斯亚贝巴（Addis Ababa）"  # what `make run` prints
ALONE = """
import json, sys
import qwen_ref
from qwen_ref.checkpoint import load_model
from qwen_ref.generate import generate
from qwen_ref.tokenizer import Tokenizer

folder, prompt = sys.argv[1:]
tokenizer = Tokenizer.from_file(folder + "/qwen.tiktoken")
(stop,) = tokenizer.encode("<|endoftext|>", allowed_special="all")
steps = list(generate(load_model(folder), tokenizer.encode(prompt), stop_ids=[stop]))
text = tokenizer.decode([step.token for step in steps], skip_special_tokens=True)
loaded = sorted(name.partition(".")[2] for name in sys.modules if name.startswith("qwen_ref."))
print(json.dumps([qwen_ref.__file__, loaded, text]))
"""


def quickstart_prompt() -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (prompt,) = re.findall(r"^QUICKSTART := (.+)$", makefile, re.MULTILINE)
    return prompt.replace("\\n", "\n")


def run_python(code: str, *arguments: str, path: Path = PACKAGE.parent) -> str:
    """stdout of code in a process of its own, with the package from path."""
    done = python("-c", code, *arguments, PYTHONPATH=str(path))
    assert done.code == 0, done.err
    return done.out


def test_the_seven_alone_complete_the_quickstart_prompt(tmp_path: Path) -> None:
    alone = tmp_path / "qwen_ref"
    alone.mkdir()
    (alone / "__init__.py").touch()
    for name in SEVEN:
        shutil.copy(PACKAGE / f"{name}.py", alone)
    file, loaded, text = json.loads(run_python(ALONE, str(WEIGHTS), quickstart_prompt(), path=tmp_path))
    assert Path(file) == alone / "__init__.py"
    assert loaded == sorted(SEVEN)
    assert text == ANSWER


# 2. They are short


def test_the_seven_have_at_most_2000_lines_and_the_model_380() -> None:
    lines = {name: len((PACKAGE / f"{name}.py").read_text("utf-8").splitlines()) for name in SEVEN}
    assert lines["model"] <= 380
    assert sum(lines.values()) <= 2000, lines


def test_the_model_loads_config_and_parallel_only() -> None:
    code = "import sys, qwen_ref.model; print(*(n for n in sys.modules if n.startswith('qwen_ref.')))"
    assert sorted(run_python(code).split()) == ["qwen_ref.config", "qwen_ref.model", "qwen_ref.parallel"]


# 3. The top of the package


def test_the_top_of_the_package_is_the_seven_and_what_a_person_types() -> None:
    others = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", *SEVEN}
    assert len(others) <= 4
    assert others <= {"__main__", *COMMANDS}


# 4. One way


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph()) == []


def test_no_folder_imports_itself_by_way_of_others() -> None:
    """The seven are one room, and what checkpoint.py may import of quantize is apart (see 1)."""
    edges: dict[str, set[str]] = {}
    for module, targets in graph().items():
        for target in targets:
            if (module, room(target)) != ("qwen_ref.checkpoint", "quantize"):
                edges.setdefault(room(module), set()).add(room(target))
    assert circles({start: ends - {start} for start, ends in edges.items()}) == []
    assert edges["the seven"] == {"the seven"}


# 5. What is documented works

EACH_APART = """
import io, json, os, pkgutil, runpy, sys, traceback

cases, missing = json.load(sys.stdin)
sys.modules.update(dict.fromkeys(missing))
if not missing:
    import torch
answers = []
for case in cases:
    reader, writer = os.pipe()
    if os.fork() == 0:
        sys.stdout = sys.stderr = io.StringIO()
        code = 0
        try:
            if isinstance(case, str):
                exec(case, {"resolve_name": pkgutil.resolve_name})
            else:
                sys.argv = [f"python -m {case[0]}", *case[1:]]
                runpy.run_module(case[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            json.dump([code, sys.stdout.getvalue()], pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answers.append(json.load(pipe))
    os.wait()
sys.__stdout__.write(json.dumps(answers))
"""


def each_apart(cases: list, missing: tuple[str, ...] = ()) -> list[tuple[object, str]]:
    """(exit code, output) of each case in a fresh fork of one process, in which packages may be missing.

    A case is code, or a module with the arguments that `python -m` gives it. A fork, so that none works only
    because one before it has imported something.
    """
    done = python("-c", EACH_APART, stdin=json.dumps([cases, missing]))
    assert done.code == 0, done.err
    return [tuple(answer) for answer in json.loads(done.out)]


OPTIONS = {
    "generate": "--model --max-new-tokens --repetition-penalty --allow-special --logprobs",
    "trace": "--model --file --dtype --layers --lens --top --allow-special --json",
    **{"chat": "--once", "parity": "diagnose"},
}


def test_help_of_every_command_needs_neither_torch_nor_numpy() -> None:
    """But for checkpoint's, which is one of the seven."""
    inspect = ["qwen_ref.checkpoint", "--help"]
    cases = [[f"qwen_ref.{name}", "--help"] for name in COMMANDS]
    cases += [["qwen_ref.parity", each, "--help"] for each in ("record", "check", "diff", "diagnose", "make")]
    cases.remove(inspect)
    answers = dict(zip(map(tuple, cases), each_apart(cases, ("torch", "numpy")), strict=True))
    answers[tuple(inspect)], *_ = each_apart([inspect])
    assert {case: code for case, (code, _) in answers.items() if code != 0} == {}
    for case, (_, out) in answers.items():
        assert out.startswith(f"usage: python -m {case[0]}"), case
    for name, options in OPTIONS.items():
        _, out = answers[f"qwen_ref.{name}", "--help"]
        assert [option for option in options.split() if option not in out] == []


def test_the_package_lists_every_command() -> None:
    ((code, out),) = each_apart([["qwen_ref"]], ("torch", "numpy"))
    assert code in (0, None), code
    assert out.startswith(f"qwen_ref {qwen_ref.__version__}")
    assert sorted(re.findall(r"python -m qwen_ref\.(\w+)", out)) == COMMANDS


def test_checkpoint_is_executed_once() -> None:
    """As __main__ or as qwen_ref.checkpoint, which the command imports: each of its classes is made once."""
    source = (PACKAGE / "checkpoint.py").read_text(encoding="utf-8")
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    code = """
import collections, runpy, sys
made = collections.Counter()
def count(frame, event, _):
    if event == "call" and frame.f_code.co_filename.endswith("checkpoint.py"):
        made[frame.f_code.co_name] += 1
sys.argv = ["checkpoint", "inspect", "1.8b"]
sys.setprofile(count)
try:
    runpy.run_module("qwen_ref.checkpoint", run_name="__main__", alter_sys=True)
except SystemExit as end:
    sys.setprofile(None)
    print("made", end.code, *(made[name] for name in sys.stdin.read().split()))
"""
    done = python("-c", code, stdin=" ".join(classes))
    assert classes
    assert done.out.splitlines()[-1].split() == ["made", "0", *["1"] * len(classes)], done.err


# Stable: outside checks and scripts call them.
PUBLIC = """
from qwen_ref import InputError, KVCache, Qwen, QwenConfig, StreamDecoder, Tokenizer, load_model
from qwen_ref.generate import Step, generate, generate_batch, generate_uncached
from qwen_ref.sampling import probabilities
from qwen_ref.quantize import dequantize_gptq
from qwen_ref.fast import fasten
from qwen_ref.decoding import PrefixCache, TextStream, generate_lookup
from qwen_ref.chat import Conversation, build_context, reply
from qwen_ref.perplexity import score
from qwen_ref.trace import trace
from qwen_ref.parity import check, diagnose, diff, make, read_bundle, record, write_bundle
from qwen_ref.lookup import generate_lookup
import qwen_ref; qwen_ref.sampling.probabilities
import qwen_ref; qwen_ref.chat.build_context
import qwen_ref; qwen_ref.quantize.dequantize_gptq
import qwen_ref; qwen_ref.perplexity.score
""".strip().splitlines()


IMPORT = re.compile(r"from qwen_ref[\w.]* import (?:\([^)]*\)|[\w, ]+)|import qwen_ref[\w.]*")
NAME = re.compile(r"(?<![\w./-])(?<!-m )qwen_ref(?:\.[A-Za-z_]\w*)+")


def documented(page: str) -> set[str]:
    """The imports in a page's Python blocks and inline code, and its names of the package as imports.

    >>> sorted(documented("`from qwen_ref.a import b`, `qwen_ref.c.d(1)`, `python -m qwen_ref.e`"))
    ['from qwen_ref.a import b', 'resolve_name("qwen_ref.c.d")']
    """
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    found = set()
    for code in [*blocks, *re.findall(r"`([^`]+)`", prose)]:
        found.update(IMPORT.findall(code))
        found.update(f'resolve_name("{name}")' for name in NAME.findall(IMPORT.sub("", code)))
    return found


def test_what_the_pages_import_is_there() -> None:
    cases = [*PUBLIC, *sorted(set().union(*(documented(page.read_text("utf-8")) for page in PAGES)))]
    extra = importlib.util.find_spec("lm_eval") is not None
    cases = [case for case in cases if extra or "harness" not in case]
    failed = {case: code for case, (code, _) in zip(cases, each_apart(cases), strict=True) if code != 0}
    assert failed == {}


def test_the_harness_has_its_old_name() -> None:
    pytest.importorskip("lm_eval", reason="an extra: `make eval` installs it")
    ((code, _),) = each_apart(["import qwen_ref.harness as a, qwen_ref.evaluate.harness as b; assert a is b"])
    assert code == 0, code


def test_documented_imports_are_found() -> None:
    blocks = "```python\nfrom qwen_ref.b import (\n  c,\n)\nimport qwen_ref\n```\n```sh\nqwen_ref.no\n```\n"
    inline = "`qwen_ref.a.B(x)`, `python -m qwen_ref.no`, src/qwen_ref/no.py, `from qwen_ref import d, e`"
    assert documented(blocks + inline) == {
        *("from qwen_ref.b import (\n  c,\n)", "import qwen_ref", "from qwen_ref import d, e"),
        'resolve_name("qwen_ref.a.B")',
    }


# 6. The README is a door


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert len(text.split()) <= 3000


# The package itself


def test_dir_has_every_public_name() -> None:
    code = "import json, qwen_ref; print(json.dumps([dir(qwen_ref), qwen_ref.__all__]))"
    shown, public = json.loads(run_python(code))
    names = {name.strip() for name in PUBLIC[0].partition("import ")[2].split(",")}
    assert names <= set(public)
    assert {*public, "chat", "perplexity", "quantize", "sampling", "__version__"} <= set(shown)
    for name in public:
        assert getattr(qwen_ref, name) is not None


def test_the_version_is_that_of_the_installation() -> None:
    assert qwen_ref.__version__ == importlib.metadata.version("qwen_ref")


def test_the_list_of_tests_of_numbers_names_files() -> None:
    stems = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert set(stems) >= KERNELS
    assert len(stems) == len(set(stems))  # pytest imports them by these names


# What is shipped


def sources(folder: Path) -> set[str]:
    """Modules, pages and the mark of types, by their paths in a folder."""
    found = (path for path in folder.rglob("*") if path.suffix in (".py", ".md", ".typed"))
    return {path.relative_to(folder).as_posix() for path in found}


def test_a_wheel_has_every_page_and_works_outside_the_checkout(tmp_path: Path) -> None:
    build = [*("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"), "--wheel-dir", tmp_path]
    done = subprocess.run([sys.executable, *build, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    installed = tmp_path / "site" / "qwen_ref"
    assert sources(installed) == sources(PACKAGE) | {f"weights/{name}" for name in sources(WEIGHTS)}
    assert (installed / "py.typed").exists()
    assert (installed / "weights" / "model.safetensors").exists()
    code = "import qwen_ref, sys; print(qwen_ref.__file__); "
    code += "from qwen_ref.commands.generate import main; main()"
    file, answer = run_python(code, quickstart_prompt(), path=tmp_path / "site").splitlines()
    assert Path(file) == installed / "__init__.py"
    assert answer == ANSWER


def test_a_source_distribution_has_what_the_checkout_has(tmp_path: Path) -> None:
    build = ["-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    for folder in FOLDERS:
        assert {f"{folder}/{name}" for name in sources(ROOT / folder)} <= names
    assert {
        "README.md",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "weights/model.safetensors",
    } <= names
    assert {path.relative_to(ROOT).as_posix() for path in GOLDEN.rglob("*.safetensors")} <= names
