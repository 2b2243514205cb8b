"""A crosscoder over layers: latents read at several layers at once, with a decoder for each.

    a = jumprelu(sum_l x_l W_enc[l] + b)        x^_l = a W_dec[l] + b_dec[l]

A dictionary here writes one site; ``writing(site)`` is the part of the crosscoder that writes there.

Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tl_em as em


@dataclass(frozen=True, eq=False)
class Crosscoder:
    W_enc: Tensor  # [site d_model d_sae]
    b_enc: Tensor
    threshold: Tensor
    decoders: dict[em.Site, tuple[Tensor, Tensor]]  # W_dec and b_dec, by the site that they write
    site_in: tuple[em.Site, ...]
    site_out: em.Site

    def writing(self, site: em.Site) -> Crosscoder:
        return replace(self, site_out=site)

    def encode(self, x: Tensor) -> Tensor:
        before = torch.einsum("tsd,sdf->tf", x, self.W_enc) + self.b_enc
        return before * (before > self.threshold)

    def decode(self, a: Tensor) -> Tensor:
        return a @ self.W_dec + self.decoders[self.site_out][1]

    @property
    def W_dec(self) -> Tensor:
        return self.decoders[self.site_out][0]

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)
