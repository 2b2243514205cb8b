"""The words of a graph's page: its title, its title bar's figures, and the warning where it should not be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tl_em.graph.diff import Compared
from tl_em.graph.nodes import Graph
from tl_em.stats import Estimate

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
        parts = (("Base", shown.base), ("Tuned", shown.tuned))
        return " ".join(f"{name}: {warning(graph)}" for name, graph in parts if warning(graph))
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
