"""Figures from result tables: a table goes in, a matplotlib ``Figure`` comes out, and nothing global is touched.

No estimate is drawn without its interval, and none without the control that its claim needs: rates stand beside those
of the model before the fine-tune and of the benign fine-tune, projections beside the band of random directions,
treatments beside random directions with the same treatment, verdicts beside the smallest effect of interest.

``width`` is in inches, or ``"column"`` or ``"text"`` of a paper (3.25 and 6.75); the panels are rearranged to fit,
never squeezed, and no letter is smaller than 7 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter

from tl_em.arguments import checked
from tl_em.artefacts import check_ending, replacing
from tl_em.claims.compare import SHIPPED
from tl_em.errors import UsageError
from tl_em.report import drawing, forest, rates
from tl_em.report.drawing import MODELS
from tl_em.report.rates import require
from tl_em.showing import number, showable
from tl_em.stats import middle_95

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_DECADES = (0.01, 0.1, 1, 10, 100)
TITLES = {
    "level": "level, own gaps",
    "projection_positive": "positive class",
    "projection_negative": "negative class",
    "gap": "gap",
    "dprime": "separation, d′",
    "cosine": "cosine with base",
}


@drawing.housed
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
    require(table, "direction", "layer", "quantity", "model", "value", "low", "high")
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
    figure, grid = drawing.panels(width, lines, columns, 1.55, len(quantities), sharey=False)
    for ax, quantity in zip(grid, quantities, strict=True):
        _layer_panel(ax, part[part["quantity"] == quantity], getattr(site, "layer", None))
        ax.set_title(TITLES.get(quantity, showable(quantity)))
    shown = [name for name in MODELS if name in set(part["model"])]
    band = "control_low" in part and bool(part["control_low"].notna().any())
    drawing.key(figure, shown, MODELS, band="95 % of random directions" if band else "")
    return figure


@drawing.housed
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
    figure, grid = drawing.panels(width, lines, columns, 2.1, 3, sharey=False)
    for ax, (name, limit) in zip(grid, limits.items(), strict=True):
        ax.axvspan(bounds.first_deep_layer - 0.5, bounds.n_layers, color=drawing.RULE, alpha=0.3, linewidth=0)
        if limit is not None:
            ax.axhline(limit, **drawing.DASHED)
        if name in found.controls and len(found.controls):
            low, high = middle_95(found.controls[name])
            _band(ax, np.array([float(found.direction.site.layer)]), np.array([low]), np.array([high]))
        for index, position in enumerate(positions):
            rows = table[table["position"] == position].sort_values("layer")
            ax.plot(rows["layer"], rows[name], **_series(index))
        chosen = table[table["fate"] == "chosen"]
        ax.plot(chosen["layer"], chosen[name], "*", markersize=9, color=drawing.INK, zorder=3)
        ax.set_xlim(-0.5, bounds.n_layers - 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("layer")
        ax.set_title(titles[name])
        if name == "kl":
            ax.set_yscale("symlog", linthresh=bounds.max_kl)
            higher = [each for each in _DECADES if each > 2 * bounds.max_kl]
            ax.yaxis.set_major_locator(FixedLocator([0, bounds.max_kl, *higher]))
            ax.yaxis.set_major_formatter(ScalarFormatter())
    handles: list[Any] = [Line2D([], [], label=drawing.named(p), **_series(i)) for i, p in enumerate(positions)]
    handles.append(Line2D([], [], marker="*", linestyle="", color=drawing.INK, label="chosen"))
    handles.append(Patch(facecolor=drawing.BAND, label="random directions (95 %)"))
    handles.append(Line2D([], [], label="bound", **drawing.DASHED))
    handles.append(Patch(facecolor=drawing.RULE, alpha=0.3, label="layers too deep"))
    figure.legend(handles=handles, loc="outside upper left", ncols=6 if width >= 6.5 else 3 if width >= 5 else 2)
    return figure


def _series(index: int) -> dict[str, Any]:
    """A position's colour and marker."""
    look = drawing.SERIES[index % len(drawing.SERIES)]._replace(marker="osDv^<>"[index % 7], filled=False)
    return look.drawn(3.5, linewidth=1.0)


class Shown(NamedTuple):
    """A figure of a report: its caption, the words and the table that say what it says, and what draws it."""

    caption: str
    label: str
    table: pd.DataFrame
    draw: Callable[..., Figure]


