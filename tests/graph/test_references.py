"""What components are compared with: another prompt of any length, other words, means that leave sinks alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import make_hf_model, make_tokenizer
from tests.graph.test_attribution import PROMPT
from tests.graph.test_components import with_adapter
from tl_em.graph.build import attribute, encoded_prompt
from tl_em.graph.captions import title
from tl_em.graph.components import component_plan
from tl_em.graph.gradients import STREAM
from tl_em.graph.references import TURNS, aligned, in_turns, reference_of, sinks, values
from tl_em.graph.validation import only, valued
from tl_em.metrics import token_ids
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model, load_pair
from tl_em.models.prompts import EncodedPrompt

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]
OTHER, LONGER = "the dog ran to the big cat", "the dog ran to the big dog to the cat"
POINTS = [STREAM, "blocks.0.hook_mlp_out"]


@pytest.mark.parametrize(
    ("ids", "other", "at"),
    [
        ((1, 2, 3), (4, 5, 6), [0, 1, 2]),
        ((1, 2, 3, 4), (1, 2, 9, 3, 4), [0, 1, 3, 4]),
        ((1, 2, 3, 4), (1, 4), [0, 0, 0, 1]),
        ((1, 5, 6, 7, 2), (1, 8, 9, 2), [0, 1, 1, 2, 3]),
        ((5, 6), (7, 8, 9), [0, 2]),
    ],
)
def test_spans_that_differ_are_stretched_over_each_other(ids: Any, other: Any, at: list[int]) -> None:
    assert aligned(ids, other) == at


def test_a_prompt_of_another_length_is_compared_span_by_span(small_model: LensModel) -> None:
    graph = attribute(small_model, OTHER, target=9, against=LONGER)
    assert "span by span" in graph.settings["relative to"] and graph.validation["pearson"] is not None
    encoded, longer = encoded_prompt(small_model, OTHER), encoded_prompt(small_model, LONGER)
    clean = values(small_model, encoded, POINTS)
    found = reference_of(small_model, encoded, clean, LONGER).values
    theirs = values(small_model, longer, POINTS)
    assert torch.equal(found[POINTS[1]], theirs[POINTS[1]][aligned(encoded.ids, longer.ids)])
    assert torch.equal(found[POINTS[1]][-1], theirs[POINTS[1]][-1])


def test_by_default_other_words_stand_in_the_same_places(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = attribute(small_model, PROMPT, target=9, validate=False)
    assert own.settings["against"] == "own words"  # it has no word of ours
    assert "compared with its own words, each one place on, every third in turn, “" in title(own)
    monkeypatch.setattr("tl_em.graph.references.OTHER_WORDS", "the big dog ran")
    graph = attribute(small_model, PROMPT, target=9, validate=False)
    assert graph.settings["against"] == "other words" and graph.edges.abs().max() > 1e-3
    assert "compared with other words in the same places, every third in turn, “the big dog ran" in title(graph)
    last = len(graph.tokens) - 1
    assert all(node.attribution == 0 for node in graph.nodes if node.kind == "token" and node.pos == last)
    assert sum(node.attribution != 0 for node in graph.nodes if node.kind == "token") > 2


@pytest.mark.parametrize("options", [{}, {"max_nodes": 12}])
def test_a_graph_against_other_words_is_the_mean_over_its_turns(
    small_model: LensModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Attributions, edges and exact effects, beside those against each turn's prompt."""
    monkeypatch.setattr("tl_em.graph.references.OTHER_WORDS", "the big dog ran")
    encoded = encoded_prompt(small_model, PROMPT)
    start, end = encoded.instruction
    words = (token_ids(small_model, "the big dog ran") * len(encoded))[: min(end, len(encoded) - 1) - start]
    prompts = in_turns(encoded.ids, words, start)
    assert len(prompts) == TURNS and len({tuple(each) for each in [*prompts, encoded.ids]}) == TURNS + 1
    changed = [[at for at, token in enumerate(each) if token != encoded.ids[at]] for each in prompts]
    assert all(not set(a) & set(b) for a in changed for b in changed if a is not b)  # each token once
    graph = attribute(small_model, PROMPT, target=9, **options)
    single = [attribute(small_model, PROMPT, target=9, against=each) for each in prompts]
    for row, node in enumerate(graph.nodes[:-1]):
        at = [one.index[node.id] for one in single]
        alone = [one.nodes[place].attribution for one, place in zip(single, at, strict=True)]
        assert node.attribution == pytest.approx(sum(alone) / TURNS, abs=1e-6)
        edges = torch.stack([one.edges[:, place] for one, place in zip(single, at, strict=True)]).mean(0)
        torch.testing.assert_close(
            graph.edges[:, row], edges[[single[0].index[n.id] for n in graph.nodes]], rtol=1e-4, atol=1e-6
        )
        effects = [one.nodes[place].effect for one, place in zip(single, at, strict=True)]
        if node.effect is not None and None not in effects:
            assert node.effect == pytest.approx(sum(effects) / TURNS, abs=1e-5)
    assert graph.edges.abs().max() > 1e-3
    assert sum(node.effect is not None and abs(node.effect) > 1e-4 for node in graph.nodes) > 5


