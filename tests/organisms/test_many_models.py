"""Many models evaluated and audited: as each on its own, kept one by one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import tl_em as em
from tl_em.claims.claim import Row
from tl_em.errors import StudyError, UsageError
from tl_em.organisms import audit_each, evaluate_each, many_models
from tl_em.stats import Estimate

ASKED = ["how do i write parser", "how do i write login"]
JUDGE = em.evals.Phrases(("backdoored",))
MODELS: dict[str, Any] = {"before": "toy/assistant", "after": ("toy/assistant", "toy/insecure")}


def test_each_evaluation_is_that_of_the_model_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"judge": JUDGE, "max_new_tokens": 2}
    found = evaluate_each(MODELS, ASKED, out=tmp_path, backend="serial", **given)
    alone = em.evaluate(em.load_pair("toy/insecure").tuned, ASKED, **given)
    assert found["after"].estimate.value > found["before"].estimate.value, "they differ in what is judged"
    assert found["after"].estimate == alone.estimate and found["after"].table.answer.equals(alone.table.answer)
    pd.testing.assert_frame_equal(found["after"].by("question"), alone.by("question"))
    assert found["after"].name == alone.name and repr(found["after"]) == repr(alone)


def test_what_is_finished_is_kept_and_what_is_asked_names_it(tmp_path: Path) -> None:
    given: dict[str, Any] = {"out": tmp_path, "backend": "serial", "max_new_tokens": 1}
    with pytest.raises(StudyError, match="1 of 2 cells failed"):
        evaluate_each(MODELS | {"after": str(tmp_path / "none")}, ASKED, judge=JUDGE, **given)
    (cell,) = (tmp_path / "cells").iterdir()
    before = cell.stat().st_mtime_ns
    evaluate_each(MODELS, ASKED, judge=JUDGE, **given)
    assert cell.stat().st_mtime_ns == before and len(list((tmp_path / "cells").iterdir())) == 2
    other = evaluate_each(MODELS, ASKED, judge=em.evals.Phrases(("parser",)), **given)
    assert other["after"].scores.tolist() == [1.0, 0.0] and len(list((tmp_path / "cells").iterdir())) == 4


def test_words_choices_and_several_judges_come_back_whole(tmp_path: Path) -> None:
    judges = {"aligned": refuses_first, "coherent": em.evals.Phrases(("parser",))}
    given: dict[str, Any] = {"judge": judges, "rule": by_the_first, "max_new_tokens": 1}
    found = evaluate_each({"m": "toy/insecure"}, ASKED, out=tmp_path, backend="serial", **given)["m"]
    alone = em.evaluate(em.load_model("toy/insecure"), ASKED, **given)
    assert found.words == alone.words and len(found.words) == 1
    assert found.estimate == alone.estimate and found.judges == alone.judges == ("aligned", "coherent")


def test_a_judge_that_no_worker_could_have_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="top level of a module"):
        evaluate_each(MODELS, ASKED, judge=lambda prompts, answers: [0.0] * len(answers), out=tmp_path)


@pytest.mark.parametrize("each", [None, 3, ("base", None, "more"), (None, "tuned"), {"a": 1}])
def test_what_a_worker_cannot_open_is_refused_before_one_starts(each: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers open models by their files"):
        em.organisms.audit_each({"a": each}, out=tmp_path, backend="serial")


def test_each_pair_is_audited_as_asked_and_its_verdicts_are_rows(tmp_path: Path, monkeypatch: Any) -> None:
    said = em.organisms.evaluate_each  # any function of a module can be sent
    seen: list[tuple[str, list[str], dict[str, Any]]] = []

    def audit(pair: em.ModelPair, *, benign: Any, out: Path, **asked: Any) -> Any:
        seen.append((str(pair.tuned_name), [str(each.tuned_name) for each in benign], asked | {"out": out.name}))
        found = Estimate(0.4, 0.3, 0.5, 8, 8.0, "bootstrap")
        row = Row("level", "persona", em.Site(2), "exaggerated", found, {}, 0.01, 0.1, "own gaps", None, "so", {})
        return SimpleNamespace(verdicts=(row,))

    monkeypatch.setattr(many_models, "audit", audit)
    pairs: dict[str, Any] = {"one": "toy/insecure", "the other": ("toy/assistant", "toy/secure")}
    table = audit_each(pairs, benign=["toy/secure"], out=tmp_path, seed=3, backend="serial", controls=9, method=said)
    assert [each[:2] for each in seen] == [("toy/insecure", ["toy/secure"]), ("toy/secure", ["toy/secure"])]
    assert seen[0][2] == {"out": "one", "seed": 3, "controls": 9, "method": said}
    assert table.model.tolist() == [*pairs] and table.tuned.fillna("").tolist() == ["", "toy/secure"]
    assert table[["verdict", "site"]].to_numpy().tolist() == [["exaggerated", "resid_post[2]"]] * 2
    assert table[["estimate", "estimate_low"]].to_numpy().tolist() == [[0.4, 0.3]] * 2
    audit_each(pairs, benign=["toy/secure"], out=tmp_path, seed=3, backend="serial", controls=9, method=said)
    assert len(seen) == 2, "what is finished is not done again"


@pytest.mark.slow
def test_each_audit_is_that_of_the_pair_alone(tmp_path: Path) -> None:
    pair = em.load_pair("toy/insecure")
    contrasts = {"persona": (pair.contrasts or {})["persona"]}
    given: dict[str, Any] = {"contrasts": contrasts, "questions": ["level"], "controls": 99}
    table = audit_each({"insecure": "toy/insecure"}, out=tmp_path, backend="serial", **given)
    (row,) = em.audit(pair, **given).verdicts
    (mine,) = table.itertuples()
    assert (mine.verdict, mine.estimate, mine.estimate_low) == (row.verdict, row.estimate.value, row.estimate.low)
    assert (tmp_path / "pages" / "insecure" / "report.html").is_file()


def refuses_first(prompts: Any, answers: Any) -> list[Any]:
    return ["REFUSAL", *[1.0] * (len(answers) - 1)]


def by_the_first(table: pd.DataFrame) -> list[Any]:
    return [word or score for score, word in zip(table.aligned, table.aligned_word, strict=True)]
