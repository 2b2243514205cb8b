"""What does choosing a direction cost?  ``select_direction`` against the published procedure, at equal picks.

The reference is the procedure of Arditi et al. (arXiv:2406.11717), written anew: for each candidate three forwards of
all prompts (ablated on positives, added on negatives, ablated on negatives), an edit at every block's input, attention
output and MLP output, logits of all positions, scores in float64.  Bounds are set such that the shares of candidates
that survive are those of the published runs of gemma-2b, llama-2-7b and llama-3-8b, on average (25 % by induce, 11 % by
KL too).

Counters come first, because they do not vary with the machine; then process time, one thread, interleaved, the order
reversed in odd rounds.  That scores and picks are equal is asserted before the clock starts.

    OMP_NUM_THREADS=1 python benchmarks/selection.py --rounds 7
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timing
import torch
from timing import Way, counted, device_of, interleaved, make_model, make_prompts, ratio, sizes, table, word
from torch import Tensor

import tl_em as em
from tl_em.directions.direction import Direction
from tl_em.metrics import FLOOR, RefusalLogOdds, single_token
from tl_em.models.hooks import hooked
from tl_em.models.prompts import encode

SURVIVE_INDUCE, SURVIVE_KL = 0.25, 0.11  # of all candidates


@dataclass(frozen=True)
class Size(timing.Size):
    """A model and a set of prompts."""

    positions: int = 4
    prompts: int = 8
    tokens: int = 12


SIZES = (Size("overhead-bound", 64), Size("matmul-bound", 512, prompts=6))


def make_sets(size: Size) -> tuple[em.ContrastSet, em.ContrastSet]:
    """Prompts to extract from and to choose on."""

    def prompts(own: int, seed: int) -> list[str]:
        return make_prompts(size.prompts, seed=seed, own=own, shortest=size.tokens, longest=size.tokens)

    first, second = (em.ContrastSet(prompts(10, seed), prompts(20, seed + 1)) for seed in (0, 2))
    return first, second


# --- The reference ----------------------------------------------------------------------------------------------------


def refusal(logits: Tensor, token: int) -> float:
    p = logits.double()[:, -1].softmax(-1)[:, token]
    return float(((p + FLOOR).log() - (1 - p + FLOOR).log()).mean())


def added(direction: Direction, x: Tensor, hook: Any) -> Tensor:
    return x + direction.vector.to(x.device, x.dtype)


def ablation(model: Any, direction: Direction) -> list[tuple[str, Callable[..., Tensor]]]:
    def ablate(x: Tensor, hook: Any) -> Tensor:
        r = direction.unit.to(x.device, x.dtype)
        return x - (x @ r)[..., None] * r

    streams = ("resid_pre", "attn_out", "mlp_out")
    return [(f"blocks.{layer}.hook_{stream}", ablate) for layer in range(model.cfg.n_layers) for stream in streams]


def reference(model: Any, candidates: Sequence[Direction], contrast: em.ContrastSet) -> Any:
    """All three scores of every candidate, as published."""
    import pandas as pd

    positive, negative = (
        torch.tensor([prompt.ids for prompt in encode(model, prompts)], device=model.cfg.device)
        for prompts in (contrast.positive, contrast.negative)
    )
    token = single_token(model, word(7))
    rows = []
    with torch.no_grad():
        before = model(negative)[:, -1].double().log_softmax(-1)
        for direction in candidates:
            with hooked(model, ablation(model, direction)):
                bypass = refusal(model(positive), token)
            with hooked(model, [(direction.site.hook_name, partial(added, direction))]):
                induce = refusal(model(negative), token)
            with hooked(model, ablation(model, direction)):
                after = model(negative)[:, -1].double().log_softmax(-1)
            kl = float((before.exp() * (before - after)).sum(-1).mean())
            rows.append((direction.position, direction.site.layer, bypass, induce, kl))
    return pd.DataFrame(rows, columns=["position", "layer", "bypass", "induce", "kl"])


def published_bounds(scores: Any, n_layers: int) -> dict[str, float]:
    """Bounds under which as large a share survives as in the published runs."""
    left = scores[scores["layer"] < int(0.8 * n_layers)]
    left = left.nlargest(round(SURVIVE_INDUCE * len(scores)), "induce")
    few = left.nsmallest(max(1, round(SURVIVE_KL * len(scores))), "kl")
    return {"min_induce": float(left["induce"].min()) - 1e-4, "max_kl": float(few["kl"].max()) + 1e-4}


# --- Counting and timing ----------------------------------------------------------------------------------------------


def check_equal(scores: Any, full: Any, cascade: Any, bounds: dict[str, float], n_layers: int, atol: float) -> None:
    """The same scores, and the same pick three times."""
    for name in ("bypass", "induce", "kl"):
        np.testing.assert_allclose(full.table[name], scores[name], atol=atol, rtol=atol)
    choice = em.select_candidate(scores, n_layers=n_layers, **bounds)
    for found in (full, cascade):
        assert (found.direction.position, found.direction.site.layer) == choice, (found, choice)


def measure(size: Size, surface: str, rounds: int, device: torch.device) -> None:
    """Counters and ratios of one size on one surface."""
    model = make_model("qwen2", size, surface, device)
    train, select = make_sets(size)
    candidates = em.candidate_directions(model, train, positions=range(-1, -1 - size.positions, -1))
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def count(name: str, way: Way) -> None:
        with counted(model) as counts:
            found[name] = way()
        of = rows.get("reference", {})
        rows[name] = {key: f"{n} ({n / of[key]:.3f})" if key in of else n for key, n in counts.items() if n}

    def ours(**options: Any) -> Any:
        metric = RefusalLogOdds(phrases=(word(7),))
        return em.select_direction(model, candidates, select, metric=metric, **bounds, **options)

    ways: dict[str, Way] = {
        "reference": lambda: reference(model, list(candidates), select),
        "all scores": lambda: ours(full=True, controls=0),
        "cascade": lambda: ours(controls=0),
    }
    count("reference", ways["reference"])
    bounds = published_bounds(found["reference"], size.layers)
    for name in ("all scores", "cascade"):
        count(name, ways[name])
    count("cascade, 20 controls", lambda: ours(controls=20))
    exact = 1e-4 if device.type == "cpu" else 0.1  # float32 in another order; bfloat16
    check_equal(found["reference"], found["all scores"], found["cascade"], bounds, size.layers, exact)
    times = interleaved(ways, rounds=rounds, device=device)
    for name, seconds in times.items():
        rows[name]["time"] = ratio(seconds, times["reference"])
    table(f"{surface}, {size}: {len(candidates)} candidates, left after {_stages(found['all scores'])}; reference "
          f"{min(times['reference']):.2f} s, {rounds} rounds, median (least)", rows)  # fmt: skip


def _stages(full: Any) -> dict[str, int]:
    fates = set(full.table["fate"])
    gone = {"depth": {"depth"}, "induce": {"depth", "induce"}, "KL": {"depth", "induce", "kl"}}
    return {name: int(full.table["fate"].isin(fates - those).sum()) for name, those in gone.items()}


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--surface", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--size", choices=[size.name for size in SIZES], default=None)
    parser.add_argument("--weights", help="a directory with a real model, in place of random weights")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    device = device_of(options.device)
    for size in sizes(options, SIZES):
        given = size if isinstance(size, Size) else Size(**vars(size), positions=1, prompts=4)
        measure(given, options.surface, options.rounds, device)


if __name__ == "__main__":
    main()
