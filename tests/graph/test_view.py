"""The page of a graph, as text: places that do not overlap, what is left out, what cannot break out of it."""

from __future__ import annotations

import html
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.graph.examples import estimate, large, small
from tl_em.errors import OutputError, UsageError
from tl_em.graph import captions
from tl_em.graph.captions import UNVALIDATED
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.graph.layout import FOLDED_ABOVE, layout
from tl_em.graph.view import MAX_LINKS, MAX_NODES, notebook_frame, page, page_data, save_page
from tl_em.report.html import SANDBOX
from tl_em.showing import showable

CSP = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`\u2028\u2029😈@title@&amp;"


def embedded(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def hostile() -> AttributionGraph:
    graph = small()
    nodes = tuple(replace(node, label=HOSTILE, extra={"top": [HOSTILE], "explanation": HOSTILE, HOSTILE: HOSTILE,
                                                      "link": f"javascript:alert(1)//{HOSTILE}"})
                  for node in graph.nodes)  # fmt: skip
    return replace(graph, nodes=nodes, tokens=(HOSTILE,) * 4, model=HOSTILE, prompt=HOSTILE,
                   settings={HOSTILE: HOSTILE}, validation={"warning": HOSTILE, HOSTILE: HOSTILE},
                   supernodes=((HOSTILE, ("0_12_2", "1_7_3")),))  # fmt: skip


@pytest.mark.parametrize(("n_nodes", "n_links", "tokens"), [(40, 120, 6), (300, 3000, 12), (300, 900, 60)])
def test_no_two_nodes_overlap_and_each_stands_in_its_column_and_row(n_nodes: int, n_links: int, tokens: int) -> None:
    graph = large(n_nodes, n_links, tokens=tokens)
    place = layout(graph.nodes, graph.tokens)
    apart = 16.0  # pixels between centres: a dense node is at most 2 x 6.5 x 1.15 wide
    points = list(place.at.values())
    close = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :]
             if (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < apart**2]  # fmt: skip
    assert len(points) == n_nodes and close == []
    rows = {row.name: row for row in place.rows}
    for node in graph.nodes:
        x, y = place.at[node.id]
        column = place.columns[node.pos]
        row = rows[{"token": "token", "logit": "target"}.get(node.kind, str(node.layer))]
        assert column.start <= x <= column.start + column.size
        assert row.start <= y <= row.start + row.size
    assert [row.name for row in place.rows] == ["target", *(str(n) for n in reversed(range(8))), "token"]


def test_places_depend_on_the_nodes_alone() -> None:
    graph = large(150, 500)
    shuffled = list(graph.nodes)
    random.Random(3).shuffle(shuffled)
    assert layout(shuffled, graph.tokens).at == layout(graph.nodes, graph.tokens).at


def test_base_and_tuned_share_their_places() -> None:
    tuned = small()
    base = tuned.keep([0, 1, 2, 3, 5])
    view = page_data(base.diff(tuned))["view"]
    place = layout(tuned.nodes, tuned.tokens)
    assert {node["id"]: (node["x"], node["y"]) for node in view["nodes"]} == dict(place.at)
    assert {node["id"]: node["status"] for node in view["nodes"]}["1_7_3"] == "appeared"
    assert dict(view["changes"])["Nodes"]["appeared"] == 1


def test_shares_are_those_worked_out_by_hand() -> None:
    view = page_data(small())["view"]
    ids = [node["id"] for node in view["nodes"]]
    shares = {(ids[s], ids[t]): share for s, t, _, share, _ in view["links"]}
    assert shares["E_41_2", "0_12_2"] == pytest.approx(0.75)
    assert shares["0_12_2", "1_7_3"] == pytest.approx(0.8)
    assert shares["1_7_3", "2_55_3"] == pytest.approx(2 / 3, abs=1e-4)  # four digits are written
    reach = {node["id"]: node["reach"] for node in view["nodes"]}
    assert reach["0_12_2"] == pytest.approx(0.9 * (2 / 9 + 2 / 3 * 0.8), rel=1e-3)


def test_neighbouring_layers_are_bands_above_the_size_and_none_below() -> None:
    graph = large(FOLDED_ABOVE, 300)
    assert layout(graph.nodes, graph.tokens).bands == ()
    for layers, count, most in ((26, 7, 4), (48, 7, 7), (8, 4, 2), (1, 1, 1)):
        graph = large(400, 300, layers=layers, tokens=60)
        place = layout(graph.nodes, graph.tokens)
        rows = [row for rows in place.bands for row in rows]
        held = [at for at, row in enumerate(place.rows) if row.name not in ("target", "token")]
        assert rows == held and len(place.bands) == count  # every layer once, from the top downwards
        assert max(map(len, place.bands)) == most and [len(each) for each in place.bands[1:]] == [most] * (count - 1)
    view = page_data(large(400, 300, layers=26, tokens=60))["view"]
    assert [band["name"] for band in view["bands"]] == [
        "L24–25", "L20–23", "L16–19", "L12–15", "L8–11", "L4–7", "L0–3"]  # fmt: skip


def test_two_thousand_nodes_and_twenty_thousand_links_are_drawn_and_more_are_not() -> None:
    assert (MAX_NODES, MAX_LINKS) == (2000, 20_000)
    data = page_data(large(2100, 21_000, layers=26, tokens=73))
    assert len(data["view"]["nodes"]) == 2001 and len(data["view"]["links"]) <= 20_000
    assert data["view"]["note"].startswith("Drawn: 2,001 of 2,100 nodes and ")


def test_the_strongest_paths_are_put_into_words() -> None:
    found = dict(captions.paths(small()))[""]
    assert [path.said for path in found] == [
        "' cat' at 2 → L0 feature 12 “animal” → L1 feature 7 “verb next” at 3 → ' sat': 40 % of the target",
        "' cat' at 2 → L0 feature 12 “animal” → ' sat': 17 % of the target",
        "' the' at 1 → L0 feature 12 “animal” at 2 → L1 feature 7 “verb next” at 3 → ' sat': 13 % of the target",
        "L0 error at 3 → L1 feature 7 “verb next” → ' sat': 13 % of the target, lowering it",
        "L0 error at 3 → ' sat': 11 % of the target, lowering it",
    ]
    graph = large(300, 3000)
    rows = graph.paths(5)
    assert [list(path.nodes) for path in dict(captions.paths(graph))[""]] == rows["nodes"].tolist()
    whole = sum(node.weight or 1.0 for node in graph.targets)
    for path, weight in zip(dict(captions.paths(graph))[""], rows["weight"], strict=True):
        assert f": {100 * weight / whole:.1f} % of the target" in path.said
    for each in (small(), small(2.0).diff(small()), graph):
        sentences = [path.said for _, said in captions.paths(each) for path in said]
        items = [html.unescape(item) for item in re.findall(r"<li>(.*?)</li>", page(each))]
        assert items == sentences and all(sentence in each.summary for sentence in sentences)


def test_the_words_say_how_far_to_believe_them() -> None:
    assert "r with exact ablation: 0.90" in small().summary
    assert small(validation={}).summary.endswith(UNVALIDATED)
    doubted = small(validation={"pearson": estimate(0.2), "warning": "It does not agree."})
    assert doubted.summary.startswith("Do not read (r with ablation is 0.20)")
    assert doubted.summary.endswith("It does not agree.")
    both = small(validation={}).diff(small(2.0, validation={})).summary
    assert both.endswith(f"Base and tuned: {UNVALIDATED}") and both.index("Tuned:") < both.index("Base:")


def test_a_long_path_is_told_by_its_ends_and_none_is_said() -> None:
    nodes = tuple(Node("token", -1, 0, 3, label=" a") if at == 0 else Node("logit", 40, 0, 9, label=" z", weight=1.0)
                  if at == 39 else Node("mlp", at, 0) for at in range(40))  # fmt: skip
    chain = AttributionGraph(nodes, torch.eye(40).roll(-1, 1).tril(-1), (" a",))
    said = dict(captions.paths(chain))[""][0].said
    assert said == ("' a' at 0 → L1 MLP → L2 MLP → L3 MLP → (32 more) → L36 MLP → L37 MLP → L38 MLP → ' z': "
                    "100 % of the target")  # fmt: skip
    bare = replace(chain, edges=chain.edges * 0)
    assert "no path leads to a target" in bare.summary and "<li>" not in page(bare)


def test_the_page_is_one_file_with_its_policy_and_no_address() -> None:
    text = page(small())
    assert f'http-equiv="Content-Security-Policy" content="{CSP}"' in text
    addresses = set(re.findall(r"https?://[^\s\"'`)\\]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "https://www.neuronpedia.org/x/0/12"}
    assert not re.search(r"\b(src|srcset|@import|fetch|XMLHttpRequest|WebSocket|innerHTML|eval)\b\s*[=(]",
                         text.replace("image.src =", ""))  # fmt: skip
    assert text.count("<script") == text.count("</script>") == 2


