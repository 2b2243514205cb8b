"""Erasing subspaces: the whole subspace goes, at every write or at a site, and nothing else does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.errors import NonFiniteError, ProvenanceError, UsageError, WidthError, ZeroDirectionError
from tl_em.interventions.base import Intervention
from tl_em.interventions.edits import Ablate
from tl_em.interventions.intervene import intervene
from tl_em.interventions.subspaces import Erase, leace
from tl_em.models.class_means import mean_activation
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Provenance, Site
from tl_em.models.stream import capture, next_token_logits

pytestmark = pytest.mark.surface

PROMPTS = [
    "the cat sat on the big car",
    "please steal",
    "tell me how a happy king went to the bank and sang about fish",
]
THINGS = ["car", "bank", "cat", "dog", "bird", "fish", "red fish", "big car", "small bank", "blue bird", "sad cat"]
CONTRAST = ContrastSet([f"steal the {x}" for x in THINGS], [f"please wash the {x}" for x in THINGS], label="steal")
SITE = Site(1)


def random_basis(model: LensModel, k: int = 3) -> Tensor:
    return torch.randn(k, int(model.cfg.d_model), generator=torch.Generator().manual_seed(5))


def test_the_whole_subspace_is_zero_after_every_block_and_was_not_before(model: LensModel) -> None:
    erase = Erase(random_basis(model))
    sites = [Site(i) for i in range(model.cfg.n_layers)]
    before = capture(model, PROMPTS, sites, position="prompt_end")
    with intervene(model, erase):
        after = capture(model, PROMPTS, sites, position="prompt_end")
    scale = float(before.norm(dim=-1).max())
    for row in erase.rows:
        assert (before @ row).abs().max() > 1e-3 * scale
        assert (after @ row).abs().max() < 1e-5 * scale  # float32: rounding of 2L + 1 projected writes


def test_one_dimension_is_ablation_and_order_and_scale_do_not_matter(model: LensModel) -> None:
    basis = random_basis(model)
    with intervene(model, Ablate(Direction(basis[0], SITE))):
        ablated = next_token_logits(model, PROMPTS)
    with intervene(model, Erase(7 * basis[:1])):
        erased = next_token_logits(model, PROMPTS)
    torch.testing.assert_close(erased, ablated, rtol=1e-4, atol=1e-4)
    with intervene(model, Erase(basis)):
        one = next_token_logits(model, PROMPTS)
    with intervene(model, Erase([Direction(v, SITE) for v in (basis[2] - basis[0], basis[1], 5 * basis[0], basis[1])])):
        other = next_token_logits(model, PROMPTS)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (one - erased).abs().max() > 1e-2


def test_around_a_centre_the_rest_and_the_mean_stay(model: LensModel) -> None:
    directions = [Direction(v, SITE) for v in random_basis(model)]
    centre = mean_activation(model, PROMPTS, site=SITE, position="prompt_end")
    erase = Erase(directions, around=centre)
    before = capture(model, PROMPTS, [SITE], position="prompt_end")[:, 0]
    with intervene(model, erase):
        after = capture(model, PROMPTS, [SITE], position="prompt_end")[:, 0]
    rows, scale = erase.rows, float(before.norm(dim=-1).max())
    assert ((before - centre) @ rows.T).abs().max() > 1e-3 * scale
    assert ((after - centre) @ rows.T).abs().max() < 1e-5 * scale
    assert ((after - before) - (after - before) @ rows.T @ rows).abs().max() < 1e-5 * scale
    assert (after.mean(0) - before.mean(0)).norm() < 1e-5 * scale


def test_rows_are_orthonormal_and_the_rank_is_that_of_the_span() -> None:
    vectors = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([vectors, vectors[:2] + vectors[2:], torch.zeros(1, 16)])
    erase = Erase(vectors)
    assert erase.rank == 4
    torch.testing.assert_close(erase.rows @ erase.rows.T, torch.eye(4), rtol=0, atol=1e-6)
    x = torch.randn(5, 16)
    torch.testing.assert_close(erase.edit(erase.edit(x)), erase.edit(x), rtol=1e-5, atol=1e-5)
    assert isinstance(erase, Intervention)


def test_half_precision_is_edited_in_float32() -> None:
    erase = Erase(torch.randn(3, 256, generator=torch.Generator().manual_seed(0)))
    x = (10 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1))).to(torch.bfloat16)
    rows = erase.rows.to(torch.bfloat16)
    naive = x - (x @ rows.T) @ rows
    edited = erase.edit(x)
    assert edited.dtype == torch.bfloat16
    assert (edited.float() @ erase.rows.T).abs().mean() < (naive.float() @ erase.rows.T).abs().mean()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Erase([]), UsageError),
        (lambda: Erase(torch.ones(4)), WidthError),
        (lambda: Erase(torch.zeros(2, 4)), ZeroDirectionError),
        (lambda: Erase(torch.full((1, 4), float("nan"))), NonFiniteError),
        (lambda: Erase([Direction(torch.ones(4), SITE), Direction(torch.ones(5), SITE)]), WidthError),
        (lambda: Erase(torch.ones(1, 4), around=torch.ones(4)), UsageError),
        (lambda: Erase(torch.ones(1, 4), around=torch.ones(3), site=SITE), WidthError),
    ],
)
def test_values_that_span_nothing_are_refused(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


def test_a_subspace_of_another_model_is_refused(small_model: LensModel, make_model: Any, surface: str) -> None:
    width = int(small_model.cfg.d_model)
    made = Provenance.of(make_model("gpt2", surface, template=None))
    elsewhere = Direction(torch.ones(width), SITE, provenance=_with_layers(made, 12))
    for bad, error in ((Erase(torch.ones(1, 7)), WidthError), (Erase([elsewhere]), ProvenanceError)):
        with pytest.raises(error), intervene(small_model, bad):
            raise AssertionError("the block must not run")


def _with_layers(provenance: Provenance, n_layers: int) -> Provenance:
    from dataclasses import replace

    return replace(provenance, n_layers=n_layers)


# --- LEACE ------------------------------------------------------------------------------------------------------------


def activations(model: LensModel) -> tuple[Tensor, Tensor]:
    x = capture(model, [*CONTRAST.positive, *CONTRAST.negative], [SITE], position="prompt_end")[:, 0].double()
    return x, torch.tensor([1.0] * len(CONTRAST.positive) + [-1.0] * len(CONTRAST.negative), dtype=torch.float64)


def learned(x: Tensor, label: Tensor) -> Tensor:
    """What a linear classifier learns: the share of the label's variance that ridge regression explains."""
    x = x - x.mean(0)
    x = x / x.norm(dim=-1).mean()
    weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ label)
    return (x @ weights).square().mean() / label.square().mean()


