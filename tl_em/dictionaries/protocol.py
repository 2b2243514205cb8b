"""What the package needs of a dictionary: anything with these members encodes and decodes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from tl_em.models.sites import Site


@runtime_checkable
class SparseDictionary(Protocol):
    """What the package needs of a dictionary: anything with these members will do."""

    W_enc: Tensor
    W_dec: Tensor
    d_sae: int
    site_in: Site
    site_out: Site

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, a: Tensor) -> Tensor: ...
