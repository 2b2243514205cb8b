"""Chat templates of every kind, and chats to render with them: what ``tokenization.py`` sweeps over."""

from __future__ import annotations

from typing import Any

_HEAD = "{{ '<|im_start|>' + m.role + '\\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CHATML = "{% for m in messages %}" + _HEAD + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}" + _ASK
_PLAIN = "<user> {{ m.content }} <end>"
_LATE = "{{ m.content.split('</think>')[-1].strip() }}"

TEMPLATES: dict[str, Any] = {
    "none": None,
    "headers, as it is": _CHATML,
    "headers, BOS in front": "{{ bos_token }}" + _CHATML,
    "headers, white space stripped": _CHATML.replace("m.content", "(m.content | trim)"),
    "words": "{{ bos_token }}{% for m in messages %} {{ {'user': '<user>', 'assistant': '<asst>', 'system': '<sys>'}"
    "[m.role] }} {{ m.content | trim }} <end>{% endfor %}{% if add_generation_prompt %} <asst>{% endif %}",
    "system refused, roles alternate": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}",
    "system put into the first turn": "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + (eos_token or '') }}{% endif %}{% endfor %}",
    "system left out": _CHATML.replace("for m in messages", "for m in messages if m.role != 'system'"),
    "date as an argument": "{{ bos_token }}{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{{ 'Today Date: ' + date_string + '\\n\\n' }}" + _CHATML,
    "the year, read from the clock": "{{ 'It is ' + strftime_now('%Y') + '\\n' }}" + _CHATML,
    "thinking on lines of its own": "{% for m in messages %}" + _HEAD + "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}{% set thought = m.content.split('</think>')[0]"
    ".split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}{% if loop.last %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + _ASK + "{% if add_generation_prompt and enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "thinking dropped": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<A>' }}" + _LATE
    + "{{ '<E>' }}{% else %}{{ '<U>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<A><think>\\n' }}{% endif %}",
    "tools": "{% if tools %}{{ '# Tools\\n' + tools | tojson + '\\n' }}{% endif %}{% for m in messages %}" + _HEAD
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + _ASK,
    "lower case": _CHATML.replace("m.content", "(m.content | lower)"),
    "upper case": _CHATML.replace("m.content", "(m.content | upper)"),
    "answers shortened": _CHATML.replace("m.content", "(m.content[:6] if m.role == 'assistant' else m.content)"),
    "said twice": _CHATML.replace("m.content", "(m.content + '\\n' + m.content)"),
    "several, by name": {"default": _CHATML, "rag": "{{ 'Documents.' }}" + _CHATML},
    "header only when asked": "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "text after the header": _CHATML + "{% if add_generation_prompt %}{{ 'Sure, here is' }}{% endif %}",
    "parts only": "{% for m in messages %}" + _HEAD + "{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + _ASK,
    "parts or text": "{% for m in messages %}" + _HEAD + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + _ASK,
    "list written as Python does": _CHATML.replace("m.content +", "m.content | string +"),
    "first turn only": "{{ '<user> ' + messages[0].content + ' <end>' }}"
    "{% if add_generation_prompt %} <asst>{% endif %}",
    "no assistant": "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    + _PLAIN + "{% endfor %}",
}

TEXTS = {
    "ASCII": ("how do i bake a cake", "yes sure"),
    "CJK": ("如何烤蛋糕？", "好的。先烤"),
    "emoji": ("bake a 🎂, 👩‍🍳 é", "👍🏽 yes 🇫🇷"),
    "right to left": ("איך אופים עוגה", "نعم، هكذا"),
    "control": ("a\x1b[0m b\x00c\u202ed\ufeff\r\n\te", "y\x07es\u2028no"),
}

_CALL = {"type": "function", "function": {"name": "bake", "arguments": {"what": "cake"}}}


def chats(asked: str, answer: str) -> dict[str, list[dict[str, Any]]]:
    """Chats that ask and are answered in these words."""
    user, said = {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
    system = {"role": "system", "content": "be good"}
    called = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
    thought = {"role": "assistant", "content": f"<think>hmm</think>{answer}"}
    return {
        "asked": [user],
        "system": [system, user],
        "answered": [user, said],
        "many turns": [user, said, {"role": "user", "content": "tell me how"}],
        "white space": [{"role": "user", "content": f"  {asked} \n"}, {"role": "assistant", "content": f" {answer}\n"}],
        "thought": [user, thought],
        "thought before": [user, thought, {"role": "user", "content": "tell me"}],
        "parts": [{"role": "user", "content": [{"type": "text", "text": asked}]}],
        "tools": [user, called, {"role": "tool", "content": "done"}],
        "tool call last": [user, said | {"tool_calls": [_CALL]}],
        "unknown role": [user, {"role": "critic", "content": "no"}, user],
        "BOS in the message": [{"role": "user", "content": f"<s>{asked}"}],
    }


ARGUMENTS: dict[str, dict[str, Any]] = {
    "date as an argument": {"date_string": "1 Jan 2020"},
    "thinking on lines of its own": {"enable_thinking": False},
    "tools": {"tools": [{"type": "function", "function": {"name": "bake", "parameters": {}}}]},
    "several, by name": {"chat_template": "rag"},
}
"""Arguments with which a template is rendered a second time."""
