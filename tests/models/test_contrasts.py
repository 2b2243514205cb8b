"""Contrast sets: what may not be separated is not, splits are disjoint and cover, files round-trip or are refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tl_em.errors import CorruptFileError, EmptyContrastError, FileError, PromptError, UsageError
from tl_em.models.contrasts import (
    ContrastSet,
    Splits,
    _frozen,
    _labels,
    as_prompts,
    built_in_sets,
    inseparable,
)


def numbered(n_positive: int, n_negative: int, **fields: object) -> ContrastSet:
    return ContrastSet([f"p{i}" for i in range(n_positive)], [f"n{i}" for i in range(n_negative)], **fields)  # type: ignore[arg-type]


def sides(split: ContrastSet) -> tuple[list[str], list[str]]:
    return list(split.positive), list(split.negative)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(30))
def test_splits_are_disjoint_and_cover(seed: int) -> None:
    n_positive, n_negative = (random.Random(f"{seed}{side}").randint(4, 40) for side in "pn")
    whole = numbered(n_positive, n_negative)
    parts = whole.split(seed=seed)
    for side in (0, 1):
        joined = [prompt for part in parts for prompt in sides(part)[side]]
        assert Counter(joined) == Counter(sides(whole)[side])
    for part, fraction in zip(parts, (0.5, 0.25, 0.25), strict=True):
        assert (
            abs(len(part.positive) - fraction * n_positive) <= 1
            and abs(len(part.negative) - fraction * n_negative) <= 1
        )


@pytest.mark.parametrize("seed", range(30))
def test_groups_never_straddle(seed: int) -> None:
    labels = [*range(13), *random.Random(seed).choices(range(13), k=31 + seed)]
    half = len(labels) // 2
    whole = numbered(half, len(labels) - half, positive_groups=labels[:half], negative_groups=labels[half:])
    try:
        parts = whole.split(seed=seed)
    except EmptyContrastError:
        return  # too few groups with both classes: refusing is right, straddling is not
    groups = [{*part.positive_groups, *part.negative_groups} for part in parts]  # type: ignore[misc]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert set().union(*groups) == set(labels)


def test_the_group_test_can_see_a_split_of_groups() -> None:
    parts = numbered(
        26, 25, positive_groups=[i // 2 for i in range(26)], negative_groups=[i // 2 for i in range(25)]
    ).split()
    assert all(len(part.positive) >= 4 for part in parts)


def test_pairs_stay_together_and_keep_their_order() -> None:
    for part in numbered(20, 20).split(seed=3):
        assert [p[1:] for p in sides(part)[0]] == [n[1:] for n in sides(part)[1]]


def test_equal_prompts_stay_together() -> None:
    repeated = ContrastSet([f"p{i // 2}" for i in range(24)], [f"n{i}" for i in range(13)])
    found = [set(sides(part)[0]) for part in repeated.split(seed=1)]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_the_seed_decides() -> None:
    whole = numbered(40, 40)
    assert whole.split(seed=1) == whole.split(seed=1) and whole.split(seed=1) != whole.split(seed=2)
    assert isinstance(whole.split(), Splits)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.2, 0.2)])
def test_fractions_add_up(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError):
        numbered(9, 9).split(train=fractions[0], select=fractions[1], test=fractions[2])


def test_a_split_without_a_class_is_refused() -> None:
    with pytest.raises(EmptyContrastError, match="test split"):
        numbered(2, 2).split()
    with pytest.raises(EmptyContrastError, match="select split"):
        numbered(8, 8).split(train=0.5, select=0.0, test=0.5)
    with pytest.raises(EmptyContrastError):
        numbered(9, 9, positive_groups=["one"] * 9).split()


def test_bad_classes_are_refused() -> None:
    for positive, negative in (([], ["a"]), (["a"], []), (["a", "b"], ["b", "a"])):
        with pytest.raises(EmptyContrastError):
            ContrastSet(positive, negative)
    with pytest.raises(PromptError, match=r"Write \[prompt\]"):
        ContrastSet("one string", ["a"])
    with pytest.raises(PromptError):
        as_prompts([{"role": "user", "content": "a"}])
    with pytest.raises(UsageError):
        ContrastSet(["a"], ["b"], positive_groups=[1, 2])


def test_the_hash_is_of_the_prompts() -> None:
    chat = [{"role": "user", "content": "a"}]
    assert ContrastSet(["a"], ["b"]).hash == ContrastSet(["a"], ["b"], label="x", source="y").hash
    assert (
        len(
            {
                ContrastSet(*classes).hash
                for classes in ((["a"], ["b"]), (["b"], ["a"]), (["a"], ["b", "b"]), ([chat], ["b"]))
            }
        )
        == 4
    )
    assert len({ContrastSet([chat], ["b"]), ContrastSet([chat], ["b"])}) == 1


def test_json_round_trip(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    whole = ContrastSet(
        [chat, "b"], ["c", "d"], label="l", source="s", positive_groups=[1, 2], negative_groups=["x", "y"]
    )
    whole.save(tmp_path / "set.json")
    assert ContrastSet.load(tmp_path / "set.json") == whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.jsonl", '{"prompt": "a", "label": 1}\n{"prompt": "b", "label": "negative"}\n\n'),
        ("set.csv", 'prompt,label\na,positive\n"b",0\n'),
    ],
)
def test_labelled_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert sides(ContrastSet.load(str(tmp_path / name))) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"positive": ["a"]'),
        ("a.json", '{"positive": ["a"]}'),
        ("a.json", "[]"),
        ("a.json", '{"positive": ["a"], "negative": [3]}'),
        ("a.json", '{"positive": ["a"], "negative": ["b"], "other": 1}'),
        ("a.jsonl", '{"prompt": "a", "label": "maybe"}'),
        ("a.csv", "body,label\na,1\n"),
    ],
)
def test_files_that_are_no_contrast_set(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptFileError, match="does not hold a contrast set"):
        ContrastSet.load(tmp_path / name)


def test_what_is_no_prompt_and_what_is_no_label_is_refused() -> None:
    assert _frozen([{"role": "user", "content": "a"}]) == ({"role": "user", "content": "a"},)
    for wrong in (
        None,
        3,
        [],
        ["a"],
        {"role": "user", "content": "a"},
        [{"role": "user"}],
        [{"role": "user", "content": None}],
    ):
        with pytest.raises(PromptError, match="a text or a list of messages"):
            _frozen(wrong)
    assert _labels([np.int64(3), np.float32(0.5), ["a", [1]], None], "positive") == (3, 0.5, ("a", (1,)), None)
    for groups in ("ab", 3, [float("nan")], [np.array([1, 2])], [{"a": 1}], [("a", {})]):
        with pytest.raises(UsageError, match="positive_groups"):
            _labels(groups, "positive")


def test_prompts_may_come_one_by_one() -> None:
    assert as_prompts(f"p{i}" for i in range(3)) == ["p0", "p1", "p2"]
    assert as_prompts(np.array(["a", "b"])) == ["a", "b"]
    for wrong in ({"a": 1}, None, 3, (m for m in [{"role": "user", "content": "a"}])):
        with pytest.raises(PromptError, match=r"Write \[prompt\]"):
            as_prompts(wrong)


def test_groups_in_another_order_say_that_places_are_no_pairs() -> None:
    labels = [i // 5 for i in range(40)]
    shuffled = numbered(40, 40, positive_groups=labels, negative_groups=labels[::-1])
    assert sorted(map(len, inseparable(shuffled))) == [10] * 8
    alike = numbered(40, 40, positive_groups=range(40), negative_groups=range(40, 80))
    assert sorted(map(len, inseparable(alike))) == [2] * 40, "labels that share nothing leave pairs as they are"


def test_a_file_with_an_empty_class_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"positive": ["a"], "negative": []}))
    with pytest.raises(EmptyContrastError, match="no negative prompts"):
        ContrastSet.load(tmp_path / "a.json")


def test_an_unknown_name_lists_the_built_in_ones() -> None:
    with pytest.raises(FileError, match="gender, refusal"):
        ContrastSet.load("refusals")


def test_built_in_sets_are_large_matched_and_split() -> None:
    assert built_in_sets() == ("gender", "refusal")
    for name in built_in_sets():
        whole = ContrastSet.load(name)
        assert whole.label == name and "CC0" in str(whole.source)
        assert min(len(whole.positive), len(whole.negative)) >= 64
        for prompts in sides(whole):
            assert len(set(prompts)) == len(prompts)
        lengths = [sum(len(prompt.split()) for prompt in prompts) / len(prompts) for prompts in sides(whole)]
        assert abs(lengths[0] - lengths[1]) < 0.5, "the classes differ in length"
        assert min(len(part.positive) for part in whole.split()) >= 16


def test_gender_prompts_end_at_the_concept_and_differ_in_nothing_else() -> None:
    girls, boys = sides(ContrastSet.load("gender"))
    assert {prompt.split()[-1] for prompt in girls} == {"girl"} and {prompt.split()[-1] for prompt in boys} == {"boy"}
    assert [prompt.rsplit(" ", 1)[0] for prompt in girls] == [prompt.rsplit(" ", 1)[0] for prompt in boys]


def test_refusal_prompts_are_matched_in_form() -> None:
    harmful, harmless = sides(ContrastSet.load("refusal"))
    assert not set(harmful) & set(harmless)
    first = [Counter(prompt.split()[0] for prompt in prompts) for prompts in (harmful, harmless)]
    assert first[0] == first[1]


def test_a_set_is_not_saved_under_the_name_of_a_table(tmp_path: Path) -> None:
    """It would be read back as one, and refused."""
    with pytest.raises(UsageError, match="saved as JSON"):
        ContrastSet(["a"], ["b"]).save(tmp_path / "set.csv")
    assert not (tmp_path / "set.csv").exists()
