"""Dictionaries from files and libraries: which format it is, is seen from the content.

Whoever wrote it, what comes back encodes and decodes as the library that trained it does (each format's file in
``formats/`` has the equation), reads the tensor that it was trained on, and carries what its source says of its model.
The control: ``em.dictionaries.dictionary_quality`` on the model, which also reads the neighbouring points.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_em.arguments import path as as_path
from tl_em.arguments import whole
from tl_em.dictionaries.checks import Count, Where
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import circuit_tracer, dictionary_learning, gemma_scope, sae_lens, sparsify
from tl_em.dictionaries.formats.reading import safetensors_names
from tl_em.dictionaries.hook_names import Sites
from tl_em.errors import CorruptFileError, FileError, TlEmError, UsageError
from tl_em.models.hooks import LensModel

FORMATS = (
    "Dictionary.save's file; SAELens (cfg.json, sae_weights.safetensors); dictionary_learning (ae.pt, config.json); "
    "Gemma Scope (params.npz, params.safetensors); sparsify (cfg.json, sae.safetensors); circuit-tracer "
    "(layer_N.safetensors, config.yaml)"
)
_DEEPEST = 200
"""Entries of a folder that are looked through for what it may hold."""
_WEIGHTS = (sparsify.WEIGHTS, sae_lens.WEIGHTS, dictionary_learning.WEIGHTS, "params.npz", "params.safetensors")


def load_dictionary(
    path: str | Path | Any,
    *,
    site_in: Where | None = None,
    site_out: Where | None = None,
    layer: Count | None = None,
    model: LensModel | None = None,
) -> Dictionary:
    """A dictionary from a file or folder of any of these formats, told by its content; nothing in it is executed.

    Args:
        path: a file of ``Dictionary.save``; a folder (or a file in it) of SAELens, dictionary_learning, Gemma Scope 1
            or 2, sparsify or circuit-tracer.
        site_in, site_out: where it was trained, where the source does not say it.
        layer: which one, in a file or folder that holds one a layer.
        model: where given, the dictionary is checked against it, and one of the normalised stream takes its norm's
            weight in (:meth:`Dictionary.with_norm_of`).

    Returns:
        A Dictionary; ``.metadata`` holds what the source says of itself.

    Raises:
        FileError: nothing is there. CorruptFileError: damaged, or files that do not belong together. UsageError: a
            format, option or site that is not known, or several dictionaries. And what ``Dictionary`` and ``check``
            raise.

    Example:
        >>> import tempfile, torch
        >>> from tl_em.models.sites import Site
        >>> eye, folder = torch.eye(2), tempfile.mkdtemp()
        >>> sae = Dictionary(eye, torch.zeros(2), eye, torch.zeros(2), activation="relu", site_in=Site(1))
        >>> load_dictionary(sae.save(f"{folder}/sae.safetensors")).hash == sae.hash
        True

    Source: see ``tl_em/dictionaries/formats``.
    """
    if not isinstance(path, str | Path):
        raise UsageError(
            f"a {type(path).__name__} is no path; an SAE in memory is read by em.interop.from_sae_lens(sae)"
        )
    found = Path(as_path("path", path)).expanduser()
    if not found.exists() or not str(path).strip():
        raise FileError(
            f"There is no {str(path)!r}, so no dictionary. Check the path; of the hub, download its folder first "
            "(huggingface_hub.snapshot_download), or em.interop.from_sae_lens(release, sae_id)"
        )
    if layer is not None:
        layer = whole("layer", layer, low=0)
    return _fitted(_from_path, found, Sites(site_in, site_out), layer, model=model)


def from_sae_lens(
    source: Any,
    sae_id: str | None = None,
    *,
    model: LensModel | None = None,
    site_in: Where | None = None,
    site_out: Where | None = None,
) -> Dictionary:
    """An SAE or transcoder of SAELens as a Dictionary: standard, JumpReLU, top-k, gated; with a skip or without.

    Args:
        source: an SAE object; a local directory that SAELens wrote; or a release of its registry (downloads), with
            ``sae_id``.
        sae_id: of the release.
        site_in, site_out: where it reads and writes, where its metadata do not say.
        model: as in :func:`load_dictionary`.

    Returns:
        A Dictionary; ``.metadata`` holds ``model_name``, ``hook_name``, ``prepend_bos``, ``context_size`` and the like.

    Raises:
        UsageError: an option that tensors cannot hold (inputs normalised one by one, single heads, a slice of
            positions), a tensor that no site reads, no site, no such release or id, or SAELens is missing.
        FileError: no such directory, or the hub cannot be reached. CorruptFileError: damaged files.

    Source of the options: SAELens 6.54.

    Example:
        >>> import pytest
        >>> from tl_em.models.sites import Site
        >>> saes = pytest.importorskip("sae_lens.saes")
        >>> theirs = saes.StandardSAE(saes.StandardSAEConfig(d_in=4, d_sae=8))
        >>> from_sae_lens(theirs, site_in=Site(1)).d_sae
        8
    """
    sites = Sites(site_in, site_out)
    if not isinstance(source, str | Path):
        return _fitted(sae_lens.from_object, source, sites, sae_id, model=model)
    folder = Path(as_path("source", source)).expanduser()
    if folder.is_file() and folder.name in (sae_lens.CONFIG, sae_lens.WEIGHTS):
        folder = folder.parent
    if folder.is_dir() and str(source).strip():
        nested = folder / sae_id if sae_id else folder
        return _fitted(sae_lens.from_directory, nested if nested.is_dir() else folder, sites, sae_id, model=model)
    if folder.is_file() or isinstance(source, Path) or _is_path(source):
        what = "is no directory that SAELens wrote" if folder.is_file() else "does not exist"
        raise FileError(f"{str(source)!r} {what}; give the folder with {sae_lens.CONFIG} and {sae_lens.WEIGHTS}, or a "
                        "release of SAELens's registry with sae_id=")  # fmt: skip
    return _fitted(sae_lens.from_registry, source, sites, sae_id, model=model)


def _fitted(
    reader: Callable[..., Dictionary], source: Any, sites: Sites, option: Any, *, model: LensModel | None
) -> Dictionary:
    """What a reader makes, on ``model``; one error where tensors do not fit each other, as only torch sees."""
    try:
        found = reader(source, sites, option)
    except TlEmError:
        raise
    except (RuntimeError, IndexError) as error:
        raise CorruptFileError(
            f"the tensors of {source if isinstance(source, str | Path) else 'this SAE'} do not belong together "
            f"({error}), so they are not of one dictionary; copy or download them again"
        ) from error
    if model is None:
        return found
    return (found.with_norm_of(model) if found.metadata.get("before_norm_weight") else found).check(model)


def _is_path(source: str) -> bool:
    return source.startswith(("/", ".", "~", "\\")) or source.count("/") > 1 or "\\" in source or not source.strip()


# ---- which format it is ------------------------------------------------------------------------------------------
def _from_path(path: Path, sites: Sites, layer: int | None) -> Dictionary:
    """By the content of the file that a path leads to."""
    if path.is_file() and path.suffix in (".json", ".yaml", ".yml"):
        path = path.parent
    file = _weights(path, layer) if path.is_dir() else path
    names, about = safetensors_names(file) if file.suffix == ".safetensors" and file.is_file() else (frozenset(), {})
    layers = file.stem.startswith("layer_") or any(circuit_tracer.MEMBER.fullmatch(name) for name in names)
    if layer is not None and not layers:
        raise UsageError(f"{path} holds one dictionary, so layer={layer} chooses nothing; leave layer out")
    if "tl_em" in about:
        return _own(file, sites)
    if file.suffix in (".pt", ".pth"):
        return dictionary_learning.from_directory(file.parent, sites, file)
    if file.suffix == ".npz" or "w_enc" in names:
        return gemma_scope.from_file(file, sites)
    if file.name == sparsify.WEIGHTS:
        return sparsify.from_directory(file.parent, sites)
    if file.name == sae_lens.WEIGHTS:
        return sae_lens.from_directory(file.parent, sites)
    if layers:
        return circuit_tracer.from_file(file, sites, layer)
    held = f"holds {', '.join(sorted(names)[:8])}, which" if names else "is in a format that"
    raise UsageError(f"{path} {held} is not known here; known are {FORMATS}")


def _weights(folder: Path, layer: int | None) -> Path:
    """The file of a folder that holds its dictionary."""
    has = {each.name for each in folder.iterdir()}
    layers = sorted(name for name in has if name.startswith("layer_") and name.endswith(".safetensors"))
    for name in _WEIGHTS:
        if name in has or (name == sae_lens.WEIGHTS and sae_lens.CONFIG in has):
            return folder / name
    wanted = f"layer_{layer}.safetensors"
    if layers and (len(layers) == 1 or wanted in layers):
        return folder / (wanted if wanted in layers else layers[0])
    if layers:
        raise UsageError(
            f"{folder} holds one dictionary a layer ({', '.join(layers[:4])}, …): pass layer=, or load all, "
            "[em.load_dictionary(folder, layer=i) for i in range(n_layers)]"
        )
    inside = sorted(
        {each.parent.relative_to(folder).as_posix() for _, each in zip(range(_DEEPEST), folder.rglob("*"), strict=False)
         if each.name in (sae_lens.CONFIG, *_WEIGHTS)}
    )  # fmt: skip
    held = f"it holds folders that are: {', '.join(inside[:6])}; give one of them" if inside else f"known are {FORMATS}"
    if any(folder.glob("W_enc_*.safetensors")):
        held = "it is a cross-layer transcoder: its latents write to many layers, one dictionary here to one"
    raise UsageError(f"{folder} is no dictionary in a format that is known here: {held}")


def _own(path: Path, sites: Sites) -> Dictionary:
    found = Dictionary.load(path)
    for name, given, own in zip(Sites._fields, sites, (found.site_in, found.site_out), strict=True):
        if given not in (None, own):
            raise UsageError(f"{name}={given!r}, and {path} was saved with {own!r}; leave it out, or move what was "
                             f"loaded: dictionary.at(em.{given!r})")  # fmt: skip
    return found
