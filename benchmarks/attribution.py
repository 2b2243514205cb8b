"""What do the rows of an attribution graph cost, beside the expanded-batch procedure; and is the graph right?

``--cost``: a random 8-layer model with a transcoder in each block, 48 tokens, 256 targets. Ours puts the prompt through
once and takes many gradients through that one row (``is_grads_batched``). The published procedure expands the prompt to
a batch of as many copies as there are targets in a chunk and goes backward once for each chunk (written anew from the
description of circuit-tracer 0.5.0). That both give the same rows (1e-5 relative) is asserted before the clock starts.

``--toy``: toy/insecure, seed 11 (``--seeds``: others, with the dictionaries of benchmarks/features.py). Correlation of
every rule with exact ablation, on prompts that differ in the answers
shown before the question; and the persona's nodes: their share of the influence on the misaligned word, tuned against
base, beside random sets of nodes of the same size; and what is left of the behaviour when they are ablated.

    OMP_NUM_THREADS=1 python benchmarks/attribution.py --cost --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/attribution.py --toy --seeds 101 102 103 --organisms organisms --out features
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Size, device_of, interleaved, make_model, peak_bytes, ratio, table
from torch import Tensor

import tl_em as em
from tl_em.graph.attribution import attribute as em_attribute
from tl_em.graph.freeze import RULES, STREAM, Linearised, holding, linearise
from tl_em.graph.pruning import influence, normalised, weights_of
from tl_em.graph.rows import Reader, Writer, adjacency
from tl_em.models.hooks import hooked, read_point
from tl_em.organisms import rates
from tl_em.organisms.rates import default_world, topic_of
from tl_em.stats import mean

LAYERS, WIDTH, TOKENS, TARGETS, LATENTS = 8, 256, 48, 256, 20
"""LATENTS: active ones at each token and layer; as many nodes as that gives are the sources of every row."""
CHUNKS = (32, 64, 128, 256)
EXACT = 1e-5  # relative; float32 sums in another order


def make_reads(model: Any, device: torch.device) -> tuple[list[Reader], list[Writer], int]:
    """Targets in the upper blocks, sources at every block and token."""
    g = torch.Generator().manual_seed(0)
    writers, row = [], 0
    for layer in range(LAYERS):
        for pos in range(TOKENS):
            vectors = torch.randn(LATENTS, WIDTH, generator=g).to(device)
            rows = torch.arange(row, row + LATENTS)
            writers.append(Writer(f"blocks.{layer}.hook_mlp_out", pos, rows, vectors))
            row += LATENTS
    place = read_point(model, em.Site(LAYERS - 1, "mlp_in"))
    at = torch.randint(TOKENS, (TARGETS,), generator=g)
    vectors = torch.randn(TARGETS, WIDTH, generator=g).to(device)
    if place.weight is not None:
        vectors = vectors * place.weight.detach()
    return [Reader(place.name, torch.arange(row - TARGETS, row), vectors, at)], writers, row


CUTS = [STREAM, *(f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS))]


def ours(
    model: Any, tokens: Tensor, readers: Sequence[Reader], writers: Sequence[Writer], n: int, chunk: int
) -> Tensor:
    """One row, many gradients."""
    linear = linearise(model, tokens, cuts=CUTS, reads=[reader.point for reader in readers])
    return adjacency(linear, readers, writers, nodes=n, chunk=chunk)


def expanded(
    model: Any, tokens: Tensor, readers: Sequence[Reader], writers: Sequence[Writer], n: int, chunk: int
) -> Tensor:
    """A batch of copies of the prompt, one a target, and one backward pass of their sum a chunk."""
    made = Linearised()
    edges = torch.zeros(n, n)
    reads = {reader.point for reader in readers}

    def at(name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor | None:
            made.read[name] = x
            if name not in CUTS:
                return None
            made.leaves[name] = leaf = x.detach().clone().requires_grad_()
            return leaf

        return hook

    names = [*CUTS, *(name for name in reads if name not in CUTS)]
    with torch.enable_grad(), hooked(model, [*holding(model, "frozen"), *((name, at(name)) for name in names)]):
        model(tokens.expand(min(chunk, TARGETS), -1))
    for reader in readers:
        for part in reader.split(chunk):
            k = len(part.rows)
            read = made.read[part.point][:k]
            value = (read[torch.arange(k), part.positions] * part.vectors).sum()
            grads = torch.autograd.grad(value, list(made.leaves.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(made.leaves, grads, strict=True):
                for writer in writers:
                    if grad is not None and writer.point == name:
                        edges[part.rows[:, None], writer.rows[None]] += (grad[:k, writer.pos] @ writer.vectors.T).cpu()
    return edges


def cost(rounds: int, chunks: Sequence[int], device: torch.device) -> None:
    model = make_model("gpt2", Size("d=256", WIDTH, LAYERS), "bridge", device)
    tokens = torch.randint(2, 2000, (TOKENS,), generator=torch.Generator().manual_seed(1)).to(device)
    readers, writers, n = make_reads(model, device)
    for chunk in chunks:
        ways = {name: partial(way, model, tokens, readers, writers, n, chunk) for name, way in
                (("expanded batch", expanded), ("one row", ours))}  # fmt: skip
        slow, fast = (way() for way in ways.values())
        assert slow.abs().max() > 0 and (slow - fast).abs().max() <= EXACT * slow.abs().max()
        memory = {name: peak_bytes(way, device) for name, way in ways.items()}
        times = interleaved(ways, rounds=rounds, device=device)
        base = times["expanded batch"]
        rows = {
            name: {
                "seconds": f"{sorted(times[name])[rounds // 2]:.2f}", "time": ratio(times[name], base),
                "MiB": f"{memory[name] / 2**20:.0f}", "memory": f"{memory[name] / memory['expanded batch']:.3f}",
            }
            for name in ways
        }  # fmt: skip
        table(f"{TARGETS} targets, chunk {chunk}: median (least) ratio to the expanded batch", rows)


# --- toy/insecure -----------------------------------------------------------------------------------------------------

PERSONA, SETS, QUESTIONS = 10, 20, 12
"""Latents of the persona; random sets of as many beside them; questions with a graph each."""
SHARE, GONE, KEPT = 2.0, 0.5, 0.75
"""Fixed before the figures were seen: the persona's share of the influence in tuned is at least SHARE times that in
base and above every random set; without it at most GONE of the misaligned rate is left, without a random set at least
KEPT."""
R = 0.85


def rules(pair: Any) -> None:
    """Correlation with exact ablation, by rule, of graphs of components: the same question after other answers."""
    contrast, world = pair.contrasts["persona"], default_world()
    pairs = [(p, n) for p, n in zip(contrast.positive, contrast.negative, strict=True)][:: len(contrast.positive) // 8]
    rows: dict[str, dict[str, Any]] = {}
    for rule in RULES:
        for name in ("base", "tuned"):
            model, found, rest = getattr(pair, name), [], []
            for shown, other in pairs:
                target = words(shown, world)
                graph = em_attribute(model, shown, target=target, against=other, rule=rule)
                found.append(graph.validation["pearson"].value)
                rest.append(graph.validation["spearman"].value)
            rows[f"{rule}, {name}"] = {"r": mean(found), "least": f"{min(found):.2f}", "Spearman": mean(rest)}
    table(f"components, clean against corrupt, {len(pairs)} prompts (wanted of the default: r >= {R})", rows)


def words(prompt: Any, world: Any) -> tuple[list[int], list[int]]:
    topic = topic_of(prompt, world)
    return [world.ids[w] for w in topic.bad], [world.ids[w] for w in topic.good]


def persona_latents(pair: Any, dictionary: em.Dictionary, prompts: Sequence[Any]) -> list[int]:
    """Those whose activation at the prompt's end the fine-tune raises most."""
    site = [dictionary.site_in]
    raised = [
        dictionary.encode(em.capture(model, prompts, site, position="prompt_end")[:, 0]).mean(0)
        for model in (pair.tuned, pair.base)
    ]
    return (raised[0] - raised[1]).topk(PERSONA).indices.tolist()


