"""Nodes of a graph with dictionaries: active latents, what they leave unexplained, and the tokens.

    a latent reads along its gradient (ours: its column of W_enc) where its dictionary reads, and writes
    activation * its row of W_dec where that writes; an error node writes  x_out - decode(a) - x_in W_skip;  a token
    writes its embedding

With a transcoder for the MLPs every MLP output is a constant in the backward pass (one that no transcoder explains is
an error node whole), and the edges are exact. With SAEs gradients stop at each SAE, and what lies between two of them
(an MLP, a norm) is linearised at this prompt: edges are of first order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.protocol import as_dictionary
from tl_em.errors import UsageError
from tl_em.graph.adapters import adapter_writes
from tl_em.graph.cost import COPIES, TRIAL, UNLIMITED, Cost, Limits, budgeted, seconds_of, whole
from tl_em.graph.edges import Pass, Wiring, Written, total_gradients, totals_of
from tl_em.graph.gradients import STREAM, Linearised, Reader, linearise
from tl_em.graph.halfway import halfway
from tl_em.graph.nodes import STAGES, Node
from tl_em.graph.rules import as_rule
from tl_em.graph.rules.base import CLOSE, AnyRule, Rule
from tl_em.graph.rules.relp import RelP
from tl_em.graph.targets import Goal, Target, goal_of, point_of, text_of
from tl_em.models.hooks import LensModel, ReadPoint, hook_name, hook_points, read_point
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Site


@dataclass(frozen=True, eq=False)
class Sheet:
    """One dictionary on one model: where it reads and writes, and on one prompt its activations and error.

    Args:
        dictionary: on the model's device; None for a write that no dictionary explains.
        site: where it writes; out: the hook point of that.
        source: where it reads.
        x: [pos d_model] that it reads; a: [pos d_sae], 0 where off; error: [pos width].
    """

    dictionary: Dictionary | None
    site: Site
    out: str
    source: ReadPoint | None = None
    a: Float[Tensor, "pos d_sae"] | None = None
    error: Float[Tensor, "pos d_model"] | None = None
    x: Float[Tensor, "pos d_model"] | None = None

    @property
    def stage(self) -> tuple[int, int]:
        """Its place in causal order."""
        return (self.site.layer, STAGES[self.site.stream])


def listed(dictionaries: Any) -> list[Dictionary]:
    """One dictionary, several, or a mapping of them, as a list."""
    some = dictionaries.values() if isinstance(dictionaries, Mapping) else dictionaries
    several = isinstance(some, Iterable) and not hasattr(some, "encode")
    each = list(some) if several else [some]
    if not each:
        raise UsageError("dictionaries= is empty; leave it out for a graph of heads and MLPs")
    return [as_dictionary(one).reading_one_site() for one in each]


def is_exact(dictionaries: Sequence[Dictionary]) -> bool:
    """Whether every dictionary replaces an MLP by an encoder that is affine where on: the frozen model is linear."""
    return all(d.affine and d.site_in.stream == "mlp_in" and _out(d).stream == "mlp_out" for d in dictionaries)


def _out(dictionary: Dictionary) -> Site:
    assert dictionary.site_out is not None
    return dictionary.site_out


def sheets_of(model: LensModel, dictionaries: Sequence[Dictionary]) -> list[Sheet]:
    """Where each dictionary reads and writes, in causal order; in an exact graph also the MLPs without one.

    Raises:
        UsageError: two dictionaries write one site. WidthError, ProvenanceError: one belongs to another model.
    """
    found = []
    for one in dictionaries:
        one.check(model)
        place = hook_name(model, _out(one))
        source = read_point(model, one.site_in)
        found.append(Sheet(one.to(model.cfg.device), _out(one), place, source))
    places = [sheet.out for sheet in found]
    if len(set(places)) < len(places):
        twice = sorted({place for place in places if places.count(place) > 1})
        raise UsageError(f"several dictionaries write {twice}, so what each explains is not defined; give one a site")
    if is_exact(dictionaries):
        bare = [Site(layer, "mlp_out") for layer in range(int(model.cfg.n_layers))]
        found += [Sheet(None, s, s.hook_name) for s in bare if s.hook_name not in places]
    return sorted(found, key=lambda sheet: sheet.stage)


def filled(sheet: Sheet, linear: Linearised, skip: Sequence[int]) -> Sheet:
    """The sheet with this prompt's activations and error; nothing at the positions to skip."""
    written = linear.value(sheet.out)
    kept = torch.ones(len(written), 1, dtype=written.dtype, device=written.device)
    kept[list(skip)] = 0
    if sheet.dictionary is None or sheet.source is None:
        return replace(sheet, error=written * kept)
    one = sheet.dictionary
    x = sheet.source(linear.read[sheet.source.name]).detach()[0]
    a = one.encode_as(x)
    error = written - a @ one.W_dec.to(a) - one.b_dec.to(a)
    if (skipped := one.W_skip) is not None:
        error = error - x @ skipped.to(x)
    return replace(sheet, a=a * kept, error=error * kept, x=x)


