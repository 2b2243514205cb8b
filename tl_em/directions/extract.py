"""Directions from contrast sets, at any sites and positions at once, each with how far its own data support it.

How a direction is found is a value (``directions.methods``): the difference in means by default.  Methods that are
differences of means come from one streaming pass whose memory does not grow with the prompts; for the others the
activations that they are fitted to are kept.

**Control.**  A direction describes its data until an intervention on held-out prompts says otherwise.  Two numbers come
with each, whatever the method: see ``directions.reliability``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import SEED, checked, optional
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import cosine
from tl_em.directions.methods import as_method
from tl_em.directions.methods.base import Method, fitted
from tl_em.directions.reliability import agreement, halved_means, neutral_at, neutral_z
from tl_em.errors import EmptyContrastError, ZeroDirectionError
from tl_em.models.class_means import PARTS, Blocks, as_contrast, class_moments, dealt, halves
from tl_em.models.contrasts import ContrastSet, hashed, inseparable
from tl_em.models.hooks import LensModel
from tl_em.models.lint import warn_of_nuisance
from tl_em.models.sites import Position, Provenance, Site, as_position, as_positions, as_site, as_sites
from tl_em.models.stream import captured, encoded_prompts, sites_at_once
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate

FIT_HALVES = 5
"""Ways to halve the prompts that a fit is repeated on: a fit costs more than a mean."""
_ROUNDING = 1e-6
"""A difference of means that is smaller than this share of the means is rounding of float32 activations."""


@checked(contrast=as_contrast, site=as_site, position=as_position)
@in_plain_torch
def difference_in_means(model: LensModel, contrast: ContrastSet, *, site: Site, position: Position) -> Direction:
    """Mean activation on the positive prompts minus mean activation on the negative ones.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: the two classes of prompts.
        site: where to read.
        position: at which token of each prompt.

    Returns:
        A Direction, in the units of the activations, with its reliability.

    Raises:
        ZeroDirectionError: the two means are the same.
        NonFiniteError: the activations hold NaN or infinity.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast = pair.contrasts["persona"]
        >>> em.difference_in_means(pair.base, contrast, site=em.Site(2), position="prompt_end").vector.shape
        torch.Size([96])

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    return extract_directions(model, contrast, sites=[site], positions=[position])[0]


@checked(contrast=as_contrast, sites=optional(as_sites), positions=as_positions, method=as_method, seed=SEED)
@in_plain_torch
def extract_directions(
    model: LensModel,
    contrast: ContrastSet,
    *,
    sites: Sequence[Site] | None = None,
    positions: Sequence[Position] = ("prompt_end",),
    method: Method | str | Any = "difference_in_means",
    seed: int = 0,
) -> tuple[Direction, ...]:
    """The direction of a contrast set at every position and site, from one pass over the prompts.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: the two classes of prompts.
        sites: where to read; ``None``: the residual stream after every block.
        positions: at which tokens; ``"response_mean"`` and ``"all"`` are means over tokens.
        method: how: a Method, a function ``fit(positive, negative)`` over activations [prompt site d_model] that
            returns [site d_model], or one of the names ``"difference_in_means"``; ``"paired"``, in which every group
            (or pair) counts once, and those without both classes not at all; ``"pca"`` of the differences of pairs;
            ``"logistic"`` or ``"lda"``: probes, which are for reading rather than for steering.
        seed: of the parts that the prompts are halved by.

    Returns:
        Directions, positions outermost; ``.reliability`` and ``.neutral`` are None where there are too few prompts.

    Raises:
        ZeroDirectionError: the classes do not differ at some position and site.
        EmptyContrastError: a method that needs pairs, and none has both classes.
        UsageError: no such method, or positions that are no list. NonFiniteError, PositionError: as ``capture``.
        WidthError, NonFiniteError: the method returned what is no vector at each site.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> found = extract_directions(pair.base, pair.contrasts["persona"], method="lda")
        >>> [str(d.site) for d in found], bool(found[-1].reliability.value > 0.9)
        (['resid_post[0]', 'resid_post[1]', 'resid_post[2]'], True)

    Source: Arditi et al. 2024, arXiv:2406.11717; Zou et al. 2023, arXiv:2310.01405; Marks & Tegmark 2023,
    arXiv:2310.06824.
    """
    sites = [Site(layer) for layer in range(int(model.cfg.n_layers))] if sites is None else list(sites)
    method, found = as_method("method", method), list[Direction]()
    for direction, position, site in Extraction(model, contrast, sites, positions, method, seed).made():
        if direction is None:
            raise ZeroDirectionError(
                f"method {method.name!r} finds no direction at {site}, {position!r}: the classes do not differ there; "
                "read at a position after the words in which the prompts differ, or check that they differ"
            )
        found.append(direction)
    return tuple(found)


Made = tuple[Direction | None, Position, Site]
Found = tuple[Tensor | None, Estimate | None, Estimate | None]
"""A vector, its reliability, and where the negative class lies along it."""


