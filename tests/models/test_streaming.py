"""What is handed out token by token is what ``em.generate`` gives; and nothing stays behind where it is ended early."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tl_em as em
from tl_em.errors import InUseError, NonFiniteError, PromptTooLongError, UsageError
from tl_em.models.generate import Sampling, sample_seeds
from tl_em.models.hooks import LensModel, hook_points
from tl_em.models.prompts import encode
from tl_em.models.stream import current_batch
from tl_em.models.streaming import Streaming, _settled

pytestmark = pytest.mark.surface
PROMPT, LENGTH = "please tell me how to steal a car", 12
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 1.5, "top_p": 0.8, "seed": 4},
    {"repetition_penalty": 1.4},
    {"temperature": 2.0, "repetition_penalty": 0.7, "seed": 5},
]


def hooks_of(model: Any) -> int:
    """Everything attached to the model, at hook points and modules."""
    whole = [model, *([model.original_model] if hasattr(model, "original_model") else [])]
    modules = {id(m): m for each in whole for m in each.modules()}.values()
    at_points = sum(len(point.fwd_hooks) for point in {id(p): p for p in hook_points(model).values()}.values())
    return at_points + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def push(model: LensModel, size: float = 4.0) -> em.Add:
    vector = torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(3))
    return em.Add(em.Direction(size * vector, em.Site(1)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_are_the_text_of_generate(model: LensModel, options: dict[str, Any]) -> None:
    whole = em.generate(model, [PROMPT], max_new_tokens=LENGTH, **options)[0]
    pieces = list(em.stream(model, PROMPT, max_new_tokens=LENGTH, **options))
    assert "".join(pieces) == whole
    assert len(pieces) == len(whole.split()) and (options or pieces)


def test_a_stop_ends_it_and_none_of_it_is_handed_out(model: LensModel) -> None:
    words = em.generate(model, [PROMPT], max_new_tokens=LENGTH)[0].split()
    checked = 0
    for at in range(1, len(words) - 1):
        for stop in (words[at], " ".join(words[at : at + 2]), words[at][1:] + " " + words[at + 1][:1], "no such text"):
            whole = em.generate(model, [PROMPT], max_new_tokens=LENGTH, stop=[stop, "neither"])[0]
            assert "".join(em.stream(model, PROMPT, max_new_tokens=LENGTH, stop=[stop, "neither"])) == whole
            checked += whole != " ".join(words)
    assert checked > 3


@pytest.mark.parametrize("where", ["all", "prompt", "generated", ("last", 2)])
def test_interventions_act_as_in_generate(small_model: LensModel, where: Any) -> None:
    plain = em.generate(small_model, [PROMPT], max_new_tokens=LENGTH)[0]
    with em.intervene(small_model, push(small_model), where=where):
        whole = em.generate(small_model, [PROMPT], max_new_tokens=LENGTH)[0]
        assert "".join(em.stream(small_model, PROMPT, max_new_tokens=LENGTH)) == whole != plain


def test_closing_early_takes_everything_off(small_model: LensModel) -> None:
    before, plain = hooks_of(small_model), em.generate(small_model, [PROMPT], max_new_tokens=LENGTH)
    for end in ("close", "forget", "raise"):
        pieces: Any = em.stream(small_model, PROMPT, max_new_tokens=LENGTH)
        next(pieces)
        assert hooks_of(small_model) != before  # a Bridge shows fewer modules meanwhile
        if end == "close":
            pieces.close()
        elif end == "raise":
            with pytest.raises(KeyError):
                pieces.throw(KeyError("mine"))
        del pieces
        gc.collect()
        assert hooks_of(small_model) == before and current_batch.get() is None
        assert em.generate(small_model, [PROMPT], max_new_tokens=LENGTH) == plain


def test_between_two_pieces_the_caller_may_run_the_model(small_model: LensModel) -> None:
    """Its passes do not go into the answer, and the answer's state is not the caller's."""
    whole = em.generate(small_model, [PROMPT], max_new_tokens=LENGTH)[0]
    other = em.generate(small_model, ["the cat sat"], max_new_tokens=3)
    said = ""
    with em.intervene(small_model, push(small_model, 1e-9), where="generated"):
        for piece in em.stream(small_model, PROMPT, max_new_tokens=LENGTH):
            said += piece
            assert torch.is_grad_enabled() and current_batch.get() is None
            assert em.generate(small_model, ["the cat sat"], max_new_tokens=3) == other
    assert said == whole


def test_another_thread_is_refused_until_it_ends(small_model: LensModel) -> None:
    seen: list[Any] = []

    def run() -> None:
        try:
            seen.append(em.generate(small_model, [PROMPT], max_new_tokens=1))
        except InUseError as error:
            seen.append(error)

    def elsewhere() -> Any:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return seen.pop()

    pieces: Any = em.stream(small_model, PROMPT, max_new_tokens=LENGTH)
    assert isinstance(elsewhere(), list)
    next(pieces)
    assert isinstance(elsewhere(), InUseError)
    pieces.close()
    assert isinstance(elsewhere(), list)


def test_what_is_wrong_is_said_at_once(small_model: LensModel) -> None:
    with pytest.raises(PromptTooLongError):
        em.stream(small_model, PROMPT, max_new_tokens=1000)
    with pytest.raises(UsageError, match="top_p"):
        em.stream(small_model, PROMPT, max_new_tokens=2, top_p=0.5)
    handle = small_model.unembed.register_forward_hook(lambda m, a, y: y * float("nan"))  # type: ignore[attr-defined]
    try:
        with pytest.raises(NonFiniteError):
            list(em.stream(small_model, PROMPT, max_new_tokens=2))
    finally:
        handle.remove()


def test_tokens_and_how_it_ended(small_model: LensModel) -> None:
    encoded = encode(small_model, [PROMPT])[0]
    making = Streaming(small_model, encoded, [0], max_new_tokens=3, sampling=Sampling())
    tokens, (cut,) = list(making), making.answers
    assert [each.last for each in tokens] == [False, False, True]
    assert cut.truncated and len(cut.ids) == 3 and cut.text == "".join(each.text for each in tokens)
    assert all(int(each.logits.argmax()) == each.id for each in tokens)
    word = cut.text.split()[1]
    making = Streaming(small_model, encoded, [0], max_new_tokens=9, sampling=Sampling(stop=(word,)))
    assert len(list(making)) == 2
    (stopped,) = making.answers
    assert not stopped.truncated and word not in stopped.text


def test_several_answers_side_by_side_are_the_samples(model: LensModel) -> None:
    encoded = encode(model, [PROMPT])[0]
    several: list[dict[str, Any]] = [{"stop": ["the", "a"]}, {}]
    for options in several:
        (whole,) = em.generate(model, [PROMPT], max_new_tokens=LENGTH, temperature=1.5, samples=3, seed=2, **options)
        sampling, seeds = Sampling(1.5, stop=tuple(options.get("stop", ()))), sample_seeds(2, 1, 3, 1.5)
        making = Streaming(model, encoded, seeds, max_new_tokens=LENGTH, sampling=sampling)
        tokens = list(making)
        for k, answer in enumerate(making.answers):
            own = [each for each in tokens if each.sample == k]
            assert "".join(each.text for each in own) == answer.text == whole[k]
            assert [each.last for each in own] == [False] * (len(own) - 1) + [True]
            assert answer.truncated == (len(own) == LENGTH and own[-1].id in answer.ids and not options)
        assert [each.sample for each in tokens[:3]] == [0, 1, 2]


def byte_tokenizer() -> Any:
    """Every byte is a token, so that every character beyond ASCII comes in pieces."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("stop", [(), ("b\n", "né"), ("\n\nH",)], ids=str)
def test_settled_text_is_never_taken_back(stop: tuple[str, ...]) -> None:
    tokenizer, rng, sampling = byte_tokenizer(), np.random.default_rng(0), Sampling(stop=stop)
    letters = [*"  \n\nabé你🙂nH", "\ufffd"]
    handed = 0
    for _ in range(60):
        data = tokenizer("".join(rng.choice(letters, 12)), add_special_tokens=False)["input_ids"]
        if rng.random() < 0.5:
            del data[int(rng.integers(len(data)))]  # half a character
        texts = [tokenizer.decode(data[: i + 1]) for i in range(len(data))]
        n = next((i for i, text in enumerate(texts) if sampling.cut(text.strip()) is not None), len(texts) - 1)
        cut = sampling.cut(texts[n].strip())
        final = texts[n].strip() if cut is None else cut
        for text in texts[:n]:
            settled = _settled(text, stop, False)
            assert final.startswith(settled), (final, settled)
            handed += bool(settled)
    assert handed > 100


def test_spaces_that_a_tokenizer_cleans_up_are_waited_for() -> None:
    assert _settled("I do n", (), True) == "I" and _settled("I don't know ,", (), True) == "I don't"
