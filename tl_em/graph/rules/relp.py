"""Relevance patching: what is frozen, and MLPs by secants in place of tangents.

    act(x) = x * (act(x) / x), the ratio detached; a product of gates gives each factor one half

Source: RelP, Jafari et al. 2025, arXiv:2508.21258; secant rules, Achtibat et al. 2024, arXiv:2402.05602.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_em.graph.rules.frozen import Frozen
from tl_em.models.hooks import HookFunction, LensModel, hook_points


class RelP(Frozen):
    """Norm scales and patterns stay, activation functions pass on ``act(x) / x``."""

    name = "relp"
    graphs = ("components", "SAEs")
    held = "norm scales, attention patterns, ratios of activation functions"

    def hooks(self, model: LensModel) -> list[tuple[str, HookFunction]]:
        """What ``frozen`` detaches, and each MLP's activation."""
        return super().hooks(model) + [each for i in range(int(model.cfg.n_layers)) for each in _secant(model, i)]


def _secant(model: LensModel, layer: int) -> list[tuple[str, HookFunction]]:
    """``act(x) = x * ratio`` with the ratio detached; with a gate, half of the product's change to each factor."""
    head = f"blocks.{layer}.mlp."
    gated = head + "hook_pre_linear" in hook_points(model)
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, hook: Any) -> None:
        seen[name] = x

    def post(x: Tensor, hook: Any) -> Tensor:
        pre = seen["hook_pre"].view(x.shape)
        if not gated:
            return pre * _ratio(x.detach(), pre.detach())
        other = seen["hook_pre_linear"].view(x.shape)
        ratio = _ratio(x.detach(), (pre * other).detach())
        return ratio * (0.5 * pre * other.detach() + 0.5 * pre.detach() * other)

    notes = ["hook_pre", "hook_pre_linear"] if gated else ["hook_pre"]
    return [*((head + name, partial(note, name)) for name in notes), (head + "hook_post", post)]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))
