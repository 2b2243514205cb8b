"""An audit's calibration counts *use* too: whether a random direction in place of the real one gets a word."""

from __future__ import annotations

import pytest

import tl_em as em
from tl_em.errors import NoGapError


def test_random_directions_take_the_place_of_one_that_is_used() -> None:
    pair = em.load_pair("toy/insecure")
    whole = (pair.contrasts or {})["persona"]
    few = {"persona": em.ContrastSet(whole.positive[:16], whole.negative[:16])}
    found = em.calibration(pair, contrasts=few, questions=["level", "use"], controls=99, draws=2)
    table = found.to_pandas()
    assert {"level", "use"} <= set(table.question) and found.left_out == {}
    at_random = table[table.question == "use"]
    assert (at_random.n == 2).all() and at_random.value.between(0, 1).all()


def test_a_direction_without_a_gap_has_nothing_to_calibrate() -> None:
    pair = em.load_pair("toy/insecure")
    whole = (pair.contrasts or {})["persona"]
    half = em.ContrastSet(whole.negative[:16], whole.negative[16:32])  # nothing tells these apart
    with pytest.raises(NoGapError):
        em.calibration(pair, contrasts={"none": half}, questions=["level"], controls=99, draws=2)
