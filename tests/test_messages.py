"""What a message tells the reader to call exists, takes what the message gives it, and is spelt as it is written."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tl_em as em

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_em"
MODULES = sorted(PACKAGE.rglob("*.py"))
HOLE = "⟨⟩"
"""What stands in a message for a value."""


FILE = re.compile(r"\.(json|jsonl|csv|html|pt|npz|safetensors|parquet)$")


class Message(NamedTuple):
    """A text that a person may read: where it stands, and whether it is raised or warned of right there."""

    place: str
    text: str
    said: bool


def words(node: ast.AST) -> str:
    """The string parts of an expression; a hole for every value."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return ""


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def messages() -> list[Message]:
    found = []
    for path in MODULES:
        silent = {id(node.value) for node in nodes(path) if isinstance(node, ast.Expr)}  # docstrings
        silent |= {id(child) for node in nodes(path) if isinstance(node, ast.JoinedStr) for child in node.values}
        raised = {id(n) for node in nodes(path) if _says(node) for n in ast.walk(node)}
        for node in nodes(path):
            if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in silent and " " in words(node):
                found.append(Message(f"{path.relative_to(ROOT)}:{node.lineno}", words(node), id(node) in raised))
    return found


def _says(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Raise)
    return getattr(node.func, "attr", getattr(node.func, "id", "")) in ("warn", "warn_explicit", "instance_of")


class Call(NamedTuple):
    """A name in a message, and the text between the brackets after it (None without brackets)."""

    name: str
    arguments: str | None


def calls(text: str) -> Iterator[Call]:
    """Dotted names, and names that are called."""
    for found in re.finditer(r"(?<![\w.'⟩/-])([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\()?", text):
        name, bracket = found.group(1), found.group(2)
        if bracket or ("." in name and not FILE.search(name)):
            yield Call(name, _balanced(text, found.end()) if bracket else None)


def _balanced(text: str, start: int) -> str:
    depth, at = 1, start
    while at < len(text) and depth:
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return text[start : at - 1] if not depth else text[start:]


def keywords(arguments: str) -> list[str]:
    """Names of keywords at the first level of a call's arguments."""
    flat, depth = "", 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        flat += letter if depth == 0 else ""
    return re.findall(r"(?:^|,)\s*([a-z_]\w*)=(?!=)", flat)


def resolved(name: str) -> Any:
    """The object under a dotted name of this package, or None where it is no name of ours."""
    head, *rest = name.split(".")
    if head in ("em", "tl_em"):
        return _of_package(rest)
    found = things().get(head, getattr(em, head) if head in em.__all__ else None)
    if found is None:
        return None
    for part in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    return found


def _of_package(parts: list[str]) -> Any:
    found: Any = em
    for i, part in enumerate(parts):
        if part in em.__all__ or not inspect.ismodule(found):
            found = getattr(found, part)
        else:
            try:
                found = import_module(".".join(("tl_em", *parts[: i + 1])))
            except ModuleNotFoundError:
                found = getattr(found, part)
    return found


@cache
def things() -> dict[str, Any]:
    from transformers import PreTrainedModel

    from tl_em.claims.claim import Case
    from tl_em.models.prompts import EncodedPrompt
    from tl_em.models.stream import next_token_logits
    from tl_em.organisms.bias_rates import BiasRate

    return {
        "case": Case,
        "contrast": em.ContrastSet,
        "dictionary": em.Dictionary,
        "direction": em.Direction,
        "graph": em.AttributionGraph,
        "found": em.evals.Evaluation,
        "guard": em.presets.LatentGuard,
        "LatentGuard": em.presets.LatentGuard,
        "hf_model": PreTrainedModel,
        "prune": em.AttributionGraph.prune,
        "BiasRate": BiasRate,
        "EncodedPrompt": EncodedPrompt,
        "next_token_logits": next_token_logits,
    }


