"""Generation, with whatever interventions are attached to the model.

Prompts of equal length share a batch, so nothing is padded: left padding is inexact on a Bridge, and a
HookedTransformer takes no attention mask. With the key-value cache, hooks see the prompt once and then one token at a
time.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tl_em.errors import PromptTooLongError, UsageError
from tl_em.models.capture import generating
from tl_em.models.hooks import LensModel
from tl_em.models.prompts import EncodedPrompt, Prompt, encode, make_batch

_MAX_ROWS = 64


def generate(
    model: LensModel,
    prompts: Sequence[Prompt | EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt.

    Args:
        model: a HookedTransformer or TransformerBridge; hooks on it stay in force.
        prompts: strings, chats or encoded prompts.
        max_new_tokens: longest answer, in tokens; an end-of-text token ends it sooner.
        temperature: 0 takes the most probable token.
        seed: seed of the samples; the global random state is left alone.

    Returns:
        The answers alone, without special tokens, in the order of ``prompts``.

    Raises:
        PromptTooLongError: a prompt and its answer do not fit the context together.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} asks for no answer. Ask for at least 1.")
    encoded, end = encode(model, prompts), _end_tokens(model)
    _check_room(encoded, int(model.cfg.n_ctx), max_new_tokens)
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(encoded):
        by_length[len(prompt)].append(i)
    answers = [""] * len(encoded)
    with torch.random.fork_rng(devices=_devices(model)), torch.no_grad():
        torch.manual_seed(seed)
        for length in sorted(by_length):
            rows = by_length[length]
            for chunk in (rows[i : i + _MAX_ROWS] for i in range(0, len(rows), _MAX_ROWS)):
                batch = make_batch(encoded, chunk)
                with generating(model, batch):
                    new = _continue(model, batch.tokens.to(model.cfg.device), max_new_tokens, temperature, end)
                for i, ids in zip(chunk, new[:, length:].tolist(), strict=True):
                    answers[i] = _decode(model, ids, end)
    return answers


def _check_room(encoded: Sequence[EncodedPrompt], n_ctx: int, max_new_tokens: int) -> None:
    longest = max((len(prompt) for prompt in encoded), default=0)
    if longest + max_new_tokens > n_ctx:
        raise PromptTooLongError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} it would outgrow the "
            f"model's context of n_ctx = {n_ctx}. Use max_new_tokens <= {max(0, n_ctx - longest)}, or shorter prompts."
        )


def _devices(model: LensModel) -> list[int]:
    device = torch.device(model.cfg.device)
    return [device.index or 0] if device.type == "cuda" else []


def _continue(model: LensModel, tokens: Tensor, max_new_tokens: int, temperature: float, end: list[int]) -> Tensor:
    options: dict[str, Any] = {"stop_at_eos": bool(end), "eos_token_id": end or None}
    options |= {"do_sample": temperature > 0, "temperature": temperature or 1.0, "verbose": False}
    if "attention_mask" not in inspect.signature(model.generate).parameters:
        # A HookedTransformer takes pad tokens at one end of the prompt for padding; nothing here is padded.
        pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
        options["padding_side"] = "left" if bool((tokens[:, -1] == pad).any()) else "right"
    return model.generate(
        tokens, max_new_tokens=max_new_tokens, return_type="tokens", use_past_kv_cache=True, **options
    )


def _end_tokens(model: LensModel) -> list[int]:
    """The end-of-text tokens that the model can produce (a loader may have invented one that it cannot)."""
    configured = getattr(
        getattr(getattr(model, "original_model", None), "generation_config", None), "eos_token_id", None
    )
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, getattr(getattr(model, "tokenizer", None), "eos_token_id", None)]
    return sorted({int(token) for token in found if token is not None and token < int(model.cfg.d_vocab)})


def _decode(model: LensModel, ids: Sequence[int], end: Sequence[int]) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    kept = next((list(ids[:i]) for i, token in enumerate(ids) if token in end), list(ids))
    return " ".join(map(str, kept)) if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True).strip()
