"""Rows of the adjacency: direct effects of every write on many readers, from one forward pass of one prompt.

    edge[t, s] = v_t . d read_t / d leaf_s . w_s      v_t: what t reads (an encoder column);  w_s: what s writes

``torch.autograd.grad(is_grads_batched=True)`` takes many v_t at once through the graph of a *single* row: expanding the
prompt to a batch of targets instead (the usual procedure) costs 2 to 4 times the time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_em.graph.freeze import Linearised

MANY = 16
"""Chunks from which the work is long enough for a progress bar and a word about its cost."""


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
    return {
        name: grad[:, 0].flatten(2) for name, grad in zip(linear.leaves, found, strict=True) if grad is not None
    }


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
