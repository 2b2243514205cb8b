"""A matrix of cosines as a heat map: each with its interval and its ceiling, and a mark where it is not shown.

A colour is a hue of the palette at an opacity that grows with the cosine, so that one drawing serves light and dark and
text stays legible on it; the number is written in every cell, so that nothing depends on colour, as far as letters of 7
points fit there: beyond, the table has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from tl_em.errors import UsageError
from tl_em.report import drawing
from tl_em.showing import interval, number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_POSITIVE, _NEGATIVE = drawing.MODELS["tuned"].colour, drawing.MODELS["benign"].colour
_OPACITY = 0.65
"""Opacity of a cosine of 1: what text in the ink's colour stands out on, in light and dark."""


class _Lines(NamedTuple):
    """How a cell is written: its height in inches, where its lines stand, and whether they are broken."""

    height: float
    at: tuple[float, ...]
    broken: bool


_ROOM = {0.85: _Lines(0.52, (-0.2, 0.08, 0.32), broken=False), 0.46: _Lines(0.84, (-0.36, -0.06, 0.27), broken=True)}
"""By the least width of a cell in inches, in letters of 7 points."""
_NO_ROOM = _Lines(0.3, (), broken=False)
_SIZES = (8.5, 7.0, 7.0)


@drawing.housed
def cosines(table: pd.DataFrame, *, reliability: Mapping[str, float] | None = None, width: float = 7.0) -> Figure:
    """Cosines between directions, one cell a pair, below the diagonal; reliabilities on it.

    Args:
        table: columns first, second, value, low, high, ceiling, p (``CosineMatrix.to_pandas()``).
        reliability: for each direction the cosine with its own replication.
        width: inches.

    >>> import pandas as pd
    >>> row = {"first": "refusal", "second": "harm", "value": 0.4, "low": 0.3, "high": 0.5, "ceiling": 0.9, "p": 0.01}
    >>> [text.get_text() for text in cosines(pd.DataFrame([row])).axes[0].texts]
    ['0.40', '[0.30, 0.50]', 'ceiling 0.90']
    """
    missing = {"first", "second", "value", "low", "high", "ceiling", "p"} - set(table.columns)
    if missing or table.empty:
        raise UsageError(f"the table has {len(table)} rows and lacks the columns {sorted(missing)}; nothing to draw")
    names = list(dict.fromkeys([*table["first"], *table["second"]]))
    n = len(names)
    cell = (width - 1.2) / n
    lines = next((lines for least, lines in _ROOM.items() if cell >= least), _NO_ROOM)
    figure = drawing.Picture(figsize=(width, 0.75 + lines.height * n), layout="constrained")
    ax = figure.subplots()
    for row in table.to_dict("records"):
        _pair(ax, names.index(row["first"]), names.index(row["second"]), row, lines)
    for i, name in enumerate(names):
        _own(ax, i, (reliability or {}).get(name), lines)
    _frame(ax, names, cell=cell)
    shown = "not shown: p ≥ .05, or the interval reaches 0"
    handles: list[Any] = [Patch(facecolor=_POSITIVE, alpha=_OPACITY, label="cosine 1")]
    handles.append(Patch(facecolor=_NEGATIVE, alpha=_OPACITY, label=f"cosine {number(-1.0, 0)}"))
    handles.append(Line2D([], [], linestyle="none", marker="o", color=drawing.MUTED, markerfacecolor="none",
                          markersize=4, label=shown))  # fmt: skip
    if lines is _NO_ROOM:
        handles.append(Patch(alpha=0, label="numbers and intervals: .to_pandas()"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4 if width >= 5 else 1)
    figure.set_layout_engine("constrained", w_pad=drawing.MARGIN)
    return figure


def _pair(ax: Axes, i: int, j: int, row: Mapping[Any, Any], lines: _Lines) -> None:
    x, y = sorted((i, j))
    value, shown = float(row["value"]), row["p"] < 0.05 and (row["low"] > 0 or row["high"] < 0)
    colour = _POSITIVE if value > 0 else _NEGATIVE
    opacity = _OPACITY * min(abs(value), 1.0)
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=opacity, linewidth=0))
    said = number(value), interval(row["low"], row["high"]), f"ceiling {number(row['ceiling'])}"
    weights = ("bold" if shown else "normal", "normal", "normal")
    for at, text, size, weight in zip(lines.at, said, _SIZES, weights, strict=False):
        written = text.replace(" ", "\n") if lines.broken else text
        ax.text(x, y + at, written, ha="center", va="center", fontsize=size, fontweight=weight, linespacing=1.05)
    if not shown:
        ax.plot(x + 0.4, y - 0.36, marker="o", markersize=4, color=drawing.MUTED, markerfacecolor="none")


def _own(ax: Axes, i: int, reliability: float | None, lines: _Lines) -> None:
    ax.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor=drawing.BAND, linewidth=0))
    if reliability is not None and lines.at:
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": drawing.MUTED}
        ax.text(i, i - 0.12, number(reliability), fontsize=_SIZES[0], **style)
        ax.text(i, i + 0.16, "repli-\ncation" if lines.broken else "replication", fontsize=_SIZES[1], **style)


def _whole(label: str, name: str) -> bool:
    """Whether a label in two lines is the name, broken where a word ends."""
    first, _, rest = label.partition("\n")
    return first + rest == name and (not rest or first[-1] in "_- /")


def _frame(ax: Axes, names: list[str], *, cell: float) -> None:
    n = len(names)
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_ylim(n - 0.5, -0.5)
    length = int(13 * cell)
    below = [drawing.broken(name, length) for name in names] if length > 3 else ["…"]
    if all(_whole(label, name) for label, name in zip(below, names, strict=False)):
        beside = [drawing.broken(name, 14) for name in names]
    else:  # numbers where a column is too narrow for its name
        below = [str(i) for i in range(1, n + 1)]
        beside = [f"{i}: {drawing.broken(name, 14)}" for name, i in zip(names, below, strict=True)]
    ax.set_xticks(range(n), below)
    ax.set_yticks(range(n), beside)
    ax.tick_params(length=0, labelcolor=drawing.INK)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    for edge in range(1, n):  # only where there are cells
        ax.plot([-0.5, edge + 0.5], [edge - 0.5, edge - 0.5], color=drawing.RULE, linewidth=0.6)
        ax.plot([edge - 0.5, edge - 0.5], [edge - 1.5, n - 0.5], color=drawing.RULE, linewidth=0.6)
