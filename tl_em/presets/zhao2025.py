"""Harmfulness and refusal as two directions, and the prompts on which the two come apart.

    v_harm   = mean(harmful) - mean(harmless)   at t_inst, the last token of the instruction
    v_refuse = mean(refused) - mean(accepted)   at t_post, the last token before the answer

What is refused is asked of the model itself, so prompts fall into four cells: refused or accepted, harmful or harmless.
A model that refuses exactly the harmful prompts has two cells, and its two directions differ in nothing but the token
that they are read at.  So ``v_refuse`` is taken *within* the harmful prompts and within the harmless ones, and averaged
over those of the two that hold both refused and accepted prompts: harmfulness is then constant in each difference.

**Control.**  The claim that the two are separate needs the other two cells, accepted-harmful and refused-harmless: at
t_inst they lie with the prompts that are as harmful, at t_post with those that are answered alike
(:func:`place_cells`).  Centroids leave out the question that is placed, or its own words would place it.

Source: Zhao et al. 2025, arXiv:2507.11878.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import NATURAL, SEED, checked, list_of, optional
from tl_em.directions.direction import Direction
from tl_em.directions.extract import difference_in_means, extract_directions, neutral_z
from tl_em.directions.geometry import cosine
from tl_em.errors import EmptyContrastError, UsageError
from tl_em.metrics import Metric, measured, refusal_log_odds
from tl_em.models.class_means import as_contrast
from tl_em.models.contrasts import ContrastSet, Prompt
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, Provenance, Site, as_site
from tl_em.models.stream import captured, encoded_prompts, sites_at_once, spans_of, stream
from tl_em.models.torch_state import in_plain_torch
from tl_em.stats import mean

if TYPE_CHECKING:
    import pandas as pd

CLASSES = ("harmful", "harmless")
REFUSED_FROM = {"log-odds": 0.0, "probability": 0.5}
LEAST = 5
"""Questions that a cell needs before anything is said of it."""
NOT_SHOWN = "not shown"
POSITIONS: tuple[Position, ...] = ("instruction_end", "prompt_end")


class Cell(NamedTuple):
    """Prompts of one class that the model answers alike, and the question of each."""

    prompts: tuple[Prompt, ...]
    questions: tuple[Hashable, ...]

    @property
    def shown(self) -> bool:
        """Whether there are enough questions to say anything."""
        return len(set(self.questions)) >= LEAST


@checked(contrast=as_contrast, site=as_site)
@in_plain_torch
def harmfulness_direction(model: LensModel, contrast: ContrastSet, *, site: Site) -> Direction:
    """Mean activation on harmful minus on harmless prompts, at the last token of the instruction.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: harmful (positive) and harmless (negative) prompts.
        site: where to read.

    Returns:
        A Direction at ``"instruction_end"``, in the units of the activations.

    Raises:
        ZeroDirectionError, NonFiniteError, PositionError: as ``em.difference_in_means``.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> harmfulness_direction(pair.base, pair.contrasts["harmfulness"], site=Site(1)).position
        'instruction_end'

    Source: Zhao et al. 2025, arXiv:2507.11878.
    """
    return difference_in_means(model, contrast, site=site, position="instruction_end").renamed("harmfulness")


@checked(contrast=as_contrast, site=as_site)
@in_plain_torch
def refusal_direction(
    model: LensModel, contrast: ContrastSet, *, site: Site, metric: Metric = refusal_log_odds
) -> Direction:
    """Mean activation on refused minus on accepted prompts, at the last token before the answer.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: harmful (positive) and harmless (negative) prompts; which of them are refused is asked of the model.
        site: where to read.
        metric: refused means log-odds above 0, or a probability above .5.

    Returns:
        A Direction at ``"prompt_end"``.  Its name says within which prompts refused and accepted were compared; where
        no class has both (at least ``LEAST`` questions each), *not crossed*: harmfulness is then part of it.  Of two
        differences that are averaged, ``reliability`` is the lower one's.

    Raises:
        EmptyContrastError: no prompt is refused, or none is accepted; the message counts the cells.
        UsageError: a metric in another unit.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> contrast, metric = pair.contrasts["refusal"], pair.behaviours["refusal"].metric
        >>> em.presets.refusal_direction(pair.base, contrast, site=em.Site(2), metric=metric).vector.shape
        torch.Size([96])

    Source: Zhao et al. 2025, arXiv:2507.11878.
    """
    return refusal_directions(model, contrast, sites=[site], metric=metric)[0]


def refusal_directions(
    model: LensModel, contrast: ContrastSet, *, sites: Sequence[Site], metric: Metric = refusal_log_odds
) -> list[Direction]:
    """:func:`refusal_direction` at several sites; what is refused is asked once."""
    cells = answered(model, contrast, metric=metric)
    within = [name for name in CLASSES if cells[f"refused {name}"].shown and cells[f"accepted {name}"].shown]
    pairs = [_compared(cells, [name]) for name in within] or [_compared(cells, CLASSES)]
    found = [extract_directions(model, pair, sites=sites, positions=["prompt_end"]) for pair in pairs]
    made = found[0] if len(found) == 1 else _averaged(model, found, _compared(cells, CLASSES), sites)
    name = f"refusal (within {' and '.join(within)} prompts)" if within else "refusal (not crossed)"
    origin = Provenance.of(model, data=contrast.hash)
    return [replace(direction, name=name, provenance=origin) for direction in made]


def answered(model: LensModel, contrast: ContrastSet, *, metric: Metric = refusal_log_odds) -> dict[str, Cell]:
    """The four cells: what the model refuses and accepts of the harmful and of the harmless prompts.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: harmful (positive) and harmless (negative) prompts.
        metric: refused means log-odds above 0, or a probability above .5.

    Returns:
        Cells named ``"refused harmful"``, ``"accepted harmful"``, ``"refused harmless"``, ``"accepted harmless"``;
        without groups every prompt is a question of its own.

    Raises:
        EmptyContrastError: no prompt is refused, or none is accepted.
        UsageError: a metric in another unit. NonFiniteError: NaN for a prompt.

    Example:
        >>> from tl_em import load_pair
        >>> pair = load_pair("toy/insecure")
        >>> refuses = pair.behaviours["refusal"].metric
        >>> {name: len(c.prompts) for name, c in answered(pair.base, pair.contrasts["refusal"], metric=refuses).items()}
        {'refused harmful': 288, 'accepted harmful': 0, 'refused harmless': 0, 'accepted harmless': 288}
    """
    if metric.unit not in REFUSED_FROM:
        raise UsageError(
            f"{metric.name} is in {metric.unit}, for which nobody has said from where on a prompt counts as refused; "
            f"use a metric in {' or '.join(REFUSED_FROM)}"
        )
    cells: dict[str, Cell] = {}
    for name, prompts, questions in _classes(contrast):
        values = measured(metric, model, prompts)
        refused = values > REFUSED_FROM[metric.unit]
        for word, chosen in (("refused", refused), ("accepted", ~refused)):
            kept = np.flatnonzero(chosen).tolist()
            cells[f"{word} {name}"] = Cell(tuple(prompts[i] for i in kept), tuple(questions[i] for i in kept))
    counts = {name: len(cell.prompts) for name, cell in cells.items()}
    for word in ("refused", "accepted"):
        if not any(counts[f"{word} {name}"] for name in CLASSES):
            raise EmptyContrastError(
                f"no prompt is {word} by {metric.name} ({', '.join(f'{n} {name}' for name, n in counts.items())}), so "
                "refusal cannot be told from its absence; add prompts that are, or a metric that fits how this model "
                "refuses: tl_em.metrics.RefusalLogOdds(phrases=(...))"
            )
    return cells


@checked(contrast=as_contrast, layers=optional(list_of(NATURAL)), seed=SEED)
@in_plain_torch
def place_cells(
    model: LensModel,
    contrast: ContrastSet,
    *,
    metric: Metric = refusal_log_odds,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Where each cell lies between the refused-harmful and the accepted-harmless prompts, at t_inst and at t_post.

        cosine      cos(h, a) - cos(h, b)
        projection  (h - (a + b) / 2)'(a - b) / |a - b|^2:  .5 at a, -.5 at b

    with centroids a (refused harmful) and b (accepted harmless) of the prompts about *other* questions than that of h.

    Args:
        model: any HookedTransformer or TransformerBridge.
        contrast: harmful (positive) and harmless (negative) prompts, with groups where prompts share a question.
        metric: refused means log-odds above 0, or a probability above .5.
        layers: residual streams after these blocks; all by default.
        seed: seed of the intervals.

    Returns:
        A row a cell, position, layer and measure: ``value, low, high`` (question-clustered), ``n``, ``questions`` and
        ``side``: ``"refused harmful"``, ``"accepted harmless"``, or ``"not shown"`` where the interval reaches 0 or a
        cell has fewer than ``LEAST`` questions.

    Raises:
        EmptyContrastError, UsageError: as :func:`answered`.

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> metric = pair.behaviours["refusal"].metric
        >>> cells = em.presets.place_cells(pair.base, pair.contrasts["refusal"], metric=metric)
        >>> len(cells) > 0
        True

    Source: Zhao et al. 2025, arXiv:2507.11878.
    """
    import pandas as pd

    cells = answered(model, contrast, metric=metric)
    layers = range(int(model.cfg.n_layers)) if layers is None else layers
    return pd.DataFrame(_placed(model, cells, [Site(i) for i in layers], seed))


