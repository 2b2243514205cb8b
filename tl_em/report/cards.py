"""What a result shows of itself in a notebook: a title, its figures, a table of its rows, a picture.

Plain HTML without scripts, and without colours of its own but a figure's hues (``report.html``), so that it reads in
every theme and survives where a notebook is not trusted. A table is cut after ``ROWS`` rows, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from tl_em.showing import interval, number, showable

if TYPE_CHECKING:
    import pandas as pd

ROWS, LETTERS = 20, 160
"""Rows that a table shows, and letters of a cell."""
_LEFT, _RIGHT = 'style="text-align:left;padding:3px 8px"', 'style="text-align:right;padding:3px 8px"'


def card(title: str, *parts: str) -> str:
    """A title and what stands under it, each made by a function below; empty parts are left out."""
    return f"<div><p><strong>{_seen(title)}</strong></p>{''.join(parts)}</div>"


def text(words: object) -> str:
    """A paragraph."""
    return f"<p>{_seen(words)}</p>" if words else ""


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values, a line each; what is None is left out."""
    rows = [f"<tr><th {_LEFT}>{_seen(name)}</th><td {_LEFT}>{_seen(value)}</td></tr>"
            for name, value in pairs if value is not None]  # fmt: skip
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def table(frame: pd.DataFrame, *, rest: str = ".to_pandas() has all of them") -> str:
    """A table, cut after ``ROWS`` rows.

    Args:
        frame: what to show; columns that are all empty are left out.
        rest: where the other rows are.
    """
    columns = [name for name in frame.columns if not frame[name].isna().all()]
    numeric = [frame[name].dtype.kind in "fiu" for name in columns]
    return rows(
        [str(name).replace("_", " ") for name in columns], frame[columns].itertuples(index=False),
        n=len(frame), numeric=numeric, rest=rest,
    )  # fmt: skip


def rows(
    columns: Sequence[str], lines: Iterable[Iterable[object]], *, n: int, numeric: Sequence[bool] = (), rest: str = ""
) -> str:
    """The first ``ROWS`` of ``n`` lines; columns marked as numeric are set flush right."""
    sides = [_RIGHT if right else _LEFT for right in numeric] or [_LEFT] * len(columns)
    head = "".join(f"<th {side}>{_seen(name)}</th>" for name, side in zip(columns, sides, strict=True))
    body = []
    for _, line in zip(range(ROWS), lines, strict=False):
        body.append("".join(f"<td {side}>{_seen(value)}</td>" for value, side in zip(line, sides, strict=True)))
    said = f"<p>{ROWS} of {n:,} rows{f'; {_seen(rest)}' if rest else ''}.</p>" if n > ROWS else ""
    lines_ = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines_}</tbody></table>{said}"


def picture(figure: Any, title: str = "") -> str:
    """A figure of this package within the page, in the colours of its theme; an image where no drawing is let in."""
    from tl_em.report import html, svg

    data, about = figure._repr_mimebundle_()
    png, width = data["image/png"], about["image/png"]["width"]
    name = f"tl-em-{hashlib.sha256(png.encode()).hexdigest()[:10]}"  # ids are shared with all outputs of a notebook
    image = f'<img alt="" width="{width}" style="max-width:100%" src="data:image/png;base64,{png}">'
    return html.picture(svg.inline(figure, name), image, title, width=width)


def _seen(value: object) -> str:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, float):
        value = number(value, 3) if abs(value) >= 0.0005 or not value else f"{value:.2g}"
    shown = showable(value)
    return escape(shown if len(shown) <= LETTERS else f"{shown[:LETTERS]}…")


# ---- one function a result -------------------------------------------------------------------------------------------
def estimate(found: Any) -> str:
    """A number with its interval, and what it rests on."""
    effective = "" if found.n_effective == found.n else f", worth {found.n_effective:.0f} independent ones"
    seed = "" if found.seed is None else f", seed {found.seed}"
    said = f"{interval(found.low, found.high)} 95 %, {found.n} prompts{effective}; {found.method}{seed}"
    return f"<p><strong>{_seen(number(found.value))}</strong> {_seen(said)}</p>"


def direction(found: Any) -> str:
    """A vector: where it was read, how long and how reliable it is, on which model."""
    made = found.provenance
    model = None if made is None else f"{made.model} ({made.surface}, {made.weights} weights)"
    return card(
        f"Direction {found.name or '(unnamed)'}",
        facts([
            ("site", found.site), ("position", found.position), ("d_model", len(found.vector)),
            ("length", float(found.norm)), ("method", found.method), ("split-half cosine", found.reliability),
            ("model", model or "unknown: no provenance, so only its width is checked"),
        ]),
    )  # fmt: skip


def contrast(found: Any) -> str:
    """Two classes of prompts: how many, from where, and the first of each."""
    from itertools import zip_longest

    pairs = zip_longest(map(_prompt, found.positive), map(_prompt, found.negative), fillvalue="")
    n = max(len(found.positive), len(found.negative))
    return card(
        f"ContrastSet {found.label or '(unnamed)'}: {len(found.positive)} positive, {len(found.negative)} negative",
        text(found.source),
        rows(["positive", "negative"], pairs, n=n, rest=".positive and .negative have all of them"),
    )


def lint(found: Any) -> str:
    """What was found about a contrast set, what mends it, and the properties that were looked at."""
    return card(
        f"Lint of {found.label or '(unnamed)'}: {len(found.faults)} found",
        *(f"<p><strong>{_seen(each.what)}</strong>: {escape(showable(each.found))}<br>Mend: "
          f"<code style='white-space:pre-wrap'>{escape(showable(each.mend))}</code></p>" for each in found.faults),
        text(found.together.said),
        table(found.confounds),
        table(found.templates, rest=".templates has all of them") if len(found.templates) else "",
    )


def _prompt(prompt: Any) -> str:
    """A prompt in one cell: its text, or its messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return " | ".join(f"{each.get('role', '')}: {each.get('content', '')}" for each in prompt)


def comparison(found: Any) -> str:
    """The summary and a row a question and direction."""
    lines = [(r.question, r.direction, r.verdict, r.estimate, interval(r.control.get("low"), r.control.get("high")),
              float("nan") if r.p is None else float(r.p), r.reason) for r in found.rows]  # fmt: skip
    columns = ["question", "direction", "verdict", "estimate [95 %]", "control, 95 %", "p", "why"]
    shown = rows(columns, lines, n=len(lines), rest=".to_pandas() has all of them")
    return card(found.summary or "Comparison", shown, *map(text, getattr(found, "unmeasured", {}).values()))


def plotted(found: Any, *, lines: int = 1) -> str:
    """A result whose picture says most: the first lines of its repr, and the picture."""
    from tl_em.errors import UsageError

    said = repr(found).splitlines()
    try:
        drawn = picture(found.plot(), said[0])
    except UsageError as error:
        drawn = text(error)
    return card(said[0], *(text(line.strip()) for line in said[1:lines]), drawn)


def listed(found: Any, title: str, frame: pd.DataFrame | None = None) -> str:
    """A result whose table says most."""
    return card(title, table(found.to_pandas() if frame is None else frame))
