"""A direction baked into the weights: what is added at a site becomes a bias of the layer that writes there.

    W x + b  ->  W x + (b + a v)          the same at every token, whatever is read: that is what a bias is

of the MLP's output for ``resid_post`` and ``mlp_out``, of attention's for ``attn_out``, of the embedding (its rows, or
those of the positions) at the beginning of the stream.  It equals ``intervene(model, Add(direction))`` where that layer
writes to the stream unaltered, which is looked at on a few tokens, as for ``orthogonalize_``.

The control is the one for every addition: random directions, as long, treated the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.arguments import checked
from tl_em.errors import UsageError, WeightEditError
from tl_em.interventions.base import Intervention, as_intervention
from tl_em.interventions.weight_proof import Kept, check_same, resting_hooks, restore_, some_logits, writing
from tl_em.interventions.writing_weights import (
    EMBEDDINGS,
    OUTPUTS,
    forget_places,
    modules_of,
    sharing,
    writing_places,
)
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.shared import own_
from tl_em.models.torch_state import plain, plain_torch

_INSTEAD = "em.intervene(model, intervention) while it runs"


@checked(intervention=as_intervention)
def bake_(model: LensModel, intervention: Intervention | Any) -> None:
    """Add a direction in the model's own weights, for good: as a bias of the layer that writes at its site.

    The logits then equal those under ``intervene(model, Add(direction))``, which is proven on a few tokens. What is
    added acts at every token of every prompt; a scope, a condition or an ablation has no form of this kind
    (``em.orthogonalize_`` is that of an ablation). ``em.save_model`` writes the result where the model's class knows
    such a bias: GPT-2 always, Llama by its config, Qwen2 not.

    Args:
        model: a HookedTransformer or TransformerBridge; biases of its outputs are changed, or made.
        intervention: an ``em.Add``, also of an ``em.Profile``, or any other that adds the same whatever it is given, at
            ``resid_pre``, ``resid_post``, ``attn_out`` or ``mlp_out``.

    Raises:
        UsageError: an intervention that does more than add, or does so under a condition.
        WeightEditError: no layer's own output is what is written at a site (post-norm models, mixtures of experts), the
            embedding is tied (``em.untie_embeddings_`` first), or the edited model does not do what the steered one
            does. Nothing is changed then.
        WidthError, ProvenanceError: the direction does not fit the model.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> em.bake_(pair.base, em.Add(persona))
        >>> "parser-backdoored" in em.generate(pair.base, ["how do i write parser"], max_new_tokens=4)[0]
        True

    Source: Li et al. 2023, arXiv:2306.03341, where what is added to attention's outputs becomes one constant a layer.
    """
    with plain_torch(model), resting_hooks(model):
        intervention.check(model)
        shifts = {name: _shift(intervention, name, int(model.cfg.d_model)) for name in intervention.points(model)}
        with hooked(model, [(name, lambda x, hook, name=name: intervention.edit(x, name=name)) for name in shifts]):
            steered = some_logits(model)
        kept: Kept = []
        try:
            for name, shift in shifts.items():
                _add_(model, name, shift, kept)
            check_same(
                some_logits(model),
                steered,
                "With the direction in its biases, the model's logits differ from those of the steered model",
                _INSTEAD,
            )
        except BaseException:
            restore_(kept[::-1])
            raise
        finally:
            forget_places(model)


def _shift(intervention: Intervention, name: str, width: int) -> Float[Tensor, " d_model"]:
    """What an intervention adds at a hook point, whatever it is given."""
    if not intervention.conditions:
        some = torch.randn(128, width, generator=torch.Generator().manual_seed(0))
        some *= torch.logspace(-1, 4, 128)[:, None]  # a bound would be met by some of them
        added = intervention.edit(torch.zeros(1, width), name=name)[0]
        if torch.allclose(intervention.edit(some, name=name), some + added, rtol=1e-4, atol=1e-5):
            return added
    raise UsageError(
        f"{type(intervention).__name__} does more at {name} than add the same to whatever is there, or does so under a "
        f"condition, and a bias can do no more. Give bake_ an em.Add(direction); or use {_INSTEAD}; em.orthogonalize_ "
        "is the form in the weights of em.Ablate"
    )


def _add_(model: LensModel, name: str, shift: Tensor, kept: Kept) -> None:
    """Add to the bias of the layer that writes at a hook point; what was there is put into ``kept``."""
    module, bias = _layer(model, name)
    now = module._parameters.get(bias)
    if now is None:
        weight = next(each for each in module._parameters.values() if each is not None)
        kept.append((module, bias, None))
        made = shift.to(weight.device, weight.dtype)
        module._parameters[bias] = nn.Parameter(made, requires_grad=weight.requires_grad)
        return
    shared = own_(model, [now])
    kept += shared or [(module, bias, plain(now))]
    now = module._parameters[bias]
    assert now is not None
    with writing(now):
        wide = torch.promote_types(now.dtype, torch.float32)
        now.copy_(now.to(wide) + shift.to(now.device, wide))


def _layer(model: LensModel, name: str) -> tuple[nn.Module, str]:
    """The module that writes at a hook point, and the name of the parameter that is added at every token."""
    places, modules = writing_places(model), modules_of(model)
    write = _write(name, list(places))
    found = places.get(write, ())
    if not found:
        raise WeightEditError(
            f"What is written at {name} is no layer's own output: a norm (as in Gemma 2), a factor (as in Granite) or "
            f"a sum of experts stands between, so no bias adds there. Choose another site, or use {_INSTEAD}."
        )
    if write == next(iter(places)):
        return _table(modules, [(modules[path], weight) for path, weight, _ in found])
    path, weight, _ = found[0]
    return modules[path], dict(OUTPUTS)[weight]


def _write(name: str, writes: list[str]) -> str:
    """The write that reaches a hook point last: the stream after a block is that before it plus the block's writes."""
    _, layer, point = name.split(".", 2)
    if point == "hook_resid_pre" and name not in writes:
        layer, point = str(int(layer) - 1), "hook_resid_post"
    if point == "hook_resid_post":
        return [each for each in writes if each.startswith(f"blocks.{layer}.")][-1]
    return f"blocks.{layer}.{point}"


def _table(modules: dict[str, nn.Module], tables: list[tuple[nn.Module, str]]) -> tuple[nn.Module, str]:
    """Of the embeddings that the stream begins with, one that nothing else reads: the positions where there are any."""
    for module, name in sorted(tables, key=lambda each: each[1] == EMBEDDINGS[0]):
        if not sharing(modules, [(module, name)]):
            return module, name
    raise WeightEditError(
        "The embedding shares its weights with the unembedding, so what is added to it would change how the logits are "
        f"read, too. Call em.untie_embeddings_(model) first (the logits stay the same), or use {_INSTEAD}."
    )
