"""Prompts as tokens: what the model reads, and where in it the instruction, the prompt and the response end.

Chats are rendered, and their parts found, by ``models.templates``; text becomes the tokenizer's own ids in
``models.tokenizing``, whose character offsets carry the parts to tokens. Both surfaces read the same tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_em.arguments import token_ids
from tl_em.errors import PositionError, PromptError, PromptTooLongError, UnknownTokenError
from tl_em.models.contrasts import Prompt, as_prompts
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, check_position
from tl_em.models.source_record import warn_beyond_proof
from tl_em.models.templates import has_template, rendered_chat
from tl_em.models.tokenizing import Span, before_text, own_bos, plain_tokens, tokens_and_spans


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens, with the places that matter.

    Args:
        ids: the tokens that the model reads.
        instruction: span of the last user message (end exclusive); for plain text, all of it but the BOS token.
        prompt_end: index of the last token before the response: the generation prompt's end, or the text's.
        response: span of the final assistant message, None without one.
        text: what was tokenized.

    Example:
        >>> e = EncodedPrompt.from_ids([5, 7, 9])
        >>> e.prompt_end, len(e), e.with_response([4, 4]).response
        (2, 3, (3, 5))
    """

    ids: tuple[int, ...]
    instruction: Span
    prompt_end: int
    response: Span | None
    text: str

    @classmethod
    def from_ids(cls, ids: Sequence[int] | Any, text: str = "") -> EncodedPrompt:
        """Tokens as they are, for models without a tokenizer.

        Raises:
            UsageError: not one list of whole numbers.
        """
        tokens = token_ids("ids", ids)
        return cls(tokens, (0, len(tokens)), len(tokens) - 1, None, text)

    def with_response(self, ids: Sequence[int] | Any) -> EncodedPrompt:
        """This prompt, answered with these tokens."""
        start = self.prompt_end + 1
        kept = self.ids[:start] + token_ids("ids", ids)
        return replace(self, ids=kept, response=(start, len(kept)))

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, chat: bool | None = None
) -> list[EncodedPrompt]:
    """Tokenize prompts as the model was meant to read them, and find their positions.

    Chat messages, and plain strings where the tokenizer has a chat template (one user turn), go through the template:
    the tokens equal ``tokenizer.apply_chat_template(tokenize=True)``, with ``tokenizer.chat_template_kwargs`` where
    they are set, and no second BOS token. A final assistant message is the response and ends the tokens; otherwise the
    generation prompt does. Thinking in earlier answers is taken off where the template does so.

    Plain strings without a template, and strings that begin with the BOS text (rendered already, as the prompts of
    published graph files are), are the tokenizer's own ids, with its own BOS token in front where TransformerLens would
    put one: one BOS token, and none that the tokenizer does not name. What a tokenizer appends by itself (EOS) is left
    out: the prompt goes on. Prompts that are encoded already pass through.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: strings, lists of messages, or encoded prompts.
        chat: False reads strings as raw text even where there is a chat template, True as a user turn even where they
            begin with the BOS text.

    Returns:
        One ``EncodedPrompt`` a prompt, in order.

    Raises:
        UnknownTokenError: words outside the vocabulary, tokens without an embedding. PromptTooLongError: longer than
        ``n_ctx``. PromptError: empty, chat messages for a tokenizer that cannot render them, a message that the
        template leaves out or rewrites. PositionError: one that cannot be told from the template's own words.
    """
    prompts = as_prompts(prompts)
    tokenizer = getattr(model, "tokenizer", None)
    # A prompt that is repeated (a row a direction) is encoded once.
    once: dict[int, Prompt | EncodedPrompt] = {id(prompt): prompt for prompt in prompts}
    plain = [key for key, prompt in once.items() if _is_plain(tokenizer, prompt, chat)]
    encoded = dict(zip(plain, _encode_plain(model, tokenizer, [str(once[key]) for key in plain]), strict=True))
    for key, prompt in once.items():
        if key not in encoded:
            encoded[key] = prompt if isinstance(prompt, EncodedPrompt) else _encode_turns(tokenizer, prompt)
    found = [encoded[id(prompt)] for prompt in prompts]
    _check_lengths(found, int(model.cfg.n_ctx))
    warn_beyond_proof(model, max(map(len, found), default=0))
    _check_vocabulary(found, int(model.cfg.d_vocab), tokenizer)
    return found


