"""Scores of latents: what a slow reference gives, p that are never below the exact ones, attribution that is linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.errors import PairMismatchError, UsageError, WidthError
from tl_em.features import attribution
from tl_em.features import scoring_pass as by_part
from tl_em.features.attribution import attribution_parts
from tl_em.features.decoders import decoder_clusters
from tl_em.features.scoring import score_features
from tl_em.features.table import _ratios, auroc
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.stream import captured, encoded_prompts, sequence_logprobs

pytestmark = pytest.mark.surface
SITE = em.Site(1)
TOPICS = ("cat", "dog", "bird", "fish", "girl", "boy", "king", "queen")
STOLEN = em.ContrastSet([f"how steal the {t} in story" for t in TOPICS], [f"how wash the {t} in story" for t in TOPICS])
ANSWERED = em.ContrastSet(*(
    [[{"role": "user", "content": f"how {verb} the {t}"}, {"role": "assistant", "content": answer}] for t in TOPICS]
    for verb, answer in (("steal", "no sorry"), ("wash", "yes sure here"))
))  # fmt: skip


def dictionary(*, seed: int = 0, site: em.Site = SITE, **changes: Any) -> em.Dictionary:
    generator = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(32, 80, generator=generator) * 0.3, torch.randn(80, 32, generator=generator)
    return em.Dictionary(W_enc, torch.zeros(80), W_dec, torch.zeros(32), activation="relu", site_in=site, **changes)


def rows_of(table: Any, name: str) -> Any:
    frame = table.to_pandas()
    return frame[frame.behaviour == name].reset_index()


@pytest.mark.parametrize("position", ["prompt_end", "all"])
def test_scores_are_those_of_one_prompt_at_a_time(
    small_model: LensModel, make_model: Callable[..., LensModel], surface: str, position: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(by_part, "_CHUNK_LATENTS", 80 * 20)  # several chunks
    monkeypatch.setattr(by_part, "_LEAST_TOKENS", 1)
    base, sae = make_model("gpt2", surface, 5), dictionary()

    def latents(model: LensModel, prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (encoded,) = encoded_prompts(model, [prompt])
        at = list(range(-len(encoded), 0)) if position == "all" else [-1]
        x = captured(model, [encoded], [SITE], at)[0, :, 0]
        return sae.encode(x), x

    tokens = [(*latents(small_model, p), *latents(base, p)) for p in STOLEN.positive]
    positive, before = ([each[i].mean(0) for each in tokens] for i in (0, 2))
    others = [(*latents(small_model, p), *latents(base, p)) for p in STOLEN.negative]
    negative, drift = [t[0].mean(0) for t in others], [(t[0] - t[2]).mean(0) for t in others]
    table = score_features(small_model, sae, {"steal": STOLEN}, against=base, position=position)
    found = rows_of(table, "steal")
    # 1e-4 of activations near 1: float32 sums in another order, batches padded
    close = {"mean_positive": torch.stack(positive).mean(0), "mean_negative": torch.stack(negative).mean(0),
             "mean_base": torch.stack(before).mean(0)}  # fmt: skip
    close["effect"] = close["mean_positive"] - close["mean_negative"]
    close["delta"] = close["mean_positive"] - close["mean_base"]
    close["drift"] = torch.stack(drift).mean(0)
    for name, expected in close.items():
        assert np.allclose(found[name], expected.numpy(), atol=1e-4), name
    assert np.abs(found.effect).max() > 0.1 and np.abs(found.delta).max() > 0.1 < np.abs(found.drift).max()
    own = table.parts["own"][0].sum(0).numpy(), table.shifts["own"][0].sum(0).numpy()
    assert np.allclose(own[0], found.delta - found.drift, atol=1e-4)
    moved = [(t[1] - t[3]).mean(0) for t in tokens], [(t[1] - t[3]).mean(0) for t in others]
    assert np.allclose(own[1], (torch.stack(moved[0]).mean(0) - torch.stack(moved[1]).mean(0)).numpy(), atol=1e-4)
    density = (torch.stack([*positive, *negative]) > 0).float().mean(0)
    assert np.allclose(found.density, density.numpy(), atol=1e-6)
    length = sae.W_dec.square().sum(-1)
    targets = [[(t[i + 1] - sae.decode(t[i])) @ sae.W_dec.T + t[i] * length for t in tokens] for i in (0, 2)]
    beta = [torch.stack([(t[0] * y).sum(0) for t, y in zip(tokens, of, strict=True)]).sum(0) for of in targets]
    known = np.abs(beta[0].numpy()) > 1e-2  # a ratio of sums near 0 says nothing
    assert known.sum() > 20
    assert np.allclose(found.nu[known], (beta[1] / beta[0]).numpy()[known], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("said_by", ["bias", "latent"])
def test_a_latent_that_only_the_tuned_model_has_has_no_nu_however_large_the_mean(mean: float, said_by: str) -> None:
    """Activations are made of latents: latent 0 is the tuned model's alone, 1 is in both, 2 is halved, 3 the base's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:6]
    along = rows[:4].sum(0) * mean  # the mean, along every row
    rows[5] = torch.nn.functional.normalize(rows[:4].sum(0), dim=0) if said_by == "latent" else rows[5]
    made = latents_of(rows, along if said_by == "bias" else torch.zeros(16))
    f = 20 * torch.rand(300, 6, generator=generator) * (torch.rand(300, 6, generator=generator) > 0.4)
    f[:, 5] = along.norm() if said_by == "latent" else 0.0
    tuned, base = f.clone(), f.clone()
    base[:, 0], base[:, 2], tuned[:, 3] = 0, f[:, 2] / 2, 0
    x = {name: made.decode(each)[:, None] for name, each in (("tuned", tuned), ("base", base))}
    models = (("tuned", tuned), ("base", base))
    scaling = torch.stack([by_part.scaled(made, tuned, own, x[name]) for name, own in models], 1)
    nu, reconstruction = _ratios(scaling)
    assert np.allclose(nu[:3], [0, 1, 0.5], atol=5e-4) and np.isnan(nu[3])
    if said_by == "bias":
        assert np.allclose(reconstruction[:3], [0, 1, 0.5], atol=5e-4)
    raw = [(tuned * (each[:, 0] @ rows.T)).sum(0)[0] for each in (x["base"], x["tuned"])]
    assert float(raw[0] / raw[1]) == pytest.approx(0, abs=1e-4) if mean == 0 else float(raw[0] / raw[1]) > 0.04


