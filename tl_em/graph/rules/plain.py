"""Plain gradients: nothing is held fixed (attribution patching).

Source: Nanda 2023; Syed et al. 2023, arXiv:2310.10348.
"""

from __future__ import annotations

from tl_em.graph.rules.base import Rule


class Plain(Rule):
    """The gradient as it is."""

    name = "plain"
    held = "nothing"
