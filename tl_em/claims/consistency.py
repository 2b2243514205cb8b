"""Several fine-tunes: how far their behaviour spreads, whether they made the same change, which verdicts repeat.

    spread     mean, deviation and range of a behaviour's rate over runs; Student's t interval of the mean
    cosine     of the fine-tuning shifts  mean_q [ x_i(q) - x_base(q) ]  of two runs, at a direction's site and position
    ceiling    the cosine that the same true shift and this much noise would show (`directions.similarity`)
    along      the shift along the direction (`directions.screening.finetuning_shift`)

**What may be compared.**  Coordinates belong to a base: cosines, shifts, and the sites and directions of the first pair
are used for fine-tunes of the *same* base only (equal weights).  For a fine-tune of another base, directions are
extracted and sites chosen anew on that base, and only rates and words are put side by side.

**Controls**: the ceiling (above) and the cosine of relabelled shifts (below).  Runs share questions and base, hence
noise, so a cosine may lie above its ceiling.  A few runs say little: n stands beside every spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from tl_em.claims.claim import Row
from tl_em.claims.questions.backdoor import sides
from tl_em.directions.cosines import Rows
from tl_em.directions.direction import Direction
from tl_em.directions.screening import finetuning_shift
from tl_em.directions.similarity import CosineMatrix, matrix_of
from tl_em.metrics import Behaviour, measured, range_of
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.stream import capture
from tl_em.stats import mean, mean_over_units


class Run(NamedTuple):
    """One fine-tune: its name, its pair, whether its base is the first pair's, and what was judged."""

    name: str
    pair: ModelPair
    same_base: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class Consistency:
    """What several fine-tunes have in common.

    Args:
        rates: each behaviour in each run, with its interval.
        spread: each behaviour over the runs of the first base, and over all where some have another: mean with
            Student's t interval, deviation, range, n (runs). Runs of one base vary by the fine-tune's seed only.
        cosines: of the shifts of two runs of one base, at each direction's site, with ceiling and p.
        shifts: along each direction, for each run of the first base, with the band of random directions.
        verdicts: each question and direction: the first run's word, and in how many others it repeats.
    """

    rates: pd.DataFrame
    spread: pd.DataFrame
    cosines: pd.DataFrame
    shifts: pd.DataFrame
    verdicts: pd.DataFrame

    @property
    def summary(self) -> str:
        """How many of the first run's words repeat."""
        words = self.verdicts[self.verdicts["verdict"] != "not shown"]
        runs = int(self.spread["n"].max())
        held = int((words["repeats"] == words["of"]).sum())
        return f"Over {runs} fine-tunes, {held} of the first one's {len(words)} words repeat in all."

    def _repr_html_(self) -> str:
        from tl_em.report import cards

        return cards.listed(self, self.summary, self.spread)

    def __repr__(self) -> str:
        return f"Consistency: {self.summary}"


def same_weights(first: LensModel, second: LensModel) -> bool:
    """Whether two models are one base: equal parameters under equal names."""
    if first is second:
        return True
    own, other = (dict(model.named_parameters()) for model in (first, second))  # pyright: ignore
    return own.keys() == other.keys() and all(
        x.shape == other[name].shape and torch.equal(x.detach(), other[name].detach().to(x.device))
        for name, x in own.items()
    )


