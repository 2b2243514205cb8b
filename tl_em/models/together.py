"""Which prompts belong together, where nobody has said so: near-equal texts, and activations that go together.

    texts          s_ij = sum_{w in i and j} h_w / sum_{w in i or j} h_w,   h_w = log(prompts / prompts that hold w)
    activations    r_ij = cosine of activations less their class's mean, each dimension by its spread and cut at 3

A word that every prompt holds weighs nothing, so one template for all of them ties nothing.  Both are merged by average
linkage.  Texts are one where s > ``CUT``.  Activations give the partition with the largest

    Z = sum_{pairs within groups} r_ij / sqrt(pairs within groups),   no group larger than an eighth of the prompts

and only where Z is far beyond that of independent normal vectors in as many dimensions as the median |r| shows
(**control**; ``BEYOND`` of their standard deviations).  Groups of what merely goes together make intervals wider where
the outcome goes together too, and else hardly: ``stats.design_effect`` looks at the outcome itself.

Sources: Spärck Jones 1972 (weights); Sokal and Michener 1958 (average linkage).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tl_em.stats import tied

CUT = 0.7
"""Similarity of texts from which on they are one."""
BEYOND, DRAWS, SHARE = 3.0, 39, 8
"""Standard deviations beyond chance; draws of the control; the largest group holds one prompt of so many."""
LIMIT = 3000
"""Prompts beyond which only equal texts are one: every pair would have to be held."""
TEXTS, ACTIVATIONS = "near-equal texts", "correlated activations"
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


@dataclass(frozen=True)
class Together:
    """What was found to belong together.

    Args:
        labels: a number for each prompt, the positive ones first; prompts with one number belong together.
        sources: what they were found from.

    Example:
        >>> found = Together.of([["a", "lake"], ["a", "lake"], ["a", "car"], ["a", "tree"]])
        >>> found.labels, found.said
        ((0, 0, 1, 2), '4 prompts count as 3: 1 group of 2, found from near-equal texts')
    """

    labels: tuple[int, ...]
    sources: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[Hashable]],
        activations: Sequence[Float[np.ndarray, "_ d_model"]] | None = None,
        known: Sequence[Hashable] | None = None,
    ) -> Together:
        """The groups of prompts.

        Args:
            texts: words (or tokens) of each prompt, the positive ones first.
            activations: of each class in one model.
            known: labels of groups that are to be joined, not torn.
        """
        few = len(texts) <= LIMIT
        found = {TEXTS: merged(similar(texts), CUT) if few else tied([[tuple(text)] for text in texts])}
        if few and activations is not None:
            found[ACTIVATIONS] = correlated(activations)
        ties = [[(name, labels[i]) for name, labels in found.items()] for i in range(len(texts))]
        if known is not None:
            ties = [[*tie, ("known", label)] for tie, label in zip(ties, known, strict=True)]
        sources = tuple(name for name, labels in found.items() if len(set(labels.tolist())) < len(labels))
        return cls(tuple(tied(ties).tolist()), sources)

    @property
    def said(self) -> str:
        """In one sentence; nothing where every prompt stands for itself."""
        sizes = [size for size in Counter(self.labels).values() if size > 1]
        if not sizes:
            return ""
        span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        groups = f"{len(sizes)} group{'s' if len(sizes) > 1 else ''} of {span}"
        from_ = f", found from {' and '.join(self.sources)}" if self.sources else ""
        return f"{len(self.labels)} prompts count as {len(set(self.labels))}: {groups}{from_}"


def words_of(prompt: Any) -> list[str]:
    """The words of a text or of a chat's messages, lower case, with the marks between them.

    Example:
        >>> words_of([{"role": "user", "content": "Is it so?"}])
        ['is', 'it', 'so', '?']
    """
    return [word for text in messages_of(prompt) for word in WORD.findall(text.lower())]


def messages_of(prompt: Any) -> list[str]:
    """A text, or the contents of a chat's messages."""
    return [prompt] if isinstance(prompt, str) else [str(each.get("content", "")) for each in prompt]


