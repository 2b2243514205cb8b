"""saprmarks/dictionary_learning: ``ae.pt`` (a state dict) and ``config.json`` beside it.

    AutoEncoder              relu((x - b) W + b_enc), decoder rows scaled to length 1 by its loader     b = ``bias``
    AutoEncoderNew           relu(x W + b_enc)                                                b_dec = ``decoder.bias``
    GatedAutoEncoder         [(x - b) W + b_gate > 0] relu(e^r (x - b) W + b_mag)                 b = ``decoder_bias``
    AutoEncoderTopK          top-k of relu((x - b_dec) W + b_enc), at each token; its ``threshold`` is for training
    BatchTopKSAE, Matryoshka relu((x - b_dec) W + b_enc) where above ``threshold``
    JumpReluAutoEncoder      relu(x W + b_enc) where above ``threshold``; b_dec is not taken off

Source: dictionary_learning 0.1 (``dictionary.py``, ``trainers/``, ``utils.load_dictionary``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats import reading
from tl_em.dictionaries.formats.reading import refuse
from tl_em.dictionaries.hook_names import Place, Sites
from tl_em.errors import CorruptFileError, UsageError

WEIGHTS, CONFIG = "ae.pt", "config.json"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias")
_BUFFERS = ("k", "threshold", "group_sizes")


class _Class(NamedTuple):
    """What a class of theirs holds, and how it encodes; whether its bias is taken off what it reads."""

    tensors: tuple[str, ...]
    activation: str
    off_input: bool = True


_CLASSES: Mapping[str, _Class] = {
    "AutoEncoder": _Class((*_LINEAR, "bias"), "relu"),
    "AutoEncoderNew": _Class((*_LINEAR, "decoder.bias"), "relu", off_input=False),
    "GatedAutoEncoder": _Class(_GATED, "jumprelu"),
    "AutoEncoderTopK": _Class((*_LINEAR, "b_dec"), "topk"),
    "BatchTopKSAE": _Class((*_LINEAR, "b_dec", "threshold"), "jumprelu"),
    "MatryoshkaBatchTopKSAE": _Class((*_MATRICES, "group_sizes"), "jumprelu"),
    "JumpReluAutoEncoder": _Class(_MATRICES, "jumprelu", off_input=False),
}
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_NAMES |= dict.fromkeys(("bias", "decoder.bias", "decoder_bias"), "b_dec")


def from_directory(folder: Path, sites: Sites, weights: Path | None = None) -> Dictionary:
    """A directory with ``ae.pt`` and ``config.json`` (which may be missing where the tensors say the class).

    Raises:
        FileError, CorruptFileError: a file is missing or damaged. UsageError: no class, no site, or an unset threshold.
    """
    path = weights or folder / WEIGHTS
    tensors, config = reading.read_torch(path), reading.settings(folder / CONFIG)
    trainer = config.get("trainer", config)
    if not isinstance(trainer, Mapping):
        raise CorruptFileError(f"{folder / CONFIG} has no settings under 'trainer'; copy it again")
    name = _class_name(trainer, tensors, path)
    kind = _CLASSES[name]
    reading.check_known(tensors, (*kind.tensors, *_BUFFERS), path)
    read, written = _places(config, trainer, sites)
    about = {
        "format": "dictionary_learning", "dict_class": name, "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"), "layer": trainer.get("layer"),
        "context_size": (config.get("buffer") or {}).get("ctx_len"),
    }  # fmt: skip
    k = {"k": _k(tensors, trainer, path)} if kind.activation == "topk" else {}
    return reading.made(path, _held(name, tensors, path), read=read, written=written, metadata=about,
                        off_input=kind.off_input, activation=kind.activation, **k)  # fmt: skip


def _class_name(trainer: Mapping[str, Any], tensors: reading.Tensors, path: Path) -> str:
    said = trainer.get("dict_class")
    fitting = [name for name, kind in _CLASSES.items()
               if set(tensors) - set(_BUFFERS) == set(kind.tensors) - set(_BUFFERS)]  # fmt: skip
    if said is None:
        if len(fitting) != 1:
            raise UsageError(
                f"{path} may be a {' or a '.join(fitting) or 'class that is not known here'}, which encode "
                f"differently, and no {CONFIG} beside it says dict_class; copy that file too"
            )
        return fitting[0]
    if said not in _CLASSES:
        raise refuse("dict_class", said, f"only {', '.join(_CLASSES)} are read")
    if said not in fitting:
        raise CorruptFileError(
            f"{path} holds {', '.join(sorted(tensors))}, and a {said} (dict_class) has "
            f"{', '.join(_CLASSES[said].tensors)}: the two files are not of one dictionary; copy both again"
        )
    return str(said)


def _places(config: Mapping[str, Any], trainer: Mapping[str, Any], sites: Sites) -> tuple[Place, Place | None]:
    layer, name = trainer.get("layer"), trainer.get("submodule_name")
    io = (config.get("buffer") or {}).get("io", "out")
    if io != "out" and sites.site_in is None:
        raise refuse("buffer.io", io, "it reads what goes into a module; pass site_in=em.Site(layer, stream) of that")
    read = sites.read(name if io == "out" else None, "submodule_name")
    if name and isinstance(layer, int) and sites.site_in is None and read.site.layer != layer:
        raise CorruptFileError(
            f"layer is {layer} and submodule_name is {name!r}: one of the two is wrong; pass site_in=em.Site(layer, "
            "stream)"
        )
    return read, None if sites.site_out in (None, read.site) else Place(sites.site_out)


def _held(name: str, tensors: reading.Tensors, path: Path) -> dict[str, Tensor]:
    """The tensors of a class as ours: weights are stored the other way round."""
    wanted = [each for each in _CLASSES[name].tensors if each != "group_sizes"]
    held = {_NAMES.get(each, each): (t.T if each.endswith(".weight") else t).float()
            for each, t in reading.taken(tensors, wanted, path).items()}  # fmt: skip
    if name == "AutoEncoder":  # its loader, ``from_pretrained``, makes rows of length 1 by default
        norms = held["W_dec"].norm(dim=-1)
        return held if torch.allclose(norms, torch.ones_like(norms)) else reading.rescaled(held)
    if name == "GatedAutoEncoder":  # the bias is taken off before both; the threshold on the magnitude does not see it
        gates = reading.gated(held["W_enc"], *(held.pop(each) for each in ("gate_bias", "mag_bias", "r_mag")))
        return held | dict(zip(("W_enc", "b_enc", "threshold"), gates, strict=True))
    threshold = held.get("threshold")
    if name == "JumpReluAutoEncoder":
        return held | {"threshold": reading.from_zero(held["threshold"])}
    if threshold is not None and threshold.numel() == 1 and float(threshold) < 0:
        raise refuse(
            "threshold", float(threshold), "it was never measured (training ended first), so what is on would be a "
            "ReLU's; train it further, or use its top-k twin",
        )  # fmt: skip
    return held if threshold is None else held | {"threshold": threshold.squeeze()}


def _k(tensors: reading.Tensors, trainer: Mapping[str, Any], path: Path) -> Any:
    said, counted = trainer.get("k"), tensors["k"].item() if "k" in tensors else None
    if None not in (said, counted) and said != counted:
        raise CorruptFileError(
            f"{path} has k={counted} and {CONFIG} k={said}: they are of two dictionaries; copy both again"
        )
    return said if counted is None else counted
