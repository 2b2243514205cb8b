"""Fine-tunes that are planted, and the verdicts that the package gives them: the rows of ``calibration.py``.

    base    x_i = +- g/2 u + z_i            z of a spectrum, heavy-tailed or in clusters; u the direction
    tuned   x_i + what was planted + jitter of .05 g

Each direction has a contrast set of its own, and is extracted from as many other prompts.  Questions are measured and
judged as in ``compare``; behaviours, models and answers are stood for by numbers that are planted.  A word where the
truth is *nothing*, or where it lies at the edge of the smallest effect, is false; at half a gap it is power.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from calibration import share

from tl_em.claims.arms import Arm, Outcomes
from tl_em.claims.claim import Case, Question, Reading
from tl_em.claims.questions import entanglement as entanglement_file
from tl_em.claims.questions import use as use_file
from tl_em.claims.questions.entanglement import Entanglement
from tl_em.claims.questions.level import Level
from tl_em.claims.questions.rotation import Rotation
from tl_em.claims.questions.separation import Separation
from tl_em.claims.questions.use import Use
from tl_em.claims.rule import judge
from tl_em.directions.direction import Direction
from tl_em.errors import NoGapError
from tl_em.metrics import Behaviour
from tl_em.models.contrasts import ContrastSet
from tl_em.models.sites import Site

WIDTH, GAP = 64, 4.0
NOBODY: Any = SimpleNamespace()
"""Stands where a model or a pair is never asked."""
CHANGES: tuple[Question, ...] = (Level(), Separation(), Rotation())


@dataclass(frozen=True)
class Row:
    """One scenario.

    Args:
        name: what is planted.
        size: the sample, in words.
        expected: for each verdict that is looked at, ``"false"`` or ``"power"``: what a word is.
        draw: plants it, and says for each of them whether a word was given.
    """

    name: str
    size: str
    expected: Mapping[str, str]
    draw: Callable[[np.random.Generator, int], dict[str, bool]]

    def lines(self, drawn: Sequence[Mapping[str, bool]]) -> list[str]:
        """Its rows of the table."""
        return [
            f"| {self.name} | {self.size} | {verdict} | {what} | {share([each[verdict] for each in drawn])} "
            f"| {len(drawn)} |"
            for verdict, what in self.expected.items()
        ]


def rows() -> list[Row]:
    """Every scenario, in the order of the table."""
    from calibration_fine_tunes import rows as of_fine_tunes
    from calibration_selection import rows as of_selection
    from calibration_together import verdict_rows

    return [
        *_changes(), *_many(), *_use(), *_entangled(), *of_selection(), *of_fine_tunes(), *verdict_rows(),
    ]  # fmt: skip


@dataclass(frozen=True)
class World:
    """Where the activations come from.

    Args:
        n: prompts a class.
        tails: of the within-class noise: degrees of freedom of Student's t; normal without.
        spectrum: standard deviations of the noise along each axis: ``"flat"``, ``"power"``, ``"massive"``, or
            ``"unused"``: next to nothing along the second half of the axes.
        paraphrases: prompts a question; they share half of their variance.
        told: whether the questions are named in the contrast set.
        shared: whether prompt i of both classes is one question, with half of its variance.
    """

    n: int = 32
    tails: float = 0.0
    spectrum: str = "flat"
    paraphrases: int = 1
    told: bool = True
    shared: bool = False

    def scale(self) -> np.ndarray:
        """Standard deviation of the noise along each axis."""
        if self.spectrum == "unused":
            return np.where(np.arange(WIDTH) < WIDTH // 2, 1.0, 0.01)
        if self.spectrum == "massive":
            return np.where(np.arange(WIDTH) < 3, 6.0, 1.0)
        return (1 + np.arange(WIDTH)) ** -0.5 * 3 if self.spectrum == "power" else np.ones(WIDTH)

    def noise(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """[prompt d] of unit scale times the spectrum."""

        def draw(size: int) -> np.ndarray:
            return rng.standard_t(self.tails, (size, WIDTH)) if self.tails else rng.standard_normal((size, WIDTH))

        if self.paraphrases == 1:
            return draw(n) * self.scale()
        shared = np.repeat(draw(-(-n // self.paraphrases)), self.paraphrases, axis=0)[:n]
        return np.sqrt(0.5) * (shared + draw(n)) * self.scale()

    def both(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The noise of either class."""
        if not self.shared:
            return [self.noise(rng, self.n), self.noise(rng, self.n)]
        question = self.noise(rng, self.n)
        return [np.sqrt(0.5) * (question + self.noise(rng, self.n)) for _ in range(2)]

    def groups(self, start: int) -> list[int] | None:
        """The questions of a class, where they are told."""
        if self.shared:
            return list(range(self.n))
        told = self.told and self.paraphrases > 1
        return [start + i // self.paraphrases for i in range(self.n)] if told else None


Plant = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""[prompt d] activations, the unit direction -> what they become."""


def nothing(x: np.ndarray, unit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same."""
    return x


def shifted(by: float) -> Plant:
    """Every prompt moved along the direction, in gaps."""
    return lambda x, unit, rng: x + by * GAP * unit


def widened(by: float) -> Plant:
    """The classes moved apart, in gaps."""
    return lambda x, unit, rng: x + by * GAP / 2 * unit * (1 if (x @ unit).mean() > 0 else -1)


def scaled(by: float) -> Plant:
    """The whole stream times a number."""
    return lambda x, unit, rng: by * x


def rotated(degrees: float) -> Plant:
    """What tells the classes apart turned by an angle, towards an axis that is the same for both."""
    angle = np.deg2rad(degrees)

    def turn(x: np.ndarray, unit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        other = np.roll(unit, 1) - unit * (np.roll(unit, 1) @ unit)
        side = 1 if (x @ unit).mean() > 0 else -1
        return x + side * GAP / 2 * ((np.cos(angle) - 1) * unit + np.sin(angle) * other / np.linalg.norm(other))

    return turn


def cases(
    rng: np.random.Generator, seed: int, world: World, plant: Plant, *, drift: float = 0.0, of: str = "sphere",
    benign: float | None = None, directions: int = 2,
) -> list[Case]:  # fmt: skip
    """What is asked about a pair: one case a direction, on prompts of its own; drifts are the model's, in gaps."""
    moved = away(rng, world, drift, of)
    harmless = None if benign is None else away(rng, world, benign, of)
    return [_case(rng, seed, world, plant, moved, harmless, f"direction {i}") for i in range(directions)]


def away(rng: np.random.Generator, world: World, size: float, of: str) -> np.ndarray:
    """A random shift of so many gaps: uniform on the sphere, of the spectrum's covariance, or where nothing varies."""
    v = rng.standard_normal(WIDTH)
    if of != "sphere":
        v *= world.scale() if of == "covariance" else world.scale() < 0.1
    return size * GAP * v / max(np.linalg.norm(v), 1e-9)


def _case(
    rng: np.random.Generator, seed: int, world: World, plant: Plant, moved: np.ndarray, harmless: np.ndarray | None,
    name: str,
) -> Case:  # fmt: skip
    unit = rng.standard_normal(WIDTH)
    unit[: 3 if world.spectrum == "massive" else 0] = 0
    unit /= np.linalg.norm(unit)
    sides = [side * GAP / 2 * unit for side in (1, -1)]
    extracted = np.subtract(*(side + world.noise(rng, world.n).mean(0) for side in sides))
    base = [side + noise for side, noise in zip(sides, world.both(rng), strict=True)]

    def tune(change: Plant, drift: np.ndarray) -> Reading:
        jitter = [0.05 * GAP * rng.standard_normal(x.shape) for x in base]
        return Reading(*(change(x, unit, rng) + drift + j for x, j in zip(base, jitter, strict=True)))

    texts = [sentences(f"{name} {side} {seed}", world.n) for side in ("positive", "negative")]
    contrast = ContrastSet(texts[0], texts[1], positive_groups=world.groups(0), negative_groups=world.groups(10_000))
    return Case(
        name, Direction(torch.from_numpy(extracted).float(), Site(1)), grouped(contrast, Reading(*base)), pair=NOBODY,
        base=Reading(*base), tuned=tune(plant, moved), benign=() if harmless is None else (tune(nothing, harmless),),
        n_controls=max(199, 20 * 20), seed=seed,
    )  # fmt: skip


def sentences(name: str, n: int) -> list[str]:
    """So many texts that have next to no word in common."""
    drawn = random.Random(name)
    return [" ".join(f"w{drawn.randrange(4000)}" for _ in range(8)) for _ in range(n)]


def grouped(contrast: ContrastSet, base: Reading) -> ContrastSet:
    """The set with the groups that ``compare`` finds where none are given."""
    find = getattr(contrast, "grouped", None)
    return contrast if find is None else find((base.positive, base.negative))


def words(asked: Sequence[Case], questions: Sequence[Question]) -> dict[str, bool]:
    """For each question, whether any direction got a word; *scaled* is what was planted, or nothing was."""
    measured = [case for case in asked if _separates(case)]
    findings = [found for q in questions for case in measured if (found := q.measure(case)) is not None]
    said = {(row.question, row.direction): row.verdict for row in judge(findings) if row.shown}
    return {q.name: any(of == q.name and word != "scaled" for (of, _), word in said.items()) for q in questions}


def _separates(case: Case) -> bool:
    """Whether anything can be asked about it, as in ``compare``."""
    try:
        return case.own_gap.value > 0
    except NoGapError:
        return False


def _changes() -> Iterator[Row]:
    """Level, separation and rotation."""
    every = {"level": "false", "separation": "false", "rotation": "false"}

    def row(
        name: str, world: World, plant: Plant = nothing, expected: Mapping[str, str] = every, size: str = "", **how: Any
    ) -> Row:
        asked = [q for q in CHANGES if q.name in expected]

        def draw(rng: np.random.Generator, seed: int) -> dict[str, bool]:
            return words(cases(rng, seed, world, plant, **how), asked)

        return Row(name, size or f"{world.n} and {world.n}", expected, draw)

    for n in (8, 16, 32, 128):
        yield row("nothing changed", World(n=n))
    shapes = {
        "heavy tails (t, 3)": World(tails=3), "power-law spectrum": World(spectrum="power"),
        "massive dimensions": World(spectrum="massive"), "unused subspace": World(spectrum="unused"),
        "clusters of six, named": World(n=48, paraphrases=6),
        "clusters of six, not named": World(n=48, paraphrases=6, told=False),
        "questions in both classes": World(shared=True),
    }  # fmt: skip
    for name, world in shapes.items():
        yield row(f"nothing changed; {name}", world)
    for name, world in {"independent prompts": World(), **shapes}.items():
        yield row(f"at the edge, .10 gaps; {name}", world, shifted(0.1), {"level": "false"})
        yield row(f"at the edge, .10 gaps apart; {name}", world, widened(0.1), {"separation": "false"})
        yield row(f"half a gap; {name}", world, shifted(0.5), {"level": "power"})
        yield row(f"half a gap apart; {name}", world, widened(0.5), {"separation": "power"})
    for world, said in ((World(), "independent prompts"), (World(shared=True), "questions in both classes")):
        yield row(f"turned by 25 degrees (.09); {said}", world, rotated(25), {"rotation": "false"})
        yield row(f"turned by 45 degrees; {said}", world, rotated(45), {"rotation": "power"})
        yield row(f"turned by 90 degrees; {said}", world, rotated(90), {"rotation": "power"})
    for size in (1.0, 2.0):
        for of in ("sphere", "covariance"):
            for name in ("flat", "power", "massive"):
                drift = {"drift": size, "of": of}
                said = f"drift of {size:g} gaps ({of}); {name} spectrum"
                yield row(said, World(spectrum=name), expected=every, **drift)
                yield row(f"{said}, a benign one with its own", World(spectrum=name), benign=size, **drift)
    for size in (1.0, 2.0):
        for of in ("sphere", "unused"):
            said = f"drift of {size:g} gaps ({of}); unused subspace"
            yield row(said, World(spectrum="unused"), drift=size, of=of)
    yield row("the stream times 1.3", World(), scaled(1.3))
    yield row("half a gap, and drift of 1 gap elsewhere", World(), shifted(0.5), {"level": "power"}, drift=1.0)


def _many() -> Iterator[Row]:
    for plant, verdict in ((shifted(0.1), "level"), (widened(0.1), "separation")):

        def draw(rng: np.random.Generator, seed: int, plant: Plant = plant, verdict: str = verdict) -> dict[str, bool]:
            return words(cases(rng, seed, World(), plant, directions=10), [q for q in CHANGES if q.name == verdict])

        yield Row(f"ten directions at the edge of {verdict}", "32 and 32", {verdict: "false"}, draw)


@dataclass(frozen=True, eq=False)
class PlantedArm(Arm):
    """An arm whose numbers are planted: what is measured untreated, under the treatment, and under each control."""

    before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    effect: np.ndarray = field(default_factory=lambda: np.zeros(0))
    control: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    given: list[int] = field(default_factory=list)

    @cached_property
    def untreated(self) -> Outcomes:
        """The planted numbers."""
        return {"bad": self.before}

    def treated(self, intervention: Any, only: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The planted numbers under the treatment."""
        return {"bad": self.before + self.sign * self.effect}

    def along(self, template: Any, vectors: Any, outcome: str, sites: Any = ()) -> np.ndarray:
        """The planted numbers under as many further controls as are asked for."""
        start = sum(self.given)
        self.given.append(len(vectors))
        return self.before[None] + self.sign * self.control[start : start + len(vectors)]

    def some(self, index: np.ndarray) -> PlantedArm:
        """Some of the prompts."""
        i = np.asarray(index)
        return replace(
            self, prompts=[self.prompts[k] for k in i], groups=None, before=self.before[i], effect=self.effect[i],
            control=self.control[:, i], given=[],
        )  # fmt: skip


def _planted(model: Any, prompts: Sequence[Any]) -> torch.Tensor:
    """Stands for a metric; never called."""
    raise AssertionError


PLANTED: Any = _planted
PLANTED.name, PLANTED.unit = "behaviour", "log-odds"


def planted_arm(
    rng: np.random.Generator, seed: int, name: str, sign: int, n: int, own: float, generic: float, spread: float,
    controls: int,
) -> PlantedArm:  # fmt: skip
    """Prompts whose behaviour the direction changes by ``own``, and any direction by ``generic``.

    Each prompt answers any push by its own amount (``spread``); each direction has its own strength (a tenth of it).
    """
    easy = generic + spread * rng.standard_normal(n)
    strength = 1 + 0.1 * rng.standard_normal((controls, 1))
    control = easy[None] * strength + 0.1 * rng.standard_normal((controls, n))
    effect = own + easy * (1 + 0.1 * rng.standard_normal()) + 0.1 * rng.standard_normal(n)
    return PlantedArm(
        name, NOBODY, [f"prompt {i}" for i in range(n)], None, {"bad": PLANTED}, sign=sign, seed=seed,
        before=rng.standard_normal(n), effect=effect, control=control,
    )  # fmt: skip


def _use() -> Iterator[Row]:
    plants = {
        "nothing": ((0.0, 0.0), (0.0, 0.0)),
        "any direction added does +2, ablation specific (+.8)": ((0.8, 0.0), (0.0, 2.0)),
        "any direction ablated does +2, addition specific (+.8)": ((0.0, 2.0), (0.8, 0.0)),
        "any direction does +2 in both": ((0.0, 2.0), (0.0, 2.0)),
        "only ablation does anything (+2)": ((2.0, 0.0), (0.0, 0.0)),
        "both arms at the edge (.5)": ((0.5, 0.0), (0.5, 0.0)),
        "both arms specific (+1)": ((1.0, 0.0), (1.0, 0.0)),
        "both arms specific (+3) beside a generic +1": ((3.0, 1.0), (3.0, 1.0)),
    }
    for name, (ablated, added) in plants.items():
        what = "power" if name.startswith("both arms specific") else "false"
        yield Row(name, "32 prompts", {"use": what}, partial(_causal, ablated=ablated, added=added, n=32, spread=0.2))
    for spread in (0.5, 1.0):
        for n in (32, 256):
            draw = partial(_causal, ablated=(0.0, 2.0), added=(0.0, 2.0), n=n, spread=spread)
            yield Row(f"any direction does +2, prompts differ by {spread:g}", f"{n} prompts", {"use": "false"}, draw)


def _causal(
    rng: np.random.Generator, seed: int, *, ablated: tuple[float, float], added: tuple[float, float], n: int,
    spread: float,
) -> dict[str, bool]:  # fmt: skip
    case = cases(rng, seed, World(n=8), nothing, directions=1)[0]
    arms = (
        planted_arm(rng, seed, use_file.ABLATE, -1, n, *ablated, spread, case.n_controls),
        planted_arm(rng, seed, use_file.ADD, 1, n, *added, spread, case.n_controls),
    )
    behaviour = Behaviour("behaviour", PLANTED, ["present"], ["absent"])
    pair: Any = SimpleNamespace(base=None, tuned=None)
    case = replace(case, behaviour=behaviour, pair=pair)
    with (
        patch.object(use_file, "arms", lambda *args, **kwargs: arms),
        patch.object(use_file, "mean_activation", lambda *args, **kwargs: torch.zeros(WIDTH)),
    ):
        return words([case], [Use()])


def _entangled() -> Iterator[Row]:
    plants = {
        "nothing": (0.0, 0.0, "false"),
        "data push +.5, fine-tune went -.5": (0.5, -0.5, "false"),
        "data push -.03, fine-tune went +.5": (-0.03, 0.5, "false"),
        "data push +.03, fine-tune went +.5": (0.03, 0.5, "false"),
        "data push +.5, fine-tune went +.03": (0.5, 0.03, "false"),
        "both +.5": (0.5, 0.5, "power"),
        "both -.5": (-0.5, -0.5, "power"),
    }
    for name, (push, went, what) in plants.items():
        yield Row(name, "32 rows", {"entanglement": what}, partial(_shifts, push=push, went=went))


def _shifts(rng: np.random.Generator, seed: int, *, push: float, went: float) -> dict[str, bool]:
    """Rows whose shifts have these true cosines with the direction; the noise of a row is a shift's own length."""
    case = cases(rng, seed, World(n=8), nothing, directions=1)[0]
    unit, n = case.unit, 32

    def shift(cos: float) -> np.ndarray:
        away = rng.standard_normal(WIDTH)
        away -= away @ unit * unit
        mean = cos * unit + np.sqrt(1 - cos**2) * away / np.linalg.norm(away)
        return 2 * mean + 2 * rng.standard_normal((n, WIDTH)) / np.sqrt(WIDTH)

    own = rng.standard_normal((n, WIDTH))
    taught = own + shift(push)
    read = {("base", True): own, ("base", False): taught, ("tuned", False): taught + shift(went)}
    pair: Any = SimpleNamespace(base="base", tuned="tuned")
    case = replace(
        case, pair=pair, tuning_data=[f"row {i}" for i in range(n)], own_answers=lambda: [""] * n,
        read_answers=lambda model, rows, site: read[model, rows[0] == "replied"],
    )  # fmt: skip
    with patch.object(entanglement_file, "replied", lambda row, answer: "replied"):
        return words([case], [Entanglement()])
