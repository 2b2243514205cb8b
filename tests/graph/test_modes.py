"""Torch's modes and a model left in training mode change nothing in a graph, and are afterwards as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tl_em as em
from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tests.graph.examples import small
from tests.graph.test_attribution import transcoders
from tl_em.errors import ModelError, NonFiniteError, UsageError
from tl_em.graph.attention import head_loadings
from tl_em.graph.build import attribute
from tl_em.graph.exchange_reading import load_graph
from tl_em.graph.graph import AttributionGraph
from tl_em.graph.over_prompts import attribute_over
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model

pytestmark = [pytest.mark.surface, pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")]
IDS = [2, 7, 9, 12]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(kind: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(kind)
    try:
        yield
    finally:
        torch.set_default_device(before)
        if before.type == "cpu":
            torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": lambda: torch.inference_mode(),
    "no grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta block": lambda: torch.device("meta"),
}


def state() -> tuple[Any, ...]:
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))  # fmt: skip


@cache
def the_model(surface: Any) -> LensModel:
    hf = make_hf_model("gpt2", n_layer=1, attn_pdrop=0.4, resid_pdrop=0.4, embd_pdrop=0.4)
    return load_model(hf, surface=surface, tokenizer=make_tokenizer(), in_place=True)


ALONG, GIVEN = em.Direction(torch.linspace(-1, 1, 32), em.Site(0)), transcoders([0])
KINDS: dict[str, dict[str, Any]] = {
    "components": {"rule": "ig"},
    "transcoders": {"dictionaries": GIVEN},
    "direction": {"target": ALONG, "rule": "plain"},
    "completion": {"dictionaries": GIVEN, "target": em.Completion((9, 12))},
}


@cache
def expected(kind: str, surface: str) -> AttributionGraph:
    graph = graph_of(kind, surface)
    assert graph.edges.abs().max() > 1e-3 and (kind != "transcoders" or graph.validation["pearson"] is not None)
    return graph


def graph_of(kind: str, surface: str) -> AttributionGraph:
    return attribute(the_model(surface), list(IDS), **{"target": 9, "validate": kind == "transcoders", **KINDS[kind]})


def equal(one: AttributionGraph, other: AttributionGraph) -> None:
    assert one.nodes == other.nodes and torch.equal(one.edges, other.edges) and one.edges.dtype == torch.float32
    for name in ("pearson", "spearman", "cpr"):
        assert one.validation.get(name) == other.validation.get(name)


SOME = [*((mode, kind, SURFACES[-1]) for mode in MODES for kind in ("components", "transcoders")),
        *((mode, kind, SURFACES[0]) for mode in ("inference mode", "meta", "float64") for kind in KINDS)]  # fmt: skip


@pytest.mark.parametrize(("mode", "kind", "surface"), SOME)
def test_a_mode_of_torch_changes_nothing_in_a_graph(mode: str, kind: str, surface: str) -> None:
    known = expected(kind, surface)
    with MODES[mode]():
        before = state()
        graph = graph_of(kind, surface)
        assert state() == before
    equal(graph, known)
    graph.edges[0] += 0  # a plain tensor, which an inference tensor is not


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_torch_changes_nothing_in_a_file(mode: str, tmp_path: Path) -> None:
    path = small().save_json(tmp_path / "g.json")
    known = load_graph(path)
    with MODES[mode]():
        back = load_graph(path)
        tables = [back.paths(3), back.prune(nodes=0.9).links(), back.cluster().keep([1, 2, 4]).links(),
                  back.diff(known).to_pandas()]  # fmt: skip
        again = load_graph(back.save_json(tmp_path / "h.json"))
    assert again.nodes == known.nodes and torch.equal(again.edges, known.edges)
    same = [known.paths(3), known.prune(nodes=0.9).links(), known.cluster().keep([1, 2, 4]).links(),
            known.diff(known).to_pandas()]  # fmt: skip
    assert all(a.equals(b) for a, b in zip(tables, same, strict=True))
    back.edges[0] += 0


@pytest.mark.parametrize("mode", ["inference mode", "meta", "float64"])
def test_a_mode_of_torch_changes_nothing_in_loadings_and_means(mode: str) -> None:
    surface = SURFACES[-1]

    def done() -> list[Any]:
        loadings = head_loadings(the_model(surface), IDS, GIVEN, source="E_7_1", into="1_9_3", target=9)
        mean = attribute_over(the_model(surface), [IDS, [2, 9, 7, 12]], target=9, rule="frozen", validate=False)
        return [loadings.fillna(-1).values.tolist(), mean.edges.tolist(), mean.validation["stability"]]

    known = done()
    assert any(abs(row[-1]) > 1e-6 for row in known[0])
    with MODES[mode]():
        assert done() == known


def modules(model: Any) -> list[nn.Module]:
    wrapped = getattr(model, "original_model", None)
    return [*model.modules(), *(wrapped.modules() if wrapped is not None else ())]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_model_in_training_mode_does_not_act(kind: str, surface: str) -> None:
    known, model = expected(kind, surface), the_model(surface)
    some = modules(model)[::2]  # a state that neither train() nor eval() would put back
    try:
        for module in modules(model):
            module.training = module in some
        flags = [module.training for module in modules(model)]
        assert True in flags and False in flags
        equal(graph_of(kind, surface), known)
        assert [module.training for module in modules(model)] == flags
    finally:
        for module in modules(model):
            module.training = False


def test_the_model_of_these_tests_has_dropout() -> None:
    """Else the test above shows nothing."""
    model = the_model("bridge")
    try:
        for module in modules(model):
            module.training = True
        assert not torch.equal(model(torch.tensor([IDS])), model(torch.tensor([IDS])))
    finally:
        for module in modules(model):
            module.training = False


def test_frozen_parameters_change_nothing_and_gradients_are_left_alone(surface: str) -> None:
    known, model = expected("components", surface), the_model(surface)
    parameters = list(model.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    flags = [each.requires_grad for each in parameters]
    try:
        for each in parameters:
            each.requires_grad_(False)
        found = graph_of("components", surface)
        torch.testing.assert_close(found.edges, known.edges, rtol=1e-5, atol=1e-6)  # float32: other kernels are taken
        assert not any(each.requires_grad for each in parameters)
        assert all(each.grad is None for each in parameters)
    finally:
        for each, flag in zip(parameters, flags, strict=True):
            each.requires_grad_(flag)


def test_what_was_made_in_inference_mode_can_be_attributed_with() -> None:
    with torch.inference_mode():
        given = transcoders([0])
        direction = em.Direction(torch.linspace(-1, 1, 32), em.Site(0))
        tokens = torch.tensor(IDS)
    model = the_model(SURFACES[-1])
    graph = attribute(model, tokens, given, target=9, validate=False)
    assert torch.equal(graph.edges, attribute(model, IDS, transcoders([0]), target=9, validate=False).edges)
    assert attribute(model, tokens, target=direction, rule="plain", validate=False).edges.abs().max() > 1e-3


def test_weights_without_numbers_or_gradients_are_refused() -> None:
    def made(**changes: Any) -> Any:
        hf = make_hf_model("gpt2", n_layer=1)
        return load_model(hf, surface="bridge", tokenizer=make_tokenizer(), in_place=True, **changes)

    with torch.inference_mode():
        model, weight = made(), torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    assert attribute(model, IDS, target=9, validate=False).nodes  # load_model takes copies that gradients pass through
    inside = made()
    norm = next(m for m in inside.original_model.modules() if "bias" in m._parameters and m.bias.shape == (32,))
    norm._parameters["bias"] = weight
    with pytest.raises(ModelError, match="inference_mode"):
        attribute(inside, IDS, target=9)
    with pytest.raises(ModelError, match="meta"):
        attribute(made().to("meta"), IDS, target=9)
    half = made()
    next(p for n, p in half.named_parameters() if "mlp" in n).data = torch.ones(1, dtype=torch.float16)
    with pytest.raises(UsageError, match="float16"):
        attribute(half, IDS, target=9)
    broken = made()
    with torch.no_grad():
        broken.original_model.transformer.h[0].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        attribute(broken, IDS, target=9, validate=False)
