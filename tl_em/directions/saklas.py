"""Profiles of saklas, in and out: one vector a layer in safetensors, and a record beside it.

    NAME.safetensors   layer_N   float32 [d_model], added to what block N gives, counted from 0
    NAME.json          format_version 6, saklas_version, method, tensor_sha256 of the other file, provenance (anything)

saklas folds into each vector's length how much its layer counts; here a length is a length, so a profile of saklas
steers with the shares that it had there, and what its dial calls 1 is another number.  Its control vectors in GGUF are
read and written by ``control_vectors``.  Where a vector was read and on which model has a place in ``provenance``, so
what was written here comes back whole.

Source: the package saklas, 5.3 (``core/profile.py``).
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tl_em.arguments import checked
from tl_em.artefacts import json_of, read_text, replacing
from tl_em.directions.direction import Direction, from_record, record_of
from tl_em.directions.interchange import block_of, of_layers
from tl_em.directions.profile import Profile, as_directed
from tl_em.errors import CorruptFileError, UsageError, first_line
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Site, as_position

_VERSION, _OURS = 6, "tl_em"
_FIELDS = {"format_version", "saklas_version", "method", "tensor_sha256", "provenance"}


@checked(directed=as_directed)
def export_saklas(directed: Profile | Direction | Any, path: str | Path) -> Path:
    """Write a profile, or one direction, as ``saklas.Profile.load`` reads it: ``….safetensors``, ``….json`` beside it.

    Args:
        directed: at ``resid_post``, or at ``resid_pre`` beyond the first layer, which is what the block before gives.
        path: of the tensors, ending in ``.safetensors``; the record stands beside it.

    Returns:
        The path.

    Raises:
        UsageError: another ending, or a site that saklas does not steer. OutputError: the path cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import tl_em as em
        >>> profile = em.Profile([em.Direction(torch.ones(8), em.Site(layer)) for layer in (1, 2, 3)])
        >>> with TemporaryDirectory() as folder:
        ...     em.interop.import_saklas(em.interop.export_saklas(profile, f"{folder}/mine.safetensors"))
        Profile(unnamed, resid_post at layers 1-3, d_model=8)
    """
    from safetensors.torch import save

    path = _tensors_path(path)
    directions = directed.directions if isinstance(directed, Profile) else (directed,)
    data = save({f"layer_{block_of(each.site)}": each.vector.contiguous() for each in directions})
    record = {
        "format_version": _VERSION, "saklas_version": f"written by tl_em {version('tl_em')}", "method": "profile",
        "tensor_sha256": hashlib.sha256(data).hexdigest(), "provenance": {_OURS: [record_of(d) for d in directions]},
    }  # fmt: skip
    with replacing(path) as tensors, replacing(path.with_suffix(".json")) as about:
        tensors.write_bytes(data)
        about.write_text(json.dumps(record, indent=2), encoding="utf-8")
    return path


@checked(position=as_position)
def import_saklas(
    path: str | Path, *, model: LensModel | None = None, position: Position = "prompt_end", name: str | None = None
) -> Profile:
    """A profile that ``saklas.Profile.save`` wrote, as directions at the outputs of its blocks.

    Args:
        path: of the safetensors file; its record stands beside it.
        model: the model that it was made on; its shape is checked, and it becomes the provenance.
        position: at which token its vectors were read, which such a file does not say. One that was written here does,
            and its provenance; they are kept.
        name: name of the directions, where the file gives none.

    Returns:
        ``layer_N`` at ``Site(N)``; vectors of 0 are left out.

    Raises:
        CorruptFileError: a file is missing or damaged, the two do not belong together, or it is of another version.
        WidthError, ProvenanceError: not made on a model like the one given.

    Example:
        >>> import tl_em as em
        >>> em.interop.import_saklas("no-such.safetensors")
        Traceback (most recent call last):
        ...
        tl_em.errors.CorruptFileError: 'no-such.safetensors' is no profile of saklas ...
    """
    from safetensors.torch import load

    path = _tensors_path(path)
    try:
        data, record = path.read_bytes(), json_of(read_text(path.with_suffix(".json")))
        if record.get("format_version") != _VERSION or set(record) != _FIELDS:
            raise ValueError(f"format_version {record.get('format_version')!r}, and {_VERSION} is read here")
        if hashlib.sha256(data).hexdigest() != record["tensor_sha256"]:
            raise ValueError("the record beside it is that of other tensors")
        rows = {_layer(key): value for key, value in sorted(load(data).items())}
        if not rows or not all(x.dtype == torch.float32 and x.ndim == 1 for x in rows.values()):
            raise ValueError("a tensor is no float32 vector, or there is none")
        if (ours := record["provenance"].get(_OURS)) is not None:
            found = Profile([from_record(rows[block_of(Site(each["layer"], each["stream"]))], each) for each in ours])
            if len(found) != len(rows):
                raise ValueError(f"{len(ours)} records for {len(rows)} vectors")
            return found if name is None else found.renamed(name)
    except Exception as error:  # no common base: whatever is wrong with one file, or the other, or between them
        raise CorruptFileError(
            f"{str(path)!r} is no profile of saklas with its record beside it ({type(error).__name__}: "
            f"{first_line(error)}), and a damaged one would steer somewhere else. Copy both files again, or save it "
            "anew with saklas 5.3 or later."
        ) from error
    return of_layers(rows, path, model, position, name, f"saklas: {record['method']}"[:80])


def _layer(key: str) -> int:
    number = key.removeprefix("layer_")
    if number == key or not number.isdecimal():
        raise ValueError(f"a tensor is called {key!r}, not layer_N")
    return int(number)


def _tensors_path(path: str | Path) -> Path:
    found = Path(path)
    if found.suffix != ".safetensors":
        raise UsageError(
            f"{str(path)!r} does not end in .safetensors, by which saklas tells what a file is; name it so. Its GGUF "
            "files are read by em.interop.import_control_vector(path)."
        )
    return found
