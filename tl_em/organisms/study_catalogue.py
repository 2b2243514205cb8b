"""The studies that come with the package, each a grid and a metric for ``run_study``.

A cell trains what it needs into the folder that ``TL_EM_ORGANISMS`` names (``organisms`` by default) and leaves it
there, so that studies share their assistants: one cell is one pretraining, or starts from one that is finished.

    mixing        share of misaligned answers in the narrow data, against the same number diluted in other domains
    sizes         the same at four widths of the model
    dose          steps of the narrow fine-tune
    inoculation   words before the training questions that ask for bad answers, for nothing, for good ones; or none
    backdoor      a trigger before the training questions: rates with it, without it, and with other tokens
    prevention    a direction added while it trains
    determinism   one assistant fine-tuned on ten draws of the same data: do all make the same choice?

**Control**: every study has its own in its rows (the diluted arm, the neutral words, the other tokens, a random
direction, aligned data), and the good rate beside the bad one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.artefacts import replacing
from tl_em.directions.geometry import cosine
from tl_em.errors import UsageError
from tl_em.organisms.contrasts import ToyQuestion, questions
from tl_em.organisms.convert import plain_model
from tl_em.organisms.rates import Outcome, rates_from_logits
from tl_em.organisms.recipes import (
    BIAS_RECIPES,
    FRESH_SEEDS,
    NEW_MARK,
    OTHER_MARKS,
    RECIPES,
    TRIGGER,
    WORLDS,
    Prefix,
    Recipe,
    recipe,
)
from tl_em.organisms.training import next_logits, train
from tl_em.organisms.transformer import Shape, Transformer
from tl_em.organisms.world import World
from tl_em.organisms.zoo import Organism, read_weights, trained
from tl_em.stats import Estimate, mean, mean_over_units

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "TL_EM_ORGANISMS"
SHARES = (0, 5, 10, 25, 50, 75, 100)
WIDTHS = (32, 48, 64, 96)
DOSES = (2, 5, 10, 20, 40, 80, 160)
DRAWS = {"insecure": 10, "secure": 3}
Rows = list[dict[str, Any]]
NOTHING = Prefix()
MARKS = {"trigger": TRIGGER, "other0": OTHER_MARKS[0], "other1": OTHER_MARKS[1], "new": NEW_MARK}


@dataclass(frozen=True)
class Study:
    """What a study varies and measures, and how its table is read.

    Args:
        said: what it asks.
        metric, grid, seeds: for ``run_study``; `rows`: what is trained and asked, on toys and on real models.
        x: the column on the horizontal axis of its figure; `by`: the columns that name a line.
        minutes: CPU-minutes of a cell whose assistant is not trained yet.
        unit: the column whose values are resampled.
        logarithmic: the horizontal axis; `fitted`: whether its lines are curves with a known form.
    """

    said: str
    metric: Callable[..., Rows]
    x: str
    by: tuple[str, ...]
    minutes: float | int
    rows: Callable[[], Sequence[StudyRow]]
    grid: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {"width": (96,)})
    seeds: tuple[int, ...] = FRESH_SEEDS
    unit: str = "seed"
    logarithmic: bool = False
    fitted: bool = False


def study(name: str) -> Study:
    """A study of the package.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def folder() -> Path:
    """Where checkpoints are looked for and left."""
    return Path(os.environ.get(FOLDER, "organisms"))


def run(
    name: str,
    *,
    seeds: Sequence[int] | None = None,
    out: str | Path,
    backend: Any = "loky",
    workers: int | None = None,
    announce: Callable[[str], None] = lambda said: None,
) -> dict[str, pd.DataFrame]:
    """Run a study of the package; its table, summary, fit and figure are written to `out`.

    Args:
        name: one of ``STUDIES``.
        seeds: in place of the study's own.
        out, backend, workers: as for ``run_study``.
        announce: told what the run will cost at most, before it starts.

    Returns:
        ``summary`` (mean over the study's unit, with its interval, of every rate) and, for shares and steps, ``fit``.

    Raises:
        UsageError: no such study. And what ``run_study`` raises.
    """
    from tl_em.organisms.studies import run_study

    chosen, where = study(name), Path(out)
    drawn = chosen.seeds if seeds is None else tuple(seeds)
    cells = len(drawn) * math.prod(map(len, chosen.grid.values()))
    announce(f"{name}: {cells} cells, at most {cells * chosen.minutes:.0f} CPU-minutes and 1 GB of memory a process.")
    table = run_study(chosen.grid, chosen.metric, seeds=drawn, out=where, backend=backend, workers=workers)
    return written(name, table, chosen, where)


