"""What the commands that run a model share: their options, and the model loaded as the options ask.

torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ref.commands.cli import Progress, say, utf8
from qwen_ref.commands.files import bundled_checkpoint
from qwen_ref.commands.ranks import TIMEOUT, Ranks, started_by_torchrun
from qwen_ref.config import InputError, QwenConfig, read_json_object, shown
from qwen_ref.quantize.config import INT4_GROUP, INT4_GROUPS, QUANTIZATIONS, GPTQConfig
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen_ref.generate import Step
    from qwen_ref.model import Qwen


def add_speed_options(parser: argparse._ActionsContainer) -> None:
    """Options for less time or less memory than the plain model takes."""
    add = parser.add_argument
    add(
        "--fast",
        action="store_true",
        help="keep a copy of the weights in a layout that decodes faster on the CPU. The project's figures "
        "are from a processor with AVX-512; python -m qwen_ref.bench --fast --against plain measures yours",
    )
    add("--quantize", choices=QUANTIZATIONS, help="--fast, with the weights rounded to 8 or 4 bits")
    add(
        "--group-size",
        type=int,
        choices=INT4_GROUPS,
        metavar="G",
        help=f"with --quantize int4: how many inputs share a scale, {', '.join(map(str, INT4_GROUPS))} "
        f"(default: {INT4_GROUP})",
    )
    add(
        "--packed",
        action="store_true",
        help="keep a GPTQ checkpoint's weights in 4 or 8 bits and dequantise a layer at a time in each pass: "
        "the least memory, on any device, but slow. With --fast they are used in 4 or 8 bits as they are",
    )
    add(
        "--kv-cache",
        choices=["int8"],
        help="keep keys and values in 8 bits: half the memory of the cache, but slower",
    )


def speed_options(args: argparse.Namespace) -> list[str]:
    """The options of add_speed_options that were given; ValueError where they contradict each other."""
    if args.group_size is not None and args.quantize != "int4":
        raise InputError("--group-size is for --quantize int4")
    given = [f"--{name}" for name in ("fast", "packed") if getattr(args, name)]
    for name in ("quantize", "group_size", "kv_cache"):
        if getattr(args, name) is not None:
            given.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    return given


_LARGEST_WINDOW = 2**24  # no Qwen comes near


class Defaults(NamedTuple):
    """What a folder's generation_config.json says; what it leaves out has the value that changes nothing."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    max_window_size: int | None


def read_defaults(folder: Path, tokenizer: Tokenizer) -> Defaults:
    """The generation_config.json of a folder, which may lack one; ValueError, naming it, for wrong values."""
    path = folder / "generation_config.json"
    raw = read_json_object(path) if os.path.lexists(path) else {}
    try:
        return _defaults(raw, tokenizer)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _defaults(raw: dict[str, Any], tokenizer: Tokenizer) -> Defaults:
    def value(name: str, default: Any, *kinds: type) -> Any:
        found = raw.get(name)
        if found is None:
            return default
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"{name}={shown(found)} must be {wanted}")
        if float not in kinds and isinstance(found, int) and abs(found) >= 2**63:
            raise InputError(f"{name}={shown(found)} must be below 2**63")
        return found

    def stop_text(word: list[int]) -> str:
        try:
            return tokenizer.decode_bytes(word).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"stop_words_ids: {shown(word)} are no whole characters") from None

    eos = value("eos_token_id", tokenizer.special_ids["<|endoftext|>"], int, list)
    words = [[token] for token in (eos if isinstance(eos, list) else [eos])]
    words += value("stop_words_ids", [], list)
    if value("chat_format", "raw", str) == "chatml":
        words += [[tokenizer.special_ids["<|im_start|>"]], [tokenizer.special_ids["<|im_end|>"]]]
    for word in words:
        ids = isinstance(word, list) and word and all(type(token) is int for token in word)
        if not ids or min(word) < 0 or max(word) >= tokenizer.n_vocab:
            allowed = f"ids from 0 to {tokenizer.n_vocab - 1}"
            raise InputError(f"eos_token_id and stop_words_ids must hold {allowed}, not {shown(word)}")
    defaults = Defaults(
        max_new_tokens=value("max_new_tokens", 64, int),
        temperature=float(value("temperature", 1.0, int, float)) if value("do_sample", False, bool) else 0.0,
        top_k=value("top_k", 0, int),
        top_p=float(value("top_p", 1.0, int, float)),
        repetition_penalty=float(value("repetition_penalty", 1.0, int, float)),
        stop_ids=frozenset(word[0] for word in words if len(word) == 1),
        # A stop word of several ids is text that can also be spelled with other ids: it is matched as text.
        stop_texts=tuple(stop_text(word) for word in words if len(word) > 1),
        max_window_size=value("max_window_size", None, int),
    )
    from qwen_ref.generate import check_settings

    check_settings(*defaults[:5])
    window = defaults.max_window_size
    if window is not None and not 1 <= window <= _LARGEST_WINDOW:
        raise InputError(f"max_window_size={window} must be from 1 to {_LARGEST_WINDOW} tokens")
    return defaults


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "--model",
        type=Path,
        help="checkpoint folder (default: the tiny trained one that comes with the project)",
    )


