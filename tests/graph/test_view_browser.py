"""The page of a graph in a headless Chromium: what a person does with it, and that nothing leaves it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import visits
from tests.graph.examples import large, small
from tests.graph.test_exchange import broken_rules
from tests.graph.test_view import HOSTILE, hostile
from tests.visits import SCREENS
from tl_em.graph.attention import attention_view
from tl_em.graph.exchange import to_exchange
from tl_em.graph.exchange_reading import load_graph
from tl_em.graph.view import notebook_frame, save_page

pytestmark = pytest.mark.browser
READY_MS = 1500
"""From the opening of the page to its being usable, on two cores."""
SHOWN = "document.querySelectorAll('#drawing .node').length"


class Visit(visits.Visit):
    """The page of a graph, opened and ready."""

    def __init__(self, browser: Any, path: Path, screen: str = "wide", scheme: str = "light") -> None:
        super().__init__(browser, path, screen, scheme)
        self.page.wait_for_selector("html[data-ready]")

    def node(self, name: str) -> Any:
        """The mark of a node, found by what a screen reader says of it."""
        return self.page.locator(f'#drawing .node[aria-label*="{name}"]')

    def inked(self) -> int:
        """Pixels of the canvas that hold anything; read from a copy, because Chromium complains of repeated reads."""
        return self.run(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {"
            "const from = document.querySelector('#links-layer'), copy = document.createElement('canvas');"
            "copy.width = from.width; copy.height = from.height; const pen = copy.getContext('2d');"
            "pen.drawImage(from, 0, 0); done(pen.getImageData(0, 0, copy.width, copy.height).data"
            ".filter((v, i) => i % 4 === 3 && v > 0).length) })))"
        )

    @property
    def card(self) -> str:
        return self.page.locator("#card").inner_text()

    def check(self) -> None:
        """Nothing but the file itself was asked for, and nothing was complained of."""
        outside = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert outside == [self.path.as_uri()]
        assert self.errors == []


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = small(supernodes=(("both", ("0_12_2", "1_7_3")),))
    return save_page(graph, tmp_path_factory.mktemp("graph") / "g.html")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, tuned = small().keep([0, 1, 2, 3, 5]), small()
    tuned = replace(tuned, edges=tuned.edges * 3.0, model="tuned").keep([0, 1, 2, 4, 5])
    return save_page(base.diff(tuned), tmp_path_factory.mktemp("graph") / "diff.html")


@pytest.mark.parametrize("screen", list(SCREENS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_in_time_and_nothing_leaves_the_page(browser: Any, tmp_path: Path, screen: str,
                                                                 scheme: str) -> None:  # fmt: skip
    visit = Visit(browser, save_page(large(300, 3000), tmp_path / "big.html"), screen, scheme)
    visit.page.locator("#all").click()
    assert visit.run(SHOWN) == 300
    assert visit.page.locator("#links-said").inner_text() == "3000 of 3000"
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    assert int(visit.run("document.documentElement.dataset.ready")) < READY_MS
    assert visit.inked() > 5000
    visit.check()


def test_a_click_shows_the_node_and_its_strongest_path(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    assert "Most influence" in visit.card
    visit.node("animal").locator(".hit").click()
    for said in ("animal", "0_12_2", "Activation", "2.5", "1.5", "1.4 [1, 1.8]", "sat"):
        assert said in visit.card
    link = visit.page.locator("#card a")
    assert link.get_attribute("href") == "https://www.neuronpedia.org/x/0/12"
    assert link.get_attribute("rel") == "noopener noreferrer"
    trail = visit.page.locator("#trail .stop").all_inner_texts()
    assert [stop.split(" L")[0] for stop in trail] == ["cat", "animal", "verb next", "sat"]
    assert visit.page.locator("#drawing .node.lit").count() == 4
    inputs = visit.page.locator("#inputs button.row b").all_inner_texts()
    assert inputs == ["cat", "the"]  # strongest first
    visit.page.locator("#outputs button.row").first.click()
    assert "1_7_3" in visit.card
    visit.page.locator(".close").click()
    assert "Most influence" in visit.card
    visit.check()


def test_tracing_up_down_and_direct_differ(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    visit.node("verb next").locator(".hit").click()
    trails = {}
    for choice in ("up", "down", "both", "direct"):
        visit.page.locator(f'#trace [data-choice="{choice}"]').click()
        trails[choice] = [text.split(" L")[0] for text in visit.page.locator("#trail .stop").all_inner_texts()]
    assert trails["up"] == ["cat", "animal", "verb next"]
    assert trails["down"] == ["verb next", "sat"]
    assert trails["both"] == ["cat", "animal", "verb next", "sat"]
    assert trails["direct"] == []
    visit.check()


def test_the_keyboard_alone_walks_selects_and_clears(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    focused = "document.activeElement.getAttribute('aria-label')"
    for _ in range(30):
        visit.page.keyboard.press("Tab")
        if visit.run("document.activeElement.classList.contains('node')"):
            break
    assert visit.run(focused).startswith("target sat")  # one stop for the whole drawing: the target
    visit.page.keyboard.press("ArrowDown")
    assert visit.run(focused).startswith("feature verb next")  # along the strongest link
    visit.page.keyboard.press("ArrowDown")
    assert visit.run(focused).startswith("feature animal")
    visit.page.keyboard.press("ArrowRight")
    assert visit.run(focused).startswith("error")  # along the row
    visit.page.keyboard.press("ArrowLeft")
    visit.page.keyboard.press("Enter")
    assert "0_12_2" in visit.card
    assert "Selected feature animal" in visit.page.locator("#said").inner_text()
    assert visit.node("animal").get_attribute("aria-pressed") == "true"
    visit.page.keyboard.press("ArrowUp")
    assert visit.run(focused).startswith("feature verb next")
    visit.page.keyboard.press("Escape")
    assert "Most influence" in visit.card
    visit.check()


def test_search_marks_what_it_finds_and_enter_takes_it(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    visit.page.keyboard.press("/")
    assert visit.run("document.activeElement.id") == "search"
    visit.page.keyboard.type("verb")
    assert visit.page.locator("#drawing .node.found").count() == 1
    visit.page.keyboard.press("Enter")
    assert "1_7_3" in visit.card
    visit.page.keyboard.press("Escape")
    assert visit.page.locator("#drawing .node.found").count() == 0
    visit.check()


def test_the_sliders_hide_nodes_and_links(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    assert visit.run(SHOWN) == 6
    visit.page.locator("#cutoff").fill("0")
    assert visit.run(SHOWN) == 3  # tokens and targets stay
    visit.page.locator("#cutoff").fill("1000")
    visit.page.locator("#links").fill("0")
    assert visit.page.locator("#links-said").inner_text() == "0 of 7"
    without = visit.inked()
    visit.page.locator("#links").fill("100")
    assert visit.inked() > without + 500
    visit.check()


def test_groups_fold_and_new_ones_are_made_by_hand(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    visit.page.locator("#fold").click()
    assert visit.run(SHOWN) == 5
    assert visit.node("group both, 2 nodes").count() == 1
    visit.page.locator("#fold").click()
    assert visit.run(SHOWN) == 6
    for name in ("token the", "token cat"):
        visit.node(name).locator(".hit").click(modifiers=["Shift"])
    visit.page.locator("#group-name").fill("words")
    visit.page.locator("#group-make").click()
    assert visit.node("group words, 2 nodes").count() == 1
    assert visit.run(SHOWN) == 4
    visit.check()


def test_pan_zoom_and_fit_move_the_drawing(browser: Any, path: Path) -> None:
    visit = Visit(browser, path)
    where = "document.querySelector('.world').getAttribute('transform')"
    seen = [visit.run(where)]
    for act in ("#zoom-in", "#zoom-in"):
        visit.page.locator(act).click()
        visit.page.wait_for_timeout(60)
        seen.append(visit.run(where))
    box = visit.page.locator("#stage").bounding_box()
    visit.page.mouse.move(box["x"] + 120, box["y"] + 200)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 220, box["y"] + 260, steps=4)
    visit.page.mouse.up()
    visit.page.wait_for_timeout(60)
    seen.append(visit.run(where))
    visit.page.mouse.wheel(0, -300)
    visit.page.wait_for_timeout(60)
    seen.append(visit.run(where))
    assert len(set(seen)) == len(seen)
    visit.page.locator("#zoom-fit").click()
    visit.page.wait_for_timeout(60)
    assert visit.run(where) == seen[0]
    visit.check()


def test_the_difference_shows_base_tuned_and_both(browser: Any, changed: Path) -> None:
    visit = Visit(browser, changed)
    assert visit.run(SHOWN) == 6
    for status in ("appeared", "vanished"):
        assert visit.page.locator(f"#drawing .node.{status}").count() == 1
    looks = "(s => [getComputedStyle(s).fill, getComputedStyle(s).strokeDasharray])(document.querySelector"
    new, gone = (visit.run(f"{looks}('#drawing .node.{status} .glyph'))") for status in ("appeared", "vanished"))
    assert new[0] != gone[0] and new[1] != gone[1]  # by colour and by texture
    assert visit.run("document.querySelectorAll('#drawing .node.appeared .badge[d]').length") == 1
    at = visit.node("animal").get_attribute("transform")
    visit.page.locator('#modes [data-choice="base"]').click()
    assert visit.run(SHOWN) == 5 and visit.page.locator("#drawing .node.appeared").count() == 0
    assert visit.node("verb next").is_hidden()
    visit.page.locator('#modes [data-choice="tuned"]').click()
    assert visit.run(SHOWN) == 5 and visit.node("error").is_hidden()
    assert visit.node("animal").get_attribute("transform") == at
    visit.page.locator('#modes [data-choice="diff"]').click()
    visit.node("verb next").locator(".hit").click()
    assert "appeared" in visit.card and "In base" in visit.card
    visit.check()


def test_either_graph_of_a_difference_can_be_taken_away(browser: Any, changed: Path, tmp_path: Path) -> None:
    visit = Visit(browser, changed)
    found = {}
    for mode in ("base", "tuned"):
        visit.page.locator(f'#modes [data-choice="{mode}"]').click()
        visit.page.locator("#save summary").click()
        with visit.page.expect_download() as waiting:
            visit.page.locator("#save-json").click()
        waiting.value.save_as(tmp_path / mode)
        found[mode] = load_graph(tmp_path / mode)
    base = small().keep([0, 1, 2, 3, 5])
    assert found["base"].nodes == base.nodes and torch.equal(found["base"].edges, base.edges)
    assert found["tuned"].model == "tuned" and found["tuned"].nodes == small().keep([0, 1, 2, 4, 5]).nodes
    visit.check()


def test_downloads_hold_what_they_say(browser: Any, path: Path, tmp_path: Path) -> None:
    visit = Visit(browser, path)
    visit.node("animal").locator(".hit").click()
    files = {}
    for kind in ("json", "svg", "png"):
        visit.page.locator("#save summary").click()
        with visit.page.expect_download() as waiting:
            visit.page.locator(f"#save-{kind}").click()
        files[kind] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[kind])
    plain = json.loads(files["json"].read_text())
    assert broken_rules(plain) == []
    assert plain["qParams"]["clickedId"] == "0_12_2"
    assert load_graph(files["json"]).nodes == small().nodes
    assert (plain["nodes"], plain["links"]) == itemgetter("nodes", "links")(to_exchange(small()))
    drawn = files["svg"].read_text()
    assert drawn.startswith("<svg") and "<script" not in drawn and "animal" in drawn
    assert drawn.count("<path") >= 6 + 7
    head = files["png"].read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:24])) > 200
    visit.check()


def test_the_theme_follows_the_reader_and_can_be_switched(browser: Any, path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (Visit(browser, path, scheme=scheme) for scheme in ("light", "dark"))
    assert light.run(background) != dark.run(background)
    was = dark.run(background)
    light.page.locator("#theme").click()
    assert light.run(background) == was
    light.check()


@pytest.mark.parametrize("screen", list(SCREENS))
def test_hostile_tokens_do_nothing(browser: Any, tmp_path: Path, screen: str) -> None:
    visit = Visit(browser, save_page(hostile(), tmp_path / "g.html"), screen)
    visit.page.locator("#drawing .node.feature .hit").first.click()
    assert HOSTILE[:30] in visit.card  # shown, as text
    assert visit.page.locator("#card a").count() == 0
    for kind in ("svg", "png"):
        visit.page.locator("#save summary").click()
        with visit.page.expect_download():
            visit.page.locator(f"#save-{kind}").click()
    assert visit.run("document.images.length") == 0 and visit.run("document.scripts.length") == 2
    assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
    visit.check()


def test_the_notebook_frame_works_in_its_sandbox(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><title>notebook</title>{notebook_frame(small())}")
    page = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True).new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    inside = page.frame_locator("iframe")
    inside.locator('.node[aria-label*="animal"] .hit').click()
    assert "0_12_2" in inside.locator("#card").inner_text()
    inside.locator("#save summary").click()
    with page.expect_download() as waiting:
        inside.locator("#save-json").click()
    assert waiting.value.suggested_filename.endswith(".json")
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["overview", "card"])
def test_axe_finds_no_serious_fault(browser: Any, path: Path, changed: Path, scheme: str, state: str) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="pip install axe-core-python").Axe()
    for each in (path, changed):
        visit = Visit(browser, each, scheme=scheme)
        if state == "card":
            visit.node("animal").locator(".hit").click()
        found = axe.run(visit.page)["violations"]
        said = [(fault["id"], fault["impact"], [node["html"][:120] for node in fault["nodes"][:3]]) for fault in found]
        assert [fault for fault in said if fault[1] in ("serious", "critical")] == []


def test_attention_patterns_are_drawn_offline(browser: Any, small_model: Any, tmp_path: Path) -> None:
    pytest.importorskip("circuitsvis")
    path = tmp_path / "attention.html"
    frame = attention_view(small_model, "the cat sat", 0).__html__()
    path.write_text(f"<!doctype html><meta charset=utf-8><title>notebook</title>{frame}")
    page = browser.new_context(viewport={"width": 1100, "height": 700}).new_page()
    said: list[str] = []
    page.on("request", lambda request: said.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    inside = page.frame_locator("iframe")
    inside.get_by_text("Head 3", exact=True).first.wait_for()
    assert inside.locator("canvas").count() >= 1
    assert [each for each in said if not each.startswith(("data:", "blob:", "about:"))] == [path.as_uri()]
