"""How directions lie to each other and to the data, with what chance and noise alone would give.

``d' = gap / s`` with ``s`` the pooled within-class standard deviation of the projections (Green & Swets 1966).
Control directions are drawn from the pooled **within-class** covariance ``z' X_c / sqrt(n)``, ``z ~ N(0, I)``: they
point where activations of this site vary anyway, which isotropic noise in a high-dimensional space does not.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tl_em.errors import UsageError

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
    positive: Activations, negative: Float[np.ndarray, "other d_model"], *, count: int, norm: float, seed: int
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
