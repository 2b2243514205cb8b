"""A direction in the biases does what the hooks do, or is refused; and nothing of the model is changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tl_em.errors import UsageError, WeightEditError, WidthError
from tl_em.interventions.base import EVERY_WRITE, Partial
from tl_em.models.loading import load_model

pytestmark = pytest.mark.surface
TOKENS = torch.tensor([[2, 3, 8, 20, 11, 6, 4], [2, 3, 9, 10, 30, 6, 4]])
STREAMS = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def fresh(family: str, surface: str, **options: Any) -> Any:
    return load_model(make_hf_model(family), surface=surface, tokenizer=make_tokenizer(), in_place=True, **options)  # pyright: ignore[reportArgumentType]


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def direction(layer: int = 1, stream: str = "resid_post", seed: int = 3, width: int = 32) -> em.Direction:
    return em.Direction(torch.randn(width, generator=torch.Generator().manual_seed(seed)), em.Site(layer, stream))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("layer", [0, 2])
def test_baked_equals_added(family: str, stream: str, layer: int, surface: str) -> None:
    model = fresh(family, surface)
    em.untie_embeddings_(model)
    before, steer = run(model), em.Add(direction(layer, stream), -1.5)
    with em.intervene(model, steer):
        steered = run(model)
    em.bake_(model, steer)
    spread = float(before.std())
    assert (run(model) - steered).abs().max() <= 1e-5 * spread
    assert (steered - before).abs().max() > 1e-2 * spread


def test_twice_is_twice_and_an_ablation_afterwards_sees_the_new_bias(surface: str) -> None:
    model = fresh("llama", surface)
    em.orthogonalize_(model, direction(seed=9))  # which looks the weights up, before there is a bias
    for _ in range(2):
        em.bake_(model, em.Add(direction()))
    with em.intervene(model, em.Ablate(direction())):
        ablated = run(model)
    em.orthogonalize_(model, direction())
    assert (run(model) - ablated).abs().max() <= 1e-5 * float(ablated.std())


class Everywhere(em.Intervention):
    """One of somebody's own, that adds the same at every write."""

    sites = EVERY_WRITE

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        return x + 0.1


def test_whatever_adds_a_constant_is_baked(surface: str) -> None:
    for steer in (Partial(em.Add(direction()), 0.5), Everywhere()):
        model = fresh("gpt2", surface)
        em.untie_embeddings_(model)
        with em.intervene(model, steer):
            steered = run(model)
        em.bake_(model, steer)
        assert (run(model) - steered).abs().max() <= 1e-5 * float(steered.std())


def test_what_is_more_than_a_bias_is_refused(surface: str) -> None:
    model = fresh("gpt2", surface)
    before = state(model)
    refused: list[Any] = [em.Ablate(direction()), em.Clamp(direction(), high=1.0)]
    refused += [em.Conditional(em.Add(direction()), direction(0), above=0.0)]
    for intervention in refused:
        with pytest.raises(UsageError, match="a bias can do no more"):
            em.bake_(model, intervention)
    with pytest.raises(WidthError):
        em.bake_(model, em.Add(direction(width=7)))
    with pytest.raises(UsageError, match="not an intervention"):
        em.bake_(model, direction())
    after = state(model)
    assert all(torch.equal(value, before[name]) for name, value in after.items()) and before.keys() == after.keys()


def test_a_norm_behind_the_layer_is_refused_and_nothing_is_left(surface: str) -> None:
    model = fresh("gemma2", surface)
    before = state(model)
    for site in ((1, "resid_post"), (1, "attn_out")):
        with pytest.raises(WeightEditError, match=r"norm.*em\.intervene"):
            em.bake_(model, em.Add(direction(*site)))
    assert before.keys() == state(model).keys()


def test_an_edit_that_is_not_the_addition_is_taken_back() -> None:
    """A head that reads with the embedding's weight without sharing a parameter: only the logits show it."""
    hf_model = make_hf_model("llama")
    hf_model.lm_head.forward = lambda x: torch.nn.functional.linear(x, hf_model.model.embed_tokens.weight)
    model: Any = load_model(hf_model, tokenizer=make_tokenizer(), in_place=True)
    before, logits = state(model), run(model)
    with pytest.raises(WeightEditError, match="logits differ"):
        em.bake_(model, em.Add(direction(0, "resid_pre")))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert torch.equal(run(model), logits)


def test_the_base_of_a_pair_keeps_its_weights() -> None:
    pair = em.load_pair("toy/insecure")
    assert pair.contrasts is not None
    persona = em.Direction(torch.randn(96, generator=torch.Generator().manual_seed(0)), em.Site(1))
    asked = pair.contrasts["persona"].positive[:2]
    before = em.capture(pair.base, asked, [em.Site(2)], position="prompt_end")
    em.bake_(pair.tuned, em.Add(persona, 3.0))
    assert torch.equal(em.capture(pair.base, asked, [em.Site(2)], position="prompt_end"), before)
    once = em.load_pair("toy/insecure").tuned
    with em.intervene(once, em.Add(persona, 3.0)):
        steered = em.capture(once, asked, [em.Site(2)], position="prompt_end")
    found = em.capture(pair.tuned, asked, [em.Site(2)], position="prompt_end")
    assert torch.allclose(found, steered, atol=1e-4)


def test_half_precision_is_added_in_float32(surface: str) -> None:
    model = fresh("gpt2", surface, dtype=torch.bfloat16)
    em.bake_(model, em.Add(direction()))
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
