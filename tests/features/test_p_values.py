"""p by closed form: never below the exact ones, those of their sources, and large where only density does it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tl_em.features.p_values import conjunction_p, overlap_p, sign_flip_p

pytestmark = pytest.mark.surface


def test_p_is_exact_for_few_parts_and_never_below_it_for_many() -> None:
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(8, 5, generator=generator) + 1.0
    flips = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    exact = ((flips @ few).abs() >= few.sum(0).abs() - 1e-6).double().mean(0)
    assert np.allclose(sign_flip_p(few), exact.numpy())
    assert exact.min() < 0.1
    many = torch.randn(14, 40, generator=generator).abs().pow(3) * torch.randn(14, 40, generator=generator).sign()
    flips = torch.tensor(list(itertools.product((1.0, -1.0), repeat=14)))
    exact = ((flips @ many).abs() >= many.sum(0).abs() - 1e-6).double().mean(0)
    bound = sign_flip_p(many)
    assert (bound >= exact.numpy() - 1e-12).all()
    assert bound.min() < 0.5


def test_conjunctions_are_those_of_their_sources() -> None:
    from scipy.stats import combine_pvalues

    p = np.array([[0.01, 0.2], [0.03, 0.001], [0.5, 0.04]])
    assert conjunction_p(p, 3).tolist() == pytest.approx([0.5, 0.2])
    fisher = combine_pvalues([0.03, 0.5], method="fisher").pvalue
    assert conjunction_p(p, 2)[0] == pytest.approx(fisher)
    assert conjunction_p(p, 2, independent=False).tolist() == pytest.approx([0.06, 0.08])


def test_lists_that_overlap_because_their_latents_are_dense_overlap_by_chance() -> None:
    """Ten latents of one bin head both lists: no finding within the bin, one where the bins are mixed."""
    rng, sizes = np.random.default_rng(0), torch.rand(2, 200)
    sizes[:, :10] += 10
    mixed = np.arange(200) % 5
    assert overlap_p(sizes, mixed, rng) <= 0.01
    own = np.where(np.arange(200) < 10, 1, 0)
    assert overlap_p(sizes, own, rng) > 0.5
