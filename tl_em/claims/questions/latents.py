"""Do these latents carry the behaviour?  Set them back in the tuned model, set them forward in the base.

    remove   behaviour untreated - treated, in the model; treated: the latents set to 0 or, given the base, to the
             base's means at the treated tokens (zeroing cannot restore a latent that was switched off)
    induce   behaviour treated - untreated, in the base; treated: the latents set to the tuned model's means

Both are deltas ``x + (a' - a) W_dec`` at the dictionary's site (``em.ScaleFeature``), paired prompt by prompt, and
positive where the claim holds.

**Controls.** *Placebos*: random latents matched on density and decoder norm (``claims.controls``), treated the same
(``claims.latent_sets`` has the table). Beside both the *mean-difference direction* (mean-preserving ablation;
addition): what no dictionary is needed for. Its effect is an upper mark and no control, so it gets no word. The good
behaviour is measured beside the bad: what breaks the model lowers both.

**Rule, fixed before any verdict seed was read.** A word is given only when all of these hold:

1. the whole 95 % interval lies above the smallest effect of interest (.05 in probability, .5 in log-odds);
2. p = max(bootstrap, rank among the placebos, one-sided) < .05: beside the first rounds of placebos, beyond 20 of which
   one unrelated set in 21 lies, and, where that holds, beside 99 (a single latent: beside all that are near). In order,
   each only where the one before has its word, so that none needs an adjustment: the set removed; the set induced; the
   single latents, with Holm's adjustment among them, against the single placebos of all of them. Several sets:
   ``verify_features``, with Holm's over them;
3. where they are measured, the coherence does not fall by the smallest effect or more and, on removal, neither does the
   good behaviour (to induce the bad one displaces it).

Everything else is ``not shown``.  Source: ablation and steering of persona latents, Wang et al. 2025,
arXiv:2506.19823; fixed-sequence testing, Maurer et al. 1995.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tl_em.arguments import checked, list_of
from tl_em.claims.arms import KL
from tl_em.claims.controls import match
from tl_em.claims.feature_check import BESIDE, DIRECTION, SET, WORDS, CheckRow, FeatureCheck
from tl_em.claims.latent_sets import CHECKS, Job, LatentSet, Trial, latents
from tl_em.claims.rule import NOT_SHOWN, adjusted, control_row, too_few, unlikely
from tl_em.dictionaries.dictionary import Feature
from tl_em.errors import UsageError
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import ContrastSet
from tl_em.models.hooks import LensModel
from tl_em.models.token_scopes import Where
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate, control_p


# ---- what is asked -----------------------------------------------------------------------------------------------
@checked(**CHECKS)
@in_plain_torch
def verify_feature(
    model: LensModel,
    features: Feature | Sequence[Feature] | Any,
    contrast: ContrastSet,
    *,
    metric: Metric | Behaviour,
    placebos: int = 20,
    against: LensModel | None = None,
    good: Metric | None = None,
    coherence: Metric | None = None,
    fit: ContrastSet | None = None,
    where: Where | None = None,
    singly: bool = True,
    doses: Sequence[float] = (0.25, 0.5, 1.0),
    smallest: float | None = None,
    seed: int = 0,
) -> FeatureCheck:
    """Does a latent, or a set of latents, carry a behaviour of the model?  See the head of this file for the rule.

    Args:
        model: the tuned model.
        features: one latent, several of one dictionary, or a FeatureSet.
        contrast: *held-out* prompts: none that the latents were found on. The behaviour is measured on the positive.
        metric: how strongly a prompt shows the behaviour; of a Behaviour its metric and good metric are taken.
        placebos: number of matched random sets; 20 are needed for p < .05. Where a word would be given beside them, it
            takes 99 to stand (for a single latent those that are near, 32).
        against: the base. Given, latents are set to its means and not to 0, and steered in it.
        good, coherence: what should survive, measured beside.
        fit: the prompts that means, densities and the mean difference are taken from; the contrast's own by default.
        where: the tokens that are treated, and over which means are taken, as in ``em.intervene``. By default all for
            an ablation to 0; for a setting to means the answers where prompts have one, else the prompts' last tokens.
        singly: whether to remove each latent of a set alone, too (as many runs as there are latents and placebos).
        doses: parts of the treatment for the dose-response; none: ``()``.
        smallest: smallest effect of interest, for a metric in units that have none.
        seed: seed of placebos and resampling.

    Returns:
        A FeatureCheck.

    Raises:
        UsageError: no latent, latents of several dictionaries, a transcoder, too many placebos for the dictionary, a
            unit without a smallest effect of interest, or no token in the scope.
        WidthError, ProvenanceError: the dictionary does not belong on the model.

    Example:
        >>> import torch
        >>> from tl_em.dictionaries import Dictionary
        >>> from tl_em.models.sites import Site
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> eye = torch.eye(96)
        >>> both = Dictionary(torch.cat([eye, -eye], 1), torch.zeros(192), torch.cat([eye, -eye]), torch.zeros(96),
        ...                   activation="relu", site_in=Site(2))
        >>> asked = pair.behaviours["persona"]
        >>> held_out = ContrastSet(asked.present[:12], asked.present[12:24], positive_groups=asked.present_groups[:12])
        >>> check = verify_feature(pair.tuned, both.feature(0), held_out, metric=asked, doses=())
        >>> check.verdict  # one coordinate of 96 does not carry it
        'not shown'

    Source: see the head of this file.
    """
    job = Job(
        model, contrast, metric, placebos, against, good, coherence, fit, where, singly, doses, smallest, seed
    )  # fmt: skip
    return _verified(job, [features])[0]


@in_plain_torch
def verify_features(
    model: LensModel, sets: Sequence[Any], contrast: ContrastSet, *, metric: Metric | Behaviour, **options: Any
) -> tuple[FeatureCheck, ...]:
    """:func:`verify_feature` for several sets, judged together: words are adjusted for the number of sets.

    The placebos' p is a rank among the *largest* effect of each round of placebos (Westfall and Young's single step),
    the bootstrap's p is Holm's.

    Args:
        model: the tuned model.
        sets: each as in ``verify_feature``.
        contrast: held-out prompts.
        metric: how strongly a prompt shows the behaviour.
        options: everything else that ``verify_feature`` takes, by name.

    Example:
        >>> import tl_em as em
        >>> pair, sae = em.load_pair("toy/insecure"), em.organisms.toy_dictionary("toy/insecure")
        >>> asked, sets = pair.behaviours["persona"], [[sae.feature(176)], [sae.feature(67)]]
        >>> few = em.ContrastSet(asked.present[:16], asked.present[16:32])
        >>> checks = em.claims.verify_features(pair.tuned, sets, few, metric=asked, placebos=19, doses=())
        >>> [check.indices for check in checks]
        [(176,), (67,)]
    """
    return _verified(Job(model, contrast, metric, **options), sets)


def _verified(job: Job, sets: Sequence[Any]) -> tuple[FeatureCheck, ...]:
    asked = list_of(lambda name, each: latents(each))("sets", sets)
    if not asked:
        raise UsageError("sets has no latents, so there is nothing to verify; give what em.shared_features found")
    every = {(latent.dictionary.hash, latent.index): latent for each in asked for latent in each}
    apart = [tuple(index for hash_, index in every if hash_ == each[0].dictionary.hash) for each in asked]
    return _judged([LatentSet(job, own, others) for own, others in zip(asked, apart, strict=True)])


# ---- the rule ----------------------------------------------------------------------------------------------------
def _judged(sets: Sequence[LatentSet]) -> tuple[FeatureCheck, ...]:
    """Words for the sets removed, then for the sets induced, then for the latents of the sets that carry it."""
    rows: list[list[CheckRow]] = [[] for _ in sets]
    trials = [dict(each.trials) for each in sets]
    may = [True] * len(sets)
    smallest, rounds = sets[0].job.least, min(len(each.every) for each in sets)
    for arm in sets[0].job.arms:
        judged = _together([own[arm, SET] for own in trials], smallest, may)
        if any(row.shown for row in judged):
            for own, each in zip(trials, sets, strict=True):
                (own[arm, SET],) = each.beside([own[arm, SET]], rounds)
            judged = _together([own[arm, SET] for own in trials], smallest, may)
        for own, row, found in zip(rows, judged, trials, strict=True):
            own += [row, _beside(found[arm, DIRECTION])]
        may = [row.shown for row in judged]
    for own, each, found in zip(rows, sets, trials, strict=True):
        singles = [trial for (_, subject), trial in found.items() if subject not in (SET, DIRECTION)]
        asked = [own[0].shown] * len(singles)
        judged = _together(singles, smallest, asked)
        if any(row.shown for row in judged):
            judged = _together(each.beside(singles, rounds), smallest, asked)
        own += judged
    return tuple(_check(each, own, found) for each, own, found in zip(sets, rows, trials, strict=True))


def _together(trials: Sequence[Trial], smallest: float, may: Sequence[bool]) -> list[CheckRow]:
    """Trials of one family: each beside the largest of every round of placebos, Holm over their bootstrap p."""
    if not trials:
        return []
    changes = [t.arm.change(t.outcomes) for t in trials]
    largest = np.max([t.controls for t in trials if t.controls is not None], axis=0)
    each = zip(trials, changes, adjusted([c.p if np.isfinite(c.p) else 1.0 for c in changes]), may, strict=True)
    return [_row(trial, change.estimate, largest, p, smallest, asked) for trial, change, p, asked in each]


def _row(
    trial: Trial, effect: Estimate, controls: np.ndarray, bootstrap_p: float, smallest: float, asked: bool
) -> CheckRow:
    rank = control_p(effect.value, controls, two_sided=False)
    p, others, arm = max(bootstrap_p, rank), trial.changes, trial.arm.name
    control = control_row("random latents, the nearest in density and decoder norm", controls, rank)
    kl = trial.arm.mean(trial.outcomes[KL], KL)
    if not asked:
        why, control = "not asked: what comes before it is not shown", control | {"p": None}
        return CheckRow(arm, trial.subject, NOT_SHOWN, effect, kl, control, float("nan"), others, why)
    failed = []
    if not effect.low > smallest:
        failed.append(f"the interval is not wholly above {smallest:g}")
    blame = f"the placebos{too_few(len(controls))}" if rank >= bootstrap_p else "resampling the prompts"
    failed += unlikely(p, blame, name="p")
    spared = [name for name in others if name != "good" or arm == "remove"]
    failed += [f"{name} falls by {-others[name].value:.2g}" for name in spared if others[name].value <= -smallest]
    return CheckRow(
        arm, trial.subject, NOT_SHOWN if failed else WORDS[arm], effect, kl, control, p, others,
        "; ".join(failed) or f"interval wholly above {smallest:g}, p = {p:.2g}",
    )  # fmt: skip


def _beside(trial: Trial) -> CheckRow:
    """The mean difference, which is not judged."""
    effect, kl = trial.arm.change(trial.outcomes).estimate, trial.arm.mean(trial.outcomes[KL], KL)
    why = "an upper mark, not judged"
    return CheckRow(trial.arm.name, DIRECTION, BESIDE, effect, kl, {}, float("nan"), trial.changes, why)


def _check(measured: LatentSet, rows: Sequence[CheckRow], trials: Mapping[Any, Trial]) -> FeatureCheck:
    rates = pd.DataFrame([row for trial in trials.values() for row in _rates(trial)])
    settings = {"site": str(measured.dictionary.site_in), **measured.job.settings}
    used = max(len(trial.controls) for trial in trials.values() if trial.controls is not None)
    return FeatureCheck(
        measured.dictionary, measured.indices, measured.label, tuple(rows), rates, pd.DataFrame(measured.doses()),
        match(measured.dictionary, measured.indices, measured.density, measured.every[:used]), settings,
    )  # fmt: skip


def _rates(trial: Trial) -> list[dict[str, Any]]:
    """Untreated and treated means with their intervals; of the placebos the mean and the band that holds 95 %."""
    arm, found = trial.arm, []
    named = {**{key: (metric.name, metric.unit) for key, metric in arm.metrics.items()}, KL: ("KL", "nats")}
    for outcome, values in trial.outcomes.items():
        head = {"arm": arm.name, "outcome": outcome, "metric": named[outcome][0], "unit": named[outcome][1]}
        known = {"untreated": arm.untreated[outcome]} if trial.subject == SET and outcome in arm.untreated else {}
        shown = {**known, trial.subject: values}
        means = {subject: arm.mean(each, outcome, level=True) for subject, each in shown.items()}
        if (levels := trial.levels.get(outcome)) is not None:
            means["placebos"] = Estimate.band(levels)
        found += [head | {"subject": subject} | e.row() for subject, e in means.items()]
    return found
