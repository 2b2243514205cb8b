"""Chats as the template renders them, and where in that text the instruction and the answer stand.

Positions come from the chat template, never from a typed index. The template is rendered once more with a marker in
place of a message; the text before and after the marker encloses the message in the true rendering. So it does not
matter that a template strips white space, that the same words occur twice, or how many tokens a header takes.

What stands there must be the message: a template that leaves one out, rewrites it or cuts its thinking off gives an
error that shows what became of it. The one exception is the thinking (``… </think>``) of an *earlier* answer, which
many templates take off by design: nobody reads there.

**Arguments.** ``em.load_model(…, chat_template_kwargs={"enable_thinking": False})`` sets the attribute of that name on
``model.tokenizer``: it goes into every rendering and is part of the provenance. Where a template writes the date and
lets it be given, give it, or tomorrow's prompts are others.

Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tl_em.errors import PositionError, PromptError, UsageError
from tl_em.models.tokenizing import Span, made_up, shared_prefix

_OURS = (
    *("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "padding"),
    *("truncation", "max_length", "return_assistant_tokens_mask", "conversation", "messages", "tokenizer_kwargs"),
    "sanitize_control_tokens",
)
_SAID_APART = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of an answer that hold part of what the model said."""
_TRIES = 4
"""Renderings of a template that writes the time: the next second may begin between two of them."""


class Rendered(NamedTuple):
    """A chat as text; spans of characters, end exclusive: of the last user message, of the final answer."""

    text: str
    instruction: Span
    response: Span | None


# ---- the template and its arguments ----------------------------------------------------------------------------------
def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render chats."""
    own = getattr(tokenizer, "chat_template", None)
    return own is not None or "chat_template" in template_kwargs(tokenizer)


def template_kwargs(tokenizer: Any) -> dict[str, Any]:
    """Arguments that every rendering gets: ``tokenizer.chat_template_kwargs``.

    Raises:
        UsageError: no mapping, or an argument that is not the user's to give.
    """
    given = getattr(tokenizer, "chat_template_kwargs", None) or {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UsageError(
            f"chat_template_kwargs={given!r} are no named arguments, so a template cannot take them. Give a dict, such "
            f"as {{'enable_thinking': False}}."
        )
    taken = [name for name in given if name in _OURS]
    if taken:
        raise UsageError(
            f"chat_template_kwargs names {', '.join(taken)}, which tl_em sets itself: a final assistant message is "
            f"the answer and ends the tokens, otherwise the generation prompt does. Leave out what it names."
        )
    return dict(given)


def template_record(tokenizer: Any) -> tuple[str | None, dict[str, Any] | None]:
    """For a provenance: hash of the chat template ("none" without one), and its arguments as JSON would hold them;
    None, None without a tokenizer.

    Example:
        >>> template_record(None)
        (None, None)
    """
    if tokenizer is None:
        return None, None
    template = getattr(tokenizer, "chat_template", None)
    content = template if isinstance(template, str) else json.dumps(template, sort_keys=True, default=str)
    digest = "none" if template is None else hashlib.sha256(content.encode()).hexdigest()[:16]
    return digest, json.loads(json.dumps(template_kwargs(tokenizer), sort_keys=True, default=_said))


def _said(value: Any) -> Any:
    """What JSON cannot hold: a tool that is a function as its schema, anything else by its type and text."""
    if callable(value):
        from transformers.utils.chat_template_utils import get_json_schema

        try:
            return get_json_schema(value)
        except Exception:  # a function without the docstring that a schema is made of
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return f"{type(value).__name__}: {value}"


class _Renderer:
    """One chat's renderings, all with the same arguments."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, given = tokenizer, template_kwargs(tokenizer)
        self.options: dict[str, Any] = dict.fromkeys(made_up(tokenizer), "") | given

    def __call__(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.options,
            )
        except Exception as error:  # jinja2's TemplateError, and whatever a template's own code raises
            roles = [message.get("role") for message in messages]
            raise PromptError(
                f"The chat template refuses messages with the roles {roles}: {error}. The model was not trained on "
                f"such a chat. Change it, e.g. put the system text at the head of the first user message."
            ) from error


