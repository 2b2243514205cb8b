"""Attribution graphs on disk: the JSON that Neuronpedia publishes and circuit-tracer's files follow, both ways.

    feature number = (l + i)(l + i + 1) / 2 + i          (Cantor's pairing of layer l and index i: ``schema_version`` 1)

What the format has no place for (streams, heads, adapters, exact effects, validation) stands under the extra key
``tl_em`` of the file and of each node, so that reading back what was written gives the same graph, its edges exactly.
The format numbers one dictionary a layer. Where a graph holds several kinds of node in a layer (SAEs on two streams,
heads, MLPs), those after the first have their indices moved up by a round block, so that ids stay unique and of the
published shape; the index itself is kept under ``tl_em``.

Source: the schema of Neuronpedia's graph files; Ameisen et al. 2025, *Circuit Tracing*, for what they mean.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em import __version__
from tl_em.errors import CorruptFileError, UsageError
from tl_em.graph.graph import AttributionGraph, Node
from tl_em.stats import Estimate
from tl_em.writing import replacing

SCHEMA = "tl-em/graph/1"
TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error", "token": "embedding",
         "logit": "logit"}  # fmt: skip
"""Our kinds in the format's words; heads, MLPs and adapters go as latents, their kind beside it."""
_KINDS = {name: kind for kind, name in TYPES.items()}
_LOGIT = re.compile(r'^Output "(.*)" \(p=[\d.e+-]+\)$', re.DOTALL)
_EMBEDDING = re.compile(r'^Emb: "(.*)"$', re.DOTALL)
_MARK = "tl_em.estimate"
_FLOATS = ("activation", "weight", "attribution", "effect", "influence")
_ESTIMATED = ("value", "low", "high", "n_effective")
"""Figures that are not counts: JSON that went through a browser has 1 for 1.0."""


def cantor(layer: int, index: int) -> int:
    """The format's number of latent ``index`` of ``layer``.

    Example:
        >>> cantor(0, 0), cantor(3, 5)
        (0, 41)
    """
    return (layer + index) * (layer + index + 1) // 2 + index


def uncantor(number: int) -> tuple[int, int]:
    """Layer and index of a number from :func:`cantor`.

    Example:
        >>> uncantor(cantor(25, 163_839))
        (25, 163839)
    """
    total = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - total * (total + 1) // 2
    return total - index, index


def to_exchange(graph: AttributionGraph, *, slug: str = "", created: int = 0) -> dict[str, Any]:
    """A graph as plain values in the published format.

    Args:
        graph: any.
        slug: name of the file among others; made from the prompt where it is empty.
        created: milliseconds since 1970, shown to people.

    Returns:
        ``metadata``, ``qParams``, ``nodes``, ``links`` (source before target), ready for ``json.dumps``.

    Source: the table of the format's fields in Neuronpedia's schema, version 1.
    """
    ids = _file_ids(graph)
    groups = [[label, *(ids[each] for each in members if each in ids)] for label, members in graph.supernodes]
    pinned = [each for group in groups for each in group[1:]]
    nodes = [_node_to_json(node, ids[node.id], number) for node, number in zip(graph.nodes, _numbers(graph),
                                                                              strict=True)]  # fmt: skip
    return {
        "metadata": _metadata(graph, slug, created),
        "qParams": {"pinnedIds": pinned, "supernodes": groups, "linkType": "both"} if groups else {},
        "nodes": nodes,
        "links": _links(graph.edges, [node["node_id"] for node in nodes]),
    }


def save_graph(graph: AttributionGraph, path: str | Path) -> Path:
    """Write a graph in the published JSON format, whole or not at all.

    Args:
        graph: any.
        path: of the file; its name becomes the graph's slug.

    Returns:
        the path.

    Raises:
        OutputError: the path cannot be written.

    Example:
        >>> import tempfile
        >>> nodes = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))
        >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), ("cat",))
        >>> file = save_graph(graph, Path(tempfile.mkdtemp()) / "cat.json")
        >>> load_graph(file).links().values.tolist()
        [['E_7_0', '2_9_0', 0.25]]
    """
    plain = to_exchange(graph, slug=_slug(Path(path).stem), created=int(time.time() * 1000))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return Path(path)


def load_graph(path: str | Path) -> AttributionGraph:
    """Read a graph: one of :func:`save_graph`, or one that circuit-tracer or Neuronpedia wrote.

    Args:
        path: of the JSON file.

    Returns:
        the graph; of another program's file its nodes in causal order, and what its ``metadata`` says in ``settings``.

    Raises:
        CorruptFileError: missing, truncated, or not such a file: two nodes with one id, a link to no node.
    """
    try:
        return from_exchange(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, UsageError) as error:
        raise CorruptFileError(
            f"{path} is not an attribution graph that this version can read ({type(error).__name__}: {error}); a part "
            "of a graph would show paths that are not the model's: write it again with graph.save_json(path)"
        ) from error


