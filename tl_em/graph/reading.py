"""From a file's plain values to a graph: nodes of any program's, and whatever else stands there, kept.

Programs differ in what they call things: latents of attention (``lorsa``) have a word in their ids, errors and biases
no number, a target stands at the number of layers or one above it. A ``feature_type`` that is no kind of ours is a
latent whose ``stream`` is that word.

Source: the schema of Neuronpedia's graph files, version 1, and files of circuit-tracer and llamascopium.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tl_em.errors import GraphTooLargeError
from tl_em.graph.fields import a_list, a_number, a_whole_number, an_object, said
from tl_em.graph.graph import AttributionGraph, Kind, Node
from tl_em.graph.linking import edges_of, links_of, order_of
from tl_em.graph.origin import Origin
from tl_em.graph.plan import MAX_BYTES
from tl_em.stats import Estimate

SCHEMA = "tl-em/graph/1"
MARK = "tl_em.estimate"
KINDS: dict[str, tuple[Kind, str | None]] = {
    "cross layer transcoder": ("feature", None), "mlp reconstruction error": ("error", None),
    "embedding": ("token", None), "logit": ("logit", None),
    "lorsa": ("feature", "attn_out"), "lorsa error": ("error", "attn_out"),
}  # fmt: skip
"""The format's words as a kind, and the stream of what else stands in a layer."""
_LOGIT = re.compile(r'^(?:Output|Logit) "(.*)" \(p=[\d.e+-]+\)$', re.DOTALL)
_EMBEDDING = re.compile(r'^Emb: "(.*)"$', re.DOTALL)
_CAPTIONS = {"logit": _LOGIT, "token": _EMBEDDING}
_FLOATS = ("activation", "weight", "attribution", "effect", "influence")
_ESTIMATED = ("value", "low", "high", "n_effective")
"""Figures that are not counts: JSON that went through a browser has 1 for 1.0."""


def uncantor(number: int) -> tuple[int, int]:
    """Layer and index of a number from :func:`tl_em.graph.exchange.cantor`.

    Example:
        >>> uncantor(41), uncantor(13_425_951_019)
        ((3, 5), (25, 163839))
    """
    total = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - total * (total + 1) // 2
    return total - index, index


def graph_of(values: Any) -> AttributionGraph:
    """The graph that a file's plain values describe, with its :class:`Origin`.

    Raises:
        ValueError: a field is missing or is not what the format says; the message begins with its name.
        GraphTooLargeError: more nodes than a matrix of their links fits into memory.
    """
    top = an_object(values, "the file")
    about = an_object(top.get("metadata"), "metadata")
    own = _own(about)
    tokens = tuple(str(token) for token in a_list(about.get("prompt_tokens"), "metadata.prompt_tokens"))
    raw = [an_object(each, f"nodes[{at}]") for at, each in enumerate(a_list(top.get("nodes"), "nodes"))]
    listed = nodes_of(raw, len(tokens))
    _check_size(len(listed))
    by_id = _places(raw, listed)
    links, doubtful = links_of(top.get("links"), listed, by_id)
    order = order_of(listed, links, own)
    nodes = [listed[at] for at in order]
    known: dict[str, Any] = {
        "model": str((own or {"model": about.get("scan") or ""})["model"]),
        "prompt": str((own or about).get("prompt") or ""),
        "tokens": tokens,
        "settings": restored(own["settings"]) if own else _foreign_settings(about, doubtful),
        "validation": restored(own["validation"]) if own else {},
        "supernodes": _supernodes(top.get("qParams"), {name: listed[at[0]].id for name, at in by_id.items()}),
    }
    origin = Origin(
        rest={name: None if name in ("nodes", "links") else value for name, value in top.items()},
        order=tuple(node.id for node in listed),
        nodes={node.id: each for node, each in zip(listed, raw, strict=True)},
        read={node.id: node for node in listed},
        links=links,
        about=known,
    )
    edges = edges_of(links, order, wide=own.get("dtype") == "float64")
    return AttributionGraph(tuple(nodes), edges, origin=origin, **known)


def _own(about: Mapping[str, Any]) -> Mapping[str, Any]:
    own = about.get("tl_em") or {}
    if own and an_object(own, "metadata.tl_em").get("schema") != SCHEMA:
        raise ValueError(f"metadata.tl_em.schema is {own.get('schema')!r}, not {SCHEMA!r}")
    return own


def _check_size(nodes: int) -> None:
    if nodes * nodes * 4 > MAX_BYTES:
        raise GraphTooLargeError(
            f"{nodes} nodes have a matrix of links of {nodes * nodes * 4 / 2**30:.1f} GiB, more than "
            f"{MAX_BYTES / 2**30:.0f}; write the file again with fewer, pruned where it was made"
        )


# -- nodes -------------------------------------------------------------------------------------------------------------
def nodes_of(raw: Sequence[Mapping[str, Any]], tokens: int) -> list[Node]:
    """The file's nodes in its order, each with an id of its own."""
    return _distinct(_lowered([_node(each, at, tokens) for at, each in enumerate(raw)], raw), raw)


