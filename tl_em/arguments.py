"""What a caller may pass, checked once where it enters: finite numbers, whole numbers, token ids.

A NaN limit rejects nothing, a fractional layer names no block and a negative temperature is one that nobody asked for:
each runs to the end and gives a number. So numbers are checked at the boundary, in one place, with one kind of message.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from tl_em.errors import UsageError

Number = int | float


def finite(
    name: str, value: Any, *, low: Number | None = None, high: Number | None = None, open_low: bool = False
) -> float:
    """``value`` as a float: a number, neither NaN nor infinite, within the bounds.

    Args:
        name: of the argument, for the message.
        value: a number of Python, numpy or torch (of one element).
        low, high: bounds, included.
        open_low: whether ``low`` itself is excluded.

    Raises:
        UsageError: anything else.

    Example:
        >>> finite("q", 0.05, low=0, high=1)
        0.05
        >>> finite("q", float("nan"), low=0, high=1)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: q=nan is not a finite number: ...
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(
            f"{name}={_shown(value)} is not a finite number: every comparison with it would be false, in silence. "
            f"Give {name} a number{_range(low, high, open_low)}."
        )
    if (low is not None and (number < low or (open_low and number == low))) or (high is not None and number > high):
        raise UsageError(
            f"{name}={_shown(value)} is out of range, so the result would mean nothing. "
            f"Give {name} a number{_range(low, high, open_low)}."
        )
    return number


def whole(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """``value`` as an int: a whole number of Python, numpy or torch within the bounds; 1.5 and True are none.

    Raises:
        UsageError: anything else.

    Example:
        >>> whole("layer", 3, low=0)
        3
        >>> whole("layer", 1.5, low=0)
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: layer=1.5 is not a whole number, so it counts nothing. Give layer a whole number >= 0.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    wanted = _range(low, high, False)
    if number is None:
        raise UsageError(
            f"{name}={_shown(value)} is not a whole number, so it counts nothing. Give {name} a whole number{wanted}."
        )
    if (low is not None and number < low) or (high is not None and number > high):
        raise UsageError(f"{name}={_shown(value)} is out of range. Give {name} a whole number{wanted}.")
    return number


def _range(low: Number | None, high: Number | None, open_low: bool) -> str:
    bounds = [f"{'>' if open_low else '>='} {low}"] if low is not None else []
    bounds += [f"<= {high}"] if high is not None else []
    return f" {' and '.join(bounds)}" if bounds else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
