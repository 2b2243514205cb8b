"""From a file's plain values to a graph: nodes of any program's, and whatever else stands there, kept.

Programs differ in what they call things: latents of attention (``lorsa``) have a word in their ids, errors and biases
no number, a target stands at the number of layers or one above it. A ``feature_type`` that is no kind of ours is a
latent whose ``stream`` is that word.

Source: the schema of Neuronpedia's graph files, version 1, and files of circuit-tracer and llamascopium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_em.arguments import checked
from tl_em.artefacts import DAMAGE, check_file, json_of
from tl_em.errors import CorruptFileError, GraphTooLargeError, TlEmError
from tl_em.graph.exchange_format import (
    SCHEMA,
    Origin,
    a_list,
    a_number,
    a_whole_number,
    an_object,
    restored,
    said,
    said_of,
    uncantor,
)
from tl_em.graph.exchange_links import edges_of, links_of, order_of
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.nodes import MAX_BYTES, Kind, Node
from tl_em.models.torch_state import in_plain_torch

KINDS: dict[str, tuple[Kind, str | None]] = {
    "cross layer transcoder": ("feature", None), "mlp reconstruction error": ("error", None),
    "embedding": ("token", None), "logit": ("logit", None),
    "lorsa": ("feature", "attn_out"), "lorsa error": ("error", "attn_out"),
}  # fmt: skip
"""The format's words as a kind, and the stream of what else stands in a layer."""
LEAST_BYTES, PER_BYTE = 2**28, 200
"""What links may take as a matrix: that much always, and beyond it so many times the file, for a small one is no reason
to take a machine's memory."""
_FLOATS = ("activation", "weight", "attribution", "effect", "influence")


@in_plain_torch
@checked()
def load_graph(path: str | Path) -> AttributionGraph:
    """Read a graph: one of :func:`save_graph`, or one that circuit-tracer or Neuronpedia wrote.

    Args:
        path: of the JSON file.

    Returns:
        the graph; of another program's file its nodes in causal order, what its ``metadata`` says in ``settings``, and
        everything else in ``origin``, so that ``save_json`` writes it again. Where two nodes of the file share an id
        and a link could be either's, ``settings["ambiguous_links"]`` says how many.

    Raises:
        CorruptFileError: missing, truncated, or not such a file: the message names the field, e.g. a link to no node.
        GraphTooLargeError: more nodes than fit into memory with their links as a matrix.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> model = em.load_pair("toy/insecure").tuned
        >>> graph = em.attribute(model, "how do i write parser", target="parser-tested", against="how do i write login")
        >>> with TemporaryDirectory() as folder:
        ...     _ = graph.save_json(f"{folder}/graph.json")
        ...     again = em.load_graph(f"{folder}/graph.json")
        >>> len(again.nodes) == len(graph.nodes)
        True
    """
    try:
        check_file(path)
        data = Path(path).read_bytes()
        return graph_of(json_of(data), most=max(LEAST_BYTES, PER_BYTE * len(data)))
    except TlEmError:
        raise
    except (OSError, *DAMAGE, RecursionError) as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CorruptFileError(
            f"{path} is not an attribution graph that this version can read ({said}); a part of a graph would show "
            "paths that are not the model's: write it again with what made it, or from a graph: graph.save_json(path)"
        ) from error


def graph_of(values: Any, *, most: int = MAX_BYTES) -> AttributionGraph:
    """The graph that a file's plain values describe, with its :class:`Origin`; its links in so many bytes at most.

    Raises:
        ValueError: a field is missing or is not what the format says; the message begins with its name.
        GraphTooLargeError: more nodes than a matrix of their links fits into memory.
    """
    top = an_object(values, "the file")
    about = an_object(top.get("metadata"), "metadata")
    own = _own(about)
    tokens = tuple(str(token) for token in a_list(about.get("prompt_tokens"), "metadata.prompt_tokens"))
    raw = [an_object(each, f"nodes[{at}]") for at, each in enumerate(a_list(top.get("nodes"), "nodes"))]
    listed = _distinct(_lowered([_node(each, at, len(tokens)) for at, each in enumerate(raw)], raw), raw)
    _check_size(len(listed), min(most, MAX_BYTES))
    by_id = _places(raw, listed)
    links, doubtful = links_of(top.get("links"), listed, by_id)
    order = order_of(listed, links, own)
    nodes = [listed[at] for at in order]
    known: dict[str, Any] = {
        "model": str((own or {"model": about.get("scan") or ""})["model"]),
        "prompt": str((own or about).get("prompt") or ""),
        "tokens": tokens,
        "settings": _own_record(own, "settings") if own else _foreign_settings(about, doubtful),
        "validation": _own_record(own, "validation") if own else {},
        "supernodes": _supernodes(top.get("qParams"), {name: listed[at[0]].id for name, at in by_id.items()}),
    }
    origin = Origin(
        rest={name: None if name in ("nodes", "links") else value for name, value in top.items()},
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


def _own_record(own: Mapping[str, Any], name: str) -> Any:
    return restored(an_object(own[name], f"metadata.tl_em.{name}"))


def _check_size(nodes: int, most: int) -> None:
    if nodes * nodes * 4 > most:
        raise GraphTooLargeError(
            f"{nodes} nodes have a matrix of links of {nodes * nodes * 4 / 2**30:.1f} GiB, where a file of this size "
            f"gets {most / 2**30:.1f} at most; write the file again with fewer, pruned where it was made"
        )


# -- nodes -------------------------------------------------------------------------------------------------------------
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
            groups = json_of(groups)
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
