"""The page as text: sections, accessibility, escaping. What a browser makes of it is in test_browser.py."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tl_em.errors import OutputError
from tl_em.report import page, svg

SECTIONS = ["answer", "glance", "compared", "behaviour", "layers", "verdicts", "use", "limits", "reproduce", "glossary"]
STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text()


class Outline(HTMLParser):
    """Elements in order, with their attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1:] != [("style", {})]:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(report: Any) -> str:
    return page.render(report)


def test_sections_come_in_order_and_the_answer_first(text: str, report: Any) -> None:
    assert [a["id"] for a in Outline(text).all("section")] == SECTIONS
    assert text.index("persona direction, which causes") < text.index('id="compared"')


def test_every_verdict_is_in_the_first_table_and_in_the_full_one(text: str, report: Any) -> None:
    first, rest = text.split('id="compared"')
    shown = [row.verdict for row in report.comparison.rows if row.verdict != "not shown"]
    assert len(shown) == 5
    for part in (first, rest):
        assert part.count('<span class="word">') == len(shown)
        assert part.count('<span class="none">not shown</span>') == len(report.comparison.rows) - len(shown)
    row = report.comparison.rows[0]
    assert page.interval(row.estimate.low, row.estimate.high) in first
    assert row.reason in rest


def test_nothing_is_loaded_and_nothing_runs(text: str) -> None:
    outline = Outline(text)
    policy = next(a for a in outline.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not outline.all("script")
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert all(a["href"] and a["href"].startswith(("#", "data:")) for t, a in outline.elements if "href" in a)
    assert not any(key.startswith("on") for _, a in outline.elements for key in a)


def test_landmarks_headings_captions_and_labels(text: str) -> None:
    outline = Outline(text)
    assert [len(outline.all(tag)) for tag in ("header", "main", "nav", "footer", "h1")] == [1, 1, 1, 1, 1]
    assert outline.all("html")[0]["lang"] == "en"
    assert all(a["aria-labelledby"] for a in outline.all("section"))
    assert len(outline.all("caption")) + 1 == len(outline.all("table"))
    assert all(a.get("scope") for a in outline.all("th"))
    images = [a for _, a in outline.elements if a.get("role") == "img"]
    assert len(images) == 2 * len(outline.all("figure"))
    assert all(a["aria-label"] for a in images)
    assert all(a["aria-hidden"] == "true" for a in outline.all("svg"))
    assert all(a["tabindex"] == "0" for _, a in outline.elements if "scroll" in (a.get("class") or "").split())
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for a in outline.all("a") if a["href"]}
    assert links <= set(ids)


def test_each_figure_has_its_numbers(text: str) -> None:
    figures = text.split("<figure")[1:]
    assert len(figures) == 7
    assert all("<details>" in figure and "<td" in figure for figure in figures)


def test_colours_of_figures_follow_the_theme(text: str) -> None:
    drawings = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(drawings) > 14
    assert not any(re.search(r"#[0-9a-f]{6}", drawing) for drawing in drawings)
    used = set(re.findall(r"var\(--([a-z-]+)\)", text))
    for theme in themes():
        assert used <= set(theme) | {"sans", "mono"}


def themes() -> list[dict[str, str]]:
    """The custom properties of the light and of the dark theme."""
    light, dark = STYLE.split("prefers-color-scheme: dark")
    found = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    return [found[0], found[0] | found[1]]


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    series = ("base", "tuned", "benign", "untreated", "treated", "random")
    text = [("ink", "page"), ("muted", "page"), ("ink", "raised"), ("muted", "raised"), ("link", "page")]
    text += [("word", "word-back"), ("ink", "band"), *((f"{name}-text", "page") for name in series)]
    for front, back in text:
        assert contrast(theme[front], theme[back]) >= 4.5, (front, back)
    for name in series:
        assert contrast(theme[name], theme["page"]) >= 3, name


def test_motion_and_focus_are_looked_after() -> None:
    assert "prefers-reduced-motion" in STYLE
    assert ":focus-visible" in STYLE


def test_hostile_names_are_inert_text(hostile: Any) -> None:
    text = page.render(hostile)
    outline = Outline(text)
    assert not outline.all("script")
    assert not outline.all("img")
    assert len(outline.all("style")) == 1
    assert not any("onerror" in a for _, a in outline.elements)
    assert [a["id"] for a in outline.all("section")] == SECTIONS
    assert any("</script></style><img src=x onerror=alert(1)>" in word for word in outline.words)


def test_svg_keeps_only_what_is_allowed() -> None:
    source = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="1pt" viewBox="0 0 1 1" onload="x()"><script>x()</script>'
        '<metadata>m</metadata><image href="http://host/x.png"/><g id="a"><use href="http://host/#b"/>'
        '<path d="M0 0" style="fill: #d55e00" onclick="x()"/></g></svg>'
    )
    element = svg.clean(svg.ElementTree.fromstring(source), "name")
    text = svg.ElementTree.tostring(element, encoding="unicode")
    assert 'd="M0 0" style="fill: var(--tuned)"' in text
    assert 'id="name-a"' in text
    assert not re.search("script|metadata|image|host|onload|onclick|xmlns", text)


def test_a_report_with_less_in_it(small: Any) -> None:
    """No benign arm, no behaviour, no causal test, no settings: the page says what it has."""
    comparison = small.comparison
    rows = tuple(copy.deepcopy(row) for row in comparison.rows if row.question == "level")
    rows[0].estimate.low = rows[0].estimate.high = float("nan")
    rows[0].p, rows[0].control = None, {}
    less = SimpleNamespace(
        rows=rows, by_layer=comparison.by_layer[comparison.by_layer["model"] != "benign"], use=pd.DataFrame(),
        to_pandas=comparison.to_pandas,
    )  # fmt: skip
    bare = replace(small, comparison=less, rates=pd.DataFrame(), provenance={"tuned": "mine"}, limits=[])
    outline = Outline(page.render(bare))
    sections = [a["id"] for a in outline.all("section")]
    assert sections == [name for name in SECTIONS if name not in ("behaviour", "use")]
    said = " ".join(outline.words)
    assert "[no interval]" in said
    assert "benign" not in said.split("The questions and the rule")[0]
    assert "benign" in said


def test_summary_of_several_sentences_is_set_line_by_line(small: Any) -> None:
    summary = "refusal: diminished (−0.4 own gaps, layer 2), and causal there. persona: no change shown."
    told = page.render(replace(small, summary=summary)).split('id="summary"')[1].split("</p>")[0]
    assert told.count("<span>") == 2


def test_saving_gives_the_same_page_every_time(small: Any, tmp_path: Path) -> None:
    assert page.save(small, tmp_path / "report.html").read_text(encoding="utf-8") == page.render(small)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        page.save(small, tmp_path / "file" / "report.html")
