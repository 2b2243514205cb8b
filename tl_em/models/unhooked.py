"""A HookedTransformer's weights back under Hugging Face's names: TransformerLens's own conversion, run backwards.

Every entry of a HookedTransformer's weights is an entry of the Hugging Face model's, moved, and at most scaled and
shifted (Gemma's embedding times sqrt(d), its norms plus 1):

    y[i] = a[i] x[p(i)] + b[i]

a, b and p are read off the conversion itself, which is run on weights that are all 0 (b), all 1 (a + b), and on the
digits of each entry's own number (p).  Nothing is known here of any architecture.  An entry that comes from nowhere
(a = 0) must be what the conversion puts there, but for biases of what a block writes, which may have been given a
value.  The unembedding, which some conversions take from the embedding, is taken as it is.

The control is the one of ``save_model``: what is written is read back and compared.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

from tl_em.errors import ModelError, first_line
from tl_em.models.source_record import HfSource
from tl_em.models.surfaces import to_hooked_weights

_BASE = 2**11
"""Of the digits: so small that they are exact in float32 after a scaling."""
_HEAD, _HEAD_BIAS = "unembed.W_U", "unembed.b_U"
_WRITES = re.compile(r"(blocks\.\d+\.(?:attn|mlp))\.(b_O|b_out)")


def hf_weights(model: Any, origin: HfSource, empty: Any) -> dict[str, Tensor]:
    """Every tensor of the Hugging Face model, by its name, on the CPU and in the model's dtype.

    Args:
        model: a HookedTransformer with raw weights.
        origin: what it was made of.
        empty: a model of that class without values, its unembedding apart from its embedding.

    Raises:
        ModelError: the conversion cannot be run backwards, or the model holds what the class has no place for.
    """
    own = {name: value.detach().to("cpu", torch.float32) for name, value in model.named_parameters()}
    dtype = next(iter(model.parameters())).dtype
    places = _Places(model.cfg, empty)
    found = {name: torch.full((value.numel(),), torch.nan) for name, value in empty.state_dict().items()}
    flat = torch.cat(list(found.values()))
    for name, value in own.items():
        if name in places.shift and name not in (_HEAD, _HEAD_BIAS):
            scale = places.scale[name]
            back, sourced = (value - places.shift[name]).div_(torch.where(scale == 0, 1.0, scale)), scale != 0
            flat[places.number[name][sourced]] = back[sourced]
    found = dict(zip(found, flat.split([value.numel() for value in found.values()]), strict=True))
    found = {name: value.reshape(empty.state_dict()[name].shape) for name, value in found.items()}
    found |= _unembedding(empty, own)
    found |= _made_up(own, places, list(found), [value.numel() for value in found.values()])
    lost = [name for name, value in found.items() if bool(value.isnan().any())]
    if lost:
        raise ModelError(
            f"{lost[0]} of a {origin.kind.__name__} is nowhere in this HookedTransformer ({len(lost)} such tensors), "
            "so it cannot be written. Load the model with em.load_model(source, surface='bridge'), edit and save it."
        )
    return {name: value.to(dtype) for name, value in found.items()}


class _Places:
    """Where each entry of a HookedTransformer's weights comes from."""

    def __init__(self, cfg: Any, empty: Any) -> None:
        self._cfg = copy.copy(cfg)
        self._cfg.dtype, self._cfg.device = torch.float32, "cpu"
        self._shapes = {name: value.shape for name, value in empty.state_dict().items()}
        self._empty = empty
        total = sum(shape.numel() for shape in self._shapes.values())
        zeros = self._converted(lambda at, count: torch.zeros(count))
        whole = torch.int32 if total < 2**31 else torch.int64
        self.number = {name: torch.zeros(value.shape, dtype=whole) for name, value in zeros.items()}
        self.shift = {name: _narrow(value) for name, value in zeros.items()}
        del zeros
        ones = self._converted(lambda at, count: torch.ones(count))
        self.scale = {name: _narrow(ones[name] - value) for name, value in self.shift.items()}
        del ones
        place = 1
        while place < total:
            self._add_digit(place)
            place *= _BASE

    def _add_digit(self, place: int) -> None:
        digits = self._converted(lambda at, count: _digits(at, count, place))
        for name, value in digits.items():
            scale = torch.where(self.scale[name] == 0, 1.0, self.scale[name])
            digit = value.sub(self.shift[name]).div_(scale).round_()
            self.number[name].add_(digit.to(self.number[name].dtype), alpha=place)

    def _converted(self, values: Any) -> dict[str, Tensor]:
        """The conversion of a model whose entries, numbered through, are these."""
        at, state = 0, {}
        for name, shape in self._shapes.items():
            state[name] = values(at, shape.numel()).reshape(shape)
            at += shape.numel()
        filled = copy.deepcopy(self._empty)
        filled.load_state_dict(state, strict=True, assign=True)
        try:
            return {name: value.detach().float() for name, value in to_hooked_weights(filled, self._cfg).items()}
        except Exception as error:  # no common base: it meets whatever TransformerLens assumes of an architecture
            raise ModelError(
                f"TransformerLens's conversion of a {type(filled).__name__} cannot be run backwards "
                f"({first_line(error)}), so the model cannot be saved from a HookedTransformer. Load it with "
                "em.load_model(source, surface='bridge'), edit and save that one."
            ) from error


def _digits(at: int, count: int, place: int) -> Tensor:
    """One digit of each of the numbers from ``at`` on."""
    return torch.arange(at, at + count).div_(place, rounding_mode="floor").remainder_(_BASE).float()


def _narrow(value: Tensor) -> Tensor:
    """A tensor of equal entries as one of them, repeated: a conversion scales and shifts whole tensors."""
    first = value.flatten()[:1]
    return first.clone().reshape(()).expand(value.shape) if bool((value == first).all()) else value.clone()


def _unembedding(empty: Any, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head as it is: ``W_U'``, and its bias where the class has one."""
    head = empty.get_output_embeddings()
    path = next(path for path, module in empty.named_modules() if module is head)
    found = {f"{path}.weight": own[_HEAD].T.contiguous()}
    if getattr(head, "bias", None) is not None or bool(own[_HEAD_BIAS].any()):
        found[f"{path}.bias"] = own[_HEAD_BIAS]
    return found


def _made_up(own: dict[str, Tensor], places: _Places, names: list[str], sizes: list[int]) -> dict[str, Tensor]:
    """Biases of what a block writes that the class has no tensor for; anything else of that kind is refused."""
    ends = torch.tensor(sizes).cumsum(0)
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        if name in (_HEAD, _HEAD_BIAS) or name not in places.shift:
            continue
        moved = (places.scale[name] == 0) & ((value - places.shift[name]).abs() > 1e-6 * value.abs().max())
        if not bool(moved.any()):
            continue
        written = _WRITES.fullmatch(name)
        if written is None:
            raise ModelError(
                f"{name} holds values that come from no tensor of the Hugging Face model (an edit by hand?), which has "
                "no place for them. Undo that edit, or make it with em.orthogonalize_ or em.bake_, and save again."
            )
        matrix = f"{written[1]}.{'W_O' if written[2] == 'b_O' else 'W_out'}"
        source = names[int(torch.searchsorted(ends, places.number[matrix].flatten()[0], right=True))]
        found[source.removesuffix("weight") + "bias"] = value
    return found
