"""The page of a large graph: folded until it is opened, its words, its map, and what it gives to files and paper."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.graph.examples import large
from tests.graph.test_view import HOSTILE
from tests.graph.test_view_browser import SHOWN, Visit
from tests.graph.test_view_fits import OUTSIDE
from tests.visits import SCREENS
from tl_em.graph import captions
from tl_em.graph.diff import FLOOR, _status
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.layout import FOLDED_ABOVE, layout
from tl_em.graph.view import page_data, save_page

pytestmark = pytest.mark.browser
LAYERS, TOKENS = 26, 73
WHERE = "document.querySelector('.world').getAttribute('transform')"
CELLS = "[...document.querySelectorAll('#drawing .node.cell')].map(each => each.getAttribute('aria-label'))"

SLICED = """() => [...document.querySelectorAll('#sheets > svg > svg')].flatMap(part => {
  const {x, y, width, height} = part.viewBox.baseVal, to = part.getScreenCTM();
  const [from, until] = [[x, y], [x + width, y + height]].map(([a, b]) => new DOMPoint(a, b).matrixTransform(to));
  return [...part.querySelectorAll('.mark')].map(mark => mark.firstChild.getBoundingClientRect()).filter(box =>
    box.left < from.x - 1 || box.right > until.x + 1 || box.top < from.y - 1 || box.bottom > until.y + 1);
})"""
"""Marks on paper that the edge of their part goes through."""


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return large(2000, 20_000, layers=LAYERS, tokens=TOKENS)


@pytest.fixture(scope="module")
def path(graph: AttributionGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_page(graph, tmp_path_factory.mktemp("graph") / "g.html")


@pytest.fixture(scope="module")
def cells(graph: AttributionGraph) -> dict[str, list[int]]:
    """Rows of the nodes of each cell, by the name that the page gives it."""
    place = layout(graph.nodes, graph.tokens)
    bands = [[int(place.rows[row].name) for row in rows] for rows in place.bands]
    found: dict[str, list[int]] = defaultdict(list)
    for row, node in enumerate(graph.nodes):
        for layers in bands:
            if node.kind not in ("token", "logit") and node.layer in layers:
                name = f"L{layers[-1]}–{layers[0]}" if len(layers) > 1 else f"L{layers[0]}"
                found[f"{name} at word{node.pos} ({node.pos})"].append(row)
    return found


def marks_of(visit: Visit) -> Counter[str]:
    return Counter(visit.run("[...document.querySelectorAll('#drawing .node')].map(m => m.getAttribute('aria-label'))"))


def a_cell(visit: Visit, cells: dict[str, list[int]], least: int = 4) -> str:
    """The name of a cell in sight, with so many nodes."""
    within = (
        "[...document.querySelectorAll('#drawing .node.cell')].filter(m => { const b = m.getBoundingClientRect(),"
        "s = document.getElementById('stage').getBoundingClientRect(); return b.left > s.left + 200 &&"
        "b.right < s.right - 60 && b.top > s.top + 70 && b.bottom < s.bottom - 70 })"
        ".map(m => m.getAttribute('aria-label').slice(6).split(', ')[0])"
    )
    return next(name for name in visit.run(within) if len(cells[name]) >= least)


def test_layers_are_folded_above_the_size_and_not_at_it(browser: Any, tmp_path: Path) -> None:
    small = Visit(browser, save_page(large(FOLDED_ABOVE, 600), tmp_path / "small.html"))
    assert small.run(SHOWN) == FOLDED_ABOVE and small.run(CELLS) == []
    for control in ("#all", "#map", "#bands button"):
        assert not small.page.locator(control).first.is_visible()
    big = Visit(browser, save_page(large(FOLDED_ABOVE + 1, 600), tmp_path / "big.html"))
    assert big.run(SHOWN) < 80 and big.run(CELLS) and big.page.locator("#bands button").count() == 4
    big.check()


@pytest.mark.parametrize("screen", list(SCREENS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_node_stands_behind_one_mark(browser: Any, path: Path, cells: dict[str, list[int]], screen: str,
                                           scheme: str) -> None:  # fmt: skip
    visit = Visit(browser, path, screen, scheme)
    folded = {name: rows for name, rows in cells.items() if len(rows) > 1}
    said = [re.fullmatch(r"group (.*?), (\d+) nodes.*", label) for label in visit.run(CELLS)]
    assert {found[1]: int(found[2]) for found in said if found} == {name: len(rows) for name, rows in folded.items()}
    written = visit.run("[...document.querySelectorAll('#drawing .node .count')].map(each => Number(each.textContent))")
    alone = len(cells) - len(folded)
    assert sum(written) + alone + TOKENS + 1 == 2000
    assert visit.run(SHOWN) == len(folded) + alone + TOKENS + 1
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    visit.check()


def test_a_group_opens_by_a_click_and_folds_by_another(browser: Any, path: Path, graph: AttributionGraph,
                                                       cells: dict[str, list[int]]) -> None:  # fmt: skip
    visit = Visit(browser, path)
    before, name = marks_of(visit), a_cell(visit, cells)
    mark = visit.node(f"group {name},")
    at = mark.bounding_box()
    mark.locator(".glyph").click()
    assert mark.count() == 0
    opened = marks_of(visit) - before
    assert sum(opened.values()) == len(cells[name]) and sum((before - marks_of(visit)).values()) == 1
    assert visit.page.locator("#card h2").inner_text() == name
    summed = sum(graph.nodes[row].attribution or 0.0 for row in cells[name])
    said = visit.page.locator("#card .facts dd").all_inner_texts()
    assert said[0] == str(len(cells[name])) and float(said[1].replace("−", "-")) == pytest.approx(summed, rel=6e-3)
    assert visit.page.locator("#drawing .node.lit").count() > 1  # it is traced as one
    handle = visit.page.locator("#drawing .handle")
    assert handle.count() == 1
    handle.locator("rect").click()
    assert marks_of(visit) == before and visit.node(f"group {name},").get_attribute("aria-pressed") == "true"
    assert visit.page.locator("#drawing .handle").count() == 0
    now = visit.node(f"group {name},").bounding_box()
    assert abs(now["x"] - at["x"]) < 60 and abs(now["y"] - at["y"]) < 120  # where it was, or brought into sight
    visit.check()


def test_a_line_between_groups_is_the_sum_of_its_links(browser: Any, path: Path, graph: AttributionGraph,
                                                       cells: dict[str, list[int]]) -> None:  # fmt: skip
    visit = Visit(browser, path)
    name = a_cell(visit, cells, 5)
    visit.node(f"group {name},").locator(".glyph").click()
    visit.page.locator("#drawing .handle rect").click()
    rows = visit.page.locator("#outputs .row, #inputs .row").all()
    checked = 0
    for row, into in [(row, row.evaluate("each => Boolean(each.closest('#inputs'))")) for row in rows]:
        other, weight = row.locator(".where").inner_text(), row.locator(".num").inner_text().split()[0]
        if other in cells and len(cells[other]) > 1:
            ends = (cells[name], cells[other]) if into else (cells[other], cells[name])
            summed = float(graph.edges[ends[0]][:, ends[1]].sum())
            assert float(weight.replace("−", "-")) == pytest.approx(summed, rel=6e-3, abs=1e-3)
            checked += 1
    assert checked > 3
    visit.check()


def test_the_strongest_sums_are_drawn_in_the_colour_of_their_sign(browser: Any, path: Path, tmp_path: Path,
                                                                  graph: AttributionGraph,
                                                                  cells: dict[str, list[int]]) -> None:  # fmt: skip
    home = {row: name for name, rows in cells.items() for row in rows}
    sums: dict[tuple[Any, Any], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for source, target, weight, _, score in page_data(graph)["view"]["links"]:
        ends = home.get(source, source), home.get(target, target)
        if ends[0] != ends[1]:
            sums[ends][0] += score
            sums[ends][1] += weight
    strongest = sorted(sums.values(), key=lambda each: -each[0])[:300]
    visit = Visit(browser, path)
    assert visit.page.locator("#links-said").inner_text() == f"300 of {len(sums)}"
    visit.page.locator("#save summary").click()
    with visit.page.expect_download() as waiting:
        visit.page.locator("#save-svg").click()
    waiting.value.save_as(tmp_path / "g.svg")
    colours = {name: visit.run(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
               for name in ("pos", "neg")}  # fmt: skip
    drawn = re.findall(r'<path class="link"[^>]*stroke="(#\w+)"[^>]*stroke-width="([\d.]+)"',
                       (tmp_path / "g.svg").read_text(encoding="utf-8"))  # fmt: skip
    widths = [0.5 + 3.4 * (score / strongest[0][0]) ** 0.5 for score, _ in strongest]
    assert [float(width) for _, width in drawn] == pytest.approx(widths, abs=0.02)
    assert [colour for colour, _ in drawn] == [colours["pos" if weight >= 0 else "neg"] for _, weight in strongest]


def test_a_band_opens_and_folds_by_its_name(browser: Any, path: Path, cells: dict[str, list[int]]) -> None:
    visit = Visit(browser, path)
    before = marks_of(visit)
    band = visit.page.locator("#bands button").nth(3)
    name = band.inner_text().lstrip("▸▾").strip()
    inside = sum(len(rows) for each, rows in cells.items() if each.startswith(f"{name} at"))
    others = sum(before.values()) - sum(each.startswith(f"{name} at") for each in cells)
    assert band.get_attribute("aria-expanded") == "false"
    band.click()
    assert band.get_attribute("aria-expanded") == "true" and visit.run(SHOWN) == others + inside
    assert not [label for label in visit.run(CELLS) if label.startswith(f"group {name} at")]
    band.focus()
    visit.page.keyboard.press("Enter")
    assert marks_of(visit) == before and band.get_attribute("aria-expanded") == "false"
    visit.check()


def test_the_keyboard_opens_walks_and_folds(browser: Any, path: Path, cells: dict[str, list[int]]) -> None:
    visit = Visit(browser, path)
    focused = "document.activeElement.getAttribute('aria-label')"
    before = marks_of(visit)
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        if visit.run("document.activeElement.classList.contains('node')"):
            break
    assert visit.run(focused).startswith("target end")
    for key in ("ArrowDown", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowLeft", "ArrowRight"):
        visit.page.keyboard.press(key)
        if visit.run(focused).startswith("group "):
            break
    name = visit.run(focused).removeprefix("group ").split(", ")[0]
    visit.page.keyboard.press("Enter")
    assert sum((marks_of(visit) - before).values()) == len(cells[name]) > 1
    assert visit.run("document.activeElement.classList.contains('node')")  # one of its nodes
    assert not visit.run(focused).startswith("group ")
    visit.page.keyboard.press("Backspace")
    assert marks_of(visit) == before and visit.run(focused).startswith(f"group {name},")
    visit.check()


@pytest.mark.parametrize("screen", list(SCREENS))
def test_show_all_shows_every_node_and_link(browser: Any, path: Path, screen: str) -> None:
    visit = Visit(browser, path, screen)
    before, few = marks_of(visit), visit.inked()
    visit.page.locator("#cutoff").fill("400")
    visit.page.locator("#all").click()
    visit.page.wait_for_timeout(300)
    assert visit.run(SHOWN) == 2000 and visit.page.locator("#links-said").inner_text() == "20000 of 20000"
    assert visit.page.locator("#all").get_attribute("aria-pressed") == "true"
    assert visit.run(f"({OUTSIDE})()")["outside"] == [] and visit.inked() > few
    assert visit.page.locator("#map").is_hidden()  # there is nothing beyond the edge
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    visit.page.locator("#all").click()
    assert marks_of(visit) == before and visit.page.locator("#all").get_attribute("aria-pressed") == "false"
    visit.check()


@pytest.mark.parametrize("screen", list(SCREENS))
def test_the_map_moves_the_view(browser: Any, path: Path, screen: str) -> None:
    visit = Visit(browser, path, screen)
    box = visit.page.locator("#map").bounding_box()
    names = "[...document.querySelectorAll('.axes text')].map(each => each.textContent)"

    def settled(act: Any) -> tuple[str, list[str], int]:
        act()
        visit.page.wait_for_timeout(80)
        return visit.run(WHERE), visit.run(names), int(visit.page.locator("#map").get_attribute("aria-valuenow"))

    first = settled(lambda: None)
    assert "word72" in first[1] and "word0" not in first[1]  # it begins at the target
    left = settled(lambda: visit.page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2))
    assert "word0" in left[1] and "word72" not in left[1] and left[2] < first[2]
    visit.page.mouse.down()
    dragged = settled(lambda: visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9, steps=3))
    visit.page.mouse.up()
    assert "word36" in dragged[1] and left[2] < dragged[2] < first[2]
    key = settled(lambda: visit.page.keyboard.press("ArrowRight"))
    assert key[2] > dragged[2]
    visit.check()


def test_tokens_stay_with_their_columns_while_the_canvas_moves(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    apart = """() => {
      const label = {}, found = [];
      for (const each of document.querySelectorAll('.axes text')) {
        const [x, y] = ['x', 'y'].map(name => Number(each.getAttribute(name)));
        label[each.textContent] = new DOMPoint(x, y).matrixTransform(each.getScreenCTM()).x;
      }
      for (const mark of document.querySelectorAll('#drawing .node.token')) {
        const box = mark.querySelector('.glyph').getBoundingClientRect();
        const name = mark.getAttribute('aria-label').split(' ')[1].replace(',', '');
        if (name in label) found.push([name, label[name] - (box.left + box.right) / 2]);
      }
      return found;
    }"""
    seen = []
    box = visit.page.locator("#stage").bounding_box()
    for act in ("rest", "drag", "zoom"):
        if act == "drag":
            visit.page.mouse.move(box["x"] + 300, box["y"] + 80)
            visit.page.mouse.down()
            visit.page.mouse.move(box["x"] + 560, box["y"] + 90, steps=4)
            visit.page.mouse.up()
        elif act == "zoom":
            visit.page.locator("#zoom-in").click()
        visit.page.wait_for_timeout(80)
        found = visit.run(f"({apart})()")
        assert len(found) > 10 and all(abs(by) < 8 for _, by in found), found
        seen.append({name for name, _ in found})
    assert seen[0] != seen[1] != seen[2]
    high = "[...document.querySelectorAll('.axes text')].map(each => parseFloat(getComputedStyle(each).fontSize))"
    assert min(visit.run(high)) >= 11  # pixels, whatever the zoom


def test_a_search_opens_what_it_finds(browser: Any, tmp_path: Path, graph: AttributionGraph) -> None:
    row = next(row for row, node in enumerate(graph.nodes) if node.kind == "feature" and node.layer == 9)
    nodes = tuple(replace(node, label="a needle") if at == row else node for at, node in enumerate(graph.nodes))
    visit = Visit(browser, save_page(replace(graph, nodes=nodes), tmp_path / "g.html"))
    before = marks_of(visit)
    assert visit.node("feature a needle").count() == 0
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("needle")
    assert visit.node("feature a needle").count() == 1
    assert "found" in visit.node("feature a needle").get_attribute("class")
    assert visit.page.locator("#said").inner_text() == "1 nodes found"
    stage, mark = (visit.page.locator(each).bounding_box() for each in ("#stage", "#drawing .node.found .glyph"))
    for along, size in (("x", "width"), ("y", "height")):
        assert stage[along] < mark[along] < stage[along] + stage[size]
    visit.page.locator("#search").fill("")
    assert marks_of(visit) == before
    visit.page.locator("#search").fill("needle")
    visit.page.keyboard.press("Enter")
    assert visit.page.locator("#card h2").inner_text() == "a needle"
    visit.page.locator("#search").fill("")
    assert visit.node("feature a needle").count() == 1  # what was taken stays open
    visit.check()


def test_supernodes_come_before_cells(browser: Any, tmp_path: Path) -> None:
    graph = large(400, 3000, layers=12)
    rows = [row for row, node in enumerate(graph.nodes) if node.kind == "feature"][5:200:60]
    named = replace(graph, supernodes=(("a role", tuple(graph.nodes[row].id for row in rows)),))
    visit = Visit(browser, save_page(named, tmp_path / "g.html"))
    plain = Visit(browser, save_page(graph, tmp_path / "plain.html"))
    counts = "[...document.querySelectorAll('#drawing .node .count')]"
    written = f"{counts}.reduce((n, each) => n + Number(each.textContent), 0)"
    assert len(rows) == 4 and visit.node("group a role, 4 nodes").count() == 1
    ones = "document.querySelectorAll('#drawing .node:not(.group)').length"
    assert visit.run(written) + visit.run(ones) == 396 and plain.run(written) + plain.run(ones) == 400
    visit.node("group a role, 4 nodes").locator(".glyph").click()
    assert visit.run(written) + visit.run(ones) == 400
    visit.page.locator("#fold").click()
    assert visit.page.locator("#fold").get_attribute("aria-pressed") == "false"
    visit.check()


def test_the_words_are_pythons_and_stand_first(browser: Any, path: Path, graph: AttributionGraph) -> None:
    sentences = [each.said for each in captions.paths(graph)[0][1]]
    assert len(sentences) == 5 and all(each in graph.summary for each in sentences)
    visit = Visit(browser, path)
    assert visit.page.locator("#words li").all_inner_texts() == sentences
    first = "document.querySelector('h1').compareDocumentPosition(document.getElementById('words'))"
    assert visit.run(f"{first} & Node.DOCUMENT_POSITION_FOLLOWING")
    before = "[...document.querySelectorAll('button, input, aside, canvas, svg')].filter(e => !e.closest('#words'))"
    following = f"{before}.every(e => document.getElementById('words').compareDocumentPosition(e) & 4)"
    assert visit.run(following)
    reader = browser.new_context(java_script_enabled=False).new_page()
    reader.goto(path.as_uri())
    shown = reader.locator("body").inner_text()
    assert [shown.index(each) for each in sentences] == sorted(shown.index(each) for each in sentences)
    assert "Not validated" not in shown and "Drawn: all 2,000 nodes" in shown
    visit.check()


def test_a_sentence_lights_its_path(browser: Any, path: Path, graph: AttributionGraph) -> None:
    visit = Visit(browser, path)
    sentence = next(at for at, each in enumerate(captions.paths(graph)[0][1]) if len(each.nodes) > 2)
    length = len(captions.paths(graph)[0][1][sentence].nodes)
    button = visit.page.locator("#words .path").nth(sentence)
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert 2 <= visit.page.locator("#drawing .node.lit").count() <= length
    visit.page.locator("#all").click()
    assert visit.page.locator("#drawing .node.lit").count() == length
    button.click()
    assert button.get_attribute("aria-pressed") == "false" and visit.page.locator("#drawing .node.lit").count() == 0
    visit.check()


@pytest.mark.parametrize("act", ["folded", "band", "traced", "all"])
def test_files_and_paper_hold_what_is_drawn(browser: Any, path: Path, tmp_path: Path, act: str) -> None:
    visit = Visit(browser, path)
    if act == "band":
        visit.page.locator("#bands button").nth(2).click()
    elif act == "all":
        visit.page.locator("#all").click()
    elif act == "traced":
        visit.page.locator("#words .path").nth(1).click()
    visit.page.locator("#save summary").click()
    with visit.page.expect_download() as waiting:
        visit.page.locator("#save-svg").click()
    waiting.value.save_as(tmp_path / "g.svg")
    drawn = (tmp_path / "g.svg").read_text(encoding="utf-8")
    marks, lines = visit.run(SHOWN), int(visit.page.locator("#links-said").inner_text().split()[0])
    assert drawn.count('class="mark"') == marks
    lit = drawn.count('class="halo"')
    assert drawn.count('class="link"') == lines + lit and (lit > 0) == (act == "traced")
    sized = [float(each) for each in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)[0]]
    assert all(f">word{pos}<" in drawn for pos in range(TOKENS))  # no name is cut
    inside = browser.new_context().new_page()
    inside.goto((tmp_path / "g.svg").as_uri())
    edge = inside.evaluate("(b => [b.x, b.y, b.x + b.width, b.y + b.height])(document.querySelector('g').getBBox())")
    moved = [float(each) for each in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", drawn)[0]]
    assert edge[0] + moved[0] >= -1 and edge[2] + moved[0] <= sized[0] + 1 and edge[3] + moved[1] <= sized[1] + 1
    visit.page.emulate_media(media="print")
    visit.page.wait_for_timeout(100)
    sheets = visit.page.locator("#sheets svg")
    assert sheets.count() > 1 and visit.page.locator("#stage").is_hidden()
    assert visit.page.locator("#words ol").is_visible()
    assert visit.page.locator("#sheets .mark").count() == marks  # cut between tokens and layers, so each stands once
    names = Counter(visit.page.locator("#sheets text").all_text_contents())
    assert len({names[f"word{pos}"] for pos in range(TOKENS)}) == 1 and names["word0"] >= 1
    assert visit.run(f"({SLICED})()") == []
    scales = visit.run("[...document.querySelectorAll('#sheets > svg')].map(s => s.getScreenCTM().a)")
    assert min(scales) > 0.75  # letters of 11 pixels stay legible
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS["wide"][0]
    visit.page.emulate_media(media="screen")
    visit.page.wait_for_timeout(100)
    assert sheets.count() == 0 and visit.page.locator("#stage").is_visible() and visit.run(SHOWN) == marks
    assert all(url.startswith(("file:", "data:", "blob:")) for url in visit.requests) and visit.errors == []


def test_a_difference_folds_too_and_a_group_says_what_became_of_it(browser: Any, tmp_path: Path) -> None:
    whole = large(600, 5000, layers=20, tokens=30)
    scale = torch.linspace(0.2, 1.9, 600)[:, None]
    features = [row for row, node in enumerate(whole.nodes) if node.kind not in ("token", "logit")]
    gone = {side: {*features[at::9], *(row for row in features if whole.nodes[row].pos == pos)}
            for side, at, pos in (("base", 0, 5), ("tuned", 4, 9))}  # fmt: skip
    base = whole.keep([row for row in range(600) if row not in gone["base"]])
    louder = tuple(replace(node, attribution=None if node.attribution is None else node.attribution * (0.3 + at / 400))
                   for at, node in enumerate(whole.nodes))  # fmt: skip
    tuned = replace(whole, nodes=louder, edges=whole.edges * scale)
    tuned = tuned.keep([row for row in range(600) if row not in gone["tuned"]])
    diff = base.diff(tuned)
    view = page_data(diff)["view"]
    visit = Visit(browser, save_page(diff, tmp_path / "d.html"))
    sizes = [abs(row.base or 0.0) for row in diff.nodes] + [abs(row.tuned or 0.0) for row in diff.nodes]
    said: dict[str, str] = {}
    for label in visit.run(CELLS):
        said[label.removeprefix("group ").split(", ")[0]] = label.rsplit(", ", 1)[1]
    bands = {int(view["rows"][row]["name"]): band["name"] for band in view["bands"] for row in band["rows"]}
    found: dict[str, list[Any]] = defaultdict(list)
    for node in view["nodes"]:
        if node["kind"] not in ("token", "logit"):
            found[f"{bands[node['layer']]} at word{node['pos']} ({node['pos']})"].append(node)
    expected = {}
    for name, members in found.items():
        if len(members) > 1:
            sums = [sum(values) if (values := [n[side] for n in members if n[side] is not None]) else None
                    for side in ("base", "tuned")]  # fmt: skip
            expected[name] = _status(sums[0], sums[1], view["least"], FLOOR * max(sizes))
    assert said == expected and set(said.values()) == {"appeared", "vanished", "stronger", "weaker", "same"}
    for mode in ("base", "tuned", "diff"):
        visit.page.locator(f'#modes [data-choice="{mode}"]').click()
        assert visit.run(CELLS)
    visit.page.locator("#all").click()
    assert visit.run(SHOWN) == len(view["nodes"])
    assert visit.page.locator("#words h2").all_inner_texts() == ["Tuned", "Base"]
    assert visit.page.locator("#words li").count() == 10
    visit.check()


def test_hostile_names_do_nothing_at_size_either(browser: Any, tmp_path: Path) -> None:
    graph = large(220, 1500)
    nodes = tuple(replace(node, label=HOSTILE) for node in graph.nodes)
    some = tuple(node.id for node in nodes if node.kind == "feature")[:3]
    graph = replace(graph, nodes=nodes, tokens=(HOSTILE,) * len(graph.tokens), model=HOSTILE,
                    supernodes=((HOSTILE, some),))  # fmt: skip
    visit = Visit(browser, save_page(graph, tmp_path / "g.html"), "narrow")
    assert visit.run("document.images.length") == 0 and "<script" in visit.page.locator("#words").inner_text()
    visit.page.locator("#words .path").first.click()
    visit.page.locator("#drawing .node.cell").first.focus()
    visit.page.keyboard.press("Enter")
    visit.page.locator("#all").click()
    visit.page.emulate_media(media="print")
    visit.page.wait_for_timeout(60)
    assert visit.run("document.images.length") == 0 and visit.run("document.scripts.length") == 2
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS["narrow"][0]
    visit.check()


@pytest.mark.parametrize("state", ["folded", "open"])
def test_axe_finds_no_serious_fault_at_size(browser: Any, tmp_path: Path, state: str) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="pip install axe-core-python").Axe()
    visit = Visit(browser, save_page(large(300, 3000, layers=26, tokens=40), tmp_path / "g.html"))
    if state == "open":
        visit.page.locator("#drawing .node.cell").first.focus()
        visit.page.keyboard.press("Enter")
    found = axe.run(visit.page)["violations"]
    said = [(fault["id"], fault["impact"], [node["html"][:120] for node in fault["nodes"][:3]]) for fault in found]
    assert [fault for fault in said if fault[1] in ("serious", "critical")] == []


def test_a_view_that_was_moved_stays_when_its_place_changes(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    first = visit.run(WHERE)
    visit.page.locator("#words summary").click()
    visit.page.wait_for_timeout(100)
    roomy = visit.run(WHERE)
    assert roomy != first  # nobody had moved it: it takes the new room
    visit.page.locator("#map").click(position={"x": 5, "y": 5})
    visit.page.wait_for_timeout(100)
    moved = visit.run(WHERE)
    visit.page.locator("#words summary").click()
    visit.page.emulate_media(media="print")
    visit.page.wait_for_timeout(100)
    visit.page.emulate_media(media="screen")
    visit.page.wait_for_timeout(100)
    assert visit.run(WHERE) == moved != roomy
    visit.check()


@pytest.mark.parametrize("screen", [(1366, 650), (390, 844)], ids=str)
def test_long_words_leave_room_for_the_drawing(browser: Any, tmp_path: Path, screen: tuple[int, int]) -> None:
    graph = large(300, 600, layers=26, tokens=40)
    graph = replace(graph, nodes=tuple(replace(node, label="a long label " * 9) for node in graph.nodes))
    page = browser.new_context(viewport={"width": screen[0], "height": screen[1]}).new_page()
    page.goto(graph.diff(replace(graph, edges=graph.edges * 2)).save_html(tmp_path / "g.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    words, drawn = (page.locator(each).bounding_box() for each in ("#words", "#stage"))
    assert words["height"] < 0.5 * screen[1] and drawn["height"] >= 240
    if screen[0] > 760:
        assert drawn["y"] + 200 < screen[1]  # more than half of it without scrolling
    assert page.evaluate("document.querySelector('#words div').scrollHeight") > words["height"]  # it is long
    assert page.evaluate("document.documentElement.scrollWidth") <= screen[0]
    page.emulate_media(media="print")
    assert page.locator("#words").bounding_box()["height"] > words["height"]  # and whole on paper
