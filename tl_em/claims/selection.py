"""Choose one direction among many by what it does, then ask other prompts and random directions whether that was luck.

    cascade    depth -> induce -> KL -> bypass: each score is measured only where the earlier criteria were met

    discard    layer >= int(max_depth * n_layers);  a score that is not finite;  induce < min_induce;  KL > max_kl
    choose     the lowest bypass among the rest

*bypass* is the mean metric on positive prompts under ablation (low: without the direction the behaviour is gone),
*induce* the mean metric on negative prompts under addition (high: the direction brings it about), *KL* the harm that
ablation does to negative prompts.  Directions close to the output are discarded because they write the tokens
themselves.  A candidate that failed a criterion cannot be chosen whatever its other scores are: the pick is the same as
with every score of every candidate (``full=True``).

The lowest of many scores on few prompts is too low (the winner's curse), so a pick is evidence of nothing until it was
measured on other prompts.  *Optimism* is the winner's bypass on the selection prompts minus that on held-out prompts
(negative: the selection flattered it).  ``select_candidate`` is the rule alone, on a table of scores.

**Control.**  The winner of many beats most single random directions even where all candidates are noise.  So the search
is repeated: in each *round* a random direction of the within-class covariance stands in place of every candidate that
is not too deep, as long as that.  The covariance is that of the prompts which the candidates were made from, since
theirs is the noise that a candidate holds: that of a few other prompts is larger or smaller by chance, in all rounds
alike, and so would be what the best of many does.  p is the share of rounds, the search itself among them, of which
some direction does at least as well (for bypass: one whose KL is not too large) on the prompts that the winner is
tested on.  It counts for less than a winner's p alone would, and holds however the choice was made.

Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C; its procedure has neither of the two controls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tl_em.arguments import COUNT, FRACTION, NATURAL, NOT_NEGATIVE, SEED, checked, finite
from tl_em.claims.arms import KL, Arm, Values
from tl_em.claims.controls import activations_at, random_in_place
from tl_em.claims.questions.use import CONTROL_PROMPTS
from tl_em.directions.candidates import Candidates
from tl_em.directions.direction import Direction, check_fits
from tl_em.errors import NoCandidateError, NuisanceWarning, UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.many import Along, Measure, Scores, along_each, kl_from_now
from tl_em.metrics import Metric, measured, refusal_log_odds
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet, already_used
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import encode
from tl_em.models.sites import Position
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import showable
from tl_em.stats import Estimate, control_p, difference

SCORES = ("induce", KL, "bypass")
"""In the order in which the cascade measures them."""
DEPTH, NOT_FINITE, INDUCE = "depth", "not finite", "induce"
NO_DIFFERENCE, NOT_LOWEST, CHOSEN = "no difference", "not the lowest bypass", "chosen"
STREAMS = ("resid_pre", "resid_post")


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
        controls: a row a round of random directions in place of the candidates: the lowest bypass and the highest
            induce among them, on at most 16 of the test prompts (else of those of the selection).  They are drawn from
            the prompts that the candidates were made from; where these are not known (directions in a list), from all
            prompts given here.
        p: share of rounds, the search itself among them, that do at least as well as the winner; by score.
        criteria: the rule's bounds.
        metric: the metric's name and unit.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> asked, whole = pair.behaviours["refusal"], pair.contrasts["refusal"]
        >>> found = em.candidate_directions(pair.base, whole.split(seed=0).train, positions=["prompt_end"], layers=[1])
        >>> bounds = {"max_kl": 5.0, "max_depth": 1.0, "controls": 0}
        >>> pick = em.select_direction(pair.base, found, whole.split(seed=0).select, metric=asked.metric, **bounds)
        >>> len(pick.to_pandas())
        1
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

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """The three scores of every candidate by layer, as a matplotlib figure.

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.
        """
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
        rounds = f"{len(self.controls)} rounds of random directions in place of the candidates"
        lines.append(f"  against {rounds}: {found or 'not measured'}")
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
        controls: number of rounds of random directions, one in place of every candidate, that the winner is held
            against; 20 are needed for p < .05. A round costs two passes over 16 prompts a candidate; 0 for none.

    Returns:
        A Selection.

    Raises:
        NoCandidateError: no candidate meets the criteria; the message counts what removed them.
        UsageError: no candidates, candidates outside the residual stream, test prompts that the choice was made on, or
            prompts that all made a candidate (some: a NuisanceWarning).
        ProvenanceError, WidthError: a candidate was made on another model.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> parts, metric = pair.contrasts["refusal"].split(seed=0), pair.behaviours["refusal"].metric
        >>> found = em.candidate_directions(pair.base, parts.train, positions=["prompt_end"], layers=[1, 2])
        >>> pick = em.select_direction(pair.base, found, parts.select, metric=metric, max_kl=5.0, max_depth=1.0)
        >>> str(pick.direction.site)
        'resid_pre[1]'

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3 and appendix C.
    """
    _check(model, candidates, contrast, test)
    criteria = Criteria(int(model.cfg.n_layers), max_kl, min_induce, max_depth)
    table, bypass = _measured(model, list(candidates), contrast, metric, criteria, full)
    index = winner(table, criteria)
    direction = candidates[index]
    held_out, optimism = (
        ({}, None)
        if test is None
        else _held_out(model, direction, bypass[index], *_belonging(model, direction, contrast, test), metric, seed)
    )
    rounds = _rounds(model, candidates, criteria, contrast, test, controls, seed)
    random, p = _controls(model, rounds, direction, contrast, test or contrast, metric, criteria, controls, seed)
    return Selection(
        direction,
        _with_fates(table, index, criteria, candidates.without if isinstance(candidates, Candidates) else ()),
        {
            "bypass": float(measured(metric, model, contrast.positive).mean()),
            "induce": float(measured(metric, model, contrast.negative).mean()),
        },
        held_out,
        optimism,
        random,
        p,
        criteria,
        f"{metric.name}, {metric.unit}",
    )


