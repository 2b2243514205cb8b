"""The page of a reading: text coloured by what a direction reads at each token, a strip a direction, what a token has.

Nothing is run: a token is a link to its row in a table, where its values, latents and next tokens stand, and under the
row that was chosen, where layers were read, a line and a table over them (a rule of ``:target`` shows it). Tokens are
text of anyone: jinja2 escapes them, and what would not show is a sign. A colour is a value's distance from the median
of the texts shown, on one scale for all readings on the page, orange above and blue below; the strip shows the values
themselves, and the band that 95 % of random directions stay in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import tl_em
from tl_em.graph.references import SINK
from tl_em.reading.reading import layer_rows
from tl_em.report.html import Framed, environment
from tl_em.showing import number, showable, token_shown

if TYPE_CHECKING:
    import pandas as pd

    from tl_em.reading import TextReading

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TEXTS, TOKENS = 20, 2000
"""Texts of a page, and tokens of a text."""
LAYERED = 400
"""Tokens of a page that are shown layer by layer: some kilobytes each."""
_WIDTH, _HEIGHT = 1000, 60


class ShadedToken(NamedTuple):
    """A token ready to be drawn: text, per cent of the largest distance from the median (below it: negative), title."""

    text: str
    strength: int
    title: str
    answer: bool


class Strip(NamedTuple):
    """A direction over the tokens of one text (or over layers): its line and its band, and the ends of both axes."""

    line: str
    band: str
    zero: float
    low: str
    high: str
    first: int
    last: int


class Peak(NamedTuple):
    """The token at which a direction reads most, or least: its number in the text, its text and the value."""

    token: int
    text: str
    value: str


class Line(NamedTuple):
    """One reading of one direction."""

    reading: str
    tokens: list[ShadedToken]
    strip: Strip
    most: Peak
    least: Peak


class LayerPanel(NamedTuple):
    """A token layer by layer: a strip a direction, and a table, its columns and its rows."""

    strips: dict[str, Strip]
    columns: list[str]
    rows: list[list[str]]


class TokenRow(NamedTuple):
    """A token's row in the table: its place, text and part, a cell a column, and its layers."""

    at: int
    text: str
    part: str
    values: list[str]
    layers: LayerPanel | None


class ReadText(NamedTuple):
    """One text: a list of lines a direction, and its tables, one a reading."""

    lines: dict[str, list[Line]]
    tables: dict[str, list[TokenRow]]


def reading_page(readings: Mapping[str, TextReading]) -> Framed:
    """The page.

    Args:
        readings: by name, of the same prompts and directions.
    """
    first = next(iter(readings.values()))
    found = {name: list(islice(each.each(), TEXTS + 1)) for name, each in readings.items()}
    more = any(len(parts) > TEXTS for parts in found.values())
    shown = {name: [part.head(TOKENS) for part in parts[:TEXTS]] for name, parts in found.items()}
    scales = {direction: _scale(shown, direction, site) for direction, site in first.sites.items()}
    room = iter(range(LAYERED))
    texts = [
        ReadText(
            {d: [_line(readings[n], n, parts[i], d, scales[d]) for n, parts in shown.items()]
             for d in first.sites},
            {name: list(_cells(readings[name], parts[i], room)) for name, parts in shown.items()},
        )
        for i in range(min(map(len, shown.values())))
    ]  # fmt: skip
    columns = {name: _columns(parts[0], list(first.sites)) for name, parts in shown.items()}
    answers = any("answer" in set(part.part) for parts in shown.values() for part in parts)
    document = environment().get_template("reading.html.j2").render(
        policy=POLICY, version=tl_em.__version__, texts=texts, sites=first.sites, columns=columns, scales=scales,
        several=len(readings) > 1, more=more, width=_WIDTH, height=_HEIGHT, number=number, sink=round(SINK),
        answers=answers, most=TEXTS, cut=TOKENS, layers=bool(first.layers), layered=LAYERED,
        lens="likely by layer" in next(iter(shown.values()))[0], all_layered=next(room, None) is not None,
    )  # fmt: skip
    by = ", ".join(map(showable, first.sites)) or "no direction"
    said = f"{len(texts)} text{'s' * (len(texts) != 1)} read by {by}"
    strips = max(1, len(first.sites)) * len(readings)
    return Framed(document, "A text, token by token", min(720, 250 + 170 * strips), said)


class ColourScale(NamedTuple):
    """The median that colours are distances from, the largest distance, and the ends of the strip."""

    middle: float
    largest: float
    low: float
    high: float


def _scale(shown: Mapping[str, list[pd.DataFrame]], direction: str, site: str) -> ColourScale:
    values, norms = (
        np.concatenate([part[column].to_numpy(dtype=float) for parts in shown.values() for part in parts])
        for column in (direction, f"norm {site}")
    )
    values = values[norms <= SINK * np.median(norms)]  # a sink is far out, whatever the direction
    middle = float(np.median(values))
    largest = float(abs(values - middle).max()) or 1.0
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return ColourScale(middle, largest, low, high if high > low else low + 1.0)


