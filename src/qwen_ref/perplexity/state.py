"""--state: the windows done so far in a file, a line each, so that an interrupted run can continue."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from qwen_ref.commands.files import LARGEST_TEXT, write_whole
from qwen_ref.config import InputError, parse_json, read_bytes, shown
from qwen_ref.perplexity.windows import Sums, Window, bucket_edges

_FORMAT = "qwen_ref.perplexity 1"


class State:
    """The windows done so far, in a file if one is given."""

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        """run: what the results depend on. Raises ValueError for a file of another run or kind."""
        self.path = path
        self.done: dict[tuple[int, Window], Sums] = {}
        if path is None:
            return
        header = {"format": _FORMAT, **run}
        if not os.path.lexists(path):
            write_whole(path, json.dumps(header) + "\n")
            return
        whole = read_bytes(path, LARGEST_TEXT)
        end = whole.rfind(b"\n") + 1  # the last line may have been cut off
        try:
            first, *rest = map(parse_json, whole[:end].splitlines())
            differ = [key for key, value in header.items() if first.get(key) != value]
            if "format" in differ:
                raise ValueError
            for line in rest:
                length, window = line["length"], Window(*line["window"])
                sums = Sums(line["losses"], line["tokens"])
                buckets, scored = len(bucket_edges(length)) - 1, window.end - window.scored
                right = len(sums.losses) == len(sums.tokens) == buckets and sum(sums.tokens) == scored
                if not right or not all(map(math.isfinite, sums.losses)):
                    raise ValueError
                self.done[length, window] = sums
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise InputError(f"{path} is no file of this command's --state; give another name") from None
        if differ:
            key = differ[0]
            raise InputError(
                f"{path} is of another run: there {key} is {shown(first.get(key))}, here "
                f"{shown(header[key])}; give another --state, or the options of that run"
            )
        os.truncate(path, end)

    def add(self, length: int, window: Window, sums: Sums) -> None:
        self.done[length, window] = sums
        if self.path is not None:
            line = {"length": length, "window": window, "losses": sums.losses, "tokens": sums.tokens}
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
