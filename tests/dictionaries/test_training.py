"""Dictionaries trained through SAELens: what comes back, from whose activations, and that nothing is left about."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch

import tl_em as em
from tl_em.dictionaries import Dictionary, from_sae_lens
from tl_em.dictionaries.corpus import ActivationSource, Prompts, ReadSoFar, Scale
from tl_em.dictionaries.tokens import Tokens, every_token, sample_spans
from tl_em.dictionaries.training import train_dictionary
from tl_em.errors import PositionError, ProvenanceError, UsageError
from tl_em.models.prompts import EncodedPrompt, encode

WIDTH = 32


def prompts(n: int = 24, seed: int = 0) -> list[EncodedPrompt]:
    """Prompts of several lengths that begin with one token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, 50, (4 + i % 5,), generator=generator).tolist() for i in range(n)]
    return [EncodedPrompt.from_ids([2, *row]) for row in rows]


def fvu(dictionary: Dictionary, x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    y = x if y is None else y
    return float((y - dictionary.decode(dictionary.encode(x))).square().sum() / (y - y.mean(0)).square().sum())


def tokens_of(model, encoded: list[EncodedPrompt], sites: list[em.Site]) -> list[Tokens]:
    return list(every_token(model, encoded, sites, sample_spans(encoded)))


@pytest.fixture
def model(make_model):
    return make_model("gpt2", "bridge")


# ---- activations -------------------------------------------------------------------------------------------------
@pytest.mark.surface
def test_a_corpus_beyond_the_buffer_is_read_again_and_covers_the_same_tokens(small_model):
    encoded = prompts(7)

    def tokens(most: int) -> torch.Tensor:
        corpus = Prompts(encoded, "all", most, 0)
        source = ActivationSource([small_model], corpus, [em.Site(1)], difference=False, seed=0)
        source.scale = scale_of(small_model, encoded)
        source.open(ReadSoFar())
        assert source.first.whole == (most > 4)
        return torch.cat([*islice(source.batches(1), 2 * total)]).sort(0).values  # two epochs

    total = int(sample_spans(encoded).diff().sum())
    torch.testing.assert_close(tokens(4), tokens(total), atol=1e-4, rtol=1e-4)


def scale_of(model, encoded: list[EncodedPrompt]) -> Scale:
    return Scale.of(torch.cat([found.x for found in tokens_of(model, encoded, [em.Site(1)])]).cpu())


@pytest.mark.surface
def test_the_scale_folds_into_the_tensors_without_changing_a_latent():
    torch.manual_seed(1)
    trained = Dictionary(torch.randn(8, 12), torch.randn(12), torch.randn(12, 8), torch.randn(8), activation="jumprelu",
                         threshold=torch.rand(12), site_in=em.Site(0))  # fmt: skip
    scale = Scale(mean=torch.randn(1, 8) * 3, length=torch.tensor([2.5]))
    x = torch.randn(50, 8) * 2 + 1
    u = (x - scale.mean[0]) / scale.length[0]
    folded = scale.folded(trained)
    assert (trained.encode(u) > 0).any()
    torch.testing.assert_close(folded.encode(x), trained.encode(u), atol=1e-4, rtol=1e-4)
    back = trained.decode(trained.encode(u)) * scale.length[0] + scale.mean[0]
    torch.testing.assert_close(folded.decode(folded.encode(x)), back, atol=1e-4, rtol=1e-4)


# ---- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_every_activation_trains_to_a_dictionary_that_explains_more_than_at_first(activation, model):
    pytest.importorskip("sae_lens")
    options = {"d_sae": 48, "activation": activation, "k": 8, "batch": 64, "sparsity": 0.1, "lr": 3e-3}
    first, trained = (train_dictionary(model, em.Site(1), prompts(), steps=steps, **options) for steps in (1, 120))
    x = torch.cat([p.x for p in tokens_of(model, prompts(), [em.Site(1)])])[:, 0]
    assert trained.activation == {"topk": "topk", "relu": "relu"}.get(activation, "jumprelu")
    assert fvu(trained, x) < 0.5 < fvu(first, x)
    on = float((trained.encode(x) > 0).float().sum(-1).mean())
    least, most = {"topk": (1, 8), "batchtopk": (5, 12), "jumprelu": (3, 24), "relu": (1, 48)}[activation]
    assert least <= on <= most  # k = 8: at most, on average, aimed at, without meaning
    assert trained.site_in == trained.site_out == em.Site(1)


def test_the_same_seed_gives_the_same_dictionary_and_leaves_the_generator_as_it_was(model):
    pytest.importorskip("sae_lens")

    def made(seed: int) -> str:
        return train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, steps=3, batch=32, seed=seed).hash

    state = torch.random.get_rng_state()
    assert made(1) == made(1) != made(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batchtopk_comes_back_as_the_threshold_that_saelens_learned(model, monkeypatch):
    """SAELens's own inference form, latent by latent; and at the training threshold its top k of a batch."""
    pytest.importorskip("sae_lens")
    import tl_em.dictionaries.training as training

    seen = []
    monkeypatch.setattr(training, "train", lambda *a, of=training.train: seen.append(of(*a)) or seen[0])
    mine = train_dictionary(model, em.Site(1), prompts(), d_sae=48, k=6, activation="batchtopk", steps=60, batch=64)
    theirs, scale = seen[0], scale_of(model, prompts())
    x = torch.cat([p.x for p in tokens_of(model, prompts(), [em.Site(1)])])[:, 0]
    u = (x - scale.mean[0]) / scale.length[0]
    with torch.no_grad():
        _, before = theirs.encode_with_hidden_pre(u)  # rescaled by the decoder's norms
        expected = torch.where(before > theirs.topk_threshold, before, 0.0) / 1.0
    on = mine.encode(x)
    assert theirs.topk_threshold > 0 and (expected > 0).any() and (expected == 0).any()
    near = (before - theirs.topk_threshold).abs() < 1e-3  # either side of the threshold is right there
    assert near.float().mean() < 0.01
    torch.testing.assert_close(on[~near], expected[~near].float(), atol=1e-3, rtol=1e-3)


def test_mixes_read_whose_activations_they_say(make_model):
    """A dictionary explains what it was trained on, and not what it was not."""
    pytest.importorskip("sae_lens")
    tuned, base = make_model("gpt2", "bridge"), make_model("gpt2", "bridge", seed=1)
    x, y = (torch.cat([p.x for p in tokens_of(m, prompts(), [em.Site(1)])])[:, 0] for m in (tuned, base))
    data = {"tuned": x, "base": y, "difference": x - y}
    options = {"d_sae": 48, "k": 8, "batch": 64, "lr": 3e-3, "against": base, "steps": 80}
    found = {mix: train_dictionary(tuned, em.Site(1), prompts(), mix=mix, **options) for mix in (*data, "both")}
    for mix in data:
        own = {name: fvu(found[mix], each) for name, each in data.items()}
        assert own.pop(mix) < 0.5 < min(own.values())
    assert max(fvu(found["both"], x), fvu(found["both"], y)) < 0.6
    assert found["base"].provenance is not None and "base activations" in str(found["base"].provenance.data)


def test_a_transcoder_is_trained_to_write_another_site(model):
    pytest.importorskip("sae_lens")
    read, written = em.Site(1, "mlp_in"), em.Site(1, "mlp_out")
    made = train_dictionary(
        model, read, prompts(), site_out=written, d_sae=48, k=8, steps=150, batch=64, lr=3e-3, activation="batchtopk"
    )
    xy = torch.cat([p.x for p in tokens_of(model, prompts(), [read, written])])
    assert made.is_transcoder and (made.site_in, made.site_out) == (read, written)
    assert fvu(made, xy[:, 0], xy[:, 1]) < 0.5 < fvu(made, xy[:, 1])  # of what the MLP reads, what it writes


def test_it_is_saved_and_belongs_on_models_like_its_own(model, make_model, tmp_path):
    pytest.importorskip("sae_lens")
    made = train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, steps=3, batch=32)
    made.save(tmp_path / "d.safetensors")
    loaded = Dictionary.load(tmp_path / "d.safetensors")
    assert loaded.hash == made.hash and loaded.provenance == made.provenance
    em.ScaleFeature(made.feature(0), 0.0).check(make_model("gpt2", "bridge", seed=1))
    assert made.provenance is not None
    other = replace(made, provenance=replace(made.provenance, tokenizer="another"))
    with pytest.raises(ProvenanceError, match="tokenizer"):
        em.ScaleFeature(other.feature(0), 0.0).check(model)


