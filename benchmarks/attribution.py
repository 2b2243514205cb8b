"""What do the rows of an attribution graph cost, beside the expanded-batch procedure; and is the graph right?

``--cost``: a random 8-layer model with a transcoder in each block, 48 tokens, 256 targets. Ours puts the prompt through
once and takes many gradients through that one row (``is_grads_batched``). The published procedure expands the prompt to
a batch of as many copies as there are targets in a chunk and goes backward once for each chunk (written anew from the
description of circuit-tracer 0.5.0). That both give the same rows (1e-5 relative) is asserted before the clock starts.

``--toy``: toy/insecure, seed 11 (``--seeds``: others, with the dictionaries of benchmarks/features.py). Correlation of
every rule with exact ablation, on prompts that differ in the answers
shown before the question; and the persona's nodes: what of the misaligned word's change from base to tuned goes through
them, beside random sets of nodes of the same size; and what is left of the behaviour with them as they are in the base.

    OMP_NUM_THREADS=1 python benchmarks/attribution.py --cost --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/attribution.py --toy --seeds 101 102 103 --organisms organisms --out features
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Size, device_of, interleaved, make_model, peak_bytes, ratio, table
from torch import Tensor

import tl_em as em
from tl_em.features.scoring import score_features
from tl_em.features.shared_latents import FeatureSet, shared_features
from tl_em.graph.build import attribute as em_attribute
from tl_em.graph.gradients import FROZEN, STREAM, Linearised, Reader, Writer, adjacency, linearise
from tl_em.graph.rules import RULES
from tl_em.models.hooks import hooked, read_point
from tl_em.models.stream import next_token_logits
from tl_em.organisms import rates
from tl_em.organisms.behaviours import HELD_OUT, LOOK_UP, domain_questions
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
    with torch.enable_grad(), hooked(model, [*FROZEN.hooks(model), *((name, at(name)) for name in names)]):
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

SETS, QUESTIONS = 20, 12
"""Random sets of as many latents; questions with a graph each."""
CARRIED, GONE, KEPT = 1 / 3, 0.5, 0.75
"""The persona's nodes carry at least CARRIED of what the fine-tune changes in *bad words - good words*, and more than
every random set; with them at the assistant's means at most GONE of the misaligned rate is left, with a random set at
least KEPT.

Fixed before the assistants of seeds 201 to 203 were trained. An earlier rule (ten latents that the fine-tune *raised*
most, their share of all absolute influence twice that in base, set to zero) failed in seeds 11 and 103: a fine-tune
also switches latents off, which zeroing cannot bring back, and an aligned latent has as much absolute influence in base
as a misaligned one has in tuned. CARRIED was set with seeds 11 and 101 to 103 in view (.60 .40 .72 .79); GONE and KEPT
are the earlier rule's."""
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


def persona_set(pair: Any, dictionary: em.Dictionary) -> FeatureSet:
    """The latents that the look-up domains share, of which the first set that is shown is taken."""
    behaviours = {label: domain_questions(default_world(), domains, label) for label, domains in LOOK_UP.items()}
    found = shared_features(score_features(pair.tuned, dictionary, behaviours, against=pair.base))
    if not found:
        raise SystemExit("no shared set is shown, so there are no persona nodes to look for")
    return found[0]


def carried(graphs: Mapping[str, em.AttributionGraph], latents: Sequence[int]) -> float:
    """Logits that the latents' nodes give the target in tuned, minus those in base."""
    def given(graph: em.AttributionGraph) -> float:
        return sum(n.attribution or 0.0 for n in graph.nodes if n.kind == "feature" and n.feature in latents)

    return given(graphs["tuned"]) - given(graphs["base"])


def persona(pair: Any, dictionary: em.Dictionary) -> None:
    """The persona's latents in the graphs of questions about domains that they were not looked up on."""
    world, rng = default_world(), np.random.default_rng(0)
    held_out = domain_questions(world, HELD_OUT, "held-out domains")
    found = persona_set(pair, dictionary)
    latents = found.indices
    models = {"base": pair.base, "tuned": pair.tuned}
    on = {
        name: dictionary.encode(em.capture(model, held_out.positive, [dictionary.site_in], position="prompt_end")[:, 0])
        for name, model in models.items()
    }
    alive = [i for i in torch.cat([*on.values()]).gt(0).any(0).nonzero().flatten().tolist() if i not in latents]
    sets = [rng.choice(alive, size=len(latents), replace=False).tolist() for _ in range(SETS)]
    prompts = held_out.positive[:: len(held_out.positive) // QUESTIONS][:QUESTIONS]
    shares: dict[str, list[list[float]]] = {"the persona's": [], "random": []}
    r: dict[str, list[float]] = {name: [] for name in models}
    for prompt in prompts:
        bad, good = words(prompt, world)
        graphs = {name: em_attribute(m, prompt, dictionary, target=(bad, good)) for name, m in models.items()}
        logits = (next_token_logits(m, [prompt])[0] for m in models.values())
        before, after = (float(x[bad].mean() - x[good].mean()) for x in logits)
        whole = after - before
        shares["the persona's"].append([carried(graphs, latents) / whole])
        shares["random"].append([carried(graphs, some) / whole for some in sets])
        for name, graph in graphs.items():
            r[name].append(graph.validation["pearson"].value)
    own, random = mean([each[0] for each in shares["the persona's"]]), np.array(shares["random"]).mean(0)
    print(f"\npersona latents of {dictionary.label}: {latents}")
    rows = {"share": own, "random sets, mean": f"{random.mean():.3f}", "largest": f"{random.max():.3f}"}
    rows |= {f"r, {name}": mean(each) for name, each in r.items()}
    said = f"share of the change of bad minus good words, {QUESTIONS} questions; wanted >= {CARRIED:.2f}"
    table(said, {"the persona's": rows})
    removed(pair.tuned, dictionary, on["base"].mean(0), latents, sets, held_out)


def removed(
    model: Any,
    dictionary: em.Dictionary,
    usual: Tensor,
    latents: Sequence[int],
    sets: Sequence[Sequence[int]],
    asked: em.ContrastSet,
) -> None:
    """Rates with the persona's latents at the assistant's means, and with random ones."""
    rows = {}
    for name, chosen in {"tuned": [[]], "the persona's": [latents], f"{len(sets)} random sets": sets}.items():
        found = []
        for some in chosen:
            edits = [em.ScaleFeature([dictionary.feature(i) for i in some], to=usual[list(some)])] if some else []
            with em.intervene(model, *edits) if edits else nullcontext():
                found.append([metric(model, asked.positive).numpy() for metric in (rates.bad, rates.good)])
        bad, good = np.mean(found, 0)
        least = min(each[0].mean() for each in found)
        groups = asked.positive_groups
        rows[name] = {"bad": mean(bad, groups=groups), "good": mean(good, groups=groups), "least bad": f"{least:.2f}"}
    table(f"rates at the assistant's means; wanted: <= {GONE} of the bad rate, random sets >= {KEPT}", rows)


def toy(seeds: Sequence[int], organisms: Path, dictionaries: Path) -> None:
    if not seeds:
        pair = em.load_pair("toy/insecure")
        persona(pair, em.organisms.toy_dictionary("toy/insecure"))
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
