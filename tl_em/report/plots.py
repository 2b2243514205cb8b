"""Figures from result tables: a table goes in, a matplotlib ``Figure`` comes out, and nothing global is touched.

No estimate is drawn without its interval, and none without the control that its claim needs: rates stand beside those
of the model before the fine-tune and of the benign fine-tune, projections beside the band of random directions,
treatments beside random directions with the same treatment, verdicts beside the smallest effect of interest.

``width`` is in inches (3.25 is one column of a paper, 7 is two); the panels are rearranged to fit, never squeezed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import ScalarFormatter

from tl_em.artefacts import replacing
from tl_em.claims.claim import Question
from tl_em.claims.compare import SHIPPED
from tl_em.errors import UsageError
from tl_em.report import arms, drawing
from tl_em.report.drawing import CONDITIONS, MODELS
from tl_em.showing import number, showable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TITLES = {
    "level": "level, own gaps",
    "projection_positive": "positive class",
    "projection_negative": "negative class",
    "gap": "gap",
    "dprime": "separation, d′",
    "cosine": "cosine with base",
}


OUTCOMES = {
    "bad": "bad answers",
    "good": "good answers",
    "refused": "harmful: refused",
    "complied": "harmful: complied",
}


def rates(table: pd.DataFrame, *, width: float = 7.0) -> Figure:
    """Behaviour per domain before and after: one panel an outcome, one row a domain, one marker a model.

    Args:
        table: columns domain, held_out, outcome, model, value, low, high (``Report.rates``).
        width: inches; below 5 the panels stand two abreast.

    Domains that the fine-tune used come first and say so: only the others are evidence of generalisation.

    >>> import pandas as pd
    >>> row = {"domain": "law", "held_out": True, "outcome": "bad", "model": "base"}
    >>> row |= {"value": 0.1, "low": 0.05, "high": 0.2}
    >>> len(rates(pd.DataFrame([row])).axes)
    1
    """
    _require(table, "domain", "outcome", "model", "value", "low", "high")
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
            series = {name: _indexed(part[part["model"] == name], "domain", list(domains)) for name in models}
            drawing.dots(ax, series, MODELS, list(domains.values()))
            drawing.fit_axis(ax, table)
            ax.set_title(OUTCOMES.get(outcome, showable(outcome)))
        drawing.key(figure, models, MODELS)
        return drawing.settle(figure)


def layers(
    table: pd.DataFrame,
    *,
    direction: str,
    site: Any = None,
    stream: str | None = None,
    width: float = 7.0,
) -> Figure:
    """One direction, layer by layer: small multiples of class projections, gap, d′ and cosine in every model.

    Args:
        table: columns direction, layer, stream, quantity, model, value, low, high, control_low, control_high
            (``Comparison.by_layer``).
        direction: which one.
        site: the site at which the verdicts are given; marked, if given.
        stream: which stream, when the table has several (default: the site's, else the first).
        width: inches; below 5 the panels stand two abreast.

    The grey band is where the tuned model would lie along 95 % of the random directions.

    >>> import pandas as pd
    >>> row = {"direction": "refusal", "layer": 0, "stream": "resid_post", "quantity": "gap", "model": "base"}
    >>> numbers = {"value": 1.0, "low": 0.9, "high": 1.1, "control_low": -0.1, "control_high": 0.1}
    >>> layers(pd.DataFrame([row | numbers]), direction="refusal").axes[0].get_title(loc="left")
    'gap'
    """
    _require(table, "direction", "layer", "quantity", "model", "value", "low", "high")
    part = table[table["direction"] == direction]
    if part.empty:
        raise UsageError(f"no direction {direction!r} in this table; it has {sorted(set(table['direction']))}")
    if "stream" in part:
        wanted = stream or getattr(site, "stream", None)
        part = part[part["stream"] == (wanted if wanted in set(part["stream"]) else part["stream"].iloc[0])]
    quantities = [name for name in TITLES if name in set(part["quantity"])]
    quantities += [name for name in dict.fromkeys(part["quantity"]) if name not in TITLES]
    lines = math.ceil(len(quantities) / max(2, int(width // 1.75)))
    columns = math.ceil(len(quantities) / lines)
    with drawing.styled():
        figure, grid = drawing.panels(width, lines, columns, 1.55, len(quantities), sharey=False)
        for ax, quantity in zip(grid, quantities, strict=True):
            _layer_panel(ax, part[part["quantity"] == quantity], getattr(site, "layer", None))
            ax.set_title(TITLES.get(quantity, showable(quantity)))
        shown = [name for name in MODELS if name in set(part["model"])]
        band = "control_low" in part and bool(part["control_low"].notna().any())
        drawing.key(figure, shown, MODELS, band="95 % of random directions" if band else None)
        return drawing.settle(figure)


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
    _require(table, "direction", "arm", "outcome", "condition", "value", "low", "high")
    directions = [drawing.broken(str(name), 30 if width >= 5 else 15) for name in table["direction"]]
    table = table.assign(row=[f"{name}\n{arm}" for name, arm in zip(directions, table["arm"], strict=True)])
    names = list(dict.fromkeys(table["row"]))
    outcomes = list(dict.fromkeys(table["outcome"]))
    conditions = [name for name in CONDITIONS if name in set(table["condition"])]
    with drawing.styled():
        height = 0.5 + 0.13 * sum(name.count("\n") + 2.1 for name in names)
        figure, grid = drawing.panels(width, 1, len(outcomes), height, len(outcomes))
        for ax, outcome in zip(grid, outcomes, strict=True):
            part = table[table["outcome"] == outcome]
            series = {name: _indexed(part[part["condition"] == name], "row", names) for name in conditions}
            measured = part.drop_duplicates("row").set_index("row").get("metric")
            drawing.dots(ax, series, CONDITIONS, names, notes=None if measured is None else measured.reindex(names))
            drawing.fit_axis(ax, part)
            ax.set_title({"bad": "the behaviour", "good": "the good answers"}.get(outcome, showable(outcome)))
        drawing.key(figure, conditions, CONDITIONS)
        return drawing.settle(figure)


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
    with drawing.styled():
        heights = [0.48 + (0.19 if width >= 5 else 0.25) * n for n in tallest]
        figure, grid = drawing.panels(width, lines, columns, heights, len(groups), sharey=False)
        for ax, (title, found) in zip(grid, groups.items(), strict=True):
            _forest(ax, found, wide=width >= 5)
            ax.set_title(showable(title))
        drawing.key(figure, [], MODELS, band="95 % of the controls", bound="smallest effect of interest")
        return drawing.settle(figure)


def selection(found: Any, *, width: float = 7.0) -> Figure:
    """Every candidate's scores by layer, the criteria, and random directions at the winner's site.

    Args:
        found: a ``Selection``.
        width: inches; below 5 the panels stand one above the other.
    """
    table, bounds = found.table, found.criteria
    limits = {"bypass": None, "induce": bounds.min_induce, "kl": bounds.max_kl}
    titles = {"bypass": "bypass: ablated", "induce": "induce: added", "kl": "KL under ablation, nats"}
    positions = list(dict.fromkeys(table["position"]))
    lines, columns = (1, 3) if width >= 5 else (3, 1)
    with drawing.styled():
        figure, grid = drawing.panels(width, lines, columns, 2.1, 3, sharey=False)
        for ax, (name, limit) in zip(grid, limits.items(), strict=True):
            ax.axvspan(bounds.first_deep_layer - 0.5, bounds.n_layers, color=drawing.RULE, alpha=0.3, linewidth=0)
            if limit is not None:
                ax.axhline(limit, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
            if name in found.controls and len(found.controls):
                low, high = np.quantile(found.controls[name], [0.025, 0.975])
                _band(ax, np.array([float(found.direction.site.layer)]), np.array([low]), np.array([high]))
            for index, position in enumerate(positions):
                rows = table[table["position"] == position].sort_values("layer")
                ax.plot(rows["layer"], rows[name], **_series(index))
            chosen = table[table["fate"] == "chosen"]
            ax.plot(chosen["layer"], chosen[name], "*", markersize=9, color=drawing.INK, zorder=3)
            ax.set_xlim(-0.5, bounds.n_layers - 0.5)
            ax.set_xlabel("layer")
            ax.set_title(titles[name])
            if name == "kl":
                ax.set_yscale("symlog", linthresh=bounds.max_kl)
                ax.yaxis.set_major_formatter(ScalarFormatter())
        handles: list[Any] = [Line2D([], [], label=drawing.named(p), **_series(i)) for i, p in enumerate(positions)]
        handles.append(Line2D([], [], marker="*", linestyle="", color=drawing.INK, label="chosen"))
        handles.append(Patch(facecolor=drawing.BAND, label="random directions (95 %)"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4 if width >= 5 else 2)
        return figure


def _series(index: int) -> dict[str, Any]:
    """A position's colour and marker."""
    looks = [*MODELS.values(), *CONDITIONS.values()]
    look = looks[index % len(looks)]
    style = {"color": look.colour, "marker": "osDv^<>"[index % 7], "markerfacecolor": "none"}
    return style | {"markersize": 3.5, "linewidth": 1.0}


def figures(report: Any, *, width: float = 7.0) -> dict[str, Figure]:
    """Every figure of a report by name: ``rates``, ``layers-NAME`` for each direction, ``verdicts``, ``use``; and
    ``backdoor``, ``consistency``, ``study-N`` where asked.
    """
    comparison = report.comparison
    drawn: dict[str, Callable[[], Figure]] = {}
    if len(report.rates):
        drawn["rates"] = lambda: rates(report.rates, width=width)
    for name in dict.fromkeys(comparison.by_layer["direction"]) if len(comparison.by_layer) else ():
        site = next((row.site for row in comparison.rows if row.direction == name), None)
        drawn[f"layers-{name}"] = lambda name=name, site=site: layers(
            comparison.by_layer, direction=name, site=site, width=width
        )
    if len(comparison.rows):
        asked = getattr(comparison, "questions", SHIPPED)
        drawn["verdicts"] = lambda: verdicts(comparison.rows, questions=asked, width=width)
    if len(comparison.use):
        drawn["use"] = lambda: use(comparison.use, width=width)
    return {name: draw() for name, draw in drawn.items()} | _asked_for(report, width)


def _asked_for(report: Any, width: float) -> dict[str, Figure]:
    """Figures of the sections that a report has only where they were asked for."""
    found: dict[str, Any] = {}
    if (opened := getattr(report, "backdoor", None)) is not None:
        found["backdoor"] = arms.tokens(opened.rates, width=width)
    if (runs := getattr(report, "consistency", None)) is not None:
        found["consistency"] = arms.spread(runs.rates, runs.spread, width=width)
    studies: Sequence[Any] = list(getattr(report, "studies", {}).values())
    for place, study in enumerate(studies, 1):
        if study.plot is not None:
            found[f"study-{place}"] = study.plot(study.table, width=width) if callable(study.plot) else study.plot
    return found


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (300 dpi), SVG or PDF, by the path's suffix; the same figure gives the same file.

    Raises:
        UsageError: another suffix.
        OutputError: the path cannot be written; nothing is left behind.
    """
    path = Path(path)
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if path.suffix not in undated:
        raise UsageError(f"{path.name}: figures are written as .png, .svg or .pdf; give one of these suffixes")
    background = "none" if path.suffix == ".svg" else "white"
    salt = showable(path.stem)
    with drawing.styled(), matplotlib.rc_context({"svg.hashsalt": salt}), replacing(path) as temporary:
        drawing.seen(figure)
        figure.savefig(temporary, dpi=300, metadata=undated[path.suffix], facecolor=background)
    return path


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UsageError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _domains(table: pd.DataFrame) -> dict[str, str]:
    """Domain -> tick label, the fine-tuned ones first and marked."""
    held_out = dict(zip(table["domain"], table["held_out"], strict=True)) if "held_out" in table else {}
    names = sorted(dict.fromkeys(table["domain"]), key=lambda name: bool(held_out.get(name, True)))
    return {name: drawing.broken(str(name) if held_out.get(name, True) else f"{name} (tuned on)", 18) for name in names}


def _indexed(part: pd.DataFrame, column: str, names: Sequence[str]) -> pd.DataFrame:
    return part.drop_duplicates(column).set_index(column).reindex(names)


def _layer_panel(ax: Axes, part: pd.DataFrame, layer: int | None) -> None:
    """Lines with interval bands for each model, the random directions' band behind."""
    if layer is not None:
        ax.axvline(layer, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=0.5)
    if "control_low" in part and part["control_low"].notna().any():
        known = part.dropna(subset=["control_low", "control_high"])
        band = (known[known["model"] == "tuned"] if "tuned" in set(known["model"]) else known).groupby("layer")
        low, high = band["control_low"].min(), band["control_high"].max()
        _band(ax, low.index.to_numpy(dtype=float), low.to_numpy(dtype=float), high.to_numpy(dtype=float))
    for index, (name, look) in enumerate(MODELS.items()):
        rows = part[part["model"] == name].sort_values("layer")
        if rows.empty:
            continue
        x, y, low, high = (rows[key].to_numpy(dtype=float) for key in ("layer", "value", "low", "high"))
        x = x + 0.05 * (index - 1)  # so that equal values do not hide each other
        ax.vlines(x, low, high, color=look.colour, linewidth=1.2)
        face = look.colour if look.filled else "none"
        ax.plot(x, y, color=look.colour, linewidth=1.2, marker=look.marker, markersize=3.5, markerfacecolor=face)
    every = np.unique(part["layer"].to_numpy(dtype=int))
    ax.set_xticks(every if len(every) <= 6 else every[:: math.ceil(len(every) / 6)])
    ax.margins(x=0.12)
    ax.set_xlabel("layer")
    ax.grid(axis="y")
    ax.axhline(0, color=drawing.RULE, linewidth=0.6, zorder=0)


def _band(ax: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    if len(x) == 1:
        x, low, high = x + np.array([-0.3, 0.3]), np.repeat(low, 2), np.repeat(high, 2)
    ax.fill_between(x, low, high, color=drawing.BAND, linewidth=0, zorder=0.2)


def _forest(ax: Axes, rows: Sequence[Any], *, wide: bool) -> None:
    """One line a row: control band behind, smallest effect of interest on both sides, verdict at the right."""
    ax.axvline(0, color=drawing.RULE, linewidth=0.8, zorder=0.5)
    for y, row in enumerate(rows):
        _forest_row(ax, float(y), row)
    ax.set_yticks(range(len(rows)), [drawing.broken(str(row.direction), 30 if wide else 13) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", labelcolor=drawing.INK)
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=5 if wide else 3)


def _forest_row(ax: Axes, y: float, row: Any) -> None:
    shown, estimate, bound = row.verdict != "not shown", row.estimate, row.smallest
    low, high = row.control.get("low"), row.control.get("high")
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        ax.barh(y, high - low, left=low, height=0.72, color=drawing.BAND, linewidth=0, zorder=0.2)
    dashes = {"color": drawing.MUTED, "linewidth": 0.8, "linestyle": (0, (3, 2)), "zorder": 0.6}
    ax.vlines([-bound, bound], y - 0.5, y + 0.5, **dashes)
    colour, face = (drawing.INK, drawing.INK) if shown else (drawing.MUTED, "none")
    ax.hlines(y, estimate.low, estimate.high, color=colour, linewidth=1.4 if shown else 1.0)
    ax.plot(estimate.value, y, marker="o", markersize=4.5, color=colour, markerfacecolor=face)
    words = f"{row.verdict}  {number(estimate.value)}" if shown else row.verdict
    ax.annotate(words, (1.02, y), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=7.5)
