"""The rule by which a question gets a word, fixed before any data is seen; everything else is ``not shown``.

A word is given only when all of these hold:

1. the whole 95 % interval lies beyond the smallest effect of interest, on one side: the p of "no farther from 0 than
   that" is below .05;
2. the effect is larger than under controls: the share of controls that do as much, of the kind with the larger share,
   is below .05;
3. where benign fine-tunes are given and the question is about a change, the difference in differences
   (tuned - base) - (benign - base) passes test 1 on the same side, since any fine-tune shifts activations.

All three are one p, the largest, and Holm's adjustment over the directions within a question keeps the chance of any
false word at .05, the edge of the smallest effect included.  *use* asks what a direction does, not what changed, so
condition 3 does not apply to it: an unharmed direction is causal in the benign fine-tune too.

**The fine-tune is the unit.**  Prompts say how well this model's change is known, not how much another fine-tune
changes, so with one benign fine-tune condition 3 holds for this pair only.  With several it asks for more than what the
*next* one would show: the interval is the prediction interval of ``stats.prediction``, from the spread between benign
fine-tunes along this very direction (other directions may spread otherwise: theirs is not borrowed), and further tuned
ones (``replicates``) count on the other side.

With ``ENOUGH`` benign fine-tunes they are the null of condition 2 too, where that of random directions is wider: these
grow with whatever else the fine-tune moved.  A tuned model that moved the stream farther than they did would be strange
to them by its strength alone, so for this their spread is taken as if they had moved it as far (``Case.farther``).
Since condition 3 holds as well, fine-tunes of one strength get a false word no more often for it.

A claim with two arms (*use*: ablate in tuned, add in base; *entanglement*: before and after training; *carrier*:
projection and ablation) needs each of them beyond its own smallest effect and its own controls, on the same side; its p
is the largest of theirs (intersection-union test, Berger 1982).  The row shows the weaker arm.

A change that is gone in a stream of the base's size is *scaled*, whatever its side.

What is judged beside other tokens (*backdoor*) or in a fixed sequence (latents) is put together from the same parts:
:func:`unlikely`, :func:`control_row`.  The smallest effect of interest stands with each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tl_em.claims.claim import NOT_SHOWN as NOT_SHOWN
from tl_em.claims.claim import RANDOM, SCALED, SPHERE, Finding, Row
from tl_em.stats import Estimate, Prediction, Resampled, control_p, holm, middle_95

ALPHA = 0.05
VERSION = 3
"""Of the rule, as plans name it; raised whenever a row could get another word."""
ENOUGH = 3
"""Benign fine-tunes that may stand in for random directions."""
BENIGN = "the benign fine-tune"


def judge(findings: Sequence[Finding]) -> tuple[Row, ...]:
    """Give each finding its verdict; Holm's adjustment runs over the directions within each question."""
    rows: list[Row] = []
    for question in dict.fromkeys(f.question.name for f in findings):
        asked = [f for f in findings if f.question.name == question]
        limits = [_limits(f) for f in asked]
        ps = adjusted([max(each.values()) for each in limits])
        rows.extend(_row(f, each, p) for f, each, p in zip(asked, limits, ps, strict=True))
    return tuple(rows)


def in_reach(finding: Finding) -> bool:
    """Whether there would be a word if no further control, of as many as are planned, did as much as the effect.

    Where there would be none, there is none with all of them: what they do could only raise p.
    """

    def best(each: Finding) -> Finding:
        less = 0.0 if _two_sided(each) else _ranked(each) - 1
        nulls = {
            kind: np.pad(null, (0, max(0, finding.planned - len(null))), constant_values=less)
            for kind, null in each.controls.items()
        }
        return replace(each, controls=nulls, arms=tuple(map(best, each.arms)))

    return judge([best(finding)])[0].shown


def unlikely(p: float, blame: str = "", *, name: str = "Holm p") -> list[str]:
    """Nothing where p is below alpha; else the condition that does not hold, in words, and what limits p."""
    return [] if p < ALPHA else [f"{name} = {p:.2g}" + (f", limited by {blame}" if blame else "")]


def adjusted(p: Sequence[float]) -> list[float]:
    """Holm's adjustment over the tests of one family."""
    return holm(p).tolist()


def too_few(controls: int) -> str:
    """What to say of controls of which no effect could get a word; nothing where there are enough."""
    least = 1 / (1 + controls)
    return f" ({controls} allow none below {least:.2g})" if least >= ALPHA else ""


def control_row(kind: str, values: Any, p: float | None) -> dict[str, Any]:
    """The controls of a row: what they are, how many, the band that holds 95 % of them, and p."""
    low, high = middle_95(values).tolist()
    return {"kind": kind, "n": len(values), "low": low, "high": high, "p": p}


def _limits(finding: Finding) -> dict[str, float]:
    """What each condition gives as its p, by what limits it; of all arms."""
    found: dict[str, float] = {}
    for each in (finding, *finding.arms):
        name = f"{each.unit}: " if finding.arms else ""
        found[f"{name}resampling the prompts"] = _within(each.effect, each.smallest)
        kind, _, p = _controlled(each)
        found[name + kind] = min(p, _beside_benign(each))
        if each.benign is not None:
            same = each.benign.estimate.value * each.estimate.value > 0
            found[name + _named(each.benign)] = _within(each.benign, each.smallest) if same else 1.0
    return found


