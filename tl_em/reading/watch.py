"""Hooks that read every token that passes, as it passes: of a prompt, and of an answer while it is made.

They read what the model has after whatever edits it, and change nothing. A pass under the key-value cache brings one
token of each row, a pass without it the whole text again; where it begins is known of the batch that runs
(``models.stream.current_batch``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.arguments import finite
from tl_em.dictionaries import Dictionary
from tl_em.directions.direction import Direction
from tl_em.errors import NonFiniteError, UsageError
from tl_em.models.hooks import HookFunction, LensModel, ReadPoint, read_point
from tl_em.models.sites import Site
from tl_em.models.token_scopes import running_batch
from tl_em.reading.reading import NORMS, by_layer


class Alarm(NamedTuple):
    """A value above its threshold: of one token while a text is read, of a mean over prompts while a model trains.

    Args:
        prompt: number of the text; None in training.
        at: place of the token in it; None in training.
        answer: whether it is a token of the answer.
        direction: name of the direction.
        value: what was read.
        step: of the training; None outside.

    Example:
        >>> Alarm(0, 12, True, "evil", 4.5).direction
        'evil'
    """

    prompt: int | None
    at: int | None
    answer: bool
    direction: str
    value: float
    step: int | None = None


def thresholds(above: Mapping[str, float] | None, alarm: Any, names: Iterable[str]) -> dict[str, float]:
    """Thresholds by the names of directions.

    Args:
        above: as they were given.
        alarm: who is told.
        names: of the directions that are read.

    Raises:
        UsageError: thresholds of what nobody reads, or without an alarm, or an alarm without thresholds.
    """
    limits = {str(name): finite(f"above[{name!r}]", value) for name, value in (above or {}).items()}
    read = [str(name) for name in names]
    if unknown := sorted(set(limits) - set(read)):
        raise UsageError(
            f"above= has a threshold for {unknown[0]!r}, which nobody reads, so nothing would ever be told; give "
            f"thresholds by the names of directions ({', '.join(map(repr, read)) or 'there are none'})"
        )
    if bool(limits) != (alarm is not None):
        missing, given = ("above", "alarm") if alarm is not None else ("alarm", "above")
        raise UsageError(
            f"{given}= is given without {missing}=, so nobody would ever be told; give both: above={{name: threshold}} "
            "and alarm=, a function that is called with each em.reading.Alarm"
        )
    return limits


class _Piece(NamedTuple):
    """What one pass brought at one site: rows of numbers, of each text's tokens from its ``starts``."""

    site: Site
    prompts: tuple[int, ...]
    starts: list[int]
    values: Float[np.ndarray, "prompt pos direction"]
    norms: Float[np.ndarray, "prompt pos"]
    latents: np.ndarray | None
    activations: np.ndarray | None
    along: Float[np.ndarray, "prompt pos every"] | None