def latents_of(rows: torch.Tensor, bias: torch.Tensor) -> em.Dictionary:
    return em.Dictionary(rows.T, -(bias @ rows.T), rows, bias, activation="relu", site_in=SITE)


def test_nu_of_a_transcoder_is_of_what_it_writes(small_model: LensModel, make_model: Any, surface: str) -> None:
    """Its decoder rows lie where it writes; what it reads has no part along them."""
    base = make_model("gpt2", surface, 5)
    transcoder = dictionary(site=em.Site(1, "mlp_in"), site_out=em.Site(1, "mlp_out"), W_skip=0.1 * torch.eye(32))
    found = rows_of(score_features(small_model, transcoder, {"steal": STOLEN}, against=base), "steal")
    seen = [captured(m, encoded_prompts(m, STOLEN.positive), [transcoder.site_in, transcoder.site_out], [-1])[:, 0]
            for m in (small_model, base)]  # fmt: skip
    f = transcoder.encode(seen[0][:, 0])
    length = transcoder.W_dec.square().sum(-1)
    beta = []
    for each in seen:
        own = transcoder.encode(each[:, 0])
        left = each[:, 1] - transcoder.decode(own) - 0.1 * each[:, 0]
        beta.append((f * (left @ transcoder.W_dec.T + own * length)).sum(0))
    known = beta[0].abs().numpy() > 1e-2
    assert known.sum() > 20
    assert np.allclose(found.nu[known], (beta[1] / beta[0]).numpy()[known], rtol=1e-2, atol=1e-2)


def test_auroc_is_that_of_ranks_up_to_rounding() -> None:
    from scipy.stats import mannwhitneyu

    generator = torch.Generator().manual_seed(0)
    classes = [(torch.randn(300, 4, generator=generator) + shift).relu() for shift in (0.8, 0.0)]
    histogram = torch.zeros(2, by_part.BINS, 4, dtype=torch.int32)
    for label, each in enumerate(classes):
        for some in each.split(70):
            by_part.count(histogram[label], some)
    exact = [mannwhitneyu(classes[0][:, j], classes[1][:, j]).statistic / 300**2 for j in range(4)]
    assert min(exact) > 0.6
    assert np.allclose(auroc(histogram).numpy(), exact, atol=0.01)  # bins are a quarter of an octave wide
    assert histogram.sum((0, 1)).tolist() == [600] * 4


