"""Directions from contrast sets, at any sites and positions at once, each with how far its own data support it.

    difference_in_means   mean(positive) - mean(negative)
    paired                mean over pairs (or groups) of (mean positive in it - mean negative in it)
    pca, logistic, lda    see ``directions.fits``

Difference in means is the direction that most shifts a mean, and the one for which ablation and addition have been
shown to work causally (Arditi et al. 2024, arXiv:2406.11717, section 2.3; Belrose 2023).  The first two come from one
streaming pass whose memory does not grow with the prompts; the others keep the activations that they are fitted to.

**Control.**  A direction describes its data until an intervention on held-out prompts says otherwise.  Two numbers come
with each: *reliability*, the cosine between the directions of two halves of the prompts (every way to halve eight
parts; groups stay whole): near 0 it is noise; and *neutral*, where the negative class lies along it, in standard
deviations: far from 0, ablation to zero moves prompts that have nothing to do with the concept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import SEED, checked, optional
from tl_em.directions.direction import Direction
from tl_em.directions.fits import FITS
from tl_em.directions.geometry import cosine
from tl_em.errors import EmptyContrastError, UsageError, ZeroDirectionError
from tl_em.models.contrasts import ContrastSet, inseparable, warn_of_nuisance
from tl_em.models.hooks import LensModel
from tl_em.models.means import PARTS, Blocks, ClassMoments, as_contrast, class_moments, dealt, halves
from tl_em.models.modes import in_plain_torch
from tl_em.models.sites import Position, Provenance, Site, as_position, as_positions, as_site, as_sites
from tl_em.models.stream import captured, encoded_prompts
from tl_em.stats import Estimate

Method = Literal["difference_in_means", "paired", "pca", "logistic", "lda"]
STREAMED = ("difference_in_means", "paired")
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

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    return extract_directions(model, contrast, sites=[site], positions=[position])[0]


@checked(contrast=as_contrast, sites=optional(as_sites), positions=as_positions, seed=SEED)
@in_plain_torch
def extract_directions(
    model: LensModel,
    contrast: ContrastSet,
    *,
    sites: Sequence[Site] | None = None,
    positions: Sequence[Position] = ("prompt_end",),
    method: Method | str = "difference_in_means",
    seed: int = 0,
) -> tuple[Direction, ...]:
    """The direction of a contrast set at every position and site, from one pass over the prompts.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: the two classes of prompts.
        sites: where to read; ``None``: the residual stream after every block.
        positions: at which tokens; ``"response_mean"`` and ``"all"`` are means over tokens.
        method: how: ``"difference_in_means"``; ``"paired"``, in which every group (or pair) counts once, and those
            without both classes not at all; ``"pca"`` of the differences of pairs; ``"logistic"`` or ``"lda"``: probes,
            which are for reading rather than for steering.
        seed: of the parts that the prompts are halved by.

    Returns:
        Directions, positions outermost; ``.reliability`` and ``.neutral`` are None where there are too few prompts.

    Raises:
        ZeroDirectionError: the classes do not differ at some position and site.
        EmptyContrastError: a method that needs pairs, and none has both classes.
        UsageError: no such method, or positions that are no list. NonFiniteError, PositionError: as ``capture``.

    Example:
        >>> from tl_em.organisms.zoo import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> found = extract_directions(pair.base, pair.contrasts["persona"], method="lda")
        >>> [str(d.site) for d in found], bool(found[-1].reliability.value > 0.9)
        (['resid_post[0]', 'resid_post[1]', 'resid_post[2]'], True)

    Source: Arditi et al. 2024, arXiv:2406.11717; Zou et al. 2023, arXiv:2310.01405; Marks & Tegmark 2023,
    arXiv:2310.06824.
    """
    if method not in get_args(Method):
        raise UsageError(f"method={method!r}: there are the methods {', '.join(get_args(Method))}")
    sites = [Site(layer) for layer in range(int(model.cfg.n_layers))] if sites is None else list(sites)
    found = streamed(model, contrast, sites, positions, method, seed) if method in STREAMED else None
    made = list(found) if found is not None else list(_fitted(model, contrast, sites, positions, method, seed))
    for direction, position, site in made:
        if direction is None:
            raise ZeroDirectionError(
                f"the means of both classes are equal at {site}, {position!r}, so there is no direction; read at a "
                "position after the words in which the prompts differ, or check that they differ"
            )
    return tuple(direction for direction, _, _ in made if direction is not None)


Made = tuple[Direction | None, Position, Site]


def streamed(
    model: LensModel,
    contrast: ContrastSet,
    sites: Sequence[Site],
    positions: Sequence[Position],
    method: str = "difference_in_means",
    seed: int = 0,
) -> Iterator[Made]:
    """Differences of means, None where the means are equal."""
    moments = class_moments(model, contrast, sites=sites, positions=positions, by_block=method == "paired", seed=seed)
    if not bool((moments.weight.sum(1) > 0).all()):
        raise EmptyContrastError(_no_pairs(contrast))
    size = moments.means.norm(dim=-1).amax(0)
    difference = moments.difference
    equal = difference.norm(dim=-1) <= _ROUNDING * size
    origin = Provenance.of(model, data=contrast.hash, seed=seed)
    reliability = _halved_means(moments, seed)
    for p, position in enumerate(positions):
        neutral = _neutral(moments, p)
        for s, site in enumerate(sites):
            if bool(equal[p, s]):
                yield None, position, site
                continue
            yield (
                Direction(
                    difference[p, s],
                    site,
                    position=position,
                    name=contrast.label,
                    provenance=origin,
                    method=method,
                    reliability=reliability[p][s],
                    neutral=neutral[s],
                ),
                position,
                site,
            )


def _halved_means(moments: ClassMoments, seed: int) -> list[list[Estimate | None]]:
    """The reliability of the difference in means at each position and site.

    The direction of a half is a combination of the sums of its parts, so all products of halves are combinations of the
    products of parts.
    """
    positions, sites = moments.total.shape[2:4]
    pairs = list(halves(moments.weight))
    chosen = torch.tensor(
        [[[float(part in pair[half]) for part in range(PARTS)] for pair in pairs] for half in (0, 1)],
        dtype=torch.float64,
    ).view(2, -1, PARTS)
    share = chosen[:, :, None] / (chosen @ moments.weight.T)[..., None]  # [half pair label part]
    first, second = (share * torch.tensor([1.0, -1.0])[:, None]).flatten(2)
    # About a common centre, which every direction is free of: else the products would lose their last digits.
    spread = moments.total - moments.weight[:, :, None, None, None] * moments.means.mean(0)
    parts = spread.flatten(0, 1).permute(1, 2, 0, 3)
    products = parts @ parts.mT

    def product(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ products) * b).sum(-1)

    cosines = (product(first, second) / (product(first, first) * product(second, second)).sqrt()).numpy()
    return [
        [_agreement(cosines[p, s], moments.n, moments.blocks, seed) for s in range(sites)] for p in range(positions)
    ]


def _agreement(values: Float[np.ndarray, " half"], n: tuple[int, int], blocks: int, seed: int) -> Estimate | None:
    """Mean and range of the cosines between the directions of two halves."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = _quantiles(values)
    method = f"cosine of the directions of two halves, mean and range of {len(values)} ways to halve"
    return Estimate(float(values.mean()), low, high, sum(n), float(blocks), method, seed)


