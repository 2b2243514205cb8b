"""A model as what is sent to workers around weights that they map and do not copy.

    model  =  skeleton (classes, config, buffers)  +  weights, each an array of bytes

Ray keeps arrays in its object store once a machine, and workers read them there; they are read-only, so whoever
changes weights copies the model first, as ``em.fine_tune`` does.  **Control**: what is built of it gives the logits of
what was packed, tied weights are tied, and the bytes are not copied.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from tl_em.threads import own_warnings


class MappedWeight(NamedTuple):
    """The bytes of a weight, and what they are read as."""

    data: UInt8[np.ndarray, " byte"]
    dtype: torch.dtype
    shape: tuple[int, ...]


class MappedModel(NamedTuple):
    """A model without its weights, and the weights by name (of tied ones the first)."""

    skeleton: nn.Module
    weights: Mapping[str, MappedWeight]


def packed(model: nn.Module) -> MappedModel:
    """A model on a CPU as skeleton and weights, which share its memory.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> found = packed(model)
        >>> [weight.data.nbytes for weight in found.weights.values()], found.skeleton.weight.numel()
        ([8, 4], 0)
        >>> torch.equal(unpacked(found)(torch.ones(2)), model(torch.ones(2)))
        True
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    with _without_weights(model):
        skeleton = copy.deepcopy(model)
    return MappedModel(skeleton, {name: _mapped(weight) for name, weight in weights.items()})


def unpacked(given: MappedModel) -> nn.Module:
    """The model, its weights where they are: not to be changed in place."""
    model = copy.deepcopy(given.skeleton)
    for name, weight in model.named_parameters():
        data, dtype, shape = given.weights[name]
        with own_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            weight.data = torch.from_numpy(data).view(dtype).reshape(shape)
    return model


def _mapped(weight: torch.Tensor) -> MappedWeight:
    data = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
    return MappedWeight(data, weight.dtype, tuple(weight.shape))


@contextmanager
def _without_weights(model: nn.Module) -> Iterator[None]:
    kept = {name: weight.data for name, weight in model.named_parameters()}
    try:
        for weight in model.parameters():
            weight.data = weight.data.new_empty(0)
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.data = kept[name]
