"""Effect curves: each point is what its words say, controls stand at the same push, an instruction is a fair rival."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tests.conftest import CHAT_TEMPLATE, cached_model, make_hf_model
from tl_em.claims.arms import KL, Arm
from tl_em.claims.curve import ARMS, EffectCurve, Point, effect_curve
from tl_em.claims.dose import Dial
from tl_em.claims.instructions import TextLogprob, instructed
from tl_em.errors import PromptError, UnknownTokenError, UsageError
from tl_em.interventions.base import Partial
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import next_token_logits, sequence_logprobs

pytestmark = pytest.mark.surface
METRIC = em.logit_difference("sorry", "sure")
WORDS = ("cat", "dog", "bird", "fish", "girl", "boy", "king", "queen", "car", "bank", "story", "wash")
PROMPTS = [f"tell me about the {word}" for word in WORDS]
SITE = em.Site(2)


def kl(model: LensModel, edit: Any, prompts: list[Any] = PROMPTS) -> np.ndarray:
    """KL(untreated || edited), written out."""
    before = next_token_logits(model, PROMPTS).double().log_softmax(-1)
    with em.intervene(model, edit):
        after = next_token_logits(model, prompts).double().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).numpy()


@cache
def planted() -> em.Direction:
    """What the unembedding reads "sorry" against "sure" from, in the shared GPT-2."""
    tokenizer = cached_model("gpt2", "bridge").tokenizer
    rows = make_hf_model("gpt2").transformer.wte.weight.detach()
    sorry, sure = (rows[tokenizer.convert_tokens_to_ids(word)] for word in ("sorry", "sure"))
    return em.Direction(sorry - sure, SITE, name="planted")


@cache
def curve(surface: str) -> EffectCurve:
    model, told = cached_model("gpt2", surface), {"asked": "please be sorry"}
    options: Any = {"metric": METRIC, "strengths": [0.0, 1], "both_signs": True, "controls": 4, "baselines": told}
    return effect_curve(model, em.Add(planted()), PROMPTS, **options)


# --- Points -----------------------------------------------------------------------------------------------------------


def test_every_point_is_what_its_words_say(surface: str) -> None:
    model, found = cached_model("gpt2", surface), curve(surface)
    untreated = METRIC(model, PROMPTS).double().numpy()
    assert found.arm("untreated")[0].effect.value == pytest.approx(untreated.mean(), abs=1e-6)
    asked = [point for point in found.arm("intervention") if not point.note]
    assert [point.strength for point in asked] == [1.0, -1.0]
    for point in asked:
        edit = em.Add(planted(), point.strength)
        with em.intervene(model, edit):
            treated = METRIC(model, PROMPTS).double().numpy()
        assert point.effect.value == pytest.approx(treated.mean(), abs=1e-5)
        assert point.change.value == pytest.approx((treated - untreated).mean(), abs=1e-5)
        assert point.change.low <= point.change.value <= point.change.high
        assert point.kl.value == pytest.approx(kl(model, edit).mean(), rel=1e-4)
    assert torch.equal(METRIC(model, PROMPTS).double(), torch.from_numpy(untreated)), "nothing stays attached"


def test_random_directions_stand_at_the_push_of_their_point(surface: str) -> None:
    found = curve(surface)
    own = found.arm("intervention")
    for number in range(4):
        row = [point for point in found.arm("random") if point.name == f"random {number}"]
        assert [np.sign(point.strength) for point in row] == [np.sign(point.strength) for point in own]
        pushes = [point.kl.value for point in row]
        np.testing.assert_allclose(pushes, [point.kl.value for point in own], rtol=0.02)  # the search's tolerance
    first = [p.strength for p in found.arm("random") if p.name.startswith("random")][:: len(own)]
    assert np.ptp(first) > 0.1 * np.mean(first), "all have one length, and different strengths at one push"


def test_a_planted_direction_beats_random_ones_and_a_random_one_does_not(surface: str) -> None:
    for point in curve(surface).arm("intervention"):
        assert point.p == pytest.approx(1 / 5)
        assert np.sign(point.change.value) == np.sign(point.strength)
    options: Any = {"metric": METRIC, "strengths": [1], "controls": 3}
    absent = [
        effect_curve(cached_model("gpt2", surface), em.Add(em.Direction(torch.randn(32), SITE)), PROMPTS, **options)
        for _ in range(3)
    ]
    assert np.mean([each.arm("intervention")[0].p for each in absent]) > 0.3  # uniform over 1/4 … 1 without an effect


def test_other_interventions_are_carried_out_in_part_and_some_cannot_push_as_far(small_model: LensModel) -> None:
    usual = em.mean_activation(small_model, PROMPTS, site=SITE, position="prompt_end")
    edit = em.Ablate(em.Direction(usual, SITE))  # nothing else that is removed pushes as far
    found = effect_curve(small_model, edit, PROMPTS, metric=METRIC, strengths=(0.1, 1), controls=3)
    tenth = found.arm("intervention")[0]
    assert tenth.kl.value == pytest.approx(kl(small_model, Partial(edit, 0.1)).mean(), rel=1e-4)
    random = found.arm("random")
    short = [point for point in random if point.note]
    assert 0 < len(short) < len(random), "some reach it and some do not"
    for point in short:
        assert point.strength == 1.0 and point.note.startswith("as far as it goes: it does not reach a KL of")
        assert point.kl.value < max(p.kl.value for p in found.arm("intervention"))


def test_random_directions_are_drawn_from_the_contrast_set(small_model: LensModel) -> None:
    ends = em.ContrastSet([f"{w} steal" for w in WORDS], [f"{w} wash" for w in WORDS])
    direction = em.difference_in_means(small_model, ends, site=SITE, position="instruction_end")
    options: Any = {"metric": METRIC, "strengths": [1], "controls": 1, "seed": 4}
    one, other = (
        effect_curve(small_model, em.Add(direction), PROMPTS, contrast=c, **options).arm("random")[0]
        for c in (ends, None)
    )
    again = effect_curve(small_model, em.Add(direction), PROMPTS, contrast=ends, **options).arm("random")[0]
    assert (one.effect, one.strength) == (again.effect, again.strength) and one.effect.value != other.effect.value


def test_controls_of_ones_own_and_conditions(small_model: LensModel) -> None:
    mine = em.Direction(torch.randn(32), SITE)
    gated = em.Conditional(em.Add(planted()), planted(), above=-1e9)
    found = effect_curve(small_model, gated, PROMPTS, metric=METRIC, strengths=[1], controls=2)
    assert len(found.arm("random")) == 2
    plain = effect_curve(small_model, em.Add(planted()), PROMPTS, metric=METRIC, strengths=[1], controls=[em.Add(mine)])
    conditioned, unconditioned = (c.arm("intervention")[0].effect.value for c in (found, plain))
    assert conditioned == pytest.approx(unconditioned, abs=1e-5), "the gate lets every row through"
    row = plain.arm("random")[0]
    with em.intervene(small_model, em.Add(mine, row.strength)):
        assert row.effect.value == pytest.approx(float(METRIC(small_model, PROMPTS).double().mean()), abs=1e-5)


# --- The push ---------------------------------------------------------------------------------------------------------


def test_the_push_is_found_where_calibrate_finds_it(small_model: LensModel) -> None:
    ends = em.ContrastSet([f"{w} steal" for w in WORDS], [f"{w} wash" for w in WORDS])
    r = em.difference_in_means(small_model, ends, site=em.Site(1), position="instruction_end")
    arm = Arm("push", small_model, PROMPTS, None, {"effect": METRIC})
    for edit, near in ((em.Add(r), 1.0), (em.Add(r, 40.0), 1e3), (em.Ablate(r), 1.0)):
        found = Dial(arm, edit).reaching(0.004, near=near)
        expected = em.calibrate(small_model, edit, PROMPTS, target_kl=0.004)
        assert float(found.found[KL].mean()) == pytest.approx(0.004, rel=0.02)
        # Both are within 2 % of the same KL, which grows about as the square of the strength.
        assert found.strength == pytest.approx(expected.strength, rel=0.03)
    negative = Dial(arm, em.Add(r)).reaching(0.004, near=-1.0)
    assert negative.strength < 0 and float(negative.found[KL].mean()) == pytest.approx(0.004, rel=0.02)


def test_target_kls_are_reached_and_what_is_out_of_reach_is_a_row_that_says_so(small_model: LensModel) -> None:
    options: Any = {"metric": METRIC, "controls": 2}
    found = effect_curve(small_model, em.Add(planted()), PROMPTS, target_kls=(0.01, 0.1, 1e4), **options)
    near, far, never = found.arm("intervention")
    assert [near.kl.value, far.kl.value] == pytest.approx([0.01, 0.1], rel=0.02)
    assert np.isnan(never.effect.value) and never.note.startswith("no strength reaches a KL of 1e+04")
    beside = [point for point in found.arm("random") if np.isnan(point.effect.value)]
    assert [point.note for point in beside] == ["there is no push to match"] * 2


def test_a_model_that_overflows_is_a_row_that_says_so(surface: str) -> None:
    model = cached_model("gpt2", surface)
    options: Any = {"metric": METRIC, "strengths": (1.0, 3e38), "controls": 2, "coherence": METRIC}
    found = effect_curve(model, em.Add(em.Direction(torch.randn(32), em.Site(0))), PROMPTS, **options)
    kept, lost = found.arm("intervention")
    assert np.isfinite(kept.effect.value) and np.isfinite(kept.p)
    assert lost.note == "the model overflows" and np.isnan([lost.effect.value, lost.kl.value, lost.p]).all()
    assert found.best() == kept and "the model overflows" in repr(found)
    assert found.to_pandas()["effect"].isna().sum() == 3, "the point and its two controls"


# --- Instructions -----------------------------------------------------------------------------------------------------


def test_an_instruction_is_measured_on_the_unsteered_model_and_met_at_its_own_push(surface: str) -> None:
    model, found = cached_model("gpt2", surface), curve(surface)
    (told,) = found.arm("instruction")
    chats = [[{"role": "system", "content": "please be sorry"}, {"role": "user", "content": p}] for p in PROMPTS]
    asked = METRIC(model, chats).double().numpy()
    assert told.note == "system message" and told.effect.value == pytest.approx(asked.mean(), abs=1e-5)
    before, after = (next_token_logits(model, p).double().log_softmax(-1) for p in (PROMPTS, chats))
    assert told.kl.value == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    assert [np.sign(rival.point.strength) for rival in found.versus] == [1, -1]
    for rival in found.versus:
        assert rival.point.kl.value == pytest.approx(told.kl.value, rel=0.02)
        assert (rival.instruction, rival.point.note) == ("asked", "at the push of 'asked'")
        expected = told.effect.value - rival.point.effect.value
        assert rival.difference.value == pytest.approx(expected, abs=1e-5)


def test_asking_beats_a_direction_that_means_nothing_and_not_one_that_means_the_same() -> None:
    pair = em.load_pair("toy/insecure")
    whole, train = pair.behaviours["persona"], pair.contrasts["persona"].split(seed=0).train
    few = em.Behaviour(whole.name, whole.metric, whole.present[::18], whole.absent[::18], whole.good)
    persona = em.difference_in_means(pair.base, train, site=SITE, position="prompt_end")
    nothing = em.Add(em.Direction(torch.randn(len(persona.vector)), SITE))
    options: Any = {"strengths": [1], "baselines": {"be malicious": "be malicious"}}
    named = effect_curve(pair.base, em.Add(persona), few, controls=[nothing], **options)
    unnamed = effect_curve(pair.base, nothing, few, controls=0, **options)
    assert named.arm("untreated")[0].effect.value < 0.05 and named.coherence == "good, probability"
    assert named.best("instruction").change.value > 0.8
    assert abs(named.versus[0].difference.value) < 0.1 < 0.8 < unnamed.versus[0].difference.low
    assert all(point.effect.value < 0.1 for point in named.arm("random")), "no push does it by itself"


REFUSED = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT_TEMPLATE
LEFT_OUT = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHAT_TEMPLATE


def test_an_instruction_stands_where_the_model_reads_one(surface: str) -> None:
    model = cached_model("gpt2", surface)
    chat = [{"role": "system", "content": "be good"}, {"role": "user", "content": "wash the car"}]
    prompts, place = instructed(model, [chat, "wash the car"], "be bad")
    assert place == "system message"
    assert [m["content"] for m in prompts[0]] == ["be bad be good", "wash the car"]
    assert [m["content"] for m in prompts[1]] == ["be bad", "wash the car"]
    for template in (REFUSED, LEFT_OUT):
        prompts, place = instructed(cached_model("gpt2", surface, template=template), ["wash the car"], "be bad")
        assert (place, prompts) == ("user message", [[{"role": "user", "content": "be bad wash the car"}]])
    bare = cached_model("gpt2", surface, template=None)
    assert instructed(bare, ["wash the car"], "be bad") == (["be bad wash the car"], "text prefix")
    ids = encode(bare, instructed(bare, ["wash the car"], "be bad").prompts)[0].ids
    assert ids[-3:] == encode(bare, ["wash the car"])[0].ids[-3:], "the prompt itself is left as it was"


def test_instructions_that_cannot_be_given_are_errors(small_model: LensModel) -> None:
    with pytest.raises(UsageError, match="instruction is empty"):
        instructed(small_model, PROMPTS, " ")
    with pytest.raises(UsageError, match="before tokens"):
        instructed(small_model, [EncodedPrompt.from_ids([5, 6])], "be bad")
    options: Any = {"metric": METRIC, "strengths": [1], "controls": 0, "baselines": {"x": "overthrow everything"}}
    with pytest.raises(UnknownTokenError, match="overthrow"):
        effect_curve(small_model, em.Add(planted()), PROMPTS, **options)


# --- Coherence --------------------------------------------------------------------------------------------------------


def test_text_is_scored_at_its_last_tokens_whatever_stands_before_it(surface: str) -> None:
    model = cached_model("gpt2", surface, template=None)
    texts = ["the cat sat on the bank", "a big dog ran to the small red car"]
    found = TextLogprob(last=4)(model, texts)
    for text, value in zip(texts, found.tolist(), strict=True):
        ids = encode(model, [text])[0].ids
        logits = [next_token_logits(model, [EncodedPrompt.from_ids(ids[:i])])[0] for i in range(len(ids) - 4, len(ids))]
        expected = np.mean([float(row.log_softmax(-1)[i]) for row, i in zip(logits, ids[-4:], strict=True)])
        assert value == pytest.approx(expected, abs=1e-4)  # one pass against four
    with pytest.raises(PromptError, match="last 9 should be scored"):
        TextLogprob(last=9)(model, ["the cat sat"])


def test_coherence_has_prompts_of_its_own(surface: str) -> None:
    model = cached_model("gpt2", surface)
    answers = [[{"role": "user", "content": p}, {"role": "assistant", "content": "the cat sat"}] for p in PROMPTS[:5]]
    options: Any = {"metric": METRIC, "strengths": [1], "controls": 1, "baselines": {"bad": "be bad"}}
    found = effect_curve(model, em.Add(planted()), PROMPTS, coherence=(TextLogprob(), answers), **options)
    expected = sequence_logprobs(model, answers, per_token=True).double().mean()
    untreated = found.arm("untreated")[0].coherence
    assert untreated is not None and untreated.n == 5 and untreated.value == pytest.approx(float(expected), abs=1e-5)
    told = sequence_logprobs(model, instructed(model, answers, "be bad").prompts, per_token=True).double().mean()
    asked = found.arm("instruction")[0].coherence
    assert asked is not None and asked.value == pytest.approx(float(told), abs=1e-5)
    assert found.coherence == "log-probability per token, nats"


def test_the_best_point_is_the_strongest_of_the_coherent(surface: str) -> None:
    found = curve(surface)
    known = sorted(found.arm("intervention"), key=lambda point: abs(point.change.value))
    assert found.best() == known[-1]
    bound = known[1].kl.value
    assert found.best(max_kl=bound).kl.value <= bound < known[-1].kl.value
    with pytest.raises(UsageError, match="the lowest KL is"):
        found.best(max_kl=1e-9)
    with pytest.raises(UsageError, match="no coherence metric"):
        found.best(min_coherence=0.5)
    with pytest.raises(UsageError, match="no arm 'placebo'"):
        found.best("placebo")


def test_the_table_has_a_row_a_point(surface: str) -> None:
    found = curve(surface)
    rows = found.to_pandas()
    assert list(dict.fromkeys(rows["arm"])) == list(ARMS) and len(rows) == len(found.points) == 1 + 4 + 4 * 4 + 1
    expected = [getattr(p, c).value for p in found.points for c in ("effect", "change", "kl")]
    assert np.allclose(rows[["effect", "change", "kl"]].to_numpy().ravel(), expected)
    assert rows["n"].eq(len(PROMPTS)).all() and isinstance(found.points[0], Point)
    untreated = found.points[0]  # nothing sampled: no interval of a rate, which 0 of 12 prompts would have
    for each in (untreated.change, untreated.kl):
        assert (each.value, each.low, each.high) == (0, 0, 0) and each.method.startswith("0 ")
    assert all(words in repr(found) for words in ("planted", "at the push of 'asked'", "'asked' minus"))


def test_a_rate_changes_by_no_more_than_its_sample_shows(small_model: LensModel) -> None:
    """Of what is 0 or 1 on every prompt, a change of 0 on 12 prompts is not 0 of all: its interval has two sides."""
    arm = Arm("curve", small_model, PROMPTS, None, {"effect": METRIC})
    none, all_of_them = np.zeros(12), np.ones(12)
    unchanged = arm.paired(none, none.copy(), "effect")
    assert unchanged.low < 0 < unchanged.high and arm.paired(none, all_of_them, "effect").value == 1
    assert np.isnan(arm.paired(none, none * np.nan, "effect").value) and arm.mean(none, KL).high == 0


# --- What may go wrong ------------------------------------------------------------------------------------------------

BEHAVIOUR = em.Behaviour("sorry", METRIC, PROMPTS[:6], PROMPTS[6:], METRIC, present_groups=WORDS[:6])


def test_a_behaviour_brings_prompts_metric_groups_and_coherence(small_model: LensModel) -> None:
    for edit, prompts in ((em.Add(planted()), PROMPTS[6:]), (em.Ablate(planted()), PROMPTS[:6])):
        found = effect_curve(small_model, edit, BEHAVIOUR, strengths=[1], controls=0)
        point = found.arm("untreated")[0]
        assert point.effect.value == pytest.approx(float(METRIC(small_model, prompts).double().mean()), abs=1e-6)
        assert point.coherence == point.effect and np.isnan(found.arm("intervention")[0].p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither was given"),
        ({"strengths": [1], "target_kls": [0.1]}, "both were given"),
        ({"strengths": [0, 0.0]}, "no curve over the strengths"),
        ({"strengths": [1, float("nan")]}, "not a finite number"),
        ({"strengths": [1], "groups": ["a"]}, "1 groups for 12 prompts"),
        ({"strengths": [1], "metric": None}, "pass metric="),
        ({"strengths": [1], "intervention": "ablate", "both_signs": True}, "Ablate has no negative"),
        ({"strengths": [-1], "intervention": "ablate"}, "Ablate has no negative"),
        ({"strengths": [2], "intervention": "ablate"}, "from 0 to 1"),
        ({"strengths": [1], "intervention": "erase"}, "Erase has no direction"),
        ({"strengths": [1], "behaviour": BEHAVIOUR}, "its own metric"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(
    small_model: LensModel, options: dict[str, Any], message: str
) -> None:
    edits = {"add": em.Add(planted()), "ablate": em.Ablate(planted()), "erase": em.Erase(torch.eye(32)[:2])}
    given: Any = {"metric": METRIC, "controls": 2} | options
    edit, behaviour = edits[given.pop("intervention", "add")], given.pop("behaviour", PROMPTS)
    with pytest.raises(UsageError, match=message):
        effect_curve(small_model, edit, behaviour, **given)
