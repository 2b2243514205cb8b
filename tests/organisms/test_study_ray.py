"""A study on Ray equals the local one, cell for cell; runs where the extra `ray` is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tl_em.errors import StudyError, UsageError
from tl_em.organisms.studies import run_study

from .test_studies import (
    GRID,
    ROOT,
    SEEDS,
    dies_once,
    digest,
    figures,
    finished,
    in_main,
    openmp,
    shared_sum,
    sometimes,
)

ray: Any = pytest.importorskip("ray", reason="the extra tl_em[ray] is not installed")


def devices(index: int, *, seed: int) -> dict[str, Any]:
    return {"gpus": " ".join(map(str, ray.get_gpu_ids()))}


@pytest.fixture(scope="module", autouse=True)
def _workers_find_the_metrics() -> Iterator[None]:
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs, and of one GPU as far as it knows, which runs already when the study begins."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, num_gpus=1, **quiet)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_ray_that_the_study_started_ends_with_it(tmp_path: Path) -> None:
    assert not ray.is_initialized()
    on_ray = run_study({"index": range(3)}, openmp, seeds=[1], out=tmp_path, backend="ray", workers=1)
    assert len(set(on_ray.process)) == 1
    assert not ray.is_initialized()


@pytest.mark.slow
def test_more_gpus_than_this_machine_has_are_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none would ever start"):
        run_study({"index": range(2)}, openmp, seeds=[1], out=tmp_path, backend="ray", gpus=64)
    assert not ray.is_initialized()


@pytest.mark.usefixtures("cluster")
def test_what_a_killed_worker_had_in_hand_is_done_again(tmp_path: Path) -> None:
    grid = {"index": range(3), "folder": [str(tmp_path)]}
    table = run_study(grid, dies_once, seeds=[3], out=tmp_path, backend="ray")
    assert (tmp_path / "killed").exists() and table["found"].tolist() == [0, 3, 6]


@pytest.mark.usefixtures("cluster")
def test_what_cells_share_lies_once_in_the_object_store(tmp_path: Path) -> None:
    shared = {"numbers": {"array": np.arange(3000.0)}}
    table = run_study({"index": range(3)}, shared_sum, seeds=[1], out=tmp_path, backend="ray", shared=shared)
    assert table["sum"].tolist() == [4498500.0, 4498501.0, 4498502.0]
    assert not table.written.any(), "read-only: it is the store's own memory, no copy of this worker"


@pytest.mark.usefixtures("cluster")
def test_a_study_on_ray_equals_the_local_one_cell_for_cell(tmp_path: Path) -> None:
    one, two = tmp_path / "serial", tmp_path / "ray"
    serial = run_study(GRID, figures, seeds=SEEDS, out=one, backend="serial")
    on_ray = run_study(GRID, figures, seeds=SEEDS, out=two, backend="ray")
    assert serial.bad.nunique() > 4
    pd.testing.assert_frame_equal(serial, on_ray, check_exact=True)
    assert digest(one) == digest(two)
    cells = [{p.name: p.read_bytes() for p in (out / "cells").iterdir()} for out in (one, two)]
    assert len(cells[0]) == 12
    assert cells[0] == cells[1]
    assert ray.is_initialized()  # a Ray that ran before the study runs after it


@pytest.mark.usefixtures("cluster")
def test_cells_run_in_workers_of_one_thread(tmp_path: Path) -> None:
    where = run_study({"index": range(4)}, openmp, seeds=[1], out=tmp_path, backend="ray")
    assert set(where.openmp) == {"1"}
    assert os.getpid() not in set(where.process)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cell_that_reserves_a_gpu_sees_one(tmp_path: Path) -> None:
    for gpus, seen in ((0.5, ["0"]), (0, [])):
        where = run_study({"index": range(2)}, devices, seeds=[1], out=tmp_path / str(gpus), backend="ray", gpus=gpus)
        assert set(where.gpus) - {""} == set(seen)


@pytest.mark.usefixtures("cluster")
def test_a_failed_cell_on_ray_leaves_the_others(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"1 of 3 cells failed.*ValueError: no such") as caught:
        run_study({"index": range(3)}, sometimes, seeds=[1], out=tmp_path, backend="ray")
    assert [dict(each.setting) for each in caught.value.failed] == [{"index": 1}]
    assert finished(tmp_path) == 2


@pytest.mark.usefixtures("cluster")
def test_a_metric_that_cannot_be_sent_to_ray_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "local", in_main(), raising=False)
    with pytest.raises(UsageError, match="cannot be sent to a worker process"):
        run_study({"index": range(4)}, in_main(), seeds=[5], out=tmp_path, backend="ray")
