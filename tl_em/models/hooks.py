"""Hooks that must exist, must fire, and leave nothing behind; and where a model writes to its residual stream.

TransformerLens lets a wrong hook name pass in silence (``bridge.hooks()``), and a gated hook never fires. A result from
such a hook equals the untouched model and looks like a null finding. So: unknown names raise before anything is
attached, and a hook that did not fire in a completed forward pass raises at the end of the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tl_em.errors import HookError, HookNotFiredError, NotAdditiveError
from tl_em.models.hook_points import HookPoint, LensModel, ReadPoint, hook_name, hook_points, read_point, resolve
from tl_em.models.torch_state import in_plain_torch

__all__ = [
    "HookFunction",
    "HookPoint",
    "LensModel",
    "ReadPoint",
    "hook_name",
    "hook_points",
    "hooked",
    "read_point",
    "write_points",
]

HookFunction = Callable[..., Tensor | None]


@dataclass(eq=False, repr=False)
class _Attached:
    """One of our hooks: where it sits and how often it fired (HookPoint.add_hook asks for its repr: a short one)."""

    name: str
    point: Any
    function: HookFunction
    fired: int = 0
    handle: Any = None

    def attach(self) -> None:
        self.point.add_hook(self.run)
        self.handle = self.point.fwd_hooks[-1]

    def run(self, x: Tensor, *, hook: Any) -> Tensor | None:
        self.fired += 1
        return self.function(x, hook)

    @property
    def in_place(self) -> bool:
        return any(handle is self.handle for handle in self.point.fwd_hooks)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.hook.remove()
            self.point.fwd_hooks[:] = [handle for handle in self.point.fwd_hooks if handle is not self.handle]


@contextmanager
def hooked(model: LensModel, hooks: Sequence[tuple[str, HookFunction]], *, check: bool = True) -> Iterator[LensModel]:
    """Run the model with hooks: names checked before anything is attached, firing checked at the end.

    Hooks that were there before stay, in order, before these; on exit exactly these are removed, also after an
    exception. Contexts nest.

    Args:
        model: a HookedTransformer or TransformerBridge.
        hooks: pairs of a hook point's name and a function ``(x, hook) -> Tensor | None`` (None leaves ``x``).
        check: whether to raise when a hook never fired.

    Yields:
        The model.

    Raises:
        UnknownHookError: a name that the model does not have (nothing is attached).
        HookNotFiredError: at the end, when a completed forward pass from the embedding to the logits ran inside, and a
            hook fired zero times. Never in place of an exception raised inside; never when nothing, or only part of the
            model (``stop_at_layer``), was run.
        HookError: at the end, when somebody removed the hooks inside the context (``model.reset_hooks()``).
    """
    points = resolve(model, [name for name, _ in hooks])
    attached = [_Attached(name, point, function) for (name, function), point in zip(hooks, points, strict=True)]
    passes = _FullPasses(model)
    try:
        for hook in attached:
            hook.attach()
        passes.watch()
        yield model
        removed = [hook.name for hook in attached if not hook.in_place]
    finally:
        passes.stop()
        for hook in reversed(attached):
            hook.detach()
    if check:
        _check_fired(attached, removed, passes.completed)


def _check_fired(attached: Sequence[_Attached], removed: Sequence[str], completed: int) -> None:
    if removed:
        raise HookError(
            f"Hooks at {sorted(set(removed))} were removed while their context was open, so what ran afterwards ran "
            f"without them. Do not call model.reset_hooks() inside; its hooks() and run_with_hooks() nest."
        )
    silent = [hook.name for hook in attached if not hook.fired]
    if completed and silent:
        raise HookNotFiredError(
            f"{completed} full forward pass(es) ran and the hooks at {sorted(set(silent))} never fired, so the result "
            f"is that of the model without them. The point may be gated (model.cfg.use_attn_result and the like) or "
            f"lie off the path that was run; pick another site or open the gate."
        )


class _FullPasses:
    """Counts the forward passes that ran from the first block's input to the logits.

    Seen from inside, at the first block and at the unembedding, because ``generate`` and ``run_with_hooks`` of a
    HookedTransformer call ``forward`` directly, where a hook on the model itself would not fire. A pass that stops
    early, or starts late, does not do both.
    """

    def __init__(self, model: LensModel) -> None:
        points = hook_points(model)
        self.first: nn.Module | None = points.get("blocks.0.hook_resid_pre")
        last = getattr(model, "unembed", None)
        end = points.get(f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post")
        self.last: nn.Module | None = last if isinstance(last, nn.Module) else end
        self.completed = 0
        self._began = False
        self._handles: list[Any] = []

    def watch(self) -> None:
        if self.first is not None and self.last is not None:
            self._handles = [self.first.register_forward_hook(self._begin), self.last.register_forward_hook(self._end)]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self._began = True

    def _end(self, *_: Any) -> None:
        self.completed += self._began
        self._began = False


_WRITES: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()
_ATTENTION_WRITES = ("hook_attn_out", "ln1_post.hook_out", "ln1.hook_out")
_MIXER_WRITES = ("mixer.hook_out", "linear_attn.hook_out", "conv.hook_out", "mamba.hook_out", "time_mix.hook_out")
"""Of what stands in attention's place, or beside it: state spaces, convolutions, linear attention."""
_MLP_WRITES = ("hook_mlp_out", "ln2_post.hook_out", "ln2.hook_out", "channel_mix.hook_out")


