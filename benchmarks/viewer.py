"""The page of a graph against its budgets: how large, how long to make, how long until it can be used.

    python benchmarks/viewer.py --nodes 300 --links 3000

prints for light and dark, wide and narrow: bytes (budget 1 MB), seconds to make, milliseconds from opening to usable
(budget 1,500 on two cores), milliseconds from a click to the trace being drawn, requests, console messages. Needs
Chromium and playwright. The graphs are random; their values do not matter to any of this.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.view import save_page

SCREENS = {"wide": (1280, 800), "narrow": (390, 844)}
CLICK = """() => new Promise(done => {
  const mark = [...document.querySelectorAll('#drawing .node.feature')][40], from = performance.now();
  mark.focus(); mark.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}));
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - from)));
})"""


def random_graph(n_nodes: int, n_links: int, *, tokens: int = 16, layers: int = 12, seed: int = 0) -> AttributionGraph:
    """Tokens, latents and one target, with this many random links that point forward."""
    draw = random.Random(seed)
    nodes = [Node("token", -1, pos, 100 + pos, label=f" word{pos}") for pos in range(tokens)]
    places = {(draw.randrange(layers), draw.randrange(tokens), draw.randrange(16_384)) for _ in range(4 * n_nodes)}
    for layer, pos, number in sorted(draw.sample(sorted(places), n_nodes - tokens - 1)):
        size = draw.gauss(0, 1)
        label = f"notion {number}"
        extra = {"explanation": "a sentence about what it fires on", "top": [" one", " two", " three"]}
        nodes.append(Node("feature", layer, pos, number, activation=abs(size), attribution=size, label=label,
                          extra=extra))  # fmt: skip
    nodes.append(Node("logit", layers, tokens - 1, 500, label=" end", weight=0.7))
    pairs = [(s, t) for t in range(tokens, n_nodes) for s in range(t)
             if nodes[s].pos <= nodes[t].pos and nodes[s].layer < nodes[t].layer]  # fmt: skip
    edges = torch.zeros(n_nodes, n_nodes)
    for s, t in draw.sample(pairs, n_links):
        edges[t, s] = draw.gauss(0, 1)
    text = tuple(f" word{pos}" for pos in range(tokens))
    return AttributionGraph(tuple(nodes), edges, text, model="random")


def visit(browser: Any, path: Path, screen: str, scheme: str) -> tuple[float, float, int, int]:
    """Milliseconds to usable and to a drawn trace, requests beside the file itself, console messages."""
    width, height = SCREENS[screen]
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    ready = float(page.evaluate("document.documentElement.dataset.ready"))
    traced = float(page.evaluate(CLICK))
    page.close()
    return ready, traced, len(asked) - 1, len(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--links", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    graph = random_graph(asked.nodes, asked.links)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        started = time.perf_counter()
        path = save_page(graph, Path(folder) / "g.html")
        print(f"{asked.nodes} nodes, {asked.links} links: {path.stat().st_size / 1e6:.2f} MB, "
              f"made in {time.perf_counter() - started:.2f} s")  # fmt: skip
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        print("screen   scheme   usable, ms (worst of repeats)   trace, ms   requests   console")
        for screen in SCREENS:
            for scheme in ("light", "dark"):
                runs = [visit(browser, path, screen, scheme) for _ in range(asked.repeats)]
                ready, traced, asks, says = (max(column) for column in zip(*runs, strict=True))
                print(f"{screen:8} {scheme:8} {ready:28.0f} {traced:13.0f} {asks:10} {says:9}")
        browser.close()


if __name__ == "__main__":
    main()