def test_hostile_names_stay_text() -> None:
    text = page(hostile())
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert html.escape(showable(HOSTILE)[:30]) in re.findall(r'id="words".*?</details>', text, re.DOTALL)[0]
    scripts = "".join(re.findall(r"<script.*?</script>", text, re.DOTALL))
    assert "\u2028" not in scripts and "\u2029" not in scripts
    data = embedded(text)
    assert data["view"]["tokens"][0] == showable(HOSTILE)  # it is there, whole, the line separators as signs
    assert data["graph"]["metadata"]["prompt_tokens"][0] == HOSTILE  # and in the file as it was given
    assert data["view"]["nodes"]["link"][2] == ""
    assert "@css@" not in text and "<style>:root" in text


def test_three_hundred_nodes_and_three_thousand_links_stay_below_a_megabyte(tmp_path: Path) -> None:
    path = large(300, 3000).save_html(tmp_path / "g.html")
    assert path.stat().st_size < 1_000_000
    data = embedded(path.read_text())
    assert len(data["view"]["nodes"]["id"]) == len(data["graph"]["nodes"]["node_id"]) == 300
    assert len(data["view"]["links"]) == len(data["graph"]["links"]) == 3000
    assert data["view"]["note"] == "Drawn: all 300 nodes and all 3,000 links."


