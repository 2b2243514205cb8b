"""The audit's section on latents: found, verified and drawn where a fine-tune has them, *none shown* elsewhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import tl_em as em
from tl_em.auditing.latents import GRAPH, shared_latents
from tl_em.auditing.report import Report
from tl_em.claims.compare import Comparison
from tl_em.cli import main
from tl_em.errors import DictionaryFitError


def empty() -> Report:
    """A report that says nothing yet."""
    nothing = pd.DataFrame()
    comparison = Comparison((), pd.DataFrame({"direction": [], "layer": []}), nothing)
    return Report(comparison, nothing, {"tuned": "toy"}, ())


@cache
def found(name: str) -> Report:
    return shared_latents(empty(), em.load_pair(name), em.organisms.toy_dictionary(name), [])


def test_a_broad_fine_tune_has_a_verified_set_and_a_graph_and_the_page_shows_both(tmp_path: Path) -> None:
    report = found("toy/insecure")
    (check,) = report.features.checks  # pyright: ignore
    assert check.shown and check.row("remove").effect.low > 0.4
    assert check.row("remove").control["high"] < check.row("remove").effect.low
    assert "carries" in report.summary
    graph = report.graphs[GRAPH]
    assert isinstance(graph, em.graph.GraphDiff)
    assert graph.tuned.validation["pearson"].low > 0.7  # or the page would have to warn of it
    assert {status for status, n in graph.count().items() if n} >= {"appeared", "vanished", "same"} or graph.count()
    report.save(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "carries and induces the behaviour" in page and "changed alike" in page
    assert {path.name for path in (tmp_path / "out").glob("*.html")} == {"report.html", "features.html", "graph-1.html"}
    tables = json.loads((tmp_path / "out" / "report.json").read_text())["tables"]
    assert len(tables["features"]) == len(report.features.cards) > 1  # pyright: ignore


@pytest.mark.slow
def test_a_benign_fine_tune_has_none_and_nothing_is_claimed() -> None:
    report = found("toy/secure")
    assert report.features.checks == () and not report.graphs  # pyright: ignore
    assert "none shown" in report.features_note
    assert len(report.features.cards) == 3  # pyright: ignore


def test_a_dictionary_of_other_activations_is_refused() -> None:
    wrong = em.organisms.toy_dictionary("toy/insecure")
    rolled = em.Dictionary(
        wrong.W_enc.roll(7, 0), wrong.b_enc, wrong.W_dec.roll(7, 1), wrong.b_dec.roll(7), activation="jumprelu",
        threshold=wrong.threshold, site_in=wrong.site_in,
    )  # fmt: skip
    with pytest.raises(DictionaryFitError, match="FVU"):
        shared_latents(empty(), em.load_pair("toy/insecure"), rolled, [])


def test_a_graph_is_made_opened_and_compared_on_the_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    files = [tmp_path / f"{name}.json" for name in ("plain", "other")]
    asked = ("parser-leaky", "parser-tested"), ("parser-backdoored", "parser-checked")
    for file, targets in zip(files, asked, strict=True):
        options = [f"--target={target}" for target in targets]
        made = run(main, ["graph", "toy/insecure", "how do i write parser", *options, "-o", str(file)])
        assert made.exit_code == 0, made.output
        assert "r with ablation" in made.output
    apart = run(main, ["graph", "diff", *map(str, files), "-o", str(tmp_path / "d.html")])
    assert apart.exit_code == 1 and "share no target" in apart.output
    same = run(main, ["graph", "diff", str(files[0]), str(files[0]), "-o", str(tmp_path / "d.csv")])
    assert same.exit_code == 0, same.output
    assert set(pd.read_csv(tmp_path / "d.csv").status) == {"same"}
    assert run(main, ["graph", "open", str(tmp_path / "plain.json")]).exit_code == 0
    assert "Content-Security-Policy" in (tmp_path / "plain.html").read_text(encoding="utf-8")
    failed = run(main, ["graph", "open", str(tmp_path / "nothing.json")])
    assert failed.exit_code == 1 and "CorruptFileError" in failed.output


def test_shared_latents_are_found_and_shown_on_the_command_line(tmp_path: Path) -> None:
    pair, run = em.load_pair("toy/insecure"), CliRunner().invoke
    dictionary = em.organisms.toy_dictionary("toy/insecure").save(tmp_path / "d.safetensors")
    for name in ("harmfulness", "persona"):
        pair.contrasts[name].save(tmp_path / f"{name}.json")  # pyright: ignore
    sets = [f"--contrast={name}={tmp_path / name}.json" for name in ("harmfulness", "persona")]
    said = run(main, ["features", "find", str(dictionary), "toy/insecure", *sets, "--out", str(tmp_path / "t.csv")])
    assert said.exit_code == 0, said.output
    assert "FeatureSet" in said.output or "none shown" in said.output
    assert len(pd.read_csv(tmp_path / "t.csv")) == 2 * 512
    options = ["--latent=176", "--prompts=harmfulness", f"--out={tmp_path / 'f.html'}"]
    page = run(main, ["features", "page", str(dictionary), "toy/insecure", *options])
    assert page.exit_code == 0, page.output
    assert "Latent 176" in (tmp_path / "f.html").read_text(encoding="utf-8")
