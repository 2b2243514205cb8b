"""A model made linear by hooks: what is held fixed in a backward pass, and where the stream is cut or tapped.

    norm      y = w (x - mean) / s + b     s detached            attention  z = A v      A (the pattern) detached
    MLP       frozen: its output is a constant (exact graphs)    relp: act(x) = x * (act(x) / x), the ratio detached,
                                                                 and a product of gates gives each factor one half

With norm scales, patterns and MLP outputs held fixed the residual stream is exactly linear in what is written to it, so
that a gradient times a write *is* an effect. Nothing is subclassed and the forward values do not change.

A *cut* replaces a tensor by a leaf of equal value: gradients stop there, and the leaf's gradient is the direct effect
of what is written at that point. A *tap* adds a leaf of zeros: gradients pass, and the leaf's is the total effect.

The control: the same effect by intervention with everything frozen at its recorded value (``tests/graph``).

Source: Ameisen et al. 2025, "Circuit Tracing" (transformer-circuits.pub/2025/attribution-graphs); RelP: Jafari et al.
2025, arXiv:2508.21258; secant rules: Achtibat et al. 2024, arXiv:2402.05602.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel, hook_points, hooked

Rule = Literal["relp", "frozen", "plain", "ig"]
RULES: tuple[Rule, ...] = ("relp", "frozen", "plain", "ig")
STREAM = "blocks.0.hook_resid_pre"
LAST = "unembed.hook_in"


@dataclass(eq=False)
class Linearised:
    """One forward pass, kept for gradients.

    Args:
        leaves: of cuts and taps, by hook point.
        read: what ran into each point, in the graph of the pass.
        logits: [pos d_vocab] of the pass, detached.
    """

    leaves: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def value(self, name: str) -> Float[Tensor, "pos width"]:
        """What was read at a point, as one vector a position."""
        return self.read[name].detach()[0].flatten(1)


Keep = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]


def linearise(
    model: LensModel,
    tokens: Int[Tensor, " pos"],
    *,
    cuts: Sequence[str] = (),
    taps: Sequence[str] = (),
    reads: Sequence[str] = (),
    rule: Rule = "frozen",
    keep: Keep | None = None,
    start: Float[Tensor, "pos d_model"] | None = None,
) -> Linearised:
    """Run the tokens once under a rule.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        tokens: [pos].
        cuts: hook points at which gradients stop; taps: points through which they pass; reads: points to read.
        rule: what is held fixed.
        keep: for a cut, what of the value stays connected to what was read before it (a skip connection).
        start: in place of the residual stream's first value.

    Raises:
        UsageError: an unknown rule. UnknownHookError, HookNotFiredError: the model lacks a point.
    """
    if rule not in RULES:
        raise UsageError(f"rule={rule!r}; there are {', '.join(RULES)}")
    made = Linearised()
    at = partial(_at, made, set(cuts), set(taps), keep or {}, start)
    names = list(dict.fromkeys((*cuts, *taps, *reads)))
    hooks: list[tuple[str, Any]] = [(name, at(name)) for name in names]
    with torch.enable_grad(), warnings.catch_warnings(), hooked(model, [*holding(model, rule), *hooks]):
        # A Bridge says that a norm whose scale a hook gives back is computed step by step, which is what is wanted.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        made.logits = model(tokens[None].to(model.cfg.device)).detach()[0]
    return made


def _at(
    made: Linearised, cuts: set[str], taps: set[str], keep: Keep, start: Tensor | None, name: str
) -> Callable[[Tensor, Any], Tensor | None]:
    def hook(x: Tensor, hook: Any) -> Tensor | None:
        if name == STREAM and start is not None:
            x = start[None].to(x)
        made.read[name] = x
        if name in cuts:
            made.leaves[name] = leaf = x.detach().clone().requires_grad_()
            if name not in keep:
                return leaf
            kept = keep[name](made.read)
            return leaf + kept - kept.detach()
        if name in taps:
            made.leaves[name] = leaf = torch.zeros_like(x, requires_grad=True)
            return x + leaf
        return x if start is not None and name == STREAM else None

    return hook


# --- What is held fixed -----------------------------------------------------------------------------------------------


def holding(model: LensModel, rule: Rule) -> list[tuple[str, Callable[[Tensor, Any], Tensor | None]]]:
    """The hooks of a rule: values stay, gradients change."""
    if rule in ("plain", "ig"):
        return []
    hooks: list[tuple[str, Any]] = [(name, _detached) for name in (*norm_scales(model), *patterns(model))]
    if rule == "relp":
        for layer in range(int(model.cfg.n_layers)):
            hooks += _secant(model, layer)
    return hooks


def _detached(x: Tensor, hook: Any) -> Tensor:
    return x.detach()


def norm_scales(model: LensModel) -> list[str]:
    """What the norms of the blocks, and the last one, divide by."""
    points = hook_points(model)
    norms = ("ln1", "ln1_post", "ln2", "ln2_post")
    layers = range(int(model.cfg.n_layers))
    wanted = [f"blocks.{layer}.{norm}.hook_scale" for layer in layers for norm in norms] + ["ln_final.hook_scale"]
    return [name for name in wanted if name in points]


def patterns(model: LensModel) -> list[str]:
    """The attention patterns."""
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]


def _secant(model: LensModel, layer: int) -> list[tuple[str, Callable[[Tensor, Any], Tensor | None]]]:
    """``act(x) = x * ratio`` with the ratio detached; with a gate, half of the product's change to each factor."""
    head = f"blocks.{layer}.mlp."
    gated = head + "hook_pre_linear" in hook_points(model)
    seen: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, hook: Any) -> None:
        seen[name] = x

    def post(x: Tensor, hook: Any) -> Tensor:
        pre = seen["hook_pre"].view(x.shape)
        if not gated:
            return pre * _ratio(x.detach(), pre.detach())
        other = seen["hook_pre_linear"].view(x.shape)
        ratio = _ratio(x.detach(), (pre * other).detach())
        return ratio * (0.5 * pre * other.detach() + 0.5 * pre.detach() * other)

    notes = ["hook_pre", "hook_pre_linear"] if gated else ["hook_pre"]
    return [*((head + name, partial(note, name)) for name in notes), (head + "hook_post", post)]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))
