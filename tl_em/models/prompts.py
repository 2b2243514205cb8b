"""Prompts as tokens: what the model reads, and where in it the instruction, the prompt and the response end.

Positions come from the chat template, never from a typed index. The template is rendered a second time with a marker in
place of the last user message; the text before and after the marker encloses the message in the true rendering, and
character offsets carry that span to tokens. So it does not matter that a template strips white space, that the same
words occur twice, or how many tokens a header takes.
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

from tl_em.errors import PositionError, PromptError, PromptTooLongError, UnknownTokenError
from tl_em.models.contrasts import ContrastSet, Message, Prompt, Splits, as_prompts, built_in_sets
from tl_em.models.hooks import LensModel
from tl_em.models.sites import Position, check_position
from tl_em.models.source import warn_beyond_proof

__all__ = [
    "Batch",
    "ContrastSet",
    "EncodedPrompt",
    "Message",
    "Prompt",
    "Splits",
    "batches",
    "built_in_sets",
    "encode",
    "make_batch",
    "token_index",
    "tokens_and_spans",
]

Span = tuple[int, int]


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
    def from_ids(cls, ids: Sequence[int], text: str = "") -> EncodedPrompt:
        """Tokens as they are, for models without a tokenizer."""
        return cls(tuple(int(i) for i in ids), (0, len(ids)), len(ids) - 1, None, text)

    def with_response(self, ids: Sequence[int]) -> EncodedPrompt:
        """This prompt, answered with these tokens."""
        start = self.prompt_end + 1
        kept = self.ids[:start] + tuple(int(i) for i in ids)
        return replace(self, ids=kept, response=(start, len(kept)))

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    model: LensModel, prompts: Sequence[Prompt | EncodedPrompt], *, chat: bool | None = None
) -> list[EncodedPrompt]:
    """Tokenize prompts as the model was meant to read them, and find their positions.

    Chat messages, and plain strings where the tokenizer has a chat template (one user turn), go through the template:
    the tokens equal ``tokenizer.apply_chat_template(tokenize=True)``, with no second BOS token. A final assistant
    message is the response and ends the tokens; otherwise the generation prompt does. Plain strings without a template
    follow TransformerLens's ``to_tokens``, BOS included. Prompts that are encoded already pass through.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: strings, lists of messages, or encoded prompts.
        chat: False reads strings as raw text even where there is a chat template.

    Returns:
        One ``EncodedPrompt`` a prompt, in order.

    Raises:
        UnknownTokenError: words outside the vocabulary. PromptTooLongError: longer than ``n_ctx``. PromptError: empty,
        or chat messages for a tokenizer that cannot render them.
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
    return found


def _is_plain(tokenizer: Any, prompt: Prompt | EncodedPrompt, chat: bool | None) -> bool:
    """Whether a prompt is read without a chat template."""
    if tokenizer is None and not isinstance(prompt, EncodedPrompt):
        raise PromptError(
            "The model has no tokenizer, so text means nothing to it. Load it with load_model(source, tokenizer=…), or "
            "pass tokens: EncodedPrompt.from_ids([…])."
        )
    return isinstance(prompt, str) and (getattr(tokenizer, "chat_template", None) is None or chat is False)


def _encode_turns(tokenizer: Any, prompt: Prompt) -> EncodedPrompt:
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            "Chat messages were given, but the tokenizer has no chat template, so it is unknown how the model was "
            "shown turns. Pass plain strings (of a file: ContrastSet.load(path, form='text')), or set "
            "model.tokenizer.chat_template."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    return _encode_chat(tokenizer, messages)


def _encode_plain(model: LensModel, tokenizer: Any, texts: Sequence[str]) -> list[EncodedPrompt]:
    if not texts:
        return []
    empty = [text for text in texts if not text.strip()]
    if empty:
        raise PromptError(f"The prompt {empty[0]!r} is empty, so there is no token to read at. Drop it.")
    bos = tokenizer.bos_token_id
    # Some loaders invent a BOS token that the model has no embedding for.
    has_bos = bos is not None and bos < int(model.cfg.d_vocab)
    encoded = []
    read = list(zip(texts, _plain_ids(model, tokenizer, texts, has_bos), strict=True))
    _check_known(tokenizer, read)
    for text, ids in read:
        start = int(has_bos and len(ids) > 1 and ids[0] == bos and not text.startswith(str(tokenizer.bos_token)))
        encoded.append(EncodedPrompt(ids, (start, len(ids)), len(ids) - 1, None, text))
    return encoded


