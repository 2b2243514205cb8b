"""What a fine-tune adds, as nodes of its own: a LoRA's part would else be spread over error nodes.

    part[l, stream] = write_tuned(x) - write_base(x)        x: what the tuned model's block reads at this prompt

The base runs once, with the tuned model's residual stream put in at every block (and its attention output after the
attention's part was read), so that each difference is what the changed weights of that one module do. For a LoRA that
was merged into a copy, as in this package, that is exactly the adapter's contribution; a full fine-tune counts the same
way, and embeddings and norms belong to the module that reads them.

The control: with ``adapter=`` the model itself there is no such node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_em.errors import PairMismatchError
from tl_em.graph.graph import Node
from tl_em.graph.plan import Written
from tl_em.models.hooks import LensModel, hooked, write_points

_SMALL = 1e-6
"""Of a write's norm: below it a difference is rounding."""


def adapter_writes(
    tuned: LensModel, base: LensModel, tokens: Int[Tensor, " pos"]
) -> list[Written]:
    """One node for each write and position that the fine-tune changes.

    Args:
        tuned, base: the model of the graph, and the model before the fine-tune.
        tokens: [pos].

    Raises:
        PairMismatchError: the models differ in shape.
    """
    if any(getattr(tuned.cfg, name) != getattr(base.cfg, name) for name in ("n_layers", "d_model", "d_vocab")):
        raise PairMismatchError("adapter= has another shape than the model, so no difference is defined; pass its base")
    writes = write_points(tuned)[1:]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(int(tuned.cfg.n_layers))]
    theirs, ours = {}, {}
    with torch.no_grad():
        with hooked(tuned, [(name, _noting(theirs, name)) for name in (*streams, *writes)]):
            tuned(tokens[None].to(tuned.cfg.device))
        putting = [(name, _putting(ours, name, theirs[name])) for name in (*streams, *writes)]
        with hooked(base, putting):
            base(tokens[None].to(base.cfg.device))
    found = []
    for point in writes:
        part, size = (theirs[point] - ours[point].to(theirs[point]))[0], theirs[point].norm()
        _, layer, place = point.split(".", 2)
        stream = "attn_out" if place.startswith(("hook_attn", "ln1")) else "mlp_out"
        for pos in range(len(part)):
            if part[pos].norm() > _SMALL * size:
                size_here = float(part[pos].norm())
                node = Node("adapter", int(layer), pos, stream=stream, activation=size_here, label="adapter")
                found.append(Written(node, point, part[pos]))
    return found


def _noting(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, Any], None]:
    def note(x: Tensor, hook: Any) -> None:
        seen[name] = x.detach().clone()

    return note


def _putting(seen: dict[str, Tensor], name: str, value: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """Note what the base writes, and let the tuned model's write stand."""

    def put(x: Tensor, hook: Any) -> Tensor:
        seen[name] = x.detach().clone()
        return value.to(x)

    return put
