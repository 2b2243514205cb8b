"""Each condition of the rule can veto alone, on either side and in any arm; what passes all of them gets its word."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tl_em.claims.claim import NOT_SHOWN, RANDOM, SCALED, SPHERE, Finding, Row
from tl_em.claims.compare import SHIPPED
from tl_em.claims.rule import ALPHA, adjusted, control_row, in_reach, judge, too_few, unlikely
from tl_em.models.sites import Site
from tl_em.stats import Estimate, Prediction, Resampled

LEVEL, SEPARATION, USE = SHIPPED[0], SHIPPED[1], SHIPPED[3]
SMALL = np.linspace(-0.05, 0.05, 999)
"""Controls that do nothing much: p = .001 beside anything larger."""


def effect(value: float, *, half: float = 0.05, p: float = 0.002) -> Resampled:
    """An effect with the p of "no farther than ...": small just where the interval lies beyond."""
    estimate = Estimate(value, value - half, value + half, 64, 64.0, "made up")
    return Resampled(estimate, p, lambda other: p if abs(value) - half > abs(other) else 0.6)


def finding(value: float = 0.5, name: str = "a", **changes: Any) -> Finding:
    found = Finding(LEVEL, name, Site(2), effect(value), {"random": SMALL}, 0.1, "own gaps")
    return replace(found, **changes)


def one(value: float = 0.5, **changes: Any) -> Row:
    return judge([finding(value, **changes)])[0]


@pytest.mark.parametrize(("value", "word"), [(0.5, "exaggerated"), (-0.5, "diminished")])
def test_what_passes_gets_the_word_of_its_side(value: float, word: str) -> None:
    detail = {"cosine": Estimate(1.0, 0.9, 1.1, 64, 64.0, "made up")}
    row = one(value, detail=detail)
    assert (row.verdict, row.question, row.direction, row.site) == (word, "level", "a", Site(2))
    assert (row.estimate, row.p, row.smallest, row.unit) == (effect(value).estimate, 0.002, 0.1, "own gaps")
    assert row.control == {"kind": "random", "n": 999, "low": pytest.approx(-0.0475), "high": pytest.approx(0.0475),
                           "p": pytest.approx(0.001)}  # fmt: skip
    assert row.reason == "interval wholly beyond 0.1 own gaps, Holm p = 0.002"
    assert row.benign is None and row.detail is detail


@pytest.mark.parametrize("value", [0.15, -0.15, 0.12, 0.0])
def test_an_interval_that_is_not_wholly_beyond_gives_none(value: float) -> None:
    row = one(value)
    assert row.verdict == NOT_SHOWN and "the interval is not wholly beyond 0.1 own gaps" in row.reason
    assert "limited by resampling the prompts" in row.reason
    assert one(math.copysign(0.151, value)).shown


@pytest.mark.parametrize(("p", "shown"), [(0.0499, True), (0.05, False), (0.2, False)])
def test_a_word_needs_a_p_below_alpha(p: float, shown: bool) -> None:
    row = one(effect=effect(0.5, p=p))
    assert row.shown is shown and row.p == p
    assert ("Holm p = 0.2, limited by resampling the prompts" in row.reason) is (p == 0.2)


@pytest.mark.parametrize("side", [1, -1])
def test_the_kind_of_controls_that_does_more_can_veto(side: int) -> None:
    wild = np.linspace(-0.8, 0.8, 99)
    for controls in ({"random": SMALL, "wild": wild}, {"wild": wild, "zero": SMALL}):
        row = one(side * 0.5, controls=controls)
        share = (1 + np.sum(np.abs(wild) >= 0.5)) / 100
        assert row.verdict == NOT_SHOWN and row.p == row.control["p"] == pytest.approx(share)
        assert row.control["kind"] == "wild" and row.control["n"] == 99 and "limited by wild" in row.reason
        assert "not wholly" not in row.reason
    assert one(side * 0.9, controls={"wild": wild}).shown
    assert one(side * 0.9, controls={"wild": wild}, beside=side * 0.3).p > 0.5  # on the prompts of the controls


def test_controls_of_the_side_without_a_word_do_not_count() -> None:
    other = -np.linspace(0.4, 0.9, 99)
    assert one(question=USE, controls={"random": other}).verdict == "causal"
    assert one(question=LEVEL, controls={"random": other}).verdict == NOT_SHOWN
    wrong = one(-0.5, question=USE)
    assert wrong.verdict == NOT_SHOWN and "the effect has the other sign (-0.50 own gaps)" in wrong.reason


@pytest.mark.parametrize("side", [1, -1])
def test_benign_vetoes_what_does_not_go_beyond_it_on_the_same_side(side: int) -> None:
    beyond = one(side * 0.5, benign=effect(side * 0.4))
    assert beyond.shown and beyond.benign == effect(side * 0.4).estimate
    assert beyond.reason.endswith(f"{beyond.benign} beyond the benign fine-tune")
    assert one(side * 0.5, benign=effect(side * 0.4, p=0.03)).p == 0.03  # its p counts too
    for benign, p in ((side * 0.15, 0.6), (side * 0.05, 1.0), (side * -0.4, 1.0), (0.0, 1.0)):
        row = one(side * 0.5, benign=effect(benign))
        assert row.verdict == NOT_SHOWN and row.p == p and "limited by the benign fine-tune" in row.reason
        assert f"beyond the benign fine-tune by {effect(benign).estimate} only" in row.reason
    assert not one(0.0, benign=effect(0.4)).shown
    unsure = Resampled(Estimate(side * 0.4, math.nan, math.nan, 1, 1.0, ""), math.nan)
    assert one(side * 0.5, benign=unsure).p == 1.0 and not one(side * 0.5, benign=unsure).shown


def arm(value: float = 0.4, **changes: Any) -> Finding:
    return finding(value, **{"unit": "nats", "smallest": 0.2} | changes)


@pytest.mark.parametrize("side", [1, -1])
def test_every_arm_must_pass_on_the_same_side(side: int) -> None:
    passing = one(side * 0.5, arms=(arm(side * 0.4), arm(side * 0.9)))
    assert passing.shown and passing.p == 0.002 and passing.smallest == 0.1
    assert one(side * 0.5, arms=(arm(side * 0.4, effect=effect(side * 0.4, p=0.04)),)).p == 0.04
    vetoes = [
        (arm(side * 0.25), "nats: the interval is not wholly beyond 0.2 nats", 0.6, "nats: resampling the prompts"),
        (arm(side * -0.4), f"nats: the effect has the other sign ({side * -0.4:+.2f} nats)", 0.002, ""),
        (arm(side * 0.4, controls={"wild": np.linspace(-1, 1, 99)}), "Holm p = 0.6", 0.6, "nats: wild"),
        (arm(side * 0.4, benign=effect(side * 0.24)), "nats: beyond the benign fine-tune by", 0.6,
         "nats: the benign fine-tune"),
    ]  # fmt: skip
    for each, said, p, blamed in vetoes:
        row = one(side * 0.5, arms=(arm(side * 0.4), each))
        assert row.verdict == NOT_SHOWN and said in row.reason and row.p == pytest.approx(p, abs=0.02)
        assert (f"limited by {blamed}" in row.reason) is bool(blamed)
        assert row.estimate.value == side * 0.5 and row.control["kind"] == "random"
    weak = one(side * 0.12, arms=(arm(side * 0.4),))  # its own interval, named by nothing before it
    assert weak.reason.startswith("the interval is not wholly") and "limited by own gaps: resampling" in weak.reason


def test_holm_runs_over_the_directions_of_each_question_alone() -> None:
    ps = (0.01, 0.02, 0.03)
    level = [finding(name=name, effect=effect(0.5, p=p)) for name, p in zip("abc", ps, strict=True)]
    other = finding(name="a", question=SEPARATION, effect=effect(0.5, p=0.04))
    rows = judge([level[0], other, level[1], level[2]])
    assert [(row.question, row.direction) for row in rows] == [
        ("level", "a"), ("level", "b"), ("level", "c"), ("separation", "a")
    ]  # fmt: skip
    assert [row.p for row in rows] == pytest.approx([0.03, 0.04, 0.04, 0.04])
    assert all(row.shown for row in rows)
    assert judge([]) == ()


@pytest.mark.parametrize("side", [1, -1])
def test_what_is_gone_in_a_stream_of_the_bases_size_is_scaled(side: int) -> None:
    for left, word in ((0.4, "sharper" if side > 0 else "blurred"), (0.12, SCALED), (0.0, SCALED), (-0.4, SCALED)):
        row = one(side * 0.5, question=SEPARATION, unscaled=effect(side * left))
        assert row.verdict == word
        said = f"of it, {effect(side * left).estimate} in a tuned stream made as large as the base's"
        assert (said in row.reason) is (word == SCALED) and row.reason.startswith("interval wholly beyond")
    failed = one(side * 0.12, question=SEPARATION, unscaled=effect(0.0))
    assert failed.verdict == NOT_SHOWN and "made as large" not in failed.reason


def test_without_an_interval_or_a_p_there_is_no_word() -> None:
    nan = math.nan
    none = Resampled(Estimate(0.5, nan, nan, 1, 1.0, "one unit"), nan, lambda other: 0.0)
    assert one(effect=none).p == 1.0 and not one(effect=none).shown
    unknown = Resampled(effect(0.5).estimate, nan, lambda other: nan)
    assert one(effect=unknown).p == 1.0 and not one(effect=unknown).shown


def test_the_parts_that_others_judge_with() -> None:
    assert ALPHA == 0.05
    assert unlikely(0.049) == [] and unlikely(0.05) == ["Holm p = 0.05"]
    assert unlikely(0.3, "few draws", name="p") == ["p = 0.3, limited by few draws"]
    assert adjusted([0.04]) == [0.04] and adjusted([0.03, 0.01]) == pytest.approx([0.03, 0.02]) and adjusted([]) == []
    assert (
        too_few(19) == " (19 allow none below 0.05)" and too_few(20) == "" and too_few(4) == " (4 allow none below 0.2)"
    )
    assert control_row("any", np.arange(101.0), None) == {"kind": "any", "n": 101, "low": 2.5, "high": 97.5, "p": None}


@pytest.mark.parametrize("side", [1, -1])
def test_a_benign_fine_tune_just_at_the_smallest_effect_limits_and_just_beyond_does_not(side: int) -> None:
    def beside(nearest: float) -> Resampled:
        low, high = sorted((side * nearest, side * 0.9))
        return Resampled(Estimate(side * 0.5, low, high, 64, 64.0, "made up"), 0.001, lambda _: 0.001)

    assert one(side * 0.5, benign=beside(0.1)).verdict == NOT_SHOWN
    assert one(side * 0.5, benign=beside(0.1 + 1e-9)).verdict != NOT_SHOWN


def test_of_two_kinds_of_controls_the_one_that_does_more_counts() -> None:
    strong = np.linspace(-0.9, 0.9, 999)
    for controls in ({"random": SMALL, "sphere": strong}, {"sphere": strong, "random": SMALL}):
        row = one(controls=controls)
        assert row.control["kind"] == "sphere" and row.verdict == NOT_SHOWN


WILD = np.linspace(-1, 1, 99)
"""Controls of which half do as much as an effect of 0.5."""
UNSURE = Resampled(Estimate(0.4, math.nan, math.nan, 1, 1.0, ""), math.nan, lambda _: 0.0)
UNKNOWN = Resampled(effect(0.4).estimate, math.nan, lambda _: math.nan)


def beyond(value: float, *benign: float, farther: float = 1.0, half: float = 0.02) -> Prediction:
    return Prediction(effect(value, half=half), (value,), benign, farther)


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("kinds", [(RANDOM,), (SPHERE,), (RANDOM, SPHERE)])
def test_three_benign_fine_tunes_stand_in_for_wide_random_directions(side: int, kinds: tuple[str, ...]) -> None:
    """As if they had moved the stream as far as tuned did: so far, or too far."""
    for farther, shown in ((4.0, True), (12.0, False)):
        benign = beyond(side * 0.4, 0.01, -0.01, 0.0, farther=farther)
        row = one(side * 0.5, controls=dict.fromkeys(kinds, WILD), benign=benign)
        assert row.shown is shown and row.p == benign.within(0, as_far=True) > benign.within(0.1)
        assert ("limited by random directions" in row.reason) is not shown
        assert row.control["kind"] == kinds[0] and row.control["p"] > 0.4 and row.benign == benign.estimate
    narrow = one(side * 0.5, controls=dict.fromkeys(kinds, SMALL), benign=benign)  # the easier null counts
    assert narrow.shown and narrow.p == max(0.002, benign.within(0.1))


@pytest.mark.parametrize("side", [1, -1])
def test_fewer_benign_ones_or_other_controls_do_not_stand_in(side: int) -> None:
    three, two = beyond(side * 0.4, 0.001, -0.001, 0.0), beyond(side * 0.4, 0.001, -0.001)
    for controls, benign in (
        ({RANDOM: WILD}, two), ({RANDOM: WILD}, effect(side * 0.4)), ({RANDOM: WILD}, None), ({"wild": WILD}, three),
        ({RANDOM: WILD, "wild": WILD}, three), ({RANDOM: WILD, SPHERE: WILD, "wild": WILD}, three),
    ):  # fmt: skip
        row = one(side * 0.5, controls=controls, benign=benign)
        assert row.verdict == NOT_SHOWN and row.p == row.control["p"] > 0.4
    other = one(side * 0.5, controls={RANDOM: WILD}, benign=beyond(side * -0.4, 0.001, -0.001, 0.0))
    assert other.verdict == NOT_SHOWN and other.p == 1.0 and "limited by the next of 3 benign" in other.reason
    assert one(0.0, controls={RANDOM: WILD}, benign=three).p == 1.0


@pytest.mark.parametrize("side", [1, -1])
def test_beside_several_the_change_must_go_beyond_the_next(side: int) -> None:
    benign = beyond(side * 0.4, 0.03, -0.03)
    row = one(side * 0.5, benign=benign)
    assert row.verdict == NOT_SHOWN and row.p == benign.within(0.1) > 0.05 and row.benign == benign.estimate
    assert f"beyond the next of 2 benign fine-tunes by {benign.estimate} only" in row.reason
    assert "limited by the next of 2 benign fine-tunes" in row.reason
    passes = beyond(side * 0.4, 0.01, -0.01, 0.0)
    assert one(side * 0.5, benign=passes).reason.endswith(f"{passes.estimate} beyond the next of 3 benign fine-tunes")


@pytest.mark.parametrize("side", [1, -1])
def test_how_many_benign_fine_tunes_would_have_let_it_pass(side: int) -> None:
    few, more = beyond(side * 0.4, 0.03, -0.03), beyond(side * 0.4, 0.08, -0.08)
    assert 2 < few.needed(0.1) < more.needed(0.1)  # pyright: ignore
    never, passes = beyond(side * 0.11, 0.03, -0.03), beyond(side * 0.4, 0.01, -0.01, 0.0)

    def needed(benign: Resampled | Prediction | None, *arms: Prediction, value: float = side * 0.5) -> int | None:
        return one(value, benign=benign, arms=tuple(finding(side * 0.4, benign=each) for each in arms)).needed

    assert needed(few) == few.needed(0.1) and needed(more) == more.needed(0.1)
    assert needed(few, more) == needed(more, few) == needed(None, few, more) == more.needed(0.1)
    assert needed(passes, few, passes) == few.needed(0.1)
    assert needed(never) == needed(few, never) == needed(never, few) == 0
    assert needed(few, value=side * -0.5) == needed(few, value=0.0) == 0
    assert needed(None) is needed(passes) is needed(passes, passes) is needed(effect(side * 0.12)) is None


def test_each_arms_own_smallest_effect_says_how_many_it_needs() -> None:
    benign = beyond(0.4, 0.03, -0.03)
    assert benign.needed(0.1) < benign.needed(0.25)  # pyright: ignore
    assert one(0.5, arms=(arm(0.4, smallest=0.25, benign=benign),)).needed == benign.needed(0.25)


@pytest.mark.parametrize("benign", [effect(-0.4), UNSURE, UNKNOWN])
def test_of_limits_that_are_alike_the_first_is_named(benign: Resampled) -> None:
    for row in (one(0.05, benign=benign), one(effect=effect(0.05), benign=benign)):
        assert row.p == 1.0 and row.reason.endswith("limited by resampling the prompts")


def _drawn(rng: np.random.Generator) -> Finding:
    """A finding of any kind, mostly near the edge of a word: one or two arms, ranked on all prompts or on others."""

    def part(question: Any) -> dict[str, Any]:
        value = float(rng.choice([-1, 1]) * rng.uniform(0, 0.6))
        beside = None if rng.random() < 0.5 else value + 0.3 * rng.standard_normal()
        of_controls = value if beside is None else beside
        spread = abs(of_controls) / rng.choice([1.0, 1.8, 2.5]) + 1e-3
        controls = {"random": of_controls - abs(of_controls) + spread * rng.standard_normal(99)}
        return {"question": question, "effect": effect(value), "controls": controls, "beside": beside}

    question = USE if rng.random() < 0.5 else LEVEL
    arms = (finding(**part(question)),) if rng.random() < 0.3 else ()
    return finding(**part(question), arms=arms)


def _first(found: Finding, count: int) -> Finding:
    controls = {kind: null[:count] for kind, null in found.controls.items()}
    return replace(found, controls=controls, arms=tuple(_first(arm, count) for arm in found.arms), planned=99)


def test_what_stops_early_would_have_had_no_word_and_what_gets_one_never_stops() -> None:
    rng, words, stopped, late = np.random.default_rng(0), 0, 0, 0
    for _ in range(1500):
        found = _drawn(rng)
        shown = judge([found])[0].shown
        reached = [in_reach(_first(found, count)) for count in (39, 79, 98)]
        assert not shown or all(reached)
        assert reached == sorted(reached, reverse=True)  # out of reach once, out of reach for good
        words, stopped, late = words + shown, stopped + (not reached[0]), late + (reached[0] and not reached[2])
    assert words > 100 and stopped > 100 and late > 20


@pytest.mark.parametrize("side", [1, -1])
def test_controls_that_are_not_run_are_said_and_one_that_could_still_matter_is_run(side: int) -> None:
    one_as_large = np.where(np.arange(39) < 4, side * 0.6, 0.01)
    near = finding(side * 0.5, controls={"random": one_as_large}, planned=99)
    assert not in_reach(near) and in_reach(replace(near, planned=100))  # (1 + 4) / (1 + 99) is no p below .05
    row = judge([near])[0]
    assert row.control["n"] == 39 and row.reason.endswith(
        "stopped at 39 of 99 controls: none of the others could give it a word"
    )
    assert "stopped" not in judge([replace(near, planned=39)])[0].reason
    whole = finding(side * 0.5, controls={"random": SMALL[:99]}, planned=99, arms=(replace(near, planned=0),))
    assert not in_reach(whole) and "stopped at 39 of 99" in judge([whole])[0].reason  # of an arm beside
    assert not in_reach(finding(side * 0.12, controls={"random": SMALL[:39]}, planned=99))  # by its interval
    assert in_reach(finding(side * 0.5, controls={"random": SMALL[:39]}, planned=99))
