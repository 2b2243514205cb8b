"""Studies: a metric over a grid of settings and seeds, as one tidy table; what was killed continues.

    table = rows of metric(**setting, seed=seed)        for setting in grid, for seed in seeds, in this order

A cell is one setting at one seed, kept in a file of its own (`tl_em.organisms.study_cells`), and the table is made from
those files alone. **Control**: a study that was killed and continued, another backend and an uninterrupted run give the
same bytes. Where they do not, the metric draws on more than its setting and seed, and nobody can reproduce its figures.
"""

from __future__ import annotations

import inspect
import itertools
import json
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tl_em import __version__
from tl_em.arguments import COUNT, NOT_NEGATIVE, checked, list_of, optional, whole
from tl_em.artefacts import check_writable, replacing
from tl_em.errors import StudyError, UsageError
from tl_em.organisms.study_backends import Backend, FailedCell, Work, check_backend, outcomes
from tl_em.organisms.study_cells import (
    SCHEMA,
    Row,
    Scalar,
    StudyCell,
    first_line,
    kept,
    plain,
    qualified_name,
    source_version,
    write_cell,
)
from tl_em.stats import mean_over_units

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TABLE = "table.parquet"


@checked(seeds=list_of(whole), workers=optional(COUNT), gpus=NOT_NEGATIVE)
def run_study(
    grid: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]],
    metric: Callable[..., Any],
    *,
    seeds: Iterable[int],
    out: str | Path,
    backend: Backend = "loky",
    version: str | None = None,
    workers: int | None = None,
    gpus: float | int = 0,
    address: str | None = None,
    shared: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Call a metric for every setting and seed, keep each finished cell in a file, and return one tidy table.

    A study that was killed, or in which cells failed, continues where it was when the same call is made again.

    Args:
        grid: ``{name: values}``, all combinations; or a sequence of settings ``{name: value}``. Values are numbers,
            text, booleans or None.
        metric: a function at the top level of a module or notebook, called as ``metric(**setting, seed=seed)`` with
            torch on one thread. It returns a row (a mapping of plain values and Estimates), a list of rows or a
            DataFrame, and draws all randomness from its seed.
        seeds: one cell for each setting and seed.
        out: folder for ``cells/`` and ``table.parquet``. Only the calling machine writes there.
        backend: ``"serial"``: this process; ``"loky"``: processes, by joblib; ``"ray"``: tasks of one CPU on Ray.
        version: the metric's state, which is in each cell's hash: cells of another version are computed again. None
            takes the hash of the function's source and tl_em's version; it does not see what the function calls.
        workers: processes, or CPUs of a Ray that is started here; None takes all.
        gpus: GPUs that each cell reserves (Ray only; .25 puts four cells on one).
        address: a Ray cluster; None takes what is connected, then ``RAY_ADDRESS``, then starts one that ends with the
            study.
        shared: what all cells read and none changes, by name; a metric has it from ``em.organisms.shared_value(name)``.
            Workers map its arrays and do not copy them (Ray's object store; a file). It is in no cell's hash, so let a
            setting say which it is.
        progress: what is to do, and a bar with the time left; None shows them on a terminal only.

    Returns:
        The rows of all cells: setting, seed, figures. An Estimate is four columns: NAME, NAME_low, NAME_high, NAME_n.
        ``out/table.parquet`` holds the same; equal studies give equal bytes, with one version of pyarrow.

    Raises:
        StudyError: cells failed or a worker died; all others are kept, and no table is written.
        UsageError: a grid, metric or backend that cannot work. OutputError: `out` cannot be written.

    Example:
        >>> import tempfile
        >>> def length(real: float, imag: float, *, seed: int) -> dict[str, float]:
        ...     return {"length": abs(complex(real, imag))}
        >>> sys.modules[__name__].length = length  # a doctest's functions are in no module
        >>> grid = {"real": [0.0, 3.0], "imag": [4.0]}
        >>> run_study(grid, length, seeds=[1], out=tempfile.mkdtemp(), backend="serial", version="1")
           real  imag  seed  length
        0   0.0   4.0     1     4.0
        1   3.0   4.0     1     5.0
    """
    folder = Path(out)
    cells = _cells(grid, metric, seeds, version)
    check_backend(backend, gpus)
    check_writable(folder / TABLE)
    _arrow(cells, {number: [{}] for number in range(len(cells))})  # a mixed column now, not after the last cell
    found = {number: kept(cell, folder) for number, cell in enumerate(cells)}
    rows = {number: each for number, each in found.items() if each is not None}
    left = {number: cell for number, cell in enumerate(cells) if number not in rows}
    failed: dict[int, FailedCell] = {}
    with _bar(len(rows), len(cells), progress) as bar:
        with closing(outcomes(Work(metric, left, workers, gpus, address, shared or {}), backend)) as finished:
            for number, result, error, trace in finished:
                if result is None:
                    failed[number] = FailedCell(cells[number].setting, cells[number].seed, error, trace)
                else:
                    rows[number] = write_cell(cells[number], folder, result)
                bar.update()
    if failed:
        in_order = [failed[number] for number in sorted(failed)]
        raise StudyError(_failures(in_order, len(cells), folder), in_order)
    from pyarrow.parquet import write_table

    table = _arrow(cells, rows)
    with replacing(folder / TABLE) as temporary:
        write_table(table, temporary)
    return table.to_pandas()


@checked()
def summarise_study(table: pd.DataFrame, value: str, *, by: Sequence[str], unit: str = "seed") -> pd.DataFrame:
    """Mean of a column over seeds with its interval (Student's t), for each group of rows; a seed counts once.

    Args:
        table: what `run_study` returned.
        value: the column to average.
        by: columns that name a group, e.g. those of the grid.
        unit: the column whose values are the independent units.

    Returns:
        DataFrame with the columns of `by`, then value, low, high (95 % interval, NaN for one seed) and n (seeds).

    Raises:
        UsageError: the column holds NaN. Leave those rows out, and say so where the figure is shown.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"arm": "none", "seed": [1, 1, 2, 3, 3], "bad": [0.1, 0.3, 0.5, 0.6, 0.8]})
        >>> summarise_study(table, "bad", by=["arm"]).round(2)
            arm  value   low  high  n
        0  none   0.47 -0.16  1.09  3
    """
    import pandas as pd

    rows = []
    for group, part in table.groupby(list(by), sort=False, dropna=False):
        e = mean_over_units(part[value], part[unit].tolist())
        rows.append((*group, e.value, e.low, e.high, e.n))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n"])


# ---- the grid ----------------------------------------------------------------------------------------------------
def _cells(grid: Any, metric: Callable[..., Any], seeds: Iterable[int], version: str | None) -> list[StudyCell]:
    name = qualified_name(metric)
    state = source_version(metric) if version is None else version
    drawn, settings = [operator.index(seed) for seed in seeds], _settings(grid)
    cells = [StudyCell(setting, seed, name, state) for setting in settings for seed in drawn]
    if not cells:
        raise UsageError("no setting or no seed, so there is nothing to study; give at least one of each")
    for setting in settings:
        try:
            inspect.signature(metric).bind(**setting, seed=drawn[0])
        except TypeError as error:
            said = f"{name} cannot be called with the setting {setting} and a seed ({error})"
            raise UsageError(f"{said}, so no cell would run; let the grid's names be its arguments") from None
    twice = len(cells) - len({cell.path(Path()) for cell in cells})
    if twice:
        raise UsageError(f"{twice} cells occur twice, which would count them twice; give each setting and seed once")
    return cells


def _settings(grid: Any) -> list[dict[str, Scalar]]:
    if not isinstance(grid, Mapping):
        return [{name: plain(value, f"setting {name}") for name, value in setting.items()} for setting in grid]
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UsageError(f"the grid's {name} is {values!r}, which is one value, not several; pass [{values!r}]")
    axes = [[plain(value, f"setting {name}") for value in values] for name, values in grid.items()]
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*axes)]


# ---- the table ---------------------------------------------------------------------------------------------------
def _arrow(cells: Sequence[StudyCell], rows: Mapping[int, list[Row]]) -> pa.Table:
    """Rows in the order of the cells; columns in the order in which they first appear: settings, seed, figures."""
    import pyarrow as pa

    settings = [name for cell in cells for name in cell.setting]
    tidy = [{**cell.setting, "seed": cell.seed, **row} for number, cell in enumerate(cells) for row in rows[number]]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys([*settings, "seed", *(name for row in tidy for name in row)]):
        try:
            columns[name] = pa.array([row.get(name) for row in tidy])
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(
                f"column {name} is not of one kind ({first_line(error)}), and a table cannot hold it; "
                "let all its values be numbers, or all text, or all booleans"
            ) from error
    said = {"metric": cells[0].metric, "version": cells[0].version, "schema": SCHEMA, "tl_em": __version__}
    return pa.table(columns).replace_schema_metadata({"study": json.dumps(said)})


# ---- what a person reads -----------------------------------------------------------------------------------------
def _bar(done: int, total: int, progress: bool | None) -> Any:
    show = sys.stderr.isatty() if progress is None else progress
    if show:
        tqdm.write(f"{total - done} of {total} cells to compute; the bar says how long after the first", sys.stderr)
    return tqdm(total=total, initial=done, desc="study", unit="cell", disable=not show)


def _failures(failed: Sequence[FailedCell], total: int, folder: Path) -> str:
    shown = "; ".join(f"{StudyCell(each.setting, each.seed, '', '')}: {each.error}" for each in failed[:20])
    more = f"; and {len(failed) - 20} more" if len(failed) > 20 else ""
    return (
        f"{len(failed)} of {total} cells failed, so there is no table: {shown}{more}. The other {total - len(failed)} "
        f"are kept in {folder / 'cells'}, and the same call computes only what is missing (all, when the metric was "
        "changed and no version= was given); tracebacks are in .failed of this error"
    )
