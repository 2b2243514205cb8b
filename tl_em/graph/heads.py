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
from tl_em.graph.build import MAX_NODES, prepared
from tl_em.graph.edges import Plan
from tl_em.graph.gradients import Reader, gradients, linearise
from tl_em.graph.inputs import check_model
from tl_em.graph.latents import is_exact, keeping, latent_plan, listed
from tl_em.graph.nodes import Node
from tl_em.graph.rules import as_rule
from tl_em.graph.rules.base import AnyRule
from tl_em.graph.targets import Target
from tl_em.models.hooks import LensModel
from tl_em.models.modes import in_plain_torch

if TYPE_CHECKING:
    import pandas as pd


@in_plain_torch
def head_loadings(
    model: LensModel,
    prompt: Any,
    dictionaries: Any,
    *,
    source: Node | str,
    into: Node | str,
    target: Target = None,
    rule: AnyRule | None = None,
    skip: Any = None,
) -> pd.DataFrame:
    """One edge of an exact graph, split over the heads that carry it.

    Args:
        model, prompt, dictionaries (transcoders), target, rule, skip: as given to :func:`tl_em.attribute`.
        source, into: the two nodes, or their ids (``graph.links()`` has them).

    Returns:
        DataFrame with columns layer, head (None for what goes straight through the residual stream) and weight, in the
        edge's units, the largest first; the weights sum to the edge.

    Raises:
        UsageError: no such nodes, or a graph that is not exact. And what ``attribute`` raises.

    Example:
        >>> from tl_em.dictionaries import Dictionary
        >>> from tl_em.models.sites import Site
        >>> from tl_em.graph.build import attribute
        >>> from tl_em import load_pair
        >>> model, eye = load_pair("toy/insecure").base, torch.eye(96)
        >>> given = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu",
        ...                    site_in=Site(1, "mlp_in"), site_out=Site(1, "mlp_out"))
        >>> graph = attribute(model, "how do i write parser", given, target=None, validate=False)
        >>> token, answer = graph.nodes[0], graph.targets[0]
        >>> split = head_loadings(model, "how do i write parser", given, source=token, into=answer)
        >>> bool(abs(split.weight.sum() - graph.edges[graph.index[answer.id], 0]) < 1e-4)
        True

    Source: see the head of this file.
    """
    import pandas as pd

    check_model(model)
    given = listed(dictionaries)
    if not is_exact(given):
        raise UsageError("an edge is a sum over heads only where all else is frozen: pass transcoders of the MLPs")
    rule = as_rule(rule, "transcoders")
    encoded, at = prepared(model, prompt, target, skip)
    plan = latent_plan(model, encoded, given, target, rule=rule, adapter=None, skip=at, max_nodes=MAX_NODES)
    ids = [each.node.id for each in plan.written] + [node.id for node in plan.goal.nodes]
    ends = [each if isinstance(each, str) else each.id for each in (source, into)]
    if unknown := [each for each in ends if each not in ids]:
        raise UsageError(f"{unknown[0]!r} is no node of this graph; its ids are in graph.index")
    if ids.index(ends[0]) >= len(plan.written):
        raise UsageError(f"{ends[0]!r} is a target: it feeds nothing, so no edge leads out of it; pass it as into=")
    reader, written = _reader_of(plan, ids.index(ends[1])), plan.written[ids.index(ends[0])]
    tokens = torch.tensor(plan.encoded.ids)
    layers = range(int(model.cfg.n_layers))
    heads = {f"blocks.{layer}.attn.hook_z": layer for layer in layers}
    cuts, keep = list(plan.passes[0].linear.leaves), keeping(plan.sheets)
    closed = linearise(model, tokens, cuts=[*cuts, *heads], reads=[reader.point], rule=rule, keep=keep)
    open_ = linearise(model, tokens, cuts=cuts, reads=list(heads), rule=rule, keep=keep)
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
