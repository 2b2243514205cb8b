"""Where each node of a graph stands on the page: its token across, its layer up, side by side where they share both.

    x = left edge of the token's column + its slot         y = floor of the layer's row - its line

A pure function of the nodes: the same graph gets the same picture on every machine, and base and tuned on one layout
can be laid over each other. Slots are a fixed distance apart, so that no two nodes overlap.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tl_em.graph.nodes import Node

LABELLED = 60
"""Graphs of at most so many nodes have room for a label under each."""
WIDE, DENSE = (92.0, 46.0), (20.0, 22.0)
"""Distance of neighbouring slots across and up, with and without labels, in pixels at zoom 1."""
FOLDED_ABOVE, MOST_BANDS = 150, 7
"""Graphs of more nodes are drawn with neighbouring layers folded together, into so many bands at most."""
FOLDED = 30.0, 28.0
"""Width of a column and height of a line where layers are folded: room for a number in a mark."""
TARGET_LINE, GAP, PAD = 19.0, 14.0, 18.0
MANY_TOKENS, MANY_LAYERS, FEW = 32, 20, 4.0
"""More tokens, or layers, than this stand closer together: a gap of ``FEW``."""
RATIO = 1.7
"""Width over height that the number of slots a line is chosen for: that of the drawing's place on a screen."""
_ORDER = ("head", "adapter", "feature", "mlp", "error")


class Band(NamedTuple):
    """A column (a token) or a row (a layer): where it starts, how far it reaches, what is written at the axis."""

    name: str
    start: float
    size: float


@dataclass(frozen=True)
class Placement:
    """Places of nodes.

    Args:
        at: x and y of each node's centre, by node id, y downwards, in pixels at zoom 1.
        columns: one a token, from left to right.
        rows: targets, the layers that hold nodes, tokens: from the top downwards.
        width: of the whole; height: likewise.
        labelled: whether there is room for a label under each node.
        bands: rows of layers that are folded together until somebody opens them, by index, from the top downwards;
            empty for a small graph.
    """

    at: Mapping[str, tuple[float, float]]
    columns: tuple[Band, ...]
    rows: tuple[Band, ...]
    width: float
    height: float
    labelled: bool
    bands: tuple[tuple[int, ...], ...] = ()


def layout(nodes: Sequence[Node], tokens: Sequence[str]) -> Placement:
    """Place nodes by token and layer.

    Args:
        nodes: of one graph, or of two together; in any order.
        tokens: of the prompt, one a column.

    Returns:
        the same places for the same nodes, whatever their order.

    Example:
        >>> place = layout([Node("token", -1, 0, 7), Node("feature", 0, 1, 3), Node("logit", 2, 1, 9)], ["a", " cat"])
        >>> [row.name for row in place.rows]
        ['target', '0', 'token']
        >>> place.at["0_3_1"][1] < place.at["E_7_0"][1]  # a layer stands above the tokens
        True
    """
    cells: dict[tuple[int, str], list[Node]] = defaultdict(list)
    for node in sorted({node.id: node for node in nodes}.values(), key=_in_cell):
        cells[node.pos, _row_name(node)].append(node)
    names = sorted({name for _, name in cells} | {"token", "target"}, key=_height_of, reverse=True)
    labelled = len(nodes) <= LABELLED
    plans = [_plan(cells, names, tokens, labelled, per_line) for per_line in range(1, 13)]
    best = min(plans, key=lambda plan: abs(math.log(plan.width / plan.height / RATIO)))
    return replace(best, bands=_bands(names)) if len(nodes) > FOLDED_ABOVE else best


def _bands(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring layers, counted from the lowest: as many in each, fewer in the last."""
    layers = [row for row, name in enumerate(names) if name not in ("target", "token")][::-1]
    each = math.ceil(len(layers) / MOST_BANDS)
    return tuple(tuple(layers[at : at + each][::-1]) for at in range(0, len(layers), each))[::-1] if layers else ()


def _row_name(node: Node) -> str:
    return {"token": "token", "logit": "target"}.get(node.kind, str(node.layer))


def _height_of(name: str) -> float:
    return {"token": -math.inf, "target": math.inf}.get(name) or float(name)


def _in_cell(node: Node) -> tuple[int, str, float, str]:
    """Attention below MLPs below errors, then by stream, then the likelier target or the smaller index first."""
    kind = _ORDER.index(node.kind) if node.kind in _ORDER else 0
    number = -(node.weight or 0.0) if node.kind == "logit" else float(node.feature or 0)
    return kind, node.stream or "", number, node.id


def _plan(cells: Mapping[tuple[int, str], list[Node]], names: Sequence[str], tokens: Sequence[str], labelled: bool,
          per_line: int) -> Placement:  # fmt: skip
    """The layout with at most ``per_line`` nodes beside each other."""
    across, up = WIDE if labelled else DENSE
    most = defaultdict(lambda: 1, {pos: 1 for pos, _ in cells})
    lines = defaultdict(lambda: 1)
    for (pos, name), members in cells.items():
        beside = 1 if name == "target" else min(per_line, len(members))
        most[pos] = max(most[pos], beside)
        lines[name] = max(lines[name], math.ceil(len(members) / beside))
    tight = FEW if len(tokens) > MANY_TOKENS else GAP
    close = FEW if len(names) > MANY_LAYERS else GAP
    columns, left = [], PAD
    for pos, token in enumerate(tokens):
        words = min(len(token), 12) * 7.5 + 6 if len(tokens) <= MANY_TOKENS else 0.0
        size = max(most[pos] * across, words) + tight
        columns.append(Band(token, left, size))
        left += size
    rows, top = [], PAD
    for name in names:
        size = lines[name] * (TARGET_LINE if name == "target" else up) + close
        rows.append(Band(name, top, size))
        top += size
    band = {row.name: row for row in rows}
    at = {}
    for (pos, name), members in cells.items():
        beside = 1 if name == "target" else min(per_line, len(members))
        step = across, TARGET_LINE if name == "target" else up
        at |= _slots(members, columns[pos], band[name], beside, close, step)
    return Placement(at, tuple(columns), tuple(rows), left + PAD, top + PAD, labelled)


def _slots(members: Sequence[Node], column: Band, row: Band, beside: int, gap: float,
           step: tuple[float, float]) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Places of the nodes of one cell: lines of ``beside``, each centred in the column, from the row's floor up."""
    found = {}
    for at, node in enumerate(members):
        line, slot = divmod(at, beside)
        here = min(beside, len(members) - line * beside)
        x = column.start + column.size / 2 + (slot - (here - 1) / 2) * step[0]
        height = line if row.name != "target" else math.ceil(len(members) / beside) - 1 - line  # the likeliest on top
        y = row.start + row.size - gap / 2 - step[1] / 2 - height * step[1]
        found[node.id] = (round(x, 1), round(y, 1))
    return found
