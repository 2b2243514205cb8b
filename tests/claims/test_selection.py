"""Selection: the published choices, the theorems (cascade = all, together = one at a time), a planted direction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.conftest import SURFACES, cached_model, make_hf_model, make_tokenizer
from tl_em.claims.controls import random_in_place
from tl_em.claims.selection import (
    CHOSEN,
    DEPTH,
    INDUCE,
    KL,
    NO_DIFFERENCE,
    NOT_FINITE,
    NOT_LOWEST,
    Criteria,
    _along_each,
    _rounds,
    rejections,
)
from tl_em.errors import (
    NoCandidateError,
    NotReachedError,
    NuisanceWarning,
    ProvenanceError,
    UsageError,
    ZeroDirectionError,
)
from tl_em.interventions import many
from tl_em.interventions.base import Partial
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.loading import load_model
from tl_em.models.residual_writes import write_points
from tl_em.models.stream import next_token_logits
from tl_em.report import plots

pytestmark = pytest.mark.surface
RUNS = Path(__file__).resolve().parents[2] / "shared/data/refusal-direction/runs"
COLUMNS = {"refusal_score": "bypass", "steering_score": "induce", "kl_div_score": "kl"}
PUBLISHED = {
    "gemma-2b-it": (18, (-2, 10)),
    "llama-2-7b-chat-hf": (32, (-1, 14)),
    "meta-llama-3-8b-instruct": (32, (-5, 12)),
}
POSITIONS = ("instruction_end", "prompt_end")

# --- The rule ---------------------------------------------------------------------------------------------------------


def published(name: str, file: str) -> pd.DataFrame:
    return pd.DataFrame(json.loads((RUNS / name / "select_direction" / file).read_text())).rename(columns=COLUMNS)


if RUNS.exists():

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_the_rule_reproduces_the_published_choice_and_the_published_survivors(name: str) -> None:
        n_layers, choice = PUBLISHED[name]
        scores = published(name, "direction_evaluations.json")
        assert em.select_candidate(scores, n_layers=n_layers) == choice
        left = scores[rejections(scores, Criteria(n_layers)) == ""].sort_values("bypass")
        filtered = published(name, "direction_evaluations_filtered.json")
        assert len(filtered) > 3
        pd.testing.assert_frame_equal(left.reset_index(drop=True), filtered)


def table(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["position", "layer", "bypass", "induce", "kl"])


def test_every_criterion_removes_what_it_says_and_bounds_are_inclusive() -> None:
    nan = float("nan")
    scores = table(
        (-1, 7, -9.0, 1.0, 0.0), (-1, 8, -9.0, 1.0, 0.0), (-1, 1, -9.0, -0.1, 0.0), (-1, 2, -9.0, 0.0, 0.1),
        (-1, 3, -9.0, 1.0, 0.11), (-1, 4, nan, 1.0, 0.0), (-1, 5, -9.0, nan, 0.0), (-1, 6, -9.0, 1.0, float("inf")),
    )  # fmt: skip
    expected = ["", DEPTH, INDUCE, "", KL, NOT_FINITE, NOT_FINITE, NOT_FINITE]
    assert list(rejections(scores, Criteria(10))) == expected
    assert em.select_candidate(scores, n_layers=10) == (-1, 7)  # of two equal ones the first
    assert em.select_candidate(scores, n_layers=10, max_depth=0.7) == (-1, 2)


def test_positions_may_be_words() -> None:
    assert em.select_candidate(table(("prompt_end", 1, -1.0, 1.0, 0.0)), n_layers=4) == ("prompt_end", 1)


def test_when_nothing_is_left_the_error_counts_what_removed_it() -> None:
    nan = float("nan")
    scores = table((-1, 9, -9.0, 1.0, 0.0), (-1, 1, -9.0, -2.0, 0.0), (-1, 2, -9.0, -1.5, nan), (-1, 3, 0, 1, 0.25))
    with pytest.raises(NoCandidateError) as caught:
        em.select_candidate(scores.astype({"bypass": float}), n_layers=10)
    said = str(caught.value)
    assert "None of 4 candidates" in said and "1 too deep (layer >= 8 of 10" in said and "0 with a score" in said
    assert "2 with induce < 0 (the best -1.5)" in said and "1 with KL > 0.1 (the least 0.25)" in said


def test_a_table_without_a_column_or_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="lacks kl"):
        em.select_candidate(table((-1, 1, 0.0, 0.0, 0.0)).drop(columns="kl"), n_layers=4)
    with pytest.raises(UsageError, match="0 rows"):
        em.select_candidate(table(), n_layers=4)


# --- On models --------------------------------------------------------------------------------------------------------

THINGS = ["the car", "a bank", "the big red fish", "a story about the king", "a wash", "the happy dog and the cat"]
OTHERS = ["a bird", "the blue bank", "a small story", "the sad queen"]
METRIC = em.logit_difference("sorry", "sure")


def steal(things: Sequence[str]) -> em.ContrastSet:
    return em.ContrastSet([f"steal {x} please" for x in things], [f"wash {x} please" for x in things], label="steal")


TRAIN, CHOOSE, TEST = steal(THINGS[:3]), steal(THINGS[3:]), steal(OTHERS)


@pytest.fixture(scope="module")
def candidates(model: LensModel) -> Any:
    return em.candidate_directions(model, TRAIN, positions=POSITIONS)


def test_candidates_equal_one_difference_in_means_each_and_none_where_the_tokens_are_the_same(
    model: LensModel, candidates: Any
) -> None:
    # Every prompt ends alike, so the embeddings do; GPT-2 adds the place, which the classes share, prompt by prompt.
    assert candidates.without == tuple((position, 0) for position in POSITIONS)
    assert len(candidates) == len(POSITIONS) * (model.cfg.n_layers - 1)
    for direction in candidates:
        again = em.difference_in_means(model, TRAIN, site=direction.site, position=direction.position)
        assert torch.equal(direction.vector, again.vector)
        assert candidates.at(direction.position, direction.site.layer) is direction
    with pytest.raises(UsageError, match="the two means are equal there"):
        candidates.at("prompt_end", 0)


@pytest.mark.parametrize("score", ["bypass", "induce"])
def test_together_equals_one_at_a_time(model: LensModel, candidates: Any, score: str) -> None:
    edit = {"bypass": em.Ablate, "induce": em.Add}[score]
    directions = list(candidates)[::-1]  # not in the order of the layers
    prompts = CHOOSE.positive
    alone = np.concatenate([many._one(model, edit(direction), prompts, METRIC) for direction in directions])
    edits = many.Along(edit(directions[0]), torch.stack([d.vector for d in directions]), [d.site for d in directions])
    assert many._together(model, edits, prompts, METRIC, None, "") is not None, "the fast path is not taken"
    found = many.along_each(model, edits, prompts, METRIC)
    assert np.ptp(alone, axis=0).min() > 1e-2  # the directions differ in what they do
    np.testing.assert_allclose(found, alone, atol=2e-5)  # float32 sums in another order


@pytest.mark.parametrize("edit", [em.Add, lambda d: em.Ablate(d, around=torch.ones(len(d.vector)))])
def test_a_choice_between_answers_is_measured_under_all_directions_at_once(
    model: LensModel, candidates: Any, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, right, wrong = CHOOSE.positive[:3], ("a story", "please"), ("the king", "about", "a story please")
    asked = [em.evals.OpenQuestion(str(i), (p,), right=right, wrong=wrong) for i, p in enumerate(prompts)]
    metric = em.evals.ForcedChoice(asked)
    one = next(d for d in candidates if d.site.layer == 1)
    edits = many.Along(edit(one), torch.stack([d.vector for d in candidates]))
    alone = np.concatenate([many._one(model, edits.alone(k), prompts, metric) for k in range(len(edits.vectors))])
    monkeypatch.setattr(many, "_apart", None)  # the slow path
    found = many.along_each(model, edits, prompts, metric, at_once=1)
    assert np.ptp(alone, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, alone, atol=2e-5)


def divergence(model: LensModel, directions: Sequence[em.Direction]) -> np.ndarray:
    return _along_each(model, em.Ablate, directions, CHOOSE.negative, many.kl_from_now(model, CHOOSE.negative))


def test_kl_is_that_of_the_metric_and_zero_without_a_treatment(small_model: LensModel) -> None:
    directions = list(em.candidate_directions(small_model, TRAIN, positions=["prompt_end"]))
    found = divergence(small_model, directions)
    before = next_token_logits(small_model, CHOOSE.negative).double().log_softmax(-1)
    for direction, values in zip(directions, found, strict=True):
        with em.intervene(small_model, em.Ablate(direction)):
            after = next_token_logits(small_model, CHOOSE.negative).double().log_softmax(-1)
        expected = (before.exp() * (before - after)).sum(-1)
        assert expected.min() > 1e-4
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert many.kl_from_now(small_model, CHOOSE.negative)(small_model, CHOOSE.negative).abs().max() < 1e-9


def bounds_that_bite(model: LensModel, candidates: Any) -> dict[str, float]:
    """Criteria such that each of them removes some candidate, and not all are removed."""
    induce = _along_each(model, em.Add, list(candidates), CHOOSE.negative, METRIC).mean(1)
    kl = divergence(model, list(candidates)).mean(1)
    order = np.argsort(induce)[len(induce) // 3 :]
    max_kl = float(np.median(kl[order])) + 1e-6  # not a score itself, which float32 sums in another order would miss
    return {"min_induce": float(induce[order[0]]) - 1e-3, "max_kl": max_kl, "max_depth": 1.0}


def test_the_cascade_and_all_scores_give_the_same_pick(model: LensModel, candidates: Any) -> None:
    bounds = bounds_that_bite(model, candidates)
    cascade = em.select_direction(model, candidates, CHOOSE, metric=METRIC, controls=0, **bounds)
    full = em.select_direction(model, candidates, CHOOSE, metric=METRIC, controls=0, full=True, **bounds)
    assert cascade.direction is full.direction
    assert list(cascade.table["fate"]) == list(full.table["fate"])
    assert {INDUCE, KL, CHOSEN, NO_DIFFERENCE} <= set(full.table["fate"])
    scored = full.table[full.table["fate"] != NO_DIFFERENCE]
    assert scored[["bypass", "induce", "kl"]].notna().all().all()
    assert cascade.table["bypass"].notna().sum() < len(scored)
    both = cascade.table["bypass"].notna()
    np.testing.assert_allclose(cascade.table["bypass"][both], full.table["bypass"][both], atol=2e-5)
    pure = em.select_candidate(scored, n_layers=model.cfg.n_layers, **bounds)
    assert pure == (full.direction.position, full.direction.site.layer)


@pytest.fixture(scope="module")
def selection(surface: str) -> Any:
    model = cached_model("llama", surface)
    found = em.candidate_directions(model, TRAIN, positions=POSITIONS)
    bounds = bounds_that_bite(model, found)
    return em.select_direction(model, found, CHOOSE, metric=METRIC, test=TEST, controls=19, **bounds)


def test_the_held_out_estimate_is_that_of_the_test_prompts(selection: Any, surface: str) -> None:
    model = cached_model("llama", surface)
    with em.intervene(model, em.Ablate(selection.direction)):
        held_out, chosen_on = METRIC(model, TEST.positive), METRIC(model, CHOOSE.positive)
    assert selection.estimate.value == pytest.approx(float(held_out.mean()), abs=1e-4)
    assert selection.estimate.n == len(TEST.positive)
    assert selection.optimism.value == pytest.approx(float(chosen_on.mean() - held_out.mean()), abs=1e-4)
    assert selection.optimism.low < selection.optimism.high
    assert set(selection.held_out) == {"bypass", "untreated", "induce", "kl"}


def test_the_controls_have_the_same_treatment_and_the_result_says_all_of_it(selection: Any) -> None:
    assert list(selection.controls.columns) == ["bypass", "induce"] and len(selection.controls) == 19
    assert selection.controls.std().min() > 0
    assert 1 / 20 <= min(selection.p.values()) <= max(selection.p.values()) <= 1
    said = repr(selection)
    assert "optimism" in said and "against 19 rounds of random directions" in said and "log-odds" in said
    frame = selection.to_pandas()
    frame["layer"] = 0
    assert selection.table["layer"].max() > 0  # a copy was changed
    figure = selection.plot()
    assert figure.axes[0].get_title(loc="left") == "bypass: ablated"
    assert all(float(tick).is_integer() for ax in figure.axes for tick in ax.get_xticks())
    named = [each.get_text() for each in figure.legends[0].get_texts()]
    assert {"bound", "layers too deep"} <= set(named) and selection.criteria.max_kl in figure.axes[2].get_yticks()
    assert len(plots.selection(selection, width=3.25).axes) == 3


def test_without_test_prompts_the_result_says_that_nothing_was_held_out(small_model: LensModel) -> None:
    found = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])
    loose = {"max_kl": 99.0, "min_induce": -99.0}
    pick = em.select_direction(small_model, found, CHOOSE, metric=METRIC, controls=0, **loose)
    assert pick.estimate is None and pick.optimism is None and not pick.p
    assert "held out: not measured" in repr(pick)
    assert NOT_LOWEST not in set(pick.table["fate"]) and DEPTH in set(pick.table["fate"])


# --- A planted direction ----------------------------------------------------------------------------------------------


@cache
def planted_model(surface: str, strength: float) -> LensModel:
    """A model in which the word "steal", and nothing else, writes axis 3, and the logit of "sorry" reads it."""
    hf = make_hf_model("llama", num_hidden_layers=5, hidden_size=32)
    tokenizer = make_tokenizer(template=None)
    word, sorry, sure = (tokenizer.convert_tokens_to_ids(w) for w in ("steal", "sorry", "sure"))
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(0.1 if parameter.ndim == 2 else 1.0)
        hf.model.norm.weight.fill_(1.0)
        hf.model.embed_tokens.weight.copy_(0.1 * torch.randn_like(hf.model.embed_tokens.weight))
        hf.model.embed_tokens.weight[:, 3] = 0.0
        hf.model.embed_tokens.weight[word, 3] = strength
        hf.lm_head.weight.mul_(0.1)
        hf.lm_head.weight[sorry] = 0.0
        hf.lm_head.weight[sure] = 0.0
        hf.lm_head.weight[sorry, 3] = 1.0
        hf.lm_head.weight[sure, 3] = -1.0
    return load_model(hf, surface=surface, tokenizer=tokenizer, in_place=True)


def ends(model_words: Sequence[str]) -> em.ContrastSet:
    return em.ContrastSet([f"{x} steal" for x in model_words], [f"{x} wash" for x in model_words], label="steal")


@cache
def planted_pick(surface: str, strength: float, **bounds: Any) -> Any:
    model = planted_model(surface, strength)
    found = em.candidate_directions(model, ends(THINGS[:3]), positions=["prompt_end", -2])
    options = {"metric": METRIC, "test": ends(OTHERS), "controls": 19} | bounds
    return em.select_direction(model, found, ends(THINGS[3:]), **options)


def test_a_planted_direction_is_found_and_beats_random_ones(surface: str) -> None:
    pick = planted_pick(surface, 6.0, max_kl=0.5)
    cosine = float(pick.direction.unit[3].abs())
    assert pick.direction.position == "prompt_end" and cosine > 0.9
    # What little of the axis the cosine of .99 leaves is blown up by the final norm, which has lost most of its input.
    untreated = pick.held_out["untreated"].value
    assert untreated > 5 and abs(pick.estimate.value) < 0.2 * untreated
    assert pick.p["bypass"] == pytest.approx(1 / 20) and pick.p["induce"] == pytest.approx(1 / 20)


def test_the_best_of_many_random_candidates_is_held_against_the_best_of_as_many(small_model: LensModel) -> None:
    """One candidate in ten is rare among single random directions, and what every search among ten finds."""
    at = [em.Direction(torch.ones(32), em.Site(layer, "resid_pre")) for layer in (1, 2)]
    loose: dict[str, Any] = {"metric": METRIC, "max_kl": 99.0, "min_induce": -99.0, "max_depth": 1.0, "controls": 9}
    lone, of_many = [], []
    for seed in range(3):
        noise = [each for own in random_in_place(small_model, at, TRAIN, count=5, seed=90 + seed) for each in own]
        pick = em.select_direction(small_model, noise, CHOOSE, seed=seed, **loose)
        lone.append(em.select_direction(small_model, [pick.direction], CHOOSE, seed=seed, **loose).p["bypass"])
        of_many.append(pick.p["bypass"])
    assert np.mean(lone) < 0.25 < np.mean(of_many)


def spanned(model: LensModel, direction: em.Direction, contrast: em.ContrastSet) -> float:
    """The share of a vector that the within-class differences at its site make up."""
    acts = [
        em.capture(model, side, [direction.site], position=direction.position)[:, 0].double()
        for side in (contrast.positive, contrast.negative)
    ]
    q = torch.linalg.svd(torch.cat([x - x.mean(0) for x in acts]), full_matrices=False)
    rows = q.Vh[q.S / q.S[0] > 1e-6]
    return float((rows @ direction.unit.double()).norm())


def test_random_directions_are_drawn_from_the_prompts_that_made_the_candidates(small_model: LensModel) -> None:
    found = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])
    known = [each for own in _rounds(small_model, found, Criteria(9), CHOOSE, TEST, 3, 0) for each in own]
    assert known and min(spanned(small_model, each, TRAIN) for each in known) > 0.999
    assert max(spanned(small_model, each, CHOOSE) for each in known) < 0.99
    unknown = [each for own in _rounds(small_model, list(found), Criteria(9), CHOOSE, TEST, 3, 0) for each in own]
    both = em.ContrastSet([*CHOOSE.positive, *TEST.positive], [*CHOOSE.negative, *TEST.negative])
    assert min(spanned(small_model, each, both) for each in unknown) > 0.999
    assert max(spanned(small_model, each, CHOOSE) for each in unknown) < 0.99


def test_prompts_that_belong_together_count_once_in_the_held_out_estimates(small_model: LensModel) -> None:
    found = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])
    loose: dict[str, Any] = {"metric": METRIC, "max_kl": 99.0, "min_induce": -99.0, "controls": 0}
    once = em.select_direction(small_model, found, CHOOSE, test=TEST, **loose)
    four = em.select_direction(small_model, found, steal(4 * THINGS[3:]), test=steal(4 * OTHERS), **loose)
    apart = len(THINGS[3:]) + len(OTHERS)
    assert (once.optimism.n, four.optimism.n) == (apart, 4 * apart)
    assert four.optimism.value == pytest.approx(once.optimism.value, abs=1e-4)
    assert four.optimism.n_effective == pytest.approx(apart, abs=0.1) and four.estimate.n_effective < 4.1
    width = [each.optimism.high - each.optimism.low for each in (once, four)]
    assert width[1] == pytest.approx(width[0], rel=0.05)  # as if each had stood there once


def test_random_directions_that_break_the_model_are_no_rivals(small_model: LensModel) -> None:
    found = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])
    options: dict[str, Any] = {"metric": METRIC, "min_induce": -99.0, "max_depth": 1.0, "controls": 9}
    free = em.select_direction(small_model, found, CHOOSE, max_kl=99.0, **options)
    tight = float(free.table["kl"].min()) + 1e-6
    spared = em.select_direction(small_model, found, CHOOSE, max_kl=tight, **options)
    assert (spared.controls["bypass"] >= free.controls["bypass"] - 1e-6).all()
    assert (spared.controls["bypass"] > free.controls["bypass"] + 1e-3).any()
    np.testing.assert_allclose(spared.controls["induce"], free.controls["induce"], atol=1e-5)


def test_an_absent_direction_is_not_found(surface: str) -> None:
    with pytest.raises(NoCandidateError, match="with induce < 1"):
        planted_pick(surface, 0.0, min_induce=1.0)
    pick = planted_pick(surface, 0.0, min_induce=-9.0, max_kl=9.0, controls=0)
    assert float(pick.direction.unit[3].abs()) < 0.6 and abs(pick.held_out["untreated"].value) < 1


# --- What may go wrong ------------------------------------------------------------------------------------------------


class OwnForward:
    """A metric that runs the model by itself: nothing can be stacked under it."""

    name, unit = "own", "log-odds"

    def __call__(self, model: LensModel, prompts: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            tokens = [model.to_tokens(str(prompt), prepend_bos=False, move_to_device=False) for prompt in prompts]
            return torch.stack([model(t.to(model.cfg.device))[0, -1, 9] - model(t)[0, -1, 10] for t in tokens])


def test_a_metric_that_runs_the_model_itself_is_run_one_direction_at_a_time(small_model: LensModel) -> None:
    directions = list(em.candidate_directions(small_model, TRAIN, positions=["prompt_end"]))
    metric: Any = OwnForward()
    for edit in (em.Ablate, em.Add):
        found = _along_each(small_model, edit, directions, CHOOSE.positive, metric)
        for direction, values in zip(directions, found, strict=True):
            with em.intervene(small_model, edit(direction)):
                assert np.array_equal(values, metric(small_model, CHOOSE.positive).double().numpy())


def test_a_candidate_under_which_the_model_overflows_is_rejected_and_the_others_are_not(surface: str) -> None:
    model = cached_model("gpt2", surface)
    sites = [em.Site(layer, "resid_pre") for layer in (0, 1)]
    wild = em.Direction(torch.full((32,), 3e38), sites[0])
    tame = em.Direction(torch.randn(32), sites[1])
    loose = {"max_kl": 99.0, "min_induce": -99.0}
    pick = em.select_direction(model, [wild, tame], CHOOSE, metric=METRIC, controls=0, **loose)
    assert list(pick.table["fate"]) == [NOT_FINITE, CHOSEN]


def test_candidates_that_do_not_fit_are_refused(surface: str) -> None:
    model, other = cached_model("gpt2", surface), cached_model("llama", surface)
    found = em.candidate_directions(model, TRAIN, positions=["prompt_end"])
    elsewhere = em.candidate_directions(planted_model(surface, 6.0), ends(THINGS), positions=[-1])
    with pytest.raises(ProvenanceError):
        em.select_direction(other, elsewhere, CHOOSE)
    with pytest.raises(UsageError, match="no candidates"):
        em.select_direction(model, [], CHOOSE)
    with pytest.raises(UsageError, match="mlp_out"):
        em.select_direction(model, [em.Direction(torch.ones(32), em.Site(1, "mlp_out"))], CHOOSE)
    with pytest.raises(UsageError, match="would not be a held-out one"):
        em.select_direction(model, found, CHOOSE, test=CHOOSE)
    with pytest.raises(UsageError, match="all 6 prompts that steal is to be judged on are among"):
        em.select_direction(model, found, TRAIN)
    with pytest.raises(UsageError, match="all 6 prompts"):
        em.select_direction(model, found, CHOOSE, test=TRAIN)
    loose: dict[str, Any] = {"metric": METRIC, "max_kl": 99.0, "min_induce": -99.0, "controls": 0}
    with pytest.warns(NuisanceWarning, match="2 of the 8 prompts judged on made the direction"):
        em.select_direction(model, found, steal([*THINGS[2:]]), **loose)
    with pytest.raises(UsageError, match="name no candidates"):
        em.candidate_directions(model, TRAIN, positions=[])
    with pytest.raises(ZeroDirectionError, match="at all 1 positions"):
        em.candidate_directions(model, TRAIN, positions=["prompt_end"], layers=[0])


# --- Strength ---------------------------------------------------------------------------------------------------------


def test_every_intervention_is_brought_to_the_same_push(small_model: LensModel) -> None:
    r = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])[-1]
    for intervention in (em.Add(r), em.Add(r, -3.0), em.Ablate(r)):
        found = em.calibrate(small_model, intervention, CHOOSE.negative, target_kl=0.004)
        assert found.kl.value == pytest.approx(0.004, rel=0.02)
        with em.intervene(small_model, found.intervention):
            again = next_token_logits(small_model, CHOOSE.negative).double().log_softmax(-1)
        before = next_token_logits(small_model, CHOOSE.negative).double().log_softmax(-1)
        assert float((before.exp() * (before - again)).sum(-1).mean()) == pytest.approx(found.kl.value, rel=1e-4)
    negative = em.calibrate(small_model, em.Add(r, -3.0), CHOOSE.negative, target_kl=0.004).intervention
    assert negative.coefficient < 0


def test_a_push_that_cannot_be_reached_is_an_error_that_says_how_far_it_goes(small_model: LensModel) -> None:
    r = em.candidate_directions(small_model, TRAIN, positions=["prompt_end"])[-1]
    with pytest.raises(NotReachedError, match=r"Ablate does not reach .* up to 1 times .* it reaches 0\.\d+"):
        em.calibrate(small_model, em.Ablate(r), CHOOSE.negative, target_kl=50.0)
    with pytest.raises(NotReachedError, match="Add does not reach"):
        em.calibrate(small_model, em.Add(r), CHOOSE.negative, target_kl=1e4)
    with pytest.raises(UsageError, match="not a positive number"):
        em.calibrate(small_model, em.Add(r), CHOOSE.negative, target_kl=0.0)
    with pytest.raises(UsageError, match="coefficient is 0"):
        em.calibrate(small_model, em.Add(r, 0.0), CHOOSE.negative, target_kl=0.1)


def test_a_part_of_an_ablation_leaves_that_part_of_the_component_in_every_block(model: LensModel) -> None:
    r = em.candidate_directions(model, TRAIN, positions=["prompt_end"])[0]
    tokens = torch.tensor([[2, 3, 8, 20]])

    def run(*interventions: Any) -> tuple[Tensor, Tensor]:
        """The component before the last block, relative to what was written in all, and the logits."""
        stream: list[Tensor] = []
        writes: list[Tensor] = []
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_pre"
        hooks = [(name, lambda x, hook: writes.append(r.project(x))) for name in write_points(model)[:-2]]
        with torch.no_grad(), hooked(model, hooks), ExitStack() as stack:
            for each in interventions:
                stack.enter_context(em.intervene(model, each))
            stack.enter_context(hooked(model, [(last, lambda x, hook: stream.append(r.project(x)))]))
            logits = model(tokens)
        return stream[0] / sum(writes), logits

    for part in (0.0, 0.25, 1.0):
        # Each write keeps 1 - part of its component, so the stream does; float32 sums of components near 0 are coarse.
        assert run(Partial(em.Ablate(r), part))[0].median() == pytest.approx(1 - part, abs=1e-3)
    whole, expected = run(Partial(em.Ablate(r), 1.0))[1], run(em.Ablate(r))[1]
    assert torch.allclose(whole, expected, atol=1e-5)  # x + (edit(x) - x) rounds once more
    assert not torch.allclose(run()[1], expected, atol=1e-2)
    with pytest.raises(UsageError, match="from 0 to 1"):
        Partial(em.Ablate(r), 1.5)


def test_both_surfaces_choose_the_same() -> None:
    if len(SURFACES) == 1:
        return
    picks = [planted_pick(surface, 6.0, max_kl=0.5) for surface in SURFACES]
    assert len({(pick.direction.position, pick.direction.site.layer) for pick in picks}) == 1
    np.testing.assert_allclose(picks[0].table["induce"], picks[1].table["induce"], atol=1e-4)
