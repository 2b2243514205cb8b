"""The ways to extract a direction that are shipped, one a file, and the one way to ask for any other."""

from __future__ import annotations

from typing import Any

from tl_em.directions.methods.base import FromFunction, Method
from tl_em.directions.methods.difference_in_means import DifferenceInMeans
from tl_em.directions.methods.lda import Lda
from tl_em.directions.methods.logistic import Logistic
from tl_em.directions.methods.paired import Paired
from tl_em.directions.methods.pca import Pca
from tl_em.errors import UsageError

SHIPPED = {each.name: each for each in (DifferenceInMeans(), Paired(), Pca(), Logistic(), Lda())}
"""By the names that stand for them."""


def as_method(name: str, value: Any) -> Method:
    """``value`` as a method: one, the name of one that is shipped, or a function ``fit(positive, negative)``.

    Raises:
        UsageError: anything else, or a method without a name.

    Example:
        >>> as_method("method", "pca").pairs, as_method("method", max).name
        (True, 'max')
        >>> as_method("method", "magic")
        Traceback (most recent call last):
        ...
        tl_em.errors.UsageError: method='magic': there are the methods ...
    """
    if isinstance(value, str):
        if value not in SHIPPED:
            raise UsageError(
                f"{name}={value!r}: there are the methods {', '.join(SHIPPED)}; pass one of these, or a value of your "
                "own: a subclass of em.Method, or a function fit(positive, negative)"
            )
        return SHIPPED[value]
    fit = getattr(value, "fit", None) or (value if callable(value) else None)
    label = getattr(value, "name", None) or getattr(value, "__name__", None)
    if isinstance(value, type) or fit is None or not isinstance(label, str) or not label:
        raise UsageError(
            f"{name} is {value!r}, which is no way to extract a direction: it needs a name and "
            "fit(positive, negative) over activations [prompt site d_model]; pass an instance of a subclass of "
            "em.Method that says name = '…', or a function with a name"
        )
    return value if isinstance(value, Method) else FromFunction(fit, label)