def _check(
    model: LensModel, candidates: Candidates | Sequence[Direction], contrast: ContrastSet, test: ContrastSet | None
) -> None:
    if not len(candidates):
        raise UsageError("there are no candidates to choose from; make them with em.candidate_directions(model, …)")
    for direction in {(id(d.provenance), len(d.vector)): d for d in candidates}.values():
        check_fits(direction, model)
        for judged in filter(None, (contrast, test)):
            if said := already_used(direction, judged):
                warnings.warn(f"{said}: they flatter it; choose and test on others", NuisanceWarning, stacklevel=4)
    elsewhere = sorted({direction.site.stream for direction in candidates} - set(STREAMS))
    if elsewhere:
        raise UsageError(
            f"candidates at {', '.join(elsewhere)} are not directions of the residual stream, in which all of them are "
            f"added and compared; read them at {' or '.join(STREAMS)}"
        )
    sides = () if test is None else ("positive", "negative")
    asked, held_out = ([set(map(str, getattr(each, side))) for side in sides] for each in (contrast, test))
    if seen := [side for side, one, other in zip(sides, asked, held_out, strict=True) if one & other]:
        raise UsageError(
            f"some {' and '.join(seen)} test prompts are among those that the choice is made on, so the estimate would "
            "not be a held-out one; pass disjoint sets, e.g. two parts of contrast.split()"
        )


def _measured(
    model: LensModel, directions: list[Direction], contrast: ContrastSet, metric: Metric, criteria: Criteria, full: bool
) -> tuple[pd.DataFrame, dict[int, np.ndarray]]:
    """The table of scores, in the order of the directions, and the bypass of each prompt by row."""
    where = {"position": [d.position for d in directions], "layer": [d.site.layer for d in directions]}
    table = pd.DataFrame(where | {name: float("nan") for name in ("bypass", "induce", "kl")})
    negative = encode(model, contrast.negative)
    measures: dict[str, tuple[Any, Sequence[Any], Measure]] = {
        "induce": (Add, contrast.negative, metric),
        "kl": (Ablate, negative, kl_from_now(model, negative)),
        "bypass": (Ablate, contrast.positive, metric),
    }
    bypass: dict[int, np.ndarray] = {}
    for done, name in enumerate(SCORES):
        kept = rejections(table, criteria, scored=SCORES[:done]) == ""
        rows = [i for i in range(len(directions)) if full or kept[i]]
        if not rows:
            break
        edit, prompts, measure = measures[name]
        values = _along_each(model, edit, [directions[i] for i in rows], prompts, measure)
        table.loc[rows, name] = values.mean(1)
        bypass = dict(zip(rows, values, strict=True))
    return table, bypass


def _along_each(
    model: LensModel, edit: type[Ablate] | type[Add], directions: Sequence[Direction], prompts: Any, measure: Measure
) -> Scores:
    vectors, sites = torch.stack([d.vector for d in directions]), [d.site for d in directions]
    return along_each(model, Along(edit(directions[0]), vectors, sites), prompts, measure)


def _with_fates(
    table: pd.DataFrame, index: int, criteria: Criteria, without: Sequence[tuple[Any, int]]
) -> pd.DataFrame:
    """The table with what became of each candidate, and with the places that have no candidate."""
    reasons = rejections(table, criteria)
    fate = np.where(reasons == "", NOT_LOWEST, reasons)
    fate[index] = CHOSEN
    table = table.assign(fate=fate)
    absent = [{"position": p, "layer": layer, "fate": NO_DIFFERENCE} for p, layer in without]
    return pd.concat([table, pd.DataFrame(absent)], ignore_index=True) if absent else table


