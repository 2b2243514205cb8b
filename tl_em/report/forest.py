"""The forest plot: every verdict's estimate beside its control and the smallest effect of interest.

A panel a question, in the order in which they were asked; its title is the question's name and unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from tl_em.claims.claim import NOT_SHOWN, Question
from tl_em.claims.compare import SHIPPED
from tl_em.errors import UsageError
from tl_em.report import drawing
from tl_em.report.drawing import MODELS
from tl_em.showing import number, showable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@drawing.housed
def verdicts(rows: Sequence[Any], *, questions: Sequence[Question] = SHIPPED, width: float = 7.0) -> Figure:
    """Every verdict as a forest plot: estimate and interval against the smallest effect of interest and the control.

    Args:
        rows: ``Row`` objects (question, direction, verdict, estimate, control), as in ``Comparison.rows``.
        questions: what was asked, in the order of the panels.
        width: inches; below 5 the questions stand one above the other.

    >>> from types import SimpleNamespace as Row
    >>> estimate = Row(value=-0.4, low=-0.5, high=-0.3)
    >>> row = Row(question="level", direction="refusal", verdict="diminished", estimate=estimate, control={})
    >>> row.smallest = 0.1
    >>> verdicts([row]).axes[0].get_title(loc="left")
    'level, own gaps'
    """
    titles = {f"{asked.name}, {asked.unit}": [r for r in rows if r.question == asked.name] for asked in questions}
    groups = {title: found for title, found in titles.items() if found}
    if not groups:
        raise UsageError(f"no rows to draw: a row's question is one of {', '.join(each.name for each in questions)}")
    columns = min(len(groups), 2 if width >= 5 else 1)
    lines = math.ceil(len(groups) / columns)
    tallest = [
        max(len(found) for found in list(groups.values())[i * columns : (i + 1) * columns]) for i in range(lines)
    ]
    heights = [0.48 + (0.19 if width >= 5 else 0.25) * n for n in tallest]
    figure, grid = drawing.panels(width, lines, columns, heights, len(groups), sharey=False)
    for ax, (title, found) in zip(grid, groups.items(), strict=True):
        _forest(ax, found, wide=width >= 5)
        ax.set_title(showable(title))
    drawing.key(figure, [], MODELS, band="95 % of the controls", bound="smallest effect of interest")
    return figure


def _forest(ax: Axes, rows: Sequence[Any], *, wide: bool) -> None:
    """One line a row: control band behind, smallest effect of interest on both sides, verdict at the right."""
    ax.axvline(0, color=drawing.RULE, linewidth=0.8, zorder=0.5)
    for y, row in enumerate(rows):
        _forest_row(ax, float(y), row)
    drawing.named_rows(ax, [drawing.broken(str(row.direction), 30 if wide else 13) for row in rows])
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=5 if wide else 3)


def _forest_row(ax: Axes, y: float, row: Any) -> None:
    shown, estimate, bound = row.verdict != NOT_SHOWN, row.estimate, row.smallest
    low, high = row.control.get("low"), row.control.get("high")
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        ax.barh(y, high - low, left=low, height=0.72, color=drawing.BAND, linewidth=0, zorder=0.2)
    ax.vlines([-bound, bound], y - 0.5, y + 0.5, zorder=0.6, **drawing.DASHED)
    colour, face = (drawing.INK, drawing.INK) if shown else (drawing.MUTED, "none")
    ax.hlines(y, estimate.low, estimate.high, color=colour, linewidth=1.4 if shown else 1.0)
    ax.plot(estimate.value, y, marker="o", markersize=4.5, color=colour, markerfacecolor=face)
    words = f"{row.verdict}  {number(estimate.value)}" if shown else row.verdict
    ax.annotate(words, (1.02, y), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=7.5)
