"""The weight and bias that stand between a block's second norm and its MLP, measured on the model itself.

    mlp_in = normalised * w + b

A dictionary of the normalised stream reads ``mlp_in`` after ``W_enc / w``; so it reads what it was trained on, on every
surface. Architectures store ``w`` differently (Gemma's is 1 + w), so on a Bridge it is taken from what the model does,
and the equation is checked on the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.errors import ModelError, UsageError
from tl_em.models.hooks import LensModel, find, read_point
from tl_em.models.residual_writes import tiny_forward
from tl_em.models.sites import Site

TOLERANCE = 1e-4
"""Of the equation, relative to the largest activation: float32 through a norm loses 1e-6."""


class Norm(NamedTuple):
    """Weight and bias of a norm, as they act."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]


def mlp_norm(model: LensModel, layer: int) -> Norm:
    """The norm in front of a block's MLP.

    Raises:
        UnknownHookError: no such block. ModelError: what the MLP reads is not the normalised stream times a weight.
        UsageError: a weight is 0, so that what was normalised cannot be told from what the MLP reads.
    """
    point = read_point(model, Site(layer, "mlp_in"))
    width = int(model.cfg.d_model)
    if find(model, Site(layer, "mlp_in").hook_name) is None:  # a HookedTransformer, which has its weights apart
        one, none = torch.ones(width), torch.zeros(width)
        found = Norm(*(d if given is None else given.detach().float().cpu()
                       for d, given in ((one, point.weight), (none, point.bias))))  # fmt: skip
    else:
        found = _measured(model, layer)
    if bool((found.weight == 0).any()):
        raise UsageError(
            f"the norm before the MLP of layer {layer} has weight 0 at {int((found.weight == 0).sum())} coordinates, "
            "so what was normalised is lost there; use a dictionary of the stream before the norm (resid_mid)"
        )
    return found


def _measured(model: LensModel, layer: int) -> Norm:
    names = [f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.mlp.hook_in"]
    seen = tiny_forward(model, names)
    x, y = (seen[name].flatten(0, -2).double().cpu() for name in names)
    weight = (x * y).sum(0) / x.square().sum(0).clamp_min(1e-30)
    bias = torch.zeros_like(weight)
    bound = TOLERANCE * float(y.abs().max())
    if float((x * weight - y).abs().max()) > bound:
        centred = x - x.mean(0)
        weight = (centred * y).sum(0) / centred.square().sum(0).clamp_min(1e-30)
        bias = y.mean(0) - weight * x.mean(0)
    gap = float((x * weight + bias - y).abs().max())
    if gap > bound:
        raise ModelError(
            f"In layer {layer} what the MLP reads is not the normalised stream times a weight (off by {gap:.1e}), so a "
            "dictionary of the one cannot be read at the other; load the model with surface='hooked'"
        )
    return Norm(weight.float(), bias.float())
