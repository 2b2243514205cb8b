"""How directions lie to each other and to the data, with what chance and noise alone would give.

    cos^2 of a fixed and a random unit vector in d dimensions ~ Beta(1/2, (d - 1)/2)
    principal angles: cos t_i = singular values of Q_a' Q_b, Q orthonormal bases; from their sines where t is small

That control knows the width and nothing else.  Activations vary along few of their axes, so two unrelated *concepts*
are often less than orthogonal; where there are prompts, ``similarity.cosine_matrix`` has the stricter null.

``d' = gap / s`` with ``s`` the pooled within-class standard deviation of the projections (Green & Swets 1966).
Control directions are drawn from the pooled **within-class** covariance ``z' X_c / sqrt(n)``, ``z ~ N(0, I)``: they
point where activations of this site vary anyway, which isotropic noise in a high-dimensional space does not.

Sources: Bjorck & Golub 1973; Knyazev & Argentati 2002 (small angles).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import COUNT, NOUNS, SEED, checked, list_of
from tl_em.directions.direction import Direction, as_directions
from tl_em.errors import NonFiniteError, UsageError, WidthError, ZeroDirectionError
from tl_em.stats import holm, middle_95

Activations = Float[np.ndarray, "prompt d_model"]


def cosine(
    first: Float[np.ndarray, "*#axes d_model"], second: Float[np.ndarray, "*#axes d_model"]
) -> Float[np.ndarray, "*axes"]:
    """Cosine along the last axis.

    Example:
        >>> float(cosine(np.array([1.0, 0.0]), np.array([1.0, 1.0])).round(3))
        0.707
    """
    scale = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray(np.sum(first * second, axis=-1) / np.where(scale > 0, scale, np.nan))


def separation(positive: Float[np.ndarray, " prompt"], negative: Float[np.ndarray, " other"]) -> float:
    """d' of two sets of projections: difference of means over the pooled within-class standard deviation.

    Example:
        >>> round(separation(np.array([4.0, 6.0]), np.array([0.0, 2.0])), 3)
        2.828
    """
    n, m = len(positive), len(negative)
    if n + m < 3:
        return float("nan")
    pooled = (np.var(positive) * n + np.var(negative) * m) / (n + m - 2)
    return float((positive.mean() - negative.mean()) / np.sqrt(pooled)) if pooled > 0 else float("inf")


def control_directions(
    positive: Activations, negative: Float[np.ndarray, "other d_model"], *, count: int, norm: float, seed: Any
) -> Float[np.ndarray, "control d_model"]:
    """Random directions from the pooled within-class covariance, each scaled to the length ``norm``.

    Raises:
        UsageError: the prompts of a class all have the same activation, so there is no covariance to draw from.
    """
    centred = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    draws = np.random.default_rng(seed).standard_normal((count, len(centred))) @ centred
    length = np.linalg.norm(draws, axis=-1, keepdims=True)
    if not (length > 0).all() or not max(np.ptp(x, axis=0).max() for x in (positive, negative)):
        raise UsageError(
            "activations do not vary within the classes, so no control direction can be drawn; pass prompts that "
            "differ in more than the concept"
        )
    return draws / length * norm


@checked(directions=as_directions)
def cosines_between(directions: Sequence[Direction]) -> pd.DataFrame:
    """Cosines between directions that are given, against random vectors of the same width.

    Args:
        directions: two or more, of one width.

    Returns:
        DataFrame with columns first, second, cosine, random (95 % of random vectors stay below it in absolute value)
        and p (two-sided, exact, Holm-adjusted).

    Raises:
        UsageError: fewer than two. WidthError: different widths.

    Example:
        >>> from tl_em.models.sites import Site
        >>> make = lambda *x: Direction(torch.tensor(x), Site(0))
        >>> cosines_between([make(1.0, 0.0, 0.0), make(1.0, 1.0, 0.0)]).cosine.round(3).tolist()
        [0.707]
    """
    from scipy.stats import beta

    if len(directions) < 2:
        raise UsageError(f"{len(directions)} direction(s) have no cosine between them; pass two or more")
    rows = _rows(directions)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    law = beta(0.5, (units.shape[1] - 1) / 2)
    names = [d.name or f"direction {i}" for i, d in enumerate(directions)]
    at = list(combinations(range(len(units)), 2))
    cosine = np.array([np.clip(units[i] @ units[j], -1, 1) for i, j in at])
    return pd.DataFrame(
        {
            "first": [names[i] for i, _ in at], "second": [names[j] for _, j in at], "cosine": cosine,
            "random": float(np.sqrt(law.ppf(0.95))), "p": holm(law.sf(cosine**2)),
        }
    )  # fmt: skip


@checked(controls=COUNT, seed=SEED)
def principal_angles(
    first: Sequence[Direction] | Float[Tensor, "vector d_model"],
    second: Sequence[Direction] | Float[Tensor, "other width"],
    *,
    controls: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Angles between two subspaces, smallest first, beside those between random subspaces of the same dimensions.

    Args:
        first, second: vectors [vector d_model] or directions that span the subspaces; dependent ones count once.
        controls: number of random subspaces.
        seed: seed of the random subspaces.

    Returns:
        DataFrame with columns angle, control_low, control_high (degrees; 95 % of the random subspaces lie between) and
        p (share of random subspaces whose angle of this rank is as small; unadjusted).

    Raises:
        WidthError: different widths. ZeroDirectionError: a zero vector. NonFiniteError: NaN or infinity.

    Example:
        >>> axes = torch.eye(50)
        >>> principal_angles(axes[:2], axes[1:3]).angle.tolist()
        [0.0, 90.0]

    Source: Bjorck & Golub 1973; Knyazev & Argentati 2002.
    """
    from scipy.linalg import orth, subspace_angles

    a, b = _rows(first), _rows(second)
    if a.shape[1] != b.shape[1]:
        raise WidthError(
            f"the subspaces lie in {a.shape[1]} and {b.shape[1]} dimensions, so there is no angle between them; pass "
            "vectors of one model"
        )
    a, b = (orth((x / np.linalg.norm(x, axis=1, keepdims=True)).T) for x in (a, b))
    angles = np.rad2deg(subspace_angles(a, b))[::-1]
    rng = np.random.default_rng(seed)
    random = np.empty((controls, len(angles)))
    for row in random:
        drawn, _ = np.linalg.qr(rng.standard_normal(a.shape))
        row[:] = np.rad2deg(np.arccos(np.clip(np.linalg.svd(b.T @ drawn, compute_uv=False), 0, 1)))
    low, high = middle_95(random, axis=0)
    # Random angles that must be 0 (dimensions that add up to more than the width) are so up to the cosine's rounding.
    as_small = random <= angles + 1e-5
    return pd.DataFrame(
        {"angle": angles, "control_low": low, "control_high": high, "p": (1 + as_small.sum(0)) / (1 + controls)}
    )


def _rows(vectors: Sequence[Direction] | Float[Tensor, "vector d_model"]) -> Float[np.ndarray, "vector d_model"]:
    """Vectors as rows, float64, checked."""
    if not isinstance(vectors, Tensor):
        given = list_of(NOUNS["Direction"])("directions", vectors)
        widths = sorted({len(d.vector) for d in given})
        if len(widths) > 1:
            raise WidthError(f"directions of widths {widths} lie in no common space; pass directions of one model")
        vectors = torch.stack([d.vector for d in given]) if widths else torch.zeros(0, 1)
    rows = vectors.detach().double().cpu().numpy()
    if rows.ndim != 2:
        raise WidthError(f"vectors of shape {rows.shape} are no rows [vector d_model]; pass one as vector[None]")
    if not np.isfinite(rows).all():
        raise NonFiniteError("the vectors hold NaN or infinity, so angles to them mean nothing; look at their source")
    if len(rows) == 0 or not (np.linalg.norm(rows, axis=1) > 0).all():
        raise ZeroDirectionError(
            "a vector of length 0 (or no vector at all) spans nothing, so there is no angle to it; leave it out"
        )
    return rows
