"""The page of a graph against its budgets: how large, how long to make, how long until it can be used.

    python benchmarks/viewer.py --nodes 2000 --links 20000 --layers 26 --tokens 73        (--diff: of two such graphs)

prints for light and dark, wide and narrow, the worst of several visits, in milliseconds: from the navigation until the
page can be used, its first drawing included (budget 2,000), until that is on the screen, from a key until a trace is
drawn, until a band of layers is open, until everything is; and requests and console messages. Needs Chromium and
playwright. The graphs are random; their values do not matter to any of this.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.view import save_page

SCREENS = {"wide": (1366, 650), "narrow": (390, 844)}
TIMED = """act => new Promise(done => {
  const from = performance.now();
  act();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - from)));
})"""
ACTS = {
    "trace": """() => { const mark = [...document.querySelectorAll('#drawing .node.feature')][40];
      mark.focus(); mark.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true})); }""",
    "band": "() => document.querySelectorAll('#bands button')[3]?.click()",
    "all": "() => document.getElementById('all').click()",
}


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


def visit(browser: Any, path: Path, screen: str, scheme: str) -> dict[str, float]:
    """Milliseconds to usable, to the screen, and of each act; requests beside the file itself, console messages."""
    width, height = SCREENS[screen]
    page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    found = {"usable": float(page.evaluate("document.documentElement.dataset.ready"))}
    found["on screen"] = float(page.evaluate(f"({TIMED})(() => 0).then(() => performance.now())"))
    for name, act in ACTS.items():
        found[name] = float(page.evaluate(f"({TIMED})({act})"))
    assert page.locator("#drawing .node").count() == page.evaluate("JSON.parse(data.textContent).view.nodes.id.length")
    page.context.close()
    return {**found, "requests": len(asked) - 1, "console": len(said)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--links", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--tokens", type=int, default=73)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--diff", action="store_true")
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    graph = random_graph(asked.nodes, asked.links, tokens=asked.tokens, layers=asked.layers)
    shown = graph
    if asked.diff:
        shown = graph.diff(replace(graph, edges=graph.edges * torch.linspace(0.3, 1.7, asked.nodes)[:, None]))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        started = time.perf_counter()
        path = save_page(shown, Path(folder) / "g.html")
        print(f"{asked.nodes} nodes, {asked.links} links: {path.stat().st_size / 1e6:.2f} MB, "
              f"made in {time.perf_counter() - started:.2f} s")  # fmt: skip
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for at, (screen, scheme) in enumerate(product(SCREENS, ("light", "dark"))):
            runs = [visit(browser, path, screen, scheme) for _ in range(asked.repeats)]
            worst = {name: max(run[name] for run in runs) for name in runs[0]}
            if at == 0:
                print("screen   scheme " + "".join(f"{name:>10}" for name in worst))
            print(f"{screen:8} {scheme:7}" + "".join(f"{value:10.0f}" for value in worst.values()))
        browser.close()


if __name__ == "__main__":
    main()
