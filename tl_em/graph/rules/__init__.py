"""Rules of attribution, one file each; a name stands for a value that is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_em.errors import UsageError
from tl_em.graph.rules.base import Rule
from tl_em.graph.rules.frozen import Frozen
from tl_em.graph.rules.ig import IntegratedGradients
from tl_em.graph.rules.plain import Plain
from tl_em.graph.rules.relp import RelP

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (RelP(), Frozen(), Plain(), IntegratedGradients())}
USUAL = {"components": "ig", "SAEs": "plain", "transcoders": "frozen"}
"""By kind of graph. Of components the one that agrees best with exact ablation on toy/insecure
(``benchmarks/attribution.py --toy``)."""


def as_rule(rule: Any, graph: str) -> Rule:
    """A rule from its name, a value, or None for the usual one of a kind of graph.

    Args:
        graph: ``"components"``, ``"SAEs"`` or ``"transcoders"``.

    Raises:
        UsageError: an unknown name, a value that is no rule, or one for other graphs.

    Example:
        >>> as_rule(None, "SAEs").name, as_rule("relp", "components").name
        ('plain', 'relp')
    """
    found: Any = RULES.get(rule) if isinstance(rule, str) else RULES[USUAL[graph]] if rule is None else rule
    is_rule = not issubclass(type(found), type) and all(hasattr(found, each) for each in ("hooks", "steps", "graphs"))
    name = getattr(found, "name", None)
    if not is_rule or not isinstance(name, str) or not name:
        what = "has no name" if is_rule else "is no rule"
        raise UsageError(
            f"rule={rule!r:.60} {what}, so nothing says what gradients hold fixed; there are {', '.join(RULES)}, or "
            "give a value of your own class: class MyRule(em.Rule) with a name and hooks(model), then rule=MyRule()"
        )
    if graph not in found.graphs:
        why = ", which are exact under 'frozen' alone" if graph == "transcoders" else ""
        raise UsageError(
            f"the rule {name!r} is for graphs of {' and '.join(found.graphs)}, and this is one of {graph}{why}; leave "
            f"rule= out for {USUAL[graph]!r}"
        )
    return found