class DocumentTokens(NamedTuple):
    """Documents as tokens: what the model is to read before each, and each without it, however long."""

    before: tuple[int, ...]
    ids: list[tuple[int, ...]]


def document_tokens(model: LensModel, documents: Sequence[Prompt | EncodedPrompt]) -> DocumentTokens:
    """Documents as tokens: texts as they are, through no template; chats through it; encoded prompts as they are.

    Args:
        model: a HookedTransformer or TransformerBridge.
        documents: of any length, beyond the model's context too.

    Raises:
        UnknownTokenError, PromptError: as :func:`encode`.

    Example:
        >>> import tl_em as em
        >>> document_tokens(em.load_pair("toy/insecure").base, [EncodedPrompt.from_ids([9, 8])]).ids
        [(9, 8)]
    """
    tokenizer = getattr(model, "tokenizer", None)
    prepend = bool(getattr(model.cfg, "default_prepend_bos", True))
    before = () if tokenizer is None else before_text(tokenizer, prepend=prepend, d_vocab=int(model.cfg.d_vocab))
    texts = [i for i, each in enumerate(documents) if _is_plain(tokenizer, each, False)]
    plain = dict(zip(texts, _encode_plain(model, tokenizer, [str(documents[i]) for i in texts]), strict=True))
    whole = [
        plain[i] if i in plain else each if isinstance(each, EncodedPrompt) else _encode_turns(tokenizer, each)
        for i, each in enumerate(documents)
    ]
    _check_vocabulary(whole, int(model.cfg.d_vocab), tokenizer)
    begun = [len(before) if each.ids[: len(before)] == before else 0 for each in whole]
    return DocumentTokens(before, [each.ids[start:] for each, start in zip(whole, begun, strict=True)])


def _is_plain(tokenizer: Any, prompt: Prompt | EncodedPrompt, chat: bool | None) -> bool:
    """Whether a prompt is read without a chat template."""
    if tokenizer is None and not isinstance(prompt, EncodedPrompt):
        raise PromptError(
            "The model has no tokenizer, so text means nothing to it. Load it with load_model(source, tokenizer=…), or "
            "pass tokens: EncodedPrompt.from_ids([…])."
        )
    if not isinstance(prompt, str):
        return False
    if not has_template(tokenizer):
        return chat is not True
    begun = own_bos(tokenizer) is not None and prompt.startswith(str(getattr(tokenizer, "bos_token", None)))
    return chat is False or (chat is None and begun)


