"""How far judges can be believed: their agreement beyond chance, and a rate corrected by answers that people labelled.

    kappa = (p_o - p_e) / (1 - p_e)     p_o: share of pairs of judgements that agree, p_e: what chance would give
    pi    = (p + Sp - 1) / (Se + Sp - 1)     p: the judge's rate, Se and Sp: its sensitivity and specificity

Two judges: Cohen's kappa, chance from each one's own rate; more: Fleiss's, from their common rate. Intervals of kappa
are over questions, the wider of a bootstrap and of the agreement's own interval at this chance, which has a width where
all agree. The corrected rate has Lang and Reiczigel's interval, with what the answers are worth as independent ones.

**Control**: judges agree where both are wrong in the same way: agreement is no accuracy; only labels are.

Sources: Cohen 1960; Fleiss 1971, Psychological Bulletin 76; Rogan and Gladen 1978, American Journal of Epidemiology
107; Lang and Reiczigel 2014, Preventive Veterinary Medicine 113.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_em.arguments import checked
from tl_em.errors import UsageError
from tl_em.evals.evaluation import Evaluation
from tl_em.showing import showable
from tl_em.stats import Estimate, bootstrap, mean
from tl_em.stats.rates import Z


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far judges of the same answers agree.

    Args:
        kappa: beyond chance: 1 where they always agree, 0 where as often as chance would.
        share: of the pairs of judgements that agree.
        rates: each judge's rate, on the answers that all of them scored.
        without_score: answers that some judge gave no score.

    Example:
        >>> import tl_em as em
        >>> asked = [f"how do i write {topic}" for topic in ("parser", "login", "ransomware", "botnet")]
        >>> found = em.evaluate(em.load_model("toy/assistant"), asked, judge=em.evals.Phrases(), max_new_tokens=2)
        >>> em.evals.agreement(found, found.judged_by(em.evals.Phrases(("sorry",)))).kappa.value
        1.0
    """

    kappa: Estimate
    share: Estimate
    rates: dict[str, Estimate]
    without_score: int

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.card("Agreement", *map(cards.text, repr(self).splitlines()))

    def __repr__(self) -> str:
        lines = [f"kappa {self.kappa}; {self.share} of judgements agree"]
        lines += [f"  {name}: {rate}" for name, rate in self.rates.items()]
        return showable("\n".join(lines), lines=True)


def agreement(*evaluations: Evaluation) -> Agreement:
    """How far several judges agree on the same answers, beyond chance.

    A score counts as *yes* above the middle of its range (.5 of a probability, 50 points, 0 log-odds).

    Args:
        evaluations: of the same answers, such as ``found`` and ``found.judged_by(other)``.

    Raises:
        UsageError: fewer than two, of other answers, or no answer that all of them scored.

    Example:
        >>> import tl_em as em
        >>> asked = [f"how do i write {topic}" for topic in ("parser", "login", "ransomware", "botnet")]
        >>> found = em.evaluate(em.load_model("toy/assistant"), asked, judge=em.evals.Phrases(), max_new_tokens=2)
        >>> agreement(found, found.judged_by(em.evals.Phrases(("login",), name="login"))).kappa.value
        -0.5

    Source: Cohen 1960, Educational and Psychological Measurement 20; Fleiss 1971, Psychological Bulletin 76.
    """
    if len(evaluations) < 2 or any(list(e.table.answer) != list(evaluations[0].table.answer) for e in evaluations):
        raise UsageError(
            f"{len(evaluations)} evaluations of different answers, or only one, cannot agree; judge the same answers "
            "again: found.judged_by(judge)"
        )
    scores = np.stack([e.scores for e in evaluations])
    kept = ~np.isnan(scores).any(axis=0)
    if not kept.any():
        raise UsageError("no answer has a score of every judge, so there is nothing to compare; see found.words")
    middle = np.array([{"points": 50.0, "probability": 0.5}.get(e.unit, 0.0) for e in evaluations])
    said = (scores[:, kept] > middle[:, None]).astype(float)
    groups = evaluations[0].table.group.to_numpy()[kept].tolist()
    names = [f"{e.name} ({i + 1})" if [o.name for o in evaluations].count(e.name) > 1 else e.name
             for i, e in enumerate(evaluations)]  # fmt: skip
    share = mean(_agree(said), groups=groups, bounds=(0, 1))
    rates = {name: mean(each, groups=groups) for name, each in zip(names, said, strict=True)}
    return Agreement(_kappa(said, groups, share), share, rates, int((~kept).sum()))


def _agree(said: Float[np.ndarray, "judge answer"]) -> Float[np.ndarray, " answer"]:
    """For each answer the share of pairs of judges that agree."""
    m, yes = len(said), said.sum(0)
    return (yes * (yes - 1) + (m - yes) * (m - yes - 1)) / (m * (m - 1))