def _beside_benign(finding: Finding) -> float:
    """The p of condition 2 where benign fine-tunes are the null, made as strong as tuned; 1 where they are too few."""
    benign = finding.benign
    if not isinstance(benign, Prediction) or len(benign.benign) < ENOUGH or not {*finding.controls} <= {RANDOM, SPHERE}:
        return 1.0
    return benign.within(0, as_far=True) if benign.estimate.value * finding.estimate.value > 0 else 1.0


def _named(benign: Resampled | Prediction) -> str:
    """What the change goes beyond, in words."""
    return f"the next of {len(benign.benign)} benign fine-tunes" if isinstance(benign, Prediction) else BENIGN


def _within(effect: Resampled | Prediction, smallest: float) -> float:
    p = effect.within(smallest) if np.isfinite(effect.estimate.low) else 1.0
    return p if np.isfinite(p) else 1.0


def _controlled(finding: Finding) -> tuple[str, np.ndarray, float]:
    """The kind of controls with the larger share that do as much, these controls, and the share.

    One-sided where only one side has a word.
    """
    value, two_sided = _ranked(finding), _two_sided(finding)
    ranked = [(kind, null, control_p(value, null, two_sided=two_sided)) for kind, null in finding.controls.items()]
    return max(ranked, key=lambda each: each[2])


def _ranked(finding: Finding) -> float:
    """The effect on the prompts of the controls."""
    return finding.estimate.value if finding.beside is None else finding.beside


def _two_sided(finding: Finding) -> bool:
    return None not in finding.question.words


def _row(finding: Finding, limits: dict[str, float], p: float) -> Row:
    up, down = finding.question.words
    word = up if finding.estimate.value > 0 else down
    failed = _failed(finding, limits, p, word)
    kind, null, rank = _controlled(finding)
    if not failed and _gone(finding):
        word = SCALED
    return Row(
        question=finding.question.name,
        direction=finding.direction,
        site=finding.site,
        verdict=NOT_SHOWN if failed or word is None else word,
        estimate=finding.estimate,
        control=control_row(kind, null, rank),
        p=p,
        smallest=finding.smallest,
        unit=finding.unit,
        benign=finding.benign and finding.benign.estimate,
        reason="; ".join([*failed, *_stopped(finding)]) if failed else _held(finding, p),
        detail=finding.detail,
        needed=_needed(finding),
    )


def _needed(finding: Finding) -> int | None:
    """How many benign fine-tunes would have let it pass, 0: no number; None: it passed, or there are too few."""
    needs = [
        each.benign.needed(each.smallest) if each.benign.estimate.value * each.estimate.value > 0 else None
        for each in (finding, *finding.arms)
        if isinstance(each.benign, Prediction) and not _same_side(each.benign.estimate, each.estimate, each.smallest)
    ]
    return None if not needs else 0 if None in needs else max(n for n in needs if n)


def _failed(finding: Finding, limits: dict[str, float], p: float, word: str | None) -> list[str]:
    """The conditions that do not hold, in words."""
    failed = []
    for each in (finding, *finding.arms):
        name = f"{each.unit}: " if each is not finding else ""
        if word is None or each.estimate.value * finding.estimate.value < 0:
            failed.append(f"{name}the effect has the other sign ({each.estimate.value:+.2f} {each.unit})")
        elif not each.estimate.beyond(each.smallest):
            failed.append(f"{name}the interval is not wholly beyond {each.smallest:g} {each.unit}")
        if each.benign is not None and not _same_side(each.benign.estimate, each.estimate, each.smallest):
            failed.append(f"{name}beyond {_named(each.benign)} by {each.benign.estimate} only")
    return failed + unlikely(p, max(limits, key=lambda name: limits[name]))


def _stopped(finding: Finding) -> list[str]:
    """That not all controls were run, and why."""
    run = min(len(null) for each in (finding, *finding.arms) for null in each.controls.values())
    if run >= finding.planned:
        return []
    return [f"stopped at {run} of {finding.planned} controls: none of the others could give it a word"]


def _gone(finding: Finding) -> bool:
    """Whether nothing is left of it in a stream of the base's size."""
    left = finding.unscaled
    return left is not None and not _same_side(left.estimate, finding.estimate, finding.smallest)


def _held(finding: Finding, p: float) -> str:
    benign = "" if finding.benign is None else f", {finding.benign.estimate} beyond {_named(finding.benign)}"
    held = f"interval wholly beyond {finding.smallest:g} {finding.unit}, Holm p = {p:.2g}{benign}"
    if not _gone(finding) or finding.unscaled is None:
        return held
    return f"{held}; of it, {finding.unscaled.estimate} in a tuned stream made as large as the base's"


def _same_side(benign: Estimate, estimate: Estimate, smallest: float) -> bool:
    return benign.low > smallest if estimate.value > 0 else benign.high < -smallest
