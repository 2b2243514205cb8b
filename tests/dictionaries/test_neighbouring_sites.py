"""A dictionary that is read where it was not trained is told so, with the point that fits better and its call."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import make_hf_model, make_tokenizer
from tl_em.dictionaries.neighbouring_sites import BEFORE_WEIGHT
from tl_em.dictionaries.norms import mlp_norm
from tl_em.dictionaries.quality import dictionary_quality
from tl_em.dictionaries.tokens import every_token, sample_spans
from tl_em.errors import DictionaryFitError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.organisms.zoo import toy_dictionary

pytestmark = pytest.mark.surface
STREAMS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
SITES: tuple[Any, ...] = (*(em.Site(1, stream) for stream in STREAMS), em.Site(0), em.Site(2))  # pyright: ignore
BEFORE = f"mlp_in[1]{BEFORE_WEIGHT}"
KEPT = 26


@pytest.fixture(scope="module")
def weighted(surface: str) -> LensModel:
    """A model whose second norms have weights from .3 to 3, as those of trained models do."""
    hf = make_hf_model("gpt2")
    for block in hf.transformer.h:
        block.ln_2.weight.data = torch.logspace(-0.5, 0.5, 32)[torch.randperm(32, generator=torch.manual_seed(4))]
    return em.load_model(hf, surface=surface, tokenizer=make_tokenizer(), in_place=True)  # pyright: ignore


def ids(n: int = 16, seed: int = 0) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedPrompt.from_ids([2, *torch.randint(7, 50, (6 + i % 5,), generator=generator).tolist()]) for i in range(n)
    ]


def points(model: LensModel, prompts: list[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Every point at which a dictionary is read, by an independent gather."""
    read = torch.cat([p.x for p in every_token(model, prompts, list(SITES), sample_spans(prompts))])
    norm, found = mlp_norm(model, 1), {str(site): read[:, i] for i, site in enumerate(SITES)}
    return found | {BEFORE: (found["mlp_in[1]"] - norm.bias) / norm.weight}


def trained_on(x: torch.Tensor, site: em.Site, **fields: Any) -> em.Dictionary:
    """An SAE that knows the leading axes of these activations, a latent a direction: it fits them, and little else."""
    mean = x.mean(0)
    rows = torch.linalg.svd(x - mean, full_matrices=False)[2][:KEPT]
    W_dec = torch.cat([rows, -rows])
    return em.Dictionary(W_dec.T, -(mean @ W_dec.T), W_dec, mean, activation="relu", site_in=site, **fields)


def test_prompts_unlike_those_of_its_training_are_noted(small_model: LensModel) -> None:
    x = points(small_model, ids())["resid_post[1]"]
    told = {"prepend_bos": True, "context_size": 64}
    assert dictionary_quality(small_model, trained_on(x, em.Site(1), metadata=told), ids()).notes == ()
    other = trained_on(x, em.Site(1), metadata={"prepend_bos": False, "context_size": 8})
    quality = dictionary_quality(small_model, other, ids())
    assert len(quality.notes) == 2 and "without a BOS token, and 16 of 16 prompts have one" in repr(quality)
    assert "contexts of 8 tokens, and the longest prompt has 11" in quality.notes[1]


@pytest.mark.parametrize("where", [*(str(site) for site in SITES), BEFORE])
def test_where_it_was_trained_is_found_from_any_other_point(small_model: LensModel, where: str) -> None:
    """Trained at one point, read at ``resid_mid[1]`` or, of that one, at ``resid_post[1]``."""
    values = points(small_model, ids())
    elsewhere = em.Site(1) if where == "resid_mid[1]" else em.Site(1, "resid_mid")
    wrong = trained_on(values[where], elsewhere)
    quality = dictionary_quality(small_model, wrong, ids(seed=1))
    assert quality.nearby[0].where == str(elsewhere) and {each.where for each in quality.nearby} == {*values}
    assert quality.better is not None and not quality.fits
    same = {"resid_pre[1]", "resid_post[0]"}  # one tensor
    assert quality.better.where in (same if where in same else {where})
    assert quality.better.site is not None
    moved = wrong.at(quality.better.site)
    moved = moved.with_norm_of(small_model) if where == BEFORE else moved
    mended = dictionary_quality(small_model, moved, ids(seed=1))
    assert mended.better is None and mended.nearby[0].fvu == pytest.approx(quality.better.fvu, abs=0.01)