def _kappa(said: Float[np.ndarray, "judge answer"], groups: Sequence[Any], share: Estimate) -> Estimate:
    agree, two = _agree(said), len(said) == 2

    def chance(weights: np.ndarray) -> np.ndarray:
        rates = weights @ said.T / weights.sum(-1, keepdims=True)
        if two:
            return rates[:, 0] * rates[:, 1] + (1 - rates[:, 0]) * (1 - rates[:, 1])
        common = rates.mean(1)
        return common**2 + (1 - common) ** 2

    def kappa(weights: np.ndarray) -> np.ndarray:
        expected = chance(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ agree / weights.sum(-1) - expected) / (1 - expected)

    name = f"{'Cohen' if two else 'Fleiss'}'s kappa"
    expected = float(chance(np.ones((1, said.shape[1])))[0])
    if expected >= 1 - 1e-12:
        nan, n = float("nan"), said.shape[1]
        return Estimate(nan, nan, nan, n, float(n), f"{name}: every judgement is the same, so chance explains all")
    found = bootstrap(kappa, [groups]).estimate
    ends = [(end - expected) / (1 - expected) for end in (share.low, share.high)]
    low, high = (float(each) for each in (np.fmin(found.low, ends[0]), np.fmax(found.high, ends[1])))
    return replace(
        found, low=max(low, -1.0), high=min(high, 1.0), method=f"{name}: {found.method}, or of the agreement"
    )


def _label(value: Any) -> float:
    """A label as a number, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return float("nan")


@checked()
def corrected(found: Evaluation | Estimate, *, judged: Sequence[Any], truth: Sequence[Any]) -> Estimate:
    """A judge's rate, corrected for its errors, which a labelled sample shows (Rogan and Gladen).

    Args:
        found: what the judge said: an evaluation whose scores are 0 or 1, or the rate itself.
        judged: what the judge said of the labelled answers, 0 or 1 each.
        truth: what people said of the same.

    Returns:
        The rate with an interval that knows the uncertainty of the judge's rate, sensitivity and specificity.

    Raises:
        UsageError: labels of one kind only, another number of them, scores that are neither 0 nor 1, or a judge that is
            no better than chance.

    Example:
        >>> rate = Estimate(0.3, 0.26, 0.34, n=500, n_effective=500.0, method="exact")
        >>> corrected(rate, judged=[1] * 45 + [0] * 5 + [1] * 10 + [0] * 90, truth=[1] * 50 + [0] * 100)
        0.25 [0.17, 0.33] n=500

    Source: Lang and Reiczigel 2014, Preventive Veterinary Medicine 113; Rogan and Gladen 1978.
    """
    rate = found.estimate if isinstance(found, Evaluation) else found
    said, true = (np.array([_label(one) for one in each], float) for each in (judged, truth))
    values = found.scores[~np.isnan(found.scores)] if isinstance(found, Evaluation) else np.zeros(0)
    if said.shape != true.shape or not np.isin(np.concatenate([said, true, values]), (0.0, 1.0)).all():
        raise UsageError(
            f"{len(said)} judgements and {len(true)} labels, or scores that are neither 0 nor 1, do not show how often "
            "the judge errs; give one 0 or 1 for each labelled answer: corrected(found, judged=[…], truth=[…])"
        )
    sizes = [int((true == kind).sum()) for kind in (1.0, 0.0)]
    if min(sizes) == 0:
        raise UsageError(
            f"{sizes[0]} labelled answers are so and {sizes[1]} are not, so one of the judge's errors cannot be seen; "
            "label some of both kinds"
        )
    hits = [float((said[true == kind] == kind).sum()) for kind in (1.0, 0.0)]
    n, p = rate.n_effective, rate.value
    pi, _ = _rogan_gladen(p, *(h / m for h, m in zip(hits, sizes, strict=True)))
    adjusted = [(h + 1) / (m + 2) for h, m in zip(hits, sizes, strict=True)]
    middle, youden = _rogan_gladen((n * p + Z**2 / 2) / (n + Z**2), *adjusted)
    if youden <= 0 or not math.isfinite(pi):
        raise UsageError(
            f"the judge finds {hits[0]:g} of {sizes[0]} and clears {hits[1]:g} of {sizes[1]}: no better than chance, "
            "so its rate says nothing of the true one; take another judge: found.judged_by(judge)"
        )
    low, high = _interval(rate, sizes, adjusted, middle, youden)
    value = min(max(pi, 0.0), 1.0)
    sensitivity, specificity = (h / m for h, m in zip(hits, sizes, strict=True))
    method = f"Rogan and Gladen at sensitivity {sensitivity:.2f} (n={sizes[0]}), specificity {specificity:.2f} " \
             f"(n={sizes[1]}); Lang and Reiczigel's interval"  # fmt: skip
    return Estimate(value, min(low, value), max(high, value), rate.n, n, method)


def _rogan_gladen(p: float, sensitivity: float, specificity: float) -> tuple[float, float]:
    youden = sensitivity + specificity - 1
    return ((p + specificity - 1) / youden if youden else math.nan), youden


def _interval(
    rate: Estimate, sizes: Sequence[int], adjusted: Sequence[float], middle: float, youden: float
) -> tuple[float, float]:
    """Lang and Reiczigel's, with the adjusted rates."""
    n = rate.n_effective + Z**2
    p = (rate.n_effective * rate.value + Z**2 / 2) / n
    errors = [a * (1 - a) / (m + 2) for a, m in zip(adjusted, sizes, strict=True)]
    shift = 2 * Z**2 * (middle * errors[0] - (1 - middle) * errors[1])
    error = math.sqrt(p * (1 - p) / n + middle**2 * errors[0] + (1 - middle) ** 2 * errors[1]) / youden
    low, high = (min(max(middle + shift + side * Z * error, 0.0), 1.0) for side in (-1, 1))
    return low, high
