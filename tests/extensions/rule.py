"""A rule of attribution of one's own: attention patterns pass half of their gradient, everything else all of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import tl_em as em


class HalfPatterns(em.Rule):
    """Where a head reads is held by half: between ``"plain"`` (all of the gradient) and ``"frozen"`` (none)."""

    name = "half patterns"
    held = "half of each attention pattern"

    def hooks(self, model: em.LensModel) -> list[Any]:
        def half(x: Tensor, hook: Any) -> Tensor:
            return 0.5 * x + 0.5 * x.detach()

        return [(f"blocks.{layer}.attn.hook_pattern", half) for layer in range(model.cfg.n_layers)]