def from_exchange(plain: Mapping[str, Any]) -> AttributionGraph:
    """The graph of :func:`to_exchange`; ValueError or KeyError where these values are none."""
    about = plain["metadata"]
    own = about.get("tl_em") or {}
    if own and own.get("schema") != SCHEMA:
        raise ValueError(f"schema {own.get('schema')!r}, not {SCHEMA!r}")
    listed = list(plain["nodes"]) if own else sorted(plain["nodes"], key=_causal)
    nodes = [_node_from_json(node) for node in listed]
    row = {str(node["node_id"]): at for at, node in enumerate(listed)}
    if len(row) != len(listed):
        raise ValueError("two nodes have one node_id")
    edges = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for link in plain["links"]:
        edges[row[str(link["target"])], row[str(link["source"])]] = float(link["weight"])
    if not edges.isfinite().all():
        raise ValueError("a link's weight is not finite")
    names = {file: nodes[at].id for file, at in row.items()}
    return AttributionGraph(
        tuple(nodes),
        edges.to(torch.float64 if own.get("dtype") == "float64" else torch.float32),
        tuple(str(token) for token in about["prompt_tokens"]),
        model=str((own or {"model": about["scan"]})["model"]),
        prompt=str((own or about)["prompt"]),
        settings=_restored(own["settings"]) if own else _foreign_settings(about),
        validation=_restored(own["validation"]) if own else {},
        supernodes=tuple((str(group[0]), tuple(names[str(each)] for each in group[1:] if str(each) in names))
                         for group in (plain.get("qParams") or {}).get("supernodes") or ()),
    )  # fmt: skip


# -- ids ---------------------------------------------------------------------------------------------------------------
def _variety(node: Node) -> tuple[str, str]:
    return node.kind, "" if node.stream in (None, "mlp_out") else node.stream


def _numbers(graph: AttributionGraph) -> list[int]:
    """For each node the index that stands in its id: its own in the first kind of node, moved up in later ones."""
    latents = [node for node in graph.nodes if node.kind not in ("error", "token", "logit")]
    order = {each: at for at, each in enumerate(sorted({_variety(n) for n in latents}, key=_first))}
    errors = {each: at for at, each in enumerate(sorted({_variety(n) for n in graph.nodes if n.kind == "error"}))}
    block = 10 ** len(str(max((node.feature or 0 for node in latents), default=0)))
    numbers, taken = [], set()
    for node in graph.nodes:
        if node.kind == "error":
            number = -1 - errors[_variety(node)]
        elif node.kind in ("token", "logit"):
            number = node.feature or 0
        else:
            number = (node.feature or 0) + block * order[_variety(node)]
        while (node.kind, node.layer, number, node.pos) in taken:  # targets that are no token of the vocabulary
            number += 1
        taken.add((node.kind, node.layer, number, node.pos))
        numbers.append(number)
    return numbers


def _first(variety: tuple[str, str]) -> tuple[bool, tuple[str, str]]:
    return variety[0] != "feature", variety


def _file_ids(graph: AttributionGraph) -> dict[str, str]:
    """The file's id of each node's own id."""
    return {node.id: _file_id(node, number) for node, number in zip(graph.nodes, _numbers(graph), strict=True)}


def _file_id(node: Node, number: int) -> str:
    if node.kind == "token":
        return f"E_{number}_{node.pos}"
    return f"{node.layer + (node.kind == 'logit')}_{number}_{node.pos}"


# -- nodes -------------------------------------------------------------------------------------------------------------
def _node_to_json(node: Node, name: str, number: int) -> dict[str, Any]:
    target = node.kind == "logit"
    layer: str = "E" if node.kind == "token" else str(node.layer + target)
    kind = node.kind if node.kind in TYPES else "feature"
    feature = {"feature": lambda: cantor(node.layer, number), "error": lambda: -1, "token": lambda: node.pos,
               "logit": lambda: number}[kind]()  # fmt: skip
    js = {"feature": f"{layer}_{number}-0", "error": f"{layer}_{number}-{node.pos}", "token": f"E_{number}-{node.pos}",
          "logit": f"L_{number}-{node.pos}"}[kind]  # fmt: skip
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": TYPES[kind],
        "jsNodeId": js,
        "clerp": _clerp(node),
        "influence": node.influence,
        "activation": node.activation,
        "token_prob": _finite(node.weight or 0.0) if target else 0.0,
        "is_target_logit": target,
        "kind": node.kind,
        "hook": node.stream,
        "tl_em": _own_fields(node),
    }


def _clerp(node: Node) -> str:
    if node.kind == "logit":
        return f'Output "{node.label}" (p={node.weight or 0.0:.3f})'
    return f'Emb: "{node.label}"' if node.kind == "token" else node.label


