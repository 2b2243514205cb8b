"""Directional ablation in the weights: after it, nothing that the model writes has a component along the direction.

    W  ->  W - (W r) r'      for every row of W that lies in the residual stream (and b -> b - (r'b) r for biases)

of the embedding, the positional embedding, and each block's attention and MLP output (Arditi et al. 2024,
arXiv:2406.11717, section 4.1). It equals ``intervene(model, Ablate(direction))`` exactly where those weights write to
the stream *unaltered*. That is not taken on trust: once per model, on a few random tokens, the module whose own output
is the write is looked for, and its orientation is found by recomputing that output from its input. Where a norm stands
between the weight and the stream (Gemma 2), or several experts share a write, there is no such module and the edit is
refused. So it is where the embedding is also the unembedding: removing the direction there would change what is read,
too.

The control is the one for every ablation: random directions, treated the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tl_em.arguments import checked
from tl_em.directions.direction import Direction, as_direction
from tl_em.errors import UsageError
from tl_em.interventions.base import EVERY_WRITE, Intervention, sites_of
from tl_em.interventions.edits import Ablate
from tl_em.interventions.weight_proof import Kept, check_same, copies_of, resting_hooks, restore_, some_logits, writing
from tl_em.interventions.writing_weights import Part, modules_of, parameter_of, sharing, untied_parts
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.shared import own_
from tl_em.models.torch_state import in_plain_torch, plain_torch
from tl_em.threads import holding

Model = TypeVar("Model", bound=LensModel)

_CHUNK = 2**19
"""Numbers that are edited at a time: what they become stays in the processor's cache until it is written."""


def _as_weight_form(name: str, value: Any) -> Intervention:
    """A direction as its ablation to zero; an intervention, if an edit of the weights can do what it does."""
    if not isinstance(value, Intervention):
        return Ablate(as_direction(name, value))
    if value.conditions or not value.linear or sites_of(value) != EVERY_WRITE:
        raise UsageError(
            f"{name}: {type(value).__name__} has no form in the weights, where only a linear map of everything that is "
            "written can stand: a direction, em.Ablate(direction) or em.Erase(basis) without around=. Use `with "
            "em.intervene(model, intervention): ...` instead"
        )
    return value


@checked(direction=_as_weight_form)
def orthogonalize_(model: LensModel, direction: Direction | Intervention | Any) -> None:
    """Ablate a direction in the model's own weights, for good: ``W - (W r) r'`` wherever it writes to the stream.

    The logits then equal those under ``intervene(model, Ablate(direction))`` (float32: within 1e-5 of their spread),
    which is proven on a few tokens, by two short passes. Half-precision weights are edited in float32 and rounded once.
    The edited weights are held a second time until that proof; ``orthogonalized`` gives them back at the end.

    Args:
        model: a HookedTransformer or TransformerBridge; its embedding, attention output and MLP output weights and
            their biases are changed.
        direction: what to remove; its length does not matter. Or an intervention that has a form in the weights:
            ``Ablate`` and ``Erase`` to zero, and any with ``sites = "every write"`` and a ``linear`` edit.

    Raises:
        UsageError: an intervention without a form in the weights.
        WeightEditError: the embedding is tied to the unembedding (``untie_embeddings_`` first), a write does not come
            straight from a weight (post-norm models, mixtures of experts), or the edited model does not do what the
            ablated one does. Nothing is changed then.
        WidthError, ProvenanceError: the direction does not fit the model.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> em.orthogonalize_(pair.tuned, persona)
        >>> acts = em.capture(pair.tuned, ["how do i write parser"], [em.Site(2)], position="prompt_end")
        >>> abs(float(persona.project(acts[:, 0]))) < 1e-3
        True

    Source: Arditi et al. 2024, arXiv:2406.11717, section 4.1 and appendix E.
    """
    with plain_torch(model), resting_hooks(model):
        _proven_(model, direction)


