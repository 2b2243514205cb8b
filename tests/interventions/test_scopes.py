"""Scopes by token role: exactly the tokens that they name, cached as uncached, in a batch as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.errors import UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.intervene import intervene
from tl_em.models.contrasts import ContrastSet
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.residual_writes import write_points
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits, sequence_logprobs
from tl_em.models.token_scopes import Where

pytestmark = pytest.mark.surface

PROMPTS = [
    "the cat sat on the big car",
    "please steal",
    "tell me how a happy king went to the bank and sang about fish",
]
ANSWERS = [[20, 30, 40], [25], [31, 22, 33, 44, 35]]
CONTRAST = ContrastSet(["steal the car", "please steal a bank"], ["wash the car", "please wash a bank"], label="steal")
SCOPES: list[Where] = ["all", "prompt", "generated", "instruction", ("last", 2)]
NAME = "blocks.1.hook_resid_post"


@pytest.fixture
def direction(model: LensModel) -> Direction:
    return difference_in_means(model, CONTRAST, site=Site(1), position="instruction_end")


def answered(model: LensModel) -> list[EncodedPrompt]:
    return [prompt.with_response(ids) for prompt, ids in zip(encode(model, PROMPTS), ANSWERS, strict=True)]


def stream(model: LensModel, prompt: EncodedPrompt) -> Tensor:
    """The residual stream at the direction's site, every token of one prompt, after whatever is attached."""
    seen: list[Tensor] = []
    with hooked(model, [(NAME, lambda x, hook: seen.append(x.detach().clone()))]):
        next_token_logits(model, [prompt])
    return seen[0][0]


def expected(prompt: EncodedPrompt, where: Where) -> list[int]:
    """By the definition of the scopes, in words."""
    end = prompt.prompt_end + 1
    if where == "instruction":
        return list(range(*prompt.instruction))
    ranges: dict[Any, tuple[int, int]] = {"all": (0, len(prompt)), "prompt": (0, end), "generated": (end, len(prompt))}
    return list(range(*ranges[where])) if isinstance(where, str) else list(range(max(0, end - where[1]), end))


@pytest.mark.parametrize("where", SCOPES, ids=str)
def test_exactly_the_tokens_in_scope_are_edited(model: LensModel, direction: Direction, where: Where) -> None:
    for prompt in answered(model):
        before = stream(model, prompt)
        with intervene(model, Add(direction, 3.0), where=where):
            after = stream(model, prompt)
        inside = expected(prompt, where)
        outside = [i for i in range(len(prompt)) if i not in inside]
        assert inside
        torch.testing.assert_close(after[inside], before[inside] + 3 * direction.vector, rtol=1e-5, atol=1e-5)
        assert torch.equal(after[outside], before[outside])


def test_prompt_and_generated_together_are_all(model: LensModel, direction: Direction) -> None:
    ablate = Ablate(direction)
    prompts = answered(model)
    with intervene(model, ablate):
        everywhere, answers = sequence_logprobs(model, prompts), generate(model, PROMPTS, max_new_tokens=5)
    with intervene(model, ablate, where="prompt"):
        half = sequence_logprobs(model, prompts)
        with intervene(model, ablate, where="generated"):
            together, both = sequence_logprobs(model, prompts), generate(model, PROMPTS, max_new_tokens=5)
    assert torch.equal(together, everywhere) and answers == both
    assert (half - everywhere)[[0, 2]].abs().min() > 1e-4  # a response of one token is not read under "generated"
    assert abs(float(half[1] - everywhere[1])) < 1e-4


@pytest.mark.parametrize("where", SCOPES[1:], ids=str)  # "all" is in test_theorems
def test_cached_generation_equals_uncached_token_for_token(
    model: LensModel, direction: Direction, where: Where
) -> None:
    strong = Add(direction, 12.0)
    with intervene(model, strong, where=where):
        cached = generate(model, PROMPTS, max_new_tokens=4)
        assert cached == [uncached(model, prompt, 4) for prompt in PROMPTS]
    assert cached != generate(model, PROMPTS, max_new_tokens=4)


def uncached(model: LensModel, prompt: str, steps: int) -> str:
    tokenizer: Any = model.tokenizer
    encoded, new = encode(model, [prompt])[0], []
    for _ in range(steps):
        new.append(int(next_token_logits(model, [encoded.with_response(new)])[0].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("where", SCOPES[1:], ids=str)  # "all" is in test_theorems
def test_a_batch_of_mixed_lengths_equals_one_prompt_at_a_time(
    model: LensModel, direction: Direction, where: Where
) -> None:
    prompts = answered(model)
    sites = [Site(i) for i in range(model.cfg.n_layers)]
    with intervene(model, Add(direction, 3.0), where=where):
        together = next_token_logits(model, prompts), capture(model, prompts, sites, position="response_mean")
        alone = [(next_token_logits(model, [p]), capture(model, [p], sites, position="response_mean")) for p in prompts]
    for found, single in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(single), rtol=1e-5, atol=1e-4)  # float32 sums in another order


def test_a_generation_after_a_response_goes_on_in_its_role(small_model: LensModel) -> None:
    """Prompts of equal length whose responses begin at different tokens share a batch."""
    direction = difference_in_means(small_model, CONTRAST, site=Site(1), position="instruction_end")
    base = encode(small_model, ["please steal", "please steal a bank"])
    prompts = [base[0].with_response([20, 30, 31]), base[1].with_response([21])]
    assert len(prompts[0]) == len(prompts[1])
    for where in SCOPES:
        with intervene(small_model, Add(direction, 12.0), where=where):
            together = generate(small_model, prompts, max_new_tokens=4)
            assert together == [generate(small_model, [prompt], max_new_tokens=4)[0] for prompt in prompts]


def test_a_pass_that_nobody_explains_is_refused_and_scope_all_is_not(small_model: LensModel) -> None:
    direction = Direction(torch.ones(int(small_model.cfg.d_model)), Site(1))
    tokens = torch.tensor([[2, 8, 9]])
    with intervene(small_model, Add(direction)), torch.no_grad():
        small_model(tokens)
    with intervene(small_model, Add(direction), where="prompt"), torch.no_grad():
        with pytest.raises(UsageError, match=r"em\.generate"):
            small_model(tokens)
        next_token_logits(small_model, PROMPTS)


def test_a_look_at_how_the_model_is_built_is_not_in_any_scope(surface: str) -> None:
    from tests.conftest import make_hf_model, make_tokenizer
    from tl_em.models.loading import load_model

    model: Any = load_model(make_hf_model("llama"), surface=surface, tokenizer=make_tokenizer())  # pyright: ignore[reportArgumentType]
    direction = Direction(torch.ones(int(model.cfg.d_model)), Site(1))
    with intervene(model, Add(direction), where="prompt"):
        assert len(write_points(model)) == 2 * model.cfg.n_layers + 1


@pytest.mark.parametrize("where", ["answer", ("last", 0), ("first", 2), ("last",), ("last", "2"), 3])
def test_scopes_that_do_not_exist_are_refused(small_model: LensModel, where: Any) -> None:
    direction = Direction(torch.ones(int(small_model.cfg.d_model)), Site(1))
    with pytest.raises(UsageError, match="there is no scope"), intervene(small_model, Add(direction), where=where):
        raise AssertionError("the block must not run")
