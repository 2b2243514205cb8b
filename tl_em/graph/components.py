"""Graphs without a dictionary: attention heads, MLPs and embeddings, by position.

    total[s]   = g_s . (clean_s - reference_s)                        g_s: gradient of the target at what s writes
    edge[t, s] = d(g_t . out_t) / d(write_s) . (clean_s - reference_s)          directly: every other write held fixed

so that the edges out of a node sum to its total: edges into a component are in units of the weighted target. The
reference is another prompt of the same length (attribution patching), zero, or a mean over tokens; the rule says which
gradient g is (``rules``), and at which stream values on the way from the reference both lines are averaged.

The control is in every graph: exact ablation of the same nodes (``validation``).

Source: Nanda 2023 and Syed et al. 2023, arXiv:2310.10348 (edge attribution patching); Hanna et al. 2024,
arXiv:2403.17806 (integrated gradients on the input embeddings); Jafari et al. 2025, arXiv:2508.21258 (RelP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.graph.adapters import adapter_writes
from tl_em.graph.edges import CHUNK, MAX_BYTES, Pass, Wiring, Written, room, timed, total_gradients, totals_of
from tl_em.graph.gradients import MANY, STREAM, Reader, linearise
from tl_em.graph.inputs import ids_of, is_chat, is_ids
from tl_em.graph.nodes import Node
from tl_em.graph.rules import as_rule
from tl_em.graph.rules.base import AnyRule, Rule, points_of
from tl_em.graph.rules.plain import Plain
from tl_em.graph.targets import Goal, Target, goal_of, point_of, text_of
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode


def component_plan(
    model: LensModel,
    encoded: EncodedPrompt,
    target: Target,
    *,
    rule: AnyRule | None = None,
    against: Any = None,
    adapter: LensModel | None = None,
    chunk: int = CHUNK,
    max_bytes: int = MAX_BYTES,
) -> Wiring:
    """Nodes, reads and writes of a graph of components; what it will cost is told before the work.

    Raises:
        UsageError: a reference of another length, or one that is none; no rule. GraphTooLargeError: no room.
    """
    rule = as_rule(rule, "components")
    tokens, layers, goal_point = torch.tensor(encoded.ids), range(int(model.cfg.n_layers)), point_of(model, target)
    heads, mlps = [f"blocks.{i}.attn.hook_z" for i in layers], [f"blocks.{i}.hook_mlp_out" for i in layers]
    points = [STREAM, *heads, *mlps]
    parts = [] if adapter is None else adapter_writes(model, adapter, tokens)
    extra = sorted({part.point for part in parts} - set(points))
    clean = values(model, encoded, points)
    reference = references(model, encoded, clean, "mean" if against is None else against)
    starts = points_of(rule, reference[STREAM].expand_as(clean[STREAM]), clean[STREAM])
    goal = goal_of(model, encoded, target, linearise(model, tokens, reads=[goal_point], rule=Plain()).logits)
    seconds = _told(model, tokens, clean, goal, rule, starts, chunk=chunk, max_bytes=max_bytes)
    written = _written(model, encoded, clean, reference, parts)
    passes, totals = [], torch.zeros(len(written) + len(goal.nodes), dtype=goal.vectors.dtype)
    for start in starts:
        grads = total_gradients(model, tokens, [*points, *extra], goal, rule, start)
        cut = linearise(model, tokens, cuts=points, taps=extra, reads=[goal_point], rule=rule, start=start)
        passes.append(Pass(cut, tuple(_readers(written, grads, int(model.cfg.n_heads)))))
        totals += totals_of(written, grads, goal) / len(starts)
    settings = {
        "kind": "components", "rule": rule.name, "against": _named(against), "adapter": adapter is not None,
        "approximation": f"first order ({rule.name} gradients) of replacing each node by its reference",
        "edges": "into a component: the part of the source's effect on the weighted target that passes directly to it",
    }  # fmt: skip
    return Wiring(encoded, tuple(passes), tuple(written), goal, settings, totals=totals, references=reference,
                seconds=seconds)  # fmt: skip


def _told(
    model: LensModel, tokens: Tensor, clean: Mapping[str, Tensor], goal: Goal, rule: Rule,
    starts: Sequence[Tensor | None], *, chunk: int, max_bytes: int,
) -> float | None:  # fmt: skip
    """What the edges should take, from shapes and one chunk at the middle layer: before anything that grows with them.

    Raises:
        GraphTooLargeError: no room for the edges.
    """
    heads, layers, length = int(model.cfg.n_heads), int(model.cfg.n_layers), len(tokens)
    nodes = length * (1 + layers * (1 + heads)) + len(goal.nodes)
    chunk, size = room(nodes, clean.values(), length, "components", chunk=chunk, max_bytes=max_bytes)
    parts = len(starts) * layers * sum(math.ceil(length * n / chunk) for n in (heads, 1))
    if parts < MANY:
        return None
    middle = f"blocks.{layers // 2}.hook_mlp_out"
    linear = linearise(model, tokens, cuts=list(clean), reads=[goal.point], rule=rule, start=starts[0])
    at = torch.arange(min(chunk, length * heads))
    return timed(linear, Reader(middle, at, torch.ones_like(clean[middle])[:1].expand(len(at), -1), at % length), parts,
                 size)  # fmt: skip


def _named(against: Any) -> str:
    if against is None or (isinstance(against, str) and against in ("zero", "mean")):
        return against or "mean"
    return "mean of prompts" if _several(against) else "prompt"


def _several(against: Any) -> bool:
    if not isinstance(against, list | tuple) or not against or is_chat(against):
        return False
    return not is_ids(against) or all(is_ids(each) for each in against)  # rows, not the numbers of one


# --- Values and what they are compared with ---------------------------------------------------------------------------


def values(model: LensModel, encoded: EncodedPrompt, points: Sequence[str]) -> dict[str, Float[Tensor, "pos width"]]:
    """What runs through some points, one vector a position."""
    run = linearise(model, torch.tensor(encoded.ids), reads=points, rule=Plain())
    return {name: run.value(name) for name in points}


def references(
    model: LensModel, encoded: EncodedPrompt, clean: Mapping[str, Tensor], against: Any
) -> dict[str, Float[Tensor, "pos width"]]:
    """What each point is replaced by, [pos width] or [1 width]."""
    if isinstance(against, str) and against == "zero":
        return {name: torch.zeros_like(x[:1]) for name, x in clean.items()}
    if isinstance(against, str) and against == "mean":
        return {name: x.mean(0, keepdim=True) for name, x in clean.items()}
    several = _several(against)
    others = [_encoded(model, each) for each in (against if several else [against])]
    if several:
        each = [values(model, other, list(clean)) for other in others]
        if {len(other) for other in others} == {len(encoded)}:
            return {name: torch.stack([one[name] for one in each]).mean(0) for name in clean}
        return {name: torch.cat([one[name] for one in each]).mean(0, keepdim=True) for name in clean}
    if len(others[0]) != len(encoded):
        raise UsageError(
            f"the reference has {len(others[0])} tokens and the prompt {len(encoded)}, so positions do not match; give "
            "one of equal length, a tuple of prompts (their mean), 'mean' or 'zero'"
        )
    return values(model, others[0], list(clean))


def _encoded(model: LensModel, prompt: Any) -> EncodedPrompt:
    """A reference in any form that a prompt may have."""
    if isinstance(prompt, EncodedPrompt) or is_ids(prompt):
        prompt = EncodedPrompt.from_ids(ids_of(getattr(prompt, "ids", prompt), int(model.cfg.d_vocab)))
    if not isinstance(prompt, str | EncodedPrompt) and not is_chat(prompt):
        raise UsageError(f"against={prompt!r:.40} is no reference; give a prompt, a tuple of prompts, 'mean' or 'zero'")
    return encode(model, [prompt])[0]


# --- Nodes ------------------------------------------------------------------------------------------------------------


def _written(
    model: LensModel,
    encoded: EncodedPrompt,
    clean: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    parts: Sequence[Written],
) -> list[Written]:
    """Every component at every position, with what replacing it takes away."""
    found = list(parts)
    own = {(part.point, part.node.pos): part.vector for part in parts}
    heads = int(model.cfg.n_heads)
    for pos, token in enumerate(encoded.ids):
        away = {name: x[pos] - reference[name].expand_as(x)[pos] for name, x in clean.items()}
        node = Node("token", -1, pos, feature=int(token), label=text_of(model, token))
        found.append(Written(node, STREAM, away[STREAM]))
        for layer in range(int(model.cfg.n_layers)):
            z, mlp = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"
            for head, vector in enumerate(torch.block_diag(*away[z].view(heads, -1))):
                node = Node("head", layer, pos, feature=head, activation=float(vector.norm()))
                found.append(Written(node, z, vector))
            vector = away[mlp] - own.get((mlp, pos), torch.zeros_like(away[mlp]))
            found.append(Written(Node("mlp", layer, pos, activation=float(vector.norm())), mlp, vector))
    return sorted(found, key=lambda each: each.node.place)


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
