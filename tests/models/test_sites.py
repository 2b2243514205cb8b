"""Sites, positions, provenance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest

from tl_em.errors import CorruptFileError, PositionError, UnknownHookError
from tl_em.models.hooks import LensModel
from tl_em.models.loading import load_model
from tl_em.models.sites import Provenance, Site, check_position, vocabulary_hash

from ..conftest import SURFACES, make_hf_model, make_tokenizer

pytestmark = pytest.mark.surface


def test_sites_are_values() -> None:
    assert Site(1) == Site(1, "resid_post") and len({Site(1), Site(1), Site(2)}) == 2
    assert sorted([Site(2), Site(1, "resid_post"), Site(1, "attn_out")])[0] == Site(1, "attn_out")
    assert [Site(0, s).writable for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")] == [True] * 4
    assert [Site(0, s).writable for s in ("resid_mid", "mlp_in")] == [False] * 2


@pytest.mark.parametrize(("layer", "stream"), [(-1, "resid_post"), (0, "resid"), (0, "hook_resid_post")])
def test_a_site_that_no_model_has_is_refused(layer: int, stream: str) -> None:
    site = object.__new__(Site)  # past the type checker that is on in the tests only
    object.__setattr__(site, "layer", layer)
    object.__setattr__(site, "stream", stream)
    with pytest.raises(UnknownHookError):
        site.__post_init__()


def test_a_position_that_no_prompt_has_is_refused() -> None:
    for position in (0, 3):
        with pytest.raises(PositionError, match="not negative"):
            check_position(position)
    with pytest.raises(PositionError, match="no position 'last'"):
        inspect.unwrap(check_position)("last")  # type: ignore[arg-type]


def test_provenance_round_trip(model: LensModel, surface: str) -> None:
    p = Provenance.of(model, data="abc", seed=3)
    assert Provenance.from_json(p.to_json()) == p
    assert (p.surface, p.weights, p.n_layers, p.d_model, p.data, p.seed) == (surface, "raw", 3, 32, "abc", 3)
    assert p.d_vocab == model.cfg.d_vocab != p.d_model
    assert {"torch", "transformer-lens", "transformers"} <= set(p.versions)
    with pytest.raises(CorruptFileError):
        Provenance.from_json(p.to_json()[:-4])


def test_differences_are_named_and_the_surface_is_not_one(make_model: Callable[..., LensModel]) -> None:
    p = Provenance.of(make_model("gpt2", SURFACES[0]))
    assert p.differences(make_model("gpt2", SURFACES[-1])) == []
    assert p.differences(make_model("gpt2", SURFACES[-1], seed=1)) == [], (
        "a fine-tune is another model of the same shape"
    )
    changed = replace(p, d_model=64, weights="folded", tokenizer="other")
    assert [line.split(":")[0] for line in changed.differences(make_model("gpt2", "bridge"))] == [
        "d_model",
        "tokenizer",
        "weights",
    ]


@pytest.mark.parametrize("bos", [True, False])
def test_booting_a_model_does_not_change_the_hash_of_its_vocabulary(
    make_model: Callable[..., LensModel], surface: str, bos: bool
) -> None:
    booted = make_model("gpt2", surface, bos=bos).tokenizer  # type: ignore[attr-defined]
    assert vocabulary_hash(booted) == vocabulary_hash(make_tokenizer(bos=bos))
    assert vocabulary_hash(None) is None


def test_processed_weights_are_told_from_raw_ones() -> None:
    bridge = load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer())
    bridge.enable_compatibility_mode(disable_warnings=True)  # type: ignore[attr-defined]
    assert Provenance.of(bridge).weights == "folded+centred"
    for fold, centre, word in ((True, False, "folded"), (False, True, "centred")) if "hooked" in SURFACES else ():
        hooked = load_model(make_hf_model("gpt2"), surface="hooked", tokenizer=make_tokenizer())
        options = {
            "fold_ln": fold,
            "center_writing_weights": centre,
            "center_unembed": False,
            "fold_value_biases": False,
        }
        hooked.load_and_process_state_dict(hooked.state_dict(), **options)  # type: ignore[attr-defined]
        assert Provenance.of(hooked).weights == word
