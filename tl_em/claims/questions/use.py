"""What a direction does: behaviour under ablation in the tuned model and under addition in the base.

    ablate in tuned   behaviour untreated - treated, on prompts that show the behaviour; treated: the component along
                      the direction is set to its mean where the behaviour is absent: over the tuned model's prompts
                      that do not show it or, where these are the same prompts (the behaviour is the model's), over the
                      base's
    add in base       behaviour treated - untreated, on prompts that do not show it; treated: + 1 x the raw vector

Both are positive when the direction carries the behaviour.  The control is the same treatment with random directions
of the base's within-class covariance and the real direction's length, on a random sample of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_em.claims.claim import Case, Finding, Question
from tl_em.claims.rule import SMALLEST_USE, smallest_effect
from tl_em.directions.direction import Direction
from tl_em.errors import HookError, UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.intervene import intervene
from tl_em.metrics import Behaviour, Metric
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.means import mean_activation
from tl_em.models.stream import fanned_out
from tl_em.stats import Estimate, Resampled, mean, paired_difference

CONTROL_PROMPTS = 16
ABLATE, ADD = "ablate in tuned", "add in base"
RowEdit = Callable[[Float[Tensor, "row pos d_model"], Float[Tensor, "row d_model"]], Float[Tensor, "row pos d_model"]]


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm of the causal test: a model, a treatment, the prompts, and the sign that the claim predicts.

    Args:
        name: ``"ablate in tuned"`` or ``"add in base"``.
        model: the model that is treated.
        prompts: the prompts that it is measured on.
        groups: the question of each prompt.
        centre: the centre of the ablation; ``None``: the arm adds.
    """

    name: str
    model: LensModel
    prompts: Sequence[Prompt]
    groups: Sequence[Hashable] | None
    centre: Float[Tensor, " d_model"] | None

    @property
    def sign(self) -> int:
        """+1 where the behaviour should rise, -1 where it should fall."""
        return 1 if self.centre is None else -1

    def treated(self, direction: Direction, metric: Metric) -> Float[np.ndarray, " prompt"]:
        """The metric of each prompt under the treatment."""
        edit = Add(direction) if self.centre is None else Ablate(direction, around=self.centre)
        with intervene(self.model, edit):
            return self.untreated(metric)

    def untreated(self, metric: Metric) -> Float[np.ndarray, " prompt"]:
        """The metric of each prompt as the model is."""
        return metric(self.model, self.prompts).double().cpu().numpy()

    def on(self, prompts: Sequence[Prompt]) -> Arm:
        """The same arm on other prompts."""
        return replace(self, prompts=prompts, groups=None)

    def row_edit(self) -> RowEdit:
        """The same treatment with one direction for each row of the batch."""
        if self.centre is None:
            return lambda x, vectors: x + vectors[:, None].to(x.dtype)
        centre = self.centre

        def ablate(x: Tensor, vectors: Tensor) -> Tensor:
            units = (vectors / vectors.norm(dim=-1, keepdim=True))[:, None]
            change = (component_of_rows(centre.to(units)[None, None], units) - component_of_rows(x, units))[..., None]
            return x + (change * units).to(x.dtype)

        return ablate


def component_of_rows(x: Float[Tensor, "#row #pos d_model"], units: Float[Tensor, "row 1 d_model"]) -> Tensor:
    """Component of each row along its own unit vector."""
    return (x.to(units.dtype) * units).sum(-1)


def arms(base: LensModel, tuned: LensModel, behaviour: Behaviour, centre: Float[Tensor, " d_model"]) -> list[Arm]:
    """The two arms; ``centre`` is the mean activation where the behaviour is absent."""
    return [
        Arm(ABLATE, tuned, behaviour.present, behaviour.present_groups, centre),
        Arm(ADD, base, behaviour.absent, behaviour.absent_groups, None),
    ]


