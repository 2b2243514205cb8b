"""Where a model writes to its residual stream: the hook points whose values add up to what each block changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tl_em.errors import NotAdditiveError
from tl_em.models.cache import read_once
from tl_em.models.hooks import LensModel, hook_points, hooked, resolve
from tl_em.models.torch_state import in_plain_torch

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
    with ExitStack() as stack:
        stack.callback(probing.reset, probing.set(True))
        for name, point in zip(ends, resolve(model, ends), strict=True):
            stack.callback(point.register_forward_pre_hook(partial(keep_input, name)).remove)
        with torch.no_grad(), hooked(model, reads, check=False):
            read_once(model, tokens)
    return seen
