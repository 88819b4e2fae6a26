"""`python -m qwen_ref`: the commands, a line each."""

from __future__ import annotations

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk to a chat checkpoint",
    "checkpoint inspect": "tensors, shapes and bytes of a checkpoint, for any number of ranks",
    "trace": "every stage of a prompt in numbers, and what each layer would say next",
    "parity": "find what differs in another implementation: record, check, diff, diagnose",
    "perplexity": "score texts",
    "evaluate": "run tasks of lm-evaluation-harness",
    "bench": "measure speed and memory",
}

if __name__ == "__main__":
    from qwen_ref import __version__

    print(f"qwen_ref {__version__}: the commands; --help behind one lists its options")
    for name, what in COMMANDS.items():
        print(f"  python -m qwen_ref.{name:<20}{what}")
