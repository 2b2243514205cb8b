"""What of a contrast set may be mistaken for its concept is found, and nothing where there is nothing."""

from __future__ import annotations

import html
import json
import random
import warnings

import pytest

from tl_em.errors import NuisanceWarning, UnknownTokenError
from tl_em.models.contrasts import ContrastSet
from tl_em.models.lint import Lint, warn_of_nuisance
from tl_em.models.loading import load_pair

WORDS = [f"w{i}" for i in range(40)]


def drawn(n: int, seed: int, words: list[str] = WORDS, length: int = 6) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=length)) for _ in range(n)]


def told(found: Lint) -> list[str]:
    return [fault.what for fault in found.faults]


def test_classes_of_one_kind_are_not_told_apart() -> None:
    for seed in range(5):
        found = ContrastSet(drawn(40, seed), drawn(40, 100 + seed)).lint()
        assert told(found) == [] and not found.confounds["told_apart"].any()
        assert repr(found) == "Lint(None: nothing found)"


def test_each_confound_is_found_and_named() -> None:
    plain, other = drawn(40, 1), drawn(40, 2)
    longer = told(ContrastSet(drawn(40, 1, length=9), other).lint())
    assert "length" in longer and not {"first", "last"} & set(longer)
    first = ContrastSet([f"tell {p}" for p in plain], [f"ask {p}" for p in other]).lint()
    assert "first" in told(first) and "last" not in told(first)
    assert "'tell' 40 : 0" in first.faults[0].found and "AUROC 1.00" in first.faults[0].found
    assert "last" in told(ContrastSet([f"{p} girl" for p in plain], [f"{p} boy" for p in other]).lint())


def test_a_difference_in_topic_only_is_said() -> None:
    """Same lengths, openings and ends; lengths alone were looked at before."""
    garden, kitchen = (drawn(40, k, [f"{name}{i}" for i in range(60)], 4) for k, name in enumerate(("seed", "pan")))
    found = ContrastSet([f"say {p} now" for p in garden], [f"say {p} now" for p in kitchen]).lint()
    assert told(found) == ["words"]
    assert "topic only" in found.faults[0].found and "judged=" in found.faults[0].mend


def test_words_that_only_stand_in_one_group_each_tell_nothing_of_held_out_groups() -> None:
    topics = [f"topic{i // 4}" for i in range(80)]
    prompts = [f"{topic} {filler}" for topic, filler in zip(topics, drawn(80, 3, length=2), strict=True)]
    found = ContrastSet(prompts[:40], prompts[40:], positive_groups=topics[:40], negative_groups=topics[40:]).lint()
    assert "words" not in told(found)
    bare = found.confounds.set_index("property").loc["words"]
    assert 0.2 < bare["value"] < 0.8 and bare["low"] < 0.5 < bare["high"]


def test_near_equal_prompts_groups_too_fine_and_leaks_are_reported() -> None:
    plain, other = drawn(20, 1), drawn(20, 2)
    twice = ContrastSet([*plain, plain[0]], [*other, other[3]])
    found = twice.lint()
    assert told(found) == ["near-equal"] and "42 prompts count as" in found.faults[0].found
    assert found.duplicates["similarity"].iloc[0] == 1
    fine = ContrastSet(twice.positive, twice.negative, positive_groups=range(21), negative_groups=range(21, 42))
    (fault,) = fine.lint().faults
    assert fault.what == "groups" and fault.mend == "contrast.grouped(join=True)"
    assert told(fine.grouped(join=True).lint()) == []
    test = ContrastSet(drawn(10, 5), [*drawn(10, 6), other[0]])
    leaking = test.lint(
        apart_from={"train": ContrastSet(plain, other), "select": ContrastSet(drawn(9, 7), drawn(9, 8))}
    )
    assert [f.what for f in leaking.faults] == ["leak"] and "1 prompts are near-equal to some of train" in repr(leaking)
    assert list(leaking.leaks["of"]) == ["train"]


def test_a_prompt_in_both_classes_is_an_error_of_the_set() -> None:
    plain, other = drawn(20, 1), drawn(20, 2)
    found = ContrastSet(plain, [*other, plain[4]]).lint()
    assert "in both classes" in told(found) and "1 prompts stand in both classes" in repr(found)


def test_a_lint_is_written_and_shown() -> None:
    found = ContrastSet(["<b>tell w1", "tell w2"] * 10, ["ask w3", "ask w4"] * 10, label="<i>").lint()
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["faults"][0]["mend"] and len(plain["confounds"]) == 5
    assert list(found.to_pandas().columns) == ["what", "found", "mend"]
    shown, lines = found._repr_html_(), str(found).splitlines()
    assert "<b>" not in shown and "<i>" not in shown
    assert lines[0] == repr(found) and len(lines) == 1 + len(found.faults)
    for fault, line in zip(found.faults, lines[1:], strict=True):
        assert line.endswith(f"Mend: {fault.mend}") and html.escape(fault.mend) in shown


def test_what_a_model_cannot_read_is_no_clean_set() -> None:
    """Every differing word was `<unk>` in its tokens, so nothing was told apart."""
    pair = load_pair("toy/insecure")
    ask = [f"how do i write {topic}" for topic in ("parser", "regex")] * 8
    with pytest.raises(UnknownTokenError, match="'zork'"):
        ContrastSet([f"zork {p}" for p in ask], [f"blip {p}" for p in ask]).lint(pair.base)


def test_no_mend_hides_what_was_found_or_leads_to_an_error() -> None:
    rest = [f"{p}." for p in drawn(20, 1, length=3)]
    said = ContrastSet.from_template("be {mood}. {text}", ["furious"], ["calm"], shared={"text": rest}).lint()
    assert told(said) == ["words", "template"]
    assert all(fault.mend.startswith("where these words are not the concept itself") for fault in said.faults)
    plain, other, runs = drawn(12, 1), drawn(12, 2), ["first"] * 12 + ["second"] * 12
    (fault,) = ContrastSet(plain * 2, other * 2, positive_groups=runs, negative_groups=runs).lint().faults
    assert "too few to split" in fault.found and fault.mend.startswith("em.ContrastSet(contrast.positive")
    assert len(ContrastSet(plain * 2, other * 2).grouped().split().test.positive) > 1


def test_classes_that_differ_in_length_are_warned_about_and_others_are_not() -> None:
    contrast = ContrastSet(drawn(12, 1), drawn(9, 2))
    with pytest.warns(NuisanceWarning, match=r"in 100% of all pairs .* of the length"):
        warn_of_nuisance(contrast, [[9] * 12, [7] * 9])
    with pytest.warns(NuisanceWarning, match="in 0% of all pairs"):
        warn_of_nuisance(contrast, [[7] * 12, [9] * 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_nuisance(contrast, [[7, 9] * 6, [7, 9, 7] * 3])
        warn_of_nuisance(contrast, [[9, 9], [7, 7]])  # too few to tell
