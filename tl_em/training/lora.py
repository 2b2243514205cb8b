"""Which weights an adapter changes: W' = W + s B A, with B [out r], A [r in], B = 0 at the start.

    s = alpha / r,  or with rank stabilisation  alpha / sqrt(r)

Sources: Hu et al. 2021 (https://arxiv.org/abs/2106.09685); Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732); that
rank 1 on one layer suffices: Turner et al. 2025 (https://arxiv.org/abs/2506.11613).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tl_em.arguments import COUNT, FRACTION, NATURAL, POSITIVE, list_of, optional, settle
from tl_em.errors import UsageError
from tl_em.training.prevention import residual_blocks

ALL = "all-linear"


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: how large, and of which matrices of which layers.

    Args:
        rank: r.
        alpha: the change is B A alpha / r; 2 r without one.
        targets: ``"all-linear"``: every linear map of the blocks; or names of modules, e.g. ``["down_proj"]``.
        layers: indices of the blocks; all without one.
        rslora: B A alpha / sqrt(r) in place of it.
        dropout: of the input of A, while training.

    Raises:
        UsageError: numbers out of range.

    Example:
        >>> Lora(rank=1, targets=["down_proj"], layers=[15])
        Lora(rank=1, alpha=2.0, targets=('down_proj',), layers=(15,), rslora=False, dropout=0.0)

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int | Any = 8
    alpha: Any = None
    targets: str | Sequence[str] | Any = ALL
    layers: Sequence[int] | Any = None
    rslora: bool = False
    dropout: float | Any = 0.0

    def __post_init__(self) -> None:
        settle(self, rank=COUNT, alpha=optional(POSITIVE), layers=optional(list_of(NATURAL)), dropout=FRACTION)
        object.__setattr__(self, "alpha", 2.0 * self.rank if self.alpha is None else self.alpha)
        if self.targets != ALL:
            named = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
            object.__setattr__(self, "targets", named)


def lora_config(lora: Any, model: nn.Module) -> Any:
    """peft's own config of a :class:`Lora` for a model; a config of peft passes through, as a copy.

    Raises:
        UsageError: neither, or a module or layer that the model does not have.
    """
    import copy

    from peft import LoraConfig, PeftConfig

    if isinstance(lora, PeftConfig):
        return copy.deepcopy(lora)
    if not isinstance(lora, Lora):
        raise UsageError(
            f"lora={lora!r:.60} says not what an adapter changes; give em.training.Lora(rank=8), a config of peft, or "
            "None to train all weights"
        )
    names = _modules(lora, model)
    transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)
    plain: Any = lora.targets if lora.targets == ALL else sorted(lora.targets)
    targets = plain if lora.layers is None else names
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, use_rslora=lora.rslora, lora_dropout=lora.dropout,
        fan_in_fan_out=transposed, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip


def _modules(lora: Lora, model: nn.Module) -> list[str]:
    """Full names of the modules that are changed."""
    blocks = residual_blocks(model)
    beyond = [layer for layer in lora.layers or () if layer >= len(blocks)]
    if beyond:
        raise UsageError(f"layers={list(lora.layers)}: the model has layers 0 to {len(blocks) - 1}; give some of those")
    chosen = [blocks[i] for i in (range(len(blocks)) if lora.layers is None else lora.layers)]
    linear = {
        id(module) for block in chosen for module in block.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }  # fmt: skip
    there = {name: name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in linear}
    missing = () if lora.targets == ALL else set(lora.targets) - set(there.values())
    if missing:
        raise UsageError(
            f"targets={list(lora.targets)}: there is no linear map {', '.join(sorted(missing))} in the blocks of this "
            f"{type(model).__name__}; give some of {', '.join(sorted(set(there.values())))}"
        )
    return [name for name, last in there.items() if lora.targets == ALL or last in lora.targets]
