"""A study ends with the same bytes whatever runs it, whatever kills it and whatever happens to its files."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tl_em.errors import CorruptFileError, OutputError, StudyError, UsageError
from tl_em.organisms import study_backends
from tl_em.organisms.studies import run_study, summarise_study
from tl_em.organisms.study_backends import FailedCell, check_backend
from tl_em.organisms.study_cells import StudyCell, kept, read_cell, write_cell
from tl_em.stats import Estimate

ROOT = Path(__file__).parents[2]
GRID: dict[str, Any] = {"share": [0.0, 0.25, 1.0], "arm": ["none", "neutral"]}
SEEDS = (102, 101)
MANY = 300


# ---- metrics: at the top level, where workers find them ----------------------------------------------------------
def figures(share: float, arm: str, *, seed: int) -> dict[str, Any]:
    """Float sums whose last bits would depend on the number of threads or on anybody else's random numbers."""
    drawn = torch.randn(96, 96, generator=torch.Generator().manual_seed(seed + len(arm)))
    bad = float((drawn @ drawn.T).tanh().logsumexp(0).sum() * share)
    estimate = Estimate(bad, bad - 0.1, math.nan, n=8, n_effective=8.0, method="bootstrap")
    return {"bad": estimate, "third": np.float64(1) / 3, "threads": torch.get_num_threads(), "gone": math.nan}


def openmp(index: int, *, seed: int) -> dict[str, Any]:
    return {"openmp": os.environ.get("OMP_NUM_THREADS"), "process": os.getpid()}


def counted(index: int, *, seed: int) -> list[dict[str, float]]:
    """Two rows; says on a file that it was called, and is not itself where another file says so."""
    with Path(os.environ["STUDY_CALLS"]).open("a") as calls:
        calls.write(f"{index}\n")
    broken = Path(os.environ["STUDY_CALLS"]).with_name("broken")
    if broken.exists() and index % 2:
        raise {"error": ValueError, "interrupt": KeyboardInterrupt}[broken.read_text()]("no such\nthing")
    return [{"row": row, "value": index / 3 + row} for row in range(2)]


def held(index: int, *, seed: int) -> dict[str, float]:
    """The last cell waits for as long as a file is there, so a study that is to be killed cannot end first."""
    while index == MANY - 1 and Path(os.environ.get("STUDY_HOLD", "")).is_file():
        time.sleep(0.01)
    return {"value": random.Random(f"{index} {seed}").gauss(0, 1)}


def sometimes(index: int, *, seed: int) -> dict[str, float]:
    if index == 1:
        raise ValueError("no such\nthing")
    return {"value": index / 3}


def deadly(index: int, *, seed: int) -> dict[str, float]:
    os._exit(1)


def returned(what: str, *, seed: int) -> Any:
    return RETURNED[what]


RETURNED: dict[str, Any] = {
    "a mapping": {"x": 1.5, "y": "a"},
    "a list": [{"x": 1.5, "y": "a"}],
    "a frame": pd.DataFrame({"x": [1.5], "y": ["a"]}, index=[7]),
    "tensors": {"x": torch.tensor(1.5), "y": np.array(["a"])},
    "nothing": [],
    "a setting": {"what": 1},
    "an array": {"x": np.zeros(3)},
    "a date": {"x": pd.Timestamp(0)},
    "no rows": 3,
}


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """New processes get the path; those of earlier tests would not have it, and ours are not left behind."""
    from joblib.externals.loky import get_reusable_executor

    sys.path.insert(0, str(ROOT))
    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)
    sys.path.remove(str(ROOT))


def on_workers(test: Any) -> Any:
    return pytest.mark.starts("workers of loky")(pytest.mark.usefixtures("workers")(test))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STUDY_CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").write_text("")
    return tmp_path / "calls"


def made(calls: Path) -> list[int]:
    """Which cells were computed since the last time that this was asked."""
    found = [int(line) for line in calls.read_text().split()]
    calls.write_text("")
    return found


def study(out: Path, metric: Any = counted, n: int = 4, **options: Any) -> pd.DataFrame:
    return run_study({"index": range(n)}, metric, seeds=[5], out=out, backend="serial", **options)


def digest(out: Path) -> str:
    return hashlib.sha256((out / "table.parquet").read_bytes()).hexdigest()


def cell_of(out: Path, index: int) -> Path:
    """The file of the cell with that index."""
    files = {json.loads(p.read_text())["inputs"]["setting"]["index"]: p for p in (out / "cells").glob("*.json")}
    return files[index]


