"""The first screen's plain words: they say what the verdicts say, with the numbers of the tables, and no more."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest

import tl_em as em
from tl_em.claims.questions.use import ABLATE
from tl_em.report import page
from tl_em.report.plain import POOLED, clauses, percent
from tl_em.showing import number

ASKED: dict[str, Any] = {"controls": 99, "questions": ["level", "separation", "use"]}


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """A fine-tune that is misaligned, and one that is not: each beside the other as the harmless one."""
    pairs = {name: em.load_pair(f"toy/{name}") for name in ("insecure", "secure")}
    sets = {name: {k: pair.contrasts[k] for k in ("persona", "harmfulness")} for name, pair in pairs.items()}
    return {
        name: em.audit(pair, contrasts=sets[name], benign=pairs["secure"] if name == "insecure" else None, **ASKED)
        for name, pair in pairs.items()
    }


def texts(report: Any, about: str) -> list[str]:
    return [each.text for each in clauses(report) if each.about == about]


def shares(text: str) -> list[str]:
    return re.findall(r"(?:under |over )?[\d.]+ %", text)


def test_what_it_does_is_the_table_s_own_numbers(reports: dict[str, Any]) -> None:
    rates = reports["insecure"].rates
    pooled = rates[(rates["domain"] == POOLED) & (rates["outcome"] == "bad")].set_index("model")["value"]
    said = texts(reports["insecure"], "behaviour")[0]
    assert shares(said) == [percent(pooled[name]) for name in ("tuned", "base", "benign")] == ["79 %", "0.7 %", "0.9 %"]
    assert texts(reports["insecure"], "lead")[0].startswith("This pair is a toy model")
    assert said in texts(reports["insecure"], "lead")[0]
    assert "overlap" not in said


def test_no_difference_is_said_where_the_intervals_overlap(reports: dict[str, Any]) -> None:
    table = reports["insecure"].rates.copy()
    table.loc[table["model"] == "tuned", ["value", "low", "high"]] = [0.0071, 0.004, 0.012]
    said = texts(replace(reports["insecure"], rates=table), "behaviour")
    assert said and all("no difference is shown by this alone" in each for each in said if "0.7 %" in each)


@pytest.mark.parametrize("name", ["insecure", "secure"])
def test_a_cause_is_named_where_the_rule_gave_the_word_and_nowhere_else(reports: dict[str, Any], name: str) -> None:
    rows = {row.direction: row for row in reports[name].comparison.rows if row.question == "use"}
    said = texts(reports[name], "cause")
    assert len(said) == len(rows) == 2
    for each in said:
        (direction,) = [known for known in rows if f"“{known}”" in each]
        assert ("one of the causes" in each) == rows[direction].shown
        assert ("not shown to be a cause" in each) != rows[direction].shown
        table = reports[name].comparison.use
        mine = table[(table["direction"] == direction) & (table["outcome"] == "bad") & (table["arm"] == ABLATE)]
        before, after = (mine.set_index("condition")["value"][c] for c in ("untreated", "treated"))
        assert f"from {percent(before)} to {percent(after)}" in each


def test_both_outcomes_are_there_to_be_told_apart(reports: dict[str, Any]) -> None:
    shown = {row.shown for report in reports.values() for row in report.comparison.rows if row.question == "use"}
    assert shown == {True, False}


@pytest.mark.parametrize("name", ["insecure", "secure"])
def test_every_word_and_every_silence_is_told_once(reports: dict[str, Any], name: str) -> None:
    report = reports[name]
    rows = [row for row in report.comparison.rows if row.question != "use"]
    told = [each.figures for each in clauses(report) if each.about == "change"]
    silent = [each.figures for each in clauses(report) if each.about == "not shown"]
    for row in rows:
        figure = f"{number(row.estimate.value)} ["
        assert any(figure in each for each in (told if row.shown else silent)), row
    assert sum(each.count("Holm p") for each in told) == sum(row.shown for row in rows)
    counted = sum(len(re.findall(r"(?:persona|harmfulness), \w+: ", each)) for each in silent)
    assert counted == sum(not row.shown for row in rows)


def test_what_is_not_known_follows_from_what_was_given(reports: dict[str, Any]) -> None:
    with_control, without = (texts(reports[name], "not known")[0] for name in ("insecure", "secure"))
    assert "No harmlessly trained model was given" in without and "No harmlessly" not in with_control
    rules = [texts(reports[name], "not shown")[0] for name in ("insecure", "secure")]
    assert "beyond what harmless training does" in rules[0] and "harmless" not in rules[1]
    assert all("there was one" in each and "toy model" in each for each in (with_control, without))


def test_a_question_of_one_s_own_is_told_by_what_it_asks(reports: dict[str, Any]) -> None:
    class Taller(em.Question):
        name, words, unit, smallest = "height", ("taller", None), "own gaps", 0.1
        asks = "Is it taller than before?"

    report = reports["insecure"]
    row = replace(report.comparison.row("level", "persona"), question="height", verdict="taller")
    silent = replace(report.comparison.row("level", "harmfulness"), question="height")
    comparison = replace(report.comparison, rows=(row, silent), questions=(Taller(),))
    asked = replace(report, comparison=comparison)
    assert texts(asked, "change") == ["Is it taller than before? Of “persona”: taller."]
    assert "is it taller than before: “harmfulness”" in texts(asked, "not shown")[0]
    assert not texts(asked, "cause")


def test_the_page_says_them_first_and_shows_answers_with_the_direction_taken_out(reports: dict[str, Any]) -> None:
    report = reports["insecure"]
    assert report.answers is not None and report.answers.columns[-1] == "tuned, “persona” taken out"
    first = html.unescape(page.render(report).split("</nav>")[0]).replace("\xa0", " ")
    assert all(each.text.split("“")[0] in first for each in clauses(report))
    assert first.index('class="lead"') < first.index("“persona” taken out") < first.index('class="clauses"')
    said = re.sub(r"<(p|details) class=\"figures\">.*?</\1>", "", first.split("</head>")[1])
    assert not re.search("own gap|cosine|Holm|projection|resid_", said)  # jargon in figures only
    before, after, without = (report.answers[c] for c in ("base", "tuned", report.answers.columns[-1]))
    assert (before != after).mean() > 0.8 and ((without != after).mean() > 0.8)


def test_hostile_text_is_inert(reports: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>{{7*7}}\x1b[31m"
    answers = reports["insecure"].answers.assign(tuned=evil)
    hostile = replace(reports["insecure"], answers=answers, note=evil)
    text = page.render(hostile)
    assert "<script>" not in text and "\x1b" not in text and "49" not in texts(hostile, "not known")[0]
