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

from torch import Tensor

from tl_em.dictionaries.checks import Where
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats.building import from_zero, made
from tl_em.dictionaries.formats.files import check_known, read_json, read_npz, read_safetensors, refuse, taken
from tl_em.dictionaries.hook_names import placed
from tl_em.errors import CorruptFileError

_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_HOOKS = {
    "res": ("hook_resid_post", None), "mlp": ("hook_mlp_out", None), "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}  # fmt: skip
_SKIP = "affine_skip_connection"


def from_npz(path: Path, *, site_in: Where | None = None, site_out: Where | None = None) -> Dictionary:
    """``params.npz`` of Gemma Scope (Gemma 2).

    Raises:
        FileError, CorruptFileError: missing or damaged, or pickled. UsageError: no site is known, or none reads it.
    """
    arrays = {("W" + name[1:] if name.startswith("w_") else name): each for name, each in read_npz(path).items()}
    check_known(arrays, _PARAMETERS, path)
    hook, out, model = _published(path)
    read = placed(hook, "the folder's hook", site_in, "site_in")
    transcoder = out is not None or site_out not in (None, read.site)
    written = placed(out, "the folder's hook", site_out, "site_out") if transcoder else None
    held = dict(zip(_PARAMETERS, taken(arrays, _PARAMETERS, path), strict=True))
    metadata = {"format": "gemma_scope", "model_name": model, "hook_name": hook, "hook_name_out": out}
    return made(
        path, held | {"threshold": from_zero(held["threshold"])}, read=read, written=written, metadata=metadata,
        activation="jumprelu",
    )  # fmt: skip


def _published(path: Path) -> tuple[str | None, str | None, str | None]:
    """Hooks read and written, and the model, as the folders say it."""
    said = "/".join(path.absolute().parts)
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", said)
    layer = re.search(r"layer_(\d+)", said)
    if repository is None or layer is None:
        return None, None, None
    hook, out = _HOOKS[repository[3]]
    tuned = "-it" if repository[2] == "it" else ""
    at = f"blocks.{layer[1]}."
    return at + hook, None if out is None else at + out, f"google/gemma-2-{repository[1]}{tuned}"


def from_safetensors(path: Path, *, site_in: Where | None = None, site_out: Where | None = None) -> Dictionary:
    """``params.safetensors`` of Gemma Scope 2 (Gemma 3), with ``config.json`` beside it.

    Raises:
        FileError, CorruptFileError: missing or damaged. UsageError: a cross-layer transcoder; no site, or none reads
            it.
    """
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    tensors = read_safetensors(path)
    check_known(tensors, (*names.values(), _SKIP), path)
    held: dict[str, Tensor | None] = dict(zip(names, taken(tensors, names.values(), path), strict=True))
    config = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    kind = config.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise refuse("architecture", kind, "Gemma Scope 2 is jump_relu, and nothing else is read in its layout")
    if bool(config.get("affine_connection", _SKIP in tensors)) != (_SKIP in tensors):
        raise CorruptFileError(
            f"affine_connection is {config['affine_connection']!r} and {path} {'has' if _SKIP in tensors else 'lacks'} "
            f"{_SKIP}: they are of two dictionaries; copy or download both again"
        )
    read = placed(config.get("hf_hook_point_in"), "hf_hook_point_in", site_in, "site_in")
    out = config.get("hf_hook_point_out")
    transcoder = site_out not in (None, read.site) or (out and out != config.get("hf_hook_point_in"))
    written = placed(out, "hf_hook_point_out", site_out, "site_out") if transcoder else None
    held |= {"threshold": from_zero(tensors["threshold"]), "W_skip": tensors.get(_SKIP)}
    metadata = {"format": "gemma_scope_2", "model_name": config.get("model_name"),
                "hf_hook_name": config.get("hf_hook_point_in"), "hf_hook_name_out": out}  # fmt: skip
    return made(path, held, read=read, written=written, metadata=metadata, activation="jumprelu")