def _encode_turns(tokenizer: Any, prompt: Prompt) -> EncodedPrompt:
    if not has_template(tokenizer):
        raise PromptError(
            "Chat messages were given, but the tokenizer has no chat template, so it is unknown how the model was "
            "shown turns. Pass plain strings (of a file: ContrastSet.load(path, form='text')), or set "
            "model.tokenizer.chat_template."
        )
    return _encode_chat(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _encode_plain(model: LensModel, tokenizer: Any, texts: Sequence[str]) -> list[EncodedPrompt]:
    if not texts:
        return []
    empty = [text for text in texts if not text.strip()]
    if empty:
        raise PromptError(f"The prompt {empty[0]!r} is empty, so there is no token to read at. Drop it.")
    prepend = bool(getattr(model.cfg, "default_prepend_bos", True))
    found = plain_tokens(tokenizer, texts, prepend=prepend, d_vocab=int(model.cfg.d_vocab))
    return [
        EncodedPrompt(ids, (start, len(ids)), len(ids) - 1, None, text)
        for text, (ids, start) in zip(texts, found, strict=True)
    ]


def _encode_chat(tokenizer: Any, messages: Any) -> EncodedPrompt:
    text, instruction, response = rendered_chat(tokenizer, messages)
    ids, span_of = tokens_and_spans(tokenizer, text)
    if response is None:
        return EncodedPrompt(ids, span_of(*instruction), len(ids) - 1, None, text)
    first, end = span_of(*response)
    return EncodedPrompt(ids[:end], span_of(*instruction), first - 1, (first, end), text)


def _check_vocabulary(encoded: Sequence[EncodedPrompt], d_vocab: int, tokenizer: Any) -> None:
    for prompt in encoded:
        outside = [token for token in prompt.ids if not 0 <= token < d_vocab]
        if outside:
            name = "" if tokenizer is None or outside[0] < 0 else f" ({tokenizer.convert_ids_to_tokens(outside[0])!r})"
            raise UnknownTokenError(
                f"The prompt {prompt.text[:60]!r} holds the token {outside[0]}{name}, and the model has embeddings for "
                f"0 to {d_vocab - 1}. Use the tokenizer that the model was trained with: "
                f"em.load_model(source, tokenizer=…), or leave that token out."
            )


def _check_lengths(encoded: Sequence[EncodedPrompt], n_ctx: int) -> None:
    empty = [i for i, prompt in enumerate(encoded) if not prompt.ids]
    if empty:
        raise PromptError(f"Prompts {empty[:5]} have no tokens, so there is nothing to read. Drop them.")
    long = [len(prompt) for prompt in encoded if len(prompt) > n_ctx]
    if long:
        raise PromptTooLongError(
            f"{len(long)} of {len(encoded)} prompts are longer than the model's context of n_ctx = {n_ctx} tokens (the "
            f"longest has {max(long)}); cut off, their last token would be another one. Shorten or drop them."
        )


def position_of_asking(position: Position, prompts: Sequence[Any]) -> Position:
    """The position, or ``"prompt_end"`` in place of the mean over an answer that some of the prompts do not have.

    A direction may be read over answers that are given, and what it does is measured on questions that are not answered
    yet: there, the last token before the answer is where it acts first.

    Example:
        >>> position_of_asking("response_mean", ["how?"]), position_of_asking("instruction_end", ["how?"])
        ('prompt_end', 'instruction_end')
    """
    return "prompt_end" if position == "response_mean" and not all(map(_is_answered, prompts)) else position


def _is_answered(prompt: Any) -> bool:
    if isinstance(prompt, EncodedPrompt):
        return prompt.response is not None
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def token_index(encoded: EncodedPrompt, position: Position) -> int | Span:
    """The token of a position: an index, or a span (end exclusive) for ``"response_mean"`` and ``"all"``.

    Raises:
        PositionError: the prompt has no such token.

    Example:
        >>> e = EncodedPrompt(ids=(1, 8, 9, 2), instruction=(1, 3), prompt_end=3, response=None, text="")
        >>> [token_index(e, p) for p in ("instruction_end", "prompt_end", -2, "all")]
        [2, 3, 2, (0, 4)]
    """
    check_position(position)
    if position == "all":
        return (0, len(encoded))
    if position == "response_mean":
        if encoded.response is None or encoded.response[0] == encoded.response[1]:
            raise PositionError(
                f"The prompt {encoded.text[:60]!r} has no response, so there is nothing to average. End the chat with "
                f"an assistant message, or read at 'prompt_end'."
            )
        return encoded.response
    if position == "instruction_end":
        if encoded.instruction[0] == encoded.instruction[1]:
            raise PositionError(
                f"The instruction of {encoded.text[:60]!r} is empty, so it has no last token. Drop the prompt, or read "
                f"at 'prompt_end'."
            )
        return encoded.instruction[1] - 1
    index = encoded.prompt_end + (0 if isinstance(position, str) else position + 1)
    if index < 0:
        raise PositionError(
            f"Position {position} lies before the first of {encoded.prompt_end + 1} tokens of {encoded.text[:60]!r}. "
            f"Use a smaller offset from prompt_end (-1), or longer prompts."
        )
    return index


class Batch(NamedTuple):
    """Right-padded tokens of some prompts, which prompts (``rows``) they are, and where their parts lie.

    ``lengths`` are the true lengths, ``prompts`` the lengths without a response, ``instructions`` the spans of the last
    user messages. ``start`` is the position of the first token that the current forward pass reads: with a key-value
    cache, a pass goes on where the last one ended.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    rows: tuple[int, ...]
    prompts: Int[Tensor, " prompt"]
    instructions: Int[Tensor, "prompt 2"]
    start: int = 0
    behind: Int[Tensor, " prompt"] | None = None

    @property
    def starts(self) -> Int[Tensor, " prompt"]:
        """Of each row the position of the first token that the current pass reads."""
        starts = torch.full_like(self.prompts, self.start)
        return starts if self.behind is None else starts - self.behind

    def only(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, as a batch of their own."""
        parts = {name: getattr(self, name)[list(rows)] for name in ("tokens", "lengths", "prompts", "instructions")}
        behind = None if self.behind is None else self.behind[list(rows)]
        return self._replace(rows=tuple(self.rows[row] for row in rows), behind=behind, **parts)


def make_batch(encoded: Sequence[EncodedPrompt], rows: Sequence[int]) -> Batch:
    """The prompts at ``rows`` as one batch, padded on the right to the longest of them.

    No true token attends to the padding; it repeats the prompt's last token, because a pad token would make some models
    guess a mask.
    """
    chosen = [encoded[i] for i in rows]
    width = max(len(prompt) for prompt in chosen)
    return Batch(
        tokens=torch.tensor([prompt.ids + prompt.ids[-1:] * (width - len(prompt)) for prompt in chosen]),
        lengths=torch.tensor([len(prompt) for prompt in chosen]),
        rows=tuple(rows),
        prompts=torch.tensor([prompt.prompt_end + 1 for prompt in chosen]),
        instructions=torch.tensor([prompt.instruction for prompt in chosen]),
    )


_A_PASS = 8
"""What a pass costs beside its tokens: as much as this part of ``max_tokens``."""


def batches(
    encoded: Sequence[EncodedPrompt],
    *,
    max_tokens: int = 8192,
    turns: Sequence[int] = (),
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of prompts of similar length, right-padded, at most ``max_tokens`` tokens each, padding included.

    Cut where padding and passes together cost least. Right padding is exact on every surface, left padding without a
    mask is not.

    Args:
        encoded: the prompts.
        max_tokens: of a batch.
        turns: lengths beyond which the model treats *all* tokens of a pass differently (``Boundaries.turns``): no batch
            holds prompts of both sides.
        rows: which of the prompts; all by default.

    Example:
        >>> prompts = [EncodedPrompt.from_ids(range(n)) for n in (5, 2, 4)]
        >>> [b.rows for b in batches(prompts, max_tokens=10)], [b.rows for b in batches(prompts, turns=[4])]
        ([(0, 2), (1,)], [(0,), (2, 1)])
    """
    order = sorted(range(len(encoded)) if rows is None else rows, key=lambda i: len(encoded[i]), reverse=True)
    sides = [bisect_left(turns, len(prompt)) for prompt in encoded]
    for some in cheapest_cuts(order, encoded, sides, max_tokens / _A_PASS, lambda longest: max_tokens // longest):
        yield make_batch(encoded, some)


def cheapest_cuts(
    order: Sequence[int], encoded: Sequence[EncodedPrompt], sides: Sequence[int], a_batch: float | int,
    most: Callable[[int], int],
) -> Iterator[Sequence[int]]:  # fmt: skip
    """Prompts in batches, cut where padding and batches together cost least.

    Args:
        order: numbers of prompts, longest first.
        encoded: the prompts.
        sides: a number for each prompt; no batch holds prompts of two.
        a_batch: what one costs beside its tokens, in tokens.
        most: of a batch's longest prompt, how many prompts it may hold.
    """
    counts = np.arange(1, len(order) + 1)
    least = np.zeros(len(order) + 1)  # tokens, batches counted as tokens, of the prompts from here on
    ends = [0] * len(order)
    alike = 0  # prompts from here on that lie on the same side
    for i in reversed(range(len(order))):
        longest = len(encoded[order[i]])
        alike = alike + 1 if i + 1 < len(order) and sides[order[i]] == sides[order[i + 1]] else 1
        n = min(max(1, most(longest)), alike)
        costs = longest * counts[:n] + a_batch + least[i + 1 : i + n + 1]
        best = int(costs.argmin())
        least[i], ends[i] = costs[best], i + best + 1
    start = 0
    while start < len(order):
        yield order[start : ends[start]]
        start = ends[start]
