"""Calibration: what is planted is found, what is taken out is gone, and a shuffle keeps what belongs together."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.claims.calibration import (
    ANY,
    AT_RANDOM,
    BENIGN,
    RELABELLED,
    UNCHANGED,
    Calibration,
    CalibrationRow,
    Counted,
    Known,
    _exchanged,
    _relabelled,
    _shuffled,
    _units,
    benign_in_place,
    calibrated,
    tabled,
)
from tl_em.claims.claim import Case, Question, Reading
from tl_em.claims.questions.level import Level
from tl_em.claims.questions.rotation import Rotation
from tl_em.claims.questions.separation import Separation
from tl_em.directions.direction import Direction
from tl_em.directions.methods import as_method
from tl_em.errors import UsageError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.sites import Site
from tl_em.stats import mean

N, WIDTH, GAP = 40, 24, 4.0
NOBODY: Any = None
METHOD = as_method("method", "difference_in_means")
CHANGES: tuple[Question, ...] = (Level(), Separation(), Rotation())


def contrast(groups: bool = False) -> ContrastSet:
    names = [f"q{i // 2}" for i in range(N)] if groups else None
    positive, negative = ([f"{side} {i}" for i in range(N)] for side in "+-")
    return ContrastSet(positive, negative, positive_groups=names, negative_groups=names)


def known(
    name: str = "a", *, gap: float = GAP, moved: float = 0.0, jitter: float = 0.3, groups: bool = False, seed: int = 0
) -> Known:
    """A direction of a base whose fine-tune moved it, and another axis, by so many gaps."""
    rng = np.random.default_rng(seed)
    unit, other = np.eye(WIDTH)[:2]

    def prompts() -> Reading:
        return Reading(*(rng.standard_normal((N, WIDTH)) + side * gap / 2 * unit for side in (1, -1)))

    base, extracted = prompts(), prompts()
    change = moved * gap * (unit + other)
    tuned = Reading(*(x + change + jitter * rng.standard_normal(x.shape) for x in (base.positive, base.negative)))
    direction = Direction(torch.from_numpy(gap * unit), Site(1), name=name)
    case = Case(name, direction, contrast(groups), NOBODY, base, tuned, n_controls=199)
    return Known(case, extracted, contrast(groups))


@pytest.mark.parametrize("question", CHANGES, ids=lambda q: q.name)
@pytest.mark.parametrize("size", [0.1, 0.5])
def test_what_is_planted_is_what_is_measured(question: Question, size: float) -> None:
    case = known(jitter=0.0, moved=0.7).case  # without jitter nothing but what was planted is there
    rng = np.random.default_rng(1)
    planted = case.with_tuned(_exchanged(case, rng, question.plant(case, size, rng)))  # pyright: ignore
    found = question.measure(planted)
    assert found is not None and found.estimate.value == pytest.approx(size, abs=1e-9)
    moved = [(after - before).mean(0)[1] for before, after in planted.classes]
    if question.name != "rotation":  # the rest of what the fine-tune did is still there
        assert moved == pytest.approx([0.7 * GAP] * 2)


def test_signs_take_the_change_out_and_keep_its_noise_by_question() -> None:
    case = known(moved=2.0, groups=True).case
    tuned = _exchanged(case, np.random.default_rng(0), (np.zeros(1), np.zeros(1)))
    before = case.tuned.positive - case.base.positive
    left, was = tuned.positive - case.base.positive, before - before.mean(0)
    assert np.abs(left) == pytest.approx(np.abs(was))  # each prompt's own noise, or its opposite
    signs = np.sign((left * was).sum(1))
    assert set(signs) == {-1.0, 1.0}
    unit = _units(case.contrast)[0]
    assert all(len({*signs[unit == u]}) == 1 for u in set(unit.tolist()))


def test_a_shuffle_keeps_questions_whole_or_balanced() -> None:
    rng = np.random.default_rng(0)
    within = contrast(groups=True)
    order = _shuffled(within, rng)
    units = np.concatenate(_units(within))
    assert sorted(np.concatenate(order)) == list(range(2 * N))
    assert np.bincount(units[order[0]]).tolist() == np.bincount(units[order[1]]).tolist()  # as many of each question
    assert set(order[0]) != set(range(N))
    names = [[f"{side}{i // 4}" for i in range(N)] for side in "+-"]
    apart = ContrastSet(
        list(within.positive), list(within.negative), positive_groups=names[0], negative_groups=names[1]
    )
    order = _shuffled(apart, rng)
    units = np.concatenate(_units(apart))
    assert set(units[order[0]]).isdisjoint(units[order[1]])  # whole questions change sides
    assert set(order[0]) != set(range(N)) and len(order[0]) == N


def test_a_shuffled_direction_separates_its_held_out_prompts_rarely() -> None:
    rng = np.random.default_rng(2)
    made = [_relabelled(known(), METHOD, rng) for _ in range(40)]
    assert sum(each is not None for each in made) <= 6  # 2.5 % expected
    units = {round(abs(float(each.unit[0])), 3) for each in made if each is not None}
    assert all(unit < 0.99 for unit in units)


def test_a_fine_tune_that_does_nothing_gets_no_word_and_one_that_does_is_found() -> None:
    both = [known("a", moved=0.5), known("b", seed=3)]
    words, left_out = calibrated(both, CHANGES, METHOD, draws=2, seed=10_000, workers=1)
    assert left_out == {}
    assert words[Counted(RELABELLED, ANY)] == words[Counted(UNCHANGED, ANY)] == [False] * 2
    rows = tabled(words, CHANGES)
    power = {(r.question, r.direction): r.words for r in rows if not r.false and r.size == 1.0}
    assert set(power) == {(q.name, name) for q in CHANGES for name in "ab"}
    assert all(share.value == 1 and share.n == 2 for share in power.values())
    assert all(r.false == (r.scenario != "planted" or r.size <= 0.1) for r in rows)
    assert all(0 <= r.words.low <= r.words.value <= r.words.high <= 1 for r in rows)


@pytest.mark.slow
@pytest.mark.starts("workers of loky")
def test_draws_are_those_of_the_seed_on_however_many_processors() -> None:
    one, two = (calibrated([known()], (Level(),), METHOD, draws=10, seed=7, workers=n)[0] for n in (1, 2))
    assert one == two and one != calibrated([known(jitter=3.0)], (Level(),), METHOD, draws=10, seed=7, workers=1)[0]


def test_each_benign_fine_tune_stands_in_the_place_of_the_tuned_one() -> None:
    moved, still = known("a", moved=0.5).case.tuned, known("a").case.tuned
    case = replace(known("a").case, benign=(moved, still))
    assert benign_in_place([case], (Level(),))[Counted(BENIGN, "level")] == [True, False]
    assert benign_in_place([known("a").case], (Level(),)) == {}


def test_a_false_word_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Level, "plant", lambda self, case, size, rng: (case.case_shift, case.case_shift))
    monkeypatch.setattr(Case, "case_shift", property(lambda case: 0.6 * GAP * case.unit), raising=False)
    words, _ = calibrated([known()], (Level(),), METHOD, draws=4, seed=0, workers=1)
    assert words[Counted(UNCHANGED, "level")] == [True] * 4


def test_questions_that_run_the_models_are_left_out_and_those_without_a_plant_have_no_power() -> None:
    class Runs(Question):
        name, words, unit, asks = "runs", ("more", None), "own gaps", "Does it run?"

        def measure(self, case: Case) -> Any:
            return case.pair.base

    class Plain(Question):
        name, words, unit, asks = "plain", ("more", "less"), "own gaps", "Is there more?"

        def measure(self, case: Case) -> Any:
            effect, _ = case.changed(Reading.balanced)
            return case.finding(self, effect, controls=case.along_random(case.elsewhere[0]))

    words, left_out = calibrated([known()], (Plain(), Runs()), METHOD, draws=5, seed=0, workers=1)
    assert "runs the models" in left_out["runs"]
    assert {at.scenario for at in words} == {RELABELLED, UNCHANGED}
    assert {at.question for at in words} == {ANY, "plain"}


def test_it_is_shown_in_a_sentence_a_table_json_and_html() -> None:
    def row(scenario: str, question: str, direction: str, size: float, false: bool, hits: int) -> CalibrationRow:
        share = mean([1.0] * hits + [0.0] * (200 - hits), bounds=(0, 1))
        return CalibrationRow(scenario, question, direction, size, "own gaps", false, share)

    rows = (
        row(RELABELLED, ANY, ANY, 0.0, True, 3),
        row("planted", "level", "<b>", 0.25, False, 192),
        row("planted", "level", "c", 0.25, False, 200),
    )
    found = Calibration(rows, 200, {"use": "it runs <i>models</i>"})
    assert found.sentence == (
        "On 200 shuffles of these prompts a word was given in 1.5 % [0.3, 4.3]; a planted shift of 0.25 own gaps along "
        "<b> (the least sure of 2) would have been found in 96.0 % [92.3, 98.3]."
    )
    assert list(found.to_pandas()["value"]) == [0.015, 0.96, 1.0]
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["direction"] == "<b>"
    page = found._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "<i>" not in page
    assert Calibration((), 1).sentence == "Nothing was drawn."


def asked(*questions: str) -> tuple[em.ModelPair, dict[str, Any]]:
    pair = em.load_pair("toy/insecure")
    return pair, {"contrasts": {"persona": (pair.contrasts or {})["persona"]}, "questions": questions, "controls": 99}


@pytest.mark.slow
def test_random_directions_are_not_causal_where_the_direction_is() -> None:
    pair, given = asked("use")
    report = em.audit(pair, **given, calibrate=5)
    assert report.comparison.row("use", "persona").shown
    found = report.calibration
    assert found is not None and found.left_out == {}
    assert [(r.scenario, r.question, r.words.value) for r in found.rows] == [(AT_RANDOM, "use", 0.0)]


def test_the_page_of_an_audit_carries_the_sentence() -> None:
    pair, given = asked("level")
    report = em.audit(pair, **given)
    words = mean([1.0] * 3 + [0.0] * 197, bounds=(0, 1))
    found = report.with_calibration(Calibration((CalibrationRow(RELABELLED, ANY, ANY, 0.0, "", True, words),), 200))
    page = found._repr_html_()
    assert "On 200 shuffles of these prompts a word was given in 1.5 % [0.3, 4.3]." in page
    assert page.count("How often this audit would be wrong") == 2
    assert found.to_json()["calibration"]["draws"] == 200 and "calibration" not in report.to_json()


def test_too_few_controls_are_refused() -> None:
    pair, given = asked("level")
    given["controls"] = 9
    with pytest.raises(UsageError, match="controls=99"):
        em.calibration(pair, **given, draws=1)
