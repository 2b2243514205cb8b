"""Directions on disk: one safetensors file, the vector as a tensor, everything else as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path

from tl_em.artefacts import replacing
from tl_em.directions.direction import Direction
from tl_em.errors import CorruptFileError
from tl_em.models.sites import Provenance, Site
from tl_em.stats import Estimate

SCHEMA = "tl-em/direction/1"


def save_direction(direction: Direction, path: str | Path) -> Path:
    """Write a direction to ``path``, whole or not at all.

    Raises:
        OutputError: the path cannot be written.
    """
    from safetensors.torch import save_file

    about = {
        "schema": SCHEMA,
        "name": direction.name,
        "layer": direction.site.layer,
        "stream": direction.site.stream,
        "position": direction.position,
        "provenance": None if direction.provenance is None else direction.provenance.to_json(),
        "method": direction.method,
        "reliability": None if direction.reliability is None else direction.reliability.to_json(),
        "neutral": None if direction.neutral is None else direction.neutral.to_json(),
    }
    with replacing(path) as temporary:
        save_file({"vector": direction.vector.contiguous()}, temporary, metadata={"tl_em": json.dumps(about)})
    return Path(path)


def load_direction(path: str | Path) -> Direction:
    """Read a direction from ``path``.

    Raises:
        CorruptFileError: the file is missing or truncated, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["tl_em"])
            vector = file.get_tensor("vector")
        if about["schema"] != SCHEMA:
            raise KeyError(f"schema {about['schema']!r}")
        site = Site(about["layer"], about["stream"])
        origin = None if about["provenance"] is None else Provenance.from_json(about["provenance"])
        of_data = {
            name: None if about.get(name) is None else Estimate.from_json(about[name])
            for name in ("reliability", "neutral")
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is not a direction that this version can read ({type(error).__name__}: {error}); a damaged vector "
            "would steer somewhere else: write it again with direction.save(path)"
        ) from error
    return Direction(
        vector,
        site,
        position=about["position"],
        name=about["name"],
        provenance=origin,
        method=about.get("method"),
        **of_data,
    )
