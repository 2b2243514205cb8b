"""The page of a graph: one HTML file that loads nothing, and the same in a sandboxed frame for notebooks.

Everything that is shown is worked out here (places, shares, scores, what is left out, what the title bar says); the
script only draws it. Data stand in a JSON block whose ``<`` are escaped, the script writes text nodes only, and the
page's Content-Security-Policy refuses every request.

    share(s → t) = |edge| / sum of |edges| into t       score(s → t) = share · (B[t] + w[t])       (see ``pruning``)

The page claims what the graph's validation does: correlation with exact ablation stands in its title bar, and a graph
without one says that it has none.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from tl_em.artefacts import check_ending, replacing
from tl_em.graph import captions
from tl_em.graph.diff import Change, Compared
from tl_em.graph.exchange import to_exchange
from tl_em.graph.layout import FOLDED, Placement, layout
from tl_em.graph.nodes import Graph, Node
from tl_em.graph.pruning import influence, normalised, weights_of
from tl_em.showing import showable
from tl_em.stats import Estimate

MAX_NODES, MAX_LINKS = 2000, 20_000
"""What a page draws at most: the most influential ones, and it says what was left out."""
FIRST_LINKS = 300
"""How many links show before the reader moves the slider."""
STATUSES = ("appeared", "vanished", "stronger", "weaker", "same")
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("graph", "fold", "draw", "export", "viewer")
_TOP = ("explanation", "top", "link", "interval", "low", "high")


class _Scored(NamedTuple):
    """A graph's shares, and what each node counts for on its targets."""

    shares: Float[Tensor, "node node"]
    reached: Float[Tensor, " node"]

    def reach(self, graph: Graph) -> dict[str, float]:
        return {node.id: value for node, value in zip(graph.nodes, self.reached.tolist(), strict=True)}


