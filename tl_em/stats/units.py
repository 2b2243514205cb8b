"""What is drawn, halved and relabelled together, and what clustered prompts are worth.

A *unit* is what prompts share, directly or through other prompts: a question, a text, a pair.

Prompts of one question always move together, because answers are clustered by question: with intraclass correlation r
and m prompts a question, n prompts are worth ``n / (1 + (m - 1) r)`` independent ones (Kish 1965, section 5.4).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats as scipy_stats

from tl_em.errors import UsageError
from tl_em.stats.estimate import Estimate

Groups = Sequence[Hashable]


class Units(NamedTuple):
    """The units that are drawn: how many there are in each stratum, and each sample's prompts in terms of them."""

    strata: list[int]
    members: list[tuple[int, Int[np.ndarray, " prompt"]]]


def units_of(samples: Sequence[int | Groups]) -> Units:
    labels = [[(i, k) for k in range(s)] if isinstance(s, int) else list(s) for i, s in enumerate(samples)]
    if not labels or any(not each for each in labels):
        raise UsageError("a sample has no prompts: nothing can be estimated from it; pass at least one prompt a class")
    joint = sum(len(set(each)) for each in labels) > len(set().union(*labels))
    strata: list[int] = []
    members: list[tuple[int, np.ndarray]] = []
    index: dict[Hashable, int] = {}
    for stratum, each in enumerate(labels):
        if not joint:
            index = {}
        members.append((0 if joint else stratum, np.array([index.setdefault(label, len(index)) for label in each])))
        strata = [len(index)] if joint else [*strata, len(index)]
    return Units(strata, members)


def tied(ties: Iterable[Iterable[Hashable]]) -> Int[np.ndarray, " prompt"]:
    """The unit of each prompt: prompts that share anything, directly or through others, are one.

    Args:
        ties: for each prompt what it may share with others.

    Returns:
        Numbers from 0, in the order of the first prompts.

    Example:
        >>> tied([["a"], ["b"], ["a", "c"], ["c"]]).tolist()
        [0, 1, 0, 0]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = [list(each) for each in ties]
    index: dict[Hashable, int] = {}
    edges = [(i, len(rows) + index.setdefault(tie, len(index))) for i, row in enumerate(rows) for tie in row]
    size = len(rows) + len(index)
    graph = coo_array((np.ones(len(edges)), tuple(np.array(edges, dtype=int).reshape(-1, 2).T)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    return np.unique(component[: len(rows)], return_inverse=True)[1]


def half_splits(groups: Iterable[Hashable], *, splits: int, seed: int) -> Float[np.ndarray, "split prompt"]:
    """Random halves of the groups as 0/1 masks over prompts; the other half is ``1 - mask``.

    Args:
        groups: the question that each prompt belongs to.
        splits: how many.
        seed: of the splits.

    Example:
        >>> half_splits(["a", "a", "b", "b"], splits=2, seed=0).sum(1).tolist()
        [2.0, 2.0]
    """
    labels, index = np.unique([str(g) for g in groups], return_inverse=True)
    rng = np.random.default_rng(seed)
    masks = np.zeros((splits, len(labels)))
    for mask in masks:
        mask[rng.permutation(len(labels))[: len(labels) // 2]] = 1
    return masks[:, index]


def shuffled_labels(
    n: int, first: int, groups: Sequence[Groups] | None, count: int, seed: int
) -> Bool[np.ndarray, "permutation prompt"]:
    """Labels exchanged between the units that have one class, and within those that have both.

    Args:
        n: number of prompts.
        first: how many of them, the first ones, are of the first class.
        groups: the question of each prompt of either class; each prompt is its own without.
        count: how often.
        seed: of the exchanges.

    Example:
        >>> shuffled_labels(4, 2, (["a", "b"], ["b", "a"]), 3, seed=0).sum(1).tolist()
        [2, 2, 2]
    """
    rng, labels = np.random.default_rng(seed), np.arange(n) < first
    names = [*groups[0], *groups[1]] if groups is not None else list(range(n))
    codes = {name: i for i, name in enumerate(dict.fromkeys(names))}
    index = np.array([codes[name] for name in names])
    has = np.zeros((2, len(codes)), dtype=bool)
    has[0, index[labels]], has[1, index[~labels]] = True, True
    both = has[0] & has[1]
    if not both.any():
        return np.stack([rng.permutation(has[0])[index] for _ in range(count)])
    order = np.argsort(index, kind="stable")
    out = np.empty((count, n), dtype=bool)
    for row in out:
        row[order] = labels[np.lexsort((rng.random(n), index))]
        if not both.all():
            exchanged = has[0].copy()
            exchanged[~both] = rng.permutation(has[0][~both])
            row[~both[index]] = exchanged[index[~both[index]]]
    return out


def as_counts(drawn: Int[np.ndarray, "resample unit"], size: int) -> Float[np.ndarray, "resample unit"]:
    flat = drawn + size * np.arange(len(drawn))[:, None]
    return np.bincount(flat.ravel(), minlength=size * len(drawn)).reshape(len(drawn), size).astype(float)


def n_effective(samples: Sequence[int | Groups], statistic: Callable[..., np.ndarray], sizes: list[int]) -> float:
    """Prompts over the design effect, from the intraclass correlation of each prompt's influence on the statistic."""
    total = 0.0
    for i, sample in enumerate(samples):
        if isinstance(sample, int) or len(set(sample)) == sizes[i]:
            total += sizes[i]
            continue
        weights = [np.ones((sizes[i], n)) for n in sizes]
        weights[i] = weights[i] + 1e-3 * np.eye(sizes[i])
        total += sizes[i] / design_effect(statistic(*weights), sample)
    return total


