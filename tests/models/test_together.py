"""Prompts that belong together are found where they do, and not where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from tl_em.models.contrasts import ContrastSet, inseparable
from tl_em.models.together import Together, correlated, merged, similar, words_of

WIDTH = 64


def clusters(seed: int, n: int, size: int, shared: float = 0.5) -> list[np.ndarray]:
    """Both classes, prompts of a cluster with this share of their variance."""
    rng = np.random.default_rng(seed)

    def one() -> np.ndarray:
        common = np.repeat(rng.standard_normal((-(-n // size), WIDTH)), size, axis=0)[:n]
        return np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.standard_normal((n, WIDTH))

    return [one(), one()]


@pytest.mark.parametrize("scale", [np.ones(WIDTH), np.where(np.arange(WIDTH) < 3, 60.0, 1.0)])
def test_clusters_of_activations_are_found_as_they_are(scale: np.ndarray) -> None:
    true = np.concatenate([np.arange(48) // 6, 8 + np.arange(48) // 6])
    right = []
    for seed in range(5):
        found = correlated([x * scale + 5 * side for side, x in enumerate(clusters(seed, 48, 6))])
        right.append(np.mean((found[:, None] == found) == (true[:, None] == true)))
    assert np.mean(right) > 0.99


def test_independent_prompts_are_left_alone() -> None:
    found = [len(set(correlated(clusters(seed, 32, 1)).tolist())) for seed in range(20)]
    assert np.mean(np.array(found) == 64) >= 0.9, found
    rng = np.random.default_rng(0)
    assert len(set(correlated([rng.standard_t(3, (32, WIDTH)) for _ in range(2)]).tolist())) == 64


def test_a_question_asked_in_both_classes_is_one() -> None:
    rng = np.random.default_rng(0)
    question = rng.standard_normal((32, WIDTH))
    found = correlated([question + 0.5 * rng.standard_normal((32, WIDTH)) for _ in range(2)])
    assert (found[:32] == found[32:]).mean() > 0.9 and len(set(found.tolist())) > 24


def test_activations_that_do_not_vary_say_nothing() -> None:
    assert len(set(correlated([np.ones((20, 4)), np.zeros((20, 4))]).tolist())) == 40
    assert len(set(correlated([np.eye(3), np.eye(3)]).tolist())) == 6, "too few to tell"


def test_texts_are_one_by_their_rare_words() -> None:
    template = [words_of(f"please tell me now about {name}") for name in ("ravens", "copper", "Oslo", "chess", "rain")]
    assert len(set(merged(similar(template), 0.7).tolist())) == 5, "one template of all prompts ties nothing"
    twice = [*template, words_of("Please tell me now about OSLO")]
    labels = merged(similar(twice), 0.7)
    assert labels[2] == labels[5] and len(set(labels.tolist())) == 5
    assert len(set(merged(similar([["a"], ["a"], ["a"]]), 0.7).tolist())) == 1, "prompts that are all equal are one"


def test_templates_that_are_shared_by_a_few_are_found_without_their_labels() -> None:
    whole = ContrastSet.load("gender")
    bare = ContrastSet(whole.positive, whole.negative).grouped()
    given = [*(whole.positive_groups or ()), *(whole.negative_groups or ())]
    found = [*(bare.positive_groups or ()), *(bare.negative_groups or ())]
    assert len(set(zip(given, found, strict=True))) == len(set(given)) == len(set(found)) == 24


def test_every_prompt_several_times_counts_once_and_is_not_split() -> None:
    whole = ContrastSet.load("refusal")
    assert whole.grouped() is whole, "requests that differ stay as they are"
    again = ContrastSet([*whole.positive] * 4, [*whole.negative] * 4)
    grouped = again.grouped()
    assert len(set(grouped.positive_groups or ())) == 72
    parts = again.split(seed=0)
    held = [set(map(str, part.positive)) for part in parts]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    assert len(inseparable(again)) <= 72


def test_groups_that_are_given_win_and_are_joined_only_on_request() -> None:
    given = ContrastSet(
        ["a dog ran", "a dog ran"], ["it rained", "snow"], positive_groups=["a", "b"], negative_groups=["c", "d"]
    )
    assert given.grouped() is given
    joined = given.grouped(join=True)
    assert joined.positive_groups == (0, 0) and joined.negative_groups == (1, 2)
    shared = ContrastSet(
        ["x one", "y two"], ["z three", "w four"], positive_groups=["q", "r"], negative_groups=["q", "s"]
    )
    assert shared.grouped(join=True).negative_groups == (0, 2), "what was given together stays together"


def test_it_is_said_how_much_the_prompts_count() -> None:
    assert Together.of([["a"], ["b"]]).said == ""
    found = Together.of([["a", "b"]] * 3 + [["c"]] * 2 + [["d"]])
    assert found.said == "6 prompts count as 3: 2 groups of 2 to 3, found from near-equal texts"
