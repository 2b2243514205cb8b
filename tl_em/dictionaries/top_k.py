"""SAELens's top-k training SAEs with steps that touch the latents which are on, and no others.

    h = (x - b) W_enc + b_enc          every latent: which are on is not known before
    x^ = sum over the latents that are on of relu(h_j) W_dec_j + b_dec
    dL/dW_dec_j = sum over the tokens where j is on of relu(h_j) dL/dx^,      and so on

Of a latent that is off nothing is written, and its gradient is 0: of the six products of a dense step (tokens x d_sae x
d_model multiplications each) the first alone is left.  The auxiliary loss, too, is made of the dead latents alone.
Losses and gradients are SAELens's, but for the rounding of sums in another order.

The control: a test trains both on the same batches from the same seed and compares losses and weights at every step.

Source: SAELens 6.54, ``TopKTrainingSAE`` and ``BatchTopKTrainingSAE``; Gao et al. 2024, arXiv:2406.04093, appendix D.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries.dense_steps import dense_sae

_GUESS = 64
"""One in so many activations, from which the threshold of a batch is guessed."""


class On(NamedTuple):
    """Which latents are on at which tokens, by token, and in ``order`` by latent.

    Args:
        tokens, latents: of each pair; tokens ascend.
        starts: where a token's pairs begin.
        order: the pairs by latent.
        firsts: where a latent's pairs begin in that order.
    """

    tokens: Int[Tensor, " on"]
    latents: Int[Tensor, " on"]
    starts: Int[Tensor, " token"]
    order: Int[Tensor, " on"]
    firsts: Int[Tensor, " feature"]

    @classmethod
    def of(cls, flat: Int[Tensor, " on"], shape: tuple[int, int]) -> On:
        """From places in the flattened array [token latent], ascending.

        Example:
            >>> on = On.of(torch.tensor([1, 4, 5]), (2, 4))
            >>> on.tokens.tolist(), on.latents.tolist(), on.starts.tolist(), on.firsts.tolist()
            ([0, 1, 1], [1, 0, 1], [0, 1], [0, 1, 3, 3])
        """
        tokens, latents = flat // shape[1], flat % shape[1]
        return cls(tokens, latents, _starts(tokens, shape[0]), latents.argsort(stable=True), _starts(latents, shape[1]))

    def by_latent(
        self, rows: Float[Tensor, "token d_model"], weights: Float[Tensor, " on"]
    ) -> Float[Tensor, "feature d_model"]:
        """The rows of the tokens where a latent is on, weighted and summed."""
        tokens, weights = self.tokens[self.order], weights[self.order]
        return F.embedding_bag(tokens, rows, self.firsts, mode="sum", per_sample_weights=weights)

    def by_token(
        self, rows: Float[Tensor, "feature d_model"], weights: Float[Tensor, " on"]
    ) -> Float[Tensor, "token d_model"]:
        """The rows of the latents that are on at a token, weighted and summed."""
        return F.embedding_bag(self.latents, rows, self.starts, mode="sum", per_sample_weights=weights)


def _starts(at: Int[Tensor, " on"], n: int) -> Int[Tensor, " n"]:
    counts = torch.bincount(at, minlength=n)
    return counts.cumsum(0) - counts


def largest_of_rows(h: Float[Tensor, "token feature"], k: int) -> Int[Tensor, " on"]:
    """Places of the ``k`` largest of every row, in the flattened array."""
    found = h.topk(k, dim=-1, sorted=False).indices
    return (found + torch.arange(len(h), device=h.device)[:, None] * h.shape[1]).flatten()


def largest(h: Float[Tensor, "token feature"], k: int) -> Int[Tensor, " on"]:
    """Places of the ``k`` largest of all, in the flattened array: looked for among those above a guess.

    Example:
        >>> largest(torch.tensor([[1.0, 5.0], [4.0, 0.0]]), 2).tolist()
        [1, 2]
    """
    flat = h.flatten()
    some = flat[::_GUESS]
    guess = some.topk(min(len(some), 1 + 3 * k // (2 * _GUESS)), sorted=False).values.min()
    above = (flat > guess).nonzero()[:, 0]
    if len(above) < k:
        return flat.topk(k, sorted=False).indices
    return above[flat[above].topk(k, sorted=False).indices]


class _Encoded(torch.autograd.Function):
    """Values of the encoder that are known already, at the latents that are on (or at all); differentiated there alone.

    Of the tokens' gradient only the sum is asked for: it is that of the bias that was taken off them.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, off: Tensor | None, W_enc: Tensor, b_enc: Tensor, values: Tensor, on: On | None
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.on, ctx.shifted = on, off is not None
        return values.clone()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc = ctx.saved_tensors
        if ctx.on is None:
            of_W, of_b = x.T @ by, by.sum(0)
        else:
            of_W, of_b = ctx.on.by_latent(x, by).T, ctx.on.by_latent(x.new_ones(len(x), 1), by)[:, 0]
        return None, -(W_enc @ of_b) if ctx.shifted else None, of_W, of_b, None, None