def _own_fields(node: Node) -> dict[str, Any]:
    """What differs from a node's defaults, under its own names: enough to make it again."""
    kept = {f.name: getattr(node, f.name) for f in fields(node) if f.name not in ("kind", "stream", "extra")}
    plain = {name: _plain(value) for name, value in kept.items() if value is not None and value != ""}
    return plain | ({"extra": _plain(node.extra)} if node.extra else {})


def _node_from_json(plain: Mapping[str, Any]) -> Node:
    own = plain.get("tl_em")
    if own is not None:
        named: dict[str, Any] = {**_restored(own), "stream": plain["hook"]}
        named |= {name: _number(named.get(name)) for name in _FLOATS}
        return Node(plain["kind"], **named)
    kind: Any = _KINDS.get(str(plain["feature_type"]), "feature")
    parts = str(plain["node_id"]).split("_")
    said = str(plain.get("clerp") or "")
    found = {"logit": _LOGIT, "token": _EMBEDDING}.get(kind, _LOGIT).match(said)
    layer = {"token": -1, "logit": int(plain["layer"]) - 1 if kind == "logit" else 0}.get(kind)
    return Node(
        kind,
        int(plain["layer"]) if layer is None else layer,
        int(plain["ctx_idx"]),
        feature=-1 if kind == "error" else int(parts[1]),
        activation=_number(plain.get("activation")),
        weight=_number(plain.get("token_prob")) if kind == "logit" else None,
        label=found.group(1) if found else said,
        influence=_number(plain.get("influence")),
        extra={} if str(plain["feature_type"]) in _KINDS else {"feature_type": str(plain["feature_type"])},
    )


def _causal(plain: Mapping[str, Any]) -> tuple[int, int]:
    """Where another program's node stands: tokens, then layers, then targets."""
    place = {"embedding": 0, "logit": 2}.get(str(plain["feature_type"]), 1)
    return place, int(plain["layer"]) if place else 0


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


# -- the rest of the file ----------------------------------------------------------------------------------------------
def _metadata(graph: AttributionGraph, slug: str, created: int) -> dict[str, Any]:
    kept = graph.settings.get("pruned") or {}
    about = {
        "slug": slug or _slug(graph.prompt) or "graph",
        "scan": graph.model or "local model",
        "prompt": graph.prompt or "".join(graph.tokens),
        "prompt_tokens": list(graph.tokens),
        "schema_version": 1,
        "info": {
            "description": f"Attribution graph of {graph.model or 'a local model'}",
            "creator_name": "tl_em",
            "generator": {"name": "tl_em", "version": __version__},
            "create_time_ms": created,
        },
        "generation_settings": {"validation": _plain(graph.validation), "settings": _plain(graph.settings)},
        "pruning_settings": _plain(kept) if isinstance(kept, Mapping) else {},
        "tl_em": {
            "schema": SCHEMA,
            "model": graph.model,
            "prompt": graph.prompt,
            "dtype": str(graph.edges.dtype).removeprefix("torch."),
            "settings": _plain(graph.settings),
            "validation": _plain(graph.validation),
        },
    }
    if isinstance(kept, Mapping) and "nodes" in kept:
        about["node_threshold"] = float(kept["nodes"])
    return about


def _foreign_settings(about: Mapping[str, Any]) -> dict[str, Any]:
    skipped = ("prompt", "prompt_tokens", "scan")
    return {name: value for name, value in about.items() if name not in skipped}


def _links(edges: Float[Tensor, "node node"], ids: list[str]) -> list[dict[str, Any]]:
    targets, sources = edges.nonzero(as_tuple=True)
    wide = edges.dtype == torch.float64
    weights = edges[targets, sources].detach().cpu().numpy() if wide else _short(edges[targets, sources])
    return [{"source": ids[s], "target": ids[t], "weight": _finite(float(w))}
            for t, s, w in zip(targets.tolist(), sources.tolist(), weights, strict=True)]  # fmt: skip


def _short(values: Float[Tensor, " link"]) -> list[float]:
    """float32 values as the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in values.detach().float().cpu().numpy()]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise UsageError("the graph holds NaN or infinity, which JSON has not; attribute in float32 on finite weights")
    return value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _plain(value: Any) -> Any:
    """Settings and figures as JSON: an Estimate is marked, so that it comes back as one; NaN is None."""
    if isinstance(value, Estimate):
        return {_MARK: value.to_json()}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {_MARK}:
            plain = value[_MARK]
            return Estimate.from_json(plain | {name: _number(plain[name]) for name in _ESTIMATED})
        return {key: _restored(each) for key, each in value.items()}
    return [_restored(each) for each in value] if isinstance(value, list) else value
