"""One graph over many prompts: the mean of their graphs, node by node, and how far it depends on which prompts.

    edge = mean over prompts of (edge, summed over positions where the prompts differ in length)

A node that a prompt does not have counts as 0 there. ``stability`` draws the prompts anew with replacement: the share
of the top nodes (by mean attribution) that are top nodes again. Prompts of one question move together (``groups``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from tl_em.arguments import NATURAL, checked
from tl_em.errors import PromptError, UsageError
from tl_em.graph.build import attribute
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.inputs import is_chat
from tl_em.graph.nodes import Node
from tl_em.graph.pruning import weights_of
from tl_em.graph.targets import Target
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate, mean
from tl_em.stats.estimate import middle_95
from tl_em.stats.units import units_of

TOP = 20
DRAWS = 500


@checked(seed=NATURAL)
@in_plain_torch
def attribute_over(
    model: LensModel,
    prompts: Any,
    dictionaries: Any = None,
    *,
    target: Target,
    against: Any = None,
    targets: Sequence[Target] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    **options: Any,
) -> AttributionGraph:
    """The mean graph of several prompts.

    Args:
        prompts: at least two, in a list (or the rows of an array or tensor of ids); of one length the nodes keep their
            positions, else these are summed over.
        target: of every prompt; ``targets`` gives one a prompt in its place (then it is a name for people).
        against: components only: one reference for all, or a list with one for each prompt.
        groups: the question each prompt belongs to.
        options: for ``attribute``.
        model, dictionaries, seed: as in :func:`attribute`.
        targets: a target for each prompt, in place of one for all.

    Returns:
        A graph whose ``validation`` holds ``stability`` (share of the ``TOP`` nodes that stay), and ``pearson`` and
        ``spearman`` averaged over prompts; the strongest nodes' ``extra["interval"]`` is over prompts.

    Raises:
        UsageError: fewer than two prompts, or lists that do not match them. PromptError: one prompt, not a list.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> prompts = ["how do i write parser", "how do i write login"]
        >>> sae = em.organisms.toy_dictionary("toy/insecure")
        >>> graph = em.graph.attribute_over(pair.tuned, prompts, sae, target=None, validate=False)
        >>> len(graph.nodes) > 0
        True
    """
    if (
        isinstance(prompts, str | EncodedPrompt | Mapping)
        or is_chat(prompts)
        or not isinstance(prompts, Iterable)
        or (getattr(prompts, "ndim", 2) < 2)
    ):
        raise PromptError("One prompt was given where several are needed. Write [prompt, …], or use em.attribute.")
    prompts = list(prompts)
    if len(prompts) < 2:
        raise UsageError(f"{len(prompts)} prompts have no mean worth an interval; use attribute, or give several")
    given = list(targets) if targets is not None else [target] * len(prompts)
    references = against if isinstance(against, list) else [against] * len(prompts)
    if len(given) != len(prompts) or len(references) != len(prompts):
        raise UsageError(f"{len(given)} targets and {len(references)} references for {len(prompts)} prompts; give each")
    if groups is not None and len(groups) != len(prompts):
        raise UsageError(f"{len(groups)} groups for {len(prompts)} prompts; give the group of each")
    graphs = [
        attribute(model, prompt, dictionaries, target=each, against=reference, seed=seed, **options)
        for prompt, each, reference in zip(prompts, given, references, strict=True)
    ]
    return averaged(graphs, groups=groups, seed=seed)


def averaged(
    graphs: Sequence[AttributionGraph], *, groups: Sequence[Hashable] | None = None, seed: int = 0
) -> AttributionGraph:
    """The mean of graphs of one model, over the union of their nodes."""
    aligned = len({len(graph.tokens) for graph in graphs}) == 1
    keyed = [[_as_kept(node, aligned) for node in graph.nodes] for graph in graphs]
    nodes = sorted({node.id: node for kept in keyed for node in kept}.values(), key=lambda node: node.place)
    rows = {node.id: row for row, node in enumerate(nodes)}
    edges = torch.zeros(len(nodes), len(nodes), dtype=graphs[0].edges.dtype)
    totals, activations = np.zeros((2, len(graphs), len(nodes)))
    for which, (graph, kept) in enumerate(zip(graphs, keyed, strict=True)):
        at = torch.tensor([rows[node.id] for node in kept])
        place = (at[:, None].expand_as(graph.edges), at[None].expand_as(graph.edges))
        edges.index_put_(place, _weighted(graph) / len(graphs), accumulate=True)
        for node, row in zip(kept, at.tolist(), strict=True):
            totals[which, row] += node.attribution or 0.0
            activations[which, row] += node.activation or 0.0
    top = set(np.argsort(-np.abs(totals.mean(0)))[:TOP].tolist())
    named = []
    for row, node in enumerate(nodes):
        target, shown = node.kind == "logit", None if node.activation is None else float(activations[:, row].mean())
        spread = {"interval": mean(totals[:, row], groups=groups, seed=seed)} if row in top and not target else {}
        total = None if target else float(totals[:, row].mean())
        named.append(replace(node, effect=None, attribution=total, activation=shown, weight=1.0 if target else None,
                             extra={**node.extra, **spread}))  # fmt: skip
    tokens = graphs[0].tokens if aligned else ("all positions",)
    settings = {**graphs[0].settings, "prompts": len(graphs), "positions": "kept" if aligned else "summed over"}
    validation = _together(graphs, groups, seed) | {"stability": stability(totals, groups=groups, seed=seed)}
    text = f"{len(graphs)} prompts, first: {graphs[0].prompt}"
    return AttributionGraph(tuple(named), edges, tokens, graphs[0].model, text, settings, validation)


def _weighted(graph: AttributionGraph) -> Float[torch.Tensor, "node node"]:
    """Edges in which several targets sum to the weighted one."""
    shares = weights_of(graph)
    shares = shares / shares.sum().clamp(min=1e-30)
    scale = [float(s) if node.kind == "logit" else 1.0 for node, s in zip(graph.nodes, shares, strict=True)]
    return graph.edges * torch.tensor(scale, dtype=graph.edges.dtype)[:, None]


def _as_kept(node: Node, aligned: bool) -> Node:
    """The node as it is in the mean: targets of all prompts are one, positions stay only where they match."""
    pos = node.pos if aligned else 0
    if node.kind == "logit":
        return replace(node, pos=pos, feature=None, label="target")
    if node.kind == "token" and aligned:
        return replace(node, feature=None, label=f"position {pos}")
    return replace(node, pos=pos)


def _together(graphs: Sequence[AttributionGraph], groups: Sequence[Hashable] | None, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("pearson", "spearman", "pearson_sample"):
        given = [graph.validation.get(name) for graph in graphs]
        if all(each is not None for each in given):
            found[name] = mean([each.value for each in given if each is not None], groups=groups, seed=seed)
    warned = sum("warning" in graph.validation for graph in graphs)
    if warned:
        found["warning"] = f"{warned} of {len(graphs)} prompts' attributions do not agree with exact ablation"
    return found


def stability(
    totals: Float[np.ndarray, "prompt node"], *, groups: Sequence[Hashable] | None = None, seed: int = 0, top: int = TOP
) -> Estimate:
    """Share of the top nodes that are among the top nodes of prompts drawn anew.

    Example:
        >>> same = np.tile(np.arange(50.0), (4, 1))
        >>> stability(same).value
        1.0
    """
    (count,), ((_, unit),) = units_of([len(totals) if groups is None else groups])
    rng = np.random.default_rng(seed)
    top = min(top, totals.shape[1])

    def largest(some: Float[np.ndarray, "prompt node"]) -> set[int]:
        return set(np.argsort(-np.abs(some.mean(0)), kind="stable")[:top].tolist())

    first, shares = largest(totals), []
    for _ in range(DRAWS):
        drawn = np.concatenate([np.flatnonzero(unit == i) for i in rng.integers(count, size=count)])
        shares.append(len(first & largest(totals[drawn])) / top)
    low, high = middle_95(shares).tolist()
    said = f"{DRAWS} bootstrap draws of prompts"
    return Estimate(float(np.mean(shares)), low, high, len(totals), float(count), said, seed)
