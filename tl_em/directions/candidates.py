"""Candidate directions: the difference in means at the input of every layer, for each of several token positions.

    r[p, l] = mean(x[p, l] | positive) - mean(x[p, l] | negative)

All of them come from one pass over the prompts, with sums in float64 and memory that does not grow with their number.
Where both classes read the same token at the first layer, the means are equal and there is no candidate.
A candidate describes its prompts; that it causes anything is shown by ``select_direction`` on other prompts.

Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_em.arguments import NATURAL, checked, list_of, optional
from tl_em.directions.direction import Direction
from tl_em.directions.extract import Extraction
from tl_em.directions.methods import as_method
from tl_em.directions.methods.base import Method
from tl_em.errors import UsageError, ZeroDirectionError
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Site, as_positions
from tl_em.models.torch_state import in_plain_torch


@dataclass(frozen=True, eq=False)
class Candidates:
    """Directions to choose from: iterate over them, or index them.

    Args:
        directions: positions outermost, then layers.
        without: (position, layer) at which the two means are equal, so that there is no direction.
        contrast: the prompts that they were made from; random directions in place of them are drawn from these.

    Example:
        >>> import torch
        >>> found = Candidates((Direction(torch.ones(2), Site(0, "resid_pre")),))
        >>> len(found), found[0].site.layer, found
        (1, 0, Candidates(1 directions, positions ['prompt_end'], 1 layers))
    """

    directions: tuple[Direction, ...]
    without: tuple[tuple[Position, int], ...] = ()
    contrast: ContrastSet | None = None

    def __len__(self) -> int:
        return len(self.directions)

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.directions)

    def __getitem__(self, index: int) -> Direction:
        return self.directions[index]

    def at(self, position: Position, layer: int) -> Direction:
        """The candidate read at this position and layer.

        Raises:
            UsageError: there is none.
        """
        for direction in self.directions:
            if direction.position == position and direction.site.layer == layer:
                return direction
        why = "the two means are equal there" if (position, layer) in self.without else "it was not read there"
        raise UsageError(f"there is no candidate at position {position!r}, layer {layer}: {why}; {self} has others")

    def to_pandas(self) -> pd.DataFrame:
        """A row a candidate: position, layer, length, split-half reliability."""
        return pd.DataFrame(
            {
                "position": str(each.position), "layer": each.site.layer, "length": each.norm,
                "reliability": None if each.reliability is None else each.reliability.value,
            }
            for each in self.directions
        )  # fmt: skip

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.listed(self, repr(self), self.to_pandas())

    def __repr__(self) -> str:
        positions = list(dict.fromkeys(direction.position for direction in self.directions))
        layers = len({direction.site.layer for direction in self.directions})
        return f"Candidates({len(self)} directions, positions {positions}, {layers} layers)"


@checked(contrast=as_contrast, positions=as_positions, layers=optional(list_of(NATURAL)), method=as_method)
@in_plain_torch
def candidate_directions(
    model: LensModel,
    contrast: ContrastSet,
    *,
    positions: Sequence[Position],
    layers: Sequence[int] | None = None,
    method: Method | str | Any = "difference_in_means",
) -> Candidates:
    """The difference in means (or what another method finds) at ``resid_pre`` of each layer, for each position.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: the two classes of prompts; others than those that the choice is made on.
        positions: words (``"instruction_end"``, ``"prompt_end"``) or negative offsets from prompt_end; the source takes
            every token of the template after the instruction.
        layers: which layers; ``None``: all.
        method: how, as in ``extract_directions``.

    Returns:
        Candidates, positions outermost.  Where the two means are equal there is none; see ``Candidates.without``.

    Raises:
        UsageError: no positions or layers. ZeroDirectionError: the means are equal everywhere.
        PositionError, NonFiniteError: as ``capture``.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> refusal = pair.contrasts["refusal"]
        >>> found = em.candidate_directions(pair.base, refusal, positions=["prompt_end"], layers=[1, 2])
        >>> [str(each.site) for each in found]
        ['resid_pre[1]', 'resid_pre[2]']

    Source: Arditi et al. 2024, arXiv:2406.11717, section 2.3.
    """
    layers = list(range(int(model.cfg.n_layers)) if layers is None else layers)
    if not positions or not layers:
        raise UsageError(
            f"positions={positions!r} and layers={layers!r} name no candidates; pass a list of positions, e.g. "
            "positions=('instruction_end', 'prompt_end'), and at least one layer"
        )
    sites = [Site(layer, "resid_pre") for layer in layers]
    found: list[Direction] = []
    without: list[tuple[Position, int]] = []
    extraction = Extraction(model, contrast, sites, positions, as_method("method", method))
    for direction, position, site in extraction.made():
        if direction is None:
            without.append((position, site.layer))
        else:
            found.append(direction)
    if not found:
        raise ZeroDirectionError(
            f"The means of both classes are equal at all {len(without)} positions and layers, so there is no "
            "direction. Read at a position after the words in which the prompts differ."
        )
    return Candidates(tuple(found), tuple(without), contrast)
