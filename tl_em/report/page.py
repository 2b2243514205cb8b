"""The page: one HTML file that answers first and then shows why, with nothing loaded from anywhere else.

There is no script in it, a Content-Security-Policy that would refuse one, and every name from outside (models, domains,
directions, settings) passes through jinja2's autoescape. Figures are inlined SVG (:mod:`tl_em.report.svg`); each is
drawn twice, for a wide and for a narrow screen, and the stylesheet shows the one that fits. A table with the same
numbers stands under each.

The page claims no more than its verdicts: a word where the rule fixed before the data gives one, `not shown` elsewhere,
and the control beside every estimate.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

import tl_em
from tl_em.claims.claim import Question
from tl_em.claims.compare import SHIPPED
from tl_em.report import html, plain, plots
from tl_em.report.svg import inline
from tl_em.showing import interval, number

if TYPE_CHECKING:
    import pandas as pd

WIDE, NARROW = 9.4, 3.2
"""Inches; the page shows an inch as 108 pixels, so that 8 points of text become 12 pixels."""

_WHERE = {"base", "tuned", "benign", "name", "trained", "surface"}
_ELSEWHERE = {"command", "directions", "behaviours"}


class Glyph(NamedTuple):
    """One verdict as a picture of a line: positions in per cent of the widest of its question."""

    low: float
    high: float
    value: float
    band_low: float | None
    band_high: float | None
    bound: float


class JudgedCell(NamedTuple):
    """One row of verdicts, and how its numbers are written."""

    row: Any
    estimate: str
    control: str
    p: str
    site: str
    glyph: Glyph | None
    status: str


class Drawing(NamedTuple):
    """A figure in both widths, with the words that stand for it and the table that holds its numbers."""

    name: str
    caption: str
    label: str
    wide: Markup
    narrow: Markup
    table: Table


class Table(NamedTuple):
    """Columns and rows of text; ``numeric`` marks the columns that are set flush right."""

    columns: list[str]
    rows: list[list[str]]
    numeric: list[bool]


def render(report: Any) -> str:
    """The page of a report, as HTML.

    Args:
        report: with ``.summary``, ``.comparison`` (rows, by_layer, use), ``.rates``, ``.provenance``, ``.limits``.

    Returns:
        a whole document; write it with :func:`save`.
    """
    comparison, opened = report.comparison, getattr(report, "backdoor", None)
    questions: Sequence[Question] = getattr(comparison, "questions", SHIPPED)
    planned = getattr(report, "plan", None)
    judged = partial(_cells, status=None if planned is None else planned.status)
    cells = judged(comparison.rows, questions)
    provenance = report.provenance
    models = {role: str(provenance[role]) for role in ("base", "tuned", "benign") if provenance.get(role)}
    how = {key: value for key, value in provenance.items() if key not in _WHERE | _ELSEWHERE}
    return (
        html.environment()
        .get_template("report.html.j2")
        .render(
            title=str(provenance.get("name") or models.get("tuned") or "a pair of models"),
            version=tl_em.__version__,
            summary=report.summary,
            sentences=re.split(r"(?<=\.)\s+(?=[A-Za-z])", report.summary),
            matrix=_matrix(cells, questions),
            cells=cells,
            questions=[question for question in questions if any(c.row.question == question.name for c in cells)],
            glossary=[*questions, *(() if opened is None else opened.questions)],
            models=models,
            where=_flat({key: value for key, value in provenance.items() if key in _WHERE}),
            asked=_asked(provenance),
            generalised="held_out" in report.rates and not report.rates["held_out"].all(),
            command=provenance.get("command"),
            how=_flat({key: value for key, value in how.items() if not isinstance(value, Mapping)}),
            record=_flat({key: value for key, value in how.items() if isinstance(value, Mapping)}),
            limits=list(report.limits),
            number=number,
            drawings={drawing.name: drawing for drawing in _drawings(report)},
            opened=opened,
            calibrated=getattr(report, "calibration", None),
            runs=getattr(report, "consistency", None),
            features=getattr(report, "features", None),
            note=getattr(report, "features_note", ""),
            studies=getattr(report, "studies", {}),
            judged=judged,
            registration=getattr(report, "registration", ""),
            lint=getattr(report, "lint", {}),
            answers=getattr(report, "answers", None),
            plain=_together(plain.clauses(report)) if hasattr(report, "outcomes") else (),
            examples=_examples(getattr(report, "answers", None)),
            together=getattr(comparison, "together", {}),
            table=_table,
        )
    )


def save(report: Any, path: str | Path) -> Path:
    """Write the page of a report.

    Raises:
        OutputError: the path cannot be written.
    """
    return html.write(path, render(report))


def _cells(
    rows: Sequence[Any], questions: Sequence[Question], status: Callable[[Any], str] | None = None
) -> list[JudgedCell]:
    """The rows of each question in turn, drawn at one scale; ``status``: whether a row was planned."""
    found = []
    for question in questions:
        asked = [row for row in rows if row.question == question.name]
        scale = _scale(asked)
        found += [_cell(row, scale, "" if status is None else status(row)) for row in asked]
    return found


def _cell(row: Any, scale: float, status: str) -> JudgedCell:
    e, control = row.estimate, row.control
    band = (control.get("low"), control.get("high"))
    p = row.p if row.p is not None else control.get("p")
    return JudgedCell(
        row, f"{number(e.value)} {interval(e.low, e.high)}", interval(*band) if _finite(*band) else "–",
        _probability(p), "–" if row.site is None else f"layer {row.site.layer}, {row.site.stream}", _glyph(row, scale),
        status,
    )  # fmt: skip


def _probability(p: float | None) -> str:
    if p is None or not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else number(p, 3)


def _finite(*values: Any) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _scale(rows: Sequence[Any]) -> float:
    """Half the width of a question's pictures: the farthest end of any of its intervals and bands."""
    ends: list[float] = []
    for row in rows:
        e, control = row.estimate, row.control
        ends += [e.value, e.low, e.high, control.get("low"), control.get("high"), 1.2 * row.smallest]
    return max((abs(end) for end in ends if _finite(end)), default=1.0) * 1.06