# ---- rendering -------------------------------------------------------------------------------------------------------
def rendered_chat(tokenizer: Any, messages: Any) -> Rendered:
    """A chat as text, with the places of the instruction and of the final answer.

    Raises:
        PromptError: no chat, a message that the template refuses, leaves out or rewrites. PositionError: one that
            cannot be told from the template's own words.
    """
    render, chat = _Renderer(tokenizer), checked_messages(messages)
    answered = chat[-1]["role"] == "assistant"
    chat = _readable(render, chat, not answered)
    for _ in range(_TRIES):
        text = render(chat, not answered)
        try:
            return _found(render, chat, text)
        except PromptError:
            if render(chat, not answered) == text:
                raise
    raise PositionError(
        "The chat template writes the time, and another one in each rendering, so it cannot be told where a message "
        "stands. Give the time as an argument, em.load_model(…, chat_template_kwargs=…), or take it out of there."
    )


def _found(render: _Renderer, chat: list[dict[str, Any]], text: str) -> Rendered:
    """Where the parts of a chat stand in its rendering."""
    last_user = max(i for i, message in enumerate(chat) if message["role"] == "user")
    answered = chat[-1]["role"] == "assistant"
    for index in range(len(chat) - answered):
        if index != last_user:
            _check_present(render, chat, index, text, not answered)
    instruction = _instruction_span(render, chat, last_user, text, not answered)
    return Rendered(text, instruction, _answer_span(render, chat, text) if answered else None)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as dicts, each with a role and, where it is to be read, a content.

    Raises:
        PromptError: they are no chat.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise PromptError(
            f"A {type(messages).__name__} is no prompt: give a string, a list of messages such as "
            f"{{'role': 'user', 'content': …}}, or tokens as EncodedPrompt.from_ids([…])."
        )
    if not all(isinstance(message, Mapping) for message in messages):
        raise PromptError(
            "A prompt is a list, but not one of messages. A chat is [{'role': 'user', 'content': …}, …]; tokens are "
            "EncodedPrompt.from_ids([…])."
        )
    found = [dict(message) for message in messages]
    for index, message in enumerate(found):
        if not isinstance(message.get("role"), str):
            raise PromptError(
                f"Message {index} has the role {message.get('role')!r}, so it is unknown who says it. Write "
                f"{{'role': 'user', 'content': …}}."
            )
        _check_content(index, message)
    if not any(message["role"] == "user" for message in found):
        raise PromptError("The chat has no user message, so it has no instruction. Add {'role': 'user', 'content': …}.")
    _check_final(found[-1])
    return found


def _check_content(index: int, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant" and message.get("tool_calls")):
        return
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ) and content:  # fmt: skip
        return
    what = "no content" if content is None else f"a content that is no text ({content!r:.60})"
    raise PromptError(
        f"Message {index} ({message['role']}) has {what}, and only text is read. Give 'content' as a string, or as "
        f"parts [{{'type': 'text', 'text': …}}]."
    )


def _check_final(message: Mapping[str, Any]) -> None:
    """An answer is what stands in its content: what it says apart would be left out of every mean over it."""
    apart = [key for key in _SAID_APART if message["role"] == "assistant" and message.get(key)]
    if apart:
        raise PromptError(
            f"The final assistant message says part of its answer in {', '.join(map(repr, apart))}, whose tokens "
            f"cannot be told from the template's, so a mean over the answer would leave it out. Write all of it as "
            f"'content', as the template renders it, or pass tokens: EncodedPrompt.from_ids(…).with_response(…)."
        )


# ---- content as parts ------------------------------------------------------------------------------------------------
def _readable(render: _Renderer, chat: list[dict[str, Any]], generation_prompt: bool) -> list[dict[str, Any]]:
    """Content given as parts stays so where the template reads parts; else a single part becomes its text.

    A template that knows strings only writes a list as Python does, ``[{'type': …``: so one more key stands in a part,
    and where that turns up the parts were not read.
    """
    listed = [i for i, message in enumerate(chat) if not isinstance(message.get("content"), str | None)]
    for index in listed:
        parts = chat[index]["content"]
        if _reads_parts(render, chat, index, generation_prompt):
            continue
        if len(parts) > 1:
            raise PromptError(
                f"Message {index} has {len(parts)} parts, and the chat template reads text only, so it is unknown what "
                f"stands between them. Join them: 'content': '…'."
            )
        chat = _with(chat, index, parts[0]["text"])
    return chat


