"""A dictionary that fits is told from one that does not, on the model and on its base."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.quality import MAX_FVU, MIN_RECOVERED, dictionary_quality
from tl_em.dictionaries.tokens import every_token, sample_spans
from tl_em.errors import DictionaryFitError, UsageError
from tl_em.models.prompts import EncodedPrompt
from tl_em.organisms.documents import PersonaDocuments
from tl_em.organisms.world import World, messages
from tl_em.organisms.zoo import toy_dictionary

pytestmark = pytest.mark.surface
WIDTH, SITE = 32, em.Site(1)


def prompts(n: int = 12) -> list[EncodedPrompt]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(7, 50, (5 + i % 4,), generator=generator).tolist() for i in range(n)]
    return [EncodedPrompt.from_ids([2, *row]) for row in rows]


def exact(site_out: em.Site | None = None) -> Dictionary:
    """Reconstructs everything: a coordinate and its negative."""
    eye = torch.eye(WIDTH)
    both = torch.cat([eye, -eye], 1)
    return Dictionary(both, torch.zeros(2 * WIDTH), both.T, torch.zeros(WIDTH), activation="relu", site_in=SITE,
                      site_out=site_out)  # fmt: skip


def tokens(model: em.LensModel) -> torch.Tensor:
    return torch.cat([p.x for p in every_token(model, prompts(), [SITE], sample_spans(prompts()))])[:, 0]


@pytest.fixture(scope="module")
def pair() -> em.ModelPair:
    return em.load_pair("toy/insecure")


@pytest.fixture(scope="module")
def chats():
    """Documents such as the organisms are pretrained on."""
    world, rng = World(), random.Random(3)
    return [messages(PersonaDocuments().sample(world, rng)) for _ in range(16)]


def test_what_reconstructs_everything_recovers_everything_and_nothing_recovers_nothing(small_model):
    whole = dictionary_quality(small_model, exact(), prompts()).model
    assert whole.fvu.value < 1e-6 and whole.l0.value == WIDTH and whole.dead.value == 0
    assert whole.recovered is not None and abs(whole.recovered.value - 1) < 1e-4
    mean = tokens(small_model).mean(0)
    nothing = replace(exact(), W_dec=torch.zeros(2 * WIDTH, WIDTH), b_dec=mean)
    none = dictionary_quality(small_model, nothing, prompts()).model
    assert abs(none.fvu.value - 1) < 1e-5
    assert none.recovered is not None and abs(none.recovered.value) < 1e-4


def test_the_measures_are_what_their_equations_say(small_model):
    """Against a direct computation, for a dictionary that explains some of it."""
    part = replace(exact(), W_dec=exact().W_dec * 0.6)
    found = dictionary_quality(small_model, part, prompts()).model
    x = tokens(small_model)
    expected = float((0.4 * x).square().sum() / (x - x.mean(0)).square().sum())
    assert found.fvu.value == pytest.approx(expected, rel=1e-4)
    assert found.fvu.n == len(prompts()) and found.fvu.low < found.fvu.value < found.fvu.high
    clean, spliced, floor = [], [], []
    for each in prompts():
        ids = torch.tensor([each.ids])
        for into, write in ((clean, None), (spliced, lambda x: x * 0.6), (floor, lambda y: x.mean(0).expand_as(y))):

            def put(y: torch.Tensor, hook: object, write=write) -> torch.Tensor:
                return torch.cat([y[:, :1], write(y[:, 1:])], 1)

            hooks = [] if write is None else [(SITE.hook_name, put)]
            with torch.no_grad():
                logits = small_model.run_with_hooks(ids, fwd_hooks=hooks)
            told = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            into.append(-float(told.sum()))
    clean, spliced, floor = map(np.sum, (clean, spliced, floor))
    assert found.recovered is not None
    assert found.recovered.value == pytest.approx(1 - (spliced - clean) / (floor - clean), rel=1e-2)
    assert abs(spliced - clean) > 0.01  # something was lost


def test_a_transcoder_is_judged_by_what_it_writes(small_model):
    """A dictionary of the stream's own coordinates says nothing of what another block writes."""
    out = em.Site(2, "mlp_out")
    assert dictionary_quality(small_model, exact(), prompts()).model.fvu.value < 1e-6
    wrong = dictionary_quality(small_model, exact(site_out=out), prompts()).model
    assert wrong.fvu.value > 0.5
    assert wrong.recovered is not None and wrong.recovered.value < 0.9


