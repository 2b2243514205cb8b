"""Is an edit of weights what the hooks do?  Looked at on a few tokens, before it is kept.

    logits(edited weights)  =  logits(edited activations)        up to the rounding of the model's own precision
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_em.errors import WeightEditError
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.residual_writes import tiny_forward
from tl_em.models.stream import Unembedding
from tl_em.models.torch_state import plain

Kept = list[tuple[nn.Module, str, Tensor | None]]
"""Parameters, and what they were: copies, or what other models hold as well, None where there was none."""
_ALIGNED, _LARGE = 64, 2**23
"""Bytes: where copies begin that lie side by side, and from where on large pages are fewer pages."""
_WITHIN = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far the logits may lie apart (root mean square, in their spread): ten times the rounding of small models and
more, for deep ones. Half precision rounds the weights once more, where the hooks round the activations."""


@contextmanager
def writing(tensor: Tensor) -> Iterator[None]:
    """Weights that were made in inference mode can be written in inference mode only."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, detached, that work in and outside inference mode alike: on a CPU side by side, in large pages.

    Memory is handed out page by page when it is first written, which takes longer than to copy what goes into it.
    """
    ends = [0, *accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors)]
    if ends[-1] < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE") or any(each.device.type != "cpu" for each in tensors):
        return [plain(tensor) for tensor in tensors]
    memory = mmap.mmap(-1, ends[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return [
            whole[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            for at, tensor in zip(ends, tensors, strict=False)
        ]


def restore_(kept: Kept) -> None:
    """Put parameters back as they were."""
    for module, name, before in kept:
        now = module._parameters[name]
        if before is None or isinstance(before, nn.Parameter) or now is None:
            module._parameters[name] = before  # pyright: ignore[reportArgumentType]
        else:
            with writing(now):
                now.copy_(before)


@contextmanager
def resting_hooks(model: LensModel) -> Iterator[None]:
    """The model as its weights make it: what is attached to its hook points meanwhile rests."""
    points = {id(point): point for point in hook_points(model).values()}.values()
    attached = [
        (point, point._forward_hooks, point._forward_pre_hooks)
        for point in points
        if point._forward_hooks or point._forward_pre_hooks
    ]
    try:
        for point, after, before in attached:
            point._forward_hooks, point._forward_pre_hooks = type(after)(), type(before)()
        yield
    finally:
        for point, after, before in attached:
            point._forward_hooks, point._forward_pre_hooks = after, before


def some_logits(model: LensModel) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits after a few random tokens; after each of them where the unembedding is no module of the model.

    What the last token's are made of was written at all of them: attention reads each.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(getattr(out, "logits", out).detach())

    assert isinstance(model, nn.Module)
    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(keep).remove)
        Unembedding(model, stack).want(lambda x: x[:, -1])
        tiny_forward(model, [])
    return seen[-1]


def check_same(edited: Tensor, wanted_logits: Tensor, done: str, instead: str) -> None:
    """Raise ``WeightEditError`` unless the logits are the same up to rounding.

    Args:
        edited, wanted_logits: of the edited weights, and of the edited activations.
        done: what was done, and with what it should be equal, for the message.
        instead: the call that does it without weights.
    """
    wide = torch.promote_types(wanted_logits.dtype, torch.float32)
    gap, wanted = (edited.to(wide) - wanted_logits.to(wide)), wanted_logits.to(wide)
    spread = float((wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt())
    off = float(gap.square().mean().sqrt())
    if not off <= _WITHIN.get(wanted_logits.dtype, 0.1) * spread:
        raise WeightEditError(
            f"{done} by {off:.1e} where their spread is {spread:.1e}: something stands between its weights and its "
            f"residual stream that the search did not see. The weights are what they were. Use {instead}."
        )
