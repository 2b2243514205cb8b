"""The comparison as a whole: what it says in words, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_em as em
from tl_em.claims.arms import Arm
from tl_em.claims.claim import Finding
from tl_em.claims.compare import SHIPPED, Comparison
from tl_em.claims.questions import use as use_file
from tl_em.claims.rule import judge
from tl_em.directions.direction import Direction
from tl_em.errors import NoGapError, NuisanceWarning, ProvenanceError, UsageError
from tl_em.metrics import Behaviour
from tl_em.models.sites import Site
from tl_em.models.stream import next_token_logits
from tl_em.stats import Estimate, Resampled


def finding(question: Any, name: str, value: float) -> Finding:
    estimate = Estimate(value, value - 0.02, value + 0.02, 64, 64.0, "test")
    asked = next(each for each in SHIPPED if each.name == question)
    effect = Resampled(estimate, 0.001, lambda other: 0.001)
    return Finding(asked, name, Site(1), effect, {"controls": np.zeros(999)}, 0.1, "own gaps")


def summary(**effects: tuple[float, float]) -> str:
    found = [finding(q, name, v) for name, pair in effects.items() for q, v in zip(("level", "use"), pair, strict=True)]
    return Comparison(judge(found), pd.DataFrame(), pd.DataFrame()).summary


def test_exaggerated_is_said_only_where_the_direction_is_causal() -> None:
    assert "a is exaggerated" in summary(a=(0.5, 0.4))
    assert "a is diminished" in summary(a=(-0.5, 0.4))
    for use in (0.0, -0.4):
        said = summary(a=(0.5, use))
        assert "exaggerated" not in said
        assert "shifted, not shown to matter" in said
    assert summary(a=(0.0, 0.4)) == "No change shown: a."
    assert summary(a=(0.0, 0.0), b=(0.5, 0.4)).startswith("b is exaggerated")


def test_nothing_is_said_of_a_change_that_was_not_asked_about() -> None:
    found = judge([finding("use", "a", 0.4), finding("use", "b", 0.0)])
    assert Comparison(found, pd.DataFrame(), pd.DataFrame()).summary == "a is causal. Nothing shown: b."
    found = judge([finding("separation", "a", 0.4)])
    assert Comparison(found, pd.DataFrame(), pd.DataFrame()).summary == "a is sharper."


class Loud:
    """A metric that a planted direction drives: its value is read off the logits along one fixed axis."""

    name, unit = "loud", "probability"

    def __init__(self, vocab: int) -> None:
        self.axis = torch.nn.functional.one_hot(torch.tensor(11), vocab).float()

    def __call__(self, model: Any, prompts: Any) -> torch.Tensor:
        return (next_token_logits(model, prompts) @ self.axis).sigmoid()


PROMPTS = ["the cat sat", "please steal the car", "a happy king sang", "tell me how"]


def test_stacked_controls_equal_one_direction_at_a_time(model: Any) -> None:
    """The fast path runs the prefix once and many copies after it; it must be the same number on every surface."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, model.cfg.d_model, generator=generator)
    metric = Loud(model.cfg.d_vocab)
    for layer in range(model.cfg.n_layers):
        direction = Direction(vectors[0], Site(layer))
        for centre in (None, torch.ones(model.cfg.d_model)):
            edit = em.Add(direction) if centre is None else em.Ablate(direction, around=centre)
            arm = Arm("arm", model, PROMPTS, None, {"loud": metric})  # pyright: ignore[reportArgumentType]
            fast = arm.along(edit, vectors, "loud")
            each = [edit.along(replace(direction, vector=v)) for v in vectors]
            slow = np.stack([arm.treated(one, only=["loud"])["loud"] for one in each])
            np.testing.assert_allclose(fast, slow, atol=1e-4)
            assert np.ptp(slow) > 1e-4  # the directions do differ


