"""What do hooks, interventions, steered generation and weight edits cost, over the same surface without them?

    attach      a read hook in every layer, attached, run through once and detached, over a plain forward
    ablate      ablation at every write of the residual stream, over a plain forward
    generate    generation with a direction added at one site, over the surface's own ``generate``
    mixed       answers to prompts of many lengths, over length by length and Hugging Face's generate
    samples     eight samples of each prompt, over Hugging Face's generate
    weights     ``orthogonalize_``, and edit and restore as a context, over one forward of 16 x 48 tokens
    project     64 directions projected at every layer in one streaming pass, over one direction

Beside them stand TransformerLens's own contexts and bare torch hooks, and for generation, whose ratios are near 1, the
baseline a second time: what that row is off 1 by is the machine's.  Equality comes first: read hooks leave the
logits as they are, all three forms of ablation agree, generation without a steer gives the surface's own tokens, and
restored weights are the old ones bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/hooks.py --surface bridge --rounds 7
    OMP_NUM_THREADS=1 python benchmarks/hooks.py --surface hooked --only attach
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from timing import (
    DEPTHS,
    SIZES,
    Size,
    Way,
    counted,
    device_of,
    interleaved,
    make_hf,
    make_model,
    make_prompts,
    peak_bytes,
    ratio,
    sizes,
    table,
)  # fmt: skip
from torch import Tensor
from transformers import AutoTokenizer

import tl_em as em
from tl_em.models.class_means import class_moments
from tl_em.models.hooks import hook_points, hooked
from tl_em.models.prompts import encode
from tl_em.models.residual_writes import write_points

NEW, PROMPT, ROWS, WIDTH, MANY = 24, 24, 16, 48, 64


def make_tokens(device: torch.device, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randint(2, 2000, (rows, width), generator=torch.Generator().manual_seed(0)).to(device)


def make_direction(size: Size, layer: int, seed: int = 0) -> em.Direction:
    vector = torch.randn(size.d_model, generator=torch.Generator().manual_seed(seed))
    return em.Direction(vector, em.Site(layer))


Rows = dict[str, dict[str, Any]]


def show(
    title: str, ways: dict[str, Way], bases: dict[str, str], rounds: int, device: torch.device, model: Any,
    only: Sequence[str] = (),
) -> Rows:  # fmt: skip
    """Count and time the ways, those named alone where some are, and print each over each baseline (a column's name ->
    a way's name)."""
    rows: Rows = {}
    bases = {column: base for column, base in bases.items() if not only or base in only}
    for name in [name for name in ways if not only or name in only]:
        with counted(model) as counts:
            peak = peak_bytes(ways[name], device)
        rows[name] = {} if name.startswith("HF") else dict(counts)
        rows[name]["MiB"] = f"{peak / 2**20:.1f}"
    times = interleaved({name: ways[name] for name in rows}, rounds=rounds, device=device)
    for name in rows:
        rows[name] |= {column: ratio(times[name], times[base]) for column, base in bases.items()}
        rows[name]["ms"] = f"{1e3 * min(times[name]):.1f}"
    table(f"{title}; {rounds} rounds, median (least)", rows)
    return rows


# --- Hooks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attach(family: Any, size: Size, surface: str, rounds: int, device: torch.device, only: Sequence[str] = ()) -> Rows:
    model = make_model(family, size, surface, device)
    tokens = make_tokens(device, 8, 32)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(size.layers)]
    points = [hook_points(model)[name] for name in names]

    def look(x: Tensor, hook: Any) -> None:
        return None

    def ours() -> Tensor:
        with hooked(model, [(name, look) for name in names]):
            return model(tokens)

    def theirs() -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=[(name, look) for name in names])

    def raw() -> Tensor:
        handles = [point.register_forward_hook(lambda m, a, out: None) for point in points]
        out = model(tokens)
        for handle in handles:
            handle.remove()
        return out

    def alone() -> None:
        with hooked(model, [(name, look) for name in names], check=False):
            pass

    plain = model(tokens)
    assert all(torch.equal(way(), plain) for way in (ours, theirs, raw))
    ways: dict[str, Way] = {"plain forward": lambda: model(tokens), "tl_em hooked()": ours}
    ways |= {"attach and detach alone": alone, "bare torch hooks": raw, "TL run_with_hooks": theirs}
    title = f"attach, {family}, {surface}, {size}, 8 x 32 tokens"
    return show(title, ways, {"over plain": "plain forward"}, rounds, device, model, only)


