"""Steps that touch the latents which are on give what SAELens's own steps give."""

from __future__ import annotations

import pytest
import torch

from tl_em.dictionaries.descent import TrainingRun, trainer_of
from tl_em.dictionaries.top_k import On, largest, largest_of_rows

STEPS, BATCH, WIDTH, D_SAE = 80, 128, 32, 256


def batches() -> list[torch.Tensor]:
    """Sparse sums of 64 directions, so that some latents are of use and others die; noise, so that none are equal."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(64, WIDTH, generator=generator)

    def noise() -> torch.Tensor:
        return 0.1 * torch.randn(BATCH, WIDTH, generator=generator)

    return [(torch.rand(BATCH, 64, generator=generator) < 0.05).float() @ basis + noise() for _ in range(STEPS)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("kind", ["TopKTrainingSAEConfig", "BatchTopKTrainingSAEConfig"])
def test_losses_and_weights_are_saelens_own_at_every_step(kind, shifted, dtype, tolerance, monkeypatch):
    saes = pytest.importorskip("sae_lens.saes")
    from sae_lens.saes.sae import TrainingSAE

    def config(steps: int):
        return getattr(saes, kind)(d_in=WIDTH, d_sae=D_SAE, k=4, dtype=dtype, apply_b_dec_to_input=shifted)

    run = TrainingRun(config, STEPS, BATCH, 1e-3, 0, transcoder=False)
    ours = trainer_of(run)
    monkeypatch.setattr(
        "tl_em.dictionaries.descent.training_sae",
        lambda config, _: TrainingSAE.get_sae_class_for_architecture(config.architecture())(config),
    )
    theirs = trainer_of(run)
    assert type(ours.sae).training_forward_pass is not type(theirs.sae).training_forward_pass
    dead, losses = 0, []
    for batch in (each.to(getattr(torch, dtype)) for each in batches()):
        one, other = ours.step(batch), theirs.step(batch)
        dead = max(dead, int(theirs.dead_neurons.sum()))
        losses.append(other.losses["mse_loss"].item())
        for each in ("mse_loss", "auxiliary_reconstruction_loss"):
            torch.testing.assert_close(one.losses[each], other.losses[each], atol=0.0, rtol=min(tolerance, 1e-5))
        for name, each in theirs.sae.state_dict().items():
            torch.testing.assert_close(ours.sae.state_dict()[name], each, atol=tolerance, rtol=tolerance)
        assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
        torch.testing.assert_close(ours.act_freq_scores, theirs.act_freq_scores)
    assert dead > WIDTH // 2 and losses[-1] < 0.95 * losses[0]  # the auxiliary loss chose among them, and it learned


def test_the_largest_of_a_batch_are_those_of_topk_whatever_was_guessed():
    generator = torch.Generator().manual_seed(0)
    usual = torch.randn(64, 100, generator=generator)
    hidden = torch.zeros(64, 100)
    hidden.view(-1)[1::64] = torch.arange(100.0)  # none among those that the guess is made from
    for h in (usual, hidden, usual.sort().values):
        for k in (1, 64, 640, 6400):
            found = largest(h, k)
            assert len(found.unique()) == k
            assert torch.equal(h.flatten()[found].sort().values, h.flatten().topk(k).values.flip(0))
    assert largest_of_rows(torch.tensor([[1.0, 3.0, 2.0], [6.0, 5.0, 4.0]]), 1).tolist() == [1, 3]


def test_sums_by_latent_and_by_token_are_the_dense_products():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(9, 7, generator=generator) * (torch.rand(9, 7, generator=generator) < 0.3)
    dense[2] = 0.0  # a token with none
    flat = dense.flatten().nonzero()[:, 0]
    on, weights = On.of(flat, (9, 7)), dense.flatten()[flat]
    rows, tokens = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator)
    torch.testing.assert_close(on.by_token(rows, weights), dense @ rows)
    torch.testing.assert_close(on.by_latent(tokens, weights), dense.T @ tokens)
