"""What a check does with a learner's file: runs it, calls its functions, compares, and says what differs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen_ref.config import read_bytes

LONGEST_SHOWN = 200  # characters of a value in a message


class NotRight(Exception):
    """What is wrong with an attempt, in a line, and a hint that leads on; no hint: the exercise's own."""

    def __init__(self, wrong: str, hint: str = "") -> None:
        super().__init__(wrong)
        self.hint = hint


class NotDone(NotRight):
    """A hole that is still one."""


class Attempt:
    """The functions of one file, wrapped: whatever they do wrong comes out as NotRight.

    The file is compiled anew each time, so that no bytecode of an earlier attempt is in the way.
    Raises NotRight where Python cannot run it, ValueError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        source = read_bytes(path)
        module = ModuleType(path.stem)
        try:
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        except SyntaxError as error:
            raise NotRight(f"Python cannot read {path.name}, line {error.lineno}: {error.msg}") from None
        except (Exception, SystemExit) as error:
            raise NotRight(f"{path.name} cannot be run: {raised(error)}{self._line(error)}") from None
        self._names = module.__dict__

    def function(self, name: str) -> Callable[..., Any]:
        """One function of the file. Its tensors and lists are given as copies, to be changed at will."""

        def call(*arguments: object) -> Any:
            if not callable(self._names.get(name)):
                raise NotRight(
                    f"{self.path.name} has no function {name} any more; the check calls it by this name"
                )
            try:
                found = self._names[name](*map(_copy, arguments))
            except (Exception, SystemExit) as error:
                if type(error) is NotImplementedError and not error.args:  # torch's own say what is not
                    raise NotDone(f"not done yet: {name}") from None
                given = ", ".join(map(_brief, arguments))
                raise NotRight(f"{name}({given}) raised {raised(error)}{self._line(error)}") from None
            if found is None:
                raise NotRight(f"{name} returned None", "A function returns what stands after `return`.")
            return found

        return call

    def _line(self, error: BaseException) -> str:
        """Where in the learner's file an error came from."""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.path)]
        return f", at line {lines[-1]}" if lines else ""


def hold(
    what: str,
    found: object,
    right: object,
    known: Sequence[tuple[object, str]] = (),
    otherwise: str = "",
    within: float = 1e-5,
) -> None:
    """Raises NotRight unless found is right.

    known: wrong answers, each with its hint; otherwise: the hint where it is none of them.
    Tensors must have the dtype and the shape, too, and agree as `agree` says.
    """
    if isinstance(right, Tensor):
        if not isinstance(found, Tensor):
            raise NotRight(f"{what}: a tensor is wanted, not {_brief(found)}", otherwise)
        same = found.dtype == right.dtype and found.shape == right.shape and agree(found, right, within)
    elif isinstance(found, Tensor) or hasattr(found, "__array__"):
        kind = type(right).__name__
        raise NotRight(f"{what}: a plain {kind} is wanted, not {_brief(found)} of {type(found).__name__}")
    elif isinstance(found, tuple) and list(found) == right:
        raise NotRight(f"{what}: a list is wanted, not a tuple")
    else:
        same = (type(found) is type(right) and found == right) or _equal_numbers(found, right)
    if same:
        return
    hint = next((hint for wrong, hint in known if _same(found, wrong, within)), otherwise)
    raise NotRight(f"{what}: {_difference(found, right)}", hint)


def agree(found: Tensor, right: Tensor, within: float) -> bool:
    """Whether two tensors of one shape differ by rounding only.

    A number may be off by `within` of its size and of the tensor's together: another order of operations
    rounds otherwise, and where numbers cancel a small one carries the error of large ones. In bfloat16 and
    float16 that is mostly rounded away, so 99 of 100 must be the same, and the others next to it: rounding at
    another place changes 21 of 100 or more in exercise 3, another way to the root none.
    """
    if found.dtype in (torch.bfloat16, torch.float16):
        same = (found == right).double().mean() >= 0.99
        within = torch.finfo(found.dtype).eps
    else:
        same = True
    found, right = found.double(), right.double()
    size = right.abs() + right.square().mean().sqrt()
    return bool(same and ((found - right).abs() <= within * size).all())  # NaN is never within


def _equal_numbers(found: object, right: object) -> bool:
    return isinstance(found, int | float) and isinstance(right, int | float) and found == right


def _same(found: object, wrong: object, within: float) -> bool:
    """Whether a wrong answer is the known one, NaN and infinities included."""
    if not isinstance(found, Tensor) and not isinstance(wrong, Tensor):
        numbers = isinstance(found, int | float) and isinstance(wrong, int | float)
        return abs(found - wrong) <= within * abs(wrong) if numbers else found == wrong
    if not isinstance(found, Tensor) or not isinstance(wrong, Tensor):
        return False
    if found.dtype != wrong.dtype or found.shape != wrong.shape:
        return False
    if not torch.equal(found.isfinite(), wrong.isfinite()):
        return False
    finite = wrong.isfinite()
    return not finite.any() or agree(found[finite], wrong[finite], within)


def _difference(found: object, right: object) -> str:
    if not isinstance(found, Tensor) or not isinstance(right, Tensor):
        return f"yours is {_brief(found)}, Qwen's {_brief(right)}"
    if found.dtype != right.dtype:
        return f"yours is {_dtype(found)}, Qwen's {_dtype(right)}"
    if found.shape != right.shape:
        return f"yours has the shape {tuple(found.shape)}, Qwen's {tuple(right.shape)}"
    if right.numel() <= 16:
        return f"yours is {_brief(_numbers(found))}, Qwen's {_brief(_numbers(right))}"
    off = (found.double() - right.double()).abs().nan_to_num(torch.inf, torch.inf)
    place = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
    mine, theirs = found[tuple(place)].item(), right[tuple(place)].item()
    return (
        f"{int((off > 0).sum()):,} of {off.numel():,} numbers differ, most at {place}: "
        f"yours is {mine:.7g}, Qwen's {theirs:.7g}"
    )


def _numbers(x: Tensor) -> list:
    """A small tensor as a list, floats to 5 digits."""
    if x.dtype.is_floating_point:
        return [float(f"{value:.5g}") for value in x.flatten().tolist()]
    return x.tolist()


def _copy(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.clone()
    return list(argument) if isinstance(argument, list) else argument


def _brief(value: object) -> str:
    """A value in a message: of a tensor its dtype and shape, of anything else its beginning."""
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {tuple(value.shape)}"
    text = f"dict of {len(value)}" if isinstance(value, dict) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} …"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def raised(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_SHOWN]}"