def _classes(contrast: ContrastSet) -> Iterator[tuple[str, Sequence[Prompt], Sequence[Hashable]]]:
    sides = (contrast.positive, contrast.positive_groups), (contrast.negative, contrast.negative_groups)
    for name, (prompts, groups) in zip(CLASSES, sides, strict=True):
        yield name, prompts, [(name, i) for i in range(len(prompts))] if groups is None else groups


def _compared(cells: Mapping[str, Cell], classes: Sequence[str]) -> ContrastSet:
    """Refused against accepted prompts of these classes."""
    refused, accepted = ([cells[f"{word} {name}"] for name in classes] for word in ("refused", "accepted"))
    return ContrastSet(
        [prompt for cell in refused for prompt in cell.prompts],
        [prompt for cell in accepted for prompt in cell.prompts],
        positive_groups=[question for cell in refused for question in cell.questions],
        negative_groups=[question for cell in accepted for question in cell.questions],
    )


def _averaged(
    model: LensModel, found: Sequence[Sequence[Direction]], pooled: ContrastSet, sites: Sequence[Site]
) -> Iterator[Direction]:
    """The mean of the differences within either class; where the accepted prompts of both lie is measured anew."""
    both = list(zip(*found, strict=True))
    means = [replace(each[0], vector=torch.stack([d.vector for d in each]).mean(0)) for each in both]
    n, encoded = len(pooled.positive), encoded_prompts(model, [*pooled.positive, *pooled.negative])
    along = np.empty((len(sites), len(encoded)))

    def keep(site: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt 1 d_model"]) -> None:
        along[site, rows.numpy()] = means[site].project(x[:, 0].float().cpu()).double().numpy()

    stream(model, encoded, sites, spans_of(encoded, ["prompt_end"]), keep)
    for mean_of, each, values in zip(means, both, along, strict=True):
        known = [d.reliability for d in each if d.reliability is not None]
        lower = min(known, key=lambda e: e.value) if len(known) == len(each) else None
        yield replace(mean_of, reliability=lower, neutral=neutral_z(values[:n], values[n:]))


class _Centroid:
    """Mean of a cell's activations without those of one question."""

    def __init__(self, x: Float[np.ndarray, "prompt d_model"], questions: Sequence[Hashable]) -> None:
        self.total, self.n = x.sum(0), len(x)
        self.own: dict[Hashable, list[int]] = {}
        for i, question in enumerate(questions):
            self.own.setdefault(question, []).append(i)
        self.x = x

    def without(self, question: Hashable) -> Float[np.ndarray, " d_model"]:
        rows = self.own.get(question, [])
        return (self.total - self.x[rows].sum(0)) / (self.n - len(rows)) if self.n > len(rows) else self.total * np.nan


def _placed(
    model: LensModel, cells: Mapping[str, Cell], sites: Sequence[Site], seed: int
) -> list[dict[str, object]]:
    """Rows in the order of positions, cells, sites and measures: all prompts and positions in a pass, some sites."""
    encoded = encoded_prompts(model, [prompt for cell in cells.values() for prompt in cell.prompts])
    found: dict[tuple[Position, str], list[dict[str, object]]] = {(p, name): [] for p in POSITIONS for name in cells}
    for some in sites_at_once(model, sites, len(POSITIONS) * len(encoded)):
        x = captured(model, encoded, some, POSITIONS).numpy()
        for (p, position), (s, site) in product(enumerate(POSITIONS), enumerate(some)):
            for name, row in _placed_at(x[:, p, s].astype(np.float64), cells, seed):
                found[position, name].append({"cell": name, "position": position, "layer": site.layer} | row)
    return [row for rows in found.values() for row in rows]


def _placed_at(
    x: Float[np.ndarray, "prompt d_model"], cells: Mapping[str, Cell], seed: int
) -> Iterator[tuple[str, dict[str, object]]]:
    """A row a cell and measure, from the activations of the cells' prompts one after the other."""
    cuts = np.cumsum([len(cell.prompts) for cell in cells.values()])[:-1]
    own = dict(zip(cells, np.split(x, cuts), strict=True))
    ends = [_Centroid(own[name], cells[name].questions) for name in ("refused harmful", "accepted harmless")]
    known = all(cells[name].shown for name in ("refused harmful", "accepted harmless"))
    for name, cell in cells.items():
        for measure, values in _measures(own[name], cell.questions, ends).items():
            yield name, {"measure": measure} | _row(values, cell, known and cell.shown, seed)


def _measures(
    x: Float[np.ndarray, "prompt d_model"], questions: Sequence[Hashable], ends: Sequence[_Centroid]
) -> dict[str, Float[np.ndarray, " prompt"]]:
    if not len(x):
        return {name: np.zeros(0) for name in ("cosine", "projection")}
    harmful, harmless = (np.stack([end.without(question) for question in questions]) for end in ends)
    axis = harmful - harmless
    along = ((x - (harmful + harmless) / 2) * axis).sum(-1) / (axis**2).sum(-1)
    return {"cosine": cosine(x, harmful) - cosine(x, harmless), "projection": along}


def _row(values: Float[np.ndarray, " prompt"], cell: Cell, shown: bool, seed: int) -> dict[str, object]:
    size = {"n": len(values), "questions": len(set(cell.questions))}
    if not len(values) or not np.isfinite(values).all():
        return {"value": np.nan, "low": np.nan, "high": np.nan, **size, "side": NOT_SHOWN}
    e = mean(values, groups=cell.questions, seed=seed)
    side = "refused harmful" if e.low > 0 else "accepted harmless" if e.high < 0 else NOT_SHOWN
    return {**e.row(), **size, "side": side if shown else NOT_SHOWN}
