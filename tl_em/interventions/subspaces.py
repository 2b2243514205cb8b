"""Erasing more than one direction: a subspace, or all that a linear classifier could use.

    Erase:  x  ->  x - B'B (x - c)      B orthonormal rows [k d_model]; c = 0 at every write, or a centre at its site
    Leace:  x  ->  x - L R (x - m)      L R = W^+ P W, W the whitening of x, P onto the column space of W Cov(x, z)

An orthogonal projection removes a subspace whatever the data are. LEACE (Belrose et al. 2023, arXiv:2306.03819) is
fitted: afterwards the classes have the same mean, so that no linear classifier does better on the fitted activations
than a constant one, and of all affine maps with this property it moves the activations least (in mean square). It is
fitted by the authors' package ``concept-erasure`` and holds at the site and position where it was fitted.

The control for either: random subspaces of the same rank, treated the same. That a classifier fails afterwards says
something only if it worked before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, optional, settle, vectors
from tl_em.directions.direction import Direction, check_fits
from tl_em.errors import UsageError, WidthError, ZeroDirectionError
from tl_em.interventions.base import Intervention
from tl_em.interventions.edits import Removal
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site, as_position, as_site, check_belongs
from tl_em.models.stream import capture
from tl_em.models.torch_state import in_plain_torch
from tl_em.threads import own_warnings


@dataclass(frozen=True, eq=False)
class Erase(Removal):
    """Remove a k-dimensional subspace: to zero at every write, or around a centre at its own site.

    Args:
        basis: vectors [k d_model] or Directions that span the subspace; they are orthonormalised, and dependent ones
            count once.
        around: ``None``: to zero, at every write to the residual stream.  A vector [d_model]: to the centre's own part
            in the subspace, at ``site``.  A mapping from Site to such vectors: at each of those sites.
        site: where a single centre belongs; by default the site of the first Direction.

    Raises:
        UsageError: no vectors, or a single centre without a site.
        WidthError, NonFiniteError, ZeroDirectionError: vectors of different widths, with NaN, or all 0.

    Example:
        >>> e = Erase(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 3.0, 0.0]]))
        >>> e.rank, [round(value, 5) + 0 for value in e.edit(torch.tensor([[3.0, 4.0, 5.0]]))[0].tolist()]
        (2, [0.0, 0.0, 5.0])

    Source: Ravfogel et al. 2020, arXiv:2004.07667 (projection); Arditi et al. 2024, arXiv:2406.11717 (every write).
    """

    basis: Float[Tensor, "k d_model"] | Sequence[Direction] | Any
    around: Float[Tensor, " d_model"] | Mapping[Site, Float[Tensor, " d_model"]] | Any = None
    site: Site | Any = None
    rows: Float[Tensor, "rank d_model"] = field(init=False, repr=False)
    """Orthonormal rows that span the subspace, float32 on the CPU."""

    def __post_init__(self) -> None:
        settle(self, basis=_as_basis, site=optional(as_site))
        object.__setattr__(self, "rows", _orthonormal(_stacked(self.basis)))
        if self.around is not None and not isinstance(self.around, Mapping):
            self._home  # noqa: B018  # raises where it is not known to which site the centre belongs
        self._settle_centres(self.rows.shape[1])

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return len(self.rows)

    @property
    def _home(self) -> Site:
        site = self.site or (None if isinstance(self.basis, Tensor) else self.basis[0].site)
        if site is None:
            raise UsageError("a centre belongs to a site: pass site=em.Site(layer), or around={em.Site(layer): centre}")
        return site

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless the subspace belongs on this model."""
        check_belongs("the subspace", self.rows.shape[1], None, model)
        for direction in () if isinstance(self.basis, Tensor) else self.basis:
            check_fits(direction, model)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """Replace the part in the subspace by the centre's (0 without one)."""
        rows, centre = self.rows, self._centre(name)
        target = torch.zeros(len(rows)) if centre is None else rows @ centre
        return _replaced(x, left=rows, right=rows, target=target)

    def __repr__(self) -> str:
        centre = "0" if self.around is None else "a centre"
        return f"Erase(rank={self.rank}, d_model={self.rows.shape[1]}, around={centre})"


@dataclass(frozen=True, eq=False)
class Leace(Intervention):
    """A fitted LEACE eraser, frozen, at its site; ``em.interventions.leace`` fits one.

    Args:
        left: [rank d_model]; the directions in which activations are moved.
        right: [rank d_model]; what is read off them.
        mean: mean of the activations that it was fitted on; it stays where it is.
        site: where it was fitted, and acts.
        position: at which token it was fitted.
        provenance: the model and data that it was fitted on.

    Example:
        >>> line = torch.tensor([[0.0, 1.0]])
        >>> Leace(line, line, torch.tensor([5.0, 5.0]), Site(1)).edit(torch.tensor([[3.0, 4.0]])).tolist()
        [[3.0, 5.0]]

    Source: Belrose et al. 2023, arXiv:2306.03819, theorem 4.3.
    """

    left: Float[Tensor, "rank d_model"] | Any
    right: Float[Tensor, "rank d_model"] | Any
    mean: Float[Tensor, " d_model"] | Any
    site: Site | Any
    position: Position | Any = "prompt_end"
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        rows = partial(vectors, axes=2)
        settle(self, left=rows, right=rows, mean=vectors, site=as_site, position=as_position)
        if self.left.shape != self.right.shape or self.left.shape[1] != len(self.mean):
            raise WidthError(
                f"left {tuple(self.left.shape)}, right {tuple(self.right.shape)} and mean {tuple(self.mean.shape)} do "
                "not belong together; fit an eraser with em.interventions.leace(model, contrast, site=…, position=…)"
            )

    @checked()
    def check(self, model: LensModel) -> None:
        """Raise ``WidthError`` or ``ProvenanceError`` unless it was fitted on a model like this one."""
        check_belongs("the eraser", len(self.mean), self.provenance, model)

    def edit(self, x: Tensor, mask: Tensor | None = None, *, name: str | None = None) -> Tensor:
        """``x - L R (x - mean)``."""
        return _replaced(x, left=self.left, right=self.right, target=self.right @ self.mean)


