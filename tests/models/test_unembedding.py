"""Log-probabilities by parts of the vocabulary are those of all logits; hooks in the unembedding are obeyed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tl_em.models import unembedding
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.stream import sequence_logprobs
from tl_em.models.unembedding import ends_plainly, logprobs_at_end, logprobs_of, soft_cap

from .test_capture import ANSWERED

pytestmark = pytest.mark.surface

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of seven words, so that the 57 of the tests take nine."""
    monkeypatch.setattr(unembedding, "_PART", 7)
    monkeypatch.setattr(unembedding, "_FEWEST", 7)


def at_the_end(model: Any, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters the unembedding, what follows each token, and the logits as the module gives them."""
    torch.manual_seed(1)
    x = torch.randn(tokens, model.cfg.d_model)
    with torch.no_grad():
        logits = model.unembed(x[None])[0]
    cap = soft_cap(model)
    return x, torch.arange(tokens) * 11, logits if cap is None else cap * torch.tanh(logits / cap)


def calls_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the unembedding's module."""
    seen: list[int] = []
    kind = type(model.unembed)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **o: seen.append(x.shape[-2]) or forward(self, x, **o))
    return seen


def test_parts_of_the_vocabulary_sum_to_the_whole(
    model: LensModel, parted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, following, logits = at_the_end(model)
    calls = calls_of(model, monkeypatch)
    found = logprobs_at_end(model, x, following, logits[0])
    assert found is not None and not calls
    torch.testing.assert_close(found, logprobs_of(logits, following), **CLOSE)
    torch.testing.assert_close(found, logits.log_softmax(-1)[torch.arange(6), following], **CLOSE)


def test_a_pass_calls_the_module_for_one_token(
    small_model: LensModel, parted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sequence_logprobs(small_model, ANSWERED)
    calls = calls_of(small_model, monkeypatch)
    torch.testing.assert_close(sequence_logprobs(small_model, ANSWERED), expected, **CLOSE)
    assert calls == [1]


def test_a_hook_in_the_unembedding_is_not_passed_by(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def louder(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * 3

    expected = sequence_logprobs(small_model, ANSWERED)
    handle = small_model.unembed.register_forward_hook(louder)
    try:
        found = sequence_logprobs(small_model, ANSWERED)
        monkeypatch.setattr(unembedding, "_PLAIN", {small_model: False})  # all logits in the pass itself
        whole = sequence_logprobs(small_model, ANSWERED)
    finally:
        handle.remove()
    assert (found - expected).abs().min() > 0.1
    torch.testing.assert_close(found, whole, **CLOSE)


def test_a_hook_point_in_a_bridges_unembedding_is_not_passed_by(small_model: LensModel) -> None:
    if not hasattr(small_model, "original_model"):
        pytest.skip("a HookedTransformer has none there")
    expected = sequence_logprobs(small_model, ANSWERED)
    with hooked(small_model, [("unembed.hook_in", lambda x, hook: x * 3)], check=False):
        found = sequence_logprobs(small_model, ANSWERED)
    assert (found - expected).abs().min() > 0.1


def test_a_module_without_one_matrix_is_called(small_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Any) -> None:
        raise AssertionError("Component unembed has no weight attribute")

    expected = sequence_logprobs(small_model, ANSWERED)
    if hasattr(small_model, "original_model"):
        monkeypatch.setattr(type(small_model.unembed), "W_U", property(none))
    else:  # there it is a parameter of the module
        monkeypatch.setattr(unembedding, "_is_bare", lambda *_: False)
    calls = calls_of(small_model, monkeypatch)
    torch.testing.assert_close(sequence_logprobs(small_model, ANSWERED), expected, **CLOSE)
    assert len(calls) == 2 and ends_plainly(small_model)


def test_logits_that_are_others_than_the_models_are_refused(small_model: LensModel) -> None:
    x, following, logits = at_the_end(small_model)
    try:
        assert logprobs_at_end(small_model, x, following, logits[0] / 8) is None
        assert not ends_plainly(small_model)
    finally:
        unembedding._PLAIN.pop(small_model)
    assert logprobs_at_end(small_model, x, following, logits[0]) is not None and ends_plainly(small_model)


def test_words_that_can_never_come_count_for_nothing(
    small_model: Any, parted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias of minus infinity, as where a vocabulary is padded: a part of these alone, and what is not finite."""
    x, following, logits = at_the_end(small_model)
    never = torch.zeros(57)
    never[:8] = -torch.inf
    bias = small_model.unembed.b_U
    monkeypatch.setattr(bias, "data", bias.data + never)
    found = logprobs_at_end(small_model, x, following, logits[0] + never)
    expected = logprobs_of(logits + never, following)
    assert found is not None and found[0] == -torch.inf
    torch.testing.assert_close(found[1:], expected[1:], **CLOSE)
    x[2] = torch.nan
    found = logprobs_at_end(small_model, x, following, logits[0] + never)
    assert found is not None and found.isnan().tolist() == [False, False, True, False, False, False]
