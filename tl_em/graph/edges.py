"""From nodes, what they read and what they write to a graph: the edges, the totals, and what they will cost.

    total[s] = edge[target, s] + sum_t edge[t, s] / activation[t] * total[t]

A latent that is on passes a change of its pre-activation on as it is, so totals follow from the edges alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import NonFiniteError
from tl_em.graph.cost import CHUNK, Cost, room, timed
from tl_em.graph.gradients import MANY, Linearised, Reader, Writer, adjacency, gradients, linearise
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.nodes import MAX_BYTES, Node
from tl_em.graph.rules.base import Rule
from tl_em.graph.targets import Goal, text_of
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt


class Written(NamedTuple):
    """One node before it has a row: what it writes at a hook point, and the sheet of its dictionary."""

    node: Node
    point: str
    vector: Float[Tensor, " width"]
    sheet: Any = None


class Pass(NamedTuple):
    """A forward pass with a cut at every write, made where it is used, and what the nodes read in it.

    Args:
        written: what the nodes write in it, where passes differ in that.
    """

    make: Callable[[], Linearised]
    readers: tuple[Reader, ...]
    written: tuple[Written, ...] = ()


@dataclass(frozen=True, eq=False)
class Wiring:
    """What is needed for the edges, and again for their validation.

    Args:
        encoded: the prompt.
        passes: its pass; several are averaged (integrated gradients). Without any, ``wire`` makes them.
        written: nodes but the targets, in causal order; readers refer to them by place.
        goal: the target.
        settings: for the graph.
        totals: total effect of each node and target, where it does not follow from the edges.
        sheets: of dictionaries; references: by hook point, what a component is replaced by.
        turns: where that differs from turn to turn, the same nodes in each; effects are means over them.
        cost: what is drawn of it, where that was told before the plan was made.
        cut: of the shapes of what is cut in one pass.
        wire: the passes of some of the nodes.
    """

    encoded: EncodedPrompt
    passes: tuple[Pass, ...]
    written: tuple[Written, ...]
    goal: Goal
    settings: Mapping[str, Any]
    totals: Float[Tensor, " node"] | None = None
    sheets: tuple[Any, ...] = ()
    references: Mapping[str, Tensor] = field(default_factory=dict)
    turns: tuple[Wiring, ...] = ()
    cost: Cost | None = None
    cut: tuple[Tensor, ...] = ()
    wire: Callable[[Sequence[Written]], tuple[Pass, ...]] | None = None


def drawn(model: LensModel, plan: Wiring, *, chunk: int = CHUNK, max_bytes: int = MAX_BYTES) -> AttributionGraph:
    """The graph of a plan, not validated.

    Raises:
        GraphTooLargeError: the edges alone need more than ``max_bytes``. NonFiniteError: effects that are no numbers.
    """
    started = time.perf_counter()
    nodes = (*(each.node for each in plan.written), *plan.goal.nodes)
    kind, length = str(plan.settings["kind"]), len(plan.encoded)
    chunk, size = room(len(nodes), plan.cut, length, kind, chunk=chunk, max_bytes=max_bytes)
    rows = sum(len(reader.rows) for each in plan.passes for reader in each.readers) + len(plan.goal.nodes)
    goal = Reader(plan.goal.point, torch.arange(len(plan.written), len(nodes)), plan.goal.vectors)
    cost = {"rows": rows, "bytes_expected": size, "seconds_expected": told_seconds(plan, goal, chunk, size)}
    edges = torch.zeros(len(nodes), len(nodes), dtype=plan.goal.vectors.dtype)
    for make, readers, written in plan.passes:
        writers = writers_of(written or plan.written)
        edges += adjacency(make(), [*readers, goal], writers, nodes=len(nodes), chunk=chunk) / len(plan.passes)
    if not bool(edges.isfinite().all()):
        raise NonFiniteError(
            f"{int((~edges.isfinite()).sum())} of {edges.numel()} effects are NaN or infinite, so the graph would show "
            "none; look where the activations begin to be with em.capture(model, prompts, sites, position='all')"
        )
    totals = through(edges, nodes, plan.goal.shares) if plan.totals is None else plan.totals
    named = [replace(n, attribution=float(totals[row])) if n.kind != "logit" else n for row, n in enumerate(nodes)]
    text = tuple(text_of(model, token) for token in plan.encoded.ids)
    cost["seconds"] = round(time.perf_counter() - started, 3)
    settings = {**plan.settings, "dtype": str(edges.dtype).removeprefix("torch."), "chunk": chunk, "cost": cost}
    return AttributionGraph(tuple(named), edges, text, name_of(model), plan.encoded.text or " ".join(text), settings)


def name_of(model: LensModel) -> str:
    """The model's name for people: of a file or directory its last part."""
    name = str(getattr(model.cfg, "model_name", None) or type(model).__name__)
    return Path(name).name.removesuffix(".gguf") if Path(name).is_absolute() else name


