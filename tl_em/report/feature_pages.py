"""The page of feature cards: one HTML file, nothing loaded, everything from outside escaped.

There is no script in it and a Content-Security-Policy that would refuse one: token colours are spans that are written
here, and histograms are inlined SVG. Tokens are text of training data, so of anyone: they pass through jinja2's
autoescape, and line ends and other characters that would not show are drawn as signs.

On request the page also holds circuitsvis's own figure, which needs scripts: then in a sandboxed frame of an origin of
its own, with the same policy, its tokens escaped for HTML and for JSON within a script (circuitsvis does neither).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

import tl_em
from tl_em.errors import UsageError
from tl_em.features.cards import FeatureCard, FeatureCards, Text
from tl_em.report.html import environment, frame, write
from tl_em.showing import interval, number, token_shown

MINUS = "\u2212"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SCRIPTED = f"{POLICY}; script-src 'unsafe-inline'"
BEFORE, AFTER = 40, 16
"""Tokens shown before and after an example's highest activation."""
GOES_ON = "‥"
"""A token without a text of its own, in a text: one that goes on with the character before it."""
visible = token_shown
_PLACE = "tl-em-place-for-tokens"


class Token(NamedTuple):
    """A token ready to be drawn: its text, its per cent of the card's highest activation, a title, and whether it is
    the example's highest, and counts at all."""

    text: str
    share: int
    title: str
    peak: bool
    counts: bool


class Example(NamedTuple):
    """A prompt's part around its highest activation."""

    tokens: list[Token]
    cut: tuple[bool, bool]
    peak: str
    base: str | None


class Bar(NamedTuple):
    """One bin of both histograms, in the picture's units."""

    x: float
    width: float
    up: float
    down: float


class Heat(NamedTuple):
    """One number of a behaviour: text, and how strongly it is coloured (-100 to 100)."""

    text: str
    strength: int


def render(cards: FeatureCards, *, circuitsvis: bool = False) -> str:
    """The page as HTML.

    Args:
        cards: from ``feature_cards``.
        circuitsvis: whether to add circuitsvis's interactive figure (1.3 MB of scripts, in a sandboxed frame).

    Raises:
        UsageError: circuitsvis is wanted and not installed.
    """
    return environment().get_template("cards.html.j2").render(
        policy=_SCRIPTED if circuitsvis else POLICY,
        version=tl_em.__version__,
        cards=cards,
        each=[_view(card, column, cards) for column, card in enumerate(cards.cards)],
        checks=cards.checks,
        frame=Markup(escape(_figure(cards))) if circuitsvis else "",
        number=number,
        interval=interval,
        visible=visible,
    )


def save(cards: FeatureCards, path: str | Path, *, circuitsvis: bool = False) -> Path:
    """Write the page.

    Raises:
        UsageError: no path of an HTML file. OutputError: the path cannot be written.
    """
    return write(path, render(cards, circuitsvis=circuitsvis))


def notebook_frame(cards: FeatureCards) -> str:
    """The page in a sandboxed frame, for a notebook's output."""
    return frame(
        render(cards), f"Features of {cards.dictionary.label}", height=720, scripts=False,
        instead='cards.save("features.html")',
    )  # fmt: skip


# ---- a card's parts ----------------------------------------------------------------------------------------------
class View(NamedTuple):
    """A card as the template needs it."""

    card: FeatureCard
    examples: list[Example]
    bars: list[Bar]
    tallest: float
    heat: tuple[list[str], list[tuple[str, list[Heat]]]]


def _view(card: FeatureCard, column: int, cards: FeatureCards) -> View:
    bars, tallest = _bars(card)
    examples = [_example(cards.texts[n], column, card.histogram.high) for n in card.examples]
    return View(card, examples, bars, tallest, _heat(card))


def _example(text: Text, column: int, high: float) -> Example:
    a = text.activations[:, column]
    counts = range(*text.span)
    peak = counts[int(a[counts.start : counts.stop].argmax())]
    first, end = max(0, peak - BEFORE), min(len(a), peak + AFTER + 1)
    base = None if text.base is None else text.base[:, column]
    tokens = [
        Token(
            token_shown(text.tokens[i]) if text.tokens[i] or not i else GOES_ON,
            _share(float(a[i]), high) if i in counts else 0,
            _title(i, float(a[i]), base, i in counts), i == peak, i in counts,
        )
        for i in range(first, end)
    ]  # fmt: skip
    said = None if base is None else f"{float(base[peak]):.2f}"
    return Example(tokens, (first > 0, end < len(a)), f"{float(a[peak]):.2f}", said)


