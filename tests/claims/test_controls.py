"""What stands beside a treatment varies where activations vary, is as long, and is matched where it is a latent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SURFACES, cached_model
from tl_em.claims import controls
from tl_em.claims.controls import match, matched_sets, random_directions, random_in_place, random_profiles
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions
from tl_em.directions.profile import Profile
from tl_em.errors import UsageError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.prompts import encode
from tl_em.models.sites import Site
from tl_em.models.stream import capture
from tl_em.stats import Estimate

NOUNS = ("cat", "dog", "bird", "king")
CONTRAST = ContrastSet([f"steal the {noun} ." for noun in NOUNS], [f"wash the {noun}" for noun in NOUNS])
SITE = Site(1)
STAND_INS = 32
"""Latents that may stand for one."""


def direction(position: str = "prompt_end") -> Direction:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    known = Estimate(2.0, 1.9, 2.1, 8, 8.0, "made up")
    return Direction(vector, SITE, position=position, name="mine", method="made", neutral=known)  # pyright: ignore


def read(prompts, position: str = "prompt_end") -> np.ndarray:
    return capture(cached_model("gpt2", SURFACES[-1]), prompts, [SITE], position=position)[:, 0].double().numpy()  # pyright: ignore


@pytest.mark.parametrize("position", ["prompt_end", "instruction_end"])
def test_random_directions_are_drawn_within_the_classes_at_the_directions_own_token(position: str) -> None:
    own = direction(position)
    found = random_directions(cached_model("gpt2", SURFACES[-1]), own, CONTRAST, count=7, seed=3)
    classes = [read(each, position) for each in (CONTRAST.positive, CONTRAST.negative)]
    expected = control_directions(*classes, count=7, norm=own.norm, seed=3)
    assert np.allclose([each.vector.numpy() for each in found], expected, atol=1e-5)
    assert [each.norm for each in found] == pytest.approx([own.norm] * 7)
    assert {(each.name, each.site, each.position, each.method, each.neutral) for each in found} == {
        ("random", SITE, position, "made", None)
    }
    assert not np.allclose(read(CONTRAST.positive), read(CONTRAST.positive, "instruction_end"), atol=0.1)


def test_prompts_of_one_class_vary_within_it() -> None:
    own, prompts = direction(), list(CONTRAST.positive)
    found = random_directions(cached_model("gpt2", SURFACES[-1]), own, prompts, count=2)
    expected = control_directions(read(prompts), read(prompts), count=2, norm=own.norm, seed=0)
    assert np.allclose([each.vector.numpy() for each in found], expected, atol=1e-5)


def test_prompts_without_such_a_token_are_read_at_their_end() -> None:
    model, own = cached_model("gpt2", SURFACES[-1]), direction("instruction_end")
    ids = [replace(each, instruction=(0, 0)) for each in encode(model, list(CONTRAST.positive))]
    found = random_directions(model, own, ids, count=2)
    expected = control_directions(read(ids), read(ids), count=2, norm=own.norm, seed=0)
    assert np.allclose([each.vector.numpy() for each in found], expected, atol=1e-5)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Activations that tell what was asked for: 6 wide, alike at layer 0, at layer 1 alike in one class only.

    They vary by less than 1, and nowhere along the first axis.
    """
    found = []

    def made(model: object, prompts: list, sites: list[Site], position: str) -> np.ndarray:
        found.append((tuple(prompts), tuple(sites), position))
        return np.stack([here(prompts, site, position) for site in sites], axis=1)

    monkeypatch.setattr(controls, "activations_at", made)
    return found


def here(prompts, site: Site, position: str) -> np.ndarray:
    rng = np.random.default_rng([site.layer, len(position), len(prompts[0])])
    noise = 0.1 * rng.normal(size=(len(prompts), 6))
    noise[:, 0] = 0.0
    alike = site.layer == 0 or (site.layer == 1 and list(prompts) == list(CONTRAST.negative))
    return np.arange(6.0) + (0.0 if alike else 1.0) * noise


def of_six(layer: int, position: str = "prompt_end") -> Direction:
    vector = torch.randn(6, generator=torch.Generator().manual_seed(layer))
    return Direction(vector, Site(layer), position=position, name="mine")  # pyright: ignore