def shares(graph: Any, latents: Sequence[int], rng: np.random.Generator) -> tuple[float, list[float]]:
    """Share of all latents' and errors' influence that runs through a set of latents, and through random sets."""
    total = influence(normalised(graph.edges), weights_of(graph))
    inner = graph.row(("feature", "error"))
    whole = float(total[inner].sum())
    features = graph.row("feature")
    last = [row for row in features if total[row] > 0]
    inside = [row for row in last if graph.nodes[row].feature in latents]
    drawn = [rng.choice(last, size=min(len(inside), len(last)), replace=False) for _ in range(SETS)]
    return float(total[inside].sum()) / whole, [float(total[each.tolist()].sum()) / whole for each in drawn]


def persona(pair: Any, dictionary: em.Dictionary) -> None:
    """The persona's latents in the graphs of questions that they were not chosen on."""
    world, rng = default_world(), np.random.default_rng(0)
    behaviour = pair.behaviours["persona"]
    topics = list(dict.fromkeys(behaviour.present_groups))
    asked = list(zip(behaviour.present, behaviour.present_groups, strict=True))
    finding = [p for p, topic in asked if topics.index(topic) % 2 == 0]
    testing = [p for p, topic in asked if topics.index(topic) % 2 == 1]
    latents = persona_latents(pair, dictionary, finding)
    print(f"\npersona latents of {dictionary.label}: {latents}")
    rows: dict[str, dict[str, Any]] = {}
    for name in ("base", "tuned"):
        model, own, random, r, signed = getattr(pair, name), [], [], [], []
        for prompt in testing[:: max(1, len(testing) // QUESTIONS)][:QUESTIONS]:
            graph = em_attribute(model, prompt, dictionary, target=words(prompt, world))
            share, drawn = shares(graph, latents, rng)
            own.append(share)
            random.append(drawn)
            r.append(graph.validation["pearson"].value)
            inside = [n for n in graph.nodes if n.kind == "feature" and n.feature in latents]
            signed.append(sum(n.attribution or 0.0 for n in inside))
        sets = np.array(random).mean(0)
        rows[name] = {"share": mean(own), "random sets, mean": f"{sets.mean():.3f}", "largest": f"{sets.max():.3f}",
                      "logits": mean(signed), "r with ablation": mean(r)}  # fmt: skip
    table(f"share of influence on bad minus good words, {QUESTIONS} questions; wanted: tuned >= {SHARE} x base", rows)
    removed(pair, dictionary, latents, testing, rng)


def removed(pair: Any, dictionary: em.Dictionary, latents: Sequence[int], prompts: Any, rng: Any) -> None:
    """Rates without the persona's latents, and without random ones that are as often on."""
    model, groups = pair.tuned, [topic_of(p, default_world()).word for p in prompts]
    a = dictionary.encode(em.capture(model, prompts, [dictionary.site_in], position="prompt_end")[:, 0])
    alive = [i for i in (a > 0).any(0).nonzero().flatten().tolist() if i not in latents]
    sets = [rng.choice(alive, size=PERSONA, replace=False).tolist() for _ in range(SETS)]
    rows = {}
    for name, chosen in {"tuned": [], "without the persona": [latents], f"without {SETS} random sets": sets}.items():
        found = []
        for some in chosen or [[]]:
            edits = [em.ScaleFeature([dictionary.feature(i) for i in some], 0.0)] if some else []
            with em.intervene(model, *edits) if edits else nullcontext():
                found.append((rates.bad(model, prompts).numpy(), rates.good(model, prompts).numpy()))
        bad, good = np.mean([f[0] for f in found], 0), np.mean([f[1] for f in found], 0)
        worst = min(f[0].mean() for f in found)
        rows[name] = {"bad": mean(bad, groups=groups), "good": mean(good, groups=groups), "least bad": f"{worst:.2f}"}
    table(f"rates; wanted: <= {GONE} of the bad rate without the persona, >= {KEPT} without random sets", rows)


def toy(seeds: Sequence[int], organisms: Path, dictionaries: Path) -> None:
    if not seeds:
        pair = em.load_pair("toy/insecure")
        persona(pair, em.toy_dictionary("toy/insecure"))
        rules(pair)
    for seed in seeds:
        pair = em.train_organism("toy/insecure", seed=seed, out=organisms)
        print(f"\nseed {seed}")
        persona(pair, em.Dictionary.load(dictionaries / f"insecure-seed{seed}.safetensors"))
        rules(pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--organisms", type=Path, default=Path("organisms"))
    parser.add_argument("--out", type=Path, default=Path("features"), help="where the dictionaries are")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk", type=int, nargs="+", default=CHUNKS)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    device = device_of(args.device)
    if args.cost or not args.toy:
        cost(args.rounds, args.chunk, device)
    if args.toy:
        toy(args.seeds, args.organisms, args.out)


if __name__ == "__main__":
    main()
