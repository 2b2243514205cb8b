"""What does choosing a direction cost?  ``select_direction`` against the published procedure, at equal picks.

The reference is the procedure of Arditi et al. (arXiv:2406.11717), written anew: for each candidate three forwards of
all prompts (ablated on positives, added on negatives, ablated on negatives), an edit at every block's input, attention
output and MLP output, logits of all positions, scores in float64.  Bounds are set such that the shares of candidates
that survive are those of the published runs of gemma-2b, llama-2-7b and llama-3-8b, on average (25 % by induce, 11 % by
KL too).

Counters come first, because they do not vary with the machine; then process time, one thread, interleaved, the order
reversed in odd rounds.  That scores and picks are equal is asserted before the clock starts.

    OMP_NUM_THREADS=1 python benchmarks/selection.py --rounds 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

import tl_em as em
from tl_em.directions.direction import Direction
from tl_em.metrics import FLOOR, RefusalLogOdds, single_token
from tl_em.models.hooks import hooked
from tl_em.models.loading import Surface, load_model
from tl_em.models.prompts import encode
from tl_em.models.surfaces import quiet

METRIC = RefusalLogOdds(phrases=("w7",))
SURVIVE_INDUCE, SURVIVE_KL = 0.25, 0.11  # of all candidates
WORDS = 2000


@dataclass(frozen=True)
class Size:
    """A model and a set of prompts."""

    name: str
    d_model: int
    layers: int
    positions: int
    prompts: int
    tokens: int


SIZES = (Size("overhead-bound", 64, 12, 4, 8, 12), Size("compute-bound", 384, 12, 2, 6, 12))


def make_model(size: Size, surface: Surface) -> Any:
    """A random Qwen2 of this size with a word-level tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS + 2, hidden_size=size.d_model, intermediate_size=3 * size.d_model,
        num_hidden_layers=size.layers, num_attention_heads=size.d_model // 32, num_key_value_heads=size.d_model // 32,
        max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    vocabulary = {name: i for i, name in enumerate(("<unk>", "<end>", *(f"w{i}" for i in range(WORDS))))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<end>", eos_token="<end>"
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with quiet():
        return load_model(model, surface=surface, tokenizer=tokenizer, in_place=True)


def make_sets(size: Size) -> tuple[em.ContrastSet, em.ContrastSet]:
    """Prompts to extract from and to choose on: random words, of which one third is the class's own."""
    rng = np.random.default_rng(0)

    def prompt(own: int) -> str:
        words = [int(w) for w in rng.integers(40, WORDS, size.tokens)]
        words[::3] = [int(w) for w in rng.integers(own, own + 10, len(words[::3]))]
        return " ".join(f"w{i}" for i in words)

    def contrast() -> em.ContrastSet:
        return em.ContrastSet([prompt(10) for _ in range(size.prompts)], [prompt(20) for _ in range(size.prompts)])

    return contrast(), contrast()


# --- The reference ----------------------------------------------------------------------------------------------------


def refusal(logits: Tensor, token: int) -> float:
    p = logits.double()[:, -1].softmax(-1)[:, token]
    return float(((p + FLOOR).log() - (1 - p + FLOOR).log()).mean())


def ablation(model: Any, direction: Direction) -> list[tuple[str, Callable[..., Tensor]]]:
    r = direction.unit

    def ablate(x: Tensor, hook: Any) -> Tensor:
        return x - (x @ r)[..., None] * r

    streams = ("resid_pre", "attn_out", "mlp_out")
    return [(f"blocks.{layer}.hook_{stream}", ablate) for layer in range(model.cfg.n_layers) for stream in streams]


def reference(model: Any, candidates: Sequence[Direction], contrast: em.ContrastSet) -> Any:
    """All three scores of every candidate, as published."""
    import pandas as pd

    positive, negative = (
        torch.tensor([prompt.ids for prompt in encode(model, prompts)])
        for prompts in (contrast.positive, contrast.negative)
    )
    token = single_token(model, "w7")
    rows = []
    with torch.no_grad():
        before = model(negative)[:, -1].double().log_softmax(-1)
        for direction in candidates:
            with hooked(model, ablation(model, direction)):
                bypass = refusal(model(positive), token)
            with hooked(model, [(direction.site.hook_name, lambda x, hook, v=direction.vector: x + v)]):
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


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Forwards, tokens through a block, positions unembedded."""
    counts = {"forwards": 0, "block-tokens": 0, "unembedded": 0}

    def block(x: Tensor, hook: Any) -> None:
        counts["block-tokens"] += x.shape[0] * x.shape[1]

    def unembed(module: Any, args: Any, out: Tensor) -> None:
        counts["forwards"] += 1
        counts["unembedded"] += out.shape[0] * out.shape[1]

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    handle = model.unembed.register_forward_hook(unembed)
    try:
        with hooked(model, [(name, block) for name in names]):
            yield counts
    finally:
        handle.remove()


def check_equal(scores: Any, full: Any, cascade: Any, bounds: dict[str, float], n_layers: int) -> None:
    """The same scores, and the same pick three times."""
    for name in ("bypass", "induce", "kl"):
        np.testing.assert_allclose(full.table[name], scores[name], atol=1e-4, rtol=1e-4)
    choice = em.select_candidate(scores, n_layers=n_layers, **bounds)
    for found in (full, cascade):
        assert (found.direction.position, found.direction.site.layer) == choice, (found, choice)


def measure(size: Size, surface: Surface, rounds: int) -> None:
    """Counters and ratios of one size on one surface."""
    model = make_model(size, surface)
    train, select = make_sets(size)
    candidates = em.candidate_directions(model, train, positions=range(-1, -1 - size.positions, -1))
    counts: dict[str, dict[str, int]] = {}
    found: dict[str, Any] = {}

    def count(name: str, way: Callable[[], Any]) -> None:
        with counted(model) as counts[name]:
            found[name] = way()

    count("reference", lambda: reference(model, list(candidates), select))
    bounds = published_bounds(found["reference"], size.layers)

    def ours(**options: Any) -> Any:
        return em.select_direction(model, candidates, select, metric=METRIC, **bounds, **options)

    ways: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference(model, list(candidates), select),
        "all scores": lambda: ours(full=True, controls=0),
        "cascade": lambda: ours(controls=0),
    }
    for name in ("all scores", "cascade"):
        count(name, ways[name])
    count("cascade, 20 controls", lambda: ours(controls=20))
    check_equal(found["reference"], found["all scores"], found["cascade"], bounds, size.layers)
    _head(size, surface, found["all scores"])
    _table(counts, _timed(ways, rounds))


def _head(size: Size, surface: Surface, full: Any) -> None:
    left = {name: int(full.table["fate"].isin(kept).sum()) for name, kept in _stages(full).items()}
    print(f"\n{size.name}, {surface}: {size}, {len(full.table)} candidates, left after {left}")
    print(f"pick: position {full.direction.position}, layer {full.direction.site.layer}, the same three times")


def _table(counts: dict[str, dict[str, int]], seconds: dict[str, list[float]]) -> None:
    base, times = counts["reference"], seconds["reference"]
    print(f"{'':22}" + "".join(f"{name:>22}" for name in (*base, "time ratio (min)")))
    for name, found in counts.items():
        cells = [f"{n} ({n / base[key]:.3f})" for key, n in found.items()]
        if name in seconds:
            ratio = [a / b for a, b in zip(seconds[name], times, strict=True)]
            cells.append(f"{statistics.median(ratio):.3f} ({min(ratio):.3f})")
        print(f"{name:22}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"reference: median {statistics.median(times):.2f} s of process time, {len(times)} rounds", flush=True)


def _stages(full: Any) -> dict[str, set[str]]:
    fates = set(full.table["fate"])
    return {"depth": fates - {"depth"}, "induce": fates - {"depth", "induce"}, "KL": fates - {"depth", "induce", "kl"}}


def _timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            start = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--surface", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--size", choices=[size.name for size in SIZES], default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for size in SIZES:
        if options.size in (None, size.name):
            measure(size, options.surface, options.rounds)


if __name__ == "__main__":
    main()
