"""What heads and MLPs are compared with, and by which rule: how far graphs of three real models agree with ablation.

    OMP_NUM_THREADS=1 python benchmarks/graph_references.py run OUT.jsonl --set stories260k --model DIR [--prompts 4]
        [--references contrast turns ...] [--rules ig relp ...]   # a line a prompt, reference and rule; may be resumed
    python benchmarks/graph_references.py table OUT.jsonl --write docs/results/graph-size.md

Sets: ``smollm2`` (``graph_prompts.json``, chats of SmolLM2-135M-Instruct), ``gemma3`` and ``stories260k``
(``graph_texts.json``, texts for Gemma 3 270M and for the 260k stories model): a prompt, a contrast prompt and a target
each, chosen by how much the contrast moves the target before any graph was drawn. ``DIR`` is a Hugging Face directory,
for instance what ``tl-em models import`` makes of a GGUF file.

r is that of ``em.attribute``: attribution and exact effect of the 64 nodes of the largest attribution and of a sample
of 64 others. Some prompts were looked at when the default was chosen (*seen*: of ``smollm2`` those of ``SEEN``); the
others were not (*fresh*).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from graph_size import FIRST, PROMPTS

import tl_em as em
from tl_em.graph.build import encoded_prompt
from tl_em.graph.components import component_plan
from tl_em.graph.leaders import scored_nodes
from tl_em.graph.references import OTHER_WORDS, in_turns
from tl_em.graph.rules import RULES
from tl_em.graph.rules.ig import IntegratedGradients
from tl_em.graph.validation import AGREES, ablated, agreement, chosen, starts_late
from tl_em.metrics import token_ids
from tl_em.models.prompts import EncodedPrompt
from tl_em.stats import mean

TEXTS = json.loads((Path(__file__).parent / "graph_texts.json").read_text(encoding="utf-8"))
SETS: Mapping[str, list[dict[str, Any]]] = {
    "smollm2": [PROMPTS[at] for at in FIRST[:12]],
    "gemma3": TEXTS["gemma3"],
    "stories260k": TEXTS["stories260k"],
}
SEEN = (0, 2, 4, 8)
NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M", "stories260k": "stories260K"}
REFERENCES = {
    "contrast": "the contrast prompt",
    "turns": "other words, every third in turn (the default)",
    "at once": "other words, all at once",
    "mean of prompts": "the mean of three prompts of other words, place by place",
    "mean": "the mean over the prompt's tokens, without sinks",
    "zero": "zero",
}
STEPS = {f"ig, {count} steps": IntegratedGradients(count) for count in (1, 3, 10)}
KINDS: Mapping[str, Any] = {**RULES, **STEPS}
OPEN, CLOSE = "<!-- references -->", "<!-- end of references -->"


def encoded(model: Any, prompt: Mapping[str, Any], which: str) -> EncodedPrompt:
    """A text, or a chat with its answer begun."""
    found = encoded_prompt(model, prompt[which])
    if "begun" not in prompt:
        return found
    return found.with_response(model.tokenizer(prompt["begun"], add_special_tokens=False)["input_ids"])


def replaced(model: Any, own: EncodedPrompt, skip: int) -> EncodedPrompt:
    """The prompt with other words in the question's places, all at once."""
    start, end = own.instruction
    count, words = max(min(end, len(own) - 1) - start, 0), token_ids(model, OTHER_WORDS)
    some = (words * (1 + (skip + 1) * count // len(words)))[skip * count : (skip + 1) * count]
    return EncodedPrompt.from_ids(in_turns(own.ids, some, start, turns=1)[0])


def against(model: Any, prompt: Mapping[str, Any], own: EncodedPrompt, reference: str) -> Any:
    """What ``em.attribute`` is given."""
    made: Mapping[str, Callable[[], Any]] = {
        "contrast": lambda: encoded(model, prompt, "against"),
        "turns": lambda: None,
        "at once": lambda: replaced(model, own, 0),
        "mean of prompts": lambda: tuple(replaced(model, own, each) for each in range(3)),
        "mean": lambda: "mean",
        "zero": lambda: "zero",
    }
    return made[reference]()


def measured(model: Any, prompt: Mapping[str, Any], reference: str, rules: list[str]) -> dict[str, dict[str, Any]]:
    """By rule: r with exact ablation, which is made once for all rules."""
    own, effects, found = encoded(model, prompt, "prompt"), {}, {}
    given = against(model, prompt, own, reference)
    for name in rules:
        start = time.process_time()
        plan = component_plan(model, own, tuple(prompt["target"]), rule=KINDS[name], against=given)
        scored = scored_nodes(model, plan)
        spent = time.process_time() - start
        top, sample = chosen(scored, seed=0)
        rows = [*top, *sample]
        ids = [scored.nodes[row].id for row in rows]
        more = [row for row, each in zip(rows, ids, strict=True) if each not in effects]
        exact = ablated(model, plan, more, late=starts_late(model, plan)).tolist()
        effects |= {scored.nodes[row].id: effect for row, effect in zip(more, exact, strict=True)}
        seen = agreement(scored, {row: effects[each] for row, each in zip(rows, ids, strict=True)}, sample, seed=0)
        figures = {key: seen[key].value for key in ("pearson", "spearman", "pearson_sample") if seen.get(key)}
        found[name] = figures | {"tokens": len(own), "scores": spent, "cpu": time.process_time() - start}
    return found


def run(out: Path, which: str, source: str, prompts: int, references: list[str], rules: list[str]) -> None:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(row["set"], row["at"], row["reference"], row["rule"]) for row in done}
    model = em.load_model(source)
    for at, prompt in list(enumerate(SETS[which]))[:prompts]:
        for reference in references:
            left = [rule for rule in rules if (which, at, reference, rule) not in known]
            for rule, figures in (measured(model, prompt, reference, left) if left else {}).items():
                row = {"set": which, "at": at, "reference": reference, "rule": rule, **figures}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(which, at, prompt["name"], reference, rule, f"r {figures.get('pearson', np.nan):.2f}", flush=True)


# --- The page ---------------------------------------------------------------------------------------------------------


def page(rows: list[dict[str, Any]]) -> str:
    """The tables of what was run."""
    return "\n\n".join([reference_table(rows), gain_table(rows), rule_table(rows), each_table(rows)])


def seen(which: str, at: int) -> bool:
    """Whether a prompt was looked at when the default was chosen."""
    return SETS[which][at].get("seen", at in SEEN)


def rs(rows: list[dict[str, Any]], which: str, reference: str, rule: str, fresh: bool = False) -> list[float]:
    """r of each prompt that was run; or of those alone that the default was not chosen on."""
    some = [row for row in rows if (row["set"], row["reference"], row["rule"]) == (which, reference, rule)]
    some.sort(key=lambda row: row["at"])
    return [row.get("pearson", np.nan) for row in some if not (fresh and seen(which, row["at"]))]


def reference_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| compared with | model | prompts | r with ablation | least | below .7 | of fresh prompts, least (how many) |",
        "|---|---|---|---|---|---|---|",
    ]
    for reference, said in REFERENCES.items():
        for which, name in NAMES.items():
            if r := rs(rows, which, reference, "ig"):
                fresh = rs(rows, which, reference, "ig", fresh=True)
                said_of = f"{np.mean(fresh):.2f}, {min(fresh):.2f} ({len(fresh)})" if fresh else ""
                below = sum(x < AGREES for x in r)
                lines.append(f"| {said} | {name} | {len(r)} | {mean(r)!r} | {min(r):.2f} | {below} | {said_of} |")
    return "\n".join(lines)


