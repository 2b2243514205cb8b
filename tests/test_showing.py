"""Text from outside is visible and harmless wherever it is shown: figures, pages, graphs, tables, terminal, files."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

import tl_em as em
from tests.graph.examples import small
from tests.report.conftest import fake_layers, fake_rates, fake_rows, fake_use
from tl_em import cli
from tl_em.auditing.report import Report
from tl_em.claims.claim import Row
from tl_em.claims.compare import Comparison
from tl_em.directions.similarity import CosineMatrix, PairCosine
from tl_em.errors import UsageError
from tl_em.graph.view import page, page_data
from tl_em.report import cards, drawing, rates, svg
from tl_em.report.page import render
from tl_em.showing import encodable, json_shown, showable, slug, token_shown

HOSTILE = {
    "escape": "\x1b[31mred\x1b[0m",
    "nul": "a\x00b",
    "bell": "a\x07\x7f\x9bb",
    "noncharacter": "a\ufffe\uffff\U0001fffeb",
    "surrogate": "a\ud83db\udc80",
    "bidi": "a\u202egnp.exe\u2066b\u2069\u200f\u061c",
    "width": "a\u200b\ufeff\u2060\u00adb\u3164",
    "tags": "a\U000e0061\U000e0062b",
    "selectors": "a\ufe0f\U000e0101\U000e0102b",
    "lines": "a\r\n\u2028\u2029\x85\x0bb",
    "markup": "[/b]",
    "link": "[link=https://example.org]x[/link]",
    "script": "</script><script>alert(1)</script>",
    "mathtext": "$x_1$ and $\\frac{a}{b$",
    "template": "{{ 7 * 7 }}{% raw %}",
    "underscore": "_hidden",
    "emoji code": ":warning:",
    "path": "../../etc/[/b]",
    "percent": "%(x)s %s {0}",
    "cdata": "]]><!--",
}
PLAIN = [
    "refusal",
    "naïve café",
    "你好",
    "שלום",
    "👨‍👩‍👧",
    "❤️",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "می‌خواهم",
    "क्‍ष",
]


def hidden(text: str) -> set[str]:
    """What does not show, by another rule than the package's: format, control, surrogate, unassigned, private."""
    joined = "\u200c\u200d"
    tags = set(map(chr, range(0xE0061, 0xE0080)))
    found = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")}
    return found - {"\n"} - set(joined) - (tags if "\U0001f3f4" in text else set())


