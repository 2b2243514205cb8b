"""What is shared is found, decoys are not, and nothing is where nothing is: the whole is ``benchmarks/scoring.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tl_em as em
from tests.conftest import benchmark
from tl_em.errors import UsageError
from tl_em.features.scoring import FeatureTable, score_features
from tl_em.features.shared_latents import FeatureSet, shared_features

pytestmark = pytest.mark.surface
scoring = benchmark("scoring")


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "null"])
def scored(request: pytest.FixtureRequest) -> tuple[bool, FeatureTable]:
    draw = scoring.planted(0, shared=request.param)
    return request.param, score_features(draw.model, draw.dictionary, draw.behaviours)


def test_the_shared_latent_is_returned_alone_and_nothing_on_null(scored: tuple[bool, FeatureTable]) -> None:
    planted, table = scored
    found = shared_features(table)
    assert [each.indices for each in found] == ([(scoring.SHARED,)] if planted else [])
    for each in found:
        assert each.signs == (1,) and each.share.low > 0.1 and each.q <= 0.05 and each.p_random <= 0.05
        assert each.effects[0].low > 0 and each.features[0].index == scoring.SHARED
        assert f"+{scoring.SHARED}" in repr(each)


def test_the_decoys_are_there_for_a_look_up_without_a_null(scored: tuple[bool, FeatureTable]) -> None:
    frame = scored[1].to_pandas()
    top = [set(rows.nlargest(20, "mean_positive").latent) for _, rows in frame.groupby("behaviour")]
    assert scoring.DENSE in set.intersection(*top)  # by the published recipe it would be the finding
    unread = frame[frame.latent == scoring.UNREAD]
    assert (unread.auroc > 0.99).all() and (unread.q < 1e-6).all()
    assert (unread.attribution.abs() < 1e-6).all()
    own = frame[(frame.latent == scoring.OWN[0]) & (frame.behaviour == "a")]
    assert float(own.attribution.iloc[0]) > 0.01


def test_without_attribution_the_unread_latent_needs_its_decoder(scored: tuple[bool, FeatureTable]) -> None:
    """Where no completions say what is read, the share of the shift still leaves out a row that moves nothing."""
    planted, table = scored
    silent = replace(table, parts={"effect": table.parts["effect"]})
    found = {index for each in shared_features(silent) for index in each.indices}
    assert scoring.UNREAD not in found and (scoring.SHARED in found) == planted


def test_a_shift_that_is_small_is_none_shown(scored: tuple[bool, FeatureTable]) -> None:
    planted, table = scored
    assert bool(shared_features(table)) == planted
    assert shared_features(table, smallest=2.0) == ()


def test_a_set_may_carry_what_no_latent_of_it_does() -> None:
    """The shared row, split over four latents, each of which fires on a quarter of the prompts."""
    table = _table(split=4)
    found = shared_features(table)
    assert found and found[0].kind == "set" and set(found[0].indices) == {0, 1, 2, 3}
    assert found[0].share.low > 0.5
    assert all(each.share.value < found[0].share.value for each in found[1:])
    assert shared_features(_table(split=0)) == ()


def _table(*, split: int, latents: int = 160, parts: int = 64, behaviours: int = 4) -> FeatureTable:
    """Contributions made by hand: noise, and the planted latents' shift with their decoder rows'."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(behaviours, parts, latents, generator=generator) * 0.2 / parts
    rows = torch.nn.functional.normalize(torch.randn(latents, 48, generator=generator), dim=-1)
    values[:, :, :split] += 1.0 / parts
    shift = values @ rows + torch.randn(behaviours, parts, 48, generator=generator) * 0.1 / parts
    import pandas as pd

    names = tuple("abcd"[:behaviours])
    frame = pd.DataFrame([(j, name, 0.1 + j / latents / 2) for name in names for j in range(latents)],
                         columns=["latent", "behaviour", "density"])  # fmt: skip
    sae = em.Dictionary(rows.T, torch.zeros(latents), rows, torch.zeros(48), activation="relu", site_in=em.Site(0))
    share = torch.full((behaviours, parts), 1 / parts)
    return FeatureTable(sae, names, frame, {"effect": values}, {"effect": shift}, share, (1.0,) * 4, (128,) * 4, True)


def test_a_latent_of_one_sign_here_and_another_there_is_not_shared() -> None:
    table = _table(split=1)
    assert {j for each in shared_features(table) for j in each.indices} == {0}
    values, shift = table.parts["effect"].clone(), table.shifts["effect"].clone()
    values[:2, :, 0] *= -1
    shift[:2] += (2 * values[:2, :, :1]) * table.dictionary.W_dec[0]
    turned = replace(table, parts={"effect": values}, shifts={"effect": shift})
    assert shared_features(turned) == ()


@pytest.mark.parametrize(("common", "found"), [(0.0, {0}), (0.3, {0}), (1.0, set())])
def test_what_the_negative_prompts_show_too_is_said_and_taken_out(common: float, found: set[int]) -> None:
    """A change of one latent in every behaviour, and a part of it on prompts without any."""
    table = _table(split=1)
    values, shift = table.parts["effect"], table.shifts["effect"]
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(8)) * 0.05 / values.shape[1]
    drift = noise.clone()
    drift[:, :, 0] += common / values.shape[1]
    rows = table.dictionary.W_dec
    both = {"delta": values, "own": values - drift}
    table = replace(table, parts=both, shifts={"delta": shift, "own": shift - drift @ rows})
    (whole,) = shared_features(table)
    assert whole.indices == (0,) and len(whole.drifts) == 4
    assert all(abs(each.value - common) < 0.1 and each.low < each.high for each in whole.drifts)
    assert whole.drift.value == min(each.value for each in whole.drifts)
    assert f"show {whole.drift} of this change too" in repr(whole)
    assert ("a drift of the model" in repr(whole)) == (common > 0.5)
    own = shared_features(table, by="own")
    assert {j for each in own for j in each.indices} == found and not any(each.drifts for each in own)


def test_bad_input(scored: tuple[bool, FeatureTable]) -> None:
    table = scored[1]
    with pytest.raises(UsageError, match="no 'delta'"):
        shared_features(table, by="delta")
    one = replace(table, behaviours=("a",))
    with pytest.raises(UsageError, match="shares nothing"):
        shared_features(one)
    share = table.share.clone()
    share[:, 5:] = 0
    with pytest.raises(UsageError, match="too few"):
        shared_features(replace(table, share=share))
    assert isinstance(FeatureSet(table.dictionary, (1,), (-1,)).features[0], em.Feature)