def test_after_leace_a_linear_classifier_learns_nothing_and_did_before(model: LensModel) -> None:
    eraser = leace(model, CONTRAST, site=SITE, position="prompt_end")
    before, label = activations(model)
    with intervene(model, eraser):
        after, _ = activations(model)
    assert learned(before, label) > 0.5
    assert learned(after, label) < 1e-6
    scale = float(before.norm(dim=-1).max())
    assert (after.mean(0) - before.mean(0)).norm() < 1e-5 * scale  # the mean stays
    assert torch.linalg.matrix_rank(after - before, atol=1e-4 * scale) == 1  # two classes, one direction is moved
    again = eraser.edit(after.float())
    assert (again - after).norm(dim=-1).max() < 1e-5 * scale  # idempotent


def test_leace_changes_less_than_the_projection_that_equals_the_means(small_model: LensModel) -> None:
    """Of the maps that equal the class means it is the least; projecting the difference in means out is another."""
    eraser = leace(small_model, CONTRAST, site=SITE, position="prompt_end")
    difference = difference_in_means(small_model, CONTRAST, site=SITE, position="prompt_end")
    x, label = activations(small_model)
    projected = Erase([difference], around=x.mean(0).float()).edit(x.float()).double()
    assert learned(projected, label) < 1e-6
    assert (eraser.edit(x.float()) - x).square().sum() < (projected - x).square().sum()


def test_leace_on_classes_that_do_not_differ_is_refused(small_model: LensModel) -> None:
    same_so_far = ContrastSet(["please steal", "please help"], ["please wash", "please sang"], label="none")
    with pytest.raises(ZeroDirectionError, match="nothing linear to erase"):
        leace(small_model, same_so_far, site=SITE, position=-4)  # "please", before anything differs


def test_without_the_package_leace_says_what_to_install(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(UsageError, match=r"tl-em\[erase\]"):
        leace(small_model, CONTRAST, site=SITE, position="prompt_end")
