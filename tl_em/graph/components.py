"""Graphs without a dictionary: attention heads, MLPs and embeddings, by position.

    total[s]   = g_s . (clean_s - reference_s)                        g_s: gradient of the target at what s writes
    edge[t, s] = d(g_t . out_t) / d(write_s) . (clean_s - reference_s)          directly: every other write held fixed

so that the edges out of a node sum to its total: edges into a component are in units of the weighted target. The
reference is another prompt (attribution patching), or as ``references`` says; the rule says which gradient g is
(``rules``), and at which stream values on the way from the reference both lines are averaged; a reference that comes in
turns (other words) is averaged over as well. Where the graph would be
too large (``cost``) only nodes that differ from their reference are looked at, and of those the leading ones drawn.

The control is in every graph: exact ablation of the same nodes (``validation``).

Source: Nanda 2023 and Syed et al. 2023, arXiv:2310.10348 (edge attribution patching); Hanna et al. 2024,
arXiv:2403.17806 (integrated gradients on the input embeddings); Jafari et al. 2025, arXiv:2508.21258 (RelP).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.graph.adapters import adapter_writes
from tl_em.graph.cost import COPIES, SHARE, TRIAL, UNLIMITED, Cost, Limits, budgeted, room, seconds_of, timed, whole
from tl_em.graph.edges import Pass, Wiring, Written, total_gradients, totals_of
from tl_em.graph.gradients import MANY, STREAM, Linearised, Reader, linearise
from tl_em.graph.nodes import Kind, Node
from tl_em.graph.references import reference_of
from tl_em.graph.rules import as_rule
from tl_em.graph.rules.base import CLOSE, AnyRule, Rule, hooks_of, points_of
from tl_em.graph.rules.plain import Plain
from tl_em.graph.targets import Goal, Target, goal_of, point_of, text_of
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt


def component_plan(
    model: LensModel,
    encoded: EncodedPrompt,
    target: Target,
    *,
    rule: AnyRule | None = None,
    against: Any = None,
    adapter: LensModel | None = None,
    limits: Limits = UNLIMITED,
) -> Wiring:
    """Nodes, reads and writes of a graph of components; what it will cost is told before the work.

    Raises:
        UsageError: a reference that is none; no rule. GraphTooLargeError: no room, or no time.
    """
    rule = as_rule(rule, "components")
    tokens, layers, goal_point = torch.tensor(encoded.ids), range(int(model.cfg.n_layers)), point_of(model, target)
    points = [STREAM, *(f"blocks.{i}.attn.hook_z" for i in layers), *(f"blocks.{i}.hook_mlp_out" for i in layers)]
    parts = [] if adapter is None else adapter_writes(model, adapter, tokens)
    extra = sorted({part.point for part in parts} - set(points))
    taps, started = [*points, *extra], time.perf_counter()
    plain = linearise(model, tokens, taps=taps, reads=[goal_point], rule=Plain())
    forward, clean = time.perf_counter() - started, {name: plain.value(name) for name in points}
    goal = goal_of(model, encoded, target, plain.logits)
    reference = reference_of(model, encoded, clean, against)
    turns, heads = reference.turns, int(model.cfg.n_heads)
    ends = [points_of(rule, turn[STREAM].expand_as(clean[STREAM]), clean[STREAM]) for turn in turns]
    starts = [start for some in ends for start in some]
    here = None
    if None in starts:  # the prompt's own values, whose gradient is that of the pass above where the rule has no hooks
        run = None if hooks_of(rule, model) else plain
        here = total_gradients(model, tokens, taps, goal, rule, run=run)
    del plain
    cost = _told(model, tokens, clean, goal, rule, starts, turns=len(turns), forward=forward, limits=limits)
    written = _written(model, encoded, clean, reference.values, parts, changed=not cost.whole)
    each = partial(_in_turns, clean=clean, turns=turns, parts=parts, heads=heads)
    own, grads = each(written), []
    totals = torch.zeros(len(written) + len(goal.nodes), dtype=goal.vectors.dtype)
    for vectors, some in zip(own, ends, strict=True):
        for start in some:
            found = here if start is None else total_gradients(model, tokens, taps, goal, rule, start)
            assert found is not None
            grads.append(found)
            totals += totals_of(vectors, grads[-1], goal) / len(starts)

    def wire(some: Sequence[Written]) -> tuple[Pass, ...]:
        run = partial(linearise, model, tokens, cuts=points, taps=extra, reads=[goal_point], rule=rule)
        vectors = [one for one, steps in zip(each(some), ends, strict=True) for _ in steps]
        return tuple(
            Pass(partial(run, start=start), tuple(_readers(some, grad, heads)), one)
            for start, grad, one in zip(starts, grads, vectors, strict=True)
        )

    settings = {
        "kind": "components", "rule": rule.name, "against": reference.kind, "relative to": reference.said,
        "adapter": adapter is not None,
        "approximation": f"first order ({rule.name} gradients) of replacing each node by its reference",
        "edges": "into a component: the part of the source's effect on the weighted target that passes directly to it",
    }  # fmt: skip
    plan = Wiring(encoded, wire(written) if cost.whole else (), tuple(written), goal, settings, totals=totals,
                  references=reference.values, cost=cost, cut=tuple(clean.values()), wire=wire)  # fmt: skip
    if len(turns) == 1:
        return plan
    beside = [replace(plan, written=one, references=turn) for one, turn in zip(own, turns, strict=True)]
    return replace(plan, turns=tuple(beside))


def _told(
    model: LensModel, tokens: Tensor, clean: Mapping[str, Tensor], goal: Goal, rule: Rule,
    starts: Sequence[Tensor | None], *, turns: int, forward: float, limits: Limits,
) -> Cost:  # fmt: skip
    """Whether all of it is drawn, and what that should take: from shapes, a forward pass and one chunk at the middle.

    Raises:
        GraphTooLargeError: no room for the edges, or no time.
    """
    heads, layers, length = int(model.cfg.n_heads), int(model.cfg.n_layers), len(tokens)
    nodes = length * (1 + layers * (1 + heads)) + len(goal.nodes)
    middle = f"blocks.{layers // 2}.hook_mlp_out"

    def trial(rows: int) -> tuple[Linearised, Reader]:
        linear = linearise(model, tokens, cuts=list(clean), reads=[goal.point], rule=rule, start=starts[0])
        at = torch.arange(rows)
        return linear, Reader(middle, at, torch.ones_like(clean[middle])[:1].expand(rows, -1), at % length)

    if not limits.edges:
        return Cost(0, None, SHARE)
    small = whole(model, nodes, length * layers * (1 + heads) * len(starts), length, clean.values(), limits)
    if small and limits.max_seconds is None:
        chunk, size = room(nodes, clean.values(), length, "components", chunk=limits.chunk, max_bytes=limits.max_bytes)
        parts = len(starts) * layers * sum(math.ceil(length * n / chunk) for n in (heads, 1))
        return Cost(nodes, timed(*trial(min(chunk, length * heads)), parts, size) if parts >= MANY else None)
    each = len(starts) * seconds_of(*trial(TRIAL)) / TRIAL
    fixed = forward * (4 * len(starts) + (COPIES * turns if limits.validate else 0))
    return budgeted(limits, nodes, clean.values(), length, "components", fixed=fixed, each=each, small=small,
                    beside=length + len(goal.nodes))  # fmt: skip


# --- Nodes ------------------------------------------------------------------------------------------------------------


def _written(
    model: LensModel,
    encoded: EncodedPrompt,
    clean: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    parts: Sequence[Written],
    *,
    changed: bool = False,
) -> list[Written]:
    """Every component at every position, with what replacing it takes away.

    Args:
        changed: only those that are not what they are compared with.
    """
    heads, found = int(model.cfg.n_heads), list(parts)
    away = _away(clean, reference, parts)

    def add(kind: Kind, layer: int, point: str, parts: int = 1) -> None:
        own = away[point].unflatten(-1, (parts, -1))
        sizes = own.norm(dim=-1)
        shown = sizes > CLOSE * clean[point].norm(dim=-1)[:, None] if changed else torch.ones_like(sizes).bool()
        at, part = shown.nonzero(as_tuple=True)
        wide = own.new_zeros(len(at), *own.shape[1:])
        wide[torch.arange(len(at)), part] = own[at, part]
        each = zip(at.tolist(), part.tolist(), sizes[at, part].tolist(), wide.flatten(1), strict=True)
        for pos, number, size, vector in each:
            found.append(Written(_named(model, encoded, kind, layer, pos, number, size), point, vector))

    add("token", -1, STREAM)
    for layer in range(int(model.cfg.n_layers)):
        add("head", layer, f"blocks.{layer}.attn.hook_z", heads)
        add("mlp", layer, f"blocks.{layer}.hook_mlp_out")
    return sorted(found, key=lambda each: each.node.place)


def _named(
    model: LensModel, encoded: EncodedPrompt, kind: Kind, layer: int, pos: int, number: int, size: float
) -> Node:
    """A component's node, without its score."""
    if kind == "token":
        return Node(kind, layer, pos, feature=int(encoded.ids[pos]), label=text_of(model, encoded.ids[pos]))
    return Node(kind, layer, pos, feature=number if kind == "head" else None, activation=size)