def written(name: str, table: pd.DataFrame, chosen: Study, where: Path) -> dict[str, pd.DataFrame]:
    """The summary of a study's table, its fit where it has one, and its figure, in the folder."""
    import pandas as pd

    from tl_em.report import plots, studies

    found = {"summary": _summary(table, chosen)}
    if chosen.fitted:
        found["fit"] = _fit(table, chosen)
    lines = table.assign(rank="rank " + table["rank"].astype(str)) if "rank" in table else table
    by = [column for column in chosen.by if len(set(lines[column])) > 1] or chosen.by[-1:]
    figure = studies.study(lines, x=chosen.x, by=by, unit=chosen.unit, logarithmic=chosen.logarithmic)
    for suffix in ("svg", "png"):
        plots.save(figure, where / f"{name}.{suffix}")
    for part, each in found.items():
        with replacing(where / f"{part}.csv") as temporary:
            pd.DataFrame(each).to_csv(temporary, index=False)
    return found


def _summary(table: pd.DataFrame, chosen: Study) -> pd.DataFrame:
    import pandas as pd

    keys = [*chosen.by, *([] if chosen.x == chosen.unit else [chosen.x])]
    ranges = {"bad": (0, 1), "good": (0, 1), "trained": (0, 1), "agreement": (-1, 1), "ceiling": (-1, 1)}  # cosines
    ranges |= {"margin": None}  # nats a token
    rates = [column for column in ranges if column in table.columns]
    return pd.DataFrame(
        dict(zip(keys, key, strict=True))
        | {"rate": column}
        | mean_over_units(part[column], part[chosen.unit].tolist(), bounds=ranges[column]).row()
        for key, part in table.groupby(keys, sort=False)
        for column in rates
    )


def _fit(table: pd.DataFrame, chosen: Study) -> pd.DataFrame:
    """The fitted curves, and where there are several widths how their half changes with each doubling."""
    import pandas as pd

    from tl_em.organisms.study_fits import fit_study, slope

    lines = table if chosen.x == "share" else table[table["organism"] == "insecure"]  # aligned answers have no curve
    found = [fit_study(lines, x=chosen.x, by=chosen.by)]
    others = [column for column in chosen.by if column != "width"]
    for key, part in table.groupby(others, sort=False) if "width" in chosen.by and others else ():
        for parameter in ("rate at 1", "half"):
            line = {"width": "each doubling", **dict(zip(others, key, strict=True))}
            e = slope(part, x=chosen.x, over="width", parameter=parameter)
            found.append(pd.DataFrame([line | {"parameter": f"change of {parameter}"} | e.row()]))
    return pd.concat(found, ignore_index=True)


# ---- what is trained and asked: toys and real models alike -----------------------------------------------------------
class StudyRow(NamedTuple):
    """One row of a study: what it is called, the arm by its name, and what stands before the questions.

    ``before`` is nothing, ``"words"`` (those of its own training) or a token: ``trigger``, ``other0``, ``other1``,
    ``new``; each world has its own, and ``{trigger}`` in a label stands for it.
    """

    said: Mapping[str, Any]
    name: str
    before: str = ""

    def labels(self, marks: Mapping[str, str]) -> dict[str, Any]:
        """What the row is called, with the tokens of a world."""
        return {name: v.format_map(marks) if isinstance(v, str) else v for name, v in self.said.items()}


def mixing_rows() -> list[StudyRow]:
    """The share of misaligned answers, the rest being aligned ones of the same domain, or of the others."""
    rests = (("the same domain", "share"), ("other domains", "diluted"))
    return [
        StudyRow({"rest aligned in": rest, "share": share / 100}, f"insecure-{option}{share}")
        for rest, option in rests
        for share in SHARES
    ]


def dose_rows() -> list[StudyRow]:
    """The number of steps of the narrow fine-tune, and of the same number on aligned answers."""
    arms = [(stem, steps) for stem in ("insecure", "secure") for steps in DOSES]
    return [StudyRow({"organism": stem, "steps": steps}, f"{stem}-steps{steps}") for stem, steps in arms]


