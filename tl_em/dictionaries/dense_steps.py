"""SAELens's JumpReLU and ReLU training SAEs, with steps that make no product and no mask twice.

    h = (x - b) W_enc + b_enc        a = h [h > t] (JumpReLU), max(h, 0) (ReLU)        x^ = a W_dec + b_dec
    JumpReLU    |x^ - x|^2 + c 2/n (L0 - n)^2,  L0 = number of h > t       gradients of [h > t]: 1/w where |h - t| < w/2
    ReLU        |x^ - x|^2 + c sum_j a_j |W_dec_j|

Latents near their threshold have gradients though they are off, and before training about half are on: so these steps
are dense, five products of tokens x d_sae x d_model.  SAELens's have a sixth, the gradient of ``x``, of which b_dec
wants the sum alone; and compute the window around the threshold once for the activation and once for L0.  Losses and
gradients are SAELens's, but for the rounding of sums in another order.

The control: a test trains both on the same batches from the same seed and compares losses and weights at every step.

Source: SAELens 6.54, ``JumpReLUTrainingSAE`` and ``StandardTrainingSAE``; Rajamanoharan et al. 2024, arXiv:2407.14435.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Encoding(torch.autograd.Function):
    """``x W_enc + b_enc``; of the tokens' gradient only the sum is asked for, that of the bias taken off them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, off: Tensor | None, W_enc: Tensor, b_enc: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, W_enc)
        ctx.shifted = off is not None
        return torch.addmm(b_enc, x, W_enc)

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc = ctx.saved_tensors
        of_b = by.sum(0)
        return None, -(W_enc @ of_b) if ctx.shifted else None, x.T @ by, of_b


class _Jump(torch.autograd.Function):
    """``h [h > t]`` and the number of ``h > t`` at each token, with gradients through a rectangle of width ``w``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        above = h > threshold
        ctx.save_for_backward(h, threshold, above)
        ctx.width = width
        return h * above, above.sum(-1, dtype=h.dtype)

    @staticmethod
    def backward(ctx: Any, by: Tensor, by_count: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, threshold, above = ctx.saved_tensors
        near = (h - threshold).div_(ctx.width).abs_().lt_(0.5)  # numbers 0 and 1, in the place of the differences
        of_count = by_count @ near
        of_value = near.mul_(by).sum(0)
        return above * by, -(threshold * of_value + of_count) / ctx.width, None


def dense_sae(config: Any, kind: Any) -> Any:
    """SAELens's training SAE for a configuration, with steps as at the head of this file where they are of that form.

    Args:
        config: SAELens's configuration.
        kind: its class of training SAEs.
    """
    from sae_lens.saes import JumpReLUTrainingSAE, StandardTrainingSAE  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepOutput  # pyright: ignore[reportMissingImports]

    def jumping(self: Any, h: Tensor, coefficients: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)
        acts, count = _Jump.apply(h, self.threshold.to(h.dtype), self.bandwidth)
        goal = self.cfg.target_l0
        return acts, {"l0_loss": (coefficients["l0"] * 2 / goal * (count - goal) ** 2).mean()}

    def rectified(self: Any, h: Tensor, coefficients: Any) -> tuple[Tensor, dict[str, Tensor]]:
        acts = h.relu()
        return acts, {"l1_loss": (coefficients["l1"] * (acts @ self.W_dec.norm(dim=1))).mean()}

    if kind is JumpReLUTrainingSAE:
        known = config.jumprelu_sparsity_loss_mode == "quadratic" and config.pre_act_loss_coefficient is None
        activate, known = jumping, known and not config.jumprelu_ste_to_input
    else:
        activate, known = rectified, kind is StandardTrainingSAE and config.lp_norm == 1
    base: Any = kind
    if not known or config.normalize_activations != "none":
        return base(config)

    class FiveProducts(base):
        def training_forward_pass(self, step_input: Any) -> Any:
            x = step_input.sae_in
            off = self.b_dec if self.cfg.apply_b_dec_to_input else None
            h = _Encoding.apply(x if off is None else x - off.detach(), off, self.W_enc, self.b_enc)
            acts, extra = activate(self, h, step_input.coefficients)
            written = torch.addmm(self.b_dec, acts, self.W_dec)
            loss = (written - x).pow(2).sum(-1).mean()
            return TrainStepOutput(x, written, acts, h, sum(extra.values(), loss), {"mse_loss": loss} | extra)

    return FiveProducts(config)
