"""Linear discriminant analysis: ``u ~ S^-1 (mean(x) - mean(y))``, S the within-class covariance, shrunk.

The shrinkage is Ledoit and Wolf's (2004).  As every probe this is how a concept is best *read*; see
``directions.methods.logistic``.  **Control**: see ``directions.methods.base``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tl_em.directions.methods.base import SiteBySite, X, Y, scaled_to_gap


class Lda(SiteBySite):
    """The difference in means, whitened, as long as the classes are apart along it.

    Source: Marks & Tegmark 2023, arXiv:2310.06824 (mean difference, whitened).
    """

    name = "lda"

    @staticmethod
    def fit_one(positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
        """The difference in means, whitened by the within-class covariance with Ledoit and Wolf's shrinkage.

        Example:
            >>> noise = np.array([[1.0, 10.0], [-1.0, 10.0], [1.0, -10.0], [-1.0, -10.0]])
            >>> found = Lda.fit_one(np.array([2.0, 2.0]) + noise, noise)
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
        # The inverse of  (1 - share) S + floor I,  from the singular vectors: S has no more of them than prompts.
        weights = gap / floor + rows.T @ ((1 / ((1 - share) * variances + floor) - 1 / floor) * (rows @ gap))
        return scaled_to_gap(weights, positive, negative)
