"""What prompts begin with alike is read once, and nothing that comes out tells; which hooks allow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_em as em
from tests.conftest import make_tokenizer
from tl_em.interventions.many import Along, along_each
from tl_em.models import beginnings, proof, stream
from tl_em.models.beginnings import Piece, allow_beginnings
from tl_em.models.cache import reading_on
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.responses import mean_logprob
from tl_em.models.stream import captured, next_token_logits, sequence_logprobs
from tl_em.models.unembedding import ends_plainly

pytestmark = pytest.mark.surface
LENGTHS, BEGUN = (15, 19, 22, 17), 9
SITES = [em.Site(0), em.Site(1)]
SCOPES: list[Any] = ["all", "prompt", "generated", "instruction", ("last", 2), ("last", 4)]


def prompts(lengths: tuple[int, ...] = LENGTHS, begun: int = BEGUN) -> list[EncodedPrompt]:
    """Prompts with a beginning in common, an instruction after it, and an answer of three tokens."""
    draw = torch.Generator().manual_seed(2)
    head = torch.randint(40, (begun,), generator=draw).tolist()
    found = []
    for k, length in enumerate(lengths):
        ids = (*head, 30 + k, *torch.randint(40, (length - begun - 1,), generator=draw).tolist())
        found.append(EncodedPrompt(ids, (begun + 1, length - 4), length - 4, (length - 3, length), ""))
    return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Piece | None]]:
    """What every batch went on from."""
    found: list[Piece | None] = []
    whole = stream._LogitReader.whole

    def spy(self: Any, piece: Piece) -> Any:
        found.append(piece.after)
        return whole(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(stream._LogitReader, "whole", spy)
        yield found


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Every prompt is read from its first token."""
    allow_beginnings(model, False)
    try:
        yield
    finally:
        allow_beginnings(model, True)


def test_the_last_piece_keeps_nothing_and_leaves_what_it_goes_on_from(model: LensModel) -> None:
    tokens = torch.tensor([[*range(20, 32)]]).expand(3, -1)
    with torch.no_grad(), reading_on(model) as read:
        read(tokens[:1, :9])
        held = read.held
        read.go_on(held, [0, 0, 0])
        expected = read(tokens[:, 9:])
        for _ in range(2):
            read.go_on(held, [0, 0, 0], last=True)
            torch.testing.assert_close(read(tokens[:, 9:]), expected, rtol=0, atol=0)
        kept: Any = read.held
        read.go_on(held, [0, 0, 0])
        torch.testing.assert_close(read(tokens[:, 9:]), expected, rtol=0, atol=0)
    if hasattr(model, "original_model"):
        sizes = [each.untyped_storage().nbytes() for layer in kept.layers for each in (layer.keys, layer.values)]
        assert set(sizes) == {4} and kept.get_seq_length() == 12
    else:
        assert {entry.past_keys.shape[1] for entry in kept.entries} == {9}


def direction(model: Any) -> em.Direction:
    d_model = int(model.cfg.d_model)
    return em.Direction(torch.randn(d_model, generator=torch.Generator().manual_seed(4)), em.Site(0))


def test_it_is_shown_for_every_model_with_a_cache(model: LensModel) -> None:
    shown = proof.proof(model)
    assert shown is not None and shown.cache is not None
    assert shown.beginning is not None and shown.beginning < 2e-4


@pytest.mark.parametrize("where", SCOPES)
def test_it_gives_what_whole_prompts_give_under_an_intervention(
    small_model: Any, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, edit = prompts(), em.Add(direction(small_model), 3.0)
    read: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: next_token_logits(small_model, asked),
        "answers": lambda: sequence_logprobs(small_model, asked),
        "activations": lambda: captured(small_model, asked, SITES, ["prompt_end", "response_mean"]),
    }
    for name, f in read.items():
        with em.intervene(small_model, edit, where=where), counted(monkeypatch) as found:
            once = f()
            with whole(small_model):
                apart = f()
        plain = f()
        # of the last four tokens of the shortest prompt one lies in the beginning: then not all rows are of one group
        assert found[0] is not None and found[1] is None, name
        assert len(found[0].batch.rows) == (2 if where == ("last", 4) else 1), name
        assert (once - apart).abs().max() < 1e-4 * apart.abs().max() < (plain - apart).abs().max(), name


