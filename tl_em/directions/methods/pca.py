"""PCA of pairs: the first right singular vector of the pair differences  x_i - y_i,  not centred.

Centring pair differences would remove their mean, which is the concept; the sources that centre do so after giving
every pair a random sign, with the same result as here.  **Control**: see ``directions.methods.base``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tl_em.directions.methods.base import SiteBySite, X, scaled_to_gap


class Pca(SiteBySite):
    """First principal direction of the differences of pairs, as long as the classes are apart along it.

    Source: Zou et al. 2023, arXiv:2310.01405.
    """

    name = "pca"
    pairs = True

    @staticmethod
    def fit_one(positive: X, negative: X) -> Float[np.ndarray, " d_model"]:
        """First principal direction of the differences of pairs, row by row.

        Example:
            >>> Pca.fit_one(np.array([[3.0, 1.0], [5.0, 0.0]]), np.zeros((2, 2))).round(1).tolist()
            [4.0, 0.4]
        """
        differences = positive - negative
        _, _, rows = np.linalg.svd(differences, full_matrices=False)
        return scaled_to_gap(rows[0], positive, negative)