def test_so_does_the_page_of_two_such_graphs(tmp_path: Path) -> None:
    base = large(300, 3000)
    tuned = replace(base, edges=base.edges * torch.linspace(0.3, 1.7, 300)[:, None])
    path = base.diff(tuned).save_html(tmp_path / "diff.html")
    assert path.stat().st_size < 1_000_000
    data = embedded(path.read_text())
    assert len(data["graph"]["links"]) == len(data["base"]["links"]) == 3000
    assert data["graph"]["links"] != data["base"]["links"]


def test_what_is_over_the_cap_is_left_out_and_said() -> None:
    graph = large(300, 3000)
    data = page_data(graph, max_nodes=100, max_links=250)
    assert len(data["view"]["nodes"]) == 101 and len(data["view"]["links"]) == 250
    assert data["view"]["note"] == (
        "Drawn: 101 of 300 nodes and 250 of 3,000 links: those with the most influence.")
    kept = {node["id"] for node in data["view"]["nodes"]}
    whole = {node["id"]: node["reach"] for node in page_data(graph)["view"]["nodes"] if node["kind"] != "logit"}
    assert min(whole[name] for name in kept if name in whole) >= max(whole[n] for n in whole.keys() - kept)
    assert graph.targets[0].id in kept
    assert len(data["graph"]["links"]) == 250


def test_the_title_bar_says_how_far_to_believe_it() -> None:
    view = page_data(small())["view"]
    assert view["validation"][0][:2] == ("r with exact ablation", repr(estimate(0.9)))
    assert view["warning"] == ""
    assert page_data(small(validation={}))["view"]["warning"] == UNVALIDATED
    doubted = small(validation={"pearson": estimate(0.2), "warning": "It does not agree with ablation."})
    assert page_data(doubted)["view"]["warning"] == "It does not agree with ablation."
    assert page_data(doubted)["view"]["title"].startswith("Do not read (r with ablation is 0.20): What leads to")
    assert page_data(small())["view"]["title"].startswith("What leads to")
    both = page_data(small(validation={}).diff(small()))["view"]
    assert both["warning"] == f"Base: {UNVALIDATED}"


def test_nodes_without_figures_and_a_graph_without_links_have_a_page() -> None:
    nodes = (Node("token", -1, 0, 3), Node("logit", 1, 0, None, label="direction"))
    data = page_data(replace(small(), nodes=nodes, edges=small().edges[:2, :2]))
    assert data["view"]["links"] == []
    assert data["view"]["nodes"][0]["attribution"] is None


def test_the_notebook_frame_is_sandboxed_and_holds_the_page_escaped() -> None:
    text = notebook_frame(hostile())
    found = re.findall(r'<iframe sandbox="([^"]*)" title="[^"]*" srcdoc="([^"]*)" style="[^"]*"></iframe>', text)
    assert len(found) == 1
    assert found[0][0] == SANDBOX == "allow-scripts allow-downloads"
    document = html.unescape(found[0][1])
    assert re.sub(r"<style>@media \(min-height.*?</style>", "", document) == page(hostile())
    assert small()._repr_html_() == notebook_frame(small())


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        save_page(small(), tmp_path / "file" / "g.html")


def test_a_page_goes_under_no_other_ending_and_says_which_before_it_is_drawn(tmp_path: Path) -> None:
    for write, name, fitting in ((small().save_html, "g.pdf", ".html"), (small().save_json, "g.html", ".json")):
        with pytest.raises(UsageError, match=f"'{name}': .* ends in .*{fitting}"):
            write(tmp_path / name)
    assert not any(tmp_path.iterdir())
    assert small().save_html(tmp_path / "g.HTM").exists() and small().save_json(tmp_path / "g.JSON").exists()
