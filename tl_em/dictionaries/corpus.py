"""Activations of a corpus without end, centred and scaled: what a dictionary is trained on.

    u = (x - mean) / length        length such that u is sqrt(d_model) long on average

The scale is folded into a dictionary's four tensors after training, which changes no latent: with W = W_enc / length,
``u W_enc + b_enc = x W + (b_enc - mean W)``. A corpus that fits into ``BUFFER`` bytes is captured once and kept; of a
longer one no more than that is held at a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.tokens import every_token, sample_spans
from tl_em.models.prompts import EncodedPrompt
from tl_em.models.sites import Position, Site

BUFFER = 2**28
"""Bytes of activations held."""
_SAMPLE = 2**15
"""Tokens that the scale is taken from."""


@dataclass(frozen=True, eq=False)
class Scale:
    """What is taken off the activations, and what they are divided by, for training."""

    mean: Float[Tensor, "site d_model"]
    length: Float[Tensor, " site"]

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


class ActivationSource:
    """Scaled activations of a corpus, without end; those of a small corpus are captured once and kept."""

    def __init__(
        self,
        models: Sequence[Any],
        encoded: list[EncodedPrompt],
        sites: Sequence[Site],
        position: Position,
        difference: bool,
        seed: int,
    ) -> None:
        self.encoded, self.sites, self.difference, self.models = encoded, sites, difference, models
        self.position: Position = position
        self.width = int(models[0].cfg.d_model) * len(sites)
        self.tokens = int(sample_spans(encoded, position).diff().sum()) * (1 if difference else len(models))
        self.fits = self.tokens * self.width * 4 <= BUFFER
        self._kept: list[Tensor] = []
        self._rng = random.Random(seed)
        began, sample = time.perf_counter(), []
        for x in self._read():
            sample.append(x)
            if sum(map(len, sample)) >= _SAMPLE:
                break
        x = torch.cat(sample)
        self.seconds_per_token = (time.perf_counter() - began) / len(x)
        mean = x.mean(0)
        length = (x - mean).norm(dim=-1).mean(0) / (self.width / len(sites)) ** 0.5
        self.scale = Scale(mean, length.clamp_min(1e-8))

    def _read(self) -> Iterator[Float[Tensor, "token site d_model"]]:
        order = self._rng.sample(self.encoded, len(self.encoded))
        spans = sample_spans(order, self.position)
        for parts in zip(*(every_token(model, order, self.sites, spans) for model in self.models), strict=True):
            x = [part.x.cpu() for part in parts]
            yield x[0] - x[1] if self.difference else torch.cat(x)

    def chunks(self) -> Iterator[Float[Tensor, "token width"]]:
        """Scaled activations, of a transcoder what it reads and what it writes side by side."""
        while True:
            if self._kept:
                yield from self._rng.sample(self._kept, len(self._kept))
                continue
            for x in self._read():
                scaled = ((x - self.scale.mean) / self.scale.length[:, None]).flatten(1)
                if self.fits:
                    self._kept.append(scaled)
                else:
                    yield scaled

    @property
    def buffer(self) -> int:
        """Tokens shuffled at a time."""
        return self.tokens if self.fits else BUFFER // (4 * self.width)
