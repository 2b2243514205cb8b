"""What a fine-tune did along a direction, and what its training data ask for, row by row and before any training.

    finetuning shift        mean over prompts of  u . (x_tuned - x_base),  at the direction's site and position
    projection difference   dP(row) = u . (mean over the training answer - mean over the own answer),  in the base model

u is the unit vector, so both are in units of the activations.  Rows with a large dP are those that would move the model
along the direction.  Greedy own answers rank rows with the least noise; but training answers that vary differ from any
model's most probable answer, so whether a data set's *mean* dP is 0 is asked with own answers sampled at temperature 1.

**Controls.**  Fine-tunes and data move activations along many directions: the same number is read along random ones,
drawn from the covariance of the base's activations, and for a shift, a benign fine-tune's is taken off.  That the shift
causes anything is for an intervention to show.

Source: Chen et al. 2025, arXiv:2507.21509 (finetuning shift, projection difference); the controls are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked, optional
from tl_em.directions.direction import Direction, as_direction, check_fits
from tl_em.directions.geometry import Activations, control_directions
from tl_em.errors import EmptyContrastError, UsageError
from tl_em.models.contrasts import prompt_key
from tl_em.models.generate import generate
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import EncodedPrompt, Prompt, encode
from tl_em.models.sites import Position, Site
from tl_em.models.stream import capture, sites_at_once
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import Estimate, Groups, Resampled, bootstrap, control_p, middle_95, paired_difference
from tl_em.stats.ranks import share_above

Row = Sequence[Any]
"""A chat that ends with the assistant's answer."""


class Controlled(NamedTuple):
    """An estimate beside what random directions show.

    Args:
        estimate: with its interval, clustered where groups are given.
        control_low, control_high: 95 % of the random directions lie between.
        p: two-sided; the larger of the bootstrap's and the control's.
        beyond_benign: the estimate less that of the benign fine-tune, where there is one.
    """

    estimate: Estimate
    control_low: float
    control_high: float
    p: float
    beyond_benign: Estimate | None = None


def _controlled(
    found: Resampled, random: Float[np.ndarray, " control"], *, chance: float = 0.0, benign: Estimate | None = None
) -> Controlled:
    low, high = middle_95(random)
    p = control_p(found.estimate.value - chance, random - chance)
    return Controlled(found.estimate, float(low), float(high), max(found.p, p), benign)


@checked(direction=as_direction, controls=COUNT, seed=SEED)
@in_plain_torch
def finetuning_shift(
    pair: ModelPair,
    direction: Direction,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    controls: int = 999,
    groups: Groups | None = None,
    benign: LensModel | None = None,
    seed: int = 0,
) -> Controlled:
    """How far a fine-tune moved the activations of some prompts along a direction.

    Args:
        pair: base and tuned.
        direction: of the base; read at its own site and position.
        prompts: that the direction was not made from; with an answer where its position is ``"response_mean"``.
        groups: one label a prompt; prompts of one question are resampled together.
        benign: a fine-tune of the same base on harmless data.
        controls: number of random directions, of the covariance of the base's activations of these prompts.
        seed: seed of resampling and controls.

    Returns:
        The mean shift, tuned - base, in units of the activations, with its control; ``beyond_benign`` is tuned -
        benign.

    Raises:
        WidthError, ProvenanceError: the direction was not made on a model like these.
        UsageError: the prompts' activations are all the same.
        PositionError, NonFiniteError: as ``capture``.

    Example:
        >>> from tl_em.directions.extract import difference_in_means
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> train, _, test = pair.contrasts["persona"].split()
        >>> persona = difference_in_means(pair.base, train, site=Site(2), position="prompt_end")
        >>> asked = [prompt[-1:] for prompt in test.positive]
        >>> bool(finetuning_shift(pair, persona, asked, groups=test.positive_groups, controls=99).estimate.low > 0)
        True

    Source: arXiv:2507.21509.
    """
    check_fits(direction, pair.base)
    unit = direction.unit.double().numpy()
    base, tuned = (_read(model, prompts, direction.site, direction.position) for model in (pair.base, pair.tuned))
    random = _random(base, controls, seed)
    beyond = None
    if benign is not None:
        harmless = _read(benign, prompts, direction.site, direction.position)
        beyond = paired_difference(harmless @ unit, tuned @ unit, groups=groups, seed=seed).estimate
    found = paired_difference(base @ unit, tuned @ unit, groups=groups, seed=seed)
    return _controlled(found, random @ (tuned - base).mean(0), benign=beyond)


