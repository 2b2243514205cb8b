"""Each edit as a pure function: what it sets is set, what is orthogonal stays, one by one and in rows, in any dtype."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import SURFACES, cached_model
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile
from tl_em.directions.reliability import neutral_z
from tl_em.errors import HiddenSteerWarning, NonFiniteError, UsageError, WidthError
from tl_em.interventions.base import EVERY_WRITE, Intervention
from tl_em.interventions.edits import (
    Ablate,
    Add,
    Clamp,
    around_rows,
    component,
    of_directions,
    set_component,
    without_rows,
)
from tl_em.interventions.hidden_steer import removed_mean
from tl_em.interventions.subspaces import Erase
from tl_em.models.contrasts import ContrastSet
from tl_em.models.sites import Site
from tl_em.models.stream import capture
from tl_em.stats import Estimate

D = 6
G = torch.Generator().manual_seed(0)
X, VECTORS = torch.randn(5, 3, D, generator=G), 3 * torch.randn(4, D, generator=G)
CENTRES = {Site(1): torch.randn(D, generator=G), Site(2, "attn_out"): torch.randn(D, generator=G)}
ROWS = torch.tensor([2, 0, 3, 3, 1])
DIRECTION = Direction(VECTORS[0], Site(1))


def rest(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return x.double() - (x.double() @ unit.double())[..., None] * unit.double()


def close(found: torch.Tensor, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    digits = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected).double().expand(found.shape), rtol=digits, atol=digits
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_component_is_set_and_the_rest_stays(dtype: torch.dtype) -> None:
    unit, x = torch.nn.functional.normalize(VECTORS[0].double(), dim=0), X.to(dtype)
    along = component(x, unit)
    assert along.dtype == torch.promote_types(dtype, torch.float32) and along.shape == (5, 3)
    close(along, x.double() @ unit, torch.float32 if dtype == torch.bfloat16 else dtype)
    for target in (0.0, -2.5, torch.arange(15.0).view(5, 3)):
        after = set_component(x, unit, target)
        assert after.dtype == dtype
        close(after.double() @ unit, target, dtype)
        close(rest(after, unit), rest(x, unit), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "edit",
    [Ablate(DIRECTION), Ablate(DIRECTION, around=CENTRES[Site(1)]), Ablate(DIRECTION, around=CENTRES),
     Add(DIRECTION, -1.5), Clamp(DIRECTION, low=-0.2, high=0.3)],
)  # fmt: skip
def test_rows_along_many_directions_are_each_the_edit_along_its_own(edit: Intervention, dtype: torch.dtype) -> None:
    x, name = X.to(dtype), "blocks.2.hook_attn_out"
    together = edit.rowwise(VECTORS)(x, ROWS, name)
    assert together.dtype == dtype
    for row, k in enumerate(ROWS.tolist()):
        alone = edit.along(replace(DIRECTION, vector=VECTORS[k])).edit(x[row], name=name)
        close(together[row], alone, dtype)
        assert (together[row] - x[row]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_lose_their_component_or_get_the_centres(dtype: torch.dtype) -> None:
    x, units = X.to(dtype), torch.nn.functional.normalize(VECTORS, dim=-1)[ROWS]
    without, around = without_rows(x, units), around_rows(x, units, CENTRES[Site(1)])
    for row, unit in enumerate(units):
        close(without[row].double() @ unit.double(), 0.0, torch.float32 if dtype == torch.float64 else dtype)
        close(
            around[row].double() @ unit.double(), float(CENTRES[Site(1)] @ unit), min(dtype, torch.float32, key=_digits)
        )
        for after in (without, around):
            assert after.dtype == dtype
            close(rest(after[row], unit), rest(x[row], unit), min(dtype, torch.float32, key=_digits))


def test_rows_in_double_precision_keep_their_digits() -> None:
    x, axis = X.double() / 3, torch.eye(D)[torch.tensor([1, 0, 2, 2, 5])]
    expected, zero = x.clone(), x.clone()
    for row, k in enumerate((1, 0, 2, 2, 5)):
        expected[row, :, k], zero[row, :, k] = float(CENTRES[Site(1)][k]), 0.0
    close(around_rows(x, axis, CENTRES[Site(1)]), expected, torch.float64)
    close(without_rows(x, axis), zero, torch.float64)


def _digits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def test_ablation_acts_at_every_write_and_around_a_centre_at_its_site() -> None:
    zero, single, several = (
        Ablate(DIRECTION),
        Ablate(DIRECTION, around=CENTRES[Site(1)]),
        Ablate(DIRECTION, around=CENTRES),
    )
    assert (zero.sites, single.sites, several.sites) == (EVERY_WRITE, (Site(1),), tuple(CENTRES))
    assert [each.linear for each in (zero, single, several)] == [True, False, False]
    assert Ablate(replace(DIRECTION, site=Site(4)), around=CENTRES[Site(1)]).sites == (Site(4),)


def test_each_site_has_its_own_centre() -> None:
    several, unit = Ablate(DIRECTION, around=CENTRES), DIRECTION.unit
    for site, centre in CENTRES.items():
        close(several.edit(X, name=site.hook_name) @ unit, float(centre @ unit))
    assert abs(float((CENTRES[Site(1)] - CENTRES[Site(2, "attn_out")]) @ unit)) > 0.1
    close(several.edit(X), several.edit(X, name=Site(1).hook_name))  # the first, where no name says which
    close(Ablate(DIRECTION, around=CENTRES[Site(1)]).edit(X, name="anywhere") @ unit, float(CENTRES[Site(1)] @ unit))


def test_centres_that_fit_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="gives no centre"):
        Ablate(DIRECTION, around={})
    for wrong in (torch.ones(D + 1), {**CENTRES, Site(3): torch.ones(D - 1)}):
        with pytest.raises(WidthError, match=rf"centre is {D + 1 if isinstance(wrong, torch.Tensor) else D - 1} wide"):
            Ablate(DIRECTION, around=wrong)
    with pytest.raises(NonFiniteError, match=r"around\["):
        Ablate(DIRECTION, around={Site(1): torch.full((D,), math.nan)})
    with pytest.raises(UsageError, match="a key of around"):
        Ablate(DIRECTION, around={"somewhere": torch.ones(D)})
    listed = Ablate(DIRECTION, around=[0.0] * D)
    assert listed.around.dtype == torch.float32


def test_an_addition_is_a_multiple_of_the_raw_vector() -> None:
    add = Add(DIRECTION, 2)
    close(add.edit(X) - X, 2 * DIRECTION.vector)
    close(Add(DIRECTION).edit(X) - X, DIRECTION.vector)
    assert add.at(-0.5).coefficient == -1.0 and add.at(-0.5).direction is DIRECTION
    assert add.strongest == math.inf and isinstance(add.coefficient, float)
    assert add.edit(X.bfloat16()).dtype == torch.bfloat16
    for call in (lambda: Add(DIRECTION, math.nan), lambda: add.at(math.inf)):
        with pytest.raises(UsageError, match="finite"):
            call()


@pytest.mark.parametrize(("low", "high"), [(-0.5, 0.5), (None, 0.5), (-0.5, None), (0.0, 0.0)])
def test_a_clamp_moves_what_lies_outside_onto_the_nearer_bound(low: float | None, high: float | None) -> None:
    unit = DIRECTION.unit
    before, after = X @ unit, Clamp(DIRECTION, low=low, high=high).edit(X)
    assert (before < -0.5).any() and (before > 0.5).any()
    close(after @ unit, before.clamp(low, high))
    close(rest(after, unit), rest(X, unit))


def test_bounds_that_no_value_meets_are_refused() -> None:
    with pytest.raises(UsageError, match="without a bound"):
        Clamp(DIRECTION)
    with pytest.raises(UsageError, match="swap them"):
        Clamp(DIRECTION, low=0.5, high=0.4)
    for low, high in ((math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(UsageError, match="finite"):
            Clamp(DIRECTION, low=low, high=high)
    assert Clamp(DIRECTION, low=1, high=1).low == 1.0


@pytest.mark.parametrize(
    ("z", "half", "warns"), [(1.2, 0.1, True), (-1.2, 0.1, True), (1.05, 0.1, False), (0.2, 0.1, False)]
)
def test_an_ablation_to_zero_that_is_known_to_steer_says_so(z: float, half: float, warns: bool) -> None:
    """Where the whole interval of the mean that it takes away lies beyond 1 standard deviation."""
    known = Estimate(z, z - half, z + half, 8, 8.0, "made up")
    far = Direction(torch.ones(32), Site(1), name="mine", neutral=known)
    model = cached_model("gpt2", SURFACES[-1])
    if warns:
        with pytest.warns(HiddenSteerWarning, match=rf"mine.* z = {z:.2f}"):
            Ablate(far).check(model)
    silent = [Ablate(far, around=torch.zeros(32)), Ablate(replace(far, neutral=None)), Add(far)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", HiddenSteerWarning)
        for edit in silent if warns else [*silent, Ablate(far)]:
            edit.check(model)
    with pytest.raises(WidthError):
        Ablate(DIRECTION).check(model)


def test_a_removed_mean_is_that_of_the_prompts_without_the_concept() -> None:
    model = cached_model("gpt2", SURFACES[-1])
    contrast = ContrastSet(
        ["steal the cat", "steal a big dog", "please steal"], ["wash the cat", "wash a dog", "please"]
    )
    mine = Direction(torch.arange(32.0) - 3, Site(1), position="prompt_end")
    x, y = (
        mine.project(capture(model, prompts, [Site(1)], position="prompt_end")[:, 0]).double().numpy()
        for prompts in (contrast.positive, contrast.negative)
    )
    assert removed_mean(model, mine, contrast) == neutral_z(x, y)
    with pytest.raises(UsageError, match="fewer than three prompts"):
        removed_mean(model, mine, ContrastSet(["steal"], ["wash"]))


def test_a_direction_is_wanted() -> None:
    for make in (Ablate, Add, lambda given: Clamp(given, low=0.0)):
        with pytest.raises(UsageError, match="direction"):
            make("persona")


def test_what_stands_outside_the_mask_stays() -> None:
    mask = torch.arange(15).view(5, 3) % 2 == 0
    for edit in (Ablate(DIRECTION), Add(DIRECTION), Clamp(DIRECTION, high=-3.0)):
        after = edit.edit(X, mask)
        assert torch.equal(after[~mask], X[~mask]) and torch.equal(after[mask], edit.edit(X)[mask])
        assert not torch.equal(after[mask], X[mask])


@pytest.mark.parametrize("make", [Ablate, Add, Clamp])
def test_what_is_no_direction_is_refused_when_it_is_given(make: Any) -> None:
    with pytest.raises(UsageError, match="direction"):
        make(torch.ones(4))


# --- From files, and along profiles -----------------------------------------------------------------------------------


def two(tmp_path: Any) -> tuple[Direction, Direction, str]:
    """Two directions, and their files as a command line names them."""
    made = Direction([3.0, 4.0], Site(0), name="a"), Direction([1.0, 0.0], Site(1), name="b")
    return *made, ",".join(str(each.save(tmp_path / f"{each.name}.safetensors")) for each in made)


def test_what_a_command_line_names_is_ablated_or_added(tmp_path: Any) -> None:
    a, b, named = two(tmp_path)
    ablated = of_directions(named)
    assert [type(each) for each in ablated] == [Ablate, Ablate] and [each.direction for each in ablated] == [a, b]
    added = of_directions(named, 2)
    assert [type(each) for each in added] == [Add, Add] and [each.coefficient for each in added] == [2.0, 2.0]
    assert type(added[0].coefficient) is float and [each.direction for each in added] == [a, b]
    path = tmp_path / "a.safetensors"
    assert [each.direction for given in (path, [path], (a,), a) for each in of_directions(given)] == [a] * 4


def test_an_intervention_stays_one_and_a_profile_becomes_one(tmp_path: Any) -> None:
    a, b, _ = two(tmp_path)
    clamp, profile = Clamp(a, 1.0), Profile([a, b])
    kept, made = of_directions([clamp, profile])
    assert kept is clamp and isinstance(made, Ablate) and made.direction == profile
    assert [type(each) for each in of_directions([clamp, profile], 0.5)] == [Clamp, Add]
    assert of_directions([]) == ()
    with pytest.raises(UsageError, match="without a direction"):
        of_directions([], 0.5)


def test_a_profile_is_ablated_at_its_own_sites_with_each_layer_s_own_direction() -> None:
    a, b = Direction([3.0, 4.0], Site(0)), Direction([1.0, 0.0], Site(1))
    edit = Ablate(Profile([a, b]))
    assert edit.sites == (Site(0), Site(1)) and not Ablate(Profile([a, b]), around={Site(0): [1.0, 1.0]}).linear
    x = torch.tensor([[2.0, 1.0]])
    for each in (a, b):
        hook = each.site.hook_name
        assert float((edit.edit(x, name=hook) @ each.unit).abs()) < 1e-6 < float((x @ each.unit).abs())
    assert edit.edit(x, name=Site(1).hook_name).tolist() == [[0.0, 1.0]]


def test_a_profile_has_no_one_centre_and_its_centres_lie_at_its_sites() -> None:
    a, b = Direction([3.0, 4.0], Site(0)), Direction([1.0, 0.0], Site(1))
    with pytest.raises(UsageError, match="a centre belongs to a site, and a profile has several"):
        Ablate(Profile([a, b]), around=[1.0, 1.0])
    with pytest.raises(UsageError, match=r"resid_post\[2\]"):
        Ablate(Profile([a, b]), around={Site(0): [1.0, 1.0], Site(2): [1.0, 1.0]})
    assert Ablate(Profile([a, b]), around={Site(1): [1.0, 1.0]}).sites == (Site(1),)


def test_to_zero_is_linear_and_around_a_centre_is_not() -> None:
    a = Direction([3.0, 4.0], Site(0))
    assert Ablate(a).linear is True and Ablate(a, around=[1.0, 1.0]).linear is False
    assert Erase([a]).linear is True and Erase([a], around=[1.0, 1.0]).linear is False
