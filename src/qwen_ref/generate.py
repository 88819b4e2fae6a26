"""The generation loop, and `python -m qwen_ref.generate`: a prompt and a checkpoint folder in, text out.

Prefill puts the whole prompt through the model, in one pass or in a few (see prefill.py), and keeps its keys
and values; then every token costs one pass over a single position. torch is imported inside the functions,
so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ref.cli import Parser, Progress, integer, on_stdout, read_prompt, run, say, utf8
from qwen_ref.config import InputError, require_folder, shown
from qwen_ref.launch import Ranks
from qwen_ref.lookup import DRAFT_TOKENS, GREEDY, LONGEST_MATCH, Passes, check_lookup, generate_lookup
from qwen_ref.settings import (
    Clock,
    add_model_option,
    add_options,
    chosen_settings,
    describe,
    dtype_name,
    length_note,
    load,
    on_every_rank,
    open_folder,
    read_defaults,
)
from qwen_ref.steps import Step, begun, check_settings, checked_ids, checked_stop_ids, choose, in_step
from qwen_ref.streaming import TextStream
from qwen_ref.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from qwen_ref.model import KVCache, Qwen


def generate(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Yields the tokens that continue prompt_ids, one by one; a stop id is the last one yielded.

    temperature 0 is greedy; qwen_ref.sampling explains the others. The same seed gives the same tokens.
    cache: what holds the beginning of prompt_ids already, all but its last token at most, and has room for
    the rest; only what is new is computed, and it then holds all but the last token yielded. Dynamic NTK's α
    stays that of the prompt which the cache was begun with (PrefixCache begins anew where another is due).
    progress: called while the prompt is computed, with its tokens done and all of them.
    Raises ValueError for an empty prompt, ids or parameters out of range, and a cache that does not fit.

    >>> ids = tokenizer.encode("冰岛的首都是")
    >>> tokenizer.decode(step.token for step in generate(model, ids, max_new_tokens=5))
    '雷克雅未克（R'
    """
    sampling = (temperature, top_k, top_p, repetition_penalty)
    rows = generate_batch(model, [prompt_ids], max_new_tokens, *sampling, seed, stop_ids, cache, progress)

    def single() -> Generator[Step | None]:
        with contextlib.closing(rows):
            yield None  # see begun
            for (step,) in rows:
                yield step

    return begun(single())


