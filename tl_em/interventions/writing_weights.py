"""Which weights write to the residual stream: the parameters behind each write, and which axis of each lies in it.

    stream  +=  x W + b      found by watching which module's own output is the write, and recomputing it from its input

Once per model, on a few random tokens.  Where a norm stands between the weight and the stream (Gemma 2), or several
experts share a write, there is no such module: no edit of weights is an edit of what is written there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tl_em.errors import NotAdditiveError, WeightEditError
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.residual_writes import tiny_forward, write_points
from tl_em.models.shared import LOW_RANK, address

OUTPUTS = (("weight", "bias"), ("W_O", "b_O"), ("W_out", "b_out"))
"""Names of a weight and of its bias, where a module's output is written."""
EMBEDDINGS = ("W_E", "W_pos")


class Part(NamedTuple):
    """A parameter that writes to the residual stream, and which of its axes lies in it."""

    module: nn.Module
    name: str
    axis: int

    @property
    def tensor(self) -> Tensor:
        return parameter_of(self.module, self.name)


_Place = tuple[str, str, int]
_PLACES: WeakKeyDictionary[Any, dict[str, tuple[_Place, ...]]] = WeakKeyDictionary()


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter that is there."""
    found = module._parameters[name]
    assert found is not None
    return found


def modules_of(model: LensModel) -> dict[str, nn.Module]:
    """The modules of a model by their paths."""
    assert isinstance(model, nn.Module)
    return dict(model.named_modules())


def untied_parts(model: LensModel) -> list[Part]:
    """The parameters that write to the stream; refused where one of them is used for something else as well."""
    places = list(_placed(model, writing_places(model)))
    modules = modules_of(model)
    parts = [Part(modules[path], name, axis) for path, name, axis in places if name in modules[path]._parameters]
    tied = sharing(modules, [(part.module, part.name) for part in parts])
    if tied:
        raise WeightEditError(
            "The embedding shares its weights with the unembedding, so removing a direction from what is written would "
            "also change how the logits are read, by as much as the effect. Call em.untie_embeddings_(model) first "
            "(the logits stay the same), or use em.intervene(model, em.Ablate(direction))."
        )
    return parts


def sharing(modules: Mapping[str, nn.Module], owners: Sequence[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
    """Parameters of other modules that lie in the same memory as the owners'."""
    own = {(id(module), name) for module, name in owners}
    memory = {address(parameter_of(*owner)) for owner in owners}
    return [
        (module, name)
        for module in modules.values()
        for name, parameter in module._parameters.items()
        if parameter is not None and (id(module), name) not in own and address(parameter) in memory
    ]


class _Seen(NamedTuple):
    """What went into a module and what came out, for a few random tokens."""

    path: str
    module: nn.Module
    x: Tensor
    out: Tensor


def writing_places(model: LensModel) -> Mapping[str, tuple[_Place, ...]]:
    """The parameters behind each write, by the name of its hook point, the weight first; none where there is no weight
    whose own output is what is written.

    Raises:
        WeightEditError: it is not known what the model writes.
    """
    known = _PLACES.get(model)
    if known is None:
        known = _PLACES[model] = dict(_find_places(model))
    return known


def forget_places(model: LensModel) -> None:
    """Look for them anew: a weight was given a bias."""
    _PLACES.pop(model, None)


def _placed(model: LensModel, places: Mapping[str, tuple[_Place, ...]]) -> Iterator[_Place]:
    """All of them; refused where one is missing."""
    for i, (name, found) in enumerate(places.items()):
        if not found and i == 0:
            raise WeightEditError(
                "The residual stream does not begin with the sum of the embeddings (a norm or a projection stands "
                "between), so no edit of weights equals the ablation. Use em.intervene(model, em.Ablate(direction))."
            )
        if not found:
            raise WeightEditError(
                f"What is written at {name} is no weight's own output: a norm (as in Gemma 2), a factor (as in "
                "Granite) or a sum of experts stands between, so no edit of weights equals the ablation. Use "
                "em.intervene(model, em.Ablate(direction))."
            )
        yield from found


def _find_places(model: LensModel) -> Iterator[tuple[str, tuple[_Place, ...]]]:
    """The parameters behind each of the 2L + 1 writes."""
    try:
        embedding, *writes = write_points(model)
    except NotAdditiveError as error:
        raise WeightEditError(
            "It is not known what this model writes to its residual stream, so its weights cannot be edited for it: "
            f"{error}"
        ) from error
    values, seen = _watch(model, [embedding, *writes])
    yield embedding, tuple(_embedding_parts(values[embedding], seen))
    for name in writes:
        yield name, tuple(next((place for each in seen for place in _output_parts(each, values, name)), ()))


