"""Does the graph say what the model does? Its nodes are ablated exactly, in batches, and compared.

    effect[s] = value(clean) - value(the model with the write of s taken away, everything downstream recomputed)
                (the mean over turns, where the reference comes in turns: ``references``)

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_em.graph.edges import Wiring
from tl_em.graph.latents import Sheet
from tl_em.graph.nodes import G, Graph, Kind
from tl_em.graph.pruning import scores
from tl_em.models.cache import read_once
from tl_em.models.hooks import LensModel, hooked
from tl_em.stats import Estimate, bootstrap
from tl_em.threads import own_warnings

TOP, SAMPLE = 64, 64
CLOSE = 1e-3
"""Of a value: what a matrix product over another number of rows may change in 30 layers of float32."""
AGREES = 0.7
"""Half of the variance of the exact effects: below it the order of the nodes is more noise than finding."""
_NOTHING = 1e-5
"""Of the largest effect: a difference of two logits is that far off in float32."""
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANDOM, FEW = 5, 2
"""Random orders beside the graph's own; of a graph that is not drawn whole."""
REPLACED = ("prompt", "other words", "own words")
"""What a graph may be against that puts another token where one was."""
_ROWS = 32
"""Ablated copies of the prompt in one pass."""


class _Read(Exception):
    """Raised when the target was read: what comes after it is work for nothing."""


Edit = Callable[[Tensor, Any], Tensor | None]


def validated(model: LensModel, graph: G, plan: Wiring, *, seed: int = 0) -> G:
    """The graph with exact effects at some nodes and, in ``validation``, how well it agrees with them.

    Args:
        model, plan: what the graph was drawn from.
        seed: of the random sample, the random circuits and the intervals.
    """
    top, sample = chosen(graph, seed=seed)
    rows = [*top, *sample]
    large = plan.cost is not None and not plan.cost.whole
    late = large and starts_late(model, plan)
    effects = ablated(model, plan, rows, late=late)
    by_row = dict(zip(rows, effects.tolist(), strict=True))
    nodes = tuple(replace(n, effect=by_row[r]) if r in by_row else n for r, n in enumerate(graph.nodes))
    found = agreement(graph, by_row, sample, seed=seed)
    if graph.settings.get("kind") != "components":  # of which every input of a node is one of the nodes
        explained = scores(graph)
        found |= {"replacement": explained.replacement, "completeness": explained.completeness}
    found |= faithfulness(model, graph, plan, seed=seed, random=FEW if large else RANDOM, late=late)
    return replace(graph, nodes=nodes, validation={**graph.validation, **found})


def ablatable(graph: Graph) -> list[int]:
    """Rows of the nodes whose ablation means something: a token's only where another prompt says what stands instead.

    (Without its embedding a position is what no model ever saw; that effect is no measure of an attribution.)
    """
    replaced = graph.settings.get("against") in REPLACED
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
    from scipy.stats import rankdata

    rows = list(effects)
    x = np.array([graph.nodes[row].attribution or 0.0 for row in rows])
    y = np.array([effects[row] for row in rows])
    found: dict[str, Any] = {"ablated": len(rows)}
    found["pearson"] = correlation(x, y, seed=seed)
    found["spearman"] = correlation(rankdata(resolved(x)), rankdata(resolved(y)), seed=seed)
    if len(sample) > 2:
        at = [rows.index(row) for row in sample]
        found["pearson_sample"] = correlation(x[at], y[at], seed=seed)
    r = found["pearson"]
    if r is None or r.value < AGREES:
        said = "cannot be compared with" if r is None else f"correlate only {r.value:.2f} with"
        found["warning"] = f"these attributions {said} exact ablation ({AGREES} is needed): do not read this graph"
        found["warning"] += f"; {_would_help(graph)}"
    return found


def _would_help(graph: Graph) -> str:
    """What to try where attributions and ablation disagree."""
    if graph.settings.get("kind") != "components":
        return "try another rule (rule='relp')" if graph.settings.get("kind") == "SAEs" else f"look at {_EFFECTS}"
    if graph.settings.get("against", "prompt") != "prompt":
        return "pass against= a prompt that differs in what is asked about alone"
    return f"try against= a prompt that differs in fewer words, or look at {_EFFECTS}"


_EFFECTS = "the nodes' effect= instead"


def resolved(effects: np.ndarray) -> np.ndarray:
    """Effects, those that float32 cannot tell from nothing beside the largest one at 0: their order is rounding's.

    Example:
        >>> resolved(np.array([1.0, -1e-7, 2e-4])).tolist()
        [1.0, 0.0, 0.0002]
    """
    return np.where(abs(effects) < _NOTHING * abs(effects).max(initial=0.0), 0.0, effects)


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

    with own_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # every resample of a perfect line gives the same r
        return bootstrap(statistic, [len(x)], seed=seed).estimate


