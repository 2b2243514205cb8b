"""How far a direction's own data support it: two numbers that come with every extracted direction.

reliability   the cosine between the directions of two halves of the prompts (groups stay whole); near 0 it is noise
neutral       where the negative class lies along it, in standard deviations of both classes; far from 0, ablation
              to zero moves prompts that have nothing to do with the concept
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.models.class_means import PARTS, ClassMoments, halves
from tl_em.stats import Estimate

# --- Two halves -------------------------------------------------------------------------------------------------------


def halved_means(moments: ClassMoments, seed: int) -> list[list[Estimate | None]]:
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
    return [[agreement(cosines[p, s], moments.n, moments.blocks, seed) for s in range(sites)] for p in range(positions)]


def agreement(values: Float[np.ndarray, " half"], n: tuple[int, int], blocks: int, seed: int) -> Estimate | None:
    """Mean and range of the cosines between the directions of two halves."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    # The central 95 %, as np.quantile interpolates, which takes ten times as long for a few values.
    at = np.array([0.025, 0.975]) * (len(values) - 1)
    low, high = np.interp(at, np.arange(len(values)), np.sort(values)).tolist()
    method = f"cosine of the directions of two halves, mean and range of {len(values)} ways to halve"
    return Estimate(float(values.mean()), low, high, sum(n), float(blocks), method, seed)


# --- Where the negative class lies ------------------------------------------------------------------------------------


def neutral_at(moments: ClassMoments, p: int) -> list[Estimate | None]:
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
