"""--lookup, for the commands that have it: the option, and what rules it out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwen_ref.commands.cli import integer
from qwen_ref.config import InputError, shown, whole


def add_lookup_option(parser: argparse.ArgumentParser, more: str = "") -> None:
    """--lookup. more: what else its help says."""
    parser.add_argument(
        "--lookup",
        nargs="?",
        type=_draft_tokens,
        const=True,
        metavar="N",
        help="guess up to N tokens (default: 8) from the text so far and check all of them in one pass: the "
        "same greedy text in fewer passes, if it repeats itself. It takes float32, --fast or --quantize"
        + more,
    )


def _draft_tokens(argument: str) -> int:
    try:
        return integer(argument)
    except ValueError:
        message = f"{shown(argument)} is no number of tokens; a prompt goes before --lookup"
        raise argparse.ArgumentTypeError(message) from None


def checked_lookup(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> int:
    """How many tokens to guess, 0 without --lookup.

    Raises ValueError where another setting rules --lookup out, with its origin and the remedy.
    """
    if args.lookup is None:
        return 0
    from qwen_ref.checkpoint import compute_dtype
    from qwen_ref.decoding.lookup import DRAFT_TOKENS, check_model
    from qwen_ref.fast.attention import FastCache
    from qwen_ref.fast.int8_cache import Int8Cache
    from qwen_ref.loading.loader import open_checkpoint
    from qwen_ref.model import KVCache

    draft_tokens = whole("draft_tokens", DRAFT_TOKENS if args.lookup is True else args.lookup)
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    wrong = [name for name, value in greedy.items() if settings[name] != value]
    if wrong:
        config = folder / "generation_config.json"
        there = [
            f"{name}={settings[name]:g}" + ("" if getattr(args, name) is not None else f" (from {config})")
            for name in wrong
        ]
        remedy = [f"--{name.replace('_', '-')} {greedy[name]:g}" for name in wrong]
        raise InputError(f"--lookup is greedy only, without {' and '.join(there)}; add {' '.join(remedy)}")
    fast = args.fast or args.quantize is not None
    cache_type = Int8Cache if args.kv_cache is not None else FastCache if fast else KVCache
    check_model(compute_dtype(args.dtype, open_checkpoint(folder)[1]), cache_type)
    return draft_tokens
