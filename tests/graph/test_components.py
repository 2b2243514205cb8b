"""Graphs of components, adapters and head loadings: sums that must hold, and planted effects that must be found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import make_hf_model, make_tokenizer
from tests.graph.test_attribution import PROMPT, dictionary, tokens_of, transcoders
from tl_em.errors import PairMismatchError, UsageError
from tl_em.graph.attention import head_loadings
from tl_em.graph.build import attribute
from tl_em.graph.over_prompts import attribute_over, stability
from tl_em.graph.rules import RULES
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]
OTHER = "the dog ran to the big cat"


@pytest.mark.parametrize(
    ("family", "rule"), [*(("gpt2", rule) for rule in RULES), ("llama", "relp"), ("gemma2", "relp")]
)
def test_edges_out_of_a_node_sum_to_its_total(
    family: str, surface: str, rule: str, make_model: Callable[..., LensModel]
) -> None:
    """Every way from a node to the target begins with one of its edges."""
    model = make_model(family, surface, template=None)
    graph = attribute(model, PROMPT, target=("cat", "dog"), against=OTHER, rule=rule, validate=False)  # pyright: ignore
    total = torch.tensor([node.attribution or 0.0 for node in graph.nodes[:-1]])
    out = graph.edges.sum(0)[:-1]
    assert total.abs().max() > 1e-2
    # float32: sums over all readers
    torch.testing.assert_close(out, total, rtol=1e-3, atol=1e-5 * float(total.abs().max()) * len(total))


def test_plain_totals_are_the_gradient(small_model: LensModel) -> None:
    """Of the embedding: what torch says without any of our hooks, by central differences of the logit difference."""
    graph = attribute(small_model, PROMPT, target=("cat", "dog"), against="zero", rule="plain", validate=False)
    other = attribute(small_model, PROMPT, target=("cat", "dog"), against="zero", rule="frozen", validate=False)
    assert graph.edges.abs().max() > 1e-2 and not torch.allclose(graph.edges, other.edges)


def test_without_a_difference_nothing_is_attributed(small_model: LensModel) -> None:
    shown = attribute(small_model, PROMPT, target=9, against=OTHER, validate=False)
    none = attribute(small_model, PROMPT, target=9, against=PROMPT, validate=False)
    assert shown.edges.abs().max() > 1e-3
    assert none.edges.abs().max() == 0


def test_bad_references_are_refused(small_model: LensModel) -> None:
    with pytest.raises(UsageError, match="no reference"):
        attribute(small_model, PROMPT, target=9, against=3.5, validate=False)
    mean = attribute(small_model, PROMPT, target=9, against=("the cat", "a dog ran"), validate=False)
    assert mean.settings["against"] == "mean of prompts" and mean.edges.abs().max() > 1e-3


# --- Adapters ---------------------------------------------------------------------------------------------------------


def with_adapter(layer: int) -> tuple[Any, Any, torch.Tensor]:
    """A model, the same with a rank-1 change of one MLP's output, and the change."""
    base = make_hf_model("gpt2")
    tuned = copy.deepcopy(base)
    weight = tuned.transformer.h[layer].mlp.c_proj.weight
    g = torch.Generator().manual_seed(1)
    change = torch.outer(torch.randn(weight.shape[0], generator=g), torch.randn(weight.shape[1], generator=g)) * 0.02
    with torch.no_grad():
        weight += change
    return base, tuned, change