def _share(value: float, high: float) -> int:
    """Per cent of the highest activation; something, where there is something."""
    return 0 if value <= 0 else max(4, min(100, round(100 * value / high)))


def _title(position: int, value: float, base: torch.Tensor | None, counts: bool) -> str:
    beside = "" if base is None else f" (base {float(base[position]):.3g})"
    return f"token {position}: {value:.3g}{beside}{'' if counts else ', does not count'}"


def _bars(card: FeatureCard) -> tuple[list[Bar], float]:
    own, base = card.histogram.model, card.histogram.base
    tallest = max(max(own), max(base or (0.0,)))
    if not tallest:
        return [], 0.0
    width = 240 / len(own)
    sides = zip(own, base or [0.0] * len(own), strict=True)
    return [
        Bar(round(i * width + 0.5, 2), round(width - 1, 2), _height(up, tallest), _height(down, tallest))
        for i, (up, down) in enumerate(sides)
    ], tallest


def _height(share: float, tallest: float) -> float:
    """Square root, so that rare high activations show beside frequent low ones."""
    return round(40 * (share / tallest) ** 0.5, 2)


_COLUMNS = {
    "effect": "positive − negative", "q": "q", "auroc": "AUROC", "delta": "tuned − base",
    "q_delta": "q of tuned − base", "nu": "ν", "attribution": "attribution",
}  # fmt: skip


def _heat(card: FeatureCard) -> tuple[list[str], list[tuple[str, list[Heat]]]]:
    """Behaviours against what was scored; coloured by the share of the card's largest number of that kind."""
    names = [name for name in _COLUMNS if any(name in row for row in card.behaviours)]
    found = card.behaviours
    scales = {name: max((abs(_number(row, name)) for row in found), default=0.0) for name in names}
    rows = [(str(row.get("behaviour", "")), [_cell(row, name, scales[name]) for name in names]) for row in found]
    return [_COLUMNS[name] for name in names], rows


def _known(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def _number(row: Mapping[str, Any], name: str) -> float:
    return float(row[name]) if _known(row, name) else 0.0


def _cell(row: Mapping[str, Any], name: str, scale: float) -> Heat:
    if not _known(row, name):
        return Heat("–", 0)
    value = _number(row, name)
    if name in ("q", "q_delta"):
        return Heat("< .001" if value < 0.001 else f"{value:.3f}", 0)
    if name == "auroc":
        return Heat(f"{value:.2f}", round(200 * (value - 0.5)))
    return Heat(f"{value:+.3g}".replace("-", MINUS), round(100 * value / scale) if scale and name != "nu" else 0)


# ---- circuitsvis -------------------------------------------------------------------------------------------------
def _figure(cards: FeatureCards) -> str:
    """The document of the sandboxed frame: circuitsvis's figure of all examples and latents, with tokens made safe."""
    try:
        from circuitsvis.activations import text_neuron_activations
    except ImportError as error:
        raise UsageError(
            "circuitsvis is not installed, so there is no figure of its to add; install tl_em[viz], or save the page "
            "without circuitsvis=True"
        ) from error
    texts = list(cards.texts.values())
    tokens = [[escape(token_shown(token)) for token in text.tokens] for text in texts]  # it draws them as HTML
    figure = text_neuron_activations(
        [_PLACE],  # circuitsvis writes tokens into a script as they are
        [text.activations[:, None, :] for text in texts],
        first_dimension_name="Model",
        second_dimension_name="Latent",
        first_dimension_labels=["tuned"],
        second_dimension_labels=[str(card.index) for card in cards.cards],
    )
    source = figure.local_src.replace(json.dumps([_PLACE]), _json(tokens))
    style = "body{font-family:system-ui,sans-serif;background:#fff;color:#1b1f24}"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_SCRIPTED}">'
    return f"<!doctype html><html><head>{head}<style>{style}</style></head><body>{source}</body></html>"


def _json(value: Sequence[Any]) -> str:
    """JSON that may stand in a script: nothing in it ends the script or a line."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