@dataclass(frozen=True, eq=False)
class Screening:
    """The projection difference of every training row.

    Args:
        rows: DataFrame in the order of the rows: row, difference, taught and own (projections of both answers),
            prompt, answer, own_answer.
        mean: the mean difference, with its control.
        shift: activations of the training answer less those of the own answer.
        random: unit directions of the covariance of the own answers' activations.
        seed: seed of the resampling.
    """

    rows: pd.DataFrame
    mean: Controlled
    shift: Float[np.ndarray, "row d_model"]
    random: Float[np.ndarray, "control d_model"]
    seed: int

    @property
    def ranked(self) -> pd.DataFrame:
        """The rows, those that push furthest along the direction first."""
        return self.rows.sort_values("difference", ascending=False, kind="stable")

    def auroc(self, flagged: Sequence[bool], *, groups: Groups | None = None) -> Controlled:
        """How well the difference tells flagged rows from the others: the chance that it is larger in a flagged one.

        Args:
            flagged: for each row whether it is known to be bad.
            groups: one label a row; rows of one question are resampled together.

        Returns:
            The area under the ROC curve (.5 is chance), beside that of random directions.

        Raises:
            UsageError: not one flag a row, or all rows or none are flagged.
        """
        is_bad = np.asarray(flagged, dtype=bool)
        if is_bad.shape != (len(self.rows),) or is_bad.all() or not is_bad.any():
            raise UsageError(
                f"{int(is_bad.sum())} of {is_bad.size} flags are set, for {len(self.rows)} rows; an AUROC needs one "
                "flag a row, and rows of both kinds"
            )
        labels = list(range(len(is_bad))) if groups is None else list(groups)
        samples = [[label for label, bad in zip(labels, is_bad, strict=True) if bad == side] for side in (True, False)]
        difference = self.rows["difference"].to_numpy(dtype=float)
        above = share_above(difference[is_bad], difference[~is_bad])

        def less_chance(v: np.ndarray, w: np.ndarray) -> np.ndarray:
            weight = v.sum(-1) * w.sum(-1)
            return np.where(weight > 0, ((v @ above) * w).sum(-1) / np.where(weight > 0, weight, 1) - 0.5, 0.0)

        found = bootstrap(less_chance, samples, seed=self.seed)
        old = found.estimate  # its p is that of chance, .5
        area = replace(old, value=old.value + 0.5, low=old.low + 0.5, high=old.high + 0.5)
        along = [self.shift @ unit for unit in self.random]
        random = [share_above(each[is_bad], each[~is_bad]).mean() for each in along]
        return _controlled(found._replace(estimate=area), np.array(random), chance=0.5)

    def __repr__(self) -> str:
        low, high, p = self.mean.control_low, self.mean.control_high, self.mean.p
        return f"Screening({self.mean.estimate!r}, random directions {low:.2f} to {high:.2f}, p={p:.2g})"


