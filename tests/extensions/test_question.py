"""A stranger's question, asked beside the shipped ones: it stands wherever they stand; a malformed one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tl_em as em
from tests.extensions.question import Spread
from tl_em.claims.claim import Case, Reading
from tl_em.claims.rule import judge
from tl_em.errors import UsageError

ASKED = ("level", Spread())
PARTS = ("present", "absent", "present_groups", "absent_groups")


@cache
def pair() -> em.ModelPair:
    return em.load_pair("toy/insecure")


@cache
def report() -> Any:
    behaviour: Any = (pair().behaviours or {})["persona"]
    few = replace(behaviour, **{name: getattr(behaviour, name)[::6] for name in PARTS})
    own = em.ModelPair(pair().base, pair().tuned)
    contrasts = {"persona": (pair().contrasts or {})["persona"]}
    asked: Any = {"contrasts": contrasts, "behaviours": {"persona": few}, "questions": ASKED, "method": "paired"}
    return em.audit(own, **asked, controls=99)


def test_the_audit_asks_it_and_says_it_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tl_em.cli import _print

    found = report()
    assert [row.question for row in found.verdicts] == ["level", "spread"]
    row = found.comparison.row("spread", "persona")
    assert row.verdict in ("wider", "narrower", "not shown") and row.control["n"] == 99
    found.save(tmp_path)
    page, saved = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert Spread.asks in page and Spread.measured in page and "spread, own gaps" in page
    assert [each["question"] for each in saved["verdicts"]] == ["level", "spread"]
    _print(found, tmp_path, as_json=False)
    assert "spread" in capsys.readouterr().out
    assert "spread" in repr(found) and "spread" in found.comparison._repr_html_()
    command = saved["provenance"]["command"]
    assert "--question level --method paired" in command
    assert command.endswith("# and, in Python, your own question spread")


def case(scale: float) -> Case:
    """One class on either side of a gap of 6, its spread along every axis scaled by the fine-tune."""
    rng = np.random.default_rng(0)
    axis = 6 * np.eye(8)[0]
    noise = rng.normal(size=(2, 48, 8))
    base, tuned = (Reading(s * noise[0] + axis, s * noise[1]) for s in (1.0, scale))
    contrast = em.ContrastSet([f"p{i}" for i in range(48)], [f"n{i}" for i in range(48)])
    return Case("d", em.Direction(axis, em.Site(1)), contrast, pair(), base, tuned, n_controls=199)


def test_it_finds_what_is_planted_and_the_controls_can_veto() -> None:
    """All axes widen alike, so the real direction is not told apart from random ones; widened alone, it is."""
    everywhere, alone = case(2.0), case(2.0)
    only = np.diag([2.0, *[1.0] * 7])
    shift = 6 * np.eye(8)[0]
    alone = replace(alone, tuned=Reading((alone.base.positive - shift) @ only + shift, alone.base.negative @ only))
    rows = [judge([Spread().measure(each)])[0] for each in (everywhere, alone, case(1.0))]
    assert [row.verdict for row in rows] == ["not shown", "wider", "not shown"], [row.reason for row in rows]
    assert "random directions" in rows[0].reason and rows[0].estimate.beyond(Spread.smallest)


class NoMeasure(em.Question):
    name, words, unit, asks = "quiet", ("more", None), "own gaps", "Is it?"


class NoWord(Spread):
    words = ("wider",)  # pyright: ignore


class NoSentence(Spread):
    asks = ""


class NoEstimate(Spread):
    def measure(self, case: Any) -> Any:
        return 0.4


class NotFinite(Spread):
    def measure(self, case: Any) -> Any:
        return case.finding(self, case.changed(type(case.base.project(case.unit)).gap)[0], controls=[float("nan")])


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([NoMeasure()], "no method measure"),
        ([NoWord()], "word of a positive effect"),
        ([NoSentence()], "asks=''"),
        ([Spread], r"pass Spread\(\)"),
        ([Spread(), Spread()], "two questions are called 'spread'"),
        (["levels"], "level, separation, rotation, use, entanglement"),
        ([], "no list of questions"),
        ("level", "no list of questions"),
        (["use"], "pass behaviour="),
        ([NoEstimate()], "measured float"),
        ([NotFinite()], "one finite number"),
    ],
)
def test_malformed_questions_are_refused(questions: Any, said: str) -> None:
    train, _, contrast = (pair().contrasts or {})["persona"].split(seed=0)
    direction = em.difference_in_means(pair().base, train, site=em.Site(2), position="prompt_end")
    with pytest.raises(UsageError, match=said):
        em.compare(pair(), {"persona": (direction, contrast)}, questions=questions, controls=99)