# ---- the function ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_not_show_is_a_sign_and_the_rest_stays(name: str) -> None:
    text = HOSTILE[name]
    shown = showable(text)
    assert not hidden(shown) and "\n" not in shown
    shown.encode("utf-8")
    ElementTree.fromstring(f"<x>{shown.replace('&', '').replace('<', '').replace(']]>', '')}</x>")
    assert [c for c in text if c.isascii() and c.isprintable()] == [
        c for c in re.sub("⟨[0-9a-f]+⟩", "", shown) if c.isascii() and c.isprintable()
    ]
    assert len(re.findall("⟨[0-9a-f]+⟩|[↵␍⇥␤]", shown)) >= len(hidden(text))  # a sign for each, none dropped
    assert showable(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_letters_of_any_script_and_emoji_stay_as_they_are(text: str) -> None:
    assert showable(text) == token_shown(text) == text


def test_joiners_and_selectors_alone_are_shown() -> None:
    assert (
        token_shown("\u200d") == "⟨200d⟩" and token_shown("\ufe0f") == "⟨fe0f⟩" and token_shown("\u200c ") == "⟨200c⟩ "
    )
    assert token_shown("  ") == "··" and token_shown("") == "∅" and showable("") == ""
    assert showable("a\nb", lines=True) == "a\nb" and showable("a\r\nb", lines=True) == "a␍\nb"


def test_json_for_an_eye_is_the_same_json() -> None:
    value = {text: [text] for text in HOSTILE.values()}
    text = json_shown(value, indent=1)
    assert json.loads(text) == value
    assert not hidden(text)
    text.encode("utf-8")
    assert "é" in json_shown("é")


def test_slugs_are_plain_and_tell_names_apart() -> None:
    slugs = [slug(text) for text in HOSTILE.values()]
    assert len(set(slugs)) == len(slugs) and all(re.fullmatch(r"[\w.-]+", each) for each in slugs)
    assert not any(each.startswith((".", "-")) for each in slugs) and slug("refusal_2") == "refusal_2"
    assert slug("a/b") != slug("a-b") != slug("a b") and len(slug("x" * 500)) < 100


# ---- where it is used --------------------------------------------------------------------------------------------
def report_on(names: list[str]) -> Report:
    """A real report on directions of these names; its numbers are drawn at random."""
    rng = np.random.default_rng(0)
    rows = []
    for row in fake_rows(rng, names):
        e = row.estimate
        found = em.Estimate(e.value, e.low, e.high, e.n, float(e.n), e.method, e.seed)
        site = em.Site(row.site.layer, row.site.stream)
        rows.append(Row(row.question, row.direction, site, row.verdict, found, row.control, row.p, row.smallest,
                        row.unit, None, row.reason, {}))  # fmt: skip
    layers = fake_layers(rng, names).query("quantity == 'gap'")
    comparison = Comparison(tuple(rows), layers, fake_use(rng, names))
    about = {"name": names[0], "tuned": names[0], "command": names, "settings": {names[0]: names[-1]}}
    return Report(comparison, fake_rates(rng, names[:1]), about, tuple(names))


def test_a_report_on_hostile_names_is_written_whole(tmp_path: Path) -> None:
    given = list(map(encodable, HOSTILE.values()))
    names = [" ".join(given[:10]), " ".join(given[10:])]
    report = report_on(names)
    folder = tmp_path / "inside" / "out"
    report.save(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not hidden(text)
    for name in names:
        assert showable(name).translate({60: "&lt;", 62: "&gt;", 38: "&amp;"}) in text.replace("&#39;", "'")
    assert "<script" not in text.lower()
    figures = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert {path.parts[:2] for path in figures} == {("inside", "out")}  # no name is a path to elsewhere
    layers = [path for path in figures if path.name.startswith("layers-") and path.suffix == ".svg"]
    assert len(layers) == len(names)
    for path in figures:
        if path.suffix == ".svg":
            words = "".join(ElementTree.fromstring((tmp_path / path).read_text(encoding="utf-8")).itertext())
            assert not hidden(words)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["limits"] == names


def test_ids_in_a_page_belong_to_one_figure_each() -> None:
    text = render(report_on(["[/b]", "(/b)", "b"]))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) > 50 and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_figure_shows_a_hostile_name_as_text(name: str) -> None:
    label = encodable(HOSTILE[name])  # what pandas can hold at all
    row = {"domain": label, "held_out": True, "outcome": label, "model": "base", "value": 0.1, "low": 0.0, "high": 0.2}
    figure: Any = rates.by_domain(pd.DataFrame([row]))
    words = "".join(ElementTree.fromstring(svg.inline(figure, label)).itertext())
    assert showable(label) in words and not hidden(words)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_dollar_is_a_dollar_even_where_text_is_made_after_the_style() -> None:
    figure = drawing.Picture(figsize=(3, 2))
    ax = figure.subplots()
    ax.set_title("$x_1$")  # outside the house style, as in a study's own figure
    ax.set_xticks([0, 1], ["$\\frac{a}{b$", "a\x1bb"])
    words = "".join(ElementTree.fromstring(svg.inline(figure, "x")).itertext())
    assert "$x_1$" in words and "$\\frac{a}{b$" in words and "a⟨1b⟩b" in words


def test_a_key_names_a_series_that_begins_with_an_underscore() -> None:
    from tl_em.report.studies import study

    rows = [
        {"arm": arm, "seed": k, "share": s, "bad": s / 2} for arm in ("_a", "b") for k in (1, 2) for s in (0.0, 1.0)
    ]
    figure = study(pd.DataFrame(rows), x="share", by=["arm"], values=["bad"])
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_a", "b"]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_of_a_graph_shows_hostile_labels(name: str) -> None:
    label = HOSTILE[name]
    nodes = tuple(replace(node, label=label, extra={"top": [label], label: label}) for node in small().nodes)
    graph = replace(small(), nodes=nodes, tokens=(label,) * 4, model=label, prompt=label, settings={label: label})
    text = page(graph)
    assert not hidden(text) and text.count("<script") == 2
    view = page_data(graph)["view"]
    assert view["tokens"][0] == showable(label) and view["nodes"][2]["label"] == showable(label)
    graph.diff(replace(graph, edges=graph.edges * 2))._repr_html_().encode("utf-8")


@pytest.mark.parametrize("name", HOSTILE)
def test_the_terminal_prints_a_hostile_name_as_text(name: str, capsys: Any) -> None:
    label, wide = (
        HOSTILE[name],
        pd.DataFrame(
            {
                encodable(HOSTILE[name]): [encodable(HOSTILE[name])],
                "value": [0.5],
                "low": [0.4],
                "high": [0.6],
                "n": [3],
            }
        ),
    )
    rows = [SimpleNamespace(question="level", direction=label, verdict="not shown", estimate=label, shown=False)]
    report = SimpleNamespace(verdicts=rows, summary=f"{label} is not shown.", to_json=lambda: {label: label})
    cli._print(report, None, False)
    cli._print_table(label, wide)
    cli._echo(f"{label}")
    printed = capsys.readouterr().out
    shown = showable(label).replace(" ", "")
    assert "".join(printed.split()).count(shown[:12]) >= 4
    assert not hidden(printed)
    cli._print(report, None, True)
    assert json.loads(capsys.readouterr().out) == {label: label}


@pytest.mark.parametrize("name", HOSTILE)
def test_results_say_and_draw_hostile_names_in_a_notebook(name: str) -> None:
    label = HOSTILE[name]
    site, found = em.Site(1), em.Estimate(0.5, 0.4, 0.6, 9, 9.0, label)
    named = encodable(label)  # em.directions.cosine_matrix refuses another
    pair = PairCosine(named, "b", found, 0.9, 0.01, 0)
    results = [
        em.Direction(torch.ones(3), site, name=label), em.ContrastSet([label], ["b"], label=label, source=label),
        CosineMatrix((named, "b"), site, (pair,), {named: 0.9, "b": 0.9}), found,
    ]  # fmt: skip
    for result in results:
        assert not hidden(repr(result)) and not hidden(result._repr_html_())
        assert "<script" not in result._repr_html_().lower()
    assert showable(label)[:9].translate({60: "&lt;", 62: "&gt;", 38: "&amp;"}) in results[0]._repr_html_()
    assert "<td" in cards.table(pd.DataFrame({encodable(label): [encodable(label)]}))


def test_half_a_character_in_a_name_is_refused_before_any_work() -> None:
    pair = em.load_pair("toy/insecure")
    contrast = (pair.contrasts or {})["refusal"]
    direction = em.Direction(torch.ones(96), em.Site(1), name="a\ud800")  # may be called so, and is shown
    assert "a⟨d800⟩" in repr(direction)
    refused = [
        lambda name: em.audit(pair, contrasts={name: contrast}),
        lambda name: em.compare(pair, {name: (direction, contrast)}),
        lambda name: em.directions.cosine_matrix(pair.base, {name: contrast}, site=em.Site(1), position="prompt_end"),
    ]
    for call in refused:
        with pytest.raises(UsageError, match=r"half a character.*name it 'a⟨d800⟩'"):
            call("a\ud800")
    with pytest.raises(UsageError, match="have no cosine between them"):  # the name is what was refused
        refused[2]("a⟨d800⟩")
