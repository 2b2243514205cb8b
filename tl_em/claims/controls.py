"""What stands beside a treatment: random directions, and random latents, that are treated the same.

    directions   of the pooled within-class covariance at the direction's own site, each as long as the direction
    latents      distance(i, j) = (log density_i - log density_j)^2 + (log |d_i| - log |d_j|)^2, in standard deviations

Isotropic noise in a wide space points where activations never vary, so it would do little and prove less
(``directions.geometry``).  Each latent is stood for by one of its nearest ``NEAREST`` (or as many as there are
placebos), drawn without replacement: dense latents change much whatever they mean, and rare ones nothing. How well they
match is printed beside every result (``match``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries.dictionary import Dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.geometry import control_directions
from tl_em.directions.profile import Profile
from tl_em.errors import PositionError, UsageError
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, Site
from tl_em.models.stream import capture, sites_at_once

NEAREST = 32
"""Latents that may stand for one, where as many as that are not needed."""
_NEVER = 1e-6
"""Density that a latent which was never on is given, so that it has a logarithm."""


def random_directions(
    model: LensModel,
    direction: Direction,
    drawn_from: ContrastSet | Sequence[Prompt | EncodedPrompt],
    *,
    count: int,
    seed: int = 0,
) -> list[Direction]:
    """Random directions in place of one, at its site and as long as it is.

    Args:
        model: whose activations are read: at the direction's site and position, or at the prompt's end where prompts
            have no such token.
        direction: what they stand beside.
        drawn_from: a contrast set, from whose within-class covariance they are drawn, or prompts of one class.
        count: how many.
        seed: seed of the draws.

    Raises:
        UsageError: the activations do not vary within the classes.
    """
    both = isinstance(drawn_from, ContrastSet)
    classes = (drawn_from.positive, drawn_from.negative) if both else (drawn_from, drawn_from)
    x = [activations_at(model, prompts, [direction.site], direction.position)[:, 0] for prompts in classes]
    return _random(direction, x[0], x[1], count, seed)


def random_profiles(
    model: LensModel,
    profile: Profile,
    drawn_from: ContrastSet | Sequence[Prompt | EncodedPrompt],
    *,
    count: int,
    seed: int = 0,
) -> list[Profile]:
    """Random profiles in place of one: at every layer the same mixture of the prompts' activations, as long as its own.

    A real profile's layers agree with each other, as the stream that they are read from does, so those of a random one
    do too. Arguments as of :func:`random_directions`; activations are read at the position of the first direction.
    """
    both = isinstance(drawn_from, ContrastSet)
    classes = (drawn_from.positive, drawn_from.negative) if both else (drawn_from, drawn_from)
    position = profile.directions[0].position
    read = _classes_in_turn(model, classes, profile.sites, position)
    rows = [_random(own, *each, count, seed) for own, each in zip(profile.directions, read, strict=True)]
    return [Profile(each) for each in zip(*rows, strict=True)]


def random_in_place(
    model: LensModel, directions: Sequence[Direction], drawn_from: ContrastSet, *, count: int, seed: int = 0
) -> list[list[Direction]]:
    """:func:`random_directions` in place of each of several, in as few passes for each position as may be held.

    Where activations do not vary within the classes (one token at the first layer), of the whole space.
    """
    found: dict[int, list[Direction]] = {}
    positions: dict[Any, None] = dict.fromkeys(each.position for each in directions)
    for position in positions:
        here = {i: each for i, each in enumerate(directions) if each.position == position}
        sites = [each.site for each in here.values()]
        read = _classes_in_turn(model, (drawn_from.positive, drawn_from.negative), sites, position)
        for (i, own), each in zip(here.items(), read, strict=True):
            found[i] = _random(own, *each, count, [seed, i])
    return [found[i] for i in range(len(directions))]


def _classes_in_turn(
    model: LensModel, classes: Sequence[Any], sites: Sequence[Site], position: Position
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both classes at one site after the other; where they do not vary, the axes of the whole space."""
    for some in sites_at_once(model, sites, sum(map(len, classes))):
        x = [activations_at(model, prompts, some, position) for prompts in classes]
        for s in range(len(some)):
            positive, negative = (each[:, s] for each in x)
            varied = max(np.ptp(each, axis=0).max() for each in (positive, negative)) > 0
            whole = np.eye(x[0].shape[-1])
            yield (positive, negative) if varied else (whole, whole)