def _node(each: Mapping[str, Any], at: int, tokens: int) -> Node:
    """One node from the file's object, the ``at``-th of a file whose prompt has so many tokens."""
    where = f"nodes[{at}]"
    if "node_id" not in each:
        raise ValueError(f"{where}.node_id is missing")
    if each.get("tl_em") is not None:
        return _own_node(each, where)
    if not isinstance(each.get("feature_type"), str):
        raise ValueError(f"{where}.feature_type is {said(each.get('feature_type'))} where a word belongs")
    word = each["feature_type"]
    kind, stream = KINDS.get(word, ("error" if word.endswith("error") else "feature", word))
    pos = a_whole_number(each.get("ctx_idx"), f"{where}.ctx_idx")
    if not 0 <= pos < tokens:
        raise ValueError(f"{where}.ctx_idx is {pos}, and metadata.prompt_tokens has {tokens}")
    layer = -1 if kind == "token" else a_whole_number(each.get("layer"), f"{where}.layer")
    label, weight = said_of(each, kind, where)
    return Node(
        kind, layer, pos, feature=_index(each, kind, layer), stream=stream,
        activation=a_number(each.get("activation"), f"{where}.activation"),
        weight=weight, label=label,
        influence=a_number(each.get("influence"), f"{where}.influence"),
        extra={} if word in KINDS else {"feature_type": word},
    )  # fmt: skip


def said_of(written: Mapping[str, Any], kind: str, where: str = "node") -> tuple[str, float | None]:
    """Label and weight of a node of another program's file."""
    text = str(written.get("clerp") or "")
    found = _CAPTIONS[kind].match(text) if kind in _CAPTIONS else None
    weight = a_number(written.get("token_prob"), f"{where}.token_prob") if kind == "logit" else None
    return (found.group(1) if found else text), weight


def _own_node(each: Mapping[str, Any], where: str) -> Node:
    named: dict[str, Any] = {**restored(an_object(each["tl_em"], f"{where}.tl_em")), "stream": each.get("hook")}
    named |= {name: a_number(named.get(name), f"{where}.tl_em.{name}") for name in _FLOATS}
    try:
        return Node(each["kind"], **named)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{where} is no node ({type(error).__name__}: {error})") from error


def _index(each: Mapping[str, Any], kind: str, layer: int) -> int | None:
    """The latent or the vocabulary id: out of the id, ``layer_index_pos``, else out of the pairing of layer and index.

    (Other programs put a word between: ``5_lor_123_4``.)
    """
    if kind == "error":
        return -1
    parts = str(each["node_id"]).split("_")
    if len(parts) > 2 and parts[-2].isdecimal():
        return int(parts[-2])
    number = each.get("feature")
    if kind == "token" or not isinstance(number, int) or isinstance(number, bool) or number < 0:
        return None
    if kind == "feature" and uncantor(number)[0] == layer:
        return uncantor(number)[1]
    return number


def _lowered(nodes: list[Node], raw: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Targets at the model's number of layers: some programs write that number, others one more."""
    last = max((node.layer for node in nodes if node.kind != "logit"), default=-1)
    return [
        replace(n, layer=n.layer - 1) if n.kind == "logit" and each.get("tl_em") is None and n.layer > last + 1 else n
        for n, each in zip(nodes, raw, strict=True)
    ]


def _distinct(nodes: list[Node], raw: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Nodes whose own ids would be the same under the file's id, which is unique among nodes of its type."""
    first: dict[tuple[str, str], int] = {}
    taken: set[str] = set()
    found = []
    for at, (node, each) in enumerate(zip(nodes, raw, strict=True)):
        name = str(each["node_id"])
        before = first.setdefault((name, str(each.get("feature_type"))), at)
        if before != at:
            raise ValueError(
                f"nodes[{before}].node_id and nodes[{at}].node_id are both {name!r}, and both nodes are "
                f"{each.get('feature_type')!r}, so links could mean either"
            )
        if node.id in taken:
            node = replace(node, stream=f"{each.get('feature_type')} {name}")
        taken.add(node.id)
        found.append(node)
    return found


def _places(raw: Sequence[Mapping[str, Any]], nodes: Sequence[Node]) -> dict[str, list[int]]:
    """Places of the nodes with each of the file's ids, errors last."""
    found: dict[str, list[int]] = {}
    for at, each in enumerate(raw):
        found.setdefault(str(each["node_id"]), []).append(at)
    return {name: sorted(each, key=lambda at: nodes[at].kind == "error") for name, each in found.items()}


# -- the rest of the file ----------------------------------------------------------------------------------------------
def _supernodes(params: Any, names: Mapping[str, str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The saved view's groups of nodes that the graph has; a view that was taken from an address has them as text."""
    groups = params.get("supernodes") if isinstance(params, Mapping) else None
    if isinstance(groups, str):
        try:
            groups = json.loads(groups)
        except ValueError:
            return ()
    listed = [each for each in groups if isinstance(each, list) and each] if isinstance(groups, list) else []
    return tuple(
        (str(label), tuple(names[str(each)] for each in members if str(each) in names)) for label, *members in listed
    )


def _foreign_settings(about: Mapping[str, Any], doubtful: int) -> dict[str, Any]:
    skipped = ("prompt", "prompt_tokens", "scan")
    found = {name: value for name, value in about.items() if name not in skipped}
    return found | ({"ambiguous_links": doubtful} if doubtful else {})


def restored(value: Any) -> Any:
    """Settings and figures from JSON: a marked Estimate comes back as one."""
    if isinstance(value, Mapping):
        if set(value) == {MARK}:
            marked = an_object(value[MARK], MARK)
            figures = {name: a_number(marked.get(name), f"{MARK}.{name}") for name in _ESTIMATED}
            return Estimate.from_json({**marked, **figures})
        return {key: restored(each) for key, each in value.items()}
    return [restored(each) for each in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Settings and figures as JSON: an Estimate is marked, so that it comes back as one; NaN is None."""
    if isinstance(value, Estimate):
        return {MARK: value.to_json()}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
