"""Conditional interventions: the prompts that meet the condition are edited, the others are untouched bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.errors import UsageError, WidthError
from tl_em.interventions.base import Intervention
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.intervene import intervene
from tl_em.interventions.wrappers import Conditional
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import encode
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits

pytestmark = pytest.mark.surface

PROMPTS = ["the cat sat", "please steal", "tell me how a happy king sang", "the dog ran", "a red fish", "please wash"]


@pytest.fixture
def condition(model: LensModel) -> Direction:
    generator = torch.Generator().manual_seed(1)
    return Direction(torch.randn(int(model.cfg.d_model), generator=generator), Site(1))


@pytest.fixture
def push(model: LensModel) -> Add:
    generator = torch.Generator().manual_seed(2)
    return Add(Direction(torch.randn(int(model.cfg.d_model), generator=generator), Site(1)), 6.0)


def projections(model: LensModel, condition: Direction) -> Tensor:
    return condition.project(capture(model, PROMPTS, [condition.site], position="prompt_end")[:, 0])


def middle(values: Tensor) -> float:
    """A threshold that no prompt sits on, so that rounding decides nothing."""
    ordered = values.sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


def test_rows_above_the_threshold_are_edited_and_the_others_not_at_all(
    model: LensModel, condition: Direction, push: Add
) -> None:
    found = projections(model, condition)
    above = middle(found)
    held = found > above
    assert 0 < int(held.sum()) < len(PROMPTS)
    plain = next_token_logits(model, PROMPTS)
    with intervene(model, push):
        pushed = next_token_logits(model, PROMPTS)
    with intervene(model, Conditional(push, condition, above=above)):
        some = next_token_logits(model, PROMPTS)
        answers = generate(model, PROMPTS, max_new_tokens=4)
        singly = [generate(model, [prompt], max_new_tokens=4)[0] for prompt in PROMPTS]
    assert torch.equal(some[~held], plain[~held]) and torch.equal(some[held], pushed[held])
    assert not torch.equal(pushed[held], plain[held])
    assert answers == singly
    with intervene(model, push):
        all_pushed = generate(model, PROMPTS, max_new_tokens=4)
    untouched = generate(model, PROMPTS, max_new_tokens=4)
    assert answers == [all_pushed[i] if held[i] else untouched[i] for i in range(len(PROMPTS))]
    assert all_pushed != untouched


def test_the_condition_is_remembered_under_the_cache(model: LensModel, condition: Direction, push: Add) -> None:
    above = middle(projections(model, condition))
    conditional = Conditional(push, condition, above=above)
    with intervene(model, conditional, where="generated"):
        cached = generate(model, PROMPTS, max_new_tokens=4)
        tokens = [_uncached(model, prompt, 4) for prompt in PROMPTS]
    assert cached == tokens
    assert cached != generate(model, PROMPTS, max_new_tokens=4)


def _uncached(model: LensModel, prompt: str, steps: int) -> str:
    model_any: Any = model
    tokenizer = model_any.tokenizer
    encoded, new = encode(model, [prompt])[0], []
    for _ in range(steps):
        new.append(int(next_token_logits(model, [encoded.with_response(new)])[0].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def test_thresholds_beyond_all_prompts_are_never_and_always(small_model: LensModel) -> None:
    direction = Direction(torch.ones(int(small_model.cfg.d_model)), Site(1))
    plain = next_token_logits(small_model, PROMPTS)
    with intervene(small_model, Add(direction)):
        always = next_token_logits(small_model, PROMPTS)
    for above, expected in ((1e9, plain), (-1e9, always)):
        with intervene(small_model, Conditional(Add(direction), direction, above=above)):
            assert torch.equal(next_token_logits(small_model, PROMPTS), expected)
    nested = Conditional(Conditional(Add(direction), direction, above=-1e9), direction, above=1e9)
    with intervene(small_model, nested):
        assert torch.equal(next_token_logits(small_model, PROMPTS), plain)


def test_a_condition_may_be_read_where_nothing_can_be_written(small_model: LensModel) -> None:
    width = int(small_model.cfg.d_model)
    generator = torch.Generator().manual_seed(1)
    reading = Direction(torch.randn(width, generator=generator), Site(1, "mlp_in"))
    found = projections(small_model, reading)
    above = middle(found)
    plain = next_token_logits(small_model, PROMPTS)
    with intervene(small_model, Conditional(Add(Direction(torch.ones(width), Site(1))), reading, above=above)):
        some = next_token_logits(small_model, PROMPTS)
    assert [bool((some[i] != plain[i]).any()) for i in range(len(PROMPTS))] == (found > above).tolist()


def test_an_edit_before_its_condition_a_plain_hook_and_a_pass_of_your_own_are_refused(small_model: LensModel) -> None:
    direction = Direction(torch.ones(int(small_model.cfg.d_model)), Site(1))
    everywhere = Conditional(Ablate(direction), direction, above=0)
    with intervene(small_model, everywhere), pytest.raises(UsageError, match="before its condition"):
        next_token_logits(small_model, PROMPTS)
    conditional = Conditional(Add(direction), direction, above=0)
    with pytest.raises(UsageError, match=r"em\.intervene"):
        conditional.hooks(small_model)
    with intervene(small_model, conditional), pytest.raises(UsageError, match=r"em\.generate"):
        small_model(torch.tensor([[2, 8, 9]]))
    narrow = Conditional(Add(direction), Direction(torch.ones(3), Site(0)), above=0)
    with pytest.raises(WidthError), intervene(small_model, narrow):
        raise AssertionError("the block must not run")
    assert isinstance(conditional, Intervention)
