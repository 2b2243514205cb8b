"""Every figure of a card is over the tokens that count: recomputed here from single passes, whatever ``where=``."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import SURFACES, cached_model
from tests.features.test_pages import LATENTS, SITE, make
from tl_em.errors import UsageError
from tl_em.features.cards import BINS, FeatureCards, feature_cards
from tl_em.models.prompts import encode
from tl_em.report import feature_pages as pages

PROMPTS: list[Any] = [
    "the cat sat in the car .",
    "a big dog ran to the queen and sang .",
    [{"role": "user", "content": "tell me about the bank"}, {"role": "assistant", "content": "the bank is big ."}],
]


def _end(ids: Any, response: Any) -> int:
    """Where the prompt ends: an answer is no part of it."""
    return response[0] if response else len(ids)


COUNTING = {
    "all": lambda ids, response: range(len(ids)),
    "prompt": lambda ids, response: range(_end(ids, response)),
    ("last", 1): lambda ids, response: range(_end(ids, response) - 1, _end(ids, response)),
    ("last", 3): lambda ids, response: range(_end(ids, response) - 3, _end(ids, response)),
    "generated": lambda ids, response: range(*(response or (0, 0))),
}


def by_hand(model: Any, sae: Any, index: int) -> list[torch.Tensor]:
    """Activations of one latent at every token: one plain pass a prompt, the encoder written out."""
    found = []
    for prompt in encode(model, PROMPTS):
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([prompt.ids]))
        x = cache[SITE.hook_name][0].float()
        found.append((x @ sae.W_enc[:, index] + sae.b_enc[index]).clamp(min=0))
    return found


@pytest.mark.parametrize("where", COUNTING, ids=str)
def test_every_figure_is_over_the_tokens_that_count(where: Any) -> None:
    model, base, sae = cached_model("gpt2", SURFACES[-1]), cached_model("gpt2", SURFACES[-1], seed=1), make()
    prompts = encode(model, PROMPTS)
    found = feature_cards(model, sae, [7, 3], PROMPTS, against=base, where=where, k=3)
    assert any(card.density for card in found.cards)
    for card, shown in zip(found.cards, _shown(found), strict=True):
        whole, other = by_hand(model, sae, card.index), by_hand(base, sae, card.index)
        counting = [list(COUNTING[where](p.ids, p.response)) for p in prompts]
        a, b = (torch.cat([each[at] for each, at in zip(acts, counting, strict=True)]) for acts in (whole, other))
        assert found.tokens == len(a)
        own = (card.density, card.mean, card.maximum)
        assert own == pytest.approx([float(f(a)) for f in (lambda x: (x > 0).double().mean(), torch.mean, torch.max)])
        beside = (card.base_density, card.base_mean, card.base_maximum)
        assert beside == pytest.approx(
            [float(f(b)) for f in (lambda x: (x > 0).double().mean(), torch.mean, torch.max)]
        )
        _histogram(card.histogram, a, b)
        pairs = enumerate(zip(whole, counting, strict=True))
        peaks = {n: max((float(acts[i]), i) for i in at) for n, (acts, at) in pairs if at}
        order = list(card.examples)  # prompts that begin alike have the same peak, but for rounding
        assert sorted(order) == sorted(n for n in peaks if peaks[n][0] > 0)
        heights = [peaks[n][0] for n in order]
        assert heights == pytest.approx(sorted(heights, reverse=True), abs=1e-5)
        assert [peak for peak, _, _ in shown] == [f"{peaks[n][0]:.2f}" for n in order]
        for (_, most, coloured), n in zip(shown, order, strict=True):
            assert most == [peaks[n][1]]
            assert coloured == [i for i in counting[n] if float(whole[n][i]) > 0]


def _histogram(found: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    high = float(torch.cat([a, b]).max())
    assert found.high == pytest.approx(high)
    for values, shares in ((a, found.model), (b, found.base)):
        by_bin = [0] * BINS
        for value in values[values > 0].tolist():
            by_bin[min(BINS - 1, int(value / high * BINS))] += 1
        assert shares == pytest.approx([n / len(values) for n in by_bin], abs=1.01 / len(values))  # edges of bins
        assert sum(shares) == pytest.approx(float((values > 0).double().mean()))


def _shown(cards: FeatureCards) -> list[list[tuple[str, list[int], list[int]]]]:
    """What the page shows of each card's examples: the peak, where the underlined token is, where a colour is."""
    sections = pages.render(cards).split('<section class="card"')[1:]
    found = []
    for section in sections:
        items = re.findall(r'<li><div class="text".*?</li>', section, re.DOTALL)
        found.append([_example(item) for item in items])
    return found


