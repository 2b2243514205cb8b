"""The page in a headless Chromium: nothing leaves it, it fits both screens, the answer is on the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tl_em as em
from tests.visits import SCREENS, Visit
from tl_em.report import page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(report: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.save(report, tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("screen", list(SCREENS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_leaves_the_page_and_it_fits(browser: Any, path: Path, screen: str, scheme: str) -> None:
    visit = Visit(browser, path, screen, scheme)
    for opened in visit.page.locator("details > summary").all():
        opened.click()
    assert [url for url in visit.requests if not url.startswith("data:")] == [path.as_uri()]
    assert visit.errors == []
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && !e.closest('.scroll, pre')"
    )
    outside += " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert visit.run(outside) == []


@pytest.mark.parametrize("screen", list(SCREENS))
def test_the_answer_is_on_the_first_screen(browser: Any, path: Path, report: Any, screen: str) -> None:
    visit = Visit(browser, path, screen)
    first = [visit.page.locator("#summary"), *visit.page.locator(".answer tbody tr").all()]
    assert len(first) == 5
    for part in first:
        assert part.is_visible()
        box = part.bounding_box()
        assert box["y"] >= 0
        assert box["y"] < visit.height  # below the plain words the table may end later
    whole = first[0].bounding_box()
    assert whole["y"] + whole["height"] <= visit.height
    said = visit.page.locator(".answer").inner_text()
    for row in report.comparison.rows:
        if row.verdict != "not shown":
            assert row.verdict in said
            assert page.interval(row.estimate.low, row.estimate.high) in said
            assert page.interval(row.control["low"], row.control["high"]) in said


@pytest.mark.parametrize("screen", list(SCREENS))
def test_one_drawing_of_each_figure_shows_with_readable_text(browser: Any, path: Path, screen: str) -> None:
    visit = Visit(browser, path, screen)
    shown = visit.run(
        "[...document.querySelectorAll('figure')].map(f => [...f.querySelectorAll('[role=img]')]"
        ".filter(d => d.getClientRects().length).length)"
    )
    assert shown
    assert set(shown) == {1}
    heights = visit.run(
        "[...document.querySelectorAll('figure [role=img] text')].filter(t => t.getClientRects().length)"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert len(heights) > 100
    assert min(heights) >= 9.5


def test_dark_and_light_differ_and_both_recolour_the_figures(browser: Any, path: Path) -> None:
    styles = (
        "getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('figure text')).fill"
    )
    script = f"[{styles}]"
    light, dark = (Visit(browser, path, "wide", scheme).run(script) for scheme in ("light", "dark"))
    assert light[0] != dark[0]
    assert light[1] != dark[1]


def test_keyboard_reaches_links_tables_and_details(browser: Any, path: Path) -> None:
    visit = Visit(browser, path, "wide")
    focused = "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    reached = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.append(visit.run(focused))
    assert {"A", "SUMMARY", "DIV"} <= {tag for tag, _ in reached}
    assert all(outline != "none" for tag, outline in reached if tag != "BODY")


@pytest.mark.parametrize("screen", list(SCREENS))
def test_hostile_names_do_nothing(browser: Any, hostile: Any, tmp_path: Path, screen: str) -> None:
    visit = Visit(browser, page.save(hostile, tmp_path / "report.html"), screen)
    assert len([url for url in visit.requests if not url.startswith("data:")]) == 1
    assert visit.errors == []
    assert visit.run("document.images.length + document.scripts.length") == 0
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    assert "onerror=alert(1)" in visit.page.locator("h1").inner_text()


@pytest.mark.parametrize("screen", list(SCREENS))
def test_a_token_that_is_clicked_shows_its_layers(browser: Any, tmp_path: Path, screen: str) -> None:
    pair = em.load_pair("toy/insecure")
    along = em.Direction(torch.linspace(-1, 1, 96), em.Site(2), name="along")
    reading = em.read(pair.tuned, "how do i write parser", along, layers=True, alternatives=2, max_new_tokens=2)
    visit = Visit(browser, reading.view().save(tmp_path / "read.html"), screen)
    panels = visit.page.locator("tr.layers")
    assert [panel.is_visible() for panel in panels.all()] == [False] * len(reading.tokens)
    visit.page.locator("a.t").nth(4).click()
    assert [panel.is_visible() for panel in panels.all()] == [at == 4 for at in range(len(reading.tokens))]
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0] and visit.errors == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [visit.path.as_uri()]
