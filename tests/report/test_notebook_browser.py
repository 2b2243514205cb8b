"""Outputs in the DOM that JupyterLab, VS Code and marimo give them, in a headless Chromium.

JupyterLab sets an output's HTML by ``innerHTML``, so that no ``<script>`` of it runs, and says its theme on the body;
of a notebook that is not trusted it keeps what a sanitiser allows: no frame, no style.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.graph.examples import small
from tests.report.conftest import FakeReport
from tests.report.test_notebook import matrix
from tl_em.report.html import Framed, frame
from tl_em.report.page import render

pytestmark = pytest.mark.browser

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"
LETTERS, HUES = ("rgb(20, 20, 20)", "rgb(230, 230, 230)"), ("rgb(213, 94, 0)", "rgb(240, 138, 60)")
HOSTS = {
    "jupyterlab": ('<body data-jp-theme-light="true">', '<body data-jp-theme-light="false">'),
    "vscode": ('<body class="vscode-light">', '<body class="vscode-dark">'),
    "vscode contrast": (
        '<body class="vscode-high-contrast-light vscode-high-contrast">', '<body class="vscode-high-contrast">'
    ),
    "marimo": (
        '<body class="light light-theme" data-theme="light">', '<body class="dark dark-theme" data-theme="dark">'
    ),
    "colab": ('<script>document.documentElement.setAttribute("theme", "light")</script><body>',
              '<script>document.documentElement.setAttribute("theme", "dark")</script><body>'),
}  # fmt: skip
SANITISED = re.compile(r"<(style|script|iframe)\b.*?</\1>|\sstyle=\"[^\"]*\"", re.DOTALL)
"""What JupyterLab's sanitiser takes out of an output that is not trusted, as far as it matters here."""


class Notebook:
    """A page that stands for a notebook: the host's body, and outputs set by innerHTML."""

    def __init__(
        self, browser: Any, folder: Path, body: str, scheme: Any = "light", size: tuple[int, int] = (1280, 900)
    ):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page = context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.said.append(request.url))
        path = folder / "notebook.html"
        path.write_text(f"<!doctype html><meta charset=utf-8><title>notebook</title>{body}<div id=out></div>", "utf-8")
        self.page.goto(path.as_uri())
        self.said.clear()

    def show(self, output: str) -> None:
        self.page.evaluate(f"document.getElementById('out').innerHTML = {json.dumps(output)}")
        self.page.wait_for_timeout(400)

    def inside(self, script: str) -> Any:
        return self.page.frames[1].evaluate(script)

    @property
    def background(self) -> str:
        return self.inside("getComputedStyle(document.body).backgroundColor")


@pytest.fixture(scope="module")
def outputs(report: FakeReport) -> dict[str, str]:
    return {
        "graph": small()._repr_html_(),
        "report": frame(render(report), "Audit", height=800, scripts=False, instead='report.save("report.html")'),
    }


