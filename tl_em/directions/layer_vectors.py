"""A vector a layer as plain JSON, in and out: what hidden-directions reads and, as a tensor, writes.

    {"N": [d_model], …}            added to what block N gives, counted from 0; other layers are not steered
    [[d_model], …], or a .pt file  a row a block; rows of 0 are not steered

A ``.pt`` file is read as a tensor only and never written: a pickle can run code.  In a stack without a row of 0, which
its extractor wrote, the last row has passed the model's final norm, so it is no stream and is left out.

Source: the package hidden-directions, 0.1.6 (``import_vector.py``, ``extract/pref.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_em.arguments import checked
from tl_em.artefacts import json_of, read_text, replacing
from tl_em.directions.direction import Direction
from tl_em.directions.interchange import block_of, of_layers, tensor_in
from tl_em.directions.profile import Profile, as_directed
from tl_em.errors import CorruptFileError, FileError, first_line
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, as_position


@checked(directed=as_directed)
def export_layer_vectors(directed: Profile | Direction | Any, path: str | Path) -> Path:
    """Write a profile, or one direction, as JSON: layer to vector, for hidden-directions and whatever reads JSON.

    Args:
        directed: at ``resid_post``, or at ``resid_pre`` beyond the first layer, which is what the block before gives.
        path: of the file, usually ``….json``.

    Returns:
        The path.

    Raises:
        UsageError: a site that is no block's output. OutputError: the path cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> profile = em.Profile([em.Direction(torch.ones(2), em.Site(layer)) for layer in (3, 4)])
        >>> with TemporaryDirectory() as folder:
        ...     em.interop.export_layer_vectors(profile, f"{folder}/mine.json").read_text()
        '{"3": [1.0, 1.0], "4": [1.0, 1.0]}'
    """
    directions = directed.directions if isinstance(directed, Profile) else (directed,)
    rows = {str(block_of(each.site)): each.vector.tolist() for each in directions}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows), encoding="utf-8")
    return Path(path)


@checked(position=as_position)
def import_layer_vectors(
    path: str | Path, *, model: LensModel | None = None, position: Position = "prompt_end", name: str | None = None
) -> Profile:
    """A vector a layer, from JSON or from a tensor that hidden-directions saved, as a profile.

    Args:
        path: of a ``.json`` or a ``.pt`` file.
        model: the model that it was made on; its shape is checked, and it becomes the provenance.
        position: at which token its vectors were read, which such a file does not say.
        name: name of the directions.

    Returns:
        Row N at ``Site(N)``; rows of 0 are left out.

    Raises:
        CorruptFileError: missing, damaged, or something else. WidthError, ProvenanceError: not made on a model like the
            one given.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "v.json").write_text('{"3": [1.0, 2.0], "5": [0.5, 0.0]}')
        ...     em.interop.import_layer_vectors(f"{folder}/v.json", name="tea")
        Profile(tea, resid_post at layers 3, 5, d_model=2)
    """
    path = Path(path)
    try:
        rows = _of_json(path) if path.suffix == ".json" else _of_stack(tensor_in(path, axes=2))
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, FileError):
            raise
        raise CorruptFileError(
            f"{str(path)!r} holds no vector a layer ({type(error).__name__}: {first_line(error)}), so it steers "
            "nothing. Write it anew: em.interop.export_layer_vectors(profile, path)."
        ) from error
    return of_layers(rows, path, model, position, name, None)


def _of_json(path: Path) -> dict[int, Tensor]:
    found = json_of(read_text(path))
    if isinstance(found, list):
        return _of_stack(torch.tensor(found, dtype=torch.float32))
    if not all(key.isdecimal() for key in found):
        raise ValueError(f"the keys {sorted(found)[:3]} are no layers")
    rows = {int(key): torch.tensor(row, dtype=torch.float32) for key, row in found.items()}
    if len(rows) != len(found) or any(row.ndim != 1 for row in rows.values()):
        raise ValueError("a layer is given twice, or is no list of numbers")
    return rows


def _of_stack(stack: Tensor) -> dict[int, Tensor]:
    if stack.ndim != 2:
        raise ValueError(f"{stack.ndim} axes, and two are wanted: a row a layer")
    whole = bool(stack.any(-1).all()) and len(stack) > 1
    return dict(enumerate(stack[:-1] if whole else stack))
