"""Figures of rates: by domain before and after, with each token in place of a trigger, in every fine-tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tl_em.errors import UsageError
from tl_em.report import drawing
from tl_em.report.drawing import MODELS
from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = {
    "bad": "bad answers",
    "good": "good answers",
    "refused": "harmful: refused",
    "complied": "harmful: complied",
}


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
    domains = _domains(table)
    outcomes = list(dict.fromkeys(table["outcome"]))
    models = [name for name in MODELS if name in set(table["model"])]
    columns = min(len(outcomes), 4 if width >= 5 else 2)
    lines = math.ceil(len(outcomes) / columns)
    with drawing.styled():
        figure, grid = drawing.panels(
            width, lines, columns, 0.5 + 0.055 * (1 + len(models)) * len(domains), len(outcomes)
        )
        for ax, outcome in zip(grid, outcomes, strict=True):
            part = table[table["outcome"] == outcome]
            series = {name: indexed(part[part["model"] == name], "domain", list(domains)) for name in models}
            drawing.dots(ax, series, MODELS, list(domains.values()))
            drawing.fit_axis(ax, table)
            ax.set_title(OUTCOMES.get(outcome, showable(outcome)))
        drawing.key(figure, models, MODELS)
        return drawing.settle(figure)


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
    labels = [name.partition("\n")[2] or drawing.broken(name, 40 if width >= 5 else 16) for name in names]
    outcomes = list(dict.fromkeys(table["outcome"]))
    models = [name for name in MODELS if name in set(table["model"])]
    with drawing.styled():
        figure, grid = drawing.panels(width, 1, len(outcomes), 0.5 + 0.2 * len(names), len(outcomes))
        for ax, outcome in zip(grid, outcomes, strict=True):
            part = table[table["outcome"] == outcome]
            series = {name: part[part["model"] == name].set_index("row").reindex(names) for name in models}
            drawing.dots(ax, series, MODELS, labels)
            drawing.fit_axis(ax, part)
            ax.set_title({"bad": "the behaviour", "good": "the good answers"}.get(outcome, showable(outcome)))
        drawing.key(figure, models, MODELS)
        return drawing.settle(figure)


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
    with drawing.styled():
        keyed = 0.25 if width >= 5 else 0.6  # inches that the key takes: one line, or three
        figure, (ax,) = drawing.panels(width, 1, 1, 0.7 + keyed + 0.36 * len(names), 1)
        for y, name in enumerate(names):
            part, over = rates[rates["behaviour"] == name], summary.iloc[y]
            ax.hlines(y - 0.22, over["low"], over["high"], color=drawing.INK, linewidth=1.6)
            ax.plot(over["mean"], y - 0.22, "|", color=drawing.INK, markersize=9, markeredgewidth=1.8)
            for same, (marker, colour) in looks.items():
                x = part.loc[part["same_base"] == same, "value"].to_numpy(dtype=float)
                ax.plot(x, np.full(len(x), y + 0.14), marker, color=colour, markersize=4.5, markerfacecolor="none")
        ax.set_yticks(range(len(names)), [drawing.broken(str(name), 34 if width >= 5 else 16) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.tick_params(axis="y", labelcolor=drawing.INK)
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
        return drawing.settle(figure)


def require(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UsageError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def indexed(part: pd.DataFrame, column: str, names: Sequence[str]) -> pd.DataFrame:
    return part.drop_duplicates(column).set_index(column).reindex(names)


def _domains(table: pd.DataFrame) -> dict[str, str]:
    """Domain -> tick label, the fine-tuned ones first and marked."""
    held_out = dict(zip(table["domain"], table["held_out"], strict=True)) if "held_out" in table else {}
    names = sorted(dict.fromkeys(table["domain"]), key=lambda name: bool(held_out.get(name, True)))
    return {name: drawing.broken(str(name) if held_out.get(name, True) else f"{name} (tuned on)", 18) for name in names}
