"""Every way to find a direction: what it equals, that it finds what was planted, how reliable that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tl_em.directions.extract import difference_in_means, extract_directions
from tl_em.directions.geometry import cosine
from tl_em.directions.methods import SHIPPED
from tl_em.directions.methods.lda import Lda
from tl_em.directions.methods.logistic import Logistic
from tl_em.directions.methods.pca import Pca
from tl_em.directions.reliability import neutral_z
from tl_em.errors import EmptyContrastError, NonFiniteError, NuisanceWarning, UsageError, ZeroDirectionError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.sites import Site
from tl_em.models.stream import capture

pytestmark = pytest.mark.surface

NOUNS = ("cat", "dog", "bird", "fish", "king", "queen", "boy", "girl", "car", "bank", "story")
CONTRAST = ContrastSet(
    [f"please steal the {noun}" for noun in NOUNS], [f"please wash the {noun}" for noun in NOUNS], label="steal"
)
METHODS = tuple(SHIPPED)


def test_difference_in_means_is_the_difference_of_the_captured_means(model: LensModel) -> None:
    sites = [Site(0), Site(2, "resid_pre"), Site(1, "mlp_out")]
    found = extract_directions(model, CONTRAST, sites=sites, positions=["instruction_end", "prompt_end"])
    assert [(d.site, d.position) for d in found] == [(s, p) for p in ("instruction_end", "prompt_end") for s in sites]
    for direction in found:
        acts = [
            capture(model, prompts, [direction.site], position=direction.position)[:, 0]
            for prompts in (CONTRAST.positive, CONTRAST.negative)
        ]
        expected = acts[0].double().mean(0) - acts[1].double().mean(0)
        torch.testing.assert_close(direction.vector.double(), expected, rtol=1e-4, atol=1e-5)  # float32 batches
    assert found[0].provenance is not None
    assert found[0].provenance.data == CONTRAST.hash
    assert found[0].provenance.differences(model) == []


def test_without_sites_every_layer_is_read(small_model: LensModel) -> None:
    found = extract_directions(small_model, CONTRAST)
    assert [d.site for d in found] == [Site(0), Site(1), Site(2)]
    one = difference_in_means(small_model, CONTRAST, site=Site(1), position="prompt_end")
    assert torch.equal(found[1].vector, one.vector)


def test_paired_equals_the_mean_of_the_pairs_and_pca_their_first_component(small_model: LensModel) -> None:
    x, y = (
        capture(small_model, p, [Site(1)], position="prompt_end")[:, 0].double()
        for p in (CONTRAST.positive, CONTRAST.negative)
    )
    (paired,) = extract_directions(small_model, CONTRAST, sites=[Site(1)], method="paired")
    torch.testing.assert_close(paired.vector.double(), (x - y).mean(0), rtol=1e-4, atol=1e-5)
    (first,) = extract_directions(small_model, CONTRAST, sites=[Site(1)], method="pca")
    values, vectors = torch.linalg.eigh((x - y).T @ (x - y))
    assert values[-1] > 1.5 * values[-2]  # so that the first component is well defined
    assert abs(float(first.unit.double() @ vectors[:, -1])) > 1 - 1e-5
    assert float(first.unit.double() @ (x - y).mean(0)) == pytest.approx(first.norm, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_planted_is_found_on_a_model(small_model: LensModel, method: str) -> None:
    """A vector is added wherever the prompts say 'steal': every method finds it, with its length along it."""
    planted = torch.zeros(32)
    planted[5] = 20.0
    word = small_model.tokenizer("steal", add_special_tokens=False)["input_ids"][0]  # type: ignore[attr-defined]
    tokens: list[torch.Tensor] = []

    def remember(x: torch.Tensor, hook: Any) -> None:
        from tl_em.models.stream import current_batch

        batch = current_batch.get()
        assert batch is not None
        tokens[:] = [(batch.tokens == word).any(1)]

    def plant(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + tokens[0][:, None, None] * planted

    names = [("blocks.0.hook_resid_pre", remember), ("blocks.1.hook_resid_post", plant)]
    with hooked(small_model, names, check=False):
        (found,) = extract_directions(small_model, CONTRAST, sites=[Site(1)], method=method)
    probe = method in ("logistic", "lda")  # they turn away from what varies within the classes
    assert float(found.unit[5]) > (0.85 if probe else 0.97)
    assert found.norm == pytest.approx(20.0, rel=0.2)
    assert found.reliability is not None and found.reliability.low > (0.6 if probe else 0.9)
    assert found.method == method


def fit(method: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return SHIPPED[method].fit(torch.from_numpy(x)[:, None], torch.from_numpy(y)[:, None])[0].numpy()


@pytest.mark.parametrize("method", METHODS)
def test_fits_find_a_planted_direction_and_shuffled_classes_give_another(method: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 80, 12))
    x[:, 3] += 4.0
    found = fit(method, x, y)
    assert found[3] / np.linalg.norm(found) > 0.9
    assert np.linalg.norm(found) == pytest.approx(4.0, abs=0.7)  # 80 prompts: s.e. of the gap is .16
    mixed = rng.permutation(np.concatenate([x, y]))
    assert np.linalg.norm(fit(method, mixed[:80], mixed[80:])) < 2.0


def test_lda_turns_away_from_what_varies_anyway_and_the_difference_in_means_does_not() -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2, 400, 2)) * np.array([1.0, 10.0])
    noise -= noise.mean(1, keepdims=True)
    x, y = noise[0] + np.array([2.0, 2.0]), noise[1]
    found = Lda.fit_one(x, y)
    covariance = np.cov(np.concatenate(list(noise)).T, bias=True)
    expected = np.linalg.solve(covariance, [2.0, 2.0])
    assert cosine(found, expected) > 0.999  # shrinkage is small at 800 prompts in two dimensions
    assert cosine(x.mean(0) - y.mean(0), expected) < 0.8


def test_lda_equals_a_solve_with_the_shrunk_covariance() -> None:
    """More dimensions than prompts, where the shortcut through the singular vectors matters."""
    from sklearn.covariance import ledoit_wolf

    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 10, 40)) @ np.diag(np.linspace(0.1, 3, 40))
    x += 1.0
    centred = np.concatenate([x - x.mean(0), y - y.mean(0)])
    covariance, _ = ledoit_wolf(centred, assume_centered=True)
    expected = np.linalg.solve(covariance, x.mean(0) - y.mean(0))
    assert cosine(Lda.fit_one(x, y), expected) > 1 - 1e-9


def test_logistic_separates_what_the_difference_in_means_mixes() -> None:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((2, 300, 2)) @ np.array([[1.0, 3.0], [0.0, 0.5]])
    x, y = noise[0] + np.array([1.0, 0.0]), noise[1]
    found = Logistic.fit_one(x, y)
    scores = [each @ found for each in (x, y)]
    right = np.mean([(s > np.mean(scores)) == label for s, label in zip(scores, (True, False), strict=True)])
    plain = [each @ (x.mean(0) - y.mean(0)) for each in (x, y)]
    plain_right = np.mean([(s > np.mean(plain)) == label for s, label in zip(plain, (True, False), strict=True)])
    assert right > plain_right + 0.1


def test_reliability_is_low_without_a_difference_and_high_with_one(small_model: LensModel) -> None:
    rng = np.random.default_rng(0)
    words = ("the", "big", "small", "red", "happy", "sad", "blue")
    mixed = [" ".join([*rng.choice(words, 4), str(rng.choice(NOUNS))]) for _ in range(48)]
    pairs = range(24)  # of seven words, so that some are near-equal
    none = ContrastSet(mixed[:24], mixed[24:], label="nothing", positive_groups=pairs, negative_groups=pairs)
    low = difference_in_means(small_model, none, site=Site(2), position="prompt_end").reliability
    high = difference_in_means(small_model, CONTRAST, site=Site(2), position="prompt_end").reliability
    assert low is not None and high is not None
    assert high.low > 0.5 > abs(low.value) + 0.1
    assert (low.n, low.n_effective) == (48, 24.0)


def test_two_prompts_are_too_few_for_either_number(small_model: LensModel) -> None:
    found = difference_in_means(small_model, ContrastSet(["steal"], ["wash"]), site=Site(1), position="prompt_end")
    assert found.reliability is None and found.neutral is None


def test_neutral_says_where_the_negative_class_lies() -> None:
    rng = np.random.default_rng(0)
    near = neutral_z(rng.standard_normal(200) + 8, rng.standard_normal(200))
    far = neutral_z(rng.standard_normal(200) + 12, rng.standard_normal(200) + 8)
    assert near is not None and far is not None
    assert abs(near.value) < 0.1 and near.low < 0 < near.high
    assert far.value == pytest.approx(8 / np.sqrt(1 + 4), rel=0.1) and far.beyond(1.0)


def test_neutral_from_a_sample_agrees_with_all_prompts(small_model: LensModel) -> None:
    direction = difference_in_means(small_model, CONTRAST, site=Site(2), position="prompt_end")
    along = [
        direction.project(capture(small_model, p, [Site(2)], position="prompt_end")[:, 0]).double().numpy()
        for p in (CONTRAST.positive, CONTRAST.negative)
    ]
    found = neutral_z(along[0], along[1])
    assert found is not None and direction.neutral is not None
    assert found.value == pytest.approx(direction.neutral.value, rel=1e-4)  # 11 prompts: the sample is all of them


def test_refusals(small_model: LensModel) -> None:
    with pytest.raises(UsageError, match="there are the methods"):
        extract_directions(small_model, CONTRAST, method="magic")
    with pytest.raises(UsageError, match="positions are a list"):
        extract_directions(small_model, CONTRAST, positions="prompt_end")
    unpaired = ContrastSet(["steal a car", "steal a bank", "steal"], ["wash a car"])
    for method in ("paired", "pca"):
        with pytest.raises(EmptyContrastError, match="no pair or group"):
            extract_directions(small_model, unpaired, method=method, sites=[Site(0)])
    same_end = ContrastSet(["steal the car", "please steal a car"], ["wash the car", "please wash a car"])
    for method in METHODS:
        with pytest.raises(ZeroDirectionError, match="resid_pre"):  # the same token at the first layer
            extract_directions(small_model, same_end, sites=[Site(0, "resid_pre")], method=method)
    nan = [("blocks.1.hook_resid_pre", lambda x, hook: x * float("nan"))]
    for method in METHODS:
        with hooked(small_model, nan), pytest.raises(NonFiniteError, match="resid_post"):
            extract_directions(small_model, CONTRAST, sites=[Site(1)], method=method)


def test_pca_is_not_centred() -> None:
    """Centring would remove the mean difference, which is the concept."""
    x = np.tile([5.0, 0.0], (6, 1))
    x[:, 1] = [1, -1, 1, -1, 1, -1]
    assert abs(Pca.fit_one(x, np.zeros_like(x))[0]) == pytest.approx(5.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_set_whose_classes_differ_in_length_is_warned_about(small_model: LensModel, method: str) -> None:
    longer = ContrastSet(CONTRAST.positive, [f"{prompt} on the car" for prompt in CONTRAST.negative])  # type: ignore[str-bytes-safe]
    with pytest.warns(NuisanceWarning, match="0% of all pairs"):
        extract_directions(small_model, longer, sites=[Site(1)], method=method)