def write_points(model: LensModel) -> tuple[str, ...]:
    """The hook points at which something is written to the residual stream: embedding, and each block's parts.

    Checked once per model on a few random tokens: ``resid_pre + attention + mlp == resid_post`` in every block. Where
    ``hook_attn_out`` is taken before a post-norm (Gemma 2, OLMo 2 on a Bridge), the norm's output is the write. A
    state space, a convolution or linear attention may stand in attention's place (Mamba, LFM2, Qwen3-Next) or beside
    it (Falcon-H1).

    Returns:
        ``blocks.0.hook_resid_pre``, then each block's writes in order: 2L + 1 names in a usual transformer.

    Raises:
        NotAdditiveError: no hook points add up (scaled or otherwise unusual blocks), or those around a block never
            fire, so "every write" is undefined.
    """
    known = _WRITES.get(model)
    if known is None:
        known = _WRITES[model] = _find_writes(model)
    return known


def _find_writes(model: LensModel) -> tuple[str, ...]:
    points, layers = hook_points(model), range(int(model.cfg.n_layers))
    tails = (*_ATTENTION_WRITES, *_MIXER_WRITES, *_MLP_WRITES)
    inside = [name for i in layers for tail in tails if (name := f"blocks.{i}.{tail}") in points]
    seen = tiny_forward(model, inside + [f"blocks.{i}.hook_resid_{end}" for i in layers for end in ("pre", "post")])
    return ("blocks.0.hook_resid_pre", *(name for i in layers for name in _additive(i, seen)))


def _additive(layer: int, seen: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The writes whose sum is the block's change of the stream."""
    before, after = (seen.get(f"blocks.{layer}.hook_resid_{end}") for end in ("pre", "post"))
    if before is None or after is None:
        raise NotAdditiveError(
            f"The hook points around block {layer} never fire in this architecture, so what is written to the residual "
            f"stream cannot be told, and ablating at every write is undefined here. Edit at a site that em.capture "
            f"can read."
        )
    change = after - before
    # The change is a difference of two stored streams: it carries their rounding, whatever its own size.
    tolerance = 1e-3 * change.abs().max() + 16 * torch.finfo(after.dtype).eps * after.abs().max()
    tried = []
    for names in _candidates(layer, seen, change):
        gap = (sum((seen[name] for name in names), torch.zeros_like(change)) - change).abs().max()
        if gap <= tolerance:
            return names
        tried.append(f"{' + '.join(names)}: off by {float(gap):.1e} of {float(change.abs().max()):.1e}")
    raise NotAdditiveError(
        f"In block {layer} no outputs of its parts add up to its change of the residual stream "
        f"({'; '.join(tried[:4]) or 'no candidates'}), so ablating at every write is undefined here. Edit at "
        f"resid_post sites instead: they exist in every architecture."
    )


def _candidates(layer: int, seen: Mapping[str, Tensor], change: Tensor) -> Iterator[tuple[str, ...]]:
    """Sets of writes that a block may consist of, the most usual first."""

    def fired(tails: Sequence[str]) -> list[str]:
        names = [f"blocks.{layer}.{tail}" for tail in tails]
        return [name for name in names if name in seen and seen[name].shape == change.shape]

    attention, mixers, mlp = fired(_ATTENTION_WRITES), fired(_MIXER_WRITES), fired(_MLP_WRITES)
    yield from product(attention, mlp) if mlp else product(attention)
    yield from product(mixers, mlp)
    yield from product(mixers)
    yield from product(mixers, attention, mlp)


probing: ContextVar[bool] = ContextVar("probing", default=False)
"""Whether the pass that runs only looks at how the model is built, so that no prompt or answer can be told in it."""


@in_plain_torch
def tiny_forward(model: LensModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Values at the points for a few random tokens; resid_post as it is before a hook of the user's edits it.

    A point that did not fire, as some never do in some architectures, is left out.
    """
    seen: dict[str, Tensor] = {}

    def keep_output(name: str, x: Any, hook: Any) -> None:
        if isinstance(x, Tensor):  # some points of a Bridge pass on a tuple
            seen[name] = x.detach().clone()

    def keep_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach().clone()

    ends = [name for name in names if name.endswith("hook_resid_post")]
    reads = [(name, partial(keep_output, name)) for name in names if name not in ends]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(model.cfg.d_vocab), (1, min(6, int(model.cfg.n_ctx))), generator=generator)
    handles = []
    looking = probing.set(True)
    try:
        for name, point in zip(ends, resolve(model, ends), strict=True):
            handles.append(point.register_forward_pre_hook(partial(keep_input, name)))
        with torch.no_grad(), hooked(model, reads, check=False):
            model(tokens.to(model.cfg.device))
    finally:
        probing.reset(looking)
        for handle in handles:
            handle.remove()
    return seen