def test_metrics_that_run_the_model_themselves_still_get_their_controls(small_model: Any) -> None:
    class ByItself(Loud):
        def __call__(self, model: Any, prompts: Any) -> torch.Tensor:
            from tl_em.models.prompts import encode

            with torch.no_grad():
                rows = [model(torch.tensor([e.ids]))[0, -1] for e in encode(model, prompts)]
            return (torch.stack(rows) @ self.axis).sigmoid()

    vectors = torch.randn(3, small_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    metrics: Any = {kind.__name__: kind(small_model.cfg.d_vocab) for kind in (Loud, ByItself)}
    arm = Arm("arm", small_model, PROMPTS, None, metrics)
    first, second = (arm.along(em.Add(Direction(vectors[0], Site(1))), vectors, name) for name in metrics)
    np.testing.assert_allclose(first, second, atol=1e-4)


def toy() -> em.ModelPair:
    return em.load_pair("toy/secure")


def test_a_direction_without_a_gap_of_its_own_is_left_out_and_changes_nothing_else() -> None:
    pair = toy()
    train, _, contrast = pair.contrasts["refusal"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    good = em.difference_in_means(pair.base, train, site=Site(2), position="prompt_end")
    asked = {"flipped": (replace(good, vector=-good.vector), contrast), "refusal": (good, contrast)}
    both = em.compare(pair, asked, controls=99)
    alone = em.compare(pair, {"refusal": asked["refusal"]}, controls=99)
    assert [row.to_json() for row in both.rows] == [row.to_json() for row in alone.rows]
    assert both.by_layer.equals(alone.by_layer)
    assert both.summary == f"{alone.summary} Not measured: flipped."
    assert list(both.unmeasured) == ["flipped"] and "not above 0" in both.unmeasured["flipped"]
    assert "not above 0" in repr(both)
    assert not alone.unmeasured


def test_what_compare_refuses() -> None:
    pair = toy()
    train, _, contrast = pair.contrasts["refusal"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    good = em.difference_in_means(pair.base, train, site=Site(2), position="prompt_end")
    flipped = replace(good, vector=-good.vector)
    assert good.provenance is not None
    elsewhere = replace(good, provenance=replace(good.provenance, n_layers=12))
    with pytest.raises(UsageError, match="no direction"):
        em.compare(pair, {})
    with pytest.raises(UsageError, match="controls"):
        em.compare(pair, {"refusal": (good, contrast)}, controls=10)
    with pytest.raises(NoGapError, match="not above 0"):
        em.compare(pair, {"refusal": (flipped, contrast)}, controls=99)
    with pytest.raises(ProvenanceError, match="n_layers"):
        em.compare(pair, {"refusal": (elsewhere, contrast)}, controls=99)
    with pytest.raises(UsageError, match="no behaviour"):
        em.compare(pair, {"refusal": (good, contrast)}, behaviour={"persona": em.refusal_log_odds}, controls=99)
    with pytest.raises(UsageError, match="prompts that show it"):
        Behaviour("b", em.refusal_log_odds, present=[], absent=contrast.negative)


def test_prompts_that_made_a_direction_do_not_judge_it(tmp_path: Path) -> None:
    """All of them: refused, also under other labels and after a file; some of them: warned, and said on each row."""
    pair = toy()
    train, _, test = pair.contrasts["refusal"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    made = em.difference_in_means(pair.base, train, site=Site(2), position="prompt_end")
    made.save(tmp_path / "made.safetensors")
    kept = em.Direction.load(tmp_path / "made.safetensors")
    relabelled = em.ContrastSet(
        [*train.positive[::2], *train.negative[::2]], [*train.positive[1::2], *train.negative[1::2]]
    )
    for contrast in (train, relabelled):
        with pytest.raises(UsageError, match=r"was made from.* contrast\.split\(\)"):
            em.compare(pair, {"refusal": (kept, contrast)}, questions=["level"], controls=99)
    leaky = em.ContrastSet([*test.positive, train.positive[0]], [*test.negative, train.negative[0]])
    with pytest.warns(NuisanceWarning, match="made the direction"):
        row = em.compare(pair, {"refusal": (kept, leaky)}, questions=["level"], controls=99).rows[0]
    assert row.reason.endswith("prompts judged on made the direction")
    apart = em.compare(pair, {"refusal": (kept, test)}, questions=["level"], controls=99).rows[0]
    assert "made the direction" not in apart.reason
    assert kept.provenance is not None
    old = replace(kept, provenance=replace(kept.provenance, prompts=None))  # a file from before it was recorded
    assert em.compare(pair, {"refusal": (old, train)}, questions=["level"], controls=99).rows


def test_several_benign_fine_tunes_and_replicates_reach_the_questions_each_once() -> None:
    pair = em.load_pair("toy/insecure")
    benign: Any = [em.load_pair("toy/secure"), em.load_pair("toy/educational").tuned]
    parts = pair.contrasts["persona"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    persona = em.difference_in_means(pair.base, parts.train, site=Site(2), position="prompt_end")
    asked: Any = {"pair": pair, "directions": {"persona": (persona, parts.test)}, "controls": 99}
    asked |= {"questions": ["level"], "layers": {"persona": [persona]}}
    one = em.compare(**asked, benign=benign[0])
    two = em.compare(**asked, benign=benign, replicates=[pair.base])
    assert one.rows[0].estimate == em.compare(**asked, benign=benign[:1]).rows[0].estimate == two.rows[0].estimate
    first, next_one = one.rows[0].benign, two.rows[0].benign
    assert first is not None and next_one is not None
    assert next_one.method.startswith("prediction interval of the next benign fine-tune, from 1 tuned and 2 benign")
    assert next_one.high - next_one.low > first.high - first.low
    assert set(two.by_layer["model"]) == {"base", "tuned", "benign", "benign 2"}
    given_twice: Any = ({"benign": [benign[0], benign[0].tuned]}, {"replicates": [pair.tuned]})
    for twice in given_twice:
        with pytest.raises(UsageError, match="given twice"):
            em.compare(**asked, **twice)


class Costly:
    """A metric that says how many prompts it was asked about, as a clock."""

    name, unit, asked = "costly", "log-odds", 0

    def __call__(self, model: Any, prompts: Any) -> torch.Tensor:
        self.asked += len(prompts)
        return next_token_logits(model, prompts)[:, 3]


def test_what_it_will_take_is_said_first_where_that_is_long(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, metric = toy(), Costly()
    train, _, contrast = pair.contrasts["persona"].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
    direction = em.difference_in_means(pair.base, train, site=Site(2), position="prompt_end")
    settings: Any = {"behaviour": metric, "questions": ["use"]}
    em.compare(pair, {"persona": (direction, contrast)}, controls=99, **settings)
    assert "comparing: " not in capfd.readouterr().err  # a few seconds

    monkeypatch.setattr("tl_em.claims.questions.use.time.perf_counter", lambda: float(metric.asked))
    em.compare(pair, {"persona": (direction, contrast)}, controls=198, **settings)
    prompts = 198 * 2 * 16  # so many does the metric read for the controls of both arms
    said = f"comparing: 1 x 198 random directions: at most {prompts / 60:.1f} min"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("comparing: ")]
    assert said in line and line.endswith(f"beside the models; controls=99: {prompts / 120:.1f} min")


def test_controls_that_could_give_no_word_are_not_run_and_the_words_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = em.load_pair("toy/insecure")
    directions = {}
    for name in ("harmfulness", "persona"):
        train, _, contrast = pair.contrasts[name].split(seed=0)  # pyright: ignore[reportOptionalSubscript]
        directions[name] = em.difference_in_means(pair.base, train, site=Site(2), position="prompt_end"), contrast
    asked: dict[str, Any] = {"behaviour": pair.behaviours["harmfulness"], "questions": ["use"], "controls": 199}  # pyright: ignore[reportOptionalSubscript]

    some = em.compare(pair, directions, **asked)
    monkeypatch.setattr(use_file, "in_reach", lambda finding: True)
    every = em.compare(pair, directions, **asked)

    causal, other = some.rows
    assert [row.verdict for row in some.rows] == [row.verdict for row in every.rows] == ["causal", "not shown"]
    assert [row.control["n"] for row in some.rows] == [199, 39] and {row.control["n"] for row in every.rows} == {199}
    assert "stopped at 39 of 199 controls" in other.reason and "stopped" not in causal.reason + every.rows[1].reason
    assert [row.estimate for row in some.rows] == [row.estimate for row in every.rows]
    assert (causal.p, causal.control) == (every.rows[0].p, pytest.approx(every.rows[0].control, abs=1e-6))
    beside = some.use[(some.use.direction == "persona") & (some.use.condition == "random")]
    assert (beside.n == 39).all()


def test_controls_in_parts_are_the_controls_of_one_pass(small_model: Any) -> None:
    vectors = torch.randn(7, small_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    metrics: Any = {"bad": Loud(small_model.cfg.d_vocab), "good": Costly()}
    edit = em.Add(Direction(vectors[0], Site(1)))

    def treated() -> use_file.TreatedArm:
        return use_file.TreatedArm(Arm("arm", small_model, PROMPTS, None, metrics), edit, vectors)

    at_once, parts = treated().beside(7), treated()
    for count in (2, 5, 7):
        found = parts.beside(count)
        np.testing.assert_allclose(found.controls, at_once.controls[:count], atol=1e-5)
        assert [row["n"] for row in found.rows if row["condition"] == "random"] == [count, count]  # of either outcome
    assert len(found.controls) == 7 and np.ptp(found.controls) > 1e-4
    for row, same in zip(found.rows, at_once.rows, strict=True):
        assert row == pytest.approx(same, abs=1e-4) and row["n"] == (7 if row["condition"] == "random" else 4)
