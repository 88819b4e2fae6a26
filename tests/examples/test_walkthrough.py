"""The walkthrough runs, says what it computed and becomes a page; the drawings are those of the presets."""

from __future__ import annotations

import ast
import html
import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, Result, Run, example_of, refused
from matplotlib.figure import Figure
from matplotlib.image import imread

import qwen_ref.model
import qwen_ref.quantize.rounding
import qwen_ref.sampling
import qwen_ref.tokenizer
from qwen_ref import QwenConfig
from qwen_ref.commands.cli import run

LEARN = ROOT / "examples" / "learn"
SCRIPT = LEARN / "walkthrough.py"
renderer, drawing = example_of("learn/render_walkthrough"), example_of("learn/draw_architecture")
figures = example_of("learn/walkthrough_figures")
SIZES = ("1.8b", "7b", "14b", "72b")

# What the path of a text through the model must pass, in this order: (section, what its code must call).
TOPICS = [
    ("The whole machine", "architecture"),
    ("Text to pieces", "split"),
    ("Merges, one by one", "merge_pairs"),
    ("Digits, one by one", "split"),
    ("The text of this evening", "Port"),
    ("Embedding", "embed"),
    ("RMSNorm", "RMSNorm"),
    ("Queries, keys and values", "qkv"),
    ("RoPE: where a token stands", "rotate"),
    ("Scores, the causal mask, softmax", "causal_mask"),
    ("Attention maps: looking up a capital", "attention_maps"),
    ("Beyond the trained length: NTK and LogN", "ntk_alpha"),
    ("SwiGLU: the MLP", "mlp"),
    ("The residual stream", "stages"),
    ("The logit lens: when is the capital there?", "lm_head"),
    ("The loop: one token after another", "argmax"),
    ("The cache", "new_cache"),
    ("Sampling", "probabilities"),
    ("Tensor parallelism: one model on two devices", "tensor_parallel"),
    ("Quantisation: fewer bits a weight", "quantize_int4"),
    ("The whole of it, once more", "generate"),
]
WITHOUT_EQUATION = {"The whole machine", "The text of this evening", "The whole of it, once more"}
FIGURES = {
    *("architecture.svg", "tensor_parallel.svg", "pieces.png", "rmsnorm.png", "distances.png", "rope.png"),
    *("scores.png", "attention_all.png", "attention.png", "logn_ntk.png", "swiglu.png", "residual.png"),
    *("lens.png", "sampling.png", "quantisation.png"),
}


@pytest.fixture
def cells(renderer: ModuleType) -> list:
    return renderer.read_cells(SCRIPT.read_text(encoding="utf-8"))


# The script