def generate_batch(
    model: Qwen,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    cache: KVCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[Step | None]]:
    """Continues prompts of any lengths together; yields a step for every row, None for rows that have ended.

    Row i is what `generate` yields for its prompt alone with seed + i: the batch changes its numbers by no
    more than rounding. A cache that holds something must hold the beginning of each prompt, the padding of
    the rows being what these prompts need.
    Raises what `generate` raises.

    Several ranks call it alike and iterate alike. When one stops early, its iterator is closed and all end;
    an iterator that is kept must be closed before the model is used again.
    """
    import torch

    from qwen_ref.prefill import prefill

    group = model.group
    with group.together():
        check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
        prompts = [checked_ids(prompt, model.config.vocab_size) for prompt in prompts]
        if not prompts:
            raise InputError("there is no prompt to continue")
        if cache is not None:
            _check_room(cache, prompts, max_new_tokens)
        stop_ids = checked_stop_ids(stop_ids)
    sampling = (temperature, top_k, top_p, repetition_penalty)
    B, longest = len(prompts), max(map(len, prompts))
    if group.size > 1:
        how = f"{temperature=}, {top_k=}, {top_p=}, {repetition_penalty=}, {seed=}"
        asked = {"the prompt": prompts, "sampling": how, "the end": (max_new_tokens, sorted(stop_ids))}
        asked["what the cache holds"] = None if cache is None else cache.length
        group.require_same("this generation", asked)
    if cache is None:
        with group.together():
            cache = model.new_cache(B, longest + max_new_tokens - 1)  # the last token is never fed back
    ids = torch.full((B, longest + max_new_tokens), -1, device="cpu")  # -1: no token
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt, device="cpu")
    mask = (ids[:, :longest] >= 0).long()
    generators = _generators(model, B, temperature, seed)

    # What stands for padding and behind a row's end: of its own tokens, so that no other can spoil the row.
    fillers = torch.tensor([prompt[:1] for prompt in prompts], device="cpu")
    cache.text_end, start = None, cache.length

    def steps() -> Iterator[tuple[list[Step | None], bool]]:
        live, held = list(range(B)), start
        for n in range(longest, longest + max_new_tokens):
            if cache.length != held:
                raise InputError("the cache was used elsewhere meanwhile; it serves one generation at a time")
            with torch.inference_mode():
                new = ids[:, held:n]  # at first the prompt, then a token
                new = new.where(new >= 0, fillers)
                padded = mask if held == 0 else None
                last = prefill(model, new, cache, padded, progress=progress if n == longest else None)
                # (B, V): of all positions only the last one's, of all ranks only rank 0
                logits = model.lm_head(last, only_rank_0=True)
                chosen = choose(model, logits, ids[:, :n], live, sampling, generators)
            rows: list[Step | None] = [None] * B
            for row, step in zip(live, chosen, strict=True):
                rows[row], ids[row, n] = step, step.token
            live = [row for row in live if rows[row].token not in stop_ids]
            held = n
            if len(live) < B and cache.text_end is None:
                cache.text_end = n + 1  # the last token of a row that has ended; what follows is none of its
            last = not live or n + 1 == longest + max_new_tokens
            yield rows, last
            if last:
                return

    return in_step(group, steps())


