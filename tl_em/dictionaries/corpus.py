"""Activations of a corpus without end, centred and scaled: what a dictionary is trained on.

    u = (x - mean) / length        length such that u is sqrt(d_model) long on average

The scale is taken from the first part and folded into a dictionary's four tensors after training, which changes no
latent: with W = W_enc / length, ``u W_enc + b_enc = x W + (b_enc - mean W)``.

A corpus is read part by part, ``BUFFER`` bytes of activations each, whatever its length; a part's tokens are shuffled,
and served in batches; the rest of a part that fills no batch is left out, another rest each time. Of a part, and of the
order in it, nothing depends on the parts before: so a run goes on anywhere after reading one part. A corpus that is no
more than one part is captured once and kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, count
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.documents import CorpusPart, Documents
from tl_em.dictionaries.tokens import every_token, sample_spans
from tl_em.errors import UsageError
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, Site

BUFFER = 2**28
"""Bytes of activations held."""
_ROWS = 2**12
"""Tokens that are scaled at a time."""
_PROBED = 2**11
"""Tokens that the cost of a pass is told from."""


@dataclass(frozen=True, eq=False)
class Scale:
    """What is taken off the activations, and what they are divided by, for training."""

    mean: Float[Tensor, "site d_model"]
    length: Float[Tensor, " site"]

    @classmethod
    def of(cls, x: Float[Tensor, "token site d_model"]) -> Scale:
        """Of so many tokens: sums in float64, some tokens at a time."""
        mean = sum(some.double().sum(0) for some in x.split(_ROWS)) / len(x)
        assert isinstance(mean, Tensor)
        mean = mean.float()
        length = sum(((some - mean).norm(dim=-1).double().sum(0)) for some in x.split(_ROWS)) / len(x)
        assert isinstance(length, Tensor)
        return cls(mean, (length / x.shape[-1] ** 0.5).float().clamp_min(1e-8))

    def put_on_(self, x: Float[Tensor, "token site d_model"]) -> None:
        """Scale activations in place."""
        for some in x.split(_ROWS):
            some.sub_(self.mean).div_(self.length[:, None])

    def folded(self, trained: Dictionary) -> Dictionary:
        """The dictionary that does to the activations what ``trained`` does to the scaled ones."""
        W_enc = trained.W_enc / self.length[0]
        return replace(
            trained,
            W_enc=W_enc,
            b_enc=trained.b_enc - self.mean[0] @ W_enc,
            W_dec=trained.W_dec * self.length[-1],
            b_dec=trained.b_dec * self.length[-1] + self.mean[-1],
        )


class Prompts:
    """Prompts that are there whole, by the part; in another order in every pass over them.

    Args:
        encoded: the prompts.
        position: which of their tokens are samples.
        most: samples a part, at least.
        seed: of the order.
    """

    def __init__(self, encoded: Sequence[EncodedPrompt], position: Position, most: int, seed: int) -> None:
        self.encoded, self.most, self.seed = encoded, most, seed
        self.spans = sample_spans(encoded, position)
        self.tokens = int(self.spans.diff().sum())

    def parts(self, since: Mapping[str, Any] | None = None) -> Iterator[CorpusPart]:
        """As of ``documents.Documents``."""
        number, epoch, first = (0, 0, 0) if since is None else (since["part"], *since["place"])
        if self.tokens <= self.most:
            for same in count(number):
                yield self._part(range(len(self.encoded)), same, 0, 0)._replace(whole=True)
        while True:
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.encoded)).tolist()
            while first < len(order):
                sizes = accumulate(int(n) for n in self.spans[order[first:]].diff())
                taken = next((n for n, size in enumerate(sizes, 1) if size >= self.most), len(order) - first)
                yield self._part(order[first : first + taken], number, epoch, first)
                number, first = number + 1, first + taken
            epoch, first = epoch + 1, 0

    def _part(self, rows: Sequence[int], number: int, epoch: int, first: int) -> CorpusPart:
        spans = self.spans[list(rows)]
        kept = torch.ones(int(spans.diff().sum()), dtype=torch.bool)
        return CorpusPart([self.encoded[i] for i in rows], spans, kept, {"part": number, "place": [epoch, first]})


class ReadSoFar(NamedTuple):
    """How far a run is: the place of a part, and how many of its batches were served."""

    place: dict[str, Any] | None = None
    batches: int = 0


class ActivationSource:
    """Scaled activations of a corpus, in shuffled batches without end, from any place on.

    Args:
        models: whose activations, one after the other; of two, maybe the difference.
        corpus: prompts, or a stream of documents.
        sites: of a transcoder two: what it reads and what it writes, side by side.
        difference: the first model's minus the second's.
        seed: of the order.
    """

    def __init__(
        self, models: Sequence[Any], corpus: Prompts | Documents, sites: Sequence[Site], *, difference: bool, seed: int
    ) -> None:
        self.models, self.corpus, self.sites, self.difference, self.seed = models, corpus, sites, difference, seed
        self.width = int(models[0].cfg.d_model) * len(sites)
        self.scale: Scale | None = None
        self.held: Float[Tensor, "token width"] | None = None
        self.expected: Float[Tensor, "some width"] | None = None
        """The first activations of the part that it was opened at, where they were read before."""
        self.at = ReadSoFar()
        """How far ``batches`` is, the batch that was given last included."""

    def open(self, since: ReadSoFar) -> None:
        """Take the corpus from this place on.

        Raises:
            UsageError: of a corpus that is not what it was, or is not enough.
        """
        self.at, self._parts = since, self.corpus.parts(since.place)
        self.first = next(self._parts)

    @property
    def samples(self) -> int:
        """Tokens of the first part, of which so many are held at a time."""
        return int(self.first.kept.sum()) * (1 if self.difference else len(self.models))

    def seconds_per_token(self) -> float:
        """Of a pass, from some of the first part's prompts."""
        part, sizes = self.first, accumulate(map(len, self.first.encoded))
        n = next((n for n, size in enumerate(sizes, 1) if size >= _PROBED), len(part.encoded))
        some = CorpusPart(part.encoded[:n], part.spans[:n], part.kept[: int(part.spans[:n].diff().sum())], {})
        began = time.perf_counter()
        read = len(self._read(some))
        return (time.perf_counter() - began) / max(1, read)

    def batches(self, size: int) -> Iterator[Float[Tensor, "token width"]]:
        """Batches of so many tokens, from where it was opened on."""
        skipped = self.at.batches
        for part in chain([self.first], self._parts):
            if not (part.whole and self.held is not None):
                self.held = None  # before the next is read
                self.held = self._scaled(part)
                self._check_expected()
            if part.whole and len(self.held) < size:
                raise UsageError(
                    f"The corpus gives {len(self.held)} samples, fewer than batch={size}; give more text, or a smaller "
                    "batch="
                )
            order = np.random.default_rng((self.seed, part.place["part"])).permutation(len(self.held))
            for i in range(skipped, len(order) // size):
                self.at = ReadSoFar(part.place, i + 1)
                yield self.held[torch.from_numpy(order[i * size : (i + 1) * size])]
            skipped = 0

    def _check_expected(self) -> None:
        if self.expected is None or self.held is None:
            return
        off = float((self.held[: len(self.expected)] - self.expected).norm() / self.expected.norm())
        self.expected = None
        if not off < 0.01:
            raise UsageError(
                f"The activations that the checkpoint was trained on are others now (off by {off:.0%}): the model, its "
                "weights or the hooks on it are not those of before, so what follows would be another training. Give "
                "the model as it was, or another out=."
            )

    def _scaled(self, part: CorpusPart) -> Float[Tensor, "token width"]:
        x = self._read(part)
        if self.scale is None:
            self.scale = Scale.of(x)
        self.scale.put_on_(x)
        return x.flatten(1)

    def _read(self, part: CorpusPart) -> Float[Tensor, "token site d_model"]:
        """Activations of a part's samples, on the CPU; of one model after the other, chunk by chunk."""
        each = 1 if self.difference else len(self.models)
        held = torch.empty(each * int(part.kept.sum()), len(self.sites), int(self.models[0].cfg.d_model))
        start = end = 0
        for found in zip(
            *(every_token(model, part.encoded, self.sites, part.spans) for model in self.models), strict=True
        ):
            kept = part.kept[start : start + len(found[0].x)]
            start += len(kept)
            x = [some.x[kept.to(some.x.device)].cpu() for some in found]
            for some in [x[0] - x[1]] if self.difference else x:
                held[end : end + len(some)] = some
                end += len(some)
        return held
