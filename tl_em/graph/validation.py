"""Does the graph say what the model does? Its nodes are ablated exactly, in batches, and compared.

    effect[s] = value(clean) - value(the model with the write of s taken away, everything downstream recomputed)

for the k nodes of the largest attribution and a random sample stratified by kind and layer. ``pearson`` and
``spearman`` are over both; ``pearson_sample`` is over the random sample alone, which the choice of the top ones cannot
flatter. Below ``AGREES`` the graph carries a warning.

    faithfulness f(C) = (value(only C) - value(nothing)) / (value(all) - value(nothing))      C: the best share of nodes
    CPR = area under f, higher is better      CMD = area under |1 - f|, lower is better      shares as in ``SHARES``

beside the same for circuits of random nodes, and of the nodes that write most. A latent outside the circuit is taken
out at its activation in that very run, a component put to its reference.

Source: faithfulness and its areas: Mueller et al. 2025 (Mechanistic Interpretability Benchmark), arXiv:2504.13151.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.graph.edges import Plan
from tl_em.graph.latents import Sheet
from tl_em.graph.nodes import G, Graph
from tl_em.graph.pruning import scores
from tl_em.models.hooks import LensModel, hooked
from tl_em.stats import Estimate, bootstrap

TOP, SAMPLE = 64, 64
AGREES = 0.7
"""Half of the variance of the exact effects: below it the order of the nodes is more noise than finding."""
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANDOM = 5
_ROWS = 32
"""Ablated copies of the prompt in one pass."""


class _Read(Exception):
    """Raised when the target was read: what comes after it is work for nothing."""


Edit = Callable[[Tensor, Any], Tensor | None]


def validated(model: LensModel, graph: G, plan: Plan, *, seed: int = 0) -> G:
    """The graph with exact effects at some nodes and, in ``validation``, how well it agrees with them.

    Args:
        model, plan: what the graph was drawn from.
        seed: of the random sample, the random circuits and the intervals.
    """
    top, sample = chosen(graph, seed=seed)
    rows = [*top, *sample]
    effects = ablated(model, plan, rows)
    by_row = dict(zip(rows, effects.tolist(), strict=True))
    nodes = tuple(replace(n, effect=by_row[r]) if r in by_row else n for r, n in enumerate(graph.nodes))
    found = agreement(graph, by_row, sample, seed=seed)
    explained = scores(graph)
    found |= {"replacement": explained.replacement, "completeness": explained.completeness}
    if graph.settings.get("kind") == "components":  # no errors: every input of a node is one of the nodes
        found = {name: value for name, value in found.items() if name not in ("replacement", "completeness")}
    found |= faithfulness(model, graph, plan, seed=seed)
    return replace(graph, nodes=nodes, validation={**graph.validation, **found})


def ablatable(graph: Graph) -> list[int]:
    """Rows of the nodes whose ablation means something: a token's only where another prompt says what stands instead.

    (Without its embedding a position is what no model ever saw; that effect is no measure of an attribution.)
    """
    replaced = graph.settings.get("against") == "prompt"
    return graph.row(("feature", "error", "head", "mlp", "adapter", *(("token",) if replaced else ())))


def chosen(graph: Graph, *, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the largest attributions, and of a random sample of the others, one of each kind and layer in turn."""
    order = sorted(ablatable(graph), key=lambda row: -abs(graph.nodes[row].attribution or 0.0))
    top, rest = order[:TOP], order[TOP:]
    rng = np.random.default_rng(seed)
    strata: dict[tuple[str, int], list[int]] = {}
    for row in rng.permutation(rest).tolist():
        strata.setdefault((graph.nodes[row].kind, graph.nodes[row].layer), []).append(row)
    deepest = max(map(len, strata.values()), default=0)
    turns = [group[i] for i in range(deepest) for group in strata.values() if i < len(group)]
    return top, turns[:SAMPLE]


def agreement(graph: Graph, effects: Mapping[int, float], sample: Sequence[int], *, seed: int) -> dict[str, Any]:
    """Correlations of the attributions with exact effects, and a warning where they do not agree."""
    rows = list(effects)
    x = np.array([graph.nodes[row].attribution or 0.0 for row in rows])
    y = np.array([effects[row] for row in rows])
    found: dict[str, Any] = {"ablated": len(rows)}
    found["pearson"] = correlation(x, y, seed=seed)
    found["spearman"] = correlation(_ranks(x), _ranks(y), seed=seed)
    if len(sample) > 2:
        at = [rows.index(row) for row in sample]
        found["pearson_sample"] = correlation(x[at], y[at], seed=seed)
    r = found["pearson"]
    if r is None or r.value < AGREES:
        said = "cannot be compared with" if r is None else f"correlate only {r.value:.2f} with"
        found["warning"] = f"these attributions {said} exact ablation ({AGREES} is needed): do not read this graph"
        if graph.settings.get("against", "prompt") != "prompt":
            found["warning"] += "; pass against= a prompt of equal length that differs in what is asked about"
    return found


