"""Planted changes are found, absent ones are not, and the interval, the controls and the benign arm each can veto."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.claims.claim import NOT_SHOWN, Case, Finding, Reading, Row
from tl_em.claims.compare import SHIPPED
from tl_em.claims.rule import judge
from tl_em.directions.direction import Direction
from tl_em.errors import NoGapError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.sites import Site
from tl_em.stats import Estimate, Resampled

D, N = 40, 48
AXIS = np.eye(D)[0]
OTHER = np.eye(D)[1]


def reading(gap: np.ndarray, *, noise: float = 1.0, seed: int = 0, n: int = N) -> Reading:
    rng = np.random.default_rng(seed)
    return Reading(rng.normal(size=(n, D)) * noise + gap, rng.normal(size=(n, D)) * noise)


def moved(
    base: Reading, shift: np.ndarray, stretch: np.ndarray | float = 0.0, *, jitter: float = 0.1, seed: int = 9
) -> Reading:
    """A fine-tune of ``base``: both classes shifted, the positive one stretched, a little noise of its own."""
    rng = np.random.default_rng(seed)
    parts = [x + jitter * rng.normal(size=x.shape) + shift for x in (base.positive, base.negative)]
    return Reading(parts[0] + stretch, parts[1])


@cache
def pair() -> em.ModelPair:
    return em.load_pair("toy/secure")


def measured(base: Reading, tuned: Reading, *benign: Reading, replicates: tuple[Reading, ...] = ()) -> Case:
    direction = Direction(torch.from_numpy(base.mean_difference).float(), Site(1), name="d")
    words = [f"w{i}" for i in range(len(base.positive))]
    contrast = ContrastSet(
        [f"p {w}" for w in words], [f"n {w}" for w in words], positive_groups=words, negative_groups=words
    )
    return Case("d", direction, contrast, pair(), base, tuned, benign, replicates, n_controls=199)


def verdicts(m: Case) -> dict[str, Row]:
    found = [question.measure(m) for question in SHIPPED[:3]]
    return {row.question: row for row in judge([each for each in found if each is not None])}


BASE = reading(6 * AXIS)


@pytest.mark.parametrize(("size", "word"), [(3.0, "exaggerated"), (-3.0, "diminished")])
def test_a_planted_shift_is_found_in_its_units_and_is_nothing_else(size: float, word: str) -> None:
    rows = verdicts(measured(BASE, moved(BASE, size * AXIS)))
    assert rows["level"].verdict == word
    assert rows["level"].estimate.value == pytest.approx(size / 6, abs=0.1)
    assert rows["level"].p < 0.05
    assert rows["separation"].verdict == NOT_SHOWN
    assert rows["rotation"].verdict == NOT_SHOWN


def test_a_planted_stretch_is_separation_and_half_of_it_is_level() -> None:
    rows = verdicts(measured(BASE, moved(BASE, np.zeros(D), 3 * AXIS)))
    assert rows["separation"].verdict == "sharper"
    assert rows["separation"].estimate.value == pytest.approx(0.5, abs=0.1)
    assert rows["level"].estimate.value == pytest.approx(0.25, abs=0.05)
    assert rows["rotation"].verdict == NOT_SHOWN
    blurred = verdicts(measured(BASE, moved(BASE, np.zeros(D), -3 * AXIS)))
    assert blurred["separation"].verdict == "blurred"


def test_a_planted_rotation_is_found_and_not_taken_for_level() -> None:
    rows = verdicts(measured(BASE, moved(BASE, np.zeros(D), -6 * AXIS + 6 * OTHER)))
    assert rows["rotation"].verdict == "rotated"
    assert rows["rotation"].estimate.value == pytest.approx(1.0, abs=0.15)  # a right angle
    assert rows["rotation"].detail["cosine"].value < 0.3


def test_nothing_is_shown_where_nothing_changed_but_noise() -> None:
    for seed in range(8):
        base = reading(6 * AXIS, seed=seed)
        rows = verdicts(measured(base, moved(base, np.zeros(D), jitter=0.5, seed=100 + seed)))
        assert {row.verdict for row in rows.values()} == {NOT_SHOWN}


def test_noise_alone_is_no_rotation_however_noisy_the_directions_are() -> None:
    """The plain cosine falls far below 1 here, by the noise in both differences alone."""
    for seed in range(4):
        base = reading(1.5 * AXIS, noise=2.0, n=120, seed=seed)
        row = verdicts(measured(base, moved(base, np.zeros(D), jitter=2.0, seed=50 + seed)))["rotation"]
        assert row.verdict == NOT_SHOWN
        assert row.estimate.low < 0.02
        assert row.detail["cosine"].value < 0.9


def test_a_copy_is_not_rotated_where_both_classes_ask_the_same_questions() -> None:
    """Halves that are drawn apart for two classes of the same questions made a copy look turned by .5."""
    rng = np.random.default_rng(3)
    question = 4 * rng.normal(size=(N, D))
    noisy = Reading(question + rng.normal(size=(N, D)) + 3 * AXIS, question + rng.normal(size=(N, D)))
    row = verdicts(measured(noisy, noisy))["rotation"]
    assert row.verdict == NOT_SHOWN
    assert row.estimate.value == pytest.approx(0, abs=1e-9)
    turned = verdicts(measured(noisy, moved(noisy, np.zeros(D), -3 * AXIS + 3 * OTHER)))["rotation"]
    assert turned.estimate.value == pytest.approx(1.0, abs=0.3)


def test_a_stream_that_only_grew_is_scaled() -> None:
    grown = Reading(1.3 * BASE.positive, 1.3 * BASE.negative)
    row = verdicts(measured(BASE, grown))["separation"]
    assert row.verdict == "scaled"
    assert row.estimate.value == pytest.approx(0.3, abs=0.02)
    assert "made as large as the base's" in row.reason
    still = Reading(np.tile(BASE.positive[0], (N, 1)), np.tile(BASE.negative[0], (N, 1)))  # no spread to compare with
    assert measured(BASE, still).growth == 1.0
    apart = moved(grown, np.zeros(D), 3 * AXIS)  # and its classes further apart
    assert verdicts(measured(BASE, apart))["separation"].verdict == "sharper"


def test_noise_where_the_base_never_varies_is_no_growth() -> None:
    """Half of the axes are unused; a fine-tune's jitter grows them tenfold, and says nothing about the stream."""
    used = np.where(np.arange(D) < D // 2, 1.0, 0.01)
    mean = (BASE.positive.mean(0), BASE.negative.mean(0))
    base = Reading(*(m + (x - m) * used for m, x in zip(mean, (BASE.positive, BASE.negative), strict=True)))
    case = measured(base, moved(base, 1.5 * AXIS, jitter=0.2))
    assert case.growth == pytest.approx(1.0, abs=0.1)
    assert verdicts(case)["level"].verdict == "exaggerated"


def test_a_shift_that_any_direction_shows_is_not_this_directions() -> None:
    """The control can veto: a huge shift along the noisiest axes of the class moves random directions as much."""
    rng = np.random.default_rng(0)
    noisy = np.ones(D)
    noisy[2:5] = 8.0
    base = Reading(rng.normal(size=(N, D)) * noisy + 4 * AXIS, rng.normal(size=(N, D)) * noisy)
    shift = 30 * (np.eye(D)[2] + np.eye(D)[3]) + 1.5 * AXIS
    row = verdicts(measured(base, moved(base, shift)))["level"]
    assert row.estimate.beyond(0.10)
    assert row.control["p"] > 0.05
    assert row.verdict == NOT_SHOWN
    assert "random directions" in row.reason


def test_a_benign_fine_tune_that_moves_as_much_vetoes_and_one_that_does_not_does_not() -> None:
    tuned = moved(BASE, 3 * AXIS)
    same, still = moved(BASE, 3 * AXIS, seed=11), moved(BASE, np.zeros(D), seed=12)
    assert verdicts(measured(BASE, tuned))["level"].verdict == "exaggerated"
    vetoed = verdicts(measured(BASE, tuned, same))["level"]
    assert vetoed.verdict == NOT_SHOWN
    assert "benign" in vetoed.reason
    assert verdicts(measured(BASE, tuned, still))["level"].verdict == "exaggerated"


def along(*gaps: float) -> list[Reading]:
    """Fine-tunes that moved along the direction by so many own gaps."""
    return [moved(BASE, 6 * gap * AXIS, seed=20 + i) for i, gap in enumerate(gaps)]


def test_of_several_benign_fine_tunes_the_next_one_is_what_a_change_must_go_beyond() -> None:
    (tuned,), spread, alike = along(0.5), along(0.3, -0.3, 0.1), along(0.02, -0.02, 0.01)
    one = verdicts(measured(BASE, tuned, spread[1]))["level"]
    assert one.verdict == "exaggerated" and one.needed is None  # it went beyond that one, whatever others do
    row = verdicts(measured(BASE, tuned, *spread))["level"]
    assert row.verdict == NOT_SHOWN
    assert "beyond the next of 3 benign fine-tunes by" in row.reason
    assert row.needed is not None and row.to_json()["needed"] == row.needed
    assert row.benign is not None and row.benign.n == 3
    same = verdicts(measured(BASE, tuned, *alike))["level"]
    assert same.verdict == "exaggerated"
    assert "beyond the next of 3 benign fine-tunes" in same.reason
    assert same.needed is None and "needed" not in same.to_json()


def test_further_tuned_ones_count_from_three_on() -> None:
    tuned, benign = along(0.5)[0], along(0.02, -0.02, 0.01)
    more = [moved(BASE, 6 * gap * AXIS, seed=30 + i) for i, gap in enumerate((0.1, -0.1, 0.0))]
    for count, word in ((0, "exaggerated"), (1, "exaggerated"), (2, NOT_SHOWN), (3, NOT_SHOWN)):
        row = verdicts(measured(BASE, tuned, *benign, replicates=tuple(more[:count])))["level"]
        assert row.verdict == word
        assert row.benign is not None
        assert row.benign.value == pytest.approx(0.5 if count < 2 else 0.5 / (1 + count), abs=0.05)


def test_three_benign_fine_tunes_stand_in_for_random_directions_that_are_wide() -> None:
    """What the fine-tune moved along the noisiest axes is no reason why it could not have moved the direction."""
    rng, axes = np.random.default_rng(0), np.eye(D)
    noisy = np.ones(D)
    noisy[2:5] = 8.0
    base = Reading(rng.normal(size=(N, D)) * noisy + 4 * AXIS, rng.normal(size=(N, D)) * noisy)
    drifts = [30 * (axes[2] + axes[3]), 30 * (axes[3] - axes[4]), 30 * (axes[2] - axes[4]), 30 * (axes[4] + axes[2])]
    tuned = moved(base, drifts[0] + 1.5 * AXIS, seed=40)

    def level(benign: list[Reading]) -> tuple[Case, Row]:
        asked = replace(measured(base, tuned, *benign), direction=Direction(torch.from_numpy(AXIS).float(), Site(1)))
        return asked, verdicts(asked)["level"]

    strong = [moved(base, drift, seed=41 + i) for i, drift in enumerate(drifts[1:])]
    assert level(strong[:2])[1].verdict == NOT_SHOWN
    asked, row = level(strong)
    assert asked.farther < 1.1
    assert row.control["p"] > 0.05  # they stay on the page
    assert row.verdict == "exaggerated"
    asked, row = level([moved(base, drift / 1000, seed=50 + i) for i, drift in enumerate(drifts[1:])])
    assert asked.farther > 100  # these never moved so far, so they are no null for one that did
    assert row.verdict == NOT_SHOWN and "limited by random directions" in row.reason


def test_rotation_beyond_the_next_benign_fine_tune() -> None:
    turned = [moved(BASE, np.zeros(D), by * 6 * np.eye(D)[7], seed=60 + i) for i, by in enumerate((1.5, 1.4, 0.0, 0.9))]
    assert verdicts(measured(BASE, turned[0], *along(0, 0, 0)))["rotation"].verdict == "rotated"
    row = verdicts(measured(BASE, *turned))["rotation"]
    assert row.verdict == NOT_SHOWN and "next of 3" in row.reason


def test_a_direction_without_a_gap_is_an_error_not_a_denominator() -> None:
    flat = reading(0 * AXIS, seed=3)
    m = measured(flat, flat)
    wrong = replace(m, direction=Direction(torch.from_numpy(-flat.mean_difference).float(), Site(1)))
    with pytest.raises(NoGapError, match="not above 0"):
        wrong.own_gap  # noqa: B018
    assert measured(BASE, BASE).own_gap.low > 0


def test_clustering_by_question_widens_the_interval() -> None:
    rng = np.random.default_rng(5)
    words = np.repeat(np.arange(8), 6)
    effect = rng.normal(size=8)[words][:, None] * AXIS
    base, labels = reading(6 * AXIS), [str(w) for w in words]
    tuned = Reading(base.positive + effect + AXIS, base.negative + effect + AXIS)
    m = measured(base, tuned)
    grouped = replace(m.contrast, positive_groups=labels, negative_groups=labels)
    widths = []
    for contrast in (m.contrast, grouped):
        level = verdicts(replace(m, contrast=contrast, n_controls=99))["level"].estimate
        widths.append(level.high - level.low)
    assert widths[1] > 1.5 * widths[0]


def finding(name: str, value: float, p: float, **changes_: object) -> Finding:
    estimate = Estimate(value, value - 0.05, value + 0.05, 64, 64.0, "test")
    effect = Resampled(estimate, p, lambda other: p)
    f = Finding(SHIPPED[0], name, Site(0), effect, {"random directions": np.zeros(999)}, 0.1, "own gaps")
    return replace(f, **changes_)  # pyright: ignore[reportArgumentType]


def test_holm_runs_over_the_directions_of_a_question() -> None:
    alone = judge([finding("a", 0.5, 0.03)])
    assert alone[0].verdict == "exaggerated"
    three = judge([finding(name, 0.5, 0.03) for name in "abc"])
    assert {row.verdict for row in three} == {NOT_SHOWN}
    assert three[0].p == pytest.approx(0.09)


@pytest.mark.parametrize("value", [0.149, -0.149, 0.0])
def test_an_interval_that_reaches_inside_the_smallest_effect_is_not_shown(value: float) -> None:
    row = judge([finding("a", value, 0.001)])[0]
    assert row.verdict == NOT_SHOWN
    assert "not wholly beyond" in row.reason


def test_use_has_one_word_and_one_sign() -> None:
    causal, wrong = (judge([finding("a", v, 0.001, question=SHIPPED[3], smallest=0.05)])[0] for v in (0.4, -0.4))
    assert causal.verdict == "causal"
    assert wrong.verdict == NOT_SHOWN
    assert "other sign" in wrong.reason


def test_no_interval_is_no_word() -> None:
    nan = float("nan")
    none = Resampled(Estimate(0.5, nan, nan, 1, 1.0, "fewer than two units"), nan)
    row = judge([finding("a", 0.5, nan, effect=none)])[0]
    assert row.verdict == NOT_SHOWN
    assert row.to_json()["estimate"]["low"] is None


def test_prompts_without_groups_have_those_that_are_found_and_it_is_said() -> None:
    """Every prompt four times counts once; given groups stay as they are."""
    import tl_em as em

    pair = em.load_pair("toy/insecure")
    whole = (pair.contrasts or {})["persona"]
    parts = whole.split(seed=0)
    persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
    some = em.ContrastSet(parts.test.positive[:24], parts.test.negative[:24])
    again = em.ContrastSet([*some.positive] * 4, [*some.negative] * 4)
    once, often, kept = (
        em.compare(pair, {"persona": (persona, each)}, questions=["level"], controls=99)
        for each in (some, again, parts.test)
    )
    first, second = (found.rows[0].estimate for found in (once, often))
    assert second.n == 4 * first.n and "clustered" in second.method and second.n_effective <= first.n
    assert second.high - second.low > 0.7 * (first.high - first.low)
    said = often.together["persona"]
    assert f"{second.n} prompts count as " in said and "near-equal texts" in said and said in repr(often)
    assert not kept.together
