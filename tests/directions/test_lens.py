"""The logit lens says what an added direction does to the logits, whatever the norm, and how much of it is chance."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from tests.conftest import SURFACES, cached_model, make_hf_model, make_tokenizer
from tl_em.directions.direction import Direction
from tl_em.directions.lens import logit_lens
from tl_em.errors import ModelError, ProvenanceError, UsageError, WidthError
from tl_em.models.hooks import LensModel, hook_name, hooked
from tl_em.models.loading import load_model
from tl_em.models.sites import Provenance, Site
from tl_em.models.stream import capture, next_token_logits

pytestmark = pytest.mark.surface
PROMPT = "the king ran to the big bank"
D, VOCABULARY = 32, 57


def whole(model: LensModel, direction: Direction, **options: object) -> torch.Tensor:
    """The lens's logit of every token, in the order of the vocabulary."""
    table = logit_lens(model, direction, k=VOCABULARY, controls=1, **options)
    top = table[table.side == "top"].sort_values("token_id")
    return torch.tensor(top.logit.to_numpy())


def uncapped(model: LensModel, logits: torch.Tensor) -> torch.Tensor:
    """Logits before the soft cap of 30 that Gemma 2 puts on them."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or getattr(config, "final_logit_softcapping", None)
    return cap * torch.atanh(logits.double() / cap) if cap and cap > 0 else logits.double()


def test_adding_a_direction_changes_the_logits_as_the_lens_says(model: LensModel) -> None:
    """For a direction orthogonal to the activation the norm's divisor is the same on both sides of it, exactly."""
    site = Site(int(model.cfg.n_layers) - 1)
    x = capture(model, [PROMPT], [site], position="prompt_end")[0, 0].double()
    centred = whole(model, Direction(torch.ones(D), site)).abs().max() < 1e-3  # a LayerNorm drops constants
    read = x - x.mean() if centred else x
    random = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    across = random - read * (random @ read) / (read @ read)
    direction = Direction(across / across.norm(), site)
    step = 0.1
    logits = []
    for sign in (1, -1):
        add = [(hook_name(model, site), lambda y, hook, sign=sign: y + sign * step * direction.vector)]
        with hooked(model, add):
            logits.append(uncapped(model, next_token_logits(model, [PROMPT])[0]))
    change = (logits[0] - logits[1]) / (2 * step)
    scale = float((read.square().mean() + step**2 / D).sqrt())
    predicted = whole(model, direction, scale=scale)
    assert change.abs().max() > 0.05
    # float32 logits of size 10 over a step of .1 leave about 1e-5; norms' epsilons another 1e-5 of the size.
    torch.testing.assert_close(change - change.mean(), predicted, rtol=1e-3, atol=1e-4)


def test_both_surfaces_and_folded_weights_read_the_same(family: str) -> None:
    direction = Direction(torch.randn(D, generator=torch.Generator().manual_seed(2)), Site(1))
    found = [whole(cached_model(family, surface), direction) for surface in SURFACES]
    assert found[0].std() > 0.05
    for folded in _folded(family):
        probe = torch.ones(1, 1, D)
        assert (folded.unembed(probe) - cached_model(family, "bridge").unembed(probe)).abs().max() > 0.01
        found.append(whole(folded, direction))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)  # float32, another order of products


def _folded(family: str) -> list[Any]:
    """The same weights with the final norm's folded into the unembedding (not for tied ones)."""
    if family not in ("gpt2", "llama"):
        return []
    bridge: Any = load_model(make_hf_model(family), tokenizer=make_tokenizer(), in_place=True)
    bridge.enable_compatibility_mode()
    if "hooked" not in SURFACES:
        return [bridge]
    hooked_model: Any = copy.deepcopy(cached_model(family, "hooked"))
    hooked_model.load_and_process_state_dict(hooked_model.state_dict(), fold_ln=True, center_unembed=True)
    return [bridge, hooked_model]


def test_a_planted_token_is_found_and_a_random_direction_finds_none(small_model: LensModel) -> None:
    """A direction built to write one token has it on top with p at its least; of random ones, 5 % have p < .05."""
    token = 20
    rows = torch.stack([whole(small_model, Direction(axis, Site(2))) for axis in torch.eye(D)])
    planted = logit_lens(small_model, Direction(rows[:, token].float(), Site(2)), k=2, controls=199)
    assert (planted.token_id.iloc[0], planted.p.iloc[0]) == (token, 1 / 200)
    assert planted.logit.iloc[0] > 2 * planted.logit.iloc[1]
    generator = torch.Generator().manual_seed(3)
    p = []
    for _ in range(40):
        table = logit_lens(small_model, Direction(torch.randn(D, generator=generator), Site(2)), k=1, controls=99)
        p.append(table.p.min())
    assert sum(each < 0.05 for each in p) <= 6  # binomial(40, .05): more in 1.4 % of draws


def test_p_and_order_do_not_depend_on_length_or_scale(small_model: LensModel) -> None:
    vector = torch.randn(D, generator=torch.Generator().manual_seed(4))
    one = logit_lens(small_model, Direction(vector, Site(2)), controls=99)
    ten = logit_lens(small_model, Direction(10 * vector, Site(2)), controls=99, scale=2.0)
    pd.testing.assert_frame_equal(one.drop(columns="logit"), ten.drop(columns="logit"))
    assert ten.logit.to_numpy() == pytest.approx(5 * one.logit.to_numpy(), rel=1e-4)
    assert list(one.side) == ["top"] * 10 + ["bottom"] * 10
    assert one.logit.iloc[0] > 0 > one.logit.iloc[10]
    assert one.token.iloc[0] == small_model.tokenizer.decode([one.token_id.iloc[0]])


def test_controls_of_your_own(small_model: LensModel) -> None:
    direction = Direction(torch.randn(D, generator=torch.Generator().manual_seed(5)), Site(2))
    same = logit_lens(small_model, direction, k=1, controls=direction.vector[None] * 3)
    assert same.p.tolist()[0] == 1 or same.p.tolist()[1] == 1  # the control is the direction itself
    with pytest.raises(WidthError):
        logit_lens(small_model, direction, controls=torch.ones(3, D + 1))


def test_bad_input_is_a_typed_error(small_model: LensModel) -> None:
    with pytest.raises(WidthError, match="d_model is 32"):
        logit_lens(small_model, Direction(torch.ones(8), Site(0)))
    origin = Provenance.of(small_model)
    logit_lens(small_model, Direction(torch.ones(D), Site(0), provenance=replace(origin, weights="folded")), controls=1)
    with pytest.raises(ProvenanceError, match="n_layers"):
        logit_lens(small_model, Direction(torch.ones(D), Site(0), provenance=replace(origin, n_layers=9)))
    direction = Direction(torch.ones(D), Site(0))
    for options in ({"k": 0}, {"scale": 0.0}, {"controls": 0}):
        with pytest.raises(UsageError):
            logit_lens(small_model, direction, **options)

    class Odd:
        cfg = SimpleNamespace(d_model=D, device="cpu")
        hook_dict = hooks = to_tokens = generate = __call__ = None
    with pytest.raises(ModelError, match="unembed"):
        logit_lens(Odd(), direction)  # pyright: ignore[reportArgumentType]
