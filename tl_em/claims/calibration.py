"""How often an audit would be wrong, and what it would have found: its own prompts, with what is known to be there.

    relabelled   classes shuffled within their questions, in the prompts of extraction and in those that are judged:
                 there is no direction, and a word about it is false
    no change    tuned x_i = base x_i + s (d_i - mean d) + what the fine-tune did elsewhere,   d_i = tuned - base of
                 prompt i, s = +-1 for each question (wild bootstrap, Wu 1986): the noise stays, the effect is 0
    planted      the same with an effect of a known size (``Question.plant``): up to the smallest effect of interest a
                 word is false, beyond it the share of words is the power
    benign       each benign fine-tune in the tuned one's place
    at random    random directions in the direction's place, with the same treatment (*use*)

Activations are read once.  Every draw is resampled from them, and measured and judged as the audit itself is, with its
controls, its benign fine-tune and Holm's adjustment over its directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_em.claims.claim import Case, Finding, Question, Reading
from tl_em.claims.rule import judge
from tl_em.directions.methods.base import Method, fitted
from tl_em.errors import NoGapError
from tl_em.models.contrasts import ContrastSet
from tl_em.showing import showable
from tl_em.stats import Estimate, mean

SIZES = (0.25, 0.5, 1.0)
"""What is planted, in each question's unit, beside its smallest effect of interest."""
RELABELLED, UNCHANGED, PLANTED = "relabelled classes", "no change", "planted"
BENIGN, AT_RANDOM = "benign fine-tune in its place", "random direction in its place"
ANY = "any"
CHUNK = 5
"""Draws that a process makes at once."""


@dataclass(frozen=True, eq=False)
class CalibrationRow:
    """How often a word was given in one scenario.

    Args:
        scenario: what was drawn.
        question, direction: what the word is about; ``"any"`` of them.
        size: of what was planted, in ``unit``; 0 elsewhere.
        unit: the question's.
        false: whether a word is false; else the share is the power.
        words: share of the draws with a word, and its exact interval.

    Example:
        >>> words = Estimate(0.015, 0.003, 0.043, n=200, n_effective=200.0, method="exact")
        >>> CalibrationRow("no change", "level", "any", 0.0, "own gaps", True, words).words
        0.01 [0.00, 0.04] n=200
    """

    scenario: str
    question: str
    direction: str
    size: float
    unit: str
    false: bool
    words: Estimate


