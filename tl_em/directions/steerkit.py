"""Probes of steerkit, in and out: unit vectors of one layer in safetensors, with a header that says which.

    direction.logistic, direction.diff_of_means, direction.mass_mean   float32 [d_model], each of length 1
    header: layer, n_total_layers, hook_site, hook_name, default_method, auto_alpha, bias_json, metrics_json, …

``hook_name`` is TransformerLens's own, so the site is known. steerkit reads the last token of prompt and response, in a
HookedTransformer with processed weights: of models with layer norms its directions lack their mean over d_model, which
those models do not read, so they mean the same on raw weights.  A unit vector has lost the direction's length:
``auto_alpha``, by which steerkit multiplies it, is where that is written, and read from.

Source: the package steerkit, 0.3, schema 3 (``probe.py``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_em.arguments import checked, finite
from tl_em.artefacts import DAMAGE, check_file, json_of, replacing
from tl_em.directions.direction import Direction, as_direction, from_record, record_of
from tl_em.directions.interchange import published_origin
from tl_em.errors import CorruptFileError, OutputError, TlEmError, UsageError, first_line
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Site, as_position

_METHODS = {"logistic": "logistic", "diff_of_means": "difference_in_means", "mass_mean": "lda"}
"""steerkit's names of methods, and those of this package."""
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")