def add_prompt_options(parser: argparse.ArgumentParser, what: str) -> None:
    """The prompt, --file and --allow-special; what: what the prompt is for."""
    add = parser.add_argument
    end = "(one newline at its end is dropped)"
    add("prompt", type=utf8, nargs="?", help=f"{what}; - or nothing reads stdin {end}")
    add("--file", type=Path, help=f"read the prompt from this file {end}")
    add(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in the prompt"
    )


def encoded_prompt(
    tokenizer: Tokenizer,
    prompt: str,
    allow_special: bool,
    remedy: str = "give it as an argument, with --file or on stdin",
) -> list[int]:
    """The ids of a prompt; ValueError for an empty one."""
    ids = tokenizer.encode(prompt, allowed_special="all" if allow_special else ())
    if not ids:
        raise InputError(f"the prompt is empty; {remedy}")
    return ids


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """--dtype."""
    parser.add_argument(
        "--dtype",
        default="auto",
        help="the dtype to compute in: auto (as stored, the default), bfloat16, float16, float32 or float64",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The settings of the generation loop, and how the model is to be loaded."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="stop after N tokens")
    add("--temperature", type=float, metavar="T", help="0 is greedy; 1 samples the model's own distribution")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens; 0 is no limit")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens that together reach probability P",
    )
    add(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1 makes tokens of the text so far less likely",
    )
    add("--seed", type=int, help="the same seed gives the same text (default: a new one, printed)")
    add_load_options(parser)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """How the model is to be loaded."""
    add = parser.add_argument
    add_dtype_option(parser)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …; under torchrun cuda: one for each rank")
    add_speed_options(parser)
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="under torchrun: end within S seconds when another rank is lost, that is, silent for half of S "
        "(default: %(default)g)",
    )


