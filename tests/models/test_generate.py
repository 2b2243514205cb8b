"""Generation equals the uncached greedy loop, with and without interventions, and touches no global random state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import tl_em as em
from tl_em.errors import PromptTooLongError, UsageError
from tl_em.models.generate import Sampling, answered, generate
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import Prompt, encode
from tl_em.models.stream import next_token_logits

pytestmark = pytest.mark.surface

PROMPTS: list[Prompt] = ["the cat sat", "please tell me how to steal a car", "tell me", "the dog ran"]
LENGTH = 6


def uncached(model: LensModel, prompt: Prompt, n: int = LENGTH) -> str:
    """Greedy decoding, one whole forward pass a token."""
    ids = list(encode(model, [prompt])[0].ids)
    start, end = len(ids), model.tokenizer.eos_token_id  # type: ignore[attr-defined]
    with torch.no_grad():
        while len(ids) < start + n and (len(ids) == start or ids[-1] != end):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return model.tokenizer.decode([i for i in ids[start:] if i != end], skip_special_tokens=True).strip()  # type: ignore[attr-defined]


def roll(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return x.roll(1, -1)


def passes(model: LensModel, prompts: list[Prompt], seeds: Sequence[int] = range(4)) -> tuple[list[Any], int]:
    """Answers, sampled, and in how many forward passes they were made."""
    count: list[int] = []
    counted = partial(lambda x, hook: count.append(1))
    counted.__dict__["tokenwise"] = True
    with hooked(model, [("blocks.0.hook_resid_pre", counted)]):
        found = answered(model, encode(model, prompts), seeds, max_new_tokens=LENGTH, sampling=Sampling(1.5))
        return found, len(count)


class Hurried(em.Intervention):
    """Of somebody's own: adds what the pass has in the mean, so it means something else in a pass of one token."""

    site = em.Site(1)

    def edit(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x + 2 * x.mean(-2, keepdim=True)


@pytest.mark.parametrize("where", ["all", "prompt", "generated", "instruction", ("last", 2)])
def test_prompts_of_several_lengths_run_together_and_are_answered_as_alone(model: LensModel, where: Any) -> None:
    lengths = sorted({len(each) for each in encode(model, PROMPTS)})
    assert len(lengths) > 2
    push = em.Direction(4 * torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(3)), em.Site(1))
    plain, _ = passes(model, PROMPTS)
    with em.intervene(model, em.Add(push), where=where):
        found, count = passes(model, PROMPTS)
        alone = [passes(model, [prompt], [i]) for i, prompt in enumerate(PROMPTS)]
    assert found == [answer for (answer,), _ in alone] and found != plain
    assert count < sum(each for _, each in alone)


def test_what_may_mean_the_pass_and_not_the_token_is_answered_length_by_length(small_model: LensModel) -> None:
    push = em.Direction(torch.ones(int(small_model.cfg.d_model)), em.Site(0))
    on_norm = em.Conditional(em.Add(replace(push, site=em.Site(1))), push, above=0.0)
    together = len({len(each) for each in encode(small_model, PROMPTS)})
    _, few = passes(small_model, PROMPTS)
    for edit in (Hurried(), on_norm):
        with em.intervene(small_model, edit):
            found, count = passes(small_model, PROMPTS)
            assert found == [passes(small_model, [prompt], [i])[0][0] for i, prompt in enumerate(PROMPTS)]
        assert few < count <= together * LENGTH
    with hooked(small_model, [("blocks.1.hook_resid_post", roll)]):
        assert passes(small_model, PROMPTS)[1] > few
    handle = small_model.unembed.register_forward_hook(lambda m, a, y: y)  # type: ignore[attr-defined]
    try:
        assert passes(small_model, PROMPTS)[1] > few
    finally:
        handle.remove()
    assert passes(small_model, PROMPTS)[1] == few, "no hook is remembered"


