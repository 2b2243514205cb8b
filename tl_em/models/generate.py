"""Continue prompts, token after token, under whatever hooks are attached; with a cache only where it was shown right.

Nothing is padded. Prompts of several lengths run together: all are read up to the shortest one's end, and from there
token by token, while the shorter ones' answers are made. That is done only where a prompt may be read in pieces: with a
cache that was shown right, and no hook that might mean the pass and not the token; else rows of one length run
together. The logits of every step are those of the hooked model. A sampled token is the first whose cumulative
probability exceeds a uniform number, which comes from a seed of its own for each prompt: so an answer does not depend
on what else is answered (but for rounding, where two tokens are that close), and the global random state is left alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_em.arguments import COUNT, NOT_NEGATIVE, SEED, checked
from tl_em.errors import NonFiniteError, PromptTooLongError
from tl_em.models.cache import Step, steps
from tl_em.models.hooks import LensModel, reads_in_pieces
from tl_em.models.prompts import EncodedPrompt, Prompt, encode, make_batch
from tl_em.models.proof import may_use_cache
from tl_em.models.source_record import boundaries_of, end_tokens, warn_beyond_proof
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
    for rows in answered_together(model, encoded, max_new_tokens):
        batch = make_batch(encoded, rows)
        cached = may_use_cache(model, int(batch.lengths.max()) + max_new_tokens)
        drawn = None
        if temperature:
            drawn = np.stack([np.random.default_rng(seeds[i]).random(max_new_tokens) for i in rows])
        with torch.no_grad(), generating(model, batch), steps(model, cached=cached) as step:
            new = continued(step, batch.tokens, max_new_tokens, end, temperature, drawn, batch.lengths)
        for i, ids in zip(rows, new.tolist(), strict=True):
            answers[i] = Answered(_decode(model, ids, end), not set(ids) & set(end))
    return answers


def answered_together(model: LensModel, encoded: Sequence[EncodedPrompt], max_new_tokens: int) -> list[list[int]]:
    """The prompts in batches, shortest first: of one length each, or of several, where they may be read in pieces.

    Each token by which a prompt is longer costs the batch a step; so it may be longer by half an answer.
    """
    longest = max(map(len, encoded), default=0)
    spread = max_new_tokens // 2
    if not (spread and may_use_cache(model, longest + max_new_tokens) and reads_in_pieces(model)):
        spread = 0
    turns, batches, at = boundaries_of(model).turns, list[list[int]](), (0, 0)
    for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i])):
        length = len(encoded[i])
        side = bisect_left(turns, length)
        if not batches or length > at[0] + spread or side != at[1] or len(batches[-1]) == MAX_ROWS:
            batches.append([])
            at = length, side
        batches[-1].append(i)
    return batches


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
    lengths: Int[Tensor, " prompt"] | None = None,
) -> Int[Tensor, "prompt new"]:
    """New tokens of every row, up to where all rows have ended (what follows a row's end token means nothing).

    Args:
        step: reads tokens, gives the logits after the last.
        tokens: of the prompts, shorter ones padded on the right.
        max_new_tokens: of an answer.
        end: tokens that end one.
        temperature: of the samples.
        drawn: a number from 0 to 1 for each token of each row, that it is chosen by; None takes the most probable one.
        lengths: of the prompts; the tensor's width by default.
    """
    lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
    rows, ends = torch.arange(len(tokens)), torch.tensor(list(end), dtype=torch.long)
    made = torch.zeros(len(tokens), max_new_tokens, dtype=torch.long)
    done = torch.zeros(len(tokens), dtype=torch.bool)
    read, most = int(lengths.min()), 0
    new = tokens[:, :read]
    while not bool(done.all()):
        count = (read - lengths).clamp(0, max_new_tokens - 1)  # of each answer's tokens, what is there already
        number = None if drawn is None else drawn[rows.numpy(), count.numpy()]
        chosen = _choose(step(new), temperature, number).cpu()
        begun = read >= lengths
        chosen = torch.where(begun, chosen, tokens[:, min(read, tokens.shape[1] - 1)])
        open_ = begun & ~done
        made[rows[open_], count[open_]] = chosen[open_]
        most = max(most, int(count[open_].max()) + 1) if bool(open_.any()) else most
        done |= begun & (torch.isin(chosen, ends) | (count == max_new_tokens - 1))
        new, read = chosen[:, None], read + 1
    return made[:, :most]


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