def _watch(model: LensModel, writes: Sequence[str]) -> tuple[dict[str, Tensor], list[_Seen]]:
    """One tiny pass: values at the writes, and what every module with weights of its own read and gave."""
    seen: list[_Seen] = []

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor):
            x = args[0] if args and isinstance(args[0], Tensor) else out.new_empty(0)
            seen.append(_Seen(path, module, x.detach(), out.detach().clone()))

    names = {*EMBEDDINGS, *(weight for weight, _ in OUTPUTS)}
    watched = {path: module for path, module in modules_of(model).items() if names & set(module._parameters)}
    inner = [n for n in hook_points(model) if n.endswith(("attn.hook_z", "mlp.hook_post"))]
    handles = [module.register_forward_hook(partial(keep, path)) for path, module in watched.items()]
    try:
        values = tiny_forward(model, [*writes, *(inner if not hasattr(model, "original_model") else [])])
    finally:
        for handle in handles:
            handle.remove()
    return values, seen


def _embedding_parts(write: Tensor, seen: Sequence[_Seen]) -> Iterator[_Place]:
    """The embeddings whose sum, up to one factor, is the stream's first value; none where nothing is."""
    named = {each.path: next((name for name in EMBEDDINGS if name in each.module._parameters), None) for each in seen}
    found = [each for each in seen if isinstance(each.module, nn.Embedding) or named[each.path]]
    wide = torch.promote_types(write.dtype, torch.float32)
    total = sum((each.out.to(wide) for each in found), torch.zeros_like(write, dtype=wide))
    if not found or not _proportional(total, write) or not all(map(_is_looked_up, found)):
        return
    for each in found:
        yield each.path, named[each.path] or "weight", -1


def _is_looked_up(seen: _Seen) -> bool:
    """Whether the module's output is rows of its weight, up to one factor: an embedding may hold a norm as well."""
    weight = seen.module._parameters.get("W_E", seen.module._parameters.get("weight"))
    if weight is None or not seen.x.numel() or seen.x.is_floating_point() or seen.x.ndim != 2:
        return True  # positions, say, that a module counts itself
    rows = weight.detach()[seen.x].to(torch.promote_types(seen.out.dtype, torch.float32))
    return _proportional(rows, seen.out) or "W_pos" in seen.module._parameters


def _output_parts(seen: _Seen, values: dict[str, Tensor], write: str) -> Iterator[list[_Place]]:
    """The weight and the bias of a module, if its output is the write and is what these make of its input."""
    if seen.out.shape != values[write].shape or not torch.equal(seen.out, values[write]):
        return
    for weight, bias in OUTPUTS:
        own = seen.module._parameters
        matrix, shift = getattr(seen.module, weight) if weight in own else None, own.get(bias)
        if matrix is None or isinstance(seen.module, nn.Embedding):
            continue
        inner = {"W_O": "hook_z", "W_out": "hook_post"}.get(weight)
        x = seen.x if inner is None else values.get(f"{seen.path}.{inner}", seen.x)
        axis = _stream_axis(matrix, shift, x, seen.out)
        if axis is not None:
            beside = [(seen.path, bias, -1)] * (shift is not None) + [(seen.path, LOW_RANK, 0)] * (LOW_RANK in own)
            yield [(seen.path, weight, axis), *beside]


def _stream_axis(matrix: Tensor, shift: Tensor | None, x: Tensor, out: Tensor) -> int | None:
    """Which axis of the matrix lies in the residual stream: the one for which ``x W + b`` gives the output."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    wide = matrix.detach().to(dtype)
    flat = wide.reshape(-1, wide.shape[-1])
    x = x.to(dtype).reshape(*out.shape[:2], -1)
    bias = 0.0 if shift is None else shift.detach().to(dtype)
    for axis, oriented in ((-1, flat), (0, wide.reshape(wide.shape[0], -1).T)):
        if oriented.shape == (x.shape[-1], out.shape[-1]) and _equal(x @ oriented + bias, out):
            return axis
    return None


def _proportional(a: Tensor, b: Tensor) -> bool:
    factor = float((a * b).sum() / a.square().sum().clamp_min(1e-30))
    return _equal(factor * a, b)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of ``b``'s precision over a sum (which half precision takes in float32)."""
    eps = torch.finfo(b.dtype).eps
    tolerance = min(64 * eps, max(4 * eps, 1e-4)) * float(b.abs().max())
    return bool((a - b).abs().max() <= tolerance)


