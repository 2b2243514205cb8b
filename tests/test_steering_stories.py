"""Girl minus boy in real weights, in little: the whole is ``benchmarks/steering.py``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import tl_em as em

from .conftest import SURFACES, benchmark

steering = benchmark("steering")


@pytest.mark.parametrize("seed", [3, 4])
def test_what_is_judged_was_neither_extracted_from_nor_chosen_on(seed: int) -> None:
    made = steering.parts(seed)
    assert set(made.select.names.units).isdisjoint(made.test.names.units)
    girls = [name in steering.GIRLS for name in dict.fromkeys(made.test.names.units)]
    assert len(girls) == 24 and sum(girls) == 12
    for kind in ("names", "neither", "girl", "boy"):
        centre, select, test = (set(getattr(part, kind).texts) for part in (made.centre, made.select, made.test))
        assert test and select and test.isdisjoint(select) and centre.isdisjoint(test | select)
    scenes = [set(part.girl.units) for part in (made.centre, made.select, made.test)]
    assert [len(s) for s in scenes] == [6, 6, 12] and len(set.union(*scenes)) == 24
    extracted = " ".join([*made.contrast.train.positive, *made.contrast.train.negative])
    assert not any(name in extracted.split() for name in (*steering.GIRLS, *steering.BOYS))
    swapped = [text.replace("girl", "boy") for text in made.test.girl.texts]
    assert swapped == made.test.boy.texts, "a pair differs in one word"


def test_conditions_fail_where_they_should() -> None:
    def estimate(value: float, half: float = 0.05) -> em.Estimate:
        return em.Estimate(value, value - half, value + half, n=36, n_effective=36.0, method="bootstrap")

    p = {f"p, {s}1, {k}": 1 / 51 for s in "+-" for k in ("isotropic", "within-class")}
    layers = [
        {"layer": i, "pull": estimate(v), "this minus half of the best": estimate(v - 5.0)}
        for i, v in enumerate((0.0, 1.0, 9.0, 10.0, 2.0))
    ]
    left = {"gap, untreated": estimate(7.0), "gap, ablated": estimate(0.04), "neither, untreated": estimate(0.2, 0.5)}
    left |= {f"{what}, {k}": v for k in ("isotropic", "within-class") for what, v in (("p", 1 / 51), (LEAST, 4.2))}
    result: Any = {"steering": p | {"names, +1": estimate(7.0), "names, -1": estimate(-12.0)}, "layers": layers}
    result["ablation"] = left
    assert all(steering.conditions(result).values())
    layers[0]["pull"] = estimate(8.0)
    left["gap, ablated"], left[f"{LEAST}, isotropic"] = estimate(0.06), 0.4
    result["steering"]["p, -1, within-class"] = 2 / 51
    failed = [name for name, holds in steering.conditions(result).items() if not holds]
    assert [name.split(",")[0] for name in failed] == [
        "steers in both signs",
        "at most two neighbouring layers steer",
        "the gap's interval holds 0",
        "every random ablation leaves more than that",
    ]


LEAST = "least gap of the random"

if steering.MODEL.is_dir():

    @cache
    def measured(surface: str) -> dict[str, Any]:
        """Few names, pairs and random directions, at the site and in the form that the benchmark's splits choose."""
        model, made = em.load_model(steering.MODEL, surface=surface), steering.parts(3)
        whole = (made.test.names, made.test.girl, made.test.boy)
        names, girl, boy = (steering.Prompts(each.texts[::4], each.units[::4]) for each in whole)
        part = steering.Part(names, made.test.neither, girl, boy)
        sites = [em.Site(layer) for layer in range(5)]
        found = [em.difference_in_means(model, made.contrast.train, site=s, position="prompt_end") for s in sites]
        changes = np.array([steering.steered(model, names, d).mean(1) for d in found])
        edit = steering.ablations(model, found[3], made)["after blocks 2 to 3"]
        drawn = steering.random_directions(model, found[3], made.contrast.train, seed=0, count=5)
        flat = [d for some in drawn.values() for d in some]
        left = [steering.gaps(model, part, em.Ablate(d, around=edit.around)).mean() for d in flat]
        return {
            "changes": changes,
            "random changes": np.array([steering.steered(model, names, d).mean(1) for d in flat]),
            "gap": steering.gaps(model, part),
            "left": steering.gaps(model, part, edit),
            "random left": np.array(left),
        }

    @pytest.mark.surface
    def test_the_direction_steers_unseen_names_both_ways_and_random_ones_do_not(surface: str) -> None:
        found = measured(surface)
        up, down = found["changes"][3]
        assert up > 5 and down < -5
        assert np.abs(found["random changes"]).max() < min(up, -down)

    @pytest.mark.surface
    def test_it_does_so_in_the_middle_of_the_model_only(surface: str) -> None:
        up, down = measured(surface)["changes"].T
        pull = (up - down) / 2
        assert list(np.flatnonzero(pull > pull.max() / 2)) == [2, 3]
        assert pull[[0, 1, 4]].max() < pull.max() / 3

    @pytest.mark.surface
    def test_its_mean_preserving_ablation_closes_the_gap_and_random_ones_do_not(surface: str) -> None:
        found = measured(surface)
        assert found["gap"].min() > 3, "there is a gap, in every pair"
        assert abs(found["left"].mean()) < 0.02 * found["gap"].mean()
        assert np.abs(found["left"]).max() < 0.1 * found["gap"].mean()
        assert found["random left"].min() > found["gap"].mean() / 2

    def test_both_surfaces_agree() -> None:
        if len(SURFACES) == 1:
            return
        first, second = (measured(surface) for surface in SURFACES)
        for name in first:
            np.testing.assert_allclose(first[name], second[name], atol=1e-3)  # float32 sums in another order
