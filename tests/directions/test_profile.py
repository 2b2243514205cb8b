"""A profile steers several layers at once: what its directions do one by one, wherever an intervention is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tl_em as em
from tl_em.claims.controls import random_profiles
from tl_em.errors import CorruptFileError, ProvenanceError, UsageError, WidthError
from tl_em.interventions.edits import component
from tl_em.models.sites import Provenance

pytestmark = pytest.mark.surface
TOKENS = torch.tensor([[2, 3, 8, 20, 11, 6, 4], [2, 3, 9, 10, 30, 6, 4]])
PROMPTS = ["the cat sat", "a dog ran to the bank", "please tell me a story", "the king sang"]
SET = em.ContrastSet(PROMPTS[:2], PROMPTS[2:], label="x")


def directions(stream: str = "resid_post", width: int = 32, layers: tuple[int, ...] = (0, 1, 2)) -> list[em.Direction]:
    generator = torch.Generator().manual_seed(5)
    return [em.Direction(torch.randn(width, generator=generator), em.Site(i, stream), name="x") for i in layers]


def run(model: Any, *interventions: em.Intervention) -> Tensor:
    with torch.no_grad():
        if not interventions:
            return model(TOKENS)
        with em.intervene(model, *interventions):
            return model(TOKENS)


@pytest.mark.parametrize("stream", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_it_does_what_its_directions_do_together(stream: str, surface: str, make_model: Callable[..., Any]) -> None:
    for family in ("llama", "gemma2"):
        model, given = make_model(family, surface), directions(stream)
        profile = em.Profile(given)
        zero = torch.zeros(32)
        same: list[tuple[em.Intervention, list[em.Intervention]]] = [
            (em.Add(profile, -2.0), [em.Add(each, -2.0) for each in given]),
            (em.Clamp(profile, high=0.1), [em.Clamp(each, high=0.1) for each in given]),
            (em.Ablate(profile), [em.Ablate(each, around=zero) for each in given]),
            (em.Ablate(profile, around={each.site: each.vector for each in given}),
             [em.Ablate(each, around=each.vector) for each in given]),
        ]  # fmt: skip
        for together, apart in same:
            assert torch.equal(run(model, together), run(model, *apart))
            assert not torch.allclose(run(model, together), run(model, apart[0]), atol=1e-3)
            assert not torch.allclose(run(model, together), run(model), atol=1e-3)


def test_it_is_a_mapping_from_layers_whatever_order_it_came_in() -> None:
    given = directions()
    profile = em.Profile(given[::-1])
    assert list(profile) == [0, 1, 2] and len(profile) == 3 and 1 in profile and 7 not in profile
    assert [profile[i] for i in profile] == given == list(profile.values())
    assert em.Profile({each.site.layer: each for each in given}).directions == profile.directions
    assert (profile.stream, profile.width, profile.name) == ("resid_post", 32, "x")
    assert profile.renamed("y").name == "y"
    assert repr(profile) == "Profile(x, resid_post at layers 0-2, d_model=32)"
    assert repr(em.Profile(directions(layers=(0, 2)))) == "Profile(x, resid_post at layers 0, 2, d_model=32)"
    assert repr(profile[:1]) == "Profile(x, resid_post at layer 0, d_model=32)"
    assert list(profile.to_pandas().layer) == [0, 1, 2] and "<table" in profile._repr_html_()
    with pytest.raises(KeyError, match="0-2"):
        profile[3]


def test_a_slice_is_the_profile_of_those_layers() -> None:
    profile = em.Profile([em.Direction(torch.randn(8), em.Site(layer)) for layer in (1, 2, 4, 5)])
    parts = [(slice(2, 5), (2, 4)), (slice(None, 3), (1, 2)), (slice(4, None), (4, 5)), (slice(1, 6, 2), (1, 5))]
    for part, layers in [*parts, (slice(None), (1, 2, 4, 5)), (slice(0, 99), (1, 2, 4, 5))]:
        assert isinstance(profile[part], em.Profile) and profile[part].layers == layers
        assert all(profile[part][layer] is profile[layer] for layer in layers)
    for part in (slice(3, 4), slice(6, None), slice(-2, None), slice(0, -1), slice(5, 2)):
        with pytest.raises(UsageError, match=r"no part of the layers 1-2, 4-5"):
            profile[part]


def test_what_is_no_profile_is_refused() -> None:
    given = directions()
    for wrong, said in (([], "no directions"), ([*given, given[0]], "2 directions"), ("x", "no list"), (1, "no list")):
        with pytest.raises(UsageError, match=said):
            em.Profile(wrong)
    with pytest.raises(UsageError, match="streams"):
        em.Profile([*given[:2], *directions("mlp_out")[2:]])
    with pytest.raises(WidthError, match="different models"):
        em.Profile([*given[:2], *directions(width=8)[2:]])
    with pytest.raises(UsageError, match="no Direction and no Profile"):
        em.Add(given)
    profile = em.Profile(given)
    with pytest.raises(UsageError, match="one centre"):
        em.Ablate(profile, around=torch.zeros(32))
    with pytest.raises(UsageError, match=r"resid_post\[7\]"):
        em.Ablate(profile, around={em.Site(7): torch.zeros(32)})
    with pytest.raises(UsageError, match=r"em\.intervene"):
        em.Add(profile).edit(torch.zeros(1, 32))
    with pytest.raises(UsageError, match="another one could replace"):
        em.Add(profile).along(given[0])
    with pytest.raises(UsageError, match="another one could replace"):
        em.Add(given[0]).along(profile)


def test_it_belongs_to_a_model_or_is_refused(small_model: Any) -> None:
    origin = Provenance.of(small_model)
    other = Provenance.from_json(json.dumps(json.loads(origin.to_json()) | {"n_layers": 12}))
    fits, wrong = ([em.Direction(d.vector, d.site, provenance=p) for d in directions()] for p in (origin, other))
    run(small_model, em.Add(em.Profile(fits)))
    mixed = em.Profile([fits[0], wrong[1], fits[2]])
    with pytest.raises(ProvenanceError):
        run(small_model, em.Add(mixed))
    run(small_model, em.Add(mixed.unchecked()))
    with pytest.raises(WidthError):
        run(small_model, em.Add(em.Profile(directions(width=8))))


def test_a_file_holds_all_of_it(small_model: Any, tmp_path: Path) -> None:
    found = em.candidate_directions(small_model, SET, positions=["prompt_end"])
    profile = em.Profile(found).renamed("story")
    again = em.Profile.load(profile.save(tmp_path / "profile.safetensors"))
    for one, other in zip(profile.directions, again.directions, strict=True):
        assert torch.equal(one.vector, other.vector)
        for field in ("site", "position", "name", "provenance", "method", "reliability", "neutral"):
            assert getattr(one, field) == getattr(other, field)
    with pytest.raises(CorruptFileError, match="not a direction"):
        em.Direction.load(tmp_path / "profile.safetensors")
    path = tmp_path / "profile.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file({**load_file(path), "layer.9": torch.ones(32)}, path, metadata=about)
    with pytest.raises(CorruptFileError):
        em.Profile.load(path)


def test_every_verb_takes_it(small_model: Any) -> None:
    profile = em.Profile(em.candidate_directions(small_model, SET, positions=["prompt_end"], layers=[1, 2]))
    steer = em.Add(profile, 0.5)
    assert torch.equal(run(small_model, steer.at(2.0)), run(small_model, em.Add(profile)))
    found = em.calibrate(small_model, steer, PROMPTS, target_kl=0.05)
    assert abs(found.kl.value - 0.05) < 0.002
    plain = em.generate(small_model, PROMPTS, max_new_tokens=4)
    with em.intervene(small_model, em.Add(profile, 40.0), where="generated"):
        assert em.generate(small_model, PROMPTS, max_new_tokens=4) != plain
    told = em.Conditional(steer, directions("resid_pre")[0], above=-1e9)
    with em.intervene(small_model, told):
        em.generate(small_model, PROMPTS[:1], max_new_tokens=1)
    curve = em.effect_curve(
        small_model, steer, PROMPTS, metric=em.logit_difference("dog", "cat"), strengths=[1.0], controls=3, contrast=SET
    )
    assert len(curve.arm("random")) == 3 and "resid_pre at layers 1-2" in repr(curve)
    kl = curve.arm("intervention")[0].kl.value
    assert all(abs(point.kl.value - kl) < 0.05 * kl for point in curve.arm("random"))
    ablated = em.Ablate(profile)
    curve = em.effect_curve(
        small_model, ablated, PROMPTS, metric=em.logit_difference("dog", "cat"), strengths=[1.0], controls=2
    )
    assert curve.label.startswith("Ablate(Profile(")


def test_random_profiles_agree_across_layers_as_the_real_one_does(small_model: Any) -> None:
    profile = em.Profile(em.candidate_directions(small_model, SET, positions=["prompt_end"], layers=[1, 2]))
    random = random_profiles(small_model, profile, SET, count=8)
    assert len(random) == 8
    for each in random:
        assert each.sites == profile.sites
        assert [d.norm for d in each.directions] == pytest.approx([d.norm for d in profile.directions], rel=1e-5)
    agree = [float(component(each[1].unit[None], each[2].unit)) for each in random]
    apart = [float(component(one[1].unit[None], other[2].unit)) for one, other in pairwise(random)]
    assert min(agree) > 0.3 and sum(agree) / len(agree) > sum(map(abs, apart)) / len(apart)


def test_a_profile_is_baked(surface: str, make_model: Callable[..., Any]) -> None:
    from tests.interventions.test_baking import fresh

    model, steer = fresh("llama", surface), em.Add(em.Profile(directions()), 0.7)
    steered = run(model, steer)
    em.bake_(model, steer)
    assert (run(model) - steered).abs().max() <= 1e-5 * float(steered.std())


def test_files_of_every_kind_are_interventions_on_a_command_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tl_em.interventions.edits import of_directions

    profile = em.Profile(directions(layers=(1, 2)))
    files = [profile[1].save(tmp_path / "d.safetensors"), profile.save(tmp_path / "p.safetensors")]
    files.append(em.interop.export_control_vector(profile, tmp_path / "c.gguf"))
    (one, several, also) = of_directions(files, 2.0)
    assert isinstance(one, em.Add) and one.direction.site == em.Site(1)
    for each in (several, also):
        assert isinstance(each, em.Add) and each.coefficient == 2.0 and each.direction.layers == (1, 2)
        assert all(torch.equal(each.direction[i].vector, profile[i].vector) for i in profile)
    (ablated,) = of_directions(str(files[1]))
    assert isinstance(ablated, em.Ablate) and ablated.sites == profile.sites
    with pytest.raises(CorruptFileError, match="not a direction"):
        of_directions(str(tmp_path / "none.safetensors"))
