"""Whatever mode of torch the caller stands in, the numbers are the same, and the mode is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tl_em.models.hooks import LensModel
from tl_em.models.stream import next_token_logits, sequence_logprobs
from tl_em.models.torch_state import _modules, plain_torch

POSITIVE = ["the cat sat on the big red car", "a dog ran to the small blue fish", "please tell me how a king sang"]
NEGATIVE = ["a cat sat in a big red bank", "the dog ran from the small blue bird", "please tell me about a queen"]
SET = em.ContrastSet(POSITIVE, NEGATIVE)
ANSWERED = [[{"role": "user", "content": p}, {"role": "assistant", "content": "sure here"}] for p in POSITIVE]
REFUSED = [[{"role": "user", "content": p}, {"role": "assistant", "content": "no sorry"}] for p in NEGATIVE]
METRIC = em.logit_difference("yes", "no")


@pytest.fixture(scope="module")
def dropping() -> LensModel:
    """A model whose dropout acts in training mode: a Bridge (a HookedTransformer has no dropout)."""
    model = em.load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer(), in_place=True)
    em.untie_embeddings_(model)
    return model


@contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)  # pyright: ignore[reportArgumentType]


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    try:
        yield
        assert model.training and model.original_model.training and model.original_model.transformer.drop.training
    finally:
        model.eval()
        model.original_model.eval()


MODES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "inference": lambda _: torch.inference_mode(),
    "no gradients": lambda _: torch.no_grad(),
    "float64": lambda _: double(),
    "meta device": lambda _: meta(),
    "autocast": lambda _: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda _: deterministic(),
    "training": training,
}


def eye() -> em.Dictionary:
    both = torch.cat([torch.eye(32), -torch.eye(32)], 1)
    return em.Dictionary(both, torch.zeros(64), both.T, torch.zeros(32), activation="relu", site_in=em.Site(1))


DIRECTION = em.Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), em.Site(1))
SAE = eye()


def steered(model: Any, *interventions: Any) -> Tensor:
    with em.intervene(model, *interventions):
        return next_token_logits(model, POSITIVE)


def edited(model: Any) -> Tensor:
    with em.interventions.orthogonalized(model, DIRECTION):
        return next_token_logits(model, POSITIVE)


def selected(model: Any) -> Tensor:
    candidates = em.candidate_directions(model, SET, positions=["prompt_end"])
    options = {"max_kl": 10, "min_induce": -100, "max_depth": 1, "controls": 2}
    others = em.ContrastSet([f"please {p}" for p in POSITIVE], [f"please {p}" for p in NEGATIVE])
    return em.select_direction(model, candidates, others, metric=METRIC, **options).direction.vector


def verified(model: Any) -> float:
    check = em.verify_feature(model, SAE.feature(0), SET, metric=METRIC, placebos=3, doses=(0.5,))
    return check.rows[0].effect.value


VERBS: dict[str, Callable[[Any], Any]] = {
    "capture": lambda m: em.capture(m, POSITIVE, [em.Site(1)], position="prompt_end"),
    "mean_activation": lambda m: em.mean_activation(m, POSITIVE, site=em.Site(1), position=-1),
    "difference_in_means": lambda m: em.difference_in_means(m, SET, site=em.Site(1), position=-1).vector,
    "extract_directions": lambda m: em.extract_directions(m, SET, method="lda")[0].vector,
    "next_token_logits": lambda m: next_token_logits(m, POSITIVE),
    "sequence_logprobs": lambda m: sequence_logprobs(m, ANSWERED),
    "ablate": lambda m: steered(m, em.Ablate(DIRECTION)),
    "scale": lambda m: steered(m, em.ScaleFeature(SAE.feature(1), 0.0), em.Clamp(DIRECTION, high=0.5)),
    "condition": lambda m: steered(m, em.Conditional(em.Add(DIRECTION), DIRECTION, above=-10.0)),
    "orthogonalized": edited,
    "select_direction": selected,
    "calibrate": lambda m: em.calibrate(m, em.Add(DIRECTION), POSITIVE, target_kl=0.01).strength,
    "logit_lens": lambda m: em.directions.logit_lens(m, DIRECTION, controls=9).logit.to_numpy(),
    "generate": lambda m: em.generate(m, POSITIVE, max_new_tokens=3),
    "effect_curve": lambda m: em.effect_curve(
        m, em.Add(DIRECTION), POSITIVE, metric=METRIC, strengths=[0.5], controls=2
    ).points[1].effect.value,
    "score_features": lambda m: em.score_features(m, SAE, {"a": em.ContrastSet(ANSWERED, REFUSED)})
    .to_pandas()[["effect", "attribution"]].to_numpy(),
    "verify_feature": verified,
    "removed_mean": lambda m: em.interventions.removed_mean(m, DIRECTION, SET).value,
}  # fmt: skip


SLOW = ("select_direction", "calibrate", "effect_curve", "verify_feature")


@pytest.fixture(scope="module")
def wanted(dropping: LensModel) -> dict[str, Any]:
    return {name: verb(dropping) for name, verb in VERBS.items()}


def test_training_mode_would_change_the_model(dropping: Any) -> None:
    tokens = torch.tensor([[2, 3, 8, 20, 11]])
    with training(dropping), torch.no_grad():
        assert (dropping(tokens) - dropping(tokens)).abs().max() > 0.1
        with plain_torch(dropping):
            assert torch.equal(dropping(tokens), dropping(tokens))


@pytest.mark.parametrize("mode", MODES)
def test_every_verb_gives_the_same(mode: str, dropping: LensModel, wanted: dict[str, Any]) -> None:
    quick = mode in ("no gradients", "deterministic")
    for name, verb in VERBS.items():
        if quick and name in SLOW:
            continue
        with MODES[mode](dropping):
            found = verb(dropping)
        if isinstance(found, Tensor):
            assert found.device.type == "cpu" and found.dtype == torch.float32, name
            assert not found.is_inference() and not found.requires_grad, name
        if name == "generate":
            assert found == wanted[name]
        else:
            np.testing.assert_allclose(np.asarray(found), np.asarray(wanted[name]), atol=1e-6, err_msg=name)


def test_a_hook_in_the_callers_own_pass_is_exact_under_autocast(dropping: Any) -> None:
    """The caller's pass stays in the caller's mode; what is removed is removed to float32's last digits."""
    seen: list[Tensor] = []
    tokens = torch.tensor([[2, 3, 8, 20, 11]])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with em.intervene(dropping, em.Ablate(DIRECTION)):
            point = "blocks.0.hook_resid_pre"
            dropping.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: seen.append(x.clone()))])
    assert DIRECTION.project(seen[0]).abs().max() < 1e-6 * seen[0].norm(dim=-1).max()


def test_weights_that_were_made_in_inference_mode_can_be_edited_and_come_back() -> None:
    model: Any = em.load_model(make_hf_model("llama"), tokenizer=make_tokenizer(), in_place=True)
    with torch.inference_mode():
        for module in (*model.modules(), *model.original_model.modules()):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not parameter.is_inference():
                    module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
    before = next_token_logits(model, POSITIVE)
    for context in (nullcontext, torch.inference_mode):
        with context(), em.interventions.orthogonalized(model, DIRECTION):
            inside = next_token_logits(model, POSITIVE)
        assert (inside - before).abs().max() > 1e-2
        assert torch.equal(next_token_logits(model, POSITIVE), before)


def test_a_direction_made_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        direction = em.Direction(torch.ones(4), em.Site(0))
    x = torch.ones(1, 4, requires_grad=True)
    em.Ablate(direction).edit(x).square().sum().backward()
    assert x.grad is not None


def test_every_module_is_found_once(dropping: Any) -> None:
    twice = nn.ModuleList([dropping, dropping.original_model, dropping.original_model, nn.Identity()])
    found, known = [*_modules(twice)], [*twice.modules()]
    assert {*map(id, found)} == {*map(id, known)} and len(found) == len(known) > 20