def correlation(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Estimate | None:
    """Pearson's r over nodes with a bootstrap interval; None where one side does not vary.

    Example:
        >>> correlation(np.arange(9.0), 2 * np.arange(9.0)).value
        1.0
    """
    if len(x) < 3 or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return None
    from scipy.stats import DegenerateDataWarning

    table = np.stack([x, y, x * x, y * y, x * y], axis=1)

    def statistic(w: np.ndarray) -> np.ndarray:
        mx, my, xx, yy, xy = np.moveaxis(w @ table / w.sum(-1, keepdims=True), -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.clip((xy - mx * my) / np.sqrt((xx - mx * mx) * (yy - my * my)), -1, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # every resample of a perfect line gives the same r
        return bootstrap(statistic, [len(x)], seed=seed).estimate


def _ranks(x: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(x)


# --- Exact ablation ---------------------------------------------------------------------------------------------------


def ablated(model: LensModel, plan: Plan, rows: Sequence[int]) -> Float[Tensor, " node"]:
    """Exact effect of each node on the weighted targets: what is lost when its write is taken away.

    Args:
        rows: places of the nodes in the plan (and in its graph).

    Returns:
        One number a node, in the target's units, float32 or float64 as the model.
    """
    parts = []
    for batch in _batches(rows):
        grouped: dict[str, list[int]] = {}
        for copy, row in enumerate(batch):
            grouped.setdefault(plan.written[row].point, []).append(copy)
        hooks = [(point, _subtracting(plan, batch, copies)) for point, copies in grouped.items()]
        parts.append(valued(model, plan, len(batch), hooks))
    clean = valued(model, plan, 1, [])
    return clean - torch.cat(parts) if parts else clean[:0]


def _batches(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(rows), _ROWS):
        yield rows[at : at + _ROWS]


def _subtracting(plan: Plan, batch: Sequence[int], copies: Sequence[int]) -> Edit:
    def edit(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2).clone()
        for copy in copies:
            each = plan.written[batch[copy]]
            flat[copy, each.node.pos] -= each.vector.to(flat)
        return flat.view_as(x)

    return edit


def valued(model: LensModel, plan: Plan, copies: int, hooks: Sequence[tuple[str, Edit]]) -> Float[Tensor, " prompt"]:
    """The weighted target of so many copies of the prompt under hooks."""
    seen: list[Tensor] = []

    def read(x: Tensor, hook: Any) -> None:
        seen.append(plan.goal.value(x))
        raise _Read

    tokens = torch.tensor(plan.encoded.ids).expand(copies, -1).to(model.cfg.device)
    with torch.no_grad(), hooked(model, [*hooks, (plan.goal.point, read)], check=False):
        with suppress(_Read):
            model(tokens)
    return (seen[0] @ plan.goal.shares.to(seen[0])).cpu()


# --- Circuits ---------------------------------------------------------------------------------------------------------


def faithfulness(model: LensModel, graph: Graph, plan: Plan, *, seed: int) -> dict[str, Any]:
    """The curve over ``SHARES`` for the graph's order, the order of what writes most, and random ones; areas of each.

    Returns:
        ``faithfulness`` (shares and one curve an order), ``cpr`` and ``cmd`` (by order); empty where nothing is at
        stake, because the target does not change when everything is taken away.
    """
    open_ = ablatable(graph)
    rng = np.random.default_rng(seed)
    stake = float(valued(model, plan, 1, []) - only(model, plan, [[]], open_))
    # Best first: what pushes the way that all do together. (A target may be lower with its nodes than without.)
    order = sorted(open_, key=lambda row: -np.sign(stake) * (graph.nodes[row].attribution or 0.0))
    size = sorted(open_, key=lambda row: -float(plan.written[row].vector.norm()))
    orders = {"graph": [order], "magnitude": [size], "random": [rng.permutation(open_).tolist() for _ in range(RANDOM)]}
    wanted = [(name, each, share) for name, some in orders.items() for each in some for share in SHARES]
    kept = [each[: round(share * len(open_))] for _, each, share in wanted]
    found = torch.cat([only(model, plan, part, open_) for part in _circuits(kept)])
    curves: dict[str, list[np.ndarray]] = {}
    for at in range(0, len(wanted), len(SHARES)):
        curves.setdefault(wanted[at][0], []).append(found[at : at + len(SHARES)].double().numpy())
    nothing, everything = curves["graph"][0][0], curves["graph"][0][-1]
    if not abs(everything - nothing) > 1e-6 * max(1.0, abs(everything)):
        return {}
    f = {name: np.mean(some, axis=0) for name, some in curves.items()}
    f = {name: (curve - nothing) / (everything - nothing) for name, curve in f.items()}
    return {
        "faithfulness": {"shares": list(SHARES), **{name: curve.round(6).tolist() for name, curve in f.items()}},
        "cpr": {name: float(np.trapezoid(curve, SHARES)) for name, curve in f.items()},
        "cmd": {name: float(np.trapezoid(abs(1 - curve), SHARES)) for name, curve in f.items()},
    }


def _circuits(kept: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    for at in range(0, len(kept), _ROWS):
        yield kept[at : at + _ROWS]


def only(
    model: LensModel, plan: Plan, circuits: Sequence[Sequence[int]], nodes: Sequence[int]
) -> Float[Tensor, " prompt"]:
    """The weighted target with nothing but each circuit left of ``nodes``; what is no node stays."""
    out = torch.zeros(len(circuits), len(plan.written), dtype=torch.bool)
    out[:, list(nodes)] = True
    for copy, circuit in enumerate(circuits):
        out[copy, list(circuit)] = False
    hooks: list[tuple[str, Edit]] = []
    for sheet in plan.sheets:
        hooks += _without_latents(plan, sheet, out)
    if plan.references:
        hooks += [(point, _put_to_reference(plan, point, out)) for point in plan.references]
    extra = {e.point for e in plan.written if e.node.kind == "adapter"}
    hooks += [(point, _without_adapter(plan, point, out)) for point in sorted(extra)]
    return valued(model, plan, len(circuits), hooks)


class _Masks(NamedTuple):
    """Of one dictionary's site: which latents are nodes, and which nodes are taken out."""

    nodes: Bool[Tensor, "pos d_sae"]
    latents: Bool[Tensor, "prompt pos d_sae"]
    errors: Bool[Tensor, "prompt pos"]


def _masks(plan: Plan, sheet: Sheet, out: Bool[Tensor, "prompt node"]) -> _Masks:
    length, width = len(plan.encoded), 1 if sheet.dictionary is None else sheet.dictionary.d_sae
    nodes = torch.zeros(length, width, dtype=torch.bool)
    latents = torch.zeros(len(out), length, width, dtype=torch.bool)
    errors = torch.zeros(len(out), length, dtype=torch.bool)
    for row, each in enumerate(plan.written):
        if each.point == sheet.out and each.node.kind == "feature" and each.node.feature is not None:
            nodes[each.node.pos, each.node.feature] = True
            latents[:, each.node.pos, each.node.feature] = out[:, row]
        elif each.point == sheet.out and each.node.kind == "error":
            errors[:, each.node.pos] = out[:, row]
    return _Masks(nodes, latents, errors)


def _without_latents(plan: Plan, sheet: Sheet, out: Bool[Tensor, "prompt node"]) -> list[tuple[str, Edit]]:
    """Hooks that take a circuit's complement out, at the activations of the run itself."""
    masks, one, source = _masks(plan, sheet, out), sheet.dictionary, sheet.source
    read: dict[str, Tensor] = {}

    def note(x: Tensor, hook: Any) -> None:
        assert source is not None
        read["x"] = source(x)

    def edit(x: Tensor, hook: Any) -> Tensor:
        if one is None:
            return torch.where(masks.errors[..., None].to(x.device), 0.0, x)
        inside = x if source is not None and source.name == sheet.out else read["x"]
        a, rows = one.encode_as(inside), one.W_dec.to(x)
        named = (a * masks.nodes.to(x.device)) @ rows
        rest = x - named - one.b_dec.to(x)
        if (skipped := one.W_skip) is not None:
            rest = rest - inside @ skipped.to(x)
        gone = (a * masks.latents.to(x.device)) @ rows
        return x - gone - torch.where(masks.errors[..., None].to(x.device), rest, 0.0)

    first = [] if source is None or source.name == sheet.out else [(source.name, note)]
    return [*first, (sheet.out, edit)]


def _put_to_reference(plan: Plan, point: str, out: Bool[Tensor, "prompt node"]) -> Edit:
    reference = plan.references[point]
    rows = [row for row, e in enumerate(plan.written) if e.point == point and e.node.kind != "adapter"]
    nodes = [plan.written[row].node for row in rows]
    heads = max((node.feature or 0) + 1 if node.kind == "head" else 1 for node in nodes)

    def edit(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2)
        mask = torch.zeros(len(out), flat.shape[1], heads, dtype=torch.bool)
        for row, node in zip(rows, nodes, strict=True):
            mask[:, node.pos, node.feature or 0 if node.kind == "head" else 0] = out[:, row]
        wide = mask.repeat_interleave(flat.shape[2] // heads, dim=2).to(x.device)
        return torch.where(wide, reference.to(flat).expand_as(flat[0]), flat).view_as(x)

    return edit


def _without_adapter(plan: Plan, point: str, out: Bool[Tensor, "prompt node"]) -> Edit:
    rows = [row for row, e in enumerate(plan.written) if e.point == point and e.node.kind == "adapter"]

    def edit(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2).clone()
        for row in rows:
            each = plan.written[row]
            flat[:, each.node.pos] -= torch.outer(out[:, row].to(flat), each.vector.to(flat))
        return flat.view_as(x)

    return edit
