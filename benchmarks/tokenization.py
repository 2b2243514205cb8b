"""Are the tokens that a model reads the tokenizer's own, whatever its special tokens and its chat template?

Every kind of tokenizer x every template x every script, on models that ``em.load_model`` made, so that TransformerLens
has changed the tokenizer as it does. The reference is another copy of the tokenizer that TransformerLens never saw:

    text      tokenizer(text): what it appends itself taken off, its own BOS in front, once
    chat      tokenizer.apply_chat_template(messages, tokenize=True), up to the end of the final answer
    answer    the tokens that overlap the answer's characters in the rendered text

Each cell is *equal*, *refused* (an error of tl_em that says why) or *wrong*: other tokens, an answer's tokens missing,
a message that the model does not see, an error of somebody else's. One wrong cell fails the run.

    OMP_NUM_THREADS=1 python benchmarks/tokenization.py --write docs/results/tokenizers.md
    OMP_NUM_THREADS=1 python benchmarks/tokenization.py --surface bridge --kinds "slow"
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chat_kinds import ARGUMENTS, TEMPLATES, TEXTS, chats
from tokenizer_kinds import KINDS, Kind
from transformers import AutoModelForCausalLM, LlamaConfig

import tl_em as em
from tl_em.artefacts import replacing
from tl_em.errors import TlEmError
from tl_em.models.prompts import encode

SURFACES = ("hooked", "bridge") if int(version("transformer-lens").split(".")[0]) < 4 else ("bridge",)


class Cell(NamedTuple):
    """What became of one prompt."""

    surface: str
    kind: str
    template: str
    script: str
    chat: str
    outcome: str
    reason: str


def make_model(kind: Kind, surface: Any) -> Any:
    """A tiny model of the tokenizer's size, as TransformerLens loads both."""
    torch.manual_seed(0)
    tokenizer = kind.make()
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer) - kind.beyond, max_position_embeddings=2048, **size)
    return em.load_model(AutoModelForCausalLM.from_config(config), surface=surface, tokenizer=tokenizer, in_place=True)


# ---- the reference ---------------------------------------------------------------------------------------------------
def expected_text(own: Any, kind: Kind, text: str) -> list[int]:
    """A text's ids, by the pristine tokenizer and what is known of how it was made."""
    ids = list(own(text)["input_ids"])
    ids = ids[: len(ids) - kind.after]
    bos = None if kind.bos is None else own.convert_tokens_to_ids(kind.bos)
    core = ids[kind.adds :]
    if bos is not None and core and core[0] == bos:
        return [*ids[: max(0, kind.adds - 1)], *core]
    return [bos, *ids] if bos is not None and bos not in ids[: kind.adds] else ids


def wrong_text(own: Any, kind: Kind, text: str, found: Any) -> str:
    expected = expected_text(own, kind, text)
    return "" if list(found.ids) == expected else f"{list(found.ids)[:12]} for {expected[:12]}"


def wrong_chat(own: Any, messages: list[dict[str, Any]], options: dict[str, Any], found: Any) -> str:
    """What is wrong with an encoded chat, nothing where all is right."""
    messages = as_read(own, messages, options)
    answered = messages[-1]["role"] == "assistant"
    given = {"add_generation_prompt": not answered, **options}
    text = own.apply_chat_template(messages, tokenize=False, **given)
    ids = own.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
    if list(found.ids) != ids[: len(found)] or (not answered and len(ids) != len(found)):
        return f"{list(found.ids)[:12]} for {ids[:12]}"
    unseen = [m for i, m in enumerate(messages) if not _seen(m, text, i == len(messages) - 1)]
    if unseen:
        return f"the model does not see {unseen[0]['content']!r}"
    return _wrong_answer(own, messages[-1]["content"], text, found) if answered else ""


