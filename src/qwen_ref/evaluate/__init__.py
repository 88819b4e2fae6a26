"""lm-evaluation-harness on a checkpoint: `python -m qwen_ref.evaluate`."""