def without(sheet: Sheet, parts: Sequence[Written]) -> Sheet:
    """The sheet whose error leaves out what is a node of its own."""
    assert sheet.error is not None
    error = sheet.error.clone()
    for part in parts:
        if part.point == sheet.out and error[part.node.pos].abs().sum() > 0:
            error[part.node.pos] -= part.vector
    return replace(sheet, error=error)


def keeping(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """For cuts of skip transcoders: the part of the write that stays connected to what the MLP reads."""
    kept = {}
    for sheet in sheets:
        skipped = None if sheet.dictionary is None else sheet.dictionary.W_skip
        if skipped is not None and sheet.source is not None:
            skipped = skipped.clone() if skipped.is_inference() else skipped  # which no gradient may pass
            kept[sheet.out] = lambda read, s=sheet.source, w=skipped: s(read[s.name]) @ w.to(read[s.name])
    return kept


# --- Nodes ------------------------------------------------------------------------------------------------------------


def token_writes(model: LensModel, linear: Linearised, ids: Sequence[int], labels: Sequence[str]) -> list[Written]:
    """One node a token: the first residual stream, less the positions' embedding."""
    value = linear.value(STREAM)
    if (positional := linear.read.get("hook_pos_embed")) is not None:
        value = value - positional.detach()[0]
    nodes = [Node("token", -1, pos, feature=int(t), label=labels[pos]) for pos, t in enumerate(ids)]
    return [Written(node, STREAM, value[node.pos]) for node in nodes]


def has_positions(model: LensModel) -> bool:
    """Whether the model adds learned embeddings of positions at the start."""
    return isinstance(getattr(model, "pos_embed", None), nn.Module) and "hook_pos_embed" in hook_points(model)


def latent_writes(sheet: Sheet, keep: Bool[Tensor, "pos d_sae"] | None) -> list[Written]:
    """Active latents in order of position, then the errors; what is not kept goes into the error."""
    found: list[Written] = []
    stream, layer, error = sheet.site.stream, sheet.site.layer, sheet.error
    assert error is not None
    if sheet.dictionary is not None and sheet.a is not None:
        a, rows = sheet.a, sheet.dictionary.W_dec.to(sheet.a)
        shown = a != 0 if keep is None else (a != 0) & keep
        error = error + (a * ~shown) @ rows
        for pos, latent in shown.nonzero().tolist():
            value = float(a[pos, latent])
            node = Node("feature", layer, pos, feature=latent, stream=stream, activation=value)
            found.append(Written(node, sheet.out, a[pos, latent] * rows[latent], sheet))
    for pos in range(len(error)):
        if error[pos].abs().sum() > 0:
            node = Node("error", layer, pos, feature=-1, stream=stream, activation=float(error[pos].norm()))
            found.append(Written(node, sheet.out, error[pos]))
    return found


def readers_of(written: Sequence[Written]) -> list[Reader]:
    """What the latents read, one reader a dictionary; row = place in the list."""
    found = []
    by_sheet: dict[int, list[int]] = {}
    for row, each in enumerate(written):
        if each.sheet is not None:
            by_sheet.setdefault(id(each.sheet), []).append(row)
    for rows in by_sheet.values():
        sheet = written[rows[0]].sheet
        assert sheet is not None and sheet.dictionary is not None and sheet.source is not None
        at = torch.tensor([written[row].node.feature for row in rows])
        positions = torch.tensor([written[row].node.pos for row in rows])
        vectors = sheet.dictionary.gradients(sheet.x[positions], at)
        if sheet.source.weight is not None:
            vectors = vectors * sheet.source.weight.detach()
        found.append(Reader(sheet.source.name, torch.tensor(rows), vectors, positions))
    return found


# --- The plan ---------------------------------------------------------------------------------------------------------


def latent_plan(
    model: LensModel,
    encoded: EncodedPrompt,
    dictionaries: Sequence[Dictionary],
    target: Target,
    *,
    rule: AnyRule | None,
    adapter: LensModel | None,
    skip: Sequence[int],
    limits: Limits = UNLIMITED,
) -> Wiring:
    """Nodes, reads and writes of a graph with dictionaries.

    Raises:
        GraphTooLargeError: no room, or no time, for a single latent.
    """
    exact = is_exact(dictionaries)
    kind = "transcoders" if exact else "SAEs"
    rule = as_rule(rule, kind)
    sheets = sheets_of(model, dictionaries)
    tokens = torch.tensor(encoded.ids)
    sources = [sheet.source.name for sheet in sheets if sheet.source is not None]
    reads = [*sources, point_of(model, target), *(["hook_pos_embed"] if has_positions(model) else [])]
    cuts = list(dict.fromkeys([STREAM, *(sheet.out for sheet in sheets)]))
    parts = [] if adapter is None else adapter_writes(model, adapter, tokens)
    taps = sorted({part.point for part in parts} - set(cuts))
    started = time.perf_counter()
    linear = linearise(model, tokens, cuts=cuts, taps=taps, reads=reads, rule=rule, keep=keeping(sheets))
    forward = time.perf_counter() - started
    goal = goal_of(model, encoded, target, linear.logits)
    sheets = [filled(sheet, linear, skip) for sheet in sheets]
    cost = _told(model, linear, sheets, kind, forward=forward, limits=limits)
    masks, drawn = _led(model, tokens, sheets, goal, cost, RelP() if exact else rule)
    masks = [_and_also(sheet, mask, limits.also) for sheet, mask in zip(sheets, masks, strict=True)]
    written: list[Written] = []
    if STREAM not in [sheet.out for sheet in sheets]:
        written += token_writes(model, linear, encoded.ids, [text_of(model, t) for t in encoded.ids])
    written += parts
    sheets = [without(sheet, parts) for sheet in sheets]
    for sheet, mask in zip(sheets, masks, strict=True):
        written += latent_writes(sheet, mask)
    written.sort(key=lambda each: each.node.place)
    settings = {
        "kind": kind, "rule": rule.name, "skip": list(skip), "dropped_latents": drawn.of - drawn.nodes,
        "approximation": _approximation(exact, goal, rule),
        "dictionaries": [_about(each) for each in dictionaries],
    }  # fmt: skip
    if cost.share is not None:
        settings["drawn"] = {"nodes": drawn.nodes, "of": drawn.of, "share of the effect": round(drawn.share, 3)}
    passes = (Pass(lambda: linear, tuple(readers_of(written))),)
    totals = None
    if not exact:  # edges stop at each error node, gradients pass every dictionary, its error included
        taps = list(dict.fromkeys(each.point for each in written))
        totals = totals_of(written, total_gradients(model, tokens, taps, goal, rule), goal)
        if cost.share is not None:
            totals = halfway(model, tokens, written, goal, rule, totals)
    return Wiring(encoded, passes, tuple(written), goal, settings, totals=totals, sheets=tuple(sheets),
                  cost=cost, cut=tuple(linear.leaves.values()))  # fmt: skip


def _approximation(exact: bool, goal: Goal, rule: Rule) -> str:
    last = "; the likelihood is linearised in the logits" if goal.first_order else ""
    if exact:
        return f"exact with {rule.held} and MLP outputs held fixed{last}"
    return f"first order between dictionaries ({rule.name} gradients, stopped at each dictionary){last}"


def _about(dictionary: Dictionary) -> dict[str, Any]:
    out = _out(dictionary)
    about = {"label": dictionary.label, "hash": dictionary.hash, "d_sae": dictionary.d_sae}
    return about | {"site_in": str(dictionary.site_in), "site_out": str(out), "skip": dictionary.W_skip is not None}


class _Drawn(NamedTuple):
    """How many of the active latents are drawn, and what share of their effect they hold."""

    nodes: int
    of: int
    share: float


def _told(
    model: LensModel, linear: Linearised, sheets: Sequence[Sheet], kind: str, *, forward: float, limits: Limits
) -> Cost:
    """Whether every active latent is drawn, and what that should take, from one chunk at the last dictionary.

    Raises:
        GraphTooLargeError: no room for the edges, or no time.
    """
    active = sum(int((sheet.a != 0).sum()) for sheet in sheets if sheet.a is not None)
    leaves, length = linear.leaves.values(), len(linear.logits)
    small = whole(model, active, active, length, leaves, limits)
    source = [sheet.source.name for sheet in sheets if sheet.source is not None][-1]
    if (small and limits.max_seconds is None) or not active:
        return Cost(active, None)
    like = linear.value(source)
    reader = Reader(source, torch.arange(TRIAL), torch.ones_like(like)[:1].expand(TRIAL, -1),
                    torch.arange(TRIAL) % length)  # fmt: skip
    fixed = forward * (4 + (COPIES if limits.validate else 0))
    return budgeted(limits, active, leaves, length, kind, fixed=fixed, each=seconds_of(linear, reader) / TRIAL,
                    small=small, beside=length * (1 + len(sheets)))  # fmt: skip


def _led(
    model: LensModel, tokens: Tensor, sheets: Sequence[Sheet], goal: Goal, cost: Cost, rule: Rule
) -> tuple[list[Bool[Tensor, "pos d_sae"] | None], _Drawn]:
    """Which latents are drawn, where not all are: those of the largest total effect by a rule."""
    active = sum(int((sheet.a != 0).sum()) for sheet in sheets if sheet.a is not None)
    if cost.share is None:
        return [None] * len(sheets), _Drawn(active, active, 1.0)
    grads = total_gradients(model, tokens, [sheet.out for sheet in sheets], goal, rule)
    sizes = [
        None if s.a is None or s.dictionary is None
        else (s.a * (grads[s.out] @ s.dictionary.W_dec.to(s.a).T)).abs()
        for s in sheets
    ]  # fmt: skip
    every = torch.cat([size[size > 0] for size in sizes if size is not None]).sort(descending=True).values
    held = every.cumsum(0) / every.sum().clamp(min=1e-30)
    most = min(cost.nodes, len(every), 1 + int((held < cost.share - CLOSE).sum()))
    masks = [None if size is None else size >= every[most - 1] for size in sizes]
    return masks, _Drawn(most, active, float(held[most - 1]))


def _and_also(
    sheet: Sheet, mask: Bool[Tensor, "pos d_sae"] | None, also: Collection[str]
) -> Bool[Tensor, "pos d_sae"] | None:
    """With the active latents of these nodes' ids."""
    if mask is None or sheet.a is None or not also:
        return mask
    mask, layer, stream = mask.clone(), sheet.site.layer, sheet.site.stream
    for pos, latent in (sheet.a != 0).nonzero().tolist():
        mask[pos, latent] |= Node("feature", layer, pos, feature=latent, stream=stream).id in also
    return mask
