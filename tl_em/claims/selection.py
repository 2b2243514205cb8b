"""Choose one direction among many by what it does, then ask other prompts and random directions whether that was luck.

    cascade    depth -> induce -> KL -> bypass: each score is measured only where the earlier criteria were met

The rule takes the lowest bypass among candidates that meet every criterion, so a candidate that failed one cannot be
chosen whatever its other scores are: the pick is the same as with every score of every candidate (``full=True``).
The chosen score is the lowest of many and therefore too low.  *Optimism* is the winner's bypass on the selection
prompts minus that on held-out prompts (negative: the selection flattered it); the control is random directions of the
within-class covariance with the same treatment.

Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C; its procedure has neither of the two controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tl_em.arguments import FRACTION, NATURAL, NOT_NEGATIVE, SEED, checked, finite
from tl_em.claims.criteria import SCORES, Criteria, rejections, winner
from tl_em.directions.candidates import Candidates
from tl_em.directions.direction import Direction, check_fits
from tl_em.directions.geometry import control_directions
from tl_em.errors import UsageError
from tl_em.interventions import many as under
from tl_em.metrics import Metric, refusal_log_odds
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.means import as_contrast
from tl_em.models.modes import in_plain_torch
from tl_em.models.stream import capture
from tl_em.showing import showable
from tl_em.stats import Estimate, control_p, difference, mean

if TYPE_CHECKING:
    import pandas as pd

NO_DIFFERENCE, NOT_LOWEST, CHOSEN = "no difference", "not the lowest bypass", "chosen"
STREAMS = ("resid_pre", "resid_post")


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen direction, everything that was chosen from, and how far the choice can be believed.

    Args:
        direction: the winner.
        table: a row a candidate: position, layer, bypass, induce, kl and ``fate``: ``"chosen"``, or the first
            criterion that removed it (depth, induce, kl, not finite, no difference), or ``"not the lowest bypass"``.
            A score that was not needed for the choice is NaN.
        untreated: the metric as the model is: ``bypass`` on the positive prompts, ``induce`` on the negative ones.
        held_out: bypass, induce, kl and untreated of the winner on the test prompts; empty without a test set.
        optimism: bypass on the selection prompts minus bypass on the test prompts; ``None`` without a test set.
        controls: a row a random direction: its bypass and induce, on the test prompts (else on those of the selection);
            none where activations at the winner's site do not vary within the classes.
        p: share of directions, the winner among them, that do at least as well as the winner; by score.
        criteria: the rule's bounds.
        metric: the metric's name and unit.
    """

    direction: Direction
    table: pd.DataFrame
    untreated: Mapping[str, float]
    held_out: Mapping[str, Estimate]
    optimism: Estimate | None
    controls: pd.DataFrame
    p: Mapping[str, float]
    criteria: Criteria
    metric: str = field(default="")

    @property
    def estimate(self) -> Estimate | None:
        """Bypass of the winner on the test prompts."""
        return self.held_out.get("bypass")

    def to_pandas(self) -> pd.DataFrame:
        """The table of all candidates."""
        return self.table.copy()

    def plot(self, *, width: float = 7.0) -> Any:
        """The three scores of every candidate by layer, as a matplotlib figure."""
        from tl_em.report import plots

        return plots.selection(self, width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.plotted(self, lines=4)

    def __repr__(self) -> str:
        chosen = self.table[self.table["fate"] == CHOSEN].iloc[0]
        lines = [
            f"Selection(position {self.direction.position!r}, layer {self.direction.site.layer} of "
            f"{self.criteria.n_layers}, from {len(self.table)} candidates; {self.metric})",
            f"  bypass {chosen['bypass']:.2f} (untreated {self.untreated['bypass']:.2f}), induce "
            f"{chosen['induce']:.2f} (untreated {self.untreated['induce']:.2f}), KL {chosen['kl']:.3f}",
            f"  held out: bypass {self.estimate}, optimism {self.optimism}"
            if self.held_out
            else "  held out: not measured, so the bypass above is too low; pass test=",
        ]
        found = ", ".join(f"{name} p = {value:.3g}" for name, value in self.p.items())
        lines.append(f"  against {len(self.controls)} random directions: {found or 'not measured'}")
        return showable("\n".join(lines), lines=True)


@checked(contrast=as_contrast, max_kl=NOT_NEGATIVE, min_induce=finite, max_depth=FRACTION, seed=SEED, controls=NATURAL)
@in_plain_torch
def select_direction(
    model: LensModel,
    candidates: Candidates | Sequence[Direction],
    contrast: ContrastSet,
    *,
    metric: Metric = refusal_log_odds,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    max_depth: float = 0.8,
    full: bool = False,
    seed: int = 0,
    test: ContrastSet | None = None,
    controls: int = 20,
) -> Selection:
    """The direction whose ablation removes the behaviour most, among those that also induce it and spare the rest.

    Args:
        model: any HookedTransformer or TransformerBridge.
        candidates: from ``candidate_directions``, on other prompts.
        contrast: the prompts to choose on: positive ones show the behaviour, negative ones do not.
        metric: how strongly a prompt shows the behaviour; higher is more.
        max_kl: largest KL from the untouched model at the last token of the negative prompts under ablation, in nats.
        min_induce: smallest mean metric on the negative prompts under addition.
        max_depth: layers from this share of the depth on are discarded.
        full: measure every score of every candidate; the choice is the same.
        seed: seed of the intervals and of the random directions.
        test: prompts for the held-out estimate of the winner; none of them may be in ``contrast``.
        controls: number of random directions that the winner is held against; 0 for none.

    Returns:
        A Selection.

    Raises:
        NoCandidateError: no candidate meets the criteria; the message counts what removed them.
        UsageError: no candidates, candidates outside the residual stream, or test prompts that the choice was made on.
        ProvenanceError, WidthError: a candidate was made on another model.

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C.
    """
    _check(model, candidates, contrast, test)
    criteria = Criteria(int(model.cfg.n_layers), max_kl, min_induce, max_depth)
    table, bypass = _measured(model, list(candidates), contrast, metric, criteria, full)
    index = winner(table, criteria)
    direction = candidates[index]
    held_out = {} if test is None else _held_out(model, direction, test, metric, seed)
    random, p = _controls(model, direction, contrast, test or contrast, metric, controls, seed)
    return Selection(
        direction,
        _with_fates(table, index, criteria, candidates.without if isinstance(candidates, Candidates) else ()),
        {name: float(metric(model, prompts).double().mean()) for name, prompts in _arms(contrast).items()},
        {name: estimate for name, (_, estimate) in held_out.items()},
        difference(held_out["bypass"][0], bypass[index], seed=seed).estimate if held_out else None,
        random,
        p,
        criteria,
        f"{metric.name}, {metric.unit}",
    )


def _arms(contrast: ContrastSet) -> dict[str, Sequence[Prompt]]:
    return {"bypass": contrast.positive, "induce": contrast.negative}


def _check(
    model: LensModel, candidates: Candidates | Sequence[Direction], contrast: ContrastSet, test: ContrastSet | None
) -> None:
    if not len(candidates):
        raise UsageError("there are no candidates to choose from; make them with em.candidate_directions(model, …)")
    for direction in {(id(d.provenance), len(d.vector)): d for d in candidates}.values():
        check_fits(direction, model)
    elsewhere = sorted({direction.site.stream for direction in candidates} - set(STREAMS))
    if elsewhere:
        raise UsageError(
            f"candidates at {', '.join(elsewhere)} are not directions of the residual stream, in which all of them are "
            f"added and compared; read them at {' or '.join(STREAMS)}"
        )
    if test is None:
        return
    seen = [side for side in ("positive", "negative") if _shared(getattr(contrast, side), getattr(test, side))]
    if seen:
        raise UsageError(
            f"some {' and '.join(seen)} test prompts are among those that the choice is made on, so the estimate would "
            "not be a held-out one; pass disjoint sets, e.g. two parts of contrast.split()"
        )


def _shared(first: Sequence[Prompt], second: Sequence[Prompt]) -> bool:
    known = {str(prompt) for prompt in first}
    return any(str(prompt) in known for prompt in second)


def _measured(
    model: LensModel, directions: list[Direction], contrast: ContrastSet, metric: Metric, criteria: Criteria, full: bool
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """The table of scores, in the order of the directions, and the bypass of each prompt by row."""
    import pandas as pd

    where = {"position": [d.position for d in directions], "layer": [d.site.layer for d in directions]}
    table = pd.DataFrame(where | {name: float("nan") for name in ("bypass", "induce", "kl")})
    measures: dict[str, Callable[[list[Direction]], np.ndarray]] = {
        "induce": lambda some: under.induce(model, some, contrast.negative, metric),
        "kl": lambda some: under.divergence(model, some, contrast.negative),
        "bypass": lambda some: under.bypass(model, some, contrast.positive, metric),
    }
    bypass: dict[int, np.ndarray] = {}
    for done, name in enumerate(SCORES):
        kept = rejections(table, criteria, scored=SCORES[:done]) == ""
        rows = [i for i in range(len(directions)) if full or kept[i]]
        if not rows:
            break
        values = measures[name]([directions[i] for i in rows])
        table.loc[rows, name] = values.mean(1)
        bypass = dict(zip(rows, values, strict=True))
    return table, bypass


def _with_fates(
    table: pd.DataFrame, index: int, criteria: Criteria, without: Sequence[tuple[Any, int]]
) -> pd.DataFrame:
    """The table with what became of each candidate, and with the places that have no candidate."""
    import pandas as pd

    reasons = rejections(table, criteria)
    fate = np.where(reasons == "", NOT_LOWEST, reasons)
    fate[index] = CHOSEN
    table = table.assign(fate=fate)
    absent = [{"position": p, "layer": layer, "fate": NO_DIFFERENCE} for p, layer in without]
    return pd.concat([table, pd.DataFrame(absent)], ignore_index=True) if absent else table


def _held_out(
    model: LensModel, direction: Direction, test: ContrastSet, metric: Metric, seed: int
) -> dict[str, tuple[np.ndarray, Estimate]]:
    """Each score of the winner, prompt by prompt, and its estimate."""
    values = {
        "bypass": (under.bypass(model, [direction], test.positive, metric)[0], test.positive_groups),
        "untreated": (metric(model, test.positive).double().cpu().numpy(), test.positive_groups),
        "induce": (under.induce(model, [direction], test.negative, metric)[0], test.negative_groups),
        "kl": (under.divergence(model, [direction], test.negative)[0], test.negative_groups),
    }
    return {name: (x, mean(x, groups=groups, seed=seed)) for name, (x, groups) in values.items()}


def _controls(
    model: LensModel, direction: Direction, drawn: ContrastSet, on: ContrastSet, metric: Metric, count: int, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Bypass and induce of random directions, and how many of them do as well as the winner on the same prompts."""
    import pandas as pd

    if not count:
        return pd.DataFrame({"bypass": [], "induce": []}), {}
    site, position = direction.site, direction.position
    x = [capture(model, prompts, [site], position=position)[:, 0].double().numpy() for prompts in _arms(drawn).values()]
    if max(float(np.ptp(rows, axis=0).max()) for rows in x) == 0:  # one token at the first layer, in every prompt
        return pd.DataFrame({"bypass": [], "induce": []}), {}
    vectors = control_directions(x[0], x[1], count=count, norm=direction.norm, seed=seed)
    random = [Direction(torch.from_numpy(v), site, position=position) for v in vectors]
    measured = {
        "bypass": under.bypass(model, [direction, *random], on.positive, metric).mean(1),
        "induce": under.induce(model, [direction, *random], on.negative, metric).mean(1),
    }
    better = {"bypass": -1, "induce": 1}
    p = {name: control_p(better[name] * v[0], better[name] * v[1:], two_sided=False) for name, v in measured.items()}
    return pd.DataFrame({name: v[1:] for name, v in measured.items()}), p
