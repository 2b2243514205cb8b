"""The rule that picks one candidate from a table of scores, as a pure function of that table.

    discard    layer >= int(max_depth * n_layers);  a score that is not finite;  induce < min_induce;  KL > max_kl
    choose     the lowest bypass among the rest

*bypass* is the mean metric on positive prompts under ablation (low: without the direction the behaviour is gone),
*induce* the mean metric on negative prompts under addition (high: the direction brings it about), *KL* the harm that
ablation does to negative prompts.  Directions close to the output are discarded because they write the tokens
themselves. The lowest of many scores on few prompts is too low (the winner's curse), so a pick is evidence of nothing
until it was measured on other prompts, beside random directions with the same treatment: so does ``select_direction``.

Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tl_em.arguments import COUNT, FRACTION, NOT_NEGATIVE, checked, finite
from tl_em.errors import NoCandidateError, UsageError
from tl_em.models.sites import Position

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("induce", "kl", "bypass")
"""In the order in which the cascade measures them."""
DEPTH, NOT_FINITE, INDUCE, KL = "depth", "not finite", "induce", "kl"


class Criteria(NamedTuple):
    """What a candidate must meet; see the module's docstring."""

    n_layers: int
    max_kl: float = 0.1
    min_induce: float = 0.0
    max_depth: float = 0.8

    @property
    def first_deep_layer(self) -> int:
        """The first layer that is discarded."""
        return int(self.max_depth * self.n_layers)


@checked(n_layers=COUNT, max_kl=NOT_NEGATIVE, min_induce=finite, max_depth=FRACTION)
def select_candidate(
    scores: pd.DataFrame, *, n_layers: int, max_kl: float = 0.1, min_induce: float = 0.0, max_depth: float = 0.8
) -> tuple[Position, int]:
    """The candidate with the lowest bypass score among those that meet all criteria.

    Args:
        scores: a row a candidate; columns position, layer, bypass, induce (in the metric's unit) and kl (nats).
        n_layers: number of layers of the model.
        max_kl: largest KL from the untouched model, in nats.
        min_induce: smallest induce score.
        max_depth: layers from this share of the depth on are discarded.

    Returns:
        ``(position, layer)``; of equal candidates the first.

    Raises:
        NoCandidateError: none is left; the message says which criterion removed how many.
        UsageError: a column is missing, or there are no rows.

    Example:
        >>> import pandas as pd
        >>> rows = [(-1, 1, -3.0, 2.0, 0.02), (-1, 2, -5.0, 4.0, 0.50), (-1, 3, -9.0, 5.0, 0.01)]
        >>> scores = pd.DataFrame(rows, columns=["position", "layer", "bypass", "induce", "kl"])
        >>> select_candidate(scores, n_layers=4)
        (-1, 1)
        >>> select_candidate(scores, n_layers=4, max_kl=0.5)
        (-1, 2)

    Source: Arditi et al. 2024, arXiv:2406.11717, appendix C.
    """
    row = scores.iloc[winner(scores, Criteria(n_layers, max_kl, min_induce, max_depth))]
    position: Any = row["position"]
    named: Any = position if isinstance(position, str) else int(position)
    return named, int(row["layer"])


def winner(scores: pd.DataFrame, criteria: Criteria) -> int:
    """Row number of the chosen candidate.

    Raises:
        NoCandidateError: none is left.
    """
    reasons = rejections(scores, criteria)
    left = np.flatnonzero(reasons == "")
    if not len(left):
        raise NoCandidateError(_nothing_left(scores, criteria, reasons))
    return int(left[np.argmin(scores["bypass"].to_numpy(dtype=float)[left])])


def rejections(scores: pd.DataFrame, criteria: Criteria, *, scored: Sequence[str] = SCORES) -> np.ndarray:
    """For each row the first criterion that removes it, "" where none does; only ``scored`` columns are looked at."""
    missing = [name for name in ("position", "layer", *SCORES) if name not in scores]
    if missing or not len(scores):
        raise UsageError(
            f"the table of scores has {len(scores)} rows and lacks {', '.join(missing) or 'no column'}, so nothing "
            "can be chosen from it; give one row a candidate with position, layer, bypass, induce and kl"
        )
    value = {name: scores[name].to_numpy(dtype=float) for name in SCORES}
    below = {"induce": value["induce"] < criteria.min_induce, "kl": value["kl"] > criteria.max_kl}
    conditions, names = [scores["layer"].to_numpy() >= criteria.first_deep_layer], [DEPTH]
    for name in scored:
        conditions += [~np.isfinite(value[name]), *([below[name]] if name in below else [])]
        names += [NOT_FINITE, *([name] if name in below else [])]
    return np.select(conditions, names, default="").astype(object)


def _nothing_left(scores: pd.DataFrame, criteria: Criteria, reasons: np.ndarray) -> str:
    count = {name: int(np.sum(reasons == name)) for name in (DEPTH, NOT_FINITE, INDUCE, KL)}
    best = {name: scores[name][reasons == name] for name in (INDUCE, KL)}
    said = [
        f"{count[DEPTH]} too deep (layer >= {criteria.first_deep_layer} of {criteria.n_layers}: max_depth)",
        f"{count[NOT_FINITE]} with a score that is not finite",
        f"{count[INDUCE]} with induce < {criteria.min_induce:g}"
        + (f" (the best {best[INDUCE].max():.3g})" if count[INDUCE] else ""),
        f"{count[KL]} with KL > {criteria.max_kl:g}" + (f" (the least {best[KL].min():.3g})" if count[KL] else ""),
    ]
    return (
        f"None of {len(scores)} candidates is left: {'; '.join(said)}. So no direction is shown to cause the behaviour "
        "and spare the rest, which may be the finding. Else try other positions, more prompts or another metric, or "
        "say a looser bound openly: max_kl=, min_induce=, max_depth="
    )