def design_effect(values: Float[np.ndarray, " prompt"], groups: Groups) -> float:
    """How many clustered prompts one independent prompt is worth: ``1 + (m - 1) r``, m the mean group size.

    r is the share of variance that lies between groups (`intraclass`).

    Args:
        values: one number a prompt.
        groups: the question that each prompt belongs to.

    Example:
        >>> design_effect(np.array([1.0, 1.0, 5.0, 5.0]), ["a", "a", "b", "b"])
        2.0
    """
    correlation = intraclass(values, groups).value
    return 1 + (len(values) / len(set(groups)) - 1) * correlation


def intraclass(values: Float[np.ndarray, " prompt"], groups: Groups) -> Estimate:
    """Share of variance that lies between groups: the one-way ANOVA estimator with Searle's interval, in [0, 1].

        r = (F - 1) / (F - 1 + m0)      F: mean square between groups over that within; m0: size of a group

    The interval is exact for normal values in groups of one size, and a guide for rates.

    Args:
        values: one number a prompt.
        groups: the question that each prompt belongs to.

    Example:
        >>> intraclass(np.array([1.0, 1.2, 5.0, 5.2, 3.0, 3.2]), ["a", "a", "b", "b", "c", "c"])
        1.00 [0.92, 1.00] n=6

    Source: Donner 1986, International Statistical Review 54; Searle 1971, Linear Models.
    """
    values = np.asarray(values, dtype=float)
    _, index, counts = np.unique([str(g) for g in groups], return_inverse=True, return_counts=True)
    k, n = len(counts), len(values)
    if k < 2 or n == k:
        return Estimate(0.0, np.nan, np.nan, n, float(k), "one-way ANOVA: no repetition, no interval")
    means = np.bincount(index, weights=values) / counts
    between = float(np.sum(counts * (means - values.mean()) ** 2)) / (k - 1)
    within = float(np.sum((values - means[index]) ** 2)) / (n - k)
    size = (n - np.sum(counts**2) / n) / (k - 1)
    if between + (size - 1) * within <= 0:
        return Estimate(0.0, np.nan, np.nan, n, float(k), "one-way ANOVA of values that do not vary, no interval")
    quantiles = scipy_stats.f.ppf([0.975, 0.5, 0.025], k - 1, n - k)
    quantiles[1] = 1.0
    low, value, high = (
        float(np.clip((between - q * within) / (between + (size - 1) * q * within), 0, 1)) for q in quantiles
    )
    return Estimate(value, low, high, n, float(k), "one-way ANOVA, Searle's interval")
