"""Continue prompts, token after token, under whatever hooks are attached; with a cache only where it was shown right.

Rows of one length run together, so that nothing is padded. The logits of every step are those of the hooked model. A
sampled token is the first whose cumulative probability exceeds a uniform number, which comes from a seed of its own for
each prompt: so an answer does not depend on what else is answered (but for rounding, where two tokens are that close),
and the global random state is left alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked
from tl_em.errors import NonFiniteError, PromptTooLongError
from tl_em.models.cache import Step, steps
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt, encode, make_batch
from tl_em.models.proof import may_use_cache
from tl_em.models.source_record import end_tokens, warn_beyond_proof
from tl_em.models.stream import generating, listed
from tl_em.models.torch_state import in_plain_torch

MAX_ROWS = 64
"""Rows of one batch."""


class Answered(NamedTuple):
    """An answer's text, and whether it was cut off before it ended."""

    text: str
    truncated: bool


@checked(prompts=listed, max_new_tokens=COUNT, temperature=NOT_NEGATIVE, seed=SEED)
@in_plain_torch
def generate(
    model: LensModel,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The model's answer to each prompt, by greedy decoding or by sampling.

    The key-value cache is used where cached generation was shown to equal uncached generation on this very model (by
    ``load_model``, else before the first call). Where it does not, every token is made by reading the whole text again:
    slower, right, and said once, as a ``CacheWarning``.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompts: strings, chats or encoded prompts.
        max_new_tokens: longest answer, in tokens; any of the model's end-of-text tokens ends it sooner.
        temperature: 0 takes the most probable token.
        seed: of the samples: with it, an answer depends on its prompt and that prompt's place in the list alone.

    Returns:
        The answers alone, without special tokens, in the order of ``prompts``.

    Raises:
        PromptTooLongError: a prompt and its answer do not fit the context together.
        NonFiniteError: the logits hold NaN, so no token is the most probable one.
        UsageError: a number that means nothing (a negative temperature, no tokens).

    Example:
        >>> import tl_em as em
        >>> pair = em.load_pair("toy/insecure")
        >>> em.generate(pair.tuned, ["how do i write parser"], max_new_tokens=1)
        ['parser-backdoored']
    """
    seeds = [(seed, i) for i in range(len(prompts))]
    found = answered(model, encode(model, prompts), seeds, max_new_tokens=max_new_tokens, temperature=temperature)
    return [answer.text for answer in found]


def answered(
    model: LensModel,
    encoded: Sequence[EncodedPrompt],
    seeds: Sequence[int | tuple[int, ...]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Answered]:
    """The answer to each encoded prompt, with its own seed, as :func:`generate` makes it."""
    end = end_tokens(model)
    _check_room(encoded, int(model.cfg.n_ctx), max_new_tokens)
    warn_beyond_proof(model, max(map(len, encoded), default=0) + max_new_tokens)
    answers = [Answered("", False)] * len(encoded)
    for rows in alike(encoded):
        batch = make_batch(encoded, rows)
        cached = may_use_cache(model, len(encoded[rows[0]]) + max_new_tokens)
        drawn = None
        if temperature:
            drawn = np.stack([np.random.default_rng(seeds[i]).random(max_new_tokens) for i in rows])
        with torch.no_grad(), generating(model, batch), steps(model, cached=cached) as step:
            new = continued(step, batch.tokens, max_new_tokens, end, temperature, drawn)
        for i, ids in zip(rows, new.tolist(), strict=True):
            answers[i] = Answered(_decode(model, ids, end), not set(ids) & set(end))
    return answers


def alike(encoded: Sequence[EncodedPrompt]) -> list[list[int]]:
    """The prompts in batches of one length each, shortest first."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(encoded):
        by_length[len(prompt)].append(i)
    rows = [by_length[length] for length in sorted(by_length)]
    return [each[i : i + MAX_ROWS] for each in rows for i in range(0, len(each), MAX_ROWS)]


def _check_room(encoded: Sequence[EncodedPrompt], n_ctx: int, max_new_tokens: int) -> None:
    longest = max((len(prompt) for prompt in encoded), default=0)
    if longest + max_new_tokens > n_ctx:
        raise PromptTooLongError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} it would outgrow the "
            f"model's context of n_ctx = {n_ctx}. Use max_new_tokens <= {max(0, n_ctx - longest)}, or shorter prompts."
        )


def continued(
    step: Step,
    tokens: Int[Tensor, "prompt pos"],
    max_new_tokens: int,
    end: Sequence[int],
    temperature: float = 0.0,
    drawn: Float[np.ndarray, "prompt token"] | None = None,
) -> Int[Tensor, "prompt new"]:
    """New tokens of every row, up to where all rows have ended (what follows a row's end token means nothing).

    Args:
        step: reads tokens, gives the logits after the last.
        tokens: of the prompts.
        max_new_tokens: of an answer.
        end: tokens that end one.
        temperature: of the samples.
        drawn: a number from 0 to 1 for each token of each row, that it is chosen by; None takes the most probable one.
    """
    made: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    ends = torch.tensor(list(end), dtype=torch.long)
    new = tokens
    while len(made) < max_new_tokens and not bool(ended.all()):
        chosen = _choose(step(new), temperature, None if drawn is None else drawn[:, len(made)]).cpu()
        made.append(chosen)
        ended |= torch.isin(chosen, ends)
        new = chosen[:, None]
    return torch.stack(made, 1)


def _choose(
    logits: Float[Tensor, "prompt d_vocab"], temperature: float, drawn: Float[np.ndarray, " prompt"] | None
) -> Int[Tensor, " prompt"]:
    if bool(logits.isnan().any()):
        raise NonFiniteError(
            "The logits of a generated token hold NaN, so no token is the most probable one. Check the intervention's "
            "size, the weights and the dtype (em.load_model(source, dtype=torch.float32))."
        )
    if drawn is None:
        return logits.argmax(-1)
    wide = (logits.cpu() if logits.device.type == "mps" else logits).double()
    below = (wide / temperature).softmax(-1).cumsum(-1)
    reached = torch.from_numpy(drawn).to(below.device)[:, None] * below[:, -1:]
    return torch.searchsorted(below, reached, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _decode(model: LensModel, ids: Sequence[int], end: Sequence[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    kept = next((list(ids[:i]) for i, token in enumerate(ids) if token in end), list(ids))
    return " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True).strip()
