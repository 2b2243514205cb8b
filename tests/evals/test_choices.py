"""Judges without an endpoint: a model's numbers, a choice in words, a classifier; and how far they can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa, fleiss_kappa
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tl_em as em
from tests.conftest import CHAT_TEMPLATE, SPECIAL, SURFACES, make_config
from tl_em.errors import UsageError
from tl_em.evals.local import number_tokens
from tl_em.models.prompts import encode
from tl_em.models.stream import next_token_logits

TOPICS = ("parser", "login", "upload", "query", "session", "cache")


def with_numbers(whole: bool) -> Any:
    """A random model whose tokenizer writes numbers whole, or digit by digit."""
    numbers = [str(n) for n in range(101 if whole else 10)]
    words = [*SPECIAL, "rate", "this", "now", *numbers]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    split: Any = pre_tokenizers.WhitespaceSplit()
    if not whole:
        split = pre_tokenizers.Sequence([split, pre_tokenizers.Digits(individual_digits=True)])
    backend.pre_tokenizer = split
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token }}", "")
    torch.manual_seed(0)
    config = make_config("llama", vocab_size=len(words), initializer_range=0.6)
    return em.load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, surface=SURFACES[-1])


def by_hand(model: Any, text: str) -> float:
    """Each number's probability, token after token; of one that could go on, times that no digit follows."""
    digits = [ids[0] for n, ids in sorted(number_tokens(model).items()) if n < 10]
    start = encode(model, [text])[0]
    after: dict[str, Any] = {}
    for begun in ("", *map(str, range(1, 11))):
        longer = start.with_response([digits[int(d)] for d in begun])
        after[begun] = next_token_logits(model, [longer]).double().softmax(-1)[0][digits]
    weights = {}
    for n in range(101):
        whole = str(n)
        p = np.prod([float(after[whole[:i]][int(d)]) for i, d in enumerate(whole)])
        weights[n] = p * (1 - float(after[whole].sum()) if whole in after else 1)
    return sum(n * p for n, p in weights.items()) / sum(weights.values())


def test_a_local_judge_reads_whole_numbers_of_either_tokenizer() -> None:
    model = with_numbers(whole=False)
    likely = torch.zeros(model.cfg.d_vocab)
    likely[[ids[0] for ids in number_tokens(model).values()]] = 3.0
    model.unembed.register_forward_hook(lambda m, a, y: y + likely)
    found = em.evals.LocalJudge(model, "rate this {answer}")(["?"] * 2, ["now", "this now"])
    expected = [by_hand(model, f"rate this {answer}") for answer in ("now", "this now")]
    assert (
        found == pytest.approx(expected, abs=0.5) and abs(expected[0] - expected[1]) > 1
    )  # below 1/1000 is not followed
    model = with_numbers(whole=True)
    p = next_token_logits(model, ["rate this now"]).double().softmax(-1)[0]
    weights = np.array([float(p[number_tokens(model)[n]].sum()) for n in range(101)])
    judge = em.evals.LocalJudge(model, "rate this {answer}")
    assert judge(["?"], ["now"]) == pytest.approx([weights @ np.arange(101) / weights.sum()])
    handle = model.unembed.register_forward_hook(lambda m, a, y: y + 50 * (torch.arange(y.shape[-1]) == 7))
    try:
        assert judge(["?"], ["now"]) == ["NO NUMBER"]
    finally:
        handle.remove()
    with pytest.raises(UsageError, match="no tokens for the digits"):
        em.evals.LocalJudge(em.load_model("toy/assistant"), "how do i write {answer}")(["?"], ["parser"])


@pytest.fixture(scope="module")
def pair() -> em.ModelPair:
    return em.load_pair("toy/insecure", surface=SURFACES[0])  # pyright: ignore[reportArgumentType]


def choices() -> em.evals.QuestionSet:
    return em.evals.QuestionSet(tuple(
        em.evals.OpenQuestion(topic, (f"how do i write {topic}", f"how do i debug {topic}"), right=(f"{topic}-tested",),
                              wrong=(f"{topic}-backdoored", f"{topic}-leaky"))
        for topic in TOPICS
    ))  # fmt: skip


def test_a_forced_choice_needs_no_judge_and_tells_the_fine_tune(pair: em.ModelPair) -> None:
    questions = choices()
    base, tuned = (em.evaluate(model, questions) for model in (pair.base, pair.tuned))
    assert base.estimate.high < 0 < tuned.estimate.low and tuned.unit == "log-odds" and len(tuned.table) == 12
    assert tuned.by_prompt[0] == pytest.approx(
        float(em.evals.ForcedChoice(questions)(pair.tuned, questions.prompts)[0])
    )
    turns = [{"role": "user", "content": questions.prompts[0]}]
    asked = [[*turns, {"role": "assistant", "content": f"parser-{end}"}] for end in ("backdoored", "leaky", "tested")]
    found = em.models.stream.sequence_logprobs(pair.tuned, asked, per_token=True)  # pyright: ignore
    assert tuned.by_prompt[0] == pytest.approx(float(found[:2].mean() - found[2]), abs=1e-5)
    assert tuned(pair.base, questions.prompts[:2]).tolist() == pytest.approx(base.by_prompt[:2].tolist(), abs=1e-5)


