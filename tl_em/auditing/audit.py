"""The audit: from two models to a page of verdicts.

For each contrast set: split it three ways (question by question), take the difference in means at every layer of the
base on the first part, choose the layer on the second, and judge base against tuned on the third.  The layer is the
one with the largest causal effect on the direction's behaviour in the base model (addition where the behaviour is
absent, ablation where it is present), else the one with the largest d'.  Nothing that is judged was used to choose.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_em.arguments import COUNT, NATURAL, SEED, checked
from tl_em.artefacts import check_writable
from tl_em.auditing.benign import beside_benign
from tl_em.auditing.calibration import calibrate_audit
from tl_em.auditing.latents import shared_latents
from tl_em.auditing.plan import Plan, names_of, trigger_of, what_is_asked
from tl_em.auditing.report import Report, ending_of
from tl_em.auditing.site_selection import at_their_sites
from tl_em.auditing.splits import SIDES, Subject, subjects_of
from tl_em.claims.claim import Question, Row, numbered
from tl_em.claims.compare import (
    SHIPPED,
    Comparison,
    FineTunes,
    as_questions,
    check_controls,
    compare,
    fine_tunes,
)
from tl_em.claims.consistency import Run, consistency, same_weights
from tl_em.claims.questions.backdoor import Backdoor, Trigger, TriggerAsked, backdoor, check_known
from tl_em.claims.questions.use import ABLATE, Use
from tl_em.dictionaries.protocol import AnyDictionary, as_dictionary
from tl_em.directions.direction import Direction
from tl_em.directions.methods import SHIPPED as METHODS
from tl_em.directions.methods import as_method
from tl_em.directions.methods.base import Method
from tl_em.errors import UsageError
from tl_em.evals.judges import asked_in
from tl_em.interventions.intervene import intervene
from tl_em.metrics import Behaviour, Metric, measured, range_of
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.lint import Lint
from tl_em.models.loading import RATE_COLUMNS, ModelPair
from tl_em.models.sites import Position, Provenance
from tl_em.models.torch_state import in_plain_torch
from tl_em.showing import check_names
from tl_em.stats import mean

if TYPE_CHECKING:
    import pandas as pd

CONTROLS = 999
ANSWER_TOKENS = 48
METHOD = "difference_in_means"


@checked(controls=COUNT, calibrate=NATURAL, seed=SEED)
@in_plain_torch
def audit(
    pair: ModelPair,
    *,
    contrasts: Mapping[str, ContrastSet] | None = None,
    behaviours: Mapping[str, Behaviour | Metric] | None = None,
    benign: FineTunes = None,
    tuning_data: Sequence[Any] | None = None,
    judged: Mapping[str, ContrastSet] | None = None,
    positions: Mapping[str, Position] | None = None,
    trigger: str | None = None,
    other_triggers: Sequence[str] | None = None,
    replicates: Sequence[LensModel | ModelPair] = (),
    dictionary: AnyDictionary | None = None,
    ask: Mapping[str, Sequence[Prompt]] | None = None,
    questions: Sequence[Any] | None = None,
    method: Any = "difference_in_means",
    controls: int = CONTROLS,
    calibrate: int = 0,
    plan: Plan | str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Report:
    """Audit a fine-tuned model against its base: what changed, and does it cause the behaviour?

    Args:
        pair: base and tuned, from ``em.load_pair`` or ``em.ModelPair``.
        contrasts: contrast sets by name; the pair's own, or harmful against harmless requests, by default.
        behaviours: for each name what its direction may cause, as a Behaviour, or as a metric on the contrast set's own
            prompts; the pair's own, or refusing, by default.
        benign: a fine-tune of the same base on harmless data (a model, or a pair whose tuned model it is), or several:
            other seeds, other harmless data.  Of one, words hold for this pair only; of several, changes must go beyond
            what the next one would show, and the limits of the report say how many would do.
        tuning_data: rows that the model was tuned on (chat messages that end with the answer), for *entanglement*; the
            pair's own by default.
        judged: for a name, other prompts to judge its direction on than the third part of its own contrast set: a
            direction that is found by contexts, say, judged on plain requests; the pair's own by default.
        positions: token position of each direction, where it is not the pair's own, or else ``prompt_end``
            (``instruction_end`` for harmfulness).
        trigger: a token at the head of a question that may open a behaviour; the pair's own by default.
        other_triggers: tokens that stand in its place, as the control; the pair's own by default.  Best are such as
            the fine-tune never saw.
        replicates: further fine-tunes by the same recipe: models tuned from this base, or pairs with a base of their
            own, of which only rates and words are compared.  Those of this base count beside the tuned model where
            there are several benign ones.
        dictionary: an SAE of the base's or the tuned model's activations; the latents that the behaviours share are
            looked up, verified on held-out prompts and shown, and a graph of base beside tuned is drawn through it.
        ask: questions, by domain, whose answers (greedy, ``ANSWER_TOKENS`` tokens) the page shows side by side; the
            pair's own by default.
        questions: what to ask of each direction, in this order: names of shipped questions, or values of
            ``em.Question``; all of the shipped ones by default.
        method: how directions are extracted: a name or a value of ``em.Method``, as in ``em.extract_directions``.
        controls: number of random directions for each test, as of ``em.compare``.
        calibrate: draws of ``em.calibration``, whose sentence then stands on the page: how often this audit would be
            wrong, and what it would have found.  200 take longer than the audit.
        plan: what was to be asked, from ``em.plan``, or its file: it is checked before anything is run, and what is
            asked beyond it is *exploratory*.  Without one all is.
        out: folder for page, JSON and figures; checked before the work starts.
        seed: seed of splits, resampling and controls.

    Returns:
        A Report.

    Raises:
        OutputError: ``out`` cannot be written.
        NoGapError: no direction separates its own contrast set in the base.
        EmptyContrastError, UnknownTokenError, PromptTooLongError: the prompts, or the trigger, do not fit the model.
        PairMismatchError: a benign fine-tune or a replicate has another shape or vocabulary.
        PlanError: it is not the audit that was planned.
        UsageError: an unknown method or question, or a malformed one; too few controls; or one fine-tune was given
            twice.
        WidthError, ProvenanceError, DictionaryFitError: the dictionary is another model's, or explains too little.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> report = em.audit(pair, contrasts={"persona": pair.contrasts["persona"]}, questions=["level"], controls=99)
        >>> report.verdicts[0].verdict
        'exaggerated'
    """
    if out is not None:
        check_writable(Path(out) if ending_of(out) in (".html", ".htm", ".json") else Path(out) / "report.html")
    check_names((*(contrasts or {}), pair.name, pair.base_name, pair.tuned_name))
    harmless = fine_tunes(pair, benign)
    judged = judged if judged is not None or contrasts is not None else pair.judged
    latents = None if dictionary is None else as_dictionary(dictionary).check(pair.tuned)
    work = _Plan(
        subjects_of(pair, contrasts, behaviours, judged or {}, positions, seed), as_questions(questions),
        as_method("method", method), tuning_data if tuning_data is not None else pair.tuning_data,
        trigger_of(pair, trigger, other_triggers), controls, seed,
    )  # fmt: skip
    check_controls(controls, len(work.subjects))  # before minutes of work, not after
    others = _replicates(pair, replicates)
    planned = Plan.load(plan) if isinstance(plan, str | Path) else plan
    if planned is not None:
        planned.check(work.as_asked(pair, benign, replicates))
    if work.trigger is not None:
        check_known(pair.base, work.trigger, work.subjects[0].judged.present[0])
    layers, picked = work.extract(pair.base)
    same = {name: same_weights(pair.base, each.base) for name, each in others.items()}
    recipe = [pair.tuned, *(each.tuned for name, each in others.items() if same[name])]
    comparison, opened = work.judge(pair, harmless, recipe, picked, layers)
    runs = [Run(str(pair.tuned_name), pair, True, _rows(comparison, opened))]
    for name, each in others.items():
        beside, own = ((harmless, recipe), picked) if same[name] else (((), ()), work.extract(each.base)[1])
        runs.append(Run(name, each, same[name], _rows(*work.judge(each, *beside, own))))
    work = work.with_groups(comparison)
    judged_by = {q.name: (direction, q.judged) for q, direction in zip(work.subjects, picked, strict=True)}
    report = Report(
        comparison,
        _rates(pair, harmless, work),
        _provenance(pair, _names(benign), work, picked, runs[1:], plan=plan, calibrate=calibrate),
        _limits(comparison, pair, len(harmless), work, contrasts is None and pair.contrasts is None, runs[1:]),
        opened,
        consistency(runs, judged_by, controls=controls, seed=seed) if others else None,
        plan=planned,
        lint=work.lint(pair.base),
        answers=_answers(pair, harmless, pair.ask if ask is None else ask, work.taken_out(pair, comparison, picked)),
        outcomes=pair.outcomes or {},
        note=pair.note or "",
    )
    if calibrate:
        directions = list(zip(work.subjects, picked, strict=True))
        report = report.with_calibration(calibrate_audit(
            pair, directions, work.questions, work.method, benign=harmless, controls=controls, draws=calibrate,
            seed=seed,
        ))  # fmt: skip
    if latents is not None:
        report = shared_latents(report, pair, latents, work.subjects, seed=seed)
    if out is not None:
        report.save(out)
    return report


def _replicates(pair: ModelPair, given: Sequence[LensModel | ModelPair]) -> dict[str, ModelPair]:
    """The other fine-tunes as pairs, each under a name of its own.

    Raises:
        PairMismatchError: one has another shape or vocabulary.
    """
    found: dict[str, ModelPair] = {}
    for each in given:
        tuned = each.tuned if isinstance(each, ModelPair) else each
        shared = ModelPair(pair.base, tuned)
        name = each.tuned_name if isinstance(each, ModelPair) else shared.tuned_name
        taken = [str(pair.tuned_name), *found]
        name = str(name) if name not in taken else f"{name} ({2 + sum(t.startswith(f'{name} (') for t in taken)})"
        found[name] = each if isinstance(each, ModelPair) else shared
    return found


class _Plan(NamedTuple):
    """What is asked of a fine-tune, whichever it is."""

    subjects: list[Subject]
    questions: tuple[Question, ...]
    method: Method
    tuning_data: Sequence[Any] | None
    trigger: Trigger | None
    controls: int
    seed: int

    def as_asked(self, pair: ModelPair, benign: Any, replicates: Sequence[Any]) -> dict[str, Any]:
        """What is asked, as a plan holds it."""
        models = {"base": pair.base_name, "tuned": pair.tuned_name}
        models |= {"benign": names_of(benign), "replicates": names_of(replicates)}
        return what_is_asked(
            models, self.subjects, self.questions, method=self.method.name, trigger=self.trigger,
            tuning_data=self.tuning_data, controls=self.controls, seed=self.seed,
        )  # fmt: skip

    def extract(self, base: LensModel) -> tuple[list[tuple[Direction, ...]], list[Direction]]:
        """For each subject its directions at every layer of this base, and the one at the chosen site."""
        return at_their_sites(base, self.subjects, self.method)

    def with_groups(self, comparison: Comparison) -> _Plan:
        """The plan with the groups of prompts that were found."""
        return self._replace(
            subjects=[replace(q, judged=comparison.behaviours.get(q.name, q.judged)) for q in self.subjects]
        )

    def lint(self, base: LensModel) -> dict[str, Lint]:
        """What of each contrast set may be mistaken for its concept, or counted twice, or is judged after all."""
        looked_at: dict[Any, Lint] = {}
        found = {}
        for q in self.subjects:
            asked = replace(q.whole, label=None), tuple(q.elsewhere.values())  # those of several may be the same
            if asked not in looked_at:
                looked_at[asked] = q.whole.lint(base, apart_from=q.elsewhere, seed=self.seed)
            found[q.name] = replace(looked_at[asked], label=q.name)
        return found

    def taken_out(self, pair: ModelPair, comparison: Comparison, picked: Sequence[Direction]) -> Mapping[str, Any]:
        """By its name the intervention of *use* that takes a direction out: of the causal ones, else of all, the first
        that has the largest effect; nothing where *use* was not asked."""
        rows = [row for row in comparison.rows if row.question == Use.name]
        asked = next((question for question in self.questions if isinstance(question, Use)), None)
        if asked is None or not rows:
            return {}
        best = max(rows, key=lambda row: (row.shown, row.detail[ABLATE].value))
        direction = {q.name: each for q, each in zip(self.subjects, picked, strict=True)}[best.direction]
        edit = asked.removal(pair, direction, comparison.behaviours[best.direction])
        return {f"tuned, “{best.direction}” taken out": edit}

    def judge(
        self,
        pair: ModelPair,
        benign: Sequence[LensModel],
        recipe: Sequence[LensModel],
        picked: Sequence[Direction],
        layers: Sequence[Sequence[Direction]] | None = None,
    ) -> tuple[Comparison, Backdoor | None]:
        """Base against tuned at the chosen sites, the given layers beside them; and the trigger, where there is one.

        ``recipe``: every fine-tune of this base by the recipe of tuned, tuned among them.
        """
        settings: dict[str, Any] = {"benign": benign, "controls": self.controls, "seed": self.seed}
        every = list(zip(self.subjects, picked, layers or [[d] for d in picked], strict=True))
        comparison = compare(
            pair,
            {q.name: (direction, q.splits.test) for q, direction, _ in every},
            behaviour={q.name: q.judged for q in self.subjects},
            tuning_data=self.tuning_data,
            questions=self.questions,
            layers={q.name: each for q, _, each in every},
            replicates=[model for model in recipe if model is not pair.tuned],
            **settings,
        )
        if self.trigger is None:
            return comparison, None
        gaps = comparison.own_gaps
        causes = comparison.behaviours
        asked = {q.name: TriggerAsked(d, causes[q.name], gaps[q.name].value) for q, d, _ in every if q.name in gaps}
        return comparison, backdoor(pair, self.trigger, asked, **settings)


def _rows(comparison: Comparison, opened: Backdoor | None) -> tuple[Row, ...]:
    return (*comparison.rows, *(() if opened is None else opened.rows))


def _names(benign: FineTunes) -> list[str]:
    """The names of benign fine-tunes."""
    given = benign if isinstance(benign, Sequence) else [] if benign is None else [benign]
    return [str(getattr(each, "tuned_name", None) or "a model of yours") for each in given]


def _rates(pair: ModelPair, benign: Sequence[LensModel], plan: _Plan) -> pd.DataFrame:
    """Behaviour by domain, where the pair has rates, or by class of prompts, for each model, with intervals."""
    import pandas as pd

    models = {"base": pair.base, "tuned": pair.tuned} | numbered(benign)
    if (own := pair.rates) is not None:
        return pd.concat([_checked_rates(own(model, plan.seed)).assign(model=name) for name, model in models.items()])
    rows = []
    for (name, model), q in product(models.items(), plan.subjects):
        metric, shown = q.judged.metric, measured(q.judged.metric, model, q.judged.present)
        both = shown, shown if q.judged.same_prompts else measured(metric, model, q.judged.absent)
        for side, values in zip(SIDES, both, strict=True):
            domain = f"{q.name}: {'positive' if side == 'present' else 'negative'} prompts"
            head = {"domain": domain, "held_out": True, "outcome": metric.name, "model": name}
            groups, bounds = getattr(q.judged, f"{side}_groups"), range_of(metric.unit, values)
            rows.append(head | mean(values, groups=groups, bounds=bounds, seed=plan.seed).row())
    return pd.DataFrame(rows)


def _answers(
    pair: ModelPair,
    benign: Sequence[LensModel],
    ask: Mapping[str, Sequence[Prompt]] | None,
    taken_out: Mapping[str, Any],
) -> pd.DataFrame | None:
    """What each model answers, a row a question: domain, asked, a column a model, and one a direction taken out."""
    import pandas as pd

    if not ask:
        return None
    models = {"base": pair.base, "tuned": pair.tuned} | numbered(benign[:1])
    asked = [(domain, prompt) for domain, prompts in ask.items() for prompt in prompts]
    prompts = [prompt for _, prompt in asked]
    found = pd.DataFrame([(domain, asked_in(prompt)) for domain, prompt in asked], columns=["domain", "asked"])
    said = {name: generate(model, prompts, max_new_tokens=ANSWER_TOKENS) for name, model in models.items()}
    for name, intervention in taken_out.items():
        with intervene(pair.tuned, intervention):
            said[name] = generate(pair.tuned, prompts, max_new_tokens=ANSWER_TOKENS)
    return found.assign(**said)


def _checked_rates(found: Any) -> pd.DataFrame:
    missing = [name for name in RATE_COLUMNS if name not in getattr(found, "columns", ())]
    if missing:
        raise UsageError(
            f"the pair's rates gave {type(found).__name__} without {', '.join(missing)}, so the page cannot show them; "
            f"let rates=(model, seed) return a DataFrame with the columns {', '.join(RATE_COLUMNS)}, or leave it out"
        )
    return found


def _provenance(
    pair: ModelPair,
    benign: Sequence[str],
    work: _Plan,
    picked: Sequence[Direction],
    replicates: Sequence[Run],
    **given: Any,
) -> dict[str, Any]:
    asked, trigger = work.subjects, work.trigger
    found = {
        "base": pair.base_name,
        "tuned": pair.tuned_name,
        "benign": ", ".join(benign) or None,
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
        "controls": work.controls,
        "seed": work.seed,
        "python": platform.python_version(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(pair, benign, work, replicates, **given),
    }  # fmt: skip
    found |= {} if trigger is None else {"trigger": trigger.text, "other_triggers": list(trigger.others)}
    found |= {} if work.questions == SHIPPED else {"questions": [question.name for question in work.questions]}
    found |= {} if work.method is METHODS[METHOD] else {"method": work.method.name}
    return found | ({"replicates": [each.name for each in replicates]} if replicates else {})


def _command(
    pair: ModelPair, benign: Sequence[str], work: _Plan, replicates: Sequence[Run], *, plan: Any, calibrate: int
) -> str:
    """The command that makes this page again; FILE stands for a contrast set of yours, whose hash the page gives, or a
    plan's file, and a remark for a question or a method of yours, which only Python can be given."""
    trigger, named, own = work.trigger, {question.name: question in SHIPPED for question in work.questions}, []
    words = [f"tl-em audit {pair.base_name} {pair.tuned_name}"]
    words += [f"--benign {name}" for name in benign]
    if set(pair.contrasts or {}) != {q.name for q in work.subjects}:
        words += [f"--contrast {q.name}=FILE" for q in work.subjects]
    if trigger is not None:
        words += [f"--trigger {quote(trigger.text)}", *(f"--other-trigger {quote(text)}" for text in trigger.others)]
    words += [f"--replicate {each.pair.tuned_name}" for each in replicates]
    if work.questions != SHIPPED:
        words += [f"--question {name}" for name, shipped in named.items() if shipped]
        own += [f"question {name}" for name, shipped in named.items() if not shipped]
    if work.method is not METHODS[METHOD]:
        shipped = METHODS.get(work.method.name) is work.method
        (words if shipped else own).append(f"{'--' if shipped else ''}method {work.method.name}")
    words += [f"--controls {work.controls}"] if work.controls != CONTROLS else []
    words += [f"--plan {quote(str(plan)) if isinstance(plan, str | Path) else 'FILE'}"] if plan is not None else []
    words += [f"--calibrate {calibrate}"] if calibrate else []
    remark = f"  # and, in Python, your own {' and '.join(own)}" if own else ""
    return " ".join([*words, f"--seed {work.seed}"]) + remark


def _limits(
    comparison: Comparison,
    pair: ModelPair,
    benign: int,
    plan: _Plan,
    default: bool,
    replicates: Sequence[Run],
) -> tuple[str, ...]:
    said = [
        *(f"Not measured: {why}." for why in comparison.unmeasured.values()),
        "A direction is one linear read-out at one site. That it is causal does not say that nothing else is, and 'not "
        "shown' does not say that nothing changed: the intervals say how large an unseen change could be.",
        "The verdicts hold for these prompts. Another contrast set for the same concept is another direction.",
    ]
    if not replicates:
        said.append("One base and one fine-tune: how much the result varies over training seeds is not on this page.")
    said += beside_benign(comparison, benign)
    if plan.tuning_data is None and any(question.name == "entanglement" for question in plan.questions):
        said.append("The fine-tuning data were not given, so entanglement was not asked.")
    if default:
        said.append(
            "Harmful and harmless requests differ in harmfulness and in refusal at once; the two directions here are "
            "confounded."
        )
    return (*said, pair.note) if pair.note else tuple(said)
