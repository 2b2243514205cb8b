"""From the tensors and settings of a source to a Dictionary: what all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.dictionaries.hook_names import Place
from tl_em.errors import CorruptFileError, WidthError


def made(
    path: Any, tensors: Mapping[str, Tensor | None], *, read: Place, written: Place | None, metadata: Mapping[str, Any],
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
    held = {name: each for name, each in tensors.items() if each is not None}
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


def from_zero(threshold: Tensor) -> Tensor:
    """A threshold of code that takes a ReLU too: below 0 it changes nothing, so it is 0."""
    return threshold.float().clamp_min(0) if bool(torch.isfinite(threshold).all()) else threshold.float()