def _random(own: Direction, positive: np.ndarray, negative: np.ndarray, count: int, seed: Any) -> list[Direction]:
    vectors = torch.from_numpy(control_directions(positive, negative, count=count, norm=own.norm, seed=seed)).float()
    return [replace(own, vector=vector, name="random", neutral=None) for vector in vectors]


def activations_at(
    model: LensModel, prompts: Sequence[Any], sites: Sequence[Site], position: Position
) -> Float[np.ndarray, "prompt site d_model"]:
    """Activations at a position, or at the prompt's end where prompts have no such token."""
    try:
        return capture(model, prompts, sites, position=position).double().numpy()
    except PositionError:
        return capture(model, prompts, sites, position="prompt_end").double().numpy()


def matched_sets(
    dictionary: Dictionary,
    indices: Sequence[int],
    density: Float[Tensor, " feature"],
    *,
    count: int,
    once: int | None = None,
    without: Sequence[int] = (),
    seed: int = 0,
) -> Int[np.ndarray, "placebo chosen"]:
    """Random sets of other latents, matched one by one on density and decoder norm.

    Args:
        dictionary: whose latents they are.
        indices: the latents to stand for.
        density: [feature] share of tokens at which each latent of the dictionary is on.
        count: number of sets.
        once: how many of them, from the first on, are drawn without any latent standing for the same one twice; all by
            default. The others are dealt anew from the same nearest latents.
        without: other latents that may not stand for any.
        seed: seed of the draws.

    Returns:
        [count, len(indices)]: row p, column i stands for ``indices[i]``; no row holds one latent twice.

    Raises:
        UsageError: the dictionary is too small for that many.

    Example:
        >>> from tl_em.models.sites import Site
        >>> eye = torch.eye(64)
        >>> d = Dictionary(eye, torch.zeros(64), eye, torch.zeros(64), activation="relu", site_in=Site(1))
        >>> sets = matched_sets(d, [3, 4], torch.linspace(0.01, 0.9, 64), count=20)
        >>> sets.shape, bool(np.isin(sets, [3, 4]).any())
        ((20, 2), False)
    """
    others = np.setdiff1d(np.arange(dictionary.d_sae), np.asarray([*indices, *without]))
    apart = count if once is None else once
    if apart < 1 or len(others) < apart + len(indices):
        raise UsageError(
            f"{len(others)} other latents of {dictionary.label} cannot give {apart} placebos of {len(indices)} "
            "latents, so nothing would stand beside the effect; pass another number of placebos (at least 1; 20 are "
            "needed for p < .05), or take a larger dictionary"
        )
    places = _standardised(dictionary, density)
    rng, anew = np.random.default_rng(seed), np.random.default_rng([seed, len(indices)])
    sets = np.full((count, len(indices)), -1)
    for column, index in enumerate(indices):
        away = ((places[others] - places[index]) ** 2).sum(-1)
        near = others[np.argsort(away, kind="stable")]
        near = near[: max(NEAREST, apart + len(indices))]
        pool = list(rng.permutation(near))
        for row in sets:
            if all(each in row for each in pool):
                pool += anew.permutation(near).tolist()
            chosen = next(each for each in pool if each not in row)
            pool.remove(chosen)
            row[column] = chosen
    return sets


def match(
    dictionary: Dictionary,
    indices: Sequence[int],
    density: Float[Tensor, " feature"],
    sets: Int[np.ndarray, "placebo chosen"],
) -> dict[str, float]:
    """Mean density and decoder norm of the latents and of those that stand for them."""
    norms, means = dictionary.W_dec.norm(dim=-1).cpu(), {}
    for name, values in (("density", density), ("decoder norm", norms)):
        means |= {name: float(values[list(indices)].mean()), f"{name} of placebos": float(values[sets].mean())}
    return means


def _standardised(dictionary: Dictionary, density: Float[Tensor, " feature"]) -> Float[np.ndarray, "feature 2"]:
    norms = dictionary.W_dec.norm(dim=-1).cpu().double().clamp_min(_NEVER)
    logs = torch.stack([density.double().cpu().clamp_min(_NEVER), norms], dim=-1).log().numpy()
    spread = logs.std(0)
    return logs / np.where(spread > 1e-9, spread, 1.0)
