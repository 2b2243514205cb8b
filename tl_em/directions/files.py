"""A file of directions, whichever kind it is: one, a profile, or a control vector of another program."""

from __future__ import annotations

from pathlib import Path

from tl_em.artefacts import check_file, json_of
from tl_em.directions.control_vectors import import_control_vector
from tl_em.directions.direction import Direction
from tl_em.directions.profile import PROFILE_SCHEMA, Profile


def load_directed(path: str | Path) -> Direction | Profile:
    """What ``direction.save`` or ``profile.save`` wrote, or a control vector in GGUF.

    Args:
        path: of the file; one that ends in ``.gguf`` is a control vector.

    Raises:
        CorruptFileError: missing, damaged, or something else. ModelError: the package gguf is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from tl_em.models.sites import Site
        >>> profile = Profile([Direction(torch.ones(2), Site(layer)) for layer in (3, 4)])
        >>> with TemporaryDirectory() as folder:
        ...     load_directed(profile.save(f"{folder}/a.safetensors"))
        Profile(unnamed, resid_post at layers 3-4, d_model=2)
    """
    if str(path).lower().endswith(".gguf"):
        return import_control_vector(path)
    return Profile.load(path) if _schema(Path(path)) == PROFILE_SCHEMA else Direction.load(path)


def _schema(path: Path) -> str | None:
    """What the header of a file of this package says that it is; None of any other."""
    from safetensors import safe_open

    try:
        check_file(path)
        with safe_open(str(path), framework="pt") as file:
            return str(json_of((file.metadata() or {})["tl_em"])["schema"])
    except Exception:  # whatever is wrong with it, who reads it as a direction says so
        return None
