"""A stranger's rule attributes like one that is shipped, in every kind of graph; one that is no rule is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.extensions.rule import HalfPatterns
from tests.graph.test_attribution import PROMPT, dictionary, transcoders
from tl_em.errors import UnknownHookError, UsageError
from tl_em.models.hooks import LensModel

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]


def attributed(model: LensModel, rule: Any, *, given: Any = None) -> em.AttributionGraph:
    return em.attribute(model, PROMPT, given, target=("cat", "dog"), rule=rule, validate=False)


def test_its_graph_lies_between_those_of_none_and_all(small_model: LensModel) -> None:
    """The total of a node is linear in what a pattern passes on, wherever one pattern is on the way."""
    plain, half = attributed(small_model, "plain"), attributed(small_model, HalfPatterns())
    assert half.settings["rule"] == "half patterns" and "half patterns" in half.settings["approximation"]
    assert [node.id for node in half.nodes] == [node.id for node in plain.nodes]
    assert plain.edges.abs().max() > 1e-2 and not torch.allclose(half.edges, plain.edges)
    mlps = [row for row in plain.row("mlp") if plain.nodes[row].layer == 2]  # no pattern after them: the same
    for graph in (plain, half):
        assert max(abs(graph.nodes[row].attribution or 0.0) for row in mlps) > 1e-3
    totals = [[graph.nodes[row].attribution for row in mlps] for graph in (plain, half)]
    assert totals[0] == pytest.approx(totals[1])


def test_it_serves_saes_and_not_transcoders(small_model: LensModel) -> None:
    sae = dictionary(1, 32, "resid_post", None)
    plain, half = (attributed(small_model, rule, given=sae) for rule in ("plain", HalfPatterns()))
    assert half.row("feature") and not torch.allclose(half.edges, plain.edges)
    options: dict[str, Any] = {"target": 9, "rule": HalfPatterns(), "validate": False}
    assert em.graph.attribute_over(small_model, [PROMPT, PROMPT], sae, **options).settings["rule"] == "half patterns"
    with pytest.raises(UsageError, match="components and SAEs"):
        attributed(small_model, HalfPatterns(), given=transcoders())


def test_a_rule_that_is_none_is_refused(small_model: LensModel) -> None:
    @dataclass
    class Broken(em.Rule):
        name: Any = "broken"
        function: Any = None
        at: str = "blocks.0.hook_mlp_out"
        path: Any = None

        def hooks(self, model: Any) -> Any:
            return [(self.at, self.function)] if self.function else []

        def steps(self, start: Tensor, end: Tensor) -> Any:
            return (end,) if self.path is None else self.path(end)

    def passing(x: Tensor, hook: Any) -> Tensor:
        return x.detach()

    bad: list[tuple[Any, str]] = [
        (Broken(name=""), "no name"), (Broken(name=3), "no name"), (Broken, "no rule"), (object(), "no rule"),
        (lambda model: [], "no rule"), ("lrp", "relp, frozen, plain, ig"),
        (Broken(function=lambda x, hook: 2 * x), "other values"),
        (Broken(function=lambda x, hook: x + torch.nan), "other values"),
        (Broken(function=lambda x, hook: x[:, :1]), "rule 'broken' gives"), (Broken(function=3), "pairs"),
        (Broken(path=lambda end: []), "no path"), (Broken(path=lambda end: [end[:1]]), "no path"),
        (Broken(path=lambda end: [end * torch.nan]), "no path"),
    ]  # fmt: skip
    for rule, said in bad:
        with pytest.raises(UsageError, match=said):
            attributed(small_model, rule)
    with pytest.raises(UnknownHookError, match="hook_mlp_up"):
        attributed(small_model, Broken(function=passing, at="blocks.0.hook_mlp_up"))
    assert attributed(small_model, Broken(function=passing)).nodes
