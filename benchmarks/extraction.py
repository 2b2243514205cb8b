"""What does extraction cost?  Mean differences at the last 5 positions of all layers, over the least a surface can do.

The floor runs the same prompts on the same surface: tokenized in one call, sorted by length, in batches of 32, without
hooks and without the unembedding; what it costs when the tokens are there beforehand is in a row of its own, and so is
the floor a second time: what that row is off 1 by is the machine's.  Every other way tokenizes too, each batch as it
comes.  Beside this package's two calls (before every block, as published, which needs no last block; after every
block, which needs all) stand the procedure of refusal_direction, written anew from its description (Arditi et al.,
arXiv:2406.11717: batches of 32 in the order given, padded on the left, logits of all positions, a pass for each class,
float64 means of every block's input), and TransformerLens's ``run_with_cache``.

That all give what one prompt at a time gives (1e-4 relative) is asserted before the clock starts.  Only on a bare
GPT-2, whose learned positions left padding shifts, the published procedure gives another thing: see its row's error.

    OMP_NUM_THREADS=1 python benchmarks/extraction.py --surface bridge --family qwen2 --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/extraction.py --memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timing import (
    DEPTHS,
    SIZES,
    Size,
    Way,
    batched,
    counted,
    device_of,
    floor,
    interleaved,
    make_hf,
    make_model,
    make_prompts,
    padded,
    peak_bytes,
    ratio,
    sizes,
    sorted_batches,
    table,
)  # fmt: skip
from torch import Tensor

import tl_em as em
from tl_em.models.hooks import hook_points
from tl_em.models.prompts import encode

K = 5
POSITIONS = tuple(range(-K, 0))
EXACT = 1e-4  # relative; sums of float32 activations in another order


def make_contrast(count: int) -> em.ContrastSet:
    return em.ContrastSet(make_prompts(count, seed=0, own=10), make_prompts(count, seed=1, own=20))


Texts = tuple[Sequence[str], Sequence[str]]


def token_rows(model: Any, texts: Sequence[str]) -> list[list[int]]:
    """One call of the tokenizer."""
    return model.tokenizer(list(texts))["input_ids"]


def check_rows(model: Any, classes: Texts) -> None:
    """Raise unless all ways read the tokens that this package reads."""
    for texts in classes:
        assert token_rows(model, texts) == [list(prompt.ids) for prompt in encode(model, texts)]


# --- The ways ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow(model: Any, classes: Texts, stream: str, device: torch.device) -> Tensor:
    """[position layer d_model]: one prompt at a time, nothing padded, everything kept."""
    points = [hook_points(model)[f"blocks.{i}.hook_{stream}"] for i in range(model.cfg.n_layers)]
    seen: list[Tensor] = []
    handles = [point.register_forward_hook(lambda m, a, out: seen.append(out[0, -K:].double())) for point in points]
    means = []
    for texts in classes:
        rows = token_rows(model, texts)
        seen.clear()
        for row in rows:
            model(torch.tensor([row], device=device))
        means.append(torch.stack(seen, 1).unflatten(1, (len(rows), len(points))).mean(1))
    for handle in handles:
        handle.remove()
    return (means[0] - means[1]).cpu()


@torch.no_grad()
def published(
    model: Any,
    run: Callable[[Tensor, Tensor], Any],
    blocks: Sequence[torch.nn.Module],
    classes: Texts,
    width: int,
    device: torch.device,
) -> Tensor:
    """refusal_direction's procedure; ``blocks`` are modules whose first input is a block's input."""
    means = []
    for texts in classes:
        total = torch.zeros(K, len(blocks), width, dtype=torch.float64, device=device)

        def add(layer: int, module: Any, args: tuple[Tensor, ...], total: Tensor = total, n: int = len(texts)) -> None:
            total[:, layer] += args[0][:, -K:].to(torch.float64).sum(0) / n

        handles = [block.register_forward_pre_hook(partial(add, i)) for i, block in enumerate(blocks)]
        for some in batched(texts):
            run(*padded(token_rows(model, some), "left", device))
        for handle in handles:
            handle.remove()
        means.append(total)
    return (means[0] - means[1]).cpu()


@torch.no_grad()
def cached(model: Any, classes: Texts, device: torch.device, **options: Any) -> Tensor:
    """TransformerLens's own way: the cache of a batch, then the wanted positions of it."""
    means = []
    for texts in classes:
        total: Tensor | float = 0.0
        for some in batched(texts):
            tokens, mask = padded(token_rows(model, some), "right", device)
            _, cache = model.run_with_cache(tokens, **options)
            last = mask.sum(1, keepdim=True) + torch.tensor(POSITIONS, device=device)
            each = torch.arange(len(some), device=device)[:, None]
            kept = [cache[f"blocks.{i}.hook_resid_pre"][each, last] for i in range(model.cfg.n_layers)]
            total = total + torch.stack(kept, 2).double().sum(0)
        means.append(total / len(texts))
    return (means[0] - means[1]).cpu()


def before_every_block(model: Any, contrast: em.ContrastSet) -> Tensor:
    found = em.candidate_directions(model, contrast, positions=POSITIONS)
    return torch.stack([d.vector for d in found]).reshape(K, model.cfg.n_layers, -1)