def _line(reading: TextReading, name: str, rows: pd.DataFrame, direction: str, scale: ColourScale) -> Line:
    values, band = rows[direction].to_numpy(dtype=float), reading.band(direction, rows)
    norms = band / reading.share  # a sink is no peak
    tokens = [
        ShadedToken(
            token_shown(text) if text else "‥",
            round(100 * float(np.clip((value - scale.middle) / scale.largest, -1, 1))),
            f"{number(value)}; random directions ±{number(b)}; token {at} ({part})",
            part == "answer",
        )
        for text, value, b, at, part in zip(rows.token, values, band, rows["at"], rows.part, strict=True)
    ]
    usual = np.where(norms <= SINK * np.median(norms), values, np.nan)

    def peak(at: int) -> Peak:
        return Peak(at, tokens[at].text, number(float(values[at])))

    most, least = peak(int(np.nanargmax(usual))), peak(int(np.nanargmin(usual)))
    return Line(name, tokens, _strip(values, band, scale, rows["at"]), most, least)


def _strip(values: np.ndarray, band: np.ndarray, scale: ColourScale, places: Any) -> Strip:
    def y(value: float) -> float:
        return round(float(np.clip((scale.high - value) / (scale.high - scale.low), 0, 1)) * _HEIGHT, 1)

    step = _WIDTH / max(1, len(values) - 1)
    up = [f"{round(i * step, 1)},{y(b)}" for i, b in enumerate(band)]
    down = [f"{round(i * step, 1)},{y(-b)}" for i, b in enumerate(band)]
    line = " ".join(f"{round(i * step, 1)},{y(v)}" for i, v in enumerate(values))
    ends = number(scale.low), number(scale.high), int(min(places)), int(max(places))
    return Strip(line, " ".join([*up, *reversed(down)]), y(0.0), *ends)


def _columns(rows: pd.DataFrame, directions: list[str]) -> list[str]:
    more = [name for name, column in (("latents", "latents"), ("next", "likely")) if column in rows]
    return [*directions, *more]


def _cells(reading: TextReading, rows: pd.DataFrame, room: Iterator[int]) -> Iterator[TokenRow]:
    for row in rows.to_dict("records"):
        values = [number(float(row[name])) for name in reading.sites]
        if "latents" in row:
            pairs = zip(row["latents"], row["activations"], strict=True)
            values.append(", ".join(f"{int(index)} ({number(float(a))})" for index, a in pairs if a > 0) or "none")
        if "likely" in row:
            values.append(_likely(row["likely"], row["p"]))
        panel = _panel(reading, row) if reading.layers and next(room, None) is not None else None
        text = token_shown(row["token"]) if row["token"] else "‥"
        yield TokenRow(int(row["at"]), text, str(row["part"]), values, panel)


def _likely(words: Sequence[str], shares: Sequence[float]) -> str:
    return ", ".join(f"{token_shown(word)} {number(float(p))}" for word, p in zip(words, shares, strict=True))


def _panel(reading: TextReading, row: Mapping[Any, Any]) -> LayerPanel:
    table = layer_rows(reading, row)
    band = table.band.to_numpy(dtype=float)
    strips = {}
    for name in reading.sites:
        values = table[name].to_numpy(dtype=float)
        every = np.concatenate([values, band, -band])
        scale = ColourScale(0.0, 1.0, float(every.min()), float(every.max()))
        strips[name] = _strip(values, band, scale, table.layer)
    cells = {name: [number(float(value)) for value in table[name]] for name in reading.sites}
    if cells:
        cells["random, 95 %"] = [f"±{number(float(each))}" for each in band]
    if "likely" in table:
        cells["next token, by the logit lens"] = list(map(_likely, table.likely, table.p))
    rows = [[str(layer), *each] for layer, *each in zip(table.layer, *cells.values(), strict=True)]
    return LayerPanel(strips, list(cells), rows)


def coloured(reading: Any, direction: str) -> Any:
    """The texts for a terminal, as rich's: one after the other, coloured by one direction.

    Args:
        reading: a ``TextReading``.
        direction: by name.
    """
    from rich.text import Text as Rich

    parts = [part.head(TOKENS) for part in islice(reading.each(), TEXTS)]
    scale = _scale({"": parts}, direction, reading.sites[direction])
    found = Rich()
    for part in parts:
        for text, value in zip(part.token, part[direction], strict=True):
            strength = float(np.clip((value - scale.middle) / scale.largest, -1, 1))
            colour = (213, 94, 0) if strength > 0 else (0, 114, 178)
            faded = [round(255 - abs(strength) * (255 - c)) for c in colour]
            dark = abs(strength) > 0.6
            style = f"{'white' if dark else 'black'} on rgb({faded[0]},{faded[1]},{faded[2]})"
            found.append(showable(text, lines=True), style=style)
        found.append("\n\n")
    return found
