"""Interventions on a user's own model, for as long as a ``with`` block lasts.

Hooks are added at the model's own hook points and removed again: the model is never wrapped, subclassed or patched, and
hooks that were there before stay, in order, also after an exception.  Interventions compose in the order in which they are
given: at a hook point that two of them edit, the first one's output is the second one's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from tl_em.errors import UsageError
from tl_em.interventions.edits import Intervention
from tl_em.models.hooks import LensModel, hooked

Where = Literal["all"]
Model = TypeVar("Model", bound=LensModel)


@contextmanager
def intervene(model: Model, *interventions: Intervention | Any, where: Where = "all") -> Iterator[Model]:
    """Apply interventions to every forward pass inside the block: your own calls, ``em.generate``, any TL method.

    Args:
        model: any HookedTransformer or TransformerBridge.
        *interventions: applied in this order.
        where: the tokens that are edited; ``"all"``: prompt and answer alike.

    Yields:
        The same model.

    Raises:
        UnknownHookError: the model has no such hook point; nothing is attached then.
        HookNotFiredError: a full forward pass ran and an edit never happened.
        WidthError, ProvenanceError: a direction does not fit the model.
        UsageError: nothing to apply, or an unknown scope.
    """
    if not interventions:
        raise UsageError("intervene(model) without an intervention changes nothing; pass em.Ablate(direction) or another")
    for each in interventions:
        if not isinstance(each, Intervention):
            raise UsageError(
                f"{type(each).__name__} is not an intervention; wrap a direction in em.Ablate, em.Add or em.Clamp"
            )
    with hooked(model, [pair for each in interventions for pair in each.hooks(model, where)]):
        yield model