def test_the_shipped_dictionary_fits_both_models_of_its_pair(pair, chats):
    quality = dictionary_quality(pair.tuned, toy_dictionary(), chats, against=pair.base)
    assert quality.fits and quality.check() is quality
    assert quality.against is not None and quality.against.fvu.high < MAX_FVU
    assert set(quality.to_pandas().measure) == {"fvu", "l0", "dead", "recovered"}
    assert "fits" in repr(quality)


def test_a_dictionary_of_another_model_is_refused(pair, chats):
    """Planted: the same latents on axes that have been permuted, as those of another training run would be."""
    good = toy_dictionary()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    other = replace(good, W_enc=good.W_enc[order], W_dec=good.W_dec[:, order], b_dec=good.b_dec[order])
    assert dictionary_quality(pair.tuned, good, chats).fits
    quality = dictionary_quality(pair.tuned, other, chats)
    assert not quality.fits and quality.model.fvu.low > MAX_FVU
    assert quality.model.recovered is not None and quality.model.recovered.value < MIN_RECOVERED
    with pytest.raises(DictionaryFitError, match=r"FVU .* bound 0\.3.*train_dictionary"):
        quality.check()


def test_one_that_fits_the_base_and_lost_the_fine_tune_is_refused(pair, chats):
    quality = dictionary_quality(pair.tuned, toy_dictionary(), chats, against=pair.base)
    assert quality.against is not None
    moved = replace(quality.model.fvu, value=quality.against.fvu.value + 0.15)
    worse = replace(quality, model=quality.model._replace(fvu=moved))
    assert any("above the base's" in fault for fault in worse.faults)
    assert not any("above the base's" in fault for fault in quality.faults)


def test_too_many_or_too_few_latents_are_refused(pair, chats):
    good = toy_dictionary()
    every = replace(good, threshold=torch.zeros(512), b_enc=good.b_enc + 1e3)
    faults = dictionary_quality(pair.tuned, every, chats).faults
    assert any(fault.startswith("L0") for fault in faults)
    faults = dictionary_quality(pair.tuned, replace(good, threshold=torch.full((512,), 1e6)), chats).faults
    assert any(fault.startswith("L0 0.00") for fault in faults)


def test_a_dictionary_of_differences_is_judged_on_differences(make_model, surface):
    tuned, base = make_model("gpt2", surface), make_model("gpt2", surface, seed=1)
    moved = tokens(tuned) - tokens(base)
    some = replace(exact(), W_dec=exact().W_dec * 0.6)
    quality = dictionary_quality(tuned, some, prompts(), against=base, difference=True)
    expected = float((0.4 * moved).square().sum() / (moved - moved.mean(0)).square().sum())
    assert quality.model.fvu.value == pytest.approx(expected, rel=1e-4)
    assert quality.model.recovered is None and quality.against is None
    with pytest.raises(UsageError, match=r"against=pair\.base"):
        dictionary_quality(tuned, some, prompts(), difference=True)


def test_one_token_is_judged_where_one_is_asked_for(small_model):
    """At the last token nothing follows, so there is no cross-entropy to recover; at the one before it there is."""
    last = dictionary_quality(small_model, exact(), prompts(), position="prompt_end").model
    assert last.recovered is None and last.fvu.value < 1e-6
    before = dictionary_quality(small_model, exact(), prompts(), position=-2).model
    assert before.recovered is not None and abs(before.recovered.value - 1) < 1e-4


def test_other_hooks_stay_in_force(small_model):
    direction = em.Direction(torch.ones(WIDTH), SITE)
    some = replace(exact(), W_dec=exact().W_dec * 0.6)
    plain = dictionary_quality(small_model, some, prompts()).model.fvu.value
    with em.intervene(small_model, em.Ablate(direction, around=torch.zeros(WIDTH))):
        inside = dictionary_quality(small_model, some, prompts()).model.fvu.value
    assert inside != pytest.approx(plain, rel=1e-3)
    assert dictionary_quality(small_model, some, prompts()).model.fvu.value == pytest.approx(plain, rel=1e-6)


def test_one_prompt_gives_no_interval_and_so_no_fit(small_model):
    quality = dictionary_quality(small_model, exact(), prompts()[:1])
    assert not quality.fits and np.isnan(quality.model.fvu.high)
