"""Any sparse dictionary, used like one of ours: proven on random activations, then asked for what it encodes.

    decode(a) = a W_dec + decode(0)          encode(x) >= 0, the same each time, each token's own
    gradient of latent j at x: by autograd   affine: encode(x)_j = g_j x + b_j wherever j is on (what exact graphs need)

Everything else that functions here want of a :class:`tl_em.Dictionary` (identity, label, latents as features, belonging
to a model) follows from these.

The control: an object that breaks one of them is refused, with what was seen (tests/extensions/test_dictionary.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import whole
from tl_em.dictionaries.checks import as_floats, check_metadata, check_sites
from tl_em.dictionaries.dictionary import Dictionary
from tl_em.errors import NonFiniteError, TlEmError, UsageError, WidthError
from tl_em.models.sites import Site

MEMBERS = ("encode", "decode", "W_dec", "d_sae", "site_in", "site_out")
CLOSE = 1e-3
"""Of the largest value: what float32 in another order may change."""
_PROBES, _HELD = 12, 2**24
_SCALES = (0.1, 1.0, 10.0)


@runtime_checkable
class SparseDictionary(Protocol):
    """A sparse dictionary of any kind: gated, matryoshka, a crosscoder, whatever encodes and decodes.

    Pass such an object wherever a dictionary is taken. What it says of itself is proven on random activations first.
    ``name``, ``provenance`` and ``metadata`` are read too, where it has them.

    Attributes:
        W_enc: [d_model d_sae], or None where the encoder is no single matrix; only the identity of the dictionary
            depends on it.
        W_dec: [d_sae d_model], what each latent writes at ``site_out``.
        d_sae: number of latents.
        site_in: the one site that it reads; or, of a crosscoder, a tuple of all that it reads at once, in any order of
            layers. Its latents are then scored, shown and audited, but neither set nor put into a graph: what a latent
            reads in a later layer is not there yet where it would act in an earlier one.
        site_out: the one site that it writes, or None for that which it reads. A crosscoder writes many and is, here,
            its part that writes one: that must be named.

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
    def site_in(self) -> Site | tuple[Site, ...]: ...

    @property
    def site_out(self) -> Site | None: ...

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations [token d_sae], none below 0, each token on its own.

        Args:
            x: activations [token d_model] at ``site_in``; where that is a tuple [token site d_model], in its order.
        """
        ...

    def decode(self, a: Tensor) -> Tensor:
        """What is written [token d_model] by latents [token d_sae]: ``a W_dec`` and a bias."""
        ...


if TYPE_CHECKING:
    AnyDictionary = SparseDictionary
else:  # what is none reaches ``as_dictionary``, and not a type checker's own error
    AnyDictionary = Any


@dataclass(frozen=True, eq=False, repr=False)
class ForeignDictionary(Dictionary):
    """Any object with the members of ``SparseDictionary``; :func:`as_dictionary` makes one.

    Args:
        inner: the object.
        is_affine: whether a latent that is on is an affine function of what is read.
    """

    inner: Any = field(kw_only=True)
    is_affine: bool = field(kw_only=True, default=False)

    @property
    def affine(self) -> bool:
        """As it was found."""
        return self.is_affine

    @property
    def _axes(self) -> tuple[int, ...]:
        """Of what is encoded at one token."""
        return (len(self.reads), self.d_model) if isinstance(self.site_in, tuple) else (self.d_model,)

    def encode(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*tokens d_sae"]:
        """Latent activations in float32, asked of the object as [token d_model]; gradients pass where ``x`` has one."""
        self._check_width(x)
        own: Tensor = self.inner.W_dec
        rows = x.reshape(-1, *self._axes)
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            a = self.inner.encode(rows.to(own.device, own.dtype))
        wanted = (len(rows), self.d_sae)
        if not isinstance(a, Tensor) or tuple(a.shape) != wanted:
            seen = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise WidthError(
                f"encode of {self.label} gave {seen} for {wanted[0]} tokens, and {wanted} is read as [token d_sae]; "
                "return one number a token and latent"
            )
        return a.to(x.device).float().reshape(*x.shape[: x.ndim - len(self._axes)], self.d_sae)

    def encode_as(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_sae"]:
        """Activations in the dtype of ``x``."""
        return self.encode(x).to(x)

    def gradients(
        self, x: Float[Tensor, "node d_model"], latents: Int[Tensor, " node"]
    ) -> Float[Tensor, "node d_model"]:
        """Of one latent at each row of ``x``, by autograd.

        Raises:
            UsageError: the object's encoder passes none.
        """
        found = []
        for some, chosen in zip(*(each.split(max(1, _HELD // self.d_sae)) for each in (x, latents)), strict=True):
            with torch.enable_grad():
                leaf = some.detach().float().requires_grad_()
                picked = self.encode(leaf)[torch.arange(len(some)), chosen.to(leaf.device)].sum()
                grad = torch.autograd.grad(picked, leaf, allow_unused=True)[0] if picked.requires_grad else None
            if grad is None:
                raise UsageError(
                    f"encode of {self.label} passes no gradient, so what its latents read is not known and there is "
                    "no graph; leave out detach, item and numpy there"
                )
            found.append(grad)
        return torch.cat(found).to(x) if found else x[:0]

    @cached_property
    def hash(self) -> str:
        """Of the tensors, and of which latents are on at some random activations."""
        a = self.encode(_probes(self))
        digest = hashlib.sha256(f"{type(self.inner).__name__}/{self.site_in}/{self.site_out}/{a.sum():.3g}".encode())
        for each in (self.W_enc, self.W_dec, self.b_dec, a > 0):
            digest.update(b"" if each is None else each.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _with(self, **changes: Any) -> ForeignDictionary:
        made = object.__new__(type(self))
        kept = {name: value for name, value in self.__dict__.items() if name != "hash"}
        made.__dict__.update(kept | changes)
        return made

    def with_norm_of(self, model: Any) -> NoReturn:
        """Refused: only an encoder of our own tensors can take a norm's weight in."""
        self._refuse("takes no norm's weight in")

    def save(self, path: str | Path) -> NoReturn:
        """Refused: this package has no format for it."""
        self._refuse("is not saved here")

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{self.label} {what}: its encoder is a {type(self.inner).__name__}'s own. Give its tensors where they say "
            "all: em.Dictionary(W_enc, b_enc, W_dec, b_dec, activation='relu', site_in=…)"
        )