@dataclass(frozen=True, eq=False)
class Extraction:
    """What is read where, and how directions are made of it."""

    model: LensModel
    contrast: ContrastSet
    sites: Sequence[Site]
    positions: Sequence[Position]
    method: Method
    seed: int = 0

    def made(self) -> Iterator[Made]:
        """A direction for each position and site, None where the classes do not differ."""
        prompts = hashed([*self.contrast.positive, *self.contrast.negative])
        origin = Provenance.of(self.model, data=self.contrast.hash, seed=self.seed, prompts=prompts)
        about = {"name": self.contrast.label, "provenance": origin, "method": self.method.name}
        found = self._streamed() if self.method.means_over else self._fitted()
        at = product(self.positions, self.sites)
        for (position, site), (vector, reliability, neutral) in zip(at, found, strict=True):
            direction = None
            if vector is not None:
                direction = Direction(vector, site, position, reliability=reliability, neutral=neutral, **about)
            yield direction, position, site

    def _streamed(self) -> Iterator[Found]:
        """Differences of means, from sums."""
        read = {"sites": self.sites, "positions": self.positions, "seed": self.seed}
        moments = class_moments(self.model, self.contrast, by_block=self.method.means_over == "groups", **read)
        if not bool((moments.weight.sum(1) > 0).all()):
            raise _without_pairs(self.contrast)
        size = moments.means.norm(dim=-1).amax(0)
        difference = moments.difference
        equal = difference.norm(dim=-1) <= _ROUNDING * size
        reliability = halved_means(moments, self.seed)
        for p in range(len(self.positions)):
            neutral = neutral_at(moments, p)
            for s in range(len(self.sites)):
                yield None if bool(equal[p, s]) else difference[p, s], reliability[p][s], neutral[s]

    def _fitted(self) -> Iterator[Found]:
        """Fits at each position, on activations that are kept: of as many sites at a time as are held at once."""
        blocks = inseparable(self.contrast)
        parts = dealt(blocks, self.seed)
        encoded = [encoded_prompts(self.model, each) for each in (self.contrast.positive, self.contrast.negative)]
        warn_of_nuisance(self.contrast, [[len(prompt) for prompt in each] for each in encoded])
        found: list[list[Found]] = [[] for _ in self.positions]
        kept = len(self.positions) * sum(map(len, encoded))
        for some in sites_at_once(self.model, self.sites, kept):
            x, y = (captured(self.model, each, some, self.positions).double() for each in encoded)
            part = [torch.tensor([parts[label, i] for i in range(len(each))]) for label, each in enumerate((x, y))]
            if self.method.pairs:
                x, y, part = _by_block(x, y, blocks, parts, self.contrast)
            for p in range(len(self.positions)):
                found[p] += self._at(some, (x[:, p], y[:, p]), part, len(blocks))
        for each in found:
            yield from each

    def _at(
        self, sites: Sequence[Site], classes: tuple[Tensor, Tensor], part: Sequence[Tensor], blocks: int
    ) -> Iterator[Found]:
        """Fits to both classes at one position."""
        vectors = fitted(self.method, *classes, sites)
        cosines = self._halved(sites, classes, part)
        for s, vector in enumerate(vectors):
            if not vector.any():
                yield None, None, None
                continue
            along = [each[:, s].numpy() @ (vector / np.linalg.norm(vector)) for each in classes]
            n = len(classes[0]), len(classes[1])
            reliability = agreement(cosines[:, s], n, blocks, self.seed)
            yield torch.from_numpy(vector), reliability, neutral_z(along[0], along[1])

    def _halved(
        self, sites: Sequence[Site], classes: tuple[Tensor, Tensor], part: Sequence[Tensor]
    ) -> Float[np.ndarray, "half site"]:
        """Cosines between the fits to two halves of the prompts; NaN at a site where a half has no direction."""

        def of(parts: list[int]) -> np.ndarray:
            rows = [torch.isin(each, torch.tensor(parts)) for each in part]
            return fitted(self.method, classes[0][rows[0]], classes[1][rows[1]], sites)

        pairs = list(halves(torch.stack([torch.bincount(each, minlength=PARTS).double() for each in part])))
        chosen = random.Random(self.seed).sample(pairs, min(FIT_HALVES, len(pairs)))
        cosines = np.full((len(chosen), len(sites)), np.nan)
        for row, (first, second) in zip(cosines, chosen, strict=True):
            row[:] = cosine(of(first), of(second))
        cosines[:, np.isnan(cosines).any(0)] = np.nan
        return cosines


def _by_block(
    x: Tensor, y: Tensor, blocks: Blocks, parts: Mapping[tuple[int, int], int], contrast: ContrastSet
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Means of both classes in every pair or group that has both, and the parts that they belong to."""
    means, part = [], []
    for block in blocks:
        rows = [[i for label, i in block if label == wanted] for wanted in (0, 1)]
        if rows[0] and rows[1]:
            means.append((x[rows[0]].mean(0), y[rows[1]].mean(0)))
            part.append(parts[block[0]])
    if not means:
        raise _without_pairs(contrast)
    first, second = (torch.stack(each) for each in zip(*means, strict=True))
    return first, second, [torch.tensor(part)] * 2


def _without_pairs(contrast: ContrastSet) -> EmptyContrastError:
    return EmptyContrastError(
        f"{contrast!r} has no pair or group with prompts of both classes, so there is no difference within one; give "
        "classes of equal length, in the same order, or positive_groups= and negative_groups= that share labels"
    )
