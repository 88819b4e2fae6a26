"""Runs the cells of walkthrough.py in order and writes one page with their text, code, output and figures.

    python examples/learn/render_walkthrough.py [--out build/walkthrough.html]

The page contains everything, figures included, and loads nothing from the network. It follows the browser's
light or dark scheme. The script needs markdown-it-py, Pygments and matplotlib (the extra "docs").
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import html
import io
import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from qwen_ref.commands.cli import Parser, Progress, on_stdout, run
from qwen_ref.commands.files import make_folder, output_path, write_whole
from qwen_ref.config import InputError

SCRIPT = Path(__file__).resolve().with_name("walkthrough.py")
PAGE = Path("build/walkthrough.html")
MARKDOWN, CODE = "# %% [markdown]", "# %%"
FIGURE = re.compile(r"figure: (\S+)")  # a line that says which file the album has just kept
TYPES = {"png": "image/png", "svg": "image/svg+xml"}


class Cell(NamedTuple):
    """A cell of a script in percent format: text without its comment signs, or code."""

    kind: str  # "markdown" or "code"
    source: str
    line: int  # the first of source in the script, from 1 on


def read_cells(script: str) -> list[Cell]:
    """The cells of a script.

    >>> read_cells("# %% [markdown]\\n# # Title\\n\\n# %%\\nprint(1)\\n")
    [Cell(kind='markdown', source='# Title', line=2), Cell(kind='code', source='print(1)', line=5)]

    Raises ValueError, with its line, for what belongs to no cell, for an empty cell, for another mark than
    the two, for text that is no comment and for code that is no Python.
    """
    cells: list[tuple[str, int, list[str]]] = []
    for number, line in enumerate(script.splitlines(), 1):
        if line.startswith(CODE):
            if line not in (MARKDOWN, CODE):
                raise InputError(f"line {number}: {line!r} is neither {MARKDOWN!r} nor {CODE!r}")
            cells.append(("markdown" if line == MARKDOWN else "code", number + 1, []))
        elif cells:
            cells[-1][2].append(line)
        elif line.strip():
            raise InputError(f"line {number}: {line!r} stands before the first cell")
    return [_cell(*cell) for cell in cells]


def _cell(kind: str, line: int, lines: list[str]) -> Cell:
    source = "\n".join(lines).strip("\n")
    if kind == "markdown":
        for number, each in enumerate(lines, line):
            if each and each != "#" and not each.startswith("# "):
                raise InputError(f"line {number}: {each!r} is in a cell of text and no comment")
        source = "\n".join(each[2:] for each in source.split("\n")).strip("\n")
    else:
        try:
            ast.parse(source)
        except SyntaxError as error:
            number = line + (error.lineno or 1) - 1
            raise InputError(f"line {number}: {error.msg}") from None
    if not source.strip():
        raise InputError(f"line {line}: an empty cell")
    return Cell(kind, source, line)


class Done(NamedTuple):
    """A cell that has run: the lines that it printed, each the bytes of a figure where it was one's name."""

    cell: Cell
    output: list[str | tuple[str, bytes]]  # a figure: its file's name, and what is in it


def run_cells(
    cells: Sequence[Cell], script: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[Done]:
    """Runs the code of the cells one after another in one namespace, as the script would; yields each.

    progress: called with the cells done and all of them. What a cell raises is raised here.
    """
    namespace: dict[str, object] = {"__name__": "__main__", "__file__": str(script)}
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            if progress is not None:
                progress(number, len(cells))
            lines: list[str] = []
            if cell.kind == "code":
                code = compile("\n" * (cell.line - 1) + cell.source, str(script), "exec")
                with _as_a_script(script, ["--out", folder]) as printed:
                    exec(code, namespace)
                    sys.stdout.flush()
                    lines = printed.getvalue().decode("utf-8").splitlines()
            output: list[str | tuple[str, bytes]] = []
            for line in lines:
                figure = FIGURE.fullmatch(line)
                output.append((figure[1], (Path(folder) / figure[1]).read_bytes()) if figure else line)
            yield Done(cell, output)
        if progress is not None:
            progress(len(cells), len(cells))


@contextlib.contextmanager
def _as_a_script(script: Path, arguments: Sequence[str]) -> Iterator[io.BytesIO]:
    """The command line, the path of imports and stdout as a script has them; gives what is printed."""
    before = sys.argv, sys.path[:], sys.excepthook
    printed = io.BytesIO()
    # A file, and not only a text: the project's commands set the encoding of theirs.
    stdout = io.TextIOWrapper(printed, encoding="utf-8")
    try:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        with contextlib.redirect_stdout(stdout):
            yield printed
    finally:
        stdout.detach()
        sys.argv, sys.path[:], sys.excepthook = before


STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1a1a1a; --faint: #5c5c5c; --line: #d8d8d8;
  --code: #f6f6f6; --equation: #eef5fb; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181c; --ink: #e4e4e4; --faint: #a5a5a5;
  --line: #3a3d44; --code: #1f2228; --equation: #1b2a38; --link: #7ab7f0; } }
body { margin: 0 auto; padding: 1.5rem 1rem 6rem; max-width: 64rem; background: var(--ground);
  color: var(--ink); font: 17px/1.6 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); line-height: 1.25; }
