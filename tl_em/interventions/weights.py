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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.arguments import checked
from tl_em.directions.direction import Direction, as_direction
from tl_em.errors import NotAdditiveError, UsageError, WeightEditError
from tl_em.interventions.base import EVERY_WRITE, Intervention, sites_of
from tl_em.interventions.edits import Ablate
from tl_em.models.hooks import LensModel, hook_points, hooked
from tl_em.models.residual_writes import tiny_forward, write_points
from tl_em.models.shared import LOW_RANK, address, own_
from tl_em.models.torch_state import in_plain_torch, plain, plain_torch
from tl_em.threads import holding

Model = TypeVar("Model", bound=LensModel)

_OUTPUTS = (("weight", "bias"), ("W_O", "b_O"), ("W_out", "b_out"))
_EMBEDDINGS = ("W_E", "W_pos")
_CHUNK = 2**24
"""Numbers that are turned into float32 at a time."""


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
    with plain_torch(model), _without_hooks(model):
        _proven_(model, direction)


@checked(direction=_as_weight_form)
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
        with plain_torch(model), _without_hooks(model):
            kept = _proven_(model, direction)
        try:
            yield model
        finally:
            _restore_(kept)


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
    modules = _modules(model)
    embeddings = [
        (module, name)
        for module in modules.values()
        for name in module._parameters
        if name == "W_E" or (name == "weight" and isinstance(module, nn.Embedding))
    ]
    for module, name in _sharing(modules, embeddings):
        shared = _parameter(module, name)
        setattr(module, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    configs: tuple[Any, ...] = (getattr(getattr(model, "original_model", None), "config", None), model.cfg)
    for config in configs:
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # else saving the model, or tie_weights(), would undo it


# --- Which weights write to the stream --------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A parameter that writes to the residual stream, and which of its axes lies in it."""

    module: nn.Module
    name: str
    axis: int

    @property
    def tensor(self) -> Tensor:
        return _parameter(self.module, self.name)


_Place = tuple[str, str, int]
_PARTS: WeakKeyDictionary[Any, tuple[_Place, ...]] = WeakKeyDictionary()


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    found = module._parameters[name]
    assert found is not None
    return found


def _modules(model: LensModel) -> dict[str, nn.Module]:
    assert isinstance(model, nn.Module)
    return dict(model.named_modules())


def _untied_parts(model: LensModel) -> list[_Part]:
    """The parameters that write to the stream; refused where one of them is used for something else as well."""
    places = _PARTS.get(model)
    if places is None:
        places = _PARTS[model] = tuple(_find_parts(model))
    modules = _modules(model)
    parts = [_Part(modules[path], name, axis) for path, name, axis in places if name in modules[path]._parameters]
    tied = _sharing(modules, [(part.module, part.name) for part in parts])
    if tied:
        raise WeightEditError(
            "The embedding shares its weights with the unembedding, so removing a direction from what is written would "
            "also change how the logits are read, by as much as the effect. Call em.untie_embeddings_(model) first "
            "(the logits stay the same), or use em.intervene(model, em.Ablate(direction))."
        )
    return parts


def _sharing(modules: Mapping[str, nn.Module], owners: Sequence[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
    """Parameters of other modules that lie in the same memory as the owners'."""
    own = {(id(module), name) for module, name in owners}
    memory = {address(_parameter(*owner)) for owner in owners}
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


def _find_parts(model: LensModel) -> Iterator[_Place]:
    """The parameters behind each of the 2L + 1 writes."""
    try:
        embedding, *writes = write_points(model)
    except NotAdditiveError as error:
        raise WeightEditError(
            "It is not known what this model writes to its residual stream, so it cannot be removed from weights: "
            f"{error}"
        ) from error
    values, seen = _watch(model, [embedding, *writes])
    yield from _embedding_parts(values[embedding], seen)
    for name in writes:
        found = next((place for each in seen for place in _output_parts(each, values, name)), None)
        if found is None:
            raise WeightEditError(
                f"What is written at {name} is no weight's own output: a norm (as in Gemma 2), a factor (as in "
                "Granite) or a sum of experts stands between, so no edit of weights equals the ablation. Use "
                "em.intervene(model, em.Ablate(direction))."
            )
        yield from found


def _watch(model: LensModel, writes: Sequence[str]) -> tuple[dict[str, Tensor], list[_Seen]]:
    """One tiny pass: values at the writes, and what every module with weights of its own read and gave."""
    seen: list[_Seen] = []

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor):
            x = args[0] if args and isinstance(args[0], Tensor) else out.new_empty(0)
            seen.append(_Seen(path, module, x.detach(), out.detach().clone()))

    names = {*_EMBEDDINGS, *(weight for weight, _ in _OUTPUTS)}
    watched = {path: module for path, module in _modules(model).items() if names & set(module._parameters)}
    inner = [n for n in hook_points(model) if n.endswith(("attn.hook_z", "mlp.hook_post"))]
    handles = [module.register_forward_hook(partial(keep, path)) for path, module in watched.items()]
    try:
        values = tiny_forward(model, [*writes, *(inner if not hasattr(model, "original_model") else [])])
    finally:
        for handle in handles:
            handle.remove()
    return values, seen


def _embedding_parts(write: Tensor, seen: Sequence[_Seen]) -> Iterator[_Place]:
    """The embeddings whose sum, up to one factor, is the stream's first value."""
    named = {each.path: next((name for name in _EMBEDDINGS if name in each.module._parameters), None) for each in seen}
    found = [each for each in seen if isinstance(each.module, nn.Embedding) or named[each.path]]
    wide = torch.promote_types(write.dtype, torch.float32)
    total = sum((each.out.to(wide) for each in found), torch.zeros_like(write, dtype=wide))
    if not found or not _proportional(total, write) or not all(map(_is_looked_up, found)):
        raise WeightEditError(
            "The residual stream does not begin with the sum of the embeddings (a norm or a projection stands "
            "between), so no edit of weights equals the ablation. Use em.intervene(model, em.Ablate(direction))."
        )
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
    for weight, bias in _OUTPUTS:
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


def _remove_(parts: Sequence[_Part], removal: Intervention) -> None:
    """The edit of every vector of the parts in the residual stream, in place, in float32 or better."""
    for part in parts:
        with _writing(part.tensor):
            tensor = part.tensor.detach()
            rows = tensor.movedim(part.axis, -1)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            for chunk in [rows] if rows.ndim == 1 else rows.split(max(1, _CHUNK // max(1, rows[0].numel()))):
                chunk.copy_(removal.edit(chunk.to(wide)))


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """Weights that were made in inference mode can be written in inference mode only."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


# --- Is it what the ablation does? ------------------------------------------------------------------------------------

_Kept = list[tuple[nn.Module, str, Tensor]]
"""Parameters, and what they were: copies, or what other models hold as well."""
_WITHIN = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far the logits may lie apart (root mean square, in their spread): ten times the rounding of small models and
more, for deep ones. Half precision rounds the weights once more, where the hooks round the activations."""


def _proven_(model: LensModel, removal: Intervention | Any) -> _Kept:
    """Edit the weights and show that this is the ablation, or put them back; what they were is returned."""
    removal.check(model)
    parts = _untied_parts(model)
    with hooked(model, [(name, lambda x, hook: removal.edit(x)) for name in removal.points(model)]):
        ablated = _logits(model)
    shared = own_(model, [part.tensor for part in parts])
    copied = {(id(module), name) for module, name, _ in shared}
    alone = [part for part in parts if (id(part.module), part.name) not in copied]
    kept: _Kept = [*shared, *((part.module, part.name, plain(part.tensor)) for part in alone)]
    try:
        _remove_(parts, removal)
        _check_same(_logits(model), ablated)
    except BaseException:
        _restore_(kept)
        raise
    return kept


def _restore_(kept: _Kept) -> None:
    for module, name, before in kept:
        now = _parameter(module, name)
        if isinstance(before, nn.Parameter):
            module._parameters[name] = before
        else:
            with _writing(now):
                now.copy_(before)


@contextmanager
def _without_hooks(model: LensModel) -> Iterator[None]:
    """The model as its weights make it: what is attached to its hook points meanwhile rests."""
    points = {id(point): point for point in hook_points(model).values()}.values()
    attached = [(point, point._forward_hooks, point._forward_pre_hooks) for point in points]
    try:
        for point, after, before in attached:
            point._forward_hooks, point._forward_pre_hooks = type(after)(), type(before)()
        yield
    finally:
        for point, after, before in attached:
            point._forward_hooks, point._forward_pre_hooks = after, before


def _logits(model: LensModel) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits of a few random tokens."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(getattr(out, "logits", out).detach())

    assert isinstance(model, nn.Module)
    handle = model.register_forward_hook(keep)
    try:
        tiny_forward(model, [])
    finally:
        handle.remove()
    return seen[-1]


def _check_same(edited: Tensor, ablated: Tensor) -> None:
    wide = torch.promote_types(ablated.dtype, torch.float32)
    gap, wanted = (edited.to(wide) - ablated.to(wide)), ablated.to(wide)
    spread = float((wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt())
    off = float(gap.square().mean().sqrt())
    if not off <= _WITHIN.get(ablated.dtype, 0.1) * spread:
        raise WeightEditError(
            f"With the direction removed from its weights, the model's logits differ from those of the ablation by "
            f"{off:.1e} where their spread is {spread:.1e}: something stands between its weights and its residual "
            "stream that the search did not see. The weights are what they were. Use em.intervene(model, "
            "em.Ablate(direction))."
        )
