"""What the package needs of a dictionary: anything with these members encodes and decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from tl_em.models.sites import Site


@runtime_checkable
class SparseDictionary(Protocol):
    """A sparse dictionary of any kind: gated, matryoshka, a crosscoder's part, whatever encodes and decodes.

    Pass such an object wherever a dictionary is taken. What it says of itself is proven on random activations first
    (``dictionaries.foreign``). ``name``, ``provenance`` and ``metadata`` are read too, where it has them.

    Attributes:
        W_enc: [d_model d_sae], or None where the encoder is no single matrix; only the identity of the dictionary
            depends on it.
        W_dec: [d_sae d_model], what each latent writes at ``site_out``.
        d_sae: number of latents.
        site_in: the one site that it reads; site_out: the one that it writes, or None for the same.

    Example:
        >>> isinstance("an SAE", SparseDictionary)
        False
    """

    @property
    def W_enc(self) -> Tensor | None: ...

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def d_sae(self) -> int: ...

    @property
    def site_in(self) -> Site: ...

    @property
    def site_out(self) -> Site | None: ...

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [token d_sae], none below 0, of activations [token d_model]; each token on its own."""
        ...

    def decode(self, a: Tensor) -> Tensor:
        """What is written [token d_model] by latents [token d_sae]: ``a W_dec`` and a bias."""
        ...


if TYPE_CHECKING:
    AnyDictionary = SparseDictionary
else:  # what is none reaches ``as_dictionary``, and not a type checker's own error
    AnyDictionary = Any
