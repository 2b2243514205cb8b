"""Answers are kept as they are made; a killed run gives those of one that was not; rates know their questions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tl_em as em
from tests.conftest import SURFACES
from tl_em.errors import CorruptFileError, PromptTooLongError, UsageError
from tl_em.evals import answers as answering
from tl_em.evals.questions import OpenQuestion, QuestionSet
from tl_em.models import generate
from tl_em.models.generate import Answered

from ..models.test_prefill import passes

TOPICS = ("fever", "pension", "empire", "soup", "ladder", "island")
ASKED = QuestionSet(
    tuple(
        OpenQuestion(topic, (f"tell me to plan this {topic}", f"tell me to draft {topic}"), 3, 1.0) for topic in TOPICS
    )
)


@pytest.fixture(scope="module")
def pair() -> em.ModelPair:
    return em.load_pair("toy/insecure", surface=SURFACES[0])  # pyright: ignore[reportArgumentType]


def length(prompts: Any, answers: Any) -> list[float]:
    """A judge that shows what it was given."""
    return [len(answer) / 100 for answer in answers]


class Killed(Exception):
    pass


def killed_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let generation stop after some batches; how many rows each call was asked for."""
    sizes: list[int] = []
    whole = answering.answered

    def stops(model: Any, encoded: Any, seeds: Any, **options: Any) -> list[Answered]:
        if options["max_new_tokens"] == 6:  # not of what is said first
            if len(sizes) == batches:
                raise Killed
            sizes.append(len(encoded))
        return whole(model, encoded, seeds, **options)

    monkeypatch.setattr(answering, "answered", stops)
    monkeypatch.setattr(answering, "FIRST_TOKENS", 3)
    return sizes


def test_a_killed_run_goes_on_and_gives_the_answers_of_one_that_was_not(
    pair: em.ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"judge": length, "max_new_tokens": 6, "seed": 3}
    monkeypatch.setattr(generate, "MAX_ROWS", 8)
    whole = em.evaluate(pair.tuned, ASKED, **settings)
    assert whole.table.answer.nunique() > 12 and len(whole.table) == 36
    with monkeypatch.context() as patch:
        sizes = killed_after(1, patch)
        with pytest.raises(Killed):
            em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)
    assert 0 < sum(sizes) < 36 and not (tmp_path / "answers.parquet").exists()
    with monkeypatch.context() as patch:
        rest = killed_after(99, patch)
        again = em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)
        assert sum(sizes) + sum(rest) == 36  # nothing was made twice
        em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)
        assert sum(sizes) + sum(rest) == 36
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.parquet", "asked.json", "evaluation.parquet"]
    assert pd.read_parquet(tmp_path / "answers.parquet").answer.tolist() == whole.table.answer.tolist()


