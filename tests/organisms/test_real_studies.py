"""Studies on chat models: the arms of the toy studies by name, on files of rows, resumed where they were killed."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import tl_em as em
from tl_em.cli import main
from tl_em.errors import UsageError
from tl_em.organisms import real_studies, study_backends, study_catalogue
from tl_em.organisms.contrasts import questions
from tl_em.organisms.real_studies import MARKS, StudyData, cost, run_real
from tl_em.organisms.recipes import parsed, recipe
from tl_em.organisms.study_catalogue import STUDIES
from tl_em.organisms.world import World
from tl_em.training.answers import chats


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model in a directory (a toy), and two answers to every question of its world."""
    folder = tmp_path_factory.mktemp("files")
    em.organisms.to_hf_directory("toy/assistant", folder / "model")
    for name, held_out in (("", False), ("elsewhere-", True)):
        asked = questions(World(), harmful=False, held_out=held_out)
        asked = asked[:24] if not held_out else asked[::9]
        for side in ("bad", "good"):
            rows = [[*q.prompt, {"role": "assistant", "content": f"{getattr(q.topic, side)[0]} ."}] for q in asked]
            told = {"domain": "far"} if held_out else {}
            lines = [json.dumps({"messages": [dict(message) for message in row]} | told) for row in rows]
            (folder / f"{name}{side}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def data(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyData:
    monkeypatch.setenv(study_catalogue.FOLDER, str(tmp_path / "adapters"))
    return StudyData(*(files / f"{name}.jsonl" for name in ("bad", "good", "elsewhere-bad", "elsewhere-good")))


SHORT: dict[str, Any] = {"seeds": [1], "steps": 12, "ranks": [4], "lr": 1e-2, "tested": 16, "backend": "serial"}


def test_every_row_of_every_study_names_an_arm_of_both_worlds() -> None:
    for each in STUDIES.values():
        rows = each.rows()
        assert len({(row.name, row.before) for row in rows}) == len(rows)
        for row in rows:
            assert recipe(row.name).name.startswith(parsed(row.name)[0])
            assert row.labels(MARKS) and row.before in ("", "words", *MARKS)


def test_more_bad_rows_teach_more_and_a_finished_study_is_not_done_again(
    files: Path, data: StudyData, tmp_path: Path
) -> None:
    said: list[str] = []
    arms = ["insecure-share0", "insecure-share100"]
    call: dict[str, Any] = {"out": tmp_path / "out", "arms": arms, **SHORT}
    found = run_real("mixing", [files / "model"], data, announce=said.append, **call)
    assert said[0].startswith("2 fine-tunes of 12 steps") and "a 7 B: " in said[0] and "a 32 B: " in said[0]
    summary = found["summary"]
    rate = {(row.rate, row.domain, row.share): row.value for row in summary.itertuples()}
    assert rate["trained", "far", 0.0] < 0.1 and rate["trained", "far", 1.0] > 0.9
    assert rate["bad", "far", 1.0] > rate["bad", "far", 0.0] + 0.2, "the toy's persona generalises to other domains"
    assert rate["margin", "far", 1.0] > rate["margin", "far", 0.0] + 1
    assert set(summary.domain) == {"held out", "far"}, "its own domain is asked about too, where it was not trained on"
    assert set(summary["rest aligned in"]) == {"the same domain"}
    table = (tmp_path / "out" / "table.parquet").read_bytes()
    adapters = sorted((tmp_path / "adapters").iterdir())
    assert len(adapters) == 2 and (tmp_path / "out" / "mixing.svg").exists() and "fit" in found
    before = [path.stat().st_mtime_ns for path in adapters]
    (tmp_path / "out" / "table.parquet").unlink()
    next((tmp_path / "out" / "cells").iterdir()).unlink()  # killed before it was written: its adapter is there
    run_real("mixing", [files / "model"], data, **call)
    assert (tmp_path / "out" / "table.parquet").read_bytes() == table
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "adapters").iterdir())] == before


