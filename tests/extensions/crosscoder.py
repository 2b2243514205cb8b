"""A crosscoder over layers: latents read at one layer, with a decoder for each layer from there on.

    a = relu(x_read W_enc + b)        x^_l = a W_dec[l] + b_dec[l]        Lindsey et al. 2024, "Sparse Crosscoders"

A dictionary here writes one site; ``writing(site)`` is the part of the crosscoder that writes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tl_em as em


@dataclass(frozen=True, eq=False)
class Crosscoder:
    W_enc: Tensor
    decoders: Mapping[em.Site, tuple[Tensor, Tensor]]
    site_in: em.Site
    site_out: em.Site

    def writing(self, site: em.Site) -> Crosscoder:
        return replace(self, site_out=site)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc)

    def decode(self, a: Tensor) -> Tensor:
        return a @ self.W_dec + self.decoders[self.site_out][1]

    @property
    def W_dec(self) -> Tensor:
        return self.decoders[self.site_out][0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]
