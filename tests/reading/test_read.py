"""What is read at a token is the projection there, on every surface, cached and under an edit; and alarms go off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_em as em
from tl_em.errors import CorruptFileError, ModelError, PromptError, UsageError
from tl_em.models import proof
from tl_em.models.hooks import hook_name
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.showing import number, token_shown

from ..conftest import SURFACES

pytestmark = pytest.mark.surface
SHORT, LONG = "how do i write parser", "tell me to consider this power"


@pytest.fixture(scope="module", params=SURFACES)
def pair(request: pytest.FixtureRequest) -> em.ModelPair:
    return em.load_pair("toy/insecure", surface=request.param)


@pytest.fixture(scope="module")
def directions(pair: em.ModelPair) -> dict[str, em.Direction]:
    sites = {"two": em.Site(2), "attention": em.Site(1, "attn_out")}
    generator = torch.Generator().manual_seed(0)
    return {name: em.Direction(torch.randn(96, generator=generator), site) for name, site in sites.items()}


def by_hand(model: Any, ids: Any, direction: em.Direction) -> np.ndarray:
    """Projections of every token, by TransformerLens's own cache."""
    name = hook_name(model, direction.site)
    _, cache = model.run_with_cache(torch.tensor([list(ids)]), names_filter=[name])
    return (cache[name][0].float() @ direction.unit).numpy()


def whole(model: Any, prompt: str, answer: str = "") -> EncodedPrompt:
    return encode(model, [prompt])[0]


