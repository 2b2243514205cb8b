"""What a latent's direction did for a completion, to first order; and what a latent did exactly, by ablation.

    attribution_i = sum_t (g_t . d_i) ((x_t - r_t) . d_i)    g_t: gradient of the completion's log-likelihood at token t
                                                             d_i: unit decoder row;  x: activation at the same site

Summed over the tokens that predict the completion, averaged over the positive prompts. r is what it is compared with:
the base model's activation at the same token, else the mean over both classes. Over an orthonormal basis it adds up to
``sum_t g_t . (x_t - r_t)``, the whole activation's, which shares are taken of. A latent whose decoder the model does
not read has none, however much its activation goes with the behaviour. *Δ-attribution* is the published contrast: r the
mean, positive - negative completions. (It cancels where a direction speaks for the one as it speaks against the other;
that is why shares are not taken of it.)

It is a first-order effect of a direction, not of one latent: two latents with one decoder row share it. The control is
the ablation of the latent itself (``ablation_parts``), which costs a pass over the prompts for each latent.

Source: "Debugging misaligned completions with sparse-autoencoder latent attribution", OpenAI, December 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.dictionaries import Dictionary
from tl_em.dictionaries.tokens import read_tokens
from tl_em.errors import UsageError
from tl_em.features.scoring_pass import PARTS
from tl_em.interventions.intervene import intervene
from tl_em.interventions.latents import ScaleFeature
from tl_em.models.beginnings import Piece
from tl_em.models.hooks import LensModel, hook_name, hooked
from tl_em.models.prompts import Batch, EncodedPrompt, batches
from tl_em.models.source_record import boundaries_of
from tl_em.models.stream import _inside, _reading, sequence_logprobs

_READ_TOKENS = 2048
_CHUNK_LATENTS = 2**21


class Attribution(NamedTuple):
    """By part of the prompts, in nats: of each latent; of the whole activation; and each latent's Δ-attribution."""

    parts: Float[Tensor, "part feature"]
    whole: Float[Tensor, " part"]
    delta: Float[Tensor, "part feature"]


