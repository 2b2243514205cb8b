"""What an audit asks: each contrast set in three parts, and its behaviour in two.

The difference in means is taken at every layer of the base on the first part, the layer is chosen on the second, and
base is judged against tuned on the third; a behaviour is split by question along the same lines, so that nothing that
is judged was used to choose.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_em.arguments import NOUNS
from tl_em.claims.compare import behaviour_on
from tl_em.errors import UsageError
from tl_em.metrics import Behaviour, Metric, refusal_log_odds
from tl_em.models.contrasts import ContrastSet, Prompt, Splits
from tl_em.models.loading import ModelPair
from tl_em.models.sites import Position

POSITIONS: dict[str, Position] = {"harmfulness": "instruction_end"}
BEFORE_ANSWER: Position = "prompt_end"
FRACTIONS = {"train": 0.5, "select": 0.25, "test": 0.25}
SIDES = ("present", "absent")


@dataclass(frozen=True, eq=False)
class Subject:
    """One direction to audit: its contrast set, whole and in three parts, its behaviour in two, and where it is read.

    ``elsewhere``: prompts that it is judged on where these are not the third part.
    """

    name: str
    whole: ContrastSet
    elsewhere: Mapping[str, ContrastSet]
    splits: Splits
    chosen_by: Behaviour
    judged: Behaviour
    position: Position


def subjects_of(
    pair: ModelPair | Any,
    contrasts: Mapping[str, ContrastSet] | None,
    behaviours: Mapping[str, Behaviour | Metric] | None,
    judged: Mapping[str, ContrastSet],
    positions: Mapping[str, Position] | None,
    seed: int,
) -> list[Subject]:
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
    where: dict[str, Position] = {**POSITIONS, **(pair.positions or {}), **(positions or {})}
    found = []
    for name, contrast in contrasts.items():
        NOUNS["ContrastSet"](f"contrasts[{name!r}]", contrast)
        splits = replace(contrast, label=name).split(**FRACTIONS, seed=seed)
        elsewhere = {"the prompts it is judged on": judged[name]} if name in judged else {}
        splits = splits._replace(test=judged.get(name, splits.test))
        own = given.get(name, refusal_log_odds)
        if isinstance(own, Behaviour):
            both = _apart(own, splits, seed)
        else:
            both = behaviour_on(own, splits.select), behaviour_on(own, splits.test)
        found.append(Subject(name, contrast, elsewhere, splits, *both, where.get(name, BEFORE_ANSWER)))
    return found


def _apart(behaviour: Behaviour, splits: Splits, seed: int) -> tuple[Behaviour, Behaviour]:
    """A behaviour in two parts: on questions to choose by, and on questions that were neither extracted nor chosen on.

    Chosen on: the questions of the selection split, or a quarter of those that no split has, where it shares none.

    Raises:
        UsageError: the directions were extracted on all of its questions.
    """
    extracted, selected = (questions_in(part) for part in (splits.train, splits.select))
    own = [set(questions_of(behaviour, side)) for side in SIDES]
    free = sorted(set().union(*own) - extracted)
    chosen = selected & set(free)
    if not all(chosen & each for each in own):
        order = np.random.default_rng(seed).permutation(free).tolist()
        chosen = set(order[: max(1, len(order) // 4)])
    return _only(behaviour, chosen), _only(behaviour, set(free) - chosen)


def questions_in(part: ContrastSet) -> set[str]:
    """The questions of a split, or its prompts where no questions are named."""
    return {*_labels(part.positive, part.positive_groups), *_labels(part.negative, part.negative_groups)}


def questions_of(behaviour: Behaviour, side: str) -> list[str]:
    """The questions of a behaviour's prompts, or its prompts where no questions are named."""
    return _labels(getattr(behaviour, side), getattr(behaviour, f"{side}_groups"))


def _labels(prompts: Sequence[Prompt], groups: Sequence[Hashable] | None) -> list[str]:
    return [str(label) for label in (prompts if groups is None else groups)]


def _only(behaviour: Behaviour, questions: set[str]) -> Behaviour:
    fields: dict[str, Any] = {}
    for side in SIDES:
        own = questions_of(behaviour, side)
        kept = [i for i, label in enumerate(own) if label in questions]
        if not kept:
            raise UsageError(
                f"behaviour {behaviour.name!r}: the direction was extracted on, or chosen by, all of its {side} "
                "questions, so nothing is left to judge it on; give it prompts about other questions"
            )
        fields |= {side: [getattr(behaviour, side)[i] for i in kept], f"{side}_groups": [own[i] for i in kept]}
    return replace(behaviour, **fields)
