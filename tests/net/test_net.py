"""Nothing that worked may stop working: whole results beside those kept before the package was rebuilt.

A difference is a fault, or a correction that CHANGELOG.md names with the old and the new value; then the net is
cast again (``python -m tests.net.cast NAME``) in the same commit. Here numbers may differ by what another machine's
rounding makes; ``python -m tests.net.cast --compare`` compares to the last digit, on the machine that cast it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.conftest import SURFACES
from tests.net.cast import SEEDS, kept, read
from tests.net.measured import STORIES, SUBJECTS, differences, plain

QUICK = ("selection", "curve", "inversion", "graph")
CASES = [
    pytest.param(name, surface, seed, marks=[] if name in QUICK and seed == 0 else [pytest.mark.slow])
    for name in SUBJECTS
    for surface in SURFACES
    for seed in SEEDS
]


@pytest.mark.parametrize(("name", "surface", "seed"), CASES)
def test_results_are_what_they_were(name: str, surface: str, seed: int) -> None:
    if name == "stories" and not STORIES.is_dir():
        pytest.skip("the weights of the story model are not here")
    assert differences(read(kept(name, surface, seed)), plain(SUBJECTS[name](surface, seed))) == []


def test_the_net_sees_a_changed_word_a_lost_field_and_a_number() -> None:
    whole: Any = read(kept("secure", "bridge", 0))
    assert differences(whole, copy.deepcopy(whole)) == []
    for change in ({"verdict": "causal"}, {"p": 0.123}, {"reason": None}):
        other = copy.deepcopy(whole)
        other["verdicts"][0] |= change
        assert len(differences(whole, other)) == 1, change
    other = copy.deepcopy(whole)
    del other["verdicts"][0]["estimate"]["low"]
    assert differences(whole, other) == ["/verdicts/0/estimate/low: gone"]
