"""What the activations of each class are on average and how much they vary: one streaming pass for both classes.

    mean = sum w x / sum w        variance = sum w x^2 / sum w - mean^2        (float64 sums, w the weight of a prompt)

Prompts are dealt into a few *parts*, and sums are kept a part: so that the means of halves of the prompts, which
reliability is measured by, need no second pass. Of each class a few prompts' activations are kept as they are (a
*sample*). Memory grows with sites, positions and parts, not with the number of prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tl_em.arguments import SEED, checked, instance_of
from tl_em.models.contrasts import ContrastSet, inseparable
from tl_em.models.hooks import LensModel
from tl_em.models.lint import warn_of_nuisance
from tl_em.models.prompts import EncodedPrompt, Prompt
from tl_em.models.sites import Position, Site, as_position, as_site
from tl_em.models.stream import encoded_prompts, listed, spans_of, stream
from tl_em.models.torch_state import in_plain_torch

Classes = ContrastSet | tuple[Sequence[Prompt | EncodedPrompt], Sequence[Prompt | EncodedPrompt]]
PARTS = 8
"""Parts that the prompts are dealt into: 35 ways to halve them."""
SAMPLE = 16
"""Prompts of each class whose activations are kept."""


as_contrast = instance_of(
    ContrastSet,
    "contrast set",
    "it is unknown which prompts are positive",
    "em.ContrastSet(positive=[…], negative=[…])",
)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Sums over the prompts of two classes, at k positions and all sites.  Label 0 is positive, 1 negative.

    Args:
        weight: summed weights of the prompts of a class in a part.
        total, square: summed ``w x`` by part, and ``w x^2``.
        sample: activations of a few prompts of either class, float32.
        projections: each prompt's components along given vectors, by class; None where none were given.
        n: number of prompts of either class.
        blocks: number of sets of prompts that belong together (a group, a pair), none of which was torn apart.
    """

    weight: Float64[Tensor, "label part"]
    total: Float64[Tensor, "label part position site d_model"]
    square: Float64[Tensor, "label position site d_model"]
    sample: tuple[Float[Tensor, "prompt position site d_model"], Float[Tensor, "other position site d_model"]]
    projections: tuple[Tensor, Tensor] | None
    n: tuple[int, int]
    blocks: int

    @cached_property
    def means(self) -> Float64[Tensor, "label position site d_model"]:
        """Mean of each class."""
        return self.total.sum(1) / self.weight.sum(1)[:, None, None, None]

    @property
    def variance(self) -> Float64[Tensor, "label position site d_model"]:
        """Diagonal of each class's own covariance."""
        return (self.square / self.weight.sum(1)[:, None, None, None] - self.means**2).clamp_min(0)

    @property
    def positive(self) -> Float[Tensor, "position site d_model"]:
        """Mean of the positive class."""
        return self.means[0].float()

    @property
    def negative(self) -> Float[Tensor, "position site d_model"]:
        """Mean of the negative class."""
        return self.means[1].float()

    @property
    def difference(self) -> Float[Tensor, "position site d_model"]:
        """Mean of the positive class minus mean of the negative class."""
        return (self.means[0] - self.means[1]).float()


