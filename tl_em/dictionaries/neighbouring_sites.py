"""A dictionary read at the points next to its own, on some tokens: was it trained where it is read?

    FVU at p = sum |y - y^(x_p)|^2 / sum |y - mean y|^2        x_p what lies at p; y what it writes (of an SAE: x_p too)

The points are the block's streams, what its MLP reads before the norm's weight, and the residual stream after the
blocks next to it. All are read in the pass that reads the dictionary's own point.

The control: a dictionary at its own point has no neighbour that is better by the rule
(tests/dictionaries/test_neighbouring_sites.py).

Source: FVU, Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.checks import check_sites
from tl_em.dictionaries.norms import Norm, mlp_norm
from tl_em.errors import TlEmError, UnknownHookError, UsageError
from tl_em.models.hooks import LensModel, read_point
from tl_em.models.sites import Site, Stream

TOKENS = 1024
"""Tokens that the points are compared on; a difference of MARGIN shows on far fewer."""
BEFORE_WEIGHT = " before the norm's weight"


class Nearby(NamedTuple):
    """A point, and the share of the variance that is not explained there.

    Args:
        where: the site, in words; also ``"mlp_in[3] before the norm's weight"``.
        fvu: share of the variance.
        site: the site.
    """

    where: str
    fvu: float
    site: Site | None = None

    def __str__(self) -> str:
        return f"{self.where} (FVU {self.fvu:.2f})"


class _Moments:
    """Sums over tokens for one FVU."""

    def __init__(self, width: int) -> None:
        self.error = self.square = 0.0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def add(self, y: Float[Tensor, "token d_model"], said: Float[Tensor, "token d_model"]) -> None:
        self.error += float((y - said).double().square().sum())
        self.square += float(y.double().square().sum())
        self.total += y.double().sum(0).cpu()
        self.tokens += len(y)

    @property
    def fvu(self) -> float:
        spread = self.square - float(self.total.square().sum()) / max(1, self.tokens)
        return self.error / spread if spread > 1e-9 * max(self.square, 1e-30) else float("inf")


class Neighbours:
    """Accumulates the FVU of a dictionary at its own point and around it."""

    def __init__(self, model: LensModel, dictionary: Dictionary, *, difference: bool) -> None:
        self.dictionary, own = dictionary, dictionary.site_in
        block = [Site(own.layer, stream) for stream in get_args(Stream)]
        beside = [Site(layer) for layer in (own.layer - 1, own.layer + 1) if 0 <= layer < int(model.cfg.n_layers)]
        around = [each for each in (*block, *beside) if each != own and _readable(model, dictionary, each)]
        self.sites = [own, *around]
        self._norm = _norm(model, own.layer) if Site(own.layer, "mlp_in") in self.sites else None
        self._difference = difference  # a bias drops out of a difference
        self._moments: dict[str, tuple[Site, _Moments]] = {}
        self._seen = 0

    def add(self, x: Mapping[Site, Float[Tensor, "token d_model"]], y: Float[Tensor, "token d_model"]) -> None:
        """Tokens: what lies at each site, and what the dictionary writes."""
        left = TOKENS - self._seen
        if left <= 0:
            return
        self._seen += min(left, len(y))
        for site in self.sites:
            here = x[site][:left]
            points = {str(site): here}
            if site.stream == "mlp_in" and self._norm is not None:
                weight, bias = (each.to(here.device) for each in self._norm)
                points[f"{site}{BEFORE_WEIGHT}"] = (here if self._difference else here - bias) / weight
            for where, read in points.items():
                target = y[:left] if self.dictionary.is_transcoder else read
                _, held = self._moments.setdefault(where, (site, _Moments(self.dictionary.d_model)))
                held.add(target, self.dictionary.reconstruct(read))

    def found(self) -> tuple[Nearby, ...]:
        """Its own point first, the others by their FVU."""
        points = [Nearby(where, held.fvu, site) for where, (site, held) in self._moments.items()]
        return (*points[:1], *sorted(points[1:], key=lambda each: each.fvu))


def _readable(model: LensModel, dictionary: Dictionary, site: Site) -> bool:
    """Whether the model has the site, before what a transcoder writes."""
    try:
        read_point(model, site)
        if dictionary.is_transcoder:
            check_sites(site, dictionary.site_out, dictionary.W_skip is not None)
    except (UnknownHookError, UsageError):
        return False
    return True


def _norm(model: LensModel, layer: int) -> Norm | None:
    """The norm's weight and bias, where there are any that change something."""
    try:
        norm = mlp_norm(model, layer)
    except TlEmError:
        return None
    trivial = bool((norm.weight == 1).all()) and bool((norm.bias == 0).all())
    return None if trivial else norm
