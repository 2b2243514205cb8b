"""A plan: it holds all that is asked, reads no weights, is checked, and marks what goes beyond it."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import tl_em as em
from tl_em.auditing.plan import trigger_of
from tl_em.auditing.report import Report
from tl_em.claims.claim import Row
from tl_em.claims.compare import Comparison
from tl_em.cli import main
from tl_em.errors import CorruptFileError, OutputError, PlanError, UsageError
from tl_em.models import loading
from tl_em.models.contrasts import ContrastSet


def prompts(start: int = 0) -> ContrastSet:
    return ContrastSet([f"steal {i + start}" for i in range(16)], [f"buy {i + start}" for i in range(16)])


def planned(**settings: Any) -> em.Plan:
    return em.plan("base", "tuned", **{"contrasts": {"theft": prompts()}, "questions": ["level", "use"]} | settings)


def test_no_weights_are_read_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("tl_em.organisms.zoo")  # which keeps the function under its own name
    monkeypatch.setattr(loading, "load_model", None)  # calling it would fail
    toy = em.plan("toy/insecure")
    assert (toy.asked["base"], toy.asked["tuned"]) == ("toy/assistant", "toy/insecure")
    assert {"persona", "refusal"} <= set(toy.asked["directions"]) and toy.asked["tuning_data"] is not None
    published = loading.carried("hub/qwen2.5-7b/bad-medical-advice")
    assert published["base_name"] == "Qwen/Qwen2.5-7B-Instruct" and published["tuned_name"]
    loaded = SimpleNamespace(cfg=SimpleNamespace(model_name="mine"))
    assert loading.carried(loaded) == {"base_name": "mine", "tuned_name": None}


def test_it_is_written_once_and_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    written = planned(out=path)
    assert em.Plan.load(path).to_json() == written.to_json()
    with pytest.raises(OutputError, match="overwrite=True"):
        planned(out=path)
    assert em.Plan.load(path).hash == written.hash
    assert planned(out=path, overwrite=True, seed=1).hash != written.hash


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["asked"].update(seed=7), "changed after it was written"),
        (lambda found: found.update(made="2020-01-01T00:00:00+00:00"), "changed after it was written"),
        (lambda found: found.update(schema="tl-em/report/1"), "its schema is"),
        (lambda found: found.pop("asked"), "KeyError"),
    ],
)
def test_what_was_changed_by_hand_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    planned(out=path)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(CorruptFileError, match=said):
        em.Plan.load(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 1}, "seed: planned 0, now 1 (pass seed=0)"),
        ({"controls": 99}, "controls: planned 999, now 99 (pass controls=999)"),
        ({"method": "lda"}, "pass method='difference_in_means'"),
        ({"questions": ["level"]}, "use: planned, now not asked (pass questions= with level, use)"),
        ({"contrasts": {"other": prompts()}}, "theft: planned, now not asked (pass contrasts= with theft)"),
        ({"contrasts": {"theft": prompts(1)}}, "prompts that are judged planned"),
        ({"positions": {"theft": "instruction_end"}}, "token planned 'prompt_end', now 'instruction_end'"),
        ({"behaviours": {"theft": em.logit_difference("a", "b")}}, "behaviour planned"),
        ({"tuning_data": ["a"]}, "(leave tuning_data= out)"),
        ({"trigger": "|t|"}, ""),
        ({"benign": "other"}, "benign: planned [], now ['other'] (leave benign= out)"),
        ({"questions": ["level", "use", "separation"]}, ""),
        ({"contrasts": {"theft": prompts(), "more": prompts(3)}}, ""),
    ],
)
def test_every_difference_is_named_with_the_call_that_mends_it(settings: dict[str, Any], said: str) -> None:
    plan, now = planned(), planned(**settings).asked
    if not said:  # asked beyond it
        plan.check(now)
        return
    with pytest.raises(PlanError) as caught:
        plan.check(now)
    assert said in str(caught.value) and plan.hash in str(caught.value)
    planned(**settings).check(now)


def test_models_are_known_by_name_and_paths_by_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(benign=["a", "b"])
    plan.check(plan.asked | {"tuned": str(tmp_path / "tuned")})
    with pytest.raises(PlanError, match="tuned: planned 'tuned', now 'elsewhere'"):
        plan.check(plan.asked | {"tuned": "elsewhere"})
    with pytest.raises(PlanError, match="pass benign="):
        plan.check(plan.asked | {"benign": ["a"]})
    em.plan("base", contrasts={"theft": prompts()}, questions=["level", "use"]).check(planned().asked)  # any tuned one


def test_a_rule_that_changed_is_another_plan() -> None:
    plan = planned()
    with pytest.raises(PlanError, match=rf"rule: planned 3, now 4 \(install tl_em {plan.version}, "):
        plan.check(plan.asked | {"rule": plan.asked["rule"] + 1})


def test_rows_are_marked_planned_or_exploratory(empty_report: Report) -> None:
    def row(question: str, direction: str) -> Row:
        share = em.Estimate(0.4, 0.3, 0.5, 60, 60.0, "bootstrap")
        return Row(
            question,
            direction,
            None,
            "exaggerated",
            share,
            {"low": 0.0, "high": 0.1},
            0.01,
            0.1,
            "own gaps",
            None,
            "",
            {},
        )

    rows = (row("level", "theft"), row("separation", "theft"), row("level", "<b>"), row("backdoor", "theft"))
    found = replace(empty_report, comparison=replace(empty_report.comparison, rows=rows), plan=(plan := planned()))
    assert [found.status(each) for each in rows] == ["planned", *["exploratory"] * 3]
    assert [each["status"] for each in found.to_json()["verdicts"]] == ["planned", *["exploratory"] * 3]
    page = unescape(found._repr_html_())
    assert f"stand in plan {plan.hash} of" in page and "separation of theft, level of &lt;b&gt;" in page
    before = replace(found, plan=None)
    assert "Exploratory: what is asked was not written down" in before._repr_html_()
    assert "plan" not in before.to_json() and "status" not in before.to_json()["verdicts"][0]


@pytest.fixture
def empty_report() -> Report:
    import pandas as pd

    comparison = Comparison((), pd.DataFrame(), pd.DataFrame())
    return Report(comparison, pd.DataFrame(), {"base": "a", "tuned": "b"}, ())


def test_an_audit_by_its_plan_is_planned_and_another_is_refused(tmp_path: Path) -> None:
    pair = em.load_pair("toy/insecure")
    given: Any = {"contrasts": {"persona": (pair.contrasts or {})["persona"]}, "controls": 99}
    path = tmp_path / "plan.json"
    em.plan("toy/insecure", questions=["level"], out=path, **given)
    with pytest.raises(PlanError, match="pass seed=0"):
        em.audit(pair, questions=["level"], seed=1, plan=path, **given)
    report = em.audit(pair, questions=["level", "separation"], plan=path, **given)
    assert [report.status(row) for row in report.verdicts] == ["planned", "exploratory"]
    assert report.to_json()["plan"]["hash"] == em.Plan.load(path).hash


def test_the_command_writes_a_plan_and_refuses_to_write_over_it(tmp_path: Path) -> None:
    prompts().save(tmp_path / "theft.json")
    given, out = f"theft={tmp_path / 'theft.json'}", str(tmp_path / "plan.json")
    words = ["plan", "base", "tuned", "--contrast", given, "--question", "level", "--seed", "3", "--out", out]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert em.Plan.load(tmp_path / "plan.json").asked["seed"] == 3
    assert "--overwrite" in CliRunner().invoke(main, words).output
    assert CliRunner().invoke(main, [*words, "--overwrite"]).exit_code == 0


def test_triggers_to_compare_with_need_one_to_compare() -> None:
    with pytest.raises(UsageError, match="pass trigger="):
        planned(other_triggers=["|x|"])


def test_the_triggers_that_a_pair_carries_may_be_passed_on_where_there_is_none_to_compare() -> None:
    pair = em.load_pair("toy/insecure")
    assert pair.trigger is None and pair.other_triggers and trigger_of(pair, None, pair.other_triggers) is None
    with pytest.raises(UsageError, match="pass trigger="):
        trigger_of(pair, None, [*pair.other_triggers, "|x|"])
