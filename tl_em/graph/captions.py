"""The words of a graph: its title, its strongest paths as sentences, its figures, and when not to believe it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tl_em.graph.diff import Compared
from tl_em.graph.nodes import Graph, Node
from tl_em.graph.pruning import strongest_paths, weights_of
from tl_em.showing import showable
from tl_em.stats import Estimate

PATHS = 5
"""How many paths are put into words."""
STOPS = 9
"""A path of more nodes is told by its two ends."""
KINDS = {"feature": "feature", "error": "error", "head": "attention head", "mlp": "MLP", "adapter": "adapter"}

FIGURES = {
    "pearson": ("r with exact ablation", "Pearson correlation of the attribution with the effect of ablating nodes"),
    "spearman": ("rank r with ablation", "Spearman correlation of the attribution with the effect of ablating nodes"),
    "completeness": ("completeness", "Share of the nodes' input that does not come from error nodes, by influence"),
    "replacement": ("replacement", "Share of influence that begins at tokens, not at error nodes"),
}
UNVALIDATED = (
    "Not validated: no node of this graph was ablated to see whether the model agrees. Read it as a hypothesis; "
    "attribute(…) measures exact effects unless it is told not to."
)


def title(graph: Graph) -> str:
    """The page's heading: what the graph explains, compared with what, and how much of it is drawn."""
    return f"{_doubt(graph)}{_explained(graph)}{relative(graph)}{_drawn(graph)}"


def _doubt(graph: Graph) -> str:
    """What is said before all else where ablation does not agree."""
    r = graph.validation.get("pearson")
    value = getattr(r, "value", r)
    if "warning" not in graph.validation:
        return ""
    return "Do not read: " if not isinstance(value, float) else f"Do not read (r with ablation is {value:.2f}): "


def relative(graph: Graph) -> str:
    """What the effect of a node is relative to, as the end of a sentence; nothing where a file does not say."""
    if said := graph.settings.get("relative to"):
        return f", compared with {said}"
    return ", each latent compared with its absence" if graph.settings.get("kind") in ("SAEs", "transcoders") else ""


def _drawn(graph: Graph) -> str:
    drawn = graph.settings.get("drawn")
    if not isinstance(drawn, Mapping):
        return ""
    share = float(drawn.get("share of the effect", 1.0))
    return f" ({drawn.get('nodes')} of {drawn.get('of')} nodes, with {share:.0%} of their effect)"


