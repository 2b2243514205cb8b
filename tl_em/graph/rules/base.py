"""A rule of attribution: which gradients stand for an effect, and along which path of values they are averaged.

    total[s] = g . (clean_s - reference_s)        g: the gradient under the rule's hooks, the mean over its steps

A rule's hooks leave every value as it is and change what a gradient passes (``x.detach()``, ``x * ratio.detach()``).
The control is in every graph: exact ablation of the same nodes (``validation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.models.hooks import HookFunction, LensModel

CLOSE = 1e-4
"""Of the largest value: what arithmetic in another order may change, and more than it ever did."""


class Rule:
    """What an attribution holds fixed: derive from it, give it a name and hooks, and pass a value as ``rule=``.

    Attributes:
        name: in the graph's settings.
        graphs: what it may be used for: ``"components"``, ``"SAEs"``, ``"transcoders"`` (whose edges are exact only
            where norm scales and attention patterns are held).
        held: what it holds fixed, in words.

    Example:
        >>> class NoPatterns(Rule):
        ...     name = "no patterns"
        ...     def hooks(self, model):
        ...         layers = range(model.cfg.n_layers)
        ...         return [(f"blocks.{i}.attn.hook_pattern", lambda x, hook: x.detach()) for i in layers]
        >>> NoPatterns().name, NoPatterns().graphs
        ('no patterns', ('components', 'SAEs'))

    Source: of the rules that are shipped, see ``graph/rules``.
    """

    name: str = ""
    graphs: tuple[str, ...] = ("components", "SAEs")
    held: str = "what the rule holds"

    def hooks(self, model: LensModel) -> list[tuple[str, HookFunction]]:
        """Pairs of a hook point's name and ``(x, hook) -> Tensor | None``: values stay, gradients change.

        Args:
            model: a HookedTransformer or TransformerBridge.

        Returns:
            none by default: plain gradients.

        Example:
            >>> from tl_em import load_pair
            >>> Rule().hooks(load_pair("toy/insecure").base)
            []
        """
        return []

    def steps(self, start: Tensor, end: Tensor) -> Sequence[Tensor]:
        """Values of the first residual stream at which gradients are taken; their mean is the attribution.

        Args:
            start: [pos d_model], of the reference; end: [pos d_model], of the prompt.

        Returns:
            tensors like ``end``; by default the prompt's own alone.

        Example:
            >>> [x.tolist() for x in Rule().steps(torch.zeros(1, 2), torch.ones(1, 2))]
            [[[1.0, 1.0]]]
        """
        return (end,)


if TYPE_CHECKING:
    AnyRule = Rule | str
else:  # what is neither reaches ``as_rule``, and not a type checker's own error
    AnyRule = Any


def hooks_of(rule: Rule, model: LensModel) -> list[tuple[str, HookFunction]]:
    """The rule's hooks, each of which raises where it would change a value.

    Raises:
        UsageError: no pairs of a name and a function; when the model runs, a hook that changes what it is given.
    """
    found: list[tuple[str, HookFunction]] = []
    for each in rule.hooks(model):
        if not (isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str) and callable(each[1])):
            raise UsageError(
                f"hooks() of the rule {rule.name!r} gave {each!r:.60}, so nothing can be hooked; return a list of "
                "pairs (hook point's name, function), e.g. [('blocks.0.attn.hook_pattern', lambda x, hook: x.detach())]"
            )
        found.append((each[0], partial(_kept, rule, each[0], each[1])))
    return found


def _kept(rule: Rule, name: str, function: Callable[..., Any], x: Tensor, hook: Any) -> Tensor | None:
    after = function(x, hook)
    if after is None or after is x:
        return after
    fits = isinstance(after, Tensor) and after.shape == x.shape and after.dtype == x.dtype
    if fits and after.data_ptr() == x.data_ptr():  # detached
        return after
    given = x.detach()
    bound = CLOSE * float(given.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if not fits or not torch.allclose(after.detach(), given, rtol=0.0, atol=bound, equal_nan=True):
        seen = "other values" if fits else f"{tuple(getattr(after, 'shape', ())) or type(after).__name__}"
        raise UsageError(
            f"the rule {rule.name!r} gives {seen} for {tuple(x.shape)} at {name}, so its graph would be of another "
            "model; a rule changes gradients only: return x.detach(), or x with a part of it detached"
        )
    return after


def points_of(rule: Rule, start: Tensor, end: Tensor) -> list[Tensor | None]:
    """The rule's steps; None for the prompt's own values, which need no replacing.

    Raises:
        UsageError: no step, or one that is not like the stream.
    """
    given = rule.steps(start, end)
    steps = list(given) if isinstance(given, Sequence | Tensor) else [given]
    shaped = [isinstance(each, Tensor) and each.shape == end.shape and bool(each.isfinite().all()) for each in steps]
    if not steps or not all(shaped):
        raise UsageError(
            f"steps of the rule {rule.name!r} gave {len(steps)} values, {sum(shaped)} of them finite and of shape "
            f"{tuple(end.shape)}, so there is no path to average over; return values between start and end, or [end]"
        )
    return [None if each is end else each for each in steps]
