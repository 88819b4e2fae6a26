"""Measures how much text a token holds, by language, in any vocabularies.

    python examples/measure/tokenizer_compression.py [--text NAME=FILE ...] [--against cl100k_base FILE ...]

It prints bytes per token and tokens per character. Without --text it measures the sample in languages/: the
same paragraphs in each language, and Python. Text is first brought to NFC, the form that Qwen's tokenizer
sees; bytes and characters are counted in that form, and every vocabulary encodes it. A vocabulary is refused
if what it encodes does not decode to the same text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwen_ref import Tokenizer
from qwen_ref.commands.cli import Parser, Progress, on_stdout, printable, run, say, utf8
from qwen_ref.commands.figures import pyplot, save
from qwen_ref.commands.files import bundled_checkpoint, decoded, output_path, read_text
from qwen_ref.commands.settings import add_tokenizer_option
from qwen_ref.config import LARGEST_VOCABULARY, InputError, read_bytes
from qwen_ref.loading.tokenizer import nfc

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE.parents[1] / ".vocab" / "qwen.tiktoken"
SAMPLE = HERE / "languages"
# Okabe and Ito's colours, told apart in every form of colour blindness; the markers are in grey print too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = "osD^vPX*"


class Vocabulary(NamedTuple):
    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]


class Count(NamedTuple):
    """Of one text, or of several together."""

    bytes: int
    characters: int
    tokens: tuple[int, ...]  # of each vocabulary


# Vocabularies


def from_tiktoken_file(name: str, path: str | Path, engine: str = "tiktoken") -> Vocabulary:
    """A file of base64 and ranks. It does not say how text is split into pieces: Qwen's pattern is taken."""
    tokenizer = Tokenizer.from_file(path, engine)
    return Vocabulary(name, tokenizer.encode, tokenizer.decode_bytes)


def from_tokenizer_json(name: str, path: str) -> Vocabulary:
    """A Hugging Face tokenizer.json, with its own splitting and normalisation."""
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{path} takes the package tokenizers; pip install tokenizers brings it") from None
    content = decoded(path, read_bytes(path, LARGEST_VOCABULARY))
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is no tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # those that the text spells are text, as everywhere here
    return Vocabulary(
        name,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False).encode(),
    )


def from_tiktoken_name(name: str, download: bool) -> Vocabulary:
    """An encoding that tiktoken knows, with its own pattern; from tiktoken's cache unless download is set."""
    import tiktoken
    import tiktoken.load

    read_file = tiktoken.load.read_file

    def read_local(path: str) -> bytes:
        if "://" in path:
            raise InputError(
                f"{name} is not in tiktoken's cache; --download lets tiktoken fetch it, or give its file"
            )
        return read_file(path)

    if not download:  # get_encoding would fetch it without a word
        tiktoken.load.read_file = read_local
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise InputError(f"{name} cannot be had: {error}") from None
    finally:
        tiktoken.load.read_file = read_file
    return Vocabulary(name, encoding.encode_ordinary, encoding.decode_bytes)


def against(name: str, argument: str, args: argparse.Namespace) -> Vocabulary:
    """What --against means. A name goes before a file: ./gpt2 is a file called as an encoding is."""
    import tiktoken

    if argument == "bytes":
        return Vocabulary(name, lambda text: list(text.encode()), bytes)
    if argument in tiktoken.list_encoding_names():
        return from_tiktoken_name(argument, args.download)
    if not Path(argument).exists():
        known = ", ".join(tiktoken.list_encoding_names())
        raise InputError(f"--against {argument}: neither a file nor a known name: bytes, {known}")
    if argument.endswith(".json"):
        return from_tokenizer_json(name, argument)
    return from_tiktoken_file(name, argument, args.tokenizer_engine)