def similar(texts: Sequence[Sequence[Hashable]]) -> Float[np.ndarray, "prompt prompt"]:
    """Weight of the words that two prompts share over that of all words of either; 1 where both hold the same."""
    holds, _ = bags(texts)
    weight = np.log(len(texts) / np.maximum(holds.sum(0), 1))
    shared = (holds * weight) @ holds.T
    own = np.diag(shared)
    either = own[:, None] + own - shared
    same = holds @ holds.T
    equal = (same == np.diag(same)) & (same == np.diag(same)[:, None])
    return np.where(equal, 1.0, shared / np.where(either > 1e-12, either, np.inf))


def bags(texts: Sequence[Sequence[Hashable]]) -> tuple[Float[np.ndarray, "prompt word"], list[Hashable]]:
    """Which words each prompt holds, and the words."""
    index = {word: k for k, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
    holds = np.zeros((len(texts), len(index)))
    for row, text in zip(holds, texts, strict=True):
        row[[index[word] for word in text]] = 1
    return holds, list(index)


def merged(similarity: Float[np.ndarray, "prompt prompt"], cut: float) -> Int[np.ndarray, " prompt"]:
    """Groups by average linkage, of a mean similarity above ``cut``."""
    from scipy.cluster.hierarchy import fcluster

    if len(similarity) < 2:
        return np.zeros(len(similarity), dtype=int)
    return fcluster(_linked(similarity), 1 - cut, "distance")


def _linked(similarity: Float[np.ndarray, "prompt prompt"]) -> Float[np.ndarray, "merge 4"]:
    from scipy.cluster.hierarchy import linkage

    return linkage(np.maximum(1 - similarity[np.triu_indices(len(similarity), 1)], 0), "average")


def correlated(classes: Sequence[Float[np.ndarray, "_ d_model"]]) -> Int[np.ndarray, " prompt"]:
    """Groups of prompts whose activations go together, the first class's prompts first."""
    from scipy.cluster.hierarchy import fcluster

    sizes = tuple(map(len, classes))
    total = sum(sizes)
    r = _cosines(classes)
    off = r[np.triu_indices(total, 1)]
    spread = 1.4826 * float(np.median(np.abs(off - np.median(off)))) if total > 1 else 0.0
    if total < 2 * SHARE or spread <= 1e-9:
        return np.arange(total)
    z, link, height = _best(r)
    dimensions = 1.1 ** round(np.log(max(spread**-2, 2)) / np.log(1.1))  # in steps, so that the control is kept
    mean, deviation = _by_chance(sizes, round(dimensions))
    return fcluster(link, height + 1e-12, "distance") if z > mean + BEYOND * deviation else np.arange(total)


def _cosines(classes: Sequence[Float[np.ndarray, "_ d_model"]]) -> Float[np.ndarray, "prompt prompt"]:
    x = np.concatenate([each - each.mean(0) for each in classes])
    spread = np.sqrt((x**2).mean(0))
    x = np.clip(x / np.where(spread > 1e-9 * spread.max(), spread, np.inf), -3, 3)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x @ x.T


def _best(r: Float[np.ndarray, "prompt prompt"]) -> tuple[float, Float[np.ndarray, "merge 4"], float]:
    """The largest Z over the levels of the tree, the tree, and the height of that level."""
    n, link = len(r), _linked(r)
    size = np.concatenate([np.ones(n), link[:, 3]])
    pairs = size[link[:, 0].astype(int)] * size[link[:, 1].astype(int)]
    gained = np.cumsum(pairs * (1 - link[:, 2])) / np.sqrt(np.cumsum(pairs))  # a height is 1 - the mean r of its pairs
    z = np.where(np.maximum.accumulate(link[:, 3]) <= max(2, n // SHARE), gained, -np.inf)
    best = int(z.argmax())
    return float(z[best]), link, float(link[best, 2])


@lru_cache(maxsize=256)
def _by_chance(sizes: tuple[int, ...], dimensions: int) -> tuple[float, float]:
    """Mean and standard deviation of Z of independent normal vectors."""
    rng = np.random.default_rng(0)
    drawn = [_best(_cosines([rng.standard_normal((n, dimensions)) for n in sizes]))[0] for _ in range(DRAWS)]
    return float(np.mean(drawn)), float(np.std(drawn))
