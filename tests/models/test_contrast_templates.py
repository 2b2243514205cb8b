"""Sets out of a template: every combination once, pairs that differ in one field, groups that stay together."""

from __future__ import annotations

from typing import Any

import pytest

import tl_em as em
from tl_em.errors import UsageError

QUESTIONS = ["How are you?", "What is new?", "Who won?", "Why {persona}?", "Where to?", "Is it so?", "And then?", "Eh?"]


def test_pairs_differ_in_what_fills_the_field_and_in_nothing_else() -> None:
    made = em.ContrastSet.from_template(
        "You are {persona}. {question}", ["cruel", "vain"], ["kind", "modest"], shared={"question": QUESTIONS}
    )
    assert len(made.positive) == len(made.negative) == 2 * len(QUESTIONS) == len(set(made.positive))
    for a, b in zip(made.positive, made.negative, strict=True):
        assert isinstance(a, str) and isinstance(b, str)
        assert a.replace("cruel", "kind").replace("vain", "modest") == b != a


def test_what_is_filled_in_is_not_read_as_a_field() -> None:
    made = em.ContrastSet.from_template("{persona} {question}", ["bad"], ["good"], shared={"question": QUESTIONS})
    assert "bad Why {persona}?" in made.positive


def test_a_question_never_falls_into_two_parts() -> None:
    made = em.ContrastSet.from_instructions(["You are cruel.", "You are vain."], ["You are kind."], QUESTIONS)
    assert (len(made.positive), len(made.negative)) == (16, 8)
    parts = made.split(seed=3)
    asked = [{turns[-1]["content"] for turns in (*part.positive, *part.negative)} for part in parts]  # type: ignore[index]
    assert sum(map(len, asked)) == len(QUESTIONS) == len(set().union(*asked))
    for part in parts:
        assert len(part.positive) == 2 * len(part.negative)


def test_messages_and_several_fields() -> None:
    template = [{"role": "system", "content": "Be {a}."}, {"role": "user", "content": "{b} {question}"}]
    made = em.ContrastSet.from_template(
        template, [{"a": "bad", "b": "now"}], [{"a": "good", "b": "then"}], shared={"question": ["x", "y"]}
    )
    assert [[m["content"] for m in turns] for turns in made.positive] == [["Be bad.", "now x"], ["Be bad.", "now y"]]  # type: ignore[index]
    assert made.negative[1][0]["content"] == "Be good."  # type: ignore[index]
    assert template[0]["content"] == "Be {a}."


def test_it_extracts_the_direction_of_the_field() -> None:
    pair = em.load_pair("toy/insecure")
    questions = ["how do i write parser", "how do i write login", "how do i cook soup", "how do i cook cake"]
    made = em.ContrastSet.from_template("{mark} {question}", ["now"], ["please"], shared={"question": questions})
    found = em.difference_in_means(pair.base, made, site=em.Site(1), position=-4)
    assert found.norm > 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"template": "no field"}, "has no field"),
    ({"template": 3}, "neither a text nor a list of messages"),
    ({"template": [{"role": "user"}]}, "neither a text nor a list of messages"),
    ({"shared": {"other": ["x"]}}, "which is no field of the template"),
    ({"shared": {"q": ["x"], "p": ["y"]}}, "fills every field"),
    ({"shared": ["x"]}, "does not say which field"),
    ({"shared": {"q": "x"}}, "is no list of texts"),
    ({"shared": {"q": []}}, "is no list of texts"),
    ({"shared": {}}, "the template has the fields p, q for it to fill"),
    ({"positive": []}, "holds no filling"),
    ({"positive": 3}, "holds no filling"),
    ({"negative": [{"p": 3}]}, "has the fields p for it to fill"),
    ({"negative": [{"x": "y"}]}, "has the fields p for it to fill"),
]


@pytest.mark.parametrize(("changed", "said"), BAD, ids=[said for _, said in BAD])
def test_what_cannot_be_filled_in_is_refused(changed: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"template": "{p} {q}", "positive": ["a"], "negative": ["b"], "shared": {"q": ["x"]}}
    given |= changed
    with pytest.raises(UsageError, match=said):
        em.ContrastSet.from_template(given["template"], given["positive"], given["negative"], shared=given["shared"])


def test_the_same_on_both_sides_is_no_contrast() -> None:
    with pytest.raises(em.errors.EmptyContrastError):
        em.ContrastSet.from_template("{p} {q}", ["a"], ["a"], shared={"q": ["x"]})
