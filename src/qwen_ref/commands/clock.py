"""How many tokens a second a generation takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_ref.generate import Step


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
        report = f"prefill {prompt_tokens} tokens, "
        report += f"{prefill:,.1f} tokens/s" if prefill else "not finished"
        if decode:
            report += f"; decode {len(self.times) - 1} tokens, {decode:,.1f} tokens/s"
        return report