def drawn(own: Direction, position: Any, seed: object, classes=(CONTRAST.positive, CONTRAST.negative)) -> np.ndarray:
    x = [np.eye(6)] * 2 if own.site.layer == 0 else [here(each, own.site, position) for each in classes]
    return control_directions(*x, count=4, norm=own.norm, seed=seed)


def as_rows(directions) -> np.ndarray:
    return np.stack([each.vector.numpy() for each in directions])


def test_each_of_several_is_stood_for_at_its_own_site_and_token_by_draws_of_its_own(passes: list[tuple]) -> None:
    """Layer 0 has activations that are all alike: there the draws are of the whole space."""
    own = [of_six(3), of_six(2, "instruction_end"), of_six(0), of_six(1), of_six(3)]
    found = random_in_place(cached_model("gpt2", SURFACES[-1]), own, CONTRAST, count=4, seed=9)
    assert [[(each.site, each.position, each.name) for each in row] for row in found] == [
        [(each.site, each.position, "random")] * 4 for each in own
    ]
    for i, (each, row) in enumerate(zip(own, found, strict=True)):
        assert np.allclose(as_rows(row), drawn(each, each.position, [9, i]), atol=1e-5)
    assert not np.allclose(as_rows(found[0]), as_rows(found[4]) * own[0].norm / own[4].norm, atol=0.1)
    sites = {"prompt_end": (Site(3), Site(0), Site(1), Site(3)), "instruction_end": (Site(2),)}
    assert passes == [
        (tuple(prompts), of, position)
        for position, of in sites.items()
        for prompts in (CONTRAST.positive, CONTRAST.negative)
    ]  # one pass for each position and class


def test_several_are_stood_for_by_the_same_draws_again(passes: list[tuple]) -> None:
    model, own = cached_model("gpt2", SURFACES[-1]), [of_six(2)]
    assert np.allclose(as_rows(random_in_place(model, own, CONTRAST, count=4)[0]), drawn(own[0], "prompt_end", [0, 0]))


@pytest.mark.parametrize("seed", [{}, {"seed": 5}])
def test_a_random_profile_is_one_mixture_of_the_prompts_at_every_layer(passes: list[tuple], seed: dict) -> None:
    """Read at the position of its first direction."""
    own = Profile([of_six(3), of_six(2, "instruction_end"), of_six(0, "response_mean"), of_six(1)])
    found = random_profiles(cached_model("gpt2", SURFACES[-1]), own, CONTRAST, count=4, **seed)
    assert len(found) == 4 and [each.sites for each in found] == [own.sites] * 4
    for layer, each in own.items():
        rows = as_rows([profile[layer] for profile in found])
        assert np.allclose(rows, drawn(each, "response_mean", seed.get("seed", 0)), atol=1e-5)
    assert passes == [(tuple(each), own.sites, "response_mean") for each in (CONTRAST.positive, CONTRAST.negative)]


def test_a_random_profile_of_prompts_of_one_class_varies_within_it(passes: list[tuple]) -> None:
    own, prompts = Profile([of_six(2), of_six(3)]), list(CONTRAST.positive)
    found = random_profiles(cached_model("gpt2", SURFACES[-1]), own, prompts, count=4, seed=1)
    for layer, each in own.items():
        expected = drawn(each, "prompt_end", 1, classes=(prompts, prompts))
        assert np.allclose(as_rows([profile[layer] for profile in found]), expected, atol=1e-5)