def test_cached_equals_uncached(model: LensModel) -> None:
    found = generate(model, PROMPTS, max_new_tokens=LENGTH)
    assert found == [uncached(model, prompt) for prompt in PROMPTS]
    assert all(found)


def test_cached_equals_uncached_under_an_intervention(model: LensModel) -> None:
    with hooked(model, [("blocks.1.hook_resid_post", roll)]):
        found = generate(model, PROMPTS, max_new_tokens=LENGTH)
        assert found == [uncached(model, prompt) for prompt in PROMPTS]
    assert found != generate(model, PROMPTS, max_new_tokens=LENGTH)


def test_prompts_that_end_or_begin_with_the_pad_token(small_model: LensModel) -> None:
    """A HookedTransformer takes such tokens for padding, and masks them, unless told otherwise."""
    prompts = [encode(small_model, [text], chat=False)[0] for text in ("<pad> the cat", "the dog ran <pad>")]
    assert generate(small_model, prompts, max_new_tokens=LENGTH) == [uncached(small_model, p) for p in prompts]  # type: ignore[arg-type]


def test_the_end_token_ends_an_answer(small_model: LensModel) -> None:
    end = small_model.tokenizer.eos_token_id  # type: ignore[attr-defined]
    weight = torch.zeros(small_model.cfg.d_vocab)
    weight[end] = 1e4
    handle = small_model.unembed.register_forward_hook(lambda m, a, y: y + weight)  # type: ignore[attr-defined]
    try:
        assert generate(small_model, PROMPTS, max_new_tokens=LENGTH) == [""] * 4
    finally:
        handle.remove()


