"""Files of published dictionaries as plain tensors and JSON values: nothing in them is executed.

safetensors and JSON as they are, ``torch.load`` with ``weights_only=True``, numpy with ``allow_pickle=False``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_em.artefacts import json_values, read_text
from tl_em.errors import CorruptFileError, FileError, UsageError

Tensors = Mapping[str, Tensor]
_MATRIX = re.compile(r"(?:^|\.)(?:[Ww]_\w+|weight|affine_skip_connection)$")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or no object.
    """
    values = json_values(read_text(_present(path)), path)
    found = values[0][1] if len(values) == 1 else values
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__} and no settings of a dictionary; copy it again")
    return found


def read_flat_yaml(path: Path) -> dict[str, str]:
    """The plain ``key: value`` lines of a YAML file's first level, as strings; what is nested is left out."""
    found = {}
    for line in read_text(_present(path)).splitlines():
        key, colon, value = line.partition(":")
        if colon and key and not key[0].isspace() and key[0] not in "#-":
            found[key.strip().strip("'\"")] = value.split(" #")[0].strip().strip("'\"")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or another format.
    """
    from safetensors import SafetensorError, safe_open

    present = _present(path)
    try:
        with safe_open(str(present), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error


def safetensors_names(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    """Names of the tensors, and the header's metadata; the weights are not read."""
    from safetensors import SafetensorError, safe_open

    present = _present(path)
    try:
        with safe_open(str(present), framework="pt") as file:
            return frozenset(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.pt`` file, tensors only.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or it holds objects whose loading would run code.
    """
    present = _present(path)
    try:
        found = torch.load(present, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of any kind raise anything here
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise CorruptFileError(
            f"{path} holds no plain tensors ({said}): it is truncated, or holds objects whose loading would run code. "
            "Save its state dict where it was made: torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__}, no state dict; save model.state_dict() there")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or it holds pickled objects.
    """
    import numpy as np

    present = _present(path)
    try:
        with present.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # bytes of any kind raise anything here
        raise CorruptFileError(f"{path} holds no plain arrays ({error}); copy or download it again") from error


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}, which this dictionary needs; copy or download it too")
    return path


def taken(tensors: Tensors, names: Iterable[str], path: Any) -> list[Tensor]:
    """The tensors of these names.

    Raises:
        CorruptFileError: one is missing.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CorruptFileError(
            f"{path} lacks {', '.join(missing)} (it holds {', '.join(sorted(tensors)) or 'nothing'}), so it is not "
            "what its settings say; copy or download it again"
        )
    return [tensors[name] for name in wanted]


def check_known(tensors: Tensors, known: Iterable[str], path: Any) -> None:
    """Raise ``UsageError`` where there are tensors that would be left out in silence, or matrices that are none."""
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise UsageError(
            f"{path} holds {', '.join(unknown)}, which is not known here, so the dictionary might compute something "
            "else without it; convert it to relu, jumprelu or topk, and make it with em.Dictionary(…)"
        )
    for name, each in tensors.items():
        if _MATRIX.search(name) and each.ndim != 2:
            raise refuse(
                name, tuple(each.shape), "it is no matrix; crosscoders and cross-layer transcoders, which read or "
                "write in several places, are not read: use a dictionary of one",
            )  # fmt: skip


def refuse(field: str, value: Any, why: str) -> UsageError:
    """The error for an option of a source that cannot be obeyed."""
    return UsageError(f"this dictionary has {field}={value!r}: {why}")
