"""The options that commands share, and the settings of the loop that they give.

torch is imported inside the functions, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen_ref.commands.cli import given_path, say, utf8
from qwen_ref.commands.defaults import Defaults
from qwen_ref.commands.ranks import TIMEOUT
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.quantize.config import INT4_GROUP, INT4_GROUPS, KERNELS, QUANTIZATIONS
from qwen_ref.tokenizer import Tokenizer


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
        "--kernel",
        choices=list(KERNELS),
        help="with --fast or --quantize: the product for one token; by default the fastest one, which is "
        "measured. The same kernel gives the same text again",
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
    if args.kernel is not None and not (args.fast or args.quantize):
        raise InputError("--kernel goes with --fast or --quantize")
    given = [f"--{name}" for name in ("fast", "packed") if getattr(args, name)]
    for name in ("quantize", "group_size", "kernel", "kv_cache"):
        if getattr(args, name) is not None:
            given.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    return given


def add_model_option(
    parser: argparse._ActionsContainer,
    among: argparse._ActionsContainer | None = None,
    what: str = "the checkpoint",
    default: str = " (default: the tiny trained one that comes with the project)",
    fetched: str = "the model",
) -> None:
    """--model, --revision and --download. among: the options that rule --model out, and are ruled out by it.

    files.checkpoint_folder gives the folder that they name.
    """
    (among or parser).add_argument(
        "--model",
        type=given_model,
        metavar="MODEL",
        help=f"{what}: a folder, or a name as Qwen/Qwen-1_8B, which is looked up in the caches of Hugging "
        f"Face and ModelScope{default}",
    )
    add_hub_options(parser, fetched)


def add_hub_options(parser: argparse._ActionsContainer, fetched: str = "the model") -> None:
    """--revision and --download."""
    parser.add_argument(
        "--revision",
        metavar="R",
        help="with a name: the branch, the tag or the commit, as Hugging Face's cache has it (default: main)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help=f"fetch {fetched}, if not on this machine; no code, no pickles (takes huggingface_hub)",
    )


def given_model(argument: str) -> Path | str:
    """type of --model: what is not there stays a text, because Path would make a name of ./owner/name."""
    path = given_path(argument)
    return path if os.path.exists(path) else argument


def add_tokenizer_option(parser: argparse._ActionsContainer) -> None:
    """--tokenizer-engine, for tools that encode megabytes."""
    parser.add_argument(
        "--tokenizer-engine",
        choices=["tiktoken", "python"],
        default="tiktoken",
        help="what encodes text: the library tiktoken, or this project's own code. The ids are the same, "
        "tiktoken is faster (default: %(default)s)",
    )


def add_prompt_options(parser: argparse.ArgumentParser, what: str) -> None:
    """The prompt, --file and --allow-special; what: what the prompt is for."""
    add = parser.add_argument
    end = "(one newline at its end is dropped)"
    add("prompt", type=utf8, nargs="?", help=f"{what}; - or nothing reads stdin {end}")
    add("--file", type=Path, help=f"read the prompt from this file, - for stdin {end}")
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
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens; 0 or -1 is no limit")
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
    add("--seed", type=int, help="the same seed gives the same text (default, and -1: a new one, printed)")
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
    """The loop's settings, checked: the options of add_options that are given, else the folder's own.

    Greedy decoding does not read top-k and top-p: they are off then, whatever was given.
    """
    found = {
        name: getattr(defaults, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    }
    if found["temperature"] == 0:
        for name, off in (("top_k", (None, 0, -1)), ("top_p", (None, 1.0))):
            if getattr(args, name) not in off:
                say(f"note: --{name.replace('_', '-')} is not read: temperature 0 is greedy")
        found |= {"top_k": 0, "top_p": 1.0}
    if found["top_k"] == -1:
        found["top_k"] = 0
    new_seed = args.seed is None or args.seed == -1
    found["seed"] = random.SystemRandom().randrange(2**32) if new_seed else args.seed
    from qwen_ref.generate import Sampling, check_settings

    sampling = {name: value for name, value in found.items() if name != "max_new_tokens"}
    check_settings(found["max_new_tokens"], Sampling(**sampling))
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