@checked(direction=as_direction)
def export_steerkit(direction: Direction | Any, path: str | Path, *, model: LensModel | None = None) -> Path:
    """Write a direction as ``steerkit.Probe.load`` reads it.

    Its unit vector is written under the name of its method, and its length as ``auto_alpha``: what steerkit then adds
    by default is what ``em.Add(direction)`` adds here.

    Args:
        direction: at a stream that TransformerLens has a hook for.
        path: of the file, usually ``….probe.safetensors``.
        model: the model that it was made on, where the direction has no provenance.

    Returns:
        The path.

    Raises:
        UsageError: at ``mlp_in``, or it is not known of how many layers and of which model. OutputError: the path
            cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, site = pair.contrasts["persona"], em.Site(2)
        >>> persona = em.difference_in_means(pair.base, contrast, site=site, position="prompt_end")
        >>> with TemporaryDirectory() as folder:
        ...     again = em.interop.import_steerkit(em.interop.export_steerkit(persona, f"{folder}/persona.safetensors"))
        >>> bool((again.vector - persona.vector).abs().max() < 1e-6), str(again.site)
        (True, 'resid_post[2]')
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    origin = direction.provenance or published_origin(model, len(direction.vector), last=direction.site.layer)
    if not _HOOK.fullmatch(direction.site.hook_name) or origin is None:
        raise UsageError(
            f"a probe of steerkit names a hook, a model and how many layers that has, and for {direction!r} "
            f"{'the hook' if origin is not None else 'the model'} is not known; pass model=, or a direction at "
            "em.Site(layer)"
        )
    method = next((theirs for theirs, ours in _METHODS.items() if ours == direction.method), "diff_of_means")
    layer, layers = direction.site.layer, origin.n_layers
    header = {
        "schema_version": "3", "layer": str(layer), "n_total_layers": str(layers), "model_id": origin.model,
        "normalized_depth": f"{(layer + 1) / (layers + 1):.6f}", "hook_site": direction.site.stream,
        "hook_name": direction.site.hook_name, "default_method": method, "auto_alpha": f"{direction.norm:.6f}",
        "bias_json": json.dumps({method: 0.0}), "metrics_json": "{}", "created_at": "",
        "extras_json": json.dumps({"tl_em": {"norm": direction.norm, "direction": record_of(direction)}}),
    }  # fmt: skip
    with replacing(path) as temporary:
        try:
            save_file({f"direction.{method}": direction.unit.contiguous()}, temporary, metadata=header)
        except SafetensorError as error:  # a full disk, say
            raise OutputError(f"cannot write {path}: {error}; nothing was left. Pass a path with room") from error
    return Path(path)


@checked(position=as_position)
def import_steerkit(
    path: str | Path,
    *,
    method: str | None = None,
    model: LensModel | None = None,
    position: Position = "prompt_end",
    name: str | None = None,
) -> Direction:
    """A direction of a probe that ``steerkit.Probe.save`` wrote.

    Args:
        path: of the file.
        method: which of its directions: ``"logistic"``, ``"diff_of_means"`` or ``"mass_mean"``; by default the one that
            steerkit steers with.
        model: the model that it was made on; its shape is checked, and it becomes the provenance.
        position: at which token it was read; steerkit reads the last one of prompt and response. A file that was
            written here says it, and its provenance; they are kept.
        name: name of the direction.

    Returns:
        A Direction as long as ``auto_alpha``, the strength that steerkit found or was given; of length 1 without one.

    Raises:
        UsageError: it has no direction of this method, or lies before the first block or after the last norm.
        CorruptFileError: missing, damaged, or something else.
        WidthError, ProvenanceError: not made on a model like the one given.

    Example:
        >>> import tl_em as em
        >>> em.interop.import_steerkit("no-such.safetensors")
        Traceback (most recent call last):
        ...
        tl_em.errors.CorruptFileError: 'no-such.safetensors' is no probe of steerkit ...
    """
    try:
        header, vectors = _read(Path(path))
        hook = header.get("hook_name") or f"blocks.{int(header['layer'])}.hook_{header['hook_site']}"
        length = finite("auto_alpha", float(header.get("auto_alpha") or 1.0))
        ours = json_of(header.get("extras_json") or "{}").get("tl_em")
        layers, chosen = int(header["n_total_layers"]), method or header.get("default_method", "logistic")
    except Exception as error:  # no common base: no such file, no safetensors, a header that is not steerkit's
        raise CorruptFileError(
            f"{str(path)!r} is no probe of steerkit ({type(error).__name__}: {first_line(error)}), and a damaged one "
            "would steer somewhere else. Copy it again, or save it anew in steerkit."
        ) from error
    if chosen not in vectors:
        raise UsageError(f"{str(path)!r} has no direction {chosen!r}; pass method= one of {', '.join(sorted(vectors))}")
    found = _HOOK.fullmatch(hook)
    if found is None:
        raise UsageError(
            f"{str(path)!r} is a probe at {hook!r}, which is no stream of a block (the embedding, or the last norm), "
            "so there is no em.Site(layer) at which it could be used; fit one at a block in steerkit"
        )
    if ours is not None and method is None:
        return _as_it_was(path, vectors[chosen], ours, name)
    site = Site(int(found[1]), found[2])
    origin = published_origin(model, len(vectors[chosen]), layers=layers, last=site.layer)
    vector = vectors[chosen] * (length if length > 0 else 1.0)
    return Direction(vector, site, position, name, origin, _METHODS.get(chosen, chosen))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    check_file(path)
    with safe_open(str(path), framework="pt") as file:
        vectors = {key: file.get_tensor(key) for key in file.keys() if key.startswith("direction.")}  # noqa: SIM118
        header = dict(file.metadata() or {})
    found = {key.removeprefix("direction."): value.float() for key, value in vectors.items()}
    if not found or not all(x.ndim == 1 and bool(x.isfinite().all()) and bool(x.any()) for x in found.values()):
        raise ValueError("it holds no direction.*, or one that is no finite vector")
    return header, found


def _as_it_was(path: str | Path, unit: Tensor, ours: Any, name: str | None) -> Direction:
    """A file of this package: the direction as it was, up to the rounding of a unit vector."""
    try:
        made = from_record(unit * finite("norm", ours["norm"]), ours["direction"])
    except (*DAMAGE, TlEmError) as error:
        raise CorruptFileError(
            f"what this package wrote about the direction in {str(path)!r} is damaged ({first_line(error)}); export it "
            "anew with em.interop.export_steerkit(direction, path)"
        ) from error
    return made if name is None else made.renamed(name)