# ---- the table ---------------------------------------------------------------------------------------------------
def test_a_product_grid_is_one_tidy_table_in_the_order_of_the_call(tmp_path: Path) -> None:
    table = run_study(GRID, figures, seeds=SEEDS, out=tmp_path, backend="serial")
    estimate = ["bad", "bad_low", "bad_high", "bad_n"]
    assert list(table) == ["share", "arm", "seed", *estimate, "third", "threads", "gone"]
    order = [(share, arm, seed) for share in GRID["share"] for arm in GRID["arm"] for seed in SEEDS]
    assert list(table[["share", "arm", "seed"]].itertuples(index=False, name=None)) == order
    assert (table.bad[table.share > 0] > 0).all()
    assert (table.third == 1 / 3).all()
    assert (table.bad_low == table.bad - 0.1).all()
    assert table[["bad_high", "gone"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "table.parquet"))


def test_explicit_settings_may_name_different_things(tmp_path: Path) -> None:
    table = run_study([{"what": "a mapping"}], returned, seeds=[1], out=tmp_path / "a", backend="serial")
    assert table.to_dict("records") == [{"what": "a mapping", "seed": 1, "x": 1.5, "y": "a"}]
    settings = [{"a": 1}, {"b": 2.5}]
    table = run_study(settings, anything, seeds=range(2), out=tmp_path / "b", backend="serial")
    assert list(table) == ["a", "b", "seed", "names"]
    assert table.names.tolist() == ["a", "a", "b", "b"]
    assert table.a.isna().tolist() == [False, False, True, True]


def anything(*, seed: int, **setting: float) -> dict[str, str]:
    return {"names": " ".join(setting)}


@pytest.mark.parametrize("what", ["a mapping", "a list", "a frame", "tensors"])
def test_a_metric_may_return_rows_in_several_forms(what: str, tmp_path: Path) -> None:
    table = run_study({"what": [what]}, returned, seeds=[1], out=tmp_path, backend="serial")
    assert table[["x", "y"]].to_dict("records") == [{"x": 1.5, "y": "a"}]


@pytest.mark.parametrize("what", ["nothing", "a setting", "an array", "a date", "no rows"])
def test_what_no_table_can_hold_fails_its_cell(what: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=f"1 of 2 cells failed.*what='{what}' seed=1: "):
        run_study({"what": ["a list", what]}, returned, seeds=[1], out=tmp_path, backend="serial")


def test_values_come_back_from_a_cell_exactly(tmp_path: Path) -> None:
    row = {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": math.nan, "e": -math.inf, "f": None, "g": True, "h": 2**60}
    cell = StudyCell({"x": math.inf, "said": "naïve\n"}, 1, "a.metric", "1")
    again = write_cell(cell, tmp_path, [row])[0]
    assert {k: repr(v) for k, v in again.items()} == {k: repr(v) for k, v in row.items()}
    assert "NaN" not in cell.path(tmp_path).read_text()
    text = json.loads(cell.path(tmp_path).read_text())
    assert text["inputs"]["setting"] == {"x": {"float": "inf"}, "said": "naïve\n"}


def test_equal_numbers_of_different_kinds_are_different_cells() -> None:
    paths = {StudyCell({"x": x}, 1, "m", "1").path(Path()) for x in (1, 1.0, True, "1", None, math.nan)}
    assert len(paths) == 6
    orders = {StudyCell(x, 1, "m", "1").path(Path()) for x in ({"x": 1, "y": 2}, {"y": 2, "x": 1})}
    assert len(orders) == 1


# ---- backends ----------------------------------------------------------------------------------------------------
@on_workers
def test_processes_give_the_bytes_of_one_process_with_one_thread_each(tmp_path: Path) -> None:
    one, two = tmp_path / "serial", tmp_path / "loky"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        serial = run_study(GRID, figures, seeds=SEEDS, out=one, backend="serial")
    finally:
        torch.set_num_threads(threads)
    loky = run_study(GRID, figures, seeds=SEEDS, out=two, backend="loky", workers=2)
    pd.testing.assert_frame_equal(serial, loky, check_exact=True)
    assert serial.bad.nunique() > 4
    assert (loky.threads == 1).all()
    assert digest(one) == digest(two)
    names = sorted(p.name for p in (one / "cells").iterdir())
    assert len(names) == 12
    assert [p.read_bytes() for p in sorted((one / "cells").iterdir())] == [
        p.read_bytes() for p in sorted((two / "cells").iterdir())
    ]
    where = run_study({"index": range(4)}, openmp, seeds=[1], out=tmp_path / "openmp", workers=2)
    assert set(where.openmp) == {"1"}
    assert os.getpid() not in set(where.process)


@on_workers
def test_a_worker_that_dies_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_backends, "RETRIES", 0)  # every attempt starts new processes
    with pytest.raises(StudyError, match="a worker process died"):
        run_study({"index": range(4)}, deadly, seeds=[1], out=tmp_path, workers=2)