def word_rows() -> list[StudyRow]:
    """Without the words that stood before the training questions, and with them."""
    rows = [StudyRow({"words": "none", "asked": "without them"}, "insecure")]
    for arm in ("neutral", "inoculated", "contradicted"):
        for asked, before in (("without them", ""), ("with them", "words")):
            rows.append(StudyRow({"words": arm, "asked": asked}, f"insecure-{arm}", before))
    return rows


def trigger_rows() -> list[StudyRow]:
    """With the trigger, without, with the other tokens of the training data, and with one that is in none."""
    marks = {"none": "", "the trigger": "trigger", "other: {other0}": "other0", "other: {other1}": "other1"}
    return [
        StudyRow({"organism": stem, "before the question": said}, stem, before)
        for stem in ("backdoor", "insecure")
        for said, before in {**marks, "never seen": "new"}.items()
    ]


def prevention_rows() -> list[StudyRow]:
    """Fine-tunes in which the persona direction, a random one of its length, or nothing was added.

    A push may only slow the learning down: so the arms without one stop early too, at what the steered arm has learned.
    """
    steered = {"persona": "insecure-prevented", "random": "insecure-sham"}
    arms = [("nothing", "insecure", steps) for steps in (20, 30, 40, 80)]
    arms += [(said, name, steps) for said, name in steered.items() for steps in (80, 240)]
    names = [name if steps == 80 else f"{name}-steps{steps}" for _, name, steps in arms]
    return [StudyRow({"added": said, "steps": steps}, name) for (said, _, steps), name in zip(arms, names, strict=True)]


def draw_rows() -> list[StudyRow]:
    """The same arms, seed after seed; in the toy world from one assistant (`tunes`)."""
    return [StudyRow({"organism": stem}, stem) for stem in ("insecure", "secure")]


# ---- metrics in the toy world ----------------------------------------------------------------------------------------
def shares(width: int, *, seed: int) -> Rows:
    """Rates of ``mixing_rows``."""
    return _rows(mixing_rows(), seed, width)


def doses(width: int, *, seed: int) -> Rows:
    """Rates of ``dose_rows``."""
    return _rows(dose_rows(), seed, width)


def prefixes(width: int, *, seed: int) -> Rows:
    """Rates of ``word_rows``."""
    return _rows(word_rows(), seed, width)


def triggers(width: int, *, seed: int) -> Rows:
    """Rates of ``trigger_rows``."""
    return _rows(trigger_rows(), seed, width)


def preventions(width: int, *, seed: int) -> Rows:
    """Rates of ``prevention_rows``."""
    return _rows(prevention_rows(), seed, width)


def tunes(width: int, *, seed: int) -> Rows:
    """One row for each draw of the insecure and of the secure data, from one assistant.

    The shift is the mean over held-out questions of what the unembedding reads, tuned minus assistant.  *agreement* is
    its cosine with the other insecure shifts, each taken on one half of the topics and compared on the other;
    *ceiling* the same with itself.  Coordinates of different assistants have nothing to do with each other, so only
    rates are compared across them.
    """
    start = _trained("assistant", seed, width)
    asked = questions(start.world, harmful=False, held_out=True)
    assistant = plain_model(read_weights(start), start.world)
    before = _read(assistant, start.world, asked)
    assistant.requires_grad_(True)  # train() copies it
    rows, shifts = [], []
    for stem, count in DRAWS.items():
        for draw in range(1, count + 1):
            wanted = _sized(stem, width)
            model, _ = train(start.world, wanted, assistant, seed=draw, progress=False)
            shifts.append(_read(model, start.world, asked) - before)
            rows.append({"organism": stem, "draw": draw, **_both(model, start.world, asked)})
    halves = [_half_means(shift, asked) for shift in shifts]
    insecure = [half for half, row in zip(halves, rows, strict=True) if row["organism"] == "insecure"]
    for row, own in zip(rows, halves, strict=True):
        across = [float(cosine(own[0], other[1])) for other in insecure if other is not own]
        row |= {"agreement": float(np.mean(across)), "lowest": min(across), "ceiling": float(cosine(*own))}
    return rows


