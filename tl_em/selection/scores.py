"""The three scores of many directions at once: each [candidate prompt], and equal to one direction at a time.

    bypass   the metric under x - r r'x at every write, r a unit vector
    induce   the metric under x + v at the direction's site, v the raw vector
    KL       KL(untouched || ablated) of the next token, in nats

Ablations are stacked in the batch, a direction a row.  For additions each prompt runs once: at every candidate's site
copies of the untouched row branch off, edited, so that nothing before a site is computed twice.  Only last tokens are
unembedded. A metric that does not allow this (it runs the model by itself) is noticed on one prompt, and then run one
direction at a time.  A candidate under which the model overflows has NaN for its scores.

Source: Arditi et al. 2024, arXiv:2406.11717, sections 2.3 and 2.4.  Control: ``select_direction``'s random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.directions.direction import Direction
from tl_em.errors import NonFiniteError, TlEmError, UsageError
from tl_em.interventions.edits import Ablate, Add
from tl_em.interventions.intervene import intervene
from tl_em.metrics import Metric
from tl_em.models.capture import current_batch, fanned_out, next_token_logits
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel, hook_name, hooked, write_points
from tl_em.models.sites import Site

Measure = Callable[[LensModel, Sequence[Prompt]], Float[Tensor, " prompt"]]
Scores = Float[np.ndarray, "candidate prompt"]
_MAX_LOGITS = 2**25
"""Logits held at once, over all candidates of a pass: 128 MiB in float32."""


def bypass(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], metric: Metric) -> Scores:
    """The metric of each prompt with each direction ablated at every write."""
    stackable = _agrees(model, directions, prompts[:1], metric, _ablated_together, Ablate)
    return _under_ablation(model, directions, prompts, metric, stackable=stackable)


def divergence(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt]) -> Scores:
    """KL of the next token from the untouched model, for each prompt with each direction ablated, in nats."""
    return _under_ablation(model, directions, prompts, kl_from_now(model, prompts), stackable=True)


def induce(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], metric: Metric) -> Scores:
    """The metric of each prompt with each direction added once at its site."""
    order = sorted(range(len(directions)), key=lambda i: _depth(directions[i].site))
    out = np.empty((len(directions), len(prompts)))
    ordered = [directions[i] for i in order]
    if _agrees(model, ordered, prompts[:1], metric, _added_together, Add):
        out[order] = np.concatenate([_branched(model, ordered, prompt, metric) for prompt in prompts], axis=1)
    else:
        out[order] = np.concatenate([_one(model, Add(d), prompts, metric) for d in ordered])
    return out


def kl_from_now(model: LensModel, prompts: Sequence[Prompt]) -> Measure:
    """KL(now || then) of each prompt, *now* being the model at this call; takes whole repeats of ``prompts``."""
    before = next_token_logits(model, prompts).double().log_softmax(-1)
    weights = before.exp()

    def measure(model: LensModel, prompts: Sequence[Prompt]) -> Tensor:
        after = next_token_logits(model, prompts)
        parts = [part.double().log_softmax(-1) for part in after.split(len(before))]
        return torch.cat([(weights * (before - part)).sum(-1) for part in parts])

    return measure


# --- Ablation: a direction a row --------------------------------------------------------------------------------------


def _under_ablation(
    model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], measure: Measure, *, stackable: bool
) -> Scores:
    size = max(1, _MAX_LOGITS // (len(prompts) * int(model.cfg.d_vocab))) if stackable else 1
    parts = [directions[i : i + size] for i in range(0, len(directions), size)]
    run = _stack if stackable else lambda model, part, *rest: _one(model, Ablate(part[0]), *rest)
    return np.concatenate([run(model, part, prompts, measure) for part in parts])


def _stack(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], measure: Measure) -> Scores:
    try:
        with _ablated_together(model, directions, len(prompts)):
            values = measure(model, list(prompts) * len(directions))
    except NonFiniteError:  # of one of them, maybe: the others keep their scores
        return np.concatenate([_one(model, Ablate(direction), prompts, measure) for direction in directions])
    return values.double().cpu().numpy().reshape(len(directions), len(prompts))


@contextmanager
def _ablated_together(model: LensModel, directions: Sequence[Direction], n_prompts: int) -> Iterator[None]:
    """Row k of what was asked for is ablated along direction ``k // n_prompts``, at every write."""
    units = torch.stack([direction.unit for direction in directions]).to(model.cfg.device)
    rows: dict[str, Any] = {}

    def ablate(x: Tensor, hook: Any) -> Tensor:
        batch = _running()
        if rows.get("batch") is not batch:
            rows.update(batch=batch, units=units[torch.tensor(batch.rows) // n_prompts])
        return without_rows(x, rows["units"])

    with hooked(model, [(name, ablate) for name in write_points(model)]):
        yield


def without_rows(x: Float[Tensor, "row pos d_model"], units: Float[Tensor, "row d_model"]) -> Tensor:
    """``x - r r'x`` with a unit vector for each row, in float32 or better.

    Example:
        >>> without_rows(torch.ones(2, 1, 2), torch.eye(2)).tolist()
        [[[0.0, 1.0]], [[1.0, 0.0]]]
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    units = units.to(x.device, wide)
    along = torch.bmm(x.to(wide), units[:, :, None])
    if x.dtype == wide:
        return torch.baddbmm(x, along, units[:, None], alpha=-1)
    return x - (along * units[:, None]).to(x.dtype)


# --- Addition: copies branch off where they part ----------------------------------------------------------------------


def _branched(model: LensModel, directions: Sequence[Direction], prompt: Prompt, metric: Metric) -> Scores:
    """[candidate 1]: directions are in the order of their sites."""
    size = max(1, _MAX_LOGITS // int(model.cfg.d_vocab))
    out = []
    for start in range(0, len(directions), size):
        part = directions[start : start + size]
        try:
            with _added_together(model, part, 1):
                out.append(metric(model, [prompt] * len(part)).double().cpu().numpy()[:, None])
        except NonFiniteError:
            out += [_one(model, Add(direction), [prompt], metric) for direction in part]
    return np.concatenate(out)


@contextmanager
def _added_together(model: LensModel, directions: Sequence[Direction], _: int) -> Iterator[None]:
    """One prompt's row runs from the start; each direction's copy joins the batch at its site, edited."""
    vectors = torch.stack([direction.vector for direction in directions]).to(model.cfg.device)
    sites = sorted({direction.site for direction in directions}, key=_depth)
    at = {site: [i for i, direction in enumerate(directions) if direction.site == site] for site in sites}

    def branch(x: Tensor, rows: Sequence[int], *, site: Site) -> Tensor:
        new = [i for i in at[site] if rows[0] <= i <= rows[-1]]
        if not new:
            return x
        joining = x[:1] + vectors[new][:, None].to(x.device, x.dtype)
        last = new[-1] == rows[-1]  # the untouched row, which comes first, is copied for the last time
        return torch.cat([x[1:] if last else x, joining])

    def first(x: Tensor, rows: Sequence[int]) -> Tensor:
        return branch(x[:1], rows, site=sites[0])

    def later(x: Tensor, hook: Any, *, site: Site) -> Tensor:
        return branch(x, _running().rows, site=site)

    hooks = [(hook_name(model, site), partial(later, site=site)) for site in sites[1:]]
    with fanned_out(model, sites[0], first), hooked(model, hooks):
        yield


def _depth(site: Site) -> tuple[int, bool]:
    return site.layer, site.stream == "resid_post"


# --- One at a time, and whether together is the same ------------------------------------------------------------------


def _one(model: LensModel, edit: Ablate | Add, prompts: Sequence[Prompt], measure: Measure) -> Scores:
    """[1 prompt]: the reference, through ``intervene``; NaN where the model overflows."""
    try:
        with intervene(model, edit):
            return measure(model, prompts).double().cpu().numpy()[None]
    except NonFiniteError:
        return np.full((1, len(prompts)), np.nan)


def _agrees(
    model: LensModel,
    directions: Sequence[Direction],
    prompts: Sequence[Prompt],
    measure: Measure,
    together: Callable[..., Any],
    edit: type[Ablate] | type[Add],
) -> bool:
    """Whether the first and the last direction give together what they give alone, on these prompts."""
    if len(directions) == 1:
        return False  # nothing to put together
    pair = [directions[0], directions[-1]]
    alone = np.concatenate([_one(model, edit(direction), prompts, measure) for direction in pair])
    try:
        with together(model, pair, len(prompts)):
            values = measure(model, list(prompts) * 2).double().cpu().numpy().reshape(alone.shape)
    except (TlEmError, RuntimeError, IndexError, ValueError):
        return False
    return np.allclose(values, alone, rtol=1e-3, atol=1e-4, equal_nan=True)


def _running() -> Any:
    batch = current_batch.get()
    if batch is None:
        raise UsageError("a forward pass of its own does not say which rows it runs; use next_token_logits")
    return batch
