"""Adapters that were not merged: their nodes are those of the merged model against its base, and nothing stays off."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tests.graph.test_attribution import as_frozen, frozen_at, logits_read, tokens_of, transcoders, values
from tl_em.errors import ModelError
from tl_em.graph.adapters import adapter_writes, switched_off, unmerged
from tl_em.graph.build import attribute, encoded_prompt
from tl_em.graph.edges import Written
from tl_em.graph.gradients import LAST
from tl_em.graph.latents import latent_plan
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.surfaces import as_bridge
from tl_em.models.upstream_chatter import quiet

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]
MODULES = {
    "gpt2": ["attn.c_proj", "c_fc", "mlp.c_proj"],  # not c_attn, which a Bridge splits
    "llama": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "gemma2": ["k_proj", "o_proj", "up_proj"],
}


def tuned_by(*names: str, family: str = "llama", modules: list[str] | None = None, **options: Any) -> Any:
    """A peft model with an adapter of each name, all active; the same weights every time."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=modules or MODULES[family], init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about Conv1D
        found = peft.get_peft_model(make_hf_model(family), config, adapter_name=names[0])
        for name in names[1:]:
            found.add_adapter(name, config)
    found.base_model.set_adapter(list(names))
    for name, parameter in found.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.3  # a fine-tune, not another model
    return found.eval()


def bridge(hf_model: Any) -> LensModel:
    return load_model(hf_model, tokenizer=make_tokenizer(template=None), in_place=True)


def written(model: LensModel, base: LensModel) -> dict[tuple[str, int], Tensor]:
    return {(each.point, each.node.pos): each.vector for each in adapter_writes(model, base, tokens_of(model))}


# --- What the nodes are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names"), [*((family, ("persona",)) for family in MODULES), ("llama", ("first", "second"))]
)
def test_unmerged_nodes_are_those_of_the_merged_model_against_its_base(family: str, names: tuple[str, ...]) -> None:
    peft_model = tuned_by(*names, family=family)
    merged = bridge(copy.deepcopy(peft_model).merge_and_unload())
    model, base = bridge(peft_model.get_base_model()), bridge(make_hf_model(family))
    ours, theirs = written(model, model), written(merged, base)
    assert ours.keys() == theirs.keys() and len({point for point, _ in ours}) == 6
    for place, vector in ours.items():  # float32: the merged weights are rounded once more
        assert (vector - theirs[place]).norm() <= 1e-5 * max(float(each.norm()) for each in theirs.values())
    labels = {each.node.label for each in adapter_writes(model, model, tokens_of(model))}
    assert labels == {" + ".join(names)}


@pytest.mark.parametrize("kind", ["components", "transcoders"])
def test_their_graph_is_that_of_the_merged_model_against_its_base(kind: str) -> None:
    peft_model = tuned_by("persona")
    merged = bridge(copy.deepcopy(peft_model).merge_and_unload())
    model, base = bridge(peft_model.get_base_model()), bridge(make_hf_model("llama"))
    tokens, given = tokens_of(model), None if kind == "components" else transcoders()
    options: dict[str, Any] = {"target": 9, "skip": (), "validate": False}
    ours = attribute(model, tokens, given, adapter=True, **options)
    theirs = attribute(merged, tokens, given, adapter=base, **options)
    assert ours.row("adapter") == theirs.row("adapter") and len(ours.row("adapter")) == 6 * len(tokens)
    rows, scale = ours.row("adapter"), float(theirs.edges[:, theirs.row("adapter")].abs().max())
    # two float32 runs, of which one has its weights rounded once more
    torch.testing.assert_close(ours.edges[:, rows], theirs.edges[:, rows], rtol=0, atol=2e-5 * scale)
    assert not attribute(model, tokens, given, adapter=False, **options).row("adapter")


def test_an_adapter_that_writes_nothing_has_no_node() -> None:
    """B = 0, as peft begins."""
    peft_model = tuned_by("persona")
    model = bridge(peft_model.get_base_model())
    assert written(model, model)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not written(model, model)


