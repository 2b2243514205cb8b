"""What a source says of its model is held against the model that the dictionary meets, everywhere that it meets one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES, make_hf_model, make_tokenizer
from tests.graph.test_fixture import CASE, case, hf_model, hooked_model, transcoders
from tl_em.dictionaries.norms import mlp_norm
from tl_em.dictionaries.quality import dictionary_quality
from tl_em.dictionaries.tokens import every_token, sample_spans, seen
from tl_em.errors import DictionaryModelWarning, ProvenanceError, UsageError, WidthError
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.upstream_chatter import quiet

pytestmark = pytest.mark.surface
WIDTH = 32
PROMPTS = ["the cat sat in the car .", "a big dog ran to the queen and sang .", "please tell me about the bank ."]


def ids(n: int = 12) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        EncodedPrompt.from_ids([2, *torch.randint(7, 50, (5 + i % 4,), generator=generator).tolist()]) for i in range(n)
    ]


def tokens(model: LensModel, *sites: em.Site) -> torch.Tensor:
    return torch.cat([p.x for p in every_token(model, ids(), list(sites), sample_spans(ids()))])


def exact(site: em.Site, *, scale: float | torch.Tensor = 1.0, **fields: Any) -> em.Dictionary:
    """Reconstructs ``scale`` times what it reads."""
    eye = torch.eye(WIDTH)
    both = torch.cat([eye, -eye], 1)
    rows = torch.cat([eye, -eye]) * scale
    return em.Dictionary(
        both, torch.zeros(2 * WIDTH), rows, torch.zeros(WIDTH), activation="relu", site_in=site, **fields
    )


def sparse(values: torch.Tensor, site: em.Site, **fields: Any) -> em.Dictionary:
    """A dictionary that fits these values and no others: one latent a value, on the values' own axes."""
    centred = values - values.mean(0)
    rows = torch.linalg.svd(centred, full_matrices=False)[2]
    W_dec = torch.cat([rows, -rows])
    mean = values.mean(0)
    b_enc = -(mean @ W_dec.T)
    # Only as far as the values go: read elsewhere, more is cut off or added.
    return em.Dictionary(W_dec.T, b_enc, W_dec, mean, activation="relu", site_in=site, **fields)


def test_processing_that_the_source_names_is_held_against_the_model(small_model: LensModel) -> None:
    plain = exact(
        em.Site(1), metadata={"model_from_pretrained_kwargs": {"fold_ln": False, "center_writing_weights": False}}
    )
    assert plain.check(small_model) is plain
    for option in ("fold_ln", "center_writing_weights"):
        about = {"model_name": "gpt2", "model_from_pretrained_kwargs": {option: True}}
        processed = exact(em.Site(1), metadata=about)
        bridge = hasattr(small_model, "original_model")
        call = "enable_compatibility_mode" if bridge else f"no_processing.*{option}=True"
        with pytest.raises(ProvenanceError, match=f"{option}=True.*{call}"):
            processed.check(small_model)
        assert processed.unchecked().check(small_model).hash == processed.hash


def test_the_call_that_processes_a_bridge_leads_to_a_model_that_it_belongs_on() -> None:
    about = {"model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": True}}
    processed = exact(em.Site(1), metadata=about)
    bridge: Any = em.load_model(make_hf_model("gpt2"), tokenizer=make_tokenizer())
    with pytest.raises(ProvenanceError, match=r"model\.enable_compatibility_mode\(\)"):
        processed.check(bridge)
    raw = tokens(bridge, em.Site(1))
    with quiet():
        bridge.enable_compatibility_mode()
    processed.check(bridge)
    centred = raw - raw.mean(-1, keepdim=True)
    torch.testing.assert_close(tokens(bridge, em.Site(1)), centred, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("hooked" not in SURFACES, reason="a HookedTransformer, which TransformerLens 4 has no more")
def test_a_folded_model_is_refused_by_a_dictionary_of_raw_weights(make_model: Any) -> None:
    from transformer_lens import HookedTransformer  # pyright: ignore[reportAttributeAccessIssue]

    raw = make_model("gpt2", "hooked")
    with quiet():
        folded = HookedTransformer(raw.cfg.to_dict() | {"device": "cpu"})
        folded.load_and_process_state_dict(raw.state_dict(), fold_ln=True, center_writing_weights=True)
    said = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    with pytest.raises(ProvenanceError, match=r"center_writing_weights=False.*em\.load_model\(source\)"):
        exact(em.Site(1), metadata=said).check(folded)
    both = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True}}
    exact(em.Site(1), metadata=both).check(folded)
    # On folded weights the normalised stream is what the MLP reads: nothing is to be mended.
    exact(em.Site(1, "mlp_in"), metadata={"before_norm_weight": True}).check(folded)
    assert (mlp_norm(folded, 1).weight == 1).all() and (mlp_norm(raw, 1).weight != 1).any()


def test_the_normalised_stream_is_refused_on_raw_weights_and_read_where_the_weight_is_folded_in(
    model: LensModel,
) -> None:
    """What it is right to compute: the latents of mlp_in divided by the norm's weight, on every family and surface."""
    site = em.Site(1, "mlp_in")
    norm = mlp_norm(model, 1)
    normalised = (tokens(model, site)[:, 0] - norm.bias) / norm.weight
    dictionary = sparse(
        normalised, site, metadata={"before_norm_weight": True, "hook_name": "blocks.1.ln2.hook_normalized"}
    )
    assert (dictionary.reconstruct(normalised) - normalised).abs().max() < 1e-3
    for meets in (
        lambda: dictionary_quality(model, dictionary, ids()),
        lambda: dictionary.check(model),
        lambda: seen(model, dictionary, ids(), where="all"),
    ):
        with pytest.raises(ProvenanceError, match=r"dictionary\.with_norm_of\(model\)"):
            meets()
    mended = dictionary.with_norm_of(model)
    read = tokens(model, site)[:, 0]
    torch.testing.assert_close(mended.encode(read), dictionary.encode(normalised), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mended.reconstruct(read), read, atol=1e-3, rtol=1e-3)
    quality = dictionary_quality(model, mended, ids())
    assert quality.model.fvu.value < 1e-4 and quality.better is None


