"""What looks at every layer holds some layers at a time, and gives the same: memory does not grow with the layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tests.conftest import WORDS, benchmark, cached_model, make_hf_model, make_tokenizer
from tl_em.auditing.site_selection import select_site
from tl_em.auditing.splits import Subject
from tl_em.claims.claim import readings
from tl_em.claims.controls import random_in_place
from tl_em.models.sites import Site

HELD = "tl_em.models.stream.HELD"
WIDTH = 32


def prompts(n: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, 40, (3 + k % 5,), generator=generator)) for k in range(n)]


def contrast(n: int, seed: int) -> em.ContrastSet:
    ended = [[f"{each} {word}" for each in prompts(n, seed + i)] for i, word in enumerate(("cat", "dog"))]
    return em.ContrastSet(*ended, "words")


CONTRAST = contrast(40, 0)


def by_layer(pair: em.ModelPair) -> tuple[Any, str]:
    direction = em.difference_in_means(pair.base, CONTRAST, site=Site(1), position="prompt_end")
    result = em.compare(pair, {"words": (direction, contrast(20, 5))}, questions=["level", "separation"], controls=99)
    return result.by_layer, repr(result)


@pytest.mark.filterwarnings("ignore::tl_em.errors.NuisanceWarning")
def test_a_comparison_is_the_same_however_few_layers_are_held_at_once(monkeypatch):
    pair = em.ModelPair(*(cached_model("llama", "bridge", seed, None) for seed in (0, 1)))
    whole, said = by_layer(pair)
    monkeypatch.setattr(HELD, 1)
    table, again = by_layer(pair)
    assert len(whole) > 20 and table.equals(whole) and again == said


@pytest.mark.filterwarnings("ignore::tl_em.errors.NuisanceWarning")
def test_controls_are_drawn_once_a_site_and_shared_over_questions_and_models(monkeypatch):
    import tl_em.claims.claim as claim

    drawn = []

    def counted(*classes: np.ndarray, of: Any = claim.control_directions, **how: Any) -> np.ndarray:
        drawn.append(how["seed"])
        return of(*classes, **how)

    monkeypatch.setattr(claim, "control_directions", counted)
    by_layer(em.ModelPair(*(cached_model("llama", "bridge", seed, None) for seed in (0, 1))))
    assert len(drawn) == 1 + 3  # where it is judged, and at each of three layers


def test_fits_sites_and_controls_are_the_same_too(monkeypatch):
    model, sites = cached_model("llama", "bridge"), [Site(i) for i in range(3)]

    def found() -> list[np.ndarray]:
        directions = em.extract_directions(model, CONTRAST, sites=sites, positions=(-1, -2), method="logistic")
        drawn = random_in_place(model, directions[:3], CONTRAST, count=2, seed=3)
        return [each.vector.numpy() for each in (*directions, *(one for row in drawn for one in row))]

    whole = found()
    monkeypatch.setattr(HELD, 1)
    assert len(whole) == 12
    for one, other in zip(whole, found(), strict=True):
        assert np.array_equal(one, other)


def test_what_is_held_does_not_grow_with_the_layers(monkeypatch):
    """Counted allocation by allocation: of the last four layers, and of all twelve."""
    tokenizer = make_tokenizer(template=None)
    deep = em.load_model(make_hf_model("llama", num_hidden_layers=12), tokenizer=tokenizer, in_place=True)
    many = em.ContrastSet(prompts(400, 0), prompts(400, 1))
    each = 800 * WIDTH * 4

    def held(layers: int) -> int:
        def read() -> None:
            for _ in readings({"base": deep}, many, [Site(i) for i in range(12)][-layers:], "prompt_end"):
                pass

        read()
        return benchmark("timing").peak_bytes(read, torch.device("cpu"))

    assert held(12) - held(4) > 7 * each  # where everything may be held, it is
    monkeypatch.setattr(HELD, 2 * 8 * 800 * WIDTH)  # two layers at a time
    few, all_of_them = held(4), held(12)
    assert all_of_them < few + each / 2, (few, all_of_them)


def test_the_chosen_site_is_the_same(monkeypatch):
    model = cached_model("llama", "bridge")
    candidates = em.extract_directions(model, CONTRAST, sites=[Site(i) for i in range(3)], positions=[-1])
    asked = em.metrics.Behaviour("cats", em.logit_difference("cat", "dog"), CONTRAST.positive, CONTRAST.negative)
    parts = CONTRAST.split(seed=0)
    subject = Subject("words", CONTRAST, {}, parts, asked, asked, -1)
    monkeypatch.setattr("tl_em.auditing.site_selection.effects_in_base", lambda *_: [0.0])
    whole = select_site(model, candidates, subject)
    monkeypatch.setattr(HELD, 1)
    assert select_site(model, candidates, subject) is whole
