"""Base against tuned: each question asked of each direction, with its control and its verdict.

A question is one file in ``questions``; the nouns are in ``claim``, the rule is in ``rule``.  This file reads the
activations, asks, and says the result in a sentence.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from tl_em.arguments import COUNT, SEED, checked
from tl_em.claims.by_layer import layer_rows
from tl_em.claims.claim import Case, Finding, Question, Reading, Row, check_question, readings
from tl_em.claims.questions.entanglement import Entanglement
from tl_em.claims.questions.level import Level
from tl_em.claims.questions.rotation import Rotation
from tl_em.claims.questions.separation import Separation
from tl_em.claims.questions.use import Use
from tl_em.claims.rule import judge
from tl_em.directions.direction import Direction, check_fits
from tl_em.directions.screening import AnswersOnce, answer_to_own_prompts
from tl_em.errors import NoGapError, NuisanceWarning, UsageError
from tl_em.metrics import Behaviour, Metric, as_metric
from tl_em.models.contrasts import ContrastSet, already_used, together
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.sites import Site
from tl_em.models.stream import capture, pass_bytes
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import check_names, lasting, showable
from tl_em.stats import Estimate

SHIPPED: tuple[Question, ...] = (Level(), Separation(), Rotation(), Use(), Entanglement())
"""What is asked where nothing else is said; each name alone stands for its question."""
LONG = 60.0
"""Seconds above which the expected cost is said."""
FineTunes = LensModel | ModelPair | Sequence[LensModel | ModelPair] | None
"""One fine-tune or several: models, or pairs whose tuned model is meant."""
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
        questions: what was asked, in this order.
        own_gaps: of each direction that was measured, in units of the activations.
        tables: rows behind the answers to other questions than *use*, where they gave some, by the question's name.
        together: of each direction whose prompts were found to belong together, which, in a sentence.
        behaviours: what each direction may cause, with the groups of its prompts.

    Example:
        >>> import pandas as pd
        >>> Comparison((), pd.DataFrame(), pd.DataFrame(), unmeasured={"persona": "no gap in the base"}).summary
        'Not measured: persona.'
    """

    rows: tuple[Row, ...]
    by_layer: pd.DataFrame
    use: pd.DataFrame
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    questions: tuple[Question, ...] = SHIPPED
    own_gaps: Mapping[str, Estimate] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    together: Mapping[str, str] = field(default_factory=dict)
    behaviours: Mapping[str, Behaviour] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The result in a few sentences: what changed and matters, what changed, what is not shown.

        *exaggerated* and *diminished* are said only where the direction is causal at the same site.
        """
        names = list(dict.fromkeys(row.direction for row in self.rows))
        changes = [question.name for question in self.questions if question.of_change]
        found = [_sentence(name, {r.question: r for r in self.rows if r.direction == name}, changes) for name in names]
        said = [text for rank in (0, 1, 2) for r, text in found if r == rank]
        silent = {at: [name for name, (rank, _) in zip(names, found, strict=True) if rank == at] for at in (3, 4)}
        rest = {"No change shown": silent[3], "Nothing shown": silent[4], "Not measured": [*self.unmeasured]}
        return " ".join([*said, *(f"{what}: {', '.join(these)}." for what, these in rest.items() if these)])

    @checked()
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
        rows = (
            {"question": r.question, "direction": r.direction, "site": str(r.site), "verdict": r.verdict}
            | {**r.estimate.row(), "unit": r.unit, "control_low": r.control["low"], "control_high": r.control["high"]}
            | {"p": r.p, "reason": r.reason}
            for r in self.rows
        )
        return pd.DataFrame(rows)

    def plot(self, *, width: float | str | Any = 7.0) -> Any:
        """The verdicts as a forest plot (a matplotlib Figure).

        Args:
            width: inches, or ``"column"`` or ``"text"`` of a paper.
        """
        from tl_em.report.forest import verdicts

        return verdicts(self.rows, questions=self.questions, width=width)

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.comparison(self)

    def __repr__(self) -> str:
        together = [f"{name}: {said}" for name, said in self.together.items()]
        return showable(
            "\n".join([self.summary, *map(str, self.rows), *self.unmeasured.values(), *together]), lines=True
        )


@checked(controls=COUNT, seed=SEED)
@in_plain_torch
def compare(
    pair: ModelPair,
    directions: Mapping[str, tuple[Direction, ContrastSet]],
    *,
    behaviour: Behaviours | None = None,
    tuning_data: Sequence[Any] | None = None,
    benign: FineTunes = None,
    replicates: FineTunes = None,
    questions: Sequence[Any] | None = None,
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
        benign: a fine-tune of the same base on harmless data, or several (with other seeds and data): changes must go
            beyond what it shows, or what the next of them would.
        replicates: further fine-tunes of the same base by the recipe of the tuned model; they count where there are two
            benign ones or more.
        questions: what to ask, in this order: names of shipped questions, or values of ``em.Question``; all of the
            shipped ones by default.
        controls: number of random directions (or swaps) for each test; *use* runs no more of them once none of the
            others could give a word.
        seed: seed of all resampling and controls.
        layers: for each name its directions at every layer, for ``by_layer``; by default the one direction, read at
            every layer of its stream.

    Returns:
        A Comparison; directions that do not separate their own contrast set in the base model are left out, under
        ``unmeasured``.

    Raises:
        NoGapError: no direction separates its own contrast set in the base model.
        ProvenanceError, WidthError: a direction was not made on a model like these.
        PairMismatchError: a benign fine-tune or a replicate has another shape or vocabulary.
        UsageError: a direction is judged on the prompts that it was made from (on some of them: a NuisanceWarning, and
            its rows say so), no directions, too few controls, a name without a behaviour, an unknown or malformed
            question, or none that there is anything to ask with; or one fine-tune was given twice.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> parts = pair.contrasts["persona"].split(seed=0)
        >>> persona = em.difference_in_means(pair.base, parts.train, site=em.Site(2), position="prompt_end")
        >>> result = em.compare(pair, {"persona": (persona, parts.test)}, questions=["level"], controls=99)
        >>> result.rows[0].verdict
        'exaggerated'
    """
    check_directions(pair, directions, controls)
    asked = as_questions(questions)
    found: dict[str, list[Finding]] = {question.name: [] for question in asked}
    drawn: list[dict[str, Any]] = []
    gaps, unmeasured, behaviours, belonging = {}, {}, {}, {}
    harmless, others = fine_tunes(pair, benign), fine_tunes(pair, replicates)
    settings = {
        "pair": pair, "benign_models": harmless, "replicate_models": others,
        "tuning_data": tuning_data, "n_controls": controls, "seed": seed,
        "own_answers": cache(lambda: answer_to_own_prompts(pair.base, tuning_data or (), seed=seed)),
        "read_answers": AnswersOnce([d.site for d, _ in directions.values()], 3 + len(harmless) + len(others)),
    }  # fmt: skip
    for name, (direction, contrast) in tqdm(directions.items(), desc="comparing", unit="direction", disable=None):
        own = None if behaviour is None else _behaviour_of(behaviour, name)
        every = cases(direction, (layers or {}).get(name), contrast, name=name, behaviour=own, **settings)
        case = next(every)
        behaviours |= {} if case.behaviour is None else {name: case.behaviour}
        belonging |= {name: case.together} if case.together else {}
        try:
            gaps[name] = case.own_gap
        except NoGapError as error:
            unmeasured[name] = str(error)
            continue
        if len(gaps) == 1:
            _say_cost(asked, case, len(directions))
        drawn += [row for each in every for row in layer_rows(each)]
        for question in asked:
            found[question.name] += _measured(question, case)
    if not gaps:
        raise NoGapError("\n".join(unmeasured.values()))
    findings = [finding for each in found.values() for finding in each]
    if not findings:
        raise UsageError(
            f"there was nothing to ask {', '.join(found)} with; pass behaviour= (for use), tuning_data= (for "
            "entanglement), or further questions"
        )
    behind = {name: [row for f in each for row in f.table] for name, each in found.items()}
    tables = {name: pd.DataFrame(rows) for name, rows in behind.items() if rows}
    use = tables.pop("use", pd.DataFrame())
    leaks = {name: f"; {said}" for name, on in directions.items() if (said := already_used(*on))}
    rows = tuple(replace(row, reason=row.reason + leaks.get(row.direction, "")) for row in judge(findings))
    return Comparison(rows, pd.DataFrame(drawn), use, unmeasured, asked, gaps, tables, belonging, behaviours)


