"""EleutherAI's sparsify: a folder named after its hookpoint, with ``cfg.json`` and ``sae.safetensors``.

    a = top-k of relu((x - b_dec) W^T + b)        of a transcoder (``transcode``) nothing is taken off x
    x^ = a W_dec + b_dec (+ x W_skip^T)

The hookpoint is a module: an SAE reads its output, a transcoder its input, and writes its output.

Source: sparsify (``sparse_coder.py``, ``fused_encoder.py``, ``trainer.py``), June 2026; older files of the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_em.dictionaries.checks import Where
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats.building import made
from tl_em.dictionaries.formats.files import check_known, read_json, read_safetensors, refuse, taken
from tl_em.dictionaries.hook_names import placed
from tl_em.errors import CorruptFileError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def from_directory(folder: Path, *, site_in: Where | None = None, site_out: Where | None = None) -> Dictionary:
    """One hookpoint's folder.

    Raises:
        FileError, CorruptFileError: a file is missing or damaged. UsageError: an option that is not held, or no site.
    """
    cfg, path = read_json(folder / CONFIG), folder / WEIGHTS
    _check_options(cfg)
    stored = read_safetensors(path)
    tensors = {_NAMES.get(name, name): each for name, each in stored.items()}
    check_known(tensors, (*_TENSORS, "W_skip"), path)
    skip, transcoder = bool(cfg.get("skip_connection")), bool(cfg.get("transcode"))
    if skip != ("W_skip" in tensors):
        has = "lacks" if skip else "has"
        raise CorruptFileError(f"skip_connection is {skip} and {path} {has} W_skip; copy both again")
    held: dict[str, Tensor | None] = dict(zip(_TENSORS, taken(tensors, _TENSORS, path), strict=True))
    held["W_enc"] = tensors["W_enc"].T  # stored [d_sae d_in]
    if "decoder.weight" in stored:
        held["W_dec"] = stored["decoder.weight"].T
    held["W_skip"] = tensors["W_skip"].T if skip else None  # stored [d_out d_in]
    _check_size(cfg, held, path)
    module = _hookpoint(folder)
    read = placed(f"{module}.input" if module and transcoder else module, "the folder's hookpoint", site_in, "site_in")
    written = placed(module, "the folder's hookpoint", site_out, "site_out") if transcoder else None
    return made(path, held, read=read, written=written, metadata=_about(folder, cfg, module), off_input=not transcoder,
                activation="topk", k=cfg.get("k"))  # fmt: skip


def _check_options(cfg: Mapping[str, Any]) -> None:
    if cfg.get("activation", "topk") != "topk":
        raise refuse("activation", cfg["activation"], "one latent a group is on, which is no top-k; use a topk run")
    if cfg.get("signed"):
        raise refuse("signed", cfg["signed"], "its latents may be negative, and none here is; use an unsigned run")


def _check_size(cfg: Mapping[str, Any], held: Mapping[str, Tensor | None], path: Path) -> None:
    W_enc = held["W_enc"]
    assert W_enc is not None
    width, latents = cfg.get("d_in"), cfg.get("num_latents") or None
    if width is not None and latents is None and cfg.get("expansion_factor"):
        latents = width * cfg["expansion_factor"]
    said = (width or W_enc.shape[0], latents or W_enc.shape[-1])
    if tuple(W_enc.shape) != said:
        raise CorruptFileError(
            f"{CONFIG} says {said} (d_in, latents) and {path} holds an encoder of {tuple(W_enc.shape)}: they are of "
            "two dictionaries; copy both again"
        )


def _hookpoint(folder: Path) -> str | None:
    """The module that a folder, or the one that holds its seeds, is named after."""
    for part in (folder.absolute().name, folder.absolute().parent.name):
        if re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.\d+(?:\.\w+)*", part):
            return part
    return None


def _about(folder: Path, cfg: Mapping[str, Any], module: str | None) -> dict[str, Any]:
    above = folder.absolute().parent / "config.json"
    run = read_json(above) if above.is_file() else {}
    return {
        "format": "sparsify", "model_name": run.get("model"), "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len"), "hook_name": module, "transcode": bool(cfg.get("transcode")),
    }  # fmt: skip
