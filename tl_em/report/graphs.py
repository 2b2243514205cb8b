"""An attribution graph as a figure for a paper: the page's places, the strongest links, nothing that moves.

A graph's links are coloured by sign and wide by score; of two graphs on one layout, links and nodes are coloured,
textured and marked by what became of them. The correlation with exact ablation, or the want of one, is written under
the drawing, as it stands in the page's title bar.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from tl_em.graph.view import STATUSES, page_data
from tl_em.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl_em.graph.graph import AttributionGraph, GraphDiff

LINKS, NODES = 150, 400
"""What a figure draws at most: the most influential ones."""
POSITIVE, NEGATIVE = "#0068a8", "#c24a00"
MARKERS = {"feature": "o", "error": "D", "token": "s", "logit": "p", "head": "^", "mlp": "h", "adapter": "*"}
CHANGES: dict[str, tuple[str, Any]] = {
    "appeared": ("#007a52", "-"),
    "vanished": ("#8a3ffc", (0, (4, 3))),
    "stronger": (NEGATIVE, (0, (8, 2))),
    "weaker": (POSITIVE, (0, (1, 2))),
    "same": ("#8b95a3", "-"),
}


@drawing.housed
def graph(shown: AttributionGraph | GraphDiff, *, width: float = 7.0, links: int = LINKS, names: int = 12) -> Figure:
    """Draw a graph, or base beside tuned.

    Args:
        shown: a graph, or ``base.diff(tuned)``.
        width: inches.
        links: how many of the strongest links are drawn.
        names: how many of the most influential nodes have their names written.

    >>> import torch
    >>> from tl_em.graph.graph import AttributionGraph, Node
    >>> nodes = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))
    >>> figure = graph(AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), ("cat",)))
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['sat']
    """
    view = page_data(shown, max_nodes=NODES, max_links=links)["view"]
    size = width, min(9.0, 0.7 + width * view["height"] / view["width"])
    figure = drawing.Picture(figsize=size, layout="constrained")
    ax = figure.subplots()
    _links(ax, view, links)
    _nodes(ax, view, names)
    _axes(ax, view, width)
    figure.legend(handles=_handles(view), loc="outside upper left", ncols=5 if width >= 5 else 3)
    said = [f"{name} {value}" for name, value, _ in view["validation"]] or ["not validated by ablation"]
    ax.set_xlabel("\n".join(textwrap.wrap(";  ".join(said), int(13 * width))), loc="left", fontsize=7)
    return figure


def _links(ax: Axes, view: dict[str, Any], count: int) -> None:
    two = view["mode"] == "diff"
    strongest = sorted(view["links"], key=lambda link: -_score(link))[:count]
    most = _score(strongest[0]) or 1.0 if strongest else 1.0
    for link in reversed(strongest):
        a, b = (view["nodes"][at] for at in link[:2])
        rise = max(18.0, (a["y"] - b["y"]) / 2)
        aside = 24.0 if abs(a["x"] - b["x"]) < 10 and rise > 30 else 0.0
        points = [(a["x"], a["y"]), (a["x"] + aside, a["y"] - rise), (b["x"] + aside, b["y"] + rise), (b["x"], b["y"])]
        size = (_score(link) / most) ** 0.5
        colour, dash = CHANGES[STATUSES[link[8]]] if two else (POSITIVE if link[2] >= 0 else NEGATIVE, "-")
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        ax.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linestyle=dash, linewidth=0.3 + 1.9 * size,
                               alpha=0.15 + 0.75 * size, zorder=1))  # fmt: skip


def _score(link: list[Any]) -> float:
    return max(value for value in (link[4], link[7] if len(link) > 5 else None) if value is not None)


def _nodes(ax: Axes, view: dict[str, Any], names: int) -> None:
    for node in view["nodes"]:
        colour = drawing.INK if node["kind"] in ("token", "logit") else _colour(node)
        hollow = node["kind"] == "token" or node.get("status") in ("vanished", "weaker")
        ax.plot(node["x"], node["y"], marker=MARKERS[node["kind"]], markersize=4.2, color=colour, zorder=2,
                markerfacecolor="white" if hollow else colour, markeredgewidth=0.7)  # fmt: skip
    named = [node for node in view["nodes"] if node["kind"] == "logit"]
    others = [node for node in view["nodes"] if node["kind"] not in ("logit", "token") and node["label"]]
    for node in named + sorted(others, key=lambda node: -node["reach"])[:names]:
        ax.annotate(drawing.broken(node["label"].strip() or node["id"], 22), (node["x"], node["y"]), xytext=(-4, 0),
                    textcoords="offset points", ha="right", va="center", fontsize=7, zorder=3)  # fmt: skip


def _colour(node: dict[str, Any]) -> str:
    if "status" in node:
        return CHANGES[node["status"]][0]
    if node["attribution"] is None:
        return CHANGES["same"][0]
    return POSITIVE if node["attribution"] >= 0 else NEGATIVE


def _axes(ax: Axes, view: dict[str, Any], width: float) -> None:
    ax.set_xlim(0, view["width"])
    ax.set_ylim(view["rows"][-1]["start"] + view["rows"][-1]["size"], 0)
    ax.set_yticks([row["start"] + row["size"] / 2 for row in view["rows"]], [row["name"] for row in view["rows"]])
    at = [column["start"] + column["size"] / 2 for column in view["columns"]]
    names = [column["name"].strip()[:14] or "␣" for column in view["columns"]]
    inches = [0.85 * width * column["size"] / view["width"] for column in view["columns"]]
    many = any(0.075 * len(name) > room for name, room in zip(names, inches, strict=True))
    ax.set_xticks(at, names, rotation=90 if many else 0)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.hlines([row["start"] for row in view["rows"]], 0, view["width"], color=drawing.RULE, linewidth=0.4, zorder=0)


def _handles(view: dict[str, Any]) -> list[Line2D]:
    kinds = dict.fromkeys(node["kind"] for node in view["nodes"])
    found = [Line2D([], [], linestyle="none", marker=MARKERS[kind], markersize=4, color=drawing.MUTED,
                    label="target" if kind == "logit" else kind) for kind in MARKERS if kind in kinds]  # fmt: skip
    if view["mode"] == "diff":
        return found + [Line2D([], [], color=c, linestyle=dash, label=name) for name, (c, dash) in CHANGES.items()]
    signs = (("raises", POSITIVE), ("lowers", NEGATIVE))
    return found + [Line2D([], [], color=colour, label=name) for name, colour in signs]
