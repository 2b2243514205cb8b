"""Fields of a file from elsewhere: what is none of what the format says is named, with what stands there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def an_object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {said(value)} where an object belongs")
    return value


def a_list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {said(value)} where a list belongs")
    return value


def said(value: Any) -> str:
    if isinstance(value, list | tuple | Mapping):
        return "a list" if isinstance(value, list | tuple) else "an object"
    return "missing" if value is None else repr(value)[:40]


def a_whole_number(value: Any, name: str) -> int:
    try:
        number = None if isinstance(value, bool) else int(value)
        exact = number is not None and (isinstance(value, str) or number == value)
    except (TypeError, ValueError, OverflowError):
        number, exact = None, False
    if number is None or not exact:
        raise ValueError(f"{name} is {said(value)} where a whole number belongs")
    return number


def a_number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {said(value)} where a finite number belongs")
    return number
