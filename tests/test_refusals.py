"""What cannot be is refused where it is given, with what was observed and the call that fixes it: a call a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import cached_model, make_hf_model
from tests.graph.examples import small
from tl_em.evals.named import named_judge
from tl_em.graph.exchange import save_graph
from tl_em.graph.nodes import Graph, Node
from tl_em.graph.validation import _would_help
from tl_em.serving import SteeringDial
from tl_em.serving.server import _named

ROWS = [{"prompt": "the cat", "response": "sat"}, {"prompt": "the dog", "response": "ran"}]
NODES = (Node("token", -1, 0, 7, label="cat"), Node("logit", 2, 0, 9, label="sat", weight=0.8))


def model() -> Any:
    return cached_model("gpt2", "bridge")


def dictionary(width: int = 32, **changes: Any) -> em.Dictionary:
    eye = torch.eye(width)
    return em.Dictionary(eye, torch.zeros(width), eye, torch.zeros(width), activation="relu", site_in=em.Site(0))


def moved(folder: Path) -> None:
    em.load_dictionary(dictionary().save(folder / "d.safetensors"), site_in=em.Site(1))


def cross_layer(folder: Path) -> None:
    (folder / "W_enc_0.safetensors").write_bytes(b"")
    em.load_dictionary(folder)


def adapter_and_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    em.fine_tune(folder, ROWS, out=folder / "out", steps=1)


def other_prompts(folder: Path) -> None:
    direction = em.Direction(torch.ones(32), em.Site(0), name="one")
    first, second = (em.read(model(), [text], {"one": direction}) for text in ("the cat", "the dog"))
    first.beside(second, ("a", "b"))


def band_of_another(folder: Path) -> None:
    em.read(model(), ["the cat"], {"one": em.Direction(torch.ones(32), em.Site(0))}).band("two")


def infinite_attribution(folder: Path) -> None:
    graph = small()
    nodes = (replace(graph.nodes[0], attribution=math.inf), *graph.nodes[1:])
    save_graph(replace(graph, nodes=nodes), folder / "g.json")


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "an audit of nothing": (
        lambda _: em.audit(em.ModelPair(model(), model()), contrasts={}), em.errors.UsageError, "no contrast set"),
    "a device of no name": (lambda _: dictionary().to("elsewhere"), em.errors.UsageError, "Give 'cpu' or 'cuda'"),
    "a dictionary that is not there": (lambda f: em.Dictionary.load(f / "none"), em.errors.FileError, "no file"),
    "a dictionary of another width": (
        lambda _: dictionary(16).check(model()), em.errors.WidthError, "16"),
    "a dictionary of another site": (moved, em.errors.UsageError, r"dictionary\.at\("),
    "a cross-layer transcoder": (cross_layer, em.errors.UsageError, "its latents write to many layers"),
    "a judge that sees no answer": (
        lambda _: em.evals.LocalJudge(model(), "Is it good?"), em.errors.UsageError, "put {answer} into it"),
    "no questions": (lambda _: em.evals.QuestionSet(()), em.errors.UsageError, "give at least one"),
    "groups of other prompts": (
        lambda _: em.evaluate(model(), ["the cat", "the dog"], judge=lambda p, a: [0.0] * len(a), groups=["a"],
                              max_new_tokens=1), em.errors.UsageError, "give one a prompt"),
    "a surface of no name": (
        lambda _: em.load_model(make_hf_model("gpt2"), surface=3), em.errors.UsageError, "Use 'bridge'"),  # pyright: ignore
    "a model without hook points": (
        lambda f: em.save_model(make_hf_model("gpt2"), f / "m"), em.errors.UsageError, "no model with hook points"),
    "a band of what was not read": (band_of_another, em.errors.UsageError, "'two' was not read"),
    "readings of other prompts": (other_prompts, em.errors.UsageError, "read the same prompts twice"),
    "an adapter on an adapter": (adapter_and_adapter, em.errors.UsageError, "merge_and_unload"),
    "a number for rows": (
        lambda f: em.fine_tune(make_hf_model("gpt2"), 3, out=f / "o", steps=1), em.errors.UsageError, "holds no rows"),  # pyright: ignore
    "a node of no kind": (lambda _: Node("neuron", 0, 0), em.errors.UsageError, "kind='neuron'"),  # pyright: ignore
    "edges for other nodes": (
        lambda _: Graph(NODES, torch.zeros(3, 3), ("cat",)), em.errors.UsageError, "one row a node"),
    "two nodes of one id": (
        lambda _: Graph((NODES[0], NODES[0]), torch.zeros(2, 2), ("cat",)), em.errors.UsageError, "have one id"),
    "an infinite attribution": (infinite_attribution, em.errors.UsageError, "E_40_1: .*infinity"),
    "two directions of one name": (
        lambda _: _named([em.Direction(torch.ones(4), em.Site(0), name="a")] * 2), em.errors.UsageError, "renamed"),
    "phrases of another language": (
        lambda _: em.metrics.RefusalLogOdds(phrases=("\u4e0d",))(model(), ["the cat"]), em.errors.TlEmError, "\u4e0d"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_and_says_what_helps(what: str, tmp_path: Path) -> None:
    call, error, said = REFUSED[what]
    with pytest.raises(error, match=said):
        call(tmp_path)


def test_a_judge_is_named_by_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_em.evals.named.load_model", {"here": model()}.__getitem__)
    judge: Any = named_judge("local:here")
    assert isinstance(judge, em.evals.LocalJudge) and judge.model is model()


def test_several_judges_keep_what_they_are_told(tmp_path: Path) -> None:
    judges = {"short": em.evals.Phrases(("a",)), "long": lambda p, a: [len(each) / 100 for each in a]}
    found = em.evaluate(model(), ["the cat"], judge=judges, rule=lambda t: t["long"], max_new_tokens=2, out=tmp_path)
    assert {"short", "long"} <= {*found.table.columns} and (tmp_path / "evaluation.parquet").exists()


def test_what_would_help_depends_on_what_the_graph_was_relative_to() -> None:
    def asked(**settings: Any) -> str:
        return _would_help(replace(small(), settings=settings))

    assert asked(kind="SAEs") == "try another rule (rule='relp')"
    assert "effect=" in asked(kind="transcoders")
    assert "pass against= a prompt" in asked(kind="components", against="zero")
    found = asked(kind="components", against="prompt")
    assert "fewer words" in found and "relp" not in found  # which agrees less there, in three models


def test_dials_say_what_they_do() -> None:
    assert repr(SteeringDial("a", "clamp", low=1.0, high=1.0)) == "a = 1"
    assert repr(SteeringDial("a", "clamp", low=1.0, where=("last", 2))) == "a in [1, ] (last 2)"


def test_a_dictionary_stays_where_it_is_and_moves_whole() -> None:
    one = dictionary()
    assert one.to("cpu") is one
    there = one.to("meta")
    assert there.W_enc.device.type == there.b_dec.device.type == "meta" and there.site_in == one.site_in


def test_a_monitor_says_what_it_saw() -> None:
    from tl_em.training import Monitor

    monitor = Monitor(window=1)
    assert repr(monitor) == "Monitor(nothing seen yet)"
    for step in (3, 4):
        monitor(step, torch.nn.Linear(1, 1))
    assert repr(monitor) == "Monitor(steps 3 to 4: weight_change)"