@dataclass(frozen=True, eq=False)
class Calibration:
    """The error rates and the power of one audit, measured on its own prompts; ``em.calibration`` makes it.

    Args:
        rows: how often a word was given, scenario by scenario.
        draws: of each.
        left_out: questions of which nothing is said, and why.

    Example:
        >>> words = Estimate(0.015, 0.003, 0.043, n=200, n_effective=200.0, method="exact")
        >>> Calibration((CalibrationRow("relabelled classes", "any", "any", 0.0, "", True, words),), 200)
        On 200 shuffles of these prompts a word was given in 1.5 % [0.3, 4.3].
    """

    rows: tuple[CalibrationRow, ...]
    draws: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """How often it would be wrong, and what it would have found, for people."""
        told = {RELABELLED: "shuffles of these prompts", UNCHANGED: "fine-tunes without the change"}
        said = [f"on {row.words.n} {told[row.scenario]} a word was given in {percent(row.words)}"
                for row in self.rows if row.scenario in told and row.question == ANY]  # fmt: skip
        planted = [row for row in self.rows if not row.false and row.size == min(SIZES)]
        asked = [row for row in planted if row.question == planted[0].question]
        if asked:
            worst = min(asked, key=lambda row: row.words.value)
            what = "shift" if worst.question == "level" else f"change of {worst.question}"
            where = f" along {worst.direction} (the least sure of {len(asked)})" if len(asked) > 1 else ""
            found = f"would have been found in {percent(worst.words)}"
            said.append(f"a planted {what} of {worst.size:g} {worst.unit}{where} {found}")
        text = "; ".join(said)
        return f"{text[:1].upper()}{text[1:]}." if text else "Nothing was drawn."

    def to_pandas(self) -> pd.DataFrame:
        """One line a row; ``value`` is the share of draws with a word."""
        lines = [vars(row) | row.words.row() for row in self.rows]
        return pd.DataFrame(lines, columns=[*CalibrationRow.__dataclass_fields__, "value", "low", "high", "n"]).drop(
            columns="words"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in ``report.json``."""
        rows = [vars(row) | {"words": row.words.to_json()} for row in self.rows]
        return {"sentence": self.sentence, "draws": self.draws, "rows": rows, "left_out": dict(self.left_out)}

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        left_out = (f"{name}: {why}." for name, why in self.left_out.items())
        return cards.card(self.sentence, cards.table(self.to_pandas()), *map(cards.text, left_out))

    def __repr__(self) -> str:
        return showable(self.sentence)


def percent(share: Estimate) -> str:
    """A share with its interval, in per cent."""
    low, value, high = (f"{100 * x:.0f}" if 0.1 <= x <= 0.9 or x == 1 else f"{100 * x:.1f}"
                        for x in (share.low, share.value, share.high))  # fmt: skip
    return f"{value} % [{low}, {high}]"


class Known(NamedTuple):
    """A direction of the audit: its case, and the base's activations on the prompts that it was extracted from."""

    case: Case
    fitted: Reading
    extracted: ContrastSet


class Counted(NamedTuple):
    """What one draw of a scenario is counted under."""

    scenario: str
    question: str
    direction: str = ANY
    size: float = 0.0


Words = dict[Counted, list[bool]]


def calibrated(
    known: Sequence[Known],
    questions: Sequence[Question],
    method: Method,
    *,
    draws: int,
    seed: int,
    workers: int | None = None,
) -> tuple[Words, dict[str, str]]:
    """Whether a word was given, for every draw of every scenario that is resampled; and which questions are left out.

    Args:
        known: the audit's directions.
        questions: what it asks; those that run the models are left out.
        method: how its directions are extracted.
        draws: of each scenario.
        seed: of the draws.
        workers: processes; all by default.
    """
    from joblib import Parallel, cpu_count, delayed

    left_out = {q.name: why for q in questions if (why := _unread(q, known[0].case))}
    asked = [q for q in questions if q.name not in left_out]
    light = [each._replace(case=_without_models(each.case)) for each in known]
    for each in light:
        _ = each.case.own_gap, each.case.random, each.case.elsewhere  # once, for all draws
    starts = range(0, draws if asked else 0, CHUNK)
    workers = min(workers or cpu_count(), len(starts)) or 1
    work: Any = Parallel(n_jobs=workers, return_as="generator")(
        delayed(_chunk)(light, asked, method, seed, range(start, min(start + CHUNK, draws))) for start in starts
    )
    found: Words = defaultdict(list)
    for part in tqdm(work, total=len(starts), desc="calibrating", unit=f"{CHUNK} draws", disable=None):
        for outcome, words in part.items():
            found[outcome] += words
    return dict(found) | benign_in_place([each.case for each in known], asked), left_out


def _chunk(
    known: Sequence[Known], questions: Sequence[Question], method: Method, seed: int, numbers: Iterable[int]
) -> Words:
    found: Words = defaultdict(list)
    for number in numbers:
        for outcome, word in _draw(known, questions, method, np.random.default_rng([seed, number]), number):
            found[outcome].append(word)
    return dict(found)


def _draw(
    known: Sequence[Known], questions: Sequence[Question], method: Method, rng: np.random.Generator, number: int
) -> Iterator[tuple[Counted, bool]]:
    """One draw of every scenario; what has two sides is planted on one and the other in turn."""
    cases = [each.case for each in known]
    shuffled = [f for each in known for f in _measured(questions, _relabelled(each, method, rng))]
    yield from any_word(RELABELLED, questions, shuffled)
    null = {q: [_planted(q, case, 0.0, rng) for case in cases] for q in questions}
    yield from any_word(UNCHANGED, questions, [f for each in null.values() for f in each if f is not None])
    for q in questions:
        side = -1 if number % 2 and None not in q.words else 1
        edge = [_planted(q, case, side * q.smallest, rng) for case in cases]
        if any(f is None for f in edge):
            continue
        given = any(row.shown for row in judge([f for f in edge if f is not None]))
        yield Counted(PLANTED, q.name, ANY, q.smallest), given
        for size in SIZES:
            for i, case in enumerate(cases):  # alone: the others are as they were, and Holm's adjustment counts them
                planted = [_planted(q, case, side * size, rng) if i == j else f for j, f in enumerate(null[q])]
                rows = judge([f for f in planted if f is not None])
                given = any(row.verdict in q.words for row in rows if row.direction == case.name)
                yield Counted(PLANTED, q.name, case.name, size), given


def any_word(
    scenario: str, questions: Sequence[Question], findings: Sequence[Finding]
) -> Iterator[tuple[Counted, bool]]:
    """Whether any direction gets a word, by question and of any question."""
    rows = judge(findings)
    for name in (ANY, *(q.name for q in questions)):
        yield Counted(scenario, name), any(row.shown for row in rows if name in (ANY, row.question))


def _measured(questions: Sequence[Question], case: Case | None) -> list[Finding]:
    return [f for q in questions if case is not None and (f := q.measure(case)) is not None]


def _planted(question: Question, case: Case, size: float, rng: np.random.Generator) -> Finding | None:
    """What is found where the tuned model's activations hold an effect of this size; None where none can be planted."""
    added = question.plant(case, size, rng)
    if added is None and size:
        return None
    return question.measure(case.with_tuned(_exchanged(case, rng, added or (np.zeros(1), np.zeros(1)))))


def _exchanged(case: Case, rng: np.random.Generator, added: tuple[np.ndarray, np.ndarray]) -> Reading:
    """The tuned model's activations without the mean change: what is left of each prompt's, with its unit's sign."""
    units = _units(case.contrast)
    signs = rng.choice([-1.0, 1.0], max(map(max, units)) + 1)
    sides = []
    for (before, after), unit, plus in zip(case.classes, units, added, strict=True):
        moved = after - before
        sides.append(before + signs[unit][:, None] * (moved - moved.mean(0)) + plus)
    return Reading(*sides)


def _relabelled(known: Known, method: Method, rng: np.random.Generator) -> Case | None:
    """The case of a direction between classes that were shuffled; None where it does not separate them."""
    case, order = known.case, _shuffled(known.extracted, rng)
    reading = _dealt(known.fitted, order)
    vector = reading.mean_difference
    if not (method.pairs or method.means_over):
        both = (torch.from_numpy(x[:, None]) for x in (reading.positive, reading.negative))
        vector = fitted(method, next(both), next(both), [case.site])[0]
    order = _shuffled(case.contrast, rng)
    readings: dict[str, Any] = {name: _dealt(getattr(case, name), order) for name in ("base", "tuned")}
    readings |= {name: tuple(_dealt(own, order) for own in getattr(case, name)) for name in ("benign", "replicates")}
    direction = replace(case.direction, vector=torch.from_numpy(vector).float())
    made = replace(case, direction=direction, contrast=_dealt_prompts(case.contrast, order), **readings)
    try:
        _ = made.own_gap
    except NoGapError:
        return None
    return made


Order = tuple[Int[np.ndarray, " prompt"], Int[np.ndarray, " other"]]


def _shuffled(contrast: ContrastSet, rng: np.random.Generator) -> Order:
    """Which prompts, positive before negative ones, make up either class once it is shuffled.

    Within a question that has both classes its prompts; else whole questions, or prompts where no questions are named.
    """
    units = np.concatenate(_units(contrast))
    side = np.repeat([0, 1], [len(contrast.positive), len(contrast.negative)])
    given = np.array([-1 if len(set(side[units == u])) > 1 else side[units == u][0] for u in range(units.max() + 1)])
    new = side.copy()
    for unit in np.flatnonzero(given < 0):
        new[units == unit] = rng.permutation(side[units == unit])
    whole = np.flatnonzero(given >= 0)
    given[whole] = rng.permutation(given[whole])
    apart = given[units] >= 0
    new[apart] = given[units][apart]
    return np.flatnonzero(new == 0), np.flatnonzero(new == 1)


def _units(contrast: ContrastSet) -> list[Int[np.ndarray, " prompt"]]:
    """The unit of each prompt, of either class: the question, or the prompt where none is named."""
    classes = (contrast.positive, contrast.positive_groups), (contrast.negative, contrast.negative_groups)
    labels = [[(side, i) for i in range(len(prompts))] if groups is None else list(groups)
              for side, (prompts, groups) in enumerate(classes)]  # fmt: skip
    number = {label: k for k, label in enumerate(dict.fromkeys([*labels[0], *labels[1]]))}
    return [np.array([number[label] for label in each]) for each in labels]


def _dealt(reading: Reading, order: Order) -> Reading:
    both = np.concatenate([reading.positive, reading.negative])
    return Reading(both[order[0]], both[order[1]])


def _dealt_prompts(contrast: ContrastSet, order: Order) -> ContrastSet:
    """A contrast set that names the units of shuffled classes; its prompts are their numbers."""
    units = np.concatenate(_units(contrast))
    positive, negative = ([str(i) for i in side] for side in order)
    groups = [units[side].tolist() for side in order]
    return ContrastSet(positive, negative, positive_groups=groups[0], negative_groups=groups[1])


def benign_in_place(cases: Sequence[Case], questions: Sequence[Question]) -> Words:
    """Whether each benign fine-tune gets a word in the tuned one's place, with the other benign ones beside it."""
    found: Words = {}
    for i in range(len(cases[0].benign) if cases else 0):
        placed = [
            replace(_without_models(case), tuned=case.benign[i], benign=(*case.benign[:i], *case.benign[i + 1 :]))
            for case in cases
        ]
        findings = [each for case in placed for each in _measured(questions, case)]
        for outcome, word in any_word(BENIGN, questions, findings):
            found.setdefault(outcome, []).append(word)
    return found


class _Refused(Exception):
    """A question runs the models."""


class _Unread:
    """In place of the models, which are read once and not again."""

    def __getattr__(self, name: str) -> Any:
        raise _Refused

    def __call__(self) -> Any:
        raise _Refused

    def __reduce__(self) -> Any:
        return _Unread, ()


def _without_models(case: Case) -> Case:
    unread: Any = _Unread()
    return replace(
        case, pair=unread, benign_models=(), replicate_models=(), replicates=(), behaviour=None, tuning_data=None,
        own_answers=unread,
    )  # fmt: skip


def _unread(question: Question, case: Case) -> str:
    """Why nothing is said of a question; empty where it is read from activations."""
    unread: Any = _Unread()
    try:
        found = question.measure(replace(case, pair=unread, own_answers=unread))
    except _Refused:
        return "it runs the models, and that in every draw costs too much"
    return "" if found is not None else "there is nothing to ask it with"


def tabled(words: Words, questions: Sequence[Question]) -> tuple[CalibrationRow, ...]:
    """The share of draws with a word, scenario by scenario."""
    by_name = {q.name: q for q in questions}
    rows = []
    for at, given in words.items():
        question = by_name.get(at.question)
        false = at.scenario != PLANTED or question is None or at.size <= question.smallest
        share = mean(np.asarray(given, dtype=float), bounds=(0, 1))
        rows.append(CalibrationRow(*at, "" if question is None else question.unit, false, share))
    return tuple(rows)