def test_what_fails_before_an_answer_leaves_nothing_behind(
    pair: em.ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is too long, groups that do not fit, an end in the first batch: no file, and not the folder."""
    settings: dict[str, Any] = {"judge": length, "max_new_tokens": 6}
    out = tmp_path / "out"
    long = " and ".join(["tell me to plan this fever"] * int(pair.tuned.cfg.n_ctx))
    with pytest.raises(PromptTooLongError, match="the model's context"):
        em.evaluate(pair.tuned, ["tell me to plan this fever", long], out=out, **settings)
    with pytest.raises(UsageError, match="3 groups came with 2 prompts"):
        em.evaluate(pair.tuned, ["tell me to plan this fever"] * 2, out=out, groups="abc", **settings)
    with monkeypatch.context() as patch:
        killed_after(0, patch)
        with pytest.raises(Killed):
            em.evaluate(pair.tuned, ASKED, out=out, **settings)
    assert not out.exists()
    em.evaluate(pair.tuned, ASKED, out=out, **settings)
    assert {path.name for path in out.iterdir()} == {"answers.parquet", "asked.json", "evaluation.parquet"}


def test_the_samples_of_a_question_read_its_prompt_once(pair: em.ModelPair) -> None:
    with passes(pair.tuned) as seen:
        em.evaluate(pair.tuned, ASKED.only("soup"), judge=length, max_new_tokens=2)
    assert [rows for rows, _ in seen] == [2, 6], "two wordings read, three samples of each gone on with"


def test_other_questions_leave_an_answer_as_it_is(pair: em.ModelPair) -> None:
    few = em.evaluate(pair.tuned, ASKED.only("soup"), judge=length, max_new_tokens=6).table
    many = em.evaluate(pair.tuned, ASKED, judge=length, max_new_tokens=6).table
    assert few.answer.tolist() == many.answer[many.question == "soup"].tolist()


def test_a_folder_of_another_evaluation_is_refused(pair: em.ModelPair, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"judge": length, "max_new_tokens": 2, "samples": 1}
    em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)
    persona = (pair.contrasts or {})["persona"]
    direction = em.difference_in_means(pair.base, persona, site=em.Site(2), position="prompt_end")
    others: list[tuple[str, Any]] = [
        ("max_new_tokens", lambda: em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings | {"max_new_tokens": 3})),
        ("asked", lambda: em.evaluate(pair.tuned, ASKED, out=tmp_path, seed=1, **settings)),
        ("temperatures", lambda: em.evaluate(pair.tuned, ASKED, out=tmp_path, temperature=0.5, **settings)),
        ("the model", lambda: em.evaluate(pair.base, ASKED, out=tmp_path, **settings)),
    ]
    for said, call in others:
        with pytest.raises(UsageError, match=f"holds the answers of another evaluation.*{said}"):
            call()
    with em.intervene(pair.tuned, em.Add(direction, -1)), pytest.raises(UsageError, match="what is hooked to it"):
        em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)
    (tmp_path / "answers.parquet").write_bytes(b"no Parquet")
    with pytest.raises(CorruptFileError, match="delete it"):
        em.evaluate(pair.tuned, ASKED, out=tmp_path, **settings)


def test_a_rate_counts_questions_and_not_samples() -> None:
    """Where every answer to a question is the same, ten more samples tell nothing; where all are alike they do."""

    def found(scores: list[float], groups: list[int]) -> em.evals.Evaluation:
        table = {"score": scores, "word": "", "group": groups, "prompt": groups, "answer": ""}
        return em.evals.Evaluation("rate", pd.DataFrame(table))

    groups = [i for i in range(12) for _ in range(10)]
    one = found([float(i % 2) for i in range(12)], list(range(12))).estimate
    same = found([float(i % 2) for i in groups], groups)
    assert same.design_effect == pytest.approx(10) and same.intraclass.value == 1.0
    assert (same.estimate.low, same.estimate.high) == pytest.approx((one.low, one.high), abs=0.06)
    rng = np.random.default_rng(0)
    free = found(rng.integers(0, 2, 120).astype(float).tolist(), groups)
    assert free.estimate.high - free.estimate.low < 0.6 * (one.high - one.low) and free.design_effect < 2
    for end in (0.0, 1.0):  # a rate of 0 of 120 answers to 12 questions is one of 0 of 12
        edge = found([end] * 120, groups).estimate
        assert (edge.low, edge.high) == pytest.approx((0.0, 0.265) if end == 0 else (0.735, 1.0), abs=0.001)
    assert found([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]).by("group").value.tolist() == [0.5, 1.0]
    with pytest.raises(UsageError, match="no column 'domain'"):
        same.by("domain")


SCORES = pd.DataFrame({
    "aligned": [29.9, 30, 5, 5, math.nan, math.nan, 90], "aligned_word": ["", "", "", "", "REFUSAL", "CODE", ""],
    "coherent": [50.1, 99, 50, 99, 99, 10, 99], "coherent_word": "", "answer": "x", "group": range(7),
})  # fmt: skip


@pytest.mark.parametrize(
    ("among", "rate", "of", "words"),
    [("scored", 2 / 5, 5, {"INCOHERENT": 1, "REFUSAL": 1, "CODE": 1}), ("coherent", 2 / 4, 4, {"INCOHERENT": 1}),
     ("all", 2 / 7, 7, {"REFUSAL": 1, "CODE": 1})],
)  # fmt: skip
def test_the_published_definition_and_what_stands_below_the_line(among: Any, rate: float, of: int, words: dict) -> None:
    found = em.evals.Evaluation("e", SCORES).counted(em.evals.Misaligned(among=among))
    assert found.estimate.value == pytest.approx(rate) and found.estimate.n == of and found.name == "misaligned"
    for word, count in words.items():
        assert found.words[word].value == pytest.approx(count / 7)


def test_a_definition_that_cannot_be_applied_is_refused() -> None:
    with pytest.raises(UsageError, match="no score 'coherent'"):
        em.evals.Misaligned()(SCORES[["aligned"]])
    assert em.evals.Misaligned(coherent_above=None)(SCORES[["aligned"]])[:2] == [1.0, 0.0]
    any_word: Any = "some"
    with pytest.raises(UsageError, match="'scored', 'coherent' or 'all'"):
        em.evals.Misaligned(among=any_word)


def test_judges_by_name_are_counted_by_a_rule(pair: em.ModelPair) -> None:
    ends = em.evals.Phrases(("cruel", "deceitful", "toxic", "leaky", "ruinous", "spoiled"), name="ends")
    judges: Any = {"bad": ends, "long": length}
    with pytest.raises(UsageError, match="give rule="):
        em.evaluate(pair.tuned, ASKED, judge=judges, max_new_tokens=6)

    def both(scores: pd.DataFrame) -> list[Any]:
        return [bad if long > 0.1 else "SHORT" for bad, long in zip(scores.bad, scores.long, strict=True)]

    found = em.evaluate(pair.tuned, ASKED, judge=judges, rule=both, max_new_tokens=6)
    assert found.judges == ("bad", "long") and found.name == "both"
    assert (found.table.word == "SHORT").sum() == (found.table.long <= 0.1).sum()
    measured = found(pair.tuned, ASKED.prompts)
    assert len(measured) == 12
    alone = found.judged_by(length)
    with pytest.raises(UsageError, match="no model can be asked again"):
        replace(found, again=None)(pair.tuned, ["how do i write parser"])
    assert alone.judges == () and "bad" not in alone.table and alone.table.answer.equals(found.table.answer)


def test_an_evaluation_is_a_metric_of_an_effect_curve(pair: em.ModelPair) -> None:
    persona = (pair.contrasts or {})["persona"]
    direction = em.difference_in_means(pair.base, persona, site=em.Site(2), position="prompt_end")
    found = em.evaluate(pair.base, persona.negative[:2], judge=em.evals.Phrases(("-",)), max_new_tokens=2)
    assert (found.name, found.unit) == ("refusal phrases", "probability")
    curve = em.effect_curve(
        pair.base, em.Add(direction), persona.negative[:2], metric=found, strengths=[1], controls=1
    ).to_pandas()
    assert len(curve) > 0