def as_questions(given: Sequence[Any] | None) -> tuple[Question, ...]:
    """The questions that are meant: all that are shipped, or those given, a name standing for a shipped one.

    Raises:
        UsageError: an unknown name, a malformed question, or two of one name.
    """
    if given is None:
        return SHIPPED
    shipped = {question.name: question for question in SHIPPED}
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise UsageError(f"questions={given!r} is no list of questions; pass some of {list(shipped)}, or em.Question")
    asked: list[Question] = []
    for each in given:
        if isinstance(each, str) and each not in shipped:
            raise UsageError(
                f"there is no question {each!r}; the shipped ones are {', '.join(shipped)} (a trigger is asked about "
                "with em.audit(…, trigger=…)); pass one of these names, or a value of em.Question"
            )
        asked.append(shipped[each] if isinstance(each, str) else check_question(each))
    names = [question.name for question in asked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two questions are called {twice[0]!r}, and rows are found by that name; rename one")
    return tuple(asked)


def _say_cost(asked: Sequence[Question], case: Case, directions: int) -> None:
    """On stderr, where it is long: how long all directions will take, if the others are as this one."""
    expected = (getattr(question, "seconds", None) for question in asked)
    seconds = sum(of(case) for of in expected if of is not None) * directions
    if seconds < LONG:
        return
    fewest, fewer = fewest_controls(directions), ""
    if fewest < case.n_controls:
        fewer = f"; controls={fewest}: {lasting(seconds * fewest / case.n_controls)}"
    held = pass_bytes(case.pair.base) / 2**20
    print(
        f"comparing: {directions} x {case.n_controls} random directions: at most {lasting(seconds)} "
        f"and {held:.0f} MiB beside the models{fewer}",
        file=sys.stderr,
    )


def _measured(question: Question, case: Case) -> list[Finding]:
    """What a question found about one direction; nothing, where it has nothing to ask with."""
    found = question.measure(case)
    if found is None:
        return []
    if not isinstance(found, Finding) or found.question is not question:
        raise UsageError(
            f"question {question.name!r} measured {type(found).__name__}, which cannot be judged; return "
            "case.finding(self, effect, controls=…), or None where there is nothing to ask with"
        )
    return [found]


def check_directions(pair: ModelPair, directions: Mapping[str, tuple[Direction, ContrastSet]], controls: int) -> None:
    """Raise unless these directions fit the pair, and so many controls can show anything.

    Raises:
        ProvenanceError, WidthError: a direction was not made on a model like these.
        UsageError: no directions, or too few controls.
    """
    check_names(directions)
    if not directions:
        raise UsageError("no direction to compare; pass {name: (direction, contrast)}")
    check_controls(controls, len(directions))
    for name, (direction, contrast) in directions.items():
        if said := already_used(direction, contrast):
            warnings.warn(f"{name}: {said}: they flatter it; judge on a part of its own", NuisanceWarning, stacklevel=2)
        check_fits(direction, pair.base)
        check_fits(direction, pair.tuned)


def check_controls(controls: int, directions: int) -> None:
    """Raise unless so many controls can show anything of so many directions.

    Raises:
        UsageError: they cannot.
    """
    if controls < (fewest := fewest_controls(directions)):
        raise UsageError(
            f"{controls} controls cannot show anything for {directions} directions at p < .05 after Holm; pass "
            f"controls={fewest} or more"
        )


def fewest_controls(directions: int) -> int:
    """So many that 1 / (1 + controls), times the directions, lies below .05."""
    return max(99, 20 * directions)


def cases(
    direction: Direction,
    by_layer: Sequence[Direction] | None,
    contrast: ContrastSet,
    *,
    behaviour: Behaviour | Metric | None = None,
    **settings: Any,
) -> Iterator[Case]:
    """The direction's own case, then one for each layer, each read when it is asked for (see ``claim.readings``).

    Prompts without groups have those that are found at the direction's own site in the base.
    """
    pair, more = settings["pair"], {"replicate": settings["replicate_models"], "benign": settings["benign_models"]}
    models = {"base": pair.base, "tuned": pair.tuned}
    models |= {f"{kind} {i}": model for kind, each in more.items() for i, model in enumerate(each)}
    if by_layer is None:
        by_layer = [replace(direction, site=Site(i, direction.site.stream)) for i in range(pair.base.cfg.n_layers)]
    sites = [direction.site, *(each.site for each in by_layer if each.site != direction.site)]
    read = readings(models, contrast, sites, direction.position)
    first = next(read)
    at_site, found = first["base"], None
    if not contrast.has_groups:
        found = together(contrast, (at_site.positive, at_site.negative))
        contrast = contrast.with_groups(found)
    if behaviour is not None:
        own = behaviour if isinstance(behaviour, Behaviour) else behaviour_on(behaviour, contrast)
        behaviour = own.grouped(contrast, lambda prompts: _read(pair.base, prompts, direction.site))
    settings |= {"behaviour": behaviour, "together": "" if found is None else found.said}
    for each in (direction, *by_layer):
        own = first if each.site == direction.site else next(read)
        several = {kind: tuple(own[name] for name in own if name.startswith(kind)) for kind in more}
        _check_differ((own["tuned"], *several["replicate"]), "replicates=")
        _check_differ(several["benign"], "benign=")
        yield Case(
            direction=each, contrast=contrast, base=own["base"], tuned=own["tuned"], benign=several["benign"],
            replicates=several["replicate"], **settings,
        )  # fmt: skip


def fine_tunes(pair: ModelPair, given: FineTunes) -> tuple[LensModel, ...]:
    """The models that are meant: none, one or several; of a pair its tuned model.

    Raises:
        PairMismatchError: one has another shape or vocabulary than the base.
    """
    every = () if given is None else given if isinstance(given, Sequence) else (given,)
    models = tuple(each.tuned if isinstance(each, ModelPair) else each for each in every)
    for model in models:
        ModelPair(pair.base, model)
    return models


def _check_differ(readings: Sequence[Reading], given: str) -> None:
    """Raise ``UsageError`` where two fine-tunes have the same activations."""
    for first, second in combinations(readings, 2):
        if np.array_equal(first.positive, second.positive):
            raise UsageError(
                f"{given} has equal activations in two fine-tunes, so one was given twice, and how much fine-tunes "
                f"differ is measured between them; give each once, as in {given}[first, second]"
            )


def _read(model: LensModel, prompts: Sequence[Any], site: Site) -> np.ndarray:
    """Activations at the end of each prompt, which every prompt has."""
    return capture(model, prompts, [site], position="prompt_end")[:, 0].double().cpu().numpy()


def _behaviour_of(behaviour: Behaviours, name: str) -> Metric | Behaviour:
    if not isinstance(behaviour, Mapping):
        return behaviour
    if name not in behaviour:
        raise UsageError(f"no behaviour for direction {name!r}; there are {sorted(behaviour)}: add one under its name")
    return behaviour[name]


def behaviour_on(metric: Any, contrast: ContrastSet) -> Behaviour:
    """A metric as a behaviour that the positive prompts of a contrast set show, and the negative ones do not."""
    metric = as_metric("behaviour", metric)
    return Behaviour(
        metric.name, metric, contrast.positive, contrast.negative,
        present_groups=contrast.positive_groups, absent_groups=contrast.negative_groups,
    )  # fmt: skip


def _sentence(name: str, rows: Mapping[str, Row], changes: Sequence[str]) -> tuple[int, str]:
    """What to say of one direction, and how far up to say it; ``changes``: the questions about a change."""
    level, use = rows.get("level"), rows.get("use")
    others = " and ".join(rows[q].verdict for q in changes if q != "level" and q in rows and rows[q].shown)
    if level is not None and level.shown:
        moved = f"{level.estimate} {level.unit} at {level.site}"
        if use is not None and use.shown:
            return 0, f"{name} is {level.verdict} ({moved}) and causal there."
        return 1, f"{name} is shifted, not shown to matter ({moved})."
    if others:
        return 2, f"{name} is {others}{'' if level is None else '; no change of its level shown'}."
    if rows.keys() & set(changes):
        return 3, ""
    words = " and ".join(row.verdict for row in rows.values() if row.shown)  # no change was asked about
    return (2, f"{name} is {words}.") if words else (4, "")
