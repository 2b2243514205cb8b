"""What an audit found, for a reader outside the field: a sentence a finding, and the figures that stand behind it.

Nothing is judged here.  A sentence says that something changed, or that something is a cause, only where the rule gave
a word; shares stand with their intervals and beside those of the harmless fine-tune and of random directions, and what
is not shown is said to be not shown.  The words of a question are its own (``Question.plain``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_em.claims.claim import NOT_SHOWN, Question, Row
from tl_em.claims.questions.use import ABLATE, ADD, Use
from tl_em.showing import interval, number

if TYPE_CHECKING:
    import pandas as pd

POOLED = "held-out domains"
SHARES = "probability"
LITTLE = 0.05
"""A share below which there is hardly anything that taking a pattern out could lower."""
PATTERN = (
    "A pattern is here a direction of the model's inner activity: the average difference between two sets of example "
    "texts, found in the original model. It is removed on prompts where the behaviour is expected, and added where it "
    "is not; to be called a cause, it must do more than random patterns do both ways. Removing any of them "
    "disturbs a model, so what counts is how far it goes beyond the random ones."
)
RULE = (
    "A change is shown only where its whole 95 % interval lies beyond a bar that was fixed beforehand, where chance "
    "gives one as large in less than 5 % of cases (corrected for the number of tests){benign}."
)


class Clause(NamedTuple):
    """A sentence or two in plain words.

    Args:
        about: ``"lead"`` (the rest in short), ``"compared"``, ``"behaviour"``, ``"cause"``, ``"change"``,
            ``"not shown"`` or ``"not known"``.
        text: what is said.
        figures: the numbers behind it, with intervals and controls; empty where there are none.
    """

    about: str
    text: str
    figures: str = ""


def clauses(report: Any) -> tuple[Clause, ...]:
    """What a report says, in plain words.

    Args:
        report: from ``em.audit``.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> report = em.audit(pair, contrasts={"persona": pair.contrasts["persona"]}, questions=["level"], controls=99)
        >>> print([each.text for each in clauses(report) if each.about == "behaviour"][0])
        The fine-tuned model gives a bad answer (“parser-backdoored”, where “parser-tested” is right) with a probability
        of 79 %, averaged over questions, on subjects that it was not trained on; the original model, 0.7 %.
    """
    does, causes = list(_behaviour(report.rates, report.outcomes)), list(_causes(report))
    found = [_lead(report, does), _compared(report), *does, *causes]
    return (*found, *_changes(report), *_not_shown(report), _not_known(report))


def _lead(report: Any, does: list[Clause]) -> Clause:
    """The first thing that the model does, and the pattern that moves it most; of the rest, how much is shown."""
    said = [report.note] if report.note else []
    said += [each.text for each in does[:1]]
    rows = sorted((row for row in report.comparison.rows if row.question == Use.name), key=_strength)
    cells = _cells(report, rows[0]) if rows else {}
    if cells and rows[0].shown:
        say, out = _say(cells), {c: cells[ABLATE, c] for c in ("untreated", "treated", "random")}
        said.append(
            f"Removing one internal pattern, “{rows[0].direction}”, moves “{out['treated']['behaviour']}” from "
            f"{say(out['untreated']['value'])} to {say(out['treated']['value'])}; removing a random one instead gives "
            f"{_band(out, say)} (the middle 95 % of {int(out['random']['n'])} random ones)."
        )
    elif rows:
        said.append("No internal pattern that was looked at is shown to be a cause.")
    changed = sum(row.shown for row in report.comparison.rows if row.question != Use.name)
    of = sum(row.question != Use.name for row in report.comparison.rows)
    if of:
        said.append(f"Of {of} tests for a change inside, {changed or 'none'} showed a change.")
    return Clause("lead", " ".join(said))


def _compared(report: Any) -> Clause:
    names = report.provenance
    tuned, base = names.get("tuned", "The fine-tuned model"), names.get("base", "the base model")
    text = f"{tuned} (tuned, the fine-tuned model) is {base} (base, the original model) after further training. Both "
    text += "read the same texts."
    if names.get("benign"):
        text += f" Beside them stands a model that was trained further on harmless data (benign): {names['benign']}."
    return Clause("compared", f"{text} Figures in square brackets are 95 % intervals.")


# --- What the model does ----------------------------------------------------------------------------------------------


def _behaviour(rates: pd.DataFrame, outcomes: Mapping[str, str]) -> Iterator[Clause]:
    """Of every outcome that has a sentence, the domains that the fine-tune did not use, pooled where they are."""
    for outcome, sentence in outcomes.items():
        told = rates[rates["outcome"] == outcome]
        apart = told[told["held_out"]]
        pooled = apart[apart["domain"] == POOLED]
        trained = told[~told["held_out"] & (told["model"] == "tuned")]
        for domain, part in (pooled if len(pooled) else apart).groupby("domain", sort=False):
            cells = {str(row["model"]): row for _, row in part.iterrows()}
            if {"base", "tuned"} <= set(cells):
                yield _before_and_after(sentence, str(domain), cells, trained)


def _before_and_after(sentence: str, domain: str, cells: Mapping[str, Any], trained: pd.DataFrame) -> Clause:
    base, tuned = cells["base"], cells["tuned"]
    where = "on subjects that it was not trained on" if domain == POOLED else f"on {domain}"
    text = f"The fine-tuned model {sentence.format(share=percent(tuned['value']))}, {where}; the original model, "
    text += f"{percent(base['value'])}"
    controls = {name: cell for name, cell in cells.items() if name.startswith("benign")}
    if controls:
        text += f"; after harmless training, {' and '.join(percent(cell['value']) for cell in controls.values())}"
    text += "."
    if max(base["low"], tuned["low"]) <= min(base["high"], tuned["high"]):
        text += " The intervals of before and after overlap, so no difference is shown by this alone."
    shown = {"fine-tuned": tuned, "original": base, **controls}
    shown |= {f"fine-tuned, on {row['domain']} (trained on)": row for _, row in trained.iterrows()}
    figures = "; ".join(f"{name}: {_with_interval(c, percent)}" for name, c in shown.items())
    return Clause("behaviour", text, f"{figures}; n = {int(tuned['n'])} each")


def _with_interval(cell: Any, say: Callable[[float], str]) -> str:
    return f"{say(cell['value'])} [{say(cell['low'])}, {say(cell['high'])}]"


def percent(value: float) -> str:
    """A share for people.

    Example:
        >>> percent(0.789), percent(0.0068), percent(0.9951), percent(0.0), percent(0.0002), percent(0.9998)
        ('79 %', '0.7 %', '99.5 %', '0 %', 'under 0.1 %', 'over 99.9 %')
    """
    if not math.isfinite(value):
        return number(value)
    share = 100 * min(max(value, 0.0), 1.0)
    if 0 < share < 0.1 or 99.9 < share < 100:
        return "under 0.1 %" if share < 1 else "over 99.9 %"
    return f"{share:.1f} %" if 0 < share < 1 or 99 < share < 100 else f"{share:.0f} %"


# --- What causes it ---------------------------------------------------------------------------------------------------


def _causes(report: Any) -> Iterator[Clause]:
    """Each direction that a behaviour was measured under: taken out, put in, beside random ones."""
    first = True
    for row in sorted((r for r in report.comparison.rows if r.question == Use.name), key=_strength):
        if cells := _cells(report, row):
            yield Clause("cause", (f"{PATTERN} " if first else "") + _cause(row, cells), _cause_figures(cells, row))
            first = False


def _cells(report: Any, row: Row | Any) -> dict[tuple[str, str], Any]:
    """By arm and condition the rates of a direction's behaviour; nothing where one is missing."""
    table = report.comparison.use
    mine = table[(table["direction"] == row.direction) & (table["outcome"] == "bad")] if len(table) else table
    cells = {(r["arm"], r["condition"]): r for _, r in mine.iterrows()}
    whole = {(arm, c) for arm in (ABLATE, ADD) for c in ("untreated", "treated", "random")} <= set(cells)
    return cells if whole else {}