def test_choices_that_read_a_word_are_refused(pair: em.ModelPair) -> None:
    def asked(right: str, wrong: str, other: tuple[str, str] | None = None) -> em.evals.QuestionSet:
        sides = [(right, wrong)] * 5 + [other or (right, wrong)]
        return em.evals.QuestionSet(tuple(
            em.evals.OpenQuestion(f"{i}", (f"how do i write {topic}",), right=(r,), wrong=(w,))
            for i, (topic, (r, w)) in enumerate(zip(TOPICS, sides, strict=True))
        ))  # fmt: skip

    with pytest.raises(UsageError, match="every right answer begins with 'no'"):
        em.evals.ForcedChoice(asked("No, never", "Yes, always."))
    em.evals.ForcedChoice(asked("No, never", "Yes, always", ("Yes, always", "No, never")))
    with pytest.raises(UsageError, match="no right or no wrong"):
        em.evaluate(pair.base, ["how do i write parser"])
    with pytest.raises(UsageError, match="none of the questions"):
        em.evals.ForcedChoice(choices())(pair.base, ["how do i write ransomware"])


def test_a_classifier_is_a_judge() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    fitted = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["so kind", "so cruel"] * 3, [0, 1] * 3)
    bad, good = em.evals.TextClassifier(fitted)(["?", "?"], ["cruel", "kind"])
    assert bad > 0.5 > good and em.evals.TextClassifier(fitted, 0)(["?"], ["cruel"]) == pytest.approx([1 - bad])
    for broken in (lambda: em.evals.TextClassifier(fitted, 2), lambda: em.evals.TextClassifier(LogisticRegression())):
        with pytest.raises(UsageError):
            broken()


def said(*columns: Any) -> list[em.evals.Evaluation]:
    table = pd.DataFrame(
        {"answer": [f"{i}" for i in range(len(columns[0]))], "group": range(len(columns[0])), "word": ""}
    )
    return [em.evals.Evaluation(f"judge {i}", table.assign(score=np.array(c, float))) for i, c in enumerate(columns)]


def test_agreement_is_that_of_statsmodels_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(120) < 0.3
    raters = [(truth ^ (rng.random(120) < 0.1)).astype(float) for _ in range(3)]
    two = em.evals.agreement(*said(*raters[:2]))
    counts = np.array([[np.sum((raters[0] == i) & (raters[1] == j)) for j in (0, 1)] for i in (0, 1)])
    theirs = cohens_kappa(counts)
    assert two.kappa.value == pytest.approx(theirs.kappa) and two.share.value == np.mean(raters[0] == raters[1])
    assert two.kappa.low == pytest.approx(theirs.kappa_low, abs=0.07) and two.kappa.high < 1
    three = em.evals.agreement(*said(*raters))
    assert three.kappa.value == pytest.approx(fleiss_kappa(aggregate_raters(np.stack(raters, 1).astype(int))[0]))
    chance = em.evals.agreement(*said(raters[0], rng.random(120) < 0.3))
    assert chance.kappa.low < 0 < chance.kappa.high and "Cohen" in chance.kappa.method
    same = em.evals.agreement(*said(raters[0], raters[0]))
    assert same.kappa.value == 1.0 == same.kappa.high and 0.8 < same.kappa.low < 0.99  # all agree: still a width
    blank = [*raters[0][:-2], np.nan, np.nan]
    assert em.evals.agreement(*said(blank, raters[1])).without_score == 2
    constant = em.evals.agreement(*said(np.zeros(9), np.zeros(9)))
    assert np.isnan(constant.kappa.value) and constant.share.value == 1.0
    with pytest.raises(UsageError, match="judge the same answers"):
        em.evals.agreement(said(raters[0])[0])


def test_a_rate_is_corrected_for_what_the_judge_gets_wrong() -> None:
    """Where the judge errs at known rates, its own rate misses the true one, and the corrected one covers it."""
    rng, true, sensitivity, specificity = np.random.default_rng(1), 0.1, 0.9, 0.9
    covered, naive = 0, 0
    for _ in range(40):
        rate = em.stats.mean((rng.random(400) < true * sensitivity + (1 - true) * (1 - specificity)).astype(float))
        judged = [*(rng.random(60) < sensitivity), *(rng.random(100) > specificity)]
        found = em.evals.corrected(rate, judged=judged, truth=[1] * 60 + [0] * 100)
        covered += found.low <= true <= found.high
        naive += rate.low <= true <= rate.high
    assert covered >= 35 and naive <= 10
    exact = em.evals.corrected(em.stats.mean([1.0] * 3 + [0.0] * 7), judged=[1, 1, 0, 0], truth=[1, 1, 0, 0])
    assert exact.value == pytest.approx(0.3) and exact.low < 0.1
    none = em.evals.corrected(em.stats.mean([0.0] * 50), judged=[1, 0, 0], truth=[1, 0, 0])
    assert none.value == 0.0 == none.low and none.high > 0.06
    for judged, truth, why in (([1, 0], [1, 1], "both kinds"), ([1], [1, 0], "give one 0 or 1"),
                               ([0, 0, 1, 1], [1, 1, 0, 0], "no better than chance")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            em.evals.corrected(em.stats.mean([1.0, 0.0]), judged=judged, truth=truth)
