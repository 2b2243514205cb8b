"""How often this audit would be wrong, and what it would have found: measured on its own models and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from tl_em.arguments import COUNT, SEED, checked, optional
from tl_em.auditing.site_selection import at_their_sites
from tl_em.auditing.splits import Subject, subjects_of
from tl_em.claims.calibration import AT_RANDOM, Calibration, Known, Words, any_word, calibrated, tabled
from tl_em.claims.claim import Case, Question, readings
from tl_em.claims.compare import FineTunes, as_questions, cases, check_directions, fine_tunes
from tl_em.claims.questions.use import Use
from tl_em.directions.direction import Direction
from tl_em.directions.methods import as_method
from tl_em.directions.methods.base import Method
from tl_em.errors import NoGapError
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.loading import ModelPair
from tl_em.models.sites import Position
from tl_em.models.torch_state import in_plain_torch

DRAWS = 200
RANDOM_DIRECTIONS = 100
"""Random directions in the direction's place at most: each is run through both models on every prompt."""


@checked(draws=COUNT, controls=COUNT, seed=SEED, workers=optional(COUNT))
@in_plain_torch
def calibration(
    pair: ModelPair,
    *,
    contrasts: Mapping[str, ContrastSet] | None = None,
    behaviours: Mapping[str, Behaviour | Metric] | None = None,
    benign: FineTunes = None,
    judged: Mapping[str, ContrastSet] | None = None,
    positions: Mapping[str, Position] | None = None,
    questions: Sequence[Any] | None = None,
    method: Any = "difference_in_means",
    controls: int = 999,
    draws: int = DRAWS,
    seed: int = 0,
    workers: int | None = None,
) -> Calibration:
    """How often ``em.audit`` with these arguments gives a false word, and what it would have found.

    The models are read once; everything else is resampled: classes shuffled (no direction), the fine-tune's change
    along each direction taken out (no change), shifts of known sizes put in its place, each benign fine-tune taken for
    the tuned one, random directions for the direction (*use*).  Each is measured and judged as in the audit.

    Args:
        pair, contrasts, behaviours, benign, judged, positions, questions, method, controls, seed: as of ``em.audit``.
        draws: of each scenario; of random directions a hundred at most.
        workers: processes; all processors by default.

    Returns:
        A Calibration; ``print`` it for the sentence, ``.to_pandas()`` for every rate with its exact interval.

    Raises:
        NoGapError: no direction separates its own contrast set in the base.
        UsageError: too few controls, an unknown method or question, or nothing to ask with.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> asked = {"contrasts": {"persona": pair.contrasts["persona"]}, "questions": ["level"], "controls": 99}
        >>> found = em.calibration(pair, **asked, draws=5, workers=1)
        >>> int(found.to_pandas().query("false")["value"].sum())
        0
    """
    judged = judged if judged is not None or contrasts is not None else pair.judged
    subjects = subjects_of(pair, contrasts, behaviours, judged or {}, positions, seed)
    way, asked = as_method("method", method), as_questions(questions)
    picked = at_their_sites(pair.base, subjects, way)[1]
    return calibrate_audit(
        pair, list(zip(subjects, picked, strict=True)), asked, way, benign=fine_tunes(pair, benign),
        controls=controls, draws=draws, seed=seed, workers=workers,
    )  # fmt: skip


def calibrate_audit(
    pair: ModelPair,
    directions: Sequence[tuple[Subject, Direction]],
    questions: Sequence[Question],
    method: Method,
    *,
    draws: int,
    workers: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Calibration:
    """:func:`calibration` of directions that were extracted, at sites that were chosen.

    Args:
        pair, questions, method, draws, workers, seed: as there.
        directions: with the prompts that each is from, and is judged on.
        settings: ``controls`` and ``benign``.

    Raises:
        NoGapError: no direction separates its own contrast set in the base.
    """
    check_directions(pair, {q.name: (d, q.splits.test) for q, d in directions}, settings["controls"])
    known = list(_known(pair, directions, seed=seed, **settings))
    words, left_out = calibrated(known, questions, method, draws=draws, seed=seed, workers=workers)
    for question in questions:
        if isinstance(question, Use) and known[0].case.behaviour is not None:
            words |= _at_random(question, [each.case for each in known], min(draws, RANDOM_DIRECTIONS))
            left_out.pop(question.name, None)
    return Calibration(tabled(words, questions), draws, left_out)


def _known(
    pair: ModelPair, directions: Sequence[tuple[Subject, Direction]], *, controls: int, benign: Any, seed: int
) -> Sequence[Known]:
    """The directions that separate their own contrast sets, with what was read on their prompts."""
    found, silent = [], []
    for subject, direction in tqdm(directions, desc="reading", unit="direction", disable=None):
        parts = subject.splits
        case = next(iter(cases(
            direction, (), parts.test, name=subject.name, behaviour=subject.judged, pair=pair, benign_models=benign,
            replicate_models=(),
            n_controls=controls, seed=seed,
        )))  # fmt: skip
        try:
            _ = case.own_gap
        except NoGapError as error:
            silent.append(str(error))
            continue
        [read] = readings({"base": pair.base}, parts.train, [direction.site], direction.position)
        found.append(Known(case, read["base"], parts.train))
    if not found:
        raise NoGapError("\n".join(silent))
    return found


def _at_random(question: Use, known: Sequence[Case], draws: int) -> Words:
    """Whether a random direction in place of any gets a word."""
    found: Words = {}
    for findings in zip(*(question.at_random(case, draws) for case in known), strict=True):
        for outcome, word in any_word(AT_RANDOM, [question], findings):
            if outcome.question == question.name:
                found.setdefault(outcome, []).append(word)
    return found
