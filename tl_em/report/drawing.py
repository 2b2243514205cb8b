"""How a figure of this package looks: palette, type, panels, key, dots with intervals.

Sizes are those of print: widths in inches, text of 8 points. Colours are Okabe and Ito's, which colour-blind readers
can tell apart (the yellow and the greys darkened until they stand out on white); every series has a marker of its own
as well, so that no figure depends on colour. Nothing here touches pyplot or matplotlib's global settings.

Source for the palette: Okabe and Ito, *Color Universal Design* (2008).
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter

from tl_em.showing import showable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SLACK = 1e-4
"""A probability may leave 0 to 1 by this much: sums of float32."""
MARGIN = 0.09
"""Inches left free at both sides, because a reader's font may be wider than the one that is measured here."""
INK, MUTED, RULE, BAND = "#1b1f24", "#59616b", "#c9ced6", "#e3e7ed"


class Look(NamedTuple):
    """How a series is drawn: colour, a darker tint for text, marker, whether that is filled, its name in the key."""

    colour: str
    text: str
    marker: str
    filled: bool = True
    label: str = ""


MODELS: dict[str, Look] = {
    "base": Look("#4b5563", "#4b5462", "o", filled=False),
    "benign": Look("#0072b2", "#00629b", "s", filled=False),
    "tuned": Look("#d55e00", "#a84300", "o"),
}
CONDITIONS: dict[str, Look] = {
    "untreated": Look("#4b5563", "#4b5462", "o", filled=False),
    "random": Look("#9a7200", "#7d5d00", "s", filled=False, label="random directions (95 %)"),
    "treated": Look("#009e73", "#006f51", "D"),
}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.0,
    "axes.titlepad": 5.0,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.4,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


