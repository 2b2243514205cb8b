"""How likely chance is to give as much, and what asking several questions costs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from tl_em.stats.intervals import vector


def control_p(observed: float, controls: ArrayLike, *, two_sided: bool = True) -> float:
    """Share of controls at least as large as what was observed, the observed one counted in: ``(1 + k) / (1 + n)``.

    Args:
        observed: the effect.
        controls: the same effect under each control.
        two_sided: whether an effect of the other sign counts as large too.

    Example:
        >>> control_p(3.0, [0.1, -0.2, 0.4])
        0.25
    """
    x = vector(controls)
    k = np.sum(np.abs(x) >= abs(observed)) if two_sided else np.sum(x >= observed)
    return float((1 + k) / (1 + len(x)))


def holm(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """Holm's step-down adjustment (statsmodels), which controls the chance of any false claim.

    Args:
        p: one p a test; NaN stays NaN.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    return _adjusted(p, "holm")


def benjamini_hochberg(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """Benjamini and Hochberg's adjustment (statsmodels), which controls the share of false claims.

    Args:
        p: one p a test; NaN stays NaN.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.04, 0.04]
    """
    return _adjusted(p, "fdr_bh")


def _adjusted(p: ArrayLike, method: str) -> np.ndarray:
    from statsmodels.stats.multitest import multipletests

    values = np.atleast_1d(np.asarray(p, dtype=float))
    known = np.isfinite(values)
    adjusted = np.full(values.shape, np.nan)
    if known.any():
        adjusted[known] = multipletests(values[known], method=method)[1]
    return adjusted