def _glyph(row: Any, scale: float) -> Glyph | None:
    estimate, control = row.estimate, row.control
    if not _finite(estimate.value, estimate.low, estimate.high):
        return None
    low, high = control.get("low"), control.get("high")
    band = (_at(low, scale), _at(high, scale)) if _finite(low, high) else (None, None)
    return Glyph(
        _at(estimate.low, scale), _at(estimate.high, scale), _at(estimate.value, scale), *band,
        bound=round(50 * row.smallest / scale, 2),
    )  # fmt: skip


def _at(value: Any, scale: float) -> float:
    return round(50 + 50 * value / scale, 2)


def _matrix(cells: Sequence[JudgedCell], questions: Sequence[Question]) -> dict[str, dict[str, list[JudgedCell]]]:
    """Direction -> question -> its verdicts, where there are any."""
    found: dict[str, dict[str, list[JudgedCell]]] = {cell.row.direction: {} for cell in cells}
    for question in questions:
        for cell in cells:
            if cell.row.question == question.name:
                found[cell.row.direction].setdefault(question.name, []).append(cell)
    return found


def _asked(provenance: Mapping[str, Any]) -> Table:
    """One line a direction: where it was read, on how many prompts, and what it may cause."""
    rows = []
    for name, read in provenance.get("directions", {}).items():
        sets, behaviour = provenance["contrasts"][name], provenance["behaviours"][name]
        counted = [f"{sets[part]['positive']} + {sets[part]['negative']}" for part in ("train", "select", "test")]
        where = [str(read["site"]), str(read["position"]), str(read["reliability"] or "–")]
        rows.append([str(name), *where, *counted, f"{behaviour['metric']} in {behaviour['unit']}"])
    columns = ["direction", "read at", "token", "split-half cosine", "prompts: extract", "choose layer", "judge"]
    return Table([*columns, "behaviour"], rows, [False] * 4 + [True] * 3 + [False])


class Examples(NamedTuple):
    """Answers to a few questions, side by side."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


EXAMPLES = 3
_SAID = {"asked": "question", "base": "original model", "tuned": "fine-tuned model"}


def _examples(answers: pd.DataFrame | None) -> Examples | None:
    """The first question of each of a few domains, spread over them, with the answers before, after and treated."""
    if answers is None:
        return None
    firsts = answers.drop_duplicates("domain")
    some = firsts.iloc[[round(i * (len(firsts) - 1) / max(1, EXAMPLES - 1)) for i in range(min(EXAMPLES, len(firsts)))]]
    told = [name for name in answers.columns if not name.startswith("benign")]
    columns = [_SAID.get(name, name.replace("tuned, ", "fine-tuned, ")) for name in told]
    of = f"{len(some)} of {len(firsts)} domains"
    caption = f"The first question of {of}, and the most probable answers; none was picked for what it says."
    return Examples(caption, columns, [[_brief(value) for value in row] for row in some[told].itertuples(index=False)])


def _together(clauses: Sequence[plain.Clause]) -> list[plain.Clause]:
    """No line ends before a per-cent sign."""
    return [plain.Clause(c.about, c.text.replace(" %", "\xa0%"), c.figures.replace(" %", "\xa0%")) for c in clauses]


def _brief(text: Any) -> str:
    """An answer's first words."""
    return textwrap.shorten(str(text), 180, placeholder=" …")


def _flat(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Nested settings as (path, text) pairs; a mapping of plain values is one text."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    name = " · ".join(path).replace("_", " ")
    if isinstance(value, Mapping) and path and not any(_nested(inner) for inner in value.values()):
        return [(name, ", ".join(f"{key} {_text(inner)}" for key, inner in value.items() if inner is not None))]
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _flat(inner, (*path, str(key)))]
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return [] if value is None else [(name, str(value))]


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, str) and value.startswith("{"))


def _drawings(report: Any) -> Iterator[Drawing]:
    for name, each in plots.shown(report).items():
        wide, narrow = (inline(each.draw(width=w), f"{name}-{w_}") for w, w_ in ((WIDE, "w"), (NARROW, "n")))
        yield Drawing(name, each.caption, each.label, wide, narrow, _table(each.table))


def _table(table: pd.DataFrame) -> Table:
    columns = [str(name) for name in table.columns if not table[name].isna().all()]
    numeric = [table[name].dtype.kind in "fiu" for name in columns]
    rows = [[_text(value) for value in record] for record in table[columns].itertuples(index=False)]
    return Table([name.replace("_", " ") for name in columns], rows, numeric)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 3)
    return {"True": "yes", "False": "no"}.get(str(value), str(value))
