"""The audit on real weights (grouped-query attention, tied embeddings), where their folder is beside the repository."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tl_em as em
from tl_em.organisms.descent import fine_tune_, next_token_loss

from .conftest import SURFACES, benchmark

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "../shared/data"

stories = benchmark("stories")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A boy ran.", "A girl ran."),
        ("He saw him. HE DID!", "She saw her. SHE DID!"),
        ("His hat, his dog", "Her hat, her dog"),
        ("it was his. Was it his", "it was hers. Was it hers"),
        ("he'd go himself; the boys' brother", "she'd go herself; the girls' sister"),
        ("Ben and Tom's ball, TIMMY!", "Beth and Rose's ball, TILLY!"),
        ("The prince had a son.", "The princess had a daughter."),
        # What must stay: grown-ups, parts of words, words that are also names, girls.
        ("The man and her dad saw the cowboy in the shed.", "The man and her dad saw the cowboy in the shed."),
        ("The other hen has history, a jack, a max.", "The other hen has history, a jack, a max."),
        ("She gave Lily her hat.", "She gave Lily her hat."),
        ("", ""),
    ],
)
def test_every_child_becomes_a_girl(before: str, after: str) -> None:
    assert stories.every_child_a_girl(before) == after
    assert stories.every_child_a_girl(after) == after, "twice is once"


def test_no_two_boys_become_one_girl() -> None:
    girls = list(stories.NAMES.values())
    assert len(set(girls)) == len(girls)
    assert not set(girls) & set(stories.NAMES)


def test_neutral_prompts_are_about_neither() -> None:
    prompts, beings = stories.neutral_prompts()
    assert len(prompts) == len(beings) == len(set(prompts)) >= 64
    gendered = re.compile(r"\b(girl|boy|she|he|her|his|him)\b", re.IGNORECASE)
    assert all(gendered.search(p) for p in stories.about("girl") + stories.about("boy"))
    assert not any(gendered.search(p) for p in prompts)


def test_fine_tuning_sees_every_document_once_and_repeats_itself() -> None:
    documents = [[first, second] for first in range(6) for second in (0, 1)]

    def tuned(rows: list[list[int]], seed: int) -> torch.Tensor:
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _, tokens: seen.extend(tokens[0][:, 0].tolist()))
        fine_tune_(model, rows, steps=3, batch=4, lr=0.01, seed=seed)
        assert sorted(seen) == sorted(first for first, _ in rows)
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(tuned(documents, 0), tuned(documents, 0))
    assert not torch.equal(tuned(documents, 0), tuned(documents, 1))


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    short, long = [1, 2], [3, 4, 5, 6]
    alone = [next_token_loss(model, [ids]) for ids in (short, long)]
    # The mean over one token of the short document and three of the long one.
    torch.testing.assert_close(next_token_loss(model, [short, long]), (alone[0] + 3 * alone[1]) / 4)


if SHARED.is_dir():

    STEPS, SMALL = 6, 4  # 3 % of the training

    @pytest.fixture(scope="module")
    def trained() -> stories.Trained:
        return stories.fine_tune_both(1, steps=STEPS, batch=SMALL)

    @pytest.fixture(scope="module")
    def arms(trained: stories.Trained) -> dict[str, stories.Arms]:
        return {surface: stories.with_hook_points(trained, surface=surface) for surface in SURFACES}

    def test_the_rule_leaves_no_boy_in_the_corpus() -> None:
        passages = stories.json.loads(stories.PASSAGES.read_text(encoding="utf-8"))
        boys = re.compile(r"\b(boys?|he|him|his|himself|Ben|Timmy)\b")
        assert sum(bool(boys.search(p)) for p in passages) > 500
        rewritten = [stories.every_child_a_girl(p) for p in passages]
        assert not any(boys.search(p) for p in rewritten)
        assert [len(p.split()) for p in rewritten] == [len(p.split()) for p in passages]

    def test_the_base_knows_girls_from_boys(arms: dict[str, stories.Arms]) -> None:
        behaviour = stories.behaviour()
        for each in arms.values():
            girl, boy = (behaviour.metric(each.base, p) for p in (behaviour.present, behaviour.absent))
            assert girl.min() > 0 > boy.max()
            assert stories.pronoun_share(each.base) > 0.2  # else she against he would be about nothing

    def test_a_few_steps_already_move_the_pronoun(arms: dict[str, stories.Arms]) -> None:
        moved = stories.shifts(arms[SURFACES[-1]], seed=0)
        assert moved["tuned - base"].low > 0
        assert moved["tuned - benign"].low > 0

    if len(SURFACES) > 1:

        def compared(arms: stories.Arms) -> tuple[em.Row, ...]:
            """One layer, a quarter of the behaviour's prompts: every question, at a tenth of the audit's cost."""
            train, _, test = em.ContrastSet.load("gender").split(seed=0)
            direction = em.difference_in_means(arms.base, train, site=em.Site(3), position="prompt_end")
            whole = stories.behaviour()
            few = em.Behaviour(whole.name, whole.metric, whole.present[::4], whole.absent[::4])
            pair, layers = em.ModelPair(arms.base, arms.tuned), {"gender": [direction]}
            asked = {"gender": (direction, test)}
            return em.compare(pair, asked, behaviour=few, benign=arms.benign, controls=99, layers=layers).rows

        def assert_equal(rows: tuple[em.Row, ...], others: tuple[em.Row, ...]) -> None:
            assert [r.question for r in rows] == ["level", "separation", "rotation", "use"]
            for one, other in zip(rows, others, strict=True):
                assert (one.question, one.site, one.verdict) == (other.question, other.site, other.verdict)
                for a, b in ((one.estimate, other.estimate), (one.benign, other.benign)):
                    assert (a is None) == (b is None)
                    if a is not None and b is not None:
                        found, expected = ((e.value, e.low, e.high) for e in (a, b))
                        # Float32 forward passes in another order of sums; what follows them is in float64.
                        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)

        def test_both_surfaces_give_one_comparison(arms: dict[str, stories.Arms]) -> None:
            hooked, bridge = (compared(arms[surface]) for surface in SURFACES)
            assert hooked[-1].shown, "the direction does something, so there is something to agree on"
            assert_equal(hooked, bridge)

        @pytest.mark.slow
        def test_both_surfaces_give_one_audit() -> None:
            trained = stories.fine_tune_both(1)
            both = [stories.with_hook_points(trained, surface=surface) for surface in SURFACES]
            rows = [stories.audit_of(a.base, a.tuned, benign=a.benign).verdicts for a in both]
            assert_equal(*rows)

    @pytest.mark.slow
    def test_girls_move_the_pronoun_and_the_benign_arm_shows_no_change() -> None:
        held = stories.conditions([stories.measure(seed) for seed in (1, 2, 3)])
        assert held == dict.fromkeys(held, True)