def _example(item: str) -> tuple[str, list[int], list[int]]:
    spans = re.findall(r'<span class="([^"]*)"( style="--a:\d+")? title="token (\d+):', item)
    peak = re.search(r'<div class="peak">([\d.]+)', item)
    assert peak and spans
    most = [int(at) for name, _, at in spans if "most" in name.split()]
    return peak.group(1), most, [int(at) for _, colour, at in spans if colour]


def test_a_dead_latent_has_a_maximum_of_zero_in_either_model() -> None:
    model, sae = cached_model("gpt2", SURFACES[-1]), make()
    bias = sae.b_enc.clone()
    bias[7] = -1e6
    dead = replace(sae, b_enc=bias)
    found = feature_cards(model, dead, [7, 3], PROMPTS, against=model, where=("last", 1))
    alone = feature_cards(model, dead, [7], PROMPTS)
    for card in (found.cards[0], alone.cards[0]):
        assert (card.density, card.mean, card.maximum, card.histogram.high, *card.histogram.model) == (0.0,) * 28
        assert card.examples == ()
    assert found.cards[1].maximum == found.cards[1].base_maximum > 0  # of a live one it is not
    table = found.to_pandas().set_index("latent")
    assert table.loc[7, "maximum"] == table.loc[7, "base_maximum"] == 0 < table.loc[3, "maximum"]
    assert "It is on at none of the tokens that count." in pages.render(found)


def test_a_latent_on_only_at_tokens_that_do_not_count_is_off() -> None:
    model, sae = cached_model("gpt2", SURFACES[-1]), make()
    ends = [_end(p.ids, p.response) - 1 for p in encode(model, PROMPTS)]

    def heights(index: int) -> tuple[float, float]:
        """The highest activation at the prompts' last tokens, and anywhere."""
        acts = by_hand(model, sae, index)
        return max(float(each[end]) for each, end in zip(acts, ends, strict=True)), max(float(a.max()) for a in acts)

    index = next(i for i in range(LATENTS) if heights(i)[1] > heights(i)[0] + 0.5)
    bias = sae.b_enc.clone()
    bias[index] -= heights(index)[0] + 1e-3  # now it is off at every last token, and on elsewhere
    quiet = replace(sae, b_enc=bias)
    scopes: Any = (("last", 1), "all")
    found, everywhere = (feature_cards(model, quiet, [index], PROMPTS, where=w).cards[0] for w in scopes)
    assert everywhere.maximum > 0.4 and everywhere.examples
    assert found.maximum == found.density == 0 and found.examples == ()


def test_the_tuned_and_the_bases_highest_are_told_apart() -> None:
    model, base, sae = cached_model("gpt2", SURFACES[-1]), cached_model("gpt2", SURFACES[-1], seed=1), make()
    found = feature_cards(model, sae, list(range(LATENTS)), PROMPTS, against=base, k=1)
    differ = [card for card in found.cards if card.maximum < (card.base_maximum or 0)]
    assert differ  # the scale of the histogram is the base's here, and the card's own figure is not
    card = differ[0]
    text = html.unescape(pages.render(replace(found, cards=(card,)))).replace("\xa0", " ")
    assert f"over all of them, highest {card.maximum:.2f}" in text
    assert f"mean {card.base_mean:.2f}, highest {card.base_maximum:.2f}" in text


def test_a_scope_without_a_token_is_an_error_and_not_an_empty_card() -> None:
    model, sae = cached_model("gpt2", SURFACES[-1]), make()
    with pytest.raises(UsageError, match="counts no token"):
        feature_cards(model, sae, [7], PROMPTS[:2], where="generated")
    assert feature_cards(model, sae, [7], PROMPTS, where="generated").tokens > 0


def test_a_figure_that_is_not_known_is_a_dash_and_not_zero() -> None:
    row = {"behaviour": "x", "effect": 0.5, "q": float("nan"), "auroc": float("nan"), "delta": None}
    cells = {name: pages._cell(row, name, 1.0).text for name in ("effect", "q", "auroc", "delta", "nu")}
    assert cells == {"effect": "+0.5", "q": "–", "auroc": "–", "delta": "–", "nu": "–"}
    assert pages._cell({"q": 0.0002}, "q", 0.0).text == "< .001"
