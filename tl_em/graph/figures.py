"""A graph as a file for a paper: SVG or PDF, or PNG at 300 dots an inch. What is drawn: :mod:`tl_em.report.graphs`."""

from __future__ import annotations

from pathlib import Path

from tl_em.graph.diff import GraphDiff
from tl_em.graph.graph import AttributionGraph


def draw(shown: AttributionGraph | GraphDiff, path: str | Path, *, width: float = 7.0, links: int = 150) -> Path:
    """Write a graph, or two on one layout, as a figure that does not move.

    Args:
        shown: a graph, or ``base.diff(tuned)``.
        path: ``.svg``, ``.pdf`` or ``.png``; the same graph gives the same file.
        width: inches (3.25 is one column of a paper, 7 is two).
        links: how many of the strongest links are drawn.

    Returns:
        the path.

    Raises:
        UsageError: another suffix. OutputError: the path cannot be written.
    """
    from tl_em.report import graphs, plots

    return plots.save(graphs.graph(shown, width=width, links=links), path)
