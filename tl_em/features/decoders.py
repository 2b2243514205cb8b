"""Decoder rows compared with directions, and with one another: similar latents are one feature, split or absorbed.

    i ~ j   where  cos(d_i, d_j) >= cosine;      a cluster is a connected component of ~

A cluster may carry what no single latent of it does, and two of its members are not two findings. The control: a
threshold that random rows do not reach: among F random rows in d dimensions the largest cosine is near sqrt(4 log F/d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.errors import UsageError, WidthError

COSINE = 0.7
_ROWS = 2048


def decoder_cosines(
    dictionary: Dictionary, directions: Mapping[str, Direction]
) -> dict[str, Float[Tensor, " feature"]]:
    """Cosine of every decoder row with each direction.

    Raises:
        WidthError: a direction is as wide as another model.
    """
    for name, direction in directions.items():
        if len(direction.vector) != dictionary.d_model:
            raise WidthError(
                f"the direction {name!r} is {len(direction.vector)} wide and decoder rows are {dictionary.d_model}, so "
                "they have no cosine; extract it on this model"
            )
    rows, vectors = dictionary.W_dec.cpu(), {name: each.vector.float().cpu() for name, each in directions.items()}
    return {name: torch.cosine_similarity(rows, vector[None], dim=-1) for name, vector in vectors.items()}


def decoder_clusters(
    dictionary: Dictionary, indices: Sequence[int] | None = None, *, cosine: float | int = COSINE
) -> tuple[tuple[int, ...], ...]:
    """Latents in clusters of similar decoder rows; a latent that is like no other is a cluster of its own.

    Args:
        dictionary: whose latents.
        indices: only these; all by default.
        cosine: from which on two rows are similar.

    Returns:
        Clusters, largest first, each sorted; together they hold every latent once.

    Raises:
        UsageError: the threshold is not in (0, 1].

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
        >>> from tl_em.models.sites import Site
        >>> sae = Dictionary(rows.T, torch.zeros(3), rows, torch.zeros(2), activation="relu", site_in=Site(0))
        >>> decoder_clusters(sae)
        ((0, 2), (1,))

    Source: feature splitting, Bricken et al. 2023; absorption, Chanin et al. 2024, arXiv:2409.14507.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 < cosine <= 1:
        raise UsageError(f"cosine={cosine} is no threshold for similar rows; give one in (0, 1], such as {COSINE}")
    chosen = list(range(dictionary.d_sae)) if indices is None else list(indices)
    if not chosen:
        return ()
    near = _similar(dictionary.W_dec[chosen].cpu(), float(cosine))
    ones = torch.ones(near.shape[1])
    graph = coo_array((ones.numpy(), (near[0].numpy(), near[1].numpy())), shape=(len(chosen), len(chosen)))
    label = connected_components(graph, directed=False)[1].tolist()
    members: dict[int, list[int]] = {}
    for latent, number in zip(chosen, label, strict=True):
        members.setdefault(number, []).append(latent)
    return tuple(sorted((tuple(sorted(each)) for each in members.values()), key=lambda each: (-len(each), each)))


def _similar(rows: Tensor, cosine: float) -> Tensor:
    """Pairs [2 pair] of similar rows, a block of rows at a time."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    found = []
    for start in range(0, len(unit), _ROWS):
        pairs = (unit[start : start + _ROWS] @ unit.T >= cosine - 1e-6).nonzero().T
        found.append(pairs + torch.tensor([[start], [0]]))
    return torch.cat(found, 1)
