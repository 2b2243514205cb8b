"""Directions that are fitted to single prompts, as functions of both classes' activations at one site.

    pca         u = first right singular vector of the pair differences  x_i - y_i  (not centred)
    logistic    u ~ w of the ridge-penalised logistic regression of the class on x / rms(x)
    lda         u ~ S^-1 (mean(x) - mean(y)),  S the within-class covariance, shrunk (Ledoit & Wolf 2004)

Each is made as long as the classes are apart along it, ``(u'(mean(x) - mean(y))) u``, so that steering with
coefficient 1 moves a prompt from one class's mean to the other's along u, whichever way u was found.

A probe's weights say how a concept is best *read*, not what writes it: they turn away from directions of large
variance that the concept itself moves (Haufe et al. 2014, doi:10.1016/j.neuroimage.2013.10.067).  So for steering and
ablation the difference in means is the default.  Centring pair differences would remove their mean, which is the
concept; the sources that centre do so after giving every pair a random sign, with the same result as here.

**Control**: split-half reliability, and the same fit with the classes shuffled.  Sources: Zou et al. 2023,
arXiv:2310.01405 (PCA of pairs); Marks & Tegmark 2023, arXiv:2310.06824 (mean difference, whitened, and probes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from tl_em.errors import ZeroDirectionError

X = Float[np.ndarray, "prompt d_model"]
Y = Float[np.ndarray, "other d_model"]


def pca(positive: X, negative: X) -> Float[np.ndarray, " d_model"]:
    """First principal direction of the differences of pairs, row by row.

    Example:
        >>> pca(np.array([[3.0, 1.0], [5.0, 0.0]]), np.zeros((2, 2))).round(1).tolist()
        [4.0, 0.4]
    """
    differences = positive - negative
    _, _, rows = np.linalg.svd(differences, full_matrices=False)
    return scaled_to_gap(rows[0], positive, negative)


def logistic(positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
    """Weights of a logistic regression with a ridge penalty of 1 on activations of unit root mean square.

    Example:
        >>> x = np.array([[2.0, 0.0], [2.0, 1.0], [2.0, -1.0]])
        >>> (logistic(x, -x) + 0.0).round(3).tolist()
        [4.0, 0.0]
    """
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([positive, negative])
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    scale = np.sqrt(np.mean((x - x.mean(0)) ** 2)) or 1.0
    weights = LogisticRegression(C=1.0, max_iter=2000, tol=1e-6).fit((x - x.mean(0)) / scale, labels).coef_[0]
    return scaled_to_gap(weights, positive, negative)


def lda(positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
    """The difference in means, whitened by the within-class covariance with Ledoit and Wolf's shrinkage.

    Example:
        >>> noise = np.array([[1.0, 10.0], [-1.0, 10.0], [1.0, -10.0], [-1.0, -10.0]])
        >>> found = lda(np.array([2.0, 2.0]) + noise, noise)
        >>> bool(abs(found[0]) > 4 * abs(found[1]))
        True
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    centred = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    gap = positive.mean(0) - negative.mean(0)
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    variances = values**2 / len(centred)
    if not variances.any():  # no variance to whiten by
        return scaled_to_gap(gap, positive, negative)
    share = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    floor = max(share * variances.sum() / len(gap), 1e-12 * variances[0])
    # The inverse of  (1 - share) S + floor I,  from the singular vectors: S has at most as many as there are prompts.
    weights = gap / floor + rows.T @ ((1 / ((1 - share) * variances + floor) - 1 / floor) * (rows @ gap))
    return scaled_to_gap(weights, positive, negative)


def scaled_to_gap(vector: Float[np.ndarray, " d_model"], positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
    """The vector turned to the positive side, and as long as the classes are apart along it.

    Raises:
        ZeroDirectionError: they are not apart.
    """
    length = np.linalg.norm(vector)
    unit = vector / length if length > 0 else vector
    gap = float(unit @ (positive.mean(0) - negative.mean(0)))
    spread = float(np.abs(np.concatenate([positive, negative])).max())
    if not abs(gap) > 1e-6 * spread:  # below, it is rounding of float32 activations
        raise ZeroDirectionError(
            "the classes have the same mean along the fitted direction, so it has no positive side and no length; "
            "read them at another site or position, or check that their prompts differ"
        )
    return gap * unit


FITS: Mapping[str, Callable[..., Float[np.ndarray, " d_model"]]] = {"pca": pca, "logistic": logistic, "lda": lda}
