"""What a fine-tune adds, as nodes of its own: a LoRA's part would else be spread over error nodes.

    part[l, stream] = write_tuned(x) - write_base(x)        x: what the tuned model's block reads at this prompt

The base runs once, with the tuned model's residual stream put in at every block (and its attention output after the
attention's part was read), so that each difference is what the changed weights of that one module do. For a LoRA that
is exactly the adapter's contribution, whether it was merged into a copy (the base is then another model) or not (the
base is then the same model with peft's adapters switched off); a full fine-tune counts the same way, and embeddings and
norms belong to the module that reads them. Several adapters at once have one node for their sum: a block is not linear
in them, so that no share of it is one adapter's.

An attention's part stays in the paths through its heads as well (their weights are the tuned ones), so there a node
says what the target would lose with this write, and not what is left over for it once every other node is counted.

The control: a model that has no adapters, against itself, or one whose adapters write nothing, has no such node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_em.errors import ModelError, PairMismatchError
from tl_em.graph.edges import Written
from tl_em.graph.nodes import Node
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.residual_writes import write_points

_SMALL = 1e-6
"""Of a write's norm: below it a difference is rounding."""


def adapter_writes(tuned: LensModel, base: LensModel, tokens: Int[Tensor, " pos"]) -> list[Written]:
    """One node for each write and position that the fine-tune changes.

    Args:
        tuned: the model of the graph.
        base: the model before the fine-tune; the same model: without its unmerged peft adapters, where it has some.
        tokens: [pos].

    Raises:
        PairMismatchError: the models differ in shape.
        ModelError: an adapter that takes no part in what the model computes.
    """
    own = unmerged(tuned) if base is tuned else {}
    if any(getattr(tuned.cfg, name) != getattr(base.cfg, name) for name in ("n_layers", "d_model", "d_vocab")):
        raise PairMismatchError("adapter= has another shape than the model, so no difference is defined; pass its base")
    writes = write_points(tuned)[1:]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(int(tuned.cfg.n_layers))]
    theirs: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, hook: Any) -> None:
        theirs[name] = x.detach().clone()

    def put(name: str, x: Tensor, hook: Any) -> Tensor:
        """Note what the base writes, and let the tuned model's write stand."""
        ours[name] = x.detach().clone()
        return theirs[name].to(x)

    points = (*streams, *writes)
    with torch.no_grad():
        with _running(own), hooked(tuned, [(name, partial(note, name)) for name in points]):
            tuned(tokens[None].to(tuned.cfg.device))
        with switched_off(own), hooked(base, [(name, partial(put, name)) for name in points]):
            base(tokens[None].to(base.cfg.device))
    label = " + ".join(dict.fromkeys(name for layer in own.values() for name in layer.active_adapters))
    return [each for point in writes for each in _parts(point, theirs[point], ours[point], label or "adapter")]


def _parts(point: str, theirs: Tensor, ours: Tensor, label: str) -> list[Written]:
    part, size = (theirs - ours.to(theirs))[0], theirs.norm()
    _, layer, place = point.split(".", 2)
    stream = "mlp_out" if place.startswith(("hook_mlp", "ln2", "channel_mix")) else "attn_out"
    found = []
    for pos in range(len(part)):
        if part[pos].norm() > _SMALL * size:
            node = Node("adapter", int(layer), pos, stream=stream, activation=float(part[pos].norm()), label=label)
            found.append(Written(node, point, part[pos]))
    return found


# --- Adapters that were not merged ------------------------------------------------------------------------------------


def base_of(model: LensModel, adapter: LensModel | bool | None) -> LensModel | None:
    """What ``adapter=`` stands for; True: the model itself, without its unmerged adapters.

    Raises:
        ModelError: True, and the model has none: peft is missing, no layer has one, it is off, or it was merged.
    """
    if not isinstance(adapter, bool):
        return adapter
    layers = _layers(model) if adapter else {}
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ModelError(
            f"The adapter of {_named(merged)} is merged into the weights, so it cannot be told from them. Take it out "
            "again (peft_model.unmerge_adapter()), or pass the model before its fine-tune: adapter=base."
        )
    if adapter and not unmerged(model):
        seen = f"{len(layers)} peft layers, all switched off" if layers else "no peft layer"
        lacking = "" if find_spec("peft") else " (nor is peft installed: pip install 'tl-em[lora]')"
        raise ModelError(
            f"This {type(model).__name__} holds {seen}{lacking}, so no adapter has a part in it. Build a Bridge around "
            "a model with its adapters on, em.load_model(peft_model.get_base_model()), or pass the model before its "
            "fine-tune: adapter=base."
        )
    return model if adapter else None


def unmerged(model: LensModel) -> dict[str, Any]:
    """The model's peft layers whose adapter is on and not part of the weights, by name."""
    layers = _layers(model).items()
    return {name: each for name, each in layers if each.active_adapters and not (each.disable_adapters or each.merged)}


def _layers(model: LensModel) -> dict[str, Any]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # then nobody can have made one
        return {}
    modules = model.named_modules()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}


@contextmanager
def switched_off(layers: Mapping[str, Any]) -> Iterator[None]:
    """Without their adapters by peft's own switch, which also sets ``requires_grad``: that is put back as it was."""
    flags = [(each, each.requires_grad) for layer in layers.values() for each in layer.parameters()]
    try:
        for layer in layers.values():
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _running(layers: Mapping[str, Any]) -> Iterator[None]:
    """Raise where a layer is passed by: a Bridge reads joint matrices (qkv of GPT-2, NeoX, Phi-3) without adapters."""
    ran: set[str] = set()

    def note(name: str, *_: Any) -> None:
        ran.add(name)

    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in layers if name not in ran]:
        raise ModelError(
            f"The adapter of {_named(silent)} never ran on this prompt: where TransformerLens splits a joint matrix it "
            "takes the weights without their adapter, and what runs is not the model that was trained. Merge a copy "
            "(em.load_model(peft_model.merge_and_unload())), and pass the model before its fine-tune: adapter=base."
        )


def _named(names: list[str]) -> str:
    """The first of some layers, as TransformerLens names them without what it wraps."""
    first = names[0].replace("._original_component", "")
    return repr(first) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
