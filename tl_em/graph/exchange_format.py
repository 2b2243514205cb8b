"""The exchange format's fields, and what a file held that a graph has no place for.

    feature number = (l + i)(l + i + 1) / 2 + i          (Cantor's pairing of layer l and index i: ``schema_version`` 1)

A file of another program names its transcoders, its generator, the saved view of its reader, and keys that nobody here
knows. A graph that was read carries them along as its :class:`Origin`, pruned or edited or not, so that saving it again
loses nothing; what the graph does hold is written from the graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.stats import Estimate

SCHEMA = "tl-em/graph/1"
MARK = "tl_em.estimate"
_LOGIT = re.compile(r'^(?:Output|Logit) "(.*)" \(p=[\d.e+-]+\)$', re.DOTALL)
_EMBEDDING = re.compile(r'^Emb: "(.*)"$', re.DOTALL)
_CAPTIONS = {"logit": _LOGIT, "token": _EMBEDDING}
_ESTIMATED = ("value", "low", "high", "n_effective")
"""Figures that are not counts: JSON that went through a browser has 1 for 1.0."""


@dataclass(frozen=True, eq=False)
class FileLinks:
    """A file's links in its order, between its nodes by their place in it.

    Args:
        sources, targets: places of nodes.
        weights: as the file has them, in double precision.
        whole: the file's own object of each link that has more than the three keys.
    """

    sources: Int[np.ndarray, " link"]
    targets: Int[np.ndarray, " link"]
    weights: Float[np.ndarray, " link"]
    whole: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Origin:
    """The file that a graph was read from.

    Args:
        rest: the file's object without what stands under ``nodes`` and ``links``.
        nodes: the file's object of each node, by the graph's id, in the file's order.
        read: each node as it was read, by its id.
        links: its links.
        about: model, prompt, tokens, settings, validation and supernodes, as they were read.
    """

    rest: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]
    read: Mapping[str, Any]
    links: FileLinks
    about: Mapping[str, Any]


# -- a file's values, named where they are not what the format says ----------------------------------------------------
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


def cantor(layer: int, index: int) -> int:
    """The format's number of latent ``index`` of ``layer``.

    Example:
        >>> cantor(0, 0), cantor(3, 5)
        (0, 41)
    """
    return (layer + index) * (layer + index + 1) // 2 + index


def uncantor(number: int) -> tuple[int, int]:
    """Layer and index of a number from :func:`cantor`.

    Example:
        >>> uncantor(41), uncantor(13_425_951_019)
        ((3, 5), (25, 163839))
    """
    total = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - total * (total + 1) // 2
    return total - index, index


def said_of(written: Mapping[str, Any], kind: str, where: str = "node") -> tuple[str, float | None]:
    """Label and weight of a node of another program's file."""
    text = str(written.get("clerp") or "")
    found = _CAPTIONS[kind].match(text) if kind in _CAPTIONS else None
    weight = a_number(written.get("token_prob"), f"{where}.token_prob") if kind == "logit" else None
    return (found.group(1) if found else text), weight


def restored(value: Any) -> Any:
    """Settings and figures from JSON: a marked Estimate comes back as one."""
    if isinstance(value, Mapping):
        if set(value) == {MARK}:
            marked = an_object(value[MARK], MARK)
            figures = {name: a_number(marked.get(name), f"{MARK}.{name}") for name in _ESTIMATED}
            return Estimate.from_json({**marked, **figures})
        return {key: restored(each) for key, each in value.items()}
    return [restored(each) for each in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Settings and figures as JSON: an Estimate is marked, so that it comes back as one; NaN is None."""
    if isinstance(value, Estimate):
        return {MARK: value.to_json()}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