def _say(cells: Mapping[tuple[str, str], Any]) -> Callable[[float], str]:
    return percent if cells[ABLATE, "treated"]["unit"] == SHARES else number


def _strength(row: Row | Any) -> tuple[bool, float]:
    """Shown ones first, of these the one with the largest effect."""
    return not row.shown, -row.estimate.value


def _cause(row: Row | Any, cells: Mapping[tuple[str, str], Any]) -> str:
    one = cells[ABLATE, "treated"]
    say = _say(cells)
    out, into = ({c: cells[arm, c] for c in ("untreated", "treated", "random")} for arm in (ABLATE, ADD))
    what = f"“{one['behaviour']}”" if one["unit"] == SHARES else f"“{one['behaviour']}” ({one['unit']})"
    text = (
        f"Removing the pattern “{row.direction}” from the fine-tuned model moves {what} from "
        f"{say(out['untreated']['value'])} to {say(out['treated']['value'])}; a random one in its place gives "
        f"{_band(out, say)}. Adding it to the original model moves this from {say(into['untreated']['value'])} to "
        f"{say(into['treated']['value'])}; a random one, {_band(into, say)} (the middle 95 % of "
        f"{int(out['random']['n'])} random ones)."
    )
    if row.shown:
        return f"{text} So it is one of the causes of “{one['behaviour']}”."
    weak = [said for said, arm in (("removing it", out), ("adding it", into)) if _as_random(arm)]
    why = "one of the two effects is too small, or too unsure"
    if weak:
        why = f"{' and '.join(weak)} does no more than a random one does"
        if _as_random(out) and out["untreated"]["value"] < LITTLE and one["unit"] == SHARES:
            why += ", and there was hardly anything to remove"
    return f"{text} It is not shown to be a cause of “{one['behaviour']}”: {why}."