def chosen_settings(args: argparse.Namespace, defaults: Defaults) -> dict[str, Any]:
    """The loop's settings, checked: the options of add_options that are given, else the folder's own."""
    found = {
        name: getattr(defaults, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    }
    found["seed"] = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    from qwen_ref.generate import check_settings

    check_settings(**found)
    return found


def describe(settings: dict[str, Any], stop_ids: Iterable[int], stop_texts: Sequence[str]) -> str:
    """The settings of a loop, in words."""
    s = settings
    how = (
        "greedy"
        if s["temperature"] == 0
        else "temperature {temperature:g}, top-k {top_k}, top-p {top_p:g}, seed {seed}"
    )
    parts = [how.format(**s), f"at most {s['max_new_tokens']} new tokens"]
    if s["repetition_penalty"] != 1:
        parts.append(f"repetition penalty {s['repetition_penalty']:g}")
    stops = [*map(str, sorted(stop_ids)), *map(repr, stop_texts)]
    parts.append(
        f"stop at {', '.join(stops[:8])}" + (f" and {len(stops) - 8} more" if len(stops) > 8 else "")
    )
    return "; ".join(parts)


def length_note(config: QwenConfig, length: int) -> str | None:
    """The note for a text of more tokens than the model was trained on, if it has no dynamic NTK."""
    if length <= config.seq_length or config.use_dynamic_ntk:
        return None
    return (
        f"note: {length} tokens exceed the {config.seq_length} that this model was trained on; "
        "the text beyond them will be worse"
    )


def on_every_rank(
    args: argparse.Namespace,
    lead: Callable[[argparse.Namespace, Path, Ranks], int],
    follow: Callable[[argparse.Namespace, Path, Ranks], int],
) -> int:
    """Runs a command with the checkpoint's folder and the ranks: lead on rank 0, follow on all others."""
    speed_options(args)
    folder = args.model or bundled_checkpoint()
    with ranks_of_command(args.timeout, folder) as ranks:
        return (lead if ranks.rank == 0 else follow)(args, folder, ranks)


def ranks_of_command(timeout: float, folder: Path | None = None) -> Ranks:
    """The ranks of this command, by torchrun's variables. torch is imported only if torchrun has started it.

    Raises InputError where the folder's model cannot be cut for so many ranks.
    """
    if not 0 < timeout < 1e6:
        raise InputError(f"{timeout=} must be a number of seconds above 0 and below 1,000,000")
    if not started_by_torchrun():
        return Ranks()
    # torch reads this when it is imported. Without it a lost connection is reported with stacks of C++.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from qwen_ref.checkpoint import check_cut
    from qwen_ref.commands.watch import WatchedRanks
    from qwen_ref.parallel import launched

    launch = launched()
    if launch is None or launch.size == 1:
        return Ranks()
    if folder is not None:
        check_cut(folder, launch.size)
    return WatchedRanks(launch, timeout)


def open_folder(folder: Path) -> tuple[QwenConfig, Tokenizer]:
    """A checkpoint's configuration and its tokenizer; ValueError where they do not belong together."""
    config = QwenConfig.from_json(folder / "config.json")
    tokenizer = Tokenizer.from_file(folder / "qwen.tiktoken")
    if tokenizer.n_vocab > config.vocab_size:
        raise InputError(
            f"{folder}: qwen.tiktoken has {tokenizer.n_vocab} ids, the model vocab_size={config.vocab_size}"
        )
    return config, tokenizer


def load(args: argparse.Namespace, folder: Path, ranks: Ranks) -> Qwen:
    """The model, or this rank's part of it, as the options ask; rank 0 prints a line about it."""
    from qwen_ref.checkpoint import tensor_table
    from qwen_ref.commands.sizes import resident_bytes

    start = time.perf_counter()
    model = load_as_asked(args, folder, ranks)
    if ranks.rank == 0:
        name = args.model or "the tiny checkpoint that comes with the project"
        count = sum(math.prod(spec.shape) for spec in tensor_table(model.config))
        gptq = GPTQConfig.from_folder(folder)
        form = args.quantize or dtype_name(model)
        if gptq is not None:
            kept = "GPTQ," if args.packed or args.fast else "dequantised from"
            form = f"{form}, {kept} {gptq.bits} bits in {gptq.grouping},"
        each = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
        say(
            f"{name}: {count:,} parameters, {resident_bytes(model) / 1e9:.3f} GB of {form}{each} on "
            f"{args.device} in {time.perf_counter() - start:.2f} s"
        )
        if gptq is not None and gptq.bits == 4 and args.fast and dtype_name(model) != "bfloat16":
            say(f"note: in {dtype_name(model)} each weight takes a byte; --dtype bfloat16 keeps the 4 bits")
    return model


def load_as_asked(args: argparse.Namespace, folder: Path, ranks: Ranks) -> Qwen:
    """load_model with the options of add_load_options, and with the layouts that they ask for."""
    from qwen_ref.checkpoint import load_model

    gptq = None
    with contextlib.suppress(InputError):  # load_model reports it, with all else that is wrong
        gptq = GPTQConfig.from_folder(folder)
    if gptq is not None and args.quantize is not None:
        raise InputError(
            f"{folder} is quantised already, to {gptq.bits} bits; --fast, without --quantize, uses those"
        )
    with Progress("loading") as progress:

        def update(done: int, total: int) -> None:
            if done == 0 and ranks.size > 1 and ranks.rank == 0:
                say(f"each of {ranks.size} ranks reads {total / 1e9:.3f} GB of the checkpoint")
            progress.update(done, total)

        group = "world" if ranks.size > 1 else None
        packed = args.packed or (args.fast and gptq is not None)
        model = load_model(folder, args.dtype, args.device, group, packed=packed, progress=update)
    if args.fast or args.quantize is not None:
        from qwen_ref.fast.layers import fasten

        with Progress("laying out") as progress:
            fasten(model, args.quantize, args.group_size or INT4_GROUP, progress=progress.update)
    if args.kv_cache is not None:
        from qwen_ref.fast.int8_cache import Int8Cache

        model.cache_type = Int8Cache
    return model


def dtype_name(model: Qwen) -> str:
    """The name of a model's dtype, such as "bfloat16"."""
    from qwen_ref.checkpoint import dtype_name

    return dtype_name(model.embed.weight.dtype)


class Clock:
    """Times the steps of a generation: the first is the prefill, each later one a decode step."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        self.times = [time.perf_counter()]
        for step in steps:
            self.times.append(time.perf_counter())
            yield step

    def prefill_rate(self, prompt_tokens: int) -> float | None:
        return prompt_tokens / (self.times[1] - self.times[0]) if len(self.times) > 1 else None

    def decode_rate(self) -> float | None:
        return (len(self.times) - 2) / (self.times[-1] - self.times[1]) if len(self.times) > 2 else None

    def report(self, prompt_tokens: int) -> str:
        prefill, decode = self.prefill_rate(prompt_tokens), self.decode_rate()
        parts = [
            f"prefill {prompt_tokens} tokens"
            + (f", {prefill:,.1f} tokens/s" if prefill else ", not finished")
        ]
        if decode:
            parts.append(f"decode {len(self.times) - 1} tokens, {decode:,.1f} tokens/s")
        return "; ".join(parts)