def test_every_family_gives_the_same(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts()
    with counted(monkeypatch) as found:
        once = next_token_logits(model, asked)
        with whole(model):
            apart = next_token_logits(model, asked)
    assert found[0] is not None and found[0].batch.tokens.shape[1] == BEGUN
    torch.testing.assert_close(once, apart, atol=1e-4 * float(apart.std()), rtol=1e-4)


def test_many_directions_share_it_each_its_own(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, vectors = prompts(), torch.randn(5, int(small_model.cfg.d_model), generator=torch.Generator().manual_seed(1))
    edits = Along(em.Ablate(direction(small_model)), vectors)
    with counted(monkeypatch) as found:
        once = along_each(small_model, edits, asked, sequence_logprobs)
    assert any(each is not None and len(each.batch.rows) == len(vectors) for each in found)
    for k in range(len(vectors)):
        with whole(small_model), em.intervene(small_model, edits.alone(k)):
            assert once[k] == pytest.approx(sequence_logprobs(small_model, asked).numpy(), abs=1e-4)
    assert once.std(0).min() > 1e-3


def test_what_lies_in_the_beginning_is_read_whole(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts()
    with counted(monkeypatch) as found:
        everywhere = captured(small_model, asked, SITES, ["all"])
        early = captured(small_model, asked, SITES, [-9])
    assert found == [None, None]
    with whole(small_model):
        torch.testing.assert_close(everywhere, captured(small_model, asked, SITES, ["all"]))
        torch.testing.assert_close(early, captured(small_model, asked, SITES, [-9]))


@dataclass(frozen=True, eq=False)
class Louder(em.Intervention):
    """One of a stranger's own: it may look at other tokens, and nobody knows."""

    site: em.Site = SITES[1]

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        return x * x.shape[1]


class Tokenwise(Louder):
    tokenwise = True

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        return x * 2


def test_a_hook_that_does_not_say_so_sees_whole_prompts(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def note(x: Tensor, hook: Any) -> None:
        widths.append(x.shape[1])

    name, asked = "blocks.1.hook_resid_post", prompts()
    with hooked(small_model, [(name, note)]):
        next_token_logits(small_model, asked)
    small_model.add_hook(name, note)
    try:
        next_token_logits(small_model, asked)
    finally:
        small_model.reset_hooks()
    handle = small_model.blocks[1].register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    next_token_logits(small_model, asked)
    handle.remove()
    assert widths == [max(LENGTHS)] * 3
    for edit, shared in ((Louder(), False), (Tokenwise(), True)):
        with em.intervene(small_model, edit), counted(monkeypatch) as found:
            next_token_logits(small_model, asked)
        assert (found[0] is not None) is shared, edit


@pytest.mark.parametrize(
    ("lengths", "begun"), [(LENGTHS[:1], BEGUN), (LENGTHS, 5), ((120, 130), BEGUN)], ids=["one", "short", "hardly any"]
)
def test_it_is_read_once_only_where_that_is_worth_a_pass(
    small_model: Any, lengths: tuple[int, ...], begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = tuple(min(each, int(small_model.cfg.n_ctx)) for each in lengths)
    with counted(monkeypatch) as found:
        next_token_logits(small_model, prompts(fits, begun))
    assert found == [None]


def test_a_model_that_was_shown_nothing_reads_whole(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as found, whole(small_model):
        next_token_logits(small_model, prompts())
    assert found == [None]


def test_tokens_read_are_those_of_one_beginning_and_of_every_rest(small_model: Any) -> None:
    read: list[int] = []

    @dataclass(frozen=True, eq=False)
    class Counting(Tokenwise):
        def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
            read.append(x.shape[0] * x.shape[1])
            return x

    with em.intervene(small_model, Counting()):
        next_token_logits(small_model, prompts())
    assert read == [BEGUN, len(LENGTHS) * (max(LENGTHS) - BEGUN)]


# --- Questions with several answers -----------------------------------------------------------------------------------

QUESTIONS, ANSWERS = (6, 9, 9), ((2, 5), (3, 3, 1), (4,))
"""Tokens of each question after what all begin with, and of each of its answers."""


def answered() -> list[EncodedPrompt]:
    """Questions, each as often as it has answers."""
    draw = torch.Generator().manual_seed(5)
    head = torch.randint(40, (BEGUN,), generator=draw).tolist()
    found = []
    for k, (length, answers) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        question = (*head, 30 + k, *torch.randint(40, (length - 1,), generator=draw).tolist())
        plain = EncodedPrompt(question, (BEGUN, len(question) - 1), len(question) - 1, None, "")
        found += [plain.with_response(torch.randint(40, (n,), generator=draw).tolist()) for n in answers]
    return found


@contextmanager
def free_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Piece | None]]:
    """As if passes cost nothing but their tokens, as in a large model."""
    with counted(monkeypatch) as found, monkeypatch.context() as patch:
        patch.setattr(beginnings, "_a_pass", lambda model: 1.0)
        yield found


@pytest.mark.parametrize("where", SCOPES)
def test_a_question_is_read_once_for_all_of_its_answers(
    small_model: Any, where: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, edit = answered(), em.Add(direction(small_model), 3.0)
    with em.intervene(small_model, edit, where=where), free_passes(monkeypatch) as found:
        once = sequence_logprobs(small_model, asked)
        with whole(small_model):
            apart = sequence_logprobs(small_model, asked)
    assert any(each is not None and each.after is not None for each in found)
    assert (once - apart).abs().max() < 1e-4 * apart.abs().max()
    assert (sequence_logprobs(small_model, asked) - apart).abs().max() > 1e-2


def test_every_token_of_questions_and_answers_is_read_once(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []

    @dataclass(frozen=True, eq=False)
    class Counting(Tokenwise):
        def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
            read.append(tuple(x.shape[:2]))
            return x

    with em.intervene(small_model, Counting()), free_passes(monkeypatch):
        sequence_logprobs(small_model, answered())
    # the root; of each length of questions: the questions but for their last token, which predicts; and the answers
    # with it, padded to the longest of them
    assert read[0] == (1, BEGUN)
    assert sorted(read[1:]) == sorted([(1, 5), (2, 6), (2, 8), (4, 5)])


def test_directions_that_join_midway_share_it_each_its_own(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answered()
    vectors = 3 * torch.randn(6, int(small_model.cfg.d_model), generator=torch.Generator().manual_seed(1))
    streams: list[Any] = ["resid_pre", "resid_post"]
    sites = [em.Site(layer, stream) for layer in (0, 1) for stream in streams][1:] * 2
    edits = Along(em.Add(direction(small_model)), vectors, sites)
    assert None not in edits.homes
    with free_passes(monkeypatch) as found:
        once = along_each(small_model, edits, asked, mean_logprob)
    for k in range(len(vectors)):
        with whole(small_model), em.intervene(small_model, edits.alone(k)):
            assert once[k] == pytest.approx(mean_logprob(small_model, asked).numpy(), abs=1e-4), sites[k]
    assert once.std(0).min() > 1e-3
    shared = [each for each in found if each is not None and each.after is not None]
    assert bool(shared) is hasattr(small_model, "original_model")  # a HookedTransformer reads these whole
    assert all(len(each.after.batch.rows) == len(vectors) for each in shared if each.after is not None)


def test_answers_of_every_family_are_the_same(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with free_passes(monkeypatch) as found:
        once = sequence_logprobs(model, answered())
        with whole(model):
            apart = sequence_logprobs(model, answered())
    assert any(each is not None and each.after is not None for each in found)
    torch.testing.assert_close(once, apart, atol=1e-4, rtol=1e-4)
    alone = torch.cat([sequence_logprobs(model, [each]) for each in answered()])
    torch.testing.assert_close(once, alone, atol=1e-4, rtol=1e-4)


def test_large_classes_are_read_in_parts(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answered()
    monkeypatch.setattr(stream, "_answer_tokens", lambda *given: 40)
    with free_passes(monkeypatch) as found:
        once = sequence_logprobs(small_model, asked * 3)
    with whole(small_model):
        apart = sequence_logprobs(small_model, asked)
    torch.testing.assert_close(once, apart.repeat(3), atol=1e-4, rtol=1e-4)
    assert len(found) > 5


def test_logits_that_more_happens_to_after_the_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits by a number; what is not known of a model is read in the pass itself."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(3)
    hf = GraniteForCausalLM(GraniteConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                          num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0,
                                          bos_token_id=2, eos_token_id=6, pad_token_id=0)).eval()  # fmt: skip
    asked = answered()
    with torch.no_grad():
        expected = [hf(torch.tensor([each.ids])).logits[0].log_softmax(-1) for each in asked]
    spans = [(each.response, each.ids) for each in asked]
    sums = [sum(float(x[i - 1, ids[i]]) for i in range(*at)) for x, (at, ids) in zip(expected, spans, strict=True)]
    model = em.load_model(hf, tokenizer=make_tokenizer(), surface="bridge")
    for _ in range(2):  # the first time it is noticed, the second time it is known
        found = sequence_logprobs(model, asked)
        assert found.tolist() == pytest.approx(sums, abs=1e-3)
    assert not ends_plainly(model)