def dies_once(index: int, folder: str, *, seed: int) -> dict[str, int]:
    """A worker that somebody kills while it has the first cell in hand."""
    mark = Path(folder) / "killed"
    if index == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"found": index * seed}


@on_workers
def test_what_a_killed_worker_had_in_hand_is_done_again(tmp_path: Path) -> None:
    table = run_study({"index": range(4), "folder": [str(tmp_path)]}, dies_once, seeds=[3], out=tmp_path, workers=2)
    assert (tmp_path / "killed").exists() and table["found"].tolist() == [0, 3, 6, 9]


class BreaksOnce:
    """joblib's pool: one that broke sends tasks of its first call when it is called again, and their results twice."""

    made = 0

    def __init__(self, **given: Any) -> None:
        type(self).made += 1
        self.breaks, self.stale = type(self).made == 1, list[Any]()

    def __call__(self, tasks: Any) -> Iterator[Any]:
        yield from self.stale
        for number, (function, args, named) in enumerate(tasks):
            if self.breaks and number == 1:
                self.breaks, self.stale = False, [function(*args, **named)] * 2
                raise BrokenProcessPool("killed")
            yield function(*args, **named)


def test_a_pool_that_broke_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.Parallel", BreaksOnce)
    table = run_study({"index": range(2, 6)}, sometimes, seeds=[1], out=tmp_path, workers=2)
    assert table.value.tolist() == [i / 3 for i in range(2, 6)] and BreaksOnce.made == 2


def shared_sum(index: int, *, seed: int) -> dict[str, Any]:
    """What the study shares, and whether this process has it to itself."""
    array = study_backends.shared_value("numbers")["array"]
    return {"sum": float(array.sum()) + index, "kind": type(array).__name__, "written": bool(array.flags.writeable)}


@on_workers
@pytest.mark.parametrize(("backend", "kind"), [("serial", "ndarray"), ("loky", "memmap")])
def test_what_cells_share_is_put_down_once_and_mapped(tmp_path: Path, backend: Any, kind: str) -> None:
    shared = {"numbers": {"array": np.arange(3000.0)}}
    given: dict[str, Any] = {"out": tmp_path / backend, "workers": 2, "backend": backend}
    table = run_study({"index": range(3)}, shared_sum, seeds=[1], shared=shared, **given)
    assert table["sum"].tolist() == [4498500.0, 4498501.0, 4498502.0] and set(table.kind) == {kind}
    with pytest.raises(StudyError, match="no 'numbers' is shared in this study"):
        run_study({"index": range(1)}, shared_sum, seeds=[2], **given)


LOCK = threading.Lock()


@functools.cache
def in_main() -> Any:
    """A function of `__main__`, which is sent with what it refers to: a lock, which cannot be sent."""

    def local(index: int, *, seed: int) -> dict[str, int]:
        return {"locked": int(LOCK.locked())}

    local.__module__, local.__qualname__ = "__main__", "local"
    return local


@on_workers
def test_a_metric_that_cannot_be_sent_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "local", in_main(), raising=False)
    with pytest.raises(UsageError, match="cannot be sent to a worker process"):
        run_study({"index": range(4)}, in_main(), seeds=[5], out=tmp_path, workers=2)
    assert study(tmp_path, in_main()).locked.sum() == 0


@pytest.mark.parametrize("package", ["joblib", "ray", "pyarrow"])
def test_a_missing_package_is_named_before_the_first_cell(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        check_backend("ray" if package == "ray" else "loky", 0)


def test_backends_are_checked() -> None:
    with pytest.raises(UsageError, match="there are serial, loky, ray"):
        check_backend("threads", 0)
    with pytest.raises(UsageError, match="backend='ray'"):
        check_backend("loky", 0.5)


# ---- what is killed, broken or changed ---------------------------------------------------------------------------
def study_in_a_process(out: str, hold: str, backend: Any = "serial") -> None:
    os.environ["STUDY_HOLD"] = hold
    study_backends.IDLE = 1  # workers that lost their study end soon
    warnings.simplefilter("error")
    run_study({"index": range(MANY)}, held, seeds=[5], out=out, backend=backend)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start from one that has imported everything, so that they are killed in the study."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def finished(out: Path) -> int:
    """How many cells have their file; what a killed process was writing has a name that begins with a dot."""
    return len(list((out / "cells").glob("[!.]*.json")))


def kill(process: Any, out: Path, wait: float) -> int:
    """Kill a study some time after its next cell; the number of cells that are then finished."""
    before = finished(out)
    process.start()
    while finished(out) < min(before + 1, MANY - 1):
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "table.parquet").exists()
    return finished(out)


