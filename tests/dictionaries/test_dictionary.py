"""Dictionaries as plain tensors: fields that agree, files that hold all, and deltas that leave the error alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.dictionaries import Dictionary, SparseDictionary
from tl_em.errors import CorruptFileError, NonFiniteError, UsageError, WidthError

pytestmark = pytest.mark.surface
WIDTH, LATENTS, SITE = 32, 48, em.Site(1)
PROMPTS = ["the cat sat in the car .", "a big dog ran to the queen and sang .", "please tell me about the bank ."]


def make(activation="relu", /, *, seed=0, site=SITE, **options):
    generator = torch.Generator().manual_seed(seed)
    needs = {"jumprelu": {"threshold": torch.full((LATENTS,), 0.3)}, "topk": {"k": 5}}.get(activation, {})
    return Dictionary(
        torch.randn(WIDTH, LATENTS, generator=generator) / WIDTH**0.5,
        0.1 * torch.randn(LATENTS, generator=generator),
        torch.randn(LATENTS, WIDTH, generator=generator) / WIDTH**0.5,
        0.1 * torch.randn(WIDTH, generator=generator),
        **{"activation": activation, "site_in": site, **needs, **options},
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
    with pytest.raises(UsageError, match="not a whole number"):
        sae.feature(1.5)  # pyright: ignore[reportArgumentType]


# ---- fields that agree -------------------------------------------------------------------------------------------
THRESHOLD = torch.full((LATENTS,), 0.3)


@pytest.mark.parametrize(
    ("activation", "fields", "named"),
    [("topk", {"k": 8, "threshold": THRESHOLD}, "threshold"), ("relu", {"threshold": THRESHOLD}, "threshold"),
     ("relu", {"k": 8}, "k"), ("jumprelu", {"threshold": THRESHOLD, "k": 8}, "k")],
)  # fmt: skip
def test_the_activation_decides_and_what_contradicts_it_is_refused(activation, fields, named, x):
    right = make(activation)
    assert 0 < (right.encode(x) > 0).float().sum(-1).mean() < LATENTS
    with pytest.raises(UsageError, match=f"{activation}.* and {named} contradict"):
        make("relu", **({"activation": activation} | fields))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_none_is_refused_in_every_tensor(name, value):
    sae = make("jumprelu", site_out=em.Site(2), W_skip=torch.eye(WIDTH))
    wrong = getattr(sae, name).clone()
    wrong.view(-1)[3] = value
    with pytest.raises(NonFiniteError, match=name):
        replace(sae, **{name: wrong})


def test_a_float64_that_float32_cannot_hold_is_refused():
    sae = make()
    with pytest.raises(NonFiniteError, match="W_dec"):
        replace(sae, W_dec=sae.W_dec.double() * 1e60)


@pytest.mark.parametrize("k", [0, -1, LATENTS + 1, 2.5, 8.0, True, "8", None])
def test_a_k_that_counts_no_latents_is_refused(k):
    assert make("topk", k=LATENTS).k == LATENTS
    with pytest.raises(UsageError, match="k"):
        make("topk", k=k)


def test_whole_numbers_of_numpy_and_torch_are_accepted():
    assert make("topk", k=np.int64(5)).k == 5 == make("topk", k=torch.tensor(5)).k
    assert make("topk", k=np.int64(5)).hash == make("topk", k=5).hash


def test_a_threshold_below_zero_is_refused_and_one_number_is_for_all(x):
    wrong = THRESHOLD.clone()
    wrong[7] = -0.1
    with pytest.raises(UsageError, match=r"negative for 1 of 48.*a threshold of 0 for these"):
        make("jumprelu", threshold=wrong)
    assert make("jumprelu", threshold=torch.zeros(LATENTS)).encode(x).equal(make("relu").encode(x))
    one = make("jumprelu", threshold=torch.tensor(0.3))
    assert one.hash == make("jumprelu").hash and one.threshold is not None and one.threshold.shape == (LATENTS,)


def test_names_of_the_activation_in_any_case_are_one_dictionary():
    assert {make("relu", activation=name).hash for name in ("relu", "ReLU", " RELU")} == {make("relu").hash}
    assert make("jumprelu", activation="jump_relu").activation == "jumprelu"
    assert make("topk", activation="Top-K").activation == "topk"
    for wrong in ("batchtopk", None, torch.nn.ReLU(), 3):
        with pytest.raises(UsageError, match="there are relu, jumprelu, topk"):
            make("relu", activation=wrong)


@pytest.mark.parametrize(
    "wrong", [torch.ones(WIDTH, LATENTS, dtype=torch.int8), torch.ones(WIDTH, LATENTS) > 0,
              torch.ones(WIDTH, LATENTS, dtype=torch.complex64), torch.ones(WIDTH, LATENTS, device="meta"),
              torch.ones(WIDTH, LATENTS).to_sparse(), "weights", np.array([["a"]])],
)  # fmt: skip
def test_what_are_no_weights_are_refused(wrong):
    sae = make()
    with pytest.raises(UsageError, match="W_enc"):
        Dictionary(wrong, sae.b_enc, sae.W_dec, sae.b_dec, activation="relu", site_in=SITE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_width_and_arrays_are_float32(dtype, x):
    sae = make()
    cast = replace(sae, W_enc=sae.W_enc.to(dtype).requires_grad_())
    assert cast.W_enc.dtype == torch.float32 and not cast.W_enc.requires_grad
    arrays = [getattr(sae, name).numpy() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    assert Dictionary(*arrays, activation="relu", site_in=SITE).encode(x).equal(sae.encode(x))


def test_sites_that_are_none_or_in_the_wrong_order_are_refused():
    for wrong in ("blocks.1.hook_resid_post", 1, None):
        with pytest.raises(UsageError, match="site_in"):
            make(site=wrong)
    with pytest.raises(UsageError, match="comes before"):
        make(site=em.Site(2, "mlp_in"), site_out=em.Site(1, "mlp_out"))
    with pytest.raises(UsageError, match="comes before"):
        make(site=em.Site(1, "mlp_out"), site_out=em.Site(1, "mlp_in"))
    with pytest.raises(UsageError, match="W_skip"):
        make(W_skip=torch.eye(WIDTH))
    assert make(site=em.Site(1, "mlp_in"), site_out=em.Site(1, "mlp_out"), W_skip=torch.eye(WIDTH)).is_transcoder


def test_an_sae_moves_whole_and_a_transcoder_keeps_what_it_writes():
    moved = make(metadata={"hook_name": "x", "before_norm_weight": True}).at(em.Site(2))
    assert (moved.site_in, moved.site_out, moved.metadata) == (em.Site(2), em.Site(2), {"hook_name": "x"})
    transcoder = make(site=em.Site(1, "mlp_in"), site_out=em.Site(1, "mlp_out"))
    assert transcoder.at(em.Site(1, "resid_mid")).site_out == em.Site(1, "mlp_out")
    assert transcoder.at(em.Site(1, "resid_mid"), em.Site(2)).site_out == em.Site(2)


def test_metadata_come_back_from_a_file_and_what_json_cannot_hold_is_refused(tmp_path):
    about = {"model_name": "gpt2", "prepend_bos": False, "seqpos_slice": [None], "context_size": 128}
    found = Dictionary.load(make(metadata=about).save(tmp_path / "d.safetensors"))
    assert found.metadata == about and replace(found, name="x").metadata == about
    with pytest.raises(UsageError, match="JSON"):
        make(metadata={"dtype": torch.float32})


def test_a_skip_is_part_of_what_is_reconstructed(x):
    skip = make(site_out=em.Site(2), W_skip=0.5 * torch.eye(WIDTH))
    torch.testing.assert_close(skip.reconstruct(x), skip.decode(skip.encode(x)) + 0.5 * x)
    assert (skip.reconstruct(x) - skip.decode(skip.encode(x))).abs().max() > 0.1


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
