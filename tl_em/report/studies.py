"""The figure of a study: its lines over what was varied, every seed thin, their mean with its interval thick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from tl_em.report import drawing
from tl_em.report.drawing import Look
from tl_em.report.rates import require
from tl_em.showing import showable
from tl_em.stats import mean_over_units

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

VALUES = {"bad": "misaligned answers, held-out domains", "good": "aligned answers, held-out domains"}


@drawing.housed
def study(
    table: pd.DataFrame,
    *,
    x: str,
    by: Sequence[str],
    values: Sequence[str] = ("bad", "good"),
    unit: str = "seed",
    logarithmic: bool = False,
    width: float = 7.0,
) -> Figure:
    """Rates over what a study varied, one panel a rate.

    Args:
        table: what ``run_study`` returned.
        x: the horizontal axis: numbers, or names in the order of the table.
        by: columns that name a line.
        values: columns to draw, probabilities.
        unit: the column whose values are the thin lines and are resampled for the mean's interval.

    Raises:
        UsageError: a column is missing.

    >>> import pandas as pd
    >>> rows = [{"arm": "a", "seed": k, "share": s, "bad": s / 2} for k in (1, 2) for s in (0.0, 1.0)]
    >>> len(study(pd.DataFrame(rows), x="share", by=["arm"], values=["bad"]).axes)
    1
    """
    require(table, x, *by, *values, unit)
    lines = {" · ".join(map(str, name)): part for name, part in table.groupby(list(by), sort=False)}
    looks = {name: drawing.SERIES[i % len(drawing.SERIES)]._replace(label=name) for i, name in enumerate(lines)}
    names = None if table[x].dtype.kind in "if" else list(dict.fromkeys(table[x]))
    rows, columns = (1, len(values)) if width >= 5 else (len(values), 1)
    figure, grid = drawing.panels(width, rows, columns, 2.6, len(values))
    for ax, value in zip(grid, values, strict=True):
        for i, (name, part) in enumerate(lines.items()):
            shift = 0.0 if names is None else 0.16 * (i - (len(lines) - 1) / 2)
            _line(ax, part.assign(at=_places(part[x], names) + shift), value, looks[name], unit, names is None)
        ax.set_title(VALUES.get(value, showable(value)))
        ax.set_xlabel(showable(x))
        ax.grid(axis="y")
        ax.set_ylim(-0.03, 1.03)
        _ticks(ax, table[x], names, logarithmic)
    drawing.key(figure, list(lines), looks)
    return figure


def _places(values: Any, names: Sequence[str] | None) -> np.ndarray:
    return values.to_numpy(float) if names is None else np.array([float(names.index(v)) for v in values])


def _line(ax: Axes, part: pd.DataFrame, value: str, look: Look, unit: str, joined: bool) -> None:
    for _, each in part.groupby(unit, sort=False):
        style: dict[str, Any] = {"linewidth": 0.5} if joined else {"linestyle": "none", "marker": ".", "markersize": 3}
        ax.plot(each["at"], each[value], color=look.colour, alpha=0.45, zorder=1, **style)
    drawn = part.groupby("at", sort=True)
    found = [(at, mean_over_units(each[value], each[unit].tolist())) for at, each in drawn]
    at, middle = np.array([a for a, _ in found], dtype=float), [e.value for _, e in found]
    ax.vlines(at, [e.low for _, e in found], [e.high for _, e in found], color=look.colour, linewidth=1.0, zorder=2)
    shape: dict[str, Any] = {"markeredgewidth": 1.0, "linestyle": "-" if joined else "none", "linewidth": 1.3}
    ax.plot(at, middle, **look.drawn(4.5, hollow="white", zorder=2.5, **shape))


def _ticks(ax: Axes, values: Any, names: Sequence[str] | None, logarithmic: bool) -> None:
    if names is not None:
        ax.set_xticks(range(len(names)), [drawing.broken(name, 12) for name in names])
    elif logarithmic:
        ax.set_xscale("log")
        ax.set_xticks(sorted(set(values)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