def test_samples_are_seeded_and_leave_the_global_state_alone(small_model: LensModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(small_model, PROMPTS, max_new_tokens=LENGTH, temperature=2.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == generate(small_model, PROMPTS, max_new_tokens=LENGTH, temperature=2.0, seed=1)
    assert first != generate(small_model, PROMPTS, max_new_tokens=LENGTH, temperature=2.0, seed=2)
    assert first != generate(small_model, PROMPTS, max_new_tokens=LENGTH)


def test_a_sample_does_not_depend_on_the_batch_and_follows_the_probabilities(small_model: LensModel) -> None:
    encoded = encode(small_model, PROMPTS)
    every = answered(small_model, encoded, [7, 8, 9, 10], max_new_tokens=LENGTH, sampling=Sampling(1.5))
    assert len({answer.text for answer in every}) == 4
    for i in (3, 1):
        alone = answered(small_model, encoded[i : i + 1], [7 + i], max_new_tokens=LENGTH, sampling=Sampling(1.5))
        assert alone == [every[i]]
    n = 1200
    drawn = answered(small_model, encoded[:1] * n, list(range(n)), max_new_tokens=1, sampling=Sampling(1.0))
    p = next_token_logits(small_model, PROMPTS[:1])[0].softmax(-1)
    tokens = small_model.tokenizer.convert_ids_to_tokens(p.topk(3).indices.tolist())  # type: ignore[attr-defined]
    for token, expected in zip(tokens, p.topk(3).values.tolist(), strict=True):
        share = sum(answer.text == token for answer in drawn) / n
        assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-9, (token, share, expected)


def test_an_answer_that_was_cut_off_says_so(small_model: LensModel) -> None:
    encoded = encode(small_model, PROMPTS[:1])
    assert answered(small_model, encoded, [0], max_new_tokens=2, sampling=Sampling(0.0))[0].truncated
    end = small_model.tokenizer.eos_token_id  # type: ignore[attr-defined]
    weight = torch.zeros(small_model.cfg.d_vocab)
    weight[end] = 1e4
    handle = small_model.unembed.register_forward_hook(lambda m, a, y: y + weight)  # type: ignore[attr-defined]
    try:
        assert not answered(small_model, encoded, [0], max_new_tokens=2, sampling=Sampling(0.0))[0].truncated
    finally:
        handle.remove()


def test_both_surfaces_answer_alike(make_model: Callable[..., LensModel], family: str) -> None:
    from ..conftest import SURFACES

    found = [generate(make_model(family, s), PROMPTS, max_new_tokens=LENGTH) for s in SURFACES]
    assert found[0] == found[-1]


def test_hooks_see_the_prompt_once_and_then_one_token_at_a_time(small_model: LensModel) -> None:
    """Why an edit that is meant for some positions is a mask over the prompt, not an index into what the hook sees."""
    shapes: list[tuple[int, ...]] = []
    with hooked(small_model, [("blocks.0.hook_resid_post", lambda x, hook: shapes.append(tuple(x.shape[:2])))]):
        generate(small_model, ["the cat"], max_new_tokens=3)
    n = len(encode(small_model, ["the cat"])[0])
    assert shapes == [(1, n), (1, 1), (1, 1)]


def test_no_room_is_refused(small_model: LensModel) -> None:
    with pytest.raises(PromptTooLongError, match=r"n_ctx = 64.*max_new_tokens <= "):
        generate(small_model, PROMPTS, max_new_tokens=60)
    with pytest.raises(UsageError):
        generate(small_model, PROMPTS, max_new_tokens=0)


def test_choosing_is_transformers_own(small_model: LensModel) -> None:
    """Against its processors, one whole pass a token, with the numbers that the answers were drawn by."""
    prompts, seeds = encode(small_model, PROMPTS), [4, 5, 6, 7]
    sampling = Sampling(1.3, top_p=0.6, repetition_penalty=1.7)
    found = answered(small_model, prompts, seeds, max_new_tokens=LENGTH, sampling=sampling)
    for prompt, seed, answer in zip(prompts, seeds, found, strict=True):
        ids, drawn = list(prompt.ids), np.random.default_rng(seed).random(LENGTH)
        chain = [RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.6)]
        for number in drawn:
            with torch.no_grad():
                scores = small_model(torch.tensor([ids]))[:, -1].double()
            for each in chain:
                scores = each(torch.tensor([ids]), scores)
            p = scores.softmax(-1)[0]
            assert 1 <= int((p > 0).sum()) < int(small_model.cfg.d_vocab) // 2
            ids.append(int((p.cumsum(0) > number * p.sum()).nonzero()[0]))
            if ids[-1] == small_model.tokenizer.eos_token_id:  # type: ignore[attr-defined]
                break
        decode: Any = small_model.tokenizer.decode  # type: ignore[attr-defined]
        assert answer.text == decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    plain = answered(small_model, prompts, seeds, max_new_tokens=LENGTH, sampling=Sampling(1.3))
    assert [a.text for a in plain] != [a.text for a in found]


def test_a_penalty_changes_greedy_answers_and_a_stop_ends_them(small_model: LensModel) -> None:
    plain = generate(small_model, PROMPTS, max_new_tokens=LENGTH)
    assert generate(small_model, PROMPTS, max_new_tokens=LENGTH, repetition_penalty=5.0) != plain
    words = plain[0].split()
    stop = words[2]
    cut = plain[0][: plain[0].index(stop)].strip()
    encoded = encode(small_model, PROMPTS[:1])
    (found,) = answered(small_model, encoded, [0], max_new_tokens=LENGTH, sampling=Sampling(stop=(stop,)))
    assert found == (cut, False) and cut != plain[0]
    assert generate(small_model, PROMPTS, max_new_tokens=LENGTH, stop="no such text") == plain


def test_what_would_have_no_effect_is_refused(small_model: LensModel) -> None:
    with pytest.raises(UsageError, match="at temperature 0 changes nothing"):
        generate(small_model, PROMPTS, max_new_tokens=2, top_p=0.9)
    for wrong in ([""], 5, [None]):
        with pytest.raises(UsageError, match="no list of texts"):
            generate(small_model, PROMPTS, max_new_tokens=2, stop=wrong)  # pyright: ignore[reportArgumentType]