def start(script: str, *arguments: str | Path, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    environment.pop("PYTHONUNBUFFERED", None)  # a pipe is buffered, as a user has it
    command = [sys.executable, str(LEARN / script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, encoding="utf-8", **options)


def test_the_script_runs_from_top_to_bottom(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    process = start("walkthrough.py", "--out", tmp_path / "made", stdout=pipe, stderr=pipe)
    printed, problems = process.communicate(timeout=300)
    assert (process.returncode, problems) == (0, "")
    lines = printed.splitlines()
    assert {line.removeprefix("figure: ") for line in lines if line.startswith("figure: ")} == FIGURES
    assert {path.name for path in (tmp_path / "made").iterdir()} == FIGURES
    for path in (tmp_path / "made").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "layer 2, head 2: 0.87 on ' Japan', 0.03 on 'orway'" in lines
    assert lines[-2:] == ["The capital of Japan is Tokyo.", ""]


def test_a_closed_stdout_ends_the_script_as_it_ends_the_commands(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    process = start("walkthrough.py", "--out", tmp_path, stdout=pipe, stderr=pipe)
    process.stdout.close()
    problems = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=300), problems) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--figures"], "--figures"), (["--out", "{file}"], "{file}"), (["--out", "{file}/in"], "{file}/in")],
)
def test_wrong_options_are_one_line(
    figures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", ["walkthrough.py", *(a.format(file=file) for a in arguments)])
    with pytest.raises(SystemExit) as end:
        figures.Album.from_command_line("")
    line = refused(Result(end.value.code, *capsys.readouterr()))
    assert message.format(file=file) in line


def test_figures_for_the_readme_are_kept_twice(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    readme = tmp_path / "readme"
    readme.mkdir()
    monkeypatch.setattr(figures, "FOLDER", readme)
    album = figures.Album(tmp_path, also_for_readme=True)
    album.show("rope", Figure())
    album.show("pieces", Figure())
    assert [path.name for path in readme.iterdir()] == ["rope.png"]
    assert imread(readme / "rope.png")[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["pieces.png", "rope.png"]
    assert capsys.readouterr().out == "figure: rope.png\nfigure: pieces.png\n"


def test_the_readme_has_its_figures(figures: ModuleType) -> None:
    for name in figures.README_FIGURES:
        corner = imread(figures.FOLDER / f"{name}.png")[0, 0]
        assert corner.tolist() == [1.0, 1.0, 1.0, 1.0]  # white and opaque: its text is dark on any page


# What the text claims


def sections(cells: list) -> Iterator[tuple[str, str, str]]:
    """(heading, its text, its code) of every section."""
    heading, text, code = "", "", ""
    for cell in cells:
        if cell.kind == "markdown" and (found := re.match(r"## (.+)", cell.source)):
            if heading:
                yield heading, text, code
            heading, text, code = found[1], "", ""
        if cell.kind == "markdown":
            text += cell.source + "\n\n"
        else:
            code += cell.source + "\n"
    yield heading, text, code


def test_every_topic_is_a_section(cells: list) -> None:
    found = list(sections(cells))
    assert [heading for heading, _, _ in found] == [heading for heading, _ in TOPICS]
    for (heading, text, code), (_, called) in zip(found, TOPICS, strict=True):
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
        assert called in names, heading
        assert "print(" in code, heading
        assert re.search(r"^assert ", code, re.MULTILINE), heading
        if heading not in WITHOUT_EQUATION:
            assert "**Why.**" in text, heading
            assert re.search(r"^\*Source: ", text, re.MULTILINE), heading
            assert "```equation" in text, heading


# Numbers of the text that stand for any number of their kind.
ANY_NUMBER = {2024, 2025, 31, 741, 742}


def asserted(cells: list) -> set[float]:
    """The numbers in all asserts, those in strings included."""
    values = set()
    for cell in cells:
        tree = ast.parse(cell.source if cell.kind == "code" else "")
        for statement in ast.walk(tree):
            if isinstance(statement, ast.Assert):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Constant) and re.fullmatch(r"[\d.]+", str(node.value)):
                        values.add(float(node.value))
    return values


def test_every_number_of_the_text_is_asserted(cells: list) -> None:
    held = asserted(cells) | ANY_NUMBER
    seen = 0
    for cell in cells:
        if cell.kind == "code":
            continue
        text = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
        text = re.sub(r"^\*Source: .*?(\n\n|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"`[^`]*`", "", text)
        for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)", text):
            seen += 1
            assert float(number.replace(",", "")) in held, f"{number} in the text at line {cell.line}"
    assert seen > 60


def pairs_of_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def digits_together(text: str) -> list[str]:
    return re.findall(r"\d+|'s| ?\w+|\W", text)


def next_token_seen(T: int, S: int, padding: None, device: torch.device) -> torch.Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=1)[None, None]


def everything_kept(logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return logits.softmax(dim=-1)


def double_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 63
    return (weight / scale).round().to(torch.int8), scale


MISTAKES = {
    "digits merge": (qwen_ref.tokenizer, "split", digits_together),
    "neighbours are paired": (qwen_ref.model, "rotate", pairs_of_neighbours),
    "base 1e4 everywhere": (
        qwen_ref.model,
        "rotary_frequencies",
        lambda config, lengths, dtype: torch.stack(
            [1e4 ** -(torch.arange(0, config.kv_channels, 2, dtype=dtype) / config.kv_channels)]
            * len(lengths)
        ),
    ),
    "the mask is one too wide": (qwen_ref.model, "causal_mask", next_token_seen),
    "no NTK": (qwen_ref.model, "ntk_alpha", lambda prompt_length, seq_length: 1),
    "LogN from the start": (
        qwen_ref.model,
        "logn_scale",
        lambda positions, length, dtype: (positions + 2).log().div(torch.tensor(length).log()).to(dtype),
    ),
    "nothing is cut away": (qwen_ref.sampling, "probabilities", everything_kept),
    "int8 in 127 steps": (qwen_ref.quantize.rounding, "quantize_int8", double_steps),
    "the norm has no root": (
        qwen_ref.model.RMSNorm,
        "forward",
        lambda self, x: x / (x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_code_is_seen(
    renderer: ModuleType, figures: ModuleType, cells: list, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    monkeypatch.setattr(figures.Album, "show", lambda *_: None)
    with pytest.raises(AssertionError) as seen:
        list(renderer.run_cells(cells, SCRIPT))
    assert seen.traceback[-1].path == SCRIPT


# The page


class Page(NamedTuple):
    text: str
    done: list


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Rendered once; the cells as they ran, and what became of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(LEARN)
        renderer = importlib.import_module("render_walkthrough")
        cells = renderer.read_cells(SCRIPT.read_text(encoding="utf-8"))
        done = list(renderer.run_cells(cells, SCRIPT))
        yield Page(renderer.page(done, "Title & more"), done)


class Links(HTMLParser):
    """What a page asks a browser to fetch or to run, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "href":
                self.links.append(value)
            elif name in ("src", "srcset", "data", "action"):
                self.sources.append(value)


def test_the_page_holds_all_that_it_needs(page: Page) -> None:
    links = Links()
    links.feed(page.text)
    assert len(links.sources) == len(FIGURES)
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in links.sources)
    assert not links.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert links.links == [f"#{anchor}" for anchor in links.ids]
    assert len(set(links.ids)) == len(TOPICS)
    assert not re.search(r"url\(|@import", page.text)
    assert "prefers-color-scheme: dark" in page.text
    assert "<title>Title &amp; more</title>" in page.text
    assert page.text.count("<h1>") == 1


def test_the_page_has_every_figure_and_line_where_it_was_printed(page: Page) -> None:
    names = [item[0] for done in page.done for item in done.output if not isinstance(item, str)]
    assert len(names) == len(FIGURES)
    assert set(names) == FIGURES
    position = 0
    for done in page.done:
        for item in done.output:
            if isinstance(item, str):
                found = page.text.find(html.escape(item), position)
            else:
                found = page.text.find(f'alt="{item[0].rsplit(".", 1)[0].replace("_", " ")}"', position)
            assert found >= position, item
            position = found
    assert "```" not in page.text
    assert page.text.count('<pre class="equation">') == SCRIPT.read_text(encoding="utf-8").count(
        "# ```equation"
    )


def test_running_the_cells_leaves_the_process_as_it_was(renderer: ModuleType) -> None:
    before = sys.argv, sys.path[:], sys.excepthook, sys.stdout
    cells = renderer.read_cells("# %%\nimport sys\nsys.argv = sys.path = []\nprint('é')\n")
    (done,) = renderer.run_cells(cells, SCRIPT)
    assert done.output == ["é"]
    assert (sys.argv, sys.path, sys.excepthook, sys.stdout) == before


def test_what_a_cell_raises_has_its_line(renderer: ModuleType) -> None:
    cells = renderer.read_cells("# %% [markdown]\n# text\n\n# %%\nx = 1\nassert x == 2\n")
    with pytest.raises(AssertionError) as seen:
        list(renderer.run_cells(cells, SCRIPT))
    assert seen.traceback[-1].lineno + 1 == 6


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("x = 1\n# %%\n", "line 1: 'x = 1' stands before the first cell"),
        ("# %%\n\n# %% [markdown]\n# text\n", "line 2: an empty cell"),
        ("# %% [markdown]\n#\n\n# %%\nx = 1\n", "line 2: an empty cell"),
        ("# %% [raw]\n# text\n", "line 1: '# %% [raw]' is neither"),
        ("# %% [markdown]\n# text\nx = 1\n", "line 3: 'x = 1' is in a cell of text and no comment"),
        ("# %%\nx = 1\nx = = 2\n", "line 3: invalid syntax"),
    ],
)
def test_cells_that_are_none_are_refused(renderer: ModuleType, script: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        renderer.read_cells(script)


def test_the_renderer_writes_a_whole_page_or_none(
    renderer: ModuleType, monkeypatch: pytest.MonkeyPatch, run_command: Run, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    monkeypatch.setattr(renderer, "SCRIPT", script)

    def main(arguments: list[str]) -> int:
        return run(renderer.parser(), renderer.command, arguments)

    script.write_text("# %% [markdown]\n# # A title\n\n# %%\nprint('<out>')\n")
    result = run_command(main, "--out", tmp_path / "new" / "page.html")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new' / 'page.html'}\n")
    assert "&lt;out&gt;" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    script.write_text("# %% [markdown]\n# # Another\n\n# %%\nprint('x')\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: exec("raise PermissionError"))
        refused(run_command(main, "--out", tmp_path / "new" / "page.html"))
    assert "&lt;out&gt;" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    script.write_text("# %%\nx = = 1\n")
    assert "line 2" in refused(run_command(main, "--out", tmp_path / "other.html"))
    assert "--page" in refused(run_command(main, "--page"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "script.py"]


# The drawings


@pytest.mark.parametrize("name", ["architecture", "tensor_parallel"])
def test_the_drawings_in_git_are_what_the_script_draws(drawing: ModuleType, name: str) -> None:
    committed = (ROOT / "examples" / "figures" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == drawing.DRAWINGS[name](QwenConfig.preset("72b"))


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_architecture_has_the_shapes_of_the_preset(drawing: ModuleType) -> None:
    shown = texts(drawing.architecture(QwenConfig.preset("72b")))
    assert shown[0] == "Qwen-72B: 72,287,920,128 parameters"
    assert "80 layers, one after another" in shown
    assert shown.count("152,064 × 8,192") == 2  # embed and lm_head
    for shape in (
        *(
            "24,576 × 8,192",
            "+ bias 24,576",
            "T × 3 × 64 × 128",
            "none; base 1,000,000",
            "k, v: S × 64 × 128",
        ),
        *("8,192 × 8,192", "each 24,576 × 8,192", "8,192 × 24,576", "T × 24,576", "logits: T × 152,064"),
    ):
        assert shown.count(shape) == 1, shape


def test_the_cut_has_the_shapes_of_the_preset(drawing: ModuleType) -> None:
    shown = texts(drawing.tensor_parallel(QwenConfig.preset("72b")))
    for shape in (
        *("76,032 × 8,192", "76,032 × 8,192", "3 × 4,096 × 8,192", "8,192 × 4,096", "each 12,288 × 8,192"),
        *("8,192 × 12,288", "attention: T × 32 × 128", "silu(gate) · up: T × 12,288"),
    ):
        assert shown.count(shape) in (2, 4), shape  # a rank each; embed and lm_head are cut alike
    assert shown.count("all-reduce: the sum of two T × 8,192") == 1
    assert shown.count("all-reduce: the sum of two T × 8,192, then + x") == 2
    assert shown.count("gather: side by side, logits T × 152,064") == 1
    assert "tokens 76,032 to 152,063" in shown
    assert "heads 32 to 63, bias 3 × 4,096" in shown


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["architecture", "tensor_parallel"])
def test_every_size_is_drawn_within_its_ground(drawing: ModuleType, name: str, size: str) -> None:
    svg = drawing.DRAWINGS[name](QwenConfig.preset(size))
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(key)) for key in ("width", "height"))
    assert size.upper() in root[0].text
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        # Wide fonts take 0.62 of their size a character on average.
        length = 0.62 * float(text.get("font-size")) * len(text.text)
        left = float(text.get("x")) - length * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        assert left >= 0, text.text
        assert left + length <= width, text.text
        assert 0 < float(text.get("y")) < height, text.text


def test_what_cannot_be_cut_is_not_drawn(drawing: ModuleType) -> None:
    preset = QwenConfig.preset("7b")
    odd = {**vars(preset), "hidden_size": 3 * 128, "num_attention_heads": 3}
    with pytest.raises(ValueError, match="num_attention_heads=3 cannot be split over 2 ranks"):
        drawing.tensor_parallel(QwenConfig(**odd))


def test_the_drawing_command(drawing: ModuleType, run_command: Run, tmp_path: Path) -> None:
    def main(arguments: list[str]) -> int:
        return run(drawing.parser(), drawing.command, arguments)

    result = run_command(main, "--size", "7b", "--out", tmp_path / "made")
    assert result.code == 0
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert made == ["architecture_7b.svg", "tensor_parallel_7b.svg"]
    drawn = (tmp_path / "made" / "architecture_7b.svg").read_text(encoding="utf-8")
    assert "Qwen-7B" in drawn
    assert "NTK and LogN beyond 8,192" in drawn
    assert "no preset '3b'" in refused(run_command(main, "--size", "3b", "--out", tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(run_command(main, "--out", tmp_path / "file"))
