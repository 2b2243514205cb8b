"""Gemma Scope: ``params.npz`` of Gemma 2, ``params.safetensors`` and ``config.json`` of Gemma 3. All are JumpReLU.

    a = relu(x W_enc + b_enc) where x W_enc + b_enc > threshold         nothing is taken off x
    x^ = a W_dec + b_dec (+ x affine_skip_connection)

The files of Gemma 2 say nothing of where they were trained: it is read off the folders that they were published in
(``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz``). Their transcoders read the normalised stream
before the norm's weight; those of Gemma 3 what the MLP reads, as their config says.

Source: Lieberum et al. 2024, arXiv:2408.05147, and its tutorial; McDougall et al. 2025 (Gemma Scope 2);
circuit-tracer 0.5.0 and SAELens 6.54, which read both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import reading
from tl_em.dictionaries.formats.reading import refuse
from tl_em.dictionaries.hook_names import Sites
from tl_em.errors import CorruptFileError

_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_HOOKS = {
    "res": ("hook_resid_post", None), "mlp": ("hook_mlp_out", None), "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}  # fmt: skip
_SKIP = "affine_skip_connection"


class _Said(NamedTuple):
    """Hooks read and written, the fields that say so, and the metadata."""

    read: str | None
    written: str | None
    fields: tuple[str, str]
    metadata: dict[str, Any]


def from_file(path: Path, sites: Sites) -> Dictionary:
    """``params.npz`` (Gemma 2), or ``params.safetensors`` with ``config.json`` beside it (Gemma 3).

    Raises:
        FileError, CorruptFileError: missing or damaged, or pickled. UsageError: a cross-layer transcoder; no site is
            known, or none reads it.
    """
    old = path.suffix == ".npz"
    stored = reading.read_npz(path) if old else reading.read_safetensors(path)
    reading.check_known(stored, (*_PARAMETERS, "w_enc", "w_dec", *([] if old else [_SKIP])), path)
    tensors = {f"W{name[1:]}" if name.startswith("w_") else name: each for name, each in stored.items()}
    held = reading.taken(tensors, _PARAMETERS, path)
    said = _published(path) if old else _configured(path, _SKIP in tensors)
    read = sites.read(said.read, said.fields[0])
    transcoder = sites.site_out not in (None, read.site) or (said.written and said.written != said.read)
    written = sites.written(said.written, said.fields[1]) if transcoder else None
    held["threshold"] = reading.from_zero(held["threshold"])
    held |= {"W_skip": tensors[_SKIP]} if _SKIP in tensors else {}
    return reading.made(path, held, read=read, written=written, metadata=said.metadata, activation="jumprelu")


def _published(path: Path) -> _Said:
    """As the folders say it."""
    said = "/".join(path.absolute().parts)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", said)
    layer = re.search(r"layer_(\d+)", said)
    hook = out = model = None
    if repository is not None and layer is not None:
        hook, out = (each and f"blocks.{layer[1]}.{each}" for each in _HOOKS[repository[3]])
        model = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    about = {"format": "gemma_scope", "model_name": model, "hook_name": hook, "hook_name_out": out}
    return _Said(hook, out, ("the folder's hook", "the folder's hook"), about)


def _configured(path: Path, skip: bool) -> _Said:
    """As the config beside the file says it."""
    config, fields = reading.settings(path.parent / "config.json"), ("hf_hook_point_in", "hf_hook_point_out")
    kind = config.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise refuse("architecture", kind, "Gemma Scope 2 is jump_relu, and nothing else is read in its layout")
    if bool(config.get("affine_connection", skip)) != skip:
        raise CorruptFileError(
            f"affine_connection is {config['affine_connection']!r} and {path} {'has' if skip else 'lacks'} {_SKIP}: "
            "they are of two dictionaries; copy or download both again"
        )
    hook, out = (config.get(field) for field in fields)
    about = {"format": "gemma_scope_2", "model_name": config.get("model_name"), "hf_hook_name": hook,
             "hf_hook_name_out": out}  # fmt: skip
    return _Said(hook, out, fields, about)
