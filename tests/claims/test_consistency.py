"""Several fine-tunes: shifts that are the same and shifts that are not, bases told apart, words counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import tl_em as em
from tl_em.claims.claim import Row
from tl_em.claims.consistency import Run, consistency, same_weights, shift_cosines
from tl_em.errors import PairMismatchError

pytestmark = pytest.mark.surface
PARTS = ("present", "absent", "present_groups", "absent_groups")


@cache
def pair(name: str = "toy/insecure") -> em.ModelPair:
    return em.load_pair(name)


def row(question: Any, verdict: str) -> Row:
    e = em.Estimate(0.4, 0.3, 0.5, 8, 8.0, "bootstrap")
    return Row(question, "persona", em.Site(2), verdict, e, {}, 0.01, 0.1, "own gaps", None, "", {})


def run(name: str, model: Any, *, same_base: bool = True, words: tuple[str, str] = ("exaggerated", "causal")) -> Run:
    rows = tuple(row(question, word) for question, word in zip(("level", "use"), words, strict=True))
    return Run(name, em.ModelPair(pair().base, model), same_base, rows)


@cache
def other_insecure() -> Any:
    """A second fine-tune on the same kind of data with another seed: the same shift, and noise of its own."""
    return nudged(pair().tuned, 0.002)


def nudged(model: Any, scale: float) -> Any:
    found, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return found


def asked() -> tuple[em.Direction, em.Behaviour]:
    contrast = pair().contrasts["persona"].split(seed=0).train  # pyright: ignore[reportOptionalSubscript]
    direction = em.difference_in_means(pair().base, contrast, site=em.Site(2), position="prompt_end")
    return direction, pair().behaviours["persona"]  # pyright: ignore[reportOptionalSubscript]


def test_the_same_change_reaches_its_ceiling_and_another_does_not() -> None:
    runs = [run("a", pair().tuned), run("b", other_insecure()), run("random", nudged(pair().base, 0.02))]
    found = shift_cosines(runs, *asked(), controls=99)
    same, other = found["a", "b"], found["a", "random"]
    assert same.shown
    assert same.estimate.value > 0.95 * same.ceiling  # the noise that was added moves the shift by a few per cent
    assert other.estimate.value < 0.5 < other.ceiling  # a shift of its own, as well measured
    assert found["b", "a"] is same


def test_rates_spread_over_runs_and_words_are_counted() -> None:
    runs = [
        run("a", pair().tuned),
        run("b", other_insecure(), words=("exaggerated", "not shown")),
        run("c", pair("toy/secure").tuned, same_base=False),
    ]
    found = consistency(runs, {"persona": asked()}, controls=99)
    spread = found.spread.set_index("over").loc["all bases"]
    assert (spread["n"], found.spread.set_index("over").loc["this base", "n"]) == (3, 2)
    assert spread["least"] < 0.1 < 0.4 < spread["most"]
    assert spread["least"] < spread["mean"] < spread["most"]
    assert spread["sd"] == pytest.approx(found.rates["value"].std())
    table = found.verdicts.set_index("question")
    assert (table.loc["level", "repeats"], table.loc["use", "repeats"]) == (2, 1)
    assert set(table["of"]) == {2}
    assert "1 of the first one's 2 words" in found.summary


def test_coordinates_of_another_base_are_never_compared() -> None:
    runs = [run("a", pair().tuned), run("b", other_insecure())]
    runs.append(run("elsewhere", pair("toy/secure").tuned, same_base=False))
    found = consistency(runs, {"persona": asked()}, controls=99)
    assert set(found.rates["run"]) == {"a", "b", "elsewhere"}, "its rates are"
    assert set(found.shifts["run"]) == {"a", "b"}
    assert "elsewhere" not in {*found.cosines["first"], *found.cosines["second"]}
    along = found.shifts.set_index("run")
    assert (along["low"] > along["control_high"]).all()  # both moved along the persona further than random directions


def test_bases_are_told_apart_by_their_weights() -> None:
    assert same_weights(pair().base, em.load_pair("toy/secure").base)  # two copies of one assistant
    assert not same_weights(pair().base, pair().tuned)
    assert not same_weights(pair().base, nudged(pair().base, 1e-4))


def test_a_replicate_of_another_shape_is_refused(make_model: Any, surface: str) -> None:
    with pytest.raises(PairMismatchError):
        em.audit(pair(), replicates=[make_model("gpt2", surface)], controls=99)


def some_questions(behaviour: Any) -> Any:
    """Every third question, which is enough for what is asked here and a third of the work."""
    return replace(behaviour, **{name: getattr(behaviour, name)[::3] for name in PARTS})


@pytest.mark.slow
def test_the_audit_puts_fine_tunes_side_by_side() -> None:
    first = em.ModelPair(pair().base, pair().tuned)  # without the record, whose rates and data cost more
    every = {"contrasts": pair().contrasts, "behaviours": pair().behaviours}
    sets: dict[str, Any] = {kind: {"persona": each["persona"]} for kind, each in every.items()}  # pyright: ignore
    sets["behaviours"]["persona"] = some_questions(sets["behaviours"]["persona"])
    elsewhere = em.ModelPair(nudged(first.base, 1e-3), nudged(first.tuned, 1e-3), tuned_name="elsewhere")
    report = em.audit(first, **sets, replicates=[other_insecure(), elsewhere], controls=99)
    found = report.consistency
    assert found is not None
    assert list(found.spread["n"]) == [2, 3]
    assert set(found.rates.loc[~found.rates["same_base"], "run"]) == {"elsewhere"}
    level = found.verdicts.set_index("question").loc["level"]
    assert (level["verdict"], level["repeats"], level["of"]) == ("exaggerated", 2, 2)
    page = report._repr_html_()
    assert "Other fine-tunes" in page and "elsewhere" in page
    assert "consistency_spread" in report.to_json()["tables"]
    assert not any("over training seeds" in limit for limit in report.limits)
