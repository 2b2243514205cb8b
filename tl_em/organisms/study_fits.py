"""Curves fitted to a study's table, one seed at a time: a parameter's interval is over seeds, not over points.

    share s    rate = r0 + (r1 - r0) s^g      r0, r1 the rates at shares 0 and 1;  g > 1: less than proportional
    steps n    rate = r1 / (1 + (h / n)^k)    h: the steps at which half of the final rate is reached

Half of the effect of all-bad data is reached at the share .5^(1/g).  **What limits it**: one parameter describes a
whole curve, so the largest residual stands beside it, and few seeds give wide intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tl_em.errors import UsageError
from tl_em.stats import Estimate, mean_over_units

if TYPE_CHECKING:
    import pandas as pd

Points = Float[np.ndarray, " point"]
Fit = Callable[[Points, Points], dict[str, float]]


def fit_study(table: pd.DataFrame, *, x: str, by: Sequence[str], value: str = "bad") -> pd.DataFrame:
    """Fit the curve of a share or of steps to every line of a study.

    Args:
        table: what ``run_study`` returned, with a column ``seed``.
        x: ``"share"`` or ``"steps"``.
        by: columns that name a line.
        value: the column to fit.

    Returns:
        DataFrame with the columns of `by`, then parameter, value, low, high (95 % over seeds), n (seeds). *residual*
        is the largest distance of a point from its curve, the worst of all seeds.

    Raises:
        UsageError: another x, or a share without its two ends.

    Example:
        >>> import pandas as pd
        >>> shares = np.array([0.0, 0.25, 0.5, 1.0])
        >>> rows = [{"arm": "a", "seed": k, "share": s, "bad": 0.1 + 0.5 * s**2} for k in (1, 2) for s in shares]
        >>> fit_study(pd.DataFrame(rows), x="share", by=["arm"]).value.round(3).tolist()
        [0.1, 0.6, 2.0, 0.707, 0.0]
    """
    import pandas as pd

    if x not in _FITS:
        raise UsageError(f"there is a curve for {' and '.join(_FITS)}, not for {x!r}; fit it with scipy.optimize")
    rows = []
    for line, part in table.groupby(list(by), sort=False):
        fits = [
            _FITS[x](each[x].to_numpy(float), each[value].to_numpy(float)) for _, each in part.groupby("seed")
        ]  # fmt: skip
        for parameter in fits[0]:
            values = [fit[parameter] for fit in fits]
            e = mean_over_units(values, range(len(values))) if parameter != "residual" else _worst(values)
            rows.append((*line, parameter, e.value, e.low, e.high, len(fits)))
    return pd.DataFrame(rows, columns=[*by, "parameter", "value", "low", "high", "n"])


def slope(table: pd.DataFrame, *, x: str, over: str, parameter: str, value: str = "bad") -> Estimate:
    """Change of a fitted parameter for each doubling of a size, seed by seed.

    Args:
        table: one line of a study for each size and seed.
        x, value: as for :func:`fit_study`; `over`: the size's column.
        parameter: e.g. ``"half"``.

    Raises:
        UsageError: fewer than two sizes.
    """
    found = []
    for _, part in table.groupby("seed"):
        each = fit_study(part, x=x, by=[over], value=value)
        each = each[each.parameter == parameter]
        if len(each) < 2:
            raise UsageError(f"one {over} has no slope; let the grid hold several")
        found.append(np.polyfit(np.log2(each[over].to_numpy(float)), each["value"].to_numpy(float), 1)[0])
    return mean_over_units(found, range(len(found)))


def _worst(values: Sequence[float]) -> Estimate:
    nan = float("nan")
    return Estimate(max(values), nan, nan, len(values), float(len(values)), "largest of all seeds")


def _share(x: Points, y: Points) -> dict[str, float]:
    from scipy.optimize import minimize_scalar

    if not ({0.0, 1.0} <= set(x.tolist())):
        raise UsageError("the curve of a share starts from its rates at 0 and 1; let the grid hold both")
    first, last = float(y[x == 0].mean()), float(y[x == 1].mean())

    def curve(log: float) -> Points:
        return first + (last - first) * np.where(x > 0, x, 0.0) ** np.exp(log)

    found: Any = minimize_scalar(lambda log: float(((curve(log) - y) ** 2).sum()), bounds=(-3, 3), method="bounded")
    log = float(found.x)
    half = 0.5 ** np.exp(-log)
    residual = float(np.abs(curve(log) - y).max())
    return {"rate at 0": first, "rate at 1": last, "exponent": float(np.exp(log)), "half": half, "residual": residual}


def _steps(x: Points, y: Points) -> dict[str, float]:
    from scipy.optimize import least_squares

    def curve(p: Float[np.ndarray, " parameter"]) -> Points:
        return p[0] / (1 + np.exp(np.exp(p[2]) * (p[1] - np.log(x))))

    start = np.array([y.max(), np.log(np.median(x)), 0.5])
    fit = least_squares(lambda p: curve(p) - y, start, bounds=([0, np.log(x.min()), -2], [1, np.log(x.max()), 3]))
    final, half, steepness = fit.x
    residual = float(np.abs(fit.fun).max())
    return {"final": final, "half": float(np.exp(half)), "steepness": float(np.exp(steepness)), "residual": residual}


_FITS: dict[str, Fit] = {"share": _share, "steps": _steps}
