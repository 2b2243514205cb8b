"""Control vectors in GGUF files, as repeng writes them and llama.cpp adds them, out and in.

    general.architecture       "controlvector"
    controlvector.model_hint   the kind of model, e.g. "llama"; no program refuses another
    controlvector.layer_count  how many tensors follow
    direction.N                float32 [d_model]: added to what block N gives, counted from 0, at every token

So ``direction.N`` is ``resid_post[N]``, which is ``resid_pre[N + 1]``. llama.cpp does not steer block 0, and refuses a
file that has ``direction.0``; repeng and saklas do steer it. Lengths count: they are added as they are, times the
number that ``--control-vector-scaled`` gives.

A file that was written here holds, as JSON under a key that others pass over, where each vector was read and on which
model, so that it comes back whole.

Sources: repeng (``ControlVector.export_gguf``), llama.cpp (``common_control_vector_load``, ``llama_adapter_cvec``).
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_em.arguments import checked, finite
from tl_em.artefacts import DAMAGE, json_of, replacing
from tl_em.directions.direction import Direction, from_record, record_of
from tl_em.directions.interchange import block_of, of_layers
from tl_em.directions.profile import Profile, as_directed, check_all_fit
from tl_em.errors import CorruptFileError, FileError, ModelError, TlEmError, UsageError, first_line
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Site, as_position
from tl_em.models.source_record import hf_source_of

_KIND, _OURS, _SCHEMA = "controlvector", "tl_em.profile", "tl-em/control-vector/1"


@checked(directed=as_directed, coefficient=finite)
def export_control_vector(
    directed: Profile | Direction | Any,
    path: str | Path,
    *,
    model: LensModel | str | None = None,
    coefficient: float | int | Any = 1.0,
) -> Path:
    """Write a profile, or one direction, as a control vector that llama.cpp, repeng and saklas read.

    What llama.cpp then adds is what ``em.Add(directed, coefficient)`` adds here.

    Args:
        directed: at ``resid_post``, or at ``resid_pre``, which is what the block before gives.
        path: of the file, usually ``….gguf``.
        model: the model that it is for: the directions are checked against it, and it gives the hint; or the hint
            itself, e.g. ``"llama"``.
        coefficient: factor of the vectors; other programs have one of their own as well.

    Returns:
        The path.

    Raises:
        UsageError: a site that llama.cpp cannot add at (what block 0 reads or gives, the output of attention or of an
            MLP), or a coefficient of 0.
        ModelError: the package gguf is missing. OutputError: the path cannot be written.
        WidthError, ProvenanceError: a direction does not fit the model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> import tl_em as em
        >>> profile = em.Profile([em.Direction(torch.ones(8), em.Site(layer)) for layer in (1, 2, 3)])
        >>> with TemporaryDirectory() as folder:
        ...     path = em.interop.export_control_vector(profile, f"{folder}/mine.gguf", model="llama")
        ...     em.interop.import_control_vector(path)
        Profile(unnamed, resid_post at layers 1-3, d_model=8)

    Source: the repositories vgel/repeng and ggml-org/llama.cpp.
    """
    _check_gguf()
    directions = directed.directions if isinstance(directed, Profile) else (directed,)
    layers = [_block(each.site) for each in directions]
    if coefficient == 0:
        raise UsageError("coefficient=0 would write a control vector that adds nothing; give the factor that you mean")
    if model is not None and not isinstance(model, str):
        check_all_fit(directed, model)
    from gguf import GGUFWriter

    about = {"schema": _SCHEMA, "coefficient": coefficient, "directions": [record_of(each) for each in directions]}
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, _KIND)
        writer.add_string(f"{_KIND}.model_hint", _hint(model))
        writer.add_uint32(f"{_KIND}.layer_count", len(directions))
        writer.add_string(_OURS, json.dumps(about))
        for layer, each in zip(layers, directions, strict=True):
            writer.add_tensor(f"direction.{layer}", (coefficient * each.vector).numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Path(path)


@checked(position=as_position)
def import_control_vector(
    path: str | Path, *, model: LensModel | None = None, position: Position = "prompt_end", name: str | None = None
) -> Profile:
    """The control vector of a GGUF file, as a profile at the outputs of its blocks.

    Args:
        path: of the file.
        model: the model that it was made on; its shape is checked, and it becomes the provenance.
        position: at which token its vectors were read, which such a file does not say; repeng reads the last one. A
            file that was written here does say it, and its provenance; they are kept.
        name: name of the directions, where the file gives none.

    Returns:
        ``direction.N`` at ``Site(N)``; vectors of 0 are left out.

    Raises:
        CorruptFileError: no control vector, or a damaged one. FileError: there is no such file.
        ModelError: the package gguf is missing.
        WidthError, ProvenanceError: not made on a model like the one given.

    Example:
        >>> import tl_em as em
        >>> em.interop.import_control_vector("no-such.gguf")
        Traceback (most recent call last):
        ...
        tl_em.errors.FileError: There is no file 'no-such.gguf', so there is no control vector to read. Check the path.

    Source: the repositories vgel/repeng and ggml-org/llama.cpp.
    """
    _check_gguf()
    if not Path(path).is_file():
        raise FileError(f"There is no file {str(path)!r}, so there is no control vector to read. Check the path.")
    try:
        rows, ours = _read(Path(path))
        if ours is not None:
            return _ours(rows, ours, name)
        return of_layers(rows, path, model, position, name, "control_vector")
    except TlEmError:
        raise
    except Exception as error:  # no common base: whatever a file that is cut off, or no GGUF file, makes a reader raise
        raise CorruptFileError(
            f"{str(path)!r} cannot be read as a control vector ({type(error).__name__}: {first_line(error)}), and a "
            "damaged one would steer somewhere else. Copy it again, or export it anew."
        ) from error


# --- Layers and hints -------------------------------------------------------------------------------------------------


def _block(site: Site) -> int:
    """The block whose output a site is, where llama.cpp adds to it."""
    after = block_of(site)
    if after < 1:
        raise UsageError(
            f"{site} lies at or before the output of block 0, where llama.cpp adds nothing: it refuses such a file. "
            "Export the later layers alone: em.Profile([profile[at] for at in profile if at > "
            f"{int(site.stream == 'resid_pre')}])."
        )
    return after


def _hint(model: LensModel | str | None) -> str:
    """What other programs call this kind of model; they warn at most where it is another."""
    if model is None or isinstance(model, str):
        return model or "unknown"
    inner, kept = getattr(model, "original_model", None), hf_source_of(model)
    config = getattr(inner, "config", None) or (kept.config if kept is not None else None)
    return str(getattr(config, "model_type", None) or "unknown")


def _check_gguf() -> None:
    if find_spec("gguf") is None:
        raise ModelError(
            "Control vectors are written and read by the package gguf, which is not installed: pip install "
            "'tl_em[gguf]'."
        )


# --- Reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[int, torch.Tensor], Any]:
    """Vectors by block, and what this package wrote about them."""
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(path)
    kind = _text(reader, "general.architecture")
    if kind != _KIND:
        raise CorruptFileError(
            f"{str(path)!r} is a GGUF file of a {kind!r}, not a control vector, so it holds no directions. A model is "
            "read by em.load_model(path)."
        )
    rows: dict[int, torch.Tensor] = {}
    for tensor in reader.tensors:
        layer = str(tensor.name).removeprefix("direction.")
        if layer == tensor.name:
            continue
        if tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1 or not layer.isdecimal():
            raise ValueError(f"{tensor.name} has {len(tensor.shape)} axes of {tensor.tensor_type.name}, not one of F32")
        rows[int(layer)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    ours = _text(reader, _OURS)
    return dict(sorted(rows.items())), None if ours is None else json_of(ours)


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _ours(rows: dict[int, torch.Tensor], about: Any, name: str | None) -> Profile:
    """A file of this package: the directions as they were."""
    try:
        if about["schema"] != _SCHEMA or len(about["directions"]) != len(rows):
            raise ValueError(f"schema {about['schema']!r}, {len(about['directions'])} records for {len(rows)} vectors")
        factor = finite("coefficient", about["coefficient"])
        found = []
        for record in about["directions"]:
            site = Site(record["layer"], record["stream"])
            found.append(from_record(rows[_block(site)] / factor, record))
        profile = Profile(found)
        return profile if name is None else profile.renamed(name)
    except (*DAMAGE, TlEmError) as error:
        raise CorruptFileError(
            f"what this package wrote about the directions in the file does not fit them ({first_line(error)}), so the "
            "file was changed; export it anew"
        ) from error
