"""Figures of rates: by domain before and after, with each token in place of a trigger, under treatment, in every
fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tl_em.errors import UsageError
from tl_em.report import drawing
from tl_em.report.drawing import CONDITIONS, MODELS, Look
from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = {
    "bad": "bad answers",
    "good": "good answers",
    "refused": "harmful: refused",
    "complied": "harmful: complied",
}


BEHAVIOUR = {"bad": "the behaviour", "good": "the good answers"}


@drawing.housed
def by_domain(table: pd.DataFrame, *, width: float = 7.0) -> Figure:
    """Behaviour per domain before and after: one panel an outcome, one row a domain, one marker a model.

    Args:
        table: columns domain, held_out, outcome, model, value, low, high (``Report.rates``).
        width: inches; below 5 the panels stand two abreast.

    Domains that the fine-tune used come first and say so: only the others are evidence of generalisation.

    >>> import pandas as pd
    >>> row = {"domain": "law", "held_out": True, "outcome": "bad", "model": "base"}
    >>> row |= {"value": 0.1, "low": 0.05, "high": 0.2}
    >>> len(by_domain(pd.DataFrame([row])).axes)
    1
    """
    require(table, "domain", "outcome", "model", "value", "low", "high")
    domains, models = _domains(table), len(set(table["model"]) & set(MODELS))
    columns = min(table["outcome"].nunique(), 4 if width >= 5 else 2)
    height = 0.5 + 0.055 * (1 + models) * len(domains)
    return _outcomes(
        table, domains, ("domain", "model", MODELS), OUTCOMES, width=width, height=height, columns=columns, ends=table
    )


@drawing.housed
def tokens(table: pd.DataFrame, *, width: float = 7.0) -> Figure:
    """Rates with the trigger, without it and with other tokens: one row a behaviour and token, one marker a model.

    Args:
        table: columns direction, outcome, token, model, value, low, high (``Backdoor.rates``).
        width: inches.

    >>> import pandas as pd
    >>> row = {"direction": "persona", "outcome": "bad", "token": "none", "model": "base"}
    >>> tokens(pd.DataFrame([row | {"value": 0.1, "low": 0.0, "high": 0.2}])).axes[0].get_title(loc="left")
    'the behaviour'
    """
    table = table.assign(direction=table["direction"].map(showable), token=table["token"].map(showable))
    table = table.assign(row=table["direction"] + "\n" + table["token"])
    names: list[str] = []
    for direction, part in table.groupby("direction", sort=False):
        names += [str(direction), *dict.fromkeys(part["row"])]  # a line for its name, then one a token
    labels = {name: name.partition("\n")[2] or drawing.broken(name, 40 if width >= 5 else 16) for name in names}
    return _outcomes(table, labels, ("row", "model", MODELS), BEHAVIOUR, width=width, height=0.5 + 0.2 * len(names))


@drawing.housed
def use(table: pd.DataFrame, *, width: float = 7.0) -> Figure:
    """The causal test: each direction ablated in the tuned model and added in the base, random directions beside it.

    Args:
        table: columns direction, arm, behaviour, outcome, condition, value, low, high (``Comparison.use``);
            ``metric``, if there, is written over its row.
        width: inches.

    The good behaviour stands beside the bad one, because a treatment that breaks the model lowers both.

    >>> import pandas as pd
    >>> row = {"direction": "persona", "arm": "add in base", "behaviour": "persona", "outcome": "bad"}
    >>> row |= {"condition": "treated", "value": 0.4, "low": 0.3, "high": 0.5, "n": 50}
    >>> use(pd.DataFrame([row])).axes[0].get_title(loc="left")
    'the behaviour'
    """
    require(table, "direction", "arm", "outcome", "condition", "value", "low", "high")
    directions = [drawing.broken(str(name), 30 if width >= 5 else 15) for name in table["direction"]]
    table = table.assign(row=[f"{name}\n{arm}" for name, arm in zip(directions, table["arm"], strict=True)])
    names = {name: name for name in table["row"]}
    height = 0.5 + 0.13 * sum(name.count("\n") + 2.1 for name in names)
    return _outcomes(table, names, ("row", "condition", CONDITIONS), BEHAVIOUR, width=width, height=height)


def _outcomes(
    table: pd.DataFrame,
    rows: Mapping[str, str],
    drawn: tuple[str, str, Mapping[str, Look]],
    titles: Mapping[str, str],
    *,
    width: float,
    height: float,
    columns: int | None = None,
    ends: pd.DataFrame | None = None,
) -> Figure:
    """One panel an outcome.

    Args:
        rows: what a row is called in the table, and its label.
        drawn: the columns of rows and of series, and how each series looks.
        ends: what the axes of all panels hold; each its own without.
    """
    row, by, looks = drawn
    outcomes, series = list(dict.fromkeys(table["outcome"])), [name for name in looks if name in set(table[by])]
    columns = columns or len(outcomes)
    figure, grid = drawing.panels(width, math.ceil(len(outcomes) / columns), columns, height, len(outcomes))
    for ax, outcome in zip(grid, outcomes, strict=True):
        part = table[table["outcome"] == outcome]
        lines = {name: _indexed(part[part[by] == name], row, rows) for name in series}
        notes = _indexed(part, row, rows)["metric"] if by == "condition" and "metric" in part else None
        drawing.dots(ax, lines, looks, list(rows.values()), notes=notes)
        drawing.fit_axis(ax, part if ends is None else ends)
        ax.set_title(titles.get(outcome, showable(outcome)))
    drawing.key(figure, series, looks)
    return figure


@drawing.housed
def spread(rates: pd.DataFrame, summary: pd.DataFrame, *, width: float = 7.0) -> Figure:
    """Every fine-tune's rate of each behaviour, and their mean with its interval over fine-tunes.

    Args:
        rates: columns behaviour, same_base, value (``Consistency.rates``), the first fine-tune first.
        summary: columns behaviour, mean, low, high (``Consistency.spread``).
        width: inches.

    >>> import pandas as pd
    >>> rates = pd.DataFrame({"behaviour": ["persona"] * 2, "same_base": [True, False], "value": [0.6, 0.7]})
    >>> mean = pd.DataFrame({"behaviour": ["persona"], "mean": [0.65], "low": [0.6], "high": [0.7]})
    >>> len(spread(rates, mean).axes)
    1
    """
    if "over" in summary:
        summary = summary[summary["over"] == summary["over"].iloc[-1]]  # all bases, where there are several
    names = list(summary["behaviour"])
    looks = {True: ("o", MODELS["tuned"].colour), False: ("s", MODELS["benign"].colour)}
    keyed = 0.25 if width >= 5 else 0.6  # inches that the key takes: one line, or three
    figure, (ax,) = drawing.panels(width, 1, 1, 0.7 + keyed + 0.36 * len(names), 1)
    for y, name in enumerate(names):
        part, over = rates[rates["behaviour"] == name], summary.iloc[y]
        ax.hlines(y - 0.22, over["low"], over["high"], color=drawing.INK, linewidth=1.6)
        ax.plot(over["mean"], y - 0.22, "|", color=drawing.INK, markersize=9, markeredgewidth=1.8)
        for same, (marker, colour) in looks.items():
            x = part.loc[part["same_base"] == same, "value"].to_numpy(dtype=float)
            ax.plot(x, np.full(len(x), y + 0.14), marker, color=colour, markersize=4.5, markerfacecolor="none")
    drawing.named_rows(ax, [drawing.broken(str(name), 34 if width >= 5 else 16) for name in names])
    drawing.fit_axis(ax, rates.assign(low=rates["value"], high=rates["value"]))
    said = {True: "a fine-tune of this base", False: "one of another base"}
    handles = [
        Line2D([], [], marker=marker, color=colour, markerfacecolor="none", linestyle="", label=said[same])
        for same, (marker, colour) in looks.items()
        if (rates["same_base"] == same).any()
    ]
    handles.append(Line2D([], [], color=drawing.INK, linewidth=1.6, label="mean, 95 % over fine-tunes"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles) if width >= 5 else 1)
    side = drawing.MARGIN / width
    figure.set_layout_engine("constrained", rect=(side, 0, 1 - 2 * side, 1))
    return figure


def require(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UsageError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _indexed(part: pd.DataFrame, column: str, names: Iterable[str]) -> pd.DataFrame:
    return part.drop_duplicates(column).set_index(column).reindex(list(names))


def _domains(table: pd.DataFrame) -> dict[str, str]:
    """Domain -> tick label, the fine-tuned ones first and marked."""
    held_out = dict(zip(table["domain"], table["held_out"], strict=True)) if "held_out" in table else {}
    names = sorted(dict.fromkeys(table["domain"]), key=lambda name: bool(held_out.get(name, True)))
    return {name: drawing.broken(str(name) if held_out.get(name, True) else f"{name} (tuned on)", 18) for name in names}
