"""Nodes and the direct effects between them: what a graph holds, which everything else here works on.

    edges[t, s]   direct effect of source s on target t, signed, in units of the target: a pre-activation of a feature,
                  a target's value (a centred logit, a difference of logits, a projection, a log-likelihood)

Nodes stand in causal order: what comes later never points back, so that the matrix is strictly lower triangular within
each token and influence is one pass. The last ones are the targets, weighted by ``weight`` (a token's probability).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import NATURAL, checked, list_of
from tl_em.errors import UsageError
from tl_em.graph.exchange_format import Origin
from tl_em.models.torch_state import in_plain_torch

if TYPE_CHECKING:
    import pandas as pd

    G = TypeVar("G", bound="Graph")
else:  # checked where a call is written, not while it runs
    G = TypeVar("G")

STAGES = {
    "resid_pre": 0, "attn_out": 1, "head": 1, "resid_mid": 2, "mlp_in": 2, "mlp_out": 2, "mlp": 2, "resid_post": 3,
}  # fmt: skip
"""Order of the streams of a layer."""
MAX_BYTES = 8 * 2**30
"""Of memory for a graph's gradients and edges."""
Kind = Literal["feature", "error", "token", "logit", "head", "mlp", "adapter"]


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Args:
        kind: ``"feature"`` (a latent), ``"error"`` (what a dictionary leaves unexplained), ``"token"`` (an embedding),
            ``"logit"`` (a target, whatever it measures), ``"head"``, ``"mlp"`` or ``"adapter"`` (a LoRA's part).
        layer: block, -1 for a token, ``n_layers`` for a target.
        pos: index of the token in the prompt.
        feature: latent, head, or vocabulary id of a token or logit; -1 for an error; None where there is none.
        stream: what it writes to (``"mlp_out"``, ``"resid_post"``, …), where a layer holds more than one kind.
        activation: of the latent (for a component its norm), in the model's units.
        weight: of a target in the influence; for a token logit its probability.
        label: for people; from outside, so escape it.
        attribution: total effect on the (weighted) targets as the graph predicts it, in the target's units.
        effect: the same by exact ablation, where it was measured.
        influence: cumulative share 0..1 in order of importance, small = important (``graph.prune`` fills it).
        extra: free keys for the page and the file: logit lens (``top``), explanation, link, delta.
    """

    kind: Kind
    layer: int
    pos: int
    feature: int | None = None
    stream: str | None = None
    activation: float | None = None
    weight: float | None = None
    label: str = ""
    attribution: float | None = None
    effect: float | None = None
    influence: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind={self.kind!r}; there are {', '.join(get_args(Kind))}")

    @property
    def place(self) -> tuple[bool, int, int]:
        """Place in causal order: targets last, else layer, then stream."""
        return self.kind == "logit", self.layer, STAGES.get(self.stream or self.kind, -1)

    @property
    def id(self) -> str:
        """Unique in its graph, the same in the graph of another model on the same prompt; as in the exchange format."""
        number = "x" if self.feature is None else str(self.feature)
        if self.kind == "token":
            return f"E_{number}_{self.pos}"
        head = f"{self.layer}_{number}_{self.pos}"
        if self.kind in ("feature", "error", "logit") and self.stream in (None, "mlp_out"):
            return head
        return f"{head}_{self.kind}" + (f"_{self.stream}" if self.stream else "")


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes and direct effects; its fields are those of ``em.AttributionGraph``."""

    nodes: tuple[Node, ...]
    edges: Float[Tensor, "node node"]
    tokens: tuple[str, ...]
    model: str = ""
    prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    supernodes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    origin: Origin | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if tuple(self.edges.shape) != (len(self.nodes), len(self.nodes)):
            raise UsageError(f"edges are {tuple(self.edges.shape)} for {len(self.nodes)} nodes; give one row a node")
        if len(self.index) != len(self.nodes):
            raise UsageError("two nodes have one id, so links could mean either; give each its stream or feature")

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Row of each node id."""
        return {node.id: row for row, node in enumerate(self.nodes)}

    @property
    def targets(self) -> tuple[Node, ...]:
        """What the graph explains."""
        return tuple(node for node in self.nodes if node.kind == "logit")

    def row(self, kinds: str | Sequence[str]) -> list[int]:
        """Rows of the nodes of these kinds, in order."""
        wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        return [row for row, node in enumerate(self.nodes) if node.kind in wanted]

    @in_plain_torch
    @checked(rows=list_of(NATURAL))
    def keep(self: G, rows: Sequence[int], edges: Float[Tensor, "kept kept"] | None = None) -> G:
        """The part with these nodes, and the supernodes' members among them."""
        nodes = tuple(self.nodes[row] for row in rows)
        ids = {node.id for node in nodes}
        groups = [(label, tuple(each for each in members if each in ids)) for label, members in self.supernodes]
        at = torch.tensor(list(rows), dtype=torch.long)
        part = self.edges[at][:, at] if edges is None else edges
        kept = tuple((label, members) for label, members in groups if members)
        return replace(self, nodes=nodes, edges=part, supernodes=kept)

    def to_pandas(self) -> pd.DataFrame:
        """One row a node."""
        import pandas as pd

        columns = ["id", *(each.name for each in fields(Node) if each.name != "extra")]
        return pd.DataFrame([[getattr(node, name) for name in columns] for node in self.nodes], columns=columns)

    def __repr__(self) -> str:
        kinds = {kind: len(self.row(kind)) for kind in get_args(Kind)}
        said = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
        r = self.validation.get("pearson")
        value = getattr(r, "value", r)
        found = f"r with ablation {value:.2f}" if isinstance(value, float) and math.isfinite(value) else "not validated"
        return f"AttributionGraph({said}; {int((self.edges != 0).sum())} edges; {found})"


@in_plain_torch
def strongest_links(graph: Graph) -> pd.DataFrame:
    """One row an edge that is not zero: source, target, weight; strongest first."""
    import pandas as pd

    targets, sources = graph.edges.nonzero(as_tuple=True)
    weights = graph.edges[targets, sources].detach().double()
    order = weights.abs().sort(descending=True, stable=True).indices
    ids = np.array([node.id for node in graph.nodes], dtype=object)
    columns = (ids[sources[order].numpy()], ids[targets[order].numpy()], weights[order].numpy())
    return pd.DataFrame(dict(zip(("source", "target", "weight"), columns, strict=True)))