def page(shown: Graph | Compared, *, max_nodes: int = MAX_NODES, max_links: int = MAX_LINKS) -> str:
    """The page of a graph, or of two graphs and what differs between them, as HTML.

    Args:
        shown: a graph, or ``base.diff(tuned)``.
        max_nodes: how many nodes are drawn, besides the targets; max_links: how many links.

    Returns:
        a whole document; write it with :func:`save_page`.
    """
    data = page_data(shown, max_nodes=max_nodes, max_links=max_links)
    script = "\n".join((_ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    warning = html.escape(data["view"]["warning"])
    parts = {
        "title": html.escape(data["view"]["title"]),
        "said": html.escape(data["view"]["said"]),
        "words": _words(data["view"]),
        "warning": f'<p class="warning" role="note">{warning}</p>' if warning else "",
        "note": html.escape(data["view"]["note"]),
        "css": (_ASSETS / "viewer.css").read_text(encoding="utf-8"),
        "data": _embedded(_packed(data)),
        "script": f'"use strict";(() => {{\n{script}}})();',
    }
    around = (_ASSETS / "page.html").read_text(encoding="utf-8").split("@")
    return "".join(text if at % 2 == 0 else parts[text] for at, text in enumerate(around))


def save_page(shown: Graph | Compared, path: str | Path) -> Path:
    """Write the page of a graph or of a difference, whole or not at all.

    Args:
        shown: a graph, or ``base.diff(tuned)``.
        path: of the HTML file, ``.html`` or ``.htm``.

    Raises:
        UsageError: another ending. OutputError: the path cannot be written.

    Example:
        >>> import tempfile, torch
        >>> nodes = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))
        >>> graph = Graph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), ("cat",))
        >>> save_page(graph, Path(tempfile.mkdtemp()) / "g.html").read_text(encoding="utf-8")[:15]
        '<!doctype html>'
    """
    check_ending(path, "a page", ".html", ".htm")
    text = page(shown)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def notebook_frame(shown: Graph | Compared, *, height: int = 760) -> str:
    """The page in a sandboxed frame: it can run its script and offer downloads, and nothing else.

    Args:
        shown: a graph or a difference; height: of the frame in pixels.
    """
    from tl_em.report.html import MOST, frame

    for part in (1, 4, 16):  # two large graphs, long names and notes: the strongest part, which the page says
        document = page(shown, max_nodes=MAX_NODES // part, max_links=MAX_LINKS // part)
        if len(document) <= MOST:
            break
    return frame(document, "Attribution graph", height=height, instead='graph.save_html("graph.html")')


def page_data(shown: Graph | Compared, *, max_nodes: int = MAX_NODES,
              max_links: int = MAX_LINKS) -> dict[str, Any]:  # fmt: skip
    """What the page is drawn from: ``view`` (places, shares, words) and the exchange file of what is drawn."""
    two = isinstance(shown, Compared)
    graphs = (shown.tuned, shown.base) if two else (shown,)
    scored = [_scores(graph) for graph in graphs]
    everything = list(shown.union if two else shown.nodes)
    reaches = [part.reach(graph) for part, graph in zip(scored, graphs, strict=True)]
    reach = {node.id: max(part.get(node.id, 0.0) for part in reaches) for node in everything}
    kept = _most_influential(everything, reach, max_nodes)
    ids = {node.id: at for at, node in enumerate(kept)}
    tables = [_table(graph, part, ids) for graph, part in zip(graphs, scored, strict=True)]
    links = _link_rows(shown, tables, ids, max_links)
    pairs = {(kept[link[0]].id, kept[link[1]].id) for link in links}
    parts = [_drawn(graph, ids, pairs) for graph in graphs]
    total = len(shown.links) if two else int((shown.edges != 0).sum())
    note = _left_out(graphs[0], (len(kept), len(everything)), (len(links), total))
    data: dict[str, Any] = {"view": _showable(_view(shown, kept, reach, links, note))}
    return data | dict(zip(("graph", "base"), (to_exchange(part) for part in parts), strict=False))


# -- numbers -----------------------------------------------------------------------------------------------------------
def _scores(graph: Graph) -> _Scored:
    shares, weights = normalised(graph.edges.detach().float()), weights_of(graph).float()
    return _Scored(shares, influence(shares, weights) + weights)


def _table(graph: Graph, scored: _Scored, ids: Mapping[str, int]) -> dict[tuple[str, str], list[float]]:
    """Weight, share and score of each link between the nodes that are drawn."""
    rows = [row for row, node in enumerate(graph.nodes) if node.id in ids]
    names = [graph.nodes[row].id for row in rows]
    edges, shares = (whole[rows][:, rows] for whole in (graph.edges.detach(), scored.shares))
    targets, sources = edges.nonzero(as_tuple=True)
    columns = (edges, shares, shares * scored.reached[rows][:, None])
    figures = zip(*(column[targets, sources].tolist() for column in columns), strict=True)
    pairs = zip(sources.tolist(), targets.tolist(), strict=True)
    return {(names[s], names[t]): list(found) for (s, t), found in zip(pairs, figures, strict=True)}


def _most_influential(nodes: Sequence[Node], reach: Mapping[str, float], count: int) -> list[Node]:
    """All targets, and of the rest the ``count`` that reach them most, in their order."""
    rest = sorted((node for node in nodes if node.kind != "logit"), key=lambda node: -reach[node.id])[:count]
    chosen = {node.id for node in rest}
    return [node for node in nodes if node.kind == "logit" or node.id in chosen]


def _link_rows(shown: Graph | Compared, tables: Sequence[Mapping[tuple[str, str], list[float]]],
               ids: Mapping[str, int], count: int) -> list[list[Any]]:  # fmt: skip
    """The links with the largest scores: source, target, then weight, share and score in each graph, and status."""
    score = {pair: max(table[pair][2] for table in tables if pair in table) for each in tables for pair in each}
    kept = sorted(score, key=lambda pair: (-score[pair], pair))[:count]
    said = {(row.source, row.target): row.status for row in shown.links} if isinstance(shown, Compared) else {}
    rows = []
    for pair in kept:
        figures = [_short(value) for table in tables for value in table.get(pair, (None, None, None))]
        rows.append([ids[pair[0]], ids[pair[1]], *figures, *([STATUSES.index(said[pair])] if said else [])])
    return rows


def _drawn(graph: Graph, ids: Mapping[str, int], links: set[tuple[str, str]]) -> Graph:
    """The part of a graph that is drawn."""
    rows = [row for row, node in enumerate(graph.nodes) if node.id in ids]
    names = [graph.nodes[row].id for row in rows]
    part = graph.edges.detach()[rows][:, rows].clone()
    for target, source in part.nonzero().tolist():
        if (names[source], names[target]) not in links:
            part[target, source] = 0.0
    return graph.keep(rows, part)


def _left_out(graph: Graph, nodes: tuple[int, int], links: tuple[int, int]) -> str:
    """How much of the graph is drawn: (drawn, in all) of nodes and of links."""
    said = [f"{drawn:,} of {total:,} {name}" if drawn < total else f"all {total:,} {name}"
            for name, (drawn, total) in (("nodes", nodes), ("links", links))]  # fmt: skip
    less = ": those with the most influence." if nodes[0] < nodes[1] or links[0] < links[1] else "."
    words = f"Drawn: {' and '.join(said)}{less}"
    cut = graph.settings.get("pruned")
    if isinstance(cut, Mapping) and "nodes_before" in cut:
        words += f" Pruned before, from {cut['nodes_before']:,} to {cut.get('nodes_after', 0):,} nodes."
    return words


def _showable(value: Any) -> Any:
    """All words of the view as they can be seen; the exchange file beside it keeps them as they are."""
    if isinstance(value, str):
        return showable(value)
    if isinstance(value, Mapping):
        return {name: _showable(each) for name, each in value.items()}
    return type(value)(map(_showable, value)) if type(value) in (list, tuple) else value


# -- words -------------------------------------------------------------------------------------------------------------
def _view(shown: Graph | Compared, kept: Sequence[Node], reach: Mapping[str, float],
          links: list[list[Any]], note: str) -> dict[str, Any]:  # fmt: skip
    main = shown.tuned if isinstance(shown, Compared) else shown
    place = layout(kept, main.tokens)
    rows = {node.id: _node(node, at, place.at[node.id]) for at, node in enumerate(kept)}
    _cumulate(kept, reach, rows)
    if isinstance(shown, Compared):
        _compare(shown.nodes, shown, rows)
    ids = {node.id: at for at, node in enumerate(kept)}
    words = captions.paths(shown)
    groups = [(label, [ids[each] for each in members if each in ids]) for label, members in main.supernodes]
    return {
        "mode": "diff" if isinstance(shown, Compared) else "graph",
        "title": captions.title(main),
        "said": captions.models(shown),
        "slug": to_exchange(main.keep([]))["metadata"]["slug"],
        "tokens": list(main.tokens),
        "columns": [band._asdict() for band in place.columns],
        "rows": [band._asdict() for band in place.rows],
        "width": place.width,
        "height": place.height,
        "labelled": place.labelled,
        "nodes": list(rows.values()),
        "links": links,
        "groups": [group for group in groups if group[1]],
        "firstLinks": FIRST_LINKS,
        "validation": captions.validation(shown),
        "warning": captions.warning(shown),
        "changes": [] if not isinstance(shown, Compared) else [(f"{what}s".capitalize(), shown.count(what))
                                                                for what in ("node", "link")],
        "details": captions.details(main),
        "note": note,
        "heading": captions.paths_heading(words),
        "words": [(name, [(path.said, [ids.get(each) for each in path.nodes]) for path in said])
                  for name, said in words],
        "bands": [_band(rows, place) for rows in place.bands],
        "folded": FOLDED,
        "least": shown.least if isinstance(shown, Compared) else 0.0,
    }  # fmt: skip


def _band(rows: Sequence[int], place: Placement) -> dict[str, Any]:
    """The name of neighbouring layers (a gap in their numbers is within the range), and their rows."""
    low, high = place.rows[rows[-1]].name, place.rows[rows[0]].name
    return {"name": f"L{low}" if low == high else f"L{low}–{high}", "rows": list(rows)}


def _node(node: Node, at: int, place: tuple[float, float]) -> dict[str, Any]:
    interval = node.extra.get("interval") or (node.extra.get("low"), node.extra.get("high"))
    link = str(node.extra.get("link") or "")
    others = {name: value for name, value in node.extra.items() if name not in _TOP}
    return {
        "id": node.id,
        "x": place[0],
        "y": place[1],
        "row": "logit" if node.kind == "logit" else node.layer,
        "kind": node.kind,
        "layer": node.layer,
        "pos": node.pos,
        "feature": node.feature,
        "stream": node.stream,
        "label": node.label,
        "activation": _short(node.activation),
        "attribution": _short(node.attribution),
        "effect": _short(node.effect),
        "low": _short(interval[0]),
        "high": _short(interval[1]),
        "weight": _short(node.weight),
        "influence": node.influence,
        "top": _pairs(node.extra.get("top")),
        "explanation": str(node.extra.get("explanation") or ""),
        "link": link if link.startswith("https://") else "",
        "linkName": "Open on Neuronpedia" if "neuronpedia.org/" in link else link,
        "extra": [(str(name), captions.said(value)) for name, value in others.items()],
    }


def _cumulate(nodes: Sequence[Node], reach: Mapping[str, float], rows: dict[str, dict[str, Any]]) -> None:
    """Reach, and the cumulative influence of nodes that bring none: what the slider filters by."""
    ordered = sorted((node for node in nodes if node.kind != "logit"), key=lambda node: -reach[node.id])
    whole, sofar = sum(reach[node.id] for node in ordered) or 1.0, 0.0
    for node in nodes:
        rows[node.id]["reach"] = _short(reach[node.id])
        rows[node.id]["influence"] = rows[node.id]["influence"] or 0.0
    for node in ordered:
        sofar += reach[node.id]
        if node.influence is None:
            rows[node.id]["influence"] = round(min(1.0, sofar / whole), 5)


def _compare(changes: Sequence[Change], shown: Compared, rows: dict[str, dict[str, Any]]) -> None:
    """Status and both values of each node, and its row in the exchange file of either graph."""
    drawn = [[node.id for node in graph.nodes if node.id in rows] for graph in (shown.base, shown.tuned)]
    where = [{name: at for at, name in enumerate(part)} for part in drawn]
    for change in changes:
        if change.id in rows:
            about = {"status": change.status, "base": _short(change.base), "tuned": _short(change.tuned)}
            rows[change.id] |= about | {"inBase": where[0].get(change.id), "inTuned": where[1].get(change.id)}


def _pairs(top: Any) -> list[tuple[str, float | None]]:
    """Tokens that a node pushes up, with or without how much."""
    listed = list(top.items()) if isinstance(top, Mapping) else list(top or ())
    return [(str(each[0]), _short(each[1])) if isinstance(each, tuple | list) else (str(each), None)
            for each in listed[:20]]  # fmt: skip


def _short(value: Any) -> float | None:
    """Four digits, for the eye; the exchange file beside it has them all."""
    if isinstance(value, Estimate):
        value = value.value
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _packed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data without what repeats: nodes as columns, links by rows of nodes. The script puts it together again."""
    found = {"view": {**data["view"], "nodes": _columns(data["view"]["nodes"])}}
    for name in ("graph", "base"):
        if (part := data.get(name)) is not None:
            row = {node["node_id"]: at for at, node in enumerate(part["nodes"])}
            links = [(row[link["source"]], row[link["target"]], link["weight"]) for link in part["links"]]
            found[name] = {**part, "nodes": _columns(part["nodes"]), "links": links}
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _words(view: Mapping[str, Any]) -> str:
    """The strongest paths as lists, for whoever reads before anything is drawn, or without a script."""
    lists = []
    for name, said in view["words"]:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence, _ in said)
        lists.append((f"<h2>{html.escape(name.capitalize())}</h2>" if name else "") + f"<ol>{items}</ol>")
    return f"<summary>{html.escape(view['heading'])}</summary><div>{''.join(lists)}</div>"


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end its script block: ASCII only, and no ``<``."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
