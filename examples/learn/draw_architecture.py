"""Draws the architecture and its cut for two ranks, with the real shapes of a published size, as SVG.

    python examples/learn/draw_architecture.py [--size 72b] [--out examples/figures]

Every number comes from the configuration and from the table of tensors, so the figures show what the code
does. The drawings have a white background, so they are readable on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from qwen_ref.checkpoint import TensorSpec, tensor_table
from qwen_ref.commands.cli import Parser, on_stdout, run
from qwen_ref.commands.files import make_folder, output_path, write_whole
from qwen_ref.config import QwenConfig

OUT = Path(__file__).resolve().parents[1] / "figures"

INK, FAINT = "#1a1a1a", "#555555"
WEIGHTS, PLAIN, KEPT, SUM = "#d6e8f5", "#f2f2f2", "#fff0cc", "#f6d5c5"  # grounds of boxes
RANKS = ("#cfe6f5", "#ffe1b3")
RANK_EDGES = ("#0072b2", "#b36b00")


class Drawing:
    """SVG elements, one after another."""

    def __init__(self, width: int, title: str) -> None:
        self.width, self.title, self.elements = width, title, []

    def box(self, x: float, y: float, width: float, height: float, ground: str, edge: str = INK) -> None:
        """y is its middle, as of everything here."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="4" '
            f'fill="{ground}" stroke="{edge}"/>'
        )

    def frame(self, x: float, top: float, width: float, bottom: float) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{top:g}" width="{width:g}" height="{bottom - top:g}" rx="8" fill="none" '
            f'stroke="{FAINT}" stroke-dasharray="6 4"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "start",
        size: int = 13,
        ink: str = INK,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y + 0.36 * size:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{ink}"{weight}>{escape(text)}</text>'
        )

    def labelled_box(self, x: float, y: float, width: float, ground: str, text: str, edge: str = INK) -> None:
        self.box(x, y, width, 30, ground, edge)
        self.text(x + width / 2, y, text, "middle")

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        """Along straight lines; its point is where the last one ends."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#head)"' if head else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.3"{end}/>'
        )

    def plus(self, x: float, y: float) -> None:
        self.elements.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="white" stroke="{INK}"/>')
        self.arrow((x - 6, y), (x + 6, y), head=False)
        self.arrow((x, y - 6), (x, y + 6), head=False)

    def svg(self, height: float) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:g}" '
                f'width="{self.width}" height="{height:g}" font-family="Helvetica, Arial, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
                f'<rect width="{self.width}" height="{height:g}" rx="10" fill="white"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def shape(*sizes: int | str) -> str:
    """As the figures write it.

    >>> shape("T", 8192)
    'T × 8,192'
    """
    return " × ".join(size if isinstance(size, str) else f"{size:,}" for size in sizes)


def name_of(config: QwenConfig) -> str:
    """Qwen-72B and its like."""
    for size in ("1.8b", "7b", "14b", "72b"):
        if config == QwenConfig.preset(size):
            return f"Qwen-{size.upper()}"
    return "Qwen"


def _weights(config: QwenConfig) -> dict[str, TensorSpec]:
    """The tensors outside of the layers and of one layer, as all are alike: "embed.weight", "qkv.bias", …"""
    inside = re.compile(r"blocks\.0\.(attn\.|mlp\.)?")
    return {inside.sub("", spec.name): spec for spec in tensor_table(config)}


def architecture(config: QwenConfig) -> str:
    """An SVG of what is computed, from ids to logits: the shape of every weight and of what a step gives."""
    D, H, K, F, V = (
        config.hidden_size,
        config.num_attention_heads,
        config.kv_channels,
        config.mlp_width,
        config.vocab_size,
    )
    specs = _weights(config)
    total = sum(math.prod(spec.shape) for spec in tensor_table(config))
    drawing = Drawing(930, f"{name_of(config)}, from token ids to logits")
    stream, left, right = 90, 170, 480  # the residual stream; the branch's boxes reach from left to right
    weights_x, gives_x = 520, 745
    width, middle = right - left, (left + right) / 2
    third = (width - 20) / 3
    columns = [left + n * (third + 10) for n in range(3)]  # of q, k and v
    centres = [column + third / 2 for column in columns]
    step = 46

    drawing.text(24, 28, f"{name_of(config)}: {total:,} parameters", size=17, bold=True)
    drawing.text(24, 52, "T: tokens of the text.  S: those and the ones in the cache.", size=12, ink=FAINT)
    drawing.text(weights_x, 52, "weights, out × in", size=12, ink=FAINT, bold=True)
    drawing.text(gives_x, 52, "what the step gives", size=12, ink=FAINT, bold=True)

    def beside(y: float, weight: str | Sequence[str], gives: str) -> None:
        lines = [weight] if isinstance(weight, str) else list(weight)
        for n, line in enumerate(filter(None, lines)):
            drawing.text(weights_x, y + 16 * (n - (len(lines) - 1) / 2), line)
        drawing.text(gives_x, y, gives)

    def of(name: str) -> str:
        return shape(*specs[f"{name}.weight"].shape)

    y = 88.0
    drawing.labelled_box(24, y, right - 24, PLAIN, "text → token ids")
    beside(y, "", "T ids")
    drawing.arrow((stream, y + 15), (stream, y + step - 15))
    y += step
    drawing.labelled_box(24, y, right - 24, WEIGHTS, "embed: a row for each id")
    beside(y, of("embed"), f"x: {shape('T', D)}")
    stream_top = y + 15

    top = y + 30
    y = top + 26
    drawing.text(right, y - 8, f"{config.num_hidden_layers} layers, one after another", "end", bold=True)
    drawing.text(stream - 8, y - 8, "x", "end", bold=True)
    y += 32
    drawing.arrow((stream, y), (left, y))
    drawing.labelled_box(left, y, width, WEIGHTS, "attn_norm: RMSNorm")
    beside(y, of("attn_norm"), shape("T", D))
    drawing.arrow((middle, y + 15), (middle, y + step - 15))
    y += step
    drawing.labelled_box(left, y, width, WEIGHTS, "qkv: one projection for all three")
    beside(y, [of("qkv"), f"+ bias {shape(*specs['qkv.bias'].shape)}"], shape("T", "3", H, K))
    for centre in centres:
        drawing.arrow((centre, y + 15), (centre, y + step - 15))
    y += step
    for column, name in zip(columns, ("q", "k", "v"), strict=True):
        drawing.labelled_box(column, y, third, PLAIN, name)
    beside(y, "", f"each {shape('T', H, K)}")
    for centre in centres[:2]:
        drawing.arrow((centre, y + 15), (centre, y + step - 15))
    drawing.arrow((centres[2], y + 15), (centres[2], y + 2 * step - 15))
    y += step
    drawing.labelled_box(columns[0], y, 2 * third + 10, PLAIN, "RoPE: turn by position")
    far = config.use_dynamic_ntk or config.use_logn_attn
    beyond = f"\nNTK and LogN beyond {config.seq_length:,}" if far else ""
    beside(y, f"none; base {config.rotary_emb_base:,.0f}{beyond}", f"q, k: {shape('T', H, K)}")
    drawing.arrow((centres[0], y + 15), (centres[0], y + 2 * step - 15))
    drawing.arrow((centres[1], y + 15), (centres[1], y + step - 15))
    y += step
    drawing.labelled_box(columns[1], y, 2 * third + 10, KEPT, "cache: append k, v")
    beside(y, "", f"k, v: {shape('S', H, K)}")
    for centre in centres[1:]:
        drawing.arrow((centre, y + 15), (centre, y + step - 15))
    y += step
    drawing.labelled_box(left, y, width, PLAIN, f"softmax(q kᵀ / √{K} + causal mask) v")
    beside(y, f"none; {shape('T', 'S')} scores a head", shape("T", H, K))
    drawing.arrow((middle, y + 15), (middle, y + step - 15))
    y += step
    drawing.labelled_box(left, y, width, WEIGHTS, "out")
    beside(y, of("out"), shape("T", D))
    drawing.arrow((left, y), (stream + 11, y))
    first_plus = y
    y += step + 6
    drawing.arrow((stream, y), (left, y))
    drawing.labelled_box(left, y, width, WEIGHTS, "mlp_norm: RMSNorm")
    beside(y, of("mlp_norm"), shape("T", D))
    half = (width - 10) / 2
    halves = [left + half / 2, left + half + 10 + half / 2]
    for centre in halves:
        drawing.arrow((centre, y + 15), (centre, y + step - 15))
    y += step
    for n, name in enumerate(("gate", "up")):
        drawing.labelled_box(left + n * (half + 10), y, half, WEIGHTS, name)
    beside(y, f"each {of('gate')}", f"each {shape('T', F)}")
    for centre in halves:
        drawing.arrow((centre, y + 15), (centre, y + step - 15))
    y += step
    drawing.labelled_box(left, y, width, PLAIN, "silu(gate) · up")
    beside(y, "", shape("T", F))
    drawing.arrow((middle, y + 15), (middle, y + step - 15))
    y += step
    drawing.labelled_box(left, y, width, WEIGHTS, "down")
    beside(y, of("down"), shape("T", D))
    drawing.arrow((left, y), (stream + 11, y))
    second_plus = y
    bottom = y + 32
    drawing.frame(24, top, right + 12 - 24, bottom)
    y = bottom + 34
    drawing.arrow((stream, stream_top), (stream, first_plus - 11))
    drawing.arrow((stream, first_plus + 11), (stream, second_plus - 11))
    drawing.arrow((stream, second_plus + 11), (stream, y - 15))
    drawing.plus(stream, first_plus)
    drawing.plus(stream, second_plus)
    drawing.labelled_box(24, y, right - 24, WEIGHTS, "norm: RMSNorm")
    beside(y, of("norm"), shape("T", D))
    drawing.arrow((stream, y + 15), (stream, y + step - 15))
    y += step
    drawing.labelled_box(24, y, right - 24, WEIGHTS, "lm_head: a score for every token")
    beside(y, of("lm_head"), f"logits: {shape('T', V)}")
    y += 44
    for x, ground, meaning in (
        (24, WEIGHTS, "has weights"),
        (150, PLAIN, "has none"),
        (256, KEPT, "kept for the tokens that follow"),
    ):
        drawing.box(x, y, 16, 16, ground)
        drawing.text(x + 24, y, meaning, size=12, ink=FAINT)
    drawing.plus(490, y)
    drawing.text(508, y, "added to the residual stream x", size=12, ink=FAINT)
    return drawing.svg(y + 26)


def tensor_parallel(config: QwenConfig) -> str:
    """An SVG of the part of every weight that each of two ranks has, and of where the two meet.

    Raises ValueError for a model that cannot be cut in two.
    """
    config.check_ranks(2)
    D, H, K, F, V = (
        config.hidden_size,
        config.num_attention_heads,
        config.kv_channels,
        config.mlp_width,
        config.vocab_size,
    )
    specs = _weights(config)
    drawing = Drawing(980, f"{name_of(config)} on two ranks")
    lefts, width = (440, 705), 245
    centres = [left + width / 2 for left in lefts]
    drawing.text(24, 28, f"{name_of(config)} on two ranks", size=17, bold=True)
    drawing.text(
        24,
        52,
        "T: tokens.  Weights are out × in, drawn to scale but for embed and lm_head.",
        size=12,
        ink=FAINT,
    )
    for n, centre in enumerate(centres):
        drawing.text(centre, 52, f"rank {n} holds", "middle", bold=True, ink=RANK_EDGES[n])

    def icon(y: float, spec: TensorSpec) -> None:
        """The whole matrix in its cut, rows downwards."""
        rows, inputs = spec.shape
        unit = 26 / D
        height, across = min(rows * unit, 78), inputs * unit
        x, top = 360 - across / 2, y - height / 2
        stripes = 6 if spec.cut == "heads" else 2
        for n in range(stripes):
            share = {"x": x, "y": top, "width": across, "height": height}
            along, size = ("x", "width") if spec.cut == "columns" else ("y", "height")
            share[size] /= stripes
            share[along] += n * share[size]
            places = " ".join(f'{key}="{value:g}"' for key, value in share.items())
            drawing.elements.append(f'<rect {places} fill="{RANKS[n % 2]}" stroke="{RANK_EDGES[n % 2]}"/>')

    def row(y: float, name: str, parts: Sequence[str], notes: Sequence[str]) -> None:
        """A weight, its cut, and what each rank has of it."""
        spec = specs[f"{parts[0]}.weight"]
        drawing.text(24, y - 9, name, bold=True)
        drawing.text(24, y + 9, shape(*spec.shape), size=12, ink=FAINT)
        if len(spec.shape) == 2:
            icon(y, spec)
        own = spec.shape_of_rank(2)
        each = f"3 × {shape(own[0] // 3, *own[1:])}" if spec.cut == "heads" else shape(*own)
        if len(parts) > 1:
            each = f"each {each}"
        cut = {"heads": "rows of q, of k, of v", "rows": "rows", "columns": "columns", None: "not cut"}[
            spec.cut
        ]
        drawing.text(190, y, cut, size=12, ink=FAINT)
        for left, note, ground, edge in zip(lefts, notes, RANKS, RANK_EDGES, strict=True):
            drawing.box(left, y, width, 44, ground if spec.cut else PLAIN, edge if spec.cut else INK)
            drawing.text(left + width / 2, y - 9, each, "middle")
            drawing.text(left + width / 2, y + 9, note, "middle", size=12, ink=FAINT)

    def own(y: float, name: str, texts: Sequence[str]) -> None:
        """What each rank computes by itself."""
        drawing.text(24, y, name)
        for left, text in zip(lefts, texts, strict=True):
            drawing.labelled_box(left, y, width, PLAIN, text)

    def down(start: float, end: float) -> None:
        for centre in centres:
            drawing.arrow((centre, start), (centre, end))

    def meet(y: float, text: str) -> None:
        drawing.box(lefts[0], y, lefts[1] + width - lefts[0], 28, SUM)
        drawing.text((lefts[0] + lefts[1] + width) / 2, y, text, "middle", bold=True)

    def halves(size: int, what: str) -> list[str]:
        return [f"{what} {n * size // 2:,} to {(n + 1) * size // 2 - 1:,}" for n in range(2)]

    y = 118.0
    row(y, "embed", ["embed"], halves(V, "tokens"))
    down(y + 22, y + 42)
    y += 56
    meet(y, f"all-reduce: the sum of two {shape('T', D)}")
    top = y + 32
    down(y + 14, top + 44)
    drawing.text(24, top + 20, f"{config.num_hidden_layers} layers, one after another", ink=FAINT, bold=True)
    y = top + 66
    row(y, "attn_norm", ["attn_norm"], ["the same", "the same"])
    down(y + 22, y + 48)
    y += 70
    bias = shape("3", specs["qkv.bias"].shape_of_rank(2)[0] // 3)
    row(y, "qkv", ["qkv"], [f"{heads}, bias {bias}" for heads in halves(H, "heads")])
    down(y + 22, y + 47)
    y += 62
    heads = f"attention: {shape('T', H // 2, K)}"
    own(y, "each rank by itself", [heads, heads])
    down(y + 15, y + 32)
    y += 54
    row(y, "out", ["out"], halves(H, "of heads"))
    down(y + 22, y + 42)
    y += 56
    meet(y, f"all-reduce: the sum of two {shape('T', D)}, then + x")
    down(y + 14, y + 34)
    y += 56
    row(y, "mlp_norm", ["mlp_norm"], ["the same", "the same"])
    down(y + 22, y + 48)
    y += 70
    row(y, "gate, up", ["gate", "up"], halves(F, "channels"))
    down(y + 22, y + 47)
    y += 62
    channels = f"silu(gate) · up: {shape('T', F // 2)}"
    own(y, "each rank by itself", [channels, channels])
    down(y + 15, y + 32)
    y += 54
    row(y, "down", ["down"], halves(F, "of channels"))
    down(y + 22, y + 42)
    y += 56
    meet(y, f"all-reduce: the sum of two {shape('T', D)}, then + x")
    bottom = y + 28
    drawing.frame(14, top, 980 - 28, bottom)
    down(y + 14, bottom + 20)
    y = bottom + 42
    row(y, "norm", ["norm"], ["the same", "the same"])
    down(y + 22, y + 48)
    y += 70
    row(y, "lm_head", ["lm_head"], halves(V, "tokens"))
    down(y + 22, y + 42)
    y += 56
    meet(y, f"gather: side by side, logits {shape('T', V)}")
    return drawing.svg(y + 36)


DRAWINGS = {"architecture": architecture, "tensor_parallel": tensor_parallel}


def command(args: argparse.Namespace) -> int:
    config = QwenConfig.preset(args.size)
    make_folder(args.out)
    for name, draw in DRAWINGS.items():
        path = args.out / (f"{name}.svg" if args.size == "72b" else f"{name}_{args.size}.svg")
        output_path(path, "--out")
        drawn = draw(config)
        write_whole(path, drawn)
        print(on_stdout(str(path)))
    return 0


def parser() -> Parser:
    made = Parser(description=__doc__.splitlines()[0])
    made.add_argument("--size", default="72b", help="1.8b, 7b, 14b or 72b (%(default)s)")
    made.add_argument("--out", type=Path, default=OUT, help="folder for the two files")
    return made


if __name__ == "__main__":
    sys.exit(run(parser(), command))
