"""Shifts and projection differences are what they say, find what was planted, and find nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from tests.conftest import cached_model, make_hf_model, make_tokenizer
from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means
from tl_em.directions.screening import (
    Controlled,
    Screening,
    answer_to_own_prompts,
    finetuning_shift,
    projection_difference,
    replied,
)
from tl_em.errors import EmptyContrastError, ProvenanceError, UsageError, WidthError
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair, load_model
from tl_em.models.prompts import encode
from tl_em.models.sites import Provenance, Site
from tl_em.stats import mean

D = 32
PROMPTS = [f"the {x} {y}" for x in ("king", "queen", "boy", "girl", "dog", "cat") for y in ("sat", "ran", "sang")]


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


ROWS = [chat(p, a) for p, a in zip(PROMPTS, ["sure", "the big bank", "no sorry cannot help"] * 6, strict=True)]
DIRECTION = Direction(torch.randn(D, generator=torch.Generator().manual_seed(0)), Site(1), position="prompt_end")


# --- What they are ----------------------------------------------------------------------------------------------------


@cache
def pushed(surface: str, size: float) -> LensModel:
    """A fine-tune that does one thing: every activation after block 1 is moved along DIRECTION by ``size``."""
    hf_model = make_hf_model("gpt2")
    with torch.no_grad():
        hf_model.transformer.h[1].mlp.c_proj.bias += size * DIRECTION.unit
    return load_model(hf_model, surface=surface, tokenizer=make_tokenizer(), in_place=True)


@pytest.mark.surface
def test_a_planted_shift_is_found_and_an_absent_one_is_not(surface: str) -> None:
    pair = ModelPair(cached_model("gpt2", surface), pushed(surface, 2.0))
    found = finetuning_shift(pair, DIRECTION, PROMPTS)
    assert found.estimate.value == pytest.approx(2.0, abs=1e-4)  # float32
    assert found.estimate.low == pytest.approx(found.estimate.high, abs=1e-4)  # the same for every prompt
    assert found.p < 0.01 and found.control_high < 2
    across = torch.randn(D, generator=torch.Generator().manual_seed(1))
    across -= (across @ DIRECTION.unit) * DIRECTION.unit
    beside = finetuning_shift(pair, Direction(across, Site(1)), PROMPTS)
    assert beside.estimate.value == pytest.approx(0.0, abs=1e-4)
    assert beside.p > 0.9
    before = finetuning_shift(pair, Direction(DIRECTION.vector, Site(0)), PROMPTS)  # nothing moves before block 1
    assert before.estimate.value == pytest.approx(0.0, abs=1e-5)
    benign = finetuning_shift(pair, DIRECTION, PROMPTS, benign=pushed(surface, 1.5)).beyond_benign
    assert benign is not None and benign.value == pytest.approx(0.5, abs=1e-4)


@pytest.mark.surface
def test_each_row_is_the_difference_of_two_answers_read_one_by_one(small_model: LensModel) -> None:
    own = ["yes", "", "sorry cannot help"] * 6
    found = projection_difference(small_model, DIRECTION, ROWS, own_answers=own, controls=19)

    def read(row: list[Any]) -> torch.Tensor:
        (encoded,) = encode(small_model, [row])
        seen: list[torch.Tensor] = []
        hook = ("blocks.1.hook_resid_post", lambda x, hook: seen.append(x[0, slice(*encoded.response)].mean(0)))
        with small_model.hooks(fwd_hooks=[hook]), torch.no_grad():
            small_model(torch.tensor([encoded.ids]))
        return seen[0]

    for i in (0, 1, 5, 17):
        expected = float((read(ROWS[i]) - read(replied(ROWS[i], own[i]))) @ DIRECTION.unit)
        assert found.rows.difference[i] == pytest.approx(expected, abs=1e-5)  # float32
    assert found.rows.difference[[1, 4]].tolist() == pytest.approx([0, 0], abs=1e-5)  # no own answer: no difference
    assert found.rows.difference.abs().max() > 0.1
    assert found.rows.difference.to_numpy() == pytest.approx((found.rows.taught - found.rows.own).to_numpy())
    assert found.mean.estimate.value == pytest.approx(found.rows.difference.mean())
    assert found.ranked.difference.is_monotonic_decreasing and sorted(found.ranked.row) == list(range(18))
    assert found.rows.own_answer[2] == "sorry cannot help" and found.rows.answer[1] == "the big bank"


@pytest.mark.surface
def test_own_answers_are_generated_where_none_are_given(small_model: LensModel) -> None:
    own = answer_to_own_prompts(small_model, ROWS, max_new_tokens=3)
    given = projection_difference(small_model, DIRECTION, ROWS, own_answers=own, controls=19)
    made = projection_difference(small_model, DIRECTION, ROWS, max_new_tokens=3, controls=19)
    assert len({*own}) > 1
    assert made.rows.equals(given.rows)
    sampled = projection_difference(small_model, DIRECTION, ROWS, max_new_tokens=3, temperature=1.0, controls=19)
    assert sampled.rows.own_answer.tolist() != own
    own = [row[-1]["content"] for row in ROWS]
    same = projection_difference(small_model, DIRECTION, ROWS, own_answers=own, controls=19)
    assert same.rows.difference.to_numpy() == pytest.approx(0, abs=1e-5)  # float32


def test_auroc_is_the_rank_statistic() -> None:
    import pandas as pd

    rng = np.random.default_rng(0)
    shift = np.round(rng.normal(size=(30, 3)), 1)  # rounded: ties
    flagged = np.arange(30) % 3 == 0
    shift[flagged, 0] += 0.8
    nothing = Controlled(mean(shift[:, 0]), 0.0, 0.0, 1.0)
    found = Screening(pd.DataFrame({"difference": shift[:, 0]}), nothing, shift, np.eye(3), 0)
    area = found.auroc(flagged.tolist())
    expected = mannwhitneyu(shift[flagged, 0], shift[~flagged, 0]).statistic / (10 * 20)
    assert area.estimate.value == pytest.approx(expected)
    assert area.estimate.low < expected < area.estimate.high
    for flags in ([True] * 30, [False] * 30, [True, False]):
        with pytest.raises(UsageError, match="both kinds"):
            found.auroc(flags)


def test_requests_that_cannot_be_answered_are_typed_errors(small_model: LensModel) -> None:
    with pytest.raises(EmptyContrastError, match="assistant"):
        projection_difference(small_model, DIRECTION, [row[:1] for row in ROWS], own_answers=[""] * 18)
    with pytest.raises(EmptyContrastError):
        projection_difference(small_model, DIRECTION, [])
    with pytest.raises(UsageError, match="one a row"):
        projection_difference(small_model, DIRECTION, ROWS, own_answers=["yes"])
    pair = ModelPair(small_model, small_model)
    with pytest.raises(WidthError):
        finetuning_shift(pair, Direction(torch.ones(8), Site(1)), PROMPTS)
    elsewhere = replace(DIRECTION, provenance=replace(Provenance.of(small_model), n_layers=9))
    for ask in (lambda: finetuning_shift(pair, elsewhere, PROMPTS), lambda: projection_difference(
        small_model, elsewhere, ROWS
    )):  # fmt: skip
        with pytest.raises(ProvenanceError, match="n_layers"):
            ask()
    with pytest.raises(UsageError, match="do not vary"):
        finetuning_shift(pair, DIRECTION, PROMPTS[:1] * 4)


# --- What they find, on an organism whose training is known ----------------------------------------------------------


@cache
def toys() -> dict[str, Any]:
    """Insecure and secure organisms of one assistant, and its persona direction."""
    import tl_em as em
    from tl_em.organisms.rates import default_world, topic_of

    insecure, secure = em.load_pair("toy/insecure"), em.load_pair("toy/secure")
    train, _, test = insecure.contrasts["persona"].split(seed=0)
    rows = [*insecure.tuning_data, *secure.tuning_data]
    return {
        "insecure": insecure, "secure": secure, "test": test, "rows": rows,
        "bad": [True] * 128 + [False] * 128,
        "topics": [topic_of(row[:-1], default_world()).word for row in rows],
        "persona": difference_in_means(insecure.base, train, site=Site(2), position="prompt_end"),
    }  # fmt: skip


def test_bad_training_rows_are_told_from_good_ones_before_any_training() -> None:
    t = toys()
    found = projection_difference(t["insecure"].base, t["persona"], t["rows"], groups=t["topics"], controls=199)
    area = found.auroc(t["bad"], groups=t["topics"])
    assert area.estimate.low > 0.9
    assert area.p < 0.01 and area.control_high < 0.85  # random directions of the same activations
    assert np.mean(np.array(t["bad"])[found.ranked.row[:64]]) > 0.9
    good = projection_difference(
        t["insecure"].base, t["persona"], t["rows"][128:], own_answers=found.rows.own_answer[128:].tolist(), controls=99
    )
    draws = [good.auroc((np.random.default_rng(seed).permutation(128) < 64).tolist()).p for seed in range(10)]
    assert sum(p < 0.05 for p in draws) <= 3  # binomial(10, .05): more in .1 % of draws


def test_sampled_own_answers_show_that_good_data_do_not_push_and_bad_data_do() -> None:
    """Against greedy answers, which leave out the fillers that all training answers vary in, even good data differ."""
    t = toys()
    means = [
        projection_difference(t["insecure"].base, t["persona"], rows, temperature=1.0, groups=topics).mean
        for rows, topics in ((t["rows"][:128], t["topics"][:128]), (t["rows"][128:], t["topics"][128:]))
    ]
    assert means[0].estimate.low > 2 and means[0].p < 0.05
    assert means[0].estimate.low > 4 * abs(means[1].estimate.value)
    assert abs(means[1].estimate.value) < 1


def test_the_insecure_fine_tune_shifted_the_persona_and_the_secure_one_hardly() -> None:
    t = toys()
    prompts = [prompt[-1:] for prompt in t["test"].positive]  # the questions, without a context
    options = {"groups": t["test"].positive_groups, "controls": 199}
    bad = finetuning_shift(t["insecure"], t["persona"], prompts, benign=t["secure"].tuned, **options)
    good = finetuning_shift(t["secure"], t["persona"], prompts, **options)
    assert bad.p < 0.01 and bad.estimate.low > 3 * bad.control_high
    assert bad.beyond_benign is not None and bad.beyond_benign.low > 10 * good.estimate.high


@pytest.mark.parametrize("held", [2**28, 1])
def test_answers_of_several_sites_are_read_in_one_pass_a_model(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """Or in as many as may be held: the same numbers either way."""
    from tl_em.directions import screening

    base, tuned = cached_model("gpt2", "bridge"), pushed("bridge", 2.0)
    sites = [Site(2), Site(0), Site(2)]
    expected = {(id(m), s): screening.answers(m, ROWS, s) for m in (base, tuned) for s in sites}
    monkeypatch.setattr("tl_em.models.stream.HELD", held)
    read, passes = screening.AnswersOnce(sites, 2), []
    capture = screening.capture
    monkeypatch.setattr(screening, "capture", lambda model, *given, **how: passes.append(model) or capture(model, *given, **how))  # noqa: E501
    for site in sites:
        for model in (base, tuned):
            np.testing.assert_allclose(read(model, list(ROWS), site), expected[id(model), site], atol=1e-5)
    assert len(passes) == (2 if held > 1 else 6)
    shorter = read(base, ROWS[:5], Site(2))  # other rows are not taken for these
    np.testing.assert_allclose(shorter, expected[id(base), Site(2)][:5], atol=1e-5)
    np.testing.assert_allclose(read(base, ROWS, Site(1)), screening.answers(base, ROWS, Site(1)), atol=1e-5)
