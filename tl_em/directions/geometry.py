"""How directions lie to each other and to the data, with what chance and noise alone would give.

``d' = gap / s`` with ``s`` the pooled within-class standard deviation of the projections (Green & Swets 1966).
A cosine between two noisy estimates cannot exceed what each reaches with itself: the *split-half ceiling* is the mean
cosine of the directions from two random halves of the prompts.
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


def within_class(positive: Activations, negative: Float[np.ndarray, "other d_model"]) -> np.ndarray:
    """Both classes with their own means removed: rows whose covariance is the pooled within-class covariance."""
    return np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])


def control_directions(
    positive: Activations, negative: Float[np.ndarray, "other d_model"], *, count: int, norm: float, seed: int
) -> Float[np.ndarray, "control d_model"]:
    """Random directions from the pooled within-class covariance, each scaled to the length ``norm``.

    Raises:
        UsageError: the prompts of a class all have the same activation, so there is no covariance to draw from.
    """
    centred = within_class(positive, negative)
    draws = np.random.default_rng(seed).standard_normal((count, len(centred))) @ centred
    length = np.linalg.norm(draws, axis=-1, keepdims=True)
    if not (length > 0).all() or not max(np.ptp(x, axis=0).max() for x in (positive, negative)):
        raise UsageError(
            "activations do not vary within the classes, so no control direction can be drawn; pass prompts that "
            "differ "
            "in more than the concept"
        )
    return draws / length * norm


def half_splits(groups: list, *, splits: int, seed: int) -> Float[np.ndarray, "split prompt"]:
    """Random halves of the groups as 0/1 masks over prompts; the other half is ``1 - mask``.

    Example:
        >>> half_splits(["a", "a", "b", "b"], splits=2, seed=0).sum(1).tolist()
        [2.0, 2.0]
    """
    labels, index = np.unique([str(g) for g in groups], return_inverse=True)
    rng = np.random.default_rng(seed)
    masks = np.zeros((splits, len(labels)))
    for mask in masks:
        mask[rng.permutation(len(labels))[: len(labels) // 2]] = 1
    return masks[:, index]


def split_half_reliability(
    positive: Activations, negative: Float[np.ndarray, "other d_model"], *, splits: int = 50, seed: int = 0
) -> float:
    """Mean cosine between the differences in means of two random halves of the prompts.

    Example:
        >>> x = np.eye(4)[[0, 0, 0, 0]]
        >>> split_half_reliability(x, -x)
        1.0
    """
    first = half_splits(list(range(len(positive))), splits=splits, seed=seed)
    second = half_splits(list(range(len(negative))), splits=splits, seed=seed + 1)

    def halves(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        return p @ positive / p.sum(1, keepdims=True) - n @ negative / n.sum(1, keepdims=True)

    return float(np.mean(cosine(halves(first, second), halves(1 - first, 1 - second))))