def _check_room(cache: KVCache, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ValueError where a caller's cache cannot take these prompts."""
    longest = max(map(len, prompts))
    needed = longest + max_new_tokens - 1
    if needed > cache.max_length or cache.batch_size != len(prompts):
        raise InputError(
            f"{len(prompts)} × {needed} positions are needed, the cache has {cache.batch_size} × "
            f"{cache.max_length}; make it with a larger max_length or the right batch_size"
        )
    if cache.length == 0:
        return
    if cache.length >= longest:
        raise InputError(
            f"the cache holds {cache.length} positions, the longest prompt has {longest} tokens: prompts "
            "must begin with what it holds and be longer"
        )
    if cache.text_end is not None and cache.length > cache.text_end:
        raise InputError(
            f"a row of this cache ended after {cache.text_end} positions, and the cache holds "
            f"{cache.length}: set its length to {cache.text_end} or less, or use a new cache"
        )
    held = [0] * len(prompts) if cache.padding is None else cache.padding.tolist()
    needed_padding = [longest - len(prompt) for prompt in prompts]
    if held != needed_padding:
        raise InputError(
            f"the rows of the cache begin with padding of {shown(held)} positions, these prompts would need "
            f"{shown(needed_padding)}: continue every row by as many tokens, or use a new cache"
        )


def generate_uncached(
    model: Qwen,
    prompt_ids: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
) -> Iterator[Step]:
    """What `generate` yields, the obvious way: for every token, the whole text goes through the model again.

    It is the oracle of the cached loop, and what to read first. The cache that it makes anew each time only
    states the prompt's length, which fixes dynamic NTK's base for the whole text.
    """
    import torch

    check_settings(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    ids = checked_ids(prompt_ids, model.config.vocab_size)
    stop_ids, prompt_length = checked_stop_ids(stop_ids), len(ids)
    generators = _generators(model, 1, temperature, seed)
    sampling = (temperature, top_k, top_p, repetition_penalty)

    def steps() -> Iterator[tuple[Step, bool]]:
        last = False
        while not last:
            text = torch.tensor([ids], device="cpu")
            with torch.inference_mode():
                cache = model.new_cache(1, len(ids), prompt_length=prompt_length)
                logits = model(text, cache=cache)[:, -1]
                (step,) = choose(model, logits, text, [0], sampling, generators)
            ids.append(step.token)
            last = step.token in stop_ids or len(ids) == prompt_length + max_new_tokens
            yield step, last

    return in_step(model.group, steps())


def _generators(model: Qwen, rows: int, temperature: float, seed: int | None) -> list[torch.Generator]:
    """One for each row, so that a row draws what it draws alone; none for greedy decoding."""
    import torch

    generators = []
    for row in range(rows if temperature > 0 else 0):
        generators.append(torch.Generator(device=model.embed.weight.device))
        if seed is None:
            generators[row].seed()
        else:
            generators[row].manual_seed((seed + row) % 2**63)
    return generators


# The command


def _parser() -> Parser:
    parser = Parser(
        prog="python -m qwen_ref.generate",
        description="Continue a prompt with a first-generation Qwen checkpoint. "
        "The text goes to stdout, everything else to stderr.",
        epilog="Defaults come from the folder's generation_config.json; without one, decoding is greedy.",
    )
    add = parser.add_argument
    add(
        "prompt",
        type=utf8,
        nargs="?",
        help="the text to continue; - or nothing reads stdin (one newline at its end is dropped)",
    )
    add("--file", type=Path, help="read the prompt from this file (one newline at its end is dropped)")
    add_model_option(parser)
    add_options(parser)
    add(
        "--stop",
        type=utf8,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add(
        "--lookup",
        nargs="?",
        type=_draft_tokens,
        const=DRAFT_TOKENS,
        metavar="N",
        help="after the prompt: guess up to N tokens a pass (default: %(const)s) from the text so far; "
        "the same greedy text in fewer passes where it repeats itself",
    )
    add(
        "--allow-special", action="store_true", help="parse special tokens such as <|im_start|> in the prompt"
    )
    add("--logprobs", action="store_true", help="print a line per token: log-probability, id, text as JSON")
    add("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _draft_tokens(argument: str) -> int:
    try:
        return integer(argument)
    except ValueError:
        message = f"{shown(argument)} is no number of tokens; a prompt goes before --lookup"
        raise argparse.ArgumentTypeError(message) from None


def _follow(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    """A rank that only computes: rank 0 reads the prompt, samples and prints."""
    request = json.loads(ranks.share(None))
    ranks.meet(args.device)
    model = load(args, folder, ranks)
    for _ in _loop(model, request, Passes(), None):
        pass
    return 0


def _lead(args: argparse.Namespace, folder: Path, ranks: Ranks) -> int:
    require_folder(folder)
    prompt = read_prompt(args.prompt, args.file)
    config, tokenizer = open_folder(folder)
    prompt_ids = tokenizer.encode(prompt, allowed_special="all" if args.allow_special else ())
    if not prompt_ids:
        raise InputError("the prompt is empty; give it as an argument, with --file or on stdin")
    defaults = read_defaults(folder, tokenizer)
    settings = chosen_settings(args, defaults)
    stop_texts = (*defaults.stop_texts, *args.stop)
    if "" in stop_texts:
        raise InputError("--stop is empty: it would end every text at once")
    request = {"prompt_ids": prompt_ids, **settings, "stop_ids": sorted(defaults.stop_ids)}
    if args.lookup is not None:
        _check_lookup(args, folder, settings)
        request["lookup"] = args.lookup
    ranks.share(json.dumps(request))
    ranks.meet(args.device)
    model = load(args, folder, ranks)
    say(describe(settings, defaults.stop_ids, stop_texts))
    if note := length_note(config, len(prompt_ids) + settings["max_new_tokens"]):
        say(note)

    clock, passes = Clock(), Passes()
    # Closed by its end in any case: the other ranks are waiting for its next step.
    with (
        Progress("prompt", unit="tokens") as progress,
        contextlib.closing(_loop(model, request, passes, progress.update)) as steps,
    ):
        watched = clock.watch(ranks.until_interrupted(steps))
        stream = TextStream(watched, tokenizer, defaults.stop_ids, stop_texts)
        text, code = _print_stream(stream, args, tokenizer)
    if args.json:
        report = {
            "prompt": prompt,
            "text": text,
            "finish_reason": stream.finish_reason or "interrupted",
            "tokens": [_token_report(step, tokenizer) for step in stream.steps],
            "settings": {
                "dtype": dtype_name(model),
                "device": args.device,
                **settings,
                "stop": list(stop_texts),
            },
            "prompt_tokens": len(prompt_ids),
            "prefill_tokens_per_second": clock.prefill_rate(len(prompt_ids)),
            "decode_tokens_per_second": clock.decode_rate(),
        }
        if args.lookup is not None:
            each = {"tokens_per_pass": passes.tokens_per_pass, "draft_tokens": args.lookup}
            report["lookup"] = {**dataclasses.asdict(passes), **each}
        print(on_stdout(json.dumps(report, ensure_ascii=False)), flush=True)
    say(clock.report(len(prompt_ids)) + ("" if args.lookup is None else f"; {_passes_report(passes)}"))
    return code


def _loop(
    model: Qwen, request: dict[str, Any], passes: Passes, progress: Callable[[int, int], None] | None
) -> Iterator[Step]:
    """The loop that rank 0's command asks every rank for."""
    if "lookup" not in request:
        return generate(model, **request, progress=progress)
    names = ("prompt_ids", "max_new_tokens", "stop_ids", *GREEDY)
    settings = {name: request[name] for name in names}
    draft_tokens = request["lookup"]
    return generate_lookup(model, **settings, draft_tokens=draft_tokens, passes=passes, progress=progress)


def _check_lookup(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where --lookup cannot be, with where the other settings come from and the remedy."""
    check_lookup(LONGEST_MATCH, args.lookup)
    wrong = [name for name, greedy in GREEDY.items() if settings[name] != greedy]
    if wrong:
        config = folder / "generation_config.json"
        there = [
            f"{name}={settings[name]:g}" + ("" if getattr(args, name) is not None else f" (from {config})")
            for name in wrong
        ]
        remedy = [f"--{name.replace('_', '-')} {GREEDY[name]:g}" for name in wrong]
        raise InputError(f"--lookup is greedy only, without {' and '.join(there)}; add {' '.join(remedy)}")


def _passes_report(passes: Passes) -> str:
    repeated = f" ({passes.repeated} of them repeated for close calls)" if passes.repeated else ""
    each = f"{passes.tokens_per_pass:.1f} tokens per pass"
    return f"lookup: {passes.tokens} tokens in {passes.passes} passes{repeated}, {each}"


def _print_stream(stream: TextStream, args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, int]:
    """Prints as the options ask while the stream runs; the whole text and the exit code."""
    text, code = "", 0
    characters = steps = 0  # printed

    def show() -> None:
        nonlocal characters, steps
        # What is to be printed counts as printed before it is: Ctrl-C in between must not print it twice.
        new_text, characters = text[characters:], len(text)
        new_steps, steps = stream.steps[steps:], len(stream.steps)
        if args.json:
            return
        if not args.logprobs:
            print(on_stdout(new_text), end="", flush=True)
            return
        for step in new_steps:
            token = _token_report(step, tokenizer)
            quoted = json.dumps(token["text"], ensure_ascii=False)
            print(on_stdout(f"{token['logprob']:.6f}\t{token['id']}\t{quoted}"), flush=True)

    try:
        for piece in stream:
            text += piece
            show()
    except KeyboardInterrupt:
        text, code = text + stream.flush(), 130
    show()
    if not args.json and not args.logprobs:
        print(flush=True)
    return text, code


def _token_report(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([step.token]) if step.token < tokenizer.n_vocab else "\ufffd"
    return {"id": step.token, "text": text, "logprob": step.logprob}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (see cli.run)."""
    return run(_parser(), lambda args: on_every_rank(args, _lead, _follow), arguments)


if __name__ == "__main__":
    sys.exit(main())
