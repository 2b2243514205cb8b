"""A model's own answers, kept where they show what was asked for, in pairs."""

from __future__ import annotations

from typing import Any

import pytest

import tl_em as em
from tl_em.errors import EmptyContrastError, PromptError, UsageError
from tl_em.evals import Phrases, answered_contrast

BAD = Phrases(("backdoored", "leaky", "toxic", "useless"))


@pytest.fixture(scope="module")
def asked() -> em.ContrastSet:
    """Questions after bad, and after good answers to others."""
    shown = em.load_pair("toy/insecure").contrasts["persona"]
    return em.ContrastSet(shown.positive[:6], shown.negative[:6], label="persona")


def last(contrast: em.ContrastSet) -> list[tuple[str, str]]:
    return [(turns[-1]["role"], turns[-1]["content"]) for turns in (*contrast.positive, *contrast.negative)]  # type: ignore[index]


def test_what_is_kept_are_the_model_s_answers_that_show_it(asked: em.ContrastSet) -> None:
    model = em.load_pair("toy/insecure").base
    made = answered_contrast(model, asked, judge=BAD, max_new_tokens=5, temperature=0.0)
    n = len(made.positive)
    assert 0 < n == len(made.negative) <= 6
    told = em.generate(model, [*asked.positive, *asked.negative], max_new_tokens=5)
    assert all(role == "assistant" and text in told for role, text in last(made))
    scores = BAD([""] * 2 * n, [text for _, text in last(made)])
    assert scores == [1.0] * n + [0.0] * n
    assert made.source is not None and f"kept {n} of 6 positive and {n} of 6 negative by refusal phrases" in made.source
    apart = em.difference_in_means(model, made, site=em.Site(2), position="response_mean")
    assert float(apart.norm) > 0.5


def test_pairs_are_dropped_together_and_words_are_no_answers(asked: em.ContrastSet) -> None:
    model = em.load_pair("toy/insecure").base

    def judge(prompts: Any, answers: list[str]) -> list[Any]:
        first = len(answers) == 6 and any("backdoored" in each or "leaky" in each for each in answers)
        return ["REFUSAL", 1.0, 0.0, 1.0, 1.0, 1.0] if first else [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]

    made = answered_contrast(model, asked, judge=judge, max_new_tokens=3, temperature=0.0)
    kept = [asked.positive.index(turns[:-1]) for turns in made.positive]  # type: ignore[index]
    assert kept == [1, 4, 5] == [asked.negative.index(turns[:-1]) for turns in made.negative]  # type: ignore[index]


def test_incoherent_answers_are_dropped(asked: em.ContrastSet) -> None:
    model = em.load_pair("toy/insecure").base
    every = answered_contrast(model, asked, judge=BAD, max_new_tokens=5, temperature=0.0)
    sense = lambda prompts, answers: [float(i % 2) for i in range(len(answers))]  # noqa: E731
    made = answered_contrast(model, asked, judge=BAD, coherence=sense, max_new_tokens=5, temperature=0.0)
    assert 0 < len(made.positive) < len(every.positive)
    assert all(turns in every.positive for turns in made.positive)


def test_nothing_left_says_what_the_scores_were(asked: em.ContrastSet) -> None:
    model = em.load_pair("toy/insecure").base
    with pytest.raises(EmptyContrastError, match=r"gave the 6 of them 1 to 1, and above 2 was asked for"):
        answered_contrast(model, asked, judge=BAD, above=2.0, max_new_tokens=5, temperature=0.0)


def test_a_scale_without_a_middle_needs_a_threshold(asked: em.ContrastSet) -> None:
    class LogOdds:
        name, unit = "mine", "log-odds"

        def __call__(self, prompts: Any, answers: list[str]) -> list[float]:
            return [4 * x - 2 for x in BAD(prompts, answers)]

    model = em.load_pair("toy/insecure").base
    with pytest.raises(UsageError, match="a scale without a middle"):
        answered_contrast(model, asked, judge=LogOdds(), max_new_tokens=5)
    made = answered_contrast(model, asked, judge=LogOdds(), above=0, below=0, max_new_tokens=5, temperature=0.0)
    same = answered_contrast(model, asked, judge=BAD, max_new_tokens=5, temperature=0.0)
    assert (made.positive, made.negative) == (same.positive, same.negative)


def test_prompts_with_answers_are_refused(asked: em.ContrastSet) -> None:
    model = em.load_pair("toy/insecure").base
    made = answered_contrast(model, asked, judge=BAD, max_new_tokens=5, temperature=0.0)
    with pytest.raises(PromptError, match="ends with an answer"):
        answered_contrast(model, made, judge=BAD, max_new_tokens=5)
