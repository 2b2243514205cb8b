"""Cosines between the directions of several contrast sets, with the ceiling that noise sets and the null of chance.

    cosine    cos(a, b),  a and b the differences in means of two contrast sets at one site
    ceiling   sqrt(q_a q_b),  q = 2r / (1 + r),  r the mean cosine between the directions of two random halves of a set
    null      the cosine of the differences in means of relabelled residuals (each class less its own mean)

r is the reliability of a direction from *half* of the prompts, ``|g|^2 / (|g|^2 + 2N)`` with g the true difference and
N the sampling variance of the estimated one; Spearman and Brown's formula turns it into that of all prompts, q =
``|g|^2 / (|g|^2 + N)``, and sqrt(q_a q_b) is the cosine that two sets with the *same* true direction would show.  Sets
that share prompts share noise too: their cosine may lie above the ceiling.

Relabelling draws signs for units with prompts of both classes (pairs, questions), permutes the classes of the other
units, and treats a unit that two sets share alike in both: what common prompts alone would give is no evidence.  Class
means are removed first, because relabelled raw activations differ along the gap itself, and the null of two strong
directions would be their own cosine.  So p asks what directions without a meaning would show where activations vary as
they do here; whether two concepts are the same, the ceiling says.

Resampling adds the sampling noise a second time, which lowers every cosine that is drawn; the drawn lengths and
products are therefore less the squares of each unit's own change, whose mean is that noise.

Sources: Spearman 1904 and 1910, Brown 1910 (attenuation, halves); Freedman & Lane 1983 (permuting residuals).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tl_em.arguments import COUNT, SEED, checked
from tl_em.directions.cosines import Rows, Two, reliability
from tl_em.errors import UsageError, ZeroDirectionError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Site, as_site
from tl_em.models.stream import capture
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import check_names, showable
from tl_em.stats import Estimate, control_p, holm

_ROUNDING = 1e-6
"""A difference of means that is smaller than this share of the activations is rounding of float32 activations."""


class PairCosine(NamedTuple):
    """The cosine between the directions of two contrast sets.

    Args:
        first, second: names of the sets.
        estimate: the cosine, its interval clustered by question or pair.
        ceiling: the cosine that two sets with the same true direction, and this much noise, would show.
        p: of a cosine as large in absolute value under relabelling, Holm-adjusted over all pairs.
        shared: number of units (questions, pairs, prompts) that both sets hold.
    """

    first: str
    second: str
    estimate: Estimate
    ceiling: float
    p: float
    shared: int

    @property
    def shown(self) -> bool:
        """Whether the cosine is told from 0: p < .05, and the interval lies on one side of 0."""
        return self.p < 0.05 and self.estimate.beyond(0)


@dataclass(frozen=True, eq=False)
class CosineMatrix:
    """Cosines between the directions of several contrast sets at one site.

    Args:
        names: names of the sets, in order.
        site: where the directions were read.
        pairs: one row for each pair of sets.
        reliability: for each set the cosine that its direction would have with that of a replication.
    """

    names: tuple[str, ...]
    site: Site
    pairs: tuple[PairCosine, ...]
    reliability: Mapping[str, float]

    def __getitem__(self, names: tuple[str, str]) -> PairCosine:
        for pair in self.pairs:
            if {pair.first, pair.second} == set(names):
                return pair
        raise UsageError(f"there is no pair {names}; the sets are {self.names}, and a pair is two of them")

    @property
    def cosines(self) -> pd.DataFrame:
        """Cosines, name by name; 1 on the diagonal."""
        return self._square([pair.estimate.value for pair in self.pairs], dict.fromkeys(self.names, 1.0))

    @property
    def ceilings(self) -> pd.DataFrame:
        """Ceilings, name by name; the reliability of each direction on the diagonal."""
        return self._square([pair.ceiling for pair in self.pairs], self.reliability)

    @property
    def p(self) -> pd.DataFrame:
        """Holm-adjusted p, name by name; NaN on the diagonal."""
        return self._square([pair.p for pair in self.pairs], dict.fromkeys(self.names, float("nan")))

    def _square(self, values: Sequence[float], diagonal: Mapping[str, float]) -> pd.DataFrame:
        table = pd.DataFrame(np.nan, index=list(self.names), columns=list(self.names))
        for pair, value in zip(self.pairs, values, strict=True):
            table.loc[pair.first, pair.second] = table.loc[pair.second, pair.first] = value
        for name, value in diagonal.items():
            table.loc[name, name] = value
        return table

    def to_pandas(self) -> pd.DataFrame:
        """One line a pair: first, second, value, low, high, ceiling, p, n, shared."""
        return pd.DataFrame(
            {
                "first": pair.first, "second": pair.second, "value": pair.estimate.value, "low": pair.estimate.low,
                "high": pair.estimate.high, "ceiling": pair.ceiling, "p": pair.p, "n": pair.estimate.n,
                "shared": pair.shared,
            }
            for pair in self.pairs
        )  # fmt: skip

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """The cosines as a heat map with intervals and ceilings (a matplotlib Figure).

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.
        """
        from tl_em.report.matrices import cosines

        return cosines(self.to_pandas(), reliability=self.reliability, width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.plotted(self)

    def __repr__(self) -> str:
        lines = [
            f"{pair.first} · {pair.second}: {pair.estimate!r}, ceiling {pair.ceiling:.2f}, p={pair.p:.2g}"
            f"{'' if pair.shown else ', not shown'}"
            for pair in self.pairs
        ]
        return showable("\n".join([f"CosineMatrix at {self.site}", *lines]), lines=True)


@checked(site=as_site, permutations=COUNT, splits=COUNT, seed=SEED)
@in_plain_torch
def cosine_matrix(
    model: LensModel,
    contrasts: Mapping[str, ContrastSet],
    *,
    site: Site,
    position: Position | Mapping[str, Position],
    permutations: int = 999,
    splits: int = 50,
    seed: int = 0,
) -> CosineMatrix:
    """How alike the difference-in-means directions of several contrast sets are, at one site.

    Each set is captured once.  Prompts with one group label, or the two of a pair (classes of equal length without
    groups), are resampled and relabelled together, and so are prompts and groups that two sets share.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrasts: two or more contrast sets by name.
        site: where to read.
        position: at which token of each prompt; or one for each name.
        permutations: number of relabellings behind each p.
        splits: number of random halves behind each ceiling.
        seed: seed of the resampling, the relabelling and the halves.

    Returns:
        A CosineMatrix.

    Raises:
        UsageError: fewer than two sets, too few permutations, or a set without a position.
        ZeroDirectionError: a set whose classes have the same mean here.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> sets = {name: pair.contrasts[name] for name in ("persona", "refusal")}
        >>> at = {"site": Site(1), "position": "prompt_end", "permutations": 99, "splits": 5}
        >>> cosine_matrix(pair.base, sets, **at)["persona", "refusal"].shared > 0
        True

    Source: see the head of this file.
    """
    positions: Mapping[str, Position]
    positions = position if isinstance(position, Mapping) else {name: position for name in contrasts}  # noqa: C420
    _check(contrasts, positions, permutations)
    sets = {name: _read(model, name, each, site, positions[name]) for name, each in contrasts.items()}
    return matrix_of(sets, site, permutations=permutations, splits=splits, seed=seed)


def matrix_of(sets: Mapping[str, Rows], site: Site, *, permutations: int, splits: int, seed: int) -> CosineMatrix:
    """The cosines between the directions of every two of these sets."""
    found_again = {name: reliability(each, splits=splits, seed=seed) for name, each in sets.items()}
    found: list[PairCosine] = []
    for first, second in combinations(sets, 2):
        two = Two.of(sets[first], sets[second])
        ceiling = float(np.sqrt(found_again[first] * found_again[second]))
        p = control_p(two.observed, two.relabelled(permutations, seed=seed))
        found.append(PairCosine(first, second, two.estimate(seed=seed), ceiling, p, two.shared))
    adjusted = holm([pair.p for pair in found])
    pairs = tuple(pair._replace(p=float(p)) for pair, p in zip(found, adjusted, strict=True))
    return CosineMatrix(tuple(sets), site, pairs, found_again)


def _check(contrasts: Mapping[str, ContrastSet], positions: Mapping[str, Position], permutations: int) -> None:
    check_names(contrasts)
    if len(contrasts) < 2:
        raise UsageError(f"{len(contrasts)} contrast set(s) have no cosine between them; pass two or more by name")
    missing = [name for name in contrasts if name not in positions]
    if missing:
        raise UsageError(f"position= names no position for {missing}; give one position for all, or one for each name")
    pairs = len(contrasts) * (len(contrasts) - 1) // 2
    if permutations + 1 < 20 * pairs:
        raise UsageError(
            f"permutations={permutations} cannot give p < .05 for any of {pairs} pair(s) after Holm; pass "
            f"permutations={20 * pairs} or more"
        )


def _read(model: LensModel, name: str, contrast: ContrastSet, site: Site, position: Position) -> Rows:
    prompts = [*contrast.positive, *contrast.negative]
    x = capture(model, prompts, [site], position=position)[:, 0].double().cpu().numpy()
    n = len(contrast.positive)
    if not np.linalg.norm(x[:n].mean(0) - x[n:].mean(0)) > _ROUNDING * np.linalg.norm(x, axis=1).max():
        raise ZeroDirectionError(
            f"{name}: both classes have the same mean activation at {site}, {position!r}, so there is no direction to "
            "compare; read at a token after the words in which the prompts differ"
        )
    return Rows.of(x, contrast, name)
