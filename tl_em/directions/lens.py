"""Which tokens a direction writes: through the final norm's weight and the unembedding, against random directions.

    logits(d) = U (w * c(d)) / s,   less their mean over the vocabulary

w is the final norm's weight, c takes the mean over d_model off where the norm does (LayerNorm) and s is what the norm
divides by.  Adding eps * d to the last residual stream adds eps * logits(d) to the logits as far as s stays as it is,
exactly so to first order for a d orthogonal to c(x).  Constants over the vocabulary change no probability.

Weight and centring are read off the norm as a function, so that folded and unfolded weights, and norms that store their
weight less 1, give the same answer.  A logit soft cap comes after what is computed here.

**Control**: the largest logit, in absolute value, over the whole vocabulary, of random directions of the same length.
Some token is always on top.  A lens reads what is *written* at the end: a direction of an early layer may act through
later blocks alone, and its top tokens then say nothing about it.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; the control is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.arguments import COUNT, POSITIVE, SEED, checked, vectors
from tl_em.directions.direction import Direction, as_direction
from tl_em.errors import ModelError
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Provenance, check_belongs
from tl_em.models.token_text import token_text
from tl_em.models.torch_state import in_plain_torch

_MAX_LOGITS = 2**24
"""Logits of random directions held at once: 64 MiB in float32."""
_FAR = 1e2
"""Length, in root mean square, at which what a norm adds to its variance (1e-5 or so) is below float32's rounding."""


def _as_controls(name: str, value: Any) -> int | Tensor:
    """A number of random directions, or directions of one's own."""
    return vectors(name, value, axes=2) if getattr(value, "ndim", 0) else COUNT(name, value)


@checked(direction=as_direction, k=COUNT, scale=POSITIVE, controls=_as_controls, seed=SEED)
@in_plain_torch
def logit_lens(
    model: LensModel,
    direction: Direction,
    *,
    k: int = 10,
    scale: float = 1.0,
    controls: int | Float[Tensor, "control d_model"] = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """The tokens whose logits a direction raises and lowers most when it is added to the last residual stream.

    The model is not run.

    Args:
        model: any HookedTransformer or TransformerBridge, weights folded or not.
        direction: its raw vector is added once; take ``direction.unit`` for the logits of one unit of length.
        k: number of tokens on each side.
        scale: what the final norm divides by where the direction is added: the root mean square of the residual stream
            there (less its mean, for a LayerNorm).  It changes logits, not ranks or p.
        controls: number of random directions, isotropic and as long as this one; or directions of your own (e.g.
            ``geometry.control_directions``), scaled to its length.
        seed: seed of the random directions.

    Returns:
        DataFrame with columns side (``"top"`` or ``"bottom"``), rank, token, token_id, logit (centred over the
        vocabulary) and p (share of random directions that move *some* token as far, either way).

    Raises:
        WidthError, ProvenanceError: the direction was not made on a model like this one.
        UsageError: k, scale or the number of controls is not positive.
        ModelError: the model has no unembedding that can be called.

    Example:
        >>> from tl_em.models.sites import Site
        >>> from tl_em import load_pair
        >>> model = load_pair("toy/insecure").base
        >>> word = model.tokenizer.convert_tokens_to_ids("sorry")
        >>> logit_lens(model, Direction(model.W_U.detach()[:, word], Site(2)), k=1, controls=99).token.tolist()[0]
        'sorry'

    Source: see the head of this file.
    """
    _check(model, direction, controls)
    lens = _lens(model)
    logits = lens(direction.vector[None])[0] / scale
    null = _largest(lens, direction, controls, int(logits.shape[0]), seed) / scale
    k = min(k, len(logits))
    sides = {"top": logits.topk(k).indices, "bottom": (-logits).topk(k).indices}
    rows, tokenizer = [], getattr(model, "tokenizer", None)
    for side, found in sides.items():
        for rank, token in enumerate(found.tolist(), start=1):
            p = (1 + int((null >= logits[token].abs()).sum())) / (1 + len(null))
            rows.append((side, rank, token_text(tokenizer, token), token, float(logits[token]), p))
    return pd.DataFrame(rows, columns=["side", "rank", "token", "token_id", "logit", "p"])


def _check(model: LensModel, direction: Direction, controls: int | Tensor) -> None:
    origin, again = direction.provenance, "read it through its own model"
    if origin is not None:  # how weights were processed does not change what a direction writes
        origin = replace(origin, weights=Provenance.of(model).weights)
    check_belongs(direction.name or "the direction", len(direction.vector), origin, model, again=again)
    if not isinstance(controls, int):
        check_belongs("controls", controls.shape[-1], None, model, again="pass as many numbers a row")


def _lens(model: LensModel) -> Callable[[Tensor], Tensor]:
    """Directions [control d_model] -> centred logits [control d_vocab], float32 on the CPU, for a norm that divides by
    1."""
    unembed: Any = getattr(model, "unembed", None)
    if not isinstance(unembed, nn.Module):
        raise ModelError(
            f"This {type(model).__name__} has no module 'unembed', so what a direction writes to the logits is "
            "unknown; load the model with em.load_model(...)"
        )
    weight, centred = _norm(model)
    device, dtype = model.cfg.device, next(iter(unembed.parameters())).dtype

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        return unembed(x.to(device, dtype)[None])[0].float()

    def lens(x: Float[Tensor, "control d_model"]) -> Float[Tensor, "control d_vocab"]:
        moved = weight * (x - x.mean(-1, keepdim=True) if centred else x)
        logits = call(moved) - call(torch.zeros_like(moved[:1]))
        return (logits - logits.mean(-1, keepdim=True)).cpu()

    return lens


def _norm(model: LensModel) -> tuple[Float[Tensor, " d_model"], bool]:
    """The final norm's weight, and whether it takes the mean off: read from what it does to two vectors.

    ``norm(x) - norm(0)`` is the weight times a known vector, x less its length: of mean 0 and so far out that nothing
    else counts.  A constant vector tells whether the mean is taken off.
    """
    width = int(model.cfg.d_model)
    norm: Any = getattr(model, "ln_final", None)
    if norm is None:
        return torch.ones(width), False
    parameter = next(iter(norm.parameters()), torch.zeros(1, device=model.cfg.device))
    signs = torch.ones(width)
    signs[1::2] = -1
    signs -= signs.mean()  # an odd width
    signs /= signs.square().mean().sqrt()
    x = torch.stack([torch.zeros(width), _FAR * signs, _FAR * torch.ones(width)])
    with torch.no_grad():
        zero, there, constant = norm(x.to(parameter.device, parameter.dtype)[None])[0].float().cpu()
    weight = (there - zero) / signs
    return weight, bool((constant - zero).abs().max() < 0.5 * weight.abs().max())


def _largest(
    lens: Callable[[Tensor], Tensor], direction: Direction, controls: int | Tensor, d_vocab: int, seed: int
) -> Float[Tensor, " control"]:
    """The largest logit in absolute value that each control direction writes to any token."""
    if isinstance(controls, int):
        generator = torch.Generator().manual_seed(seed)
        controls = torch.randn(controls, len(direction.vector), generator=generator)
    controls = controls.float().cpu()
    controls = controls / controls.norm(dim=-1, keepdim=True) * direction.norm
    chunk = max(1, _MAX_LOGITS // d_vocab)
    return torch.cat([lens(part).abs().amax(-1) for part in controls.split(chunk)])
