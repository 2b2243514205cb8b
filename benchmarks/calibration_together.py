"""Prompts that belong together and of which nobody has said so: rows of ``calibration.py``.

    base     clusters of six that share half of their variance (or pairs across the classes, or every prompt four times)
    tuned    what was planted + a shift along the direction that differs between prompts, half of it with the cluster

Cases are made as in ``calibration_verdicts``, and their groups are found as ``compare`` finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from calibration_intervals import Row as IntervalRow
from calibration_verdicts import (
    CHANGES,
    GAP,
    Plant,
    Row,
    World,
    cases,
    grouped,
    nothing,
    sentences,
    shifted,
    widened,
    words,
)

from tl_em.claims.claim import Case, Reading
from tl_em.claims.questions.level import Level
from tl_em.errors import NoGapError
from tl_em.models.contrasts import ContrastSet
from tl_em.presets.latent_guard import _judged

if TYPE_CHECKING:
    from calibration_intervals import Drawn

SPREAD, COPIES = 0.4, 4
"""Gaps by which the planted shift differs between prompts; times that every prompt stands there."""
SIX, SIZE = World(n=48, paraphrases=6, told=False), "48 and 48"


def unevenly(planted: Plant, cluster: int = 6) -> Plant:
    """What is planted, and a shift along the direction that prompts of a cluster share half of the variance of."""

    def plant(x: np.ndarray, unit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shared = np.repeat(rng.standard_normal(-(-len(x) // cluster)), cluster)[: len(x)]
        shift = SPREAD * np.sqrt(0.5) * (shared + rng.standard_normal(len(x)))
        return planted(x, unit, rng) + GAP * shift[:, None] * unit

    return plant


def copied(case: Case) -> Case:
    """The case with every prompt several times."""

    def again(read: Reading) -> Reading:
        return Reading(np.repeat(read.positive, COPIES, axis=0), np.repeat(read.negative, COPIES, axis=0))

    base, texts = again(case.base), [[p for p in side for _ in range(COPIES)]
                                     for side in (case.contrast.positive, case.contrast.negative)]  # fmt: skip
    contrast = grouped(ContrastSet(texts[0], texts[1]), base)
    return replace(case, contrast=contrast, base=base, tuned=again(case.tuned))


def six(rng: np.random.Generator, seed: int, planted: Plant, **how: Any) -> list[Case]:
    """Clusters of six, in the activations and in what changes."""
    return cases(rng, seed, SIX, unevenly(planted), **how)


def four_times(rng: np.random.Generator, seed: int, planted: Plant, **how: Any) -> list[Case]:
    """Eight prompts a class, every one four times."""
    return [copied(case) for case in cases(rng, seed, World(n=8), unevenly(planted, 1), **how)]


def alone(rng: np.random.Generator, seed: int, planted: Plant, **how: Any) -> list[Case]:
    """Prompts that have nothing in common."""
    return cases(rng, seed, World(), unevenly(planted, 1), **how)


Made = Callable[..., list[Case]]
WORLDS: dict[str, tuple[Made, str]] = {
    "clusters of six move together, not named": (six, SIZE),
    "every prompt four times": (four_times, "32 and 32"),
    "independent prompts that move unevenly": (alone, "32 and 32"),
}


def verdict_rows() -> Iterator[Row]:
    """Words where nothing was planted, at the edge, and at half a gap."""
    every = {"level": "false", "separation": "false", "rotation": "false"}
    plants = {
        "nothing changed": (nothing, every),
        "at the edge, .10 gaps": (shifted(0.1), {"level": "false"}),
        "at the edge, .10 gaps apart": (widened(0.1), {"separation": "false"}),
        "half a gap": (shifted(0.5), {"level": "power"}),
    }
    for name, (made, size) in WORLDS.items():
        for said, (plant, expected) in plants.items():
            asked = [question for question in CHANGES if question.name in expected]

            def draw(
                rng: np.random.Generator, seed: int, made: Made = made, plant: Plant = plant, asked: Any = asked
            ) -> dict[str, bool]:
                return words(made(rng, seed, plant), asked)

            yield Row(f"{said}; {name}", size, expected, draw)
    yield Row("a guard that knows nothing; clusters of six, not named", SIZE, {"guard": "false"}, guarded)


def guarded(rng: np.random.Generator, seed: int) -> dict[str, bool]:
    """Scores along a random direction of clusters of six, of which no label was known."""
    base = Reading(*(SIX.noise(rng, SIX.n) for _ in range(2)))
    texts = [sentences(f"{side} {seed}", SIX.n) for side in ("positive", "negative")]
    contrast = grouped(ContrastSet(texts[0], texts[1]), base)
    labels = contrast.positive_groups, contrast.negative_groups
    groups = None if labels[0] is None or labels[1] is None else (list(labels[0]), list(labels[1]))
    scores = base.project(rng.standard_normal(base.positive.shape[1]))
    return {"guard": _judged([scores.positive, scores.negative], groups, 199, seed).p["auroc"] < 0.05}


def interval_rows() -> Iterator[IntervalRow]:
    """The interval of *level*, in own gaps."""
    for name, (made, size) in WORLDS.items():
        for by in (0.0, 0.25):

            def draw(rng: np.random.Generator, seed: int, made: Made = made, by: float = by) -> Drawn:
                while True:  # a sample without a gap of its own is not measured, by an audit either
                    (case,) = made(rng, seed, shifted(by), directions=1)
                    with suppress(NoGapError):
                        found = Level().measure(case).effect
                        return found.estimate, found.p

            yield IntervalRow(f"level moved by {by:g} gaps, {name}", size, by, draw, null=by == 0)