class Use(Question):
    """The question *use*: see the head of this file."""

    name, words, unit, smallest = "use", ("causal", None), "change of the behaviour", SMALLEST_USE["probability"]
    asks = "Does the direction drive the behaviour?"
    measured = (
        "Change of the behaviour when the direction is ablated in the tuned model and when it is added in the base, at "
        "the same site."
    )
    of_change = False

    def measure(self, case: Case) -> Finding | None:
        """Ablate in tuned, add in base, and judge by the weaker arm.

        Raises:
            UsageError: the behaviour's unit has no smallest effect of interest.
        """
        behaviour, direction = case.behaviour, case.direction
        if behaviour is None:
            return None
        metric, smallest = behaviour.metric, smallest_effect(behaviour.metric)
        random = case.controls()
        vectors = torch.from_numpy(random / np.linalg.norm(random, axis=-1, keepdims=True) * direction.norm).float()
        reference = case.pair.base if behaviour.same_prompts else case.pair.tuned
        centre = mean_activation(reference, behaviour.absent, site=direction.site, position=direction.position)
        both = arms(case.pair.base, case.pair.tuned, behaviour, centre)
        measured = [measure_arm(arm, direction, behaviour, vectors, seed=case.seed) for arm in both]
        weaker = min(measured, key=lambda m: m.effect.estimate.low)
        return case.finding(
            self, Resampled(weaker.effect.estimate, max(m.effect.p for m in measured)), controls=weaker.controls,
            control="random directions with the same treatment", smallest=smallest,
            unit=f"{metric.unit} of {metric.name} ({weaker.arm.name}, the weaker arm)",
            detail={m.arm.name: m.effect.estimate for m in measured},
            table=[row | {"direction": case.name, "behaviour": behaviour.name} for m in measured for row in m.rows],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One arm's effect, the same effect under each control, and the rates."""

    arm: Arm
    effect: Any
    controls: Float[np.ndarray, " control"]
    rows: list[dict[str, Any]]


def measure_arm(arm: Arm, direction: Direction, behaviour: Behaviour, vectors: Tensor, *, seed: int) -> ArmResult:
    """The effect of one arm on its prompts, that of each of ``vectors``, and the table of rates behind them."""
    outcomes = {"bad": behaviour.metric} | ({} if behaviour.good is None else {"good": behaviour.good})
    sample = np.random.default_rng(seed).permutation(len(arm.prompts))[:CONTROL_PROMPTS]
    few = arm.on([arm.prompts[i] for i in sample])
    rows, effects, controls = [], [], []
    for outcome, metric in outcomes.items():
        before, after = arm.untreated(metric), arm.treated(direction, metric)
        random = under_controls(few, direction, metric, vectors if outcome == "bad" else vectors[:99])
        # Moved by what the sample's own mean differs from that of all prompts, so that the table's columns compare.
        shifts = random.mean(1) - before[sample].mean()
        effects.append(paired_difference(arm.sign * before, arm.sign * after, groups=arm.groups, seed=seed))
        controls.append(arm.sign * shifts)
        cells = {
            "untreated": mean(before, groups=arm.groups, seed=seed),
            "treated": mean(after, groups=arm.groups, seed=seed),
            "random": over_controls(before.mean() + shifts),
        }
        rows += [
            {"arm": arm.name, "outcome": outcome, "metric": metric.name, "unit": metric.unit, "condition": condition,
             "value": e.value, "low": e.low, "high": e.high, "n": e.n, "method": e.method}
            for condition, e in cells.items()
        ]  # fmt: skip
    return ArmResult(arm, effects[0], controls[0], rows)


def over_controls(values: Float[np.ndarray, " control"]) -> Estimate:
    """The mean over control directions with the band that holds 95 % of them (not an interval of the mean)."""
    low, high = np.quantile(values, [0.025, 0.975])
    n = len(values)
    return Estimate(float(values.mean()), float(low), float(high), n, float(n), "2.5-97.5 % band of random directions")


def under_controls(
    arm: Arm, direction: Direction, metric: Metric, vectors: Float[Tensor, "control d_model"]
) -> Float[np.ndarray, "control prompt"]:
    """The metric of each prompt under each of many directions.

    Each prompt runs once up to the site and from there in as many copies as there are directions.  Where that does not
    give what one direction at a time gives (a metric that runs the model by itself, a model that depends on its batch),
    the directions are run one at a time.
    """
    probe = vectors[:2]
    slow = np.stack([arm.on(arm.prompts[:1]).treated(_like(direction, v), metric) for v in probe])
    together = _fanned_pass(arm, direction, metric, probe, arm.prompts[0]) if len(probe) == 2 else None
    fans = together is not None and np.allclose(together, slow[:, 0], rtol=1e-3, atol=1e-4)
    what = f"{arm.name}: {metric.name}"
    if fans:
        passes = tqdm(arm.prompts, desc=what, unit="prompt", disable=None, leave=False)
        return np.stack([np.asarray(_fanned_pass(arm, direction, metric, vectors, p)) for p in passes], axis=1)
    alone = tqdm(vectors.unbind(), desc=what, unit="direction", disable=None, leave=False)
    return np.stack([arm.treated(_like(direction, v), metric) for v in alone])


def _fanned_pass(
    arm: Arm, direction: Direction, metric: Metric, vectors: Tensor, prompt: Prompt
) -> Float[np.ndarray, " control"] | None:
    edit = arm.row_edit()

    def copies(x: Tensor, rows: Sequence[int]) -> Tensor:
        return edit(x, vectors[list(rows)].to(x.device))

    try:
        with fanned_out(arm.model, direction.site, copies):
            return metric(arm.model, [prompt] * len(vectors)).double().cpu().numpy()
    except (UsageError, HookError, RuntimeError, IndexError):
        return None


def _like(direction: Direction, vector: Tensor) -> Direction:
    return Direction(vector, direction.site, position=direction.position)