def vocabularies(args: argparse.Namespace) -> list[Vocabulary]:
    """Ours first, then those of --against in their order."""
    path = args.vocabulary
    if path is not None:
        ours = path
    elif PUBLISHED.exists():
        ours, path = "Qwen", PUBLISHED
    else:
        ours, path = "tiny", bundled_checkpoint() / "qwen.tiktoken"
        say("note: the tiny checkpoint's vocabulary; `make vocab` fetches the published one")
    given = [str(ours), *args.against]
    if twice := repeated(given):
        raise InputError(f"the vocabulary {twice} is given twice")
    # Files go by their last name, where that tells them apart.
    names = [Path(each).name for each in given]
    names = [short if names.count(short) == 1 else each for short, each in zip(names, given, strict=True)]
    rest = [against(*each, args) for each in zip(names[1:], args.against, strict=True)]
    return [from_tiktoken_file(names[0], path, args.tokenizer_engine), *rest]


def repeated(names: Sequence[str]) -> str | None:
    """The first of the names that was there before."""
    return next((name for n, name in enumerate(names) if name in names[:n]), None)


# Texts


def named(argument: str) -> tuple[str, str]:
    """NAME=FILE; a file's name may hold another "="."""
    name, _, file = argument.partition("=")
    if not (name.strip() and file):
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=FILE, as in Welsh=welsh.txt")
    return utf8(name.strip()), file


def sample() -> list[tuple[str, str]]:
    return [
        (path.stem.capitalize(), str(path)) for path in SAMPLE.iterdir() if path.suffix in (".txt", ".py")
    ]


