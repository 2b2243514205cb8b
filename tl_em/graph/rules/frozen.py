"""Norm scales and attention patterns held fixed: with MLP outputs constant too, the residual stream is linear.

    norm      y = w (x - mean) / s + b     s detached            attention  z = A v      A (the pattern) detached

Source: Ameisen et al. 2025, "Circuit Tracing" (transformer-circuits.pub/2025/attribution-graphs).
"""

from __future__ import annotations

from tl_em.graph.rules.base import Rule
from tl_em.models.hooks import HookFunction, LensModel, hook_points

_NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


class Frozen(Rule):
    """Norm scales and attention patterns stay."""

    name = "frozen"
    graphs = ("components", "SAEs", "transcoders")
    held = "norm scales, attention patterns"

    def hooks(self, model: LensModel) -> list[tuple[str, HookFunction]]:
        """Detach what norms divide by, and the patterns."""
        return [(name, lambda x, hook: x.detach()) for name in (*norm_scales(model), *patterns(model))]


def norm_scales(model: LensModel) -> list[str]:
    """What the norms of the blocks, and the last one, divide by."""
    layers, points = range(int(model.cfg.n_layers)), hook_points(model)
    wanted = [f"blocks.{layer}.{norm}.hook_scale" for layer in layers for norm in _NORMS] + ["ln_final.hook_scale"]
    return [name for name in wanted if name in points]


def patterns(model: LensModel) -> list[str]:
    """The attention patterns."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]
