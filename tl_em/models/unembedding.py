"""What turns the end of the stream into logits, and the log-probabilities of some tokens without all logits at once.

    log p(y) = l_y - log sum_v exp l_v        l = x W_U + b_U, squeezed below the soft cap where there is one

The sum runs over one part of the vocabulary after the other, for all tokens together: every weight is read once, and no
more logits are held than a part has.  Where a hook waits in the unembedding, its module is called, a few tokens at a
time.  That either is what the model does is looked at each time, on one token whose logits the model itself gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_em.models.hooks import LensModel

_PART, _FEWEST = 2**20, 256
"""Logits of a part of the vocabulary, which stay in a processor's cache, and of how many words at least."""
_HELD = 2**23
"""Logits held at once where the module is called: 32 MiB in float32."""
_PLAIN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""False: more happens to the logits of this model after the unembedding than a soft cap."""


def unembedding_of(model: LensModel) -> nn.Module | None:
    """The module that makes the logits, where the model has one."""
    module = getattr(model, "unembed", None)
    return module if isinstance(module, nn.Module) else None


def soft_cap(model: LensModel) -> float | None:
    """What the logits are squeezed below after the unembedding; None where they are not."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    found = getattr(config, "final_logit_softcapping", None) or getattr(model.cfg, "output_logits_soft_cap", None)
    return float(found) if found and found > 0 else None


def ends_plainly(model: LensModel) -> bool:
    """Whether logits come from a module, and nothing but a soft cap is known to follow it."""
    return unembedding_of(model) is not None and _PLAIN.get(model, True)


@torch.no_grad()
def logprobs_at_end(
    model: LensModel,
    x: Float[Tensor, "token d_model"],
    following: Int[Tensor, " token"],
    shown: Float[Tensor, " d_vocab"],
    *,
    narrowing: Callable[..., Any] | None = None,
) -> Float[Tensor, " token"] | None:
    """Log-probabilities of the tokens that follow, from what enters the unembedding.

    Args:
        model: whose logits end plainly.
        x: what enters the unembedding at each token.
        following: the token after each.
        shown: the logits of the first token, as the model gave them in a pass.
        narrowing: the caller's own hook at the unembedding, which changes nothing here.

    Returns:
        Float32 on the CPU; None where the first token's logits are others than ``shown``: then this model's logits are
        known not to end plainly.
    """
    ways: list[Callable[..., Tensor | None]] = [_by_tokens]
    if _is_bare(model, x, narrowing):
        ways.insert(0, _by_vocabulary)
    for way in ways:
        if (found := way(model, x, following, shown)) is not None:
            return found
    _PLAIN[model] = False
    return None


def logprobs_of(logits: Float[Tensor, "token d_vocab"], following: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Log-probabilities of the tokens that follow, from all logits; float32 on the CPU."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(-1, following.to(logprobs.device)[:, None])[:, 0].cpu()


def _by_vocabulary(model: Any, x: Tensor, following: Tensor, shown: Tensor) -> Tensor | None:
    """A part of the vocabulary after the other; None where the first token's logits are not the model's."""
    weight, bias, cap = model.unembed.W_U, getattr(model.unembed, "b_U", None), soft_cap(model)
    wanted, size = following.to(x.device), max(_FEWEST, _PART // len(x))
    top = torch.full((len(x),), torch.finfo(torch.float32).min, device=x.device)
    total, own, first = torch.zeros_like(top), torch.zeros_like(top), list[Tensor]()
    for at in range(0, weight.shape[1], size):
        logits = x @ weight[:, at : at + size]
        if bias is not None:
            logits += bias[at : at + size]
        logits = _squeezed(logits, cap).float()
        first.append(logits[0].clone())
        inside = ((wanted >= at) & (wanted < at + size)).nonzero()[:, 0]
        own[inside] = logits[inside, wanted[inside] - at]
        higher = torch.maximum(top, logits.amax(-1))
        total = total * (top - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(-1)
        top = higher
    return (own - top - total.log()).cpu() if _agree(torch.cat(first), shown) else None


def _by_tokens(model: Any, x: Tensor, following: Tensor, shown: Tensor) -> Tensor | None:
    """A few tokens after the other, through the module and its hooks."""
    size, found, cap = max(1, _HELD // int(model.cfg.d_vocab)), list[Tensor](), soft_cap(model)
    for at in range(0, len(x), size):
        logits = _squeezed(model.unembed(x[None, at : at + size])[0], cap)
        if at == 0 and not _agree(logits[0], shown):
            return None
        found.append(logprobs_of(logits, following[at : at + size]))
    return torch.cat(found)


def _squeezed(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _is_bare(model: Any, x: Tensor, narrowing: Callable[..., Any] | None) -> bool:
    """Whether the unembedding is a product with weights that lie where the stream does, and no hook waits in it."""
    try:
        weight = model.unembed.W_U
    except (AttributeError, AssertionError, RuntimeError):  # as a Bridge says that the module has no one matrix
        return False
    if not isinstance(weight, Tensor) or (weight.dtype, weight.device) != (x.dtype, x.device) or weight.ndim != 2:
        return False
    modules = list(model.unembed.modules())
    hooks = [hook for each in modules for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())]
    return all(hook == narrowing for hook in hooks) and not any("forward" in vars(each) for each in modules)


def _agree(one: Float[Tensor, " d_vocab"], other: Float[Tensor, " d_vocab"]) -> bool:
    """Whether two ways to the same logits differ by rounding alone; where they are not finite, nothing is known."""
    if one.shape != other.shape:
        return False
    bound = 1e-3 if other.dtype == torch.float32 else 0.1
    gap = float((one.float() - other.float()).abs().max() / other.float().std())
    return not gap > bound