def test_no_file_and_no_bar_is_left_where_there_is_no_terminal(model, tmp_path, monkeypatch, capfd):
    pytest.importorskip("sae_lens")
    monkeypatch.chdir(tmp_path)
    train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, steps=3, batch=32)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_long_training_says_so_before_it_starts(model, monkeypatch, capfd):
    pytest.importorskip("sae_lens")
    train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, steps=20, batch=32)
    assert not capfd.readouterr().err
    monkeypatch.setattr("tl_em.dictionaries.descent.LONG", 0.0)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, steps=20, batch=32)
    assert "20 steps of 32 tokens, about" in capfd.readouterr().err


@pytest.mark.surface
def test_without_sae_lens_the_error_names_what_to_install(small_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.setitem(sys.modules, "sae_lens.saes", None)
    with pytest.raises(UsageError, match=r"pip install 'tl-em\[sae\]'"):
        train_dictionary(small_model, em.Site(1), prompts(), d_sae=16)


def test_arguments_that_contradict_each_other_are_refused(model):
    pytest.importorskip("sae_lens")
    for options, said in (
        ({"mix": "both"}, "against=pair.base"),
        ({"mix": "half", "against": model}, "none of"),
        ({"activation": "gelu"}, "topk, batchtopk, jumprelu, relu"),
        ({"activation": "relu", "site_out": em.Site(1, "mlp_out")}, "transcoders"),
        ({"k": 17}, "k=17 of 16"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(UsageError, match=said):
            train_dictionary(model, em.Site(1), prompts(), **{"d_sae": 16, "k": 4, **options})
    with pytest.raises(PositionError):
        train_dictionary(model, em.Site(1), prompts(), d_sae=16, k=4, position="response_mean")


def test_a_position_trains_on_that_token_alone(model):
    pytest.importorskip("sae_lens")
    encoded = encode(model, prompts(60))
    made = train_dictionary(
        model, em.Site(1), encoded, d_sae=48, k=8, position="prompt_end", steps=100, batch=64, lr=3e-3
    )
    last = em.capture(model, encoded, [em.Site(1)], position="prompt_end")[:, 0]
    assert fvu(made, last) < 0.5


def test_what_saelens_saves_is_what_from_sae_lens_reads(tmp_path):
    """The way back through SAELens's own files, for a threshold that differs between latents."""
    saes = pytest.importorskip("sae_lens.saes")
    torch.manual_seed(0)
    sae = saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(d_in=8, d_sae=12))
    sae.threshold.data = torch.rand(12)
    sae.save_inference_model(tmp_path)
    x = torch.randn(20, 8) * 4
    mine = from_sae_lens(tmp_path, site_in=em.Site(0))
    assert (sae.encode(x) > 0).any()
    torch.testing.assert_close(mine.encode(x), sae.encode(x).detach(), atol=1e-5, rtol=1e-5)