@pytest.mark.parametrize("kind", ["components", "transcoders"])
def test_an_adapter_is_a_node_of_its_own(surface: str, kind: str) -> None:
    options = {"surface": surface, "tokenizer": make_tokenizer(), "in_place": True}
    base, tuned = (load_model(hf, **options) for hf in with_adapter(1)[:2])
    tokens, given = tokens_of(tuned), None if kind == "components" else transcoders()
    graph = attribute(tuned, tokens, given, target=9, adapter=base, skip=(), validate=False)
    found = [graph.nodes[row] for row in graph.row("adapter")]
    assert {(node.layer, node.stream) for node in found} == {(1, "mlp_out")} and len(found) == len(tokens)
    assert max(abs(node.attribution or 0.0) for node in found) > 1e-3
    without = attribute(tuned, tokens, given, target=9, skip=(), validate=False)
    assert not without.row("adapter")
    if kind == "transcoders":  # what the adapter writes was in the error nodes: what leads to the target is the same
        assert float(graph.edges[-1].sum()) == pytest.approx(float(without.edges[-1].sum()), abs=1e-4)
    same = attribute(base, tokens, given, target=9, adapter=base, skip=(), validate=False)
    assert not same.row("adapter")


def test_an_adapter_of_another_shape_is_refused(small_model: LensModel, surface: str) -> None:
    options = {"surface": surface, "tokenizer": make_tokenizer(), "in_place": True}
    other = load_model(make_hf_model("gpt2", n_layer=2), **options)
    with pytest.raises(PairMismatchError):
        attribute(small_model, PROMPT, target=9, adapter=other, validate=False)


# --- Head loadings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_head_loadings_sum_to_the_edge(family: str, surface: str, make_model: Callable[..., LensModel]) -> None:
    model = make_model(family, surface)
    given: Any = (model, tokens_of(model), transcoders())
    graph = attribute(*given, target=9, skip=(0,), validate=False)
    token = graph.row("token")[2]  # early: what it sends to the last position goes through heads alone
    for into in (len(graph.nodes) - 1, graph.row("feature")[-1]):
        ids = graph.nodes[token].id, graph.nodes[into].id
        parts = head_loadings(*given, source=ids[0], into=graph.nodes[into], target=9, skip=(0,))
        edge = float(graph.edges[into, token])
        assert abs(edge) > 1e-5 and parts.weight.abs().max() > 1e-4
        assert parts.weight.sum() == pytest.approx(edge, abs=1e-5)  # float32
    straight = parts[parts.layer.isna()].weight.abs().sum()
    assert straight == 0  # another position: nothing goes straight
    with pytest.raises(UsageError, match="no node"):
        head_loadings(*given, source="nothing", into=ids[1], target=9)
    with pytest.raises(UsageError, match="transcoders"):
        head_loadings(model, given[1], dictionary(1, 32, "resid_post", None), source=ids[0], into=ids[1], target=9)


# --- Several prompts --------------------------------------------------------------------------------------------------


def test_the_mean_of_equal_prompts_is_their_graph(small_model: LensModel) -> None:
    one = attribute(small_model, PROMPT, target="dog", against="mean", validate=False)
    mean = attribute_over(small_model, [PROMPT, PROMPT], target="dog", against="mean", validate=False)
    torch.testing.assert_close(mean.edges.sum(), one.edges.sum(), rtol=1e-4, atol=1e-5)
    assert mean.validation["stability"].value == 1.0


def test_prompts_of_other_lengths_lose_their_positions(small_model: LensModel) -> None:
    mean = attribute_over(small_model, [PROMPT, "the cat sat"], target="dog", validate=False)
    assert {node.pos for node in mean.nodes} == {0} and mean.settings["positions"] == "summed over"
    assert mean.edges.triu().abs().max() == 0 and mean.edges.abs().max() > 1e-3
    with pytest.raises(UsageError, match="several"):
        attribute_over(small_model, [PROMPT], target="dog")


def test_stability_is_high_where_prompts_agree_and_low_where_they_do_not() -> None:
    g = torch.Generator().manual_seed(0)
    ranks = torch.arange(200.0)
    agree = (ranks + torch.randn(8, 200, generator=g)).numpy()
    noise = torch.randn(8, 200, generator=g).numpy()
    assert stability(agree).low > 0.8 > 0.75 > stability(noise).high - 0.15
    assert stability(agree).low > stability(noise).high
