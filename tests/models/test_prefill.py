"""Prompts of several lengths are read side by side, equal ones once, and answered as alone; several samples of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import tl_em as em
from tl_em.errors import UsageError
from tl_em.evals.questions import OpenQuestion, QuestionSet
from tl_em.models import cache, proof
from tl_em.models.generate import Answered, Sampling, answered, answered_together, generate
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.loading import load_model
from tl_em.models.prefill import allow_side_by_side, may_read_side_by_side
from tl_em.models.prompts import Batch, EncodedPrompt, make_batch
from tl_em.models.stream import current_batch, next_token_logits
from tl_em.models.token_scopes import scope_mask

from ..conftest import benchmark
from . import zoo

pytestmark = pytest.mark.surface

LENGTHS, NEW = (13, 6, 9, 6, 11), 5
SCOPES: list[Any] = ["all", "prompt", "generated", "instruction", ("last", 1), ("last", 3)]
GREEDY, SAMPLED = Sampling(), Sampling(1.5, top_p=0.9, repetition_penalty=1.3)
FAMILIES = (
    *("llama", "llama biases, wide heads", "qwen3", "gemma3", "mistral window", "phi3", "olmo2", "glm4"),
    *("gpt2", "opt", "xglm", "gpt-neo", "gpt-bigcode"),  # learned absolute positions
    *("bloom", "gptj", "gpt-neox parallel", "falcon multi-query", "stablelm parallel, qk-norm"),
    *("mixtral", "gpt-oss", "deepseek-v3", "llama4 text"),
)
ONE_BY_ONE = ("mamba", "falcon-h1", "qwen3-next")
"""With a state that padding would enter."""
ALIBI = ("mpt", "falcon alibi")
"""Side by side where TransformerLens's own attention of them keeps keys and values: from version 4 on."""


def asked(
    lengths: Sequence[int] = LENGTHS, equal: Sequence[tuple[int, int]] = ((1, 3),), *, begun: int = 0
) -> list[EncodedPrompt]:
    """Prompts with an instruction and a beginning in common; the two of each pair are one prompt."""
    draw = torch.Generator().manual_seed(2)
    head = torch.randint(7, 50, (begun,), generator=draw).tolist()
    found = []
    for k, n in enumerate(lengths):
        rest = torch.randint(7, 50, (n - begun - 1,), generator=draw).tolist()
        found.append(EncodedPrompt((*head, 10 + k, *rest), (2, n - 2), n - 1, None, ""))
    for a, b in equal:
        found[b] = found[a]
    return found


def direction(model: Any, size: float = 4.0) -> em.Direction:
    vector = torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(4))
    return em.Direction(size * vector, em.Site(1))


@contextmanager
def one_by_one(model: Any) -> Iterator[None]:
    """As a model that was not shown to read prompts side by side."""
    allow_side_by_side(model, False)
    try:
        yield
    finally:
        allow_side_by_side(model, True)


def answers(model: Any, prompts: Sequence[EncodedPrompt], sampling: Sampling = GREEDY) -> list[Answered]:
    return answered(model, prompts, range(len(prompts)), max_new_tokens=NEW, sampling=sampling)


def alone(model: Any, prompts: Sequence[EncodedPrompt], sampling: Sampling = GREEDY) -> list[Answered]:
    made = [answered(model, [p], [i], max_new_tokens=NEW, sampling=sampling) for i, p in enumerate(prompts)]
    return [answer for (answer,) in made]


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shape [row, token] of every pass, seen by a hook that stands in nobody's way."""
    seen: list[tuple[int, ...]] = []
    look = partial(lambda x, hook: seen.append(tuple(x.shape[:2])))
    look.__dict__.update(tokenwise=True, alike=lambda batch, length: [0] * len(batch.rows))
    with hooked(model, [("blocks.0.hook_resid_pre", look)]):
        yield seen


def may(model: Any) -> bool:
    return may_read_side_by_side(model, max(LENGTHS) + NEW)


# --- The proof --------------------------------------------------------------------------------------------------------


def test_every_family_shows_it(model: LensModel) -> None:
    shown = proof.proof(model)
    assert shown is not None and shown.side_by_side is not None and shown.side_by_side < 1e-4
    assert "prompts side by side (" in str(shown)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_each_prompt_alone_in_many_architectures(name: str) -> None:
    model = load_model(benchmark("families").named(name).make())
    assert may_read_side_by_side(model, 11 + NEW)  # within the windows of 16 tokens, answers included
    for prompts, first in ((asked((7, 5, 4, 5, 6)), [(4, 7)]), (asked((11, 10, 9, 10), begun=8), [(1, 8), (3, 3)])):
        with passes(model) as seen:
            found = answers(model, prompts)
        assert seen == [*first, *[(len(prompts), 1)] * (NEW - 1)]
        assert found == alone(model, prompts)
        with torch.no_grad():  # the same without any of it: one whole pass a token
            for prompt, answer in zip(prompts, found, strict=True):
                ids = list(prompt.ids)
                for _ in range(NEW):
                    ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
                assert answer.text == " ".join(map(str, ids[len(prompt) :]))


