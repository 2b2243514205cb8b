"""What a way to extract a direction is: a value with a name and one method, over the activations of both classes.

    fit: positive [prompt site d_model], negative [other site d_model]  ->  vector [site d_model]

The framework reads the activations, fits again on halves of the prompts (reliability), says where the negative class
lies along what was found (neutral), and refuses what is no direction.  **Control**: reliability, and the same fit with
the classes shuffled; that a direction causes anything is shown by an intervention on other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_em.arguments import array_of
from tl_em.errors import NonFiniteError, WidthError
from tl_em.models.sites import Site

X = Float[np.ndarray, "prompt d_model"]
Y = Float[np.ndarray, "other d_model"]


class Method:
    """A way to extract a direction: subclass it, give it a ``name``, and write ``fit``.

    What may be said besides, each with a default:

    - ``pairs``: whether ``fit`` needs pairs. It is then given the means of both classes in every pair (or group) that
      has both, row by row the same one.
    - ``means_over``: ``"prompts"`` or ``"groups"`` where the vector is nothing but the difference of the classes'
      means, every prompt or every group counting once; it is then taken from sums, in memory that does not grow with
      the prompts, and ``fit`` is not called.

    Example:
        >>> class MedianDifference(Method):
        ...     name = "median difference"
        ...     def fit(self, positive, negative):
        ...         return positive.median(0).values - negative.median(0).values
        >>> MedianDifference().fit(torch.ones(3, 1, 2), torch.zeros(5, 1, 2)).tolist()
        [[1.0, 1.0]]

    Source: the classes' activations in, a vector out, as in Marks & Tegmark 2023, arXiv:2310.06824.
    """

    name: str
    pairs: bool = False
    means_over: Literal["prompts", "groups"] | None = None

    def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The vector at every site.

        Args:
            positive: [prompt site d_model], float64 on the CPU, in the units of the activations.
            negative: [other site d_model].

        Returns:
            [site d_model]; its length is what steering with coefficient 1 adds. Zeros where there is no direction.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FromFunction(Method):
    """A plain function of both classes' activations as a method.

    Args:
        fit_with: as ``Method.fit``.
        name: what people call it.
    """

    fit_with: Callable[[Tensor, Tensor], Any]
    name: str

    def fit(self, positive: Tensor, negative: Tensor) -> Any:
        return self.fit_with(positive, negative)


def fitted(
    method: Method, positive: Tensor, negative: Tensor, sites: Sequence[Site]
) -> Float64[np.ndarray, "site d_model"]:
    """What ``method.fit`` gives, looked at.

    Raises:
        WidthError: another shape than [site d_model]. NonFiniteError: NaN or infinity. UsageError: no numbers.
    """
    found, who = method.fit(positive, negative), f"method {method.name!r}"
    vectors = array_of(tuple(positive.shape[1:]), found, who, wanted=_WANTED, error=WidthError)
    bad = np.flatnonzero(~np.isfinite(vectors).all(-1))
    if len(bad):
        raise NonFiniteError(
            f"{who} returned NaN or infinity at {sites[bad[0]]}, where the activations hold neither, "
            f"so every projection would be; {_WANTED}"
        )
    return vectors


_WANTED = "let fit(positive, negative) return a finite tensor [site d_model]"


class SiteBySite(Method):
    """A method that is fitted to arrays of both classes, at one site after the other."""

    def fit(self, positive: Tensor, negative: Tensor) -> Tensor:
        columns = zip(positive.unbind(1), negative.unbind(1), strict=True)
        return torch.from_numpy(np.stack([self.fit_one(x.numpy(), y.numpy()) for x, y in columns]))

    @staticmethod
    def fit_one(positive: X, negative: Any) -> Float[np.ndarray, " d_model"]:
        """The vector at one site."""
        raise NotImplementedError


def scaled_to_gap(vector: Float[np.ndarray, " d_model"], positive: X, negative: Y) -> Float[np.ndarray, " d_model"]:
    """The vector turned to the positive side, and as long as the classes are apart along it; 0 where they are not.

    So steering with coefficient 1 moves a prompt from one class's mean to the other's along it, however it was found.
    """
    length = np.linalg.norm(vector)
    unit = vector / length if length > 0 else vector
    gap = float(unit @ (positive.mean(0) - negative.mean(0)))
    spread = float(np.abs(np.concatenate([positive, negative])).max())
    return gap * unit if abs(gap) > 1e-6 * spread else 0 * unit  # below, it is rounding of float32 activations
