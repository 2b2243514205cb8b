"""Attribution graphs on disk: the JSON that Neuronpedia publishes and circuit-tracer's files follow, both ways.

    feature number = (l + i)(l + i + 1) / 2 + i          (Cantor's pairing of layer l and index i: ``schema_version`` 1)

What the format has no place for (streams, heads, adapters, exact effects, validation) stands under the extra key
``tl_em`` of the file and of each node, so that reading back what was written gives the same graph, its edges exactly.
The format numbers one dictionary a layer. Where a graph holds several kinds of node in a layer (SAEs on two streams,
heads, MLPs), those after the first have their indices moved up by a round block, so that ids stay unique and of the
published shape; the index itself is kept under ``tl_em``.

A graph that was read is written as its file was (``origin``): every key that this package does not know, the order of
nodes and links, and what does not apply any more left out. Reading: :mod:`tl_em.graph.exchange_reading`.

Source: the schema of Neuronpedia's graph files; Ameisen et al. 2025, *Circuit Tracing*, for what they mean.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tl_em import __version__
from tl_em.artefacts import check_ending, replacing
from tl_em.errors import UsageError
from tl_em.graph.exchange_edits import as_read
from tl_em.graph.exchange_format import SCHEMA, cantor, plain
from tl_em.graph.exchange_links import LinkRows, link_rows, links_as_read
from tl_em.graph.nodes import Graph, Node
from tl_em.models.torch_state import in_plain_torch

TYPES = {"feature": "cross layer transcoder", "error": "mlp reconstruction error", "token": "embedding",
         "logit": "logit"}  # fmt: skip
"""Our kinds in the format's words; heads, MLPs and adapters go as latents, their kind beside it."""


def to_exchange(graph: Graph, *, slug: str = "", created: int = 0) -> dict[str, Any]:
    """A graph as plain values in the published format.

    Args:
        graph: any.
        slug: name of the file among others; made from the prompt where it is empty.
        created: milliseconds since 1970, shown to people.

    Returns:
        ``metadata``, ``qParams``, ``nodes``, ``links`` (source before target), ready for ``json.dumps``.

    Source: the table of the format's fields in Neuronpedia's schema, version 1.
    """
    _check_finite(graph)
    written, rows = _without_links(graph, slug=slug, created=created), link_rows(graph.edges)
    ids = [node["node_id"] for node in written["nodes"]]
    ends = zip(rows.sources.tolist(), rows.targets.tolist(), rows.text, strict=True)
    written["links"] = [{"source": ids[s], "target": ids[t], "weight": float(w)} for s, t, w in ends]
    return written


def _without_links(graph: Graph, *, slug: str, created: int) -> dict[str, Any]:
    nodes = [_node_to_json(node, number) for node, number in zip(graph.nodes, _numbers(graph), strict=True)]
    ids = {node.id: written["node_id"] for node, written in zip(graph.nodes, nodes, strict=True)}
    groups = [[label, *(ids[each] for each in members if each in ids)] for label, members in graph.supernodes]
    pinned = [each for group in groups for each in group[1:]]
    return {
        "metadata": _metadata(graph, slug, created),
        "qParams": {"pinnedIds": pinned, "supernodes": groups, "linkType": "both"} if groups else {},
        "nodes": nodes,
        "links": None,
    }


@in_plain_torch
def save_graph(graph: Graph, path: str | Path) -> Path:
    """Write a graph in the published JSON format, whole or not at all.

    Args:
        graph: any; one that was read is written as its file was, less what was taken out of it.
        path: of the file, ``.json``; its name becomes the graph's slug, where the graph has none from a file.

    Returns:
        the path.

    Raises:
        OutputError: the path cannot be written. UsageError: another ending; or the graph holds NaN or infinity.

    Example:
        >>> import tempfile, torch
        >>> from tl_em.graph.exchange_reading import load_graph
        >>> nodes = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))
        >>> graph = Graph(nodes, torch.tensor([[0.0, 0.0], [0.25, 0.0]]), ("cat",))
        >>> file = save_graph(graph, Path(tempfile.mkdtemp()) / "cat.json")
        >>> load_graph(file).links().values.tolist()
        [['E_7_0', '2_9_0', 0.25]]
    """
    check_ending(path, "a graph", ".json")
    _check_finite(graph)
    written = _without_links(graph, slug=_slug(Path(path).stem), created=int(time.time() * 1000))
    if graph.origin is None:
        ids, links = [node["node_id"] for node in written["nodes"]], link_rows(graph.edges)
    else:
        links = links_as_read(graph, graph.origin)
        written, ids = as_read(graph, graph.origin, written, edited=links.edited)
    text = as_text(written, ids, links)
    with replacing(path) as temporary:
        temporary.write_bytes(text)
    return Path(path)