def through(
    edges: Float[Tensor, "node node"], nodes: Sequence[Node], shares: Float[Tensor, " target"]
) -> Float[Tensor, " node"]:
    """Total effect of each node on the weighted targets, over all paths."""
    total = torch.zeros(len(nodes), dtype=edges.dtype)
    first = len(nodes) - len(shares)
    total[first:] = shares.to(edges)
    for row in range(len(nodes) - 1, -1, -1):
        node = nodes[row]
        if node.kind == "logit":
            total[:row] += total[row] * edges[row, :row]
        elif node.kind == "feature" and node.activation:
            total[:row] += total[row] / node.activation * edges[row, :row]
    return total


def total_gradients(
    model: LensModel, tokens: Tensor, points: Sequence[str], goal: Goal, rule: Rule, start: Tensor | None = None,
    run: Linearised | None = None,
) -> dict[str, Float[Tensor, "pos width"]]:  # fmt: skip
    """Gradient of the weighted target at every point, through everything.

    Args:
        start: in place of the residual stream's first value; run: a pass under the rule with these taps, if there is.
    """
    linear = run or linearise(model, tokens, taps=points, reads=[goal.point], rule=rule, start=start)
    weighted = torch.einsum("t,tpd->pd", goal.shares.to(goal.vectors), goal.vectors)[None]
    found = gradients(linear, Reader(goal.point, torch.tensor([0]), weighted))
    zeros = {name: torch.zeros_like(linear.value(name)) for name in points}
    return zeros | {name: grad[0] for name, grad in found.items()}


def told_seconds(plan: Wiring, goal: Reader, chunk: int, size: int) -> float | None:
    """What the edges should take, from one chunk in the middle; said on stderr where that is long. None where short."""
    if plan.cost is not None and plan.cost.seconds is not None:
        return plan.cost.seconds
    parts = [part for one in plan.passes for each in (*one.readers, goal) for part in each.split(chunk)]
    if len(parts) < MANY:
        return None
    make, readers, _ = plan.passes[0]
    reader = readers[len(readers) // 2]
    return timed(make(), next(iter(reader.split(chunk))), len(parts), size)


def totals_of(
    written: Sequence[Written], gradients: Mapping[str, Float[Tensor, "pos width"]], goal: Goal
) -> Float[Tensor, " node"]:
    """Total effect of each node by gradients that pass through everything; the targets have none."""
    own = [float(gradients[each.point][each.node.pos] @ each.vector) for each in written]
    return torch.tensor([*own, *[0.0] * len(goal.nodes)], dtype=goal.vectors.dtype)


def writers_of(written: Sequence[Written]) -> list[Writer]:
    """What the nodes write, grouped by point and position."""
    groups: dict[tuple[str, int], list[int]] = {}
    for row, each in enumerate(written):
        groups.setdefault((each.point, each.node.pos), []).append(row)
    return [
        Writer(point, pos, torch.tensor(rows), torch.stack([written[row].vector for row in rows]))
        for (point, pos), rows in groups.items()
    ]