def _plain_ids(model: LensModel, tokenizer: Any, texts: Sequence[str], has_bos: bool) -> list[tuple[int, ...]]:
    """What ``to_tokens`` makes of each text: in one call of the tokenizer where that gives the first of them as well.

    ``to_tokens`` takes one text at a time, at ten times the cost: a list it pads, and padding may look like text.
    """

    def one(text: str) -> list[int]:
        options: dict[str, Any] = {} if has_bos else {"prepend_bos": False}
        return model.to_tokens(text, truncate=False, move_to_device=False, **options)[0].tolist()

    first = one(texts[0])
    for prefix in ("", str(tokenizer.bos_token)):
        if tokenizer(prefix + texts[0])["input_ids"] == first:
            return [tuple(ids) for ids in tokenizer([prefix + text for text in texts])["input_ids"]]
    return [tuple(first), *(tuple(one(text)) for text in texts[1:])]


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> EncodedPrompt:
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise PromptError("The chat has no user message, so it has no instruction. Add {'role': 'user', 'content': …}.")
    answered = messages[-1].get("role") == "assistant"
    text = _render(tokenizer, messages, not answered)
    _check_rendered(text, messages)
    instruction = _content_span(tokenizer, messages, users[-1], text, not answered)
    response = _content_span(tokenizer, messages, len(messages) - 1, text, False) if answered else None
    ids, span_of = tokens_and_spans(tokenizer, text)
    _check_known(tokenizer, [(text, ids)])
    if response is None:
        return EncodedPrompt(ids, span_of(*instruction), len(ids) - 1, None, text)
    first, end = span_of(*response)
    return EncodedPrompt(ids[:end], span_of(*instruction), first - 1, (first, end), text)


def _render(tokenizer: Any, messages: list[dict[str, str]], generation_prompt: bool) -> str:
    try:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation_prompt}
        return tokenizer.apply_chat_template(messages, **options, **_unsaid(tokenizer))
    except Exception as error:  # jinja2's TemplateError, and whatever a template's own code raises
        roles = [message.get("role") for message in messages]
        raise PromptError(
            f"The chat template refuses messages with the roles {roles}: {error}. The model was not trained on such a "
            f"chat. Change it, e.g. put the system text at the head of the first user message."
        ) from error


def _unsaid(tokenizer: Any) -> dict[str, str]:
    """Special tokens that a loader made up, to be left out of a template, as the user's own tokenizer leaves them out.

    TransformerLens gives a tokenizer without a BOS token its end-of-text token as one.
    """
    own = getattr(tokenizer, "init_kwargs", {})
    made_up = {
        "bos_token": not own.get("bos_token") and tokenizer.bos_token == tokenizer.eos_token,
        "eos_token": not own.get("eos_token") and tokenizer.eos_token == "<|endoftext|>",
    }
    return {name: "" for name, invented in made_up.items() if invented}


def _check_rendered(text: str, messages: list[dict[str, str]]) -> None:
    for message in messages:
        if message.get("role") in ("system", "user") and message.get("content", "").strip() not in text:
            raise PromptError(
                f"The chat template leaves out the {message['role']} message {message['content'][:40]!r}, so the model "
                f"would never see it. Put that text at the head of the first user message."
            )


