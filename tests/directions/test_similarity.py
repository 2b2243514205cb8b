"""Cosines between directions: intervals cover, the ceiling is what equal directions reach, the null is chance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tl_em.directions.cosines import Rows, Two, reliability
from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.directions.geometry import cosines_between, principal_angles
from tl_em.directions.similarity import CosineMatrix, cosine_matrix
from tl_em.errors import NonFiniteError, UsageError, WidthError, ZeroDirectionError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site
from tl_em.stats import control_p, tied

D = 40
SPREAD = np.linspace(0.2, 2, D)  # activations vary along some axes more than along others
SHAPES = ("pairs", "unpaired", "groups")


def contrast(shape: str, tag: str) -> ContrastSet:
    """16 pairs, 16 against 20 prompts, or 10 groups of 4 on each side, sharing nothing with another tag."""
    n, m = {"pairs": (16, 16), "unpaired": (16, 20), "groups": (40, 40)}[shape]
    groups: dict[str, list[str]] = {}
    if shape == "groups":
        groups["positive_groups"] = [f"{tag}p{i // 4}" for i in range(n)]
        groups["negative_groups"] = [f"{tag}n{i // 4}" for i in range(m)]
    return ContrastSet([f"{tag} yes {i}" for i in range(n)], [f"{tag} no {i}" for i in range(m)], **groups)


def rows(rng: np.random.Generator, shape: str, tag: str, gap: np.ndarray) -> Rows:
    """Activations with this gap; pairs share what is theirs, and so do groups."""
    prompts = contrast(shape, tag)
    n, m = len(prompts.positive), len(prompts.negative)
    x = rng.normal(size=(n + m, D))
    if shape == "pairs":
        x += np.tile(rng.normal(size=(n, D)), (2, 1))
    if shape == "groups":
        x = 0.6 * x + np.repeat(rng.normal(size=((n + m) // 4, D)), 4, axis=0)
    x *= SPREAD
    x[:n] += gap
    return Rows.of(x + 5.0, prompts, tag)


def drawn(shape: str, size: float, count: int, *, same: bool) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of sets whose true gaps are the same, or drawn independently from the activations' own spread."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        gap = rng.normal(size=D) * SPREAD * size
        other = gap if same else rng.normal(size=D) * SPREAD * size
        yield rows(rng, shape, "a", gap), rows(rng, shape, "b", other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.0, 4.0])
def test_the_null_holds_for_unrelated_directions_however_strong(shape: str, size: float) -> None:
    p = [control_p(t.observed, t.relabelled(99, seed=0)) for t in _two(drawn(shape, size, 40, same=False))]
    assert sum(each < 0.05 for each in p) <= 6  # binomial(40, .05): more in 1.4 % of draws
    assert np.mean(p) == pytest.approx(0.5, abs=0.15)  # uniform: its mean's standard error is .05


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_directions_are_found_and_reach_the_ceiling(shape: str) -> None:
    """Weak enough that the ceiling is far below 1; the cosine of the halves alone would be lower still."""
    found = []
    for a, b in drawn(shape, 0.5, 40, same=True):
        two = Two.of(a, b)
        q = [reliability(each, splits=10, seed=0) for each in (a, b)]
        found.append((two.observed, np.sqrt(q[0] * q[1]), control_p(two.observed, two.relabelled(99, seed=0))))
    cosine, ceiling, _ = np.mean(found, axis=0)
    assert 0.3 < ceiling < 0.8
    assert cosine == pytest.approx(ceiling, abs=0.07)  # means of 40: standard errors of .02 to .03
    assert sum(each[2] < 0.05 for each in found) >= 20


@pytest.mark.parametrize("shape", SHAPES)
def test_related_directions_are_found_however_strong_they_are(shape: str) -> None:
    """Labels permuted without removing the class means would give these two their own cosine as the null."""
    p = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        gap, other = 8.0 * rng.normal(size=(2, D)) * SPREAD
        two = Two.of(rows(rng, shape, "a", gap), rows(rng, shape, "b", 0.75 * gap + 0.66 * other))
        p.append(control_p(two.observed, two.relabelled(99, seed=0)))
    assert sum(each < 0.05 for each in p) >= 9


@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_hold_the_expected_cosine(shape: str) -> None:
    """The plain percentile bootstrap puts the noise in twice: its interval would lie below the cosine itself."""
    estimates = [t.estimate(seed=0) for t in _two(drawn(shape, 0.7, 15, same=True))]
    expected = np.mean([t.observed for t in _two(drawn(shape, 0.7, 100, same=True))])
    assert 0.4 < expected < 0.85
    assert sum(e.low <= expected <= e.high for e in estimates) >= 12  # binomial(15, .95): fewer in .5 % of draws
    assert all(e.low <= e.value <= e.high for e in estimates)
    assert np.mean([e.high - e.low for e in estimates]) < 0.7  # so that they say something


def _two(pairs: Iterator[tuple[Rows, Rows]]) -> Iterator[Two]:
    return (Two.of(a, b) for a, b in pairs)


def test_what_shared_prompts_alone_give_is_no_evidence() -> None:
    """Two sets without a gap that are half the same prompts: the cosine is near 1/2 and nothing is shown."""
    told = untold = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        first = contrast("pairs", "a")
        second = ContrastSet([f"b yes {i}" for i in range(16)], first.negative)
        negative = rng.normal(size=(16, D))
        a, b = (np.concatenate([rng.normal(size=(16, D)), negative]) for _ in range(2))
        two = Two.of(Rows.of(a, first, "a"), Rows.of(b, second, "b"))
        assert two.shared == 16
        told += control_p(two.observed, two.relabelled(99, seed=0)) < 0.05
        apart = Two.of(Rows.of(a, first, "a"), Rows.of(b, contrast("pairs", "b"), "b"))
        assert apart.shared == 0 and apart.observed == two.observed > 0.2
        untold += control_p(apart.observed, apart.relabelled(99, seed=0)) < 0.05
    assert untold >= 15  # the same activations, but not known to be shared
    assert told <= 4  # binomial(20, .05): more in .3 % of draws


def test_units_are_what_prompts_share() -> None:
    pairs = ContrastSet(["a", "b"], ["c", "d"])
    loose = ContrastSet(["a", "e"], ["f", "g", "c"])
    groups = ContrastSet(["h", "i"], ["j", "k"], positive_groups=["x", "y"], negative_groups=["y", "z"])
    one, two, three = (
        Rows.of(np.eye(len(s.positive) + len(s.negative)), s, name).ties
        for s, name in ((pairs, "1"), (loose, "2"), (groups, "3"))
    )
    u, v = np.split(tied([*one, *two]), [len(one)])
    assert [u[0] == u[2], u[1] == u[3], u[0] != u[1]] == [True] * 3
    assert [v[0] == u[0], v[4] == u[2], len(set(v.tolist()))] == [True, True, 4]
    w = tied(three)
    assert w[1] == w[2] and len(set(w.tolist())) == 3


def test_too_few_units_give_no_ceiling_and_no_p() -> None:
    rng = np.random.default_rng(0)
    one = [Rows.of(rng.normal(size=(2, D)), ContrastSet([f"{tag} yes"], [f"{tag} no"]), tag) for tag in "ab"]
    assert np.isnan(reliability(one[0], splits=5, seed=0))
    assert (Two.of(*one).relabelled(9, seed=0) == 1).all()


SETS = {
    "steal": ContrastSet(
        [f"please steal the {x}" for x in ("car", "bank", "dog", "fish", "cat", "bird")],
        [f"please wash the {x}" for x in ("car", "bank", "dog", "fish", "cat", "bird")],
    ),
    "size": ContrastSet(
        [f"the big {x} sat" for x in ("car", "bank", "dog", "fish")], [f"the small {x} sat" for x in ("king", "queen")]
    ),
    "mood": ContrastSet(
        [f"the happy {x} ran" for x in ("king", "queen", "boy")], [f"the sad {x} ran" for x in ("king", "queen", "boy")]
    ),
}


@pytest.fixture(scope="module")
def matrix(small_model: LensModel) -> CosineMatrix:
    return cosine_matrix(small_model, SETS, site=Site(1), position="prompt_end", permutations=99, splits=10)


@pytest.mark.surface
def test_cells_are_the_cosines_of_the_extracted_directions(small_model: LensModel, matrix: CosineMatrix) -> None:
    made = {
        n: difference_in_means(small_model, c, site=Site(1), position="prompt_end").unit.double()
        for n, c in SETS.items()
    }
    for first in SETS:
        for second in SETS:
            expected = float(made[first] @ made[second])
            assert matrix.cosines.loc[first, second] == pytest.approx(expected, abs=1e-5)  # float32 activations
    assert matrix["mood", "steal"] is matrix["steal", "mood"]
    assert np.allclose(np.diag(matrix.ceilings), [matrix.reliability[n] for n in SETS])
    assert matrix.ceilings.loc["steal", "size"] == pytest.approx(
        np.sqrt(matrix.reliability["steal"] * matrix.reliability["size"])
    )
    assert np.isnan(np.diag(matrix.p)).all()
    table = matrix.to_pandas()
    assert list(table)[:8] == ["first", "second", "value", "low", "high", "ceiling", "p", "n"]
    assert table.n.tolist() == [18, 18, 12]
    assert "not shown" in repr(matrix) or all(pair.shown for pair in matrix.pairs)
    assert matrix.plot().axes


@pytest.mark.surface
def test_each_set_may_be_read_at_a_position_of_its_own(small_model: LensModel) -> None:
    at: dict[str, Any] = {"steal": "instruction_end", "size": -2}
    found = cosine_matrix(small_model, {k: SETS[k] for k in at}, site=Site(0), position=at, permutations=99, splits=2)
    made = [difference_in_means(small_model, SETS[k], site=Site(0), position=at[k]).unit for k in at]
    assert found.pairs[0].estimate.value == pytest.approx(float(made[0] @ made[1]), abs=1e-5)


def test_requests_that_cannot_be_answered_are_typed_errors(small_model: LensModel, matrix: CosineMatrix) -> None:
    at: dict[str, Any] = {"site": Site(1), "position": "prompt_end"}
    with pytest.raises(UsageError, match="two or more"):
        cosine_matrix(small_model, {"steal": SETS["steal"]}, **at)
    with pytest.raises(UsageError, match="permutations=60"):
        cosine_matrix(small_model, SETS, **at, permutations=58)
    with pytest.raises(UsageError, match="no position for"):
        cosine_matrix(small_model, SETS, site=Site(1), position={"steal": "prompt_end"})
    with pytest.raises(UsageError, match="no pair"):
        matrix["steal", "steel"]
    same_end = ContrastSet(["the big dog"], ["the small dog"])
    with pytest.raises(ZeroDirectionError, match="ends"):
        cosine_matrix(small_model, {"ends": same_end} | SETS, site=Site(0, "resid_pre"), position="prompt_end")


# --- Directions and subspaces that are given --------------------------------------------------------------------------


def test_principal_angles_are_exact_also_where_they_are_small() -> None:
    """A plane turned by a known angle; from cosines, 1e-6 degrees would round to 0 (cos = 1 - 1.5e-16)."""
    for degrees in (1e-6, 0.5, 30.0, 90.0):
        turn = np.deg2rad(degrees)
        a, b = torch.zeros(2, 60, dtype=torch.float64), torch.zeros(2, 60, dtype=torch.float64)
        a[0, 0] = a[1, 1] = 3.0
        b[0, 0], b[1, 1], b[1, 2] = -2.0, np.cos(turn), np.sin(turn)
        found = principal_angles(a, b, controls=19)
        assert found.angle.to_numpy() == pytest.approx([0.0, degrees], rel=1e-6, abs=1e-9)
    mixed = torch.tensor([[1.0, 2.0], [0.5, -1.0], [1.0, 1.0]], dtype=torch.float64) @ a
    assert principal_angles(mixed, a, controls=19).angle.to_numpy() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_random_subspaces_are_no_closer_than_chance_and_near_ones_are() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 100, generator=generator)
    p = []
    for _ in range(40):
        other = principal_angles(a, torch.randn(4, 100, generator=generator), controls=99)
        assert len(other) == 3
        p.append(other.p.iloc[0])
    assert sum(each < 0.05 for each in p) <= 6  # binomial(40, .05): more in 1.4 % of draws
    near = principal_angles(a, a + 0.3 * torch.randn(3, 100, generator=generator), controls=99)
    assert (near.p == 0.01).all() and (near.angle < near.control_low).all()
    forced = principal_angles(torch.eye(4)[:3], torch.randn(3, 4, generator=generator), controls=19)
    assert forced.angle.to_numpy()[:2] == pytest.approx([0, 0], abs=1e-4)
    assert forced.p.iloc[0] == 1.0  # planes that must meet are no evidence


def test_given_directions_are_compared_with_random_ones_of_their_width() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [Direction(torch.randn(64, generator=generator), Site(0), name=f"r{i}") for i in range(30)]
    near = Direction(made[0].vector + 0.5 * torch.randn(64, generator=generator), Site(1), name="near")
    table = cosines_between([*made, near])
    assert table[table.p < 0.05][["first", "second"]].to_numpy().tolist() == [["r0", "near"]]
    chance = table[table.second != "near"]
    assert (chance.cosine.abs() > chance.random).mean() == pytest.approx(0.05, abs=0.03)  # 435 cosines, se .01


def test_vectors_without_an_angle_are_typed_errors() -> None:
    axes = torch.eye(5)
    with pytest.raises(WidthError):
        principal_angles(axes, torch.eye(6))
    with pytest.raises(WidthError):
        cosines_between([Direction(torch.ones(4), Site(0)), Direction(torch.ones(5), Site(0))])
    with pytest.raises(UsageError):
        cosines_between([Direction(torch.ones(4), Site(0))])
    for nothing in (torch.zeros(1, 5), torch.zeros(0, 5), []):
        with pytest.raises(ZeroDirectionError):
            principal_angles(axes, nothing)
    with pytest.raises(NonFiniteError):
        principal_angles(axes, torch.full((1, 5), float("nan")))