# -- ids ---------------------------------------------------------------------------------------------------------------
def _variety(node: Node) -> tuple[str, str]:
    return node.kind, "" if node.stream in (None, "mlp_out") else node.stream


def _numbers(graph: Graph) -> list[int]:
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


# -- nodes -------------------------------------------------------------------------------------------------------------
def _node_to_json(node: Node, number: int) -> dict[str, Any]:
    target, kind = node.kind == "logit", node.kind if node.kind in TYPES else "feature"
    layer = "E" if node.kind == "token" else str(node.layer + target)
    return {
        "node_id": f"{layer}_{number}_{node.pos}",
        "feature": {"feature": cantor(node.layer, number), "error": -1, "token": node.pos, "logit": number}[kind],
        "layer": layer,
        "ctx_idx": node.pos,
        "feature_type": TYPES[kind],
        "jsNodeId": f"{'L' if target else layer}_{number}-{0 if kind == 'feature' else node.pos}",
        "clerp": _clerp(node),
        "influence": node.influence,
        "activation": node.activation,
        "token_prob": (node.weight or 0.0) if target else 0.0,
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
    own = {name: plain(value) for name, value in kept.items() if value is not None and value != ""}
    return own | ({"extra": plain(node.extra)} if node.extra else {})


# -- the rest of the file ----------------------------------------------------------------------------------------------
def _metadata(graph: Graph, slug: str, created: int) -> dict[str, Any]:
    kept = graph.settings.get("pruned") or {}
    made = {"validation": plain(graph.validation), "settings": plain(graph.settings)}
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
        "generation_settings": made,
        "pruning_settings": plain(kept) if isinstance(kept, Mapping) else {},
        "tl_em": {
            "schema": SCHEMA,
            "model": graph.model,
            "prompt": graph.prompt,
            "dtype": str(graph.edges.dtype).removeprefix("torch."),
            "settings": made["settings"],
            "validation": made["validation"],
        },
    }
    if isinstance(kept, Mapping) and "nodes" in kept:
        about["node_threshold"] = float(kept["nodes"])
    return about


def _check_finite(graph: Graph) -> None:
    said = "the graph holds NaN or infinity, which JSON has not; attribute in float32 on finite weights"
    if not bool(graph.edges.isfinite().all()):
        raise UsageError(said)
    for node in graph.nodes:
        values = (node.activation, node.weight, node.attribution, node.effect, node.influence)
        if not all(value is None or math.isfinite(value) for value in values):
            raise UsageError(f"{node.id}: {said}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


# -- text --------------------------------------------------------------------------------------------------------------
def as_text(written: Mapping[str, Any], ids: Sequence[Any], links: LinkRows) -> bytes:
    """The file, its links by rows of ``ids``: as JSON in utf-8, with escapes where a token is half of a pair."""
    try:
        return _json(written, ids, links, ascii_only=False).encode("utf-8")
    except UnicodeEncodeError:
        return _json(written, ids, links, ascii_only=True).encode("ascii")


def _json(written: Mapping[str, Any], ids: Sequence[Any], links: LinkRows, *, ascii_only: bool) -> str:
    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    # Three pieces a link, put together once: a million f-strings would be half of the time.
    heads = np.array([f'}}, {{"source": {dumped(each)}, "target": ' for each in ids], dtype=object)
    tails = np.array([f'{dumped(each)}, "weight": ' for each in ids], dtype=object)
    first, second, third = heads[links.sources].tolist(), tails[links.targets].tolist(), list(links.text)
    for at, each in links.whole.items():
        own = {"source": ids[links.sources[at]], "target": ids[links.targets[at]], "weight": float(links.text[at])}
        first[at], second[at], third[at] = "}, " + dumped({**each, **own})[:-1], "", ""
    joined = "".join(chain.from_iterable(zip(first, second, third, strict=True)))
    listed = f"[{joined[3:]}}}]" if first else "[]"
    parts = {name: listed if name == "links" else dumped(value) for name, value in written.items()}
    return "{" + ", ".join(f"{dumped(name)}: {text}" for name, text in parts.items()) + "}"
