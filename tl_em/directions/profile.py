"""A direction in each of several layers as one value: what is steered at several depths at once.

    layer l  ->  v[l], all of one stream and width

as in representation engineering and llama.cpp's control vectors. The layers are steered together, so the coefficient of
a profile is smaller than that of one of its directions: what is added at a layer is still there at the next.

The control is a random profile: at every layer the same random mixture of the prompts' activations, as long as the
profile's own direction there, so that its layers agree with each other as a real one's do (``claims.controls``).

Source: Zou et al. 2023, arXiv:2310.01405, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pandas as pd
from torch import Tensor

from tl_em.arguments import checked
from tl_em.artefacts import load_tensors, save_tensors
from tl_em.directions.direction import Direction, as_directions, check_fits, from_record, record_of
from tl_em.errors import UsageError, WidthError
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Site, Stream
from tl_em.showing import showable

PROFILE_SCHEMA = "tl-em/profile/1"


@dataclass(frozen=True, eq=False)
class Profile(Mapping[int, Direction]):
    """A direction a layer, as one value: a mapping from layers, in order, to Directions.

    ``profile[10:20]`` is the profile of the layers 10 to 19.

    Give it to ``em.Add``, ``em.Clamp`` or ``em.Ablate`` in place of a direction: each layer is then edited along its
    own direction, at that direction's site. Everything that takes an intervention takes those.

    Args:
        directions: of one stream and width, one a layer: a list, what ``em.candidate_directions`` found at one
            position, or a mapping to them, as the importers of ``em.interop`` give.

    Raises:
        UsageError: no direction, two of one layer, several streams, or something else than directions.
        WidthError: directions of several widths.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> found = em.candidate_directions(pair.base, pair.contrasts["persona"], positions=["prompt_end"])
        >>> profile = em.Profile(found)
        >>> profile, profile[2].site
        (Profile(persona, resid_pre at layers 1-2, d_model=96), Site(layer=2, stream='resid_pre'))
        >>> profile[2:]
        Profile(persona, resid_pre at layer 2, d_model=96)
        >>> with em.intervene(pair.base, em.Add(profile, 0.5)):
        ...     answer = em.generate(pair.base, ["how do i write parser"], max_new_tokens=4)

    Source: Zou et al. 2023, arXiv:2310.01405, section 3.2.
    """

    directions: tuple[Direction, ...] | Any

    def __post_init__(self) -> None:
        given = self.directions
        given = list(given.values()) if isinstance(given, Mapping) else given
        given = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else given
        found = sorted(as_directions("directions", given), key=lambda each: each.site.layer)
        if not found:
            raise UsageError("a profile of no directions steers nothing; give em.Profile one direction a layer")
        streams = sorted({each.site.stream for each in found})
        if len(streams) > 1:
            raise UsageError(
                f"these directions are of the streams {', '.join(streams)}, so a layer names no single place; give "
                "em.Profile(directions) those of one stream"
            )
        layers = [each.site.layer for each in found]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise UsageError(
                f"layer {twice[0]} has {layers.count(twice[0])} directions, so it is unclear which one is meant; give "
                "em.Profile(directions) those of one position"
            )
        widths = sorted({len(each.vector) for each in found})
        if len(widths) > 1:
            raise WidthError(
                f"these directions are {' and '.join(map(str, widths))} wide, so they are of different models; give "
                "em.Profile(directions) those of one model"
            )
        object.__setattr__(self, "directions", tuple(found))

    @overload
    def __getitem__(self, layer: int) -> Direction: ...
    @overload
    def __getitem__(self, layer: slice) -> Profile: ...
    def __getitem__(self, layer: Any) -> Any:
        if isinstance(layer, slice):
            start, stop = layer.start or 0, self.layers[-1] + 1 if layer.stop is None else layer.stop
            found = [each for each in self.directions if each.site.layer in range(start, stop, layer.step or 1)]
            if not found or min(start, stop) < 0:
                raise UsageError(
                    f"[{start}:{stop}] is no part of the layers {_listed(self.layers)}, which are counted from 0, so "
                    "nothing would be steered; give numbers of layers, as in em.Profile(directions)[10:20]"
                )
            return Profile(found)
        return next((each for each in self.directions if each.site.layer == layer), None) or self._none(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.directions)

    def _none(self, layer: Any) -> Direction:
        raise KeyError(f"the profile has no direction in layer {layer!r}; it has some in {_listed(self.layers)}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(each.site.layer for each in self.directions)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, in the order of the layers."""
        return tuple(each.site for each in self.directions)

    @property
    def stream(self) -> Stream:
        """The stream of all its sites."""
        return self.directions[0].site.stream

    @property
    def width(self) -> int:
        """d_model."""
        return len(self.directions[0].vector)

    @property
    def name(self) -> str | None:
        """The name of its directions, if they have one name."""
        names = {each.name for each in self.directions}
        return names.pop() if len(names) == 1 else None

    @checked()
    def renamed(self, name: str) -> Profile:
        """The same profile under another name."""
        return Profile([each.renamed(name) for each in self.directions])

    def unchecked(self) -> Profile:
        """The same profile without its provenance, so that it is accepted on any model of its width."""
        return Profile([each.unchecked() for each in self.directions])

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file.

        Raises:
            OutputError: the path cannot be written; nothing is left behind.
        """
        about = {"schema": PROFILE_SCHEMA, "directions": [record_of(each) for each in self.directions]}
        return save_tensors(path, {f"layer.{each.site.layer}": each.vector for each in self.directions}, about)

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote.  Whether it fits a model is checked when it meets one.

        Raises:
            CorruptFileError: missing, truncated, or not a profile's file.
        """

        def made(tensors: dict[str, Tensor], about: dict[str, Any]) -> Profile:
            found = cls([from_record(tensors[f"layer.{each['layer']}"], each) for each in about["directions"]])
            if len(found) != len(tensors):
                raise ValueError(f"{len(tensors)} vectors for {len(found)} layers")
            return found

        damage = "a damaged vector would steer somewhere else: write it again with profile.save(path)"
        return load_tensors(path, PROFILE_SCHEMA, made, damage=damage)

    def to_pandas(self) -> pd.DataFrame:
        """A row a layer: layer, stream, position, length, split-half reliability."""
        return pd.DataFrame(
            {
                "layer": each.site.layer, "stream": each.site.stream, "position": str(each.position),
                "length": each.norm, "reliability": None if each.reliability is None else each.reliability.value,
            }
            for each in self.directions
        )  # fmt: skip

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.listed(self, repr(self), self.to_pandas())

    def __repr__(self) -> str:
        method = (self.directions[0].method or "unnamed").replace("_", " ")
        layers = f"layer{'s' * (len(self) > 1)} {_listed(self.layers)}"
        return showable(f"Profile({self.name or method}, {self.stream} at {layers}, d_model={self.width})")


