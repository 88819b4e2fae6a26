"""The library in a few lines: load a checkpoint, look at the logits, generate.

python examples/quickstart.py
"""

from pathlib import Path

import torch

import qwen_ref
from qwen_ref.generate import generate

folder = Path(__file__).resolve().parents[1] / "weights"  # or a published folder, such as Qwen-1_8B
model = qwen_ref.load_model(folder, "auto")
tokenizer = qwen_ref.Tokenizer.from_file(folder / "qwen.tiktoken")

prompt = "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是"
print("prompt:", prompt)
print("in English: The capital of Mongolia is Ulaanbaatar. The capital of Iceland is")
ids = tokenizer.encode(prompt)
print("ids:", ids)

with torch.inference_mode():
    logits = model(torch.tensor([ids]))  # (B, T) → (B, T, V)
likeliest = logits[0, -1].float().softmax(dim=-1).topk(3)
for probability, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
    print(f"next: {tokenizer.decode([token])!r} with probability {probability:.4f}")

# generate() repeats this step: run the model, choose a token, append it. The section "The loop" in
# learn/walkthrough.py has the same loop in its simplest form, without a cache.
steps = list(generate(model, ids, max_new_tokens=7))
print("text:", tokenizer.decode(step.token for step in steps))
print("log-probabilities:", ", ".join(f"{step.logprob:.4f}" for step in steps))