class _ClassSums:
    """Sums over the prompts of one class, by part: of ``(g.d)(x.d)``, of g, of g.x; and the mean of x over tokens."""

    def __init__(self, rows: Float[Tensor, "feature d_model"]) -> None:
        self.rows = rows
        self.product = rows.new_zeros(PARTS, len(rows))
        self.slope = rows.new_zeros(PARTS, rows.shape[1])
        self.whole = rows.new_zeros(PARTS)
        self.total, self.tokens = rows.new_zeros(rows.shape[1]), 0

    def add(self, g: Tensor, x: Tensor, part: Tensor, weight: float) -> None:
        self.slope.index_add_(0, part, g, alpha=weight)
        self.whole.index_add_(0, part, (g * x).sum(-1), alpha=weight)
        self.total, self.tokens = self.total + x.sum(0), self.tokens + len(x)
        step = max(1, _CHUNK_LATENTS // len(self.rows))
        for start in range(0, len(g), step):
            here = slice(start, start + step)
            each = (g[here] @ self.rows.T).mul_(x[here] @ self.rows.T)
            self.product.index_add_(0, part[here], each, alpha=weight)

    def around(self, centre: Float[Tensor, " d_model"]) -> tuple[Tensor, Tensor]:
        """Attribution by part and latent, and the whole one by part, with this mean as what x is compared with."""
        return self.product - (self.slope @ self.rows.T) * (self.rows @ centre), self.whole - self.slope @ centre


def have_completions(prompts: Sequence[EncodedPrompt]) -> bool:
    """Whether every prompt carries one."""
    return all(each.response is not None and each.response[0] < each.response[1] for each in prompts)


def attribution_parts(
    model: LensModel,
    dictionary: Dictionary,
    classes: tuple[Sequence[EncodedPrompt], Sequence[EncodedPrompt]],
    parts: tuple[Sequence[int], Sequence[int]],
    *,
    against: LensModel | None = None,
) -> Attribution:
    """Attribution of the completions to every latent, in one pass with gradients.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        dictionary: an SAE, or a transcoder (then at the site that it writes).
        classes: positive and negative prompts, with completions.
        parts: the part of each.
        against: the base model, which reads the positive prompts too.
    """
    device = torch.device(model.cfg.device)
    rows = torch.nn.functional.normalize(dictionary.to(device).W_dec, dim=-1)
    sums, moved = [_ClassSums(rows), _ClassSums(rows)], _ClassSums(rows)
    for label, (encoded, part) in enumerate(zip(classes, parts, strict=True)):
        of_prompt = torch.tensor(part, device=device)
        for batch in batches(encoded, max_tokens=_READ_TOKENS, turns=boundaries_of(model).turns):
            g, x, owner = _gradients(model, dictionary, encoded, batch)
            at = of_prompt[torch.tensor(batch.rows, device=device)[owner]]
            sums[label].add(g, x, at, 1 / len(encoded))
            if against is not None and label == 0:
                moved.add(g, x - _read(against, dictionary, encoded, batch).to(device), at, 1 / len(encoded))
    centre = torch.stack([each.total / each.tokens for each in sums]).mean(0)
    positive, whole = sums[0].around(centre)
    delta = positive - sums[1].around(centre)[0]
    if against is not None:
        positive, whole = moved.product, moved.whole
    return Attribution(positive.cpu(), whole.cpu(), delta.cpu())


def _read(
    model: LensModel, dictionary: Dictionary, encoded: Sequence[EncodedPrompt], batch: Batch
) -> Float[Tensor, "token d_model"]:
    """Activations at the tokens that predict completions, in the order of ``_gradients``."""
    assert dictionary.site_out is not None
    some = [encoded[i] for i in batch.rows]
    return read_tokens(model, some, [dictionary.site_out], _predicting(encoded, batch)).x[:, 0]


def _predicting(encoded: Sequence[EncodedPrompt], batch: Batch) -> Int[Tensor, "prompt 2"]:
    """Spans of the tokens whose next token belongs to the completion."""
    return torch.tensor([encoded[i].response for i in batch.rows]) - 1


def _gradients(
    model: LensModel, dictionary: Dictionary, encoded: Sequence[EncodedPrompt], batch: Batch
) -> tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"], Tensor]:
    """Gradient and activation at the tokens that predict completions, and the row of the batch that each is in."""
    rows, at = _inside(_predicting(encoded, batch), batch.tokens.shape[1]).nonzero(as_tuple=True)
    leaf: list[Tensor] = []

    def cut(x: Tensor, hook: Any) -> Tensor:
        torch.set_grad_enabled(True)  # only from here on; the no_grad() below is what restores it
        leaf.append(x.detach().requires_grad_(True))
        return leaf[-1]

    assert dictionary.site_out is not None
    name = hook_name(model, dictionary.site_out)
    with torch.no_grad(), hooked(model, [(name, cut)]), _reading(model) as read:
        logprobs = read(Piece(batch), rows, at).float().log_softmax(-1)
        wanted = batch.tokens[rows, at + 1].to(logprobs.device)
        total = logprobs.gather(-1, wanted[:, None]).sum()
        (gradient,) = torch.autograd.grad(total, leaf[-1])
    device = gradient.device
    here = (rows.to(device), at.to(device))
    return gradient[here].float(), leaf[-1].detach()[here].float(), here[0]


def ablation_parts(
    model: LensModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    prompts: Sequence[EncodedPrompt],
    part: Sequence[int],
    *,
    metric: Callable[..., Tensor] | None = None,
    to: Float[Tensor, " latent"] | None = None,
) -> Float[Tensor, "part latent"]:
    """What each latent does for a metric on its own: as it is - ablated, by part of the prompts.

    Args:
        model: the model.
        dictionary: an SAE.
        latents: one pass over the prompts for each, and one without an edit.
        prompts: positive ones.
        part: the part of each.
        metric: a number for each prompt; the completion's log-likelihood by default.
        to: what each is set to in place of 0 (the base's mean: zeroing does not restore a latent that went off).

    Raises:
        UsageError: no metric, and prompts without completions; or a transcoder.
    """
    if metric is None and not have_completions(prompts):
        raise UsageError("these prompts carry no completions whose likelihood an ablation could change; pass metric=")
    read = metric or sequence_logprobs
    before, of_prompt = read(model, prompts).double().cpu(), torch.tensor(part)
    found = torch.zeros(PARTS, len(latents), dtype=torch.double)
    for column, latent in enumerate(latents):
        edit = ScaleFeature(dictionary.feature(latent), to=0.0 if to is None else float(to[column]))
        with intervene(model, edit):
            change = before - read(model, prompts).double().cpu()
        found[:, column].index_add_(0, of_prompt, change / len(prompts))
    return found.float()
