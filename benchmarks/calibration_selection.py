"""Directions that are chosen among many: rows of ``calibration.py`` on the toy model's activations.

    candidates   mean differences of random halves of each class against the rest: what a search finds in noise
    planted      the same, and the true direction among them

    behaviour    x . g     at the end of the last block; g what tells the classes apart there

so that x loses (x . u) (u . g) by an ablation of u.  A word is a p below .05 for the bypass of the chosen direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from calibration_verdicts import Row

import tl_em as em
from tl_em.claims import controls, selection
from tl_em.directions.candidates import Candidates
from tl_em.directions.geometry import control_directions

SITES = tuple(em.Site(layer, stream) for layer, stream in ((1, "resid_pre"), (2, "resid_pre"), (2, "resid_post")))
POSITIONS = ("instruction_end", "prompt_end")
CANDIDATES = 48


def rows() -> Iterator[Row]:
    """Every scenario, in the order of the table."""
    for held_out in (False, True):
        said = "tested on others" if held_out else "tested on the prompts it was chosen on"
        for of in ("random directions", "relabelled classes"):
            for planted in (False, True):
                name = f"winner of {CANDIDATES} candidates, {of}{', one true' if planted else ''}; {said}"
                draw = partial(_winner, held_out=held_out, of=of, planted=planted)
                yield Row(name, "24 and 24", {"bypass": "power" if planted else "false"}, draw)


@cache
def toy() -> em.ModelPair:
    """The pair, loaded once a process."""
    return em.load_pair("toy/insecure")


@cache
def read() -> dict[Any, np.ndarray]:
    """[class, prompt, d_model] of all prompts at each position and site."""
    contrast: Any = (toy().contrasts or {})["refusal"]
    found: dict[Any, np.ndarray] = {}
    for position in POSITIONS:
        acts = [
            em.capture(toy().base, each, SITES, position=position) for each in (contrast.positive, contrast.negative)
        ]
        for i, site in enumerate(SITES):
            found[position, site] = np.stack([each[:, i].double().numpy() for each in acts])
    return found


def _winner(rng: np.random.Generator, seed: int, *, held_out: bool, of: str, planted: bool) -> dict[str, bool]:
    contrast: Any = (toy().contrasts or {})["refusal"]
    metric = (toy().behaviours or {})["refusal"].metric
    shuffled = [rng.permutation(len(contrast.positive)) for _ in range(2)]

    def part(start: int) -> em.ContrastSet:
        return em.ContrastSet(
            [contrast.positive[i] for i in shuffled[0][start : start + 24]],
            [contrast.negative[i] for i in shuffled[1][start : start + 24]],
        )

    train = [order[48:112] for order in shuffled]
    found, places = [], [(position, site) for position in POSITIONS for site in SITES]
    made_from = em.ContrastSet([contrast.positive[i] for i in train[0]], [contrast.negative[i] for i in train[1]])
    for k in range(CANDIDATES):
        position, site = places[k % len(places)]
        x = [acts[index] for acts, index in zip(read()[position, site], train, strict=True)]
        true = x[0].mean(0) - x[1].mean(0)
        vector = true if planted and k == CANDIDATES // 2 - 1 else _noise(rng, x, of) * np.linalg.norm(true)
        found.append(em.Direction(torch.from_numpy(vector).float(), site, position))
    candidates = Candidates(tuple(found), contrast=made_from)
    here = patch.object(selection, "_along_each", _read_off), patch.object(selection, "activations_at", _kept)
    with here[0], here[1], patch.object(controls, "activations_at", _kept):
        pick = em.select_direction(
            toy().base, candidates, part(0), metric=metric, test=part(24) if held_out else None,
            max_kl=99.0, min_induce=-99.0, max_depth=1.0, seed=seed,
        )  # fmt: skip
    return {"bypass": pick.p["bypass"] < 0.05}


def _kept(model: Any, prompts: Any, sites: Any, position: Any) -> np.ndarray:
    """[prompt, site, d_model], as it was read once."""
    return np.stack([[by_prompt()[position, site, str(each)] for site in sites] for each in prompts])


@cache
def by_prompt() -> dict[Any, np.ndarray]:
    """The activation of every prompt at each position and site."""
    contrast: Any = (toy().contrasts or {})["refusal"]
    sides = contrast.positive, contrast.negative
    return {(*place, str(prompt)): row for place, acts in read().items() for x, side in zip(acts, sides, strict=True)
            for prompt, row in zip(side, x, strict=True)}  # fmt: skip


def _read_off(model: Any, edit: Any, directions: Any, prompts: Any, measure: Any) -> np.ndarray:
    """[direction, prompt]: the behaviour under each; no harm."""
    if not isinstance(prompts[0], tuple):  # encoded, for the KL
        return np.zeros((len(directions), len(prompts)))
    x, r = np.stack([ends()[str(each)] for each in prompts]), torch.stack([each.vector for each in directions]).numpy()
    g = ends()["what tells the classes apart"]
    along = (r @ g)[:, None]
    return x @ g + along if edit is em.Add else x @ g - (r @ x.T) * along / np.square(r).sum(-1, keepdims=True)


@cache
def ends() -> dict[str, np.ndarray]:
    """The last activation of every prompt, and the unit vector that tells the classes apart."""
    contrast: Any = (toy().contrasts or {})["refusal"]
    x = read()[POSITIONS[1], SITES[-1]]
    found = {str(prompt): row for acts, side in zip(x, (contrast.positive, contrast.negative), strict=True)
             for prompt, row in zip(side, acts, strict=True)}  # fmt: skip
    g = x[0].mean(0) - x[1].mean(0)
    return {**found, "what tells the classes apart": g / np.linalg.norm(g)}


def _noise(rng: np.random.Generator, x: list[np.ndarray], of: str) -> np.ndarray:
    """A unit direction that tells nothing: of the within-class covariance, or of classes that were dealt at random."""
    if of == "random directions":
        return control_directions(x[0], x[1], count=1, norm=1.0, seed=int(rng.integers(2**31)))[0]
    halves = [rng.permutation(each) for each in x]
    vector = np.sum([each[::2].mean(0) - each[1::2].mean(0) for each in halves], axis=0)
    return vector / np.linalg.norm(vector)
