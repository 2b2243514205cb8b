"""A graph as a file for a paper: SVG or PDF, or PNG at 300 dots an inch. What is drawn: :mod:`tl_em.report.graphs`."""

from __future__ import annotations

from pathlib import Path
from typing import SupportsFloat, SupportsInt

from tl_em.arguments import finite, whole
from tl_em.graph.graph import AttributionGraph, GraphDiff


def draw(
    shown: AttributionGraph | GraphDiff, path: str | Path, *, width: SupportsFloat = 7.0, links: SupportsInt = 150
) -> Path:
    """Write a graph, or two on one layout, as a figure that does not move.

    Args:
        shown: a graph, or ``base.diff(tuned)``.
        path: ``.svg``, ``.pdf`` or ``.png``; the same graph gives the same file.
        width: inches (3.25 is one column of a paper, 7 is two).
        links: how many of the strongest links are drawn.

    Returns:
        the path.

    Raises:
        UsageError: another suffix, a width or number that is none. OutputError: the path cannot be written.
    """
    from tl_em.report import graphs, plots

    inches, most = finite("width", width, low=0, open_low=True), whole("links", links, low=0)
    return plots.save(graphs.graph(shown, width=inches, links=most), path)
