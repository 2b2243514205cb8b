"""Graph files and paths against their budgets: reading, writing, the strongest paths, the estimate of a long prompt.

    python benchmarks/exchange.py --links 1200000 --nodes 3061 --rounds 5

prints, in process time on one thread, microseconds a link (budget 2): ``json.loads`` of the same bytes is the floor and
a loop over its links into a dense matrix the peer of reading; ``json.dumps`` of the same values the peer of writing.
Each round runs every way once, the order reversed in odd rounds; medians and the least of the rounds. Then seconds for
``paths(5)`` on a dense graph of that many nodes (budget 5), and after how many seconds a graph of components on 193
tokens says what it will cost (or that it is too large). The values are random; nothing depends on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tl_em.errors import GraphTooLargeError
from tl_em.graph.build import attribute
from tl_em.graph.exchange import save_graph
from tl_em.graph.exchange_format import cantor
from tl_em.graph.exchange_reading import load_graph
from tl_em.graph.graph import AttributionGraph, Node

BUDGET, PATHS, TOKENS = 2.0, 5.0, 193


def file_of(n_nodes: int, n_links: int) -> dict[str, Any]:
    """A file as circuit-tracer writes it: latents, then ten targets, and links in the order of their targets."""
    g = torch.Generator().manual_seed(0)
    latents = n_nodes - 10
    layers = (torch.arange(latents) * 26 // latents).tolist()
    numbers = torch.randint(16_384, (latents,), generator=g).tolist()
    names = [f"{layer}_{number}_{at % 20}" for at, (layer, number) in enumerate(zip(layers, numbers, strict=True))]
    names = [name if names.index(name) == at else f"{layers[at]}_{20_000 + at}_{at % 20}" for at, name in
             enumerate(names)]  # fmt: skip
    nodes = [
        {"node_id": name, "feature": cantor(layer, number), "layer": str(layer), "ctx_idx": at % 20,
         "feature_type": "cross layer transcoder", "token_prob": 0.0, "is_target_logit": False, "run_idx": 0,
         "reverse_ctx_idx": 0, "jsNodeId": name, "clerp": "", "influence": 0.5, "activation": 1.5}
        for at, (name, layer, number) in enumerate(zip(names, layers, numbers, strict=True))
    ]  # fmt: skip
    nodes += [
        {"node_id": f"27_{at}_19", "feature": at, "layer": "27", "ctx_idx": 19, "feature_type": "logit",
         "token_prob": 0.05, "is_target_logit": not at, "jsNodeId": f"L_{at}-19", "clerp": f'Output "{at}" (p=0.050)',
         "influence": None, "activation": None} for at in range(10)
    ]  # fmt: skip
    depth = torch.tensor([*layers, *[27] * 10])
    possible = (depth[:, None] > depth[None]).nonzero()
    chosen = possible[torch.randperm(len(possible), generator=g)[:n_links].sort().values]
    weights = torch.randn(len(chosen), generator=g).tolist()
    ids = [node["node_id"] for node in nodes]
    links = [{"source": ids[s], "target": ids[t], "weight": w} for (t, s), w in
             zip(chosen.tolist(), weights, strict=True)]  # fmt: skip
    about = {"slug": "x", "scan": "gemma-2-2b", "prompt": "a" * 20, "prompt_tokens": ["a"] * 20, "schema_version": 1}
    return {"metadata": about, "qParams": {}, "nodes": nodes, "links": links}


def looped(content: bytes) -> torch.Tensor:
    """What a reader does who takes link by link: the peer."""
    plain = json.loads(content)
    row = {node["node_id"]: at for at, node in enumerate(plain["nodes"])}
    edges = torch.zeros(len(row), len(row), dtype=torch.float64)
    for link in plain["links"]:
        edges[row[link["target"]], row[link["source"]]] = link["weight"]
    return edges


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Process seconds of every way in every round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(rounds):
        for name in list(ways)[:: -1 if at % 2 else 1]:
            started = time.process_time()
            ways[name]()
            found[name].append(time.process_time() - started)
    return found


def told(tokens: int) -> str:
    """After how long a graph of components of a random model says what it will cost, or that it is too large."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tl_em.graph import components
    from tl_em.models.loading import load_model

    size: dict[str, Any] = {"n_embd": 96, "n_layer": 12, "n_head": 12, "n_positions": 256, "vocab_size": 500}
    hf = GPT2LMHeadModel(GPT2Config(**size, architectures=["GPT2LMHeadModel"], bos_token_id=0, eos_token_id=0))
    model = load_model(hf.eval(), surface="bridge", in_place=True)
    ids = torch.randint(500, (tokens,), generator=torch.Generator().manual_seed(0))
    started, said = time.perf_counter(), []

    class _Told(Exception):
        pass

    def timed(*given: Any, known: Callable[..., float] = components.timed) -> float:
        said.append(f"{known(*given):.0f} s expected, told after {time.perf_counter() - started:.1f} s")
        raise _Told

    components.timed, before = timed, components.timed
    try:
        attribute(model, ids, target=9, validate=False)
    except _Told:
        pass
    except GraphTooLargeError as error:
        said.append(f"refused after {time.perf_counter() - started:.1f} s: {error}")
    finally:
        components.timed = before
    return said[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, default=1_200_000)
    parser.add_argument("--nodes", type=int, default=3061)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="the loop over links as well (20 s a round)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.json"
        plain = file_of(options.nodes, options.links)
        path.write_text(json.dumps(plain), encoding="utf-8")
        content, graph = path.read_bytes(), load_graph(path)
        own = AttributionGraph(graph.nodes, graph.edges, graph.tokens)
        ways: dict[str, Callable[[], Any]] = {
            "json.loads (floor)": lambda: json.loads(content), "load_graph": lambda: load_graph(path),
            "json.dumps (peer)": lambda: json.dumps(plain), "save_json, read": lambda: save_graph(graph, path),
            "save_json, made": lambda: save_graph(own, Path(folder) / "own.json"),
        }  # fmt: skip
        ways |= {"a loop over links (peer)": lambda: looped(content)} if options.peer else {}
        for name, seconds in interleaved(ways, options.rounds).items():
            micro = [1e6 * each / len(plain["links"]) for each in seconds]
            print(f"{name:<26} {statistics.median(micro):6.2f} us a link, least {min(micro):.2f}  (budget {BUDGET})")
    n = options.nodes
    edges = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).tril(-1)
    edges[:20] = 0
    nodes = [Node("token" if row < 20 else "feature", row, 0, row) for row in range(n - 1)]
    dense = AttributionGraph((*nodes, Node("logit", n, 0, 1)), edges, ("a",))
    seconds = interleaved({"paths": lambda: dense.paths(5)}, options.rounds)["paths"]
    print(f"paths(5), {n} dense nodes   {statistics.median(seconds):6.2f} s  (budget {PATHS})")
    print(f"components, {TOKENS} tokens    {told(TOKENS)}")


if __name__ == "__main__":
    main()
