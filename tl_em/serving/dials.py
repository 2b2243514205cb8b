"""What is turned, how far and at which tokens, as a frozen value: from a page's JSON, and into interventions.

    add       x + coefficient * vector            a latent: its decoder row
    ablate    the component along the vector to 0 at every write; a latent: its activation to 0
    clamp     the component kept between low and high; a latent: its activation set (low = high)

Dials act in their order; neighbours of one scope share a block of ``em.intervene``, others are nested in it. Beside
each dial stands its KL from the untreated model (``answering.divergence``), the control for how much of what is read
changed at all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

from tl_em.arguments import finite, optional, settle
from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.profile import Profile
from tl_em.errors import UsageError
from tl_em.interventions.base import Intervention
from tl_em.interventions.edits import Ablate, Add, Clamp
from tl_em.interventions.intervene import intervene
from tl_em.interventions.latents import ScaleFeature
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site
from tl_em.models.token_scopes import Where, check_where
from tl_em.showing import showable
from tl_em.threads import SPOKEN, holding

Act = Literal["add", "ablate", "clamp"]
MOST = 64
"""Dials at once."""
_LATENT = re.compile(r"latent (\d{1,9})")


def _act(name: str, value: Any) -> Act:
    if value not in get_args(Act):
        raise UsageError(f"{name}={value!r} is nothing that a dial does; give {name} one of {', '.join(get_args(Act))}")
    return value


@dataclass(frozen=True)
class SteeringDial:
    """One direction or latent, and what is done with it.

    Args:
        name: of a direction that is served, or ``"latent 12"`` of the dictionary.
        act: ``"add"``, ``"ablate"`` or ``"clamp"``.
        coefficient: how much of the raw vector (of a latent: of its decoder row) is added.
        low: lower bound of a clamp, in the units of the activations; of a latent, the activation that it is set to.
        high: upper bound of a clamp; of a latent as ``low``, or left out.
        where: the tokens that are treated, as in ``em.intervene``.
        on: whether it acts.

    Raises:
        UsageError: no such act or scope, a number that is none, or a clamp without a bound.

    Example:
        >>> dial = SteeringDial("persona", "add", 1.5, where="generated")
        >>> dial, dial.latent, SteeringDial("latent 12", "ablate").latent
        (persona +1.5 (generated), None, 12)
    """

    name: str | Any
    act: Act | Any = "add"
    coefficient: float | int | Any = 1.0
    low: float | int | Any = None
    high: float | int | Any = None
    where: Where | Any = "all"
    on: bool | Any = True

    def __post_init__(self) -> None:
        settle(self, act=_act, coefficient=finite, low=optional(finite), high=optional(finite))
        object.__setattr__(self, "where", check_where(self.where))
        if not isinstance(self.name, str) or not isinstance(self.on, bool):
            raise UsageError(f"name={self.name!r}, on={self.on!r}: a dial has a text as its name, and is on or off")
        if self.act == "clamp" and self.low is None and self.high is None:
            raise UsageError(f"{self.name}: a clamp without a bound changes nothing; give low=, high= or both")

    @property
    def latent(self) -> int | None:
        """The number of the latent that it turns; None of a direction."""
        found = _LATENT.fullmatch(self.name)
        return None if found is None else int(found[1])

    @classmethod
    def from_json(cls, value: Any) -> SteeringDial:
        """A dial as a page sends it.

        Args:
            value: an object with the fields of a dial.

        Raises:
            UsageError: it is none, or a field is not known.
        """
        fields = set(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or not set(value) <= fields or "name" not in value:
            raise UsageError(
                f"a dial came as {showable(repr(value)[:80])}, so it is unknown what to turn; send an object with "
                f"name, and of {', '.join(sorted(fields - {'name'}))} what differs from the default"
            )
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """The same fields, for a page."""
        where = list(self.where) if isinstance(self.where, tuple) else self.where
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"where": where}

    def __repr__(self) -> str:
        if self.act == "clamp":
            low, high = ("" if each is None else f"{each:g}" for each in (self.low, self.high))
            said = f"in [{low}, {high}]" if low != high else f"= {low}"
        else:
            said = f"{self.coefficient:+g}" if self.act == "add" else "ablated"
        where = self.where if isinstance(self.where, str) else f"last {self.where[1]}"
        scope = "" if where == "all" else f" ({where})"
        return f"{showable(self.name)} {said}{scope}{'' if self.on else ', off'}"


def dials_of(value: Any) -> tuple[SteeringDial, ...]:
    """Several dials as a page sends them.

    Raises:
        UsageError: no list, too many, or what a dial raises.
    """
    if not isinstance(value, list) or len(value) > MOST:
        raise UsageError(f"dials came as something else than a list of at most {MOST}, so none is turned; send a list")
    return tuple(map(SteeringDial.from_json, value))


@dataclass(frozen=True, eq=False)
class Served:
    """A model and what can be turned on it, with where each came from.

    Args:
        model: that answers.
        directions: by name; profiles too, which are turned at all their layers and read at the middle one.
        dictionary: whose latents can be turned and read; None for none.
        source: what ``em.load_model`` was given; None of a model that was there already.
        surface: on which it was loaded.
        files: of the directions, by name, where they were read from files.
        dictionary_file: of the dictionary.
    """

    model: LensModel
    directions: Mapping[str, Direction | Profile] = field(default_factory=dict)
    dictionary: Dictionary | None = None
    source: str | None = None
    surface: str = "bridge"
    files: Mapping[str, str] = field(default_factory=dict)
    dictionary_file: str | None = None

    @property
    def read(self) -> dict[str, Direction]:
        """Along which direction each is read."""
        return {name: each if isinstance(each, Direction) else each.directions[len(each.directions) // 2]
                for name, each in self.directions.items()}  # fmt: skip

    def intervention(self, dial: SteeringDial) -> Intervention:
        """What a dial does.

        Raises:
            UsageError: no such direction or latent, or an act that a transcoder's latent has not.
        """
        if dial.latent is not None and dial.name not in self.directions:
            return self._of_latent(dial, dial.latent)
        if dial.name not in self.directions:
            served = ", ".join(map(showable, self.directions))
            raise UsageError(
                f"{showable(dial.name)!r} is not served, so it cannot be turned; "
                + (f"take one of {served}" if served else "serve it: em.serve(model, [direction])")
            )
        direction = self.directions[dial.name]
        if dial.act == "add":
            return Add(direction, dial.coefficient)
        return Ablate(direction) if dial.act == "ablate" else Clamp(direction, low=dial.low, high=dial.high)

    def _of_latent(self, dial: SteeringDial, index: int) -> Intervention:
        if self.dictionary is None:
            raise UsageError(f"{dial.name} is of no dictionary, so it cannot be turned; serve one: dictionary=")
        latent = self.dictionary.feature(index)
        if dial.act == "add":
            return Add(self.decoder_row(index), dial.coefficient)
        if dial.act == "ablate":
            return ScaleFeature(latent, 0.0)
        bounds = {dial.low, dial.high} - {None}
        if len(bounds) > 1:
            raise UsageError(f"{dial.name}: a latent is set to one activation, not kept in a range; give low= alone")
        return ScaleFeature(latent, to=bounds.pop())

    def decoder_row(self, index: int) -> Direction:
        """What a latent writes, as a direction at the site that it is written to."""
        dictionary = self.dictionary
        assert dictionary is not None and isinstance(dictionary.site_out, Site)
        return Direction(dictionary.W_dec[index], dictionary.site_out, name=f"latent {index}")

    @contextmanager
    def applied(self, dials: Sequence[SteeringDial]) -> Iterator[list[str]]:
        """The model under the dials that are on, until the block ends; yields what there is to warn of."""
        with ExitStack() as stack:
            with holding(SPOKEN), warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for where, group in blocks(dials):
                    edits = map(self.intervention, group)
                    stack.enter_context(intervene(self.model, *edits, where=where))
            yield [str(each.message) for each in said]


def blocks(dials: Sequence[SteeringDial]) -> list[tuple[Where, list[SteeringDial]]]:
    """Those that are on, in their order, neighbours of one scope together."""
    on = [dial for dial in dials if dial.on]
    return [(check_where(where), list(group)) for where, group in groupby(on, key=lambda dial: dial.where)]