def _reads_parts(render: _Renderer, chat: list[dict[str, Any]], index: int, generation_prompt: bool) -> bool:
    probe = [{"type": "text", "text": "tlemmarker", "tlemunread": "tlemunread"}]
    try:
        seen = render(_with(chat, index, probe), generation_prompt)
    except PromptError:
        return False
    return "tlemmarker" in seen and "tlemunread" not in seen


def _with(chat: Sequence[dict[str, Any]], index: int, content: Any) -> list[dict[str, Any]]:
    return [message | {"content": content} if i == index else message for i, message in enumerate(chat)]


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content or "" if isinstance(content, str | None) else "".join(part["text"] for part in content)


# ---- where a message stands ------------------------------------------------------------------------------------------
def _marked(render: _Renderer, chat: Sequence[dict[str, Any]], index: int, text: str, prompt: bool) -> list[str]:
    """What stands before, between and after the places of a message, found by rendering a marker in its place."""
    marker = "tlemmarker"
    while marker in text or any(marker in _text_of(message) for message in chat):
        marker += "x"
    listed = not isinstance(chat[index].get("content"), str | None)
    content = [{"type": "text", "text": marker}] if listed else marker
    return render(_with(chat, index, content), prompt).split(marker)


def _enclosed(text: str, before: str, after: str) -> Span | None:
    """The characters between a head and a tail of the text."""
    fits = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
    return (len(before), len(text) - len(after)) if fits else None


def _place(
    render: _Renderer, chat: list[dict[str, Any]], index: int, text: str, prompt: bool
) -> tuple[list[str], Span | None]:
    """What stands around message ``index``, and the characters in between; None where that cannot be told."""
    around = _marked(render, chat, index, text, prompt)
    if len(around) == 1:
        raise PromptError(_became(chat[index], None, parts=_reads_parts(render, chat, index, prompt)))
    return around, _enclosed(text, *around) if len(around) == 2 else None


def _instruction_span(render: _Renderer, chat: list[dict[str, Any]], index: int, text: str, prompt: bool) -> Span:
    """Where the last user message stands in ``text``, in characters."""
    around, found = _place(render, chat, index, text, prompt)
    if found is None:
        why = "writes message {} more than once" if len(around) > 2 else "changes what stands around message {} with it"
        raise PositionError(
            f"The chat template {why.format(index)} ({_text_of(chat[index])[:40]!r}), so its tokens cannot be told "
            f"from the template's. Simplify the template, or pass tokens: EncodedPrompt(ids, instruction=…, …)."
        )
    return _same_span(chat[index], text, found)


def _answer_span(render: _Renderer, chat: Sequence[dict[str, Any]], text: str) -> Span:
    """Where the final answer stands: between what surrounds a marker, or from the end of the generation prompt on."""
    message, index = chat[-1], len(chat) - 1
    around = _marked(render, chat, index, text, False)
    found = _enclosed(text, around[0], around[1]) if len(around) == 2 else None
    if found is not None and text[slice(*found)] == _text_of(message):
        return found  # white space at its ends is part of an answer that keeps it
    if found is None or not _same(message, text[slice(*found)]):
        wider = _after_prompt(render, chat, text, around[-1])
        if wider is not None and _unspaced(text[slice(*wider)]) == _unspaced(_text_of(message)):
            return _stripped(text, *wider)  # the template sets the thinking on lines of its own
    if found is None:
        if len(around) == 1:
            shown = _after_prompt(render, chat, text, "")
            raise PromptError(_became(message, None if shown is None else text[slice(*shown)]))
        raise PositionError(
            f"The chat template changes what stands around the answer {_text_of(message)[:60]!r} with it, so its "
            f"tokens cannot be told from the template's. Pass tokens: EncodedPrompt.from_ids(…).with_response(…)."
        )
    return _same_span(message, text, found)


