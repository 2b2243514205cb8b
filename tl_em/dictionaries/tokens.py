"""Activations token by token: the one reader of this folder, and what a dictionary makes of what it reads.

    mean_j = mean over tokens of a_j        density_j = share of tokens with a_j > 0

``capture`` gives one activation a prompt; here every token of a span is kept, padding never. Whatever the number of
prompts, ``CHUNK`` bytes of activations and ``_LATENTS`` latents are held at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.errors import UsageError
from tl_em.models.hooks import LensModel
from tl_em.models.loading import ModelPair
from tl_em.models.prompts import EncodedPrompt, Prompt, make_batch
from tl_em.models.sites import Position, Site
from tl_em.models.stream import encoded_prompts, spans_of, stream
from tl_em.models.token_scopes import Where, scope_mask

CHUNK = 2**24
"""Bytes of activations read at a time."""
_LATENTS = 2**24
"""Latent activations held at once: 64 MiB in float32."""


class Tokens(NamedTuple):
    """Activations of tokens, and the number of the prompt that each stands in."""

    prompts: Int[Tensor, " token"]
    x: Float[Tensor, "token site d_model"]

    def pieces(self, d_sae: int) -> Iterator[Tokens]:
        """So few tokens at a time that all their latents can be held."""
        size = max(1, _LATENTS // d_sae)
        for prompts, x in zip(self.prompts.split(size), self.x.split(size), strict=True):
            yield Tokens(prompts, x)


def read_tokens(
    model: LensModel, encoded: Sequence[EncodedPrompt], sites: Sequence[Site], spans: Int[Tensor, "prompt 2"]
) -> Tokens:
    """Activations of every token of each prompt's span, prompt by prompt, float32 on the model's device."""
    at = spans[:, :1] + torch.arange(max(1, int((spans[:, 1] - spans[:, 0]).max())))
    inside = at < spans[:, 1:]
    at = at.minimum(spans[:, 1:] - 1).clamp_min(0)  # shorter spans repeat their last token
    found = torch.empty(*at.shape, len(sites), int(model.cfg.d_model), device=model.cfg.device)

    def keep(site: int, rows: Int[Tensor, " prompt"], x: Float[Tensor, "prompt pos d_model"]) -> None:
        found[rows.to(found.device), :, site] = x.to(found.device, torch.float32)

    stream(model, encoded, sites, torch.stack([at, at + 1], -1), keep)
    x = found[inside.to(found.device)]
    return Tokens(inside.nonzero()[:, 0].to(x.device), x)


def every_token(
    model: LensModel, encoded: Sequence[EncodedPrompt], sites: Sequence[Site], spans: Int[Tensor, "prompt 2"]
) -> Iterator[Tokens]:
    """``read_tokens``, some prompts at a time, in their order."""
    size = max(1, CHUNK // (4 * int(model.cfg.d_model) * len(sites) * max(len(each) for each in encoded)))
    for start in range(0, len(encoded), size):
        some = slice(start, start + size)
        found = read_tokens(model, encoded[some], sites, spans[some])
        yield Tokens(found.prompts + start, found.x)


def check_models(dictionary: Dictionary, model: LensModel, against: LensModel | None) -> None:
    """Raise unless the dictionary belongs on both models and the two can be compared."""
    for each in (model, against):
        if each is not None:
            dictionary.check(each)
    if against is not None:
        ModelPair(against, model)  # raises where the two cannot be compared


# ---- which tokens ------------------------------------------------------------------------------------------------
def sample_spans(encoded: Sequence[EncodedPrompt], position: Position = "all") -> Int[Tensor, "prompt 2"]:
    """The tokens of a position that a dictionary is trained on and judged by.

    Of ``"all"``, a first token that all prompts share is left out: it is the same everywhere, and in large models huge.
    """
    shared = position == "all" and len(encoded) > 1 and len({each.ids[0] for each in encoded}) == 1
    return spans_of(encoded, [position])[:, 0] + torch.tensor([int(shared), 0])


def scope_spans(encoded: Sequence[EncodedPrompt], where: Where) -> Int[Tensor, "prompt 2"]:
    """The tokens of a scope (``em.intervene``'s ``where``); where a prompt has none, an empty span."""
    batch = make_batch(encoded, range(len(encoded)))
    width = batch.tokens.shape[1]
    inside = scope_mask(batch, where, width) & (torch.arange(width) < batch.lengths[:, None])
    first = inside.int().argmax(-1)
    return torch.stack([first, first + inside.sum(-1)], -1)


# ---- what a dictionary sees there --------------------------------------------------------------------------------
class Seen(NamedTuple):
    """What was seen at the tokens of a scope.

    Args:
        mean: [latent] mean activation.
        density: [latent] share of the tokens at which it is on.
        x: [d_model] mean of what the dictionary reads.
        tokens: how many there were.
    """

    mean: Float[Tensor, " feature"]
    density: Float[Tensor, " feature"]
    x: Float[Tensor, " d_model"]
    tokens: int


def seen(model: LensModel, dictionary: Dictionary, prompts: Sequence[Prompt | EncodedPrompt], *, where: Where) -> Seen:
    """Mean and density of every latent, and the mean activation, over the tokens of a scope.

    Args:
        model: any HookedTransformer or TransformerBridge; hooks on it stay in force.
        dictionary: its latents are read at its ``site_in``.
        prompts: strings, chats or encoded prompts.
        where: which tokens, as in ``em.intervene``.

    Raises:
        UsageError: no token lies in the scope. NonFiniteError: as ``capture``.

    Example:
        >>> from tl_em import load_pair
        >>> eye = torch.eye(96)
        >>> both = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu", site_in=Site(1))
        >>> seen(load_pair("toy/insecure").base, both, ["how do i write parser"], where=("last", 1)).tokens
        1
    """
    encoded, here = encoded_prompts(model, prompts), dictionary.check(model).to(model.cfg.device)
    spans = scope_spans(encoded, where)
    count = int((spans[:, 1] - spans[:, 0]).sum())
    if count == 0:
        raise UsageError(
            f"no token of the {len(encoded)} prompts lies in where={where!r}, so there is nothing to average; end the "
            "chats with an assistant message, or choose another scope"
        )
    total, on = torch.zeros(2, here.d_sae, dtype=torch.float64)
    x = torch.zeros(here.d_model, dtype=torch.float64)
    for tokens in every_token(model, encoded, here.reads, spans):
        for some in tokens.pieces(here.d_sae):
            read = some.x[:, 0]
            a = here.encode(here.inputs(some.x))
            total += a.double().sum(0).cpu()
            on += (a > 0).double().sum(0).cpu()
            x += read.double().sum(0).cpu()
    return Seen((total / count).float(), (on / count).float(), (x / count).float(), count)
