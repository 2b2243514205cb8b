"""An independent judge: a model on a surface against the Hugging Face model that it was made of.

Everything that is right here is computed by plain transformers and hooks of torch, in float32 with eager attention and
*without a cache*; nothing of ``tl_em`` or TransformerLens takes part in it.  Errors are in units of the *spread*: the
standard deviation of the reference's own logits at a token, averaged over tokens.  So no flat model passes by being
flat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]
_SPECIAL = 8
"""Ids below this, and the last few, may be special somewhere (padding, images)."""


def make_tokens(vocabulary: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_SPECIAL, vocabulary - _SPECIAL, (1, length), generator=generator)


class Answer(NamedTuple):
    """A greedy continuation, and by how much each token leads the second choice, in spreads of its logits."""

    ids: tuple[int, ...]
    leads: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Write:
    """A module of the Hugging Face model whose output, times a factor, is added to the residual stream."""

    layer: int
    name: str
    module: nn.Module


class Reference:
    """The Hugging Face model alone, and what is right by it."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).float().eval()
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        self.blocks = _blocks(self.model)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [batch pos vocabulary]."""
        return self.model(tokens, use_cache=False).logits.float()

    def greedy(self, tokens: Tensor, new: int) -> list[Answer]:
        """The most probable continuation of every row, one whole pass a token; rows have one length, so no padding."""
        start, leads = tokens.shape[1], []
        for _ in range(new):
            last = self.logits(tokens)[:, -1]
            two = last.topk(2)
            leads.append((two.values[:, 0] - two.values[:, 1]) / last.std(-1))
            tokens = torch.cat([tokens, two.indices[:, :1]], 1)
        rows = zip(tokens[:, start:].tolist(), torch.stack(leads, 1).tolist(), strict=True)
        return [Answer(tuple(ids), tuple(lead)) for ids, lead in rows]

    @torch.no_grad()
    def stream(self, tokens: Tensor) -> list[Tensor]:
        """What each block leaves in the residual stream, [batch pos d_model] a block."""
        found: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda m, a, out: found.append(_tensor(out).detach().clone()))
            for block in self.blocks
        ]
        try:
            self.model(tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextmanager
    def edited_after(self, layer: int, edit: Edit) -> Iterator[None]:
        """Edit what a block leaves."""
        handle = self.blocks[layer].register_forward_hook(lambda m, a, out: _replaced(out, edit(_tensor(out))))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def edited_at_writes(self, writes: Sequence[Write], edit: Edit) -> Iterator[None]:
        """Edit the stream's first value and every module that writes to it."""
        handles = [
            write.module.register_forward_hook(lambda m, a, out: _replaced(out, edit(_tensor(out)))) for write in writes
        ]
        handles.append(self.blocks[0].register_forward_pre_hook(partial(_edit_input, edit), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def writes(self, tokens: Tensor) -> list[Write]:
        """The modules whose outputs, times one factor each, make up each block's change of the stream.

        Empty where there are none (a norm behind the sum, several streams): then "every write" is not defined.
        """
        found: list[Write] = []
        for layer, block in enumerate(self.blocks):
            start, end, inside = _watched(self.model, block, tokens)
            chosen = _summands(end - start, inside) if start.shape == end.shape else None
            if chosen is None:
                return []
            found += [Write(layer, name, module) for name, module in chosen]
        return found


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: the longest list of modules of one kind, the language model's where there are two."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for word in ("vision", "experts", "adapter"):
        lists = [(name, module) for name, module in lists if word not in name]
    depth = {name: name.count(".") for name, _ in lists}
    shallow = min(depth.values(), default=0)
    return list(max((m for n, m in lists if depth[n] == shallow), key=len, default=nn.ModuleList()))


def _tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _replaced(out: Any, new: Tensor) -> Any:
    return new if isinstance(out, Tensor) else type(out)([new, *out[1:]]) if isinstance(out, list) else (new, *out[1:])


def _edit_input(edit: Edit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}


def _watched(
    model: nn.Module, block: nn.Module, tokens: Tensor
) -> tuple[Tensor, Tensor, list[tuple[str, nn.Module, Tensor]]]:
    """A block's input and output, and the outputs of all modules in it that are shaped like them, in order."""
    ends: dict[str, Tensor] = {}
    inside: list[tuple[str, nn.Module, Tensor]] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends["start"] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def keep(name: str, module: nn.Module, args: Any, out: Any) -> None:
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        start = ends["start"]
        if isinstance(out, Tensor) and out.numel() == start.numel() and out.shape[-1] == start.shape[-1]:
            inside.append((name, module, out.detach().clone().view_as(start)))  # some flatten the tokens of a batch

    handles: list[Any] = [block.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [m.register_forward_hook(partial(keep, n)) for n, m in block.named_modules() if n]
    handles.append(block.register_forward_hook(lambda m, a, out: ends.update(end=_tensor(out).detach().clone())))
    try:
        model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ends["start"], ends["end"], inside


def _summands(change: Tensor, inside: Sequence[tuple[str, nn.Module, Tensor]]) -> list[tuple[str, nn.Module]] | None:
    """The fewest modules (at most three) whose outputs, times one factor each, add up to the change."""
    flat = change.flatten().double()
    columns = [out.flatten().double() for _, _, out in inside]
    for size in (1, 2, 3):
        fits = []
        for chosen in combinations(range(len(columns)), size):
            matrix = torch.stack([columns[i] for i in chosen], 1)
            gram = matrix.T @ matrix
            if torch.linalg.matrix_rank(gram, rtol=1e-9) < size:
                continue
            factors = torch.linalg.solve(gram, matrix.T @ flat)
            gap = float((matrix @ factors - flat).abs().max() / flat.abs().max().clamp_min(1e-30))
            if gap < 1e-4 and bool((factors.abs() > 1e-3).all()):
                fits.append((gap, chosen))
        if fits:
            return [inside[i][:2] for i in min(fits)[1]]
    return None


def without(unit: Tensor) -> Edit:
    """Remove the component along a unit vector."""
    return lambda x: x - (x.float() @ unit)[..., None].to(x.dtype) * unit.to(x.dtype)


def spread_of(logits: Tensor) -> float:
    """Standard deviation over the vocabulary, averaged over tokens."""
    return float(logits.float().std(-1).mean())


def gap_of(ours: Tensor, right: Tensor) -> float:
    """The largest difference of log-probabilities, in units of the reference's spread; infinite where shapes differ."""
    if ours.shape != right.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours.log_softmax(-1) - right.log_softmax(-1)).abs().max()) / spread_of(right)
