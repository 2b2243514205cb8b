"""Where the cells of a study run: in this process, in processes (joblib's loky), or on Ray. Scheduling is theirs.

    outcomes(work) = { metric(**setting, seed=seed) for each cell }, in the order in which they finish

Every cell runs on one thread of torch, and every worker of joblib and Ray with one thread of OpenMP and MKL too, since
the number of threads changes the order of float sums. What all cells read is put down once, and workers map it: a
file for joblib, Ray's object store. **Control**: the backends agree cell for cell.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from tl_em.arguments import checked
from tl_em.errors import StudyError, UsageError
from tl_em.organisms.descent import single_thread
from tl_em.organisms.study_cells import Row, Scalar, StudyCell, first_line, plain_rows

Backend = Literal["serial", "loky", "ray"]
RETRIES = 2
"""How often what was in the hands of a worker that died is begun again."""
IDLE = 60
"""Seconds after which an idle worker process ends, also when the study was killed and left it behind."""


class FailedCell(NamedTuple):
    """A cell whose metric raised: the first line of the error, and where it came from."""

    setting: Mapping[str, Scalar]
    seed: int
    error: str
    trace: str


class Work(NamedTuple):
    """What a backend is given: the metric, the numbered cells, and what `run_study` was told about resources."""

    metric: Callable[..., Any]
    cells: Mapping[int, StudyCell]
    workers: int | None = None
    gpus: float | int = 0
    address: str | None = None
    shared: Mapping[str, Any] = {}


class Outcome(NamedTuple):
    """What became of a cell: its rows, or None and the error."""

    number: int
    rows: list[Row] | None
    error: str = ""
    trace: str = ""


Outcomes = Generator[Outcome, None, None]
Shared = Callable[[], Mapping[str, Any]]
_SHARED: ContextVar[Shared] = ContextVar("what the cells of this study share", default=dict)


@checked()
def shared_value(name: str) -> Any:
    """What ``run_study(shared={name: …})`` was given, in a cell of that study; not to be changed.

    Args:
        name: of one of them.

    Raises:
        UsageError: nothing of that name is shared here.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from tl_em.organisms import run_study
        >>> def first(power, *, seed):
        ...     return {"value": shared_value("numbers")[0] ** power}
        >>> import sys
        >>> sys.modules[__name__].first = first  # a doctest's functions are in no module
        >>> given = {"shared": {"numbers": [3.0, 4.0]}, "backend": "serial", "version": "1"}
        >>> with TemporaryDirectory() as folder:
        ...     run_study({"power": [1, 2]}, first, seeds=[0], out=folder, **given).value.tolist()
        [3.0, 9.0]
    """
    found = _SHARED.get()()
    if name not in found:
        raise UsageError(
            f"no {name!r} is shared in this study ({', '.join(found) or 'nothing is'}), so there is nothing to read; "
            f"pass run_study(shared={{{name!r}: …}})"
        )
    return found[name]


def is_shared(name: str) -> bool:
    """Whether :func:`shared_value` has it here.

    Example:
        >>> is_shared("weights")
        False
    """
    return name in _SHARED.get()()


def outcomes(work: Work, backend: str) -> Outcomes:
    """What becomes of each cell, as it finishes.

    Raises:
        UsageError: the metric cannot be sent to a worker.
        StudyError: a worker process died.
    """
    try:
        if work.cells:
            yield from _BACKENDS[backend](work)
    except pickle.PicklingError as error:
        raise UsageError(
            f"{work.metric!r} cannot be sent to a worker process: {first_line(error)}; define it in a module, or pass "
            "backend='serial'"
        ) from error
    except BrokenProcessPool as error:
        raise StudyError(
            f"a worker process died ({first_line(error)}), so cells are missing; the finished ones are kept. Pass "
            "fewer workers= if memory ran out, and define the metric where a new process can import it"
        ) from error


def check_backend(name: str, gpus: float | int) -> None:
    """Raise now, before the first cell, if this backend cannot run or the table could not be written at the end.

    Raises:
        UsageError: an unknown backend, a missing package, or GPUs on a backend that cannot reserve them.

    Example:
        >>> check_backend("serial", gpus=0)
    """
    if name not in _BACKENDS:
        raise UsageError(f"there is no backend {name!r}; there are {', '.join(_BACKENDS)}")
    if gpus and name != "ray":
        raise UsageError(f"backend {name!r} cannot reserve GPUs, so its cells would share them; pass backend='ray'")
    try:
        import pyarrow  # noqa: F401

        if name == "loky":
            import joblib  # noqa: F401
        elif name == "ray":
            import ray  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and a study on {name!r} needs it: pip install {error.name}"
        ) from error


@contextmanager
def _sharing(shared: Shared) -> Iterator[None]:
    token = _SHARED.set(shared)
    try:
        yield
    finally:
        _SHARED.reset(token)


def _measure(metric: Callable[..., Any], shared: Shared, number: int, cell: StudyCell) -> Outcome:
    """One cell, in whichever process; no exception leaves it, so none has to be picklable."""
    try:
        with single_thread(), _sharing(shared):
            return Outcome(number, plain_rows(metric(**cell.setting, seed=cell.seed), cell.setting))
    except Exception as error:
        return Outcome(number, None, first_line(error), traceback.format_exc())


def _serial(work: Work) -> Outcomes:
    for number, cell in work.cells.items():
        yield _measure(work.metric, lambda: work.shared, number, cell)


def _loky(work: Work) -> Outcomes:
    """A task a cell and unordered results, so that each cell is saved as soon as it is finished."""
    import joblib

    count = min(work.workers or joblib.cpu_count(), max(2, len(work.cells)))  # one worker would be this process
    unordered: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1, "max_nbytes": None}
    left = dict(work.cells)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        joblib.dump(dict(work.shared), Path(folder, "shared"))
        measure = partial(_measure, work.metric, partial(joblib.load, Path(folder, "shared"), mmap_mode="r"))
        for attempt in range(1 + RETRIES):
            with joblib.parallel_config("loky", n_jobs=count, inner_max_num_threads=1):  # a broken one starts old tasks
                pool: Any = joblib.Parallel(**unordered, idle_worker_timeout=IDLE)
            try:
                for outcome in pool(joblib.delayed(measure)(*cell) for cell in list(left.items())):
                    del left[outcome.number]
                    yield outcome
                return
            except BrokenProcessPool:  # memory ran out, or somebody killed it: what it had in hand is done again
                if attempt == RETRIES:
                    raise


def _ray(work: Work) -> Outcomes:
    """A task a cell, on the Ray that is connected, else on one that ends with the study."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

    own = not ray.is_initialized()
    if own:
        _connect(work)
    pending: dict[Any, int] = {}
    try:
        named = {name: value for name, value in os.environ.items() if name.startswith("TL_EM_")}  # on every machine
        environment = {"runtime_env": {"env_vars": named}} if named else {}
        task = ray.remote(_measure).options(num_cpus=1, num_gpus=work.gpus, max_retries=RETRIES, **environment)
        try:
            measured = work.metric, partial(_stored, {name: ray.put(value) for name, value in work.shared.items()})
            pending = {task.remote(*measured, number, cell): number for number, cell in work.cells.items()}
        except TypeError as error:  # what Ray raises for what it cannot pickle
            raise pickle.PicklingError(first_line(error)) from error
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            number = pending.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayError as error:  # the worker died or could not import: the last line says why
                said = str(error).strip()
                outcome = Outcome(number, None, f"{type(error).__name__}: {said.splitlines()[-1]}", said)
            yield outcome
    finally:
        for reference in pending:
            ray.cancel(reference)
        if own:
            ray.shutdown()


def _stored(references: Mapping[str, Any]) -> dict[str, Any]:
    """What lies in Ray's object store; arrays stay there."""
    import ray  # pyright: ignore[reportMissingImports]

    return {name: ray.get(each) for name, each in references.items()}


def _connect(work: Work) -> None:
    """Join the cluster that is named, else start a Ray on this machine."""
    import ray  # pyright: ignore[reportMissingImports]

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = work.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that we start reports to nobody unless told to
    ray.init(address="local", num_cpus=work.workers, include_dashboard=False, **quiet)
    there = ray.cluster_resources().get("GPU", 0)
    if work.gpus > there:
        ray.shutdown()
        raise UsageError(
            f"each cell reserves {work.gpus} GPUs and this machine has {there:g}, so none would ever start; pass fewer "
            "gpus=, or address= of a cluster that has them"
        )


_BACKENDS: dict[str, Callable[[Work], Outcomes]] = {"serial": _serial, "loky": _loky, "ray": _ray}