class _Decoded(torch.autograd.Function):
    """Decoder rows of the latents that are on, weighted and summed by the token."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, on: On) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(values, W_dec)
        ctx.on = on
        return on.by_token(W_dec, values)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec = ctx.saved_tensors
        with torch.enable_grad():
            weights = values.detach().requires_grad_()
            of_values = torch.autograd.grad(ctx.on.by_token(W_dec.detach(), weights), weights, by)[0]
        return of_values, ctx.on.by_latent(by, values), None


def training_sae(config: Any, transcoder: bool) -> Any:
    """SAELens's training SAE for a configuration, with steps as at the head of this file where it is a top-k one.

    Of a transcoder, the second half of a sample is the target.
    """
    from sae_lens.saes import BatchTopKTrainingSAE, TopKTrainingSAE  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainingSAE, TrainStepOutput  # pyright: ignore[reportMissingImports]

    kind: Any = TrainingSAE.get_sae_class_for_architecture(config.architecture())
    if not issubclass(kind, TopKTrainingSAE):
        return dense_sae(config, kind)
    batchwise = issubclass(kind, BatchTopKTrainingSAE)

    class FewLatents(kind):
        def training_forward_pass(self, step_input: Any) -> Any:
            read, target = step_input.sae_in.chunk(2, dim=-1) if transcoder else [step_input.sae_in] * 2
            off = self.b_dec if self.cfg.apply_b_dec_to_input else None
            x, norm = read if off is None else read - off.detach(), self.W_dec.detach().norm(dim=-1)
            with torch.no_grad():
                h = torch.addmm(self.b_enc * norm, x, self.W_enc * norm)
                flat = largest(h, int(self.cfg.k * len(h))) if batchwise else largest_of_rows(h, self.cfg.k)
                flat = flat.sort().values
                on, most = On.of(flat, (h.shape[0], h.shape[1])), h.flatten()[flat]
            values = _Encoded.apply(x, off, self.W_enc, self.b_enc, most / norm[on.latents], on).relu()
            written = _Decoded.apply(values, self.W_dec, on) + self.b_dec
            loss = (written - target).pow(2).sum(-1).mean()
            dead = self.loss_of_dead(x, off, h, target - written.detach(), step_input.dead_neuron_mask)
            acts = torch.sparse_coo_tensor(
                torch.stack([on.tokens, on.latents]), most.relu(), h.shape, is_coalesced=True, check_invariants=False
            )
            if batchwise:
                cast("Any", self).update_topk_threshold(most.relu())
            losses = {"mse_loss": loss, "auxiliary_reconstruction_loss": dead}
            return TrainStepOutput(target, written, acts, h, loss + dead, losses)

        def loss_of_dead(self, x: Tensor, off: Tensor | None, h: Tensor, missed: Tensor, dead: Tensor | None) -> Tensor:
            """``calculate_topk_aux_loss``, of the dead latents alone."""
            latents = None if dead is None else dead.nonzero()[:, 0]
            if latents is None or not len(latents):
                return missed.new_tensor(0.0)
            most, h, W_dec = missed.shape[-1] // 2, h[:, latents], self.W_dec[latents]
            known = h / W_dec.detach().norm(dim=-1)
            values = _Encoded.apply(x, off, self.W_enc[:, latents], self.b_enc[latents], known, None)
            if len(latents) > most:
                top = h.topk(most, sorted=False).indices
                values = torch.zeros_like(values).scatter(-1, top, values.gather(-1, top))
            lost = (values @ W_dec - missed).pow(2).sum(-1).mean()
            return self.cfg.aux_loss_coefficient * min(len(latents) / most, 1.0) * lost

    return FewLatents(config)
