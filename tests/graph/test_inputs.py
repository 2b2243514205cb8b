"""What a graph may be asked about: every form of one prompt gives the same graph, anything else is one typed error."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tests.graph.test_attribution import PROMPT, transcoders
from tl_em.errors import PositionError, PromptError, PromptTooLongError, TlEmError, UnknownTokenError, UsageError
from tl_em.graph.attention import head_loadings
from tl_em.graph.build import attribute
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.over_prompts import attribute_over
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.prompts import EncodedPrompt, encode

pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
IDS = (2, 7, 9, 12)


@cache
def the_model() -> LensModel:
    return load_model(make_hf_model("gpt2", n_layer=1), surface="bridge", tokenizer=make_tokenizer(), in_place=True)


def graph_of(prompt: Any = IDS, target: Any = 9, **options: Any) -> AttributionGraph:
    return attribute(the_model(), prompt, target=target, **{"rule": "frozen", "validate": False, **options})


@cache
def expected() -> AttributionGraph:
    graph = graph_of()
    assert graph.edges.abs().max() > 1e-3
    return graph


def same(found: AttributionGraph) -> None:
    assert found.nodes == expected().nodes and torch.equal(found.edges, expected().edges)


@pytest.mark.parametrize(
    "prompt",
    [
        list(IDS), torch.tensor(IDS), torch.tensor([IDS]), torch.tensor(IDS, dtype=torch.int32), np.array(IDS),
        np.array([IDS], dtype=np.uint8), [np.int64(each) for each in IDS], [torch.tensor(each) for each in IDS],
        [list(IDS)], [torch.tensor(IDS)], EncodedPrompt.from_ids(IDS),
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 4)}, {"input_ids": list(IDS)},
    ],
    ids=lambda each: f"{type(each).__name__}",
)  # fmt: skip
def test_every_form_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    same(graph_of(prompt))


def test_a_chat_is_one_prompt() -> None:
    chat = [{"role": "user", "content": PROMPT}]
    ids = encode(the_model(), [chat])[0].ids
    assert len(ids) > 8
    assert torch.equal(graph_of(chat, against="mean").edges, graph_of(ids, against="mean").edges)


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        (torch.tensor([IDS, IDS]), PromptError, "batch of 2"), (np.array([IDS, IDS, IDS]), PromptError, "batch of 3"),
        ([list(IDS), list(IDS)], PromptError, "batch of 2"), ([torch.tensor(IDS)] * 2, PromptError, "batch of 2"),
        (torch.tensor([[IDS]]), PromptError, "whole numbers"), (torch.tensor(7), PromptError, "single number"),
        (7, PromptError, "one prompt"), (None, PromptError, "one prompt"), (np.int64(3), PromptError, "single number"),
        ([], PromptError, "no tokens"), ((), PromptError, "no tokens"), (torch.zeros(0), PromptError, "no tokens"),
        (torch.zeros(1, 0, dtype=torch.long), PromptError, "no tokens"), (np.array([]), PromptError, "no tokens"),
        (EncodedPrompt((), (0, 0), -1, None, ""), PromptError, "no tokens"),
        ([2, 7.0], PromptError, "7.0 at 1"), (torch.tensor([2.0, 7.0]), PromptError, "2.0 at 0"),
        ([2, True], PromptError, "True at 1"), (torch.tensor([True, False]), PromptError, "True at 0"),
        ([2, None], PromptError, "None at 1"), ([2, "the"], PromptError, "'the' at 1"),
        ([2, float("nan")], PromptError, "nan at 1"), (np.array(["the", "cat"]), PromptError, "'the' at 0"),
        ([2, -1], UnknownTokenError, "-1 at 1"), ([10**6, 2], UnknownTokenError, "1000000 at 0"),
        (EncodedPrompt.from_ids([2, 10**6]), UnknownTokenError, "1000000 at 1"),
        (torch.tensor([2, -5]), UnknownTokenError, "-5 at 1"), (np.array([2, 2**40]), UnknownTokenError, "at 1"),
        (["the cat", "the dog"], PromptError, "2 prompts"), (["the cat"], PromptError, "1 prompts"),
        ([EncodedPrompt.from_ids(IDS)] * 2, PromptError, "2 prompts"),
        ([[{"role": "user", "content": "the cat"}]] * 2, PromptError, "2 prompts"),
        ({"input_ids": torch.tensor([IDS, IDS])}, PromptError, "batch of 2"),
        ({"input_ids": [list(IDS)], "attention_mask": [[0, 1, 1, 1]]}, PromptError, "padding"),
        ([2] * 65, PromptTooLongError, "n_ctx"), (b"the cat", PromptError, "one prompt"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_one_prompt_is_named(prompt: Any, error: type[TlEmError], said: str) -> None:
    with pytest.raises(error, match=said):
        graph_of(prompt)
    with pytest.raises(error, match=said):
        head_loadings(the_model(), prompt, transcoders([0]), source="E_2_0", into="1_9_3", target=9)


@pytest.mark.parametrize(
    "target",
    [
        np.int64(9), torch.tensor(9), [9], (each for each in ()), np.array([9]), torch.tensor([9]), [np.int32(9)],
        {9}, "word",
    ],
    ids=range(9),
)  # fmt: skip
def test_every_form_of_a_token_is_that_target(target: Any) -> None:
    word = the_model().tokenizer.decode([9])  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(target, str | list | set | np.ndarray | np.generic | torch.Tensor):
        with pytest.raises(UsageError, match="no target"):
            graph_of(target=target)
        return
    same(graph_of(target=word if isinstance(target, str) else target))


@pytest.mark.parametrize(
    "target", [(9, 12), (np.int64(9), torch.tensor(12)), ([9], np.array([12])), (torch.tensor([9]), "word")]
)
def test_every_form_of_a_difference_is_that_difference(target: Any) -> None:
    word = the_model().tokenizer.decode([12])  # pyright: ignore[reportAttributeAccessIssue]
    target = tuple(word if isinstance(each, str) else each for each in target)
    assert torch.equal(graph_of(target=target).edges, graph_of(target=(9, 12)).edges)


@pytest.mark.parametrize("text", [[9, 12], (9, 12), np.array([9, 12]), torch.tensor([9, 12]), [np.int64(9), 12]])
def test_every_form_of_a_completion_is_that_completion(text: Any) -> None:
    assert torch.equal(graph_of(target=em.Completion(text)).edges, graph_of(target=em.Completion((9, 12))).edges)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (9.0, "no target"), (np.float64(9), "no target"), (float("nan"), "no target"), (True, "no target"),
        (torch.tensor([1.0, 2.0]), "Direction"), (np.ones(32), "Direction"), (torch.tensor([[9, 12]]), "no target"),
        ([], "no target"), (np.array([], dtype=int), "no target"), ({"a": 1}, "no target"), ([9, None], "no target"),
        (10**6, "not among"), (-1, "not among"), (np.int64(-3), "not among"), ([9, 10**6], "not among"),
        ([9, 9], "twice"), (torch.tensor([9, 12, 9]), "twice"), ((9, 9), "twice"), (([9, 9], 12), "twice"),
        ((9, [12, 9]), "twice"), ((9,), "tuple"), ((9, 10, 12), "tuple"), ((9, 2.5), "no target"),
        ((9, 10**6), "not among"), ((9, []), "no target"), ("the cat", "2 tokens"), ("", "0 tokens"),
        (em.Completion([]), "no tokens"), (em.Completion([10**6]), "not among"), (em.Completion([1.5]), "no target"),
        (em.Completion(["a", "b"]), "one text"), (em.Completion([9] * 100), "n_ctx"), (em.Completion(-1), "not among"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_target_is_named(target: Any, said: str) -> None:
    with pytest.raises((UsageError, PromptTooLongError), match=said):
        graph_of(target=target)


@pytest.mark.parametrize("skip", [[1], np.array([1]), torch.tensor([1]), {1}, [np.int64(1)], [-3], (1, 1), [1, -3]])
def test_every_form_of_positions_skips_them(skip: Any) -> None:
    graph = graph_of(dictionaries=transcoders([0]), rule=None, skip=skip)
    whole = graph_of(dictionaries=transcoders([0]), rule=None, skip=[])
    assert {node.pos for node in graph.nodes if node.kind == "feature"} == {0, 2, 3}
    assert {node.pos for node in whole.nodes if node.kind == "feature"} == {0, 1, 2, 3}
    assert graph.settings["skip"] == [1]


@pytest.mark.parametrize(
    ("skip", "error"),
    [
        ([99], PositionError), ([-5], PositionError), (np.array([0, 4]), PositionError), ([1.0], UsageError),
        ([True], UsageError), (1, UsageError), ("1", UsageError), ([None], UsageError), ([float("nan")], UsageError),
        (torch.tensor(1), UsageError), (torch.tensor([0.0]), UsageError), ({0: 1}, UsageError),
    ],
    ids=str,
)  # fmt: skip
def test_positions_that_the_prompt_has_not_are_named(skip: Any, error: type[TlEmError]) -> None:
    with pytest.raises(error, match="skip"):
        graph_of(dictionaries=transcoders([0]), rule=None, skip=skip)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunk": 0}, "chunk"), ({"chunk": 1.5}, "chunk"), ({"chunk": float("nan")}, "chunk"),
        ({"chunk": -1}, "chunk"),
        ({"max_nodes": 0}, "max_nodes"), ({"max_nodes": 2.5}, "max_nodes"), ({"max_bytes": float("inf")}, "max_bytes"),
        ({"seed": -1}, "seed"), ({"seed": 0.5}, "seed"), ({"skip": [1]}, "leave it out"),
        ({"dictionaries": []}, "empty"),
        ({"dictionaries": 3}, "Dictionary"), ({"dictionaries": {}}, "empty"), ({"against": 3}, "reference"),
        ({"against": [9.5, 3]}, "whole"), ({"against": ()}, "no tokens"),
        ({"max_seconds": 0}, "max_seconds"), ({"share": 1.5}, "share"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_options_are_checked_before_the_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, PromptError), match=said):
        graph_of(**options)


def test_a_reference_may_come_as_tokens_too() -> None:
    other = (2, 9, 7, 12)
    first = graph_of(against=EncodedPrompt.from_ids(other))
    assert first.edges.abs().max() > 1e-3 and first.settings["against"] == "prompt"
    for against in (torch.tensor(other), np.array([other]), list(other)):
        assert torch.equal(graph_of(against=against).edges, first.edges)
    several = graph_of(against=(list(other), torch.tensor(IDS)))
    assert several.settings["against"] == "mean of prompts"


def over(prompts: Any, **options: Any) -> AttributionGraph:
    return attribute_over(the_model(), prompts, **{"target": 9, "rule": "frozen", "validate": False, **options})


def test_several_prompts_may_be_rows() -> None:
    rows = [list(IDS), [2, 9, 7, 12]]
    first = over(rows)
    assert first.settings["prompts"] == 2
    for prompts in (torch.tensor(rows), iter([EncodedPrompt.from_ids(row) for row in rows])):
        assert torch.equal(over(prompts).edges, first.edges)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (partial(over, "the cat"), PromptError), (partial(over, torch.tensor(IDS)), PromptError),
        (partial(over, [{"role": "user", "content": "the"}]), PromptError), (partial(over, []), UsageError),
        (partial(over, EncodedPrompt.from_ids(IDS)), PromptError), (partial(over, 3), PromptError),
        (partial(over, [IDS, IDS], groups=["a"]), UsageError),
        (partial(over, [IDS, IDS], seed=1.5), UsageError), (partial(over, [IDS, [2, -1]]), UnknownTokenError),
        (partial(over, [IDS, IDS], targets=[9]), UsageError), (partial(over, IDS), PromptError),
    ],
)  # fmt: skip
def test_one_prompt_is_not_several(call: Callable[[], object], error: type[TlEmError]) -> None:
    with pytest.raises(error):
        call()


def test_ends_of_an_edge_are_nodes_that_can_be() -> None:
    given = (the_model(), list(IDS), transcoders([0]))
    ids = attribute(*given, target=9, validate=False).index
    assert "1_9_3" in ids
    for ends in (("1_9_3", "1_9_3"), ("E_2_0", "E_2_0"), ("nothing", "1_9_3")):
        with pytest.raises(UsageError):
            head_loadings(*given, source=ends[0], into=ends[1], target=9)
