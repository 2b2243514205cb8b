"""What components are compared with: another prompt of any length, other words, means that leave sinks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import make_hf_model, make_tokenizer
from tests.graph.test_attribution import PROMPT
from tl_em.graph.build import attribute, encoded_prompt
from tl_em.graph.captions import title
from tl_em.graph.gradients import STREAM
from tl_em.graph.references import aligned, reference_of, sinks, values
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
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
    mean = attribute(small_model, PROMPT, target=9, validate=False)
    assert mean.settings["against"] == "mean" and "the mean over" in title(mean)  # it has no word of ours
    monkeypatch.setattr("tl_em.graph.references.OTHER_WORDS", "the big dog ran")
    graph = attribute(small_model, PROMPT, target=9, validate=False)
    assert graph.settings["against"] == "other words" and graph.edges.abs().max() > 1e-3
    assert "compared with other words in the same places, “the big dog ran" in title(graph)
    last = len(graph.tokens) - 1
    assert all(node.attribution == 0 for node in graph.nodes if node.kind == "token" and node.pos == last)
    assert sum(node.attribution != 0 for node in graph.nodes if node.kind == "token") > 2


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
