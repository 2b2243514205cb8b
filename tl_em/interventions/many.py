"""One intervention along many directions at once: [direction, prompt], and equal to one direction at a time.

    row k of a batch   is treated by the intervention along direction  k // n_prompts

The batch holds every direction with every prompt.  What acts at many points edits each row along its own direction
(``Intervention.rowwise``).  Of what acts at one point each prompt runs once, and at that point edited copies of its row
join the batch, so that nothing before it is computed twice.  Only last tokens are unembedded.  Whether all that gives
what one direction gives alone is looked at on one prompt; a metric that does not allow it (it runs the model by itself)
is run one direction at a time.  A direction under which the model overflows has NaN for its numbers.

Source: Arditi et al. 2024, arXiv:2406.11717, sections 2.3 and 2.4.  Control: ``claims.controls``'s random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_em.directions.direction import Direction
from tl_em.errors import NonFiniteError, TlEmError, UsageError
from tl_em.interventions.base import Intervention, RowEdit, core, direction_of, sites_of
from tl_em.interventions.intervene import intervene
from tl_em.models.beginnings import Piece
from tl_em.models.cache import read_once
from tl_em.models.contrasts import Prompt
from tl_em.models.hooks import LensModel, hook_name, hooked
from tl_em.models.prompts import Batch, EncodedPrompt, encode
from tl_em.models.responses import mean_logprob
from tl_em.models.sites import Site
from tl_em.models.stream import current_batch, fanned_out, next_token_logits
from tl_em.models.token_scopes import running_batch

Measure = Callable[..., Float[Tensor, " prompt"]]
"""Of a model and prompts."""
Scores = Float[np.ndarray, "direction prompt"]
_BESIDE = 8
"""Directions whose rows are read together where nothing is shared among directions, but among prompts."""
_MAX_LOGITS = 2**24
"""Logits held at once, over all directions of a pass: 64 MiB in float32."""
_MAX_TOKENS = 2**14
"""Tokens of a pass over responses, over all directions, whole as they are written."""


def kl_from_now(model: LensModel, prompts: Sequence[Prompt | EncodedPrompt]) -> Measure:
    """KL(now || then) of each prompt, *now* being the model at this call; takes any of ``prompts``, also repeatedly.

    ``of=``: which of them each prompt stands for, where it is itself none of them (it has an instruction, say).
    """
    encoded = encode(model, prompts)
    before = dict(zip(encoded, next_token_logits(model, encoded).double().log_softmax(-1), strict=True))
    weights = {prompt: logprobs.exp() for prompt, logprobs in before.items()}

    def measure(model: LensModel, prompts: Sequence[Any], of: Sequence[Any] | None = None) -> Tensor:
        asked = encode(model, prompts)
        after = zip(asked if of is None else encode(model, of), next_token_logits(model, asked), strict=True)
        return torch.stack([(weights[p] * (before[p] - x.double().log_softmax(-1))).sum() for p, x in after])

    return measure


@dataclass(frozen=True, eq=False)
class Along:
    """An intervention along each of many directions.

    Args:
        template: the intervention; its own direction is replaced.
        vectors: the directions.
        sites: the site of each direction; that of the template's own where none are given.

    Raises:
        UsageError: the template has no direction that another one could replace.
    """

    template: Intervention
    vectors: Float[Tensor, "direction d_model"]
    sites: Sequence[Site] = ()

    def alone(self, k: int) -> Intervention:
        """The intervention along direction ``k``."""
        own = direction_of(self.template) or Direction(self.vectors[k], Site(0))  # which ``along`` refuses
        site = self.sites[k] if self.sites else own.site
        return self.template.along(replace(own, vector=self.vectors[k], site=site, neutral=None))

    @cached_property
    def homes(self) -> list[Site | None]:
        """Of each direction the one site at which the intervention acts along it; ``None`` if there are several."""
        sites: list[Any] = list(self.sites) or [None] * len(self.vectors)
        found = {site: sites_of(self.alone(sites.index(site))) for site in dict.fromkeys(sites)}
        single = {site: at[0] for site, at in found.items() if not isinstance(at, str) and len(at) == 1}
        return [single.get(site) for site in sites]

    @cached_property
    def edit(self) -> RowEdit:
        """All directions at once, each in rows of its own."""
        return self.template.rowwise(self.vectors)


def along_each(
    model: LensModel,
    edits: Along,
    prompts: Sequence[Any],
    measure: Measure,
    *,
    at_once: int | None = None,
    said: str = "",
) -> Scores:
    """The measure of each prompt under the intervention along each direction.

    Args:
        model: any HookedTransformer or TransformerBridge.
        edits: the intervention and the directions.
        prompts: what is measured on.
        measure: one number a prompt.
        at_once: how many prompts share a batch where directions share what lies before the edit; as many as their
            logits allow with all directions by default.
        said: what a progress bar calls it; no bar without.
    """
    if (responses := getattr(measure, "responses", None)) is not None:
        read = responses(model, prompts)
        found = along_each(model, edits, read.encoded, mean_logprob, said=said)
        return read.summed(torch.from_numpy(found)).numpy()
    everything = range(len(edits.vectors))
    edits = replace(edits, vectors=edits.vectors.to(model.cfg.device))
    together = len(everything) > 1 and core(edits.template) is edits.template  # a wrapper may tell rows apart
    found = _together(model, edits, prompts, measure, at_once, said) if together else None
    return _apart(model, edits, everything, prompts, measure, said) if found is None else found


def _apart(
    model: LensModel, edits: Along, part: range, prompts: Sequence[Any], measure: Measure, said: str = ""
) -> Scores:
    """One direction at a time."""
    each = tqdm(part, desc=said, unit="direction", disable=None if said else True, leave=False)
    return np.concatenate([_one(model, edits.alone(k), prompts, measure) for k in each])


def _one(model: LensModel, edit: Intervention, prompts: Sequence[Any], measure: Measure) -> Scores:
    """[1 prompt]: the reference, through ``intervene``; NaN where the model overflows."""
    try:
        with intervene(model, edit):
            return measure(model, prompts).double().cpu().numpy()[None]
    except NonFiniteError:
        return np.full((1, len(prompts)), np.nan)


def _together(
    model: LensModel, edits: Along, prompts: Sequence[Any], measure: Measure, at_once: int | None, said: str
) -> Scores | None:
    """None unless a direction of the first batch has what it has alone, on the first prompt."""
    n, rows = len(edits.vectors), max(1, _MAX_LOGITS // int(model.cfg.d_vocab))
    apart = None in edits.homes  # directions share nothing, so prompts shall: few directions at once
    wide, tall = min(n, rows, _BESIDE if apart and len(prompts) > 1 else n), at_once or len(prompts)
    if measure is mean_logprob:  # responses to one prompt go on from it, so all of them shall be read together
        rows, tall = max(1, _MAX_TOKENS // max(map(len, prompts))), len(prompts)
        wide = min(n, rows, max(_BESIDE, rows // tall))
    tall = max(1, min(rows // wide, len(prompts) if apart else tall))
    out = np.empty((n, len(prompts)))
    batches = tqdm(range(0, len(prompts), tall), desc=said, unit="batch", disable=None if said else True, leave=False)
    try:
        for j in batches:
            for i in range(0, n, wide):
                part = range(n)[i : i + wide]
                out[i : i + wide, j : j + tall] = _stack(model, edits, part, prompts[j : j + tall], measure)
                if i == j == 0:
                    alone = _one(model, edits.alone(wide - 1), prompts[:1], measure)
                    if not np.allclose(out[wide - 1 : wide, :1], alone, rtol=1e-3, atol=1e-4, equal_nan=True):
                        return None
    except (TlEmError, RuntimeError, IndexError, ValueError):
        return None
    return out


def _stack(model: LensModel, edits: Along, part: range, prompts: Sequence[Any], measure: Measure) -> Scores:
    treated = _edited_rows if None in edits.homes else _joined_rows
    try:
        with treated(model, edits, part, len(prompts)):
            values = measure(model, list(prompts) * len(part))
    except NonFiniteError:  # of one of them, maybe: the others keep their numbers
        return _apart(model, edits, part, prompts, measure)
    return values.double().cpu().numpy().reshape(len(part), len(prompts))


# --- At many points: a direction a row --------------------------------------------------------------------------------


@contextmanager
def _edited_rows(model: LensModel, edits: Along, part: range, n_prompts: int) -> Iterator[None]:
    """Row k of what was asked for is edited along direction ``k // n_prompts`` of the part, at every point."""
    rows: dict[str, Any] = {}

    def apply(x: Tensor, hook: Any, *, name: str) -> Tensor:
        batch = running_batch("an edit along many directions")
        if rows.get("batch") is not batch:
            rows.update(batch=batch, of=part.start + torch.tensor(batch.rows) // n_prompts)
        return edits.edit(x, rows["of"], name)

    def alike(batch: Batch, length: int) -> list[int] | None:
        return [row // n_prompts for row in batch.rows] if edits.template.tokenwise else None

    hooks = [(name, partial(apply, name=name)) for name in edits.template.points(model)]
    for _, each in hooks:
        each.__dict__["alike"] = alike
    with hooked(model, hooks):
        yield


# --- At one point: copies join the batch where they part from the prompt ----------------------------------------------


class _Entered(Exception):
    """Raised at the first block, when what enters it is all that was wanted."""


class _Joining:
    """Passes whose row k is prompt ``k % n_prompts`` edited along direction ``k // n_prompts`` of a part, at one site.

    A pass begins with one row, so that the mask and the positions that the model makes fit any number of rows.  At the
    first block's input that row gives way to one for each prompt; at each site copies of these join, edited.
    """

    def __init__(self, model: LensModel, edits: Along, part: range, n_prompts: int) -> None:
        self.model, self.n_prompts, self.edits, self.start = model, n_prompts, edits, part.start
        homes = [site for k in part if (site := edits.homes[k]) is not None]
        self.sites = sorted(set(homes), key=lambda site: (site.layer, site.stream == "resid_post"))
        self.at = [self.sites.index(site) for site in homes]
        self.alone: Batch | None = None

    def enter(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """At the first block's input: one row for each prompt."""
        if running_batch("an edit along many directions") is self.alone:
            raise _Entered(x)
        self.batch, self.joined = running_batch("an edit along many directions"), list[int]()
        self.first = self._first(rows)
        self.slot = {rows[i] % self.n_prompts: k for k, i in enumerate(self.first)}
        before = self.batch.only(self.first)
        self.alone = before._replace(start=0)
        if len(self.first) == 1:
            current_batch.set(before)
            return x[:1]
        current_batch.set(self.alone)
        try:
            read_once(self.model, self.alone.tokens)
        except _Entered as entered:
            current_batch.set(before)
            return entered.args[0][:, self.batch.start :]
        raise UsageError("nothing entered the first block, so no prompts can be put together there")

    def _first(self, rows: Sequence[int]) -> list[int]:
        """A row of each prompt; the longest prompt, with which the pass began, stays in front."""
        return sorted({row % self.n_prompts: i for i, row in reversed(list(enumerate(rows)))}.values())

    def join(self, x: Tensor, hook: Any, *, site: int) -> Tensor:
        """At a site: copies join, edited along its directions; the untouched rows leave with the last of them."""
        rows = self.batch.rows
        new = self._new(rows, site)
        if not new:
            return x
        copies = x[[self.slot[rows[i] % self.n_prompts] for i in new]]
        which = self.start + torch.tensor([rows[i] // self.n_prompts for i in new])
        copies = self.edits.edit(copies, which, self.sites[site].hook_name)
        self.joined += new
        first = self.first if len(self.joined) < len(rows) else []
        current_batch.set(self.batch.only([*first, *self.joined]))
        return torch.cat([x if first else x[len(self.first) :], copies])

    def _new(self, rows: Sequence[int], site: int) -> list[int]:
        return [i for i, row in enumerate(rows) if self.at[row // self.n_prompts] == site]

    def alike(self, batch: Batch, length: int) -> list[int] | None:
        """Rows of one direction: ``models.hooks.Alike``."""
        return [row // self.n_prompts for row in batch.rows] if self.edits.template.tokenwise else None

    def _at(self, rows: Sequence[int], layer: int) -> tuple[list[int], list[int]]:
        """Which rows run through a layer's attention: untouched ones, and those that have joined by then."""
        before = [k for k, s in enumerate(self.sites) if s.layer < layer or (s.layer, s.stream) == (layer, "resid_pre")]
        joined = [i for site in before for i in self._new(rows, site)]
        return self._first(rows) if len(joined) < len(rows) else [], joined

    def carried(self, piece: Piece, layer: int) -> list[int]:
        """Of a piece, for each row at a layer the one of the piece before that it goes on from."""
        assert piece.after is not None
        rows, earlier = piece.batch.rows, piece.after.batch.rows
        first, joined = self._at(rows, layer)
        first_before, joined_before = self._at(earlier, layer)
        untouched = {earlier[i] % self.n_prompts: k for k, i in enumerate(first_before)}
        edited = {i: len(first_before) + k for k, i in enumerate(joined_before)}
        return [untouched[earlier[piece.of[i]] % self.n_prompts] for i in first] + [edited[piece.of[i]] for i in joined]

    def leave(self, x: Tensor, hook: Any) -> Tensor:
        """After the last block: the order that was asked for."""
        current_batch.set(self.batch)
        return x[torch.tensor(self.joined).argsort().to(x.device)]


@contextmanager
def _joined_rows(model: LensModel, edits: Along, part: range, n_prompts: int) -> Iterator[None]:
    """Row k of what was asked for is edited along direction ``k // n_prompts`` of the part, at its site."""
    pass_ = _Joining(model, edits, part, n_prompts)
    hooks = [(hook_name(model, site), partial(pass_.join, site=i)) for i, site in enumerate(pass_.sites)]
    end = hook_name(model, Site(int(model.cfg.n_layers) - 1, "resid_post"))
    hooks.append((end, partial(pass_.leave)))
    for _, each in hooks:
        each.__dict__["alike"] = pass_.alike
    carried = pass_.carried if hasattr(model, "original_model") else None  # a HookedTransformer keeps one row for all
    start = Site(0, "resid_pre")
    with fanned_out(model, start, pass_.enter, alike=pass_.alike, carried=carried), hooked(model, hooks):
        yield