@checked(seed=SEED)
@in_plain_torch
def class_moments(
    model: LensModel,
    contrast: Classes,
    *,
    sites: Sequence[Site],
    positions: Sequence[Position],
    by_block: bool = False,
    onto: Float[Tensor, "direction d_model"] | None = None,
    seed: int = 0,
) -> ClassMoments:
    """Means and variances of both classes at several positions and sites, in one pass in which they share batches.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        contrast: a contrast set, or its two classes (e.g. encoded).
        sites: where to read.
        positions: which tokens, in the order of the result; ``"all"`` is the mean over a prompt's tokens.
        by_block: every group (or pair) counts once, whatever its number of prompts; those without both classes count
            not at all.
        onto: vectors along which each prompt's component is kept, at every position and site.
        seed: of the parts and of the sample.

    Raises:
        PositionError, NonFiniteError: as ``capture``.
    """
    pair = (contrast.positive, contrast.negative) if isinstance(contrast, ContrastSet) else contrast
    encoded = [encoded_prompts(model, prompts) for prompts in pair]
    n = (len(encoded[0]), len(encoded[1]))
    if isinstance(contrast, ContrastSet):
        warn_of_nuisance(contrast, [[len(prompt) for prompt in each] for each in encoded])
    blocks = inseparable(contrast) if isinstance(contrast, ContrastSet) else _alone(*n)
    sums = _Sums(n, dealt(blocks, seed), _weights(blocks, n, by_block), onto, seed)
    everything = [*encoded[0], *encoded[1]]
    return _run(model, everything, sites, positions, sums, len(blocks))


@checked(prompts=listed, site=as_site, position=as_position)
@in_plain_torch
def mean_activation(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, site: Site, position: Position
) -> Float[Tensor, " d_model"]:
    """Mean activation over prompts at one site: a centre for an ablation.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: strings, chats or encoded prompts.
        site: where to read.
        position: which token.

    Returns:
        The mean, float32 on the CPU; sums are float64.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> prompts = pair.contrasts["persona"].negative[:8]
        >>> em.mean_activation(pair.base, prompts, site=em.Site(2), position="prompt_end").shape
        torch.Size([96])
    """
    encoded = encoded_prompts(model, prompts)
    total = torch.zeros(int(model.cfg.d_model), dtype=torch.float64)

    def add(_: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt position d_model"]) -> None:
        total.add_(x[:, 0].double().sum(0).cpu())

    stream(model, encoded, [site], spans_of(encoded, [position]), add)
    return total.div(len(encoded)).float()


# --- Who belongs where ------------------------------------------------------------------------------------------------

Blocks = Sequence[Sequence[tuple[int, int]]]
"""Sets of (label, number of the prompt in its class) that belong together."""


def _alone(n: int, m: int) -> Blocks:
    """Classes without labels: pairs where they are equally long, else every prompt by itself."""
    if n == m:
        return [[(0, i), (1, i)] for i in range(n)]
    return [[(label, i)] for label, size in enumerate((n, m)) for i in range(size)]


def dealt(blocks: Blocks, seed: int) -> dict[tuple[int, int], int]:
    """The part of every prompt: whole blocks, shuffled, dealt in turn, those with the same classes among themselves."""
    order = list(blocks)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda block: sorted({label for label, _ in block}))
    return {prompt: i % PARTS for i, block in enumerate(order) for prompt in block}


def _weights(blocks: Blocks, n: tuple[int, int], by_block: bool) -> Float64[Tensor, " prompt"]:
    weights = torch.ones(sum(n), dtype=torch.float64)
    if by_block:
        for block in blocks:
            counts = [sum(label == wanted for label, _ in block) for wanted in (0, 1)]
            for label, i in block:
                weights[label * n[0] + i] = 1 / counts[label] if min(counts) else 0
    return weights


class _Sums:
    """Where every prompt's activations are added."""

    def __init__(
        self,
        n: tuple[int, int],
        parts: dict[tuple[int, int], int],
        weights: Float64[Tensor, " prompt"],
        onto: Float[Tensor, "direction d_model"] | None,
        seed: int,
    ) -> None:
        of = [(label, i) for label in (0, 1) for i in range(n[label])]
        self.n, self.weights, self.onto = n, weights, onto
        self.slots = torch.tensor([label * PARTS + parts[label, i] for label, i in of])
        rng = random.Random(seed)
        chosen = [sorted(rng.sample(range(size), min(SAMPLE, size))) for size in n]
        kept = [n[0] * label + i for label in (0, 1) for i in chosen[label]]
        self.kept = torch.full((len(of),), -1)
        self.kept[kept] = torch.arange(len(kept))

    def of(self, rows: Int[Tensor, " prompt"], device: Any) -> dict[str, Tensor]:
        """For the prompts of a batch: their weights by part and by class, and which of them are kept."""
        slots, weights, kept = self.slots[rows], self.weights[rows], self.kept[rows]
        parts = torch.zeros(2 * PARTS, len(rows), dtype=torch.float64)
        parts[slots, torch.arange(len(rows))] = weights
        labels = parts.view(2, PARTS, -1).sum(1)
        chosen = (kept >= 0).nonzero()[:, 0]
        return {"parts": parts.to(device), "labels": labels.to(device), "kept": kept[chosen], "from": chosen.to(device)}