a { color: var(--link); }
nav { columns: 2 16rem; font-size: 0.9rem; margin: 1.5rem 0; }
nav a { display: block; text-decoration: none; padding: 0.1rem 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code, li code, td code { font-size: 0.88em; background: var(--code); padding: 0.1em 0.3em; 
  border-radius: 3px; white-space: pre-wrap; }
p, table, li { max-width: 46rem; }
pre { font-size: 0.85rem; line-height: 1.45; margin: 0.8rem 0; padding: 0.7rem 0.9rem; overflow-x: auto;
  background: var(--code); border-radius: 5px; }
pre.equation { font-size: 0.95rem; background: var(--equation); border-left: 4px solid var(--link); }
pre.output { background: none; border: 1px solid var(--line); }
figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; border-radius: 5px; }
table { border-collapse: collapse; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid var(--line); }
@media print { nav { display: none; } }
"""


def page(cells: Sequence[Done], title: str) -> str:
    """The HTML of what has run."""
    reader = MarkdownIt("commonmark").enable("table")
    python, paint = PythonLexer(), HtmlFormatter(cssclass="source")
    body: list[str] = []
    sections: list[tuple[str, str]] = []
    for done in cells:
        if done.cell.kind == "code":
            body.append(highlight(done.cell.source, python, paint))
            body.extend(_output(done.output))
            continue
        tokens = reader.parse(done.cell.source)
        for token, inside in itertools.pairwise(tokens):
            if token.type == "heading_open" and token.tag == "h2":
                anchor = re.sub(r"\W+", "-", inside.content.lower()).strip("-")
                token.attrSet("id", anchor)
                sections.append((anchor, inside.content))
        text = reader.renderer.render(tokens, reader.options, {})
        body.append(text.replace('<pre><code class="language-equation">', '<pre class="equation"><code>'))
    contents = "".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in sections)
    body.insert(1, f"<nav>{contents}</nav>")
    dark = HtmlFormatter(cssclass="source", style="github-dark").get_style_defs(".source")
    colours = f"{paint.get_style_defs('.source')}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"
    ground = ".source, .source pre { background: var(--code) !important; }"
    head = (
        f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}\n{colours}\n{ground}\n</style>\n"
    )
    top = f'<!doctype html>\n<html lang="en-GB">\n<head>\n{head}</head>\n'
    return f"{top}<body>\n{''.join(body)}</body>\n</html>\n"


def _output(output: Sequence[str | tuple[str, bytes]]) -> Iterator[str]:
    lines: list[str] = []

    def text() -> Iterator[str]:
        if lines:
            yield f'<pre class="output">{html.escape(chr(10).join(lines))}</pre>\n'
            lines.clear()

    for item in output:
        if isinstance(item, str):
            lines.append(item)
            continue
        yield from text()
        name, content = item
        stem, suffix = name.rsplit(".", 1)
        data = base64.b64encode(content).decode("ascii")
        what = html.escape(stem.replace("_", " "))
        yield f'<figure><img alt="{what}" src="data:{TYPES[suffix]};base64,{data}"></figure>\n'
    yield from text()


def command(args: argparse.Namespace) -> int:
    cells = read_cells(SCRIPT.read_text(encoding="utf-8"))
    make_folder(args.out.parent)
    output_path(args.out, "--out")
    with Progress("walkthrough", unit="cells") as progress:
        done = list(run_cells(cells, SCRIPT, progress.update))
    made = page(done, "Qwen, step by step")
    write_whole(args.out, made)
    print(on_stdout(str(args.out)))
    return 0


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--out", type=Path, default=PAGE, help="the page (%(default)s)")
    return made


if __name__ == "__main__":
    sys.exit(run(parser(), command))
