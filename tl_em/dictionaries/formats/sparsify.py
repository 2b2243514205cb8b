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

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import reading
from tl_em.dictionaries.formats.reading import refuse
from tl_em.dictionaries.hook_names import Sites
from tl_em.errors import CorruptFileError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def from_directory(folder: Path, sites: Sites) -> Dictionary:
    """One hookpoint's folder.

    Raises:
        FileError, CorruptFileError: a file is missing or damaged. UsageError: an option that is not held, or no site.
    """
    cfg, path = reading.read_json(folder / CONFIG), folder / WEIGHTS
    _check_options(cfg)
    stored = reading.read_safetensors(path)
    reading.check_known(stored, (*_NAMES, *_TENSORS, "W_skip"), path)
    turned = ("encoder.weight", "W_enc", "W_skip", "decoder.weight")  # these are stored the other way round
    tensors = {_NAMES.get(name, name): each.T if name in turned else each for name, each in stored.items()}
    skip, transcoder = bool(cfg.get("skip_connection")), bool(cfg.get("transcode"))
    if skip != ("W_skip" in tensors):
        has = "lacks" if skip else "has"
        raise CorruptFileError(f"skip_connection is {skip} and {path} {has} W_skip; copy both again")
    held = reading.taken(tensors, (*_TENSORS, *(["W_skip"] if skip else [])), path)
    width, latents = cfg.get("d_in"), cfg.get("num_latents") or None
    if None not in (width, cfg.get("expansion_factor")):
        latents = latents or width * cfg["expansion_factor"]
    reading.check_size((width, latents), held["W_enc"], path)
    module, field = _hookpoint(folder), "the folder's hookpoint"
    read = sites.read(f"{module}.input" if module and transcoder else module, field)
    run = reading.settings(folder.absolute().parent / "config.json")
    about = {
        "format": "sparsify", "model_name": run.get("model"), "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len"), "hook_name": module, "transcode": transcoder,
    }  # fmt: skip
    return reading.made(path, held, read=read, written=sites.written(module, field) if transcoder else None,
                        metadata=about, off_input=not transcoder, activation="topk", k=cfg.get("k"))  # fmt: skip


def _check_options(cfg: Mapping[str, Any]) -> None:
    if cfg.get("activation", "topk") != "topk":
        raise refuse("activation", cfg["activation"], "one latent a group is on, which is no top-k; use a topk run")
    if cfg.get("signed"):
        raise refuse("signed", cfg["signed"], "its latents may be negative, and none here is; use an unsigned run")


def _hookpoint(folder: Path) -> str | None:
    """The module that a folder, or the one that holds its seeds, is named after."""
    for part in (folder.absolute().name, folder.absolute().parent.name):
        if re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.\d+(?:\.\w+)*", part):
            return part
    return None