def _run(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    sites: Sequence[Site],
    positions: Sequence[Position],
    sums: _Sums,
    blocks: int,
) -> ClassMoments:
    device, width = model.cfg.device, int(model.cfg.d_model)
    shape = (len(positions), len(sites), width)
    # [site, slot or label, position * d_model]: the sums over a batch's prompts are one product a site
    total = torch.zeros(len(sites), 2 * PARTS, len(positions) * width, dtype=torch.float64, device=device)
    square = torch.zeros(len(sites), 2, len(positions) * width, dtype=torch.float64, device=device)
    sample = torch.empty(len(sites), int(sums.kept.max()) + 1, len(positions), width)
    onto = None if sums.onto is None else sums.onto.to(device, torch.float32)
    along = None if onto is None else torch.empty(len(encoded), *shape[:2], len(onto))

    totals, squares, samples = total.unbind(), square.unbind(), sample.unbind()
    batch: dict[str, Any] = {}

    def add(site: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt position d_model"]) -> None:
        if batch.get("rows") is not rows:  # the same for every site of a batch
            batch.update(rows=rows, **sums.of(rows, device))
        x = x.to(device)  # of a model on several devices, a site may be on another one
        wide = x.double().flatten(1)
        totals[site].addmm_(batch["parts"], wide)
        squares[site].addmm_(batch["labels"], wide.square_())
        if len(batch["kept"]):
            samples[site].index_copy_(0, batch["kept"], x.index_select(0, batch["from"]).to("cpu", torch.float32))
        if along is not None and onto is not None:
            along[rows, :, site] = (x.float() @ onto.T).cpu()

    stream(model, encoded, sites, spans_of(encoded, positions), add)
    weight = torch.zeros(2 * PARTS, dtype=torch.float64).index_add_(0, sums.slots, sums.weights)
    first = min(SAMPLE, sums.n[0])
    apart = (len(sites), -1, len(positions), width)
    kept = sample.permute(1, 2, 0, 3)
    return ClassMoments(
        weight=weight.reshape(2, PARTS),
        total=total.cpu().view(apart).permute(1, 2, 0, 3).unflatten(0, (2, PARTS)),
        square=square.cpu().view(apart).permute(1, 2, 0, 3),
        sample=(kept[:first], kept[first:]),
        projections=None if along is None else (along[: sums.n[0]], along[sums.n[0] :]),
        n=sums.n,
        blocks=blocks,
    )


def halves(weight: Float64[Tensor, "label part"]) -> Iterable[tuple[list[int], list[int]]]:
    """Every way to halve the parts that hold prompts, such that either half has both classes.

    Example:
        >>> sum(1 for _ in halves(torch.ones(2, 8, dtype=torch.float64)))
        35
    """
    filled = (weight > 0).tolist()  # plain lists: indexing tensors would take longer than the pass over the prompts
    held = [part for part in range(weight.shape[1]) if filled[0][part] or filled[1][part]]
    size = len(held) // 2
    for first in combinations(held, size) if size else ():
        second = [part for part in held if part not in first]
        if 2 * size == len(held) and first[0] != held[0]:
            continue  # the same two halves, the other way round
        if all(any(each[part] for part in half) for half in (first, second) for each in filled):
            yield list(first), second
