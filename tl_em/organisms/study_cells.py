"""Cells of a study: one setting at one seed, in one file that is believed only if it proves what it holds.

    file name = SHA-256(inputs),  inputs = schema, metric, version, setting, seed
    file      = inputs, rows, SHA-256(inputs, rows)

A file appears whole or not at all, so a process killed at any moment leaves finished cells only, and two processes that
write the same cell write the same bytes. **Control**: a truncated or edited file, or one that holds another cell, is
told apart by its checksum and inputs. JSON only; floats are written so that they read back exactly.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_em import __version__
from tl_em.artefacts import DAMAGE, json_of, read_bytes, replacing
from tl_em.errors import CorruptFileError, FileError, UsageError
from tl_em.stats import Estimate

SCHEMA = 1
Scalar = str | int | float | bool | None
Row = dict[str, Scalar]


@dataclass(frozen=True)
class StudyCell:
    """One setting at one seed, and all that its figures depend on.

    Example:
        >>> cell = StudyCell({"share": 0.5}, 101, metric="my.module.rates", version="1")
        >>> str(cell), cell.path(Path("out")).name[:8]
        ('share=0.5 seed=101', 'eec64601')
    """

    setting: Mapping[str, Scalar]
    seed: int
    metric: str
    version: str

    @property
    def inputs(self) -> dict[str, Any]:
        named = {"metric": self.metric, "version": self.version, "seed": self.seed}
        return {"schema": SCHEMA, **named, "setting": {name: _to_json(value) for name, value in self.setting.items()}}

    def path(self, folder: Path) -> Path:
        return folder / "cells" / f"{_checksum(self.inputs)}.json"

    def __str__(self) -> str:
        return " ".join(f"{name}={value!r}" for name, value in [*self.setting.items(), ("seed", self.seed)])


# ---- what a cell's hash says of the metric -----------------------------------------------------------------------
def qualified_name(metric: Callable[..., Any]) -> str:
    """Module and name of a top-level function.

    Raises:
        UsageError: it is none, so it may carry values that the hash would not see.

    Example:
        >>> qualified_name(json.dumps)
        'json.dumps'
    """
    module, name = getattr(metric, "__module__", None), getattr(metric, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not metric:
        raise UsageError(
            f"{metric!r} is not a function at the top level of a module, so a worker cannot import it, and the values "
            "that a lambda, closure, method or partial carries would be missing from the cells' hashes; define a "
            "function and pass such values through the grid"
        )
    return f"{module}.{name}"


def source_version(metric: Callable[..., Any]) -> str:
    """Hash of a function's source and of tl_em's version: another source, another version.

    Raises:
        UsageError: the source cannot be read.
    """
    try:
        return _checksum([inspect.getsource(metric), __version__])[:16]
    except (OSError, TypeError):
        raise UsageError(
            f"the source of {metric!r} cannot be read, so a change of it would go unseen; name its state: version='1'"
        ) from None


# ---- what a cell holds -------------------------------------------------------------------------------------------
def plain(value: Any, what: str) -> Scalar:
    """A number, text, boolean or None, out of numpy's and torch's scalars too.

    Raises:
        UsageError: it is anything else.
    """
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        value = value.item()
    if not isinstance(value, Scalar):
        raise UsageError(
            f"{what} is {value!r}, not a number, text, boolean or None, and could not be stored in a table; "
            "pass a name and look it up in the metric, or return more columns or rows"
        )
    return value


def plain_rows(result: Any, setting: Mapping[str, Scalar]) -> list[Row]:
    """A metric's result (a mapping, a list of them or a DataFrame) as rows of plain values.

    Raises:
        UsageError: no rows, a value that is not plain, or a column that is named as a setting.

    Example:
        >>> plain_rows({"bad": Estimate(0.4, 0.3, 0.5, n=8, n_effective=8.0, method="bootstrap")}, {"share": 0.5})
        [{'bad': 0.4, 'bad_low': 0.3, 'bad_high': 0.5, 'bad_n': 8}]
    """
    if hasattr(result, "to_dict"):
        result = result.to_dict("records")
    rows = [_plain_row(row) for row in ([result] if isinstance(result, Mapping) else result)]
    taken = {name for row in rows for name in row} & {*setting, "seed"}
    if taken or not rows:
        observed = f"columns named as settings ({', '.join(sorted(taken))})" if taken else "no rows"
        raise UsageError(f"the metric returned {observed}, which the table cannot hold; return rows of figures only")
    return rows


def _plain_row(result: Mapping[Any, Any]) -> Row:
    row: dict[str, Any] = {}
    for name, value in result.items():
        row |= value.row(str(name)) | {f"{name}_n": value.n} if isinstance(value, Estimate) else {str(name): value}
    return {name: plain(value, f"column {name}") for name, value in row.items()}


# ---- its file ----------------------------------------------------------------------------------------------------
def write_cell(cell: StudyCell, folder: Path, rows: list[Row]) -> list[Row]:
    """Write a cell and return what its file says.

    Raises:
        OutputError: the folder cannot be written.
    """
    content = {"inputs": cell.inputs, "rows": [{name: _to_json(value) for name, value in row.items()} for row in rows]}
    with replacing(cell.path(folder)) as temporary:
        temporary.write_text(json.dumps({"checksum": _checksum(content), **content}, indent=1), encoding="utf-8")
    return read_cell(cell, folder)


def read_cell(cell: StudyCell, folder: Path) -> list[Row]:
    """The rows in a cell's file.

    Raises:
        CorruptFileError: the file is truncated or was changed, or holds another cell.
    """
    path = cell.path(folder)
    try:
        content = json_of(read_bytes(path))
        whole = content.pop("checksum") == _checksum(content)
        same = content["inputs"] == cell.inputs
        rows = [{name: _from_json(value) for name, value in row.items()} for row in content["rows"]]
    except (FileError, *DAMAGE) as error:
        raise CorruptFileError(f"{path} is no whole cell ({first_line(error)}); delete it") from error
    if not whole or not same:
        observed = "holds another cell" if whole else "was changed after it was written: its checksum differs"
        raise CorruptFileError(f"{path} {observed}; delete it")
    return rows


def kept(cell: StudyCell, folder: Path) -> list[Row] | None:
    """The rows of a finished cell, else None: a file that cannot be believed counts as none, with a warning."""
    if not cell.path(folder).exists():
        return None
    try:
        return read_cell(cell, folder)
    except CorruptFileError as error:
        warnings.warn(f"{str(error).removesuffix('; delete it')}, so {cell} is computed again", stacklevel=3)
        return None


def first_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _checksum(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_json(value: Scalar) -> Any:
    """JSON has no NaN and no infinity."""
    return {"float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Scalar:
    return float(value["float"]) if isinstance(value, dict) else value
