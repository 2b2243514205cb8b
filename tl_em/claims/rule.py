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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from tl_em.models.sites import Site
from tl_em.stats import Estimate, control_p, holm

Question = Literal["level", "separation", "rotation", "use", "entanglement", "carrier", "backdoor"]
WORDS: dict[Question, tuple[str, str | None]] = {
    "level": ("exaggerated", "diminished"),
    "separation": ("sharper", "blurred"),
    "rotation": ("rotated", None),
    "use": ("causal", None),
    "entanglement": ("entangled", "entangled"),
    "carrier": ("carries it", None),
}
"""Of *backdoor*, a question about tokens and not about a direction, ``backdoor`` has the words and the rule."""
SMALLEST_EFFECT: dict[str, float] = {"level": 0.10, "separation": 0.10, "rotation": 0.10, "entanglement": 0.10}
SMALLEST_USE: dict[str, float] = {"probability": 0.05, "log-odds": 0.5}
ALPHA = 0.05
NOT_SHOWN = "not shown"


@dataclass(frozen=True, eq=False)
class Finding:
    """What was measured for one question about one direction, before it is judged.

    Args:
        question: one of those that have words here.
        direction: the direction's name.
        site: where it was read.
        estimate: the effect with its interval.
        bootstrap_p: two-sided p of "the effect is 0".
        controls: the same effect under each control.
        control: what the controls are, in words.
        smallest: smallest effect of interest, in the estimate's units.
        unit: the estimate's units, in words.
        benign: the difference in differences against a benign fine-tune, if there is one.
        detail: further estimates that belong to it.
    """

    question: Question
    direction: str
    site: Site
    estimate: Estimate
    bootstrap_p: float
    controls: Float[np.ndarray, " control"]
    control: str
    smallest: float
    unit: str
    benign: Estimate | None = None
    detail: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def control_p(self) -> float:
        """Share of controls at least as extreme; one-sided where only one side has a word."""
        return control_p(self.estimate.value, self.controls, two_sided=WORDS[self.question][1] is not None)

    @property
    def p(self) -> float:
        """The larger of the two p values: both must be convinced."""
        return float(np.nanmax([self.bootstrap_p, self.control_p])) if np.isfinite(self.bootstrap_p) else 1.0


@dataclass(frozen=True, eq=False)
class Row:
    """One question about one direction, with its verdict.

    Args:
        question, direction, site, estimate, unit: as in :class:`Finding`; no site where tokens are judged (*backdoor*).
        verdict: the word that the rule gives, or ``"not shown"``.
        control: what the controls are, how many, the band that holds 95 % of them, and p.
        p: Holm-adjusted p over the directions of this question.
        smallest: smallest effect of interest, in the estimate's units.
        benign: difference in differences against the benign fine-tune.
        reason: what holds, or what does not, in words.
        detail: further estimates that belong to it.
    """

    question: Question
    direction: str
    site: Site | None
    verdict: str
    estimate: Estimate
    control: dict[str, Any]
    p: float
    smallest: float
    unit: str
    benign: Estimate | None
    reason: str
    detail: Mapping[str, Estimate]

    @property
    def shown(self) -> bool:
        """Whether the rule gave a word."""
        return self.verdict != NOT_SHOWN

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in ``report.json``."""
        return {
            "question": self.question,
            "direction": self.direction,
            "site": None if self.site is None else self.site.hook_name,
            "verdict": self.verdict,
            "estimate": self.estimate.to_json(),
            "unit": self.unit,
            "smallest_effect_of_interest": self.smallest,
            "control": self.control,
            "p": self.p,
            "benign": None if self.benign is None else self.benign.to_json(),
            "reason": self.reason,
            "detail": {name: estimate.to_json() for name, estimate in self.detail.items()},
        }


def judge(findings: Sequence[Finding]) -> tuple[Row, ...]:
    """Give each finding its verdict; Holm's adjustment runs over the directions within each question."""
    rows: list[Row] = []
    for question in WORDS:
        asked = [f for f in findings if f.question == question]
        adjusted = holm([f.p for f in asked]) if asked else []
        rows.extend(_row(f, float(p)) for f, p in zip(asked, adjusted, strict=True))
    return tuple(rows)


def _row(finding: Finding, p: float) -> Row:
    up, down = WORDS[finding.question]
    word = up if finding.estimate.value > 0 else down
    failed = _failed(finding, p, word)
    low, high = (float(q) for q in np.quantile(finding.controls, [0.025, 0.975]))
    return Row(
        question=finding.question,
        direction=finding.direction,
        site=finding.site,
        verdict=NOT_SHOWN if failed or word is None else word,
        estimate=finding.estimate,
        control={
            "kind": finding.control, "n": len(finding.controls), "low": low, "high": high, "p": finding.control_p,
        },
        p=p,
        smallest=finding.smallest,
        unit=finding.unit,
        benign=finding.benign,
        reason="; ".join(failed) if failed else _held(finding, p),
        detail=finding.detail,
    )  # fmt: skip


def _failed(finding: Finding, p: float, word: str | None) -> list[str]:
    """The conditions that do not hold, in words."""
    estimate, smallest = finding.estimate, finding.smallest
    failed = []
    if word is None:
        failed.append(f"the effect has the other sign ({estimate.value:+.2f} {finding.unit})")
    elif not estimate.beyond(smallest):
        failed.append(f"the interval is not wholly beyond {smallest:g} {finding.unit}")
    if not p < ALPHA:
        blame = finding.control if finding.control_p >= finding.bootstrap_p else "resampling the prompts"
        failed.append(f"Holm p = {p:.2g}, limited by {blame}")
    if finding.benign is not None and not _same_side(finding.benign, estimate, smallest):
        failed.append(f"beyond the benign fine-tune by {finding.benign} only")
    return failed


def _held(finding: Finding, p: float) -> str:
    benign = "" if finding.benign is None else f", {finding.benign} beyond the benign fine-tune"
    return f"interval wholly beyond {finding.smallest:g} {finding.unit}, Holm p = {p:.2g}{benign}"


def _same_side(benign: Estimate, estimate: Estimate, smallest: float) -> bool:
    return benign.low > smallest if estimate.value > 0 else benign.high < -smallest