def after_every_block(model: Any, contrast: em.ContrastSet) -> Tensor:
    found = em.extract_directions(model, contrast, positions=POSITIONS)
    return torch.stack([d.vector for d in found]).reshape(K, model.cfg.n_layers, -1)


def make_ways(
    family: Any, size: Size, surface: str, contrast: em.ContrastSet, device: torch.device
) -> tuple[Any, dict[str, Way]]:
    model = make_model(family, size, surface, device)
    hf = make_hf(family, size, device)
    inner: Any = hf.model.layers if family == "qwen2" else hf.transformer.h
    own = [hook_points(model)[f"blocks.{i}.hook_resid_pre"] for i in range(size.layers)]
    classes: Texts = ([str(p) for p in contrast.positive], [str(p) for p in contrast.negative])
    check_rows(model, classes)
    everything = [*classes[0], *classes[1]]
    batches = sorted_batches(token_rows(model, everything), device)
    ways: dict[str, Way] = {
        "floor": lambda: floor(model, model.unembed, sorted_batches(token_rows(model, everything), device)),
        "floor, again": lambda: floor(model, model.unembed, sorted_batches(token_rows(model, everything), device)),
        "floor, tokens given": lambda: floor(model, model.unembed, batches),
        "tl_em, after every block": lambda: after_every_block(model, contrast),
        "tl_em, before every block": lambda: before_every_block(model, contrast),
        "refusal_direction's": lambda: published(
            model, lambda tokens, mask: model(tokens, attention_mask=mask), own, classes, size.d_model, device
        ),
        "run_with_cache, filtered": lambda: cached(
            model, classes, device, names_filter=lambda name: name.endswith("hook_resid_pre")
        ),
        "run_with_cache, all": lambda: cached(model, classes, device),
        "bare HF: floor": lambda: floor(hf, hf.get_output_embeddings(), batches),
        "bare HF: refusal_direction's": lambda: published(
            model, lambda tokens, mask: hf(tokens, attention_mask=mask), inner, classes, size.d_model, device
        ),
    }
    return model, ways


# --- Measuring --------------------------------------------------------------------------------------------------------


def measure(
    family: Any, size: Size, surface: str, rounds: int, prompts: int, device: torch.device, only: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """A table of one model, printed and returned: counters, errors, peak memory, time over the floor."""
    contrast = make_contrast(prompts)
    model, ways = make_ways(family, size, surface, contrast, device)
    ways = {name: way for name, way in ways.items() if not only or name in (*only, "floor")}
    classes: Texts = ([str(p) for p in contrast.positive], [str(p) for p in contrast.negative])
    expected = {stream: slow(model, classes, stream, device) for stream in ("resid_pre", "resid_post")}
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        found: list[Any] = []
        with counted(model) as counts:
            peak = peak_bytes(lambda way=way, found=found: found.append(way()), device)
        off = relative(found[0], expected["resid_post" if "after" in name else "resid_pre"])
        limit = EXACT if device.type == "cpu" else 0.05  # bfloat16 weights
        assert off < limit or (family == "gpt2" and name.startswith("bare HF")), (name, off)
        rows[name] = {} if name.startswith("bare") else dict(counts)
        rows[name] |= {"error": f"{off:.0e}" if off else "", "MiB": f"{peak / 2**20:.1f}"}
    times = interleaved(ways, rounds=rounds, device=device)
    for name, row in rows.items():
        row["over the floor"] = ratio(times[name], times["floor"])
    table(f"{family}, {surface}, {size}: {prompts}+{prompts} prompts, {rounds} rounds, floor "
          f"{min(times['floor']):.2f} s; time median (least)", rows)  # fmt: skip
    return rows


def relative(found: Tensor | None, expected: Tensor) -> float:
    """The largest distance of a direction from the expected one, over the length of that; 0 where there is none."""
    if found is None:
        return 0.0
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def memory(family: Any, size: Size, surface: str, device: torch.device) -> None:
    """Peak memory by number of prompts."""
    rows: dict[str, dict[str, Any]] = {}
    for prompts in (32, 64, 256, 2048):
        _, ways = make_ways(family, size, surface, make_contrast(prompts), device)
        for name in ("floor", "tl_em, after every block", "tl_em, before every block"):
            rows.setdefault(name, {})[f"{2 * prompts} prompts"] = f"{peak_bytes(ways[name], device) / 2**20:.1f}"
    table(f"{family}, {surface}, {size}: peak MiB beyond the weights", rows)


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=64, help="of each class")
    parser.add_argument("--surface", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--family", choices=("qwen2", "gpt2"), default="qwen2")
    parser.add_argument("--size", choices=[size.name for size in (*SIZES, *DEPTHS)], default=None)
    parser.add_argument("--memory", action="store_true", help="only peak memory, by number of prompts")
    parser.add_argument("--weights", help="a directory with a real model, in place of random weights")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    device = device_of(options.device)
    for size in sizes(options, (*SIZES, *DEPTHS)):
        if options.memory:
            memory(options.family, size, options.surface, device)
        else:
            measure(options.family, size, options.surface, options.rounds, options.prompts, device)


if __name__ == "__main__":
    main()
