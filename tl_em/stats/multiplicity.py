"""How likely chance is to give as much, and what asking several questions costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.stats import false_discovery_control

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
    """Holm's step-down adjustment, which controls the chance of any false claim.

    Args:
        p: one p a test; NaN stays NaN.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    return _adjusted(p, _step_down)


def benjamini_hochberg(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """Benjamini and Hochberg's adjustment (scipy), which controls the share of false claims.

    Args:
        p: one p a test; NaN stays NaN.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.04, 0.04]
    """
    return _adjusted(p, false_discovery_control)


def _step_down(p: np.ndarray) -> np.ndarray:
    order = np.argsort(p)
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return found


def _adjusted(p: ArrayLike, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    values = np.atleast_1d(np.asarray(p, dtype=float))
    known = np.isfinite(values)
    adjusted = np.full(values.shape, np.nan)
    adjusted[known] = adjust(values[known])
    return adjusted