def _away(
    clean: Mapping[str, Tensor], reference: Mapping[str, Tensor], parts: Sequence[Written]
) -> dict[str, Float[Tensor, "pos width"]]:
    """What replacing takes away at each point; what an adapter adds there is a node of its own."""
    found = {name: x - reference[name].expand_as(x) for name, x in clean.items()}
    for part in parts:
        if part.point in found:
            found[part.point][part.node.pos] -= part.vector
    return found


def _in_turns(
    written: Sequence[Written], clean: Mapping[str, Tensor], turns: Sequence[Mapping[str, Tensor]],
    parts: Sequence[Written], heads: int,
) -> list[tuple[Written, ...]]:  # fmt: skip
    """The same nodes in every turn, with what replacing each by that turn's reference takes away."""
    if len(turns) == 1:
        return [tuple(written)]
    found = []
    for away in (_away(clean, turn, parts) for turn in turns):
        vectors = [each.vector if each.node.kind == "adapter" else _own(each.node, away[each.point], heads)
                   for each in written]  # fmt: skip
        found.append(tuple(each._replace(vector=x) for each, x in zip(written, vectors, strict=True)))
    return found


def _own(node: Node, away: Float[Tensor, "pos width"], heads: int) -> Float[Tensor, " width"]:
    """What is taken away of one node: of a head its own part."""
    vector = away[node.pos]
    if node.kind != "head":
        return vector
    return vector * (torch.arange(len(vector)) // (len(vector) // heads) == node.feature).to(vector)


def _readers(written: Sequence[Written], grads: Mapping[str, Tensor], heads: int) -> list[Reader]:
    """A component reads whatever moves its write along its own gradient."""
    groups: dict[str, list[int]] = {}
    for row, each in enumerate(written):
        if each.node.kind in ("head", "mlp"):
            groups.setdefault(each.point, []).append(row)
    found = []
    for point, rows in groups.items():
        nodes = [written[row].node for row in rows]
        positions = torch.tensor([node.pos for node in nodes])
        vectors = grads[point][positions]
        if nodes[0].kind == "head":
            own = torch.eye(heads).repeat_interleave(vectors.shape[-1] // heads, dim=1).to(vectors)
            vectors = vectors * own[torch.tensor([node.feature for node in nodes])]
        found.append(Reader(point, torch.tensor(rows), vectors, positions))
    return found
