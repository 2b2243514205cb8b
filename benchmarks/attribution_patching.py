"""Scores of all nodes on a real model: ours beside TransformerLens's own attribution patching, which 4.3 has.

    OMP_NUM_THREADS=1 python benchmarks/attribution_patching.py DIRECTORY     # with transformer-lens 4.3

Both compare a chat with its contrast prompt (``graph_prompts.json``), at every head, MLP and token.  Theirs is one
gradient at the contrast prompt, and estimates what patching a node towards the prompt gives; ours replaces a node of
the prompt by that of the contrast prompt, by five gradients on the way, or with ``rule="plain"`` by one, which from the
contrast prompt's side is theirs: that both give the same scores is asserted before the clock starts.  Each is held
against the exact effect of what it estimates, of its own 64 largest scores and 64 of a random sample of the others,
drawn alike.  Time: process time of one thread, in turn, over a forward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from graph_size import PROMPTS, chat
from timing import Way, device_of, measured, table
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


OURS, ONE, THEIRS = "em.graph.node_scores", 'em.graph.node_scores(rule="plain")', "attribution_patch"
ALIKE = 0.999
"""r between the scores of the two that take the same gradient."""


def ways_of(model: Any, prompt: dict[str, Any]) -> dict[str, Way]:
    """Three ways to score every node of a prompt, and a forward pass."""
    clean, corrupt = chat(model, prompt, "prompt"), chat(model, prompt, "against")
    yes, no = target_of(model, prompt)
    first, second = (torch.tensor([each.ids]) for each in (clean, corrupt))

    @torch.no_grad()
    def forward() -> Any:
        return model(first)

    def ours(rule: str | None) -> Any:
        begin, end = (clean, corrupt) if rule is None else (corrupt, clean)
        return em.graph.node_scores(model, begin, target=tuple(prompt["target"]), rule=rule, against=end)

    def theirs() -> Any:
        return attribution_patch(model, first, second, lambda logits: logits[0, -1, yes] - logits[0, -1, no])

    return {"forward": forward, OURS: lambda: ours(None), ONE: lambda: ours("plain"), THEIRS: theirs}


def agreements(model: Any, prompt: dict[str, Any], ways: dict[str, Way]) -> dict[str, float]:
    """r with the exact effects, and between the two that take one gradient."""
    clean, corrupt = chat(model, prompt, "prompt"), chat(model, prompt, "against")
    target, found = tuple(prompt["target"]), {}
    for name, begin, end, sign in ((OURS, clean, corrupt, 1.0), (THEIRS, corrupt, clean, -1.0)):
        plan = component_plan(model, begin, target, against=end)
        scored = scored_nodes(model, plan)
        if name == THEIRS:
            places = [place(node) for node in scored.nodes]
            named = ways[THEIRS]().node_scores.items()
            known = {(KINDS[n.kind], n.layer, n.position, n.head): value for n, value in named if n.kind in KINDS}
            assert sum(at in known for at in places) > 1000, "they name other nodes"
            nodes = tuple(replace(n, attribution=known.get(at)) for n, at in zip(scored.nodes, places, strict=True))
            scored = replace(scored, nodes=nodes)
            both = [(known[place(n)], n.attribution) for n in ways[ONE]() if place(n) in known]
            found["same"] = -float(np.corrcoef(np.array(both).T)[0, 1])
            assert found["same"] >= ALIKE, found
        found[name] = exact(model, plan, scored, sign)
    return found


def place(node: Any) -> tuple[Any, ...]:
    """A node as theirs are named."""
    return node.kind, node.layer, node.pos, node.feature if node.kind == "head" else None


def scores(directory: str, prompts: Sequence[int], rounds: int) -> dict[str, dict[str, str]]:
    """The table: time over a forward pass and memory, of the first prompt, and r over the prompts."""
    model = em.load_model(directory)
    ways = [ways_of(model, PROMPTS[at]) for at in prompts]
    found = [agreements(model, PROMPTS[at], each) for at, each in zip(prompts, ways, strict=True)]
    rows = measured(ways[0], "forward", rounds, device_of("cpu"))
    for name in (OURS, THEIRS):
        each = [one[name] for one in found]
        rows[name]["said"] = f"r with the exact effect {mean(each, bounds=(-1, 1))}, least {min(each):.2f}"
    rows[ONE]["said"] = f"r with TransformerLens's at least {min(one['same'] for one in found):.5f}"
    table("scores of all nodes", rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 2, 8, 12], help="numbers in graph_prompts.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scores(options.directory, options.prompts, options.rounds)


if __name__ == "__main__":
    main()