def latents(size: int = 120) -> tuple[Dictionary, torch.Tensor]:
    """Norms and densities of their own, in no order."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator).mul(2).exp()
    density = 1e-3 + torch.rand(size, generator=generator) ** 4
    return Dictionary(rows.T, torch.zeros(size), rows, torch.zeros(8), activation="relu", site_in=SITE), density


def distances(dictionary: Dictionary, density: torch.Tensor, of: int) -> np.ndarray:
    logs = np.log(np.stack([density.double().numpy(), dictionary.W_dec.double().norm(dim=-1).numpy()]))
    return ((logs - logs[:, [of]]) ** 2 / logs.var(1, keepdims=True)).sum(0)


@pytest.mark.parametrize("count", [5, 50])
def test_stand_ins_are_drawn_from_the_nearest(count: int) -> None:
    """From 32 of them, or from as many as there are placebos."""
    dictionary, density = latents()
    own, never = [3, 90], [7, 8, 9]
    sets = matched_sets(dictionary, own, density, count=count, without=never, seed=0)
    assert sets.shape == (count, 2) and not np.isin(sets, own + never).any()
    assert all(len(set(row)) == 2 for row in sets) and all(len(set(column)) == count for column in sets.T)
    others = np.setdiff1d(np.arange(120), own + never)
    for column, index in enumerate(own):
        near = others[np.argsort(distances(dictionary, density, index)[others])]
        reach = max(STAND_INS, count + 2)
        assert set(sets[:, column]) <= set(near[:reach])
        assert set(sets[:, column]) != set(near[:count])  # drawn, and not simply the nearest
    assert (sets == matched_sets(dictionary, own, density, count=count, without=never, seed=0)).all()
    assert (sets != matched_sets(dictionary, own, density, count=count, without=never, seed=1)).any()


def test_further_sets_are_dealt_anew_from_the_same_nearest_and_leave_the_first_as_they_are() -> None:
    dictionary, density = latents()
    few, many = (matched_sets(dictionary, [3, 90], density, count=n, once=20, seed=5) for n in (20, 99))
    assert (many[:20] == few).all() and many.shape == (99, 2)
    assert (few == matched_sets(dictionary, [3, 90], density, count=20, seed=5)).all()
    assert all(len(set(row)) == 2 for row in many) and len({tuple(row) for row in many.tolist()}) > 90
    for column, index in enumerate([3, 90]):
        near = [i for i in np.argsort(distances(dictionary, density, index)) if i not in (3, 90)][:STAND_INS]
        assert set(many[:, column]) == set(near)
        assert min(np.sum(many[:, column] == i) for i in near) >= 2  # dealt round by round


def test_of_few_latents_every_set_still_holds_three_and_all_is_dealt_by_the_seed() -> None:
    dictionary, density = latents(7)
    for seed in range(5):
        sets = matched_sets(dictionary, [0, 1, 2], density, count=40, once=1, seed=seed)
        assert set(sets.ravel()) == {3, 4, 5, 6} and all(len(set(row)) == 3 for row in sets)
        assert (sets == matched_sets(dictionary, [0, 1, 2], density, count=40, once=1, seed=seed)).all()
    dictionary, density = latents()
    default = matched_sets(dictionary, [3], density, count=5)
    assert (default == matched_sets(dictionary, [3], density, count=5, seed=0)).all()


def test_in_the_end_all_that_are_near_are_drawn() -> None:
    dictionary, density = latents()
    near = np.argsort(distances(dictionary, density, 3))[1 : STAND_INS + 1]
    drawn = {int(x) for seed in range(40) for x in matched_sets(dictionary, [3], density, count=5, seed=seed).ravel()}
    assert drawn == set(near.tolist())


def test_where_norms_are_alike_or_latents_never_on_density_decides() -> None:
    eye = torch.eye(80)
    dictionary = Dictionary(eye, torch.zeros(80), eye, torch.zeros(80), activation="relu", site_in=SITE)
    density = torch.cat([torch.zeros(40), torch.full((40,), 0.3)])
    assert matched_sets(dictionary, [1], density, count=20).max() < 40
    assert matched_sets(dictionary, [50], density, count=20).min() >= 40
    assert matched_sets(dictionary, [50], torch.full((80,), 0.2), count=20).shape == (20, 1)


def test_as_many_as_there_are_and_no_more() -> None:
    dictionary, density = latents(12)
    assert matched_sets(dictionary, [0, 1], density, count=8).shape == (8, 2)
    assert matched_sets(dictionary, [0, 1], density, count=1, without=[2]).shape == (1, 2)
    assert any(1 in matched_sets(dictionary, [0], density, count=10, seed=seed) for seed in range(4))
    for count, without in ((9, []), (8, [5]), (0, [])):
        with pytest.raises(UsageError, match=f"cannot give {count} placebos of 2"):
            matched_sets(dictionary, [0, 1], density, count=count, without=without)


def test_the_match_is_of_means() -> None:
    dictionary, density = latents(12)
    sets = np.array([[3, 4], [5, 6]])
    norms = dictionary.W_dec.norm(dim=-1).numpy()
    assert match(dictionary, [0, 1], density, sets) == pytest.approx({
        "density": float(density[:2].mean()), "density of placebos": float(density[3:7].mean()),
        "decoder norm": norms[:2].mean(), "decoder norm of placebos": norms[3:7].mean(),
    })  # fmt: skip
