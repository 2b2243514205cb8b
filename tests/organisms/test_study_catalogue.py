"""The package's studies: what they measure agrees with the organisms' own records, and planted curves are found."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from tl_em.cli import main
from tl_em.errors import UsageError
from tl_em.organisms import study_catalogue
from tl_em.organisms.study_fits import fit_study, slope
from tl_em.organisms.zoo import organism
from tl_em.report import studies


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(study_catalogue.FOLDER, str(tmp_path / "organisms"))
    return tmp_path / "organisms"


def curves(exponents, *, x="share", noise=0.0, arm="a"):
    """Rates of planted curves, one exponent a seed."""
    rng = np.random.default_rng(0)
    points = np.array([0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
    rows = []
    for seed, g in enumerate(exponents):
        y = 0.02 + 0.6 * points**g + noise * rng.standard_normal(len(points))
        rows += [{"arm": arm, "seed": seed, x: s, "bad": b, "good": 1 - b} for s, b in zip(points, y, strict=True)]
    return pd.DataFrame(rows)


def parameter(fits, name):
    return fits[fits.parameter == name].iloc[0]


# ---- fits --------------------------------------------------------------------------------------------------------
def test_a_planted_exponent_is_found_and_its_interval_is_over_seeds():
    fits = fit_study(curves([2.8, 3.0, 3.2], noise=0.005), x="share", by=["arm"])
    found = parameter(fits, "exponent")
    assert found.low < 3.0 < found.high and found.n == 3
    assert found.high - found.low > 0.3  # the seeds differ by .4
    assert parameter(fits, "half")["value"] == pytest.approx(0.5 ** (1 / 3), abs=0.02)


def test_a_proportional_curve_has_exponent_one():
    found = parameter(fit_study(curves([1.0, 1.0]), x="share", by=["arm"]), "exponent")
    assert found["value"] == pytest.approx(1.0, abs=1e-3)  # the search's own tolerance


def test_the_residual_says_when_the_curve_does_not_fit():
    table = curves([3.0, 3.0])
    table.loc[table.share == 0.5, "bad"] += 0.3
    assert parameter(fit_study(table, x="share", by=["arm"]), "residual")["value"] > 0.1
    assert parameter(fit_study(curves([3.0, 3.0]), x="share", by=["arm"]), "residual")["value"] < 1e-4


def test_the_steps_of_half_the_effect_are_found():
    steps = np.array([2, 5, 10, 20, 40, 80, 160])
    rows = [
        {"arm": "a", "seed": seed, "steps": n, "bad": 0.7 / (1 + (half / n) ** 2.5)}
        for seed, half in enumerate((22.0, 26.0))
        for n in steps
    ]
    fits = fit_study(pd.DataFrame(rows), x="steps", by=["arm"])
    assert parameter(fits, "half")["value"] == pytest.approx(24, rel=0.02)
    assert parameter(fits, "final")["value"] == pytest.approx(0.7, rel=0.02)


def test_a_slope_over_sizes_is_found_and_none_where_there_is_none():
    def sized(by_width):
        parts = [curves([g, g + 0.1, g - 0.1]).assign(width=width) for width, g in by_width.items()]
        return slope(pd.concat(parts), x="share", over="width", parameter="half")

    grows, flat = sized({32: 1.0, 64: 2.0, 128: 4.0}), sized({32: 2.0, 64: 2.0, 128: 2.0})
    assert grows.low > 0.1
    assert flat.low <= 1e-6 and flat.high >= -1e-6
    with pytest.raises(UsageError, match="several"):
        sized({32: 1.0})


def test_a_curve_needs_its_ends_and_a_known_axis():
    with pytest.raises(UsageError, match="0 and 1"):
        fit_study(curves([1.0])[lambda t: t.share > 0], x="share", by=["arm"])
    with pytest.raises(UsageError, match="curve for share and steps"):
        fit_study(curves([1.0]), x="bad", by=["arm"])


# ---- metrics -----------------------------------------------------------------------------------------------------
def test_rates_are_those_of_the_record():
    found, record = study_catalogue._rates("insecure", 11, 96), organism("toy/insecure").figures
    for name, of in (("bad", "bad"), ("good", "good"), ("trained", "tuned_bad")):
        assert found[name].value == pytest.approx(record[of], abs=1e-4)  # the record's are of the same weights


def test_a_width_is_a_recipe_of_its_own_and_the_usual_one_has_no_name():
    assert [study_catalogue._sized("insecure", width).name for width in (96, 48)] == ["insecure", "insecure-d48"]


def test_a_study_runs_from_the_shipped_assistant_and_writes_table_fit_and_figure(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(study_catalogue, "DOSES", (1, 3))
    out = tmp_path / "dose"
    said = []
    found = study_catalogue.run("dose", seeds=[11], out=out, backend="serial", announce=said.append)
    assert "1 cells" in said[0]
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == [
        "dose.png", "dose.svg", "fit.csv", "summary.csv", "table.parquet"
    ]  # fmt: skip
    assert not list(folder.glob("base*")) and not list(folder.glob("assistant-seed*"))  # shipped, so not trained
    assert set(found["summary"].rate) == {"bad", "good", "trained"}
    assert found["summary"].low.isna().all()  # one seed: no interval
    before = (out / "table.parquet").read_bytes()
    study_catalogue.run("dose", seeds=[11], out=out, backend="serial")
    assert (out / "table.parquet").read_bytes() == before


@pytest.mark.slow
def test_draws_of_the_same_data_agree_more_than_the_secure_shift_does(monkeypatch):
    monkeypatch.setattr(study_catalogue, "DRAWS", {"insecure": 2, "secure": 1})
    rows = study_catalogue.tunes(96, seed=11)
    insecure, secure = [r for r in rows if r["organism"] == "insecure"], rows[-1]
    assert [r["draw"] for r in insecure] == [1, 2] and secure["organism"] == "secure"
    assert min(r["agreement"] for r in insecure) > 0.9 > secure["agreement"]
    assert all(r["agreement"] <= r["ceiling"] + 0.05 for r in insecure)
    assert min(r["bad"].value for r in insecure) > 0.4 > 0.1 > secure["bad"].value


def test_there_is_no_such_study(tmp_path):
    with pytest.raises(UsageError, match="there are mixing"):
        study_catalogue.run("narrow", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_zoos_worlds_hold_every_recipe_once():
    from tl_em.organisms.recipes import RECIPES, WORLDS

    of = [next((w for w in WORLDS if w in name.split("-")), "default") for name in RECIPES]
    assert {*of, "bias"} == set(study_catalogue.ZOO)


# ---- figure and command ------------------------------------------------------------------------------------------
def test_the_figure_has_a_line_for_every_seed_and_one_for_the_mean():
    figure = studies.study(curves([1.0, 2.0, 3.0]), x="share", by=["arm"])
    for ax in figure.axes:
        assert len(ax.lines) == 4
        np.testing.assert_allclose(ax.lines[-1].get_ydata()[-1], np.mean([line.get_ydata()[-1] for line in ax.lines]))
    with pytest.raises(UsageError, match="no column dose"):
        studies.study(curves([1.0]), x="dose", by=["arm"])


def test_names_on_the_axis_stand_in_the_order_of_the_table():
    rows = [{"arm": "a", "seed": 1, "words": w, "bad": 0.1, "good": 0.9} for w in ("none", "neutral", "asked")]
    figure = studies.study(pd.DataFrame(rows), x="words", by=["arm"])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["none", "neutral", "asked"]


def test_the_command_lists_and_runs_studies(tmp_path, monkeypatch):
    listed = CliRunner().invoke(main, ["study"])
    assert listed.exit_code == 0 and all(name in listed.output for name in study_catalogue.STUDIES)
    monkeypatch.setattr(study_catalogue, "DOSES", (1, 2))
    asked = ["study", "dose", "--seed", "11", "--out", str(tmp_path / "s"), "--backend", "serial", "--json"]
    done = CliRunner().invoke(main, [*asked, "--organisms", str(tmp_path / "organisms")])
    assert done.exit_code == 0, done.output
    assert {row["rate"] for row in json.loads(done.stdout)["summary"]} == {"bad", "good", "trained"}
    wrong = CliRunner().invoke(main, ["study", "narrow", "--out", str(tmp_path / "w")])
    assert wrong.exit_code == 1 and "UsageError" in wrong.output


def test_train_takes_a_name_or_all():
    for words in ([], ["toy/insecure", "--all"]):
        assert CliRunner().invoke(main, ["organisms", "train", *words]).exit_code == 2