def gain_table(rows: list[dict[str, Any]]) -> str:
    """What the default gains over the same words all at once, and a contrast prompt over the default."""
    lines = ["| r, prompt by prompt | model | difference | larger in |", "|---|---|---|---|"]
    for first, other, said in (("turns", "at once", "every third word in turn, less all at once"),
                               ("contrast", "turns", "the contrast prompt, less the default")):  # fmt: skip
        for which, name in NAMES.items():
            a, b = (rs(rows, which, each, "ig") for each in (first, other))
            if a and len(a) == len(b):
                by = np.subtract(a, b)
                lines.append(f"| {said} | {name} | {mean(by.tolist())!r} | {int((by > 0).sum())} of {len(by)} |")
    return "\n".join(lines)


def rule_table(rows: list[dict[str, Any]]) -> str:
    """Every rule on the prompts on which all rules of a reference were run."""
    rules = ["ig", *STEPS, "relp", "frozen", "plain"]
    lines = ["| r by rule | model | prompts | " + " | ".join("ig, 5 steps" if each == "ig" else each for each in rules)
             + " |", "|---" * (3 + len(rules)) + "|"]  # fmt: skip
    for reference, said in REFERENCES.items():
        for which, name in NAMES.items():
            found = {rule: {row["at"]: row.get("pearson", np.nan) for row in rows
                            if (row["set"], row["reference"], row["rule"]) == (which, reference, rule)}
                     for rule in rules}  # fmt: skip
            found = {rule: some for rule, some in found.items() if some}
            common = sorted(set.intersection(*(set(some) for some in found.values()))) if len(found) > 1 else []
            if common:
                r = [[found[rule][at] for at in common] if rule in found else [] for rule in rules]
                cells = [f"{np.mean(each):.2f}" if each else "" for each in r]
                lines.append(f"| {said} | {name} | {len(common)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def each_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | prompt | " + " | ".join(REFERENCES) + " |", "|---" * (2 + len(REFERENCES)) + "|"]
    for which, name in NAMES.items():
        for at, prompt in enumerate(SETS[which]):
            r = {row["reference"]: row.get("pearson", np.nan) for row in rows
                 if (row["set"], row["at"], row["rule"]) == (which, at, "ig")}  # fmt: skip
            cells = [f"{r[each]:.2f}" if each in r else "" for each in REFERENCES]
            lines.append(f"| {name} | {prompt['name']}{' (seen)' * seen(which, at)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=list(SETS), default="stories260k")
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--references", nargs="+", choices=list(REFERENCES), default=list(REFERENCES))
    parser.add_argument("--rules", nargs="+", choices=list(KINDS), default=["ig"])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if args.what == "run":
        run(args.out, args.set, args.model, args.prompts, args.references, args.rules)
        return
    text = page([json.loads(line) for line in args.out.read_text().splitlines()])
    if args.write is None:
        print(text)
        return
    before, rest = args.write.read_text(encoding="utf-8").split(OPEN)
    after = rest.split(CLOSE)[1]
    args.write.write_text(f"{before}{OPEN}\n\n{text}\n\n{CLOSE}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
