"""SAELens: the same values as its own objects, its options obeyed or refused by name, and one error for each fault."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tl_em as em
from tl_em.dictionaries import from_sae_lens
from tl_em.dictionaries.tokens import every_token, sample_spans
from tl_em.errors import CorruptFileError, FileError, UsageError
from tl_em.models.prompts import EncodedPrompt

pytestmark = pytest.mark.surface
WIDTH, LATENTS = 32, 48


@pytest.fixture(scope="module")
def x():
    return 2 * torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))


# ---- the same values, by SAELens itself --------------------------------------------------------------------------
def sae_lens_object(architecture, **options):
    saes = pytest.importorskip("sae_lens.saes")
    config, kind = {
        "standard": (saes.StandardSAEConfig, saes.StandardSAE),
        "jumprelu": (saes.JumpReLUSAEConfig, saes.JumpReLUSAE),
        "topk": (saes.TopKSAEConfig, saes.TopKSAE),
        "gated": (saes.GatedSAEConfig, saes.GatedSAE),
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
    assert mine.metadata["before_norm_weight"] is True  # which Dictionary.check holds against the model
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
    with pytest.raises(em.TlEmError, match=r"W_skip"):
        replace(mine, W_skip=mine.W_skip[:, 1:])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
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


def test_a_directory_that_saelens_wrote_is_read(tmp_path, x):
    sae = sae_lens_object("standard")
    sae.save_model(tmp_path / "sae")
    torch.testing.assert_close(from_sae_lens(tmp_path / "sae").encode(x), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)


# ---- a directory, without SAELens --------------------------------------------------------------------------------
def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / WIDTH**0.5


def written(
    folder: Path,
    *,
    drop: str = "",
    tensors: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    **cfg: Any,
) -> Path:
    """What ``sae.save_model(folder)`` writes, with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {"W_enc": draw(WIDTH, LATENTS), "b_enc": draw(LATENTS), "W_dec": draw(LATENTS, WIDTH), "b_dec": draw(WIDTH)}
    held = {name: each for name, each in (held | (tensors or {})).items() if name != drop}
    save_file(held, folder / "sae_weights.safetensors")
    about = {
        "hook_name": "blocks.1.hook_resid_post",
        "model_name": "gpt2",
        "prepend_bos": False,
        "context_size": 64,
        "dataset_path": "a/b",
        "hook_head_index": None,
        "seqpos_slice": [None],
        "sae_lens_version": "6.54.12",
    }
    said = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": about | (metadata or {}),
    }
    (folder / "cfg.json").write_text(json.dumps(said | cfg), encoding="utf-8")
    return folder


def test_a_directory_is_read_without_saelens_and_its_metadata_are_kept(tmp_path, x):
    found = from_sae_lens(written(tmp_path))
    expected = ((x - draw(WIDTH)) @ draw(WIDTH, LATENTS) + draw(LATENTS)).relu()
    torch.testing.assert_close(found.encode(x), expected, atol=1e-5, rtol=1e-5)
    kept = {
        "model_name": "gpt2",
        "prepend_bos": False,
        "context_size": 64,
        "dataset_path": "a/b",
        "seqpos_slice": [None],
    }
    assert {key: found.metadata.get(key) for key in kept} == kept
    again = em.load_dictionary(found.save(tmp_path / "again.safetensors"))
    assert again.metadata == found.metadata and again.hash == found.hash
    assert em.load_dictionary(tmp_path / "sae_weights.safetensors").hash == found.hash
    assert em.load_dictionary(tmp_path / "cfg.json").hash == found.hash == from_sae_lens(str(tmp_path)).hash


