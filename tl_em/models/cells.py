"""The cells of one record as what a contrast set is made of: a prompt, a label, a group. Each refusal names the place.

A prompt is a text or a chat. Nothing is converted: a number is no text, an empty cell no prompt, and NaN no label.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from tl_em.artefacts import Record

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Form = Literal["chat", "text"]

PROMPT = ("prompt", "text", "statement", "question", "instruction", "messages")
"""Columns that may hold the prompt; a row with two of them is ambiguous."""
ANSWER, SYSTEM = ("answer", "response", "completion"), ("system_prompt", "system")
GROUP, PAIR, LABEL = ("group", "group_id"), ("pair", "pair_id"), "label"
POSITIVE = ("1", "true", "yes", "positive", "pos", "harmful", "unsafe")
NEGATIVE = ("0", "false", "no", "negative", "neg", "harmless", "safe")


class Unreadable(ValueError):
    """A place in a file, and what is wrong with it."""


def asked(question: str, answer: str | None, system: str | None, form: Form) -> Prompt:
    """A question, with what stands before it and what answers it, as a prompt; a bare question stays a string.

    Args:
        form: ``"chat"``: messages. ``"text"``: ``Input: … Response: …``, as CAA shows an answer to a base model.

    Example:
        >>> asked("Is it?", " Yes", None, "chat")
        [{'role': 'user', 'content': 'Is it?'}, {'role': 'assistant', 'content': 'Yes'}]
        >>> asked("Is it?", " Yes", None, "text")
        'Input: Is it?\\nResponse: Yes'
    """
    if answer is None and system is None:
        return question
    if form == "text":
        before = "" if system is None else f"{system.strip()}\n\n"
        asks = question.strip() if answer is None else f"Input: {question.strip()}\nResponse: {answer.strip()}"
        return f"{before}{asks}"
    turns = (("system", system), ("user", question), ("assistant", None if answer is None else answer.strip()))
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def prompt_of(row: Record, form: Form) -> tuple[Prompt, str | None]:
    """The prompt of a row, and its question where an answer or a system prompt makes more of it."""
    named = [name for name in PROMPT if name in row.cells]
    if len(named) != 1:
        found = f"the columns {named} may all be the prompt" if named else f"no prompt among {list(row.cells)}"
        raise Unreadable(f"{row.where}: {found}; name one column 'prompt'")
    given = {names: one_of(row, names) for names in (ANSWER, SYSTEM)}
    if named[0] == "messages" or isinstance(row.cells[named[0]], list):
        chat = checked(f"{row.where}, column {named[0]!r}", row.cells[named[0]])
        if isinstance(chat, str) or given[ANSWER] is not None:
            raise Unreadable(f"{row.where}: {named[0]!r} is no list of messages, or has an answer beside it")
        return turns(row.where, chat, form)
    for names, value in given.items():
        if value is not None:
            text(row, next(name for name in names if name in row.cells))
    question, answer, system = text(row, named[0]), given[ANSWER], given[SYSTEM]
    bare = answer is None and system is None
    return asked(question, answer, system, form), None if bare else question


def turns(where: str, prompt: Prompt, form: Form) -> tuple[Prompt, str | None]:
    """A prompt in the form that is wanted, and its question where it is an answered chat."""
    if isinstance(prompt, str):
        return prompt, None
    roles = [message["role"] for message in prompt]
    said = {message["role"]: message["content"] for message in prompt}
    question = said.get("user") if roles[-1] == "assistant" else None
    if form == "chat":
        return prompt, question
    if len(said) < len(roles) or "user" not in said or set(said) - {"system", "user", "assistant"}:
        raise Unreadable(f"{where}: a chat with the roles {roles} has no plain form; use form='chat'")
    return asked(said["user"], said.get("assistant"), said.get("system"), form), question


def checked(where: str, value: Any) -> Prompt:
    """A text or a chat that is one."""
    if isinstance(value, str):
        if not value.strip():
            raise Unreadable(f"{where}: the prompt is empty")
        return value
    if not isinstance(value, list) or not value:
        raise Unreadable(f"{where}: {kind(value)} where a prompt (a text, or a list of messages) is expected")
    for message in value:
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise Unreadable(f"{where}: a message has the texts 'role' and 'content', unlike {message!r:.60}")
    return value


def text(row: Record, column: str) -> str:
    """A cell that is a text, and not an empty one."""
    value = row.cells.get(column)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "empty" if isinstance(value, str) else kind(value)
        raise Unreadable(f"{row.where}, column {column!r}: {found} where a text is expected")
    return value


def label_of(row: Record) -> int:
    """1 or 0 for what people write for them; anything else, NaN and no label included, is refused."""
    value = row.cells.get(LABEL)
    said = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    with suppress(ValueError):  # 1.0, as a table writes a column that has gaps
        said = str(int(float(said))) if float(said) in (0.0, 1.0) else said
    if said not in (*POSITIVE, *NEGATIVE):
        found = "missing" if value is None or value == "" else repr(value)
        raise Unreadable(
            f"{row.where}, column {LABEL!r}: {found}, neither {' / '.join(POSITIVE)} nor {' / '.join(NEGATIVE)}"
        )
    return int(said in POSITIVE)


def groups_of(rows: Sequence[Record], names: Sequence[str] = GROUP) -> list[Hashable] | None:
    """The group of every row, None where no row has the column."""
    return [_group(row, names) for row in rows] if any(set(names) & set(row.cells) for row in rows) else None


def _group(row: Record, names: Sequence[str]) -> Hashable:
    value = one_of(row, names)
    absent = value is None or (isinstance(value, str) and not value.strip())
    if absent or (isinstance(value, float) and not math.isfinite(value)):
        found = "missing" if absent else repr(value)
        raise Unreadable(f"{row.where}, column {names[0]!r}: {found}, so it is unknown what the prompt belongs with")
    return frozen(value)


def one_of(row: Record, names: Sequence[str]) -> Any:
    """The cell under whichever of these names the row has, None without one."""
    named = [name for name in names if name in row.cells]
    if len(named) > 1:
        raise Unreadable(f"{row.where}: the columns {named} may both be the {names[0]}; keep one")
    return row.cells[named[0]] if named else None


def frozen(label: Any) -> Hashable:
    """A group label from JSON: a list stands for a tuple."""
    if isinstance(label, dict):
        raise Unreadable(f"a group is a text or a number, not {label!r:.60}")
    return tuple(frozen(each) for each in label) if isinstance(label, list) else label


def kind(value: Any) -> str:
    """What a value is, for a message."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