def test_an_edge_from_an_adapter_is_what_the_target_loses_with_everything_else_frozen() -> None:
    model = bridge(tuned_by("persona").get_base_model())
    tokens = tokens_of(model)
    options: dict[str, Any] = {"rule": None, "adapter": model, "skip": ()}
    plan = latent_plan(model, encoded_prompt(model, tokens), transcoders(), 9, **options)
    graph = attribute(model, tokens, transcoders(), target=9, adapter=True, skip=(), validate=False)
    recorded = as_frozen(model, tokens, [f"blocks.{layer}.hook_mlp_out" for layer in range(3)])
    before = values(model, tokens, [LAST], frozen_at(recorded))[LAST]
    parts = [each for each in plan.written if each.node.kind == "adapter"]
    sizes = []
    for part in (*(each for each in parts if each.node.pos == len(tokens) - 1), parts[0]):
        after = values(model, tokens, [LAST], [*frozen_at(recorded), without(part)])[LAST]
        lost = float(logits_read(model, before - after, 9))
        edge = float(graph.edges[-1, graph.index[part.node.id]])
        assert edge == pytest.approx(lost, abs=1e-5 * max(1.0, float(graph.edges[-1].abs().max())))  # float32
        sizes.append(abs(lost))
    assert len(sizes) == 7 and sum(size > 1e-3 for size in sizes) > 3  # effects that are there


def without(part: Written) -> tuple[str, Any]:
    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[0, part.node.pos] -= part.vector
        return x

    return part.point, edit


def test_a_graph_with_adapters_is_validated() -> None:
    model = bridge(tuned_by("persona").get_base_model())
    graph = attribute(model, tokens_of(model), transcoders(), target=9, adapter=True, skip=())
    assert any(graph.nodes[row].effect is not None for row in graph.row("adapter"))


# --- The model afterwards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_the_adapters_are_on_again_and_train_as_before(trained: bool) -> None:
    peft_model = tuned_by("persona")
    model = bridge(peft_model.get_base_model())
    tokens = tokens_of(model)[None]
    peft_model.requires_grad_(trained)
    flags = {name: each.requires_grad for name, each in peft_model.named_parameters()}
    with torch.no_grad():
        logits = model(tokens)
        attribute(model, tokens, target=9, adapter=True, validate=False)
        assert torch.equal(model(tokens), logits)
        off = torch.zeros(0)
        with pytest.raises(RuntimeError, match="mine"), switched_off(unmerged(model)):
            off = model(tokens)
            raise RuntimeError("mine")
        assert torch.equal(model(tokens), logits) and not torch.allclose(off, logits, atol=1e-2)
        torch.testing.assert_close(off, bridge(make_hf_model("llama"))(tokens), rtol=1e-5, atol=1e-5)  # is the base
    assert {name: each.requires_grad for name, each in peft_model.named_parameters()} == flags


# --- Models without such adapters -------------------------------------------------------------------------------------


def refused(model: LensModel, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        attribute(model, tokens_of(model), target=9, adapter=True, validate=False)


def test_a_model_without_adapters_is_refused(make_model: Any) -> None:
    pytest.importorskip("peft")
    for surface in SURFACES:
        refused(make_model("gpt2", surface, template=None), r"no peft layer.*get_base_model\(\).*adapter=base")


def test_merged_adapters_and_ones_switched_off_are_refused() -> None:
    peft_model = tuned_by("persona")
    model = bridge(peft_model.get_base_model())
    peft_model.disable_adapter_layers()
    refused(model, "15 peft layers, all switched off")
    peft_model.enable_adapter_layers()
    peft_model.merge_adapter()
    refused(model, r"merged into the weights.*unmerge_adapter\(\)")
    peft_model.unmerge_adapter()
    assert written(model, model)


def test_adapters_that_a_bridge_passes_by_are_refused() -> None:
    """A joint qkv: the Bridge is not the model that was trained, and the graph would be of another one."""
    peft_model = tuned_by("persona", family="gpt2", modules=["c_attn", "c_fc"])
    tokens = tokens_of(bridge(make_hf_model("gpt2")))
    with torch.no_grad():
        logits = peft_model(tokens[None]).logits
        with quiet():  # as a user boots it; load_model refuses
            model = as_bridge("gpt2", peft_model.get_base_model(), None, torch.float32, "cpu")
        model.tokenizer = make_tokenizer(template=None)  # pyright: ignore[reportAttributeAccessIssue]
        assert not torch.allclose(model(tokens[None]), logits, atol=1e-2)  # why
    refused(model, r"blocks\.0\.\S+' and 2 more never ran.*merge_and_unload")


def test_without_peft_the_extra_is_named(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peft", "peft.tuners.tuners_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    model = make_model("gpt2", "bridge", template=None)
    refused(model, r"tl-em\[lora\].*adapter=base")
    assert not written(model, model)