@pytest.mark.parametrize("name", [*ONE_BY_ONE, *ALIBI])
def test_what_padding_would_change_is_read_without(name: str) -> None:
    model, prompts = load_model(benchmark("families").named(name).make()), asked()
    shown = proof.proof(model)
    assert shown is not None and shown.cache is not None
    assert (shown.side_by_side is not None) is may(model)
    assert name in ALIBI or not may(model)
    assert answers(model, prompts) == alone(model, prompts)


@pytest.mark.parametrize("fault", ["keys stay", "nothing is masked", "a neighbour's"])
def test_what_is_read_on_wrongly_is_found(fault: str, surface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a cache of somebody else's does: here, a part of ours that is changed behind its back."""
    right, prompts = alone(load_model(zoo.llama(), surface=surface), asked()), asked()
    if fault == "keys stay":
        monkeypatch.setattr(cache, "_to_the_end", lambda lengths, width: lambda x, along: x)
    elif fault == "nothing is masked":
        monkeypatch.setattr(cache, "_padding", lambda lengths, width: torch.ones(len(lengths), width).long())
    else:
        kind = cache._BridgeReads if surface == "bridge" else cache._HookedReads
        go_on = kind.go_on
        monkeypatch.setattr(kind, "go_on", lambda self, held, rows, **to: go_on(self, held, rows and rows[::-1], **to))
    model = load_model(zoo.llama(), surface=surface)
    shown = proof.proof(model)
    assert shown is not None and shown.cache is not None and shown.side_by_side is None
    assert (shown.beginning is None) is (fault == "a neighbour's")
    assert answers(model, prompts) == right


def test_it_ends_at_the_first_window(model: LensModel, family: str) -> None:
    at = {"gemma2": 8}.get(family, 64)
    assert may_read_side_by_side(model, at) and may_read_side_by_side(model, at + 1) is (family != "gemma2")


# --- Under interventions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", SCOPES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("begun", [0, 8])
def test_edits_act_on_the_tokens_that_they_act_on_alone(model: Any, where: Any, sampling: Sampling, begun: int) -> None:
    prompts, push = asked((13, 10, 12, 10, 11) if begun else LENGTHS, begun=begun), direction(model)
    plain = answers(model, prompts, sampling)
    for edit in (em.Add(push), em.Ablate(push, around=10 * push.vector)):
        with em.intervene(model, edit, where=where), passes(model) as seen:
            found = answers(model, prompts, sampling)
            count = len(seen)
            assert found == alone(model, prompts, sampling), edit
        assert found != plain
        if may(model) and begun:  # of the last three tokens of the shortest prompts one lies in the beginning
            assert count == NEW + 1 and seen[:2] == [(2 if where == ("last", 3) else 1, 8), (4, 5)]
        elif may(model):
            assert count == NEW and seen[0] == (4, max(LENGTHS))


def test_a_stop_ends_an_answer_beside_others(small_model: Any) -> None:
    prompts = asked()
    stop = next(iter(answers(small_model, prompts)[0].text.split()[2:]))
    sampling = Sampling(stop=(stop,))
    found = answers(small_model, prompts, sampling)
    assert found == alone(small_model, prompts, sampling) != answers(small_model, prompts)
    assert not found[0].truncated


def test_the_end_token_ends_an_answer_beside_others(small_model: Any) -> None:
    prompts, end = asked(), small_model.tokenizer.eos_token_id
    towards = em.Direction(small_model.W_U[:, end].detach().clone(), em.Site(int(small_model.cfg.n_layers) - 1))
    with em.intervene(small_model, em.Add(towards, 3.0)):
        found = answers(small_model, prompts, SAMPLED)
        assert found == alone(small_model, prompts, SAMPLED)
    assert {each.truncated for each in found} == {True, False}


@pytest.mark.parametrize("begun", [0, 8])
def test_hooks_know_which_tokens_pass(small_model: Any, begun: int) -> None:
    """Places and scopes of every pass are those of whole texts; padding is in none but "all"."""
    prompts, seen = asked((13, 10, 12, 10, 11), begun=begun), []

    def look(x: torch.Tensor, hook: Any) -> None:
        batch = current_batch.get()
        assert batch is not None
        masks = [scope_mask(batch, where, x.shape[1]) for where in SCOPES[1:]]
        seen.append((batch.rows, batch.starts.tolist(), batch.lengths.tolist(), x.shape[1], masks))

    def labels(batch: Batch, length: int) -> list[Any]:
        return torch.cat([scope_mask(batch, where, length) for where in SCOPES[1:]], 1).tolist()

    look.__dict__.update(tokenwise=True, alike=lambda batch, length: list(map(tuple, labels(batch, length))))
    with hooked(small_model, [("blocks.1.hook_resid_post", look)]):
        answers(small_model, prompts)
    reads = 1 + bool(begun)
    assert len(seen) == NEW + reads - 1
    rows, firsts = seen[-1][0], seen[reads - 1][0]
    (again,) = set(rows) - set(firsts)
    assert sorted(rows) == [0, 1, 2, 3, 4] and again in (1, 3), "they are one prompt"
    whole = make_batch([each.with_response([1] * (NEW - 1)) for each in prompts], range(5))
    for k, where in enumerate(SCOPES[1:]):
        right = scope_mask(whole, where, whole.tokens.shape[1])
        found = torch.zeros_like(right)
        for own, starts, lengths, width, masks in seen:
            for row, (prompt, start, length) in enumerate(zip(own, starts, lengths, strict=True)):
                found[prompt, start : start + width] |= masks[k][row]
                assert not masks[k][row, max(length - start, 0) :].any()
        found[again] |= found[4 - again] & (torch.arange(right.shape[1]) < len(prompts[again]))
        if begun:
            head = labels(whole, begun)
            for row in range(5):
                (like,) = [read for read in seen[0][0] if head[read] == head[row]]
                found[row, :begun] |= found[like, :begun]
        assert torch.equal(found, right), where
    for step, (_, starts, lengths, width, _) in enumerate(seen[reads:]):
        assert width == 1 and starts == [len(prompts[row]) + step for row in rows]
        assert lengths == [start + 1 for start in starts]


def test_reading_along_reads_each_text_s_own_tokens(small_model: Any) -> None:
    prompts, told = asked(), []
    options: dict[str, Any] = {"max_new_tokens": NEW, "directions": {"d": direction(small_model)}}
    together = em.read(small_model, prompts, above={"d": 0.0}, alarm=told.append, **options)
    for i, prompt in enumerate(prompts):
        one = em.read(small_model, [prompt], **options)
        mine = together.table[together.table.prompt == i]
        assert mine.token.tolist() == one.table.token.tolist()
        assert mine.d.to_numpy() == pytest.approx(one.table.d.to_numpy(), abs=1e-4)
        above = one.table[one.table.d > 0]
        assert [(each.at, each.answer) for each in told if each.prompt == i] == [
            (at, part == "answer") for at, part in zip(above["at"], above.part, strict=True)
        ]
    assert told


def test_what_may_mean_the_pass_stands_alone(small_model: Any) -> None:
    push = direction(small_model)
    gated = em.Conditional(em.Add(push), replace(push, site=em.Site(0)), above=0.0)
    with em.intervene(small_model, gated), passes(small_model) as seen:
        found = answers(small_model, asked())
        count = len(seen)
        assert found == alone(small_model, asked())
    assert count == NEW * len(set(LENGTHS))


def test_without_it_prompts_are_read_up_to_the_shortest_one_s_end(small_model: Any) -> None:
    prompts = asked()
    with passes(small_model) as seen:
        beside = answers(small_model, prompts, SAMPLED)
        count = len(seen)
        with one_by_one(small_model):
            assert answers(small_model, prompts, SAMPLED) == beside
    assert count == NEW < len(seen) - count


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_lengths_far_apart_are_not_padded_to_each_other(small_model: Any) -> None:
    short, long = [5] * 63, [60]
    found = answered_together(small_model, asked([*short, *long], ()), 1)
    assert sorted(map(len, found)) == [1, 63]
    near = answered_together(small_model, asked([5, 9, 7, 6], ()), 4)
    assert [sorted(each) for each in near] == [[0, 1, 2, 3]]
    many = answered_together(small_model, asked([5, 7] * 50, ()), 4)
    assert sorted(i for each in many for i in each) == list(range(100)) and max(map(len, many)) <= 64


def test_logits_are_made_of_the_last_tokens_alone(small_model: Any) -> None:
    unembedded: list[int] = []

    def count(module: Any, args: Any, y: torch.Tensor) -> None:
        unembedded.append(y.shape[0] * y.shape[1])

    count.__module__ = "tl_em.of_a_test"  # of nobody else's, so it stands in nobody's way
    handle = small_model.unembed.register_forward_hook(count)
    try:
        answers(small_model, asked())
    finally:
        handle.remove()
    assert unembedded == [4, *[5] * (NEW - 1)]


# --- Several samples --------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_how_many_there_are(model: Any) -> None:
    prompts, options = asked(), {"max_new_tokens": NEW, "temperature": 1.5, "seed": 3}
    one = generate(model, prompts, **options)
    few = generate(model, prompts, samples=2, **options)
    many = generate(model, prompts, samples=15, **options)  # more than fit one batch
    assert [each[:2] for each in many] == few and [each[0] for each in few] == one
    assert all(len(set(each)) > 7 for each in many)
    assert many[1] != many[3], "one prompt twice has samples of its own each time"
    assert many != generate(model, prompts, samples=15, **options | {"seed": 4})
    greedy = generate(model, prompts, max_new_tokens=NEW)
    assert generate(model, prompts, samples=1, max_new_tokens=NEW) == [[answer] for answer in greedy]


def test_a_prompt_is_read_once_for_all_its_samples(model: Any) -> None:
    prompt, push = asked()[:1], direction(model)
    for edit, scope in ((em.Add(push), "all"), (em.Ablate(push), "prompt"), (em.Add(push), "generated")):
        with em.intervene(model, edit, where=scope), passes(model) as seen:  # pyright: ignore[reportArgumentType]
            (found,) = generate(model, prompt, max_new_tokens=NEW, temperature=1.5, samples=6)
            assert seen == [(1, 13), *[(6, 1)] * (NEW - 1)]
            seeds = [(0, 0), *((0, 0, j) for j in range(1, 6))]
            each = [answered(model, prompt, [s], max_new_tokens=NEW, sampling=Sampling(1.5))[0].text for s in seeds]
        assert found == each


def test_a_hook_that_does_not_say_so_sees_every_sample_s_prompt(small_model: Any) -> None:
    seen: list[tuple[int, ...]] = []
    with hooked(small_model, [("blocks.0.hook_resid_pre", lambda x, hook: seen.append(tuple(x.shape[:2])))]):
        generate(small_model, asked()[:1], max_new_tokens=2, temperature=1.0, samples=3)
    assert seen == [(3, 13), (3, 1)]


@pytest.mark.parametrize("begun", [0, 8])
def test_equal_prompts_that_a_hook_treats_differently_are_read_apart(small_model: Any, begun: int) -> None:
    """An edit of a row's own, which says so: nothing of an unequal row may be shared."""
    prompts = asked((13, 10, 12, 10, 11, 12, 10), ((1, 3), (2, 5), (1, 6)), begun=begun)
    pushes = torch.randn(2, int(small_model.cfg.d_model), generator=torch.Generator().manual_seed(5))

    def push(x: torch.Tensor, hook: Any, *, only: int | None = None) -> torch.Tensor:
        batch = current_batch.get()
        assert batch is not None
        which = [row % 2 for row in batch.rows] if only is None else [only] * len(x)
        return x + 3 * pushes[which][:, None]

    def pushed(only: int | None) -> Any:
        hook = partial(push, only=only)
        hook.__dict__.update(tokenwise=True, alike=lambda batch, length: [row % 2 for row in batch.rows])
        return hooked(small_model, [("blocks.1.hook_resid_post", hook)])

    with pushed(None), passes(small_model) as seen:
        found = answers(small_model, prompts)
    assert seen[bool(begun)][0] == 6, "1 and 3 are one prompt with one edit; 2 and 5, 1 and 6 have two"
    assert not begun or seen[0] == (2, 8)
    for i, prompt in enumerate(prompts):
        with pushed(i % 2):
            (answer,) = answered(small_model, [prompt], [i], max_new_tokens=NEW, sampling=GREEDY)
        assert found[i] == answer
    assert len({answer.text for answer in found}) >= 4


def test_samples_follow_the_probabilities(small_model: Any) -> None:
    prompt, n = asked()[:1], 1200
    (drawn,) = generate(small_model, prompt, max_new_tokens=1, temperature=1.0, samples=n)
    p = next_token_logits(small_model, prompt)[0].softmax(-1)
    tokens = small_model.tokenizer.convert_ids_to_tokens(p.topk(3).indices.tolist())
    for token, expected in zip(tokens, p.topk(3).values.tolist(), strict=True):
        assert abs(drawn.count(token) / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-9


def test_several_samples_that_would_be_equal_are_refused(small_model: Any) -> None:
    with pytest.raises(UsageError, match=r"at temperature 0 all 3 samples .* temperature=1, or samples=1"):
        generate(small_model, asked(), max_new_tokens=2, samples=3)
    for wrong in (0, -1, 1.5, "two"):
        with pytest.raises(UsageError, match="samples"):
            generate(small_model, asked(), max_new_tokens=2, temperature=1.0, samples=wrong)  # pyright: ignore


def test_evaluations_read_a_question_once(small_model: Any) -> None:
    questions = QuestionSet((OpenQuestion("a", ("the cat sat",), 5, 1.0),))
    with passes(small_model) as seen:
        em.evaluate(small_model, questions, judge=lambda prompts, said: [0.5] * len(said),
                    max_new_tokens=3)  # fmt: skip
    assert seen[0][0] == 1 and {rows for rows, width in seen[1:]} == {5}
