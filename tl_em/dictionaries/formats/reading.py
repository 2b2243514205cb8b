"""From the files of a source to a Dictionary, as all formats do it: nothing in them is executed.

safetensors and JSON as they are, ``.pt`` as ``read_pt`` does, numpy with ``allow_pickle=False``. What a file holds is
taken by name; what is not known, or has no place, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_em.artefacts import json_values, read_text
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.hook_names import Place
from tl_em.errors import CorruptFileError, FileError, UsageError, WidthError
from tl_em.pt_files import read_pt

Tensors = Mapping[str, Tensor]
_MATRIX = re.compile(r"(?:^|\.)(?:[Ww]_\w+|weight|affine_skip_connection)$")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or no object.
    """
    values = json_values(read_text(_present(path)), path)
    found = values[0][1] if len(values) == 1 else values
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__} and no settings of a dictionary; copy it again")
    return found


def read_flat_yaml(path: Path) -> dict[str, str]:
    """The plain ``key: value`` lines of a YAML file's first level, as strings; what is nested is left out."""
    found = {}
    for line in read_text(_present(path)).splitlines():
        key, colon, value = line.partition(":")
        if colon and key and not key[0].isspace() and key[0] not in "#-":
            found[key.strip().strip("'\"")] = value.split(" #")[0].strip().strip("'\"")
    return found


def settings(path: Path) -> dict[str, Any]:
    """:func:`read_json`; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    present = _present(path)
    try:
        with safe_open(str(present), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error}); copy or download it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or another format.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping


def safetensors_names(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    """Names of the tensors, and the header's metadata; the weights are not read."""
    with _opened(path) as file:
        return frozenset(file.keys()), dict(file.metadata() or {})


def read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict of a ``.pt`` file, tensors only.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or it holds objects whose loading would run code.
    """
    found = read_pt(_present(path))
    if not isinstance(found, dict):
        raise CorruptFileError(f"{path} holds a {type(found).__name__}, no state dict; save model.state_dict() there")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file.

    Raises:
        FileError: there is no such file. CorruptFileError: truncated, or it holds pickled objects.
    """
    import numpy as np

    present = _present(path)
    try:
        with present.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # bytes of any kind raise anything here
        raise CorruptFileError(f"{path} holds no plain arrays ({error}); copy or download it again") from error


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}, which this dictionary needs; copy or download it too")
    return path


def taken(tensors: Tensors, names: Iterable[str], path: Any) -> dict[str, Tensor]:
    """The tensors of these names, in this order.

    Raises:
        CorruptFileError: one is missing.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CorruptFileError(
            f"{path} lacks {', '.join(missing)} (it holds {', '.join(sorted(tensors)) or 'nothing'}), so it is not "
            "what its settings say; copy or download it again"
        )
    return {name: tensors[name] for name in wanted}


def check_known(tensors: Tensors, known: Iterable[str], path: Any) -> None:
    """Raise ``UsageError`` where there are tensors that would be left out in silence, or matrices that are none."""
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise UsageError(
            f"{path} holds {', '.join(unknown)}, which is not known here, so the dictionary might compute something "
            "else without it; convert it to relu, jumprelu or topk, and make it with em.Dictionary(…)"
        )
    for name, each in tensors.items():
        if _MATRIX.search(name) and each.ndim != 2:
            raise refuse(
                name, tuple(each.shape), "it is no matrix; crosscoders and cross-layer transcoders, which read or "
                "write in several places, are not read: use a dictionary of one",
            )  # fmt: skip


def refuse(field: str, value: Any, why: str) -> UsageError:
    """The error for an option of a source that cannot be obeyed."""
    return UsageError(f"this dictionary has {field}={value!r}: {why}")


def check_size(said: tuple[Any, Any], W_enc: Tensor, path: Any) -> None:
    """Raise ``CorruptFileError`` unless an encoder has the sizes of its settings: width and latents, None if unsaid."""
    if any(each not in (None, size) for each, size in zip(said, W_enc.shape, strict=True)):
        raise CorruptFileError(
            f"the settings of {path} say {said[0]} (d_in) and {said[1]} (d_sae), and W_enc is {tuple(W_enc.shape)}: "
            "they are of two dictionaries, or damaged; copy or download both again"
        )


# ---- from tensors to a dictionary --------------------------------------------------------------------------------
def made(
    path: Any, tensors: Mapping[str, Tensor], *, read: Place, written: Place | None, metadata: Mapping[str, Any],
    off_input: bool = False, **fields: Any,
) -> Dictionary:  # fmt: skip
    """A dictionary of a source.

    Args:
        path: for messages.
        tensors: W_enc [d_model d_sae], b_enc, W_dec [d_sae d_model], b_dec; threshold and W_skip where there are any.
        read, written: where; ``written`` None for an SAE.
        metadata: of the source, in its words.
        off_input: whether the decoder's bias is taken off what is read.
        fields: ``activation``, ``k`` and ``name``.

    Raises:
        CorruptFileError: shapes that do not belong together. And what ``Dictionary`` raises.
    """
    held = dict(tensors)
    flags = {"before_norm_weight": read.before_weight, "module_output": (written or read).module}
    about = {key: value for key, value in metadata.items() if value is not None}
    about |= {key: True for key, holds in flags.items() if holds}
    try:
        if off_input:
            held["b_enc"] = held["b_enc"].float() - held["b_dec"].float() @ held["W_enc"].float()
        return Dictionary(
            **held, site_in=read.site, site_out=None if written is None else written.site, metadata=about, **fields
        )
    except (WidthError, RuntimeError, IndexError) as error:  # RuntimeError: torch's, of shapes
        shapes = {name: tuple(each.shape) for name, each in held.items()}
        raise CorruptFileError(
            f"the tensors of {path} do not belong together ({shapes}): {error}. Copy or download it again"
        ) from error


def gated(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder as a JumpReLU's: W_enc, b_enc and threshold.

    With W = W_enc exp(r), the gate ``x W_enc + b_gate > 0`` is ``x W + b_mag > b_mag - exp(r) b_gate``, so one
    threshold on the magnitude says both.

    Source: Rajamanoharan et al. 2024, arXiv:2404.16014 (a gated encoder with tied weights is a JumpReLU).
    """
    scale = r_mag.float().exp()
    magnitude = b_mag.float()
    return W_enc.float() * scale, magnitude, (magnitude - scale * b_gate.float()).clamp_min(0)


def rescaled(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder rows of length 1, and latents times their former lengths."""
    norms = held["W_dec"].float().norm(dim=-1)
    return {**held, "W_enc": held["W_enc"] * norms, "b_enc": held["b_enc"] * norms,
            "W_dec": held["W_dec"] / norms[:, None]}  # fmt: skip


def from_zero(threshold: Tensor) -> Tensor:
    """A threshold of code that takes a ReLU too: below 0 it changes nothing, so it is 0."""
    return threshold.float().clamp_min(0) if bool(torch.isfinite(threshold).all()) else threshold.float()
