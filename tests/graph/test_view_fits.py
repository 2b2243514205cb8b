"""“Show all” shows all: every node and label inside the drawing's place, on screens and in a notebook's frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.graph.examples import large, small
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.view import notebook_frame

pytestmark = pytest.mark.browser

OUTSIDE = """() => {
  const stage = document.getElementById('stage').getBoundingClientRect(), found = [];
  const [rows, columns] = [...document.querySelectorAll('.gutter')].map(each => each.getBoundingClientRect());
  const marks = document.querySelectorAll('#drawing .node');
  for (const mark of marks) for (const part of mark.querySelectorAll('.glyph, text')) {
    if (part.tagName === 'text' && !part.textContent) continue;
    const box = part.getBoundingClientRect();
    const out = {left: rows.right - box.left, right: box.right - stage.right,
                 top: stage.top - box.top, bottom: box.bottom - columns.top};
    for (const [side, by] of Object.entries(out)) if (by > 0.5) found.push([mark.getAttribute('aria-label'), side, by]);
  }
  const widths = [...marks].map(mark => mark.querySelector('.glyph').getBoundingClientRect().width);
  return {outside: found, nodes: marks.length, stage: [stage.width, stage.height], dot: Math.min(...widths)};
}"""
"""Nodes (and their labels) that lie under an axis or beyond an edge, and the smallest mark's width."""

GRAPHS = {
    "26 layers": lambda: large(300, 2500, layers=26, tokens=14),
    "48 layers": lambda: large(400, 3000, layers=48, tokens=14),
    "200 tokens": lambda: large(400, 3000, layers=26, tokens=200),
    "48 layers, 200 tokens": lambda: large(500, 3000, layers=48, tokens=200),
    "one token": lambda: _one_token(),
}


def _one_token() -> AttributionGraph:
    """The target stands in the first column, and its name is long: it reaches to the left, where the axis is."""
    graph = small()
    nodes = tuple(replace(node, pos=0, label="a name that is far too long to stand here") for node in graph.nodes[1:])
    return replace(graph, nodes=nodes, edges=graph.edges[1:, 1:], tokens=(" cat",))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("screen", [(1280, 900), (1366, 650)], ids=str)
def test_all_of_a_graph_lies_inside_its_place(browser: Any, tmp_path: Path, name: str, screen: tuple[int, int]) -> None:
    page = browser.new_context(viewport={"width": screen[0], "height": screen[1]}).new_page()
    page.goto(GRAPHS[name]().save_html(tmp_path / "g.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    _check(page, page)


@pytest.mark.parametrize("name", ["26 layers", "48 layers, 200 tokens"])
@pytest.mark.parametrize("theme", ["true", "false", None], ids=str)
def test_so_it_does_in_the_frame_of_a_notebook(browser: Any, tmp_path: Path, name: str, theme: str | None) -> None:
    page = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
    body = "<body>" if theme is None else f'<body data-jp-theme-light="{theme}">'
    (tmp_path / "n.html").write_text(f"<!doctype html><meta charset=utf-8>{body}{notebook_frame(GRAPHS[name]())}")
    page.goto((tmp_path / "n.html").as_uri())
    inside = page.frames[1]
    inside.wait_for_selector("html[data-ready]")
    _check(page, inside)
    assert inside.evaluate("document.body.getBoundingClientRect().height") <= 760


def test_a_narrow_screen_begins_readable_and_shows_all_when_asked(browser: Any, tmp_path: Path) -> None:
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    page.goto(GRAPHS["26 layers"]().save_html(tmp_path / "g.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    page.wait_for_timeout(100)
    assert page.evaluate(OUTSIDE)["outside"]  # the first view is one that can be read, not one of everything
    _check(page, page)


def test_a_frame_that_is_loaded_without_a_size_is_laid_out_when_it_gets_one(browser: Any, tmp_path: Path) -> None:
    page = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
    frame = notebook_frame(GRAPHS["26 layers"]())
    (tmp_path / "n.html").write_text(f"<!doctype html><meta charset=utf-8><div id=tab style='width:1px'>{frame}</div>")
    page.goto((tmp_path / "n.html").as_uri())
    inside = page.frames[1]
    inside.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate("document.getElementById('tab').style.width = '1000px'")
    page.wait_for_timeout(150)
    _check(page, inside)
    seen = inside.evaluate(OUTSIDE)
    assert seen["stage"][1] == inside.evaluate("document.querySelector('main').getBoundingClientRect().height")


def _check(page: Any, inside: Any) -> None:
    """After “show all”: everything inside, and nothing too small to be seen."""
    before = inside.evaluate(OUTSIDE)["nodes"]
    inside.locator("#zoom-in").click()
    inside.locator("#zoom-in").click()
    page.wait_for_timeout(80)
    assert inside.evaluate(OUTSIDE)["outside"]  # what is asserted below can fail
    inside.locator("#zoom-fit").click()
    page.wait_for_timeout(80)
    seen = inside.evaluate(OUTSIDE)
    assert seen["outside"] == [] and seen["nodes"] == before > 3, seen
    assert seen["dot"] > 1.2, seen