def read_texts(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The texts by name, in NFC, in the order of their names."""
    if twice := repeated([name for name, _ in given]):
        raise InputError(f"two texts are called {twice}")
    texts = {}
    for name, file in sorted(given):
        texts[name] = nfc(read_text(Path(file)))
        if not texts[name]:
            raise InputError(f"{file} is empty")
    return texts


# Counting


def count(name: str, text: str, among: Sequence[Vocabulary]) -> Count:
    """Raises ValueError for a vocabulary that loses something of the text."""
    encoded, tokens = text.encode(), []
    for vocabulary in among:
        ids = vocabulary.encode(text)
        if vocabulary.decode(ids) != encoded:
            raise InputError(f"{vocabulary.name} loses text: {name} does not decode to what was encoded")
        tokens.append(len(ids))
    return Count(len(encoded), len(text), tuple(tokens))


def together(counts: Iterable[Count]) -> Count:
    sizes, characters, tokens = zip(*counts, strict=True)
    return Count(sum(sizes), sum(characters), tuple(map(sum, zip(*tokens, strict=True))))


def figures(of: Count, among: Sequence[Vocabulary]) -> list[dict[str, Any]]:
    """What there is to say of each vocabulary. The ratio is to the first of --against."""
    return [
        {
            "vocabulary": vocabulary.name,
            "tokens": tokens,
            "bytes_per_token": of.bytes / tokens,
            "tokens_per_character": tokens / of.characters,
            **({"ratio": tokens / of.tokens[1]} if len(among) > 1 else {}),
        }
        for vocabulary, tokens in zip(among, of.tokens, strict=True)
    ]


# What comes out


def table(counts: dict[str, Count], among: Sequence[Vocabulary]) -> list[str]:
    heads = ["text", "bytes", "characters"]
    for n, vocabulary in enumerate(among):
        heads += [f"{cell(vocabulary.name)}: tokens", "bytes/token", "tokens/char"]
        if len(among) > 1 and n != 1:  # the first of --against would be compared with itself
            heads.append(f"÷ {cell(among[1].name)}")
    lines = [row(heads), row(["---"] + ["---:"] * (len(heads) - 1))]
    named_counts = [(cell(name), of) for name, of in counts.items()]
    for name, of in [*named_counts, ("**all**", together(counts.values()))]:
        cells = [name, f"{of.bytes:,}", f"{of.characters:,}"]
        for n, each in enumerate(figures(of, among)):
            cells += [f"{each['tokens']:,}", f"{each['bytes_per_token']:.2f}"]
            cells.append(f"{each['tokens_per_character']:.3f}")
            if len(among) > 1 and n != 1:
                cells.append(f"{each['ratio']:.3f}")
        lines.append(row(cells))
    return lines


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(name: str) -> str:
    """A name that cannot break the table."""
    return printable(name).replace("\\", "\\\\").replace("|", "\\|")


def report(counts: dict[str, Count], among: Sequence[Vocabulary]) -> dict[str, Any]:
    def of(each: Count) -> dict[str, Any]:
        return {"bytes": each.bytes, "characters": each.characters, "by_vocabulary": figures(each, among)}

    texts = [{"text": name, **of(each)} for name, each in counts.items()]
    return {"texts": texts, "all": of(together(counts.values()))}


def draw(counts: dict[str, Count], among: Sequence[Vocabulary], path: Path) -> None:
    """A row for each text, those of which our tokens hold the most on top; a mark for each vocabulary."""
    plot = pyplot()
    ordered = sorted(counts, key=lambda name: counts[name].bytes / counts[name].tokens[0])
    rows = range(len(ordered))
    values = [[counts[name].bytes / counts[name].tokens[n] for name in ordered] for n in range(len(among))]
    ends = list(zip(*values, strict=True))
    # A name may hold a $, and characters that the font has not.
    with plot.rc_context({"text.parse_math": False}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure, axes = plot.subplots(
            figsize=(7.5, 1.3 + 0.25 * (len(ordered) + (len(among) + 2) // 3)), layout="constrained"
        )
        axes.hlines(rows, list(map(min, ends)), list(map(max, ends)), color="#cccccc", zorder=1)
        styles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
        for n, (vocabulary, (colour, marker)) in enumerate(zip(among, styles, strict=False)):
            # Ours is full and the others are hollow and larger: where they meet, both are seen.
            form = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5} if n else {}
            axes.plot(
                values[n], rows, marker, color=colour, label=vocabulary.name, zorder=3 - (n > 0), **form
            )
        axes.set_yticks(rows, ordered)
        axes.set_ylim(-0.7, len(ordered) - 0.3)
        axes.set_xlim(left=0)
        axes.set_xlabel(
            "bytes of UTF-8 per token; further right is fewer tokens for the same text\n"
            "(compare within a row: scripts differ in bytes per character)"
        )
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=min(len(among), 3), frameon=False)
        save(figure, path)
    if any("missing from font" in str(each.message) for each in caught):
        say("note: the plot's font lacks characters of a name; boxes stand for them")


# The command


def parser() -> Parser:
    found = Parser(
        prog="python examples/measure/tokenizer_compression.py",
        description="Bytes per token and tokens per character, by language: a Markdown table on stdout.",
    )
    add = found.add_argument
    add(
        "--vocabulary",
        metavar="FILE",
        help="a qwen.tiktoken (default: the published one, which `make vocab` fetches, else the tiny "
        "checkpoint's)",
    )
    add(
        "--text",
        type=named,
        nargs="+",
        action="extend",
        metavar="NAME=FILE",
        help="texts in UTF-8 and what to call them (default: the sample in examples/measure/languages)",
    )
    add(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME_OR_FILE",
        help="vocabularies to compare with: bytes; an encoding of tiktoken's, such as cl100k_base; a file in "
        "tiktoken's format, split by Qwen's pattern; a tokenizer.json of Hugging Face's tokenizers",
    )
    add("--download", action="store_true", help="let tiktoken fetch encodings that its cache lacks")
    add_tokenizer_option(found)
    add("--plot", type=Path, metavar="FILE.png", help="draw bytes per token (takes matplotlib)")
    add("--json", action="store_true", help="print one JSON object")
    return found


def command(args: argparse.Namespace) -> int:
    if args.plot is not None:  # better refused now than in the end
        pyplot()
        output_path(args.plot, "--plot", args)
    texts = read_texts(args.text or sample())
    among = vocabularies(args)
    counts = {}
    with Progress("measuring", unit="texts") as progress:
        for name, text in texts.items():
            counts[name] = count(name, text, among)
            progress.update(len(counts), len(texts))
    if args.json:
        print(on_stdout(json.dumps(report(counts, among), ensure_ascii=False)), flush=True)
    else:
        print(on_stdout("\n".join(table(counts, among))), flush=True)
    if args.plot is not None:
        draw(counts, among, args.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser(), command, arguments)


if __name__ == "__main__":
    sys.exit(main())
