"""A direction in activation space: a vector with the site and position it was read at and where it came from.

The vector is kept as it was found (for a difference in means ``r = mean(positive) - mean(negative)``), because its
length is the natural steering strength (Arditi et al. 2024, arXiv:2406.11717, section 2.3: ``x + r``); ``unit`` is
``r / |r|``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import checked, instance_of, list_of, optional, settle, text, vectors
from tl_em.artefacts import checked_fields, load_tensors, save_tensors
from tl_em.errors import WidthError, ZeroDirectionError
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site, as_position, as_site, check_belongs
from tl_em.models.stream import capture
from tl_em.showing import showable
from tl_em.stats import Estimate

_SCHEMA = "tl-em/direction/1"
_PLAIN = ("position", "name", "method")
_RECORDS: dict[str, Any] = {"provenance": Provenance, "reliability": Estimate, "neutral": Estimate}


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector of the residual stream (or of what is written to it), with its provenance.

    Two are equal where the vectors and all that is said of them are.

    Args:
        vector: Float[" d_model"], in the units of the activations; made float32, detached, on the CPU. A tensor of any
            dtype and device, an array of numpy, or a list of numbers.
        site: where it was read.
        position: at which token it was read.
        name: what people call it.
        provenance: the model, data and seed that it was made from; ``None`` for a vector that you made yourself.
        method: how it was found.
        reliability: cosine between the directions of two halves of its prompts.
        neutral: where the negative class's mean lies along it, in standard deviations (both classes pooled): what an
            ablation to zero takes from prompts that have nothing to do with the concept.

    Raises:
        WidthError: the vector has not exactly one axis.
        NonFiniteError: it holds NaN or infinity.
        ZeroDirectionError: its length is 0, or so small that float32 no longer holds its entries to their digits.
        PositionError, UsageError: no such position, no Site, or no numbers.

    Example:
        >>> d = Direction(torch.tensor([3.0, 4.0]), Site(2))
        >>> d.norm, d.project(torch.tensor([[1.0, 0.0], [3.0, 4.0]])).tolist()
        (5.0, [0.6000000238418579, 5.0])
    """

    vector: Float[Tensor, " d_model"] | Any  # whatever is given: float32 afterwards
    site: Site | Any
    position: Position | Any = "prompt_end"
    name: str | None = None
    provenance: Provenance | None = None
    method: str | None = None
    reliability: Estimate | None = None
    neutral: Estimate | None = None

    def __post_init__(self) -> None:
        settle(self, name=optional(text))
        label = self.name or "direction"
        vector = vectors(label, self.vector)
        settle(self, site=as_site, position=as_position)
        if not float(vector.abs().max() if len(vector) else 0.0) >= torch.finfo(torch.float32).tiny:
            raise ZeroDirectionError(
                f"{label}: the vector is 0 (or below 1e-38, where float32 loses its digits), so it has no direction; "
                f"the two classes have the same mean activation at {self.site}: read it at another site or position, "
                "check that their prompts differ, or scale a vector of your own"
            )
        object.__setattr__(self, "vector", vector)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        return torch.equal(self.vector, other.vector) and record_of(self) == record_of(other)

    def __hash__(self) -> int:
        return hash((self.site, self.position, self.name, len(self.vector)))

    @cached_property  # an edit asks for it at every hook point and token
    def unit(self) -> Float[Tensor, " d_model"]:
        """The unit vector; its length is taken in float64, so that it is 1 whatever the vector's."""
        wide = self.vector.double()
        return (wide / wide.norm()).float()

    @property
    def norm(self) -> float:
        """Length of the vector, in the units of the activations."""
        return float(self.vector.double().norm())

    @checked()
    def project(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes"]:
        """Component of each activation along the unit vector: ``x . unit``, in the units of the activations.

        Raises:
            WidthError: the last axis of ``x`` has another width.
        """
        if x.shape[-1] != len(self.vector):
            raise WidthError(
                f"the activations are {x.shape[-1]} wide and {self.name or 'the direction'} is {len(self.vector)} "
                "wide; project activations of the model that it was made on"
            )
        return x.float() @ self.unit.to(x.device)

    @checked()
    def renamed(self, name: str) -> Direction:
        """The same direction under another name."""
        return replace(self, name=name)

    def unchecked(self) -> Direction:
        """The same direction without its provenance, so that it is accepted on any model of its width.

        For when you know better than the check: a tokenizer that only gained a token, weights that were processed
        otherwise.
        """
        return replace(self, provenance=None)

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, the vector as a tensor, the rest as JSON in its header.

        Raises:
            OutputError: the path cannot be written; nothing is left behind.
        """
        return save_tensors(path, {"vector": self.vector}, {"schema": _SCHEMA, **record_of(self)})

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> Direction:
        """Read what :meth:`save` wrote.  Whether it fits a model is checked when it meets one.

        Raises:
            CorruptFileError: missing, truncated, or not a direction file.
        """
        damage = "a damaged vector would steer somewhere else: write it again with direction.save(path)"
        return load_tensors(path, _SCHEMA, lambda found, about: from_record(found["vector"], about), damage=damage)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.direction(self)

    def __repr__(self) -> str:
        return showable(
            f"Direction({self.name or 'unnamed'}, {self.site}, {self.position!r}, "
            f"d_model={len(self.vector)}, norm={self.norm:.3g}"
            + (f", reliability={self.reliability}" if self.reliability else "")
            + ")"
        )


def record_of(direction: Direction) -> dict[str, Any]:
    """Everything about a direction but its vector, as JSON."""
    about: dict[str, Any] = {"layer": direction.site.layer, "stream": direction.site.stream}
    about |= {name: getattr(direction, name) for name in _PLAIN}
    return about | {name: None if (e := getattr(direction, name)) is None else e.to_json() for name in _RECORDS}


def from_record(vector: Tensor, about: dict[str, Any]) -> Direction:
    """Back from ``record_of``; raises what Python raises for values that are not what they should be."""
    found = checked_fields(Direction, {name: about.get(name) for name in _PLAIN})
    found |= {name: kind.from_json(about[name]) for name, kind in _RECORDS.items() if about.get(name) is not None}
    return Direction(vector, Site(about["layer"], about["stream"]), **found)


as_direction = instance_of(
    Direction,
    "Direction",
    "it is unknown where it acts",
    "em.Direction(vector, em.Site(layer)), or one that em.difference_in_means found",
)
as_directions = list_of(as_direction)


def check_fits(direction: Direction, model: LensModel) -> None:
    """Raise unless a direction belongs on this model: same width, tokenizer, shape and weight processing.

    A direction of the base on its fine-tune fits: that is the point.  Without provenance only the width is checked.

    Raises:
        WidthError: the direction has another width than the model.
        ProvenanceError: the provenance disagrees with the model.
    """
    label = direction.name or "the direction"
    check_belongs(
        label,
        len(direction.vector),
        direction.provenance,
        model,
        template=True,
        again="extract it on this one with em.difference_in_means(model, contrast, site=…, position=…)",
        unchecked="direction.unchecked()",
    )


@dataclass(frozen=True, eq=False)
class Projection:
    """The metric: component of the activation along a direction, at the direction's own site and position.

    Args:
        direction: along which.
        unit: that of the activations.

    Example:
        >>> Projection(Direction(torch.ones(2), Site(1), name="persona")).name
        'projection on persona'
    """

    direction: Direction
    unit: str = "activation"

    def __call__(self, model: LensModel, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
        """Projection of each prompt, in the units of the activations."""
        acts = capture(model, prompts, [self.direction.site], position=self.direction.position)
        return self.direction.project(acts[:, 0])

    @property
    def name(self) -> str:
        """What is measured."""
        return f"projection on {self.direction.name or 'direction'}"
