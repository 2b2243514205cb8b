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

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import reading
from tl_em.dictionaries.formats.reading import refuse
from tl_em.dictionaries.hook_names import Sites
from tl_em.errors import UsageError

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
MEMBER = re.compile(r"transcoders?\.(\d+)\.(.+)")
_FIELDS = ("feature_input_hook", "feature_output_hook")
_FILE = re.compile(r"layer_(\d+)")


def from_file(path: Path, sites: Sites, layer: int | None = None) -> Dictionary:
    """One layer's transcoder.

    Args:
        path: a safetensors file.
        sites: where no ``config.yaml`` says it.
        layer: which, where the file holds several.

    Raises:
        FileError, CorruptFileError: missing or damaged. UsageError: no layer or site is known, or none reads it.
    """
    config = reading.read_flat_yaml(path.parent / CONFIG) if (path.parent / CONFIG).is_file() else {}
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise refuse("model_kind", kind, "its latents write to many layers, and one dictionary here writes to one; use "
                     "a transcoder_set")  # fmt: skip
    tensors, layer = _of_layer(reading.read_safetensors(path), path, layer)
    reading.check_known(tensors, (*_TENSORS, "W_skip", THRESHOLD), path)
    held = _oriented(tensors, path)
    if "threshold" in held and bool((held["threshold"] < 0).any()):
        raise refuse(THRESHOLD, "below 0", "circuit-tracer lets those latents be negative, and none here is; train "
                     "one: em.dictionaries.train_dictionary(model, site, corpus, d_sae=512)")  # fmt: skip
    hook, out = (f"blocks.{layer}.{config[key]}" if config.get(key) and layer is not None else None for key in _FIELDS)
    metadata = {"format": "circuit_tracer", "model_name": config.get("model_name"), "scan": config.get("scan"),
                "hook_name": hook, "hook_name_out": out}  # fmt: skip
    return reading.made(path, held, read=sites.read(hook, _FIELDS[0]), written=sites.written(out, _FIELDS[1]),
                        metadata=metadata, activation="jumprelu" if "threshold" in held else "relu")  # fmt: skip


def _of_layer(tensors: reading.Tensors, path: Path, layer: int | None) -> tuple[Mapping[str, Tensor], int | None]:
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


def _oriented(tensors: reading.Tensors, path: Path) -> dict[str, Tensor]:
    """Encoders are stored [d_sae d_model]; decoders too, but before version 0.2 the other way round."""
    held = reading.taken(tensors, _TENSORS, path)
    W_enc, W_dec = held["W_enc"], held["W_dec"]
    turned = W_dec.shape != W_enc.shape and W_dec.shape == W_enc.T.shape
    held |= {"W_enc": W_enc.T, "W_dec": W_dec.T if turned else W_dec}
    held |= {"W_skip": tensors["W_skip"].T} if "W_skip" in tensors else {}
    return held | ({"threshold": tensors[THRESHOLD]} if THRESHOLD in tensors else {})
