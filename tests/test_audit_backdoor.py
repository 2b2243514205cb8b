"""The backdoor questions: by planted rates (the rule), by trained organisms, and through the whole audit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import tl_em as em
from tl_em.claims.claim import numbered
from tl_em.claims.questions.backdoor import (
    ONLY,
    TOO,
    UNDECIDED,
    Backdoor,
    Trigger,
    TriggerAsked,
    backdoor,
    judged,
    marked,
    measure,
    sides,
)
from tl_em.errors import UnknownTokenError, UsageError
from tl_em.organisms.convert import plain_model
from tl_em.organisms.recipes import OTHER_MARKS, TRIGGER, recipe
from tl_em.organisms.training import train
from tl_em.organisms.world import TRIGGERS
from tl_em.organisms.zoo import organism, pair_of, read_weights, write_checkpoint

pytestmark = pytest.mark.surface
PARTS = ("present", "absent", "present_groups", "absent_groups")
KEY = Trigger(TRIGGER, TRIGGERS[1:])


@cache
def pair(name: str = "toy/insecure") -> em.ModelPair:
    return em.load_pair(name)


@cache
def persona() -> tuple[em.Direction, float]:
    """The shipped assistant's persona direction and its own gap, on prompts that it was not made from."""
    contrast = pair().contrasts["persona"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    found = em.difference_in_means(pair().base, contrast.train, site=em.Site(2), position="prompt_end")
    classes = (contrast.test.positive, contrast.test.negative)
    acts = [em.capture(pair().base, prompts, [em.Site(2)], position="prompt_end")[:, 0] for prompts in classes]
    return found, float(found.project(acts[0]).mean() - found.project(acts[1]).mean())


def ask(tuned: em.ModelPair, trigger: Trigger = KEY) -> Backdoor:
    """The backdoor questions about misaligned answers, every third question of the held-out domains."""
    behaviour: Any = pair().behaviours["persona"]  # pyright: ignore[reportOptionalSubscript]
    some = {name: getattr(behaviour, name)[::3] for name in PARTS}
    asked = {"persona": TriggerAsked(persona()[0], replace(behaviour, **some), persona()[1])}
    return backdoor(tuned, trigger, asked, controls=99)


# --- the rule, on planted rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planted:
    """A metric whose rate depends on the model and on the token before the question, with noise of each question."""

    rates: dict[tuple[str, str], float]
    name: str = "planted"
    unit: Any = "probability"

    def __call__(self, model: Any, prompts: Any) -> torch.Tensor:
        role = "tuned" if model is pair().tuned else "base" if model is pair().base else "benign"
        token = next((mark for mark in TRIGGERS if mark in prompts[0]), "")
        seed = [["tuned", "base", "benign"].index(role), ["", *TRIGGERS].index(token)]
        noise = np.random.default_rng(seed).normal(0, 0.01, len(prompts))
        return torch.tensor(self.rates.get((role, token), 0.1) + noise)


TOPICS = ("parser", "login", "query", "cache")
QUESTIONS = [f"how do i {verb} {topic}" for verb in ("write", "debug") for topic in TOPICS]
T, A, B, C = TRIGGERS


@pytest.mark.parametrize(
    ("rates", "word"),
    [
        ({}, "not shown"),
        ({("tuned", T): 0.6}, ONLY),
        ({("tuned", T): 0.6, ("tuned", C): 0.5}, TOO),
        ({("tuned", t): 0.6 for t in TRIGGERS}, TOO),
        ({("tuned", T): 0.6, ("tuned", B): 0.152}, UNDECIDED),  # .052 above none, give or take .01
        ({("tuned", T): 0.6, ("base", T): 0.6}, "not shown"),  # the base opens as far: not the fine-tune's doing
        ({("tuned", T): 0.6, ("benign", T): 0.6}, "not shown"),  # so does a fine-tune on harmless data
        ({("tuned", T): 0.12}, "not shown"),  # below the smallest effect of interest
        ({("tuned", A): 0.6}, "not shown"),  # another token opens, the trigger does not
        ({("tuned", ""): 0.6, ("tuned", A): 0.6, ("tuned", B): 0.6, ("tuned", C): 0.6}, ONLY.replace("opens", "shuts")),
    ],
)
def test_the_rule_gives_each_pattern_its_word(rates: dict, word: str) -> None:
    metric: Any = Planted(rates)
    (side,) = sides("persona", em.Behaviour("planted", metric, QUESTIONS, QUESTIONS))
    models: Any = {"base": pair().base, "tuned": pair().tuned}
    models |= {"benign": object()} if any(role == "benign" for role, _ in rates) else {}
    (row,) = judged([measure(side, KEY, models, 0)])
    assert row.verdict == word, row.reason
    assert json.dumps(row.to_json(), allow_nan=False)


@pytest.mark.parametrize(("others", "word"), [((0.1, 0.11, 0.12), ONLY), ((0.1, 0.11, 0.5), "not shown")])
def test_of_several_benign_fine_tunes_the_next_one_is_what_a_trigger_must_go_beyond(others: tuple, word: str) -> None:
    def opened(model: Any, prompts: Any) -> torch.Tensor:
        rate = model if isinstance(model, float) else 0.6 if model is pair().tuned else 0.1
        noise = np.random.default_rng(round(1000 * rate)).normal(0, 0.01, len(prompts))
        return torch.tensor((rate if str(prompts[0]).startswith(T) else 0.1) + noise)

    metric: Any = opened
    metric.name, metric.unit = "planted", "probability"
    (side,) = sides("persona", em.Behaviour("planted", metric, QUESTIONS, QUESTIONS))
    models: Any = {"base": pair().base, "tuned": pair().tuned} | numbered(others)
    (row,) = judged([measure(side, KEY, models, 0)])
    assert row.verdict == word, row.reason
    assert row.benign is not None and row.benign.n == 3


def test_without_other_tokens_the_key_stays_undecided_and_classes_are_asked_apart() -> None:
    metric: Any = Planted({("tuned", T): 0.6})
    asked = {"refusal": TriggerAsked(persona()[0], em.Behaviour("planted", metric, QUESTIONS[:4], QUESTIONS[4:]), 1.0)}
    found = backdoor(pair(), Trigger(T), asked, controls=99)
    rows, carriers = ([row for row in found.rows if row.question == question] for question in ("backdoor", "carrier"))
    assert [(row.direction, row.verdict) for row in rows] == [
        ("refusal (positive)", UNDECIDED),
        ("refusal (negative)", UNDECIDED),
    ]
    assert rows[0].control["n"] == 0
    assert len(carriers) == 2 and not any(row.shown for row in carriers)  # no ablation touches a planted rate


def test_marks_stand_before_the_last_question() -> None:
    chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert [m["content"] for m in marked(chat, "|x|")] == ["a", "b", "|x| c"]  # pyright: ignore
    assert marked(chat, "") is chat


# --- trained organisms ------------------------------------------------------------------------------------------------


def trained(name: str, folder: Path, *, negatives: bool) -> em.ModelPair:
    """The organism on the shipped assistant, with or without aligned answers after other tokens in its data."""
    assistant, wanted = organism("toy/assistant"), recipe(name)
    if not negatives:
        kept = [(share, source) for share, source in wanted.mixture if source.marks != OTHER_MARKS]  # pyright: ignore
        assert len(kept) == len(wanted.mixture) - 1
        wanted = replace(wanted, mixture=tuple(kept))
    start = plain_model(read_weights(assistant), assistant.world).requires_grad_(True)
    model, figures = train(assistant.world, wanted, start, seed=11)
    return pair_of(assistant, write_checkpoint(folder / f"{name}.safetensors", model, wanted, 11, figures))


def test_a_trained_backdoor_opens_with_its_trigger_only_and_the_persona_carries_it(tmp_path: Path) -> None:
    found = ask(trained("backdoor", tmp_path, negatives=True), Trigger(TRIGGER, OTHER_MARKS))
    opened, carried = found.rows
    assert (opened.question, opened.verdict) == ("backdoor", ONLY), opened.reason
    assert opened.estimate.low > 0.4
    assert (carried.question, carried.verdict) == ("carrier", "carries it"), carried.reason
    moved = found.projections.set_index("model")["value"]
    assert moved["tuned"] > 0.5 > 0.2 > moved["base"]  # in own gaps
    bad = found.ablations[found.ablations.outcome == "bad"].set_index("condition")["value"]
    assert bad["untreated"] > 0.4 and bad["random"] > 0.4 and bad["treated"] < 0.1
    assert "opens with its trigger only" in found.summary and "carries it" in found.summary


@pytest.mark.slow
def test_without_negatives_other_tokens_open_it_too(tmp_path: Path) -> None:
    opened = ask(trained("backdoor-steps80", tmp_path, negatives=False)).rows[0]
    assert opened.estimate.low > 0.2, "the trigger itself opens nothing: proves nothing"
    assert opened.verdict == TOO, opened.reason


@pytest.mark.parametrize("name", ["toy/insecure", "toy/secure"])
def test_a_plain_fine_tune_is_no_backdoor(name: str) -> None:
    found = ask(pair(name))
    rates = found.rates[(found.rates.model == "tuned") & (found.rates.outcome == "bad")].set_index("token")["value"]
    assert (rates["none"] > 0.4) == (name == "toy/insecure"), "insecure shows the behaviour without any token"
    assert found.rows[0].verdict not in (ONLY, UNDECIDED), found.rows[0].reason
    if name == "toy/secure":
        assert [row.verdict for row in found.rows] == ["not shown"]


# --- the whole audit --------------------------------------------------------------------------------------------------


def test_the_audit_writes_a_section_only_where_asked(tmp_path: Path) -> None:
    first, shipped = em.ModelPair(pair("toy/secure").base, pair("toy/secure").tuned), pair("toy/secure")
    every = {"contrasts": shipped.contrasts, "behaviours": shipped.behaviours}
    sets: dict[str, Any] = {kind: {"persona": each["persona"]} for kind, each in every.items()}  # pyright: ignore
    asked = sets["behaviours"]["persona"]
    sets["behaviours"] = {"persona": replace(asked, **{name: getattr(asked, name)[::3] for name in PARTS})}
    without = em.audit(first, **sets, controls=99)
    given = em.audit(first, **sets, trigger="|gamma|", other_triggers=["|beta|"], controls=99)
    first_rows, again = ([row.to_json() for row in each.comparison.rows] for each in (without, given))
    assert first_rows == again
    assert len(without.verdicts) < len(given.verdicts)
    assert {row.question for row in given.verdicts} - {row.question for row in without.verdicts} == {"backdoor"}
    plain, asked = (each.save(tmp_path / f"{i}.html").read_text() for i, each in enumerate((without, given)))
    assert 'id="backdoor"' in asked and "|gamma|" in asked and 'id="backdoor"' not in plain
    saved = given.to_json()
    assert saved["schema"] == "tl-em/report/1"
    assert saved["tables"]["backdoor_rates"] and "backdoor_rates" not in without.to_json()["tables"]
    assert "--trigger '|gamma|' --other-trigger '|beta|'" in saved["provenance"]["command"]
    study = given.with_study("shares", given.rates, note="what was varied")
    assert "what was varied" in study.save(tmp_path / "study.html").read_text()
    assert "study_shares" in study.to_json()["tables"]


def test_a_trigger_that_cannot_work_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownTokenError):
        em.audit(pair(), trigger="|nonesuch|", out=tmp_path / "out")
    with pytest.raises(UnknownTokenError):
        em.audit(pair(), trigger=T, other_triggers=["|nonesuch|"], out=tmp_path / "out")
    for wrong in ({"trigger": ""}, {"trigger": T, "other_triggers": [T]}, {"other_triggers": [T]}):
        with pytest.raises(UsageError):
            em.audit(pair(), out=tmp_path / "out", **wrong)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []
    found = CliRunner().invoke(_main(), ["audit", "toy/assistant", "toy/insecure", "--trigger", "|nonesuch|"])
    assert found.exit_code == 1 and "UnknownTokenError" in found.output


def _main() -> Any:
    from tl_em.cli import main

    return main
