"""Continue prompts, token after token, under whatever hooks are attached; with a cache only where it was shown right.

Rows of one length run together, so that nothing is padded. The logits of every step are those of the hooked model; a
sampled token is drawn from them with a generator of its own, so that the global random state is left alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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

_MAX_ROWS = 64


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
        seed: seed of the samples; the global random state is left alone.

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
    encoded, end = encode(model, prompts), end_tokens(model)
    _check_room(encoded, int(model.cfg.n_ctx), max_new_tokens)
    warn_beyond_proof(model, max(map(len, encoded), default=0) + max_new_tokens)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(encoded):
        by_length[len(prompt)].append(i)
    answers = [""] * len(encoded)
    generator = torch.Generator(model.cfg.device).manual_seed(seed)
    for length in sorted(by_length):
        rows = by_length[length]
        cached = may_use_cache(model, length + max_new_tokens)
        for chunk in (rows[i : i + _MAX_ROWS] for i in range(0, len(rows), _MAX_ROWS)):
            batch = make_batch(encoded, chunk)
            with torch.no_grad(), generating(model, batch), steps(model, cached=cached) as step:
                new = continued(step, batch.tokens, max_new_tokens, end, temperature, generator)
            for i, ids in zip(chunk, new.tolist(), strict=True):
                answers[i] = _decode(model, ids, end)
    return answers


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
    temperature: float,
    generator: torch.Generator,
) -> Int[Tensor, "prompt new"]:
    """New tokens of every row, up to where all rows have ended (what follows a row's end token means nothing)."""
    made: list[Tensor] = []
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    ends = torch.tensor(list(end), dtype=torch.long)
    new = tokens
    while len(made) < max_new_tokens and not bool(ended.all()):
        chosen = _choose(step(new), temperature, generator).cpu()
        made.append(chosen)
        ended |= torch.isin(chosen, ends)
        new = chosen[:, None]
    return torch.stack(made, 1)


def _choose(
    logits: Float[Tensor, "prompt d_vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " prompt"]:
    if bool(logits.isnan().any()):
        raise NonFiniteError(
            "The logits of a generated token hold NaN, so no token is the most probable one. Check the intervention's "
            "size, the weights and the dtype (em.load_model(source, dtype=torch.float32))."
        )
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _decode(model: LensModel, ids: Sequence[int], end: Sequence[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    kept = next((list(ids[:i]) for i, token in enumerate(ids) if token in end), list(ids))
    return " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True).strip()