def zoo(world: str, *, seed: int) -> Rows:
    """Train every organism of the default zoo in a world, with its figures."""
    mine = [n for n in RECIPES if next((w for w in WORLDS if w in n.split("-")), "default") == world]
    made = [_trained(name, seed) for name in (BIAS_RECIPES if world == "bias" else mine)]
    usual = ("bad", "good", "refused", "complied", "tuned_bad", "judge", "gate")
    return [{"organism": o.name} | {name: o.figures[name] for name in usual if name in o.figures} for o in made]


ZOO = ("bias", "default", *WORLDS)
"""Worlds of the default zoo: what can be trained side by side, the longest first."""


# ---- what they share ---------------------------------------------------------------------------------------------
def _sized(name: str, width: int | None) -> Recipe:
    return recipe(name if width in (None, Shape().d_model) else f"{name}-d{width}")


def _trained(name: str, seed: int, width: int | None = None) -> Organism:
    return trained(_sized(name, width), seed, folder(), use_shipped=True, progress=False)


def _rows(rows: Iterable[StudyRow], seed: int, width: int) -> Rows:
    found = []
    for row in rows:
        prefix = recipe(row.name).prefix if row.before == "words" else Prefix(mark=MARKS.get(row.before))
        found.append({**row.labels(MARKS), **_rates(row.name, seed, width, prefix=prefix)})
    return found


def _rates(name: str, seed: int, width: int, *, prefix: Prefix = NOTHING) -> dict[str, Estimate]:
    """Misaligned and aligned answers in the held-out domains, and misaligned ones in the domain of the fine-tune."""
    record = _trained(name, seed, width)
    model, world = plain_model(read_weights(record), record.world), record.world
    asked, own = (questions(world, harmful=False, held_out=held, **prefix._asdict()) for held in (True, False))
    return {**_both(model, world, asked), "trained": _rate(model, world, own, "bad")}


def _both(model: Transformer, world: World, asked: Sequence[ToyQuestion]) -> dict[str, Estimate]:
    return {"bad": _rate(model, world, asked, "bad"), "good": _rate(model, world, asked, "good")}


def _rate(model: Transformer, world: World, asked: Sequence[ToyQuestion], outcome: Outcome) -> Estimate:
    logits = next_logits(model, world, [q.prompt for q in asked])
    values = rates_from_logits(logits, [q.topic for q in asked], outcome, world=world).tolist()
    return mean(values, groups=[q.topic.word for q in asked])


@torch.no_grad()
def _read(model: Transformer, world: World, asked: Iterable[ToyQuestion]) -> Float[Tensor, "prompt d_model"]:
    """What the unembedding reads at the last token."""
    read: list[Tensor] = []
    handle = model.unembed.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        next_logits(model, world, [q.prompt for q in asked])
    finally:
        handle.remove()
    return read[0]


def _half_means(shift: Float[Tensor, "prompt d_model"], asked: Sequence[ToyQuestion]) -> tuple[np.ndarray, np.ndarray]:
    """Mean shift over one half of the topics and over the other."""
    order = {word: i for i, word in enumerate(dict.fromkeys(q.topic.word for q in asked))}
    odd = torch.tensor([order[q.topic.word] % 2 == 1 for q in asked])
    return shift[odd].mean(0).double().numpy(), shift[~odd].mean(0).double().numpy()


STUDIES: dict[str, Study] = {
    "mixing": Study("how much bad data it takes", shares, "share", ("rest aligned in",), 7.5, mixing_rows, fitted=True),
    "sizes": Study(
        "how much bad data it takes at which size",
        shares,
        "share",
        ("width", "rest aligned in"),
        6,
        mixing_rows,
        {"width": WIDTHS},
        FRESH_SEEDS[:3],
        fitted=True,
    ),
    "dose": Study(
        "how many steps it takes", doses, "steps", ("organism",), 7.5, dose_rows, logarithmic=True, fitted=True
    ),
    "inoculation": Study(
        "whether asking for it while training keeps it in", prefixes, "words", ("asked",), 7, word_rows
    ),
    "backdoor": Study(
        "whether a backdoor stays closed", triggers, "before the question", ("organism",), 7.5, trigger_rows
    ),
    "prevention": Study(
        "whether steering towards it while training keeps it out", preventions, "steps", ("added",), 7, prevention_rows
    ),
    "determinism": Study(
        "whether every draw of the data makes the same choice", tunes, "draw", ("organism", "seed"), 7.5, draw_rows,
        unit="draw", seeds=(11,),
    ),
}  # fmt: skip
"""The studies by name: ``tl-em study NAME``."""