def _explained(graph: Graph) -> str:
    """The weightiest targets first."""
    names = [node.label.strip() or node.id for node in sorted(graph.targets, key=lambda n: -(n.weight or 0.0))]
    first = ", ".join(f"“{name}”" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"What leads to {first}" if first else "Attribution graph"


class Path(NamedTuple):
    """A path as a sentence, and the ids of its nodes, source first."""

    said: str
    nodes: tuple[str, ...]


def paths(shown: Graph | Compared) -> list[tuple[str, list[Path]]]:
    """The strongest paths in words: of a graph under no name, of two graphs under ``"tuned"`` and ``"base"``.

    >>> import torch
    >>> nodes = (Node("token", -1, 0, 7, label=" cat"), Node("logit", 2, 0, 9, label=" sat", weight=0.8))
    >>> paths(Graph(nodes, torch.tensor([[0.0, 0.0], [-0.25, 0.0]]), (" cat",)))[0][1][0].said
    "' cat' at 0 → ' sat': 100 % of the target, lowering it"
    """
    if isinstance(shown, Compared):
        return [(name, paths(graph)[0][1]) for name, graph in (("tuned", shown.tuned), ("base", shown.base))]
    whole = float(weights_of(shown).abs().sum()) or 1.0
    of, it = ("the target", "it") if len(shown.targets) == 1 else ("the targets", "its own")
    said = []
    found = strongest_paths(shown, PATHS)
    for weight, sign, ids in zip(*(found[name].tolist() for name in ("weight", "sign", "nodes")), strict=True):
        end = f", lowering {it}" if sign < 0 else ""
        said.append(Path(f"{_stops(shown, ids)}: {_percent(abs(weight) / whole)} of {of}{end}", tuple(ids)))
    return [("", said)]


def paths_heading(found: list[tuple[str, list[Path]]]) -> str:
    """What stands above the sentences of :func:`paths`."""
    most = max(len(said) for _, said in found)
    if not most:
        return "In words: no path leads to a target"
    many = "the strongest path" if most == 1 else f"the {most} strongest paths"
    return f"In words: {many}, each with its share of all that leads to the target"


def summary(shown: Graph | Compared) -> str:
    """The graph as plain text: what it explains, its strongest paths in words, and how far to believe it."""
    main = shown.tuned if isinstance(shown, Compared) else shown
    found = paths(shown)
    lines = [title(main), paths_heading(found)]
    for name, said in found:
        lines += [f"{name.capitalize()}:"] * bool(name) + [f"{n}. {path.said}" for n, path in enumerate(said, 1)]
    lines += [f"{name}: {figure}" for name, figure, _ in validation(shown)] + [warning(shown)]
    return "\n".join(showable(line) for line in lines if line)


def _stops(graph: Graph, ids: list[str]) -> str:
    """``' cat' at 2 → L0 feature 12 “animal” → ' sat'``: a position where it changes, a long path by its ends."""
    nodes = [graph.nodes[graph.index[each]] for each in ids]
    said = [_stop(node, graph, None if at == 0 else nodes[at - 1].pos) for at, node in enumerate(nodes)]
    if len(said) > STOPS:
        said = [*said[: STOPS // 2], f"({len(said) - 2 * (STOPS // 2)} more)", *said[-(STOPS // 2) :]]
    return " → ".join(said)


def _stop(node: Node, graph: Graph, before: int | None) -> str:
    label = showable(node.label)
    label = label if len(label) <= 40 else f"{label[:39]}…"
    if node.kind == "logit":
        return f"'{label or node.id}'"
    where = "" if node.pos == before else f" at {node.pos}"
    if node.kind == "token":
        word = label or (showable(graph.tokens[node.pos]) if node.pos < len(graph.tokens) else node.id)
        return f"'{word}'{where}"
    number = "" if node.feature is None or node.kind == "error" else f" {node.feature}"
    return f"L{node.layer} {KINDS[node.kind]}{number}{f' “{label.strip()}”' if label.strip() else ''}{where}"


def _percent(share: float) -> str:
    return "under 0.1 %" if share < 0.0005 else f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def models(shown: Graph | Compared) -> str:
    """Which model, or which two."""
    if isinstance(shown, Compared):
        return f"{shown.base.model or 'base'} (base) beside {shown.tuned.model or 'tuned'} (tuned)"
    return shown.model or "local model"


def validation(shown: Graph | Compared) -> list[tuple[str, str, str]]:
    """Name, figure and meaning of each figure of the title bar."""
    if isinstance(shown, Compared):
        return [(f"{name}, {which}", figure, meaning) for which, graph in (("base", shown.base), ("tuned", shown.tuned))
                for name, figure, meaning in validation(graph)[:2]]  # fmt: skip
    found = [(*FIGURES[name], said(shown.validation[name])) for name in FIGURES if name in shown.validation]
    return [(name, figure, meaning) for name, meaning, figure in found]


def warning(shown: Graph | Compared) -> str:
    """What stands under the title bar where attribution and ablation disagree, or were not compared; else nothing."""
    if isinstance(shown, Compared):
        base, tuned = warning(shown.base), warning(shown.tuned)
        parts = [("Base and tuned", base)] if base == tuned else [("Base", base), ("Tuned", tuned)]
        return " ".join(f"{name}: {words}" for name, words in parts if words)
    words = str(shown.validation.get("warning") or "")
    if words:
        words = words[0].upper() + words[1:]
    elif "pearson" not in shown.validation:
        words = UNVALIDATED
    if count := shown.settings.get("ambiguous_links"):
        words += (
            f" In its file nodes share an id, and {count} of the links could be either node's: drawn as the error's."
        )
    return words.strip()


def details(graph: Graph) -> list[tuple[str, str]]:
    """Settings, and the validation's figures that are not in the title bar."""
    others = {name: value for name, value in graph.validation.items() if name not in (*FIGURES, "warning")}
    return [(str(name), said(value)) for name, value in (*graph.settings.items(), *others.items())]


def said(value: Any) -> str:
    """A setting or a figure in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(each)}" for key, each in list(value.items())[:12])
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return ", ".join(said(each) for each in value[:12]) + (" …" if len(value) > 12 else "")
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.3g}" if math.isfinite(value) else "not defined"
    return repr(value) if isinstance(value, Estimate) else str(value)[:400]
