"""Fine-tunes that drift, with several benign ones beside them: rows of ``calibration.py``, asked as in ``compare``.

    tuned, benign   the base's activations + a drift of their own + what was planted (tuned only) + jitter of .05 g

*Elsewhere*: a random shift of the whole model, of so many gaps.  *Along*: a normal amount along the very direction, of
so many gaps' standard deviation, as where a fine-tune unlearns what the direction stands for: random directions see
nothing of it.  *Apart*: the same, but the classes move against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from calibration_verdicts import CHANGES, GAP, Plant, Row, World, away, cases, nothing, shifted, widened, words

from tl_em.claims.claim import Case, Reading

FALSE = {"level": "false", "separation": "false", "rotation": "false"}


@dataclass(frozen=True)
class Drift:
    """How fine-tunes differ, in gaps.

    Args:
        elsewhere: length of the whole model's shift.
        of: where that points: ``"sphere"`` or the prompts' ``"covariance"``.
        along, apart: standard deviations along the direction, of both classes, and of the one against the other.
        common: length of a shift that all fine-tunes share.
    """

    elsewhere: float = 0.0
    of: str = "sphere"
    along: float = 0.0
    apart: float = 0.0
    common: float = 0.0

    def of_model(self, rng: np.random.Generator, world: World, times: float = 1.0) -> np.ndarray:
        """One model's shift, the same for every direction that it is asked about."""
        return away(rng, world, times * self.elsewhere, self.of)

    def on(self, rng: np.random.Generator, case: Case, of: Reading, moved: np.ndarray) -> Reading:
        """Activations of one fine-tune, drifted."""
        both = moved + self.along * GAP * rng.standard_normal() * case.unit
        gap = self.apart * GAP * rng.standard_normal() * case.unit / 2
        return Reading(of.positive + both + gap, of.negative + both - gap)


def drifted(
    rng: np.random.Generator, seed: int, world: World, plant: Plant, drift: Drift, *, benign: int, tuned: int = 1,
    times: float = 1.0,
) -> list[Case]:  # fmt: skip
    """Two directions, asked of ``tuned`` fine-tunes beside ``benign`` ones that drift 1 / ``times`` as far."""
    found = cases(rng, seed, world, plant)
    common = away(rng, world, drift.common, "sphere")
    own = [common + drift.of_model(rng, world, times) for _ in range(tuned)]
    harmless = [common + drift.of_model(rng, world) for _ in range(benign)]

    def jittered(of: Reading) -> Reading:
        return Reading(*(x + 0.05 * GAP * rng.standard_normal(x.shape) for x in (of.positive, of.negative)))

    def beside(case: Case) -> Case:
        first, *more = (drift.on(rng, case, jittered(case.tuned), moved) for moved in own)
        others = tuple(drift.on(rng, case, jittered(case.base), moved) for moved in harmless)
        return replace(case, tuned=first, replicates=tuple(more), benign=others)

    return [beside(case) for case in found]


def rows() -> Iterator[Row]:
    """Every scenario, with 1, 2, 3, 5 and 8 benign fine-tunes."""

    def row(
        name: str, m: int, drift: Drift, plant: Plant = nothing, expected: Mapping[str, str] = FALSE,
        world: World | None = None, **how: Any,
    ) -> Row:  # fmt: skip
        asked = [q for q in CHANGES if q.name in expected]

        def draw(rng: np.random.Generator, seed: int) -> dict[str, bool]:
            return words(drifted(rng, seed, world or World(), plant, drift, benign=m, **how), asked)

        return Row(name, f"{m} benign", expected, draw)

    power, edge = {"level": "power"}, {"level": "false"}
    still, massive, decay = Drift(), World(spectrum="massive"), World(spectrum="power")
    for m in (1, 2, 3, 5):
        yield row("fine-tunes drift by 1 gap elsewhere", m, Drift(elsewhere=1.0))
        yield row("fine-tunes drift along by .25 gaps, apart by .25", m, Drift(along=0.25, apart=0.25))
        yield row("fine-tunes do not drift; at the edge, .10 gaps", m, still, shifted(0.1), edge)
        yield row("fine-tunes drift along by .1 gaps; at the edge", m, Drift(along=0.1), shifted(0.1), edge)
        yield row("fine-tunes do not drift; half a gap", m, still, shifted(0.5), power)
    for m in (3, 5, 8):
        for size in (1.0, 2.0):
            name = f"half a gap, and drift of {size:g} gaps elsewhere in all"
            yield row(name, m, Drift(elsewhere=size), shifted(0.5), power)
        covariance = Drift(elsewhere=1.0, of="covariance")
        yield row("half a gap, and drift of 1 gap (covariance, power law)", m, covariance, shifted(0.5), power, decay)
        yield row("half a gap, and drift of 2 gaps that all share", m, Drift(common=2.0), shifted(0.5), power)
        yield row("1 gap, and drift of 2 gaps elsewhere in all", m, Drift(elsewhere=2.0), shifted(1.0), power)
    for m in (3, 5):
        yield row("fine-tunes drift by 2 gaps (massive dimensions)", m, Drift(elsewhere=2.0), world=massive)
        yield row("fine-tunes drift by 1 gap (covariance, power law)", m, covariance, world=decay)
        yield row("tuned drifts twice as far as benign, 2 gaps elsewhere", m, Drift(elsewhere=1.0), times=2.0)
        yield row("tuned drifts three times as far, 3 gaps elsewhere", m, Drift(elsewhere=1.0), times=3.0)
        apart = {"separation": "power"}
        yield row("half a gap apart, drift of 1 gap elsewhere", m, Drift(elsewhere=1.0), widened(0.5), apart)
    for tuned in (2, 3):
        own = f"{tuned} tuned drift along by .1 gaps"
        yield row(f"{own}; at the edge", 3, Drift(along=0.1), shifted(0.1), edge, tuned=tuned)
        yield row(f"{own}; half a gap", 3, Drift(along=0.1), shifted(0.5), power, tuned=tuned)
    yield row("1 tuned drifts along by .1 gaps; half a gap", 3, Drift(along=0.1), shifted(0.5), power)
