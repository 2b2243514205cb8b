"""Strangers' dictionaries, a gated SAE and a crosscoder, do what ours do; what is none is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.extensions.crosscoder import Crosscoder
from tests.extensions.gated import GatedSAE
from tests.graph.test_attribution import PROMPT, dictionary, transcoders
from tl_em.dictionaries.protocol import as_dictionary
from tl_em.errors import NonFiniteError, UsageError, WidthError
from tl_em.models.hooks import LensModel

pytestmark = [
    pytest.mark.surface,
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale"),
]


def gated(ours: em.Dictionary) -> GatedSAE:
    """The gated SAE whose latents are those of a JumpReLU of ours, at half the size."""
    made = GatedSAE(ours.W_enc, 2 * ours.W_dec, ours.site_in)
    with torch.no_grad():
        before = ours.b_enc + ours.b_dec @ ours.W_enc
        made.b_gate.add_(before if ours.threshold is None else before - ours.threshold)
        made.b_mag.add_(before / 2)
        made.r.sub_(torch.tensor(2.0).log())
        made.b_dec.add_(ours.b_dec)
    return made


def toy(name: str = "toy/insecure") -> tuple[em.Dictionary, GatedSAE]:
    ours = em.organisms.toy_dictionary(name)
    return ours, gated(ours)


def some(pair: em.ModelPair) -> dict[str, em.ContrastSet]:
    whole = pair.contrasts["persona"]
    return {"persona": em.ContrastSet(whole.positive[:24], whole.negative[:24])}


def test_a_gated_sae_scores_and_scales_as_the_same_one_of_ours() -> None:
    pair, (ours, theirs) = em.load_pair("toy/insecure"), toy()
    set_ = some(pair)
    tables = [em.score_features(pair.tuned, each, set_, against=pair.base) for each in (ours, theirs)]
    one, other = (table.to_pandas() for table in tables)
    assert one.effect.abs().max() > 0.1
    # two ways to sum in float32, which machines round differently: 1.2e-5 has been seen
    assert (one.effect / 2).to_numpy() == pytest.approx(other.effect.to_numpy(), abs=1e-4)
    assert one.q.to_numpy() == pytest.approx(other.q.to_numpy(), abs=1e-4)
    x = torch.randn(7, ours.d_model)
    for factor in (0.0, 2.0):
        edited = [em.ScaleFeature(em.Feature(each, 3), factor).edit(x) for each in (ours, theirs)]
        torch.testing.assert_close(edited[0], edited[1], rtol=1e-5, atol=1e-5)
    prompts = pair.contrasts["persona"].positive[:8]
    fits = [em.dictionaries.dictionary_quality(pair.tuned, each, prompts).model for each in (ours, theirs)]
    assert fits[0].fvu.value == pytest.approx(fits[1].fvu.value, abs=1e-4) and fits[0].fvu.value < 0.3
    cards = em.features.feature_cards(pair.tuned, theirs, [3], prompts, table=tables[1])
    assert cards.cards[0].behaviours and cards.dictionary.hash == as_dictionary(theirs).hash != ours.hash


def test_an_audit_and_a_verification_take_a_gated_sae() -> None:
    pair, theirs = em.load_pair("toy/secure"), toy("toy/secure")[1]
    one = {"persona": pair.contrasts["persona"]}
    report = em.audit(pair, contrasts=one, dictionary=theirs, questions=["level"], controls=99)
    assert "none shown" in report.features_note  # harmless: as with ours
    assert report.features.dictionary.hash == as_dictionary(theirs).hash  # pyright: ignore
    asked = em.load_pair("toy/insecure").behaviours["persona"]
    held_out = em.ContrastSet(asked.present[:6], asked.present[6:12])
    latent = em.Feature(theirs, int(as_dictionary(theirs).W_dec.norm(dim=-1).argmax()))
    check = em.verify_feature(pair.tuned, latent, held_out, metric=asked, placebos=2, doses=())
    assert check.row().subject == "the set" and not check.shown


def test_a_graph_of_a_gated_sae_has_the_edges_of_the_same_one_of_ours(small_model: LensModel) -> None:
    ours = dictionary(1, 32, "resid_post", None)
    graphs = [em.attribute(small_model, PROMPT, each, target=("cat", "dog")) for each in (ours, gated(ours))]
    assert [node.id for node in graphs[0].nodes] == [node.id for node in graphs[1].nodes]
    assert len(graphs[0].row("feature")) > 20 and graphs[0].edges.abs().max() > 1e-2
    for name in ("attribution", "effect"):
        one, other = ([getattr(node, name) for node in graph.nodes if node.kind == "feature"] for graph in graphs)
        assert [None if each is None else pytest.approx(each, abs=1e-4) for each in one] == other
    read = graphs[0].row("feature")
    torch.testing.assert_close(graphs[0].edges[read] / 2, graphs[1].edges[read], rtol=1e-3, atol=1e-5)


PIECES = (em.Site(1), em.Site(2, "attn_out"), em.Site(2, "mlp_out"))
"""What ``resid_post[2]`` is the sum of."""


def crosscoder(ours: em.Dictionary, reads: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Crosscoder:
    """A crosscoder whose latents are those of an SAE at ``resid_post[2]`` where it reads every piece of that."""
    assert ours.threshold is not None
    rows = {em.Site(layer): (ours.W_dec, ours.b_dec) for layer in (1, 2)}
    W_enc = torch.stack([ours.W_enc * share for share in reads])
    return Crosscoder(W_enc, ours.b_enc, ours.threshold, rows, PIECES, em.Site(2))


def test_an_audit_finds_the_latents_that_only_all_sites_of_a_crosscoder_together_show() -> None:
    pair, ours = em.load_pair("toy/insecure"), em.organisms.toy_dictionary("toy/insecure")
    (planted,) = em.shared_features(em.score_features(pair.tuned, ours, pair.look_up, against=pair.base))[:1]
    one = {"persona": pair.contrasts["persona"]}
    report = em.audit(pair, contrasts=one, dictionary=crosscoder(ours), controls=99)
    assert report.features is not None and len(planted.indices) > 3
    assert [card.index for card in report.features.cards] == list(planted.indices)
    assert f"{planted.indices[0]} down" in report.features_note
    lacking = em.score_features(pair.tuned, crosscoder(ours, (0, 0, 1)), pair.look_up, against=pair.base)
    assert not em.shared_features(lacking)


def test_a_crosscoder_is_fitted_where_it_writes_and_neither_set_nor_put_into_a_graph(small_model: LensModel) -> None:
    pair, ours = em.load_pair("toy/insecure"), em.organisms.toy_dictionary("toy/insecure")
    whole, prompts = crosscoder(ours), pair.contrasts["persona"].positive[:8]
    one, other = (em.dictionaries.dictionary_quality(pair.tuned, each, prompts) for each in (ours, whole))
    assert other.model.fvu.value == pytest.approx(one.model.fvu.value, abs=1e-4) and other.nearby == ()
    earlier = em.dictionaries.dictionary_quality(pair.tuned, whole.writing(em.Site(1)), prompts)
    assert one.model.fvu.value + 0.02 < earlier.model.fvu.value < 1.0  # of the layer before, by what comes after
    with pytest.raises(UsageError, match="reads several sites"):
        em.attribute(pair.tuned, "how do i write parser", whole, target=9)
    with pytest.raises(UsageError, match="not in what is edited"):
        em.verify_feature(pair.tuned, em.Feature(whole, 3), some(pair)["persona"], metric=em.refusal_log_odds)
    with pytest.raises(UsageError, match="no site"):
        as_dictionary(replace(whole, site_in=(em.Site(1), 2)))  # pyright: ignore


class Broken:
    """A dictionary of which one thing may be wrong."""

    def __init__(self, **wrong: Any) -> None:
        self.W_enc, self.W_dec, self.d_sae = None, torch.eye(4), 4
        self.site_in, self.site_out = em.Site(1), None
        self.function: Any = torch.relu
        self.back: Any = lambda a: a
        self.__dict__.update(wrong)

    def encode(self, x: Tensor) -> Tensor:
        return self.function(x)

    def decode(self, a: Tensor) -> Tensor:
        return self.back(a)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"W_dec": torch.eye(4)[:3]}, WidthError, "d_sae=4"),
        ({"W_dec": torch.zeros(2, 4, 4)}, WidthError, "crosscoder"),
        ({"W_dec": torch.eye(4) * torch.nan}, NonFiniteError, "W_dec"),
        ({"site_in": 3}, UsageError, "no site"),
        ({"site_out": em.Site(0)}, UsageError, "comes before"),
        ({"d_sae": 4.5}, UsageError, "d_sae"),
        ({"function": lambda x: x[:, :3]}, WidthError, "token d_sae"),
        ({"function": lambda x: x.tolist()}, WidthError, "list"),
        ({"function": lambda x: x}, UsageError, "below 0"),
        ({"function": lambda x: x.relu() * torch.nan}, NonFiniteError, "NaN"),
        ({"function": lambda x: x.relu() + torch.rand(4)}, UsageError, "other latents for the same"),
        ({"function": lambda x: x.relu() / len(x)}, UsageError, "depends on the other tokens"),
        ({"back": lambda a: a.tanh()}, UsageError, "is not a @ W_dec"),
        ({"back": lambda a: a[:, :3]}, WidthError, "decode"),
    ],
)
def test_what_is_not_true_of_a_dictionary_is_named(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    assert as_dictionary(Broken()).affine
    with pytest.raises(error, match=said):
        as_dictionary(Broken(**wrong))


def test_what_is_no_dictionary_is_refused_by_every_function(small_model: LensModel) -> None:
    set_ = {"one": em.ContrastSet(("the cat",), ("the dog",))}
    for call in (
        lambda: em.attribute(small_model, PROMPT, object(), target=9),
        lambda: em.score_features(small_model, object(), set_),  # pyright: ignore
        lambda: em.dictionaries.dictionary_quality(small_model, object(), ["the cat"]),  # pyright: ignore
        lambda: em.features.feature_cards(small_model, object(), [0], ["the cat"]),  # pyright: ignore
    ):
        with pytest.raises(UsageError, match="SparseDictionary"):
            call()


def test_an_encoder_that_is_not_affine_or_passes_no_gradient_makes_no_exact_graph(small_model: LensModel) -> None:
    mlp = {"site_in": em.Site(0, "mlp_in"), "site_out": em.Site(0, "mlp_out"), "W_dec": torch.eye(32), "d_sae": 32}
    square = Broken(function=lambda x: x.relu() ** 2, **mlp)
    assert not as_dictionary(square).affine
    graph = em.attribute(small_model, PROMPT, square, target=9, validate=False)
    assert graph.settings["kind"] == "SAEs" and graph.row("feature")
    with pytest.raises(UsageError, match="passes no gradient"):
        em.attribute(small_model, PROMPT, Broken(function=lambda x: x.detach().relu(), **mlp), target=9)


def test_a_graph_of_a_transcoder_has_the_edges_of_the_same_one_of_ours(small_model: LensModel) -> None:
    ours = transcoders((0,))[0]
    theirs = Broken(
        function=lambda x: torch.relu(x @ ours.W_enc + ours.b_enc), back=lambda a: a @ ours.W_dec + ours.b_dec,
        W_dec=ours.W_dec, d_sae=ours.d_sae, site_in=ours.site_in, site_out=ours.site_out,
    )  # fmt: skip
    one, other = (em.attribute(small_model, PROMPT, d, target=("cat", "dog"), validate=False) for d in (ours, theirs))
    assert one.edges.abs().max() > 1e-2 and other.settings["kind"] == "transcoders"
    torch.testing.assert_close(other.edges, one.edges, rtol=1e-4, atol=1e-5)
