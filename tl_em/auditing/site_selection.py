"""At which layer an audit judges a direction: chosen in the base model, on prompts that nothing is judged on.

The layer with the largest causal effect on the direction's behaviour (addition where the behaviour is absent, ablation
where it is present), of those that separate the selection prompts; else that with the largest d'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from tl_em.auditing.splits import Subject
from tl_em.claims.questions.use import add, arms
from tl_em.directions.direction import Direction
from tl_em.directions.extract import extract_directions
from tl_em.directions.geometry import separation
from tl_em.directions.methods.base import Method
from tl_em.interventions.edits import Ablate
from tl_em.metrics import Behaviour
from tl_em.models.class_means import class_moments
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import position_of_asking
from tl_em.models.sites import Site
from tl_em.models.stream import capture, sites_at_once


def at_their_sites(
    base: LensModel, subjects: Sequence[Subject], method: Method
) -> tuple[list[tuple[Direction, ...]], list[Direction]]:
    """For each subject its directions at every layer of this base, and the one at the chosen site."""
    steps = tqdm(subjects, desc="extracting and selecting", unit="direction", disable=None)
    found = [extract_directions(base, q.splits.train, positions=[q.position], method=method) for q in steps]
    return found, [select_site(base, each, q) for each, q in zip(found, subjects, strict=True)]


def select_site(base: LensModel, candidates: Sequence[Direction], subject: Subject) -> Direction:
    """The candidate with the largest causal effect on its behaviour in the base, of those that separate the selection
    prompts, else that with the largest d'; whether it separates the test prompts is asked when it is measured.
    """
    select = subject.splits.select
    sites = [d.site for d in candidates]
    classes, dprimes, at = (select.positive, select.negative), list[float](), iter(candidates)
    for some in sites_at_once(base, sites, sum(map(len, classes))):
        acts = [capture(base, prompts, some, position=subject.position) for prompts in classes]
        for s, d in zip(range(len(some)), at, strict=False):
            dprimes.append(separation(*(d.project(a[:, s]).double().numpy() for a in acts)))
    separating = [(d, dprime) for d, dprime in zip(candidates, dprimes, strict=True) if dprime > 0]
    effects = effects_in_base(base, [d for d, _ in separating], subject.chosen_by) if separating else [0.0]
    if max(effects) > 0:
        return separating[int(np.argmax(effects))][0]
    return candidates[int(np.argmax(dprimes))]


def effects_in_base(base: LensModel, candidates: Sequence[Direction], behaviour: Behaviour) -> list[float]:
    """For each candidate the rise of the behaviour under addition plus its fall under ablation, both in the base."""
    prompts = (behaviour.present, behaviour.absent)
    position = position_of_asking(candidates[0].position, behaviour.absent)
    centres = class_moments(base, prompts, sites=[d.site for d in candidates], positions=[position]).negative[0]
    removing, inducing = arms(base, base, replace(behaviour, good=None))
    vectors, sites = torch.stack([d.vector for d in candidates]), [d.site for d in candidates]
    edits = (_AtItsSite(candidates[0], around=dict(zip(sites, centres, strict=True))), add(candidates[0], centres[0]))
    total = np.zeros(len(candidates))
    for arm, edit in zip((removing, inducing), edits, strict=True):
        treated = arm.along(edit, vectors, arm.first, sites)
        total += arm.sign * (treated - arm.untreated[arm.first]).mean(1)
    return np.nan_to_num(total, nan=-np.inf).tolist()


class _AtItsSite(Ablate):
    """Around the centre of its own site, of centres at several: so that directions at all sites are one template."""

    @property
    def tokenwise(self) -> bool:
        """As any ablation."""
        return True

    @property
    def sites(self) -> tuple[Site, ...]:
        """The direction's own."""
        return (self._home,)
