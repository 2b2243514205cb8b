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

from tl_em.dictionaries.checks import Where
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.formats.building import from_zero, gated, made
from tl_em.dictionaries.formats.files import Tensors, check_known, read_json, read_torch, refuse, taken
from tl_em.dictionaries.hook_names import Place, placed
from tl_em.errors import CorruptFileError, UsageError

WEIGHTS, CONFIG = "ae.pt", "config.json"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec"),
    "BatchTopKSAE": (*_LINEAR, "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_MATRICES, "group_sizes"),
    "JumpReluAutoEncoder": _MATRICES,
}
_BUFFERS = ("k", "threshold", "group_sizes")


def from_directory(
    folder: Path, weights: Path | None = None, *, site_in: Where | None = None, site_out: Where | None = None
) -> Dictionary:
    """A directory with ``ae.pt`` and ``config.json`` (which may be missing where the tensors say the class).

    Raises:
        FileError, CorruptFileError: a file is missing or damaged. UsageError: no class, no site, or an unset threshold.
    """
    path = weights or folder / WEIGHTS
    tensors = read_torch(path)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    trainer = config.get("trainer", config)
    if not isinstance(trainer, Mapping):
        raise CorruptFileError(f"{folder / CONFIG} has no settings under 'trainer'; copy it again")
    kind = _kind(trainer, tensors, path)
    check_known(tensors, (*_CLASSES[kind], *_BUFFERS), path)
    read, written = _places(config, trainer, site_in, site_out)
    return _READERS[kind](_Kept(kind, tensors, trainer, path), read, written, _about(config, trainer, kind))


class _Kept(NamedTuple):
    kind: str
    tensors: Tensors
    trainer: Mapping[str, Any]
    path: Path

    def take(self, *names: str) -> list[Tensor]:
        return [each.float() for each in taken(self.tensors, names, self.path)]


def _kind(trainer: Mapping[str, Any], tensors: Tensors, path: Path) -> str:
    said = trainer.get("dict_class")
    fitting = [name for name, wanted in _CLASSES.items() if set(tensors) - set(_BUFFERS) == set(wanted) - set(_BUFFERS)]
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
            f"{path} holds {', '.join(sorted(tensors))}, and a {said} (dict_class) has {', '.join(_CLASSES[said])}: "
            "the two files are not of one dictionary; copy both again"
        )
    return str(said)


def _places(
    config: Mapping[str, Any], trainer: Mapping[str, Any], site_in: Where | None, site_out: Where | None
) -> tuple[Place, Place | None]:
    layer, name = trainer.get("layer"), trainer.get("submodule_name")
    io = (config.get("buffer") or {}).get("io", "out")
    if io != "out" and site_in is None:
        raise refuse("buffer.io", io, "it reads what goes into a module; pass site_in=em.Site(layer, stream) of that")
    read = placed(name if io == "out" else None, "submodule_name", site_in, "site_in")
    if name and isinstance(layer, int) and site_in is None and read.site.layer != layer:
        raise CorruptFileError(
            f"layer is {layer} and submodule_name is {name!r}: one of the two is wrong; pass site_in=em.Site(layer, "
            "stream)"
        )
    return read, None if site_out in (None, read.site) else Place(site_out)  # pyright: ignore[reportArgumentType]


def _about(config: Mapping[str, Any], trainer: Mapping[str, Any], kind: str) -> dict[str, Any]:
    buffer = config.get("buffer") or {}
    return {
        "format": "dictionary_learning", "dict_class": kind, "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"), "layer": trainer.get("layer"),
        "context_size": buffer.get("ctx_len"),
    }  # fmt: skip


def _autoencoder(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    """With decoder rows of length 1, as ``AutoEncoder.from_pretrained`` makes them by default."""
    W, b_enc, D, bias = held.take(*_LINEAR, "bias")
    norms = D.norm(dim=0) if D.ndim == 2 else torch.ones(1)
    if not torch.allclose(norms, torch.ones_like(norms)) and W.shape == D.T.shape:
        W, b_enc, D = W * norms[:, None], b_enc * norms, D / norms
    held_tensors = {"W_enc": W.T, "b_enc": b_enc, "W_dec": D.T, "b_dec": bias}
    return made(held.path, held_tensors, read=read, written=written, metadata=about, off_input=True, activation="relu")


def _autoencoder_new(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    W, b_enc, D, b_dec = held.take(*_LINEAR, "decoder.bias")
    tensors = {"W_enc": W.T, "b_enc": b_enc, "W_dec": D.T, "b_dec": b_dec}
    return made(held.path, tensors, read=read, written=written, metadata=about, activation="relu")


def _gated(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    W, D, bias, r_mag, gate, magnitude = held.take(*_CLASSES["GatedAutoEncoder"])
    W_enc, b_enc, threshold = gated(W.T, gate, magnitude, r_mag)
    # The bias is taken off before both; the threshold on the magnitude does not see it.
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": D.T, "b_dec": bias, "threshold": threshold}
    return made(held.path, tensors, read=read, written=written, metadata=about, off_input=True, activation="jumprelu")


def _topk(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    W, b_enc, D, b_dec = held.take(*_LINEAR, "b_dec")
    tensors = {"W_enc": W.T, "b_enc": b_enc, "W_dec": D.T, "b_dec": b_dec}
    return made(held.path, tensors, read=read, written=written, metadata=about, off_input=True, activation="topk",
                k=_k(held))  # fmt: skip


def _batch_topk(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    if held.kind == "BatchTopKSAE":
        W, b_enc, D, b_dec = held.take(*_LINEAR, "b_dec")
        W_enc, W_dec = W.T, D.T
    else:
        W_enc, b_enc, W_dec, b_dec = held.take("W_enc", "b_enc", "W_dec", "b_dec")
    (threshold,) = held.take("threshold")
    if threshold.numel() == 1 and float(threshold) < 0:
        raise refuse(
            "threshold", float(threshold), "it was never measured (training ended first), so what is on would be a "
            "ReLU's; train it further, or use its top-k twin",
        )  # fmt: skip
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold.squeeze()}
    return made(held.path, tensors, read=read, written=written, metadata=about, off_input=True, activation="jumprelu")


def _jumprelu(held: _Kept, read: Place, written: Place | None, about: Mapping[str, Any]) -> Dictionary:
    W_enc, b_enc, W_dec, b_dec, threshold = held.take(*_MATRICES)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": from_zero(threshold)}
    return made(held.path, tensors, read=read, written=written, metadata=about, activation="jumprelu")


def _k(held: _Kept) -> Any:
    stored = held.tensors.get("k")
    said = held.trainer.get("k")
    counted = None if stored is None else stored.item()
    if None not in (said, counted) and said != counted:
        raise CorruptFileError(
            f"{held.path} has k={counted} and {CONFIG} k={said}: they are of two dictionaries; copy both again"
        )
    return said if counted is None else counted


_READERS = {
    "AutoEncoder": _autoencoder, "AutoEncoderNew": _autoencoder_new, "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk, "BatchTopKSAE": _batch_topk, "MatryoshkaBatchTopKSAE": _batch_topk,
    "JumpReluAutoEncoder": _jumprelu,
}  # fmt: skip
