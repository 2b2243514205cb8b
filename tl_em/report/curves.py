"""Figures of curves: the effect of a treatment against what it costs, and what a monitor saw while a model trained.

Of an effect curve, one panel a measure of cost.  Right is always worse: more nats of KL, less of the coherence metric.
Random directions at the same push are a band and points, instructions are marks with their names, the untreated model
is a dashed line, so the reader sees at once what any push does and what asking does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from tl_em.errors import UsageError
from tl_em.report import drawing
from tl_em.report.drawing import CONDITIONS, MODELS, Look
from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STEERED, RANDOM = CONDITIONS["treated"], CONDITIONS["random"]
TURNED = MODELS["benign"]._replace(marker="v")
TOLD = MODELS["tuned"]._replace(marker="*", filled=False)
_LETTERS, _SIZE = 30, 7.5


class _Axis(NamedTuple):
    """A measure of cost: its column in the table and its label."""

    column: str
    label: str


@drawing.housed
def effect(curve: Any, *, width: float = 7.0) -> Figure:
    """Effect against cost: the intervention over strengths, random directions at the same push, instructions.

    Args:
        curve: an ``EffectCurve``.
        width: inches; below 5 the panels stand one above the other.

    Raises:
        UsageError: not one point of the intervention could be measured.
    """
    table = curve.to_pandas()
    if not np.isfinite(table.loc[table["arm"] == "intervention", "effect"]).any():
        raise UsageError("no point of the intervention could be measured, so there is no curve; use smaller strengths")
    axes = [_Axis("kl", "KL from untreated at the last token, nats")]
    if curve.coherence is not None:
        axes.append(_Axis("coherence", f"{showable(curve.coherence)} (less to the right)"))
    lines, columns = (1, len(axes)) if width >= 5 else (len(axes), 1)
    figure, grid = drawing.panels(width, lines, columns, 2.5, len(axes), sharey=True)
    for ax, axis in zip(grid, axes, strict=True):
        _panel(ax, table, axis)
    for ax in grid[:: columns if lines == 1 else 1]:
        ax.set_ylabel(showable(curve.metric))
    _key(figure, table)
    drawing.settle(figure)
    for ax, axis in zip(grid, axes, strict=True):  # where there is room is known once the panels lie where they lie
        _names(ax, table, axis.column)
    return figure


_SEEN = {"rate/": "rate", "projection/": "projection", "local_cosine": "local cosine"}


@drawing.housed
def training(table: pd.DataFrame, *, transition: Any = None, width: float = 7.0) -> Figure:
    """Rates, projections and the local cosine over the steps of a training run, one panel each.

    Args:
        table: a ``Monitor``'s: step, name, value, low, high, n.
        transition: where the path of the weights turns (``.step``); a dashed line in every panel.
        width: inches.

    Raises:
        UsageError: the table holds none of the three.
    """
    kinds = {label: table[table["name"].str.startswith(kind)] for kind, label in _SEEN.items()}
    kinds = {label: part for label, part in kinds.items() if np.isfinite(part["value"]).any()}
    if not kinds:
        raise UsageError("the monitor saw nothing that can be drawn; look at it after training, with rates or a window")
    figure, grid = drawing.panels(width, len(kinds), 1, 1.8, len(kinds), sharey=False)
    for ax, (label, part) in zip(grid, kinds.items(), strict=True):
        for look, (name, series) in zip(itertools.cycle(drawing.SERIES), part.groupby("name", sort=False)):
            _line(ax, series, look, str(name).partition("/")[2] or label)
        if transition is not None:
            ax.axvline(transition.step, zorder=0.6, **drawing.DASHED)
        ax.set_ylabel(label)
        ax.set_xlim(first := table["step"].min(), max(first + 1, table["step"].max()))
        ax.grid(axis="y")
        if len(ax.lines) > 1 + (transition is not None):
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6 if width >= 5 else 3, borderaxespad=0.1)
    if transition is not None:
        grid[-1].set_title(f"rotation at step {transition.step}", loc="right", color=drawing.MUTED)
    grid[-1].set_xlabel("step")
    return figure


def _line(ax: Axes, series: pd.DataFrame, look: Look, label: str) -> None:
    x, value, low, high = (series[name].to_numpy(dtype=float) for name in ("step", "value", "low", "high"))
    ax.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    every = max(1, len(x) // 8)
    ax.plot(x, value, label=drawing.named(label), **look.drawn(3.5, linewidth=1.2, markevery=every))


def _panel(ax: Axes, table: pd.DataFrame, axis: _Axis) -> None:
    known = table[np.isfinite(table["effect"])]
    _random(ax, known[known["arm"] == "random"], axis.column)
    ax.axhline(float(known.loc[known["arm"] == "untreated", "effect"].iloc[0]), zorder=0.6, **drawing.DASHED)
    for look, part in _signs(known):
        _marks(ax, part.sort_values("kl"), axis.column, look, line="-", size=4.5)
    _marks(ax, known[known["arm"] == "instruction"], axis.column, TOLD, line="none", size=8.0)
    ax.set_xlabel(axis.label)
    ax.grid(axis="y")
    if axis.column == "kl":
        _logarithmic(ax)
    else:
        ax.invert_xaxis()
    ends = known[["effect", "effect_low", "effect_high"]].to_numpy(dtype=float)
    if np.nanmin(ends) >= -drawing.SLACK and np.nanmax(ends) <= 1 + drawing.SLACK:
        ax.set_ylim(-0.03, 1.03)


def _signs(known: pd.DataFrame) -> Iterator[tuple[Look, pd.DataFrame]]:
    """The intervention, and the intervention turned round, where there is one."""
    own = known[known["arm"] == "intervention"]
    for look, part in ((STEERED, own[own["strength"] > 0]), (TURNED, own[own["strength"] < 0])):
        if len(part):
            yield look, part


def _marks(ax: Axes, part: pd.DataFrame, column: str, look: Look, *, line: str, size: float) -> None:
    """Marks with the intervals of both axes."""
    x, y = part[column].to_numpy(dtype=float), part["effect"].to_numpy(dtype=float)
    ax.vlines(x, part["effect_low"], part["effect_high"], color=look.colour, linewidth=1.0, zorder=2)
    ax.hlines(y, part[f"{column}_low"], part[f"{column}_high"], color=look.colour, linewidth=1.0, zorder=2)
    style: dict[str, Any] = {"linestyle": line, "linewidth": 1.2, "markeredgewidth": 1.0, "zorder": 2.5}
    ax.plot(x, y, **look.drawn(size, hollow="white", **style))


def _random(ax: Axes, part: pd.DataFrame, column: str) -> None:
    """Each random direction as a point; where the push is the axis, 95 % of them at each push as a band."""
    part = part.assign(push=part.groupby("name").cumcount())
    for _, side in part.groupby(part["strength"] < 0):
        by = side.groupby("push")
        order = by["kl"].mean().sort_values()
        if column == "kl" and len(order) > 1:
            low, high = (by["effect"].quantile(q)[order.index].to_numpy(dtype=float) for q in (0.025, 0.975))
            ax.fill_between(order.to_numpy(dtype=float), low, high, color=drawing.BAND, linewidth=0, zorder=0.2)
    style: dict[str, Any] = {"linestyle": "none", "markeredgewidth": 0.5, "alpha": 0.6, "zorder": 1}
    ax.plot(part[column], part["effect"], **RANDOM.drawn(2.0, **style))


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 1000 * low else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _names(ax: Axes, table: pd.DataFrame, column: str) -> None:
    """Each instruction's name beside its mark, where it covers least of what is drawn, and no other name."""
    known = table[np.isfinite(table["effect"])]
    drawn, weight = _obstacles(ax, known, column)
    assert ax.figure is not None
    dot = ax.figure.get_figure(root=True).dpi / 72  # pixels a point
    taken: list[Bbox] = []
    for row in known[known["arm"] == "instruction"].to_dict("records"):
        name = drawing.broken(str(row["name"]), _LETTERS)
        at = ax.transData.transform((row[column], row["effect"]))
        size = np.array([0.58 * max(map(len, name.split("\n"))), 1.3 * (1 + name.count("\n"))]) * _SIZE * dot
        costs, boxes = [], []
        for place in _PLACES:
            corner = at + _middle(place, size, dot) - size / 2
            box = Bbox([corner, corner + size])
            lost = not (ax.bbox.contains(*box.p0) and ax.bbox.contains(*box.p1)) or any(box.overlaps(t) for t in taken)
            covered = weight[((drawn > box.p0) & (drawn < box.p1)).all(1)].sum()
            costs.append(float(covered) + 2 * abs(place[1]) + 1e6 * lost)
            boxes.append(box)
        best = int(np.argmin(costs))
        place, box = _PLACES[best], boxes[best]
        taken.append(box)
        leader = {"arrowstyle": "-", "color": TOLD.text, "linewidth": 0.4, "shrinkB": 4} if abs(place[1]) > 2 else None
        ax.annotate(
            name, (row[column], row["effect"]), tuple(_middle(place, size, dot) / dot), textcoords="offset points",
            ha="center", va="center", color=TOLD.text, fontsize=_SIZE, zorder=3, arrowprops=leader,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
        )  # fmt: skip


