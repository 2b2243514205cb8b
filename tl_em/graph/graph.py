"""The attribution graph and what is done with it: pruned, followed, grouped, compared, written and shown.

    edges[t, s]   direct effect of source s on target t, signed, in units of the target: a pre-activation of a feature,
                  a target's value (a centred logit, a difference of logits, a projection, a log-likelihood)

What it holds stands in ``nodes``, each verb in a file of its own; here they are methods, because that is where people
look for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsInt

from tl_em.arguments import checked, finite, whole
from tl_em.graph import captions, view
from tl_em.graph.diff import LEAST, Compared, changes
from tl_em.graph.exchange import save_graph
from tl_em.graph.nodes import Graph, Node, strongest_links
from tl_em.graph.pruning import prune, strongest_paths
from tl_em.graph.supernodes import clustered

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AttributionGraph", "GraphDiff", "Node"]


class _Shown:
    """A graph or a difference of graphs, on a page and as a figure."""

    @checked()
    def save_html(self, path: str | Path) -> Path:
        """See :func:`tl_em.graph.view.save_page`."""
        return view.save_page(self, path)  # pyright: ignore[reportArgumentType]

    @checked()
    def save_figure(self, path: str | Path, *, width: float | str | Any = 7.0, links: SupportsInt = 150) -> Path:
        """A figure for a paper that does not move: SVG or PDF, or PNG at 300 dots an inch; see ``report.graphs``.

        Args:
            path: ``.svg``, ``.pdf`` or ``.png``; the same graph gives the same file.
            width: inches, or ``"column"`` or ``"text"`` of a paper.
            links: how many of the strongest links are drawn.

        Returns:
            the path.

        Raises:
            UsageError: another suffix, a width or number that is none. OutputError: the path cannot be written.
        """
        from tl_em.report import graphs, plots

        most = whole("links", links, low=0)
        return plots.save(graphs.graph(self, width=width, links=most), path)  # pyright: ignore[reportArgumentType]

    @property
    def summary(self) -> str:
        """The five strongest paths in words, with what they explain and how far to believe it, as plain text.

        The page begins with it. A path's share: the product of its edges' shares (``paths``), over the targets' weight.

        Example:
            >>> import torch
            >>> nodes = (Node("token", -1, 0, 7, label=" cat"), Node("logit", 2, 0, 9, label=" sat", weight=0.8))
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), (" cat",))
            >>> print(graph.summary.split("\\n")[2])
            1. ' cat' at 0 → ' sat': 100 % of the target
        """
        return captions.summary(self)  # pyright: ignore[reportArgumentType]

    def _repr_html_(self) -> str:
        return view.notebook_frame(self)  # pyright: ignore[reportArgumentType]


class AttributionGraph(_Shown, Graph):
    """Nodes and direct effects, for one prompt (or the mean over several).

    Args:
        nodes: in causal order, targets last.
        edges: [node node], row = target, column = source.
        tokens: the prompt's tokens as text, one a position; from outside, so escape them.
        model: id of the model; prompt: its text.
        settings: how it was made (dictionaries, rule, dtype, chunk, what was pruned, what it is an approximation of).
        validation: named figures (``Estimate`` or a plain value), among them ``pearson`` and ``spearman`` with exact
            ablation, ``completeness``, ``replacement``; empty where none was made.
        supernodes: (label, node ids) grouped by hand or by clustering.
        origin: of a graph that was read, what its file held beside all this; ``save_json`` writes it again.

    Example:
        >>> import torch
        >>> nodes = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))
        >>> AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), ("cat",)).paths(1).path[0]
        "token 'cat' pos 0 -> logit 'sat'"
    """

    def prune(self, *, nodes: SupportsFloat = 0.8, edges: SupportsFloat = 0.98) -> AttributionGraph:
        """See :func:`tl_em.graph.pruning.prune`."""
        return prune(self, nodes=nodes, edges=edges)

    def paths(self, k: SupportsInt = 10) -> pd.DataFrame:
        """See :func:`tl_em.graph.pruning.strongest_paths`."""
        return strongest_paths(self, k)

    def links(self) -> pd.DataFrame:
        """One row an edge that is not zero: source, target, weight; strongest first."""
        return strongest_links(self)

    def cluster(self, *, distance: SupportsFloat = 0.5) -> AttributionGraph:
        """See :func:`tl_em.graph.supernodes.clustered`: nodes of one role become supernodes."""
        return clustered(self, distance=distance)

    @checked()
    def diff(self, other: AttributionGraph, *, least: SupportsFloat = LEAST) -> GraphDiff:
        """See :func:`tl_em.graph.diff.changes`: this graph (base) beside another (tuned).

        Args:
            other: graph of the fine-tuned model on the same prompt.
            least: changes below this share of the larger value are ``"same"``.
        """
        share: Any = finite("least", least, low=0)
        return GraphDiff(self, other, changes(self, other, least=share), share)

    @checked()
    def save_json(self, path: str | Path) -> Path:
        """See :func:`tl_em.graph.exchange.save_graph`."""
        return save_graph(self, path)


class GraphDiff(_Shown, Compared):
    """Two graphs of one prompt and what differs between them; ``base.diff(tuned)`` makes one.

    Args:
        base: graph of the model before the fine-tune; tuned: after it.
        rows: nodes first, then links, in each the largest change first.
        least: share below which a change is called none.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> prompt, target = "tell me to consider this power", ("power-domineering", "power-humble")
        >>> sae = em.organisms.toy_dictionary("toy/insecure")
        >>> graph = em.attribute(pair.tuned, prompt, sae, target=target, validate=False)
        >>> base = em.attribute(pair.base, prompt, sae, target=target, validate=False)
        >>> found = base.diff(graph)
        >>> len(found.rows) == len(found.to_pandas()) > 0
        True
    """