def as_dictionary(given: Any) -> Dictionary:
    """Any sparse dictionary as one of ours; one of ours is given back as it is.

    Args:
        given: an ``em.Dictionary``, or an object with the members of ``em.SparseDictionary``.

    Raises:
        UsageError: it lacks a member, is not the same twice, mixes tokens, has latents below 0, or does not decode
            linearly. WidthError: shapes that do not belong together. NonFiniteError: NaN or infinity.

    Example:
        >>> eye = torch.eye(2)
        >>> class Halves:
        ...     W_enc, W_dec, d_sae, site_in, site_out = None, eye, 2, Site(1), None
        ...     def encode(self, x): return (x / 2).relu()
        ...     def decode(self, a): return a
        >>> found = as_dictionary(Halves())
        >>> found.encode(torch.tensor([[4.0, -4.0]])).tolist(), found.affine, found.feature(1)
        ([[2.0, 0.0]], True, Feature(the dictionary at resid_post[1], 1))
    """
    if isinstance(given, Dictionary):
        return given
    if lacking := [name for name in MEMBERS if not hasattr(given, name)]:
        raise UsageError(
            f"a {type(given).__name__} has no {', '.join(lacking)}, so it is no sparse dictionary. Give an "
            "em.Dictionary, an object with the members of em.SparseDictionary, or of SAELens "
            "em.interop.from_sae_lens(sae)"
        )
    W_dec, W_enc = as_floats("W_dec", given.W_dec), getattr(given, "W_enc", None)
    d_sae = whole("d_sae", given.d_sae, low=1)
    if W_dec.ndim != 2 or len(W_dec) != d_sae:
        raise WidthError(
            f"W_dec is {tuple(W_dec.shape)} with d_sae={d_sae}, read as [d_sae d_model], what each latent writes at "
            "site_out; of a crosscoder give the rows of that one site"
        )
    out = given.site_in if given.site_out is None else given.site_out
    check_sites(given.site_in, out, skip=False)
    told = getattr(given, "metadata", None)
    made = object.__new__(ForeignDictionary)
    made.__dict__.update(
        inner=given, is_affine=False, W_dec=W_dec, W_enc=None if W_enc is None else as_floats("W_enc", W_enc),
        b_enc=None, b_dec=torch.zeros(W_dec.shape[1]), site_in=given.site_in, site_out=out,
        activation=type(given).__name__, threshold=None, k=None, W_skip=None, name=getattr(given, "name", None),
        provenance=getattr(given, "provenance", None),
        metadata=check_metadata(told if isinstance(told, Mapping) else {}),
    )  # fmt: skip
    with torch.no_grad():
        bias = _proven(made)
    return made._with(b_dec=bias, is_affine=_is_affine(made))


