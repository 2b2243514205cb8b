"""A stranger's intervention does all that the package's own do; a malformed one is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.extensions.intervention import Mirror
from tl_em.errors import UnknownHookError, UsageError
from tl_em.interventions.base import Partial, as_intervention
from tl_em.models.hooks import LensModel
from tl_em.models.stream import next_token_logits

pytestmark = pytest.mark.surface
PROMPTS = ["the cat sat", "please steal", "tell me how a happy king sang", "the dog ran"]
FIRST = em.Site(0)


def mirror(model: LensModel) -> Mirror:
    generator = torch.Generator().manual_seed(3)
    return Mirror(em.Direction(torch.randn(int(model.cfg.d_model), generator=generator), em.Site(0)), em.Site(1))


def test_it_is_applied_in_a_block_and_as_plain_hooks(model: LensModel) -> None:
    edit, any_model = mirror(model), model
    before = em.capture(model, PROMPTS, [em.Site(1)], position="prompt_end")[:, 0]
    with em.intervene(model, edit):
        after = em.capture(model, PROMPTS, [em.Site(1)], position="prompt_end")[:, 0]
        logits = next_token_logits(model, PROMPTS)
    along = edit.direction.project
    torch.testing.assert_close(along(after), -along(before), rtol=1e-4, atol=1e-5)
    assert float(along(before).abs().max()) > 0.1 and not torch.equal(logits, next_token_logits(model, PROMPTS))
    tokens = torch.tensor([[2, 8, 9]])
    with em.intervene(model, edit):
        expected = any_model(tokens)
    found = any_model.run_with_hooks(tokens, fwd_hooks=edit.hooks(model))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(found, expected)


def test_strengths_conditions_and_random_directions_come_with_it(small_model: LensModel) -> None:
    edit = mirror(small_model)
    metric = em.logit_difference("yes", "no")
    found = em.calibrate(small_model, edit, PROMPTS, target_kl=1e-3)
    assert found.kl.value == pytest.approx(1e-3, rel=0.05) and 0 < found.strength < 1
    curve = em.effect_curve(small_model, edit, PROMPTS, metric=metric, strengths=[0.5, 1], controls=2)
    assert len(curve.to_pandas().query("arm == 'random'")) == 4
    plain = next_token_logits(small_model, PROMPTS)
    with em.intervene(small_model, edit):
        mirrored = next_token_logits(small_model, PROMPTS)
    for above, expected in ((1e9, plain), (-1e9, mirrored)):
        conditional = em.Conditional(edit, edit.direction, above=above)
        for each in (conditional, Partial(conditional, 1.0), conditional.at(1.0)):
            with em.intervene(small_model, each):
                torch.testing.assert_close(next_token_logits(small_model, PROMPTS), expected)
    with em.intervene(small_model, edit, where=("last", 1)):
        assert not torch.equal(next_token_logits(small_model, PROMPTS), plain)
    with pytest.raises(UsageError, match="Mirror has no form in the weights"):
        em.orthogonalize_(small_model, edit)


def mirrored(direction: em.Direction, centre: Tensor) -> em.Intervention:
    return Mirror(direction, direction.site)


def test_the_question_use_is_asked_with_it() -> None:
    pair, site = em.load_pair("toy/insecure"), em.Site(2)
    contrast = (pair.contrasts or {})["persona"].split(seed=0)
    persona = em.difference_in_means(pair.base, contrast.train, site=site, position="prompt_end")
    whole: Any = (pair.behaviours or {})["persona"]
    few = em.Behaviour(whole.name, whole.metric, whole.present[::18], whole.absent[::18])
    asked: Any = {"questions": [em.claims.Use(remove=mirrored)], "behaviour": few, "controls": 99}
    found = em.compare(pair, {"persona": (persona, contrast.test)}, **asked)
    untreated = few.metric(pair.tuned, few.present).double().mean()
    with em.intervene(pair.tuned, mirrored(persona, persona.vector)):
        fall = float(untreated - few.metric(pair.tuned, few.present).double().mean())
    assert found.rows[0].detail["ablate in tuned"].value == pytest.approx(fall, abs=1e-5) and fall > 0.1
    random = found.use.query("arm == 'ablate in tuned' and condition == 'random'").iloc[0]
    assert random.low < random.high and random.n == 99


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        ("ablate", "Use.remove=….* is a str"),
        (lambda direction, centre: 3, "int is not an intervention"),
        (lambda direction, centre: em.Erase(torch.eye(4)[:2]), "Erase has no direction"),
    ],
)
def test_what_removes_nothing_along_a_direction_is_refused(remove: Any, said: str) -> None:
    direction = em.Direction(torch.ones(4), FIRST)
    with pytest.raises(UsageError, match=said):
        em.claims.Use(remove=remove)._made("remove", direction, torch.zeros(4))


@dataclass(frozen=True, eq=False)
class Careless(em.Intervention):
    """Edits everything that it sees, in one of several wrong ways."""

    how: str
    site: Any = FIRST

    def edit(self, x: Tensor) -> Any:
        wrong = {"narrow": x[..., 1:], "wide": x.double(), "nan": x * float("nan"), "none": None, "fine": x + 1}
        return x.add_(1) if self.how == "in place" else wrong[self.how]


@pytest.mark.parametrize(
    ("how", "said"),
    [("narrow", "returned shape"), ("wide", "float64"), ("nan", "returned NaN"), ("none", "NoneType"),
     ("in place", "changed in place")],
)  # fmt: skip
def test_what_is_no_edit_is_refused(small_model: LensModel, how: str, said: str) -> None:
    with (
        pytest.raises(UsageError, match=rf"Careless.edit at blocks.0.hook_resid_post returned .*{said.split()[-1]}"),
        em.intervene(small_model, Careless(how)),
    ):
        next_token_logits(small_model, PROMPTS)


def test_the_mask_holds_whatever_the_edit_returns() -> None:
    x, mask = torch.zeros(2, 3, 4), torch.tensor([[True, False, False], [False, True, True]])
    edited = Careless("fine").edit(x, mask, name="here")  # pyright: ignore[reportCallIssue]
    assert torch.equal(edited[..., 0], mask.float())


def test_without_a_site_or_at_a_wrong_one_it_is_refused(small_model: LensModel) -> None:
    for site, error, said in ((None, UsageError, "Careless has no site"), ("resid", UsageError, "Careless's site"),
                              (em.Site(99), UnknownHookError, "99")):  # fmt: skip
        with pytest.raises(error, match=said), em.intervene(small_model, Careless("fine", site)):
            raise AssertionError("the block must not run")
    with pytest.raises(UsageError, match="no direction that another one could replace"):
        Careless("fine").along(mirror(small_model).direction)


def test_an_object_with_the_members_of_one_is_one(small_model: LensModel) -> None:
    own = mirror(small_model)
    members = {name: getattr(own, name) for name in ("check", "hook_names", "points", "edit", "hooks")}
    with em.intervene(small_model, own):
        expected = next_token_logits(small_model, PROMPTS)
    for foreign in (SimpleNamespace(**members), Partial(SimpleNamespace(**members), 1.0)):
        with em.intervene(small_model, foreign):
            torch.testing.assert_close(next_token_logits(small_model, PROMPTS), expected)
    with pytest.raises(UsageError, match="not an intervention"):
        as_intervention("edit", SimpleNamespace(edit=own.edit))


def test_a_linear_edit_at_every_write_has_a_form_in_the_weights(small_model: LensModel) -> None:
    @dataclass(frozen=True, eq=False)
    class Halve(em.Intervention):
        direction: em.Direction
        sites = "every write"
        linear = True

        def edit(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            unit = self.direction.unit.to(x)
            return x - 0.5 * (x @ unit)[..., None] * unit

    em.untie_embeddings_(small_model)
    edit = Halve(mirror(small_model).direction)
    plain = next_token_logits(small_model, PROMPTS)
    with em.intervene(small_model, edit):
        expected = next_token_logits(small_model, PROMPTS)
    with em.interventions.orthogonalized(small_model, edit):
        torch.testing.assert_close(next_token_logits(small_model, PROMPTS), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert torch.equal(next_token_logits(small_model, PROMPTS), plain)
