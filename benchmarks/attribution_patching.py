"""Scores of all nodes on a real model: ours beside TransformerLens's own attribution patching, which 4.3 has.

    python benchmarks/attribution_patching.py DIRECTORY          # with transformer-lens 4.3; SmolLM2-135M-Instruct

Both compare a chat with its contrast prompt (``graph_prompts.json``), at every head, MLP and token.  Theirs is one
gradient at the contrast prompt, and estimates what patching a node towards the prompt gives; ours replaces a node of
the prompt by that of the contrast prompt.  Each is held against the exact effect of what it estimates, of its own 64
largest scores and 64 of a random sample of the others, drawn alike.  Time: process time of one thread, in turn.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from graph_size import PROMPTS, chat
from timing import table
from transformer_lens.tools.analysis.attribution_patching import attribution_patch  # pyright: ignore[reportMissingImports]

import tl_em as em
from tl_em.graph.components import component_plan
from tl_em.graph.leaders import scored_nodes
from tl_em.graph.validation import ablated, agreement, chosen, starts_late
from tl_em.stats import mean

KINDS = {"attn_head_out": "head", "mlp_out": "mlp"}


def target_of(model: Any, prompt: dict[str, Any]) -> tuple[int, int]:
    """The two words whose logits are compared."""
    first, second = (model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in prompt["target"])
    return first, second


def exact(model: Any, plan: Any, scored: Any, sign: float) -> Any:
    """Agreement of the scores of a graph with the exact effects; ``sign`` makes them point alike."""
    top, sample = chosen(scored, seed=0)
    rows = [*top, *sample]
    effects = ablated(model, plan, rows, late=starts_late(model, plan)) * sign
    return agreement(scored, dict(zip(rows, effects.tolist(), strict=True)), sample, seed=0)["pearson"].value


def measured(model: Any, prompt: dict[str, Any]) -> dict[str, float]:
    """r and CPU-seconds of either, on one prompt."""
    clean, corrupt = chat(model, prompt, "prompt"), chat(model, prompt, "against")
    yes, no = target_of(model, prompt)
    start = time.process_time()
    plan = component_plan(model, clean, tuple(prompt["target"]), against=corrupt)
    ours = scored_nodes(model, plan)
    took = time.process_time() - start
    first, second = (torch.tensor([each.ids]) for each in (clean, corrupt))
    start = time.process_time()
    found = attribution_patch(model, first, second, lambda logits: logits[0, -1, yes] - logits[0, -1, no])
    theirs_took = time.process_time() - start
    back = component_plan(model, corrupt, tuple(prompt["target"]), against=clean)
    other = scored_nodes(model, back)
    known = {(KINDS[n.kind], n.layer, n.position, n.head): value for n, value in found.node_scores.items()
             if n.kind in KINDS}  # fmt: skip
    places = [(n.kind, n.layer, n.pos, n.feature if n.kind == "head" else None) for n in other.nodes]
    assert sum(place in known for place in places) > 3000, "they name other nodes"
    nodes = tuple(replace(n, attribution=known.get(at)) for n, at in zip(other.nodes, places, strict=True))
    return {
        "r, ours": exact(model, plan, ours, 1.0), "r, theirs": exact(model, back, replace(other, nodes=nodes), -1.0),
        "s, ours": took, "s, theirs": theirs_took,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 2, 8, 12], help="numbers in graph_prompts.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = em.load_model(options.directory)
    rows = {}
    for at in options.prompts:
        rows[PROMPTS[at]["name"]] = found = measured(model, PROMPTS[at])
        print(PROMPTS[at]["name"], found, flush=True)
    table("scores of all nodes", {n: {k: f"{v:.2f}" for k, v in row.items()} for n, row in rows.items()})
    for name in ("r, ours", "r, theirs"):
        print(name, mean([row[name] for row in rows.values()]))
    print("seconds, ours over theirs", np.median([row["s, ours"] / row["s, theirs"] for row in rows.values()]))


if __name__ == "__main__":
    main()