# --- Exact ablation ---------------------------------------------------------------------------------------------------


def ablated(model: LensModel, plan: Wiring, rows: Sequence[int], *, late: bool = False) -> Float[Tensor, " node"]:
    """Exact effect of each node on the weighted targets: what is lost when its write is taken away.

    Args:
        rows: places of the nodes in the plan (and in its graph).
        late: whether a batch may begin at the first block that it changes (see ``starts_late``).

    Returns:
        One number a node, in the target's units, float32 or float64 as the model.
    """
    if plan.turns:
        return torch.stack([_ablated_in_turn(model, turn, rows, late=late) for turn in plan.turns]).mean(0)
    clean, parts = valued(model, plan, 1, []), []
    order = sorted(range(len(rows)), key=lambda at: rows[at]) if late else list(range(len(rows)))
    for at in range(0, len(rows), _ROWS):
        some = [rows[each] for each in order[at : at + _ROWS]]
        out = torch.zeros(len(some), len(plan.written), dtype=torch.bool)
        out[range(len(out)), some] = True
        points = sorted({plan.written[row].point for row in some})
        hooks = [(point, _subtracting(plan, point, out)) for point in points]
        parts.append(valued(model, plan, len(out), hooks, late=late))
    if not parts:
        return clean[:0]
    found = torch.cat(parts)
    return clean - found[torch.tensor(order).argsort()]


def _ablated_in_turn(model: LensModel, turn: Wiring, rows: Sequence[int], *, late: bool) -> Float[Tensor, " node"]:
    """What of the nodes has another reference in this turn is ablated; the others' effect is nothing."""
    at = [each for each, row in enumerate(rows) if bool(turn.written[row].vector.any())]
    found = ablated(model, turn, [rows[each] for each in at], late=late)
    return found.new_zeros(len(rows)).index_put((torch.tensor(at, dtype=torch.long),), found)


def _subtracting(
    plan: Wiring, point: str, out: Bool[Tensor, "prompt node"], kinds: Sequence[str] = get_args(Kind)
) -> Edit:
    """Take away, in each copy, what its nodes of these kinds wrote at a point."""
    rows = [row for row, each in enumerate(plan.written) if each.point == point and each.node.kind in kinds]

    def edit(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2).clone()
        for copy, at in out[:, rows].nonzero().tolist():
            each = plan.written[rows[at]]
            flat[copy, each.node.pos] -= each.vector.to(flat)
        return flat.view_as(x)

    return edit


def valued(
    model: LensModel, plan: Wiring, copies: int, hooks: Sequence[tuple[str, Edit]], *, late: bool = False
) -> Float[Tensor, " prompt"]:
    """The weighted target of so many copies of the prompt under hooks; until the first one a single copy may do."""
    seen: list[Tensor] = []
    first = min((block_of(point) for point, _ in hooks), default=0) if late else 0

    def read(x: Tensor, hook: Any) -> None:
        seen.append(plan.goal.value(x))
        raise _Read

    def copied(x: Tensor, hook: Any) -> Tensor:
        return x.expand(copies, *x.shape[1:])

    tokens = torch.tensor(plan.encoded.ids).expand(1 if first else copies, -1)
    begin = [(f"blocks.{first}.hook_resid_pre", copied)] if first else []
    with torch.no_grad(), hooked(model, [*begin, *hooks, (plan.goal.point, read)], check=False):
        with suppress(_Read):
            read_once(model, tokens)
    return (seen[0] @ plan.goal.shares.to(seen[0])).cpu()


def block_of(point: str) -> int:
    """The block that a hook point is in; 0 for one before all blocks, or after them."""
    parts = point.split(".")
    return int(parts[1]) if parts[0] == "blocks" else 0


def starts_late(model: LensModel, plan: Wiring) -> bool:
    """Whether copies that are made in the middle of the model end as the prompt itself does.

    (What attention is told of the batch would not fit where it depends on the batch's size.)
    """
    middle = int(model.cfg.n_layers) // 2
    if middle == 0 or plan.goal.point.startswith("blocks."):  # a target inside may be read before anything changes
        return False
    clean = float(valued(model, plan, 1, []))
    same: Edit = lambda x, hook: None  # noqa: E731
    try:
        found = valued(model, plan, 2, [(f"blocks.{middle}.hook_resid_pre", same)], late=True)
    except (RuntimeError, ValueError, IndexError):
        return False
    return len(found) == 2 and bool(((found - clean).abs() <= CLOSE * max(1.0, abs(clean))).all())