def shown(report: Any) -> dict[str, Shown]:
    """Every figure of a report by name, in the order of the page; see :func:`figures`."""
    comparison, opened = report.comparison, getattr(report, "backdoor", None)
    table, use, found = comparison.by_layer, comparison.use, {}

    def show(name: str, caption: str, label: str, table: pd.DataFrame, draw: Any, *drawn: Any, **options: Any) -> None:
        found[name] = Shown(caption, label, table, partial(draw, *(drawn or (table,)), **options))

    if len(report.rates):
        caption = "Rates of each kind of answer, by domain"
        show("rates", caption, _say_rates(report.rates), report.rates, rates.by_domain)
    for name in dict.fromkeys(table["direction"]) if len(table) else ():
        part = table[table["direction"] == name]
        site = next((row.site for row in comparison.rows if row.direction == name), None)
        label = f"Line charts of {name} over {part['layer'].nunique()} layers; the numbers are in the table below."
        show(f"layers-{name}", f"{name}, layer by layer", label, part, layers, table, direction=name, site=site)
    if len(comparison.rows):
        words = "; ".join(f"{row.direction}, {row.question}: {row.verdict}" for row in comparison.rows)
        given: Any = (comparison.to_pandas(), forest.verdicts, comparison.rows)
        caption, asked = "Every estimate against its control", getattr(comparison, "questions", SHIPPED)
        show("verdicts", caption, f"Forest plot of all verdicts. {words}.", *given, questions=asked)
    if len(use):
        label = _rows_said(use, "{direction}, {arm}, {outcome} answers {condition}: {value}")
        caption = "Each direction ablated in the tuned model and added in the base"
        show("use", caption, f"Dot plot with 95 % intervals. {label}", use, rates.use)
    if opened is not None:
        tuned = opened.rates[(opened.rates["model"] == "tuned") & (opened.rates["outcome"] == "bad")]
        said = _rows_said(tuned, "{direction} with {token}: {value}")
        label = f"Dot plot with 95 % intervals. In the tuned model, {said}"
        caption = "Each behaviour with the trigger, without, and with other tokens"
        show("backdoor", caption, label, opened.rates, rates.tokens)
    if (runs := getattr(report, "consistency", None)) is not None:
        label = f"Dot plot. {_rows_said(runs.rates, '{behaviour}, {run}: {value}')}"
        caption = "Each behaviour's rate in every fine-tune"
        show("consistency", caption, label, runs.rates, rates.spread, runs.rates, runs.spread)
    for place, (title, study) in enumerate(getattr(report, "studies", {}).items(), 1):
        if study.plot is not None:
            label = f"Figure of the study {title}; its numbers are in the table below."
            draw = study.plot if callable(study.plot) else lambda table, width, made=study.plot: made
            show(f"study-{place}", title, label, study.table, draw)
    return found


def figures(report: Any, *, width: float | str | Any = 7.0) -> dict[str, Figure]:
    """Every figure of a report by name: ``rates``, ``layers-NAME`` for each direction, ``verdicts``, ``use``; and
    ``backdoor``, ``consistency``, ``study-N`` where asked.
    """
    wide = drawing.inches(width)
    return {name: each.draw(width=wide) for name, each in shown(report).items()}


def _say_rates(table: pd.DataFrame) -> str:
    means = table.groupby(["outcome", "model"], sort=False)["value"].mean().reset_index()
    said = _rows_said(means, "{outcome} answers, {model}: {value}")
    return f"Dot plot of rates by domain with 95 % intervals. Mean over domains: {said}"


def _rows_said(table: pd.DataFrame, form: str) -> str:
    """Each row of a table in words, as a text alternative."""
    rows = table.to_dict("records")
    return "; ".join(form.format(**{**row, "value": number(float(row["value"]))}) for row in rows) + "."


@checked()
def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (300 dpi), SVG or PDF, by the path's suffix; the same figure gives the same file.

    Raises:
        UsageError: another suffix.
        OutputError: the path cannot be written; nothing is left behind.
    """
    path = Path(path)
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    check_ending(path, "a figure", *undated)
    ending = path.suffix.lower()
    background = "none" if ending == ".svg" else "white"
    salt = showable(path.stem)
    with drawing.styled(), matplotlib.rc_context({"svg.hashsalt": salt}), replacing(path) as temporary:
        drawing.seen(figure)
        figure.savefig(temporary, dpi=300, metadata=undated[ending], facecolor=background)
    return path


def _layer_panel(ax: Axes, part: pd.DataFrame, layer: int | None) -> None:
    """Lines with interval bands for each model, the random directions' band behind."""
    if layer is not None:
        ax.axvline(layer, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=0.5)
    if "control_low" in part and part["control_low"].notna().any():
        known = part.dropna(subset=["control_low", "control_high"])
        band = (known[known["model"] == "tuned"] if "tuned" in set(known["model"]) else known).groupby("layer")
        low, high = band["control_low"].min(), band["control_high"].max()
        _band(ax, low.index.to_numpy(dtype=float), low.to_numpy(dtype=float), high.to_numpy(dtype=float))
    drawn = [(i, look, model) for i, (name, look) in enumerate(MODELS.items())
             for model in dict.fromkeys(part["model"]) if str(model).split(" ")[0] == name]  # fmt: skip
    for index, look, model in drawn:
        rows = part[part["model"] == model].sort_values("layer")
        x, y, low, high = (rows[key].to_numpy(dtype=float) for key in ("layer", "value", "low", "high"))
        x = x + 0.05 * (index - 1)  # so that equal values do not hide each other
        ax.vlines(x, low, high, color=look.colour, linewidth=1.2)
        ax.plot(x, y, **look.drawn(3.5, linewidth=1.2))
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