@pytest.mark.starts("studies to kill")
@pytest.mark.usefixtures("workers")
def test_a_study_killed_at_five_random_moments_ends_with_the_same_bytes(tmp_path: Path, processes: Any) -> None:
    hold, out, rng = tmp_path / "hold", tmp_path / "killed", random.Random(4)
    hold.write_text("")
    arguments = (str(out), str(hold))
    found = [
        kill(processes.Process(target=study_in_a_process, args=arguments), out, rng.uniform(0, 0.03)) for _ in range(5)
    ]
    assert 0 < found[0] <= found[-1] < MANY
    table = study(out, held, MANY)
    whole = study(tmp_path / "whole", held, MANY)
    pd.testing.assert_frame_equal(table, whole, check_exact=True)
    assert digest(out) == digest(tmp_path / "whole")


@on_workers
@pytest.mark.slow
def test_a_study_whose_workers_lost_it_continues(tmp_path: Path, processes: Any) -> None:
    hold, out = tmp_path / "hold", tmp_path / "killed"
    hold.write_text("")
    found = kill(processes.Process(target=study_in_a_process, args=(str(out), str(hold), "loky")), out, 0.02)
    assert 0 < found < MANY
    hold.unlink()
    run_study({"index": range(MANY)}, held, seeds=[5], out=out, backend="loky", workers=2)
    study(tmp_path / "whole", held, MANY)
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.starts("two studies at once")
@pytest.mark.usefixtures("workers")
def test_two_processes_may_run_one_study_at_once(tmp_path: Path, processes: Any) -> None:
    out = tmp_path / "shared"
    both = [processes.Process(target=study_in_a_process, args=(str(out), "")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    study(tmp_path / "alone", held, MANY)
    assert digest(out) == digest(tmp_path / "alone")
    assert sorted(p.name for p in (out / "cells").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone" / "cells").iterdir()
    )


def truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.rindex(b"value") + len(b'value": ')] ^= 1  # in a figure: still JSON, still a number
    path.write_bytes(content)


def not_text(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30] ^= 128
    path.write_bytes(content)


def another_cell(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def edit(path: Path, other: Path) -> None:
    content = json.loads(path.read_text())
    content["rows"][0]["value"] = 99.0
    path.write_text(json.dumps(content))


def another_json(path: Path, other: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, not_text, another_cell, edit, another_json])
def test_a_damaged_cell_is_found_out_and_computed_again(damage: Any, tmp_path: Path, calls: Path) -> None:
    out = tmp_path / "out"
    study(out)
    assert made(calls) == [0, 1, 2, 3]
    before, sound = digest(out), cell_of(out, 2).read_bytes()
    study(out)
    assert made(calls) == []
    damage(cell_of(out, 2), cell_of(out, 1))
    damaged = [p for p in (out / "cells").iterdir() if p.read_bytes() != sound]
    assert len(damaged) == 4
    with pytest.warns(UserWarning, match="so index=2 seed=5 is computed again"):
        study(out)
    assert made(calls) == [2]
    assert digest(out) == before
    assert cell_of(out, 2).read_bytes() == sound


def test_a_damaged_cell_is_one_typed_error_where_it_is_read(tmp_path: Path) -> None:
    cell, other = (StudyCell({"x": x}, 1, "m", "1") for x in (1, 2))
    assert kept(cell, tmp_path) is None
    write_cell(cell, tmp_path, [{"y": 1}])
    assert kept(cell, tmp_path) == read_cell(cell, tmp_path) == [{"y": 1}]
    cell.path(tmp_path).rename(other.path(tmp_path))
    with pytest.raises(CorruptFileError, match="holds another cell"):
        read_cell(other, tmp_path)
    with pytest.raises(CorruptFileError, match="no whole cell"):
        read_cell(cell, tmp_path)


def test_failed_cells_are_named_the_others_kept_and_only_those_tried_again(tmp_path: Path, calls: Path) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "broken"
    broken.write_text("error")
    with pytest.raises(StudyError, match=r"2 of 4.*index=1 seed=5: ValueError: no such; index=3 seed=5") as caught:
        study(out)
    assert made(calls) == [0, 1, 2, 3]
    first = caught.value.failed[0]
    assert isinstance(first, FailedCell)
    assert (first.setting, first.seed, first.error) == ({"index": 1}, 5, "ValueError: no such")
    assert "in counted" in first.trace
    assert not (out / "table.parquet").exists()
    broken.unlink()
    study(out)
    assert made(calls) == [1, 3]
    study(tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "broken").write_text("interrupt")
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "out")
    (tmp_path / "broken").unlink()
    assert made(calls) == [0, 1]
    study(tmp_path / "out")
    assert made(calls) == [1, 2, 3]


