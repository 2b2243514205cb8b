"""Errors of dictionaries, read halfway to their removal: the midpoint rule for the integral of the gradient.

    f(x) - f(x - e) = e . (mean of the gradient from x - e to x)  ~  e . gradient at x - e / 2

An error is about half of the stream, and what the model does without it is far from linear in it. The errors of some
positions are halved at a time, so that each is read with most of the others as they are: four passes for all of them.
The control is in every graph: exact ablation of the same nodes (``validation``).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tl_em.graph.edges import Written, total_gradients
from tl_em.graph.rules.base import Rule
from tl_em.graph.targets import Goal
from tl_em.models.hooks import LensModel, hooked

FEW, PARTS = 4, 4
"""Done for at most so many dictionaries (each takes its passes); every so many-th position at a time."""


def halfway(
    model: LensModel, tokens: Tensor, written: Sequence[Written], goal: Goal, rule: Rule, totals: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """The totals, those of error nodes by the gradient halfway to their removal.

    Args:
        totals: of the nodes as written, then the targets.
    """
    totals, rows = totals.clone(), [row for row, each in enumerate(written) if each.node.kind == "error"]
    points = sorted({written[row].point for row in rows})
    for point in points if len(points) <= FEW else ():
        for part in range(PARTS):
            some = [row for row in rows if written[row].point == point and written[row].node.pos % PARTS == part]
            if not some:
                continue
            away = written[some[0]].vector.new_zeros(len(tokens), len(written[some[0]].vector))
            for row in some:
                away[written[row].node.pos] = written[row].vector / 2
            with hooked(model, [(point, lambda x, hook, away=away: x - away.to(x))]):
                gradient = total_gradients(model, tokens, [point], goal, rule)[point]
            for row in some:
                totals[row] = gradient[written[row].node.pos] @ written[row].vector
    return totals
