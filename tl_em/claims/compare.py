"""Base against tuned: five questions about each direction, each with its control and its verdict.

The questions and the rule are in ``verdicts``; the measurements in ``changes`` (level, separation, rotation),
``causes`` (use) and ``entanglement``.  This file puts them together and says the result in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from tl_em.arguments import COUNT, SEED, checked
from tl_em.claims.questions.changes import Measured, Reading, changes, layer_rows
from tl_em.claims.questions.entanglement import entanglement
from tl_em.claims.questions.use import cause
from tl_em.claims.rule import Finding, Row, judge
from tl_em.directions.direction import Direction, check_fits
from tl_em.directions.screening import answer_to_own_prompts
from tl_em.errors import NoGapError, UsageError
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.modes import in_plain_torch
from tl_em.models.sites import Site
from tl_em.models.stream import capture
from tl_em.showing import check_names, showable

if TYPE_CHECKING:
    import pandas as pd

Behaviours = Metric | Behaviour | Mapping[str, Metric | Behaviour]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The answers: one row for each question and direction.

    Args:
        rows: judged rows, question by question.
        by_layer: each direction by layer, in each model, with intervals and the band of the random directions.
        use: rates behind the causal test: untreated, treated, and under random directions.
        unmeasured: directions that do not separate their own contrast set in the base, and why; nothing is asked about
            them, whatever the tuned model does.
    """

    rows: tuple[Row, ...]
    by_layer: pd.DataFrame
    use: pd.DataFrame
    unmeasured: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The result in a few sentences: what changed and matters, what changed, what is not shown.

        *exaggerated* and *diminished* are said only where the direction is causal at the same site.
        """
        names = list(dict.fromkeys(row.direction for row in self.rows))
        found = [_sentence(name, {r.question: r for r in self.rows if r.direction == name}) for name in names]
        said = [text for rank in (0, 1, 2) for r, text in found if r == rank]
        silent = [name for name, (rank, _) in zip(names, found, strict=True) if rank == 3]
        rest = {"No change shown": silent, "Not measured": [*self.unmeasured]}
        return " ".join([*said, *(f"{what}: {', '.join(these)}." for what, these in rest.items() if these)])

    def row(self, question: str, direction: str) -> Row:
        """The row of one question about one direction.

        Raises:
            UsageError: there is no such row.
        """
        for row in self.rows:
            if (row.question, row.direction) == (question, direction):
                return row
        known = sorted({(r.question, r.direction) for r in self.rows})
        raise UsageError(f"no row ({question!r}, {direction!r}) was asked for; there are {known}")

    def to_pandas(self) -> pd.DataFrame:
        """One line a row, the estimate and its control in columns."""
        import pandas as pd

        return pd.DataFrame(
            {
                "question": r.question, "direction": r.direction, "site": str(r.site), "verdict": r.verdict,
                "value": r.estimate.value, "low": r.estimate.low, "high": r.estimate.high, "n": r.estimate.n,
                "unit": r.unit, "control_low": r.control["low"], "control_high": r.control["high"], "p": r.p,
                "reason": r.reason,
            }
            for r in self.rows
        )  # fmt: skip

    def plot(self) -> Any:
        """The verdicts as a forest plot (a matplotlib Figure)."""
        from tl_em.report.plots import verdicts

        return verdicts(self.rows)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.comparison(self)

    def __repr__(self) -> str:
        lines = [f"{r.question:<13}{r.direction:<22}{r.verdict:<13}{r.estimate!r}  {r.reason}" for r in self.rows]
        return showable("\n".join([self.summary, *lines, *self.unmeasured.values()]), lines=True)


@checked(controls=COUNT, seed=SEED)
@in_plain_torch
def compare(
    pair: ModelPair,
    directions: Mapping[str, tuple[Direction, ContrastSet]],
    *,
    behaviour: Behaviours | None = None,
    tuning_data: Sequence[Any] | None = None,
    benign: LensModel | None = None,
    controls: int = 999,
    seed: int = 0,
    layers: Mapping[str, Sequence[Direction]] | None = None,
) -> Comparison:
    """Ask what a fine-tune did to directions, and what the directions do.

    Args:
        pair: base and tuned.
        directions: for each name the base's direction and the contrast set that it is judged on: prompts that it was
            neither extracted nor selected on.
        behaviour: what the directions may cause: a metric (measured on the contrast set's own prompts), a Behaviour, or
            either for each name.  Without it *use* is not asked.
        tuning_data: rows that the model was tuned on, as chat messages that end with the answer.  Without it
            *entanglement* is not asked.
        benign: a fine-tune of the same base on harmless data; changes must go beyond what it shows.
        controls: number of random directions (or swaps) for each test.
        seed: seed of all resampling and controls.
        layers: for each name its directions at every layer, for ``by_layer``; by default the one direction, read at
            every layer of its stream.

    Returns:
        A Comparison; directions that do not separate their own contrast set in the base model are left out, under
        ``unmeasured``.

    Raises:
        NoGapError: no direction separates its own contrast set in the base model.
        ProvenanceError, WidthError: a direction was not made on a model like these.
        UsageError: no directions, too few controls, or a name without a behaviour.
    """
    import pandas as pd

    _check(pair, directions, controls)
    findings: list[Finding] = []
    table: list[dict[str, Any]] = []
    drawn: list[dict[str, Any]] = []
    unmeasured: dict[str, str] = {}
    own = None if tuning_data is None else answer_to_own_prompts(pair.base, tuning_data, seed=seed)
    for name, (direction, contrast) in tqdm(directions.items(), desc="comparing", unit="direction", disable=None):
        by_layer = _at_layers(direction, pair.base.cfg.n_layers, None if layers is None else layers.get(name))
        measured = [*_measure(pair, benign, name, [direction, *by_layer], contrast, seed)]
        try:
            findings += changes(measured[0], controls=controls)
        except NoGapError as error:
            unmeasured[name] = str(error)
            continue
        drawn += [row for m in measured[1:] for row in layer_rows(m, controls=controls)]
        if behaviour is not None:
            tested = cause(
                pair.base, pair.tuned, direction, _behaviour_of(behaviour, name, contrast),
                name=name, random=measured[0].controls(controls), seed=seed,
            )  # fmt: skip
            findings.append(tested.finding)
            table += tested.table
        if tuning_data is not None and own is not None:
            findings.append(
                entanglement(measured[0], pair.base, pair.tuned, benign, tuning_data, own, controls=controls)
            )
    if not findings:
        raise NoGapError("\n".join(unmeasured.values()))
    return Comparison(judge(findings), pd.DataFrame(drawn), pd.DataFrame(table), unmeasured)


def _check(pair: ModelPair, directions: Mapping[str, tuple[Direction, ContrastSet]], controls: int) -> None:
    check_names(directions)
    if not directions:
        raise UsageError("no direction to compare; pass {name: (direction, contrast)}")
    fewest = max(99, 20 * len(directions))  # 1 / (1 + controls), times the directions, below .05
    if controls < fewest:
        raise UsageError(
            f"{controls} controls cannot show anything for {len(directions)} directions at p < .05 after Holm; pass "
            f"controls={fewest} or more"
        )
    for direction, _ in directions.values():
        check_fits(direction, pair.base)
        check_fits(direction, pair.tuned)


def _at_layers(direction: Direction, n_layers: int, given: Sequence[Direction] | None) -> list[Direction]:
    if given is not None:
        return list(given)
    return [replace(direction, site=Site(layer, direction.site.stream)) for layer in range(n_layers)]


def _measure(
    pair: ModelPair,
    benign: LensModel | None,
    name: str,
    directions: Sequence[Direction],
    contrast: ContrastSet,
    seed: int,
) -> Iterator[Measured]:
    """Capture every site that is needed in one pass a model and class, then hand out the readings direction by
    direction."""
    sites = list(dict.fromkeys(d.site for d in directions))
    models = [pair.base, pair.tuned, *([] if benign is None else [benign])]
    acts = [
        [capture(model, prompts, sites, position=directions[0].position).double().cpu().numpy()
         for prompts in (contrast.positive, contrast.negative)]
        for model in models
    ]  # fmt: skip
    for direction in directions:
        s = sites.index(direction.site)
        readings = [Reading(np.ascontiguousarray(p[:, s]), np.ascontiguousarray(n[:, s])) for p, n in acts]
        yield Measured(
            name, direction, contrast, readings[0], readings[1], readings[2] if benign is not None else None, seed
        )


def _behaviour_of(behaviour: Behaviours, name: str, contrast: ContrastSet) -> Behaviour:
    own = behaviour
    if isinstance(behaviour, Mapping):
        if name not in behaviour:
            raise UsageError(
                f"no behaviour for direction {name!r}; there are {sorted(behaviour)}: add one under its name"
            )
        own = behaviour[name]
    if isinstance(own, Behaviour):
        return own
    assert isinstance(own, Metric)
    return Behaviour(
        own.name, own, contrast.positive, contrast.negative,
        present_groups=contrast.positive_groups, absent_groups=contrast.negative_groups,
    )  # fmt: skip


def _sentence(name: str, rows: Mapping[str, Row]) -> tuple[int, str]:
    """What to say of one direction, and how far up to say it."""
    level, use = rows.get("level"), rows.get("use")
    others = " and ".join(rows[q].verdict for q in ("separation", "rotation") if q in rows and rows[q].shown)
    if level is not None and level.shown:
        moved = f"{level.estimate} {level.unit} at {level.site}"
        if use is not None and use.shown:
            return 0, f"{name} is {level.verdict} ({moved}) and causal there."
        return 1, f"{name} is shifted, not shown to matter ({moved})."
    return (2, f"{name} is {others}; no change of its level shown.") if others else (3, "")
