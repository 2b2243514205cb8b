"""Random latents that stand for given ones: as dense, with decoder rows as long.

    distance(i, j) = (log density_i - log density_j)^2 + (log |d_i| - log |d_j|)^2      each in standard deviations

Each latent is stood for by one of its nearest ``NEAREST`` (or as many as there are placebos), drawn without
replacement. Dense latents change much whatever they mean, and rare ones nothing, so a control that is not matched on
density says little. How well they match is printed beside every result (``match``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.errors import UsageError

NEAREST = 32
"""Latents that may stand for one, where as many as that are not needed."""
_NEVER = 1e-6
"""Density that a latent which was never on is given, so that it has a logarithm."""


def matched_sets(
    dictionary: Dictionary,
    indices: Sequence[int],
    density: Float[Tensor, " feature"],
    *,
    count: int,
    without: Sequence[int] = (),
    seed: int = 0,
) -> Int[np.ndarray, "placebo chosen"]:
    """Random sets of other latents, matched one by one on density and decoder norm.

    Args:
        dictionary: whose latents they are.
        indices: the latents to stand for.
        density: [feature] share of tokens at which each latent of the dictionary is on.
        count: number of sets; no latent stands for the same one in two of them.
        without: other latents that may not stand for any.
        seed: seed of the draws.

    Returns:
        [count, len(indices)]: row p, column i stands for ``indices[i]``; no row holds one latent twice.

    Raises:
        UsageError: the dictionary is too small for that many.

    Example:
        >>> from tl_em.models.sites import Site
        >>> eye = torch.eye(64)
        >>> d = Dictionary(eye, torch.zeros(64), eye, torch.zeros(64), activation="relu", site_in=Site(1))
        >>> sets = matched_sets(d, [3, 4], torch.linspace(0.01, 0.9, 64), count=20)
        >>> sets.shape, bool(np.isin(sets, [3, 4]).any())
        ((20, 2), False)
    """
    others = np.setdiff1d(np.arange(dictionary.d_sae), np.asarray([*indices, *without]))
    if count < 1 or len(others) < count + len(indices):
        raise UsageError(
            f"{len(others)} other latents of {dictionary.label} cannot give {count} placebos of {len(indices)} "
            "latents, so nothing would stand beside the effect; pass another number of placebos (at least 1; 20 are "
            "needed for p < .05), or take a larger dictionary"
        )
    places = _standardised(dictionary, density)
    rng = np.random.default_rng(seed)
    sets = np.full((count, len(indices)), -1)
    for column, index in enumerate(indices):
        away = ((places[others] - places[index]) ** 2).sum(-1)
        near = others[np.argsort(away, kind="stable")]
        pool = list(rng.permutation(near[: max(NEAREST, count + len(indices))]))
        for row in sets:
            chosen = next(each for each in pool if each not in row)
            pool.remove(chosen)
            row[column] = chosen
    return sets


def match(
    dictionary: Dictionary,
    indices: Sequence[int],
    density: Float[Tensor, " feature"],
    sets: Int[np.ndarray, "placebo chosen"],
) -> dict[str, float]:
    """Mean density and decoder norm of the latents and of those that stand for them."""
    norms = dictionary.W_dec.norm(dim=-1).cpu()
    own, theirs = torch.tensor(list(indices)), torch.from_numpy(sets)
    return {
        "density": float(density[own].mean()),
        "density of placebos": float(density[theirs].mean()),
        "decoder norm": float(norms[own].mean()),
        "decoder norm of placebos": float(norms[theirs].mean()),
    }


def _standardised(dictionary: Dictionary, density: Float[Tensor, " feature"]) -> Float[np.ndarray, "feature 2"]:
    norms = dictionary.W_dec.norm(dim=-1).cpu().double().clamp_min(_NEVER)
    logs = torch.stack([density.double().cpu().clamp_min(_NEVER), norms], dim=-1).log().numpy()
    spread = logs.std(0)
    return logs / np.where(spread > 1e-9, spread, 1.0)