def _after_prompt(render: _Renderer, chat: Sequence[dict[str, Any]], text: str, after: str) -> Span | None:
    try:
        asked = render(chat[:-1], True)
    except PromptError:
        return None
    return _enclosed(text, asked, after)


def _stripped(text: str, start: int, end: int) -> Span:
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())


def _check_present(render: _Renderer, chat: list[dict[str, Any]], index: int, text: str, prompt: bool) -> None:
    """Raise where a message that is neither the instruction nor the answer is not what the model sees."""
    message = chat[index]
    silent = {"content": ""} | {name: value for name, value in message.items() if name != "tool_calls"}
    if (
        message.get("tool_calls")
        and render([*chat[:index], silent | {"content": silent["content"] or ""}, *chat[index + 1 :]], prompt) == text
    ):
        raise PromptError(
            f"The chat template leaves out the tool calls of message {index}, so the model would never see them. Write "
            f"them into its 'content', or take the message out."
        )
    if not _text_of(message).strip():
        return
    said, (around, found) = _text_of(message), _place(render, chat, index, text, prompt)
    if any(each.join(around) == text for each in (said, said.strip())):
        return
    if found is None:  # what stands around it changes with it, and nothing is read there
        if not any(each in text for each in (said.strip(), _after_thinking(message))):
            raise PromptError(_became(message, None))
    elif not _same(message, text[slice(*found)]) and not _unthought(message, text[slice(*found)]):
        raise PromptError(_became(message, text[slice(*found)]))


def _same(message: Mapping[str, Any], shown: str) -> bool:
    """Whether the template shows the message, but for white space at its ends, and between its parts."""
    if isinstance(message.get("content"), str | None):
        return _text_of(message).strip() == shown.strip()
    return _unspaced(_text_of(message)) == _unspaced(shown)


def _unspaced(text: str) -> str:
    return "".join(text.split())


def _after_thinking(message: Mapping[str, Any]) -> str:
    """What an earlier answer says after its thinking."""
    said = _text_of(message)
    return (said.rpartition("</think>")[2] if message["role"] == "assistant" else said).strip()


def _unthought(message: Mapping[str, Any], shown: str) -> bool:
    """Whether an earlier answer is shown without its thinking, as many templates do by design."""
    return message["role"] == "assistant" and _after_thinking(message) == shown.strip()


def _same_span(message: Mapping[str, Any], text: str, found: Span) -> Span:
    """Where a message stands, less white space; ``PromptError`` where another text stands there."""
    if not _same(message, text[slice(*found)]):
        raise PromptError(_became(message, text[slice(*found)]))
    return _stripped(text, *found)


def _became(message: Mapping[str, Any], shown: str | None, *, parts: bool = False) -> str:
    """What a template made of a message, for an error; ``parts``: whether it reads content given as parts."""
    said = _text_of(message).strip()
    role = f"the {message['role']} message"
    fix = (
        "Write the answer as the template renders it, set chat_template_kwargs= where the template takes an argument "
        "for it, or pass tokens: EncodedPrompt.from_ids(…).with_response(…)."
        if message["role"] == "assistant"
        else "Give 'content' as parts, which it reads: [{'type': 'text', 'text': …}]."
        if parts
        else "Put that text at the head of the first user message."
        if message["role"] == "system"
        else "Write it as the template renders it, or pass tokens: EncodedPrompt(ids, instruction=…, …)."
    )
    if shown is None or not shown.strip():
        return (
            f"The chat template leaves out {role} {said[:60]!r}, or rewrites all of it, so the model would never see "
            f"it. {fix}"
        )
    shown = shown.strip()
    first = shared_prefix(said, shown)
    last = shared_prefix(said[first:][::-1], shown[first:][::-1])
    old, new = said[first : len(said) - last], shown[first : len(shown) - last]
    change = f"drops {old[:200]!r} from" if not new else f"writes {new[:200]!r} for {old[:200]!r} in"
    return f"The chat template {change} {role} {said[:60]!r}, so the model would read something else. {fix}"