def _belonging(
    model: LensModel, direction: Direction, contrast: ContrastSet, test: ContrastSet
) -> tuple[ContrastSet, ContrastSet]:
    """Both sets with the groups of prompts that belong together, across the two of them too where none are given."""

    def read(*sets: ContrastSet) -> list[np.ndarray]:
        sides = [[p for each in sets for p in each.positive], [p for each in sets for p in each.negative]]
        return [activations_at(model, prompts, [direction.site], direction.position)[:, 0] for prompts in sides]

    if contrast.has_groups or test.has_groups:
        return contrast.grouped(read(contrast)), test.grouped(read(test))
    found, n, m = _both(contrast, test).grouped(read(contrast, test)), len(contrast.positive), len(contrast.negative)
    p, q = found.positive_groups, found.negative_groups
    if p is None or q is None:
        return contrast, test
    chosen_on = replace(contrast, positive_groups=p[:n], negative_groups=q[:m])
    return chosen_on, replace(test, positive_groups=p[n:], negative_groups=q[m:])


def _labels(contrast: ContrastSet) -> list[Any]:
    """The groups of the positive prompts; where there are none, each stands alone."""
    return list(contrast.positive_groups or [object() for _ in contrast.positive])


def _both(contrast: ContrastSet, test: ContrastSet) -> ContrastSet:
    return ContrastSet([*contrast.positive, *test.positive], [*contrast.negative, *test.negative])


def _held_out(
    model: LensModel, direction: Direction, chosen_on: Values, contrast: ContrastSet, test: ContrastSet,
    metric: Metric, seed: int,
) -> tuple[dict[str, Estimate], Estimate]:  # fmt: skip
    """The estimate of each score of the winner, and its optimism."""
    positive = Arm("bypass", model, test.positive, test.positive_groups, {"metric": metric}, seed=seed)
    negative = Arm("induce", model, test.negative, test.negative_groups, {"metric": metric}, seed=seed)
    bypass = positive.treated(Ablate(direction), only=["metric"])["metric"]
    induce = negative.treated(Add(direction), only=["metric"])["metric"]
    kl = negative.treated(Ablate(direction), only=[KL])[KL]
    found = {"bypass": positive.mean(bypass), "untreated": positive.mean(positive.untreated["metric"])}
    groups = (_labels(test), _labels(contrast)) if contrast.positive_groups or test.positive_groups else None
    optimism = difference(bypass, chosen_on, groups=groups, seed=seed).estimate
    return {**found, "induce": negative.mean(induce), "kl": negative.mean(kl, KL)}, optimism


def _rounds(
    model: LensModel, candidates: Candidates | Sequence[Direction], criteria: Criteria, contrast: ContrastSet,
    test: ContrastSet | None, count: int, seed: int,
) -> list[list[Direction]]:  # fmt: skip
    """For each candidate that is not too deep a random direction a round."""
    made = candidates.contrast if isinstance(candidates, Candidates) else None
    drawn_from = made or (contrast if test is None else _both(contrast, test))
    reached = [each for each in candidates if each.site.layer < criteria.first_deep_layer]
    return random_in_place(model, reached, drawn_from, count=count, seed=seed) if count else []


def _controls(
    model: LensModel, random: Sequence[Sequence[Direction]], chosen: Direction, contrast: ContrastSet, on: ContrastSet,
    metric: Metric, criteria: Criteria, count: int, seed: int,
) -> tuple[pd.DataFrame, dict[str, float]]:  # fmt: skip
    """The best of every round of random directions, and how many rounds have one that does as well as the chosen one.

    The best on the very prompts that it stands beside the chosen one on: at least what any rule could have chosen.
    """
    if not count:
        return pd.DataFrame({"bypass": [], "induce": []}), {}
    flat, best, p = [each for own in random for each in own], {}, {}
    for name, edit, sign, prompts in (("bypass", Ablate, -1, on.positive), ("induce", Add, 1, on.negative)):
        some = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:CONTROL_PROMPTS]]
        own, *gains = sign * _along_each(model, edit, [chosen, *flat], some, metric).mean(1)
        rounds = np.nan_to_num(np.reshape(gains, (-1, count)), nan=-np.inf)
        rounds[np.isneginf(rounds)] = rounds[np.isfinite(rounds)].min(initial=own)
        if name == "bypass":
            _harmful_last(model, rounds, random, contrast.negative, criteria.max_kl)
        best[name], p[name] = sign * rounds.max(0), control_p(own, rounds.max(0), two_sided=False)
    return pd.DataFrame(best), p


def _harmful_last(
    model: LensModel, gains: Float[np.ndarray, "candidate round"], random: Sequence[Sequence[Direction]],
    prompts: Sequence[Any], max_kl: float,
) -> None:  # fmt: skip
    """Give the least of all gains to random directions that do more harm than a candidate may, best ones first."""
    negative, least, looked_at = encode(model, prompts), gains.min(), set[tuple[int, int]]()
    kl = kl_from_now(model, negative)
    while ahead := [at for at in enumerate(gains.argmax(0).tolist()) if at not in looked_at]:
        harm = _along_each(model, Ablate, [random[i][r] for r, i in ahead], negative, kl).mean(1)
        for (r, i), each in zip(ahead, harm, strict=True):
            gains[i, r] = gains[i, r] if each <= max_kl else least
        looked_at.update(ahead)


# --- The rule ---------------------------------------------------------------------------------------------------------


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