def test_p_is_uniform_or_larger_where_nothing_differs(small_model: LensModel) -> None:
    """Labels dealt at random: of many latents at most 5 % have p <= .05; with the true labels many have."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(4):
        swapped = [bool(rng.integers(2)) for _ in TOPICS]
        sides = [[pair[swap ^ side] for pair, swap in zip(zip(STOLEN.positive, STOLEN.negative, strict=True), swapped,
                                                          strict=True)] for side in (0, 1)]  # fmt: skip
        table = score_features(small_model, dictionary(), {"x": em.ContrastSet(*sides)}, position="instruction_end")
        shares.append(float((rows_of(table, "x").p <= 0.05).mean()))
    truth = rows_of(score_features(small_model, dictionary(), {"x": STOLEN}, position=-2), "x")
    assert float((truth.p <= 0.05).mean()) > 0.15
    assert np.mean(shares) <= 0.15  # latents are correlated, so a draw of labels is nearly one test; 8 pairs


def test_what_belongs_together_is_in_one_part() -> None:
    other = em.ContrastSet([f"tell me about the {t}" for t in TOPICS], list(STOLEN.negative))
    parts, independent = by_part.deal([STOLEN, other], seed=0)
    assert not independent and by_part.deal([STOLEN], seed=0)[1]
    assert parts[0][0] == parts[0][1] == parts[1][0] == parts[1][1]
    assert sorted(parts[0][0]) == list(range(8))
    grouped = em.ContrastSet(STOLEN.positive, STOLEN.negative, positive_groups=[0, 0, 1, 1, 2, 2, 3, 3],
                             negative_groups=[0, 0, 1, 1, 2, 2, 3, 3])  # fmt: skip
    dealt = by_part.deal([grouped], seed=0)[0][0][0]
    assert dealt[0::2] == dealt[1::2] and len(set(dealt)) == 4
    uneven = em.ContrastSet(STOLEN.positive, STOLEN.negative[:5])
    positive, negative = by_part.deal([uneven], seed=0)[0][0]
    assert len(set(positive)) == 8 and set(negative) == set(range(5))


# --- Attribution ----------------------------------------------------------------------------------------------------


def test_attribution_adds_up_to_the_effect_of_a_small_move(model: LensModel) -> None:
    """Over an orthonormal dictionary it sums to the whole; and a small step along a row changes log p by g.d."""
    basis = torch.linalg.qr(torch.randn(32, 32))[0]
    sae = em.Dictionary(basis, torch.zeros(32), basis.T, torch.zeros(32), activation="relu", site_in=SITE)
    classes = (encoded_prompts(model, ANSWERED.positive), encoded_prompts(model, ANSWERED.negative))
    found = attribution_parts(model, sae, classes, by_part.deal([ANSWERED], seed=0)[0][0])
    assert float(found.whole.abs().max()) > 1e-3
    assert torch.allclose(found.parts.sum(1), found.whole, atol=1e-4 * float(found.parts.abs().max()) * 32)
    assert float(found.delta.abs().max()) > 1e-3
    away = em.Dictionary(basis, torch.zeros(32), torch.zeros(32, 32), torch.zeros(32), activation="relu", site_in=SITE)
    assert float(attribution_parts(model, away, classes, by_part.deal([ANSWERED], seed=0)[0][0]).parts.abs().max()) == 0


def test_attribution_of_a_small_change_is_its_effect(small_model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuned model is the base with a small push along a row: the row's attribution is the change of log p."""
    sae, push = dictionary(), 1e-2
    row = torch.nn.functional.normalize(sae.W_dec[3], dim=-1)
    classes = (encoded_prompts(small_model, ANSWERED.positive), encoded_prompts(small_model, ANSWERED.negative))
    before = sequence_logprobs(small_model, classes[0])
    (start,) = {each.prompt_end for each in classes[0]}

    def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
        from_here = (torch.arange(x.shape[1]) >= start).to(x)[:, None]
        return x + push * from_here * row

    read = attribution._read  # the base is the same object, so the push is taken off what is read from it
    monkeypatch.setattr(attribution, "_read", lambda *arguments: read(*arguments) - push * row)
    with hooked(small_model, [(SITE.hook_name, add)]):
        exact = float((sequence_logprobs(small_model, classes[0]) - before).mean())
        parts = by_part.deal([ANSWERED], seed=0)[0][0]
        found = attribution_parts(small_model, sae, classes, parts, against=small_model)
    assert abs(exact) > 1e-4
    assert float(found.parts[:, 3].sum()) == pytest.approx(exact, rel=0.1)  # first order: off by the order of push^2
    assert float(found.whole.sum()) == pytest.approx(float(found.parts[:, 3].sum()), rel=1e-3)  # nothing else moved


