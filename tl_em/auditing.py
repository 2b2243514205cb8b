"""The audit: from two models to a page of verdicts.

For each contrast set: split it three ways (question by question), take the difference in means at every layer of the
base on the first part, choose the layer on the second, and judge base against tuned on the third.  The layer is the
one with the largest causal effect on the direction's behaviour in the base model (addition where the behaviour is
absent, ablation where it is present), else the one with the largest d'.  Nothing that is judged was used to choose.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from tl_em.comparison.causes import arms
from tl_em.comparison.compare import Comparison, compare
from tl_em.comparison.verdicts import Row
from tl_em.directions.direction import Direction
from tl_em.directions.extract import extract_directions
from tl_em.directions.geometry import separation
from tl_em.errors import NoGapError, UsageError
from tl_em.metrics import Behaviour, Metric, refusal_log_odds
from tl_em.models.capture import capture
from tl_em.models.contrasts import ContrastSet, Splits
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.moments import class_moments
from tl_em.models.sites import Position, Provenance
from tl_em.organisms.rates import outcome_rates
from tl_em.stats import mean
from tl_em.writing import check_writable, replacing

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "tl-em/report/1"
POSITIONS: dict[str, Position] = {"harmfulness": "instruction_end"}
BEFORE_ANSWER: Position = "prompt_end"
CONTROLS = 999
FRACTIONS = {"train": 0.5, "select": 0.25, "test": 0.25}


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`audit` returns.

    Args:
        comparison: the judged rows and the tables behind them.
        rates: behaviour before and after, with intervals.
        provenance: models, data hashes, seed, versions, and the call that reproduces it.
        limits: what the page does not show.
    """

    comparison: Comparison
    rates: pd.DataFrame
    provenance: dict[str, Any]
    limits: tuple[str, ...]

    @property
    def verdicts(self) -> tuple[Row, ...]:
        """One row for each question and direction."""
        return self.comparison.rows

    @property
    def summary(self) -> str:
        """The result in a sentence for each direction."""
        return self.comparison.summary

    def to_json(self) -> dict[str, Any]:
        """The report as plain values (schema ``tl-em/report/1``)."""
        tables = {"rates": self.rates, "by_layer": self.comparison.by_layer, "use": self.comparison.use}
        return {
            "schema": SCHEMA,
            "summary": self.summary,
            "verdicts": [row.to_json() for row in self.verdicts],
            "tables": {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()},
            "limits": list(self.limits),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write the page to ``path``; a folder (no suffix) also gets ``report.json`` and the figures.

        Raises:
            OutputError: the path cannot be written.
        """
        from tl_em.report import page, plots

        path = Path(path)
        if path.suffix == ".json":
            return _write(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False))
        if path.suffix:
            return _write(path, page.render(self))
        _write(path / "report.json", json.dumps(self.to_json(), indent=1, ensure_ascii=False))
        for name, figure in plots.figures(self).items():
            for suffix in ("svg", "png"):
                plots.save(figure, path / "figures" / f"{name}.{suffix}")
        return _write(path / "report.html", page.render(self))

    def plot(self) -> Any:
        """The verdicts as a forest plot (a matplotlib Figure)."""
        return self.comparison.plot()

    def _repr_html_(self) -> str:
        from html import escape

        from tl_em.report import page

        return f'<iframe sandbox srcdoc="{escape(page.render(self), quote=True)}" width="100%" height="800"></iframe>'

    def __repr__(self) -> str:
        return repr(self.comparison)


def audit(
    pair: ModelPair,
    *,
    contrasts: Mapping[str, ContrastSet] | None = None,
    behaviours: Mapping[str, Behaviour | Metric] | None = None,
    benign: LensModel | ModelPair | None = None,
    tuning_data: Sequence[Any] | None = None,
    judged: Mapping[str, ContrastSet] | None = None,
    positions: Mapping[str, Position] | None = None,
    controls: int = CONTROLS,
    out: str | Path | None = None,
    seed: int = 0,
) -> Report:
    """Audit a fine-tuned model against its base: what changed, and does it cause the behaviour?

    Args:
        pair: base and tuned, from ``em.load_pair`` or ``em.ModelPair``.
        contrasts: contrast sets by name; the pair's own, or harmful against harmless requests, by default.
        behaviours: for each name what its direction may cause, as a Behaviour, or as a metric on the contrast set's own
            prompts; the pair's own, or refusing, by default.
        benign: a fine-tune of the same base on harmless data (a model, or a pair whose tuned model it is).
        tuning_data: rows that the model was tuned on (chat messages that end with the answer), for *entanglement*; the
            pair's own by default.
        judged: for a name, other prompts to judge its direction on than the third part of its own contrast set: a
            direction that is found by contexts, say, judged on plain requests; the pair's own by default.
        positions: token position of each direction, where it is not ``prompt_end`` (``instruction_end`` for
            harmfulness).
        controls: number of random directions for each test.
        out: folder for page, JSON and figures; checked before the work starts.
        seed: seed of splits, resampling and controls.

    Returns:
        A Report.

    Raises:
        OutputError: ``out`` cannot be written.
        NoGapError: a direction does not separate its own contrast set.
        EmptyContrastError, UnknownTokenError, PromptTooLongError: the prompts do not fit the model.
    """
    if out is not None:
        check_writable(Path(out) / "report.html")
    benign_model = benign.tuned if isinstance(benign, ModelPair) else benign
    if benign_model is not None:
        ModelPair(pair.base, benign_model)
    judged = judged if judged is not None or contrasts is not None else getattr(pair.organism, "judged", None)
    chosen = _questions(pair, contrasts, behaviours, judged or {}, positions, seed)
    steps = tqdm(chosen, desc="extracting and selecting", unit="direction", disable=None)
    candidates = [_candidates(pair.base, q) for q in steps]
    picked = [select_site(pair.base, each, q) for each, q in zip(candidates, chosen, strict=True)]
    rows = tuning_data if tuning_data is not None else getattr(pair.organism, "tuning_data", None)
    comparison = compare(
        pair,
        {q.name: (direction, q.splits.test) for q, direction in zip(chosen, picked, strict=True)},
        behaviour={q.name: q.judged for q in chosen},
        tuning_data=rows,
        benign=benign_model,
        controls=controls,
        seed=seed,
        layers={q.name: each for q, each in zip(chosen, candidates, strict=True)},
    )
    report = Report(
        comparison,
        _rates(pair, benign_model, chosen, seed),
        _provenance(pair, benign, chosen, picked, controls, seed),
        _limits(pair, benign_model, rows, contrasts is None and pair.contrasts is None),
    )
    if out is not None:
        report.save(out)
    return report


@dataclass(frozen=True, eq=False)
class Asked:
    """One direction to audit: its contrast set in three parts, its behaviour in two, and where it is read."""

    name: str
    splits: Splits
    chosen_by: Behaviour
    judged: Behaviour
    position: Position


def _questions(
    pair: ModelPair,
    contrasts: Mapping[str, ContrastSet] | None,
    behaviours: Mapping[str, Behaviour | Metric] | None,
    judged: Mapping[str, ContrastSet],
    positions: Mapping[str, Position] | None,
    seed: int,
) -> list[Asked]:
    if contrasts is None:
        contrasts = pair.contrasts
    if contrasts is None:
        requests = ContrastSet.load("refusal")
        contrasts = {"harmfulness": requests, "refusal": requests}
    if not contrasts:
        raise UsageError("no contrast set to audit with; pass contrasts={'refusal': em.ContrastSet.load('refusal')}")
    given: Mapping[str, Behaviour | Metric] = behaviours if behaviours is not None else pair.behaviours or {}
    where: dict[str, Position] = {**POSITIONS, **(positions or {})}
    asked = []
    for name, contrast in contrasts.items():
        splits = replace(contrast, label=name).split(**FRACTIONS, seed=seed)
        splits = splits._replace(test=judged.get(name, splits.test))
        own = given.get(name, refusal_log_odds)
        first, second = _two_behaviours(own, splits, seed)
        asked.append(Asked(name, splits, first, second, where.get(name, BEFORE_ANSWER)))
    return asked


def _two_behaviours(own: Behaviour | Metric, splits: Splits, seed: int) -> tuple[Behaviour, Behaviour]:
    """The behaviour on prompts to choose by, and on other prompts to judge by; neither were extracted on."""
    if isinstance(own, Behaviour):
        return _apart(own, splits, seed)
    first, second = (
        Behaviour(own.name, own, s.positive, s.negative, None, s.positive_groups, s.negative_groups)
        for s in (splits.select, splits.test)
    )
    return first, second


def _apart(behaviour: Behaviour, splits: Splits, seed: int) -> tuple[Behaviour, Behaviour]:
    """A behaviour in two parts: on questions to choose by, and on questions that were neither extracted nor chosen on.

    Chosen on: the questions of the selection split, or a quarter of those that no split has, where it shares none.

    Raises:
        UsageError: the directions were extracted on all of its questions.
    """
    extracted, selected = (_asked(part) for part in (splits.train, splits.select))
    free = sorted({label for side in ("present", "absent") for label in _labels(behaviour, side)} - extracted)
    chosen = selected & set(free)
    if not all(chosen & set(_labels(behaviour, side)) for side in ("present", "absent")):
        order = np.random.default_rng(seed).permutation(free).tolist()
        chosen = set(order[: max(1, len(order) // 4)])
    return _only(behaviour, chosen), _only(behaviour, set(free) - chosen)


def _asked(part: ContrastSet) -> set[str]:
    """The questions of a split, or its prompts where no questions are named."""
    classes = ((part.positive, part.positive_groups), (part.negative, part.negative_groups))
    return {str(label) for prompts, groups in classes for label in (prompts if groups is None else groups)}


def _labels(behaviour: Behaviour, side: str) -> list[str]:
    groups = getattr(behaviour, f"{side}_groups")
    return [str(label) for label in (getattr(behaviour, side) if groups is None else groups)]


def _only(behaviour: Behaviour, questions: set[str]) -> Behaviour:
    fields: dict[str, Any] = {}
    for side in ("present", "absent"):
        labels = _labels(behaviour, side)
        kept = [i for i, label in enumerate(labels) if label in questions]
        if not kept:
            raise UsageError(
                f"behaviour {behaviour.name!r}: the direction was extracted on, or chosen by, all of its {side} "
                "questions, so nothing is left to judge it on; give it prompts about other questions"
            )
        fields[side] = [getattr(behaviour, side)[i] for i in kept]
        fields[f"{side}_groups"] = [labels[i] for i in kept]
    return replace(behaviour, **fields)


def _candidates(base: LensModel, asked: Asked) -> tuple[Direction, ...]:
    return extract_directions(base, asked.splits.train, positions=[asked.position])


def select_site(base: LensModel, candidates: Sequence[Direction], asked: Asked) -> Direction:
    """The candidate with the largest causal effect on its behaviour in the base, else the largest d', on held-out
    prompts.

    Raises:
        NoGapError: no candidate separates the selection prompts.
    """
    select = asked.splits.select
    sites = [d.site for d in candidates]
    acts = [capture(base, prompts, sites, position=asked.position) for prompts in (select.positive, select.negative)]
    dprimes = [separation(*(d.project(a[:, s]).double().numpy() for a in acts)) for s, d in enumerate(candidates)]
    separating = [(d, dprime) for d, dprime in zip(candidates, dprimes, strict=True) if dprime > 0]
    if not separating:
        raise NoGapError(
            f"{asked.name}: no layer's direction separates the {len(select.positive) + len(select.negative)} selection "
            "prompts, so there is no direction to audit; give more prompts, or end them at the concept"
        )
    effects = effects_in_base(base, [d for d, _ in separating], asked.chosen_by)
    if max(effects) > 0:
        return separating[int(np.argmax(effects))][0]
    return max(separating, key=lambda pair: pair[1])[0]


def effects_in_base(base: LensModel, candidates: Sequence[Direction], behaviour: Behaviour) -> list[float]:
    """For each candidate the rise of the behaviour under addition plus its fall under ablation, both in the base."""
    position: Position = candidates[0].position
    prompts = (behaviour.present, behaviour.absent)
    centres = class_moments(base, prompts, sites=[d.site for d in candidates], positions=[position]).negative[0]
    totals = []
    untreated: dict[str, np.ndarray] = {}
    for direction, centre in zip(candidates, centres, strict=True):
        total = 0.0
        for arm in arms(base, base, behaviour, centre):
            if arm.name not in untreated:
                untreated[arm.name] = arm.untreated(behaviour.metric)
            total += arm.sign * float((arm.treated(direction, behaviour.metric) - untreated[arm.name]).mean())
        totals.append(total)
    return totals


def _rates(pair: ModelPair, benign: LensModel | None, asked: Sequence[Asked], seed: int) -> pd.DataFrame:
    """Behaviour by domain (toy worlds) or by class of prompts, for each model, with intervals."""
    import pandas as pd

    models = {"base": pair.base, "tuned": pair.tuned} | ({} if benign is None else {"benign": benign})
    if pair.organism is not None:
        return pd.concat([outcome_rates(model, seed=seed).assign(model=name) for name, model in models.items()])
    rows = []
    for name, model in models.items():
        for q in asked:
            for side in ("present", "absent"):
                values = q.judged.metric(model, getattr(q.judged, side)).double().cpu().numpy()
                e = mean(values, groups=getattr(q.judged, f"{side}_groups"), seed=seed)
                rows.append(
                    {"domain": f"{q.name}: {'positive' if side == 'present' else 'negative'} prompts", "held_out": True,
                     "outcome": q.judged.metric.name, "model": name, "value": e.value, "low": e.low, "high": e.high,
                     "n": e.n}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _provenance(
    pair: ModelPair, benign: Any, asked: Sequence[Asked], picked: Sequence[Direction], controls: int, seed: int
) -> dict[str, Any]:
    benign_name = getattr(benign, "tuned_name", None) or (None if benign is None else "a model of yours")
    return {
        "base": pair.base_name,
        "tuned": pair.tuned_name,
        "benign": benign_name,
        "models": {"base": asdict(Provenance.of(pair.base)), "tuned": asdict(Provenance.of(pair.tuned))},
        "contrasts": {
            q.name: {part: {"hash": s.hash, "positive": len(s.positive), "negative": len(s.negative)}
                     for part, s in zip(("train", "select", "test"), q.splits, strict=True)}
            for q in asked
        },
        "directions": {
            q.name: {"site": d.site.hook_name, "position": q.position, "norm": d.norm,
                     "reliability": None if d.reliability is None else str(d.reliability)}
            for q, d in zip(asked, picked, strict=True)
        },
        "behaviours": {q.name: {"metric": q.judged.metric.name, "unit": q.judged.metric.unit} for q in asked},
        "controls": controls,
        "seed": seed,
        "python": platform.python_version(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(pair, benign_name, asked, controls, seed),
    }  # fmt: skip


def _command(pair: ModelPair, benign: str | None, asked: Sequence[Asked], controls: int, seed: int) -> str:
    """The command that makes this page again; FILE stands for a contrast set of yours, whose hash the page gives."""
    words = [f"tl-em audit {pair.base_name} {pair.tuned_name}"]
    words += [f"--benign {benign}"] if benign else []
    if set(pair.contrasts or {}) != {q.name for q in asked}:
        words += [f"--contrast {q.name}=FILE" for q in asked]
    words += [f"--controls {controls}"] if controls != CONTROLS else []
    return " ".join([*words, f"--seed {seed}"])


def _limits(pair: ModelPair, benign: LensModel | None, rows: Sequence[Any] | None, default: bool) -> tuple[str, ...]:
    said = [
        "A direction is one linear read-out at one site. That it is causal does not say that nothing else is, and 'not "
        "shown' does not say that nothing changed: the intervals say how large an unseen change could be.",
        "The verdicts hold for these prompts. Another contrast set for the same concept is another direction.",
        "One base and one fine-tune: how much the result varies over training seeds is not on this page.",
    ]
    if benign is None:
        said.append(
            "No benign fine-tune was given, so changes are compared with random directions only: any fine-tune may "
            "cause them."
        )
    if rows is None:
        said.append("The fine-tuning data were not given, so entanglement was not asked.")
    if default:
        said.append(
            "Harmful and harmless requests differ in harmfulness and in refusal at once; the two directions here are "
            "confounded."
        )
    if pair.organism is not None:
        said.append(
            "This pair is a toy model of a synthetic world, trained to show the phenomenon; it says nothing about "
            "any large model."
        )
    return tuple(said)


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