_PLACES = tuple((x, y) for y in (0, 1, -1, 2, -2, 4, -4, 6, -6) for x in ((-1, 1) if y == 0 else (-1, 1, 0)))


def _obstacles(ax: Axes, known: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of all that a name could cover, in pixels, and how bad that would be: random directions matter least."""
    marked = known[known["arm"].isin(["intervention", "instruction"])]
    x, y = marked[column], marked["effect"]
    crosses = [
        np.stack([np.linspace(marked[f"{column}_low"], marked[f"{column}_high"], 7), np.tile(y, (7, 1))], -1),
        np.stack([np.tile(x, (7, 1)), np.linspace(marked["effect_low"], marked["effect_high"], 7)], -1),
    ]
    lines = []
    for _, part in _signs(known):
        ends = part.sort_values("kl")[[column, "effect"]].to_numpy(dtype=float)
        lines.append(np.linspace(ends[:-1], ends[1:], 20))
    hard = np.concatenate([each.reshape(-1, 2) for each in (*crosses, *lines)])
    soft = known.loc[known["arm"] == "random", [column, "effect"]].to_numpy(dtype=float)
    weight = np.concatenate([np.full(len(hard), 5.0), np.full(len(soft), 1.0)])
    return ax.transData.transform(np.concatenate([hard, soft])), weight


def _middle(place: tuple[int, int], size: np.ndarray, dot: float) -> np.ndarray:
    """Middle of a text beside a mark, in pixels from it: so many half texts and a gap to that side."""
    return np.array(place) * (size / 2 + np.array([6.0, 3.0]) * dot)


def _key(figure: Figure, table: pd.DataFrame) -> None:
    """What each mark is, above the panels."""
    looks = {STEERED: "intervention", TURNED: "its negative"}
    style: dict[str, Any] = {"hollow": "white", "linewidth": 1.2}
    handles: list[Any] = [Line2D([], [], label=looks[look], **look.drawn(4.5, **style)) for look, _ in _signs(table)]
    arms = set(table["arm"])
    if "instruction" in arms:
        handles.append(Line2D([], [], label="instruction", **TOLD.drawn(8.0, hollow="white", linestyle="none")))
    if "random" in arms:
        label = "random, same push (95 %)"
        handles.append(Patch(facecolor=drawing.BAND, edgecolor=RANDOM.colour, linewidth=0.5, label=label))
    handles.append(Line2D([], [], label="untreated", **drawing.DASHED))
    drawing.above(figure, handles, len(handles) if figure.get_figwidth() >= 5 else 2)
