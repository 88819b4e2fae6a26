"""What a weight in fewer bits can be: the widths, the groups, and how a GPTQ release packs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from qwen_ref.config import InputError, QwenConfig, either, read_json_object, shown

QUANTIZATIONS = ("int8", "int4")  # that any checkpoint's weights can be rounded to
# Inputs that may share a scale in int4 weights: what torch's product knows, and what is taken by default.
INT4_GROUPS = (32, 64, 128, 256)
INT4_GROUP = 64
# The products of faster layers for a few rows (fast/matrices.py), and the weights that each is for.
KERNELS = {
    "bag": "all weights",
    "linear": "weights that are not quantised",
    "dynamic": "--quantize",
    "int4": "--quantize int4 and GPTQ Int4, in bfloat16",
}

# Other keys of quantization_config, with the only value that is read; a missing key, or null, means it.
_GPTQ_VALUES = {"quant_method": "gptq", "checkpoint_format": "gptq", "is_marlin_format": False}


def check_bits(bits: object) -> None:
    """Raises ValueError for widths that no GPTQ release of Qwen has."""
    if type(bits) is not int or bits not in (4, 8):
        raise InputError(f"bits={shown(bits)} is not supported: GPTQ weights are read in 4 and in 8 bits")


@dataclass(frozen=True)
class GPTQConfig:
    """How a GPTQ release packs its weights (AutoGPTQ v1): the published quantization_config.

    Raises ValueError for one that is not supported.
    """

    bits: int
    group_size: int  # inputs that share a scale and a zero point; -1: all of them
    desc_act: bool  # inputs are not grouped in their order ("act-order"): g_idx names the group of each
    sym: bool  # every zero point is the middle of the range

    @classmethod
    def from_json(cls, config: Path) -> GPTQConfig | None:
        """A config.json's quantization_config, or the quantize_config.json beside it; None: not quantised.

        Raises ValueError, naming the file, for other methods and formats, bits other than 4 and 8, values of
        the wrong type, and two files that disagree.
        """
        own = config.with_name("quantize_config.json")
        found = {}
        settings = read_json_object(config).get("quantization_config")
        if settings is not None:
            found[config] = settings
        if os.path.lexists(own):
            found[own] = read_json_object(own)
        parsed = {path: cls._parsed(path, settings) for path, settings in found.items()}
        if len(set(parsed.values())) > 1:
            said = [f"{path} says {found.in_words}" for path, found in parsed.items()]
            raise InputError(f"{', '.join(said)}; remove the one that is wrong")
        return next(iter(parsed.values()), None)

    @classmethod
    def _parsed(cls, path: Path, settings: object) -> GPTQConfig:
        try:
            if not isinstance(settings, dict):
                raise InputError(f"{shown(settings)} is no object")
            for key, value in _GPTQ_VALUES.items():
                given = settings.get(key)
                if (given.lower() if isinstance(given, str) else given) not in (None, value):
                    raise InputError(
                        f"{key}={shown(settings[key])} is not supported, only {json.dumps(value)}"
                    )
            missing = [key for key in ("bits", "group_size") if key not in settings]
            if missing:
                raise InputError(f"missing {' and '.join(missing)}")
            flags = {"desc_act": settings.get("desc_act", False), "sym": settings.get("sym", True)}
            return cls(settings["bits"], settings["group_size"], **flags)
        except ValueError as error:
            raise InputError(f"{path}: quantisation: {error}") from None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if type(self.group_size) is not int or not (self.group_size == -1 or 1 <= self.group_size <= 2**24):
            raise InputError(
                f"group_size={shown(self.group_size)} must be -1 or a number of inputs, such as 128"
            )
        for name in ("desc_act", "sym"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={shown(getattr(self, name))} must be true or false")

    @property
    def anywhere(self) -> bool:
        """Whether inputs may be cut anywhere: groups are scattered, or there is one."""
        return self.desc_act or self.group_size == -1

    @property
    def in_words(self) -> str:
        flags = f"desc_act {str(self.desc_act).lower()}, sym {str(self.sym).lower()}"
        return f"{self.bits} bits, {self.grouping}, {flags}"

    @property
    def grouping(self) -> str:
        """In words."""
        return "one group" if self.group_size == -1 else f"groups of {self.group_size}"

    def groups(self, inputs: int) -> int:
        """How many groups so many inputs make; the last may be shorter."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)

    def check_ranks(self, config: QwenConfig, ranks: int) -> None:
        """Raises ValueError where a cut of a weight's inputs would fall inside a group.

        >>> GPTQConfig(4, 128, False, True).check_ranks(QwenConfig.preset("1.8b"), 2)
        Traceback (most recent call last):
        InputError: the MLP's width 5504 cannot be split over 2 ranks at the borders of groups of 128; use 1
        """
        word = 32 // self.bits  # weights in an int32: they are not divided either
        unit = word if self.anywhere else math.lcm(self.group_size, word)
        sizes = {"hidden_size": config.hidden_size, "the MLP's width": config.mlp_width}

        def divided(n: int) -> list[str]:
            return [] if n == 1 else [name for name, size in sizes.items() if size % (n * unit)]

        if wrong := divided(ranks):
            works = [n for n in config.usable_ranks() if not divided(n)]
            what = f"words of {word} weights" if self.anywhere else f"groups of {self.group_size}"
            named = " and ".join(f"{name} {sizes[name]}" for name in wrong)
            raise InputError(
                f"{named} cannot be split over {ranks} ranks at the borders of {what}; use {either(works)}"
            )