def as_read(own: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Content given as parts is text for a template that does not read parts: it fails on them, or writes a list."""
    if isinstance(messages[0]["content"], str):
        return messages
    try:
        text = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception:
        text = "'type'"
    return [{**messages[0], "content": messages[0]["content"][0]["text"]}] if "'type'" in text.lower() else messages


def _seen(message: dict[str, Any], text: str, final: bool) -> bool:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls and calls[0]["function"]["name"] not in text:
        return False
    said = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    if "</think>" in said and not final:
        said = said.split("</think>")[-1]
    return said.strip() in text or ("".join(said.split()) in "".join(text.split()) and "</think>" in said)


def _wrong_answer(own: Any, answer: str, text: str, found: Any) -> str:
    """The tokens that overlap the answer's characters, by the pristine tokenizer's offsets."""
    if not getattr(own, "is_fast", False):
        return ""
    last = answer.split("</think>")[-1].strip()
    end = text.rindex(last) + len(last)
    start = text.rindex("<think>") if "</think>" in answer else end - len(last)
    offsets = own(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covered = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    first, after = found.response
    if first <= covered[0] and after > covered[-1] and after - first - len(covered) <= 2:  # white space at its ends
        return ""
    return f"the answer's tokens are {covered[0]} to {covered[-1]}, found {first} to {after - 1}"


# ---- the sweep -------------------------------------------------------------------------------------------------------
def sweep(kinds: Sequence[str], surfaces: Sequence[str], templates: Sequence[str] | None = None) -> Iterator[Cell]:
    for surface in surfaces:
        for name in kinds:
            kind = KINDS[name]
            model, own = make_model(kind, surface), kind.make()
            for template in templates or TEMPLATES:
                yield from _template(model, own, kind, (surface, name), template)


def _template(model: Any, own: Any, kind: Kind, where: tuple[str, str], template: str) -> Iterator[Cell]:
    for options in [{}, *([ARGUMENTS[template]] if template in ARGUMENTS else [])]:
        model.tokenizer.chat_template = own.chat_template = TEMPLATES[template]
        model.tokenizer.chat_template_kwargs = options
        label = template + (f" {options}"[:40] if options else "")
        for script, (asked, answer) in TEXTS.items():
            if template == "none":
                for what, text in texts(asked, kind).items():
                    yield _cell(model, text, (*where, label, script, what), _plain_check(own, kind, text))
                continue
            for what, chat in chats(asked, answer).items():
                yield _cell(model, chat, (*where, label, script, what), _chat_check(own, chat, options))


def _plain_check(own: Any, kind: Kind, text: str) -> Any:
    return lambda found: wrong_text(own, kind, text, found)


def _chat_check(own: Any, chat: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    return lambda found: wrong_chat(own, chat, options, found)


def texts(asked: str, kind: Kind) -> dict[str, str]:
    """Texts that go through no template."""
    bos = kind.bos or "<s>"
    found = {"text": asked, "spaces": f"  {asked} \n", "BOS in front": f"{bos}{asked}"}
    found |= {"EOS at the end": f"{asked}</s>", "white space, BOS": f"\n {bos}{asked}"}
    return found | {"a token that TransformerLens makes up": f"{asked}<|endoftext|>"}


def _cell(model: Any, prompt: Any, place: tuple[str, str, str, str, str], wrong: Any) -> Cell:
    try:
        (found,) = encode(model, [prompt])
    except TlEmError as error:
        return Cell(*place, "refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Cell(*place, "wrong", f"{type(error).__name__}: {error}")
    try:
        reason = wrong(found)
    except Exception as error:
        reason = f"the reference refuses it, {type(error).__name__}: {error}"
    return Cell(*place, "wrong" if reason else "equal", reason)


# ---- the table -------------------------------------------------------------------------------------------------------
def counts(cells: Sequence[Cell], field: str) -> list[tuple[str, Counter[str]]]:
    found: dict[str, Counter[str]] = {}
    for cell in cells:
        found.setdefault(getattr(cell, field), Counter())[cell.outcome] += 1
    return list(found.items())


def table(cells: Sequence[Cell], field: str, title: str) -> str:
    lines = [f"| {title} | equal | refused | wrong |", "|---|---:|---:|---:|"]
    for name, found in counts(cells, field):
        lines.append(f"| {name} | {found['equal']} | {found['refused']} | {found['wrong']} |".replace("{", "\\{"))
    return "\n".join(lines)


def versions() -> str:
    names = ("transformer-lens", "transformers", "tokenizers")
    return ", ".join(f"{name} {version(name)}" for name in names)


def section(cells: Sequence[Cell]) -> str:
    """What was found with these versions, as Markdown."""
    whole = Counter(cell.outcome for cell in cells)
    plain = [cell for cell in cells if cell.template == "none"]
    chat = [cell for cell in cells if cell.template != "none"]
    refused = Counter(cell.reason.split(":")[0] for cell in cells if cell.outcome == "refused")
    surfaces = " and ".join(dict.fromkeys(cell.surface for cell in cells))
    said = ", ".join(f"{name} {n}" for name, n in refused.most_common())
    return "\n\n".join([
        f"## {versions()}",
        f"Surfaces: {surfaces}. {len(cells)} cells: {whole['equal']} equal, {whole['refused']} refused ({said}), "
        f"**{whole['wrong']} wrong**.",
        table(cells, "kind", "tokenizer"),
        table(plain, "chat", "text without a template"),
        table(chat, "template", "template"),
        table(chat, "chat", "chat"),
        table(cells, "script", "script"),
    ])  # fmt: skip


HEAD = """<!-- Written by benchmarks/tokenization.py; do not edit. -->
# Tokenizers and templates

Are the tokens that a model reads the tokenizer's own? Every kind of special tokens, every chat template and every
script, on models that `em.load_model` made. *Equal*: the ids are those of the tokenizer as its user has it, which
TransformerLens never saw, and the answer's span holds all of the answer. *Refused*: an error of `tl_em` says why.
*Wrong*: anything else. Refusals are not failures: a vocabulary without Chinese cannot read Chinese, a template without
a system message cannot show one.

    OMP_NUM_THREADS=1 python benchmarks/tokenization.py --write docs/results/tokenizers.md
"""


def write(path: Path, text: str) -> None:
    """Put a section into the page, in place of the one of the same versions."""
    before = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    _, *sections = before.split("\n## ")
    found = {each.split("\n", 1)[0]: each.strip() for each in sections}
    found[text.split("\n", 1)[0].removeprefix("## ")] = text.removeprefix("## ").strip()
    with replacing(path) as temporary:
        temporary.write_text("\n## ".join([HEAD, *(f"{each}\n" for each in found.values())]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--surface", choices=SURFACES, action="append", help="one of them only")
    parser.add_argument("--kinds", default="", help="only kinds whose name holds this")
    parser.add_argument("--templates", default="", help="only templates whose name holds this")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    given = parser.parse_args()
    kinds = [name for name in KINDS if given.kinds in name]
    templates = [name for name in TEMPLATES if given.templates in name]
    cells = list(sweep(kinds, given.surface or SURFACES, templates))
    text = section(cells)
    print(text)
    for cell in [cell for cell in cells if cell.outcome == "wrong"][:40]:
        print("WRONG", *cell, file=sys.stderr)
    if given.write is not None:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        write(given.write, text)
    return int(any(cell.outcome == "wrong" for cell in cells))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(main())
