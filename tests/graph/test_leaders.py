"""Of a large graph the leading nodes are drawn: the same nodes, scores, effects and edges as in the whole graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.graph.test_attribution import PROMPT, dictionary, tokens_of, transcoders
from tl_em.errors import GraphTooLargeError
from tl_em.graph import cost, leaders
from tl_em.graph.build import attribute, leading_nodes, node_scores
from tl_em.graph.captions import title
from tl_em.graph.graph import AttributionGraph
from tl_em.models.hooks import LensModel

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]
OTHER = "the dog ran to the big cat"


def drawn_of(model: LensModel, dictionaries: Any = None, **options: Any):
    prompt: Any = PROMPT if dictionaries is None else tokens_of(model)
    options = ({"against": OTHER} if dictionaries is None else {}) | options
    return attribute(model, prompt, dictionaries, target=9, **options)


def test_what_is_drawn_is_as_in_the_whole_graph(small_model: LensModel) -> None:
    whole, part = drawn_of(small_model), drawn_of(small_model, max_nodes=12)
    assert "drawn" not in whole.settings and len(whole.nodes) > 40
    assert part.settings["drawn"]["nodes"] == 12 + len(part.row("token"))
    assert len(part.row(("head", "mlp"))) == 12
    at = [whole.index[node.id] for node in part.nodes]
    torch.testing.assert_close(part.edges, whole.edges[at][:, at], rtol=1e-4, atol=1e-6)  # sums in another order
    assert part.edges.abs().max() > 1e-3
    for ours, theirs in zip(part.nodes, (whole.nodes[row] for row in at), strict=True):
        assert (ours.attribution or 0.0) == pytest.approx(theirs.attribution or 0.0, abs=1e-6)
        assert ours.effect is None or theirs.effect is None or ours.effect == pytest.approx(theirs.effect, abs=1e-5)


def test_the_largest_effects_are_drawn_until_they_hold_the_share(small_model: LensModel) -> None:
    whole, part = drawn_of(small_model), drawn_of(small_model, share=0.5)
    sizes = {n.id: abs(n.effect) for n in whole.nodes if n.kind in ("head", "mlp") and n.effect is not None}
    inside = [size for name, size in sizes.items() if name in part.index]
    outside = [size for name, size in sizes.items() if name not in part.index]
    assert inside and outside and min(inside) >= max(outside) - 1e-6
    assert 0.5 <= part.settings["drawn"]["share of the effect"] < 1
    assert 0.5 <= sum(inside) / sum(sizes.values()) < 0.5 + max(inside) / sum(sizes.values()) + 0.05
    assert "faithfulness" in part.settings["drawn"] and "pearson" in part.validation


def test_what_does_not_differ_from_its_reference_is_no_node(small_model: LensModel) -> None:
    """The first token is the same in both prompts, and nothing before it could differ."""
    whole, part = (
        drawn_of(small_model, validate=False),
        drawn_of(small_model, max_nodes=2000, share=1.0, validate=False),
    )
    assert any(node.pos == 0 for node in whole.nodes)
    led = drawn_of(small_model, share=0.999, validate=False)
    assert {node.pos for node in led.nodes} and all(node.pos > 0 for node in led.nodes)
    assert "drawn" not in part.settings  # all of a small graph is the whole graph


def test_a_graph_beyond_the_work_is_led_and_says_so(small_model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "WHOLE", 0)
    monkeypatch.setattr(cost, "LEADERS", 7)
    for dictionaries in (None, [dictionary(1, 32, "resid_post", None)], transcoders()):
        graph = drawn_of(small_model, dictionaries)
        said = graph.settings["drawn"]
        assert len(graph.row(("head", "mlp", "feature"))) <= 7 and said["of"] > said["nodes"]
        assert f"of {said['of']} nodes" in title(graph) and "compared with" in title(graph)
        assert graph.validation["ablated"] > 7


def test_seconds_are_obeyed_in_every_mode(small_model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By trials that say a second a node."""
    for module in ("components", "latents"):
        monkeypatch.setattr(f"tl_em.graph.{module}.seconds_of", lambda *_: float(cost.TRIAL))
    for dictionaries, each in ((None, 5), ([dictionary(1, 32, "resid_post", None)], 1)):  # five steps, or one pass
        whole = drawn_of(small_model, dictionaries, validate=False)
        few = drawn_of(small_model, dictionaries, max_seconds=6.5 * each, validate=False)
        kinds = ("head", "mlp", "feature")
        assert len(whole.row(kinds)) > 6 >= len(few.row(kinds)) >= 5
        with pytest.raises(GraphTooLargeError, match="max_seconds"):
            drawn_of(small_model, dictionaries, max_seconds=0.5 * each, validate=False)


