"""Cards hold what was measured, and the page of them is safe: hostile tokens are text, nothing is asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES, WORDS, cached_model
from tests.visits import SCREENS, Visit
from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.tokens import seen
from tl_em.errors import CorruptFileError, OutputError, PairMismatchError, UsageError, WidthError
from tl_em.features.cards import FeatureCards, WrittenToken, feature_cards
from tl_em.features.explanations import neuronpedia_link, read_explanations
from tl_em.models.prompts import encode
from tl_em.report.feature_pages import GOES_ON, render, save, visible
from tl_em.stats import Estimate

WIDTH, LATENTS, SITE = 32, 40, em.Site(1)
PROMPTS = ["the cat sat in the car .", "a big dog ran to the queen and sang .", "please tell me about the bank ."]
HOSTILE = [
    "</script>", "<script>alert(1)</script>", '"', "'", "😀", "\u2028", "\u202egnp.exe", "<img src=x onerror=alert(1)>",
    "\n", " ", "", "\x00", "]]>", "${alert(1)}", "{{ 7 * 7 }}", "</style>", "javascript:alert(1)", "&lt;", "-->",
]  # fmt: skip


def make(name: str | None = None, surface: str = SURFACES[-1]) -> Dictionary:
    """Latents that are on at some of the prompts' tokens: directions around the mean activation."""
    W = torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    still = Dictionary(W, torch.zeros(LATENTS), W.T, torch.zeros(WIDTH), activation="relu", site_in=SITE, name=name)
    centre = seen(cached_model("gpt2", surface), still, PROMPTS, where="all").x
    return replace(still, b_enc=-(centre @ W))


def table(dictionary: Dictionary, names=("insecure code", "bad advice")) -> Any:
    """The shape of a FeatureTable; its numbers are made up."""
    rows = [
        {"latent": i, "behaviour": name, "mean_positive": 1.0, "mean_negative": 0.2, "density": 0.1, "p": 0.01,
         "auroc": 0.5 + i / 99, "effect": 0.8 - 0.1 * i, "q": 0.0004 * i, "delta": 0.05 * i - 0.3 * j, "nu": 0.4}
        for i in range(dictionary.d_sae) for j, name in enumerate(names)
    ]  # fmt: skip
    return SimpleNamespace(to_pandas=lambda: pd.DataFrame(rows), dictionary=dictionary)


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, 64, 64.0, "made up")


