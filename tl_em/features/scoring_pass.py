"""One pass over a behaviour's prompts, kept as sums by part: what every score of every latent is computed from.

    d_u = sum over the prompts of part u of  w_i a_i        w_i = +1/N (positive), -1/N (negative);   sum_u d_u = effect

Prompts that belong together (a pair, a group, equal text, across behaviours too) are dealt into one of at most 64
*parts*, and sums are kept a part. Parts are what labels are swapped by, what halves are made of and what intervals
resample. So memory grows with latents, behaviours and parts, not with prompts; the price is that 1,024 pairs are tested
as 64 sums of 16, and that AUROC is that of activations rounded to a quarter of an octave.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.tokens import read_tokens
from tl_em.models.contrasts import ContrastSet, inseparable
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position
from tl_em.models.stream import spans_of
from tl_em.stats import tied

PARTS = 64
"""Parts that prompts are dealt into; halves of 32 still give p down to 5e-8."""
BINS = 1 + 4 * 16
"""Of the histograms: off, then quarters of an octave from 2^-6 to 2^10 (beyond: the last one)."""
_FIRST_BIN = (127 - 6) << 2
_CHUNK_TOKENS = 4096
_CHUNK_LATENTS, _LEAST_TOKENS = 2**19, 64
"""Activations of latents that are held at once: 2 MiB in float32; more for dictionaries so wide that a pass through the
model would be left with a handful of tokens."""


def deal(behaviours: Sequence[ContrastSet], *, seed: int) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """The part of each positive and negative prompt of each behaviour, and whether no unit is in two behaviours.

    What may not be torn apart is one unit: inside a behaviour what ``ContrastSet.split`` keeps together, across
    behaviours equal prompts and equal group labels. Units of one kind (the same behaviours and classes) are dealt out
    evenly.
    """
    blocks = [[(b, *row) for row in block] for b, contrast in enumerate(behaviours) for block in inseparable(contrast)]
    kinds: dict[frozenset[tuple[int, int]], list[list[tuple[int, int, int]]]] = defaultdict(list)
    for unit in _joined(blocks, behaviours):
        kinds[frozenset((b, side) for b, side, _ in unit)].append(unit)
    found = [([0] * len(c.positive), [0] * len(c.negative)) for c in behaviours]
    rng = random.Random(f"parts/{seed}")
    for kind in kinds.values():
        rng.shuffle(kind)
        for number, unit in enumerate(kind):
            for b, side, i in unit:
                found[b][side][i] = number % PARTS
    return found, all(len({b for b, _ in kind}) == 1 for kind in kinds)


def _joined(
    blocks: Sequence[list[tuple[int, int, int]]], behaviours: Sequence[ContrastSet]
) -> list[list[tuple[int, int, int]]]:
    """Blocks that hold an equal prompt or group label, in one."""

    def ties(b: int, side: int, i: int) -> list[Hashable]:
        contrast = behaviours[b]
        labels = (contrast.positive_groups, contrast.negative_groups)[side]
        text: tuple[str, Hashable] = ("text", repr((contrast.positive, contrast.negative)[side][i]))
        return [text] if labels is None else [text, ("group", labels[i])]

    shared = [[tie for row in block for tie in ties(*row)] for block in blocks]
    units: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for block, unit in zip(blocks, tied(shared).tolist(), strict=True):
        units[unit].extend(block)
    return list(units.values())


class Sums:
    """Accumulators of one behaviour; class 0 is positive, 1 negative. Without a base its sums stay 0.

    Args:
        dictionary: on ``device``.
        device: of the model.

    Attributes:
        mean: [label feature]; histogram: [label bin feature].
        effect: by part, positive minus negative; ``delta``: by part, tuned minus base on the positive prompts, and
            ``drift`` on the negative ones.
        shift: [3 part d_model], the same three of the activations themselves.
        scaling: [kind model feature] ``sum f (d.t)`` over the positive tokens, of the tuned and of the base model; t
            the target of latent scaling: kind 0 what the other latents leave, kind 1 what all latents reconstruct.
        centre, energy: of each class the mean activation, and the mean of its square length.
    """

    def __init__(self, dictionary: Dictionary, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        wide, width = dictionary.d_sae, dictionary.d_model
        self.mean, self.scaling = zeros(2, wide), zeros(2, 2, wide)
        self.histogram = torch.zeros(2, BINS, wide, dtype=torch.int32, device=device)
        self.effect, self.delta, self.drift = zeros(PARTS, wide), zeros(PARTS, wide), zeros(PARTS, wide)
        self.shift = zeros(3, PARTS, width)
        self.centre, self.energy = zeros(2, width), zeros(2)

    def add(self, label: int, a: Tensor, x: Tensor, part: Tensor, weight: float) -> None:
        """Prompts of one class: latents [prompt feature] and activations [prompt d_model]."""
        sign = weight if label == 0 else -weight
        self.mean[label] += a.sum(0) * weight
        self.effect.index_add_(0, part, a, alpha=sign)
        self.shift[0].index_add_(0, part, x, alpha=sign)
        self.centre[label] += x.sum(0) * weight
        self.energy[label] += (x * x).sum() * weight
        count(self.histogram[label], a)

    @property
    def spread(self) -> float:
        """Root mean square distance of activations from the mean of their class."""
        return float((self.energy - self.centre.square().sum(-1)).clamp_min(0).mean().sqrt())

    def add_base(self, label: int, change: Tensor, moved: Tensor, part: Tensor, weight: float) -> None:
        """Tuned minus base of the same prompts of one class: latents and activations."""
        (self.drift if label else self.delta).index_add_(0, part, change, alpha=weight)
        self.shift[1 + label].index_add_(0, part, moved, alpha=weight)

    @property
    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By kind of change: of latents and of activations, by part."""
        effect, delta, drift = self.shift
        own = self.delta - self.drift, delta - drift
        return {"effect": (self.effect, effect), "delta": (self.delta, delta), "own": own}