@checked(contrast=as_contrast, site=as_site, position=as_position)
@in_plain_torch
def leace(model: LensModel, contrast: ContrastSet, *, site: Site, position: Position) -> Leace:
    """Fit the least change after which no linear classifier tells the two classes apart, at one site and position.

    Needs the extra ``erase``: ``pip install 'tl-em[erase]'``.

    Args:
        model: a HookedTransformer or TransformerBridge.
        contrast: the two classes.
        site: where to fit, and later to erase.
        position: at which token to fit.

    Returns:
        The eraser, a value for ``intervene``.

    Raises:
        ZeroDirectionError: the classes have the same mean there: nothing is linearly available to erase.
        UsageError: ``concept-erasure`` is not installed.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> persona = pair.contrasts["persona"]
        >>> eraser = em.interventions.leace(pair.base, persona, site=em.Site(2), position="prompt_end")
        >>> str(eraser.site)
        'resid_post[2]'

    Source: Belrose et al. 2023, arXiv:2306.03819.
    """
    try:
        with own_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its use of torch.jit, which is not the caller's
            from concept_erasure import LeaceFitter
    except ImportError as error:
        raise UsageError(
            "LEACE is fitted by the package concept-erasure, which is not installed: pip install 'tl-em[erase]'. "
            "em.Erase(basis) needs no package"
        ) from error
    prompts = (contrast.positive, contrast.negative)
    classes = [capture(model, each, [site], position=position)[:, 0] for each in prompts]
    x = torch.cat(classes).double()
    label = torch.tensor([1.0] * len(classes[0]) + [0.0] * len(classes[1]), dtype=torch.float64)
    # Its bound on the total variance would mix in a projection that leaves the class means apart.
    eraser = LeaceFitter.fit(x, label, constrain_cov_trace=False).eraser
    gap = (classes[0].double().mean(0) - classes[1].double().mean(0)).norm()
    if not (gap > 1e-6 * x.norm(dim=-1).mean() and eraser.proj_left.abs().max() > 0):  # float32: below, it is rounding
        raise ZeroDirectionError(
            f"the classes of {contrast.label or 'the contrast set'} have the same mean at {site}, so there is nothing "
            "linear to erase; fit at another site or position, or check that their prompts differ"
        )
    left, right = eraser.proj_left.T.float().contiguous(), eraser.proj_right.float().contiguous()
    return Leace(left, right, x.mean(0).float(), site, position, Provenance.of(model, data=contrast.hash))


def _replaced(x: Tensor, *, left: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """``x - L'(R x - target)``, in float32 or better whatever the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    left, right, target = (each.to(x.device, wide) for each in (left, right, target))
    return (x - (x.to(wide) @ right.T - target) @ left).to(x.dtype)


def _as_basis(name: str, value: Any) -> Tensor | tuple[Direction, ...]:
    """Vectors as they are in the package, or Directions."""
    if isinstance(value, Direction):
        return (value,)
    if not isinstance(value, Tensor) and isinstance(value, Sequence) and all(isinstance(d, Direction) for d in value):
        return tuple(value)
    return vectors(name, value, axes=2)


def _stacked(basis: Tensor | Sequence[Direction]) -> Float[Tensor, "k d_model"]:
    if not isinstance(basis, Tensor):
        if not basis:
            raise UsageError("Erase without vectors removes nothing; pass at least one direction")
        widths = {len(direction.vector) for direction in basis}
        if len(widths) > 1:
            raise WidthError(f"the directions are {sorted(widths)} wide; a subspace needs directions of one model")
        return torch.stack([direction.unit for direction in basis])
    return basis


def _orthonormal(basis: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows with the same span, from a singular value decomposition in float64."""
    lengths = basis.double().norm(dim=-1, keepdim=True)
    if not len(lengths) or not lengths.max() >= torch.finfo(torch.float32).tiny:
        raise ZeroDirectionError(
            "the basis vectors are all 0 (or none), so they span nothing; pass directions that are not"
        )
    _, values, rows = torch.linalg.svd(basis.double() / lengths.clamp_min(1e-300), full_matrices=False)
    return rows[values > 1e-6 * values.max()].float()  # float32 vectors: below that, a difference is rounding
