"""How likely chance is to give what was found: swapped labels, several behaviours at once, overlapping lists.

    labels        P(|sum s_u d_u| >= |sum d_u|), s_u random signs of the parts u of the prompts
    conjunction   p of "not in at least u of B behaviours" = Fisher's combination of the B - u + 1 largest p
    overlap       latents permuted within bins of density, in each behaviour on its own

Swapping labels within pairs gives a sum of parts random signs, and its tail is then never above 3.18 times the
normal's: so the p of all 2^n swaps is bounded in closed form, however small it is.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.stats import control_p

_TAIL = 3.178
"""1 / (4 P(Z > sqrt 2)), the best constant there is."""
_EXACT = 12
"""Parts up to which all 2^n sign flips are counted."""
TOP = 20
"""Length of a behaviour's list, at most: a twentieth of the latents that are ever on where that is less."""
BINS, BIN = 10, 40
"""Bins of density, at most; and latents in each, at least: one of 40 is below a p of .05."""
DRAWS = 999


def sign_flip_p(parts: Float[Tensor, "part *axes"]) -> np.ndarray:
    """Two-sided p of "every part is as likely as its negative", over all sign flips at once.

        p <= 2 * 3.178 * P(Z > |sum d| / sqrt(sum d^2))

    With at most 12 parts that are not zero the flips are counted instead, and p is exact.

    Example:
        >>> sign_flip_p(torch.ones(40, 1)).item() < 1e-8, sign_flip_p(torch.tensor([[1.0], [-1.0]])).item()
        (True, 1.0)

    Source: Bentkus and Dzindzalieta 2015, arXiv:1307.3451, theorem 1.
    """
    from scipy.stats import norm

    d = parts.double()
    d = d[(d != 0).flatten(1).any(1)]
    if len(d) <= _EXACT:
        return _counted(d).numpy()
    z = d.sum(0).abs() / d.square().sum(0).sqrt().clamp_min(1e-300)
    return np.minimum(1.0, 2 * _TAIL * norm.sf(z.numpy()))


def _counted(d: Float[Tensor, "part *axes"]) -> Float[Tensor, "*axes"]:
    """Share of all sign flips whose sum is at least as far from 0 as the observed one."""
    n = max(len(d) - 1, 0)  # the first part keeps its sign: flipping all changes no distance
    flips = 1.0 - 2.0 * ((torch.arange(2**n)[:, None] >> torch.arange(n)) & 1).double()
    first = d[:1].flatten(1)
    sums = flips @ d[1:].flatten(1) + (first if len(d) else 0.0)
    far = sums.abs() >= d.sum(0).flatten().abs() * (1 - 1e-9)
    return far.double().mean(0).reshape(d.shape[1:])


def conjunction_p(
    p: Float[np.ndarray, "behaviour feature"], least: int, *, independent: bool = True
) -> Float[np.ndarray, " feature"]:
    """p of "not in at least so many behaviours"; Bonferroni's (B - u + 1) p_(u) where they are not independent.

    Example:
        >>> p = np.array([[0.01], [0.02], [0.5]])
        >>> conjunction_p(p, 3).round(3).tolist(), conjunction_p(p, 2).round(3).tolist()
        ([0.5], [0.056])

    Source: Benjamini and Heller 2008, "Screening for partial conjunction hypotheses".
    """
    from scipy.stats import chi2

    largest = np.sort(p, axis=0)[least - 1 :]
    if not independent:
        return np.minimum(1.0, len(largest) * largest[0])
    return chi2.sf(-2 * np.log(np.maximum(largest, 1e-300)).sum(0), 2 * len(largest))


def density_bins(density: Float[np.ndarray, " feature"]) -> Int[np.ndarray, " feature"]:
    """Bins of equal size by density; -1 for latents that are never on."""
    alive = np.flatnonzero(density > 0)
    bins = np.full(len(density), -1)
    count = max(1, min(BINS, len(alive) // BIN))
    ranks = np.argsort(np.argsort(density[alive], kind="stable"), kind="stable")
    bins[alive] = ranks * count // max(1, len(alive))
    return bins


def overlap_p(
    sizes: Float[Tensor, "behaviour feature"], bins: Int[np.ndarray, " feature"], rng: np.random.Generator
) -> float:
    """p of as many latents in the top k of every behaviour, with one sign, when latents are permuted within bins.

    Latents that are on everywhere head every list, and count for little among their like.

    Args:
        sizes: by how much each latent changed, in units of the activations (change times length of its decoder row).
        bins: density bin of each latent, -1 for those that are never on.
        rng: of the permutations.

    Source: Marks et al. 2025, arXiv:2503.10965 (the intersection of top-20 lists, there without a null).
    """
    alive = np.flatnonzero(bins >= 0)
    k = max(1, min(TOP, len(alive) // TOP))
    z = sizes[:, alive].numpy()
    listed = np.zeros(z.shape)
    for row, top in zip(listed, np.argsort(-np.abs(z), axis=1)[:, :k], strict=True):
        row[top] = 1
    listed *= np.sign(z)

    def overlap(signs: np.ndarray) -> int:
        return int((np.abs(signs.sum(0)) == len(signs)).sum())

    order = np.argsort(bins[alive], kind="stable")
    listed, edges = listed[:, order], np.flatnonzero(np.diff(bins[alive][order])) + 1
    drawn = [
        overlap(np.concatenate([rng.permuted(each, axis=1) for each in np.split(listed, edges, axis=1)], 1))
        for _ in range(DRAWS)
    ]
    return control_p(float(overlap(listed)), drawn, two_sided=False)