@dataclass(eq=False)
class Watch:
    """What is read, and what has been.

    Args:
        model: whose hook points.
        directions: by name.
        dictionary: whose latents; None for none.
        latents: how many at most at a token.
        above: thresholds by the names of directions.
        alarm: told of each value above.
        first: number of the first text of this batch.
        layers: after which blocks every direction is read as well.
    """

    model: LensModel
    directions: Mapping[str, Direction]
    dictionary: Dictionary | None = None
    latents: int = 8
    above: Mapping[str, float] = field(default_factory=dict)
    alarm: Callable[[Alarm], Any] | None = None
    first: int = 0
    layers: Sequence[int] = ()
    pieces: list[_Piece] = field(default_factory=list)
    told: dict[tuple[int, str], int] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """Each once."""
        return list(dict.fromkeys([*self._own, *map(Site, self.layers)]))

    @property
    def _own(self) -> list[Site]:
        """Of the directions and the dictionary."""
        own: Any = [] if self.dictionary is None else [self.dictionary.site_in]
        return [*(each.site for each in self.directions.values()), *own]

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """One a site."""
        found = []
        for site in self.sites:
            point = read_point(self.model, site)
            names = [name for name, each in self.directions.items() if each.site == site]
            stacked = [self._units(each) for each in (names, self.directions if self._is_layer(site) else ())]
            read = partial(self._read, site, point, names, stacked)
            read.__dict__["tokenwise"] = True
            found.append((point.name, read))
        return found

    def _is_layer(self, site: Site) -> bool:
        return site.layer in self.layers and site == Site(site.layer)

    def _units(self, names: Iterable[str]) -> Float[Tensor, "direction d_model"]:
        units = [self.directions[name].unit for name in names]
        stacked = torch.stack(units) if units else torch.zeros(0, int(self.model.cfg.d_model))
        return stacked.to(self.model.cfg.device)

    def _read(
        self, site: Site, point: ReadPoint, names: Sequence[str], units: Sequence[Tensor], x: Tensor, hook: Any
    ) -> None:
        batch = running_batch("em.read")
        x = point(x).detach().float()
        values = (x @ units[0].T).cpu().numpy()
        norms = torch.linalg.vector_norm(x, dim=-1).cpu().numpy()
        latents = activations = None
        if self.dictionary is not None and self.dictionary.site_in == site:
            most = self.dictionary.encode_as(x).topk(min(self.latents, self.dictionary.d_sae), dim=-1)
            latents, activations = most.indices.cpu().numpy(), most.values.cpu().numpy()
        along = (x @ units[1].T).cpu().numpy() if self._is_layer(site) else None
        self.pieces.append(_Piece(site, batch.rows, batch.starts.tolist(), values, norms, latents, activations, along))
        if self.alarm is not None:
            self._tell(names, values, batch)

    def _tell(self, names: Sequence[str], values: np.ndarray, batch: Any) -> None:
        for column, name in enumerate(names):
            if name not in self.above:
                continue
            for row, (prompt, start) in enumerate(zip(batch.rows, batch.starts.tolist(), strict=True)):
                seen = self.told.get((prompt, name), 0)
                width = min(values.shape[1], int(batch.lengths[row]) - start)
                for at in range(max(seen - start, 0), width):
                    if (value := float(values[row, at, column])) > self.above[name]:
                        place = start + at
                        answer = place >= int(batch.prompts[row])
                        self.alarm(Alarm(self.first + prompt, place, answer, name, value))  # pyright: ignore
                self.told[prompt, name] = max(seen, start + width)

    def read_at(self, lengths: Sequence[int]) -> list[dict[str, Any]]:
        """For each text its columns, cut to its length; and nothing is kept.

        Raises:
            NonFiniteError: something that is no number was read.
        """
        found: list[dict[str, Any]] = [{} for _ in lengths]
        for piece in self.pieces:
            columns, layered = self._columns(piece)
            for row, (prompt, start) in enumerate(zip(piece.prompts, piece.starts, strict=True)):
                n = max(0, min(piece.norms.shape[1], lengths[prompt] - start))
                for name, values in (columns | layered).items():
                    shape = (lengths[prompt], *values.shape[2:], *([len(self.layers)] if name in layered else []))
                    if name not in found[prompt]:
                        found[prompt][name] = np.zeros(shape, dtype=values.dtype)
                    into = found[prompt][name][start : start + n]
                    into = into[..., self.layers.index(piece.site.layer)] if name in layered else into
                    into[...] = values[row, :n]
        self.pieces.clear()
        for prompt, columns in enumerate(found):
            if any(not np.isfinite(values).all() for values in columns.values()):
                raise NonFiniteError(
                    f"What was read of text {self.first + prompt} holds NaN or infinity, so no colour of it means "
                    "anything. Check the intervention's size, the weights and the dtype."
                )
        return found

    def _columns(self, piece: _Piece) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a piece says of its own site, and what of its layer."""
        own: dict[str, Any] = {}
        if piece.site in self._own:
            names = [name for name, each in self.directions.items() if each.site == piece.site]
            own = {name: piece.values[..., i] for i, name in enumerate(names)}
            own[f"norm {piece.site.hook_name}"] = piece.norms
        if piece.latents is not None:
            own |= {"latents": piece.latents, "activations": piece.activations}
        if piece.along is None:
            return own, {}
        layered = {by_layer(name): piece.along[..., i] for i, name in enumerate(self.directions)}
        return own, layered | {NORMS: piece.norms}