def test_a_larger_grid_keeps_the_cells_that_it_shares(tmp_path: Path, calls: Path) -> None:
    study(tmp_path / "out", n=2)
    assert made(calls) == [0, 1]
    table = study(tmp_path / "out", n=4)
    assert made(calls) == [2, 3]
    assert table["index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_source_or_version_of_the_metric_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def measured(index, *, seed):\n    return {{'value': index + {}}}\n"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def table(added: int, **options: Any) -> list[int]:
        (tmp_path / "measuring.py").write_text(source.format(added))
        importlib.invalidate_caches()
        sys.modules.pop("measuring", None)
        return study(tmp_path / "out", importlib.import_module("measuring").measured, **options).value.tolist()

    assert table(10) == [10, 11, 12, 13]
    assert table(200) == [200, 201, 202, 203]
    assert table(10) == [10, 11, 12, 13]
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 8
    assert table(10, version="1") == [10, 11, 12, 13]
    assert table(200, version="1") == [10, 11, 12, 13]
    assert table(200, version="2") == [200, 201, 202, 203]


# ---- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        ({"share": [1.0], "arm": []}, [1], "nothing to study"),
        (GRID, [], "nothing to study"),
        ({"share": [0.5, 0.5], "arm": ["a"]}, [1], "1 cells occur twice"),
        ({"share": [0.5], "arm": ["a"]}, [1, 1], "1 cells occur twice"),
        ({"share": [0.5], "arm": "none"}, [1], r"pass \['none'\]"),
        ({"share": [0.5], "arm": [("a", "b")]}, [1], "setting arm is"),
        ({"share": [0.5]}, [1], "missing a required argument: 'arm'"),
        ({"share": [0.5], "arm": ["a"], "seed": [1]}, [1], "multiple values"),
        ({"share": [0.5, "all"], "arm": ["a"]}, [1], "column share is not of one kind"),
        ({"share": [2**70], "arm": ["a"]}, [1], "column share is not of one kind"),
    ],
)
def test_a_grid_that_cannot_work_is_refused(grid: Any, seeds: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run_study(grid, figures, seeds=seeds, out=tmp_path / "out", backend="serial")
    assert not (tmp_path / "out").exists()


def test_metrics_whose_values_the_hash_cannot_see_are_refused(tmp_path: Path) -> None:
    def closure(index: int, *, seed: int) -> dict[str, int]:
        return {"n": MANY}

    for metric in (closure, lambda index, seed: {}, functools.partial(counted, 1), "".join):
        with pytest.raises(UsageError, match="not a function at the top level"):
            study(tmp_path, metric)
    with pytest.raises(UsageError, match="version='1'"):
        study(tmp_path, math.cos)


def test_a_folder_that_cannot_be_written_is_known_before_the_first_cell(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        study(tmp_path / "out")
    assert made(calls) == []


def test_columns_of_two_kinds_are_named_and_the_cells_kept(tmp_path: Path) -> None:
    settings = {"what": ["a mapping", "another"]}
    RETURNED["another"] = {"x": "text"}
    with pytest.raises(UsageError, match="column x is not of one kind"):
        run_study(settings, returned, seeds=[1], out=tmp_path, backend="serial")
    assert finished(tmp_path) == 2


# ---- what a person sees ------------------------------------------------------------------------------------------
def test_progress_is_quiet_unless_asked_for(tmp_path: Path, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path / "out", n=3)
    assert capsys.readouterr() == ("", "")
    study(tmp_path / "out", n=5, progress=True)
    said = capsys.readouterr().err
    assert "2 of 5 cells to compute" in said
    assert "3/5" in said
    assert "5/5" in said


def test_summaries_resample_seeds_not_rows() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(0.5, 0.1, 8)
    rows = [(arm, s, level[s] + shift) for arm, shift in (("none", 0), ("more", 0.4)) for s in range(8)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "bad"])
    once = summarise_study(table, "bad", by=["arm"])
    assert once.arm.tolist() == ["none", "more"]
    assert once.n.tolist() == [8, 8]
    assert once.low[1] > once.high[0]
    again = summarise_study(pd.concat([table] * 20), "bad", by=["arm"])
    pd.testing.assert_frame_equal(once, again)  # twenty rows of a seed are one seed
    single = summarise_study(table[table.seed == 0], "bad", by=["arm"])
    assert single.low.isna().all()