def test_a_transcoder_of_the_normalised_stream_keeps_its_skip(small_model: LensModel) -> None:
    """a, and x W_skip, are the same before and after."""
    generator = torch.Generator().manual_seed(1)
    made = exact(
        em.Site(1, "mlp_in"),
        site_out=em.Site(1, "mlp_out"),
        W_skip=torch.randn(WIDTH, WIDTH, generator=generator),
        metadata={"before_norm_weight": True},
    )
    norm = mlp_norm(small_model, 1)
    read = tokens(small_model, em.Site(1, "mlp_in"))[:, 0]
    mended = made.with_norm_of(small_model)
    expected = made.reconstruct((read - norm.bias) / norm.weight)
    torch.testing.assert_close(mended.reconstruct(read), expected, atol=1e-3, rtol=1e-3)
    assert "before_norm_weight" not in mended.metadata and mended.check(small_model) is mended
    with pytest.raises(UsageError, match=r"dictionary\.at\(em\.Site\(layer, 'mlp_in'\)\)"):
        exact(em.Site(1)).with_norm_of(small_model)


def test_a_modules_own_output_is_refused_where_a_norm_follows(model: LensModel, family: str) -> None:
    made = exact(em.Site(1, "mlp_out"), metadata={"module_output": True})
    if family == "gemma2":
        with pytest.raises(ProvenanceError, match="ln2_post"):
            made.check(model)
    else:
        assert made.check(model) is made


def test_another_models_name_is_a_warning_wherever_it_meets_one(small_model: LensModel) -> None:
    other = exact(em.Site(1), metadata={"model_name": "pythia-70m"})
    meets = {
        "quality": lambda d: dictionary_quality(small_model, d, ids()),
        "score": lambda d: em.score_features(small_model, d, {"x": em.ContrastSet(PROMPTS[:2], PROMPTS[1:])}),
        "edit": lambda d: em.intervene(small_model, em.ScaleFeature(d.feature(0), 0.0)).__enter__(),
        "cards": lambda d: em.features.feature_cards(small_model, d, [0], PROMPTS),
        "graph": lambda d: em.attribute(small_model, PROMPTS[0], d, target=None),
    }
    for name, meet in meets.items():
        with pytest.raises(DictionaryModelWarning, match="pythia-70m"):
            meet(other)
            pytest.fail(name)
    own = str(getattr(small_model.cfg, "model_name", None) or type(small_model).__name__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(other, metadata={"model_name": own}).check(small_model)
        other.unchecked().check(small_model)


def test_another_width_says_what_to_do_for_a_dictionary(small_model: LensModel) -> None:
    eye = torch.eye(8)
    small = em.Dictionary(eye, torch.zeros(8), eye, torch.zeros(8), activation="relu", site_in=em.Site(1))
    call = r"em\.dictionaries\.train_dictionary\(model, site, corpus, d_sae=512\)"
    with pytest.raises(WidthError, match=f"8 wide.*{call}"):
        small.check(small_model)
    made = em.models.Provenance.of(small_model)
    foreign = exact(em.Site(1), provenance=replace(made, weights="folded+centred"))
    with pytest.raises(ProvenanceError, match=r"weights.*dictionary\.unchecked\(\)"):
        foreign.check(small_model)
    assert foreign.unchecked().check(small_model).provenance is None


def test_loading_with_a_model_folds_and_checks(small_model: LensModel, tmp_path: Any) -> None:
    made = exact(em.Site(1, "mlp_in"), metadata={"before_norm_weight": True}).save(tmp_path / "d.safetensors")
    found = em.load_dictionary(made, model=small_model)
    assert found.hash == em.load_dictionary(made).with_norm_of(small_model).hash != em.load_dictionary(made).hash
    wrong = exact(em.Site(1), metadata={"model_from_pretrained_kwargs": {"fold_ln": True}}).save(
        tmp_path / "e.safetensors"
    )
    with pytest.raises(ProvenanceError, match="fold_ln"):
        em.load_dictionary(wrong, model=small_model)


@pytest.mark.skipif(not CASE.is_dir(), reason="the fixture of circuit-tracer is not on this machine")
@pytest.mark.parametrize("surface", SURFACES)
def test_transcoders_that_circuit_tracer_ran_are_read_layer_by_layer(surface: str) -> None:
    """Of the normalised stream; with the model's norm folded in they are those that its graph is compared with."""
    weights, about = case()
    model = (
        hooked_model(weights, about["config"])
        if surface == "hooked"
        else em.load_model(hf_model(weights, about["config"]), in_place=True)
    )
    for layer, wanted in enumerate(transcoders(weights, about["config"])):
        sites = {"site_in": em.Site(layer, "mlp_in"), "site_out": em.Site(layer, "mlp_out")}
        found = em.load_dictionary(CASE / "case.safetensors", layer=layer, **sites).with_norm_of(model)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-4, rtol=1e-4)