@torch.no_grad()
def ablate(family: Any, size: Size, surface: str, rounds: int, device: torch.device, only: Sequence[str] = ()) -> Rows:
    model = make_model(family, size, surface, device)
    tokens = make_tokens(device)
    direction = make_direction(size, 4)
    intervention = em.Ablate(direction)
    unit = direction.unit.to(device, torch.float32)

    def ours() -> Tensor:
        with em.intervene(model, intervention):
            return model(tokens)

    def theirs() -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=intervention.hooks(model))

    def raw() -> Tensor:
        def remove(module: Any, args: Any, out: Tensor) -> Tensor:
            return out - ((out.float() @ unit)[..., None] * unit).to(out.dtype)

        handles = [hook_points(model)[name].register_forward_hook(remove) for name in write_points(model)]
        out = model(tokens)
        for handle in handles:
            handle.remove()
        return out

    tolerance = 1e-4 if device.type == "cpu" else 0.1  # float32 in another order; bfloat16 rounds once an edit
    expected = raw()
    assert (expected - model(tokens)).abs().max() > 1e-2
    assert all((way() - expected).abs().max() < tolerance for way in (ours, theirs))
    ways: dict[str, Way] = {"plain forward": lambda: model(tokens), "tl_em Ablate": ours}
    ways |= {"bare torch hooks": raw, "Ablate.hooks in TL run_with_hooks": theirs}
    title = f"ablate, {family}, {surface}, {size}, {ROWS} x {WIDTH} tokens, {len(write_points(model))} writes"
    return show(title, ways, {"over plain": "plain forward"}, rounds, device, model, only)


# --- Generation -------------------------------------------------------------------------------------------------------


def own_generate(model: Any, tokens: Tensor) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    if "padding_side" in inspect.signature(model.generate).parameters:
        options["padding_side"] = "right"
    return model.generate(tokens, return_type="tokens", use_past_kv_cache=True, **options)[:, tokens.shape[1] :]


@torch.no_grad()
def generate(
    family: Any, size: Size, surface: str, rounds: int, device: torch.device, only: Sequence[str] = ()
) -> Rows:
    model, hf = make_model(family, size, surface, device), make_hf(family, size, device)
    prompts = make_prompts(ROWS, seed=0, own=10, shortest=PROMPT, longest=PROMPT)
    tokens = torch.tensor([prompt.ids for prompt in encode(model, prompts)], device=device)  # as many in every row
    steer = em.Add(make_direction(size, 4), 2.0)

    def ours() -> list[str]:
        return em.generate(model, prompts, max_new_tokens=NEW)

    def steered() -> list[str]:
        with em.intervene(model, steer):
            return ours()

    def by_hand() -> Tensor:
        with model.hooks(fwd_hooks=steer.hooks(model)):
            return own_generate(model, tokens)

    def of_hf() -> Tensor:
        return hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW,
                           do_sample=False, pad_token_id=1)[:, tokens.shape[1] :]  # fmt: skip

    def text(found: Tensor) -> list[str]:
        return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found]

    assert ours() == text(own_generate(model, tokens))
    assert steered() == text(by_hand()) != ours()
    ways: dict[str, Way] = {
        "surface's generate": lambda: own_generate(model, tokens),
        "the same, again": lambda: own_generate(model, tokens),
        "em.generate": ours,
        "em.generate, steered": steered,
        "surface's generate, its own hooks": by_hand,
        "HF generate": of_hf,
    }
    title = f"generate, {family}, {surface}, {size}, {ROWS} prompts of {PROMPT}, {NEW} new tokens"
    bases = {"over the surface's": "surface's generate", "over HF's": "HF generate"}
    return show(title, ways, bases, rounds, device, model, only)


