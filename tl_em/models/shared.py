"""One copy of the weights for several models: a base, and fine-tunes of it that change few of them.

    base    x W'         tuned    x W' + (x A') B'         W: one tensor in memory; A and B: the tuned model's own

Each is a model like any other, with hook points, hooks and activations of its own: to toggle is to use the other one.
What a fine-tune does not change lies in the same memory in both. So an edit of one would reach the others: every
function of this package that edits weights first gives the model a copy of what it edits (``own_``), and so does
loading a state dict. Weights that are edited by hand, in place, change in all of them: load those with ``share=False``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.errors import UsageError
from tl_em.threads import hold_together

LOW_RANK = "lora_B"
"""Of an adapted layer, the parameter through which its low-rank change reaches what the layer writes, [out, rank]."""

# --- A low-rank change beside its matrix ------------------------------------------------------------------------------


class AdaptedLinear:
    """A linear layer with a low-rank change beside its matrix, which other models may hold as well.

    ``weight`` is ``W + B A``, computed where it is read; in ``_parameters`` stands W, which is shared. Whoever sets
    ``weight``, or loads a state dict, sets all of it: from then on it is the plain layer that it was made of.
    """

    in_out = False
    """Whether W is [in, out] (``Conv1D``) and not [out, in] (``Linear``)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias: nn.Parameter | None
    _parameters: dict[str, nn.Parameter | None]

    @property
    def weight(self) -> nn.Parameter:
        """The whole matrix, in a tensor of its own: to write into it changes nothing."""
        stored = self._parameters["weight"]
        assert stored is not None
        wide = torch.promote_types(stored.dtype, torch.float32)
        with torch.no_grad():
            change = self.lora_B.to(wide) @ self.lora_A.to(wide)
            whole = stored.to(wide) + (change.T if self.in_out else change)
        return nn.Parameter(whole.to(stored.dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        stored = self._parameters["weight"]
        assert stored is not None
        out = F.linear(x, stored.T if self.in_out else stored, self.bias)
        low = F.linear(x, self.lora_A)
        if low.dtype != self.lora_B.dtype or not out.is_contiguous():  # autocast
            return out + F.linear(low, self.lora_B)
        # into the product itself: a second tensor of its size would cost as much as the low rank saves
        out.view(-1, out.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), self.lora_B.T)
        return out

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            del self.lora_A, self.lora_B
            self.__class__ = type(self).__mro__[2]
        nn.Module.register_parameter(self, name, param)  # pyright: ignore[reportArgumentType]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # pyright: ignore[reportArgumentType]
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.data
        for name in ("lora_A", "lora_B"):
            del destination[prefix + name]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.register_parameter("weight", self.weight)
        self._load_from_state_dict(*args)


@cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """Of the same name: TransformerLens tells layouts by class, and one of them by its name."""
    return type(kind.__name__, (AdaptedLinear, kind), {"in_out": kind is not nn.Linear})


def put_beside_(layer: nn.Module, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> nn.Module:
    """Let a layer (``nn.Linear`` or transformers' ``Conv1D``) add a low-rank change to what it computes."""
    stored = layer._parameters["weight"]
    assert stored is not None
    for name, tensor in {"lora_A": A, "lora_B": B}.items():
        own = tensor.detach().to(stored.device, stored.dtype).clone()
        layer.register_parameter(name, nn.Parameter(own, requires_grad=False))
    layer.__class__ = _adapted(type(layer))
    return layer


# --- What a further model on the same weights is made of --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Structure:
    """A Hugging Face model as it was before a Bridge was built around it, on the meta device, and its tokenizer."""

    hf_model: nn.Module
    weights: tuple[tuple[nn.Parameter, ReferenceType[nn.Parameter]], ...]
    tokenizer: Any


_STRUCTURES: WeakKeyDictionary[Any, _Structure] = WeakKeyDictionary()
_SHARING: WeakSet[Any] = WeakSet()


def structure(hf_model: nn.Module, tokenizer: Any) -> _Structure:
    """Taken before a Bridge rewires the model; it holds no weights, and keeps none alive."""
    pairs = [(p, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)) for p in hf_model.parameters()]
    copied = copy.deepcopy(hf_model, {id(p): empty for p, empty in pairs})
    return _Structure(copied, tuple((empty, ref(p)) for p, empty in pairs), tokenizer)


def keep_structure(model: Any, found: _Structure) -> None:
    """Remember what a Bridge was built around."""
    _STRUCTURES[model] = found


def can_share(model: Any) -> bool:
    """Whether another model can be built on the weights of this one."""
    return model in _STRUCTURES


def on_same_weights(model: Any) -> tuple[nn.Module, Any]:
    """A Hugging Face model on the weights that a Bridge has now, and the tokenizer that it was loaded with.

    Raises:
        UsageError: the Bridge has other weights than those that it was loaded with.
    """
    kept = _STRUCTURES[model]
    own, weights = {id(p) for *_, p in _parameters(model)}, [(stand_in, alive()) for stand_in, alive in kept.weights]
    if any(weight is None or id(weight) not in own for _, weight in weights):
        raise UsageError(
            "The base has other weights than those that it was loaded with (an edit of its weights, or compatibility "
            "mode, replaced some), so an adapter on it would be another fine-tune than the one that was trained. Load "
            "the pair anew: em.load_pair(base_directory, adapter)."
        )
    return copy.deepcopy(kept.hf_model, {id(empty): _alias(weight) for empty, weight in weights}), kept.tokenizer


def _alias(weight: Any) -> nn.Parameter:
    """A parameter of its own, with its own flags, in the same memory."""
    return nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def share_equal_(model: Any, base: Any) -> None:
    """Let the parameters of ``model`` that are equal to the base's lie where those lie."""
    theirs, same = dict(base.named_parameters()), dict[int, nn.Parameter]()
    for name, weight in model.named_parameters():
        other = theirs.get(name)
        if other is not None and _alike(weight, other) and torch.equal(weight, other):
            same[id(weight)] = _alias(other)
    for module, name, weight in _parameters(model):
        module._parameters[name] = same.get(id(weight), weight)
    now_sharing(model, base)


# --- Copies on write --------------------------------------------------------------------------------------------------

Replaced = list[tuple[nn.Module, str, nn.Parameter]]
"""Parameters that a model had, and where."""


def now_sharing(*models: Any) -> None:
    """Remember that these models have weights in common, and let each take copies before it loads a state dict."""
    hold_together(*models)
    for model in set(models) - set(_SHARING):
        _SHARING.add(model)
        for whole in _wholes(model):
            whole.register_load_state_dict_pre_hook(lambda module, *_: own_(_model_of(module)))


def _model_of(whole: nn.Module) -> Any:
    """None for a copy of a model, whose weights are copies."""
    return next((model for model in _SHARING if any(whole is each for each in _wholes(model))), None)


def own_(model: Any, weights: Iterable[Tensor] | None = None) -> Replaced:
    """Give a model copies of its own of weights that lie in another model's memory, before they are edited in place.

    Args:
        model: any; nothing happens to one that shares none.
        weights: of its parameters, those that will be edited; all by default.

    Returns:
        What it had in their place.
    """
    if model is None or model not in _SHARING:
        return []
    theirs = {address(p) for other in _SHARING if other is not model for *_, p in _parameters(other)}
    wanted = theirs if weights is None else theirs & {address(p) for p in weights}
    replaced = [(module, name, p) for module, name, p in _parameters(model) if address(p) in wanted]
    copies: dict[int, nn.Parameter] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for module, name, p in replaced:
        if id(p) not in copies:  # parts of one tensor (a joint qkv) stay parts of one
            storage = storages.setdefault(address(p), p.untyped_storage().clone())
            own = torch.empty(0, dtype=p.dtype, device=p.device).set_(storage, p.storage_offset(), p.shape, p.stride())
            copies[id(p)] = nn.Parameter(own, requires_grad=p.requires_grad)
        module._parameters[name] = copies[id(p)]
    return replaced


def address(weight: Tensor) -> int:
    """Where a tensor lies."""
    return weight.untyped_storage().data_ptr()


def _wholes(model: Any) -> list[nn.Module]:
    """A Bridge holds the model that it was built around where ``modules()`` does not look."""
    inner = getattr(model, "original_model", None)
    return [model, inner] if isinstance(inner, nn.Module) else [model]


def _parameters(model: Any) -> Replaced:
    modules = {id(module): module for whole in _wholes(model) for module in whole.modules()}.values()
    return [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
