"""Exact ablation is exact; a right graph agrees with it, a wrong one is told so; good circuits beat random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tl_em as em
from tests.graph.test_attribution import PROMPT, dictionary, tokens_of, transcoders
from tl_em.graph.build import attribute, encoded_prompt
from tl_em.graph.components import component_plan
from tl_em.graph.edges import drawn
from tl_em.graph.gradients import STREAM
from tl_em.graph.latents import latent_plan
from tl_em.graph.validation import (
    AGREES,
    ablatable,
    ablated,
    agreement,
    faithfulness,
    only,
    starts_late,
    validated,
    valued,
)
from tl_em.models.hooks import LensModel, hooked

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]
OTHER = "the dog ran to the big cat"


def sae_plan(model: LensModel, layer: int = 1, target: object = 9):
    encoded = encoded_prompt(model, tokens_of(model))
    sae = dictionary(layer, 32, "resid_post", None)
    options = {"rule": None, "adapter": None, "skip": ()}
    return sae, latent_plan(model, encoded, [sae], target, **options)  # pyright: ignore


def test_an_ablated_latent_is_scale_feature_at_one_position(model: LensModel) -> None:
    """The last position's latent, taken away by the package's own intervention: the target loses the same."""
    sae, plan = sae_plan(model)
    last = len(plan.encoded) - 1
    rows = [r for r, e in enumerate(plan.written) if e.node.kind == "feature" and e.node.pos == last][:3]
    ours = ablated(model, plan, rows)
    before = valued(model, plan, 1, [])
    for row, effect in zip(rows, ours.tolist(), strict=True):
        index = plan.written[row].node.feature
        assert index is not None
        scale = em.ScaleFeature(sae.feature(index), 0.0)

        def edit(x: torch.Tensor, hook: object, scale: em.ScaleFeature = scale) -> torch.Tensor:
            x = x.clone()
            x[:, last] = scale.edit(x[:, last])
            return x

        after = valued(model, plan, 1, [(plan.written[row].point, edit)])
        assert effect == pytest.approx(float(before - after), abs=1e-5)  # float32
    assert ours.abs().max() > 1e-3


def test_a_circuit_of_everything_is_the_model_and_of_nothing_is_not(small_model: LensModel) -> None:
    for plan in (
        sae_plan(small_model)[1],
        component_plan(small_model, encoded_prompt(small_model, PROMPT), 9, against=OTHER),
        latent_plan(small_model, encoded_prompt(small_model, tokens_of(small_model)), transcoders(), 9, rule=None,
                    adapter=None, skip=()),
    ):  # fmt: skip
        rows = [row for row, each in enumerate(plan.written) if each.node.kind != "token" or plan.references]
        clean = float(valued(small_model, plan, 1, []))
        whole, nothing = only(small_model, plan, [rows, []], rows).tolist()
        assert whole == pytest.approx(clean, abs=1e-5)
        assert abs(nothing - clean) > 1e-3
        single = [row for row in rows if row != rows[-1]]  # one node out is its exact ablation
        assert clean - float(only(small_model, plan, [single], rows)) == pytest.approx(
            float(ablated(small_model, plan, [rows[-1]])), abs=1e-4
        )


def test_with_every_component_at_its_reference_the_model_reads_the_reference(small_model: LensModel) -> None:
    plan = component_plan(small_model, encoded_prompt(small_model, PROMPT), 9, against=OTHER)
    other = component_plan(small_model, encoded_prompt(small_model, OTHER), 9, against=PROMPT)
    rows = list(range(len(plan.written)))
    assert float(only(small_model, plan, [[]], rows)) == pytest.approx(
        float(valued(small_model, other, 1, [])), abs=1e-5
    )


def test_a_right_graph_agrees_and_one_with_shuffled_attributions_is_told_so(small_model: LensModel) -> None:
    _, plan = sae_plan(small_model, layer=2)
    graph = validated(small_model, drawn(small_model, plan), plan)
    assert graph.validation["pearson"].value > 0.9 and "warning" not in graph.validation
    measured = [node for node in graph.nodes if node.effect is not None]
    assert len(measured) == graph.validation["ablated"] > 10
    order = torch.randperm(len(graph.nodes), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [graph.nodes[at].attribution for at in order]
    nodes = tuple(replace(n, attribution=a) for n, a in zip(graph.nodes, shuffled, strict=True))
    wrong = replace(graph, nodes=nodes)
    effects = {row: node.effect for row, node in enumerate(graph.nodes) if node.effect is not None}
    found = agreement(wrong, effects, list(effects)[:8], seed=0)
    assert found["pearson"].value < AGREES and "do not read" in found["warning"]


def test_the_graph_s_circuit_is_better_than_random_ones(small_model: LensModel) -> None:
    _, plan = sae_plan(small_model, layer=2)
    graph = drawn(small_model, plan)
    found = faithfulness(small_model, graph, plan, seed=0)
    curve = found["faithfulness"]
    assert curve["graph"][0] == 0.0 and curve["graph"][-1] == pytest.approx(1.0)
    assert found["cmd"]["graph"] != found["cmd"]["random"]
    assert found["cpr"]["graph"] > found["cpr"]["random"]  # the best first: never below


def test_tokens_are_ablated_only_against_another_prompt(small_model: LensModel) -> None:
    for against, expected in (("mean", False), (OTHER, True)):
        graph = attribute(small_model, PROMPT, target=9, against=against, validate=False)
        assert any(graph.nodes[row].kind == "token" for row in ablatable(graph)) is expected


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_copies_made_in_the_middle_give_the_same_effects(
    family: str, surface: str, make_model: Callable[..., LensModel]
) -> None:
    model = make_model(family, surface, template=None)
    plan = component_plan(model, encoded_prompt(model, PROMPT), 9, against=OTHER)
    assert starts_late(model, plan)
    rows = [row for row, each in enumerate(plan.written) if each.point != STREAM][::-3]
    seen = []
    tokens = [("blocks.0.hook_mlp_out", lambda x, hook: seen.append(len(x)))]
    with hooked(model, tokens):
        late = ablated(model, plan, rows[:20], late=True)
    torch.testing.assert_close(late, ablated(model, plan, rows[:20]), rtol=1e-3, atol=1e-5)  # other batches
    assert late.abs().max() > 1e-4 and 1 in seen


def test_copies_are_not_made_in_the_middle_where_that_would_not_do(small_model: LensModel) -> None:
    plan = component_plan(small_model, encoded_prompt(small_model, PROMPT), 9, against=OTHER)

    def one_only(x: torch.Tensor, hook: object) -> torch.Tensor:
        assert x is not None
        return x * (1 if len(x) == 1 else 1.5)

    assert starts_late(small_model, plan)
    with hooked(small_model, [("blocks.2.hook_mlp_out", one_only)]):
        assert not starts_late(small_model, plan)
