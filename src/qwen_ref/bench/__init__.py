"""Speed and memory, beside what the machine can do: `python -m qwen_ref.bench`."""
