"""The rule by which a question gets a word, fixed before any data is seen; everything else is ``not shown``.

A word is given only when all of these hold:

1. the whole 95 % interval lies beyond the smallest effect of interest, on one side;
2. Holm's adjustment, over the directions within a question, of ``p = max(bootstrap p, control p)`` is below .05;
3. where a benign fine-tune is given and the question is about a change, the difference in differences
   (tuned - base) - (benign - base) passes the interval test on the same side, since any fine-tune shifts activations.

*use* asks what a direction does, not what changed, so condition 3 does not apply to it: an unharmed direction is
causal in the benign fine-tune too.  A claim with two arms (*use*: ablate in tuned, add in base; *entanglement*: before
and after training; *carrier*: projection and ablation) needs both, so its weaker arm is the one that is judged
(intersection-union test, Berger 1982).

What is judged beside other tokens (*backdoor*) or in a fixed sequence (latents) is put together from the same parts:
:func:`unlikely`, :func:`control_row`.  The smallest effect of interest stands with each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_em.claims.claim import NOT_SHOWN as NOT_SHOWN
from tl_em.claims.claim import Finding, Row
from tl_em.stats import Estimate, control_p, holm, middle_95

ALPHA = 0.05


def judge(findings: Sequence[Finding]) -> tuple[Row, ...]:
    """Give each finding its verdict; Holm's adjustment runs over the directions within each question."""
    rows: list[Row] = []
    for question in dict.fromkeys(f.question.name for f in findings):
        asked = [f for f in findings if f.question.name == question]
        both = [_both_p(f) for f in asked]
        rows.extend(_row(f, p, float(a)) for f, (_, p), a in zip(asked, both, holm([m for m, _ in both]), strict=True))
    return tuple(rows)


def unlikely(p: float, blame: str = "", *, name: str = "Holm p") -> list[str]:
    """Nothing where p is below alpha; else the condition that does not hold, in words, and what limits p."""
    return [] if p < ALPHA else [f"{name} = {p:.2g}" + (f", limited by {blame}" if blame else "")]


def adjusted(p: Sequence[float]) -> list[float]:
    """Holm's adjustment over the tests of one family."""
    return holm(p).tolist() if len(p) > 1 else [float(each) for each in p]  # statsmodels collects garbage at every call


def too_few(controls: int) -> str:
    """What to say of controls of which no effect could get a word; nothing where there are enough."""
    least = 1 / (1 + controls)
    return f" ({controls} allow none below {least:.2g})" if least >= ALPHA else ""


def control_row(kind: str, values: Any, p: float | None) -> dict[str, Any]:
    """The controls of a row: what they are, how many, the band that holds 95 % of them, and p."""
    low, high = middle_95(values).tolist()
    return {"kind": kind, "n": len(values), "low": low, "high": high, "p": p}


def _both_p(finding: Finding) -> tuple[float, float]:
    """The larger of bootstrap and control p (both must be convinced), and the control's alone.

    The control's is the share of controls at least as extreme; one-sided where only one side has a word.
    """
    rank = control_p(finding.estimate.value, finding.controls, two_sided=None not in finding.question.words)
    return float(np.nanmax([finding.bootstrap_p, rank])) if np.isfinite(finding.bootstrap_p) else 1.0, rank


def _row(finding: Finding, rank: float, p: float) -> Row:
    up, down = finding.question.words
    word = up if finding.estimate.value > 0 else down
    failed = _failed(finding, rank, p, word)
    return Row(
        question=finding.question.name,
        direction=finding.direction,
        site=finding.site,
        verdict=NOT_SHOWN if failed or word is None else word,
        estimate=finding.estimate,
        control=control_row(finding.control, finding.controls, rank),
        p=p,
        smallest=finding.smallest,
        unit=finding.unit,
        benign=finding.benign,
        reason="; ".join(failed) if failed else _held(finding, p),
        detail=finding.detail,
    )


def _failed(finding: Finding, rank: float, p: float, word: str | None) -> list[str]:
    """The conditions that do not hold, in words."""
    estimate, smallest = finding.estimate, finding.smallest
    failed = []
    if word is None:
        failed.append(f"the effect has the other sign ({estimate.value:+.2f} {finding.unit})")
    elif not estimate.beyond(smallest):
        failed.append(f"the interval is not wholly beyond {smallest:g} {finding.unit}")
    failed += unlikely(p, finding.control if rank >= finding.bootstrap_p else "resampling the prompts")
    if finding.benign is not None and not _same_side(finding.benign, estimate, smallest):
        failed.append(f"beyond the benign fine-tune by {finding.benign} only")
    return failed


def _held(finding: Finding, p: float) -> str:
    benign = "" if finding.benign is None else f", {finding.benign} beyond the benign fine-tune"
    return f"interval wholly beyond {finding.smallest:g} {finding.unit}, Holm p = {p:.2g}{benign}"


def _same_side(benign: Estimate, estimate: Estimate, smallest: float) -> bool:
    return benign.low > smallest if estimate.value > 0 else benign.high < -smallest
