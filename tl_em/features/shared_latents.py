"""Which latents several behaviours share, one by one and as sets; "none shown" is an answer.

    p_j of "in at least u of B behaviours" = Fisher's combination of the B - u + 1 largest p_bj    (u = B: the largest)
    share of a set A = 1 - |s - sum_{j in A} Delta_j d_j|^2 / |s|^2          s the whole shift of the activations

A latent is shared *alone* where it changed in every behaviour (u = B); it may be a *member of a set* where it changed
in more than half of them, if the set carries every behaviour's shift.

**Rule.** Its constants were chosen on the shipped seed 11, before any verdict seed was read. Prompts are halved, never
tearing apart what belongs together, in ``SPLITS`` ways. *On the first half*: a latent is a candidate where p_j <=
``SCREEN``, for changes of one sign. The top k of the behaviours must overlap by more than chance
(``p_values.overlap_p`` <= .05). *On the second half*: a candidate is confirmed at q of Benjamini and Hochberg's
adjustment of its p_j, one-sided. Where the prompts carried completions p_bj is the larger one of the change's and the
attribution's, and the attribution must be ``MATTERS`` of that of the whole activation, in u behaviours. What is
confirmed in every split is kept.

*Sets*: kept latents are joined greedily by the share that they add on the first half, until one adds less than
``GAIN``. The set, and each latent or cluster of similar latents that changed in every behaviour, is returned where on
the second half its share is at least ``CARRIES`` in every behaviour with the interval above 0, and random sets of the
same densities carry as much in at most 5 % of the draws. Nothing is returned where the whole shift is below
``smallest`` of the activations' spread in a behaviour: any fine-tune shifts everything a little.

**Drift.** A fine-tune that moves all activations alike changes the same latents in every behaviour: true, and no
concept of theirs. So beside a set found by ``"delta"`` stands how much of its change v the negative prompts show too,
d.v / v.v with d their own change; ``by="own"`` takes that drift out before anything is chosen.

Where a prompt belongs to two behaviours, their p are not independent, and Bonferroni takes the place of Fisher.

Sources: Nichols et al. 2005, "Valid conjunction inference"; Benjamini and Heller 2008 (at least u of B).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import FRACTION, NOT_NEGATIVE, SEED, checked, having
from tl_em.dictionaries import Dictionary, Feature
from tl_em.errors import UsageError
from tl_em.features.decoders import decoder_clusters
from tl_em.features.p_values import conjunction_p, density_bins, overlap_p, sign_flip_p
from tl_em.features.table import FeatureTable
from tl_em.stats import Estimate, benjamini_hochberg, bootstrap, control_p, mean

SPLITS = 3
SCREEN = 0.05
MATTERS = 0.02
GAIN = 0.01
MOST = 32
CARRIES = 0.1
SMALLEST = 0.2
"""Of the activations' spread: what Cohen calls a small effect."""
CHANCE = 0.05
DRIFTS = 0.5
"""Share of a change that negative prompts show too, beyond which it is more of the model than of the behaviours."""
_LEAST_PARTS = 8


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """One latent, or several together, that all behaviours share.

    Args:
        dictionary: whose latents.
        indices: the latents, the one that carries most first.
        signs: +1 stronger (or switched on), -1 weaker (or switched off).
        behaviours: which share it.
        shares: of the shift of each behaviour, on the prompts that did not choose it.
        effects: of each latent, its mean change over behaviours there, in units of its activation.
        kind: ``"set"`` (joined greedily) or ``"cluster"`` (one latent, or several with similar decoder rows).
        by: ``"delta"`` (tuned - base), ``"own"`` (that, less the negative prompts' own) or ``"effect"`` (positive -
            negative).
        drifts: by ``"delta"``, for each behaviour the share of the set's change that the negative prompts show too.
        q: the largest of its latents, over all splits.
        p_overlap: of the behaviours' lists overlapping by chance; the largest over all splits.
        p_random: of random sets of the same densities carrying as much.

    Example:
        >>> import tl_em as em
        >>> em.FeatureSet(em.organisms.toy_dictionary("toy/insecure"), (176, 67), (1, -1)).indices
        (176, 67)
    """

    dictionary: Dictionary
    indices: tuple[int, ...]
    signs: tuple[int, ...]
    behaviours: tuple[str, ...] = ()
    shares: tuple[Estimate, ...] = ()
    effects: tuple[Estimate, ...] = ()
    kind: Literal["set", "cluster"] = "set"
    by: str = "delta"
    q: float = field(default=float("nan"))
    p_overlap: float = field(default=float("nan"))
    p_random: float = field(default=float("nan"))
    drifts: tuple[Estimate, ...] = ()

    @property
    def features(self) -> tuple[Feature, ...]:
        """The latents, as features."""
        return tuple(Feature(self.dictionary, index) for index in self.indices)

    @property
    def share(self) -> Estimate:
        """The smallest of the shares."""
        return min(self.shares, key=lambda each: each.value)

    @property
    def drift(self) -> Estimate | None:
        """The smallest of the drifts."""
        return min(self.drifts, key=lambda each: each.value) if self.drifts else None

    @property
    def said_of_drift(self) -> str:
        """What of the change is no behaviour's own, in words; empty where that is not known."""
        drift = self.drift
        if drift is None:
            return ""
        mostly = drift.low > DRIFTS
        said = ", so it is a drift of the model more than theirs" if mostly else ""
        return f"prompts without the behaviours show {drift} of this change too{said}"

    def __repr__(self) -> str:
        latents = ", ".join(f"{'+' if s > 0 else '-'}{i}" for i, s in zip(self.indices, self.signs, strict=True))
        share = f"; share of the shift of {len(self.behaviours)} behaviours >= {self.share}" if self.shares else ""
        drift = f"; {self.said_of_drift}" if self.drifts else ""
        return f"FeatureSet({self.kind} {latents}{share}; q {self.q:.2g}{drift})"


