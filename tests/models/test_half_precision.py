"""bfloat16 weights: what is added up, edited and decoded on them is float32 or wider, and agrees with float32's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES, WORDS, make_hf_model, make_tokenizer
from tl_em.dictionaries.tokens import read_tokens, sample_spans, seen
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention, Partial
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.sites import Site

HALF = 2.0**-8
"""What rounding a number to bfloat16 adds at most, over the number: half a unit in the last of eight digits."""
MODEL = 0.02
"""How far the activations of three blocks in bfloat16 lie from float32's, over their length: 20 roundings or so."""
WIDTH = 32


def prompts(n: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, 40, (3 + k % 6,), generator=generator)) for k in range(n)]


@pytest.fixture(params=[(family, surface) for family in ("gpt2", "llama") for surface in SURFACES], ids="-".join)
def models(request) -> tuple[Any, Any]:
    """A model in bfloat16, and one in float32 with the same weights."""
    family, surface = request.param
    rounded = make_hf_model(family).to(torch.bfloat16)
    exact = make_hf_model(family)
    exact.load_state_dict({name: each.float() for name, each in rounded.state_dict().items()})
    load = {"surface": surface, "tokenizer": make_tokenizer(template=None), "in_place": True}
    found = em.load_model(rounded, dtype="bfloat16", **load), em.load_model(exact, **load)
    assert [next(iter(each.parameters())).dtype for each in found] == [torch.bfloat16, torch.float32]
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of a vector from the one that is expected, over the length of that."""
    found, expected = found.double(), expected.double()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())


# ---- edits -----------------------------------------------------------------------------------------------------------
GENERATOR = torch.Generator().manual_seed(0)
V = torch.randn(WIDTH, generator=GENERATOR)
DIRECTION = em.Direction(V, Site(1))
EYE = torch.eye(WIDTH)
SAE = em.Dictionary(EYE, torch.zeros(WIDTH), EYE, torch.zeros(WIDTH), activation="relu", site_in=Site(1))
EDITS: dict[str, Intervention] = {
    "ablate": em.Ablate(DIRECTION),
    "around": em.Ablate(DIRECTION, around=torch.ones(WIDTH)),
    "add": em.Add(DIRECTION, 0.013),
    "clamp": em.Clamp(DIRECTION, high=0.5),
    "erase": em.Erase(torch.stack([V, V.flip(0)])),
    "latent": em.ScaleFeature(SAE.feature(int(V.argmax())), 0.3),
    "half": Partial(em.Add(DIRECTION, 0.01), 0.5),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_the_exact_one_rounded_once(name):
    """Also where what is taken off is a hundred times what stays: then a rounded change would be all that is left."""
    x = (torch.randn(50, 1, WIDTH, generator=torch.Generator().manual_seed(1)) + 100 * DIRECTION.unit).bfloat16()
    found, expected = EDITS[name].edit(x), EDITS[name].edit(x.double())
    assert found.dtype == torch.bfloat16 and expected.dtype == torch.float64
    limit = HALF * expected.abs() + 1e-4  # and what float32 leaves of a component of 100
    assert (expected - x.double()).abs().max() > 1e-3
    limit = limit + (HALF * 0.02 if name == "half" else 0)  # its inner edit is rounded as well, and halved
    assert bool(((found.double() - expected).abs() <= limit).all()), name


@pytest.mark.parametrize("name", ["ablate", "around", "add", "clamp"])
def test_rows_along_many_directions_are_rounded_once_too(name):
    x = (torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1)) + 100 * DIRECTION.unit).bfloat16()
    rows, vectors = torch.tensor([0, 1, 0, 1]), torch.stack([V, V.flip(0)])
    edit = EDITS[name].rowwise(vectors)
    found, expected = edit(x, rows, None), edit(x.double(), rows, None)
    assert bool(((found.double() - expected).abs() <= HALF * expected.abs() + 1e-4).all())


def test_ablation_at_every_write_leaves_no_more_than_rounding(models):
    model, exact = models
    direction = em.difference_in_means(exact, em.ContrastSet(prompts(8), prompts(8, 1)), site=Site(1), position=-1)
    writes = [Site(0, "resid_pre"), *(Site(i, stream) for i in range(3) for stream in ("attn_out", "mlp_out"))]
    for each in models:
        before = em.capture(each, prompts(20), writes, position="prompt_end")
        with em.intervene(each, em.Ablate(direction)):
            after = em.capture(each, prompts(20), writes, position="prompt_end")
        limit = (HALF if each is model else 1e-6) * after.norm(dim=-1)
        assert (before @ direction.unit).abs().max() > 10 * limit.max()
        assert bool(((after @ direction.unit).abs() <= limit).all())  # Cauchy and Schwarz: the theorem, not a margin


# ---- sums ------------------------------------------------------------------------------------------------------------
def test_means_of_many_prompts_are_sums_wider_than_bfloat16(models):
    """Of what the model gives, the exact mean; bfloat16 holds 256 and the next number is 258."""
    model, _ = models
    contrast = em.ContrastSet(prompts(300), prompts(300, 1))
    sets = [
        em.capture(model, each, [Site(1)], position="prompt_end")[:, 0]
        for each in (contrast.positive, contrast.negative)
    ]
    assert sets[0].dtype == torch.float32
    expected = sets[0].double().mean(0) - sets[1].double().mean(0)
    found = em.difference_in_means(model, contrast, site=Site(1), position="prompt_end")
    assert found.vector.dtype == torch.float32 and off(found.vector, expected) < 1e-6
    narrow = sum(sets[0].bfloat16()) / 300 - sum(sets[1].bfloat16()) / 300
    assert off(narrow, expected) > 1e-2  # what it would have been
    mean = em.mean_activation(model, contrast.positive, site=Site(1), position="prompt_end")
    assert off(mean, sets[0].double().mean(0)) < 1e-6


def test_what_a_dictionary_sees_is_added_up_wide(models):
    model, _ = models
    encoded = encode(model, prompts(200))
    x = read_tokens(model, encoded, [Site(1)], sample_spans(encoded)).x
    assert x.dtype == torch.float32
    spans = [EncodedPrompt.from_ids(each.ids) for each in encoded]
    found = seen(model, SAE, spans, where="all")
    everything = read_tokens(model, spans, [Site(1)], torch.tensor([[0, len(each)] for each in spans])).x[:, 0]
    torch.testing.assert_close(found.mean, SAE.encode(everything).double().mean(0).float(), atol=1e-6, rtol=1e-6)
    table = em.score_features(model, SAE, {"a": em.ContrastSet(prompts(12), prompts(12, 1)),
                                           "b": em.ContrastSet(prompts(12, 2), prompts(12, 3))})  # fmt: skip
    assert table.to_pandas().select_dtypes("number").notna().all(axis=None)


# ---- against float32 -------------------------------------------------------------------------------------------------
def test_figures_agree_with_those_of_float32(models):
    sites = [Site(i, stream) for i in range(3) for stream in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    found, expected = (em.capture(each, prompts(20), sites, position="prompt_end") for each in models)
    scale = expected.norm(dim=-1, keepdim=True)
    assert 1e-4 < float(((found - expected) / scale).norm(dim=-1).mean()) < MODEL
    contrast = em.ContrastSet(prompts(60), prompts(60, 1))
    one, other = (em.difference_in_means(each, contrast, site=Site(1), position=-1) for each in models)
    assert float(one.unit @ other.unit) > 0.999


def test_a_graph_of_half_precision_is_refused_with_the_call_that_mends_it(models):
    with pytest.raises(UsageError, match=r"em.load_model\(source, dtype=torch.float32\)"):
        em.attribute(models[0], "the cat sat", target="a")