def _quantiles(values: Float[np.ndarray, " half"]) -> tuple[float, float]:
    """The central 95 %, as ``np.quantile`` interpolates, which takes ten times as long for a few values."""
    at = np.array([0.025, 0.975]) * (len(values) - 1)
    low, high = np.interp(at, np.arange(len(values)), np.sort(values))
    return float(low), float(high)


# --- Where the negative class lies ------------------------------------------------------------------------------------


def _neutral(moments: ClassMoments, p: int) -> list[Estimate | None]:
    """Where the negative class lies along the difference in means at each site, at one position."""
    difference = moments.means[0, p] - moments.means[1, p]
    units = difference / difference.norm(dim=-1, keepdim=True)
    along = [(each[:, p].double() * units).sum(-1).T.numpy() for each in moments.sample]
    means = (moments.means[1, p] * units).sum(-1).tolist()
    sizes = (len(along[0][0]), len(along[1][0]))
    if min(sizes) < 3:
        return [None] * len(means)
    spread = [each.var(-1, ddof=1).tolist() for each in along]
    gap = (along[0].mean(-1) - along[1].mean(-1)).tolist()
    columns = zip(means, gap, *spread, strict=True)
    return [_z(centre, by, var_p, var_n, moments.n[1], sum(sizes)) for centre, by, var_p, var_n in columns]


