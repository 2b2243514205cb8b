"""Strangers' dictionaries, a gated SAE and a crosscoder's parts, do what ours do; what is none is refused."""

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
from tl_em.dictionaries.foreign import as_dictionary
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
    assert (one.effect / 2).to_numpy() == pytest.approx(other.effect.to_numpy(), abs=1e-5)
    assert one.q.to_numpy() == pytest.approx(other.q.to_numpy(), abs=1e-5)
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
    report = em.audit(pair, contrasts=one, dictionary=theirs, controls=99)
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


def crosscoder(ours: em.Dictionary, *others: em.Dictionary) -> Crosscoder:
    assert ours.site_out is not None
    decoders = {each.site_out: (each.W_dec, each.b_dec) for each in (ours, *others) if each.site_out is not None}
    return Crosscoder(ours.W_enc, decoders, ours.site_in, ours.site_out)


def test_a_crosscoder_writes_to_every_layer_that_it_has_a_decoder_for(small_model: LensModel) -> None:
    """Read at one MLP, written to its own and the next one's output: latents of the first are in the graph twice."""
    first, second = (replace(each, b_enc=torch.zeros(24)) for each in transcoders((0, 1)))
    whole = crosscoder(first, second)
    graph = em.attribute(small_model, PROMPT, whole, target=("cat", "dog"), validate=False)
    same = em.attribute(small_model, PROMPT, first, target=("cat", "dog"), validate=False)
    assert same.edges.abs().max() > 1e-2 and graph.settings["kind"] == "transcoders"
    torch.testing.assert_close(graph.edges, same.edges, rtol=1e-4, atol=1e-5)
    both = [whole, whole.writing(em.Site(1, "mlp_out"))]
    wide = em.attribute(small_model, PROMPT, both, target=("cat", "dog"), validate=False)
    on = [node for node in wide.nodes if node.kind == "feature"]
    seen = [{(n.pos, n.feature): n.activation for n in on if n.layer == layer} for layer in (0, 1)]
    assert len(seen[0]) > 20 and seen[0] == seen[1]


def test_a_crosscoder_scores_where_it_reads_and_fits_where_it_writes() -> None:
    pair = em.load_pair("toy/insecure")
    rows = torch.cat([torch.eye(96), -torch.eye(96)])
    both = {em.Site(layer): (rows, torch.zeros(96)) for layer in (1, 2)}
    whole = Crosscoder(rows.T, both, em.Site(1), em.Site(2))
    quality = em.dictionaries.dictionary_quality(pair.tuned, whole, pair.contrasts["persona"].positive[:8])
    assert 0.0 < quality.model.fvu.value < 1.0  # of the next layer, by this one
    itself = em.dictionaries.dictionary_quality(
        pair.tuned, whole.writing(em.Site(1)), pair.contrasts["persona"].positive[:8]
    )
    assert itself.model.fvu.value == pytest.approx(0.0, abs=1e-6)
    table = em.score_features(pair.tuned, whole, some(pair), against=pair.base)
    assert len(table.to_pandas()) == 192
    with pytest.raises(UsageError, match="reads resid_post"):
        em.ScaleFeature(em.Feature(whole, 3), 0.0)


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