def _content_span(
    tokenizer: Any, messages: list[dict[str, str]], index: int, text: str, generation_prompt: bool
) -> Span:
    """Where message ``index`` stands in ``text``, in characters, found by rendering a marker in its place."""
    marker = "tlemmarker"
    while marker in text:
        marker += "x"
    marked = [dict(m, content=marker) if i == index else m for i, m in enumerate(messages)]
    rendered = _render(tokenizer, marked, generation_prompt)
    before, found, after = rendered.partition(marker)
    if not found or not text.startswith(before) or not text.endswith(after) or len(before) + len(after) > len(text):
        raise PositionError(
            f"The chat template changes what stands around message {index} with its content, so its tokens cannot be "
            f"told from the template's. Simplify the template, or pass tokens: EncodedPrompt(ids, instruction=…, …)."
        )
    start, end = len(before), len(text) - len(after)
    return start + len(text[start:end]) - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())


def tokens_and_spans(tokenizer: Any, text: str) -> tuple[tuple[int, ...], Callable[[int, int], Span]]:
    """Tokens of rendered text, and a function from a span of characters to the span of tokens that overlap it."""
    if getattr(tokenizer, "is_fast", False):
        batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tuple(batch["input_ids"]), batch["offset_mapping"]

        def span_of(start: int, end: int) -> Span:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            first = sum(b <= start for _, b in offsets)
            return (inside[0], inside[-1] + 1) if inside else (first, first)

        return ids, span_of
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def span_by_prefix(start: int, end: int) -> Span:
        first, _ = _shared_prefix(ids, tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        last, whole = _shared_prefix(ids, tokenizer(text[:end], add_special_tokens=False)["input_ids"])
        return first, max(first, last if whole or start == end else last + 1)

    return ids, span_by_prefix


def _shared_prefix(ids: Sequence[int], prefix: Sequence[int]) -> tuple[int, bool]:
    """How many leading tokens agree, and whether the prefix text is tokenized the same on its own."""
    n = 0
    while n < min(len(ids), len(prefix)) and ids[n] == prefix[n]:
        n += 1
    return n, n == len(prefix)


def _check_known(tokenizer: Any, read: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Raise ``UnknownTokenError`` for the first text whose tokens hold the unknown one."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unknown is None or unknown in special:
        return
    text = next((text for text, ids in read if unknown in ids), None)
    if text is None:
        return
    words = [
        word
        for word in dict.fromkeys(text.split())
        if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]
    ]
    raise UnknownTokenError(
        f"{', '.join(map(repr, words[:8])) or 'Part'} of the prompt {text[:60]!r} is not in the model's vocabulary, so "
        f"the model would read {tokenizer.unk_token!r} in its place. Use prompts of the model's own vocabulary."
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
    encoded: Sequence[EncodedPrompt], *, max_tokens: int = 8192, turns: Sequence[int] = ()
) -> Iterator[Batch]:
    """Batches of prompts of similar length, right-padded, at most ``max_tokens`` tokens each, padding included.

    Cut where padding and passes together cost least. Right padding is exact on every surface, left padding without a
    mask is not.

    Args:
        encoded: the prompts.
        max_tokens: of a batch.
        turns: lengths beyond which the model treats *all* tokens of a pass differently (``Boundaries.turns``): no batch
            holds prompts of both sides.

    Example:
        >>> prompts = [EncodedPrompt.from_ids(range(n)) for n in (5, 2, 4)]
        >>> [b.rows for b in batches(prompts, max_tokens=10)], [b.rows for b in batches(prompts, turns=[4])]
        ([(0, 2), (1,)], [(0,), (2, 1)])
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    counts = np.arange(1, len(order) + 1)
    least = np.zeros(len(order) + 1)  # tokens, passes counted as tokens, of the prompts from here on
    ends = [0] * len(order)
    sides = [bisect_left(turns, len(encoded[i])) for i in order]
    alike = 0  # prompts from here on that lie on the same side
    for i in reversed(range(len(order))):
        longest = len(encoded[order[i]])
        alike = alike + 1 if i + 1 < len(order) and sides[i] == sides[i + 1] else 1
        n = min(max(1, max_tokens // longest), alike)
        costs = longest * counts[:n] + max_tokens / _A_PASS + least[i + 1 : i + n + 1]
        best = int(costs.argmin())
        least[i], ends[i] = costs[best], i + best + 1
    start = 0
    while start < len(order):
        yield make_batch(encoded, order[start : ends[start]])
        start = ends[start]