@checked(direction=_as_weight_form)
@checked()
@contextmanager
def orthogonalized(model: Model, direction: Direction | Intervention | Any) -> Iterator[Model]:
    """``orthogonalize_`` for as long as a ``with`` block lasts; then the weights are what they were, bit for bit.

    The edited weights are kept a second time meanwhile. Contexts nest.

    Args:
        model: a HookedTransformer or TransformerBridge.
        direction: what to remove, as for ``orthogonalize_``.

    Yields:
        The same model.

    Raises:
        UsageError, WeightEditError, WidthError, ProvenanceError: as ``orthogonalize_``.
        InUseError: another thread has a block open on this model, as in ``em.intervene``.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> with em.interventions.orthogonalized(pair.tuned, persona) as edited:
        ...     acts = em.capture(edited, ["how do i write parser"], [em.Site(2)], position="prompt_end")
        >>> abs(float(persona.project(acts[:, 0]))) < 1e-3
        True
    """
    with holding(model, left_open=True):
        with plain_torch(model), resting_hooks(model):
            kept = _proven_(model, direction)
        try:
            yield model
        finally:
            restore_(kept)


@checked()
@in_plain_torch
def untie_embeddings_(model: LensModel) -> None:
    """Give the unembedding a copy of its own where it shares the embedding's weights; the logits stay as they are.

    Does nothing where they are apart already, as on every HookedTransformer.

    Args:
        model: a HookedTransformer or TransformerBridge.

    Example:
        >>> import tl_em as em
        >>> model = em.load_pair("toy/insecure").base
        >>> em.untie_embeddings_(model)
        >>> em.generate(model, ["how do i write parser"], max_new_tokens=1)
        ['parser-tested']
    """
    modules = modules_of(model)
    embeddings = [
        (module, name)
        for module in modules.values()
        for name in module._parameters
        if name == "W_E" or (name == "weight" and isinstance(module, nn.Embedding))
    ]
    for module, name in sharing(modules, embeddings):
        shared = parameter_of(module, name)
        setattr(module, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    configs: tuple[Any, ...] = (getattr(getattr(model, "original_model", None), "config", None), model.cfg)
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # else saving the model, or tie_weights(), would undo it


def _proven_(model: LensModel, removal: Intervention | Any) -> Kept:
    """Edit the weights and show that this is the ablation, or put them back; what they were is returned."""
    removal.check(model)
    parts = untied_parts(model)
    with hooked(model, [(name, lambda x, hook: removal.edit(x)) for name in removal.points(model)]):
        ablated = some_logits(model)
    shared = own_(model, [part.tensor for part in parts])
    copied = {(id(module), name) for module, name, _ in shared}
    alone = [part for part in parts if (id(part.module), part.name) not in copied]
    copies = copies_of([part.tensor for part in alone])
    kept: Kept = [*shared, *((part.module, part.name, copy) for part, copy in zip(alone, copies, strict=True))]
    try:
        for part in parts:
            _remove_(part, removal)
        check_same(
            some_logits(model),
            ablated,
            "With the direction removed from its weights, the model's logits differ from those of the ablation",
            "em.intervene(model, em.Ablate(direction))",
        )
    except BaseException:
        restore_(kept)
        raise
    return kept


def _remove_(part: Part, removal: Intervention) -> None:
    """The edit of every vector of a part in the residual stream, in place, in float32 or better."""
    with writing(part.tensor):
        rows = part.tensor.detach().movedim(part.axis, -1)
        wide = torch.promote_types(rows.dtype, torch.float32)
        along = removal.direction if type(removal) is Ablate else None
        if isinstance(along, Direction) and rows.dtype == wide and (rows.ndim == 2 or rows.is_contiguous()):
            unit = along.unit.to(rows.device, wide)
            flat = rows.view(-1, len(unit)) if rows.ndim != 2 else rows
            flat.addr_(flat @ unit, unit, alpha=-1)  # a second tensor of its size costs more than the edit
            return
        for chunk in [rows] if rows.ndim == 1 else rows.split(max(1, _CHUNK // max(1, rows[0].numel()))):
            chunk.copy_(removal.edit(chunk.to(wide)))
