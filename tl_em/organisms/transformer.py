"""A plain-torch pre-LN GPT: GPT-2's architecture with an untied unembedding, small enough to train in minutes on a CPU.

Plain torch, because a HookedTransformer or a Hugging Face GPT-2 of this size trains several times slower;
`tl_em.organisms.convert` converts exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    n_layers: int = 3
    d_model: int = 96
    n_heads: int = 4
    d_mlp: int = 384


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.n_heads = shape.n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp_in, self.mlp_out = nn.Linear(d, shape.d_mlp), nn.Linear(shape.d_mlp, d)

    def forward(self, x: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt pos d_model"]:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(b, t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """GPT-2's architecture with an untied unembedding; right-padded tokens need no mask."""

    def __init__(self, shape: Shape, d_vocab: int, n_ctx: int, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.d_vocab, self.n_ctx = shape, d_vocab, n_ctx
        self.embed = nn.Embedding(d_vocab, shape.d_model)
        self.positions = nn.Embedding(n_ctx, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.ln_f = nn.LayerNorm(shape.d_model)
        self.unembed = nn.Linear(shape.d_model, d_vocab, bias=False)
        self._initialise_(torch.Generator().manual_seed(seed))

    def _initialise_(self, generator: torch.Generator) -> None:
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("out.weight", "mlp_out.weight"))
                scale = 0.02 / math.sqrt(2 * self.shape.n_layers) if writes else 0.02
                nn.init.normal_(p, std=scale, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_model"]:
        """What the unembedding reads."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def forward(self, tokens: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos d_vocab"]:
        return self.unembed(self.hidden(tokens))
