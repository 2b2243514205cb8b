"""A logistic probe: ``u ~ w`` of the ridge-penalised logistic regression of the class on ``x / rms(x)``.

A probe's weights say how a concept is best *read*, not what writes it: they turn away from directions of large
variance that the concept itself moves (Haufe et al. 2014, doi:10.1016/j.neuroimage.2013.10.067).  So for steering and
ablation the difference in means is the default.  **Control**: see ``directions.methods.base``.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from tl_em.directions.methods.base import SiteBySite, X, Y, scaled_to_gap


class Logistic(SiteBySite):
    """Weights of a logistic regression, as long as the classes are apart along them.

    Source: Marks & Tegmark 2023, arXiv:2310.06824 (probes).
    """

    name = "logistic"

    @staticmethod
    def fit_one(positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
        """Weights of a logistic regression with a ridge penalty of 1 on activations of unit root mean square.

        Example:
            >>> x = np.array([[2.0, 0.0], [2.0, 1.0], [2.0, -1.0]])
            >>> (Logistic.fit_one(x, -x) + 0.0).round(3).tolist()
            [4.0, 0.0]
        """
        from sklearn.linear_model import LogisticRegression

        x = np.concatenate([positive, negative])
        labels = np.repeat([1, 0], [len(positive), len(negative)])
        scale = np.sqrt(np.mean((x - x.mean(0)) ** 2)) or 1.0
        weights = LogisticRegression(C=1.0, max_iter=2000, tol=1e-6).fit((x - x.mean(0)) / scale, labels).coef_[0]
        return scaled_to_gap(weights, positive, negative)
