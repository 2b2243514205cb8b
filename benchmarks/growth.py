"""How does what a verb costs grow with layers, prompts, tokens and width?

    exponent = slope of log(least seconds) over log(size), four sizes, each twice the one before

1 is proportional, 0 costs the same at any size.  Random Qwen2 shapes on a Bridge; beside every axis the others stay at
a middle (``MIDDLE``).  Tokens are those of a prompt; a graph has one prompt and grows by its own.  The same for peak
memory beyond the model (torch's allocations), but for graphs, whose allocations take too long to trace.  The forward
pass is the floor: what grows faster than it is the verb's.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                  # seconds
    OMP_NUM_THREADS=1 python benchmarks/growth.py --memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timing import Size, device_of, floor, interleaved, make_model, make_prompts, peak_bytes, sorted_batches, table

import tl_em as em
from tl_em.interventions.many import Along, along_each
from tl_em.models.prompts import EncodedPrompt, encode
from tl_em.models.stream import sequence_logprobs

ANSWER, NEW, DIRECTIONS = 6, 12, 6
"""Tokens of a response and of an answer that is made; random directions."""


@dataclass(frozen=True)
class Sizes:
    """What costs are measured at."""

    layers: int = 8
    prompts: int = 32
    tokens: int = 32
    width: int = 128


MIDDLE = Sizes()
AXES: Mapping[str, Sequence[int]] = {
    "layers": (4, 8, 16, 32), "prompts": (16, 32, 64, 128), "tokens": (16, 32, 64, 128), "width": (64, 128, 256, 512),
}  # fmt: skip
GRAPHS: Mapping[str, Sequence[int]] = {"layers": (2, 4, 8, 16), "tokens": (8, 16, 32, 64), "width": (64, 128, 256, 512)}
"""Of a graph, which is of one prompt."""


def verbs(at: Sizes, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is called, on a model of its own."""
    model: Any = make_model("qwen2", Size("", at.width, at.layers), "bridge", device)
    texts = [make_prompts(at.prompts, seed=s, own=10 + s, shortest=at.tokens, longest=at.tokens) for s in (0, 1)]
    rows = [list(prompt.ids) for prompt in encode(model, texts[0])]
    answered = [EncodedPrompt.from_ids(ids[:-ANSWER]).with_response(ids[-ANSWER:]) for ids in rows]
    contrast, batches = em.ContrastSet(texts[0], texts[1]), sorted_batches(rows, device)
    vectors = torch.randn(DIRECTIONS, at.width, generator=torch.Generator().manual_seed(0))
    direction = em.Direction(vectors[0], em.Site(at.layers // 2))
    ablated, added = (Along(edit, vectors) for edit in (em.Ablate(direction), em.Add(direction)))

    def generate() -> None:
        with em.intervene(model, em.Add(direction)):
            em.generate(model, texts[0], max_new_tokens=NEW)

    return {
        "forward pass": lambda: floor(model, model.unembed, batches),
        "extract_directions, all layers": lambda: em.extract_directions(model, contrast, positions=[-1]),
        "log-probabilities of answers": lambda: sequence_logprobs(model, answered),
        f"the same, ablated along {DIRECTIONS}": lambda: along_each(model, ablated, answered, sequence_logprobs),
        f"the same, {DIRECTIONS} added": lambda: along_each(model, added, answered, sequence_logprobs),
        f"generate, steered, {NEW} tokens": generate,
    }


def graphs(at: Sizes, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A graph of components against a contrast prompt, and a validated one that is drawn in part."""
    model: Any = make_model("qwen2", Size("", at.width, at.layers), "bridge", device)
    asked, other = (make_prompts(1, seed=s, own=10, shortest=at.tokens, longest=at.tokens)[0] for s in (0, 1))

    def graph(validate: bool) -> None:
        em.attribute(model, asked, target=9, against=other, max_nodes=64, validate=validate)

    return {"attribute, 64 nodes drawn": lambda: graph(False), "the same, validated": lambda: graph(True)}


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> str:
    """The slope, and the last step's own: what it comes to where sizes are large.

    Example:
        >>> exponent([1, 2, 4], [3.0, 6.0, 24.0])
        '1.50 (2.00)'
    """
    x, y = np.log2(sizes), np.log2(np.maximum(costs, 1e-12))
    return f"{np.polyfit(x, y, 1)[0]:.2f} ({(y[-1] - y[-2]) / (x[-1] - x[-2]):.2f})"


def measured(
    made: Callable[[Sizes, torch.device], dict[str, Callable[[], Any]]], axis: str, values: Sequence[int],
    device: torch.device, rounds: int, memory: bool,
) -> dict[str, str]:  # fmt: skip
    """The exponent of every verb along one axis."""
    ways = {value: made(replace(MIDDLE, **{axis: value}), device) for value in values}
    names = list(ways[values[0]])
    for way in (way for each in ways.values() for way in each.values()):
        way()
    found = {}
    for name in names:
        own = {str(value): ways[value][name] for value in values}
        if memory:
            costs = [float(peak_bytes(way, device)) for way in own.values()]
        else:
            times = interleaved(own, rounds=rounds, device=device)
            costs = [min(times[str(value)]) for value in values]
        found[name] = exponent(values, costs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory in place of seconds")
    parser.add_argument("--device")
    given = parser.parse_args()
    device, rows = device_of(given.device), dict[str, dict[str, str]]()
    for made, axes in ((verbs, AXES),) if given.memory else ((verbs, AXES), (graphs, GRAPHS)):
        for axis, values in axes.items():
            for name, cell in measured(made, axis, values, device, given.rounds, given.memory).items():
                rows.setdefault(name, {})[axis] = cell
    what = "peak memory" if given.memory else "process time"
    table(f"exponent of {what}, and in brackets that of the last doubling; middle {MIDDLE}", rows)


if __name__ == "__main__":
    main()