@dataclass(frozen=True, eq=False)
class _Half:
    """Half of a table's parts."""

    values: Float[Tensor, "behaviour part feature"]
    shift: Float[Tensor, "behaviour part d_model"]
    share: Float[Tensor, "behaviour part"]
    attribution: Float[Tensor, "behaviour part feature"] | None
    whole: Float[Tensor, "behaviour part"] | None
    W_dec: Float[Tensor, "feature d_model"]
    drift: Float[Tensor, "behaviour part feature"] | None

    @property
    def total(self) -> Float[Tensor, "behaviour feature"]:
        return self.values.sum(1)

    def carried(self, latents: Any) -> Float[Tensor, " behaviour"]:
        """Share of each behaviour's shift that these latents carry."""
        s = self.shift.sum(1)
        left = s - self.total[:, latents] @ self.W_dec[latents].double()
        return 1 - left.square().sum(-1) / s.square().sum(-1)


_AS_TABLE = having("table of latents", "to_pandas parts", "no latent is known", "em.score_features(…)")


@checked(q=FRACTION, smallest=NOT_NEGATIVE, seed=SEED, table=_AS_TABLE)
def shared_features(
    table: FeatureTable,
    *,
    q: float = 0.05,
    by: Literal["delta", "own", "effect"] | None = None,
    smallest: float | int = SMALLEST,
    seed: int = 0,
) -> tuple[FeatureSet, ...]:
    """Latents, and sets of latents, that every behaviour of a table shares, by the rule at the head of this module.

    Args:
        table: of ``score_features``, with at least two behaviours.
        q: share of false claims among the latents that are confirmed.
        by: the change that is shared: tuned - base (``"delta"``, the default where there is a base), that less what
            the negative prompts show of it (``"own"``), or positive - negative (``"effect"``).
        smallest: shift that counts, in units of the activations' spread.
        seed: of the halving and the draws.

    Returns:
        The joint set first, then single latents and clusters that carry enough alone, the largest share first. Empty:
        none shown.

    Raises:
        UsageError: one behaviour, no such change in the table, or fewer than 8 parts of prompts.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> two = {name: pair.contrasts[name] for name in ("harmfulness", "persona")}
        >>> table = em.score_features(pair.tuned, em.organisms.toy_dictionary("toy/insecure"), two, against=pair.base)
        >>> em.shared_features(table)  # none shown: the two do not change in the same latents
        ()
    """
    by = by or ("delta" if "delta" in table.parts else "effect")
    _check(table, by)
    halves = [_halves(table, by, f"{seed}/{split}") for split in range(SPLITS)]
    # Every behaviour's activations must have moved; a product of two halves has no share of noise.
    one, other = halves[0]
    moved = (one.shift.sum(1) * other.shift.sum(1)).sum(-1) / (one.share.sum(1) * other.share.sum(1)).clamp_min(1e-12)
    if not bool((moved >= (float(smallest) * torch.tensor(table.spread, dtype=torch.float64)) ** 2).all()):
        return ()
    bins = density_bins(table.frame.groupby("latent").density.mean().to_numpy())
    count = len(table.behaviours)
    members, overlap = _kept(table, halves, bins, q, count // 2 + 1, seed)
    alone, _ = _kept(table, halves, bins, q, count, seed)
    joint = _greedy(halves[0][0], sorted(members)) if members else []
    groups = [("set", tuple(joint))]
    groups += [("cluster", each) for each in decoder_clusters(table.dictionary, sorted(alone))]
    worst = {**members, **alone}
    sets: dict[tuple[int, ...], FeatureSet] = {}
    for kind, latents in groups:
        key = tuple(sorted(latents))
        judged = _judged(table, halves[0][1], latents, bins, seed) if latents else None
        if judged is not None and key not in sets:
            sets[key] = replace(judged, kind=kind, by=by, q=max(worst[j] for j in latents), p_overlap=overlap)
    return tuple(sorted(sets.values(), key=lambda each: (each.kind != "set", -each.share.value)))


def _kept(
    table: FeatureTable,
    halves: Sequence[tuple[_Half, _Half]],
    bins: Int[np.ndarray, " feature"],
    q: float,
    least: int,
    seed: int,
) -> tuple[dict[int, float], float]:
    """Latents that every split confirms in at least so many behaviours, with their largest q; and the overlap's p."""
    norms = table.dictionary.W_dec.cpu().double().norm(dim=-1)
    found: list[dict[int, float]] = []
    worst = 0.0
    for split, both in enumerate(halves):
        overlap = overlap_p(both[0].total * norms, bins, np.random.default_rng([seed, split]))
        worst = max(worst, overlap)
        if overlap > CHANCE:
            return {}, worst
        found.append(_confirmed(both, bins, q, least, table.independent))
    common = set.intersection(*(set(each) for each in found))
    return {j: max(each[j] for each in found) for j in common}, worst


def _check(table: FeatureTable, by: str) -> None:
    if by not in table.parts:
        raise UsageError(f"the table has no {by!r}; score with against=base for 'delta' and 'own', or pass by='effect'")
    if len(table.behaviours) < 2:
        raise UsageError(
            f"one behaviour ({', '.join(table.behaviours)}) shares nothing with another; score at least two of them"
        )
    few = {n: k for n, k in zip(table.behaviours, (table.share > 0).sum(1).tolist(), strict=True) if k < _LEAST_PARTS}
    if few:
        raise UsageError(
            f"too few independent prompts to choose latents on one half and test them on the other: {few} units "
            f"(pairs, or groups), and {_LEAST_PARTS} are needed; give more prompts or smaller groups"
        )


# --- Halves and candidates --------------------------------------------------------------------------------------------


def _halves(table: FeatureTable, by: str, seed: str) -> tuple[_Half, _Half]:
    parts = (table.share > 0).any(0).nonzero()[:, 0].tolist()
    random.Random(f"halves/{seed}").shuffle(parts)
    attribution, whole = table.parts.get("attribution"), table.parts.get("whole attribution")
    drifting = by == "delta" and "own" in table.parts

    def of(rows: list[int]) -> _Half:
        values, shift, share = (each[:, rows].double() for each in (table.parts[by], table.shifts[by], table.share))
        return _Half(values, shift, share, None if attribution is None else attribution[:, rows].double(),
                     None if whole is None else whole[:, rows, 0].double(), table.dictionary.W_dec.cpu(),
                     values - table.parts["own"][:, rows].double() if drifting else None)  # fmt: skip

    return of(parts[0::2]), of(parts[1::2])


def _one_sided(
    parts: Float[Tensor, "behaviour part feature"], sign: Float[Tensor, " feature"]
) -> Float[np.ndarray, "behaviour feature"]:
    p = np.stack([sign_flip_p(each) for each in parts])
    return np.where((parts.sum(1).sign() == sign).numpy(), p / 2, 1.0)


def _majority(parts: Float[Tensor, "behaviour part feature"]) -> Float[Tensor, " feature"]:
    """The sign of the change over all behaviours, each counting for as much as it is sure."""
    return (parts.sum(1) / parts.square().sum(1).sqrt().clamp_min(1e-300)).sum(0).sign()


def _confirmed(
    halves: tuple[_Half, _Half], bins: Int[np.ndarray, " feature"], q: float, least: int, independent: bool
) -> dict[int, float]:
    """Candidates of the first half that the second confirms, with their q."""
    first, second = halves
    sign = _majority(first.values)
    p = conjunction_p(_one_sided(first.values, sign), least, independent=independent)
    candidates = np.flatnonzero((p <= SCREEN) & (sign != 0).numpy() & (bins >= 0))
    if not len(candidates):
        return {}
    at = torch.from_numpy(candidates)
    p = _one_sided(second.values[:, :, at], sign[at])
    if second.attribution is not None and second.whole is not None:
        effect = second.attribution[:, :, at]
        p = np.maximum(p, np.minimum(1.0, 2 * _one_sided(effect, _majority(effect))))
        p[(effect.sum(1) / second.whole.sum(1)[:, None]).abs().numpy() < MATTERS] = 1.0
    adjusted = benjamini_hochberg(conjunction_p(p, least, independent=independent))
    return {int(j): float(each) for j, each in zip(candidates, adjusted, strict=True) if each <= q}


# --- Sets -------------------------------------------------------------------------------------------------------------


def _greedy(half: _Half, latents: Sequence[int]) -> list[int]:
    """Latents in the order in which they add most to the mean share of the shift."""
    rest, at = half.shift.sum(1), torch.tensor(latents)
    change, rows, size = half.total[:, at], half.W_dec[at].double(), rest.square().sum(-1)
    chosen: list[int] = []
    while len(chosen) < min(MOST, len(latents)):
        gain = (2 * change * (rest @ rows.T) - change**2 * rows.square().sum(-1)) / size[:, None]
        best = gain.mean(0)
        best[chosen] = -torch.inf
        pick = int(best.argmax())
        if best[pick] < GAIN:
            break
        chosen.append(pick)
        rest = rest - change[:, pick, None] * rows[pick]
    return [latents[i] for i in chosen]


def _judged(
    table: FeatureTable, half: _Half, latents: Sequence[int], bins: Int[np.ndarray, " feature"], seed: int
) -> FeatureSet | None:
    """The set with its figures on the second half, None where it does not carry enough."""
    at = list(latents)
    shares = [_share(half, at, row, table.n[row], seed) for row in range(len(table.behaviours))]
    if any(each.value < CARRIES or not each.low > 0 for each in shares):
        return None
    p = _random_p(half, at, bins, np.random.default_rng([seed, len(at)]))
    if p > CHANCE:
        return None
    signs = tuple(int(x) for x in half.total[:, at].sum(0).sign().tolist())
    # Mean change over behaviours; half of the parts hold half of the prompts.
    changes = [half.values[:, :, j].mean(0).numpy() * 2 * half.values.shape[1] for j in at]
    effects = tuple(replace(mean(x, seed=seed), n=sum(table.n) // 2) for x in changes)
    drifts = () if half.drift is None else tuple(_drift(half, at, row, n, seed) for row, n in enumerate(table.n))
    return FeatureSet(
        table.dictionary, tuple(at), signs, table.behaviours, tuple(shares), effects, p_random=p, drifts=drifts
    )


def _random_p(half: _Half, latents: list[int], bins: Int[np.ndarray, " feature"], rng: np.random.Generator) -> float:
    """p of a random set, drawn from the same bins of density, carrying as much of every behaviour's shift."""
    needed = np.bincount(bins[latents], minlength=bins.max() + 1)
    pools = [np.flatnonzero(bins == b) for b in range(len(needed))]

    def draw() -> float:
        some = [rng.choice(pool, size=n, replace=False) for pool, n in zip(pools, needed, strict=True) if n]
        return float(half.carried(np.concatenate(some)).min())

    return control_p(float(half.carried(latents).min()), [draw() for _ in range(199)], two_sided=False)


def _share(half: _Half, latents: list[int], row: int, n: int, seed: int) -> Estimate:
    whole = half.shift[row].numpy()
    left = whole - (half.values[row][:, latents] @ half.W_dec[latents].double()).numpy()

    def share(w: np.ndarray) -> np.ndarray:
        size = ((w @ whole) ** 2).sum(-1)
        return 1 - ((w @ left) ** 2).sum(-1) / np.where(size > 0, size, np.nan)

    return replace(bootstrap(share, [len(whole)], seed=seed).estimate, n=n // 2)


def _drift(half: _Half, latents: list[int], row: int, n: int, seed: int) -> Estimate:
    """How much of the decoded change of a set negative prompts show too."""
    assert half.drift is not None
    rows = half.W_dec[latents].double()
    change, drift = ((each[row][:, latents] @ rows).numpy() for each in (half.values, half.drift))

    def share(w: np.ndarray) -> np.ndarray:
        v, d = w @ change, w @ drift
        size = (v * v).sum(-1)
        return (v * d).sum(-1) / np.where(size > 0, size, np.nan)

    return replace(bootstrap(share, [len(change)], seed=seed).estimate, n=n // 2)
