"""A gated SAE, as its author would write it: one matrix, a gate that switches and a magnitude that scales.

    pi = (x - b_dec) W_enc        a = 1[pi + b_gate > 0] * relu(pi * exp(r) + b_mag)

Source: Rajamanoharan et al. 2024, arXiv:2404.16014.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tl_em as em


class GatedSAE(torch.nn.Module):
    def __init__(self, W_enc: Tensor, W_dec: Tensor, site: em.Site) -> None:
        super().__init__()
        self.W_enc, self.W_dec = torch.nn.Parameter(W_enc), torch.nn.Parameter(W_dec)
        self.r, self.b_gate, self.b_mag = (torch.nn.Parameter(torch.zeros(len(W_dec))) for _ in range(3))
        self.b_dec, self.d_sae = torch.nn.Parameter(torch.zeros(W_dec.shape[1])), len(W_dec)
        self.site_in, self.site_out = site, None  # it writes where it reads

    def encode(self, x: Tensor) -> Tensor:
        before = (x - self.b_dec) @ self.W_enc
        return (before + self.b_gate > 0) * torch.relu(before * self.r.exp() + self.b_mag)

    def decode(self, a: Tensor) -> Tensor:
        return a @ self.W_dec + self.b_dec