def _listed(layers: tuple[int, ...]) -> str:
    """Numbers in as few words as there are runs.

    Example:
        >>> _listed((0, 1, 2, 5))
        '0-2, 5'
    """
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def as_directed(name: str, value: Any) -> Direction | Profile:
    """A direction, or a profile of them.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, Direction | Profile):
        return value
    raise UsageError(
        f"{name}={type(value).__name__} is no Direction and no Profile, so it is unknown where it acts. Give {name} "
        "em.Direction(vector, em.Site(layer)), one that em.difference_in_means found, or em.Profile(directions)."
    )


def direction_at(directed: Direction | Profile, name: str | None) -> Direction:
    """The direction along which is edited at a hook point.

    Raises:
        UsageError: a profile has none there, or the point was not named.
    """
    if isinstance(directed, Direction):
        return directed
    found = next((each for each in directed.directions if each.site.hook_name == name), None)
    if found is None:
        raise UsageError(
            f"{directed!r} has no direction at {name!r}, so it is unknown along which to edit. Edit at its own hook "
            "points, which em.intervene(model, em.Add(profile)) finds, or with name= one of them."
        )
    return found


def check_all_fit(directed: Direction | Profile, model: LensModel) -> None:
    """Raise unless every direction belongs on this model, as ``check_fits`` has it."""
    for each in [directed] if isinstance(directed, Direction) else directed.directions:
        check_fits(each, model)