# --- Circuits ---------------------------------------------------------------------------------------------------------


def faithfulness(
    model: LensModel, graph: Graph, plan: Wiring, *, seed: int, random: int = RANDOM, late: bool = False
) -> dict[str, Any]:
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
    orders = {"graph": [order], "magnitude": [size], "random": [rng.permutation(open_).tolist() for _ in range(random)]}
    wanted = [(name, each, share) for name, some in orders.items() for each in some for share in SHARES]
    kept = [each[: round(share * len(open_))] for _, each, share in wanted]
    found = torch.cat([only(model, plan, kept[at : at + _ROWS], open_, late) for at in range(0, len(kept), _ROWS)])
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


def only(
    model: LensModel, plan: Wiring, circuits: Sequence[Sequence[int]], nodes: Sequence[int], late: bool = False
) -> Float[Tensor, " prompt"]:
    """The weighted target with nothing but each circuit left of ``nodes``; what is no node stays."""
    if plan.turns:
        return torch.stack([only(model, turn, circuits, nodes, late) for turn in plan.turns]).mean(0)
    out = torch.zeros(len(circuits), len(plan.written), dtype=torch.bool)
    out[:, list(nodes)] = True
    for copy, circuit in enumerate(circuits):
        out[copy, list(circuit)] = False
    hooks: list[tuple[str, Edit]] = []
    for sheet in plan.sheets:
        hooks += _without_latents(plan, sheet, out)
    if plan.references:
        heads = int(model.cfg.n_heads)
        hooks += [(point, _put_to_reference(plan, point, out, heads)) for point in plan.references]
    extra = {e.point for e in plan.written if e.node.kind == "adapter"}
    hooks += [(point, _subtracting(plan, point, out, ["adapter"])) for point in sorted(extra)]
    return valued(model, plan, len(circuits), hooks, late=late)


def _without_latents(plan: Wiring, sheet: Sheet, out: Bool[Tensor, "prompt node"]) -> list[tuple[str, Edit]]:
    """Hooks that take a circuit's complement out of one write, at the activations of the run itself."""
    one, source, length = sheet.dictionary, sheet.source, len(plan.encoded)
    own = [(row, each.node) for row, each in enumerate(plan.written) if each.point == sheet.out]
    errors = torch.zeros(len(out), length, 1, dtype=torch.bool)
    for row, node in own:
        if node.kind == "error":
            errors[:, node.pos, 0] = out[:, row]
    if one is None or source is None:
        return [(sheet.out, lambda x, hook: torch.where(errors.to(x.device), 0.0, x))]
    shown = torch.zeros(length, one.d_sae, dtype=torch.bool)
    latents = torch.zeros(len(out), length, one.d_sae, dtype=torch.bool)
    for row, node in own:
        if node.kind == "feature":
            shown[node.pos, node.feature] = True
            latents[:, node.pos, node.feature] = out[:, row]
    read: dict[str, Tensor] = {}

    def note(x: Tensor, hook: Any) -> None:
        read["x"] = source(x)

    def edit(x: Tensor, hook: Any) -> Tensor:
        inside = x if source.name == sheet.out else read["x"]
        a, rows = one.encode_as(inside), one.W_dec.to(x)
        rest = x - (a * shown.to(x.device)) @ rows - one.b_dec.to(x)
        if (skipped := one.W_skip) is not None:
            rest = rest - inside @ skipped.to(x)
        return x - (a * latents.to(x.device)) @ rows - torch.where(errors.to(x.device), rest, 0.0)

    first = [] if source.name == sheet.out else [(source.name, note)]
    return [*first, (sheet.out, edit)]


def _put_to_reference(plan: Wiring, point: str, out: Bool[Tensor, "prompt node"], heads: int) -> Edit:
    reference = plan.references[point]
    rows = [row for row, e in enumerate(plan.written) if e.point == point and e.node.kind != "adapter"]
    nodes = [plan.written[row].node for row in rows]
    heads = heads if any(node.kind == "head" for node in nodes) else 1

    def edit(x: Tensor, hook: Any) -> Tensor:
        flat = x.flatten(2)
        mask = torch.zeros(len(out), flat.shape[1], heads, dtype=torch.bool)
        for row, node in zip(rows, nodes, strict=True):
            mask[:, node.pos, node.feature or 0 if node.kind == "head" else 0] = out[:, row]
        wide = mask.repeat_interleave(flat.shape[2] // heads, dim=2).to(x.device)
        return torch.where(wide, reference.to(flat).expand_as(flat[0]), flat).view_as(x)

    return edit