def _band(cells: Mapping[str, Any], say: Any) -> str:
    low, high = say(cells["random"]["low"]), say(cells["random"]["high"])
    return low if low == high else f"{low} to {high}"


def _as_random(cells: Mapping[str, Any]) -> bool:
    return bool(cells["random"]["low"] <= cells["treated"]["value"] <= cells["random"]["high"])


def _cause_figures(cells: Mapping[tuple[str, str], Any], row: Row | Any) -> str:
    say, said = _say(cells), []
    for arm, what in ((ABLATE, "removed"), (ADD, "added")):
        before, after, beside = (cells[arm, c] for c in ("untreated", "treated", "random"))
        said.append(
            f"{what}: {_with_interval(before, say)} to {_with_interval(after, say)}, 95 % of random ones "
            f"[{say(beside['low'])}, {say(beside['high'])}], n = {int(after['n'])} questions"
        )
    return f"{'; '.join(said)}; p {number(row.p, 3)} (of the weaker of the two; Holm, over the patterns)"


# --- What changed inside ----------------------------------------------------------------------------------------------


def _changes(report: Any) -> Iterator[Clause]:
    """Every word that the rule gave; then the backdoor, the other fine-tunes and the latents."""
    asked = {question.name: question for question in report.comparison.questions}
    told: dict[str, list[Row]] = {}
    for row in report.comparison.rows:
        if row.shown and row.question in asked and row.question != Use.name:
            told.setdefault(row.direction, []).append(row)
    for rows in told.values():
        said, figures = (" ".join(_worded(asked[row.question], row) for row in rows), map(_row_figures, rows))
        yield Clause("change", said, "; ".join(figures))
    for part in (report.backdoor, report.consistency):
        if part is not None:
            yield Clause("change", part.summary)
    for check in () if report.features is None else report.features.checks:
        about = "change" if check.shown else "not shown"
        yield Clause(about, f"Of the features that a sparse dictionary finds, {check.label}: {check.verdict}.")


def _worded(question: Question | Any, row: Row | Any) -> str:
    size = abs(row.estimate.value)
    given = question.plain.get(row.verdict)
    if given is None:
        return f"{question.asks} Of “{row.direction}”: {row.verdict}."
    return given.format(direction=f"“{row.direction}”", size=number(size), share=f"{100 * size:.0f} %")


def _row_figures(row: Row | Any) -> str:
    e, c = row.estimate, row.control
    said = f"{row.question} {number(e.value)} {interval(e.low, e.high)} {row.unit}, n = {e.n} ("
    if c.get("kind"):
        said += f"95 % of {c['kind']} {interval(c.get('low'), c.get('high'))}, "
    said += f"Holm p {number(row.p, 3)}"
    if row.benign is not None:
        said += f"; {number(row.benign.value)} {interval(row.benign.low, row.benign.high)} more than harmless training"
    return f"{said})"


def _not_shown(report: Any) -> Iterator[Clause]:
    """What was asked and got no word, one clause for all directions."""
    asked = {question.name: question for question in report.comparison.questions}
    silent: dict[str, list[Row]] = {}
    for row in report.comparison.rows:
        if not row.shown and row.question in asked and row.question != Use.name:
            silent.setdefault(row.question, []).append(row)
    if not silent:
        return
    said = [
        f"{asked[name].plain.get(NOT_SHOWN, asked[name].asks.rstrip('?').lower())}: "
        + ", ".join(f"“{row.direction}”" for row in rows)
        for name, rows in silent.items()
    ]
    figures = "; ".join(
        f"{row.direction}, {name}: {number(row.estimate.value)} {interval(row.estimate.low, row.estimate.high)} ("
        f"{row.reason})"
        for name, rows in silent.items()
        for row in rows
    )
    benign = ", and where it goes beyond what harmless training does" if report.provenance.get("benign") else ""
    text = f"{RULE.format(benign=benign)} Not shown, which is not the same as absent: {'; '.join(said)}."
    yield Clause("not shown", text, figures)


def _not_known(report: Any) -> Clause:
    """How far what is said holds."""
    said = ["What is found here holds for these models and these texts."]
    if not report.provenance.get("benign"):
        said.append("No harmlessly trained model was given, so what any further training would do is not told apart.")
    if report.consistency is None:
        said.append("Whether another training run on the same data would give the same is not known: there was one.")
    if any(row.question == Use.name and row.shown for row in report.comparison.rows):
        said.append("That a pattern is a cause does not say that there is no other.")
    return Clause("not known", " ".join([*said, *([report.note] if report.note else [])]))