@pytest.mark.parametrize("what", ["graph", "report"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("browsers", ["light", "dark"])
def test_a_frame_follows_its_hosts_theme(
    browser: Any, tmp_path: Path, outputs: dict[str, str], what: str, host: str, browsers: str
) -> None:
    for body, expected in zip(HOSTS[host], (LIGHT, DARK), strict=True):
        notebook = Notebook(browser, tmp_path, str(body), browsers)
        notebook.show(outputs[what])
        assert notebook.background == expected
        box = notebook.page.locator(".tl-em-frame").bounding_box()
        assert box["height"] == pytest.approx(0.84 * 900, abs=3)
        assert notebook.page.evaluate("document.documentElement.scrollHeight") < 1000  # what is taller is clipped away
        assert [said for said in notebook.said if not said.startswith(("about:", "data:", "blob:"))] == []


def test_it_follows_a_switch_of_the_theme_and_without_a_host_the_browsers(
    browser: Any, tmp_path: Path, outputs: dict[str, str]
) -> None:
    notebook = Notebook(browser, tmp_path, '<body data-jp-theme-light="true">')
    notebook.show(outputs["graph"])
    assert notebook.background == LIGHT
    notebook.inside("document.querySelector('.node.feature .hit').dispatchEvent(new MouseEvent('click'))")
    notebook.page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    notebook.page.wait_for_timeout(300)
    assert notebook.background == DARK and notebook.inside("document.documentElement.dataset.theme") == "dark"
    for scheme, expected in (("light", LIGHT), ("dark", DARK)):
        alone = Notebook(browser, tmp_path, "<body>", scheme)
        for output in outputs.values():
            alone.show(output)
            assert alone.background == expected


@pytest.mark.parametrize("host", [*HOSTS, "none"])
@pytest.mark.parametrize("browsers", ["light", "dark"])
def test_a_picture_has_the_hues_of_its_hosts_theme_and_the_letters_of_the_page(
    browser: Any, tmp_path: Path, host: str, browsers: str
) -> None:
    card = matrix()._repr_html_()
    alone = ["<body>" if browsers == "light" else "<body style='color:#eee;background:#111'>"]
    for at, body in enumerate(HOSTS.get(host, alone)):
        dark = browsers == "dark" if host == "none" else at == 1
        notebook = Notebook(browser, tmp_path, str(body), browsers)
        notebook.page.evaluate(f"document.body.style.color = '{LETTERS[dark]}'")  # as the host's own rules have it
        notebook.show(card + card)  # two outputs share their page
        look = "getComputedStyle(document.querySelector('.tl-em-picture svg [style*=\"--{}\"]')).{}".format
        assert notebook.page.evaluate(look("tuned", "fill")) == HUES[dark]
        assert notebook.page.evaluate(look("ink", "fill")) == LETTERS[dark]
        assert not notebook.page.locator(".tl-em-picture img").first.is_visible()
        assert notebook.page.locator(".tl-em-picture svg").first.bounding_box()["width"] > 500
        notebook.show(SANITISED.sub("", re.sub(r"<svg.*?</svg>", "", card, flags=re.DOTALL)))  # not trusted
        assert notebook.page.locator("#out img").is_visible()


def test_a_notebook_that_is_not_trusted_says_what_it_does_not_show(
    browser: Any, tmp_path: Path, outputs: dict[str, str]
) -> None:
    for name, output in outputs.items():
        trusted = Notebook(browser, tmp_path, '<body data-jp-theme-light="true">')
        trusted.show(output)
        assert not trusted.page.locator(".tl-em-frame p").is_visible() and len(trusted.page.frames) == 2
        stripped = Notebook(browser, tmp_path, '<body data-jp-theme-light="true">')
        stripped.show(SANITISED.sub("", output))
        said = stripped.page.locator("#out").inner_text()
        assert len(stripped.page.frames) == 1
        assert "not trusted" in said and "Trust Notebook" in said and "jupyter trust FILE" in said
        assert {"graph": "graph.save_html", "report": "report.save"}[name] in said and len(said) < 400


@pytest.mark.parametrize("size", [(1280, 900), (1366, 650)], ids=str)
def test_a_frame_fits_the_screen_and_scrolls_within(
    browser: Any, tmp_path: Path, outputs: dict[str, str], size: tuple[int, int]
) -> None:
    notebook = Notebook(browser, tmp_path, '<body data-jp-theme-light="false">', size=size)
    notebook.show(outputs["report"])
    box = notebook.page.locator(".tl-em-frame").bounding_box()
    assert 480 <= box["height"] <= min(800, 0.85 * size[1])
    assert notebook.inside("document.body.clientHeight") == pytest.approx(box["height"], abs=3)
    end = "document.querySelector('footer').getBoundingClientRect().bottom"
    assert notebook.inside(end) > 2 * box["height"]
    notebook.inside("document.body.scrollTo(0, 1e6)")
    assert notebook.inside(end) == pytest.approx(box["height"], abs=60)  # the last line can be reached
    assert notebook.page.locator(".tl-em-frame").evaluate("element => element.scrollTop") == 0


def test_any_page_can_be_framed_and_reads_its_height(browser: Any, tmp_path: Path) -> None:
    notebook = Notebook(browser, tmp_path, '<body data-jp-theme-light="false">')
    notebook.show(Framed("<!doctype html><html><head></head><body>here</body></html>", "A", 300, "x")._repr_html_())
    assert notebook.inside("[innerHeight, document.body.clientHeight]") == [40_300, 300]
