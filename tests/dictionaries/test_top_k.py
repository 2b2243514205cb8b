"""Steps that touch the latents which are on give what SAELens's own steps give."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tl_em.dictionaries.descent import TrainingRun, trainer_of
from tl_em.dictionaries.top_k import On, largest, largest_of_rows, training_sae

STEPS, BATCH, WIDTH, D_SAE = 80, 128, 32, 256


def batches() -> list[torch.Tensor]:
    """Sparse sums of 64 directions, so that some latents are of use and others die; noise, so that none are equal."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(64, WIDTH, generator=generator)

    def noise() -> torch.Tensor:
        return 0.1 * torch.randn(BATCH, WIDTH, generator=generator)

    return [(torch.rand(BATCH, 64, generator=generator) < 0.05).float() @ basis + noise() for _ in range(STEPS)]


def saelens_own(config, transcoder: bool):
    """Its training SAE with its own steps."""
    from sae_lens.saes.sae import TrainingSAE

    return TrainingSAE.get_sae_class_for_architecture(config.architecture())(config)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("kind", ["TopKTrainingSAEConfig", "BatchTopKTrainingSAEConfig"])
def test_losses_and_weights_are_saelens_own_at_every_step(kind, shifted, dtype, tolerance, monkeypatch):
    saes = pytest.importorskip("sae_lens.saes")

    def config(steps: int):
        return getattr(saes, kind)(d_in=WIDTH, d_sae=D_SAE, k=4, dtype=dtype, apply_b_dec_to_input=shifted)

    run = TrainingRun(config, STEPS, BATCH, 1e-3, 0, transcoder=False)
    ours = trainer_of(run)
    monkeypatch.setattr("tl_em.dictionaries.descent.training_sae", saelens_own)
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("kind", ["JumpReLUTrainingSAEConfig", "StandardTrainingSAEConfig"])
def test_dense_steps_give_saelens_own_losses_and_weights(kind, shifted, dtype, tolerance, monkeypatch):
    saes = pytest.importorskip("sae_lens.saes")
    if kind.startswith("Jump"):
        tolerance = max(tolerance, 1e-6)  # SAELens keeps the threshold in float32
    options = {
        "JumpReLUTrainingSAEConfig": {
            "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0, "l0_warm_up_steps": 10,
            "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.5, "l0_coefficient": 0.1,
        },
        "StandardTrainingSAEConfig": {"l1_coefficient": 0.1, "l1_warm_up_steps": 10},
    }[kind]  # fmt: skip

    def config(steps: int):
        return getattr(saes, kind)(d_in=WIDTH, d_sae=D_SAE, dtype=dtype, apply_b_dec_to_input=shifted, **options)

    run = TrainingRun(config, STEPS, BATCH, 1e-3, 0, transcoder=False)
    ours = trainer_of(run)
    monkeypatch.setattr("tl_em.dictionaries.descent.training_sae", saelens_own)
    theirs = trainer_of(run)
    assert type(ours.sae).training_forward_pass is not type(theirs.sae).training_forward_pass
    losses, before = [], {name: each.clone() for name, each in theirs.sae.state_dict().items()}
    for batch in (each.to(getattr(torch, dtype)) for each in batches()):
        one, other = ours.step(batch), theirs.step(batch)
        losses.append(other.losses["mse_loss"].item())
        assert set(one.losses) == set(other.losses) and len(one.losses) == 2
        for each in other.losses:
            torch.testing.assert_close(one.losses[each], other.losses[each], atol=0.0, rtol=min(tolerance, 1e-5))
        for name, each in theirs.sae.state_dict().items():
            torch.testing.assert_close(ours.sae.state_dict()[name], each, atol=tolerance, rtol=tolerance)
        assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)
        torch.testing.assert_close(ours.act_freq_scores, theirs.act_freq_scores)
    assert losses[-1] < 0.95 * losses[0] and all(
        not torch.allclose(each, before[name], atol=1e-3) for name, each in theirs.sae.state_dict().items()
    )


class Products(TorchDispatchMode):
    """How many products of a batch's size are made, and tensors of numbers as large as a batch of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.tensors = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.products += a.numel() * b.shape[1] == BATCH * WIDTH * D_SAE
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.shape == (BATCH, D_SAE) and out.is_floating_point():
            self.tensors += out.untyped_storage().data_ptr() not in known
        return out


@pytest.mark.parametrize("kind", ["JumpReLUTrainingSAEConfig", "StandardTrainingSAEConfig"])
def test_a_dense_step_makes_five_products_of_saelens_six(kind, monkeypatch):
    saes = pytest.importorskip("sae_lens.saes")
    more = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0} if kind.startswith("Jump") else {}

    def counted() -> tuple[int, int]:
        config = getattr(saes, kind)(d_in=WIDTH, d_sae=D_SAE, apply_b_dec_to_input=True, **more)
        trainer = trainer_of(TrainingRun(lambda _: config, STEPS, BATCH, 1e-3, 0, transcoder=False))
        trainer.step(batches()[0])
        with Products() as made:
            trainer.step(batches()[1])
        return made.products, made.tensors

    ours = counted()
    monkeypatch.setattr("tl_em.dictionaries.descent.training_sae", saelens_own)
    theirs = counted()
    assert (ours[0], theirs[0]) == (5, 6)
    assert ours[1] <= 7 and theirs[1] >= 12


@pytest.mark.parametrize(
    "more",
    [{"jumprelu_sparsity_loss_mode": "step"}, {"jumprelu_ste_to_input": True}, {"pre_act_loss_coefficient": 1e-6}],
)
def test_a_step_of_another_form_stays_saelens_own(more):
    saes = pytest.importorskip("sae_lens.saes")
    options = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0} | more
    config = saes.JumpReLUTrainingSAEConfig(d_in=WIDTH, d_sae=D_SAE, **options)
    assert type(training_sae(config, transcoder=False)) is saes.JumpReLUTrainingSAE


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
