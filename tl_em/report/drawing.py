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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter

from tl_em.arguments import checked, finite
from tl_em.errors import UsageError
from tl_em.showing import showable
from tl_em.threads import own_warnings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SLACK = 1e-4
"""A probability may leave 0 to 1 by this much: sums of float32."""
MARGIN = 0.09
"""Inches left free at both sides, because a reader's font may be wider than the one that is measured here."""
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)
INK, MUTED, RULE = (STYLE[name] for name in ("text.color", "axes.labelcolor", "grid.color"))
BAND = "#e3e7ed"
DASHED: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (3, 2))}
"""A bound, or what would be without a treatment."""


class Look(NamedTuple):
    """How a series is drawn: colour, a darker tint for text, marker, whether that is filled, its name in the key."""

    colour: str
    text: str
    marker: str
    filled: bool = True
    label: str = ""

    def drawn(self, size: float, *, hollow: str = "none", **more: Any) -> dict[str, Any]:
        """What ``plot`` and ``Line2D`` are told: this colour and marker, so large, and more."""
        face = self.colour if self.filled else hollow
        return {"color": self.colour, "marker": self.marker, "markersize": size, "markerfacecolor": face, **more}


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


MORE: dict[str, Look] = {
    "brown": Look("#771100", "#701000", "v", filled=False),
    "indigo": Look("#3322aa", "#3020a0", "P"),
    "lavender": Look("#6677ff", "#4a55d0", "^", filled=False),
}
SERIES: tuple[Look, ...] = (
    MODELS["tuned"], MODELS["benign"], CONDITIONS["treated"], *MORE.values(), MODELS["base"]._replace(marker="X"),
    Look(INK, INK, "d"),
)  # fmt: skip
"""Where names are those of whoever calls: each of another brightness, so that they differ for every kind of eye."""
WIDTHS = {"column": 3.25, "text": 6.75, "page": 6.75}
"""Inches of a paper's column, and of its text."""


def inches(width: float | str | Any) -> float:
    """A width in inches.

    Args:
        width: inches, or ``"column"``, ``"text"`` or ``"page"`` of a paper.

    Raises:
        UsageError: anything else.

    Example:
        >>> inches("column"), inches(7)
        (3.25, 7.0)
    """
    if isinstance(width, str):
        if width not in WIDTHS:
            raise UsageError(
                f"width={showable(width)!r} is no width of a paper, so it is unknown how large the figure is; give "
                f"width= one of {', '.join(map(repr, WIDTHS))}, or inches"
            )
        return WIDTHS[width]
    return finite("width", width, low=1, high=100)


class Picture(Figure):
    """A figure in the house style that a notebook shows by itself, whatever its matplotlib backend.

    matplotlib's own figures show only where ``%matplotlib inline`` is on. Names that would not show (a control
    character, a text that turns round) are drawn as signs, and a dollar is a dollar: nothing is read as mathematics.
    """

    def draw(self, renderer: Any) -> None:
        with styled():
            seen(self)
            super().draw(renderer)

    @checked()
    def save_figure(self, path: str | Path) -> Path:
        """Write it for a paper: SVG or PDF, or PNG at 300 dots an inch, by the path's suffix.

        Raises:
            UsageError: another suffix. OutputError: the path cannot be written.
        """
        from tl_em.report.plots import save

        return save(self, path)

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
    with own_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
        yield


def housed(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """A function that draws a figure ``width`` wide, in the house style, and laid out once.

    ``width`` is what ``inches`` takes.
    """

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        kwargs |= {"width": inches(kwargs["width"])} if "width" in kwargs else {}
        with styled():
            return settle(draw(*args, **kwargs))

    return drawn


def panels(
    width: float, lines: int, columns: int, height: float | Sequence[float], n: int, *, sharey: bool = True
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
    shown = {look.label or name: look for name, look in looks.items() if name in names}
    style: dict[str, Any] = {"markeredgewidth": 1.1, "linewidth": 1.2}
    handles: list[Any] = [Line2D([], [], label=named(n), **look.drawn(4.5, **style)) for n, look in shown.items()]
    colours = [look.text for look in shown.values()]
    if not names:
        style = {"color": INK, "marker": "o", "markersize": 4, "linewidth": 1.2}
        handles.append(Line2D([], [], label="estimate, 95 % interval", **style))
        colours.append(INK)
    if band:
        handles.append(Patch(facecolor=BAND, edgecolor="none", label=band))
    if bound:
        handles.append(Line2D([], [], label=bound, **DASHED))
    colours += [MUTED] * (len(handles) - len(colours))
    columns = len(handles)
    while columns > 1 and _key_width([handle.get_label() for handle in handles], columns) > figure.get_figwidth():
        columns -= 1
    above(figure, handles, columns, labelcolor=colours, wspace=0.03)


def above(
    figure: Figure, handles: Sequence[Any], columns: int, *, labelcolor: Any = None, wspace: float | None = None
) -> None:
    """A legend above the panels, for which the figure grows."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.1}
    figure.legend(handles=handles, ncols=columns, labelcolor=labelcolor, **place)
    room, side = 0.2 * math.ceil(len(handles) / columns), MARGIN / figure.get_figwidth()
    figure.set_figheight(height := figure.get_figheight() + room)
    inside = (side, 0, 1 - 2 * side, 1 - room / height)
    figure.set_layout_engine("constrained", rect=inside, w_pad=0.04, h_pad=0.04, wspace=wspace)


def _key_width(labels: Sequence[str], columns: int) -> float:
    """Inches that the labels take in so many columns, filled downwards, with their handles."""
    return sum(0.37 + 0.062 * max(map(len, part)) for part in np.array_split(np.array(labels, object), columns))


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
        at = rows + (index - (len(series) - 1) / 2) * step + (0 if notes is None else 0.13)
        value, low, high = (part[column].to_numpy(dtype=float) for column in ("value", "low", "high"))
        ax.hlines(at, low, high, color=looks[name].colour, linewidth=1.2)
        ax.plot(value, at, **looks[name].drawn(4.5, linestyle="none", markeredgewidth=1.1, clip_on=False))
    for row in rows[:-1]:
        ax.axhline(row + 0.5, color=RULE, linewidth=0.4, zorder=0)
    for row, note in zip(rows, notes if notes is not None else (), strict=False):
        if not isinstance(note, str):  # no such outcome in this row
            continue
        ax.annotate(note, (0.02, row - 0.46), xycoords=("axes fraction", "data"), va="top", color=MUTED, fontsize=7)
    named_rows(ax, labels)
    ax.spines["left"].set_visible(False)


def named_rows(ax: Axes, labels: Sequence[str]) -> None:
    """One row a label, the first at the top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", labelcolor=INK)


def fit_axis(ax: Axes, part: pd.DataFrame) -> None:
    """A probability axis from 0 to 1; one that fits the data where the behaviour is a log-odds."""
    ends = part[["value", "low", "high"]].to_numpy(dtype=float)
    ends = ends[np.isfinite(ends)]
    ax.grid(axis="x")
    if ends.size and (ends.min() < -SLACK or ends.max() > 1 + SLACK):
        ax.set_xlabel("behaviour (log-odds or logit difference)")
        return
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel("probability")


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