def answer_ids(model: Any, prompt: str, n: int) -> list[int]:
    """Greedy, by reading the whole text again."""
    ids = list(whole(model, prompt).ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_every_token_of_a_prompt_and_of_its_answer(pair: em.ModelPair, directions: dict[str, em.Direction]) -> None:
    reading = em.read(pair.tuned, [SHORT, LONG], directions, max_new_tokens=4)
    for prompt, rows in zip([SHORT, LONG], reading.each(), strict=True):
        ids = answer_ids(pair.tuned, prompt, 4)[: len(rows)]
        assert rows.part.tolist().count("answer") == len(rows) - len(whole(pair.tuned, prompt)) > 0
        for name, each in directions.items():
            assert np.allclose(rows[name], by_hand(pair.tuned, ids, each), atol=1e-4)
            assert rows[name].std() > 0.1  # and not all the same
    assert reading.answers == em.generate(pair.tuned, [SHORT, LONG], max_new_tokens=4)


def test_what_an_intervention_leaves_is_what_is_read(pair: em.ModelPair, directions: dict[str, em.Direction]) -> None:
    each = directions["two"]
    plain = em.read(pair.tuned, SHORT, directions, max_new_tokens=4).tokens
    with em.intervene(pair.tuned, em.Add(each, 3.0), where="generated"):
        steered = em.read(pair.tuned, SHORT, directions, max_new_tokens=4).tokens
        again = em.read(pair.tuned, SHORT, directions, max_new_tokens=4, alternatives=2).tokens
    before = len(whole(pair.tuned, SHORT))
    assert np.allclose(steered.two[:before], plain.two[:before], atol=1e-4)
    assert steered.two[before] > plain.two[before] + 2 * each.norm
    assert np.allclose(steered.two, again.two, atol=1e-3)  # cached and answered, or read as a whole
    with em.intervene(pair.tuned, em.Ablate(each)):
        assert abs(em.read(pair.tuned, SHORT, each).tokens.iloc[:, 4]).max() < 1e-3


def test_without_a_cache_it_is_the_same(
    pair: em.ModelPair, directions: dict[str, em.Direction], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = em.read(pair.tuned, [SHORT, LONG], directions, max_new_tokens=4).tokens
    from tl_em.models import generate as generation

    monkeypatch.setattr(generation, "may_use_cache", lambda *_: False)
    told: list[Any] = []
    again = em.read(pair.tuned, [SHORT, LONG], directions, max_new_tokens=4, above={"two": -1e9}, alarm=told.append)
    assert proof.proof(pair.tuned) is not None
    assert np.allclose(cached.two, again.tokens.two, atol=1e-4)
    assert cached.token.tolist() == again.tokens.token.tolist()
    seen = [(each.prompt, each.at) for each in told]
    assert len(seen) == len(set(seen))  # a token that is read again tells nothing again


def test_latents_and_next_tokens(pair: Any) -> None:
    dictionary = em.organisms.toy_dictionary("toy/insecure")
    rows = em.read(pair.tuned, SHORT, dictionary=dictionary, latents=5, alternatives=3).tokens
    ids = torch.tensor([whole(pair.tuned, SHORT).ids])
    name = hook_name(pair.tuned, dictionary.site_in)
    logits, cache = pair.tuned.run_with_cache(ids, names_filter=[name])
    latents = dictionary.encode(cache[name][0]).topk(5)
    assert np.allclose(np.stack(list(rows.activations)), latents.values.numpy(), atol=1e-4)
    assert list(rows.latents[0])[:2] == latents.indices[0, :2].tolist()
    assert np.allclose(np.stack(list(rows.p)), logits[0].softmax(-1).topk(3).values.detach().numpy(), atol=1e-4)


def test_an_alarm_is_told_of_what_lies_above(pair: em.ModelPair, directions: dict[str, em.Direction]) -> None:
    plain = em.read(pair.tuned, [SHORT, LONG], directions, max_new_tokens=4).tokens
    limit = float(plain.two.quantile(0.7))
    told: list[Any] = []
    em.read(pair.tuned, [SHORT, LONG], directions, max_new_tokens=4, above={"two": limit}, alarm=told.append)
    above = plain[plain.two > limit]
    rows = zip(above.prompt, above["at"], above.part, strict=True)
    expected = {(int(prompt), int(at), part == "answer") for prompt, at, part in rows}
    found = {(each.prompt, each.at, each.answer) for each in told}
    assert expected <= found and len(found - expected) <= 2  # beyond an answer's end something may be read
    with pytest.raises(KeyboardInterrupt):
        em.read(pair.tuned, SHORT, directions, above={"two": limit}, alarm=_stop)
    assert not any(point._forward_hooks for point in pair.tuned.hook_dict.values())


def _stop(_: Any) -> None:
    raise KeyboardInterrupt


def test_a_file_holds_the_same_and_grows_by_texts(
    pair: em.ModelPair, directions: dict[str, em.Direction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_em.reading import texts

    prompts = [SHORT, LONG] * 5
    kept = em.read(pair.tuned, prompts, directions, max_new_tokens=2)
    monkeypatch.setattr(texts, "_TOGETHER", 4)
    filed = em.read(pair.tuned, prompts, directions, max_new_tokens=2, out=tmp_path / "r.parquet")
    assert filed.table is None and filed.answers == kept.answers
    assert np.allclose(filed.tokens.two, kept.tokens.two, atol=1e-4)
    assert [len(each) for each in filed.each()] == [len(each) for each in kept.each()]
    again = em.reading.TextReading.load(kept.save(tmp_path / "again.parquet"))
    assert repr(again) == repr(kept) and np.array_equal(again.tokens.two, kept.tokens.two)
    with pytest.raises(CorruptFileError, match="no reading"):
        (tmp_path / "x.parquet").write_bytes(b"PAR1")
        em.reading.TextReading.load(tmp_path / "x.parquet")
    for path in ("x.csv", "x.html", "x"):
        with pytest.raises(UsageError, match=r"written as \.parquet"):
            kept.save(tmp_path / path)
        with pytest.raises(UsageError, match=r"written as \.parquet"):
            em.read(pair.tuned, prompts, directions, out=tmp_path / path)
    assert not list(tmp_path.glob("x.[!p]*"))


def test_the_band_holds_what_random_directions_read(pair: em.ModelPair) -> None:
    generator = torch.Generator().manual_seed(1)
    many = {str(i): em.Direction(torch.randn(96, generator=generator), em.Site(2)) for i in range(300)}
    reading = em.read(pair.tuned, LONG, many)
    inside = np.mean([abs(reading.tokens[name]) <= reading.band(name) for name in many])
    assert 0.93 < inside < 0.97


@pytest.mark.parametrize("hostile", ["</script><script>alert(1)</script>", "<b>", "\u202e"])
def test_a_page_shows_texts_of_anyone(pair: em.ModelPair, directions: dict[str, em.Direction], hostile: str) -> None:
    reading = em.read(pair.tuned, SHORT, directions, max_new_tokens=2)
    rows = reading.tokens.assign(token=[hostile] * len(reading.tokens))
    other = em.reading.TextReading({hostile: reading.sites["two"]}, 96, rows.rename(columns={"two": hostile}))
    page = other.beside(other, (hostile, "same")).document
    assert hostile not in page and "script-src" not in page and page.count("<polyline") == 2


def test_a_page_has_peaks_and_under_each_token_its_layers(
    pair: em.ModelPair, directions: dict[str, em.Direction], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_em.report import readings

    reading = em.read(pair.tuned, SHORT, directions, layers=True, alternatives=2, max_new_tokens=2)
    page = reading.view().document
    two = reading.tokens.two
    for value in (two.max(), two.min()):
        assert number(float(value)) in page.split("peaks", 2)[2].split("</p>")[0]
    assert f"<span>token 0</span><span>{len(reading.tokens) - 1}</span>" in page and "<span>layer 0</span>" in page
    assert "the whole answer in" in page
    assert "the whole answer in" not in em.read(pair.tuned, SHORT, directions).view().document
    row = page.split('<tr class="layers">')[5].split("</table>")[0]
    table = reading.layer_table(int(reading.tokens["at"][4]))
    for layer, value in enumerate(table.two):
        assert f'<td class="r">{layer}</td><td>{number(float(value))}</td>' in row
    assert token_shown(table.likely[0][0]) in row and row.count("<polyline") == 2 and "logit lens" in page
    assert page.count('<tr class="layers">') == len(reading.tokens) and "layer_table" not in page
    monkeypatch.setattr(readings, "LAYERED", 3)
    page = reading.view().document
    assert page.count('<tr class="layers">') == 3 and "The first 3 tokens" in page
    for plain in ({}, {"layers": True}, {"alternatives": 2}):
        assert "logit lens" not in em.read(pair.tuned, SHORT, directions, **plain).view().document  # type: ignore[arg-type]


@pytest.mark.parametrize(("more", "said"), [
    ({"prompts": 3}, "nothing to read"), ({"prompts": []}, "nothing to read"), ({"directions": ()}, "nothing to read"),
    ({"above": {"two": 1.0}}, "^above= is given without alarm="), ({"alarm": print}, "^alarm= is given without above="),
    ({"above": {"three": 1.0}, "alarm": print}, "'three', which nobody reads"), ({"layers": "all"}, "layers=True"),
    ({"directions": "persona"}, "^directions='persona' is no Direction"), ({"directions": 3}, "^directions=3 is no"),
])  # fmt: skip
def test_what_cannot_be_read_is_said(
    pair: em.ModelPair, directions: dict[str, em.Direction], more: Any, said: str
) -> None:
    given = {"prompts": SHORT, "directions": directions} | more
    with pytest.raises((UsageError, PromptError), match=said):
        em.read(pair.tuned, given.pop("prompts"), **given)


def test_two_directions_of_one_name_and_site_are_refused(pair: em.ModelPair) -> None:
    both = [em.Direction(torch.randn(96), em.Site(2), name="a") for _ in range(2)]
    with pytest.raises(UsageError, match="several directions are called"):
        em.read(pair.tuned, SHORT, both)
    with pytest.raises(UsageError, match="column of every reading"):
        em.read(pair.tuned, SHORT, {"token": both[0]})
    profile = em.Profile([em.Direction(torch.randn(96), em.Site(layer), name="a") for layer in (0, 2)])
    assert list(em.read(pair.tuned, SHORT, profile).sites) == ["a at resid_post[0]", "a at resid_post[2]"]
    named = em.read(pair.tuned, SHORT, [both[0], em.Direction(torch.randn(96), em.Site(1), name="a")])
    assert list(named.sites) == ["a at resid_post[2]", "a at resid_post[1]"]
    with pytest.raises(UsageError, match="no scale in common"):
        named.beside(em.read(pair.tuned, SHORT, both[0]))


# ---- layer by layer --------------------------------------------------------------------------------------------------
def by_hand_layers(model: Any, ids: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream after every block by TransformerLens's own cache, and its logit lens by the model's own modules."""
    names = [hook_name(model, em.Site(layer)) for layer in range(int(model.cfg.n_layers))]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([list(ids)]), names_filter=names)
        x = torch.stack([cache[name][0].float() for name in names], 1)
        shares = model.unembed(model.ln_final(x.flatten(0, 1)[None]))[0].softmax(-1).topk(k).values
    return x.numpy(), shares.view(*x.shape[:2], k).numpy()


@pytest.mark.parametrize("steered", [False, True])
def test_every_layer_of_a_prompt_and_of_its_answer(
    pair: em.ModelPair, directions: dict[str, em.Direction], steered: bool
) -> None:
    model, edit = pair.tuned, em.Add(directions["two"], 3.0 if steered else 0.0)
    with em.intervene(model, edit):
        reading = em.read(model, [SHORT, LONG], directions, layers=True, alternatives=3, max_new_tokens=4)
        assert reading.layers == (0, 1, 2)
        for rows in reading.each():
            prompt = [SHORT, LONG][int(rows.prompt.iloc[0])]
            ids = answer_ids(model, prompt, 4)[: len(rows)]
            x, shares = by_hand_layers(model, ids, 3)
            for name, each in directions.items():
                found = np.stack(list(rows[f"{name} by layer"]))
                assert np.allclose(found, x @ each.unit.numpy(), atol=1e-4)
            assert np.allclose(np.stack(list(rows["norm by layer"])), np.linalg.norm(x, axis=-1), rtol=1e-5)
            found = np.array(rows["p by layer"].tolist())
            assert np.allclose(found, shares, atol=1e-5)
            assert found[:, 0].std() > 0.01 and abs(found[:, 0] - found[:, -1]).max() > 0.1  # layers differ
            # the theorem: after the last block the lens is the model
            assert np.allclose(found[:, -1], np.array(rows["p"].tolist()), atol=1e-5)
            assert [each[-1] for each in rows["likely by layer"]] == rows["likely"].tolist()
            assert np.allclose(np.stack(list(rows["two by layer"]))[:, 2], rows.two, atol=1e-6)


def test_some_layers_and_a_table_of_one_token(
    pair: em.ModelPair, directions: dict[str, em.Direction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_em.reading import texts

    kept = em.read(pair.tuned, [SHORT, LONG] * 2, directions, layers=[2, 0], alternatives=2)
    monkeypatch.setattr(texts, "_TOGETHER", 2)  # so that a text is held alone
    file = tmp_path / "layers.parquet"
    filed = em.read(pair.tuned, [SHORT, LONG] * 2, directions, layers=[2, 0], alternatives=2, out=file)
    assert filed.layers == kept.layers == (0, 2)
    for one, other in zip(kept.each(), filed.each(), strict=True):
        assert one["likely by layer"].tolist() == [[list(k) for k in each] for each in other["likely by layer"]]
    table = filed.layer_table(3, of=1)
    assert table.layer.tolist() == [0, 2] and list(table.columns) == ["layer", *directions, "band", "likely", "p"]
    row = kept.tokens[(kept.tokens.prompt == 1) & (kept.tokens["at"] == 3)].iloc[0]
    assert np.allclose(table.two, row["two by layer"], atol=1e-5) and table.two[1] == pytest.approx(row.two, abs=1e-5)
    assert table.band[1] == pytest.approx(float(kept.band("two")[kept.tokens.index == row.name][0]), rel=1e-5)
    with pytest.raises(UsageError, match="no token 99"):
        filed.layer_table(99)
    with pytest.raises(UsageError, match="were not read"):
        em.read(pair.tuned, SHORT, directions).layer_table(0)
    with pytest.raises(UsageError, match="3 blocks"):
        em.read(pair.tuned, SHORT, directions, layers=[3])


def test_a_model_whose_logits_are_more_than_its_unembedding_has_no_lens(
    pair: em.ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_em.reading import lens

    monkeypatch.setattr(lens, "soft_cap", lambda _: 1.0)  # as if the model squeezed them, which it does not
    with pytest.raises(ModelError, match="more than these"):
        em.read(pair.tuned, SHORT, alternatives=2, layers=True)


def test_the_last_layer_is_the_model_in_every_family(model: Any) -> None:
    rows = em.read(model, "the cat sat on the bank", alternatives=3, layers=True).tokens
    assert np.allclose(np.array(rows["p by layer"].tolist())[:, -1], np.array(rows["p"].tolist()), atol=1e-5)
