"""A model around weights that are mapped: the same model, without a copy of its bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tl_em.organisms.mapped_models import packed, unpacked


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **shape)).eval()  # pyright: ignore


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_was_packed(model: Any, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    expected = logits(model)
    found = unpacked(copy.deepcopy(packed(model)))
    assert torch.equal(logits(found), expected) and found.dtype == dtype
    assert torch.equal(logits(model), expected), "the model that was packed is as it was"
    assert found.lm_head.weight is found.model.embed_tokens.weight, "tied"


def test_weights_are_mapped_and_the_skeleton_holds_none(model: Any) -> None:
    given = packed(model)
    mine = sum(weight.data.nbytes for weight in given.weights.values())
    assert mine == sum(p.numel() * p.element_size() for p in model.parameters())
    assert not any(p.numel() for p in given.skeleton.parameters())
    for weight in given.weights.values():
        weight.data.setflags(write=False)  # as Ray's object store has them
    found = unpacked(given)
    for name, weight in found.named_parameters():
        assert weight.data_ptr() == given.weights[name].data.ctypes.data
    torch.nn.init.zeros_(copy.deepcopy(found).lm_head.weight)  # a copy may be changed


def test_a_packed_model_is_fine_tuned_as_the_model_is(model: Any) -> None:
    one, two = copy.deepcopy(model), copy.deepcopy(unpacked(packed(model)))
    for each in (one, two):
        each.train()
        each(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (one, two)]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
