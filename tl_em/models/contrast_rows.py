"""The rows of a file as what a contrast set is made of: prompts, labels, groups. Each refusal names the place.

A prompt is a text or a chat. Nothing is converted: a number is no text, an empty cell no prompt, and NaN no label.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Literal, NamedTuple

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


class FileRow(NamedTuple):
    """One row of a file: where it stands, its cells by column, and its line where it is a line of a text."""

    where: str
    cells: dict[str, Any]
    line: int | None = None

    @classmethod
    def of(cls, where: str, value: Any) -> FileRow:
        """A value of JSON: an object by its columns (lower case, underscores), a text, a chat."""
        if isinstance(value, str | list):
            return cls(where, {"text" if isinstance(value, str) else "messages": value})
        if not isinstance(value, dict):
            raise Unreadable(f"{where}: {kind(value)} where an object, a text or a chat is expected")
        cells = {column_name(name): cell for name, cell in value.items()}
        if len(cells) < len(value):
            raise Unreadable(f"{where}: two columns of {list(value)} have the same name but for case")
        return cls(where, cells)

    def column(self, names: Sequence[str]) -> str | None:
        """Whichever of these names the row has, None without one."""
        named = [name for name in names if name in self.cells]
        if len(named) > 1:
            raise Unreadable(f"{self.where}: the columns {named} may both be the {names[0]}; keep one")
        return named[0] if named else None

    def text(self, column: str) -> str:
        """A cell that is a text, and not an empty one."""
        value = self.cells.get(column)
        if not isinstance(value, str) or not value.strip():
            found = "missing" if value is None else "empty" if isinstance(value, str) else kind(value)
            raise Unreadable(f"{self.where}, column {column!r}: {found} where a text is expected")
        return value

    def prompt(self, form: Form) -> tuple[Prompt, str | None]:
        """The prompt, and its question where an answer or a system prompt makes more of it."""
        named = [name for name in PROMPT if name in self.cells]
        if len(named) != 1:
            found = f"the columns {named} may all be the prompt" if named else f"no prompt among {list(self.cells)}"
            raise Unreadable(f"{self.where}: {found}; name one column 'prompt'")
        given = [self.column(names) for names in (ANSWER, SYSTEM)]
        beside = [None if name is None or self.cells[name] is None else name for name in given]
        if named[0] == "messages" or isinstance(self.cells[named[0]], list):
            chat = checked(f"{self.where}, column {named[0]!r}", self.cells[named[0]])
            if isinstance(chat, str) or beside[0] is not None:
                raise Unreadable(f"{self.where}: {named[0]!r} is no list of messages, or has an answer beside it")
            return turns(self.where, chat, form)
        answer, system = [None if name is None else self.text(name) for name in beside]
        question = self.text(named[0])
        return asked(question, answer, system, form), None if beside == [None, None] else question

    def label(self) -> int:
        """1 or 0 for what people write for them; anything else, NaN and no label included, is refused."""
        value = self.cells.get(LABEL)
        said = str(value).strip().lower() if isinstance(value, str | int | float) else ""
        with suppress(ValueError):  # 1.0, as a table writes a column that has gaps
            said = str(int(float(said))) if float(said) in (0.0, 1.0) else said
        if said not in (*POSITIVE, *NEGATIVE):
            found = "missing" if value is None or value == "" else repr(value)
            raise Unreadable(
                f"{self.where}, column {LABEL!r}: {found}, neither {' / '.join(POSITIVE)} nor {' / '.join(NEGATIVE)}"
            )
        return int(said in POSITIVE)

    def group(self, names: Sequence[str]) -> Hashable:
        """What the row belongs with."""
        column = self.column(names)
        value = None if column is None else self.cells[column]
        absent = value is None or (isinstance(value, str) and not value.strip())
        if absent or (isinstance(value, float) and not math.isfinite(value)):
            found = "missing" if absent else repr(value)
            raise Unreadable(
                f"{self.where}, column {names[0]!r}: {found}, so it is unknown what the prompt belongs with"
            )
        return frozen(value)


@cache
def column_name(column: str) -> str:
    """A column's name as it is looked up."""
    return column.strip().lower().replace(" ", "_")


def groups_of(rows: Sequence[FileRow], names: Sequence[str] = GROUP) -> list[Hashable] | None:
    """The group of every row, None where no row has the column."""
    return [row.group(names) for row in rows] if any(set(names) & set(row.cells) for row in rows) else None


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
    said = {"system": system, "user": question, "assistant": None if answer is None else answer.strip()}
    return [{"role": role, "content": content} for role, content in said.items() if content is not None]


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
        if not (isinstance(message, dict) and is_message(message)):
            raise Unreadable(f"{where}: a message has the texts 'role' and 'content', unlike {message!r:.60}")
    return value


def is_message(message: Message) -> bool:
    """Whether a message says who says what, in text."""
    return all(isinstance(message.get(name), str) for name in ("role", "content"))


def frozen(label: Any) -> Hashable:
    """A group label from JSON: a list stands for a tuple."""
    if isinstance(label, dict):
        raise Unreadable(f"a group is a text or a number, not {label!r:.60}")
    return tuple(frozen(each) for each in label) if isinstance(label, list) else label


def kind(value: Any) -> str:
    """What a value is, for a message."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"
