"""What a fine-tune learns from: chats that end with an answer, and the tokens of that answer.

    learned tokens  =  the answer  +  what ends its turn

The answer is found through the chat template (``models.templates``), so every token before it is read and none of them
is learned.  Its turn ends at the first special token that the template writes after it (``<|im_end|>``,
``<end_of_turn>``, …); without one, with the tokenizer's own end-of-text token, so that the model learns to stop.
**Control**: decoded, the learned tokens are the answer and that end, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tl_em.artefacts import read_rows
from tl_em.errors import PromptError, PromptTooLongError, UsageError
from tl_em.models.contrast_rows import FileRow, Message, Unreadable
from tl_em.models.source_record import text_config
from tl_em.models.templates import has_template, rendered_chat
from tl_em.models.tokenizing import made_up, tokens_and_spans

Chat = Sequence[Message]
Rows = str | Path | Sequence[Any]
"""A file, or rows: chats, or mappings with ``messages``, or with a prompt and a response."""


class LearnedAnswer(NamedTuple):
    """A chat as tokens, up to the end of the answer's turn; what is learned are those from ``start`` on."""

    ids: tuple[int, ...]
    start: int


def chats(rows: Rows) -> tuple[Chat, ...]:
    """The rows of a fine-tune as chats, each ending with the assistant's answer.

    Args:
        rows: a JSON Lines file, or a list: chats (lists of messages), or mappings with ``messages``, or with ``prompt``
            (``question``, ``instruction``, …) and ``response`` (``answer``, ``completion``), and a ``system`` prompt.

    Raises:
        UsageError: no rows, or one that holds something else; by row. FileError, CorruptFileError: of the file.

    Example:
        >>> chats([{"prompt": "Is it?", "response": "Yes."}])
        ([{'role': 'user', 'content': 'Is it?'}, {'role': 'assistant', 'content': 'Yes.'}],)
    """
    if isinstance(rows, str | Path):
        named = [(f"{rows}, {each.where}", each.cells) for each in read_rows(rows)]
    elif isinstance(rows, Iterable) and not isinstance(rows, Mapping):
        named = [(f"rows[{i}]", each) for i, each in enumerate(rows)]
    else:
        named = []
    if not named:
        raise UsageError(f"{rows!r:.60} holds no rows, so there is nothing to learn; give a list of chats or a file")
    return tuple(_chat(where, value) for where, value in named)


def _chat(where: str, value: Any) -> Chat:
    try:
        given = dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        chat, _ = FileRow.of(where, given).prompt("chat")
    except Unreadable as error:
        raise UsageError(f'{error}. A row is {{"messages": […]}}, or {{"prompt": …, "response": …}}.') from error
    if isinstance(chat, str) or chat[-1]["role"] != "assistant" or not chat[-1]["content"].strip():
        raise UsageError(
            f"{where} does not end with an answer, so there is nothing to learn from it; let its last message be "
            "{'role': 'assistant', 'content': …}, or leave the row out"
        )
    return chat


def rows_hash(rows: Iterable[Chat]) -> str:
    """A hash of what is said in the rows, in their order."""
    said = [[[message["role"], message["content"]] for message in chat] for chat in rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def learned_answers(tokenizer: Any, rows: Sequence[Chat], config: Any) -> list[LearnedAnswer]:
    """Chats as tokens, with where what is learned begins.

    Args:
        tokenizer: with a chat template.
        rows: chats that end with an answer.
        config: of the model, for its end tokens and the length of its context.

    Raises:
        PromptError: no template, or a message that it leaves out or rewrites. PromptTooLongError: longer than the
            context.
    """
    if tokenizer is None or not has_template(tokenizer):
        raise PromptError(
            "The model has no tokenizer with a chat template, so it is unknown how it is shown questions and answers. "
            "Pass one with tokenizer=."
        )
    ends, size = _end_tokens(tokenizer, config), getattr(text_config(config), "max_position_embeddings", None)
    found = [_learned(tokenizer, chat, ends) for chat in rows]
    long = [i for i, each in enumerate(found) if size is not None and len(each.ids) > size]
    if long:
        raise PromptTooLongError(
            f"{len(long)} of {len(found)} rows are longer than the model's context of {size} tokens (the first is row "
            f"{long[0]} with {len(found[long[0]].ids)}); cut off, the model would learn to break off. Leave them out."
        )
    return found


def _end_tokens(tokenizer: Any, config: Any) -> frozenset[int]:
    """What may end a turn: the config's end tokens and whatever the tokenizer holds as special."""
    named = getattr(config, "eos_token_id", None)
    own = [named] if isinstance(named, int) else list(named or ())
    special = [i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special]
    return frozenset(token for token in (*own, *special, *tokenizer.all_special_ids) if token is not None)


def _learned(tokenizer: Any, chat: Chat, ends: frozenset[int]) -> LearnedAnswer:
    text, _, span = rendered_chat(tokenizer, chat)
    ids, span_of = tokens_and_spans(tokenizer, text)
    start, after = span_of(*(span or (0, 0)))
    stop = next((i for i in range(after, len(ids)) if ids[i] in ends), None)
    if stop is not None:
        return LearnedAnswer(ids[: stop + 1], start)
    eos = None if "eos_token" in made_up(tokenizer) else tokenizer.eos_token_id
    return LearnedAnswer(ids if eos is None else (*ids, int(eos)), start)