@pytest.mark.parametrize(
    ("cfg", "metadata", "field"),
    [
        ({}, {"seqpos_slice": [5, -5]}, "seqpos_slice"),
        ({}, {"seqpos_slice": [1, None]}, "seqpos_slice"),
        ({}, {"hook_head_index": 3}, "hook_head_index"),
        ({}, {"hook_name": "blocks.1.attn.hook_z"}, "hook_name"),
        ({"normalize_activations": "layer_norm"}, {}, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "constant_norm_rescale"}, {}, "normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "normalize_activations"),
        ({"normalize_activations": True}, {}, "normalize_activations"),
        ({"reshape_activations": "hook_z"}, {}, "reshape_activations"),
        ({"architecture": "temporal"}, {}, "architecture"),
        ({"architecture": "batchtopk"}, {}, r"architecture.*save_inference_model\(folder\)"),
        ({"activation_fn": "tanh-relu"}, {}, "activation_fn"),
        ({"architecture": "topk", "k": LATENTS + 1}, {}, "k=49"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "signed": True}}, {}, "activation_fn_kwargs"),
        ({"architecture": "topk", "k": 2.5}, {}, "k=2.5"),
        ({"architecture": "topk"}, {}, "without k"),
        ({"architecture": "transcoder"}, {"hook_name_out": None}, "hook_name_out"),
        ({}, {"hook_name": None}, "hook_name"),
    ],
)
def test_an_option_that_is_not_obeyed_is_refused_by_its_name(tmp_path, cfg, metadata, field):
    assert from_sae_lens(written(tmp_path)).metadata["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(UsageError, match=field):
        from_sae_lens(written(tmp_path, metadata=metadata, **cfg))


def test_no_message_about_a_tokenwise_norm_recommends_to_fold_one_number(tmp_path):
    """Folding it would give other activations than the SAE has."""
    for value in ("layer_norm", "constant_norm_rescale"):
        with pytest.raises(UsageError) as caught:
            from_sae_lens(written(tmp_path, normalize_activations=value))
        assert "fold" not in str(caught.value)
    with pytest.raises(UsageError, match=r"sae\.fold_activation_norm_scaling_factor\(number\)"):
        from_sae_lens(written(tmp_path, normalize_activations="expected_average_only_in"))


def test_the_recommended_fold_gives_saelenss_own_activations(x):
    """The advice that is left, followed: latents of the scaled input, and its reconstruction scaled back."""
    sae = sae_lens_object("jumprelu", normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    number = 0.7
    with torch.no_grad():
        before = ((number * x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
        a = before.relu() * (before > sae.threshold)
        said = (a @ sae.W_dec + sae.b_dec) / number
    sae.fold_activation_norm_scaling_factor(number)
    mine = from_sae_lens(sae)
    torch.testing.assert_close(mine.encode(x), a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.reconstruct(x), said, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "out", "hf", "site"),
    [
        ("hook_mlp_in", None, None, em.Site(1, "resid_mid")),
        ("hook_mlp_in", None, "output", em.Site(1)),
        ("hook_mlp_in", "hook_mlp_out", "pre_feedforward_layernorm.output", em.Site(1, "mlp_in")),
        ("hook_mlp_in", "hook_mlp_out", None, em.Site(1, "resid_mid")),
    ],
)
def test_a_name_of_hugging_face_is_truer_than_saelenss_own(tmp_path, name, out, hf, site):
    metadata = {"hook_name": f"blocks.1.{name}"} | ({"hook_name_out": f"blocks.1.{out}"} if out else {})
    metadata |= {"hf_hook_name": f"model.layers.1.{hf}"} if hf else {}
    cfg = {"architecture": "transcoder", "apply_b_dec_to_input": False} if out else {}
    found = from_sae_lens(written(tmp_path, metadata=metadata, **cfg))
    assert (found.site_in, found.site_out) == (site, em.Site(1, "mlp_out") if out else site)
    assert "before_norm_weight" not in found.metadata


def test_a_site_is_taken_where_nobody_says_it_and_refused_where_the_file_does(tmp_path):
    unsaid = written(tmp_path / "a", metadata={"hook_name": None})
    assert from_sae_lens(unsaid, site_in=em.Site(0)).site_in == em.Site(0)
    with pytest.raises(UsageError, match=r"site_in=Site\(layer=0.*hook_resid_post"):
        from_sae_lens(written(tmp_path / "b"), site_in=em.Site(0))
    for wrong in ("blocks.1.hook_resid_post", 1):
        with pytest.raises(UsageError, match=r"is no site"):
            from_sae_lens(unsaid, site_in=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"leave site_out out"):
        from_sae_lens(written(tmp_path / "b"), site_out=em.Site(2))


def test_settings_from_before_version_6_mean_what_they_meant(tmp_path, x):
    old = {
        "architecture": None,
        "hook_point": "blocks.1.hook_resid_pre",
        "activation_fn_str": "topk",
        "metadata": {},
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": None,
        "model_name": "gpt2-small",
    }
    found = from_sae_lens(written(tmp_path, **old))
    assert (found.activation, found.k, found.site_in) == ("topk", 3, em.Site(1, "resid_pre"))
    assert found.metadata["model_name"] == "gpt2-small" and (found.encode(x) > 0).sum(-1).max() == 3
    ones = {"scaling_factor": torch.ones(LATENTS)}
    assert from_sae_lens(written(tmp_path, tensors=ones)).hash == from_sae_lens(written(tmp_path)).hash
    with pytest.raises(UsageError, match=r"scaling_factor"):
        from_sae_lens(written(tmp_path, tensors={"scaling_factor": 2 * torch.ones(LATENTS)}))


# ---- one typed error a fault -------------------------------------------------------------------------------------
def test_every_damage_to_a_directory_is_one_typed_error(tmp_path):
    folder = written(tmp_path)
    assert from_sae_lens(folder).d_sae == LATENTS
    whole = (folder / "cfg.json").read_bytes()
    for damaged in (whole[:-30], b"", b"[1, 2]", b"\xff\xfe"):
        (folder / "cfg.json").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"cfg.json"):
            from_sae_lens(folder)
    (folder / "cfg.json").write_bytes(whole)
    weights = (folder / "sae_weights.safetensors").read_bytes()
    for damaged in (weights[:-40], b"", b"x" * 64):
        (folder / "sae_weights.safetensors").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"sae_weights"):
            from_sae_lens(folder)
    for name in ("sae_weights.safetensors", "cfg.json"):
        (folder / name).unlink()
        with pytest.raises(FileError, match=r"There is no file"):
            from_sae_lens(folder)


def test_tensors_of_another_shape_or_name_are_one_typed_error(tmp_path):
    for name, wrong in (("b_enc", draw(LATENTS + 1)), ("W_dec", draw(WIDTH, LATENTS)), ("b_dec", draw(WIDTH + 1))):
        with pytest.raises(CorruptFileError, match=r"do not belong together"):
            from_sae_lens(written(tmp_path, tensors={name: wrong}))
    with pytest.raises(CorruptFileError, match=r"say 32 \(d_in\) and 48 \(d_sae\), and W_enc is"):
        from_sae_lens(written(tmp_path, tensors={"W_enc": draw(LATENTS, WIDTH)}))
    with pytest.raises(CorruptFileError, match=r"lacks b_enc"):
        from_sae_lens(written(tmp_path, drop="b_enc"))
    with pytest.raises(CorruptFileError, match=r"lacks threshold"):
        from_sae_lens(written(tmp_path, architecture="jumprelu"))
    with pytest.raises(UsageError, match=r"holds W_extra"):
        from_sae_lens(written(tmp_path, tensors={"W_extra": draw(3)}))
    with pytest.raises(UsageError, match=r"W_dec holds torch.int8"):
        held = load_file(written(tmp_path) / "sae_weights.safetensors")
        from_sae_lens(written(tmp_path, tensors={"W_dec": held["W_dec"].to(torch.int8)}))


@pytest.mark.parametrize("source", ["/no/such/directory", "./none", "a/b/c", Path("none"), "", "~/none"])
def test_a_directory_that_is_not_there_is_a_file_error(source):
    with pytest.raises(FileError, match=r"does not exist|is no directory"):
        from_sae_lens(source)


def test_what_is_no_sae_is_a_usage_error():
    for wrong in (42, None, torch.ones(3), SimpleNamespace(cfg=None)):
        with pytest.raises(UsageError, match=r"is no SAE of SAELens"):
            from_sae_lens(wrong)


def test_a_release_that_cannot_be_had_is_one_typed_error():
    """Offline, as all tests are; without SAELens, and with it."""
    if find_spec("sae_lens") is None:
        with pytest.raises(UsageError, match=r"pip install 'tl-em\[sae\]'"):
            from_sae_lens("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        return
    with pytest.raises(UsageError, match=r"sae_id="):
        from_sae_lens("gpt2-small-res-jb")
    for release, sae_id in (("no-such-release", "x"), ("gpt2-small-res-jb", "blocks.99.hook_resid_pre")):
        with pytest.raises(UsageError, match=r"check release and sae_id"):
            from_sae_lens(release, sae_id)
    for release, sae_id in (("gpt2-small-res-jb", "blocks.8.hook_resid_pre"), ("nobody/nothing", "x")):
        with pytest.raises(FileError, match=r"cannot be had.*em\.load_dictionary\(folder\)"):
            from_sae_lens(release, sae_id)
    with pytest.raises(UsageError, match=r"conversion='mntss_clt_layer_transcoder'.*adds up"):
        from_sae_lens(cross_layer_release(), "layer_0")


def cross_layer_release() -> str:
    """A release of one layer of a cross-layer transcoder, whose decoders SAELens adds up."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory  # pyright: ignore

    known = get_pretrained_saes_directory()
    return next(name for name, each in known.items() if each.conversion_func == "mntss_clt_layer_transcoder")


# ---- end to end: a directory that SAELens's own trainer made -----------------------------------------------------
NAME = "gpt2"
PROMPTS = ["the cat sat in the car .", "a big dog ran to the queen and sang .", "please tell me about the bank ."]


def test_a_directory_of_saelenss_trainer_is_used_from_end_to_end(small_model, tmp_path):
    """Trained by SAELens on the model's stream; loaded, judged, scored, edited; each value beside SAELens's own."""
    pytest.importorskip("sae_lens")
    x = stream(small_model, ids(60))
    theirs = saelens_trained(x, tmp_path / "sae")
    mine = em.load_dictionary(tmp_path / "sae")
    assert mine.site_in == em.Site(1) and mine.activation == "jumprelu" and mine.metadata["model_name"] == NAME
    with torch.no_grad():
        a, said = theirs.encode(x), theirs(x)
    assert 0 < (a > 0).float().mean() < 0.5
    torch.testing.assert_close(mine.encode(x), a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.reconstruct(x), said, atol=1e-5, rtol=1e-4)
    judged = ids(12, seed=1)
    y = stream(small_model, judged)
    quality = em.dictionaries.dictionary_quality(small_model, mine, judged)
    with torch.no_grad():
        fvu = float((y - theirs(y)).square().sum() / (y - y.mean(0)).square().sum())
        l0 = float((theirs.encode(y) > 0).float().sum(-1).mean())
    assert quality.model.fvu.value == pytest.approx(fvu, rel=1e-3) and quality.model.l0.value == pytest.approx(
        l0, rel=1e-3
    )
    assert fvu < 0.5 and quality.better is None and min(each.fvu for each in quality.nearby[1:]) > fvu
    before = em.capture(small_model, PROMPTS, [em.Site(1)], position="prompt_end")[:, 0]
    with torch.no_grad():
        latents = theirs.encode(before)
        index = int(latents.mean(0).argmax())
        off = latents.clone()
        off[:, index] = 0
        expected = before + theirs.decode(off) - theirs.decode(latents)
    with em.intervene(small_model, em.ScaleFeature(mine.feature(index), 0.0)):
        edited = em.capture(small_model, PROMPTS, [em.Site(1)], position="prompt_end")[:, 0]
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-4)
    table = em.score_features(small_model, mine, {"x": em.ContrastSet(PROMPTS[:2], PROMPTS[1:])}).to_pandas()
    assert table.mean_positive[index] == pytest.approx(float(latents[:2, index].mean()), rel=1e-3)


def ids(n: int, seed: int = 0) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, 50, (8 + i % 5,), generator=generator).tolist() for i in range(n)]
    return [EncodedPrompt.from_ids([2, *row]) for row in rows]


def stream(model: Any, prompts: list[EncodedPrompt]) -> torch.Tensor:
    return torch.cat([p.x for p in every_token(model, prompts, [em.Site(1)], sample_spans(prompts))])[:, 0]


def saelens_trained(x: torch.Tensor, folder: Path) -> Any:
    """An SAE of SAELens's trainer on these activations, saved by it, and what SAELens itself loads from there."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.saes import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    steps = 150
    torch.manual_seed(0)
    config = BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=64, k=8.0, topk_threshold_lr=0.1)
    sae = BatchTopKTrainingSAE(config)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = "blocks.1.hook_resid_post", NAME
    sae.b_dec.data = x.mean(0)
    settings = SAETrainerConfig(
        total_training_samples=steps * 128,
        train_batch_size_samples=128,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=1000,
        feature_sampling_window=steps + 1,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = iter(lambda: x[torch.randint(len(x), (128,))], None)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        SAETrainer(settings, sae, batches).fit().save_inference_model(folder)
    return SAE.load_from_disk(folder)
