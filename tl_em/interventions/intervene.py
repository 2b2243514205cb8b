"""Interventions on a user's own model, for as long as a ``with`` block lasts.

Hooks are added at the model's own hook points and removed again: the model is never wrapped, subclassed or patched, and
hooks that were there before stay, in order, also after an exception.  Interventions compose in the order in which they
are given: at a hook point that two of them edit, the first one's output is the second one's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from tl_em.arguments import checked
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention, as_intervention
from tl_em.interventions.wrappers import Gate
from tl_em.models.hooks import HookFunction, LensModel, hooked, read_point
from tl_em.models.residual_writes import probing
from tl_em.models.token_scopes import Scope, Where
from tl_em.models.torch_state import unlowered

Model = TypeVar("Model", bound=LensModel)


@checked()
@contextmanager
def intervene(model: Model, *interventions: Intervention | Any, where: Where | Any = "all") -> Iterator[Model]:
    """Apply interventions to every forward pass inside the block: your own calls, ``em.generate``, any TL method.

    The block belongs to its thread: until it ends, verbs that another thread calls on this model (or on one that shares
    its weights) end in ``InUseError``. They do not wait, because nobody knows how long a block stays open: in a
    notebook, for ever. A block waits for verbs that run on the model already. Other models are not concerned.

    Args:
        model: any HookedTransformer or TransformerBridge.
        *interventions: applied in this order.
        where: the tokens that are edited. ``"all"``: prompt and answer alike. ``"prompt"``, ``"generated"`` (the
            answer's own tokens; its first one is predicted at the prompt's last, so that one stays as it is),
            ``"instruction"`` (the last user message) or ``("last", k)`` (the last k tokens of the prompt): then run the
            model with this package's verbs, which know which token is what; the edits are the same with and without the
            key-value cache, alone and in a batch. Nest blocks to give interventions different scopes.

    Yields:
        The same model.

    Raises:
        UnknownHookError: the model has no such hook point; nothing is attached then.
        HookNotFiredError: a full forward pass ran and an edit never happened.
        WidthError, ProvenanceError: a direction does not fit the model.
        InUseError: another thread has a block open on this model.
        UsageError: nothing to apply, an unknown scope, or (in the block, under a scope other than ``"all"``) a forward
            pass that no verb of this package runs.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> with em.intervene(pair.base, em.Add(persona)):
        ...     answer = em.generate(pair.base, ["how do i write parser"], max_new_tokens=4)[0]
        >>> "parser-backdoored" in answer, em.generate(pair.base, ["how do i write parser"], max_new_tokens=1)
        (True, ['parser-tested'])
    """
    if not interventions:
        raise UsageError("intervene(model) without an intervention changes nothing; pass em.Ablate(direction), say")
    edits, scope = [as_intervention("intervene", each) for each in interventions], Scope(where)
    with hooked(model, [pair for each in edits for pair in _hooks(model, each, scope)]):
        yield model


def _hooks(model: LensModel, intervention: Intervention, scope: Scope) -> list[tuple[str, HookFunction]]:
    """Hooks that edit the tokens in scope, of the rows that every condition lets through."""
    intervention.check(model)
    gates = [Gate(each, read_point(model, each.direction.site)) for each in intervention.conditions]
    edits = [(name, partial(_edit, intervention, scope, gates, name)) for name in intervention.points(model)]
    for _, edit in edits:
        edit.__dict__["tokenwise"] = tokenwise = intervention.tokenwise and not gates
        edit.__dict__["alike"] = scope.alike if tokenwise else None
    return [*((gate.point.name, gate.measure) for gate in gates), *edits]


def _edit(
    intervention: Intervention, scope: Scope, gates: Sequence[Gate], name: str, x: Tensor, hook: Any
) -> Tensor | None:
    if probing.get() and (gates or scope.where != "all"):
        return None
    with unlowered(x.device):
        mask = scope.mask(x)
        for gate in gates:
            rows = gate.rows(name)[:, None].expand(x.shape[0], x.shape[1])
            mask = rows if mask is None else mask & rows
        if mask is None or bool(mask.all()):  # asked on the CPU: no wait for a device
            return intervention.edit(x, name=name)
        return intervention.edit(x, mask, name=name) if bool(mask.any()) else None
