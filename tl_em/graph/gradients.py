"""A forward pass kept for gradients: where the stream is cut or tapped, and the rows of edges that come of it.

    edge[t, s] = v_t . d read_t / d leaf_s . w_s      v_t: what t reads (an encoder column);  w_s: what s writes

With norm scales, patterns and MLP outputs held fixed the residual stream is exactly linear in what is written to it, so
that a gradient times a write *is* an effect. Nothing is subclassed and the forward values do not change.

A *cut* replaces a tensor by a leaf of equal value: gradients stop there, and the leaf's gradient is the direct effect
of what is written at that point. A *tap* adds a leaf of zeros: gradients pass, and the leaf's is the total effect.

``torch.autograd.grad(is_grads_batched=True)`` takes many v_t at once through the graph of a *single* row: expanding the
prompt to a batch of targets instead (the usual procedure) costs 2 to 4 times the time and memory.

The control: the same effect by intervention with everything frozen at its recorded value (``tests/graph``).

Source: Ameisen et al. 2025, "Circuit Tracing" (transformer-circuits.pub/2025/attribution-graphs).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_em.graph.rules.base import Rule, hooks_of
from tl_em.graph.rules.frozen import Frozen
from tl_em.models.cache import read_once
from tl_em.models.hooks import LensModel, hooked
from tl_em.threads import own_warnings

STREAM = "blocks.0.hook_resid_pre"
LAST = "unembed.hook_in"
FROZEN = Frozen()
MANY = 16
"""Chunks from which the work is long enough for a progress bar and a word about its cost."""


@dataclass(eq=False)
class Linearised:
    """One forward pass, kept for gradients.

    Args:
        leaves: of cuts and taps, by hook point.
        read: what ran into each point, in the graph of the pass.
        logits: of the pass, detached.
    """

    leaves: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    logits: Float[Tensor, "pos d_vocab"] = field(init=False)

    def value(self, name: str) -> Float[Tensor, "pos width"]:
        """What was read at a point, as one vector a position."""
        return self.read[name].detach()[0].flatten(1)


Keep = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]


def linearise(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    *,
    cuts: Sequence[str] = (),
    taps: Sequence[str] = (),
    reads: Sequence[str] = (),
    rule: Rule = FROZEN,
    keep: Keep | None = None,
    start: Float[Tensor, "pos d_model"] | None = None,
) -> Linearised:
    """Run the tokens once under a rule.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        tokens: [pos].
        cuts: hook points at which gradients stop; taps: points through which they pass; reads: points to read.
        rule: what is held fixed.
        keep: for a cut, what of the value stays connected to what was read before it (a skip connection).
        start: in place of the residual stream's first value.

    Raises:
        UsageError: a rule that changes values. UnknownHookError, HookNotFiredError: the model lacks a point.
    """
    made, keep = Linearised(), keep or {}

    def at(name: str, x: Tensor, hook: Any) -> Tensor | None:
        if name == STREAM and start is not None:
            x = start[None].to(x)
        made.read[name] = x
        if name in cuts:
            made.leaves[name] = leaf = x.detach().clone().requires_grad_()
            if name not in keep:
                return leaf
            kept = keep[name](made.read)
            return leaf + kept - kept.detach()
        if name in taps:
            made.leaves[name] = leaf = torch.zeros_like(x, requires_grad=True)
            return x + leaf
        return None if start is None else x

    hooks = [*hooks_of(rule, model), *((name, partial(at, name)) for name in dict.fromkeys((*cuts, *taps, *reads)))]
    with torch.set_grad_enabled(bool(cuts or taps)), own_warnings(), hooked(model, hooks):
        # A Bridge says that a norm whose scale a hook gives back is computed step by step, which is what is wanted.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        made.logits = read_once(model, tokens[None]).detach()[0]
    return made


# --- Rows of edges ----------------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """What some nodes write at one point and position: ``vectors`` [node width], in the units of the point."""

    point: str
    pos: int
    rows: Int[Tensor, " node"]
    vectors: Float[Tensor, "node width"]


class Reader(NamedTuple):
    """What some nodes read at one point: ``vectors`` [node width] at ``positions``, or [node pos width] at all."""

    point: str
    rows: Int[Tensor, " node"]
    vectors: Float[Tensor, "node *axes"]
    positions: Int[Tensor, " node"] | None = None

    def split(self, chunk: int) -> Iterator[Reader]:
        """Parts of at most ``chunk`` nodes."""
        for at in torch.arange(len(self.rows)).split(chunk):
            positions = None if self.positions is None else self.positions[at]
            yield Reader(self.point, self.rows[at], self.vectors[at], positions)

    def dense(self, like: Float[Tensor, "1 pos *axes"]) -> Float[Tensor, "node 1 pos *axes"]:
        """As gradients of the tensor that is read."""
        vectors = self.vectors.to(like)
        if self.positions is None:
            return vectors.reshape(len(self.rows), *like.shape)
        full = like.new_zeros(len(self.rows), like.shape[1], vectors.shape[-1])
        full[torch.arange(len(self.rows)), self.positions] = vectors
        return full.reshape(len(self.rows), *like.shape)


def gradients(linear: Linearised, reader: Reader) -> dict[str, Float[Tensor, "node pos width"]]:
    """Gradient of what each node reads, at every cut or tap before it."""
    read = linear.read[reader.point]
    if not read.requires_grad:
        return {}
    found = torch.autograd.grad(
        read, list(linear.leaves.values()), reader.dense(read.detach()),
        retain_graph=True, allow_unused=True, is_grads_batched=True,
    )  # fmt: skip
    return {name: grad[:, 0].flatten(2) for name, grad in zip(linear.leaves, found, strict=True) if grad is not None}


def adjacency(
    linear: Linearised, readers: Sequence[Reader], writers: Sequence[Writer], *, nodes: int, chunk: int
) -> Float[Tensor, "node node"]:
    """Direct effects, row = target, column = source.

    Args:
        linear: a pass with a cut at every point that is written.
        readers, writers: the nodes' vectors, with their rows.
        nodes: how many there are.
        chunk: readers at once; memory grows with it.

    Returns:
        [node node] on the CPU, in the model's dtype.
    """
    dtype = next(iter(linear.leaves.values())).dtype
    edges = torch.zeros(nodes, nodes, dtype=dtype)
    parts = [part for reader in readers for part in reader.split(chunk)]
    for part in tqdm(parts, desc="edges", unit="chunk", disable=None if len(parts) >= MANY else True, leave=False):
        for name, grad in gradients(linear, part).items():
            for writer in writers:
                if writer.point == name:
                    effect = grad[:, writer.pos] @ writer.vectors.to(grad).T
                    edges[part.rows[:, None], writer.rows[None]] += effect.cpu()
    return edges
