"""The Python that gives an answer again: the same model, the same interventions, the same text.

What is written is what a notebook would hold: ``em.load_model``, ``em.Direction.load``, ``em.intervene``,
``em.generate``. Text of anyone stands in it as a literal of Python, so that nothing in it can be run.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tl_em.directions.direction import Direction
from tl_em.models.templates import has_template
from tl_em.models.token_scopes import Where
from tl_em.serving.answering import AnswerSettings
from tl_em.serving.dials import Served, SteeringDial, blocks
from tl_em.showing import slug

_TAKEN = {"em", "model", "dictionary", "conversation", "prompt", "answer", "print"}


def python_of(
    served: Served, dials: Sequence[SteeringDial], messages: Sequence[Mapping[str, str]], settings: AnswerSettings
) -> str:
    """A script that prints the answer to a conversation under dials.

    Args:
        served: the model, and where everything came from.
        dials: in their order; those that are off are left out.
        messages: of the conversation, the last one the user's.
        settings: how the answer is made.
    """
    on = [each for each in dials if each.on]
    names = _names(served, on)
    lines = ["import tl_em as em", "", _model(served)]
    for name, variable in names.items():
        file, note = served.files.get(name), ""
        if file is None:
            file, note = f"{slug(name)}.safetensors", "  # the page hands this file out"
        lines.append(f"{variable} = {_loader(served, name, file)}({_text(file)}){note}")
    if any(each.name not in names for each in on):
        file, note = served.dictionary_file, ""
        if file is None:
            file, note = "dictionary.safetensors", "  # the dictionary that em.serve was given"
        lines.append(f"dictionary = em.load_dictionary({_text(file)}){note}")
    lines += ["", *_prompt(served, messages), ""]
    call = f"answer = em.generate(model, [{_prompt_name(served)}], {_settings(settings)})[0]"
    heads = [_block(served, where, group, names) for where, group in blocks(on)]
    if heads:
        opened = f"with {heads[0]}:" if len(heads) == 1 else "with (\n    " + ",\n    ".join(heads) + ",\n):"
        lines += [opened, f"    {call}"]
    else:
        lines.append(call)
    return "\n".join([*lines, "print(answer)", ""])


def _model(served: Served) -> str:
    if served.source is None:
        return "model = ...  # the model that em.serve was given: em.load_model(source)"
    return f"model = em.load_model({_text(served.source)}, surface={_text(served.surface)})"


def _loader(served: Served, name: str, file: str) -> str:
    if file.lower().endswith(".gguf"):
        return "em.interop.import_control_vector"
    return "em.Direction.load" if isinstance(served.directions[name], Direction) else "em.Profile.load"


def _names(served: Served, dials: Sequence[SteeringDial]) -> dict[str, str]:
    """A variable for each direction."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(each.name for each in dials if each.name in served.directions):
        variable = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower() or "direction"
        variable = variable if variable.isidentifier() else f"direction_{variable}"
        while variable in {*found.values(), *_TAKEN} or keyword.iskeyword(variable):
            variable += "_"
        found[name] = variable
    return found


def _prompt_name(served: Served) -> str:
    return "conversation" if has_template(getattr(served.model, "tokenizer", None)) else "prompt"


def _prompt(served: Served, messages: Sequence[Mapping[str, str]]) -> list[str]:
    if _prompt_name(served) == "prompt":
        return [f"prompt = {_text(messages[-1]['content'])}"]
    turns = [f'    {{"role": {_text(each["role"])}, "content": {_text(each["content"])}}},' for each in messages]
    return ["conversation = [", *turns, "]"]


def _block(served: Served, where: Where, group: Sequence[SteeringDial], names: Mapping[str, str]) -> str:
    edits = ", ".join(_edit(served, each, names) for each in group)
    return f"em.intervene(model, {edits}{'' if where == 'all' else f', where={_value(where)}'})"


def _edit(served: Served, dial: SteeringDial, names: Mapping[str, str]) -> str:
    variable = names.get(dial.name)
    if variable is not None:
        if dial.act == "add":
            return f"em.Add({variable}, {dial.coefficient!r})"
        if dial.act == "ablate":
            return f"em.Ablate({variable})"
        bounds = [f"{name}={value!r}" for name, value in (("low", dial.low), ("high", dial.high)) if value is not None]
        return f"em.Clamp({variable}, {', '.join(bounds)})"
    index = dial.latent
    if dial.act == "add":
        return f"em.Add(em.Direction(dictionary.W_dec[{index}], dictionary.site_out), {dial.coefficient!r})"
    if dial.act == "ablate":
        return f"em.ScaleFeature(dictionary.feature({index}), 0.0)"
    value = dial.low if dial.low is not None else dial.high
    return f"em.ScaleFeature(dictionary.feature({index}), to={value!r})"


def _settings(settings: AnswerSettings) -> str:
    said: list[tuple[str, Any]] = [("max_new_tokens", settings.max_new_tokens)]
    if settings.temperature:
        said += [("temperature", settings.temperature), ("seed", settings.seed)]
        said += [("top_p", settings.top_p)] if settings.top_p < 1 else []
    said += [("repetition_penalty", settings.repetition_penalty)] if settings.repetition_penalty != 1 else []
    said += [("stop", list(settings.stop))] if settings.stop else []
    return ", ".join(f"{name}={_value(value)}" for name, value in said)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    """A literal of Python, in double quotes where it may be."""
    found = repr(text)
    return f'"{found[1:-1]}"' if found[0] == "'" and '"' not in text else found
