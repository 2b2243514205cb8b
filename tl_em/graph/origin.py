"""What a graph's file held that the graph itself has no place for: kept, so that saving it again loses nothing.

A file of another program names its transcoders, its generator, the saved view of its reader, and keys that nobody here
knows. A graph that was read carries them along, pruned or edited or not; what the graph does hold is written from the
graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class FileLinks:
    """A file's links in its order, between its nodes by their place in it.

    Args:
        sources, targets: places of nodes.
        weights: as the file has them, in double precision.
        whole: the file's own object of each link that has more than the three keys.
    """

    sources: Int[np.ndarray, " link"]
    targets: Int[np.ndarray, " link"]
    weights: Float[np.ndarray, " link"]
    whole: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Origin:
    """The file that a graph was read from.

    Args:
        rest: the file's object without what stands under ``nodes`` and ``links``.
        order: the graph's id of each of its nodes, in the file's order.
        nodes: the file's object of each node, by the graph's id.
        read: each node as it was read, by its id.
        links: its links.
        about: model, prompt, tokens, settings, validation and supernodes, as they were read.
    """

    rest: Mapping[str, Any]
    order: tuple[str, ...]
    nodes: Mapping[str, Mapping[str, Any]]
    read: Mapping[str, Any]
    links: FileLinks
    about: Mapping[str, Any]