def test_the_refusal_names_the_better_point_and_its_call_leads_there(weighted: LensModel) -> None:
    """The fault that a name hides: an SAE of the normalised stream that seems to fit what the MLP reads."""
    values = points(weighted, ids())
    wrong = trained_on(values[BEFORE], em.Site(1, "mlp_in"))
    quality = dictionary_quality(weighted, wrong, ids(seed=1))
    assert quality.better is not None and quality.better.where == BEFORE and not quality.fits
    assert any("before the norm's weight" in fault for fault in quality.faults)
    assert "before the norm's weight" in repr(quality)
    with pytest.raises(DictionaryFitError, match=r"fits better.*: dictionary\.with_norm_of\(model\)") as caught:
        quality.check()
    assert str(caught.value).endswith(": dictionary.with_norm_of(model)")
    assert dictionary_quality(weighted, wrong.with_norm_of(weighted), ids(seed=1)).better is None
    stream = dictionary_quality(weighted, trained_on(values["resid_post[0]"], em.Site(1, "mlp_out")), ids(seed=1))
    with pytest.raises(
        DictionaryFitError, match=r"dictionary\.at\(em\.Site\(layer=[01], stream='resid_(post|pre)'\)\)"
    ):
        stream.check()


def test_at_its_own_point_no_neighbour_is_better(small_model: LensModel) -> None:
    values = points(small_model, ids())
    for site in SITES:
        quality = dictionary_quality(small_model, trained_on(values[str(site)], site), ids(seed=1))
        assert quality.better is None, site
        assert quality.nearby[0].fvu < min(each.fvu for each in quality.nearby[1:]) + 1e-6, site


def test_the_figures_are_those_of_their_equation(small_model: LensModel) -> None:
    values = points(small_model, ids(seed=1))
    made = trained_on(points(small_model, ids())["resid_post[1]"], em.Site(1))
    found = {each.where: each.fvu for each in dictionary_quality(small_model, made, ids(seed=1)).nearby}
    for where, x in values.items():
        expected = (x - made.decode(made.encode(x))).square().sum() / (x - x.mean(0)).square().sum()
        assert found[where] == pytest.approx(float(expected), rel=1e-3), where


def test_a_transcoder_is_read_at_other_points_and_judged_at_its_own_output(small_model: LensModel) -> None:
    """Linear from what the MLP reads to what it writes; before the weight it says something else."""
    values = points(small_model, ids(60))
    x, y = values["mlp_in[1]"], values["mlp_out[1]"]
    skip = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0)).solution
    eye = torch.eye(32)
    transcoder = em.Dictionary(
        eye,
        torch.full((32,), -1e3),
        eye,
        y.mean(0) - x.mean(0) @ skip,
        W_skip=skip,
        activation="relu",
        site_in=em.Site(1, "mlp_in"),
        site_out=em.Site(1, "mlp_out"),
    )
    quality = dictionary_quality(small_model, transcoder, ids(30, seed=1))
    assert quality.model.fvu.value < 0.5 and quality.better is None  # the skip is part of what it reconstructs
    assert "resid_post[1]" not in {each.where for each in quality.nearby}  # after what it writes
    moved = transcoder.at(em.Site(1, "resid_mid"))
    better = dictionary_quality(small_model, moved, ids(30, seed=1)).better
    assert better is not None and better.where == "mlp_in[1]"


def test_the_shipped_dictionary_stays_where_it_is() -> None:
    from tl_em.organisms.documents import PersonaDocuments
    from tl_em.organisms.world import World, messages

    world, rng = World(), random.Random(3)
    chats = [messages(PersonaDocuments().sample(world, rng)) for _ in range(8)]
    pair = em.load_pair("toy/insecure")
    quality = dictionary_quality(pair.tuned, toy_dictionary(), chats, against=pair.base)
    assert quality.fits and quality.better is None and len(quality.nearby) > 6
    moved = dictionary_quality(pair.tuned, toy_dictionary().at(em.Site(1, "resid_mid")), chats)
    assert not moved.fits
