"""The reader gives what a plain forward pass gives, token by token, and a dictionary's means are over those."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import tl_em as em
from tl_em.dictionaries.tokens import Tokens, every_token, read_tokens, sample_spans, scope_spans, seen
from tl_em.errors import NonFiniteError, UsageError
from tl_em.models.hooks import LensModel, hooked
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.token_scopes import Where

pytestmark = pytest.mark.surface
SITE = em.Site(1)


def prompts(n: int = 7) -> list[EncodedPrompt]:
    """Prompts of several lengths that begin with one token."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(7, 50, (4 + i % 5,), generator=generator).tolist() for i in range(n)]
    return [EncodedPrompt.from_ids([2, *row]) for row in rows]


def tokens_of(model: LensModel, encoded: list[EncodedPrompt], sites: list[em.Site]) -> list[Tokens]:
    return list(every_token(model, encoded, sites, sample_spans(encoded)))


def dictionary() -> em.Dictionary:
    W = torch.randn(32, 60, generator=torch.Generator().manual_seed(0))
    return em.Dictionary(W, torch.zeros(60), W.T, torch.zeros(32), activation="relu", site_in=SITE)


def test_every_token_is_read_once_but_a_first_one_that_all_share(small_model: LensModel) -> None:
    encoded = prompts()
    parts = tokens_of(small_model, encoded, [SITE, em.Site(0, "mlp_out")])
    owner, x = torch.cat([p.prompts for p in parts]), torch.cat([p.x for p in parts])
    expected = []
    for each in encoded:
        _, cache = small_model.run_with_cache(torch.tensor([each.ids]))  # pyright: ignore[reportAttributeAccessIssue]
        expected.append(cache[SITE.hook_name][0, 1:])
    assert owner.tolist() == [i for i, each in enumerate(encoded) for _ in each.ids[1:]]
    torch.testing.assert_close(x[:, 0], torch.cat(expected), atol=1e-5, rtol=1e-4)  # sums in another order
    other = [replace(encoded[0], ids=(3, *encoded[0].ids[1:])), *encoded[1:]]
    assert sum(len(p.x) for p in tokens_of(small_model, other, [SITE])) == sum(map(len, encoded))


def test_chunks_do_not_change_what_is_read(small_model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.cat([p.x for p in tokens_of(small_model, prompts(), [SITE])])
    monkeypatch.setattr("tl_em.dictionaries.tokens.CHUNK", 1)
    parts = tokens_of(small_model, prompts(), [SITE])
    assert len(parts) == 7
    torch.testing.assert_close(torch.cat([p.x for p in parts]), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["all", ("last", 1), "prompt", ("last", 2)])
def test_means_are_those_of_the_tokens_in_the_scope(
    small_model: LensModel, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, encoded = dictionary(), encode(small_model, ["the cat saw the king", "a queen ran"])
    last = {"all": 99, "prompt": 99, ("last", 1): 1, ("last", 2): 2}[where]
    kept = torch.cat([
        em.capture(small_model, [each], [SITE], position=-k)[:, 0]
        for each in encoded for k in range(1, min(last, len(each)) + 1)
    ])  # fmt: skip
    monkeypatch.setattr("tl_em.dictionaries.tokens._LATENTS", 60 * 3)  # several pieces
    found = seen(small_model, sae, encoded, where=where)
    assert found.tokens == len(kept) > 1
    torch.testing.assert_close(found.mean, sae.encode(kept).mean(0), atol=1e-5, rtol=1e-5)  # sums in another order
    torch.testing.assert_close(found.x, kept.mean(0), atol=1e-5, rtol=1e-5)
    sure = sae.preactivations(kept).abs().amin(0) > 1e-4  # the others may be on or off by rounding
    assert int(sure.sum()) > 20
    assert torch.equal(found.density[sure], (sae.encode(kept) > 0).float().mean(0)[sure])


def test_a_scope_that_some_prompts_lack_is_read_in_the_others(small_model: LensModel) -> None:
    question = prompts()[0]
    both = [question, question.with_response([9, 11, 12])]
    spans = scope_spans(both, "generated")
    assert spans.diff().flatten().tolist() == [0, 3] and spans[1].tolist() == [len(question), len(question) + 3]
    assert seen(small_model, dictionary(), both, where="generated").tokens == 3
    with pytest.raises(UsageError, match="no token"):
        seen(small_model, dictionary(), [question], where="generated")


def test_what_is_not_finite_is_one_typed_error(small_model: LensModel) -> None:
    with (
        hooked(small_model, [(SITE.hook_name, lambda x, hook: x * torch.inf)]),
        pytest.raises(NonFiniteError, match="resid_post"),
    ):
        seen(small_model, dictionary(), prompts(), where="all")


def test_nothing_that_was_read_waits_for_pythons_collector(make_model):
    """A hook that held itself kept every chunk that it had read: in a large process, for hours."""
    import gc

    model, encoded = make_model("llama", "bridge"), [EncodedPrompt.from_ids([2, 7, 8, 9])] * 4
    spans = sample_spans(encoded)

    def read() -> None:
        read_tokens(model, encoded, [em.Site(1)], spans)

    read()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            read()
        gc.set_debug(gc.DEBUG_SAVEALL)  # what it finds; others in this process leave things of their own
        gc.collect()
        assert not [each for each in gc.garbage if isinstance(each, torch.Tensor | partial)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