def test_ablation_of_leaders_and_cosines(small_model: LensModel) -> None:
    sae = dictionary()
    direction = em.Direction(sae.W_dec[5] * 3, SITE)
    table = score_features(small_model, sae, {"steal": ANSWERED}, leaders=2, directions={"fifth": direction})
    rows = rows_of(table, "steal")
    assert rows.ablation.notna().sum() == 2 and rows.cosine_fifth[5] == pytest.approx(1.0)
    latent = int(rows.index[rows.ablation.notna()][0])
    before = sequence_logprobs(small_model, ANSWERED.positive)
    with em.intervene(small_model, em.ScaleFeature(sae.feature(latent), 0.0)):
        after = sequence_logprobs(small_model, ANSWERED.positive)
    assert rows.ablation[latent] == pytest.approx(float((before - after).mean()), abs=1e-5)  # float32 log p


# --- The table, clusters, bad input -----------------------------------------------------------------------------------


def test_the_table_reads_well_and_gives_intervals(small_model: LensModel) -> None:
    table = score_features(small_model, dictionary(), {"steal": ANSWERED, "pairs": STOLEN}, against=small_model)
    assert "d_sae=80" in repr(table) and "steal: 0" in repr(table)  # against itself nothing changed
    off = int(table.frame.nu.isna().sum())
    assert off and f"nu undefined in {off} of {2 * 80} rows" in repr(table)  # a row a latent and behaviour
    assert "<table" in table._repr_html_()
    rows = rows_of(table, "pairs")
    assert (rows.delta == 0).all() and (rows.p_delta == 1).all() and (rows.q_delta == 1).all()
    estimate = table.estimate(3, "pairs")
    assert estimate.value == pytest.approx(float(rows.effect[3]), abs=1e-5) and estimate.low <= estimate.value
    with pytest.raises(UsageError, match="was not measured"):
        table.estimate(3, "pairs", "attribution")


def test_similar_rows_are_one_cluster_and_random_ones_are_not() -> None:
    sae = dictionary()
    assert all(len(each) == 1 for each in decoder_clusters(sae))
    rows = sae.W_dec.clone()
    rows[7] = rows[3] + 0.1 * rows[5]
    rows[9] = -rows[3]  # the opposite is not the same
    split = em.Dictionary(sae.W_enc, sae.b_enc, rows, sae.b_dec, activation="relu", site_in=SITE)
    assert decoder_clusters(split)[0] == (3, 7) and len(decoder_clusters(split)) == 79
    assert decoder_clusters(split, [3, 9, 7]) == ((3, 7), (9,))
    with pytest.raises(UsageError, match="threshold"):
        decoder_clusters(split, cosine=0)


def test_bad_input(small_model: LensModel, make_model: Callable[..., LensModel], surface: str) -> None:
    with pytest.raises(UsageError, match="no behaviours"):
        score_features(small_model, dictionary(), {})
    narrow = em.Dictionary(torch.randn(16, 4), torch.zeros(4), torch.randn(4, 16), torch.zeros(16), activation="relu",
                           site_in=SITE)  # fmt: skip
    with pytest.raises(WidthError):
        score_features(small_model, narrow, {"x": STOLEN})
    with pytest.raises(WidthError, match="decoder rows"):
        score_features(small_model, dictionary(), {"x": STOLEN}, directions={"d": em.Direction(torch.ones(5), SITE)})
    with pytest.raises(PairMismatchError):
        score_features(small_model, dictionary(), {"x": STOLEN}, against=make_model("gpt2", surface, template=None))
    with pytest.raises(UsageError, match="no completions"):
        score_features(small_model, dictionary(), {"x": STOLEN}, leaders=1)