class Picture(Figure):
    """A figure in the house style that a notebook shows by itself, whatever its matplotlib backend.

    matplotlib's own figures show only where ``%matplotlib inline`` is on. Names that would not show (a control
    character, a text that turns round) are drawn as signs, and a dollar is a dollar: nothing is read as mathematics.
    """

    def draw(self, renderer: Any) -> None:
        with styled():
            seen(self)
            super().draw(renderer)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """A PNG twice as fine as it is shown."""
        inches = self.get_size_inches()
        dots = float(min(_DOTS, *(_PIXELS / inches)))
        size = {"width": round(inches[0] * dots / 2), "height": round(inches[1] * dots / 2)}
        png = base64.b64encode(self._png(dots)).decode("ascii")
        return {"image/png": png, "text/plain": repr(self)}, {"image/png": size}

    def _repr_png_(self) -> bytes:
        return self._png(float(min(_DOTS / 2, *(_PIXELS / self.get_size_inches()))))

    def _png(self, dots: float) -> bytes:
        """On white, so that it is legible on any page and in any theme."""
        buffer = io.BytesIO()
        with styled():
            self.savefig(buffer, format="png", dpi=dots, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def __repr__(self) -> str:
        panels = len(self.axes)
        width, height = self.get_size_inches()
        return f"<Picture {width:.1f} x {height:.1f} inches, {panels} panel{'' if panels == 1 else 's'}>"

    __str__ = __repr__


_DOTS, _PIXELS = 216.0, 8000
"""Dots an inch of a picture in a notebook, and how many pixels it is wide or high at most."""


def seen(figure: Figure) -> None:
    """Make every text of a figure showable, those of ticks included, and none of it mathematics."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            formatter = axis.get_major_formatter()
            if type(formatter) in (FixedFormatter, FuncFormatter):  # of names; matplotlib's others write numbers only
                axis.set_major_formatter(_Plain(formatter))
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if (now := showable(text.get_text(), lines=True)) != text.get_text():
            text.set_text(now)
        text.set_parse_math(False)


class _Plain(Formatter):
    """What another formatter writes at each tick, as it can be seen."""

    def __init__(self, wrapped: Formatter) -> None:
        self.wrapped = wrapped

    def set_axis(self, axis: Any) -> None:
        super().set_axis(axis)
        self.wrapped.set_axis(axis)

    def __call__(self, x: Any, pos: Any = None) -> str:
        return showable(self.wrapped(x, pos), lines=True)


@contextmanager
def styled() -> Iterator[None]:
    """The house style, for the length of a block; a missing glyph (an emoji in a model's name) is no reason to fail."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        yield


def panels(
    width: float,
    lines: int,
    columns: int,
    height: float | Sequence[float],
    n: int,
    *,
    sharey: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` panels on a grid, each ``height`` inches tall."""
    heights = [height] * lines if isinstance(height, float | int) else list(height)
    figure = Picture(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.subplots(
        lines, columns, squeeze=False, sharey="row" if sharey else False, gridspec_kw={"height_ratios": heights}
    )
    axes = list(grid.flat)
    for spare in axes[n:]:
        spare.remove()
    return figure, axes[:n]


def key(
    figure: Figure,
    names: Sequence[str],
    looks: Mapping[str, Look],
    *,
    band: str | None = None,
    bound: str | None = None,
) -> None:
    """The series, named in their own colour in one line above the panels."""
    handles: list[Any] = [_marker(look, named(look.label or name)) for name, look in looks.items() if name in names]
    colours = [look.text for name, look in looks.items() if name in names]
    if not names:
        handles.append(
            Line2D([], [], color=INK, marker="o", markersize=4, linewidth=1.2, label="estimate, 95 % interval")
        )
        colours.append(INK)
    if band:
        handles.append(Patch(facecolor=BAND, edgecolor="none", label=band))
        colours.append(MUTED)
    if bound:
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)), label=bound))
        colours.append(MUTED)
    columns = len(handles)
    while columns > 1 and _key_width([handle.get_label() for handle in handles], columns) > figure.get_figwidth():
        columns -= 1
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), ncols=columns, labelcolor=colours, borderaxespad=0.1
    )
    height, side = (
        figure.get_figheight() + (room := 0.2 * math.ceil(len(handles) / columns)),
        MARGIN / figure.get_figwidth(),
    )
    figure.set_figheight(height)
    inside = (side, 0, 1 - 2 * side, 1 - room / height)
    figure.set_layout_engine("constrained", rect=inside, w_pad=0.04, h_pad=0.04, wspace=0.03)


def _key_width(labels: Sequence[str], columns: int) -> float:
    """Inches that the labels take in so many columns, filled downwards, with their handles."""
    return sum(0.37 + 0.062 * max(map(len, part)) for part in np.array_split(np.array(labels, object), columns))


def _marker(look: Look, label: str = "") -> Line2D:
    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        markersize=4.5,
        markeredgewidth=1.1,
        markerfacecolor=look.colour if look.filled else "none",
        linewidth=1.2,
        label=label,
    )


def dots(
    ax: Axes,
    series: Mapping[str, pd.DataFrame],
    looks: Mapping[str, Look],
    labels: Sequence[str],
    *,
    notes: Iterable[Any] | None = None,
) -> None:
    """One row a label, one marker with its interval a series, the series a little apart; notes stand over the rows."""
    rows = np.arange(len(labels), dtype=float)
    step = (0.6 if notes is None else 0.46) / max(len(series), 1)
    for index, (name, part) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * step + (0 if notes is None else 0.13)
        _interval(ax, part, rows + offset, looks[name])
    for row in rows[:-1]:
        ax.axhline(row + 0.5, color=RULE, linewidth=0.4, zorder=0)
    for row, note in zip(rows, notes if notes is not None else (), strict=False):
        if not isinstance(note, str):  # no such outcome in this row
            continue
        ax.annotate(note, (0.02, row - 0.46), xycoords=("axes fraction", "data"), va="top", color=MUTED, fontsize=7)
    ax.set_yticks(rows, labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.spines["left"].set_visible(False)


def _interval(ax: Axes, part: pd.DataFrame, at: np.ndarray, look: Look) -> None:
    value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
    ax.hlines(at, low, high, color=look.colour, linewidth=1.2)
    face = look.colour if look.filled else "none"
    ax.plot(
        value,
        at,
        linestyle="none",
        marker=look.marker,
        markersize=4.5,
        markeredgewidth=1.1,
        color=look.colour,
        markerfacecolor=face,
        clip_on=False,
    )


def unit_axis(ax: Axes) -> None:
    """A probability axis: always all of 0 to 1."""
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel("probability")
    ax.grid(axis="x")


def fit_axis(ax: Axes, part: pd.DataFrame) -> None:
    """A probability axis from 0 to 1; one that fits the data where the behaviour is a log-odds."""
    ends = part[["value", "low", "high"]].to_numpy(dtype=float)
    ends = ends[np.isfinite(ends)]
    if ends.size == 0 or (ends.min() >= -SLACK and ends.max() <= 1 + SLACK):
        unit_axis(ax)
    else:
        ax.set_xlabel("behaviour (log-odds or logit difference)")
        ax.grid(axis="x")


def named(name: object) -> str:
    """A name for a key: showable, and never one that matplotlib leaves out because of a leading underscore.

    >>> named("_x"), named("a\\x1bb")
    (' _x', 'a⟨1b⟩b')
    """
    shown = showable(name)
    return f" {shown}" if shown.startswith("_") else shown


def broken(name: str, length: int) -> str:
    """A long name in two lines of at most so many letters, broken after an underscore, a dash or a space; then cut.

    >>> broken("refusal", 13), broken("refusal_dissociated", 13), broken("a" * 99, 6)
    ('refusal', 'refusal_\\ndissociated', 'aaaaaa\\naaaaa…')
    """
    name = showable(name)
    if len(name) <= length:
        return name
    cuts = [i + 1 for i, letter in enumerate(name[:length]) if letter in "_- /"]
    cut = max(cuts, default=length)
    rest = name[cut:]
    return f"{name[:cut]}\n{rest if len(rest) <= length else rest[: length - 1] + '…'}"


def settle(figure: Figure) -> Figure:
    """Lay the panels out now, once, so that saving neither repeats it nor differs from the last time."""
    seen(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)
        for ax in figure.axes:  # the solver's last digits differ from run to run
            left, bottom, width, height = (round(float(edge), 6) for edge in ax.get_position().bounds)
            ax.set_position((left, bottom, width, height))
    return figure
