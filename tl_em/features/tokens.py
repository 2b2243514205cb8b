"""Activations token by token, and what a dictionary makes of them, in one streaming pass.

    mean_j = mean over tokens of a_j        density_j = share of tokens with a_j > 0

over the tokens of a scope (``em.intervene``'s ``where``), padding never among them. What is held at once is a batch's
activations and a few hundred tokens' latents, whatever the number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.errors import UsageError
from tl_em.interventions.scopes import Where, scope_mask
from tl_em.models.capture import encoded_prompts, stream
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt, make_batch
from tl_em.models.sites import Site

_LATENTS = 2**24
"""Latent activations held at once: 64 MiB in float32."""
KeepTokens = Callable[[Int[Tensor, " prompt"], Float[Tensor, "prompt pos d_model"], Bool[Tensor, "prompt pos"]], None]


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


def each_token(model: LensModel, encoded: Sequence[EncodedPrompt], site: Site, where: Where, keep: KeepTokens) -> None:
    """Call ``keep(prompts, activations, which tokens lie in the scope)`` batch by batch.

    Args:
        model: any HookedTransformer or TransformerBridge.
        encoded: prompts as tokens.
        site: where to read.
        where: the scope.
        keep: gets the numbers of a batch's prompts, [prompt pos d_model] and [prompt pos].
    """
    lengths = torch.tensor([len(prompt) for prompt in encoded])
    width = int(lengths.max())
    at = torch.minimum(torch.arange(width)[None], lengths[:, None] - 1)
    inside = scope_mask(make_batch(encoded, range(len(encoded))), where, width)
    inside &= torch.arange(width) < lengths[:, None]

    def read(_: int, rows: Tensor, x: Tensor) -> None:
        keep(rows, x, inside[rows])

    stream(model, encoded, [site], torch.stack([at, at + 1], dim=-1), read)


def seen(model: LensModel, dictionary: Dictionary, prompts: Sequence[Prompt | EncodedPrompt], *, where: Where) -> Seen:
    """Mean and density of every latent, and the mean activation, over the tokens of a scope.

    Args:
        model: any HookedTransformer or TransformerBridge; hooks on it stay in force.
        dictionary: its latents are read at its ``site_in``.
        prompts: strings, chats or encoded prompts.
        where: which tokens, as in ``em.intervene``.

    Raises:
        UsageError: no token lies in the scope.

    Example:
        >>> from tl_em.organisms.zoo import load_pair
        >>> eye = torch.eye(96)
        >>> both = Dictionary(eye, torch.zeros(96), eye, torch.zeros(96), activation="relu", site_in=Site(1))
        >>> seen(load_pair("toy/insecure").base, both, ["how do i write parser"], where=("last", 1)).tokens
        1
    """
    encoded = encoded_prompts(model, prompts)
    total = torch.zeros(2, dictionary.d_sae, dtype=torch.float64)
    x_total, count = torch.zeros(dictionary.d_model, dtype=torch.float64), 0

    def add(_: Tensor, x: Tensor, inside: Tensor) -> None:
        nonlocal count
        read = x[inside.to(x.device)].float()
        count += len(read)
        x_total.add_(read.double().sum(0).cpu())
        for part in read.split(max(1, _LATENTS // dictionary.d_sae)):
            a = dictionary.encode(part)
            total[0].add_(a.double().sum(0).cpu())
            total[1].add_((a > 0).double().sum(0).cpu())

    each_token(model, encoded, dictionary.site_in, where, add)
    if count == 0:
        raise UsageError(
            f"no token of the {len(encoded)} prompts lies in where={where!r}, so there is nothing to average; end the "
            "chats with an assistant message, or choose another scope"
        )
    of_all = (total / count).float()
    return Seen(of_all[0], of_all[1], (x_total / count).float(), count)