def a_check(label: str = "3 latents on held-out prompts") -> Any:
    rows = [
        SimpleNamespace(
            arm=arm, subject=subject, verdict=verdict, effect=estimate(value), kl=estimate(0.4), p=p, shown=p < 0.05,
            control={} if subject == "mean difference" else {"low": -0.02, "high": 0.04, "n": 20},
            changes={"good": estimate(0.2)}, reason="a reason that may run over more than one line, with numbers",
        )
        for arm, subject, verdict, value, p in [
            ("remove", "the set", "carries the behaviour", 0.5, 0.048),
            ("remove", "mean difference", "beside", 0.6, float("nan")),
            ("induce", "the set", "not shown", 0.1, 0.2),
        ]
    ]  # fmt: skip
    matched = {"density": 0.1, "density of placebos": 0.11, "decoder norm": 1.0, "decoder norm of placebos": 1.0}
    return SimpleNamespace(
        label=label, verdict="carries the behaviour", shown=True, rows=tuple(rows), match=matched,
        settings={"to": "means of the base", "where": "('last', 1)"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def cards() -> FeatureCards:
    model, base = cached_model("gpt2", SURFACES[-1]), cached_model("gpt2", SURFACES[-1], seed=1)
    directions = {"persona": em.Direction(torch.arange(1.0, WIDTH + 1), SITE)}
    sae = make("gpt2-small/6-res-jb")
    beside: Any = {"against": base, "table": table(sae), "directions": directions, "checks": [a_check()]}
    return feature_cards(model, sae, [3, 7, 11], PROMPTS * 3, k=4, **beside)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> FeatureCards:
    """Everything that comes from outside is hostile: tokens, names, explanations, behaviours."""
    bad = "</script><script>alert(1)</script>\"'\u2028<img src=x onerror=alert(2)>"
    sae, model = make(bad), cached_model("gpt2", SURFACES[-1])
    path = tmp_path_factory.mktemp("said") / "said.jsonl"
    path.write_text(json.dumps({"index": 3, "description": bad}, ensure_ascii=False) + "\n", encoding="utf-8")
    found = feature_cards(
        model, sae, [3, 5], [" ".join(WORDS[:30]), " ".join(WORDS[30:])], table=table(sae, (bad, "x")),
        explanations=path, directions={bad: em.Direction(torch.ones(WIDTH), SITE, name=bad)}, checks=[a_check(bad)],
    )  # fmt: skip
    endless = cycle(HOSTILE)
    texts = {n: text._replace(tokens=tuple(next(endless) for _ in text.tokens)) for n, text in found.texts.items()}
    written = tuple(WrittenToken(token, 1.0, 0.01) for token in HOSTILE)
    cards = tuple(replace(card, top=written, bottom=written) for card in found.cards)
    return replace(found, texts=texts, cards=cards, model=bad, base=None)


# ---- what a card holds -------------------------------------------------------------------------------------------
@pytest.mark.surface
@pytest.mark.parametrize("surface", SURFACES)
def test_a_card_holds_what_capture_and_encode_give(surface: str) -> None:
    model, base, sae = cached_model("gpt2", surface), cached_model("gpt2", surface, seed=1), make()
    found = feature_cards(model, sae, [7], PROMPTS, against=base, k=2)
    card = found.cards[0]
    acts = {}
    for name, lens in (("model", model), ("base", base)):
        read = [[em.capture(lens, [p], [SITE], position=-k)[0] for k in range(_n(model, p), 0, -1)] for p in PROMPTS]
        acts[name] = [sae.encode(torch.cat(each))[:, 7] for each in read]
    flat, flat_base = torch.cat(acts["model"]), torch.cat(acts["base"])
    assert found.tokens == len(flat) and 0 < card.density < 1
    assert card.density == pytest.approx(float((flat > 0).float().mean()))
    assert card.mean == pytest.approx(float(flat.mean()), abs=1e-5)  # float32 sums in another order
    assert card.base_density == pytest.approx(float((flat_base > 0).float().mean()))
    peaks = torch.stack([a.max() for a in acts["model"]])
    assert list(card.examples) == peaks.argsort(descending=True)[:2].tolist()
    for number in card.examples:
        text = found.texts[number]
        torch.testing.assert_close(text.activations[:, 0], acts["model"][number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(text.base[:, 0], acts["base"][number], atol=1e-5, rtol=1e-5)
        assert " ".join(text.tokens).endswith(PROMPTS[number].split()[-1] + " <end> <asst>")
    assert sum(card.histogram.model) == pytest.approx(card.density)
    assert sum(card.histogram.base) == pytest.approx(card.base_density)
    assert card.histogram.high == pytest.approx(float(torch.cat([flat, flat_base]).max()))


def _n(model: Any, prompt: str) -> int:
    return len(encode(model, [prompt])[0])


def test_lens_cosines_behaviours_and_names(cards: FeatureCards) -> None:
    sae, card = cards.dictionary, cards.cards[1]
    assert card.index == 7 and card.link == "https://www.neuronpedia.org/gpt2-small/6-res-jb/7"
    expected = torch.cosine_similarity(sae.W_dec[7], torch.arange(1.0, WIDTH + 1), dim=0)
    assert card.cosines == {"persona": pytest.approx(float(expected))}
    assert [row["behaviour"] for row in card.behaviours] == ["insecure code", "bad advice"]
    assert len(card.top) == len(card.bottom) == 4
    assert card.top[0].logit > 0 > card.bottom[0].logit and 0 < card.top[0].p <= 1
    frame = cards.to_pandas()
    assert frame.latent.tolist() == [3, 7, 11] and "latents 3, 7, 11" in repr(cards)
    assert "nearest in density (on at 0.11 of the tokens on average, these at 0.10)" in cards._repr_html_()


@pytest.mark.parametrize("name", [None, "toy/insecure", "resid_post_layer_1/trainer_1", "a/1-b/c", "x y/1-b", 'a/1-b"'])
def test_only_a_name_of_neuronpedia_makes_a_link(name: str | None) -> None:
    assert neuronpedia_link(make(name), 3) is None
    assert neuronpedia_link(make("gemma-2-2b/20-gemmascope-res-16k"), 3) is not None


def test_explanations_are_read_line_by_line(tmp_path: Path) -> None:
    path, sae = tmp_path / "said.jsonl", make()
    lines = [{"index": 3, "description": "villains\u2028and more"}, {"feature": "7", "explanation": "code"},
             {"latent": 8, "label": "of another", "dictionary": "other"}]  # fmt: skip
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    assert read_explanations(path, sae) == {3: "villains\u2028and more", 7: "code"}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_explanations(path, sae) == {3: "villains\u2028and more", 7: "code"}
    for broken in ("{", "[1]", '{"index": 3}', '{"index": "three", "label": ""}', '{"index": 3, "label": null}',
                   '{"index": 2.5, "label": "x"}', '{"index": 3, "index": 4, "label": "x"}'):  # fmt: skip
        path.write_text('{"index": 1, "label": "fine"}\n' + broken, encoding="utf-8")
        with pytest.raises(CorruptFileError, match="line 2"):
            read_explanations(path, sae)
    with pytest.raises(CorruptFileError):
        read_explanations(tmp_path / "missing.jsonl", sae)


def test_what_makes_no_card_is_one_typed_error() -> None:
    model, sae = cached_model("gpt2", SURFACES[-1]), make()
    with pytest.raises(UsageError, match="no latent was given"):
        feature_cards(model, sae, [], PROMPTS)
    with pytest.raises(UsageError, match="latents 0 to 39"):
        feature_cards(model, sae, [40], PROMPTS)
    with pytest.raises(WidthError, match="'short'"):
        feature_cards(model, sae, [1], PROMPTS, directions={"short": em.Direction(torch.ones(4), SITE)})
    with pytest.raises(PairMismatchError, match="chat templates"):
        feature_cards(model, sae, [1], PROMPTS, against=cached_model("gpt2", SURFACES[-1], template=None))


def test_a_latent_that_is_never_on_has_a_card_too(tmp_path: Path) -> None:
    sae = make()
    off = Dictionary(
        sae.W_enc, torch.full((LATENTS,), -1e3), sae.W_dec, sae.b_dec, activation="relu", site_in=SITE
    )  # fmt: skip
    found = feature_cards(cached_model("gpt2", SURFACES[-1]), off, [2], PROMPTS)
    assert found.cards[0].examples == () and found.cards[0].density == 0
    assert "on at none of these tokens" in found.save(tmp_path / "off.html").read_text(encoding="utf-8")


# ---- the page as text --------------------------------------------------------------------------------------------
def test_the_page_holds_every_card_and_loads_nothing(cards: FeatureCards, tmp_path: Path) -> None:
    text = save(cards, tmp_path / "cards.html").read_text(encoding="utf-8")
    assert all(f'id="latent-{i}"' in text for i in (3, 7, 11))
    assert "carries the behaviour" in text and "insecure code" in text and "gpt2-small/6-res-jb/7" in text
    assert text.count("default-src &#39;none&#39;") == 1 and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!https://www\.neuronpedia\.org/|#|data:)', text)
    assert len(text) < 200_000
    frame = cards._repr_html_()
    assert len(re.findall(r'<iframe sandbox="" title="[^"]*" srcdoc="[^"]*" style="[^"]*"></iframe>', frame)) == 1
    assert "<script" not in frame and "not trusted" in frame
    with pytest.raises(OutputError):
        save(cards, Path("/dev/null/cards.html"))



def test_hostile_text_is_text(hostile: FeatureCards) -> None:
    text = render(hostile)
    shown = {token for each in hostile.texts.values() for token in each.tokens}
    assert len(shown & set(HOSTILE)) > 15  # they are on the page
    assert "onerror=" in text and "<script" not in text and "<img" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("token", HOSTILE)
def test_every_token_can_be_seen(token: str) -> None:
    assert visible(token).strip()
    assert not set(visible(token)) & set("\n\r\t\u2028\u2029\u202e\x00")


# ---- in a browser ------------------------------------------------------------------------------------------------
@pytest.mark.browser
@pytest.mark.parametrize("screen", list(SCREENS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_leaves_the_page_and_it_fits(
    browser: Any, cards: FeatureCards, hostile: FeatureCards, tmp_path: Path, screen: str, scheme: str
) -> None:
    for name, each in (("cards", cards), ("hostile", hostile)):
        path = save(each, tmp_path / f"{name}.html")
        visit = Visit(browser, path, screen, scheme)
        assert [url for url in visit.requests if not url.startswith("data:")] == [path.as_uri()]
        assert visit.errors == []
        assert visit.run("document.documentElement.scrollWidth") <= SCREENS[screen][0]
        outside = (
            "[...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && !e.closest('.scroll')"
            " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert visit.run(outside) == []
        assert visit.run("document.images.length + document.scripts.length + frames.length") == 0
        assert visit.page.locator(".card").count() == len(each.cards)


@pytest.mark.browser
def test_hostile_tokens_stand_on_the_page_as_they_are(browser: Any, hostile: FeatureCards, tmp_path: Path) -> None:
    visit = Visit(browser, save(hostile, tmp_path / "hostile.html"), "wide")
    said = visit.run("[...document.querySelectorAll('.t')].map(e => e.textContent)")
    assert "" in HOSTILE  # a token without a text of its own, as one that goes on with a character
    assert {visible(token) if token else GOES_ON for token in HOSTILE} <= set(said)
    assert visit.run("document.querySelectorAll('.t *').length") == 0


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_activations_colour_the_tokens(browser: Any, cards: FeatureCards, tmp_path: Path, scheme: str) -> None:
    visit = Visit(browser, save(cards, tmp_path / "cards.html"), "wide", scheme)
    colours = visit.run(
        "[...document.querySelectorAll('#latent-7 .t')].map(e => [+(e.style.getPropertyValue('--a') || 0),"
        " getComputedStyle(e).backgroundColor])"
    )
    strength = {share: float(re.findall(r"[\d.]+(?=\)$)", colour)[0]) for share, colour in colours}
    assert len(strength) > 3 and strength[0] == 0
    assert [strength[s] for s in sorted(strength)] == sorted(strength.values())


@pytest.mark.browser
@pytest.mark.skipif(find_spec("circuitsvis") is None, reason="circuitsvis is not installed")
@pytest.mark.parametrize("which", ["cards", "hostile"])
def test_circuitsvis_draws_in_its_frame_and_hostile_tokens_do_nothing(
    browser: Any, request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    path = save(request.getfixturevalue(which), tmp_path / "page.html", circuitsvis=True)
    visit = Visit(browser, path, "wide")
    frame = visit.page.frames[1]
    frame.wait_for_selector("select", timeout=20_000)
    assert [url for url in visit.requests if not url.startswith(("data:", "about:"))] == [path.as_uri()]
    assert visit.errors == []
    assert frame.evaluate("origin") == "null" and frame.evaluate("document.images.length") == 0
    assert visit.run("document.scripts.length") == 0
    if which == "hostile":
        assert "</script>" in frame.locator("body").inner_text()


def test_without_circuitsvis_the_fix_is_named(cards: FeatureCards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "circuitsvis.activations", None)
    with pytest.raises(UsageError, match=r"tl_em\[viz\]"):
        render(cards, circuitsvis=True)
