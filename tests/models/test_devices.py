"""Models that accelerate spreads: on the CPU as on one device, and refused where weights are not there to be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tl_em.errors import ModelError, UsageError

accelerate = pytest.importorskip("accelerate")
PROMPTS, SITES = ["the cat sat", "a dog ran"], [em.Site(0), em.Site(2, "mlp_out")]
BLOCKS = [*(f"model.layers.{i}" for i in range(3))]
REST = ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"]
BY_BLOCK = dict.fromkeys([*BLOCKS, *REST], "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_hf_model("llama").save_pretrained(tmp_path)
    make_tokenizer(template=None).save_pretrained(tmp_path)
    return tmp_path


def read(model: Any) -> torch.Tensor:
    return em.capture(model, PROMPTS, SITES, position="prompt_end")


def spread(**places: str) -> Any:
    """A model with accelerate's hooks at every block, as on several devices."""
    return accelerate.dispatch_model(make_hf_model("llama"), BY_BLOCK | places, force_hooks=True)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, BY_BLOCK], ids=["cpu", "auto", "whole", "by block"])
def test_a_directory_is_loaded_by_a_device_map(device_map, folder):
    if device_map == "auto" and torch.cuda.is_available():
        device_map = {"": "cpu"}
    model = em.load_model(folder, device_map=device_map)
    assert em.proof(model) is not None and model.cfg.device == "cpu"
    assert torch.equal(read(model), read(em.load_model(folder, device="cpu")))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_accelerate_has_spread_stays_so_and_is_read_edited_and_continued(in_place):
    given, tokenizer = spread(), make_tokenizer(template=None)
    assert hasattr(given.model.layers[1], "_hf_hook")
    model: Any = em.load_model(given, tokenizer=tokenizer, in_place=in_place)
    plain = em.load_model(make_hf_model("llama"), tokenizer=tokenizer)
    assert hasattr(model.original_model.model.layers[1], "_hf_hook") and em.proof(model) is not None
    assert torch.equal(read(model), read(plain))
    contrast = em.ContrastSet(PROMPTS, ["please tell me", "yes no"])
    direction = em.difference_in_means(model, contrast, site=em.Site(1), position="prompt_end")
    with em.intervene(model, em.Ablate(direction)), em.intervene(plain, em.Ablate(direction)):
        assert torch.equal(read(model), read(plain))
        assert em.generate(model, PROMPTS, max_new_tokens=4) == em.generate(plain, PROMPTS, max_new_tokens=4)


def test_bfloat16_and_a_pair_are_loaded_by_a_device_map_too(folder):
    pair = em.load_pair(folder, folder, dtype="bfloat16", device_map={"": "cpu"})
    assert {each.dtype for each in pair.tuned.parameters()} == {torch.bfloat16}
    again = em.load_pair(em.load_model(folder), folder, device_map="cpu")
    assert torch.equal(read(again.base), read(again.tuned))


def test_weights_that_are_not_there_are_refused(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    offloaded = accelerate.cpu_offload(make_hf_model("llama"))
    places = BY_BLOCK | {"model.layers.1": "disk"}
    on_disk = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert next(on_disk.model.layers[1].parameters()).is_meta
    for given in (offloaded, on_disk):
        for in_place in (True, False):
            with pytest.raises(ModelError, match=r"accelerate keeps weights .* device='cpu'"):
                em.load_model(given, in_place=in_place)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(make_hf_model("llama").config)
    with pytest.raises(ModelError, match=r"on the meta device.*LlamaForCausalLM.from_pretrained"):
        em.load_model(empty, in_place=True)


def test_what_cannot_be_spread_says_what_can(folder, monkeypatch):
    for options, said in (
        ({"device_map": "cpu", "device": "cpu"}, "give one of them"),
        ({"device_map": {}}, "spreads nothing"),
        ({"device_map": 3}, "spreads nothing"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "puts lm_head on the disk"),
        ({"device_map": {"": "meta"}}, "puts everything on the meta"),
        ({"device_map": "cpu", "surface": "hooked"}, "surface='bridge'"),
    ):
        with pytest.raises(UsageError, match=said):
            em.load_model(folder, **options)
    with pytest.raises(UsageError, match="Leave it out"):
        em.load_model("toy/insecure", device_map="cpu")
    with pytest.raises(UsageError, match=r"accelerate.dispatch_model"):
        em.load_model(make_hf_model("llama"), device_map="cpu")
    for options in ({"device": "cpu"}, *({"surface": each} for each in SURFACES if each == "hooked")):
        with pytest.raises(UsageError, match="would gather it on one"):
            em.load_model(spread(), **options)
    gathered = spread()
    accelerate.hooks.remove_hook_from_submodules(gathered)  # as the message says
    assert em.load_model(gathered, device="cpu", tokenizer=make_tokenizer()).cfg.device == "cpu"
    monkeypatch.setattr("tl_em.models.devices.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"tl_em\[lora\]"):
        em.load_model(folder, device_map="cpu")