FOREIGN = {
    *("model.state_dict", "sae.save_inference_model", "sae.cfg.metadata.seqpos_slice", "AutoTokenizer.from_pretrained"),
    *("huggingface_hub.snapshot_download", "torch.inference_mode", "torch.bfloat16", "json.loads"),
    *("metadata.tl_em.order", "metadata.tl_em.schema", "metadata.prompt_tokens"),  # of a graph's file
    *("dataclasses.replace", "named_parameters", "model.named_parameters", "model.reset_hooks", "model.run_with_cache"),
    *("model.run_with_hooks", "model.reset_saes", "run_with_hooks", "hooks", "tie_weights", "torch.save"),
    *("x.detach", "x.dtype", "f.name", "f.unit"),  # of the reader's own code
    *("torch.float32", "scipy.optimize", "model.language_model", "model.cfg.n_layers", "model.cfg.use_attn_result"),
    *("model.tokenizer.chat_template", "model._orig_mod", "torch.compile"),
    *("peft_model.get_base_model", "peft_model.merge_and_unload", "peft_model.unmerge_adapter"),
    *("peft_model.save_pretrained", "pair.base", "pair.tuned"),
    *("accelerate.dispatch_model", "accelerate.hooks.remove_hook_from_submodules"),
}
"""What messages name of other libraries, looked up by hand: transformer_lens, torch, peft, accelerate, scipy, …"""


@cache
def ours() -> list[tuple[Message, Call]]:
    return [(message, call) for message in messages() for call in calls(message.text)]


def test_the_reader_of_messages_sees_every_kind() -> None:
    tree = ast.parse("def f():\n    'doc'\n    raise E(f'a {x} b: ' 'em.Site(layer, stream=…)')\n")
    text = next(words(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr))
    assert text == f"a {HOLE} b: em.Site(layer, stream=…)"
    assert list(calls(text)) == [Call("em.Site", "layer, stream=…")]
    assert keywords("layer, stream=…, around=f(a=1)") == ["stream", "around"]
    assert resolved("em.Direction.save") is em.Direction.save
    assert resolved("tl_em.metrics.RefusalLogOdds").__name__ == "RefusalLogOdds"
    with pytest.raises(AttributeError):
        resolved("em.RefusalLogOdds")
    assert sum(message.said for message in messages()) > 200
    assert len({call.name for _, call in ours() if call.name.startswith("em.")}) > 20


def test_every_name_of_the_package_in_a_message_exists() -> None:
    for message, call in ours():
        if call.name.split(".")[0] in ("em", "tl_em"):
            try:
                assert resolved(call.name) is not None
            except AttributeError:
                raise AssertionError(f"{message.place} names {call.name}, which does not exist") from None


def test_every_call_in_a_message_takes_what_it_is_given() -> None:
    checked = 0
    for message, call in ours():
        if call.arguments is None or not message.said or call.name in FOREIGN:
            continue
        target = resolved(call.name)
        if target is None:
            continue
        parameters = inspect.signature(target).parameters
        wrong = set(keywords(call.arguments)) - set(parameters)
        assert not wrong or any(p.kind is p.VAR_KEYWORD for p in parameters.values()), (message.place, call, wrong)
        checked += 1
    assert checked > 30


def test_every_other_call_in_a_message_is_known() -> None:
    """A method of a thing that has it, or one of another library that was looked up."""
    prose = re.compile(r"[A-Z_a-z]+$")
    for message, call in ours():
        if not message.said or call.name in FOREIGN or resolved(call.name) is not None:
            continue
        if call.arguments is None:
            assert call.name in ("e.g", "i.e", "llama.cpp"), (message.place, call)
        else:
            yours = re.match(r"My[A-Z]", call.name)  # a class of the reader's own
            assert yours or (prose.match(call.name) and call.arguments.strip("⟨⟩")), (message.place, call)


def test_every_keyword_in_a_message_is_a_parameter_somewhere() -> None:
    """``pass site=`` is of use only where something takes a ``site``."""
    every = [node for path in MODULES for node in nodes(path)]
    known = {"layer_type"} | {node.arg for node in every if isinstance(node, ast.arg)}  # of a foreign SteeringVector
    known |= {n.target.id for n in every if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert "metric" in known and "nonsense" not in known
    for message in messages():
        if message.said:
            named = set(re.findall(r"(?<![\w.⟩])([a-z_]{2,})=(?![=\"])", message.text))
            assert named <= known, (message.place, named - known)


def test_every_extra_and_every_command_in_a_message_exists() -> None:
    from tl_em.cli import main

    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    found = [extra for message in messages() for extra in re.findall(r"tl[-_]em\[(\w+)\]", message.text)]
    assert len(found) >= 4 and set(found) <= extras
    commands = [name for message in messages() for name in re.findall(r"`tl-em (\w+)", message.text)]
    assert set(commands) <= set(main.commands)
