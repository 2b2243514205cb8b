"""circuit-tracer's per-layer transcoders: ``layer_5.safetensors``, with ``config.yaml`` beside it.

    a = relu or JumpReLU(x W_enc^T + b_enc)        x^ = a W_dec + b_dec (+ x W_skip^T)

``config.yaml`` names the hooks once for all layers (``feature_input_hook``: ``hook_resid_mid``, ``mlp.hook_in``,
``ln2.hook_normalized``); they are TransformerLens's. A set of layers in one file (``transcoders.5.W_enc``) is read a
layer at a time. A cross-layer transcoder writes to many layers and is refused.

Source: circuit-tracer 0.5.0 (``transcoder/single_layer_transcoder.py``, ``utils/hf_utils.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tl_em.dictionaries.checks import Where
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats.building import made
from tl_em.dictionaries.formats.files import Tensors, check_known, read_flat_yaml, read_safetensors, refuse, taken
from tl_em.dictionaries.hook_names import placed
from tl_em.errors import UsageError

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
MEMBER = re.compile(r"transcoders?\.(\d+)\.(.+)")
_FILE = re.compile(r"layer_(\d+)")


def from_file(
    path: Path, *, layer: int | None = None, site_in: Where | None = None, site_out: Where | None = None
) -> Dictionary:
    """One layer's transcoder.

    Args:
        path: a safetensors file.
        layer: which, where the file holds several.
        site_in, site_out: where no ``config.yaml`` says it.

    Raises:
        FileError, CorruptFileError: missing or damaged. UsageError: no layer or site is known, or none reads it.
    """
    config = read_flat_yaml(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise refuse("model_kind", kind, "its latents write to many layers, and one dictionary here writes to one; use "
                     "a transcoder_set")  # fmt: skip
    tensors, layer = _of_layer(read_safetensors(path), path, layer)
    check_known(tensors, (*_TENSORS, "W_skip", THRESHOLD), path)
    held, threshold = _oriented(tensors, path), tensors.get(THRESHOLD)
    if threshold is not None and bool((threshold < 0).any()):
        raise refuse(THRESHOLD, "below 0", "circuit-tracer lets those latents be negative, and none here is; train "
                     "one: em.dictionaries.train_dictionary(model, site, corpus, d_sae=512)")  # fmt: skip
    hooks = {key: f"blocks.{layer}.{config[key]}" if config.get(key) and layer is not None else None
             for key in ("feature_input_hook", "feature_output_hook")}  # fmt: skip
    read = placed(hooks["feature_input_hook"], "feature_input_hook", site_in, "site_in")
    written = placed(hooks["feature_output_hook"], "feature_output_hook", site_out, "site_out")
    metadata = {"format": "circuit_tracer", "model_name": config.get("model_name"), "scan": config.get("scan"),
                "hook_name": hooks["feature_input_hook"], "hook_name_out": hooks["feature_output_hook"]}  # fmt: skip
    return made(path, {**held, "threshold": threshold}, read=read, written=written, metadata=metadata,
                activation="relu" if threshold is None else "jumprelu")  # fmt: skip


def _of_layer(tensors: Tensors, path: Path, layer: int | None) -> tuple[Mapping[str, Tensor], int | None]:
    members: dict[int, dict[str, Tensor]] = {}
    for name, each in tensors.items():
        if found := MEMBER.fullmatch(name):
            members.setdefault(int(found[1]), {})[found[2]] = each
    if members:
        if layer is None and len(members) == 1:
            layer = next(iter(members))
        if layer not in members:
            raise UsageError(f"{path} holds transcoders of layers {sorted(members)}; pass layer=, one of them")
        return members[layer], layer
    named = _FILE.search(path.stem)
    own = None if named is None else int(named[1])
    if None not in (layer, own) and layer != own:
        raise UsageError(f"layer={layer}, and {path.name} is layer {own}; leave layer out, or give the other file")
    return tensors, own if layer is None else layer


def _oriented(tensors: Tensors, path: Path) -> dict[str, Tensor | None]:
    """Encoders are stored [d_sae d_model]; decoders too, but before version 0.2 the other way round."""
    W_enc, b_enc, W_dec, b_dec = taken(tensors, _TENSORS, path)
    turned = W_dec.shape != W_enc.shape and W_dec.shape == W_enc.T.shape
    skip = tensors.get("W_skip")
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec.T if turned else W_dec, "b_dec": b_dec,
            "W_skip": None if skip is None else skip.T}  # fmt: skip