# ---- proof -------------------------------------------------------------------------------------------------------
def _probes(made: ForeignDictionary) -> Float[Tensor, "token *axes"]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(_SCALES).repeat(_PROBES // len(_SCALES))
    x = torch.randn((_PROBES, *made._axes), generator=generator)
    return x * scales.view(-1, *(1 for _ in made._axes))


def _proven(made: ForeignDictionary) -> Float[Tensor, " d_model"]:
    """What ``decode`` gives for nothing; raises where the object is not what is needed."""
    x = _probes(made)
    a = made.encode(x)
    if not bool(a.isfinite().all()):
        raise NonFiniteError(f"encode of {made.label} gives NaN or infinity for finite activations; mend its weights")
    alone = torch.cat([made.encode(each) for each in x.split(1)])
    found = {
        "encode gives other latents for the same activations, so no latent means anything; draw nothing in it, and "
        "put it into evaluation mode": not torch.equal(made.encode(x), a),
        f"encode gives {int((a < 0).sum())} latents below 0, so *on* and *density* mean nothing; return its latents "
        "after their activation function": bool((a < 0).any()),
        "encode of a token depends on the other tokens of its batch; encode each token on its own, of BatchTopK with "
        "the threshold that it was trained to": not _same(alone, a),
    }
    for fault, holds in found.items():
        if holds:
            raise UsageError(f"{made.label} ({made.activation}): {fault}")
    return _linear_bias(made, a)


def _linear_bias(made: ForeignDictionary, a: Float[Tensor, "token d_sae"]) -> Float[Tensor, " d_model"]:
    own: Tensor = made.inner.W_dec
    some = torch.rand(a.shape, generator=torch.Generator().manual_seed(1))
    given = torch.cat([torch.zeros_like(a[:1]), a, some]).to(own.device, own.dtype)
    written = made.inner.decode(given)
    if not isinstance(written, Tensor) or tuple(written.shape) != (len(given), made.d_model):
        seen = tuple(written.shape) if isinstance(written, Tensor) else type(written).__name__
        raise WidthError(
            f"decode of {made.label} gave {seen} for {len(given)} tokens, and W_dec writes {made.d_model} wide; "
            "return what is written at site_out, [token d_model]"
        )
    written = written.float().to(made.W_dec.device)
    if not _same(written, given.float().to(made.W_dec.device) @ made.W_dec + written[0]):
        raise UsageError(
            f"{made.label} ({made.activation}): decode(a) is not a @ W_dec + decode(0), so what a latent writes is not "
            "its row of W_dec; return that, with W_dec the rows that act (their scales folded in)"
        )
    return written[0].detach().clone()


def _is_affine(made: ForeignDictionary) -> bool:
    """Whether ``a - g x`` of a latent is the same at every probe at which it is on; of a crosscoder nobody asks."""
    if isinstance(made.site_in, tuple):
        return False
    x = _probes(made)
    a = made.encode(x)
    latents = ((a > 0).sum(0) > 1).nonzero().flatten()[:64]
    rows, at = (a[:, latents] > 0).nonzero(as_tuple=True)
    try:
        g = made.gradients(x[rows], latents[at])
    except TlEmError:
        return False
    left = torch.full((len(x), len(latents)), torch.nan)
    left[rows, at] = (a[rows, latents[at]] - (g * x[rows]).sum(-1)).detach()
    apart = left.nan_to_num(-torch.inf).amax(0) - left.nan_to_num(torch.inf).amin(0)
    return bool((apart <= CLOSE * float(a.max())).all())


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=CLOSE, atol=CLOSE * float(other.abs().max()) * 0.1)
