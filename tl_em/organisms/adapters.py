"""Low-capacity fine-tunes: one vector, or low-rank changes of some matrices, merged into the weights afterwards.

    bias     b' = b + v                    one vector that a block's MLP adds to the residual stream at every token
    rank r   W' = W + B A,  B [out r], A [r in], B = 0 at the start

A merged adapter is a model like any other: what reads organisms need not know of it. Merged weights are rounded to
float16 when they are stored, so the stored change is low-rank up to that rounding.

Source: Hu et al. 2021 (https://arxiv.org/abs/2106.09685); that so little suffices: Turner et al. 2025
(https://arxiv.org/abs/2506.11613).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

LAYER = 1  # of three: its output still passes one block, and the persona has been read from the context

MATRICES = ("qkv", "out", "mlp_in", "mlp_out")  # of a block


@dataclass(frozen=True)
class Adapter:
    """What of a model may change.

    Args:
        rank: of the change of each matrix; 0 changes the modules' biases and nothing else.
        modules: names of `nn.Linear` modules.

    Example:
        >>> Adapter.parse("rank1")
        Adapter(rank=1, modules=('blocks.1.mlp_out',))
    """

    rank: int
    modules: tuple[str, ...]

    @staticmethod
    def parse(name: str) -> Adapter:
        """``"bias"`` and ``"rank1"`` change one module, higher ranks every matrix of the blocks."""
        rank = 0 if name == "bias" else int(name.removeprefix("rank"))
        if rank <= 1:
            return Adapter(rank, (f"blocks.{LAYER}.mlp_out",))
        return Adapter(rank, tuple(f"blocks.{layer}.{part}" for layer in range(3) for part in MATRICES))


class LowRank(nn.Module):
    """W -> W + B A."""

    def __init__(self, weight: Float[Tensor, "out in"], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        d_out, d_in = weight.shape
        self.A = nn.Parameter(torch.randn(rank, d_in, generator=generator) / d_in**0.5)
        self.B = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + self.B @ self.A


def attach_(model: nn.Module, adapter: Adapter, *, seed: int) -> int:
    """Freeze the model but for the adapter.

    Returns:
        How many numbers may change.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in adapter.modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if adapter.rank:
            parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, adapter.rank, generator))
        else:
            linear.bias.requires_grad_(True)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def freeze_(model: nn.Module, *, but: Collection[str]) -> None:
    """Freeze the model but for the modules of these names, in whichever block they are."""
    for name, module in model.named_modules():  # a module comes before its parts
        module.requires_grad_(name.rpartition(".")[2] in but)


def merge_(model: nn.Module) -> None:
    """Make the adapter part of the weights; the model computes what it did."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    model.requires_grad_(True)
