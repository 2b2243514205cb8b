"""What an audit asks: each contrast set in three parts, its behaviour in two, and the site that it is judged at.

The difference in means is taken at every layer of the base on the first part, the layer is chosen on the second, and
base is judged against tuned on the third; a behaviour is split by question along the same lines, so that nothing that
is judged was used to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_em.claims.questions.use import arms
from tl_em.directions.direction import Direction
from tl_em.directions.extract import extract_directions
from tl_em.directions.geometry import separation
from tl_em.errors import UsageError
from tl_em.metrics import Behaviour, Metric, refusal_log_odds
from tl_em.models.contrasts import ContrastSet, Splits
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.means import class_moments
from tl_em.models.sites import Position
from tl_em.models.stream import capture

POSITIONS: dict[str, Position] = {"harmfulness": "instruction_end"}
BEFORE_ANSWER: Position = "prompt_end"
FRACTIONS = {"train": 0.5, "select": 0.25, "test": 0.25}


@dataclass(frozen=True, eq=False)
class Asked:
    """One direction to audit: its contrast set in three parts, its behaviour in two, and where it is read."""

    name: str
    splits: Splits
    chosen_by: Behaviour
    judged: Behaviour
    position: Position


def asked_of(
    pair: ModelPair,
    contrasts: Mapping[str, ContrastSet] | None,
    behaviours: Mapping[str, Behaviour | Metric] | None,
    judged: Mapping[str, ContrastSet],
    positions: Mapping[str, Position] | None,
    seed: int,
) -> list[Asked]:
    """What is asked of a pair: its contrast sets in three parts, each with its behaviour in two.

    Raises:
        UsageError: no contrast set, or a behaviour without a question that its direction was not extracted on.
        EmptyContrastError: a contrast set that cannot be split.
    """
    if contrasts is None:
        contrasts = pair.contrasts
    if contrasts is None:
        requests = ContrastSet.load("refusal")
        contrasts = {"harmfulness": requests, "refusal": requests}
    if not contrasts:
        raise UsageError("no contrast set to audit with; pass contrasts={'refusal': em.ContrastSet.load('refusal')}")
    given: Mapping[str, Behaviour | Metric] = behaviours if behaviours is not None else pair.behaviours or {}
    where: dict[str, Position] = {**POSITIONS, **(positions or {})}
    asked = []
    for name, contrast in contrasts.items():
        splits = replace(contrast, label=name).split(**FRACTIONS, seed=seed)
        splits = splits._replace(test=judged.get(name, splits.test))
        own = given.get(name, refusal_log_odds)
        first, second = _two_behaviours(own, splits, seed)
        asked.append(Asked(name, splits, first, second, where.get(name, BEFORE_ANSWER)))
    return asked


def _two_behaviours(own: Behaviour | Metric, splits: Splits, seed: int) -> tuple[Behaviour, Behaviour]:
    """The behaviour on prompts to choose by, and on other prompts to judge by; neither were extracted on."""
    if isinstance(own, Behaviour):
        return _apart(own, splits, seed)
    first, second = (
        Behaviour(own.name, own, s.positive, s.negative, None, s.positive_groups, s.negative_groups)
        for s in (splits.select, splits.test)
    )
    return first, second


def _apart(behaviour: Behaviour, splits: Splits, seed: int) -> tuple[Behaviour, Behaviour]:
    """A behaviour in two parts: on questions to choose by, and on questions that were neither extracted nor chosen on.

    Chosen on: the questions of the selection split, or a quarter of those that no split has, where it shares none.

    Raises:
        UsageError: the directions were extracted on all of its questions.
    """
    extracted, selected = (asked_in(part) for part in (splits.train, splits.select))
    free = sorted({label for side in ("present", "absent") for label in labels(behaviour, side)} - extracted)
    chosen = selected & set(free)
    if not all(chosen & set(labels(behaviour, side)) for side in ("present", "absent")):
        order = np.random.default_rng(seed).permutation(free).tolist()
        chosen = set(order[: max(1, len(order) // 4)])
    return _only(behaviour, chosen), _only(behaviour, set(free) - chosen)


def asked_in(part: ContrastSet) -> set[str]:
    """The questions of a split, or its prompts where no questions are named."""
    classes = ((part.positive, part.positive_groups), (part.negative, part.negative_groups))
    return {str(label) for prompts, groups in classes for label in (prompts if groups is None else groups)}


def labels(behaviour: Behaviour, side: str) -> list[str]:
    """The questions of a behaviour's prompts, or its prompts where no questions are named."""
    groups = getattr(behaviour, f"{side}_groups")
    return [str(label) for label in (getattr(behaviour, side) if groups is None else groups)]


def _only(behaviour: Behaviour, questions: set[str]) -> Behaviour:
    fields: dict[str, Any] = {}
    for side in ("present", "absent"):
        own = labels(behaviour, side)
        kept = [i for i, label in enumerate(own) if label in questions]
        if not kept:
            raise UsageError(
                f"behaviour {behaviour.name!r}: the direction was extracted on, or chosen by, all of its {side} "
                "questions, so nothing is left to judge it on; give it prompts about other questions"
            )
        fields[side] = [getattr(behaviour, side)[i] for i in kept]
        fields[f"{side}_groups"] = [own[i] for i in kept]
    return replace(behaviour, **fields)


def candidates(base: LensModel, asked: Asked, method: Any = "difference_in_means") -> tuple[Direction, ...]:
    """The directions of a contrast set at every layer of the base, by a method of ``em.extract_directions``."""
    return extract_directions(base, asked.splits.train, positions=[asked.position], method=method)


def select_site(base: LensModel, candidates: Sequence[Direction], asked: Asked) -> Direction:
    """The candidate with the largest causal effect on its behaviour in the base, of those that separate the selection
    prompts, else that with the largest d'; whether it separates the test prompts is asked when it is measured.
    """
    select = asked.splits.select
    sites = [d.site for d in candidates]
    acts = [capture(base, prompts, sites, position=asked.position) for prompts in (select.positive, select.negative)]
    dprimes = [separation(*(d.project(a[:, s]).double().numpy() for a in acts)) for s, d in enumerate(candidates)]
    separating = [(d, dprime) for d, dprime in zip(candidates, dprimes, strict=True) if dprime > 0]
    effects = effects_in_base(base, [d for d, _ in separating], asked.chosen_by) if separating else [0.0]
    if max(effects) > 0:
        return separating[int(np.argmax(effects))][0]
    return candidates[int(np.argmax(dprimes))]


def effects_in_base(base: LensModel, candidates: Sequence[Direction], behaviour: Behaviour) -> list[float]:
    """For each candidate the rise of the behaviour under addition plus its fall under ablation, both in the base."""
    position: Position = candidates[0].position
    prompts = (behaviour.present, behaviour.absent)
    centres = class_moments(base, prompts, sites=[d.site for d in candidates], positions=[position]).negative[0]
    totals = []
    untreated: dict[str, np.ndarray] = {}
    for direction, centre in zip(candidates, centres, strict=True):
        total = 0.0
        for arm in arms(base, base, behaviour, centre):
            if arm.name not in untreated:
                untreated[arm.name] = arm.untreated(behaviour.metric)
            total += arm.sign * float((arm.treated(direction, behaviour.metric) - untreated[arm.name]).mean())
        totals.append(total)
    return totals