def consistency(
    runs: Sequence[Run],
    asked: Mapping[str, tuple[Direction, Behaviour]],
    *,
    controls: int = 999,
    seed: int = 0,
) -> Consistency:
    """Rates of every run; shifts of those of the first base; words of all.

    Args:
        runs: two or more, the first pair first.
        asked: for each name the first base's direction, and the behaviour on prompts that it was not made from.
        controls: number of random directions, and of relabellings.
        seed: seed of resampling and controls.
    """
    own = [run for run in runs if run.same_base]
    rates = pd.DataFrame(
        row for name, (_, behaviour) in asked.items() for run in runs for row in _rates(name, behaviour, run, seed)
    )
    cosines, shifts = [], []
    settings: dict[str, Any] = {"controls": controls, "seed": seed}
    for name, (direction, behaviour) in asked.items():
        where = {"direction": name, "site": str(direction.site)}
        if len(own) > 1:
            matrix = shift_cosines(own, direction, behaviour, **settings).to_pandas()
            cosines += [where | row for row in matrix.to_dict("records")]
        for run in own:
            prompts, groups = behaviour.present, behaviour.present_groups
            found = finetuning_shift(run.pair, direction, prompts, groups=groups, **settings)
            beside = {"control_low": found.control_low, "control_high": found.control_high, "p": found.p}
            shifts.append(where | {"run": run.name} | found.estimate.row() | beside)
    return Consistency(rates, _spread(rates), pd.DataFrame(cosines), pd.DataFrame(shifts), _verdicts(runs))


def shift_cosines(
    runs: Sequence[Run], direction: Direction, behaviour: Behaviour, *, controls: int = 999, seed: int = 0
) -> CosineMatrix:
    """Cosines between the runs' fine-tuning shifts on the behaviour's prompts, at the direction's site and position.

    A question's tuned and base activations are one unit: resampled, halved and relabelled (signs) together.
    """
    prompts, labels = behaviour.present, behaviour.present_groups
    ties = [(("group", each),) for each in (range(len(prompts)) if labels is None else labels)] * 2

    def read(model: LensModel) -> np.ndarray:
        return capture(model, prompts, [direction.site], position=direction.position)[:, 0].double().cpu().numpy()

    base, positive, sets = read(runs[0].pair.base), np.arange(2 * len(prompts)) < len(prompts), {}
    for run in runs:
        x = np.concatenate([read(run.pair.tuned) - base, np.zeros_like(base)])  # the base less itself: the origin
        sets[run.name] = Rows(x - x.mean(0), positive, ties)
    matrix = matrix_of(sets, direction.site, permutations=controls, splits=50, seed=seed)
    each = [(pair, pair.estimate) for pair in matrix.pairs]  # an estimate counts tuned and base, of both runs
    own = [(pair, replace(e, n=len(prompts), n_effective=e.n_effective / 4)) for pair, e in each]
    return replace(matrix, pairs=tuple(pair._replace(estimate=e) for pair, e in own))


def _rates(name: str, behaviour: Behaviour, run: Run, seed: int) -> list[dict[str, Any]]:
    metric, found = behaviour.metric, []
    for side in sides(name, behaviour):
        values = measured(metric, run.pair.tuned, side.prompts)
        e = mean(values, groups=side.groups, bounds=range_of(metric.unit, values), seed=seed)
        head = {"behaviour": side.label, "metric": metric.name, "run": run.name, "same_base": run.same_base}
        found.append(head | e.row())
    return found


def _spread(rates: pd.DataFrame) -> pd.DataFrame:
    rows = []
    over = {"this base": rates[rates["same_base"]]} | ({} if rates["same_base"].all() else {"all bases": rates})
    for said, every in over.items():
        for (name, metric), part in every.groupby(["behaviour", "metric"], sort=False)["value"]:
            x = part.to_numpy(dtype=float)
            e, sd = mean_over_units(x, range(len(x))), float(x.std(ddof=1)) if len(x) > 1 else float("nan")
            seen = {"mean": e.value, "low": e.low, "high": e.high, "sd": sd, "least": x.min(), "most": x.max()}
            rows.append({"behaviour": name, "metric": metric, "over": said, **seen, "n": len(x)})
    return pd.DataFrame(rows)


def _verdicts(runs: Sequence[Run]) -> pd.DataFrame:
    words = [{(row.question, row.direction): row.verdict for row in run.rows} for run in runs]
    table = []
    for (question, direction), verdict in words[0].items():
        others = [found.get((question, direction), "not asked") for found in words[1:]]
        row = {"question": question, "direction": direction, "verdict": verdict}
        row |= {"repeats": others.count(verdict), "of": len(others)}
        table.append(row | {run.name: word for run, word in zip(runs[1:], others, strict=True)})
    return pd.DataFrame(table)