def neutral_z(positive: Float[np.ndarray, " prompt"], negative: Float[np.ndarray, " other"]) -> Estimate | None:
    """Mean projection of the negative class over the standard deviation of all projections, both classes counting
    equally; None with fewer than three prompts in a class.

    Args:
        positive, negative: projections on the unit vector.

    Example:
        >>> neutral_z(np.array([9.0, 10.0, 11.0]), np.array([-1.0, 0.0, 1.0]))
        0.00 [-0.31, 0.31] n=3
    """
    if min(len(positive), len(negative)) < 3:
        return None
    gap, spread = float(positive.mean() - negative.mean()), (float(positive.var(ddof=1)), float(negative.var(ddof=1)))
    return _z(float(negative.mean()), gap, spread[0], spread[1], len(negative), len(positive) + len(negative))


def _z(centre: float, gap: float, positive: float, negative: float, n: int, m: int) -> Estimate | None:
    """``neutral_z`` of the negative mean over n prompts, and of the gap and the variances in m prompts of both."""
    total = math.sqrt((positive + negative) / 2 + gap**2 / 4)
    if not total > 0 or not math.isfinite(centre):
        return None
    z = centre / total
    # Delta method: the mean's own error, and the relative error of a standard deviation of m - 2 degrees of freedom.
    error = math.sqrt(negative / n / total**2 + z**2 / (2 * (m - 2)))
    half = _quantile(m - 2) * error
    return Estimate(z, z - half, z + half, n, float(n), f"delta method, standard deviation from {m} prompts")


@cache
def _quantile(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


# --- Fitted -----------------------------------------------------------------------------------------------------------


def _fitted(
    model: LensModel,
    contrast: ContrastSet,
    sites: Sequence[Site],
    positions: Sequence[Position],
    method: str,
    seed: int,
) -> Iterator[Made]:
    """Fits at each position and site, on activations that are kept."""
    blocks = inseparable(contrast)
    parts = dealt(blocks, seed)
    encoded = [encoded_prompts(model, prompts) for prompts in (contrast.positive, contrast.negative)]
    warn_of_nuisance(contrast, [[len(prompt) for prompt in each] for each in encoded])
    x, y = (captured(model, each, sites, positions).double() for each in encoded)
    part = [torch.tensor([parts[label, i] for i in range(len(each))]) for label, each in enumerate((x, y))]
    if method == "pca":
        x, y, part = _by_block(x, y, blocks, parts, contrast)
    weight = torch.stack([torch.bincount(each, minlength=PARTS).double() for each in part])
    pairs = list(halves(weight))
    chosen = random.Random(seed).sample(pairs, min(FIT_HALVES, len(pairs)))
    origin = Provenance.of(model, data=contrast.hash, seed=seed)
    for p, position in enumerate(positions):
        for s, site in enumerate(sites):
            classes = x[:, p, s].numpy(), y[:, p, s].numpy()
            vector, reliability = _fit(FITS[method], classes, part, chosen, len(blocks), seed)
            if vector is None:
                yield None, position, site
                continue
            along = [each @ (vector / np.linalg.norm(vector)) for each in classes]
            yield (
                Direction(
                    torch.from_numpy(vector),
                    site,
                    position=position,
                    name=contrast.label,
                    provenance=origin,
                    method=method,
                    reliability=reliability,
                    neutral=neutral_z(along[0], along[1]),
                ),
                position,
                site,
            )


def _fit(
    fit: Callable[..., np.ndarray],
    classes: tuple[np.ndarray, np.ndarray],
    part: Sequence[Tensor],
    pairs: Sequence[tuple[list[int], list[int]]],
    blocks: int,
    seed: int,
) -> tuple[np.ndarray | None, Estimate | None]:
    """The fit to all prompts, and the agreement of the fits to their halves."""

    def of(parts: list[int]) -> np.ndarray:
        rows = [np.isin(each.numpy(), parts) for each in part]
        return fit(classes[0][rows[0]], classes[1][rows[1]])

    try:
        vector = fit(*classes)
    except ZeroDirectionError:
        return None, None
    try:
        found = [(of(first), of(second)) for first, second in pairs]
    except ZeroDirectionError:
        found = []
    values = np.array([float(cosine(first, second)) for first, second in found])
    return vector, _agreement(values, (len(classes[0]), len(classes[1])), blocks, seed)


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
        raise EmptyContrastError(_no_pairs(contrast))
    first, second = (torch.stack(each) for each in zip(*means, strict=True))
    return first, second, [torch.tensor(part)] * 2


def _no_pairs(contrast: ContrastSet) -> str:
    return (
        f"{contrast!r} has no pair or group with prompts of both classes, so there is no difference within one; give "
        "classes of equal length, in the same order, or positive_groups= and negative_groups= that share labels"
    )