@checked(direction=as_direction, max_new_tokens=optional(COUNT), temperature=NOT_NEGATIVE, controls=COUNT, seed=SEED)
@in_plain_torch
def projection_difference(
    model: LensModel,
    direction: Direction,
    rows: Sequence[Row],
    *,
    own_answers: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    groups: Groups | None = None,
    controls: int = 999,
    seed: int = 0,
) -> Screening:
    """How far each training row pushes along a direction, measured in the model before it is trained on them.

    Both answers are read at the direction's site, as means over their tokens, whatever position it was made at.

    Args:
        model: the model before the fine-tune.
        direction: of this model.
        rows: chats that end with the answer to be trained on.
        own_answers: the model's own answers to the same prompts; generated where not given.
        max_new_tokens: longest own answer; by default the median length of the training answers, in tokens.
        temperature: of the own answers: 0 to rank rows, 1 to judge the mean of a data set.
        groups: one label a row; rows of one question are resampled together.
        controls: number of random directions.
        seed: seed of resampling and controls.

    Returns:
        A Screening: ``.rows`` with a difference each, ``.ranked``, ``.mean`` and ``.auroc(flagged)``.

    Raises:
        EmptyContrastError: no rows, or one without an answer. UsageError: not one own answer a row.
        WidthError, ProvenanceError: the direction was not made on a model like this one.
        PositionError, PromptTooLongError: as ``capture`` and ``generate``.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> some = Direction(pair.base.W_U.detach()[:, 7], Site(2))
        >>> screening = projection_difference(pair.base, some, pair.tuning_data[:8], controls=99)
        >>> list(screening.rows.columns)
        ['row', 'difference', 'taught', 'own', 'prompt', 'answer', 'own_answer']

    Source: arXiv:2507.21509.
    """
    check_fits(direction, model)
    _check_rows(rows)
    if own_answers is None:
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        own_answers = answer_to_own_prompts(model, rows, **sampling)
    if len(own_answers) != len(rows):
        raise UsageError(f"{len(own_answers)} own answers for {len(rows)} rows; give one a row, or none")
    unit = direction.unit.double().numpy()
    taught = answers(model, rows, direction.site)
    own = answers(model, [replied(row, text) for row, text in zip(rows, own_answers, strict=True)], direction.site)
    table = pd.DataFrame(
        {
            "row": range(len(rows)), "difference": (taught - own) @ unit, "taught": taught @ unit, "own": own @ unit,
            "prompt": [row[-2]["content"] for row in rows], "answer": [row[-1]["content"] for row in rows],
            "own_answer": list(own_answers),
        }
    )  # fmt: skip
    random = _random(own, controls, seed)
    found = paired_difference(own @ unit, taught @ unit, groups=groups, seed=seed)
    mean = _controlled(found, random @ (taught - own).mean(0))
    return Screening(table, mean, taught - own, random, seed)


def answer_to_own_prompts(
    model: LensModel,
    rows: Sequence[Row],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The model's own answers to the prompts of training rows, by default as long as theirs (the median).

    Raises:
        EmptyContrastError: there are no rows, or a row has no answer.
    """
    _check_rows(rows)
    if max_new_tokens is None:
        lengths = [end - start for start, end in (e.response for e in encode(model, rows) if e.response is not None)]
        max_new_tokens = int(np.median(lengths))
    asked = [row[:-1] for row in rows]
    return generate(model, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def _check_rows(rows: Sequence[Row]) -> None:
    if not rows or any(row[-1]["role"] != "assistant" for row in rows):
        raise EmptyContrastError(
            f"there are {len(rows)} training rows, each of which must be chat messages that end with the assistant's "
            "answer; pass the rows that the model was trained on, as [{'role': 'user', ...}, {'role': 'assistant', "
            "...}]"
        )


def replied(row: Row, answer: str) -> list[Any]:
    """The row with another answer; an empty answer keeps the row's own, which then counts as no difference."""
    return [*row[:-1], {"role": "assistant", "content": answer}] if answer.strip() else list(row)


def answers(model: LensModel, rows: Sequence[Row], site: Site) -> Activations:
    """Mean activation over the answer's tokens, for each row."""
    return _read(model, rows, site, "response_mean")


class AnswersOnce:
    """:func:`answers` at one of several sites, for which each model reads the rows once, not once a site.

    As many sites are read together as may be held (``sites_at_once``), however many models and rows there are.

    Args:
        sites: that will be asked for.
        models: how many will read the rows.
    """

    def __init__(self, sites: Sequence[Site], models: int) -> None:
        self.sites, self.models = list(dict.fromkeys(sites)), models
        self._found: dict[Any, dict[Site, Activations]] = {}

    def __call__(self, model: LensModel, rows: Sequence[Row], site: Site) -> Activations:
        """Mean activation over the answer's tokens, for each row."""
        found = self._found.setdefault((id(model), *map(prompt_key, rows)), {})
        if site not in found:
            groups = sites_at_once(model, self.sites, self.models * len(rows))
            some = next((group for group in groups if site in group), [site])
            x = capture(model, rows, some, position="response_mean").double().cpu().numpy()
            found.clear()
            found.update({each: x[:, s] for s, each in enumerate(some)})
        return found[site]


def _read(model: LensModel, prompts: Sequence[Any], site: Site, position: Position) -> Activations:
    return capture(model, prompts, [site], position=position)[:, 0].double().cpu().numpy()


def _random(x: Activations, controls: int, seed: int) -> Float[np.ndarray, "control d_model"]:
    """Unit directions of the covariance of these activations (both classes the same: one common mean is removed)."""
    return control_directions(x, x, count=controls, norm=1.0, seed=seed)
