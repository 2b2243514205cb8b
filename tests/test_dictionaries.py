"""Dictionaries as plain tensors: the same as SAELens's own, and deltas that leave the error and other hooks alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import tl_em as em
from tl_em.dictionaries import Dictionary, SparseDictionary, from_sae_lens
from tl_em.errors import CorruptFileError, NonFiniteError, UsageError, WidthError

pytestmark = pytest.mark.surface
WIDTH, LATENTS, SITE = 32, 48, em.Site(1)
PROMPTS = ["the cat sat in the car .", "a big dog ran to the queen and sang .", "please tell me about the bank ."]


def make(activation="relu", *, seed=0, site=SITE, **options):
    generator = torch.Generator().manual_seed(seed)
    needs = {"jumprelu": {"threshold": torch.full((LATENTS,), 0.3)}, "topk": {"k": 5}}.get(activation, {})
    return Dictionary(
        torch.randn(WIDTH, LATENTS, generator=generator) / WIDTH**0.5,
        0.1 * torch.randn(LATENTS, generator=generator),
        torch.randn(LATENTS, WIDTH, generator=generator) / WIDTH**0.5,
        0.1 * torch.randn(WIDTH, generator=generator),
        activation=activation,
        site_in=site,
        **{**needs, **options},
    )


@pytest.fixture(scope="module")
def x():
    return 2 * torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))


# ---- encoding ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_what_is_on_is_what_the_activation_says(activation, x):
    sae = make(activation)
    a, before = sae.encode(x), sae.preactivations(x)
    assert (a >= 0).all() and 0 < (a > 0).float().mean() < 1
    on = a > 0
    torch.testing.assert_close(a[on], before[on])
    if activation == "jumprelu":
        assert (before[~on] <= 0.3).all() and ((before > 0) & ~on).any()
    if activation == "topk":
        assert (on.sum(-1) <= 5).all()
        assert (before.masked_fill(on, -torch.inf).amax(-1) <= before.masked_fill(~on, torch.inf).amin(-1)).all()
    assert isinstance(sae, SparseDictionary)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_a_file_holds_all_of_it(activation, x, tmp_path):
    sae = make(activation, name="mine", site_out=em.Site(2, "mlp_out"))
    found = Dictionary.load(sae.save(tmp_path / "d.safetensors"))
    assert (found.hash, found.name) == (sae.hash, "mine")
    assert (found.site_in, found.site_out) == (SITE, em.Site(2, "mlp_out"))
    assert torch.equal(found.encode(x), sae.encode(x))
    assert torch.equal(found.decode(found.encode(x)), sae.decode(sae.encode(x)))
    assert found.is_transcoder


def test_every_number_that_encoding_depends_on_is_in_the_hash():
    sae = make("jumprelu")
    changed = [replace(sae, threshold=sae.threshold + 0.1), replace(sae, b_enc=sae.b_enc + 0.1), make("relu")]
    assert len({sae.hash, *(each.hash for each in changed)}) == 4


def test_a_damaged_or_foreign_file_is_told_apart(tmp_path):
    path = make().save(tmp_path / "d.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (whole[:-100], bytes(flipped), b"no safetensors"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="dictionary"):
            Dictionary.load(path)
    with pytest.raises(CorruptFileError):
        Dictionary.load(em.Direction(torch.ones(4), em.Site(0)).save(tmp_path / "direction.safetensors"))


def test_what_does_not_fit_is_one_typed_error(x):
    sae = make()
    with pytest.raises(WidthError, match="W_dec"):
        replace(sae, W_dec=sae.W_dec.T)
    with pytest.raises(WidthError, match="31 wide"):
        sae.encode(x[..., :31])
    with pytest.raises(NonFiniteError, match="b_enc"):
        replace(sae, b_enc=torch.full((LATENTS,), torch.nan))
    with pytest.raises(UsageError, match="without threshold"):
        replace(sae, activation="jumprelu")
    with pytest.raises(UsageError, match="there are relu"):
        replace(sae, activation="gelu")
    with pytest.raises(UsageError, match="latents 0 to 47"):
        sae.feature(LATENTS)


# ---- features in a model -----------------------------------------------------------------------------------------
def reads(model, *interventions):
    with em.intervene(model, *interventions) if interventions else nullcontext():
        return em.capture(model, PROMPTS, [SITE], position="prompt_end")[:, 0]


def test_a_scaled_latent_moves_by_its_decoder_row_and_nothing_else(model):
    sae = make(seed=3)
    before = reads(model)
    index = int(sae.encode(before).mean(0).argmax())
    a = sae.encode(before)[:, index]
    assert (a > 0).any()
    for factor in (0.0, 1.0, 3.0):
        after = reads(model, em.ScaleFeature(sae.feature(index), factor))
        torch.testing.assert_close(after, before + (factor - 1) * a[:, None] * sae.W_dec[index], atol=1e-5, rtol=1e-5)


def test_a_latent_that_is_off_is_switched_on_by_a_value_and_by_no_factor(model):
    sae = make("jumprelu", seed=3)
    before = reads(model)
    index = int((sae.encode(before) == 0).all(0).nonzero()[0])
    torch.testing.assert_close(reads(model, em.ScaleFeature(sae.feature(index), 7.0)), before)
    after = reads(model, em.ScaleFeature(sae.feature(index), to=2.0))
    torch.testing.assert_close(after, before + 2 * sae.W_dec[index], atol=1e-5, rtol=1e-5)


def test_several_latents_and_an_ablation_at_the_same_point_act_in_the_order_given(model):
    sae, direction = make(seed=3), em.Direction(torch.arange(1.0, WIDTH + 1), em.Site(1))
    before = reads(model)
    chosen = sae.encode(before).mean(0).topk(2).indices.tolist()
    scaled = em.ScaleFeature([sae.feature(i) for i in chosen], 0.0)
    ablated = em.Ablate(direction, around=torch.zeros(WIDTH))
    one, other = reads(model, scaled, ablated), reads(model, ablated, scaled)
    torch.testing.assert_close(one, ablated.edit(scaled.edit(before)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, scaled.edit(ablated.edit(before)), atol=1e-5, rtol=1e-5)
    assert direction.project(one).abs().max() < 1e-4 < direction.project(other).abs().max()


def test_features_of_two_dictionaries_or_of_a_transcoder_are_refused():
    sae, other = make(), make(seed=9)
    with pytest.raises(UsageError, match="one dictionary"):
        em.ScaleFeature([sae.feature(0), other.feature(0)], 0.0)
    with pytest.raises(UsageError, match="either factor="):
        em.ScaleFeature(sae.feature(0))
    with pytest.raises(WidthError, match="2 latents"):
        em.ScaleFeature([sae.feature(0), sae.feature(1)], to=torch.ones(3))
    with pytest.raises(UsageError, match="writes"):
        em.ScaleFeature(make(site_out=em.Site(1, "mlp_out")).feature(0), 0.0)


def test_a_dictionary_of_another_width_is_refused_by_the_model(model):
    eye = torch.eye(8)
    small = Dictionary(eye, torch.zeros(8), eye, torch.zeros(8), activation="relu", site_in=em.Site(1))
    with pytest.raises(WidthError), em.intervene(model, em.ScaleFeature(small.feature(0), 0.0)):
        pass


# ---- SAELens -----------------------------------------------------------------------------------------------------
def sae_lens_object(architecture, **options):
    saes = pytest.importorskip("sae_lens.saes")
    config, kind = {
        "standard": (saes.StandardSAEConfig, saes.StandardSAE),
        "jumprelu": (saes.JumpReLUSAEConfig, saes.JumpReLUSAE),
        "topk": (saes.TopKSAEConfig, saes.TopKSAE),
    }[architecture]
    sae = kind(config(d_in=WIDTH, d_sae=LATENTS, **({"k": 6} if architecture == "topk" else {}), **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p) / WIDTH**0.5)
        if architecture == "jumprelu":
            sae.threshold.copy_(torch.rand(LATENTS))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


def test_a_transcoder_of_saelens_reads_one_site_and_writes_another(x):
    saes = pytest.importorskip("sae_lens.saes")
    config = saes.TranscoderConfig(d_in=WIDTH, d_sae=LATENTS, d_out=WIDTH, apply_b_dec_to_input=False)
    torch.manual_seed(0)
    theirs = saes.Transcoder(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / WIDTH**0.5)
    theirs.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
    theirs.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    mine = from_sae_lens(theirs)
    assert (mine.site_in, mine.site_out) == (em.Site(1, "mlp_in"), em.Site(1, "mlp_out"))
    with torch.no_grad():
        assert (theirs.encode(x) > 0).any()
        torch.testing.assert_close(mine.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.decode(mine.encode(x)), theirs.decode(theirs.encode(x)), atol=1e-5, rtol=1e-5)


def test_a_skip_transcoder_keeps_what_goes_past_its_latents(x, tmp_path):
    saes = pytest.importorskip("sae_lens.saes")
    config = saes.SkipTranscoderConfig(d_in=WIDTH, d_sae=LATENTS, d_out=WIDTH, apply_b_dec_to_input=False)
    theirs = saes.SkipTranscoder(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / WIDTH**0.5)
    theirs.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
    theirs.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    mine = em.Dictionary.load(from_sae_lens(theirs).save(tmp_path / "d.safetensors"))
    assert mine.W_skip is not None and mine.hash != replace(mine, W_skip=None).hash
    with torch.no_grad():
        said = mine.decode(mine.encode(x)) + x @ mine.W_skip
        torch.testing.assert_close(said, theirs(x), atol=1e-5, rtol=1e-5)
        assert (said - mine.decode(mine.encode(x))).abs().max() > 0.1  # the skip matters
    with pytest.raises(em.TlEmError, match="W_skip"):
        replace(mine, W_skip=mine.W_skip[:, 1:])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("off_input", [True, False])
def test_an_sae_of_saelens_encodes_and_decodes_as_it_does_there(architecture, off_input, x):
    sae = sae_lens_object(architecture, apply_b_dec_to_input=off_input)
    mine = from_sae_lens(sae)
    assert mine.site_in == em.Site(1) and not mine.is_transcoder
    with torch.no_grad():
        assert (sae.encode(x) > 0).any()
        torch.testing.assert_close(mine.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.decode(mine.encode(x)), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)


def test_topk_activations_rescaled_by_decoder_norms_reconstruct_the_same(x):
    sae = sae_lens_object("topk", rescale_acts_by_decoder_norm=True)
    mine = from_sae_lens(sae)
    with torch.no_grad():
        torch.testing.assert_close(mine.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.decode(mine.encode(x)), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)


def test_a_delta_hook_equals_saelens_with_its_error_term(x):
    """Ablating a latent inside an SAE whose error term is kept."""
    sae = sae_lens_object("standard")
    index = int(sae.encode(x).mean((0, 1)).argmax())
    with torch.no_grad():
        a = sae.encode(x)
        error = x - sae.decode(a)
        off = a.clone()
        off[..., index] = 0
        expected = sae.decode(off) + error
    assert (expected - x).abs().max() > 0.01
    found = em.ScaleFeature(from_sae_lens(sae).feature(index), 0.0).edit(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # sums in another order


def test_options_that_tensors_do_not_hold_and_sites_that_are_none_are_refused():
    with pytest.raises(UsageError, match="normalize_activations"):
        from_sae_lens(sae_lens_object("standard", normalize_activations="layer_norm"))
    sae = sae_lens_object("standard")
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    with pytest.raises(UsageError, match="names no site"):
        from_sae_lens(sae)
    assert from_sae_lens(sae, site_in=em.Site(0)).site_in == em.Site(0)


def test_a_directory_that_saelens_wrote_is_read(tmp_path, x):
    sae = sae_lens_object("standard")
    sae.save_model(tmp_path / "sae")
    torch.testing.assert_close(from_sae_lens(tmp_path / "sae").encode(x), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)
