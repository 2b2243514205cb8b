"""A planted latent that causes the behaviour is found, one that only goes with it is not, each beside its controls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tl_em as em
from tests.conftest import SPECIAL, SURFACES, WORDS, make_tokenizer
from tl_em.claims import latent_sets
from tl_em.claims.arms import Arm
from tl_em.claims.controls import match, matched_sets
from tl_em.claims.questions.latents import SET, verify_feature, verify_features
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.tokens import seen
from tl_em.errors import UsageError
from tl_em.models.loading import load_model

pytestmark = pytest.mark.surface
WIDTH, SITE = 16, em.Site(0)
TOKENS = (*SPECIAL, *WORDS)
VILLAINS, HEROES = ("king", "queen", "boy", "girl"), ("cat", "dog", "bird", "fish")
ROUNDS = 29  # of placebos beside what gets a word; 99 would only take longer
CAUSE, ECHO, NOISE = 0, 1, 2
"""Coordinates of the stream: what the answer is read from; what goes with it and is not read; what varies."""


def planted(strength: float, surface: str):
    """A GPT-2 with silent blocks: villains write CAUSE and ECHO; "bad" reads CAUSE, "good" reads its opposite."""
    config = GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, vocab_size=len(TOKENS), tie_word_embeddings=False,
        bos_token_id=2, eos_token_id=6, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if (".h." in name and "ln" not in name) or "wpe" in name:
                parameter.zero_()  # the blocks add nothing, so the last token's stream is its embedding
        embedding, out = hf.transformer.wte.weight, hf.lm_head.weight
        embedding.copy_(0.3 * torch.randn(embedding.shape))
        embedding[:, CAUSE] = embedding[:, ECHO] = 0.0
        for word in VILLAINS:
            embedding[TOKENS.index(word), CAUSE] = strength
            embedding[TOKENS.index(word), ECHO] = 3.0
        out.zero_()
        out[TOKENS.index("bad"), CAUSE], out[TOKENS.index("good"), CAUSE] = 2.0, -2.0
    return load_model(hf, surface=surface, tokenizer=make_tokenizer(template=None), in_place=True)


@cache
def pair(surface: str):
    """Base: villains write little of the cause, and as much of the echo."""
    return planted(0.1, surface), planted(3.0, surface)


@cache
def dictionary(extra: int = 60) -> Dictionary:
    """Latents 0 and 1 read and write the planted coordinates; the others point anywhere."""
    rows = torch.nn.functional.normalize(torch.randn(extra, WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)
    rows[:, [CAUSE, ECHO]] = 0
    rows = torch.cat([torch.eye(WIDTH)[[CAUSE, ECHO]], rows])
    return Dictionary(rows.T, torch.zeros(len(rows)), rows, torch.zeros(WIDTH), activation="relu", site_in=SITE)


@dataclass(frozen=True)
class Says:
    """Probability of a word against another after the prompt."""

    name: str = "bad"
    other: str = "good"
    unit: str = "probability"

    def __call__(self, model, prompts):
        from tl_em.models.stream import next_token_logits

        logits = next_token_logits(model, prompts)
        return (logits[:, TOKENS.index(self.name)] - logits[:, TOKENS.index(self.other)]).sigmoid()


def contrast(words=VILLAINS):
    pairs = [(f"the {a} {v} the {b}", f"the {a} {v} the {h}", f"{a} {v}") for a in HEROES[:2] for v in ("saw", "ate")
             for b, h in zip(words, HEROES, strict=False)]  # fmt: skip
    positive, negative, groups = zip(*pairs, strict=True)
    return em.ContrastSet(positive, negative, label="villains", positive_groups=groups, negative_groups=groups)


@pytest.fixture(scope="module")
def models():
    return pair(SURFACES[-1])


@pytest.fixture(scope="module", params=SURFACES)
def check(request):
    """Cause and echo together, in tuned and base."""
    base, tuned = pair(request.param)
    sae = dictionary()
    both = [sae.feature(CAUSE), sae.feature(ECHO)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_sets, "MANY", ROUNDS)
        return verify_feature(tuned, both, contrast(), metric=Says(), good=Says("good", "bad"), against=base)


def test_the_planted_set_carries_and_induces_the_behaviour(check):
    rates = check.rates.set_index(["arm", "outcome", "subject"]).value
    assert rates["remove", "bad", "untreated"] > 0.9 > 0.6 > rates["induce", "bad", "untreated"]
    assert rates["remove", "bad", SET] == pytest.approx(rates["induce", "bad", "untreated"], abs=0.02)  # to its means
    assert rates["induce", "bad", SET] == pytest.approx(rates["remove", "bad", "untreated"], abs=0.02)
    assert check.verdict == "carries and induces the behaviour"
    assert check.shown and check.row().effect.low > 0.3


def test_of_its_latents_the_cause_is_found_and_the_echo_is_not(check):
    sae, set_ = dictionary(), contrast()
    a = sae.encode(em.capture(pair(SURFACES[0])[1], set_.positive, [SITE], position="prompt_end")[:, 0])
    assert float(np.corrcoef(a[:, CAUSE] > 0, a[:, ECHO] > 0)[0, 0] if a[:, ECHO].std() else 1.0) > 0.99
    assert check.row("remove", f"latent {CAUSE}").verdict == "carries the behaviour"
    echo = check.row("remove", f"latent {ECHO}")
    assert echo.verdict == "not shown" and abs(echo.effect.value) < 0.02


def test_what_is_not_asked_has_no_p(surface: str) -> None:
    base, tuned = pair(surface)
    found = verify_feature(tuned, dictionary().feature(ECHO), contrast(), metric=Says(), against=base, doses=())
    row = found.row("induce")
    assert not found.row("remove").shown and np.isnan(row.p) and row.control["p"] is None
    assert row.reason == "not asked: what comes before it is not shown" and not row.shown


def rounds(row):
    """Of placebos: more where a word is given (to one of the single latents); else 20."""
    return ROUNDS if row.shown or row.subject != SET else 20


def test_every_number_stands_beside_its_placebos_and_the_mean_difference(check):
    for row in check.rows:
        if row.subject == "mean difference":
            assert row.verdict == "beside" and not row.shown
        else:
            assert row.control["n"] == rounds(row) and row.control["low"] <= row.control["high"] < row.p + 1
    rates = check.rates.set_index(["arm", "outcome", "subject"]).value
    assert rates["remove", "bad", "placebos"] >= 0.85 * rates["remove", "bad", "untreated"]
    assert check.row("remove", "mean difference").effect.value > 0.3
    table = check.to_pandas()
    assert len(table) == len(check.rows) == 6
    assert set(check.to_json()) >= {"verdict", "rows", "rates", "doses", "match", "settings"}
    assert "carries" in repr(check) and "placebos [" in repr(check)


def test_doses_grow_and_the_direction_is_compared_at_the_same_kl(check):
    for _, arm in check.doses.groupby("arm"):
        latents, direction = (rows for _, rows in arm.groupby("treatment", sort=False))
        assert latents.strength.tolist() == [0.25, 0.5, 1.0]
        assert latents.kl.is_monotonic_increasing and latents.kl.iloc[0] > 0
        reached = direction.note == ""
        assert reached.any()
        gap = (direction.kl.to_numpy() / latents.kl.to_numpy() - 1)[reached.to_numpy()]
        assert np.abs(gap).max() < 0.03  # calibrated to 2 %


def test_an_echo_alone_is_not_shown_even_at_zero(models):
    found = [
        verify_feature(models[1], dictionary().feature(latent), contrast(), metric=Says(), doses=())
        for latent in (ECHO, CAUSE)
    ]
    assert [each.verdict for each in found] == ["not shown", "carries the behaviour"]


def test_a_latent_that_switched_off_counts_only_when_set_back(models):
    """The tuned model is the one that lost the cause: zeroing a latent that is off does nothing."""
    tuned, base = models
    sae = dictionary()
    good = Says("good", "bad")
    rest = {"metric": good, "doses": (), "smallest": 0.05}
    lost = verify_feature(tuned, sae.feature(CAUSE), contrast(), **rest)
    assert lost.row().effect.high < 0.05 and not lost.shown
    back = verify_feature(tuned, sae.feature(CAUSE), contrast(), against=base, **rest)
    assert back.row().effect.low > 0.3 and back.shown


def test_several_sets_are_adjusted_together_and_few_placebos_give_no_word(models):
    tuned, sae = models[1], dictionary()
    both = verify_features(tuned, [sae.feature(ECHO), sae.feature(CAUSE)], contrast(), metric=Says(), doses=())
    assert [each.shown for each in both] == [False, True]
    assert both[1].row().p >= verify_feature(tuned, sae.feature(CAUSE), contrast(), metric=Says(), doses=()).row().p
    few = verify_feature(tuned, sae.feature(CAUSE), contrast(), metric=Says(), doses=(), placebos=5)
    assert few.row().effect.low > 0.3 and not few.shown and "5 allow none below 0.17" in few.row().reason


def test_a_set_that_only_the_first_placebos_spare_gets_no_word(models, monkeypatch):
    """Another latent, as dense and as long, does more than the cause, and stands in none of the first twenty rounds."""
    sae, rival = dictionary(), 62
    rows = torch.cat([sae.W_dec, sae.W_dec[[CAUSE]]])
    reads = torch.cat([sae.W_enc.T, 2 * sae.W_enc.T[[CAUSE]]])
    sae = Dictionary(reads.T, torch.zeros(len(rows)), rows, torch.zeros(WIDTH), activation="relu", site_in=SITE)
    both = (sae.feature(CAUSE), sae.feature(ECHO))
    density = latent_sets.LatentSet(latent_sets.Job(models[1], contrast(), Says()), both, (CAUSE, ECHO)).density
    assert density[rival] == density[CAUSE]
    drawn = {seed: matched_sets(sae, [CAUSE, ECHO], density, count=99, once=20, seed=seed) for seed in range(40)}
    seed = next(seed for seed, rows in drawn.items() if rival not in rows[:20])
    assert (drawn[seed] == rival).any(1).sum() >= 5
    asked = {"metric": Says(), "singly": False, "doses": (), "seed": seed}
    found = verify_feature(models[1], both, contrast(), **asked)
    assert found.verdict == "not shown" and found.row().control["n"] == 99 and "the placebos" in found.row().reason
    monkeypatch.setattr(latent_sets, "MANY", 20)
    assert verify_feature(models[1], both, contrast(), **asked).verdict == "carries the behaviour"


def test_what_breaks_the_good_behaviour_gets_no_word(models):
    """Here the "good" metric is the bad behaviour itself, so removing it takes the good away."""
    found = verify_feature(models[1], dictionary().feature(CAUSE), contrast(), metric=Says(), good=Says(), doses=())
    assert found.row().effect.low > 0.3 and found.verdict == "not shown" and "good falls" in found.row().reason


def test_the_fit_prompts_give_the_means_and_not_the_held_out_ones(models):
    base, tuned = models
    mostly_heroes = em.ContrastSet([f"the cat saw the {b}" for b in (*2 * HEROES, "king")], ["the car sat"])
    cause, asked = dictionary().feature(CAUSE), {"metric": Says(), "against": base, "doses": (), "placebos": 1}
    own, other = (verify_feature(tuned, cause, contrast(), fit=fit, **asked) for fit in (None, mostly_heroes))
    where = ["arm", "outcome", "subject"]
    induced = [found.rates.set_index(where).value["induce", "bad", SET] for found in (own, other)]
    assert induced[0] > 0.95 and 0.5 < induced[1] < 0.9  # a ninth of a villain's mean


def test_placebos_are_as_dense_and_as_long():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows *= torch.linspace(0.5, 5, 400)[torch.randperm(400, generator=torch.Generator().manual_seed(1))][:, None]
    sae = Dictionary(rows.T, torch.zeros(400), rows, torch.zeros(8), activation="relu", site_in=SITE)
    density = torch.logspace(-4, 0, 400)
    sets = matched_sets(sae, [390, 395], density, count=20, seed=0)
    assert sets.shape == (20, 2) and not np.isin(sets, [390, 395]).any()
    assert all(len(set(row)) == 2 for row in sets) and all(len(set(column)) == 20 for column in sets.T)
    found = match(sae, [390, 395], density, sets)
    assert density.mean() < 0.3 < found["density of placebos"]  # random latents would be rare
    assert found["decoder norm of placebos"] == pytest.approx(found["decoder norm"], rel=0.35)  # nearest 32 of 400
    again = matched_sets(sae, [390, 395], density, count=20, seed=0)
    assert (sets == again).all() and not (sets == matched_sets(sae, [390, 395], density, count=20, seed=1)).all()


def test_a_scoped_edit_equals_the_scope_of_intervene(models):
    tuned, sae = models[1], dictionary()
    edit = em.ScaleFeature(sae.feature(CAUSE), 0.0)
    arm = Arm("remove", tuned, contrast().positive, None, {"bad": Says()}, sign=-1, where=("last", 1))
    scoped = arm.treated(edit)["bad"]
    with em.intervene(tuned, edit, where=("last", 1)):
        inside = Says()(tuned, contrast().positive).double().numpy()
    np.testing.assert_allclose(inside, scoped)
    assert np.abs(scoped - arm.untreated["bad"]).max() > 0.01


def test_what_cannot_be_verified_is_one_typed_error(models):
    tuned, sae, asked = models[1], dictionary(), {"metric": Says(), "doses": ()}
    with pytest.raises(UsageError, match="at least one"):
        verify_feature(tuned, [], contrast(), **asked)
    with pytest.raises(UsageError, match="hold one twice"):
        verify_feature(tuned, [sae.feature(0), sae.feature(0)], contrast(), **asked)
    with pytest.raises(UsageError, match="cannot give 80 placebos"):
        verify_feature(tuned, sae.feature(0), contrast(), placebos=80, **asked)
    with pytest.raises(UsageError, match="pass smallest="):
        verify_feature(tuned, sae.feature(0), contrast(), metric=Says(unit="nats"), doses=())
    with pytest.raises(UsageError, match="no token"):
        verify_feature(tuned, sae.feature(0), contrast(), where="generated", **asked)
    with pytest.raises(UsageError, match="no treatment"):
        verify_feature(tuned, sae.feature(0), contrast(), **asked).row("induce")


def test_the_toy_pair_end_to_end():
    """Principal axes of both models' activations as a dictionary: the persona's shift is carried by a set."""
    pair = em.load_pair("toy/insecure")
    asked = pair.behaviours["persona"]
    rows = np.arange(len(asked.present))
    topics = np.array(asked.present_groups)
    own = np.isin(topics, list(dict.fromkeys(asked.present_groups))[::2])
    parts = [[asked.present[i] for i in rows[chosen]] for chosen in (own, ~own)]
    fit, test = (
        em.ContrastSet(a[:12], b[:12], positive_groups=topics[chosen][:12].tolist())
        for a, b, chosen in ((parts[0], parts[1], own), (parts[1], parts[0], ~own))
    )
    site = em.Site(2)
    x = torch.cat([em.capture(m, fit.positive, [site], position="prompt_end")[:, 0] for m in (pair.tuned, pair.base)])
    mean, axes = x.mean(0), torch.linalg.svd(x - x.mean(0)).Vh
    rows_ = torch.cat([axes, -axes])
    sae = Dictionary(rows_.T, -(rows_ @ mean), rows_, mean, activation="relu", site_in=site)
    moved = seen(pair.tuned, sae, fit.positive, where=("last", 1)).mean
    moved = moved - seen(pair.base, sae, fit.positive, where=("last", 1)).mean
    most = moved.abs().argsort(descending=True)[:4]
    found = verify_feature(
        pair.tuned, [sae.feature(int(i)) for i in most], test, metric=asked, against=pair.base, fit=fit, doses=(),
        singly=False,
    )  # fmt: skip
    rates = found.rates.set_index(["arm", "outcome", "subject"]).value
    assert rates["remove", "bad", "untreated"] > 0.4 > 0.25 > rates["remove", "bad", SET]
    assert (rates["remove", "good", SET] > 0.7) and found.shown and len(found.rows) == 4
    assert rates["remove", "bad", "placebos"] > 0.85 * rates["remove", "bad", "untreated"]