@torch.no_grad()
def mixed(family: Any, size: Size, surface: str, rounds: int, device: torch.device, only: Sequence[str] = ()) -> Rows:
    """Prompts of many lengths, of a real model chats: side by side, in pieces, length by length, and padded on the left
    by Hugging Face."""
    from tl_em.models import generate as generation
    from tl_em.models.beginnings import allow_beginnings
    from tl_em.models.prefill import allow_side_by_side

    model, hf = make_model(family, size, surface, device), make_hf(family, size, device)
    fused = make_hf(family, size, device)
    fused.set_attn_implementation("sdpa")
    texts = make_prompts(ROWS, seed=0, own=10, shortest=PROMPT // 2, longest=PROMPT + PROMPT // 2)
    rows: list[Any] = [list(prompt.ids) for prompt in encode(model, texts)]
    if size.directory:
        render = AutoTokenizer.from_pretrained(size.directory).apply_chat_template
        chats = [[{"role": "user", "content": text}] for text in texts]
        rows = [list(render(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]
    width = max(map(len, rows))
    tokens = torch.tensor([[1] * (width - len(row)) + row for row in rows]).to(device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).to(device)
    in_pieces = generation.reads_in_pieces

    def together() -> list[str]:
        return em.generate(model, rows, max_new_tokens=NEW)

    def without(allow: Callable[[Any, bool], None]) -> list[str]:
        allow(model, False)
        try:
            return together()
        finally:
            allow(model, True)

    def pieces() -> list[str]:
        return without(allow_side_by_side)

    def whole() -> list[str]:
        return without(allow_beginnings)

    def by_length() -> list[str]:
        generation.reads_in_pieces = lambda model: False
        try:
            return together()
        finally:
            generation.reads_in_pieces = in_pieces

    def of_hf(theirs: Any = hf) -> list[str]:
        made = theirs.generate(tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                               pad_token_id=1)  # fmt: skip
        return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in made[:, width:]]

    assert together() == whole() == pieces() == by_length() == of_hf() == of_hf(fused)
    ways: dict[str, Way] = {"em.generate": together, "every prompt read from its first token": whole}
    ways |= {"read in pieces": pieces, "length by length": by_length}
    ways |= {"HF generate, padded": of_hf, "HF generate, fused attention": lambda: of_hf(fused)}
    bases = {"over by length": "length by length", "over HF's": "HF generate, padded"}
    bases |= {"over HF's, fused": "HF generate, fused attention"}
    lengths = len(set(map(len, rows)))
    title = f"{ROWS} prompts of {lengths} lengths from {min(map(len, rows))} to {width}"
    return show(f"generate, {family}, {surface}, {size}, {title}, {NEW} new", ways, bases, rounds, device, model, only)


@torch.no_grad()
def samples(family: Any, size: Size, surface: str, rounds: int, device: torch.device, only: Sequence[str] = ()) -> Rows:
    """Several answers to each of a few prompts, which are read once; and as many prompts, each read by itself."""
    model, hf = make_model(family, size, surface, device), make_hf(family, size, device)
    prompts = make_prompts(2, seed=0, own=10, shortest=2 * WIDTH, longest=2 * WIDTH)
    tokens = torch.tensor([prompt.ids for prompt in encode(model, prompts)], device=device)

    def ours() -> list[list[str]]:
        return em.generate(model, prompts, max_new_tokens=NEW, temperature=1.0, samples=8)

    def each_read() -> list[list[str]]:
        def looks(x: Tensor, hook: Any) -> None:
            return None

        with hooked(model, [("blocks.0.hook_resid_pre", looks)]):  # it does not say that it treats rows alike
            return ours()

    def of_hf() -> Tensor:
        return hf.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW,
                           do_sample=True, top_k=0, num_return_sequences=8, pad_token_id=1)  # fmt: skip

    once, apart = (list(chain.from_iterable(each())) for each in (ours, each_read))
    # Logits differ by rounding (3e-5), and of 49k words some edge lies within 1e-7 of a draw now and then.
    assert sum(one == other for one, other in zip(once, apart, strict=True)) >= len(once) - 2, (once, apart)
    ways: dict[str, Way] = {"em.generate(samples=8)": ours, "every prompt read": each_read, "HF, 8 sequences": of_hf}
    title = f"generate, {family}, {surface}, {size}, 2 prompts of {tokens.shape[1]}, 8 samples, {NEW} new"
    return show(title, ways, {"over HF's": "HF, 8 sequences"}, rounds, device, model, only)


# --- Weights and projections ------------------------------------------------------------------------------------------


def weights(family: Any, size: Size, surface: str, rounds: int, device: torch.device) -> None:
    model = make_model(family, size, surface, device)
    tokens, direction = make_tokens(device), make_direction(size, 4)
    if size.directory:
        em.untie_embeddings_(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with em.interventions.orthogonalized(model, direction):
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "not restored bit for bit"

    def forward() -> Tensor:
        with torch.no_grad():
            return model(tokens)

    def context() -> None:
        with em.interventions.orthogonalized(model, direction):
            pass

    ways: dict[str, Way] = {f"forward of {ROWS} x {WIDTH}": forward}
    ways |= {"orthogonalize_": lambda: em.orthogonalize_(model, direction), "orthogonalized, edit and restore": context}
    show(f"weights, {family}, {surface}, {size}", ways, {"over a forward": next(iter(ways))}, rounds, device, model)


def project(family: Any, size: Size, surface: str, rounds: int, device: torch.device) -> None:
    model = make_model(family, size, surface, device)
    contrast = em.ContrastSet(make_prompts(32, seed=0, own=10), make_prompts(32, seed=1, own=20))
    sites = [em.Site(layer) for layer in range(size.layers)]
    vectors = torch.randn(MANY, size.d_model, generator=torch.Generator().manual_seed(0))

    def along(some: Tensor) -> Tensor:
        found = class_moments(model, contrast, sites=sites, positions=["prompt_end"], onto=some).projections
        assert found is not None
        return torch.cat(found)

    expected = em.capture(model, contrast.positive, sites, position="prompt_end") @ vectors.T
    assert torch.allclose(along(vectors)[:32, 0], expected, rtol=1e-3, atol=1e-3)
    ways: dict[str, Callable[[], Any]] = {"one": lambda: along(vectors[:1]), "64 at once": lambda: along(vectors)}
    show(f"project, {family}, {surface}, {size}, 64 prompts", ways, {"over one": "one"}, rounds, device, model)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--surface", choices=("bridge", "hooked"), default="bridge")
    parser.add_argument("--family", choices=("qwen2", "gpt2"), default="qwen2")
    parser.add_argument("--size", choices=[size.name for size in (*SIZES, *DEPTHS)], default=None)
    parts = {"attach": attach, "ablate": ablate, "generate": generate, "mixed": mixed, "samples": samples}
    parts |= {"weights": weights, "project": project}
    parser.add_argument("--only", choices=tuple(parts), default=None)
    parser.add_argument("--weights", help="a directory with a real model, in place of random weights")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    device = device_of(options.device)
    for name, part in parts.items():
        if options.only not in (None, name):
            continue
        for size in sizes(options, DEPTHS if name == "attach" else SIZES):
            part(options.family, size, options.surface, options.rounds, device)


if __name__ == "__main__":
    main()
