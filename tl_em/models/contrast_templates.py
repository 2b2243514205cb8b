"""Contrast sets out of a template: what differs between the classes, in every combination with what they share.

    prompt(class, k, s)  =  the template with the class's k-th filling and the s-th combination of what is shared

Every prompt of one class has its partner in the other, at the same place where both classes have as many fillings, and
all that share a combination (a question, say) are one group: they stay together when the set is split, and count as one
in an interval.

Sources: Zou et al. 2023, arXiv:2310.01405 (templates of stimuli); Chen et al. 2025, arXiv:2507.21509, section 2.2
(system prompts that ask for a trait, and against it, over shared questions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from tl_em.errors import UsageError
from tl_em.models.contrast_rows import Prompt, is_message

_FIELD = re.compile(r"\{(\w+)\}")
_INSTRUCTED: tuple[dict[str, str], ...] = (
    {"role": "system", "content": "{instruction}"},
    {"role": "user", "content": "{question}"},
)


def from_template(
    template: Prompt | Any, positive: Any, negative: Any, shared: Mapping[str, Sequence[str]] | Any
) -> dict[str, Any]:
    """The prompts and groups of a contrast set: see ``ContrastSet.from_template``."""
    names = _fields(template)
    common = _shared(shared, names)
    own = [name for name in names if name not in common]
    sides = {"positive": _fillings("positive", positive, own), "negative": _fillings("negative", negative, own)}
    found: dict[str, Any] = {}
    combinations = [dict(zip(common, values, strict=True)) for values in product(*common.values())]
    for side, fillings in sides.items():
        rows = [(combined, filling) for combined in combinations for filling in fillings]
        found[side] = [_filled(template, {**combined, **filling}) for combined, filling in rows]
        if common:
            labels = [" · ".join(combined.values()) for combined, _ in rows]
            found[f"{side}_groups"] = labels
    return found


def from_instructions(positive: Any, negative: Any, questions: Any) -> dict[str, Any]:
    """The prompts and groups of a contrast set: see ``ContrastSet.from_instructions``."""
    return from_template(_INSTRUCTED, positive, negative, {"question": questions})


def _fields(template: Any) -> list[str]:
    """The names in curly brackets, in order."""
    if isinstance(template, str):
        texts = [template]
    elif isinstance(template, Sequence) and template and all(map(_is_message, template)):
        texts = [str(message["content"]) for message in template]
    else:
        raise UsageError(
            f"template={template!r:.60} is neither a text nor a list of messages, so there is nothing to fill in. "
            "Write \"You are {persona}. {question}\", or [{'role': 'user', 'content': '… {question}'}]."
        )
    names = list(dict.fromkeys(name for text in texts for name in _FIELD.findall(text)))
    if not names:
        raise UsageError(
            f"The template {template!r:.60} has no field, so both classes would be the same prompts. Write what "
            "differs as a name in curly brackets: \"You are {persona}.\""
        )
    return names


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and is_message(value)


def _shared(shared: Any, names: Sequence[str]) -> dict[str, list[str]]:
    if not isinstance(shared, Mapping):
        raise UsageError(
            f"shared={shared!r:.60} does not say which field its values are for. Give them by name: "
            "shared={'question': [\"How are you?\", …]}."
        )
    found = {name: _texts(f"shared[{name!r}]", values) for name, values in shared.items()}
    unknown = [name for name in found if name not in names]
    if unknown:
        raise UsageError(
            f"shared names {unknown[0]!r}, which is no field of the template ({', '.join(names)}), so it would change "
            "nothing. Write {" + str(unknown[0]) + "} in the template, or leave it out of shared."
        )
    return found


def _fillings(side: str, given: Any, own: Sequence[str]) -> list[dict[str, str]]:
    """Of one class, a mapping from field to text for each filling; a bare text fills the one field there is."""
    if not own:
        raise UsageError(
            "shared fills every field of the template, so both classes would be the same prompts. Leave out of shared "
            "the field that differs, and give it as positive= and negative=."
        )
    items = [given] if isinstance(given, str | Mapping) else list(given) if isinstance(given, Sequence) else None
    if not items:
        raise UsageError(
            f"{side}={given!r:.60} holds no filling, so that class would be empty. Give a list of texts for "
            f"{{{own[0]}}}: {side}=[\"…\"]."
        )
    found = [dict.fromkeys(own[:1], item) if isinstance(item, str) and len(own) == 1 else item for item in items]
    for item in found:
        if not isinstance(item, Mapping) or set(item) != set(own) or not all(isinstance(v, str) for v in item.values()):
            example = ", ".join(f"{name!r}: '…'" for name in own)
            raise UsageError(
                f"{side} holds {item!r:.60}, and the template has the fields {', '.join(own)} for it to fill. Give one "
                f"text for each: {side}=[{{{example}}}]."
            )
    filled: Any = found
    return [dict(item) for item in filled]


def _texts(name: str, values: Any) -> list[str]:
    listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    if not listed or not all(isinstance(value, str) for value in listed):
        raise UsageError(
            f"{name}={values!r:.60} is no list of texts, so nothing can be filled in. Write {name}: [\"…\", \"…\"]."
        )
    return listed


def _filled(template: Any, values: Mapping[str, str]) -> Prompt:
    def fill(text: str) -> str:
        return _FIELD.sub(lambda found: values[found.group(1)], text)  # once: what is filled in is not read again

    if isinstance(template, str):
        return fill(template)
    messages: Any = template
    return [{**message, "content": fill(str(message["content"]))} for message in messages]
