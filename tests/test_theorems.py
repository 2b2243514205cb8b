"""What must hold exactly, on every family and surface: stated as theorems, each with the control that makes it mean
something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.errors import (
    HookNotFiredError,
    NonFiniteError,
    ProvenanceError,
    UnknownHookError,
    UsageError,
    WidthError,
)
from tl_em.interventions.base import Intervention
from tl_em.interventions.edits import Ablate, Add, Clamp
from tl_em.interventions.intervene import intervene
from tl_em.models.class_means import mean_activation
from tl_em.models.contrasts import ContrastSet
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel, hook_points, hooked
from tl_em.models.sites import Site
from tl_em.models.stream import capture, next_token_logits

pytestmark = pytest.mark.surface

TOKENS = torch.tensor([[2, 3, 8, 20, 11, 6, 4], [2, 3, 9, 10, 30, 6, 4]])
PROMPTS = [
    "the cat sat on the big car",
    "please steal",
    "tell me how a happy king went to the bank and sang about fish",
]
CONTRAST = ContrastSet(["steal the car", "please steal a bank"], ["wash the car", "please wash a bank"], label="steal")


def run(model: LensModel, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens)


def streams(model: LensModel, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """The residual stream before and after every block, read after whatever else is attached."""
    seen: dict[str, Tensor] = {}
    names = [f"blocks.{i}.hook_resid_{end}" for i in range(model.cfg.n_layers) for end in ("pre", "post")]

    def keep(name: str) -> Any:
        return lambda x, hook: seen.__setitem__(name, x.detach().clone())

    with hooked(model, [(name, keep(name)) for name in names]):
        run(model, tokens)
    return seen


@pytest.fixture
def direction(model: LensModel) -> Direction:
    return difference_in_means(model, CONTRAST, site=Site(1), position="instruction_end")


def test_an_ablated_component_is_zero_after_every_block_and_was_not_before(
    model: LensModel, direction: Direction
) -> None:
    before = streams(model)
    with intervene(model, Ablate(direction)):
        after = streams(model)
    for name, x in before.items():
        scale = float(x.norm(dim=-1).max())
        assert direction.project(x).abs().max() > 1e-3 * scale, f"nothing to ablate at {name}"
        # float32: each write is projected to rounding of its own size, and 2L + 1 of them add up
        assert direction.project(after[name]).abs().max() < 1e-5 * scale, name


def test_ablation_around_a_centre_sets_the_component_and_keeps_the_rest(model: LensModel, direction: Direction) -> None:
    centre = mean_activation(model, PROMPTS, site=direction.site, position="prompt_end")
    name = direction.site.hook_name
    before = streams(model)[name]
    with intervene(model, Ablate(direction, around=centre)):
        after = streams(model)[name]
    target = direction.project(centre)
    scale = float(before.norm(dim=-1).max())
    assert (direction.project(before) - target).abs().max() > 1e-2 * float(direction.project(before).abs().max())
    assert (direction.project(after) - target).abs().max() < 1e-5 * scale  # float32 rounding of one projection
    rest = [x - direction.project(x)[..., None] * direction.unit for x in (before, after)]
    assert (rest[0] - rest[1]).abs().max() < 1e-5 * scale


def test_addition_adds_exactly_the_vector_at_its_site_only(model: LensModel, direction: Direction) -> None:
    before = streams(model)
    with intervene(model, Add(direction, 3.0)):
        after = streams(model)
    name = direction.site.hook_name
    torch.testing.assert_close(after[name], before[name] + 3 * direction.vector, rtol=1e-5, atol=1e-5)
    assert torch.equal(after["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])
    assert not torch.equal(after["blocks.2.hook_resid_post"], before["blocks.2.hook_resid_post"])


def test_clamp_moves_only_what_lies_outside_its_bounds(model: LensModel, direction: Direction) -> None:
    name = direction.site.hook_name
    before = direction.project(streams(model)[name])
    bound = float(before.median())
    with intervene(model, Clamp(direction, high=bound)):
        after = direction.project(streams(model)[name])
    inside = before <= bound
    assert 0 < int(inside.sum()) < inside.numel()
    torch.testing.assert_close(after[inside], before[inside], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[~inside], torch.full_like(after[~inside], bound), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Ablate, lambda d: Add(d, 4.0), lambda d: Ablate(d, around=2 * d.vector)])
def test_context_restores_logits_bit_for_bit_also_after_an_exception(
    model: LensModel, direction: Direction, make: Any
) -> None:
    before = run(model)
    with intervene(model, make(direction)):
        assert not torch.equal(run(model), before)
    assert torch.equal(run(model), before)
    with pytest.raises(KeyError, match="the user's own"), intervene(model, make(direction)):
        run(model)
        raise KeyError("the user's own")
    assert torch.equal(run(model), before)


def test_hook_pairs_for_transformerlens_equal_the_context(model: LensModel, direction: Direction) -> None:
    for intervention in (Ablate(direction), Add(direction, 4.0)):
        with intervene(model, intervention):
            inside = run(model)
        model_any: Any = model
        with torch.no_grad():
            outside = model_any.run_with_hooks(TOKENS, fwd_hooks=intervention.hooks(model))
        assert torch.equal(inside, outside)
        assert not torch.equal(inside, run(model))


def test_interventions_compose_in_the_order_given(model: LensModel, direction: Direction) -> None:
    centre = torch.zeros_like(direction.vector)
    ablate, add = Ablate(direction, around=centre), Add(direction, 2.0)
    name = direction.site.hook_name
    with intervene(model, ablate, add):
        added_last = direction.project(streams(model)[name])
    with intervene(model, add, ablate):
        ablated_last = direction.project(streams(model)[name])
    torch.testing.assert_close(added_last, torch.full_like(added_last, 2 * direction.norm), rtol=1e-4, atol=1e-4)
    assert ablated_last.abs().max() < 1e-4 * direction.norm + 1e-4


def test_cached_generation_equals_uncached_token_for_token(model: LensModel, direction: Direction) -> None:
    strong = Add(direction, 8.0)
    with intervene(model, strong):
        cached = generate(model, PROMPTS, max_new_tokens=5)
        texts = [greedy_uncached(model, prompt, 5) for prompt in PROMPTS]
    assert cached == texts
    assert cached != generate(model, PROMPTS, max_new_tokens=5)


def greedy_uncached(model: LensModel, prompt: str, steps: int) -> str:
    from tl_em.models.prompts import encode

    tokenizer: Any = model.tokenizer
    ids, new = list(encode(model, [prompt])[0].ids), []
    for _ in range(steps):
        new.append(int(run(model, torch.tensor([ids + new]))[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def test_padded_equals_unpadded_under_an_intervention(model: LensModel, direction: Direction) -> None:
    with intervene(model, Ablate(direction)):
        together = next_token_logits(model, PROMPTS)
        alone = torch.cat([next_token_logits(model, [prompt]) for prompt in PROMPTS])
        sites = [Site(i) for i in range(model.cfg.n_layers)]
        acts = capture(model, PROMPTS, sites, position="instruction_end")
        acts_alone = torch.cat([capture(model, [prompt], sites, position="instruction_end") for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)  # float32 sums in another order
    torch.testing.assert_close(acts, acts_alone, rtol=1e-5, atol=1e-4)


def test_a_users_hooks_keep_their_place_and_run_first(model: LensModel, direction: Direction) -> None:
    point = hook_points(model)[direction.site.hook_name]
    order: list[str] = []
    point.add_hook(lambda x, hook: order.append("user"))
    theirs = list(point.fwd_hooks)
    try:
        with (
            intervene(model, Add(direction)),
            hooked(model, [(direction.site.hook_name, lambda x, hook: order.append("ours"))]),
        ):
            run(model)
        assert order == ["user", "ours"]
        assert point.fwd_hooks == theirs
        order.clear()
        run(model)
        assert order == ["user"]
    finally:
        model_any: Any = model
        model_any.reset_hooks()


def test_half_precision_is_edited_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = Direction(torch.randn(512, generator=generator), Site(0))
    x = (10 * torch.randn(64, 512, generator=generator)).to(torch.bfloat16)
    edited = Ablate(direction).edit(x)
    assert edited.dtype == torch.bfloat16
    residue = direction.project(edited).abs().mean()
    naive_unit = direction.unit.to(torch.bfloat16)
    naive = x - (x @ naive_unit)[:, None] * naive_unit
    assert residue < direction.project(naive).abs().mean()


# --- what must be refused ---------------------------------------------------------------------------------------------


def test_nothing_is_attached_when_a_direction_does_not_fit(
    small_model: LensModel, make_model: Any, surface: str
) -> None:
    points = hook_points(small_model)
    wrong_width = Direction(torch.ones(7), Site(0))
    beyond = Direction(torch.ones(small_model.cfg.d_model), Site(99))
    elsewhere = difference_in_means(
        make_model("gpt2", surface, template=None), CONTRAST, site=Site(0), position="prompt_end"
    )
    other_shape = Direction(
        torch.ones(small_model.cfg.d_model), Site(0), provenance=_with_layers(elsewhere.provenance, 12)
    )
    for bad, error in ((wrong_width, WidthError), (beyond, UnknownHookError), (other_shape, ProvenanceError)):
        with pytest.raises(error), intervene(small_model, Add(bad)):
            raise AssertionError("the block must not run")
    assert not any(point.fwd_hooks for point in points.values())


def _with_layers(provenance: Any, n_layers: int) -> Any:
    from dataclasses import replace

    return replace(provenance, n_layers=n_layers)


def test_sites_that_cannot_be_written_are_refused(small_model: LensModel) -> None:
    d = small_model.cfg.d_model
    for stream in ("resid_mid", "mlp_in"):
        with (
            pytest.raises(UsageError, match="read but not written"),
            intervene(small_model, Add(Direction(torch.ones(d), Site(0, stream)))),
        ):
            pass


def test_an_edit_that_never_fires_is_an_error_and_never_hides_the_users_own(small_model: LensModel) -> None:
    gated = "blocks.0.attn.hook_result"
    if gated not in hook_points(small_model):
        gated = next(name for name in hook_points(small_model) if "hook_attn_in" in name or "hook_result" in name)
    with pytest.raises(HookNotFiredError, match="never fired"), hooked(small_model, [(gated, lambda x, hook: x)]):
        run(small_model)
    with pytest.raises(ZeroDivisionError), hooked(small_model, [(gated, lambda x, hook: x)]):
        run(small_model)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda d: Clamp(d), UsageError),
        (lambda d: Clamp(d, low=2.0, high=1.0), UsageError),
        (lambda d: Ablate(d, around=torch.ones(3)), WidthError),
        (lambda d: Ablate(d, around=torch.full((4,), float("nan"))), NonFiniteError),
    ],
)
def test_values_that_make_no_intervention_are_refused(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(Direction(torch.ones(4), Site(0)))


def test_intervene_wants_interventions_and_hooks_say_what_they_cannot_do(small_model: LensModel) -> None:
    direction = Direction(torch.ones(small_model.cfg.d_model), Site(0))
    with pytest.raises(UsageError, match="changes nothing"), intervene(small_model):
        pass
    not_one: Any = direction
    with pytest.raises(UsageError, match="not an intervention"), intervene(small_model, not_one):
        pass
    with pytest.raises(UsageError, match=r"em\.intervene"):
        Add(direction).hooks(small_model, where="generated")
    assert isinstance(Ablate(direction), Intervention)