def test_bytes_are_obeyed_by_drawing_less(small_model: LensModel) -> None:
    whole = drawn_of(small_model, validate=False)
    row = cost.row_bytes([*torch.zeros(1, 1)])
    assert row == 12
    needed = 8 * len(whole.nodes) ** 2
    few = drawn_of(small_model, max_bytes=needed, validate=False)
    assert 0 < len(few.nodes) < len(whole.nodes) and few.settings["cost"]["bytes_expected"] <= needed
    with pytest.raises(GraphTooLargeError, match="GiB"):
        drawn_of(small_model, max_bytes=10, validate=False)


def test_scored_nodes_take_no_memory_for_edges(small_model: LensModel) -> None:
    from tl_em.graph.build import encoded_prompt
    from tl_em.graph.components import component_plan

    plan = component_plan(small_model, encoded_prompt(small_model, PROMPT), 9, against=OTHER)
    scored = leaders.scored_nodes(small_model, plan)
    assert len(scored.nodes) == len(plan.written) + 1 and scored.edges.untyped_storage().nbytes() <= 8


def test_two_models_can_be_drawn_with_the_same_nodes(small_model: LensModel) -> None:
    for dictionaries in (None, [dictionary(1, 32, "resid_post", None)]):
        prompt: Any = PROMPT if dictionaries is None else tokens_of(small_model)
        options = {"against": OTHER} if dictionaries is None else {}
        whole = drawn_of(small_model, dictionaries, validate=False)
        few = leading_nodes(small_model, prompt, dictionaries, target=9, max_nodes=3, **options)
        kinds = ("head", "mlp", "feature")
        lead = {each for each in few if each in {whole.nodes[row].id for row in whole.row(kinds)}}
        assert len(lead) == 3
        rest = [whole.nodes[row].id for row in whole.row(kinds) if whole.nodes[row].id not in lead]
        also = next(name for name in rest if whole.nodes[whole.index[name]].attribution)
        graph = drawn_of(small_model, dictionaries, validate=False, max_nodes=3, also=[also, "no node"])
        assert {graph.nodes[row].id for row in graph.row(kinds)} == lead | {also}


def test_errors_of_a_large_graph_are_read_halfway(small_model: LensModel) -> None:
    """A dictionary that explains nothing: errors are the whole stream, and their scores come nearer to ablation."""
    one = dictionary(1, 32, "resid_post", None)
    whole, led_ = drawn_of(small_model, [one]), drawn_of(small_model, [one], share=0.9)

    def gap(graph: AttributionGraph) -> float:
        found = [graph.nodes[row] for row in graph.row("error")]
        assert len(found) > 3 and all(node.effect is not None for node in found)
        return sum(((node.attribution or 0.0) - (node.effect or 0.0)) ** 2 for node in found)

    assert 0 < gap(led_) < 0.7 * gap(whole)


def test_scores_of_all_nodes_are_those_of_the_whole_graph(small_model: LensModel) -> None:
    for rule in ("plain", "frozen", "ig"):
        for against in (OTHER, None):  # one turn, and several
            whole = attribute(small_model, PROMPT, target=9, rule=rule, against=against, validate=False)
            found = node_scores(small_model, PROMPT, target=9, rule=rule, against=against)
            scores = {node.id: node.attribution for node in found}
            assert len(scores) > 20
            for node in whole.nodes[:-1]:
                assert scores.get(node.id, 0.0) == pytest.approx(node.attribution, abs=1e-6)


def test_attribution_patching_takes_one_gradient_and_two_passes(small_model: LensModel) -> None:
    """``plain``: a forward pass of either prompt; ``ig``: of both, and one for each of its five steps."""
    ran: list[int] = []
    handle = small_model.unembed.register_forward_hook(lambda *_: ran.append(1))
    try:
        node_scores(small_model, PROMPT, target=9, rule="plain", against=OTHER)
        plain = len(ran)
        node_scores(small_model, PROMPT, target=9, rule="ig", against=OTHER)
    finally:
        handle.remove()
    assert (plain, len(ran) - plain) == (2, 7)