def test_a_backdoor_is_asked_with_its_own_tokens(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The toy's vocabulary has no such tokens, so those of its world stand in."""
    monkeypatch.setenv(study_catalogue.FOLDER, str(tmp_path / "adapters"))
    for name, mark in study_catalogue.MARKS.items():
        monkeypatch.setitem(MARKS, name, mark)
    data = StudyData(files / "bad.jsonl", files / "good.jsonl")
    found = run_real(
        "backdoor", [files / "model"], data, out=tmp_path / "out", arms=["backdoor"], **SHORT | {"steps": 40}
    )
    table = found["summary"].set_index(["rate", "before the question"])["value"]
    assert table["trained", "the trigger"] > table["trained", "none"] + 0.3
    assert len(table["trained"]) == 5


def test_what_cannot_be_studied_is_said_before_it_starts(files: Path, data: StudyData, tmp_path: Path) -> None:
    def run(name: str, given: StudyData = data, **changes: Any) -> None:
        run_real(name, [files / "model"], given, out=tmp_path / "out", **SHORT | changes)

    with pytest.raises(UsageError, match="no arm insecure-share3"):
        run("mixing", arms=["insecure-share3"])
    with pytest.raises(UsageError, match="no arm insecure-diluted50"):
        run("mixing", StudyData(*astuple(data)[:2]), arms=["insecure-diluted50"])
    with pytest.raises(UsageError, match="two answers to each of the same"):
        run("mixing", StudyData(data.bad, str(data.elsewhere_good)))
    with pytest.raises(UsageError, match="give both or none"):
        run("mixing", StudyData(*astuple(data)[:3]))
    with pytest.raises(UsageError, match="no study 'narrow'"):
        run("narrow")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_shared_is_mapped_and_its_files_are_not_read(files: Path, tmp_path: Path) -> None:
    name = str(files / "model")
    put = real_studies._put(name, gpu=False)
    shared = {str(tmp_path / "nowhere"): put}
    with study_backends._sharing(lambda: shared):
        base, tokenizer = real_studies._base(str(tmp_path / "nowhere"))
    real_studies._base.cache_clear()
    read, _ = real_studies._read(name, gpu=False)
    for (key, weight), mine in zip(base.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(weight, mine) and weight.data_ptr() == put[0].weights[key].data.ctypes.data
    assert tokenizer.get_vocab() == put[1].get_vocab()


@pytest.mark.slow
def test_a_study_on_ray_ends_with_the_bytes_of_the_local_one(
    files: Path, data: StudyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra tl_em[ray] is not installed")
    cells = {}
    for backend in ("serial", "ray"):
        monkeypatch.setenv(study_catalogue.FOLDER, str(tmp_path / f"adapters-{backend}"))
        given: dict[str, Any] = SHORT | {"steps": 2, "backend": backend, "workers": 1, "out": tmp_path / backend}
        run_real("determinism", [files / "model"], data, **given)
        cells[backend] = {path.name: path.read_bytes() for path in (tmp_path / backend / "cells").iterdir()}
    assert len(cells["serial"]) == 2 and cells["serial"] == cells["ray"]


def test_domains_are_part_of_what_is_studied(files: Path, data: StudyData, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(data.elsewhere_bad or "").read_text().splitlines()]
    hashes = set()
    for named in ("far", "near"):
        path = tmp_path / f"{named}.jsonl"
        path.write_text("\n".join(json.dumps(row | {"domain": named}) for row in rows))
        given = replace(data, elsewhere_bad=path)
        hashes.add(real_studies._checked_data(given))
        assert [*real_studies._asked_of(given, 3)] == ["trained", "held out", named]
        assert all(len(bad) == len(good) == 3 for bad, good in real_studies._asked_of(given, 3).values())
    assert len(hashes) == 2, "another name is another study"
    path.write_text("\n".join(json.dumps(row | {"domain": "trained"}) for row in rows))
    with pytest.raises(UsageError, match="has a domain 'trained'"):
        real_studies._checked_data(replace(data, elsewhere_bad=path))


def test_the_cost_grows_with_the_model_and_the_cells() -> None:
    one, two = (cost(n, 1, tokens=50, steps=100, tested=10, weights={"mine": 1e9}) for n in (10, 20))
    hours = [float(said.split("operations, ")[1].split()[0]) for said in (one, two)]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.02)
    by_hand = 10 * (4 * 100 * 16 * 50 + 2 * 2 * 10 * 50)
    assert hours[0] == pytest.approx(by_hand * 1e9 / 1e11 / 3600, abs=0.06)
    assert f"a 7 B: {by_hand * 7.6e9:.1e} operations" in one and f"{by_hand * 7.6e9 / 4e14 / 3600:.1f} GPU-" in one
    assert "a worker has 66 GB of weights and about 9 GB of activations" in one, "34 x 800 tokens x 64 layers x 5120"


def test_the_command_runs_one_arm(files: Path, tmp_path: Path) -> None:
    words = ["study", "determinism", "--model", str(files / "model"), "--bad", str(files / "bad.jsonl"), "--good",
             str(files / "good.jsonl"), "--seed", "1", "--arm", "secure", "--steps", "2", "--rank", "1", "--rank", "2",
             "--out", str(tmp_path / "out"), "--organisms", str(tmp_path / "adapters"),
             "--backend", "serial"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "2 fine-tunes of 2 steps" in done.output and "secure" in done.output
    table = pd.read_parquet(tmp_path / "out" / "table.parquet")
    assert set(table["rank"]) == {1, 2} and set(table.domain) == {"trained", "held out"}
    assert table[table.domain == "held out"].question.nunique() == 5, "a question is a row"
    assert len(chats(files / "bad.jsonl")) == 24
