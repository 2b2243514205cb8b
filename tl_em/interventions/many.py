"""The three scores of many directions at once: each [candidate prompt], and equal to one direction at a time.

    bypass   the metric under x - r r'x at every write, r a unit vector
    induce   the metric under x + v at the direction's site, v the raw vector
    KL       KL(untouched || ablated) of the next token, in nats

The batch holds every direction with every prompt.  Ablations have a direction a row.  For additions each prompt runs
once, and at every candidate's site an edited copy of its row joins the batch, so that nothing before a site is computed
twice.  Only last tokens are unembedded.  Whether all that gives what one direction gives alone is looked at on one
prompt; a metric that does not allow it (it runs the model by itself) is run one direction at a time.  A candidate under
which the model overflows has NaN for its scores.

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
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel, hook_name, hooked, write_points
from tl_em.models.prompts import Batch, EncodedPrompt, encode
from tl_em.models.sites import Site
from tl_em.models.stream import current_batch, fanned_out, next_token_logits

Measure = Callable[[LensModel, Sequence[Any]], Float[Tensor, " prompt"]]
Scores = Float[np.ndarray, "candidate prompt"]
_MAX_LOGITS = 2**25
"""Logits held at once, over all candidates of a pass: 128 MiB in float32."""


def bypass(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], metric: Metric) -> Scores:
    """The metric of each prompt with each direction ablated at every write."""
    return _checked(model, directions, prompts, metric, _ablated_together, Ablate)


def induce(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt], metric: Metric) -> Scores:
    """The metric of each prompt with each direction added once at its site."""
    return _checked(model, directions, prompts, metric, _added_together, Add)


def divergence(model: LensModel, directions: Sequence[Direction], prompts: Sequence[Prompt]) -> Scores:
    """KL of the next token from the untouched model, for each prompt with each direction ablated, in nats."""
    encoded = encode(model, prompts)
    return _together(model, directions, encoded, kl_from_now(model, encoded), _ablated_together)


def kl_from_now(model: LensModel, prompts: Sequence[Prompt | EncodedPrompt]) -> Measure:
    """KL(now || then) of each prompt, *now* being the model at this call; takes any of ``prompts``, also repeatedly."""
    encoded = encode(model, prompts)
    before = dict(zip(encoded, next_token_logits(model, encoded).double().log_softmax(-1), strict=True))
    weights = {prompt: logprobs.exp() for prompt, logprobs in before.items()}

    def measure(model: LensModel, prompts: Sequence[Any]) -> Tensor:
        asked = encode(model, prompts)
        after = zip(asked, next_token_logits(model, asked), strict=True)
        return torch.stack([(weights[p] * (before[p] - x.double().log_softmax(-1))).sum() for p, x in after])

    return measure


# --- All directions together, and whether that is the same ------------------------------------------------------------

Together = Callable[[LensModel, Sequence[Direction], int], Any]
Edit = type[Ablate] | type[Add]


def _checked(
    model: LensModel,
    directions: Sequence[Direction],
    prompts: Sequence[Prompt],
    measure: Measure,
    together: Together,
    edit: Edit,
) -> Scores:
    found = _at_once(model, directions, prompts, measure, together, edit)
    return _apart(model, directions, prompts, measure, edit) if found is None else found


def _at_once(
    model: LensModel,
    directions: Sequence[Direction],
    prompts: Sequence[Prompt],
    measure: Measure,
    together: Together,
    edit: Edit,
) -> Scores | None:
    """None unless the last direction has what it has alone, on the first prompt."""
    if len(directions) == 1:
        return None  # nothing to put together
    try:
        found = _together(model, directions, prompts, measure, together)
    except (TlEmError, RuntimeError, IndexError, ValueError):
        return None
    alone = _one(model, edit(directions[-1]), prompts[:1], measure)
    return found if np.allclose(found[-1:, :1], alone, rtol=1e-3, atol=1e-4, equal_nan=True) else None


def _apart(
    model: LensModel, directions: Sequence[Direction], prompts: Sequence[Any], measure: Measure, edit: Edit
) -> Scores:
    return np.concatenate([_one(model, edit(direction), prompts, measure) for direction in directions])


def _one(model: LensModel, edit: Ablate | Add, prompts: Sequence[Any], measure: Measure) -> Scores:
    """[1 prompt]: the reference, through ``intervene``; NaN where the model overflows."""
    try:
        with intervene(model, edit):
            return measure(model, prompts).double().cpu().numpy()[None]
    except NonFiniteError:
        return np.full((1, len(prompts)), np.nan)


def _together(
    model: LensModel, directions: Sequence[Direction], prompts: Sequence[Any], measure: Measure, together: Together
) -> Scores:
    """As many prompts at once as their logits allow with all directions, which share what comes before their sites."""
    rows = max(1, _MAX_LOGITS // int(model.cfg.d_vocab))
    wide = min(len(directions), rows)
    out = np.empty((len(directions), len(prompts)))
    for j in range(0, len(prompts), tall := rows // wide):
        for i in range(0, len(directions), wide):
            part = directions[i : i + wide]
            out[i : i + wide, j : j + tall] = _stack(model, part, prompts[j : j + tall], measure, together)
    return out


def _stack(
    model: LensModel, directions: Sequence[Direction], prompts: Sequence[Any], measure: Measure, together: Together
) -> Scores:
    try:
        with together(model, directions, len(prompts)):
            values = measure(model, list(prompts) * len(directions))
    except NonFiniteError:  # of one of them, maybe: the others keep their scores
        return _apart(model, directions, prompts, measure, Ablate if together is _ablated_together else Add)
    return values.double().cpu().numpy().reshape(len(directions), len(prompts))


# --- Ablation: a direction a row --------------------------------------------------------------------------------------


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


# --- Addition: copies join the batch where they part from the prompt --------------------------------------------------


class _Entered(Exception):
    """Raised at the first block, when what enters it is all that was wanted."""


class _Joining:
    """Passes whose row k is prompt ``k % n_prompts`` with direction ``k // n_prompts`` added once, at its site.

    A pass begins with one row, so that the mask and the positions that the model makes fit any number of rows.  At the
    first block's input that row gives way to one for each prompt; at each site copies of these join, edited.
    """

    def __init__(self, model: LensModel, directions: Sequence[Direction], n_prompts: int) -> None:
        self.model, self.n_prompts = model, n_prompts
        self.vectors = torch.stack([direction.vector for direction in directions]).to(model.cfg.device)
        self.sites = sorted({direction.site for direction in directions}, key=_depth)
        self.at = [self.sites.index(direction.site) for direction in directions]
        self.alone: Batch | None = None

    def enter(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """At the first block's input: one row for each prompt."""
        if _running() is self.alone:
            raise _Entered(x)
        self.batch, self.joined = _running(), list[int]()
        first = {row % self.n_prompts: i for i, row in reversed(list(enumerate(rows)))}
        self.first = sorted(first.values())  # the longest prompt, with which the pass began, stays in front
        self.slot = {rows[i] % self.n_prompts: k for k, i in enumerate(self.first)}
        self.alone = _rows(self.batch, self.first)
        current_batch.set(self.alone)
        try:
            self.model(self.alone.tokens.to(self.model.cfg.device), padding_side="right")
        except _Entered as entered:
            return entered.args[0]
        raise UsageError("nothing entered the first block, so no prompts can be put together there")

    def join(self, x: Tensor, hook: Any, *, site: int) -> Tensor:
        """At a site: copies with its directions added; the untouched rows leave with the last of them."""
        rows = self.batch.rows
        new = [i for i, row in enumerate(rows) if self.at[row // self.n_prompts] == site]
        if not new:
            return x
        copies = x[[self.slot[rows[i] % self.n_prompts] for i in new]]
        copies += self.vectors[[rows[i] // self.n_prompts for i in new]][:, None].to(x.device, x.dtype)
        self.joined += new
        first = self.first if len(self.joined) < len(rows) else []
        current_batch.set(_rows(self.batch, [*first, *self.joined]))
        return torch.cat([x if first else x[len(self.first) :], copies])

    def leave(self, x: Tensor, hook: Any) -> Tensor:
        """After the last block: the order that was asked for."""
        current_batch.set(self.batch)
        return x[torch.tensor(self.joined).argsort().to(x.device)]


@contextmanager
def _added_together(model: LensModel, directions: Sequence[Direction], n_prompts: int) -> Iterator[None]:
    """Row k of what was asked for has direction ``k // n_prompts`` added, at its site."""
    pass_ = _Joining(model, directions, n_prompts)
    hooks = [(hook_name(model, site), partial(pass_.join, site=i)) for i, site in enumerate(pass_.sites)]
    end = hook_name(model, Site(int(model.cfg.n_layers) - 1, "resid_post"))
    with fanned_out(model, Site(0, "resid_pre"), pass_.enter), hooked(model, [*hooks, (end, pass_.leave)]):
        yield


def _rows(batch: Batch, index: Sequence[int]) -> Batch:
    """Some rows of a batch."""
    parts = {name: getattr(batch, name)[list(index)] for name in ("tokens", "lengths", "prompts", "instructions")}
    return batch._replace(rows=tuple(batch.rows[i] for i in index), **parts)


def _depth(site: Site) -> tuple[int, bool]:
    return site.layer, site.stream == "resid_post"


def _running() -> Batch:
    batch = current_batch.get()
    if batch is None:
        raise UsageError("a forward pass of its own does not say which rows it runs; use next_token_logits")
    return batch