def count(histogram: Int[Tensor, "bin feature"], a: Float[Tensor, "prompt feature"]) -> None:
    """Add activations to histograms: bins are read off the exponent and two bits of the mantissa."""
    rows, columns = a.nonzero(as_tuple=True)
    bins = ((a[rows, columns].view(torch.int32) >> 21) - _FIRST_BIN).clamp_(0, BINS - 2) + 1
    wide = histogram.shape[1]
    ones = torch.ones_like(bins, dtype=torch.int32)
    histogram.view(-1).index_add_(0, bins.long() * wide + columns, ones)
    histogram[0] += len(a) - torch.zeros_like(histogram[0]).index_add_(0, columns, ones)


def chunks(encoded: Sequence[EncodedPrompt], position: Position, width: int) -> list[list[int]]:
    """Prompts of similar length, so many at once as hold ``_CHUNK_TOKENS`` read tokens and ``_CHUNK_LATENTS``."""
    spans = spans_of(encoded, [position])[:, 0]
    reads = (spans[:, 1] - spans[:, 0]).tolist()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    most = max(_LEAST_TOKENS, min(_CHUNK_TOKENS, _CHUNK_LATENTS // width))
    found: list[list[int]] = []
    held = most
    for i in order:
        if held + reads[i] > most:
            found.append([])
            held = 0
        found[-1].append(i)
        held += reads[i]
    return found


def add_behaviour(
    model: LensModel,
    dictionary: Dictionary,
    classes: tuple[Sequence[EncodedPrompt], Sequence[EncodedPrompt]],
    parts: tuple[Sequence[int], Sequence[int]],
    *,
    against: LensModel | None,
    position: Position,
) -> Sums:
    """The one pass over a behaviour's prompts, in both models."""
    device = torch.device(model.cfg.device)
    here = dictionary.to(device)
    sums = Sums(here, device)
    shifted = here.outputs if len(here.reads) > 1 else lambda x: x[:, 0]
    for label, encoded in enumerate(classes):
        weight, part = 1 / len(encoded), torch.tensor(parts[label], device=device)
        for rows in chunks(encoded, position, here.d_sae):
            some = [encoded[i] for i in rows]
            spans = spans_of(some, [position])[:, 0]
            owner, read = read_tokens(model, some, here.sites, spans)
            x = shifted(read)
            share = 1 / torch.bincount(owner, minlength=len(some))[owner][:, None]
            a = here.encode(here.inputs(read))
            mine = part[rows]
            sums.add(label, _pooled(a, owner, share), _pooled(x, owner, share), mine, weight)
            if against is None:
                continue
            before = read_tokens(against, some, here.sites, spans).x.to(device)
            other = shifted(before)
            b = here.encode(here.inputs(before))
            sums.add_base(label, _pooled(a - b, owner, share), _pooled(x - other, owner, share), mine, weight)
            for number, (own, tokens) in enumerate(() if label else ((a, read), (b, before))):
                sums.scaling[:, number] += scaled(here, a, own, tokens)
    return sums


def scaled(
    dictionary: Dictionary,
    f: Float[Tensor, "token feature"],
    own: Float[Tensor, "token feature"],
    tokens: Float[Tensor, "token site d_model"],
) -> Float[Tensor, "kind feature"]:
    """``sum f (d.t)`` for the two targets of latent scaling, in one model.

    The target of latent j is what is written, less the bias and less what the *other* latents of that model write:
    ``y - y^ + own_j d_j``; and, as the second, what the latents reconstruct without the bias.

    Args:
        f: latents of the tuned model, which the target is regressed on; ``own``: latents of the model that is scaled.
        tokens: activations at the dictionary's sites.
    """
    rows = dictionary.W_dec
    written = own @ rows
    left = dictionary.outputs(tokens) - dictionary.completed(own, dictionary.inputs(tokens))
    length = rows.square().sum(-1)
    error = (f * (left @ rows.T + own * length)).sum(0)
    return torch.stack([error, (f * (written @ rows.T)).sum(0)])


def _pooled(
    values: Float[Tensor, "token n"], owner: Int[Tensor, " token"], share: Float[Tensor, "token 1"]
) -> Float[Tensor, "prompt n"]:
    """Mean over each prompt's tokens."""
    if len(share) == int(owner[-1]) + 1:
        return values
    total = torch.zeros(int(owner[-1]) + 1, values.shape[1], device=values.device)
    return total.index_add_(0, owner, values * share)