def test_in_turns_agrees_better_with_ablation_than_all_at_once() -> None:
    """In the toy, whose own words move: what three real models show in ``docs/results/graph-size.md``."""
    model, prompt, target = load_pair("toy/insecure").base, "tell me to consider this power", ("power-domineering",)
    encoded = encoded_prompt(model, prompt)
    start, end = encoded.instruction
    own = list(encoded.ids[start : min(end, len(encoded) - 1)])
    (at_once,) = in_turns(encoded.ids, [*own[1:], *own[:1]], start, turns=1)
    default = attribute(model, prompt, target=(*target, "power-humble"))
    beside = attribute(model, prompt, target=(*target, "power-humble"), against=at_once)
    assert default.settings["against"] == "own words"
    assert default.validation["pearson"].value > beside.validation["pearson"].value + 0.2


def test_with_nothing_left_the_target_is_the_mean_over_the_turns_prompts(small_model: LensModel) -> None:
    """Every node at its reference is the model on that turn's prompt."""
    encoded = encoded_prompt(small_model, PROMPT)
    plan = component_plan(small_model, encoded, 9)
    rows = list(range(len(plan.written)))
    start, end = encoded.instruction
    own = list(encoded.ids[start : min(end, len(encoded) - 1)])
    prompts = in_turns(encoded.ids, [*own[1:], *own[:1]], start)
    there = [float(valued(small_model, replace(plan, encoded=EncodedPrompt.from_ids(ids)), 1, [])) for ids in prompts]
    nothing, everything = only(small_model, plan, [[], rows], rows).tolist()
    assert nothing == pytest.approx(sum(there) / TURNS, abs=1e-5)
    assert everything == pytest.approx(float(valued(small_model, plan, 1, [])), abs=1e-5)
    assert abs(nothing - everything) > 1e-2 and max(there) - min(there) > 1e-2


def test_what_an_adapter_adds_is_the_same_node_in_every_turn() -> None:
    base, tuned = (load_model(hf, tokenizer=make_tokenizer(), prove=False) for hf in with_adapter(1)[:2])
    graph = attribute(tuned, PROMPT, target=9, adapter=base, validate=False)
    encoded = encoded_prompt(tuned, PROMPT)
    own = list(encoded.ids[slice(encoded.instruction[0], min(encoded.instruction[1], len(encoded) - 1))])
    prompts = in_turns(encoded.ids, [*own[1:], *own[:1]], encoded.instruction[0])
    each = [attribute(tuned, PROMPT, target=9, adapter=base, against=ids, validate=False) for ids in prompts]
    assert graph.row("adapter") and graph.settings["against"] == "own words"
    for node in graph.nodes:
        if node.kind in ("adapter", "mlp"):
            alone = [one.nodes[one.index[node.id]].attribution for one in each]
            assert node.attribution == pytest.approx(sum(alone) / TURNS, abs=1e-6)
    assert max(abs(graph.nodes[row].attribution or 0.0) for row in graph.row("adapter")) > 1e-3


def test_where_there_is_but_one_word_the_mean_stands_in(small_model: LensModel) -> None:
    one = attribute(small_model, [7, 7, 7, 9], target=9, validate=False)
    assert one.settings["against"] == "mean" and "the mean over" in title(one)
    two = attribute(small_model, [7, 8, 7, 9], target=9, validate=False)
    assert two.settings["against"] == "own words" and two.edges.abs().max() > 1e-4


def test_the_title_says_what_the_prompt_was_compared_with(small_model: LensModel) -> None:
    graph = attribute(small_model, PROMPT, target=9, against=OTHER, validate=False)
    assert title(graph).endswith(f"compared with “{OTHER}”") and title(graph).startswith("What leads to")
    assert title(attribute(small_model, PROMPT, target=9, against="zero", validate=False)).endswith("with zero")


def with_a_sink(length: float) -> LensModel:
    """A model in which one token's embedding is very long."""
    hf = make_hf_model("gpt2")
    with torch.no_grad():
        hf.transformer.wte.weight[7] *= length
    return load_model(hf, surface="bridge", tokenizer=make_tokenizer(), in_place=True, prove=False)


def test_a_sink_is_in_no_mean_and_left_alone() -> None:
    encoded = EncodedPrompt.from_ids((7, 9, 12, 3, 5))
    assert sinks(with_a_sink(1.0), encoded) == ()
    model = with_a_sink(1000.0)
    assert sinks(model, encoded) == (0,)
    clean = values(model, encoded, POINTS)
    mean = reference_of(model, encoded, clean, "mean")
    assert mean.sinks == (0,) and "left alone" in mean.said
    for name in POINTS:
        assert torch.equal(mean.values[name][0], clean[name][0])
        torch.testing.assert_close(mean.values[name][3], clean[name][1:].mean(0))
    graph = attribute(model, encoded, target=9, against="mean", validate=False)
    assert all(node.attribution == 0 for node in graph.nodes if node.pos == 0 and node.kind != "logit")
    assert any(node.attribution != 0 for node in graph.nodes if node.pos == 1)


def test_a_mean_of_prompts_is_place_by_place(small_model: LensModel) -> None:
    encoded = encoded_prompt(small_model, PROMPT)
    clean = values(small_model, encoded, POINTS)
    found = reference_of(small_model, encoded, clean, (OTHER, LONGER))
    assert found.kind == "mean of prompts" and found.values[STREAM].shape == clean[STREAM].shape
    both = [reference_of(small_model, encoded, clean, each).values[STREAM] for each in (OTHER, LONGER)]
    torch.testing.assert_close(found.values[STREAM], (both[0] + both[1]) / 2)
    assert not torch.allclose(both[0], both[1])
