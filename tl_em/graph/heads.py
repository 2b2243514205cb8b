"""Which attention heads carry an edge: a graph with transcoders, edge by edge, split over heads.

    edge[t, s] = straight + sum_h  (gradient of t at head h's z, no later head on the way) . (change of z_h by s)

Every path from s to t goes through no head, or has a *last* one: so the split is exact, and its parts sum to the edge.
A head that only moves something for a later head to fetch has its part counted with the later one.

Source: head loadings of Lindsey et al. 2025 ("Tracing attention computation", transformer-circuits.pub); that the split
is by the last head, and therefore additive, is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.freeze import linearise
from tl_em.graph.latents import keeping
from tl_em.graph.plan import Plan
from tl_em.graph.rows import Reader, gradients
from tl_em.models.hooks import LensModel

if TYPE_CHECKING:
    import pandas as pd


def head_loadings(model: LensModel, plan: Plan, *, source: str, into: str) -> pd.DataFrame:
    """One edge of an exact graph, split over the heads that carry it.

    Args:
        plan: of ``latent_plan``, with transcoders.
        source, into: ids of the two nodes.

    Returns:
        DataFrame with columns layer, head (None for what goes straight through the residual stream) and weight, in the
        edge's units, the largest first; the weights sum to the edge.

    Raises:
        UsageError: no such nodes, or a graph that is not exact.
    """
    import pandas as pd

    if plan.settings.get("kind") != "transcoders":
        raise UsageError("an edge is a sum over heads only where all else is frozen: give a plan with transcoders")
    ids = [each.node.id for each in plan.written] + [node.id for node in plan.goal.nodes]
    if source not in ids or into not in ids:
        raise UsageError(f"{source!r} or {into!r} is no node of this graph; its ids are in graph.index")
    reader, written = _reader_of(plan, ids.index(into)), plan.written[ids.index(source)]
    tokens = torch.tensor(plan.encoded.ids)
    layers = range(int(model.cfg.n_layers))
    heads = {f"blocks.{layer}.attn.hook_z": layer for layer in layers}
    cuts, keep = list(plan.passes[0].linear.leaves), keeping(plan.sheets)
    closed = linearise(model, tokens, cuts=[*cuts, *heads], reads=[reader.point], keep=keep)
    open_ = linearise(model, tokens, cuts=cuts, reads=list(heads), keep=keep)
    last = gradients(closed, reader)
    rows: list[tuple[int | None, int | None, float]] = []
    if written.point in last:
        rows.append((None, None, _effect(last[written.point], written)))
    for point, layer in heads.items():
        if point in last:
            split = _by_head(last[point], int(model.cfg.n_heads))
            back = gradients(open_, Reader(point, torch.arange(len(split)), split))
            if written.point in back:
                rows += [(layer, h, float(back[written.point][h, written.node.pos] @ written.vector)) for h in
                         range(len(split))]  # fmt: skip
    rows.sort(key=lambda row: -abs(row[2]))
    return pd.DataFrame(rows, columns=["layer", "head", "weight"])


def _effect(gradient: Tensor, written: Any) -> float:
    return float(gradient[0, written.node.pos] @ written.vector)


def _by_head(gradient: Tensor, heads: int) -> Tensor:
    """[1 pos head*width] -> [head pos head*width], all but one head 0."""
    _, length, width = gradient.shape
    mask = torch.eye(heads).repeat_interleave(width // heads, dim=1).to(gradient)
    return gradient.expand(heads, length, width) * mask[:, None]


def _reader_of(plan: Plan, row: int) -> Reader:
    if row >= len(plan.written):
        at: Int[Tensor, " node"] = torch.tensor([row - len(plan.written)])
        return Reader(plan.goal.point, at, plan.goal.vectors[at])
    for reader in plan.passes[0].readers:
        found = (reader.rows == row).nonzero().flatten()
        if len(found):
            positions = None if reader.positions is None else reader.positions[found]
            return Reader(reader.point, reader.rows[found], reader.vectors[found], positions)
    raise UsageError(f"{plan.written[row].node.id!r} reads nothing (a token or an error), so no edge leads into it")
